#include "tests/eval/calibrate.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvservice::eval {
namespace {

constexpr float kCosines[] = {0.5F, 0.6F, 0.7F, 0.75F, 0.8F, 0.85F, 0.9F, 0.95F};
constexpr float kShares[] = {0.1F, 0.2F, 0.35F, 0.5F, 0.7F};
// Halvings of ln lambda: beyond any precision of the profile.
constexpr int kBisections = 60;

struct Ladder {
  Contender scan;
  std::vector<Contender> sharing = {};
  std::vector<Contender> hiding = {};
  std::vector<Contender> freezing = {};
};

std::vector<uint32_t> SparseLayers(const DecoderShape& shape) {
  std::vector<uint32_t> layers;
  for (uint32_t layer = 0; layer < shape.layer_count; ++layer) {
    if (IsSparse(shape, layer)) layers.push_back(layer);
  }
  return layers;
}

Contender Base(SelectorKind selector, uint32_t budget_tokens) {
  Contender contender;
  contender.policy = DefaultPolicy(selector);
  contender.policy.budget = {.sink = kStudySinks,
                             .local = kStudyLocal,
                             .top_k = budget_tokens - kStudySinks - kStudyLocal};
  contender.policy.dense_below_tokens = 0;
  contender.policy.layers = {
      {.layer_begin = 0, .layer_end = kStudyDenseLayers, .selector = SelectorKind::kDense}};
  return contender;
}

Ladder MakeLadder(const DecoderShape& shape, uint32_t budget_tokens) {
  Ladder ladder{.scan = Base(SelectorKind::kScan, budget_tokens)};
  for (const float cosine : kCosines) {
    ladder.sharing.push_back(Base(SelectorKind::kCis, budget_tokens));
    ladder.sharing.back().policy.cis.min_cosine = cosine;
  }
  for (const float share : kShares) {
    ladder.hiding.push_back(Base(SelectorKind::kPsaw, budget_tokens));
    ladder.hiding.back().policy.layers.push_back(
        {.layer_begin = kStudyDenseLayers, .layer_end = shape.layer_count, .hidden_share = share});
    // A frozen prefix takes a shallower layer's choice; the first sparse layer has none to take.
    ladder.freezing.push_back(Base(SelectorKind::kEtf, budget_tokens));
    ladder.freezing.back().policy.layers.push_back(
        {.layer_begin = kStudyDenseLayers, .layer_end = shape.layer_count, .frozen_share = share});
  }
  return ladder;
}

// Mean squared output error per sparse layer and KV head.
std::vector<double> SquaredErrors(const LoopResult& result, size_t heads) {
  std::vector<double> squares(heads);
  for (size_t i = 0; i < result.output_errors.size(); ++i) {
    squares[i % heads] += double{result.output_errors[i]} * result.output_errors[i];
  }
  const auto steps = static_cast<double>(result.output_errors.size() / heads);
  for (double& square : squares) square /= std::max(steps, 1.0);
  return squares;
}

// Sums over texts.
void AddProfile(const LoopResult& result, const std::vector<double>& scan_errors, double text_share,
                HeadProfile* profile) {
  const size_t heads = scan_errors.size();
  const std::vector<double> errors = SquaredErrors(result, heads);
  profile->scans.resize(heads);
  profile->damage.resize(heads);
  for (size_t head = 0; head < heads; ++head) {
    profile->scans[head] += text_share * result.scans_by_head[head] / result.steps;
    profile->damage[head] += text_share * std::max(0.0, errors[head] - scan_errors[head]);
  }
}

// Contender 0 is dense, 1 scans, then the ladders in order.
std::vector<Contender> Flatten(const Ladder& ladder) {
  Contender dense = Base(SelectorKind::kDense, 512);
  std::vector<Contender> all = {dense, ladder.scan};
  for (const auto* part : {&ladder.sharing, &ladder.hiding, &ladder.freezing}) {
    all.insert(all.end(), part->begin(), part->end());
  }
  return all;
}

}  // namespace

