#include "attention/sampled_bound.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
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

using testing::HostilePopulations;
using testing::kEtas;
using testing::MissesAllowed;
using testing::Population;
using testing::TestKey;
using testing::TwoPoint;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint32_t kDraws = 128;

// One drawn token.
struct Drawn {
  uint64_t weight;
  double exact;
};

SampledBound BoundOf(uint64_t weight_sum, const std::vector<Drawn>& drawn) {
  SampledBound bound;
  bound.Begin(weight_sum, static_cast<uint32_t>(drawn.size()));
  for (const Drawn& token : drawn) bound.Add(token.weight, token.exact);
  return bound;
}

// A sample as random as real ones: weights over a wide range, w anywhere.
std::vector<Drawn> RandomDrawn(std::mt19937_64* random, size_t count, uint64_t* weight_sum) {
  std::uniform_real_distribution<double> uniform;
  std::vector<Drawn> drawn;
  *weight_sum = 0;
  const double ceiling = std::pow(uniform(*random), 0.2);
  for (size_t i = 0; i < count; ++i) {
    const uint64_t weight = 1 + ((*random)() & 0xFFFFFFF) % (uint64_t{1} << (*random)() % 28);
    drawn.push_back({weight, ceiling * uniform(*random) * static_cast<double>(weight)});
    *weight_sum += weight;
  }
  *weight_sum += (*random)() % (uint64_t{1} << (*random)() % 40);
  return drawn;
}

// ln C(z), straight from the formula.
long double LogCapitalByFormula(uint64_t weight_sum, const std::vector<Drawn>& drawn, double z) {
  const std::array<long double, 3> th{0.98L, 0.8L, 0.4L};
  const std::array<long double, 3> pi{0.80L, 0.15L, 0.05L};
  std::array<long double, 3> logs{};
  long double exact = 0.0L;                               // A_j
  auto remaining = static_cast<long double>(weight_sum);  // U_j
  for (const Drawn& token : drawn) {
    const auto weight = static_cast<long double>(token.weight);
    const long double w = std::min(1.0L, static_cast<long double>(token.exact) / weight);
    const long double mu = std::max(0.0L, (static_cast<long double>(z) - exact) / remaining);
    if (mu >= 1.0L) return std::numeric_limits<long double>::infinity();
    for (size_t t = 0; t < 3; ++t) {
      logs[t] += std::log(1.0L - th[t] + th[t] * (1.0L - w) / (1.0L - mu));
    }
    exact += std::min(static_cast<long double>(token.exact), weight);
    remaining -= weight;
  }
  // What was not drawn weighs at most its W.
  if (static_cast<long double>(z) >= exact + remaining) {
    return std::numeric_limits<long double>::infinity();
  }
  const long double top = *std::max_element(logs.begin(), logs.end());
  long double sum = 0.0L;
  for (size_t t = 0; t < 3; ++t) sum += pi[t] * std::exp(logs[t] - top);
  return top + std::log(sum);
}

// ---- The formula --------------------------------------------------------------------------------

TEST(SampledBoundTest, CertifiesWhatTheFormulaCertifies) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform;
  int certified = 0;
  int refused = 0;
  for (int i = 0; i < 2000; ++i) {
    uint64_t weight_sum = 0;
    const std::vector<Drawn> drawn = RandomDrawn(&random, 1 + random() % 600, &weight_sum);
    const SampledBound bound = BoundOf(weight_sum, drawn);
    const double eta = std::pow(10.0, -1.0 - 8.0 * uniform(random));
    const double z = bound.UpperBound(eta).value * (0.9 + 0.2 * uniform(random));
    const long double log_capital = LogCapitalByFormula(weight_sum, drawn, z);
    const long double target = -std::log(static_cast<long double>(eta));
    // Certified only if the exact C is large enough, and then unless it is so by 2e-6 only.
    if (bound.Certifies(z, eta)) {
      ASSERT_GE(log_capital, target);
      ++certified;
    } else {
      ASSERT_LE(log_capital, target + 2e-6L);
      ++refused;
    }
  }
  EXPECT_GT(certified, 300);
  EXPECT_GT(refused, 300);
}

