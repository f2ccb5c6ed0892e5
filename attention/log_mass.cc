#include "attention/log_mass.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

namespace kvservice {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Ulps by which a result of up to two libm calls and as many roundings is widened.
constexpr double kUlps = 8.0;
constexpr double kRelative = kUlps * DBL_EPSILON;

// a + ln(1 + e^(b - a)) to nearest, for finite a >= b. The difference b - a is off by |b - a|
// 2^-53, which moves the sum by less than 2^-54 because x e^-x < 1; exp, log1p and the last sum add
// two ulps of 1 and one of the result: WidenUp and WidenDown cover them.
double AddOrdered(double a, double b) { return a + std::log1p(std::exp(b - a)); }

}  // namespace

double WidenUp(double x) { return std::isfinite(x) ? x + kRelative * (std::fabs(x) + 1.0) : x; }

double WidenDown(double x) { return std::isfinite(x) ? x - kRelative * (std::fabs(x) + 1.0) : x; }

LogMassUpper Add(LogMassUpper a, LogMassUpper b) {
  if (std::isnan(a.value) || std::isnan(b.value)) return {kInfinity};
  if (a.value < b.value) std::swap(a, b);
  if (b.value == kLogZero || a.value == kInfinity) return a;
  return {WidenUp(AddOrdered(a.value, b.value))};
}

LogMassLower Add(LogMassLower a, LogMassLower b) {
  // An infinite lower bound cannot come from a sum that was rounded down; it is treated like NaN.
  if (!(a.value < kInfinity) || !(b.value < kInfinity)) return {kLogZero};
  if (a.value < b.value) std::swap(a, b);
  if (b.value == kLogZero) return a;
  return {WidenDown(AddOrdered(a.value, b.value))};
}

LogMassUpper LogOfUpper(double mass) {
  if (!(mass >= 0.0)) return {kInfinity};
  return {mass == 0.0 ? kLogZero : WidenUp(std::log(mass))};
}

LogMassLower LogOfLower(double mass) {
  if (!(mass > 0.0) || std::isinf(mass)) return {kLogZero};
  return {WidenDown(std::log(mass))};
}

MassUpper DroppedMass(LogMassUpper dropped, LogMassLower kept) {
  if (std::isnan(dropped.value) || std::isnan(kept.value) || dropped.value == kInfinity)
    return {1.0};
  if (dropped.value == kLogZero) return {0.0};
  // An infinite lower bound cannot come from a sum that was rounded down.
  if (std::isinf(kept.value)) return {1.0};
  // 1 / (1 + e^x) falls with x, so x goes down and what follows up. Widening x also covers the
  // relative error of e^x.
  const double x = WidenDown(kept.value - dropped.value);
  const double share = x > 0.0 ? std::exp(-x) / (1.0 + std::exp(-x)) : 1.0 / (1.0 + std::exp(x));
  return {std::min(1.0, std::max(DBL_MIN, share * (1.0 + kRelative)))};
}

MassLower DroppedMass(LogMassLower dropped, LogMassUpper kept) {
  if (std::isnan(dropped.value) || std::isnan(kept.value) || dropped.value == kInfinity)
    return {0.0};
  if (dropped.value == kLogZero || kept.value == kInfinity) return {0.0};
  if (kept.value == kLogZero) return {1.0};
  const double x = WidenUp(kept.value - dropped.value);
  const double share = x > 0.0 ? std::exp(-x) / (1.0 + std::exp(-x)) : 1.0 / (1.0 + std::exp(x));
  return {share < DBL_MIN ? 0.0 : share * (1.0 - kRelative)};
}

float RoundUpToFloat(double x) {
  if (std::isnan(x) || x > static_cast<double>(FLT_MAX))
    return std::numeric_limits<float>::infinity();
  if (x < -static_cast<double>(FLT_MAX)) return x == kLogZero ? static_cast<float>(x) : -FLT_MAX;
  const auto nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) >= x) return nearest;
  // The next float above; x is above `nearest`, which is neither an infinity nor -0 then.
  const auto bits = std::bit_cast<uint32_t>(nearest);
  return std::bit_cast<float>(nearest < 0.0F ? bits - 1 : bits + 1);
}

float RoundDownToFloat(double x) {
  if (std::isnan(x)) return -std::numeric_limits<float>::infinity();
  return -RoundUpToFloat(-x);
}

}  // namespace kvservice
