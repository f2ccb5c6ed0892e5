// What an engine says about one block, and where it puts the rows of which.

#include <gtest/gtest.h>

#include <cmath>
#include <future>
#include <random>
#include <string>
#include <vector>

#include "attention/float16.h"
#include "kvservice/cache/sequence.h"
#include "kvservice/error.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

// Two blocks and a part of a third.
constexpr uint32_t kTokens = 150;

absl::StatusOr<BlockReport> Describe(TestEngine* engine, const Handle& handle,
                                     const BlockAsk& ask) {
  std::promise<absl::StatusOr<BlockReport>> answer;
  engine->get()->DescribeBlock(
      kTenant, handle.id, ask,
      [&answer](absl::StatusOr<BlockReport> report) { answer.set_value(std::move(report)); });
  return answer.get_future().get();
}

class DescribeBlockTest : public ::testing::Test {
 protected:
  DescribeBlockTest() : handle_(engine_.NewSequence()) {
    engine_.Fill(handle_, 0, Counting(0, kTokens));
  }

  absl::StatusOr<BlockReport> Describe(const Handle& handle, const BlockAsk& ask) {
    return testing::Describe(&engine_, handle, ask);
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

// ---- Where rows are ----

class RowPlacementTest : public ::testing::Test {
 protected:
  // The device has room for the sketches of 40 blocks and the rows of ten.
  static EngineOptions Options() {
    const ModelSpec model = SmallModel(2);
    const CacheShape shape(model.layout, model.layer_count, {});
    EngineOptions options = TestEngine::SmallOptions();
    options.host_pool_bytes = 30 * shape.block().rows;
    options.pool_bytes = 40 * shape.block_bytes() - options.host_pool_bytes;
    return options;
  }
  // "h" for each block on the host, "d" for each on the device.
  std::string Places(const Handle& handle, uint32_t block_count) {
    std::string places;
    for (uint32_t block = 0; block < block_count; ++block) {
      places += Describe(&engine_, handle, {.block = block})->is_on_host ? 'h' : 'd';
    }
    return places;
  }
  void ExpectRight(const Handle& handle, uint32_t tokens) {
    AttendStep step(engine_.model(), 1);
    step.Add(handle, tokens - 1, Counting(tokens - 1, 1)).OnlyRead();
    ASSERT_TRUE(step.Run(engine_.get()).ok());
    ExpectDense(step, 0, engine_.model(), Counting(0, tokens), tokens - 1);
  }

  TestEngine engine_{Options()};
};

TEST_F(RowPlacementTest, TheOldestLeaveFirstAndWhatEveryStepReadsStays) {
  const Handle handle = engine_.NewSequence();
  for (uint32_t block = 0; block < 24; ++block) {
    engine_.Fill(handle, block * kBlockTokens, Counting(block * kBlockTokens, kBlockTokens));
  }
  const std::string places = Places(handle, 24);
  EXPECT_EQ(places.find("dh"), 0U) << places;
  EXPECT_EQ(places.find('d', 1), places.rfind('h') + 1) << places;
  EXPECT_EQ(places.substr(22), "dd") << places;
  EXPECT_GT(engine_.get()->Stats().blocks_to_host_total, 3U);
  EXPECT_GT(engine_.get()->Stats().host_pool_bytes_used, 0U);
  ExpectRight(handle, 24 * kBlockTokens);
}

TEST_F(RowPlacementTest, RowsOfIdleSequencesLeaveFirst) {
  const Handle idle = engine_.NewSequence();
  engine_.Fill(idle, 0, Counting(0, 9 * kBlockTokens));
  engine_.clock.AdvanceMs(2000);
  const Handle busy = engine_.NewSequence();
  engine_.Fill(busy, 0, Counting(0, 9 * kBlockTokens));
  EXPECT_EQ(Places(busy, 9), "ddddddddd");
  EXPECT_EQ(Places(idle, 9).substr(0, 2), "dh");
  ExpectRight(idle, 9 * kBlockTokens);
  ExpectRight(busy, 9 * kBlockTokens);
}

TEST_F(RowPlacementTest, TheyComeBackWhenThereIsRoom) {
  const Handle handle = engine_.NewSequence();
  engine_.Fill(handle, 0, Counting(0, 9 * kBlockTokens));
  const Handle other = engine_.NewSequence();
  engine_.Fill(other, 0, Counting(0, 9 * kBlockTokens));
  EXPECT_NE(Places(handle, 9) + Places(other, 9), std::string(18, 'd'));
  ASSERT_TRUE(engine_.Drop(other).ok());
  for (int i = 0; i < 20 && Places(handle, 9) != std::string(9, 'd'); ++i) {
    engine_.clock.AdvanceMs(200);
    ExpectRight(handle, 9 * kBlockTokens);
  }
  EXPECT_EQ(Places(handle, 9), std::string(9, 'd'));
  EXPECT_GT(engine_.get()->Stats().blocks_to_device_total, 0U);
}

TEST_F(RowPlacementTest, ManyShortSequencesFillTheHostToo) {
  std::vector<Handle> handles;
  for (int i = 0; i < 18; ++i) {
    handles.push_back(engine_.NewSequence());
    engine_.Fill(handles.back(), 0, Counting(0, 2 * kBlockTokens));
  }
  EXPECT_EQ(engine_.get()->Stats().blocks_used, 36U);
  for (const Handle& handle : handles) ExpectRight(handle, 2 * kBlockTokens);
}

// When neither has room the call is refused, and nobody looks for more forever.
TEST_F(RowPlacementTest, BothMayBeFull) {
  std::vector<Handle> handles;
  std::vector<uint32_t> lengths;
  std::mt19937 random(5);
  absl::Status status;
  for (int i = 0; i < 400 && status.ok(); ++i) {
    engine_.clock.AdvanceMs(700);
    // Some that have gone whole grow on the device again.
    if (handles.empty() || random() % 3 == 0) {
      handles.push_back(engine_.NewSequence());
      lengths.push_back(0);
    }
    const size_t at = random() % handles.size();
    const Words words = Counting(lengths[at], kBlockTokens);
    for (uint32_t layer = 0; layer < 2 && status.ok(); ++layer) {
      status = engine_.Append(handles[at], layer, lengths[at], words).status();
    }
    if (status.ok()) lengths[at] += kBlockTokens;
  }
  EXPECT_EQ(DetailsOf(status).reason, "POOL_FULL") << status;
  EXPECT_GE(engine_.get()->Stats().blocks_used, 36U);
  for (size_t i = 0; i < handles.size(); ++i) {
    EXPECT_EQ(
        DetailsOf(engine_.Append(handles[i], 0, lengths[i], Counting(0, 3 * kBlockTokens)).status())
            .reason,
        "POOL_FULL");
    if (lengths[i] > 0) ExpectRight(handles[i], lengths[i]);
  }
}

// A call stores all of its rows before any is read: room that one needs must not move what waits to
// be written for another.
TEST_F(RowPlacementTest, RowsOfACallKeepWhatTheyStore) {
  constexpr uint32_t kSequences = 8;
  std::vector<Handle> handles;
  std::vector<uint32_t> lengths;
  for (uint32_t i = 0; i < kSequences; ++i) {
    handles.push_back(engine_.NewSequence());
    lengths.push_back(2 * kBlockTokens + 7 * i);
    engine_.Fill(handles[i], 0, Counting(0, lengths[i]));
  }
  for (int step = 0; step < 100; ++step) {
    for (uint32_t layer = 0; layer < 2; ++layer) {
      AttendStep call(engine_.model(), layer);
      for (uint32_t i = 0; i < kSequences; ++i) {
        call.Add(handles[i], lengths[i], Counting(lengths[i], 1));
      }
      ASSERT_TRUE(call.Run(engine_.get()).ok());
      for (uint32_t i = 0; i < kSequences; ++i) {
        ASSERT_TRUE(call.result(i).status.ok()) << call.result(i).status;
        ExpectDense(call, i, engine_.model(), Counting(0, lengths[i] + 1), lengths[i]);
      }
    }
    for (uint32_t& length : lengths) ++length;
  }
  EXPECT_GT(engine_.get()->Stats().host_pool_bytes_used, 0U);
  for (uint32_t i = 0; i < kSequences; ++i) ExpectRight(handles[i], lengths[i]);
}

}  // namespace
}  // namespace kvservice::testing
