#include "kvservice/audit_check.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "attention/rounding.h"

namespace kvservice {
namespace {

constexpr double kSlackClassNats = 0.01;
// Relative error of a norm over at most 256 differences in double, with room to spare.
constexpr double kNormError = 0x1p-40;

// A lower bound of ||a - b||_2 of two float vectors.
double DistanceLower(absl::Span<const float> a, absl::Span<const float> b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += difference * difference;
  }
  return std::sqrt(sum) * (1.0 - kNormError);
}

// The promises about one head that the truth breaks, in words; empty if there is none.
std::string BrokenUpper(const HeadCertificate& told, const HeadCertificate& exact) {
  if (exact.dropped_mass_lower.value > told.dropped_mass_upper.value) {
    return absl::StrCat("dropped mass is at least ", exact.dropped_mass_lower.value,
                        ", the upper bound said ", told.dropped_mass_upper.value);
  }
  if (exact.log_dropped_lower.value > told.log_dropped_upper.value) {
    return absl::StrCat("log of the dropped mass is at least ", exact.log_dropped_lower.value,
                        ", the upper bound said ", told.log_dropped_upper.value);
  }
  return "";
}

// These hold always, whatever was sampled. In shadow mode the logs of the kept mass are those of
// the dense answer.
std::string BrokenAlways(const HeadCertificate& told, const HeadCertificate& exact, Mode mode) {
  if (exact.dropped_mass_upper.value < told.dropped_mass_lower.value) {
    return absl::StrCat("dropped mass is at most ", exact.dropped_mass_upper.value,
                        ", the lower bound said ", told.dropped_mass_lower.value);
  }
  if (exact.log_dropped_upper.value < told.log_dropped_lower.value) {
    return absl::StrCat("log of the dropped mass is at most ", exact.log_dropped_upper.value,
                        ", the lower bound said ", told.log_dropped_lower.value);
  }
  if (mode == Mode::kShadow) return "";
  if (exact.log_kept_lower.value > told.log_kept_upper.value ||
      exact.log_kept_upper.value < told.log_kept_lower.value) {
    return absl::StrCat("log of the kept mass is in [", exact.log_kept_lower.value, ", ",
                        exact.log_kept_upper.value, "], the bounds said [",
                        told.log_kept_lower.value, ", ", told.log_kept_upper.value, "]");
  }
  return "";
}

std::string BrokenOutput(const HeadCertificate& told, const HeadCertificate& dense,
                         double distance_lower) {
  const double error = distance_lower - dense.output_error_upper;
  if (!(error > told.output_error_upper)) return "";
  return absl::StrCat("output error is at least ", error, ", the bound said ",
                      told.output_error_upper);
}

bool HasOutputBound(const HeadCertificate& told, const HeadCertificate& dense) {
  return std::isfinite(told.output_error_upper) && std::isfinite(dense.output_error_upper);
}

void AddSlack(const HeadCertificate& told, const HeadCertificate& exact, SlackHistogram* slack) {
  const double truth = exact.dropped_mass_upper.value;
  if (truth > 0.0) slack->Add(std::log(told.dropped_mass_upper.value / truth));
}

}  // namespace

size_t KeptRow::bytes() const {
  size_t bytes = sizeof(*this) + (q.size() + out.size()) * sizeof(float) +
                 certificates.size() * sizeof(HeadCertificate) +
                 (given.size() + given_offsets.size()) * sizeof(uint32_t);
  for (const std::vector<uint32_t>& list : selected) bytes += list.size() * sizeof(uint32_t);
  return bytes;
}

void SlackHistogram::Add(double nats) {
  const double clamped = std::clamp(nats, 0.0, (kClassCount - 1) * kSlackClassNats);
  const auto index = static_cast<size_t>(std::ceil(clamped / kSlackClassNats));
  ++counts_[std::min(index, kClassCount - 1)];
  max_ = std::max(max_, nats);
  ++count_;
}