// Products of factors far beyond the range of a double.
TEST(SampledBoundTest, NoOverflowNoUnderflow) {
  constexpr uint32_t kCount = 20000;
  const uint64_t sum = uint64_t{1} << 40;
  SampledBound ones;  // w = 1: no factor above 0.6.
  SampledBound zeros;
  ones.Begin(sum, kCount);
  zeros.Begin(sum, kCount);
  std::vector<Drawn> drawn;
  for (uint32_t i = 0; i < kCount; ++i) {
    ones.Add(1, 1.0);
    zeros.Add(1, 0.0);
    drawn.push_back({1, 0.0});
  }
  EXPECT_FALSE(ones.Certifies(0x1p39, 0.5));
  EXPECT_EQ(ones.UpperBound(0.5).value, 0x1p40);
  // A hair below the cap every factor is about 2^40 / 1.
  const double below = NextDown(0x1p40 - kCount);
  EXPECT_GT(LogCapitalByFormula(sum, drawn, below), 200000.0L);
  EXPECT_TRUE(zeros.Certifies(below, std::numeric_limits<double>::min()));
  EXPECT_LT(zeros.UpperBound(0.05).value, 0x1p40 * 2e-4);
}

// First factors whose product underflows, then ones that make up for it.
TEST(SampledBoundTest, FactorsMayCancelFarOutsideTheRange) {
  for (const uint32_t ones : {100u, 1000u, 10000u}) {
    std::vector<Drawn> drawn(ones, Drawn{1, 1.0});
    drawn.resize(10 * ones, Drawn{1, 0.0});
    const uint64_t sum = uint64_t{1} << 40;
    const double upper = BoundOf(sum, drawn).UpperBound(1e-6).value;
    EXPECT_GE(LogCapitalByFormula(sum, drawn, upper), std::log(1e6L));
    EXPECT_LT(LogCapitalByFormula(sum, drawn, upper * (1.0 - 1e-5)), std::log(1e6L));
  }
}

TEST(SampledBoundTest, EtaZeroCertifiesTheCapOnly) {
  const SampledBound bound = BoundOf(1000, {{100, 0.0}, {300, 100.0}});
  EXPECT_EQ(bound.DeterministicBound().value, 700.0);
  EXPECT_EQ(bound.UpperBound(0.0).value, 700.0);
  EXPECT_TRUE(bound.Certifies(700.0, 0.0));
  EXPECT_FALSE(bound.Certifies(NextDown(700.0), 0.0));
}

TEST(SampledBoundTest, NotANumberIsTheWorst) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const SampledBound bound = BoundOf(1000, {{100, nan}, {300, kInfinity}});
  EXPECT_EQ(bound.DeterministicBound().value, 1000.0);
  EXPECT_EQ(bound.UpperBound(0.05).value, 1000.0);
  EXPECT_FALSE(bound.Certifies(nan, 0.05));
}

TEST(SampledBoundTest, NothingDrawnAndNothingDropped) {
  EXPECT_EQ(BoundOf(12345, {}).UpperBound(0.05).value, 12345.0);
  EXPECT_EQ(BoundOf(0, {}).UpperBound(0.05).value, 0.0);
  EXPECT_TRUE(BoundOf(0, {}).Certifies(0.0, 1e-9));
}

// ---- Rounding -----------------------------------------------------------------------------------

// Exact weights are multiples of 2^-40, so their sums are integers of 128 bits. No tolerance.
TEST(SampledBoundTest, CapIsNeverBelowTheExactSum) {
  std::mt19937_64 random(2);
  int inexact = 0;
  for (int i = 0; i < 300; ++i) {
    std::vector<Drawn> drawn;
    std::vector<Uint128> units;
    uint64_t weight_sum = 0;
    for (uint32_t j = 0; j < 200; ++j) {
      const uint64_t weight = (uint64_t{1} << 40) + (random() >> 23);
      const uint64_t unit = random() >> 11;
      units.push_back(unit);
      drawn.push_back({weight, std::ldexp(static_cast<double>(unit), -40)});
      weight_sum += weight;
    }
    SampledBound bound;
    bound.Begin(weight_sum, 200);
    Uint128 exact = 0;
    uint64_t remaining = weight_sum;
    for (uint32_t j = 0; j < 200; ++j) {
      bound.Add(drawn[j].weight, drawn[j].exact);
      exact += units[j];
      remaining -= drawn[j].weight;
      const Uint128 cap_exact = exact + (static_cast<Uint128>(remaining) << 40);
      const double cap = std::ldexp(bound.DeterministicBound().value, 40);
      // floor(cap) >= exact if and only if cap >= exact, as exact is an integer.
      ASSERT_GE(static_cast<Uint128>(cap), cap_exact);
      inexact += static_cast<Uint128>(cap) > cap_exact ? 1 : 0;
    }
  }
  EXPECT_GT(inexact, 1000);
}

