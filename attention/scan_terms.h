// The scan formula (certificate specification section 2): from a query head and a sketch page to an
// estimate s^ of every logit and a bound eps of its error, |s - s^| <= eps for every query, where
// s = scale * q.k before soft-cap. This header is the one home of the formula; a device that
// evaluates it in vector registers mirrors these lines and is tested against them. Pure; any
// thread.
//
// Why it holds. A sketched key is k = lo + (code + .5) step + e = mid + (code - 7.5) step + e with
// mid = lo + 8 step, so for any qw
//
//     qs.k - s^ = p.e + sum_j qw_j (W_j.e - ps_j pj_j),      qs = scale q,  p = qs - W qw
//
// The sum is at most P = sum_j |qw_j| ps_j / 2, because pj is rounded to nearest. For any b with
// 0 <= b_c <= x_c = |p_c| / M_c,
//
//     |p.e| <= sum_c x_c M_c |e_c| <= ||b|| ||M e|| + sum_c (x_c - b_c) M_c h_c = B ||M e|| + A
//
// by Cauchy-Schwarz on the first part and the cell |e_c| <= h_c on the second. Here
// b_c = min(x_c, mu h_c M_c) with mu = ||x|| / hn, within 0.01 nat of the best b.
//
// Rounding (unit roundoff u) does not enter through b, qw or mu, of which any value is valid, but
//   - in s^ and p, where a term passes through at most 2 d + 8 roundings (qs, mid, the product, the
//     sum mm and the sum of the rest, in any order). The absolute terms add up to the bracket of g
//     (|pj| <= 127, and p meets residuals of at most h), so the error is below 2 (d + 16) u times
//     the bracket, with room for the roundings of s^ - eps and s^ + eps;
//   - in the non-negative sums A, B and P, relative errors of (d + 4) u < 2^-15. The factor
//     1 + 2^-12 covers them and the 2^-13 by which a stored projection may miss ps_j / 2;
//   - by underflow, which kScanFloor covers where there is no flush-to-zero.
// Results that are not finite mean "nothing is known". They are not masked here.

#ifndef KVSERVICE_ATTENTION_SCAN_TERMS_H_
#define KVSERVICE_ATTENTION_SCAN_TERMS_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention/float16.h"
#include "attention/log_mass.h"
#include "attention/sketch.h"
#include "attention/sketch_table.h"

namespace kvservice {

inline constexpr uint32_t kSketchDirectionsMax = SketchDirections(kHeadDimMax);

// Twice the unit roundoff, and what underflow may lose (float: 2^-126 sums times norms of up to
// 2^39; double: nothing).
template <typename Real>
inline constexpr Real kScanRoundoff = std::is_same_v<Real, float> ? Real(0x1p-23) : Real(0x1p-52);
template <typename Real>
inline constexpr Real kScanFloor = std::is_same_v<Real, float> ? Real(1e-6) : Real(1e-14);
// Allowance for the relative errors of A, B and P.
inline constexpr double kScanMargin = 1.0 + 0x1p-12;

// What a scan needs of one query head, for all pages of one KV head.
template <typename Real>
struct QueryTerms {
  std::array<Real, kHeadDimMax> qs;             // scale * q
  std::array<Real, kHeadDimMax> x;              // |p_c| / M_c
  std::array<Real, kSketchDirectionsMax> qw{};  // (W / M^2)^T qs
  Real x_norm = 0;                              // ||x||
  Real weight = 0;                              // ||qs|| + sum_j |qw_j| ||W_j||
};

// What a scan needs of one query head and one page.
template <typename Real>
struct PageTerms {
  Real mm = 0;                                  // sum_c qs_c mid_c
  std::array<Real, kHeadDimMax> a;              // qs_c step_c, the factor of code - 7.5
  std::array<Real, kSketchDirectionsMax> qp{};  // qw_j ps_j, the factor of pj
  Real eps_base = 0;                            // (1 + 2^-12) (A + sum_j |qw_j| ps_j / 2) + g
  Real eps_radius = 0;                          // (1 + 2^-12) B rmax, the factor of kRadiusScale[r]
};

template <typename Real>
QueryTerms<Real> MakeQueryTerms(uint32_t head_dim, float scale, const float* q,
                                const SketchTable& table) {
  QueryTerms<Real> terms;
  std::array<Real, kHeadDimMax> p;
  Real squares = 0;
  for (uint32_t c = 0; c < head_dim; ++c) {
    terms.qs[c] = static_cast<Real>(scale) * static_cast<Real>(q[c]);
    p[c] = terms.qs[c];
    squares += terms.qs[c] * terms.qs[c];
  }
  terms.weight = std::sqrt(squares);
  for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
    const float* w = &table.weights[j * head_dim];
    Real along = 0;
    Real w_squares = 0;
    for (uint32_t c = 0; c < head_dim; ++c) {
      const Real m = table.metric[c];
      along += static_cast<Real>(w[c]) / (m * m) * terms.qs[c];
      w_squares += static_cast<Real>(w[c]) * static_cast<Real>(w[c]);
    }
    for (uint32_t c = 0; c < head_dim; ++c) p[c] -= along * static_cast<Real>(w[c]);
    terms.qw[j] = along;
    terms.weight += std::fabs(along) * std::sqrt(w_squares);
  }
  squares = 0;
  for (uint32_t c = 0; c < head_dim; ++c) {
    terms.x[c] = std::fabs(p[c]) / static_cast<Real>(table.metric[c]);
    squares += terms.x[c] * terms.x[c];
  }
  terms.x_norm = std::sqrt(squares);
  return terms;
}

