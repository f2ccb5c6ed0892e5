#include "tests/kvservice/engine_client.h"

#include <gtest/gtest.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "kvservice/cache/sequence.h"
#include "kvservice/error.h"

namespace kvservice::testing {
namespace {

// Starts an asynchronous call and waits for its answer.
template <typename T, typename Function>
absl::StatusOr<T> Wait(Function start) {
  std::promise<absl::StatusOr<T>> promise;
  start([&promise](absl::StatusOr<T> result) { promise.set_value(std::move(result)); });
  return promise.get_future().get();
}

TensorView View(DType dtype, const std::vector<int64_t>& shape, const std::vector<std::byte>& bytes,
                std::string_view field) {
  return {.dtype = dtype, .shape = shape, .bytes = bytes, .field = field};
}

constexpr double kLseTolerance = 1e-5;

}  // namespace

ModelSpec SmallModel(uint32_t layer_count) {
  ModelSpec model;
  model.name = kModel;
  model.layer_count = layer_count;
  model.layout = {.query_head_count = 4, .kv_head_count = 2, .head_dim = 64};
  // Four times what is usual: attention is then peaked, as it is in trained models.
  model.scale = 0.5F;
  model.default_policy = DefaultPolicy(SelectorKind::kDense);
  return model;
}

size_t BlockBytes(const ModelSpec& model) {
  return CacheShape(model.layout, model.layer_count, {}).block_bytes();
}

AttendStep::AttendStep(const ModelSpec& model, uint32_t layer, std::string tenant)
    : model_(model), answer_(promise_.get_future()) {
  call.tenant = std::move(tenant);
  call.layer = layer;
  call.done = [this](absl::Status status) { promise_.set_value(std::move(status)); };
}

AttendStep& AttendStep::Add(const Handle& handle, uint32_t position, const Words& words) {
  call.rows.push_back({.id = handle.id,
                       .generation = handle.generation,
                       .position = position,
                       .query_count = static_cast<uint32_t>(words.size()),
                       .given = {},
                       .given_offsets = {}});
  words_.insert(words_.end(), words.begin(), words.end());
  return *this;
}

AttendStep& AttendStep::OnlyRead() {
  stores_ = false;
  return *this;
}

AttendStep& AttendStep::QueryType(DType dtype) {
  query_type_ = dtype;
  return *this;
}

AttendCall* AttendStep::Build() {
  built_ = true;
  const KvLayout& layout = model_.layout;
  const auto count = static_cast<int64_t>(words_.size());
  q = PartBytes(layout, query_type_, Part::kQuery, call.layer, words_);
  q_shape = {count, layout.query_head_count, layout.head_dim};
  call.q = View(query_type_, q_shape, q, "q");
  if (!stores_) return &call;
  k = PartBytes(layout, layout.dtype, Part::kKey, call.layer, words_);
  v = PartBytes(layout, layout.dtype, Part::kValue, call.layer, words_);
  k_shape = v_shape = {count, layout.kv_head_count, layout.head_dim};
  call.k = View(layout.dtype, k_shape, k, "k");
  call.v = View(layout.dtype, v_shape, v, "v");
  return &call;
}

void AttendStep::Start(Engine* engine) {
  if (!built_) Build();
  engine->Attend(&call);
}

absl::Status AttendStep::Run(Engine* engine) {
  Start(engine);
  return Wait();
}

absl::Span<const float> AttendStep::Out(size_t token) const {
  const size_t floats = size_t{model_.layout.query_head_count} * model_.layout.head_dim;
  return absl::MakeConstSpan(call.out).subspan(token * floats, floats);
}

absl::Span<const float> AttendStep::Lse(size_t token) const {
  const size_t heads = model_.layout.query_head_count;
  return absl::MakeConstSpan(call.lse).subspan(token * heads, heads);
}

AppendStep::AppendStep(const ModelSpec& model, const Handle& handle, uint32_t layer,
                       uint32_t position, const Words& words, std::string tenant)
    : k(PartBytes(model.layout, model.layout.dtype, Part::kKey, layer, words)),
      v(PartBytes(model.layout, model.layout.dtype, Part::kValue, layer, words)),
      k_shape(
          {static_cast<int64_t>(words.size()), model.layout.kv_head_count, model.layout.head_dim}),
      v_shape(k_shape),
      call({.tenant = std::move(tenant),
            .id = handle.id,
            .generation = handle.generation,
            .layer = layer,
            .position = position,
            .k = View(model.layout.dtype, k_shape, k, "k"),
            .v = View(model.layout.dtype, v_shape, v, "v")}) {}

absl::StatusOr<AppendResult> AppendStep::Run(Engine* engine) const {
  return Wait<AppendResult>([&](auto done) { engine->Append(call, std::move(done)); });
}

EngineOptions TestEngine::SmallOptions() {
  EngineOptions options;
  options.pool_bytes = 64 * BlockBytes(SmallModel(2));
  options.sequences_max = 64;
  options.sequences_per_tenant_max = 32;
  options.models_max = 3;
  options.sequence_tokens_max = 4096;
  options.queue_calls_max = 64;
  options.rows_max = 8;
  return options;
}

TestEngine::TestEngine(const EngineOptions& options, uint32_t layer_count,
                       std::unique_ptr<Device> device, std::unique_ptr<DiskTier> tier,
                       uint64_t seed)
    : random(seed), model_(SmallModel(layer_count)) {
  if (device == nullptr) device = *NewDevice("reference", {});
  const bool has_tier = tier != nullptr;
  auto engine = NewEngine(options, std::move(device), &clock, &random, std::move(tier));
  start_status_ = engine.status();
  if (has_tier && !start_status_.ok()) return;
  engine_ = *std::move(engine);
  EXPECT_TRUE(engine_->RegisterModel(model_).ok());
}

absl::StatusOr<SequenceInfo> TestEngine::Create(CreateOptions options, std::string_view tenant) {
  return Wait<SequenceInfo>(
      [&](auto done) { engine_->Create(tenant, std::move(options), std::move(done)); });
}

Handle TestEngine::NewSequence() {
  CreateOptions options;
  options.model = kModel;
  const auto info = Create(options);
  EXPECT_TRUE(info.ok()) << info.status();
  return {.id = info->id, .generation = info->generation};
}

absl::StatusOr<SequenceInfo> TestEngine::Fork(const Handle& handle, uint32_t length,
                                              std::string_view tenant) {
  return Wait<SequenceInfo>([&](auto done) {
    engine_->Fork(tenant, handle.id, handle.generation, length, 0, std::move(done));
  });
}

absl::StatusOr<SequenceInfo> TestEngine::Truncate(const Handle& handle, uint32_t length,
                                                  std::string_view tenant) {
  return Wait<SequenceInfo>([&](auto done) {
    engine_->Truncate(tenant, handle.id, handle.generation, length, std::move(done));
  });
}

absl::StatusOr<SequenceInfo> TestEngine::Get(const Handle& handle, std::string_view tenant) {
  return Wait<SequenceInfo>([&](auto done) { engine_->Get(tenant, handle.id, std::move(done)); });
}

absl::StatusOr<SequenceInfo> TestEngine::Drop(const Handle& handle, std::string_view tenant) {
  return Wait<SequenceInfo>([&](auto done) { engine_->Drop(tenant, handle.id, std::move(done)); });
}

absl::StatusOr<SequenceInfo> TestEngine::RenewLease(const Handle& handle, uint32_t lease_ms,
                                                    std::string_view tenant) {
  return Wait<SequenceInfo>([&](auto done) {
    engine_->RenewLease(tenant, handle.id, handle.generation, lease_ms, std::move(done));
  });
}

std::vector<SequenceInfo> TestEngine::List(std::string_view tenant, SequenceId after,
                                           uint32_t limit) {
  return *Wait<std::vector<SequenceInfo>>(
      [&](auto done) { engine_->List(tenant, after, limit, std::move(done)); });
}

absl::StatusOr<AppendResult> TestEngine::Append(const Handle& handle, uint32_t layer,
                                                uint32_t position, const Words& words,
                                                std::string tenant) {
  return AppendStep(model_, handle, layer, position, words, std::move(tenant)).Run(get());
}

absl::StatusOr<AppendResult> TestEngine::AppendDurably(const Handle& handle, uint32_t layer,
                                                       uint32_t position, const Words& words,
                                                       std::string tenant) {
  AppendStep step(model_, handle, layer, position, words, std::move(tenant));
  step.call.is_durable = true;
  return step.Run(get());
}

absl::StatusOr<SequenceInfo> TestEngine::Suspend(const Handle& handle, std::string_view tenant) {
  return Wait<SequenceInfo>(
      [&](auto done) { engine_->Suspend(tenant, handle.id, handle.generation, std::move(done)); });
}

absl::StatusOr<SequenceInfo> TestEngine::Resume(const Handle& handle, std::string_view tenant) {
  return Wait<SequenceInfo>(
      [&](auto done) { engine_->Resume(tenant, handle.id, handle.generation, std::move(done)); });
}

absl::StatusOr<TenantUsage> TestEngine::SetQuota(std::string_view tenant,
                                                 const std::optional<TenantQuota>& quota) {
  return Wait<TenantUsage>([&](auto done) { engine_->SetQuota(tenant, quota, std::move(done)); });
}

std::vector<TenantUsage> TestEngine::ListTenants(std::string_view only, std::string_view after,
                                                 uint32_t limit) {
  return *Wait<std::vector<TenantUsage>>(
      [&](auto done) { engine_->ListTenants(only, after, limit, std::move(done)); });
}

absl::StatusOr<AuditReport> TestEngine::Audit(const Handle& handle, const AuditAsk& ask,
                                              std::string_view tenant) {
  return Wait<AuditReport>(
      [&](auto done) { engine_->Audit(tenant, handle.id, ask, std::move(done)); });
}

absl::StatusOr<ExplainReport> TestEngine::Explain(const Handle& handle, const ExplainAsk& ask,
                                                  std::string_view tenant) {
  return Wait<ExplainReport>(
      [&](auto done) { engine_->Explain(tenant, handle.id, ask, std::move(done)); });
}

absl::StatusOr<StoreReport> TestEngine::VerifyStore() {
  return Wait<StoreReport>([&](auto done) { engine_->VerifyStore(std::move(done)); });
}

void TestEngine::Fill(const Handle& handle, uint32_t position, const Words& words) {
  for (uint32_t layer = 0; layer < model_.layer_count; ++layer) {
    const auto stored = Append(handle, layer, position, words);
    ASSERT_TRUE(stored.ok()) << stored.status();
  }
}

std::string ErrorLine(const absl::Status& status) {
  if (status.ok()) return "OK";
  const ErrorDetails details = DetailsOf(status);
  return absl::StrCat(absl::StatusCodeToString(status.code()), " ", details.reason,
                      details.field.empty() ? "" : " ", details.field);
}

LayerShape ShapeOf(const ModelSpec& model) {
  LayerShape shape;
  shape.layout = model.layout;
  shape.scale = model.scale;
  return shape;
}

void ExpectDense(const AttendStep& step, size_t token, const ModelSpec& model, const Words& words,
                 uint32_t position, double out_tolerance) {
  const DenseAnswer answer = AttendDensely(ShapeOf(model), step.call.layer, words, position);
  EXPECT_LT(NormalizedSquaredError(step.Out(token), answer.out), out_tolerance);
  for (size_t head = 0; head < answer.lse.size(); ++head) {
    EXPECT_NEAR(step.Lse(token)[head], answer.lse[head], kLseTolerance);
  }
}

void ExpectOk(const AttendStep& step) {
  for (const AttendRowResult& result : step.call.results) {
    EXPECT_TRUE(result.status.ok()) << result.status;
  }
}

}  // namespace kvservice::testing
