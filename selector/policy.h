// What a caller asks for: which selector chooses tokens, with which budget, and what must be
// guaranteed about the rest. The C++ image of the proto Policy; defaults live here and nowhere
// else. Plain data.

#ifndef KVSERVICE_SELECTOR_POLICY_H_
#define KVSERVICE_SELECTOR_POLICY_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "attention/plan.h"

namespace kvservice {

enum class SelectorKind : uint8_t {
  kAuto,       // Dense below dense_below_tokens, or where it is no slower; certified above.
  kDense,      // Every token.
  kGiven,      // The caller's own positions.
  kCis,        // Time axis: reuse the list of the most similar earlier query.
  kPsaw,       // Depth axis: deeper layers see a shorter past (and scan it).
  kEtf,        // Layer axis: deeper layers take the frozen prefix's choice from a shallower layer.
  kCpe,        // CIS, PSAW and ETF in a row.
  kCertified,  // Scan every call and keep by mass until the limit is proven.
  kScan,       // Scan every call and keep the strongest, as Budget says: CIS without its memory.
};

// Numbers of tokens per KV head, and what a scan keeps of the rest: at least top_k tokens, and more
// where `mass` asks for it. Selectors that scan to choose (kScan, kCis, kPsaw, kEtf, kCpe) need one
// of the two.
struct Budget {
  uint32_t sink = 8;
  uint32_t local = 64;
  uint32_t top_k = 512;
  // Keep the smallest set that leaves every query head at most this share of what the scan saw, in
  // (0, 1); 0 = off. By the scan's estimate, from which the dropped mass that the certificate
  // estimates (with the kept keys scored) differs by some percent; where the policy asks for a
  // proof the share counts by its bound. A list that CIS reuses has only the room that it was made
  // with, so with kCis and kCpe top_k should leave slack; with kScan, top_k = 0 gives the smallest
  // set alone.
  float mass = 0.0F;
  friend bool operator==(const Budget&, const Budget&) = default;
};

struct CisParameters {
  // Reuse when the smallest cosine over the group's query heads reaches this, in [-1, 1]. -1 reuses
  // whatever there is, 1 practically never.
  float min_cosine = 0.8F;
  // Anchors kept per KV head, least recently used goes.
  uint32_t anchors_max = 128;
  // The paper's form: forget all anchors every `block_steps` positions. 0 = anchors live as long as
  // the sequence.
  uint32_t block_steps = 0;
  uint32_t dilate_strongest = 0;
  uint32_t dilate_radius = 0;
  // Prompt queries that came with the keys become anchors at the first steps. Not in the paper's
  // form, which forgets them at the next block.
  bool seed = true;
  // Verified sharing: do not reuse a list that is estimated to drop more than this share of the
  // mass of any query head of the group, in (0, 1); 0 = off. Both this and min_cosine must hold,
  // and with it min_cosine may be low. The estimate leans to the high side (attention/sharing.h),
  // and it is no bound.
  float max_dropped_mass_estimate = 0.0F;
  friend bool operator==(const CisParameters&, const CisParameters&) = default;
};

// P_l(t) = floor((1 - phi^(alpha (l - l_s) / (N - l_s))) t) hidden positions in layer l >= l_s. phi
// = 1 hides nothing.
struct PsawParameters {
  static constexpr uint32_t kHalfOfLayers = UINT32_MAX;
  uint32_t first_layer = kHalfOfLayers;  // l_s; kHalfOfLayers = N / 2
  float phi = 1.0F;                      // in (0, 1]
  float alpha = 1.0F;                    // >= 0
  friend bool operator==(const PsawParameters&, const PsawParameters&) = default;
};

// E_l(t) = floor((1 - psi^(gamma (l - l_s) / (N - l_s))) t) frozen positions in layer l >= l_s. psi
// = 1 freezes nothing.
struct EtfParameters {
  static constexpr uint32_t kTwoThirdsOfLayers = UINT32_MAX;
  uint32_t first_layer = kTwoThirdsOfLayers;  // l_s; kTwoThirdsOfLayers = 2 N / 3
  float psi = 1.0F;                           // in (0, 1]
  float gamma = 1.0F;                         // > 0
  friend bool operator==(const EtfParameters&, const EtfParameters&) = default;
};

// What is different in layers [layer_begin, layer_end): whatever is absent stays as the policy has
// it. Calibration writes these (per layer and KV head), since heads differ in how far a choice may
// be shared and layers in how much of the past they need.
struct LayerOverride {
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;
  std::optional<SelectorKind> selector = {};
  std::optional<Budget> budget = {};
  // CIS and CPE: takes the place of CisParameters::min_cosine; and per KV head, [kv_head_count] or
  // empty, the place of both.
  std::optional<float> min_cosine = {};
  std::vector<float> kv_head_min_cosines = {};
  // PSAW, ETF and CPE: share of the past that is hidden or frozen, in [0, 1), instead of what the
  // schedule says: floor(share t) positions at length t.
  std::optional<float> hidden_share = {};
  std::optional<float> frozen_share = {};
  // Fitted by calibration, for what the theory assumes (selector/assumed.h) and for nothing else:
  // the mass beyond distance D is psaw_decay_scale exp(-psaw_decay_rate D), both or neither; logits
  // of the shallower layer are within etf_logit_drift of the layer's own. Finite, at least 0.
  std::optional<float> psaw_decay_scale = {};
  std::optional<float> psaw_decay_rate = {};
  std::optional<float> etf_logit_drift = {};
  friend bool operator==(const LayerOverride&, const LayerOverride&) = default;
};

inline constexpr uint32_t kLayerOverridesMax = 256;

struct Policy {
  SelectorKind selector = SelectorKind::kCertified;
  Budget budget;
  CisParameters cis;
  PsawParameters psaw;
  EtfParameters etf;
  // Of the entries that cover a layer the last one counts, whole. Default: layers 0 and 1 are
  // dense, their heads are diffuse (measured, docs/decisions.md).
  std::vector<LayerOverride> layers = {
      {.layer_begin = 0, .layer_end = 2, .selector = SelectorKind::kDense}};
  // Sequences shorter than this are answered densely, unless the positions are given: scanning them
  // costs more than reading them.
  uint32_t dense_below_tokens = 2048;
  // Limit on the dropped softmax mass per query head, in (0, 1]; 1 = none.
  float max_dropped_mass = 0.05F;
  // Limit on the error of the output relative to the largest value norm, more than 0; infinity =
  // none. With both limits set both must hold.
  float max_output_error = std::numeric_limits<float>::infinity();
  Guarantee guarantee = Guarantee::kConfidence;
  // kConfidence: how often each of the two statements about a head and call may be wrong, in
  // (0, 0.5], and tokens that one head may sample in one round, 1 to kDrawsPerRoundMax.
  double failure_probability = 1e-9;
  uint32_t draws_max = 1024;
  OnViolation on_violation = OnViolation::kGrow;
  Mode mode = Mode::kEnforce;
  // Deferred exact mode: once so many query tokens of a sequence and layer have come together, the
  // exact masses that they dropped are computed in one pass. 0 = off, at most kDeferredStepsMax.
  uint32_t deferred_exact_steps = 0;
  friend bool operator==(const Policy&, const Policy&) = default;
};

// Verified sharing as it is shipped: measured, docs/quality.md and docs/decisions.md.
inline constexpr float kVerifiedMinCosine = 0.5F;
inline constexpr float kVerifiedDroppedMass = 0.8F;

// The policy a selector stands for when only its name is given: kCpe, kCis, kPsaw, kEtf, kScan and
// kGiven ask for no proof (guarantee = kNone, limit 1) and answer densely where one is asked for in
// vain, kCis and kCpe share what is verified (the two numbers above), kPsaw and kEtf switch their
// edit on (phi = psi = 0.85), kCertified and kAuto prove 0.05 with confidence and grow until they
// can.
Policy DefaultPolicy(SelectorKind selector);

// Largest numbers that a policy may carry; beyond them is a mistake, not a wish.
inline constexpr uint32_t kPolicyTokensMax = 1U << 20;
inline constexpr uint32_t kAnchorsMax = 4096;
inline constexpr uint32_t kDilateRadiusMax = 1024;
inline constexpr float kScheduleExponentMax = 1000.0F;
inline constexpr uint32_t kDeferredStepsMax = 64;
// A statement that is wrong more often than not says nothing.
inline constexpr double kFailureProbabilityMax = 0.5;

// For policies that are checked before a model is known.
inline constexpr uint32_t kAnyLayerCount = UINT32_MAX;
inline constexpr uint32_t kAnyKvHeadCount = 0;

// INVALID_ARGUMENT unless every number is finite and in its range, and everything that scans to
// choose keeps something. The message starts with the path of the field and a space:
// "policy.cis.min_cosine is 2, expected ...".
absl::Status ValidatePolicy(const Policy& policy, uint32_t layer_count, uint32_t kv_head_count);

}  // namespace kvservice

#endif  // KVSERVICE_SELECTOR_POLICY_H_
