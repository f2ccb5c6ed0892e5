#include "kvservice/cache/sequence.h"

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/kvservice/fakes.h"
#include "tests/kvservice/words.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLayers = 3;
constexpr BlockOwner kOwner = 0;

class SequenceTest : public ::testing::Test {
 protected:
  void Start(size_t block_count, size_t host_block_count = 0) {
    pool_ = *BlockPool::New(device_.get(), block_count * shape_.block_bytes(),
                            host_block_count * shape_.block().rows);
  }
  std::unique_ptr<Sequence> New() {
    return std::make_unique<Sequence>(&shape_, pool_.get(), device_.get(), kOwner);
  }
  std::vector<std::byte> Bytes(Part part, uint32_t layer, absl::Span<const uint32_t> words) const {
    return PartBytes(layout_, layout_.dtype, part, layer, words);
  }
  AppendOutcome AppendLayer(Sequence* sequence, uint32_t layer, uint32_t position,
                            absl::Span<const uint32_t> words) {
    const std::vector<std::byte> k = Bytes(Part::kKey, layer, words);
    const std::vector<std::byte> v = Bytes(Part::kValue, layer, words);
    return sequence->Append(layer, position, static_cast<uint32_t>(words.size()), k.data(),
                            v.data());
  }
  void AppendAll(Sequence* sequence, uint32_t position, absl::Span<const uint32_t> words) {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      ASSERT_EQ(AppendLayer(sequence, layer, position, words), AppendOutcome::kStored);
    }
  }

  // A layer holds exactly these words, and sketches exist exactly for full slices and are right.
  void ExpectWords(const Sequence& sequence, uint32_t layer, const Words& words) {
    ASSERT_EQ(sequence.length(layer), words.size());
    ViewArrays arrays;
    const KvView view = sequence.View(layer, sequence.length(layer), &arrays);
    const std::vector<std::byte> k = Bytes(Part::kKey, layer, words);
    const std::vector<std::byte> v = Bytes(Part::kValue, layer, words);
    const size_t bytes = layout_.vector_bytes();
    for (uint32_t token = 0; token < words.size(); ++token) {
      for (uint32_t head = 0; head < layout_.kv_head_count; ++head) {
        const size_t from = (size_t{token} * layout_.kv_head_count + head) * bytes;
        const std::byte* row = view.Row(layout_, head, token);
        ASSERT_EQ(std::memcmp(row, &k[from], bytes), 0) << "key of token " << token;
        ASSERT_EQ(std::memcmp(row + bytes, &v[from], bytes), 0) << "value of token " << token;
      }
    }
    const SketchLayout sketch(layout_.head_dim);
    for (uint32_t block = 0; block < view.slices.size(); ++block) {
      ASSERT_EQ(view.sketches[block] != nullptr, (block + 1) * kBlockTokens <= words.size());
      if (view.sketches[block] == nullptr) continue;
      for (uint32_t head = 0; head < layout_.kv_head_count; ++head) {
        ASSERT_TRUE(VerifySketchPage(layout_, view.slices[block] + layout_.RowOffset(head, 0),
                                     tables_[0], view.sketches[block] + head * sketch.page_bytes));
      }
    }
  }
  void ExpectWords(const Sequence& sequence, const Words& words) {
    for (uint32_t layer = 0; layer < kLayers; ++layer) ExpectWords(sequence, layer, words);
  }

  const KvLayout layout_{.query_head_count = 4, .kv_head_count = 2, .head_dim = 64};
  const std::vector<SketchTable> tables_{kLayers * layout_.kv_head_count,
                                         IdentitySketchTable(layout_.head_dim)};
  const CacheShape shape_{layout_, kLayers, tables_};
  std::unique_ptr<Device> device_ = *NewDevice("reference", {});
  std::unique_ptr<BlockPool> pool_;
};

