#include "attention/head_proof.h"

#include <algorithm>
#include <cmath>

#include "attention/lanes.h"
#include "attention/rounding.h"

namespace kvservice {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Samples without a limit to stop at: enough for a bound within a fifth of the truth.
constexpr uint32_t kDrawsWithoutLimit = 128;
// Wanted tokens are chosen by estimates; this much more than needed of them.
constexpr double kLogHeadroom = 0.1;
// Share of a limit on the output error that growing aims at.
constexpr double kPlannedErrorShare = 0.9;
// Norms of vectors of up to 256 doubles or floats.
constexpr double kNormMargin = 1.0 + 0x1p-40;

double NormUp(const float* vector, uint32_t size) {
  return std::sqrt(SumOfSquares(vector, size)) * kNormMargin;
}

bool HasMassLimit(const Plan& plan) { return plan.max_dropped_mass < 1.0F; }
bool HasOutputLimit(const Plan& plan) { return std::isfinite(plan.max_output_error); }

// ln of e^a - e^b, to nearest; log zero unless a > b.
double LogDifference(double a, double b) {
  if (!(a > b)) return kLogZero;
  return a + std::log(-std::expm1(b - a));
}

}  // namespace

void HeadProof::Begin(const Plan& plan, uint32_t head_dim,
                      std::span<const std::byte, kDrawKeyBytes> key, const DrawStream& stream) {
  plan_ = plan;
  head_dim_ = head_dim;
  std::copy(key.begin(), key.end(), key_.begin());
  stream_ = stream;
  const double eta = plan.prove == Guarantee::kConfidence ? plan.failure_probability : 0.0;
  const bool grows = plan.on_violation == OnViolation::kGrow && plan.mode == Mode::kEnforce;
  mass_budget_ = FailureBudget(eta, !grows);
  output_budget_ = FailureBudget(eta, !grows);
  has_sample_ = false;
  sampled_ = FrozenBound();
  ratio_ = 1.0;
  certificate_ = HeadCertificate();
  log_wanted_ = kLogZero;
  correction_.clear();
}

DrawStream HeadProof::StreamOf(DrawPurpose purpose, const FailureBudget& budget) const {
  DrawStream stream = stream_;
  stream.purpose = purpose;
  stream.round = static_cast<uint8_t>(budget.round() - 1);
  return stream;
}

bool HeadProof::MassMet() const {
  return !HasMassLimit(plan_) ||
         certificate_.dropped_mass_upper.value <= static_cast<double>(plan_.max_dropped_mass);
}

bool HeadProof::OutputMet() const {
  return !HasOutputLimit(plan_) ||
         RelativeOutputError(certificate_) <= static_cast<double>(plan_.max_output_error);
}

bool HeadProof::WantsMassSample() const {
  if (!HasMassLimit(plan_)) return !HasOutputLimit(plan_);
  return !MassMet();
}

// The better of what holds always and what the sample says.
void HeadProof::SetMasses(const HeadEvidence& evidence, const FrozenBound& bound, Level level) {
  certificate_.level = level;
  certificate_.log_kept = evidence.log_kept;
  certificate_.log_kept_lower = evidence.kept_lower;
  certificate_.log_kept_upper = evidence.kept_upper;
  certificate_.dropped_mass_estimate = -1.0F;
  const double share = 1.0 / (1.0 + std::exp(evidence.log_kept - evidence.log_dropped_estimate));
  if (!std::isnan(share)) certificate_.dropped_mass_estimate = static_cast<float>(share);
  if (evidence.level == Level::kNone) {
    certificate_.log_dropped_upper = {kInfinity};
    certificate_.log_dropped_lower = {kLogZero};
    FinishCertificate(&certificate_);
    return;
  }
  certificate_.log_dropped_upper = evidence.dropped_upper;
  certificate_.log_dropped_lower = evidence.dropped_lower;
  FinishCertificate(&certificate_);
  // Without a number nothing was sampled either.
  if (!has_sample_ || certificate_.level == Level::kNone) return;
  const MassUpper mass = bound.Mass();
  if (!(mass.value < certificate_.dropped_mass_upper.value)) return;
  certificate_.level = Level::kConfidence;
  certificate_.dropped_mass_upper = mass;
  certificate_.log_dropped_upper.value =
      std::min(certificate_.log_dropped_upper.value, bound.Dropped().value);
  certificate_.failure_probability = mass_budget_.spent();
}

