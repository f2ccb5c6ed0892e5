// Certificates of a selection, from exact logits of what is read and sketch intervals (or exact
// logits) of what is not. One thread.

#ifndef KVSERVICE_ATTENTION_REFERENCE_PROVE_H_
#define KVSERVICE_ATTENTION_REFERENCE_PROVE_H_

#include <cstdint>
#include <vector>

#include "attention/certificate.h"
#include "attention/plan.h"
#include "attention/reference/head_row.h"

namespace kvservice::reference {

// The certificate of one head when `read` (ascending) is what the KV head reads. Masses, level and
// met are filled; action is not.
//   kNone                         nothing is proven; the estimate is given if every dropped token
//   was scanned before kConfidence, kDeterministic   from the sketches of all dropped tokens: a
//   deterministic bound serves both kExact                        from the keys of all dropped
//   tokens
HeadCertificate Prove(const Plan& plan, uint32_t head, const std::vector<uint32_t>& read,
                      HeadRow* row);

}  // namespace kvservice::reference

#endif  // KVSERVICE_ATTENTION_REFERENCE_PROVE_H_
