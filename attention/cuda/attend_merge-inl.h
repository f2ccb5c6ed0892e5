// How the warps of a CTA, and then the jobs of a set, are added up: always in the same order, so
// the result does not depend on who comes last.

#ifndef KVSERVICE_ATTENTION_CUDA_ATTEND_MERGE_INL_H_
#define KVSERVICE_ATTENTION_CUDA_ATTEND_MERGE_INL_H_

#include "attention/cuda/elements-inl.h"

namespace kvservice::cuda {

inline constexpr uint32_t kAttendWarps = 4;
inline constexpr uint32_t kAttendThreads = kAttendWarps * kWarp;

// What the warps of a CTA leave for each other.
template <int kHeads>
struct CtaSums {
  double sum[kAttendWarps][kHeads];
  int32_t reference[kAttendWarps][kHeads];
  float key_squares_max[kAttendWarps];
  bool last;
};

template <int kHeads>
__device__ inline HeadSums SumOfWarps(const CtaSums<kHeads>& sums, uint32_t head) {
  HeadSums total{.sum = 0.0, .reference = kReferenceMin, .key_squares_max = 0.0F};
#pragma unroll
  for (uint32_t warp = 0; warp < kAttendWarps; ++warp) {
    total.reference = max(total.reference, sums.reference[warp][head]);
    total.key_squares_max = fmaxf(total.key_squares_max, sums.key_squares_max[warp]);
  }
#pragma unroll
  for (uint32_t warp = 0; warp < kAttendWarps; ++warp) {
    total.sum += sums.sum[warp][head] * PowerOfTwo64(sums.reference[warp][head] - total.reference);
  }
  return total;
}

// 1 / sum, 0 of an empty set.
__device__ __forceinline__ double InverseOf(double sum) { return sum == 0.0 ? 0.0 : 1.0 / sum; }

// Jobs whose parts a thread reads at once, and adds up in fp32 before they join the sum.
inline constexpr uint32_t kMergeQuad = 4;
__device__ __forceinline__ uint32_t WholeQuads(uint32_t count) {
  return (count + kMergeQuad - 1) / kMergeQuad * kMergeQuad;
}

// Sums of one head over all jobs, and what each job's weights must be multiplied with to count in
// the same unit: factors[job * kHeads], zero up to whole quads of jobs. One warp.
template <int kHeads>
__device__ inline HeadSums SumOfJobs(const AttendSet& set, uint32_t head, float* factors) {
  const uint32_t lane = threadIdx.x % kWarp;
  const HeadSums* parts = set.part_sums + head;
  HeadSums own{.sum = 0.0, .reference = kReferenceMin, .key_squares_max = 0.0F};
#pragma unroll 2
  for (uint32_t job = lane; job < set.job_count; job += kWarp) {
    const HeadSums* part = parts + size_t{job} * set.head_count;
    const double sum = __ldcg(&part->sum);
    const int32_t reference = __ldcg(&part->reference);
    own.key_squares_max = fmaxf(own.key_squares_max, __ldcg(&part->key_squares_max));
    const int32_t raised = max(own.reference, reference);
    own.sum =
        own.sum * PowerOfTwo64(own.reference - raised) + sum * PowerOfTwo64(reference - raised);
    own.reference = raised;
    factors[job * kHeads] = __int_as_float(reference);
  }
  HeadSums total = own;
#pragma unroll
  for (int offset = 1; offset < static_cast<int>(kWarp); offset *= 2) {
    total.reference = max(total.reference, __shfl_xor_sync(kAllLanes, total.reference, offset));
    total.key_squares_max =
        fmaxf(total.key_squares_max, __shfl_xor_sync(kAllLanes, total.key_squares_max, offset));
  }
  total.sum = SumOverLanes(own.sum * PowerOfTwo64(own.reference - total.reference));
  for (uint32_t job = lane; job < WholeQuads(set.job_count); job += kWarp) {
    float& factor = factors[job * kHeads];
    factor = job < set.job_count ? PowerOfTwo(__float_as_int(factor) - total.reference) : 0.0F;
  }
  return total;
}

// Parts of consecutive jobs, four channels each. The last job stands in for those beyond it.
template <int kQuads>
struct PartBatch {
  float4 parts[kQuads][kMergeQuad];

  __device__ __forceinline__ void Load(const float* from, size_t stride, uint32_t first,
                                       uint32_t job_count) {
#pragma unroll
    for (uint32_t quad = 0; quad < kQuads; ++quad) {
      if (first + quad * kMergeQuad >= job_count) break;
#pragma unroll
      for (uint32_t i = 0; i < kMergeQuad; ++i) {
        const uint32_t job = min(first + quad * kMergeQuad + i, job_count - 1);
        parts[quad][i] = __ldcg(reinterpret_cast<const float4*>(from + job * stride));
      }
    }
  }

