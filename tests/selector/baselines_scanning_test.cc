// Methods that look at every token, page or bucket with every step, on cases where the answer
// follows by hand.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "tests/selector/baseline_case.h"

namespace kvservice::baselines {
namespace {

ModelShape OneHead(uint32_t head_dim, uint32_t group = 1) {
  return {.layer_count = 1, .query_head_count = group, .kv_head_count = 1, .head_dim = head_dim};
}

void Set(absl::Span<float> vector, const std::vector<float>& values) {
  std::copy(values.begin(), values.end(), vector.begin());
}

// One sequence of one head that continues `data`.
class HeadRun {
 public:
  HeadRun(std::string_view method, BaselineCase* data, BaselineContext context,
          const TokenBudget& budget)
      : data_(data) {
    context.prompt = data->prompt();
    index_ = IndexOf(method, context);
    baseline_ = index_->NewBaseline(budget);
  }

  Positions Next(const std::vector<float>& q, const std::vector<float>& new_key) {
    return ProposalOf(baseline_.get(), data_->Decode(0, q, new_key), &cost_)[0];
  }

  const Cost& cost() const { return cost_; }

 private:
  BaselineCase* data_;
  std::unique_ptr<const PromptIndex> index_;
  std::unique_ptr<Baseline> baseline_;
  Cost cost_;
};

TEST(OracleTest, KeepsTheLargestSumOfSoftmaxOverTheGroup) {
  BaselineCase data(OneHead(2, 2), 19, 0);
  const auto index = IndexOf("oracle", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline({.sink = 2, .local = 2, .top_k = 2});
  // 5: .5, 9: .3 + .3, 12: .45 and, outside the middle, a sink and the window.
  const LogitsStep step(0, {Spread(20, {{5, 0.5F}, {9, 0.3F}, {1, 0.1F}}),
                            Spread(20, {{12, 0.45F}, {9, 0.3F}, {18, 0.2F}})});
  Cost cost;
  EXPECT_EQ(ProposalOf(baseline.get(), step.step(), &cost)[0], (Positions{5, 9}));
  EXPECT_EQ(cost.heads_scanned, 1U);
  EXPECT_EQ(cost.bytes, 20 * 2 * 2.0);
  EXPECT_EQ(cost.flops, 20 * 2 * 2.0 * 2);
}

TEST(OracleTest, ByMassKeepsTheFewestThatEveryHeadAllows) {
  BaselineCase data(OneHead(2, 2), 19, 0);
  const auto index = IndexOf("oracle", {.prompt = data.prompt()});
  const LogitsStep step(0, {Spread(20, {{5, 0.5F}, {9, 0.3F}, {7, 0.1F}}),
                            Spread(20, {{12, 0.04F}, {9, 0.03F}, {18, 0.2F}})});
  const auto propose = [&](float limit) {
    const auto baseline = index->NewBaseline({.sink = 2, .local = 2, .mass_limit = limit});
    return ProposalOf(baseline.get(), step.step())[0];
  };
  EXPECT_EQ(propose(0.45F), (Positions{5}));
  EXPECT_EQ(propose(0.11F), (Positions{5, 9}));
  EXPECT_EQ(propose(0.05F), (Positions{5, 7, 9}));       // Head 1 drops .04.
  EXPECT_EQ(propose(0.035F), (Positions{5, 7, 9, 12}));  // Now it may not.
}

// Sinks 0 to 15 and window 80 to 95 of 96 tokens; pages 1 to 4 are the middle.
constexpr TokenBudget kOnePage = {.sink = 16, .local = 16, .top_k = 16};

Positions Page(uint32_t page, uint32_t count = 16) {
  Positions tokens(count);
  std::iota(tokens.begin(), tokens.end(), 16 * page);
  return tokens;
}

TEST(QuestTest, ReadsThePageOfTheLargestBound) {
  BaselineCase data(OneHead(2), 95, 0);
  // The best single key, q.k = 5, is in page 3. But page 2's largest x and largest y, of different
  // tokens, bound it by 6. Page 1 has the same two numbers in one channel: bound 3.
  Set(data.key(0, 50), {2.5F, 2.5F});
  Set(data.key(0, 33), {3.0F, 0.0F});
  Set(data.key(0, 40), {0.0F, 3.0F});
  Set(data.key(0, 20), {3.0F, 0.0F});
  Set(data.key(0, 21), {3.0F, 0.0F});
  HeadRun run("quest", &data, {}, kOnePage);
  EXPECT_EQ(run.Next({1.0F, 1.0F}, {0.0F, 0.0F}), Page(2));
  EXPECT_EQ(run.cost().heads_scanned, 1U);
  EXPECT_EQ(run.cost().bytes, 6 * 2 * 2 * 2.0);  // Two keys for each of 6 pages.
  EXPECT_EQ(run.cost().flops, 6 * 2 * 2.0);
}

TEST(QuestTest, NegativeQueriesAreBoundedByTheSmallestKeys) {
  BaselineCase data(OneHead(2), 95, 0);
  // Page 3 reaches from -5 to 8: 5 is its bound, whatever its largest keys are. Page 2: 4.
  Set(data.key(0, 50), {-5.0F, 0.0F});
  Set(data.key(0, 60), {8.0F, 0.0F});
  Set(data.key(0, 33), {-4.0F, 0.0F});
  Set(data.key(0, 20), {9.0F, 0.0F});
  HeadRun run("quest", &data, {}, kOnePage);
  EXPECT_EQ(run.Next({-1.0F, 1.0F}, {0.0F, 0.0F}), Page(3));
}

TEST(QuestTest, PagesOfDecodedTokensAreFoundToo) {
  BaselineCase data(OneHead(2), 90, 0);
  Set(data.key(0, 50), {3.0F, 0.0F});
  Set(data.key(0, 82), {4.0F, 0.0F});  // In the page that the prompt only begins.
  HeadRun run("quest", &data, {}, kOnePage);
  for (int i = 0; i < 7; ++i) run.Next({1.0F, 0.0F}, {0.0F, 0.0F});
  // 98 tokens: two of page 5 are in the middle. It is first, and page 3 does not fit in besides.
  EXPECT_EQ(run.Next({1.0F, 0.0F}, {0.0F, 0.0F}), Page(5, 2));
  // 112 and 113 tokens: now page 5 is whole.
  for (int i = 0; i < 13; ++i) run.Next({1.0F, 0.0F}, {0.0F, 0.0F});
  EXPECT_EQ(run.Next({1.0F, 0.0F}, {5.0F, 0.0F}), Page(5));
  for (int i = 0; i < 15; ++i) run.Next({1.0F, 0.0F}, {0.0F, 0.0F});
  // The key of 5 at position 111 is in page 6, all of which has left the window now.
  EXPECT_EQ(run.Next({1.0F, 0.0F}, {0.0F, 0.0F}), Page(6));
}

TEST(QuestTest, PagesAtTheEndsOfTheMiddleNeedRoomForTheirTokensThere) {
  BaselineCase data(OneHead(2), 97, 0);
  Set(data.key(0, 50), {4.0F, 0.0F});
  Set(data.key(0, 81), {3.0F, 0.0F});  // Two tokens of page 5 are in the middle.
  TokenBudget budget = kOnePage;
  for (const uint32_t room : {17U, 18U}) {
    budget.top_k = room;
    BaselineCase copy = data;
    HeadRun run("quest", &copy, {}, budget);
    Positions expected = Page(3);
    if (room == 18) expected.insert(expected.end(), {80U, 81U});
    EXPECT_EQ(run.Next({1.0F, 0.0F}, {0.0F, 0.0F}), expected);
  }
}

TEST(QuestTest, ByMassReadsPagesUntilTheBoundsAllowIt) {
  BaselineCase data(OneHead(2), 95, 0);
  Set(data.key(0, 50), {9.0F, 0.0F});
  Set(data.key(0, 33), {7.0F, 0.0F});
  // Shares of pages: e^9 : e^7 : 1 for the four others, = .880 : .119 : .0001.
  const auto propose = [&](float limit) {
    BaselineCase copy = data;
    HeadRun run("quest", &copy, {}, {.sink = 16, .local = 16, .mass_limit = limit});
    return run.Next({1.0F, 0.0F}, {0.0F, 0.0F});
  };
  EXPECT_EQ(propose(0.2F), Page(3));
  Positions both = Page(2);
  for (const uint32_t token : Page(3)) both.push_back(token);
  EXPECT_EQ(propose(0.05F), both);
}

// A calibration of `head_dim` channels in which only those named matter, and its prompt.
std::unique_ptr<BaselineCase> Calibration(uint32_t head_dim,
                                          const std::vector<uint32_t>& channels) {
  auto data = std::make_unique<BaselineCase>(OneHead(head_dim), 32, 4);
  for (const uint32_t channel : channels) {
    for (uint32_t token = 0; token < 32; ++token) data->key(0, token)[channel] = 1.0F;
    for (uint32_t i = 0; i < 4; ++i) data->query(0, i, 0)[channel] = i % 2 == 0 ? 1.0F : -1.0F;
  }
  return data;
}

constexpr TokenBudget kOneToken = {.sink = 2, .local = 2, .top_k = 1};

TEST(DoubleSparsityTest, SeesOnlyTheChannelsThatMatteredInTheCalibration) {
  BaselineCase data(OneHead(8), 39, 0);
  // Channels 2 and 5 are labels. Token 10 is largest in all, token 20 in what the labels see.
  Set(data.key(0, 10), {9.0F, 0.0F, 0.0F, 0.0F, 0.0F, 1.0F, 0.0F, 0.0F});
  Set(data.key(0, 20), {0.0F, 0.0F, 1.0F, 0.0F, 0.0F, 2.0F, 0.0F, 0.0F});
  Set(data.key(0, 30), {0.0F, 0.0F, 2.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F});
  const auto calibration = Calibration(8, {2, 5});
  HeadRun run("double_sparsity", &data, {.calibration = calibration->prompt()}, kOneToken);
  const std::vector<float> all(8, 1.0F);
  EXPECT_EQ(run.Next(all, std::vector<float>(8, 0.0F)), (Positions{20}));
  EXPECT_EQ(run.cost().heads_scanned, 1U);
  EXPECT_EQ(run.cost().bytes, 40 * (2 / 2.0 + 4.0));
  EXPECT_EQ(run.cost().flops, 40 * 2 * 2.0);
}

TEST(DoubleSparsityTest, ChannelsMatterByTheProductOfQueriesAndKeys) {
  BaselineCase calibration(OneHead(8), 16, 2);
  // Means of |k| and |q|: channel 0: 9, 0; 1: 0, 9; 3: 2, 3; 4: 3, 3; 6: 1, 5.
  Set(calibration.key(0, 3), {9.0F, 0.0F, 0.0F, 2.0F, -3.0F, 0.0F, 1.0F, 0.0F});
  Set(calibration.query(0, 1, 0), {0.0F, 9.0F, 0.0F, 3.0F, 3.0F, 0.0F, -5.0F, 0.0F});
  BaselineCase data(OneHead(8), 39, 0);
  for (uint32_t channel = 0; channel < 8; ++channel) {
    data.key(0, 10 + channel)[channel] = 4.0F + static_cast<float>(channel);
  }
  TokenBudget two = kOneToken;
  two.top_k = 2;
  HeadRun run("double_sparsity", &data, {.calibration = calibration.prompt()}, two);
  EXPECT_EQ(run.Next(std::vector<float>(8, 1.0F), std::vector<float>(8, 0.0F)),
            (Positions{13, 14}));
}

TEST(DoubleSparsityTest, DecodedTokensHaveLabelsToo) {
  BaselineCase data(OneHead(8), 39, 0);
  const auto calibration = Calibration(8, {2, 5});
  HeadRun run("double_sparsity", &data, {.calibration = calibration->prompt()}, kOneToken);
  const std::vector<float> all(8, 1.0F);
  run.Next(all, {0.0F, 0.0F, 3.0F, 0.0F, 0.0F, 0.0F, 0.0F, 0.0F});
  run.Next(all, std::vector<float>(8, 0.0F));
  EXPECT_EQ(run.Next(all, std::vector<float>(8, 0.0F)), (Positions{39}));
}

TEST(LokiTest, SeesOnlyTheComponentsOfTheCalibration) {
  // Keys of the calibration vary along (0, 0, .6, .8), so one component of four sees only that.
  BaselineCase calibration(OneHead(4), 32, 1);
  for (uint32_t token = 0; token < 32; ++token) {
    const float x = static_cast<float>(token % 5) - 2.0F;
    Set(calibration.key(0, token), {7.0F, 0.01F * x * x, 0.6F * x, 0.8F * x});
  }
  BaselineCase data(OneHead(4), 39, 0);
  Set(data.key(0, 10), {9.0F, 9.0F, 8.0F, -6.0F});  // Across: invisible.
  Set(data.key(0, 20), {0.0F, 0.0F, 1.2F, 1.6F});   // Along.
  Set(data.key(0, 30), {0.0F, 0.0F, 2.0F, 0.0F});   // 1.2 of it along.
  HeadRun run("loki", &data, {.calibration = calibration.prompt()}, kOneToken);
  EXPECT_EQ(run.Next({1.0F, 1.0F, 1.0F, 1.0F}, {0.0F, 0.0F, 0.0F, 0.0F}), (Positions{20}));
  EXPECT_EQ(run.cost().heads_scanned, 1U);
  EXPECT_EQ(run.cost().bytes, 40 * 2.0);
  EXPECT_EQ(run.cost().flops, 40 * 2.0 + 2 * 4 * 2.0);  // Labels, and turning query and new key.
}

TEST(TwilightTest, KeepsAsManyAsTheQueryAsksFor) {
  BaselineCase data(OneHead(2), 39, 0);
  Set(data.key(0, 10), {8.0F, 0.0F});
  for (uint32_t token = 20; token < 24; ++token) Set(data.key(0, token), {0.0F, 8.0F});
  HeadRun run("twilight", &data, {}, {.sink = 2, .local = 2, .mass_limit = 0.1F});
  // One token of e^8 among 39 of 1, then four of them.
  EXPECT_EQ(run.Next({1.0F, 0.0F}, {0.0F, 0.0F}), (Positions{10}));
  EXPECT_EQ(run.Next({0.0F, 1.0F}, {0.0F, 0.0F}), (Positions{20, 21, 22, 23}));
  EXPECT_EQ(run.cost().heads_scanned, 1U);
  EXPECT_EQ(run.cost().bytes, 41 * (2 / 2.0 + 4.0));
}

TEST(TwilightTest, EstimatesAreScaledLikeTheLogits) {
  ModelShape shape = OneHead(2);
  shape.scale = 0.125F;
  BaselineCase data(shape, 39, 0);
  Set(data.key(0, 10), {8.0F, 0.0F});
  HeadRun run("twilight", &data, {}, {.sink = 2, .local = 2, .mass_limit = 0.1F});
  // e^1 among 39 of 1: all but four of those must stay.
  EXPECT_EQ(run.Next({1.0F, 0.0F}, {0.0F, 0.0F}).size(), 36U - 4U);
}

TEST(TwilightTest, EstimatesFromFourBits) {
  BaselineCase data(OneHead(4), 39, 0);
  // Of 0 to 15 and 6.4, the last becomes 6: token 10 loses to token 20, whose 6.2 is exact.
  Set(data.key(0, 10), {0.0F, 15.0F, 6.4F, 0.0F});
  Set(data.key(0, 20), {0.0F, 0.0F, 6.2F, 0.0F});
  HeadRun run("twilight", &data, {}, kOneToken);
  EXPECT_EQ(run.Next({0.0F, 0.0F, 1.0F, 0.0F}, {0.0F, 0.0F, 0.0F, 0.0F}), (Positions{20}));
}

TEST(MagicPigTest, MeetsByAngleFromTheMeanKey) {
  BaselineCase data(OneHead(3), 63, 0);
  // Keys are (100, 0, 0) on average. From there, token 10 points where the query does (along y);
  // token 20 has twice its dot product, at an angle of 78 degrees; others point away. The query
  // is across (100, 0, 0), so that without the mean all angles were alike.
  for (uint32_t token = 0; token < 63; ++token) {
    Set(data.key(0, token), {100.0F, -6.0F / 61.0F, token % 2 == 0 ? 1.0F : -1.0F});
  }
  Set(data.key(0, 10), {100.0F, 2.0F, 0.0F});
  Set(data.key(0, 20), {100.0F, 4.0F, 19.0F});
  HeadRun run("magicpig", &data, {.seed = 3}, kOneToken);
  EXPECT_EQ(run.Next({0.0F, 1.0F, 0.0F}, {100.0F, -1.0F, 0.0F}), (Positions{10}));
  EXPECT_EQ(run.cost().heads_scanned, 0U);
  EXPECT_GT(run.cost().bytes, 0.0);
  EXPECT_EQ(run.cost().flops, 2 * 2.0 * 3 * 10 * 150);  // Query and new key, on 1500 planes.
}

TEST(MagicPigTest, SamplesAreThoseThatMeetTwiceNotTheLargest) {
  constexpr uint32_t kLength = 2000;
  BaselineCase data(OneHead(16), kLength, 0);
  const auto random = BaselineCase::Random(OneHead(16), kLength, 0, 11);
  for (uint32_t token = 0; token < kLength; ++token) {
    std::copy(random->key(0, token).begin(), random->key(0, token).end(),
              data.key(0, token).begin());
  }
  std::vector<float> q(16, 0.0F);
  q[0] = 1.0F;
  HeadRun run("magicpig", &data, {.seed = 4}, {.sink = 2, .local = 2, .top_k = kLength});
  const Positions samples = run.Next(q, std::vector<float>(16, 0.0F));
  // At 90 degrees a token meets with probability 1 - (1 - 2^-10)^150 - ... = .0098, in 16
  // dimensions angles lie within about 15 degrees of that: few are sampled though all might be.
  EXPECT_GT(samples.size(), 5U);
  EXPECT_LT(samples.size(), kLength / 10);
  // They are on the query's side.
  double along = 0.0;
  for (const uint32_t token : samples) along += data.key(0, token)[0];
  EXPECT_GT(along / static_cast<double>(samples.size()), 0.5);
}

TEST(MagicPigTest, DecodedTokensAreMetToo) {
  BaselineCase data(OneHead(3), 63, 0);
  for (uint32_t token = 0; token < 63; ++token) {
    Set(data.key(0, token), {token % 2 == 0 ? 1.0F : -1.0F, 0.0F, 1.0F});
  }
  HeadRun run("magicpig", &data, {.seed = 3}, kOneToken);
  const std::vector<float> q = {0.0F, 1.0F, 0.0F};
  run.Next(q, {0.0F, 5.0F, 1.0F});
  run.Next(q, {0.0F, -5.0F, 1.0F});
  EXPECT_EQ(run.Next(q, {0.0F, -5.0F, 1.0F}), (Positions{63}));
}

TEST(VAttentionTest, HalfIsPredictedAndHalfIsDrawnUniformly) {
  const auto calibration = Calibration(4, {1});
  constexpr uint32_t kSteps = 4000;
  constexpr uint32_t kDrawable = 50 - 3;
  std::map<uint32_t, int> draws;
  for (uint32_t seed = 0; seed < kSteps; ++seed) {
    BaselineCase data(OneHead(4), 53, 0);
    for (const uint32_t token : {10U, 20U, 30U}) data.key(0, token)[1] = 5.0F;
    HeadRun run("vattention", &data, {.calibration = calibration->prompt(), .seed = seed},
                {.sink = 2, .local = 2, .top_k = 6});
    const Positions got = run.Next({0.0F, 1.0F, 0.0F, 0.0F}, {0.0F, 0.0F, 0.0F, 0.0F});
    ASSERT_EQ(got.size(), 6U);
    for (const uint32_t token : {10U, 20U, 30U}) {
      ASSERT_TRUE(std::binary_search(got.begin(), got.end(), token));
    }
    for (const uint32_t token : got) ++draws[token];
  }
  EXPECT_EQ(draws.size(), 50U);
  // Each other token is one of 3 of 47: 255 +- 15 times; five standard deviations.
  for (const auto& [token, count] : draws) {
    if (token == 10 || token == 20 || token == 30) continue;
    EXPECT_NEAR(count, kSteps * 3.0 / kDrawable, 5 * 15.5) << token;
  }
}

TEST(VAttentionTest, ByMassDrawsAsManyAsItPredicts) {
  const auto calibration = Calibration(4, {1});
  BaselineCase data(OneHead(4), 53, 0);
  for (const uint32_t token : {10U, 20U}) data.key(0, token)[1] = 9.0F;
  HeadRun run("vattention", &data, {.calibration = calibration->prompt()},
              {.sink = 2, .local = 2, .mass_limit = 0.05F});
  const Positions got = run.Next({0.0F, 1.0F, 0.0F, 0.0F}, {0.0F, 0.0F, 0.0F, 0.0F});
  EXPECT_EQ(got.size(), 4U);
  EXPECT_TRUE(std::binary_search(got.begin(), got.end(), 10U));
  EXPECT_TRUE(std::binary_search(got.begin(), got.end(), 20U));
}

}  // namespace
}  // namespace kvservice::baselines
