#include "attention/output_error.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>

#include "attention/rounding.h"

namespace kvservice {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// How a compensation spends its failure probability.
constexpr double kVectorShare = 0.75;
constexpr double kDroppedUpperShare = 0.125;
constexpr double kDroppedLowerShare = 0.125;
// What double arithmetic may lose in a mean of up to 2^20 vectors of norm at most 1 with up to 2^10
// channels, and in its scaling.
constexpr double kMeanRoundoff = 0x1p-30;
// The same for one sum of squares over the channels, relative.
constexpr double kNormRoundoff = 0x1p-40;

// The mixture of VectorMeanRadius: l, psi(l), ln of its share. Dense where V is small against
// ln(2/eta), as it is for 128 draws of well-bounded tokens; within 6 % of the best l for V up to
// 100 times larger.
struct Rate {
  double l;
  double psi;  // -ln(1 - l) - l
  double log_share;
};
const std::array<Rate, 5> kRates{{
    {0.93, 1.7292600369327786, -1.3862943611198906},  // .25
    {0.80, 0.8094379124341005, -1.2039728043259361},  // .30
    {0.62, 0.3475840262617056, -1.3862943611198906},  // .25
    {0.40, 0.1108256237659907, -1.8971199848858813},  // .15
    {0.20, 0.0231435513142098, -2.9957322735539910},  // .05
}};
// Excess of ln C that covers the roundings of its evaluation.
constexpr double kLogSlack = 1e-6;
constexpr double kLn2 = 0.693147180559945309;
constexpr int kNewtonStepsMax = 50;

// An upper bound of a computed sum of `count` rounded non-negative terms, and a lower one.
double SumUp(double sum, size_t count) {
  return sum * (1.0 + static_cast<double>(count + 8) * 0x1p-52);
}
double SumDown(double sum, size_t count) {
  return std::max(0.0, sum * (1.0 - static_cast<double>(count + 8) * 0x1p-52));
}

// f(z(f)): every z at its upper end where its bound exceeds f, else at its lower end.
double ShareAt(absl::Span<const BoundedWeight> terms, double base, double f) {
  double numerator = 0.0;
  double denominator = base;
  for (const BoundedWeight& term : terms) {
    const double z = term.bound > f ? term.upper : term.lower;
    numerator += term.bound * z;
    denominator += z;
  }
  return numerator / denominator;
}

// f + max(0, G) / (base + L_D), rounded up.
double ShareBoundFrom(absl::Span<const BoundedWeight> terms, double base, double f) {
  double gain = 0.0;
  double loss = f * base;
  double least = base;
  for (const BoundedWeight& term : terms) {
    const double above = term.bound - f;
    if (above > 0.0) {
      gain += above * term.upper;
    } else {
      loss -= above * term.lower;
    }
    least += term.lower;
  }
  const double excess = SumUp(gain, terms.size()) - SumDown(loss, terms.size());
  if (!(excess > 0.0)) return NextUp(f);
  // The difference is rounded relative to itself; 2^-50 of it covers that and the quotient.
  return AddUp(f, DivideUp(excess * (1.0 + 0x1p-50), SumDown(least, terms.size())));
}

// ln sum_l pi_l cosh(l x) exp(-psi V), and its derivative.
struct LogCapital {
  double value;
  double slope;
};
LogCapital VectorCapital(double x, double squares) {
  std::array<double, kRates.size()> logs;
  double top = kLogZero;
  for (size_t k = 0; k < kRates.size(); ++k) {
    const double lx = kRates[k].l * x;
    logs[k] =
        kRates[k].log_share + lx + std::log1p(std::exp(-2.0 * lx)) - kLn2 - kRates[k].psi * squares;
    top = std::max(top, logs[k]);
  }
  double sum = 0.0;
  double slope = 0.0;
  for (size_t k = 0; k < kRates.size(); ++k) {
    const double part = std::exp(logs[k] - top);
    sum += part;
    slope += part * kRates[k].l * std::tanh(kRates[k].l * x);
  }
  return {top + std::log(sum), slope / sum};
}

}  // namespace

// ---- Without samples ----------------------------------------------------------------------------

double LargestShareOf(absl::Span<const BoundedWeight> terms, double base) {
  constexpr int kStepsMax = 64;
  double bound_max = 0.0;
  for (const BoundedWeight& term : terms) {
    if (std::isnan(term.bound) || std::isnan(term.lower) || std::isnan(term.upper)) {
      return kInfinity;
    }
    if (term.upper > 0.0) bound_max = std::max(bound_max, term.bound);
  }
  if (!(base >= 0.0)) return kInfinity;
  double f = 0.0;
  for (int step = 0; step < kStepsMax; ++step) {
    const double next = ShareAt(terms, base, f);
    if (!(next > f) || std::isinf(next)) break;
    f = next;
  }
  const double share = ShareBoundFrom(terms, base, f);
  // A weighted mean of the bounds and of zero is never above the largest of them.
  return share < bound_max ? share : bound_max;
}

