// What an engine says limits would cost.

#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <vector>

#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kTokens = 700;

class ExplainTest : public ::testing::Test {
 protected:
  void Start(const EngineOptions& options = TestEngine::SmallOptions()) {
    engine_ = std::make_unique<TestEngine>(options, 2, *NewDevice("cpu", {.thread_count = 1}));
    handle_ = engine_->NewSequence();
    engine_->Fill(handle_, 0, Counting(0, kTokens));
  }

  AttendRowResult Attend(uint32_t layer, uint32_t position, const Policy& policy) {
    AttendStep step(engine_->model(), layer);
    step.Add(handle_, position, {position}).OnlyRead();
    step.call.policy = &policy;
    EXPECT_TRUE(step.Run(engine_->get()).ok());
    EXPECT_TRUE(step.result(0).status.ok()) << step.result(0).status;
    return step.result(0);
  }

  static ExplainAsk Of(uint32_t layer, std::vector<float> limits = {}) {
    return {.layer = layer, .limits = std::move(limits), .q = std::nullopt};
  }

  std::unique_ptr<TestEngine> engine_;
  Handle handle_;
};

// A deterministic policy draws nothing, so an explanation and a call are the same to the token.
TEST_F(ExplainTest, SaysWhatACallWouldDo) {
  Start();
  Policy policy = DefaultPolicy(SelectorKind::kCertified);
  policy.guarantee = Guarantee::kDeterministic;
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  CreateOptions options;
  options.model = kModel;
  options.policy = policy;
  const auto created = engine_->Create(options);
  ASSERT_TRUE(created.ok());
  handle_ = {.id = created->id, .generation = created->generation};
  engine_->Fill(handle_, 0, Counting(0, kTokens));
  for (const float limit : {0.3F, 0.05F, 0.001F}) {
    policy.max_dropped_mass = limit;
    const AttendRowResult called = Attend(0, kTokens - 1, policy);
    const auto report = engine_->Explain(handle_, Of(0, {limit}));
    ASSERT_TRUE(report.ok()) << report.status();
    ASSERT_EQ(report->steps.size(), 1U);
    for (uint32_t head = 0; head < 2; ++head) {
      const ExplainGroup& group = report->steps[0].groups[head];
      EXPECT_EQ(group.report.tokens_read, called.groups[head].tokens_read);
      EXPECT_EQ(group.report.action, called.groups[head].action);
      EXPECT_EQ(group.dropped_mass_upper,
                std::max(called.certificates[2 * head].dropped_mass_upper.value,
                         called.certificates[2 * head + 1].dropped_mass_upper.value));
      EXPECT_TRUE(group.met);
      EXPECT_EQ(group.dense_bytes, uint64_t{kTokens} * engine_->model().layout.row_bytes());
      EXPECT_GT(group.bytes, group.report.tokens_read * engine_->model().layout.row_bytes() - 1);
    }
  }
}

TEST_F(ExplainTest, TheLadderGoesFromLooseToTight) {
  Start();
  Attend(1, kTokens - 1, DefaultPolicy(SelectorKind::kDense));
  const AttendStats before = engine_->Get(handle_)->stats;
  const auto report = engine_->Explain(handle_, Of(1));
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->position, kTokens - 1);
  ASSERT_EQ(report->steps.size(), 5U);
  uint32_t tokens_before = 0;
  for (const ExplainStep& step : report->steps) {
    uint32_t tokens = 0;
    for (const ExplainGroup& group : step.groups) {
      tokens += group.report.tokens_read;
      EXPECT_TRUE(group.met);
      EXPECT_LE(group.dropped_mass_upper, static_cast<double>(step.limit));
      EXPECT_GE(group.level, Level::kConfidence);
    }
    EXPECT_GE(tokens, tokens_before);
    tokens_before = tokens;
  }
  EXPECT_EQ(engine_->Get(handle_)->stats.attend_rows, before.attend_rows) << "it is no call";
}

TEST_F(ExplainTest, TheLatestQueryOfALayerIsKeptUntilATruncate) {
  Start();
  EXPECT_EQ(ErrorLine(engine_->Explain(handle_, Of(0)).status()),
            "FAILED_PRECONDITION QUERY_NOT_KEPT q");
  Attend(0, 300, DefaultPolicy(SelectorKind::kDense));
  Attend(0, 200, DefaultPolicy(SelectorKind::kDense));
  EXPECT_EQ(engine_->Explain(handle_, Of(0))->position, 200U);
  EXPECT_EQ(ErrorLine(engine_->Explain(handle_, Of(1)).status()),
            "FAILED_PRECONDITION QUERY_NOT_KEPT q");
  ASSERT_TRUE(engine_->Truncate(handle_, 100).ok());
  EXPECT_EQ(ErrorLine(engine_->Explain(handle_, Of(0)).status()),
            "FAILED_PRECONDITION QUERY_NOT_KEPT q");
}

TEST_F(ExplainTest, KeptQueriesAreBounded) {
  EngineOptions options = TestEngine::SmallOptions();
  const size_t query_bytes = size_t{4} * 64 * sizeof(float);
  for (const size_t bytes_max : {size_t{0}, query_bytes - 1, query_bytes}) {
    options.query_bytes_per_sequence_max = bytes_max;
    Start(options);
    Attend(0, 300, DefaultPolicy(SelectorKind::kDense));
    Attend(1, 300, DefaultPolicy(SelectorKind::kDense));
    EXPECT_EQ(engine_->Explain(handle_, Of(0)).ok(), bytes_max == query_bytes);
    EXPECT_FALSE(engine_->Explain(handle_, Of(1)).ok());
  }
}

TEST_F(ExplainTest, BadQuestionsAreTyped) {
  Start();
  Attend(0, 300, DefaultPolicy(SelectorKind::kDense));
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  for (const float limit : {0.0F, 1.0F, -0.5F, kNaN}) {
    EXPECT_EQ(ErrorLine(engine_->Explain(handle_, Of(0, {0.5F, limit})).status()),
              "INVALID_ARGUMENT EXPLAIN_INVALID max_dropped_mass");
  }
  const std::vector<float> many(kExplainLimitsMax + 1, 0.5F);
  EXPECT_EQ(ErrorLine(engine_->Explain(handle_, Of(0, many)).status()),
            "INVALID_ARGUMENT EXPLAIN_INVALID max_dropped_mass");
  EXPECT_EQ(ErrorLine(engine_->Explain(handle_, Of(2)).status()),
            "INVALID_ARGUMENT LAYER_OUT_OF_RANGE layer");
  EXPECT_EQ(ErrorLine(engine_->Explain(handle_, Of(0), "someone else").status()),
            "NOT_FOUND SEQUENCE_NOT_FOUND");

  std::vector<std::byte> bytes(size_t{9} * 4 * 64 * sizeof(float));
  std::vector<int64_t> shape = {9, 4, 64};
  ExplainAsk ask = Of(0);
  const auto error_with = [&](size_t byte_count) {
    ask.q = TensorView{.dtype = DType::kFloat32,
                       .shape = shape,
                       .bytes = {bytes.data(), byte_count},
                       .field = "q"};
    return ErrorLine(engine_->Explain(handle_, ask).status());
  };
  EXPECT_EQ(error_with(bytes.size()), "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q");
  shape[0] = 8;
  EXPECT_EQ(error_with(bytes.size() / 9 * 8), "OK");
  shape[1] = 5;
  EXPECT_EQ(error_with(bytes.size() / 9 * 8), "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q");
}

}  // namespace
}  // namespace kvservice::testing
