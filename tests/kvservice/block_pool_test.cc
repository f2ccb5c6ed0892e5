#include "kvservice/cache/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "absl/types/span.h"
#include "tests/kvservice/fakes.h"

namespace kvservice::testing {
namespace {

std::unique_ptr<Device> Reference() { return *NewDevice("reference", {}); }

class BlockPoolTest : public ::testing::Test {
 protected:
  std::unique_ptr<BlockPool> NewPool(size_t bytes) { return *BlockPool::New(device_.get(), bytes); }

  std::unique_ptr<Device> device_ = Reference();
};

TEST_F(BlockPoolTest, GivesOutTheWholeArenaAndNoMore) {
  const auto pool = NewPool(10 * 4096 + 4095);
  EXPECT_EQ(pool->bytes(), 10U * 4096 + 4095);
  std::vector<BlockRef> blocks;
  while (BlockRef block = pool->Allocate({.rows = 4096})) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block.rows()) % 64, 0U);
    std::memset(block.rows(), static_cast<int>(blocks.size()), 4096);
    blocks.push_back(std::move(block));
    EXPECT_EQ(pool->blocks_used(), blocks.size());
    EXPECT_EQ(pool->bytes_used(), blocks.size() * 4096);
  }
  EXPECT_EQ(blocks.size(), 10U);
  for (size_t i = 0; i < blocks.size(); ++i) {
    EXPECT_EQ(std::to_integer<size_t>(blocks[i].rows()[0]), i);
    EXPECT_EQ(std::to_integer<size_t>(blocks[i].rows()[4095]), i);
  }
  std::byte* const place = blocks[3].rows();
  blocks[3] = BlockRef();
  EXPECT_EQ(pool->blocks_used(), 9U);
  blocks[3] = pool->Allocate({.rows = 4096});
  EXPECT_EQ(blocks[3].rows(), place) << "a free block is used again";
  blocks.clear();
  EXPECT_EQ(pool->blocks_used(), 0U);
  EXPECT_EQ(pool->bytes_used(), 0U);
}

TEST_F(BlockPoolTest, TheLastReferenceReturnsTheBlock) {
  const auto pool = NewPool(4096);
  BlockRef first = pool->Allocate({.rows = 4096});
  EXPECT_FALSE(first.shared());
  BlockRef second = first.Share();
  EXPECT_TRUE(first.shared());
  EXPECT_TRUE(second.shared());
  EXPECT_EQ(first.rows(), second.rows());
  EXPECT_EQ(pool->blocks_used(), 1U);
  first = BlockRef();
  EXPECT_FALSE(second.shared());
  EXPECT_FALSE(pool->Allocate({.rows = 64}));
  const BlockRef third = std::move(second);
  EXPECT_EQ(pool->blocks_used(), 1U);
  { const BlockRef last = third.Share(); }
  EXPECT_EQ(pool->blocks_used(), 1U);
}

TEST_F(BlockPoolTest, FreeNeighboursBecomeOneRangeInAnyOrder) {
  const auto pool = NewPool(4 * 4096);
  std::vector<size_t> order = {0, 1, 2, 3};
  do {
    std::vector<BlockRef> blocks;
    blocks.reserve(4);
    for (int i = 0; i < 4; ++i) blocks.push_back(pool->Allocate({.rows = 4096}));
    for (const size_t i : order) blocks[i] = BlockRef();
    EXPECT_TRUE(pool->Allocate({.rows = 4 * 4096}));
  } while (std::next_permutation(order.begin(), order.end()));
  EXPECT_EQ(pool->bytes_used(), 0U);
}

TEST_F(BlockPoolTest, SmallBlocksFillSmallHolesFirst) {
  const auto pool = NewPool(16 * 1024);
  std::vector<BlockRef> blocks;
  blocks.reserve(16);
  for (int i = 0; i < 16; ++i) blocks.push_back(pool->Allocate({.rows = 1024}));
  for (const size_t i : {2, 8, 9, 10, 11}) blocks[i] = BlockRef();
  std::byte* const hole = blocks[1].rows() + 1024;
  EXPECT_EQ(pool->Allocate({.rows = 1000}).rows(), hole);
  const BlockRef small = pool->Allocate({.rows = 1000});
  EXPECT_TRUE(pool->Allocate({.rows = 4096})) << "the large hole was left whole";
}

