// Growing a kept set after a bound was proven, and what the rounds of one call may spend.
//
// A sampled (or deterministic) bound U of Z_D speaks about the set D that was frozen when it was
// made. Tokens of D may be read afterwards and moved to the kept set without new randomness: with
// M = their exact mass and Z_S the kept mass when D was frozen,
//
//     dropped mass now = (Z_D - M) / (Z_S + Z_D)
//
// rises with Z_D (its derivative has the sign of Z_S + M >= 0) and falls with M and Z_S, so
// (U - M) / (Z_S + U) with the lower ends of M and Z_S bounds it whenever Z_D <= U. Which tokens
// move may depend on everything seen so far, drawn tokens included: the inequality is about fixed
// numbers, and only Z_D <= U is random. The same numbers as log masses, dropped U - M and kept
// Z_S + M, give the same share and merge like any others.
//
// Pure functions and plain data; any thread.

#ifndef KVSERVICE_ATTENTION_GROWING_H_
#define KVSERVICE_ATTENTION_GROWING_H_

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention/log_mass.h"

namespace kvservice {

// ln(e^bound - e^moved), rounded up: the mass that is still dropped. Never log zero unless `bound`
// is: moved reaches bound only by rounding or when the bound is wrong, and 2^-52 of it is kept.
inline LogMassUpper RemainingDropped(LogMassUpper bound, LogMassLower moved) {
  if (std::isnan(bound.value)) return {std::numeric_limits<double>::infinity()};
  if (std::isinf(bound.value) || !(moved.value > kLogZero)) return bound;
  // Down, as what is subtracted is a lower bound. By how much this lowers x outweighs the roundings
  // of expm1 and log.
  const double x = std::min(WidenDown(moved.value - bound.value), -0x1p-52);
  return {std::min(bound.value, WidenUp(bound.value + std::log(-std::expm1(x))))};
}

// (U - M) / (Z_S + U), rounded up. kept_frozen is Z_S as it was when D was frozen.
inline MassUpper GrownMass(LogMassUpper bound, LogMassLower moved, LogMassLower kept_frozen) {
  const MassUpper grown = DroppedMass(RemainingDropped(bound, moved), Add(kept_frozen, moved));
  // Moving nothing is a bound as well; it may have been rounded less often.
  return {std::min(grown.value, DroppedMass(bound, kept_frozen).value)};
}

// ln of the mass M that has to be moved to prove `limit`: M >= U - limit (Z_S + U), rounded up.
// Log zero when nothing has to. For planning: what proves the limit is GrownMass.
inline LogMassUpper MassToMove(LogMassUpper bound, LogMassLower kept_frozen, double limit) {
  assert(limit >= 0.0);
  if (limit >= 1.0 || bound.value == kLogZero) return {kLogZero};
  const double allowed = std::log(limit) - std::log1p(-limit) + kept_frozen.value;
  // U - limit (Z_S + U) = (1 - limit) (U - limit Z_S / (1 - limit)).
  if (allowed >= bound.value) return {kLogZero};
  return {WidenUp(RemainingDropped(bound, {WidenDown(allowed)}).value + std::log1p(-limit))};
}

// A bound of what was dropped when D was frozen, and what was moved out of D since.
struct FrozenBound {
  LogMassUpper bound;  // Z_D <= e^bound
  LogMassLower kept;   // Z_S when D was frozen
  LogMassLower moved;  // M
  LogMassUpper Dropped() const { return RemainingDropped(bound, moved); }
  LogMassLower Kept() const { return Add(kept, moved); }
  MassUpper Mass() const { return GrownMass(bound, moved, kept); }
};

// The failure probability of one head and call, spent round by round. A round is one plan with one
// sample under fresh random numbers; the shares 1/2, 1/4, 1/8, 1/8 give most to the round that
// nearly always suffices, and add up to 1, so whichever round the reply quotes, it is wrong with
// probability at most `total`. It may say less: spent(). For if r(n) rounds were started in the
// n-th call, the expected number of wrong replies is at most the expected sum of spent(), because a
// round that is started fails with at most its share, given everything before it. Where there will
// be one round only, it has all.
class FailureBudget {
 public:
  static constexpr uint32_t kRoundsMax = 4;

  explicit FailureBudget(double total, bool one_round = false)
      : total_(total), one_round_(one_round) {
    assert(total >= 0.0 && total < 1.0);
  }

  // False when all rounds were started, and for a total of 0 (deterministic statements only).
  bool HasNext() const { return round_ < (one_round_ ? 1 : kRoundsMax) && total_ > 0.0; }

  // Starts a round and returns its failure probability.
  double Next() {
    assert(HasNext());
    const double share = one_round_ ? 1.0 : kShares[round_];
    ++round_;
    return total_ * share;
  }

  // Rounds started: the number of the current round, from 1. Random numbers take it minus 1.
  uint32_t round() const { return round_; }
  // Sum of the started rounds' failure probabilities, rounded up; never above the total.
  double spent() const {
    const double sum = one_round_ ? total_ : total_ * kSpent[round_];
    return round_ == 0 ? 0.0 : std::min(total_, std::nextafter(sum, 1.0));
  }

 private:
  // Powers of two: products with them are exact, and so is their sum.
  static constexpr double kShares[kRoundsMax] = {0.5, 0.25, 0.125, 0.125};
  static constexpr double kSpent[kRoundsMax + 1] = {0.0, 0.5, 0.75, 0.875, 1.0};

  double total_;
  bool one_round_;
  uint32_t round_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_GROWING_H_
