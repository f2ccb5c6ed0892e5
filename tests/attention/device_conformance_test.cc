// Every device x cache type x head dimension x group size x plan kind against a long double oracle.
// Outputs have stated tolerances, bounds have none.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "tests/attention/kv_case.h"
#include "tests/attention/oracle.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

using Parameters = std::tuple<std::string, DType, uint32_t, uint32_t>;

// Six full slices and an open one; the default local window begins inside the last full one.
constexpr uint32_t kLength = 413;

class DeviceConformance : public ::testing::TestWithParam<Parameters> {
 protected:
  void SetUp() override {
    const auto& [name, dtype, head_dim, group] = GetParam();
    device_ = NewDeviceOrDie(name);
    const uint32_t kv_heads = group > 4 ? 1 : 2;
    CaseOptions options;
    options.layout = {.query_head_count = group * kv_heads,
                      .kv_head_count = kv_heads,
                      .head_dim = head_dim,
                      .dtype = dtype};
    options.length = kLength;
    options.tables = Tables::kLearnt;
    options.seed = head_dim * 100 + group;
    kv_ = std::make_unique<KvCase>(device_.get(), options);
    sample_ = std::make_unique<Call>(*kv_, kLength, 1, kv_->queries(), Plan());
    oracle_ = std::make_unique<Oracle>(*kv_, sample_->row);
  }

  std::unique_ptr<Call> Execute(const Plan& plan) {
    auto call = std::make_unique<Call>(*kv_, kLength, 1, kv_->queries(), plan);
    RunAndCheck(*kv_, *oracle_, call.get());
    return call;
  }

  uint32_t kv_head_count() const { return kv_->options().layout.kv_head_count; }

  // Every fifth position per KV head, shifted.
  void GiveTokens(Plan* plan) {
    given_.clear();
    offsets_ = {0};
    for (uint32_t kv_head = 0; kv_head < kv_head_count(); ++kv_head) {
      for (uint32_t token = kv_head; token < kLength; token += 5) given_.push_back(token);
      offsets_.push_back(static_cast<uint32_t>(given_.size()));
    }
    plan->given = given_;
    plan->given_offsets = offsets_;
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<KvCase> kv_;
  std::unique_ptr<Call> sample_;
  std::unique_ptr<Oracle> oracle_;
  std::vector<uint32_t> given_, offsets_;
};

TEST_P(DeviceConformance, DenseReadsEverything) {
  const auto call = Execute(BasePlan(Source::kAll, kLength));
  for (const GroupReport& group : call->groups) {
    EXPECT_EQ(group.action, Action::kDense);
    EXPECT_EQ(group.tokens_read, kLength);
    EXPECT_EQ(group.tokens_scanned, 0U);
    EXPECT_FALSE(group.scanned);
  }
}

TEST_P(DeviceConformance, HiddenTokensAreProvenNotRead) {
  Plan plan = BasePlan(Source::kAll, kLength);
  plan.visible_begin = 150;
  plan.prove = Guarantee::kDeterministic;
  const auto call = Execute(plan);
  for (const GroupReport& group : call->groups) {
    EXPECT_EQ(group.action, Action::kSelected);
    EXPECT_EQ(group.tokens_read, kLength - 150 + 8);
    EXPECT_EQ(group.tokens_scanned, 150U - 8);
    EXPECT_FALSE(group.scanned);
  }
}

TEST_P(DeviceConformance, ScanKeepsTopK) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.top_k = 48;
  const auto call = Execute(plan);
  for (uint32_t kv_head = 0; kv_head < kv_head_count(); ++kv_head) {
    EXPECT_EQ(call->groups[kv_head].action, Action::kSelected);
    EXPECT_TRUE(call->groups[kv_head].scanned);
    const size_t kept = ChosenOf(*kv_, *call, kv_head).size();
    EXPECT_GE(kept, 48U);
    EXPECT_LE(kept, 96U) << "top_k is a floor, but not a suggestion";
  }
  for (const HeadCertificate& c : call->certificates) {
    EXPECT_GE(c.dropped_mass_estimate, 0.0F);
    EXPECT_LE(c.dropped_mass_estimate, 1.0F);
  }
}

