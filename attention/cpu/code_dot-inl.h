// Dot products of the 4-bit codes of a page with real factors, for several heads at once: factors
// become integers, products and sums are exact. A vector lane holds one token (see CodeOffset in
// attention/sketch.h), so nothing is ever added across lanes.
//
// Coarse factors are one signed byte where the processor multiplies bytes (AVX3_DL) and 16 bits
// elsewhere. They err by at most 1/254 of the largest factor in a channel, which adds less than a
// tenth to what 4-bit codes miss themselves: good enough to choose by. Fine factors have 16 bits,
// so that rounding them costs a bound a few thousandths of a nat.
//
// Included once per target; the guard toggles.

#if defined(KVSERVICE_ATTENTION_CPU_CODE_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSERVICE_ATTENTION_CPU_CODE_DOT_INL_H_
#undef KVSERVICE_ATTENTION_CPU_CODE_DOT_INL_H_
#else
#define KVSERVICE_ATTENTION_CPU_CODE_DOT_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention/cpu/exp.h"
#include "attention/kv_layout.h"
#include "attention/sketch.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using ScanTag = hn::CappedTag<float, 16>;
using CodeTag = hn::RebindToSigned<ScanTag>;

// Factors are q_c step_c, and integers n_c = rint(q_c step_c * inverse) of at most the limit stand
// for them. With scale = largest / limit and inverse = limit / largest, both rounded,
// |q_c step_c - scale n_c| is at most kFactorMiss scale: half of it is the rounding to integers,
// the rest that of the product (2^-24 limit), of scale and of inverse (2^-23 limit).
constexpr float kCoarseLimit = HWY_TARGET == HWY_AVX3_DL ? 127.0F : 32767.0F;
// On AVX3_DL two bytes, the lower of which is signed: 127 * 256 + 127.
constexpr float kFineLimit = HWY_TARGET == HWY_AVX3_DL ? 32639.0F : 32767.0F;
constexpr double kFactorMiss = 0.52;
// Factors below this are taken for zero, so that no quotient overflows.
constexpr float kFactorLeast = 1e-30F;

HWY_INLINE uint32_t LoadFour(const void* from) {
  uint32_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits;
}

// Bytes of one group of four channels (or of eight, with their high nibbles), all tokens.
constexpr size_t kColumnBytes = size_t{4} * kBlockTokens;

HWY_INLINE void PrefetchColumn(const std::byte* next, size_t column) {
  for (size_t at = 0; at < kColumnBytes; at += 64) {
    hwy::Prefetch(next + column * kColumnBytes + at);
  }
}

#if HWY_TARGET == HWY_AVX3_DL

// sum + the four products of unsigned codes and signed factors in every lane.
HWY_INLINE hn::Vec<CodeTag> DotBytes(hn::Vec<CodeTag> sum, hn::Vec<CodeTag> codes,
                                     hn::Vec<CodeTag> factors) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(codes.raw), "v"(factors.raw));
  return sum;
}

// How the bytes of two vectors of integers are put side by side: all lowest bytes, then all next
// ones.
struct ByteOrder {
  constexpr ByteOrder() {
    for (size_t i = 0; i < 32; ++i) {
      places[i] = static_cast<uint8_t>(4 * i);
      places[i + 32] = static_cast<uint8_t>(4 * i + 1);
      ones[i] = ones_twice[i] = ones_twice[i + 32] = 1;
    }
    for (size_t i = 0; i < 16; ++i) units[i] = i < 8 ? 1.0F : 256.0F;
  }

  alignas(64) uint8_t places[64] = {};
  alignas(64) uint8_t ones[64] = {};
  alignas(64) uint8_t ones_twice[64] = {};
  alignas(64) float units[16] = {};  // of a lane's four bytes
};
constexpr ByteOrder kByteOrder;

