// Distributions over a vocabulary against plain loops in long double.

#include "tests/eval/distribution.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include "tests/attention/cpu_targets.h"

namespace kvservice::eval {
namespace {

using testing::OnEveryTarget;

// Whole vectors of every target, and what is left of one.
constexpr size_t kCounts[] = {1, 2, 3, 7, 16, 64, 1000, 4099};

std::vector<float> Logits(size_t count, float width, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0F, width);
  std::vector<float> logits(count);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

long double LongLogSum(const std::vector<float>& logits) {
  long double sum = 0.0L;
  for (const float logit : logits) sum += std::exp(static_cast<long double>(logit));
  return std::log(sum);
}

TEST(LogSumTest, IsThatOfPlainLoops) {
  OnEveryTarget([] {
    for (const size_t count : kCounts) {
      for (const float width : {0.01F, 3.0F, 30.0F}) {
        std::vector<float> logits = Logits(count, width, count);
        const LogSum found = LogSumOf(logits);
        const auto expected = static_cast<double>(LongLogSum(logits));
        // The exponential's relative error, and float32 differences of logits.
        EXPECT_NEAR(found.value, expected, 3e-7 * (1.0 + width)) << count << " " << width;
        for (size_t i = 0; i < count; ++i) {
          EXPECT_GE(logits[found.best], logits[i]);
          if (i < found.best) {
            EXPECT_LT(logits[i], logits[found.best]);
          }
        }
      }
    }
  });
}

TEST(LogSumTest, OfEqualsTheFirstIsBest) {
  OnEveryTarget([] {
    std::vector<float> logits(100, -2.0F);
    for (const size_t at : {99U, 40U, 17U, 3U}) {
      logits[at] = 5.0F;
      EXPECT_EQ(LogSumOf(logits).best, at);
    }
  });
}

// The largest decides alone; what is far below it vanishes instead of becoming no number.
TEST(LogSumTest, TakesLogitsOfAnySize) {
  OnEveryTarget([] {
    EXPECT_EQ(LogSumOf({-3e5F, 2e5F, -1e5F}).value, 2e5);
    EXPECT_EQ(LogSumOf({-3e5F}).value, -3e5);
  });
}

TEST(NormaliseTest, GivesShares) {
  OnEveryTarget([] {
    for (const size_t count : kCounts) {
      const std::vector<float> logits = Logits(count, 3.0F, count);
      const auto log_sum = LongLogSum(logits);
      std::vector<float> shares(count + 1, 9.0F);
      Normalise(logits, static_cast<double>(log_sum), shares.data());
      EXPECT_EQ(shares.back(), 9.0F);
      for (size_t i = 0; i < count; ++i) {
        const auto expected = static_cast<double>(std::exp(logits[i] - log_sum));
        EXPECT_NEAR(shares[i], expected, 2e-6 * expected) << count << " " << i;
        EXPECT_LE(shares[i], 1.0F);
      }
    }
  });
}

TEST(DivergenceTest, IsThatOfPlainLoops) {
  OnEveryTarget([] {
    for (const size_t count : kCounts) {
      for (const float change : {1e-3F, 0.1F, 3.0F}) {
        const std::vector<float> p_logits = Logits(count, 3.0F, count);
        std::vector<float> q_logits = Logits(count, change, count + 1);
        for (size_t i = 0; i < count; ++i) q_logits[i] += p_logits[i];
        const long double p_sum = LongLogSum(p_logits), q_sum = LongLogSum(q_logits);
        long double expected = 0.0L;
        for (size_t i = 0; i < count; ++i) {
          const long double log_p = p_logits[i] - p_sum;
          expected += std::exp(log_p) * (log_p - (q_logits[i] - q_sum));
        }
        std::vector<float> p(count);
        Normalise(p_logits, LogSumOf(p_logits).value, p.data());
        const double found =
            Divergence(p, p_logits, LogSumOf(p_logits).value, q_logits, LogSumOf(q_logits).value);
        EXPECT_NEAR(found, static_cast<double>(expected), 1e-6 * (1.0 + change))
            << count << " " << change;
      }
    }
  });
}

TEST(DivergenceTest, OfADistributionFromItselfIsNothing) {
  const std::vector<float> logits = Logits(1000, 3.0F, 1);
  const double log_sum = LogSumOf(logits).value;
  std::vector<float> p(logits.size());
  Normalise(logits, log_sum, p.data());
  EXPECT_EQ(Divergence(p, logits, log_sum, logits, log_sum), 0.0);
}

}  // namespace
}  // namespace kvservice::eval