TEST(SampledBoundTest, TinyWeightsAreNotLostInTheSum) {
  std::vector<Drawn> drawn{{2, 1.0}};
  for (int i = 0; i < 1000; ++i) drawn.push_back({1, 0x1p-60});
  const SampledBound bound = BoundOf(1002, drawn);
  const long double exact = 1.0L + 1000.0L * 0x1p-60L;
  EXPECT_GE(static_cast<long double>(bound.DeterministicBound().value), exact);
  EXPECT_GE(static_cast<long double>(bound.UpperBound(0.5).value), exact);
}

TEST(SampledBoundTest, SumsAbove2To53RoundUp) {
  const uint64_t sum = (uint64_t{1} << 63) + 1;
  EXPECT_EQ(BoundOf(sum, {}).DeterministicBound().value, NextUp(0x1p63));
  EXPECT_EQ(BoundOf(std::numeric_limits<uint64_t>::max(), {}).DeterministicBound().value, 0x1p64);
  EXPECT_EQ(BoundOf(sum, {{1, 0.0}}).DeterministicBound().value, 0x1p63);
}

// ---- The search ---------------------------------------------------------------------------------

TEST(SampledBoundTest, UpperBoundIsTheUpperEndAndTight) {
  std::mt19937_64 random(3);
  int below_cap = 0;
  for (int i = 0; i < 3000; ++i) {
    uint64_t weight_sum = 0;
    const std::vector<Drawn> drawn = RandomDrawn(&random, 1 + random() % 1200, &weight_sum);
    const SampledBound sampled = BoundOf(weight_sum, drawn);
    const double eta = kEtas[random() % 3] * (random() % 2 == 0 ? 1.0 : 1e-6);
    const double upper = sampled.UpperBound(eta).value;
    ASSERT_LE(upper, sampled.DeterministicBound().value);
    ASSERT_LE(upper, DoubleUp(weight_sum));
    if (upper < sampled.DeterministicBound().value) {
      ASSERT_TRUE(sampled.Certifies(upper, eta));
      ++below_cap;
    }
    ASSERT_FALSE(sampled.Certifies(upper * (1.0 - 0x1p-19), eta));
  }
  EXPECT_GT(below_cap, 1000);
}

TEST(SampledBoundTest, Monotone) {
  std::mt19937_64 random(4);
  for (int i = 0; i < 300; ++i) {
    uint64_t weight_sum = 0;
    std::vector<Drawn> drawn = RandomDrawn(&random, 1 + random() % 300, &weight_sum);
    const SampledBound bound = BoundOf(weight_sum, drawn);
    // The search leaves one part in 2^20.
    const double room = 1.0 + 0x1p-19;
    double previous = 0.0;
    for (const double eta : {0.5, 0.05, 1e-2, 1e-3, 1e-6, 1e-9, 1e-30}) {
      const double upper = bound.UpperBound(eta).value;
      ASSERT_GE(upper * room, previous);
      previous = upper;
    }
    // A heavier token makes a larger bound, and more weight does.
    const double before = bound.UpperBound(1e-3).value;
    Drawn& token = drawn[random() % drawn.size()];
    token.exact = (token.exact + static_cast<double>(token.weight)) / 2;
    ASSERT_GE(BoundOf(weight_sum, drawn).UpperBound(1e-3).value * room, before);
    ASSERT_GE(BoundOf(weight_sum + 1 + random() % weight_sum, drawn).UpperBound(1e-3).value * room,
              before);
  }
}

