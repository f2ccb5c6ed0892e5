#include "client/sequence.h"

#include <utility>

#include "client/core.h"
#include "client/error.h"
#include "client/replies.h"
#include "client/requests.h"

namespace kvservice::client {
namespace {

absl::Status Gone() { return InvalidRequest("sequence", "is closed or detached"); }

}  // namespace

Sequence::Sequence(Core* core, std::string id, uint64_t generation, uint32_t matched_tokens)
    : core_(core), id_(std::move(id)), generation_(generation), matched_tokens_(matched_tokens) {
  ++core_->borrowers;
}

Sequence::~Sequence() {
  if (core_ == nullptr) return;
  core_->drops.Push(id_, generation_);
  --core_->borrowers;
}

Sequence::Sequence(Sequence&& other) noexcept
    : core_(std::exchange(other.core_, nullptr)),
      id_(std::exchange(other.id_, std::string())),
      generation_(other.generation_),
      matched_tokens_(other.matched_tokens_) {}

Sequence& Sequence::operator=(Sequence&& other) noexcept {
  // What this object owned leaves with `taken`.
  Sequence taken(std::move(other));
  std::swap(core_, taken.core_);
  std::swap(id_, taken.id_);
  std::swap(generation_, taken.generation_);
  std::swap(matched_tokens_, taken.matched_tokens_);
  return *this;
}

AppendWriter Sequence::Append(Durability durability) const {
  return {core_, id_, generation_, durability};
}

absl::StatusOr<AttendRowResult> Sequence::Attend(const AttendQuery& query) const {
  if (core_ == nullptr) return Gone();
  const AttendRow row = {.sequence = this,
                         .position = query.position,
                         .query_count = query.query_count,
                         .policy = query.policy,
                         .given = query.given};
  AttendStep step;
  step.layer = query.layer;
  step.rows = {&row, 1};
  step.return_selected = query.return_selected;
  step.q = query.q;
  step.k = query.k;
  step.v = query.v;
  absl::StatusOr<AttendResult> result = client::Attend(core_, step);
  if (!result.ok()) return result.status();
  AttendRowResult& only = result->rows.front();
  if (!only.status.ok()) return only.status;
  return std::move(only);
}

absl::StatusOr<Sequence> Sequence::Fork(std::optional<uint32_t> length_tokens) const {
  if (core_ == nullptr) return Gone();
  v1::ForkRequest request;
  *request.mutable_handle() = MakeHandle(id_, generation_);
  if (length_tokens.has_value()) request.set_length_tokens(*length_tokens);
  v1::ForkResponse response;
  absl::Status status = core_->rpc->Fork(request, &response);
  if (status.ok()) status = CheckSequence(response.sequence(), {});
  if (!status.ok()) return status;
  const v1::SequenceHandle& handle = response.sequence().handle();
  if (handle.id() == id_) return MalformedReply("sequence.handle.id", "is the parent's");
  return Sequence(core_, handle.id(), handle.generation());
}

absl::Status Sequence::Truncate(uint32_t length_tokens) {
  if (core_ == nullptr) return Gone();
  v1::TruncateRequest request;
  *request.mutable_handle() = MakeHandle(id_, generation_);
  request.set_length_tokens(length_tokens);
  v1::TruncateResponse response;
  absl::Status status = core_->rpc->Truncate(request, &response);
  if (status.ok()) status = CheckSequence(response.sequence(), id_);
  if (status.ok()) generation_ = response.sequence().handle().generation();
  return status;
}

absl::Status Sequence::Suspend() const {
  if (core_ == nullptr) return Gone();
  v1::SuspendRequest request;
  *request.mutable_handle() = MakeHandle(id_, generation_);
  v1::SuspendResponse response;
  const absl::Status status = core_->rpc->Suspend(request, &response);
  return status.ok() ? CheckSequence(response.sequence(), id_) : status;
}

absl::Status Sequence::Resume() {
  if (core_ == nullptr) return Gone();
  v1::ResumeRequest request;
  *request.mutable_handle() = MakeHandle(id_, generation_);
  v1::ResumeResponse response;
  absl::Status status = core_->rpc->Resume(request, &response);
  if (status.ok()) status = CheckSequence(response.sequence(), id_);
  if (status.ok()) generation_ = response.sequence().handle().generation();
  return status;
}

absl::StatusOr<Transferred> Sequence::Send(const std::string& target_endpoint, bool moves) const {
  if (core_ == nullptr) return Gone();
  v1::TransferRequest request;
  *request.mutable_handle() = MakeHandle(id_, generation_);
  request.set_target_endpoint(target_endpoint);
  request.set_move(moves);
  v1::TransferResponse response;
  const absl::Status status = core_->rpc->Transfer(request, &response);
  if (!status.ok()) return status;
  if (response.handle().id().size() != id_.size()) {
    return MalformedReply("handle.id", "does not have 16 bytes");
  }
  return Transferred{.id = response.handle().id(),
                     .generation = response.handle().generation(),
                     .sent_bytes = response.sent_bytes()};
}

absl::StatusOr<Transferred> Sequence::Transfer(const std::string& target_endpoint) const {
  return Send(target_endpoint, false);
}

absl::StatusOr<Transferred> Sequence::MoveTo(const std::string& target_endpoint) {
  absl::StatusOr<Transferred> sent = Send(target_endpoint, true);
  if (sent.ok()) Detach();
  return sent;
}

absl::StatusOr<SequenceInfo> Sequence::Refresh() {
  if (core_ == nullptr) return Gone();
  v1::GetRequest request;
  *request.mutable_handle() = MakeHandle(id_, generation_);
  v1::GetResponse response;
  absl::Status status = core_->rpc->Get(request, &response);
  if (status.ok()) status = CheckSequence(response.sequence(), id_);
  if (!status.ok()) return status;
  generation_ = response.sequence().handle().generation();
  return InfoFromProto(response.sequence());
}

absl::StatusOr<SequenceInfo> Sequence::Describe() const {
  if (core_ == nullptr) return Gone();
  v1::GetRequest request;
  *request.mutable_handle() = MakeHandle(id_, generation_);
  v1::GetResponse response;
  absl::Status status = core_->rpc->Get(request, &response);
  if (status.ok()) status = CheckSequence(response.sequence(), id_);
  if (!status.ok()) return status;
  return InfoFromProto(response.sequence());
}

absl::Status Sequence::Close() {
  if (core_ == nullptr) return Gone();
  Core* const core = core_;
  v1::DropRequest request;
  *request.mutable_handle() = MakeHandle(Detach(), generation_);
  return core->rpc->Drop(request);
}

std::string Sequence::Detach() {
  if (core_ == nullptr) return {};
  --core_->borrowers;
  core_ = nullptr;
  return std::exchange(id_, std::string());
}

}  // namespace kvservice::client
