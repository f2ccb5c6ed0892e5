// Constants of the vector exponential (exp-inl.h) and the errors that bounds may count on, which
// tests/attention/cpu_exp_test.cc sweeps on every target. Also what the sums of exponentials built
// on it may count on.

#ifndef KVSERVICE_ATTENTION_CPU_EXP_H_
#define KVSERVICE_ATTENTION_CPU_EXP_H_

#include <cstdint>

namespace kvservice {

inline constexpr float kLog2E = 0x1.715476p+0F;
inline constexpr float kLn2High = 0x1.63p-1F;
inline constexpr float kLn2Middle = -0x1.bdp-13F;
inline constexpr float kLn2Low = -0x1.05c61p-29F;
inline constexpr double kLn2 = 0x1.62e42fefa39efp-1;
// Adding 1.5 * 2^23 rounds a number below 2^22 to an integer, which is left in the low bits.
inline constexpr float kRoundingMagic = 0x1.8p+23F;
inline constexpr int32_t kRoundingMagicBits = 0x4b400000;
inline constexpr int32_t kFloatExponentBias = 127;

// Relative error of ExpScaled: kExpError + kExpArgumentError |x| for |x| <= kLogitMax. The largest
// seen for |x| <= 1024 is 1.2e-7. The second term is the rounding of n ln 2 without fused
// multiply-add, which begins at |n| = 2^15.
inline constexpr double kExpError = 0x1p-22;
inline constexpr double kExpArgumentError = 0x1p-23;
// Absolute error of tanh: half the error of e^-2|y| and three roundings of numbers up to 1, and y's
// own rounding (2 |y| e^-2|y| 2^-24).
inline constexpr double kTanhError = 0x1p-21;

// What a sum of exponentials adds, as a difference of logs: the error of the exponential, up to 18
// additions in fp32 (blocks of 64 tokens are added up in lanes, blocks among each other in double),
// and terms below 2^-126 of the largest: 1.4e-6 together.
inline constexpr double kMassError = 0x1p-19;

// Beyond |logit| = kLogitMax nothing is proven: a float has less than four bits left for the
// fraction of a nat. A logit at or below kLogitMin is taken for -infinity, one above -kLogitMin for
// -kLogitMin.
inline constexpr double kLogitMax = 0x1p20;
inline constexpr float kLogitMin = -0x1p21F;
// References (powers of two that exponentials are divided by) stay above this, and so 2^25000 times
// the exponential of kLogitMin.
inline constexpr int32_t kReferenceMin = -3'000'000;

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_EXP_H_
