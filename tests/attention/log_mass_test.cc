#include "attention/log_mass.h"

#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvservice {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Logs of masses of every size that attention can produce, and the hard ones: equal, neighbours,
// far apart, huge.
std::vector<double> HardLogs() {
  std::vector<double> logs = {0.0,     -0.0, 1.0,  -1.0,  DBL_MIN, -DBL_MIN,
                              36.0437, 37.0, 38.5, 700.0, -700.0,  -745.13,
                              745.2,   1e8,  -1e8, 1e300, -1e300};
  const size_t count = logs.size();
  for (size_t i = 0; i < count; ++i) logs.push_back(std::nextafter(logs[i], kInf));
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> uniform(-60.0, 60.0);
  for (int i = 0; i < 200; ++i) logs.push_back(uniform(random));
  return logs;
}

long double ExactAdd(double a, double b) {
  const long double top = std::max(a, b);
  return top + std::log1p(std::exp(static_cast<long double>(std::min(a, b)) - top));
}

long double ExactShare(double dropped, double kept) {
  return 1.0L /
         (1.0L + std::exp(static_cast<long double>(kept) - static_cast<long double>(dropped)));
}

TEST(LogMass, WideningIsStrict) {
  for (const double x : HardLogs()) {
    EXPECT_GT(WidenUp(x), x);
    EXPECT_LT(WidenDown(x), x);
    EXPECT_NEAR(WidenUp(x), x, 1e-14 * (1.0 + std::fabs(x)));
    EXPECT_NEAR(WidenDown(x), x, 1e-14 * (1.0 + std::fabs(x)));
  }
  EXPECT_EQ(WidenUp(kInf), kInf);
  EXPECT_EQ(WidenUp(-kInf), -kInf);
  EXPECT_EQ(WidenDown(-kInf), -kInf);
  EXPECT_TRUE(std::isnan(WidenUp(kNan)));
}

TEST(LogMass, SumsEncloseTheTruth) {
  for (const double a : HardLogs()) {
    for (const double b : HardLogs()) {
      const long double exact = ExactAdd(a, b);
      const double upper = Add(LogMassUpper{a}, LogMassUpper{b}).value;
      const double lower = Add(LogMassLower{a}, LogMassLower{b}).value;
      ASSERT_GE(upper, exact) << a << " " << b;
      ASSERT_LE(lower, exact) << a << " " << b;
      ASSERT_LE(upper - lower, 1e-14 * (1.0 + std::fabs(static_cast<double>(exact))));
    }
  }
}

TEST(LogMass, ZeroIsNeutral) {
  EXPECT_EQ(Add(LogMassUpper{}, LogMassUpper{3.0}).value, 3.0);
  EXPECT_EQ(Add(LogMassUpper{3.0}, LogMassUpper{}).value, 3.0);
  EXPECT_EQ(Add(LogMassUpper{}, LogMassUpper{}).value, kLogZero);
  EXPECT_EQ(Add(LogMassLower{3.0}, LogMassLower{}).value, 3.0);
  EXPECT_EQ(Add(LogMassLower{}, LogMassLower{}).value, kLogZero);
}

TEST(LogMass, NothingKnownStaysUnknown) {
  for (const double x : {kNan, kInf}) {
    EXPECT_EQ(Add(LogMassUpper{x}, LogMassUpper{1.0}).value, kInf);
    EXPECT_EQ(Add(LogMassUpper{1.0}, LogMassUpper{x}).value, kInf);
    EXPECT_EQ(Add(LogMassLower{x}, LogMassLower{1.0}).value, kLogZero);
    EXPECT_EQ(Add(LogMassLower{1.0}, LogMassLower{x}).value, kLogZero);
    EXPECT_EQ(LogOfUpper(x).value, kInf);
    EXPECT_EQ(LogOfLower(x).value, kLogZero);
    EXPECT_EQ(DroppedMass(LogMassUpper{x}, LogMassLower{0.0}).value, 1.0);
    EXPECT_EQ(DroppedMass(LogMassUpper{0.0}, LogMassLower{x}).value, 1.0);
    EXPECT_EQ(DroppedMass(LogMassLower{x}, LogMassUpper{0.0}).value, 0.0);
    EXPECT_EQ(DroppedMass(LogMassLower{0.0}, LogMassUpper{x}).value, 0.0);
  }
  EXPECT_EQ(LogOfUpper(-1.0).value, kInf);
  EXPECT_EQ(LogOfLower(-1.0).value, kLogZero);
}