// ---- Coverage -----------------------------------------------------------------------------------

using Misses = std::array<uint32_t, kEtas.size()>;

// How a trial draws, stops and feeds the bound.
struct Protocol {
  uint32_t draws = kDraws;
  uint32_t draws_per_look = kDrawsPerLook;
  bool replace = false;     // Draws with replacement, fed as if without: wrong.
  bool round_down = false;  // Exact weights rounded down to whole units: wrong.
};

// Over `trials` samples: how often some look certified a z below the exact sum.
Misses CountMisses(const Population& population, uint32_t trials, uint8_t seed,
                   const Protocol& protocol) {
  const auto page = [&](uint32_t index) { return population.Page(index); };
  const double below =
      static_cast<double>(population.exact_sum) * (1.0 - 1e-9) - std::numeric_limits<double>::min();
  Misses misses{};
  WeightedDraws draws;
  SampledBound bound;
  for (uint32_t trial = 0; trial < trials; ++trial) {
    const DrawStream stream{0, 0, trial};
    draws.Begin(population.sums, KeyedBits(TestKey(seed), stream), protocol.draws);
    bound.Begin(population.weight_sum(), protocol.draws);
    std::array<bool, kEtas.size()> missed{};
    bool more = true;
    while (more) {
      WeightedDraws::Token token;
      if (protocol.replace) {
        more = draws.drawn() < protocol.draws;
        if (more) token = draws.Next(page);
      } else {
        more = draws.NextDistinct(page, &token);
      }
      if (more) {
        const double exact = population.Exact(token);
        bound.Add(token.weight, protocol.round_down ? std::floor(exact) : exact);
      }
      if (more && draws.drawn() % protocol.draws_per_look != 0) continue;
      for (size_t e = 0; e < kEtas.size(); ++e) {
        missed[e] = missed[e] || bound.Certifies(below, kEtas[e]);
      }
    }
    for (size_t e = 0; e < kEtas.size(); ++e) misses[e] += missed[e] ? 1 : 0;
  }
  return misses;
}

void PrintMisses(const std::string& name, const Misses& misses, uint32_t trials) {
  std::printf("  %-44s", name.c_str());
  for (size_t e = 0; e < kEtas.size(); ++e) {
    std::printf("  %.5f at %g", static_cast<double>(misses[e]) / trials, kEtas[e]);
  }
  std::printf("\n");
}

void ExpectCovered(const Population& population, uint32_t trials, uint8_t seed,
                   const Protocol& protocol) {
  const Misses misses = CountMisses(population, trials, seed, protocol);
  PrintMisses(population.name, misses, trials);
  for (size_t e = 0; e < kEtas.size(); ++e) {
    EXPECT_LE(misses[e], MissesAllowed(trials, kEtas[e]))
        << population.name << ", eta " << kEtas[e];
  }
}

// Tails that are easy by hand, and the region that the tests below state.
TEST(AcceptanceRegionTest, IsExact) {
  EXPECT_EQ(MissesAllowed(10, 0.5), 10u);
  EXPECT_EQ(MissesAllowed(20, 0.5), 19u);  // P(X > 19) = 2^-20 < 1e-6 < P(X > 18) = 21 * 2^-20.
  EXPECT_EQ(MissesAllowed(4, 0.05), 4u);   // P(X > 3) = .05^4 = 6e-6.
  EXPECT_EQ(MissesAllowed(4, 0.03), 3u);   // .03^4 = 8e-7.
  EXPECT_EQ(MissesAllowed(10000, 0.05), 607u);
  EXPECT_EQ(MissesAllowed(10000, 1e-2), 151u);
  EXPECT_EQ(MissesAllowed(10000, 1e-3), 28u);
}

// Seed 11, 10,000 trials for each population, a look after every 32 draws; accepted: at most 607,
// 151 and 28 misses at eta .05, .01 and .001.
TEST(SampledBoundCoverageTest, HostilePopulations) {
  for (const Population& population : HostilePopulations(kDraws)) {
    ExpectCovered(population, 10000, 11, Protocol{});
  }
}