// What is kept holds nearly as much mass, summed over heads, as the best set of the same size.
TEST_P(DeviceConformance, ScanKeepsTheHeaviest) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.top_k = 48;
  const auto call = Execute(plan);
  const uint32_t group = kv_->options().layout.group_size();
  for (uint32_t kv_head = 0; kv_head < kv_head_count(); ++kv_head) {
    std::vector<uint32_t> everything(kLength);
    for (uint32_t token = 0; token < kLength; ++token) everything[token] = token;
    std::vector<double> mass(kLength, 0.0);
    for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const long double all = oracle_->Judge(head, everything).log_kept;
      for (uint32_t token = 0; token < kLength; ++token) {
        mass[token] += static_cast<double>(std::exp(oracle_->Logit(head, token) - all));
      }
    }
    double kept = 0.0;
    const std::vector<uint32_t> chosen = ChosenOf(*kv_, *call, kv_head);
    for (const uint32_t token : chosen) kept += mass[token];
    std::vector<double> best;
    for (const uint32_t token : PlacesOf(*kv_, *call, kv_head).middle) best.push_back(mass[token]);
    std::sort(best.rbegin(), best.rend());
    double most = 0.0;
    for (size_t i = 0; i < chosen.size(); ++i) most += best[i];
    EXPECT_GE(kept, 0.9 * most);
  }
}

TEST_P(DeviceConformance, ScanProvesTopK) {
  for (const Guarantee prove :
       {Guarantee::kConfidence, Guarantee::kDeterministic, Guarantee::kExact}) {
    Plan plan = BasePlan(Source::kScan, kLength);
    plan.keep.top_k = 48;
    plan.prove = prove;
    const auto call = Execute(plan);
    for (const HeadCertificate& c : call->certificates) EXPECT_LT(c.dropped_mass_upper.value, 1.0);
  }
}

TEST_P(DeviceConformance, ScanKeepsByProvenMass) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.mass_limit = 0.2F;
  plan.max_dropped_mass = 0.2F;
  plan.dense_share = 1.0F;
  plan.prove = Guarantee::kDeterministic;
  plan.on_violation = OnViolation::kDense;
  const auto call = Execute(plan);
  for (const HeadCertificate& c : call->certificates) EXPECT_TRUE(c.met);
}

TEST_P(DeviceConformance, ScanKeepsByEstimatedMass) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.mass_limit = 0.2F;
  plan.dense_share = 1.0F;
  const auto call = Execute(plan);
  for (uint32_t head = 0; head < oracle_->head_count(); ++head) {
    const HeadCertificate& c = call->certificates[head];
    EXPECT_LE(c.dropped_mass_estimate, 0.25F);
    const Truth truth = oracle_->Judge(head, call->selected[oracle_->KvHead(head)]);
    EXPECT_NEAR(c.dropped_mass_estimate, static_cast<double>(truth.share), 0.1);
  }
}

TEST_P(DeviceConformance, ScanSkipsHidden) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.top_k = 32;
  plan.visible_begin = 130;
  plan.prove = Guarantee::kDeterministic;
  const auto call = Execute(plan);
  for (uint32_t kv_head = 0; kv_head < kv_head_count(); ++kv_head) {
    EXPECT_GE(ChosenOf(*kv_, *call, kv_head).size(), 32U);
  }
}

TEST_P(DeviceConformance, GivenIsReadAsGiven) {
  for (const Guarantee prove : {Guarantee::kNone, Guarantee::kDeterministic, Guarantee::kExact}) {
    Plan plan = BasePlan(Source::kGiven, kLength);
    GiveTokens(&plan);
    plan.prove = prove;
    const auto call = Execute(plan);
    for (uint32_t kv_head = 0; kv_head < kv_head_count(); ++kv_head) {
      const std::vector<uint32_t> given(given_.begin() + offsets_[kv_head],
                                        given_.begin() + offsets_[kv_head + 1]);
      EXPECT_EQ(call->selected[kv_head], Unite(PlacesOf(*kv_, *call, kv_head).always, given));
      EXPECT_FALSE(call->groups[kv_head].scanned);
    }
  }
}

// The same tokens, so the same bound up to what a device's own arithmetic costs: its allowance for
// fp32 rounding (g of the scan formula, up to 0.003 nats here) counts twice, once in the estimate
// and once in eps, and rounding factors to integers about as much. The reference pays
// nothing, so a device that claims less than it is found out by the other tests.
constexpr double kBoundCost = 0.012;
// A device may take the lower ends of a page from its upper ends and the widest interval of the
// page, where the reference has every token's own.
constexpr double kLowerCost = 1.0;
// And the estimates from one factor per page, as a share of all attention.
constexpr double kEstimateCost = 0.04;

