// The decoder against plain loops in double, on tiny random models of both families.

#include "tests/eval/decoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "attention/float16.h"
#include "tests/eval/exp.h"
#include "tests/eval/tiny_model.h"

namespace kvservice::eval {
namespace {

using ::testing::HasSubstr;

constexpr uint32_t kLayers = 3, kQueryHeads = 4, kKvHeads = 2, kHeadDim = 6, kHidden = 10,
                   kForward = 14, kVocabulary = 23, kWindow = 5;
constexpr float kScale = 0.4F, kEpsilon = 1e-3F;
constexpr uint32_t kQueryWidth = kQueryHeads * kHeadDim, kKvWidth = kKvHeads * kHeadDim;

using Row = std::vector<double>;

// Float32 against double, through three layers.
constexpr double kTolerance = 2e-5;
// More than one tile, window and vector of anything that goes by tiles, windows or vectors.
constexpr uint32_t kTokenCount = 150;

std::vector<uint32_t> RandomTokens() {
  std::mt19937 random(5);
  std::vector<uint32_t> tokens(kTokenCount);
  for (uint32_t& token : tokens) token = random() % kVocabulary;
  return tokens;
}

uint32_t WindowOf(Family family, uint32_t layer) {
  return family == Family::kGemma3 && layer != 1 ? kWindow : 0;
}

float FrequencyOf(uint32_t layer, uint32_t pair) {
  return std::pow(layer == 1 ? 50.0F : 7.0F, -2.0F * static_cast<float>(pair) / kHeadDim);
}

DecoderShape ShapeOf(Family family) {
  DecoderShape shape = {.family = family,
                        .layer_count = kLayers,
                        .query_head_count = kQueryHeads,
                        .kv_head_count = kKvHeads,
                        .head_dim = kHeadDim,
                        .hidden = kHidden,
                        .feed_forward = kForward,
                        .vocabulary = kVocabulary,
                        .scale = kScale,
                        .norm_epsilon = kEpsilon};
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    shape.windows.push_back(WindowOf(family, layer));
    shape.inverse_frequencies.emplace_back();
    for (uint32_t pair = 0; pair < kHeadDim / 2; ++pair) {
      shape.inverse_frequencies.back().push_back(FrequencyOf(layer, pair));
    }
  }
  return shape;
}

// ---- The plain loops: all tokens at once, no cache
// -----------------------------------------------

Row Times(const Row& matrix, const Row& x) {
  Row out(matrix.size() / x.size());
  for (size_t i = 0; i < matrix.size(); ++i) out[i / x.size()] += matrix[i] * x[i % x.size()];
  return out;
}

Row Normed(const Row& x, const Row& weight) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  Row out = x;
  for (size_t i = 0; i < x.size(); ++i) {
    out[i] *= weight[i] / std::sqrt(squares / static_cast<double>(x.size()) + kEpsilon);
  }
  return out;
}

Row Part(const Row& row, size_t first, size_t count) {
  return {row.begin() + static_cast<ptrdiff_t>(first),
          row.begin() + static_cast<ptrdiff_t>(first + count)};
}

Row Rotated(const Row& head, uint32_t layer, uint32_t position) {
  Row out = head;
  for (uint32_t i = 0; i < kHeadDim / 2; ++i) {
    const double angle = double{FrequencyOf(layer, i)} * position;
    const double a = head[i], b = head[i + kHeadDim / 2];
    out[i] = a * std::cos(angle) - b * std::sin(angle);
    out[i + kHeadDim / 2] = b * std::cos(angle) + a * std::sin(angle);
  }
  return out;
}

// Heads of every token of a layer.
struct Seen {
  std::vector<std::vector<Row>> q, k, v;  // [token][head]
};

