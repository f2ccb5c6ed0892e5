#include "kvservice/attend_stats.h"

#include <algorithm>

#include "attention/rounding.h"

namespace kvservice {

size_t DroppedMassClass(double dropped_mass) {
  size_t index = 0;
  while (index + 1 < kDroppedMassBounds.size() && !(dropped_mass <= kDroppedMassBounds[index])) {
    ++index;
  }
  return index;
}

void AddGroup(const GroupReport& group, uint64_t tokens_visible, AttendStats* stats) {
  ++stats->groups;
  stats->groups_scanned += group.scanned ? 1 : 0;
  stats->groups_dense += group.action == Action::kDense ? 1 : 0;
  stats->tokens_read += group.tokens_read;
  stats->tokens_visible += tokens_visible;
  stats->keys_sampled += group.keys_sampled;
  stats->rows_sampled += group.rows_sampled;
}

void AddCertificate(const HeadCertificate& certificate, AttendStats* stats) {
  const double dropped = certificate.dropped_mass_upper.value;
  ++stats->certificates;
  ++stats->by_level[static_cast<size_t>(certificate.level)];
  ++stats->by_action[static_cast<size_t>(certificate.action)];
  ++stats->dropped_mass_counts[DroppedMassClass(dropped)];
  stats->failure_probability_sum =
      AddUp(stats->failure_probability_sum, certificate.failure_probability);
  if (certificate.level < Level::kConfidence) return;
  ++stats->certificates_proven;
  stats->dropped_mass_upper_sum = AddUp(stats->dropped_mass_upper_sum, dropped);
  stats->dropped_mass_upper_max = std::max(stats->dropped_mass_upper_max, dropped);
}

void AddStats(const AttendStats& from, AttendStats* to) {
  to->attend_rows += from.attend_rows;
  to->groups += from.groups;
  to->groups_scanned += from.groups_scanned;
  to->groups_dense += from.groups_dense;
  to->tokens_read += from.tokens_read;
  to->tokens_visible += from.tokens_visible;
  to->keys_sampled += from.keys_sampled;
  to->rows_sampled += from.rows_sampled;
  to->anchor_seed_scans += from.anchor_seed_scans;
  to->certificates += from.certificates;
  to->certificates_proven += from.certificates_proven;
  to->dropped_mass_upper_sum = AddUp(to->dropped_mass_upper_sum, from.dropped_mass_upper_sum);
  to->dropped_mass_upper_max = std::max(to->dropped_mass_upper_max, from.dropped_mass_upper_max);
  to->failure_probability_sum = AddUp(to->failure_probability_sum, from.failure_probability_sum);
  const auto add = [](const auto& counts, auto* sums) {
    for (size_t i = 0; i < counts.size(); ++i) (*sums)[i] += counts[i];
  };
  add(from.by_level, &to->by_level);
  add(from.by_action, &to->by_action);
  add(from.dropped_mass_counts, &to->dropped_mass_counts);
}

}  // namespace kvservice
