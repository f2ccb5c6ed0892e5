// Choosing on the device. A part of a group (some blocks) is a CTA's: of the histogram, whose last
// CTA finds the group's thresholds, and later of the selection.

#include "attention/cuda/choice.h"

#include "attention/cuda/elements-inl.h"

namespace kvservice::cuda {
namespace {

static_assert(kWordTokens == kTokens);

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / kWarp;
constexpr float kFloatMax = 0x1.fffffep+127F;
constexpr double kHiddenUnits = 0x1p40;
// What cannot be told from nothing next to the rest: what is below is rounded up in upper sums, and
// down in lower ones. Far enough from the least double for sums of the least weights.
constexpr int32_t kScaleExponentMin = -800;
constexpr int32_t kScaleExponentMax = 800;
// As in attention/cpu/weight_sums.cc: what 64 weights of 2^-126 may hide.
constexpr double kUnderflowMax = 0x1p-110;

__device__ __forceinline__ float Infinity() { return __int_as_float(0x7f800000); }

// ---- Words --------------------------------------------------------------------------------------

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
__global__ void __launch_bounds__(kThreads) MarkKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  const uint32_t block = blockIdx.x * kThreads + threadIdx.x;
  if (blockIdx.x * kThreads >= group.block_count) return;
  ChoiceWords words;
  float norm = 0.0F;
  bool open = false;
  uint32_t scanned = 0;
  if (block < group.block_count) {
    const std::byte* page = PageOf(call, group, block);
    const uint64_t exact = ExactOf(call, group, page);
    words = WordsOf(group.ranges, block, exact);
    const uint64_t hidden = words.all & ~words.always & ~words.middle;
    const uint64_t to_scan =
        (group.scans_middle ? words.middle : 0) | (group.scans_hidden ? hidden : 0);
    scanned = static_cast<uint32_t>(__popcll(to_scan));
    group.first[block] = words.always | (group.reads_middle ? words.middle : 0);
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
  if (threadIdx.x % kWarp != 0) return;
  if (always != 0) atomicAdd(&group.stats->always, always);
  if (middle != 0) atomicAdd(&group.stats->middle, middle);
  if (scanned != 0) atomicAdd(&group.stats->scanned, scanned);
  if (norm != 0.0F) RaiseTo(&group.stats->norm_max, norm);
  if (whole != 0.0F) RaiseTo(&group.stats->whole_norm_max, whole);
}

// A warp per token of the open blocks. The order of the blocks is any; a maximum has none.
template <int kType>
__global__ void __launch_bounds__(4 * kThreads)
    OpenValuesKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.x];
  const uint32_t tokens = group.stats->open_blocks * kTokens;
  float most = 0.0F;
#pragma unroll 4
  for (uint32_t i = threadIdx.x / kWarp; i < tokens; i += 4 * kWarps) {
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

// ---- Shares -------------------------------------------------------------------------------------

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

// ---- Normalisers --------------------------------------------------------------------------------

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

// What all weights of one head come to: estimates of what was scanned, and the mass of what is read
// in any case. It scales scores and is part of no bound.
__global__ void __launch_bounds__(kThreads)
    NormaliseKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  const uint32_t head = blockIdx.x;
  if (head >= group.head_count) return;
  __shared__ ScaledTotal of_warps[kWarps];
  const size_t first_page = size_t{head} * group.block_count;
  ScaledTotal total{.sum = 0.0, .reference = kReferenceMin};
#pragma unroll 4
  for (uint32_t block = threadIdx.x; block < group.block_count; block += kThreads) {
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
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const ScaledTotal other{__shfl_xor_sync(kAllLanes, total.sum, offset),
                            __shfl_xor_sync(kAllLanes, total.reference, offset)};
    total = Join(total, other);
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (uint32_t warp = 1; warp < kWarps; ++warp) total = Join(total, of_warps[warp]);
  const HeadSums always = group.first_sums[head];
  if (always.sum > 0.0 && always.sum <= 0x1.fffffffffffffp+1023) {
    // So that references are those of numbers near 1.
    const int32_t exponent = ilogb(always.sum);
    total = Join(total, {scalbn(always.sum, -exponent), always.reference + exponent});
  }
  group.scales[head] = {.inverse = total.sum > 0.0 ? 1.0 / total.sum : 1.0,
                        .reference = total.reference};
}

// ---- Histogram ----------------------------------------------------------------------------------

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
    for (uint32_t i = threadIdx.x; i < blocks; i += kThreads) {
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
  for (uint32_t head = threadIdx.x / kWarp; by_mass && head < group.head_count; head += kWarps) {
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
  for (uint32_t i = threadIdx.x; i < items; i += kThreads) {
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
__global__ void __launch_bounds__(kThreads, 3)
    HistogramKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  if (blockIdx.x >= group.part_count) return;
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<HistogramShared<kHeads>*>(memory);
  __shared__ bool last;
  auto* zero = reinterpret_cast<uint32_t*>(&shared.histogram);
  for (uint32_t i = threadIdx.x; i < sizeof(shared.histogram) / sizeof(uint32_t); i += kThreads) {
    zero[i] = 0;
  }
  shared.part.Load(group);
  const Part<kHeads>& part = shared.part;
  Histogram<kHeads>& histogram = shared.histogram;
  if (group.mass_limit > 0.0F || group.top_k > 0) CountTokens(group, part, &histogram);
  if (group.mass_limit > 0.0F) {
    for (uint32_t i = threadIdx.x; i < part.count; i += kThreads) {
      const uint64_t hidden = part.scanned[i] & ~part.candidates[i];
      if (hidden != 0) AddHidden(group, part.begin + i, hidden, histogram.hidden);
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) {
    if (histogram.counts[i] != 0) atomicAdd(&group.counts[i], histogram.counts[i]);
  }
  for (uint32_t i = threadIdx.x; i < group.head_count * kBins; i += kThreads) {
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

// ---- Selection ----------------------------------------------------------------------------------

// Weights of this lane's two tokens of a block, `lane` and `lane + 32`.
template <int kHeads>
struct LaneTokens {
  float weights[kHeads][2];

  __device__ __forceinline__ void Load(const ChoiceGroup& group, uint32_t block, bool there) {
    const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const size_t page = size_t{static_cast<uint32_t>(head)} * group.block_count + block;
      const bool reads = there && head < static_cast<int>(group.head_count);
      weights[head][0] = reads ? group.weights[page * kTokens + lane] : 0.0F;
      weights[head][1] = reads ? group.weights[page * kTokens + kWarp + lane] : 0.0F;
    }
  }

  __device__ __forceinline__ void Scores(const ChoiceGroup& group, const float* factors,
                                         float (&scores)[2]) const {
    scores[0] = scores[1] = 0.0F;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      scores[0] = Score(group.largest, scores[0], ShareOf(weights[head][0], factors[head]));
      scores[1] = Score(group.largest, scores[1], ShareOf(weights[head][1], factors[head]));
    }
  }
};

// The tokens whose scores hold what `test` asks, as a word.
template <typename Test>
__device__ __forceinline__ uint64_t WordOf(const float (&scores)[2], Test test) {
  const uint32_t low = __ballot_sync(kAllLanes, test(scores[0]));
  const uint32_t high = __ballot_sync(kAllLanes, test(scores[1]));
  return low | uint64_t{high} << 32;
}

// Calls visit(index, tokens) for the part's blocks of which `wants` holds, one warp per block, with
// the weights of the next on their way.
template <int kHeads, typename Wants, typename Visit>
__device__ inline void ForBlocks(const ChoiceGroup& group, const Part<kHeads>& part, Wants wants,
                                 Visit visit) {
  LaneTokens<kHeads> tokens;
  LaneTokens<kHeads> next;
  uint32_t i = threadIdx.x / kWarp;
  next.Load(group, part.begin + i, i < part.count && wants(i));
  for (; i < part.count; i += kWarps) {
    tokens = next;
    const uint32_t after = i + kWarps;
    next.Load(group, part.begin + after, after < part.count && wants(after));
    visit(i, tokens);
  }
}

// Counts the steps of the scores in the bin of the rank.
template <int kHeads>
__global__ void __launch_bounds__(kThreads) TiesKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  if (blockIdx.x >= group.part_count || group.top_k == 0) return;
  extern __shared__ uint4 memory[];
  auto& part = *reinterpret_cast<Part<kHeads>*>(memory);
  __shared__ uint32_t counts[kStepsOfBin];
  if (threadIdx.x < kStepsOfBin) counts[threadIdx.x] = 0;
  part.Load(group);
  const uint32_t bin = group.stats->threshold.rank_bin;
  ForBlocks<kHeads>(
      group, part, [&](uint32_t i) { return part.candidates[i] != 0; },
      [&](uint32_t i, const LaneTokens<kHeads>& tokens) {
        float scores[2];
        tokens.Scores(group, part.factors[i], scores);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
          const uint32_t step = StepOf(scores[half]);
          const uint32_t token = half * kWarp + threadIdx.x % kWarp;
          const bool there = (part.candidates[i] >> token & 1) != 0;
          if (there && step / kStepsOfBin == bin) atomicAdd(&counts[step % kStepsOfBin], 1);
        }
      });
  __syncthreads();
  if (threadIdx.x < kStepsOfBin) {
    group.ties[size_t{blockIdx.x} * kStepsOfBin + threadIdx.x] = counts[threadIdx.x];
  }
}

// How a CTA selects: scores of at least `mass`, of a step above `step`, and the first `ties` of its
// part with that step.
struct Rule {
  float mass;
  uint32_t step;
  uint32_t ties;      // that are kept
  uint32_t own_ties;  // that there are
};

// One warp; the rule is complete in lane 0.
__device__ inline Rule RuleOf(const ChoiceGroup& group) {
  const ChoiceThreshold threshold = group.stats->threshold;
  Rule rule{.mass = threshold.mass, .step = ~0U, .ties = 0, .own_ties = 0};
  if (threshold.rank_bin >= kBins) return rule;
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t before = 0;
  uint32_t own = 0;
  uint32_t total = 0;
  for (uint32_t part = 0; lane < kStepsOfBin && part < group.part_count; ++part) {
    const uint32_t count = group.ties[size_t{part} * kStepsOfBin + lane];
    before += part < blockIdx.x ? count : 0;
    own = part == blockIdx.x ? count : own;
    total += count;
  }
  // Steps from the top down, until there are enough.
  uint32_t wanted = threshold.rank_count;
  for (int32_t step = kStepsOfBin - 1; step >= 0; --step) {
    const uint32_t there = __shfl_sync(kAllLanes, total, step);
    if (there < wanted && step > 0) {
      wanted -= there;
      continue;
    }
    const uint32_t ahead = __shfl_sync(kAllLanes, before, step);
    rule.own_ties = __shfl_sync(kAllLanes, own, step);
    rule.step = threshold.rank_bin * kStepsOfBin + static_cast<uint32_t>(step);
    rule.ties = wanted > ahead ? min(wanted - ahead, rule.own_ties) : 0;
    break;
  }
  return rule;
}

__device__ __forceinline__ bool IsTie(const Rule& rule, float score) {
  return StepOf(score) == rule.step;
}
__device__ __forceinline__ bool IsAbove(const Rule& rule, float score) {
  return score >= rule.mass || (rule.step != ~0U && StepOf(score) > rule.step);
}

// Ties of every block of the part that come before it, where only some are kept.
template <int kHeads>
__device__ inline void RankTies(const ChoiceGroup& group, const Part<kHeads>& part,
                                const Rule& rule, uint32_t* before) {
  ForBlocks<kHeads>(
      group, part, [&](uint32_t i) { return part.candidates[i] != 0; },
      [&](uint32_t i, const LaneTokens<kHeads>& tokens) {
        float scores[2];
        tokens.Scores(group, part.factors[i], scores);
        const uint64_t ties =
            part.candidates[i] & WordOf(scores, [&](float score) { return IsTie(rule, score); });
        if (threadIdx.x % kWarp == 0) before[i] = static_cast<uint32_t>(__popcll(ties));
      });
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < part.count; ++i) {
      const uint32_t count = before[i];
      before[i] = sum;
      sum += count;
    }
  }
  __syncthreads();
}

// The lowest `count` of a word's tokens.
__device__ __forceinline__ uint64_t LowestOf(uint64_t word, uint32_t count) {
  uint64_t kept = 0;
  for (; word != 0 && count > 0; word &= word - 1, --count) kept |= word & (~word + 1);
  return kept;
}

// Adds up kCount values of each lane over the warp; lane l ends with the sum of value
// l / (32 / kCount).
template <int kCount>
__device__ __forceinline__ float SumValues(float (&values)[kCount]) {
  int count = kCount;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = (threadIdx.x & static_cast<uint32_t>(offset)) != 0;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= count) break;
        const float sent = upper ? values[i] : values[i + count];
        const float kept = upper ? values[i + count] : values[i];
        values[i] = kept + __shfl_xor_sync(kAllLanes, sent, offset);
      }
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
    }
  }
  return values[0];
}

