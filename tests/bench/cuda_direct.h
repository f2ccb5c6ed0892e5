// Times of the CUDA device's direct path: everything between queries and answers, certified.

#ifndef KVSERVICE_TESTS_BENCH_CUDA_DIRECT_H_
#define KVSERVICE_TESTS_BENCH_CUDA_DIRECT_H_

namespace kvservice::bench {

// Prints lines for all cases: the wave alone as a CUDA graph, whole calls of the device, and what
// was read and certified, with the truth for some heads.
// only: the number of the one case to run, -1 for all.
void MeasureDirect(int only);

}  // namespace kvservice::bench

#endif  // KVSERVICE_TESTS_BENCH_CUDA_DIRECT_H_
