// Products of attention in the cache's own type, for masses that need no bound: what bounds the
// roundings of their sums is not stated. A query is the sum of three numbers of the cache's type,
// scaled by a power of two, so that products with keys are exact and nothing of it is lost; a
// weight is the sum of two.

#ifndef KVSERVICE_ATTENTION_CUDA_ATTEND_QUICK_INL_H_
#define KVSERVICE_ATTENTION_CUDA_ATTEND_QUICK_INL_H_

#include <cuda_bf16.h>

#include "attention/cuda/attend_mma-inl.h"

namespace kvservice::cuda {

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

// Queries are scaled so that their largest channel is near 2^12: half precision then holds all of
// them, and their products with keys stay far from overflow.
inline constexpr int32_t kQueryExponent = 12;

// 2^exponent within the normal range.
__device__ __forceinline__ float FloatPower(int32_t exponent) {
  return __int_as_float((exponent + kFloatExponentBias) << 23);
}

template <int kType, int kStepsOfRow, int kTilesOfCta>
class QuickProducts {
 public:
  static constexpr int kSteps = kStepsOfRow;
  static constexpr int kTiles = kTilesOfCta;
  static constexpr int kHeads = kTiles * static_cast<int>(kMmaHeads);
  // Weights of half precision need the range; those of bfloat16 have that of floats.
  static constexpr float kValueScale = kType == kFloat16 ? 0x1p+15F : 1.0F;

