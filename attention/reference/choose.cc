#include "attention/reference/choose.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

#include "attention/host_lists.h"
#include "attention/reference/log_sum.h"
#include "attention/reference/sharing.h"
#include "attention/sample_plan.h"
#include "attention/sharing.h"

namespace kvservice::reference {
namespace {

using Tokens = std::vector<uint32_t>;

Tokens Union(const Tokens& a, const Tokens& b) {
  Tokens tokens;
  std::set_union(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(tokens));
  return tokens;
}

Tokens Intersection(const Tokens& a, absl::Span<const uint32_t> b) {
  Tokens tokens;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(tokens));
  return tokens;
}

// The middle of one KV head, split by where its choice comes from.
struct Middle {
  Tokens all;
  Tokens open;           // Left to scan or to a list.
  Tokens frozen_chosen;  // ETF: what the frozen lists chose below frozen_end.
  Tokens unread;         // Neither open nor chosen: hidden, and frozen tokens that were not chosen.
};

Middle SplitMiddle(const Plan& plan, const HeadRow& row) {
  Middle middle;
  middle.all = row.TokensAt(Place::kMiddle);
  const auto* frozen = static_cast<const HostLists*>(plan.frozen_lists);
  const bool use_frozen = (plan.source == Source::kScan || plan.source == Source::kReuse) &&
                          frozen != nullptr && frozen->has_selection(row.kv_head());
  const auto open_begin =
      use_frozen ? std::lower_bound(middle.all.begin(), middle.all.end(), plan.frozen_end)
                 : middle.all.begin();
  const Tokens below(middle.all.begin(), open_begin);
  middle.open.assign(open_begin, middle.all.end());
  if (use_frozen) middle.frozen_chosen = Intersection(below, frozen->selection(row.kv_head()));
  Tokens frozen_dropped;
  std::set_difference(below.begin(), below.end(), middle.frozen_chosen.begin(),
                      middle.frozen_chosen.end(), std::back_inserter(frozen_dropped));
  middle.unread = Union(row.TokensAt(Place::kHidden), frozen_dropped);
  return middle;
}

// Softmax weights of tokens as a scan sees them, per head: the estimate, or with `proving` the
// upper end of its interval, over the estimated normaliser of `pool` and everything that is always
// read.
class Weights {
 public:
  // sample_factor: see SampleFactor; counts when proving.
  Weights(bool proving, double sample_factor, const Tokens& pool, HeadRow* row)
      : proving_(proving), sample_factor_(sample_factor), row_(row) {
    const Tokens always = row->TokensAt(Place::kAlways);
    for (uint32_t head = 0; head < row->head_count(); ++head) {
      std::vector<double> logits;
      for (const uint32_t token : always) {
        if (row->Sees(head, token)) logits.push_back(row->Exact(head, token).nearest);
      }
      for (const uint32_t token : pool) {
        if (row->Sees(head, token)) logits.push_back(row->Estimate(head, token).nearest);
      }
      log_normalizers_.push_back(LogSum(logits));
    }
  }

  // Zero for a token that the head does not see, infinity when nothing is known.
  double Of(uint32_t head, uint32_t token) const {
    if (!row_->Sees(head, token)) return 0.0;
    const LogitRange range = row_->Estimate(head, token);
    const double estimate = std::exp(range.nearest - log_normalizers_[head]);
    double weight = estimate;
    if (proving_) {
      const double upper = std::exp(range.high - log_normalizers_[head]);
      weight = estimate + sample_factor_ * (upper - estimate);
    }
    return std::isnan(weight) ? std::numeric_limits<double>::infinity() : weight;
  }
  double Largest(uint32_t token) const {
    double largest = 0.0;
    for (uint32_t head = 0; head < row_->head_count(); ++head) {
      largest = std::max(largest, Of(head, token));
    }
    return largest;
  }
  double Sum(uint32_t token) const {
    double sum = 0.0;
    for (uint32_t head = 0; head < row_->head_count(); ++head) sum += Of(head, token);
    return sum;
  }

