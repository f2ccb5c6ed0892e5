// Selects tokens by the thresholds of their group, and adds up what is dropped. A warp takes a
// batch of neighbouring blocks: first a lane each, to see which need a look at their weights, then
// one block after the other. The last CTA of a group makes its jobs (choice_jobs-inl.h).

#include "attention/cuda/choice_jobs-inl.h"

#include <cuda_pipeline_primitives.h>

namespace kvservice::cuda {
namespace {

// CTAs on one multiprocessor, of groups of up to four heads, as registers allow.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr uint32_t kSelectCtas = 5;
#else
constexpr uint32_t kSelectCtas = 8;
#endif

// What lanes know of their blocks, and then all of one block; weights of blocks on their way. Lane
// 16 h + j has tokens 4 j .. 4 j + 3 of heads h, h + 2, ...
template <int kHeads>
struct BatchMemory {
  static constexpr int kOwn = kHeads / 2;
  static constexpr uint32_t kStages = kHeads <= 4 ? 4 : kHeads <= 8 ? 3 : 2;
  struct Words {
    uint64_t scanned;
    uint64_t candidates;
  };
  float4 weights[kStages][kOwn][kWarp];
  Words words[kWarp];
  alignas(16) float factors[kWarp][kHeads];  // then sums of what is dropped
  int32_t references[kHeads][kWarp];
  float lower[kHeads][kWarp];
  float estimate[kHeads][kWarp];
};

// The last CTA of a group has other uses for the batches.
template <int kHeads>
struct SelectMemory {
  BatchMemory<kHeads> batches[kSelectWarps];
  GroupMemory group;
  LaneSums of_warps[kSelectWarps][kHeads];
  uint32_t chosen_of_warps[kSelectWarps];
  uint32_t last;
};

// How a CTA selects: scores of at least `mass`, of a step above `step`, and the first `ties` of its
// part with that step.
struct Rule {
  float mass;
  uint32_t step;
  uint32_t ties;      // that are kept
  uint32_t own_ties;  // that there are
};

__device__ __forceinline__ bool IsTie(const Rule& rule, float score) {
  return StepOf(score) == rule.step;
}
template <bool kRanks>
__device__ __forceinline__ bool IsAbove(const Rule& rule, float score) {
  if (score >= rule.mass) return true;
  return kRanks && rule.step != ~0U && StepOf(score) > rule.step;
}

// One warp.
template <bool kRanks>
__device__ inline Rule RuleOf(const ChoiceGroup& group) {
  const ChoiceThreshold threshold = group.stats->threshold;
  Rule rule{.mass = threshold.mass, .step = ~0U, .ties = 0, .own_ties = 0};
  if (!kRanks || threshold.rank_bin >= kBins) return rule;
  const uint32_t lane = threadIdx.x % kWarp;
  uint32_t before = 0;
  uint32_t own = 0;
  uint32_t total = 0;
#pragma unroll 4
  for (uint32_t part = 0; part < group.select_count; ++part) {
    const uint32_t count = lane < kStepsOfBin ? group.ties[size_t{part} * kStepsOfBin + lane] : 0;
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

// Weights of a block, those of the lane.
template <int kHeads>
struct LaneTokens {
  static constexpr int kOwn = kHeads / 2;
  float4 weights[kOwn];

  __device__ __forceinline__ explicit LaneTokens(const float4 (&from)[kOwn][kWarp]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) weights[i] = from[i][threadIdx.x % kWarp];
  }

  // factors: of the block. Scores are those of all heads.
  __device__ __forceinline__ void Scores(bool largest, const float (&factors)[kHeads],
                                         float (&scores)[4]) const {
    const uint32_t half = threadIdx.x / 16 % 2;
#pragma unroll
    for (int k = 0; k < 4; ++k) scores[k] = 0.0F;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float factor = factors[2 * i + half];
      scores[0] = Score(largest, scores[0], ShareOf(weights[i].x, factor));
      scores[1] = Score(largest, scores[1], ShareOf(weights[i].y, factor));
      scores[2] = Score(largest, scores[2], ShareOf(weights[i].z, factor));
      scores[3] = Score(largest, scores[3], ShareOf(weights[i].w, factor));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      scores[k] = Score(largest, scores[k], __shfl_xor_sync(kAllLanes, scores[k], 16));
    }
  }
};

// The tokens of whose scores `test` holds, as a word, in all lanes.
template <typename Test>
__device__ __forceinline__ uint64_t WordOf(const float (&scores)[4], Test test) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) bits |= test(scores[k]) ? 1U << k : 0;
  bits <<= 4 * (threadIdx.x % 8);
  const bool is_high = (threadIdx.x & 8) != 0;
  const uint32_t low = __reduce_or_sync(kAllLanes, is_high ? 0 : bits);
  const uint32_t high = __reduce_or_sync(kAllLanes, is_high ? bits : 0);
  return low | uint64_t{high} << 32;
}

