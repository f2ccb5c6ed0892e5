#include "kvservice/server/attend_reply.h"

#include <grpcpp/support/slice.h>

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"

namespace kvservice {
namespace {

// Wire type 2: a length and as many bytes follow.
constexpr uint32_t LengthDelimitedTag(int field_number) {
  return static_cast<uint32_t>(field_number) << 3 | 2;
}

size_t VarintBytes(size_t value) {
  return google::protobuf::io::CodedOutputStream::VarintSize64(value);
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
  StoreOutput(dtype, out, reinterpret_cast<std::byte*>(narrow.data()));
  return SliceOf(std::move(narrow));
}

constexpr uint32_t kRowTag = LengthDelimitedTag(v1::AttendResponse::kResultsFieldNumber);

}  // namespace

size_t RowFieldsBytes(const AttendRun& run) {
  size_t bytes = 0;
  for (const std::string& row : run.row_bytes) {
    bytes += VarintBytes(kRowTag) + VarintBytes(row.size()) + row.size();
  }
  return bytes;
}

uint8_t* WriteRowFields(const AttendRun& run, uint8_t* to) {
  using google::protobuf::io::CodedOutputStream;
  for (const std::string& row : run.row_bytes) {
    to = CodedOutputStream::WriteTagToArray(kRowTag, to);
    to = CodedOutputStream::WriteVarint64ToArray(row.size(), to);
    to = CodedOutputStream::WriteRawToArray(row.data(), static_cast<int>(row.size()), to);
  }
  return to;
}

grpc::ByteBuffer SerializeAttendReply(v1::AttendResponse* response, AttendRun* run) {
  // The output's tensor without its payload; both are the last fields of their messages.
  v1::Tensor tensor;
  DescribeOutputs(*run, response->mutable_lse(), &tensor);
  const AttendCall& call = run->call;
  response->mutable_lse()->mutable_data()->assign(reinterpret_cast<const char*>(call.lse.data()),
                                                  call.lse.size() * sizeof(float));
  const grpc::Slice payload = PayloadSlice(run->output_dtype, std::move(run->call.out));
  const size_t payload_head_bytes = 1 + VarintBytes(payload.size());
  const size_t tensor_bytes = tensor.ByteSizeLong() + payload_head_bytes + payload.size();

  std::string head(RowFieldsBytes(*run), '\0');
  WriteRowFields(*run, reinterpret_cast<uint8_t*>(head.data()));
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
