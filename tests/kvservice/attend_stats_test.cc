#include "kvservice/attend_stats.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "kvservice/bound_not_met.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

HeadCertificate Certificate(Level level, double dropped_upper, double failure_probability = 0.0) {
  HeadCertificate certificate;
  certificate.level = level;
  certificate.action = Action::kSelected;
  certificate.dropped_mass_upper = {dropped_upper};
  certificate.failure_probability = failure_probability;
  return certificate;
}

TEST(AttendStatsTest, ConfidenceCountsAsProvenAndApart) {
  AttendStats stats;
  AddCertificate(Certificate(Level::kNone, 1.0), &stats);
  AddCertificate(Certificate(Level::kConfidence, 0.04, 1e-9), &stats);
  AddCertificate(Certificate(Level::kConfidence, 0.03, 1e-9), &stats);
  AddCertificate(Certificate(Level::kDeterministic, 0.01), &stats);
  AddCertificate(Certificate(Level::kExact, 0.0), &stats);
  EXPECT_EQ(stats.certificates, 5U);
  EXPECT_EQ(stats.certificates_proven, 4U);
  EXPECT_EQ(stats.by_level, (std::array<uint64_t, 4>{1, 2, 1, 1}));
  EXPECT_EQ(stats.by_action, (std::array<uint64_t, 5>{5, 0, 0, 0, 0}));
  EXPECT_EQ(stats.dropped_mass_upper_max, 0.04);
  EXPECT_GE(stats.dropped_mass_upper_sum, 0.08);
  EXPECT_LT(stats.dropped_mass_upper_sum, 0.08 + 1e-15);
}

// 2^-54 is lost when it is added to 1 to nearest; ten thousand of them are not when rounded up.
TEST(AttendStatsTest, TheUnionBoundIsRoundedUp) {
  AttendStats stats;
  AddCertificate(Certificate(Level::kConfidence, 0.04, 0.5), &stats);
  AddCertificate(Certificate(Level::kConfidence, 0.04, 0.5), &stats);
  const double small = std::ldexp(1.0, -54);
  for (int i = 0; i < 10000; ++i) {
    AddCertificate(Certificate(Level::kConfidence, 0.04, small), &stats);
  }
  EXPECT_GE(stats.failure_probability_sum, 1.0 + 10000 * small);
}

TEST(AttendStatsTest, WhatIsCountedApartAddsUp) {
  AttendStats all;
  AttendStats first;
  AttendStats second;
  for (AttendStats* stats : {&all, &first}) {
    ++stats->attend_rows;
    AddGroup({.action = Action::kDense, .scanned = true, .tokens_read = 10, .keys_sampled = 3}, 20,
             stats);
    AddCertificate(Certificate(Level::kConfidence, 0.04, 1e-9), stats);
  }
  for (AttendStats* stats : {&all, &second}) {
    stats->attend_rows += 2;
    stats->anchor_seed_scans += 5;
    AddGroup({.action = Action::kReused, .tokens_read = 7, .rows_sampled = 4}, 30, stats);
    AddCertificate(Certificate(Level::kDeterministic, 0.3), stats);
    AddCertificate(Certificate(Level::kNone, 1.0), stats);
  }
  AddStats(second, &first);
  EXPECT_EQ(first.attend_rows, 3U);
  EXPECT_EQ(first.groups, 2U);
  EXPECT_EQ(first.groups_scanned, 1U);
  EXPECT_EQ(first.groups_dense, 1U);
  EXPECT_EQ(first.tokens_read, 17U);
  EXPECT_EQ(first.tokens_visible, 50U);
  EXPECT_EQ(first.keys_sampled, 3U);
  EXPECT_EQ(first.rows_sampled, 4U);
  EXPECT_EQ(first.anchor_seed_scans, 5U);
  EXPECT_EQ(first.certificates, 3U);
  EXPECT_EQ(first.certificates_proven, 2U);
  EXPECT_EQ(first.dropped_mass_upper_max, 0.3);
  EXPECT_GE(first.dropped_mass_upper_sum, 0.34);
  EXPECT_LT(first.dropped_mass_upper_sum, 0.34 + 1e-15);
  EXPECT_GE(first.failure_probability_sum, 1e-9);
  EXPECT_EQ(first.by_level, all.by_level);
  EXPECT_EQ(first.by_action, all.by_action);
  EXPECT_EQ(first.dropped_mass_counts, all.dropped_mass_counts);
}

