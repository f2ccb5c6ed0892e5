#include "tests/eval/contender.h"

#include <algorithm>
#include <functional>
#include <map>

#include "absl/strings/str_cat.h"

namespace kvservice::eval {
namespace {

// A list that is made for reuse by a mass budget holds at least so many tokens: a set that was just
// enough for its anchor has no room for the next query.
constexpr uint32_t kListTokensMin = 512 - kStudySinks - kStudyLocal;

constexpr float kFewScansTau = 0.65F;

constexpr const char* kBaselines[] = {
    "oracle",       "hshare",          "h2o",       "streaming_llm", "snapkv",
    "quest",        "double_sparsity", "loki",      "twilight",      "tidal_decode",
    "token_select", "magicpig",        "vattention"};

uint32_t TopK(const StudyBudget& budget) {
  return budget.tokens == 0 ? 0 : budget.tokens - kStudySinks - kStudyLocal;
}

std::vector<LayerOverride> DenseFirstLayers() {
  return {{.layer_begin = 0, .layer_end = kStudyDenseLayers, .selector = SelectorKind::kDense}};
}

// A product policy under the conditions of the study: always selecting, whatever the length.
Policy StudyPolicy(SelectorKind selector) {
  Policy policy = DefaultPolicy(selector);
  policy.budget = {.sink = kStudySinks, .local = kStudyLocal, .top_k = 0};
  policy.layers = DenseFirstLayers();
  policy.dense_below_tokens = 0;
  return policy;
}

Contender Product(std::string method, std::string variant, SelectorKind selector,
                  const StudyBudget& budget) {
  Contender contender{.method = std::move(method),
                      .variant = std::move(variant),
                      .budget = budget.name(),
                      .policy = StudyPolicy(selector)};
  Budget& asked = contender.policy.budget;
  asked.top_k = TopK(budget);
  asked.mass = budget.mass;
  const bool reuses = selector == SelectorKind::kCis || selector == SelectorKind::kCpe;
  if (budget.mass > 0.0F && reuses) asked.top_k = kListTokensMin;
  return contender;
}

Contender Dense() {
  Contender contender{.method = "dense", .policy = StudyPolicy(SelectorKind::kDense)};
  return contender;
}

Contender Published(const std::string& name, const StudyBudget& budget) {
  Contender contender{.method = name, .budget = budget.name()};
  contender.policy = StudyPolicy(SelectorKind::kGiven);
  // Read by no `given` plan; a policy needs one.
  contender.policy.budget.top_k = 1;
  contender.baseline = name;
  contender.reads_logits =
      name == "oracle" || name == "h2o" || name == "tidal_decode" || name == "token_select";
  contender.token_budget = {
      .sink = kStudySinks, .local = kStudyLocal, .top_k = TopK(budget), .mass_limit = budget.mass};
  if (budget.mass > 0.0F) contender.token_budget.top_k = kListTokensMin;
  return contender;
}

// CPE as calibrated for the model, under another budget.
Contender Calibrated(const Policy& calibrated, const StudyBudget& budget) {
  Contender contender = Product("cpe", "calibrated", SelectorKind::kCpe, budget);
  const Budget of_study = contender.policy.budget;
  contender.policy = calibrated;
  contender.policy.dense_below_tokens = 0;
  contender.policy.budget = of_study;
  return contender;
}

Contender WithTau(Contender contender, float tau) {
  contender.policy.cis.min_cosine = tau;
  contender.policy.cis.max_dropped_mass_estimate = 0.0F;
  contender.variant =
      absl::StrCat(contender.variant.empty() ? "" : contender.variant + ", ", "tau ", tau);
  return contender;
}

Contender Seeded(Contender contender) {
  contender.seeded = true;
  contender.variant += contender.variant.empty() ? "seeded" : ", seeded";
  return contender;
}

Contender Blocks(uint32_t steps, bool dilated, const StudyBudget& budget) {
  Contender contender =
      Product("cis", absl::StrCat("blocks of ", steps), SelectorKind::kCis, budget);
  contender.policy.cis.block_steps = steps;
  contender.policy.cis.min_cosine = 0.8F;
  contender.policy.cis.max_dropped_mass_estimate = 0.0F;
  if (dilated) {
    // What the neighbours take is given up elsewhere: 16 * 2 * 2 tokens.
    contender.variant += ", dilated";
    contender.policy.cis.dilate_strongest = 16;
    contender.policy.cis.dilate_radius = 2;
    contender.policy.budget.top_k -= std::min(contender.policy.budget.top_k - 1, 64U);
  }
  return contender;
}

std::vector<Contender> Rivals(const Policy* /*calibrated*/) {
  std::vector<Contender> set;
  for (const StudyBudget& budget : TableBudgets()) {
    for (const char* name : kBaselines) set.push_back(Published(name, budget));
    set.push_back(Product("scan", "", SelectorKind::kScan, budget));
  }
  return set;
}

std::vector<Contender> Ours(const Policy* calibrated) {
  std::vector<Contender> set;
  for (const StudyBudget& budget : TableBudgets()) {
    set.push_back(Product("cis", "", SelectorKind::kCis, budget));
    set.push_back(Seeded(Product("cis", "", SelectorKind::kCis, budget)));
    // The few scans that published sharing makes; quality is given up for them.
    if (budget.tokens > 0) {
      set.push_back(WithTau(Product("cis", "", SelectorKind::kCis, budget), kFewScansTau));
    }
    set.push_back(Product("psaw", "", SelectorKind::kPsaw, budget));
    set.push_back(Product("etf", "", SelectorKind::kEtf, budget));
    Contender cpe = Product("cpe", "phi = psi = 0.85", SelectorKind::kCpe, budget);
    cpe.policy.psaw.phi = 0.85F;
    cpe.policy.etf.psi = 0.85F;
    set.push_back(cpe);
    if (calibrated != nullptr) {
      set.push_back(Calibrated(*calibrated, budget));
      set.push_back(Seeded(Calibrated(*calibrated, budget)));
    }
  }
  return set;
}

// Shares while the list's estimated dropped mass stays under `limit`, whatever else the cosine says
// above 0.5.
Contender Verified(Contender contender, float limit) {
  contender.policy.cis.min_cosine = kVerifiedMinCosine;
  contender.policy.cis.max_dropped_mass_estimate = limit;
  contender.variant = absl::StrCat("verified ", limit);
  return contender;
}

std::vector<Contender> Sharing(const Policy* calibrated) {
  const StudyBudget budget{.tokens = 512};
  const Contender cis = Product("cis", "", SelectorKind::kCis, budget);
  std::vector<Contender> set = {Published("oracle", budget), Published("hshare", budget),
                                Product("scan", "", SelectorKind::kScan, budget)};
  for (const float tau : {0.6F, 0.7F, 0.75F, 0.8F, 0.85F, 0.9F}) set.push_back(WithTau(cis, tau));
  for (const float tau : {0.75F, 0.8F, 0.85F}) set.push_back(Seeded(WithTau(cis, tau)));
  for (const float limit : {0.3F, 0.5F, 0.6F, 0.7F, 0.8F, 0.9F}) {
    set.push_back(Verified(cis, limit));
  }
  for (const float limit : {0.5F, 0.7F, 0.8F, 0.9F}) set.push_back(Seeded(Verified(cis, limit)));
  for (const uint32_t anchors : {16U, 32U}) {
    set.push_back(WithTau(cis, 0.8F));
    set.back().variant += absl::StrCat(", ", anchors, " anchors");
    set.back().policy.cis.anchors_max = anchors;
  }
  set.push_back(WithTau(cis, 0.8F));
  set.back().variant += ", cosine after rotation";
  set.back().unrotated = false;
  set.push_back(Blocks(16, false, budget));
  set.push_back(Blocks(32, false, budget));
  set.push_back(Blocks(16, true, budget));
  set.push_back(WithTau(Blocks(16, false, budget), -1.0F));
  set.back().variant = "blocks of 16, whatever the cosine";
  if (calibrated != nullptr) {
    set.push_back(Calibrated(*calibrated, budget));
    set.push_back(Seeded(Calibrated(*calibrated, budget)));
  }
  return set;
}

std::vector<Contender> Axes(const Policy* /*calibrated*/) {
  std::vector<Contender> set;
  const StudyBudget budget{.tokens = 512};
  set.push_back(Product("scan", "", SelectorKind::kScan, budget));
  for (const float share : {0.95F, 0.85F, 0.7F, 0.5F}) {
    Contender psaw = Product("psaw", absl::StrCat("phi ", share), SelectorKind::kPsaw, budget);
    psaw.policy.psaw.phi = share;
    set.push_back(psaw);
    Contender etf = Product("etf", absl::StrCat("psi ", share), SelectorKind::kEtf, budget);
    etf.policy.etf.psi = share;
    set.push_back(etf);
  }
  return set;
}

Contender Certified(Guarantee guarantee, float limit) {
  Contender contender{
      .method = "certified",
      .variant = guarantee == Guarantee::kDeterministic ? "deterministic" : "confidence 1e-9",
      .budget = absl::StrCat("limit ", limit),
      .policy = StudyPolicy(SelectorKind::kCertified)};
  contender.policy.guarantee = guarantee;
  contender.policy.max_dropped_mass = limit;
  contender.policy.budget.top_k = 1;
  return contender;
}

// A selection that is not chosen to be provable, with its bound reported.
Contender Reported(SelectorKind selector, const char* name, Guarantee guarantee,
                   const StudyBudget& budget) {
  Contender contender = Product(
      name, guarantee == Guarantee::kDeterministic ? "bound reported" : "bound sampled at 0.01",
      selector, budget);
  contender.policy.guarantee = guarantee;
  contender.policy.failure_probability = 0.01;
  contender.policy.on_violation = OnViolation::kReport;
  return contender;
}

std::vector<Contender> Proof(const Policy* /*calibrated*/) {
  std::vector<Contender> set;
  for (const float limit : {0.1F, 0.05F, 0.02F, 0.01F}) {
    set.push_back(Certified(Guarantee::kConfidence, limit));
    set.push_back(Certified(Guarantee::kDeterministic, limit));
  }
  for (const uint32_t tokens : {128U, 256U, 512U}) {
    const StudyBudget budget{.tokens = tokens};
    for (const Guarantee guarantee : {Guarantee::kDeterministic, Guarantee::kConfidence}) {
      set.push_back(Reported(SelectorKind::kScan, "scan", guarantee, budget));
      set.push_back(Reported(SelectorKind::kCpe, "cpe", guarantee, budget));
    }
  }
  Contender shipped{.method = "auto", .variant = "as shipped", .policy = Policy()};
  shipped.policy.selector = SelectorKind::kAuto;
  set.push_back(shipped);
  return set;
}

std::vector<Contender> Tasks(const Policy* calibrated) {
  std::vector<Contender> set;
  for (const StudyBudget& budget :
       {StudyBudget{.tokens = 128}, StudyBudget{.tokens = 512}, StudyBudget{.mass = 0.05F}}) {
    for (const char* name : kBaselines) set.push_back(Published(name, budget));
    set.push_back(Product("scan", "", SelectorKind::kScan, budget));
    set.push_back(Product("cis", "", SelectorKind::kCis, budget));
    if (calibrated != nullptr) set.push_back(Calibrated(*calibrated, budget));
  }
  set.push_back(Certified(Guarantee::kConfidence, 0.05F));
  Contender shipped{.method = "auto", .variant = "as shipped", .policy = Policy()};
  shipped.policy.selector = SelectorKind::kAuto;
  set.push_back(shipped);
  return set;
}

std::vector<Contender> Quick(const Policy* /*calibrated*/) {
  std::vector<Contender> set;
  const StudyBudget budget{.tokens = 64};
  for (const char* name : kBaselines) set.push_back(Published(name, budget));
  set.push_back(Product("scan", "", SelectorKind::kScan, budget));
  set.push_back(Seeded(Product("cis", "", SelectorKind::kCis, budget)));
  set.push_back(Product("cpe", "", SelectorKind::kCpe, {.mass = 0.05F}));
  set.push_back(Certified(Guarantee::kDeterministic, 0.05F));
  set.push_back(Certified(Guarantee::kConfidence, 0.05F));
  return set;
}

}  // namespace

std::string StudyBudget::name() const {
  return tokens > 0 ? absl::StrCat(tokens) : absl::StrCat("mass ", mass);
}

std::vector<StudyBudget> TableBudgets() {
  return {{.tokens = 128}, {.tokens = 256}, {.tokens = 512},
          {.mass = 0.1F},  {.mass = 0.05F}, {.mass = 0.01F}};
}

std::vector<Contender> MakeContenders(const std::string& set, const Policy* calibrated) {
  static const auto* const kSets =
      new std::map<std::string, std::function<std::vector<Contender>(const Policy*)>>{
          {"rivals", Rivals}, {"ours", Ours},   {"sharing", Sharing}, {"axes", Axes},
          {"proof", Proof},   {"tasks", Tasks}, {"quick", Quick}};
  const auto found = kSets->find(set);
  if (found == kSets->end()) return {};
  std::vector<Contender> contenders = found->second(calibrated);
  contenders.insert(contenders.begin(), Dense());
  return contenders;
}

}  // namespace kvservice::eval
