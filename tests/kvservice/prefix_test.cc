// Sequences that are created with the token ids of their prompt: what they begin with, whose tokens
// those may be, and when not. The id of a token is its word.

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "selector/policy.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLayers = 2;
constexpr uint32_t kBlock = kBlockTokens;

Policy Choosing(SelectorKind selector) {
  Policy policy = DefaultPolicy(selector);
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  policy.budget = {.sink = 4, .local = 16, .top_k = 24};
  // Numbers that are drawn depend on the sequence.
  policy.guarantee = Guarantee::kDeterministic;
  return policy;
}

Handle HandleOf(const SequenceInfo& info) { return {.id = info.id, .generation = info.generation}; }

class PrefixTest : public ::testing::Test {
 protected:
  PrefixTest() : engine_(std::make_unique<TestEngine>()) {}

  absl::StatusOr<SequenceInfo> TryCreate(const Words& ids, std::string_view tenant = kTenant,
                                         const std::string& request_id = "") {
    CreateOptions options;
    options.model = kModel;
    options.request_id = request_id;
    options.token_ids = ids;
    return engine_->Create(std::move(options), tenant);
  }
  SequenceInfo Create(const Words& ids, std::string_view tenant = kTenant) {
    const auto info = TryCreate(ids, tenant);
    EXPECT_TRUE(info.ok()) << info.status();
    return *info;
  }
  // With all of its tokens appended.
  Handle Filled(const Words& ids, std::string_view tenant = kTenant) {
    const SequenceInfo info = Create(ids, tenant);
    const Words rest(ids.begin() + info.matched_tokens, ids.end());
    for (uint32_t layer = 0; layer < kLayers && !rest.empty(); ++layer) {
      const auto stored =
          engine_->Append(HandleOf(info), layer, info.matched_tokens, rest, std::string(tenant));
      EXPECT_TRUE(stored.ok()) << stored.status();
    }
    return HandleOf(info);
  }
  // What a new sequence would begin with; it is dropped again.
  uint32_t Matched(const Words& ids, std::string_view tenant = kTenant) {
    const SequenceInfo info = Create(ids, tenant);
    EXPECT_EQ(info.length, info.matched_tokens);
    EXPECT_EQ(info.length_max, info.matched_tokens);
    EXPECT_TRUE(engine_->Drop(HandleOf(info), tenant).ok());
    return info.matched_tokens;
  }
  // All layers have these words and no others.
  void ExpectWords(const Handle& handle, const Words& words) {
    EXPECT_EQ(engine_->Get(handle)->length_max, words.size());
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const auto stored = engine_->Append(handle, layer, 0, words);
      EXPECT_TRUE(stored.ok() && stored->duplicate) << stored.status();
      const auto last = static_cast<uint32_t>(words.size()) - 1;
      AttendStep step(engine_->model(), layer);
      step.Add(handle, last, {words.back()}).OnlyRead();
      ASSERT_TRUE(step.Run(engine_->get()).ok());
      ExpectOk(step);
      ExpectDense(step, 0, engine_->model(), words, last);
    }
  }
  uint64_t blocks_used() const { return engine_->get()->Stats().blocks_used; }

  std::unique_ptr<TestEngine> engine_;
};

TEST_F(PrefixTest, ASequenceBeginsWithTheWholeBlocksThatAnotherHas) {
  const Words ids = Counting(0, 200);
  const Handle first = Filled(ids);
  EXPECT_EQ(engine_->Get(first)->matched_tokens, 0U);
  EXPECT_EQ(engine_->Get(first)->matchable_tokens, 3 * kBlock);
  Words fork_in_the_road = Counting(0, 170);
  fork_in_the_road[150] = 999;
  const SequenceInfo second = Create(fork_in_the_road);
  EXPECT_EQ(second.matched_tokens, 2 * kBlock);
  EXPECT_EQ(second.matchable_tokens, 2 * kBlock);
  EXPECT_EQ(second.length, 2 * kBlock);
  EXPECT_EQ(second.block_count, 2U);
  EXPECT_EQ(blocks_used(), 4U) << "they are shared";
  engine_->Fill(HandleOf(second), 2 * kBlock,
                Words(fork_in_the_road.begin() + 2 * kBlock, fork_in_the_road.end()));
  ExpectWords(HandleOf(second), fork_in_the_road);
  ExpectWords(first, ids);
  EXPECT_EQ(Matched(Counting(0, kBlock)), kBlock) << "all of it is enough";
  EXPECT_EQ(Matched(Counting(0, kBlock - 1)), 0U) << "less than a block is not";
  EXPECT_EQ(Matched(Counting(1, 200)), 0U);
  EXPECT_EQ(Matched({}), 0U);
}

