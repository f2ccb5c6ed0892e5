#include "attention/cuda/direct.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "attention/cpu/score_kernel.h"
#include "attention/cpu/token_mask.h"
#include "attention/cpu/weight_sums.h"
#include "attention/head_proof.h"
#include "attention/host_lists.h"

namespace kvservice::cuda {
namespace {

// Groups are answered in waves, so that the weights of their scans stay below this, or in a wave of
// their own.
constexpr size_t kWaveBytesMax = size_t{1} << 30;
constexpr size_t kWaveGroupsMax = 4096;
// Of a part's blocks, times as many parts as sums of a histogram can count.
constexpr uint32_t kBlocksMax = 16384;

HostLists* ListsOf(const AttendRow& row) { return static_cast<HostLists*>(row.plan.lists); }

bool HasLimit(const Plan& plan) {
  return plan.max_dropped_mass < 1.0F || std::isfinite(plan.max_output_error);
}

// The choice follows from the scan alone.
bool ChoosesDirectly(const KeepRule& keep) {
  if (keep.dilate_strongest > 0 && keep.dilate_radius > 0) return false;
  return keep.mass_limit > 0.0F || keep.output_limit == 0.0F;
}

bool HasHidden(const LayerShape& shape, const AttendRow& row) {
  const uint32_t begin = WindowBegin(shape.sliding_window, row.position);
  return row.plan.visible_begin > std::max(row.plan.sink_end, begin);
}

bool IsRememberedDense(const LayerShape& shape, const AttendRow& row, uint32_t kv_head) {
  return row.plan.source == Source::kScan && row.plan.dense_positions > 0 &&
         row.plan.lists != nullptr && !HasHidden(shape, row) &&
         ListsOf(row)->IsDense(kv_head, row.position);
}

// What a wave says about one group, on its way to an answer.
class Answerer {
 public:
  Answerer(const LayerShape& shape, const Wave& wave, const WaveGroup& group,
           const ReusableAnchor& anchor, AnswerScratch* scratch)
      : shape_(shape),
        anchor_(anchor),
        group_(group),
        row_(*group.row),
        stats_(*group.stats.host),
        chooses_(wave.chooses()),
        everything_(group.reads_all || stats_.everything != 0),
        hidden_(row_.view.length - group.begin - stats_.always - stats_.middle),
        unsummed_(everything_ && !group.reads_all && hidden_ > 0 && stats_.chosen < stats_.middle),
        kept_(scratch->kept),
        certificates_(scratch->certificates) {
    wave.Kept(group, &scratch->kept, &scratch->part);
  }

  // False if the host has to decide.
  bool Answer() {
    // Without a proof they are not needed, if it is known who sees what is hidden: all heads,
    // unless the window of a later query token has left it behind.
    const bool all_see = row_.query_count == 1 || shape_.sliding_window == 0;
    if (unsummed_ && (row_.plan.prove != Guarantee::kNone || !all_see)) return false;
    // What competed for a list is not known then.
    if (everything_ && group_.competes) return false;
    // Then everything should have been read.
    const double visible = static_cast<double>(stats_.always) + stats_.middle;
    const double planned = static_cast<double>(stats_.always) + stats_.listed;
    const double share = static_cast<double>(row_.plan.dense_share);
    if (group_.listed && planned > share * visible) return false;
    if (!Prove()) return false;
    Write();
    Remember();
    return true;
  }

 private:
  uint32_t head_count() const { return group_.queries->head_count; }

