#include "tests/eval/truth.h"

#include <algorithm>
#include <cmath>

#include "attention/float16.h"

namespace kvservice::eval {

HeadTruth::HeadTruth(const TraceHeader& header, const CachedLayer& cached, uint32_t kv_head,
                     const float* query, uint32_t length)
    : weights_(length), output_(header.layout.head_dim) {
  const KvLayout& layout = header.layout;
  for (uint32_t token = 0; token < length; ++token) {
    const std::byte* k = cached.Row(kv_head, token);
    long double sum = 0.0L;
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      sum += static_cast<long double>(query[c]) * LoadElement(layout.dtype, k, c);
    }
    weights_[token] = static_cast<long double>(header.scale) * sum;
  }
  peak_ = *std::max_element(weights_.begin(), weights_.end());
  for (uint32_t token = 0; token < length; ++token) {
    weights_[token] = std::exp(weights_[token] - peak_);
    total_ += weights_[token];
    const std::byte* v = cached.Row(kv_head, token) + layout.vector_bytes();
    long double squares = 0.0L;
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      const long double value = LoadElement(layout.dtype, v, c);
      output_[c] += weights_[token] * value;
      squares += value * value;
    }
    value_norm_ = std::max(value_norm_, squares);
  }
  value_norm_ = std::sqrt(value_norm_);
  for (long double& number : output_) number /= total_;
}

long double HeadTruth::log_total() const { return peak_ + std::log(total_); }

long double HeadTruth::LogKept(absl::Span<const uint32_t> selected) const {
  long double sum = 0.0L;
  for (const uint32_t token : selected) sum += weights_[token];
  return peak_ + std::log(sum);
}

long double HeadTruth::LogDropped(absl::Span<const uint32_t> selected) const {
  // The dropped weights themselves: a difference would lose the digits of a small result.
  long double sum = 0.0L;
  auto next = selected.begin();
  for (uint32_t token = 0; token < weights_.size(); ++token) {
    if (next != selected.end() && *next == token) {
      ++next;
    } else {
      sum += weights_[token];
    }
  }
  return peak_ + std::log(sum);
}

long double HeadTruth::OutputError(const float* out) const {
  long double squares = 0.0L;
  for (size_t c = 0; c < output_.size(); ++c) {
    const long double error = output_[c] - static_cast<long double>(out[c]);
    squares += error * error;
  }
  return std::sqrt(squares);
}

uint32_t HeadTruth::CountWrong(const HeadCertificate& certificate,
                               absl::Span<const uint32_t> selected, const float* out) const {
  if (certificate.level == Level::kNone) {
    return certificate.dropped_mass_upper.value < 1.0 ? 1 : 0;
  }
  const long double log_kept = LogKept(selected);
  const long double log_dropped = LogDropped(selected);
  const long double share = std::exp(log_dropped - log_total());
  uint32_t wrong = 0;
  // Written so that NaN counts as wrong.
  wrong += certificate.log_kept_upper.value >= log_kept ? 0 : 1;
  wrong += certificate.log_kept_lower.value <= log_kept ? 0 : 1;
  wrong += certificate.log_dropped_upper.value >= log_dropped ? 0 : 1;
  wrong += certificate.log_dropped_lower.value <= log_dropped ? 0 : 1;
  wrong += certificate.dropped_mass_upper.value >= share ? 0 : 1;
  wrong += certificate.dropped_mass_lower.value <= share ? 0 : 1;
  wrong += certificate.output_error_upper >= OutputError(out) ? 0 : 1;
  wrong += certificate.value_norm_lower <= value_norm_ ? 0 : 1;
  return wrong;
}

}  // namespace kvservice::eval
