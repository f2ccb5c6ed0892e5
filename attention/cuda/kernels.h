// The kernels of the CUDA device, as the host sees them: plain structs of device pointers and one
// launcher per operation. No header of ours that needs a host library is included, so that nvcc
// compiles little and host compilers see no CUDA syntax.
//
// Launchers enqueue on `stream` and return the code of the launch; nothing here synchronises or
// allocates. All pointers are to device memory. A *head* is one query token and one query head of
// the group, as in attention/cpu/head_queries.h.

#ifndef KVSERVICE_ATTENTION_CUDA_KERNELS_H_
#define KVSERVICE_ATTENTION_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace kvservice::cuda {

// Element types, numbered as DType.
inline constexpr int kFloat32 = 0;
inline constexpr int kFloat16 = 1;
inline constexpr int kBfloat16 = 2;

// The slices of one layer (KvLayout) and their sketches (SketchLayout), in numbers.
struct CacheShape {
  uint32_t head_dim = 0;
  uint32_t kv_head_count = 0;
  int dtype = kBfloat16;
  uint32_t vector_bytes = 0;
  uint32_t row_bytes = 0;
  // Byte offsets within a sketch page, and its size.
  uint32_t directions = 0;
  uint32_t lo = 0, step = 0, pj = 0, r = 0, vn = 0, ps = 0, exact = 0, norms = 0, version = 0;
  uint32_t page_bytes = 0;
};

// What a kernel copies on its way: one side is pinned memory of the host, whose addresses hold on
// the device too. A copy of a few hundred KB costs a kernel some microseconds, and a copy engine as
// many and a launch more.
struct Stretch {
  const uint4* from = nullptr;
  uint4* to = nullptr;
  uint32_t count = 0;  // of 16 bytes
};

// Lets a kernel have so much dynamic shared memory, and as many CTAs of it run side by side as fit:
// left alone, the driver may keep most of the memory for the cache. The limit is the process's and
// is only ever raised. Any thread.
cudaError_t RaiseSharedLimit(const void* kernel, size_t bytes);

// ---- Append -------------------------------------------------------------------------------------

// Rows [token_count][kv_head_count] of K and of V, contiguous, and where they go.
struct AppendItem {
  std::byte* slice = nullptr;
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
  uint32_t first = 0;
  uint32_t token_count = 0;
};
cudaError_t Append(const CacheShape& shape, const AppendItem* items, uint32_t item_count,
                   cudaStream_t stream);

// ---- Seal ---------------------------------------------------------------------------------------

// One page to encode. The bytes are those that EncodeSketchPage writes on the host.
struct SealItem {
  const std::byte* rows = nullptr;  // slice + RowOffset(kv_head, 0)
  std::byte* page = nullptr;
  const float* metric = nullptr;        // [head_dim]
  const float* weights = nullptr;       // [directions][head_dim]
  const float* radius_scale = nullptr;  // [256], kRadiusScale
  uint32_t block_index = 0;
};
cudaError_t Seal(const CacheShape& shape, const SealItem* items, uint32_t item_count,
                 cudaStream_t stream);

// ---- What plans and proofs read of sketches
// ------------------------------------------------------

// Of one block and KV head. `value_squares` is the largest squared norm of a value whose norm no
// sketch bounds: all of an unsealed block that lie in the row's range, the `exact` ones of a sealed
// block; summed in fp32. Not finite if one is not.
struct PageHead {
  uint64_t exact = ~uint64_t{0};
  float value_norm_max = 0.0F;
  float value_squares = 0.0F;
};
struct PageHeadTask {
  const std::byte* const* slices = nullptr;    // [block_count]
  const std::byte* const* sketches = nullptr;  // [block_count], null where not sealed
  PageHead* heads = nullptr;                   // [block_count]
  uint8_t* value_codes = nullptr;              // [block_count][64], the sketch's vn; or null
  uint32_t kv_head = 0;
  uint32_t block_count = 0;
  // Tokens that the row sees, counted from its first block.
  uint32_t begin = 0;
  uint32_t end = 0;
  bool bounds_values = false;
};
cudaError_t ReadPageHeads(const CacheShape& shape, const PageHeadTask* tasks, uint32_t task_count,
                          uint32_t block_count_max, cudaStream_t stream);

// ---- Attend -------------------------------------------------------------------------------------

// What one head's attention over a set of tokens came to. Weights are e^logit 2^-reference.
struct HeadSums {
  double sum = 0.0;  // NaN if a logit is not finite
  int32_t reference = 0;
  float key_squares_max = 0.0F;
};

