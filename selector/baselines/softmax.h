// The softmax of estimates: thousands of exponentials per step and head, in float. Pure; any
// thread.

#ifndef KVSERVICE_SELECTOR_BASELINES_SOFTMAX_H_
#define KVSERVICE_SELECTOR_BASELINES_SOFTMAX_H_

#include <cstdint>

#include "absl/types/span.h"

namespace kvservice::baselines {

// values: finite logits, replaced by exp(value - largest) / sum, with a relative error of at most
// 3e-6: 2e-6 for rounding the difference, which is below 64, the rest for everything else.
// What is below e^-60 of the largest counts as e^-60.
void Softmax(absl::Span<float> values);

// Softmax of every row of [rows][length].
void SoftmaxRows(absl::Span<float> values, uint32_t rows);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_SOFTMAX_H_