template <size_t kHeads, bool kFine>
class CodeFactors {
 public:
  // qs: [kHeads][dim], inverse: [kHeads]. The lanes of sums[head] add up to sum_c n_c, exactly.
  HWY_INLINE void Quantize(const float* HWY_RESTRICT qs, const float* HWY_RESTRICT step, size_t dim,
                           const float* HWY_RESTRICT inverse, hn::Vec<ScanTag>* sums) {
    const ScanTag d;
    const CodeTag di;
    const hn::Repartition<uint8_t, CodeTag> d8;
    const hn::Half<hn::Repartition<int8_t, CodeTag>> half8;
    constexpr size_t kLanes = hn::MaxLanes(CodeTag());
    // n + 128 is left in the two low bytes of the sum; without its sign bit the lower one is the
    // signed byte of n = 256 high + low.
    const auto magic = hn::Set(d, kFine ? kRoundingMagic + 128.0F : kRoundingMagic);
    const auto sign = hn::BitCast(
        di, hn::ZeroExtendVector(d8, hn::Set(hn::Half<decltype(d8)>(), kFine ? 0x80 : 0)));
    const auto place = hn::BitCast(di, hn::Load(d8, kByteOrder.places));
    const auto one = hn::BitCast(di, hn::Load(d8, kFine ? kByteOrder.ones_twice : kByteOrder.ones));
    hn::Vec<CodeTag> sum[kHeads];
    hn::Vec<ScanTag> factor[kHeads];
#pragma GCC unroll 4
    for (size_t h = 0; h < kHeads; ++h) {
      sum[h] = hn::Zero(di);
      factor[h] = hn::Set(d, inverse[h]);
    }
    for (size_t c = 0; c < dim; c += 2 * kLanes) {
      const bool pair = c + kLanes < dim;
      const auto step0 = hn::Load(d, step + c);
      const auto step1 = pair ? hn::Load(d, step + c + kLanes) : hn::Zero(d);
#pragma GCC unroll 4
      for (size_t h = 0; h < kHeads; ++h) {
        const float* q = qs + h * dim + c;
        const auto q1 = pair ? hn::LoadU(d, q + kLanes) : hn::Zero(d);
        const auto n0 = hn::MulAdd(hn::Mul(hn::LoadU(d, q), step0), factor[h], magic);
        const auto n1 = hn::MulAdd(hn::Mul(q1, step1), factor[h], magic);
        const hn::Vec<CodeTag> bytes{
            _mm512_permutex2var_epi8(hn::BitCast(di, n0).raw, place.raw, hn::BitCast(di, n1).raw)};
        const auto parts = hn::Xor(bytes, sign);
        sum[h] = DotBytes(sum[h], one, parts);
        const auto parts8 = hn::BitCast(hn::Repartition<int8_t, CodeTag>(), parts);
        hn::Store(hn::LowerHalf(half8, parts8), half8, factors_[0][h] + c);
        if constexpr (kFine) hn::Store(hn::UpperHalf(half8, parts8), half8, factors_[1][h] + c);
      }
    }
#pragma GCC unroll 4
    for (size_t h = 0; h < kHeads; ++h) {
      sums[h] = hn::Mul(hn::ConvertTo(d, sum[h]), hn::Load(d, kByteOrder.units));
    }
  }

  // dots[head][token] = sum_c n_c code_c, rounded once if fine. `next` is the page
  // that will be asked for next.
  HWY_INLINE void Dot(const uint8_t* codes, const std::byte* next, size_t dim,
                      float (*dots)[kBlockTokens]) const {
    constexpr size_t kVectors = kFine ? 2 : 4;
    for (size_t token = 0; token < kBlockTokens; token += kVectors * hn::MaxLanes(CodeTag())) {
      DotTokens<kVectors>(codes, token == 0 ? next : nullptr, dim, token, dots);
    }
  }

 private:
  static constexpr size_t kParts = kFine ? 2 : 1;