// Selects a block's tokens, and adds up what it drops in fp32: at most six additions in a row. The
// sums take the place of the block's factors, the kept tokens that of its candidates. One warp.
template <int kHeads>
__device__ __forceinline__ void SelectBlock(const ChoiceGroup& group, const Rule& rule, uint32_t i,
                                            uint32_t ties_before, const LaneTokens<kHeads>& tokens,
                                            Part<kHeads>* part) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint64_t scanned = part->scanned[i];
  const uint64_t candidates = part->candidates[i];
  uint64_t kept = 0;
  if (candidates != 0) {
    float scores[2];
    tokens.Scores(group, part->factors[i], scores);
    kept = candidates & WordOf(scores, [&](float score) { return IsAbove(rule, score); });
    if (rule.ties > 0) {
      const uint64_t ties =
          candidates & WordOf(scores, [&](float score) { return IsTie(rule, score); });
      const uint32_t left = rule.ties > ties_before ? rule.ties - ties_before : 0;
      kept |= rule.ties == rule.own_ties ? ties : LowestOf(ties, left);
    }
  }
  const uint64_t dropped = scanned & ~kept;
  const bool low = (dropped >> lane & 1) != 0;
  const bool high = (dropped >> (kWarp + lane) & 1) != 0;
  float sums[kHeads];