TEST_F(SequenceTest, StoresChunksOfAnySizeAcrossBlocks) {
  Start(16);
  for (const uint32_t chunk : {1U, 7U, 63U, 64U, 65U, 128U, 200U}) {
    SCOPED_TRACE(chunk);
    const auto sequence = New();
    const Words words = Counting(chunk * 1000, 300);
    for (uint32_t at = 0; at < words.size(); at += chunk) {
      const uint32_t count = std::min<uint32_t>(chunk, static_cast<uint32_t>(words.size()) - at);
      AppendAll(sequence.get(), at, absl::MakeConstSpan(words).subspan(at, count));
    }
    ExpectWords(*sequence, words);
    EXPECT_EQ(sequence->block_count(), 5U);
    EXPECT_EQ(pool_->blocks_used(), 5U);
    EXPECT_EQ(sequence->bytes(), 5 * shape_.block_bytes());
  }
  EXPECT_EQ(pool_->blocks_used(), 0U);
}

TEST_F(SequenceTest, LengthsArePerLayer) {
  Start(4);
  const auto sequence = New();
  EXPECT_EQ(AppendLayer(sequence.get(), 1, 0, Counting(0, 70)), AppendOutcome::kStored);
  EXPECT_EQ(AppendLayer(sequence.get(), 2, 0, Counting(0, 10)), AppendOutcome::kStored);
  EXPECT_EQ(sequence->length_min(), 0U);
  EXPECT_EQ(sequence->length_max(), 70U);
  EXPECT_EQ(sequence->block_count(), 2U);
  ExpectWords(*sequence, 0, {});
  ExpectWords(*sequence, 1, Counting(0, 70));
  ExpectWords(*sequence, 2, Counting(0, 10));
}

TEST_F(SequenceTest, RepeatsGapsAndConflicts) {
  Start(8);
  const auto sequence = New();
  const Words words = Counting(0, 100);
  AppendAll(sequence.get(), 0, words);
  EXPECT_EQ(AppendLayer(sequence.get(), 0, 0, words), AppendOutcome::kDuplicate);
  EXPECT_EQ(AppendLayer(sequence.get(), 0, 60, Counting(60, 10)), AppendOutcome::kDuplicate);
  EXPECT_EQ(AppendLayer(sequence.get(), 0, 101, Counting(101, 1)), AppendOutcome::kGap);
  EXPECT_EQ(AppendLayer(sequence.get(), 0, UINT32_MAX - 1, Counting(0, 1)), AppendOutcome::kGap);
  EXPECT_EQ(AppendLayer(sequence.get(), 0, 90, Counting(91, 20)), AppendOutcome::kConflict);
  ExpectWords(*sequence, words);
  // An overlap that agrees is skipped, the rest is stored.
  EXPECT_EQ(AppendLayer(sequence.get(), 0, 50, Counting(50, 90)), AppendOutcome::kStored);
  ExpectWords(*sequence, 0, Counting(0, 140));
}

TEST_F(SequenceTest, EveryBitOfTheOverlapIsCompared) {
  Start(2);
  const auto sequence = New();
  const Words words = Counting(5, 3);
  AppendAll(sequence.get(), 0, words);
  std::vector<std::byte> k = Bytes(Part::kKey, 1, words);
  std::vector<std::byte> v = Bytes(Part::kValue, 1, words);
  for (std::vector<std::byte>* part : {&k, &v}) {
    for (std::byte& byte : *part) {
      byte ^= std::byte{0x10};
      ASSERT_EQ(sequence->Append(1, 0, 3, k.data(), v.data()), AppendOutcome::kConflict);
      byte ^= std::byte{0x10};
    }
  }
  EXPECT_EQ(sequence->Append(1, 0, 3, k.data(), v.data()), AppendOutcome::kDuplicate);
}

TEST_F(SequenceTest, AFullPoolChangesNothing) {
  for (size_t blocks = 0; blocks <= 4; ++blocks) {
    Start(blocks);
    const auto sequence = New();
    const auto stored = static_cast<uint32_t>(blocks) * kBlockTokens;
    if (stored > 0) AppendAll(sequence.get(), 0, Counting(0, stored));
    EXPECT_EQ(AppendLayer(sequence.get(), 1, stored, Counting(stored, 1)),
              AppendOutcome::kPoolFull);
    EXPECT_EQ(AppendLayer(sequence.get(), 1, stored / 2, Counting(stored / 2, 300)),
              AppendOutcome::kPoolFull);
    EXPECT_EQ(pool_->blocks_used(), blocks);
    ExpectWords(*sequence, Counting(0, stored));
  }
}