// The lowest `count` of a word's tokens.
__device__ __forceinline__ uint64_t LowestOf(uint64_t word, uint32_t count) {
  uint64_t kept = 0;
  for (; word != 0 && count > 0; word &= word - 1, --count) kept |= word & (~word + 1);
  return kept;
}

// Adds up kCount values of each lane over 16 lanes; lane l of these ends with the sum of value
// l / (16 / kCount).
template <int kCount>
__device__ __forceinline__ float SumValues(float (&values)[kCount]) {
  int count = kCount;
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
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

// Blocks of a warp. Lanes beyond them have words of zero.
template <int kHeads, bool kRanks>
class Batch {
 public:
  // Reads nothing that the search for thresholds writes.
  __device__ __forceinline__ Batch(const ChoiceGroup& group, BatchMemory<kHeads>* memory)
      : group_(group), memory_(*memory) {
    begin_ = (blockIdx.x * kSelectWarps + threadIdx.x / kWarp) * group.batch_blocks;
    there_ = lane() < group.batch_blocks && block() < group.block_count;
    scanned_ = there_ ? group.to_scan[block()] : 0;
    candidates_ = CandidatesOf(group, block(), scanned_);
    memory_.words[lane()] = {scanned_, candidates_};
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const bool reads = scanned_ != 0 && head < static_cast<int>(group.head_count);
      const size_t page = size_t{static_cast<uint32_t>(head)} * group.block_count + block();
      page_sums_[head] = reads ? group.page_sum[page] : 0.0F;
      memory_.references[head][lane()] = reads ? group.reference[page] : 0;
      memory_.lower[head][lane()] = reads && group.bounded ? group.lower_share[page] : 0.0F;
      memory_.estimate[head][lane()] = reads && group.bounded ? group.estimate_share[page] : 0.0F;
    }
  }

  __device__ __forceinline__ uint32_t block() const { return begin_ + lane(); }
  __device__ __forceinline__ bool there() const { return there_; }
  __device__ __forceinline__ uint64_t kept() const { return kept_; }

  __device__ __forceinline__ void MakeFactors() {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const bool has = head < static_cast<int>(group_.head_count);
      memory_.factors[lane()][head] =
          has ? FactorOf(group_.scales[head], memory_.references[head][lane()], page_sums_[head])
              : 0.0F;
    }
    __syncwarp();
  }

  // Counts the steps of the scores in the bin of the rank.
  __device__ inline void CountTies(uint32_t bin, uint32_t* counts) const {
    ForBlocks(__ballot_sync(kAllLanes, candidates_ != 0),
              [&](uint32_t i, const LaneTokens<kHeads>& tokens) {
                float scores[4];
                tokens.Scores(group_.largest, memory_.factors[i], scores);
                const uint32_t own = memory_.words[i].candidates >> (4 * (threadIdx.x % 16)) & 15;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                  const uint32_t step = StepOf(scores[k]);
                  // Both halves of the warp have the scores.
                  const bool there = (own >> k & 1) != 0 && lane() < 16;
                  if (there && step / kStepsOfBin == bin) {
                    atomicAdd(&counts[step % kStepsOfBin], 1);
                  }
                }
              });
  }

  __device__ __forceinline__ void Select(const Rule& rule) {
    const bool ranks = kRanks && rule.ties > 0 && rule.ties < rule.own_ties;
    if (ranks) RankTies(rule);
    const uint32_t look = PassOver(rule);
    __syncwarp();
    ForBlocks(look, [&](uint32_t i, const LaneTokens<kHeads>& tokens) {
      SelectBlock(rule, ranks, i, tokens);
    });
    __syncwarp();
  }

  // What one head drops, in all lanes. `visible`: what the head sees, begin and end.
  __device__ __forceinline__ LaneSums Dropped(uint32_t head, const uint32_t* visible) const {
    LaneSums sums;
    const int32_t change = memory_.references[head][lane()] - group_.scales[head].reference;
    sums.Add(memory_.factors[lane()][head], change, memory_.lower[head][lane()],
             memory_.estimate[head][lane()]);
    if (there_) {
      const uint64_t rest = WordOfRange(block(), group_.ranges.begin, group_.ranges.end) &
                            ~group_.first[block()] & ~kept_;
      sums.seen =
          static_cast<uint32_t>(__popcll(rest & WordOfRange(block(), visible[0], visible[1])));
    }
    sums.AddLanes();
    return sums;
  }

 private:
  using Memory = BatchMemory<kHeads>;

  __device__ __forceinline__ static uint32_t lane() { return threadIdx.x % kWarp; }

  // Starts copying the weights of the first of these blocks. Lanes read what they have copied.
  __device__ __forceinline__ void Fetch(uint32_t* blocks, uint32_t stage) const {
    if (*blocks != 0) {
      const uint32_t block = begin_ + static_cast<uint32_t>(__ffs(static_cast<int>(*blocks))) - 1;
      const auto* from = reinterpret_cast<const float4*>(group_.weights) + lane() % 16;
#pragma unroll
      for (int i = 0; i < Memory::kOwn; ++i) {
        const uint32_t head = 2 * i + lane() / 16;
        const bool there = head < group_.head_count;
        const size_t page = size_t{there ? head : 0} * group_.block_count + block;
        // Zeros where there is no head.
        __pipeline_memcpy_async(&memory_.weights[stage][i][lane()], from + page * (kTokens / 4),
                                sizeof(float4), there ? 0 : sizeof(float4));
      }
      *blocks &= *blocks - 1;
    }
    __pipeline_commit();
  }

  // Calls visit(i, tokens) for the blocks, with the weights of others on their way.
  template <typename Visit>
  __device__ __forceinline__ void ForBlocks(uint32_t blocks, Visit visit) const {
    uint32_t to_fetch = blocks;
#pragma unroll 1
    for (uint32_t stage = 0; stage + 1 < Memory::kStages; ++stage) Fetch(&to_fetch, stage);
    uint32_t stage = 0;
#pragma unroll 1
    for (; blocks != 0; blocks &= blocks - 1) {
      Fetch(&to_fetch, (stage + Memory::kStages - 1) % Memory::kStages);
      __pipeline_wait_prior(Memory::kStages - 1);
      const LaneTokens<kHeads> tokens(memory_.weights[stage]);
      visit(static_cast<uint32_t>(__ffs(static_cast<int>(blocks))) - 1, tokens);
      stage = (stage + 1) % Memory::kStages;
    }
  }

  // Ties of every block that come before it in the CTA's part. All warps of the CTA call it.
  __device__ inline void RankTies(const Rule& rule) {
    __shared__ uint32_t of_warps[kSelectWarps];
    uint32_t count = 0;
    ForBlocks(__ballot_sync(kAllLanes, candidates_ != 0),
              [&](uint32_t i, const LaneTokens<kHeads>& tokens) {
                float scores[4];
                tokens.Scores(group_.largest, memory_.factors[i], scores);
                const uint64_t ties = memory_.words[i].candidates &
                                      WordOf(scores, [&](float x) { return IsTie(rule, x); });
                if (lane() == i) count = static_cast<uint32_t>(__popcll(ties));
              });
    const uint32_t up_to = SumUpToLane(count);
    if (lane() == kWarp - 1) of_warps[threadIdx.x / kWarp] = up_to;
    __syncthreads();
    ties_before_ = up_to - count;
    for (uint32_t warp = 0; warp < threadIdx.x / kWarp; ++warp) ties_before_ += of_warps[warp];
  }

  // Blocks of which no token can be kept need no look: their sums are known. The others, as lanes.
  __device__ __forceinline__ uint32_t PassOver(const Rule& rule) {
    // A page's power of two is the nearest to its largest weight: that is at most 2^0.5, but for
    // rounding. Weights that are not known have factors that reach anything.
    constexpr float kWeightMax = 1.5F;
    float(&factors)[kHeads] = memory_.factors[lane()];
    float even = 0.0F;
    float odd = 0.0F;
#pragma unroll
    for (int head = 0; head < kHeads; head += 2) {
      even = Score(group_.largest, even, factors[head] * kWeightMax);
      odd = Score(group_.largest, odd, factors[head + 1] * kWeightMax);
    }
    const float reach = Score(group_.largest, even, odd);
    const bool reaches =
        candidates_ != 0 && (IsAbove<kRanks>(rule, reach) || (kRanks && IsTie(rule, reach)));
    const bool looks = scanned_ != 0 && (reaches || scanned_ != ~uint64_t{0});
    const uint32_t look = __ballot_sync(kAllLanes, looks);
    if (looks) return look;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) factors[head] = page_sums_[head];
    return look;
  }

  // Selects a block's tokens, and adds up what it drops in fp32: at most six additions in a row.
  // The sums take the place of the block's factors.
  __device__ __forceinline__ void SelectBlock(const Rule& rule, bool ranks, uint32_t i,
                                              const LaneTokens<kHeads>& tokens) {
    const typename Memory::Words words = memory_.words[i];
    float scores[4];
    tokens.Scores(group_.largest, memory_.factors[i], scores);
    uint64_t kept =
        words.candidates & WordOf(scores, [&](float x) { return IsAbove<kRanks>(rule, x); });
    if (kRanks && rule.ties > 0) {
      const uint64_t ties =
          words.candidates & WordOf(scores, [&](float x) { return IsTie(rule, x); });
      const uint32_t before = __shfl_sync(kAllLanes, ties_before_, i);
      kept |= ranks ? LowestOf(ties, rule.ties > before ? rule.ties - before : 0) : ties;
    }
    if (lane() == i) kept_ = kept;
    const uint32_t dropped = (words.scanned & ~kept) >> (4 * (threadIdx.x % 16)) & 15;
    float sums[Memory::kOwn];
#pragma unroll
    for (int k = 0; k < Memory::kOwn; ++k) {
      const float4 four = tokens.weights[k];
      sums[k] = (((dropped & 1) != 0 ? four.x : 0.0F) + ((dropped & 2) != 0 ? four.y : 0.0F)) +
                (((dropped & 4) != 0 ? four.z : 0.0F) + ((dropped & 8) != 0 ? four.w : 0.0F));
    }
    const float sum = SumValues(sums);
    // All lanes have read what is overwritten.
    __syncwarp();
    constexpr uint32_t kLanesOfHead = 16 / Memory::kOwn;
    const uint32_t head = 2 * (threadIdx.x % 16 / kLanesOfHead) + threadIdx.x / 16 % 2;
    if (threadIdx.x % kLanesOfHead == 0) memory_.factors[i][head] = sum;
  }

  const ChoiceGroup& group_;
  BatchMemory<kHeads>& memory_;
  uint32_t begin_;
  bool there_;
  uint64_t scanned_;
  uint64_t candidates_;
  uint64_t kept_ = 0;
  float page_sums_[kHeads];
  uint32_t ties_before_ = 0;
};

