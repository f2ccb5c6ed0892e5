#include "tests/eval/policy_file.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace kvservice::eval {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::pair<SelectorKind, const char*> kSelectors[] = {
    {SelectorKind::kDense, "SELECTOR_DENSE"}, {SelectorKind::kScan, "SELECTOR_SCAN"},
    {SelectorKind::kCis, "SELECTOR_CIS"},     {SelectorKind::kPsaw, "SELECTOR_PSAW"},
    {SelectorKind::kEtf, "SELECTOR_ETF"},     {SelectorKind::kCpe, "SELECTOR_CPE"}};

const char* SelectorName(SelectorKind kind) {
  for (const auto& [known, name] : kSelectors) {
    if (known == kind) return name;
  }
  return "SELECTOR_UNSPECIFIED";
}

Json OverrideJson(const LayerOverride& entry) {
  Json json = {{"layerBegin", entry.layer_begin}, {"layerEnd", entry.layer_end}};
  if (entry.selector.has_value()) json["selector"] = SelectorName(*entry.selector);
  if (entry.min_cosine.has_value()) json["minCosine"] = *entry.min_cosine;
  if (!entry.kv_head_min_cosines.empty()) json["kvHeadMinCosines"] = entry.kv_head_min_cosines;
  if (entry.hidden_share.has_value()) json["hiddenShare"] = *entry.hidden_share;
  if (entry.frozen_share.has_value()) json["frozenShare"] = *entry.frozen_share;
  return json;
}

absl::Status ReadSelector(const Json& json, std::optional<SelectorKind>* selector) {
  for (const auto& [kind, name] : kSelectors) {
    if (json == name) *selector = kind;
  }
  if (selector->has_value()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("selector ", json.dump(), " is not known here"));
}

absl::StatusOr<LayerOverride> ReadOverride(const Json& json) {
  LayerOverride entry;
  for (const auto& [key, value] : json.items()) {
    if (key == "layerBegin") {
      entry.layer_begin = value;
    } else if (key == "layerEnd") {
      entry.layer_end = value;
    } else if (key == "selector") {
      const absl::Status status = ReadSelector(value, &entry.selector);
      if (!status.ok()) return status;
    } else if (key == "minCosine") {
      entry.min_cosine = value.get<float>();
    } else if (key == "kvHeadMinCosines") {
      entry.kv_head_min_cosines = value.get<std::vector<float>>();
    } else if (key == "hiddenShare") {
      entry.hidden_share = value.get<float>();
    } else if (key == "frozenShare") {
      entry.frozen_share = value.get<float>();
    } else {
      return absl::InvalidArgumentError(absl::StrCat("layers: ", key, " is not known here"));
    }
  }
  return entry;
}

}  // namespace

std::string PolicyFileText(const std::string& name, const Policy& policy) {
  Json overrides = Json::array();
  for (const LayerOverride& entry : policy.layers) overrides.push_back(OverrideJson(entry));
  const Json file = {{"name", name},
                     {"policy",
                      {{"selector", SelectorName(policy.selector)},
                       {"cis",
                        {{"minCosine", policy.cis.min_cosine},
                         {"maxDroppedMassEstimate", policy.cis.max_dropped_mass_estimate}}},
                       {"layers", {{"overrides", overrides}}}}}};
  return file.dump(1) + "\n";
}

absl::StatusOr<Policy> ParsePolicyFile(const std::string& text) {
  const Json file = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!file.is_object() || !file.contains("policy")) {
    return absl::InvalidArgumentError("not a policy file");
  }
  std::optional<SelectorKind> selector;
  const absl::Status status = ReadSelector(file["policy"]["selector"], &selector);
  if (!status.ok()) return status;
  Policy policy = DefaultPolicy(*selector);
  policy.cis.min_cosine = file["policy"]["cis"]["minCosine"];
  policy.cis.max_dropped_mass_estimate = file["policy"]["cis"]["maxDroppedMassEstimate"];
  policy.layers.clear();
  for (const Json& json : file["policy"]["layers"]["overrides"]) {
    auto entry = ReadOverride(json);
    if (!entry.ok()) return entry.status();
    policy.layers.push_back(std::move(*entry));
  }
  return policy;
}

}  // namespace kvservice::eval
