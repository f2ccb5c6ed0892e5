// What a selector wants done for one row of a call (one sequence, one layer). A plan is plain data:
// selectors write it without access to keys, a device executes it. Positions are absolute token
// indices; `length` is the row's attended length.
//
//   always read   sinks [0, sink_end), the local window [local_begin, length), every unsealed
//                 slice, tokens that a sketch marks `exact`
//   middle        everything else that is visible: [sink_end, local_begin) above visible_begin;
//                 `source` says where its choice comes from
//   hidden        [sink_end, visible_begin): not read (PSAW) unless a limit cannot be proven
//                 otherwise, always covered by the certificate
//
// Selection is per KV head (its query heads share one list), certificates are per query token and
// query head.

#ifndef KVSERVICE_ATTENTION_PLAN_H_
#define KVSERVICE_ATTENTION_PLAN_H_

#include <cstdint>
#include <limits>

#include "absl/types/span.h"

namespace kvservice {

class TokenLists;  // attention/device.h

inline constexpr uint32_t kDrawsPerRoundMax = 4096;

// Tokens that a reused list has not considered are read as they are, until they are more than this;
// then they compete with the list for its places. To let them compete is to scan every page that
// has a token of the list, which costs more than to read a few more tokens.
inline constexpr uint32_t kFreshTokensMax = 64;

// Where the middle's tokens come from.
enum class Source : uint8_t {
  kAll,    // Read every visible token: dense attention.
  kScan,   // Scan the sketches and choose by Plan::keep.
  kReuse,  // Take the list of the most similar anchor if its cosine reaches min_cosine and the
           // mass it is estimated to drop stays within reuse_mass_limit, else scan and become an
           // anchor. A reused list is completed by scanning only what was appended since it was
           // made or last completed, once that is more than kFreshTokensMax tokens.
  kGiven,  // Take the caller's own positions.
};

// How many of the scanned tokens are kept. Of several rules the one that keeps most counts; none
// keeps none.
struct KeepRule {
  // Keep at least this many tokens of the middle per KV head (0 = off).
  uint32_t top_k = 0;
  // Keep the smallest set for which the certificate's dropped mass reaches this limit for every
  // query head (0 = off). With prove = none the estimated mass is used instead of its bound.
  float mass_limit = 0.0F;
  // Keep the smallest set for which the output error of every query head is expected to be proven
  // to be at most this, as Plan::max_output_error counts it (0 = off). Needs a proof.
  float output_limit = 0.0F;
  // Every kept token among the strongest `dilate_strongest` also brings its neighbours within
  // +-dilate_radius (0 = off).
  uint32_t dilate_strongest = 0;
  uint32_t dilate_radius = 0;
};

enum class Guarantee : uint8_t { kNone, kConfidence, kDeterministic, kExact };
// What happens to a row whose limit cannot be proven.
enum class OnViolation : uint8_t {
  kReport,  // Answer as selected; the certificate says met = false.
  kGrow,    // Read more until it holds, in at most FailureBudget::kRoundsMax rounds; then densely.
  kDense,   // Answer the KV head densely: exact.
  kFail,    // The row fails with FAILED_PRECONDITION (reason BOUND_NOT_MET).
};
enum class Mode : uint8_t {
  kEnforce,
  kShadow,  // Answer densely and report what the selection would have dropped.
};

struct Plan {
  Source source = Source::kAll;
  uint32_t sink_end = 8;
  uint32_t visible_begin = 0;
  uint32_t local_begin = 0;

  // kScan and kReuse.
  KeepRule keep;
  // This layer's lists and anchors; required by kReuse. Read and changed by the device during the
  // call.
  TokenLists* lists = nullptr;
  // `lists` keep what is chosen, for deeper layers that may freeze it (frozen_lists). Otherwise
  // they have no selection after the call: making one takes as long as choosing.
  bool keeps_selection = true;
  float min_cosine = 0.8F;
  // kReuse: [kv_head_count], takes the place of min_cosine unless empty.
  absl::Span<const float> min_cosines;
  // kReuse, verified sharing: the estimated share of mass (attention/sharing.h; of what a scan may
  // choose, for the newest query token, largest over the group's heads) above which the anchor's
  // list is not used, in (0, 1); 0 = off. Both this and min_cosine must hold. Anchors that were
  // made without a limit cannot be estimated and are passed over. An estimate is no bound.
  float reuse_mass_limit = 0.0F;
  // ETF: the choice among [sink_end, frozen_end) is the last selection of a shallower layer of the
  // same step and is not scanned for choosing (a proof still covers it). Used only when
  // frozen_lists has a selection.
  const TokenLists* frozen_lists = nullptr;
  uint32_t frozen_end = 0;

  // kGiven: positions per KV head, ascending and unique, concatenated; given_offsets is
  // [kv_head_count + 1]. Positions outside the middle are allowed and change nothing.
  absl::Span<const uint32_t> given;
  absl::Span<const uint32_t> given_offsets;

  // Planned sets larger than this share of the visible tokens are answered densely: then reading
  // everything without a scan costs less.
  float dense_share = 0.8F;

  // kScan with `lists`: a KV head that had to be answered densely is answered so without a scan for
  // this many positions more, then tried again (0 = off). The head rarely changes its mind, and a
  // scan in vain costs a sixth of reading everything.
  uint32_t dense_positions = 0;

  Guarantee prove = Guarantee::kNone;
  // Limits on every query head; with both set both must hold. The share of softmax mass that is not
  // attended (1 = no limit), and ||o_dense - out||_2 relative to the largest value norm that the KV
  // head sees, of which a lower bound is used (infinity = no limit).
  float max_dropped_mass = 1.0F;
  float max_output_error = std::numeric_limits<float>::infinity();
  // kConfidence: how often each of the two statements about a head and call may be wrong, in
  // (0, 1). Read by nothing else.
  double failure_probability = 1e-9;
  // kConfidence: tokens that one head may sample in one round, 1 to kDrawsPerRoundMax. How many it
  // does sample follows from what they save.
  uint32_t draws_max = 1024;
  OnViolation on_violation = OnViolation::kReport;
  Mode mode = Mode::kEnforce;
};

// What the cosine of an anchor of this KV head must reach for its list to be reused.
inline float MinCosine(const Plan& plan, uint32_t kv_head) {
  return plan.min_cosines.empty() ? plan.min_cosine : plan.min_cosines[kv_head];
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_PLAN_H_
