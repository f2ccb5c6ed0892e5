// What a call promises about the tokens it did not attend, for one query token and one query head:
//
//     the reported upper bound is at least the exact softmax mass of all tokens below
//     attended_length that were not attended, with q as received and K as stored.
//
// Plain data; any thread. docs and derivations: certificate specification sections 3 and 4.

#ifndef KVSERVICE_ATTENTION_CERTIFICATE_H_
#define KVSERVICE_ATTENTION_CERTIFICATE_H_

#include <cstdint>

#include "attention/log_mass.h"

namespace kvservice {

// How strong a statement is, weakest first.
enum class Level : uint8_t {
  kNone,        // Says nothing; the bound is 1.
  kConfidence,  // Holds with probability at least 1 - failure_probability over the server's private
                // random numbers.
  kDeterministic,  // Always holds.
  kExact,          // The mass was computed (zero when everything was attended).
};

// How a head was answered.
enum class Action : uint8_t { kSelected, kReused, kGrown, kDense, kCompensated };

// Certificate of one query token and one query head.
struct HeadCertificate {
  Level level = Level::kNone;
  Action action = Action::kDense;
  // The limits of the plan hold by a statement of the level that was asked for. True when no limit
  // was set.
  bool met = true;
  // ln of the attended mass: nearest (the lse of the output), and rounded outward including the
  // device's arithmetic error.
  double log_kept = kLogZero;
  LogMassLower log_kept_lower;
  LogMassUpper log_kept_upper;
  // ln of the mass that was not attended; (-inf, -inf) when everything was.
  LogMassUpper log_dropped_upper{std::numeric_limits<double>::infinity()};
  LogMassLower log_dropped_lower;
  // Share of all attention that was not attended.
  MassUpper dropped_mass_upper;
  MassLower dropped_mass_lower;
  // The device's estimate of the same share. Not a bound, never used as one. Negative when there is
  // none.
  float dropped_mass_estimate = -1.0F;
  // ||o_dense - out||_2 in units of the values, rounded up, the device's arithmetic included, and a
  // lower bound of the largest value norm that the head's KV head sees. Infinity: nothing is known.
  double output_error_upper = std::numeric_limits<double>::infinity();
  double value_norm_lower = 0.0;
  // Probability that one of the statements is wrong: 0 unless something was sampled.
  double failure_probability = 0.0;
  // Sampled tokens over all rounds: those of which the key was read to bound the mass, and those of
  // which key and value were read to compensate.
  uint32_t keys_sampled = 0;
  uint32_t rows_sampled = 0;
};

// The output error relative to the largest value norm, as Plan::max_output_error limits it, rounded
// up; infinity when nothing is known.
double RelativeOutputError(const HeadCertificate& certificate);

// Fills the two dropped masses from the four log masses. Any NaN gives level kNone and the bound 1.
void FinishCertificate(HeadCertificate* certificate);

// Certificate of the union of two disjoint token sets (shards, or a worker's own window): masses of
// the same side add, failure probabilities add, the level is the weaker one. Source: certificate
// section 6, merging. The output error of a union depends on the parts' outputs, so it stays
// unknown here: MergedOutputError (attention/output_error.h) bounds it.
HeadCertificate Merge(const HeadCertificate& a, const HeadCertificate& b);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CERTIFICATE_H_
