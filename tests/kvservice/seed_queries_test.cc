// Prompt queries that become anchors: what is kept, for how long, and what it saves.

#include "kvservice/seed_queries.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "attention/host_lists.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLength = 400;

// ---- What is kept ----

constexpr KvLayout kLayout{.query_head_count = 4, .kv_head_count = 2, .head_dim = 64};
constexpr size_t kTokenFloats = 4 * 64;

// Queries whose every float is the token's position: exact in bfloat16 up to 256.
std::vector<float> QueriesAt(const std::vector<uint32_t>& positions) {
  std::vector<float> queries;
  for (const uint32_t position : positions) {
    queries.insert(queries.end(), kTokenFloats, static_cast<float>(position));
  }
  return queries;
}

void Add(SeedQueries* seeds, uint32_t layer, uint32_t first, uint32_t count) {
  const Words positions = Counting(first, count);
  seeds->Add(layer, positions, QueriesAt(positions));
}

Words TakeAll(SeedQueries* seeds, uint32_t layer) {
  Words positions;
  std::vector<float> queries(kTokenFloats);
  while (seeds->count(layer) > 0) {
    positions.push_back(seeds->TakeOldest(layer, absl::MakeSpan(queries)));
    for (const float x : queries) EXPECT_EQ(x, static_cast<float>(positions.back()));
  }
  return positions;
}

TEST(SeedQueriesTest, KeepsTheLatestWithinItsBytes) {
  // Room for ten tokens in each of two layers, and a byte short of the eleventh.
  const size_t token_bytes = kTokenFloats * 2 + sizeof(uint32_t);
  SeedQueries seeds(kLayout, 2, 2 * 11 * token_bytes - 1);
  Add(&seeds, 0, 0, 6);
  Add(&seeds, 0, 10, 7);
  EXPECT_EQ(seeds.count(0), 10U);
  EXPECT_EQ(seeds.count(1), 0U);
  EXPECT_EQ(seeds.bytes(), 10 * token_bytes);
  Add(&seeds, 1, 0, 25);
  EXPECT_EQ(seeds.bytes(), 20 * token_bytes);
  EXPECT_EQ(TakeAll(&seeds, 0), (Words{3, 4, 5, 10, 11, 12, 13, 14, 15, 16}));
  EXPECT_EQ(TakeAll(&seeds, 1), Counting(15, 10));
  EXPECT_EQ(seeds.bytes(), 0U);
  // However much room there is, no more than the named number.
  SeedQueries roomy(kLayout, 1, size_t{1} << 40);
  Add(&roomy, 0, 0, 200);
  Add(&roomy, 0, 200, kSeedTokensMax);
  EXPECT_EQ(roomy.count(0), kSeedTokensMax);
  SeedQueries none(kLayout, 1, token_bytes - 1);
  Add(&none, 0, 0, 5);
  EXPECT_EQ(none.count(0), 0U);
  EXPECT_EQ(SeedQueries().count(7), 0U);
}

TEST(SeedQueriesTest, CopiesGoTheirOwnWays) {
  SeedQueries parent(kLayout, 1, size_t{1} << 20);
  Add(&parent, 0, 0, 8);
  std::vector<float> queries(kTokenFloats);
  EXPECT_EQ(parent.TakeOldest(0, absl::MakeSpan(queries)), 0U);
  SeedQueries child = parent;
  child.Truncate(5);
  Add(&child, 0, 5, 1);
  Add(&parent, 0, 20, 1);
  SeedQueries grandchild = child;
  EXPECT_EQ(TakeAll(&child, 0), (Words{1, 2, 3, 4, 5}));
  EXPECT_EQ(TakeAll(&parent, 0), (Words{1, 2, 3, 4, 5, 6, 7, 20}));
  EXPECT_EQ(TakeAll(&grandchild, 0), (Words{1, 2, 3, 4, 5}));
  Add(&parent, 0, 30, 2);
  parent.Truncate(30);
  EXPECT_EQ(parent.count(0), 0U);
  EXPECT_EQ(parent.bytes(), 0U);
}

// ---- What the engine does with it ----

// A sequence of one layer, [0, kLength) stored, with samples of the tokens at `positions`.
class SeedTest : public ::testing::Test {
 protected:
  SeedTest() { Start(TestEngine::SmallOptions(), nullptr); }

  void Start(EngineOptions options, std::unique_ptr<Device> device) {
    options.audit_rate = 0.0;
    engine_ = std::make_unique<TestEngine>(options, 1, std::move(device));
  }