#pragma unroll
  for (int head = 0; head < kHeads; ++head) {
    sums[head] = (low ? tokens.weights[head][0] : 0.0F) + (high ? tokens.weights[head][1] : 0.0F);
  }
  const float sum = SumValues(sums);
  // All lanes have read what is overwritten.
  __syncwarp();
  constexpr uint32_t kLanesOfHead = kWarp / kHeads;
  if (lane % kLanesOfHead == 0) part->factors[i][lane / kLanesOfHead] = sum;
  if (lane == 0) part->candidates[i] = kept;
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

// What a part drops, by head: thread t adds up head t % kHeads of every so many blocks.
template <int kHeads>
__device__ inline void SumPart(const ChoiceGroup& group, const Part<kHeads>& part) {
  __shared__ LaneSums of_warps[kWarps][kHeads];
  const uint32_t head = threadIdx.x % kHeads;
  const bool there = head < group.head_count;
  const uint32_t visible_begin = there ? group.visible[2 * head] : 0;
  const uint32_t visible_end = there ? group.visible[2 * head + 1] : 0;
  LaneSums sums;
#pragma unroll 2
  for (uint32_t i = threadIdx.x / kHeads; there && i < part.count; i += kThreads / kHeads) {
    const uint32_t block = part.begin + i;
    if (part.scanned[i] != 0) sums.Add(group, head, block, part.factors[i][head]);
    const uint64_t rest = WordOfRange(block, group.ranges.begin, group.ranges.end) &
                          ~group.first[block] & ~part.candidates[i];
    sums.seen +=
        static_cast<uint32_t>(__popcll(rest & WordOfRange(block, visible_begin, visible_end)));
  }
#pragma unroll
  for (int offset = kWarp / 2; offset >= kHeads; offset /= 2) {
    const LaneSums other{.weight = __shfl_xor_sync(kAllLanes, sums.weight, offset),
                         .lower = __shfl_xor_sync(kAllLanes, sums.lower, offset),
                         .estimate = __shfl_xor_sync(kAllLanes, sums.estimate, offset),
                         .seen = __shfl_xor_sync(kAllLanes, sums.seen, offset)};
    sums.Add(other);
  }
  if (threadIdx.x % kWarp < kHeads) of_warps[threadIdx.x / kWarp][head] = sums;
  __syncthreads();
  if (threadIdx.x >= group.head_count) return;
  sums = LaneSums();
  for (uint32_t warp = 0; warp < kWarps; ++warp) sums.Add(of_warps[warp][threadIdx.x]);
  group.part_sums[size_t{blockIdx.x} * group.head_count + threadIdx.x] = {.weight = sums.weight,
                                                                          .lower = sums.lower,
                                                                          .estimate = sums.estimate,
                                                                          .reference = 0,
                                                                          .seen = sums.seen};
}