TEST_F(SequenceTest, AViewCutsTheSliceItEndsIn) {
  Start(4);
  const auto sequence = New();
  AppendAll(sequence.get(), 0, Counting(0, 192));
  ViewArrays arrays;
  for (const uint32_t length : {0U, 1U, 63U, 64U, 65U, 127U, 128U, 191U, 192U}) {
    const KvView view = sequence->View(0, length, &arrays);
    EXPECT_EQ(view.length, length);
    ASSERT_EQ(view.slices.size(), BlockCount(length));
    ASSERT_EQ(view.sketches.size(), BlockCount(length));
    for (uint32_t block = 0; block < view.slices.size(); ++block) {
      EXPECT_EQ(view.sketches[block] != nullptr, (block + 1) * kBlockTokens <= length);
    }
  }
}

// A sequence's own arrays show what arrays made anew show, whatever happened in between.
TEST_F(SequenceTest, AViewOfItsOwnKeepsUp) {
  Start(64, 64);
  auto sequence = New();
  std::mt19937 random(7);
  ViewArrays arrays;
  std::map<uint64_t, std::vector<const std::byte*>> named;  // revision -> full blocks
  const auto expect_views = [&](Sequence* of) {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (int turn = 0; turn < 3; ++turn) {
        const auto length = static_cast<uint32_t>(random() % (of->length(layer) + 1));
        const KvView anew = of->View(layer, length, &arrays);
        const KvView own = of->View(layer, length);
        ASSERT_EQ(own.length, length);
        ASSERT_EQ(own.slices, anew.slices);
        ASSERT_EQ(own.sketches, anew.sketches);
        ASSERT_NE(own.revision, 0U);
        std::vector<const std::byte*>& known = named[own.revision];
        for (uint32_t block = 0; block < length / kBlockTokens; ++block) {
          if (block == known.size()) known.push_back(own.slices[block]);
          ASSERT_EQ(known[block], own.slices[block]);
        }
      }
    }
  };
  for (int round = 0; round < 120; ++round) {
    const uint32_t length = sequence->length_max();
    switch (random() % 6) {
      case 0:
        ASSERT_TRUE(sequence->Truncate(static_cast<uint32_t>(random() % (length + 1))));
        break;
      case 4:
        if (random() % 3 == 0) sequence->MoveAllToHost();
        sequence->MoveToHost(random() % (8 * shape_.block().rows));
        break;
      case 5:
        sequence->MoveToDevice(random() % (8 * shape_.block().rows));
        break;
      case 1: {
        auto fork = sequence->Fork(length);
        ASSERT_NE(fork, nullptr);
        expect_views(sequence.get());
        if (random() % 2 == 0) std::swap(fork, sequence);
        expect_views(fork.get());
        break;
      }
      default:
        AppendAll(sequence.get(), length, Counting(length, 1 + random() % 200));
    }
    expect_views(sequence.get());
    ExpectWords(*sequence, Counting(0, sequence->length_max()));
    if (sequence->length_max() > 1500) {
      ASSERT_TRUE(sequence->Truncate(100));
    }
  }
  EXPECT_GT(pool_->moved_total(RowPlace::kHost), 10U);
  EXPECT_GT(pool_->moved_total(RowPlace::kDevice), 10U);
}

// Whoever asks until there is enough room must hear that there is no more to be had.
TEST_F(SequenceTest, MovesSayWhetherAnythingMoved) {
  Start(3, 2);
  const auto sequence = New();
  EXPECT_FALSE(sequence->MoveAllToHost());
  EXPECT_FALSE(sequence->MoveStepRowsToDevice());
  AppendAll(sequence.get(), 0, Counting(0, 192));
  EXPECT_TRUE(sequence->MoveAllToHost());
  EXPECT_TRUE(sequence->is_on_host(1));
  EXPECT_FALSE(sequence->is_on_host(2)) << "the host has room for two";
  EXPECT_TRUE(sequence->HasStepRowsOn(RowPlace::kDevice));
  EXPECT_FALSE(sequence->MoveAllToHost());
  EXPECT_TRUE(sequence->MoveStepRowsToDevice());
  EXPECT_FALSE(sequence->MoveStepRowsToDevice());
  EXPECT_FALSE(sequence->HasStepRowsOn(RowPlace::kHost));
  ExpectWords(*sequence, Counting(0, 192));
}

