// The queries of a group as scans and attention want them, from what the caller sent: the formulas
// of attention/scan_terms.h (MakeQueryTerms) in double, as attention/cpu/scan_queries.cc has them.
// The host would spend a third of a call on it before anything could start. Device code only.

#ifndef KVSERVICE_ATTENTION_CUDA_CHOICE_QUERIES_INL_H_
#define KVSERVICE_ATTENTION_CUDA_CHOICE_QUERIES_INL_H_

#include "attention/cuda/choice.h"
#include "attention/cuda/elements-inl.h"

namespace kvservice::cuda {

inline constexpr uint32_t kQueryDimMax = 256;
inline constexpr uint32_t kQueryDirectionsMax = 4;

// Of a CTA; what comes from the host is waited for once.
struct QueryMemory {
  uint4 set[sizeof(QuerySet) / sizeof(uint4)];
  float q[kChoiceHeadsMax * kQueryDimMax];
  float metric[kQueryDimMax];
  float weights[kQueryDirectionsMax * kQueryDimMax];
  double weight_norm[kQueryDirectionsMax];  // ||W_j||
};

__device__ __forceinline__ void LoadFloats(const float* from, uint32_t count, uint32_t threads,
                                           float* to) {
  for (uint32_t i = threadIdx.x; i < count / 4; i += threads) {
    reinterpret_cast<float4*>(to)[i] = reinterpret_cast<const float4*>(from)[i];
  }
}

// One warp: what a scan wants of one head.
__device__ inline void PrepareHead(const QuerySet& set, const CacheShape& shape, float scale,
                                   const QueryMemory& memory, uint32_t head) {
  // What double arithmetic may be off by, many times over.
  constexpr double kUp = 1.0 + 0x1p-40;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t dim = shape.head_dim;
  const float* q = memory.q + head * dim;
  const auto scaled = [&](uint32_t c) {
    return static_cast<double>(scale) * static_cast<double>(q[c]);
  };
  double squares = 0;
  double used = 0;
  double qw[kQueryDirectionsMax] = {};
  for (uint32_t c = lane; c < dim; c += kWarp) {
    const double x = scaled(c);
    const double inverse = 1.0 / static_cast<double>(memory.metric[c]);
    squares = fma(x, x, squares);
    used += x != 0.0 ? 1.0 : 0.0;
    const double turned = x * inverse * inverse;
#pragma unroll
    for (uint32_t j = 0; j < kQueryDirectionsMax; ++j) {
      if (j < shape.directions) {
        qw[j] = fma(static_cast<double>(memory.weights[j * dim + c]), turned, qw[j]);
      }
    }
  }
  const double norm = sqrt(SumOverLanes(squares));
  used = SumOverLanes(used);
  double weight = norm;
#pragma unroll
  for (uint32_t j = 0; j < kQueryDirectionsMax; ++j) {
    if (j >= shape.directions) continue;
    qw[j] = SumOverLanes(qw[j]);
    weight += fabs(qw[j]) * memory.weight_norm[j];
    if (lane == 0) set.qw[j * set.head_count + head] = static_cast<float>(qw[j]);
  }
  if (set.x == nullptr) return;
  squares = 0;
  for (uint32_t c = lane; c < dim; c += kWarp) {
    double p = scaled(c);
#pragma unroll
    for (uint32_t j = 0; j < kQueryDirectionsMax; ++j) {
      if (j < shape.directions) {
        p = fma(-qw[j], static_cast<double>(memory.weights[j * dim + c]), p);
      }
    }
    const double x = fabs(p) / static_cast<double>(memory.metric[c]);
    squares = fma(x, x, squares);
    set.x[head * dim + c] = static_cast<float>(fma(x, 1.0 + 0x1p-22, 0x1p-126));
  }
  squares = SumOverLanes(squares);
  if (lane != 0) return;
  // Covers qs rounded to fp32 (2^-24, or 2^-150 below the normal range) and the sum.
  set.norm[4 * head] = norm * (1.0 + 0x1p-23) + 0x1p-120;
  set.norm[4 * head + 1] = weight * kUp;
  set.norm[4 * head + 2] = used;
  set.norm[4 * head + 3] = static_cast<double>(static_cast<float>(sqrt(squares)));
}

// A CTA of at least kChoiceHeadsMax warps.
__device__ inline void PrepareQueries(const QuerySet* sets, uint32_t index, const CacheShape& shape,
                                      float scale, QueryMemory* memory) {
  const uint32_t threads = blockDim.x;
  constexpr uint32_t kWords = sizeof(QuerySet) / sizeof(uint4);
  const auto* from = reinterpret_cast<const uint4*>(sets + index);
  if (threadIdx.x < kWords) memory->set[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  const QuerySet& set = *reinterpret_cast<const QuerySet*>(memory->set);
  const uint32_t dim = shape.head_dim;
  const bool scans = set.qw != nullptr;
  LoadFloats(set.q, set.head_count * dim, threads, memory->q);
  if (scans) {
    LoadFloats(set.table, dim, threads, memory->metric);
    LoadFloats(set.table + dim, shape.directions * dim, threads, memory->weights);
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < set.head_count * dim; i += threads) {
    set.qs[i] = __fmul_rn(scale, memory->q[i]);
  }
  if (!scans) return;
  const uint32_t warp = threadIdx.x / kWarp;
  if (warp < shape.directions) {
    double squares = 0;
    for (uint32_t c = threadIdx.x % kWarp; c < dim; c += kWarp) {
      const auto w = static_cast<double>(memory->weights[warp * dim + c]);
      squares = fma(w, w, squares);
    }
    squares = SumOverLanes(squares);
    if (threadIdx.x % kWarp == 0) memory->weight_norm[warp] = sqrt(squares);
  }
  __syncthreads();
  if (warp < set.head_count) PrepareHead(set, shape, scale, *memory, warp);
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_CHOICE_QUERIES_INL_H_
