// Distributions over a vocabulary, from float32 logits: what a step of the closed-loop study
// compares, for every contender. Terms are float32, sums are double. Pure; any thread.

#ifndef KVSERVICE_TESTS_EVAL_DISTRIBUTION_H_
#define KVSERVICE_TESTS_EVAL_DISTRIBUTION_H_

#include <cstdint>

#include "absl/types/span.h"

namespace kvservice::eval {

struct LogSum {
  double value = 0.0;  // ln of the sum of e^logits
  uint32_t best = 0;   // index of the largest logit, the first of equals
};

// Requires finite logits, at least one.
LogSum LogSumOf(absl::Span<const float> logits);

// out[i] = e^(logits[i] - log_sum), at most 1.
void Normalise(absl::Span<const float> logits, double log_sum, float* out);

// KL(p || q) in nats. p: as Normalise made it of p_logits; the log sums are those of the logits.
// Rounding can make it slightly negative.
double Divergence(absl::Span<const float> p, absl::Span<const float> p_logits, double p_log_sum,
                  absl::Span<const float> q_logits, double q_log_sum);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_DISTRIBUTION_H_
