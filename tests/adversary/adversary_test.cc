// A judge that never finds anything proves nothing: planted lies of one unit in the last place,
// wrong sets, wrong levels and samples that are not fresh must each be found, and the truth itself
// must not.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "attention/certificate.h"
#include "attention/draws.h"
#include "attention/sampled_bound.h"
#include "tests/adversary/attack.h"
#include "tests/adversary/coverage_runs.h"
#include "tests/adversary/device_call.h"
#include "tests/adversary/instruction_set.h"
#include "tests/adversary/judge.h"
#include "tests/adversary/layer_case.h"
#include "tests/adversary/mutate.h"
#include "tests/adversary/shares.h"
#include "tests/adversary/tally.h"
#include "tests/adversary/truth.h"
#include "tests/adversary/truth_kernel.h"

namespace kvservice::adversary {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The nearest doubles on the two sides of a real number that is only known as an interval: a bound
// there is right, and one double further in it is wrong.
double RightUpper(const Interval& truth) {
  auto x = static_cast<double>(truth.high);
  if (static_cast<long double>(x) < truth.high) x = std::nextafter(x, kInfinity);
  return x;
}
double WrongUpper(const Interval& truth) {
  auto x = static_cast<double>(truth.low);
  if (static_cast<long double>(x) >= truth.low) x = std::nextafter(x, -kInfinity);
  return x;
}
double RightLower(const Interval& truth) { return -RightUpper({-truth.high, -truth.low}); }
double WrongLower(const Interval& truth) { return -WrongUpper({-truth.high, -truth.low}); }

LayerCase SmallCase(uint64_t seed, const CaseTraits& traits = {}) {
  LayerCase frame;
  frame.shape.layout = {.query_head_count = 3, .kv_head_count = 1, .head_dim = 80};
  frame.shape.scale = 0.1F;
  frame.length = 200;
  frame.query_count = 2;
  return GenerateCase(seed, traits, frame);
}

// One head, every second token attended, and the tightest certificate that is right.
class JudgeTest : public ::testing::Test {
 protected:
  JudgeTest() {
    plan_.prove = Guarantee::kDeterministic;
    masses_ = truth_.Masses(attended_);
    error_ = truth_.OutputError(out_.data());
    norm_max_ = *std::max_element(widened_.v_norm.begin(), widened_.v_norm.end());
    right_.level = Level::kDeterministic;
    right_.action = Action::kSelected;
    right_.log_kept_lower = {RightLower(masses_.log_kept)};
    right_.log_kept_upper = {RightUpper(masses_.log_kept)};
    right_.log_dropped_lower = {RightLower(masses_.log_dropped)};
    right_.log_dropped_upper = {RightUpper(masses_.log_dropped)};
    right_.dropped_mass_lower = {RightLower(masses_.share)};
    right_.dropped_mass_upper = {RightUpper(masses_.share)};
    right_.output_error_upper = RightUpper(error_);
    right_.value_norm_lower = static_cast<double>(norm_max_) * 0.5;
  }

  static WidenedHead WidenCase(const LayerCase& from) {
    const KvLayout& layout = from.shape.layout;
    std::vector<std::byte> row(layout.row_bytes());
    return Widen(layout, from.length, [&](uint32_t token) {
      const size_t at = from.ElementIndex(0, token) * ElementBytes(layout.dtype);
      std::copy_n(&from.k[at], layout.vector_bytes(), row.data());
      std::copy_n(&from.v[at], layout.vector_bytes(), row.data() + layout.vector_bytes());
      return row.data();
    });
  }

  HeadVerdict Judge(const HeadCertificate& certificate) const {
    return JudgeHead(truth_, certificate, attended_, out_.data(), norm_max_, plan_);
  }
  // Expects one false statement or one contradiction, about `name`.
  void ExpectFound(const HeadCertificate& certificate, const std::string& name,
                   bool false_statement = true) const {
    const HeadVerdict verdict = Judge(certificate);
    ASSERT_FALSE(verdict.findings.empty()) << name;
    EXPECT_NE(verdict.findings[0].what.find(name), std::string::npos) << verdict.findings[0].what;
    EXPECT_EQ(verdict.findings[0].false_statement, false_statement) << name;
  }

  static std::vector<uint32_t> EverySecond() {
    std::vector<uint32_t> tokens;
    for (uint32_t token = 0; token < 200; token += 2) tokens.push_back(token);
    return tokens;
  }

