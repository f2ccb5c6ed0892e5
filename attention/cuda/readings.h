// What the groups of a wave want read, run on the device: attention over sets of tokens, scans of
// sketches, single logits, and what plans and proofs read of sketches. Built on the host, executed
// in one go with one copy in and one out, and handed back as the host's structures.
//
// One thread, except where it says otherwise.

#ifndef KVSERVICE_ATTENTION_CUDA_READINGS_H_
#define KVSERVICE_ATTENTION_CUDA_READINGS_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "absl/types/span.h"
#include "attention/cpu/attend_kernel.h"
#include "attention/cpu/group.h"
#include "attention/cpu/group_memory.h"
#include "attention/cuda/arena.h"
#include "attention/cuda/kernels.h"
#include "attention/device.h"
#include "attention/kv_view.h"

namespace kvservice::cuda {

CacheShape ShapeOf(const KvLayout& layout);

// What attention over a set came to, from what the kernel left: [head_count] sums and with values
// [head_count][head_dim] outputs. chain_tokens: tokens of a job, at most.
Partial PartialOf(const LayerShape& shape, const HeadQueries& queries, bool bounded,
                  uint32_t chain_tokens, const HeadSums* sums, const double* out);
// The same without outputs, for MergePartials with a head_dim of 0; `part` keeps its memory.
void MassesOf(const LayerShape& shape, const HeadQueries& queries, bool bounded,
              uint32_t chain_tokens, const HeadSums* sums, Partial* part);

// Memory of single reads, which several threads may make: the mutex is held during each.
struct ScoreMemory {
  std::mutex mutex;
  Arena to_device{Arena::Sides::kBoth};
  Arena to_host{Arena::Sides::kBoth};
};

// A device and its stream; all is borrowed.
struct Context {
  cudaStream_t stream = nullptr;
  uint32_t multiprocessors = 1;
  const float* radius_scale = nullptr;  // kRadiusScale in device memory
  ScoreMemory* score_memory = nullptr;
};

// Where the slices and sketches of a row are, in device memory: [BlockCount(length)] pointers each;
// `view` has the same pointers in host memory.
struct RowTables {
  KvView view;
  const std::byte* const* slices = nullptr;
  const std::byte* const* sketches = nullptr;
};

// What a job should hold so that all jobs run at once: `total` things in `set_count` sets, each of
// which may have one job that is not full, and at least `least`.
uint64_t JobTarget(uint64_t total, size_t set_count, uint64_t places, uint64_t least);
// Tokens below which a job of attention does not fill its queues, and pages of a scan.
inline constexpr uint32_t kJobTokensMin = 128;
inline constexpr uint32_t kJobPagesMin = 16;
// Jobs of a call that run side by side; of a scan several for each place, since pages take unequal
// time where sets differ.
uint32_t AttendPlaces(const Context& context, const AttendCall& call);
uint32_t ScanPlaces(const Context& context);
// At least the norm whose square is this, as kernels add it up in fp32.
double KeyNormUp(float squares);
// The same for the squares that LargestKey and BoundKeys find.
float LargestKeyNorm(float squares);

class Readings {
 public:
  explicit Readings(const Context& context)
      : context_(context),
        to_device_(Arena::Sides::kBoth),
        to_host_(Arena::Sides::kBoth),
        scratch_(Arena::Sides::kDevice) {}

  // Starts over. The shape is borrowed until Run returns.
  void Begin(const LayerShape& shape);
  // Attention over `tokens`, added to `to` by Run. Both are borrowed; an empty set does nothing.
  void Attend(const RowTables& row, const Group& group, const TokenMask& tokens, bool read_values,
              Partial* to);
  // Weights of the pages with a token, written to `to` by Run.
  void Scan(const RowTables& row, const Group& group, const TokenMask& tokens, ScanWeights* to);
  bool empty() const { return attends_.empty() && scans_.empty(); }
  // Executes what was asked for and waits for it.
  void Run();

 private:
  struct AttendReading {
    AttendSet set;
    const Group* group;
    const TokenMask* tokens;
    Partial* to;
    Slot<double> out;
    Slot<HeadSums> sums;
    bool bound_masses;
    uint32_t index;  // among the sets of its call
    uint32_t token_count;
    uint32_t job_tokens_max;
  };
  struct ScanReading {
    ScanSet set;
    const Group* group;
    const TokenMask* tokens;
    ScanWeights* to;
    Slot<float> weights;
    Slot<int32_t> reference;
    Slot<float> page_sum, lower_share, estimate_share;
    uint32_t page_count;
  };

  const uint64_t* UploadMask(const TokenMask& tokens);
  const float* UploadQueries(const Group& group);
  const uint32_t* UploadVisible(const Group& group);
  void StartAttends(bool bounded);
  void CutIntoJobs(AttendReading* reading, uint64_t target, std::vector<AttendJob>* jobs);
  void StartScans(bool bounded);
  void FinishAttend(const AttendReading& reading) const;
  void FinishScan(const ScanReading& reading) const;

  const Context context_;
  const LayerShape* shape_ = nullptr;
  Arena to_device_, to_host_, scratch_;
  std::vector<AttendReading> attends_;
  std::vector<ScanReading> scans_;
  std::vector<AttendCall> attend_calls_;
  std::vector<ScanCall> scan_calls_;
};

// What one group reads itself, while it plans and proves.
class GroupReader : public GroupMemory {
 public:
  // heads, value_codes: of the row's blocks from block_begin on, [blocks] and [blocks][64]; null
  // where the plan reads none.
  void Set(const Context& context, const LayerShape& shape, uint32_t kv_head, const RowTables& row,
           uint32_t block_begin, const PageHead* heads, const uint8_t* value_codes);

  uint64_t Exact(uint32_t block) const override { return heads_[block - block_begin_].exact; }
  float ValueNormMax(uint32_t block) const override {
    return heads_[block - block_begin_].value_norm_max;
  }
  ValueNorms BoundValueNorms(absl::Span<const uint64_t> tokens,
                             uint32_t block_begin) const override;
  void BoundValues(uint32_t block, float* bounds) const override;
  void Score(const ScoreTask& task, kvservice::Score* scores, float* values) const override;
  std::vector<const std::byte*> Boxes(absl::Span<const uint32_t> blocks,
                                      std::vector<std::byte>* storage) const override;
  std::vector<const std::byte*> Keys(absl::Span<const uint32_t> positions,
                                     std::vector<std::byte>* storage) const override;
  float KeyNormMax(uint32_t begin, uint32_t end) const override;

 private:
  // Copies [offset, bytes) of what lies at each of `from` and answers where copies begin.
  std::vector<const std::byte*> Fetch(absl::Span<const std::byte* const> from, size_t offset,
                                      size_t bytes, std::vector<std::byte>* storage) const;

  Context context_;
  const LayerShape* shape_ = nullptr;
  uint32_t kv_head_ = 0;
  RowTables row_;
  uint32_t block_begin_ = 0;
  const PageHead* heads_ = nullptr;
  const uint8_t* value_codes_ = nullptr;
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_READINGS_H_
