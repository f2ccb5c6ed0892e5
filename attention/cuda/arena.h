// Memory that the host and the device exchange, and the end of a process whose device has failed.

#ifndef KVSERVICE_ATTENTION_CUDA_ARENA_H_
#define KVSERVICE_ATTENTION_CUDA_ARENA_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "attention/cuda/kernels.h"

namespace kvservice::cuda {

// How a process ends whose device reported an error in the middle of a call: such errors stick to
// the process, and what the device memory holds is unknown.
inline constexpr int kDeviceFaultExitCode = 71;

// Ends the process with kDeviceFaultExitCode, after a line on stderr, unless the code is success.
void Check(cudaError_t code, std::string_view what);

// A place of an arena, as both sides see it.
template <typename T>
struct Slot {
  T* host = nullptr;  // null without a host side
  T* device = nullptr;
};

// Memory handed out in order and taken back all at once; grows to the most that was ever needed.
// With two sides it exists twice and is copied as a whole; what is on the host alone is read and
// written by the device there. One thread.
class Arena {
 public:
  enum class Sides : uint8_t { kBoth, kDevice, kHost };
  explicit Arena(Sides sides) : sides_(sides) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Contents are arbitrary.
  template <typename T>
  Slot<T> Take(size_t count) {
    const Slot<std::byte> bytes = TakeBytes(count * sizeof(T));
    return {reinterpret_cast<T*>(bytes.host), reinterpret_cast<T*>(bytes.device)};
  }
  // Copies what was taken to the device, or to the host.
  void Upload(cudaStream_t stream);
  void Download(cudaStream_t stream);
  // The same, for a kernel to do; not while the memory grows and is in several pieces.
  bool is_in_one_piece() const { return chunks_.size() <= 1; }
  Stretch ToDevice() const;
  Stretch ToHost() const;
  // Takes everything back. The device must have finished with it.
  void Reset();

 private:
  struct Chunk {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
    size_t bytes = 0;
    size_t used = 0;
  };

  static constexpr size_t kAlignment = 256;

  // A call takes from arenas a thousand times.
  Slot<std::byte> TakeBytes(size_t bytes) {
    const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) & ~(kAlignment - 1);
    if (chunks_.empty() || chunks_.back().bytes - chunks_.back().used < rounded) Grow(rounded);
    Chunk& chunk = chunks_.back();
    Slot<std::byte> slot;
    if (chunk.host != nullptr) slot.host = chunk.host + chunk.used;
    // Pinned memory has one address.
    slot.device = chunk.device != nullptr ? chunk.device + chunk.used : slot.host;
    chunk.used += rounded;
    return slot;
  }
  void Grow(size_t bytes);
  void AddChunk(size_t bytes);
  void Free();

  const Sides sides_;
  std::vector<Chunk> chunks_;
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ARENA_H_
