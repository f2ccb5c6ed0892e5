// Private copies of the tensors of calls that lie in memory which others may change, and whether
// what calls sent is finite. Executor thread; the copying itself is shared out over the device's
// threads, as it is most of what a call costs before it is planned.

#ifndef KVSERVICE_KVSERVICE_TENSOR_COPIES_H_
#define KVSERVICE_KVSERVICE_TENSOR_COPIES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "attention/device.h"
#include "kvservice/engine.h"

namespace kvservice {

class TensorCopies {
 public:
  // Begins a batch; what was copied for the one before is gone. Makes room for the calls' tensors.
  void Begin(absl::Span<AttendCall* const> calls);
  // Copies the tensors of one of them that are shared, which become the copies, and looks at all.
  // Their shapes are those of the call's rows.
  void Take(AttendCall* call, Device* device);
  // True if every element of the row's q, k and v is finite; of the call that was taken last.
  bool is_finite(uint32_t row) const { return finite_[row] != 0; }

 private:
  // Not initialised, and kept from batch to batch.
  std::unique_ptr<std::byte[]> memory_;
  size_t capacity_ = 0;
  size_t used_ = 0;
  // Of a call: [row], and the first of each row's query tokens with their number at the end.
  std::vector<uint8_t> finite_;
  std::vector<uint64_t> first_tokens_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_TENSOR_COPIES_H_
