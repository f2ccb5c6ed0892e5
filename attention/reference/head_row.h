// One KV head of one row: which tokens a plan reads, hides and leaves to choose from, and the
// logits of its query heads, exact from keys or bounded from sketches. A *head* below is one query
// token and one query head of the group: head = query_token * group_size + index in group. One
// thread.

#ifndef KVSERVICE_ATTENTION_REFERENCE_HEAD_ROW_H_
#define KVSERVICE_ATTENTION_REFERENCE_HEAD_ROW_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "attention/device.h"
#include "attention/scan_terms.h"
#include "attention/sketch.h"

namespace kvservice::reference {

// The exact logit (in real arithmetic) lies in [low, high].
struct LogitRange {
  double low = 0.0;
  double nearest = 0.0;
  double high = 0.0;
};

// What a plan does with a token of the reference.
enum class Place : uint8_t {
  kAlways,  // Sinks, local window, unsealed slices, `exact` tokens: read whatever is chosen.
  kHidden,  // Below visible_begin: not read.
  kMiddle,  // Left to choose.
};

class HeadRow {
 public:
  // Borrows its arguments.
  HeadRow(const LayerShape& shape, const AttendRow& row, uint32_t kv_head);

  const LayerShape& shape() const { return shape_; }
  const KvView& view() const { return row_.view; }
  uint32_t kv_head() const { return kv_head_; }
  // Of the first query token.
  uint32_t position() const { return row_.position; }
  uint32_t head_count() const { return row_.query_count * shape_.layout.group_size(); }
  // The first head of the newest query token.
  uint32_t newest_head() const { return head_count() - shape_.layout.group_size(); }
  // Index of a head's certificate and lse in the row's arrays; times head_dim, of its query and
  // output.
  size_t OutputIndex(uint32_t head) const;

  // Tokens that some query token sees are [begin(), end()); with a sliding window, later query
  // tokens start later.
  uint32_t begin() const { return begin_; }
  uint32_t end() const { return row_.view.length; }
  // True if the head's own reference (causal, within its window) has the token.
  bool Sees(uint32_t head, uint32_t token) const;
  Place PlaceOf(uint32_t token) const { return places_[token - begin_]; }
  std::vector<uint32_t> TokensAt(Place place) const;
  // First position of the middle's range that a choice cannot have considered: see HostLists,
  // covered_end.
  uint32_t covered_end() const { return covered_end_; }

  // The KV head's sketch page of a block, nullptr if that is not sealed.
  const std::byte* SketchBytes(uint32_t block) const;

  // The logit after soft-cap. `exact` reads the key; `estimate` reads the sketch, which the token
  // must have.
  LogitRange Exact(uint32_t head, uint32_t token);
  LogitRange Estimate(uint32_t head, uint32_t token);
  // Tokens whose sketches were read so far.
  uint32_t scanned_count() const { return scanned_count_; }
  bool WasScanned(uint32_t token) const { return scanned_[token - begin_]; }

  // At least the norm of the token's value, from the sketch, which the token must have.
  float ValueBound(uint32_t token) const;

  // Adds weight * V of the token to out, [head_dim].
  void AddValue(uint32_t token, double weight, double* out) const;

 private:
  void SetPlaces();
  size_t Index(uint32_t head, uint32_t token) const;
  const PageTerms<double>& TermsOf(uint32_t head, uint32_t block);

  const LayerShape& shape_;
  const AttendRow& row_;
  const uint32_t kv_head_;
  const SketchLayout sketch_layout_;
  uint32_t begin_ = 0;
  uint32_t covered_end_ = 0;
  std::vector<Place> places_;                            // [end - begin]
  std::vector<std::optional<LogitRange>> exact_;         // [head_count][end - begin]
  std::vector<QueryTerms<double>> query_terms_;          // [head_count]
  std::vector<std::optional<PageTerms<double>>> pages_;  // [head_count][blocks]
  std::vector<bool> scanned_;                            // [end - begin]
  uint32_t scanned_count_ = 0;
};

}  // namespace kvservice::reference

#endif  // KVSERVICE_ATTENTION_REFERENCE_HEAD_ROW_H_