// Blocks of which no token can be kept need no look: their sums are known.
template <int kHeads>
__device__ inline void PassOver(const ChoiceGroup& group, const Rule& rule, Part<kHeads>* part) {
  // A page's power of two is the nearest to its largest weight: that is at most 2^0.5, but for
  // rounding. Weights that are not known have factors that reach anything.
  constexpr float kWeightMax = 1.5F;
  for (uint32_t i = threadIdx.x; i < part->count; i += kThreads) {
    part->passed[i] = part->scanned[i] == 0;
    if (part->scanned[i] != ~uint64_t{0}) continue;
    float reach = 0.0F;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      reach = Score(group.largest, reach, part->factors[i][head] * kWeightMax);
    }
    if (IsAbove(rule, reach) || IsTie(rule, reach)) continue;
    part->passed[i] = true;
    part->candidates[i] = 0;
    for (uint32_t head = 0; head < group.head_count; ++head) {
      part->factors[i][head] = group.page_sum[size_t{head} * group.block_count + part->begin + i];
    }
  }
  __syncthreads();
}

template <int kHeads>
__global__ void __launch_bounds__(kThreads) SelectKernel(const __grid_constant__ ChoiceCall call) {
  const ChoiceGroup& group = call.groups[blockIdx.y];
  if (blockIdx.x >= group.part_count) return;
  extern __shared__ uint4 memory[];
  auto& part = *reinterpret_cast<Part<kHeads>*>(memory);
  __shared__ Rule shared_rule;
  __shared__ uint32_t ties_before[kPartBlocksMax];
  if (threadIdx.x < kWarp) {
    const Rule rule = RuleOf(group);
    if (threadIdx.x == 0) shared_rule = rule;
  }
  part.Load(group);
  const Rule rule = shared_rule;
  const bool ranks = rule.ties > 0 && rule.ties < rule.own_ties;
  if (ranks) RankTies<kHeads>(group, part, rule, ties_before);
  PassOver<kHeads>(group, rule, &part);
  ForBlocks<kHeads>(
      group, part, [&](uint32_t i) { return !part.passed[i]; },
      [&](uint32_t i, const LaneTokens<kHeads>& tokens) {
        if (part.passed[i]) return;
        SelectBlock<kHeads>(group, rule, i, ranks ? ties_before[i] : 0, tokens, &part);
      });
  __syncthreads();
  uint32_t chosen = 0;
  for (uint32_t i = threadIdx.x; i < part.count; i += kThreads) {
    group.chosen[part.begin + i] = part.candidates[i];
    chosen += static_cast<uint32_t>(__popcll(part.candidates[i]));
  }
  chosen = SumOverLanes(chosen);
  if (threadIdx.x % kWarp == 0 && chosen != 0) atomicAdd(&group.stats->chosen, chosen);
  SumPart<kHeads>(group, part);
}