  const LayerCase case_ = SmallCase(7);
  const WidenedHead widened_ = WidenCase(case_);
  const HeadTruth truth_{case_.shape, widened_, case_.queries[0].data(), 0, 199};
  const std::vector<uint32_t> attended_ = EverySecond();
  const std::vector<float> out_ = std::vector<float>(80, 0.25F);
  MassTruth masses_;
  Interval error_;
  long double norm_max_ = 0.0L;
  Plan plan_;
  HeadCertificate right_;
};

TEST_F(JudgeTest, TruthIsKnownWellEnough) {
  for (const Interval& interval : {masses_.log_kept, masses_.log_dropped, masses_.share}) {
    EXPECT_LT(interval.low, interval.high);
    EXPECT_LT(interval.high - interval.low, std::fabs(interval.low) * 0x1p-54L);
  }
  // Far below what floats of the output can say.
  EXPECT_LT(error_.high - error_.low, error_.low * 0x1p-47L);
}

TEST_F(JudgeTest, TheTightestRightCertificateStands) {
  const HeadVerdict verdict = Judge(right_);
  EXPECT_TRUE(verdict.findings.empty()) << verdict.findings[0].what;
  EXPECT_NEAR(verdict.slack, 0.0, 1e-15);
  EXPECT_NEAR(verdict.output_slack, 0.0, 1e-15);
}

TEST_F(JudgeTest, FindsEveryBoundOneStepBeyondTheTruth) {
  HeadCertificate lie = right_;
  lie.dropped_mass_upper = {WrongUpper(masses_.share)};
  ExpectFound(lie, "dropped_mass_upper");
  lie = right_;
  lie.dropped_mass_lower = {WrongLower(masses_.share)};
  ExpectFound(lie, "dropped_mass_lower");
  lie = right_;
  lie.log_dropped_upper = {WrongUpper(masses_.log_dropped)};
  ExpectFound(lie, "log_dropped_upper");
  lie = right_;
  lie.log_dropped_lower = {WrongLower(masses_.log_dropped)};
  ExpectFound(lie, "log_dropped_lower");
  lie = right_;
  lie.log_kept_lower = {WrongLower(masses_.log_kept)};
  ExpectFound(lie, "log_kept_lower");
  lie = right_;
  lie.log_kept_upper = {WrongUpper(masses_.log_kept)};
  ExpectFound(lie, "log_kept_upper");
  lie = right_;
  lie.output_error_upper = WrongUpper(error_);
  ExpectFound(lie, "output_error_upper");
  lie = right_;
  lie.value_norm_lower = static_cast<double>(norm_max_) * 1.001;
  ExpectFound(lie, "value_norm_lower");
}

TEST_F(JudgeTest, FindsNotANumber) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  HeadCertificate lie = right_;
  lie.dropped_mass_upper = {nan};
  EXPECT_FALSE(Judge(lie).findings.empty());
  lie = right_;
  lie.log_kept_lower = {nan};
  EXPECT_FALSE(Judge(lie).findings.empty());
  lie = right_;
  lie.output_error_upper = nan;
  EXPECT_FALSE(Judge(lie).findings.empty());
}

TEST_F(JudgeTest, FindsLevelsThatDoNotFit) {
  HeadCertificate lie = right_;
  lie.level = Level::kExact;
  ExpectFound(lie, "EXACT");
  lie = right_;
  lie.level = Level::kNone;
  ExpectFound(lie, "level NONE", false);
  lie = right_;
  lie.level = Level::kConfidence;
  ExpectFound(lie, "CONFIDENCE", false);
  lie = right_;
  lie.met = false;
  ExpectFound(lie, "met", false);
  lie = right_;
  lie.failure_probability = 1e-3;
  ExpectFound(lie, "probability", false);
}

TEST_F(JudgeTest, FindsATokenThatWasNotAttended) {
  // The bounds were right for what was attended; the reply names one token more, then one less.
  for (const bool more : {true, false}) {
    std::vector<uint32_t> wrong = attended_;
    if (more) {
      wrong.insert(wrong.begin() + 51, 101);
    } else {
      wrong.erase(wrong.begin() + 51);
    }
    const HeadVerdict verdict = JudgeHead(truth_, right_, wrong, out_.data(), norm_max_, plan_);
    EXPECT_FALSE(verdict.findings.empty()) << "more: " << more;
  }
}