TEST_F(BlockPoolTest, RandomUseNeverOverlapsAndCountsExactly) {
  constexpr uint64_t kSeed = 20250601;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  const auto pool = NewPool(1 << 20);
  std::map<std::byte*, std::pair<size_t, BlockRef>> held;
  size_t held_bytes = 0;
  for (int step = 0; step < 20000; ++step) {
    if (random() % 100 < 52) {
      const size_t bytes = 64 * (1 + random() % 400);
      BlockRef block = pool->Allocate({.rows = bytes});
      if (!block) continue;
      const auto next = held.upper_bound(block.rows());
      if (next != held.end()) {
        ASSERT_LE(block.rows() + bytes, next->first);
      }
      if (next != held.begin()) {
        ASSERT_LE(std::prev(next)->first + std::prev(next)->second.first, block.rows());
      }
      held_bytes += bytes;
      std::byte* const place = block.rows();
      held.emplace(place, std::make_pair(bytes, std::move(block)));
    } else if (!held.empty()) {
      auto victim = std::next(held.begin(), static_cast<ptrdiff_t>(random() % held.size()));
      held_bytes -= victim->second.first;
      held.erase(victim);
    }
    ASSERT_EQ(pool->bytes_used(), held_bytes);
    ASSERT_EQ(pool->blocks_used(), held.size());
  }
  held.clear();
  EXPECT_TRUE(pool->Allocate({.rows = 1 << 20})) << "everything came back as one range";
}

// Whatever sizes come and go, a tenant finds its own bytes and zeros, nobody else's.
TEST_F(BlockPoolTest, WhatFitsIsWhatCanBeTaken) {
  BlockArena arena(device_.get(), *device_->Allocate(10 * 4096));
  EXPECT_TRUE(arena.Fits(4096, 10));
  EXPECT_FALSE(arena.Fits(4096, 11));
  EXPECT_FALSE(arena.Fits(4097, 10));
  std::vector<std::byte*> pieces(10);
  for (std::byte*& piece : pieces) piece = arena.Take(4096, 0);
  EXPECT_TRUE(arena.Fits(1, 0));
  EXPECT_TRUE(arena.Fits(0, 3));
  EXPECT_FALSE(arena.Fits(1, 1));
  // Ranges of one, two and three pieces.
  for (const int freed : {0, 2, 3, 5, 6, 7}) arena.Return(pieces[freed], 4096);
  EXPECT_EQ(arena.bytes_free(), 6U * 4096);
  for (const auto& [bytes, count] :
       std::vector<std::pair<size_t, size_t>>{{4096, 6}, {4097, 3}, {3 * 4096, 1}, {2049, 9}}) {
    EXPECT_TRUE(arena.Fits(bytes, count)) << bytes;
    EXPECT_FALSE(arena.Fits(bytes, count + 1)) << bytes;
    std::vector<std::byte*> taken;
    while (std::byte* piece = arena.Take(bytes, 0)) taken.push_back(piece);
    EXPECT_EQ(taken.size(), count) << bytes;
    for (std::byte* piece : taken) arena.Return(piece, bytes);
  }
}

TEST_F(BlockPoolTest, ABlockThatChangesHandsIsCleared) {
  constexpr uint64_t kSeed = 20260301;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  const auto pool = NewPool(64 << 10);
  const BlockOwner owners[] = {pool->OwnerOf("a"), pool->OwnerOf("b"), pool->OwnerOf("c")};
  EXPECT_EQ(pool->OwnerOf("b"), owners[1]);
  EXPECT_NE(owners[0], owners[1]);
  std::vector<BlockRef> held;
  size_t own_count = 0;
  size_t zero_count = 0;
  for (int step = 0; step < 4000; ++step) {
    if (random() % 100 < 55) {
      const BlockOwner owner = owners[random() % 3];
      const size_t bytes = 64 * (1 + random() % 200);
      BlockRef block = pool->Allocate({.rows = bytes}, owner);
      if (!block) continue;
      const auto mark = static_cast<std::byte>(owner);
      for (size_t i = 0; i < bytes; ++i) {
        const std::byte found = block.rows()[i];
        ASSERT_TRUE(found == mark || found == std::byte{0}) << std::to_integer<int>(found);
        ++(found == mark ? own_count : zero_count);
        block.rows()[i] = mark;
      }
      held.push_back(std::move(block));
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      held.pop_back();
    }
  }
  // What need not be cleared is not.
  EXPECT_GT(own_count, zero_count / 10);
  EXPECT_GT(zero_count, own_count / 10);
}