// ---- Jobs ---------------------------------------------------------------------------------------

// True if so much is planned that everything is read.
__device__ __forceinline__ bool ReadsEverything(const ChoiceGroup& group) {
  const ChoiceStats& stats = *group.stats;
  const double visible = static_cast<double>(stats.always) + stats.middle;
  const double planned = static_cast<double>(stats.always) + stats.chosen;
  return !group.reads_middle && planned > static_cast<double>(group.dense_share) * visible;
}
__device__ __forceinline__ uint32_t TokensOf(const ChoiceGroup& group) {
  if (group.reads_middle) return 0;
  return ReadsEverything(group) ? group.stats->middle : group.stats->chosen;
}

// What all parts of a group drop, a warp per head.
__device__ inline void SumParts(const ChoiceGroup& group, bool everything) {
  const uint32_t lane = threadIdx.x % kWarp;
  for (uint32_t head = threadIdx.x / kWarp; head < group.head_count; head += kWarps) {
    LaneSums sums;
    for (uint32_t part = lane; part < group.part_count; part += kWarp) {
      const DroppedSums& one = group.part_sums[size_t{part} * group.head_count + head];
      sums.Add({one.weight, one.lower, one.estimate, one.seen});
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const LaneSums other{.weight = __shfl_xor_sync(kAllLanes, sums.weight, offset),
                           .lower = __shfl_xor_sync(kAllLanes, sums.lower, offset),
                           .estimate = __shfl_xor_sync(kAllLanes, sums.estimate, offset),
                           .seen = __shfl_xor_sync(kAllLanes, sums.seen, offset)};
      sums.Add(other);
    }
    if (lane != 0) continue;
    // Nothing is left but what is hidden, of which there are no sums then: the host looks itself.
    if (everything) sums = LaneSums();
    group.dropped[head] = {.weight = sums.weight,
                           .lower = sums.lower,
                           .estimate = sums.estimate,
                           .reference = group.scales[head].reference,
                           .seen = sums.seen};
  }
}

