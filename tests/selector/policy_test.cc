#include "selector/policy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace kvservice {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(DefaultPolicyTest, EveryDefaultIsValid) {
  for (int kind = 0; kind <= static_cast<int>(SelectorKind::kScan); ++kind) {
    const Policy policy = DefaultPolicy(static_cast<SelectorKind>(kind));
    EXPECT_EQ(policy.selector, static_cast<SelectorKind>(kind));
    for (const uint32_t layer_count : {1U, 2U, 30U, 256U, kAnyLayerCount}) {
      EXPECT_TRUE(ValidatePolicy(policy, layer_count, 2).ok()) << kind << ' ' << layer_count;
    }
  }
}

TEST(DefaultPolicyTest, OnlyCertifiedAndAutoProve) {
  for (const SelectorKind kind : {SelectorKind::kCertified, SelectorKind::kAuto}) {
    EXPECT_EQ(DefaultPolicy(kind).guarantee, Guarantee::kConfidence);
    EXPECT_EQ(DefaultPolicy(kind).failure_probability, 1e-9);
    EXPECT_EQ(DefaultPolicy(kind).on_violation, OnViolation::kGrow);
    EXPECT_EQ(DefaultPolicy(kind).max_dropped_mass, 0.05F);
  }
  for (const SelectorKind kind : {SelectorKind::kCpe, SelectorKind::kCis, SelectorKind::kPsaw,
                                  SelectorKind::kEtf, SelectorKind::kGiven, SelectorKind::kScan}) {
    EXPECT_EQ(DefaultPolicy(kind).guarantee, Guarantee::kNone);
    EXPECT_EQ(DefaultPolicy(kind).on_violation, OnViolation::kDense);
    EXPECT_EQ(DefaultPolicy(kind).max_dropped_mass, 1.0F);
  }
  EXPECT_EQ(DefaultPolicy(SelectorKind::kPsaw).psaw.phi, 0.85F);
  EXPECT_EQ(DefaultPolicy(SelectorKind::kEtf).etf.psi, 0.85F);
  EXPECT_EQ(DefaultPolicy(SelectorKind::kCpe).psaw.phi, 1.0F);
  EXPECT_EQ(DefaultPolicy(SelectorKind::kCpe).etf.psi, 1.0F);
}

struct BadPolicy {
  std::string field;
  std::function<void(Policy*)> spoil;
};

std::vector<BadPolicy> BadSelections() {
  return {
      {"policy.selector", [](Policy* p) { p->selector = static_cast<SelectorKind>(99); }},
      {"policy.budget.sink", [](Policy* p) { p->budget.sink = kPolicyTokensMax + 1; }},
      {"policy.budget.local", [](Policy* p) { p->budget.local = UINT32_MAX; }},
      {"policy.budget.top_k", [](Policy* p) { p->budget.top_k = kPolicyTokensMax + 1; }},
      {"policy.budget.max_dropped_mass_estimate", [](Policy* p) { p->budget.mass = 1.0F; }},
      {"policy.budget.max_dropped_mass_estimate", [](Policy* p) { p->budget.mass = -0.1F; }},
      {"policy.budget.max_dropped_mass_estimate", [](Policy* p) { p->budget.mass = kNaN; }},
      {"policy.budget.top_k",
       [](Policy* p) {
         p->selector = SelectorKind::kScan;
         p->budget.top_k = 0;
       }},
      {"policy.budget.top_k",
       [](Policy* p) {
         p->budget.top_k = 0;
         p->layers = {{.layer_begin = 2, .layer_end = 3, .selector = SelectorKind::kCpe}};
       }},
      {"policy.layers[0].budget.top_k",
       [](Policy* p) {
         p->selector = SelectorKind::kEtf;
         p->layers = {{.layer_begin = 2, .layer_end = 3, .budget = Budget{.top_k = 0}}};
       }},
      {"policy.cis.min_cosine", [](Policy* p) { p->cis.min_cosine = 1.01F; }},
      {"policy.cis.min_cosine", [](Policy* p) { p->cis.min_cosine = -1.01F; }},
      {"policy.cis.min_cosine", [](Policy* p) { p->cis.min_cosine = kNaN; }},
      {"policy.cis.max_dropped_mass_estimate",
       [](Policy* p) { p->cis.max_dropped_mass_estimate = 1.0F; }},
      {"policy.cis.max_dropped_mass_estimate",
       [](Policy* p) { p->cis.max_dropped_mass_estimate = -0.1F; }},
      {"policy.cis.max_dropped_mass_estimate",
       [](Policy* p) { p->cis.max_dropped_mass_estimate = kNaN; }},
      {"policy.cis.anchors_max", [](Policy* p) { p->cis.anchors_max = 0; }},
      {"policy.cis.anchors_max", [](Policy* p) { p->cis.anchors_max = kAnchorsMax + 1; }},
      {"policy.cis.block_steps", [](Policy* p) { p->cis.block_steps = UINT32_MAX; }},
      {"policy.cis.dilate_strongest", [](Policy* p) { p->cis.dilate_strongest = UINT32_MAX; }},
      {"policy.cis.dilate_radius", [](Policy* p) { p->cis.dilate_radius = kDilateRadiusMax + 1; }},
      {"policy.psaw.first_layer", [](Policy* p) { p->psaw.first_layer = 30; }},
      {"policy.psaw.phi", [](Policy* p) { p->psaw.phi = 0.0F; }},
      {"policy.psaw.phi", [](Policy* p) { p->psaw.phi = 1.5F; }},
      {"policy.psaw.phi", [](Policy* p) { p->psaw.phi = kNaN; }},
      {"policy.psaw.alpha", [](Policy* p) { p->psaw.alpha = -0.1F; }},
      {"policy.psaw.alpha", [](Policy* p) { p->psaw.alpha = kInfinity; }},
      {"policy.etf.first_layer", [](Policy* p) { p->etf.first_layer = 30; }},
      {"policy.etf.psi", [](Policy* p) { p->etf.psi = -1.0F; }},
      {"policy.etf.gamma", [](Policy* p) { p->etf.gamma = 0.0F; }},
      {"policy.etf.gamma", [](Policy* p) { p->etf.gamma = kNaN; }},
  };
}

