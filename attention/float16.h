// Conversions between float and the two 16-bit cache types; the one home of this arithmetic on the
// host. Widening is exact; narrowing rounds to nearest even and keeps inf and NaN.

#ifndef KVSERVICE_ATTENTION_FLOAT16_H_
#define KVSERVICE_ATTENTION_FLOAT16_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention/kv_layout.h"

namespace kvservice {

inline float FloatFromBfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t Bfloat16FromFloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// Integer code, because _Float16 is not there in every compiler that reads this. Moved to float's
// place, the exponent of a half is 112 too small, subnormal or not; the product is exact.
inline float FloatFromFloat16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffU) << 13;
  if (magnitude >= 0x0f800000U) return std::bit_cast<float>(sign | 0x70000000U | magnitude);
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112F);
  return std::bit_cast<float>(sign | scaled);
}

inline uint16_t Float16FromFloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  uint32_t half = 0x7c00U;        // infinity, also for 65520 and more
  if (magnitude > 0x7f800000U) {  // NaN, made quiet
    half = 0x7e00U | ((magnitude >> 13) & 0x3ffU);
  } else if (magnitude < 0x38800000U) {  // below 2^-14: adding 1/2 rounds to the subnormal grid
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3f000000U;
  } else if (magnitude < 0x477ff000U) {
    half = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

// Element `index` of an array of `dtype` at `data` (any alignment).
inline float LoadElement(DType dtype, const std::byte* data, size_t index) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, data + 4 * index, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data + 2 * index, sizeof(bits));
  return dtype == DType::kBfloat16 ? FloatFromBfloat16(bits) : FloatFromFloat16(bits);
}

inline void StoreElement(DType dtype, float value, std::byte* data, size_t index) {
  if (dtype == DType::kFloat32) {
    std::memcpy(data + 4 * index, &value, sizeof(value));
    return;
  }
  const uint16_t bits =
      dtype == DType::kBfloat16 ? Bfloat16FromFloat(value) : Float16FromFloat(value);
  std::memcpy(data + 2 * index, &bits, sizeof(bits));
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_FLOAT16_H_
