// What is asked of an explanation, and what it tells. Plain data.

#ifndef KVSERVICE_KVSERVICE_EXPLAIN_REPORT_H_
#define KVSERVICE_KVSERVICE_EXPLAIN_REPORT_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/certificate.h"
#include "attention/device.h"

namespace kvservice {

inline constexpr size_t kExplainLimitsMax = 8;

// One KV head under one limit.
struct ExplainGroup {
  GroupReport report;
  // Keys, values and sketches read, and what dense attention reads.
  uint64_t bytes = 0;
  uint64_t dense_bytes = 0;
  // Over its query heads and tokens: the weakest level, the largest bounds, the sum of the failure
  // probabilities.
  Level level = Level::kExact;
  bool met = true;
  double dropped_mass_upper = 0.0;
  double output_error_relative_upper = 0.0;
  double failure_probability = 0.0;
};

struct ExplainStep {
  float limit = 0.0F;
  std::vector<ExplainGroup> groups;  // [kv_head_count]
};

struct ExplainReport {
  // Of the query that was asked about.
  uint32_t position = 0;
  uint32_t query_count = 0;
  // In the order of the limits.
  std::vector<ExplainStep> steps;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_EXPLAIN_REPORT_H_
