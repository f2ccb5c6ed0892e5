// The theory's formulas: against numbers computed by hand, and, where they are theorems, against
// many small random cases.

#include "selector/assumed.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace kvservice {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Rounding of the sums below; the theorems themselves have no tolerance.
constexpr double kRounding = 1e-12;

using Numbers = std::vector<double>;

Numbers Softmax(const Numbers& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  Numbers weights;
  for (const double logit : logits) weights.push_back(std::exp(logit - top));
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& weight : weights) weight /= sum;
  return weights;
}

double TotalVariation(const Numbers& p, const Numbers& q) {
  double sum = 0.0;
  for (size_t i = 0; i < p.size(); ++i) sum += std::fabs(p[i] - q[i]) / 2.0;
  return sum;
}

double Oscillation(const Numbers& a, const Numbers& b) {
  Numbers apart;
  for (size_t i = 0; i < a.size(); ++i) apart.push_back(b[i] - a[i]);
  const auto [low, high] = std::minmax_element(apart.begin(), apart.end());
  return *high - *low;
}

// What the best `count` tokens under `chooser` drop under `judge`.
double Dropped(const Numbers& chooser, const Numbers& judge, size_t count) {
  std::vector<size_t> order(chooser.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return chooser[a] > chooser[b]; });
  double kept = 0.0;
  for (size_t i = 0; i < count; ++i) kept += judge[order[i]];
  return 1.0 - kept;
}

double Excess(const Numbers& chooser, const Numbers& judge, size_t count) {
  return Dropped(chooser, judge, count) - Dropped(judge, judge, count);
}

class AssumedTest : public ::testing::Test {
 protected:
  double Normal() { return normal_(random_); }
  uint32_t Below(uint32_t limit) { return static_cast<uint32_t>(random_() % limit); }
  Numbers Vector(size_t count, double size) {
    Numbers numbers(count);
    for (double& x : numbers) x = size * Normal();
    return numbers;
  }

 private:
  std::mt19937_64 random_{7};
  std::normal_distribution<double> normal_;
};

TEST_F(AssumedTest, OscillationBoundsVariationAndExcess) {
  double closest = 0.0;
  for (int i = 0; i < 20000; ++i) {
    const size_t count = 2 + Below(9);
    const double size = std::exp(Normal());
    const Numbers logits = Vector(count, 2.0);
    Numbers other = Vector(count, size);
    for (size_t token = 0; token < count; ++token) other[token] += logits[token];
    const Numbers p = Softmax(logits);
    const Numbers q = Softmax(other);
    const double oscillation = Oscillation(logits, other);
    const double variation = TotalVariation(p, q);
    EXPECT_LE(variation, TotalVariationBound(oscillation) + kRounding);
    closest = std::max(closest, variation / TotalVariationBound(oscillation));
    const size_t kept = 1 + Below(static_cast<uint32_t>(count) - 1);
    EXPECT_LE(Excess(p, q, kept), TransferredExcess(oscillation) + kRounding);
    EXPECT_LE(Excess(p, q, kept), 2.0 * variation + kRounding);
  }
  EXPECT_GT(closest, 0.99) << "the bound is tight";
  // Two tokens whose weights change places.
  for (const double oscillation : {0.1, 1.0, 6.0}) {
    const Numbers p = Softmax({oscillation / 4, -oscillation / 4});
    const Numbers q = Softmax({-oscillation / 4, oscillation / 4});
    EXPECT_NEAR(TotalVariation(p, q), TotalVariationBound(oscillation), kRounding);
  }
}

TEST_F(AssumedTest, SharingIsBoundByNormsAndDistance) {
  for (int i = 0; i < 5000; ++i) {
    const size_t dim = 2 + Below(6);
    const size_t count = 2 + Below(12);
    const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
    const Numbers q = Vector(dim, 1.0 + Below(3));
    Numbers other = Vector(dim, std::exp(Normal() - 1.0));
    for (size_t c = 0; c < dim; ++c) other[c] += q[c];
    const auto norm = [](const Numbers& x) {
      return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
    };
    const double cosine =
        std::inner_product(q.begin(), q.end(), other.begin(), 0.0) / (norm(q) * norm(other));
    Numbers apart(dim);
    for (size_t c = 0; c < dim; ++c) apart[c] = other[c] - q[c];
    EXPECT_NEAR(QueryDistance(norm(q), norm(other), cosine), norm(apart), 1e-6);

    Numbers logits;
    Numbers other_logits;
    double key_norm_max = 0.0;
    for (size_t token = 0; token < count; ++token) {
      const Numbers key = Vector(dim, 1.0);
      key_norm_max = std::max(key_norm_max, norm(key));
      logits.push_back(scale * std::inner_product(q.begin(), q.end(), key.begin(), 0.0));
      other_logits.push_back(scale *
                             std::inner_product(other.begin(), other.end(), key.begin(), 0.0));
    }
    const size_t kept = 1 + Below(static_cast<uint32_t>(count) - 1);
    EXPECT_LE(Excess(Softmax(logits), Softmax(other_logits), kept),
              AssumedSharingExcess(key_norm_max, norm(apart), scale) + kRounding);
  }
}

