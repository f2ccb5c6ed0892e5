#include "attention/cpu/group.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "attention/cpu/anchor_terms.h"
#include "attention/cpu/plan_samples.h"
#include "attention/cpu/population.h"
#include "attention/float16.h"
#include "attention/sample_plan.h"
#include "attention/sketch.h"

namespace kvservice {
namespace {

TokenMask And(const TokenMask& a, const TokenMask& b) {
  TokenMask result(a);
  for (size_t i = 0; i < result.size(); ++i) result[i] &= b[i];
  return result;
}

TokenMask Or(const TokenMask& a, const TokenMask& b) {
  TokenMask result(a);
  for (size_t i = 0; i < result.size(); ++i) result[i] |= b[i];
  return result;
}

TokenMask AndNot(const TokenMask& a, const TokenMask& b) {
  TokenMask result(a);
  for (size_t i = 0; i < result.size(); ++i) result[i] &= ~b[i];
  return result;
}

TokenMask InRange(const TokenMask& a, uint32_t block_begin, uint64_t begin, uint64_t end) {
  TokenMask result(a);
  for (uint32_t i = 0; i < result.size(); ++i) result[i] &= RangeWord(block_begin + i, begin, end);
  return result;
}

bool Proves(Guarantee guarantee) {
  return guarantee == Guarantee::kConfidence || guarantee == Guarantee::kDeterministic;
}

}  // namespace

void Group::Prepare(const LayerShape& shape, AttendRow* row, uint32_t kv_head,
                    const GroupMemory* memory, absl::Span<const float> anchor_queries) {
  shape_ = &shape;
  memory_ = memory;
  row_ = row;
  kv_head_ = kv_head;
  anchor_queries_ = anchor_queries;
  has_choice_ = scanned_ = reused_ = everything_ = false;
  similarity_ = -2.0F;
  sharing_estimate_ = key_norm_max_ = query_distance_ = -1.0F;
  assert(row->position + row->query_count == row->view.length);
  FillHeadQueries(shape, *row, kv_head, &queries_);
  SetRange();
  SetPlaces();
  SplitMiddle();
  kept.Resize(head_count(), shape.layout.head_dim);
  rest.Resize(head_count(), shape.layout.head_dim);
  if (row->plan.prove != Guarantee::kNone) SetValueNorms();
  rounds_grown_ = 0;
  draws_planned_ = row->plan.draws_max;
  proofs_.resize(head_count());
  const uint32_t group = shape.layout.group_size();
  for (uint32_t head = 0; head < head_count(); ++head) {
    const DrawStream stream{.kv_head = static_cast<uint16_t>(kv_head),
                            .query_head = static_cast<uint16_t>(head % group),
                            .query_token = head / group};
    proofs_[head].Begin(row->plan, shape.layout.head_dim, row->draw_key, stream);
  }
  StartChoice(anchor_queries);
  first_ = has_choice_ ? always_ : read_;
  PlanScan();
}

uint32_t Group::OutputIndex(uint32_t head) const {
  return kvservice::OutputIndex(shape_->layout, kv_head_, head);
}

void Group::SetRange() {
  begin_ = WindowBegin(shape_->sliding_window, row_->position);
  block_begin_ = begin_ / kBlockTokens;
  const uint32_t blocks = BlockCount(row_->view.length) - block_begin_;
  all_.resize(blocks);
  for (uint32_t i = 0; i < blocks; ++i) {
    all_[i] = RangeWord(block_begin_ + i, begin_, row_->view.length);
  }
}

bool Group::IsSealed(uint32_t index) const {
  return row_->view.sketches[block_begin_ + index] != nullptr;
}

void Group::SetPlaces() {
  const Plan& plan = row_->plan;
  // The query tokens' own keys are never sketched away from them.
  const uint32_t local_begin = std::min(plan.local_begin, row_->position);
  covered_end_ = local_begin;
  always_.assign(all_.size(), 0);
  middle_.assign(all_.size(), 0);
  // Reading everything needs no sketch, not even to know that.
  const bool reads_all =
      plan.source == Source::kAll && plan.visible_begin <= std::max(plan.sink_end, begin_);
  for (uint32_t i = 0; i < all_.size(); ++i) {
    const uint32_t block = block_begin_ + i;
    const uint64_t outer = all_[i] & (RangeWord(block, 0, plan.sink_end) |
                                      RangeWord(block, local_begin, row_->view.length));
    always_[i] = outer;
    if (outer == all_[i]) continue;
    if (!reads_all) {
      uint64_t exact = ~uint64_t{0};
      if (IsSealed(i)) {
        exact = memory_->Exact(block);
      } else {
        const auto first = static_cast<uint32_t>(std::countr_zero(all_[i] & ~outer));
        covered_end_ = std::min(covered_end_, block * kBlockTokens + first);
      }
      always_[i] |= all_[i] & exact;
    }
    middle_[i] = all_[i] & ~always_[i] & RangeWord(block, plan.visible_begin, row_->view.length);
  }
}

void Group::SplitMiddle() {
  const Plan& plan = row_->plan;
  const auto* frozen = static_cast<const HostLists*>(plan.frozen_lists);
  const bool may_freeze = plan.source == Source::kScan || plan.source == Source::kReuse;
  frozen_chosen_.assign(all_.size(), 0);
  if (!may_freeze || frozen == nullptr || !frozen->has_selection(kv_head_)) {
    open_ = middle_;
    return;
  }
  const TokenMask below = InRange(middle_, block_begin_, 0, plan.frozen_end);
  open_ = AndNot(middle_, below);
  AddPositions(frozen->selection(kv_head_), block_begin_, &frozen_chosen_);
  frozen_chosen_ = And(frozen_chosen_, below);
}

uint32_t Group::OpenTopK() const {
  const uint32_t top_k = row_->plan.keep.top_k;
  return top_k - std::min(top_k, CountTokens(frozen_chosen_));
}

void Group::StartChoice(absl::Span<const float> anchor_queries) {
  const Plan& plan = row_->plan;
  if (plan.source == Source::kAll || IsRememberedDense()) return Settle(middle_);
  if (plan.source == Source::kGiven) {
    TokenMask given(all_.size(), 0);
    const uint32_t begin = plan.given_offsets[kv_head_];
    AddPositions(plan.given.subspan(begin, plan.given_offsets[kv_head_ + 1] - begin), block_begin_,
                 &given);
    return Settle(And(given, middle_));
  }
  if (plan.source == Source::kReuse) {
    assert(plan.lists != nullptr);
    const ReusableAnchor found =
        FindReusable(*lists(), *shape_, plan, kv_head_, row_->view.length - 1, anchor_queries);
    similarity_ = found.similarity;
    sharing_estimate_ = found.estimate;
    key_norm_max_ = lists()->KeyNormMax(
        kv_head_, row_->view.length,
        [this](uint32_t begin, uint32_t end) { return memory_->KeyNormMax(begin, end); });
    if (found.anchor >= 0) return StartReuse(static_cast<uint32_t>(found.anchor));
  }
  has_choice_ = scanned_ = true;
  candidates_ = open_;
  places_ = OpenTopK();
  // A proof speaks about all tokens, so it scans them all; without one the scan covers what it
  // chooses from.
  pool_ = Proves(plan.prove) || plan.prove == Guarantee::kExact ? AndNot(all_, always_) : open_;
}

// Takes the list of an anchor. Open tokens that the list has not considered are read with it, or,
// once they are many, scanned, and compete with it for its places.
void Group::StartReuse(uint32_t anchor) {
  reused_ = true;
  anchor_ = anchor;
  query_distance_ = lists()->QueryDistance(kv_head_, anchor, anchor_queries_);
  lists()->Touch(kv_head_, anchor);
  const HostLists::Anchor& list = lists()->anchor(kv_head_, anchor);
  TokenMask chosen(all_.size(), 0);
  AddPositions(list.tokens, block_begin_, &chosen);
  chosen = And(chosen, open_);
  covered_end_ = std::max(list.covered_end, covered_end_);
  const TokenMask fresh = InRange(open_, block_begin_, list.covered_end, covered_end_);
  if (CountTokens(fresh) <= kFreshTokensMax) {
    return Settle(Or(Or(chosen, fresh), frozen_chosen_));
  }
  has_choice_ = true;
  places_ = std::max(CountTokens(chosen), OpenTopK());
  candidates_ = Or(chosen, fresh);
  pool_ = candidates_;
}

// Hidden tokens must be scanned to be proven, so remembering saves nothing where there are some.
bool Group::IsRememberedDense() const {
  const Plan& plan = row_->plan;
  return plan.source == Source::kScan && plan.dense_positions > 0 && lists() != nullptr &&
         plan.visible_begin <= std::max(plan.sink_end, begin_) &&
         lists()->IsDense(kv_head_, row_->position);
}

void Group::RememberDense() {
  const Plan& plan = row_->plan;
  if (plan.dense_positions == 0 || plan.source != Source::kScan || lists() == nullptr) return;
  // From the next position on: this one, if it is asked for again, is tried again.
  const uint32_t begin = row_->position + 1;
  lists()->SetDense(kv_head_, begin, begin + plan.dense_positions);
}

// Fixes what is read, beyond what always is, and remembers it in the lists.
void Group::Settle(const TokenMask& chosen) {
  const Plan& plan = row_->plan;
  const uint32_t always_count = CountTokens(always_);
  const double visible = always_count + CountTokens(middle_);
  const double planned = always_count + CountTokens(chosen);
  everything_ =
      plan.source == Source::kAll || planned > static_cast<double>(plan.dense_share) * visible;
  if (everything_ && !IsRememberedDense()) RememberDense();
  read_ = Or(always_, everything_ ? middle_ : chosen);
  if (lists() == nullptr) return;
  const bool inserts = plan.source == Source::kReuse && scanned_ && !everything_;
  if (everything_ || !plan.keeps_selection) lists()->ClearSelection(kv_head_);
  if (everything_ || (!plan.keeps_selection && !inserts)) return;
  std::vector<uint32_t> positions = PositionsOf(chosen, block_begin_);
  if (plan.keeps_selection) lists()->SetSelection(kv_head_, positions);
  if (inserts) {
    SharingTerms sharing;
    if (plan.reuse_mass_limit > 0.0F) sharing = TermsOfAnchor(chosen);
    lists()->Insert(kv_head_, anchor_queries_, std::move(positions), covered_end_,
                    std::move(sharing));
  }
}

void Group::PlanScan() {
  const Plan& plan = row_->plan;
  to_scan_ = has_choice_ ? pool_ : TokenMask(all_.size(), 0);
  if (Proves(plan.prove)) to_scan_ = Or(to_scan_, AndNot(all_, first_));
  if (CountTokens(to_scan_) == 0) return;
  std::array<const float*, size_t{kQueryTokensMax} * kGroupMax> q;
  for (uint32_t head = 0; head < head_count(); ++head) {
    q[head] = row_->q + size_t{OutputIndex(head)} * shape_->layout.head_dim;
  }
  // A choice that an exact proof follows ranks by upper ends, as with the other proofs.
  const bool bounded = plan.prove != Guarantee::kNone;
  PrepareScan(*shape_, absl::MakeConstSpan(q.data(), head_count()), table(), bounded,
              &scan_queries_);
  weights.Resize(head_count(), block_begin_, static_cast<uint32_t>(all_.size()), bounded);
}

// Chooses as the plan's limits ask for: by mass with as many samples as pay, or for an output that
// is compensated.
TokenMask Group::ChooseTokens(const ChooseTask& task, ChooseScratch* scratch) {
  const Plan& plan = row_->plan;
  // Then nothing was scanned either, and the weights are those of another row.
  if (CountTokens(task.candidates) == 0) return TokenMask(all_.size(), 0);
  if (!scanned_) return Choose(task, scratch);
  const bool by_mass = task.mass_limit > 0.0F;
  if (!by_mass && plan.keep.output_limit > 0.0F) return ChooseForOutput(task, scratch);
  if (!by_mass || plan.prove != Guarantee::kConfidence) return Choose(task, scratch);
  const SampleTask samples{
      .choose = task,
      .failure_probability = plan.failure_probability,
      .draws_max = plan.draws_max,
      .costs = SampleCostsOf(CountTokens(task.candidates), shape_->layout.vector_bytes())};
  // Where a limit is only reported on, one diffuse head does not make the others read more.
  SamplePlan planned = plan.on_violation == OnViolation::kReport
                           ? PlanSamplesExcusing(samples, scratch)
                           : PlanSamples(samples, scratch);
  // Sampling stops when the limit is proven, so more draws than planned cost only those who need
  // them, and less than reading on.
  constexpr uint32_t kDrawsLeast = 128;
  draws_planned_ = std::max(kDrawsLeast, 2 * planned.draws);
  return std::move(planned.chosen);
}

// The cheapest of several choices, each with another number of draws for compensation: the more
// draws, the more weight may be left out.
TokenMask Group::ChooseForOutput(ChooseTask task, ChooseScratch* scratch) const {
  const Plan& plan = row_->plan;
  const double eta = plan.prove == Guarantee::kConfidence ? plan.failure_probability : 0.0;
  const SampleCosts costs =
      SampleCostsOf(CountTokens(task.candidates), shape_->layout.vector_bytes());
  TokenMask cheapest;
  double least = std::numeric_limits<double>::infinity();
  for (const uint32_t draws : kDrawOptions) {
    if (draws > 0 && (eta == 0.0 || draws > plan.draws_max)) break;
    const CompensationPlan compensation =
        PlanCompensation(static_cast<double>(plan.keep.output_limit), eta, draws);
    task.sample_factor = compensation.factor;
    task.mass_limit = static_cast<float>(compensation.share);
    TokenMask tokens = Choose(task, scratch);
    const double cost =
        PlannedVectors(costs, CountTokens(tokens), head_count(), draws, /*with_values=*/true);
    if (!(cost < least)) continue;
    least = cost;
    cheapest = std::move(tokens);
  }
  return cheapest;
}

void Group::Decide(ChooseScratch* scratch) {
  if (!has_choice_) return;
  const Plan& plan = row_->plan;
  const bool proving = plan.prove != Guarantee::kNone;
  const TokenMask unread = AndNot(AndNot(AndNot(all_, always_), open_), frozen_chosen_);
  ChooseTask task;
  task.weights = &weights;
  task.candidates = candidates_;
  task.pool = pool_;
  task.unread = unread;
  task.always_lse = kept.lse;
  task.top_k = places_;
  if (scanned_) {
    task.proving = proving;
    task.mass_limit = plan.keep.mass_limit;
    task.dilate_strongest = plan.keep.dilate_strongest;
    task.dilate_radius = plan.keep.dilate_radius;
  }
  const TokenMask open_chosen = ChooseTokens(task, scratch);
  const TokenMask chosen = Or(open_chosen, frozen_chosen_);
  if (reused_) {
    lists()->Complete(kv_head_, anchor_, PositionsOf(chosen, block_begin_), covered_end_);
    CompleteAnchor(open_chosen);
  }
  Settle(chosen);
}

// What the completed list leaves out of the tokens that competed for its places.
void Group::CompleteAnchor(const TokenMask& chosen) {
  if (lists()->anchor(kv_head_, anchor_).sharing.empty()) return;
  const TokenMask left = AndNot(candidates_, chosen);
  if (CountTokens(left) == 0) return;
  for (uint32_t head = newest_head(); head < head_count(); ++head) {
    const double log_chosen = SumEstimates(weights, head, chosen).Log();
    const double log_read = LogAdd(kept.lse[head], log_chosen);
    lists()->Leave(kv_head_, anchor_, head - newest_head(),
                   SumEstimates(weights, head, left).Log() - log_read);
  }
}

// What an anchor that was just found by a scan remembers; `chosen` are its list.
SharingTerms Group::TermsOfAnchor(const TokenMask& chosen) const {
  AnchorTask task;
  task.shape = shape_;
  task.view = &row_->view;
  task.memory = memory_;
  task.kv_head = kv_head_;
  task.queries = &queries_;
  task.first_head = newest_head();
  task.anchor_queries = anchor_queries_;
  task.block_begin = block_begin_;
  task.always = always_;
  task.open = open_;
  task.chosen = chosen;
  task.weights = &weights;
  task.always_lse = kept.lse;
  return MakeSharingTerms(task);
}

TokenMask Group::Unread() const { return AndNot(read_, first_); }

TokenMask Group::Rest() const { return AndNot(all_, read_); }

bool Group::wants_rest() const {
  return row_->plan.prove == Guarantee::kExact || wants_rest_values();
}

void Group::SetValueNorms() {
  // Tokens whose norms no sketch bounds, and the largest norm of those that one does.
  TokenMask unsketched = all_;
  double whole = 0.0;
  double sealed = 0.0;
  for (uint32_t i = 0; i < all_.size(); ++i) {
    if (!IsSealed(i)) continue;
    const auto norm = static_cast<double>(memory_->ValueNormMax(block_begin_ + i));
    sealed = std::max(sealed, norm);
    if (all_[i] == ~uint64_t{0}) whole = std::max(whole, norm);
    unsketched[i] = all_[i] & memory_->Exact(block_begin_ + i);
  }
  value_norms_ = JoinValueNorms(memory_->BoundValueNorms(unsketched, block_begin_), sealed, whole);
}

HeadEvidence Group::EvidenceOf(uint32_t head, const TokenMask& dropped, bool estimated,
                               std::vector<float>* output) const {
  const Guarantee prove = row_->plan.prove;
  HeadEvidence evidence;
  evidence.log_kept = kept.lse[head];
  evidence.kept_lower = kept.lower[head];
  evidence.kept_upper = kept.upper[head];
  const TokenMask seen =
      InRange(dropped, block_begin_, queries_.visible_begin[head], queries_.visible_end[head]);
  if (CountTokens(seen) == 0) {
    evidence.level = Level::kExact;
    evidence.log_dropped_estimate = kLogZero;
  } else if (prove == Guarantee::kExact) {
    evidence.level = Level::kExact;
    evidence.dropped_upper = rest.upper[head];
    evidence.dropped_lower = rest.lower[head];
    evidence.log_dropped_estimate = rest.lse[head];
  } else if (Proves(prove)) {
    evidence.level = Level::kDeterministic;
    const WeightSums sums = SumWeights(weights, head, dropped);
    evidence.dropped_upper = sums.upper;
    evidence.dropped_lower = sums.lower;
    evidence.log_dropped_estimate = sums.log_estimate;
  }
  if (estimated && std::isnan(evidence.log_dropped_estimate)) {
    evidence.log_dropped_estimate = SumEstimates(weights, head, dropped).Log();
  }
  if (prove == Guarantee::kNone) return evidence;
  const uint32_t head_dim = shape_->layout.head_dim;
  output->resize(head_dim);
  for (uint32_t c = 0; c < head_dim; ++c) {
    (*output)[c] = static_cast<float>(kept.out[size_t{head} * head_dim + c]);
  }
  evidence.output = output->data();
  evidence.value_norm_lower = value_norms_.lower;
  evidence.value_norm_upper = value_norms_.upper;
  evidence.arithmetic_error = OutputArithmeticError(value_norms_, kept.arithmetic[head]);
  return evidence;
}

Action Group::ActionOf() const {
  if (row_->plan.mode == Mode::kShadow) return Action::kDense;
  if (rounds_grown_ > 0) return Action::kGrown;
  if (everything_ && read_ == all_) return Action::kDense;
  return reused_ ? Action::kReused : Action::kSelected;
}

namespace {

// The dropped tokens of one head, for its proof.
class Dropped : public DroppedTokens {
 public:
  Dropped(const LayerShape& shape, const AttendRow& row, uint32_t kv_head,
          const HeadQueries& queries, const GroupMemory& memory, const ScanWeights& weights,
          const TokenMask& mask, ProofScratch* scratch)
      : shape_(shape),
        row_(row),
        kv_head_(kv_head),
        queries_(queries),
        memory_(memory),
        weights_(weights),
        mask_(mask),
        scratch_(scratch) {}