// Thirty-two looks instead of four: they are free.
TEST(SampledBoundCoverageTest, ManyLooks) {
  Protocol protocol;
  protocol.draws = 512;
  protocol.draws_per_look = 16;
  for (const Population& population : HostilePopulations(protocol.draws)) {
    ExpectCovered(population, 2000, 12, protocol);
  }
}

// The populations come close enough to eta that a bound which is wrong by much is seen: the largest
// miss rate of a right one is above half of eta.
TEST(SampledBoundCoverageTest, PopulationsAreHard) {
  Misses most{};
  for (const Population& population : HostilePopulations(kDraws)) {
    if (population.name.rfind("just too many", 0) != 0) continue;
    const Misses misses = CountMisses(population, 10000, 13, Protocol{});
    for (size_t e = 0; e < kEtas.size(); ++e) most[e] = std::max(most[e], misses[e]);
  }
  for (size_t e = 0; e < kEtas.size(); ++e) EXPECT_GT(most[e], kEtas[e] * 10000 / 2) << kEtas[e];
}

// ---- The same judge finds broken bounds ---------------------------------------------------------

void ExpectCaught(const Population& population, uint8_t seed, const Protocol& protocol) {
  constexpr uint32_t kTrials = 4000;
  const Misses misses = CountMisses(population, kTrials, seed, protocol);
  PrintMisses("broken: " + population.name, misses, kTrials);
  for (size_t e = 0; e < kEtas.size(); ++e) {
    EXPECT_GT(misses[e], MissesAllowed(kTrials, kEtas[e])) << kEtas[e];
  }
}

TEST(SampledBoundControlTest, ReplacementTreatedAsWithout) {
  Protocol protocol;
  protocol.replace = true;
  ExpectCaught(TwoPoint("repeated draws counted twice", 140, 100, 14, 0.0), 21, protocol);
}

TEST(SampledBoundControlTest, ExactWeightsRoundedDown) {
  Protocol protocol;
  protocol.round_down = true;
  ExpectCaught(TwoPoint("weights below one unit rounded to zero", 4096, 1, 0, 0.6), 22, protocol);
}

// Looking after every 32 draws with a bound made for a fixed number of draws: without replacement
// and with w in {0, 1} the lower tail of the binomial distribution is one.
TEST(SampledBoundControlTest, LooksThatAreNotPaidFor) {
  constexpr uint32_t kTrials = 5000;
  constexpr uint32_t kOnes = 512;
  constexpr double kEta = 0.05;
  const Population population = TwoPoint("fixed-sample bound", 8192, 100, kOnes, 0.0);
  const auto page = [&](uint32_t index) { return population.Page(index); };
  const double mean = static_cast<double>(kOnes) / 8192;
  const auto tail = [&](uint32_t draws, uint32_t hits) {  // P(Binomial(draws, mean) <= hits)
    double sum = 0.0;
    for (uint32_t k = 0; k <= hits; ++k) {
      sum +=
          std::exp(std::lgamma(draws + 1.0) - std::lgamma(k + 1.0) - std::lgamma(draws - k + 1.0) +
                   k * std::log(mean) + (draws - k) * std::log1p(-mean));
    }
    return sum;
  };
  uint32_t misses_at_end = 0;
  uint32_t misses_at_any_look = 0;
  WeightedDraws draws;
  for (uint32_t trial = 0; trial < kTrials; ++trial) {
    draws.Begin(population.sums, KeyedBits(TestKey(23), DrawStream{0, 0, trial}), 512);
    uint32_t hits = 0;
    bool missed = false;
    bool missed_now = false;
    WeightedDraws::Token token;
    while (draws.NextDistinct(page, &token)) {
      hits += population.Exact(token) > 0.0 ? 1 : 0;
      if (draws.drawn() % kDrawsPerLook != 0) continue;
      missed_now = tail(draws.drawn(), hits) <= kEta;
      missed = missed || missed_now;
    }
    misses_at_end += missed_now ? 1 : 0;
    misses_at_any_look += missed ? 1 : 0;
  }
  EXPECT_LE(misses_at_end, MissesAllowed(kTrials, kEta));
  EXPECT_GT(misses_at_any_look, MissesAllowed(kTrials, kEta));
}

