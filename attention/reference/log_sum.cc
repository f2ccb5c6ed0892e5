#include "attention/reference/log_sum.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kvservice::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double Largest(absl::Span<const double> logits) {
  double top = kLogZero;
  for (const double x : logits) top = std::max(top, x);
  return top;
}

// sum exp(x - top), which is at least 1 because top is among them.
double ScaledSum(absl::Span<const double> logits, double top) {
  double sum = 0.0;
  for (const double x : logits) sum += std::exp(x - top);
  return sum;
}

// Relative error of ScaledSum. Each term is off by less than 2^-52 (the difference's rounding times
// x e^-x < 1 / 2, and exp's ulp; what underflows is less than that), which is relative because the
// sum is at least 1; n additions round.
double SumError(absl::Span<const double> logits) {
  return (static_cast<double>(logits.size()) + 8.0) * 0x1p-51;
}

}  // namespace

double LogSum(absl::Span<const double> logits) {
  for (const double x : logits) {
    if (std::isnan(x)) return x;
  }
  const double top = Largest(logits);
  if (top == kLogZero) return kLogZero;
  return top + std::log(ScaledSum(logits, top));
}

LogMassUpper LogSumUpper(absl::Span<const double> logits) {
  for (const double x : logits) {
    if (!(x < kInfinity)) return {kInfinity};
  }
  const double top = Largest(logits);
  if (top == kLogZero) return {kLogZero};
  const double sum = ScaledSum(logits, top) * (1.0 + SumError(logits));
  return {WidenUp(top + LogOfUpper(sum).value)};
}

LogMassLower LogSumLower(absl::Span<const double> logits) {
  double top = kLogZero;
  for (const double x : logits) {
    if (x < kInfinity) top = std::max(top, x);
  }
  if (top == kLogZero) return {kLogZero};
  double sum = 0.0;
  for (const double x : logits) {
    if (x < kInfinity) sum += std::exp(x - top);
  }
  return {WidenDown(top + LogOfLower(sum * (1.0 - SumError(logits))).value)};
}

}  // namespace kvservice::reference
