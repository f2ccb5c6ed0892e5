// Thresholds of a choice with ranks: a histogram of the scores, of which every CTA counts a part;
// the last CTA of a group finds its thresholds.

#include "attention/cuda/choice_parts-inl.h"

namespace kvservice::cuda {
namespace {

// Bins are looked at in spans of a lane each, then the span with the threshold bin by bin.
constexpr uint32_t kSpanBins = kBins / kWarp;
static_assert(kSpanBins <= kWarp);

// Mass of one head by the histogram: the score that all may be dropped below. One warp.
__device__ inline float MassThreshold(const ChoiceGroup& group, uint32_t head) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t* sums = group.sums + head * kBins;
  const double scale = static_cast<double>(kTokens) / group.sampled;
  const double hidden = static_cast<double>(__ldcg(&group.hidden[head])) * (1.0 / kHiddenUnits);
  const auto limit = static_cast<double>(group.mass_limit);
  double span = 0.0;
#pragma unroll
  for (uint32_t i = 0; i < kSpanBins; ++i) {
    const uint32_t bin = lane * kSpanBins + i;
    span += ShareOfUnits(__ldcg(&sums[bin]), bin);
  }
  double end = hidden + SumUpToLane(scale * span);
  // What is hidden alone is too much: nothing else may be dropped.
  if (!(hidden <= limit)) return 0.0F;
  uint32_t over = __ballot_sync(kAllLanes, !(end <= limit));
  if (over == 0) return BinEdge(kBins);
  const auto owner = static_cast<uint32_t>(__ffs(static_cast<int32_t>(over))) - 1;
  const double below = __shfl_sync(kAllLanes, end - scale * span, owner);
  const uint32_t bin = owner * kSpanBins + min(lane, kSpanBins - 1);
  const double mass = lane < kSpanBins ? scale * ShareOfUnits(__ldcg(&sums[bin]), bin) : 0.0;
  end = below + SumUpToLane(mass);
  // Sums in another order may end elsewhere; then the last bin of the span is it.
  over = __ballot_sync(kAllLanes, !(end <= limit)) | uint32_t{1} << (kSpanBins - 1);
  const auto place = static_cast<uint32_t>(__ffs(static_cast<int32_t>(over))) - 1;
  const float threshold = ThresholdWithin(bin, mass, __ldcg(&group.counts[bin]), end - mass, limit);
  return __shfl_sync(kAllLanes, threshold, place);
}

// The bin that holds the token of rank top_k, and how many of it are kept. One warp, all lanes.
__device__ inline void RankThreshold(const ChoiceGroup& group, ChoiceThreshold* threshold) {
  const uint32_t lane = threadIdx.x % kWarp;
  // From the top down.
  uint32_t span = 0;
#pragma unroll
  for (uint32_t i = 1; i <= kSpanBins; ++i) {
    span += __ldcg(&group.counts[kBins - lane * kSpanBins - i]);
  }
  const uint32_t end = SumUpToLane(span);
  uint32_t reached = __ballot_sync(kAllLanes, end >= group.top_k);
  if (reached == 0) {
    // There are not so many: all of them.
    threshold->rank_bin = 0;
    threshold->rank_count = ~0U;
    return;
  }
  const auto owner = static_cast<uint32_t>(__ffs(static_cast<int32_t>(reached))) - 1;
  const uint32_t above = __shfl_sync(kAllLanes, end - span, owner);
  const uint32_t bin = kBins - owner * kSpanBins - 1 - min(lane, kSpanBins - 1);
  const uint32_t count = lane < kSpanBins ? __ldcg(&group.counts[bin]) : 0;
  const uint32_t bins_end = above + SumUpToLane(count);
  reached = __ballot_sync(kAllLanes, bins_end >= group.top_k);
  const auto place = static_cast<uint32_t>(__ffs(static_cast<int32_t>(reached))) - 1;
  threshold->rank_bin = __shfl_sync(kAllLanes, bin, place);
  threshold->rank_count = __shfl_sync(kAllLanes, group.top_k - (bins_end - count), place);
}

// Tokens that the thresholds keep, about: those of their bins count whole. One warp.
__device__ inline uint32_t CountExpected(const ChoiceGroup& group,
                                         const ChoiceThreshold& threshold) {
  uint32_t first = threshold.rank_bin;
  if (threshold.mass == threshold.mass) first = min(first, BinOf(threshold.mass));
  uint32_t count = 0;
  for (uint32_t bin = first + threadIdx.x % kWarp; bin < kBins; bin += kWarp) {
    count += __ldcg(&group.counts[bin]);
  }
  return ExpectedOf(group, SumOverLanes(count) * (kTokens / group.sampled));
}

// The group's thresholds, by its last CTA.
__device__ inline void FindThreshold(const ChoiceGroup& group) {
  __shared__ float of_heads[kChoiceHeadsMax];
  const bool by_mass = group.mass_limit > 0.0F;
  for (uint32_t head = threadIdx.x / kWarp; by_mass && head < group.head_count;
       head += kChoiceWarps) {
    const float of_head = MassThreshold(group, head);
    if (threadIdx.x % kWarp == 0) of_heads[head] = of_head;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  ChoiceThreshold threshold{.mass = __int_as_float(0x7fffffff)};
  if (group.top_k > 0) RankThreshold(group, &threshold);
  if (by_mass) {
    threshold.mass = of_heads[0];
    for (uint32_t head = 1; head < group.head_count; ++head) {
      threshold.mass = fminf(threshold.mass, of_heads[head]);
    }
  }
  const uint32_t expected =
      by_mass || group.top_k > 0 ? CountExpected(group, threshold) : uint32_t{0};
  if (threadIdx.x != 0) return;
  group.stats->threshold = threshold;
  group.stats->expected = expected;
}

// What a part's CTA counts.
template <int kHeads>
struct Histogram {
  uint32_t counts[kBins];
  uint32_t sums[kHeads][kBins];
  unsigned long long hidden[kHeads];
};

// The blocks of a part, and what their tokens need.
template <int kHeads>
struct CountedPart {
  uint64_t scanned[kPartBlocksMax];
  uint64_t candidates[kPartBlocksMax];
  float factors[kPartBlocksMax][kHeads];
  HeadScale scales[kHeads];
  Histogram<kHeads> histogram;
};

// A thread per block.
template <int kHeads>
__device__ inline void LoadPart(const ChoiceGroup& group, uint32_t begin, uint32_t count,
                                CountedPart<kHeads>* part) {
  static_assert(kPartBlocksMax == kChoiceThreads);
  const uint32_t i = threadIdx.x;
  const uint64_t word = i < count ? group.to_scan[begin + i] : 0;
  int32_t references[kHeads];
  float page_sums[kHeads];
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    const bool there = word != 0 && head < static_cast<int>(group.head_count);
    const size_t page = size_t{static_cast<uint32_t>(head)} * group.block_count + begin + i;
    references[head] = there ? group.reference[page] : 0;
    page_sums[head] = there ? group.page_sum[page] : 0.0F;
  }
  part->scanned[i] = word;
  part->candidates[i] = CandidatesOf(group, begin + i, word);
  if (threadIdx.x < kHeads) {
    part->scales[threadIdx.x] = {.inverse = 1.0F, .reference = 0};
    if (threadIdx.x < group.head_count) part->scales[threadIdx.x] = group.scales[threadIdx.x];
  }
  __syncthreads();
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    part->factors[i][head] = FactorOf(part->scales[head], references[head], page_sums[head]);
  }
  __syncthreads();
}