// What the decoder stored for `exact` must be a bf16 number next to it; which of two is a matter of
// float32 rounding when it is about half way.
void ExpectRounded(const Row& exact, const Row& stored) {
  for (size_t i = 0; i < exact.size(); ++i) {
    EXPECT_NEAR(stored[i], exact[i], std::abs(exact[i]) * 0x1p-8 + kTolerance);
    const auto bits = static_cast<float>(stored[i]);
    EXPECT_EQ(FloatFromBfloat16(Bfloat16FromFloat(bits)), bits);
  }
}

// The queries of all tokens; K and V are checked against `cached` and taken from there, so that a
// number which float32 rounds the other way is not an error of all that follows.
Seen ProjectAll(const TinyModel& model, uint32_t layer, const std::vector<Row>& hidden,
                const Seen& cached) {
  const std::string name = std::to_string(layer);
  Seen seen = {.q = {}, .k = cached.k, .v = cached.v};
  for (uint32_t token = 0; token < hidden.size(); ++token) {
    const Row qkv =
        Times(model["qkv" + name], Normed(hidden[token], model["attention_norm" + name]));
    std::vector<Row> heads;
    for (uint32_t head = 0; head < kQueryHeads + 2 * kKvHeads; ++head) {
      Row channels = Part(qkv, size_t{head} * kHeadDim, kHeadDim);
      if (head < kQueryHeads + kKvHeads) {
        const std::string norm = (head < kQueryHeads ? "q_norm" : "k_norm") + name;
        if (model.family() == Family::kGemma3) channels = Normed(channels, model[norm]);
        channels = Rotated(channels, layer, token);
      }
      heads.push_back(channels);
    }
    for (uint32_t head = 0; head < kKvHeads; ++head) {
      ExpectRounded(heads[kQueryHeads + head], cached.k[token][head]);
      ExpectRounded(heads[kQueryHeads + kKvHeads + head], cached.v[token][head]);
    }
    heads.resize(kQueryHeads);
    seen.q.push_back(heads);
  }
  return seen;
}

// Attention of one token, all heads; adds its weights to sums [query_head][token].
Row AttendOne(const Seen& seen, uint32_t window, uint32_t token, std::vector<Row>* sums) {
  Row out;
  const uint32_t first = window != 0 && token + 1 > window ? token + 1 - window : 0;
  for (uint32_t head = 0; head < kQueryHeads; ++head) {
    const uint32_t kv_head = head / (kQueryHeads / kKvHeads);
    Row weights;
    double total = 0;
    for (uint32_t key = first; key <= token; ++key) {
      double score = 0;
      for (uint32_t i = 0; i < kHeadDim; ++i) {
        score += seen.q[token][head][i] * seen.k[key][kv_head][i];
      }
      total += weights.emplace_back(std::exp(kScale * score));
    }
    Row mixed(kHeadDim);
    for (uint32_t key = first; key <= token; ++key) {
      const double weight = weights[key - first] / total;
      (*sums)[head][key] += weight;
      for (uint32_t i = 0; i < kHeadDim; ++i) mixed[i] += weight * seen.v[key][kv_head][i];
    }
    out.insert(out.end(), mixed.begin(), mixed.end());
  }
  return out;
}

void Add(const TinyModel& model, const std::string& norm, const Row& part, Row* hidden) {
  const Row added = model.family() == Family::kGemma3 ? Normed(part, model[norm]) : part;
  for (size_t i = 0; i < added.size(); ++i) (*hidden)[i] += added[i];
}

