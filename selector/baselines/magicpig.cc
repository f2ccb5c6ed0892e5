// MagicPIG (Chen et al., "MagicPIG: LSH Sampling for Efficient LLM Generation", ICLR 2025): keys,
// centred by their mean, are hashed into L = 150 tables by the signs of K = 10 random projections;
// a token is a sample of a query that meets it in at least two tables. The published method weights
// samples by the inverse of their probability and reads all of them; only its tokens are compared
// here, at most top_k of them, those that the group's queries met most often (equals: at random),
// which is unfavourable to it.
//
// It estimates no mass, so with a mass_limit it keeps top_k as well. It looks at no token that it
// does not meet: its cost is hashing the query and reading buckets.

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "selector/baselines/baselines.h"
#include "selector/baselines/choose.h"
#include "selector/baselines/estimator.h"
#include "selector/baselines/for_each_index.h"
#include "selector/baselines/random_numbers.h"
#include "selector/baselines/token_tiles.h"

namespace kvservice::baselines {
namespace {

constexpr uint32_t kBits = 10;     // K
constexpr uint32_t kTables = 150;  // L
constexpr uint32_t kBuckets = 1U << kBits;
constexpr uint16_t kMeetingsMin = 2;
// Bytes of a position in a bucket.
constexpr double kEntryBytes = 4.0;

using Code = std::array<uint16_t, kTables>;  // Bucket in every table.

// The random planes of all tables: [kTables * kBits] "tokens" of head_dim channels.
class Planes {
 public:
  Planes(uint32_t channels, uint64_t seed) : planes_(channels) {
    RandomNumbers random(seed);
    std::vector<float> plane(channels);
    for (uint32_t i = 0; i < kTables * kBits; ++i) {
      for (float& value : plane) value = static_cast<float>(random.Normal());
      planes_.Append(plane);
    }
  }

  static double flops(uint32_t channels) { return 2.0 * channels * kTables * kBits; }

  // vectors: [count][channels].
  std::vector<Code> Hash(absl::Span<const float> vectors) const {
    const auto count = static_cast<uint32_t>(vectors.size() / planes_.channels());
    constexpr size_t kPlanes = size_t{kTables} * kBits;
    std::vector<float> dots(count * kPlanes);
    planes_.Dot(vectors, count, dots.data(), kPlanes);
    std::vector<Code> codes(count);
    for (uint32_t i = 0; i < count; ++i) {
      const float* dot = dots.data() + i * kPlanes;
      for (uint16_t& bucket : codes[i]) {
        bucket = 0;
        for (uint32_t bit = 0; bit < kBits; ++bit) {
          bucket = static_cast<uint16_t>(bucket * 2U + (*dot++ >= 0.0F ? 1U : 0U));
        }
      }
    }
    return codes;
  }

 private:
  TokenTiles<float> planes_;
};

// The prompt's keys of one head, hashed.
class HeadTables {
 public:
  HeadTables() = default;
  HeadTables(absl::Span<const float> keys, uint32_t channels, const Planes& planes) {
    const auto length = static_cast<uint32_t>(keys.size() / channels);
    SetMean(keys, channels);
    entries_.resize(size_t{kTables} * length);
    begins_.assign(kTables, std::vector<uint32_t>(kBuckets + 1, 0));
    std::vector<Code> codes;
    codes.reserve(length);
    for (uint32_t token = 0; token < length; token += kTileTokens) {
      const uint32_t count = std::min(kTileTokens, length - token);
      const std::vector<Code> hashed =
          planes.Hash(Centred(keys.subspan(size_t{token} * channels, size_t{count} * channels)));
      codes.insert(codes.end(), hashed.begin(), hashed.end());
    }
    for (uint32_t table = 0; table < kTables; ++table) Fill(codes, table);
  }

  // Keys minus the prompt's mean key.
  std::vector<float> Centred(absl::Span<const float> keys) const {
    std::vector<float> centred(keys.begin(), keys.end());
    for (size_t i = 0; i < centred.size(); ++i) centred[i] -= mean_[i % mean_.size()];
    return centred;
  }

  absl::Span<const uint16_t> bucket(uint32_t table, uint16_t code) const {
    const std::vector<uint32_t>& begins = begins_[table];
    return absl::MakeConstSpan(entries_).subspan(begins[code], begins[code + 1] - begins[code]);
  }

 private:
  void SetMean(absl::Span<const float> keys, uint32_t channels) {
    std::vector<double> sums(channels, 0.0);
    for (size_t i = 0; i < keys.size(); ++i) sums[i % channels] += keys[i];
    const size_t count = std::max<size_t>(1, keys.size() / channels);
    for (const double sum : sums) {
      mean_.push_back(static_cast<float>(sum / static_cast<double>(count)));
    }
  }

  // A counting sort of the positions by bucket.
  void Fill(const std::vector<Code>& codes, uint32_t table) {
    std::vector<uint32_t>& begins = begins_[table];
    for (const Code& code : codes) ++begins[code[table] + 1U];
    begins[0] = table * static_cast<uint32_t>(codes.size());
    for (uint32_t b = 0; b < kBuckets; ++b) begins[b + 1] += begins[b];
    std::vector<uint32_t> next(begins.begin(), begins.end() - 1);
    for (size_t token = 0; token < codes.size(); ++token) {
      entries_[next[codes[token][table]]++] = static_cast<uint16_t>(token);
    }
  }

