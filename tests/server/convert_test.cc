// Policies and models on their way through the wire, and totals.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>

#include "kvservice/server/convert.h"
#include "kvservice/server/convert_policy.h"
#include "kvservice/server/policy_registry.h"

namespace kvservice {
namespace {

constexpr SelectorKind kSelectors[] = {
    SelectorKind::kAuto, SelectorKind::kDense, SelectorKind::kGiven, SelectorKind::kCis,
    SelectorKind::kPsaw, SelectorKind::kEtf,   SelectorKind::kCpe,   SelectorKind::kCertified};

TEST(ConvertPolicyTest, EveryFieldSurvivesTheRoundTrip) {
  const PolicyRegistry registry;
  for (const SelectorKind selector : kSelectors) {
    Policy policy = DefaultPolicy(selector);
    EXPECT_EQ(*PolicyFromProto(PolicyToProto(policy), "policy", registry), policy);
    policy.budget = {.sink = 1, .local = 2, .top_k = 3};
    policy.cis = {.min_cosine = 0.25F,
                  .anchors_max = 9,
                  .block_steps = 8,
                  .dilate_strongest = 4,
                  .dilate_radius = 2};
    policy.psaw = {.first_layer = 3, .phi = 0.5F, .alpha = 2};
    policy.etf = {.first_layer = 4, .psi = 0.75F, .gamma = 3};
    policy.layers = {{.layer_begin = 1, .layer_end = 5, .selector = selector},
                     {.layer_begin = 5,
                      .layer_end = 6,
                      .selector = SelectorKind::kDense,
                      .budget = {.sink = 4, .local = 5, .top_k = 6}}};
    policy.dense_below_tokens = 17;
    policy.max_dropped_mass = 0.125F;
    policy.guarantee = Guarantee::kExact;
    policy.on_violation = OnViolation::kFail;
    policy.mode = Mode::kShadow;
    EXPECT_EQ(*PolicyFromProto(PolicyToProto(policy), "policy", registry), policy);
  }
}

TEST(ConvertPolicyTest, AbsentFieldsTakeTheSelectorsDefaults) {
  const PolicyRegistry registry;
  EXPECT_EQ(*PolicyFromProto({}, "policy", registry), DefaultPolicy(SelectorKind::kAuto));
  v1::Policy psaw;
  psaw.set_selector(v1::SELECTOR_PSAW);
  EXPECT_EQ(*PolicyFromProto(psaw, "policy", registry), DefaultPolicy(SelectorKind::kPsaw));
  // A present but empty list of layers means no overrides.
  psaw.mutable_layers();
  EXPECT_TRUE(PolicyFromProto(psaw, "policy", registry)->layers.empty());
  v1::Policy budget;
  budget.mutable_budget()->set_sink_tokens(0);
  const Policy with_budget = *PolicyFromProto(budget, "policy", registry);
  EXPECT_EQ(with_budget.budget.sink, 0U);
  EXPECT_EQ(with_budget.budget.local, Budget{}.local);
}

// The limit's default follows from whether a guarantee is asked for.
TEST(ConvertPolicyTest, TheLimitFollowsTheGuarantee) {
  const PolicyRegistry registry;
  v1::Policy policy;
  policy.set_selector(v1::SELECTOR_CIS);
  EXPECT_EQ(PolicyFromProto(policy, "policy", registry)->max_dropped_mass, 1.0F);
  policy.set_guarantee(v1::GUARANTEE_DETERMINISTIC);
  EXPECT_EQ(PolicyFromProto(policy, "policy", registry)->max_dropped_mass, 0.05F);
  policy.set_max_dropped_mass(0.5F);
  EXPECT_EQ(PolicyFromProto(policy, "policy", registry)->max_dropped_mass, 0.5F);
  policy.clear_max_dropped_mass();
  policy.set_selector(v1::SELECTOR_CERTIFIED);
  policy.set_guarantee(v1::GUARANTEE_NONE);
  EXPECT_EQ(PolicyFromProto(policy, "policy", registry)->max_dropped_mass, 1.0F);
}

TEST(ConvertPolicyTest, BuiltInNamesAreTheSelectors) {
  const PolicyRegistry registry;
  const std::pair<const char*, SelectorKind> names[] = {
      {"auto", SelectorKind::kAuto},   {"dense", SelectorKind::kDense},
      {"given", SelectorKind::kGiven}, {"cis", SelectorKind::kCis},
      {"psaw", SelectorKind::kPsaw},   {"etf", SelectorKind::kEtf},
      {"cpe", SelectorKind::kCpe},     {"certified", SelectorKind::kCertified}};
  for (const auto& [name, selector] : names) {
    v1::Policy policy;
    policy.set_name(name);
    EXPECT_EQ(*PolicyFromProto(policy, "policy", registry), DefaultPolicy(selector)) << name;
  }
}

ModelSpec FullModel() {
  ModelSpec model;
  model.name = "full";
  model.layer_count = 2;
  model.layout = {
      .query_head_count = 4, .kv_head_count = 2, .head_dim = 128, .dtype = DType::kFloat16};
  model.scale = 0.5F;
  model.logit_softcap = 30;
  model.sliding_windows = {0, 100};
  model.inverse_frequencies = {1.0F, 0.5F};
  model.rotary_style = RotaryStyle::kInterleaved;
  model.default_policy = DefaultPolicy(SelectorKind::kCpe);
  for (int i = 0; i < 4; ++i) {
    SketchTable table = IdentitySketchTable(128);
    table.metric[3] = 2.0F;
    table.directions[5] = 0.25F * static_cast<float>(i + 1);
    model.sketch_tables.push_back(table);
  }
  return model;
}

TEST(ConvertModelTest, EveryFieldSurvivesTheRoundTrip) {
  const ModelSpec model = FullModel();
  v1::Model wire;
  ModelToProto(model, true, &wire);
  const absl::StatusOr<ModelSpec> back = ModelFromProto(wire, PolicyRegistry());
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->name, model.name);
  EXPECT_EQ(back->layout, model.layout);
  EXPECT_EQ(back->default_policy, model.default_policy);
  ASSERT_EQ(back->sketch_tables.size(), 4U);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(back->sketch_tables[i].metric, model.sketch_tables[i].metric);
    EXPECT_EQ(back->sketch_tables[i].directions, model.sketch_tables[i].directions);
  }
  EXPECT_EQ(ModelFingerprint(*back), ModelFingerprint(model));
}

