// Thresholds of a choice by mass alone, from a sample of the scores that one CTA per group holds in
// registers: of all tokens where there are no more than fit. A threshold is looked for below which
// no head drops more than its limit and one nearly as much; sums are integers, so that nothing
// depends on who adds first.

#include "attention/cuda/choice_parts-inl.h"

namespace kvservice::cuda {
namespace {

// Turns of a search: guesses from what the last one came to, and if they lead nowhere the middle of
// what is left; more than 2^13 steps there are not.
constexpr uint32_t kGuesses = 6;
constexpr uint32_t kTurnsMax = kGuesses + 13;
static_assert(kSearchSteps <= 1U << 13);
// What is dropped grows by about so many octaves per step; a search ends where a head drops this
// share of its limit, and guesses aim above it.
constexpr float kSlope = 1.25F / kStepsOfOctave;
constexpr float kNear = 0.98F;
constexpr float kAimOctaves = -0.0145F;  // of 0.99
// Units of a limit. One thread's sums count as twice the limit at most, so that those of all
// threads stay below 2^32.
constexpr float kLimitUnits = 0x1p20F;
constexpr float kUnitsMax = 0x1p21F;

template <int kHeads>
struct SampleMemory {
  RoughTotal of_warps[kScaleWarps];
  HeadScale scales[kHeads];
  unsigned long long hidden[kHeads];
  uint32_t left[kHeads];  // of the limit, in units, for what a sample stands for
  uint32_t dropped[kTurnsMax][kHeads];
  uint32_t expected;
  float left_min;
};

// What one thread holds: shares of tokens of a few quads, half a run each. Scores are the largest
// share.
template <int kHeads>
struct Sample {
  static constexpr int kQuads = static_cast<int>(2 * SampledRuns(kHeads) / kScaleThreads);
  static constexpr int kOwn = 4 * kQuads;
  static_assert(kQuads > 0);

  float shares[kHeads][kOwn];
  float scores[kOwn];  // NaN: no candidate
  int32_t references[kHeads][kQuads];
  uint32_t candidates;  // bits

  __device__ __forceinline__ void Load(const ChoiceGroup& group, uint32_t stride) {
    constexpr uint32_t kQuadsOfBlock = kTokens / 4;
    candidates = 0;
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      const uint32_t i = threadIdx.x + k * kScaleThreads;
      const uint32_t quad = 2 * SampledRun(i / 2, stride) + i % 2;
      const uint32_t block = quad / kQuadsOfBlock;
      uint32_t bits = 0;
      if (block < group.block_count) {
        const uint64_t word = CandidatesOf(group, block, group.to_scan[block]);
        bits = static_cast<uint32_t>(word >> (4 * (quad % kQuadsOfBlock))) & 15U;
      }
      candidates |= bits << (4 * k);
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        float4 four = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
        references[head][k] = 0;
        if (bits != 0 && head < static_cast<int>(group.head_count)) {
          const size_t page = size_t{static_cast<uint32_t>(head)} * group.block_count + block;
          references[head][k] = group.reference[page];
          four = reinterpret_cast<const float4*>(
              group.weights)[page * kQuadsOfBlock + quad % kQuadsOfBlock];
        }
        shares[head][4 * k] = four.x;
        shares[head][4 * k + 1] = four.y;
        shares[head][4 * k + 2] = four.z;
        shares[head][4 * k + 3] = four.w;
      }
    }
  }

  // From weights to shares. Weights that are not known are infinite, so that sums need no look.
  __device__ __forceinline__ void Scale(const HeadScale* scales) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      scores[i] = (candidates >> i & 1) != 0 ? 0.0F : __int_as_float(0x7fffffff);
    }
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float factor = FactorOf(scales[head], references[head][i / 4], 0.0F);
        shares[head][i] = ShareOf(shares[head][i], factor);
        if (scores[i] >= 0.0F) scores[i] = fmaxf(scores[i], shares[head][i]);
      }
    }
  }

  // What is below the threshold, in units, over the warp: lane h has head h.
  __device__ __forceinline__ uint32_t Below(float threshold, float units) const {
    uint32_t of_lane = 0;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      float sum = 0.0F;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum += scores[i] < threshold ? shares[head][i] : 0.0F;
      const auto own = static_cast<uint32_t>(fminf(sum * units, kUnitsMax));
      const uint32_t all = __reduce_add_sync(kAllLanes, own);
      if (threadIdx.x % kWarp == static_cast<uint32_t>(head)) of_lane = all;
    }
    return of_lane;
  }

  __device__ __forceinline__ uint32_t CountFrom(float threshold) const {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) count += scores[i] >= threshold ? 1 : 0;
    return __reduce_add_sync(kAllLanes, count);
  }
};

// What is hidden leaves less of the limits. All threads of the CTA call it.
template <int kHeads>
__device__ inline void FindLeft(const ChoiceGroup& group, uint32_t stride,
                                SampleMemory<kHeads>* memory) {
  if (group.scans_hidden && group.ranges.visible_begin > 0) {
    for (uint32_t block = threadIdx.x; block < group.block_count; block += blockDim.x) {
      const uint64_t scanned = group.to_scan[block];
      const uint64_t hidden = scanned & ~CandidatesOf(group, block, scanned);
      if (hidden != 0) AddHidden(group, memory->scales, block, hidden, memory->hidden);
    }
    __syncthreads();
  }
  if (threadIdx.x >= kWarp) return;
  float left = group.mass_limit;
  if (threadIdx.x < group.head_count) {
    left -=
        static_cast<float>(static_cast<double>(memory->hidden[threadIdx.x]) * (1.0 / kHiddenUnits));
    const float units = fmaxf(left, 0.0F) * (kLimitUnits / group.mass_limit);
    memory->left[threadIdx.x] = static_cast<uint32_t>(units / static_cast<float>(stride));
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    left = fminf(left, __shfl_xor_sync(kAllLanes, left, offset));
  }
  if (threadIdx.x == 0) memory->left_min = left;
}

