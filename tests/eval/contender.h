// Who takes part in a closed-loop study: a policy of the product or a published method, with a
// budget. Plain data.

#ifndef KVSERVICE_TESTS_EVAL_CONTENDER_H_
#define KVSERVICE_TESTS_EVAL_CONTENDER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "selector/baselines/baseline.h"
#include "selector/policy.h"

namespace kvservice::eval {

// Tokens per KV head that every contender reads anyway, and layers that are dense for all of them.
inline constexpr uint32_t kStudySinks = 8;
inline constexpr uint32_t kStudyLocal = 32;
inline constexpr uint32_t kStudyDenseLayers = 2;

struct Contender {
  // "cpe", "quest", ...
  std::string method = {};
  // What distinguishes it from the method's usual form ("tau 0.9"); empty for the usual one.
  std::string variant = {};
  // "128", "mass 0.05", or empty where the method has none.
  std::string budget = {};
  // How it is attended. Baselines: `given`.
  Policy policy = {};
  // Non-empty: positions come from this method (selector/baselines/baselines.h).
  std::string baseline = {};
  baselines::TokenBudget token_budget = {};
  // The method reads exact scores at every step.
  bool reads_logits = false;
  // The prompt's last queries become anchors before the first step.
  bool seeded = false;
  // Cosines of queries before their rotation (the product's way).
  bool unrotated = true;
  // Its mean dropped mass per layer and head goes into the results.
  bool has_picture = false;

  std::string label() const {
    std::string text = method;
    if (!variant.empty()) text += " (" + variant + ")";
    if (!budget.empty()) text += " @ " + budget;
    return text;
  }
};

// A budget of the table: tokens, or dropped mass by the method's own estimate.
struct StudyBudget {
  uint32_t tokens = 0;
  float mass = 0.0F;
  std::string name() const;
};
std::vector<StudyBudget> TableBudgets();

// Sets of contenders by name. "rivals" and "ours": the table of all methods at all budgets;
// "sharing": the trade-off curves of CIS; "axes": depth and layer edits; "proof": policies that
// prove; "tasks": a few of each for text that is judged by answers; "quick": a few at small
// budgets. `calibrated` is the policy that `kveval --study=calibrate` wrote for the model, if there
// is one. Unknown names give an empty set.
std::vector<Contender> MakeContenders(const std::string& set, const Policy* calibrated);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_CONTENDER_H_
