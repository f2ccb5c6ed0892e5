#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <thread>

#include "attention/float16.h"
#include "tests/eval/decoder.h"
#include "tests/eval/exp.h"
#include "tests/eval/matrix.h"

namespace kvservice::eval {
namespace {

// Scores of one tile: 4 MiB, which a core's caches hold between the passes over them.
constexpr size_t kTileScores = size_t{1} << 20;
constexpr size_t kTileRowsMin = 16;
// Numbers that a reduction keeps apart: GCC vectorises a loop of so many, and unrolls shorter ones
// instead.
constexpr size_t kLanes = 64;
// Attention sums are integers of this unit: the order in which threads add does not show.
constexpr double kSumUnit = 0x1p-40;

// Calls work(item, thread) for every item below `count`, lowest first, on `thread_count` threads.
void ForEach(uint32_t thread_count, size_t count,
             const std::function<void(size_t item, uint32_t thread)>& work) {
  std::atomic<size_t> next = 0;
  const auto loop = [&](uint32_t thread) {
    for (size_t item = next++; item < count; item = next++) work(item, thread);
  };
  std::vector<std::thread> others;
  for (uint32_t thread = 1; thread < std::min<size_t>(thread_count, count); ++thread) {
    others.emplace_back(loop, thread);
  }
  loop(0);
  for (std::thread& other : others) other.join();
}

float Largest(const float* values, size_t count) {
  std::array<float, kLanes> lanes;
  lanes.fill(values[0]);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const float value = values[i + lane];
      lanes[lane] = lanes[lane] < value ? value : lanes[lane];
    }
  }
  const float largest = *std::max_element(lanes.begin(), lanes.end());
  return std::accumulate(values + i, values + count, largest,
                         [](float a, float b) { return std::max(a, b); });
}

// Replaces values by exp(value - largest) and returns their sum.
float Exponentiate(float* values, size_t count, float largest) {
  for (size_t i = 0; i < count; ++i) values[i] = Exp(values[i] - largest);
  std::array<float, kLanes> lanes = {};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  }
  const float sum = std::accumulate(lanes.begin(), lanes.end(), 0.0F);
  return std::accumulate(values + i, values + count, sum);
}

class Pass {
 public:
  Pass(const Decoder& decoder, absl::Span<const uint32_t> tokens, const PrefillOptions& options)
      : decoder_(decoder),
        shape_(decoder.shape()),
        tokens_(tokens),
        thread_count_(std::max(1U, options.thread_count)),
        chunk_(std::max(1U, options.chunk_tokens)),
        query_channels_(size_t{shape_.query_head_count} * shape_.head_dim),
        hidden_(tokens.size() * shape_.hidden),
        q_(tokens.size() * query_channels_),
        attended_(q_.size()),
        k_(tokens.size() * shape_.kv_head_count * shape_.head_dim),
        v_(k_.size()),
        positions_(tokens.size()),
        scratch_(thread_count_) {
    std::iota(positions_.begin(), positions_.end(), 0U);
    decoder_.Embed(tokens, hidden_.data());
  }

  PromptLayer Layer(uint32_t layer, uint32_t query_count) {
    PromptLayer result;
    result.k.resize(k_.size());
    result.v.resize(v_.size());
    const size_t chunk_count = (tokens_.size() + chunk_ - 1) / chunk_;
    ForEach(thread_count_, chunk_count,
            [&](size_t chunk, uint32_t) { Project(layer, chunk * chunk_, &result); });
    result.queries.assign(q_.end() - static_cast<ptrdiff_t>(query_count * query_channels_),
                          q_.end());
    Attend(layer, &result);
    ForEach(thread_count_, chunk_count, [&](size_t chunk, uint32_t) {
      const size_t first = chunk * chunk_;
      decoder_.Finish(layer, std::min(chunk_, tokens_.size() - first),
                      &attended_[first * query_channels_], &hidden_[first * shape_.hidden]);
    });
    return result;
  }

  std::vector<float> LastLogits() const {
    std::vector<float> logits(shape_.vocabulary);
    decoder_.Logits(1, &hidden_[hidden_.size() - shape_.hidden], logits.data());
    return logits;
  }

 private:
  struct Scratch {
    std::vector<float> scores;   // [rows][keys]
    std::vector<float> columns;  // [keys]
    std::vector<int64_t> sums;   // [query_head][token], in units of kSumUnit
  };