// A thread per token.
template <int kHeads>
__device__ inline void CountTokens(const ChoiceGroup& group, uint32_t begin, uint32_t count,
                                   CountedPart<kHeads>* part) {
  const uint32_t sampled = group.sampled;
  const uint32_t items = count * sampled;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < items; i += kChoiceThreads) {
    const uint32_t index = i / sampled;
    const uint32_t block = begin + index;
    // A block's share of the sample turns, so that no place in blocks counts more than others.
    const uint32_t token = i % sampled + block * sampled % kTokens;
    const bool there = (part->candidates[index] >> token & 1) != 0;
    float weights[kHeads];
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const size_t page = size_t{static_cast<uint32_t>(head)} * group.block_count + block;
      const bool reads = there && head < static_cast<int>(group.head_count);
      weights[head] = reads ? group.weights[page * kTokens + token] : 0.0F;
    }
    if (!there) continue;
    float even = 0.0F;
    float odd = 0.0F;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      weights[head] = ShareOf(weights[head], part->factors[index][head]);
      float& score = head % 2 == 0 ? even : odd;
      score = Score(group.largest, score, weights[head]);
    }
    const uint32_t bin = BinOf(Score(group.largest, even, odd));
    atomicAdd(&part->histogram.counts[bin], 1);
    if (group.mass_limit == 0.0F) continue;
    const float scale = kShareUnits / BinEdge(bin + 1);
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const uint32_t units = UnitsOf(weights[head], scale);
      if (units != 0) atomicAdd(&part->histogram.sums[head][bin], units);
    }
  }
}

