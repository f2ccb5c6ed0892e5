// Products of attention in double, whose roundings are known: PTX specifies that a double product
// of tensor cores multiplies and adds like fused multiply-adds (mma, "Precision and rounding"), of
// which a 53-bit sum of d or a few thousand terms leaves nothing that counts beside fp32. What is
// rounded to fp32 is the logit, once, and sums of values where warps are added up.
//
// An element becomes a double by moving its bits: exponent and fraction keep their values in wider
// fields, subnormal numbers included, which divides it by a power of two, 2^896 for bfloat16 and
// 2^1008 for half precision. Queries and weights are multiplied with 2^896. What is not finite
// turns into large finite numbers on the way and is looked for.

#ifndef KVSERVICE_ATTENTION_CUDA_ATTEND_PROVEN_INL_H_
#define KVSERVICE_ATTENTION_CUDA_ATTEND_PROVEN_INL_H_

#include <cuda_bf16.h>

#include "attention/cuda/attend_mma-inl.h"

namespace kvservice::cuda {

// What queries and weights are multiplied with: no float times this overflows.
inline constexpr double kWidened = 0x1p+896;

// Two elements, the one at the lower address first.
template <int kType>
struct ElementPair {
  uint32_t bits;

  __device__ __forceinline__ bool finite(uint32_t which) const {
    constexpr uint32_t kExponent = kType == kBfloat16 ? 0x7f80 : 0x7c00;
    return (bits >> 16 * which & kExponent) != kExponent;
  }
  __device__ __forceinline__ float2 floats() const {
    if constexpr (kType == kBfloat16) {
      return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000U));
    } else {
      return __half22float2(*reinterpret_cast<const __half2*>(&bits));
    }
  }
  // What the products of elements and widened numbers must be multiplied with.
  static constexpr double kRestore = kType == kBfloat16 ? 1.0 : 0x1p+112;
  // Upper halves of the elements as doubles; the lower ones are zero.
  __device__ __forceinline__ uint2 halves() const {
    constexpr int kShift = kType == kBfloat16 ? 3 : 6;
    constexpr uint32_t kFields = kType == kBfloat16 ? 0x8fffffffU : 0x81ffffffU;
    constexpr uint32_t kLowBits = (1U << (16 - kShift)) - 1;
    return make_uint2(Shifted(bits << 16, kShift) & kFields,
                      Shifted(bits, kShift) & (kFields & ~kLowBits));
  }
  // What `zeros` is once the elements times zero are added: still zeros, if both are finite.
  __device__ __forceinline__ uint32_t AddZeroTimes(uint32_t zeros) const {
    uint32_t sum;
    if constexpr (kType == kBfloat16) {
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(bits), "r"(0), "r"(zeros));
    } else {
      asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(bits), "r"(0), "r"(zeros));
    }
    return sum;
  }

 private:
  __device__ __forceinline__ static uint32_t Shifted(uint32_t x, int shift) {
    return static_cast<uint32_t>(static_cast<int32_t>(x) >> shift);
  }
};

// An operand of a product whose elements have lower halves of zero. These stay in their registers
// while upper halves come and go; the compiler, if it knew that they are zero, would write them
// again every time.
struct Operand {
  uint32_t zeros[8];
  double elements[8];

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (uint32_t& zero : zeros) asm volatile("mov.b32 %0, 0;" : "=r"(zero));
  }
  __device__ __forceinline__ void Set(int i, uint32_t half) {
    asm("mov.b64 %0, {%1, %2};" : "=d"(elements[i]) : "r"(zeros[i]), "r"(half));
  }
};

// sum += a b, a: [16][16], b: [16][8]. Lane 4 g + q has a[g + 8 i][q + 4 v] in a[2 v + i],
// b[q + 4 v][g] in b[v] and sum[g + 8 i][2 q + j] in sum[2 i + j].
__device__ __forceinline__ void MultiplyAdd(const double (&a)[8], const double (&b)[4],
                                            double (&sum)[4]) {
#if __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64.rn {%0,%1,%2,%3}, "
      "{%4,%5,%6,%7,%8,%9,%10,%11}, {%12,%13,%14,%15}, {%0,%1,%2,%3};"
      : "+d"(sum[0]), "+d"(sum[1]), "+d"(sum[2]), "+d"(sum[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]),
        "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
#else
#pragma unroll
  for (int v = 0; v < 4; ++v) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64.rn {%0,%1}, {%2}, {%3}, {%0,%1};"
          : "+d"(sum[2 * i]), "+d"(sum[2 * i + 1])
          : "d"(a[2 * v + i]), "d"(b[v]));
    }
  }
#endif
}

