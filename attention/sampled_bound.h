// Upper bound of a sum from a sample of its terms: the sampled part of the certificate.
//
// D is a set of tokens with known integer weights W_i >= e_i, where e_i >= 0 is the exact softmax
// weight in the unit of the W (2^-30 e^ref). Wanted: Z = sum_D e_i, which sum_D W bounds loosely.
// Tokens are drawn without replacement, each in proportion to W among those that remain
// (attention/draws.h), and e of each is computed. For the j-th drawn token let
//
//     A_j = sum of e over the earlier ones,  U_j = sum_D W - sum of W over the earlier ones,
//     w_j = e / W,  mu_j(z) = max(0, (z - A_j) / U_j)
//     C(z) = sum_t pi_t prod_j [ 1 - th_t + th_t (1 - w_j) / (1 - mu_j(z)) ]
//
// Why it holds. Given the past, E[w_j] = sum of W/U_j * e/W over what remains = (Z - A_j) / U_j =
// mu_j(Z), so at z = Z every factor has conditional mean 1: C is a non-negative martingale started
// at 1, and P(C(Z) ever reaches 1/eta) <= eta (Ville 1939; betting form: Waudby-Smith and Ramdas
// 2024; weighted draws without replacement: Shekhar et al. 2023, arXiv 2305.06884). Factors grow
// with z, so outside that event every z with C(z) >= 1/eta lies above Z, at any stopping time and
// however often one looks. Besides, always Z <= A_j + U_j, the *cap*: C is infinite from there on.
//
// Rounding. A too large, w too large or U too large (W of the past, as exact integers, cannot be)
// each make the factors at a given z smaller, so they are rounded up. What is left are relative
// roundings of factors, below 2^-49 each; kLogSlack covers them for up to kDrawsMax draws.
//
// How good it is. With all w alike, C(z) is (0.80 of) (0.02 + 0.98 (1 - w)/(1 - mu))^m. No method
// that sees only the w can do better than ((1 - w)/(1 - mu))^m: a part 1 - eta^(1/m) of the weight
// could have w = 1 and be missed with probability eta. The resulting slack is about
// ln(1 + (ln(1/eta)/m)(e^slack_det - 1)). The mixture over th insures against samples that hit
// tokens with w = 1; it is within 2 % of the best th in hindsight.
//
// Everything is in units of the weights. Objects: one thread each.

#ifndef KVSERVICE_ATTENTION_SAMPLED_BOUND_H_
#define KVSERVICE_ATTENTION_SAMPLED_BOUND_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention/log_mass.h"

namespace kvservice {

// Sums of softmax weights in units of 2^-30 e^ref, rounded to a side.
struct WeightUpper {
  double value = std::numeric_limits<double>::infinity();
};
struct WeightLower {
  double value = 0.0;
};

inline constexpr double kLnWeightsPerUnit = 20.79441541679835928;  // 30 ln 2
// How often C is looked at. A look costs time (0.2 us after 128 draws), never confidence.
inline constexpr uint32_t kDrawsPerLook = 32;

// ln of a sum of weights whose unit is 2^-30 e^ref, and back. `ref` is finite.
LogMassUpper LogMassOf(WeightUpper sum, double ref);
LogMassLower LogMassOf(WeightLower sum, double ref);
WeightUpper WeightOf(LogMassUpper mass, double ref);
WeightLower WeightOf(LogMassLower mass, double ref);

// The largest Z_D with Z_D / (kept + Z_D) <= limit, rounded down: what a test has to certify.
// 0 <= limit; infinite for limit >= 1. Smaller by one part in 2^30 than it might be, so that the
// share is still within the limit after LogMassOf and DroppedMass rounded it up.
double LargestDropped(double limit, WeightLower kept);

// ln C(z) for a sequence of draws.
class BettingCapital {
 public:
  static constexpr size_t kDrawsMax = size_t{1} << 20;

  // Starts over, with room for `draws_max` draws.
  void Begin(size_t draws_max);

  // Factor 1 - th + th rest width / min(width, cap - z). In the terms above: rest = 1 - w_j,
  // width = U_j, cap = A_j + U_j, both rounded up. 0 <= rest <= 1, 0 < width <= cap.
  void Add(double rest, double width, double cap);

  size_t count() const { return count_; }

  // +infinity where z reaches a cap. NaN gives -infinity: nothing is certified.
  double LogAt(double z) const;

  // True if ln C(z) >= ln(1/eta) beyond all rounding; eta = 0 certifies at a cap only.
  bool Reaches(double z, double eta) const;

  // A z of (0, high] that Reaches and exceeds the smallest such z by at most one part in 2^20 of
  // it, else `high`. high > 0 is finite.
  double SmallestReaching(double eta, double high) const;

 private:
  double LogAtBelowCap(double z) const;

  static constexpr size_t kLanes = 4;
  size_t count_ = 0;
  double cap_ = std::numeric_limits<double>::infinity();  // The smallest one.
  // [draws_max rounded up to kLanes]; places beyond count_ hold factors of 1.
  std::vector<double> gain_;  // rest * width
  std::vector<double> width_;
  std::vector<double> caps_;
};

// Upper bound of Z from a sample without replacement.
class SampledBound {
 public:
  // weight_sum: sum_D W, exact. draws_max bounds the number of Add calls.
  void Begin(uint64_t weight_sum, uint32_t draws_max);

  // The next drawn token: its weight and its exact softmax weight, rounded up (larger than the
  // weight or NaN counts as the weight, which is a bound too). The weights added may not exceed
  // weight_sum.
  void Add(uint64_t weight, double exact_upper);

  uint32_t count() const { return static_cast<uint32_t>(capital_.count()); }

  // True proves Z <= z, with failure probability eta for all calls and all z of this sample
  // together. Needs one evaluation of C.
  bool Certifies(double z, double eta) const;

  // The best bound, with failure probability eta as above; never above DeterministicBound. Some ten
  // evaluations of C.
  WeightUpper UpperBound(double eta) const;

  // The cap: exact weights of drawn tokens plus W of the others. Holds always, whatever was drawn;
  // it is sum_D W without draws and Z itself once everything was drawn (rounded up).
  WeightUpper DeterministicBound() const { return {cap_}; }

 private:
  BettingCapital capital_;
  uint64_t remaining_ = 0;  // U_j
  double exact_ = 0.0;      // A_j
  double cap_ = 0.0;
};

// Upper bound of the mean of numbers in [0, 1] from independent draws (with replacement): the same
// martingale with A = 0 and U = 1.
class MeanBound {
 public:
  void Begin(uint32_t draws_max) { capital_.Begin(draws_max); }
  // A drawn number, rounded up; above 1 or NaN counts as 1.
  void Add(double number_upper);
  // With failure probability eta, at any stopping time. 1 without draws.
  double UpperBound(double eta) const { return capital_.SmallestReaching(eta, 1.0); }

 private:
  BettingCapital capital_;
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SAMPLED_BOUND_H_