TEST_F(BlockPoolTest, ADeviceWithoutMemoryMeansNoPool) {
  class FullDevice : public DeviceWrapper {
   public:
    using DeviceWrapper::DeviceWrapper;
    absl::StatusOr<DeviceMemory> Allocate(size_t /*bytes*/) override {
      return absl::ResourceExhaustedError("full");
    }
  };
  FullDevice full(Reference());
  EXPECT_EQ(BlockPool::New(&full, 4096).status().code(), absl::StatusCode::kResourceExhausted);
}

// ---- With memory of the host behind it ----

class TwoArenasTest : public BlockPoolTest {
 protected:
  static constexpr BlockBytes kBytes = {.rows = 4096, .sketches = 640};

  // Room for so many rows on the device, and for the sketches of all.
  void Start(size_t device_rows, size_t host_rows) {
    pool_ = *BlockPool::New(device_.get(),
                            (device_rows + host_rows) * kBytes.sketches + device_rows * kBytes.rows,
                            host_rows * kBytes.rows);
  }
  size_t CountOn(RowPlace place) const {
    return static_cast<size_t>(
        std::count_if(blocks_.begin(), blocks_.end(),
                      [&](const BlockRef& block) { return block.place() == place; }));
  }
  static std::vector<const BlockRef*> Pointers(absl::Span<const BlockRef> blocks) {
    std::vector<const BlockRef*> pointers;
    for (const BlockRef& block : blocks) pointers.push_back(&block);
    return pointers;
  }

  std::unique_ptr<BlockPool> pool_;
  std::vector<BlockRef> blocks_;
};

TEST_F(TwoArenasTest, RowsGoToTheHostWhenTheDeviceIsFull) {
  Start(2, 3);
  while (BlockRef block = pool_->Allocate(kBytes)) blocks_.push_back(std::move(block));
  EXPECT_EQ(blocks_.size(), 5U);
  EXPECT_EQ(CountOn(RowPlace::kDevice), 2U);
  EXPECT_EQ(pool_->why_not(), NoBlock::kPoolFull);
  EXPECT_EQ(pool_->bytes_used(), 5 * kBytes.total());
  EXPECT_EQ(pool_->host_arena()->bytes_used(), 3 * kBytes.rows);
  EXPECT_EQ(pool_->device_arena().bytes_used(), 2 * kBytes.rows + 5 * kBytes.sketches);
  blocks_.clear();
  EXPECT_EQ(pool_->bytes_used(), 0U);
  EXPECT_EQ(pool_->host_arena()->bytes_used(), 0U);
}

TEST_F(TwoArenasTest, RowsMoveAsFarAsThereIsRoom) {
  Start(4, 3);
  for (int i = 0; i < 4; ++i) blocks_.push_back(pool_->Allocate(kBytes));
  for (size_t i = 0; i < 4; ++i) std::memset(blocks_[i].rows(), static_cast<int>(i + 1), 4096);
  const uint64_t moves = pool_->moves();
  EXPECT_EQ(pool_->Move(Pointers(blocks_), RowPlace::kHost), 3U);
  EXPECT_GT(pool_->moves(), moves);
  EXPECT_EQ(pool_->moved_total(RowPlace::kHost), 3U);
  EXPECT_EQ(CountOn(RowPlace::kHost), 3U);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(std::to_integer<size_t>(blocks_[i].rows()[0]), i + 1);
    EXPECT_EQ(std::to_integer<size_t>(blocks_[i].rows()[4095]), i + 1);
  }
  // Those that are there already need none.
  EXPECT_EQ(pool_->Move(Pointers(absl::MakeSpan(blocks_).first(3)), RowPlace::kHost), 3U);
  EXPECT_EQ(pool_->moved_total(RowPlace::kHost), 3U);
  EXPECT_EQ(pool_->Move(Pointers(blocks_), RowPlace::kDevice), 4U);
  EXPECT_EQ(CountOn(RowPlace::kDevice), 4U);
  EXPECT_EQ(pool_->host_arena()->bytes_used(), 0U);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(std::to_integer<size_t>(blocks_[i].rows()[77]), i + 1);
}

