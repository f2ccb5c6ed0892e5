// Verified sharing: how much softmax mass would a query drop with a list that was made for an
// earlier one? Estimated from what that list's anchor remembers, without reading a key or a sketch,
// so that asking costs next to nothing beside a scan. An estimate, not a bound: it steers (Plan::
// reuse_mass_limit), it certifies nothing. Used by all devices that compute on the host.
//
// When an anchor is made, all is known about its query q: the mass K that was read, the mass R that
// was left, and which keys K comes from (hidden and frozen tokens, which a scan does not choose
// from, count for neither). For another query q' = q + dq of the same head,
//
//     ln K(q') = ln K + ln E_K[e^(dq.k)],      ln R(q') = ln R + ln E_R[e^(dq.k)]
//
// are cumulant generating functions of the keys under the softmax weights of q. The first order of
// the first is a lower bound (Jensen), dq.(mean of the read keys). The second is taken as that of
// keys with the mean m and the variance v per channel that the middle's keys have, at kDeviations
// standard deviations of dq.k: a jump concerns few tokens, so the far end of the spread tells more
// than its mean. All in all
//
//     estimate = sigmoid(ln(R/K) + dq.(m - mean_K) + kDeviations sqrt(sum_c dq_c^2 v_c))
//
// and of a group's heads the largest. m and v come from the boxes of sketch pages: centres, their
// spread, and width^2 / 24 within a page (the range of 64 normal numbers is 4.7 deviations).
//
// Queries are compared before rotation, as their cosine is: dq is the difference of the un-rotated
// queries, rotated to the position of the later one, where the keys are.
//
// Plain data and pure functions; any thread.

#ifndef KVSERVICE_ATTENTION_SHARING_H_
#define KVSERVICE_ATTENTION_SHARING_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/sharing_numbers.h"

namespace kvservice {

// ln(e^a + e^b) to nearest.
double LogAdd(double a, double b);

// What an anchor remembers for estimates, of one KV head; empty = nothing can be estimated.
// Logits are natural and before soft-cap, which estimates leave out: it can only shrink a change.
struct SharingTerms {
  std::vector<float> queries;   // [group][head_dim], un-rotated, times the layer's scale
  std::vector<float> log_odds;  // [group], ln(R / K); -infinity when nothing was left
  std::vector<float> shift;     // [group][head_dim], m - mean_K
  std::vector<float> variance;  // [head_dim], v

  bool empty() const { return log_odds.empty(); }
  size_t bytes() const {
    return (queries.capacity() + log_odds.capacity() + shift.capacity() + variance.capacity()) *
           sizeof(float);
  }
  // After a list was completed: ln(mass of the newly considered tokens that were left out / mass
  // that is read), of one query head, for the query that completed it.
  void Leave(uint32_t head, double log_ratio);
};

// m and v of the keys of sketched pages.
struct KeySpread {
  std::vector<double> mean;      // [head_dim]
  std::vector<double> variance;  // [head_dim]
};
// Of so many pages, the indices of those whose boxes are read: many are represented by a few, at
// even distances.
std::vector<size_t> SpreadSample(size_t page_count);
// pages: sketch pages of one KV head (attention/sketch.h), of which SpreadSample are read, from
// SketchLayout::lo on. No pages: zeros.
KeySpread SpreadOfKeys(uint32_t head_dim, absl::Span<const std::byte* const> pages);

struct SharingTask {
  const LayerShape* shape = nullptr;
  // Un-rotated queries of the anchor, [group][head_dim].
  absl::Span<const float> queries;
  // Tokens that were read; those that are heavy for no head may be missing.
  absl::Span<const uint32_t> read;
  // [group][read]: their logits; -infinity for a token that a head does not see.
  absl::Span<const double> read_logits;
  // [group]: ln K and ln R.
  absl::Span<const double> log_read;
  absl::Span<const double> log_left;
  const KeySpread* spread = nullptr;
};
// K of each position, [head_dim] in the cache dtype, to be read until MakeSharingTerms returns.
using ReadKeys =
    absl::FunctionRef<std::vector<const std::byte*>(absl::Span<const uint32_t> positions)>;
// Reads the keys of heavy tokens, which carry most of what is read, all at once. The others count
// as if they were m.
SharingTerms MakeSharingTerms(const SharingTask& task, ReadKeys read_keys);

// One later query of a KV head, compared with anchors.
class SharingQuery {
 public:
  // queries: [group][head_dim], un-rotated; position: where they belong. Borrows nothing.
  SharingQuery(const LayerShape& shape, uint32_t position, absl::Span<const float> queries);

  // The estimated share of the mass that would be dropped, in [0, 1], largest over the group's
  // heads; 1 when nothing is known.
  float EstimateDroppedMass(const SharingTerms& terms) const;

 private:
  uint32_t head_dim_;
  uint32_t pair_count_ = 0;  // of rotated channels
  bool half_ = true;
  std::vector<float> queries_;  // times scale
  std::vector<float> cosine_;   // [pair_count]
  std::vector<float> sine_;     // [pair_count]
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SHARING_H_
