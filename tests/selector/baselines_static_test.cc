// Methods that look at no key while decoding, on cases where the answer follows by hand.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "tests/selector/baseline_case.h"

namespace kvservice::baselines {
namespace {

constexpr ModelShape kOneHead = {
    .layer_count = 1, .query_head_count = 1, .kv_head_count = 1, .head_dim = 2};

// Steps with the attention that a test names, for one sequence of one head.
class H2oRun {
 public:
  H2oRun(const std::vector<float>& sums, const TokenBudget& budget)
      : case_(kOneHead, static_cast<uint32_t>(sums.size()), 0),
        length_(static_cast<uint32_t>(sums.size())) {
    std::copy(sums.begin(), sums.end(), case_.attention_sum(0, 0).begin());
    index_ = IndexOf("h2o", {.prompt = case_.prompt()});
    baseline_ = index_->NewBaseline(budget);
  }

  Positions Next(const std::map<uint32_t, float>& attention) {
    const LogitsStep step(0, {Spread(++length_, attention)});
    return ProposalOf(baseline_.get(), step.step(), &cost_)[0];
  }

  const Cost& cost() const { return cost_; }

 private:
  BaselineCase case_;
  uint32_t length_;
  std::unique_ptr<const PromptIndex> index_;
  std::unique_ptr<Baseline> baseline_;
  Cost cost_;
};

TEST(StreamingLlmTest, KeepsTheTokensBeforeTheWindow) {
  const BaselineCase data(kOneHead, 99, 0);
  const auto index = IndexOf("streaming_llm", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline({.sink = 4, .local = 10, .top_k = 3});
  Cost cost;
  // The token of highest attention changes nothing.
  const LogitsStep step(0, {Spread(100, {{50, 0.9F}})});
  EXPECT_EQ(ProposalOf(baseline.get(), step.step(), &cost)[0], (Positions{87, 88, 89}));
  EXPECT_EQ(cost.heads_scanned, 0U);
  EXPECT_EQ(cost.bytes, 0.0);
  EXPECT_EQ(cost.flops, 0.0);
}

// Sums of 12 tokens; with sink 1, local 2 and top_k 4, half of 6 are recent: 3, one of them in the
// middle, and 3 are heavy.
const std::vector<float> kSums = {3.0F, 0.1F, 2.0F, 0.3F, 1.5F, 0.4F,
                                  0.5F, 1.0F, 0.6F, 0.7F, 0.8F, 0.2F};
constexpr TokenBudget kSmall = {.sink = 1, .local = 2, .top_k = 4};

TEST(H2oTest, KeepsHalfRecentAndHalfHeavy) {
  H2oRun run(kSums, kSmall);
  // 13 tokens: the window is 11 and 12, recent before it 10; of 1 to 9, 2, 4 and 7 are heaviest.
  EXPECT_EQ(run.Next({}), (Positions{2, 4, 7, 10}));
  EXPECT_EQ(run.cost().heads_scanned, 0U);
  EXPECT_EQ(run.cost().bytes, 4.0 * 6);  // A sum for each of 6 tokens.
}

TEST(H2oTest, ForgetsForGood) {
  H2oRun run(kSums, kSmall);
  EXPECT_EQ(run.Next({{9, 0.9F}}), (Positions{2, 4, 7, 10}));
  // Token 9 was forgotten, so attention to it is not even seen, let alone counted.
  EXPECT_EQ(run.Next({{9, 0.9F}}), (Positions{2, 4, 7, 11}));
  EXPECT_EQ(run.Next({{9, 0.9F}}), (Positions{2, 4, 7, 12}));
}

TEST(H2oTest, AttentionWhileRecentMakesATokenHeavy) {
  H2oRun run(kSums, kSmall);
  // Token 11 (sum .2) gets .9 and .9 while it is recent: more than the 1.0 of token 7.
  EXPECT_EQ(run.Next({{11, 0.9F}}), (Positions{2, 4, 7, 10}));
  EXPECT_EQ(run.Next({{11, 0.9F}}), (Positions{2, 4, 7, 11}));
  EXPECT_EQ(run.Next({}), (Positions{2, 4, 11, 12}));
}

TEST(H2oTest, ByMassForgetsWhatItsSumsAllow) {
  // Of 10 attended in all, .3 + .2 + .1 may go under a limit of .065, .4 more may not.
  const std::vector<float> sums = {5.0F, 0.2F, 2.0F, 0.3F, 0.1F, 0.4F, 1.0F, 1.0F};
  H2oRun run(sums, {.sink = 1, .local = 2, .mass_limit = 0.065F});
  EXPECT_EQ(run.Next({{6, 0.5F}}), (Positions{2, 5, 6}));
  // 11 in all, of which .6 are forgotten: no room for token 5 nor 6.
  EXPECT_EQ(run.Next({}), (Positions{2, 5, 6, 7}));
}

TEST(H2oTest, SumsOverTheGroup) {
  constexpr ModelShape kGroup = {
      .layer_count = 1, .query_head_count = 2, .kv_head_count = 1, .head_dim = 2};
  BaselineCase data(kGroup, 8, 0);
  const auto fill = [&](uint32_t h, const std::vector<float>& sums) {
    std::copy(sums.begin(), sums.end(), data.attention_sum(0, h).begin());
  };
  fill(0, {0.0F, 3.0F, 0.0F, 2.0F, 0.0F, 0.0F, 0.0F, 0.0F});
  fill(1, {0.0F, 0.0F, 2.5F, 2.0F, 0.0F, 0.0F, 0.0F, 0.0F});
  const auto index = IndexOf("h2o", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline({.sink = 1, .local = 1, .top_k = 1});
  const LogitsStep step(0, {Spread(9, {}), Spread(9, {})});
  EXPECT_EQ(ProposalOf(baseline.get(), step.step())[0], (Positions{3}));
}

// Keys are (0, 0) but for those that a test sets; queries of the window look along x.
class SnapKvRun {
 public:
  explicit SnapKvRun(const std::map<uint32_t, float>& keys, uint32_t length = 100)
      : case_(kOneHead, length, 40) {
    for (const auto& [token, x] : keys) case_.key(0, token)[0] = x;
    for (uint32_t i = 0; i < 40; ++i) case_.query(0, i, 0)[0] = 1.0F;
  }

  // Only the last 32 queries are the window; what the 8 before look at must not matter.
  void LookElsewhereBefore() {
    for (uint32_t i = 0; i < 8; ++i) case_.query(0, i, 0)[0] = -1000.0F;
  }

  void Start(const TokenBudget& budget) {
    index_ = IndexOf("snapkv", {.prompt = case_.prompt()});
    baseline_ = index_->NewBaseline(budget);
  }

  Positions Next(const std::vector<float>& q = {1.0F, 0.0F}) {
    return ProposalOf(baseline_.get(), case_.Decode(0, q, {50.0F, 0.0F}), &cost_)[0];
  }

  const Cost& cost() const { return cost_; }

 private:
  BaselineCase case_;
  std::unique_ptr<const PromptIndex> index_;
  std::unique_ptr<Baseline> baseline_;
  Cost cost_;
};

// exp of the keys of 28 to 32 is 20, 403, 2981, 148 and 55, of others 1 or less. Sums over five
// neighbours order the tokens 30, 31, 29, 28, 32, 27, 33, 34.
const std::map<uint32_t, float> kPeak = {{28, 3.0F}, {29, 6.0F}, {30, 8.0F},
                                         {31, 5.0F}, {32, 4.0F}, {20, -8.0F}};

TEST(SnapKvTest, KeepsWhatTheWindowLookedAtAndItsNeighbours) {
  SnapKvRun run(kPeak);
  run.LookElsewhereBefore();
  run.Start({.sink = 4, .local = 32, .top_k = 8});
  // Window: 68 to 99. Its first token left the local one already.
  EXPECT_EQ(run.Next(), (Positions{27, 28, 29, 30, 31, 32, 33, 68}));
  EXPECT_EQ(run.cost().heads_scanned, 0U);
  EXPECT_EQ(run.cost().bytes, 0.0);
}

TEST(SnapKvTest, ChoosesOnceAndLetsTheWeakestGiveWay) {
  SnapKvRun run(kPeak);
  run.Start({.sink = 4, .local = 32, .top_k = 8});
  // Queries that look the other way change nothing.
  const std::vector<float> away = {-1.0F, 0.0F};
  EXPECT_EQ(run.Next(away), (Positions{27, 28, 29, 30, 31, 32, 33, 68}));
  EXPECT_EQ(run.Next(away), (Positions{27, 28, 29, 30, 31, 32, 68, 69}));
  EXPECT_EQ(run.Next(away), (Positions{28, 29, 30, 31, 32, 68, 69, 70}));
  EXPECT_EQ(run.Next(away), (Positions{28, 29, 30, 31, 68, 69, 70, 71}));
  for (int i = 0; i < 3; ++i) run.Next(away);
  EXPECT_EQ(run.Next(away), (Positions{68, 69, 70, 71, 72, 73, 74, 75}));
  EXPECT_EQ(run.Next(away), (Positions{69, 70, 71, 72, 73, 74, 75, 76}));
}

TEST(SnapKvTest, ByMassKeepsWhatItsAveragesAskFor) {
  // Token 30 has e^8 / (e^8 + 99) = .968 of the attention, a fifth for each of 28 to 32. The other
  // 98 have .032, and a fifth of each token's attention stays where it is.
  SnapKvRun run({{30, 8.0F}});
  run.Start({.sink = 4, .local = 32, .mass_limit = 0.05F});
  EXPECT_EQ(run.Next(), (Positions{28, 29, 30, 31, 32, 68}));
  EXPECT_EQ(run.Next(), (Positions{28, 29, 30, 31, 32, 68, 69}));
}

TEST(SnapKvTest, QueriesDoNotSeeWhatComesAfterThem) {
  // Token 99 would take all attention of the 31 queries before it, were it visible to them.
  SnapKvRun run({{30, 8.0F}, {99, 30.0F}});
  run.Start({.sink = 4, .local = 32, .mass_limit = 0.1F});
  EXPECT_EQ(run.Next(), (Positions{28, 29, 30, 31, 32, 68}));
}

}  // namespace
}  // namespace kvservice::baselines