// Counts the steps of the scores in the bin of the rank.
template <int kHeads>
__global__ void __launch_bounds__(kSelectThreads)
    TiesKernel(const __grid_constant__ ChoiceCall call) {
  extern __shared__ uint4 shared[];
  auto& memory = *reinterpret_cast<SelectMemory<kHeads>*>(shared);
  __shared__ uint32_t counts[kStepsOfBin];
  const ChoiceGroup& group = memory.group.Load(call, blockIdx.y);
  if (threadIdx.x < kStepsOfBin) counts[threadIdx.x] = 0;
  __syncthreads();
  if (blockIdx.x >= group.select_count || group.top_k == 0) return;
  Batch<kHeads, true> batch(group, &memory.batches[threadIdx.x / kWarp]);
  batch.MakeFactors();
  batch.CountTies(group.stats->threshold.rank_bin, counts);
  __syncthreads();
  if (threadIdx.x < kStepsOfBin) {
    group.ties[size_t{blockIdx.x} * kStepsOfBin + threadIdx.x] = counts[threadIdx.x];
  }
}

// Sums of the CTA, and how much of it was chosen.
template <int kHeads>
__device__ __forceinline__ void AddPart(const ChoiceGroup& group,
                                        const SelectMemory<kHeads>& memory) {
  if (threadIdx.x < group.head_count) {
    LaneSums sums = memory.of_warps[0][threadIdx.x];
#pragma unroll 1
    for (uint32_t i = 1; i < kSelectWarps; ++i) sums.Add(memory.of_warps[i][threadIdx.x]);
    group.part_sums[size_t{blockIdx.x} * group.head_count + threadIdx.x] = {
        .weight = sums.weight,
        .lower = sums.lower,
        .estimate = sums.estimate,
        .reference = 0,
        .seen = sums.seen};
  }
  if (threadIdx.x != 0) return;
  uint32_t all = 0;
  for (const uint32_t one : memory.chosen_of_warps) all += one;
  if (all != 0) atomicAdd(&group.stats->chosen, all);
}