// Query norm times key norm times scale is 5 and 25; 2 tanh(5 sqrt(2 - 2 tau) / 2) and so on.
TEST(AssumedFormulas, SharingAtPracticalThresholds) {
  const auto excess = [](double product, double tau) {
    return AssumedSharingExcess(product, QueryDistance(1.0, 1.0, tau), 1.0);
  };
  EXPECT_NEAR(excess(5.0, 0.999), 0.222, 0.001);
  EXPECT_NEAR(excess(5.0, 0.99), 0.679, 0.001);
  // 1.61 at 0.9; 2.0, 1.89 and 1.01: all say nothing.
  EXPECT_EQ(excess(5.0, 0.9), 1.0);
  EXPECT_EQ(excess(25.0, 0.9), 1.0);
  EXPECT_EQ(excess(25.0, 0.99), 1.0);
  EXPECT_EQ(excess(25.0, 0.999), 1.0);
  EXPECT_NEAR(2 * TotalVariationBound(2 * 5.0 * QueryDistance(1, 1, 0.9)), 1.613, 0.001);
  EXPECT_NEAR(2 * TotalVariationBound(2 * 25.0 * QueryDistance(1, 1, 0.99)), 1.887, 0.001);
  EXPECT_NEAR(2 * TotalVariationBound(2 * 25.0 * QueryDistance(1, 1, 0.999)), 1.014, 0.001);
  EXPECT_EQ(QueryDistance(3.0, 4.0, 0.0), 5.0);
  EXPECT_EQ(QueryDistance(3.0, 4.0, 1.0), 1.0);
  EXPECT_EQ(QueryDistance(3.0, 3.0, 1.0 + 1e-15), 0.0) << "a cosine may round beyond 1";
  EXPECT_EQ(AssumedSharingExcess(5.0, 0.0, 1.0), 0.0);
}

TEST(AssumedFormulas, HiddenMassDecays) {
  // 0.5 e^-2, and a geometric decay, of which the mass beyond a distance is exactly that power.
  EXPECT_NEAR(AssumedHiddenMass(0.5, 0.002, 1000), 0.0676676416, 1e-10);
  const double rate = 0.01;
  double beyond = 0.0;
  double all = 0.0;
  for (int distance = 0; distance < 5000; ++distance) {
    all += std::exp(-rate * distance);
    if (distance >= 300) beyond += std::exp(-rate * distance);
  }
  EXPECT_NEAR(AssumedHiddenMass(1.0, rate, 300), beyond / all, 1e-12);
  EXPECT_EQ(AssumedHiddenMass(0.0, 0.0, 5), 0.0);
  EXPECT_EQ(AssumedHiddenMass(7.0, 1e-9, 100), 1.0);
}

TEST_F(AssumedTest, DriftBoundsFreezing) {
  EXPECT_NEAR(AssumedFreezingExcess(0.2), 2 * 0.0996679946, 1e-9);  // 2 tanh(0.1)
  EXPECT_EQ(AssumedFreezingExcess(0.0), 0.0);
  EXPECT_EQ(AssumedFreezingExcess(1.2), 1.0);
  for (int i = 0; i < 5000; ++i) {
    const size_t count = 2 + Below(9);
    const Numbers logits = Vector(count, 2.0);
    const double drift = std::exp(Normal() - 1.0);
    Numbers shallower = logits;
    for (double& logit : shallower) logit += drift * (Below(2001) / 1000.0 - 1.0);
    const size_t kept = 1 + Below(static_cast<uint32_t>(count) - 1);
    EXPECT_LE(Excess(Softmax(shallower), Softmax(logits), kept),
              AssumedFreezingExcess(drift) + kRounding);
  }
}

TEST(AssumedFormulas, WithoutAnAnswerNothingIsSaid) {
  for (const double bad : {kNan, kInfinity, -kInfinity}) {
    EXPECT_EQ(TotalVariationBound(bad), 1.0);
    EXPECT_EQ(TransferredExcess(bad), 1.0);
    EXPECT_EQ(AssumedSharingExcess(bad, 0.0, 1.0), 1.0);
    EXPECT_EQ(AssumedFreezingExcess(bad), 1.0);
  }
  EXPECT_EQ(AssumedHiddenMass(kNan, 1.0, 1.0), 1.0);
  EXPECT_EQ(AssumedHiddenMass(kInfinity, kInfinity, 1.0), 1.0);
}

// The small table of g1(d) = h(d) + d ln 4096.
TEST(MutualInformation, HandComputedValues) {
  EXPECT_NEAR(MutualInformationBoundNats({0.001}, 4096), 0.0162, 0.0001);
  EXPECT_NEAR(MutualInformationBoundNats({0.01}, 4096), 0.1392, 0.0001);
  EXPECT_NEAR(MutualInformationBoundNats({0.05}, 4096), 0.6144, 0.0001);
  EXPECT_NEAR(MutualInformationBoundNats({0.1}, 4096), 1.1569, 0.0001);
}

TEST(MutualInformation, BoundIsUpperAndMonotone) {
  for (const uint64_t tokens : {1ULL, 2ULL, 100ULL, 32768ULL, 1ULL << 40}) {
    double previous = -1.0;
    for (const double d : {0.0, 1e-300, 1e-12, 1e-3, 0.05, 0.3, 0.5, 0.9, 0.9999, 1.0}) {
      const auto x = static_cast<long double>(d);
      const auto n = static_cast<long double>(tokens);
      long double exact = 0.0L;
      if (x > 0.0L) exact = -x * std::log(x) + x * std::log(n);
      if (x < 1.0L) exact -= (1.0L - x) * std::log1p(-x);
      if (x > n / (n + 1.0L)) exact = std::log1p(n);
      const double bound = MutualInformationBoundNats({d}, tokens);
      EXPECT_GE(bound, exact) << d << " " << tokens;
      EXPECT_NEAR(bound, static_cast<double>(exact), 1e-12);
      EXPECT_GE(bound, previous);
      previous = bound;
    }
  }
  EXPECT_EQ(MutualInformationBoundNats({0.0}, 1000), 0.0);
  EXPECT_EQ(MutualInformationBoundNats({0.5}, 0), 0.0);
  EXPECT_EQ(MutualInformationBoundNats({kNan}, 9), MutualInformationBoundNats({1.0}, 9));
}

}  // namespace
}  // namespace kvservice
