#include "attention/sketch_table.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvservice {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr double kMetricMax = 0x1p20;
// A unit vector rounded to fp32 may be a few ulps longer than 1; any finite length keeps bounds
// valid.
constexpr double kSquaresMax = 1.0 + 1e-5;

constexpr std::array<char, 8> kMagic = {'K', 'V', 'S', 'K', 'T', 'A', 'B', '\0'};
struct StoredHeader {
  std::array<char, 8> magic = kMagic;
  uint32_t version = kSketchTableVersion;
  uint32_t head_dim = 0;
  uint32_t table_count = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(StoredHeader) == 24);

size_t DirectionFloats(uint32_t head_dim) {
  return static_cast<size_t>(SketchDirections(head_dim)) * head_dim;
}

size_t StoredTableBytes(uint32_t head_dim) {
  return sizeof(float) * (head_dim + DirectionFloats(head_dim));
}

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

absl::Status CheckDirections(uint32_t head_dim, const SketchTable& table) {
  for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
    double squares = 0.0;
    for (uint32_t c = 0; c < head_dim; ++c) {
      const double u = table.directions[j * head_dim + c];
      squares += u * u;
    }
    // Written so that NaN is refused.
    if (!(squares <= kSquaresMax)) {
      return absl::InvalidArgumentError(absl::StrCat("directions[", j, "] has norm ",
                                                     std::sqrt(squares), ", expected at most 1"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckStoredMetric(const SketchTable& table) {
  for (size_t c = 0; c < table.metric.size(); ++c) {
    const double m = table.metric[c];
    if (!(m >= 1.0 / kMetricMax && m <= kMetricMax)) {
      return absl::InvalidArgumentError(
          absl::StrCat("metric[", c, "] is ", m, ", expected a number in [2^-20, 2^20]"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckHeader(uint32_t head_dim, const StoredHeader& header, size_t bytes) {
  if (header.magic != kMagic) return absl::InvalidArgumentError("magic is not that of tables");
  if (header.version != kSketchTableVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat("version is ", header.version, ", expected ", kSketchTableVersion));
  }
  if (header.head_dim != head_dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim is ", header.head_dim, ", expected ", head_dim));
  }
  if (header.reserved != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("reserved is ", header.reserved, ", expected 0"));
  }
  const size_t expected = sizeof(header) + header.table_count * StoredTableBytes(head_dim);
  if (bytes != expected) {
    return absl::InvalidArgumentError(absl::StrCat("table_count is ", header.table_count,
                                                   ", expected that of ", bytes, " bytes"));
  }
  return absl::OkStatus();
}

// `at` moves on by the bytes read.
void ReadFloats(size_t count, const std::byte** at, std::vector<float>* out) {
  out->resize(count);
  std::memcpy(out->data(), *at, count * sizeof(float));
  *at += count * sizeof(float);
}

void WriteFloats(const std::vector<float>& floats, std::byte** at) {
  std::memcpy(*at, floats.data(), floats.size() * sizeof(float));
  *at += floats.size() * sizeof(float);
}

}  // namespace

SketchTable IdentitySketchTable(uint32_t head_dim) {
  SketchTable table;
  table.metric.assign(head_dim, 1.0F);
  table.directions.assign(DirectionFloats(head_dim), 0.0F);
  table.weights = table.directions;
  return table;
}

absl::Status NormalizeSketchTable(uint32_t head_dim, SketchTable* table) {
  if (table->metric.size() != head_dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("metric has ", table->metric.size(), " entries, expected ", head_dim));
  }
  if (table->directions.size() != DirectionFloats(head_dim)) {
    return absl::InvalidArgumentError(absl::StrCat("directions has ", table->directions.size(),
                                                   " entries, expected ",
                                                   DirectionFloats(head_dim)));
  }
  absl::Status status = CheckDirections(head_dim, *table);
  if (status.ok()) status = NormalizeMetric(table);
  if (status.ok()) ComputeWeights(head_dim, table);
  return status;
}

std::vector<std::byte> EncodeSketchTables(uint32_t head_dim, absl::Span<const SketchTable> tables) {
  StoredHeader header;
  header.head_dim = head_dim;
  header.table_count = static_cast<uint32_t>(tables.size());
  std::vector<std::byte> bytes(sizeof(header) + tables.size() * StoredTableBytes(head_dim));
  std::memcpy(bytes.data(), &header, sizeof(header));
  std::byte* at = bytes.data() + sizeof(header);
  for (const SketchTable& table : tables) {
    assert(table.metric.size() == head_dim);
    assert(table.directions.size() == DirectionFloats(head_dim));
    WriteFloats(table.metric, &at);
    WriteFloats(table.directions, &at);
  }
  return bytes;
}

absl::StatusOr<std::vector<SketchTable>> DecodeSketchTables(uint32_t head_dim,
                                                            absl::Span<const std::byte> bytes) {
  StoredHeader header;
  if (bytes.size() < sizeof(header)) {
    return absl::InvalidArgumentError(
        absl::StrCat("magic is missing: ", bytes.size(), " bytes, expected at least 24"));
  }
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (const absl::Status status = CheckHeader(head_dim, header, bytes.size()); !status.ok()) {
    return status;
  }
  std::vector<SketchTable> tables(header.table_count);
  const std::byte* at = bytes.data() + sizeof(header);
  for (size_t i = 0; i < tables.size(); ++i) {
    ReadFloats(head_dim, &at, &tables[i].metric);
    ReadFloats(DirectionFloats(head_dim), &at, &tables[i].directions);
    absl::Status status = CheckStoredMetric(tables[i]);
    if (status.ok()) status = CheckDirections(head_dim, tables[i]);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("tables[", i, "].", status.message()));
    }
    ComputeWeights(head_dim, &tables[i]);
  }
  return tables;
}

}  // namespace kvservice