template <int kHeads, bool kRanks>
__global__ void __launch_bounds__(kSelectThreads, kHeads <= 4 ? kSelectCtas : 3)
    SelectKernel(const __grid_constant__ ChoiceCall call) {
  extern __shared__ uint4 shared[];
  auto& memory = *reinterpret_cast<SelectMemory<kHeads>*>(shared);
  const ChoiceGroup& group = memory.group.Load(call, blockIdx.y);
  __syncthreads();
  if (blockIdx.x >= group.select_count) return;
  const uint32_t warp = threadIdx.x / kWarp;
  Batch<kHeads, kRanks> batch(group, &memory.batches[warp]);
  WaitForEarlier();
  batch.MakeFactors();
  const Rule rule = RuleOf<kRanks>(group);
  batch.Select(rule);
  if (batch.there()) group.chosen[batch.block()] = batch.kept();
  const uint32_t chosen =
      __reduce_add_sync(kAllLanes, static_cast<uint32_t>(__popcll(batch.kept())));
  if (threadIdx.x % kWarp == 0) memory.chosen_of_warps[warp] = chosen;
#pragma unroll 1
  for (uint32_t head = 0; head < group.head_count; ++head) {
    const LaneSums sums = batch.Dropped(head, group.visible + 2 * head);
    if (threadIdx.x % kWarp == 0) memory.of_warps[warp][head] = sums;
  }
  __syncthreads();
  AddPart<kHeads>(group, memory);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) memory.last = atomicAdd(&group.tickets[1], 1) + 1;
  __syncthreads();
  if (memory.last != group.select_count) return;
  __threadfence();
  static_assert(sizeof(memory.batches) >= sizeof(JobsMemory));
  CutChosen(call, group, blockIdx.y, reinterpret_cast<JobsMemory*>(&memory.batches));
}

