// What anchors of verified sharing remember (attention/sharing.h), of lists that were just chosen:
// the masses of what is read and left, which keys most of the mass comes from, and how keys spread.
// A CTA per group; sums are added up in a fixed order. Estimates: no bound rests on them.

#include "attention/cuda/anchors.h"

#include "attention/cuda/elements-inl.h"
#include "attention/sharing_numbers.h"

namespace kvservice::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / kWarp;
constexpr uint32_t kHeadsMax = 16;
constexpr uint32_t kHeadDimMax = 256;
constexpr uint32_t kLaneChannelsMax = kHeadDimMax / kWarp;
constexpr double kLn2 = 0.6931471805599453;

struct Shared {
  double of_warps[kWarps];
  uint32_t counts[kWarps];
  // Of a head, in units of 2^(reference of its first sums): what is read, and the least weight of a
  // token that may be heavy; and ln of the former.
  double read[kHeadsMax];
  double least[kHeadsMax];
  double log_read[kHeadsMax];
  uint32_t sample[kSpreadPagesMax];
  float mean[kHeadDimMax];
};

// The sum over all threads, in all of them.
__device__ double SumOverCta(double x, Shared* shared) {
  x = SumOverLanes(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared->of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0.0;
  for (const double of_warp : shared->of_warps) sum += of_warp;
  return sum;
}

// Weights of a page in units of 2^reference of the head's first sums.
__device__ __forceinline__ double ScaleOfPage(const AnchorSet& set, uint32_t head, uint32_t block) {
  const size_t page = size_t{head} * set.block_count + block;
  return scalbn(1.0, set.reference[page] - set.first_sums[head].reference);
}
__device__ __forceinline__ const float* WeightsOf(const AnchorSet& set, uint32_t head,
                                                  uint32_t block) {
  return set.weights + (size_t{head} * set.block_count + block) * kTokens;
}

// What the chosen tokens come to by their estimates.
__device__ void SumChosen(const AnchorSet& set, uint32_t group, Shared* shared) {
  for (uint32_t i = 0; i < group; ++i) {
    const uint32_t head = set.first_head + i;
    double sum = 0.0;
    for (uint32_t block = threadIdx.x; block < set.block_count; block += kThreads) {
      uint64_t word = set.chosen[block] & set.to_scan[block];
      if (word == 0) continue;
      const float* weights = WeightsOf(set, head, block);
      double of_block = 0.0;
      for (; word != 0; word &= word - 1) {
        of_block += weights[__ffsll(static_cast<long long>(word)) - 1];
      }
      sum += of_block * ScaleOfPage(set, head, block);
    }
    sum = SumOverCta(sum, shared);
    if (threadIdx.x != 0) continue;
    const HeadSums first = set.first_sums[head];
    set.chosen_sums[i] = {.sum = sum, .reference = first.reference, .key_squares_max = 0.0F};
    shared->read[i] = first.sum + sum;
    shared->least[i] = kMaybeHeavyShare * shared->read[i];
    shared->log_read[i] = log(shared->read[i]) + first.reference * kLn2;
  }
}

// Blocks that were scanned, at even distances (SpreadSample). Returns how many.
__device__ uint32_t SamplePages(const AnchorSet& set, Shared* shared) {
  uint32_t total = 0;
  for (uint32_t block = threadIdx.x; block < set.block_count; block += kThreads) {
    total += set.to_scan[block] != 0 ? 1 : 0;
  }
  total = static_cast<uint32_t>(SumOverCta(total, shared));
  const uint32_t count = total < kSpreadPagesMax ? total : kSpreadPagesMax;
  uint32_t before = 0;  // of earlier turns
  for (uint32_t first = 0; first < set.block_count && count > 0; first += kThreads) {
    const uint32_t block = first + threadIdx.x;
    const bool open = block < set.block_count && set.to_scan[block] != 0;
    const uint32_t ballot = __ballot_sync(kAllLanes, open);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) {
      shared->counts[threadIdx.x / kWarp] = static_cast<uint32_t>(__popc(ballot));
    }
    __syncthreads();
    uint32_t ordinal =
        before + static_cast<uint32_t>(__popc(ballot & ((1U << (threadIdx.x % kWarp)) - 1)));
    for (uint32_t warp = 0; warp < kWarps; ++warp) {
      if (warp < threadIdx.x / kWarp) ordinal += shared->counts[warp];
      before += shared->counts[warp];
    }
    if (!open) continue;
    // The i-th of the sample is page i * total / count.
    const uint32_t i = (ordinal * count + total - 1) / total;
    if (i < count && i * total / count == ordinal) shared->sample[i] = block;
  }
  __syncthreads();
  return count;
}

// Mean and variance of the keys, by their boxes (SpreadOfKeys).
__device__ void Spread(const AnchorCall& call, const AnchorSet& set, uint32_t count,
                       Shared* shared) {
  for (uint32_t c = threadIdx.x; c < call.shape.head_dim; c += kThreads) {
    double mean = 0.0;
    double squares = 0.0;
    double variance = 0.0;
    for (uint32_t i = 0; i < count; ++i) {
      const std::byte* page =
          set.sketches[shared->sample[i]] + size_t{set.kv_head} * call.shape.page_bytes;
      const double lo = reinterpret_cast<const float*>(page + call.shape.lo)[c];
      const double step = __half2float(reinterpret_cast<const __half*>(page + call.shape.step)[c]);
      const double centre = lo + kBoxSteps / 2 * step;
      const double width = kBoxSteps * step;
      mean += centre;
      squares += centre * centre;
      variance += kVarianceOfWidth * width * width;
    }
    if (count > 0) {
      mean /= count;
      const double between = squares / count - mean * mean;
      variance = (between > 0.0 ? between : 0.0) + variance / count;
    }
    shared->mean[c] = static_cast<float>(mean);
    set.variance[c] = static_cast<float>(variance);
  }
}

