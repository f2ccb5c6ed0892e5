// Learns the sketch table of one KV head from what its queries and keys look like. Whatever it is
// given, the result is a valid table, so a bad sample makes bounds looser and never wrong.
//
// The bound of a token is tight when |p.e| <= ||p / M|| ||M e|| is (p: the query less what the
// directions cover, e: what the 4-bit code missed). For typical sizes of p_c and e_c per channel
// the product of the two norms is least at M_c^2 = |p_c| / |e_c|, and e_c is in proportion to the
// range that a page's keys span in the channel. The directions take the part of the query that is
// common to most queries out of p: the top eigenvectors of sum q'q'^T with q' = q / M. Source:
// certificate specification section 1.

#ifndef KVSERVICE_ATTENTION_SKETCH_LEARNING_H_
#define KVSERVICE_ATTENTION_SKETCH_LEARNING_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "attention/kv_layout.h"
#include "attention/sketch_table.h"

namespace kvservice {

// Running sums over the queries and key pages of one KV head; 8 * head_dim * (head_dim + 1) bytes,
// however much is added. Not thread-safe. The order of additions changes the result by rounding
// only; the same order gives the same bits.
class SketchStatistics {
 public:
  explicit SketchStatistics(uint32_t head_dim);

  // A query of one of the KV head's query heads, [head_dim] as received (a factor common to all
  // queries of the KV head changes nothing, so the scale is not needed). INVALID_ARGUMENT naming
  // "query" and the channel if a number is not finite; then nothing changes. A query of zeros says
  // nothing and is not counted.
  absl::Status AddQuery(const float* query);

  // The 64 rows of one KV head of a full slice: slice + layout.RowOffset(kv_head, 0).
  //   exact   tokens to leave out (those that the page's sketch leaves out); a page in which fewer
  //           than two tokens remain, or a key is not finite, says nothing and is not counted
  void AddPage(const KvLayout& layout, const std::byte* rows, uint64_t exact);

  // max - min per channel over the keys of one page, [head_dim]. INVALID_ARGUMENT naming "range"
  // and the channel if one is negative or not finite; then nothing changes.
  absl::Status AddRange(absl::Span<const float> range);

  uint32_t head_dim() const { return head_dim_; }
  uint64_t query_count() const { return query_count_; }
  uint64_t page_count() const { return page_count_; }
  // sum of q q^T over the queries, [head_dim][head_dim], symmetric.
  absl::Span<const double> query_moments() const { return query_moments_; }
  // Sum of the pages' ranges, [head_dim].
  absl::Span<const double> range_sums() const { return range_sums_; }

 private:
  const uint32_t head_dim_;
  uint64_t query_count_ = 0;
  uint64_t page_count_ = 0;
  std::vector<double> query_moments_;
  std::vector<double> range_sums_;
};

// M_c = sqrt(rms(p_c) / mean range_c), the mean square floored at 1e-3 of the queries' mean over
// the channels and the range at 1e-3 of the median channel's; U = the top eigenvectors as above.
// What was not seen (no query, no page, all zero) counts as equal in all channels; without queries
// there are no directions. Always a valid, normalised table.
SketchTable LearnSketchTable(const SketchStatistics& statistics);

// The `count` eigenvectors of the largest eigenvalues of a symmetric positive semidefinite matrix
// [dim][dim], as rows of norm 1, orthogonal to each other, the largest component of each positive;
// rows beyond the rank are zero. Subspace iteration with a fixed start: the same bits for the same
// matrix. Eigenvalues closer than their sixth digit may leave a mixture of their vectors.
// Requires count <= dim.
std::vector<double> TopEigenvectors(uint32_t dim, absl::Span<const double> matrix, uint32_t count);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SKETCH_LEARNING_H_
