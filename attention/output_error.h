// Upper bounds of ||o_dense - o||_2, the error that dropping tokens makes in one head's output.
//
// S is the kept set with softmax mass Z_S and output o_S, D the dropped set with weights
// z_i = e^s_i in [L_i, U_i] and Z_D = sum_D z_i. Every bound rests on one identity, for any vector
// o_S (as computed; its own error is the device's to state):
//
//     o_dense - o_S = N / (Z_S + Z_D),    N = sum_D z_i (v_i - o_S),    ||v_i - o_S|| <= b_i
//
// Errors are in units of the values, weights and masses in one common unit (2^-30 e^ref). Pure
// functions, and objects of one thread.

#ifndef KVSERVICE_ATTENTION_OUTPUT_ERROR_H_
#define KVSERVICE_ATTENTION_OUTPUT_ERROR_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/certificate.h"
#include "attention/log_mass.h"
#include "attention/sampled_bound.h"

namespace kvservice {

// ---- Without samples ----------------------------------------------------------------------------

// One dropped token, or many of them with one bound (their weights summed).
struct BoundedWeight {
  double bound = 0.0;  // b_i, rounded up.
  double lower = 0.0;  // L_i, rounded down.
  double upper = 0.0;  // U_i, rounded up.
};

// Upper bound of sum b_i z_i / (base + sum z_i) over all z with L_i <= z_i <= U_i; +infinity if
// nothing is known (a NaN, or base and all L zero while some b U is not).
//
// The derivative by z_i has the sign of b_i - f(z), so at the maximum f* each z_i is U_i where
// b_i > f* and L_i where b_i < f*. Dinkelbach's iteration f <- f(z(f)) climbs to f* in a few
// passes. How far it came does not matter for validity: for every number f and every z of the box
//
//     f(z) = f + [ sum (b_i - f) z_i - f base ] / (base + sum z_i) <= f + max(0, G) / (base + L_D),
//     G = sum max((b_i - f) L_i, (b_i - f) U_i) - f base,   L_D = sum L_i,
//
// and the right side, rounded up, is returned. Never above (max b) U_D / (base + U_D) but for
// rounding.
double LargestShareOf(absl::Span<const BoundedWeight> terms, double base);

// ||o_dense - o_S|| when o_S is the answer: LargestShareOf with base = lower end of Z_S.
inline double DroppedOutputError(absl::Span<const BoundedWeight> dropped, WeightLower kept) {
  return LargestShareOf(dropped, kept.value);
}

// ---- Mean of vectors from a sample --------------------------------------------------------------

// Bound of ||mean X_j - E X|| for independent draws X_j of a vector with ||X_j|| <= 1.
//
// For 0 <= l < 1, psi(l) = -ln(1 - l) - l, S_m = sum_{j <= m} (X_j - E X), V_m = sum ||X_j||^2:
//
//     C(l) = cosh(l ||S_m||) exp(-psi(l) V_m)   is a supermartingale started at 1.
//
// Proof. With F(x) = cosh(l ||x||), which is convex, it suffices that for all x and ||X|| <= 1
//     F(x + X) exp(-psi ||X||^2) <= F(x) + <F'(x), X>:                                     (*)
// taken at x = S - E X, in the mean over X, the right side is F(S - E X) + <F'(S - E X), E X>
// <= F(S). For (*) split X into a part a along x (|a| <= 1) and a part of norm c across it. As
// ln cosh sqrt(y) rises with slope at most 1/2, F(x + X) <= cosh(l(||x|| + a)) exp(l^2 c^2 / 2),
// and l^2 / 2 <= psi takes care of c. In the rest write cosh as two exponentials and use, on each,
// with a and with -a (Fan, Grama, Liu 2015):
//     exp(l a - psi a^2) <= 1 + l a   for |a| <= 1.
//
// So with a mixture over l (shares pi), by Ville P(ever sum_l pi_l C(l) >= 1/eta) <= eta: the
// radius is the smallest r with sum pi_l cosh(l m r) exp(-psi(l) V_m) >= 1/eta, about
// (ln(2/eta) + psi(l) V_m) / (l m) for the best l. Valid at any stopping time, any dimension. Of
// the family of Martinez-Taboada and Ramdas 2024 (arXiv 2409.06060), centred at zero; against
// Bernstein's inequality with a bounded variance it needs no second event and is a third shorter
// for the small V met here.
class VectorMeanRadius {
 public:
  // ||X_j||^2, rounded up, or any larger number (above 1 or NaN counts as 1: the norm is known to
  // be at most 1).
  void Add(double squared_norm_upper);
  uint32_t count() const { return count_; }
  // Rounded up; +infinity without draws.
  double Radius(double eta) const;

