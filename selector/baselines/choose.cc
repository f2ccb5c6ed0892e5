#include "selector/baselines/choose.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <numeric>

namespace kvservice::baselines {
namespace {

// Bits of non-negative floats order like the floats. A bin is an eighth of a binade: of thousands
// of weights few share the bin of the threshold, and only those are compared with each other.
constexpr uint32_t kBinShift = 20;
constexpr uint32_t kBins = 1U << (31 - kBinShift);

uint32_t BinOf(float weight) { return std::bit_cast<uint32_t>(weight) >> kBinShift; }

struct Candidate {
  float weight;
  uint32_t index;
  // Larger weights come first, among equals the earlier token.
  friend bool operator<(const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.index < b.index;
  }
};

std::vector<Candidate> CandidatesOf(absl::Span<const float> weights, uint32_t bin) {
  std::vector<Candidate> candidates;
  for (uint32_t i = 0; i < weights.size(); ++i) {
    if (BinOf(weights[i]) == bin) candidates.push_back({weights[i], i});
  }
  return candidates;
}

// Appends all tokens of bins above `bin`, and those of `bin` that do not come after `last`.
void AppendUpTo(absl::Span<const float> weights, uint32_t bin, const Candidate* last,
                uint32_t first, std::vector<uint32_t>* positions) {
  for (uint32_t i = 0; i < weights.size(); ++i) {
    const uint32_t own = BinOf(weights[i]);
    if (own < bin) continue;
    if (own == bin && (last == nullptr || *last < Candidate{weights[i], i})) continue;
    positions->push_back(first + i);
  }
}

void AppendAll(uint32_t count, uint32_t first, std::vector<uint32_t>* positions) {
  for (uint32_t i = 0; i < count; ++i) positions->push_back(first + i);
}

// Compares bits: loops that compare floats are not vectorised by compilers that must heed traps.
std::vector<float> LargestOverHeads(const WeightRows& rows) {
  std::vector<float> largest(rows.row(0), rows.row(0) + rows.count);
  for (uint32_t head = 1; head < rows.heads; ++head) {
    const float* const row = rows.row(head);
    for (uint32_t i = 0; i < rows.count; ++i) {
      largest[i] = std::bit_cast<float>(
          std::max(std::bit_cast<int32_t>(largest[i]), std::bit_cast<int32_t>(row[i])));
    }
  }
  return largest;
}

// What would be dropped, per head, and whether that is allowed.
class Dropped {
 public:
  Dropped(uint32_t heads, double limit, absl::Span<const double> before)
      : limit_(limit), mass_(heads, 0.0), next_(heads, 0.0) {
    assert(before.empty() || before.size() == heads);
    std::copy(before.begin(), before.end(), mass_.begin());
  }

  // more(h) is the mass that head h would drop in addition.
  template <typename More>
  bool Add(const More& more) {
    for (uint32_t head = 0; head < mass_.size(); ++head) {
      next_[head] = mass_[head] + more(head);
      if (next_[head] > limit_) return false;
    }
    mass_.swap(next_);
    return true;
  }

 private:
  double limit_;
  std::vector<double> mass_;
  std::vector<double> next_;
};

// Mass of every bin for every head, [kBins][heads].
std::vector<double> BinMasses(const WeightRows& rows, absl::Span<const float> order) {
  std::vector<double> masses(size_t{kBins} * rows.heads, 0.0);
  for (uint32_t i = 0; i < rows.count; ++i) {
    double* const bin = masses.data() + size_t{BinOf(order[i])} * rows.heads;
    for (uint32_t head = 0; head < rows.heads; ++head) bin[head] += rows.row(head)[i];
  }
  return masses;
}

}  // namespace

std::vector<uint32_t> ChoosingLayers(const Prompt& prompt) {
  if (!prompt.layers.empty()) return prompt.layers;
  std::vector<uint32_t> layers(prompt.shape.layer_count);
  std::iota(layers.begin(), layers.end(), 0U);
  return layers;
}

std::vector<uint32_t> ChoosingHeads(const Prompt& prompt) {
  const uint32_t per_layer = prompt.shape.kv_head_count;
  std::vector<uint32_t> heads;
  for (const uint32_t layer : ChoosingLayers(prompt)) {
    for (uint32_t i = 0; i < per_layer; ++i) heads.push_back(layer * per_layer + i);
  }
  return heads;
}

Middle MiddleOf(const TokenBudget& budget, uint32_t length) {
  const uint32_t end = length > budget.local ? length - budget.local : 0;
  return end > budget.sink ? Middle{budget.sink, end} : Middle{budget.sink, budget.sink};
}

void KeepLargest(absl::Span<const float> weights, uint32_t top_k, uint32_t first,
                 std::vector<uint32_t>* positions) {
  if (top_k == 0) return;
  if (top_k >= weights.size()) {
    AppendAll(static_cast<uint32_t>(weights.size()), first, positions);
    return;
  }
  std::array<uint32_t, kBins> counts{};
  for (const float weight : weights) {
    assert(weight >= 0.0F);
    ++counts[BinOf(weight)];
  }
  uint32_t bin = kBins - 1;
  uint32_t above = 0;
  while (above + counts[bin] < top_k) above += counts[bin--];
  std::vector<Candidate> candidates = CandidatesOf(weights, bin);
  const auto last = candidates.begin() + (top_k - above - 1);
  std::nth_element(candidates.begin(), last, candidates.end());
  AppendUpTo(weights, bin, &*last, first, positions);
}

void KeepByMass(const WeightRows& rows, double limit, absl::Span<const double> dropped_before,
                uint32_t first, std::vector<uint32_t>* positions) {
  if (rows.count == 0) return;
  const std::vector<float> order = LargestOverHeads(rows);
  const std::vector<double> masses = BinMasses(rows, order);
  Dropped dropped(rows.heads, limit, dropped_before);
  uint32_t bin = 0;
  const auto drop_bin = [&](uint32_t head) { return masses[size_t{bin} * rows.heads + head]; };
  while (bin < kBins && dropped.Add(drop_bin)) ++bin;
  if (bin == kBins) return;
  std::vector<Candidate> candidates = CandidatesOf(order, bin);
  std::sort(candidates.begin(), candidates.end());
  const auto drop_last = [&](uint32_t head) {
    return static_cast<double>(rows.row(head)[candidates.back().index]);
  };
  while (!candidates.empty() && dropped.Add(drop_last)) candidates.pop_back();
  AppendUpTo(order, bin, candidates.empty() ? nullptr : &candidates.back(), first, positions);
}

std::vector<float> SumOverHeads(const WeightRows& rows) {
  std::vector<float> sums(rows.count, 0.0F);
  for (uint32_t head = 0; head < rows.heads; ++head) {
    const float* const row = rows.row(head);
    for (uint32_t i = 0; i < rows.count; ++i) sums[i] += row[i];
  }
  return sums;
}

void KeepForGroup(absl::Span<const float> probabilities, uint32_t heads, uint32_t length,
                  const TokenBudget& budget, std::vector<uint32_t>* positions) {
  assert(probabilities.size() == size_t{heads} * length);
  const Middle middle = MiddleOf(budget, length);
  if (middle.count() == 0) return;
  const WeightRows rows = {probabilities.data() + middle.begin, length, heads, middle.count()};
  if (budget.mass_limit > 0.0F) {
    KeepByMass(rows, budget.mass_limit, {}, middle.begin, positions);
  } else {
    KeepLargest(SumOverHeads(rows), budget.top_k, middle.begin, positions);
  }
}

}  // namespace kvservice::baselines
