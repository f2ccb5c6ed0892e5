#include "attention/cuda/device.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/cpu/choose.h"
#include "attention/cpu/group.h"
#include "attention/cpu/head_queries.h"
#include "attention/cpu/thread_pool.h"
#include "attention/cuda/arena.h"
#include "attention/cuda/direct.h"
#include "attention/cuda/kernels.h"
#include "attention/cuda/readings.h"
#include "attention/cuda/tables.h"
#include "attention/host_lists.h"
#include "attention/sketch.h"

namespace kvservice {
namespace {

using cuda::Arena;
using cuda::Check;
using cuda::GroupName;
using cuda::Slot;

// The oldest GPUs that this build has code for.
constexpr int kComputeMajorMin = 8;
// Groups are executed in waves, so that the weights which their scans leave stay below this, or in
// a wave of their own.
constexpr size_t kWaveBytesMax = size_t{256} << 20;
constexpr size_t kWaveGroupsMax = 4096;
// Calls on their way: while one is on the device, the host prepares or answers the other.
constexpr uint32_t kCallsMax = 2;
// The host's share of a call is small: more threads spend more on meeting than they take over.
constexpr uint32_t kThreadsMax = 8;
// Eight sequences gain from 16k to 32k tokens on, one from 64k to 128k (H200, docs/kernels.md).
constexpr uint32_t kCertifiedFromTokens = 32768;
// What is appended is read by the kernel where the host has it, if it is little: decoding.
constexpr size_t kReadInPlaceBytesMax = size_t{256} << 10;

uint32_t AvailableCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return static_cast<uint32_t>(std::max(1, CPU_COUNT(&set)));
}

// First token that the row's first query token sees.
uint32_t BeginOf(const LayerShape& shape, const AttendRow& row) {
  return WindowBegin(shape.sliding_window, row.position);
}

// True if planning or proving the row reads its sketches, as Group does.
bool ReadsPageHeads(const LayerShape& shape, const AttendRow& row) {
  const Plan& plan = row.plan;
  return plan.prove != Guarantee::kNone || plan.source != Source::kAll ||
         plan.visible_begin > std::max(plan.sink_end, BeginOf(shape, row));
}

bool MayCompensate(const Plan& plan) {
  return plan.prove == Guarantee::kConfidence && std::isfinite(plan.max_output_error);
}

void ReleaseMemory(std::byte* data, size_t /*bytes*/) {
  // At the end of a process the driver may be gone already.
  cudaFree(data);
}

void ReleaseHostMemory(std::byte* data, size_t /*bytes*/) { cudaFreeHost(data); }

class CudaDevice : public Device {
 public:
  CudaDevice(uint32_t thread_count, uint32_t spin_us, uint32_t multiprocessors);
  ~CudaDevice() override;

  std::string_view name() const override { return "cuda"; }
  uint32_t certified_from_tokens() const override { return kCertifiedFromTokens; }
  absl::StatusOr<DeviceMemory> Allocate(size_t bytes) override;
  absl::StatusOr<DeviceMemory> AllocateOnHost(size_t bytes) override;
  std::unique_ptr<TokenLists> NewTokenLists(const KvLayout& layout, uint32_t anchors_max) override {
    return std::make_unique<HostLists>(layout, anchors_max);
  }
  void Copy(absl::Span<const MemoryCopy> copies) override;
  void Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) override;
  void Seal(const KvLayout& layout, absl::Span<const SealSlice> slices) override;
  void Attend(const LayerShape& shape, absl::Span<AttendRow> rows) override;
  uint32_t calls_max() const override { return kCallsMax; }
  void Begin(const LayerShape& shape, absl::Span<AttendRow> rows) override;
  void Finish() override;
  bool IsDone() override;
  void ParallelFor(uint32_t count, absl::FunctionRef<void(uint32_t)> task) override {
    pool_.ParallelFor(count, [task](uint32_t i, uint32_t) { task(i); });
  }
  uint64_t groups_answered_directly() const;

 private:
  // A row of a wave, as the device sees it.
  struct RowData {
    cuda::RowTables tables;
    uint32_t block_begin = 0;
    uint32_t block_count = 0;
    // [kv_head_count][block_count], and [..][64]; null where the row reads none.
    Slot<cuda::PageHead> heads;
    Slot<uint8_t> value_codes;
  };

