#include "selector/policy.h"

#include <cmath>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvservice {
namespace {

// abseil of this version has a string_view of its own.
absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

template <typename Number>
absl::Status OutOfRange(std::string_view field, Number value, std::string_view expected) {
  return absl::InvalidArgumentError(
      absl::StrCat("policy.", View(field), " is ", value, ", expected ", View(expected)));
}

absl::Status CheckTokens(std::string_view field, uint32_t tokens) {
  if (tokens <= kPolicyTokensMax) return absl::OkStatus();
  return OutOfRange(field, tokens, absl::StrCat("at most ", kPolicyTokensMax));
}

template <typename Enum>
absl::Status CheckEnum(std::string_view field, Enum value, Enum last) {
  if (value <= last) return absl::OkStatus();
  return OutOfRange(field, static_cast<int>(value), "a known value");
}

absl::Status CheckBudget(std::string_view field, const Budget& budget) {
  const std::string prefix = absl::StrCat(View(field), ".");
  absl::Status status = CheckTokens(prefix + "sink", budget.sink);
  if (status.ok()) status = CheckTokens(prefix + "local", budget.local);
  if (status.ok()) status = CheckTokens(prefix + "top_k", budget.top_k);
  if (status.ok() && !(budget.mass >= 0.0F && budget.mass < 1.0F)) {
    status =
        OutOfRange(prefix + "max_dropped_mass_estimate", budget.mass, "at least 0, less than 1");
  }
  return status;
}

// A selector that scans to choose must not scan for nothing. `field` has the budget in force.
absl::Status CheckKeeps(std::string_view field, SelectorKind selector, const Budget& budget) {
  const bool chooses = selector == SelectorKind::kCis || selector == SelectorKind::kPsaw ||
                       selector == SelectorKind::kEtf || selector == SelectorKind::kCpe ||
                       selector == SelectorKind::kScan;
  if (!chooses || budget.top_k > 0 || budget.mass > 0.0F) return absl::OkStatus();
  return OutOfRange(absl::StrCat(View(field), ".top_k"), budget.top_k,
                    "more than 0 where a scan chooses by it alone");
}

// Comparisons are written so that NaN fails them.
absl::Status CheckCosine(std::string_view field, float cosine) {
  if (cosine >= -1.0F && cosine <= 1.0F) return absl::OkStatus();
  return OutOfRange(field, cosine, "-1 to 1");
}

absl::Status CheckCis(const CisParameters& cis) {
  absl::Status status = CheckCosine("cis.min_cosine", cis.min_cosine);
  if (!status.ok()) return status;
  if (cis.anchors_max == 0 || cis.anchors_max > kAnchorsMax) {
    return OutOfRange("cis.anchors_max", cis.anchors_max, absl::StrCat("1 to ", kAnchorsMax));
  }
  if (cis.dilate_radius > kDilateRadiusMax) {
    return OutOfRange("cis.dilate_radius", cis.dilate_radius,
                      absl::StrCat("at most ", kDilateRadiusMax));
  }
  const float limit = cis.max_dropped_mass_estimate;
  if (!(limit >= 0.0F && limit < 1.0F)) {
    return OutOfRange("cis.max_dropped_mass_estimate", limit, "at least 0, less than 1");
  }
  status = CheckTokens("cis.dilate_strongest", cis.dilate_strongest);
  return status.ok() ? CheckTokens("cis.block_steps", cis.block_steps) : status;
}

absl::Status CheckShare(std::string_view field, float share) {
  if (share > 0.0F && share <= 1.0F) return absl::OkStatus();
  return OutOfRange(field, share, "more than 0, at most 1");
}

// `by_share` is the value that stands for a share of the model's layers.
absl::Status CheckFirstLayer(std::string_view field, uint32_t first, uint32_t by_share,
                             uint32_t layer_count) {
  if (first == by_share || first < layer_count) return absl::OkStatus();
  return OutOfRange(field, first, absl::StrCat("below the model's ", layer_count, " layers"));
}

absl::Status CheckPsaw(const PsawParameters& psaw, uint32_t layer_count) {
  absl::Status status = CheckFirstLayer("psaw.first_layer", psaw.first_layer,
                                        PsawParameters::kHalfOfLayers, layer_count);
  if (status.ok()) status = CheckShare("psaw.phi", psaw.phi);
  if (status.ok() && !(psaw.alpha >= 0.0F && psaw.alpha <= kScheduleExponentMax)) {
    status = OutOfRange("psaw.alpha", psaw.alpha, absl::StrCat("0 to ", kScheduleExponentMax));
  }
  return status;
}

absl::Status CheckEtf(const EtfParameters& etf, uint32_t layer_count) {
  absl::Status status = CheckFirstLayer("etf.first_layer", etf.first_layer,
                                        EtfParameters::kTwoThirdsOfLayers, layer_count);
  if (status.ok()) status = CheckShare("etf.psi", etf.psi);
  if (status.ok() && !(etf.gamma > 0.0F && etf.gamma <= kScheduleExponentMax)) {
    status = OutOfRange("etf.gamma", etf.gamma,
                        absl::StrCat("more than 0, at most ", kScheduleExponentMax));
  }
  return status;
}

// The numbers of one override that only theory reads.
absl::Status CheckFits(const std::string& field, const LayerOverride& entry) {
  const std::pair<const char*, const std::optional<float>*> fits[] = {
      {".psaw_decay_scale", &entry.psaw_decay_scale},
      {".psaw_decay_rate", &entry.psaw_decay_rate},
      {".etf_logit_drift", &entry.etf_logit_drift}};
  for (const auto& [name, fit] : fits) {
    if (!fit->has_value() || (**fit >= 0.0F && std::isfinite(**fit))) continue;
    return OutOfRange(field + name, **fit, "finite and at least 0");
  }
  if (entry.psaw_decay_scale.has_value() == entry.psaw_decay_rate.has_value()) {
    return absl::OkStatus();
  }
  const char* missing = entry.psaw_decay_rate.has_value() ? "scale" : "rate";
  return absl::InvalidArgumentError(absl::StrCat("policy.", field, ".psaw_decay_", missing,
                                                 " is absent, the other of the pair is not"));
}

// The calibrated numbers of one override.
absl::Status CheckCalibration(const std::string& field, const LayerOverride& entry,
                              uint32_t kv_head_count) {
  absl::Status status;
  if (entry.min_cosine.has_value()) {
    status = CheckCosine(field + ".min_cosine", *entry.min_cosine);
  }
  const std::vector<float>& cosines = entry.kv_head_min_cosines;
  if (status.ok() && !cosines.empty() && kv_head_count != kAnyKvHeadCount &&
      cosines.size() != kv_head_count) {
    return absl::InvalidArgumentError(absl::StrCat("policy.", field, ".kv_head_min_cosines has ",
                                                   cosines.size(), " entries, expected ",
                                                   kv_head_count, ", one per KV head"));
  }
  for (size_t head = 0; status.ok() && head < cosines.size(); ++head) {
    status = CheckCosine(absl::StrCat(field, ".kv_head_min_cosines[", head, "]"), cosines[head]);
  }
  const auto check_share = [&](const char* name, const std::optional<float>& share) {
    if (!status.ok() || !share.has_value() || (*share >= 0.0F && *share < 1.0F)) return;
    status = OutOfRange(field + name, *share, "at least 0, less than 1");
  };
  check_share(".hidden_share", entry.hidden_share);
  check_share(".frozen_share", entry.frozen_share);
  return status.ok() ? CheckFits(field, entry) : status;
}

// An override may reach beyond the last layer (one policy serves models of several depths) but must
// begin within the model: one that rules nothing is a mistake.
absl::Status CheckOverride(size_t index, const Policy& policy, uint32_t layer_count,
                           uint32_t kv_head_count) {
  const LayerOverride& entry = policy.layers[index];
  const std::string field = absl::StrCat("layers[", index, "]");
  if (entry.layer_begin >= layer_count) {
    return OutOfRange(field + ".layer_begin", entry.layer_begin,
                      absl::StrCat("below the model's ", layer_count, " layers"));
  }
  if (entry.layer_end <= entry.layer_begin) {
    return OutOfRange(field + ".layer_end", entry.layer_end,
                      absl::StrCat("more than layer_begin ", entry.layer_begin));
  }
  const SelectorKind selector = entry.selector.value_or(policy.selector);
  absl::Status status = CheckEnum(field + ".selector", selector, SelectorKind::kScan);
  const std::string budget_field = entry.budget.has_value() ? field + ".budget" : "budget";
  const Budget& budget = entry.budget.has_value() ? *entry.budget : policy.budget;
  if (status.ok()) status = CheckBudget(budget_field, budget);
  if (status.ok()) status = CheckKeeps(budget_field, selector, budget);
  return status.ok() ? CheckCalibration(field, entry, kv_head_count) : status;
}

absl::Status CheckOverrides(const Policy& policy, uint32_t layer_count, uint32_t kv_head_count) {
  if (policy.layers.size() > kLayerOverridesMax) {
    return absl::InvalidArgumentError(absl::StrCat("policy.layers has ", policy.layers.size(),
                                                   " entries, expected at most ",
                                                   kLayerOverridesMax));
  }
  for (size_t i = 0; i < policy.layers.size(); ++i) {
    const absl::Status status = CheckOverride(i, policy, layer_count, kv_head_count);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status CheckSampling(const Policy& policy) {
  const double probability = policy.failure_probability;
  if (!(probability > 0.0 && probability <= kFailureProbabilityMax)) {
    return OutOfRange("failure_probability", probability,
                      absl::StrCat("more than 0, at most ", kFailureProbabilityMax));
  }
  if (policy.draws_max == 0 || policy.draws_max > kDrawsPerRoundMax) {
    return OutOfRange("draws_max", policy.draws_max, absl::StrCat("1 to ", kDrawsPerRoundMax));
  }
  return absl::OkStatus();
}

absl::Status CheckLimits(const Policy& policy) {
  absl::Status status = CheckShare("max_dropped_mass", policy.max_dropped_mass);
  if (status.ok() && !(policy.max_output_error > 0.0F)) {
    status = OutOfRange("max_output_error", policy.max_output_error, "more than 0");
  }
  if (status.ok()) status = CheckEnum("guarantee", policy.guarantee, Guarantee::kExact);
  if (status.ok()) status = CheckSampling(policy);
  if (status.ok()) status = CheckEnum("on_violation", policy.on_violation, OnViolation::kFail);
  if (status.ok()) status = CheckEnum("mode", policy.mode, Mode::kShadow);
  if (status.ok() && policy.deferred_exact_steps > kDeferredStepsMax) {
    status = OutOfRange("deferred_exact_steps", policy.deferred_exact_steps,
                        absl::StrCat("at most ", kDeferredStepsMax));
  }
  return status;
}

}  // namespace

Policy DefaultPolicy(SelectorKind selector) {
  Policy policy;
  policy.selector = selector;
  if (selector == SelectorKind::kAuto || selector == SelectorKind::kCertified) return policy;
  policy.guarantee = Guarantee::kNone;
  policy.on_violation = OnViolation::kDense;
  policy.max_dropped_mass = 1.0F;
  if (selector == SelectorKind::kCis || selector == SelectorKind::kCpe) {
    policy.cis.min_cosine = kVerifiedMinCosine;
    policy.cis.max_dropped_mass_estimate = kVerifiedDroppedMass;
  }
  if (selector == SelectorKind::kPsaw) policy.psaw.phi = 0.85F;
  if (selector == SelectorKind::kEtf) policy.etf.psi = 0.85F;
  return policy;
}

absl::Status ValidatePolicy(const Policy& policy, uint32_t layer_count, uint32_t kv_head_count) {
  absl::Status status = CheckEnum("selector", policy.selector, SelectorKind::kScan);
  if (status.ok()) status = CheckBudget("budget", policy.budget);
  if (status.ok()) status = CheckKeeps("budget", policy.selector, policy.budget);
  if (status.ok()) status = CheckCis(policy.cis);
  if (status.ok()) status = CheckPsaw(policy.psaw, layer_count);
  if (status.ok()) status = CheckEtf(policy.etf, layer_count);
  if (status.ok()) status = CheckOverrides(policy, layer_count, kv_head_count);
  if (status.ok()) status = CheckLimits(policy);
  return status;
}

}  // namespace kvservice
