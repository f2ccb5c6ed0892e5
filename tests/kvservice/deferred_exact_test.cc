// Exact masses of earlier steps, against attention over words in double.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kTokens = 300;

// Exact share of the softmax mass that `selected` leaves out.
double TrueDroppedMass(const std::vector<double>& logits, const std::vector<uint32_t>& selected) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double all = 0.0;
  for (const double logit : logits) all += std::exp(logit - top);
  double kept = 0.0;
  for (const uint32_t token : selected) kept += std::exp(logits[token] - top);
  return std::max(0.0, (all - kept) / all);
}

class DeferredExactTest : public ::testing::Test {
 protected:
  DeferredExactTest() : engine_(TestEngine::SmallOptions(), 2, *NewDevice("cpu", {})) {
    handle_ = engine_.NewSequence();
    engine_.Fill(handle_, 0, Counting(0, kTokens));
    policy_.dense_below_tokens = 0;
    policy_.layers.clear();
    policy_.budget = {.sink = 4, .local = 16, .top_k = 24};
    policy_.deferred_exact_steps = 12;
  }

  // Words [position, position + count) attend and are stored.
  AttendRowResult Attend(uint32_t position, uint32_t count, uint32_t layer = 0) {
    AttendStep step(engine_.model(), layer);
    step.Add(handle_, position, Counting(position, count));
    step.call.policy = &policy_;
    step.call.want_selected = true;
    EXPECT_TRUE(step.Run(engine_.get()).ok());
    EXPECT_TRUE(step.result(0).status.ok()) << step.result(0).status;
    return step.result(0);
  }

  void ExpectTruths();

  LayerShape Shape() const {
    return {.layout = engine_.model().layout,
            .scale = engine_.model().scale,
            .inverse_frequencies = {}};
  }

  TestEngine engine_;
  Handle handle_;
  Policy policy_ = DefaultPolicy(SelectorKind::kCis);
};

TEST_F(DeferredExactTest, TheLastCallBringsTheTruthOfAllThatWaited) { ExpectTruths(); }

// With bounds of what was kept, neighbours share a pass.
TEST_F(DeferredExactTest, BoundsOfWhatWasKeptAreEnough) {
  policy_.guarantee = Guarantee::kDeterministic;
  policy_.max_dropped_mass = 0.5F;
  policy_.on_violation = OnViolation::kReport;
  ExpectTruths();
}

void DeferredExactTest::ExpectTruths() {
  std::vector<AttendRowResult> results;
  std::vector<uint32_t> counts = {1, 1, 3, 1, 4};
  uint32_t position = kTokens;
  for (const uint32_t count : counts) {
    results.push_back(Attend(position, count));
    EXPECT_TRUE(results.back().deferred.empty()) << "ten tokens wait";
    position += count;
  }
  counts.push_back(2);
  results.push_back(Attend(position, 2));
  const std::vector<DeferredMasses>& deferred = results.back().deferred;
  ASSERT_EQ(deferred.size(), results.size());
  double largest = 0.0;
  position = kTokens;
  for (size_t i = 0; i < deferred.size(); ++i) {
    EXPECT_EQ(deferred[i].position, position);
    ASSERT_EQ(deferred[i].query_count, counts[i]);
    ASSERT_EQ(deferred[i].heads.size(), size_t{4} * counts[i]);
    for (uint32_t token = 0; token < counts[i]; ++token) {
      const DenseAnswer dense =
          AttendDensely(Shape(), 0, Counting(0, position + token + 1), position + token);
      for (uint32_t head = 0; head < 4; ++head) {
        // Query tokens of one row share their selection and see nothing after themselves.
        std::vector<uint32_t> selected = results[i].selected[head / 2];
        std::erase_if(selected, [&](uint32_t at) { return at > position + token; });
        const double truth = TrueDroppedMass(dense.logits[head], selected);
        const DeferredMass& mass = deferred[i].heads[4 * token + head];
        EXPECT_GE(mass.upper.value, truth);
        EXPECT_LE(mass.lower.value, truth + 1e-15);
        EXPECT_LE(mass.upper.value - mass.lower.value, 1e-3);
        largest = std::max(largest, truth);
      }
    }
    position += counts[i];
  }
  EXPECT_GT(largest, 0.01) << "something was at stake";
  EXPECT_TRUE(Attend(position, 1).deferred.empty()) << "a new round has begun";
}

TEST_F(DeferredExactTest, LayersWaitApartAndATruncateForgets) {
  policy_.deferred_exact_steps = 2;
  EXPECT_TRUE(Attend(kTokens, 1, 0).deferred.empty());
  EXPECT_TRUE(Attend(kTokens, 1, 1).deferred.empty());
  EXPECT_EQ(Attend(kTokens + 1, 1, 0).deferred.size(), 2U);
  ASSERT_TRUE(engine_.Truncate(handle_, kTokens).ok());
  ++handle_.generation;
  EXPECT_TRUE(Attend(kTokens, 1, 1).deferred.empty()) << "what waited was of tokens that are gone";
  EXPECT_EQ(Attend(kTokens + 1, 1, 1).deferred.size(), 2U);
}

TEST_F(DeferredExactTest, RepeatedStepsAreStepsOfTheirOwn) {
  policy_.deferred_exact_steps = 3;
  Attend(kTokens, 1);
  Attend(kTokens, 1);
  const AttendRowResult last = Attend(kTokens + 1, 1);
  ASSERT_EQ(last.deferred.size(), 3U);
  for (uint32_t head = 0; head < 4; ++head) {
    EXPECT_EQ(last.deferred[0].heads[head].upper.value, last.deferred[1].heads[head].upper.value);
  }
}

TEST_F(DeferredExactTest, OffMeansOff) {
  policy_.deferred_exact_steps = 0;
  for (uint32_t i = 0; i < 4; ++i) EXPECT_TRUE(Attend(kTokens + i, 1).deferred.empty());
  policy_.deferred_exact_steps = 1;
  policy_.mode = Mode::kShadow;
  EXPECT_TRUE(Attend(kTokens + 4, 1).deferred.empty());
  policy_.mode = Mode::kEnforce;
  EXPECT_EQ(Attend(kTokens + 5, 1).deferred.size(), 1U);
}

}  // namespace
}  // namespace kvservice::testing