  // A call on its way. Its own number, later calls have larger ones; 0 = none.
  struct Call {
    Call(const cuda::Context& context, ThreadPool* pool) : direct(context, pool) {}
    uint64_t number = 0;
    const LayerShape* shape = nullptr;
    absl::Span<AttendRow> rows;
    Arena staging{Arena::Sides::kBoth};  // of its tables
    std::vector<cuda::RowTables> tables;
    // [row]: [query_head_count][head_dim], of rows that reuse lists.
    std::vector<absl::Span<const float>> unrotated;
    std::vector<std::vector<float>> turned;  // what they are where queries have to be turned
    cuda::Direct direct;
    std::vector<GroupName> left;  // what the host decides
  };
  void BeginCall(const LayerShape& shape, absl::Span<AttendRow> rows, Call* call);
  void FinishCall(Call* call);
  // Of those on their way.
  uint64_t OldestNumber() const;

  Arena* Stage();
  void Staged();
  bool RunAppend();
  static void Unrotate(Call* call);
  void LoadRows(const Call& call);
  void LoadRow(const LayerShape& shape, const AttendRow& row, RowData* data);
  void Prepare(const Call& call, absl::Span<const GroupName> names);
  void ReadFirst(const LayerShape& shape);
  void Decide(const LayerShape& shape);
  void ExecuteWave(const Call& call, absl::Span<const GroupName> names);
  void DecideOnHost(const Call& call);
  void Conclude(const LayerShape& shape);
  void ReadRests(const LayerShape& shape);
  // The row of the wave's group, and what is read for it.
  const cuda::RowTables& TablesOf(uint32_t group) const { return row_data_[row_of_[group]].tables; }
  void Want(uint32_t group, const TokenMask& tokens, bool read_values, Partial* to) {
    readings_.Attend(TablesOf(group), groups_[group], tokens, read_values, to);
  }
  const TokenMask& Keep(TokenMask tokens) {
    kept_masks_.push_back(std::move(tokens));
    return kept_masks_.back();
  }

  ThreadPool pool_;
  std::vector<ChooseScratch> choose_scratch_;  // per thread of the pool
  std::vector<ProofScratch> proof_scratch_;    // likewise
  cuda::ScoreMemory score_memory_;
  cuda::Context context_;
  // What Append and Seal write, until the device has it: in turns, so that they seldom wait.
  struct Staging {
    Arena arena{Arena::Sides::kBoth};
    cudaEvent_t done = nullptr;
  };
  std::array<Staging, 2> staging_;
  uint32_t staged_ = 0;  // the one that was used last
  // Where an Append stages the rows of its slices.
  struct StagedRows {
    const AppendSlice* from;
    Slot<std::byte> k, v;
  };
  std::vector<StagedRows> staged_rows_;
  // What Append has staged and nobody has launched: decoding comes with its attention, whose scans
  // need not wait for it. count = 0: nothing.
  struct WaitingAppend {
    cuda::CacheShape shape;
    const cuda::AppendItem* items = nullptr;
    uint32_t count = 0;
  };
  WaitingAppend append_;
  cuda::TableCache tables_;
  uint64_t call_number_ = 0;
  // Those that were begun, in turns, and the one that is answered at once.
  std::deque<Call> calls_;
  Call alone_;
  uint64_t begun_ = 0;
  uint64_t finished_ = 0;
  // Of the call for which the host decides.
  Arena to_device_{Arena::Sides::kBoth};
  Arena to_host_{Arena::Sides::kBoth};
  std::vector<RowData> row_data_;
  // Of one wave.
  cuda::Readings readings_;
  std::deque<Group> groups_;
  std::deque<cuda::GroupReader> readers_;
  std::vector<uint32_t> row_of_;
  std::vector<Group::Verdict> verdicts_;
  std::deque<TokenMask> kept_masks_;  // sets that readings borrow
  uint32_t count_ = 0;                // groups
};

