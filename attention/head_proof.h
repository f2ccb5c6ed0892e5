// How one query head gets its certificate: what holds always, then samples, then growing, round by
// round, until the limits of the plan are proven or the caller of this file gives up and reads
// everything. Certificate specification section 3, steps 3 to 6. Devices differ in how they know
// masses and read tokens (DroppedTokens); the order of things, the spending of the failure
// probability and the choice among bounds is here, once.
//
// A round: the device reads some tokens of the KV head and calls Prove for each of its heads. If
// some head still wants tokens, the device reads those too and calls Prove again with what they
// weighed.
//
// One thread per object.

#ifndef KVSERVICE_ATTENTION_HEAD_PROOF_H_
#define KVSERVICE_ATTENTION_HEAD_PROOF_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "absl/types/span.h"
#include "attention/certificate.h"
#include "attention/draws.h"
#include "attention/growing.h"
#include "attention/plan.h"
#include "attention/sample_head.h"

namespace kvservice {

// What is known of one head after its KV head has read a set S of tokens, all masses in real
// arithmetic: the device's own rounding is inside the bounds.
struct HeadEvidence {
  double log_kept = kLogZero;  // nearest
  LogMassLower kept_lower;
  LogMassUpper kept_upper;
  // What S leaves out, from sketches (Level::kDeterministic) or from keys (Level::kExact).
  // Level::kNone: nothing is known, the two masses are not read.
  Level level = Level::kNone;
  LogMassUpper dropped_upper;
  LogMassLower dropped_lower;
  double log_dropped_estimate = std::numeric_limits<double>::quiet_NaN();  // NaN = none
  // The output over S as computed, [head_dim], and how far it may be from the exact one.
  const float* output = nullptr;
  double arithmetic_error = std::numeric_limits<double>::infinity();
  // Bounds of the largest norm of a value that the KV head sees.
  double value_norm_lower = 0.0;
  double value_norm_upper = std::numeric_limits<double>::infinity();
};

// The tokens that a head left out, as a device can read them.
class DroppedTokens {
 public:
  virtual ~DroppedTokens() = default;
  // Integer weights of all of them, borrowed until the next call; nullptr if one has no finite
  // bound.
  virtual const Population* Weigh() = 0;
  // At least ||v||, [page_count][64] like the population's weights; read where those are not zero.
  virtual void BoundValues(const Population& population, std::vector<float>* bounds) = 0;
  // Their exact weights in units of 2^-30 e^ref; with values not null also V,
  // [positions][head_dim].
  virtual void Read(absl::Span<const uint32_t> positions, double ref,
                    absl::Span<DrawnWeight> weights, float* values) = 0;
};

class HeadProof {
 public:
  // kv_head, query_head and query_token name the head within its row and key: no two heads of a row
  // draw the same random numbers.
  void Begin(const Plan& plan, uint32_t head_dim, std::span<const std::byte, kDrawKeyBytes> key,
             const DrawStream& stream);

  // Proves what can be proven with S as it is; `moved` is the exact mass of the tokens that were
  // read since the last call (nothing in the first). draws_max: keys that may be sampled. Samples
  // only where the plan proves with kConfidence and limits are not met without.
  void Prove(const HeadEvidence& evidence, LogMassLower moved, uint32_t draws_max,
             DroppedTokens* tokens);

  // Everything but the action. Compensation sets that too.
  const HeadCertificate& certificate() const { return certificate_; }
  bool met() const { return certificate_.met; }
  // ln of the weight (sum of upper ends) that should be moved to S for the limits to hold, an
  // estimate; log zero when they do, +infinity if no amount is known to be enough.
  double log_wanted() const { return log_wanted_; }
  // Compensation of the output, to be added to it: [head_dim], empty without. The estimated mass
  // behind it is part of the answer's lse.
  absl::Span<const double> correction() const { return correction_; }
  double log_compensated() const { return log_compensated_; }

 private:
  void SetMasses(const HeadEvidence& evidence, const FrozenBound& bound, Level level);
  void SetOutputError(const HeadEvidence& evidence);
  void Judge();
  bool MassMet() const;
  bool OutputMet() const;
  bool WantsMassSample() const;
  void SampleTheMass(const HeadEvidence& evidence, uint32_t draws_max, DroppedTokens* tokens);
  void SampleTheOutput(const HeadEvidence& evidence, DroppedTokens* tokens);
  double WantedForMass() const;
  double WantedForOutput(const HeadEvidence& evidence) const;
  DrawStream StreamOf(DrawPurpose purpose, const FailureBudget& budget) const;

  Plan plan_;
  uint32_t head_dim_ = 0;
  std::array<std::byte, kDrawKeyBytes> key_;
  DrawStream stream_;
  FailureBudget mass_budget_{0.0};
  FailureBudget output_budget_{0.0};
  // The best sampled bound so far; there is none before the first sample.
  bool has_sample_ = false;
  FrozenBound sampled_;
  double ratio_ = 1.0;  // see MassSample
  HeadCertificate certificate_;
  double log_wanted_ = kLogZero;
  double log_compensated_ = kLogZero;
  std::vector<double> correction_;
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_HEAD_PROOF_H_