// ---- Mean of vectors from a sample --------------------------------------------------------------

void VectorMeanRadius::Add(double squared_norm_upper) {
  assert(!(squared_norm_upper < 0.0));
  squares_ = AddUp(squares_, squared_norm_upper < 1.0 ? squared_norm_upper : 1.0);
  ++count_;
}

double VectorMeanRadius::Radius(double eta) const {
  assert(eta > 0.0 && eta < 1.0);
  if (count_ == 0) return kInfinity;
  const double target = kLogSlack - std::log(eta);
  // x = m r. Each l alone gives an end that is high enough, as cosh x >= e^x / 2.
  double x = kInfinity;
  for (const Rate& rate : kRates) {
    x = std::min(x, (target + kLn2 - rate.log_share + rate.psi * squares_) / rate.l);
  }
  // ln C is convex and rises with x, so Newton's iteration falls towards the crossing from above.
  for (int step = 0; step < kNewtonStepsMax; ++step) {
    const LogCapital at = VectorCapital(x, squares_);
    const double next = x - (at.value - target) / at.slope;
    if (!(next < x) || !(VectorCapital(next, squares_).value >= target)) break;
    const bool done = x - next < 0x1p-20 * x;
    x = next;
    if (done) break;
  }
  return DivideUp(x, static_cast<double>(count_));
}

// ---- Compensation -------------------------------------------------------------------------------

uint32_t ProposalScale(double value_bound, double value_bound_max) {
  assert(value_bound >= 0.0 && value_bound <= value_bound_max && value_bound_max > 0.0);
  const double scale =
      std::ceil(DivideUp(static_cast<double>(kProposalScaleMax) * value_bound, value_bound_max));
  return static_cast<uint32_t>(std::clamp(scale, static_cast<double>(kProposalScaleMin),
                                          static_cast<double>(kProposalScaleMax)));
}

void Compensation::Begin(uint32_t head_dim, const Proposals& proposals, uint32_t draws_max) {
  assert(proposals.sum > 0 && proposals.value_bound > 0.0);
  assert(proposals.scale_min >= 1 && proposals.scale_min <= kProposalScaleMax);
  proposals_ = proposals;
  radius_ = VectorMeanRadius();
  mean_upper_.Begin(draws_max);
  mean_rest_upper_.Begin(draws_max);
  sum_.assign(head_dim, 0.0);
  weight_sum_ = 0.0;
  weight_error_ = 0.0;
}

void Compensation::Add(uint64_t proposal, const DrawnWeight& weight, const float* value,
                       const float* center) {
  assert(proposal > 0);
  const double up = DivideUp(weight.upper, DoubleDown(proposal));
  const double down = DivideDown(weight.lower, DoubleUp(proposal));
  const double nearest = weight.nearest / static_cast<double>(proposal);
  const double scale = static_cast<double>(kProposalScaleMax) / proposals_.value_bound;
  double squares = 0.0;  // ||v - o_S||^2
  for (size_t c = 0; c < sum_.size(); ++c) {
    const double difference = static_cast<double>(value[c]) - static_cast<double>(center[c]);
    squares += difference * difference;
    sum_[c] += nearest * scale * difference;
  }
  const double distance = std::sqrt(squares) * scale * (1.0 + kNormRoundoff);
  radius_.Add(MultiplyUp(up * distance, up * distance) * (1.0 + kNormRoundoff));
  weight_sum_ += nearest;
  weight_error_ += std::max(up - nearest, nearest - down) * distance * (1.0 + kNormRoundoff);
  // Y = z kmin / T.
  const auto scale_min = static_cast<double>(proposals_.scale_min);
  mean_upper_.Add(MultiplyUp(up, scale_min));
  mean_rest_upper_.Add(NextUp(std::max(0.0, 1.0 - MultiplyDown(down, scale_min))));
}

void Compensation::SetDroppedRange(const CompensatedMasses& masses, double eta,
                                   CompensationResult* result) const {
  // Z_D = E Y * sum T / kmin.
  const auto scale_min = static_cast<double>(proposals_.scale_min);
  const double up = MultiplyUp(mean_upper_.UpperBound(kDroppedUpperShare * eta),
                               DivideUp(DoubleUp(proposals_.sum), scale_min));
  const double rest = mean_rest_upper_.UpperBound(kDroppedLowerShare * eta);
  const double down = MultiplyDown(NextDown(std::max(0.0, 1.0 - rest)),
                                   DivideDown(DoubleDown(proposals_.sum), scale_min));
  result->dropped_lower.value = std::max(down, masses.dropped_lower.value);
  result->dropped_upper.value = std::min(up, masses.dropped_upper.value);
  // Ranges without a common point: the sample is one of the eta. Keep what always holds.
  if (!(result->dropped_lower.value <= result->dropped_upper.value)) {
    result->dropped_lower = masses.dropped_lower;
    result->dropped_upper = masses.dropped_upper;
  }
}