TEST(ConvertModelTest, SketchTablesAreWrittenOnlyWhenTheySaySomething) {
  ModelSpec model = FullModel();
  v1::Model wire;
  ModelToProto(model, false, &wire);
  EXPECT_FALSE(wire.has_sketch_tables());
  model.sketch_tables.assign(4, IdentitySketchTable(128));
  ModelToProto(model, true, &wire);
  EXPECT_FALSE(wire.has_sketch_tables());
}

TEST(ConvertTest, TotalsCarryTheInformationBound) {
  v1::AttendTotals totals;
  TotalsToProto({.certificates = 10, .certificates_proven = 4, .dropped_mass_upper_sum = 0.04},
                1000, &totals);
  const double mean = 0.01;
  const double entropy = -mean * std::log(mean) - (1 - mean) * std::log(1 - mean);
  EXPECT_GE(totals.assumed_mutual_information_loss_nats(), entropy + mean * std::log(1000.0));
  EXPECT_NEAR(totals.assumed_mutual_information_loss_nats(), entropy + mean * std::log(1000.0),
              1e-9);
  v1::AttendTotals none;
  TotalsToProto({.certificates = 10}, 1000, &none);
  EXPECT_EQ(none.assumed_mutual_information_loss_nats(), 0.0);
}

}  // namespace
}  // namespace kvservice
