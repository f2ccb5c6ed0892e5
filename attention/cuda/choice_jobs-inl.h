// What the last CTA of a group does after a selection: sums of what all parts drop, and jobs of
// attention over what was chosen. Device code only.

#ifndef KVSERVICE_ATTENTION_CUDA_CHOICE_JOBS_INL_H_
#define KVSERVICE_ATTENTION_CUDA_CHOICE_JOBS_INL_H_

#include "attention/cuda/choice_parts-inl.h"

namespace kvservice::cuda {

inline constexpr uint32_t kSelectThreads = kSelectWarps * kWarp;
// Jobs of one group, at most.
inline constexpr uint32_t kGroupJobsMax = 1024;
// Spans of one group, at most.
inline constexpr uint32_t kGroupSpansMax = 2048;

// What the last CTA of a group needs.
struct JobsMemory {
  uint16_t counts[kGroupSpansMax];  // tokens of a span
  uint32_t first_words[kGroupJobsMax];
  uint32_t of_warps[kSelectWarps];
};

// What cannot be told from nothing next to the rest: what is below is rounded up in upper sums, and
// down in lower ones. Far enough from the least double for sums of the least weights.
inline constexpr int32_t kScaleExponentMin = -800;
inline constexpr int32_t kScaleExponentMax = 800;
// As in attention/cpu/weight_sums.cc: what 64 weights of 2^-126 may hide.
inline constexpr double kUnderflowMax = 0x1p-110;

// 2^exponent as a double, for exponents out of range that of the nearest within.
__device__ __forceinline__ double ScaleOf(int32_t exponent) {
  return PowerOfTwo64(max(min(exponent, kScaleExponentMax), kScaleExponentMin));
}

// Sums of what one head drops, in units of a power of two.
struct LaneSums {
  double weight = 0.0;
  double lower = 0.0;
  double estimate = 0.0;
  uint32_t seen = 0;

