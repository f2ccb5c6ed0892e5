#include "attention/cuda/wave.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <utility>

#include "attention/cpu/head_queries.h"
#include "attention/prefetch.h"
#include "attention/sketch.h"

namespace kvservice::cuda {

Wave::Wave(const Context& context) : context_(context) {
  Check(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), "stream");
  // What goes beside a scan is short, and what follows waits for both.
  int least = 0;
  int greatest = 0;
  Check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream");
  Check(cudaStreamCreateWithPriority(&side_, cudaStreamNonBlocking, greatest), "stream");
  for (cudaEvent_t* event : {&forked_, &appended_, &attended_}) {
    Check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "event");
  }
  int device = 0;
  int generation = 0;
  Check(cudaGetDevice(&device), "device");
  Check(cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device), "device");
  overlaps_ = generation >= 9;
}

Wave::~Wave() {
  // Codes are not checked: at the end of a process there may be no device any more.
  for (cudaEvent_t event : {forked_, appended_, attended_}) cudaEventDestroy(event);
  cudaStreamDestroy(side_);
  cudaStreamDestroy(context_.stream);
}

size_t Wave::WeightBytes(const LayerShape& shape, const AttendRow& row) {
  return size_t{row.view.length} * row.query_count * shape.layout.group_size() * sizeof(float);
}

bool Wave::Scans(const WaveGroup& group) const {
  return !group.settled() || (group.has_hidden() && group.proves());
}
uint32_t Wave::BlocksOf(const WaveGroup& group) const {
  return BlockCount(group.row->view.length) - group.block_begin;
}
uint32_t Wave::HeadsOf(const WaveGroup& group) const {
  return group.row->query_count * shape_->layout.group_size();
}

void Wave::Take(const LayerShape& shape, std::vector<WaveGroup> groups) {
  shape_ = &shape;
  groups_ = std::move(groups);
  for (Arena* arena : {&to_device_, &attentions_, &on_host_, &to_host_}) arena->Reset();
  scratch_.Reset();
  bounded_ = groups_[0].proves();
  lists_ = chooses_ = bounds_values_ = ranks_ = false;
  head_count_max_ = 0;
  while (inputs_.size() < groups_.size()) inputs_.emplace_back();
  tables_.clear();
  query_sets_ = to_device_.Take<QuerySet>(groups_.size());
  for (size_t i = 0; i < groups_.size(); ++i) {
    WaveGroup& group = groups_[i];
    group.begin = WindowBegin(shape.sliding_window, group.row->position);
    group.block_begin = group.begin / kBlockTokens;
    assert(group.proves() == bounded_);
    group.queries = &inputs_[i].queries;
    inputs_[i].queries.head_count = HeadsOf(group);
    head_count_max_ = std::max(head_count_max_, HeadsOf(group));
    lists_ |= group.has_list();
    chooses_ |= !group.settled() || (group.reads_all && group.has_hidden());
    bounds_values_ |= group.proves();
    ranks_ |= !group.settled() && group.top_k() > 0;
  }
  for (uint32_t i = 0; i < groups_.size(); ++i) TakeInputs(i);
}

// What is marked and scanned.
void Wave::LayChoice() {
  BuildChoices();
  scan_ = ScanCall();
  if (chooses_) BuildScan();
}

void Wave::LayAttentions(ThreadPool* pool) {
  BuildFirst(pool);
  anchors_ = AnchorCall();
  if (chooses_) {
    BuildChosen();
    BuildAnchors();
  }
  BuildMerge();
}

size_t Wave::TableFloats() const {
  return size_t{1 + SketchDirections(shape_->layout.head_dim)} * shape_->layout.head_dim;
}

// Few rows have tables of their own.
Slot<float> Wave::TablesOf(const AttendRow& row) {
  for (const Tables& tables : tables_) {
    if (tables.from.data() == row.tables.data()) return tables.place;
  }
  tables_.push_back({row.tables, to_device_.Take<float>(row.tables.size() * TableFloats())});
  return tables_.back().place;
}