  template <size_t kVectors>
  HWY_INLINE void DotTokens(const uint8_t* codes, const std::byte* next, size_t dim, size_t token,
                            float (*dots)[kBlockTokens]) const {
    const CodeTag di;
    constexpr size_t kLanes = hn::MaxLanes(CodeTag());
    const auto nibble = hn::Set(di, 0x0f0f0f0f);
    hn::Vec<CodeTag> sum[kParts][kHeads][kVectors];
#pragma GCC unroll 2
    for (size_t part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
      for (size_t h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; ++v) sum[part][h][v] = hn::Zero(di);
      }
    }
    for (size_t column = 0; column < dim / 8; ++column) {
      const auto* at = reinterpret_cast<const int32_t*>(codes + column * kColumnBytes) + token;
      if (next != nullptr) PrefetchColumn(next, column);
      hn::Vec<CodeTag> first[kVectors];
      hn::Vec<CodeTag> second[kVectors];
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) {
        const auto pairs = hn::Load(di, at + v * kLanes);
        first[v] = hn::And(pairs, nibble);
        second[v] = hn::And(hn::ShiftRight<4>(pairs), nibble);
      }
#pragma GCC unroll 4
      for (size_t h = 0; h < kHeads; ++h) {
#pragma GCC unroll 2
        for (size_t part = 0; part < kParts; ++part) {
          AddProducts<kVectors>(factors_[part][h] + 4 * column, dim / 2, first, second,
                                sum[part][h]);
        }
      }
    }
    const ScanTag d;
#pragma GCC unroll 4
    for (size_t h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; ++v) {
        // At most 127 * 257 * 15 in each of 256 channels: 2^27.
        auto total = sum[0][h][v];
        if constexpr (kFine) total = hn::Add(hn::ShiftLeft<8>(sum[1][h][v]), total);
        hn::Store(hn::ConvertTo(d, total), d, dots[h] + token + v * kLanes);
      }
    }
  }

  template <size_t kVectors>
  HWY_INLINE static void AddProducts(const int8_t* factors, size_t half,
                                     const hn::Vec<CodeTag>* first, const hn::Vec<CodeTag>* second,
                                     hn::Vec<CodeTag>* sum) {
    const CodeTag di;
    const auto low = hn::Set(di, static_cast<int32_t>(LoadFour(factors)));
    const auto high = hn::Set(di, static_cast<int32_t>(LoadFour(factors + half)));
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) sum[v] = DotBytes(sum[v], first[v], low);
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) sum[v] = DotBytes(sum[v], second[v], high);
  }

  HWY_ALIGN int8_t factors_[kParts][kHeads][kHeadDimMax];
};

#else

template <size_t kHeads, bool kFine>
class CodeFactors {
 public:
  // qs: [kHeads][dim], inverse: [kHeads]. The lanes of sums[head] add up to sum_c n_c, exactly.
  HWY_INLINE void Quantize(const float* HWY_RESTRICT qs, const float* HWY_RESTRICT step, size_t dim,
                           const float* HWY_RESTRICT inverse, hn::Vec<ScanTag>* sums) {
    const ScanTag d;
    const CodeTag di;
    const auto magic = hn::Set(d, kRoundingMagic);
    for (size_t h = 0; h < kHeads; ++h) {
      auto sum = hn::Zero(d);
      for (size_t c = 0; c < dim; c += hn::Lanes(d)) {
        const auto factor = hn::Mul(hn::LoadU(d, qs + h * dim + c), hn::Load(d, step + c));
        const auto rounded = hn::MulAdd(factor, hn::Set(d, inverse[h]), magic);
        sum = hn::Add(sum, hn::Sub(rounded, magic));
        StorePairs(hn::Sub(hn::BitCast(di, rounded), hn::Set(di, kRoundingMagicBits)),
                   factors_[h] + c);
      }
      sums[h] = sum;
    }
  }

  // dots[head][token] = sum_c n_c code_c, rounded once if fine. `next` is the page
  // that will be asked for next.
  HWY_INLINE void Dot(const uint8_t* codes, const std::byte* next, size_t dim,
                      float (*dots)[kBlockTokens]) const {
    constexpr size_t kVectors = 2;
    for (size_t token = 0; token < kBlockTokens; token += kVectors * hn::MaxLanes(CodeTag())) {
      DotTokens<kVectors>(codes, token == 0 ? next : nullptr, dim, token, dots);
    }
  }