double Activated(Family family, double x) {
  if (family == Family::kLlama) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

void FinishOne(const TinyModel& model, uint32_t layer, const Row& attention, Row* hidden) {
  const std::string name = std::to_string(layer);
  Add(model, "post_attention" + name, Times(model["output" + name], attention), hidden);
  const Row gate_up =
      Times(model["gate_up" + name], Normed(*hidden, model["feed_forward_norm" + name]));
  Row inner(kForward);
  for (uint32_t i = 0; i < kForward; ++i) {
    inner[i] = Activated(model.family(), gate_up[i]) * gate_up[kForward + i];
  }
  Add(model, "post_feed_forward" + name, Times(model["down" + name], inner), hidden);
}

struct Truth {
  std::vector<Seen> layers;
  std::vector<std::vector<Row>> sums;  // [layer][query_head][token]
  std::vector<Row> logits;             // [token]
};

// `cached`: the K and V of every layer that the decoder left.
Truth RunPlainly(const TinyModel& model, absl::Span<const uint32_t> tokens,
                 const std::vector<Seen>& cached) {
  Truth truth;
  std::vector<Row> hidden;
  const double factor = model.family() == Family::kGemma3 ? std::sqrt(double{kHidden}) : 1.0;
  for (const uint32_t token : tokens) {
    hidden.push_back(Part(model["embedding"], size_t{token} * kHidden, kHidden));
    for (double& value : hidden.back()) value *= factor;
  }
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    truth.layers.push_back(ProjectAll(model, layer, hidden, cached[layer]));
    truth.sums.emplace_back(kQueryHeads, Row(tokens.size()));
    for (uint32_t token = 0; token < tokens.size(); ++token) {
      const Row attention = AttendOne(truth.layers.back(), WindowOf(model.family(), layer), token,
                                      &truth.sums.back());
      FinishOne(model, layer, attention, &hidden[token]);
    }
  }
  for (const Row& row : hidden) {
    truth.logits.push_back(Times(model["embedding"], Normed(row, model["output_norm"])));
  }
  return truth;
}

// ---- The decoder, row by row
// ---------------------------------------------------------------------

std::vector<Row> Heads(const uint16_t* bits) {
  std::vector<Row> heads(kKvHeads, Row(kHeadDim));
  for (uint32_t i = 0; i < kKvWidth; ++i) {
    heads[i / kHeadDim][i % kHeadDim] = FloatFromBfloat16(bits[i]);
  }
  return heads;
}

// Logits after every token, from single steps with plain attention over the decoder's own rows,
// which are left in `layers`.
std::vector<std::vector<float>> RunInSteps(const Decoder& decoder,
                                           const std::vector<uint32_t>& tokens,
                                           std::vector<Seen>* layers) {
  layers->assign(kLayers, {});
  std::vector<std::vector<float>> all_logits;
  for (uint32_t position = 0; position < tokens.size(); ++position) {
    std::vector<float> hidden(kHidden), q(kQueryWidth), attention(kQueryWidth);
    std::vector<uint16_t> k(kKvWidth), v(kKvWidth);
    decoder.Embed({tokens[position]}, hidden.data());
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      decoder.Project(layer, {position}, hidden.data(), q.data(), k.data(), v.data());
      Seen& seen = (*layers)[layer];
      seen.q.emplace_back(kQueryHeads, Row(kHeadDim));
      for (uint32_t i = 0; i < kQueryWidth; ++i) seen.q.back()[i / kHeadDim][i % kHeadDim] = q[i];
      seen.k.push_back(Heads(k.data()));
      seen.v.push_back(Heads(v.data()));
      std::vector<Row> sums(kQueryHeads, Row(tokens.size()));
      const Row out = AttendOne(seen, decoder.shape().windows[layer], position, &sums);
      std::transform(out.begin(), out.end(), attention.begin(),
                     [](double value) { return static_cast<float>(value); });
      decoder.Finish(layer, 1, attention.data(), hidden.data());
    }
    all_logits.emplace_back(kVocabulary);
    decoder.Logits(1, hidden.data(), all_logits.back().data());
  }
  return all_logits;
}

// K and V of a prompt by token and head.
std::vector<Seen> CachedIn(const PromptCache& prompt) {
  const size_t count = prompt.tokens.size();
  std::vector<Seen> layers(kLayers);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (size_t token = 0; token < count; ++token) {
      std::vector<uint16_t> k, v;
      for (size_t head = 0; head < kKvHeads; ++head) {
        const size_t first = (head * count + token) * kHeadDim;
        const PromptLayer& from = prompt.layers[layer];
        k.insert(k.end(), &from.k[first], &from.k[first] + kHeadDim);
        v.insert(v.end(), &from.v[first], &from.v[first] + kHeadDim);
      }
      layers[layer].k.push_back(Heads(k.data()));
      layers[layer].v.push_back(Heads(v.data()));
    }
  }
  return layers;
}

