// The sketch scan of the cpu device alone: how much of the bandwidth of reading the sketches it
// reaches.

#ifndef KVSERVICE_TESTS_BENCH_SCAN_CPU_H_
#define KVSERVICE_TESTS_BENCH_SCAN_CPU_H_

#include <cstdint>
#include <vector>

#include "tests/bench/bench.h"
#include "tests/bench/layer_data.h"

namespace kvservice::bench {

// Scans all KV heads of a layer, with and without bounds, and reads the same bytes, in turn; before
// each, all keys and values go through the CPU.
std::vector<Row> MeasureScan(const LayerData& layer, uint32_t repetitions, uint32_t threads);

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_SCAN_CPU_H_
