// Masses of softmax weight that round outward. A mass is a sum of exp(logit) over a set of tokens;
// its natural log is kept, because the masses themselves overflow. The side of the rounding is part
// of the type and there is no conversion between the sides: an upper mass can be added to upper
// masses only, so a bound cannot be built from a number that was rounded the wrong way.
//
// All functions are pure. Doubles; libm's exp, log and log1p are within 1 ulp (glibc), and every
// result is widened by kUlps of them.

#ifndef KVSERVICE_ATTENTION_LOG_MASS_H_
#define KVSERVICE_ATTENTION_LOG_MASS_H_

#include <limits>

#ifdef __FAST_MATH__
#error "Certificates need IEEE semantics: build without -ffast-math."
#endif

namespace kvservice {

inline constexpr double kLogZero = -std::numeric_limits<double>::infinity();

// ln of an upper bound of a mass. +infinity means "nothing is known".
struct LogMassUpper {
  double value = kLogZero;
};
// ln of a lower bound of a mass.
struct LogMassLower {
  double value = kLogZero;
};
// A share of all attention in [0, 1], rounded up.
struct MassUpper {
  double value = 1.0;
};
// A share of all attention in [0, 1], rounded down.
struct MassLower {
  double value = 0.0;
};

// Next doubles away from / towards minus infinity by a few ulps of x (and of 1), enough to cover
// two libm calls.
double WidenUp(double x);
double WidenDown(double x);

// ln(e^a + e^b), rounded to the side of the type. NaN in, "nothing known" out (+inf for upper, -inf
// for lower).
LogMassUpper Add(LogMassUpper a, LogMassUpper b);
LogMassLower Add(LogMassLower a, LogMassLower b);

// ln of a non-negative sum that was itself already rounded to the right side.
LogMassUpper LogOfUpper(double mass);
LogMassLower LogOfLower(double mass);

// dropped / (kept + dropped), rounded outward: 0 only if nothing was dropped (dropped = log zero),
// 1 if nothing is known. Source: certificate section 4, U / (Z_lower + U) and L / (Z_upper + L).
MassUpper DroppedMass(LogMassUpper dropped, LogMassLower kept);
MassLower DroppedMass(LogMassLower dropped, LogMassUpper kept);

// Smallest float >= x, largest float <= x: how bounds leave the service.
float RoundUpToFloat(double x);
float RoundDownToFloat(double x);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_LOG_MASS_H_
