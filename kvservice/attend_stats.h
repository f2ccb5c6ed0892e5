// Running totals of what Attend calls did, of one sequence or of the whole engine. Ratios carry
// both of their parts; sums that are bounds are rounded up. Plain data; one thread writes.

#ifndef KVSERVICE_KVSERVICE_ATTEND_STATS_H_
#define KVSERVICE_KVSERVICE_ATTEND_STATS_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "attention/certificate.h"
#include "attention/device.h"

namespace kvservice {

inline constexpr size_t kLevelCount = 4;
inline constexpr size_t kActionCount = 5;

// Upper ends of the classes in which certified masses are counted: the first holds what dropped
// nothing, the last everything that says no more than "at most all".
inline constexpr std::array<double, 12> kDroppedMassBounds = {0.0,  1e-4, 1e-3, 2e-3, 5e-3, 0.01,
                                                              0.02, 0.05, 0.1,  0.2,  0.5,  1.0};

// Index of the class that a mass belongs to; the last class also takes NaN, which no bound is.
size_t DroppedMassClass(double dropped_mass);

struct AttendStats {
  uint64_t attend_rows = 0;
  // Per (row, KV head): how many there were, how many scanned to choose, how many were answered
  // densely.
  uint64_t groups = 0;
  uint64_t groups_scanned = 0;
  uint64_t groups_dense = 0;
  uint64_t tokens_read = 0;
  uint64_t tokens_visible = 0;
  // Tokens sampled: keys alone, and keys with values.
  uint64_t keys_sampled = 0;
  uint64_t rows_sampled = 0;
  // Scans of KV heads for prompt queries that became anchors (kvservice/seed_queries.h): work that
  // no row asked for, counted nowhere else.
  uint64_t anchor_seed_scans = 0;
  // Per (query token, query head): all certificates, those of level confidence and above, the sum
  // and the largest of the latters' upper bounds.
  uint64_t certificates = 0;
  uint64_t certificates_proven = 0;
  double dropped_mass_upper_sum = 0.0;
  double dropped_mass_upper_max = 0.0;
  // Sum over certificates of their failure probabilities (union bound), rounded up.
  double failure_probability_sum = 0.0;
  // By Level and by Action.
  std::array<uint64_t, kLevelCount> by_level{};
  std::array<uint64_t, kActionCount> by_action{};
  // All certificates by kDroppedMassBounds: counts[i] of those at most bounds[i] and above the
  // bound before it.
  std::array<uint64_t, kDroppedMassBounds.size()> dropped_mass_counts{};
};

// tokens_visible: what dense attention would have read.
void AddGroup(const GroupReport& group, uint64_t tokens_visible, AttendStats* stats);
void AddCertificate(const HeadCertificate& certificate, AttendStats* stats);
// What was counted apart.
void AddStats(const AttendStats& from, AttendStats* to);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ATTEND_STATS_H_
