// What an engine says about one block.

#include <gtest/gtest.h>

#include <cmath>
#include <future>

#include "attention/float16.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

// Two blocks and a part of a third.
constexpr uint32_t kTokens = 150;

class DescribeBlockTest : public ::testing::Test {
 protected:
  DescribeBlockTest() : handle_(engine_.NewSequence()) {
    engine_.Fill(handle_, 0, Counting(0, kTokens));
  }

  absl::StatusOr<BlockReport> Describe(const Handle& handle, const BlockAsk& ask) {
    std::promise<absl::StatusOr<BlockReport>> answer;
    engine_.get()->DescribeBlock(
        kTenant, handle.id, ask,
        [&answer](absl::StatusOr<BlockReport> report) { answer.set_value(std::move(report)); });
    return answer.get_future().get();
  }

  // Largest and mean norm of the words' keys or values in a layer.
  NormSummary Norms(Part part, uint32_t layer, const Words& words) const {
    const KvLayout& layout = engine_.model().layout;
    const auto bytes = PartBytes(layout, layout.dtype, part, layer, words);
    NormSummary norms;
    const size_t count = words.size() * layout.kv_head_count;
    for (size_t i = 0; i < count; ++i) {
      double squares = 0.0;
      for (size_t j = 0; j < layout.head_dim; ++j) {
        const double x = LoadElement(layout.dtype, bytes.data(), i * layout.head_dim + j);
        squares += x * x;
      }
      norms.max = std::max(norms.max, std::sqrt(squares));
      norms.mean += std::sqrt(squares) / static_cast<double>(count);
    }
    return norms;
  }

  TestEngine engine_;
  Handle handle_;
};

TEST_F(DescribeBlockTest, NormsAndTokensOfEveryLayer) {
  const auto report = Describe(handle_, {.block = 2});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->first_token, 128U);
  EXPECT_FALSE(report->is_shared);
  EXPECT_EQ(report->bytes, BlockBytes(engine_.model()));
  ASSERT_EQ(report->slices.size(), 2U);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    const BlockSlice& slice = report->slices[layer];
    EXPECT_EQ(slice.layer, layer);
    EXPECT_EQ(slice.token_count, kTokens - 128);
    EXPECT_FALSE(slice.is_on_disk);
    EXPECT_TRUE(slice.attention_mass.empty());
    const Words words = Counting(128, kTokens - 128);
    const NormSummary keys = Norms(Part::kKey, layer, words);
    const NormSummary values = Norms(Part::kValue, layer, words);
    EXPECT_DOUBLE_EQ(slice.key.max, keys.max);
    EXPECT_NEAR(slice.key.mean, keys.mean, 1e-12 * keys.mean);
    EXPECT_DOUBLE_EQ(slice.value.max, values.max);
    EXPECT_NEAR(slice.value.mean, values.mean, 1e-12 * values.mean);
  }
}

// Shares over all blocks are one, and each is what dense attention gives the block's tokens.
TEST_F(DescribeBlockTest, AttentionOfTheLatestQuery) {
  AttendStep step(engine_.model(), 1);
  step.Add(handle_, kTokens - 1, {kTokens - 1}).OnlyRead();
  ASSERT_TRUE(step.Run(engine_.get()).ok());
  LayerShape shape;
  shape.layout = engine_.model().layout;
  shape.scale = engine_.model().scale;
  const DenseAnswer dense = AttendDensely(shape, 1, Counting(0, kTokens), kTokens - 1);
  double total = 0.0;
  for (uint32_t block = 0; block < 3; ++block) {
    const auto report = Describe(handle_, {.block = block, .layer = 1});
    ASSERT_TRUE(report.ok()) << report.status();
    ASSERT_EQ(report->slices.size(), 1U);
    ASSERT_EQ(report->slices[0].attention_mass.size(), 4U);
    for (uint32_t head = 0; head < 4; ++head) {
      double expected = 0.0;
      for (uint32_t t = 64 * block; t < std::min(64 * (block + 1), kTokens); ++t) {
        expected += std::exp(dense.logits[head][t] - dense.lse[head]);
      }
      EXPECT_NEAR(report->slices[0].attention_mass[head], expected, 1e-5);
      total += report->slices[0].attention_mass[head];
    }
  }
  EXPECT_NEAR(total, 4.0, 1e-4);
  // No query of layer 0 was kept.
  EXPECT_TRUE(Describe(handle_, {.block = 0, .layer = 0})->slices[0].attention_mass.empty());
}

TEST_F(DescribeBlockTest, EqualBytesHaveEqualChecksums) {
  const auto first = Describe(handle_, {.block = 0});
  const auto second = Describe(handle_, {.block = 1});
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_NE(first->slices[0].checksum, second->slices[0].checksum);
  EXPECT_NE(first->slices[0].checksum, first->slices[1].checksum);
  const Handle twin = engine_.NewSequence();
  engine_.Fill(twin, 0, Counting(0, kTokens));
  EXPECT_EQ(Describe(twin, {.block = 0})->slices[0].checksum, first->slices[0].checksum);

  const auto fork = engine_.Fork(handle_);
  ASSERT_TRUE(fork.ok());
  const Handle child{.id = fork->id, .generation = fork->generation};
  EXPECT_TRUE(Describe(child, {.block = 0})->is_shared);
  EXPECT_FALSE(Describe(child, {.block = 2})->is_shared) << "the partial block is copied";
  EXPECT_EQ(Describe(child, {.block = 2})->slices[1].checksum,
            Describe(handle_, {.block = 2})->slices[1].checksum);
}

TEST_F(DescribeBlockTest, WrongAsks) {
  EXPECT_EQ(ErrorLine(Describe(handle_, {.block = 3}).status()),
            "OUT_OF_RANGE BLOCK_OUT_OF_RANGE block_index");
  EXPECT_EQ(ErrorLine(Describe(engine_.NewSequence(), {.block = 0}).status()),
            "OUT_OF_RANGE BLOCK_OUT_OF_RANGE block_index");
  EXPECT_EQ(ErrorLine(Describe(handle_, {.block = 0, .layer = 2}).status()),
            "INVALID_ARGUMENT LAYER_OUT_OF_RANGE layer");
  EXPECT_EQ(ErrorLine(Describe({}, {.block = 0}).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
}

}  // namespace
}  // namespace kvservice::testing
