// What is asked of audits, and what they tell. Plain data.

#ifndef KVSERVICE_KVSERVICE_AUDIT_REPORT_H_
#define KVSERVICE_KVSERVICE_AUDIT_REPORT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "attention/certificate.h"
#include "kvservice/draw_keys.h"

namespace kvservice {

struct AuditStats {
  // Rows computed again; given up because their sequence changed before their turn; not kept
  // because too many were waiting.
  uint64_t rows_audited = 0;
  uint64_t rows_cancelled = 0;
  uint64_t rows_skipped = 0;
  // Kept and not audited yet.
  uint64_t rows_waiting = 0;
  // Certificates compared, and those whose outputs were compared too.
  uint64_t certificates = 0;
  uint64_t outputs = 0;
  // Wrong without a failure probability: a defect.
  uint64_t violations = 0;
  // Wrong with one, and the sum of the failure probabilities, rounded up.
  uint64_t misses = 0;
  double expected_misses = 0.0;
  // ln(bound / truth) of dropped masses; quantiles are upper ends of classes of 0.01 nats.
  uint64_t slack_count = 0;
  double slack_median_nats = 0.0;
  double slack_p95_nats = 0.0;
  double slack_max_nats = 0.0;
};

// Names the random numbers of one row.
struct ReplayAsk {
  uint64_t call_number = 0;
  Epoch epoch{};
  uint64_t draw_secret_id = 0;
  uint32_t row = 0;
};

inline constexpr uint32_t kAuditRowsMax = 64;

struct AuditAsk {
  // Kept rows to compute again, the most recent first; at most kAuditRowsMax.
  uint32_t row_count = 0;
  // Rows to keep from now on; at most kAuditRowsMax, 0 = leave what was asked before.
  uint32_t keep_next = 0;
  // Excludes row_count.
  std::optional<ReplayAsk> replay = {};
};

struct AuditReport {
  AuditStats stats;
  // Rows of the sequence that are kept, and that keep_next still waits for.
  uint32_t kept_rows = 0;
  uint32_t keep_next_left = 0;
  // Of the rows computed again, the most recent first.
  std::vector<uint64_t> call_numbers;
  // One line for each violation, at most 16.
  std::vector<std::string> violations;
  // [query_count][query_head_count] of a replay, and whether they equal the first ones in every
  // bit.
  std::vector<HeadCertificate> replayed;
  bool replay_equal = false;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_AUDIT_REPORT_H_