void Wave::TakeInputs(uint32_t index) {
  const WaveGroup& group = groups_[index];
  Inputs* const inputs = &inputs_[index];
  const uint32_t dim = shape_->layout.head_dim;
  const uint32_t heads = HeadsOf(group);
  const size_t floats = size_t{heads} * dim;
  inputs->q = on_host_.Take<float>(floats).host;
  inputs->visible = to_device_.Take<uint32_t>(size_t{2} * heads);
  inputs->list = {};
  if (group.has_list()) inputs->list = on_host_.Take<uint32_t>(group.list.size());
  QuerySet* const set = &inputs->set;
  *set = {.q = inputs->q, .qs = scratch_.Take<float>(floats).device, .head_count = heads};
  if (Scans(group)) {
    const Slot<float> table = TablesOf(*group.row);
    const size_t skipped = group.kv_head * TableFloats();
    set->table = table.host + skipped;
    inputs->table = table.device + skipped;
    set->qw = scratch_.Take<float>(size_t{SketchDirections(dim)} * heads).device;
    if (bounded_) {
      set->x = scratch_.Take<float>(floats).device;
      set->norm = scratch_.Take<double>(size_t{4} * heads).device;
    }
  }
  query_sets_.host[index] = *set;
}

// Any thread, one per group.
void Wave::Fill(uint32_t index) {
  const WaveGroup& group = groups_[index];
  const Inputs& inputs = inputs_[index];
  const AttendRow& row = *group.row;
  const uint32_t group_size = shape_->layout.group_size();
  const size_t floats = size_t{group_size} * shape_->layout.head_dim;
  for (uint32_t token = 0; token < row.query_count; ++token) {
    // The heads of a query token lie side by side.
    const size_t first = OutputIndex(shape_->layout, group.kv_head, token * group_size);
    std::copy_n(row.q + first * shape_->layout.head_dim, floats, inputs.q + token * floats);
    const uint32_t position = row.position + token;
    const uint32_t begin = WindowBegin(shape_->sliding_window, position);
    for (uint32_t head = token * group_size; head < (token + 1) * group_size; ++head) {
      inputs.visible.host[2 * head] = group.Relative(begin);
      inputs.visible.host[2 * head + 1] = group.Relative(position + 1);
    }
  }
  if (!group.has_list()) return;
  const uint32_t base = group.block_begin * kBlockTokens;
  std::transform(group.list.begin(), group.list.end(), inputs.list.host,
                 [base](uint32_t position) { return position - base; });
}

void Wave::FillTables(const Tables& tables) const {
  float* to = tables.place.host;
  for (const SketchTable& table : tables.from) {
    to = std::copy(table.metric.begin(), table.metric.end(), to);
    to = std::copy(table.weights.begin(), table.weights.end(), to);
  }
}

void Wave::Prepare(ThreadPool* pool) {
  const auto count = static_cast<uint32_t>(groups_.size());
  const auto fill = [this, count](uint32_t i, uint32_t) {
    if (i < count) {
      Fill(i);
    } else {
      FillTables(tables_[i - count]);
    }
  };
  pool->ParallelForBeside([this] { LayChoice(); }, count + static_cast<uint32_t>(tables_.size()),
                          fill, kGroupsPerThread);
}

// What the bounds of masses want of the queries, while the device works.
void Wave::FillHostQueries(ThreadPool* pool) {
  if (!bounded_) return;
  pool->ParallelFor(
      static_cast<uint32_t>(groups_.size()),
      [this](uint32_t i, uint32_t) {
        FillHeadQueries(*shape_, *groups_[i].row, groups_[i].kv_head, &inputs_[i].queries);
      },
      kGroupsPerThread);
}

// Takes along what the wave is made of, as far as it is there.
void Wave::Mark(cudaStream_t stream) {
  ChoiceInputs inputs{
      .groups = choices_.data(), .queries = query_sets_.host, .scale = shape_->scale, .copy = {}};
  if (to_device_.is_in_one_piece()) {
    inputs.copy = to_device_.ToDevice();
  } else {
    to_device_.Upload(stream);
  }
  Run(MarkWords(choice_, inputs, stream), "mark");
}

void Wave::Fly(const LayerShape& shape, std::vector<WaveGroup> groups, ThreadPool* pool,
               cudaStream_t after, absl::FunctionRef<bool()> append) {
  launch_count_ = 0;
  const cudaStream_t stream = context_.stream;
  Check(cudaEventRecord(forked_, after), "event");
  Check(cudaStreamWaitEvent(stream, forked_, 0), "event");
  Take(shape, std::move(groups));
  Prepare(pool);
  Mark(stream);
  Fork(stream);
  LaunchScan(stream);
  if (append()) {
    Check(cudaEventRecord(appended_, after), "event");
    Check(cudaStreamWaitEvent(side_, appended_, 0), "event");
  }
  LayAttentions(pool);
  attentions_.Upload(side_);
  LaunchFirst();
  LaunchRest(stream, Stage::kAll);
  FillHostQueries(pool);
}

void Wave::Build(const LayerShape& shape, std::vector<WaveGroup> groups, ThreadPool* pool) {
  Take(shape, std::move(groups));
  Prepare(pool);
  LayAttentions(pool);
  FillHostQueries(pool);
}