TEST_P(DeviceConformance, BoundAgreesWithReference) {
  if (device_->name() == "reference") GTEST_SKIP() << "it is the one compared with";
  Plan plan = BasePlan(Source::kGiven, kLength);
  GiveTokens(&plan);
  plan.prove = Guarantee::kDeterministic;
  const auto call = Execute(plan);
  const auto reference_device = NewDeviceOrDie("reference");
  const KvCase reference_kv(reference_device.get(), kv_->options());
  const auto reference = RunPlan(reference_kv, plan);
  for (uint32_t head = 0; head < oracle_->head_count(); ++head) {
    const HeadCertificate& ours = call->certificates[head];
    const HeadCertificate& theirs = reference->certificates[head];
    EXPECT_NEAR(ours.log_dropped_upper.value, theirs.log_dropped_upper.value, kBoundCost);
    EXPECT_LE(ours.log_dropped_lower.value, theirs.log_dropped_lower.value + kBoundCost);
    EXPECT_GE(ours.log_dropped_lower.value, theirs.log_dropped_lower.value - kLowerCost);
    EXPECT_NEAR(ours.dropped_mass_estimate, theirs.dropped_mass_estimate, kEstimateCost);
    EXPECT_NEAR(ours.log_kept, theirs.log_kept, 1e-4);
  }
}

TEST_P(DeviceConformance, ReuseTakesTheList) {
  const auto lists = device_->NewTokenLists(kv_->options().layout, 4);
  Plan plan = BasePlan(Source::kReuse, kLength);
  plan.keep.top_k = 40;
  plan.lists = lists.get();
  const auto first = Execute(plan);
  const auto second = Execute(plan);
  plan.prove = Guarantee::kDeterministic;
  const auto proven = Execute(plan);
  for (uint32_t kv_head = 0; kv_head < kv_head_count(); ++kv_head) {
    EXPECT_TRUE(first->groups[kv_head].scanned);
    EXPECT_EQ(first->groups[kv_head].action, Action::kSelected);
    EXPECT_FALSE(second->groups[kv_head].scanned);
    EXPECT_EQ(second->groups[kv_head].tokens_scanned, 0U);
    EXPECT_EQ(second->groups[kv_head].action, Action::kReused);
    EXPECT_NEAR(second->groups[kv_head].similarity, 1.0F, 1e-5F);
    EXPECT_EQ(first->selected[kv_head], second->selected[kv_head]);
    EXPECT_EQ(first->selected[kv_head], proven->selected[kv_head]);
    EXPECT_EQ(proven->groups[kv_head].action, Action::kReused);
  }
}

// Devices differ in what they estimate of the mass that was left: cpu rounds factors to one byte.
constexpr double kSharingCost = 0.03;

TEST_P(DeviceConformance, SharingEstimateAgreesWithReference) {
  if (device_->name() == "reference") GTEST_SKIP() << "it is the one compared with";
  const auto reference_device = NewDeviceOrDie("reference");
  const KvCase reference_kv(reference_device.get(), kv_->options());
  // The estimates for queries that move away from the anchor's step by step.
  const auto estimates = [&](const KvCase& kv) {
    const auto lists = kv.device()->NewTokenLists(kv.options().layout, 1);
    Plan plan = BasePlan(Source::kReuse, kLength);
    plan.keep.top_k = 40;
    plan.lists = lists.get();
    plan.min_cosine = -1.0F;
    plan.reuse_mass_limit = 0.9999F;
    std::vector<float> found;
    for (const float step : {0.0F, 0.0F, 0.02F, 0.05F, 0.1F}) {
      std::vector<float> queries = kv.queries();
      for (size_t i = 0; i < queries.size(); ++i) {
        queries[i] += step * std::sin(static_cast<float>(i));
      }
      Call call(kv, kLength, 1, queries, plan);
      call.Run(kv.device(), kv.shape());
      for (const GroupReport& group : call.groups) found.push_back(group.sharing_estimate);
    }
    return found;
  };
  const std::vector<float> ours = estimates(*kv_);
  const std::vector<float> theirs = estimates(reference_kv);
  for (size_t i = 0; i < ours.size(); ++i) {
    if (i < kv_head_count()) {
      EXPECT_EQ(ours[i], -1.0F);
      continue;
    }
    EXPECT_GE(ours[i], 0.0F);
    EXPECT_NEAR(ours[i], theirs[i], kSharingCost);
  }
}

