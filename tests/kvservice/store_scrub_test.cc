// Looks for damage on disk: what is found, what is mended, what is lost, and what is left alone.

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/stored_rows.h"
#include "tests/kvservice/engine_client.h"
#include "tests/kvservice/memory_tier.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLayers = 2;

class StoreScrubTest : public ::testing::Test {
 protected:
  void Start(uint64_t scrub_bytes_per_s = 0) {
    EngineOptions options = TestEngine::SmallOptions();
    options.scrub_bytes_per_s = scrub_bytes_per_s;
    engine_ = std::make_unique<TestEngine>(options, kLayers, nullptr,
                                           std::make_unique<MemoryTier>(&rows_));
    ASSERT_TRUE(engine_->start_status().ok()) << engine_->start_status();
  }
  // As after a crash: what is in memory alone is gone.
  void Crash() {
    const TierRows rows = rows_;
    engine_ = nullptr;
    rows_ = rows;
    rows_.closed = {.is_clean = false, .inventory = {}, .crash_count = ++crashes_};
    Start();
  }
  void Restart() {
    engine_ = nullptr;
    Start();
  }

  Handle NewDurable(const Words& words) {
    const Handle handle = engine_->NewSequence();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      EXPECT_TRUE(engine_->AppendDurably(handle, layer, 0, words).ok());
    }
    return handle;
  }
  Handle NewSuspended(const Words& words) {
    const Handle handle = NewDurable(words);
    EXPECT_TRUE(engine_->Suspend(handle).ok());
    return handle;
  }
  StoreReport Verify() {
    const auto report = engine_->VerifyStore();
    EXPECT_TRUE(report.ok()) << report.status();
    return report.ok() ? *report : StoreReport();
  }
  std::string& Row(const std::string& key) {
    EXPECT_TRUE(rows_.by_key.contains(key));
    return rows_.by_key[key];
  }
  void Flip(const std::string& key) {
    std::string& row = Row(key);
    row[row.size() / 2] = static_cast<char>(row[row.size() / 2] ^ 16);
  }
  // Brought back, it has exactly these words.
  void ExpectWords(const Handle& handle, const Words& words) {
    auto info = engine_->Get(handle);
    ASSERT_TRUE(info.ok()) << info.status();
    Handle now = {.id = handle.id, .generation = info->generation};
    if (info->is_suspended) {
      info = engine_->Resume(now);
      ASSERT_TRUE(info.ok()) << info.status();
      now.generation = info->generation;
    }
    ASSERT_EQ(info->length, words.size());
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const auto repeated = engine_->Append(now, layer, 0, words);
      ASSERT_TRUE(repeated.ok()) << repeated.status();
      EXPECT_TRUE(repeated->duplicate);
    }
  }
  void ExpectLost(const Handle& handle) {
    EXPECT_EQ(ErrorLine(engine_->Get(handle).status()), "DATA_LOSS SEQUENCE_LOST");
  }

  TierRows rows_;
  uint64_t crashes_ = 0;
  std::unique_ptr<TestEngine> engine_;
};

TEST_F(StoreScrubTest, AWholeStoreIsWhole) {
  Start();
  const Handle in_memory = NewDurable(Counting(0, 130));
  const Handle suspended = NewSuspended(Counting(1000, 64));
  const Handle volatile_one = engine_->NewSequence();
  engine_->Fill(volatile_one, 0, Counting(2000, 70));
  const Handle half = engine_->NewSequence();
  engine_->Fill(half, 0, Counting(3000, 100));
  ASSERT_TRUE(engine_->AppendDurably(half, 1, 100, Counting(3100, 1)).ok());
  const StoreReport report = Verify();
  EXPECT_EQ(report.sequences_checked, 3);
  EXPECT_EQ(report.slices_checked, 2 * 3 + 2 * 1 + 2);
  EXPECT_GT(report.bytes_read, 0);
  EXPECT_EQ(report.sequences_skipped + report.sequences_lost, 0);
  EXPECT_EQ(report.rows_damaged + report.rows_mended, 0);
  EXPECT_EQ(engine_->get()->Stats().scrub.report, report);
  EXPECT_EQ(engine_->get()->Stats().scrub.passes, 1);
  ExpectWords(in_memory, Counting(0, 130));
  ExpectWords(suspended, Counting(1000, 64));
}