std::vector<BadPolicy> BadLayersAndLimits() {
  return {
      {"policy.layers", [](Policy* p) { p->layers.resize(kLayerOverridesMax + 1); }},
      {"policy.layers[0].layer_begin",
       [](Policy* p) { p->layers = {{.layer_begin = 30, .layer_end = 31}}; }},
      {"policy.layers[1].layer_end",
       [](Policy* p) { p->layers.push_back({.layer_begin = 4, .layer_end = 4}); }},
      {"policy.layers[0].selector",
       [](Policy* p) { p->layers[0].selector = static_cast<SelectorKind>(9); }},
      {"policy.layers[0].budget.local",
       [](Policy* p) { p->layers[0].budget = Budget{.local = kPolicyTokensMax + 1}; }},
      {"policy.layers[0].min_cosine", [](Policy* p) { p->layers[0].min_cosine = 1.5F; }},
      {"policy.layers[0].min_cosine", [](Policy* p) { p->layers[0].min_cosine = kNaN; }},
      {"policy.layers[0].kv_head_min_cosines",
       [](Policy* p) { p->layers[0].kv_head_min_cosines = {0.5F}; }},
      {"policy.layers[0].kv_head_min_cosines",
       [](Policy* p) {
         p->layers[0].kv_head_min_cosines = {0.5F, 0.5F, 0.5F};
       }},
      {"policy.layers[0].kv_head_min_cosines[1]",
       [](Policy* p) {
         p->layers[0].kv_head_min_cosines = {0.5F, -2.0F};
       }},
      {"policy.layers[0].hidden_share", [](Policy* p) { p->layers[0].hidden_share = 1.0F; }},
      {"policy.layers[0].hidden_share", [](Policy* p) { p->layers[0].hidden_share = kNaN; }},
      {"policy.layers[0].frozen_share", [](Policy* p) { p->layers[0].frozen_share = -0.1F; }},
      {"policy.layers[0].psaw_decay_scale",
       [](Policy* p) { p->layers[0].psaw_decay_scale = kInfinity; }},
      {"policy.layers[0].psaw_decay_rate", [](Policy* p) { p->layers[0].psaw_decay_scale = 1.0F; }},
      {"policy.layers[0].psaw_decay_scale", [](Policy* p) { p->layers[0].psaw_decay_rate = 1.0F; }},
      {"policy.layers[0].psaw_decay_rate", [](Policy* p) { p->layers[0].psaw_decay_rate = -1.0F; }},
      {"policy.layers[0].etf_logit_drift", [](Policy* p) { p->layers[0].etf_logit_drift = kNaN; }},
      {"policy.max_dropped_mass", [](Policy* p) { p->max_dropped_mass = 0.0F; }},
      {"policy.max_dropped_mass", [](Policy* p) { p->max_dropped_mass = 1.01F; }},
      {"policy.max_dropped_mass", [](Policy* p) { p->max_dropped_mass = kNaN; }},
      {"policy.max_output_error", [](Policy* p) { p->max_output_error = 0.0F; }},
      {"policy.max_output_error", [](Policy* p) { p->max_output_error = kNaN; }},
      {"policy.failure_probability", [](Policy* p) { p->failure_probability = 0.0; }},
      {"policy.failure_probability", [](Policy* p) { p->failure_probability = 0.5000001; }},
      {"policy.failure_probability", [](Policy* p) { p->failure_probability = kNaN; }},
      {"policy.draws_max", [](Policy* p) { p->draws_max = 0; }},
      {"policy.draws_max", [](Policy* p) { p->draws_max = kDrawsPerRoundMax + 1; }},
      {"policy.deferred_exact_steps",
       [](Policy* p) { p->deferred_exact_steps = kDeferredStepsMax + 1; }},
      {"policy.guarantee", [](Policy* p) { p->guarantee = static_cast<Guarantee>(4); }},
      {"policy.on_violation", [](Policy* p) { p->on_violation = static_cast<OnViolation>(4); }},
      {"policy.mode", [](Policy* p) { p->mode = static_cast<Mode>(2); }},
  };
}