 private:
  uint32_t count_ = 0;
  double squares_ = 0.0;  // V
};

// ---- Compensation -------------------------------------------------------------------------------

// Proposal T_i = W_i * ProposalScale(b_i, b) of a dropped token: its probability is T_i over the
// sum of T. b = max over D of b_i, above 0. The scale is at least 256 b_i / b, at most 256; the
// floor keeps the bounds of Z_D, which lose a factor of max/min of the scales, from being swallowed
// by one token of a tiny value, at no cost to the vector unless value norms spread over a factor
// of 16.
inline constexpr uint32_t kProposalScaleMin = 16;
inline constexpr uint32_t kProposalScaleMax = 256;
uint32_t ProposalScale(double value_bound, double value_bound_max);

// What the draws of one head are taken from.
struct Proposals {
  uint64_t sum = 0;                        // sum_D T, exact.
  double value_bound = 0.0;                // b
  uint32_t scale_min = kProposalScaleMin;  // At most the smallest scale of D.
};

// Kept mass Z_S and known range of Z_D.
struct CompensatedMasses {
  WeightLower kept_lower;
  double kept = 0.0;  // Nearest: the weight that o_S has in the answer.
  WeightUpper kept_upper;
  WeightLower dropped_lower;
  WeightUpper dropped_upper;
};

// e^s of a drawn token: the exact one is in [lower, upper].
struct DrawnWeight {
  double lower = 0.0;
  double nearest = 0.0;
  double upper = 0.0;
};

struct CompensationResult {
  // ||o_dense - o|| for o = o_S + correction, in real arithmetic; +infinity if nothing is known.
  double error_upper = std::numeric_limits<double>::infinity();
  // Estimate of Z_D: the answer's mass is kept + dropped.
  double dropped = 0.0;
  // Z_D as far as the draws and the given range tell.
  WeightLower dropped_lower;
  WeightUpper dropped_upper;
};

// Answers the dropped part of one head from draws with replacement: an unbiased estimate N^ of N
// and Z^ of Z_D, o = o_S + N^ / (kept + Z^).
//
// With k_i = ProposalScale, p_i = T_i / sum T, Wt = b sum T / 256 and
// X = z (v - o_S) 256 / (T b): E X = N / Wt, and ||X|| <= (z / W)(256 b_i / b) / k_i <= 1.
// With Y = z kmin / T <= 1, kmin = scale_min: E Y = kmin Z_D / sum T. Hence, with failure
// probabilities 3/4 eta, eta/8, eta/8 for
//     ||N - N^|| <= rN = Wt Radius,    z_l <= Z_D <= z_u  (MeanBound of Y and of 1 - Y),
// writing t = Z_S + Z_D and t^ = kept + Z^,
//
//     o_dense - o = [ (N - N^) + (o - o_S)(t^ - t) ] / t
//     ||o_dense - o|| <= max over the ends of t of ( rN + ||o - o_S|| |t^ - t| ) / t:
//
// to the left of t^ the bound falls with t, to the right it is monotone. Rounding of drawn weights
// (`DrawnWeight`) goes into rN.
class Compensation {
 public:
  // draws_max bounds the number of Add calls. proposals.sum and value_bound are above 0.
  void Begin(uint32_t head_dim, const Proposals& proposals, uint32_t draws_max);

  // The next draw. proposal: T of the token; value, center: v_i and o_S, [head_dim].
  void Add(uint64_t proposal, const DrawnWeight& weight, const float* value, const float* center);

  uint32_t count() const { return radius_.count(); }

  // correction: [head_dim], o - o_S, overwritten. eta in (0, 1) is spent once, at a stopping time
  // of the caller's choice.
  CompensationResult Finish(const CompensatedMasses& masses, double eta, double* correction) const;

 private:
  void SetDroppedRange(const CompensatedMasses& masses, double eta,
                       CompensationResult* result) const;

  Proposals proposals_;
  VectorMeanRadius radius_;
  MeanBound mean_upper_;       // Y
  MeanBound mean_rest_upper_;  // 1 - Y
  std::vector<double> sum_;    // [head_dim] sum of X, by nearest weights.
  double weight_sum_ = 0.0;    // sum of z / T, by nearest weights.
  double weight_error_ = 0.0;  // sum of bounds of ||X - computed X||.
};

// ---- Merging ------------------------------------------------------------------------------------

// One of several answers over disjoint token sets.
struct OutputPart {
  // Mass of the part's whole token set: what the merge weighs it with, and where it truly lies.
  LogMassLower mass_lower;
  double mass_log = kLogZero;
  LogMassUpper mass_upper;
  double error = 0.0;     // E_j: bound of the part's own output error.
  double distance = 0.0;  // ||o_j - o|| to the merged output, rounded up.
};

// The part that a certificate speaks about. `lse` is what the merge weighs the part's output with,
// `distance` at least ||o_j - o||.
OutputPart OutputPartOf(const HeadCertificate& certificate, double lse, double distance);

// Error of o = sum w_j o_j, w_j = mass_j / sum mass. With true weights w*,
//     o_dense - o = sum w*_j (o_dense_j - o_j) + sum (w*_j - w_j)(o_j - o)
// because both weights sum to 1. The first sum is at most LargestShareOf(E_j over the masses'
// ranges), the second at most sum_j max |w*_j - w_j| distance_j. Failure probabilities add.
double MergedOutputError(absl::Span<const OutputPart> parts);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_OUTPUT_ERROR_H_
