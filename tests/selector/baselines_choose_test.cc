// The parts that the baselines share, against values worked out by hand or the slow way.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "selector/baselines/choose.h"
#include "selector/baselines/components.h"
#include "selector/baselines/for_each_index.h"
#include "selector/baselines/label_stores.h"
#include "selector/baselines/random_numbers.h"
#include "selector/baselines/sharing_map.h"
#include "selector/baselines/softmax.h"
#include "selector/baselines/token_tiles.h"

namespace kvservice::baselines {
namespace {

using Positions = std::vector<uint32_t>;

Positions Largest(const std::vector<float>& weights, uint32_t top_k, uint32_t first = 0) {
  Positions positions;
  KeepLargest(weights, top_k, first, &positions);
  return positions;
}

// rows: [heads][count].
Positions ByMass(const std::vector<std::vector<float>>& rows, double limit,
                 const std::vector<double>& before = {}) {
  std::vector<float> flat;
  for (const std::vector<float>& row : rows) flat.insert(flat.end(), row.begin(), row.end());
  const auto count = static_cast<uint32_t>(rows[0].size());
  Positions positions;
  KeepByMass({flat.data(), count, static_cast<uint32_t>(rows.size()), count}, limit, before, 0,
             &positions);
  return positions;
}

TEST(MiddleTest, LiesBetweenSinksAndWindow) {
  const TokenBudget budget = {.sink = 8, .local = 32};
  EXPECT_EQ(MiddleOf(budget, 100).begin, 8U);
  EXPECT_EQ(MiddleOf(budget, 100).end, 68U);
  EXPECT_EQ(MiddleOf(budget, 41).count(), 1U);
  for (const uint32_t length : {40U, 33U, 8U, 1U, 0U}) {
    EXPECT_EQ(MiddleOf(budget, length).count(), 0U) << length;
  }
}

TEST(KeepLargestTest, KeepsTheLargestAndAmongEqualsTheFirst) {
  EXPECT_EQ(Largest({1, 5, 3, 4, 2}, 2), (Positions{1, 3}));
  EXPECT_EQ(Largest({1, 5, 3, 4, 2}, 2, 100), (Positions{101, 103}));
  EXPECT_EQ(Largest({2, 7, 2, 2, 7}, 3), (Positions{0, 1, 4}));
  EXPECT_EQ(Largest({0, 0, 0}, 1), (Positions{0}));
  EXPECT_EQ(Largest({1, 2, 3}, 0), Positions{});
  EXPECT_EQ(Largest({1, 2, 3}, 9), (Positions{0, 1, 2}));
  EXPECT_EQ(Largest({}, 3), Positions{});
}

TEST(KeepLargestTest, AgreesWithSorting) {
  std::mt19937_64 random(1);
  std::lognormal_distribution<float> weight(0.0F, 3.0F);
  for (int repeat = 0; repeat < 50; ++repeat) {
    std::vector<float> weights(1 + random() % 700);
    // Few different values every other time, so that many are equal.
    std::generate(weights.begin(), weights.end(), [&] {
      return repeat % 2 == 0 ? weight(random) : static_cast<float>(random() % 5);
    });
    const auto top_k = static_cast<uint32_t>(random() % (weights.size() + 1));
    Positions order(weights.size());
    std::iota(order.begin(), order.end(), 0U);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return weights[a] > weights[b]; });
    order.resize(top_k);
    std::sort(order.begin(), order.end());
    ASSERT_EQ(Largest(weights, top_k), order) << repeat;
  }
}