cuda::Context NewContext(uint32_t multiprocessors, cuda::ScoreMemory* score_memory) {
  cuda::Context context;
  Check(cudaStreamCreateWithFlags(&context.stream, cudaStreamNonBlocking), "cudaStreamCreate");
  context.multiprocessors = multiprocessors;
  context.score_memory = score_memory;
  float* scale = nullptr;
  const size_t bytes = kRadiusScale.size() * sizeof(float);
  Check(cudaMalloc(reinterpret_cast<void**>(&scale), bytes), "cudaMalloc");
  Check(cudaMemcpy(scale, kRadiusScale.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  context.radius_scale = scale;
  return context;
}

CudaDevice::CudaDevice(uint32_t thread_count, uint32_t spin_us, uint32_t multiprocessors)
    : pool_(std::min(thread_count, kThreadsMax), spin_us),
      choose_scratch_(pool_.thread_count()),
      proof_scratch_(pool_.thread_count()),
      context_(NewContext(multiprocessors, &score_memory_)),
      tables_(context_.stream),
      alone_(context_, &pool_),
      readings_(context_) {
  for (Staging& staging : staging_) {
    Check(cudaEventCreateWithFlags(&staging.done, cudaEventDisableTiming), "event");
  }
  while (calls_.size() < kCallsMax) calls_.emplace_back(context_, &pool_);
}

CudaDevice::~CudaDevice() {
  for (const Staging& staging : staging_) cudaEventDestroy(staging.done);
  cudaFree(const_cast<float*>(context_.radius_scale));
  cudaStreamDestroy(context_.stream);
}

absl::StatusOr<DeviceMemory> CudaDevice::Allocate(size_t bytes) {
  void* data = nullptr;
  const size_t least = std::max<size_t>(bytes, 1);
  if (const cudaError_t code = cudaMalloc(&data, least); code != cudaSuccess) {
    // The error does not stick, but would be the next one to be seen.
    static_cast<void>(cudaGetLastError());
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate ", bytes, " bytes on the GPU: ", cudaGetErrorString(code)));
  }
  // Not in the stream: Allocate may be called by any thread.
  Check(cudaMemset(data, 0, least), "cudaMemset");
  Check(cudaStreamSynchronize(nullptr), "cudaMemset");
  return DeviceMemory(static_cast<std::byte*>(data), least, ReleaseMemory);
}

// Pinned, so that the device has it under the address that the host has.
absl::StatusOr<DeviceMemory> CudaDevice::AllocateOnHost(size_t bytes) {
  void* data = nullptr;
  const size_t least = std::max<size_t>(bytes, 1);
  if (const cudaError_t code = cudaHostAlloc(&data, least, cudaHostAllocPortable);
      code != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return absl::ResourceExhaustedError(absl::StrCat(
        "cannot pin ", bytes, " bytes of the host's memory: ", cudaGetErrorString(code)));
  }
  std::memset(data, 0, least);
  return DeviceMemory(static_cast<std::byte*>(data), least, ReleaseHostMemory);
}

void CudaDevice::Copy(absl::Span<const MemoryCopy> copies) {
  RunAppend();
  for (const MemoryCopy& copy : copies) {
    Check(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyDefault, context_.stream),
          "copy");
  }
  Check(cudaStreamSynchronize(context_.stream), "copy");
}

// Begins to stage what Append and Seal write. They do not wait for the device, only for what they
// staged the time before the last.
Arena* CudaDevice::Stage() {
  staged_ ^= 1;
  Staging& staging = staging_[staged_];
  Check(cudaEventSynchronize(staging.done), "stage");
  staging.arena.Reset();
  return &staging.arena;
}

void CudaDevice::Staged() {
  Check(cudaEventRecord(staging_[staged_].done, context_.stream), "stage");
}

// Launches what waits; false if nothing does.
bool CudaDevice::RunAppend() {
  if (append_.count == 0) return false;
  Check(cuda::Append(append_.shape, append_.items, append_.count, context_.stream), "append");
  append_.count = 0;
  Staged();
  return true;
}

void CudaDevice::Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) {
  RunAppend();
  Arena* const staging = Stage();
  const size_t token_bytes = size_t{layout.kv_head_count} * layout.vector_bytes();
  size_t token_count = 0;
  for (const AppendSlice& slice : slices) token_count += slice.token_count;
  const bool in_place = 2 * token_count * token_bytes <= kReadInPlaceBytesMax;
  const Slot<cuda::AppendItem> items = staging->Take<cuda::AppendItem>(slices.size());
  staged_rows_.clear();
  for (const AppendSlice& slice : slices) {
    assert(slice.first + slice.token_count <= kBlockTokens);
    if (slice.token_count == 0) continue;
    const size_t bytes = slice.token_count * token_bytes;
    staged_rows_.push_back(
        {&slice, staging->Take<std::byte>(bytes), staging->Take<std::byte>(bytes)});
  }
  const auto count = static_cast<uint32_t>(staged_rows_.size());
  pool_.ParallelFor(count, [&](uint32_t i, uint32_t) {
    const auto& [from, k, v] = staged_rows_[i];
    const AppendSlice& slice = *from;
    std::memcpy(k.host, slice.k, slice.token_count * token_bytes);
    std::memcpy(v.host, slice.v, slice.token_count * token_bytes);
    items.host[i] = {.slice = slice.slice,
                     .k = in_place ? k.host : k.device,
                     .v = in_place ? v.host : v.device,
                     .first = slice.first,
                     .token_count = slice.token_count};
  });
  if (!in_place) staging->Upload(context_.stream);
  append_ = {.shape = cuda::ShapeOf(layout),
             .items = in_place ? items.host : items.device,
             .count = count};
  if (!in_place) RunAppend();
}

