// What the kernels of a choice (choice.h) share: weights as shares of a head, their scores, and
// norms of values. Device code only.

#ifndef KVSERVICE_ATTENTION_CUDA_CHOICE_PARTS_INL_H_
#define KVSERVICE_ATTENTION_CUDA_CHOICE_PARTS_INL_H_

#include "attention/cuda/choice.h"
#include "attention/cuda/elements-inl.h"

namespace kvservice::cuda {

static_assert(kWordTokens == kTokens);

inline constexpr uint32_t kChoiceThreads = 256;
inline constexpr uint32_t kChoiceWarps = kChoiceThreads / kWarp;
inline constexpr float kFloatMax = 0x1.fffffep+127F;
inline constexpr double kHiddenUnits = 0x1p40;

// The group's description, in shared memory: there is much of it, and read as it is needed it would
// be waited for again and again. Complete after a barrier.
struct GroupMemory {
  uint4 words[sizeof(ChoiceGroup) / sizeof(uint4)];

  __device__ __forceinline__ const ChoiceGroup& Load(const ChoiceGroup* groups, uint32_t index) {
    constexpr uint32_t kWords = sizeof(ChoiceGroup) / sizeof(uint4);
    const auto* from = reinterpret_cast<const uint4*>(groups + index);
    if (threadIdx.x < kWords) words[threadIdx.x] = from[threadIdx.x];
    return *reinterpret_cast<const ChoiceGroup*>(words);
  }
};

__device__ __forceinline__ float Infinity() { return __int_as_float(0x7f800000); }

// Lets the kernel behind this one start, up to where it waits for this one.
__device__ __forceinline__ void LetNextStart() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
// Waits until kernels before this one have ended and what they wrote is to be seen.
__device__ __forceinline__ void WaitForEarlier() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// What a page's weights are multiplied with to be shares of a head.
__device__ __forceinline__ float FactorOf(const HeadScale& scale, int32_t reference,
                                          float page_sum) {
  if (!(page_sum <= kFloatMax)) return kFloatMax;
  const int32_t exponent = min(reference - scale.reference, 127);
  return exponent < -126 ? 0.0F : scale.inverse * __int_as_float((exponent + 127) << 23);
}

// A weight as a share; what is not known is infinite.
__device__ __forceinline__ float ShareOf(float weight, float factor) {
  const float share = weight * factor;
  return share >= 0.0F ? share : Infinity();
}

// Scores join shares of even heads, shares of odd heads, and these two: where that rounds, all
// kernels round alike.
__device__ __forceinline__ float Score(bool largest, float score, float share) {
  return largest ? fmaxf(score, share) : score + share;
}

// The sum of the block's weights in `word` of one head. One thread. Few blocks need it, so it is
// kept out of the way of the rest.
__device__ __noinline__ inline float SumOfWord(const ChoiceGroup& group, uint32_t head,
                                               uint32_t block, uint64_t word) {
  const size_t page = size_t{head} * group.block_count + block;
  if (word == ~uint64_t{0}) return group.page_sum[page];
  const auto* weights = reinterpret_cast<const float4*>(group.weights + page * kTokens);
  float sum = 0.0F;
#pragma unroll 4
  for (uint32_t i = 0; i < kTokens / 4; ++i) {
    const float4 four = weights[i];
    const auto bits = static_cast<uint32_t>(word >> (4 * i)) & 15U;
    sum += ((bits & 1) != 0 ? four.x : 0.0F) + ((bits & 2) != 0 ? four.y : 0.0F);
    sum += ((bits & 4) != 0 ? four.z : 0.0F) + ((bits & 8) != 0 ? four.w : 0.0F);
  }
  return sum;
}

// About sum * 2^reference; what is 2^-126 of the rest and less is left out.
struct RoughTotal {
  float sum = 0.0F;
  int32_t reference = kReferenceMin;

  __device__ __forceinline__ void Add(float other, int32_t other_reference) {
    const int32_t top = max(reference, other_reference);
    sum = sum * PowerOfTwo(reference - top) + other * PowerOfTwo(other_reference - top);
    reference = top;
  }
};

inline constexpr uint32_t kScaleThreads = 512;
inline constexpr uint32_t kScaleWarps = kScaleThreads / kWarp;
static_assert(kScaleWarps >= kChoiceHeadsMax);

// What all weights of the heads come to: estimates of what was scanned, and the mass of what is
// read in any case. It scales scores and is part of no bound. All kScaleThreads threads of a CTA
// call it, warps take heads in turn; `scales` is complete after a barrier.
template <int kHeads>
__device__ inline void FindScales(const ChoiceGroup& group, RoughTotal (&of_warps)[kScaleWarps],
                                  HeadScale* scales) {
  const uint32_t warp = threadIdx.x / kWarp;
  const uint32_t own = warp % kHeads;
  RoughTotal total;
  if (own < group.head_count) {
    const size_t first_page = size_t{own} * group.block_count;
#pragma unroll 4
    for (uint32_t block = warp / kHeads * kWarp + threadIdx.x % kWarp; block < group.block_count;
         block += kScaleThreads / kHeads) {
      const uint64_t word = group.to_scan[block];
      float sum = word != 0 ? group.page_sum[first_page + block] : 0.0F;
      const int32_t reference = word != 0 ? group.reference[first_page + block] : kReferenceMin;
      const float share = word != 0 && group.bounded ? group.estimate_share[first_page + block] : 1;
      if (word != 0 && word != ~uint64_t{0}) sum = SumOfWord(group, own, block, word);
      sum *= share;
      // What is not known counts for nothing.
      if (sum > 0.0F && sum <= kFloatMax) total.Add(sum, reference);
    }
#pragma unroll 1
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      total.Add(__shfl_xor_sync(kAllLanes, total.sum, offset),
                __shfl_xor_sync(kAllLanes, total.reference, offset));
    }
  }
  if (threadIdx.x % kWarp == 0) of_warps[warp] = total;
  __syncthreads();
  const uint32_t head = threadIdx.x;
  if (head >= group.head_count) return;
  total = RoughTotal();
#pragma unroll 1
  for (uint32_t i = head; i < kScaleWarps; i += kHeads) {
    total.Add(of_warps[i].sum, of_warps[i].reference);
  }
  // As a number near 1 and a power of two; what is not a normal number counts for nothing.
  const HeadSums always = group.first_sums[head];
  const int32_t high = __double2hiint(always.sum);
  const int32_t field = high >> 20;
  if (field > 0 && field < 2047) {
    const double near_one =
        __hiloint2double((high & 0xfffff) | 0x3ff00000, __double2loint(always.sum));
    total.Add(static_cast<float>(near_one), always.reference + field - 1023);
  }
  HeadScale scale{.inverse = 1.0F, .reference = total.reference};
  if (total.sum > 0.0F) {
    const int32_t bits = __float_as_int(total.sum);
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;"
        : "=f"(inverse)
        : "f"(__int_as_float((bits & 0x7fffff) | 0x3f800000)));
    scale = {.inverse = inverse, .reference = total.reference + (bits >> 23) - 127};
  }
  group.scales[head] = scale;
  if (scales != nullptr) scales[head] = scale;
}

