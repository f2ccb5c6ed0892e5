// Groups (one KV head of one row each) whose plans are simple, on their way through the device in
// one go: mark what is read in any case, scan, attend to the first part, choose, attend to what was
// chosen, add up. Nothing in between waits for the host, and what comes back is outputs and a few
// numbers per head.
//
// Launched and looked at by one thread. Threads of the pool fill in queries, one group each, while
// one lays out what is scanned; what is attended to it lays out while the device scans.

#ifndef KVSERVICE_ATTENTION_CUDA_WAVE_H_
#define KVSERVICE_ATTENTION_CUDA_WAVE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "attention/cpu/attend_kernel.h"
#include "attention/cpu/head_queries.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/cpu/thread_pool.h"
#include "attention/cuda/anchors.h"
#include "attention/cuda/arena.h"
#include "attention/cuda/choice.h"
#include "attention/cuda/kernels.h"
#include "attention/cuda/readings.h"
#include "attention/device.h"

namespace kvservice::cuda {

// A thread of the host, which looks for work while calls come, is worth having for so many groups.
inline constexpr uint32_t kGroupsPerThread = 2;

// One group and what its plan asks for, as far as that is known before anything is read.
struct WaveGroup {
  AttendRow* row = nullptr;
  RowTables tables;
  uint32_t kv_head = 0;
  bool reads_all = false;  // without a choice
  // A list: positions of the middle, ascending, and behind them all of [fresh_begin, fresh_end).
  // Others count for nothing. Only without a proof. It is settled, in place of a choice; or its
  // tokens compete for so many places. Borrowed until the wave has been built and answered.
  bool listed = false;
  bool competes = false;
  absl::Span<const uint32_t> list;
  uint32_t fresh_begin = 0;
  uint32_t fresh_end = 0;
  uint32_t places = 0;
  // What the choice aims at instead of the plan's mass_limit; 0 = that.
  float mass_limit = 0.0F;
  // Tokens that were scanned for it before.
  uint32_t scanned_before = 0;
  // An anchor with these queries is made of what is chosen, and remembers what verified sharing
  // estimates from. Empty: none.
  absl::Span<const float> anchor_queries;
  bool verifies = false;
  uint32_t covered_end = 0;  // the choice has considered the middle up to here
  // Keys from this token on have their largest norm reported (ChoiceStats::key_squares).
  uint32_t norm_begin = ~uint32_t{0};
  float query_distance = -1.0F;  // for the report

  // Set by Build.
  uint32_t begin = 0;  // first token that a query token sees
  uint32_t block_begin = 0;
  const HeadQueries* queries = nullptr;
  uint32_t first_job_tokens_max = 0;
  // What came back.
  Slot<ChoiceStats> stats;
  Slot<HeadSums> first_sums, chosen_sums;  // [heads]
  Slot<float> out;                         // [heads][head_dim]
  Slot<DroppedSums> dropped;               // [heads]
  Slot<uint64_t> first, chosen;            // words, where they are wanted
  // Of verified sharing, see AnchorSet.
  Slot<HeadSums> anchor_sums;
  Slot<float> anchor_shift, anchor_variance;

  // What is read is known before a weight is.
  bool settled() const { return reads_all || listed; }
  bool has_list() const { return listed || competes; }
  // Tokens that are chosen by rank.
  uint32_t top_k() const { return competes ? places : row->plan.keep.top_k; }
  // A position counted from the first block, 0 for those before it.
  uint32_t Relative(uint32_t position) const {
    const uint32_t base = block_begin * kBlockTokens;
    return std::max(position, base) - base;
  }
  uint32_t listed_count() const {
    return static_cast<uint32_t>(list.size()) + fresh_end - fresh_begin;
  }
  bool proves() const { return row->plan.prove != Guarantee::kNone; }
  bool has_hidden() const { return row->plan.visible_begin > std::max(row->plan.sink_end, begin); }
};

class Wave {
 public:
  explicit Wave(const Context& context);
  ~Wave();
  Wave(const Wave&) = delete;
  Wave& operator=(const Wave&) = delete;

  // Tokens of weights that a group of this row takes room for, times heads.
  static size_t WeightBytes(const LayerShape& shape, const AttendRow& row);

  // Takes groups that are all proven or all not, sends them to the device, when what is in `after`
  // now is done, and asks for the results. The shape and rows are borrowed. `append` may add to
  // `after` what stores tokens at the end of rows, and then returns true: scans, which read
  // sketches alone, do not wait for it. Two waves may be on their way at the same time; Wait ends
  // when everything has come back.
  void Fly(const LayerShape& shape, std::vector<WaveGroup> groups, ThreadPool* pool,
           cudaStream_t after, absl::FunctionRef<bool()> append);
  void Wait();
  // True when Wait would not wait.
  bool IsDone() const;