template <typename Real>
PageTerms<Real> MakePageTerms(const SketchLayout& layout, const SketchPage& page,
                              const SketchTable& table, const QueryTerms<Real>& query) {
  constexpr Real kMargin = static_cast<Real>(kScanMargin);
  PageTerms<Real> terms;
  const Real mu = query.x_norm / std::max(static_cast<Real>(page.hn), Real(1e-30));
  Real outside_ball = 0;  // A
  Real b_squares = 0;
  Real h_squares = 0;
  Real size = 0;  // The bracket of g.
  for (uint32_t c = 0; c < layout.dim; ++c) {
    const Real step = FloatFromFloat16(page.step[c]);
    const Real mid = static_cast<Real>(page.lo[c]) + 8 * step;
    const Real h = step / 2 * kMargin;
    const Real hm = h * static_cast<Real>(table.metric[c]);
    const Real b = std::min(query.x[c], mu * hm);
    outside_ball += hm * (query.x[c] - b);
    b_squares += b * b;
    h_squares += h * h;
    terms.mm += query.qs[c] * mid;
    terms.a[c] = query.qs[c] * step;
    size += std::fabs(query.qs[c]) * (std::fabs(mid) + 8 * step);
  }
  Real half_steps = 0;  // P
  for (uint32_t j = 0; j < layout.direction_count; ++j) {
    terms.qp[j] = query.qw[j] * static_cast<Real>(page.ps[j]);
    half_steps += std::fabs(terms.qp[j]) / 2;
    size += 127 * std::fabs(terms.qp[j]);
  }
  size += query.weight * std::sqrt(h_squares);
  const Real g = static_cast<Real>(layout.dim + 16) * kScanRoundoff<Real> * size + kScanFloor<Real>;
  terms.eps_base = kMargin * (outside_ball + half_steps) + g;
  terms.eps_radius = kMargin * std::sqrt(b_squares) * static_cast<Real>(page.rmax);
  return terms;
}

// s^ of one token, before soft-cap.
template <typename Real>
Real EstimateLogit(const SketchLayout& layout, const SketchPage& page, uint32_t token,
                   const PageTerms<Real>& terms) {
  const uint32_t half = layout.dim / 2;
  Real sum = terms.mm;
  for (uint32_t c = 0; c < half; ++c) {
    const uint8_t pair = page.codes[CodeOffset(token, c)];
    sum += terms.a[c] * (static_cast<Real>(pair & 15) - Real(7.5));
    sum += terms.a[c + half] * (static_cast<Real>(pair >> 4) - Real(7.5));
  }
  for (uint32_t j = 0; j < layout.direction_count; ++j) {
    sum += terms.qp[j] * static_cast<Real>(page.pj[j * kBlockTokens + token]);
  }
  return sum;
}

// eps of one token, before soft-cap.
template <typename Real>
Real LogitError(const SketchPage& page, uint32_t token, const PageTerms<Real>& terms) {
  return terms.eps_base + terms.eps_radius * static_cast<Real>(kRadiusScale[page.r[token]]);
}

// The logit soft-cap: cap * tanh(s / cap), or s when cap is 0. It rises with s, so it is applied to
// both ends of an interval; each end is rounded outward (the libm's tanh is within 2 ulps, and its
// result is widened by more).
inline double Softcap(float cap, double s) {
  if (!(cap > 0.0F)) return s;
  return static_cast<double>(cap) * std::tanh(s / static_cast<double>(cap));
}
inline double SoftcapUp(float cap, double s) { return cap > 0.0F ? WidenUp(Softcap(cap, s)) : s; }
inline double SoftcapDown(float cap, double s) {
  return cap > 0.0F ? WidenDown(Softcap(cap, s)) : s;
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SCAN_TERMS_H_
