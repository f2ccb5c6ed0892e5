#include "client/append_writer.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "client/core.h"
#include "client/error.h"
#include "client/replies.h"
#include "client/requests.h"

namespace kvservice::client {
namespace {

// Keys and values of one message: the size at which streams are fastest.
constexpr size_t kMessageBytes = size_t{1} << 20;
// Sampled queries of one message, as the server allows them.
constexpr ptrdiff_t kSampleTokensMax = 256;

absl::Status CheckPair(const TensorView& k, const TensorView& v) {
  absl::Status status = CheckTensor(k, "k");
  if (status.ok()) status = CheckTensor(v, "v");
  if (!status.ok()) return status;
  const bool alike = k.dtype == v.dtype && k.token_count == v.token_count &&
                     k.head_count == v.head_count && k.head_dim == v.head_dim;
  return alike ? absl::OkStatus() : InvalidRequest("v", "differs from k in type or shape");
}

absl::Status CheckSample(const QuerySample& sample, uint32_t position, uint32_t token_count) {
  const absl::Span<const uint32_t> positions = sample.positions;
  if (sample.q.empty()) {
    return positions.empty() ? absl::OkStatus()
                             : InvalidRequest("query_sample_positions", "come without queries");
  }
  absl::Status status = CheckTensor(sample.q, "query_sample");
  if (!status.ok() || positions.empty()) return status;
  if (positions.size() != sample.q.token_count) {
    return InvalidRequest("query_sample_positions", "are not one for each query");
  }
  const uint64_t end = uint64_t{position} + token_count;
  const bool ascending = std::adjacent_find(positions.begin(), positions.end(),
                                            std::greater_equal<>()) == positions.end();
  if (ascending && positions.front() >= position && positions.back() < end) {
    return absl::OkStatus();
  }
  return InvalidRequest("query_sample_positions", "are not ascending positions of the tokens");
}

// The queries of a message's tokens [begin, *end); where there are too many of them for one message
// it ends earlier. Those without positions travel with the first message.
void PutSample(const QuerySample& sample, uint64_t begin, bool is_first, uint64_t* end,
               v1::AppendRequest* request) {
  request->clear_query_sample();
  request->clear_query_sample_positions();
  if (sample.q.empty()) return;
  const absl::Span<const uint32_t> positions = sample.positions;
  if (positions.empty()) {
    if (is_first) {
      TensorToProto(sample.q, 0, sample.q.token_count, request->mutable_query_sample());
    }
    return;
  }
  const auto first = std::lower_bound(positions.begin(), positions.end(), begin);
  auto last = std::lower_bound(first, positions.end(), *end);
  if (last - first > kSampleTokensMax) {
    last = first + kSampleTokensMax;
    *end = *last;
  }
  if (first == last) return;
  TensorToProto(sample.q, static_cast<uint32_t>(first - positions.begin()),
                static_cast<uint32_t>(last - first), request->mutable_query_sample());
  request->mutable_query_sample_positions()->Add(first, last);
}

}  // namespace

AppendWriter::AppendWriter(Core* core, std::string id, uint64_t generation)
    : core_(core), id_(std::move(id)), generation_(generation) {
  if (core_ == nullptr) status_ = InvalidRequest("sequence", "is closed or detached");
}

AppendWriter::~AppendWriter() = default;
AppendWriter::AppendWriter(AppendWriter&&) noexcept = default;
AppendWriter& AppendWriter::operator=(AppendWriter&&) noexcept = default;

absl::Status AppendWriter::Write(uint32_t layer, uint32_t position, const TensorView& k,
                                 const TensorView& v, const QuerySample& sample) {
  if (!status_.ok()) return status_;
  // Nothing was sent: the writer stays usable.
  absl::Status checked = CheckPair(k, v);
  if (checked.ok()) checked = CheckSample(sample, position, k.token_count);
  if (!checked.ok()) return checked;
  const auto now = std::chrono::steady_clock::now();
  if (stream_ != nullptr && now - opened_ > core_->options.deadlines.admin / 2) {
    const absl::Status finished = FinishStream();
    if (!finished.ok()) return finished;
  }
  if (stream_ == nullptr) {
    stream_ = core_->rpc->OpenAppend();
    opened_ = now;
  }

  v1::AppendRequest request;
  *request.mutable_handle() = MakeHandle(id_, generation_);
  request.set_layer(layer);
  const size_t token_bytes = 2 * k.bytes.size() / k.token_count;
  const auto step = static_cast<uint32_t>(std::max<size_t>(1, kMessageBytes / token_bytes));
  uint32_t count = 0;
  for (uint32_t begin = 0; begin < k.token_count; begin += count) {
    uint64_t end = uint64_t{position} + std::min(k.token_count, begin + step);
    PutSample(sample, uint64_t{position} + begin, begin == 0, &end, &request);
    count = static_cast<uint32_t>(end - position) - begin;
    request.set_position(position + begin);
    TensorToProto(k, begin, count, request.mutable_k());
    TensorToProto(v, begin, count, request.mutable_v());
    if (!stream_->Write(request)) return FinishStream();
    ++sent_;
  }
  return absl::OkStatus();
}

absl::StatusOr<Receipt> AppendWriter::Commit() {
  if (status_.ok() && stream_ != nullptr) FinishStream().IgnoreError();
  if (!status_.ok()) return status_;
  return receipt_;
}

absl::Status AppendWriter::FinishStream() {
  v1::AppendResponse response;
  status_ = stream_->Finish(&response);
  stream_.reset();
  if (status_.ok()) status_ = CheckSequence(response.sequence(), id_);
  if (status_.ok() && response.message_count() != sent_) {
    status_ = MalformedReply("message_count", "is " + std::to_string(response.message_count()) +
                                                  " after " + std::to_string(sent_) + " messages");
  }
  sent_ = 0;
  if (!status_.ok()) return status_;
  receipt_.length_tokens = response.sequence().length_tokens();
  receipt_.length_max_tokens = response.sequence().length_max_tokens();
  receipt_.message_count += response.message_count();
  receipt_.duplicate_count += response.duplicate_count();
  return status_;
}

}  // namespace kvservice::client