// All threads end with the sum.
template <typename T>
__device__ inline T SumOfCta(T x, T* shared) {
  x = SumOverLanes(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  T total = shared[0];
  for (uint32_t warp = 1; warp < kWarps; ++warp) total += shared[warp];
  return total;
}

// The sum of the counts of the threads before this one. All threads of the CTA call it.
__device__ inline uint32_t SumBefore(uint32_t count, uint32_t* of_warps) {
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t end = count;
#pragma unroll
  for (uint32_t offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, end, offset);
    if (lane >= offset) end += other;
  }
  if (lane == kWarp - 1) of_warps[threadIdx.x / kWarp] = end;
  __syncthreads();
  for (uint32_t warp = 0; warp < threadIdx.x / kWarp; ++warp) end += of_warps[warp];
  return end - count;
}

// First words of the jobs of a group's set. A thread takes neighbouring words.
__device__ inline void CutJobs(const ChoiceGroup& group, uint32_t group_index, bool everything,
                               uint32_t tokens, uint32_t jobs, AttendJob* to) {
  __shared__ uint32_t ends[kWarps];
  uint64_t* words = group.chosen;
  const uint32_t span = (group.block_count + kThreads - 1) / kThreads;
  const uint32_t begin = min(threadIdx.x * span, group.block_count);
  const uint32_t end = min(begin + span, group.block_count);
  uint32_t count = 0;
  for (uint32_t word = begin; word < end; ++word) {
    if (everything) words[word] = group.middle[word];
    count += static_cast<uint32_t>(__popcll(words[word]));
  }
  for (uint32_t job = threadIdx.x; job < jobs; job += kThreads) {
    to[job] = {.set = group_index,
               .index = job,
               .first_word = job == 0 ? 0 : group.block_count,
               .word_count = 0};
  }
  __syncthreads();
  uint32_t before = SumBefore(count, ends);
  uint32_t last = before;
  for (uint32_t word = begin; word < end; ++word) {
    // The tokens before the word before this one.
    if (word == begin && word > 0) {
      last = before - static_cast<uint32_t>(__popcll(words[word - 1]));
    }
    const uint32_t from = word == 0 ? 0 : JobOfWord(last, tokens, jobs) + 1;
    const uint32_t until = JobOfWord(before, tokens, jobs);
    for (uint32_t job = from; word > 0 && job <= until; ++job) to[job].first_word = word;
    last = before;
    before += static_cast<uint32_t>(__popcll(words[word]));
  }
  __syncthreads();
  for (uint32_t job = threadIdx.x; job < jobs; job += kThreads) {
    const uint32_t next = job + 1 < jobs ? to[job + 1].first_word : group.block_count;
    to[job].word_count = next - to[job].first_word;
  }
}

