// The error of a row whose limits could not be proven and whose policy says kFail. Pure; any
// thread.

#ifndef KVSERVICE_KVSERVICE_BOUND_NOT_MET_H_
#define KVSERVICE_KVSERVICE_BOUND_NOT_MET_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "attention/certificate.h"
#include "attention/plan.h"

namespace kvservice {

// FAILED_PRECONDITION / BOUND_NOT_MET on rows[index]. Message and metadata name the limit that
// failed ("limit": max_dropped_mass, max_output_error, both with a comma between them, or guarantee
// when both hold but not by a statement of the level asked for) and tell limit and largest bound of
// each limit that was set. The numbers read back as exactly what was compared.
absl::Status BoundNotMet(uint32_t index, const Plan& plan,
                         absl::Span<const HeadCertificate> certificates);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_BOUND_NOT_MET_H_
