// The reference's sums of exponentials, which its bounds stand on: no tolerance.

#include "attention/reference/log_sum.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvservice::reference {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

void ExpectEnclosed(const std::vector<double>& logits) {
  long double top = -std::numeric_limits<long double>::infinity();
  for (const double x : logits) top = std::max<long double>(top, x);
  long double sum = 0.0L;
  for (const double x : logits) sum += std::exp(static_cast<long double>(x) - top);
  const long double exact = top + std::log(sum);
  EXPECT_GE(LogSumUpper(logits).value, exact);
  EXPECT_LE(LogSumLower(logits).value, exact);
  EXPECT_NEAR(LogSum(logits), static_cast<double>(exact), 1e-9);
  EXPECT_NEAR(LogSumUpper(logits).value, LogSumLower(logits).value,
              static_cast<double>(logits.size() + 100) * 1e-15 + 1e-14 * std::fabs(LogSum(logits)));
}

TEST(LogSum, EnclosesTheTruth) {
  std::mt19937_64 random(4);
  for (const double spread : {0.0, 1e-9, 1.0, 30.0, 1000.0, 1e7}) {
    std::normal_distribution<double> normal(0.0, 1.0);
    for (const size_t count : {1U, 2U, 3U, 10U, 1000U, 20000U}) {
      std::vector<double> logits(count);
      for (double& x : logits) x = -3.3 + spread * normal(random);
      ExpectEnclosed(logits);
    }
  }
}

// Adding a million equal terms rounds the same way every time: far more than a few ulps.
TEST(LogSum, EnclosesAMillionEqualTerms) {
  for (const double tail : {-0.1, -2.3, -40.0}) {
    std::vector<double> logits(1000000, tail);
    logits[0] = 0.0;
    ExpectEnclosed(logits);
  }
}

TEST(LogSum, EmptyAndUnknown) {
  EXPECT_EQ(LogSum({}), kLogZero);
  EXPECT_EQ(LogSumUpper({}).value, kLogZero);
  EXPECT_EQ(LogSumLower({}).value, kLogZero);
  const std::vector<double> nothing(3, kLogZero);
  EXPECT_EQ(LogSumUpper(nothing).value, kLogZero);
  for (const double unknown : {kNan, kInf}) {
    const std::vector<double> logits = {1.0, unknown, 2.0};
    EXPECT_EQ(LogSumUpper(logits).value, kInf);
    EXPECT_LE(LogSumLower(logits).value, std::log(std::exp(1.0) + std::exp(2.0)));
    EXPECT_GT(LogSumLower(logits).value, 2.0);
    EXPECT_FALSE(std::isfinite(LogSum(logits)));
  }
}

}  // namespace
}  // namespace kvservice::reference