TEST_P(DeviceConformance, FrozenTakesTheOtherLayersChoice) {
  const auto shallow = device_->NewTokenLists(kv_->options().layout, 0);
  Plan given = BasePlan(Source::kGiven, kLength);
  GiveTokens(&given);
  given.lists = shallow.get();
  Execute(given);

  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.top_k = 60;
  plan.frozen_lists = shallow.get();
  plan.frozen_end = 200;
  plan.prove = Guarantee::kDeterministic;
  const auto call = Execute(plan);
  for (uint32_t kv_head = 0; kv_head < kv_head_count(); ++kv_head) {
    std::vector<uint32_t> expected;
    for (uint32_t i = offsets_[kv_head]; i < offsets_[kv_head + 1]; ++i) {
      if (given_[i] >= 8 && given_[i] < 200) expected.push_back(given_[i]);
    }
    std::vector<uint32_t> chosen = ChosenOf(*kv_, *call, kv_head);
    EXPECT_GE(chosen.size(), 60U);
    chosen.erase(std::lower_bound(chosen.begin(), chosen.end(), 200U), chosen.end());
    EXPECT_EQ(chosen, expected);
  }
}

TEST_P(DeviceConformance, DilationBringsNeighbours) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.top_k = 20;
  const auto plain = Execute(plan);
  plan.keep.dilate_strongest = 5;
  plan.keep.dilate_radius = 3;
  const auto dilated = Execute(plan);
  for (uint32_t kv_head = 0; kv_head < kv_head_count(); ++kv_head) {
    const std::vector<uint32_t> before = ChosenOf(*kv_, *plain, kv_head);
    const std::vector<uint32_t> after = ChosenOf(*kv_, *dilated, kv_head);
    EXPECT_EQ(Intersect(before, after), before);
    // A neighbourhood has up to six more tokens; five of them at least three on the way to one.
    EXPECT_GT(after.size(), before.size() + 3);
    EXPECT_LE(after.size(), before.size() + 30);
    for (const uint32_t token : after) {
      const auto near = std::lower_bound(before.begin(), before.end(), token - 3);
      EXPECT_TRUE(near != before.end() && *near <= token + 3);
    }
  }
}

TEST_P(DeviceConformance, ShadowAnswersDensely) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.top_k = 16;
  plan.prove = Guarantee::kDeterministic;
  plan.max_dropped_mass = 1e-6F;
  plan.on_violation = OnViolation::kFail;
  plan.mode = Mode::kShadow;
  const auto call = Execute(plan);
  for (const HeadCertificate& c : call->certificates) {
    EXPECT_EQ(c.action, Action::kDense);
    EXPECT_FALSE(c.met);
  }
}

TEST_P(DeviceConformance, LargePlansAreDense) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.top_k = 300;
  const auto call = Execute(plan);
  for (const GroupReport& group : call->groups) EXPECT_EQ(group.action, Action::kDense);
}

TEST_P(DeviceConformance, ViolationsFollowThePlan) {
  Plan plan = BasePlan(Source::kScan, kLength);
  plan.keep.top_k = 16;
  plan.prove = Guarantee::kDeterministic;
  plan.max_dropped_mass = 1e-6F;
  const auto reported = Execute(plan);
  for (const HeadCertificate& c : reported->certificates) {
    EXPECT_FALSE(c.met);
    EXPECT_EQ(c.action, Action::kSelected);
  }
  for (const OnViolation dense : {OnViolation::kDense, OnViolation::kGrow}) {
    plan.on_violation = dense;
    const auto call = Execute(plan);
    for (const HeadCertificate& c : call->certificates) {
      EXPECT_TRUE(c.met);
      EXPECT_EQ(c.action, Action::kDense);
      EXPECT_EQ(c.level, Level::kExact);
    }
  }
  plan.on_violation = OnViolation::kFail;
  Call failed(*kv_, kLength, 1, kv_->queries(), plan);
  failed.Run(device_.get(), kv_->shape());
  EXPECT_EQ(failed.row.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(std::count(failed.out.begin(), failed.out.end(), 0.0F),
            static_cast<ptrdiff_t>(failed.out.size()));
  EXPECT_EQ(std::count(failed.lse.begin(), failed.lse.end(), 0.0F),
            static_cast<ptrdiff_t>(failed.lse.size()));
}

std::string ParametersName(const ::testing::TestParamInfo<Parameters>& info) {
  const auto& [device, dtype, head_dim, group] = info.param;
  return device + "_" + Name(dtype) + "_d" + std::to_string(head_dim) + "_g" +
         std::to_string(group);
}

INSTANTIATE_TEST_SUITE_P(All, DeviceConformance,
                         ::testing::Combine(::testing::ValuesIn(DeviceNames()),
                                            ::testing::Values(DType::kBfloat16, DType::kFloat16,
                                                              DType::kFloat32),
                                            ::testing::Values(64U, 80U, 96U, 128U, 256U),
                                            ::testing::Values(1U, 3U, 4U, 8U, 16U)),
                         ParametersName);

}  // namespace
}  // namespace kvservice::testing