TEST_F(TwoArenasTest, WhoeverSharesABlockFindsItWhereItIs) {
  Start(1, 1);
  blocks_.push_back(pool_->Allocate(kBytes));
  const BlockRef other = blocks_[0].Share();
  EXPECT_EQ(pool_->Move(Pointers(blocks_), RowPlace::kHost), 1U);
  EXPECT_EQ(other.rows(), blocks_[0].rows());
  EXPECT_EQ(other.place(), RowPlace::kHost);
  blocks_.clear();
  EXPECT_GT(pool_->host_arena()->bytes_used(), 0U);
}

// Sketches of what the host has need the device too.
TEST_F(TwoArenasTest, WhoMakesRoomIsAsked) {
  Start(2, 8);
  size_t asked = 0;
  pool_->SetRoomMaker([&](size_t bytes, BlockPool::RoomFor what) {
    ++asked;
    EXPECT_EQ(bytes, what == BlockPool::RoomFor::kRows ? kBytes.rows : kBytes.sketches);
    pool_->Move(Pointers(blocks_), RowPlace::kHost);
  });
  while (BlockRef block = pool_->Allocate(kBytes)) blocks_.push_back(std::move(block));
  EXPECT_EQ(blocks_.size(), 10U);
  EXPECT_EQ(CountOn(RowPlace::kDevice), 2U);
  EXPECT_GT(asked, 0U);
}

// Rows keep their bytes and tenants never see another's, whatever moves.
TEST_F(TwoArenasTest, MovedRowsAreTheTenantsOwn) {
  std::mt19937_64 random(20261130);
  Start(6, 9);
  const BlockOwner owners[] = {pool_->OwnerOf("a"), pool_->OwnerOf("b")};
  std::vector<BlockOwner> whose;
  for (int step = 0; step < 5000; ++step) {
    const uint64_t what = random() % 100;
    if (what < 45) {
      const BlockOwner owner = owners[random() % 2];
      BlockRef block = pool_->Allocate(kBytes, owner);
      if (!block) continue;
      const auto mark = static_cast<std::byte>(owner);
      for (const std::byte found : absl::MakeSpan(block.rows(), kBytes.rows)) {
        ASSERT_TRUE(found == mark || found == std::byte{0});
      }
      std::memset(block.rows(), static_cast<int>(owner), kBytes.rows);
      std::memset(block.sketches(), static_cast<int>(owner), kBytes.sketches);
      blocks_.push_back(std::move(block));
      whose.push_back(owner);
    } else if (what < 80 && !blocks_.empty()) {
      const size_t at = random() % blocks_.size();
      const auto mark = static_cast<std::byte>(whose[at]);
      for (const std::byte found : absl::MakeSpan(blocks_[at].rows(), kBytes.rows)) {
        ASSERT_EQ(found, mark);
      }
      for (const std::byte found : absl::MakeSpan(blocks_[at].sketches(), kBytes.sketches)) {
        ASSERT_EQ(found, mark);
      }
      std::swap(blocks_[at], blocks_.back());
      std::swap(whose[at], whose.back());
      blocks_.pop_back();
      whose.pop_back();
    } else if (!blocks_.empty()) {
      const size_t first = random() % blocks_.size();
      const size_t count = 1 + random() % (blocks_.size() - first);
      pool_->Move(Pointers(absl::MakeSpan(blocks_).subspan(first, count)),
                  random() % 2 == 0 ? RowPlace::kHost : RowPlace::kDevice);
    }
    ASSERT_EQ(pool_->bytes_used(), blocks_.size() * kBytes.total());
  }
  EXPECT_GT(pool_->moved_total(RowPlace::kHost), 100U);
  EXPECT_GT(pool_->moved_total(RowPlace::kDevice), 100U);
}

}  // namespace
}  // namespace kvservice::testing
