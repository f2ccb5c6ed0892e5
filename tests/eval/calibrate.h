// Calibration of CPE for a model: which similarity suffices to share a choice, per layer and KV
// head, and how much of the past a layer may hide (PSAW) or take from a shallower layer (ETF).
//
// Texts are decoded closed-loop under a ladder of uniform settings, and the error of each KV head's
// output is compared with that of scanning every step under the same budget. Damage is the growth
// of the mean squared relative output error: squares, because the worst steps decide, not the mean.
//
//   sharing   Per KV head one cosine of the ladder. All together scan as little as possible while
//             the sum of their damages stays at that of a uniform cosine (Lagrange: a head takes the
//             cosine that minimises scans + lambda * damage).
//   hiding, freezing
//             Per layer the largest share of the ladder whose damage is at most a small part of the
//             error that the budget itself causes.

#ifndef KVSERVICE_TESTS_EVAL_CALIBRATE_H_
#define KVSERVICE_TESTS_EVAL_CALIBRATE_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "selector/policy.h"
#include "tests/eval/quality_study.h"

namespace kvservice::eval {

struct CalibrationOptions {
  uint32_t budget_tokens = 512;
  // The uniform cosine whose damage is allowed.
  float damage_of_cosine = 0.8F;
  // Part of the budget's own squared error that hiding or freezing may add in a layer.
  double edit_damage = 0.05;
};

// What one setting did, per sparse layer and KV head.
struct HeadProfile {
  std::vector<double> scans;   // Share of the steps that scanned.
  std::vector<double> damage;  // Mean squared relative output error beyond that of scanning.
};

// Index into `ladder` per head: least scans in all at a sum of damages of at most `damage_max`.
// Ties go to the later entry. Requires that the last entry does no damage, or little.
std::vector<size_t> ChooseByLagrange(absl::Span<const HeadProfile> ladder, double damage_max);

// setups: texts of one model, prefilled.
absl::StatusOr<Policy> Calibrate(const CalibrationOptions& options, const QualityOptions& quality,
                                 absl::Span<const LoopSetup> setups);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_CALIBRATE_H_
