// Integer weights of dropped tokens: at least the weights they are made from, and in a unit that
// fits the dropped tokens, whatever else their pages hold.

#include "attention/cpu/population.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention/kv_layout.h"

namespace kvservice::testing {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kUnitsLog2 = 30.0;
constexpr uint32_t kPages = 3;
constexpr uint64_t kAllTokens = ~uint64_t{0};

// One head; weights of about 2^(reference - token / 8), page by page.
ScanWeights MadeWeights(const std::vector<int32_t>& references) {
  ScanWeights weights;
  weights.Resize(1, 0, kPages, true);
  for (uint32_t page = 0; page < kPages; ++page) {
    weights.reference[page] = references[page];
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      weights.upper[page * kBlockTokens + token] =
          1.4F * std::exp2(-static_cast<float>(token) / 8.0F);
    }
  }
  return weights;
}

// Every weight of the set is an integer in the stated unit that is not below it, and the largest
// makes good use of 31 bits.
void ExpectTight(const ScanWeights& weights, const std::vector<uint64_t>& mask) {
  Population population;
  ASSERT_TRUE(FillPopulation(weights, 0, mask, &population));
  long double sum = 0.0L;
  uint64_t total = 0;
  uint32_t count = 0;
  for (uint32_t i = 0; i < kPages * kBlockTokens; ++i) {
    const uint32_t weight = population.weights[i];
    if (((mask[i / kBlockTokens] >> (i % kBlockTokens)) & 1) == 0) {
      EXPECT_EQ(weight, 0U);
      continue;
    }
    const long double exact =
        std::ldexp(static_cast<long double>(weights.upper[i]), weights.reference[i / kBlockTokens]);
    const long double unit = std::exp(static_cast<long double>(population.ref) - kUnitsLog2 * kLn2);
    EXPECT_GE(weight * unit * (1.0L + 1e-12L), exact) << i;
    EXPECT_GE(weight, 1U);
    sum += exact / unit;
    total += weight;
    ++count;
  }
  EXPECT_EQ(population.total(), total);
  EXPECT_LE(static_cast<long double>(total), sum * (1.0L + 0x1p-18L) + count);
  EXPECT_GE(sum, 0x1p28L);
}

TEST(FillPopulation, RoundsUpInAUnitOfTheSet) {
  ExpectTight(MadeWeights({0, 0, 0}), {kAllTokens, kAllTokens, kAllTokens});
  ExpectTight(MadeWeights({-3, 5, -40}), {kAllTokens, 0, 0xF0F0});
  ExpectTight(MadeWeights({-200, 900, -900}), {kAllTokens, kAllTokens, kAllTokens});
}

// A page's reference is that of its heaviest token, which may have been read.
TEST(FillPopulation, AHeavyTokenThatIsReadDoesNotCoarsenTheUnit) {
  for (const int32_t above : {20, 35, 60}) {
    ScanWeights weights = MadeWeights({above, 0, 0});
    for (uint32_t token = 1; token < kBlockTokens; ++token) {
      weights.upper[token] = std::ldexp(weights.upper[token], -above);
    }
    ExpectTight(weights, {kAllTokens - 1, kAllTokens, kAllTokens});
    ExpectTight(weights, {kAllTokens - 1, 0, 0});
  }
}

TEST(FillPopulation, WeightsTooSmallForAFloatStillCount) {
  ScanWeights weights = MadeWeights({0, 0, 0});
  for (uint32_t i = 0; i < kBlockTokens; ++i) weights.upper[i] = 0x1p-126F;
  Population population;
  const std::vector<uint64_t> mask = {kAllTokens, 0, 0};
  ASSERT_TRUE(FillPopulation(weights, 0, mask, &population));
  const double unit = std::exp(population.ref - kUnitsLog2 * kLn2);
  for (uint32_t i = 0; i < kBlockTokens; ++i) {
    EXPECT_GE(population.weights[i], 1U);
    EXPECT_GE(population.weights[i] * unit, 0x1p-126);
  }
}

TEST(FillPopulation, UnknownWeightsAreSaidToBe) {
  for (const float unknown :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    ScanWeights weights = MadeWeights({0, 0, 0});
    for (uint32_t i = 0; i < kBlockTokens; ++i) weights.upper[kBlockTokens + i] = unknown;
    Population population;
    EXPECT_FALSE(FillPopulation(weights, 0, std::vector<uint64_t>{1, 2, 0}, &population));
    EXPECT_TRUE(FillPopulation(weights, 0, std::vector<uint64_t>{1, 0, 4}, &population));
  }
}

}  // namespace
}  // namespace kvservice::testing
