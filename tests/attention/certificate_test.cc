#include "attention/certificate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace kvservice {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

HeadCertificate Make(Level level, double kept, double dropped) {
  HeadCertificate c;
  c.level = level;
  c.action = Action::kSelected;
  c.log_kept = kept;
  c.log_kept_lower = {WidenDown(kept)};
  c.log_kept_upper = {WidenUp(kept)};
  c.log_dropped_upper = {WidenUp(dropped)};
  c.log_dropped_lower = {WidenDown(dropped)};
  FinishCertificate(&c);
  return c;
}

long double LogSum(const std::vector<long double>& logits) {
  long double top = -std::numeric_limits<long double>::infinity();
  for (const long double x : logits) top = std::max(top, x);
  if (std::isinf(top)) return top;
  long double sum = 0.0L;
  for (const long double x : logits) sum += std::exp(x - top);
  return top + std::log(sum);
}

TEST(Certificate, SaysNothingByDefault) {
  HeadCertificate c;
  EXPECT_EQ(c.level, Level::kNone);
  FinishCertificate(&c);
  EXPECT_EQ(c.dropped_mass_upper.value, 1.0);
  EXPECT_EQ(c.dropped_mass_lower.value, 0.0);
}

TEST(Certificate, FinishEnclosesTheShare) {
  const HeadCertificate c = Make(Level::kDeterministic, 2.0, -1.0);
  const long double share = 1.0L / (1.0L + std::exp(3.0L));
  EXPECT_GE(c.dropped_mass_upper.value, share);
  EXPECT_LE(c.dropped_mass_lower.value, share);
  EXPECT_NEAR(c.dropped_mass_upper.value, static_cast<double>(share), 1e-14);
}

TEST(Certificate, NothingDroppedIsZero) {
  HeadCertificate c = Make(Level::kExact, 2.0, 0.0);
  c.log_dropped_upper = {kLogZero};
  c.log_dropped_lower = {kLogZero};
  FinishCertificate(&c);
  EXPECT_EQ(c.dropped_mass_upper.value, 0.0);
  EXPECT_EQ(c.dropped_mass_lower.value, 0.0);
  EXPECT_EQ(c.level, Level::kExact);
}

TEST(Certificate, AnyNanIsNoStatement) {
  for (int field = 0; field < 5; ++field) {
    HeadCertificate c = Make(Level::kExact, 2.0, -1.0);
    if (field == 0) c.log_kept = kNan;
    if (field == 1) c.log_kept_lower = {kNan};
    if (field == 2) c.log_kept_upper = {kNan};
    if (field == 3) c.log_dropped_upper = {kNan};
    if (field == 4) c.log_dropped_lower = {kNan};
    FinishCertificate(&c);
    EXPECT_EQ(c.level, Level::kNone) << field;
    EXPECT_EQ(c.dropped_mass_upper.value, 1.0) << field;
    EXPECT_EQ(c.dropped_mass_lower.value, 0.0) << field;
    const HeadCertificate merged = Merge(c, Make(Level::kExact, 2.0, -1.0));
    EXPECT_EQ(merged.level, Level::kNone) << field;
    EXPECT_EQ(merged.dropped_mass_upper.value, 1.0) << field;
  }
}

// Any split of a set of tokens into parts, each part's certificate merged in any order: the merged
// statement holds for the whole set.
TEST(Certificate, EverySplitMergesToAValidStatement) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 3000; ++round) {
    std::normal_distribution<double> normal(0.0, round % 3 == 0   ? 0.01
                                                 : round % 3 == 1 ? 3.0
                                                                  : 200.0);
    const size_t part_count = 1 + random() % 5;
    std::vector<long double> all_kept;
    std::vector<long double> all_dropped;
    HeadCertificate merged;
    for (size_t part = 0; part < part_count; ++part) {
      std::vector<long double> kept = {normal(random)};
      std::vector<long double> dropped;
      for (size_t i = random() % 4; i > 0; --i) kept.push_back(normal(random));
      for (size_t i = random() % 4; i > 0; --i) dropped.push_back(normal(random));
      HeadCertificate c = Make(Level::kDeterministic, static_cast<double>(LogSum(kept)),
                               static_cast<double>(LogSum(dropped)));
      if (dropped.empty()) c.level = Level::kExact;
      c.dropped_mass_estimate =
          static_cast<float>(1.0L / (1.0L + std::exp(LogSum(kept) - LogSum(dropped))));
      merged = part == 0 ? c : random() % 2 == 0 ? Merge(merged, c) : Merge(c, merged);
      all_kept.insert(all_kept.end(), kept.begin(), kept.end());
      all_dropped.insert(all_dropped.end(), dropped.begin(), dropped.end());
    }
    const long double kept = LogSum(all_kept);
    const long double dropped = LogSum(all_dropped);
    const long double share = all_dropped.empty() ? 0.0L : 1.0L / (1.0L + std::exp(kept - dropped));
    ASSERT_LE(merged.log_kept_lower.value, kept);
    ASSERT_GE(merged.log_kept_upper.value, kept);
    ASSERT_NEAR(merged.log_kept, static_cast<double>(kept), 1e-9);
    ASSERT_GE(merged.log_dropped_upper.value, dropped);
    ASSERT_LE(merged.log_dropped_lower.value, dropped);
    ASSERT_GE(merged.dropped_mass_upper.value, share);
    ASSERT_LE(merged.dropped_mass_lower.value, share);
    ASSERT_NEAR(merged.dropped_mass_upper.value, static_cast<double>(share), 1e-9);
    // An estimate is a float: shares next to 1 do not survive it.
    if (round % 3 != 2) {
      ASSERT_NEAR(merged.dropped_mass_estimate, static_cast<double>(share), 1e-4);
    }
    ASSERT_EQ(merged.level, all_dropped.empty() ? Level::kExact : merged.level);
    ASSERT_NE(merged.level, Level::kNone);
  }
}

TEST(Certificate, MergeTakesTheWeakerStatement) {
  HeadCertificate confident = Make(Level::kConfidence, 1.0, -3.0);
  confident.failure_probability = 1e-9;
  HeadCertificate other = confident;
  other.failure_probability = 2e-9;
  const HeadCertificate dense = [] {
    HeadCertificate c = Make(Level::kExact, 0.5, kLogZero);
    c.action = Action::kDense;
    return c;
  }();
  HeadCertificate merged = Merge(confident, dense);
  EXPECT_EQ(merged.level, Level::kConfidence);
  EXPECT_EQ(merged.action, Action::kSelected);
  EXPECT_GE(merged.failure_probability, 1e-9);
  merged = Merge(confident, other);
  EXPECT_GE(merged.failure_probability, 3e-9);
  EXPECT_NEAR(merged.failure_probability, 3e-9, 1e-22);

  HeadCertificate unknown;
  unknown.log_kept = 0.0;
  unknown.log_kept_lower = {0.0};
  unknown.log_kept_upper = {0.0};
  merged = Merge(dense, unknown);
  EXPECT_EQ(merged.level, Level::kNone);
  EXPECT_EQ(merged.dropped_mass_upper.value, 1.0);
  EXPECT_EQ(merged.log_dropped_upper.value, kInf);
  EXPECT_LT(merged.dropped_mass_estimate, 0.0F);

  other.met = false;
  EXPECT_FALSE(Merge(confident, other).met);
  EXPECT_TRUE(Merge(confident, confident).met);
}

}  // namespace
}  // namespace kvservice