// The device hears of the rows of several sequences once, and nobody reads before it has.
TEST_F(SequenceTest, WritesWaitTogether) {
  struct CountingDevice : DeviceWrapper {
    using DeviceWrapper::DeviceWrapper;
    void Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) override {
      appends.push_back(slices.size());
      DeviceWrapper::Append(layout, slices);
    }
    void Seal(const KvLayout& layout, absl::Span<const SealSlice> slices) override {
      seals.push_back(slices.size());
      DeviceWrapper::Seal(layout, slices);
    }
    std::vector<size_t> appends, seals;
  };
  Start(8);
  CountingDevice device(*NewDevice("reference", {}));
  Sequence one(&shape_, pool_.get(), &device, kOwner);
  Sequence other(&shape_, pool_.get(), &device, kOwner);
  const Words words = Counting(0, 64);
  const std::vector<std::byte> k = Bytes(Part::kKey, 0, words);
  const std::vector<std::byte> v = Bytes(Part::kValue, 0, words);
  PendingWrites writes;
  EXPECT_EQ(one.Append(0, 0, 10, k.data(), v.data(), &writes), AppendOutcome::kStored);
  EXPECT_EQ(other.Append(0, 0, 64, k.data(), v.data(), &writes), AppendOutcome::kStored);
  EXPECT_TRUE(device.appends.empty());
  EXPECT_EQ(one.length(0), 10U);
  // What is stored is compared, so it has to be there.
  EXPECT_EQ(one.Append(0, 0, 10, k.data(), v.data(), &writes), AppendOutcome::kDuplicate);
  EXPECT_EQ(device.appends, std::vector<size_t>{2});
  EXPECT_EQ(device.seals, std::vector<size_t>{1});
  writes.Run(layout_, &device);
  EXPECT_EQ(device.appends.size(), 1U) << "there was nothing left";
  ExpectWords(other, 0, words);
}

TEST_F(SequenceTest, ForksShareFullBlocksAndThenDiffer) {
  for (const uint32_t length : {0U, 1U, 63U, 64U, 65U, 127U, 128U, 150U}) {
    SCOPED_TRACE(length);
    Start(16);
    const auto parent = New();
    AppendAll(parent.get(), 0, Counting(0, 150));
    const auto child = parent->Fork(length);
    ASSERT_NE(child, nullptr);
    ExpectWords(*child, Counting(0, length));
    EXPECT_EQ(pool_->blocks_used(), 3 + (length % kBlockTokens == 0 ? 0U : 1U));

    AppendAll(child.get(), length, Counting(5000, 140));
    AppendAll(parent.get(), 150, Counting(7000, 140));
    Words of_child = Counting(0, length);
    const Words more = Counting(5000, 140);
    of_child.insert(of_child.end(), more.begin(), more.end());
    Words of_parent = Counting(0, 150);
    const Words other = Counting(7000, 140);
    of_parent.insert(of_parent.end(), other.begin(), other.end());
    ExpectWords(*child, of_child);
    ExpectWords(*parent, of_parent);
  }
}

TEST_F(SequenceTest, AForkLivesOnWithoutItsParent) {
  Start(3);
  auto parent = New();
  AppendAll(parent.get(), 0, Counting(0, 128));
  const auto child = parent->Fork(128);
  parent.reset();
  EXPECT_EQ(pool_->blocks_used(), 2U);
  ExpectWords(*child, Counting(0, 128));
}

TEST_F(SequenceTest, AForkThatFindsNoBlockLeavesNothingBehind) {
  Start(2);
  const auto parent = New();
  AppendAll(parent.get(), 0, Counting(0, 100));
  EXPECT_EQ(parent->Fork(100), nullptr);
  EXPECT_EQ(pool_->blocks_used(), 2U);
  AppendAll(parent.get(), 100, Counting(100, 28));
  ExpectWords(*parent, Counting(0, 128));
  EXPECT_NE(parent->Fork(128), nullptr) << "full blocks need no memory";
}