 private:
  const bool proving_;
  const double sample_factor_;
  HeadRow* row_;
  std::vector<double> log_normalizers_;
};

// Tokens by falling score, the lower position first among equals. Where a limit on every head
// counts, a token's score is its largest weight in any head, else the sum of its weights.
Tokens Rank(const Tokens& tokens, const Weights& weights, bool every_head) {
  std::vector<std::pair<double, uint32_t>> scored;
  scored.reserve(tokens.size());
  for (const uint32_t token : tokens) {
    scored.emplace_back(-(every_head ? weights.Largest(token) : weights.Sum(token)), token);
  }
  std::sort(scored.begin(), scored.end());
  Tokens ranked;
  ranked.reserve(scored.size());
  for (const auto& [score, token] : scored) ranked.push_back(token);
  return ranked;
}

// Length of the shortest prefix of `ranked` after which no head's rest weighs more than the limit.
// `unread` always belongs to the rest.
size_t CountByMass(double limit, const Tokens& ranked, const Tokens& unread, const Weights& weights,
                   uint32_t head_count) {
  size_t needed = 0;
  for (uint32_t head = 0; head < head_count; ++head) {
    double rest = 0.0;
    for (const uint32_t token : unread) rest += weights.Of(head, token);
    // From the lightest: the rest after keeping `count` tokens is unread + ranked[count..].
    size_t count = ranked.size();
    while (count > 0) {
      rest += weights.Of(head, ranked[count - 1]);
      if (!(rest <= kPlannedShare * limit)) break;
      --count;
    }
    needed = std::max(needed, count);
  }
  return needed;
}

// Adds the open neighbours of the strongest chosen tokens.
Tokens Dilate(const KeepRule& keep, const Tokens& ranked, size_t count, const Tokens& open) {
  Tokens chosen(ranked.begin(), ranked.begin() + static_cast<ptrdiff_t>(count));
  const size_t strongest = std::min<size_t>(keep.dilate_strongest, count);
  for (size_t i = 0; i < strongest; ++i) {
    const uint32_t low = ranked[i] - std::min(ranked[i], keep.dilate_radius);
    const uint64_t high = uint64_t{ranked[i]} + keep.dilate_radius;
    for (auto token = std::lower_bound(open.begin(), open.end(), low);
         token != open.end() && *token <= high; ++token) {
      chosen.push_back(*token);
    }
  }
  std::sort(chosen.begin(), chosen.end());
  chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
  return chosen;
}

// What top_k leaves to the open part of the middle after the frozen part's tokens.
size_t OpenTopK(const Plan& plan, const Middle& middle) {
  return plan.keep.top_k - std::min<size_t>(plan.keep.top_k, middle.frozen_chosen.size());
}

// The strongest tokens of one way to prove the limits: how loose samples leave the weights, and
// what no head may leave behind. 0 leaves only top_k.
Tokens Strongest(const Plan& plan, const Middle& middle, double sample_factor, double limit,
                 HeadRow* row) {
  const bool proving = plan.prove != Guarantee::kNone;
  // A proof speaks about all tokens, so it scans them all; without one the scan covers what it
  // chooses from.
  Tokens pool = middle.open;
  if (proving) pool = Union(pool, Union(middle.unread, middle.frozen_chosen));
  const Weights weights(proving, sample_factor, pool, row);
  const Tokens ranked = Rank(middle.open, weights, proving || limit > 0.0);
  size_t count = std::min(ranked.size(), OpenTopK(plan, middle));
  if (limit > 0.0) {
    const Tokens unread = proving ? middle.unread : Tokens();
    count = std::max(count, CountByMass(limit, ranked, unread, weights, row->head_count()));
  }
  return Union(middle.frozen_chosen, Dilate(plan.keep, ranked, count, middle.open));
}

// The way that costs least, over the numbers of draws, and its cost. A limit on the output error is
// planned as one on the upper weights.
Tokens Scan(const Plan& plan, const Middle& middle, HeadRow* row) {
  const double eta = plan.prove == Guarantee::kConfidence ? plan.failure_probability : 0.0;
  Tokens cheapest;
  double least = std::numeric_limits<double>::infinity();
  const SampleCosts costs =
      SampleCostsOf(static_cast<uint32_t>(middle.open.size()), row->shape().layout.vector_bytes());
  const auto consider = [&](Tokens tokens, uint32_t draws, bool with_values) {
    const double cost = PlannedVectors(costs, static_cast<uint32_t>(tokens.size()),
                                       row->head_count(), draws, with_values);
    if (!(cost < least)) return;
    least = cost;
    cheapest = std::move(tokens);
  };
  for (const uint32_t draws : kDrawOptions) {
    if (draws > 0 && (eta == 0.0 || draws > plan.draws_max)) break;
    if (draws > 0 && plan.keep.mass_limit == 0.0F && plan.keep.output_limit == 0.0F) break;
    if (plan.keep.output_limit > 0.0F && plan.keep.mass_limit == 0.0F) {
      const CompensationPlan compensation =
          PlanCompensation(static_cast<double>(plan.keep.output_limit), eta, draws);
      consider(Strongest(plan, middle, compensation.factor, compensation.share, row), draws,
               /*with_values=*/true);
    } else {
      consider(Strongest(plan, middle, SampleFactor(eta, draws), plan.keep.mass_limit, row), draws,
               /*with_values=*/false);
    }
  }
  return cheapest;
}

// Takes the list of an anchor. Open tokens that the list has not considered are read with it, or,
// once they are many, scanned, and compete with it for its places.
Tokens Reuse(const Plan& plan, const Middle& middle, uint32_t anchor_index, HeadRow* row) {
  auto* lists = static_cast<HostLists*>(plan.lists);
  const HostLists::Anchor& anchor = lists->anchor(row->kv_head(), anchor_index);
  lists->Touch(row->kv_head(), anchor_index);
  Tokens chosen = Intersection(middle.open, anchor.tokens);
  const uint32_t covered_end = std::max(anchor.covered_end, row->covered_end());
  const Tokens fresh(std::lower_bound(middle.open.begin(), middle.open.end(), anchor.covered_end),
                     std::lower_bound(middle.open.begin(), middle.open.end(), covered_end));
  if (fresh.size() <= kFreshTokensMax) return Union(middle.frozen_chosen, Union(chosen, fresh));

  const size_t places = std::max(chosen.size(), OpenTopK(plan, middle));
  const Tokens rivals = Union(chosen, fresh);
  const Weights weights(/*proving=*/false, /*sample_factor=*/1.0, rivals, row);
  chosen = Rank(rivals, weights, /*every_head=*/false);
  for (uint32_t head = row->newest_head(); head < row->head_count(); ++head) {
    double left = 0.0;
    for (size_t i = places; i < chosen.size(); ++i) left += weights.Of(head, chosen[i]);
    lists->Leave(row->kv_head(), anchor_index, head - row->newest_head(),
                 std::log(left) - std::log1p(-left));
  }
  chosen.resize(std::min(chosen.size(), places));
  std::sort(chosen.begin(), chosen.end());
  chosen = Union(middle.frozen_chosen, chosen);
  lists->Complete(row->kv_head(), anchor_index, chosen, covered_end);
  return chosen;
}

Tokens Given(const Plan& plan, const Middle& middle, uint32_t kv_head) {
  const uint32_t begin = plan.given_offsets[kv_head];
  return Intersection(middle.all,
                      plan.given.subspan(begin, plan.given_offsets[kv_head + 1] - begin));
}

// True if reading the choice would cost more than the plan's share of reading all that is visible.
bool TooManyToChoose(const Plan& plan, size_t chosen_count, const HeadRow& row) {
  const size_t always = row.TokensAt(Place::kAlways).size();
  const size_t visible = always + row.TokensAt(Place::kMiddle).size();
  return static_cast<double>(always + chosen_count) >
         static_cast<double>(plan.dense_share) * static_cast<double>(visible);
}

// Hidden tokens must be scanned to be proven, so remembering saves nothing where there are some.
bool IsRememberedDense(const Plan& plan, const HeadRow& row) {
  const auto* lists = static_cast<const HostLists*>(plan.lists);
  return plan.source == Source::kScan && plan.dense_positions > 0 && lists != nullptr &&
         row.TokensAt(Place::kHidden).empty() && lists->IsDense(row.kv_head(), row.position());
}

}  // namespace