  absl::Status Append(const Handle& handle, uint32_t first, uint32_t count, const Words& positions,
                      const Words& sampled) {
    AppendStep step(engine_->model(), handle, 0, first, Counting(first, count));
    const std::vector<std::byte> q = PartBytes(kLayout, DType::kFloat32, Part::kQuery, 0, sampled);
    const std::vector<int64_t> shape = {static_cast<int64_t>(sampled.size()), 4, 64};
    if (!sampled.empty()) {
      step.call.query_sample =
          TensorView{.dtype = DType::kFloat32, .shape = shape, .bytes = q, .field = "query_sample"};
    }
    step.call.query_sample_positions = positions;
    return step.Run(engine_->get()).status();
  }

  Handle NewSequence(const Words& positions) {
    const Handle handle = engine_->NewSequence();
    EXPECT_TRUE(Append(handle, 0, kLength, positions, positions).ok());
    return handle;
  }

  static Policy Reusing() {
    Policy policy = DefaultPolicy(SelectorKind::kCis);
    policy.dense_below_tokens = 0;
    policy.layers.clear();
    policy.budget = {.sink = 4, .local = 16, .top_k = 24};
    policy.cis.min_cosine = 0.99F;
    return policy;
  }

  // One step whose token is `word`, whose query is therefore that of `word`.
  AttendRowResult Attend(const Handle& handle, uint32_t position, uint32_t word,
                         const Policy& policy) {
    AttendStep step(engine_->model(), 0);
    step.Add(handle, position, {word});
    step.call.policy = &policy;
    EXPECT_TRUE(step.Run(engine_->get()).ok());
    EXPECT_TRUE(step.result(0).status.ok()) << step.result(0).status;
    return step.result(0);
  }

  AttendStats StatsOf(const Handle& handle) {
    const auto info = engine_->Get(handle);
    EXPECT_TRUE(info.ok()) << info.status();
    return info->stats;
  }
  size_t BytesOf(const Handle& handle) { return engine_->Get(handle)->bytes; }

  std::unique_ptr<TestEngine> engine_;
};

TEST_F(SeedTest, ARepeatedPromptQueryNeedsNoScan) {
  const Handle seeded = NewSequence(Counting(100, 10));
  const Handle unseeded = NewSequence({});
  const AttendRowResult reused = Attend(seeded, kLength, 105, Reusing());
  const AttendRowResult scanned = Attend(unseeded, kLength, 105, Reusing());
  for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
    EXPECT_EQ(reused.groups[kv_head].action, Action::kReused);
    EXPECT_GT(reused.groups[kv_head].similarity, 0.999F);
    EXPECT_TRUE(scanned.groups[kv_head].scanned);
    EXPECT_EQ(scanned.groups[kv_head].similarity, -2.0F);
    // The same query has chosen from the same tokens.
    EXPECT_EQ(reused.groups[kv_head].tokens_read, scanned.groups[kv_head].tokens_read);
  }
  // Work for seeds is counted apart.
  const AttendStats stats = StatsOf(seeded);
  EXPECT_EQ(stats.anchor_seed_scans, 10U * 2U);
  EXPECT_EQ(stats.attend_rows, 1U);
  EXPECT_EQ(stats.groups, 2U);
  EXPECT_EQ(stats.groups_scanned, 0U);
  EXPECT_EQ(stats.certificates, 4U);
  EXPECT_EQ(StatsOf(unseeded).anchor_seed_scans, 0U);
  EXPECT_EQ(engine_->get()->Stats().attend.anchor_seed_scans, 20U);
  // Once.
  Attend(seeded, kLength + 1, 106, Reusing());
  EXPECT_EQ(StatsOf(seeded).anchor_seed_scans, 20U);
  EXPECT_EQ(StatsOf(seeded).groups_scanned, 0U);
}

// Tokens are the same with and without seeds where every query scans anyway: nothing else changes.
TEST_F(SeedTest, OutputsAreThoseOfTheRowAlone) {
  Policy policy = Reusing();
  policy.cis.min_cosine = 1.0F;
  policy.guarantee = Guarantee::kDeterministic;
  const AttendRowResult with = Attend(NewSequence(Counting(0, 20)), kLength, 999, policy);
  const AttendRowResult without = Attend(NewSequence({}), kLength, 999, policy);
  ASSERT_EQ(with.certificates.size(), without.certificates.size());
  for (size_t head = 0; head < with.certificates.size(); ++head) {
    EXPECT_EQ(with.certificates[head].dropped_mass_upper.value,
              without.certificates[head].dropped_mass_upper.value);
  }
}

