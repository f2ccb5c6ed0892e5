// Formulas against numbers computed by hand, what each edit changes, and that every plan is valid.

#include "selector/selector.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace kvservice {
namespace {

// Stands for the lists of some layer; selectors only pass the pointer on.
class NamedLists : public TokenLists {
 public:
  std::unique_ptr<TokenLists> Copy() const override { return std::make_unique<NamedLists>(); }
  void Truncate(uint32_t /*length*/) override {}
  size_t bytes() const override { return 0; }
};

StepContext Step(uint32_t layer, uint32_t length) {
  return {.layer = layer,
          .layer_count = 32,
          .attended_length = length,
          .query_count = 1,
          .given = {},
          .given_offsets = {}};
}

Policy PolicyOf(SelectorKind selector) {
  Policy policy = DefaultPolicy(selector);
  policy.dense_below_tokens = 0;
  return policy;
}

// What plan.h asks of any plan.
void ExpectValid(const Plan& plan, const StepContext& context) {
  EXPECT_LE(plan.sink_end, plan.local_begin);
  EXPECT_LE(plan.visible_begin, plan.local_begin);
  EXPECT_LE(plan.local_begin + context.query_count, context.attended_length);
  EXPECT_LE(plan.frozen_end, plan.local_begin);
  EXPECT_EQ(plan.frozen_end > 0, plan.frozen_lists != nullptr);
  EXPECT_GT(plan.dense_share, 0.0F);
  EXPECT_LE(plan.dense_share, 1.0F);
  EXPECT_GT(plan.max_dropped_mass, 0.0F);
  EXPECT_LE(plan.max_dropped_mass, 1.0F);
  if (plan.source == Source::kReuse) {
    EXPECT_NE(plan.lists, nullptr);
  }
}

TEST(PsawTest, HidesWhatTheFormulaSays) {
  const PsawParameters psaw{.first_layer = 16, .phi = 0.5F, .alpha = 1.0F};
  EXPECT_EQ(PsawHiddenCount(psaw, 0, 32, 1000), 0U);
  EXPECT_EQ(PsawHiddenCount(psaw, 15, 32, 1000), 0U);
  EXPECT_EQ(PsawHiddenCount(psaw, 16, 32, 1000), 0U);    // exponent 0
  EXPECT_EQ(PsawHiddenCount(psaw, 20, 32, 1000), 159U);  // 1 - 2^-0.25 = 0.15910
  EXPECT_EQ(PsawHiddenCount(psaw, 24, 32, 1000), 292U);  // 1 - 2^-0.5  = 0.29289
  EXPECT_EQ(PsawHiddenCount(psaw, 28, 32, 1000), 405U);  // 1 - 2^-0.75 = 0.40539
  EXPECT_EQ(PsawHiddenCount(psaw, 31, 32, 1000), 477U);  // 1 - 2^-0.9375 = 0.47788
}

TEST(PsawTest, ExponentAndDefaultFirstLayer) {
  const PsawParameters psaw{.phi = 0.25F, .alpha = 2.0F};
  EXPECT_EQ(PsawHiddenCount(psaw, 15, 32, 4096), 0U);
  EXPECT_EQ(PsawHiddenCount(psaw, 24, 32, 4096), 3072U);  // 1 - 0.25^(2 * 8/16) = 0.75
  EXPECT_EQ(PsawHiddenCount(psaw, 20, 32, 4096), 2048U);  // 1 - 0.25^(2 * 4/16) = 0.5
  EXPECT_EQ(PsawHiddenCount({.phi = 0.25F, .alpha = 0.0F}, 31, 32, 4096), 0U);
  EXPECT_EQ(PsawHiddenCount({}, 31, 32, 4096), 0U);  // phi = 1
}

TEST(EtfTest, FreezesWhatTheFormulaSays) {
  const EtfParameters etf{.first_layer = 20, .psi = 0.81F, .gamma = 1.0F};
  EXPECT_EQ(EtfFrozenCount(etf, 19, 32, 2000), 0U);
  EXPECT_EQ(EtfFrozenCount(etf, 20, 32, 2000), 0U);
  EXPECT_EQ(EtfFrozenCount(etf, 26, 32, 2000), 199U);  // 1 - 0.81F^0.5 = 0.0999999987
  const EtfParameters third{.psi = 0.5F, .gamma = 3.0F};
  EXPECT_EQ(EtfFrozenCount(third, 3, 6, 1000), 0U);
  EXPECT_EQ(EtfFrozenCount(third, 4, 6, 1000), 0U);    // first = floor(2 * 6 / 3) = 4
  EXPECT_EQ(EtfFrozenCount(third, 5, 6, 1000), 646U);  // 1 - 2^-1.5 = 0.64645
}

TEST(DepthFormulaTest, NeverMoreThanThePast) {
  for (const uint32_t length : {0U, 1U, 2U, 63U, 1U << 20, UINT32_MAX}) {
    for (uint32_t layer = 0; layer < 8; ++layer) {
      EXPECT_LE(
          PsawHiddenCount({.first_layer = 0, .phi = 1e-30F, .alpha = 1000.0F}, layer, 8, length),
          length);
      EXPECT_EQ(PsawHiddenCount({.first_layer = 8, .phi = 0.5F}, layer, 8, length), 0U);
    }
  }
}

TEST(ResolveSelectorTest, AutoLengthWindowsAndOverrides) {
  Policy policy = DefaultPolicy(SelectorKind::kAuto);
  EXPECT_EQ(ResolveSelector(policy, Step(5, 2047)), SelectorKind::kDense);
  EXPECT_EQ(ResolveSelector(policy, Step(5, 2048)), SelectorKind::kCertified);
  EXPECT_EQ(ResolveSelector(policy, Step(0, 2048)), SelectorKind::kDense);
  EXPECT_EQ(ResolveSelector(policy, Step(1, 2048)), SelectorKind::kDense);
  EXPECT_EQ(ResolveSelector(policy, Step(2, 2048)), SelectorKind::kCertified);

  // Later entries win, and an override may say auto.
  policy.layers.push_back({.layer_begin = 1, .layer_end = 4, .selector = SelectorKind::kCpe});
  policy.layers.push_back({.layer_begin = 3, .layer_end = 9, .selector = SelectorKind::kAuto});
  EXPECT_EQ(ResolveSelector(policy, Step(0, 4096)), SelectorKind::kDense);
  EXPECT_EQ(ResolveSelector(policy, Step(1, 4096)), SelectorKind::kCpe);
  EXPECT_EQ(ResolveSelector(policy, Step(3, 4096)), SelectorKind::kCertified);
  EXPECT_EQ(ResolveSelector(policy, Step(1, 100)), SelectorKind::kDense);

  // Where certified attention gains from more tokens on, others still do as they are told.
  StepContext gaining = Step(3, 8191);
  gaining.certified_from_tokens = 8192;
  EXPECT_EQ(ResolveSelector(policy, gaining), SelectorKind::kDense);
  gaining.attended_length = 8192;
  EXPECT_EQ(ResolveSelector(policy, gaining), SelectorKind::kCertified);
  gaining = Step(1, 4096);
  gaining.certified_from_tokens = 8192;
  EXPECT_EQ(ResolveSelector(policy, gaining), SelectorKind::kCpe);

  StepContext windowed = Step(3, 4096);
  windowed.sliding_window = 512;
  EXPECT_EQ(ResolveSelector(policy, windowed), SelectorKind::kDense);

  policy = DefaultPolicy(SelectorKind::kGiven);
  policy.layers.clear();
  EXPECT_EQ(ResolveSelector(policy, Step(0, 5)), SelectorKind::kGiven);
}

TEST(MakePlanTest, DenseReadsEverything) {
  const PlannedStep step = MakePlan(PolicyOf(SelectorKind::kDense), Step(4, 5000));
  EXPECT_EQ(step.selector, SelectorKind::kDense);
  EXPECT_EQ(step.plan.source, Source::kAll);
  EXPECT_EQ(step.plan.sink_end, 8U);
  EXPECT_EQ(step.plan.local_begin, 5000U - 64U);
  EXPECT_EQ(step.plan.visible_begin, 0U);
  EXPECT_EQ(step.plan.prove, Guarantee::kNone);
}

TEST(MakePlanTest, CertifiedKeepsByMassAndProves) {
  Policy policy = PolicyOf(SelectorKind::kCertified);
  policy.max_dropped_mass = 0.02F;
  policy.max_output_error = 0.25F;
  policy.guarantee = Guarantee::kConfidence;
  policy.failure_probability = 1e-7;
  policy.draws_max = 77;
  policy.on_violation = OnViolation::kFail;
  policy.mode = Mode::kShadow;
  const Plan plan = MakePlan(policy, Step(4, 5000)).plan;
  EXPECT_EQ(plan.source, Source::kScan);
  EXPECT_EQ(plan.keep.top_k, 0U);
  EXPECT_EQ(plan.keep.mass_limit, 0.02F);
  EXPECT_EQ(plan.max_dropped_mass, 0.02F);
  EXPECT_EQ(plan.max_output_error, 0.25F);
  EXPECT_EQ(plan.prove, Guarantee::kConfidence);
  EXPECT_EQ(plan.failure_probability, 1e-7);
  EXPECT_EQ(plan.draws_max, 77U);
  EXPECT_EQ(plan.on_violation, OnViolation::kFail);
  EXPECT_EQ(plan.mode, Mode::kShadow);
}

TEST(MakePlanTest, CisReusesListsAndPassesProofOn) {
  NamedLists lists;
  Policy policy = PolicyOf(SelectorKind::kCis);
  policy.cis = {.min_cosine = 0.9F,
                .dilate_strongest = 7,
                .dilate_radius = 3,
                .max_dropped_mass_estimate = 0.7F};
  StepContext context = Step(4, 5000);
  EXPECT_EQ(MakePlan(policy, context).plan.source, Source::kScan) << "nothing to remember with";

  context.lists = &lists;
  Plan plan = MakePlan(policy, context).plan;
  EXPECT_EQ(plan.source, Source::kReuse);
  EXPECT_EQ(plan.lists, &lists);
  EXPECT_EQ(plan.min_cosine, 0.9F);
  EXPECT_EQ(plan.reuse_mass_limit, 0.7F);
  EXPECT_EQ(plan.keep.top_k, 512U);
  EXPECT_EQ(plan.keep.mass_limit, 0.0F);
  EXPECT_EQ(plan.keep.dilate_strongest, 7U);
  EXPECT_EQ(plan.keep.dilate_radius, 3U);
  EXPECT_EQ(plan.prove, Guarantee::kNone);
  EXPECT_EQ(plan.max_dropped_mass, 1.0F);

  policy.guarantee = Guarantee::kDeterministic;
  policy.max_dropped_mass = 0.1F;
  plan = MakePlan(policy, context).plan;
  EXPECT_EQ(plan.prove, Guarantee::kDeterministic);
  EXPECT_EQ(plan.max_dropped_mass, 0.1F);
}

TEST(MakePlanTest, CisInThePapersFormForgetsAtBlockStarts) {
  NamedLists lists;
  Policy policy = PolicyOf(SelectorKind::kCis);
  policy.cis.block_steps = 32;
  const auto forgets = [&](uint32_t position, uint32_t query_count) {
    StepContext context = Step(4, position + query_count);
    context.query_count = query_count;
    context.lists = &lists;
    return MakePlan(policy, context).drop_lists;
  };
  EXPECT_TRUE(forgets(0, 1));
  EXPECT_FALSE(forgets(1, 1));
  EXPECT_FALSE(forgets(31, 1));
  EXPECT_TRUE(forgets(32, 1));
  EXPECT_FALSE(forgets(33, 8));
  EXPECT_FALSE(forgets(60, 4));  // 60 to 63
  EXPECT_TRUE(forgets(60, 5));   // 60 to 64
  policy.cis.block_steps = 0;
  EXPECT_FALSE(forgets(32, 1));
}

TEST(MakePlanTest, PsawScansAndHides) {
  Policy policy = PolicyOf(SelectorKind::kPsaw);
  policy.psaw = {.first_layer = 16, .phi = 0.5F, .alpha = 1.0F};
  Plan plan = MakePlan(policy, Step(24, 1000)).plan;
  EXPECT_EQ(plan.source, Source::kScan);
  EXPECT_EQ(plan.visible_begin, 292U);
  EXPECT_EQ(plan.sink_end, 8U);
  EXPECT_EQ(plan.keep.top_k, 512U);
  // The local window is never hidden.
  policy.psaw.phi = 1e-6F;
  plan = MakePlan(policy, Step(31, 1000)).plan;
  EXPECT_EQ(plan.visible_begin, 936U);
}

TEST(MakePlanTest, EtfFreezesOnlyWithAShallowerList) {
  NamedLists shallower;
  Policy policy = PolicyOf(SelectorKind::kEtf);
  policy.etf = {.first_layer = 20, .psi = 0.81F};
  StepContext context = Step(26, 2000);
  EXPECT_EQ(MakePlan(policy, context).plan.frozen_lists, nullptr);
  EXPECT_EQ(MakePlan(policy, context).plan.frozen_end, 0U);
  context.shallower_lists = &shallower;
  const Plan plan = MakePlan(policy, context).plan;
  EXPECT_EQ(plan.source, Source::kScan);
  EXPECT_EQ(plan.frozen_lists, &shallower);
  EXPECT_EQ(plan.frozen_end, 199U);
  context.layer = 20;
  EXPECT_EQ(MakePlan(policy, context).plan.frozen_lists, nullptr);
}

TEST(MakePlanTest, SelectionsAreKeptForLayersThatFreeze) {
  const StepContext context = Step(4, 2000);
  for (const auto& [selector, keeps] :
       {std::pair(SelectorKind::kEtf, true), std::pair(SelectorKind::kCpe, true),
        std::pair(SelectorKind::kCertified, false), std::pair(SelectorKind::kScan, false),
        std::pair(SelectorKind::kCis, false), std::pair(SelectorKind::kAuto, false)}) {
    Policy policy = PolicyOf(selector);
    EXPECT_EQ(MakePlan(policy, context).plan.keeps_selection, keeps);
    policy.layers = {{.layer_begin = 20, .layer_end = 30, .selector = SelectorKind::kEtf}};
    EXPECT_TRUE(MakePlan(policy, context).plan.keeps_selection) << "a deeper layer freezes";
  }
}

TEST(MakePlanTest, CpeIsTheThreeEditsInARow) {
  NamedLists lists;
  NamedLists shallower;
  Policy policy = PolicyOf(SelectorKind::kCpe);
  policy.psaw = {.first_layer = 16, .phi = 0.5F};
  policy.etf = {.first_layer = 20, .psi = 0.3F};
  StepContext context = Step(28, 4000);
  context.lists = &lists;
  context.shallower_lists = &shallower;

  Plan by_hand = MakePlan(PolicyOf(SelectorKind::kDense), context).plan;
  EditCis(policy, context, &by_hand);
  EditPsaw(policy, context, &by_hand);
  EditEtf(policy, context, &by_hand);

  const Plan plan = MakePlan(policy, context).plan;
  EXPECT_EQ(plan.source, Source::kReuse);
  EXPECT_EQ(plan.lists, &lists);
  EXPECT_EQ(plan.visible_begin, by_hand.visible_begin);
  EXPECT_EQ(plan.visible_begin, PsawHiddenCount(policy.psaw, 28, 32, 4000));
  EXPECT_EQ(plan.frozen_lists, &shallower);
  EXPECT_EQ(plan.frozen_end, by_hand.frozen_end);
  EXPECT_EQ(plan.frozen_end, EtfFrozenCount(policy.etf, 28, 32, 4000));
  EXPECT_EQ(plan.keep.top_k, by_hand.keep.top_k);
}

TEST(MakePlanTest, ScanKeepsByNumberAndByMass) {
  NamedLists lists;
  StepContext context = Step(4, 5000);
  context.lists = &lists;
  Policy policy = PolicyOf(SelectorKind::kScan);
  Plan plan = MakePlan(policy, context).plan;
  EXPECT_EQ(plan.source, Source::kScan);
  EXPECT_EQ(plan.lists, &lists) << "deeper layers may take over what was chosen";
  EXPECT_EQ(plan.keep.top_k, 512U);
  EXPECT_EQ(plan.keep.mass_limit, 0.0F);
  EXPECT_EQ(plan.visible_begin, 0U);
  EXPECT_EQ(plan.prove, Guarantee::kNone);
  policy.budget.top_k = 0;
  policy.budget.mass = 0.02F;
  plan = MakePlan(policy, context).plan;
  EXPECT_EQ(plan.keep.top_k, 0U);
  EXPECT_EQ(plan.keep.mass_limit, 0.02F);
}

// A list that is made to be reused keeps top_k tokens whatever its mass.
TEST(MakePlanTest, MassComesBesidesTheNumber) {
  NamedLists lists;
  StepContext context = Step(4, 5000);
  context.lists = &lists;
  for (const SelectorKind kind :
       {SelectorKind::kCis, SelectorKind::kPsaw, SelectorKind::kEtf, SelectorKind::kCpe}) {
    Policy policy = PolicyOf(kind);
    policy.budget.mass = 0.05F;
    const Plan plan = MakePlan(policy, context).plan;
    EXPECT_EQ(plan.keep.top_k, 512U);
    EXPECT_EQ(plan.keep.mass_limit, 0.05F);
  }
  Policy certified = PolicyOf(SelectorKind::kCertified);
  certified.budget.mass = 0.5F;
  EXPECT_EQ(MakePlan(certified, context).plan.keep.mass_limit, certified.max_dropped_mass);
}

TEST(MakePlanTest, CalibratedNumbersReplaceThePolicys) {
  NamedLists lists;
  NamedLists shallower;
  Policy policy = PolicyOf(SelectorKind::kCpe);
  policy.psaw = {.first_layer = 0, .phi = 0.5F};
  policy.etf = {.first_layer = 0, .psi = 0.3F};
  policy.layers = {{.layer_begin = 3,
                    .layer_end = 5,
                    .min_cosine = 0.9F,
                    .kv_head_min_cosines = {0.7F, 1.0F},
                    .hidden_share = 0.25F,
                    .frozen_share = 0.5F},
                   {.layer_begin = 4, .layer_end = 5, .min_cosine = 0.95F, .hidden_share = 0.0F}};
  const auto plan_of = [&](uint32_t layer) {
    StepContext context = Step(layer, 4001);
    context.lists = &lists;
    context.shallower_lists = &shallower;
    const PlannedStep step = MakePlan(policy, context);
    EXPECT_EQ(step.selector, SelectorKind::kCpe) << "an override may leave the selector alone";
    EXPECT_EQ(step.plan.keep.top_k, 512U);
    ExpectValid(step.plan, context);
    return step.plan;
  };
  const Plan plain = plan_of(2);
  EXPECT_EQ(plain.min_cosine, kVerifiedMinCosine);
  EXPECT_EQ(plain.reuse_mass_limit, kVerifiedDroppedMass);
  EXPECT_TRUE(plain.min_cosines.empty());
  EXPECT_EQ(plain.visible_begin, PsawHiddenCount(policy.psaw, 2, 32, 4001));

  const Plan of_layer = plan_of(3);
  EXPECT_EQ(MinCosine(of_layer, 0), 0.7F);
  EXPECT_EQ(MinCosine(of_layer, 1), 1.0F);
  EXPECT_EQ(of_layer.visible_begin, 1000U);  // floor(0.25 * 4001)
  EXPECT_EQ(of_layer.frozen_end, 2000U);

  // The last entry counts, whole.
  const Plan last = plan_of(4);
  EXPECT_EQ(MinCosine(last, 0), 0.95F);
  EXPECT_EQ(MinCosine(last, 1), 0.95F);
  EXPECT_EQ(last.visible_begin, 0U);
  EXPECT_EQ(last.frozen_end, EtfFrozenCount(policy.etf, 4, 32, 4001));
}

// Theory speaks about what a plan hides and freezes, where the layer was calibrated.
TEST(MakePlanTest, CalibratedLayersCarryWhatTheoryAssumes) {
  NamedLists shallower;
  Policy policy = PolicyOf(SelectorKind::kCpe);
  policy.layers = {{.layer_begin = 3,
                    .layer_end = 4,
                    .hidden_share = 0.25F,
                    .frozen_share = 0.5F,
                    .psaw_decay_scale = 0.5F,
                    .psaw_decay_rate = 0.001F,
                    .etf_logit_drift = 0.2F},
                   {.layer_begin = 4, .layer_end = 5, .hidden_share = 0.25F, .frozen_share = 0.5F}};
  StepContext context = Step(3, 4000);
  context.shallower_lists = &shallower;
  PlannedStep step = MakePlan(policy, context);
  EXPECT_EQ(step.plan.visible_begin, 1000U);
  EXPECT_NEAR(step.assumed_psaw_dropped_mass, 0.5 * std::exp(-3.0), 1e-8);
  EXPECT_NEAR(step.assumed_etf_excess_mass, 2 * std::tanh(0.1), 1e-8);

  context.shallower_lists = nullptr;
  EXPECT_LT(MakePlan(policy, context).assumed_etf_excess_mass, 0.0) << "nothing is frozen";
  context.shallower_lists = &shallower;
  policy.layers[0].hidden_share = 0.0F;
  EXPECT_LT(MakePlan(policy, context).assumed_psaw_dropped_mass, 0.0) << "nothing is hidden";
  context.layer = 4;
  step = MakePlan(policy, context);
  EXPECT_LT(step.assumed_psaw_dropped_mass, 0.0) << "nothing was calibrated";
  EXPECT_LT(step.assumed_etf_excess_mass, 0.0);
}

TEST(MakePlanTest, GivenPassesPositionsOn) {
  const std::vector<uint32_t> positions = {1, 5, 9};
  const std::vector<uint32_t> offsets = {0, 2, 3};
  StepContext context = Step(4, 100);
  context.given = positions;
  context.given_offsets = offsets;
  const Plan plan = MakePlan(PolicyOf(SelectorKind::kGiven), context).plan;
  EXPECT_EQ(plan.source, Source::kGiven);
  EXPECT_EQ(plan.given.data(), positions.data());
  EXPECT_EQ(plan.given_offsets.size(), 3U);
  EXPECT_EQ(plan.dense_share, 1.0F);
}

TEST(MakePlanTest, OverrideReplacesTheBudgetWhereItHasOne) {
  Policy policy = PolicyOf(SelectorKind::kCis);
  policy.layers = {{.layer_begin = 3,
                    .layer_end = 4,
                    .selector = SelectorKind::kPsaw,
                    .budget = Budget{.sink = 2, .local = 128, .top_k = 99}},
                   {.layer_begin = 5, .layer_end = 6, .selector = SelectorKind::kPsaw}};
  Plan plan = MakePlan(policy, Step(3, 1000)).plan;
  EXPECT_EQ(plan.keep.top_k, 99U);
  EXPECT_EQ(plan.sink_end, 2U);
  EXPECT_EQ(plan.local_begin, 872U);
  plan = MakePlan(policy, Step(5, 1000)).plan;
  EXPECT_EQ(plan.keep.top_k, 512U);
  EXPECT_EQ(plan.local_begin, 936U);
}

TEST(MakePlanTest, EveryPlanIsValidAtEdgeLengths) {
  NamedLists lists;
  NamedLists shallower;
  const std::vector<uint32_t> offsets = {0, 0, 0};
  for (int kind = 0; kind <= static_cast<int>(SelectorKind::kScan); ++kind) {
    for (const uint32_t length :
         {1U, 2U, 7U, 8U, 9U, 63U, 64U, 65U, 72U, 128U, 2047U, 2048U, 100000U, 1U << 20}) {
      for (const Budget budget : {Budget{}, Budget{.sink = 0, .local = 0, .top_k = 0},
                                  Budget{.sink = 1U << 20, .local = 1U << 20, .top_k = 1}}) {
        for (uint32_t query_count = 1; query_count <= std::min(8U, length); ++query_count) {
          for (const uint32_t layer : {0U, 2U, 21U, 31U}) {
            Policy policy = PolicyOf(static_cast<SelectorKind>(kind));
            policy.budget = budget;
            policy.psaw = {.first_layer = 0, .phi = 0.01F};
            policy.etf = {.first_layer = 0, .psi = 0.01F};
            StepContext context = Step(layer, length);
            context.query_count = query_count;
            context.lists = &lists;
            context.shallower_lists = &shallower;
            context.given_offsets = offsets;
            const PlannedStep step = MakePlan(policy, context);
            ExpectValid(step.plan, context);
            EXPECT_NE(step.selector, SelectorKind::kAuto);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvservice
