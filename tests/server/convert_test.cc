// Policies and models on their way through the wire, and totals.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/server/convert.h"
#include "kvservice/server/convert_policy.h"
#include "kvservice/server/policy_registry.h"
#include "kvservice/server/region_copy.h"

namespace kvservice {
namespace {

constexpr SelectorKind kSelectors[] = {
    SelectorKind::kAuto, SelectorKind::kDense,     SelectorKind::kGiven,
    SelectorKind::kCis,  SelectorKind::kPsaw,      SelectorKind::kEtf,
    SelectorKind::kCpe,  SelectorKind::kCertified, SelectorKind::kScan};

TEST(ConvertPolicyTest, EveryFieldSurvivesTheRoundTrip) {
  const PolicyRegistry registry;
  for (const SelectorKind selector : kSelectors) {
    Policy policy = DefaultPolicy(selector);
    EXPECT_EQ(*PolicyFromProto(PolicyToProto(policy), "policy", registry), policy);
    policy.budget = {.sink = 1, .local = 2, .top_k = 3, .mass = 0.375F};
    policy.cis = {.min_cosine = 0.25F,
                  .anchors_max = 9,
                  .block_steps = 8,
                  .dilate_strongest = 4,
                  .dilate_radius = 2,
                  .seed = false,
                  .max_dropped_mass_estimate = 0.625F};
    policy.psaw = {.first_layer = 3, .phi = 0.5F, .alpha = 2};
    policy.etf = {.first_layer = 4, .psi = 0.75F, .gamma = 3};
    policy.layers = {{.layer_begin = 1, .layer_end = 5, .selector = selector},
                     {.layer_begin = 5,
                      .layer_end = 6,
                      .selector = SelectorKind::kDense,
                      .budget = Budget{.sink = 4, .local = 5, .top_k = 6, .mass = 0.5F}},
                     {.layer_begin = 7,
                      .layer_end = 8,
                      .min_cosine = 0.875F,
                      .kv_head_min_cosines = {0.25F, 1.0F, -0.5F},
                      .hidden_share = 0.125F,
                      .frozen_share = 0.0F,
                      .psaw_decay_scale = 1.5F,
                      .psaw_decay_rate = 0.25F,
                      .etf_logit_drift = 0.0F}};
    policy.dense_below_tokens = 17;
    policy.max_dropped_mass = 0.125F;
    policy.max_output_error = 0.75F;
    policy.failure_probability = 1e-3;
    policy.draws_max = 99;
    policy.deferred_exact_steps = 8;
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

TEST(ConvertPolicyTest, ZeroMeansTheDefault) {
  const PolicyRegistry registry;
  v1::Policy policy;
  policy.set_selector(v1::SELECTOR_CERTIFIED);
  policy.set_failure_probability(0.0);
  policy.set_max_output_error(0.0F);
  policy.set_draws_max(0);
  EXPECT_EQ(*PolicyFromProto(policy, "policy", registry), DefaultPolicy(SelectorKind::kCertified));
}

TEST(ConvertPolicyTest, ViolationsAreTreatedAsTheSelectorDoes) {
  const PolicyRegistry registry;
  for (const SelectorKind selector : kSelectors) {
    v1::Policy policy;
    policy.set_selector(SelectorToProto(selector));
    EXPECT_EQ(PolicyFromProto(policy, "policy", registry)->on_violation,
              DefaultPolicy(selector).on_violation);
    policy.set_on_violation(v1::ON_VIOLATION_GROW);
    EXPECT_EQ(PolicyFromProto(policy, "policy", registry)->on_violation, OnViolation::kGrow);
    policy.set_on_violation(v1::ON_VIOLATION_DENSE);
    EXPECT_EQ(PolicyFromProto(policy, "policy", registry)->on_violation, OnViolation::kDense);
  }
}

// A third of a double is no float: the reply's numbers lie on the outer side of the engine's.
TEST(ConvertCertificatesTest, BoundsAreRoundedOutward) {
  HeadCertificate head;
  head.level = Level::kConfidence;
  head.action = Action::kCompensated;
  head.dropped_mass_upper = {1.0 / 3.0};
  head.dropped_mass_lower = {1.0 / 30.0};
  head.output_error_upper = 1.0 / 7.0;
  head.value_norm_lower = 1.0 / 3.0;
  head.failure_probability = 1e-9;
  head.keys_sampled = 5;
  head.rows_sampled = 6;
  v1::Certificates wire;
  CertificatesToProto({head}, &wire);
  EXPECT_GT(static_cast<double>(wire.dropped_mass_upper(0)), head.dropped_mass_upper.value);
  EXPECT_LT(static_cast<double>(wire.dropped_mass_lower(0)), head.dropped_mass_lower.value);
  const auto error = static_cast<double>(wire.output_error_upper(0));
  const auto norm = static_cast<double>(wire.value_norm_lower(0));
  EXPECT_GT(error, head.output_error_upper);
  EXPECT_LE(error, head.output_error_upper * (1 + 1e-6));
  EXPECT_LT(norm, head.value_norm_lower);
  EXPECT_GE(norm, head.value_norm_lower * (1 - 1e-6));
  EXPECT_GE(static_cast<double>(wire.output_error_relative_upper(0)), RelativeOutputError(head));
  EXPECT_EQ(wire.failure_probability(0), 1e-9);
  EXPECT_EQ(wire.keys_sampled(0), 5U);
  EXPECT_EQ(wire.rows_sampled(0), 6U);

  // A nearest float lies on either side: of many numbers, some would round inward.
  constexpr int kParts = 97;
  for (int part = 1; part < kParts; ++part) {
    const double number = static_cast<double>(part) / kParts;
    head.dropped_mass_upper = {number};
    head.dropped_mass_lower = {number};
    head.output_error_upper = number;
    head.value_norm_lower = 2.0 - number;
    v1::Certificates of_number;
    CertificatesToProto({head}, &of_number);
    EXPECT_GT(static_cast<double>(of_number.dropped_mass_upper(0)), number);
    EXPECT_LT(static_cast<double>(of_number.dropped_mass_lower(0)), number);
    EXPECT_GT(static_cast<double>(of_number.output_error_upper(0)), number);
    EXPECT_LT(static_cast<double>(of_number.value_norm_lower(0)), head.value_norm_lower);
    EXPECT_GE(static_cast<double>(of_number.output_error_relative_upper(0)),
              RelativeOutputError(head));
  }

  // Columns that say nothing are left out.
  v1::Certificates plain;
  CertificatesToProto({HeadCertificate()}, &plain);
  EXPECT_EQ(plain.output_error_upper_size() + plain.keys_sampled_size() +
                plain.failure_probability_size(),
            0);
}

TEST(ConvertPolicyTest, BuiltInNamesAreTheSelectors) {
  const PolicyRegistry registry;
  const std::pair<const char*, SelectorKind> names[] = {
      {"auto", SelectorKind::kAuto},   {"dense", SelectorKind::kDense},
      {"given", SelectorKind::kGiven}, {"cis", SelectorKind::kCis},
      {"psaw", SelectorKind::kPsaw},   {"etf", SelectorKind::kEtf},
      {"cpe", SelectorKind::kCpe},     {"certified", SelectorKind::kCertified},
      {"scan", SelectorKind::kScan}};
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

// Whoever gave a call up may use its memory again before the engine comes to it: what is stored has
// been copied by then, however large. Queries may be left, if they are large.
TEST(ConvertAttendTest, KeysAndValuesAreCopiedAtOnce) {
  for (const int64_t tokens : {1, 300}) {
    v1::AttendRequest request;
    request.add_rows()->mutable_handle()->set_id(std::string(16, 'x'));
    uint64_t offset = 0;
    for (v1::Tensor* const tensor :
         {request.mutable_q(), request.mutable_k(), request.mutable_v()}) {
      tensor->set_dtype(v1::DATA_TYPE_FLOAT32);
      for (const int64_t extent : {tokens, int64_t{2}, int64_t{64}}) tensor->add_shape(extent);
      const uint64_t bytes = static_cast<uint64_t>(tokens) * 2 * 64 * sizeof(float);
      tensor->mutable_region()->set_offset_bytes(offset);
      tensor->mutable_region()->set_length_bytes(bytes);
      offset += bytes;
    }
    const std::vector<std::byte> shared(offset);
    const auto is_shared = [&shared](const TensorView& tensor) {
      return tensor.bytes.data() >= shared.data() &&
             tensor.bytes.data() < shared.data() + shared.size();
    };
    RegionCopy region(shared, shared.size());
    AttendPolicies policies;
    AttendCall call;
    ASSERT_TRUE(AttendFromProto(request, PolicyRegistry(), &region, &policies, &call).ok());
    EXPECT_EQ(call.q.is_shared, tokens > 1);
    EXPECT_EQ(is_shared(call.q), tokens > 1);
    for (const TensorView& tensor : {*call.k, *call.v}) {
      EXPECT_FALSE(tensor.is_shared);
      EXPECT_FALSE(is_shared(tensor));
    }
  }
}

TEST(ConvertTest, TotalsCarryTheDistribution) {
  AttendStats stats;
  stats.by_level = {1, 2, 3, 4};
  stats.by_action = {5, 6, 7, 8, 9};
  stats.dropped_mass_counts[2] = 10;
  stats.keys_sampled = 11;
  stats.rows_sampled = 12;
  stats.anchor_seed_scans = 13;
  v1::AttendTotals totals;
  TotalsToProto(stats, 1000, &totals);
  EXPECT_EQ(totals.certificates_by_level(1), 2U);
  EXPECT_EQ(totals.certificates_by_action(4), 9U);
  ASSERT_EQ(totals.dropped_mass_upper_bounds_size(), totals.dropped_mass_upper_counts_size());
  EXPECT_EQ(totals.dropped_mass_upper_bounds(2), 1e-3);
  EXPECT_EQ(totals.dropped_mass_upper_counts(2), 10U);
  EXPECT_EQ(totals.keys_sampled(), 11U);
  EXPECT_EQ(totals.rows_sampled(), 12U);
  EXPECT_EQ(totals.anchor_seed_scans(), 13U);
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
