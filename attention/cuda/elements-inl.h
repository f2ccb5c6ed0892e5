// Elements of the cache as floats, and the exponential of attention/cpu/exp-inl.h for one thread:
// the same operations in the same order, so the errors that cpu/exp.h states hold here too. Device
// code only; compiled with -fmad=false, so that what is fused is what says so.

#ifndef KVSERVICE_ATTENTION_CUDA_ELEMENTS_INL_H_
#define KVSERVICE_ATTENTION_CUDA_ELEMENTS_INL_H_

#include <cstdint>

#include "attention/cpu/exp.h"
#include "attention/cuda/kernels.h"
#include "cuda_fp16.h"

namespace kvservice::cuda {

inline constexpr uint32_t kTokens = 64;  // of a block
inline constexpr uint32_t kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffU;

template <int kType>
__device__ __forceinline__ float LoadElement(const std::byte* row, uint32_t index) {
  if constexpr (kType == kFloat32) {
    return reinterpret_cast<const float*>(row)[index];
  } else if constexpr (kType == kFloat16) {
    return __half2float(reinterpret_cast<const __half*>(row)[index]);
  } else {
    const uint32_t bits = reinterpret_cast<const uint16_t*>(row)[index];
    return __uint_as_float(bits << 16);
  }
}

// Eight elements; `from` is aligned to 16 bytes.
template <int kType>
__device__ __forceinline__ void LoadEight(const std::byte* from, float (&to)[8]) {
  if constexpr (kType == kFloat32) {
    const float4 a = reinterpret_cast<const float4*>(from)[0];
    const float4 b = reinterpret_cast<const float4*>(from)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == kBfloat16) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
      } else {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
      }
    }
  }
}

// x log2 e + kRoundingMagic, see ExpExponentBits.
__device__ __forceinline__ float ExpBits(float x) { return fmaf(x, kLog2E, kRoundingMagic); }

__device__ __forceinline__ float ExpScaledWithin(float x, int32_t reference) {
  const float bits = ExpBits(x);
  const float n = bits - kRoundingMagic;
  float r = fmaf(-n, kLn2High, x);
  r = fmaf(-n, kLn2Middle, r);
  r = fmaf(-n, kLn2Low, r);
  float p = fmaf(r, 0x1.6d15f8p-10F, 0x1.12105cp-7F);
  p = fmaf(r, p, 0x1.555516p-5F);
  p = fmaf(r, p, 0x1.5554d8p-3F);
  p = fmaf(r, p, 0.5F);
  p = fmaf(r * r, p, r) + 1.0F;
  const int32_t zero_exponent = reference + (kRoundingMagicBits - kFloatExponentBias);
  const int32_t field = max(__float_as_int(bits) - zero_exponent, 0);
  return p * __int_as_float(field << 23);
}

// NaN becomes a number here, unlike on the host: callers look for it themselves.
__device__ __forceinline__ float ClampLogit(float x) {
  return fmaxf(kLogitMin, fminf(-kLogitMin, x));
}
__device__ __forceinline__ float ExpScaled(float x, int32_t reference) {
  return ExpScaledWithin(ClampLogit(x), reference);
}
__device__ __forceinline__ int32_t ExponentOf(float x) {
  return __float_as_int(ExpBits(ClampLogit(x))) - kRoundingMagicBits;
}

// cap tanh(x / cap), within kTanhError cap; NaN stays NaN.
__device__ __forceinline__ float SoftcapOf(float x, float cap) {
  const float y = __fdiv_rn(x, cap);
  const float e = ExpScaled(fabsf(y) * -2.0F, 0);
  const float capped = cap * copysignf(__fdiv_rn(1.0F - e, 1.0F + e), x);
  return x == x ? capped : x;
}

// 2^x by the hardware, 0 where that is below 2^-126; see kExp2Error.
__device__ __forceinline__ float Exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// 2^exponent as a float, 0 below the normal range; exponent <= 0.
__device__ __forceinline__ float PowerOfTwo(int32_t exponent) {
  return exponent < -126 ? 0.0F : __int_as_float((exponent + 127) << 23);
}
// The same as a double, 0 below 2^-1000.
__device__ __forceinline__ double PowerOfTwo64(int32_t exponent) {
  return exponent < -1000 ? 0.0 : __hiloint2double((exponent + 1023) << 20, 0);
}

template <typename Kernel>
cudaError_t ReserveShared(Kernel* kernel, size_t bytes) {
  return RaiseSharedLimit(reinterpret_cast<const void*>(kernel), bytes);
}

// By `threads` threads, of which this is number `thread`.
__device__ __forceinline__ void CopyStretch(const Stretch& stretch, uint32_t thread,
                                            uint32_t threads) {
  for (uint32_t i = thread; i < stretch.count; i += threads) stretch.to[i] = stretch.from[i];
}

template <typename T>
__device__ __forceinline__ T SumOverLanes(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ELEMENTS_INL_H_
