// From the weights of a scan to the integers that samples are drawn by (certificate specification
// section 2, integer weights): the floats of a page times a power of two, rounded up.

#ifndef KVSERVICE_ATTENTION_CPU_POPULATION_H_
#define KVSERVICE_ATTENTION_CPU_POPULATION_H_

#include <cstdint>

#include "absl/types/span.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/sample_head.h"

namespace kvservice {

// Fills `population` with one head's tokens of a set; `mask` covers the blocks of `weights`, which
// must be bounded and hold every token of the set. False if a weight has no finite bound.
bool FillPopulation(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask,
                    Population* population);

// The tokens of a set that weigh most, of one head: whole steps of an eighth of an octave, until
// they hold e^log_wanted of weight or are all. Adds them to `chosen`.
void ChooseHeaviest(const ScanWeights& weights, uint32_t head, absl::Span<const uint64_t> mask,
                    double log_wanted, absl::Span<uint64_t> chosen);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_POPULATION_H_
