#include "kvservice/server/convert_policy.h"

#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "kvservice/error.h"

namespace kvservice {
namespace {

constexpr char kReason[] = "POLICY_INVALID";

std::string Path(std::string_view field, std::string_view member) {
  return std::string(field) + "." + std::string(member);
}

absl::Status Invalid(const std::string& path, const std::string& problem) {
  return InvalidField(path, kReason, path + " " + problem);
}

absl::Status UnknownValue(const std::string& path, int value) {
  return Invalid(path, "has the unknown value " + std::to_string(value));
}

absl::Status NotServed(const std::string& path) {
  return InvalidField(path, "NOT_SERVED", path + " is not served yet");
}

std::optional<SelectorKind> SelectorFromProto(v1::Selector selector) {
  switch (selector) {
    case v1::SELECTOR_UNSPECIFIED:
    case v1::SELECTOR_AUTO:
      return SelectorKind::kAuto;
    case v1::SELECTOR_DENSE:
      return SelectorKind::kDense;
    case v1::SELECTOR_GIVEN:
      return SelectorKind::kGiven;
    case v1::SELECTOR_CIS:
      return SelectorKind::kCis;
    case v1::SELECTOR_PSAW:
      return SelectorKind::kPsaw;
    case v1::SELECTOR_ETF:
      return SelectorKind::kEtf;
    case v1::SELECTOR_CPE:
      return SelectorKind::kCpe;
    case v1::SELECTOR_CERTIFIED:
      return SelectorKind::kCertified;
    case v1::SELECTOR_SCAN:
      return SelectorKind::kScan;
    default:
      return std::nullopt;
  }
}

void ApplyBudget(const v1::Budget& from, Budget* to) {
  if (from.has_sink_tokens()) to->sink = from.sink_tokens();
  if (from.has_local_tokens()) to->local = from.local_tokens();
  if (from.has_top_k_tokens()) to->top_k = from.top_k_tokens();
  if (from.has_max_dropped_mass_estimate()) to->mass = from.max_dropped_mass_estimate();
}

void ApplyCis(const v1::CisPolicy& from, CisParameters* to) {
  if (from.has_min_cosine()) to->min_cosine = from.min_cosine();
  if (from.has_anchors_max()) to->anchors_max = from.anchors_max();
  if (from.has_block_steps()) to->block_steps = from.block_steps();
  if (from.has_dilate_strongest_tokens()) to->dilate_strongest = from.dilate_strongest_tokens();
  if (from.has_dilate_radius_tokens()) to->dilate_radius = from.dilate_radius_tokens();
  if (from.has_seed()) to->seed = from.seed();
  if (from.has_max_dropped_mass_estimate()) {
    to->max_dropped_mass_estimate = from.max_dropped_mass_estimate();
  }
}

void ApplyPsaw(const v1::PsawPolicy& from, PsawParameters* to) {
  if (from.has_first_layer()) to->first_layer = from.first_layer();
  if (from.has_phi()) to->phi = from.phi();
  if (from.has_alpha()) to->alpha = from.alpha();
}

void ApplyEtf(const v1::EtfPolicy& from, EtfParameters* to) {
  if (from.has_first_layer()) to->first_layer = from.first_layer();
  if (from.has_psi()) to->psi = from.psi();
  if (from.has_gamma()) to->gamma = from.gamma();
}

LayerOverride LayersFromProto(const v1::LayerOverride& from) {
  LayerOverride to;
  to.layer_begin = from.layer_begin();
  to.layer_end = from.layer_end();
  if (from.has_budget()) ApplyBudget(from.budget(), &to.budget.emplace());
  if (from.has_min_cosine()) to.min_cosine = from.min_cosine();
  to.kv_head_min_cosines.assign(from.kv_head_min_cosines().begin(),
                                from.kv_head_min_cosines().end());
  if (from.has_hidden_share()) to.hidden_share = from.hidden_share();
  if (from.has_frozen_share()) to.frozen_share = from.frozen_share();
  if (from.has_psaw_decay_scale()) to.psaw_decay_scale = from.psaw_decay_scale();
  if (from.has_psaw_decay_rate()) to.psaw_decay_rate = from.psaw_decay_rate();
  if (from.has_etf_logit_drift()) to.etf_logit_drift = from.etf_logit_drift();
  return to;
}

absl::Status ApplyLayers(const v1::LayerOverrides& from, const std::string& path, Policy* to) {
  if (static_cast<uint32_t>(from.overrides_size()) > kLayerOverridesMax) {
    return Invalid(path, "has " + std::to_string(from.overrides_size()) +
                             " overrides, expected at most " + std::to_string(kLayerOverridesMax));
  }
  to->layers.clear();
  for (int i = 0; i < from.overrides_size(); ++i) {
    const v1::LayerOverride& entry = from.overrides(i);
    const std::optional<SelectorKind> selector = SelectorFromProto(entry.selector());
    if (!selector.has_value()) {
      return UnknownValue(path + ".overrides[" + std::to_string(i) + "].selector",
                          entry.selector());
    }
    LayerOverride layers = LayersFromProto(entry);
    if (entry.selector() != v1::SELECTOR_UNSPECIFIED) layers.selector = selector;
    to->layers.push_back(std::move(layers));
  }
  return absl::OkStatus();
}

// Nothing for a value that this version does not know.
std::optional<Guarantee> GuaranteeFromProto(v1::Guarantee guarantee, Guarantee otherwise) {
  switch (guarantee) {
    case v1::GUARANTEE_UNSPECIFIED:
      return otherwise;
    case v1::GUARANTEE_NONE:
      return Guarantee::kNone;
    case v1::GUARANTEE_CONFIDENCE:
      return Guarantee::kConfidence;
    case v1::GUARANTEE_DETERMINISTIC:
      return Guarantee::kDeterministic;
    case v1::GUARANTEE_EXACT:
      return Guarantee::kExact;
    default:
      return std::nullopt;
  }
}

std::optional<OnViolation> OnViolationFromProto(v1::OnViolation on_violation,
                                                OnViolation otherwise) {
  switch (on_violation) {
    case v1::ON_VIOLATION_UNSPECIFIED:
      return otherwise;
    case v1::ON_VIOLATION_DENSE:
      return OnViolation::kDense;
    case v1::ON_VIOLATION_REPORT:
      return OnViolation::kReport;
    case v1::ON_VIOLATION_GROW:
      return OnViolation::kGrow;
    case v1::ON_VIOLATION_FAIL:
      return OnViolation::kFail;
    default:
      return std::nullopt;
  }
}

std::optional<Mode> ModeFromProto(v1::Mode mode) {
  switch (mode) {
    case v1::MODE_UNSPECIFIED:
    case v1::MODE_ENFORCE:
      return Mode::kEnforce;
    case v1::MODE_SHADOW:
      return Mode::kShadow;
    default:
      return std::nullopt;
  }
}

// Guarantee, limit, what happens beyond it, and mode.
absl::Status ApplyLimits(const v1::Policy& from, std::string_view field, Policy* to) {
  const std::optional<Guarantee> guarantee = GuaranteeFromProto(from.guarantee(), to->guarantee);
  if (!guarantee.has_value()) return UnknownValue(Path(field, "guarantee"), from.guarantee());
  if (*guarantee != to->guarantee) {
    const bool asks_proof = *guarantee != Guarantee::kNone;
    const bool asked_proof = to->guarantee != Guarantee::kNone;
    if (asks_proof != asked_proof)
      to->max_dropped_mass = asks_proof ? Policy{}.max_dropped_mass : 1.0F;
    to->guarantee = *guarantee;
  }
  if (from.has_max_dropped_mass()) to->max_dropped_mass = from.max_dropped_mass();
  // Zero is how a caller spells "the default" of these. NaN is not zero.
  if (from.has_max_output_error() && from.max_output_error() != 0.0F) {
    if (!std::isfinite(from.max_output_error())) {
      return Invalid(Path(field, "max_output_error"), "must be finite");
    }
    to->max_output_error = from.max_output_error();
  }
  if (from.has_failure_probability() && from.failure_probability() != 0.0) {
    to->failure_probability = from.failure_probability();
  }
  if (from.has_draws_max() && from.draws_max() != 0) to->draws_max = from.draws_max();
  const std::optional<OnViolation> on_violation =
      OnViolationFromProto(from.on_violation(), to->on_violation);
  if (!on_violation.has_value()) {
    return UnknownValue(Path(field, "on_violation"), from.on_violation());
  }
  to->on_violation = *on_violation;
  const std::optional<Mode> mode = ModeFromProto(from.mode());
  if (!mode.has_value()) return UnknownValue(Path(field, "mode"), from.mode());
  to->mode = *mode;
  return absl::OkStatus();
}

absl::StatusOr<Policy> NamedPolicy(const v1::Policy& policy, std::string_view field,
                                   const PolicyRegistry& registry) {
  v1::Policy name_alone;
  name_alone.set_name(policy.name());
  if (policy.ByteSizeLong() != name_alone.ByteSizeLong()) {
    return Invalid(Path(field, "name"), "excludes all other fields of the policy");
  }
  const Policy* const found = registry.Find(policy.name());
  if (found != nullptr) return *found;
  return MakeError(absl::StatusCode::kNotFound, "there is no policy named " + policy.name(),
                   {.reason = "POLICY_NOT_FOUND",
                    .field = Path(field, "name"),
                    .metadata = {{"name", policy.name()}}});
}

}  // namespace

absl::StatusOr<Policy> PolicyFromProto(const v1::Policy& policy, std::string_view field,
                                       const PolicyRegistry& registry) {
  if (!policy.name().empty()) return NamedPolicy(policy, field, registry);
  if (policy.has_max_tokens_read()) return NotServed(Path(field, "max_tokens_read"));

  const std::optional<SelectorKind> selector = SelectorFromProto(policy.selector());
  if (!selector.has_value()) return UnknownValue(Path(field, "selector"), policy.selector());
  Policy result = DefaultPolicy(*selector);
  ApplyBudget(policy.budget(), &result.budget);
  ApplyCis(policy.cis(), &result.cis);
  ApplyPsaw(policy.psaw(), &result.psaw);
  ApplyEtf(policy.etf(), &result.etf);
  if (policy.has_deferred_exact_steps()) {
    result.deferred_exact_steps = policy.deferred_exact_steps();
  }
  if (policy.has_dense_below_tokens()) result.dense_below_tokens = policy.dense_below_tokens();
  absl::Status status = ApplyLimits(policy, field, &result);
  if (status.ok() && policy.has_layers()) {
    status = ApplyLayers(policy.layers(), Path(field, "layers"), &result);
  }
  if (!status.ok()) return status;
  return result;
}

v1::Selector SelectorToProto(SelectorKind selector) {
  switch (selector) {
    case SelectorKind::kAuto:
      return v1::SELECTOR_AUTO;
    case SelectorKind::kDense:
      return v1::SELECTOR_DENSE;
    case SelectorKind::kGiven:
      return v1::SELECTOR_GIVEN;
    case SelectorKind::kCis:
      return v1::SELECTOR_CIS;
    case SelectorKind::kPsaw:
      return v1::SELECTOR_PSAW;
    case SelectorKind::kEtf:
      return v1::SELECTOR_ETF;
    case SelectorKind::kCpe:
      return v1::SELECTOR_CPE;
    case SelectorKind::kCertified:
      return v1::SELECTOR_CERTIFIED;
    case SelectorKind::kScan:
      return v1::SELECTOR_SCAN;
  }
  return v1::SELECTOR_UNSPECIFIED;
}

namespace {

void BudgetToProto(const Budget& from, v1::Budget* to) {
  to->set_sink_tokens(from.sink);
  to->set_local_tokens(from.local);
  to->set_top_k_tokens(from.top_k);
  if (from.mass > 0.0F) to->set_max_dropped_mass_estimate(from.mass);
}

v1::Guarantee GuaranteeToProto(Guarantee guarantee) {
  switch (guarantee) {
    case Guarantee::kNone:
      return v1::GUARANTEE_NONE;
    case Guarantee::kConfidence:
      return v1::GUARANTEE_CONFIDENCE;
    case Guarantee::kDeterministic:
      return v1::GUARANTEE_DETERMINISTIC;
    case Guarantee::kExact:
      return v1::GUARANTEE_EXACT;
  }
  return v1::GUARANTEE_UNSPECIFIED;
}

v1::OnViolation OnViolationToProto(OnViolation on_violation) {
  switch (on_violation) {
    case OnViolation::kReport:
      return v1::ON_VIOLATION_REPORT;
    case OnViolation::kGrow:
      return v1::ON_VIOLATION_GROW;
    case OnViolation::kDense:
      return v1::ON_VIOLATION_DENSE;
    case OnViolation::kFail:
      return v1::ON_VIOLATION_FAIL;
  }
  return v1::ON_VIOLATION_UNSPECIFIED;
}

void LayersToProto(const LayerOverride& from, v1::LayerOverride* to) {
  to->set_layer_begin(from.layer_begin);
  to->set_layer_end(from.layer_end);
  if (from.selector.has_value()) to->set_selector(SelectorToProto(*from.selector));
  if (from.budget.has_value()) BudgetToProto(*from.budget, to->mutable_budget());
  if (from.min_cosine.has_value()) to->set_min_cosine(*from.min_cosine);
  to->mutable_kv_head_min_cosines()->Add(from.kv_head_min_cosines.begin(),
                                         from.kv_head_min_cosines.end());
  if (from.hidden_share.has_value()) to->set_hidden_share(*from.hidden_share);
  if (from.frozen_share.has_value()) to->set_frozen_share(*from.frozen_share);
  if (from.psaw_decay_scale.has_value()) to->set_psaw_decay_scale(*from.psaw_decay_scale);
  if (from.psaw_decay_rate.has_value()) to->set_psaw_decay_rate(*from.psaw_decay_rate);
  if (from.etf_logit_drift.has_value()) to->set_etf_logit_drift(*from.etf_logit_drift);
}

void EditsToProto(const Policy& from, v1::Policy* to) {
  v1::CisPolicy* cis = to->mutable_cis();
  cis->set_min_cosine(from.cis.min_cosine);
  cis->set_anchors_max(from.cis.anchors_max);
  cis->set_block_steps(from.cis.block_steps);
  cis->set_dilate_strongest_tokens(from.cis.dilate_strongest);
  cis->set_dilate_radius_tokens(from.cis.dilate_radius);
  cis->set_seed(from.cis.seed);
  cis->set_max_dropped_mass_estimate(from.cis.max_dropped_mass_estimate);
  v1::PsawPolicy* psaw = to->mutable_psaw();
  // An absent first layer means the default share of the layers.
  if (from.psaw.first_layer != PsawParameters::kHalfOfLayers) {
    psaw->set_first_layer(from.psaw.first_layer);
  }
  psaw->set_phi(from.psaw.phi);
  psaw->set_alpha(from.psaw.alpha);
  v1::EtfPolicy* etf = to->mutable_etf();
  if (from.etf.first_layer != EtfParameters::kTwoThirdsOfLayers) {
    etf->set_first_layer(from.etf.first_layer);
  }
  etf->set_psi(from.etf.psi);
  etf->set_gamma(from.etf.gamma);
}

}  // namespace

v1::Policy PolicyToProto(const Policy& policy) {
  v1::Policy result;
  result.set_selector(SelectorToProto(policy.selector));
  BudgetToProto(policy.budget, result.mutable_budget());
  EditsToProto(policy, &result);
  result.mutable_layers();
  for (const LayerOverride& entry : policy.layers) {
    LayersToProto(entry, result.mutable_layers()->add_overrides());
  }
  result.set_max_dropped_mass(policy.max_dropped_mass);
  if (std::isfinite(policy.max_output_error)) result.set_max_output_error(policy.max_output_error);
  result.set_guarantee(GuaranteeToProto(policy.guarantee));
  result.set_failure_probability(policy.failure_probability);
  result.set_draws_max(policy.draws_max);
  result.set_on_violation(OnViolationToProto(policy.on_violation));
  result.set_mode(policy.mode == Mode::kShadow ? v1::MODE_SHADOW : v1::MODE_ENFORCE);
  result.set_dense_below_tokens(policy.dense_below_tokens);
  if (policy.deferred_exact_steps > 0) {
    result.set_deferred_exact_steps(policy.deferred_exact_steps);
  }
  return result;
}

}  // namespace kvservice
