// Weights as a scan leaves them, made up: for tests of what chooses by them.

#ifndef KVSERVICE_TESTS_ATTENTION_SCAN_WEIGHTS_CASE_H_
#define KVSERVICE_TESTS_ATTENTION_SCAN_WEIGHTS_CASE_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "attention/cpu/choose.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/cpu/token_mask.h"

namespace kvservice::testing {

inline constexpr uint32_t kBlocks = 9;
inline constexpr uint32_t kFirstBlock = 2;

// Random weights: pages of very different powers of two, in every head; upper ends of estimates, or
// estimates themselves.
struct Weights {
  Weights(uint32_t heads, uint64_t seed, double spread, bool bounded, uint32_t blocks = kBlocks) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    weights.Resize(heads, kFirstBlock, blocks, bounded);
    for (uint32_t head = 0; head < heads; ++head) {
      for (uint32_t block = kFirstBlock; block < kFirstBlock + blocks; ++block) {
        const size_t page = weights.PageIndex(head, block);
        // Octaves apart.
        const double level = static_cast<double>(random() % 7) - 3.0;
        std::array<double, kBlockTokens> logs;
        for (double& log : logs) log = level + spread * normal(random) / std::log(2.0);
        const double reference = std::round(*std::max_element(logs.begin(), logs.end()));
        weights.reference[page] = static_cast<int32_t>(reference);
        const double eps = 0.3 + 0.1 * normal(random);
        for (uint32_t t = 0; t < kBlockTokens; ++t) {
          numbers()[page * kBlockTokens + t] = static_cast<float>(std::exp2(logs[t] - reference));
        }
        if (!bounded) continue;
        weights.estimate_share[page] = static_cast<float>(std::exp(-eps));
        weights.lower_share[page] = static_cast<float>(std::exp(-2.0 * eps));
      }
    }
    SumPages();
    always_lse.assign(heads, 2.0);
    candidates.assign(blocks, 0);
    unread.assign(blocks, 0);
    for (uint32_t i = 0; i < blocks; ++i) {
      if (i == 4) continue;  // a block without candidates
      candidates[i] = i == 7 ? random() & random() : ~uint64_t{0};
      unread[i] = ~candidates[i] & random() & random();
    }
    pool = candidates;
    for (uint32_t i = 0; i < blocks; ++i) pool[i] |= unread[i];
  }

  std::vector<float>& numbers() { return weights.bounded ? weights.upper : weights.estimate; }

  // As a scan leaves them.
  void SumPages() {
    for (size_t page = 0; page < weights.page_sum.size(); ++page) {
      const auto begin = numbers().begin() + static_cast<std::ptrdiff_t>(page * kBlockTokens);
      weights.page_sum[page] = std::accumulate(begin, begin + kBlockTokens, 0.0F);
    }
  }

  ChooseTask Task() const {
    ChooseTask task;
    task.weights = &weights;
    task.candidates = candidates;
    task.pool = pool;
    task.unread = unread;
    task.always_lse = always_lse;
    return task;
  }

  double Weight(uint32_t head, uint32_t token) const {
    const uint32_t block = token / kBlockTokens;
    return std::ldexp(weights.Page(weights.numbers(), head, block)[token % kBlockTokens],
                      weights.reference[weights.PageIndex(head, block)]);
  }
  double Estimate(uint32_t head, uint32_t token) const {
    const double weight = Weight(head, token);
    if (!weights.bounded) return weight;
    return weight * static_cast<double>(
                        weights.estimate_share[weights.PageIndex(head, token / kBlockTokens)]);
  }

  double Normalizer(uint32_t head) const {
    double sum = std::exp(always_lse[head]);
    for (const uint32_t token : PositionsOf(pool, kFirstBlock)) sum += Estimate(head, token);
    return sum;
  }

  ScanWeights weights;
  TokenMask candidates, unread, pool;
  std::vector<double> always_lse;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_ATTENTION_SCAN_WEIGHTS_CASE_H_