TEST_F(StoreScrubTest, NeedsADiskTier) {
  TestEngine engine;
  EXPECT_EQ(ErrorLine(engine.VerifyStore().status()), "FAILED_PRECONDITION NO_DISK_TIER");
}

TEST_F(StoreScrubTest, ASequenceThatIsOnDiskAloneIsLostAndNoOther) {
  using Damage = std::function<void(const Handle& one, const Handle& other)>;
  const auto slice = [](const Handle& handle, uint32_t layer, uint32_t block) {
    return SliceKey(handle.id, layer, block);
  };
  const std::map<std::string, Damage> damages = {
      {"flipped", [&](const Handle& one, const Handle&) { Flip(slice(one, 1, 1)); }},
      {"gone", [&](const Handle& one, const Handle&) { rows_.by_key.erase(slice(one, 0, 2)); }},
      {"cut", [&](const Handle& one, const Handle&) { Row(slice(one, 1, 2)).pop_back(); }},
      {"another's", [&](const Handle& one,
                        const Handle& other) { Row(slice(one, 0, 0)) = Row(slice(other, 0, 0)); }},
      {"of another block",
       [&](const Handle& one, const Handle&) { Row(slice(one, 1, 0)) = Row(slice(one, 1, 1)); }}};
  for (const auto& [name, damage] : damages) {
    SCOPED_TRACE(name);
    rows_ = {};
    crashes_ = 0;
    Start();
    const Handle one = NewSuspended(Counting(0, 150));
    const Handle other = NewSuspended(Counting(0, 150));
    damage(one, other);
    const StoreReport report = Verify();
    EXPECT_EQ(report.sequences_checked, 2);
    EXPECT_EQ(report.sequences_lost, 1);
    EXPECT_EQ(report.rows_damaged, 1);
    EXPECT_EQ(report.rows_mended, 0);
    ExpectLost(one);
    ExpectWords(other, Counting(0, 150));
    // It stays lost, and is not found again.
    EXPECT_EQ(Verify().sequences_lost, 0);
    Restart();
    ExpectLost(one);
    ExpectWords(other, Counting(0, 150));
  }
}

// A slice of an earlier time is whole and says all that it should, but for what came after it.
TEST_F(StoreScrubTest, AStaleSliceIsDamage) {
  Start();
  const Handle handle = NewDurable(Counting(0, 70));
  const std::string stale = Row(SliceKey(handle.id, 0, 1));
  ASSERT_TRUE(engine_->Truncate(handle, 64).ok());
  const Handle now = {.id = handle.id, .generation = handle.generation + 1};
  ASSERT_TRUE(engine_->AppendDurably(now, 0, 64, Counting(500, 6)).ok());
  ASSERT_TRUE(engine_->AppendDurably(now, 1, 64, Counting(500, 6)).ok());
  ASSERT_TRUE(engine_->Suspend(now).ok());
  Row(SliceKey(handle.id, 0, 1)) = stale;
  EXPECT_EQ(Verify().sequences_lost, 1);
  ExpectLost(now);
}

TEST_F(StoreScrubTest, WhatMemoryHasIsWrittenAgain) {
  Start();
  const Words words = Counting(0, 200);
  const Handle handle = NewDurable(words);
  const std::map<std::string, std::string> before = rows_.by_key;
  Flip(SliceKey(handle.id, 1, 1));
  rows_.by_key.erase(SliceKey(handle.id, 0, 3));
  const StoreReport report = Verify();
  EXPECT_EQ(report.sequences_checked, 1);
  EXPECT_EQ(report.sequences_lost + report.sequences_skipped, 0);
  EXPECT_EQ(report.rows_damaged, 2);
  EXPECT_EQ(report.rows_mended, 2);
  EXPECT_EQ(Verify().rows_damaged, 0);
  EXPECT_EQ(rows_.by_key, before);
  Crash();
  ExpectWords(handle, words);
}