  HeadEvidence EvidenceOf(uint32_t head, const ValueNorms& norms) const {
    const Guarantee prove = row_.plan.prove;
    HeadEvidence evidence;
    evidence.log_kept = kept_.lse[head];
    evidence.kept_lower = kept_.lower[head];
    evidence.kept_upper = kept_.upper[head];
    // Lists come without a proof, and all heads of their one query token see the same tokens.
    if (group_.has_list() && stats_.listed < stats_.middle + hidden_) return evidence;
    const bool drops = chooses_ && group_.dropped.host[head].seen > 0;
    if (!drops && !unsummed_) {
      evidence.level = Level::kExact;
      evidence.log_dropped_estimate = kLogZero;
    } else if (drops) {
      const DroppedSums& dropped = group_.dropped.host[head];
      const MaskSums sums{.weight = {dropped.weight, dropped.reference},
                          .lower = {dropped.lower, dropped.reference},
                          .estimate = {dropped.estimate, dropped.reference}};
      if (prove != Guarantee::kNone) {
        evidence.level = Level::kDeterministic;
        const WeightSums bounds = WeightSumsOf(sums);
        evidence.dropped_upper = bounds.upper;
        evidence.dropped_lower = bounds.lower;
        evidence.log_dropped_estimate = bounds.log_estimate;
      } else if (!group_.reads_all && hidden_ == 0) {
        evidence.log_dropped_estimate = sums.weight.Log();
      }
    }
    if (prove == Guarantee::kNone) return evidence;
    evidence.output = group_.out.host + size_t{head} * shape_.layout.head_dim;
    evidence.value_norm_lower = norms.lower;
    evidence.value_norm_upper = norms.upper;
    evidence.arithmetic_error = OutputArithmeticError(norms, kept_.arithmetic[head]);
    return evidence;
  }

  // Certificates; false if a limit does not hold and the plan does not leave it at that.
  bool Prove() {
    const uint32_t group_size = shape_.layout.group_size();
    Plan plan = row_.plan;
    // Samples are the host's to draw, where this is not enough.
    if (plan.prove == Guarantee::kConfidence) plan.prove = Guarantee::kDeterministic;
    ValueNorms norms;
    if (plan.prove != Guarantee::kNone) {
      norms = JoinValueNorms(ValueNormsOf(static_cast<double>(stats_.value_squares)),
                             static_cast<double>(stats_.norm_max),
                             static_cast<double>(stats_.whole_norm_max));
    }
    const bool insists =
        row_.plan.prove == Guarantee::kConfidence || row_.plan.on_violation != OnViolation::kReport;
    HeadProof proof;
    certificates_.clear();
    for (uint32_t head = 0; head < head_count(); ++head) {
      const DrawStream stream{.kv_head = static_cast<uint16_t>(group_.kv_head),
                              .query_head = static_cast<uint16_t>(head % group_size),
                              .query_token = head / group_size};
      proof.Begin(plan, shape_.layout.head_dim, row_.draw_key, stream);
      proof.Prove(EvidenceOf(head, norms), LogMassLower(), 0, nullptr);
      if (insists && !proof.met()) return false;
      certificates_.push_back(proof.certificate());
    }
    return true;
  }

  void Write() {
    const uint32_t dim = shape_.layout.head_dim;
    Action action = everything_ && hidden_ == 0 ? Action::kDense : Action::kSelected;
    if (anchor_.anchor >= 0 && action != Action::kDense) action = Action::kReused;
    for (uint32_t head = 0; head < head_count(); ++head) {
      const size_t index = OutputIndex(shape_.layout, group_.kv_head, head);
      row_.certificates[index] = certificates_[head];
      row_.certificates[index].action = action;
      row_.lse[index] = static_cast<float>(kept_.lse[head]);
      std::copy_n(group_.out.host + size_t{head} * dim, dim, row_.out + index * dim);
    }
    GroupReport& report = row_.groups[group_.kv_head];
    report = GroupReport();
    report.action = action;
    report.scanned = !group_.settled() && !group_.competes;
    report.tokens_read = stats_.always + (everything_ ? stats_.middle : stats_.chosen);
    if (group_.listed) report.tokens_read += stats_.listed;
    report.tokens_scanned = group_.scanned_before + stats_.scanned;
    if (row_.plan.source == Source::kReuse) ReportReuse(&report);
    if (row_.selected == nullptr) return;
    const size_t blocks = BlockCount(row_.view.length) - group_.block_begin;
    TokenMask read(group_.first.host, group_.first.host + blocks);
    for (size_t i = 0; chooses_ && i < blocks; ++i) read[i] |= group_.chosen.host[i];
    row_.selected[group_.kv_head] = PositionsOf(read, group_.block_begin);
  }

