#include "attention/certificate.h"

#include <algorithm>
#include <cmath>

#include "attention/rounding.h"

namespace kvservice {
namespace {

bool HasNan(const HeadCertificate& c) {
  return std::isnan(c.log_kept) || std::isnan(c.log_kept_lower.value) ||
         std::isnan(c.log_kept_upper.value) || std::isnan(c.log_dropped_upper.value) ||
         std::isnan(c.log_dropped_lower.value);
}

// ln(e^a + e^b) to nearest.
double LogAdd(double a, double b) {
  const double top = std::max(a, b);
  if (std::isinf(top)) return top;
  return top + std::log1p(std::exp(std::min(a, b) - top));
}

// ln of the estimated dropped mass, NaN when there is no estimate.
double LogDroppedEstimate(const HeadCertificate& c) {
  if (c.log_dropped_upper.value == kLogZero) return kLogZero;
  if (!(c.dropped_mass_estimate >= 0.0F)) return std::numeric_limits<double>::quiet_NaN();
  const double share = c.dropped_mass_estimate;
  return c.log_kept + std::log(share) - std::log1p(-share);
}

float MergeEstimate(const HeadCertificate& a, const HeadCertificate& b) {
  const double dropped_a = LogDroppedEstimate(a);
  const double dropped_b = LogDroppedEstimate(b);
  if (std::isnan(dropped_a) || std::isnan(dropped_b)) return -1.0F;
  const double dropped = LogAdd(dropped_a, dropped_b);
  if (dropped == kLogZero) return 0.0F;
  return static_cast<float>(1.0 / (1.0 + std::exp(LogAdd(a.log_kept, b.log_kept) - dropped)));
}

// A dense part says nothing about how the other part was answered.
Action MergeAction(Action a, Action b) {
  if (a == Action::kDense) return b;
  if (b == Action::kDense) return a;
  return std::max(a, b);
}

}  // namespace

void FinishCertificate(HeadCertificate* certificate) {
  if (HasNan(*certificate)) {
    certificate->level = Level::kNone;
    certificate->dropped_mass_upper = {1.0};
    certificate->dropped_mass_lower = {0.0};
    return;
  }
  certificate->dropped_mass_upper =
      DroppedMass(certificate->log_dropped_upper, certificate->log_kept_lower);
  certificate->dropped_mass_lower =
      DroppedMass(certificate->log_dropped_lower, certificate->log_kept_upper);
}

double RelativeOutputError(const HeadCertificate& certificate) {
  const double error = certificate.output_error_upper;
  if (error == 0.0) return 0.0;
  // A norm of zero (or NaN) leaves nothing to compare with.
  if (!(certificate.value_norm_lower > 0.0)) return std::numeric_limits<double>::infinity();
  return DivideUp(error, certificate.value_norm_lower);
}

HeadCertificate Merge(const HeadCertificate& a, const HeadCertificate& b) {
  HeadCertificate merged;
  merged.level = std::min(a.level, b.level);
  merged.action = MergeAction(a.action, b.action);
  // Each part within the limit keeps the whole within it: the merged share is a weighted mean of
  // the parts' shares.
  merged.met = a.met && b.met;
  merged.log_kept = LogAdd(a.log_kept, b.log_kept);
  merged.log_kept_lower = Add(a.log_kept_lower, b.log_kept_lower);
  merged.log_kept_upper = Add(a.log_kept_upper, b.log_kept_upper);
  merged.log_dropped_upper = Add(a.log_dropped_upper, b.log_dropped_upper);
  merged.log_dropped_lower = Add(a.log_dropped_lower, b.log_dropped_lower);
  merged.dropped_mass_estimate = MergeEstimate(a, b);
  merged.value_norm_lower = std::max(a.value_norm_lower, b.value_norm_lower);
  merged.keys_sampled = a.keys_sampled + b.keys_sampled;
  merged.rows_sampled = a.rows_sampled + b.rows_sampled;
  const double failure = a.failure_probability + b.failure_probability;
  merged.failure_probability = failure == 0.0 ? 0.0 : std::min(1.0, std::nextafter(failure, 2.0));
  if (HasNan(a) || HasNan(b)) merged.log_kept = std::numeric_limits<double>::quiet_NaN();
  FinishCertificate(&merged);
  return merged;
}

}  // namespace kvservice
