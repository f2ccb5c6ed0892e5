#include "attention/cpu/device.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cassert>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "attention/cpu/attend_kernel.h"
#include "attention/cpu/choose.h"
#include "attention/cpu/group.h"
#include "attention/cpu/host_memory.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/cpu/seal_kernel.h"
#include "attention/cpu/thread_pool.h"
#include "attention/host_lists.h"
#include "attention/sketch.h"

namespace kvservice {
namespace {

constexpr size_t kPageBytes = 4096;
// Memory from this size on asks for huge pages: a scan of random rows misses the TLB without them.
constexpr size_t kHugePageBytes = size_t{2} << 20;
// A row of a long sequence needs weights of every sealed token; groups are executed in waves so
// that those of one wave stay below this, or in a wave of their own.
constexpr size_t kWaveBytesMax = size_t{256} << 20;
// Weights that were scanned to choose from are read right afterwards: those of a wave stay below
// this per thread, and so in the caches of the cores, or in a wave of their own.
constexpr size_t kWaveScannedBytesMax = size_t{1} << 20;
constexpr size_t kWaveGroupsMax = 1024;
// Work is cut into about this many tasks per thread, so that a thread which starts late or runs
// slowly holds nobody up, but not into tasks of less than a few microseconds.
constexpr uint32_t kTasksPerThread = 8;
constexpr uint32_t kAttendTokensMin = 256;
constexpr uint32_t kScanPagesMin = 16;
constexpr size_t kAppendBytesMin = size_t{128} << 10;

uint32_t AvailableCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return static_cast<uint32_t>(std::max(1, CPU_COUNT(&set)));
}

void ReleaseMemory(std::byte* data, size_t bytes) {
  munmap(data, (bytes + kPageBytes - 1) / kPageBytes * kPageBytes);
}

void AppendOne(const KvLayout& layout, const AppendSlice& append) {
  assert(append.first + append.token_count <= kBlockTokens);
  const size_t vector_bytes = layout.vector_bytes();
  for (uint32_t token = 0; token < append.token_count; ++token) {
    for (uint32_t head = 0; head < layout.kv_head_count; ++head) {
      const size_t from = (size_t{token} * layout.kv_head_count + head) * vector_bytes;
      std::byte* row = append.slice + layout.RowOffset(head, append.first + token);
      std::memcpy(row, append.k + from, vector_bytes);
      std::memcpy(row + vector_bytes, append.v + from, vector_bytes);
    }
  }
}

class CpuDevice : public Device {
 public:
  explicit CpuDevice(uint32_t thread_count)
      : pool_(thread_count),
        attend_scratch_(thread_count),
        choose_scratch_(thread_count),
        proof_scratch_(thread_count) {}