const std::vector<uint32_t> kTokens = RandomTokens();

class DecoderTest : public ::testing::TestWithParam<Family> {
 protected:
  DecoderTest() : model_(ShapeOf(GetParam())) {
    auto decoder = Decoder::Load(model_.Write(::testing::TempDir(), Name()));
    EXPECT_TRUE(decoder.ok()) << decoder.status();
    decoder_ = std::move(*decoder);
  }

  static std::string Name() { return GetParam() == Family::kLlama ? "llama" : "gemma3"; }

  PromptCache Prefilled(size_t count, uint32_t chunk_tokens, uint32_t thread_count) const {
    return Prefill(*decoder_, absl::MakeConstSpan(kTokens).first(count),
                   {.thread_count = thread_count, .chunk_tokens = chunk_tokens, .query_count = 7});
  }

  TinyModel model_;
  std::unique_ptr<Decoder> decoder_;
};

INSTANTIATE_TEST_SUITE_P(Families, DecoderTest, ::testing::Values(Family::kLlama, Family::kGemma3),
                         [](const auto& model) {
                           return model.param == Family::kLlama ? "Llama" : "Gemma3";
                         });

TEST_P(DecoderTest, ShapeIsThatOfTheFile) {
  const DecoderShape& shape = decoder_->shape();
  EXPECT_EQ(shape.name, Name());
  EXPECT_EQ(shape.family, GetParam());
  EXPECT_EQ(shape.layer_count, kLayers);
  EXPECT_EQ(shape.vocabulary, kVocabulary);
  EXPECT_EQ(shape.scale, kScale);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    EXPECT_EQ(shape.windows[layer], WindowOf(GetParam(), layer));
    EXPECT_EQ(shape.inverse_frequencies[layer][2], FrequencyOf(layer, 2));
  }
}

TEST_P(DecoderTest, StepsGiveTheLogitsOfThePlainLoops) {
  std::vector<Seen> cached;
  const auto logits = RunInSteps(*decoder_, kTokens, &cached);
  const Truth truth = RunPlainly(model_, kTokens, cached);
  for (size_t token = 0; token < kTokenCount; ++token) {
    for (size_t i = 0; i < kVocabulary; ++i) {
      ASSERT_NEAR(logits[token][i], truth.logits[token][i], kTolerance) << token << " " << i;
    }
  }
}

TEST_P(DecoderTest, PrefillGivesTheLogitsOfThePlainLoops) {
  for (const size_t count : {1, 2, 4, 5, 6, 17, 63, 64, 65, 149}) {
    const PromptCache prompt = Prefilled(count, 32, 2);
    const auto tokens = absl::MakeConstSpan(kTokens).first(count);
    const Truth truth = RunPlainly(model_, tokens, CachedIn(prompt));
    for (size_t i = 0; i < kVocabulary; ++i) {
      ASSERT_NEAR(prompt.last_logits[i], truth.logits.back()[i], kTolerance) << count;
    }
  }
}

TEST_P(DecoderTest, PrefillLeavesWhatTheModelSaw) {
  const PromptCache prompt = Prefilled(kTokenCount, 5, 2);
  const Truth truth = RunPlainly(model_, kTokens, CachedIn(prompt));
  ASSERT_EQ(prompt.query_count, 7U);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const PromptLayer& found = prompt.layers[layer];
    for (size_t head = 0; head < kQueryHeads; ++head) {
      for (size_t token = 0; token < kTokenCount; ++token) {
        ASSERT_NEAR(found.attention_sum[head * kTokenCount + token], truth.sums[layer][head][token],
                    kTolerance);
      }
    }
    ASSERT_EQ(found.queries.size(), 7 * kQueryWidth);
    for (size_t i = 0; i < found.queries.size(); ++i) {
      const size_t token = kTokenCount - 7 + i / kQueryWidth;
      const Row& head = truth.layers[layer].q[token][i % kQueryWidth / kHeadDim];
      ASSERT_NEAR(found.queries[i], head[i % kHeadDim], kTolerance);
    }
  }
}

