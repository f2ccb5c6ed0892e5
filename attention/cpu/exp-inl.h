// e^x in vector registers, times a power of two that the caller chooses: sums of exponentials refer
// to a power of two instead of to their largest term, so that changing the reference is exact and
// neither 2^-24 |x - reference| nor a chain of rescalings enters an error bound.
//
// Included once per target; the guard toggles.

#if defined(KVSERVICE_ATTENTION_CPU_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSERVICE_ATTENTION_CPU_EXP_INL_H_
#undef KVSERVICE_ATTENTION_CPU_EXP_INL_H_
#else
#define KVSERVICE_ATTENTION_CPU_EXP_INL_H_
#endif

#include "attention/cpu/exp.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// x log2 e + kRoundingMagic: in its low bits, the power of two nearest to e^x. Rises with x, so the
// exponent of a maximum is the maximum of exponents. |x| is at most 2^21.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V ExpExponentBits(D d, V x) {
  return hn::MulAdd(x, hn::Set(d, kLog2E), hn::Set(d, kRoundingMagic));
}

// e^x 2^-reference with a relative error of kExpError + kExpArgumentError |x| for |x| <=
// -kLogitMin; 0 where the result would be below 2^-126. Requires that the result is below 2^127.
// Anything else, NaN included, gives some number or none.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V ExpScaledWithin(D d, V x, hn::Vec<hn::RebindToSigned<D>> reference) {
  const hn::RebindToSigned<D> di;
  const V bits = ExpExponentBits(d, x);
  const V n = hn::Sub(bits, hn::Set(d, kRoundingMagic));
  // Cody-Waite: ln 2 in three parts, of which the first two have nine bits, so that their products
  // are exact for |n| < 2^15 even where a fused multiply-add is emulated.
  V r = hn::NegMulAdd(n, hn::Set(d, kLn2High), x);
  r = hn::NegMulAdd(n, hn::Set(d, kLn2Middle), r);
  r = hn::NegMulAdd(n, hn::Set(d, kLn2Low), r);
  // e^r = 1 + r + r^2 P(r), P interpolated at Chebyshev nodes of |r| <= 0.35: off by 1.1e-8.
  V p = hn::MulAdd(r, hn::Set(d, 0x1.6d15f8p-10F), hn::Set(d, 0x1.12105cp-7F));
  p = hn::MulAdd(r, p, hn::Set(d, 0x1.555516p-5F));
  p = hn::MulAdd(r, p, hn::Set(d, 0x1.5554d8p-3F));
  p = hn::MulAdd(r, p, hn::Set(d, 0.5F));
  p = hn::Add(hn::MulAdd(hn::Mul(r, r), p, r), hn::Set(d, 1.0F));
  // 2^(n - reference); an exponent field of 0 makes it zero.
  const auto zero_exponent =
      hn::Add(reference, hn::Set(di, kRoundingMagicBits - kFloatExponentBias));
  const auto field = hn::Max(hn::Sub(hn::BitCast(di, bits), zero_exponent), hn::Zero(di));
  return hn::Mul(p, hn::BitCast(d, hn::ShiftLeft<23>(field)));
}

// The same for every x: what is below kLogitMin (-infinity marks absent terms) gives 0, because
// references are at least kReferenceMin; NaN stays NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V ExpScaled(D d, V x, hn::Vec<hn::RebindToSigned<D>> reference) {
  // The second operand survives a comparison with NaN.
  x = hn::Max(hn::Set(d, kLogitMin), hn::Min(hn::Set(d, -kLogitMin), x));
  return ExpScaledWithin(d, x, reference);
}

// cap tanh(x / cap), within kTanhError cap; NaN stays NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V SoftcapVector(D d, V x, V cap) {
  // With e = exp(-2 |y|) in (0, 1], tanh |y| = (1 - e) / (1 + e): an error of e counts at most
  // half.
  const V y = hn::Div(x, cap);
  const V e =
      ExpScaled(d, hn::Mul(hn::Abs(y), hn::Set(d, -2.0F)), hn::Zero(hn::RebindToSigned<D>()));
  const V one = hn::Set(d, 1.0F);
  const V tanh = hn::Div(hn::Sub(one, e), hn::Add(one, e));
  return hn::Mul(cap, hn::CopySign(tanh, x));
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#endif  // KVSERVICE_ATTENTION_CPU_EXP_INL_H_