TEST_F(JudgeTest, CountsSampledStatementsAsMisses) {
  plan_.prove = Guarantee::kConfidence;
  plan_.failure_probability = 0.05;
  HeadCertificate sampled = right_;
  sampled.level = Level::kConfidence;
  sampled.failure_probability = 0.05;
  sampled.keys_sampled = 64;
  HeadVerdict verdict = Judge(sampled);
  EXPECT_TRUE(verdict.findings.empty()) << verdict.findings[0].what;
  EXPECT_TRUE(verdict.mass_sampled);
  EXPECT_FALSE(verdict.mass_missed);
  EXPECT_FALSE(verdict.output_missed);
  sampled.dropped_mass_upper = {WrongUpper(masses_.share)};
  sampled.output_error_upper = WrongUpper(error_);
  verdict = Judge(sampled);
  EXPECT_TRUE(verdict.findings.empty());
  EXPECT_TRUE(verdict.mass_missed);
  EXPECT_TRUE(verdict.output_missed);
  // What was attended is never sampled.
  sampled.log_kept_lower = {WrongLower(masses_.log_kept)};
  EXPECT_FALSE(Judge(sampled).findings.empty());
}

// ---- Sums of the truth ----

// Lanes are the same for every instruction set, and so is every bit of what they add up.
TEST(TruthKernelTest, AddsUpTheSameOnEveryInstructionSet) {
  constexpr uint32_t kDim = 80;
  constexpr uint32_t kTokens = 24;
  Chance chance(17);
  std::vector<float> q(kDim);
  std::vector<float> k(size_t{kTokens} * kDim);
  for (float& x : q) x = std::exp(10.0F * chance.Normal());
  for (float& x : k) x = std::exp(10.0F * chance.Normal()) * chance.Normal();
  std::vector<double> weights(3 * kTokens);
  std::vector<double> in(kTokens);
  for (double& x : weights) x = static_cast<double>(chance.Uniform());
  for (double& x : in) x = chance.OneIn(2) ? 1.0 : 0.0;
  const SplitNumbers parts = {weights.data(), &weights[kTokens], &weights[2 * kTokens]};
  const std::vector<uint32_t> tokens = {0, 3, 4, 17};
  std::vector<std::vector<double>> results;
  for (const std::string& set : InstructionSets()) {
    ASSERT_TRUE(UseInstructionSet(set));
    std::vector<double>& result = results.emplace_back(3 * kTokens + 2 * kDim);
    ExactDots(kDim, q.data(), k.data(), kTokens / kTruthLanes, result.data(), &result[kTokens],
              &result[2 * kTokens]);
    WeightedRows(kDim, k.data(), tokens, parts, &result[3 * kTokens], &result[3 * kTokens + kDim]);
    LaneSums inside;
    LaneSums outside;
    SumSides(kTokens, in.data(), parts, &inside, &outside);
    for (const LaneSums& sums : {inside, outside}) {
      result.insert(result.end(), sums.high.begin(), sums.high.end());
      result.insert(result.end(), sums.low.begin(), sums.low.end());
      result.insert(result.end(), sums.error.begin(), sums.error.end());
    }
    EXPECT_EQ(result, results[0]) << set;
  }
  ASSERT_TRUE(UseInstructionSet(""));
}

// 2^60 + 1 - 2^60 in every token: what rounds away is in the other part.
TEST(TruthKernelTest, LosesNothing) {
  constexpr uint32_t kDim = 64;
  std::vector<float> q(kDim, 0.0F);
  q[0] = q[20] = 0x1p30F;
  q[10] = 1.0F;
  std::vector<float> k(size_t{kTruthLanes} * kDim, 0.0F);
  for (uint32_t token = 0; token < kTruthLanes; ++token) {
    k[GroupedIndex(kDim, token, 0)] = 0x1p30F;
    k[GroupedIndex(kDim, token, 10)] = 1.0F + static_cast<float>(token);
    k[GroupedIndex(kDim, token, 20)] = -0x1p30F;
  }
  std::array<double, kTruthLanes> high, low, size;
  ExactDots(kDim, q.data(), k.data(), 1, high.data(), low.data(), size.data());
  for (uint32_t token = 0; token < kTruthLanes; ++token) {
    EXPECT_EQ(high[token] + low[token], 1.0 + token);
    EXPECT_EQ(size[token], 0x1p61);
  }
}