double SlackHistogram::Quantile(double share) const {
  uint64_t left = static_cast<uint64_t>(std::ceil(share * static_cast<double>(count_)));
  for (size_t i = 0; i + 1 < kClassCount; ++i) {
    if (left <= counts_[i]) return std::min(static_cast<double>(i) * kSlackClassNats, max_);
    left -= counts_[i];
  }
  return max_;
}

void AuditFindings::Summarize() {
  constexpr double kMedian = 0.5;
  constexpr double kHigh = 0.95;
  stats.slack_count = slack.count();
  if (stats.slack_count == 0) return;
  stats.slack_median_nats = slack.Quantile(kMedian);
  stats.slack_p95_nats = slack.Quantile(kHigh);
  stats.slack_max_nats = slack.max();
}

void CompareRow(const KeptRow& row, const RowTruth& truth, AuditFindings* findings) {
  AuditStats* stats = &findings->stats;
  ++stats->rows_audited;
  const size_t head_count = row.certificates.size() / row.query_count;
  const size_t head_dim = row.out.size() / row.certificates.size();
  for (size_t i = 0; i < row.certificates.size(); ++i) {
    const HeadCertificate& told = row.certificates[i];
    if (told.level == Level::kNone) continue;
    ++stats->certificates;
    stats->expected_misses = AddUp(stats->expected_misses, told.failure_probability);
    AddSlack(told, truth.exact[i], &findings->slack);
    std::string broken = BrokenAlways(told, truth.exact[i], row.plan.mode);
    const bool always = !broken.empty();
    if (!always) broken = BrokenUpper(told, truth.exact[i]);
    if (row.plan.mode == Mode::kEnforce && HasOutputBound(told, truth.dense[i])) {
      ++stats->outputs;
      const double distance =
          DistanceLower(absl::MakeConstSpan(row.out).subspan(i * head_dim, head_dim),
                        absl::MakeConstSpan(truth.dense_out).subspan(i * head_dim, head_dim));
      if (broken.empty()) broken = BrokenOutput(told, truth.dense[i], distance);
    }
    if (broken.empty()) continue;
    if (told.failure_probability > 0.0 && !always) {
      ++stats->misses;
      continue;
    }
    ++stats->violations;
    if (findings->lines.size() >= AuditFindings::kLinesMax) continue;
    findings->lines.push_back(absl::StrCat("call ", row.call_number, " row ", row.index, " layer ",
                                           row.layer, " query token ", i / head_count,
                                           " query head ", i % head_count, ": ", broken));
  }
}

bool SameCertificates(absl::Span<const HeadCertificate> a, absl::Span<const HeadCertificate> b) {
  const auto same = [](double x, double y) {
    return std::bit_cast<uint64_t>(x) == std::bit_cast<uint64_t>(y);
  };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [&](const HeadCertificate& x, const HeadCertificate& y) {
                      return x.level == y.level && x.action == y.action && x.met == y.met &&
                             same(x.log_kept, y.log_kept) &&
                             same(x.log_kept_lower.value, y.log_kept_lower.value) &&
                             same(x.log_kept_upper.value, y.log_kept_upper.value) &&
                             same(x.log_dropped_upper.value, y.log_dropped_upper.value) &&
                             same(x.log_dropped_lower.value, y.log_dropped_lower.value) &&
                             same(x.dropped_mass_upper.value, y.dropped_mass_upper.value) &&
                             same(x.dropped_mass_lower.value, y.dropped_mass_lower.value) &&
                             same(x.dropped_mass_estimate, y.dropped_mass_estimate) &&
                             same(x.output_error_upper, y.output_error_upper) &&
                             same(x.value_norm_lower, y.value_norm_lower) &&
                             same(x.failure_probability, y.failure_probability) &&
                             x.keys_sampled == y.keys_sampled && x.rows_sampled == y.rows_sampled;
                    });
}

}  // namespace kvservice