// A CTA per group, and one for the jobs that are left over.
__global__ void __launch_bounds__(kThreads) JobsKernel(const __grid_constant__ ChoiceCall call) {
  __shared__ unsigned long long of_warps[kWarps];
  const uint32_t own = blockIdx.x;
  unsigned long long tokens = 0;
  for (uint32_t i = threadIdx.x; i < call.group_count; i += kThreads) {
    tokens += TokensOf(call.groups[i]);
  }
  tokens = SumOfCta(tokens, of_warps);
  const uint32_t places = call.job_count - call.group_count;
  const auto share = static_cast<uint32_t>((tokens + places - 1) / places);
  const uint32_t target = max(share, call.job_tokens_min);
  unsigned long long first = 0;
  for (uint32_t i = threadIdx.x; i < own; i += kThreads) {
    first += JobsOf(TokensOf(call.groups[i]), target);
  }
  first = SumOfCta(first, of_warps);
  if (own == call.group_count) {
    for (uint32_t job = static_cast<uint32_t>(first) + threadIdx.x; job < call.job_count;
         job += kThreads) {
      call.jobs[job] = {.set = own, .index = 0, .first_word = 0, .word_count = 0};
    }
    return;
  }
  const ChoiceGroup& group = call.groups[own];
  const bool everything = ReadsEverything(group);
  const uint32_t own_tokens = TokensOf(group);
  const uint32_t jobs = JobsOf(own_tokens, target);
  CutJobs(group, own, everything, own_tokens, jobs, call.jobs + first);
  SumParts(group, everything);
  if (threadIdx.x != 0) return;
  group.stats->everything = everything || group.reads_middle ? 1 : 0;
  group.stats->job_tokens_max = own_tokens / jobs + 1 + kTokens;
  AttendSet& set = call.sets[own];
  set.job_count = jobs;
  set.parts = call.parts + first * call.head_count_max * call.shape.head_dim;
  set.part_sums = call.part_sums + first * call.head_count_max;
}

template <int kHeads>
cudaError_t ChooseHeads(const ChoiceCall& call, cudaStream_t stream) {
  const dim3 parts(call.part_count_max, call.group_count);
  constexpr auto kPartBytes = static_cast<uint32_t>(sizeof(Part<kHeads>));
  constexpr auto kHistogramBytes = static_cast<uint32_t>(sizeof(HistogramShared<kHeads>));
  for (const cudaError_t code : {ReserveShared(HistogramKernel<kHeads>, kHistogramBytes),
                                 ReserveShared(TiesKernel<kHeads>, kPartBytes),
                                 ReserveShared(SelectKernel<kHeads>, kPartBytes)}) {
    if (code != cudaSuccess) return code;
  }
  HistogramKernel<kHeads><<<parts, kThreads, kHistogramBytes, stream>>>(call);
  if (call.ranks) TiesKernel<kHeads><<<parts, kThreads, kPartBytes, stream>>>(call);
  SelectKernel<kHeads><<<parts, kThreads, kPartBytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t MarkWords(const ChoiceCall& call, cudaStream_t stream) {
  const dim3 grid((call.block_count_max + kThreads - 1) / kThreads, call.group_count);
  MarkKernel<<<grid, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t BoundOpenValues(const ChoiceCall& call, cudaStream_t stream) {
  if (call.shape.dtype == kFloat32) {
    OpenValuesKernel<kFloat32><<<call.group_count, 4 * kThreads, 0, stream>>>(call);
  } else if (call.shape.dtype == kFloat16) {
    OpenValuesKernel<kFloat16><<<call.group_count, 4 * kThreads, 0, stream>>>(call);
  } else {
    OpenValuesKernel<kBfloat16><<<call.group_count, 4 * kThreads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

cudaError_t ChooseTokens(const ChoiceCall& call, cudaStream_t stream) {
  NormaliseKernel<<<dim3(call.head_count_max, call.group_count), kThreads, 0, stream>>>(call);
  cudaError_t code = call.head_count_max <= 4   ? ChooseHeads<4>(call, stream)
                     : call.head_count_max <= 8 ? ChooseHeads<8>(call, stream)
                                                : ChooseHeads<16>(call, stream);
  if (code != cudaSuccess) return code;
  JobsKernel<<<call.group_count + 1, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace kvservice::cuda
