// Exact attention over a set of tokens of one KV head, for all query heads that share it: the inner
// loop of the device. Logits and weighted values are accumulated in fp32 (queries are not rounded
// to the cache's type), masses in double; results of disjoint sets merge with MergePartial and Add
// (attention/partial.h, attention/log_mass.h).

#ifndef KVSERVICE_ATTENTION_CPU_ATTEND_KERNEL_H_
#define KVSERVICE_ATTENTION_CPU_ATTEND_KERNEL_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/cpu/head_queries.h"
#include "attention/device.h"
#include "attention/log_mass.h"

namespace kvservice {

struct AttendTask {
  const LayerShape* shape = nullptr;
  const KvView* view = nullptr;
  uint32_t kv_head = 0;
  const HeadQueries* queries = nullptr;
  // Tokens to read: bit t of word b stands for position (block_begin + b) * 64 + t, below
  // view->length. A head leaves out what it does not see.
  absl::Span<const uint64_t> tokens;
  uint32_t block_begin = 0;
  // False: masses only, no output.
  bool read_values = true;
  // True: masses are bounded, which costs the norms of the keys. False: the bounds say nothing.
  bool bound_masses = false;
};

// Output and mass over a set of tokens; an empty set has lse = -infinity and an output of zeros.
struct Partial {
  void Resize(uint32_t head_count, uint32_t head_dim);

  std::vector<double> out;  // [head_count][head_dim]
  std::vector<double> lse;  // [head_count], natural log
  // The same mass in real arithmetic, with q as received: device rounding is inside.
  std::vector<LogMassLower> lower;  // [head_count]
  std::vector<LogMassUpper> upper;  // [head_count]
  // [head_count], how far `out` may be from the exact output, in units of the largest norm of a
  // value of the set (and 2^-120 for underflow). Infinity where masses were not bounded.
  std::vector<double> arithmetic;
};

// Adds `part` (a disjoint set of tokens) to `total`. With a head_dim of 0 the masses alone: outputs
// may be empty.
void MergePartials(uint32_t head_dim, const Partial& part, Partial* total);

// Memory of one thread for AttendTokens; grows to the largest group it has seen.
class AttendScratch {
 public:
  // At least `floats` floats, aligned to 64 bytes.
  float* Reserve(size_t floats);

 private:
  std::vector<float> memory_;
};

// Runs on the best instruction set of the machine. `result` is resized. Thread-safe for distinct
// scratch and result.
void AttendTokens(const AttendTask& task, AttendScratch* scratch, Partial* result);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_ATTEND_KERNEL_H_