// Logits 0, -2000, -2000 and -9000: less than any double, and known as well as anything.
TEST(HeadTruthTest, KnowsMassesBelowAnyDouble) {
  LayerShape shape;
  shape.layout = {
      .query_head_count = 1, .kv_head_count = 1, .head_dim = 64, .dtype = DType::kFloat32};
  const std::vector<float> logits = {0.0F, -2000.0F, -2000.0F, -9000.0F};
  std::vector<float> row(size_t{2} * 64);
  const WidenedHead head =
      Widen(shape.layout, static_cast<uint32_t>(logits.size()), [&](uint32_t token) {
        row[0] = logits[token];
        row[64] = static_cast<float>(token);
        return reinterpret_cast<const std::byte*>(row.data());
      });
  std::vector<float> q(64, 0.0F);
  q[0] = 1.0F;
  const HeadTruth truth(shape, head, q.data(), 0, static_cast<uint32_t>(logits.size()));
  const auto expect_near = [](const Interval& interval, long double value) {
    EXPECT_LE(interval.low, value);
    EXPECT_GE(interval.high, value);
    // Logits of 9000 are known to 2^-49.
    EXPECT_LE(interval.high - interval.low, std::fabs(value) * 0x1p-45L);
  };
  const MassTruth most = truth.Masses(std::vector<uint32_t>{0});
  EXPECT_LE(most.log_kept.low, 0.0L);
  EXPECT_GE(most.log_kept.high, 0.0L);
  expect_near(most.log_dropped, -2000.0L + std::log(2.0L));
  expect_near(most.share, std::exp(-2000.0L) * 2.0L);
  const MassTruth least = truth.Masses(std::vector<uint32_t>{1, 2});
  expect_near(least.log_kept, -2000.0L + std::log(2.0L));
  EXPECT_GT(least.share.low, 0.999L);
  EXPECT_EQ(least.share.high, 1.0L);
  // Their output is that of each of them, 1 and 2, and the dense one that of token 0.
  expect_near(truth.SelectionError(std::vector<uint32_t>{1, 2}), 1.5L);
  expect_near(truth.SelectionError(std::vector<uint32_t>{3}), 3.0L);
}

// ---- Misses -------------------------------------------------------------------------------------

TEST(MissProbabilityTest, AgainstClosedForms) {
  EXPECT_EQ(MissProbability(10, 0, 0.3), 1.0);
  EXPECT_NEAR(MissProbability(10, 1, 0.3), 1.0 - std::pow(0.7, 10), 1e-12);
  EXPECT_NEAR(MissProbability(10, 10, 0.3), std::pow(0.3, 10), 1e-18);
  EXPECT_NEAR(MissProbability(5, 2, 0.5), 26.0 / 32.0, 1e-12);
  // Far beyond the mean of 50: the normal approximation says 6e-6, the exact tail is heavier.
  EXPECT_NEAR(MissProbability(1000, 82, 0.05), 1.2e-5, 0.5e-5);
}

// Bounds of a sum from draws, as a device makes them. With a fresh key for every call they miss at
// most as often as they say. Keys that are used again repeat the same draws: as soon as those are
// unlucky ones, every call misses.
class FreshnessTest : public ::testing::Test {
 protected:
  // `kTokens` tokens of weight 1, the first `full` of which are at their bound, the others nothing.
  static constexpr uint32_t kTokens = 4096;
  static constexpr uint32_t kDraws = 64;
  static constexpr uint32_t kCalls = 4000;
  static constexpr double kEta = 0.05;

  // So many that a sample without a single one of them is a miss: the likeliest miss there is.
  static uint32_t Full() {
    SampledBound bound;
    bound.Begin(kTokens, kDraws);
    for (uint32_t i = 0; i < kDraws; ++i) bound.Add(1, 0.0);
    return static_cast<uint32_t>(std::ceil(bound.UpperBound(kEta).value * (1.0 + 1e-5)));
  }