  // A warp loads a head of each tile.
  __device__ __forceinline__ QuickProducts(const AttendSet& set, uint32_t first)
      : lane_(threadIdx.x % kWarp),
        key_place_(PlaceOfLane<kSteps>(lane_ % 16, lane_ / 16)),
        value_place_(PlaceOfLane<kSteps>(lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2)) {
    static_assert(kAttendWarps % kMmaHeads == 0);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint32_t head = first + t * kMmaHeads + threadIdx.x / kWarp;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const uint32_t channel = 4 * (i * kWarp + lane_);
        queries_[t][i] = make_float4(0, 0, 0, 0);
        if (head < set.head_count && channel < 16 * kSteps && threadIdx.x / kWarp < kMmaHeads) {
          const float* qs = set.qs + size_t{head} * (16 * kSteps) + channel;
          queries_[t][i] = *reinterpret_cast<const float4*>(qs);
        }
      }
      for (auto& acc : acc_[t]) {
        for (float& sum : acc) sum = 0.0F;
      }
    }
  }

  // Two parts of a head in columns 2 h and 2 h + 1, and the third in the even ones of a second
  // product. Each warp splits its heads into what the lanes of all warps will hold of them.
  __device__ __forceinline__ void Prepare(std::byte* scratch, int32_t* shifts) {
    static_assert(kTiles * sizeof(Parts) <= RowSizes<kSteps>::kStageBytes);
    auto* parts = reinterpret_cast<Parts*>(scratch);
    const uint32_t head = threadIdx.x / kWarp;
    if (head < kMmaHeads) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int32_t shift = QueryShift(t);
        if (lane_ == 0) shifts[t * kMmaHeads + head] = shift;
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          const uint32_t channel = 4 * (i * kWarp + lane_);
          const float scale = FloatPower(shift);
          if (channel >= 16 * kSteps) break;
          const float4 four = queries_[t][i];
          SplitPair(head, channel, four.x * scale, four.y * scale, &parts[t]);
          SplitPair(head, channel + 2, four.z * scale, four.w * scale, &parts[t]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      unscale_[t] = FloatPower(-shifts[t * kMmaHeads + lane_ % 4]);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4 four = parts[t].of[step][lane_];
        q_[t][step][0] = four.x, q_[t][step][1] = four.y;
        q_[t][step][2] = four.z, q_[t][step][3] = four.w;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void Multiply(const std::byte* rows, float (&logits)[kTiles][2]) {
    float upper[kTiles][4] = {};
    float lower[kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t k[4];
      LoadMatrices(rows + PlaceOfChunk(key_place_, 2 * step), k);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t parts[2] = {q_[t][step][0], q_[t][step][1]};
        const uint32_t last[2] = {q_[t][step][2], q_[t][step][3]};
        MultiplyAdd<kType>(k, parts, upper[t]);
        MultiplyAdd<kType>(k, last, lower[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        logits[t][i] = (upper[t][2 * i] + (upper[t][2 * i + 1] + lower[t][2 * i])) * unscale_[t];
      }
    }
  }

  __device__ __forceinline__ void AddValues(const std::byte* rows,
                                            const float (&weights)[kTiles][2]) {
    uint32_t pairs[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      pairs[t][0] = WeightPair(weights[t][0]);
      pairs[t][1] = WeightPair(weights[t][1]);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t v[4];
      LoadTransposed(rows + PlaceOfChunk(value_place_, 2 * (kSteps + step)), v);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) MultiplyAdd<kType>(v, pairs[t], acc_[t][step]);
    }
  }

  __device__ __forceinline__ void Rescale(int t, int32_t exponent) {
    const float factor = PowerOfTwo(exponent);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (float& acc : acc_[t][step]) acc *= factor;
    }
  }

  __device__ __forceinline__ void Leave(int t, float factor, float* to) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float* row = to + 16 * step + lane_ / 4;
      row[0] = (acc_[t][step][0] + acc_[t][step][1]) * factor;
      row[8] = (acc_[t][step][2] + acc_[t][step][3]) * factor;
    }
  }

  __device__ __forceinline__ float key_squares_max() const { return 0.0F; }

 private:
  static constexpr int kFours =
      (4 * kSteps + static_cast<int>(kWarp) - 1) / static_cast<int>(kWarp);

  // Queries of a tile as the operands of products: of each lane, for every 16 channels.
  struct Parts {
    uint4 of[kSteps][kWarp];
  };

  // Channels `channel` and one more of a head.
  __device__ __forceinline__ static void SplitPair(uint32_t head, uint32_t channel, float low,
                                                   float high, Parts* parts) {
    uint32_t pairs[3];
#pragma unroll
    for (uint32_t& pair : pairs) {
      float low_back;
      float high_back;
      pair = Rounded<kType>(low, &low_back) | Rounded<kType>(high, &high_back) << 16;
      low -= low_back;
      high -= high_back;
    }
    const uint32_t lane = 8 * head + channel % 8 / 2;
    const uint32_t half = channel / 8 % 2;
    uint4* of = parts->of[channel / 16];
    auto* even = reinterpret_cast<uint32_t*>(of + lane);
    auto* odd = reinterpret_cast<uint32_t*>(of + lane + 4);
    even[half] = pairs[0];
    even[2 + half] = pairs[2];
    odd[half] = pairs[1];
    odd[2 + half] = 0;
  }

  // The power of two that a warp's head is multiplied with.
  __device__ __forceinline__ int32_t QueryShift(int t) const {
    float largest = 0.0F;
#pragma unroll
    for (const float4& four : queries_[t]) {
      largest = fmaxf(
          largest, fmaxf(fmaxf(fabsf(four.x), fabsf(four.y)), fmaxf(fabsf(four.z), fabsf(four.w))));
    }
#pragma unroll
    for (int offset = 1; offset < static_cast<int>(kWarp); offset *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
    const int32_t exponent = (__float_as_int(largest) >> 23) - kFloatExponentBias;
    constexpr int32_t kExponentMin = -100;  // Less is as good as nothing.
    return kQueryExponent - max(exponent, kExponentMin);
  }

  // Two numbers of a column, packed: weights of tokens 2 q and 2 q + 1 (or 8 more) for the head and
  // part of this lane's column.
  __device__ __forceinline__ uint32_t WeightPair(float weight) const {
    const uint32_t column = lane_ / 4;
    const uint32_t from = 8 * (lane_ % 4) + column / 2;
    const float low = __shfl_sync(kAllLanes, weight, from) * kValueScale;
    const float high = __shfl_sync(kAllLanes, weight, from + 4) * kValueScale;
    float low_back;
    float high_back;
    const uint32_t rounded = Rounded<kType>(low, &low_back) | Rounded<kType>(high, &high_back)
                                                                  << 16;
    float unused;
    const uint32_t rest =
        Rounded<kType>(low - low_back, &unused) | Rounded<kType>(high - high_back, &unused) << 16;
    return column % 2 == 0 ? rounded : rest;
  }

  const uint32_t lane_;
  const uint32_t key_place_;
  const uint32_t value_place_;
  float unscale_[kTiles] = {};
  float4 queries_[kTiles][kFours];
  uint32_t q_[kTiles][kSteps][4];
  float acc_[kTiles][kSteps][4];
};

// Attention over caches of one element type; each is compiled in a file of its own.
template <int kType>
cudaError_t AttendQuick(const AttendCall& call, cudaStream_t stream) {
  // Two tiles of so many channels do not fit the registers.
  if (call.shape.head_dim > 128) return LaunchMma<QuickProducts<kType, 16, 1>>(call, stream);
  if (AttendTilingOf(call).heads == kMmaHeads) {
    return LaunchMmaRows<QuickProducts, kType, 1>(call, stream);
  }
  return LaunchMmaRows<QuickProducts, kType, 2>(call, stream);
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ATTEND_QUICK_INL_H_
