// What samples are made from on the CPU device, against the truth and without tolerance: integer
// weights, exact logits of drawn tokens, norms of values. A proof that samples rests on these three
// and shows little of them in any one certificate.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "attention/cpu/head_queries.h"
#include "attention/cpu/population.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/cpu/score_kernel.h"
#include "tests/adversary/device_call.h"
#include "tests/adversary/instruction_set.h"
#include "tests/adversary/layer_case.h"
#include "tests/adversary/truth.h"

namespace kvservice::adversary {
namespace {

constexpr uint32_t kCases = 60;
constexpr CaseLimits kSmall = {.products_max = 1 << 18, .length_max = 700};

class SamplingInputsTest : public ::testing::TestWithParam<std::string> {
 protected:
  SamplingInputsTest() { EXPECT_TRUE(UseInstructionSet(GetParam())); }
  ~SamplingInputsTest() override { UseInstructionSet(""); }

  std::unique_ptr<Device> device_ = *NewDevice("cpu", {.thread_count = 1});
  Arena arena_{device_.get()};
};

// The queries of one KV head's group, first query token, as the device prepares them.
HeadQueries QueriesOf(const LayerCase& from, uint32_t kv_head) {
  const LayerShape& shape = from.shape;
  const uint32_t dim = shape.layout.head_dim;
  HeadQueries queries;
  queries.head_count = shape.layout.group_size();
  for (uint32_t head = 0; head < queries.head_count; ++head) {
    double squares = 0.0;
    for (uint32_t c = 0; c < dim; ++c) {
      const float q = from.queries[0][(size_t{kv_head} * queries.head_count + head) * dim + c];
      const float qs = shape.scale * q;
      queries.qs.push_back(qs);
      squares += static_cast<double>(qs) * static_cast<double>(qs);
    }
    queries.norm.push_back(std::sqrt(squares) * (1.0 + 0x1p-23) + 0x1p-120);
    queries.visible_begin.push_back(0);
    queries.visible_end.push_back(from.length);
  }
  return queries;
}

TEST_P(SamplingInputsTest, DrawnLogitsAreWithinTheirErrors) {
  uint32_t known = 0;
  for (uint64_t seed = 1; seed <= kCases; ++seed) {
    const LayerCase layer_case = GenerateCase(SeedOf(9, seed), kSmall);
    const StoredCase stored(&arena_, layer_case);
    const WidenedHead widened = stored.Widened(0);
    const HeadQueries queries = QueriesOf(layer_case, 0);
    std::vector<uint32_t> positions(layer_case.length);
    std::iota(positions.begin(), positions.end(), 0);
    std::vector<Score> scores(positions.size());
    ScoreTask task;
    task.shape = &layer_case.shape;
    task.view = &stored.view();
    task.queries = &queries;
    task.head = queries.head_count - 1;
    task.positions = positions;
    ScoreTokens(task, scores.data());
    const float* q = &layer_case.queries[0][size_t{task.head} * layer_case.shape.layout.head_dim];
    for (const uint32_t token : positions) {
      const Score& score = scores[token];
      if (!std::isfinite(score.error) || !std::isfinite(score.logit)) continue;
      const HeadTruth truth(layer_case.shape, widened, q, token, token + 1);
      ASSERT_FALSE(truth.is_meaningless()) << "seed " << seed << " token " << token;
      // The mass of one token alone is that of its logit.
      const Interval logit = truth.Masses({token}).log_kept;
      const auto nearest = static_cast<long double>(score.logit);
      const auto error = static_cast<long double>(score.error);
      ASSERT_GE(nearest + error, logit.low) << "seed " << seed << " token " << token;
      ASSERT_LE(nearest - error, logit.high) << "seed " << seed << " token " << token;
      ++known;
    }
  }
  EXPECT_GT(known, 5000U);
}

TEST_P(SamplingInputsTest, ValueNormsEncloseTheLargest) {
  uint32_t bounded = 0;
  for (uint64_t seed = 1; seed <= kCases; ++seed) {
    const LayerCase layer_case = GenerateCase(SeedOf(10, seed), kSmall);
    const StoredCase stored(&arena_, layer_case);
    const WidenedHead widened = stored.Widened(0);
    Chance chance(seed);
    std::vector<uint64_t> mask(BlockCount(layer_case.length));
    long double largest = 0.0L;
    for (uint32_t token = 0; token < layer_case.length; ++token) {
      if (chance.OneIn(3)) continue;
      mask[token / kBlockTokens] |= uint64_t{1} << (token % kBlockTokens);
      // Written so that NaN stays.
      if (!(widened.v_norm[token] <= largest)) largest = widened.v_norm[token];
      if (std::isnan(largest)) break;
    }
    const ValueNorms norms =
        BoundValueNorms(layer_case.shape, stored.view(), 0, mask, /*block_begin=*/0);
    if (!std::isfinite(largest)) {
      EXPECT_TRUE(std::isinf(norms.upper)) << "seed " << seed;
      continue;
    }
    ASSERT_LE(static_cast<long double>(norms.lower), largest) << "seed " << seed;
    ASSERT_GE(static_cast<long double>(norms.upper), largest) << "seed " << seed;
    bounded += norms.lower > 0.99 * static_cast<double>(largest) ? 1 : 0;
  }
  EXPECT_GT(bounded, kCases / 2);
}

TEST_P(SamplingInputsTest, IntegerWeightsAreNeverBelowTheirBounds) {
  constexpr uint32_t kPages = 5;
  Chance chance(3);
  for (uint32_t repetition = 0; repetition < 200; ++repetition) {
    ScanWeights weights;
    weights.Resize(1, 0, kPages, /*with_bounds=*/true);
    std::vector<uint64_t> mask(kPages);
    for (uint32_t page = 0; page < kPages; ++page) {
      mask[page] = chance.OneIn(5) ? 0 : chance.Bits() | chance.Bits();
      // So far below the others that the factor between them is no float: weights of 1.
      constexpr int32_t kFarBelow = -2000;
      const auto near = static_cast<int32_t>(chance.Below(60)) - 40;
      weights.reference[page] = chance.OneIn(6) ? kFarBelow : near;
      for (uint32_t t = 0; t < kBlockTokens; ++t) {
        const float power = std::exp2(-static_cast<float>(chance.Below(60)));
        weights.Page(weights.upper, 0, page)[t] = (0.5F + chance.Uniform()) * power;
      }
    }
    Population population;
    ASSERT_TRUE(FillPopulation(weights, 0, mask, &population));
    uint64_t total = 0;
    for (uint32_t page = 0; page < kPages; ++page) {
      for (uint32_t t = 0; t < kBlockTokens; ++t) {
        const uint32_t integer = population.weights[size_t{page} * kBlockTokens + t];
        total += integer;
        if (((mask[page] >> t) & 1) == 0) {
          ASSERT_EQ(integer, 0U);
          continue;
        }
        ASSERT_GE(integer, 1U);
        const long double bound =
            std::ldexp(static_cast<long double>(weights.Page(weights.upper, 0, page)[t]),
                       weights.reference[page]);
        const long double unit =
            std::exp(static_cast<long double>(population.ref)) * 0x1p-30L * (1.0L - 0x1p-58L);
        ASSERT_GE(static_cast<long double>(integer) * unit, bound) << page << " " << t;
      }
    }
    ASSERT_EQ(population.total(), total);
  }
}

TEST_P(SamplingInputsTest, UnknownWeightsAreNotDrawnFrom) {
  ScanWeights weights;
  weights.Resize(1, 0, 1, /*with_bounds=*/true);
  const std::vector<uint64_t> mask = {~uint64_t{0}};
  for (const float unknown :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::fill_n(weights.Page(weights.upper, 0, 0), kBlockTokens, 1.0F);
    weights.reference[0] = 0;
    weights.Page(weights.upper, 0, 0)[17] = unknown;
    Population population;
    EXPECT_FALSE(FillPopulation(weights, 0, mask, &population));
  }
}

INSTANTIATE_TEST_SUITE_P(All, SamplingInputsTest, ::testing::ValuesIn(InstructionSets()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace kvservice::adversary
