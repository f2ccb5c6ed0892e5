// How a wave is laid out: what its kernels read and write, and how they share it out.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention/cuda/wave.h"
#include "attention/sample_plan.h"

namespace kvservice::cuda {
namespace {

// Words of what is read in any case that one job takes: below the local window, where there are
// few tokens, and in it.
constexpr uint32_t kSparseWords = 256;
constexpr uint32_t kDenseWords = 4;
// Scans of long rows are faster in more jobs than run side by side: not all take as long.
constexpr uint32_t kScanRounds = 2;
// CTAs of a choice that run on one multiprocessor side by side, and blocks that are worth one.
constexpr uint32_t kChoiceCtas = 4;
constexpr uint32_t kPartBlocksMin = 32;
// Warps of a selection that are worth having on one multiprocessor, and the least that one takes.
constexpr uint32_t kSelectPlaces = 32;
constexpr uint32_t kBatchBlocksMin = 8;
// Beside ranks, longer rows are counted by a sample of at least so many tokens.
constexpr uint32_t kTokensCounted = 16384;
constexpr uint32_t kRunTokensMin = 8;  // of a block: what is read at once

// The share of a limit that a sample of so many tokens aims at: sums over a sample are off by about
// 1.3 over the root of its size.
double SampledShare(double tokens) { return 1.0 - 3.0 / std::sqrt(tokens); }

size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

void Wave::SetRanges(const WaveGroup& group, ChoiceGroup* choice) const {
  const AttendRow& row = *group.row;
  choice->slices = group.tables.slices + group.block_begin;
  choice->sketches = group.tables.sketches + group.block_begin;
  choice->ranges.begin = group.Relative(group.begin);
  choice->ranges.end = group.Relative(row.view.length);
  choice->ranges.sink_end = group.Relative(row.plan.sink_end);
  choice->ranges.visible_begin = group.Relative(row.plan.visible_begin);
  // The query tokens' own keys are never sketched away from them.
  choice->ranges.local_begin = group.Relative(std::min(row.plan.local_begin, row.position));
  choice->block_count = BlocksOf(group);
  choice->kv_head = group.kv_head;
  choice->head_count = HeadsOf(group);
}

void Wave::SetRules(const WaveGroup& group, ChoiceGroup* choice) const {
  const Plan& plan = group.row->plan;
  // Reading everything needs no sketch, not even to know that.
  // (A list is read beside what sketches mark.)
  choice->reads_sketches = !group.reads_all || group.has_hidden() || group.proves();
  choice->reads_middle = group.reads_all;
  choice->scans_middle = !group.settled();
  choice->scans_hidden = group.proves();
  choice->bounds_values = group.proves();
  choice->bounded = bounded_;
  choice->dense_share = plan.dense_share;
  if (group.settled()) return;
  choice->competes = group.competes;
  choice->top_k = group.top_k();
  // Rivals for places are ranked by what they weigh in all heads, whatever a scan would keep.
  choice->largest = group.proves() || (plan.keep.mass_limit > 0.0F && !group.competes);
  // Ranks are counted, not estimated.
  const uint32_t blocks = choice->block_count;
  while (choice->top_k == 0 && choice->sampled > kRunTokensMin &&
         uint64_t{blocks} * choice->sampled / 2 >= kTokensCounted) {
    choice->sampled /= 2;
  }
  double share = 1.0;
  if (!ranks_ && SampleStride(blocks, head_count_max_) > 1) {
    share = SampledShare(kRunTokens * SampledRuns(head_count_max_));
  } else if (ranks_ && choice->sampled < kBlockTokens) {
    share = SampledShare(static_cast<double>(blocks) * choice->sampled);
  }
  if (group.competes) return;
  choice->mass_limit = static_cast<float>(
      static_cast<double>(group.mass_limit > 0.0F ? group.mass_limit : plan.keep.mass_limit) *
      kPlannedShare * share);
}

// How the choice's kernels share out the group's blocks, of so many of all groups.
void Wave::ShareOut(uint32_t all_blocks, ChoiceGroup* choice) const {
  const auto ceil = [](uint32_t x, uint32_t y) { return (x + y - 1) / y; };
  const uint32_t blocks = choice->block_count;
  const auto groups = static_cast<uint32_t>(groups_.size());
  const uint32_t ctas = kChoiceCtas * context_.multiprocessors;
  const uint32_t wanted = std::min(ctas / groups, ceil(blocks, kPartBlocksMin));
  const uint32_t parts = std::max({1U, wanted, ceil(blocks, kPartBlocksMax)});
  choice->part_blocks = ceil(blocks, parts);
  choice->part_count = ceil(blocks, choice->part_blocks);
  choice->batch_blocks = kBatchBlocksMin;
  const uint32_t places = kSelectPlaces * context_.multiprocessors;
  while (choice->batch_blocks < kBatchBlocksMax && all_blocks / choice->batch_blocks > places) {
    choice->batch_blocks *= 2;
  }
  choice->select_count = ceil(blocks, choice->batch_blocks * kSelectWarps);
  choice->span_blocks = SpanBlocksOf(blocks);
}

void Wave::TakeWords(WaveGroup* group, ChoiceGroup* choice) {
  const uint32_t blocks = choice->block_count;
  const AttendRow& row = *group->row;
  const bool wants_read = row.selected != nullptr;
  Arena& first = wants_read ? to_host_ : scratch_;
  // A list that is read as it is is known.
  const bool keeps =
      row.plan.lists != nullptr && !group->listed &&
      (row.plan.keeps_selection || group->competes || !group->anchor_queries.empty());
  Arena& chosen = wants_read || keeps ? to_host_ : scratch_;
  group->first = first.Take<uint64_t>(blocks);
  group->chosen = chosen.Take<uint64_t>(blocks);
  choice->first = group->first.device;
  choice->chosen = group->chosen.device;
  choice->to_scan = scratch_.Take<uint64_t>(blocks).device;
  if (choice->bounds_values) choice->open_blocks = scratch_.Take<uint32_t>(blocks).device;
}

void Wave::TakeZeros(ChoiceGroup* choice) {
  const uint32_t heads = choice->head_count;
  size_t bytes = Aligned(2 * sizeof(uint32_t));
  if (ranks_) {
    bytes += Aligned(heads * sizeof(unsigned long long)) + Aligned(kBins * sizeof(uint32_t)) +
             Aligned(size_t{heads} * kBins * sizeof(uint32_t));
  }
  std::byte* zero = scratch_.Take<std::byte>(bytes).device;
  choice->zero = reinterpret_cast<uint4*>(zero);
  choice->zero_count = static_cast<uint32_t>(bytes / sizeof(uint4));
  const auto take = [&zero](auto** to, size_t count) {
    *to = reinterpret_cast<std::remove_pointer_t<decltype(to)>>(zero);
    zero += Aligned(count * sizeof(**to));
  };
  take(&choice->tickets, 2);
  if (!ranks_) return;
  take(&choice->hidden, heads);
  take(&choice->counts, kBins);
  take(&choice->sums, size_t{heads} * kBins);
}

void Wave::TakeScratch(const WaveGroup& group, ChoiceGroup* choice) {
  const uint32_t heads = choice->head_count;
  TakeZeros(choice);
  choice->scales = scratch_.Take<HeadScale>(heads).device;
  choice->span_counts = scratch_.Take<uint32_t>(choice->block_count).device;
  choice->part_sums = scratch_.Take<DroppedSums>(size_t{choice->select_count} * heads).device;
  if (choice->top_k > 0) {
    choice->ties = scratch_.Take<uint32_t>(size_t{choice->select_count} * kStepsOfBin).device;
  }
  if (!Scans(group)) return;
  const size_t pages = size_t{heads} * choice->block_count;
  choice->weights = scratch_.Take<float>(pages * kBlockTokens).device;
  choice->reference = scratch_.Take<int32_t>(pages).device;
  choice->page_sum = scratch_.Take<float>(pages).device;
  if (!bounded_) return;
  choice->lower_share = scratch_.Take<float>(pages).device;
  choice->estimate_share = scratch_.Take<float>(pages).device;
}

void Wave::TakeResults(uint32_t index) {
  WaveGroup& group = groups_[index];
  Inputs& inputs = inputs_[index];
  const uint32_t heads = HeadsOf(group);
  const size_t channels = size_t{heads} * shape_->layout.head_dim;
  group.out = on_host_.Take<float>(channels);
  group.first_sums = to_host_.Take<HeadSums>(heads);
  inputs.first_out = scratch_.Take<double>(channels);
  group.chosen_sums = {};
  inputs.chosen_out = {};
  if (!chooses_) return;
  group.chosen_sums = to_host_.Take<HeadSums>(heads);
  inputs.chosen_out = scratch_.Take<double>(channels);
  group.dropped = to_host_.Take<DroppedSums>(heads);
}

void Wave::SetList(uint32_t index) {
  const WaveGroup& group = groups_[index];
  if (!group.has_list()) return;
  ChoiceGroup& choice = choices_[index];
  choice.listed = scratch_.Take<uint64_t>(choice.block_count).device;
  choice.list = inputs_[index].list.host;
  choice.list_count = static_cast<uint32_t>(group.list.size());
  choice.fresh_begin = group.Relative(group.fresh_begin);
  choice.fresh_end = group.Relative(group.fresh_end);
}

void Wave::BuildChoices() {
  const size_t count = groups_.size();
  stats_ = to_host_.Take<ChoiceStats>(count);
  uint32_t all_blocks = 0;
  for (const WaveGroup& group : groups_) all_blocks += BlocksOf(group);
  // Of both attentions: a tile may be as small as one head.
  tickets_ = scratch_.Take<uint32_t>(2 * count * head_count_max_);
  choice_ = ChoiceCall();
  const Slot<ChoiceGroup> choices = to_device_.Take<ChoiceGroup>(count);
  choices_ = absl::MakeSpan(choices.host, count);
  choice_.groups = choices.device;
  for (uint32_t i = 0; i < count; ++i) {
    ChoiceGroup& choice = choices_[i];
    choice = ChoiceGroup();
    SetRanges(groups_[i], &choice);
    SetRules(groups_[i], &choice);
    ShareOut(all_blocks, &choice);
    TakeWords(&groups_[i], &choice);
    TakeResults(i);
    groups_[i].stats = {stats_.host + i, stats_.device + i};
    choice.stats = stats_.device + i;
    choice.visible = inputs_[i].visible.device;
    SetList(i);
    choice.first_sums = groups_[i].first_sums.device;
    choice.dropped = groups_[i].dropped.device;
    if (chooses_) TakeScratch(groups_[i], &choice);
    choice_.block_count_max = std::max(choice_.block_count_max, choice.block_count);
    choice_.part_count_max = std::max(choice_.part_count_max, choice.part_count);
    choice_.select_count_max = std::max(choice_.select_count_max, choice.select_count);
    if (groups_[i].norm_begin < groups_[i].row->view.length) {
      choice.norm_slices = groups_[i].tables.slices;
      choice.norm_begin = groups_[i].norm_begin;
      choice.norm_end = groups_[i].row->view.length;
      choice_.norm_tokens_max =
          std::max(choice_.norm_tokens_max, choice.norm_end - choice.norm_begin);
    }
  }
  choice_.shape = ShapeOf(shape_->layout);
  choice_.group_count = static_cast<uint32_t>(count);
  choice_.head_count_max = head_count_max_;
  choice_.ranks = ranks_;
  choice_.bounds_values = bounds_values_;
  choice_.overlaps = overlaps_;
  choice_.stats = stats_.device;
  choice_.tickets = tickets_.device;
  choice_.tickets_per_group = 2 * head_count_max_;
}

AttendSet Wave::SetOf(uint32_t index, const uint64_t* words) const {
  AttendSet set;
  set.slices = choices_[index].slices;
  set.tokens = words;
  set.qs = inputs_[index].set.qs;
  set.visible = inputs_[index].visible.device;
  set.head_count = choices_[index].head_count;
  set.kv_head = groups_[index].kv_head;
  return set;
}

// What is read in any case lies in known places, so its jobs are cut here, at even distances.
void Wave::CutFirst(uint32_t index, uint32_t words_per_job) {
  const ChoiceGroup& choice = choices_[index];
  std::vector<AttendJob>* const jobs = &inputs_[index].first_jobs;
  const uint32_t local = std::min(choice.ranges.local_begin / kWordTokens, choice.block_count);
  uint32_t job = 0;
  const auto cut = [&](uint32_t begin, uint32_t end, uint32_t step) {
    for (uint32_t word = begin; word < end; word += step) {
      jobs->push_back({.set = index,
                       .index = job++,
                       .first_word = word,
                       .word_count = std::min(step, end - word)});
    }
  };
  if (choice.reads_middle) {
    cut(0, choice.block_count, words_per_job);
    groups_[index].first_job_tokens_max = words_per_job * kWordTokens;
    return;
  }
  cut(0, local, kSparseWords);
  cut(local, choice.block_count, kDenseWords);
  groups_[index].first_job_tokens_max = kSparseWords * kWordTokens;
}

// Jobs of about as many tokens each: those of the list, and of the local window all.
void Wave::CutListed(uint32_t index, uint64_t tokens_per_job) {
  const WaveGroup& group = groups_[index];
  const ChoiceGroup& choice = choices_[index];
  std::vector<AttendJob>* const jobs = &inputs_[index].first_jobs;
  const uint32_t base = group.block_begin * kBlockTokens;
  const auto word_of = [&](size_t i) { return (group.list[i] - base) / kWordTokens; };
  uint32_t first = 0;
  uint64_t tokens = choice.ranges.sink_end;
  const auto cut = [&](uint32_t end) {
    if (end <= first) return;
    jobs->push_back({.set = index,
                     .index = static_cast<uint32_t>(jobs->size()),
                     .first_word = first,
                     .word_count = end - first});
    first = end;
    tokens = 0;
  };
  // A job ends with the word that fills it.
  for (size_t i = 0; i < group.list.size();) {
    const size_t wanted = std::max<uint64_t>(tokens_per_job, tokens + 1) - tokens;
    if (wanted > group.list.size() - i) {
      tokens += group.list.size() - i;
      break;
    }
    i += wanted;
    const uint32_t word = word_of(i - 1);
    while (i < group.list.size() && word_of(i) == word) ++i;
    cut(word + 1);
  }
  tokens += group.fresh_end - group.fresh_begin;
  const uint32_t local = std::min(choice.ranges.local_begin / kWordTokens, choice.block_count);
  for (uint32_t word = std::max(local, first); word < choice.block_count; ++word) {
    if (tokens >= tokens_per_job) cut(word);
    tokens += kWordTokens;
  }
  cut(choice.block_count);
}

void Wave::BuildFirst(ThreadPool* pool) {
  const auto count = static_cast<uint32_t>(groups_.size());
  first_ = AttendCall();
  first_.shape = choice_.shape;
  first_.softcap = shape_->logit_softcap;
  first_.bound_masses = bounded_;
  first_.head_count_max = head_count_max_;
  uint64_t total = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const ChoiceGroup& choice = choices_[i];
    if (choice.reads_middle) total += uint64_t{choice.block_count} * kWordTokens;
    if (!groups_[i].listed) continue;
    total += groups_[i].listed_count() + choice.ranges.end - choice.ranges.local_begin;
  }
  const uint64_t tokens = JobTarget(total, count, AttendPlaces(context_, first_), kJobTokensMin);
  const auto words_per_job = static_cast<uint32_t>((tokens + kWordTokens - 1) / kWordTokens);
  pool->ParallelFor(
      count,
      [&](uint32_t i, uint32_t) {
        inputs_[i].first_jobs.clear();
        if (groups_[i].listed) {
          CutListed(i, tokens);
        } else {
          CutFirst(i, words_per_job);
        }
      },
      lists_ ? kGroupsPerThread : count);
  size_t job_count = 0;
  for (uint32_t i = 0; i < count; ++i) job_count += inputs_[i].first_jobs.size();
  const Slot<AttendJob> jobs = attentions_.Take<AttendJob>(job_count);
  AttendJob* to = jobs.host;
  const Slot<AttendSet> sets = attentions_.Take<AttendSet>(count);
  for (uint32_t i = 0; i < count; ++i) {
    const std::vector<AttendJob>& own_jobs = inputs_[i].first_jobs;
    to = std::copy(own_jobs.begin(), own_jobs.end(), to);
    AttendSet set = SetOf(i, choices_[i].first);
    set.out = inputs_[i].first_out.device;
    set.sums = groups_[i].first_sums.device;
    set.job_count = static_cast<uint32_t>(own_jobs.size());
    set.tickets = tickets_.device + size_t{2} * i * head_count_max_;
    if (set.job_count > 1) {
      const size_t parts = size_t{set.job_count} * set.head_count;
      set.part_sums = scratch_.Take<HeadSums>(parts).device;
      set.parts = scratch_.Take<float>(parts * shape_->layout.head_dim).device;
    }
    sets.host[i] = set;
  }
  first_.sets = sets.device;
  first_.jobs = jobs.device;
  first_.job_count = static_cast<uint32_t>(job_count);
}

ScanSet Wave::ScanSetOf(uint32_t index) const {
  const ChoiceGroup& choice = choices_[index];
  const Inputs& inputs = inputs_[index];
  ScanSet set;
  set.sketches = choice.sketches;
  set.tokens = choice.to_scan;
  set.metric = inputs.table;
  set.qs = inputs.set.qs;
  set.x = inputs.set.x;
  set.qw = inputs.set.qw;
  set.norm = inputs.set.norm;
  set.visible = inputs.visible.device;
  // The choice only reads what is written here.
  set.weights = const_cast<float*>(choice.weights);
  set.reference = const_cast<int32_t*>(choice.reference);
  set.page_sum = const_cast<float*>(choice.page_sum);
  set.lower_share = const_cast<float*>(choice.lower_share);
  set.estimate_share = const_cast<float*>(choice.estimate_share);
  set.head_count = choice.head_count;
  set.kv_head = choice.kv_head;
  set.block_count = choice.block_count;
  return set;
}

void Wave::BuildScan() {
  scan_.shape = choice_.shape;
  scan_.softcap = shape_->logit_softcap;
  scan_.bounded = bounded_;
  scan_.radius_scale = context_.radius_scale;
  scan_.head_count_max = head_count_max_;
  // Nothing is scanned from the local window on.
  const auto blocks_of = [](const ChoiceGroup& choice) {
    return std::min(choice.block_count, choice.ranges.local_begin / kWordTokens + 1);
  };
  uint64_t pages = 0;
  uint32_t set_count = 0;
  for (uint32_t i = 0; i < groups_.size(); ++i) {
    if (!Scans(groups_[i])) continue;
    pages += blocks_of(choices_[i]);
    ++set_count;
  }
  if (set_count == 0) return;
  const auto target = static_cast<uint32_t>(
      JobTarget(pages, set_count, kScanRounds * ScanPlaces(context_), kJobPagesMin));
  const Slot<ScanSet> sets = to_device_.Take<ScanSet>(set_count);
  const Slot<ScanJob> jobs = to_device_.Take<ScanJob>(pages / target + set_count);
  uint32_t set = 0;
  uint32_t job = 0;
  for (uint32_t i = 0; i < groups_.size(); ++i) {
    if (!Scans(groups_[i])) continue;
    sets.host[set] = ScanSetOf(i);
    const uint32_t blocks = blocks_of(choices_[i]);
    for (uint32_t block = 0; block < blocks; block += target) {
      jobs.host[job++] = {
          .set = set, .first_block = block, .block_count = std::min(target, blocks - block)};
    }
    ++set;
  }
  scan_.sets = sets.device;
  scan_.jobs = jobs.device;
  scan_.job_count = job;
}

void Wave::BuildChosen() {
  const auto count = static_cast<uint32_t>(groups_.size());
  chosen_ = first_;
  const Slot<AttendSet> sets = attentions_.Take<AttendSet>(count + 1);
  for (uint32_t i = 0; i < count; ++i) {
    AttendSet set = SetOf(i, choices_[i].chosen);
    set.out = inputs_[i].chosen_out.device;
    set.sums = groups_[i].chosen_sums.device;
    set.tickets = tickets_.device + (size_t{2} * i + 1) * head_count_max_;
    sets.host[i] = set;
  }
  // Without heads: surplus jobs are its.
  sets.host[count] = AttendSet();
  chosen_.sets = sets.device;
  chosen_.job_count = std::max(AttendPlaces(context_, chosen_), 2 * count);
  const Slot<AttendJob> jobs = scratch_.Take<AttendJob>(chosen_.job_count);
  chosen_.jobs = jobs.device;
  choice_.sets = sets.device;
  choice_.jobs = jobs.device;
  choice_.job_count = chosen_.job_count;
  choice_.job_tokens_min = kJobTokensMin;
  const size_t parts = size_t{chosen_.job_count} * head_count_max_;
  choice_.parts = scratch_.Take<float>(parts * shape_->layout.head_dim).device;
  choice_.part_sums = scratch_.Take<HeadSums>(parts).device;
}

void Wave::BuildMerge() {
  const auto count = static_cast<uint32_t>(groups_.size());
  const Slot<MergeSet> sets = attentions_.Take<MergeSet>(count);
  for (uint32_t i = 0; i < count; ++i) {
    sets.host[i] = {.first_sums = groups_[i].first_sums.device,
                    .first_out = inputs_[i].first_out.device,
                    .chosen_sums = groups_[i].chosen_sums.device,
                    .chosen_out = inputs_[i].chosen_out.device,
                    .out = groups_[i].out.device,
                    .head_count = HeadsOf(groups_[i])};
  }
  merge_ = {.sets = sets.device,
            .set_count = count,
            .head_count_max = head_count_max_,
            .head_dim = shape_->layout.head_dim};
}

void Wave::BuildAnchors() {
  const uint32_t group_size = shape_->layout.group_size();
  const auto verifies = [](const WaveGroup& group) { return group.verifies; };
  const auto count = static_cast<uint32_t>(std::count_if(groups_.begin(), groups_.end(), verifies));
  if (count == 0) return;
  const Slot<AnchorSet> sets = attentions_.Take<AnchorSet>(count);
  uint32_t index = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    WaveGroup& group = groups_[i];
    if (!group.verifies) continue;
    const ChoiceGroup& choice = choices_[i];
    group.anchor_sums = to_host_.Take<HeadSums>(group_size);
    AnchorSet set;
    set.slices = choice.slices;
    set.sketches = choice.sketches;
    set.first = choice.first;
    set.to_scan = choice.to_scan;
    set.chosen = choice.chosen;
    set.weights = choice.weights;
    set.reference = choice.reference;
    set.page_sum = choice.page_sum;
    set.first_sums = choice.first_sums;
    set.qs = inputs_[i].set.qs;
    set.visible = choice.visible;
    set.kv_head = group.kv_head;
    set.block_count = choice.block_count;
    set.first_head = choice.head_count - group_size;
    set.chosen_sums = group.anchor_sums.device;
    if (!group.competes) {
      group.anchor_shift = to_host_.Take<float>(size_t{group_size} * shape_->layout.head_dim);
      group.anchor_variance = to_host_.Take<float>(shape_->layout.head_dim);
      set.shift = group.anchor_shift.device;
      set.variance = group.anchor_variance.device;
    }
    sets.host[index++] = set;
  }
  anchors_ = {.shape = choice_.shape,
              .softcap = shape_->logit_softcap,
              .sets = sets.device,
              .set_count = count,
              .group_size = group_size};
}

}  // namespace kvservice::cuda
