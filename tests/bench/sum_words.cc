#include "tests/bench/sum_words.h"

namespace kvservice::bench {

// The compiler makes it wide enough that memory is the limit.
[[gnu::target_clones("avx512f", "avx2", "default")]] uint64_t SumWords(const uint64_t* words,
                                                                       size_t count) {
  uint64_t sums[32] = {};
  for (size_t i = 0; i + 32 <= count; i += 32) {
    for (size_t lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace kvservice::bench