  // sum: of a block's weights in fp32, as attention/cpu/weight_sums.cc adds them up. change: from
  // the block's power of two to that of these sums.
  __device__ __forceinline__ void Add(float sum, int32_t change, float lower_share, float share) {
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

// The sums of the lane whose number differs in one bit.
__device__ __forceinline__ LaneSums FromLane(const LaneSums& sums, int offset) {
  return {.weight = __shfl_xor_sync(kAllLanes, sums.weight, offset),
          .lower = __shfl_xor_sync(kAllLanes, sums.lower, offset),
          .estimate = __shfl_xor_sync(kAllLanes, sums.estimate, offset),
          .seen = __shfl_xor_sync(kAllLanes, sums.seen, offset)};
}

// True if so much is planned that everything is read.
__device__ __forceinline__ bool ReadsEverything(const ChoiceGroup& group, uint32_t chosen) {
  const ChoiceStats& stats = *group.stats;
  const double visible = static_cast<double>(stats.always) + stats.middle;
  const double planned = static_cast<double>(stats.always) + chosen;
  return !group.reads_middle && planned > static_cast<double>(group.dense_share) * visible;
}

// What all parts of a group drop, a warp per head. unsummed: there is no sum of just that.
__device__ inline void SumParts(const ChoiceGroup& group, bool unsummed) {
  const uint32_t lane = threadIdx.x % kWarp;
  for (uint32_t head = threadIdx.x / kWarp; head < group.head_count; head += kSelectWarps) {
    LaneSums sums;
#pragma unroll 1
    for (uint32_t part = lane; part < group.select_count; part += kWarp) {
      const DroppedSums& one = group.part_sums[size_t{part} * group.head_count + head];
      sums.Add({__ldcg(&one.weight), __ldcg(&one.lower), __ldcg(&one.estimate), __ldcg(&one.seen)});
    }
#pragma unroll 1
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sums.Add(FromLane(sums, offset));
    if (lane != 0) continue;
    if (unsummed) sums = LaneSums();
    group.dropped[head] = {.weight = sums.weight,
                           .lower = sums.lower,
                           .estimate = sums.estimate,
                           .reference = group.scales[head].reference,
                           .seen = sums.seen};
  }
}

// All threads end with the sum.
__device__ inline uint32_t SumOfCta(uint32_t x, uint32_t* shared) {
  x = __reduce_add_sync(kAllLanes, x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  uint32_t total = shared[0];
  for (uint32_t warp = 1; warp < kSelectWarps; ++warp) total += shared[warp];
  return total;
}

// Tokens of a span of a group's set. If everything is read, that is what is chosen.
__device__ __forceinline__ uint32_t CountSpan(const ChoiceGroup& group, bool everything,
                                              uint32_t span) {
  if (!everything) return __ldcg(&group.span_counts[span]);
  uint32_t count = 0;
  const uint32_t end = min((span + 1) * group.span_blocks, group.block_count);
#pragma unroll 1
  for (uint32_t word = span * group.span_blocks; word < end; ++word) {
    const uint64_t set = CandidatesOf(group, word, group.to_scan[word]);
    group.chosen[word] = set;
    count += static_cast<uint32_t>(__popcll(set));
  }
  return count;
}

// First words of the jobs of a group's set. A warp takes neighbouring spans.
__device__ inline void CutSpans(const ChoiceGroup& group, bool everything, uint32_t tokens,
                                uint32_t jobs, JobsMemory* memory) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
  const uint32_t count = (group.block_count + group.span_blocks - 1) / group.span_blocks;
  const uint32_t of_warp = (count + kSelectThreads - 1) / kSelectThreads * kWarp;
  const uint32_t begin = min(warp * of_warp, count);
  const uint32_t end = min(begin + of_warp, count);
  uint32_t sum = 0;
#pragma unroll 2
  for (uint32_t span = begin + lane; span < end; span += kWarp) {
    const uint32_t own = CountSpan(group, everything, span);
    memory->counts[span] = static_cast<uint16_t>(own);
    sum += own;
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  if (lane == 0) memory->of_warps[warp] = sum;
  for (uint32_t job = threadIdx.x; job < jobs; job += kSelectThreads) {
    memory->first_words[job] = job == 0 ? 0 : group.block_count;
  }
  __syncthreads();
  uint32_t before = 0;
  for (uint32_t other = 0; other < warp; ++other) before += memory->of_warps[other];
  // The job of the span before this warp's.
  uint32_t last = 0;
  if (begin > 0 && begin < end) last = JobOfWord(before - memory->counts[begin - 1], tokens, jobs);
#pragma unroll 1
  for (uint32_t first = begin; first < end; first += kWarp) {
    const uint32_t span = first + lane;
    const uint32_t own = span < end ? memory->counts[span] : 0;
    const uint32_t up_to = SumUpToLane(own);
    const uint32_t job = JobOfWord(before + up_to - own, tokens, jobs);
    const uint32_t left = __shfl_up_sync(kAllLanes, job, 1);
    for (uint32_t i = (lane == 0 ? last : left) + 1; span < end && i <= job; ++i) {
      memory->first_words[i] = span * group.span_blocks;
    }
    last = __shfl_sync(kAllLanes, job, kWarp - 1);
    before += __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
  __syncthreads();
}

// Sums and jobs of a group, by its last CTA. How many jobs there are follows from what thresholds
// let expect, which all groups know of each other; spans are shared out among them as they are.
__device__ inline void CutChosen(const ChoiceCall& call, const ChoiceGroup& group, uint32_t own,
                                 JobsMemory* memory) {
  uint32_t* of_warps = memory->of_warps;
  const uint32_t* first_words = memory->first_words;
  const uint32_t chosen = __ldcg(&group.stats->chosen);
  const bool everything = ReadsEverything(group, chosen);
  // Nothing is left then but what is hidden, and sums are of what was not chosen, too. By the count
  // as other CTAs left it, not as this one's cache may have it: the host goes by the same.
  SumParts(group, everything && chosen < group.stats->middle);
  uint32_t expected = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < call.group_count; i += kSelectThreads) {
    expected += call.stats[i].expected;
  }
  expected = SumOfCta(expected, of_warps);
  const uint32_t places = call.job_count - call.group_count;
  const uint32_t target = max((expected + places - 1) / places, call.job_tokens_min);
  const auto jobs_of = [&](uint32_t i) {
    return min(JobsOf(call.stats[i].expected, target), kGroupJobsMax);
  };
  uint32_t before = 0;
  uint32_t all = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < call.group_count; i += kSelectThreads) {
    const uint32_t jobs = jobs_of(i);
    all += jobs;
    before += i < own ? jobs : 0;
  }
  before = SumOfCta(before, of_warps);
  if (own == 0) {
    all = SumOfCta(all, of_warps);
    for (uint32_t job = all + threadIdx.x; job < call.job_count; job += kSelectThreads) {
      call.jobs[job] = {.set = call.group_count, .index = 0, .first_word = 0, .word_count = 0};
    }
  }
  const uint32_t jobs = jobs_of(own);
  const uint32_t tokens = group.reads_middle ? 0 : everything ? group.stats->middle : chosen;
  __syncthreads();
  CutSpans(group, everything, tokens, jobs, memory);
#pragma unroll 1
  for (uint32_t job = threadIdx.x; job < jobs; job += kSelectThreads) {
    const uint32_t next = job + 1 < jobs ? first_words[job + 1] : group.block_count;
    call.jobs[before + job] = {.set = own,
                               .index = job,
                               .first_word = first_words[job],
                               .word_count = next - first_words[job]};
  }
  if (threadIdx.x != 0) return;
  group.stats->everything = everything || group.reads_middle ? 1 : 0;
  group.stats->job_tokens_max = tokens / jobs + 1 + group.span_blocks * kTokens;
  AttendSet& set = call.sets[own];
  set.job_count = jobs;
  set.parts = call.parts + size_t{before} * call.head_count_max * call.shape.head_dim;
  set.part_sums = call.part_sums + size_t{before} * call.head_count_max;
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_CHOICE_JOBS_INL_H_