TEST(KeepByMassTest, KeepsTheFewestThatEveryHeadAllows) {
  const std::vector<float> row = {0.125F, 0.5F, 0.0625F, 0.25F};
  EXPECT_EQ(ByMass({row}, 0.0), (Positions{0, 1, 2, 3}));
  EXPECT_EQ(ByMass({row}, 0.0625), (Positions{0, 1, 3}));
  EXPECT_EQ(ByMass({row}, 0.1), (Positions{0, 1, 3}));
  EXPECT_EQ(ByMass({row}, 0.1875), (Positions{1, 3}));
  EXPECT_EQ(ByMass({row}, 0.95), Positions{});
  // Alone, head 0 would drop tokens 0 and 2, head 1 tokens 1 and 3. Together they go in the order
  // .5 .5 .25 .25 of their maxima, the later one of equals first: token 3 costs either .25.
  EXPECT_EQ(ByMass({{0.0F, 0.5F, 0.125F, 0.25F}, {0.5F, 0.0F, 0.25F, 0.25F}}, 0.25),
            (Positions{0, 1, 2}));
  // The second head forbids what the first allows.
  EXPECT_EQ(ByMass({{0.0F, 0.0F}, {0.25F, 0.5F}}, 0.1), (Positions{0, 1}));
}

TEST(KeepByMassTest, CountsWhatWasDroppedBefore) {
  const std::vector<float> row = {0.125F, 0.5F, 0.0625F, 0.25F};
  EXPECT_EQ(ByMass({row}, 0.1875, {0.1}), (Positions{0, 1, 3}));
  EXPECT_EQ(ByMass({row}, 0.1875, {0.5}), (Positions{0, 1, 2, 3}));
}

TEST(KeepByMassTest, AgreesWithAddingOneByOne) {
  std::mt19937_64 random(2);
  std::lognormal_distribution<float> weight(0.0F, 3.0F);
  for (int repeat = 0; repeat < 50; ++repeat) {
    const size_t count = 1 + random() % 500;
    std::vector<std::vector<float>> rows(1 + random() % 4, std::vector<float>(count));
    std::vector<float> largest(count, 0.0F);
    for (std::vector<float>& row : rows) {
      std::generate(row.begin(), row.end(), [&] { return weight(random); });
      Softmax(absl::MakeSpan(row));
      for (size_t i = 0; i < count; ++i) largest[i] = std::max(largest[i], row[i]);
    }
    const double limit = std::pow(10.0, -static_cast<double>(random() % 4) - 0.3);
    Positions order(count);
    std::iota(order.begin(), order.end(), 0U);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return largest[a] > largest[b]; });
    std::vector<double> dropped(rows.size(), 0.0);
    size_t kept = count;
    for (bool allowed = true; allowed && kept > 0; kept -= allowed ? 1 : 0) {
      for (size_t h = 0; h < rows.size(); ++h) {
        dropped[h] += rows[h][order[kept - 1]];
        allowed = allowed && dropped[h] <= limit;
      }
    }
    order.resize(kept);
    std::sort(order.begin(), order.end());
    ASSERT_EQ(ByMass(rows, limit), order) << repeat;
  }
}

TEST(KeepForGroupTest, SumsOverHeadsForTopKAndAsksEveryHeadForMass) {
  // Tokens 1 to 4 are the middle. By the sum token 3 is first (.6), by head 0's maximum token 1.
  const std::vector<float> probabilities = {0.2F, 0.5F, 0.0F, 0.3F, 0.0F, 0.0F,   // head 0
                                            0.2F, 0.0F, 0.0F, 0.3F, 0.0F, 0.5F};  // head 1
  Positions positions;
  TokenBudget budget = {.sink = 1, .local = 1, .top_k = 1};
  KeepForGroup(probabilities, 2, 6, budget, &positions);
  EXPECT_EQ(positions, (Positions{3}));
  positions.clear();
  budget.mass_limit = 0.35F;  // Head 0 may drop token 3, but not 1.
  KeepForGroup(probabilities, 2, 6, budget, &positions);
  EXPECT_EQ(positions, (Positions{1}));
}

TEST(SoftmaxTest, IsCloseToTheDefinition) {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal(0.0F, 8.0F);
  for (const size_t count : {1UL, 2UL, 63UL, 64UL, 65UL, 1000UL}) {
    std::vector<float> values(count);
    std::generate(values.begin(), values.end(), [&] { return normal(random); });
    const float largest = *std::max_element(values.begin(), values.end());
    double sum = 0.0;
    for (const float value : values) sum += std::exp(double{value} - largest);
    std::vector<float> softmax = values;
    Softmax(absl::MakeSpan(softmax));
    for (size_t i = 0; i < count; ++i) {
      const double expected = std::exp(double{values[i]} - largest) / sum;
      if (values[i] - largest < -59.0F) {
        EXPECT_LT(softmax[i], 1e-25F);
      } else {
        EXPECT_NEAR(softmax[i] / expected, 1.0, 3e-6) << values[i] - largest;
      }
    }
  }
}