TEST(AttendStatsTest, ClassesHoldTheirUpperEnds) {
  for (size_t i = 0; i < kDroppedMassBounds.size(); ++i) {
    AttendStats stats;
    AddCertificate(Certificate(Level::kDeterministic, kDroppedMassBounds[i]), &stats);
    EXPECT_EQ(stats.dropped_mass_counts[i], 1U) << i;
    AddCertificate(Certificate(Level::kDeterministic, std::nextafter(kDroppedMassBounds[i], 2.0)),
                   &stats);
    EXPECT_EQ(stats.dropped_mass_counts[std::min(i + 1, kDroppedMassBounds.size() - 1)],
              i + 1 < kDroppedMassBounds.size() ? 1U : 2U);
    EXPECT_EQ(std::accumulate(stats.dropped_mass_counts.begin(), stats.dropped_mass_counts.end(),
                              uint64_t{0}),
              stats.certificates);
  }
}

TEST(AttendStatsTest, GroupsAddUp) {
  AttendStats stats;
  AddGroup({.action = Action::kGrown,
            .scanned = true,
            .tokens_read = 10,
            .tokens_scanned = 100,
            .keys_sampled = 7,
            .rows_sampled = 3},
           100, &stats);
  AddGroup({.action = Action::kDense, .tokens_read = 100}, 100, &stats);
  EXPECT_EQ(stats.groups, 2U);
  EXPECT_EQ(stats.groups_scanned, 1U);
  EXPECT_EQ(stats.groups_dense, 1U);
  EXPECT_EQ(stats.tokens_read, 110U);
  EXPECT_EQ(stats.tokens_visible, 200U);
  EXPECT_EQ(stats.keys_sampled, 7U);
  EXPECT_EQ(stats.rows_sampled, 3U);
}

std::string Metadata(const absl::Status& status, const std::string& key) {
  for (const auto& [name, value] : DetailsOf(status).metadata) {
    if (name == key) return value;
  }
  return "";
}

TEST(BoundNotMetTest, NamesTheLimitThatFailedWithBothNumbers) {
  Plan plan;
  plan.max_dropped_mass = 0.05F;
  plan.max_output_error = 0.25F;
  HeadCertificate good = Certificate(Level::kDeterministic, 0.05F);
  good.output_error_upper = 0.5;
  good.value_norm_lower = 4.0;
  HeadCertificate heavy = good;
  heavy.dropped_mass_upper = {0.0625};
  HeadCertificate far = good;
  far.output_error_upper = 3.0;

  absl::Status status = BoundNotMet(2, plan, {good, heavy});
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(DetailsOf(status).reason, "BOUND_NOT_MET");
  EXPECT_EQ(DetailsOf(status).field, "rows[2]");
  EXPECT_EQ(Metadata(status, "limit"), "max_dropped_mass");
  EXPECT_EQ(Metadata(status, "dropped_mass_upper"), "0.0625");
  // The limit as it was compared: the float that is nearest to what the caller wrote.
  EXPECT_EQ(std::stod(Metadata(status, "max_dropped_mass")), static_cast<double>(0.05F));
  EXPECT_NE(status.message().find("0.0625"), absl::string_view::npos) << status;

  status = BoundNotMet(0, plan, {far, good});
  EXPECT_EQ(Metadata(status, "limit"), "max_output_error");
  EXPECT_EQ(Metadata(status, "max_output_error"), "0.25");
  EXPECT_GE(std::stod(Metadata(status, "output_error_relative_upper")), 0.75);
  EXPECT_EQ(Metadata(BoundNotMet(0, plan, {far, heavy}), "limit"),
            "max_dropped_mass,max_output_error");
  EXPECT_EQ(Metadata(BoundNotMet(0, plan, {good}), "limit"), "guarantee");
}

TEST(BoundNotMetTest, ALimitThatIsNotSetCannotFail) {
  Plan plan;
  plan.max_dropped_mass = 0.05F;
  const HeadCertificate unknown = Certificate(Level::kDeterministic, 0.5);
  const absl::Status status = BoundNotMet(0, plan, {unknown});
  EXPECT_EQ(Metadata(status, "limit"), "max_dropped_mass");
  EXPECT_EQ(Metadata(status, "max_output_error"), "");
  plan = Plan();
  plan.max_output_error = 0.1F;
  EXPECT_EQ(Metadata(BoundNotMet(0, plan, {unknown}), "limit"), "max_output_error");
  EXPECT_EQ(Metadata(BoundNotMet(0, plan, {unknown}), "output_error_relative_upper"), "inf");
}

}  // namespace
}  // namespace kvservice