  void ReportReuse(GroupReport* report) {
    HostLists* const lists = ListsOf(row_);
    report->similarity = anchor_.similarity;
    report->sharing_estimate = anchor_.estimate;
    report->query_distance = group_.query_distance;
    const auto new_norm_max = [this](uint32_t /*begin*/, uint32_t /*end*/) {
      return LargestKeyNorm(stats_.key_squares);
    };
    report->key_norm_max = lists->KeyNormMax(group_.kv_head, row_.view.length, new_norm_max);
  }

  // What the lists keep of the choice, as Group::Settle does it.
  void Remember() {
    HostLists* const lists = ListsOf(row_);
    if (lists == nullptr) return;
    const Plan& plan = row_.plan;
    if (anchor_.anchor >= 0) lists->Touch(group_.kv_head, static_cast<uint32_t>(anchor_.anchor));
    if (everything_ || !plan.keeps_selection) lists->ClearSelection(group_.kv_head);
    if (group_.listed) {
      if (plan.keeps_selection) RememberList(lists);
      return;
    }
    if (!everything_) return RememberChoice(lists);
    if (plan.dense_positions == 0 || plan.source != Source::kScan || group_.reads_all) return;
    // From the next position on: this one, if it is asked for again, is tried again.
    const uint32_t begin = row_.position + 1;
    lists->SetDense(group_.kv_head, begin, begin + plan.dense_positions);
  }

  void RememberList(HostLists* lists) const {
    std::vector<uint32_t> read(group_.list.begin(), group_.list.end());
    for (uint32_t at = group_.fresh_begin; at < group_.fresh_end; ++at) read.push_back(at);
    lists->SetSelection(group_.kv_head, read);
  }

  void RememberChoice(HostLists* lists) const {
    const bool keeps = row_.plan.keeps_selection;
    if (!keeps && !group_.competes && group_.anchor_queries.empty()) return;
    const size_t blocks = BlockCount(row_.view.length) - group_.block_begin;
    std::vector<uint32_t> positions =
        PositionsOf(absl::MakeConstSpan(group_.chosen.host, blocks), group_.block_begin);
    if (keeps) lists->SetSelection(group_.kv_head, positions);
    if (group_.competes) return Complete(lists, std::move(positions));
    if (group_.anchor_queries.empty()) return;
    lists->Insert(group_.kv_head, group_.anchor_queries, std::move(positions), group_.covered_end,
                  group_.verifies ? TermsOfAnchor() : SharingTerms());
  }

  // ln of what was read, in any case and of the choice by its estimates, for one of the newest
  // query token's heads.
  double LogRead(uint32_t i) const {
    const HeadSums& first = group_.first_sums.host[head_count() - shape_.layout.group_size() + i];
    const HeadSums& chosen = group_.anchor_sums.host[i];
    return ScaledSum{first.sum + chosen.sum, first.reference}.Log();
  }
  // And of what competed or was scanned, and was not chosen.
  double LogLeft(uint32_t i) const {
    const DroppedSums& dropped = group_.dropped.host[head_count() - shape_.layout.group_size() + i];
    return ScaledSum{dropped.weight, dropped.reference}.Log();
  }

  SharingTerms TermsOfAnchor() const {
    const uint32_t group_size = shape_.layout.group_size();
    const uint32_t dim = shape_.layout.head_dim;
    SharingTerms terms;
    terms.queries.reserve(group_.anchor_queries.size());
    for (const float q : group_.anchor_queries) terms.queries.push_back(shape_.scale * q);
    for (uint32_t i = 0; i < group_size; ++i) {
      terms.log_odds.push_back(static_cast<float>(LogLeft(i) - LogRead(i)));
    }
    const float* const shift = group_.anchor_shift.host;
    terms.shift.assign(shift, shift + size_t{group_size} * dim);
    terms.variance.assign(group_.anchor_variance.host, group_.anchor_variance.host + dim);
    return terms;
  }

  void Complete(HostLists* lists, std::vector<uint32_t> positions) const {
    const auto index = static_cast<uint32_t>(anchor_.anchor);
    const bool leaves = stats_.listed > positions.size();
    lists->Complete(group_.kv_head, index, std::move(positions), group_.covered_end);
    if (!group_.verifies || !leaves) return;
    for (uint32_t i = 0; i < shape_.layout.group_size(); ++i) {
      lists->Leave(group_.kv_head, index, i, LogLeft(i) - LogRead(i));
    }
  }

