// What callers of one sequence saw, and whether it can be explained by one order of their calls.
//
// A history is linearizable if the calls can be put in an order in which each call stands between
// its beginning and its end, and each answer is what a sequence that does one call after the other
// would give (Herlihy and Wing, 1990). The search is that of Wing and Gong (1993), with Lowe's
// memory of configurations that lead nowhere (2017). Pure functions; any thread.

#ifndef KVSERVICE_TESTS_STRESS_HISTORY_H_
#define KVSERVICE_TESTS_STRESS_HISTORY_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/kvservice/words.h"

namespace kvservice::testing {

struct Operation {
  enum class Kind : uint8_t { kAppend, kAttend, kTruncate, kGet, kSuspend, kResume };
  Kind kind = Kind::kGet;
  // Stamps of one clock: each is taken once.
  uint64_t called = 0;
  uint64_t returned = 0;

  // What was asked. An Attend appends its one word and reads all.
  uint64_t generation = 0;
  uint32_t position = 0;  // of an append; the length, of a truncate
  Words words;

  // What was answered: the reason of an error, with the current generation or length that it told,
  // or the sequence afterwards.
  std::string reason;
  uint64_t generation_after = 0;
  uint32_t length_after = 0;
  bool is_duplicate = false;
  bool is_suspended = false;
  // Of an Attend: ln of the sum over all words, first head.
  double lse = 0.0;
};

// At most so many in one history.
inline constexpr size_t kHistoryOperationsMax = 64;

// The sequence is empty at the beginning, with this generation.
bool IsLinearizable(const std::vector<Operation>& history, uint64_t first_generation);
std::string Tell(const Operation& operation);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_HISTORY_H_
