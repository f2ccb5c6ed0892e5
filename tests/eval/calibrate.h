// Calibration of CPE for a model: which similarity suffices to share a choice, per layer and KV
// head, and how much of the past a layer may hide (PSAW) or take from a shallower layer (ETF).
//
// Texts are decoded closed-loop under a ladder of uniform settings, and the error of each KV head's
// output is compared with that of scanning every step under the same budget. Damage is the growth
// of the mean squared relative output error: squares, because the worst steps decide, not the mean.
//
//   sharing   Per KV head one least cosine of the ladder, under verified sharing. All together do as
//             little damage as possible while they scan no more than asked for (Lagrange: a head
//             takes the cosine that minimises damage + lambda * scans).
//   hiding, freezing
//             Per layer the largest share of the ladder up to which damage is at most a small part
//             of the error that the budget itself causes.

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
  // Share of (step, layer, KV head) that may scan on the profiled texts.
  double scans_max = 0.1;
  // Part of the budget's own squared error that hiding or freezing may add in a layer.
  double edit_damage = 0.05;
};

// What one setting did, per sparse layer and KV head.
struct HeadProfile {
  std::vector<double> scans;   // Share of the steps that scanned.
  std::vector<double> damage;  // Mean squared relative output error beyond that of scanning.
};

// Index into `ladder` per head: the sum of scans is at most scans_max, and no choice that scans as
// little does less damage. (One that uses up more of what is allowed may: of the choices on the
// convex hull this is the last that is allowed.) Ties go to the earlier entry. Where no choice
// keeps to it all heads get the first entry.
std::vector<size_t> ChooseByLagrange(absl::Span<const HeadProfile> ladder, double scans_max);

// Per layer, of `shares` (ascending, one per entry of the ladder) the one before the first that
// damages the layer by more than `edit_damage` times the squared errors of scanning, `scan_errors`
// [layer][kv_head]; 0 if the first does.
std::vector<float> ChooseShares(absl::Span<const HeadProfile> ladder,
                                absl::Span<const float> shares,
                                absl::Span<const double> scan_errors, size_t heads_per_layer,
                                double edit_damage);

// setups: texts of one model, prefilled.
absl::StatusOr<Policy> Calibrate(const CalibrationOptions& options, const QualityOptions& quality,
                                 absl::Span<const LoopSetup> setups);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_CALIBRATE_H_
