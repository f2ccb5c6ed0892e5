// What a tenant may use: maxima, reserves, who makes room for whom, and that what is counted is
// what is there.

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"
#include "kvservice/stored_progress.h"
#include "tests/kvservice/engine_client.h"
#include "tests/kvservice/memory_tier.h"

namespace kvservice::testing {
namespace {

constexpr char kFull[] = "RESOURCE_EXHAUSTED POOL_FULL";
constexpr char kQuota[] = "RESOURCE_EXHAUSTED TENANT_QUOTA";
constexpr uint32_t kPoolBlocks = 40;

uint64_t Blocks(uint64_t count) { return count * BlockBytes(SmallModel(1)); }

EngineOptions Options() {
  EngineOptions options = TestEngine::SmallOptions();
  options.pool_bytes = Blocks(kPoolBlocks);
  options.audit_rate = 0.0;
  return options;
}

// One layer, 40 blocks, with a disk or without.
class QuotaTest : public ::testing::Test {
 protected:
  void Start(bool has_disk, const EngineOptions& options = Options()) {
    has_disk_ = has_disk;
    engine_ = std::make_unique<TestEngine>(
        options, 1, nullptr, has_disk ? std::make_unique<MemoryTier>(&rows_) : nullptr);
  }

  Handle New(const std::string& tenant) {
    CreateOptions options;
    options.model = kModel;
    const auto created = engine_->Create(options, tenant);
    EXPECT_TRUE(created.ok()) << created.status();
    return {.id = created->id, .generation = created->generation};
  }
  std::string Append(const std::string& tenant, const Handle& handle, uint32_t position,
                     uint32_t count) {
    return ErrorLine(
        engine_->Append(handle, 0, position, Counting(position, count), tenant).status());
  }
  // A sequence of so many blocks, used later than all before it.
  Handle Filled(const std::string& tenant, uint32_t blocks) {
    engine_->clock.AdvanceMs(100);
    const Handle handle = New(tenant);
    EXPECT_EQ(Append(tenant, handle, 0, blocks * kBlockTokens), "OK");
    return handle;
  }
  void SetQuota(const std::string& tenant, const TenantQuota& quota) {
    const auto set = engine_->SetQuota(tenant, quota);
    ASSERT_TRUE(set.ok()) << set.status();
  }
  TenantUsage UsageOf(const std::string& tenant) { return engine_->ListTenants(tenant).front(); }
  uint64_t BlocksOf(const std::string& tenant) {
    const TenantUsage usage = UsageOf(tenant);
    EXPECT_EQ(usage.pool_bytes_used, Blocks(usage.block_count));
    return usage.block_count;
  }
  // Once nothing is on its way.
  bool IsOnDisk(const std::string& tenant, const Handle& handle) {
    if (has_disk_) engine_->Resume(handle, tenant).IgnoreError();
    return engine_->Get(handle, tenant)->tier == SequenceTier::kDisk;
  }