// In parts of a CTA each. Without ranks it begins while thresholds are looked for.
template <int kHeads>
cudaError_t SelectHeads(const ChoiceCall& call, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(SelectMemory<kHeads>);
  const auto select = call.ranks ? SelectKernel<kHeads, true> : SelectKernel<kHeads, false>;
  const dim3 parts(call.select_count_max, call.group_count);
  cudaError_t code = ReserveShared(select, kBytes);
  if (code == cudaSuccess && call.ranks) {
    code = ReserveShared(TiesKernel<kHeads>, kBytes);
    if (code != cudaSuccess) return code;
    TiesKernel<kHeads><<<parts, kSelectThreads, kBytes, stream>>>(call);
    code = cudaGetLastError();
  }
  if (code != cudaSuccess) return code;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = parts;
  config.blockDim = kSelectThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = call.overlaps && !call.ranks ? 1 : 0;
  return cudaLaunchKernelEx(&config, select, call);
}

}  // namespace

cudaError_t SelectTokens(const ChoiceCall& call, cudaStream_t stream) {
  return call.head_count_max <= 4   ? SelectHeads<4>(call, stream)
         : call.head_count_max <= 8 ? SelectHeads<8>(call, stream)
                                    : SelectHeads<16>(call, stream);
}

}  // namespace kvservice::cuda
