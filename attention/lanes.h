// Sums over the channels of a head in eight independent lanes, in vectors that every 64-bit machine
// has: one after the other, a hundred additions wait for each other for as many times four cycles.
// Any order of so few terms is within the margins that callers state. Counts are multiples of
// eight. Pure; any thread.

#ifndef KVSERVICE_ATTENTION_LANES_H_
#define KVSERVICE_ATTENTION_LANES_H_

#include <array>
#include <cstdint>
#include <cstring>

namespace kvservice {

using Float4 = float __attribute__((vector_size(16)));
using Double2 = double __attribute__((vector_size(16)));

inline Float4 LoadFour(const float* from) {
  Float4 lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
inline Double2 LoadTwo(const float* from) {
  return Double2{static_cast<double>(from[0]), static_cast<double>(from[1])};
}

inline float Dot(const float* a, const float* b, uint32_t count) {
  std::array<Float4, 2> sums{};
  for (uint32_t i = 0; i < count; i += 8) {
    sums[0] += LoadFour(a + i) * LoadFour(b + i);
    sums[1] += LoadFour(a + i + 4) * LoadFour(b + i + 4);
  }
  const Float4 sum = sums[0] + sums[1];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Of a[i] - scale * b[i].
inline double SumOfSquaresApart(const float* a, double scale, const float* b, uint32_t count) {
  std::array<Double2, 4> sums{};
  for (uint32_t i = 0; i < count; i += 8) {
    for (uint32_t lane = 0; lane < 4; ++lane) {
      const Double2 apart = LoadTwo(a + i + 2 * lane) - scale * LoadTwo(b + i + 2 * lane);
      sums[lane] += apart * apart;
    }
  }
  const Double2 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum[0] + sum[1];
}

// Each square is exact.
inline double SumOfSquares(const float* x, uint32_t count) {
  std::array<Double2, 4> sums{};
  for (uint32_t i = 0; i < count; i += 8) {
    for (uint32_t lane = 0; lane < 4; ++lane) {
      const Double2 two = LoadTwo(x + i + 2 * lane);
      sums[lane] += two * two;
    }
  }
  const Double2 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum[0] + sum[1];
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_LANES_H_