  std::string_view name() const override { return "cpu"; }
  absl::StatusOr<DeviceMemory> Allocate(size_t bytes) override;
  std::unique_ptr<TokenLists> NewTokenLists(const KvLayout& layout, uint32_t anchors_max) override {
    return std::make_unique<HostLists>(layout, anchors_max);
  }
  void Copy(absl::Span<const MemoryCopy> copies) override {
    for (const MemoryCopy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  void Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) override;
  void Seal(const KvLayout& layout, absl::Span<const SealSlice> slices) override;
  void Attend(const LayerShape& shape, absl::Span<AttendRow> rows) override;
  void ParallelFor(uint32_t count, absl::FunctionRef<void(uint32_t)> task) override {
    pool_.ParallelFor(count, [task](uint32_t i, uint32_t) { task(i); });
  }

 private:
  // What a task reads and where the result goes.
  enum class Part : uint8_t { kKept, kRest, kGrown, kWeights };
  struct Job {
    uint32_t group = 0;
    Part part = Part::kKept;
    bool read_values = true;
    uint32_t first_word = 0;
    uint32_t word_count = 0;
    const TokenMask* tokens = nullptr;
    Partial partial;
  };
  struct Reading {
    uint32_t group;
    Part part;
    bool read_values;
    TokenMask tokens;
  };

  void Unrotate(const LayerShape& shape, absl::Span<AttendRow> rows);
  void ExecuteWave(const LayerShape& shape, absl::Span<AttendRow> rows, size_t first_group,
                   size_t group_count);
  void Want(uint32_t group, Part part, bool read_values, TokenMask tokens);
  void CutIntoJobs();
  void AddJobs(const Reading& reading, uint64_t target);
  void RunJobs(const LayerShape& shape);
  void RunJob(const LayerShape& shape, Job* job, uint32_t thread);
  static Partial* PartialOf(Part part, Group* group);
  void MergeJobs(const LayerShape& shape, uint32_t group);
  void Conclude(const LayerShape& shape, std::vector<Group::Verdict>* verdicts);
  void ReadRests(const LayerShape& shape, absl::Span<const Group::Verdict> verdicts);

  // Each used by one thread of the pool at a time.
  ThreadPool pool_;
  std::vector<AttendScratch> attend_scratch_;
  std::vector<ChooseScratch> choose_scratch_;
  std::vector<ProofScratch> proof_scratch_;
  // Memory of the current wave, kept for the next: only the calling thread changes their number.
  std::deque<Group> groups_;
  std::deque<HostMemory> memory_;
  std::vector<Reading> readings_;
  std::deque<Job> jobs_;
  size_t job_count_ = 0;
  std::vector<std::pair<size_t, size_t>> jobs_of_group_;  // [begin, end)
  std::vector<std::vector<float>> unrotated_;             // [row][query_head_count][head_dim]
};

absl::StatusOr<DeviceMemory> CpuDevice::Allocate(size_t bytes) {
  const size_t rounded = std::max<size_t>(1, (bytes + kPageBytes - 1) / kPageBytes) * kPageBytes;
  void* data = rounded < bytes ? MAP_FAILED
                               : mmap(nullptr, rounded, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes"));
  }
  if (rounded >= kHugePageBytes) madvise(data, rounded, MADV_HUGEPAGE);  // a wish
  // Keys and values of tenants are not for core files.
  madvise(data, rounded, MADV_DONTDUMP);
  return DeviceMemory(static_cast<std::byte*>(data), std::max<size_t>(bytes, 1), ReleaseMemory);
}

void CpuDevice::Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) {
  const size_t token_bytes = size_t{layout.kv_head_count} * layout.row_bytes();
  // [begins[i], begins[i + 1]) is one task: enough bytes to be worth a thread.
  std::vector<size_t> begins = {0};
  size_t bytes = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    bytes += slices[i].token_count * token_bytes;
    if (bytes < kAppendBytesMin) continue;
    begins.push_back(i + 1);
    bytes = 0;
  }
  if (begins.back() != slices.size()) begins.push_back(slices.size());
  pool_.ParallelFor(static_cast<uint32_t>(begins.size() - 1), [&](uint32_t task, uint32_t) {
    for (size_t i = begins[task]; i < begins[task + 1]; ++i) AppendOne(layout, slices[i]);
  });
}

void CpuDevice::Seal(const KvLayout& layout, absl::Span<const SealSlice> slices) {
  const SketchLayout sketch(layout.head_dim);
  const uint32_t heads = layout.kv_head_count;
  pool_.ParallelFor(static_cast<uint32_t>(slices.size()) * heads, [&](uint32_t task, uint32_t) {
    const SealSlice& seal = slices[task / heads];
    const uint32_t head = task % heads;
    SealPage(layout, seal.slice + layout.RowOffset(head, 0), seal.block_index, seal.tables[head],
             seal.sketch + head * sketch.page_bytes);
  });
}

