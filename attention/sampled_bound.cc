#include "attention/sampled_bound.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "attention/rounding.h"

namespace kvservice {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The bets th and their shares pi of the first unit of capital.
constexpr size_t kBets = 3;
constexpr double kBet[kBets] = {0.98, 0.80, 0.40};
constexpr double kBetShare[kBets] = {0.80, 0.15, 0.05};
// By how much ln C must exceed ln(1/eta): covers 2^-49 per factor, kDrawsMax of them, and the
// logarithms.
constexpr double kLogSlack = 1e-6;
constexpr double kLn2 = 0.693147180559945309;
// Relative width at which a search for a bound ends.
constexpr double kSearchWidth = 0x1p-20;
constexpr int kSearchStepsMax = 200;
// A factor lies in [2^-6, 2^54], so this many of them stay within the exponents of a double.
constexpr size_t kFactorsPerFold = 16;

using Pair = double __attribute__((vector_size(16)));
using PairBits = int64_t __attribute__((vector_size(16)));

Pair LoadPair(const double* from) { return Pair{from[0], from[1]}; }

// Positive normal numbers as mantissa in [1, 2) and power of two, two at a time.
struct ScaledPair {
  Pair mantissa = {1.0, 1.0};
  PairBits exponent = {0, 0};

  void Fold() {
    const auto bits = reinterpret_cast<PairBits>(mantissa);
    exponent += (bits >> 52) - 1023;
    mantissa = reinterpret_cast<Pair>((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000);
  }
};

// ln(sum_t pi_t product_t) of products that were folded, two pairs each.
double LogOfMixture(const ScaledPair (&products)[kBets][2]) {
  double mantissa[kBets];
  int64_t exponent[kBets];
  int64_t exponent_max = std::numeric_limits<int64_t>::min();
  for (size_t t = 0; t < kBets; ++t) {
    const Pair m = products[t][0].mantissa * products[t][1].mantissa;
    const PairBits e = products[t][0].exponent + products[t][1].exponent;
    mantissa[t] = kBetShare[t] * m[0] * m[1];
    exponent[t] = e[0] + e[1];
    exponent_max = std::max(exponent_max, exponent[t]);
  }
  double sum = 0.0;
  for (size_t t = 0; t < kBets; ++t) {
    const int64_t down = std::max<int64_t>(exponent[t] - exponent_max, -2000);
    sum += std::ldexp(mantissa[t], static_cast<int>(down));
  }
  return std::log(sum) + static_cast<double>(exponent_max) * kLn2;
}

}  // namespace

// Each step is widened: the difference that cancels no longer shows how large its terms were.

LogMassUpper LogMassOf(WeightUpper sum, double ref) {
  const double log = LogOfUpper(sum.value).value;
  if (std::isinf(log)) return {log};
  return {WidenUp(ref + WidenUp(log - kLnWeightsPerUnit))};
}

LogMassLower LogMassOf(WeightLower sum, double ref) {
  const double log = LogOfLower(sum.value).value;
  if (std::isinf(log)) return {log};
  return {WidenDown(ref + WidenDown(log - kLnWeightsPerUnit))};
}

WeightUpper WeightOf(LogMassUpper mass, double ref) {
  if (mass.value == kLogZero) return {0.0};
  const double weight = std::exp(WidenUp(WidenUp(mass.value - ref) + kLnWeightsPerUnit));
  return {std::isnan(weight) ? kInfinity : NextUp(weight * (1.0 + 0x1p-50))};
}

WeightLower WeightOf(LogMassLower mass, double ref) {
  const double weight = std::exp(WidenDown(WidenDown(mass.value - ref) + kLnWeightsPerUnit));
  return {weight > 0.0 ? NextDown(weight * (1.0 - 0x1p-50)) : 0.0};
}

double LargestDropped(double limit, WeightLower kept) {
  assert(limit >= 0.0);
  if (limit >= 1.0) return kInfinity;
  const double exact = DivideDown(MultiplyDown(limit, kept.value), NextUp(1.0 - limit));
  return exact * (1.0 - 0x1p-30);
}

// ---- BettingCapital -----------------------------------------------------------------------------

void BettingCapital::Begin(size_t draws_max) {
  assert(draws_max <= kDrawsMax);
  count_ = 0;
  cap_ = kInfinity;
  const size_t size = (draws_max + kLanes - 1) / kLanes * kLanes;
  gain_.assign(size, 1.0);
  width_.assign(size, 1.0);
  caps_.assign(size, kInfinity);
}

void BettingCapital::Add(double rest, double width, double cap) {
  assert(rest >= 0.0 && rest <= 1.0 && width > 0.0 && width <= cap);
  assert(count_ < gain_.size());
  gain_[count_] = rest * width;
  width_[count_] = width;
  caps_[count_] = cap;
  cap_ = std::min(cap_, cap);
  ++count_;
}

double BettingCapital::LogAt(double z) const {
  if (std::isnan(z)) return kLogZero;
  return z < cap_ ? LogAtBelowCap(z) : kInfinity;
}

double BettingCapital::LogAtBelowCap(double z) const {
  ScaledPair products[kBets][2];
  // Up to kLanes - 1 factors beyond the last draw are 1.
  const size_t size = (count_ + kLanes - 1) / kLanes * kLanes;
  for (size_t begin = 0; begin < size; begin += kFactorsPerFold * kLanes) {
    const size_t end = std::min(size, begin + kFactorsPerFold * kLanes);
    for (size_t j = begin; j < end; j += kLanes) {
      for (size_t half = 0; half < 2; ++half) {
        const size_t at = j + 2 * half;
        const Pair width = LoadPair(&width_[at]);
        const Pair below = LoadPair(&caps_[at]) - z;
        // (1 - w) / (1 - mu), with mu clamped at 0.
        const Pair ratio = LoadPair(&gain_[at]) / (below < width ? below : width);
        for (size_t t = 0; t < kBets; ++t) {
          products[t][half].mantissa *= (1.0 - kBet[t]) + kBet[t] * ratio;
        }
      }
    }
    for (auto& product : products) {
      product[0].Fold();
      product[1].Fold();
    }
  }
  return LogOfMixture(products);
}

bool BettingCapital::Reaches(double z, double eta) const {
  assert(eta >= 0.0 && eta < 1.0);
  return LogAt(z) >= kLogSlack - std::log(eta);
}

double BettingCapital::SmallestReaching(double eta, double high) const {
  assert(eta >= 0.0 && eta < 1.0 && high > 0.0 && high < kInfinity);
  const double target = kLogSlack - std::log(eta);
  double excess_high = LogAt(high) - target;
  if (!(excess_high >= 0.0) || count_ == 0 || std::isinf(target)) return high;

  // In t = -ln(1 - z / pole) the capital's logarithm is nearly a straight line of slope `count`.
  // The bracket is (z_low, z_high]: LogAt is below the target at the one and reaches it at the
  // other. A step aims at the crossing, a little to the side of the farther end.
  const double pole = cap_;
  double z_low = 0.0;
  double t_low = 0.0;
  double excess_low = LogAt(0.0) - target;
  double z_high = high;
  double t_high = -std::log1p(-high / pole);
  for (int step = 0; step < kSearchStepsMax && z_high - z_low > kSearchWidth * z_high; ++step) {
    const bool secant = std::isfinite(excess_high) && std::isfinite(t_high);
    const double slope =
        secant ? (excess_high - excess_low) / (t_high - t_low) : static_cast<double>(count_);
    double t = t_low - excess_low / slope;
    const double nudge = 0.25 * kSearchWidth * std::expm1(t);
    t += t_high - t > t - t_low ? nudge : -nudge;
    double z = -pole * std::expm1(-t);
    // Whatever goes wrong with the aim, halving ends the search.
    if (!(z > z_low && z < z_high) || step % 8 == 7) {
      z = z_low + (z_high - z_low) / 2;
      t = -std::log1p(-z / pole);
      if (!(z > z_low && z < z_high)) break;
    }
    const double excess = LogAt(z) - target;
    if (excess >= 0.0) {
      z_high = z;
      t_high = t;
      excess_high = excess;
    } else {
      z_low = z;
      t_low = t;
      excess_low = excess;
    }
  }
  return z_high;
}

// ---- SampledBound -------------------------------------------------------------------------------

void SampledBound::Begin(uint64_t weight_sum, uint32_t draws_max) {
  capital_.Begin(draws_max);
  remaining_ = weight_sum;
  exact_ = 0.0;
  cap_ = DoubleUp(weight_sum);
}

void SampledBound::Add(uint64_t weight, double exact_upper) {
  assert(weight > 0 && weight <= remaining_);
  assert(!(exact_upper < 0.0));
  const double exact = exact_upper < DoubleUp(weight) ? exact_upper : DoubleUp(weight);
  const double w = std::min(1.0, DivideUp(exact, DoubleDown(weight)));
  const double width = DoubleUp(remaining_);
  capital_.Add(1.0 - w, width, AddUp(exact_, width));
  remaining_ -= weight;
  exact_ = AddUp(exact_, exact);
  // Never above an earlier cap, whatever the roundings did.
  cap_ = std::min(cap_, AddUp(exact_, DoubleUp(remaining_)));
}

bool SampledBound::Certifies(double z, double eta) const {
  return z >= cap_ || capital_.Reaches(z, eta);
}

WeightUpper SampledBound::UpperBound(double eta) const {
  if (cap_ == 0.0) return {0.0};
  return {capital_.SmallestReaching(eta, cap_)};
}

// ---- MeanBound ----------------------------------------------------------------------------------

void MeanBound::Add(double number_upper) {
  assert(!(number_upper < 0.0));
  capital_.Add(number_upper < 1.0 ? 1.0 - number_upper : 0.0, 1.0, 1.0);
}

}  // namespace kvservice