// Tokens of a block that may be heavy: all that are read in any case, and chosen ones by their
// estimates.
__device__ uint64_t MaybeHeavy(const AnchorSet& set, uint32_t group, const Shared& shared,
                               uint32_t block) {
  if (block >= set.block_count) return 0;
  uint64_t heavy = set.first[block];
  const uint64_t chosen = set.chosen[block] & set.to_scan[block];
  if (chosen == 0) return heavy;
  for (uint32_t i = 0; i < group; ++i) {
    const uint32_t head = set.first_head + i;
    const double scale = ScaleOfPage(set, head, block);
    // Most pages hold nothing of the kind.
    const size_t page = size_t{head} * set.block_count + block;
    if (!(static_cast<double>(set.page_sum[page]) * scale >= shared.least[i])) continue;
    const float* weights = WeightsOf(set, head, block);
    for (uint64_t word = chosen; word != 0; word &= word - 1) {
      const uint32_t token = static_cast<uint32_t>(__ffsll(static_cast<long long>(word))) - 1;
      if (static_cast<double>(weights[token]) * scale >= shared.least[i]) {
        heavy |= word & (~word + 1);
      }
    }
  }
  return heavy;
}

// Adds a token to what its heads' keys are on average; `sums` are the warp's, [group][head_dim].
// One warp, a lane has every 32nd channel.
template <int kType>
__device__ void AddToken(const AnchorCall& call, const AnchorSet& set, uint32_t position,
                         const Shared& shared, float* sums) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t dim = call.shape.head_dim;
  const std::byte* row =
      set.slices[position / kTokens] +
      (size_t{set.kv_head} * kTokens + position % kTokens) * call.shape.row_bytes;
  float key[kLaneChannelsMax];
#pragma unroll
  for (uint32_t j = 0; j < kLaneChannelsMax; ++j) {
    const uint32_t c = lane + j * kWarp;
    key[j] = c < dim ? LoadElement<kType>(row, c) : 0.0F;
  }
  for (uint32_t i = 0; i < call.group_size; ++i) {
    const uint32_t head = set.first_head + i;
    if (position < set.visible[2 * head]) continue;
    const float* q = set.qs + size_t{head} * dim;
    float logit = 0.0F;
#pragma unroll
    for (uint32_t j = 0; j < kLaneChannelsMax; ++j) {
      const uint32_t c = lane + j * kWarp;
      if (c < dim) logit = fmaf(key[j], q[c], logit);
    }
    logit = SumOverLanes(logit);
    if (call.softcap > 0.0F) logit = SoftcapOf(logit, call.softcap);
    const double share = exp(static_cast<double>(logit) - shared.log_read[i]);
    if (!(share >= kHeavyShare)) continue;
#pragma unroll
    for (uint32_t j = 0; j < kLaneChannelsMax; ++j) {
      const uint32_t c = lane + j * kWarp;
      if (c < dim) sums[i * dim + c] += static_cast<float>(share) * (shared.mean[c] - key[j]);
    }
  }
}

template <int kType>
__global__ void __launch_bounds__(kThreads) AnchorKernel(const __grid_constant__ AnchorCall call) {
  extern __shared__ float sums[];  // [warp][group][head_dim]
  __shared__ Shared shared;
  // Where registers need not hold it.
  __shared__ AnchorSet set;
  if (threadIdx.x == 0) set = call.sets[blockIdx.x];
  __syncthreads();
  const uint32_t group = call.group_size;
  SumChosen(set, group, &shared);
  if (set.shift == nullptr) return;
  Spread(call, set, SamplePages(set, &shared), &shared);
  const uint32_t floats = group * call.shape.head_dim;
  for (uint32_t i = threadIdx.x; i < kWarps * floats; i += kThreads) sums[i] = 0.0F;
  __syncthreads();
  float* own = sums + threadIdx.x / kWarp * floats;
  for (uint32_t first = threadIdx.x / kWarp * kWarp; first < set.block_count; first += kThreads) {
    const uint64_t mask = MaybeHeavy(set, group, shared, first + threadIdx.x % kWarp);
    for (uint32_t lanes = __ballot_sync(kAllLanes, mask != 0); lanes != 0; lanes &= lanes - 1) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      for (uint64_t word = __shfl_sync(kAllLanes, mask, lane); word != 0; word &= word - 1) {
        const uint32_t token = static_cast<uint32_t>(__ffsll(static_cast<long long>(word))) - 1;
        AddToken<kType>(call, set, (first + static_cast<uint32_t>(lane)) * kTokens + token, shared,
                        own);
      }
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < floats; i += kThreads) {
    float sum = 0.0F;
    for (uint32_t warp = 0; warp < kWarps; ++warp) sum += sums[warp * floats + i];
    set.shift[i] = sum;
  }
}

template <int kType>
cudaError_t Launch(const AnchorCall& call, cudaStream_t stream) {
  const size_t bytes = size_t{kWarps} * call.group_size * call.shape.head_dim * sizeof(float);
  const cudaError_t code = ReserveShared(AnchorKernel<kType>, bytes);
  if (code != cudaSuccess) return code;
  AnchorKernel<kType><<<call.set_count, kThreads, bytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace

cudaError_t DescribeAnchors(const AnchorCall& call, cudaStream_t stream) {
  if (call.set_count == 0) return cudaSuccess;
  return call.shape.dtype == kFloat32   ? Launch<kFloat32>(call, stream)
         : call.shape.dtype == kFloat16 ? Launch<kFloat16>(call, stream)
                                        : Launch<kBfloat16>(call, stream);
}

}  // namespace kvservice::cuda
