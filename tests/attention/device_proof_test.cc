// What devices do beyond bounds that always hold: samples, growing, compensation, remembered dense
// answers. Every number is judged by the oracle as in the other device tests.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "attention/growing.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/oracle.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLength = 1500;

class DeviceProof : public ::testing::TestWithParam<std::string> {
 protected:
  DeviceProof() : device_(NewDeviceOrDie(GetParam())) {
    CaseOptions options;
    options.layout = {
        .query_head_count = 4, .kv_head_count = 2, .head_dim = 64, .dtype = DType::kBfloat16};
    options.length = kLength;
    options.tables = Tables::kLearnt;
    kv_ = std::make_unique<KvCase>(device_.get(), options);
  }

  static Plan ScanPlan(Guarantee prove, OnViolation on_violation) {
    Plan plan = BasePlan(Source::kScan, kLength, 64);
    plan.prove = prove;
    plan.on_violation = on_violation;
    plan.dense_share = 0.9F;
    return plan;
  }

  // Executes with a key of its own and judges everything.
  std::unique_ptr<Call> Execute(const Plan& plan, uint8_t key = 1, uint32_t length = kLength) {
    auto call = std::make_unique<Call>(*kv_, length, 1, kv_->queries(), plan);
    call->row.draw_key[0] = std::byte{key};
    const Oracle oracle(*kv_, call->row);
    RunAndCheck(*kv_, oracle, call.get());
    return call;
  }