TEST(LogMass, LogsEncloseTheTruth) {
  EXPECT_EQ(LogOfUpper(0.0).value, kLogZero);
  EXPECT_EQ(LogOfLower(0.0).value, kLogZero);
  std::mt19937_64 random(8);
  std::uniform_real_distribution<double> exponent(-1074.0, 1023.0);
  for (int i = 0; i < 20000; ++i) {
    const double mass = i == 0   ? 1.0
                        : i == 1 ? std::nextafter(1.0, 0.0)
                                 : std::exp2(exponent(random));
    if (mass == 0.0) continue;
    const long double exact = std::log(static_cast<long double>(mass));
    ASSERT_GE(LogOfUpper(mass).value, exact) << mass;
    ASSERT_LE(LogOfLower(mass).value, exact) << mass;
  }
}

TEST(LogMass, SharesEncloseTheTruth) {
  for (const double dropped : HardLogs()) {
    for (const double kept : HardLogs()) {
      const long double exact = ExactShare(dropped, kept);
      const double upper = DroppedMass(LogMassUpper{dropped}, LogMassLower{kept}).value;
      const double lower = DroppedMass(LogMassLower{dropped}, LogMassUpper{kept}).value;
      ASSERT_GE(upper, exact) << dropped << " " << kept;
      ASSERT_LE(lower, exact) << dropped << " " << kept;
      ASSERT_GT(upper, 0.0);
      ASSERT_LE(upper, 1.0);
      ASSERT_GE(lower, 0.0);
      // Tight as well: within the rounding of the difference of the logs.
      const double size = std::max(std::fabs(dropped), std::fabs(kept));
      if (size < 1e9) {
        ASSERT_LE(upper - lower, DBL_MIN + 1e-13 * (1.0 + size) * static_cast<double>(exact));
      }
    }
  }
  EXPECT_EQ(DroppedMass(LogMassUpper{}, LogMassLower{0.0}).value, 0.0);
  EXPECT_EQ(DroppedMass(LogMassLower{}, LogMassUpper{0.0}).value, 0.0);
  EXPECT_EQ(DroppedMass(LogMassUpper{0.0}, LogMassLower{}).value, 1.0);
  EXPECT_EQ(DroppedMass(LogMassLower{0.0}, LogMassUpper{}).value, 1.0);
}

TEST(LogMass, FloatsRoundOutward) {
  std::mt19937_64 random(9);
  std::uniform_real_distribution<double> exponent(-160.0, 130.0);
  for (int i = 0; i < 20000; ++i) {
    const double x = (i % 2 == 0 ? 1.0 : -1.0) * std::exp2(exponent(random));
    const float up = RoundUpToFloat(x);
    const float down = RoundDownToFloat(x);
    ASSERT_GE(static_cast<double>(up), x);
    ASSERT_LE(static_cast<double>(down), x);
    if (std::isfinite(up) && std::isfinite(down)) {
      ASSERT_LE(up, std::nextafter(down, std::numeric_limits<float>::infinity()));
    }
  }
  for (const float x : {0.0F, 1.0F, -1.0F, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN}) {
    EXPECT_EQ(RoundUpToFloat(x), x);
    EXPECT_EQ(RoundDownToFloat(x), x);
  }
  EXPECT_EQ(RoundUpToFloat(1e300), std::numeric_limits<float>::infinity());
  EXPECT_EQ(RoundDownToFloat(1e300), FLT_MAX);
  EXPECT_EQ(RoundUpToFloat(-1e300), -FLT_MAX);
  EXPECT_EQ(RoundDownToFloat(-1e300), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(RoundUpToFloat(1e-300), FLT_TRUE_MIN);
  EXPECT_EQ(RoundUpToFloat(kLogZero), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(RoundUpToFloat(kNan), std::numeric_limits<float>::infinity());
  EXPECT_EQ(RoundDownToFloat(kNan), -std::numeric_limits<float>::infinity());
}

}  // namespace
}  // namespace kvservice