void CudaDevice::Seal(const KvLayout& layout, absl::Span<const SealSlice> slices) {
  if (slices.empty()) return;
  RunAppend();
  Arena* const staging = Stage();
  const SketchLayout sketch(layout.head_dim);
  const uint32_t heads = layout.kv_head_count;
  // Tables are the same for all slices of a sequence.
  struct DeviceTable {
    const float* metric = nullptr;
    const float* weights = nullptr;
  };
  std::map<const SketchTable*, DeviceTable> tables;
  const auto upload = [&](const std::vector<float>& numbers) {
    const Slot<float> slot = staging->Take<float>(numbers.size());
    std::copy(numbers.begin(), numbers.end(), slot.host);
    return slot.device;
  };
  const Slot<cuda::SealItem> items = staging->Take<cuda::SealItem>(slices.size() * heads);
  uint32_t count = 0;
  for (const SealSlice& slice : slices) {
    for (uint32_t head = 0; head < heads; ++head) {
      const SketchTable& table = slice.tables[head];
      const auto [known, inserted] = tables.try_emplace(&table);
      if (inserted) known->second = {upload(table.metric), upload(table.weights)};
      items.host[count++] = {.rows = slice.slice + layout.RowOffset(head, 0),
                             .page = slice.sketch + head * sketch.page_bytes,
                             .metric = known->second.metric,
                             .weights = known->second.weights,
                             .radius_scale = context_.radius_scale,
                             .block_index = slice.block_index};
    }
  }
  staging->Upload(context_.stream);
  Check(cuda::Seal(cuda::ShapeOf(layout), items.device, count, context_.stream), "seal");
  Staged();
}

// An anchor is found by, and made for, the newest query.
void CudaDevice::Unrotate(Call* call) {
  const LayerShape& shape = *call->shape;
  const absl::Span<const AttendRow> rows = call->rows;
  const size_t token_floats = size_t{shape.layout.query_head_count} * shape.layout.head_dim;
  call->unrotated.assign(rows.size(), {});
  if (call->turned.size() < rows.size()) call->turned.resize(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const AttendRow& row = rows[i];
    if (row.plan.source != Source::kReuse) continue;
    const float* const q = row.q + (row.query_count - 1) * token_floats;
    call->unrotated[i] = absl::MakeConstSpan(q, token_floats);
    if (shape.rotary_style == RotaryStyle::kNone) continue;
    call->turned[i].resize(token_floats);
    UnrotateQueries(shape, row.view.length - 1, q, call->turned[i].data());
    call->unrotated[i] = call->turned[i];
  }
}

// Asks for what a row's plan reads of its sketches.
void CudaDevice::LoadRow(const LayerShape& shape, const AttendRow& row, RowData* data) {
  data->block_begin = BeginOf(shape, row) / kBlockTokens;
  data->block_count = BlockCount(row.view.length) - data->block_begin;
  if (!ReadsPageHeads(shape, row)) return;
  const size_t pages = size_t{shape.layout.kv_head_count} * data->block_count;
  data->heads = to_host_.Take<cuda::PageHead>(pages);
  if (MayCompensate(row.plan)) {
    data->value_codes = to_host_.Take<uint8_t>(pages * kBlockTokens);
  }
}

