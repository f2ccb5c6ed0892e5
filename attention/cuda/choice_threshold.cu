// Thresholds of a choice: a histogram of the scores, of which every CTA counts a part; the last CTA
// of a group finds its thresholds.

#include "attention/cuda/choice_parts-inl.h"

namespace kvservice::cuda {
namespace {

// A sum with a power of two of its own.
struct ScaledTotal {
  double sum;
  int32_t reference;
};
__device__ __forceinline__ ScaledTotal Join(const ScaledTotal& a, const ScaledTotal& b) {
  const int32_t reference = max(a.reference, b.reference);
  return {
      a.sum * PowerOfTwo64(a.reference - reference) + b.sum * PowerOfTwo64(b.reference - reference),
      reference};
}

__device__ inline ScaledTotal JoinOfLanes(ScaledTotal total) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const ScaledTotal other{__shfl_xor_sync(kAllLanes, total.sum, offset),
                            __shfl_xor_sync(kAllLanes, total.reference, offset)};
    total = Join(total, other);
  }
  return total;
}

// Enough for a block or two of long rows each, in as many warps as a warp has lanes.
constexpr uint32_t kNormaliseThreads = kWarp * kWarp;

// What all weights of one head come to: estimates of what was scanned, and the mass of what is read
// in any case. It scales scores and is part of no bound.
__global__ void __launch_bounds__(kNormaliseThreads)
    NormaliseKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  const uint32_t head = blockIdx.x;
  if (head >= group.head_count) return;
  __shared__ ScaledTotal of_warps[kWarp];
  const HeadSums always = group.first_sums[head];
  const size_t first_page = size_t{head} * group.block_count;
  ScaledTotal total{.sum = 0.0, .reference = kReferenceMin};
  for (uint32_t block = threadIdx.x; block < group.block_count; block += kNormaliseThreads) {
    const uint64_t word = group.to_scan[block];
    if (word == 0) continue;
    const size_t page = first_page + block;
    const float page_sum = group.page_sum[page];
    const int32_t reference = group.reference[page];
    const float share = group.bounded ? group.estimate_share[page] : 1.0F;
    if (!(page_sum > 0.0F && page_sum <= kFloatMax) || !(share > 0.0F)) continue;
    const float sum = word == ~uint64_t{0} ? page_sum : SumOfWord(group, head, block, word);
    total = Join(total, {static_cast<double>(sum) * static_cast<double>(share), reference});
  }
  total = JoinOfLanes(total);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  total = JoinOfLanes(of_warps[threadIdx.x]);
  if (threadIdx.x != 0) return;
  if (always.sum > 0.0 && always.sum <= 0x1.fffffffffffffp+1023) {
    // So that references are those of numbers near 1.
    const int32_t exponent = ilogb(always.sum);
    total = Join(total, {scalbn(always.sum, -exponent), always.reference + exponent});
  }
  group.scales[head] = {.inverse = total.sum > 0.0 ? 1.0 / total.sum : 1.0,
                        .reference = total.reference};
}

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

// The bin that holds the token of rank top_k, and how many of it are kept. One warp; lane 0 writes.
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
    if (lane == 0) threshold->rank_bin = 0, threshold->rank_count = ~0U;
    return;
  }
  const auto owner = static_cast<uint32_t>(__ffs(static_cast<int32_t>(reached))) - 1;
  const uint32_t above = __shfl_sync(kAllLanes, end - span, owner);
  const uint32_t bin = kBins - owner * kSpanBins - 1 - min(lane, kSpanBins - 1);
  const uint32_t count = lane < kSpanBins ? __ldcg(&group.counts[bin]) : 0;
  const uint32_t bins_end = above + SumUpToLane(count);
  reached = __ballot_sync(kAllLanes, bins_end >= group.top_k);
  const auto place = static_cast<uint32_t>(__ffs(static_cast<int32_t>(reached))) - 1;
  if (lane != place) return;
  threshold->rank_bin = bin;
  threshold->rank_count = group.top_k - (bins_end - count);
}

// The group's thresholds, by its last CTA.
__device__ inline void FindThreshold(const ChoiceGroup& group) {
  __shared__ float of_heads[kChoiceHeadsMax];
  __shared__ ChoiceThreshold threshold;
  if (threadIdx.x == 0) threshold = ChoiceThreshold();
  const bool by_mass = group.mass_limit > 0.0F;
  for (uint32_t head = threadIdx.x / kWarp; by_mass && head < group.head_count;
       head += kChoiceWarps) {
    const float of_head = MassThreshold(group, head);
    if (threadIdx.x % kWarp == 0) of_heads[head] = of_head;
  }
  __syncthreads();
  if (threadIdx.x < kWarp && group.top_k > 0) RankThreshold(group, &threshold);
  __syncthreads();
  if (threadIdx.x != 0) return;
  threshold.mass = __int_as_float(0x7fffffff);
  if (by_mass) {
    threshold.mass = of_heads[0];
    for (uint32_t head = 1; head < group.head_count; ++head) {
      threshold.mass = fminf(threshold.mass, of_heads[head]);
    }
  }
  group.stats->threshold = threshold;
}