// The threshold, in all threads of the CTA.
template <int kHeads>
__device__ inline float Search(const ChoiceGroup& group, const Sample<kHeads>& sample,
                               SampleMemory<kHeads>* memory) {
  const uint32_t lane = threadIdx.x % kWarp;
  const float left_min = memory->left_min;
  // What is hidden alone is too much: nothing else may be dropped.
  if (!(left_min >= 0.0F)) return 0.0F;
  const float units = kLimitUnits / group.mass_limit;
  // So little is no more than the limit over all tokens.
  const float least = left_min / static_cast<float>(group.block_count * kTokens);
  uint32_t low = 0;
  uint32_t high = kSearchSteps;
  uint32_t step = min(SearchStepOf(least) + 3 * kStepsOfOctave, high - 1);
  float pace = kSlope;
  float last_step = 0.0F;
  float last_octaves = -1e9F;
#pragma unroll 1
  for (uint32_t turn = 0; turn < kTurnsMax && high - low > 1; ++turn) {
    const uint32_t own = sample.Below(SearchEdge(step), units);
    uint32_t* dropped = memory->dropped[turn];
    if (lane < kHeads && own != 0) atomicAdd(&dropped[lane], own);
    __syncthreads();
    float part = 0.0F;
    if (lane < group.head_count && dropped[lane] != 0) {
      part = static_cast<float>(dropped[lane]) / static_cast<float>(memory->left[lane]);
    }
    // Numbers that are not negative are ordered as their bits are.
    part = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(part)));
    const bool fits = part <= 1.0F;
    (fits ? low : high) = step;
    if (fits && part >= kNear) break;
    const float octaves = __log2f(part);
    const float moved = static_cast<float>(step) - last_step;
    // As steep as between the last two, within reason.
    const float slope = (octaves - last_octaves) / moved;
    if (slope > 0.25F * kSlope && slope < 4.0F * kSlope) pace = slope;
    last_step = static_cast<float>(step);
    last_octaves = octaves;
    const float guess = rintf(last_step + (kAimOctaves - octaves) / pace);
    step = (low + high) / 2;
    // Not where nothing is dropped, or there is no end to it.
    const bool within = guess > static_cast<float>(low) && guess < static_cast<float>(high);
    if (turn < kGuesses && within) step = static_cast<uint32_t>(guess);
  }
  return low == 0 ? 0.0F : SearchEdge(low);
}

// A CTA per group, and behind them one for norms of values where they are wanted.
template <int kHeads>
__global__ void __launch_bounds__(kScaleThreads, 1)
    SampleKernel(const __grid_constant__ ChoiceCall call) {
  LetNextStart();
  __shared__ GroupMemory group_memory;
  __shared__ SampleMemory<kHeads> memory;
  const ChoiceGroup& group = group_memory.Load(call.groups, blockIdx.x);
  auto* zero = reinterpret_cast<uint32_t*>(&memory);
  for (uint32_t i = threadIdx.x; i < sizeof(memory) / sizeof(uint32_t); i += blockDim.x) {
    zero[i] = 0;
  }
  __syncthreads();
  if (blockIdx.y != 0) {
    if (group.bounds_values) BoundOpenBlocks(call, group);
    return;
  }
  const uint32_t stride = SampleStride(group.block_count, kHeads);
  const bool by_mass = group.mass_limit > 0.0F;
  Sample<kHeads> sample;
  if (by_mass) sample.Load(group, stride);
  FindScales<kHeads>(group, memory.of_warps, memory.scales);
  __syncthreads();
  ChoiceThreshold threshold{.mass = __int_as_float(0x7fffffff)};
  if (by_mass) {
    FindLeft<kHeads>(group, stride, &memory);
    sample.Scale(memory.scales);
    __syncthreads();
    threshold.mass = Search<kHeads>(group, sample, &memory);
    const uint32_t count = sample.CountFrom(threshold.mass);
    if (threadIdx.x % kWarp == 0) atomicAdd(&memory.expected, count);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  group.stats->threshold = threshold;
  group.stats->expected = ExpectedOf(group, memory.expected * stride);
}

template <int kHeads>
cudaError_t SampleHeads(const ChoiceCall& call, cudaStream_t stream) {
  // The same division of memory as the kernels beside it, though it needs little.
  const cudaError_t code = ReserveShared(SampleKernel<kHeads>, 0);
  if (code != cudaSuccess) return code;
  const dim3 groups(call.group_count, call.bounds_values ? 2 : 1);
  SampleKernel<kHeads><<<groups, kScaleThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t FindThresholds(const ChoiceCall& call, cudaStream_t stream) {
  if (call.ranks) return CountThresholds(call, stream);
  return call.head_count_max <= 4   ? SampleHeads<4>(call, stream)
         : call.head_count_max <= 8 ? SampleHeads<8>(call, stream)
                                    : SampleHeads<16>(call, stream);
}

}  // namespace kvservice::cuda
