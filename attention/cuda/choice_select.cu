// Selects tokens by the thresholds of their group, and adds up what is dropped. A warp takes a
// batch of neighbouring blocks: first a lane each, to see which need a look at their weights, then
// two blocks at a time. The last CTA of a group makes its jobs (choice_jobs-inl.h).

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

// What lanes know of their blocks, and then all of two blocks; weights of blocks on their way. Lane
// 16 b + j has tokens 4 j .. 4 j + 3 of block b of the two.
template <int kHeads>
struct BatchMemory {
  static constexpr uint32_t kStages = 2;
  struct Words {
    uint64_t scanned;
    uint64_t candidates;  // then what is kept
  };
  float4 weights[kStages][kHeads][kWarp];
  Words words[kWarp];
  float4 factors[kWarp][kHeads / 4];  // then sums of what is dropped
  int32_t references[kHeads][kWarp];
  float lower[kHeads][kWarp];
  float estimate[kHeads][kWarp];

  __device__ __forceinline__ float& Factor(uint32_t i, uint32_t head) {
    return reinterpret_cast<float*>(factors[i])[head];
  }
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

// Weights of the lane's tokens.
template <int kHeads, bool kRanks>
struct LaneTokens {
  float4 weights[kHeads];

  __device__ __forceinline__ explicit LaneTokens(const float4 (&from)[kHeads][kWarp]) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) weights[head] = from[head][threadIdx.x % kWarp];
  }

  // factors: of the block. Where a weight is not a number nothing of it is: see ScanPage.
  __device__ __forceinline__ void Scores(const ChoiceGroup& group,
                                         const float4 (&factors)[kHeads / 4],
                                         float (&scores)[4]) const {
    // Without ranks a choice is by mass.
    const bool largest = !kRanks || group.largest;
    float odd[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) scores[k] = odd[k] = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeads / 4; ++i) {
      const float4 four = factors[i];
      Join(largest, weights[4 * i], four.x, scores);
      Join(largest, weights[4 * i + 1], four.y, odd);
      Join(largest, weights[4 * i + 2], four.z, scores);
      Join(largest, weights[4 * i + 3], four.w, odd);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) scores[k] = Score(largest, scores[k], odd[k]);
  }

 private:
  __device__ __forceinline__ static void Join(bool largest, const float4& of_head, float factor,
                                              float (&scores)[4]) {
    scores[0] = Score(largest, scores[0], of_head.x * factor);
    scores[1] = Score(largest, scores[1], of_head.y * factor);
    scores[2] = Score(largest, scores[2], of_head.z * factor);
    scores[3] = Score(largest, scores[3], of_head.w * factor);
  }
};

// The lane's tokens of whose scores `test` holds, as bits.
template <typename Test>
__device__ __forceinline__ uint32_t BitsOfScores(const float (&scores)[4], Test test) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) bits |= test(scores[k]) ? 1U << k : 0;
  return bits;
}
// The lane's bits of a word.
__device__ __forceinline__ uint32_t BitsOfWord(uint64_t word) {
  return static_cast<uint32_t>(word >> (4 * (threadIdx.x % 16))) & 15U;
}

