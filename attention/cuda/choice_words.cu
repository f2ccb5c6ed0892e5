// Words of what a plan speaks about, and norms of values that no sketch bounds.

#include "attention/cuda/choice_parts-inl.h"

namespace kvservice::cuda {
namespace {

__device__ __forceinline__ const std::byte* PageOf(const ChoiceCall& call, const ChoiceGroup& group,
                                                   uint32_t block) {
  const std::byte* sketch = group.reads_sketches ? group.sketches[block] : nullptr;
  return sketch == nullptr ? nullptr : sketch + size_t{group.kv_head} * call.shape.page_bytes;
}

// Tokens of a block without a sketch.
__device__ __forceinline__ uint64_t ExactOf(const ChoiceCall& call, const ChoiceGroup& group,
                                            const std::byte* page) {
  if (!group.reads_sketches) return 0;
  return page == nullptr ? ~uint64_t{0}
                         : *reinterpret_cast<const uint64_t*>(page + call.shape.exact);
}

// Norms are not negative, so they are ordered as integers are; NaN counts as most.
__device__ __forceinline__ void RaiseTo(float* to, float norm) {
  atomicMax(reinterpret_cast<int32_t*>(to), __float_as_int(norm));
}

__device__ __forceinline__ float MaxOverLanes(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

// A thread per block.
__global__ void __launch_bounds__(kChoiceThreads)
    MarkKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  const uint32_t block = blockIdx.x * kChoiceThreads + threadIdx.x;
  if (blockIdx.x * kChoiceThreads >= group.block_count) return;
  // Of the CTA, so that few meet at the group's.
  __shared__ ChoiceStats totals;
  if (threadIdx.x == 0) totals = ChoiceStats();
  __syncthreads();
  ChoiceWords words;
  float norm = 0.0F;
  bool open = false;
  uint32_t scanned = 0;
  uint32_t listed = 0;
  if (block < group.block_count) {
    const std::byte* page = PageOf(call, group, block);
    const uint64_t exact = ExactOf(call, group, page);
    words = WordsOf(group.ranges, block, exact);
    const uint64_t hidden = words.all & ~words.always & ~words.middle;
    const uint64_t to_scan =
        (group.scans_middle ? words.middle : 0) | (group.scans_hidden ? hidden : 0);
    scanned = static_cast<uint32_t>(__popcll(to_scan));
    const uint64_t list = group.listed != nullptr ? group.listed[block] & words.middle : 0;
    listed = static_cast<uint32_t>(__popcll(list));
    group.first[block] = words.always | list | (group.reads_middle ? words.middle : 0);
    group.to_scan[block] = to_scan;
    group.middle[block] = words.middle;
    group.chosen[block] = 0;
    if (group.bounds_values) {
      if (page != nullptr) norm = *reinterpret_cast<const float*>(page + call.shape.norms + 8);
      if (!(norm <= kFloatMax)) norm = Infinity();
      open = (words.all & (page == nullptr ? ~uint64_t{0} : exact)) != 0;
      if (open) group.open_blocks[atomicAdd(&group.stats->open_blocks, 1)] = block;
    }
  }
  const float whole = MaxOverLanes(words.all == ~uint64_t{0} ? norm : 0.0F);
  norm = MaxOverLanes(norm);
  const auto always = SumOverLanes(static_cast<uint32_t>(__popcll(words.always)));
  const auto middle = SumOverLanes(static_cast<uint32_t>(__popcll(words.middle)));
  scanned = SumOverLanes(scanned);
  listed = SumOverLanes(listed);
  if (threadIdx.x % kWarp == 0) {
    atomicAdd(&totals.always, always);
    atomicAdd(&totals.middle, middle);
    atomicAdd(&totals.scanned, scanned);
    atomicAdd(&totals.listed, listed);
    RaiseTo(&totals.norm_max, norm);
    RaiseTo(&totals.whole_norm_max, whole);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (totals.always != 0) atomicAdd(&group.stats->always, totals.always);
  if (totals.middle != 0) atomicAdd(&group.stats->middle, totals.middle);
  if (totals.scanned != 0) atomicAdd(&group.stats->scanned, totals.scanned);
  if (totals.listed != 0) atomicAdd(&group.stats->listed, totals.listed);
  if (totals.norm_max != 0.0F) RaiseTo(&group.stats->norm_max, totals.norm_max);
  if (totals.whole_norm_max != 0.0F) RaiseTo(&group.stats->whole_norm_max, totals.whole_norm_max);
}

// A warp per token of the open blocks. The order of the blocks is any; a maximum has none.
template <int kType>
__global__ void __launch_bounds__(4 * kChoiceThreads)
    OpenValuesKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.x];
  const uint32_t tokens = group.stats->open_blocks * kTokens;
  float most = 0.0F;
#pragma unroll 4
  for (uint32_t i = threadIdx.x / kWarp; i < tokens; i += 4 * kChoiceWarps) {
    const uint32_t block = group.open_blocks[i / kTokens];
    const std::byte* page = PageOf(call, group, block);
    const uint64_t open = WordOfRange(block, group.ranges.begin, group.ranges.end) &
                          (page == nullptr ? ~uint64_t{0} : ExactOf(call, group, page));
    if ((open >> (i % kTokens) & 1) == 0) continue;
    const std::byte* row = group.slices[block] +
                           (size_t{group.kv_head} * kTokens + i % kTokens) * call.shape.row_bytes +
                           call.shape.vector_bytes;
    float squares = 0.0F;
    for (uint32_t c = threadIdx.x % kWarp; c < call.shape.head_dim; c += kWarp) {
      const float x = LoadElement<kType>(row, c);
      squares = fmaf(x, x, squares);
    }
    squares = SumOverLanes(squares);
    most = squares <= kFloatMax ? fmaxf(most, squares) : Infinity();
    if (!(squares <= kFloatMax)) break;
  }
  if (threadIdx.x % kWarp == 0) RaiseTo(&group.stats->value_squares, most);
}

// A warp per key.
template <int kType>
__global__ void __launch_bounds__(kChoiceThreads)
    KeyNormsKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  float most = 0.0F;
  for (uint32_t token = group.norm_begin + blockIdx.x * kChoiceWarps + threadIdx.x / kWarp;
       token < group.norm_end; token += gridDim.x * kChoiceWarps) {
    const std::byte* row =
        group.norm_slices[token / kTokens] +
        (size_t{group.kv_head} * kTokens + token % kTokens) * call.shape.row_bytes;
    float squares = 0.0F;
    for (uint32_t c = threadIdx.x % kWarp; c < call.shape.head_dim; c += kWarp) {
      const float x = LoadElement<kType>(row, c);
      squares = fmaf(x, x, squares);
    }
    squares = SumOverLanes(squares);
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
  if (call.shape.dtype == kFloat32) {
    KeyNormsKernel<kFloat32><<<grid, kChoiceThreads, 0, stream>>>(call);
  } else if (call.shape.dtype == kFloat16) {
    KeyNormsKernel<kFloat16><<<grid, kChoiceThreads, 0, stream>>>(call);
  } else {
    KeyNormsKernel<kBfloat16><<<grid, kChoiceThreads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

cudaError_t MarkWords(const ChoiceCall& call, cudaStream_t stream) {
  const dim3 grid((call.block_count_max + kChoiceThreads - 1) / kChoiceThreads, call.group_count);
  MarkKernel<<<grid, kChoiceThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t BoundOpenValues(const ChoiceCall& call, cudaStream_t stream) {
  if (call.shape.dtype == kFloat32) {
    OpenValuesKernel<kFloat32><<<call.group_count, 4 * kChoiceThreads, 0, stream>>>(call);
  } else if (call.shape.dtype == kFloat16) {
    OpenValuesKernel<kFloat16><<<call.group_count, 4 * kChoiceThreads, 0, stream>>>(call);
  } else {
    OpenValuesKernel<kBfloat16><<<call.group_count, 4 * kChoiceThreads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

}  // namespace kvservice::cuda