  const LayerShape& shape_;
  const ReusableAnchor anchor_;
  const WaveGroup& group_;
  AttendRow& row_;
  const ChoiceStats& stats_;
  const bool chooses_;
  const bool everything_;
  const uint32_t hidden_;
  // Something is hidden beside everything else, and sums of what is dropped were of more than that.
  const bool unsummed_;
  const Partial& kept_;
  std::vector<HeadCertificate>& certificates_;
};

}  // namespace

bool Direct::Takes(const LayerShape& shape, const AttendRow& row) {
  const Plan& plan = row.plan;
  if (plan.mode != Mode::kEnforce || plan.prove == Guarantee::kExact) return false;
  // Samples without a limit to stop at are always drawn.
  if (plan.prove == Guarantee::kConfidence && !HasLimit(plan)) return false;
  if (row.query_count * shape.layout.group_size() > kChoiceHeadsMax) return false;
  if (BlockCount(row.view.length) > kBlocksMax) return false;
  if (plan.source == Source::kAll) return true;
  if (plan.source == Source::kReuse || plan.source == Source::kGiven) {
    return plan.prove == Guarantee::kNone && row.query_count == 1 && plan.frozen_lists == nullptr;
  }
  return plan.source == Source::kScan && plan.frozen_lists == nullptr && ChoosesDirectly(plan.keep);
}

namespace {

uint32_t LocalBegin(const AttendRow& row) { return std::min(row.plan.local_begin, row.position); }

// The first token of the middle that a choice of this call has not considered (HostLists).
uint32_t CoveredEnd(const AttendRow& row) {
  const uint32_t local_begin = LocalBegin(row);
  for (uint32_t block = 0; block * kBlockTokens < local_begin; ++block) {
    if (row.view.sketches[block] == nullptr) {
      return std::max(block * kBlockTokens, row.plan.sink_end);
    }
  }
  return local_begin;
}

// Positions of an ascending list that lie in [begin, end).
absl::Span<const uint32_t> PartOf(absl::Span<const uint32_t> list, uint32_t begin, uint32_t end) {
  const auto first = std::lower_bound(list.begin(), list.end(), begin);
  const auto last = std::lower_bound(first, list.end(), end);
  return list.subspan(static_cast<size_t>(first - list.begin()), static_cast<size_t>(last - first));
}

}  // namespace

// What is asked of one group; any thread, one per KV head.
void Direct::Ask(const LayerShape& shape, absl::Span<AttendRow> rows,
                 absl::Span<const RowTables> tables,
                 absl::Span<const absl::Span<const float>> unrotated, Asked* asked) const {
  AttendRow& row = rows[asked->name.row];
  const Plan& plan = row.plan;
  const uint32_t kv_head = asked->name.kv_head;
  WaveGroup& group = asked->group;
  group.row = &row;
  group.tables = tables[asked->name.row];
  group.kv_head = kv_head;
  if (plan.source == Source::kAll || plan.source == Source::kScan) {
    group.reads_all = plan.source == Source::kAll || IsRememberedDense(shape, row, kv_head);
    const bool settled = group.reads_all && !HasHidden(shape, row);
    asked->kind = plan.prove != Guarantee::kNone ? Kind::kProving
                  : settled                      ? Kind::kSettled
                                                 : Kind::kChoosing;
    return;
  }
  const uint32_t local_begin = LocalBegin(row);
  const uint32_t begin = std::max(
      {plan.sink_end, plan.visible_begin, WindowBegin(shape.sliding_window, row.position)});
  if (plan.source == Source::kReuse) {
    HostLists* const lists = ListsOf(row);
    const size_t floats = size_t{shape.layout.group_size()} * shape.layout.head_dim;
    const auto queries = unrotated[asked->name.row].subspan(kv_head * floats, floats);
    asked->anchor = FindReusable(*lists, shape, plan, kv_head, row.view.length - 1, queries);
    group.norm_begin = lists->key_norm_end(kv_head);
    if (asked->anchor.anchor < 0) {
      if (!ChoosesDirectly(plan.keep)) return;
      group.anchor_queries = queries;
      group.verifies = plan.reuse_mass_limit > 0.0F;
      group.covered_end = covered_ends_[asked->name.row];
      asked->kind = Kind::kChoosing;
      return;
    }
    const auto index = static_cast<uint32_t>(asked->anchor.anchor);
    const HostLists::Anchor& anchor = lists->anchor(kv_head, index);
    const uint32_t covered_end = std::max(anchor.covered_end, covered_ends_[asked->name.row]);
    const uint32_t fresh_begin = std::max(anchor.covered_end, begin);
    group.list = PartOf(anchor.tokens, begin, local_begin);
    // Lists hold nothing from where they have looked on.
    group.fresh_begin = fresh_begin;
    group.fresh_end = std::max(fresh_begin, std::min(covered_end, local_begin));
    group.query_distance = lists->QueryDistance(kv_head, index, queries);
    // Those that sketches mark `exact` are counted too, as only the device knows them.
    if (group.fresh_end - group.fresh_begin > kFreshTokensMax) {
      group.competes = true;
      group.places = std::max(static_cast<uint32_t>(group.list.size()), plan.keep.top_k);
      group.verifies = !anchor.sharing.empty();
      group.covered_end = covered_end;
      asked->kind = Kind::kChoosing;
      return;
    }
  } else {
    const uint32_t first = plan.given_offsets[kv_head];
    group.list = PartOf(plan.given.subspan(first, plan.given_offsets[kv_head + 1] - first), begin,
                        local_begin);
  }
  // Whether so much is planned that everything is read instead depends on what sketches mark, too:
  // at least so much, of at most so much. Where that does not tell, what comes back does.
  const double planned =
      static_cast<double>(group.listed_count()) + plan.sink_end + (row.view.length - local_begin);
  const double visible = static_cast<double>(row.view.length) - begin + plan.sink_end;
  group.reads_all = planned > static_cast<double>(plan.dense_share) * visible;
  group.listed = !group.reads_all;
  const bool settled = group.listed || !HasHidden(shape, row);
  asked->kind = settled ? Kind::kSettled : Kind::kChoosing;
}

// Groups of one kind in waves, none with too many weights.
void Direct::CutWaves(Kind kind, std::vector<std::vector<Asked*>>* waves) {
  size_t bytes = 0;
  bool open = false;
  for (Asked& asked : all_) {
    if (asked.kind != kind) continue;
    const size_t more =
        kind == Kind::kSettled ? 0 : Wave::WeightBytes(*shape_, rows_[asked.name.row]);
    if (!open || bytes + more > kWaveBytesMax || waves->back().size() == kWaveGroupsMax) {
      waves->emplace_back();
      bytes = 0;
      open = true;
    }
    waves->back().push_back(&asked);
    bytes += more;
  }
}

void Direct::Send(std::vector<Asked*> asked, absl::FunctionRef<bool()> append, Flight* flight) {
  flight->asked = std::move(asked);
  std::vector<WaveGroup> groups = flight->wave->TakeGroups();
  groups.reserve(flight->asked.size());
  for (const Asked* each : flight->asked) groups.push_back(each->group);
  flight->wave->Fly(*shape_, std::move(groups), pool_, stream_, append);
}

void Direct::Answer(Flight* flight, std::vector<GroupName>* left) {
  if (flight->asked.empty()) return;
  const Wave& wave = *flight->wave;
  flight->wave->Wait();
  std::vector<uint8_t> answered(flight->asked.size());
  scratch_.resize(pool_->thread_count());
  const uint32_t stride = pool_->thread_count();
  pool_->ParallelFor(
      static_cast<uint32_t>(answered.size()),
      [&](uint32_t i, uint32_t thread) {
        // Probably this thread's next.
        if (i + stride < answered.size()) wave.Prefetch(wave.group(i + stride));
        Answerer answerer(*shape_, wave, wave.group(i), flight->asked[i]->anchor,
                          &scratch_[thread]);
        answered[i] = answerer.Answer() ? 1 : 0;
      },
      kGroupsPerThread);
  for (size_t i = 0; i < answered.size(); ++i) {
    answered_ += answered[i];
    if (answered[i] != 0) continue;
    if (!MayTryAgain(*flight, i)) {
      left->push_back(flight->asked[i]->name);
      continue;
    }
    const WaveGroup& group = wave.group(i);
    const Plan& plan = group.row->plan;
    Asked& again = again_.emplace_back();
    again.name = flight->asked[i]->name;
    again.kind = Kind::kProving;
    again.group.row = group.row;
    again.group.tables = group.tables;
    again.group.kv_head = group.kv_head;
    again.group.scanned_before = group.stats.host->scanned;
    again.group.mass_limit = 0.5F * std::min(plan.keep.mass_limit, plan.max_dropped_mass);
  }
  flight->asked.clear();
}

// A choice by mass may miss its limit by a little, as long rows are counted by a sample. Then one
// that aims at half of it costs a small wave, where the host's decisions cost a hundred times that.
bool Direct::MayTryAgain(const Flight& flight, size_t index) const {
  const WaveGroup& group = flight.wave->group(index);
  return flight.asked[index]->kind == Kind::kProving && !group.settled() &&
         group.row->plan.keep.mass_limit > 0.0F && group.mass_limit == 0.0F &&
         group.stats.host->everything == 0;
}

// Sends the groups of all_ on their way; of more waves than fly at a time the first are answered.
void Direct::SendAll(absl::FunctionRef<bool()> append, std::vector<GroupName>* left) {
  std::vector<std::vector<Asked*>> waves;
  for (const Kind kind : {Kind::kSettled, Kind::kChoosing, Kind::kProving}) CutWaves(kind, &waves);
  for (std::vector<Asked*>& wave : waves) {
    Flight* const flight = &flights_[next_flight_++ % flights_.size()];
    Answer(flight, left);
    Send(std::move(wave), append, flight);
  }
}

void Direct::AnswerAll(std::vector<GroupName>* left) {
  for (size_t i = 0; i < flights_.size(); ++i) {
    Answer(&flights_[(next_flight_ + i) % flights_.size()], left);
  }
}

void Direct::Begin(const LayerShape& shape, absl::Span<AttendRow> rows,
                   absl::Span<const RowTables> tables,
                   absl::Span<const absl::Span<const float>> unrotated,
                   absl::FunctionRef<bool()> append, std::vector<GroupName>* left) {
  shape_ = &shape;
  rows_ = rows;
  all_.clear();
  covered_ends_.assign(rows.size(), 0);
  bool compares = false;  // what a row asks for takes some work
  taken_.clear();
  for (uint32_t i = 0; i < rows.size(); ++i) {
    if (!Takes(shape, rows[i])) continue;
    compares |= rows[i].plan.source == Source::kReuse || rows[i].plan.source == Source::kGiven;
    if (rows[i].plan.source == Source::kReuse) covered_ends_[i] = CoveredEnd(rows[i]);
    taken_.push_back(i);
  }
  // In this order the groups of a row are mostly one thread's, as the row's other tasks are.
  for (uint32_t kv_head = 0; kv_head < shape.layout.kv_head_count; ++kv_head) {
    for (const uint32_t row : taken_) {
      all_.emplace_back();
      all_.back().name = {row, kv_head};
    }
  }
  const auto count = static_cast<uint32_t>(all_.size());
  pool_->ParallelFor(
      count, [&](uint32_t i, uint32_t) { Ask(shape, rows, tables, unrotated, &all_[i]); },
      compares ? kGroupsPerThread : std::max(count, 1U));
  for (const Asked& asked : all_) {
    if (asked.kind == Kind::kLeft) left->push_back(asked.name);
  }
  SendAll(append, left);
}

bool Direct::IsDone() const {
  return std::all_of(flights_.begin(), flights_.end(), [](const Flight& flight) {
    return flight.asked.empty() || flight.wave->IsDone();
  });
}

void Direct::Finish(std::vector<GroupName>* left) {
  AnswerAll(left);
  if (again_.empty()) return;
  all_.swap(again_);
  again_.clear();
  SendAll([] { return false; }, left);
  AnswerAll(left);
}

}  // namespace kvservice::cuda
