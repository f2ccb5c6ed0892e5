// The sums that the truth is made of: exact, or in pairs of doubles whose error is stated. What is
// added up lies in lanes of eight that are the same for every instruction set, so that results are
// the same to the bit. Pure; any thread.

#ifndef KVSERVICE_TESTS_ADVERSARY_TRUTH_KERNEL_H_
#define KVSERVICE_TESTS_ADVERSARY_TRUTH_KERNEL_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"

namespace kvservice::adversary {

inline constexpr uint32_t kTruthLanes = 8;

// Keys in groups of eight tokens side by side: [group][channel][8].
inline size_t GroupedIndex(uint32_t dim, uint32_t token, uint32_t channel) {
  return (size_t{token / kTruthLanes} * dim + channel) * kTruthLanes + token % kTruthLanes;
}

// sum q_c k_c and sum |q_c k_c| of each token of `group_count` groups at `k`. Products of floats
// are exact; every rounding error of adding them to `high` is added to `low`, so that high + low is
// off by less than 2^-90 of the sum of absolute values (a term's error is at most 2^-53 of that
// sum, and adding up the errors of 256 terms rounds 256 times). Fusing a product with the sum that
// follows changes nothing. Each of high, low and size is [8 * group_count].
void ExactDots(uint32_t dim, const float* q, const float* k, uint32_t group_count, double* high,
               double* low, double* size);

// Numbers in two parts, the first of at most 29 bits, and what each is off by: [count] each.
struct SplitNumbers {
  const double* high = nullptr;
  const double* low = nullptr;
  const double* error = nullptr;
};

// Sums of split numbers in eight lanes: rounding errors of `high` are in `low`, which is off by
// less than 2 n 2^-81 of the sum for n <= 2^13 numbers that are not negative; `error` is off by
// n 2^-53 of itself.
struct LaneSums {
  std::array<double, kTruthLanes> high{};
  std::array<double, kTruthLanes> low{};
  std::array<double, kTruthLanes> error{};
};

// Of the squares, which are exact, of count <= 256 numbers, a multiple of eight.
LaneSums SquaresOf(uint32_t count, const float* x);

// Sums of those numbers where `in` is 1 and of those where it is 0. [count], a multiple of eight.
void SumSides(uint32_t count, const double* in, const SplitNumbers& numbers, LaneSums* inside,
              LaneSums* outside);

// sum w_t v[t][c] over `tokens` (indices of `weights`, rows of v), [dim] in two parts: off by less
// than 2 n 2^-81 of sum w_t |v[t][c]| as above. dim is a multiple of 16, products of the weights'
// first parts and values are not below 2^-1022.
void WeightedRows(uint32_t dim, const float* v, absl::Span<const uint32_t> tokens,
                  const SplitNumbers& weights, double* high, double* low);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_TRUTH_KERNEL_H_