// The lowest `count` of a few bits.
__device__ __forceinline__ uint32_t LowestOf(uint32_t bits, uint32_t count) {
  uint32_t kept = 0;
  for (; bits != 0 && count > 0; bits &= bits - 1, --count) kept |= bits & (~bits + 1);
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
  using Memory = BatchMemory<kHeads>;
  using Tokens = LaneTokens<kHeads, kRanks>;

  // Reads nothing that the search for thresholds writes.
  __device__ __forceinline__ Batch(const ChoiceGroup& group, Memory* memory)
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
    // Where there is no head, weights are zero and stay so.
#pragma unroll 1
    for (uint32_t head = group.head_count; head < kHeads; ++head) {
      for (auto& stage : memory_.weights) stage[head][lane()] = make_float4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ uint32_t block() const { return begin_ + lane(); }
  __device__ __forceinline__ bool there() const { return there_; }
  __device__ __forceinline__ uint64_t kept() const { return memory_.words[lane()].candidates; }

  __device__ __forceinline__ void MakeFactors() {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const bool has = head < static_cast<int>(group_.head_count);
      memory_.Factor(lane(), head) =
          has ? FactorOf(group_.scales[head], memory_.references[head][lane()], page_sums_[head])
              : 0.0F;
    }
    __syncwarp();
  }

  // Counts the steps of the scores in the bin of the rank.
  __device__ inline void CountTies(uint32_t bin, uint32_t* counts) const {
    ForBlocks(__ballot_sync(kAllLanes, candidates_ != 0),
              [&](uint32_t i, bool there, const Tokens& tokens) {
                float scores[4];
                tokens.Scores(group_, memory_.factors[i], scores);
                const uint32_t own = there ? BitsOfWord(memory_.words[i].candidates) : 0;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                  const uint32_t step = StepOf(scores[k]);
                  if ((own >> k & 1) != 0 && step / kStepsOfBin == bin) {
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
    ForBlocks(look, [&](uint32_t i, bool there, const Tokens& tokens) {
      SelectBlock(rule, ranks, i, there, tokens);
    });
    __syncwarp();
  }

  // What heads first .. first + 3 drop: lane 8 h has that of head first + h. Weights are needed no
  // more, so their memory serves to bring lanes together.
  __device__ __forceinline__ LaneSums Dropped(uint32_t first) const {
    constexpr uint32_t kFour = 4;
    static_assert(sizeof(memory_.weights) >= kFour * kWarp * sizeof(LaneSums));
    auto* of_lanes = reinterpret_cast<LaneSums*>(memory_.weights);
    const uint64_t rest = there_ ? WordOfRange(block(), group_.ranges.begin, group_.ranges.end) &
                                       ~group_.first[block()] & ~kept()
                                 : 0;
#pragma unroll 1
    for (uint32_t k = 0; k < kFour; ++k) {
      const uint32_t head = first + k;
      LaneSums sums;
      if (head < group_.head_count) {
        const int32_t change = memory_.references[head][lane()] - group_.scales[head].reference;
        sums.Add(memory_.Factor(lane(), head), change, memory_.lower[head][lane()],
                 memory_.estimate[head][lane()]);
        const uint64_t seen =
            WordOfRange(block(), group_.visible[2 * head], group_.visible[2 * head + 1]);
        sums.seen = static_cast<uint32_t>(__popcll(rest & seen));
      }
      of_lanes[k * kWarp + lane()] = sums;
    }
    __syncwarp();
    const LaneSums* of_head = of_lanes + lane() / 8 * kWarp + lane() % 8;
    LaneSums sums = of_head[0];
#pragma unroll 1
    for (uint32_t i = 8; i < kWarp; i += 8) sums.Add(of_head[i]);
#pragma unroll 1
    for (int offset = 4; offset > 0; offset /= 2) sums.Add(FromLane(sums, offset));
    __syncwarp();
    return sums;
  }

 private:
  __device__ __forceinline__ static uint32_t lane() { return threadIdx.x % kWarp; }

  // Of two blocks the lane's: the first of `blocks` or the second, kWarp or more if there is none.
  __device__ __forceinline__ static uint32_t OwnOf(uint32_t blocks) {
    const uint32_t own = lane() < 16 ? blocks : blocks & (blocks - 1);
    return static_cast<uint32_t>(__ffs(static_cast<int>(own))) - 1;
  }
  __device__ __forceinline__ static uint32_t WithoutTwo(uint32_t blocks) {
    blocks &= blocks - 1;
    return blocks & (blocks - 1);
  }

  // Starts copying the weights of the first two of these blocks. Lanes read what they have copied.
  __device__ __forceinline__ void Fetch(uint32_t blocks, uint32_t stage) const {
    const uint32_t own = OwnOf(blocks);
    if (own < kWarp) {
      constexpr uint32_t kQuads = kTokens / 4;
      const float4* from = reinterpret_cast<const float4*>(group_.weights) +
                           size_t{begin_ + own} * kQuads + lane() % 16;
      const size_t stride = size_t{group_.block_count} * kQuads;
#pragma unroll
      for (uint32_t head = 0; head < kHeads; ++head, from += stride) {
        if (head >= group_.head_count) break;
        __pipeline_memcpy_async(&memory_.weights[stage][head][lane()], from, sizeof(float4));
      }
    }
    __pipeline_commit();
  }

  // Calls visit(i, there, tokens) for the lane's block of two, with the weights of the next two on
  // their way. Where there is none of two, i is any.
  template <typename Visit>
  __device__ __forceinline__ void ForBlocks(uint32_t blocks, Visit visit) const {
    static_assert(Memory::kStages == 2);
    uint32_t to_fetch = blocks;
#pragma unroll 1
    for (uint32_t turn = 0; blocks != 0; ++turn) {
      Fetch(to_fetch, turn % 2);
      to_fetch = WithoutTwo(to_fetch);
      if (turn == 0) continue;
      __pipeline_wait_prior(1);
      const uint32_t own = OwnOf(blocks);
      blocks = WithoutTwo(blocks);
      const Tokens tokens(memory_.weights[(turn - 1) % 2]);
      visit(own % kWarp, own < kWarp, tokens);
    }
  }

  // Ties of every block that come before it in the CTA's part. All warps of the CTA call it.
  __device__ inline void RankTies(const Rule& rule) {
    __shared__ uint32_t of_warps[kSelectWarps];
    uint32_t count = 0;
    ForBlocks(__ballot_sync(kAllLanes, candidates_ != 0),
              [&](uint32_t i, bool there, const Tokens& tokens) {
                float scores[4];
                tokens.Scores(group_, memory_.factors[i], scores);
                uint32_t ties = BitsOfWord(memory_.words[i].candidates) &
                                BitsOfScores(scores, [&](float x) { return IsTie(rule, x); });
                ties = there ? static_cast<uint32_t>(__popc(ties)) : 0;
#pragma unroll
                for (int offset = 8; offset > 0; offset /= 2) {
                  ties += __shfl_xor_sync(kAllLanes, ties, offset);
                }
#pragma unroll
                for (uint32_t from = 0; from < kWarp; from += 16) {
                  const uint32_t of_block = __shfl_sync(kAllLanes, i, from);
                  const uint32_t counted = __shfl_sync(kAllLanes, ties, from);
                  const bool has = (__ballot_sync(kAllLanes, there) >> from & 1) != 0;
                  if (has && lane() == of_block) count = counted;
                }
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
    const bool largest = !kRanks || group_.largest;
    float even = 0.0F;
    float odd = 0.0F;
#pragma unroll
    for (int head = 0; head < kHeads; head += 2) {
      even = Score(largest, even, memory_.Factor(lane(), head) * kWeightMax);
      odd = Score(largest, odd, memory_.Factor(lane(), head + 1) * kWeightMax);
    }
    const float reach = Score(largest, even, odd);
    const bool reaches =
        candidates_ != 0 && (IsAbove<kRanks>(rule, reach) || (kRanks && IsTie(rule, reach)));
    const bool looks = scanned_ != 0 && (reaches || scanned_ != ~uint64_t{0});
    const uint32_t look = __ballot_sync(kAllLanes, looks);
    if (looks) return look;
    memory_.words[lane()].candidates = 0;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) memory_.Factor(lane(), head) = page_sums_[head];
    return look;
  }

  // The first of the ties that the rule still keeps, of the block's tokens in order.
  __device__ __forceinline__ uint32_t FirstTies(const Rule& rule, uint32_t i, uint32_t ties) const {
    const auto own = static_cast<uint32_t>(__popc(ties));
    uint32_t up_to = own;
#pragma unroll
    for (uint32_t offset = 1; offset < 16; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, up_to, offset);
      if (lane() % 16 >= offset) up_to += other;
    }
    const uint32_t before = __shfl_sync(kAllLanes, ties_before_, i) + up_to - own;
    return LowestOf(ties, rule.ties > before ? rule.ties - before : 0);
  }

  // Selects a block's tokens, and adds up what it drops in fp32: at most six additions in a row.
  // The sums take the place of the block's factors, the kept tokens that of its candidates.
  __device__ __forceinline__ void SelectBlock(const Rule& rule, bool ranks, uint32_t i, bool there,
                                              const Tokens& tokens) {
    const uint32_t candidates = BitsOfWord(memory_.words[i].candidates);
    const uint32_t scanned = BitsOfWord(memory_.words[i].scanned);
    float scores[4];
    tokens.Scores(group_, memory_.factors[i], scores);
    uint32_t kept =
        candidates & BitsOfScores(scores, [&](float x) { return IsAbove<kRanks>(rule, x); });
    if (kRanks && rule.ties > 0) {
      const uint32_t ties =
          candidates & BitsOfScores(scores, [&](float x) { return IsTie(rule, x); });
      kept |= ranks ? FirstTies(rule, i, ties) : ties;
    }
    const uint32_t dropped = scanned & ~kept;
    float sums[kHeads];
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      const float4 four = tokens.weights[head];
      sums[head] = (((dropped & 1) != 0 ? four.x : 0.0F) + ((dropped & 2) != 0 ? four.y : 0.0F)) +
                   (((dropped & 4) != 0 ? four.z : 0.0F) + ((dropped & 8) != 0 ? four.w : 0.0F));
    }
    const float sum = SumValues(sums);
    const uint32_t byte = kept | __shfl_xor_sync(kAllLanes, kept, 1) << 4;
    // All lanes have read what is overwritten.
    __syncwarp();
    if (!there) return;
    constexpr uint32_t kLanesOfHead = 16 / kHeads;
    const uint32_t j = lane() % 16;
    if (j % kLanesOfHead == 0) memory_.Factor(i, j / kLanesOfHead) = sum;
    auto* bytes = reinterpret_cast<uint8_t*>(&memory_.words[i].candidates);
    if (j % 2 == 0) bytes[j / 2] = static_cast<uint8_t>(byte);
  }

  const ChoiceGroup& group_;
  Memory& memory_;
  uint32_t begin_;
  bool there_;
  uint64_t scanned_;
  uint64_t candidates_;
  float page_sums_[kHeads];
  uint32_t ties_before_ = 0;
};

// Counts the steps of the scores in the bin of the rank.
template <int kHeads>
__global__ void __launch_bounds__(kSelectThreads, 3)
    TiesKernel(const __grid_constant__ ChoiceCall call) {
  extern __shared__ uint4 shared[];
  auto& memory = *reinterpret_cast<SelectMemory<kHeads>*>(shared);
  __shared__ uint32_t counts[kStepsOfBin];
  const ChoiceGroup& group = memory.group.Load(call.groups, blockIdx.y);
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
  const ChoiceGroup& group = memory.group.Load(call.groups, blockIdx.y);
  __syncthreads();
  if (blockIdx.x >= group.select_count) return;
  const uint32_t warp = threadIdx.x / kWarp;
  Batch<kHeads, kRanks> batch(group, &memory.batches[warp]);
  WaitForEarlier();
  batch.MakeFactors();
  const Rule rule = RuleOf<kRanks>(group);
  batch.Select(rule);
  if (batch.there()) group.chosen[batch.block()] = batch.kept();
  auto chosen = static_cast<uint32_t>(__popcll(batch.kept()));
#pragma unroll 1
  for (uint32_t blocks = 1; blocks < group.span_blocks; blocks *= 2) {
    chosen += __shfl_xor_sync(kAllLanes, chosen, blocks);
  }
  const bool first_of_span = threadIdx.x % group.span_blocks == 0;
  if (batch.there() && first_of_span) {
    group.span_counts[batch.block() / group.span_blocks] = chosen;
  }
  chosen = __reduce_add_sync(kAllLanes, first_of_span ? chosen : 0);
  if (threadIdx.x % kWarp == 0) memory.chosen_of_warps[warp] = chosen;
#pragma unroll 1
  for (uint32_t first = 0; first < group.head_count; first += 4) {
    const LaneSums sums = batch.Dropped(first);
    const uint32_t head = first + threadIdx.x % kWarp / 8;
    if (threadIdx.x % 8 == 0) memory.of_warps[warp][head] = sums;
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
