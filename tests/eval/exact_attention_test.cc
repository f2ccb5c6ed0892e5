// Exact attention of the closed-loop study against plain loops in double.

#include "tests/eval/exact_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "attention/float16.h"

namespace kvservice::eval {
namespace {

constexpr uint32_t kLayers = 4, kQueryHeads = 6, kKvHeads = 2, kHeadDim = 32;
constexpr uint32_t kGroup = kQueryHeads / kKvHeads;
constexpr uint32_t kPromptTokens = 70, kSteps = 5;
constexpr size_t kContenders = 4;
constexpr uint32_t kLayer = 3;
constexpr float kScale = 0.25F;
// Float32 sums of 32 products of standard size.
constexpr double kTolerance = 1e-4;

DecoderShape Shape() {
  return {.layer_count = kLayers,
          .query_head_count = kQueryHeads,
          .kv_head_count = kKvHeads,
          .head_dim = kHeadDim,
          .scale = kScale,
          .windows = {0, 0, 0, 0}};
}

class ExactAttentionTest : public ::testing::Test {
 protected:
  ExactAttentionTest() {
    PromptCache cache;
    cache.tokens.resize(kPromptTokens);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const size_t numbers = size_t{kKvHeads} * kPromptTokens * kHeadDim;
      cache.layers.push_back({.k = Bits(numbers),
                              .v = Bits(numbers),
                              .queries = {},
                              .attention_sum = std::vector<float>(kQueryHeads * kPromptTokens)});
    }
    prompt_ = std::make_unique<SharedPrompt>(shape_, std::move(cache));
    exact_ = std::make_unique<ExactAttention>(shape_, prompt_.get(), kContenders, kSteps);
  }

  std::vector<uint16_t> Bits(size_t count) {
    std::vector<uint16_t> bits(count);
    for (uint16_t& number : bits) number = Bfloat16FromFloat(normal_(random_));
    return bits;
  }
  std::vector<float> Queries() {
    std::vector<float> q(kContenders * kQueryHeads * kHeadDim);
    for (float& number : q) number = normal_(random_);
    return q;
  }

  // Appends random rows to a layer, and remembers them.
  void Append(uint32_t layer) {
    const std::vector<uint16_t> k = Bits(kContenders * kKvHeads * kHeadDim);
    const std::vector<uint16_t> v = Bits(k.size());
    exact_->Append(layer, k.data(), v.data());
    appended_[layer].push_back(k);
    appended_values_[layer].push_back(v);
  }
  static const uint16_t* Row(const std::vector<uint16_t>& rows, size_t contender, uint32_t head) {
    return &rows[(contender * kKvHeads + head) * kHeadDim];
  }

  double Logit(const float* query, uint32_t layer, size_t contender, uint32_t kv_head,
               uint32_t token) const {
    const std::vector<uint16_t>& prompt_keys = prompt_->cache().layers[layer].k;
    const uint16_t* key = token < kPromptTokens
                              ? &prompt_keys[(size_t{kv_head} * kPromptTokens + token) * kHeadDim]
                              : Row(appended_[layer][token - kPromptTokens], contender, kv_head);
    double sum = 0.0;
    for (uint32_t c = 0; c < kHeadDim; ++c) sum += double{query[c]} * FloatFromBfloat16(key[c]);
    return kScale * sum;
  }
  void ExpectLogits(const std::vector<float>& q, uint32_t layer, size_t contender) const {
    const absl::Span<const float> logits = exact_->logits(contender);
    const uint32_t length = exact_->length();
    ASSERT_EQ(logits.size(), size_t{kQueryHeads} * length);
    for (uint32_t head = 0; head < kQueryHeads; ++head) {
      const float* query = &q[(contender * kQueryHeads + head) * kHeadDim];
      for (uint32_t token = 0; token < length; ++token) {
        ASSERT_NEAR(logits[head * length + token],
                    Logit(query, layer, contender, head / kGroup, token), kTolerance)
            << contender << " " << head << " " << token;
      }
    }
  }