// Without samples of values: every dropped value is within V + ||o_S|| of the output.
void HeadProof::SetOutputError(const HeadEvidence& evidence) {
  certificate_.value_norm_lower = evidence.value_norm_lower;
  certificate_.output_error_upper = kInfinity;
  if (certificate_.level == Level::kNone) return;
  double dropping = 0.0;
  if (certificate_.dropped_mass_upper.value > 0.0) {
    // o_S is a mean of values, its norm at most V; as computed it may be a little off.
    const double distance =
        AddUp(evidence.value_norm_upper,
              std::min(evidence.value_norm_upper,
                       AddUp(NormUp(evidence.output, head_dim_), evidence.arithmetic_error)));
    dropping = MultiplyUp(certificate_.dropped_mass_upper.value, distance);
  }
  const double error = AddUp(dropping, evidence.arithmetic_error);
  if (!std::isnan(error)) certificate_.output_error_upper = error;
}

void HeadProof::SampleTheMass(const HeadEvidence& evidence, uint32_t draws_max,
                              DroppedTokens* tokens) {
  if (draws_max == 0 || !mass_budget_.HasNext()) return;
  const Population* const weighed = tokens->Weigh();
  if (weighed == nullptr || weighed->total() == 0) return;
  const Population& population = *weighed;
  MassSampling sampling;
  sampling.eta = mass_budget_.Next();
  sampling.draws_max = std::min(draws_max, plan_.draws_max);
  if (HasMassLimit(plan_)) {
    sampling.enough = LargestDropped(static_cast<double>(plan_.max_dropped_mass),
                                     WeightOf(evidence.kept_lower, population.ref));
  } else {
    sampling.draws_max = std::min(sampling.draws_max, kDrawsWithoutLimit);
  }
  const KeyedBits bits(key_, StreamOf(DrawPurpose::kMass, mass_budget_));
  const MassSample sample =
      SampleMass(population, bits, sampling,
                 [&](absl::Span<const uint32_t> positions, absl::Span<DrawnWeight> weights) {
                   tokens->Read(positions, population.ref, weights, nullptr);
                 });
  certificate_.keys_sampled += sample.draws;
  ratio_ = sample.ratio;
  has_sample_ = true;
  sampled_ = {LogMassOf(sample.upper, population.ref), evidence.kept_lower, {}};
  SetMasses(evidence, sampled_, evidence.level);
}