TEST_F(StoreScrubTest, RowsOfSequencesModelsAndTablesAreWrittenAgain) {
  Start();
  const Handle in_memory = NewDurable(Counting(0, 100));
  const Handle suspended = NewSuspended(Counting(1000, 100));
  std::vector<std::string> keys;
  for (const auto& [key, row] : rows_.by_key) {
    if (key.front() != 'B' && key.front() >= 'A') keys.push_back(key);
  }
  ASSERT_EQ(keys.size(), 6) << "model, tables, and two rows of each sequence";
  for (const std::string& key : keys) {
    SCOPED_TRACE(key.front());
    Flip(key);
    StoreReport report = Verify();
    EXPECT_EQ(report.rows_damaged, 1);
    EXPECT_EQ(report.rows_mended, 1);
    EXPECT_EQ(report.sequences_lost, 0);
    rows_.by_key.erase(key);
    report = Verify();
    EXPECT_EQ(report.rows_damaged, 1);
    EXPECT_EQ(report.rows_mended, 1);
  }
  Crash();
  ExpectWords(in_memory, Counting(0, 100));
  ExpectWords(suspended, Counting(1000, 100));
}

// Nobody stands on them when they are found damaged, so they are not written then: but the next
// sequence must not take them for stored.
TEST_F(StoreScrubTest, RowsThatNobodyStandsOnAreWrittenForTheNext) {
  for (const char kind : {'M', 'T'}) {
    SCOPED_TRACE(kind);
    rows_ = {};
    crashes_ = 0;
    Start();
    const Handle first = NewDurable(Counting(0, 10));
    ASSERT_TRUE(engine_->Drop(first).ok());
    for (auto& [key, row] : rows_.by_key) {
      if (key.front() == kind) row.back() = static_cast<char>(row.back() ^ 1);
    }
    const StoreReport report = Verify();
    EXPECT_EQ(report.rows_damaged, 1);
    EXPECT_EQ(report.rows_mended, 0);
    EXPECT_EQ(Verify().rows_damaged, 0) << "it was told once";
    const Handle next = NewDurable(Counting(1000, 70));
    Crash();
    ExpectWords(next, Counting(1000, 70));
  }
}

// A tier whose reads wait.
class GatedTier final : public DiskTier {
 public:
  GatedTier(TierRows* rows, std::shared_future<void> open, std::promise<void>* reading)
      : tier_(rows), open_(std::move(open)), reading_(reading) {}
  const ClosedStore& closed() const override { return tier_.closed(); }
  absl::Status Commit(absl::Span<const TierBatch> batches, bool is_synced) override {
    return tier_.Commit(batches, is_synced);
  }
  absl::StatusOr<std::string> Read(const std::string& key) const override {
    if (reading_ != nullptr) std::exchange(reading_, nullptr)->set_value();
    open_.wait();
    return tier_.Read(key);
  }
  absl::Status Scan(
      const std::string& prefix,
      absl::FunctionRef<void(absl::string_view, absl::string_view)> visit) const override {
    return tier_.Scan(prefix, visit);
  }
  uint64_t file_bytes() const override { return 0; }
  absl::Status Compact() override { return absl::OkStatus(); }
  absl::Status Close(const std::string& inventory) override { return tier_.Close(inventory); }

 private:
  MemoryTier tier_;
  const std::shared_future<void> open_;
  mutable std::promise<void>* reading_;
};

TEST_F(StoreScrubTest, OneLookAtATimeAndADrainEndsIt) {
  std::promise<void> gate;
  std::promise<void> reading;
  TestEngine engine(TestEngine::SmallOptions(), kLayers, nullptr,
                    std::make_unique<GatedTier>(&rows_, gate.get_future().share(), &reading));
  ASSERT_TRUE(engine.start_status().ok());
  const Handle handle = engine.NewSequence();
  ASSERT_TRUE(engine.AppendDurably(handle, 0, 0, Counting(0, 10)).ok());
  std::promise<absl::Status> ended;
  engine.get()->VerifyStore(
      [&](const absl::StatusOr<StoreReport>& report) { ended.set_value(report.status()); });
  reading.get_future().wait();
  EXPECT_EQ(ErrorLine(engine.VerifyStore().status()), "RESOURCE_EXHAUSTED VERIFY_RUNNING");
  // Others are served meanwhile.
  EXPECT_TRUE(engine.Append(handle, 0, 10, Counting(10, 1)).ok());
  std::thread drain([&] { engine.get()->Drain(); });
  EXPECT_EQ(ErrorLine(ended.get_future().get()), "UNAVAILABLE DRAINING");
  gate.set_value();
  drain.join();
  EXPECT_EQ(engine.get()->Stats().scrub.passes, 0);
}

