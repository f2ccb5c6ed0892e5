#include "tests/attention/oracle.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/float16.h"

namespace kvservice::testing {
namespace {

constexpr long double kInfinity = std::numeric_limits<long double>::infinity();

long double LogSum(const std::vector<long double>& logits) {
  if (logits.empty()) return -kInfinity;
  const long double top = *std::max_element(logits.begin(), logits.end());
  long double sum = 0.0L;
  for (const long double x : logits) sum += std::exp(x - top);
  return top + std::log(sum);
}

void CheckMasses(const HeadCertificate& c, const Truth& truth) {
  EXPECT_LE(c.log_kept_lower.value, truth.log_kept);
  EXPECT_GE(c.log_kept_upper.value, truth.log_kept);
  EXPECT_GE(c.log_dropped_upper.value, truth.log_dropped);
  EXPECT_LE(c.log_dropped_lower.value, truth.log_dropped);
  EXPECT_GE(c.dropped_mass_upper.value, truth.share);
  EXPECT_LE(c.dropped_mass_lower.value, truth.share);
  EXPECT_LE(c.dropped_mass_upper.value, 1.0);
  EXPECT_GE(c.dropped_mass_lower.value, 0.0);
}

void CheckLevel(const HeadCertificate& c, const Truth& truth, const Plan& plan) {
  // Mass and output error may each spend the plan's probability; at 1e-9 no test sees it fail.
  EXPECT_LE(c.failure_probability, 2 * plan.failure_probability * (1 + 1e-12));
  EXPECT_EQ(c.failure_probability > 0.0, c.level == Level::kConfidence);
  if (truth.log_dropped == -kInfinity) {
    EXPECT_EQ(c.level, Level::kExact);
    EXPECT_EQ(c.dropped_mass_upper.value, 0.0);
    EXPECT_EQ(c.dropped_mass_lower.value, 0.0);
    return;
  }
  EXPECT_GT(c.dropped_mass_upper.value, 0.0);
  if (plan.prove == Guarantee::kNone) {
    EXPECT_EQ(c.level, Level::kNone);
    EXPECT_EQ(c.dropped_mass_upper.value, 1.0);
  } else if (plan.prove == Guarantee::kExact) {
    EXPECT_EQ(c.level, Level::kExact);
  } else if (plan.prove == Guarantee::kConfidence) {
    EXPECT_TRUE(c.level == Level::kConfidence || c.level == Level::kDeterministic);
    EXPECT_TRUE(c.level == Level::kDeterministic || c.keys_sampled + c.rows_sampled > 0);
  } else {
    EXPECT_EQ(c.level, Level::kDeterministic);
    EXPECT_EQ(c.keys_sampled + c.rows_sampled, 0);
  }
}

void CheckMet(const HeadCertificate& c, const Plan& plan) {
  const bool mass_met = plan.max_dropped_mass >= 1.0F ||
                        c.dropped_mass_upper.value <= static_cast<double>(plan.max_dropped_mass);
  const bool output_met = std::isinf(plan.max_output_error) ||
                          RelativeOutputError(c) <= static_cast<double>(plan.max_output_error);
  EXPECT_EQ(c.met, mass_met && output_met);
}

void CheckOutput(const Oracle& oracle, const Call& call, uint32_t head, const Truth& truth,
                 const Tolerance& tolerance) {
  const std::vector<long double> out = oracle.Output(head, truth);
  const auto lse = static_cast<double>(truth.log_kept);
  EXPECT_NEAR(call.lse[head], lse, std::max(tolerance.lse, std::fabs(lse) * 0x1p-24));
  double error = 0.0;
  double norm = 0.0;
  for (size_t c = 0; c < out.size(); ++c) {
    const auto expected = static_cast<double>(out[c]);
    const double miss = call.out[head * out.size() + c] - expected;
    error += miss * miss;
    norm += expected * expected;
  }
  EXPECT_LE(error, tolerance.normalized_squared_error * norm);
}

// The bound of ||o_dense - out||, the device's arithmetic included. In shadow mode it speaks about
// the output over what was selected.
void CheckOutputError(const Oracle& oracle, const Call& call, uint32_t head, const Truth& dense,
                      const Truth& truth) {
  const HeadCertificate& c = call.certificates[head];
  const std::vector<long double> expected = oracle.Output(head, dense);
  const bool shadow = call.row.plan.mode == Mode::kShadow;
  const std::vector<long double> selected =
      shadow ? oracle.Output(head, truth) : std::vector<long double>();
  long double squares = 0.0L;
  for (size_t i = 0; i < expected.size(); ++i) {
    const long double out = shadow ? selected[i] : call.out[head * expected.size() + i];
    squares += (expected[i] - out) * (expected[i] - out);
  }
  // A compensated answer was not given in shadow mode.
  if (shadow && c.action == Action::kCompensated) return;
  if (std::isfinite(squares)) {
    EXPECT_GE(c.output_error_upper, std::sqrt(squares));
  } else {
    EXPECT_EQ(c.output_error_upper, std::numeric_limits<double>::infinity());
  }
  const long double largest = oracle.LargestValueNorm(head);
  if (std::isfinite(largest)) {
    EXPECT_LE(c.value_norm_lower, largest);
  }
}

}  // namespace

Oracle::Oracle(const KvCase& kv, const AttendRow& row) : kv_(kv), row_(row) {
  const LayerShape& shape = kv.shape();
  const KvLayout& layout = shape.layout;
  logits_.resize(head_count());
  infinite_.resize(head_count());
  for (uint32_t head = 0; head < head_count(); ++head) {
    logits_[head].resize(row.view.length);
    for (uint32_t token = 0; token < row.view.length; ++token) {
      if (!Sees(head, token)) continue;
      const std::byte* k = kv.Row(KvHead(head), token);
      long double sum = 0.0L;
      for (uint32_t c = 0; c < layout.head_dim; ++c) {
        sum += static_cast<long double>(row.q[size_t{head} * layout.head_dim + c]) *
               static_cast<long double>(LoadElement(layout.dtype, k, c));
      }
      sum *= static_cast<long double>(shape.scale);
      if (!std::isfinite(sum)) infinite_[head] = true;
      const auto cap = static_cast<long double>(shape.logit_softcap);
      logits_[head][token] = cap > 0.0L ? cap * std::tanh(sum / cap) : sum;
    }
  }
}

uint32_t Oracle::head_count() const {
  return row_.query_count * kv_.shape().layout.query_head_count;
}

uint32_t Oracle::KvHead(uint32_t head) const {
  const KvLayout& layout = kv_.shape().layout;
  return head % layout.query_head_count / layout.group_size();
}

bool Oracle::Sees(uint32_t head, uint32_t token) const {
  const uint32_t position = row_.position + head / kv_.shape().layout.query_head_count;
  const uint32_t window = kv_.shape().sliding_window;
  return token <= position && (window == 0 || token + window > position);
}

bool Oracle::IsMeaningless(uint32_t head) const {
  for (uint32_t token = 0; token < row_.view.length; ++token) {
    if (Sees(head, token) && !(logits_[head][token] < kInfinity)) return true;
  }
  return false;
}

Truth Oracle::Judge(uint32_t head, const std::vector<uint32_t>& selected) const {
  std::vector<long double> kept;
  std::vector<long double> dropped;
  Truth truth;
  for (uint32_t token = 0; token < row_.view.length; ++token) {
    if (!Sees(head, token)) continue;
    if (std::binary_search(selected.begin(), selected.end(), token)) {
      kept.push_back(logits_[head][token]);
      truth.kept.push_back(token);
    } else {
      dropped.push_back(logits_[head][token]);
    }
  }
  truth.log_kept = LogSum(kept);
  truth.log_dropped = LogSum(dropped);
  if (!dropped.empty()) truth.share = 1.0L / (1.0L + std::exp(truth.log_kept - truth.log_dropped));
  return truth;
}

long double Oracle::LargestValueNorm(uint32_t head) const {
  const KvLayout& layout = kv_.shape().layout;
  long double largest = 0.0L;
  // The KV head sees what any of the row's query tokens does.
  for (uint32_t token = 0; token < row_.view.length; ++token) {
    bool seen = false;
    for (uint32_t other = head % layout.query_head_count; other < head_count();
         other += layout.query_head_count) {
      seen |= Sees(other, token);
    }
    if (!seen) continue;
    const std::byte* v = kv_.Row(KvHead(head), token) + layout.vector_bytes();
    long double squares = 0.0L;
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      const auto x = static_cast<long double>(LoadElement(layout.dtype, v, c));
      squares += x * x;
    }
    if (!std::isfinite(squares)) return std::numeric_limits<long double>::quiet_NaN();
    largest = std::max(largest, std::sqrt(squares));
  }
  return largest;
}