  // The same in steps, for measuring: all that the host does; to the device, behind what `after`
  // holds; what happens there, up to a stage. Launch alone may be captured in a graph.
  void Build(const LayerShape& shape, std::vector<WaveGroup> groups, ThreadPool* pool);
  void Upload(cudaStream_t after);
  enum class Stage : uint8_t { kMark, kScan, kThresholds, kChoose, kAll };
  void Launch(cudaStream_t stream, Stage last = Stage::kAll);

  // The wave's own.
  cudaStream_t stream() const { return context_.stream; }
  size_t size() const { return groups_.size(); }
  const WaveGroup& group(size_t i) const { return groups_[i]; }
  // Begins to fetch what came back of a group.
  void Prefetch(const WaveGroup& group) const;
  // Masses of all heads over what was read (`out` is empty: see WaveGroup::out); `part` is memory.
  void Kept(const WaveGroup& group, Partial* kept, Partial* part) const;
  // The memory of the last wave's groups, for those of the next.
  std::vector<WaveGroup> TakeGroups();
  bool chooses() const { return chooses_; }
  uint32_t launch_count() const { return launch_count_; }

 private:
  struct Inputs {
    HeadQueries queries;  // of the host's bounds: filled while the device works
    // As they came, and what the device makes of them; where others than MarkWords read the table.
    float* q = nullptr;
    QuerySet set;
    const float* table = nullptr;
    Slot<uint32_t> visible;
    Slot<uint32_t> list;                 // counted from the group's first block
    Slot<double> first_out, chosen_out;  // [heads][head_dim], on the device alone
    std::vector<AttendJob> first_jobs;
  };
  // Tables of the sketches of some rows: [kv_head_count][1 + directions][head_dim], metrics and
  // weights.
  struct Tables {
    absl::Span<const SketchTable> from;
    Slot<float> place;
  };

  bool Scans(const WaveGroup& group) const;
  uint32_t BlocksOf(const WaveGroup& group) const;
  uint32_t HeadsOf(const WaveGroup& group) const;
  size_t TableFloats() const;
  Slot<float> TablesOf(const AttendRow& row);
  void TakeInputs(uint32_t index);
  void Take(const LayerShape& shape, std::vector<WaveGroup> groups);
  void Prepare(ThreadPool* pool);
  void LayChoice();
  void LayAttentions(ThreadPool* pool);
  void Mark(cudaStream_t stream);
  void Fill(uint32_t index);
  void FillTables(const Tables& tables) const;
  void FillHostQueries(ThreadPool* pool);
  void SetRanges(const WaveGroup& group, ChoiceGroup* choice) const;
  void SetRules(const WaveGroup& group, ChoiceGroup* choice) const;
  void ShareOut(uint32_t all_blocks, ChoiceGroup* choice) const;
  void TakeWords(WaveGroup* group, ChoiceGroup* choice);
  void TakeScratch(const WaveGroup& group, ChoiceGroup* choice);
  void TakeZeros(ChoiceGroup* choice);
  void TakeResults(uint32_t index);
  void SetList(uint32_t index);
  void BuildChoices();
  void BuildFirst(ThreadPool* pool);
  void CutFirst(uint32_t index, uint32_t words_per_job);
  void CutListed(uint32_t index, uint64_t tokens_per_job);
  ScanSet ScanSetOf(uint32_t index) const;
  void BuildScan();
  void BuildChosen();
  void BuildMerge();
  void BuildAnchors();
  AttendSet SetOf(uint32_t index, const uint64_t* words) const;

  void Run(cudaError_t code, const char* what);
  void Fork(cudaStream_t stream);
  void LaunchScan(cudaStream_t stream);
  void LaunchFirst();
  void LaunchRest(cudaStream_t stream, Stage last);

  Context context_;
  cudaStream_t side_ = nullptr;
  cudaEvent_t forked_ = nullptr;
  cudaEvent_t appended_ = nullptr;
  cudaEvent_t attended_ = nullptr;
  const LayerShape* shape_ = nullptr;
  std::vector<WaveGroup> groups_;
  std::deque<Inputs> inputs_;
  std::vector<Tables> tables_;
  absl::Span<ChoiceGroup> choices_;  // of to_device_
  Slot<QuerySet> query_sets_;        // [groups]
  bool bounded_ = false;
  bool lists_ = false;  // some group has a list
  bool chooses_ = false;
  bool bounds_values_ = false;
  bool overlaps_ = false;
  bool ranks_ = false;
  uint32_t head_count_max_ = 0;
  uint32_t launch_count_ = 0;
  // What is marked and scanned; what is attended to; queries, lists and outputs.
  Arena to_device_{Arena::Sides::kBoth};
  Arena attentions_{Arena::Sides::kBoth};
  Arena on_host_{Arena::Sides::kHost};
  Arena to_host_{Arena::Sides::kBoth};
  Arena scratch_{Arena::Sides::kDevice};
  Slot<ChoiceStats> stats_;
  Slot<uint32_t> tickets_;  // [groups][2][head_count_max]
  ChoiceCall choice_;
  ScanCall scan_;
  AttendCall first_, chosen_;
  MergeCall merge_;
  AnchorCall anchors_;
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_WAVE_H_