  static bool Misses(uint8_t seed_low, uint8_t seed_high) {
    std::array<std::byte, kDrawKeyBytes> key{};
    key[0] = std::byte{seed_low};
    key[1] = std::byte{seed_high};
    static const uint32_t kFull = Full();
    const std::vector<uint32_t> weights(kTokens, 1);
    PageSums sums;
    sums.Assign({uint64_t{kTokens}});
    WeightedDraws draws;
    draws.Begin(sums, KeyedBits(key, DrawStream{}), kDraws);
    SampledBound bound;
    bound.Begin(kTokens, kDraws);
    WeightedDraws::Token token;
    while (draws.NextDistinct([&](uint32_t) { return absl::MakeConstSpan(weights); }, &token)) {
      bound.Add(token.weight, token.token < kFull ? 1.0 : 0.0);
    }
    return bound.UpperBound(kEta).value < kFull;
  }
};

TEST_F(FreshnessTest, FreshKeysMissAtMostAsOftenAsStated) {
  Tally tally;
  for (uint32_t call = 0; call < kCalls; ++call) {
    SampledCounts& counts = tally.sampled[kEta];
    ++counts.mass_count;
    counts.mass_misses +=
        Misses(static_cast<uint8_t>(call), static_cast<uint8_t>(call >> 8)) ? 1 : 0;
  }
  EXPECT_GT(tally.misses(), kCalls / 100U) << "the population is not hard enough to tell";
  EXPECT_GE(tally.least_miss_probability(), kSignificance);
  EXPECT_TRUE(tally.sound());
}

TEST_F(FreshnessTest, ReusedKeysAreFound) {
  uint32_t unlucky = 0;
  while (unlucky < 255 && !Misses(static_cast<uint8_t>(unlucky), 0)) ++unlucky;
  ASSERT_LT(unlucky, 255U);
  Tally tally;
  for (uint32_t call = 0; call < kCalls; ++call) {
    // Every eighth call draws with the key of an earlier one.
    const bool reused = call % 8 == 0;
    SampledCounts& counts = tally.sampled[kEta];
    ++counts.mass_count;
    counts.mass_misses += (reused ? Misses(static_cast<uint8_t>(unlucky), 0)
                                  : Misses(static_cast<uint8_t>(call), 1 + (call >> 8) % 250))
                              ? 1
                              : 0;
  }
  EXPECT_LT(tally.least_miss_probability(), kSignificance);
  EXPECT_FALSE(tally.sound());
}

// ---- Cases and calls ----------------------------------------------------------------------------

TEST(LayerCaseTest, FollowsFromItsSeed) {
  const LayerCase a = GenerateCase(123, CaseLimits{});
  const LayerCase b = GenerateCase(123, CaseLimits{});
  EXPECT_EQ(a.k, b.k);
  EXPECT_EQ(a.v, b.v);
  EXPECT_EQ(a.queries, b.queries);
  EXPECT_NE(a.k, GenerateCase(124, CaseLimits{}).k);
}

// All sizes and kinds that the campaign promises appear within a few thousand seeds.
TEST(LayerCaseTest, CoversSizesAndKinds) {
  std::vector<uint32_t> dims, groups, dtypes, key_kinds, value_kinds, query_counts, fills;
  const auto note = [](std::vector<uint32_t>* seen, uint32_t x) {
    if (std::find(seen->begin(), seen->end(), x) == seen->end()) seen->push_back(x);
  };
  for (uint64_t seed = 1; seed < 1200; ++seed) {
    const LayerCase one = GenerateCase(seed, {.products_max = 1 << 19, .length_max = 300});
    note(&dims, one.shape.layout.head_dim);
    note(&groups, one.shape.layout.group_size());
    note(&dtypes, static_cast<uint32_t>(one.shape.layout.dtype));
    note(&key_kinds, static_cast<uint32_t>(one.traits.keys));
    note(&value_kinds, static_cast<uint32_t>(one.traits.values));
    note(&query_counts, one.query_count);
    note(&fills, one.length % kBlockTokens);
    for (const SketchTable& table : one.tables) {
      for (const float m : table.metric) ASSERT_TRUE(std::isfinite(m));
    }
  }
  EXPECT_EQ(dims.size(), 5U);
  EXPECT_EQ(groups.size(), size_t{kGroupMax});
  EXPECT_EQ(dtypes.size(), 3U);
  EXPECT_EQ(key_kinds.size(), size_t{kKeyKinds});
  EXPECT_EQ(value_kinds.size(), size_t{kValueKinds});
  EXPECT_EQ(query_counts.size(), size_t{kQueryTokensMax});
  EXPECT_EQ(fills.size(), size_t{kBlockTokens});
}