// An anchor is found by, and made for, the newest query.
void CpuDevice::Unrotate(const LayerShape& shape, absl::Span<AttendRow> rows) {
  const size_t token_floats = size_t{shape.layout.query_head_count} * shape.layout.head_dim;
  if (unrotated_.size() < rows.size()) unrotated_.resize(rows.size());
  std::vector<uint32_t> reusing;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].plan.source == Source::kReuse) reusing.push_back(static_cast<uint32_t>(i));
  }
  pool_.ParallelFor(static_cast<uint32_t>(reusing.size()), [&](uint32_t task, uint32_t) {
    const AttendRow& row = rows[reusing[task]];
    std::vector<float>& to = unrotated_[reusing[task]];
    to.resize(token_floats);
    UnrotateQueries(shape, row.view.length - 1, row.q + (row.query_count - 1) * token_floats,
                    to.data());
  });
}

void CpuDevice::Want(uint32_t group, Part part, bool read_values, TokenMask tokens) {
  if (CountTokens(tokens) == 0) return;
  readings_.push_back({group, part, read_values, std::move(tokens)});
}

void CpuDevice::AddJobs(const Reading& reading, uint64_t target) {
  const bool by_page = reading.part == Part::kWeights;
  uint64_t size = 0;
  uint32_t first = 0;
  const auto word_count = static_cast<uint32_t>(reading.tokens.size());
  for (uint32_t word = 0; word < word_count; ++word) {
    const auto tokens = static_cast<uint32_t>(std::popcount(reading.tokens[word]));
    size += by_page ? (tokens != 0 ? 1 : 0) : tokens;
    if (size == 0) first = word + 1;
    if (size == 0 || (size < target && word + 1 < word_count)) continue;
    if (jobs_.size() <= job_count_) jobs_.emplace_back();
    Job& job = jobs_[job_count_++];
    job.group = reading.group;
    job.part = reading.part;
    job.read_values = reading.read_values;
    job.first_word = first;
    job.word_count = word + 1 - first;
    job.tokens = &reading.tokens;
    size = 0;
    first = word + 1;
  }
}

// Cuts `readings_` into jobs of about equal size; those of a group are neighbours.
void CpuDevice::CutIntoJobs() {
  uint64_t tokens = 0;
  uint64_t pages = 0;
  for (const Reading& reading : readings_) {
    if (reading.part == Part::kWeights) {
      for (const uint64_t word : reading.tokens) pages += word != 0 ? 1 : 0;
    } else {
      tokens += CountTokens(reading.tokens);
    }
  }
  const uint64_t parts = uint64_t{kTasksPerThread} * pool_.thread_count();
  const uint64_t attend_target = std::max<uint64_t>(kAttendTokensMin, tokens / parts);
  const uint64_t scan_target = std::max<uint64_t>(kScanPagesMin, pages / parts);
  job_count_ = 0;
  std::fill(jobs_of_group_.begin(), jobs_of_group_.end(), std::make_pair(size_t{0}, size_t{0}));
  for (const Reading& reading : readings_) {
    const size_t begin = job_count_;
    AddJobs(reading, reading.part == Part::kWeights ? scan_target : attend_target);
    auto& range = jobs_of_group_[reading.group];
    if (range.second == 0) range.first = begin;
    range.second = job_count_;
  }
}

void CpuDevice::RunJob(const LayerShape& shape, Job* job, uint32_t thread) {
  Group& group = groups_[job->group];
  const absl::Span<const uint64_t> tokens =
      absl::MakeConstSpan(*job->tokens).subspan(job->first_word, job->word_count);
  if (job->part == Part::kWeights) {
    ScanTask task;
    task.shape = &shape;
    task.view = &group.row().view;
    task.kv_head = group.kv_head();
    task.queries = &group.queries();
    task.scan_queries = &group.scan_queries();
    task.table = &group.table();
    task.tokens = tokens;
    task.block_begin = group.block_begin() + job->first_word;
    return ScanPages(task, &group.weights);
  }
  AttendTask task;
  task.shape = &shape;
  task.view = &group.row().view;
  task.kv_head = group.kv_head();
  task.queries = &group.queries();
  task.tokens = tokens;
  task.block_begin = group.block_begin() + job->first_word;
  task.read_values = job->read_values;
  task.bound_masses = group.bounds_masses();
  AttendTokens(task, &attend_scratch_[thread], &job->partial);
}

