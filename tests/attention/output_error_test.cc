#include "attention/output_error.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attention/draws.h"
#include "attention/rounding.h"
#include "gtest/gtest.h"
#include "tests/attention/coverage.h"

namespace kvservice {
namespace {

using testing::kEtas;
using testing::MissesAllowed;
using testing::TestKey;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
using Misses = std::array<uint32_t, kEtas.size()>;

// ---- Without samples ----------------------------------------------------------------------------

long double ShareOf(const std::vector<BoundedWeight>& terms, double base,
                    const std::vector<double>& z) {
  long double numerator = 0.0L;
  auto denominator = static_cast<long double>(base);
  for (size_t i = 0; i < terms.size(); ++i) {
    numerator += static_cast<long double>(terms[i].bound) * static_cast<long double>(z[i]);
    denominator += static_cast<long double>(z[i]);
  }
  return denominator > 0.0L ? numerator / denominator : 0.0L;
}

// The maximum is at a corner of the box.
long double LargestOverCorners(const std::vector<BoundedWeight>& terms, double base) {
  long double largest = 0.0L;
  for (uint32_t corner = 0; corner < uint32_t{1} << terms.size(); ++corner) {
    std::vector<double> z;
    for (size_t i = 0; i < terms.size(); ++i) {
      z.push_back((corner >> i & 1) != 0 ? terms[i].upper : terms[i].lower);
    }
    largest = std::max(largest, ShareOf(terms, base, z));
  }
  return largest;
}

// The same for many terms: the upper ends belong to the largest bounds.
long double LargestOverThresholds(std::vector<BoundedWeight> terms, double base) {
  std::sort(terms.begin(), terms.end(),
            [](const BoundedWeight& a, const BoundedWeight& b) { return a.bound > b.bound; });
  long double numerator = 0.0L;
  auto denominator = static_cast<long double>(base);
  for (const BoundedWeight& term : terms) {
    numerator += static_cast<long double>(term.bound) * static_cast<long double>(term.lower);
    denominator += static_cast<long double>(term.lower);
  }
  long double largest = denominator > 0.0L ? numerator / denominator : 0.0L;
  for (const BoundedWeight& term : terms) {
    const long double more =
        static_cast<long double>(term.upper) - static_cast<long double>(term.lower);
    numerator += static_cast<long double>(term.bound) * more;
    denominator += more;
    if (denominator > 0.0L) largest = std::max(largest, numerator / denominator);
  }
  return largest;
}

std::vector<BoundedWeight> RandomTerms(std::mt19937_64* random, size_t count) {
  std::uniform_real_distribution<double> uniform;
  const double spread = 20.0 * uniform(*random);
  std::vector<BoundedWeight> terms;
  for (size_t i = 0; i < count; ++i) {
    const double upper = (*random)() % 8 == 0 ? 0.0 : std::exp(spread * (uniform(*random) - 0.5));
    const double lower = (*random)() % 4 == 0 ? upper : upper * uniform(*random);
    const double bound = (*random)() % 8 == 0 ? 1.0 : std::exp(3.0 * uniform(*random)) - 1.0;
    terms.push_back({bound, lower, upper});
  }
  return terms;
}

TEST(LargestShareTest, NeverBelowTheBestCornerAndTight) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform;
  for (int i = 0; i < 5000; ++i) {
    const std::vector<BoundedWeight> terms = RandomTerms(&random, random() % 9);
    const double base = random() % 4 == 0 ? 0.0 : std::exp(10.0 * (uniform(random) - 0.5));
    long double exact = LargestOverCorners(terms, base);
    // A weighted mean of the bounds is at most the largest; rounding may have put it above.
    double bound_max = 0.0;
    for (const BoundedWeight& term : terms) {
      if (term.upper > 0.0) bound_max = std::max(bound_max, term.bound);
    }
    exact = std::min(exact, static_cast<long double>(bound_max));
    const double bound = LargestShareOf(terms, base);
    ASSERT_GE(static_cast<long double>(bound), exact);
    // With nothing known to be positive, the supremum is not a maximum.
    double least = base;
    for (const BoundedWeight& term : terms) least += term.lower;
    if (least > 0.0) {
      ASSERT_LE(static_cast<long double>(bound), exact * (1.0L + 1e-12L) + 1e-300L);
    }
  }
}

TEST(LargestShareTest, ManyTerms) {
  std::mt19937_64 random(2);
  for (const size_t count : {100u, 10000u, 200000u}) {
    for (const double base : {0.0, 1.0, 1e6}) {
      const std::vector<BoundedWeight> terms = RandomTerms(&random, count);
      const long double exact = LargestOverThresholds(terms, base);
      const double bound = LargestShareOf(terms, base);
      // The reference sums in extended precision: 2^-64 for each term.
      EXPECT_GE(static_cast<long double>(bound),
                exact * (1.0L - static_cast<long double>(count) * 0x1p-63L));
      EXPECT_LE(static_cast<long double>(bound), exact * (1.0L + 1e-8L));
    }
  }
}

// Every small term is lost when it is added to the large one.
TEST(LargestShareTest, LostTermsAreMadeUpFor) {
  std::vector<BoundedWeight> terms(5000, BoundedWeight{1.0, 0.0, 1.0});
  terms[0] = {1.0, 0x1p53, 0x1p53};
  const long double sum = 0x1p53L + 4999.0L;
  EXPECT_GE(static_cast<long double>(LargestShareOf(terms, 0x1p53)), sum / (sum + 0x1p53L));
}

TEST(LargestShareTest, Ends) {
  EXPECT_EQ(LargestShareOf({}, 1.0), 0.0);
  EXPECT_EQ(LargestShareOf({}, 0.0), 0.0);
  EXPECT_EQ(LargestShareOf({{3.0, 0.0, 0.0}}, 0.0), 0.0);
  EXPECT_EQ(LargestShareOf({{3.0, 0.0, 5.0}}, 0.0), 3.0);
  EXPECT_EQ(LargestShareOf({{3.0, 1.0, kInfinity}, {1.0, 1.0, 1.0}}, 1.0), 3.0);
  EXPECT_EQ(LargestShareOf({{kInfinity, 1.0, 2.0}}, 1.0), kInfinity);
  EXPECT_EQ(LargestShareOf({{kNan, 1.0, 2.0}}, 1.0), kInfinity);
  EXPECT_EQ(LargestShareOf({{1.0, kNan, 2.0}}, 1.0), kInfinity);
  EXPECT_EQ(LargestShareOf({{1.0, 1.0, kNan}}, 1.0), kInfinity);
  EXPECT_EQ(LargestShareOf({{1.0, 1.0, 2.0}}, kNan), kInfinity);
  // b U / (Z_S + U).
  EXPECT_NEAR(DroppedOutputError({{2.0, 0.0, 1.0}}, WeightLower{3.0}), 0.5, 1e-14);
  EXPECT_GE(DroppedOutputError({{2.0, 0.0, 1.0}}, WeightLower{3.0}), 0.5);
}

// ---- The radius of a mean -----------------------------------------------------------------------

long double VectorCapital(long double length, long double squares) {
  const std::array<std::pair<long double, long double>, 5> mixture{
      {{0.93L, 0.25L}, {0.80L, 0.30L}, {0.62L, 0.25L}, {0.40L, 0.15L}, {0.20L, 0.05L}}};
  long double sum = 0.0L;
  for (const auto& [l, share] : mixture) {
    sum += share * std::cosh(l * length) * std::exp((std::log1p(-l) + l) * squares);
  }
  return sum;
}

TEST(VectorMeanRadiusTest, IsTheUpperEndOfTheFormulaAndTight) {
  std::mt19937_64 random(3);
  std::uniform_real_distribution<double> uniform;
  for (int i = 0; i < 2000; ++i) {
    VectorMeanRadius radius;
    long double squares = 0.0L;
    const double ceiling = std::pow(uniform(random), 3.0);
    const auto count = static_cast<uint32_t>(1 + random() % 1024);
    for (uint32_t j = 0; j < count; ++j) {
      const double square = ceiling * uniform(random);
      radius.Add(square);
      squares += static_cast<long double>(square);
    }
    const double eta = std::pow(10.0, -1.0 - 9.0 * uniform(random));
    const auto r = static_cast<long double>(radius.Radius(eta));
    ASSERT_GE(VectorCapital(r * count, squares), 1.0L / eta);
    ASSERT_LT(VectorCapital(r * count * (1.0L - 1e-5L), squares), 1.0L / eta);
  }
}

TEST(VectorMeanRadiusTest, Ends) {
  VectorMeanRadius radius;
  EXPECT_EQ(radius.Radius(0.05), kInfinity);
  radius.Add(0.0);
  const double without = radius.Radius(0.05);
  VectorMeanRadius worst;
  worst.Add(kNan);
  VectorMeanRadius large;
  large.Add(7.0);
  EXPECT_GT(worst.Radius(0.05), without);
  EXPECT_EQ(worst.Radius(0.05), large.Radius(0.05));
  EXPECT_EQ(worst.count(), 1u);
}

// A distribution over the unit ball, with its mean.
struct Ball {
  std::string name;
  uint32_t dim;
  std::vector<std::vector<double>> points;  // Drawn with these probabilities.
  std::vector<double> probabilities;
};

std::vector<Ball> Balls() {
  std::vector<Ball> balls;
  balls.push_back({"signs", 1, {{1.0}, {-1.0}}, {0.5, 0.5}});
  balls.push_back({"always the same", 2, {{0.6, -0.8}}, {1.0}});
  for (const double rare : {0.01, 0.03, 0.05, 0.1, 0.2}) {
    const std::string name = "rare " + std::to_string(rare);
    balls.push_back({name, 1, {{1.0}, {0.0}}, {rare, 1.0 - rare}});
    balls.push_back({name + " against the rest", 1, {{1.0}, {-0.2}}, {rare, 1.0 - rare}});
    balls.push_back({name + " across", 2, {{1.0, 0.0}, {0.0, 0.3}}, {rare, 1.0 - rare}});
  }
  Ball axes{"all axes", 16, {}, {}};
  for (uint32_t c = 0; c < 16; ++c) {
    std::vector<double> point(16, 0.0);
    point[c] = c % 2 == 0 ? 1.0 : -1.0;
    axes.points.push_back(point);
    axes.probabilities.push_back(1.0 / 16);
  }
  balls.push_back(axes);
  return balls;
}

// How often a look after every 32 of 128 draws finds the mean further away than the radius. With
// `squares` false the sum of squares is left out of the bound, which is wrong.
Misses CountMisses(const Ball& ball, uint32_t trials, bool squares) {
  std::mt19937_64 random(61);
  std::discrete_distribution<size_t> pick(ball.probabilities.begin(), ball.probabilities.end());
  std::vector<double> mean(ball.dim, 0.0);
  for (size_t i = 0; i < ball.points.size(); ++i) {
    for (uint32_t c = 0; c < ball.dim; ++c) mean[c] += ball.probabilities[i] * ball.points[i][c];
  }
  Misses misses{};
  for (uint32_t trial = 0; trial < trials; ++trial) {
    VectorMeanRadius radius;
    std::vector<double> sum(ball.dim, 0.0);
    std::array<bool, kEtas.size()> missed{};
    for (uint32_t draw = 1; draw <= 128; ++draw) {
      const std::vector<double>& point = ball.points[pick(random)];
      double square = 0.0;
      for (uint32_t c = 0; c < ball.dim; ++c) {
        sum[c] += point[c];
        square += point[c] * point[c];
      }
      radius.Add(squares ? std::min(1.0, square * (1.0 + 1e-12)) : 0.0);
      if (draw % 32 != 0) continue;
      double miss = 0.0;
      for (uint32_t c = 0; c < ball.dim; ++c) {
        const double difference = sum[c] / draw - mean[c];
        miss += difference * difference;
      }
      for (size_t e = 0; e < kEtas.size(); ++e) {
        missed[e] = missed[e] || std::sqrt(miss) * (1.0 - 1e-9) > radius.Radius(kEtas[e]);
      }
    }
    for (size_t e = 0; e < kEtas.size(); ++e) misses[e] += missed[e] ? 1 : 0;
  }
  return misses;
}

// Seed 61, 4,000 trials for each distribution; accepted: at most 269, 73 and 17 misses at eta .05,
// .01 and .001 (MissesAllowed).
TEST(VectorMeanRadiusTest, Covers) {
  constexpr uint32_t kTrials = 4000;
  for (const Ball& ball : Balls()) {
    const Misses misses = CountMisses(ball, kTrials, true);
    std::printf("  %-34s %.5f at .05  %.5f at .01\n", ball.name.c_str(),
                misses[0] / static_cast<double>(kTrials), misses[1] / static_cast<double>(kTrials));
    for (size_t e = 0; e < kEtas.size(); ++e) {
      EXPECT_LE(misses[e], MissesAllowed(kTrials, kEtas[e])) << ball.name << " " << kEtas[e];
    }
  }
}

TEST(VectorMeanRadiusTest, LeavingOutTheSquaresIsCaught) {
  constexpr uint32_t kTrials = 1000;
  const Misses misses = CountMisses(Balls()[0], kTrials, false);
  for (size_t e = 0; e < kEtas.size(); ++e) EXPECT_GT(misses[e], MissesAllowed(kTrials, kEtas[e]));
}

// ---- Compensation -------------------------------------------------------------------------------

TEST(ProposalScaleTest, CoversTheBoundOfEveryToken) {
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> uniform;
  for (int i = 0; i < 100000; ++i) {
    const double largest = std::exp(10.0 * (uniform(random) - 0.5));
    const double bound = largest * (random() % 10 == 0 ? 1.0 : uniform(random));
    const uint32_t scale = ProposalScale(bound, largest);
    ASSERT_GE(scale, kProposalScaleMin);
    ASSERT_LE(scale, kProposalScaleMax);
    ASSERT_GE(static_cast<long double>(scale) * static_cast<long double>(largest),
              256.0L * static_cast<long double>(bound));
  }
  EXPECT_EQ(ProposalScale(0.0, 1.0), kProposalScaleMin);
  EXPECT_EQ(ProposalScale(0.5, 1.0), 129u);  // Rounded up once more than needed.
}

// One head: a kept output and dropped tokens.
struct Head {
  std::string name;
  uint32_t dim;
  std::vector<float> center;               // o_S
  std::vector<uint32_t> weights;           // W
  std::vector<double> exact;               // e^s <= W
  std::vector<std::vector<float>> values;  // [token][dim]
  double kept;                             // Z_S
  double lower_share;                      // L = lower_share * exact, U = W.
};

// What the compensation of a head needs besides the head itself.
struct Prepared {
  explicit Prepared(const Head& head) {
    double center = 0.0;
    for (const float x : head.center) center += static_cast<double>(x) * static_cast<double>(x);
    for (size_t i = 0; i < head.weights.size(); ++i) {
      double norm = 0.0;
      for (const float x : head.values[i]) norm += static_cast<double>(x) * static_cast<double>(x);
      bounds.push_back((std::sqrt(norm) + std::sqrt(center)) * (1.0 + 1e-12));
    }
    proposals.value_bound = *std::max_element(bounds.begin(), bounds.end());
    proposals.scale_min = kProposalScaleMax;
    const size_t pages = (head.weights.size() + 63) / 64;
    scaled.resize(64 * pages, 0);
    std::vector<uint64_t> page_sums(pages, 0);
    truth.assign(head.dim, 0.0L);
    for (size_t i = 0; i < head.weights.size(); ++i) {
      const uint32_t scale = ProposalScale(bounds[i], proposals.value_bound);
      proposals.scale_min = std::min(proposals.scale_min, scale);
      scaled[i] = static_cast<uint64_t>(head.weights[i]) * scale;
      page_sums[i / 64] += scaled[i];
      dropped += static_cast<long double>(head.exact[i]);
      masses.dropped_lower.value += head.lower_share * head.exact[i];
      masses.dropped_upper.value += static_cast<double>(head.weights[i]);
      terms.push_back(
          {bounds[i], head.lower_share * head.exact[i], static_cast<double>(head.weights[i])});
      for (uint32_t c = 0; c < head.dim; ++c) {
        truth[c] +=
            static_cast<long double>(head.exact[i]) * (static_cast<long double>(head.values[i][c]) -
                                                       static_cast<long double>(head.center[c]));
      }
    }
    // o_dense - o_S
    for (long double& x : truth) x /= static_cast<long double>(head.kept) + dropped;
    masses.dropped_lower.value *= 1.0 - 1e-12;
    masses.kept_lower.value = masses.kept = masses.kept_upper.value = head.kept;
    sums.Assign(page_sums);
    proposals.sum = sums.total();
  }

  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  CompensatedMasses masses{{}, 0.0, {}, {}, {0.0}};
  Proposals proposals;
  PageSums sums;
  std::vector<double> bounds;
  std::vector<uint64_t> scaled;  // T, padded to whole pages.
  std::vector<BoundedWeight> terms;
  std::vector<long double> truth;
  long double dropped = 0.0L;
};

// ||o_dense - o|| of a correction.
double ErrorOf(const Prepared& prepared, const std::vector<double>& correction) {
  long double squares = 0.0L;
  for (size_t c = 0; c < correction.size(); ++c) {
    const long double difference = prepared.truth[c] - static_cast<long double>(correction[c]);
    squares += difference * difference;
  }
  return static_cast<double>(std::sqrt(squares));
}

void Draw(const Head& head, const Prepared& prepared, uint32_t trial, uint32_t draws_max,
          const float* center, Compensation* compensation) {
  WeightedDraws draws;
  const DrawStream stream{0, 0, trial, 0, DrawPurpose::kOutput};
  draws.Begin(prepared.sums, KeyedBits(TestKey(71), stream), draws_max);
  compensation->Begin(head.dim, prepared.proposals, draws_max);
  const auto page = [&](uint32_t index) {
    return absl::MakeConstSpan(prepared.scaled).subspan(size_t{index} * 64, 64);
  };
  for (uint32_t i = 0; i < draws_max; ++i) {
    const WeightedDraws::Token token = draws.Next(page);
    const size_t at = size_t{token.page} * 64 + token.token;
    const double e = head.exact[at];
    compensation->Add(token.weight, {e, e, e}, head.values[at].data(), center);
  }
}

Head RandomHead(std::string name, uint32_t dim, uint32_t tokens, double slack, double kept_share) {
  std::mt19937_64 random(81);
  std::normal_distribution<double> normal;
  Head head{std::move(name), dim, {}, {}, {}, {}, 0.0, std::exp(-slack)};
  for (uint32_t c = 0; c < dim; ++c)
    head.center.push_back(static_cast<float>(0.3 * normal(random)));
  double dropped = 0.0;
  for (uint32_t i = 0; i < tokens; ++i) {
    const double upper = std::exp(20.0 - 2.0 * std::fabs(normal(random)));
    head.weights.push_back(static_cast<uint32_t>(std::ceil(upper)));
    const double error = std::clamp(0.3 * normal(random), -1.0, 1.0);
    head.exact.push_back(upper * std::exp(slack * (error - 1.0)));
    dropped += head.exact.back();
    const double size = std::exp(0.4 * normal(random));
    head.values.emplace_back();
    for (uint32_t c = 0; c < dim; ++c) {
      head.values.back().push_back(static_cast<float>(size * (normal(random) + (c == 0 ? 1 : 0))));
    }
  }
  head.kept = dropped * kept_share / (1.0 - kept_share);
  return head;
}

// `ones` of the tokens are at their bound and point the other way, the rest weigh `rest` of it.
Head HiddenHead(uint32_t ones, double rest, double kept_share) {
  Head head{"hidden " + std::to_string(ones) + ", rest " + std::to_string(rest),
            2,
            {0.0F, 0.1F},
            {},
            {},
            {},
            0.0,
            0.0};
  double dropped = 0.0;
  for (uint32_t i = 0; i < 1024; ++i) {
    const bool one = i < ones;
    head.weights.push_back(1000);
    head.exact.push_back(one ? 1000.0 : 1000.0 * rest);
    head.values.push_back(one ? std::vector<float>{1.0F, 0.1F} : std::vector<float>{-1.0F, 0.1F});
    dropped += head.exact.back();
  }
  head.kept = dropped * kept_share / (1.0 - kept_share);
  return head;
}

std::vector<Head> Heads() {
  std::vector<Head> heads;
  heads.push_back(RandomHead("like a trace, slack .85", 16, 1000, 0.85, 0.7));
  heads.push_back(RandomHead("like a trace, slack 1.57", 64, 1000, 1.57, 0.4));
  heads.push_back(RandomHead("one channel", 1, 300, 0.5, 0.9));
  heads.push_back(RandomHead("nothing kept", 4, 300, 0.5, 0.0));
  for (const uint32_t ones : {5u, 15u, 30u, 45u, 60u, 100u}) {
    for (const double rest : {0.0, 0.2}) heads.push_back(HiddenHead(ones, rest, 0.3));
  }
  return heads;
}

Misses CountMisses(const Head& head, uint32_t trials, bool right_center) {
  const Prepared prepared(head);
  Compensation compensation;
  std::vector<double> correction(head.dim);
  const std::vector<float> origin(head.dim, 0.0F);
  Misses misses{};
  for (uint32_t trial = 0; trial < trials; ++trial) {
    Draw(head, prepared, trial, 128, right_center ? head.center.data() : origin.data(),
         &compensation);
    for (size_t e = 0; e < kEtas.size(); ++e) {
      const CompensationResult result =
          compensation.Finish(prepared.masses, kEtas[e], correction.data());
      const bool missed =
          ErrorOf(prepared, correction) * (1.0 - 1e-12) > result.error_upper ||
          static_cast<long double>(result.dropped_upper.value) <
              prepared.dropped * (1.0L - 1e-12L) ||
          static_cast<long double>(result.dropped_lower.value) > prepared.dropped * (1.0L + 1e-12L);
      misses[e] += missed ? 1 : 0;
    }
  }
  return misses;
}

// Seed 71, 1,000 trials for each head; a miss of the error or of either end of the dropped mass
// counts; accepted: at most 86, 28 and 9 misses at eta .05, .01 and .001 (MissesAllowed).
TEST(CompensationTest, Covers) {
  constexpr uint32_t kTrials = 1000;
  for (const Head& head : Heads()) {
    const Misses misses = CountMisses(head, kTrials, true);
    std::printf("  %-34s %.5f at .05  %.5f at .01\n", head.name.c_str(),
                misses[0] / static_cast<double>(kTrials), misses[1] / static_cast<double>(kTrials));
    for (size_t e = 0; e < kEtas.size(); ++e) {
      EXPECT_LE(misses[e], MissesAllowed(kTrials, kEtas[e])) << head.name << " " << kEtas[e];
    }
  }
}

// Values taken relative to the origin instead of o_S: the estimate is of another vector.
TEST(CompensationTest, TheWrongCenterIsCaught) {
  constexpr uint32_t kTrials = 200;
  Head head = RandomHead("wrong center", 16, 1000, 0.85, 0.3);
  for (float& x : head.center) x = 1.0F;
  const Misses misses = CountMisses(head, kTrials, false);
  for (size_t e = 0; e < kEtas.size(); ++e) EXPECT_GT(misses[e], MissesAllowed(kTrials, kEtas[e]));
}

// Compensation moves the output towards the truth, and its bound is far below the one without
// samples.
TEST(CompensationTest, CorrectsAndTightens) {
  for (const Head& head : Heads()) {
    if (head.name.rfind("like", 0) != 0) continue;
    const Prepared prepared(head);
    std::vector<double> correction(head.dim);
    const double before = ErrorOf(prepared, std::vector<double>(head.dim, 0.0));
    const double without = DroppedOutputError(prepared.terms, WeightLower{head.kept});
    double previous = without;
    Compensation compensation;
    for (const uint32_t draws : {128u, 512u, 2048u}) {
      Draw(head, prepared, 0, draws, head.center.data(), &compensation);
      const CompensationResult result =
          compensation.Finish(prepared.masses, 1e-6, correction.data());
      const double after = ErrorOf(prepared, correction);
      std::printf("  %s, %4u draws: error %.4f -> %.4f, bound %.4f, without samples %.4f\n",
                  head.name.c_str(), draws, before, after, result.error_upper, without);
      EXPECT_LT(after, before);
      EXPECT_LE(after, result.error_upper);
      EXPECT_LT(result.error_upper, 0.7 * previous);
      previous = result.error_upper;
      // Z^ is within the range it comes with, and the range within the one that was given.
      EXPECT_GE(result.dropped, result.dropped_lower.value);
      EXPECT_LE(result.dropped, result.dropped_upper.value);
      EXPECT_LE(result.dropped_upper.value, prepared.masses.dropped_upper.value);
      EXPECT_GE(result.dropped_lower.value, prepared.masses.dropped_lower.value);
    }
  }
}

TEST(CompensationTest, WiderKnowledgeMakesALargerBound) {
  const Head head = RandomHead("wider", 8, 500, 0.85, 0.6);
  const Prepared prepared(head);
  std::vector<double> correction(head.dim);
  Compensation compensation;
  Draw(head, prepared, 3, 256, head.center.data(), &compensation);
  const double base = compensation.Finish(prepared.masses, 1e-6, correction.data()).error_upper;
  EXPECT_GT(compensation.Finish(prepared.masses, 1e-9, correction.data()).error_upper, base);
  CompensatedMasses wide = prepared.masses;
  wide.kept_lower.value *= 0.9;
  EXPECT_GT(compensation.Finish(wide, 1e-6, correction.data()).error_upper, base);
  wide = prepared.masses;
  wide.kept_upper.value *= 1e6;
  EXPECT_GE(compensation.Finish(wide, 1e-6, correction.data()).error_upper, base);
  wide.kept_upper.value = kInfinity;
  EXPECT_LT(compensation.Finish(wide, 1e-6, correction.data()).error_upper, kInfinity);
}

// What is known of the masses enters by the formula: with t the lower end of Z_S + Z_D,
// error * t = rN + ||o - o_S|| (t^ - t).
TEST(CompensationTest, UnknownMassCostsWhatTheOutputMoved) {
  const Head head = RandomHead("masses", 8, 500, 0.85, 0.6);
  const Prepared prepared(head);
  std::vector<double> correction(head.dim);
  Compensation compensation;
  Draw(head, prepared, 3, 256, head.center.data(), &compensation);
  std::array<double, 2> total{};
  std::array<double, 2> scaled_error{};
  for (size_t i = 0; i < 2; ++i) {
    CompensatedMasses masses = prepared.masses;
    masses.kept_lower.value *= i == 0 ? 0.5 : 0.25;
    const CompensationResult result = compensation.Finish(masses, 1e-6, correction.data());
    total[i] = masses.kept_lower.value + result.dropped_lower.value;
    scaled_error[i] = result.error_upper * total[i];
  }
  double moved = 0.0;
  for (const double x : correction) moved += x * x;
  EXPECT_NEAR((scaled_error[1] - scaled_error[0]) / (std::sqrt(moved) * (total[0] - total[1])), 1.0,
              1e-6);
}

// Drawn weights that are known to 2 %, but no better known sums: rN grows by what the mean of the
// vectors may be off.
TEST(CompensationTest, VagueWeightsWidenTheRadius) {
  const Head head = RandomHead("vague", 8, 500, 0.85, 0.6);
  const Prepared prepared(head);
  std::vector<double> correction(head.dim);
  Compensation vague;
  vague.Begin(head.dim, prepared.proposals, 256);
  Compensation exact;
  exact.Begin(head.dim, prepared.proposals, 256);
  double change = 0.0;
  for (size_t i = 0; i < 256; ++i) {
    const double e = head.exact[i];
    const float* value = head.values[i].data();
    vague.Add(prepared.scaled[i], {0.98 * e, e, e}, value, head.center.data());
    exact.Add(prepared.scaled[i], {e, e, e}, value, head.center.data());
    double distance = 0.0;
    for (uint32_t c = 0; c < head.dim; ++c) {
      distance += std::pow(static_cast<double>(value[c] - head.center[c]), 2.0);
    }
    change += 0.02 * e * std::sqrt(distance) / static_cast<double>(prepared.scaled[i]) / 256;
  }
  change *= static_cast<double>(prepared.proposals.sum);
  CompensatedMasses masses = prepared.masses;
  masses.dropped_lower.value = masses.dropped_upper.value = static_cast<double>(prepared.dropped);
  const double total = head.kept + masses.dropped_upper.value;
  const double vague_error = vague.Finish(masses, 1e-6, correction.data()).error_upper;
  const double exact_error = exact.Finish(masses, 1e-6, correction.data()).error_upper;
  EXPECT_NEAR((vague_error - exact_error) * total / change, 1.0, 1e-6);
}

TEST(CompensationTest, NothingKnown) {
  const Head head = RandomHead("nothing", 8, 100, 0.85, 0.6);
  const Prepared prepared(head);
  std::vector<double> correction(head.dim, 5.0);
  Compensation compensation;
  compensation.Begin(head.dim, prepared.proposals, 4);
  const CompensationResult none = compensation.Finish(prepared.masses, 1e-6, correction.data());
  EXPECT_EQ(none.error_upper, kInfinity);
  EXPECT_EQ(none.dropped_upper.value, prepared.masses.dropped_upper.value);
  EXPECT_EQ(correction, std::vector<double>(head.dim, 0.0));
  compensation.Add(prepared.scaled[0], {kNan, kNan, kNan}, head.values[0].data(),
                   head.center.data());
  EXPECT_EQ(compensation.Finish(prepared.masses, 1e-6, correction.data()).error_upper, kInfinity);
}

// ---- Merging ------------------------------------------------------------------------------------

// Parts whose true masses and outputs are known: an output of two channels, an error of exactly
// `error` in a random direction.
struct Shard {
  double log_lower, log_mass, log_upper, log_true;
  std::array<long double, 2> true_output;
  std::array<double, 2> output;
  double error;
};

Shard RandomShard(std::mt19937_64* random, int kind) {
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  Shard shard;
  shard.log_mass = 300.0 + 3.0 * uniform(*random);
  const double width = kind == 0 ? 0.0 : 2.0 * std::fabs(uniform(*random));
  shard.log_lower = shard.log_mass - width;
  shard.log_upper = shard.log_mass + width * std::fabs(uniform(*random));
  // At an end of the range more often than not.
  const uint64_t end = (*random)() % 3;
  shard.log_true = end == 0   ? shard.log_lower
                   : end == 1 ? shard.log_upper
                              : 0.5 * (shard.log_lower + shard.log_upper);
  shard.error = (*random)() % 3 == 0 ? 0.0 : std::fabs(uniform(*random));
  const double angle = 3.2 * uniform(*random);
  shard.output = {uniform(*random), uniform(*random)};
  const long double shrink = 1.0L - 1e-12L;
  shard.true_output = {
      static_cast<long double>(shard.output[0]) + shrink * shard.error * std::cos(angle),
      static_cast<long double>(shard.output[1]) + shrink * shard.error * std::sin(angle)};
  return shard;
}

TEST(MergedOutputErrorTest, CoversAnyTrueMassesAndOutputs) {
  std::mt19937_64 random(91);
  double tightest = kInfinity;
  for (int i = 0; i < 50000; ++i) {
    std::vector<Shard> shards;
    for (uint64_t j = 2 + random() % 4; j > 0; --j) shards.push_back(RandomShard(&random, i % 2));
    std::array<long double, 2> truth{};
    std::array<long double, 2> merged{};
    long double true_sum = 0.0L;
    long double sum = 0.0L;
    for (const Shard& shard : shards) {
      const long double true_mass = std::exp(static_cast<long double>(shard.log_true) - 300.0L);
      const long double mass = std::exp(static_cast<long double>(shard.log_mass) - 300.0L);
      true_sum += true_mass;
      sum += mass;
      for (int c = 0; c < 2; ++c) {
        truth[c] += true_mass * shard.true_output[c];
        merged[c] += mass * static_cast<long double>(shard.output[c]);
      }
    }
    std::vector<OutputPart> parts;
    for (const Shard& shard : shards) {
      const long double distance =
          std::hypot(static_cast<long double>(shard.output[0]) - merged[0] / sum,
                     static_cast<long double>(shard.output[1]) - merged[1] / sum);
      parts.push_back({{shard.log_lower},
                       shard.log_mass,
                       {shard.log_upper},
                       shard.error,
                       NextUp(static_cast<double>(distance))});
    }
    const long double error =
        std::hypot(truth[0] / true_sum - merged[0] / sum, truth[1] / true_sum - merged[1] / sum);
    const double bound = MergedOutputError(parts);
    ASSERT_GE(static_cast<long double>(bound), error);
    if (error > 0.0L) tightest = std::min(tightest, static_cast<double>(bound / error));
  }
  EXPECT_LT(tightest, 1.001);
}

TEST(MergedOutputErrorTest, ExactMassesGiveTheWeightedMean) {
  const double ln3 = std::log(3.0);
  const std::vector<OutputPart> parts{{{0.0}, 0.0, {0.0}, 0.5, 1.0}, {{ln3}, ln3, {ln3}, 0.1, 2.0}};
  EXPECT_NEAR(MergedOutputError(parts), 0.25 * 0.5 + 0.75 * 0.1, 1e-12);
  EXPECT_GE(MergedOutputError(parts), 0.25 * 0.5 + 0.75 * 0.1);
}

TEST(MergedOutputErrorTest, Ends) {
  EXPECT_EQ(MergedOutputError({}), 0.0);
  EXPECT_GE(MergedOutputError({{{1.0}, 2.0, {4.0}, 0.25, 0.0}}), 0.25);
  // An empty part counts for nothing, whatever it says.
  const std::vector<OutputPart> with_empty{{{1.0}, 1.0, {1.0}, 0.25, 0.0},
                                           {{kLogZero}, kLogZero, {kLogZero}, 0.5, 9.0}};
  EXPECT_NEAR(MergedOutputError(with_empty), 0.25, 1e-10);
  std::vector<OutputPart> parts{{{1.0}, 1.0, {1.0}, 0.25, 0.0}, {{0.0}, 0.0, {0.0}, 0.5, 1.0}};
  const auto merged_with = [&](const OutputPart& part) {
    return MergedOutputError({parts[0], part});
  };
  EXPECT_EQ(merged_with({{0.0}, 0.0, {kInfinity}, 0.5, 1.0}), kInfinity);
  EXPECT_EQ(merged_with({{0.0}, kNan, {0.0}, 0.5, 1.0}), kInfinity);
  EXPECT_EQ(merged_with({{0.0}, 0.0, {kNan}, 0.5, 1.0}), kInfinity);
  EXPECT_EQ(merged_with({{kNan}, 0.0, {0.0}, 0.5, 1.0}), kInfinity);
  EXPECT_EQ(merged_with({{0.0}, 0.0, {0.0}, kNan, 1.0}), kInfinity);
  EXPECT_EQ(merged_with({{0.0}, 0.0, {0.0}, 0.5, kNan}), kInfinity);
  EXPECT_EQ(merged_with({{0.0}, 0.0, {0.0}, kInfinity, 1.0}), kInfinity);
}

}  // namespace
}  // namespace kvservice
