#include "tests/kvservice/words.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>

#include "attention/float16.h"

namespace kvservice::testing {
namespace {

// splitmix64: one well-mixed number per counter.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// In [-2, 2), a multiple of 2^-22.
float Element(Part part, uint32_t layer, uint32_t word, size_t index) {
  const uint64_t stream = Mix(Mix(word) ^ (uint64_t{layer} << 8 | static_cast<uint64_t>(part)));
  return static_cast<float>(static_cast<int32_t>(Mix(stream + index) >> 40) - (1 << 23)) * 0x1p-22F;
}

}  // namespace

Words Counting(uint32_t first, uint32_t count) {
  Words words(count);
  std::iota(words.begin(), words.end(), first);
  return words;
}

std::vector<std::byte> PartBytes(const KvLayout& layout, DType dtype, Part part, uint32_t layer,
                                 absl::Span<const uint32_t> words) {
  const size_t heads = part == Part::kQuery ? layout.query_head_count : layout.kv_head_count;
  const size_t word_elements = heads * layout.head_dim;
  std::vector<std::byte> bytes(words.size() * word_elements * ElementBytes(dtype));
  for (size_t w = 0; w < words.size(); ++w) {
    for (size_t i = 0; i < word_elements; ++i) {
      StoreElement(dtype, Element(part, layer, words[w], i), bytes.data(), w * word_elements + i);
    }
  }
  return bytes;
}

DenseAnswer AttendDensely(const LayerShape& shape, uint32_t layer, absl::Span<const uint32_t> words,
                          uint32_t position) {
  const KvLayout& layout = shape.layout;
  assert(position < words.size());
  const std::vector<std::byte> q =
      PartBytes(layout, DType::kFloat32, Part::kQuery, layer, words.subspan(position, 1));
  const absl::Span<const uint32_t> past = words.first(position + 1);
  const std::vector<std::byte> k = PartBytes(layout, layout.dtype, Part::kKey, layer, past);
  const std::vector<std::byte> v = PartBytes(layout, layout.dtype, Part::kValue, layer, past);
  const uint32_t dim = layout.head_dim;
  const uint32_t window = shape.sliding_window;
  const uint32_t begin = window == 0 || window > position ? 0 : position + 1 - window;

  DenseAnswer answer;
  answer.out.assign(size_t{layout.query_head_count} * dim, 0.0);
  for (uint32_t head = 0; head < layout.query_head_count; ++head) {
    const uint32_t kv_head = head / layout.group_size();
    std::vector<double> logits(position + 1, -INFINITY);
    for (uint32_t token = begin; token <= position; ++token) {
      double dot = 0.0;
      for (uint32_t c = 0; c < dim; ++c) {
        dot +=
            static_cast<double>(LoadElement(DType::kFloat32, q.data(), head * dim + c)) *
            LoadElement(layout.dtype, k.data(), (token * layout.kv_head_count + kv_head) * dim + c);
      }
      dot *= shape.scale;
      const double cap = shape.logit_softcap;
      logits[token] = cap > 0.0 ? cap * std::tanh(dot / cap) : dot;
    }
    const double top = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (const double logit : logits) sum += std::exp(logit - top);
    for (uint32_t token = begin; token <= position; ++token) {
      const double weight = std::exp(logits[token] - top) / sum;
      for (uint32_t c = 0; c < dim; ++c) {
        answer.out[head * dim + c] +=
            weight *
            LoadElement(layout.dtype, v.data(), (token * layout.kv_head_count + kv_head) * dim + c);
      }
    }
    answer.lse.push_back(top + std::log(sum));
    answer.logits.push_back(std::move(logits));
  }
  return answer;
}

double NormalizedSquaredError(absl::Span<const float> got, absl::Span<const double> expected) {
  assert(got.size() == expected.size());
  double error = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return error / std::max(norm, 1e-300);
}

}  // namespace kvservice::testing