  void Project(uint32_t layer, size_t first, PromptLayer* result) {
    const size_t rows = std::min(chunk_, tokens_.size() - first), dim = shape_.head_dim;
    std::vector<uint16_t> k(rows * shape_.kv_head_count * dim), v(k.size());
    decoder_.Project(layer, absl::MakeConstSpan(positions_).subspan(first, rows),
                     &hidden_[first * shape_.hidden], &q_[first * query_channels_], k.data(),
                     v.data());
    for (size_t row = 0; row < rows; ++row) {
      for (size_t head = 0; head < shape_.kv_head_count; ++head) {
        const size_t from = (row * shape_.kv_head_count + head) * dim;
        const size_t to = (head * tokens_.size() + first + row) * dim;
        std::copy_n(&k[from], dim, &result->k[to]);
        std::copy_n(&v[from], dim, &result->v[to]);
        for (size_t i = 0; i < dim; ++i) {
          k_[to + i] = FloatFromBfloat16(k[from + i]);
          v_[to + i] = FloatFromBfloat16(v[from + i]);
        }
      }
    }
  }

  void Attend(uint32_t layer, PromptLayer* result) {
    const size_t count = tokens_.size();
    const size_t window = shape_.windows[layer] == 0 ? count : shape_.windows[layer];
    const size_t rows = std::clamp(kTileScores / std::min(count, window + chunk_),
                                   std::min(kTileRowsMin, chunk_), chunk_);
    const size_t tile_count = (count + rows - 1) / rows;
    for (Scratch& scratch : scratch_) scratch.sums.assign(shape_.query_head_count * count, 0);
    // Late tiles are the long ones: they come first, so that threads end at about the same time.
    ForEach(thread_count_, tile_count * shape_.query_head_count, [&](size_t item, uint32_t thread) {
      const size_t tile = tile_count - 1 - item / shape_.query_head_count;
      const size_t first = tile * rows;
      AttendTile(item % shape_.query_head_count, first, std::min(rows, count - first), window,
                 &scratch_[thread]);
    });
    result->attention_sum.resize(shape_.query_head_count * count);
    for (size_t i = 0; i < result->attention_sum.size(); ++i) {
      int64_t sum = 0;
      for (const Scratch& scratch : scratch_) sum += scratch.sums[i];
      result->attention_sum[i] = static_cast<float>(static_cast<double>(sum) * kSumUnit);
    }
  }

  // Attention of the queries first .. first + rows - 1 of one head over the last `window` tokens of
  // each.
  void AttendTile(size_t query_head, size_t first, size_t rows, size_t window, Scratch* scratch) {
    const size_t dim = shape_.head_dim;
    const size_t kv_head = query_head / (shape_.query_head_count / shape_.kv_head_count);
    const size_t begin = first + 1 > window ? first + 1 - window : 0;
    const size_t keys = first + rows - begin;
    const size_t kv_offset = (kv_head * tokens_.size() + begin) * dim;
    const size_t q_offset = first * query_channels_ + query_head * dim;
    if (scratch->scores.size() < rows * keys) scratch->scores.resize(rows * keys);
    scratch->columns.assign(keys, 0.0F);
    float* scores = scratch->scores.data();
    ScoreKeys(rows, keys, dim, shape_.scale, &q_[q_offset], query_channels_, &k_[kv_offset],
              scores);
    for (size_t row = 0; row < rows; ++row) {
      float* values = scores + row * keys;
      const size_t end = first + row + 1 - begin;
      const size_t start = end > window ? end - window : 0;
      std::fill(values, values + start, 0.0F);
      std::fill(values + end, values + keys, 0.0F);
      const float largest = Largest(values + start, end - start);
      const float factor = 1.0F / Exponentiate(values + start, end - start, largest);
      for (size_t i = start; i < end; ++i) {
        values[i] *= factor;
        scratch->columns[i] += values[i];
      }
    }
    MixValues(rows, keys, dim, scores, &v_[kv_offset], &attended_[q_offset], query_channels_);
    int64_t* sums = &scratch->sums[query_head * tokens_.size() + begin];
    for (size_t i = 0; i < keys; ++i) {
      sums[i] += std::llround(static_cast<double>(scratch->columns[i]) / kSumUnit);
    }
  }

  const Decoder& decoder_;
  const DecoderShape& shape_;
  const absl::Span<const uint32_t> tokens_;
  const uint32_t thread_count_;
  const size_t chunk_;
  const size_t query_channels_;
  // Of the layer at hand; [token] first, except k_ and v_: [kv_head][token][head_dim].
  std::vector<float> hidden_, q_, attended_, k_, v_;
  std::vector<uint32_t> positions_;
  std::vector<Scratch> scratch_;  // one per thread
};

}  // namespace

PromptCache Prefill(const Decoder& decoder, absl::Span<const uint32_t> tokens,
                    const PrefillOptions& options) {
  assert(!tokens.empty());
  PromptCache prompt;
  prompt.tokens.assign(tokens.begin(), tokens.end());
  prompt.query_count = static_cast<uint32_t>(std::min<size_t>(options.query_count, tokens.size()));
  Pass pass(decoder, tokens, options);
  for (uint32_t layer = 0; layer < decoder.shape().layer_count; ++layer) {
    prompt.layers.push_back(pass.Layer(layer, prompt.query_count));
  }
  prompt.last_logits = pass.LastLogits();
  return prompt;
}

}  // namespace kvservice::eval
