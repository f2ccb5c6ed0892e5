// One message of an append, before it has a form. Inside the library only. Plain data; any thread.

#ifndef KVSERVICE_CLIENT_APPEND_PART_H_
#define KVSERVICE_CLIENT_APPEND_PART_H_

#include <cstdint>

#include "absl/types/span.h"
#include "client/tensor.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice::client {

// Tensors have been checked and are borrowed.
struct AppendPart {
  // Everything but the tensors.
  v1::AppendRequest request;
  TensorView query_sample = {};  // absent if there is none
  TensorView k = {};
  TensorView v = {};
};

// What messages of a way should and may carry.
struct AppendLimits {
  // Keys and values of one message: the size at which the way is fastest.
  size_t token_bytes_aim = 0;
  // All tensors of one message.
  size_t bytes_max = 0;
};

// How much of a Write goes into one message.
struct AppendCut {
  uint32_t tokens = 0;
  // Of the queries that have positions.
  uint32_t sample_tokens = 0;
};

// Tokens [begin, begin + count) of a tensor.
inline TensorView TokensOf(const TensorView& tensor, uint32_t begin, uint32_t count) {
  const size_t token_bytes = tensor.bytes.size() / tensor.token_count;
  TensorView part = tensor;
  part.token_count = count;
  part.bytes = tensor.bytes.subspan(begin * token_bytes, count * token_bytes);
  return part;
}

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_APPEND_PART_H_