void RememberDense(const Plan& plan, const HeadRow& row) {
  auto* lists = static_cast<HostLists*>(plan.lists);
  if (plan.source != Source::kScan || plan.dense_positions == 0 || lists == nullptr) return;
  const uint32_t begin = row.position() + 1;
  lists->SetDense(row.kv_head(), begin, begin + plan.dense_positions);
}

Choice Choose(const Plan& plan, absl::Span<const float> queries, HeadRow* row) {
  const Middle middle = SplitMiddle(plan, *row);
  auto* lists = static_cast<HostLists*>(plan.lists);
  Choice choice;
  const bool remembered = IsRememberedDense(plan, *row);
  if (plan.source == Source::kReuse) {
    assert(lists != nullptr);
    const ReusableAnchor found =
        FindReusable(*lists, row->shape(), plan, row->kv_head(), row->end() - 1, queries);
    choice.similarity = found.similarity;
    choice.sharing_estimate = found.estimate;
    choice.reused = found.anchor >= 0;
    choice.key_norm_max =
        lists->KeyNormMax(row->kv_head(), row->view().length, [row](uint32_t begin, uint32_t end) {
          return KeyNormMax(row->shape().layout, row->view(), row->kv_head(), begin, end);
        });
    if (choice.reused) {
      const auto index = static_cast<uint32_t>(found.anchor);
      choice.query_distance = lists->QueryDistance(row->kv_head(), index, queries);
      choice.middle = Reuse(plan, middle, index, row);
    }
  }
  choice.scanned = (plan.source == Source::kScan && !remembered) ||
                   (plan.source == Source::kReuse && !choice.reused);
  if (choice.scanned) choice.middle = Scan(plan, middle, row);
  if (plan.source == Source::kGiven) choice.middle = Given(plan, middle, row->kv_head());

  choice.everything = plan.source == Source::kAll || remembered ||
                      TooManyToChoose(plan, choice.middle.size(), *row);
  if (choice.everything) {
    if (!remembered) RememberDense(plan, *row);
    choice.middle = middle.all;
    if (lists != nullptr) lists->ClearSelection(row->kv_head());
    return choice;
  }
  if (lists == nullptr) return choice;
  if (plan.source == Source::kReuse && choice.scanned) {
    SharingTerms sharing;
    if (plan.reuse_mass_limit > 0.0F) {
      const Tokens read =
          Union(row->TokensAt(Place::kAlways), Intersection(middle.open, choice.middle));
      sharing = TermsOfAnchor(queries, middle.open, read, row);
    }
    lists->Insert(row->kv_head(), queries, choice.middle, row->covered_end(), std::move(sharing));
  }
  if (plan.keeps_selection) {
    lists->SetSelection(row->kv_head(), choice.middle);
  } else {
    lists->ClearSelection(row->kv_head());
  }
  return choice;
}

}  // namespace kvservice::reference
