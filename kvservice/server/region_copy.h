// Tensors that lie in a lane's memory, copied once: what is checked afterwards is the copy, which
// the client cannot change. One call at a time.

#ifndef KVSERVICE_KVSERVICE_SERVER_REGION_COPY_H_
#define KVSERVICE_KVSERVICE_SERVER_REGION_COPY_H_

#include <cstddef>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/kv_layout.h"
#include "kvservice/v1/types.pb.h"

namespace kvservice {

class RegionCopy {
 public:
  // `shared` is borrowed, and may change at any time. The tensors of one call have at most
  // `bytes_max` bytes together, each rounded up to 64.
  RegionCopy(absl::Span<const std::byte> shared, size_t bytes_max);

  // Begins a call: what earlier ones have copied is gone.
  void Begin() { used_ = 0; }
  // Whether ranges of more than kLeftBytesMin are not copied but left to whoever works on the call:
  // one thread is as fast as several up to there, and here it has nothing else to do.
  void LeaveLarge(bool leaves) { leaves_large_ = leaves; }
  static constexpr size_t kLeftBytesMin = size_t{64} << 10;

  struct Payload {
    absl::Span<const std::byte> bytes;
    bool is_finite = false;
    // In the memory that may change at any time.
    bool is_shared = false;
  };
  // A range whose tensor needs `bytes` bytes. INVALID_ARGUMENT: TENSOR_REGION_UNKNOWN
  // (field.region.region), TENSOR_SIZE_MISMATCH (field.region.length_bytes),
  // TENSOR_REGION_MISALIGNED and TENSOR_REGION_OUT_OF_RANGE (field.region.offset_bytes),
  // TENSOR_REGION_TOO_LARGE (field.region.length_bytes). The result is valid until Begin.
  absl::StatusOr<Payload> Take(const v1::TensorRegion& range, DType dtype, size_t bytes,
                               std::string_view field);

 private:
  const absl::Span<const std::byte> shared_;
  const size_t bytes_max_;
  // Not initialised: pages that no call has needed take no memory.
  const std::unique_ptr<std::byte[]> copy_;
  bool leaves_large_ = false;
  size_t used_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_REGION_COPY_H_