std::vector<size_t> ChooseByLagrange(absl::Span<const HeadProfile> ladder, double scans_max) {
  const size_t heads = ladder.front().scans.size();
  std::vector<size_t> best(heads, 0);
  double low = -30.0;
  double high = 30.0;
  for (int i = 0; i < kBisections; ++i) {
    const double log_lambda = 0.5 * (low + high);
    const double lambda = std::exp(log_lambda);
    std::vector<size_t> chosen(heads);
    double scans = 0.0;
    for (size_t head = 0; head < heads; ++head) {
      double least = std::numeric_limits<double>::infinity();
      for (size_t rung = 0; rung < ladder.size(); ++rung) {
        const double cost = ladder[rung].damage[head] + lambda * ladder[rung].scans[head];
        if (cost < least) {
          least = cost;
          chosen[head] = rung;
        }
      }
      scans += ladder[chosen[head]].scans[head];
    }
    if (scans <= scans_max) {
      best = chosen;
      high = log_lambda;
    } else {
      low = log_lambda;
    }
  }
  return best;
}

std::vector<float> ChooseShares(absl::Span<const HeadProfile> ladder,
                                absl::Span<const float> shares,
                                absl::Span<const double> scan_errors, size_t heads_per_layer,
                                double edit_damage) {
  std::vector<float> chosen(scan_errors.size() / heads_per_layer);
  for (size_t layer = 0; layer < chosen.size(); ++layer) {
    for (size_t i = 0; i < ladder.size(); ++i) {
      double damage = 0.0;
      double own = 0.0;
      for (size_t head = layer * heads_per_layer; head < (layer + 1) * heads_per_layer; ++head) {
        damage += ladder[i].damage[head];
        own += scan_errors[head];
      }
      if (damage > edit_damage * own) break;
      chosen[layer] = shares[i];
    }
  }
  return chosen;
}

absl::StatusOr<Policy> Calibrate(const CalibrationOptions& options, const QualityOptions& quality,
                                 absl::Span<const LoopSetup> setups) {
  const DecoderShape& shape = setups.front().decoder->shape();
  const std::vector<uint32_t> layers = SparseLayers(shape);
  const size_t heads = layers.size() * shape.kv_head_count;
  const Ladder ladder = MakeLadder(shape, options.budget_tokens);
  const std::vector<Contender> contenders = Flatten(ladder);
  std::vector<HeadProfile> profiles(contenders.size());
  std::vector<double> scan_errors(heads);
  const double text_share = 1.0 / static_cast<double>(setups.size());
  for (const LoopSetup& setup : setups) {
    LoopSetup each_step = setup;
    each_step.judge_every = 1;
    each_step.compare_every = 1;
    auto results = RunBatches(quality, each_step, contenders);
    if (!results.ok()) return results.status();
    const std::vector<double> errors = SquaredErrors((*results)[1], heads);
    for (size_t head = 0; head < heads; ++head) scan_errors[head] += text_share * errors[head];
    for (size_t i = 1; i < contenders.size(); ++i) {
      AddProfile((*results)[i], errors, text_share, &profiles[i]);
    }
  }
  const auto part = [&](size_t first, size_t count) {
    return absl::MakeConstSpan(profiles).subspan(first, count);
  };
  const absl::Span<const HeadProfile> sharing = part(2, std::size(kCosines));
  const std::vector<size_t> rungs =
      ChooseByLagrange(sharing, options.scans_max * static_cast<double>(heads));
  const std::vector<float> hidden =
      ChooseShares(part(2 + std::size(kCosines), std::size(kShares)), kShares, scan_errors,
                   shape.kv_head_count, options.edit_damage);
  const std::vector<float> frozen =
      ChooseShares(part(2 + std::size(kCosines) + std::size(kShares), std::size(kShares)), kShares,
                   scan_errors, shape.kv_head_count, options.edit_damage);

  Policy policy = Base(SelectorKind::kCpe, options.budget_tokens).policy;
  policy.dense_below_tokens = Policy().dense_below_tokens;
  for (size_t i = 0; i < layers.size(); ++i) {
    LayerOverride entry{.layer_begin = layers[i], .layer_end = layers[i] + 1};
    for (uint32_t head = 0; head < shape.kv_head_count; ++head) {
      entry.kv_head_min_cosines.push_back(kCosines[rungs[i * shape.kv_head_count + head]]);
    }
    if (hidden[i] > 0.0F) entry.hidden_share = hidden[i];
    // The first has no shallower choice to take.
    if (frozen[i] > 0.0F && i > 0) entry.frozen_share = frozen[i];
    policy.layers.push_back(std::move(entry));
  }
  return policy;
}

}  // namespace kvservice::eval