TEST(TokenTilesTest, DotsAreThoseOfTheVectors) {
  std::mt19937_64 random(4);
  for (const uint32_t heads : {1U, 2U, 3U, 4U, 5U, 9U}) {
    constexpr uint32_t kChannels = 5;
    constexpr uint32_t kTokens = 131;
    constexpr size_t kStride = 140;
    TokenTiles<uint8_t> tiles(kChannels);
    std::vector<std::vector<uint8_t>> tokens(kTokens, std::vector<uint8_t>(kChannels));
    for (std::vector<uint8_t>& token : tokens) {
      std::generate(token.begin(), token.end(), [&] { return random() % 16; });
      tiles.Append(token);
    }
    tokens[70] = {1, 2, 3, 4, 5};
    tiles.Set(70, tokens[70]);
    std::vector<float> q(size_t{heads} * kChannels);
    std::generate(q.begin(), q.end(), [&] { return static_cast<float>(random() % 9) - 4.0F; });
    std::vector<float> dots(heads * kStride, -1000.0F);
    tiles.Dot(q, heads, dots.data(), kStride);
    for (uint32_t h = 0; h < heads; ++h) {
      for (uint32_t t = 0; t < kTokens; ++t) {
        // Small integers: sums are exact in any order.
        const float expected =
            std::inner_product(tokens[t].begin(), tokens[t].end(), q.begin() + h * kChannels, 0.0F);
        EXPECT_EQ(dots[h * kStride + t], expected) << h << ' ' << t;
      }
      EXPECT_EQ(dots[h * kStride + kTokens], -1000.0F);
    }
  }
}

TEST(FourBitLabelsTest, RoundsToSixteenLevelsOfTheTokensOwnRange) {
  FourBitLabels labels(3);
  labels.Append({-3.0F, 12.0F, 2.4F});        // Step 1: 2.4 becomes 2.
  labels.Append({-300.0F, 1200.0F, 240.0F});  // The same, a hundred times larger.
  labels.Append({5.0F, 5.0F, 5.0F});          // No range at all.
  std::vector<float> dots(3);
  labels.Dot({0.0F, 0.0F, 1.0F}, 1, dots.data(), 3);
  EXPECT_FLOAT_EQ(dots[0], 2.0F);
  EXPECT_FLOAT_EQ(dots[1], 200.0F);
  EXPECT_FLOAT_EQ(dots[2], 5.0F);
  labels.Dot({1.0F, 2.0F, 0.0F}, 1, dots.data(), 3);  // The ends are exact.
  EXPECT_FLOAT_EQ(dots[0], 21.0F);
  EXPECT_FLOAT_EQ(dots[1], 2100.0F);
}

TEST(HalfLabelsTest, RoundsToElevenBits) {
  HalfLabels labels(1);
  labels.Append({2049.0F});  // Lies between 2048 and 2050; ties go to even.
  float dot = 0.0F;
  labels.Dot({1.0F}, 1, &dot, 1);
  EXPECT_EQ(dot, 2048.0F);
}

TEST(ComponentsTest, FindsTheDirectionsOfLargestVariance) {
  // Around the mean (10, 20, 5): along (.6, .8, 0) by +-5, along (-.8, .6, 0) by +-1, else nothing.
  const std::vector<float> rows = {13.0F, 24.0F, 5.0F, 7.0F,  16.0F, 5.0F,
                                   9.2F,  20.6F, 5.0F, 10.8F, 19.4F, 5.0F};
  const std::vector<float> components = PrincipalComponents(rows, 3, 3);
  const auto expect_direction = [&](size_t i, float x, float y) {
    const float sign = components[3 * i] * x + components[3 * i + 1] * y > 0.0F ? 1.0F : -1.0F;
    EXPECT_NEAR(components[3 * i] * sign, x, 1e-5);
    EXPECT_NEAR(components[3 * i + 1] * sign, y, 1e-5);
    EXPECT_NEAR(components[3 * i + 2], 0.0, 1e-5);
  };
  expect_direction(0, 0.6F, 0.8F);
  expect_direction(1, -0.8F, 0.6F);
}

