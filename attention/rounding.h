// Directed rounding of single double operations, for sums and quotients that make up a bound. IEEE
// round-to-nearest is assumed (the build refuses flags that break it); nothing here changes the
// rounding mode. Pure; any thread.

#ifndef KVSERVICE_ATTENTION_ROUNDING_H_
#define KVSERVICE_ATTENTION_ROUNDING_H_

#include <bit>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __FAST_MATH__
#error "Certificates need IEEE semantics: build without -ffast-math."
#endif

namespace kvservice {

// The next double above / below x >= 0; +infinity has none above it, zero none below; NaN stays.
inline double NextUp(double x) {
  assert(!(x < 0.0));
  if (!(x < std::numeric_limits<double>::infinity())) return x;
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x + 0.0) + 1);
}
inline double NextDown(double x) {
  assert(!(x < 0.0));
  if (x == 0.0 || std::isnan(x)) return x;
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) - 1);
}

// a + b of non-negative numbers, rounded up (exact if the sum is a double). Knuth's two-sum gives
// the exact error of the rounded sum.
inline double AddUp(double a, double b) {
  const double sum = a + b;
  const double b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  return error > 0.0 ? NextUp(sum) : sum;
}
inline double AddDown(double a, double b) {
  const double sum = a + b;
  const double b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  // An infinite sum of finite numbers has error NaN.
  return error < 0.0 || sum > std::numeric_limits<double>::max() ? NextDown(sum) : sum;
}

// Products and quotients of non-negative numbers. One step more than the rounding needs when the
// result is exact.
inline double MultiplyUp(double a, double b) { return NextUp(a * b); }
inline double MultiplyDown(double a, double b) { return NextDown(a * b); }
inline double DivideUp(double a, double b) { return NextUp(a / b); }
inline double DivideDown(double a, double b) { return NextDown(a / b); }

// The integer itself below 2^53, else the double on the named side of it.
inline double DoubleUp(uint64_t x) {
  const auto nearest = static_cast<double>(x);
  // 2^64 is above every x and has no conversion back.
  return nearest < 0x1p64 && static_cast<uint64_t>(nearest) < x ? NextUp(nearest) : nearest;
}
inline double DoubleDown(uint64_t x) {
  const auto nearest = static_cast<double>(x);
  return nearest >= 0x1p64 || static_cast<uint64_t>(nearest) > x ? NextDown(nearest) : nearest;
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_ROUNDING_H_