void Wave::Upload(cudaStream_t after) {
  Check(cudaEventRecord(forked_, after), "event");
  Check(cudaStreamWaitEvent(context_.stream, forked_, 0), "event");
  for (Arena* arena : {&to_device_, &attentions_}) arena->Upload(context_.stream);
}

void Wave::Launch(cudaStream_t stream, Stage last) {
  launch_count_ = 0;
  const ChoiceInputs inputs{
      .groups = choice_.groups, .queries = query_sets_.device, .scale = shape_->scale, .copy = {}};
  Run(MarkWords(choice_, inputs, stream), "mark");
  if (last == Stage::kMark) return;
  Fork(stream);
  LaunchScan(stream);
  LaunchFirst();
  LaunchRest(stream, last);
}

void Wave::Run(cudaError_t code, const char* what) {
  ++launch_count_;
  Check(code, what);
}

// What is read in any case is attended to while the sketches are scanned.
void Wave::Fork(cudaStream_t stream) {
  Check(cudaEventRecord(forked_, stream), "event");
  Check(cudaStreamWaitEvent(side_, forked_, 0), "event");
}

void Wave::LaunchScan(cudaStream_t stream) {
  if (scan_.job_count > 0) Run(cuda::Scan(scan_, stream), "scan");
}

void Wave::LaunchFirst() {
  Run(cuda::Attend(first_, side_), "attend");
  if (bounds_values_ && !chooses_) Run(BoundOpenValues(choice_, side_), "values");
  if (choice_.norm_tokens_max > 0) Run(BoundKeys(choice_, side_), "keys");
  Check(cudaEventRecord(attended_, side_), "event");
}

void Wave::LaunchRest(cudaStream_t stream, Stage last) {
  Check(cudaStreamWaitEvent(stream, attended_, 0), "event");
  if (last == Stage::kScan) return;
  if (chooses_) {
    Run(FindThresholds(choice_, stream), "thresholds");
    if (last == Stage::kThresholds) return;
    Run(SelectTokens(choice_, stream), "select");
    // With ranks thresholds are two kernels, and so is this.
    if (choice_.ranks) launch_count_ += 2;
    if (last == Stage::kChoose) return;
    if (anchors_.set_count > 0) {
      // Beside the attention over what was chosen.
      Fork(stream);
      Run(DescribeAnchors(anchors_, side_), "anchors");
      Check(cudaEventRecord(attended_, side_), "event");
    }
    Run(cuda::Attend(chosen_, stream), "attend");
    if (anchors_.set_count > 0) Check(cudaStreamWaitEvent(stream, attended_, 0), "event");
  }
  // As the last kernel it takes along what those before it have come to.
  if (to_host_.is_in_one_piece()) merge_.results = to_host_.ToHost();
  Run(MergeOutputs(merge_, stream), "merge");
  if (!to_host_.is_in_one_piece()) to_host_.Download(stream);
}

void Wave::Wait() { Check(cudaStreamSynchronize(context_.stream), "wave"); }

bool Wave::IsDone() const {
  const cudaError_t code = cudaStreamQuery(context_.stream);
  if (code == cudaErrorNotReady) return false;
  Check(code, "wave");
  return true;
}

void Wave::Prefetch(const WaveGroup& group) const {
  const uint32_t heads = HeadsOf(group);
  kvservice::Prefetch(group.stats.host, sizeof(ChoiceStats));
  kvservice::Prefetch(group.first_sums.host, heads * sizeof(HeadSums));
  if (chooses_) {
    kvservice::Prefetch(group.chosen_sums.host, heads * sizeof(HeadSums));
    kvservice::Prefetch(group.dropped.host, heads * sizeof(DroppedSums));
  }
  kvservice::Prefetch(group.out.host, size_t{heads} * shape_->layout.head_dim * sizeof(float));
}

void Wave::Kept(const WaveGroup& group, Partial* kept, Partial* part) const {
  const ChoiceStats& stats = *group.stats.host;
  // No job has more tokens than there are.
  const uint32_t first_tokens = stats.always + (group.reads_all ? stats.middle : 0);
  MassesOf(*shape_, *group.queries, bounded_, std::min(group.first_job_tokens_max, first_tokens),
           group.first_sums.host, kept);
  if (!chooses_) return;
  MassesOf(*shape_, *group.queries, bounded_, stats.job_tokens_max, group.chosen_sums.host, part);
  MergePartials(/*head_dim=*/0, *part, kept);
}

std::vector<WaveGroup> Wave::TakeGroups() {
  groups_.clear();
  return std::move(groups_);
}

}  // namespace kvservice::cuda