// Counts what is hidden of a block, whole.
__device__ inline void AddHidden(const ChoiceGroup& group, uint32_t block, uint64_t hidden,
                                 unsigned long long* sums) {
  for (uint32_t head = 0; head < group.head_count; ++head) {
    const double share = static_cast<double>(SumOfWord(group, head, block, hidden)) *
                         static_cast<double>(FactorOf(group, head, block));
    // More than all is all, and so is what is not known.
    const double most = share < 4.0 ? share : 4.0;
    atomicAdd(&sums[head], static_cast<unsigned long long>(most * kHiddenUnits));
  }
}

// What a part's CTA counts.
template <int kHeads>
struct Histogram {
  uint32_t counts[kBins];
  uint32_t sums[kHeads][kBins];
  unsigned long long hidden[kHeads];
};

// A thread per token.
template <int kHeads>
__device__ inline void CountTokens(const ChoiceGroup& group, const Part<kHeads>& part,
                                   Histogram<kHeads>* histogram) {
  const uint32_t sampled = group.sampled;
  const uint32_t items = part.count * sampled;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < items; i += kChoiceThreads) {
    const uint32_t index = i / sampled;
    const uint32_t block = part.begin + index;
    // A block's share of the sample turns, so that no place in blocks counts more than others.
    const uint32_t token = i % sampled + block * sampled % kTokens;
    const bool there = (part.candidates[index] >> token & 1) != 0;
    float weights[kHeads];
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const size_t page = size_t{static_cast<uint32_t>(head)} * group.block_count + block;
      const bool reads = there && head < static_cast<int>(group.head_count);
      weights[head] = reads ? group.weights[page * kTokens + token] : 0.0F;
    }
    if (!there) continue;
    float score = 0.0F;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      weights[head] = ShareOf(weights[head], part.factors[index][head]);
      score = Score(group.largest, score, weights[head]);
    }
    const uint32_t bin = BinOf(score);
    atomicAdd(&histogram->counts[bin], 1);
    if (group.mass_limit == 0.0F) continue;
    const float scale = kShareUnits / BinEdge(bin + 1);
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const uint32_t units = UnitsOf(weights[head], scale);
      if (units != 0) atomicAdd(&histogram->sums[head][bin], units);
    }
  }
}

template <int kHeads>
struct HistogramShared {
  Part<kHeads> part;
  Histogram<kHeads> histogram;
};

template <int kHeads>
__global__ void __launch_bounds__(kChoiceThreads, 4)
    HistogramKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  if (blockIdx.x >= group.part_count) return;
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<HistogramShared<kHeads>*>(memory);
  __shared__ bool last;
  auto* zero = reinterpret_cast<uint32_t*>(&shared.histogram);
  for (uint32_t i = threadIdx.x; i < sizeof(shared.histogram) / sizeof(uint32_t);
       i += kChoiceThreads) {
    zero[i] = 0;
  }
  shared.part.Load(group);
  const Part<kHeads>& part = shared.part;
  Histogram<kHeads>& histogram = shared.histogram;
  if (group.mass_limit > 0.0F || group.top_k > 0) CountTokens(group, part, &histogram);
  if (group.mass_limit > 0.0F) {
    for (uint32_t i = threadIdx.x; i < part.count; i += kChoiceThreads) {
      const uint64_t hidden = part.scanned[i] & ~part.candidates[i];
      if (hidden != 0) AddHidden(group, part.begin + i, hidden, histogram.hidden);
    }
  }
  __syncthreads();
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
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(group.ticket, 1) == group.part_count - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  FindThreshold(group);
}

template <int kHeads>
cudaError_t CountHeads(const ChoiceCall& call, cudaStream_t stream) {
  constexpr auto kBytes = static_cast<uint32_t>(sizeof(HistogramShared<kHeads>));
  const cudaError_t code = ReserveShared(HistogramKernel<kHeads>, kBytes);
  if (code != cudaSuccess) return code;
  const dim3 parts(call.part_count_max, call.group_count);
  HistogramKernel<kHeads><<<parts, kChoiceThreads, kBytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t FindThresholds(const ChoiceCall& call, cudaStream_t stream) {
  NormaliseKernel<<<dim3(call.head_count_max, call.group_count), kNormaliseThreads, 0, stream>>>(
      call);
  return call.head_count_max <= 4   ? CountHeads<4>(call, stream)
         : call.head_count_max <= 8 ? CountHeads<8>(call, stream)
                                    : CountHeads<16>(call, stream);
}

}  // namespace kvservice::cuda