// Answers what was dropped by an estimate, and bounds the error of that.
void HeadProof::SampleTheOutput(const HeadEvidence& evidence, DroppedTokens* tokens) {
  if (!output_budget_.HasNext() || !(evidence.value_norm_lower > 0.0)) return;
  const Population* const weighed = tokens->Weigh();
  if (weighed == nullptr || weighed->total() == 0) return;
  const Population& population = *weighed;
  std::vector<float> bounds;
  tokens->BoundValues(population, &bounds);
  const double center_norm = NormUp(evidence.output, head_dim_);
  for (float& bound : bounds) bound = RoundUpToFloat(static_cast<double>(bound) + center_norm);
  OutputPopulation proposals;
  if (!proposals.Propose(population, bounds)) return;

  OutputSampling sampling;
  sampling.head_dim = head_dim_;
  sampling.draws_max = plan_.draws_max;
  sampling.eta = output_budget_.Next();
  sampling.center = evidence.output;
  const double ref = population.ref;
  sampling.masses.kept_lower = WeightOf(evidence.kept_lower, ref);
  sampling.masses.kept = std::exp(evidence.log_kept - ref + kLnWeightsPerUnit);
  sampling.masses.kept_upper = WeightOf(evidence.kept_upper, ref);
  sampling.masses.dropped_lower = WeightOf(evidence.dropped_lower, ref);
  sampling.masses.dropped_upper = WeightOf(certificate_.log_dropped_upper, ref);
  sampling.enough = static_cast<double>(plan_.max_output_error) * evidence.value_norm_lower -
                    2 * evidence.arithmetic_error;
  const KeyedBits bits(key_, StreamOf(DrawPurpose::kOutput, output_budget_));
  OutputSample sample =
      SampleOutput(proposals, bits, sampling,
                   [&](absl::Span<const uint32_t> positions, absl::Span<DrawnWeight> weights,
                       float* values) { tokens->Read(positions, ref, weights, values); });
  certificate_.rows_sampled += sample.draws;
  // The answer is rounded to float once more.
  constexpr double kFloatRounding = 0x1p-23;
  const double error =
      AddUp(sample.result.error_upper,
            AddUp(evidence.arithmetic_error, evidence.value_norm_upper * 2.0 * kFloatRounding));
  if (!(error < certificate_.output_error_upper)) return;
  certificate_.output_error_upper = error;
  certificate_.action = Action::kCompensated;
  certificate_.level = std::min(certificate_.level, Level::kConfidence);
  certificate_.failure_probability =
      NextUp(certificate_.failure_probability + output_budget_.spent());
  correction_ = std::move(sample.correction);
  log_compensated_ = std::log(sample.result.dropped) + ref - kLnWeightsPerUnit;
}

// How much weight has to leave D. A sampled bound falls by exact masses, which are `ratio_` of the
// weights; one without samples by the weights themselves.
double HeadProof::WantedForMass() const {
  if (MassMet()) return kLogZero;
  const double limit = plan_.max_dropped_mass;
  if (!std::isfinite(certificate_.log_dropped_upper.value)) return kInfinity;
  if (certificate_.level == Level::kConfidence) {
    return MassToMove(sampled_.Dropped(), sampled_.Kept(), limit).value -
           std::log(std::clamp(ratio_, 0x1p-20, 1.0)) + kLogHeadroom;
  }
  const double allowed = std::log(limit) - std::log1p(-limit) + certificate_.log_kept_lower.value;
  return LogDifference(certificate_.log_dropped_upper.value, allowed) + kLogHeadroom;
}

double HeadProof::WantedForOutput(const HeadEvidence& evidence) const {
  if (OutputMet()) return kLogZero;
  const double error = RelativeOutputError(certificate_);
  // Arithmetic alone is over the limit: no choice of tokens helps.
  const double arithmetic =
      evidence.arithmetic_error / std::max(evidence.value_norm_lower, 0x1p-500);
  const double limit = plan_.max_output_error;
  if (!std::isfinite(error) || !(arithmetic < limit)) return kInfinity;
  const double share = kPlannedErrorShare * limit / error;
  return evidence.dropped_upper.value + std::log1p(-std::min(share, kPlannedErrorShare));
}

void HeadProof::Judge() { certificate_.met = MassMet() && OutputMet(); }

void HeadProof::Prove(const HeadEvidence& evidence, LogMassLower moved, uint32_t draws_max,
                      DroppedTokens* tokens) {
  sampled_.moved = Add(sampled_.moved, moved);
  correction_.clear();
  log_compensated_ = kLogZero;
  certificate_.action = Action::kSelected;
  certificate_.failure_probability = 0.0;
  SetMasses(evidence, sampled_, evidence.level);
  SetOutputError(evidence);
  const bool may_sample = plan_.prove == Guarantee::kConfidence &&
                          certificate_.level != Level::kNone &&
                          certificate_.log_dropped_upper.value != kLogZero;
  if (may_sample && WantsMassSample()) {
    SampleTheMass(evidence, draws_max, tokens);
    SetOutputError(evidence);
  }
  if (may_sample && !OutputMet()) SampleTheOutput(evidence, tokens);
  Judge();
  log_wanted_ = std::max(WantedForMass(), WantedForOutput(evidence));
}

}  // namespace kvservice