void CudaDevice::LoadRows(const Call& call) {
  const LayerShape& shape = *call.shape;
  const absl::Span<const AttendRow> rows = call.rows;
  to_device_.Reset();
  to_host_.Reset();
  row_data_.assign(rows.size(), RowData());
  std::vector<uint8_t> wanted(rows.size());
  for (const GroupName& name : call.left) wanted[name.row] = 1;
  std::vector<cuda::PageHeadTask> tasks;
  uint32_t blocks_max = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (wanted[i] == 0) continue;
    RowData& data = row_data_[i];
    data.tables = call.tables[i];
    LoadRow(shape, rows[i], &data);
    if (data.heads.host == nullptr) continue;
    const uint32_t base = data.block_begin * kBlockTokens;
    for (uint32_t kv_head = 0; kv_head < shape.layout.kv_head_count; ++kv_head) {
      const size_t at = size_t{kv_head} * data.block_count;
      cuda::PageHeadTask task;
      task.slices = data.tables.slices + data.block_begin;
      task.sketches = data.tables.sketches + data.block_begin;
      task.heads = data.heads.device + at;
      if (data.value_codes.device != nullptr) {
        task.value_codes = data.value_codes.device + at * kBlockTokens;
      }
      task.kv_head = kv_head;
      task.block_count = data.block_count;
      task.begin = BeginOf(shape, rows[i]) - base;
      task.end = rows[i].view.length - base;
      task.bounds_values = rows[i].plan.prove != Guarantee::kNone;
      tasks.push_back(task);
    }
    blocks_max = std::max(blocks_max, data.block_count);
  }
  const Slot<cuda::PageHeadTask> slot = to_device_.Take<cuda::PageHeadTask>(tasks.size());
  std::copy(tasks.begin(), tasks.end(), slot.host);
  to_device_.Upload(context_.stream);
  if (tasks.empty()) return;
  Check(cuda::ReadPageHeads(cuda::ShapeOf(shape.layout), slot.device,
                            static_cast<uint32_t>(tasks.size()), blocks_max, context_.stream),
        "page heads");
  to_host_.Download(context_.stream);
  Check(cudaStreamSynchronize(context_.stream), "page heads");
}

void CudaDevice::Prepare(const Call& call, absl::Span<const GroupName> names) {
  const LayerShape& shape = *call.shape;
  const absl::Span<AttendRow> rows = call.rows;
  const size_t head_floats = size_t{shape.layout.group_size()} * shape.layout.head_dim;
  const auto count = static_cast<uint32_t>(names.size());
  count_ = count;
  if (groups_.size() < count) groups_.resize(count);
  if (readers_.size() < count) readers_.resize(count);
  row_of_.resize(count);
  verdicts_.resize(count);
  pool_.ParallelFor(count, [&](uint32_t i, uint32_t) {
    const uint32_t row = names[i].row;
    const uint32_t kv_head = names[i].kv_head;
    row_of_[i] = row;
    const RowData& data = row_data_[row];
    const size_t at = size_t{kv_head} * data.block_count;
    readers_[i].Set(
        context_, shape, kv_head, data.tables, data.block_begin,
        data.heads.host == nullptr ? nullptr : data.heads.host + at,
        data.value_codes.host == nullptr ? nullptr : data.value_codes.host + at * kBlockTokens);
    absl::Span<const float> anchor;
    if (rows[row].plan.source == Source::kReuse) {
      anchor = call.unrotated[row].subspan(kv_head * head_floats, head_floats);
    }
    groups_[i].Prepare(shape, &rows[row], kv_head, &readers_[i], anchor);
  });
}

// What is read whatever is chosen, and the scans to choose by.
void CudaDevice::ReadFirst(const LayerShape& shape) {
  readings_.Begin(shape);
  kept_masks_.clear();
  for (uint32_t i = 0; i < count_; ++i) {
    Group& group = groups_[i];
    readings_.Scan(TablesOf(i), group, group.to_scan(), &group.weights);
    Want(i, group.first(), /*read_values=*/true, &group.kept);
    if (!group.has_choice() && group.wants_rest()) {
      Want(i, Keep(group.Rest()), group.wants_rest_values(), &group.rest);
    }
  }
  readings_.Run();
}