TEST_F(StoreScrubTest, InTheBackgroundAtItsPaceAndOncePerHour) {
  const Words words = Counting(0, 128);
  Start();
  const Handle handle = NewDurable(words);
  for (int i = 0; i < 3; ++i) NewDurable(Counting(1000 * (i + 1), 128));
  const uint64_t all_bytes = Verify().bytes_read;
  Crash();
  engine_ = nullptr;
  // Ten seconds for all.
  Start(all_bytes / 10);
  const auto scrub = [this] {
    // Whatever is called, time is looked at.
    engine_->List(kTenant);
    return engine_->get()->Stats().scrub;
  };
  EXPECT_EQ(scrub().report, StoreReport()) << "a start has better things to do";
  engine_->clock.AdvanceMs(61'000);
  Flip(SliceKey(handle.id, 0, 1));
  EXPECT_TRUE(Eventually([&] { return scrub().report.bytes_read > 0; }));
  for (int i = 0; i < 100; ++i) scrub();
  EXPECT_LT(scrub().report.bytes_read, all_bytes / 2) << "no time has passed";
  for (int i = 0; i < 100; ++i) {
    engine_->clock.AdvanceMs(1000);
    scrub();
  }
  EXPECT_TRUE(Eventually([&] {
    engine_->clock.AdvanceMs(100);
    return scrub().passes == 1;
  }));
  EXPECT_EQ(scrub().report.sequences_lost, 1);
  ExpectLost(handle);
  for (int i = 0; i < 100; ++i) scrub();
  EXPECT_EQ(scrub().passes, 1);
  engine_->clock.AdvanceMs(3'600'000);
  EXPECT_TRUE(Eventually([&] {
    engine_->clock.AdvanceMs(1000);
    return scrub().passes == 2;
  }));
}

// Whatever was damaged, after a look a crash finds no sequence damaged that did not say so.
TEST_F(StoreScrubTest, AfterALookACrashFindsNothingNew) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const auto below = [&](uint64_t limit) { return static_cast<uint32_t>(random() % limit); };
    rows_ = {};
    crashes_ = 0;
    Start();
    std::vector<std::pair<Handle, Words>> all;
    for (uint32_t i = 0; i < 5; ++i) {
      const Words words = Counting(1000 * i, 1 + below(200));
      all.emplace_back(below(2) == 0 ? NewSuspended(words) : NewDurable(words), words);
    }
    std::vector<std::string> keys;
    for (const auto& [key, row] : rows_.by_key) {
      if (key.front() >= 'A' && key.front() != 'L') keys.push_back(key);
    }
    for (uint32_t i = 1 + below(3); i > 0; --i) {
      const std::string& key = keys[below(keys.size())];
      if (rows_.by_key.contains(key) && below(3) > 0) {
        Flip(key);
      } else {
        rows_.by_key.erase(key);
      }
    }
    const StoreReport report = Verify();
    EXPECT_GT(report.rows_damaged, 0);
    uint64_t lost = 0;
    std::vector<std::pair<Handle, Words>> living;
    for (const auto& [handle, words] : all) {
      if (engine_->Get(handle).ok()) {
        living.emplace_back(handle, words);
      } else {
        ExpectLost(handle);
        ++lost;
      }
    }
    EXPECT_EQ(report.sequences_lost, lost);
    Crash();
    for (const auto& [handle, words] : living) ExpectWords(handle, words);
  }
}

}  // namespace
}  // namespace kvservice::testing
