// Words of what a plan speaks about, and norms of values and keys that no sketch bounds.

#include "attention/cuda/choice_parts-inl.h"
#include "attention/cuda/choice_queries-inl.h"

namespace kvservice::cuda {
namespace {

constexpr uint32_t kMarkThreads = kWarp * kWarp;
// Enough to keep what connects host and device busy.
constexpr uint32_t kCopyCtasMax = 32;

__device__ __forceinline__ float MaxOverLanes(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

// What blocks come to, for one thread, and for a warp.
struct MarkSums {
  uint32_t always = 0;
  uint32_t middle = 0;
  uint32_t scanned = 0;
  uint32_t listed = 0;
  float norm_max = 0.0F;
  float whole_norm_max = 0.0F;

  __device__ __forceinline__ void SumOverWarp() {
    always = SumOverLanes(always);
    middle = SumOverLanes(middle);
    scanned = SumOverLanes(scanned);
    listed = SumOverLanes(listed);
    norm_max = MaxOverLanes(norm_max);
    whole_norm_max = MaxOverLanes(whole_norm_max);
  }
};

__device__ __forceinline__ void MarkBlock(const ChoiceCall& call, const ChoiceGroup& group,
                                          uint32_t block, MarkSums* sums, uint32_t* open_count) {
  const std::byte* page = PageOf(call, group, block);
  const uint64_t exact = ExactOf(call, group, page);
  float norm = 0.0F;
  if (group.bounds_values && page != nullptr) {
    norm = *reinterpret_cast<const float*>(page + call.shape.norms + 8);
    if (!(norm <= kFloatMax)) norm = Infinity();
  }
  const ChoiceWords words = WordsOf(group.ranges, block, exact);
  const uint64_t hidden = words.all & ~words.always & ~words.middle;
  const uint64_t list = group.listed != nullptr ? __ldcg(group.listed + block) & words.middle : 0;
  const uint64_t pool = group.competes ? list : words.middle;
  const uint64_t to_scan = (group.scans_middle ? pool : 0) | (group.scans_hidden ? hidden : 0);
  const uint64_t at_once = (group.competes ? 0 : list) | (group.reads_middle ? words.middle : 0);
  group.first[block] = words.always | at_once;
  group.to_scan[block] = to_scan;
  sums->always += static_cast<uint32_t>(__popcll(words.always));
  sums->middle += static_cast<uint32_t>(__popcll(words.middle));
  sums->scanned += static_cast<uint32_t>(__popcll(to_scan));
  sums->listed += static_cast<uint32_t>(__popcll(list));
  if (!group.bounds_values) return;
  sums->norm_max = fmaxf(sums->norm_max, norm);
  if (words.all == ~uint64_t{0}) sums->whole_norm_max = fmaxf(sums->whole_norm_max, norm);
  const bool open = (words.all & (page == nullptr ? ~uint64_t{0} : exact)) != 0;
  if (open) group.open_blocks[atomicAdd(open_count, 1)] = block;
}

// Words of a list, for the whole CTA.
__device__ __forceinline__ void SpreadList(const ChoiceGroup& group) {
  for (uint32_t block = threadIdx.x; block < group.block_count; block += kMarkThreads) {
    group.listed[block] = WordOfRange(block, group.fresh_begin, group.fresh_end);
  }
  __syncthreads();
  auto* const halves = reinterpret_cast<uint32_t*>(group.listed);
  for (uint32_t i = threadIdx.x; i < group.list_count; i += kMarkThreads) {
    const uint32_t token = group.list[i];
    atomicOr(halves + token / 32, 1U << (token % 32));
  }
  __syncthreads();
}

// A CTA per group, a thread per block; as many prepare their queries; those behind them copy.
__global__ void __launch_bounds__(kMarkThreads)
    MarkKernel(const __grid_constant__ ChoiceCall call,
               const __grid_constant__ ChoiceInputs inputs) {
  const uint32_t index = blockIdx.x;
  if (index >= 2 * call.group_count) {
    const uint32_t thread = (index - 2 * call.group_count) * kMarkThreads + threadIdx.x;
    CopyStretch(inputs.copy, thread, (gridDim.x - 2 * call.group_count) * kMarkThreads);
    return;
  }
  if (index >= call.group_count) {
    __shared__ QueryMemory query_memory;
    PrepareQueries(inputs.queries, index - call.group_count, call.shape, inputs.scale,
                   &query_memory);
    return;
  }
  __shared__ GroupMemory group_memory;
  const ChoiceGroup& group = group_memory.Load(inputs.groups, index);
  __shared__ MarkSums of_warps[kWarp];
  __shared__ uint32_t open_count;
  if (threadIdx.x == 0) open_count = 0;
  __syncthreads();
  if (group.listed != nullptr) SpreadList(group);
  for (uint32_t i = threadIdx.x; i < group.zero_count; i += kMarkThreads) {
    group.zero[i] = make_uint4(0, 0, 0, 0);
  }
  for (uint32_t i = threadIdx.x; i < call.tickets_per_group; i += kMarkThreads) {
    call.tickets[size_t{index} * call.tickets_per_group + i] = 0;
  }
  MarkSums sums;
#pragma unroll 2
  for (uint32_t block = threadIdx.x; block < group.block_count; block += kMarkThreads) {
    MarkBlock(call, group, block, &sums, &open_count);
  }
  sums.SumOverWarp();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  sums = of_warps[threadIdx.x];
  sums.SumOverWarp();
  if (threadIdx.x != 0) return;
  ChoiceStats stats;
  stats.always = sums.always;
  stats.middle = sums.middle;
  stats.scanned = sums.scanned;
  stats.listed = sums.listed;
  stats.norm_max = sums.norm_max;
  stats.whole_norm_max = sums.whole_norm_max;
  stats.open_blocks = open_count;
  *group.stats = stats;
}

__global__ void __launch_bounds__(4 * kChoiceThreads)
    OpenValuesKernel(const __grid_constant__ ChoiceCall call) {
  BoundOpenBlocks(call, call.groups[blockIdx.x]);
}

// A warp per key.
__global__ void __launch_bounds__(kChoiceThreads)
    KeyNormsKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  float most = 0.0F;
  for (uint32_t token = group.norm_begin + blockIdx.x * kChoiceWarps + threadIdx.x / kWarp;
       token < group.norm_end; token += gridDim.x * kChoiceWarps) {
    const std::byte* row =
        group.norm_slices[token / kTokens] +
        (size_t{group.kv_head} * kTokens + token % kTokens) * call.shape.row_bytes;
    const float squares = SquaresOf(call.shape, row);
    most = squares <= kFloatMax ? fmaxf(most, squares) : Infinity();
  }
  if (threadIdx.x % kWarp == 0 && most > 0.0F) RaiseTo(&group.stats->key_squares, most);
}

}  // namespace

cudaError_t BoundKeys(const ChoiceCall& call, cudaStream_t stream) {
  constexpr uint32_t kTokensOfCta = 64;
  constexpr uint32_t kCtasMax = 64;
  const uint32_t ctas = (call.norm_tokens_max + kTokensOfCta - 1) / kTokensOfCta;
  const dim3 grid(ctas < kCtasMax ? ctas : kCtasMax, call.group_count);
  KeyNormsKernel<<<grid, kChoiceThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t MarkWords(const ChoiceCall& call, const ChoiceInputs& inputs, cudaStream_t stream) {
  const uint32_t wanted = (inputs.copy.count + kMarkThreads - 1) / kMarkThreads;
  const uint32_t copy_ctas = wanted < kCopyCtasMax ? wanted : kCopyCtasMax;
  MarkKernel<<<2 * call.group_count + copy_ctas, kMarkThreads, 0, stream>>>(call, inputs);
  return cudaGetLastError();
}

cudaError_t BoundOpenValues(const ChoiceCall& call, cudaStream_t stream) {
  OpenValuesKernel<<<call.group_count, 4 * kChoiceThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace kvservice::cuda
