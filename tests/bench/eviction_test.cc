// The policies of `kvbench --workload=eviction`, the turns they are tried on, and what they cost.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tests/bench/eviction_load.h"
#include "tests/bench/eviction_policy.h"
#include "tests/bench/eviction_replay.h"

namespace kvservice::bench {
namespace {

constexpr SequenceNumber kNone = 1'000'000;
constexpr uint64_t kForever = UINT64_MAX / 4;

void UseAll(EvictionPolicy* policy, const std::vector<SequenceNumber>& sequences) {
  for (const SequenceNumber sequence : sequences) {
    policy->Used({.sequence = sequence, .blocks = 10});
  }
}

TEST(EvictionPolicyTest, LruEvictsWhatWasUsedLongestAgo) {
  const auto lru = NewEvictionPolicy("lru", 100);
  UseAll(lru.get(), {1, 2, 3, 1});
  EXPECT_EQ(lru->Evict(kNone), 2U);
  EXPECT_EQ(lru->Evict(3), 1U) << "what is kept is passed over";
  UseAll(lru.get(), {4, 5});
  lru->Ended(3);
  EXPECT_EQ(lru->Evict(kNone), 4U);
}

TEST(EvictionPolicyTest, S3FifoEvictsWhatCameOnceAndRemembersIt) {
  const auto fifo = NewEvictionPolicy("s3fifo_once", 100);
  UseAll(fifo.get(), {1, 2, 1, 3});
  EXPECT_EQ(fifo->Evict(kNone), 2U) << "1 was used again and is promoted";
  EXPECT_EQ(fifo->Evict(kNone), 3U);
  UseAll(fifo.get(), {2, 4});
  EXPECT_EQ(fifo->Evict(kNone), 4U) << "2 was remembered and belongs to the main queue";
  UseAll(fifo.get(), {1});
  EXPECT_EQ(fifo->Evict(kNone), 2U) << "1 was used in the main queue and gets another round";

  const auto paper = NewEvictionPolicy("s3fifo", 100);
  UseAll(paper.get(), {1, 2, 1, 3, 3, 3});
  EXPECT_EQ(paper->Evict(kNone), 1U) << "once more is not enough";
  EXPECT_EQ(paper->Evict(kNone), 2U);
}

TEST(EvictionPolicyTest, ArcShiftsToWhatItShouldHaveKept) {
  const auto arc = NewEvictionPolicy("arc", 40);
  UseAll(arc.get(), {1, 1, 2, 2, 3, 4});
  EXPECT_EQ(arc->Evict(kNone), 3U) << "of those that were used once the oldest";
  UseAll(arc.get(), {3});
  EXPECT_EQ(arc->Evict(kNone), 1U) << "3 came back: those used once may have 10 blocks";
  UseAll(arc.get(), {1});
  EXPECT_EQ(arc->Evict(kNone), 4U) << "1 came back: they may not any more";
}

TEST(EvictionPolicyTest, BeladyEvictsWhatIsUsedLast) {
  const auto belady = NewEvictionPolicy("belady", 40);
  belady->Used({.sequence = 1, .blocks = 10, .next_use = 9});
  belady->Used({.sequence = 2, .blocks = 10, .next_use = 7});
  belady->Used({.sequence = 3, .blocks = 10});
  EXPECT_EQ(belady->Evict(3), 1U);
  EXPECT_EQ(belady->Evict(kNone), 3U);
  EXPECT_EQ(NewEvictionPolicy("clock", 1), nullptr);
}

// Whatever is used, evicted and ended in whatever order: what is evicted was in memory.
TEST(EvictionPolicyTest, EvictsOnlyWhatIsThere) {
  for (const std::string& name : EvictionPolicyNames()) {
    const auto policy = NewEvictionPolicy(name, 200);
    std::map<SequenceNumber, uint64_t> there;
    std::mt19937 random(7);
    for (int i = 0; i < 20'000; ++i) {
      const SequenceNumber sequence = random() % 60;
      if (random() % 20 == 0) {
        policy->Ended(sequence);
        there.erase(sequence);
        continue;
      }
      uint64_t& blocks = there[sequence];
      blocks = std::min<uint64_t>(blocks + random() % 10, 100) + 1;
      policy->Used({.sequence = sequence, .blocks = blocks, .next_use = random() % 1000});
      while (there.size() > 8) {
        const SequenceNumber victim = policy->Evict(sequence);
        ASSERT_NE(victim, sequence) << name;
        ASSERT_EQ(there.erase(victim), 1U) << name;
      }
    }
  }
}

Turn TurnOf(uint64_t time_ms, SequenceNumber sequence, uint64_t blocks) {
  return {.time_ms = time_ms, .sequence = sequence, .tokens = 64 * blocks};
}

TEST(ReplayTest, CountsWhatIsBroughtBack) {
  // 10 blocks of memory; 0 leaves for 1 and comes back, then 1 for 0.
  const std::vector<Turn> turns = {TurnOf(0, 0, 6), TurnOf(1, 1, 6), TurnOf(2, 0, 7),
                                   TurnOf(3, 0, 8)};
  const auto cost = Replay(turns, kForever, 10, "lru");
  ASSERT_TRUE(cost.ok());
  EXPECT_EQ(cost->blocks_asked, 6U + 7U);
  EXPECT_EQ(cost->blocks_loaded, 6U);
  EXPECT_EQ(cost->turns_that_waited, 1U);
  EXPECT_EQ(cost->blocks_written, 12U);
  EXPECT_EQ(cost->blocks_max, 8U);
  EXPECT_EQ(Replay(turns, kForever, 100, "lru")->blocks_loaded, 0U);
  EXPECT_EQ(Replay(turns, 1, 10, "lru")->blocks_asked, 7U) << "after its lease it is somebody new";
  EXPECT_EQ(Replay(turns, kForever, 4, "lru")->blocks_max, 8U) << "one has to be there";
}

TEST(ReplayTest, WhatForksShareIsThereOnce) {
  std::vector<Turn> turns = {TurnOf(0, 0, 6), TurnOf(1, 1, 7), TurnOf(2, 0, 8), TurnOf(3, 2, 1),
                             TurnOf(4, 1, 7)};
  turns[1].parent = 0;
  EXPECT_EQ(Replay(turns, kForever, 100, "lru")->blocks_max, 6U + 1U + 2U + 1U);
  const auto cost = Replay(turns, kForever, 9, "lru");
  ASSERT_TRUE(cost.ok());
  // The child leaves with its one block, and comes back with all seven.
  EXPECT_EQ(cost->blocks_loaded, 7U);
}

TEST(ReplayTest, ForesightIsBestForSequencesOfOneSize) {
  std::mt19937 random(3);
  std::vector<Turn> turns;
  for (uint64_t i = 0; i < 5'000; ++i) {
    const auto often = static_cast<SequenceNumber>(random() % 10);
    const auto seldom = static_cast<SequenceNumber>(10 + random() % 100);
    turns.push_back(TurnOf(i, random() % 2 == 0 ? often : seldom, 4));
  }
  const uint64_t best = Replay(turns, kForever, 80, "belady")->blocks_loaded;
  EXPECT_GT(best, 0U);
  for (const std::string& name : EvictionPolicyNames()) {
    EXPECT_GE(Replay(turns, kForever, 80, name)->blocks_loaded, best) << name;
  }
}

TEST(LoadTest, MixesFollowFromTheirSeeds) {
  MixOptions options;
  options.duration_ms = 20 * 60 * 1000;
  const std::vector<Turn> turns = MakeMix(options, 5);
  const std::vector<Turn> again = MakeMix(options, 5);
  ASSERT_EQ(turns.size(), again.size());
  EXPECT_GT(turns.size(), 300U);
  std::map<SequenceNumber, uint64_t> tokens;
  size_t forks = 0;
  for (size_t i = 0; i < turns.size(); ++i) {
    EXPECT_EQ(turns[i].time_ms, again[i].time_ms);
    EXPECT_EQ(turns[i].sequence, again[i].sequence);
    EXPECT_LT(turns[i].time_ms, options.duration_ms);
    EXPECT_LE(turns[i == 0 ? 0 : i - 1].time_ms, turns[i].time_ms);
    uint64_t& before = tokens[turns[i].sequence];
    EXPECT_GT(turns[i].tokens, before);
    before = turns[i].tokens;
    forks += turns[i].parent.has_value() ? 1 : 0;
  }
  EXPECT_GT(forks, 0U);
  EXPECT_NE(MakeMix(options, 6).size(), turns.size());
}

TEST(LoadTest, ReadsTracesOfRequests) {
  const std::string path = ::testing::TempDir() + "/eviction_trace.jsonl";
  const auto read = [&](const std::string& text) {
    std::ofstream(path) << text;
    return ReadRequestTrace(path);
  };
  const auto turns = read(
      R"({"timestamp": 0, "input_length": 1400, "output_length": 100, "hash_ids": [0, 1, 2]}
{"timestamp": 5, "input_length": 700, "output_length": 9, "hash_ids": [0, 7]}
{"timestamp": 9, "input_length": 2000, "output_length": 10, "hash_ids": [0, 1, 3, 4]}
{"timestamp": 9, "input_length": 5000, "output_length": 10, "hash_ids": [0, 1, 8, 9, 10, 11]}
)");
  ASSERT_TRUE(turns.ok()) << turns.status();
  ASSERT_EQ(turns->size(), 4U);
  EXPECT_EQ((*turns)[0].tokens, 1500U);
  EXPECT_EQ((*turns)[1].sequence, 1U) << "only what everybody's prompt begins with";
  EXPECT_EQ((*turns)[2].sequence, 0U) << "the last prefix was open";
  EXPECT_EQ((*turns)[2].tokens, 2010U);
  EXPECT_EQ((*turns)[3].sequence, 0U);
  for (const char* const wrong :
       {"{", "[]\n", R"({"hash_ids": [1], "input_length": 0})",
        R"({"hash_ids": [-1], "input_length": 5})", R"({"hash_ids": 3, "input_length": 5})"}) {
    EXPECT_EQ(read(wrong).status().code(), absl::StatusCode::kInvalidArgument) << wrong;
  }
  std::remove(path.c_str());
  EXPECT_EQ(ReadRequestTrace(path).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace kvservice::bench