std::vector<long double> Oracle::Output(uint32_t head, const Truth& truth) const {
  const KvLayout& layout = kv_.shape().layout;
  std::vector<long double> out(layout.head_dim, 0.0L);
  for (const uint32_t token : truth.kept) {
    const long double weight = std::exp(logits_[head][token] - truth.log_kept);
    const std::byte* v = kv_.Row(KvHead(head), token) + layout.vector_bytes();
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      out[c] += weight * static_cast<long double>(LoadElement(layout.dtype, v, c));
    }
  }
  return out;
}

void CheckCall(const KvCase& kv, const Oracle& oracle, const Call& call, const Tolerance* tolerance,
               Slack* slack) {
  ASSERT_TRUE(call.row.status.ok()) << call.row.status;
  std::vector<uint32_t> everything(call.row.view.length);
  for (uint32_t token = 0; token < everything.size(); ++token) everything[token] = token;
  for (uint32_t head = 0; head < oracle.head_count(); ++head) {
    SCOPED_TRACE(::testing::Message() << "query token and head " << head);
    const std::vector<uint32_t>& selected = call.selected[oracle.KvHead(head)];
    const HeadCertificate& c = call.certificates[head];
    const bool silent = oracle.MayBeSilent(head) && c.level == Level::kNone;
    if (silent || oracle.IsMeaningless(head)) {
      EXPECT_EQ(c.level, Level::kNone);
      EXPECT_EQ(c.dropped_mass_upper.value, 1.0);
      EXPECT_EQ(c.dropped_mass_lower.value, 0.0);
      continue;
    }
    const Truth truth = oracle.Judge(head, selected);
    CheckMasses(c, truth);
    CheckLevel(c, truth, call.row.plan);
    CheckMet(c, call.row.plan);
    const Truth dense = oracle.Judge(head, everything);
    CheckOutputError(oracle, call, head, dense, truth);
    if (slack != nullptr && c.level != Level::kNone && truth.share > 0.0L) {
      slack->nats.push_back(
          static_cast<double>(std::log(c.dropped_mass_upper.value / truth.share)));
    }
    if (tolerance == nullptr || kv.options().keys == Keys::kNotFinite) continue;
    const bool shadow = call.row.plan.mode == Mode::kShadow;
    // A compensated answer is an estimate of the dense one; CheckOutputError judged it.
    if (!shadow && c.action == Action::kCompensated) continue;
    CheckOutput(oracle, call, head, shadow ? dense : truth, *tolerance);
  }
}

}  // namespace kvservice::testing