  void SetHead(uint32_t head) { head_ = head; }

  const Population* Weigh() override {
    const bool known = FillPopulation(weights_, head_, mask_, &scratch_->population);
    return known ? &scratch_->population : nullptr;
  }

  void BoundValues(const Population& population, std::vector<float>* bounds) override {
    bounds->assign(population.weights.size(), 0.0F);
    for (uint32_t i = 0; i < mask_.size(); ++i) {
      if (mask_[i] == 0) continue;
      memory_.BoundValues(weights_.block_begin + i, &(*bounds)[size_t{i} * kBlockTokens]);
    }
  }

  void Read(absl::Span<const uint32_t> positions, double ref, absl::Span<DrawnWeight> weights,
            float* values) override {
    scratch_->scores.resize(positions.size());
    ScoreTask task;
    task.shape = &shape_;
    task.view = &row_.view;
    task.kv_head = kv_head_;
    task.queries = &queries_;
    task.head = head_;
    task.positions = positions;
    memory_.Score(task, scratch_->scores.data(), values);
    for (size_t i = 0; i < positions.size(); ++i) {
      const Score& score = scratch_->scores[i];
      weights[i] = WeightOfLogit(WidenDown(score.logit - score.error), score.logit,
                                 WidenUp(score.logit + score.error), ref);
    }
  }