TEST_F(SequenceTest, TruncateThenWriteOther) {
  for (const uint32_t length : {0U, 1U, 63U, 64U, 65U, 100U, 128U, 149U}) {
    SCOPED_TRACE(length);
    Start(8);
    const auto sequence = New();
    AppendAll(sequence.get(), 0, Counting(0, 150));
    ASSERT_TRUE(sequence->Truncate(length));
    ExpectWords(*sequence, Counting(0, length));
    EXPECT_EQ(pool_->blocks_used(), BlockCount(length));
    AppendAll(sequence.get(), length, Counting(9000, 100));
    Words words = Counting(0, length);
    const Words more = Counting(9000, 100);
    words.insert(words.end(), more.begin(), more.end());
    ExpectWords(*sequence, words);
  }
}

TEST_F(SequenceTest, TruncateKeepsShorterLayersAsTheyAre) {
  Start(8);
  const auto sequence = New();
  ASSERT_EQ(AppendLayer(sequence.get(), 0, 0, Counting(0, 200)), AppendOutcome::kStored);
  ASSERT_EQ(AppendLayer(sequence.get(), 1, 0, Counting(0, 90)), AppendOutcome::kStored);
  ASSERT_TRUE(sequence->Truncate(100));
  EXPECT_EQ(sequence->length(0), 100U);
  EXPECT_EQ(sequence->length(1), 90U);
  EXPECT_EQ(sequence->block_count(), 2U);
  ASSERT_TRUE(sequence->Truncate(300));
  EXPECT_EQ(sequence->length_max(), 100U);
}

TEST_F(SequenceTest, TruncateInASharedBlockCopiesIt) {
  Start(3);
  const auto parent = New();
  AppendAll(parent.get(), 0, Counting(0, 128));
  const auto child = parent->Fork(128);
  ASSERT_TRUE(child->Truncate(70));
  EXPECT_EQ(pool_->blocks_used(), 3U);
  AppendAll(child.get(), 70, Counting(9000, 58));
  ExpectWords(*parent, Counting(0, 128));
  Words words = Counting(0, 70);
  const Words more = Counting(9000, 58);
  words.insert(words.end(), more.begin(), more.end());
  ExpectWords(*child, words);
}

TEST_F(SequenceTest, TruncateInASharedBlockWithoutRoomChangesNothing) {
  Start(2);
  const auto parent = New();
  AppendAll(parent.get(), 0, Counting(0, 128));
  const auto child = parent->Fork(128);
  EXPECT_FALSE(child->Truncate(70));
  ExpectWords(*child, Counting(0, 128));
  EXPECT_TRUE(child->Truncate(64)) << "a cut between blocks needs none";
  ExpectWords(*child, Counting(0, 64));
  ExpectWords(*parent, Counting(0, 128));
}

// Remembers what was asked of it.
struct RecordedLists : TokenLists {
  explicit RecordedLists(std::string name_in) : name(std::move(name_in)) {}
  std::unique_ptr<TokenLists> Copy() const override {
    return std::make_unique<RecordedLists>(name + "'");
  }
  void Truncate(uint32_t length) override { name += " cut " + std::to_string(length); }
  size_t bytes() const override { return 100; }
  std::string name;
};

class RecordedListsDevice : public DeviceWrapper {
 public:
  using DeviceWrapper::DeviceWrapper;
  std::unique_ptr<TokenLists> NewTokenLists(const KvLayout& /*layout*/,
                                            uint32_t anchors_max) override {
    return std::make_unique<RecordedLists>("lists of " + std::to_string(anchors_max));
  }
};

class SequenceListsTest : public SequenceTest {
 protected:
  void SetUp() override {
    device_ = std::make_unique<RecordedListsDevice>(*NewDevice("reference", {}));
    Start(16);
    sequence_ = New();
    AppendAll(sequence_.get(), 0, Counting(0, 100));
  }
  static std::string NameOf(const TokenLists* lists) {
    return lists == nullptr ? "none" : static_cast<const RecordedLists*>(lists)->name;
  }
  // A call on `length` tokens that uses the lists of a layer.
  static std::string Use(Sequence* sequence, uint32_t layer, uint32_t length, uint32_t anchors) {
    const std::string name = NameOf(sequence->ListsFor(layer, length, anchors));
    sequence->ListsUsed(layer, length);
    return name;
  }

  std::unique_ptr<Sequence> sequence_;
};

