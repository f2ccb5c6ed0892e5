// Dot products of the 4-bit codes of a page with real factors, for several heads at once: factors
// become integers, products and sums are exact. A vector lane holds one token (see CodeOffset in
// attention/sketch.h), so nothing is ever added across lanes.
//
// Coarse factors are one signed byte where the processor multiplies bytes (AVX3_DL) and 16 bits
// elsewhere. They err by at most 1/254 of the largest factor in a channel, which adds less than a
// tenth to what 4-bit codes miss themselves: good enough to choose by. Fine factors have 23 bits,
// so that rounding them costs a bound nothing.
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

// What a head's integer factors n_c stand for: a_c is about scale * n_c.
struct FactorSums {
  float scale = 0.0F;
  // To be added over lanes: coarse, sum_c n_c (exact, below 2^24); fine, sum_c |a_c - scale n_c|.
  hn::Vec<ScanTag> sum;
};

// Below 2^22, the domain of rounding by addition.
constexpr float kFineFactorMax = 4'194'000.0F;

// Rounds a[dim] to integers of at most `limit` and hands them in vectors to store(channel, vector).
template <bool kFine, class Store>
HWY_INLINE FactorSums RoundFactors(const float* HWY_RESTRICT a, size_t dim, float largest,
                                   float limit, const Store& store) {
  const ScanTag d;
  const CodeTag di;
  // Factors so small that the quotient would overflow are all miss.
  constexpr float kLeast = 1e-30F;
  const bool usable = largest > kLeast;
  FactorSums sums;
  sums.scale = usable ? largest / limit : 0.0F;
  const auto inverse = hn::Set(d, usable ? limit / largest : 0.0F);
  const auto scale = hn::Set(d, sums.scale);
  const auto magic = hn::Set(d, kRoundingMagic);
  sums.sum = hn::Zero(d);
  for (size_t c = 0; c < dim; c += hn::Lanes(d)) {
    const auto factor = hn::Load(d, a + c);
    const auto rounded = hn::MulAdd(factor, inverse, magic);
    const auto n = hn::Sub(rounded, magic);
    store(c, hn::Sub(hn::BitCast(di, rounded), hn::Set(di, kRoundingMagicBits)));
    if constexpr (kFine) {
      sums.sum = hn::Add(sums.sum, hn::Abs(hn::NegMulAdd(n, scale, factor)));
    } else {
      sums.sum = hn::Add(sums.sum, n);
    }
  }
  return sums;
}

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

// Signed bytes of n, the lowest first: n = 2^16 bytes[2] + 2^8 bytes[1] + bytes[0].
template <size_t kParts>
HWY_INLINE void SplitBytes(hn::Vec<CodeTag> n, hn::Vec<CodeTag>* bytes) {
  const CodeTag di;
#pragma GCC unroll 3
  for (size_t part = 0; part + 1 < kParts; ++part) {
    const auto above = hn::ShiftRight<8>(hn::Add(n, hn::Set(di, 128)));
    bytes[part] = hn::Sub(n, hn::ShiftLeft<8>(above));
    n = above;
  }
  bytes[kParts - 1] = n;
}

template <size_t kHeads, bool kFine>
class CodeFactors {
 public:
  HWY_INLINE FactorSums Quantize(const float* HWY_RESTRICT a, size_t dim, float largest,
                                 size_t head) {
    const hn::Rebind<int8_t, CodeTag> d8;
    return RoundFactors<kFine>(a, dim, largest, kFine ? kFineFactorMax : 127.0F,
                               [=, this](size_t c, hn::Vec<CodeTag> n) HWY_ATTR {
                                 hn::Vec<CodeTag> bytes[kParts];
                                 SplitBytes<kParts>(n, bytes);
#pragma GCC unroll 3
                                 for (size_t part = 0; part < kParts; ++part) {
                                   hn::Store(hn::DemoteTo(d8, bytes[part]), d8,
                                             factors_[part][head] + c);
                                 }
                               });
  }

