// The softmax of estimates: thousands of exponentials per step and head, in float. Pure; any
// thread.

#ifndef KVSERVICE_SELECTOR_BASELINES_SOFTMAX_H_
#define KVSERVICE_SELECTOR_BASELINES_SOFTMAX_H_

#include <cstdint>

#include "absl/types/span.h"

namespace kvservice::baselines {

// values: finite logits, replaced by exp(value - largest) / sum, each within 1e-6 of its value.
// What is below e^-60 of the largest counts as e^-60.
void Softmax(absl::Span<float> values);

// Softmax of every row of [rows][length].
void SoftmaxRows(absl::Span<float> values, uint32_t rows);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_SOFTMAX_H_
