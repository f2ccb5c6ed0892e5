// Selects tokens by the thresholds of their group, and adds up what is dropped. A CTA takes a part.

#include "attention/cuda/choice_parts-inl.h"

namespace kvservice::cuda {
namespace {

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
  for (; i < part.count; i += kChoiceWarps) {
    tokens = next;
    const uint32_t after = i + kChoiceWarps;
    next.Load(group, part.begin + after, after < part.count && wants(after));
    visit(i, tokens);
  }
}

// Counts the steps of the scores in the bin of the rank.
template <int kHeads>
__global__ void __launch_bounds__(kChoiceThreads)
    TiesKernel(const __grid_constant__ ChoiceCall call) {
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

// What a part drops, by head: thread t adds up head t % kHeads of every so many blocks.
template <int kHeads>
__device__ inline void SumPart(const ChoiceGroup& group, const Part<kHeads>& part) {
  __shared__ LaneSums of_warps[kChoiceWarps][kHeads];
  const uint32_t head = threadIdx.x % kHeads;
  const bool there = head < group.head_count;
  const uint32_t visible_begin = there ? group.visible[2 * head] : 0;
  const uint32_t visible_end = there ? group.visible[2 * head + 1] : 0;
  LaneSums sums;
#pragma unroll 2
  for (uint32_t i = threadIdx.x / kHeads; there && i < part.count; i += kChoiceThreads / kHeads) {
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
  for (uint32_t warp = 0; warp < kChoiceWarps; ++warp) sums.Add(of_warps[warp][threadIdx.x]);
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
  for (uint32_t i = threadIdx.x; i < part->count; i += kChoiceThreads) {
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
__global__ void __launch_bounds__(kChoiceThreads)
    SelectKernel(const __grid_constant__ ChoiceCall call) {
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
  for (uint32_t i = threadIdx.x; i < part.count; i += kChoiceThreads) {
    group.chosen[part.begin + i] = part.candidates[i];
    chosen += static_cast<uint32_t>(__popcll(part.candidates[i]));
  }
  chosen = SumOverLanes(chosen);
  if (threadIdx.x % kWarp == 0 && chosen != 0) atomicAdd(&group.stats->chosen, chosen);
  SumPart<kHeads>(group, part);
}

template <int kHeads>
cudaError_t SelectHeads(const ChoiceCall& call, cudaStream_t stream) {
  constexpr auto kBytes = static_cast<uint32_t>(sizeof(Part<kHeads>));
  for (const cudaError_t code :
       {ReserveShared(TiesKernel<kHeads>, kBytes), ReserveShared(SelectKernel<kHeads>, kBytes)}) {
    if (code != cudaSuccess) return code;
  }
  const dim3 parts(call.part_count_max, call.group_count);
  if (call.ranks) TiesKernel<kHeads><<<parts, kChoiceThreads, kBytes, stream>>>(call);
  SelectKernel<kHeads><<<parts, kChoiceThreads, kBytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t SelectTokens(const ChoiceCall& call, cudaStream_t stream) {
  return call.head_count_max <= 4   ? SelectHeads<4>(call, stream)
         : call.head_count_max <= 8 ? SelectHeads<8>(call, stream)
                                    : SelectHeads<16>(call, stream);
}

}  // namespace kvservice::cuda
