// What scans need of queries: attention/scan_terms.h gives the formulas (MakeQueryTerms), this
// evaluates them in double for all heads of a group. Every row of a call needs it before anything
// can be scanned, and with a GPU it is most of what the host does.

#ifndef KVSERVICE_ATTENTION_CPU_SCAN_QUERIES_H_
#define KVSERVICE_ATTENTION_CPU_SCAN_QUERIES_H_

#include <array>
#include <vector>

#include "absl/types/span.h"
#include "attention/device.h"

namespace kvservice {

// What a scan needs of the queries of one KV head of one row, beyond what attention does, for all
// pages. Arrays per head are padded with zeros to a multiple of four heads.
struct ScanQueries {
  // Projections of qs on the sketch directions; zero without any.
  std::array<std::vector<float>, 4> qw;  // [direction][heads]
  // Filled for bounded scans only:
  std::vector<float> x_norm;   // [heads] ||x||
  std::vector<double> norm;    // [heads] at least ||qs|| and ||scale * q||
  std::vector<double> weight;  // [heads] ||qs|| + sum_j |qw_j| ||W_j||, rounded up
  std::vector<double> used;    // [heads] channels in which qs is not zero
  std::vector<float> x;        // [head_count][head_dim], |p_c| / M_c rounded up
};

// `q`: the heads' queries as received, [head_count] pointers to [head_dim].
void PrepareScan(const LayerShape& shape, absl::Span<const float* const> q,
                 const SketchTable& table, bool bounded, ScanQueries* queries);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_SCAN_QUERIES_H_
