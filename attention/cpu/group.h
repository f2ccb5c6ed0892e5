// One KV head of one row of a call, on its way from plan to answer: the sets of tokens that the
// plan speaks about, what is chosen among them, and the certificates at the end. The device moves
// all groups of a call through the same stages; a stage touches one group only, so groups run in
// parallel. Between stages the device fills `weights`, `kept` and `rest`.
//
//   Prepare  -> attend `first`, scan `to_scan`
//   Decide   -> attend what of `read` was not read yet; score or attend the rest, if asked for
//   Conclude -> if it returns kReadMore: attend `more` into `grown`, and Conclude again
//            -> if it returns kReadRest: attend the rest, and ConcludeDense

#ifndef KVSERVICE_ATTENTION_CPU_GROUP_H_
#define KVSERVICE_ATTENTION_CPU_GROUP_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/cpu/attend_kernel.h"
#include "attention/cpu/choose.h"
#include "attention/cpu/group_memory.h"
#include "attention/cpu/head_queries.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/cpu/score_kernel.h"
#include "attention/cpu/token_mask.h"
#include "attention/device.h"
#include "attention/head_proof.h"
#include "attention/host_lists.h"
#include "attention/sample_head.h"
#include "attention/sharing.h"

namespace kvservice {

// Memory of one thread for proofs; grows to the longest row it has seen.
struct ProofScratch {
  Population population;
  std::vector<Score> scores;
  std::vector<float> output;
};

class Group {
 public:
  enum class Verdict : uint8_t {
    kDone,      // Outputs are written.
    kReadMore,  // The plan's limits do not hold and it says to grow.
    kReadRest,  // The plan's limit does not hold and it says to answer densely.
    kFailed,    // The plan's limit does not hold and it says to fail.
  };

  // anchor_queries: the last query token's queries of this KV head, un-rotated, [group][head_dim];
  // read only with Source::kReuse. Borrows everything until Conclude.
  void Prepare(const LayerShape& shape, AttendRow* row, uint32_t kv_head, const GroupMemory* memory,
               absl::Span<const float> anchor_queries);
  // True if Decide has to choose by weights: needs the mass of `first` in `kept`.
  bool has_choice() const { return has_choice_; }
  void Decide(ChooseScratch* scratch);
  Verdict Conclude(ProofScratch* scratch);
  void ConcludeDense(ProofScratch* scratch);

  const AttendRow& row() const { return *row_; }
  uint32_t kv_head() const { return kv_head_; }
  uint32_t head_count() const { return queries_.head_count; }
  uint32_t block_begin() const { return block_begin_; }
  const HeadQueries& queries() const { return queries_; }
  const ScanQueries& scan_queries() const { return scan_queries_; }
  const SketchTable& table() const { return row_->tables[kv_head_]; }

  // Read at once: the choice itself where it needs no scan, else what is always read.
  const TokenMask& first() const { return first_; }
  // Sealed tokens whose weights are needed.
  const TokenMask& to_scan() const { return to_scan_; }
  // After Decide: what is read but not in `first`, and what is not read.
  TokenMask Unread() const;
  TokenMask Rest() const;
  // After kReadMore: what else is to be read.
  const TokenMask& more() const { return more_; }
  // True if the keys of the rest are needed in any case (an exact proof, shadow mode), and whether
  // their values are.
  bool wants_rest() const;
  bool wants_rest_values() const { return row_->plan.mode == Mode::kShadow; }
  bool bounds_masses() const { return row_->plan.prove != Guarantee::kNone; }

  ScanWeights weights;
  Partial kept;  // over `first`, then over all that is read
  Partial rest;
  Partial grown;  // over `more`

 private:
  void SetRange();
  void SetPlaces();
  void SplitMiddle();
  void StartChoice(absl::Span<const float> anchor_queries);
  void StartReuse(uint32_t anchor);
  void CompleteAnchor(const TokenMask& chosen);
  SharingTerms TermsOfAnchor(const TokenMask& chosen) const;
  uint32_t newest_head() const { return head_count() - shape_->layout.group_size(); }
  void PlanScan();
  TokenMask ChooseTokens(const ChooseTask& task, ChooseScratch* scratch);
  TokenMask ChooseForOutput(ChooseTask task, ChooseScratch* scratch) const;
  bool IsRememberedDense() const;
  void RememberDense();
  void Settle(const TokenMask& chosen);
  uint32_t OpenTopK() const;
  uint32_t OutputIndex(uint32_t head) const;
  bool IsSealed(uint32_t index) const;
  void SetValueNorms();
  HeadEvidence EvidenceOf(uint32_t head, const TokenMask& dropped, bool estimated,
                          std::vector<float>* output) const;
  bool ProveAll(ProofScratch* scratch);
  bool ChooseMore();
  void WriteCertificates(Action action);
  void WriteAnswer(const TokenMask& read, Action action, bool compensate);
  Action ActionOf() const;
  HostLists* lists() const { return static_cast<HostLists*>(row_->plan.lists); }

  const LayerShape* shape_ = nullptr;
  AttendRow* row_ = nullptr;
  uint32_t kv_head_ = 0;
  const GroupMemory* memory_ = nullptr;
  absl::Span<const float> anchor_queries_;
  HeadQueries queries_;
  ScanQueries scan_queries_;

  // Tokens that some query token sees are [begin_, view.length); masks cover their blocks.
  uint32_t begin_ = 0;
  uint32_t block_begin_ = 0;
  // See HostLists: every position below was considered by a choice of this call.
  uint32_t covered_end_ = 0;
  TokenMask all_, always_, middle_;
  TokenMask open_, frozen_chosen_;  // of the middle: left to choose from; chosen by a frozen list
  TokenMask candidates_, pool_;     // of a choice by weights
  TokenMask first_, to_scan_, read_, more_;
  std::vector<HeadProof> proofs_;
  ValueNorms value_norms_;
  uint32_t rounds_grown_ = 0;
  uint32_t draws_planned_ = 0;

  bool has_choice_ = false;
  bool scanned_ = false;
  bool reused_ = false;
  bool everything_ = false;
  uint32_t anchor_ = 0;
  uint32_t places_ = 0;  // what a completed list may hold
  float similarity_ = -2.0F;
  float sharing_estimate_ = -1.0F;
  float key_norm_max_ = -1.0F;
  float query_distance_ = -1.0F;
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_GROUP_H_