void CudaDevice::Decide(const LayerShape& shape) {
  bool choose = false;
  for (uint32_t i = 0; i < count_; ++i) choose |= groups_[i].has_choice();
  if (!choose) return;
  pool_.ParallelFor(
      count_, [&](uint32_t i, uint32_t thread) { groups_[i].Decide(&choose_scratch_[thread]); });
  readings_.Begin(shape);
  kept_masks_.clear();
  for (uint32_t i = 0; i < count_; ++i) {
    Group& group = groups_[i];
    if (!group.has_choice()) continue;
    Want(i, Keep(group.Unread()), /*read_values=*/true, &group.kept);
    if (group.wants_rest()) {
      Want(i, Keep(group.Rest()), group.wants_rest_values(), &group.rest);
    }
  }
  readings_.Run();
}

// Concludes all groups, reading more for those that grow, in rounds. A group grows a bounded number
// of times.
void CudaDevice::Conclude(const LayerShape& shape) {
  const auto grows = [](Group::Verdict verdict) { return verdict == Group::Verdict::kReadMore; };
  pool_.ParallelFor(count_, [&](uint32_t i, uint32_t thread) {
    verdicts_[i] = groups_[i].Conclude(&proof_scratch_[thread]);
  });
  while (std::any_of(verdicts_.begin(), verdicts_.end(), grows)) {
    readings_.Begin(shape);
    for (uint32_t i = 0; i < count_; ++i) {
      if (!grows(verdicts_[i])) continue;
      groups_[i].grown.Resize(groups_[i].head_count(), shape.layout.head_dim);
      Want(i, groups_[i].more(), /*read_values=*/true, &groups_[i].grown);
    }
    readings_.Run();
    pool_.ParallelFor(count_, [&](uint32_t i, uint32_t thread) {
      if (!grows(verdicts_[i])) return;
      verdicts_[i] = groups_[i].Conclude(&proof_scratch_[thread]);
    });
  }
}

// Answers densely where a verdict asks for it.
void CudaDevice::ReadRests(const LayerShape& shape) {
  const auto asks = [](Group::Verdict verdict) { return verdict == Group::Verdict::kReadRest; };
  if (std::none_of(verdicts_.begin(), verdicts_.end(), asks)) return;
  readings_.Begin(shape);
  kept_masks_.clear();
  for (uint32_t i = 0; i < count_; ++i) {
    if (!asks(verdicts_[i])) continue;
    // Keys alone were read for an exact proof; their masses would count twice.
    groups_[i].rest.Resize(groups_[i].head_count(), shape.layout.head_dim);
    Want(i, Keep(groups_[i].Rest()), /*read_values=*/true, &groups_[i].rest);
  }
  readings_.Run();
  pool_.ParallelFor(count_, [&](uint32_t i, uint32_t thread) {
    if (asks(verdicts_[i])) groups_[i].ConcludeDense(&proof_scratch_[thread]);
  });
}

void CudaDevice::ExecuteWave(const Call& call, absl::Span<const GroupName> names) {
  const LayerShape& shape = *call.shape;
  Prepare(call, names);
  ReadFirst(shape);
  Decide(shape);
  Conclude(shape);
  ReadRests(shape);
  for (uint32_t i = 0; i < count_; ++i) {
    if (verdicts_[i] != Group::Verdict::kFailed) continue;
    call.rows[row_of_[i]].status = absl::FailedPreconditionError(
        absl::StrCat("BOUND_NOT_MET: KV head ", groups_[i].kv_head(), " cannot prove its limits"));
  }
}

// Answers the groups that are left.
void CudaDevice::DecideOnHost(const Call& call) {
  const absl::Span<const GroupName> left = call.left;
  if (left.empty()) return;
  LoadRows(call);
  for (size_t first = 0; first < left.size();) {
    size_t bytes = 0;
    size_t end = first;
    while (end < left.size() && end - first < kWaveGroupsMax && bytes <= kWaveBytesMax) {
      const AttendRow& row = call.rows[left[end].row];
      // A weight of every token and head, at most; rows that read everything have none.
      if (ReadsPageHeads(*call.shape, row)) {
        bytes += size_t{row.view.length} * row.query_count * call.shape->layout.group_size() *
                 sizeof(float);
      }
      ++end;
    }
    ExecuteWave(call, left.subspan(first, end - first));
    first = end;
  }
}

