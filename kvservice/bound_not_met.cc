#include "kvservice/bound_not_met.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

// 17 digits tell a double exactly.
std::string ExactText(double number) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.17g", number);
  return text.data();
}

// One limit and the largest bound against it.
struct Comparison {
  const char* limit_name;
  const char* bound_name;
  double limit;
  double bound;
  bool is_set;
  // NaN fails, too.
  bool Failed() const { return is_set && !(bound <= limit); }
};

}  // namespace

absl::Status BoundNotMet(uint32_t index, const Plan& plan,
                         absl::Span<const HeadCertificate> certificates) {
  std::array<Comparison, 2> comparisons = {
      Comparison{"max_dropped_mass", "dropped_mass_upper", plan.max_dropped_mass, 0.0,
                 plan.max_dropped_mass < 1.0F},
      Comparison{"max_output_error", "output_error_relative_upper", plan.max_output_error, 0.0,
                 std::isfinite(plan.max_output_error)}};
  for (const HeadCertificate& certificate : certificates) {
    comparisons[0].bound = std::max(comparisons[0].bound, certificate.dropped_mass_upper.value);
    comparisons[1].bound = std::max(comparisons[1].bound, RelativeOutputError(certificate));
  }
  std::string limits;
  std::string message;
  ErrorDetails details{
      .reason = "BOUND_NOT_MET", .field = absl::StrCat("rows[", index, "]"), .metadata = {}};
  for (const Comparison& comparison : comparisons) {
    if (!comparison.is_set) continue;
    const std::string limit = ExactText(comparison.limit);
    const std::string bound = ExactText(comparison.bound);
    details.metadata.emplace_back(comparison.limit_name, limit);
    details.metadata.emplace_back(comparison.bound_name, bound);
    if (!comparison.Failed()) continue;
    absl::StrAppend(&limits, limits.empty() ? "" : ",", comparison.limit_name);
    absl::StrAppend(&message, message.empty() ? "" : "; ", comparison.limit_name, " is ", limit,
                    ", ", comparison.bound_name, " would be ", bound);
  }
  if (limits.empty()) {
    limits = "guarantee";
    message = "the limits do not hold by a statement of the level asked for";
  }
  details.metadata.emplace_back("limit", limits);
  return MakeError(absl::StatusCode::kFailedPrecondition, message, details);
}

}  // namespace kvservice
