#include "kvservice/server/attend_reply.h"

#include <grpcpp/support/slice.h>

#include <array>
#include <cassert>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention/float16.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "kvservice/server/convert.h"

namespace kvservice {
namespace {

// Wire type 2: a length and as many bytes follow.
constexpr uint32_t LengthDelimitedTag(int field_number) {
  return static_cast<uint32_t>(field_number) << 3 | 2;
}

size_t VarintBytes(size_t value) {
  return google::protobuf::io::CodedOutputStream::VarintSize64(value);
}

void DescribeTensor(DType dtype, absl::Span<const int64_t> shape, v1::Tensor* tensor) {
  tensor->set_dtype(DTypeToProto(dtype));
  tensor->mutable_shape()->Add(shape.begin(), shape.end());
}

// A slice that keeps the container alive for as long as gRPC needs its bytes.
template <typename Container>
grpc::Slice SliceOf(Container container) {
  auto owner = std::make_unique<Container>(std::move(container));
  void* const data = owner->data();
  const size_t bytes = owner->size() * sizeof(*owner->data());
  return {data, bytes, [](void* user) { delete static_cast<Container*>(user); }, owner.release()};
}

grpc::Slice PayloadSlice(DType dtype, std::vector<float> out) {
  if (dtype == DType::kFloat32) return SliceOf(std::move(out));
  std::vector<uint16_t> narrow(out.size());
  auto* const bytes = reinterpret_cast<std::byte*>(narrow.data());
  for (size_t i = 0; i < out.size(); ++i) StoreElement(dtype, out[i], bytes, i);
  return SliceOf(std::move(narrow));
}

}  // namespace

grpc::ByteBuffer SerializeAttendReply(v1::AttendResponse* response, DType dtype, AttendCall* call) {
  const absl::Span<const int64_t> shape = call->q.shape;
  assert(shape.size() == 3);
  DescribeTensor(DType::kFloat32, shape.subspan(0, 2), response->mutable_lse());
  response->mutable_lse()->mutable_data()->assign(reinterpret_cast<const char*>(call->lse.data()),
                                                  call->lse.size() * sizeof(float));

  // The output's tensor without its payload; both are the last fields of their messages.
  v1::Tensor tensor;
  DescribeTensor(dtype, shape, &tensor);
  const grpc::Slice payload = PayloadSlice(dtype, std::move(call->out));
  const size_t payload_head_bytes = 1 + VarintBytes(payload.size());
  const size_t tensor_bytes = tensor.ByteSizeLong() + payload_head_bytes + payload.size();

  std::string head;
  {
    google::protobuf::io::StringOutputStream stream(&head);
    google::protobuf::io::CodedOutputStream coded(&stream);
    response->SerializeToCodedStream(&coded);
    coded.WriteTag(LengthDelimitedTag(v1::AttendResponse::kOutFieldNumber));
    coded.WriteVarint64(tensor_bytes);
    tensor.SerializeToCodedStream(&coded);
    coded.WriteTag(LengthDelimitedTag(v1::Tensor::kDataFieldNumber));
    coded.WriteVarint64(payload.size());
  }
  const std::array<grpc::Slice, 2> slices = {SliceOf(std::move(head)), payload};
  return {slices.data(), slices.size()};
}

}  // namespace kvservice
