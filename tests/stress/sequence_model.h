// What an engine should do, in the plainest terms: sequences are vectors of words. No blocks, no
// tiers, no queue; an error is the set of reasons that it may have.
//
// One thread.

#ifndef KVSERVICE_TESTS_STRESS_SEQUENCE_MODEL_H_
#define KVSERVICE_TESTS_STRESS_SEQUENCE_MODEL_H_

#include <array>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {

inline constexpr uint32_t kModelLayers = 2;

struct ModelSequence {
  std::string tenant;
  Handle handle;
  std::array<Words, kModelLayers> layers;
  // The words that it was created with, as far as they are whole blocks and nothing was truncated:
  // what is appended there is these, in every layer.
  Words declared;
  bool is_suspended = false;
  // It never was, or it was dropped: nobody knows the handle.
  bool is_there = false;

  uint32_t length() const;      // Tokens that every layer has.
  uint32_t length_max() const;  // The longest layer's.
  uint32_t block_count() const;
  // Whole blocks of `words` that it has and that it declared, in tokens.
  uint32_t MatchOf(const Words& words) const;
  // Forgets the blocks that `length` tokens do not fill.
  void CutDeclared(uint32_t length);
};

// A call to be judged. Reasons gather; without any it must succeed.
class Expectation {
 public:
  // `applies`: the call must fail, for this reason or another that applies too.
  Expectation& Must(bool applies, const char* reason) {
    if (applies) must_.insert(reason);
    return *this;
  }
  // The call may fail for this reason whatever else.
  Expectation& May(bool applies, const char* reason) {
    if (applies) may_.insert(reason);
    return *this;
  }
  // What is wrong with the answer; empty if nothing is.
  std::string Judge(const absl::Status& status) const;

 private:
  std::set<std::string> must_;
  std::set<std::string> may_;
};

struct ModelLimits {
  uint32_t pool_blocks = 12;
  uint32_t sequences_max = 5;
  uint32_t sequences_per_tenant_max = 3;
  uint32_t sequence_tokens_max = 200;
};

// What may be wrong with a call that names a sequence: who it is, whose, its generation, and where
// it is.
struct Caller {
  bool is_foreign = false;
  int generation_offset = 0;
};
Expectation NamesSequence(const ModelSequence& sequence, const Caller& caller, bool in_memory);

// All reasons for which an append of `words` at `position` must be refused.
void ExpectAppend(const ModelSequence& sequence, const ModelLimits& limits, uint32_t layer,
                  uint32_t position, const Words& words, Expectation* expectation);
// Whether all of it is there already.
bool IsStored(const Words& stored, uint32_t position, const Words& words);
// Stores what is not there yet.
void Store(uint32_t position, const Words& words, Words* stored);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_SEQUENCE_MODEL_H_