TEST_P(DecoderTest, ThreadsChangeNothing) {
  const PromptCache one = Prefilled(kTokenCount, 3, 1);
  const PromptCache four = Prefilled(kTokenCount, 3, 4);
  EXPECT_EQ(one.last_logits, four.last_logits);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    EXPECT_EQ(one.layers[layer].k, four.layers[layer].k);
    EXPECT_EQ(one.layers[layer].v, four.layers[layer].v);
    EXPECT_EQ(one.layers[layer].queries, four.layers[layer].queries);
    EXPECT_EQ(one.layers[layer].attention_sum, four.layers[layer].attention_sum);
  }
}

// Rows of several sequences in one call, at positions of their own.
TEST_P(DecoderTest, RowsDoNotSeeEachOther) {
  const std::vector<uint32_t> tokens = {3, 17, 9}, positions = {40, 0, 7};
  std::vector<float> hidden(3 * kHidden), q(3 * kQueryWidth), logits(3 * kVocabulary);
  std::vector<uint16_t> k(3 * kKvWidth), v(3 * kKvWidth);
  decoder_->Embed(tokens, hidden.data());
  decoder_->Project(1, positions, hidden.data(), q.data(), k.data(), v.data());
  decoder_->Finish(1, 3, q.data(), hidden.data());
  decoder_->Logits(3, hidden.data(), logits.data());
  for (size_t row = 0; row < 3; ++row) {
    std::vector<float> one_hidden(kHidden), one_q(kQueryWidth), one_logits(kVocabulary);
    std::vector<uint16_t> one_k(kKvWidth), one_v(kKvWidth);
    decoder_->Embed({tokens[row]}, one_hidden.data());
    decoder_->Project(1, {positions[row]}, one_hidden.data(), one_q.data(), one_k.data(),
                      one_v.data());
    decoder_->Finish(1, 1, one_q.data(), one_hidden.data());
    decoder_->Logits(1, one_hidden.data(), one_logits.data());
    for (size_t i = 0; i < kKvWidth; ++i) {
      // Bits count up from one number to the next: at most one apart.
      EXPECT_NEAR(k[row * kKvWidth + i], one_k[i], 1);
      EXPECT_NEAR(v[row * kKvWidth + i], one_v[i], 1);
    }
    for (size_t i = 0; i < kQueryWidth; ++i) {
      EXPECT_NEAR(q[row * kQueryWidth + i], one_q[i], kTolerance);
    }
    for (size_t i = 0; i < kVocabulary; ++i) {
      EXPECT_NEAR(logits[row * kVocabulary + i], one_logits[i], kTolerance);
    }
  }
}

TEST_P(DecoderTest, PromptCacheComesBackFromItsFile) {
  const PromptCache prompt = Prefilled(kTokenCount, 5, 1);
  const std::string path = ::testing::TempDir() + Name() + ".kvprompt";
  ASSERT_TRUE(WritePromptCache(*decoder_, prompt, path).ok());
  const auto read = ReadPromptCache(*decoder_, kTokens, path);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->tokens, prompt.tokens);
  EXPECT_EQ(read->query_count, prompt.query_count);
  EXPECT_EQ(read->last_logits, prompt.last_logits);
  ASSERT_EQ(read->layers.size(), kLayers);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    EXPECT_EQ(read->layers[layer].k, prompt.layers[layer].k);
    EXPECT_EQ(read->layers[layer].v, prompt.layers[layer].v);
    EXPECT_EQ(read->layers[layer].queries, prompt.layers[layer].queries);
    EXPECT_EQ(read->layers[layer].attention_sum, prompt.layers[layer].attention_sum);
  }
}