// Adds what the CTA has counted to what the group has.
template <int kHeads>
__device__ inline void AddCounts(const ChoiceGroup& group, const Histogram<kHeads>& histogram) {
  for (uint32_t i = threadIdx.x; i < kBins; i += kChoiceThreads) {
    if (histogram.counts[i] != 0) atomicAdd(&group.counts[i], histogram.counts[i]);
  }
  for (uint32_t i = threadIdx.x; i < group.head_count * kBins; i += kChoiceThreads) {
    const uint32_t units = histogram.sums[i / kBins][i % kBins];
    if (units != 0) atomicAdd(&group.sums[i], units);
  }
  if (threadIdx.x < group.head_count && histogram.hidden[threadIdx.x] != 0) {
    atomicAdd(&group.hidden[threadIdx.x], histogram.hidden[threadIdx.x]);
  }
}

// A CTA per group.
template <int kHeads>
__global__ void __launch_bounds__(kScaleThreads, 1)
    ScaleKernel(const __grid_constant__ ChoiceCall call) {
  __shared__ GroupMemory group_memory;
  __shared__ RoughTotal of_warps[kScaleWarps];
  const ChoiceGroup& group = group_memory.Load(call.groups, blockIdx.x);
  __syncthreads();
  FindScales<kHeads>(group, of_warps, nullptr);
}

// A CTA per part, and behind them one per group for norms of values, where they are wanted.
template <int kHeads>
__global__ void __launch_bounds__(kChoiceThreads, kHeads <= 8 ? 4 : 2)
    HistogramKernel(const __grid_constant__ ChoiceCall call) {
  __shared__ GroupMemory group_memory;
  const ChoiceGroup& group = group_memory.Load(call.groups, blockIdx.y);
  __syncthreads();
  if (blockIdx.x >= group.part_count) {
    if (blockIdx.x == call.part_count_max && group.bounds_values) BoundOpenBlocks(call, group);
    return;
  }
  extern __shared__ uint4 memory[];
  auto& part = *reinterpret_cast<CountedPart<kHeads>*>(memory);
  __shared__ bool last;
  auto* zero = reinterpret_cast<uint32_t*>(&part.histogram);
  for (uint32_t i = threadIdx.x; i < sizeof(part.histogram) / sizeof(uint32_t);
       i += kChoiceThreads) {
    zero[i] = 0;
  }
  const uint32_t begin = blockIdx.x * group.part_blocks;
  const uint32_t count = min(group.part_blocks, group.block_count - begin);
  LoadPart<kHeads>(group, begin, count, &part);
  if (group.mass_limit > 0.0F || group.top_k > 0) CountTokens<kHeads>(group, begin, count, &part);
  if (group.mass_limit > 0.0F && threadIdx.x < count) {
    const uint64_t hidden = part.scanned[threadIdx.x] & ~part.candidates[threadIdx.x];
    if (hidden != 0) {
      AddHidden(group, part.scales, begin + threadIdx.x, hidden, part.histogram.hidden);
    }
  }
  __syncthreads();
  AddCounts<kHeads>(group, part.histogram);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&group.tickets[0], 1) == group.part_count - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  FindThreshold(group);
}

template <int kHeads>
cudaError_t CountHeads(const ChoiceCall& call, cudaStream_t stream) {
  constexpr auto kBytes = static_cast<uint32_t>(sizeof(CountedPart<kHeads>));
  const cudaError_t code = ReserveShared(HistogramKernel<kHeads>, kBytes);
  if (code != cudaSuccess) return code;
  ScaleKernel<kHeads><<<call.group_count, kScaleThreads, 0, stream>>>(call);
  const dim3 parts(call.part_count_max + (call.bounds_values ? 1 : 0), call.group_count);
  HistogramKernel<kHeads><<<parts, kChoiceThreads, kBytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t CountThresholds(const ChoiceCall& call, cudaStream_t stream) {
  return call.head_count_max <= 4   ? CountHeads<4>(call, stream)
         : call.head_count_max <= 8 ? CountHeads<8>(call, stream)
                                    : CountHeads<16>(call, stream);
}

}  // namespace kvservice::cuda