// ---- Tightness ----------------------------------------------------------------------------------

// All w alike, many tokens: the least that any method could claim is that a share of
// 1 - eta^(1/m) of the weight was missed and has w = 1.
TEST(SampledBoundTest, WithinAFewPercentOfTheBestPossible) {
  for (const double eta : {1e-6, 1e-9}) {
    for (const uint32_t draws : {64u, 128u, 512u, 1024u}) {
      for (const double slack : {0.4, 0.85, 1.57, 2.3}) {
        const double w = std::exp(-slack);
        std::vector<Drawn> drawn(draws, Drawn{1000, 1000 * w});
        const uint64_t weight_sum = uint64_t{1000} << 32;
        const double mean =
            BoundOf(weight_sum, drawn).UpperBound(eta).value / static_cast<double>(weight_sum);
        const double best = 1.0 - (1.0 - w) * std::pow(eta, 1.0 / draws);
        const double formula = std::log1p(std::log(1.0 / eta) / draws * std::expm1(slack));
        std::printf(
            "  eta %g, %4u draws, slack %.2f: sampled %.4f, best possible %.4f, "
            "formula %.4f\n",
            eta, draws, slack, std::log(mean / w), std::log(best / w), formula);
        EXPECT_GE(mean, best * (1.0 - 1e-6));
        EXPECT_LE(mean - w, 1.05 * (best - w));
        EXPECT_LE(std::log(mean / w), 1.05 * formula);
      }
    }
  }
}

// ---- Means --------------------------------------------------------------------------------------

TEST(MeanBoundTest, CoversBernoulliAndMixedNumbers) {
  constexpr uint32_t kTrials = 10000;
  for (const double ones : {0.004, 0.02, 0.035, 0.05, 0.1, 0.5}) {
    for (const double rest : {0.0, 0.3}) {
      const double mean = ones + (1.0 - ones) * rest;
      std::mt19937_64 random(31);
      std::uniform_real_distribution<double> uniform;
      Misses misses{};
      for (uint32_t trial = 0; trial < kTrials; ++trial) {
        MeanBound bound;
        bound.Begin(kDraws);
        for (uint32_t i = 0; i < kDraws; ++i) bound.Add(uniform(random) < ones ? 1.0 : rest);
        // One search tells for all etas: bounds grow as eta falls.
        for (size_t e = 0; e < kEtas.size(); ++e) {
          if (bound.UpperBound(kEtas[e]) >= mean) break;
          ++misses[e];
        }
      }
      for (size_t e = 0; e < kEtas.size(); ++e) {
        EXPECT_LE(misses[e], MissesAllowed(kTrials, kEtas[e])) << ones << " " << rest;
      }
    }
  }
}

TEST(MeanBoundTest, Ends) {
  MeanBound bound;
  bound.Begin(2);
  EXPECT_EQ(bound.UpperBound(0.05), 1.0);
  bound.Add(std::numeric_limits<double>::quiet_NaN());
  bound.Add(2.0);
  EXPECT_EQ(bound.UpperBound(0.05), 1.0);
}

// ---- Units --------------------------------------------------------------------------------------

TEST(WeightUnitsTest, ConversionsRoundOutward) {
  std::mt19937_64 random(41);
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  const long double ln_units = 30.0L * std::log(2.0L);
  for (int i = 0; i < 20000; ++i) {
    const double ref = uniform(random) * std::pow(10.0, static_cast<double>(random() % 5));
    const double weight = std::exp(40.0 * uniform(random));
    const long double log =
        static_cast<long double>(ref) + std::log(static_cast<long double>(weight)) - ln_units;
    const LogMassUpper upper = LogMassOf(WeightUpper{weight}, ref);
    const LogMassLower lower = LogMassOf(WeightLower{weight}, ref);
    ASSERT_GT(static_cast<long double>(upper.value), log);
    ASSERT_LT(static_cast<long double>(lower.value), log);
    ASSERT_LT(upper.value - lower.value, 1e-14 * (std::fabs(ref) + 1e4));
    const long double back =
        std::exp(static_cast<long double>(upper.value) - static_cast<long double>(ref) + ln_units);
    ASSERT_GT(static_cast<long double>(WeightOf(upper, ref).value), back);
    ASSERT_LT(static_cast<long double>(WeightOf(LogMassLower{upper.value}, ref).value), back);
    ASSERT_LT(WeightOf(upper, ref).value, weight * (1.0 + 1e-10));
  }
}

