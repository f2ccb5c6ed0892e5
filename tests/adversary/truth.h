// The truth that certificates are judged by: softmax attention in long double over the numbers as
// stored, as intervals that provably contain the real value. It shares nothing with the devices but
// the layout of the cache. Pure; any thread.
//
// Why intervals. A bound has no tolerance: it is wrong as soon as it lies on the wrong side of the
// real value. But the judge computes too, to some 2^-62 of each logit, and a certificate of
// something computed exactly may be closer to the real value than that. So a violation is claimed
// when the bound lies beyond the far end of the interval: then it is wrong whatever the judge's own
// rounding did. Nothing is granted to the device; the width is the judge's proven error alone.
//
// How wide. Products of floats are exact in double (48 bits); their sums are carried in two
// doubles, off by less than 2^-90 of the sum of absolute values; a logit is that times the scale,
// rounded to 64 bits twice; expl, logl and tanhl are taken to be within kLibmError (glibc states 1
// to 4 units of 2^-64). Weights are kept exactly, in two doubles (29 and 35 bits), and so are their
// sums (truth_kernel.h). A set of tokens that weighs next to nothing is measured by its own largest
// logit, so that nothing is lost below the least double.

#ifndef KVSERVICE_TESTS_ADVERSARY_TRUTH_H_
#define KVSERVICE_TESTS_ADVERSARY_TRUTH_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "tests/adversary/truth_kernel.h"

namespace kvservice::adversary {

// Contains the real value.
struct Interval {
  long double low = 0.0L;
  long double high = 0.0L;
};

// Keys and values of one KV head as stored, widened exactly.
struct WidenedHead {
  std::vector<float> k;  // Eight tokens side by side (GroupedIndex), zeros behind the last.
  std::vector<float> v;  // [length][head_dim]
  // [length], nearest; NaN or infinity where a value is not finite.
  std::vector<long double> v_norm;
};
// row(token) gives K in the cache's type, V follows at + vector_bytes().
WidenedHead Widen(const KvLayout& layout, uint32_t length,
                  const std::function<const std::byte*(uint32_t)>& row);

// Masses of one choice of tokens.
struct MassTruth {
  bool dropped_any = false;
  Interval log_kept;     // (-inf, -inf) for nothing.
  Interval log_dropped;  // The same.
  Interval share;        // dropped / (kept + dropped)
  // The judge's own error leaves nothing to say (logits beyond 2^60).
  bool unresolved = false;
};

// One query token and head over everything it sees, tokens [begin, end).
class HeadTruth {
 public:
  // q: [head_dim]. `head` must outlive this.
  HeadTruth(const LayerShape& shape, const WidenedHead& head, const float* q, uint32_t begin,
            uint32_t end);

  uint32_t begin() const { return begin_; }
  uint32_t end() const { return end_; }
  // Some logit is NaN or +infinity: a statement about the head means nothing.
  bool is_meaningless() const { return meaningless_; }
  // Some product of a query and a key is not finite, be its weight zero or the soft-cap finite, or
  // it is beyond what floats add up to: a device need not say anything.
  bool may_be_silent() const { return silent_; }
  // Some value that it sees is not finite: there is no output to be near to.
  bool has_no_output() const { return no_output_; }

  // `attended`: ascending positions; those that the head does not see do not matter.
  MassTruth Masses(absl::Span<const uint32_t> attended) const;
  // ||o_dense - out||, out: [head_dim]. Not for heads without an output.
  Interval OutputError(const float* out) const;
  // ||o_dense - o|| for o = attention over the attended tokens alone, without any rounding.
  Interval SelectionError(absl::Span<const uint32_t> attended) const;

 private:
  // The value of a sum of weights, and at most what it is off by.
  struct Sum {
    long double value = 0.0L;
    long double error = 0.0L;
    Interval interval() const;
  };
  // Weights relative to some logit, in two parts: their values are exactly those, and off by at
  // most `error` from the real ones. What is below kWeightLeast is zero.
  struct Weights {
    std::vector<double> high, low, error;  // [places()]
    void Set(size_t i, long double below, long double logit_error);
    SplitNumbers parts() const { return {high.data(), low.data(), error.data()}; }
  };
  // What a choice of tokens weighs, by the largest logit of all or by its own.
  struct Side {
    long double reference = 0.0L;
    Sum sum;  // Nothing: zero.
    Interval Log() const;
    // In units of the largest weight of all.
    Interval Mass(long double top) const;
  };

  // Tokens seen, and zeros up to whole lanes.
  uint32_t places() const;
  void AddLogits(const LayerShape& shape, const float* q);
  // Positions become indices from begin(); those that the head does not see are left out.
  std::vector<uint32_t> Seen(absl::Span<const uint32_t> attended) const;
  Weights WeightsBelow(absl::Span<const uint32_t> tokens, long double reference) const;
  Sum AddUp(const LaneSums& lanes) const;
  // `tokens`: the indices of those that lanes have added up.
  Side MakeSide(const LaneSums& lanes, absl::FunctionRef<std::vector<uint32_t>()> tokens) const;
  // Attention over tokens (indices), [head_dim], and the norm of its error: infinite when these
  // weigh nothing.
  std::vector<long double> OutputOver(absl::Span<const uint32_t> tokens, long double* error) const;
  Interval DistanceToDense(const std::vector<long double>& output, long double error) const;

  const WidenedHead* head_;
  uint32_t dim_;
  uint32_t begin_, end_;
  bool meaningless_ = false;
  bool silent_ = false;
  bool no_output_ = false;
  long double top_ = -std::numeric_limits<long double>::infinity();
  // [end - begin]: logits after the soft-cap and their absolute errors.
  std::vector<long double> logits_, errors_;
  long double error_max_ = 0.0L;
  Weights weights_;  // e^(logit - top)
  // Made when first asked for.
  mutable std::vector<long double> output_;
  mutable long double output_error_ = 0.0L;
};

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_TRUTH_H_
