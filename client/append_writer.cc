#include "client/append_writer.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include "client/append_part.h"
#include "client/core.h"
#include "client/error.h"
#include "client/lane_append.h"
#include "client/replies.h"
#include "client/requests.h"

namespace kvservice::client {
namespace {

// Sampled queries of one message, as the server allows them.
constexpr size_t kSampleTokensMax = 256;

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

// Nothing if a message cannot take even the least of it.
std::optional<AppendCut> CutFor(const AppendLimits& limits, const TensorView& k,
                                const QuerySample& sample) {
  const size_t token_bytes = 2 * k.bytes.size() / k.token_count;
  if (token_bytes > limits.bytes_max) return std::nullopt;
  // Queries may take half of a message that is no larger than its keys and values could be.
  const size_t room = sample.q.empty() ? limits.bytes_max : limits.bytes_max / 2;
  const size_t tokens = std::max<size_t>(1, std::min(limits.token_bytes_aim, room) / token_bytes);
  AppendCut cut{.tokens = static_cast<uint32_t>(tokens)};
  const size_t left = limits.bytes_max - tokens * token_bytes;
  if (sample.q.empty()) return cut;
  if (sample.positions.empty()) {
    return sample.q.bytes.size() <= left ? std::optional(cut) : std::nullopt;
  }
  const size_t query_bytes = sample.q.bytes.size() / sample.q.token_count;
  cut.sample_tokens = static_cast<uint32_t>(std::min(kSampleTokensMax, left / query_bytes));
  return cut.sample_tokens > 0 ? std::optional(cut) : std::nullopt;
}

// The queries of a message's tokens [begin, *end); where there are too many of them for one message
// it ends earlier. Those without positions travel with the first message.
void PutSample(const QuerySample& sample, const AppendCut& cut, uint64_t begin, bool is_first,
               uint64_t* end, AppendPart* part) {
  part->query_sample = {};
  part->request.clear_query_sample_positions();
  if (sample.q.empty()) return;
  const absl::Span<const uint32_t> positions = sample.positions;
  if (positions.empty()) {
    if (is_first) part->query_sample = sample.q;
    return;
  }
  const auto first = std::lower_bound(positions.begin(), positions.end(), begin);
  auto last = std::lower_bound(first, positions.end(), *end);
  if (last - first > cut.sample_tokens) {
    last = first + cut.sample_tokens;
    *end = *last;
  }
  if (first == last) return;
  part->query_sample = TokensOf(sample.q, static_cast<uint32_t>(first - positions.begin()),
                                static_cast<uint32_t>(last - first));
  part->request.mutable_query_sample_positions()->Add(first, last);
}

}  // namespace

AppendWriter::AppendWriter(Core* core, std::string id, uint64_t generation, Durability durability)
    : core_(core), id_(std::move(id)), generation_(generation), durability_(durability) {
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
  std::optional<AppendCut> cut;
  if (stream_ != nullptr) cut = CutFor(stream_->limits(), k, sample);
  if (stream_ != nullptr && !cut.has_value()) {
    const absl::Status finished = FinishStream();
    if (!finished.ok()) return finished;
  }
  if (stream_ == nullptr) {
    stream_ = OpenLaneAppend(core_);
    if (stream_ != nullptr) cut = CutFor(stream_->limits(), k, sample);
    // Streams take messages of any size.
    if (!cut.has_value()) stream_ = core_->rpc->OpenAppend();
    if (!cut.has_value()) cut = CutFor(stream_->limits(), k, sample);
    opened_ = now;
  }
  return WriteParts(layer, position, k, v, sample, *cut);
}

absl::Status AppendWriter::WriteParts(uint32_t layer, uint32_t position, const TensorView& k,
                                      const TensorView& v, const QuerySample& sample,
                                      const AppendCut& cut) {
  AppendPart part;
  *part.request.mutable_handle() = MakeHandle(id_, generation_);
  part.request.set_layer(layer);
  if (durability_ == Durability::kDurable) part.request.set_durability(v1::DURABILITY_DURABLE);
  uint32_t count = 0;
  for (uint32_t begin = 0; begin < k.token_count; begin += count) {
    uint64_t end =
        uint64_t{position} + std::min<uint64_t>(k.token_count, uint64_t{begin} + cut.tokens);
    PutSample(sample, cut, uint64_t{position} + begin, begin == 0, &end, &part);
    count = static_cast<uint32_t>(end - position) - begin;
    part.request.set_position(position + begin);
    part.k = TokensOf(k, begin, count);
    part.v = TokensOf(v, begin, count);
    if (!stream_->Write(part)) return FinishStream();
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
  receipt_.transport = stream_->transport();
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
  receipt_.durable_tokens = response.sequence().durable_tokens();
  receipt_.message_count += response.message_count();
  receipt_.duplicate_count += response.duplicate_count();
  return status_;
}

}  // namespace kvservice::client