TEST_F(PrefixTest, CountsWhatWasAskedForAndWhatWasThere) {
  Filled(Counting(0, 200));
  Matched(Counting(0, 150));
  Matched(Counting(7, 100));
  const EngineStats stats = engine_->get()->Stats();
  EXPECT_EQ(stats.prefix_requested_tokens_total, 450U);
  EXPECT_EQ(stats.prefix_matched_tokens_total, 128U);
  EXPECT_EQ(stats.prefix_declared_tokens, 3 * kBlock);
}

TEST_F(PrefixTest, ABlockIsMatchedOnceEveryLayerHasItWhole) {
  const Words ids = Counting(0, 300);
  const Handle handle = HandleOf(Create(ids));
  EXPECT_EQ(Matched(ids), 0U);
  ASSERT_TRUE(engine_->Append(handle, 0, 0, Counting(0, 140)).ok());
  ASSERT_TRUE(engine_->Append(handle, 1, 0, Counting(0, kBlock - 1)).ok());
  EXPECT_EQ(Matched(ids), 0U);
  // Whichever call brings the last token.
  AttendStep step(engine_->model(), 1);
  step.Add(handle, kBlock - 1, {kBlock - 1});
  ASSERT_TRUE(step.Run(engine_->get()).ok());
  ExpectOk(step);
  EXPECT_EQ(Matched(ids), kBlock);
  ASSERT_TRUE(engine_->Append(handle, 1, kBlock, Counting(kBlock, 200)).ok());
  EXPECT_EQ(Matched(ids), 2 * kBlock);
  // What comes behind the prompt was not declared.
  engine_->Fill(handle, 0, Counting(0, 400));
  EXPECT_EQ(Matched(Counting(0, 400)), 4 * kBlock);
}

// Outputs, certificates and choices, to the bit, of a sequence that was matched and of one that was
// appended in full, while the source of both has lists of its own.
TEST_F(PrefixTest, AnswersAreThoseOfASequenceThatWasAppendedInFull) {
  const Words ids = Counting(0, 330);
  const Handle source = Filled(ids);
  const Policy sharing = Choosing(SelectorKind::kCis);
  for (uint32_t i = 0; i < 2 * kLayers; ++i) {
    AttendStep step(engine_->model(), i % kLayers);
    step.Add(source, 5 * kBlock - 1, {i}).OnlyRead();
    step.call.policy = &sharing;
    ASSERT_TRUE(step.Run(engine_->get()).ok());
    ExpectOk(step);
  }
  const SequenceInfo matched = Create(ids);
  ASSERT_EQ(matched.matched_tokens, 5 * kBlock);
  EXPECT_EQ(matched.bytes, matched.block_count * BlockBytes(engine_->model()));
  engine_->Fill(HandleOf(matched), 5 * kBlock, Counting(5 * kBlock, 10));
  const Handle full = engine_->NewSequence();
  engine_->Fill(full, 0, ids);
  uint32_t position = 330;
  for (const SelectorKind kind : {SelectorKind::kDense, SelectorKind::kCertified,
                                  SelectorKind::kScan, SelectorKind::kCis, SelectorKind::kCpe}) {
    const Policy policy = Choosing(kind);
    for (uint32_t i = 0; i < 3 * kLayers; ++i) {
      AttendStep step(engine_->model(), i % kLayers);
      const uint32_t word = 1000 + i / kLayers;
      step.Add(HandleOf(matched), position + i / kLayers, {word});
      step.Add(full, position + i / kLayers, {word});
      step.call.policy = &policy;
      step.call.want_selected = true;
      ASSERT_TRUE(step.Run(engine_->get()).ok());
      ExpectOk(step);
      EXPECT_EQ(step.Out(0), step.Out(1));
      EXPECT_EQ(step.Lse(0), step.Lse(1));
      EXPECT_EQ(step.result(0).selected, step.result(1).selected);
      for (size_t head = 0; head < step.result(0).certificates.size(); ++head) {
        const HeadCertificate& a = step.result(0).certificates[head];
        const HeadCertificate& b = step.result(1).certificates[head];
        EXPECT_EQ(a.level, b.level);
        EXPECT_EQ(a.action, b.action);
        EXPECT_EQ(a.log_kept, b.log_kept);
        EXPECT_EQ(a.dropped_mass_upper.value, b.dropped_mass_upper.value);
        EXPECT_EQ(a.output_error_upper, b.output_error_upper);
      }
    }
    position += 3;
  }
}

