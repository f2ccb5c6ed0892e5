#include "tests/eval/step_judge.h"

#include <algorithm>
#include <cmath>

#include "tests/eval/exp.h"
#include "tests/eval/matrix.h"

namespace kvservice::eval {
namespace {

// Exp ends at e^-87, and a float32 below 2^-126 has few digits: what a token's share may be off by
// in absolute terms.
constexpr double kSmallest = 4e-38;

// Sums of float32 run over stretches of this length before they go on in double.
constexpr uint32_t kStretch = 512;

// Bound of the relative error of a dropped mass computed from float32 logits: each logit may be off
// by (head_dim + 2) ulps of |q| |k|, the exponential by 3e-7, a stretch of sums by its length.
double RelativeError(const GroupStep& step, uint32_t head) {
  double squares = 0.0;
  for (uint32_t c = 0; c < step.head_dim; ++c) {
    const double number = step.q[head * step.head_dim + c];
    squares += number * number;
  }
  const double logit =
      (step.head_dim + 2) * 0x1p-23 * std::sqrt(squares) * step.scale * step.key_norm_max;
  return std::expm1(4.0 * logit) + kStretch * 0x1p-23 + 1e-6;
}

long double LongDot(const GroupStep& step, uint32_t head, const float* key) {
  long double sum = 0.0L;
  for (uint32_t c = 0; c < step.head_dim; ++c) {
    sum += static_cast<long double>(step.q[head * step.head_dim + c]) * key[c];
  }
  return static_cast<long double>(step.scale) * sum;
}

// The dropped share of attention in long double, from q as received and K as stored.
long double LongDropped(const GroupStep& step, uint32_t head) {
  std::vector<long double> logits(step.length);
  for (uint32_t token = 0; token < step.length; ++token) {
    const float* key = token < step.prompt_length
                           ? step.prompt_keys + size_t{token} * step.head_dim
                           : step.tail.keys + size_t{token - step.prompt_length} * step.head_dim;
    logits[token] = LongDot(step, head, key);
  }
  const long double peak = *std::max_element(logits.begin(), logits.end());
  long double total = 0.0L;
  long double dropped = 0.0L;
  auto next = step.selected.begin();
  for (uint32_t token = 0; token < step.length; ++token) {
    const long double weight = std::exp(logits[token] - peak);
    total += weight;
    if (next != step.selected.end() && *next == token) {
      ++next;
    } else {
      dropped += weight;
    }
  }
  return step.dense ? 0.0L : dropped / total;
}

// Float32 decides where it is sure, long double where it is not.
bool IsWrong(const GroupStep& step, uint32_t head, double dropped) {
  const HeadCertificate& certificate = step.certificates[head];
  const double upper = certificate.dropped_mass_upper.value;
  const double lower = certificate.dropped_mass_lower.value;
  if (certificate.level == Level::kNone) return !(upper >= 1.0);
  const double relative = RelativeError(step, head);
  const bool drops = !step.dense && step.selected.size() < step.length;
  const double absolute = drops ? kSmallest * step.length : 0.0;
  const double most = dropped * (1.0 + relative) + absolute;
  const double least = std::max(0.0, dropped * (1.0 - relative) - absolute);
  if (upper >= most && lower <= least) return false;
  const long double exact = LongDropped(step, head);
  return !(upper >= exact && lower <= exact);
}

}  // namespace

void StepJudge::Normalise(const GroupStep& step) {
  probabilities_.resize(size_t{step.group} * step.length);
  for (uint32_t head = 0; head < step.group; ++head) {
    const float* logits = step.logits + size_t{head} * step.length;
    float* weights = &probabilities_[size_t{head} * step.length];
    float peak = logits[0];
    for (uint32_t i = 1; i < step.length; ++i) peak = std::max(peak, logits[i]);
    double total = 0.0;
    for (uint32_t begin = 0; begin < step.length; begin += kStretch) {
      const uint32_t end = std::min(step.length, begin + kStretch);
      for (uint32_t i = begin; i < end; ++i) weights[i] = Exp(logits[i] - peak);
      float sum = 0.0F;
      for (uint32_t i = begin; i < end; ++i) sum += weights[i];
      total += sum;
    }
    const auto factor = static_cast<float>(1.0 / total);
    for (uint32_t i = 0; i < step.length; ++i) weights[i] *= factor;
  }
}

// The dropped tokens' own probabilities are added up: a difference to 1 would lose the digits of a
// small result.
void StepJudge::Judge(const GroupStep& step, HeadVerdict* verdicts) {
  Normalise(step);
  is_selected_.assign(step.length, step.dense ? 1 : 0);
  if (!step.dense) {
    for (const uint32_t token : step.selected) is_selected_[token] = 1;
  }
  for (uint32_t head = 0; head < step.group; ++head) {
    const float* weights = &probabilities_[size_t{head} * step.length];
    double dropped = 0.0;
    for (uint32_t begin = 0; begin < step.length && !step.dense; begin += kStretch) {
      const uint32_t end = std::min(step.length, begin + kStretch);
      float sum = 0.0F;
      for (uint32_t i = begin; i < end; ++i) sum += is_selected_[i] != 0 ? 0.0F : weights[i];
      dropped += sum;
    }
    verdicts[head].dropped = dropped;
    verdicts[head].is_wrong = step.certificates != nullptr && IsWrong(step, head, dropped);
  }
}

GroupVerdict StepJudge::Compare(const GroupStep& step, const HeadVerdict* verdicts) {
  GroupVerdict verdict;
  if (step.dense) return verdict;
  sums_.assign(step.length, 0.0F);
  for (uint32_t head = 0; head < step.group; ++head) {
    const float* weights = &probabilities_[size_t{head} * step.length];
    for (uint32_t i = 0; i < step.length; ++i) sums_[i] += weights[i];
  }
  order_.resize(step.length);
  for (uint32_t i = 0; i < step.length; ++i) order_[i] = i;
  const size_t kept = std::min<size_t>(step.selected.size(), step.length);
  std::nth_element(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(kept), order_.end(),
                   [&](uint32_t a, uint32_t b) { return sums_[a] > sums_[b]; });
  size_t common = 0;
  double best_kept = 0.0;
  for (size_t i = 0; i < kept; ++i) {
    common += is_selected_[order_[i]];
    best_kept += sums_[order_[i]];
  }
  double dropped = 0.0;
  for (uint32_t head = 0; head < step.group; ++head) dropped += verdicts[head].dropped;
  verdict.excess = std::max(0.0, (dropped - (step.group - best_kept)) / step.group);
  verdict.overlap = kept == 0 ? 1.0 : static_cast<double>(common) / static_cast<double>(kept);
  dense_out_.assign(size_t{step.group} * step.head_dim, 0.0F);
  std::vector<const float*> weights;
  std::vector<const float*> tail_weights;
  std::vector<float*> out;
  for (uint32_t head = 0; head < step.group; ++head) {
    weights.push_back(&probabilities_[size_t{head} * step.length]);
    tail_weights.push_back(weights.back() + step.prompt_length);
    out.push_back(&dense_out_[size_t{head} * step.head_dim]);
  }
  AddMixes(weights, step.prompt_length, step.head_dim, step.prompt_values, out);
  AddMixes(tail_weights, step.tail.count, step.head_dim, step.tail.values, out);
  for (uint32_t head = 0; head < step.group; ++head) {
    double error = 0.0;
    double norm = 0.0;
    for (uint32_t c = 0; c < step.head_dim; ++c) {
      const double dense = dense_out_[head * step.head_dim + c];
      const double difference = dense - step.out[head * step.head_dim + c];
      error += difference * difference;
      norm += dense * dense;
    }
    verdict.output_error += std::sqrt(error / std::max(norm, 1e-30)) / step.group;
  }
  return verdict;
}

}  // namespace kvservice::eval