// Counts what is hidden of a block, whole: shares in units of 1 / kHiddenUnits.
__device__ inline void AddHidden(const ChoiceGroup& group, const HeadScale* scales, uint32_t block,
                                 uint64_t hidden, unsigned long long* sums) {
  for (uint32_t head = 0; head < group.head_count; ++head) {
    const size_t page = size_t{head} * group.block_count + block;
    const float factor = FactorOf(scales[head], group.reference[page], group.page_sum[page]);
    const double share =
        static_cast<double>(SumOfWord(group, head, block, hidden)) * static_cast<double>(factor);
    // More than all is all, and so is what is not known.
    const double most = share < 4.0 ? share : 4.0;
    atomicAdd(&sums[head], static_cast<unsigned long long>(most * kHiddenUnits));
  }
}

// Tokens that may be chosen, of those that were scanned.
__device__ __forceinline__ uint64_t CandidatesOf(const ChoiceGroup& group, uint32_t block,
                                                 uint64_t scanned) {
  if (!group.scans_middle) return 0;
  return scanned & WordOfRange(block, group.ranges.visible_begin, group.ranges.end);
}

// What will be read of the middle if about `count` tokens are chosen.
__device__ __forceinline__ uint32_t ExpectedOf(const ChoiceGroup& group, uint32_t count) {
  const ChoiceStats& stats = *group.stats;
  const float planned = static_cast<float>(stats.always) + static_cast<float>(count);
  const float visible = static_cast<float>(stats.always) + static_cast<float>(stats.middle);
  return planned > group.dense_share * visible ? stats.middle : count;
}

// Sum of this lane's and all lower lanes' numbers.
template <typename T>
__device__ __forceinline__ T SumUpToLane(T x) {
#pragma unroll
  for (uint32_t offset = 1; offset < kWarp; offset *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, offset);
    if (threadIdx.x % kWarp >= offset) x += other;
  }
  return x;
}

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

// The sum of a row's squares, in fp32. One warp, two elements of a lane at a time.
__device__ __forceinline__ float SquaresOf(const CacheShape& shape, const std::byte* row) {
  float squares = 0.0F;
#pragma unroll 2
  for (uint32_t i = threadIdx.x % kWarp; i < shape.head_dim / 2; i += kWarp) {
    float2 two;
    if (shape.dtype == kFloat32) {
      two = reinterpret_cast<const float2*>(row)[i];
    } else {
      const uint32_t bits = reinterpret_cast<const uint32_t*>(row)[i];
      two = shape.dtype == kFloat16
                ? __half22float2(*reinterpret_cast<const __half2*>(&bits))
                : make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000U));
    }
    squares = fmaf(two.y, two.y, fmaf(two.x, two.x, squares));
  }
  return SumOverLanes(squares);
}

// Raises the group's `value_squares`: a warp per token of its open blocks. The order of the blocks
// is any; a maximum has none.
__device__ inline void BoundOpenBlocks(const ChoiceCall& call, const ChoiceGroup& group) {
  const uint32_t tokens = group.stats->open_blocks * kTokens;
  float most = 0.0F;
#pragma unroll 2
  for (uint32_t i = threadIdx.x / kWarp; i < tokens; i += blockDim.x / kWarp) {
    const uint32_t block = group.open_blocks[i / kTokens];
    const std::byte* page = PageOf(call, group, block);
    const uint64_t open = WordOfRange(block, group.ranges.begin, group.ranges.end) &
                          (page == nullptr ? ~uint64_t{0} : ExactOf(call, group, page));
    if ((open >> (i % kTokens) & 1) == 0) continue;
    const std::byte* row = group.slices[block] +
                           (size_t{group.kv_head} * kTokens + i % kTokens) * call.shape.row_bytes +
                           call.shape.vector_bytes;
    const float squares = SquaresOf(call.shape, row);
    most = squares <= kFloatMax ? fmaxf(most, squares) : Infinity();
    if (!(squares <= kFloatMax)) break;
  }
  if (threadIdx.x % kWarp == 0 && most > 0.0F) RaiseTo(&group.stats->value_squares, most);
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_CHOICE_PARTS_INL_H_
