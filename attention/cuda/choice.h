// Choosing on the device: from the ranges of a plan and the weights of a scan to the words of
// what is read, sums of what is not, and jobs of attention. As kernels.h: plain structs of device
// pointers, launchers that enqueue. Everything is the same for the same input, however it is spread
// over CTAs: counts are integers, and other sums are added up in a fixed order.

#ifndef KVSERVICE_ATTENTION_CUDA_CHOICE_H_
#define KVSERVICE_ATTENTION_CUDA_CHOICE_H_

#include <cstddef>
#include <cstdint>

#include "attention/cuda/choice-inl.h"
#include "attention/cuda/kernels.h"

namespace kvservice::cuda {

// Heads that a group may have here.
inline constexpr uint32_t kChoiceHeadsMax = 16;
// Blocks that one CTA may count, and that one warp may select from; warps of a CTA that selects.
inline constexpr uint32_t kPartBlocksMax = 256;
inline constexpr uint32_t kBatchBlocksMax = 32;
inline constexpr uint32_t kSelectWarps = 4;

// Shares of a head are weight * 2^(reference of the page - reference) * inverse.
struct HeadScale {
  float inverse = 1.0F;
  int32_t reference = 0;
};

// Where a group's choice has its thresholds. A token is kept if its score is at least `mass`, or by
// its rank: all above bin `rank_bin` and `rank_count` of those in it.
struct ChoiceThreshold {
  float mass = 0.0F;  // NaN: none
  uint32_t rank_bin = kBins;
  uint32_t rank_count = 0;
};

// What a group came to.
struct ChoiceStats {
  uint32_t always = 0;  // tokens
  uint32_t middle = 0;
  uint32_t scanned = 0;
  uint32_t listed = 0;  // of the middle, by ChoiceGroup::listed, read or competing
  uint32_t chosen = 0;
  uint32_t expected = 0;        // to be read of the middle, by the thresholds
  uint32_t everything = 0;      // the middle was read as a whole, chosen or not
  uint32_t job_tokens_max = 0;  // of the attention over what was chosen, at most
  uint32_t open_blocks = 0;     // blocks with values whose norms no sketch bounds
  // Largest norm of a value of a sealed block, of those that the row sees as a whole, and the
  // largest squared norm of a value that no sketch bounds.
  float norm_max = 0.0F;
  float whole_norm_max = 0.0F;
  float value_squares = 0.0F;
  float key_squares = 0.0F;  // the largest squared norm of the keys that were asked for
  ChoiceThreshold threshold;
};

// Weights of one head over what is not read, in units of 2^reference.
struct DroppedSums {
  double weight = 0.0;
  double lower = 0.0;
  double estimate = 0.0;
  int32_t reference = 0;
  uint32_t seen = 0;  // tokens that the head sees, scanned or not
};

// One KV head of one row. Words are [block_count].
struct alignas(16) ChoiceGroup {
  const std::byte* const* slices = nullptr;    // [block_count]
  const std::byte* const* sketches = nullptr;  // [block_count], null where not sealed
  ChoiceRanges ranges;
  uint32_t block_count = 0;
  uint32_t kv_head = 0;
  uint32_t head_count = 0;
  bool reads_sketches = false;
  bool reads_middle = false;  // at once
  bool scans_middle = false;
  bool scans_hidden = false;
  bool competes = false;  // of the middle `listed` alone is scanned and chosen from
  bool bounds_values = false;
  bool bounded = false;
  bool largest = false;     // scores are the largest share, else the sum
  float mass_limit = 0.0F;  // what is aimed at; 0 = off
  float dense_share = 1.0F;
  uint32_t top_k = 0;
  uint32_t sampled = kWordTokens;  // tokens of each block that are counted, with ranks
  uint32_t part_blocks = 0;        // of a CTA that counts
  uint32_t part_count = 0;
  uint32_t batch_blocks = 0;  // of a warp that selects
  uint32_t select_count = 0;  // CTAs that do
  uint32_t span_blocks = 1;   // of a span, whose chosen tokens are counted
  // [block_count], made here of tokens of the middle to read at once, or that compete; or null
  uint64_t* listed = nullptr;
  // Keys whose largest norm is wanted: tokens [norm_begin, norm_end) of the sequence, in its
  // blocks.
  const std::byte* const* norm_slices = nullptr;
  uint32_t norm_begin = 0;
  uint32_t norm_end = 0;
  // Made here.
  uint64_t* first = nullptr;  // read whatever is chosen
  uint64_t* to_scan = nullptr;
  uint64_t* chosen = nullptr;
  uint32_t* open_blocks = nullptr;  // [block_count]
  ChoiceStats* stats = nullptr;
  // Of the scan and of the attention over `first`.
  const float* weights = nullptr;  // as ScanSet
  const int32_t* reference = nullptr;
  const float* page_sum = nullptr;
  const float* lower_share = nullptr;
  const float* estimate_share = nullptr;
  const uint32_t* visible = nullptr;     // [head_count][2]
  const HeadSums* first_sums = nullptr;  // [head_count]
  // Scratch.
  HeadScale* scales = nullptr;       // [head_count]
  uint32_t* ties = nullptr;          // [select_count][kStepsOfBin], with top_k
  uint32_t* span_counts = nullptr;   // [spans]
  DroppedSums* part_sums = nullptr;  // [select_count][head_count]
  DroppedSums* dropped = nullptr;    // [head_count]
  // Of this, MarkWords makes zeros; all but tickets are of calls with ranks.
  uint4* zero = nullptr;
  uint32_t zero_count = 0;
  uint32_t* counts = nullptr;            // [kBins]
  uint32_t* sums = nullptr;              // [head_count][kBins]
  unsigned long long* hidden = nullptr;  // [head_count], shares in units of 2^-40
  uint32_t* tickets = nullptr;           // [2]
  // What `listed` is made of: tokens one by one, and all of [fresh_begin, fresh_end), counted from
  // block 0.
  const uint32_t* list = nullptr;  // [list_count], may be the host's
  uint32_t list_count = 0;
  uint32_t fresh_begin = 0;
  uint32_t fresh_end = 0;
};

struct ChoiceCall {
  CacheShape shape;
  const ChoiceGroup* groups = nullptr;
  uint32_t group_count = 0;
  uint32_t block_count_max = 0;
  uint32_t part_count_max = 0;
  uint32_t select_count_max = 0;
  uint32_t head_count_max = 0;
  bool ranks = false;                  // some group has top_k: scores are counted, not sampled
  bool bounds_values = false;          // some group does
  bool overlaps = false;               // kernels may start before those before them have ended
  const ChoiceStats* stats = nullptr;  // [group_count]
  // Of attentions; MarkWords makes zeros of them.
  uint32_t* tickets = nullptr;
  uint32_t tickets_per_group = 0;
  uint32_t norm_tokens_max = 0;
  // Attention over what is chosen: set i is that of group i, complete but for its jobs; the set
  // behind the last has no heads, so that jobs of it do nothing. Jobs are [job_count], at least
  // twice as many as there are groups, and parts [job_count][head_count_max] each.
  AttendSet* sets = nullptr;
  AttendJob* jobs = nullptr;
  uint32_t job_count = 0;
  uint32_t job_tokens_min = 0;
  float* parts = nullptr;
  HeadSums* part_sums = nullptr;
};

// Queries of a group as the caller sent them, and where they go as attention and scans want them
// (ScanSet). What is read may be the host's.
struct alignas(16) QuerySet {
  const float* q = nullptr;      // [head_count][head_dim]
  const float* table = nullptr;  // metric and weights of its sketches, [1 + directions][head_dim]
  float* qs = nullptr;
  float* qw = nullptr;  // null: nothing is scanned
  float* x = nullptr;   // null: without bounds, and so is norm
  double* norm = nullptr;
  uint32_t head_count = 0;
};

// What comes to the device with the first kernel.
struct ChoiceInputs {
  // Those of the call, where MarkWords reads them: they may be on their way to where others do.
  const ChoiceGroup* groups = nullptr;
  const QuerySet* queries = nullptr;  // [group_count], likewise
  float scale = 0.0F;                 // of queries
  Stretch copy;
};

// Fills words, counts and bounds of value norms of sealed blocks, prepares queries, and copies.
cudaError_t MarkWords(const ChoiceCall& call, const ChoiceInputs& inputs, cudaStream_t stream);
// Largest norms of keys, of groups that want them.
cudaError_t BoundKeys(const ChoiceCall& call, cudaStream_t stream);
// Value norms that no sketch bounds, after MarkWords; FindThresholds has them too.
cudaError_t BoundOpenValues(const ChoiceCall& call, cudaStream_t stream);
// After a scan of `to_scan` and attention over `first`, in this order: thresholds; what is chosen
// by them, sums of what is not, and the jobs of attention over `chosen`.
cudaError_t FindThresholds(const ChoiceCall& call, cudaStream_t stream);
cudaError_t CountThresholds(const ChoiceCall& call, cudaStream_t stream);  // of calls with ranks
cudaError_t SelectTokens(const ChoiceCall& call, cudaStream_t stream);

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_CHOICE_H_