 private:
  using PairTag = hn::Repartition<int16_t, CodeTag>;

  // In the order in which the bytes of a lane come apart: 0, 2, 1, 3.
  HWY_INLINE static void StorePairs(hn::Vec<CodeTag> n, int16_t* to) {
    const hn::Rebind<int16_t, CodeTag> d16;
    int16_t natural[hn::MaxLanes(CodeTag())];
    hn::StoreU(hn::DemoteTo(d16, n), d16, natural);
    for (size_t i = 0; i < hn::MaxLanes(CodeTag()); i += 4) {
      to[i] = natural[i];
      to[i + 1] = natural[i + 2];
      to[i + 2] = natural[i + 1];
      to[i + 3] = natural[i + 3];
    }
  }

  template <size_t kVectors>
  HWY_INLINE void DotTokens(const uint8_t* codes, const std::byte* next, size_t dim, size_t token,
                            float (*dots)[kBlockTokens]) const {
    const CodeTag di;
    const ScanTag d;
    const PairTag d16;
    const hn::RebindToUnsigned<CodeTag> du;
    constexpr size_t kLanes = hn::MaxLanes(CodeTag());
    const auto nibbles = hn::Set(du, 0x000f000fU);
    hn::Vec<CodeTag> sum[kHeads][kVectors];
    hn::Vec<CodeTag> rest[kHeads][kVectors];
    for (size_t h = 0; h < kHeads; ++h) {
      for (size_t v = 0; v < kVectors; ++v) sum[h][v] = rest[h][v] = hn::Zero(di);
    }
    for (size_t column = 0; column < dim / 8; ++column) {
      const auto* at = reinterpret_cast<const uint32_t*>(codes + column * kColumnBytes) + token;
      if (next != nullptr) PrefetchColumn(next, column);
      for (size_t v = 0; v < kVectors; ++v) {
        const auto pairs = hn::Load(du, at + v * kLanes);
        // Bytes 0 and 2, then 1 and 3; low nibbles, then high ones.
        const hn::Vec<PairTag> parts[4] = {
            hn::BitCast(d16, hn::And(pairs, nibbles)),
            hn::BitCast(d16, hn::And(hn::ShiftRight<8>(pairs), nibbles)),
            hn::BitCast(d16, hn::And(hn::ShiftRight<4>(pairs), nibbles)),
            hn::BitCast(d16, hn::And(hn::ShiftRight<12>(pairs), nibbles))};
        for (size_t h = 0; h < kHeads; ++h) {
          AddProducts(factors_[h] + 4 * column, dim / 2, parts, &sum[h][v], &rest[h][v]);
        }
      }
    }
    for (size_t h = 0; h < kHeads; ++h) {
      for (size_t v = 0; v < kVectors; ++v) {
        // At most 32767 * 15 in each of 256 channels: 2^27.
        const auto total = hn::RearrangeToOddPlusEven(sum[h][v], rest[h][v]);
        hn::Store(hn::ConvertTo(d, total), d, dots[h] + token + v * kLanes);
      }
    }
  }

  HWY_INLINE static void AddProducts(const int16_t* low, size_t half, const hn::Vec<PairTag>* parts,
                                     hn::Vec<CodeTag>* sum, hn::Vec<CodeTag>* rest) {
    const CodeTag di;
    const PairTag d16;
    const hn::RebindToUnsigned<CodeTag> du;
    const int16_t* from[4] = {low, low + 2, low + half, low + half + 2};
    for (size_t i = 0; i < 4; ++i) {
      const auto factor = hn::BitCast(d16, hn::Set(du, LoadFour(from[i])));
      *sum = hn::ReorderWidenMulAccumulate(di, parts[i], factor, *sum, *rest);
    }
  }

  HWY_ALIGN int16_t factors_[kHeads][kHeadDimMax];
};

#endif  // HWY_TARGET

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#endif  // KVSERVICE_ATTENTION_CPU_CODE_DOT_INL_H_
