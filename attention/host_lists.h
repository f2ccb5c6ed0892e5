// TokenLists of devices that compute on the host: what earlier steps chose in one layer of one
// sequence, so that later steps (CIS) and deeper layers (ETF) need not scan.
//
// All state is per KV head and methods of different KV heads touch different memory: a device may
// work on several heads at once, one thread per head. Copy, Truncate and bytes() need the whole
// object to themselves.
//
// What the numbers mean, for every device:
//   tokens       chosen positions of the middle, ascending and unique. What is always read (sinks,
//                window, unsealed slices, tokens that a sketch marks `exact`) is left out: it
//                follows from the plan and the sketches of the call.
//   covered_end  every position in [sink_end, covered_end) was considered when the list was made
//                or last completed: the plan's local_begin, or the begin of the first unsealed
//                slice if that is lower. A reuse reads [covered_end, that of its own call) as it
//                is; once these are more than kFreshTokensMax tokens, it scans them, and they
//                compete with the list's for its max(size, top_k) places.
//   selection    what the latest call of this layer chose, under whatever source; none after a
//                call that read everything.

#ifndef KVSERVICE_ATTENTION_HOST_LISTS_H_
#define KVSERVICE_ATTENTION_HOST_LISTS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/kv_layout.h"
#include "attention/kv_view.h"
#include "attention/sharing.h"

namespace kvservice {

class HostLists : public TokenLists {
 public:
  // A list and when it was last used; the queries it was made for are in queries().
  struct Anchor {
    std::vector<uint32_t> tokens;
    uint32_t covered_end = 0;
    uint64_t used_tick = 0;
    // What estimates need (Plan::reuse_mass_limit); empty when the anchor was made without.
    SharingTerms sharing;
  };
  struct Match {
    // Index of the anchor, -1 when there is none.
    int32_t anchor = -1;
    // The smallest cosine over the group's query heads; -2 when there is no anchor. Queries of norm
    // zero have cosine 0.
    float similarity = -2.0F;
  };

  // anchors_max 0 keeps no anchors, only the selection.
  HostLists(const KvLayout& layout, uint32_t anchors_max);

  std::unique_ptr<TokenLists> Copy() const override;
  void Truncate(uint32_t length) override;
  size_t bytes() const override;

  // The anchor most similar to `queries` ([group][head_dim], un-rotated: see UnrotateQueries);
  // among equals the one used last. With `estimable` anchors without sharing terms do not count.
  Match FindMostSimilar(uint32_t kv_head, absl::Span<const float> queries,
                        bool estimable = false) const;

  uint32_t anchor_count(uint32_t kv_head) const {
    return static_cast<uint32_t>(heads_[kv_head].anchors.size());
  }
  const Anchor& anchor(uint32_t kv_head, uint32_t index) const {
    return heads_[kv_head].anchors[index];
  }
  // [anchor_count][group][head_dim], un-rotated, each query scaled to norm 1 (or zero).
  absl::Span<const float> queries(uint32_t kv_head) const { return heads_[kv_head].queries; }

  // The largest distance of the group's queries (as above) to those that the anchor was made for.
  float QueryDistance(uint32_t kv_head, uint32_t index, absl::Span<const float> queries) const;
  // At least the largest norm of the KV head's keys below `length`. Norms are taken once, as tokens
  // come, and what was seen counts for ever: keys that are gone may leave it too large. norm_max:
  // at least the largest norm of the keys in [begin, end), by whoever can read them.
  using NormMax = absl::FunctionRef<float(uint32_t begin, uint32_t end)>;
  float KeyNormMax(uint32_t kv_head, uint32_t length, NormMax norm_max);
  // Tokens whose keys that has seen.
  uint32_t key_norm_end(uint32_t kv_head) const { return heads_[kv_head].key_norm_end; }

  // Adds an anchor as the most recently used; the least recently used goes when there are
  // anchors_max.
  void Insert(uint32_t kv_head, absl::Span<const float> queries, std::vector<uint32_t> tokens,
              uint32_t covered_end, SharingTerms sharing = {});
  // Marks an anchor as used now.
  void Touch(uint32_t kv_head, uint32_t index);
  // Replaces an anchor's list after it was completed.
  void Complete(uint32_t kv_head, uint32_t index, std::vector<uint32_t> tokens,
                uint32_t covered_end);

  // After an anchor's list was completed: see SharingTerms::Leave.
  void Leave(uint32_t kv_head, uint32_t index, uint32_t head, double log_ratio) {
    heads_[kv_head].anchors[index].sharing.Leave(head, log_ratio);
  }

  bool has_selection(uint32_t kv_head) const { return heads_[kv_head].has_selection; }
  // Ascending; empty without a selection (and after one that chose nothing).
  absl::Span<const uint32_t> selection(uint32_t kv_head) const { return heads_[kv_head].selection; }
  void SetSelection(uint32_t kv_head, absl::Span<const uint32_t> tokens);
  void ClearSelection(uint32_t kv_head);

  // A stretch of positions that is answered densely without a scan (Plan::dense_positions).
  bool IsDense(uint32_t kv_head, uint32_t position) const {
    return position >= heads_[kv_head].dense_begin && position < heads_[kv_head].dense_end;
  }
  void SetDense(uint32_t kv_head, uint32_t begin, uint32_t end) {
    heads_[kv_head].dense_begin = begin;
    heads_[kv_head].dense_end = end;
  }

 private:
  struct Head {
    std::vector<Anchor> anchors;
    std::vector<float> queries;
    std::vector<float> query_norms;  // [anchors][group]
    std::vector<uint32_t> selection;
    bool has_selection = false;
    uint32_t dense_begin = 0;
    uint32_t dense_end = 0;
    uint64_t tick = 0;
    // Of the keys below key_norm_end.
    float key_norm_max = 0.0F;
    uint32_t key_norm_end = 0;
  };

  size_t query_floats() const {
    return static_cast<size_t>(layout_.group_size()) * layout_.head_dim;
  }
  void StoreQueries(uint32_t kv_head, uint32_t index, absl::Span<const float> queries);

  const KvLayout layout_;
  const uint32_t anchors_max_;
  std::vector<Head> heads_;
};

// At least the largest norm of the keys of one KV head in [begin, end), in memory that the host can
// read.
float KeyNormMax(const KvLayout& layout, const KvView& view, uint32_t kv_head, uint32_t begin,
                 uint32_t end);

// The anchor whose list a plan with Source::kReuse takes for `queries` (as above, of a query token
// at `position`), and what was found out on the way.
struct ReusableAnchor {
  int32_t anchor = -1;       // -1: none may be used
  float similarity = -2.0F;  // of the most similar anchor; -2 when there is none
  float estimate = -1.0F;    // of the mass that its list would drop; negative when none was made
};
ReusableAnchor FindReusable(const HostLists& lists, const LayerShape& shape, const Plan& plan,
                            uint32_t kv_head, uint32_t position, absl::Span<const float> queries);

// Undoes the rotary embedding of one query token: q and out are [query_head_count][head_dim] (out
// may be q). Channels beyond the rotated ones are copied, kNone copies all. Double precision
// inside; a few ulps of fp32 outside, which only similarities see.
void UnrotateQueries(const LayerShape& shape, uint32_t position, const float* q, float* out);
// The inverse: rotates as the model would at `position`.
void RotateQueries(const LayerShape& shape, uint32_t position, const float* q, float* out);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_HOST_LISTS_H_