void CpuDevice::RunJobs(const LayerShape& shape) {
  CutIntoJobs();
  pool_.ParallelFor(static_cast<uint32_t>(job_count_),
                    [&](uint32_t task, uint32_t thread) { RunJob(shape, &jobs_[task], thread); });
}

Partial* CpuDevice::PartialOf(Part part, Group* group) {
  switch (part) {
    case Part::kRest:
      return &group->rest;
    case Part::kGrown:
      return &group->grown;
    case Part::kKept:
    case Part::kWeights:
      break;
  }
  return &group->kept;
}

void CpuDevice::MergeJobs(const LayerShape& shape, uint32_t group) {
  const auto [begin, end] = jobs_of_group_[group];
  for (size_t i = begin; i < end; ++i) {
    const Job& job = jobs_[i];
    if (job.part == Part::kWeights) continue;
    MergePartials(shape.layout.head_dim, job.partial, PartialOf(job.part, &groups_[group]));
  }
}

// Answers densely where a verdict asks for it.
void CpuDevice::ReadRests(const LayerShape& shape, absl::Span<const Group::Verdict> verdicts) {
  readings_.clear();
  for (uint32_t i = 0; i < verdicts.size(); ++i) {
    if (verdicts[i] != Group::Verdict::kReadRest) continue;
    const Group& group = groups_[i];
    // Keys alone were read for an exact proof; their masses would count twice.
    groups_[i].rest.Resize(group.head_count(), shape.layout.head_dim);
    Want(i, Part::kRest, /*read_values=*/true, group.Rest());
  }
  const auto asks = [](Group::Verdict verdict) { return verdict == Group::Verdict::kReadRest; };
  if (std::none_of(verdicts.begin(), verdicts.end(), asks)) return;
  RunJobs(shape);
  pool_.ParallelFor(static_cast<uint32_t>(verdicts.size()), [&](uint32_t i, uint32_t thread) {
    if (verdicts[i] != Group::Verdict::kReadRest) return;
    MergeJobs(shape, i);
    groups_[i].ConcludeDense(&proof_scratch_[thread]);
  });
}

// Concludes all groups, reading more for those that grow, in rounds. A group grows a bounded number
// of times.
void CpuDevice::Conclude(const LayerShape& shape, std::vector<Group::Verdict>* verdicts) {
  const auto count = static_cast<uint32_t>(verdicts->size());
  const auto grows = [](Group::Verdict verdict) { return verdict == Group::Verdict::kReadMore; };
  pool_.ParallelFor(count, [&](uint32_t i, uint32_t thread) {
    MergeJobs(shape, i);
    (*verdicts)[i] = groups_[i].Conclude(&proof_scratch_[thread]);
  });
  while (std::any_of(verdicts->begin(), verdicts->end(), grows)) {
    readings_.clear();
    for (uint32_t i = 0; i < count; ++i) {
      if (!grows((*verdicts)[i])) continue;
      groups_[i].grown.Resize(groups_[i].head_count(), shape.layout.head_dim);
      Want(i, Part::kGrown, /*read_values=*/true, groups_[i].more());
    }
    RunJobs(shape);
    pool_.ParallelFor(count, [&](uint32_t i, uint32_t thread) {
      if (!grows((*verdicts)[i])) return;
      MergeJobs(shape, i);
      (*verdicts)[i] = groups_[i].Conclude(&proof_scratch_[thread]);
    });
  }
}

