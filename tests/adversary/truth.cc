#include "tests/adversary/truth.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "attention/float16.h"

namespace kvservice::adversary {
namespace {

constexpr long double kInfinity = std::numeric_limits<long double>::infinity();
constexpr long double kUnit = 0x1p-64L;
constexpr long double kLibmError = 0x1p-61L;
// Two doubles per lane lose less than this of the sum of absolute values.
constexpr long double kDotError = 0x1p-90L;
// Below it a mass relative to the largest logit may have lost bits to underflow.
constexpr long double kTinyMass = 0x1p-16000L;
// Logit errors beyond it leave nothing to judge.
constexpr long double kErrorMax = 0.01L;
// Sums of floats beyond it may overflow on their way.
constexpr long double kFloatSums = 0x1p126L;
constexpr uint32_t kLanes = 4;

// a + b and the exact rounding error (Knuth).
template <typename Real>
inline Real TwoSum(Real a, Real b, Real* error) {
  const Real sum = a + b;
  const Real b_part = sum - a;
  *error = (a - (sum - b_part)) + (b - b_part);
  return sum;
}

struct Dot {
  long double sum = 0.0L;
  long double error = 0.0L;
  long double size = 0.0L;  // sum |q_c k_c|
};

// sum q_c k_c. head_dim is a multiple of kLanes. Fusing a product with the sum that follows changes
// nothing, since the product is exact.
Dot ExactDot(uint32_t dim, const float* q, const float* k) {
  double high[kLanes] = {};
  double low[kLanes] = {};
  double absolute[kLanes] = {};
  for (uint32_t c = 0; c < dim; c += kLanes) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const double product = static_cast<double>(q[c + lane]) * static_cast<double>(k[c + lane]);
      double error;
      high[lane] = TwoSum(high[lane], product, &error);
      low[lane] += error;
      absolute[lane] += std::fabs(product);
    }
  }
  Dot dot;
  long double lost = 0.0L;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    long double error;
    dot.sum = TwoSum(dot.sum, static_cast<long double>(high[lane]), &error);
    lost += error + static_cast<long double>(low[lane]);
    dot.size += static_cast<long double>(absolute[lane]);
  }
  if (!std::isfinite(dot.size)) {
    // Real arithmetic on what is not finite: an infinity of one sign, or nothing.
    dot.sum = 0.0L;
    for (uint32_t c = 0; c < dim; ++c) {
      dot.sum += static_cast<long double>(q[c]) * static_cast<long double>(k[c]);
    }
    dot.error = kInfinity;
    return dot;
  }
  dot.sum += lost;
  dot.error = 2.0L * kUnit * std::fabs(dot.sum) + kDotError * dot.size;
  return dot;
}

}  // namespace

// A sum of weights with a compensation, and what the weights themselves are off by.
struct HeadTruth::Sum {
  long double high = 0.0L;
  long double low = 0.0L;
  long double error = 0.0L;
  uint32_t count = 0;

  void Add(long double weight, long double relative_error) {
    long double rounding;
    high = TwoSum(high, weight, &rounding);
    low += rounding;
    error += weight * relative_error;
    ++count;
  }
  long double value() const { return high + low; }
  Interval interval() const {
    const long double width = error * (1.0L + 0x1p-40L) + value() * 4.0L * kUnit;
    return {std::max(0.0L, value() - width), value() + width};
  }
};

WidenedHead Widen(const KvLayout& layout, uint32_t length,
                  const std::function<const std::byte*(uint32_t)>& row) {
  const uint32_t dim = layout.head_dim;
  WidenedHead head;
  head.k.resize(size_t{length} * dim);
  head.v.resize(size_t{length} * dim);
  head.v_norm.resize(length);
  for (uint32_t token = 0; token < length; ++token) {
    const std::byte* bytes = row(token);
    long double squares = 0.0L;
    for (uint32_t c = 0; c < dim; ++c) {
      head.k[size_t{token} * dim + c] = LoadElement(layout.dtype, bytes, c);
      const float v = LoadElement(layout.dtype, bytes, size_t{dim} + c);
      head.v[size_t{token} * dim + c] = v;
      squares += static_cast<long double>(v) * static_cast<long double>(v);
    }
    head.v_norm[token] = std::sqrt(squares);
  }
  return head;
}

HeadTruth::HeadTruth(const LayerShape& shape, const WidenedHead& head, const float* q,
                     uint32_t begin, uint32_t end)
    : head_(&head), dim_(shape.layout.head_dim), begin_(begin), end_(end) {
  assert(end <= head.v_norm.size());
  const auto scale = static_cast<long double>(shape.scale);
  const auto cap = static_cast<long double>(shape.logit_softcap);
  logits_.resize(end - begin);
  errors_.resize(end - begin);
  weights_.resize(end - begin);
  weight_errors_.resize(end - begin);
  for (uint32_t token = begin; token < end; ++token) {
    const Dot dot = ExactDot(dim_, q, &head.k[size_t{token} * dim_]);
    long double logit = scale * dot.sum;
    long double error = scale * dot.error + kUnit * std::fabs(logit);
    silent_ = silent_ || !(std::max(1.0L, scale) * dot.size <= kFloatSums);
    if (cap > 0.0L) {
      // The cap is flatter than 1 everywhere.
      logit = cap * std::tanh(logit / cap);
      error += (kLibmError + 3.0L * kUnit) * cap;
    }
    meaningless_ = meaningless_ || !(logit < kInfinity);
    no_output_ = no_output_ || !std::isfinite(head.v_norm[token]);
    logits_[token - begin] = logit;
    errors_[token - begin] = std::isfinite(error) ? error : 0.0L;
    top_ = std::max(top_, logit);
  }
  // Keys that all weigh nothing have no shares and no output.
  no_output_ = no_output_ || meaningless_ || top_ == -kInfinity;
  if (meaningless_ || top_ == -kInfinity) return;
  for (size_t i = 0; i < logits_.size(); ++i) {
    const long double below = logits_[i] - top_;
    weights_[i] = std::exp(below);
    const long double error = errors_[i] + kUnit * std::fabs(below);
    weight_errors_[i] = std::isfinite(below) ? std::expm1(error) + kLibmError : 0.0L;
  }
}

