// What the kernels of this folder share in vector registers: widening a row, and adding up the
// lanes of many sums at once.
//
// Included once per target; the guard toggles.

#if defined(KVSERVICE_ATTENTION_CPU_VECTOR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSERVICE_ATTENTION_CPU_VECTOR_INL_H_
#undef KVSERVICE_ATTENTION_CPU_VECTOR_INL_H_
#else
#define KVSERVICE_ATTENTION_CPU_VECTOR_INL_H_
#endif

#include <cstddef>
#include <cstring>

#include "attention/kv_layout.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Binary16 numbers as floats, infinities and NaN included: those must not become numbers. Where no
// instruction converts, Highway 1.0 takes them for 2^16 and more, so there this does what
// attention/float16.h does.
template <class D>
HWY_INLINE hn::Vec<D> WidenHalves(D d, const uint16_t* from) {
#if HWY_TARGET == HWY_SSE4 || defined(HWY_DISABLE_F16C)
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint16_t, D> d16;
  const auto bits = hn::PromoteTo(di, hn::LoadU(d16, from));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(di, 0x8000)));
  const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(di, 0x7fff)));
  const auto finite = hn::Lt(magnitude, hn::Set(di, 0x0f800000));
  const auto scaled = hn::BitCast(di, hn::Mul(hn::BitCast(d, magnitude), hn::Set(d, 0x1p112F)));
  const auto other = hn::Or(magnitude, hn::Set(di, 0x70000000));
  return hn::BitCast(d, hn::Or(sign, hn::IfThenElse(finite, scaled, other)));
#else
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(from)));
#endif
}

// Widens 2 * Lanes(d) elements of a row, from element `channel` (a multiple of that many), into two
// vectors. In which order is FillChannelOrder's business: two bfloat16 in a 32-bit lane come apart
// with a shift and a mask, which costs no shuffle.
template <DType kType, class D, class V = hn::Vec<D>>
HWY_INLINE void LoadChunk(D d, const std::byte* row, size_t channel, V* first, V* second) {
  constexpr size_t kLanes = hn::MaxLanes(D());
  if constexpr (kType == DType::kFloat32) {
    const auto* from = reinterpret_cast<const float*>(row) + channel;
    *first = hn::LoadU(d, from);
    *second = hn::LoadU(d, from + kLanes);
  } else if constexpr (kType == DType::kFloat16) {
    const auto* from = reinterpret_cast<const uint16_t*>(row) + channel;
    *first = WidenHalves(d, from);
    *second = WidenHalves(d, from + kLanes);
  } else {
    const hn::RebindToUnsigned<D> du;
    const auto pairs = hn::LoadU(du, reinterpret_cast<const uint32_t*>(row) + channel / 2);
    *first = hn::BitCast(d, hn::ShiftLeft<16>(pairs));
    *second = hn::BitCast(d, hn::And(pairs, hn::Set(du, 0xFFFF0000U)));
  }
}

// The channel that LoadChunk puts at each place of a row of widened chunks, [head_dim].
template <size_t kLanes>
HWY_INLINE void FillChannelOrder(const KvLayout& layout, uint16_t* order) {
  const bool pairs = layout.dtype == DType::kBfloat16;
  for (size_t chunk = 0; chunk < layout.head_dim; chunk += 2 * kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      order[chunk + lane] = static_cast<uint16_t>(chunk + (pairs ? 2 * lane : lane));
      order[chunk + kLanes + lane] =
          static_cast<uint16_t>(chunk + (pairs ? 2 * lane + 1 : kLanes + lane));
    }
  }
}

// In every 128-bit block: the sums of that block of a, b, c and e.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SumOfFour(D d, V a, V b, V c, V e) {
  const hn::Repartition<uint64_t, D> d64;
  const V ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const V ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto ab64 = hn::BitCast(d64, ab);
  const auto ce64 = hn::BitCast(d64, ce);
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, ab64, ce64)),
                 hn::BitCast(d, hn::InterleaveUpper(d64, ab64, ce64)));
}

// Adds up the lanes of [Lanes / 4][4] vectors: block h of the result holds the sums of row h. As
// many shuffles for all as one sum alone would need several times over.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SumTile(D d, const V (*rows)[4]) {
  constexpr size_t kRows = hn::MaxLanes(D()) / 4;
  V blocks[kRows];