uint64_t CudaDevice::OldestNumber() const {
  uint64_t oldest = alone_.number > 0 ? alone_.number : call_number_;
  for (const Call& call : calls_) {
    if (call.number > 0) oldest = std::min(oldest, call.number);
  }
  return oldest;
}

void CudaDevice::BeginCall(const LayerShape& shape, absl::Span<AttendRow> rows, Call* call) {
  assert(call->number == 0);
  call->number = ++call_number_;
  call->shape = &shape;
  call->rows = rows;
  call->staging.Reset();
  call->tables.clear();
  call->left.clear();
  tables_.Begin(call->number, OldestNumber());
  for (AttendRow& row : rows) {
    assert(row.query_count >= 1 && row.query_count <= kQueryTokensMax);
    row.status = absl::OkStatus();
    call->tables.push_back(tables_.Get(row.view, &call->staging));
  }
  Unrotate(call);
  call->direct.Begin(
      shape, rows, call->tables, call->unrotated, [this] { return RunAppend(); }, &call->left);
  RunAppend();
}

void CudaDevice::FinishCall(Call* call) {
  const KvLayout& layout = call->shape->layout;
  call->direct.Finish(&call->left);
  for (uint32_t i = 0; i < call->rows.size(); ++i) {
    if (cuda::Direct::Takes(*call->shape, call->rows[i])) continue;
    for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
      call->left.push_back({i, kv_head});
    }
  }
  DecideOnHost(*call);
  for (AttendRow& row : call->rows) {
    if (row.status.ok()) continue;
    std::fill_n(row.out, size_t{row.query_count} * layout.query_head_count * layout.head_dim, 0.0F);
    std::fill_n(row.lse, size_t{row.query_count} * layout.query_head_count, 0.0F);
  }
  call->number = 0;
}

void CudaDevice::Attend(const LayerShape& shape, absl::Span<AttendRow> rows) {
  BeginCall(shape, rows, &alone_);
  FinishCall(&alone_);
}

void CudaDevice::Begin(const LayerShape& shape, absl::Span<AttendRow> rows) {
  assert(begun_ - finished_ < kCallsMax);
  BeginCall(shape, rows, &calls_[begun_++ % kCallsMax]);
}

void CudaDevice::Finish() {
  assert(finished_ < begun_);
  FinishCall(&calls_[finished_++ % kCallsMax]);
}

bool CudaDevice::IsDone() {
  assert(finished_ < begun_);
  return calls_[finished_ % kCallsMax].direct.IsDone();
}

uint64_t CudaDevice::groups_answered_directly() const {
  uint64_t count = alone_.direct.answered();
  for (const Call& call : calls_) count += call.direct.answered();
  return count;
}

}  // namespace

namespace {

// Number of multiprocessors of the GPU that would be used.
absl::StatusOr<uint32_t> FindGpu() {
  int count = 0;
  cudaError_t code = cudaGetDeviceCount(&count);
  cudaDeviceProp properties;
  if (code == cudaSuccess && count > 0) code = cudaGetDeviceProperties(&properties, 0);
  if (code != cudaSuccess || count == 0) {
    // The error does not stick, but would be the next one to be seen.
    static_cast<void>(cudaGetLastError());
    return absl::UnavailableError(absl::StrCat(
        "no GPU: ", code == cudaSuccess ? "the driver sees none" : cudaGetErrorString(code)));
  }
  if (properties.major < kComputeMajorMin) {
    return absl::UnavailableError(absl::StrCat("the GPU has compute capability ", properties.major,
                                               ".", properties.minor, ", expected 8.0 or more"));
  }
  return static_cast<uint32_t>(properties.multiProcessorCount);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> NewCudaDevice(const DeviceOptions& options) {
  absl::StatusOr<uint32_t> multiprocessors = FindGpu();
  if (!multiprocessors.ok()) return multiprocessors.status();
  // The others are the callers'.
  const uint32_t threads =
      options.thread_count == 0 ? std::max(1U, AvailableCpus() / 2) : options.thread_count;
  return std::make_unique<CudaDevice>(threads, options.spin_us, *multiprocessors);
}

uint64_t GroupsAnsweredDirectly(const Device& cuda_device) {
  return static_cast<const CudaDevice&>(cuda_device).groups_answered_directly();
}

}  // namespace kvservice