// Results near zero, to which relative margins add nothing.
TEST(WeightUnitsTest, ConversionsRoundOutwardWhereTermsCancel) {
  std::mt19937_64 random(43);
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  const long double ln_units = 30.0L * std::log(2.0L);
  for (int i = 0; i < 20000; ++i) {
    const double ref = 600.0 * uniform(random);
    const double weight = std::exp(20.8 - ref + 1e-3 * uniform(random));
    const long double log =
        static_cast<long double>(ref) + std::log(static_cast<long double>(weight)) - ln_units;
    ASSERT_GT(static_cast<long double>(LogMassOf(WeightUpper{weight}, ref).value), log);
    ASSERT_LT(static_cast<long double>(LogMassOf(WeightLower{weight}, ref).value), log);
    const double small_ref = 30.0 * uniform(random);
    const double mass = small_ref - 20.8 + 1e-3 * uniform(random);
    const long double exact =
        std::exp(static_cast<long double>(mass) - static_cast<long double>(small_ref) + ln_units);
    ASSERT_GT(static_cast<long double>(WeightOf(LogMassUpper{mass}, small_ref).value), exact);
    ASSERT_LT(static_cast<long double>(WeightOf(LogMassLower{mass}, small_ref).value), exact);
  }
}

TEST(WeightUnitsTest, Ends) {
  EXPECT_EQ(LogMassOf(WeightUpper{0.0}, 3.0).value, kLogZero);
  EXPECT_EQ(LogMassOf(WeightUpper{}, 3.0).value, kInfinity);
  EXPECT_EQ(LogMassOf(WeightLower{0.0}, 3.0).value, kLogZero);
  EXPECT_EQ(WeightOf(LogMassUpper{}, 3.0).value, 0.0);
  EXPECT_EQ(WeightOf(LogMassUpper{kInfinity}, 3.0).value, kInfinity);
  EXPECT_EQ(WeightOf(LogMassUpper{std::nan("")}, 3.0).value, kInfinity);
  EXPECT_EQ(WeightOf(LogMassUpper{5000.0}, 3.0).value, kInfinity);
  EXPECT_GT(WeightOf(LogMassUpper{-5000.0}, 3.0).value, 0.0);
  EXPECT_EQ(WeightOf(LogMassLower{}, 3.0).value, 0.0);
  EXPECT_EQ(WeightOf(LogMassLower{5000.0}, 3.0).value, std::numeric_limits<double>::max());
  EXPECT_EQ(WeightOf(LogMassLower{-5000.0}, 3.0).value, 0.0);
  EXPECT_EQ(WeightOf(LogMassLower{std::nan("")}, 3.0).value, 0.0);
}

TEST(WeightUnitsTest, LargestDroppedStaysWithinTheLimitThroughAllRoundings) {
  std::mt19937_64 random(42);
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  for (int i = 0; i < 20000; ++i) {
    const auto limit =
        static_cast<double>(static_cast<float>(std::exp(-9.0 + 9.0 * uniform(random))));
    if (limit >= 1.0) continue;
    const double ref = 1000.0 * uniform(random);
    const LogMassLower kept{ref + 20.0 * uniform(random)};
    const double z = LargestDropped(limit, WeightOf(kept, ref));
    const double share = DroppedMass(LogMassOf(WeightUpper{z}, ref), kept).value;
    ASSERT_LE(share, limit);
    ASSERT_GT(share, limit * (1.0 - 1e-8));
  }
  EXPECT_EQ(LargestDropped(1.0, WeightLower{5.0}), kInfinity);
  EXPECT_EQ(LargestDropped(0.0, WeightLower{5.0}), 0.0);
  EXPECT_EQ(LargestDropped(0.05, WeightLower{0.0}), 0.0);
}

}  // namespace
}  // namespace kvservice
