// Softmax attention in long double over any set of tokens: the truth that devices are judged by. It
// shares nothing with them but the layout of the cache.

#ifndef KVSERVICE_TESTS_ATTENTION_ORACLE_H_
#define KVSERVICE_TESTS_ATTENTION_ORACLE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tests/attention/kv_case.h"

namespace kvservice::testing {

// Kept and dropped mass of one head for one selection.
struct Truth {
  long double log_kept = 0.0L;
  long double log_dropped = 0.0L;  // -inf when nothing was dropped.
  long double share = 0.0L;        // dropped / (kept + dropped)
  std::vector<uint32_t> kept;      // The selected tokens that the head sees.
};

class Oracle {
 public:
  // Scores all keys that the row's query tokens see. Inputs must outlive the oracle.
  Oracle(const KvCase& kv, const AttendRow& row);

  uint32_t head_count() const;  // Query tokens times query heads.
  uint32_t KvHead(uint32_t head) const;
  bool Sees(uint32_t head, uint32_t token) const;
  long double Logit(uint32_t head, uint32_t token) const { return logits_[head][token]; }
  // True if some logit of the head is NaN or +infinity: a statement about it means nothing.
  bool IsMeaningless(uint32_t head) const;
  // True if some key gave an infinite logit, be it one with weight zero or one that the soft-cap
  // made finite: a device need not say anything about such a head.
  bool MayBeSilent(uint32_t head) const { return infinite_[head]; }
  // `selected` ascending.
  Truth Judge(uint32_t head, const std::vector<uint32_t>& selected) const;
  // The largest norm of a value that the head's KV head sees; NaN if one is not finite.
  long double LargestValueNorm(uint32_t head) const;
  // Attention over what the truth kept, [head_dim].
  std::vector<long double> Output(uint32_t head, const Truth& truth) const;

 private:
  const KvCase& kv_;
  const AttendRow& row_;
  std::vector<std::vector<long double>> logits_;  // [head][length], after soft-cap.
  std::vector<bool> infinite_;                    // [head]
};

// How far bounds lie above the truth: ln(upper / share) of every head with a proven, non-zero
// share.
struct Slack {
  std::vector<double> nats;
};

// What outputs may differ by.
struct Tolerance {
  // Squared error over squared norm of the true output.
  double normalized_squared_error;
  // Absolute, and never less than the rounding of lse to float.
  double lse;
};

// Judges every number of an executed call by GoogleTest expectations. Bounds have no tolerance.
// With `tolerance` null outputs are not judged (logits too large for the device's arithmetic to say
// anything about outputs).
void CheckCall(const KvCase& kv, const Oracle& oracle, const Call& call, const Tolerance* tolerance,
               Slack* slack);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_ATTENTION_ORACLE_H_
