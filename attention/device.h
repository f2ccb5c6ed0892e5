// A device owns memory for KV slices, appends to them, seals them (builds sketches) and executes
// batches of plans. Implementations: `reference` (scalar, double: the oracle), `cpu` (Highway),
// `cuda`. All must agree: same table of cases, stated tolerances, bounds with none.
//
// Thread rules: one thread (the engine's executor) calls Append, Seal, Copy and Attend, one at a
// time; Allocate, AllocateOnHost and NewTokenLists may be called from any thread. A device may use
// threads of its own inside a call; when a call returns all its work is done, but for what Append
// and Seal write: the device's other calls find it done, and the sources are not needed any more.

#ifndef KVSERVICE_ATTENTION_DEVICE_H_
#define KVSERVICE_ATTENTION_DEVICE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/certificate.h"
#include "attention/draws.h"
#include "attention/kv_layout.h"
#include "attention/kv_view.h"
#include "attention/plan.h"
#include "attention/sketch_table.h"

namespace kvservice {

// How rotary embeddings pair the channels of a head.
enum class RotaryStyle : uint8_t {
  kNone,         // No rotation, or unknown: cosines are taken as received.
  kHalf,         // Channel c pairs with c + rotary_dim / 2 (Llama, GPT-NeoX).
  kInterleaved,  // Channel 2c pairs with 2c + 1.
};

// What a layer computes; constant per model and layer, borrowed by calls.
struct LayerShape {
  KvLayout layout;
  // logit = scale * q.k, then softcap * tanh(logit / softcap) when softcap > 0.
  float scale = 1.0F;
  float logit_softcap = 0.0F;
  // A query at position p sees (p - sliding_window, p]; 0 = everything up to p. Attention over the
  // window is then the reference that masses refer to.
  uint32_t sliding_window = 0;
  // Inverse frequencies [rotary_dim / 2], to undo the rotation of queries before cosines. Empty
  // with kNone.
  absl::Span<const float> inverse_frequencies;
  RotaryStyle rotary_style = RotaryStyle::kNone;
};

// Lists and anchors of one sequence and layer in the memory of one device: a cache, not state, so
// dropping it is always correct. Only the device that made it looks inside. Not thread-safe;
// belongs to the executor.
class TokenLists {
 public:
  virtual ~TokenLists() = default;
  // A copy for a forked sequence (costly: named, not a constructor).
  virtual std::unique_ptr<TokenLists> Copy() const = 0;
  // Forgets everything at or above `length` (truncate).
  virtual void Truncate(uint32_t length) = 0;
  virtual size_t bytes() const = 0;
};

// Memory of a device, aligned to 256 bytes and released by the destructor. Its bytes may lie where
// the host cannot read them: Device::Copy moves them. Move-only.
class DeviceMemory {
 public:
  using Release = void (*)(std::byte* data, size_t bytes);
  DeviceMemory() = default;
  DeviceMemory(std::byte* data, size_t bytes, Release release)
      : data_(data), bytes_(bytes), release_(release) {}
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(release_, other.release_);
    return *this;
  }
  ~DeviceMemory() {
    if (data_ != nullptr) release_(data_, bytes_);
  }
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  Release release_ = nullptr;
};

// Bytes to copy. Either end may be memory of the device or of the host; the two do not overlap.
struct MemoryCopy {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  size_t bytes = 0;
};

// Copies `token_count` rows into one slice, starting at token `first` of the block.
struct AppendSlice {
  std::byte* slice = nullptr;
  uint32_t first = 0;
  uint32_t token_count = 0;
  // [token_count][kv_head_count][head_dim] in the cache dtype, contiguous.
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
};

// Builds the sketch of one full slice.
struct SealSlice {
  const std::byte* slice = nullptr;
  // SketchLayout(layout).slice_bytes() long, 64-byte aligned.
  std::byte* sketch = nullptr;
  // Index of the slice in its sequence: slice 0 holds the sinks.
  uint32_t block_index = 0;
  // [kv_head_count], one table per KV head.
  absl::Span<const SketchTable> tables;
};

// What a device says about one KV head of one row.
struct GroupReport {
  Action action = Action::kDense;
  // A full scan was made to choose tokens (not only to prove a bound, not only to complete a reused
  // list).
  bool scanned = false;
  // Rows (K and V) that were read for the output, and tokens whose sketches were read.
  uint32_t tokens_read = 0;
  uint32_t tokens_scanned = 0;
  // Sampled tokens of all its query heads: keys alone, and keys with values.
  uint32_t keys_sampled = 0;
  uint32_t rows_sampled = 0;
  // Largest of the anchors' cosines (the smallest over the group's heads each); -2 when not
  // computed.
  float similarity = -2.0F;
  // Share of mass that the most similar anchor's list was estimated to drop (Plan::
  // reuse_mass_limit), whether it was used or not; negative when not estimated.
  float sharing_estimate = -1.0F;
  // For what the theory assumes about sharing (selector/assumed.h), with Source::kReuse: at least
  // the largest norm of the KV head's keys, and the largest distance of the group's queries to
  // those of the anchor whose list was taken, before rotation. Negative = not known, no list taken.
  float key_norm_max = -1.0F;
  float query_distance = -1.0F;
};

