#include "attention/sketch_table.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace kvservice {
namespace {

constexpr double kMetricMax = 0x1p20;

void ComputeWeights(uint32_t head_dim, SketchTable* table) {
  table->weights.resize(table->directions.size());
  for (size_t i = 0; i < table->weights.size(); ++i) {
    table->weights[i] = table->metric[i % head_dim] * table->directions[i];
  }
}

absl::Status NormalizeMetric(SketchTable* table) {
  double log_sum = 0.0;
  for (size_t c = 0; c < table->metric.size(); ++c) {
    const float m = table->metric[c];
    if (!std::isfinite(m) || !(m > 0.0F)) {
      return absl::InvalidArgumentError(
          absl::StrCat("metric[", c, "] is ", m, ", expected a positive number"));
    }
    log_sum += std::log(static_cast<double>(m));
  }
  const double log_mean = log_sum / static_cast<double>(table->metric.size());
  for (float& m : table->metric) {
    const double scaled = std::exp(std::log(static_cast<double>(m)) - log_mean);
    m = static_cast<float>(std::clamp(scaled, 1.0 / kMetricMax, kMetricMax));
  }
  return absl::OkStatus();
}

}  // namespace

SketchTable IdentitySketchTable(uint32_t head_dim) {
  SketchTable table;
  table.metric.assign(head_dim, 1.0F);
  table.directions.assign(static_cast<size_t>(SketchDirections(head_dim)) * head_dim, 0.0F);
  table.weights = table.directions;
  return table;
}

absl::Status NormalizeSketchTable(uint32_t head_dim, SketchTable* table) {
  if (table->metric.size() != head_dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("metric has ", table->metric.size(), " entries, expected ", head_dim));
  }
  const size_t direction_floats = static_cast<size_t>(SketchDirections(head_dim)) * head_dim;
  if (table->directions.size() != direction_floats) {
    return absl::InvalidArgumentError(absl::StrCat("directions has ", table->directions.size(),
                                                   " entries, expected ", direction_floats));
  }
  for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
    double squares = 0.0;
    for (uint32_t c = 0; c < head_dim; ++c) {
      const double u = table->directions[j * head_dim + c];
      squares += u * u;
    }
    // A unit vector rounded to fp32 may be a few ulps longer than 1; any finite length keeps bounds
    // valid.
    if (!(squares <= 1.0 + 1e-5)) {
      return absl::InvalidArgumentError(absl::StrCat("directions[", j, "] has norm ",
                                                     std::sqrt(squares), ", expected at most 1"));
    }
  }
  const absl::Status status = NormalizeMetric(table);
  if (!status.ok()) return status;
  ComputeWeights(head_dim, table);
  return absl::OkStatus();
}

}  // namespace kvservice