TEST_F(SequenceListsTest, AreMadeOncePerSizeAndCounted) {
  EXPECT_EQ(sequence_->list_bytes(), 0U);
  EXPECT_EQ(Use(sequence_.get(), 0, 90, 8), "lists of 8");
  const TokenLists* first = sequence_->ListsFor(0, 91, 8);
  EXPECT_EQ(sequence_->ListsFor(0, 92, 8), first);
  EXPECT_EQ(Use(sequence_.get(), 1, 90, 8), "lists of 8");
  EXPECT_EQ(sequence_->list_bytes(), 200U);
  EXPECT_EQ(sequence_->bytes(), 2 * shape_.block_bytes() + 200);
  EXPECT_EQ(Use(sequence_.get(), 0, 93, 16), "lists of 16");
  EXPECT_EQ(sequence_->list_bytes(), 200U);
  sequence_->DropLists();
  EXPECT_EQ(sequence_->list_bytes(), 0U);
}

TEST_F(SequenceListsTest, ForgetTokensThatALaterCallDoesNotSee) {
  EXPECT_EQ(Use(sequence_.get(), 0, 90, 8), "lists of 8");
  EXPECT_EQ(Use(sequence_.get(), 0, 90, 8), "lists of 8") << "a repeated call sees the same";
  EXPECT_EQ(Use(sequence_.get(), 0, 80, 8), "lists of 8 cut 80");
  ASSERT_TRUE(sequence_->Truncate(70));
  EXPECT_EQ(Use(sequence_.get(), 0, 70, 8), "lists of 8 cut 80 cut 70");
}

TEST_F(SequenceListsTest, AreSharedByAForkUntilOneSideUsesThem) {
  EXPECT_EQ(Use(sequence_.get(), 0, 100, 8), "lists of 8");
  EXPECT_EQ(Use(sequence_.get(), 1, 90, 8), "lists of 8");
  const auto child = sequence_->Fork(100);
  EXPECT_EQ(child->list_bytes(), 200U);
  EXPECT_EQ(child->ShallowerLists(1, 100), sequence_->ShallowerLists(1, 100));
  EXPECT_EQ(Use(child.get(), 0, 100, 8), "lists of 8'") << "a copy";
  EXPECT_EQ(Use(sequence_.get(), 0, 100, 8), "lists of 8") << "alone again";
  EXPECT_EQ(Use(child.get(), 1, 95, 8), "lists of 8'");

  const auto shorter = sequence_->Fork(95);
  EXPECT_EQ(shorter->list_bytes(), 100U) << "lists that know later tokens stay behind";
  EXPECT_EQ(Use(shorter.get(), 0, 95, 4), "lists of 4");
}

TEST_F(SequenceListsTest, TruncateDropsWhatIsShared) {
  EXPECT_EQ(Use(sequence_.get(), 0, 100, 8), "lists of 8");
  const auto child = sequence_->Fork(100);
  ASSERT_TRUE(child->Truncate(60));
  EXPECT_EQ(child->list_bytes(), 0U);
  EXPECT_EQ(Use(sequence_.get(), 0, 100, 8), "lists of 8");
}

TEST_F(SequenceListsTest, TheNearestShallowerLayerOfTheSameStepIsFound) {
  EXPECT_EQ(sequence_->ShallowerLists(0, 100), nullptr);
  EXPECT_EQ(sequence_->ShallowerLists(2, 100), nullptr);
  EXPECT_EQ(Use(sequence_.get(), 0, 100, 1), "lists of 1");
  EXPECT_EQ(NameOf(sequence_->ShallowerLists(2, 100)), "lists of 1");
  EXPECT_EQ(Use(sequence_.get(), 1, 99, 2), "lists of 2");
  EXPECT_EQ(NameOf(sequence_->ShallowerLists(2, 100)), "lists of 1") << "layer 1 is a step behind";
  EXPECT_EQ(Use(sequence_.get(), 1, 100, 2), "lists of 2");
  EXPECT_EQ(NameOf(sequence_->ShallowerLists(2, 100)), "lists of 2");
  EXPECT_EQ(NameOf(sequence_->ShallowerLists(1, 100)), "lists of 1");
}

}  // namespace
}  // namespace kvservice::testing