  bool has_disk_ = false;
  TierRows rows_;
  std::unique_ptr<TestEngine> engine_;
};

// ---- Maxima ----

TEST_F(QuotaTest, WithoutADiskATenantAtItsMaximumIsRefusedAndNothingChanges) {
  Start(false);
  SetQuota("a", {.pool_bytes_max = Blocks(10)});
  const Handle handle = Filled("a", 8);
  const auto refused = engine_->Append(handle, 0, 8 * 64, Counting(0, 2 * 64 + 1), "a");
  EXPECT_EQ(ErrorLine(refused.status()), kQuota);
  EXPECT_GT(DetailsOf(refused.status()).retry_delay_ms, 0);
  EXPECT_EQ(BlocksOf("a"), 8);
  EXPECT_EQ(engine_->Get(handle, "a")->length, 8 * 64);
  EXPECT_EQ(Append("a", handle, 8 * 64, 2 * 64), "OK") << "the last byte may be used";
  AttendStep step(engine_->model(), 0, "a");
  step.Add(handle, 10 * 64, {1});
  ASSERT_TRUE(step.Run(engine_->get()).ok());
  EXPECT_EQ(ErrorLine(step.result(0).status), kQuota);
  Filled("b", 30);
  EXPECT_EQ(UsageOf("a").quota.pool_bytes_max, Blocks(10));
}

TEST_F(QuotaTest, WhatForksShareCountsOnce) {
  Start(false);
  SetQuota("a", {.pool_bytes_max = Blocks(10)});
  const Handle parent = Filled("a", 8);
  std::vector<Handle> children;
  for (int i = 0; i < 5; ++i) {
    const auto child = engine_->Fork(parent, UINT32_MAX, "a");
    ASSERT_TRUE(child.ok());
    children.push_back({.id = child->id, .generation = child->generation});
  }
  EXPECT_EQ(BlocksOf("a"), 8);
  EXPECT_TRUE(engine_->Fork(parent, 7 * 64 + 1, "a").ok()) << "a copy of the open block";
  EXPECT_EQ(BlocksOf("a"), 9);
  EXPECT_TRUE(engine_->Drop(parent, "a").ok());
  EXPECT_EQ(BlocksOf("a"), 9);
  EXPECT_EQ(Append("a", children[0], 8 * 64, 1), "OK");
  EXPECT_EQ(Append("a", children[1], 8 * 64, 1), kQuota);
  EXPECT_EQ(ErrorLine(engine_->Fork(children[0], 8 * 64 + 1, "a").status()), kQuota);
  EXPECT_EQ(UsageOf("a").sequence_count, 6);
  for (const SequenceInfo& info : engine_->List("a")) {
    EXPECT_TRUE(engine_->Drop({.id = info.id, .generation = info.generation}, "a").ok());
  }
  EXPECT_EQ(BlocksOf("a"), 0);
}

TEST_F(QuotaTest, BeyondItsMaximumATenantsOwnOldestSequencesLeave) {
  Start(true);
  SetQuota("a", {.pool_bytes_max = Blocks(12)});
  const Handle other = Filled("b", 12);  // The oldest of all, and of who has the most.
  const Handle first = Filled("a", 5);
  const Handle second = Filled("a", 5);
  const Handle third = Filled("a", 5);
  EXPECT_TRUE(IsOnDisk("a", first));
  EXPECT_FALSE(IsOnDisk("a", second));
  EXPECT_FALSE(IsOnDisk("a", third));
  EXPECT_FALSE(IsOnDisk("b", other));
  EXPECT_EQ(BlocksOf("a"), 10);
  // It comes back, and the next one goes.
  engine_->clock.AdvanceMs(100);
  EXPECT_TRUE(engine_->RenewLease(third, 0, "a").ok());
  EXPECT_EQ(Append("a", first, 5 * 64, 1), "OK");
  EXPECT_TRUE(IsOnDisk("a", second));
  EXPECT_EQ(BlocksOf("a"), 11);
  EXPECT_FALSE(IsOnDisk("b", other));
  EXPECT_EQ(engine_->get()->Stats().evictions, (EvictionTotals{0, 2, 0})) << "all for the maximum";
  // More than it may have at all.
  const Handle large = New("a");
  EXPECT_EQ(Append("a", large, 0, 12 * 64 + 1), kQuota);
  EXPECT_EQ(engine_->Get(large, "a")->length, 0);
}

TEST_F(QuotaTest, AMaximumThatGoesBelowWhatIsUsedMakesRoomByItself) {
  Start(true);
  const Handle first = Filled("a", 8);
  const Handle second = Filled("a", 8);
  SetQuota("a", {.pool_bytes_max = Blocks(9)});
  engine_->clock.AdvanceMs(200);
  EXPECT_TRUE(Eventually([&] { return BlocksOf("a") == 8; }));
  EXPECT_TRUE(IsOnDisk("a", first));
  EXPECT_FALSE(IsOnDisk("a", second));
}

TEST_F(QuotaTest, RowsOnDiskHaveAMaximumOfTheirOwn) {
  Start(true);
  const uint64_t row_bytes =
      StoredLayerBytes(CacheShape(SmallModel(1).layout, 1, {}), 12 * kBlockTokens);
  SetQuota("a", {.disk_bytes_max = row_bytes + 4096});
  const Handle first = Filled("a", 12);
  const Handle second = Filled("a", 12);
  EXPECT_TRUE(engine_->Suspend(first, "a").ok());
  EXPECT_EQ(UsageOf("a").disk_bytes_used, row_bytes);
  EXPECT_EQ(ErrorLine(engine_->Suspend(second, "a").status()), kQuota);
  EXPECT_EQ(ErrorLine(engine_->AppendDurably(second, 0, 12 * 64, {1}, "a").status()), kQuota);
  EXPECT_EQ(engine_->Get(second, "a")->length_max, 12 * 64);
  // Others evict what can leave, and do not stop at what cannot.
  const Handle other = Filled("b", 8);
  Filled("c", 25);
  EXPECT_FALSE(IsOnDisk("a", second));
  EXPECT_TRUE(IsOnDisk("b", other));
  EXPECT_TRUE(engine_->Drop(first, "a").ok());
  EXPECT_EQ(UsageOf("a").disk_bytes_used, 0);
  EXPECT_TRUE(engine_->Suspend(second, "a").ok());
}

TEST_F(QuotaTest, AnAttendBeyondTheMaximumSucceedsWhenItComesAgain) {
  Start(true);
  SetQuota("a", {.pool_bytes_max = Blocks(10)});
  const Handle idle = Filled("a", 5);
  const Handle busy = Filled("a", 5);
  const auto attend = [&] {
    AttendStep step(engine_->model(), 0, "a");
    step.Add(busy, 5 * 64, {5 * 64});
    EXPECT_TRUE(step.Run(engine_->get()).ok());
    return ErrorLine(step.result(0).status);
  };
  EXPECT_EQ(attend(), kQuota);
  EXPECT_TRUE(Eventually([&] { return attend() == "OK"; }));
  EXPECT_TRUE(IsOnDisk("a", idle));
  EXPECT_EQ(BlocksOf("a"), 6);
}

TEST_F(QuotaTest, WhatIsOnDiskCountsAfterARestartAndWhatWasSetDoesNot) {
  EngineOptions options = Options();
  options.tenant_quotas["a"] = {.pool_bytes_max = Blocks(20)};
  Start(true, options);
  SetQuota("a", {.pool_bytes_max = Blocks(10)});
  const Handle handle = Filled("a", 5);
  EXPECT_TRUE(engine_->Suspend(handle, "a").ok());
  const TenantUsage before = UsageOf("a");
  EXPECT_GT(before.disk_bytes_used, 0U);
  EXPECT_EQ(before.block_count, 0U);
  engine_ = nullptr;
  Start(true, options);
  ASSERT_TRUE(engine_->start_status().ok());
  const TenantUsage after = UsageOf("a");
  EXPECT_EQ(after.disk_bytes_used, before.disk_bytes_used);
  EXPECT_EQ(after.disk_bytes_used, engine_->get()->Stats().disk_bytes_used);
  EXPECT_EQ(after.sequence_count, 1U);
  EXPECT_EQ(after.quota, options.tenant_quotas["a"]);
  EXPECT_FALSE(after.is_temporary);
}

// ---- Reserves ----

TEST_F(QuotaTest, WhatIsReservedOthersCannotTake) {
  Start(false);
  SetQuota("a", {.pool_bytes_reserved = Blocks(15)});
  const Handle other = Filled("b", 25);
  EXPECT_EQ(Append("b", other, 25 * 64, 1), kFull);
  EXPECT_EQ(engine_->get()->Stats().pool_bytes_held, Blocks(15));
  Filled("a", 10);
  EXPECT_EQ(engine_->get()->Stats().pool_bytes_held, Blocks(5));
  EXPECT_EQ(Append("b", other, 25 * 64, 1), kFull);
  Filled("a", 5);
  EXPECT_EQ(ErrorLine(engine_->Append(New("a"), 0, 0, {1}, "a").status()), kFull);
  // As soon as nobody reserves it any more it is everybody's.
  ASSERT_TRUE(engine_->Drop(other, "b").ok());
  const Handle next = Filled("b", 20);
  ASSERT_TRUE(engine_->SetQuota("a", std::nullopt).ok());
  EXPECT_EQ(Append("b", next, 20 * 64, 5 * 64), "OK");
}

TEST_F(QuotaTest, NobodyFallsBelowItsReserveForAnothersSake) {
  Start(true);
  SetQuota("a", {.pool_bytes_reserved = Blocks(10)});
  std::vector<Handle> reserved;
  for (int i = 0; i < 5; ++i) reserved.push_back(Filled("a", 4));  // The oldest.
  const Handle other = Filled("b", 19);
  // 20 + 19 of 40, and none of b's may go but what asks.
  EXPECT_EQ(Append("b", other, 19 * 64, 9 * 64), "OK");
  int left = 0;
  for (const Handle& handle : reserved) left += IsOnDisk("a", handle) ? 1 : 0;
  EXPECT_EQ(left, 2) << "12 of its blocks stay: 8 would be less than the reserve";
  EXPECT_EQ(BlocksOf("a"), 12);
  EXPECT_EQ(Append("b", other, 28 * 64, 1), kFull);
  EXPECT_EQ(BlocksOf("a"), 12);
  // For its own sake it may.
  SetQuota("b", {.pool_bytes_reserved = Blocks(28)});
  EXPECT_EQ(Append("a", reserved[4], 4 * 64, 7 * 64), "OK");
  EXPECT_EQ(BlocksOf("a"), 11);
  EXPECT_FALSE(IsOnDisk("b", other));
}

TEST_F(QuotaTest, WhoeverHasTheMostBeyondItsReserveGivesFirst) {
  Start(true);
  SetQuota("c", {.pool_bytes_reserved = Blocks(12)});
  const Handle small = Filled("b", 4);
  const Handle reserved = Filled("c", 12);
  std::vector<Handle> many;
  for (int i = 0; i < 4; ++i) many.push_back(Filled("a", 6));
  const Handle asks = New("b");
  EXPECT_EQ(Append("b", asks, 0, 64), "OK");
  EXPECT_TRUE(IsOnDisk("a", many[0])) << "not the oldest of all, but of the largest tenant";
  EXPECT_FALSE(IsOnDisk("b", small));
  EXPECT_FALSE(IsOnDisk("c", reserved));
}

// What is evicted follows from how much tenants have, not from when others use what they have.
TEST_F(QuotaTest, EvictionTellsNothingAboutWhenOthersUseTheirSequences) {
  for (const bool is_used : {false, true}) {
    Start(true);
    const Handle other = Filled("b", 10);
    const Handle first = Filled("a", 15);
    const Handle second = Filled("a", 15);
    engine_->clock.AdvanceMs(100);
    if (is_used) {
      EXPECT_TRUE(engine_->RenewLease(other, 0, "b").ok());
    }
    Filled("a", 5);
    EXPECT_TRUE(IsOnDisk("a", first));
    EXPECT_FALSE(IsOnDisk("a", second));
    EXPECT_FALSE(IsOnDisk("b", other));
  }
}

// ---- Setting ----

TEST_F(QuotaTest, QuotasThatCannotBeAreRefusedAndChangeNothing) {
  Start(false);
  SetQuota("a", {.pool_bytes_reserved = Blocks(30)});
  const auto error = [&](const std::string& tenant, const TenantQuota& quota) {
    return ErrorLine(engine_->SetQuota(tenant, quota).status());
  };
  constexpr char kInvalid[] = "INVALID_ARGUMENT QUOTA_INVALID quota.pool_bytes_reserved";
  EXPECT_EQ(error("b", {.pool_bytes_reserved = Blocks(10) + 1}), kInvalid);
  EXPECT_EQ(error("b", {.pool_bytes_max = 1, .pool_bytes_reserved = 2}), kInvalid);
  EXPECT_EQ(error("a", {.pool_bytes_reserved = Blocks(40) + 1}), kInvalid);
  EXPECT_EQ(UsageOf("b").quota, TenantQuota());
  EXPECT_EQ(UsageOf("a").quota.pool_bytes_reserved, Blocks(30));
  EXPECT_EQ(error("a", {.pool_bytes_reserved = Blocks(40)}), "OK");
}

TEST_F(QuotaTest, ThereAreOnlySoManyQuotas) {
  Start(false);
  const TenantQuota quota = {.pool_bytes_max = Blocks(1)};
  for (size_t i = 0; i < kTenantQuotasMax; ++i) {
    ASSERT_TRUE(engine_->SetQuota(absl::StrCat("t", i), quota).ok());
  }
  EXPECT_EQ(ErrorLine(engine_->SetQuota("one_more", quota).status()),
            "RESOURCE_EXHAUSTED QUOTAS_FULL");
  EXPECT_TRUE(engine_->SetQuota("t7", {}).ok()) << "those that are there may change";
  ASSERT_TRUE(engine_->SetQuota("t8", std::nullopt).ok());
  EXPECT_TRUE(engine_->SetQuota("one_more", quota).ok());
}

TEST_F(QuotaTest, ConfiguredQuotasHoldFromTheStartAndComeBack) {
  EngineOptions options = Options();
  options.tenant_quotas["a"] = {.pool_bytes_max = Blocks(20), .pool_bytes_reserved = Blocks(20)};
  options.quota_default = {.pool_bytes_max = Blocks(5)};
  Start(false, options);
  EXPECT_EQ(Append("b", New("b"), 0, 5 * 64 + 1), kQuota);
  SetQuota("b", {});
  EXPECT_TRUE(UsageOf("b").is_temporary);
  EXPECT_EQ(Append("b", New("b"), 0, 20 * 64 + 1), kFull);
  ASSERT_TRUE(engine_->SetQuota("b", std::nullopt).ok());
  EXPECT_FALSE(UsageOf("b").is_temporary);
  EXPECT_EQ(Append("b", New("b"), 0, 5 * 64 + 1), kQuota);
  Filled("a", 20);
  const std::vector<TenantUsage> listed = engine_->ListTenants();
  ASSERT_EQ(listed.size(), 2);
  EXPECT_EQ(listed[0].tenant, "a");
  EXPECT_EQ(listed[1].tenant, "b");
  EXPECT_EQ(engine_->ListTenants("", "a").size(), 1);
  EXPECT_EQ(engine_->ListTenants("", "", 1).size(), 1);
  options.quota_default.pool_bytes_reserved = 1;
  EXPECT_EQ(NewEngine(options, *NewDevice("reference", {}), &engine_->clock, &engine_->random)
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

// ---- What is counted is what is there ----

// Sequences as they should be: their blocks by number, the same number for a shared one.
struct ModelSequence {
  std::string tenant;
  Handle handle = {};
  uint32_t length = 0;
  bool is_in_memory = true;
  bool is_suspended = false;
  std::vector<uint64_t> blocks = {};
};

class RandomRuns : public QuotaTest {
 protected:
  void NewBlocks(ModelSequence* sequence) {
    while (sequence->blocks.size() < BlockCount(sequence->length)) {
      sequence->blocks.push_back(next_block_++);
    }
  }
  void Resize(ModelSequence* sequence, uint32_t length) {
    sequence->length = length;
    if (sequence->blocks.size() > BlockCount(length)) sequence->blocks.resize(BlockCount(length));
    NewBlocks(sequence);
  }
  // Blocks that come back from the disk are nobody else's.
  void BackInMemory(ModelSequence* sequence) {
    if (sequence->is_in_memory) return;
    sequence->is_in_memory = true;
    sequence->blocks.clear();
    NewBlocks(sequence);
  }
  uint32_t Random(uint32_t below) { return random_() % below; }

  void Create() {
    const std::string tenant(1, static_cast<char>('a' + Random(3)));
    sequences_.push_back({.tenant = tenant, .handle = New(tenant)});
  }
  void Take(const absl::StatusOr<SequenceInfo>& info, ModelSequence* sequence) {
    if (info.ok()) sequence->handle.generation = info->generation;
  }
  static bool IsRefusal(const absl::Status& status) {
    const std::string line = ErrorLine(status);
    return line == kFull || line == kQuota;
  }
  // What ran, or was refused, is as it should be; a refused call changes no length.
  void Step() {
    if (sequences_.empty() || (sequences_.size() < 10 && Random(8) == 0)) return Create();
    const size_t index = Random(static_cast<uint32_t>(sequences_.size()));
    ModelSequence* const sequence = &sequences_[index];
    const std::string tenant = sequence->tenant;
    const uint32_t what = Random(20);
    absl::Status status;
    if (what == 0) {
      ASSERT_TRUE(engine_->Drop(sequence->handle, tenant).ok());
      sequences_.erase(sequences_.begin() + static_cast<ptrdiff_t>(index));
      return;
    }
    if (has_disk_ && what == 1) {
      const auto info = engine_->Suspend(sequence->handle, tenant);
      status = info.status();
      if (info.ok()) sequence->is_suspended = true;
      if (info.ok()) sequence->is_in_memory = false;
    } else if (sequence->is_suspended) {
      const auto info = engine_->Resume(sequence->handle, tenant);
      status = info.status();
      Take(info, sequence);
      if (info.ok()) sequence->is_suspended = false;
      if (info.ok()) BackInMemory(sequence);
    } else if (what < 5) {
      const uint32_t length = Random(sequence->length + 1);
      const auto info = engine_->Truncate(sequence->handle, length, tenant);
      status = info.status();
      Take(info, sequence);
      if (info.ok()) BackInMemory(sequence);
      // An open block is never shared: one that is cut out of a shared one is copied.
      if (info.ok() && length < sequence->length && length % kBlockTokens != 0) {
        sequence->blocks.resize(length / kBlockTokens);
      }
      if (info.ok()) Resize(sequence, length);
    } else if (what < 9 && sequences_.size() < 10) {
      const uint32_t length = Random(sequence->length + 1);
      const auto info = engine_->Fork(sequence->handle, length, tenant);
      status = info.status();
      if (info.ok()) {
        BackInMemory(sequence);
        ModelSequence child = {.tenant = tenant, .handle = {.id = info->id}};
        child.blocks.assign(sequence->blocks.begin(),
                            sequence->blocks.begin() + length / kBlockTokens);
        Resize(&child, length);
        sequences_.push_back(child);
      }
    } else {
      const uint32_t count = 1 + Random(100);
      const Words words = Counting(sequence->length, count);
      const auto appended = engine_->Append(sequence->handle, 0, sequence->length, words, tenant);
      status = appended.status();
      if (appended.ok()) BackInMemory(sequence);
      if (appended.ok()) Resize(sequence, sequence->length + count);
    }
    EXPECT_TRUE(status.ok() || IsRefusal(status)) << status;
    refusals_ += status.ok() ? 0 : 1;
  }

  // Empty if the engine has what the model has, given who has left memory.
  std::string Difference() {
    std::map<SequenceId, SequenceInfo, ById> infos;
    uint32_t on_disk = 0;
    for (SequenceInfo& info : engine_->List("")) {
      on_disk += info.tier == SequenceTier::kDisk ? 1 : 0;
      infos[info.id] = std::move(info);
    }
    if (engine_->get()->Stats().sequences_on_disk != on_disk) return "one is on its way";
    if (infos.size() != sequences_.size()) return "sequences";
    std::map<std::string, std::set<uint64_t>> blocks;
    std::map<std::string, uint32_t> counts;
    for (ModelSequence& sequence : sequences_) {
      const SequenceInfo& info = infos[sequence.handle.id];
      if (info.length != sequence.length) return "length";
      if (info.is_suspended != sequence.is_suspended) return "suspended";
      // What was refused may have come back for that.
      if (info.tier == SequenceTier::kMemory) BackInMemory(&sequence);
      if (info.tier == SequenceTier::kDisk) sequence.is_in_memory = false;
      ++counts[sequence.tenant];
      if (!sequence.is_in_memory) continue;
      blocks[sequence.tenant].insert(sequence.blocks.begin(), sequence.blocks.end());
    }
    for (const std::string tenant : {"a", "b", "c"}) {
      const TenantUsage usage = UsageOf(tenant);
      if (usage.sequence_count != counts[tenant]) return tenant + " sequences";
      if (usage.block_count != blocks[tenant].size()) {
        return absl::StrCat(tenant, " has ", usage.block_count, " blocks, not ",
                            blocks[tenant].size());
      }
      if (usage.pool_bytes_used != Blocks(usage.block_count)) return tenant + " bytes";
      if (usage.quota.pool_bytes_max.has_value() &&
          usage.pool_bytes_used > *usage.quota.pool_bytes_max) {
        return tenant + " is beyond its maximum";
      }
    }
    return "";
  }

  void Run(bool has_disk, int runs, uint32_t seed) {
    random_.seed(seed);
    Start(has_disk);
    SetQuota("a", {.pool_bytes_max = Blocks(14)});
    SetQuota("b", {.pool_bytes_reserved = Blocks(12)});
    for (int run = 0; run < runs; ++run) {
      Step();
      engine_->clock.AdvanceMs(1);
      std::string difference;
      // What was evicted for the last call may be on its way still.
      EXPECT_TRUE(Eventually([&] { return (difference = Difference()).empty(); }))
          << "run " << run << " of seed " << seed << ": " << difference;
      if (HasFailure()) return;
    }
    EXPECT_GT(refusals_, runs / 100) << "the limits are reached";
  }

  std::mt19937 random_;
  std::vector<ModelSequence> sequences_;
  uint64_t next_block_ = 0;
  int refusals_ = 0;
};

TEST_F(RandomRuns, EveryBlockIsCountedOnce) { Run(false, 10'000, 1); }
TEST_F(RandomRuns, EveryBlockIsCountedOnceWhateverLeavesForTheDisk) { Run(true, 10'000, 2); }

}  // namespace
}  // namespace kvservice::testing
