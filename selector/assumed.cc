#include "selector/assumed.h"

#include <algorithm>
#include <cmath>

namespace kvservice {
namespace {

// NaN says as little as 1.
double AtMostOne(double x) { return x < 1.0 ? std::max(x, 0.0) : 1.0; }

}  // namespace

double TotalVariationBound(double oscillation) {
  return AtMostOne(std::tanh(std::fabs(oscillation) / 4.0));
}

double TransferredExcess(double oscillation) {
  return AtMostOne(2.0 * TotalVariationBound(oscillation));
}

double QueryDistance(double a, double b, double cosine) {
  const double apart = a - b;
  return std::sqrt(std::max(0.0, apart * apart + 2.0 * a * b * (1.0 - cosine)));
}

double AssumedSharingExcess(double key_norm_max, double query_distance, double scale) {
  return TransferredExcess(2.0 * key_norm_max * query_distance * scale);
}

double AssumedHiddenMass(double decay_scale, double decay_rate, double visible_tokens) {
  return AtMostOne(decay_scale * std::exp(-decay_rate * visible_tokens));
}

double AssumedFreezingExcess(double logit_drift) { return TransferredExcess(2.0 * logit_drift); }

double MutualInformationBoundNats(MassUpper dropped_mass, uint64_t token_count) {
  if (token_count == 0) return 0.0;
  const auto tokens = static_cast<double>(token_count);
  // g rises up to d = N / (N + 1), where it is ln(N + 1). NaN is taken there as well.
  const double d = std::max(dropped_mass.value, 0.0);
  if (!(d < tokens / (tokens + 1.0))) return WidenUp(std::log1p(tokens));
  if (d == 0.0) return 0.0;
  return WidenUp(WidenUp(-d * std::log(d)) + WidenUp(-(1.0 - d) * std::log1p(-d)) +
                 WidenUp(d * std::log(tokens)));
}

}  // namespace kvservice