void CpuDevice::ExecuteWave(const LayerShape& shape, absl::Span<AttendRow> rows, size_t first_group,
                            size_t group_count) {
  const uint32_t kv_heads = shape.layout.kv_head_count;
  const size_t head_floats = size_t{shape.layout.group_size()} * shape.layout.head_dim;
  const auto count = static_cast<uint32_t>(group_count);
  if (groups_.size() < count) groups_.resize(count);
  if (memory_.size() < count) memory_.resize(count);
  jobs_of_group_.resize(count);
  pool_.ParallelFor(count, [&](uint32_t i, uint32_t) {
    const size_t row = (first_group + i) / kv_heads;
    const auto kv_head = static_cast<uint32_t>((first_group + i) % kv_heads);
    absl::Span<const float> anchor;
    if (rows[row].plan.source == Source::kReuse) {
      anchor = absl::MakeConstSpan(unrotated_[row]).subspan(kv_head * head_floats, head_floats);
    }
    memory_[i].Set(shape, rows[row].view, kv_head);
    groups_[i].Prepare(shape, &rows[row], kv_head, &memory_[i], anchor);
  });

  readings_.clear();
  bool choose = false;
  for (uint32_t i = 0; i < count; ++i) {
    const Group& group = groups_[i];
    Want(i, Part::kWeights, /*read_values=*/false, group.to_scan());
    Want(i, Part::kKept, /*read_values=*/true, group.first());
    if (!group.has_choice() && group.wants_rest()) {
      Want(i, Part::kRest, group.wants_rest_values(), group.Rest());
    }
    choose |= group.has_choice();
  }
  RunJobs(shape);
  if (choose) {
    pool_.ParallelFor(count, [&](uint32_t i, uint32_t thread) {
      MergeJobs(shape, i);
      groups_[i].Decide(&choose_scratch_[thread]);
    });
    readings_.clear();
    for (uint32_t i = 0; i < count; ++i) {
      const Group& group = groups_[i];
      if (!group.has_choice()) continue;
      Want(i, Part::kKept, /*read_values=*/true, group.Unread());
      if (group.wants_rest()) Want(i, Part::kRest, group.wants_rest_values(), group.Rest());
    }
    RunJobs(shape);
  }

  std::vector<Group::Verdict> verdicts(count);
  Conclude(shape, &verdicts);
  ReadRests(shape, verdicts);
  for (uint32_t i = 0; i < count; ++i) {
    if (verdicts[i] != Group::Verdict::kFailed) continue;
    AttendRow& row = rows[(first_group + i) / kv_heads];
    row.status = absl::FailedPreconditionError(
        absl::StrCat("BOUND_NOT_MET: KV head ", groups_[i].kv_head(), " cannot prove its limits"));
  }
}

void CpuDevice::Attend(const LayerShape& shape, absl::Span<AttendRow> rows) {
  const KvLayout& layout = shape.layout;
  for (AttendRow& row : rows) {
    assert(row.query_count >= 1 && row.query_count <= kQueryTokensMax);
    row.status = absl::OkStatus();
  }
  Unrotate(shape, rows);
  const size_t total = rows.size() * layout.kv_head_count;
  for (size_t first = 0; first < total;) {
    size_t bytes = 0;
    size_t scanned_bytes = 0;
    size_t end = first;
    while (end < total && end - first < kWaveGroupsMax && bytes <= kWaveBytesMax &&
           scanned_bytes <= kWaveScannedBytesMax * pool_.thread_count()) {
      const AttendRow& row = rows[end / layout.kv_head_count];
      // A weight of every token and head, at most.
      const size_t weight_bytes =
          size_t{row.view.length} * row.query_count * layout.group_size() * sizeof(float);
      bytes += weight_bytes;
      if (row.plan.source == Source::kScan) scanned_bytes += weight_bytes;
      ++end;
    }
    ExecuteWave(shape, rows, first, end - first);
    first = end;
  }
  for (AttendRow& row : rows) {
    if (row.status.ok()) continue;
    std::fill_n(row.out, size_t{row.query_count} * layout.query_head_count * layout.head_dim, 0.0F);
    std::fill_n(row.lse, size_t{row.query_count} * layout.query_head_count, 0.0F);
  }
}

}  // namespace

std::unique_ptr<Device> NewCpuDevice(const DeviceOptions& options) {
  const uint32_t threads = options.thread_count == 0 ? AvailableCpus() : options.thread_count;
  return std::make_unique<CpuDevice>(threads);
}

}  // namespace kvservice
