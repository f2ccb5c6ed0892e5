// Random numbers are never used twice: not by two heads of a row, two rounds of a head, two
// purposes or two calls. A reused number is invisible in any one certificate, and makes the stated
// probability wrong in many.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "attention/device.h"
#include "attention/head_proof.h"
#include "tests/adversary/device_call.h"
#include "tests/adversary/layer_case.h"

namespace kvservice::adversary {
namespace {

std::array<std::byte, kDrawKeyBytes> KeyOf(uint64_t seed) {
  Chance chance(seed);
  return MakeDrawKey(&chance);
}

// ---- Devices ------------------------------------------------------------------------------------

// Two KV heads with the same keys and values, and one query for all: heads differ in nothing but
// their names, so equal bounds mean equal draws.
LayerCase AlikeHeads() {
  LayerCase frame;
  frame.shape.layout = {.query_head_count = 6, .kv_head_count = 2, .head_dim = 64};
  frame.shape.scale = 0.125F;
  frame.length = 1200;
  frame.query_count = 2;
  LayerCase result = GenerateCase(5, {.keys = KeyKind::kNormal}, frame);
  const size_t bytes = result.shape.layout.vector_bytes();
  for (uint32_t token = 0; token < result.length; ++token) {
    const size_t at = 2 * token * bytes;
    std::copy_n(&result.k[at], bytes, &result.k[at + bytes]);
    std::copy_n(&result.v[at], bytes, &result.v[at + bytes]);
  }
  result.queries.resize(1);
  std::vector<float>& q = result.queries[0];
  for (size_t i = 64; i < q.size(); ++i) q[i] = q[i % 64];
  return result;
}

class FreshDrawsTest : public ::testing::TestWithParam<std::string> {
 protected:
  // The bounds of the dropped masses of all heads.
  std::vector<double> Bounds(uint64_t key_seed) {
    const StoredCase stored(&arena_, case_);
    Plan plan;
    plan.source = Source::kScan;
    plan.keep.top_k = 20;
    plan.local_begin = case_.length - 30;
    plan.dense_share = 1.0F;
    plan.prove = Guarantee::kConfidence;
    plan.failure_probability = 0.01;
    plan.draws_max = 128;
    plan.max_dropped_mass = 0.001F;
    DeviceCall call(stored, 0, plan, KeyOf(key_seed));
    call.Run();
    EXPECT_TRUE(call.row.status.ok());
    std::vector<double> bounds;
    for (const HeadCertificate& c : call.certificates) {
      EXPECT_EQ(c.level, Level::kConfidence);
      EXPECT_GT(c.keys_sampled, 0U);
      bounds.push_back(c.log_dropped_upper.value);
    }
    return bounds;
  }

  const LayerCase case_ = AlikeHeads();
  std::unique_ptr<Device> device_ = *NewDevice(GetParam(), {.thread_count = 1});
  Arena arena_{device_.get()};
};

TEST_P(FreshDrawsTest, NoTwoHeadsOfARowDrawAlike) {
  const std::vector<double> bounds = Bounds(1);
  EXPECT_EQ(std::set<double>(bounds.begin(), bounds.end()).size(), bounds.size());
}

TEST_P(FreshDrawsTest, ACallIsRepeatedByItsKeyAndNoOther) {
  const std::vector<double> bounds = Bounds(1);
  EXPECT_EQ(Bounds(1), bounds);
  const std::vector<double> others = Bounds(2);
  for (size_t head = 0; head < bounds.size(); ++head) EXPECT_NE(bounds[head], others[head]);
}

INSTANTIATE_TEST_SUITE_P(All, FreshDrawsTest, ::testing::Values("reference", "cpu"),
                         [](const auto& test) { return test.param; });

// ---- Rounds and purposes ------------------------------------------------------------------------

// Tokens of equal weight, half of which weigh nothing. Remembers what is read.
class RecordedTokens : public DroppedTokens {
 public:
  explicit RecordedTokens(uint32_t head_dim) : head_dim_(head_dim) {
    constexpr uint32_t kPages = 64;
    constexpr uint32_t kWeight = 1 << 10;
    population_.Begin(0, kPages);
    std::fill(population_.weights.begin(), population_.weights.end(), kWeight);
    population_.SumPages();
  }
  const Population* Weigh() override { return &population_; }
  void BoundValues(const Population& population, std::vector<float>* bounds) override {
    bounds->assign(population.weights.size(), 1.0F);
  }
  void Read(absl::Span<const uint32_t> positions, double /*ref*/, absl::Span<DrawnWeight> weights,
            float* values) override {
    for (size_t i = 0; i < positions.size(); ++i) {
      const double weight = positions[i] % 2 == 0 ? 1000.0 : 0.0;
      weights[i] = {weight, weight, weight};
      if (values != nullptr) std::fill_n(values + i * head_dim_, head_dim_, 0.01F);
    }
    std::vector<uint32_t>& drawn = values == nullptr ? keys : rows;
    drawn.insert(drawn.end(), positions.begin(), positions.end());
  }
  std::vector<uint32_t> Take(std::vector<uint32_t>* drawn) {
    std::vector<uint32_t> taken;
    taken.swap(*drawn);
    return taken;
  }

