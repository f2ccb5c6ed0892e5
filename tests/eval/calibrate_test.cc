// What calibration chooses, on ladders made by hand and on a tiny model.

#include "tests/eval/calibrate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include "tests/eval/tiny_study.h"

namespace kvservice::eval {
namespace {

using Choice = std::vector<size_t>;

double Scans(absl::Span<const HeadProfile> ladder, const Choice& choice) {
  double sum = 0.0;
  for (size_t head = 0; head < choice.size(); ++head) sum += ladder[choice[head]].scans[head];
  return sum;
}
double Damage(absl::Span<const HeadProfile> ladder, const Choice& choice) {
  double sum = 0.0;
  for (size_t head = 0; head < choice.size(); ++head) sum += ladder[choice[head]].damage[head];
  return sum;
}

// Head 1 is hurt ten times as much as head 0.
const std::vector<HeadProfile>& TwoHeads() {
  static const auto* const ladder =
      new std::vector<HeadProfile>{{.scans = {0.1, 0.1}, .damage = {1.0, 10.0}},
                                   {.scans = {0.5, 0.5}, .damage = {0.1, 1.0}},
                                   {.scans = {1.0, 1.0}, .damage = {0.0, 0.0}}};
  return *ladder;
}

TEST(ChooseByLagrangeTest, SpendsScansWhereTheyPreventMostDamage) {
  EXPECT_EQ(ChooseByLagrange(TwoHeads(), 2.0), (Choice{2, 2}));
  EXPECT_EQ(ChooseByLagrange(TwoHeads(), 1.6), (Choice{1, 2}));
  EXPECT_EQ(ChooseByLagrange(TwoHeads(), 1.1), (Choice{1, 1}));
  EXPECT_EQ(ChooseByLagrange(TwoHeads(), 0.7), (Choice{0, 1}));
  EXPECT_EQ(ChooseByLagrange(TwoHeads(), 0.25), (Choice{0, 0}));
}

TEST(ChooseByLagrangeTest, TiesGoToTheEarlierEntry) {
  const std::vector<HeadProfile> ladder = {{.scans = {0.2}, .damage = {0.3}},
                                           {.scans = {0.2}, .damage = {0.3}},
                                           {.scans = {0.9}, .damage = {0.3}}};
  EXPECT_EQ(ChooseByLagrange(ladder, 1.0), (Choice{0}));
}

TEST(ChooseByLagrangeTest, WhereNothingKeepsToItTheFirstEntryIsLeft) {
  const std::vector<HeadProfile> ladder = {{.scans = {0.3}, .damage = {3.0}},
                                           {.scans = {0.9}, .damage = {2.0}}};
  EXPECT_EQ(ChooseByLagrange(ladder, 0.1), (Choice{0}));
}

// Against all 4^5 choices of random ladders, which need not be monotonic.
TEST(ChooseByLagrangeTest, NoChoiceOfAsFewScansDoesLessDamage) {
  constexpr size_t kHeads = 5, kRungs = 4;
  std::mt19937 random(9);
  std::uniform_real_distribution<double> uniform;
  for (int round = 0; round < 200; ++round) {
    std::vector<HeadProfile> ladder(kRungs);
    for (size_t rung = 0; rung < kRungs; ++rung) {
      for (size_t head = 0; head < kHeads; ++head) {
        ladder[rung].scans.push_back(rung == 0 ? 0.0 : uniform(random));
        ladder[rung].damage.push_back(uniform(random));
      }
    }
    const double allowed = 2.0 * uniform(random);
    const Choice chosen = ChooseByLagrange(ladder, allowed);
    const double scans = Scans(ladder, chosen);
    ASSERT_LE(scans, allowed);
    for (size_t code = 0; code < 1024; ++code) {
      Choice other;
      for (size_t head = 0; head < kHeads; ++head) other.push_back(code >> (2 * head) & 3U);
      if (Scans(ladder, other) <= scans) {
        ASSERT_GE(Damage(ladder, other), Damage(ladder, chosen) - 1e-12) << round;
      }
    }
  }
}

TEST(ChooseSharesTest, TheLastShareBeforeTheDamageIsTooLarge) {
  constexpr float kShares[] = {0.1F, 0.5F, 0.7F};
  // Three layers of two heads. Scanning errs by 1 + 3 in each; a tenth of it is allowed.
  const std::vector<double> errors = {1.0, 3.0, 1.0, 3.0, 1.0, 3.0};
  const std::vector<HeadProfile> ladder = {
      {.scans = {}, .damage = {0.0, 0.0, 0.1, 0.1, 0.3, 0.2}},
      {.scans = {}, .damage = {0.0, 0.0, 0.4, 0.0, 0.0, 0.0}},
      // Layer 1 is worse than before by a little, layer 0 by nothing.
      {.scans = {}, .damage = {0.1, 0.3, 0.4, 0.1, 0.0, 0.0}}};
  EXPECT_EQ(ChooseShares(ladder, kShares, errors, 2, 0.1), (std::vector<float>{0.7F, 0.5F, 0.0F}));
  EXPECT_EQ(ChooseShares(ladder, kShares, errors, 2, 0.0), (std::vector<float>{0.5F, 0.0F, 0.0F}));
}

TEST(CalibrateTest, GivesAPolicyOfTheModelsSparseLayers) {
  const TinyStudy study(::testing::TempDir());
  const StudyText text = study.Text(RandomTokens(16, 4), 0);
  const StudyText other = study.Text(RandomTokens(16, 5), 0);
  const std::vector<LoopSetup> setups = {study.SetUp(text), study.SetUp(other)};
  const auto policy = Calibrate({.budget_tokens = 120}, {.thread_count = 2}, setups);
  ASSERT_TRUE(policy.ok()) << policy.status();
  EXPECT_TRUE(ValidatePolicy(*policy, 5, kTinyKvHeads).ok());
  EXPECT_EQ(policy->selector, SelectorKind::kCpe);
  EXPECT_EQ(policy->budget.sink + policy->budget.local + policy->budget.top_k, 120U);
  ASSERT_EQ(policy->layers.size(), 1 + kTinySparseLayers);
  EXPECT_EQ(policy->layers[0].selector, SelectorKind::kDense);
  std::set<uint32_t> layers;
  for (size_t i = 1; i < policy->layers.size(); ++i) {
    const LayerOverride& entry = policy->layers[i];
    EXPECT_EQ(entry.layer_end, entry.layer_begin + 1);
    layers.insert(entry.layer_begin);
    ASSERT_EQ(entry.kv_head_min_cosines.size(), kTinyKvHeads);
    for (const float cosine : entry.kv_head_min_cosines) EXPECT_GE(cosine, 0.5F);
    EXPECT_GT(entry.hidden_share.value_or(0.1F), 0.0F);
    EXPECT_GT(entry.frozen_share.value_or(0.1F), 0.0F);
  }
  EXPECT_EQ(layers, (std::set<uint32_t>{2, 4}));
  EXPECT_FALSE(policy->layers[1].frozen_share.has_value());
}

}  // namespace
}  // namespace kvservice::eval