// A device that answers right but states a little less than it should.
class LyingCallTest : public ::testing::Test {
 protected:
  // Runs a scan on the reference, applies the lie to the reply and judges it.
  template <typename Lie>
  static Tally JudgeLie(const Lie& lie) {
    auto device = NewDevice("reference", {.thread_count = 1});
    EXPECT_TRUE(device.ok());
    Arena arena(device->get());
    const LayerCase layer_case = SmallCase(11, {.keys = KeyKind::kConstantPages});
    const StoredCase stored(&arena, layer_case);
    const std::vector<WidenedHead> widened = {stored.Widened(0)};
    Plan plan;
    plan.source = Source::kScan;
    plan.keep.top_k = 9;
    plan.local_begin = 190;
    plan.prove = Guarantee::kDeterministic;
    Chance chance(1);
    DeviceCall call(stored, 0, plan, MakeDrawKey(&chance));
    call.Run();
    lie(&call);
    Tally tally;
    JudgeDeviceCall(call, MakeTruths(layer_case, 0, widened), widened, "planted", &tally);
    return tally;
  }
};

TEST_F(LyingCallTest, TheReplyAsItIsStands) {
  const Tally tally = JudgeLie([](DeviceCall*) {});
  EXPECT_TRUE(tally.sound()) << Summary(tally);
  EXPECT_EQ(tally.certificates, 6U);
  EXPECT_EQ(tally.slack.count(), 6U);
}

// Keys of constant pages leave the bound nothing but its margins, 2.4e-4 and less.
TEST_F(LyingCallTest, FindsALoweredBound) {
  const Tally tally = JudgeLie([](DeviceCall* call) {
    for (HeadCertificate& c : call->certificates) c.dropped_mass_upper.value *= 1.0 - 1e-3;
  });
  EXPECT_EQ(tally.violations, 6U) << Summary(tally);
  EXPECT_FALSE(tally.failures.empty());
}

TEST_F(LyingCallTest, FindsSelectionsThatAreNone) {
  EXPECT_GT(JudgeLie([](DeviceCall* call) { call->selected[0].pop_back(); }).contradictions, 0U);
  EXPECT_GT(JudgeLie([](DeviceCall* call) {
              call->selected[0].erase(call->selected[0].begin());
            }).contradictions,
            0U);
  EXPECT_GT(JudgeLie([](DeviceCall* call) {
              std::swap(call->selected[0][0], call->selected[0][1]);
            }).contradictions,
            0U);
  EXPECT_GT(JudgeLie([](DeviceCall* call) { ++call->groups[0].tokens_read; }).contradictions, 0U);
  EXPECT_GT(JudgeLie([](DeviceCall* call) {
              call->row.status = absl::FailedPreconditionError("no");
            }).contradictions,
            0U);
}

TEST_F(LyingCallTest, ABoundOfOneIsSeenInTheSlack) {
  const Tally right = JudgeLie([](DeviceCall*) {});
  const Tally loose = JudgeLie([](DeviceCall* call) {
    for (HeadCertificate& c : call->certificates) c.dropped_mass_upper.value = 1.0;
  });
  EXPECT_EQ(loose.violations, 0U);
  EXPECT_GT(loose.slack.smallest(), right.slack.largest());
}

// ---- Attacks ------------------------------------------------------------------------------------

// KVSERVICE_ADVERSARY_CERTIFICATES head-certificates, or as many as a unit test has time for. A
// failure names the flags of kvadversary that repeat it.
class AttackTest : public ::testing::TestWithParam<std::string> {
 protected:
  static uint64_t Certificates(uint64_t otherwise) {
    const char* wanted = std::getenv("KVSERVICE_ADVERSARY_CERTIFICATES");
    return wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : otherwise;
  }
};

TEST_P(AttackTest, FindsNothing) {
  AttackOptions options;
  options.devices = {GetParam()};
  options.limits.products_max = 1 << 18;
  // Many shapes in few certificates.
  options.rows_max = 8;
  auto attacker = Attacker::New(options);
  ASSERT_TRUE(attacker.ok());
  Tally tally;
  const uint64_t wanted = Certificates(4000);
  const std::vector<std::string> sets = InstructionSets();
  for (size_t i = 0; i < (GetParam() == "cpu" ? sets.size() : 1); ++i) {
    SCOPED_TRACE(sets[i]);
    ASSERT_TRUE(UseInstructionSet(sets[i]));
    const uint64_t until = tally.certificates + wanted;
    for (uint64_t index = 0; tally.certificates < until; ++index) {
      (*attacker)->RunCase(SeedOf(2 + i, index), &tally);
      ASSERT_TRUE(tally.sound()) << Summary(tally);
    }
  }
  ASSERT_TRUE(UseInstructionSet(""));
  // Every level and every way to answer was met.
  for (const uint64_t count : tally.levels) EXPECT_GT(count, 0U);
  for (const uint64_t count : tally.actions) EXPECT_GT(count, 0U);
  EXPECT_GT(tally.output_bounds, 0U);
  // Bounds of 1 would be as sound.
  EXPECT_LT(tally.slack_tame.At(0.5), 0.5 * tally.slack_tame_of_one.At(0.5));
}

