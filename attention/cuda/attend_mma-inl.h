// Attention on tensor cores, for 16-bit caches and rows whose masses need no bound: what bounds its
// roundings is not stated. The rest is as in attend-inl.h.
//
// Keys are the rows of the product (16 tokens), queries its columns. A query is the sum of three
// numbers of the cache's type, scaled by a power of two, so that products with keys are exact and
// nothing of it is lost; a weight is the sum of two. Columns 2 h and 2 h + 1 are two parts of head
// h: thread 4 r + q ends up with the logits of tokens r and r + 8 for head q of a tile, and later
// with the sums of values of channels r and r + 8 of every 16 for the same head.

#ifndef KVSERVICE_ATTENTION_CUDA_ATTEND_MMA_INL_H_
#define KVSERVICE_ATTENTION_CUDA_ATTEND_MMA_INL_H_

#include <cuda_bf16.h>

#include "attention/cuda/attend-inl.h"

namespace kvservice::cuda {

inline constexpr uint32_t kMmaTokens = 16;
inline constexpr uint32_t kMmaHeads = 4;  // of a tile
inline constexpr int kMmaStages = 2;

// Sizes of a kernel for rows of kSteps * 16 channels and kTiles tiles of heads.
template <int kSteps, int kTiles>
struct MmaSizes {
  static constexpr int kHeads = kTiles * static_cast<int>(kMmaHeads);
  static constexpr int kDim = 16 * kSteps;
  // Padded, so that eight rows lie in different banks.
  static constexpr int kVectorBytes = 2 * kDim + 16;
  static constexpr int kStageBytes = 2 * static_cast<int>(kMmaTokens) * kVectorBytes;  // K, then V
  static constexpr int kQueueBytes = static_cast<int>(kAttendWarps) * kMmaStages * kStageBytes;
  static constexpr int kMergeBytes =
      static_cast<int>(kAttendWarps) * kHeads * kDim * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kQueueBytes > kMergeBytes ? kQueueBytes : kMergeBytes;
};

__device__ __forceinline__ void LoadMatrices(const std::byte* at, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at)))
               : "memory");
}
__device__ __forceinline__ void LoadTransposed(const std::byte* at, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at)))
               : "memory");
}