template <int kType, int kStepsOfRow, int kTilesOfCta>
class ProvenProducts {
 public:
  static constexpr int kSteps = kStepsOfRow;
  static constexpr int kTiles = kTilesOfCta;
  static constexpr int kHeads = kTiles * static_cast<int>(kMmaHeads);
  static constexpr float kValueScale = 1.0F;

  // Column 2 h + t is head h of tile t. A lane loads the channels of its column that it multiplies
  // with keys: those of chunks q, q + 4, ...
  __device__ __forceinline__ ProvenProducts(const AttendSet& set, uint32_t first)
      : lane_(threadIdx.x % kWarp),
        key_place_(PlaceOfLane<kSteps>(lane_ / 4, lane_ % 4)),
        value_place_(PlaceOfLane<kSteps>(lane_ % 4, lane_ / 16) + lane_ / 4 % 4 * 4) {
    const uint32_t tile = lane_ / 4 % 2;
    const uint32_t head = first + tile * kMmaHeads + lane_ / 8;
    const float* qs = set.qs + size_t{head} * (16 * kSteps);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const uint32_t chunk = 4 * turn + lane_ % 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float4 four = make_float4(0, 0, 0, 0);
        if (chunk < 2 * kSteps && tile < kTiles && head < set.head_count) {
          four = reinterpret_cast<const float4*>(qs + 8 * chunk)[i];
        }
        queries_[turn][i] = four;
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (double& acc : acc_[step]) acc = 0.0;
    }
  }

  __device__ __forceinline__ void Prepare(std::byte* /*scratch*/, int32_t* /*shifts*/) {
    operand_.Clear();
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float4 four = queries_[turn][i];
        // Not before the rows are asked for.
        asm volatile("" : "+f"(four.x), "+f"(four.y), "+f"(four.z), "+f"(four.w));
        q_[turn][i][0] = static_cast<double>(four.x) * kWidened;
        q_[turn][i][1] = static_cast<double>(four.y) * kWidened;
        q_[turn][i][2] = static_cast<double>(four.z) * kWidened;
        q_[turn][i][3] = static_cast<double>(four.w) * kWidened;
      }
    }
  }

  __device__ __forceinline__ void Multiply(const std::byte* rows, float (&logits)[kTiles][2]) {
    double sums[2][4] = {};
    float squares[2] = {};
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const uint32_t chunk = 4 * turn + lane_ % 4;
      const bool there = 4 * turn + 4 <= 2 * kSteps || chunk < 2 * kSteps;
      const Chunk tokens[2] = {KeysOf(rows, 0, turn), KeysOf(rows, 1, turn)};
      // Channels 0 to 3 of the chunk, and 4 to 7.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const ElementPair<kType> pair = tokens[i].pairs[2 * half + j];
            const uint2 two = pair.halves();
            operand_.Set(4 * j + i, two.x);
            operand_.Set(4 * j + 2 + i, two.y);
            const float2 floats = pair.floats();
            const float more = fmaf(floats.y, floats.y, fmaf(floats.x, floats.x, squares[i]));
            squares[i] = there ? more : squares[i];
          }
        }
        MultiplyAdd(operand_.elements, q_[turn][half], sums[half]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      squares[i] += __shfl_xor_sync(kAllLanes, squares[i], 1);
      squares[i] += __shfl_xor_sync(kAllLanes, squares[i], 2);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const double sum = sums[0][2 * i + t] + sums[1][2 * i + t];
        logits[t][i] = static_cast<float>(sum * ElementPair<kType>::kRestore);
      }
    }
    const bool large = !(fmaxf(squares[0], squares[1]) <= 0x1.fffffep+127F) ||
                       squares[0] != squares[0] || squares[1] != squares[1];
    if (__any_sync(kAllLanes, large)) DropLogits(rows, logits);
    // A norm that is not a number is not small.
    key_squares_max_ =
        large ? __int_as_float(0x7f800000) : fmaxf(key_squares_max_, fmaxf(squares[0], squares[1]));
  }

  // Channels 2 g and 2 g + 1 of every 16 are rows g and g + 8 of the product.
  __device__ __forceinline__ void AddValues(const std::byte* rows,
                                            const float (&weights)[kTiles][2]) {
    double w[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) w[v] = WeightOf(weights, v);
    uint32_t zeros = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const ElementPair<kType> pair = ValuesOf(rows, v, step);
        zeros = pair.AddZeroTimes(zeros);
        const uint2 two = pair.halves();
        operand_.Set(2 * v, two.x);
        operand_.Set(2 * v + 1, two.y);
      }
      MultiplyAdd(operand_.elements, w, acc_[step]);
    }
    if (__any_sync(kAllLanes, (zeros & 0x7fff7fffU) != 0)) DropValues(rows);
  }

  __device__ __forceinline__ void Rescale(int t, int32_t exponent) {
    const double factor = PowerOfTwo64(exponent);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      acc_[step][t] *= factor;
      acc_[step][2 + t] *= factor;
    }
  }

  __device__ __forceinline__ void Leave(int t, float factor, float* to) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const double restore = ElementPair<kType>::kRestore;
      const float2 pair = make_float2(static_cast<float>(acc_[step][t] * restore) * factor,
                                      static_cast<float>(acc_[step][2 + t] * restore) * factor);
      *reinterpret_cast<float2*>(to + 16 * step + lane_ / 4 * 2) = pair;
    }
  }

  __device__ __forceinline__ float key_squares_max() const { return key_squares_max_; }

 private:
  // Four lanes read a row of keys, a chunk each at a time.
  static constexpr int kTurns = (2 * kSteps + 3) / 4;
  static constexpr uint32_t kRowBytes = RowSizes<kSteps>::kRowBytes;

  struct Chunk {
    ElementPair<kType> pairs[4];
  };
  // Chunk q + 4 turn of token g + 8 i.
  __device__ __forceinline__ Chunk KeysOf(const std::byte* rows, int i, int turn) const {
    const uint32_t place = PlaceOfChunk(key_place_, 4 * turn) + 8 * i * kRowBytes;
    const auto bits = *reinterpret_cast<const uint4*>(rows + place);
    return {{{bits.x}, {bits.y}, {bits.z}, {bits.w}}};
  }

  // Channels 16 step + 2 g and one more of token q + 4 v. Rows q and q + 4 differ by one bit of
  // their swizzles.
  __device__ __forceinline__ ElementPair<kType> ValuesOf(const std::byte* rows, int v,
                                                         int step) const {
    const uint32_t place =
        PlaceOfChunk(value_place_ ^ 16 * (v % 2), 2 * (kSteps + step)) + 4 * v * kRowBytes;
    return {*reinterpret_cast<const uint32_t*>(rows + place)};
  }

  // The weight of token q + 4 v for this lane's column.
  __device__ __forceinline__ double WeightOf(const float (&weights)[kTiles][2], int v) const {
    const uint32_t from = 4 * (lane_ % 4 + 4 * (v % 2)) + lane_ / 8;
    const bool odd = lane_ / 4 % 2 != 0;
    float weight = __shfl_sync(kAllLanes, weights[0][v / 2], from);
    if constexpr (kTiles == 2) {
      const float other = __shfl_sync(kAllLanes, weights[1][v / 2], from);
      weight = odd ? other : weight;
    } else {
      weight = odd ? 0.0F : weight;
    }
    return static_cast<double>(weight) * kWidened;
  }

  // Lanes of this lane's row of products, which say `mine`.
  __device__ __forceinline__ bool AnyOfRow(bool mine) const {
    return (__ballot_sync(kAllLanes, mine) >> (lane_ & ~3U) & 0xfU) != 0;
  }

  // Logits of keys that are not finite become NaN; rare, as is the next.
  __device__ __forceinline__ void DropLogits(const std::byte* rows, float (&logits)[kTiles][2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bool finite = true;
      for (int turn = 0; turn < kTurns; ++turn) {
        if (4 * turn + lane_ % 4 >= 2 * kSteps) continue;
        const Chunk elements = KeysOf(rows, i, turn);
        for (const ElementPair<kType>& pair : elements.pairs) {
          finite = finite && pair.finite(0) && pair.finite(1);
        }
      }
      if (!AnyOfRow(!finite)) continue;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) logits[t][i] = __int_as_float(0x7fffffff);
    }
  }

  // Sums of channels that have a value that is not finite become NaN.
  __device__ __forceinline__ void DropValues(const std::byte* rows) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      bool finite[2] = {true, true};
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const ElementPair<kType> pair = ValuesOf(rows, v, step);
        for (int i = 0; i < 2; ++i) finite[i] = finite[i] && pair.finite(i);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!AnyOfRow(!finite[i])) continue;
        acc_[step][2 * i] = acc_[step][2 * i + 1] = __longlong_as_double(0x7ff8000000000000LL);
      }
    }
  }

  const uint32_t lane_;
  const uint32_t key_place_;
  const uint32_t value_place_;
  float key_squares_max_ = 0.0F;
  float4 queries_[kTurns][2];
  double q_[kTurns][2][4];
  Operand operand_;
  double acc_[kSteps][4];
};

// Attention over caches of one element type; each is compiled in a file of its own.
template <int kType>
cudaError_t AttendProven(const AttendCall& call, cudaStream_t stream) {
  if (AttendTilingOf(call).heads == kMmaHeads) {
    return LaunchMmaRows<ProvenProducts, kType, 1>(call, stream);
  }
  return LaunchMmaRows<ProvenProducts, kType, 2>(call, stream);
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ATTEND_PROVEN_INL_H_
