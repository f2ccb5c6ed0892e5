// What the kernels of a choice (choice.h) share: weights as shares of a head, the blocks that a CTA
// takes, and sums of what is dropped. Device code only.

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
// What cannot be told from nothing next to the rest: what is below is rounded up in upper sums, and
// down in lower ones. Far enough from the least double for sums of the least weights.
inline constexpr int32_t kScaleExponentMin = -800;
inline constexpr int32_t kScaleExponentMax = 800;
// As in attention/cpu/weight_sums.cc: what 64 weights of 2^-126 may hide.
inline constexpr double kUnderflowMax = 0x1p-110;

__device__ __forceinline__ float Infinity() { return __int_as_float(0x7f800000); }

// 2^exponent as a double, for exponents out of range that of the nearest within.
__device__ __forceinline__ double ScaleOf(int32_t exponent) {
  return PowerOfTwo64(max(min(exponent, kScaleExponentMax), kScaleExponentMin));
}

// What a page's weights are multiplied with to be shares of a head.
__device__ __forceinline__ float FactorOf(const ChoiceGroup& group, uint32_t head, uint32_t block) {
  const size_t page = size_t{head} * group.block_count + block;
  const HeadScale scale = group.scales[head];
  const bool known = group.page_sum[page] <= kFloatMax;
  const double factor = ScaleOf(group.reference[page] - scale.reference) * scale.inverse;
  return known ? static_cast<float>(factor) : kFloatMax;
}

// A weight as a share; what is not known is infinite.
__device__ __forceinline__ float ShareOf(float weight, float factor) {
  const float share = weight * factor;
  return share >= 0.0F ? share : Infinity();
}

__device__ __forceinline__ float Score(bool largest, float score, float share) {
  return largest ? fmaxf(score, share) : score + share;
}

// The sum of the block's weights in `word` of one head. One thread.
__device__ inline float SumOfWord(const ChoiceGroup& group, uint32_t head, uint32_t block,
                                  uint64_t word) {
  const size_t page = size_t{head} * group.block_count + block;
  if (word == ~uint64_t{0}) return group.page_sum[page];
  const auto* weights = reinterpret_cast<const float4*>(group.weights + page * kTokens);
  float sum = 0.0F;
#pragma unroll 8
  for (uint32_t i = 0; i < kTokens / 4; ++i) {
    const float4 four = weights[i];
    const auto bits = static_cast<uint32_t>(word >> (4 * i)) & 15U;
    sum += ((bits & 1) != 0 ? four.x : 0.0F) + ((bits & 2) != 0 ? four.y : 0.0F);
    sum += ((bits & 4) != 0 ? four.z : 0.0F) + ((bits & 8) != 0 ? four.w : 0.0F);
  }
  return sum;
}

// The blocks of a part, and what its tokens need, in shared memory.
template <int kHeads>
struct Part {
  uint32_t begin;
  uint32_t count;
  uint64_t scanned[kPartBlocksMax];
  uint64_t candidates[kPartBlocksMax];
  float factors[kPartBlocksMax][kHeads];
  bool passed[kPartBlocksMax];  // of a selection: see PassOver

  // All threads of the CTA call it.
  __device__ inline void Load(const ChoiceGroup& group) {
    const uint32_t first = blockIdx.x * group.part_blocks;
    const uint32_t blocks = min(group.part_blocks, group.block_count - first);
    if (threadIdx.x == 0) begin = first, count = blocks;
    for (uint32_t i = threadIdx.x; i < blocks; i += kChoiceThreads) {
      const uint64_t word = group.to_scan[first + i];
      scanned[i] = word;
      candidates[i] = word & group.middle[first + i];
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        const bool there = word != 0 && head < static_cast<int>(group.head_count);
        factors[i][head] = there ? FactorOf(group, static_cast<uint32_t>(head), first + i) : 0.0F;
      }
    }
    __syncthreads();
  }
};

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

// Sums of what one head drops.
struct LaneSums {
  double weight = 0.0;
  double lower = 0.0;
  double estimate = 0.0;
  uint32_t seen = 0;

  // sum: of a block's weights in fp32, as attention/cpu/weight_sums.cc adds them up.
  __device__ __forceinline__ void Add(const ChoiceGroup& group, uint32_t head, uint32_t block,
                                      float sum) {
    const size_t page = size_t{head} * group.block_count + block;
    const int32_t change = group.reference[page] - group.scales[head].reference;
    const float lower_share = group.bounded ? group.lower_share[page] : 0.0F;
    const float share = group.bounded ? group.estimate_share[page] : 0.0F;
    if (sum == 0.0F) return;
    // What is beyond the range of the scale is not known rather than less.
    const double scale =
        change > kScaleExponentMax ? static_cast<double>(Infinity()) : ScaleOf(change);
    const auto wide = static_cast<double>(sum);
    weight += wide * scale;
    if (!(sum > 0.0F) || change < kScaleExponentMin || change > kScaleExponentMax) return;
    if (lower_share > 0.0F) {
      lower += (wide - kUnderflowMax) * (scale * static_cast<double>(lower_share));
    }
    if (share > 0.0F) estimate += wide * scale * static_cast<double>(share);
  }

  __device__ __forceinline__ void Add(const LaneSums& other) {
    weight += other.weight;
    lower += other.lower;
    estimate += other.estimate;
    seen += other.seen;
  }
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_CHOICE_PARTS_INL_H_