  // factors: of the batch's first job and the thread's head, `step` apart
  __device__ __forceinline__ void AddTo(const float* factors, uint32_t step, uint32_t left,
                                        double (&out)[4]) const {
#pragma unroll
    for (uint32_t quad = 0; quad < kQuads; ++quad) {
      if (quad * kMergeQuad >= left) break;
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (uint32_t i = 0; i < kMergeQuad; ++i) {
        const float factor = factors[(quad * kMergeQuad + i) * step];
        sum.x = fmaf(parts[quad][i].x, factor, sum.x);
        sum.y = fmaf(parts[quad][i].y, factor, sum.y);
        sum.z = fmaf(parts[quad][i].z, factor, sum.z);
        sum.w = fmaf(parts[quad][i].w, factor, sum.w);
      }
      out[0] += static_cast<double>(sum.x);
      out[1] += static_cast<double>(sum.y);
      out[2] += static_cast<double>(sum.z);
      out[3] += static_cast<double>(sum.w);
    }
  }
};

// Adds up the jobs of a set for one tile. One CTA, with shared memory for a factor per job (of
// whole quads) and head; a thread keeps 4 kQuads parts at a time, and the first of them travel
// while the factors are computed.
template <int kHeads, int kQuads>
__device__ inline void MergeJobs(const AttendSet& set, uint32_t head_dim, uint32_t tile,
                                 float* factors) {
  constexpr uint32_t kBatch = kQuads * kMergeQuad;
  const uint32_t first = tile * kHeads;
  const uint32_t heads = min(static_cast<uint32_t>(kHeads), set.head_count - first);
  const uint32_t count = set.read_values ? heads * head_dim : 0;
  const size_t stride = size_t{set.head_count} * head_dim;
  const float* parts = set.parts + size_t{first} * head_dim;
  __shared__ double inverses[kHeads];
  PartBatch<kQuads> batch;
  if (4 * threadIdx.x < count) batch.Load(parts + 4 * threadIdx.x, stride, 0, set.job_count);
  for (uint32_t h = threadIdx.x / kWarp; h < heads; h += kAttendWarps) {
    const HeadSums total = SumOfJobs<kHeads>(set, first + h, factors + h);
    if (threadIdx.x % kWarp != 0) continue;
    inverses[h] = InverseOf(total.sum);
    set.sums[first + h] = total;
  }
  __syncthreads();
  for (uint32_t i = 4 * threadIdx.x; i < count; i += 4 * kAttendThreads) {
    const uint32_t h = i / head_dim;
    double out[4] = {};
    for (uint32_t job = 0; job < set.job_count; job += kBatch) {
      if (job > 0 || i >= 4 * kAttendThreads) batch.Load(parts + i, stride, job, set.job_count);
      batch.AddTo(factors + job * kHeads + h, kHeads, set.job_count - job, out);
    }
    auto* to = reinterpret_cast<double2*>(set.out + size_t{first} * head_dim + i);
    to[0] = make_double2(out[0] * inverses[h], out[1] * inverses[h]);
    to[1] = make_double2(out[2] * inverses[h], out[3] * inverses[h]);
  }
}

// Leaves what the CTA came to: the answer, if this is the only job. `merged` holds `part_count`
// rows of `channels` numbers per head, in shared memory: [part_count][kHeads][channels].
template <int kHeads>
__device__ inline void LeaveResult(const AttendSet& set, uint32_t head_dim, uint32_t job,
                                   uint32_t tile, const CtaSums<kHeads>& sums, const float* merged,
                                   uint32_t part_count, uint32_t channels, float scale) {
  const uint32_t first = tile * kHeads;
  const uint32_t heads = min(static_cast<uint32_t>(kHeads), set.head_count - first);
  const bool alone = set.job_count == 1;
  HeadSums* to = alone ? set.sums : set.part_sums + size_t{job} * set.head_count;
  if (threadIdx.x < heads) to[first + threadIdx.x] = SumOfWarps(sums, threadIdx.x);
  if (!set.read_values) return;
  __syncthreads();
  for (uint32_t i = 4 * threadIdx.x; i < heads * head_dim; i += 4 * kAttendThreads) {
    const uint32_t h = i / head_dim;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (uint32_t part = 0; part < part_count; ++part) {
      const float4 four =
          *reinterpret_cast<const float4*>(merged + (part * kHeads + h) * channels + i % head_dim);
      total.x += four.x, total.y += four.y, total.z += four.z, total.w += four.w;
    }
    total.x *= scale, total.y *= scale, total.z *= scale, total.w *= scale;
    const size_t at = size_t{first} * head_dim + i;
    if (alone) {
      const double inverse = InverseOf(SumOfWarps(sums, h).sum);
      auto* out = reinterpret_cast<double2*>(set.out + at);
      out[0] = make_double2(total.x * inverse, total.y * inverse);
      out[1] = make_double2(total.z * inverse, total.w * inverse);
    } else {
      *reinterpret_cast<float4*>(set.parts + job * size_t{set.head_count} * head_dim + at) = total;
    }
  }
}

// What all threads of the CTA wrote before is seen by whoever draws a later ticket. One thread,
// after a barrier.
__device__ __forceinline__ uint32_t DrawTicket(uint32_t* ticket) {
  uint32_t drawn;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(drawn)
               : "l"(__cvta_generic_to_global(ticket))
               : "memory");
  return drawn;
}

// The job that comes last adds up all of its set; nobody waits. All threads of the CTA call it.
template <int kHeads, int kQuads>
__device__ inline void MergeIfLast(const AttendSet& set, uint32_t head_dim, uint32_t tile,
                                   CtaSums<kHeads>* sums, float* factors) {
  if (set.job_count == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    sums->last = DrawTicket(&set.tickets[tile]) == set.job_count - 1;
    if (sums->last) set.tickets[tile] = 0;
  }
  __syncthreads();
  if (!sums->last) return;
  MergeJobs<kHeads, kQuads>(set, head_dim, tile, factors);
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ATTEND_MERGE_INL_H_
