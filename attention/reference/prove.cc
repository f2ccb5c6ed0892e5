#include "attention/reference/prove.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/reference/log_sum.h"

namespace kvservice::reference {
namespace {

// Logits of a set of tokens: the three ends of their ranges, side by side.
struct Logits {
  std::vector<double> low, nearest, high;

  void Add(const LogitRange& range) {
    low.push_back(range.low);
    nearest.push_back(range.nearest);
    high.push_back(range.high);
  }
};

void SetKept(const Logits& kept, HeadCertificate* certificate) {
  certificate->log_kept = LogSum(kept.nearest);
  certificate->log_kept_lower = LogSumLower(kept.low);
  certificate->log_kept_upper = LogSumUpper(kept.high);
  // A key that is not finite: no statement about this row means anything.
  for (size_t i = 0; i < kept.nearest.size(); ++i) {
    if (!std::isfinite(kept.low[i]) || !std::isfinite(kept.high[i])) {
      certificate->log_kept = std::numeric_limits<double>::quiet_NaN();
    }
  }
}

void SetDropped(const Logits& dropped, HeadCertificate* certificate) {
  certificate->log_dropped_upper = LogSumUpper(dropped.high);
  certificate->log_dropped_lower = LogSumLower(dropped.low);
}

float EstimateShare(const Logits& dropped, double log_kept) {
  const double share = 1.0 / (1.0 + std::exp(log_kept - LogSum(dropped.nearest)));
  return std::isnan(share) ? -1.0F : static_cast<float>(share);
}

Level LevelOf(Guarantee guarantee) {
  switch (guarantee) {
    case Guarantee::kNone:
      return Level::kNone;
    case Guarantee::kConfidence:
    case Guarantee::kDeterministic:
      return Level::kDeterministic;
    case Guarantee::kExact:
      return Level::kExact;
  }
  return Level::kNone;
}

}  // namespace

HeadCertificate Prove(const Plan& plan, uint32_t head, const std::vector<uint32_t>& read,
                      HeadRow* row) {
  HeadCertificate certificate;
  Logits kept;
  std::vector<uint32_t> dropped_tokens;
  bool scanned = true;
  for (uint32_t token = row->begin(); token < row->end(); ++token) {
    if (!row->Sees(head, token)) continue;
    if (std::binary_search(read.begin(), read.end(), token)) {
      kept.Add(row->Exact(head, token));
    } else {
      dropped_tokens.push_back(token);
      scanned &= row->WasScanned(token);
    }
  }
  SetKept(kept, &certificate);

  Logits dropped;
  if (dropped_tokens.empty()) {
    certificate.level = Level::kExact;
  } else {
    certificate.level = LevelOf(plan.prove);
    for (const uint32_t token : dropped_tokens) {
      if (plan.prove == Guarantee::kExact) {
        dropped.Add(row->Exact(head, token));
      } else if (plan.prove != Guarantee::kNone || scanned) {
        dropped.Add(row->Estimate(head, token));
      }
    }
  }
  if (certificate.level != Level::kNone) SetDropped(dropped, &certificate);
  if (certificate.level != Level::kNone || scanned) {
    certificate.dropped_mass_estimate = EstimateShare(dropped, certificate.log_kept);
  }
  FinishCertificate(&certificate);
  certificate.met = plan.max_dropped_mass >= 1.0F || certificate.dropped_mass_upper.value <=
                                                         static_cast<double>(plan.max_dropped_mass);
  return certificate;
}

}  // namespace kvservice::reference
