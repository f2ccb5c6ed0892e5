// exp() that a compiler can vectorise, for attention and activations of the decoder.

#ifndef KVSERVICE_TESTS_EVAL_EXP_H_
#define KVSERVICE_TESTS_EVAL_EXP_H_

#include <algorithm>
#include <bit>
#include <cstdint>

namespace kvservice::eval {

// Within 2 units in the last place of exp(x); x is moved into [-87, 87] first, where the result is
// a normal number. Cephes, expf: exp(x) = 2^n exp(r) with |r| <= ln(2) / 2 and a polynomial for
// exp(r).
inline float Exp(float x) {
  constexpr float kFarthest = 87.0F, kLog2OfE = 1.44269504F;
  // ln(2) in two parts, of which the first has few bits: n times it is exact.
  constexpr float kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;
  // Adding it leaves no room for bits behind the binary point: rounds to nearest.
  constexpr float kRounder = 12582912.0F;
  // On the bits: GCC makes branches of two comparisons of floats, and no vectors of branches.
  const auto bits = std::bit_cast<int32_t>(x);
  const int32_t sign = bits & INT32_MIN;
  x = std::bit_cast<float>(sign | std::min(bits ^ sign, std::bit_cast<int32_t>(kFarthest)));
  const float shifted = x * kLog2OfE + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const float fraction = p * (r * r) + r + 1.0F;
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) + 127U) << 23;
  return fraction * std::bit_cast<float>(exponent);
}

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_EXP_H_