Interval HeadTruth::LogOf(const Sum& sum, long double top) const {
  const Interval mass = sum.interval();
  const auto log_of = [&](long double x, long double side) {
    if (!(x > 0.0L)) return -kInfinity;
    const long double log = top + std::log(x);
    return log + side * (kLibmError * std::fabs(std::log(x)) + 2.0L * kUnit * (std::fabs(top) + 1));
  };
  return {log_of(mass.low, -1.0L), log_of(mass.high, 1.0L)};
}

MassTruth HeadTruth::Masses(absl::Span<const uint32_t> attended) const {
  Sum kept;
  Sum dropped;
  MassTruth truth;
  std::vector<bool> is_kept(end_ - begin_);
  long double kept_top = -kInfinity;
  long double dropped_top = -kInfinity;
  long double error_max = 0.0L;
  auto next = std::lower_bound(attended.begin(), attended.end(), begin_);
  for (uint32_t i = 0; i < end_ - begin_; ++i) {
    is_kept[i] = next != attended.end() && *next == begin_ + i;
    if (is_kept[i]) ++next;
    (is_kept[i] ? kept : dropped).Add(weights_[i], weight_errors_[i]);
    (is_kept[i] ? kept_top : dropped_top) =
        std::max(is_kept[i] ? kept_top : dropped_top, logits_[i]);
    error_max = std::max(error_max, errors_[i]);
  }
  truth.dropped_any = dropped.count > 0;
  truth.unresolved = !(error_max < kErrorMax) || top_ == -kInfinity;
  // A set that weighs next to nothing is measured by its own largest logit.
  const auto log_of = [&](const Sum& sum, bool side, long double own_top) -> Interval {
    if (sum.count == 0 || own_top == -kInfinity) return {-kInfinity, -kInfinity};
    if (sum.value() > kTinyMass) return LogOf(sum, top_);
    Sum own;
    for (uint32_t i = 0; i < end_ - begin_; ++i) {
      if (is_kept[i] != side) continue;
      const long double below = logits_[i] - own_top;
      own.Add(std::exp(below), std::expm1(errors_[i] + kUnit * std::fabs(below)) + kLibmError);
    }
    return LogOf(own, own_top);
  };
  truth.log_kept = log_of(kept, true, kept_top);
  truth.log_dropped = log_of(dropped, false, dropped_top);
  if (!truth.dropped_any || dropped_top == -kInfinity) return truth;
  const Interval k = kept.interval();
  const Interval d = dropped.interval();
  if (kept.value() > kTinyMass && dropped.value() > kTinyMass) {
    truth.share = {d.low / (d.low + k.high) * (1.0L - 4.0L * kUnit),
                   std::min(1.0L, d.high / (d.high + k.low) * (1.0L + 4.0L * kUnit))};
  } else if (kept.value() > kTinyMass) {
    // Less than any double; its log is known, the share itself is not resolved.
    truth.share = {0.0L, 2.0L * kTinyMass};
  } else {
    truth.share = {1.0L - 0x1p-1000L, 1.0L};
  }
  return truth;
}

std::vector<long double> HeadTruth::OutputOver(const std::function<bool(uint32_t)>& kept,
                                               long double* error) const {
  std::vector<long double> output(dim_, 0.0L);
  long double total = 0.0L;
  long double size = 0.0L;  // sum w ||v||
  long double error_max = 0.0L;
  for (uint32_t i = 0; i < end_ - begin_; ++i) {
    const long double weight = weights_[i];
    if (weight == 0.0L || !kept(i)) continue;
    total += weight;
    size += weight * head_->v_norm[begin_ + i];
    error_max = std::max(error_max, weight_errors_[i]);
    const float* v = &head_->v[size_t{begin_ + i} * dim_];
    for (uint32_t c = 0; c < dim_; ++c) output[c] += weight * static_cast<long double>(v[c]);
  }
  *error = 0.0L;
  // What weighs so little has lost bits to underflow, or everything.
  if (!(total > kTinyMass)) *error = kInfinity;
  if (total == 0.0L) return output;
  for (long double& x : output) x /= total;
  // Numerator and denominator: the weights' errors, a product and a sum of n terms each, and the
  // quotient. What underflowed weighs less than 2^-16000 and is covered a thousand times over.
  const auto count = static_cast<long double>(end_ - begin_);
  *error += (2.0L * error_max + (2.0L * count + 8.0L) * kUnit) * 1.01L * size / total;
  return output;
}

Interval HeadTruth::DistanceToDense(const std::vector<long double>& output,
                                    long double error) const {
  if (output_.empty()) output_ = OutputOver([](uint32_t) { return true; }, &output_error_);
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
  const std::vector<long double> output = OutputOver(
      [&](uint32_t i) { return std::binary_search(attended.begin(), attended.end(), begin_ + i); },
      &error);
  return DistanceToDense(output, error);
}

}  // namespace kvservice::adversary