  // dots[head][token] = sum_c n_c code_c, with one or two roundings if fine. `next` is the page
  // that will be asked for next.
  HWY_INLINE void Dot(const uint8_t* codes, const std::byte* next, size_t dim,
                      float (*dots)[kBlockTokens]) const {
    constexpr size_t kVectors = kFine ? 2 : 4;
    for (size_t token = 0; token < kBlockTokens; token += kVectors * hn::MaxLanes(CodeTag())) {
      DotTokens<kVectors>(codes, token == 0 ? next : nullptr, dim, token, dots);
    }
  }

 private:
  static constexpr size_t kParts = kFine ? 3 : 1;

  template <size_t kVectors>
  HWY_INLINE void DotTokens(const uint8_t* codes, const std::byte* next, size_t dim, size_t token,
                            float (*dots)[kBlockTokens]) const {
    const CodeTag di;
    constexpr size_t kLanes = hn::MaxLanes(CodeTag());
    const auto nibble = hn::Set(di, 0x0f0f0f0f);
    hn::Vec<CodeTag> sum[kParts][kHeads][kVectors];
#pragma GCC unroll 3
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
#pragma GCC unroll 3
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
        auto total = hn::ConvertTo(d, sum[kParts - 1][h][v]);
        if constexpr (kFine) {
          const auto low = hn::Add(hn::ShiftLeft<8>(sum[1][h][v]), sum[0][h][v]);
          total = hn::MulAdd(total, hn::Set(d, 65536.0F), hn::ConvertTo(d, low));
        }
        hn::Store(total, d, dots[h] + token + v * kLanes);
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
  HWY_INLINE FactorSums Quantize(const float* HWY_RESTRICT a, size_t dim, float largest,
                                 size_t head) {
    const CodeTag di;
    return RoundFactors<kFine>(
        a, dim, largest, kFine ? kFineFactorMax : 32767.0F,
        [=, this](size_t c, hn::Vec<CodeTag> n) HWY_ATTR {
          if constexpr (kFine) {
            const auto above = hn::ShiftRight<8>(hn::Add(n, hn::Set(di, 128)));
            StorePairs(hn::Sub(n, hn::ShiftLeft<8>(above)), factors_[0][head] + c);
            n = above;
          }
          StorePairs(n, factors_[kParts - 1][head] + c);
        });
  }

  // dots[head][token] = sum_c n_c code_c, with one or two roundings if fine. `next` is the page
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
  static constexpr size_t kParts = kFine ? 2 : 1;

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
    hn::Vec<CodeTag> sum[kParts][kHeads][kVectors];
    hn::Vec<CodeTag> rest[kParts][kHeads][kVectors];
    for (size_t part = 0; part < kParts; ++part) {
      for (size_t h = 0; h < kHeads; ++h) {
        for (size_t v = 0; v < kVectors; ++v) sum[part][h][v] = rest[part][h][v] = hn::Zero(di);
      }
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
        for (size_t part = 0; part < kParts; ++part) {
          for (size_t h = 0; h < kHeads; ++h) {
            AddProducts(factors_[part][h] + 4 * column, dim / 2, parts, &sum[part][h][v],
                        &rest[part][h][v]);
          }
        }
      }
    }
    for (size_t h = 0; h < kHeads; ++h) {
      for (size_t v = 0; v < kVectors; ++v) {
        const auto low = hn::RearrangeToOddPlusEven(sum[0][h][v], rest[0][h][v]);
        auto total = hn::ConvertTo(d, low);
        if constexpr (kFine) {
          const auto high = hn::RearrangeToOddPlusEven(sum[1][h][v], rest[1][h][v]);
          total = hn::MulAdd(hn::ConvertTo(d, high), hn::Set(d, 256.0F), total);
        }
        hn::Store(total, d, dots[h] + token + v * kLanes);
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

  HWY_ALIGN int16_t factors_[kParts][kHeads][kHeadDimMax];
};

#endif  // HWY_TARGET

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#endif  // KVSERVICE_ATTENTION_CPU_CODE_DOT_INL_H_