// Attention of all heads of one KV head of one row over a set of tokens.
struct AttendSet {
  const std::byte* const* slices = nullptr;  // [words]
  const uint64_t* tokens = nullptr;          // [words]: bit t of word b is token b * 64 + t
  const float* qs = nullptr;                 // [head_count][head_dim], scaled
  const uint32_t* visible = nullptr;         // [head_count][2], begin and end, counted from word 0
  double* out = nullptr;                     // [head_count][head_dim], weighted mean of V
  HeadSums* sums = nullptr;                  // [head_count]
  float* parts = nullptr;                    // [job_count][head_count][head_dim]
  HeadSums* part_sums = nullptr;             // [job_count][head_count]
  uint32_t* tickets = nullptr;               // [tiles], zero; zero again afterwards
  uint32_t head_count = 0;
  uint32_t kv_head = 0;
  uint32_t job_count = 0;
  bool read_values = true;
};
struct AttendJob {
  uint32_t set = 0;
  uint32_t index = 0;  // among the jobs of the set
  uint32_t first_word = 0;
  uint32_t word_count = 0;
};
struct AttendCall {
  CacheShape shape;
  float softcap = 0.0F;
  // Sums carry the largest norm of a key, and every rounding is that of an fp32 multiply-add.
  // Otherwise 16-bit caches are read by tensor cores, of whose roundings nothing is proven.
  bool bound_masses = false;
  const AttendSet* sets = nullptr;
  const AttendJob* jobs = nullptr;
  uint32_t job_count = 0;
  uint32_t head_count_max = 0;
};
// How a call is laid out: heads that one CTA takes, each tile of them has a ticket of its own, and
// CTAs that run on one multiprocessor side by side.
struct AttendTiling {
  uint32_t heads = 1;
  uint32_t ctas = 1;
};
AttendTiling AttendTilingOf(const AttendCall& call);
cudaError_t Attend(const AttendCall& call, cudaStream_t stream);

// Outputs of one KV head of one row: means over two disjoint sets of tokens, by their masses.
struct MergeSet {
  const HeadSums* first_sums = nullptr;   // [head_count]
  const double* first_out = nullptr;      // [head_count][head_dim]
  const HeadSums* chosen_sums = nullptr;  // null: there is only the first
  const double* chosen_out = nullptr;
  float* out = nullptr;  // [head_count][head_dim], may be the host's
  uint32_t head_count = 0;
};
struct MergeCall {
  const MergeSet* sets = nullptr;
  Stretch results = {};  // of kernels before this one, to the host
  uint32_t set_count = 0;
  uint32_t head_count_max = 0;
  uint32_t head_dim = 0;
};
cudaError_t MergeOutputs(const MergeCall& call, cudaStream_t stream);

// ---- Scan ---------------------------------------------------------------------------------------

// Weights of all heads of one KV head of one row, as ScanWeights (attention/cpu/scan_kernel.h).
struct ScanSet {
  const std::byte* const* sketches = nullptr;  // [block_count]
  const uint64_t* tokens = nullptr;            // [block_count]; zero: the page is left out
  const float* metric = nullptr;               // [head_dim]
  const float* qs = nullptr;                   // [head_count][head_dim], scaled
  const float* x = nullptr;                    // [head_count][head_dim], of bounded scans
  const float* qw = nullptr;                   // [directions][head_count]
  const double* norm = nullptr;                // [head_count][4]: norm, weight, used, x_norm
  const uint32_t* visible = nullptr;           // [head_count][2], counted from block 0 of the set
  float* weights = nullptr;                    // [head_count][block_count][64]
  int32_t* reference = nullptr;                // [head_count][block_count], like all below
  float* page_sum = nullptr;
  float* lower_share = nullptr;
  float* estimate_share = nullptr;
  uint32_t head_count = 0;
  uint32_t kv_head = 0;
  uint32_t block_count = 0;
};
struct ScanJob {
  uint32_t set = 0;
  uint32_t first_block = 0;
  uint32_t block_count = 0;
};
struct ScanCall {
  CacheShape shape;
  float softcap = 0.0F;
  bool bounded = false;
  const float* radius_scale = nullptr;  // [256]
  const ScanSet* sets = nullptr;
  const ScanJob* jobs = nullptr;
  uint32_t job_count = 0;
  uint32_t head_count_max = 0;
};
cudaError_t Scan(const ScanCall& call, cudaStream_t stream);

// ---- Single tokens ------------------------------------------------------------------------------

struct TokenScore {
  float logit = 0.0F;  // before the soft-cap
  float key_squares = 0.0F;
};
struct ScoreCall {
  CacheShape shape;
  const std::byte* const* slices = nullptr;
  const float* qs = nullptr;            // [head_dim]
  const uint32_t* positions = nullptr;  // [token_count]
  TokenScore* scores = nullptr;         // [token_count]
  float* values = nullptr;              // [token_count][head_dim], or null
  uint32_t kv_head = 0;
  uint32_t token_count = 0;
};
cudaError_t Score(const ScoreCall& call, cudaStream_t stream);

// The largest squared norm of the keys in [begin, end), summed in fp32; infinity if one is not
// finite.
struct KeyNormCall {
  CacheShape shape;
  const std::byte* const* slices = nullptr;
  float* squares_max = nullptr;
  uint32_t kv_head = 0;
  uint32_t begin = 0;
  uint32_t end = 0;
};
cudaError_t LargestKey(const KeyNormCall& call, cudaStream_t stream);

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_KERNELS_H_
