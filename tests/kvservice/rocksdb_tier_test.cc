// The tier on a real directory. What a power cut leaves is in tests/stress.

#include "kvservice/cache/rocksdb_tier.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kvservice/error.h"

namespace kvservice {
namespace {

class RocksdbTierTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "tier.XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  absl::StatusOr<std::unique_ptr<DiskTier>> TryOpen() const {
    RocksdbTierOptions options;
    options.directory = folder_ + "/store";
    options.write_buffer_bytes = size_t{1} << 20;
    return OpenRocksdbTier(options);
  }
  std::unique_ptr<DiskTier> Open() const {
    auto tier = TryOpen();
    EXPECT_TRUE(tier.ok()) << tier.status();
    return tier.ok() ? *std::move(tier) : nullptr;
  }
  static std::string ReasonOf(const absl::Status& status) { return DetailsOf(status).reason; }

  std::string folder_;
};

TierBatch Put(const std::string& key, const std::string& value) {
  TierBatch batch;
  batch.puts.emplace_back(key, value);
  return batch;
}

std::string Noise(uint64_t seed, size_t bytes) {
  std::mt19937_64 random(seed);
  std::string noise(bytes, '\0');
  for (char& byte : noise) byte = static_cast<char>(random());
  return noise;
}

TEST_F(RocksdbTierTest, ABatchRemovesThenPutsInItsOrder) {
  const auto tier = Open();
  ASSERT_TRUE(tier->Commit({{Put("b1", "x"), Put("b2", "y"), Put("c", "z")}}, true).ok());
  TierBatch batch = Put("b2", "new");
  batch.removed_ranges.emplace_back("b", "c");
  ASSERT_TRUE(tier->Commit({&batch, 1}, false).ok());
  EXPECT_EQ(ReasonOf(tier->Read("b1").status()), "ROW_LOST");
  EXPECT_EQ(*tier->Read("b2"), "new");
  EXPECT_EQ(*tier->Read("c"), "z");
  std::vector<std::string> keys;
  ASSERT_TRUE(
      tier->Scan("b", [&](absl::string_view key, absl::string_view) { keys.emplace_back(key); })
          .ok());
  EXPECT_EQ(keys, std::vector<std::string>{"b2"});
}

TEST_F(RocksdbTierTest, TellsHowItWasLeft) {
  auto tier = Open();
  EXPECT_FALSE(tier->closed().is_clean);
  EXPECT_EQ(tier->closed().crash_count, 0);
  ASSERT_TRUE(tier->Commit({{Put("a", "1")}}, true).ok());
  ASSERT_TRUE(tier->Close("what there is").ok());
  tier = Open();
  EXPECT_TRUE(tier->closed().is_clean);
  EXPECT_EQ(tier->closed().inventory, "what there is");
  tier.reset();
  tier = Open();
  EXPECT_FALSE(tier->closed().is_clean);
  EXPECT_EQ(tier->closed().inventory, "");
  EXPECT_EQ(tier->closed().crash_count, 1);
  ASSERT_TRUE(tier->Close("").ok());
  tier = Open();
  EXPECT_TRUE(tier->closed().is_clean);
  EXPECT_EQ(tier->closed().crash_count, 1);
  EXPECT_EQ(*tier->Read("a"), "1");
}

TEST_F(RocksdbTierTest, OneProcessAtATime) {
  const auto tier = Open();
  EXPECT_EQ(ReasonOf(TryOpen().status()), "STORE_LOCKED");
}

// The state of an earlier close does not speak for what came after it.
TEST_F(RocksdbTierTest, AStaleStateIsNotBelieved) {
  const std::string state = folder_ + "/store/STATE";
  auto tier = Open();
  ASSERT_TRUE(tier->Close("old").ok());
  std::filesystem::copy_file(state, folder_ + "/copy");
  tier = Open();
  ASSERT_TRUE(tier->Commit({{Put("a", "1")}}, true).ok());
  ASSERT_TRUE(tier->Close("new").ok());
  std::filesystem::copy_file(folder_ + "/copy", state,
                             std::filesystem::copy_options::overwrite_existing);
  tier = Open();
  EXPECT_FALSE(tier->closed().is_clean);
  EXPECT_EQ(tier->closed().crash_count, 1);
}

// A database that has vanished is not taken for one that never was.
TEST_F(RocksdbTierTest, AMissingDatabaseIsRefused) {
  auto tier = Open();
  ASSERT_TRUE(tier->Close("").ok());
  for (const auto& entry : std::filesystem::directory_iterator(folder_ + "/store")) {
    if (entry.path().filename() != "STATE") std::filesystem::remove(entry.path());
  }
  EXPECT_EQ(ReasonOf(TryOpen().status()), "STORE_DAMAGED");
}

// After a crash too: nobody could say which rows it had.
TEST_F(RocksdbTierTest, ADatabaseOfBeforeIsRefused) {
  const std::filesystem::path store = folder_ + "/store";
  const std::filesystem::path copy = folder_ + "/copy";
  auto tier = Open();
  ASSERT_TRUE(tier->Commit({{Put("a", "1")}}, true).ok());
  tier.reset();
  std::filesystem::copy(store, copy);
  tier = Open();
  ASSERT_TRUE(tier->Commit({{Put("a", "2")}}, true).ok());
  tier.reset();
  std::filesystem::copy_file(store / "STATE", copy / "STATE",
                             std::filesystem::copy_options::overwrite_existing);
  std::filesystem::remove_all(store);
  std::filesystem::rename(copy, store);
  EXPECT_EQ(ReasonOf(TryOpen().status()), "STORE_DAMAGED");
}

TEST_F(RocksdbTierTest, CompactGivesRoomBackAndKeepsTheRest) {
  const auto tier = Open();
  constexpr size_t kBytes = size_t{256} << 10;
  const auto key = [](uint64_t i) { return "key" + std::to_string(100 + i); };
  for (uint64_t i = 0; i < 64; ++i) {
    const TierBatch batch = Put(key(i), Noise(i, kBytes));
    ASSERT_TRUE(tier->Commit({&batch, 1}, false).ok());
  }
  // Most are removed, and no file loses all of its rows.
  for (uint64_t i = 0; i < 64; i += 4) {
    TierBatch batch;
    batch.removed_ranges.emplace_back(key(i), key(i + 3));
    ASSERT_TRUE(tier->Commit({&batch, 1}, true).ok());
  }
  const uint64_t before = tier->file_bytes();
  EXPECT_GT(before, uint64_t{12} << 20);
  ASSERT_TRUE(tier->Compact().ok());
  EXPECT_LT(tier->file_bytes(), uint64_t{6} << 20);
  for (uint64_t i = 0; i < 64; ++i) {
    if (i % 4 == 3) {
      EXPECT_EQ(*tier->Read(key(i)), Noise(i, kBytes));
    } else {
      EXPECT_EQ(ReasonOf(tier->Read(key(i)).status()), "ROW_LOST");
    }
  }
}

}  // namespace
}  // namespace kvservice