  const DecoderShape shape_ = Shape();
  std::mt19937 random_{11};
  std::normal_distribution<float> normal_;
  std::unique_ptr<SharedPrompt> prompt_;
  std::unique_ptr<ExactAttention> exact_;
  // [layer][step], rows of all contenders.
  std::vector<std::vector<uint16_t>> appended_[kLayers], appended_values_[kLayers];
};

TEST_F(ExactAttentionTest, PromptAndTailAreScored) {
  for (uint32_t step = 0; step < kSteps; ++step) {
    for (const uint32_t layer : {2U, kLayer}) {
      Append(layer);
      EXPECT_EQ(exact_->length(), kPromptTokens + step + 1);
      const std::vector<float> q = Queries();
      exact_->Score(layer, q.data(), {0, 1, 2, 3});
      for (size_t contender = 0; contender < kContenders; ++contender) {
        ExpectLogits(q, layer, contender);
      }
    }
  }
}

TEST_F(ExactAttentionTest, OnlyThoseAskedForAreScored) {
  Append(kLayer);
  const std::vector<float> q = Queries();
  exact_->Score(kLayer, q.data(), {1, 3});
  EXPECT_TRUE(exact_->logits(0).empty());
  ExpectLogits(q, kLayer, 1);
  EXPECT_TRUE(exact_->logits(2).empty());
  ExpectLogits(q, kLayer, 3);
  exact_->Score(kLayer, q.data(), {2});
  EXPECT_TRUE(exact_->logits(1).empty());
  ExpectLogits(q, kLayer, 2);
  exact_->Score(kLayer, q.data(), {});
  EXPECT_TRUE(exact_->logits(2).empty());
  // Scores of the step before are no scores.
  exact_->Score(kLayer, q.data(), {0});
  Append(kLayer);
  EXPECT_TRUE(exact_->logits(0).empty());
}

TEST_F(ExactAttentionTest, TailsAreEachContendersOwn) {
  for (uint32_t step = 0; step < 3; ++step) Append(kLayer);
  for (size_t contender = 0; contender < kContenders; ++contender) {
    for (uint32_t head = 0; head < kKvHeads; ++head) {
      const Tail tail = exact_->tail(kLayer, contender, head);
      ASSERT_EQ(tail.count, 3U);
      EXPECT_EQ(exact_->tail(2, contender, head).count, 0U);
      for (uint32_t step = 0; step < 3; ++step) {
        const uint16_t* key = Row(appended_[kLayer][step], contender, head);
        const uint16_t* value = Row(appended_values_[kLayer][step], contender, head);
        for (uint32_t c = 0; c < kHeadDim; ++c) {
          EXPECT_EQ(tail.keys[step * kHeadDim + c], FloatFromBfloat16(key[c]));
          EXPECT_EQ(tail.values[step * kHeadDim + c], FloatFromBfloat16(value[c]));
        }
      }
    }
  }
}

// Appended keys count too, whoever's they are.
TEST_F(ExactAttentionTest, NoKeyIsLongerThanTheLargestNorm) {
  const auto norm = [](const auto& key) {
    long double squares = 0.0L;
    for (uint32_t c = 0; c < kHeadDim; ++c) {
      const long double number = key(c);
      squares += number * number;
    }
    return static_cast<double>(std::sqrt(squares));
  };
  double largest[kKvHeads] = {};
  for (uint32_t head = 0; head < kKvHeads; ++head) {
    for (uint32_t token = 0; token < kPromptTokens; ++token) {
      const float* key = prompt_->keys(kLayer, head) + size_t{token} * kHeadDim;
      largest[head] = std::max(largest[head], norm([&](uint32_t c) { return key[c]; }));
    }
    EXPECT_GE(exact_->key_norm_max(kLayer, head), largest[head]);
    EXPECT_LE(exact_->key_norm_max(kLayer, head), largest[head] * (1.0 + 1e-5));
  }
  std::vector<uint16_t> k = Bits(kContenders * kKvHeads * kHeadDim);
  const std::vector<uint16_t> v = Bits(k.size());
  // The last contender's key of the last head.
  k.back() = Bfloat16FromFloat(100.0F);
  exact_->Append(kLayer, k.data(), v.data());
  EXPECT_GE(exact_->key_norm_max(kLayer, kKvHeads - 1), 100.0);
  EXPECT_LE(exact_->key_norm_max(kLayer, kKvHeads - 1), 101.0);
  EXPECT_LT(exact_->key_norm_max(kLayer - 1, kKvHeads - 1), 100.0);
}

}  // namespace
}  // namespace kvservice::eval
