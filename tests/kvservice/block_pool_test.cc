#include "kvservice/cache/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <vector>

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
  while (BlockRef block = pool->Allocate(4096)) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block.data()) % 64, 0U);
    std::memset(block.data(), static_cast<int>(blocks.size()), 4096);
    blocks.push_back(std::move(block));
    EXPECT_EQ(pool->blocks_used(), blocks.size());
    EXPECT_EQ(pool->bytes_used(), blocks.size() * 4096);
  }
  EXPECT_EQ(blocks.size(), 10U);
  for (size_t i = 0; i < blocks.size(); ++i) {
    EXPECT_EQ(std::to_integer<size_t>(blocks[i].data()[0]), i);
    EXPECT_EQ(std::to_integer<size_t>(blocks[i].data()[4095]), i);
  }
  std::byte* const place = blocks[3].data();
  blocks[3] = BlockRef();
  EXPECT_EQ(pool->blocks_used(), 9U);
  blocks[3] = pool->Allocate(4096);
  EXPECT_EQ(blocks[3].data(), place) << "a free block is used again";
  blocks.clear();
  EXPECT_EQ(pool->blocks_used(), 0U);
  EXPECT_EQ(pool->bytes_used(), 0U);
}

TEST_F(BlockPoolTest, TheLastReferenceReturnsTheBlock) {
  const auto pool = NewPool(4096);
  BlockRef first = pool->Allocate(4096);
  EXPECT_FALSE(first.shared());
  BlockRef second = first.Share();
  EXPECT_TRUE(first.shared());
  EXPECT_TRUE(second.shared());
  EXPECT_EQ(first.data(), second.data());
  EXPECT_EQ(pool->blocks_used(), 1U);
  first = BlockRef();
  EXPECT_FALSE(second.shared());
  EXPECT_FALSE(pool->Allocate(64));
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
    for (int i = 0; i < 4; ++i) blocks.push_back(pool->Allocate(4096));
    for (const size_t i : order) blocks[i] = BlockRef();
    EXPECT_TRUE(pool->Allocate(4 * 4096));
  } while (std::next_permutation(order.begin(), order.end()));
  EXPECT_EQ(pool->bytes_used(), 0U);
}

TEST_F(BlockPoolTest, SmallBlocksFillSmallHolesFirst) {
  const auto pool = NewPool(16 * 1024);
  std::vector<BlockRef> blocks;
  blocks.reserve(16);
  for (int i = 0; i < 16; ++i) blocks.push_back(pool->Allocate(1024));
  for (const size_t i : {2, 8, 9, 10, 11}) blocks[i] = BlockRef();
  std::byte* const hole = blocks[1].data() + 1024;
  EXPECT_EQ(pool->Allocate(1000).data(), hole);
  const BlockRef small = pool->Allocate(1000);
  EXPECT_TRUE(pool->Allocate(4096)) << "the large hole was left whole";
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
      BlockRef block = pool->Allocate(bytes);
      if (!block) continue;
      const auto next = held.upper_bound(block.data());
      if (next != held.end()) {
        ASSERT_LE(block.data() + bytes, next->first);
      }
      if (next != held.begin()) {
        ASSERT_LE(std::prev(next)->first + std::prev(next)->second.first, block.data());
      }
      held_bytes += bytes;
      std::byte* const place = block.data();
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
  EXPECT_TRUE(pool->Allocate(1 << 20)) << "everything came back as one range";
}

// Whatever sizes come and go, a tenant finds its own bytes and zeros, nobody else's.
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
      BlockRef block = pool->Allocate(bytes, owner);
      if (!block) continue;
      const auto mark = static_cast<std::byte>(owner);
      for (size_t i = 0; i < bytes; ++i) {
        const std::byte found = block.data()[i];
        ASSERT_TRUE(found == mark || found == std::byte{0}) << std::to_integer<int>(found);
        ++(found == mark ? own_count : zero_count);
        block.data()[i] = mark;
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

}  // namespace
}  // namespace kvservice::testing