template <int kType>
__device__ __forceinline__ void MultiplyAdd(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                            float (&sum)[4]) {
  if constexpr (kType == kBfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The number of the cache's type nearest to x, as bits and as a float.
template <int kType>
__device__ __forceinline__ uint32_t Rounded(float x, float* back) {
  if constexpr (kType == kBfloat16) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(x);
    *back = __bfloat162float(rounded);
    return __bfloat16_as_ushort(rounded);
  } else {
    const __half rounded = __float2half_rn(x);
    *back = __half2float(rounded);
    return __half_as_ushort(rounded);
  }
}

// Part `part` of x as a sum of numbers of the cache's type.
template <int kType>
__device__ __forceinline__ uint32_t PartOf(float x, uint32_t part) {
  float back;
  uint32_t bits = Rounded<kType>(x, &back);
  for (uint32_t i = 0; i < part; ++i) {
    x -= back;
    bits = Rounded<kType>(x, &back);
  }
  return bits;
}

// Queries are scaled so that their largest channel is near 2^12: half precision then holds all of
// them, and their products with keys stay far from overflow.
inline constexpr int32_t kQueryExponent = 12;

// 2^exponent within the normal range.
__device__ __forceinline__ float FloatPower(int32_t exponent) {
  return __int_as_float((exponent + kFloatExponentBias) << 23);
}

// The power of two that a head's queries are multiplied with. One warp.
__device__ inline int32_t QueryShift(const float* qs, uint32_t head_dim) {
  float largest = 0.0F;
  for (uint32_t c = threadIdx.x % kWarp; c < head_dim; c += kWarp) {
    largest = fmaxf(largest, fabsf(qs[c]));
  }
#pragma unroll
  for (int offset = 1; offset < static_cast<int>(kWarp); offset *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  }
  const int32_t exponent = (__float_as_int(largest) >> 23) - kFloatExponentBias;
  constexpr int32_t kExponentMin = -100;  // Less is as good as nothing.
  return kQueryExponent - max(exponent, kExponentMin);
}

template <int kType, int kSteps, int kTiles>
class MmaWarp {
 public:
  using Sizes = MmaSizes<kSteps, kTiles>;
  // Weights of half precision need the range; those of bfloat16 have that of floats.
  static constexpr float kWeightScale = kType == kFloat16 ? 0x1p+15F : 1.0F;

  __device__ __forceinline__ MmaWarp(const AttendCall& call, const AttendSet& set, uint32_t tile,
                                     const int32_t* shifts, const TokenList& list, std::byte* queue)
      : call_(call), set_(set), list_(list), queue_(queue), lane_(threadIdx.x % kWarp) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint32_t first = tile * Sizes::kHeads + t * kMmaHeads;
      const uint32_t own = first + lane_ % 4;
      if (own < set.head_count) {
        visible_begin_[t] = set.visible[2 * own];
        visible_end_[t] = set.visible[2 * own + 1];
        unscale_[t] = FloatPower(-shifts[own - tile * Sizes::kHeads]);
      }
      LoadQueries(first, first - tile * Sizes::kHeads, shifts, q_[t]);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (float& acc : acc_[t][step]) acc = 0.0F;
      }
    }
  }

  __device__ __forceinline__ void Attend(uint32_t token_count) {
    constexpr uint32_t kStep = kAttendWarps * kMmaTokens;
    constexpr uint32_t kRecent = 4;
    const uint32_t first = threadIdx.x / kWarp * kMmaTokens;
    Fetch(first, token_count, 0);
    uint32_t group = 0;
    for (uint32_t at = first; at < token_count; at += kStep, ++group) {
      Fetch(at + kStep, token_count, (group + 1) % kMmaStages);
      __pipeline_wait_prior(kMmaStages - 1);
      __syncwarp();
      const std::byte* keys = queue_ + group % kMmaStages * Sizes::kStageBytes;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) Weigh(t, at, token_count, keys);
      if (set_.read_values) AddValues(keys + kMmaTokens * Sizes::kVectorBytes);
      if (group % kRecent == kRecent - 1) AddRecent();
      // The other lanes have read what the next group overwrites.
      __syncwarp();
    }
    AddRecent();
    __pipeline_wait_prior(0);
  }

  // This warp's sums of its heads.
  __device__ __forceinline__ void LeaveSums(CtaSums<Sizes::kHeads>* sums) const {
    const uint32_t warp = threadIdx.x / kWarp;
    if (lane_ == 0) sums->key_squares_max[warp] = 0.0F;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      double sum = finite_[t] ? sum_[t] : __longlong_as_double(0x7ff8000000000000LL);
#pragma unroll
      for (int offset = 4; offset < static_cast<int>(kWarp); offset *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, offset);
      }
      if (lane_ >= kMmaHeads) continue;
      sums->sum[warp][t * kMmaHeads + lane_] = sum;
      sums->reference[warp][t * kMmaHeads + lane_] = reference_[t];
    }
  }

  // merged: [kAttendWarps][kHeads][kDim]
  __device__ __forceinline__ void LeaveValues(const CtaSums<Sizes::kHeads>& sums,
                                              float* merged) const {
    const uint32_t warp = threadIdx.x / kWarp;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint32_t h = t * kMmaHeads + lane_ % 4;
      const float factor = PowerOfTwo(reference_[t] - SumOfWarps(sums, h).reference);
      float* row = merged + (warp * Sizes::kHeads + h) * Sizes::kDim + lane_ / 4;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        row[16 * step] = (acc_[t][step][0] + acc_[t][step][1]) * factor;
        row[16 * step + 8] = (acc_[t][step][2] + acc_[t][step][3]) * factor;
      }
    }
  }

 private:
  // Two parts of a head in columns 2 h and 2 h + 1, and the third in the even ones of a second
  // product.
  __device__ __forceinline__ void LoadQueries(uint32_t first, uint32_t place, const int32_t* shifts,
                                              uint32_t (&q)[kSteps][4]) const {
    const uint32_t column = lane_ / 4;
    const uint32_t head = first + column / 2;
    const bool there = head < set_.head_count;
    const float scale = there ? FloatPower(shifts[place + column / 2]) : 0.0F;
    const float* qs = set_.qs + size_t{there ? head : 0} * Sizes::kDim + 2 * (lane_ % 4);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = qs[16 * step + 8 * half] * scale;
        const float high = qs[16 * step + 8 * half + 1] * scale;
        const uint32_t part = column % 2;
        q[step][half] = PartOf<kType>(low, part) | PartOf<kType>(high, part) << 16;
        q[step][2 + half] = part == 0 ? PartOf<kType>(low, 2) | PartOf<kType>(high, 2) << 16 : 0;
      }
    }
  }

  // Starts reading the tokens from `at` on, if there are any.
  __device__ __forceinline__ void Fetch(uint32_t at, uint32_t token_count, uint32_t stage) {
    constexpr uint32_t kChunks = 2 * kSteps;  // of a vector
    if (at < token_count) {
      std::byte* to = queue_ + stage * Sizes::kStageBytes;
#pragma unroll
      for (uint32_t i = 0; i < 2 * kSteps; ++i) {
        const uint32_t index = i * kWarp + lane_;
        const uint32_t row = index / (2 * kChunks);
        const uint32_t chunk = index % (2 * kChunks);
        const bool value = chunk >= kChunks;
        if (value && !set_.read_values) continue;
        const uint32_t place = (value ? kMmaTokens + row : row) * Sizes::kVectorBytes +
                               16 * (value ? chunk - kChunks : chunk);
        __pipeline_memcpy_async(to + place, list_.rows[at + row] + 16 * chunk, 16);
      }
    }
    __pipeline_commit();
  }

  __device__ __forceinline__ void AddRecent() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      sum_[t] += static_cast<double>(recent_[t]);
      recent_[t] = 0.0F;
    }
  }

  // A head's logits of tokens r and r + 8 become weights.
  __device__ __forceinline__ void Weigh(int t, uint32_t at, uint32_t token_count,
                                        const std::byte* keys) {
    const std::byte* rows =
        keys + (lane_ / 8 % 2 * 8 + lane_ % 8) * Sizes::kVectorBytes + lane_ / 16 * 16;
    float upper[4] = {};
    float lower[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t k[4];
      LoadMatrices(rows + 32 * step, k);
      const uint32_t parts[2] = {q_[t][step][0], q_[t][step][1]};
      const uint32_t last[2] = {q_[t][step][2], q_[t][step][3]};
      MultiplyAdd<kType>(k, parts, upper);
      MultiplyAdd<kType>(k, last, lower);
    }
    float logits[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float logit = (upper[2 * i] + (upper[2 * i + 1] + lower[2 * i])) * unscale_[t];
      const uint32_t index = at + lane_ / 4 + 8 * i;
      const uint32_t position = index < token_count ? list_.positions[index] : 0;
      const bool sees =
          index < token_count && position >= visible_begin_[t] && position < visible_end_[t];
      if (call_.softcap > 0.0F) logit = SoftcapOf(logit, call_.softcap);
      if (sees && !(fabsf(logit) <= 0x1.fffffep+127F)) finite_[t] = false;
      logits[i] = sees ? logit : -__int_as_float(0x7f800000);
    }
    Raise(t, fmaxf(logits[0], logits[1]));
#pragma unroll
    for (int i = 0; i < 2; ++i) weights_[t][i] = ExpScaled(logits[i], reference_[t]);
    recent_[t] += weights_[t][0] + weights_[t][1];
  }

  __device__ __forceinline__ void Raise(int t, float logit) {
    int32_t exponent = ExponentOf(logit);
    if (!__any_sync(kAllLanes, exponent > reference_[t])) return;
#pragma unroll
    for (int offset = 4; offset < static_cast<int>(kWarp); offset *= 2) {
      exponent = max(exponent, __shfl_xor_sync(kAllLanes, exponent, offset));
    }
    const int32_t raised = max(exponent, reference_[t]);
    const float factor = PowerOfTwo(reference_[t] - raised);
    sum_[t] = (sum_[t] + static_cast<double>(recent_[t])) * PowerOfTwo64(reference_[t] - raised);
    recent_[t] = 0.0F;
    reference_[t] = raised;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (float& acc : acc_[t][step]) acc *= factor;
    }
  }

  // Two numbers of a column, packed: weights of tokens 2 q and 2 q + 1 (or 8 more) for the head and
  // part of this lane's column.
  __device__ __forceinline__ uint32_t WeightPair(int t, int i) const {
    const uint32_t column = lane_ / 4;
    const uint32_t from = 8 * (lane_ % 4) + column / 2;
    const float low = __shfl_sync(kAllLanes, weights_[t][i], from) * kWeightScale;
    const float high = __shfl_sync(kAllLanes, weights_[t][i], from + 4) * kWeightScale;
    float low_back;
    float high_back;
    const uint32_t rounded = Rounded<kType>(low, &low_back) | Rounded<kType>(high, &high_back)
                                                                  << 16;
    float unused;
    const uint32_t rest =
        Rounded<kType>(low - low_back, &unused) | Rounded<kType>(high - high_back, &unused) << 16;
    return column % 2 == 0 ? rounded : rest;
  }

  __device__ __forceinline__ void AddValues(const std::byte* values) {
    const std::byte* rows =
        values + (lane_ / 16 * 8 + lane_ % 8) * Sizes::kVectorBytes + lane_ / 8 % 2 * 16;
    uint32_t pairs[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      pairs[t][0] = WeightPair(t, 0);
      pairs[t][1] = WeightPair(t, 1);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t v[4];
      LoadTransposed(rows + 32 * step, v);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) MultiplyAdd<kType>(v, pairs[t], acc_[t][step]);
    }
  }

  const AttendCall& call_;
  const AttendSet& set_;
  const TokenList& list_;
  std::byte* const queue_;
  const uint32_t lane_;
  // Of each tile, for this lane's own head, the lane's place among four:
  uint32_t visible_begin_[kTiles] = {};
  uint32_t visible_end_[kTiles] = {};
  float unscale_[kTiles] = {};
  int32_t reference_[kTiles] = {};
  double sum_[kTiles] = {};
  float recent_[kTiles] = {};
  float weights_[kTiles][2] = {};
  bool finite_[kTiles];
  float acc_[kTiles][kSteps][4];
  uint32_t q_[kTiles][kSteps][4];

 public:
  __device__ __forceinline__ void Begin() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      reference_[t] = kReferenceMin;
      finite_[t] = true;
    }
  }
};