TEST(ComponentsTest, AreOrthonormalAndCarryAllVariance) {
  constexpr uint32_t kChannels = 24;
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> rows(size_t{200} * kChannels);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = normal(random) * static_cast<float>(1 + i % kChannels);
  }
  const std::vector<float> components = PrincipalComponents(rows, kChannels, kChannels);
  double before = 1e300;
  for (uint32_t a = 0; a < kChannels; ++a) {
    const float* const u = components.data() + size_t{a} * kChannels;
    for (uint32_t b = 0; b <= a; ++b) {
      const float* const v = components.data() + size_t{b} * kChannels;
      EXPECT_NEAR(std::inner_product(u, u + kChannels, v, 0.0), a == b ? 1.0 : 0.0, 1e-5);
    }
    double sum = 0.0;
    double squares = 0.0;
    for (size_t row = 0; row < 200; ++row) {
      const double x = std::inner_product(u, u + kChannels, rows.data() + row * kChannels, 0.0);
      sum += x;
      squares += x * x;
    }
    const double variance = squares / 200 - (sum / 200) * (sum / 200);
    EXPECT_LE(variance, before * (1 + 1e-6));
    before = variance;
  }
}

TEST(SharingMapTest, TakesTheLargestPairsAndMovesFollowers) {
  // 3 copies 2 (.9), then 2 copies 0 (.8), so 3 copies 0 too. The .85 of (3, 1) comes too late.
  const std::vector<std::vector<double>> overlap = {
      {0.0, 0.0, 0.0, 0.0}, {0.1, 0.0, 0.0, 0.0}, {0.8, 0.3, 0.0, 0.0}, {0.2, 0.85, 0.9, 0.0}};
  EXPECT_EQ(ShareGreedily(overlap, 0), (Positions{0, 1, 2, 3}));
  EXPECT_EQ(ShareGreedily(overlap, 1), (Positions{0, 1, 2, 2}));
  EXPECT_EQ(ShareGreedily(overlap, 2), (Positions{0, 1, 0, 0}));
  EXPECT_EQ(ShareGreedily(overlap, 3), (Positions{0, 0, 0, 0}));
  EXPECT_EQ(ShareGreedily(overlap, 9), (Positions{0, 0, 0, 0}));
}

TEST(RandomNumbersTest, AreUniformAndNormalAndAddressed) {
  RandomNumbers random(7);
  std::vector<int> counts(10, 0);
  double sum = 0.0;
  double squares = 0.0;
  constexpr int kDraws = 100000;
  for (int i = 0; i < kDraws; ++i) {
    ++counts[random.Below(10)];
    const double normal = random.Normal();
    sum += normal;
    squares += normal * normal;
  }
  // Five standard deviations.
  for (const int count : counts) EXPECT_NEAR(count, 0.1 * kDraws, 5 * 95);
  EXPECT_NEAR(sum / kDraws, 0.0, 5 * 0.0032);
  EXPECT_NEAR(squares / kDraws, 1.0, 5 * 0.0045);
  EXPECT_EQ(RandomNumbers({1, 2}).Bits(), RandomNumbers({1, 2}).Bits());
  EXPECT_NE(RandomNumbers({1, 2}).Bits(), RandomNumbers({2, 1}).Bits());
  EXPECT_NE(RandomNumbers({1, 2}).Bits(), RandomNumbers({1, 3}).Bits());
}

TEST(ForEachIndexTest, ReachesEveryIndexOnce) {
  for (const uint32_t threads : {1U, 3U, 20U}) {
    std::vector<int> counts(10, 0);
    ForEachIndex({0, 2, 3, 4, 9}, threads, [&](uint32_t i) { ++counts[i]; });
    EXPECT_EQ(counts, (std::vector<int>{1, 0, 1, 1, 1, 0, 0, 0, 0, 1}));
  }
}

}  // namespace
}  // namespace kvservice::baselines