TEST_F(SeedTest, AStepRunsABoundedNumber) {
  const Handle handle = NewSequence(Counting(0, kSeedTokensPerStep + 30));
  const size_t all_bytes = BytesOf(handle);
  Attend(handle, kLength, 1000, Reusing());
  EXPECT_EQ(StatsOf(handle).anchor_seed_scans, 2 * kSeedTokensPerStep);
  Attend(handle, kLength + 1, 1001, Reusing());
  EXPECT_EQ(StatsOf(handle).anchor_seed_scans, 2 * (kSeedTokensPerStep + 30));
  EXPECT_GT(all_bytes, 0U);
}

TEST_F(SeedTest, WhoDoesNotReuseLeavesThemWaiting) {
  const Handle handle = NewSequence(Counting(0, 8));
  Policy policy = Reusing();
  policy.cis.seed = false;
  Attend(handle, kLength, 1000, policy);
  policy = Reusing();
  policy.cis.block_steps = 16;
  Attend(handle, kLength + 1, 1001, policy);
  policy = Reusing();
  policy.selector = SelectorKind::kScan;
  Attend(handle, kLength + 2, 1002, policy);
  EXPECT_EQ(StatsOf(handle).anchor_seed_scans, 0U);
  Attend(handle, kLength + 3, 1003, Reusing());
  EXPECT_EQ(StatsOf(handle).anchor_seed_scans, 16U);
}

TEST_F(SeedTest, ForksSeedForThemselvesWithWhatTheyHold) {
  const Handle parent = NewSequence(Counting(100, 10));
  const auto whole = engine_->Fork(parent);
  const auto cut = engine_->Fork(parent, 104);
  ASSERT_TRUE(whole.ok() && cut.ok());
  Attend(parent, kLength, 105, Reusing());
  Attend({.id = whole->id}, kLength, 105, Reusing());
  Attend({.id = cut->id}, 104, 105, Reusing());
  EXPECT_EQ(StatsOf(parent).anchor_seed_scans, 20U);
  EXPECT_EQ(StatsOf({.id = whole->id}).anchor_seed_scans, 20U);
  EXPECT_EQ(StatsOf({.id = cut->id}).anchor_seed_scans, 8U) << "tokens 100 to 103";
}

TEST_F(SeedTest, TruncatedTokensSeedNothing) {
  Handle handle = NewSequence(Counting(100, 10));
  const auto truncated = engine_->Truncate(handle, 102);
  ASSERT_TRUE(truncated.ok());
  handle.generation = truncated->generation;
  Attend(handle, 102, 105, Reusing());
  EXPECT_EQ(StatsOf(handle).anchor_seed_scans, 4U);
}

// A repeated append brings nothing, one that overlaps brings what is new.
TEST_F(SeedTest, TokensThatWereStoredAreNotTakenAgain) {
  const Handle handle = engine_->NewSequence();
  ASSERT_TRUE(Append(handle, 0, 200, Counting(190, 10), Counting(190, 10)).ok());
  ASSERT_TRUE(Append(handle, 0, 200, Counting(0, 10), Counting(0, 10)).ok());
  ASSERT_TRUE(Append(handle, 100, 150, {150, 199, 200, 240}, {150, 199, 200, 240}).ok());
  ASSERT_TRUE(Append(handle, 250, 50, {}, {260}).ok()) << "a sample for tables alone";
  Attend(handle, 300, 1000, Reusing());
  EXPECT_EQ(StatsOf(handle).anchor_seed_scans, 2 * 12U);
}

TEST_F(SeedTest, MemoryIsBoundedCountedAndGivenBack) {
  EngineOptions options = TestEngine::SmallOptions();
  const size_t token_bytes = kTokenFloats * 2 + sizeof(uint32_t);
  options.seed_bytes_per_sequence_max = 5 * token_bytes;
  Start(options, nullptr);
  const Handle plain = NewSequence({});
  const Handle seeded = NewSequence(Counting(0, 100));
  EXPECT_EQ(BytesOf(seeded), BytesOf(plain) + 5 * token_bytes);
  Policy policy = Reusing();
  Attend(seeded, kLength, 1000, policy);
  EXPECT_EQ(StatsOf(seeded).anchor_seed_scans, 10U);
  // The anchors count instead; without lists nothing of the seeds is left.
  options.list_bytes_per_sequence_max = 1;
  Start(options, nullptr);
  const Handle dropped = NewSequence(Counting(0, 100));
  const Handle other = NewSequence({});
  Attend(dropped, kLength, 1000, policy);
  Attend(other, kLength, 1000, policy);
  EXPECT_EQ(BytesOf(dropped), BytesOf(other));
}