INSTANTIATE_TEST_SUITE_P(All, AttackTest, ::testing::Values("reference", "cpu"),
                         [](const auto& test) { return test.param; });

// The reference takes ten times as long to say the same.
TEST(CoverageTest, SampledStatementsKeepTheirProbability) {
  CoverageOptions options;
  options.certificates = 1;
  options.round_calls = 75;
  Tally tally;
  ASSERT_TRUE(MeasureCoverage(options, &tally).ok());
  EXPECT_TRUE(tally.sound()) << Summary(tally);
  EXPECT_GT(tally.levels[static_cast<size_t>(Level::kConfidence)], 0U);
}

// Everything but how long it takes.
TEST(RunUntilTest, DoesNotDependOnThreads) {
  const auto run = [](uint32_t thread_count) {
    AttackOptions options;
    options.limits.products_max = 1 << 14;
    options.rows_max = 4;
    options.climb_steps = 2;
    std::vector<std::unique_ptr<Attacker>> attackers;
    for (uint32_t i = 0; i < thread_count; ++i) {
      attackers.push_back(Attacker::New(options).value());
    }
    Tally tally;
    RunUntil(
        {.certificates = 1000, .thread_count = thread_count, .round = 3},
        [&](uint64_t index, uint32_t thread, Tally* counts) {
          attackers[thread]->RunCase(SeedOf(3, index), counts);
        },
        &tally);
    return tally;
  };
  const Tally alone = run(1);
  const Tally together = run(3);
  EXPECT_TRUE(alone.sound()) << Summary(alone);
  EXPECT_GE(alone.certificates, 1000U);
  EXPECT_EQ(Summary(alone), Summary(together));
  // Every certificate is of one kind along every axis.
  for (size_t axis = 0; axis < kAxes; ++axis) {
    uint64_t sum = 0;
    for (size_t kind = 0; kind < Shares::kKindsMax; ++kind) {
      sum += alone.shares.Of(static_cast<Axis>(axis), kind);
      EXPECT_EQ(alone.shares.Of(static_cast<Axis>(axis), kind),
                together.shares.Of(static_cast<Axis>(axis), kind));
    }
    EXPECT_EQ(sum, alone.certificates) << Name(static_cast<Axis>(axis));
  }
}

TEST(RunUntilTest, EndsWhenTimeIsUp) {
  Tally tally;
  RunUntil(
      {.certificates = 1, .seconds = 0.0},
      [](uint64_t, uint32_t, Tally* counts) { ++counts->certificates; }, &tally);
  EXPECT_EQ(tally.certificates, 0U);
}

TEST(MutateTest, KeepsNumbersFinite) {
  Chance chance(3);
  LayerCase layer_case = SmallCase(5);
  for (int i = 0; i < 300; ++i) Mutate(&chance, &layer_case);
  const KvLayout& layout = layer_case.shape.layout;
  const WidenedHead widened = Widen(layout, layer_case.length, [&](uint32_t token) {
    static std::vector<std::byte> row;
    row.resize(layout.row_bytes());
    const size_t at = layer_case.ElementIndex(0, token) * ElementBytes(layout.dtype);
    std::copy_n(&layer_case.k[at], layout.vector_bytes(), row.data());
    std::copy_n(&layer_case.v[at], layout.vector_bytes(), row.data() + layout.vector_bytes());
    return row.data();
  });
  for (const float k : widened.k) ASSERT_TRUE(std::isfinite(k));
  for (const float v : widened.v) ASSERT_TRUE(std::isfinite(v));
  for (const float q : layer_case.queries[0]) ASSERT_TRUE(std::isfinite(q));
}

}  // namespace
}  // namespace kvservice::adversary
