// The model check: random commands to an engine with a disk tier, each answer compared with what a
// plain model in memory says (tests/stress/sequence_model.h). A program of commands that goes wrong
// is made shorter, by leaving out what it does not need, before it is told.

#ifndef KVSERVICE_TESTS_STRESS_MODEL_CHECK_H_
#define KVSERVICE_TESTS_STRESS_MODEL_CHECK_H_

#include <cstdint>

#include "tests/stress/campaign.h"

namespace kvservice::testing {

struct ModelCheckOptions {
  uint64_t seed = 1;
  uint64_t commands = 20'000;
  // The model thinks that a truncate keeps one token more: it must be noticed.
  bool is_mistaken = false;
};

// A failure: an answer that the model would not give. Commands are counted.
CampaignResult RunModelCheck(const ModelCheckOptions& options);
// Programs that once went wrong.
CampaignResult RunKnownPrograms();

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_MODEL_CHECK_H_