TEST(ValidatePolicyTest, NamesTheFieldThatIsWrong) {
  std::vector<BadPolicy> table = BadSelections();
  for (BadPolicy& bad : BadLayersAndLimits()) table.push_back(std::move(bad));
  for (const BadPolicy& bad : table) {
    Policy policy;
    bad.spoil(&policy);
    const absl::Status status = ValidatePolicy(policy, 30, 2);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.field;
    const std::string message(status.message());
    EXPECT_EQ(message.substr(0, message.find(' ')), bad.field) << message;
  }
}

TEST(ValidatePolicyTest, TakesTheEndsOfEveryRange) {
  Policy policy;
  policy.budget = {.sink = 0, .local = kPolicyTokensMax, .top_k = 0};
  policy.cis = {.min_cosine = -1.0F,
                .anchors_max = 1,
                .block_steps = kPolicyTokensMax,
                .dilate_strongest = kPolicyTokensMax,
                .dilate_radius = kDilateRadiusMax};
  policy.psaw = {.first_layer = 29, .phi = 1e-38F, .alpha = 0.0F};
  policy.etf = {.first_layer = 0, .psi = 1.0F, .gamma = kScheduleExponentMax};
  policy.layers = {{.layer_begin = 29,
                    .layer_end = UINT32_MAX,
                    .selector = SelectorKind::kCpe,
                    .budget = Budget{.top_k = 0, .mass = 1e-30F},
                    .min_cosine = 1.0F,
                    .kv_head_min_cosines = {-1.0F, 1.0F},
                    .hidden_share = 0.0F,
                    .frozen_share = 0.999F,
                    .psaw_decay_scale = 0.0F,
                    .psaw_decay_rate = 1e30F,
                    .etf_logit_drift = 0.0F}};
  policy.max_dropped_mass = 1e-30F;
  policy.max_output_error = kInfinity;
  policy.failure_probability = 0.5;
  policy.draws_max = kDrawsPerRoundMax;
  policy.deferred_exact_steps = kDeferredStepsMax;
  EXPECT_TRUE(ValidatePolicy(policy, 30, 2).ok()) << ValidatePolicy(policy, 30, 2);
  policy.max_output_error = 1e-38F;
  policy.failure_probability = 1e-300;
  policy.draws_max = 1;
  EXPECT_TRUE(ValidatePolicy(policy, 30, 2).ok()) << ValidatePolicy(policy, 30, 2);
}

// Before a model is known its counts are not held against a policy.
TEST(ValidatePolicyTest, TakesAnyCountsWithoutAModel) {
  Policy policy;
  policy.layers = {{.layer_begin = 1000,
                    .layer_end = 1001,
                    .kv_head_min_cosines = std::vector<float>(100, 0.5F)}};
  EXPECT_TRUE(ValidatePolicy(policy, kAnyLayerCount, kAnyKvHeadCount).ok());
  EXPECT_FALSE(ValidatePolicy(policy, 1001, 8).ok());
  EXPECT_FALSE(ValidatePolicy(policy, 1000, 100).ok());
}

}  // namespace
}  // namespace kvservice
