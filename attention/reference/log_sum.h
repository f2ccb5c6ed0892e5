// ln sum exp(x) of many numbers: to nearest, and rounded outward. Pure; any thread.

#ifndef KVSERVICE_ATTENTION_REFERENCE_LOG_SUM_H_
#define KVSERVICE_ATTENTION_REFERENCE_LOG_SUM_H_

#include "absl/types/span.h"
#include "attention/log_mass.h"

namespace kvservice::reference {

// Empty sums are kLogZero. NaN gives NaN.
double LogSum(absl::Span<const double> logits);
// At least / at most the exact value for these very logits. NaN or +infinity among them gives
// "nothing known" in the upper sum and counts for nothing in the lower one.
LogMassUpper LogSumUpper(absl::Span<const double> logits);
LogMassLower LogSumLower(absl::Span<const double> logits);

}  // namespace kvservice::reference

#endif  // KVSERVICE_ATTENTION_REFERENCE_LOG_SUM_H_
