// Tables are checked, normalised and stored; what is stored comes back bit for bit or is refused.

#include "attention/sketch_table.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace kvservice::testing {
namespace {

constexpr uint32_t kHeadDim = 128;
// Offsets within the stored form.
constexpr size_t kHeaderBytes = 24;
constexpr size_t kTableBytes = sizeof(float) * 3 * kHeadDim;

SketchTable MadeTable(float spread) {
  SketchTable table = IdentitySketchTable(kHeadDim);
  for (uint32_t c = 0; c < kHeadDim; ++c) {
    table.metric[c] = std::exp(spread * std::sin(static_cast<float>(c)));
    table.directions[c] = std::sin(static_cast<float>(3 * c)) / 16.0F;
    table.directions[kHeadDim + c] = -std::cos(static_cast<float>(2 * c)) / 16.0F;
  }
  EXPECT_TRUE(NormalizeSketchTable(kHeadDim, &table).ok());
  return table;
}

std::vector<SketchTable> MadeTables() { return {MadeTable(0.5F), MadeTable(30.0F)}; }

std::string Message(const absl::Status& status) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  return std::string(status.message());
}

std::string DecodeMessage(const std::vector<std::byte>& bytes, uint32_t head_dim = kHeadDim) {
  return Message(DecodeSketchTables(head_dim, bytes).status());
}

TEST(NormalizeSketchTable, NamesWhatIsWrong) {
  const std::vector<float> bad = {0.0F, -1.0F, std::numeric_limits<float>::infinity(),
                                  std::numeric_limits<float>::quiet_NaN()};
  for (const float value : bad) {
    SketchTable table = IdentitySketchTable(kHeadDim);
    table.metric[7] = value;
    EXPECT_EQ(Message(NormalizeSketchTable(kHeadDim, &table)).find("metric[7]"), 0U) << value;
  }
  SketchTable table = IdentitySketchTable(kHeadDim);
  table.directions[kHeadDim] = 1.1F;
  EXPECT_EQ(Message(NormalizeSketchTable(kHeadDim, &table)).find("directions[1]"), 0U);
  table.directions[kHeadDim] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(Message(NormalizeSketchTable(kHeadDim, &table)).find("directions[1]"), 0U);
  table.directions.pop_back();
  EXPECT_EQ(Message(NormalizeSketchTable(kHeadDim, &table)).find("directions has 255"), 0U);
  table.metric.pop_back();
  EXPECT_EQ(Message(NormalizeSketchTable(kHeadDim, &table)).find("metric has 127"), 0U);
}

TEST(NormalizeSketchTable, MeanOneAndClamped) {
  double log_sum = 0.0;
  for (const float m : MadeTable(0.5F).metric) log_sum += std::log(static_cast<double>(m));
  EXPECT_NEAR(log_sum / kHeadDim, 0.0, 1e-6);
  SketchTable table = IdentitySketchTable(kHeadDim);
  table.metric[0] = 1e30F;
  table.metric[1] = 1e-30F;
  ASSERT_TRUE(NormalizeSketchTable(kHeadDim, &table).ok());
  EXPECT_EQ(table.metric[0], 0x1p20F);
  EXPECT_EQ(table.metric[1], 0x1p-20F);
}

TEST(StoredSketchTables, ComeBackBitForBit) {
  for (const std::vector<SketchTable>& tables :
       {std::vector<SketchTable>{}, std::vector<SketchTable>{IdentitySketchTable(kHeadDim)},
        MadeTables()}) {
    const std::vector<std::byte> bytes = EncodeSketchTables(kHeadDim, tables);
    EXPECT_EQ(bytes.size(), kHeaderBytes + tables.size() * kTableBytes);
    const auto decoded = DecodeSketchTables(kHeadDim, bytes);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(*decoded, tables);
    EXPECT_EQ(EncodeSketchTables(kHeadDim, *decoded), bytes);
  }
}

TEST(StoredSketchTables, OrderMatters) {
  std::vector<SketchTable> tables = MadeTables();
  const std::vector<std::byte> bytes = EncodeSketchTables(kHeadDim, tables);
  std::swap(tables[0], tables[1]);
  EXPECT_NE(EncodeSketchTables(kHeadDim, tables), bytes);
}

TEST(StoredSketchTables, DamageIsNamed) {
  const std::vector<std::byte> good = EncodeSketchTables(kHeadDim, MadeTables());
  const std::vector<std::pair<size_t, std::string>> header_fields = {
      {0, "magic"},     {7, "magic"},     {8, "version"},      {11, "version"},
      {12, "head_dim"}, {15, "head_dim"}, {16, "table_count"}, {19, "table_count"},
      {20, "reserved"}, {23, "reserved"}};
  for (const auto& [offset, field] : header_fields) {
    std::vector<std::byte> bytes = good;
    bytes[offset] ^= std::byte{1};
    EXPECT_EQ(DecodeMessage(bytes).find(field), 0U) << offset;
  }
  EXPECT_EQ(DecodeMessage(good, 64).find("head_dim"), 0U);

  const size_t second = kHeaderBytes + kTableBytes;
  const std::vector<std::pair<size_t, std::string>> table_fields = {
      {kHeaderBytes + sizeof(float) * 5, "tables[0].metric[5]"},
      {second, "tables[1].metric[0]"},
      {second + sizeof(float) * (kHeadDim + 3), "tables[1].directions[0]"},
      {second + sizeof(float) * (2 * kHeadDim), "tables[1].directions[1]"}};
  const std::vector<float> values = {std::numeric_limits<float>::quiet_NaN(),
                                     std::numeric_limits<float>::infinity(), 0x1.1p20F, -0x1.1p20F};
  for (const auto& [offset, field] : table_fields) {
    for (const float value : values) {
      std::vector<std::byte> bytes = good;
      std::memcpy(&bytes[offset], &value, sizeof(value));
      EXPECT_EQ(DecodeMessage(bytes).find(field), 0U) << offset << " " << value;
    }
  }
}

TEST(StoredSketchTables, EveryTruncationIsRefused) {
  const std::vector<std::byte> good = EncodeSketchTables(kHeadDim, MadeTables());
  for (size_t size = 0; size < good.size(); ++size) {
    const std::vector<std::byte> bytes(good.begin(), good.begin() + static_cast<ptrdiff_t>(size));
    EXPECT_FALSE(DecodeMessage(bytes).empty());
  }
  std::vector<std::byte> longer = good;
  longer.push_back(std::byte{0});
  EXPECT_EQ(DecodeMessage(longer).find("table_count"), 0U);
}

}  // namespace
}  // namespace kvservice::testing