  static uint32_t TokensRead(const Call& call) {
    uint32_t tokens = 0;
    for (const GroupReport& group : call.groups) tokens += group.tokens_read;
    return tokens;
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<KvCase> kv_;
};

TEST_P(DeviceProof, SamplesTightenTheBound) {
  Plan plan = ScanPlan(Guarantee::kDeterministic, OnViolation::kReport);
  plan.keep.top_k = 100;
  const auto always = Execute(plan);
  plan.prove = Guarantee::kConfidence;
  const auto sampled = Execute(plan);
  for (size_t head = 0; head < sampled->certificates.size(); ++head) {
    const HeadCertificate& with = sampled->certificates[head];
    const HeadCertificate& without = always->certificates[head];
    EXPECT_EQ(with.level, Level::kConfidence);
    EXPECT_GT(with.keys_sampled, 0);
    EXPECT_DOUBLE_EQ(with.failure_probability, 1e-9) << "one round has all";
    EXPECT_LT(with.dropped_mass_upper.value, without.dropped_mass_upper.value);
    EXPECT_LT(with.output_error_upper, without.output_error_upper);
  }
}

TEST_P(DeviceProof, NumbersFollowFromTheKey) {
  Plan plan = ScanPlan(Guarantee::kConfidence, OnViolation::kReport);
  plan.keep.top_k = 100;
  const auto first = Execute(plan, 1);
  const auto again = Execute(plan, 1);
  const auto other = Execute(plan, 2);
  bool differs = false;
  for (size_t head = 0; head < first->certificates.size(); ++head) {
    const double upper = first->certificates[head].log_dropped_upper.value;
    EXPECT_EQ(upper, again->certificates[head].log_dropped_upper.value);
    differs |= upper != other->certificates[head].log_dropped_upper.value;
  }
  EXPECT_TRUE(differs) << "two keys drew the same tokens";
}

TEST_P(DeviceProof, HeadsDrawDifferentTokens) {
  // Equal queries, so that heads differ in nothing but their random numbers.
  std::vector<float> queries = kv_->queries();
  const size_t head_dim = kv_->options().layout.head_dim;
  for (size_t i = head_dim; i < queries.size(); ++i) queries[i] = queries[i % head_dim];
  Plan plan = ScanPlan(Guarantee::kConfidence, OnViolation::kReport);
  plan.keep.top_k = 20;
  Call call(*kv_, kLength, 1, queries, plan);
  call.Run(device_.get(), kv_->shape());
  EXPECT_NE(call.certificates[0].log_dropped_upper.value,
            call.certificates[1].log_dropped_upper.value);
}

// Where rows are long enough to pay for drawing.
TEST_P(DeviceProof, SamplesSaveReading) {
  CaseOptions options = kv_->options();
  options.layout.head_dim = 256;
  options.length = 6000;
  const KvCase kv(device_.get(), options);
  Plan plan = BasePlan(Source::kScan, options.length);
  plan.dense_share = 1.0F;
  plan.prove = Guarantee::kDeterministic;
  plan.on_violation = OnViolation::kGrow;
  plan.failure_probability = 1e-3;
  plan.keep.mass_limit = plan.max_dropped_mass = 0.3F;
  const auto always = RunPlan(kv, plan);
  plan.prove = Guarantee::kConfidence;
  const auto sampled = RunPlan(kv, plan);
  // A GPU reads faster than its host draws: it samples only where it has to.
  EXPECT_LE(TokensRead(*sampled), TokensRead(*always));
  EXPECT_TRUE(device_->name() == "cuda" || TokensRead(*sampled) < TokensRead(*always));
  for (const auto* call : {always.get(), sampled.get()}) {
    for (const HeadCertificate& certificate : call->certificates) EXPECT_TRUE(certificate.met);
  }
}

TEST_P(DeviceProof, GrowsUntilTheLimitHolds) {
  for (const Guarantee prove : {Guarantee::kDeterministic, Guarantee::kConfidence}) {
    Plan plan = ScanPlan(prove, OnViolation::kReport);
    plan.keep.top_k = 60;
    plan.max_dropped_mass = 0.2F;
    const auto reported = Execute(plan);
    EXPECT_FALSE(std::all_of(reported->certificates.begin(), reported->certificates.end(),
                             [](const HeadCertificate& c) { return c.met; }));
    plan.on_violation = OnViolation::kGrow;
    const auto grown = Execute(plan);
    EXPECT_GT(TokensRead(*grown), TokensRead(*reported));
    EXPECT_LT(TokensRead(*grown), 2 * kLength);
    for (const HeadCertificate& certificate : grown->certificates) {
      EXPECT_TRUE(certificate.met);
      EXPECT_EQ(certificate.action, Action::kGrown);
    }
  }
}

TEST_P(DeviceProof, GrowingEndsDense) {
  Plan plan = ScanPlan(Guarantee::kConfidence, OnViolation::kGrow);
  plan.keep.top_k = 10;
  plan.max_dropped_mass = 1e-6F;
  const auto call = Execute(plan);
  for (const GroupReport& group : call->groups) EXPECT_EQ(group.action, Action::kDense);
  for (const HeadCertificate& certificate : call->certificates) {
    EXPECT_EQ(certificate.level, Level::kExact);
    EXPECT_TRUE(certificate.met);
  }
}

TEST_P(DeviceProof, CompensationMeetsALimitOnTheOutputError) {
  Plan plan = ScanPlan(Guarantee::kDeterministic, OnViolation::kGrow);
  plan.keep.output_limit = plan.max_output_error = 0.2F;
  const auto always = Execute(plan);
  plan.prove = Guarantee::kConfidence;
  const auto compensated = Execute(plan);
  EXPECT_LT(TokensRead(*compensated), TokensRead(*always));
  uint32_t count = 0;
  for (const HeadCertificate& certificate : compensated->certificates) {
    EXPECT_TRUE(certificate.met);
    EXPECT_LE(RelativeOutputError(certificate), 0.2);
    if (certificate.action != Action::kCompensated) continue;
    ++count;
    EXPECT_EQ(certificate.level, Level::kConfidence);
    EXPECT_GT(certificate.rows_sampled, 0);
  }
  EXPECT_GT(count, 0);
}

TEST_P(DeviceProof, BothLimitsHoldTogether) {
  Plan plan = ScanPlan(Guarantee::kConfidence, OnViolation::kGrow);
  plan.keep.mass_limit = plan.max_dropped_mass = 0.3F;
  plan.max_output_error = 0.1F;
  const auto call = Execute(plan);
  for (const HeadCertificate& certificate : call->certificates) {
    EXPECT_TRUE(certificate.met);
    EXPECT_LE(certificate.dropped_mass_upper.value, static_cast<double>(0.3F));
    EXPECT_LE(RelativeOutputError(certificate), static_cast<double>(0.1F));
  }
}

TEST_P(DeviceProof, DrawsAreBounded) {
  Plan plan = ScanPlan(Guarantee::kConfidence, OnViolation::kGrow);
  plan.keep.top_k = 10;
  plan.max_dropped_mass = 0.01F;
  plan.max_output_error = 0.001F;
  plan.draws_max = 50;
  const auto call = Execute(plan);
  for (const HeadCertificate& certificate : call->certificates) {
    EXPECT_LE(certificate.keys_sampled, 50 * FailureBudget::kRoundsMax);
    EXPECT_LE(certificate.rows_sampled, 50 * FailureBudget::kRoundsMax);
  }
}

TEST_P(DeviceProof, FailingRowsSayNothing) {
  Plan plan = ScanPlan(Guarantee::kConfidence, OnViolation::kFail);
  plan.keep.top_k = 10;
  plan.max_output_error = 0.01F;
  Call call(*kv_, kLength, 1, kv_->queries(), plan);
  call.Run(device_.get(), kv_->shape());
  EXPECT_EQ(call.row.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(std::all_of(call.out.begin(), call.out.end(), [](float x) { return x == 0.0F; }));
}

TEST_P(DeviceProof, DenseAnswersAreRemembered) {
  constexpr uint32_t kRemembered = 4;
  const auto lists = device_->NewTokenLists(kv_->options().layout, 0);
  Plan plan = ScanPlan(Guarantee::kDeterministic, OnViolation::kGrow);
  plan.keep.mass_limit = plan.max_dropped_mass = 1e-6F;
  plan.lists = lists.get();
  plan.dense_positions = kRemembered;
  const uint32_t begin = kLength - 10;
  std::vector<bool> scanned;
  for (uint32_t length = begin; length < begin + 8; ++length) {
    plan.local_begin = length - 64;
    const auto call = Execute(plan, 1, length);
    EXPECT_EQ(call->groups[0].action, Action::kDense);
    EXPECT_EQ(call->certificates[0].level, Level::kExact);
    scanned.push_back(call->groups[0].tokens_scanned > 0);
  }
  EXPECT_EQ(scanned, (std::vector<bool>{true, false, false, false, false, true, false, false}));
}

INSTANTIATE_TEST_SUITE_P(All, DeviceProof, ::testing::ValuesIn(DeviceNames()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace kvservice::testing