template <int kType, int kSteps, int kTiles>
__global__ void __launch_bounds__(kAttendThreads, 2)
    AttendMmaKernel(const __grid_constant__ AttendCall call) {
  using Sizes = MmaSizes<kSteps, kTiles>;
  constexpr int kHeads = Sizes::kHeads;
  extern __shared__ uint4 queue[];
  __shared__ TokenList list;
  __shared__ CtaSums<kHeads> sums;
  __shared__ int32_t shifts[kHeads];
  const AttendJob job = call.jobs[blockIdx.x];
  const AttendSet set = call.sets[job.set];
  const uint32_t tile = blockIdx.y;
  if (tile * kHeads >= set.head_count) return;
  const uint32_t heads = min(static_cast<uint32_t>(kHeads), set.head_count - tile * kHeads);
  for (uint32_t h = threadIdx.x / kWarp; h < heads; h += kAttendWarps) {
    const float* qs = set.qs + size_t{tile * kHeads + h} * Sizes::kDim;
    const int32_t shift = QueryShift(qs, Sizes::kDim);
    if (threadIdx.x % kWarp == 0) shifts[h] = shift;
  }
  __syncthreads();
  MmaWarp<kType, kSteps, kTiles> warp(
      call, set, tile, shifts, list,
      reinterpret_cast<std::byte*>(queue) + threadIdx.x / kWarp * kMmaStages * Sizes::kStageBytes);
  warp.Begin();
  for (uint32_t word = 0; word < job.word_count;) {
    const Listed listed = ListTokens(set, call.shape, job.first_word + word,
                                     min(kListedWords, job.word_count - word), &list);
    warp.Attend(listed.tokens);
    word += listed.words;
  }
  warp.LeaveSums(&sums);
  __syncthreads();
  auto* merged = reinterpret_cast<float*>(queue);
  if (set.read_values) warp.LeaveValues(sums, merged);
  LeaveResult<kHeads>(set, Sizes::kDim, job.index, tile, sums, merged, kAttendWarps, Sizes::kDim,
                      1.0F / MmaWarp<kType, kSteps, kTiles>::kWeightScale);
  MergeIfLast<kHeads>(set, Sizes::kDim, tile, &sums, merged);
}