TEST_F(PrefixTest, PromptQueriesThatWaitComeAlong) {
  const Words ids = Counting(0, 200);
  const Words sampled = Counting(90, 10);
  const SequenceInfo source = Create(ids);
  const Handle full = engine_->NewSequence();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (const Handle& handle : {HandleOf(source), full}) {
      AppendStep step(engine_->model(), handle, layer, 0, ids);
      const KvLayout& layout = engine_->model().layout;
      const std::vector<std::byte> q =
          PartBytes(layout, DType::kFloat32, Part::kQuery, layer, sampled);
      const std::vector<int64_t> shape = {10, layout.query_head_count, layout.head_dim};
      step.call.query_sample =
          TensorView{.dtype = DType::kFloat32, .shape = shape, .bytes = q, .field = "query_sample"};
      step.call.query_sample_positions = sampled;
      ASSERT_TRUE(step.Run(engine_->get()).ok());
    }
  }
  const SequenceInfo matched = Create(ids);
  ASSERT_EQ(matched.matched_tokens, 3 * kBlock);
  engine_->Fill(HandleOf(matched), 3 * kBlock, Counting(3 * kBlock, 8));
  Policy policy = Choosing(SelectorKind::kCis);
  policy.guarantee = Guarantee::kNone;
  AttendStep step(engine_->model(), 1);
  step.Add(HandleOf(matched), 199, {95}).Add(full, 199, {95}).OnlyRead();
  step.call.policy = &policy;
  step.call.want_selected = true;
  ASSERT_TRUE(step.Run(engine_->get()).ok());
  ExpectOk(step);
  EXPECT_EQ(step.Out(0), step.Out(1));
  EXPECT_EQ(step.result(0).selected, step.result(1).selected);
  EXPECT_GT(engine_->Get(full)->stats.anchor_seed_scans, 0U);
  EXPECT_EQ(engine_->Get(HandleOf(matched))->stats.anchor_seed_scans,
            engine_->Get(full)->stats.anchor_seed_scans);
}

// ---- Ends of matching ----

TEST_F(PrefixTest, WhatWasTruncatedIsNotMatched) {
  const Words ids = Counting(0, 200);
  const Handle handle = Filled(ids);
  const auto cut = engine_->Truncate(handle, 3 * kBlock - 1);
  ASSERT_TRUE(cut.ok()) << cut.status();
  EXPECT_EQ(cut->matchable_tokens, 2 * kBlock);
  EXPECT_EQ(Matched(ids), 2 * kBlock);
  // Other tokens are there now, whatever was declared once.
  Words other = Counting(0, 3 * kBlock - 1);
  other.resize(200, 4711);
  engine_->Fill(HandleOf(*cut), 3 * kBlock - 1, Words(other.begin() + 3 * kBlock - 1, other.end()));
  const SequenceInfo matched = Create(ids);
  EXPECT_EQ(matched.matched_tokens, 2 * kBlock);
  ExpectWords(HandleOf(matched), Counting(0, 2 * kBlock));
  ExpectWords(HandleOf(*cut), other);
}

TEST_F(PrefixTest, TruncatingOneSideLeavesTheOtherAsItIs) {
  const Words ids = Counting(0, 2 * kBlock);
  const Handle source = Filled(ids);
  const SequenceInfo matched = Create(ids);
  ASSERT_EQ(matched.matched_tokens, 2 * kBlock);
  const auto cut = engine_->Truncate(HandleOf(matched), 100);
  ASSERT_TRUE(cut.ok()) << cut.status();
  Words other = Counting(0, 100);
  other.resize(150, 7);
  engine_->Fill(HandleOf(*cut), 100, Words(50, 7));
  ExpectWords(HandleOf(*cut), other);
  ExpectWords(source, ids);
  EXPECT_EQ(Matched(ids), 2 * kBlock) << "the source has it still";
}

TEST_F(PrefixTest, MatchingLastsAsLongAsAnybodyHasTheTokens) {
  const Words ids = Counting(0, 200);
  const Handle source = Filled(ids);
  const Handle child = HandleOf(Create(ids));
  const auto fork = engine_->Fork(source, 100);
  ASSERT_TRUE(fork.ok());
  EXPECT_EQ(fork->matchable_tokens, kBlock);
  ASSERT_TRUE(engine_->Drop(source).ok());
  EXPECT_EQ(Matched(ids), 3 * kBlock) << "the child has them";
  ASSERT_TRUE(engine_->Drop(child).ok());
  EXPECT_EQ(Matched(ids), kBlock) << "the fork has a block";
  engine_->Fill(HandleOf(*fork), 100, Counting(100, 100));
  EXPECT_EQ(Matched(ids), kBlock) << "nobody said what a fork goes on with";
  ASSERT_TRUE(engine_->Drop(HandleOf(*fork)).ok());
  EXPECT_EQ(Matched(ids), 0U);
  EXPECT_EQ(blocks_used(), 0U);
  EXPECT_EQ(engine_->get()->Stats().prefix_declared_tokens, 0U);
}

