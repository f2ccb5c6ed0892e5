#include "attention/rounding.h"

#include <cfloat>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace kvservice {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint64_t kMax64 = std::numeric_limits<uint64_t>::max();
__extension__ using Int128 = __int128;

TEST(RoundingTest, Neighbours) {
  std::mt19937_64 random(1);
  std::vector<double> numbers{0.0, DBL_TRUE_MIN, DBL_MIN, 1.0, 1.5, 0x1p53, DBL_MAX, kInfinity};
  for (int i = 0; i < 1000; ++i) {
    numbers.push_back(std::ldexp(static_cast<double>(random()), static_cast<int>(random() % 900)));
  }
  for (const double x : numbers) {
    EXPECT_EQ(NextUp(x), std::nextafter(x, kInfinity)) << x;
    EXPECT_EQ(NextDown(x), x == 0.0 ? 0.0 : std::nextafter(x, 0.0)) << x;
  }
  EXPECT_EQ(NextUp(-0.0), DBL_TRUE_MIN);
  EXPECT_EQ(NextDown(-0.0), 0.0);
}

// Sums of integers below 2^120 that are doubles are exact in 128 bits.
TEST(RoundingTest, SumsAreTheNeighboursOfTheExactSum) {
  std::mt19937_64 random(2);
  int inexact = 0;
  for (int i = 0; i < 100000; ++i) {
    const double a =
        std::ldexp(static_cast<double>(random() >> 11), static_cast<int>(random() % 60));
    const double b =
        std::ldexp(static_cast<double>(random() >> 11), static_cast<int>(random() % 60));
    const Int128 exact = static_cast<Int128>(a) + static_cast<Int128>(b);
    const double up = AddUp(a, b);
    const double down = AddDown(a, b);
    ASSERT_GE(static_cast<Int128>(up), exact);
    ASSERT_LE(static_cast<Int128>(down), exact);
    // Neighbours, or equal to an exact sum.
    ASSERT_TRUE(up == down || up == NextUp(down));
    ASSERT_EQ(up == down, static_cast<Int128>(up) == exact);
    inexact += up == down ? 0 : 1;
  }
  EXPECT_GT(inexact, 10000);
}

TEST(RoundingTest, SumsAtTheEnds) {
  EXPECT_EQ(AddUp(0.0, 0.0), 0.0);
  EXPECT_EQ(AddUp(1.0, DBL_TRUE_MIN), NextUp(1.0));
  EXPECT_EQ(AddDown(1.0, DBL_TRUE_MIN), 1.0);
  EXPECT_EQ(AddUp(DBL_MAX, DBL_MAX), kInfinity);
  EXPECT_EQ(AddDown(DBL_MAX, DBL_MAX), DBL_MAX);
  EXPECT_EQ(AddUp(kInfinity, 1.0), kInfinity);
}

TEST(RoundingTest, ProductsAndQuotients) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 100000; ++i) {
    const auto a = static_cast<double>(random() >> 20);
    const auto b = static_cast<double>((random() >> 20) + 1);
    const Int128 product = static_cast<Int128>(a) * static_cast<Int128>(b);
    ASSERT_GT(static_cast<Int128>(MultiplyUp(a, b)), product);
    ASSERT_TRUE(a == 0.0 || static_cast<Int128>(MultiplyDown(a, b)) < product);
    // q >= a / b exactly if q b >= a; fma rounds q b - a only once, so its sign is right.
    ASSERT_GE(std::fma(DivideUp(a, b), b, -a), 0.0);
    ASSERT_LE(std::fma(DivideDown(a, b), b, -a), 0.0);
  }
}

TEST(RoundingTest, Integers) {
  std::mt19937_64 random(4);
  std::vector<uint64_t> numbers{0,
                                1,
                                (1ull << 53) - 1,
                                (1ull << 53) + 1,
                                kMax64,
                                kMax64 - 1024,
                                kMax64 - 2047,
                                1ull << 63,
                                (1ull << 63) + 1};
  for (int i = 0; i < 10000; ++i) numbers.push_back(random() >> random() % 64);
  for (const uint64_t x : numbers) {
    EXPECT_GE(static_cast<Int128>(DoubleUp(x)), static_cast<Int128>(x)) << x;
    EXPECT_LE(static_cast<Int128>(DoubleDown(x)), static_cast<Int128>(x)) << x;
    EXPECT_TRUE(DoubleUp(x) == DoubleDown(x) || DoubleUp(x) == NextUp(DoubleDown(x))) << x;
  }
}

}  // namespace
}  // namespace kvservice
