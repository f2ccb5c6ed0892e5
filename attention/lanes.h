// Sums over the channels of a head in independent lanes, so that compilers may keep them in vector
// registers: one after the other, a hundred additions wait for each other for as many times four
// cycles. Any order of so few terms is within the margins that callers state. Pure; any thread.

#ifndef KVSERVICE_ATTENTION_LANES_H_
#define KVSERVICE_ATTENTION_LANES_H_

#include <array>
#include <cstdint>

namespace kvservice {

// The sum of term(i) for i in [0, count); count is a multiple of eight.
template <typename Real, typename Term>
Real SumInLanes(uint32_t count, Term term) {
  std::array<Real, 8> lanes{};
  for (uint32_t i = 0; i < count; i += 8) {
    for (uint32_t lane = 0; lane < 8; ++lane) lanes[lane] += term(i + lane);
  }
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

inline float Dot(const float* a, const float* b, uint32_t count) {
  return SumInLanes<float>(count, [=](uint32_t i) { return a[i] * b[i]; });
}

// Each square is exact.
inline double SumOfSquares(const float* x, uint32_t count) {
  return SumInLanes<double>(
      count, [=](uint32_t i) { return static_cast<double>(x[i]) * static_cast<double>(x[i]); });
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_LANES_H_