template <int kType, int kSteps, int kTiles>
cudaError_t LaunchMma(const AttendCall& call, cudaStream_t stream) {
  using Sizes = MmaSizes<kSteps, kTiles>;
  const cudaError_t code =
      ReserveShared(AttendMmaKernel<kType, kSteps, kTiles>, Sizes::kSharedBytes);
  if (code != cudaSuccess) return code;
  const dim3 grid(call.job_count, (call.head_count_max + Sizes::kHeads - 1) / Sizes::kHeads);
  AttendMmaKernel<kType, kSteps, kTiles>
      <<<grid, kAttendThreads, Sizes::kSharedBytes, stream>>>(call);
  return cudaGetLastError();
}

template <int kType, int kTiles>
cudaError_t LaunchMmaRows(const AttendCall& call, cudaStream_t stream) {
  switch (call.shape.head_dim) {
    case 64:
      return LaunchMma<kType, 4, kTiles>(call, stream);
    case 80:
      return LaunchMma<kType, 5, kTiles>(call, stream);
    case 96:
      return LaunchMma<kType, 6, kTiles>(call, stream);
    case 128:
      return LaunchMma<kType, 8, kTiles>(call, stream);
    default:
      // Two tiles of so many channels do not fit the registers.
      return LaunchMma<kType, 16, 1>(call, stream);
  }
}

// Attention over caches of one element type; each is compiled in a file of its own.
template <int kType>
cudaError_t AttendMmaTyped(const AttendCall& call, cudaStream_t stream) {
  if (AttendTilingOf(call).heads == kMmaHeads) return LaunchMmaRows<kType, 1>(call, stream);
  return LaunchMmaRows<kType, 2>(call, stream);
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ATTEND_MMA_INL_H_