TEST_P(DecoderTest, PromptCacheOfOthersIsNotFound) {
  const std::string path = ::testing::TempDir() + Name() + "-others.kvprompt";
  ASSERT_TRUE(WritePromptCache(*decoder_, Prefilled(kTokenCount, 5, 1), path).ok());
  std::vector<uint32_t> tokens = kTokens;
  tokens[2] ^= 1U;
  EXPECT_TRUE(absl::IsNotFound(ReadPromptCache(*decoder_, tokens, path).status()));
  tokens.pop_back();
  EXPECT_TRUE(absl::IsNotFound(ReadPromptCache(*decoder_, tokens, path).status()));
  EXPECT_TRUE(absl::IsNotFound(ReadPromptCache(*decoder_, kTokens, path + "-none").status()));
  model_.bytes().back() ^= 1;  // One bit of one weight.
  const auto other = Decoder::Load(model_.Write(::testing::TempDir(), Name() + "-other"));
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_TRUE(absl::IsNotFound(ReadPromptCache(**other, kTokens, path).status()));
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  EXPECT_TRUE(absl::IsNotFound(ReadPromptCache(*decoder_, kTokens, path).status()));
}

// ---- Files that cannot be
// ------------------------------------------------------------------------

absl::Status LoadStatus(const std::string& bytes) {
  const std::string path = ::testing::TempDir() + "damaged.kvmodel";
  std::ofstream(path, std::ios::binary) << bytes;
  return Decoder::Load(path).status();
}

TEST(ModelFileTest, DamageIsNamed) {
  EXPECT_TRUE(absl::IsNotFound(Decoder::Load(::testing::TempDir() + "no-such-file").status()));
  const std::string good = TinyModel(ShapeOf(Family::kLlama)).bytes();
  const auto with = [&](size_t offset, uint32_t value) {
    std::string bytes = good;
    std::memcpy(&bytes[offset], &value, sizeof(value));
    return LoadStatus(bytes);
  };
  EXPECT_TRUE(LoadStatus(good).ok());
  EXPECT_THAT(LoadStatus(good.substr(0, 20)).message(), HasSubstr("too short"));
  EXPECT_THAT(LoadStatus(good.substr(0, good.size() - 2)).message(), HasSubstr("header says"));
  EXPECT_THAT(LoadStatus(good + "x").message(), HasSubstr("header says"));
  EXPECT_THAT(with(0, 0).message(), HasSubstr("magic"));
  EXPECT_THAT(with(8, 2).message(), HasSubstr("family"));
  EXPECT_THAT(with(12, 0).message(), HasSubstr("layers"));
  EXPECT_THAT(with(16, 3).message(), HasSubstr("query heads"));
  EXPECT_THAT(with(36, 0xffffffffU).message(), HasSubstr("count"));
  EXPECT_THAT(with(40, 0).message(), HasSubstr("scale"));
  EXPECT_THAT(with(good.size() - 4, 0x7c007c00U).message(), HasSubstr("finite"));
}

TEST(ExpTest, IsWithinTwoUnitsInTheLastPlace) {
  for (int i = -870'000; i <= 870'000; ++i) {
    const float x = static_cast<float>(i) * 1e-4F;
    const double exact = std::exp(double{x});
    const auto nearest = static_cast<float>(exact);
    const double unit = std::nextafter(nearest, std::numeric_limits<float>::infinity()) - nearest;
    ASSERT_LE(std::abs(Exp(x) - exact), 2 * unit) << x;
  }
  EXPECT_EQ(Exp(0.0F), 1.0F);
  EXPECT_EQ(Exp(-1e30F), Exp(-87.0F));
  EXPECT_EQ(Exp(1e30F), Exp(87.0F));
}

}  // namespace
}  // namespace kvservice::eval
