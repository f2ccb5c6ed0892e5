#include "attention/cpu/anchor_terms.h"

#include <bit>
#include <cmath>
#include <vector>

#include "attention/cpu/score_kernel.h"
#include "attention/cpu/token_mask.h"
#include "attention/cpu/weight_sums.h"
#include "attention/log_mass.h"

namespace kvservice {
namespace {

// Adds those tokens of `among` that one head may give a heavy share of e^log_read.
void AddMaybeHeavy(const ScanWeights& weights, uint32_t head, double log_read,
                   absl::Span<const uint64_t> among, TokenMask* heavy) {
  const std::vector<float>& numbers = weights.numbers();
  // The least weight that counts is mantissa * 2^exponent.
  const double least = (log_read + std::log(kMaybeHeavyShare)) / kLn2;
  constexpr double kExponentMax = 1e9;
  if (!(std::fabs(least) < kExponentMax)) return;
  const auto exponent = static_cast<int32_t>(std::floor(least));
  const double mantissa = std::exp2(least - exponent);
  for (uint32_t i = 0; i < among.size(); ++i) {
    if (among[i] == 0) continue;
    const uint32_t block = weights.block_begin + i;
    const size_t page = weights.PageIndex(head, block);
    const double share = weights.bounded ? static_cast<double>(weights.estimate_share[page]) : 1.0;
    const double scale = share * ScaleOf(weights.reference[page] - exponent);
    // Most pages hold nothing of the kind.
    if (!(static_cast<double>(weights.page_sum[page]) * scale >= mantissa)) continue;
    const auto threshold = static_cast<float>(mantissa / scale);
    const float* page_weights = weights.Page(numbers, head, block);
    for (uint64_t word = among[i]; word != 0; word &= word - 1) {
      const auto token = static_cast<uint32_t>(std::countr_zero(word));
      if (page_weights[token] >= threshold) (*heavy)[i] |= word & (~word + 1);
    }
  }
}

KeySpread SpreadOfOpenPages(const AnchorTask& task) {
  std::vector<uint32_t> open;
  for (uint32_t i = 0; i < task.open.size(); ++i) {
    if (task.open[i] != 0) open.push_back(task.block_begin + i);
  }
  // Memory may have to fetch pages, so it is not asked for more than are read.
  std::vector<uint32_t> blocks;
  for (const size_t index : SpreadSample(open.size())) blocks.push_back(open[index]);
  std::vector<std::byte> storage;
  return SpreadOfKeys(task.shape->layout.head_dim, task.memory->Boxes(blocks, &storage));
}

}  // namespace

SharingTerms MakeSharingTerms(const AnchorTask& task) {
  const uint32_t group = task.shape->layout.group_size();
  TokenMask left(task.open.begin(), task.open.end());
  for (size_t i = 0; i < left.size(); ++i) left[i] &= ~task.chosen[i];
  // Where nothing is open nothing was scanned, and the weights are those of another row.
  const bool scanned = CountTokens(task.open) != 0;
  TokenMask heavy(task.always.begin(), task.always.end());
  std::vector<double> log_left(group, kLogZero);
  std::vector<double> log_read(group);
  TokenMask scanned_chosen(task.chosen.begin(), task.chosen.end());
  for (size_t i = 0; i < left.size(); ++i) scanned_chosen[i] &= task.open[i];
  for (uint32_t i = 0; i < group; ++i) {
    const uint32_t head = task.first_head + i;
    log_read[i] = task.always_lse[head];
    if (!scanned) continue;
    log_left[i] = SumEstimates(*task.weights, head, left).Log();
    log_read[i] = LogAdd(log_read[i], SumEstimates(*task.weights, head, scanned_chosen).Log());
    AddMaybeHeavy(*task.weights, head, log_read[i], scanned_chosen, &heavy);
  }

  const std::vector<uint32_t> read = PositionsOf(heavy, task.block_begin);
  std::vector<Score> scores(read.size());
  std::vector<double> logits;
  ScoreTask score;
  score.shape = task.shape;
  score.view = task.view;
  score.kv_head = task.kv_head;
  score.queries = task.queries;
  score.positions = read;
  for (uint32_t i = 0; i < group; ++i) {
    score.head = task.first_head + i;
    task.memory->Score(score, scores.data(), nullptr);
    for (size_t token = 0; token < read.size(); ++token) {
      const bool seen = read[token] >= task.queries->visible_begin[score.head];
      logits.push_back(seen ? scores[token].logit : kLogZero);
    }
  }
  const KeySpread spread = SpreadOfOpenPages(task);
  SharingTask sharing;
  sharing.shape = task.shape;
  sharing.queries = task.anchor_queries;
  sharing.read = read;
  sharing.read_logits = logits;
  sharing.log_read = log_read;
  sharing.log_left = log_left;
  sharing.spread = &spread;
  std::vector<std::byte> storage;
  return MakeSharingTerms(sharing, [&](absl::Span<const uint32_t> positions) {
    return task.memory->Keys(positions, &storage);
  });
}

}  // namespace kvservice