  std::vector<uint32_t> keys, rows;

 private:
  uint32_t head_dim_;
  Population population_;
};

class HeadProofTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kDim = 64;

  HeadProofTest() {
    plan_.prove = Guarantee::kConfidence;
    plan_.on_violation = OnViolation::kGrow;
    plan_.max_dropped_mass = 1e-6F;
    plan_.max_output_error = 1e-6F;
    plan_.failure_probability = 0.01;
    plan_.draws_max = 64;
    const double dropped = std::log(64.0 * 64.0 * 1024.0 / 0x1p30);
    evidence_.log_kept = 0.0;
    evidence_.kept_lower = {-1e-9};
    evidence_.kept_upper = {1e-9};
    evidence_.level = Level::kDeterministic;
    evidence_.dropped_upper = {dropped + 1e-9};
    evidence_.dropped_lower = {kLogZero};
    evidence_.output = output_.data();
    evidence_.arithmetic_error = 1e-9;
    evidence_.value_norm_lower = 0.9;
    evidence_.value_norm_upper = 1.0;
  }

  // What each of the rounds drew, keys and rows.
  std::vector<std::vector<uint32_t>> Rounds(const DrawStream& stream, uint64_t key_seed) {
    RecordedTokens tokens(kDim);
    const auto key = KeyOf(key_seed);
    HeadProof proof;
    proof.Begin(plan_, kDim, key, stream);
    std::vector<std::vector<uint32_t>> drawn;
    for (uint32_t round = 0; round < FailureBudget::kRoundsMax; ++round) {
      proof.Prove(evidence_, {kLogZero}, plan_.draws_max, &tokens);
      drawn.push_back(tokens.Take(&tokens.keys));
      drawn.push_back(tokens.Take(&tokens.rows));
    }
    return drawn;
  }

  Plan plan_;
  HeadEvidence evidence_;
  const std::vector<float> output_ = std::vector<float>(kDim, 0.05F);
};

TEST_F(HeadProofTest, RoundsPurposesAndHeadsDrawDifferently) {
  std::set<std::vector<uint32_t>> seen;
  size_t count = 0;
  const DrawStream streams[] = {
      {}, {.kv_head = 1}, {.query_head = 1}, {.query_token = 1}, {.query_head = 256}};
  for (const DrawStream& stream : streams) {
    for (const std::vector<uint32_t>& drawn : Rounds(stream, 1)) {
      ASSERT_GE(drawn.size(), 32U) << "nothing was sampled";
      // What was drawn first tells streams apart; how many were drawn does not matter.
      seen.insert(std::vector<uint32_t>(drawn.begin(), drawn.begin() + 32));
      ++count;
    }
  }
  EXPECT_EQ(count, 5U * 2 * FailureBudget::kRoundsMax);
  EXPECT_EQ(seen.size(), count);
  EXPECT_EQ(Rounds({}, 1), Rounds({}, 1));
  EXPECT_NE(Rounds({}, 1), Rounds({}, 2));
}

// An estimate's error is that of sampling, of the device's arithmetic and of rounding the answer to
// float; the last two are seldom seen beside the first, so they are made large here.
TEST_F(HeadProofTest, CompensatedErrorsIncludeTheArithmetic) {
  const auto error_of = [&](double arithmetic, double value_norm) {
    HeadEvidence evidence = evidence_;
    evidence.arithmetic_error = arithmetic;
    evidence.value_norm_upper = value_norm;
    RecordedTokens tokens(kDim);
    HeadProof proof;
    proof.Begin(plan_, kDim, KeyOf(1), {});
    proof.Prove(evidence, {kLogZero}, plan_.draws_max, &tokens);
    EXPECT_EQ(proof.certificate().action, Action::kCompensated);
    return proof.certificate().output_error_upper;
  };
  constexpr double kArithmetic = 1e4;
  constexpr double kNorm = 1e12;
  EXPECT_LT(error_of(1e-9, 1e6), 10.0);
  EXPECT_GE(error_of(kArithmetic, kNorm), kArithmetic + kNorm * 0x1p-24);
  EXPECT_GE(error_of(kArithmetic, 1e9), kArithmetic);
  EXPECT_GE(error_of(1e-9, kNorm), kNorm * 0x1p-24);
}

}  // namespace
}  // namespace kvservice::adversary
