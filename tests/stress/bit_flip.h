// The bit-flip campaign: a store is closed, one of its files is damaged, and a server opens it.

#ifndef KVSERVICE_TESTS_STRESS_BIT_FLIP_H_
#define KVSERVICE_TESTS_STRESS_BIT_FLIP_H_

#include <cstdint>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct BitFlipOptions {
  uint64_t seed = 1;
  uint64_t flips = 300;
};

// Damage is a flipped bit (four times in five), a zeroed page, a cut-off end, two files that have
// changed places, or a file of an earlier close. A failure is a byte that was not stored there, or
// absence without a word: a sequence that is not found, or shorter than it was. Right answers are
// all the bytes, DATA_LOSS for the sequence, and a store that is refused; `checked` counts them.
CampaignResult RunBitFlips(const BitFlipOptions& options);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_BIT_FLIP_H_
