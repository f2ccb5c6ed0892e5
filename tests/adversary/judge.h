// Judges what a reply says against the truth, and whether its fields fit each other and the plan.
// Bounds have no tolerance (see truth.h for what the judge grants itself). Pure but for the tally;
// one thread per tally.

#ifndef KVSERVICE_TESTS_ADVERSARY_JUDGE_H_
#define KVSERVICE_TESTS_ADVERSARY_JUDGE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "attention/certificate.h"
#include "attention/device.h"
#include "attention/plan.h"
#include "tests/adversary/layer_case.h"
#include "tests/adversary/tally.h"
#include "tests/adversary/truth.h"

namespace kvservice::adversary {

// What is wrong with one head's reply.
struct Finding {
  std::string what;
  // False: the fields contradict each other or the plan.
  bool false_statement = true;
};

struct HeadVerdict {
  std::vector<Finding> findings;
  // There is no truth to hold against, or none within the judge's own error.
  bool meaningless = false;
  bool unresolved = false;
  // Statements that may fail with the plan's probability, and whether they did.
  bool mass_sampled = false;
  bool mass_missed = false;
  bool output_bounded = false;
  bool output_sampled = false;
  bool output_missed = false;
  // ln(bound / truth); NaN where there is nothing to compare.
  double slack = 0.0;
  // The same of dropped / kept.
  double odds_slack = 0.0;
  double output_slack = 0.0;
  // -ln(truth): the slack of a bound of 1.
  double slack_of_one = 0.0;
};

// One head. `attended` and `out` as returned; value_norm_max: an upper end of the largest value
// norm that the KV head sees; served: see JudgedCall.
HeadVerdict JudgeHead(const HeadTruth& truth, const HeadCertificate& certificate,
                      absl::Span<const uint32_t> attended, const float* out,
                      long double value_norm_max, const Plan& plan, bool served = false);

// What was asked and what came back. Everything is borrowed.
struct JudgedCall {
  const LayerCase* layer_case = nullptr;
  absl::Span<const HeadTruth> truths;  // [query_count][query_head_count]
  // [kv_head_count]
  absl::Span<const WidenedHead> widened;
  Plan plan;
  absl::Status status;
  // What came through a server: bounds were rounded to floats on the way, outward.
  bool served = false;
  const float* out = nullptr;
  absl::Span<const HeadCertificate> certificates;
  absl::Span<const GroupReport> groups;
  absl::Span<const std::vector<uint32_t>> selected;
  // Whether a token has to be read exactly; absent when the judge cannot know (a served cache):
  // then only what follows from the reply itself is judged.
  std::function<bool(uint32_t kv_head, uint32_t token)> is_exact;
  // Its sampled statements are counted apart under this name too; empty = not.
  std::string population;
  // Printed with every failure.
  std::string reproduce;
};

// Returns the least slack of a deterministic bound in the call, mass or output error, NaN when
// there is none: what a climb makes smaller.
double JudgeCall(const JudgedCall& call, Tally* tally);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_JUDGE_H_
