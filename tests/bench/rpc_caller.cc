#include "tests/bench/rpc_caller.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvservice::bench {
namespace {

constexpr uint32_t kHeadDim = 256;
constexpr uint32_t kTokens = 8;

}  // namespace

absl::StatusOr<std::unique_ptr<RpcCaller>> RpcCaller::Make(const client::ClientOptions& options,
                                                           size_t payload_bytes, bool in_place) {
  auto client = client::Client::Connect(options);
  if (!client.ok()) return client.status();
  std::unique_ptr<RpcCaller> caller(new RpcCaller(*std::move(client), payload_bytes));
  const absl::Status prepared = caller->Prepare();
  if (!prepared.ok()) return prepared;
  if (in_place) caller->UseBuffers();
  return caller;
}

RpcCaller::RpcCaller(std::unique_ptr<client::Client> client, size_t payload_bytes)
    : client_(std::move(client)),
      token_count_(payload_bytes <= 4096 ? 1 : kTokens),
      head_count_(static_cast<uint32_t>(payload_bytes / sizeof(float) / kHeadDim / token_count_)),
      q_(payload_bytes / sizeof(float), 0.5F) {}

RpcCaller::~RpcCaller() {
  if (foreign_ != nullptr) foreign_->Detach();
}

absl::Status RpcCaller::Call() {
  client::AttendStep step;
  step.rows = absl::MakeSpan(rows_).first(token_count_ == 1 ? 1 : 2);
  step.q = client::Float32View(q_, token_count_, head_count_, kHeadDim);
  if (buffers_.has_value()) step.SetBuffers(&*buffers_, false);
  auto result = client_->Attend(step);
  if (!result.ok()) return result.status();
  const client::AttendRowResult& row = result->rows[0];
  if (!row.status.ok()) return row.status;
  const absl::Span<const float> out = buffers_.has_value() ? buffers_->out() : row.out;
  for (const float x : out.first(size_t{head_count_} * kHeadDim)) {
    if (x != 1.0F) return absl::InternalError("an output is not the value");
  }
  in_server_seconds.push_back(static_cast<double>(result->service_ns) * 1e-9);
  return absl::OkStatus();
}

absl::Status RpcCaller::Prepare() {
  client::ModelDescription model;
  model.name = absl::StrCat("heads", head_count_);
  model.layer_count = 1;
  model.query_head_count = head_count_;
  model.kv_head_count = std::max(1U, head_count_ / 16);
  model.head_dim = kHeadDim;
  model.scale = 1.0F;
  const auto registered = client_->RegisterModel(model);
  if (!registered.ok()) return registered.status();
  auto sequence = client_->CreateSequence({.model = model.name});
  if (!sequence.ok()) return sequence.status();
  sequence_ = std::make_unique<client::Sequence>(*std::move(sequence));
  const std::vector<uint16_t> ones(size_t{model.kv_head_count} * kHeadDim, 0x3f80);
  const auto token = client::Bfloat16View(ones, 1, model.kv_head_count, kHeadDim);
  client::AppendWriter writer = sequence_->Append();
  absl::Status status = writer.Write(0, 0, token, token);
  if (status.ok()) status = writer.Commit().status();
  foreign_ = std::make_unique<client::Sequence>(client_->Adopt(std::string(16, 'x'), 1));
  rows_ = {{.sequence = sequence_.get()}, {.sequence = foreign_.get(), .query_count = kTokens - 1}};
  return status;
}

void RpcCaller::UseBuffers() {
  buffers_.emplace(client_->NewStepBuffers({.token_count = token_count_,
                                            .query_head_count = head_count_,
                                            .kv_head_count = std::max(1U, head_count_ / 16),
                                            .head_dim = kHeadDim}));
  std::memcpy(buffers_->q().data(), q_.data(), buffers_->q().size());
}

}  // namespace kvservice::bench
