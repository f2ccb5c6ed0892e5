// What deferred exact mode tells of an earlier step. Plain data.

#ifndef KVSERVICE_KVSERVICE_DEFERRED_REPORT_H_
#define KVSERVICE_KVSERVICE_DEFERRED_REPORT_H_

#include <cstdint>
#include <vector>

#include "attention/log_mass.h"

namespace kvservice {

struct DeferredMass {
  MassUpper upper;
  MassLower lower;
};

// One row of an earlier call on the same sequence, generation and layer.
struct DeferredMasses {
  uint32_t position = 0;
  uint32_t query_count = 0;
  std::vector<DeferredMass> heads;  // [query_count][query_head_count]
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_DEFERRED_REPORT_H_
