// Methods that take choices over from other layers, heads or steps, on cases where the answer
// follows by hand.

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "tests/selector/baseline_case.h"

namespace kvservice::baselines {
namespace {

constexpr TokenBudget kTwo = {.sink = 2, .local = 2, .top_k = 2};

ModelShape Layers(uint32_t layer_count, uint32_t kv_head_count = 1) {
  return {.layer_count = layer_count,
          .query_head_count = kv_head_count,
          .kv_head_count = kv_head_count,
          .head_dim = 2};
}

// Attention of one head to two tokens of 20.
LogitsStep TwoTokens(uint32_t layer, uint32_t token) {
  return LogitsStep(layer, {Spread(20, {{token, 0.4F}, {token + 1, 0.3F}})});
}

TEST(TidalDecodeTest, LayersTakeOverWhatLayerTwoAndTheMiddleLayerChose) {
  const BaselineCase data(Layers(32), 19, 0);
  const auto index = IndexOf("tidal_decode", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline(kTwo);
  for (uint32_t layer = 0; layer < 32; ++layer) {
    Cost cost;
    const uint32_t own = 2 + layer % 14;
    const LogitsStep step = TwoTokens(layer, own);
    const Positions got = ProposalOf(baseline.get(), step.step(), &cost)[0];
    const bool scores = layer <= 2 || layer == 13;
    const uint32_t expected = scores ? own : 2 + (layer < 13 ? 2 : 13) % 14;
    EXPECT_EQ(got, (Positions{expected, expected + 1})) << layer;
    EXPECT_EQ(cost.heads_scanned, scores ? 1U : 0U) << layer;
    EXPECT_EQ(cost.bytes, scores ? 20 * 2 * 2.0 : 0.0) << layer;
    EXPECT_EQ(cost.flops, scores ? 20 * 2 * 2.0 : 0.0) << layer;
  }
}

TEST(TidalDecodeTest, TheMiddleLayerIsAtTheSameDepthInOtherModels) {
  const BaselineCase data(Layers(30), 19, 0);
  const auto index = IndexOf("tidal_decode", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline(kTwo);
  for (uint32_t layer = 0; layer < 30; ++layer) {
    Cost cost;
    ProposalOf(baseline.get(), TwoTokens(layer, 5).step(), &cost);
    EXPECT_EQ(cost.heads_scanned, layer <= 2 || layer == 12 ? 1U : 0U) << layer;  // 30 * 13 / 32
  }
}

// Where the first layers that choose are others, those take the places of 2 and the middle one.
TEST(TidalDecodeTest, OnlyLayersThatChooseCount) {
  const BaselineCase data(Layers(18), 19, 0);
  Prompt prompt = *data.prompt();
  prompt.layers = {5, 11, 17};
  const auto index = IndexOf("tidal_decode", {.prompt = std::make_shared<const Prompt>(prompt)});
  const auto baseline = index->NewBaseline(kTwo);
  const auto propose = [&](uint32_t layer, uint32_t token) {
    return ProposalOf(baseline.get(), TwoTokens(layer, token).step())[0];
  };
  EXPECT_EQ(propose(5, 3), (Positions{3, 4}));
  EXPECT_EQ(propose(11, 9), (Positions{9, 10}));  // The next after 18 * 13 / 32.
  EXPECT_EQ(propose(17, 6), (Positions{9, 10}));
}

TEST(TokenSelectTest, OneSetPerLayerByTheVoteOfAllHeads) {
  const BaselineCase data(Layers(1, 2), 19, 0);
  const auto index = IndexOf("token_select", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline({.sink = 2, .local = 2, .top_k = 1});
  // Each head has a favourite of its own (5, 7), and both like 9: .4 + .4 against .5.
  LogitsStep step(0, {Spread(20, {{5, 0.5F}, {9, 0.4F}}), Spread(20, {{7, 0.5F}, {9, 0.4F}})});
  step.q = {1.0F, 0.0F, 1.0F, 0.0F};
  EXPECT_EQ(ProposalOf(baseline.get(), step.step()), (std::vector<Positions>{{9}, {9}}));
}

TEST(TokenSelectTest, HeadsVoteWithTheirSoftmaxOverTheMiddle) {
  const BaselineCase data(Layers(1, 2), 19, 0);
  const auto index = IndexOf("token_select", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline({.sink = 2, .local = 2, .top_k = 1});
  // Head 0 spends nearly all on a sink; of what is left, token 5 has nine tenths. Head 1 gives
  // token 7 six tenths of what it has in the middle.
  LogitsStep step(
      0, {Spread(20, {{0, 0.9F}, {5, 0.009F}, {7, 0.001F}}), Spread(20, {{5, 0.2F}, {7, 0.3F}})});
  step.q = {1.0F, 0.0F, 1.0F, 0.0F};
  EXPECT_EQ(ProposalOf(baseline.get(), step.step())[0], (Positions{5}));
}

TEST(TokenSelectTest, ReusesWhileTheLayersQueryIsSimilar) {
  const BaselineCase data(Layers(2), 19, 0);
  const auto index = IndexOf("token_select", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline(kTwo);
  const auto propose = [&](uint32_t layer, uint32_t token, std::vector<float> q, Cost* cost) {
    LogitsStep step = TwoTokens(layer, token);
    step.q = std::move(q);
    return ProposalOf(baseline.get(), step.step(), cost)[0];
  };
  Cost cost;
  EXPECT_EQ(propose(0, 5, {1.0F, 0.0F}, &cost), (Positions{5, 6}));
  EXPECT_EQ(cost.heads_scanned, 1U);
  EXPECT_EQ(cost.bytes, 20 * 2 * 2.0);
  // Another layer has nothing to reuse yet.
  EXPECT_EQ(propose(1, 8, {1.0F, 0.0F}, &cost), (Positions{8, 9}));
  // Cosine .894 is too little, .91 enough, whatever the length of the query.
  EXPECT_EQ(propose(0, 10, {9.1F, 4.146F}, &cost), (Positions{5, 6}));
  EXPECT_EQ(cost.heads_scanned, 0U);
  EXPECT_EQ(cost.bytes, 0.0);
  EXPECT_EQ(propose(0, 10, {2.0F, 1.0F}, &cost), (Positions{10, 11}));
  EXPECT_EQ(cost.heads_scanned, 1U);
  // From then on that query is the one to compare with: (1, 0) has .894 with it.
  EXPECT_EQ(propose(0, 12, {2.0F, 1.1F}, &cost), (Positions{10, 11}));
  EXPECT_EQ(propose(0, 12, {1.0F, 0.0F}, &cost), (Positions{12, 13}));
}

TEST(TokenSelectTest, ShortSequencesAreReadWholeAndNotRemembered) {
  const BaselineCase data(Layers(1), 5, 0);
  const auto index = IndexOf("token_select", {.prompt = data.prompt()});
  const auto baseline = index->NewBaseline(kTwo);
  const auto propose = [&](uint32_t length, uint32_t token, Cost* cost) {
    LogitsStep step(0, {Spread(length, {{token, 0.9F}})});
    step.q = {1.0F, 0.0F};
    return ProposalOf(baseline.get(), step.step(), cost)[0];
  };
  Cost cost;
  EXPECT_EQ(propose(6, 2, &cost), (Positions{2, 3}));
  EXPECT_EQ(cost.heads_scanned, 0U);
  // One more than fits: a choice, the first one, though the query is the same.
  EXPECT_EQ(propose(7, 4, &cost), (Positions{2, 4}));
  EXPECT_EQ(cost.heads_scanned, 1U);
}

// Eight channels, so that labels have two; the other six are 0 everywhere.
constexpr uint32_t kChannels = 8;

// A unit vector along +x, -x, +y or -y.
std::vector<float> Looking(uint32_t direction) {
  std::vector<float> q(kChannels, 0.0F);
  q[direction / 2] = direction % 2 == 0 ? 1.0F : -1.0F;
  return q;
}

// What a query that looks there chooses: tokens 10 to 17 lie in the four directions, two in each.
Positions TokensIn(uint32_t direction) { return {10 + 2 * direction, 11 + 2 * direction}; }

// A prompt of 29 tokens, in which each head's late queries look into one direction.
class HShareRun {
 public:
  HShareRun(ModelShape shape, const std::vector<uint32_t>& directions,
            const std::vector<uint32_t>& layers = {})
      : shape_((shape.head_dim = kChannels, shape)), data_(shape_, 29, 6) {
    for (uint32_t head = 0; head < directions.size(); ++head) {
      for (uint32_t i = 0; i < 8; ++i) {
        const std::vector<float> key = Looking(i / 2);
        std::transform(key.begin(), key.end(), data_.key(head, 10 + i).begin(),
                       [](float x) { return 10.0F * x; });
      }
      for (uint32_t i = 0; i < 6; ++i) {
        const std::vector<float> q = Looking(directions[head]);
        std::copy(q.begin(), q.end(), data_.query(head, i, 0).begin());
      }
    }
    Prompt prompt = *data_.prompt();
    prompt.layers = layers;
    index_ = IndexOf("hshare", {.prompt = std::make_shared<const Prompt>(prompt),
                                .calibration = data_.prompt(),
                                .overlap = {.sink = 2, .local = 2, .top_k = 2}});
    baseline_ = index_->NewBaseline(kTwo);
  }

  std::vector<Positions> Next(uint32_t layer, const std::vector<uint32_t>& directions) {
    std::vector<float> q;
    for (const uint32_t direction : directions) {
      const std::vector<float> own = Looking(direction);
      q.insert(q.end(), own.begin(), own.end());
    }
    const std::vector<float> new_keys(size_t{kChannels} * shape_.kv_head_count, 0.0F);
    return ProposalOf(baseline_.get(), data_.Decode(layer, q, new_keys), &cost_);
  }

  const Cost& cost() const { return cost_; }

 private:
  const ModelShape shape_;
  BaselineCase data_;
  std::unique_ptr<const PromptIndex> index_;
  std::unique_ptr<Baseline> baseline_;
  Cost cost_;
};

TEST(HShareTest, LayersThatChooseAlikeShare) {
  // In the prompt, layers 1 and 2 looked the same way, and 0 and 3: half of the layers copy.
  HShareRun run(Layers(4), {0, 1, 1, 0});
  EXPECT_EQ(run.Next(0, {2})[0], TokensIn(2));
  EXPECT_EQ(run.cost().heads_scanned, 1U);
  EXPECT_EQ(run.cost().bytes, 30 * (2 / 2.0 + 4.0));
  EXPECT_EQ(run.cost().flops, 30 * 2 * 2.0);
  EXPECT_EQ(run.Next(1, {3})[0], TokensIn(3));
  EXPECT_EQ(run.cost().heads_scanned, 1U);
  EXPECT_EQ(run.Next(2, {0})[0], TokensIn(3));
  EXPECT_EQ(run.cost().heads_scanned, 0U);
  EXPECT_EQ(run.cost().bytes, 0.0);
  EXPECT_EQ(run.Next(3, {1})[0], TokensIn(2));
  EXPECT_EQ(run.cost().heads_scanned, 0U);
}

// Layer 3 is most like layer 0, which is read whole and has no list to copy: of the layers that
// choose, half copy.
TEST(HShareTest, NobodyCopiesFromALayerThatDoesNotChoose) {
  HShareRun run(Layers(4), {0, 1, 1, 0}, {1, 2, 3});
  EXPECT_EQ(run.Next(1, {3})[0], TokensIn(3));
  EXPECT_EQ(run.Next(2, {0})[0], TokensIn(3));
  EXPECT_EQ(run.cost().heads_scanned, 0U);
  EXPECT_EQ(run.Next(3, {1})[0], TokensIn(1));
  EXPECT_EQ(run.cost().heads_scanned, 1U);
}

TEST(HShareTest, HeadsThatChooseAlikeShare) {
  HShareRun run(Layers(1, 4), {0, 1, 1, 0});
  EXPECT_EQ(run.Next(0, {2, 3, 0, 1}),
            (std::vector<Positions>{TokensIn(2), TokensIn(3), TokensIn(3), TokensIn(2)}));
  EXPECT_EQ(run.cost().heads_scanned, 2U);
}

TEST(HShareTest, EveryOtherStepReusesAndAddsWhatLeftTheWindow) {
  HShareRun run(Layers(1), {0});
  EXPECT_EQ(run.Next(0, {1})[0], TokensIn(1));  // Length 30.
  EXPECT_EQ(run.Next(0, {2})[0], (Positions{TokensIn(1)[0], 28}));
  EXPECT_EQ(run.cost().heads_scanned, 0U);
  EXPECT_EQ(run.cost().bytes, 0.0);
  EXPECT_EQ(run.Next(0, {3})[0], TokensIn(3));
  EXPECT_EQ(run.cost().heads_scanned, 1U);
}

}  // namespace
}  // namespace kvservice::baselines
