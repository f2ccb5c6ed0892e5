// Attention of one query head over a cached layer in long double: what certificates are judged by.

#ifndef KVSERVICE_TESTS_EVAL_TRUTH_H_
#define KVSERVICE_TESTS_EVAL_TRUTH_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/certificate.h"
#include "tests/eval/trace.h"

namespace kvservice::eval {

class HeadTruth {
 public:
  // query: [head_dim]; the head sees the tokens below `length`. Everything is copied.
  HeadTruth(const TraceHeader& header, const CachedLayer& cached, uint32_t kv_head,
            const float* query, uint32_t length);

  // e^(s_i - peak), [length].
  absl::Span<const long double> weights() const { return weights_; }
  // Their sum.
  long double total() const { return total_; }
  long double log_total() const;
  // ln of the mass of all tokens but `selected` (ascending); -inf when there are none.
  long double LogDropped(absl::Span<const uint32_t> selected) const;
  long double LogKept(absl::Span<const uint32_t> selected) const;
  // ||o_dense - out||_2; out: [head_dim].
  long double OutputError(const float* out) const;
  // Largest norm of a value.
  long double value_norm() const { return value_norm_; }

  // Statements of a certificate that are wrong, compared without tolerance. `selected`: what was
  // attended; out: [head_dim].
  uint32_t CountWrong(const HeadCertificate& certificate, absl::Span<const uint32_t> selected,
                      const float* out) const;

 private:
  long double peak_;
  long double total_ = 0.0L;
  long double value_norm_ = 0.0L;
  std::vector<long double> weights_;
  std::vector<long double> output_;  // [head_dim]
};

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_TRUTH_H_
