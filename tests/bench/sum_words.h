// Reading memory as fast as the machine can: the baseline of whatever is bound by reading.

#ifndef KVSERVICE_TESTS_BENCH_SUM_WORDS_H_
#define KVSERVICE_TESTS_BENCH_SUM_WORDS_H_

#include <cstddef>
#include <cstdint>

namespace kvservice::bench {

// Sum of 64-bit words, but for up to 31 at the end.
uint64_t SumWords(const uint64_t* words, size_t count);

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_SUM_WORDS_H_