CompensationResult Compensation::Finish(const CompensatedMasses& masses, double eta,
                                        double* correction) const {
  assert(eta > 0.0 && eta < 1.0);
  CompensationResult result;
  std::fill_n(correction, sum_.size(), 0.0);
  SetDroppedRange(masses, eta, &result);
  if (count() == 0) return result;

  const auto draws = static_cast<double>(count());
  result.dropped = weight_sum_ / draws * static_cast<double>(proposals_.sum);
  const double total = masses.kept + result.dropped;  // t^
  const double scale = static_cast<double>(kProposalScaleMax);
  const double weight = MultiplyUp(DoubleUp(proposals_.sum), proposals_.value_bound / scale);  // Wt
  double squares = 0.0;
  for (size_t c = 0; c < sum_.size(); ++c) {
    correction[c] = sum_[c] / draws * weight / total;
    squares += correction[c] * correction[c];
  }
  const double moved = std::sqrt(squares) * (1.0 + kNormRoundoff);  // ||o - o_S||
  const double sampling =
      radius_.Radius(kVectorShare * eta) + SumUp(weight_error_, count()) / draws + kMeanRoundoff;
  const double radius = weight * sampling * (1.0 + kNormRoundoff);  // rN

  const double low = AddDown(masses.kept_lower.value, result.dropped_lower.value);
  const double high = AddUp(masses.kept_upper.value, result.dropped_upper.value);
  // Errors of t^ - t are of the size 2^-53 (t^ + t).
  const auto error_at = [&](double t) {
    const double miss = std::fabs(total - t) + 0x1p-51 * (total + t);
    return (radius + moved * miss) / t * (1.0 + kNormRoundoff);
  };
  const double at_low = error_at(low);
  const double at_high = std::isinf(high) ? moved * (1.0 + kNormRoundoff) : error_at(high);
  if (!std::isnan(at_low) && !std::isnan(at_high)) result.error_upper = std::max(at_low, at_high);
  return result;
}

// ---- Merging ------------------------------------------------------------------------------------

OutputPart OutputPartOf(const HeadCertificate& certificate, double lse, double distance) {
  OutputPart part;
  part.mass_lower = Add(certificate.log_kept_lower, certificate.log_dropped_lower);
  part.mass_log = lse;
  part.mass_upper = Add(certificate.log_kept_upper, certificate.log_dropped_upper);
  part.error = certificate.output_error_upper;
  part.distance = distance;
  return part;
}

double MergedOutputError(absl::Span<const OutputPart> parts) {
  // Roundings of weights and masses, which are relative to the largest mass.
  constexpr double kRoundoff = 0x1p-44;
  double top = kLogZero;
  for (const OutputPart& part : parts) top = std::max(top, part.mass_upper.value);
  if (top == kLogZero) return 0.0;
  if (!std::isfinite(top)) return kInfinity;

  std::vector<BoundedWeight> masses;
  double sum = 0.0;
  for (const OutputPart& part : parts) {
    masses.push_back({part.error,
                      std::exp(WidenDown(part.mass_lower.value - top)) * (1.0 - kRoundoff),
                      std::exp(WidenUp(part.mass_upper.value - top)) * (1.0 + kRoundoff)});
    sum += std::exp(part.mass_log - top);
  }
  if (!(sum > 0.0)) return kInfinity;
  double shift = 0.0;  // sum_j max |w*_j - w_j| distance_j
  for (size_t j = 0; j < parts.size(); ++j) {
    double others_lower = 0.0;
    double others_upper = 0.0;
    for (size_t k = 0; k < parts.size(); ++k) {
      if (k == j) continue;
      others_lower += masses[k].lower;
      others_upper += masses[k].upper;
    }
    const double weight = std::exp(parts[j].mass_log - top) / sum;
    const double least = masses[j].lower > 0.0 ? 1.0 / (1.0 + others_upper / masses[j].lower) : 0.0;
    const double most = masses[j].upper > 0.0 ? 1.0 / (1.0 + others_lower / masses[j].upper) : 0.0;
    const double change = std::max(most - weight, weight - least) + kRoundoff;
    shift += std::clamp(change, 0.0, 1.0) * parts[j].distance;
  }
  const double error = SumUp(LargestShareOf(masses, 0.0) + shift, parts.size() + 8);
  return std::isnan(error) ? kInfinity : error;
}

}  // namespace kvservice