// One row of a call. Inputs are borrowed and outputs are caller's memory.
struct AttendRow {
  KvView view;
  // Index of the first query token; position + query_count == view.length (the query tokens' own K
  // and V are in the view).
  uint32_t position = 0;
  uint32_t query_count = 1;
  // [query_count][query_head_count][head_dim], finite.
  const float* q = nullptr;
  Plan plan;
  // [kv_head_count], the tables that the sequence's sketches were made with.
  absl::Span<const SketchTable> tables;
  // Key of the row's random numbers, used when the plan proves with kConfidence: secret, and never
  // the same for two calls (attention/draws.h).
  std::array<std::byte, kDrawKeyBytes> draw_key{};

  float* out = nullptr;                     // [query_count][query_head_count][head_dim], never read
  float* lse = nullptr;                     // [query_count][query_head_count], natural log
  HeadCertificate* certificates = nullptr;  // [query_count][query_head_count]
  GroupReport* groups = nullptr;            // [kv_head_count]
  // Optional: [kv_head_count] lists that receive the positions attended, ascending. In shadow mode:
  // the selection that was judged.
  std::vector<uint32_t>* selected = nullptr;
  // Set by the device; a failed row's out and lse are zero. FAILED_PRECONDITION = the bound was not
  // met and the plan says kFail.
  absl::Status status;
};

class Device {
 public:
  virtual ~Device() = default;
  // "reference", "cpu", "cuda".
  virtual std::string_view name() const = 0;
  // Tokens of a sequence below which certified attention (mass .05) is no faster here than dense,
  // as measured; 0 = nothing was found.
  virtual uint32_t certified_from_tokens() const { return 0; }
  // RESOURCE_EXHAUSTED when the memory cannot be had. Contents are zero.
  virtual absl::StatusOr<DeviceMemory> Allocate(size_t bytes) = 0;
  // Memory of the host that the device reads and writes in place, slower than its own. The same as
  // Allocate on a device whose memory is the host's.
  virtual absl::StatusOr<DeviceMemory> AllocateOnHost(size_t bytes) { return Allocate(bytes); }
  // Lists for one sequence and layer: at most `anchors_max` anchors per KV head, the least recently
  // used goes first.
  virtual std::unique_ptr<TokenLists> NewTokenLists(const KvLayout& layout,
                                                    uint32_t anchors_max) = 0;
  // In the order of the span; sees what earlier calls wrote.
  virtual void Copy(absl::Span<const MemoryCopy> copies) = 0;
  virtual void Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) = 0;
  virtual void Seal(const KvLayout& layout, absl::Span<const SealSlice> slices) = 0;
  // Executes one layer's rows. Row errors go to AttendRow::status; nothing else can fail on a host
  // device. Begun calls may be on their way.
  virtual void Attend(const LayerShape& shape, absl::Span<AttendRow> rows) = 0;

  // The same in two halves, for devices that work while the host does something else. Begin ends
  // when only the device has work to do, Finish ends the call that was begun first. Between them
  // the shape, the rows and what these point to are borrowed, what rows write is nobody else's, and
  // no other call, Append, Seal or Copy may change what they read or write: their sequences'
  // blocks, sketches and lists. At most calls_max() calls may be begun and not finished.
  virtual uint32_t calls_max() const { return 1; }
  virtual void Begin(const LayerShape& shape, absl::Span<AttendRow> rows) { Attend(shape, rows); }
  virtual void Finish() {}
  // True when Finish would not have to wait for the device. A call has been begun.
  virtual bool IsDone() { return true; }

  // Runs task(i) once for every i < count, on the threads that work inside calls, the caller's
  // among them, and returns when all have run. What Begin has sent goes on meanwhile.
  virtual void ParallelFor(uint32_t count, absl::FunctionRef<void(uint32_t)> task) {
    for (uint32_t i = 0; i < count; ++i) task(i);
  }
};

struct DeviceOptions {
  // Threads that work inside a call, the caller's included; 0 = one per CPU.
  uint32_t thread_count = 0;
  // Time for which the CUDA device's threads look for work before they sleep; 0 = it adapts. The
  // CPU device adapts always: its threads come back to work sooner.
  uint32_t spin_us = 0;
};

// name: "reference", "cpu", "cuda" or "auto". INVALID_ARGUMENT for other names; UNAVAILABLE for
// "cuda" where there is no GPU, or the build is without it. "auto" is that device where there is
// one, else the CPU; Device::name() says which.
absl::StatusOr<std::unique_ptr<Device>> NewDevice(std::string_view name,
                                                  const DeviceOptions& options);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_DEVICE_H_