 private:
  const LayerShape& shape_;
  const AttendRow& row_;
  const uint32_t kv_head_;
  const HeadQueries& queries_;
  const GroupMemory& memory_;
  const ScanWeights& weights_;
  const TokenMask& mask_;
  ProofScratch* const scratch_;
  uint32_t head_ = 0;
};

}  // namespace

// Proves what can be proven of all heads; false if a limit does not hold.
bool Group::ProveAll(ProofScratch* scratch) {
  const TokenMask rest_mask = Rest();
  const bool estimated = Proves(row_->plan.prove) || (has_choice_ && IsSubset(rest_mask, pool_));
  Dropped dropped(*shape_, *row_, kv_head_, queries_, *memory_, weights, rest_mask, scratch);
  bool met = true;
  for (uint32_t head = 0; head < head_count(); ++head) {
    const HeadEvidence evidence = EvidenceOf(head, rest_mask, estimated, &scratch->output);
    const LogMassLower moved = rounds_grown_ > 0 ? grown.lower[head] : LogMassLower();
    dropped.SetHead(head);
    proofs_[head].Prove(evidence, moved, draws_planned_, &dropped);
    met &= proofs_[head].met();
  }
  return met;
}

// Adds to what is read the heaviest tokens of the heads whose limits do not hold yet. False if
// reading everything is the better answer.
bool Group::ChooseMore() {
  if (rounds_grown_ == FailureBudget::kRoundsMax) return false;
  const TokenMask rest_mask = Rest();
  more_.assign(all_.size(), 0);
  for (uint32_t head = 0; head < head_count(); ++head) {
    const double wanted = proofs_[head].log_wanted();
    if (wanted == std::numeric_limits<double>::infinity()) return false;
    if (wanted == kLogZero) continue;
    ChooseHeaviest(weights, head, rest_mask, wanted, absl::MakeSpan(more_));
  }
  const uint32_t count = CountTokens(more_);
  const double read = CountTokens(read_) + count;
  const double visible = CountTokens(always_) + CountTokens(middle_);
  if (count == 0 || read > static_cast<double>(row_->plan.dense_share) * visible) return false;
  read_ = Or(read_, more_);
  ++rounds_grown_;
  return true;
}

void Group::WriteCertificates(Action action) {
  for (uint32_t head = 0; head < head_count(); ++head) {
    HeadCertificate& certificate = row_->certificates[OutputIndex(head)];
    certificate = proofs_[head].certificate();
    if (certificate.action != Action::kCompensated) certificate.action = action;
  }
}

void Group::WriteAnswer(const TokenMask& read, Action action, bool compensate) {
  const uint32_t head_dim = shape_->layout.head_dim;
  GroupReport& report = row_->groups[kv_head_];
  report.action = action;
  report.keys_sampled = 0;
  report.rows_sampled = 0;
  for (uint32_t head = 0; head < head_count(); ++head) {
    const size_t index = OutputIndex(head);
    const HeadProof& proof = proofs_[head];
    report.keys_sampled += proof.certificate().keys_sampled;
    report.rows_sampled += proof.certificate().rows_sampled;
    const absl::Span<const double> correction =
        compensate ? proof.correction() : absl::Span<const double>();
    double lse = kept.lse[head];
    if (!correction.empty()) {
      report.action = Action::kCompensated;
      const double top = std::max(lse, proof.log_compensated());
      lse = top + std::log(std::exp(lse - top) + std::exp(proof.log_compensated() - top));
    }
    row_->lse[index] = static_cast<float>(lse);
    const double* out = &kept.out[size_t{head} * head_dim];
    for (uint32_t c = 0; c < head_dim; ++c) {
      const auto plain = static_cast<float>(out[c]);
      row_->out[index * head_dim + c] =
          correction.empty() ? plain
                             : static_cast<float>(static_cast<double>(plain) + correction[c]);
    }
  }
  if (row_->selected != nullptr) row_->selected[kv_head_] = PositionsOf(read, block_begin_);
  report.scanned = scanned_;
  report.tokens_read = CountTokens(read_);
  report.similarity = similarity_;
  report.sharing_estimate = sharing_estimate_;
  report.key_norm_max = key_norm_max_;
  report.query_distance = query_distance_;
}

Group::Verdict Group::Conclude(ProofScratch* scratch) {
  const Plan& plan = row_->plan;
  if (rounds_grown_ == 0) {
    TokenMask scanned = has_choice_ ? pool_ : TokenMask(all_.size(), 0);
    if (Proves(plan.prove)) scanned = Or(scanned, Rest());
    row_->groups[kv_head_].tokens_scanned = CountTokens(scanned);
  } else {
    MergePartials(shape_->layout.head_dim, grown, &kept);
  }
  const bool met = ProveAll(scratch);
  if (!met && plan.mode == Mode::kEnforce && plan.on_violation != OnViolation::kReport) {
    if (plan.on_violation == OnViolation::kGrow && Proves(plan.prove) && ChooseMore()) {
      return Verdict::kReadMore;
    }
    WriteCertificates(ActionOf());
    return plan.on_violation == OnViolation::kFail ? Verdict::kFailed : Verdict::kReadRest;
  }
  WriteCertificates(ActionOf());
  const TokenMask selected = read_;
  const bool shadow = plan.mode == Mode::kShadow;
  if (shadow) {
    MergePartials(shape_->layout.head_dim, rest, &kept);
    read_ = all_;
  }
  WriteAnswer(selected, ActionOf(), /*compensate=*/!shadow);
  return Verdict::kDone;
}

void Group::ConcludeDense(ProofScratch* scratch) {
  MergePartials(shape_->layout.head_dim, rest, &kept);
  read_ = all_;
  RememberDense();
  // What was moved no longer matters: nothing is dropped.
  rounds_grown_ = 0;
  ProveAll(scratch);
  WriteCertificates(Action::kDense);
  WriteAnswer(read_, Action::kDense, /*compensate=*/false);
}

}  // namespace kvservice
