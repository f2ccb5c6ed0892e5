// The leaf headers of attention/: layout, 16-bit numbers, merging of partials, sketch tables.

#include "attention/kv_layout.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/float16.h"
#include "attention/partial.h"
#include "attention/sketch_table.h"

namespace kvservice {
namespace {

KvLayout GoodLayout() {
  return {.query_head_count = 9, .kv_head_count = 3, .head_dim = 64, .dtype = DType::kFloat16};
}

void ExpectRefused(const KvLayout& layout, const std::string& field) {
  const absl::Status status = ValidateLayout(layout);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find(field), std::string::npos) << status;
}

TEST(KvLayout, ValidatesEveryField) {
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    KvLayout layout = GoodLayout();
    layout.head_dim = head_dim;
    EXPECT_TRUE(ValidateLayout(layout).ok());
  }
  KvLayout layout = GoodLayout();
  for (const uint32_t head_dim : {0U, 1U, 63U, 65U, 112U, 192U, 512U, 0xffffffffU}) {
    layout.head_dim = head_dim;
    ExpectRefused(layout, "head_dim");
  }
  layout = GoodLayout();
  layout.kv_head_count = 0;
  ExpectRefused(layout, "kv_head_count");
  for (const uint32_t heads : {0U, 1U, 10U, 51U, 0xfffffffdU}) {
    layout = GoodLayout();
    layout.query_head_count = heads;
    ExpectRefused(layout, "query_head_count");
  }
  layout.query_head_count = 48;
  EXPECT_TRUE(ValidateLayout(layout).ok());
  layout.dtype = static_cast<DType>(7);
  ExpectRefused(layout, "dtype");
}

TEST(KvLayout, RowsTileTheSlice) {
  const KvLayout layout = GoodLayout();
  size_t expected = 0;
  for (uint32_t head = 0; head < layout.kv_head_count; ++head) {
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      EXPECT_EQ(layout.RowOffset(head, token), expected);
      expected += layout.row_bytes();
    }
  }
  EXPECT_EQ(expected, layout.slice_bytes());
  EXPECT_EQ(layout.row_bytes(), 2U * 64 * 2);
  EXPECT_EQ(BlockCount(0), 0U);
  EXPECT_EQ(BlockCount(64), 1U);
  EXPECT_EQ(BlockCount(65), 2U);
}

// Widening every 16-bit pattern and narrowing it again changes nothing (NaN payloads aside).
TEST(Float16, EveryPatternSurvives) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto pattern = static_cast<uint16_t>(bits);
    const float half = FloatFromFloat16(pattern);
    const float brain = FloatFromBfloat16(pattern);
    if (std::isnan(half)) {
      EXPECT_TRUE(std::isnan(FloatFromFloat16(Float16FromFloat(half))));
    } else {
      EXPECT_EQ(Float16FromFloat(half), pattern);
    }
    if (std::isnan(brain)) {
      EXPECT_TRUE(std::isnan(FloatFromBfloat16(Bfloat16FromFloat(brain))));
    } else {
      EXPECT_EQ(Bfloat16FromFloat(brain), pattern);
    }
  }
}

// No neighbour of what narrowing gives is nearer, and of two equally near ones the even one is
// taken.
template <typename Narrow, typename Widen>
void ExpectNearestEven(Narrow narrow, Widen widen) {
  std::mt19937 random(3);
  for (int i = 0; i < 200000; ++i) {
    // Every other number lies half way between two patterns, in any binade.
    auto bits_in = static_cast<uint32_t>(random());
    if (i % 2 == 0) bits_in = (bits_in & 0xffff0000U) | 0x8000U;
    if (i % 4 == 0)
      bits_in = std::bit_cast<uint32_t>(widen(static_cast<uint16_t>(bits_in))) ^ 0x1000U;
    const float x = std::bit_cast<float>(bits_in);
    const uint16_t bits = narrow(x);
    if (!std::isfinite(x) || !std::isfinite(widen(bits))) continue;
    const double miss = std::fabs(static_cast<double>(widen(bits)) - x);
    for (const int step : {-1, 1}) {
      const float neighbour = widen(static_cast<uint16_t>(bits + step));
      if (!std::isfinite(neighbour)) continue;
      const double distance = std::fabs(static_cast<double>(neighbour) - x);
      ASSERT_TRUE(miss < distance || (miss == distance && bits % 2 == 0)) << x;
    }
  }
}