#pragma GCC unroll 4
  for (size_t h = 0; h < kRows; ++h) {
    blocks[h] = SumOfFour(d, rows[h][0], rows[h][1], rows[h][2], rows[h][3]);
  }
  if constexpr (kRows == 1) {
    return blocks[0];
  } else if constexpr (kRows == 2) {
    return hn::Add(hn::ConcatLowerLower(d, blocks[1], blocks[0]),
                   hn::ConcatUpperUpper(d, blocks[1], blocks[0]));
  } else {
    // Halves: [0 0 2 2] and [1 1 3 3], two blocks of each row; then the even and odd blocks of
    // both.
    const V even = hn::Add(hn::ConcatLowerLower(d, blocks[2], blocks[0]),
                           hn::ConcatUpperUpper(d, blocks[2], blocks[0]));
    const V odd = hn::Add(hn::ConcatLowerLower(d, blocks[3], blocks[1]),
                          hn::ConcatUpperUpper(d, blocks[3], blocks[1]));
    return hn::Add(hn::OddEvenBlocks(odd, even),
                   hn::SwapAdjacentBlocks(hn::OddEvenBlocks(even, odd)));
  }
}

// Stores the sums of the first kHeads rows, four each, `stride` elements apart.
template <size_t kHeads, class D, class V = hn::Vec<D>, class T = hn::TFromD<D>>
HWY_INLINE void StoreTileSums(D d, const V (*rows)[4], T* HWY_RESTRICT to, size_t stride) {
  HWY_ALIGN T lanes[hn::MaxLanes(D())];
  hn::Store(SumTile(d, rows), d, lanes);
#pragma GCC unroll 4
  for (size_t h = 0; h < kHeads; ++h) std::memcpy(to + h * stride, lanes + 4 * h, 4 * sizeof(T));
}

// out[r][i] = sum of the lanes of rows[r][i], for four rows.
template <class D, class V = hn::Vec<D>, class T = hn::TFromD<D>>
HWY_INLINE void StoreRowSums(D d, const V (*rows)[4], T (*out)[4]) {
  constexpr size_t kTileRows = hn::MaxLanes(D()) / 4;
#pragma GCC unroll 4
  for (size_t r = 0; r < 4; r += kTileRows) StoreTileSums<kTileRows>(d, rows + r, out[r], 4);
}

// The first four lanes.
template <class D, class V = hn::Vec<D>>
HWY_INLINE hn::Vec<hn::CappedTag<hn::TFromD<D>, 4>> LowestFour([[maybe_unused]] D d, V v) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return LowestFour(half, hn::LowerHalf(half, v));
  }
}

// Folds the lanes of each of four vectors with fold(V, V); the results side by side.
template <class D, class V = hn::Vec<D>, class Fold>
HWY_INLINE hn::Vec<hn::CappedTag<hn::TFromD<D>, 4>> FoldFour(D d, const V* rows, const Fold& fold) {
  const hn::Repartition<uint64_t, D> d64;
  const V ab =
      fold(hn::InterleaveLower(d, rows[0], rows[1]), hn::InterleaveUpper(d, rows[0], rows[1]));
  const V ce =
      fold(hn::InterleaveLower(d, rows[2], rows[3]), hn::InterleaveUpper(d, rows[2], rows[3]));
  const auto ab64 = hn::BitCast(d64, ab);
  const auto ce64 = hn::BitCast(d64, ce);
  V all = fold(hn::BitCast(d, hn::InterleaveLower(d64, ab64, ce64)),
               hn::BitCast(d, hn::InterleaveUpper(d64, ab64, ce64)));
  if constexpr (hn::MaxLanes(D()) > 8) all = fold(all, hn::ReverseBlocks(d, all));
  if constexpr (hn::MaxLanes(D()) > 4) all = fold(all, hn::SwapAdjacentBlocks(all));
  return LowestFour(d, all);
}

// The largest lane of each of four vectors, and their sums.
template <class D, class V = hn::Vec<D>>
HWY_INLINE auto MaxOfFour(D d, const V* rows) {
  return FoldFour(d, rows, [](V a, V b) HWY_ATTR { return hn::Max(a, b); });
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE auto SumsOfFour(D d, const V* rows) {
  return FoldFour(d, rows, [](V a, V b) HWY_ATTR { return hn::Add(a, b); });
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#endif  // KVSERVICE_ATTENTION_CPU_VECTOR_INL_H_
