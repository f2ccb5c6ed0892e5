// Comparing what a certificate promised with what is true. The truth is computed with bounds of its
// own (every key scored), and nothing is forgiven: a promise is broken when even the side of the
// truth that favours it lies beyond the promise. Pure; any thread.

#ifndef KVSERVICE_KVSERVICE_AUDIT_CHECK_H_
#define KVSERVICE_KVSERVICE_AUDIT_CHECK_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "attention/certificate.h"
#include "attention/draws.h"
#include "attention/plan.h"
#include "kvservice/engine.h"

namespace kvservice {

// A row that was answered, with all that it takes to answer it again.
struct KeptRow {
  uint64_t call_number = 0;
  // Index of the row in its call.
  uint32_t index = 0;
  std::string tenant;
  SequenceId id;
  uint64_t generation = 0;
  uint32_t layer = 0;
  uint32_t position = 0;
  uint32_t query_count = 1;
  SelectorKind selector = SelectorKind::kDense;
  // Without lists and given positions.
  Plan plan;
  // The caller's positions, if the plan took them.
  std::vector<uint32_t> given;
  std::vector<uint32_t> given_offsets;
  // The choice came from remembered lists, which have changed since.
  bool used_lists = false;

  std::vector<float> q;                         // [query_count][query_head_count][head_dim]
  std::vector<float> out;                       // [query_count][query_head_count][head_dim]
  std::vector<HeadCertificate> certificates;    // [query_count][query_head_count]
  std::vector<std::vector<uint32_t>> selected;  // [kv_head_count], what was attended (or judged)
  // [kv_head_count]: answered densely without a scan because an earlier call had to (a memory that
  // has changed since). Such heads have nothing to replay.
  std::vector<bool> dense_by_memory = {};
  bool audited = false;

  uint32_t length() const { return position + query_count; }
  size_t bytes() const;
};

// The truth about a kept row, from the device that answered it.
struct RowTruth {
  // Of the same selection with every key scored; [query_count][query_head_count].
  std::vector<HeadCertificate> exact;
  // Of attention over all tokens: certificates, and output [query_count][query_head_count][dim].
  std::vector<HeadCertificate> dense;
  std::vector<float> dense_out;
};

// ln(bound / truth), counted in hundredths of a nat; all that is above ten counts as one class.
class SlackHistogram {
 public:
  void Add(double nats);
  uint64_t count() const { return count_; }
  double max() const { return max_; }
  // The upper end of the class in which the quantile lies; the largest slack in the last class.
  double Quantile(double share) const;

 private:
  static constexpr size_t kClassCount = 1001;
  std::array<uint32_t, kClassCount> counts_{};
  uint64_t count_ = 0;
  double max_ = 0.0;
};

// What audits found, as it grows.
struct AuditFindings {
  static constexpr size_t kLinesMax = 16;
  AuditStats stats;
  SlackHistogram slack;
  // One for each violation, at most kLinesMax.
  std::vector<std::string> lines;
  // Puts the quantiles of `slack` into `stats`.
  void Summarize();
};

// Adds what the truth says about a row's certificates: each that made a statement is right, or
// wrong without a failure probability (a violation), or wrong with one (a miss). The output of a
// row that was answered in shadow mode is dense and not compared.
void CompareRow(const KeptRow& row, const RowTruth& truth, AuditFindings* findings);

// Equal in every bit.
bool SameCertificates(absl::Span<const HeadCertificate> a, absl::Span<const HeadCertificate> b);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_AUDIT_CHECK_H_