TEST_F(SeedTest, BadPositionsAreTypedAndStoreNothing) {
  const Handle handle = engine_->NewSequence();
  const auto error_of = [&](const Words& positions, const Words& sampled) {
    const std::string error = ErrorLine(Append(handle, 0, 10, positions, sampled));
    EXPECT_EQ(engine_->Get(handle)->length_max, 0U);
    return error;
  };
  const std::string invalid =
      "INVALID_ARGUMENT QUERY_SAMPLE_POSITIONS_INVALID query_sample_positions";
  EXPECT_EQ(error_of({1}, {}), invalid) << "positions of no sample";
  EXPECT_EQ(error_of({1, 2}, {1}), invalid);
  EXPECT_EQ(error_of({1}, {1, 2}), invalid);
  EXPECT_EQ(error_of({2, 2}, {1, 2}), invalid);
  EXPECT_EQ(error_of({3, 2}, {1, 2}), invalid);
  EXPECT_EQ(error_of({9, 10}, {1, 2}), invalid);
  ASSERT_TRUE(Append(handle, 0, 10, {0, 9}, {1, 2}).ok());
  EXPECT_EQ(ErrorLine(Append(handle, 10, 10, {9}, {1})), invalid);
}

// The model of the other tests with rotary embeddings, and with a windowed layer.
TEST_F(SeedTest, QueriesMoveToThePresentPositionAndWindowsKeepNone) {
  std::vector<AttendRow> seen;
  std::vector<std::vector<float>> queries;
  auto device = std::make_unique<WatchedDevice>(*NewDevice("reference", {}));
  device->set_before([&](const LayerShape&, absl::Span<AttendRow> rows) {
    seen.push_back(rows[0]);
    queries.emplace_back(rows[0].q, rows[0].q + kTokenFloats);
  });
  Start(TestEngine::SmallOptions(), std::move(device));
  ModelSpec model = SmallModel(2);
  model.name = "rotary";
  model.rotary_style = RotaryStyle::kHalf;
  for (int i = 0; i < 32; ++i) {
    model.inverse_frequencies.push_back(std::pow(10000.0F, -static_cast<float>(i) / 32.0F));
  }
  model.sliding_windows = {0, 64};
  ASSERT_TRUE(engine_->get()->RegisterModel(model).ok());
  CreateOptions create;
  create.model = "rotary";
  const auto info = engine_->Create(create);
  ASSERT_TRUE(info.ok()) << info.status();
  const Handle handle{.id = info->id};
  const size_t bytes_before = info->bytes;
  const Words positions = {50, 60};
  ASSERT_TRUE(Append(handle, 0, 100, positions, positions).ok());
  Attend(handle, 100, 1000, Reusing());

  ASSERT_EQ(seen.size(), 3U) << "two seeds and the row itself";
  LayerShape shape{.layout = kLayout, .inverse_frequencies = model.inverse_frequencies};
  shape.rotary_style = RotaryStyle::kHalf;
  const std::vector<std::byte> raw =
      PartBytes(kLayout, DType::kFloat32, Part::kQuery, 0, positions);
  std::vector<float> sent(2 * kTokenFloats);
  std::memcpy(sent.data(), raw.data(), raw.size());
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(seen[i].position, 100U);
    EXPECT_EQ(seen[i].view.length, 101U);
    EXPECT_EQ(seen[i].plan.prove, Guarantee::kNone);
    EXPECT_EQ(seen[i].plan.lists, seen[2].plan.lists);
    std::vector<float> then(kTokenFloats);
    std::vector<float> now(kTokenFloats);
    UnrotateQueries(shape, positions[i], &sent[i * kTokenFloats], then.data());
    UnrotateQueries(shape, 100, queries[i].data(), now.data());
    for (size_t c = 0; c < kTokenFloats; ++c) {
      // Rounded to bfloat16 while it was rotated: 2^-9 of the pair it is of, which is below 8 here.
      EXPECT_NEAR(now[c], then[c], 8 * 0x1p-8);
    }
  }
  // The windowed layer keeps nothing of a sample.
  const size_t bytes = BytesOf(handle);
  AppendStep windowed(model, handle, 1, 0, Counting(0, 100));
  const std::vector<int64_t> shape_of_sample = {2, 4, 64};
  windowed.call.query_sample = TensorView{
      .dtype = DType::kFloat32, .shape = shape_of_sample, .bytes = raw, .field = "query_sample"};
  windowed.call.query_sample_positions = positions;
  ASSERT_TRUE(windowed.Run(engine_->get()).ok());
  EXPECT_EQ(BytesOf(handle), bytes);
  EXPECT_GT(bytes, bytes_before);
}

}  // namespace
}  // namespace kvservice::testing
