// Certificates of a selection: feeds the proofs of all heads of a KV head (attention/head_proof.h)
// with exact logits of what is read and sketch intervals (or exact logits) of what is not. One
// thread.

#ifndef KVSERVICE_ATTENTION_REFERENCE_PROVE_H_
#define KVSERVICE_ATTENTION_REFERENCE_PROVE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/head_proof.h"
#include "attention/reference/head_row.h"

namespace kvservice::reference {

// Proofs of all heads of one KV head of one row.
class GroupProof {
 public:
  // Borrows its arguments.
  GroupProof(const LayerShape& shape, const AttendRow& row, HeadRow* head_row);

  // Proves what can be proven when `read` (ascending) is what the KV head reads, what it read
  // before included; false if a limit does not hold. Keeps the outputs over `read`.
  bool Prove(const std::vector<uint32_t>& read);
  // `read` and what the heads whose limits do not hold should read beside it; empty if reading
  // everything is the better answer.
  std::vector<uint32_t> Grow(const std::vector<uint32_t>& read) const;

  const HeadProof& head(uint32_t head) const { return proofs_[head]; }
  // Output over what was last proven, [head_dim], and its lse.
  const std::vector<float>& output(uint32_t head) const { return outputs_[head]; }
  double log_kept(uint32_t head) const { return log_kept_[head]; }

 private:
  HeadEvidence EvidenceOf(uint32_t head, const std::vector<uint32_t>& read);
  void Answer(uint32_t head, const std::vector<uint32_t>& kept, HeadEvidence* evidence);
  void SetValueNorms();

  const LayerShape& shape_;
  const AttendRow& row_;
  HeadRow* const head_row_;
  std::vector<HeadProof> proofs_;
  std::vector<std::vector<float>> outputs_;
  std::vector<double> log_kept_;
  std::vector<uint32_t> read_before_;
  bool proven_before_ = false;
  double value_norm_lower_ = 0.0;
  double value_norm_upper_ = 0.0;
};

}  // namespace kvservice::reference

#endif  // KVSERVICE_ATTENTION_REFERENCE_PROVE_H_