  std::vector<float> mean_;                    // [head_dim]
  std::vector<uint16_t> entries_;              // [kTables][length], by bucket
  std::vector<std::vector<uint32_t>> begins_;  // [kTables][kBuckets + 1], into entries_
};

struct HashedPrompt {
  HashedPrompt(const ModelShape& model_shape, uint32_t prompt_length, uint64_t random_seed)
      : shape(model_shape),
        length(prompt_length),
        seed(random_seed),
        planes(model_shape.head_dim, random_seed),
        heads(size_t{model_shape.layer_count} * model_shape.kv_head_count) {}

  const ModelShape shape;
  const uint32_t length;
  const uint64_t seed;
  const Planes planes;
  std::vector<HeadTables> heads;
};

class MagicPig : public Baseline {
 public:
  MagicPig(const HashedPrompt& prompt, const TokenBudget& budget)
      : shape_(prompt.shape), budget_(budget), prompt_(prompt), tails_(prompt.heads.size()) {}

  Cost Propose(const Step& step, std::vector<std::vector<uint32_t>>* positions) override {
    positions->assign(shape_.kv_head_count, {});
    Cost cost = {.flops = Planes::flops(shape_.head_dim) *
                          (shape_.kv_head_count + shape_.query_head_count)};
    for (uint32_t kv_head = 0; kv_head < shape_.kv_head_count; ++kv_head) {
      const uint32_t head = step.layer * shape_.kv_head_count + kv_head;
      const std::vector<float> key = prompt_.heads[head].Centred(NewKeyOf(step, shape_, kv_head));
      tails_[head].push_back(prompt_.planes.Hash(key)[0]);
      std::vector<uint32_t> meetings(step.length, 0);  // Of samples, over the group.
      for (const Code& code : prompt_.planes.Hash(QueriesOf(step, shape_, kv_head))) {
        cost.bytes += kEntryBytes * Meet(code, head, &meetings);
      }
      Choose(meetings, RandomNumbers({prompt_.seed, head, step.length}), &(*positions)[kv_head]);
    }
    return cost;
  }

 private:
  // Adds the meetings of one query with its samples; returns the number of entries read.
  double Meet(const Code& query, uint32_t head, std::vector<uint32_t>* meetings) const {
    const std::vector<Code>& tail = tails_[head];
    std::vector<uint16_t> counts(meetings->size(), 0);
    for (uint32_t table = 0; table < kTables; ++table) {
      for (const uint16_t token : prompt_.heads[head].bucket(table, query[table])) ++counts[token];
    }
    for (size_t i = 0; i < tail.size(); ++i) {
      uint16_t count = 0;
      for (uint32_t t = 0; t < kTables; ++t) count += tail[i][t] == query[t] ? 1 : 0;
      counts[prompt_.length + i] = count;
    }
    double entries = 0.0;
    for (size_t token = 0; token < counts.size(); ++token) {
      entries += counts[token];
      if (counts[token] >= kMeetingsMin) (*meetings)[token] += counts[token];
    }
    return entries;
  }

  void Choose(const std::vector<uint32_t>& meetings, RandomNumbers random,
              std::vector<uint32_t>* out) const {
    const Middle middle = MiddleOf(budget_, static_cast<uint32_t>(meetings.size()));
    std::vector<uint32_t> samples;
    std::vector<float> weights;
    for (uint32_t token = middle.begin; token < middle.end; ++token) {
      if (meetings[token] == 0) continue;
      samples.push_back(token);
      // A fraction below 1 orders those that were met equally often.
      weights.push_back(static_cast<float>(meetings[token]) +
                        static_cast<float>(random.Below(1U << 12)) * 0x1p-13F);
    }
    KeepLargest(weights, budget_.top_k, 0, out);
    for (uint32_t& token : *out) token = samples[token];
  }

  const ModelShape shape_;
  const TokenBudget budget_;
  const HashedPrompt& prompt_;
  std::vector<std::vector<Code>> tails_;  // [layer_count * kv_head_count], of decoded tokens.
};

class MagicPigIndex : public PromptIndex {
 public:
  explicit MagicPigIndex(const BaselineContext& context)
      : hashed_(context.prompt->shape, context.prompt->length, context.seed) {
    const Prompt& prompt = *context.prompt;
    ForEachIndex(ChoosingHeads(prompt), context.threads, [&](uint32_t head) {
      hashed_.heads[head] =
          HeadTables(prompt.heads[head].keys, prompt.shape.head_dim, hashed_.planes);
    });
  }
  std::unique_ptr<Baseline> NewBaseline(const TokenBudget& budget) const override {
    return std::make_unique<MagicPig>(hashed_, budget);
  }

 private:
  HashedPrompt hashed_;
};

}  // namespace

std::unique_ptr<const PromptIndex> NewMagicPig(const BaselineContext& context) {
  return std::make_unique<MagicPigIndex>(context);
}

}  // namespace kvservice::baselines