TEST_F(PrefixTest, AnExpiredSequenceIsGone) {
  const Words ids = Counting(0, 100);
  Filled(ids);
  engine_->clock.AdvanceMs(TestEngine::SmallOptions().lease_default_ms);
  EXPECT_EQ(Matched(ids), 0U);
}

// ---- Whose tokens ----

TEST_F(PrefixTest, ATenantNeverBeginsWithWhatIsAnothers) {
  const Words ids = Counting(0, 200);
  Filled(ids);
  EXPECT_EQ(Matched(ids, "other"), 0U);
  EXPECT_EQ(Matched(ids, ""), 0U);
  EXPECT_EQ(Matched(ids, std::string(kTenant) + "2"), 0U);
  const Handle theirs = Filled(ids, "other");
  EXPECT_EQ(engine_->Get(theirs, "other")->matched_tokens, 0U);
  EXPECT_EQ(blocks_used(), 8U) << "equal tokens, and nothing is shared";
  EXPECT_EQ(Matched(ids, "other"), 3 * kBlock);
  EXPECT_EQ(Matched(ids), 3 * kBlock);
}

TEST_F(PrefixTest, AnotherModelHasOtherTokens) {
  const Words ids = Counting(0, 200);
  Filled(ids);
  ModelSpec other = engine_->model();
  other.name = "other";
  ASSERT_TRUE(engine_->get()->RegisterModel(other).ok());
  CreateOptions options;
  options.model = "other";
  options.token_ids = ids;
  EXPECT_EQ(engine_->Create(options)->matched_tokens, 0U);
  options.policy = DefaultPolicy(SelectorKind::kCpe);
  options.model = kModel;
  EXPECT_EQ(engine_->Create(options)->matched_tokens, 3 * kBlock) << "policies change no cache";
}

// ---- Requests ----

TEST_F(PrefixTest, ARepeatGetsTheSameAnswer) {
  const Words ids = Counting(0, 200);
  const Handle source = Filled(ids);
  const auto first = TryCreate(ids, kTenant, "once");
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(first->matched_tokens, 3 * kBlock);
  ASSERT_TRUE(engine_->Drop(source).ok());
  const auto again = TryCreate(ids, kTenant, "once");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->id, first->id);
  EXPECT_EQ(again->matched_tokens, 3 * kBlock);
  EXPECT_EQ(engine_->get()->Stats().prefix_requested_tokens_total, 400U) << "it is counted once";
  // The last of them stands in no whole block.
  for (const Words& other : {Counting(0, 199), Counting(1, 200), Words()}) {
    EXPECT_EQ(ErrorLine(TryCreate(other, kTenant, "once").status()),
              "INVALID_ARGUMENT REQUEST_ID_REUSED request_id");
  }
}

TEST_F(PrefixTest, MoreTokensThanASequenceMayHaveAreRefused) {
  const uint32_t tokens_max = TestEngine::SmallOptions().sequence_tokens_max;
  EXPECT_EQ(ErrorLine(TryCreate(Counting(0, tokens_max + 1)).status()),
            "RESOURCE_EXHAUSTED SEQUENCE_TOO_LONG token_ids");
  EXPECT_EQ(engine_->get()->Stats().sequences, 0U);
  EXPECT_EQ(engine_->get()->Stats().prefix_requested_tokens_total, 0U);
  EXPECT_TRUE(TryCreate(Counting(0, tokens_max)).ok());
}

TEST_F(PrefixTest, WhatIsDeclaredBeyondATenantsRoomIsNotMatched) {
  EngineOptions options = TestEngine::SmallOptions();
  options.prefix_tokens_per_tenant_max = 4 * kBlock + 5;
  engine_ = std::make_unique<TestEngine>(options);
  const Handle first = Filled(Counting(0, 200));
  Filled(Counting(1000, 200));
  EXPECT_EQ(Matched(Counting(0, 200)), 3 * kBlock);
  EXPECT_EQ(Matched(Counting(1000, 200)), kBlock);
  EXPECT_EQ(engine_->get()->Stats().prefix_declared_tokens, 4 * kBlock);
  Filled(Counting(0, 200), "other");
  EXPECT_EQ(Matched(Counting(0, 200), "other"), 3 * kBlock) << "every tenant has its own";
  ASSERT_TRUE(engine_->Drop(first).ok());
  Filled(Counting(2000, 200));
  EXPECT_EQ(Matched(Counting(2000, 200)), 3 * kBlock);
}

TEST_F(PrefixTest, WithoutRoomNothingIsMatched) {
  EngineOptions options = TestEngine::SmallOptions();
  options.prefix_tokens_per_tenant_max = 0;
  engine_ = std::make_unique<TestEngine>(options);
  Filled(Counting(0, 200));
  EXPECT_EQ(Matched(Counting(0, 200)), 0U);
}

}  // namespace
}  // namespace kvservice::testing