TEST(Float16, NarrowingRoundsToNearestEven) {
  ExpectNearestEven(Bfloat16FromFloat, FloatFromBfloat16);
  ExpectNearestEven(Float16FromFloat, FloatFromFloat16);
  EXPECT_EQ(Bfloat16FromFloat(1.0F + 0x1p-8F), 0x3f80);      // Half way: to even.
  EXPECT_EQ(Bfloat16FromFloat(1.0F + 3 * 0x1p-8F), 0x3f82);  // Half way: to even, upward.
  EXPECT_TRUE(std::isinf(FloatFromFloat16(Float16FromFloat(65520.0F))));
  EXPECT_EQ(FloatFromFloat16(Float16FromFloat(65519.0F)), 65504.0F);
  EXPECT_EQ(FloatFromFloat16(Float16FromFloat(-0x1p-24F)), -0x1p-24F);
  EXPECT_EQ(Float16FromFloat(0x1p-25F), 0) << "half of the least subnormal goes to even";
  EXPECT_TRUE(std::isinf(FloatFromBfloat16(Bfloat16FromFloat(3.4e38F))));
}

TEST(Partial, PartsMergeToTheWhole) {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  for (int round = 0; round < 200; ++round) {
    std::vector<double> logits(10);
    std::vector<double> values(10);
    for (int i = 0; i < 10; ++i) {
      logits[i] = 30.0 * normal(random);
      values[i] = normal(random);
    }
    double whole_sum = 0.0;
    double whole_out = 0.0;
    double out = std::numeric_limits<double>::quiet_NaN();
    double lse = -std::numeric_limits<double>::infinity();
    for (int i = 0; i < 10; ++i) {
      whole_sum += std::exp(logits[i]);
      whole_out += std::exp(logits[i]) * values[i];
      MergePartial(&out, &lse, &values[i], logits[i], 1);
    }
    EXPECT_NEAR(lse, std::log(whole_sum), 1e-12 * std::fabs(lse) + 1e-12);
    EXPECT_NEAR(out, whole_out / whole_sum, 1e-12);
    const double nothing = std::numeric_limits<double>::quiet_NaN();
    const double before = out;
    MergePartial(&out, &lse, &nothing, -std::numeric_limits<double>::infinity(), 1);
    EXPECT_EQ(out, before) << "an empty part is ignored, whatever it holds";
  }
}

TEST(SketchTable, NormalizesAndClamps) {
  SketchTable table = IdentitySketchTable(128);
  for (size_t c = 0; c < 128; ++c) table.metric[c] = c % 2 == 0 ? 1e-30F : 1e30F;
  table.directions[5] = 0.5F;
  ASSERT_TRUE(NormalizeSketchTable(128, &table).ok());
  for (size_t c = 0; c < 128; ++c) EXPECT_EQ(table.metric[c], c % 2 == 0 ? 0x1p-20F : 0x1p20F);
  EXPECT_EQ(table.weights[5], 0.5F * table.metric[5]);
  EXPECT_EQ(table.weights.size(), 256U);

  table.metric.assign(128, 7.0F);
  ASSERT_TRUE(NormalizeSketchTable(128, &table).ok());
  for (const float m : table.metric) EXPECT_NEAR(m, 1.0F, 1e-6F);
}

TEST(SketchTable, RefusesWhatIsNotATable) {
  const auto expect_refused = [](SketchTable table, const std::string& field) {
    const absl::Status status = NormalizeSketchTable(64, &table);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(std::string(status.message()).find(field), std::string::npos) << status;
  };
  for (const float bad : {0.0F, -1.0F, std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    SketchTable table = IdentitySketchTable(64);
    table.metric[3] = bad;
    expect_refused(table, "metric");
  }
  for (const float bad : {1.1F, -2.0F, std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    SketchTable table = IdentitySketchTable(64);
    table.directions[3] = bad;
    expect_refused(table, "directions");
  }
  expect_refused(IdentitySketchTable(80), "metric");
  SketchTable table = IdentitySketchTable(64);
  table.directions.pop_back();
  expect_refused(table, "directions");
}

}  // namespace
}  // namespace kvservice
