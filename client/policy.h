// What a caller asks for: which selector chooses tokens, with which budget, and what must be
// guaranteed about the rest. Mirrors the message kvservice.v1.Policy: whatever is left out means
// the server's default, so the defaults live in one place, the server. Plain data; any thread.

#ifndef KVSERVICE_CLIENT_POLICY_H_
#define KVSERVICE_CLIENT_POLICY_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvservice::client {

enum class Selector : uint8_t {
  kAuto,       // Dense for short sequences, certified above.
  kDense,      // Every token.
  kGiven,      // The caller's own positions, besides what is always read.
  kCis,        // Time axis: reuse the choice made for the most similar earlier query.
  kPsaw,       // Depth axis: deeper layers see a shorter past.
  kEtf,        // Layer axis: deeper layers take a shallower layer's choice for the frozen prefix.
  kCpe,        // CIS, PSAW and ETF together.
  kCertified,  // Scan every call and keep tokens until the limit on dropped mass is proven.
  kScan,       // Scan every call and keep the strongest tokens, by number or estimated mass.
};

// What kind of statement is asked for, weakest first.
enum class Guarantee : uint8_t { kNone, kConfidence, kDeterministic, kExact };

// What happens when a limit cannot be proven for a head: say so, read more, answer densely, or
// fail the row with BOUND_NOT_MET.
enum class OnViolation : uint8_t { kReport, kGrow, kDense, kFail };

// kShadow answers densely and reports what the selection would have dropped.
enum class Mode : uint8_t { kEnforce, kShadow };

// Tokens per KV head.
struct Budget {
  std::optional<uint32_t> sink_tokens = {};
  std::optional<uint32_t> local_tokens = {};
  std::optional<uint32_t> top_k_tokens = {};
  // Choose more where the estimated dropped mass would else exceed this, in (0, 1). No bound.
  std::optional<float> max_dropped_mass_estimate = {};
};

struct CisPolicy {
  std::optional<float> min_cosine = {};
  std::optional<uint32_t> anchors_max = {};
  std::optional<uint32_t> block_steps = {};
  std::optional<uint32_t> dilate_strongest_tokens = {};
  std::optional<uint32_t> dilate_radius_tokens = {};
  // Make anchors of the prompt queries that came with the keys (AppendWriter::Write).
  std::optional<bool> seed = {};
  // Do not reuse a list that is estimated to drop more than this share of mass, in (0, 1); 0 = off.
  // Both this and min_cosine must hold. No bound.
  std::optional<float> max_dropped_mass_estimate = {};
};

struct PsawPolicy {
  std::optional<uint32_t> first_layer = {};
  std::optional<float> phi = {};
  std::optional<float> alpha = {};
};

struct EtfPolicy {
  std::optional<uint32_t> first_layer = {};
  std::optional<float> psi = {};
  std::optional<float> gamma = {};
};

// What is different in layers [layer_begin, layer_end); whatever is left out stays as the policy
// has it. Of several entries that cover a layer the last one counts, whole.
struct LayerOverride {
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;
  std::optional<Selector> selector = {};
  std::optional<Budget> budget = {};
  // kCis and kCpe: instead of CisPolicy::min_cosine; and one per KV head, instead of both.
  std::optional<float> min_cosine = {};
  std::vector<float> kv_head_min_cosines = {};
  // Share of the past that kPsaw and kCpe hide, and kEtf and kCpe freeze, in [0, 1).
  std::optional<float> hidden_share = {};
  std::optional<float> frozen_share = {};
  // Fitted by calibration, for GroupReport::assumed_* alone: attention beyond distance D is
  // psaw_decay_scale exp(-psaw_decay_rate D), and a shallower layer's logits are this far off.
  std::optional<float> psaw_decay_scale = {};
  std::optional<float> psaw_decay_rate = {};
  std::optional<float> etf_logit_drift = {};
};

struct Policy {
  std::optional<Selector> selector = {};
  std::optional<Budget> budget = {};
  std::optional<CisPolicy> cis = {};
  std::optional<PsawPolicy> psaw = {};
  std::optional<EtfPolicy> etf = {};
  // Absent = layers 0 and 1 are dense; an empty list = no overrides.
  std::optional<std::vector<LayerOverride>> layers = {};
  // Limit on the dropped share of softmax attention per query head, in (0, 1]; 1 = none.
  std::optional<float> max_dropped_mass = {};
  // Limit on ||dense output - output||_2 relative to the largest value norm, per query head; with
  // both limits both must hold.
  std::optional<float> max_output_error = {};
  std::optional<Guarantee> guarantee = {};
  // For Guarantee::kConfidence: how often each of the two statements about a head and call may be
  // wrong, in (0, 0.5], and tokens that one head may sample in one round, 1 to 4096.
  std::optional<double> failure_probability = {};
  std::optional<uint32_t> draws_max = {};
  std::optional<OnViolation> on_violation = {};
  std::optional<Mode> mode = {};
  // Deferred exact mode: once so many query tokens of a sequence and layer have come together, the
  // reply carries the exact masses that they dropped. At most 64.
  std::optional<uint32_t> deferred_exact_steps = {};
  // Sequences shorter than this are answered densely.
  std::optional<uint32_t> dense_below_tokens = {};
  // A policy that is stored on the server; excludes everything else.
  std::string name = {};
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_POLICY_H_
