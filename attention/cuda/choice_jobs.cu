// Sums of what all parts drop, and jobs of attention over what was chosen.

#include "attention/cuda/choice_parts-inl.h"

namespace kvservice::cuda {
namespace {

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
  for (uint32_t head = threadIdx.x / kWarp; head < group.head_count; head += kChoiceWarps) {
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
  for (uint32_t warp = 1; warp < kChoiceWarps; ++warp) total += shared[warp];
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
  __shared__ uint32_t ends[kChoiceWarps];
  uint64_t* words = group.chosen;
  const uint32_t span = (group.block_count + kChoiceThreads - 1) / kChoiceThreads;
  const uint32_t begin = min(threadIdx.x * span, group.block_count);
  const uint32_t end = min(begin + span, group.block_count);
  uint32_t count = 0;
  for (uint32_t word = begin; word < end; ++word) {
    if (everything) words[word] = group.middle[word];
    count += static_cast<uint32_t>(__popcll(words[word]));
  }
  for (uint32_t job = threadIdx.x; job < jobs; job += kChoiceThreads) {
    to[job] = {.set = group_index,
               .index = job,
               .first_word = job == 0 ? 0 : group.block_count,
               .word_count = 0};
  }
  __syncthreads();
  uint32_t before = SumBefore(count, ends);
  // The job of the word before this one.
  uint32_t last = 0;
  if (begin > 0 && begin < end) {
    last = JobOfWord(before - static_cast<uint32_t>(__popcll(words[begin - 1])), tokens, jobs);
  }
  for (uint32_t word = begin; word < end; ++word) {
    const uint32_t own = JobOfWord(before, tokens, jobs);
    for (uint32_t job = last + 1; job <= own; ++job) to[job].first_word = word;
    last = own;
    before += static_cast<uint32_t>(__popcll(words[word]));
  }
  __syncthreads();
  for (uint32_t job = threadIdx.x; job < jobs; job += kChoiceThreads) {
    const uint32_t next = job + 1 < jobs ? to[job + 1].first_word : group.block_count;
    to[job].word_count = next - to[job].first_word;
  }
}

// A CTA per group, and one for the jobs that are left over.
__global__ void __launch_bounds__(kChoiceThreads)
    JobsKernel(const __grid_constant__ ChoiceCall call) {
  __shared__ unsigned long long of_warps[kChoiceWarps];
  const uint32_t own = blockIdx.x;
  unsigned long long tokens = 0;
  for (uint32_t i = threadIdx.x; i < call.group_count; i += kChoiceThreads) {
    tokens += TokensOf(call.groups[i]);
  }
  tokens = SumOfCta(tokens, of_warps);
  const uint32_t places = call.job_count - call.group_count;
  const auto share = static_cast<uint32_t>((tokens + places - 1) / places);
  const uint32_t target = max(share, call.job_tokens_min);
  unsigned long long first = 0;
  for (uint32_t i = threadIdx.x; i < own; i += kChoiceThreads) {
    first += JobsOf(TokensOf(call.groups[i]), target);
  }
  first = SumOfCta(first, of_warps);
  if (own == call.group_count) {
    for (uint32_t job = static_cast<uint32_t>(first) + threadIdx.x; job < call.job_count;
         job += kChoiceThreads) {
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

}  // namespace

cudaError_t CutChosen(const ChoiceCall& call, cudaStream_t stream) {
  JobsKernel<<<call.group_count + 1, kChoiceThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace kvservice::cuda
