// Chooses tokens by the weights of a scan. No sorting: a sixteenth
// of the tokens tells about where the threshold lies; one pass adds up what lies clearly below it
// (whole pages by their sums) and collects the others; a histogram of those, by the upper 16 bits
// of their scores (128 steps per octave), has the threshold.

#ifndef KVSERVICE_ATTENTION_CPU_CHOOSE_H_
#define KVSERVICE_ATTENTION_CPU_CHOOSE_H_

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/cpu/token_mask.h"
#include "attention/cpu/weight_sums.h"
#include "attention/kv_layout.h"
#include "attention/sample_plan.h"

namespace kvservice {

// Query heads of one row.
using HeadSet = std::bitset<size_t{kQueryTokensMax} * kGroupMax>;

struct ChooseTask {
  const ScanWeights* weights = nullptr;
  // All masks cover the blocks of `weights`.
  absl::Span<const uint64_t> candidates;  // what may be chosen
  absl::Span<const uint64_t> pool;        // scanned tokens that enter the normaliser
  absl::Span<const uint64_t> unread;      // dropped whatever is chosen; counts when proving
  absl::Span<const double> always_lse;    // [head_count], exact mass of what is always read
  // Scores and limits use the upper ends of the weights (of a scan with bounds), else estimates.
  bool proving = false;
  // When proving: a weight counts as E + sample_factor (U - E), its estimate and what samples leave
  // of the gap to its upper end; 1 = no samples.
  double sample_factor = 1.0;
  uint32_t top_k = 0;                    // at least this many candidates, if there are
  float mass_limit = 0.0F;               // what no head may leave unchosen more than; 0 = off
  double planned_share = kPlannedShare;  // of the limit that is aimed at
  // Heads that neither scores nor limits count.
  HeadSet excused;
  uint32_t dilate_strongest = 0;
  uint32_t dilate_radius = 0;
};

// Candidates, and what their weights are multiplied with to be shares.
struct SplitTask {
  const ScanWeights* weights = nullptr;
  absl::Span<const uint32_t> heads;
  absl::Span<const uint64_t> candidates;
  const float* factors = nullptr;  // [blocks][heads]
  bool largest = true;             // scores are the largest share, else the sum
};

// Memory of one thread for choosing; grows to the longest row it has seen.
struct ChooseScratch {
  struct Entry {
    uint32_t index = 0;  // in the candidates: block * 64 + token
    float score = 0.0F;
  };
  std::vector<float> factors;  // [blocks][heads that count]
  std::vector<Entry> entries;
  std::vector<double> sums;      // of a histogram
  std::vector<float> sample;     // of a histogram of some
  std::vector<uint32_t> counts;  // of a histogram
};

// The chosen candidates. A token's score is its largest share of attention in any head where a
// limit on every head counts (proving, or by mass), else the sum of its shares; among scores that
// agree to one part in 128 the lower position goes first.
TokenMask Choose(const ChooseTask& task, ChooseScratch* scratch);

// The same for several choices among the same candidates: what they share is computed once.
class Chooser {
 public:
  // Borrows both until the last choice.
  Chooser(const ChooseTask& task, ChooseScratch* scratch);

  // With this in place of the task's sample_factor.
  TokenMask Choose(double sample_factor);
  TokenMask Choose() { return Choose(task_.sample_factor); }

  // A head whose limit the last choice met with least to spare, if masses counted.
  uint32_t binding_head() const { return binding_head_; }

 private:
  void SetFactors(double sample_factor);
  float GuessThreshold() const;
  bool Compact(float threshold);
  TokenMask Select(uint32_t top_k, bool by_mass);
  int32_t ThresholdOf(size_t place, int32_t base);
  int32_t CountThreshold(uint32_t top_k, int32_t base);
  SplitTask Split() const;
  float ShareOf(size_t place, uint32_t index) const;

  const ChooseTask& task_;
  ChooseScratch* scratch_;
  const size_t blocks_;
  const bool by_mass_;
  const bool largest_;  // Scores are the largest share, else the sum.
  const double limit_;
  uint32_t candidate_count_;
  uint32_t top_k_;
  std::vector<uint32_t> heads_;  // that count
  // Of each of those:
  std::vector<ScaledSum> normalizers_;
  std::vector<double> rests_;   // its share of what is in no entry
  std::vector<double> unread_;  // its share of what is unread
  uint32_t binding_head_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_CHOOSE_H_
