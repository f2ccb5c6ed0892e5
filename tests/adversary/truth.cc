#include "tests/adversary/truth.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <numeric>

#include "attention/float16.h"

namespace kvservice::adversary {
namespace {

constexpr long double kInfinity = std::numeric_limits<long double>::infinity();
constexpr long double kUnit = 0x1p-64L;
constexpr long double kLibmError = 0x1p-61L;
// ExactDots loses less than this of the sum of absolute values.
constexpr long double kDotError = 0x1p-90L;
// Sums in lanes, for each number: see truth_kernel.h.
constexpr long double kLaneError = 0x1p-80L;
// Sums of n doubles that only state errors are made larger by more than they may be off.
constexpr long double kErrorGrowth = 1.0L + 0x1p-38L;
// Lighter weights are left out: the parts of products with values stay normal doubles.
constexpr long double kWeightLeast = 0x1p-700L;
// A set that weighs less than this is measured by its own largest logit.
constexpr long double kLight = 0x1p-600L;
// Below it a mass relative to the largest logit may have lost bits to underflow.
constexpr long double kTinyMass = 0x1p-16000L;
// Logit errors beyond it leave nothing to judge.
constexpr long double kErrorMax = 0.01L;
// Sums of floats beyond it may overflow on their way.
constexpr long double kFloatSums = 0x1p126L;

// At least e^x - 1 for x >= 0.
long double Expm1Up(long double x) { return x < 0.5L ? x * (1.0L + x) : std::expm1(x) * 1.0001L; }

// a + b and the exact rounding error (Knuth).
long double TwoSum(long double a, long double b, long double* error) {
  const long double sum = a + b;
  const long double b_part = sum - a;
  *error = (a - (sum - b_part)) + (b - b_part);
  return sum;
}

// Real arithmetic on what is not finite: an infinity of one sign, or nothing.
long double DotOfNotFinite(uint32_t dim, const float* q, const WidenedHead& head, uint32_t token) {
  long double sum = 0.0L;
  for (uint32_t c = 0; c < dim; ++c) {
    sum += static_cast<long double>(q[c]) *
           static_cast<long double>(head.k[GroupedIndex(dim, token, c)]);
  }
  return sum;
}

// A function for each type, not a branch for each number.
template <DType kDType>
void WidenRow(uint32_t dim, uint32_t token, const std::byte* bytes, WidenedHead* head) {
  for (uint32_t c = 0; c < dim; ++c) {
    head->k[GroupedIndex(dim, token, c)] = LoadElement(kDType, bytes, c);
  }
  float* const v = &head->v[size_t{token} * dim];
  for (uint32_t c = 0; c < dim; ++c) v[c] = LoadElement(kDType, bytes, size_t{dim} + c);
  const LaneSums squares = SquaresOf(dim, v);
  long double sum = 0.0L;
  for (const double square : squares.high) sum += static_cast<long double>(square);
  // Nothing is lost of what is not finite, or NaN is.
  if (std::isfinite(sum)) {
    for (const double lost : squares.low) sum += static_cast<long double>(lost);
  }
  head->v_norm[token] = std::sqrt(sum);
}

}  // namespace

WidenedHead Widen(const KvLayout& layout, uint32_t length,
                  const std::function<const std::byte*(uint32_t)>& row) {
  const uint32_t dim = layout.head_dim;
  WidenedHead head;
  head.k.resize(size_t{(length + kTruthLanes - 1) / kTruthLanes} * kTruthLanes * dim);
  head.v.resize(size_t{length} * dim);
  head.v_norm.resize(length);
  for (uint32_t token = 0; token < length; ++token) {
    const std::byte* const bytes = row(token);
    if (layout.dtype == DType::kFloat32) {
      WidenRow<DType::kFloat32>(dim, token, bytes, &head);
    } else if (layout.dtype == DType::kFloat16) {
      WidenRow<DType::kFloat16>(dim, token, bytes, &head);
    } else {
      WidenRow<DType::kBfloat16>(dim, token, bytes, &head);
    }
  }
  return head;
}

Interval HeadTruth::Sum::interval() const {
  const long double width = error * (1.0L + 0x1p-40L) + value * 4.0L * kUnit;
  return {std::max(0.0L, value - width), value + width};
}

Interval HeadTruth::Side::Log() const {
  const Interval mass = sum.interval();
  const auto log_of = [&](long double x, long double side) {
    if (!(x > 0.0L)) return -kInfinity;
    const long double log_mass = std::log(x);
    return reference + log_mass +
           side * (kLibmError * std::fabs(log_mass) + 2.0L * kUnit * (std::fabs(reference) + 1));
  };
  return {log_of(mass.low, -1.0L), log_of(mass.high, 1.0L)};
}

Interval HeadTruth::Side::Mass(long double top) const {
  const Interval mass = sum.interval();
  if (reference == top || sum.value == 0.0L) return mass;
  const long double below = reference - top;
  const long double factor = std::exp(below);
  const long double error = Expm1Up(kUnit * std::fabs(below)) + kLibmError + 2.0L * kUnit;
  return {mass.low * factor * (1.0L - error), mass.high * factor * (1.0L + error)};
}

void HeadTruth::Weights::Set(size_t i, long double below, long double logit_error) {
  const long double weight = std::exp(below);
  // Also where a logit is minus infinity.
  if (!(weight >= kWeightLeast)) return;
  // 29 of the 53 bits of a double, and what 64 bits have besides.
  constexpr uint64_t kHighBits = ~uint64_t{0} << 24;
  high[i] = std::bit_cast<double>(std::bit_cast<uint64_t>(static_cast<double>(weight)) & kHighBits);
  low[i] = static_cast<double>(weight - static_cast<long double>(high[i]));
  const long double relative = Expm1Up(logit_error + kUnit * std::fabs(below)) + kLibmError;
  error[i] = static_cast<double>(weight * relative) * (1.0 + 0x1p-50);
}

HeadTruth::HeadTruth(const LayerShape& shape, const WidenedHead& head, const float* q,
                     uint32_t begin, uint32_t end)
    : head_(&head), dim_(shape.layout.head_dim), begin_(begin), end_(end) {
  assert(end <= head.v_norm.size());
  AddLogits(shape, q);
  // Keys that all weigh nothing have no shares and no output.
  no_output_ = no_output_ || meaningless_ || top_ == -kInfinity;
  if (meaningless_ || top_ == -kInfinity) return;
  std::vector<uint32_t> all(end - begin);
  std::iota(all.begin(), all.end(), 0);
  weights_ = WeightsBelow(all, top_);
}

uint32_t HeadTruth::places() const {
  return (end_ - begin_ + kTruthLanes - 1) / kTruthLanes * kTruthLanes;
}

void HeadTruth::AddLogits(const LayerShape& shape, const float* q) {
  const auto scale = static_cast<long double>(shape.scale);
  const auto cap = static_cast<long double>(shape.logit_softcap);
  const uint32_t first_group = begin_ / kTruthLanes;
  const uint32_t group_count = (end_ + kTruthLanes - 1) / kTruthLanes - first_group;
  const size_t stride = size_t{group_count} * kTruthLanes;
  std::vector<double> dots(3 * stride);
  ExactDots(dim_, q, &head_->k[size_t{first_group} * kTruthLanes * dim_], group_count, dots.data(),
            &dots[stride], &dots[2 * stride]);
  logits_.resize(end_ - begin_);
  errors_.resize(end_ - begin_);
  for (uint32_t token = begin_; token < end_; ++token) {
    const size_t at = token - first_group * kTruthLanes;
    long double dot =
        static_cast<long double>(dots[at]) + static_cast<long double>(dots[stride + at]);
    const auto size = static_cast<long double>(dots[2 * stride + at]);
    long double dot_error = 2.0L * kUnit * std::fabs(dot) + kDotError * size;
    if (!std::isfinite(size)) {
      dot = DotOfNotFinite(dim_, q, *head_, token);
      dot_error = kInfinity;
    }
    long double logit = scale * dot;
    long double error = scale * dot_error + kUnit * std::fabs(logit);
    silent_ = silent_ || !(std::max(1.0L, scale) * size <= kFloatSums);
    if (cap > 0.0L) {
      // The cap is flatter than 1 everywhere.
      logit = cap * std::tanh(logit / cap);
      error += (kLibmError + 3.0L * kUnit) * cap;
    }
    meaningless_ = meaningless_ || !(logit < kInfinity);
    no_output_ = no_output_ || !std::isfinite(head_->v_norm[token]);
    logits_[token - begin_] = logit;
    errors_[token - begin_] = std::isfinite(error) ? error : 0.0L;
    error_max_ = std::max(error_max_, errors_[token - begin_]);
    top_ = std::max(top_, logit);
  }
}

HeadTruth::Weights HeadTruth::WeightsBelow(absl::Span<const uint32_t> tokens,
                                           long double reference) const {
  Weights weights;
  for (std::vector<double>* one : {&weights.high, &weights.low, &weights.error}) {
    one->resize(places());
  }
  for (const uint32_t i : tokens) weights.Set(i, logits_[i] - reference, errors_[i]);
  return weights;
}

std::vector<uint32_t> HeadTruth::Seen(absl::Span<const uint32_t> attended) const {
  const auto first = std::lower_bound(attended.begin(), attended.end(), begin_);
  const auto last = std::lower_bound(first, attended.end(), end_);
  std::vector<uint32_t> seen(first, last);
  for (uint32_t& token : seen) token -= begin_;
  return seen;
}

HeadTruth::Sum HeadTruth::AddUp(const LaneSums& lanes) const {
  Sum sum;
  long double lost = 0.0L;
  for (uint32_t i = 0; i < kTruthLanes; ++i) {
    long double rounding;
    sum.value = TwoSum(sum.value, static_cast<long double>(lanes.high[i]), &rounding);
    lost += rounding + static_cast<long double>(lanes.low[i]);
    sum.error += static_cast<long double>(lanes.error[i]);
  }
  sum.value += lost;
  // What was too light for lanes is here too.
  const long double each = kLaneError * sum.value + kWeightLeast;
  sum.error = sum.error * kErrorGrowth + static_cast<long double>(places()) * each;
  return sum;
}

HeadTruth::Side HeadTruth::MakeSide(const LaneSums& lanes,
                                    absl::FunctionRef<std::vector<uint32_t>()> tokens) const {
  Side side{.reference = top_, .sum = AddUp(lanes)};
  if (side.sum.value >= kLight) return side;
  side = Side{.reference = -kInfinity, .sum = {}};
  const std::vector<uint32_t> own = tokens();
  for (const uint32_t i : own) side.reference = std::max(side.reference, logits_[i]);
  if (side.reference == -kInfinity) return side;
  const Weights weights = WeightsBelow(own, side.reference);
  const std::vector<double> all(places(), 1.0);
  LaneSums inside;
  LaneSums outside;
  SumSides(places(), all.data(), weights.parts(), &inside, &outside);
  side.sum = AddUp(inside);
  return side;
}

MassTruth HeadTruth::Masses(absl::Span<const uint32_t> attended) const {
  MassTruth truth;
  const std::vector<uint32_t> seen = Seen(attended);
  truth.dropped_any = seen.size() < end_ - begin_;
  truth.unresolved = !(error_max_ < kErrorMax) || top_ == -kInfinity;
  truth.log_kept = truth.log_dropped = {-kInfinity, -kInfinity};
  if (meaningless_ || top_ == -kInfinity) return truth;
  std::vector<double> is_kept(places());
  for (const uint32_t i : seen) is_kept[i] = 1.0;
  LaneSums kept_lanes;
  LaneSums dropped_lanes;
  SumSides(places(), is_kept.data(), weights_.parts(), &kept_lanes, &dropped_lanes);
  const Side kept = MakeSide(kept_lanes, [&] { return seen; });
  const Side dropped = MakeSide(dropped_lanes, [&] {
    std::vector<uint32_t> others;
    for (uint32_t i = 0; i < end_ - begin_; ++i) {
      if (is_kept[i] == 0.0) others.push_back(i);
    }
    return others;
  });
  if (kept.sum.value > 0.0L) truth.log_kept = kept.Log();
  if (!(dropped.sum.value > 0.0L)) return truth;
  truth.log_dropped = dropped.Log();
  const Interval k = kept.Mass(top_);
  const Interval d = dropped.Mass(top_);
  if (k.low > kTinyMass && d.low > kTinyMass) {
    truth.share = {d.low / (d.low + k.high) * (1.0L - 4.0L * kUnit),
                   std::min(1.0L, d.high / (d.high + k.low) * (1.0L + 4.0L * kUnit))};
  } else if (k.low > kTinyMass) {
    // Less than any double; its log is known, the share itself is not resolved.
    truth.share = {0.0L, 2.0L * kTinyMass};
  } else {
    truth.share = {1.0L - 0x1p-1000L, 1.0L};
  }
  return truth;
}

std::vector<long double> HeadTruth::OutputOver(absl::Span<const uint32_t> tokens,
                                               long double* error) const {
  assert(!no_output_);
  std::vector<long double> output(dim_, 0.0L);
  *error = kInfinity;
  const auto weigh = [&](const Weights& weights) {
    long double total = 0.0L;
    for (const uint32_t i : tokens) total += static_cast<long double>(weights.high[i]);
    return total;
  };
  Weights own;
  const Weights* weights = &weights_;
  if (!(weigh(weights_) >= kLight)) {
    long double reference = -kInfinity;
    for (const uint32_t i : tokens) reference = std::max(reference, logits_[i]);
    if (reference == -kInfinity) return output;
    own = WeightsBelow(tokens, reference);
    weights = &own;
  }
  // What is left out weighs less than kWeightLeast, and may have the largest value.
  long double total = 0.0L;
  long double total_error = 0.0L;
  long double size = 0.0L;  // sum w ||v||
  long double size_error = 0.0L;
  std::vector<uint32_t> heavy;
  for (const uint32_t i : tokens) {
    const long double norm = head_->v_norm[begin_ + i];
    if (weights->high[i] == 0.0) {
      size_error += kWeightLeast * norm;
      total_error += kWeightLeast;
      continue;
    }
    heavy.push_back(i);
    const long double weight =
        static_cast<long double>(weights->high[i]) + static_cast<long double>(weights->low[i]);
    total += weight;
    total_error += static_cast<long double>(weights->error[i]);
    size += weight * norm;
    size_error += static_cast<long double>(weights->error[i]) * norm;
  }
  std::vector<double> parts(2 * size_t{dim_});
  WeightedRows(dim_, &head_->v[size_t{begin_} * dim_], heavy, weights->parts(), parts.data(),
               &parts[dim_]);
  for (uint32_t c = 0; c < dim_; ++c) {
    output[c] =
        (static_cast<long double>(parts[c]) + static_cast<long double>(parts[dim_ + c])) / total;
  }
  // Numerator and denominator: the weights' errors, what lanes lose and the roundings of `total`,
  // and the last sum and the quotient.
  const auto count = static_cast<long double>(tokens.size());
  *error =
      ((total_error / total + count * (kLaneError + kUnit) + 8.0L * kUnit) * size + size_error) *
      1.01L / total;
  return output;
}

Interval HeadTruth::DistanceToDense(const std::vector<long double>& output,
                                    long double error) const {
  if (output_.empty()) {
    std::vector<uint32_t> all(end_ - begin_);
    std::iota(all.begin(), all.end(), 0);
    output_ = OutputOver(all, &output_error_);
  }
  long double squares = 0.0L;
  for (uint32_t c = 0; c < dim_; ++c) {
    const long double miss = output[c] - output_[c];
    squares += miss * miss;
  }
  if (!std::isfinite(squares)) return {kInfinity, kInfinity};
  const long double norm = std::sqrt(squares);
  // d + 3 roundings of the sum and its root, and one of each difference.
  const long double width = norm * 512.0L * kUnit + output_error_ + error;
  return {std::max(0.0L, norm - width), norm + width};
}

Interval HeadTruth::OutputError(const float* out) const {
  return DistanceToDense(std::vector<long double>(out, out + dim_), 0.0L);
}

Interval HeadTruth::SelectionError(absl::Span<const uint32_t> attended) const {
  long double error = 0.0L;
  const std::vector<long double> output = OutputOver(Seen(attended), &error);
  return DistanceToDense(output, error);
}

}  // namespace kvservice::adversary
