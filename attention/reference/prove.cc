#include "attention/reference/prove.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

#include "attention/float16.h"
#include "attention/reference/log_sum.h"

namespace kvservice::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Logits of a set of tokens: the three ends of their ranges, side by side.
struct Logits {
  std::vector<double> low, nearest, high;

  void Add(const LogitRange& range) {
    low.push_back(range.low);
    nearest.push_back(range.nearest);
    high.push_back(range.high);
  }
};

bool Contains(const std::vector<uint32_t>& tokens, uint32_t token) {
  return std::binary_search(tokens.begin(), tokens.end(), token);
}

bool Proves(Guarantee guarantee) {
  return guarantee == Guarantee::kConfidence || guarantee == Guarantee::kDeterministic;
}

// The tokens that one head dropped, read one by one.
class Dropped : public DroppedTokens {
 public:
  Dropped(const LayerShape& shape, uint32_t head, const std::vector<uint32_t>& read, HeadRow* row)
      : shape_(shape), head_(head), read_(read), row_(row) {}

  const Population* Weigh() override {
    constexpr double kUnit = 0x1p30;
    // Covers the roundings of the exponential and of its argument.
    constexpr double kMargin = 1.0 + 0x1p-20;
    double top = kLogZero;
    ForEach([&](uint32_t token) { top = std::max(top, row_->Estimate(head_, token).high); });
    // With no finite logit there is no unit to weigh in; -infinity is an empty set.
    if (!(top < kInfinity)) return nullptr;
    population_.ref = std::isfinite(top) ? top : 0.0;
    const uint32_t first_block = row_->begin() / kBlockTokens;
    population_.Begin(first_block, BlockCount(row_->end()) - first_block);
    bool known = true;
    ForEach([&](uint32_t token) {
      const double high = row_->Estimate(head_, token).high;
      const double weight = std::ceil(std::exp(high - population_.ref) * kUnit * kMargin);
      known &= weight <= 2 * kUnit;
      population_.weights[token - first_block * kBlockTokens] =
          known ? static_cast<uint32_t>(std::max(1.0, weight)) : 1;
    });
    population_.SumPages();
    return known ? &population_ : nullptr;
  }

  void BoundValues(const Population& population, std::vector<float>* bounds) override {
    bounds->assign(population.weights.size(), 0.0F);
    ForEach([&](uint32_t token) {
      (*bounds)[token - population.block_begin * kBlockTokens] = row_->ValueBound(token);
    });
  }

  void Read(absl::Span<const uint32_t> positions, double ref, absl::Span<DrawnWeight> weights,
            float* values) override {
    const uint32_t head_dim = shape_.layout.head_dim;
    std::vector<double> value(head_dim);
    for (size_t i = 0; i < positions.size(); ++i) {
      const LogitRange range = row_->Exact(head_, positions[i]);
      weights[i] = WeightOfLogit(range.low, range.nearest, range.high, ref);
      if (values == nullptr) continue;
      std::fill(value.begin(), value.end(), 0.0);
      row_->AddValue(positions[i], 1.0, value.data());
      std::copy(value.begin(), value.end(), values + i * head_dim);
    }
  }

 private:
  template <typename Function>
  void ForEach(const Function& function) {
    for (uint32_t token = row_->begin(); token < row_->end(); ++token) {
      if (row_->Sees(head_, token) && !Contains(read_, token)) function(token);
    }
  }

  const LayerShape& shape_;
  const uint32_t head_;
  const std::vector<uint32_t>& read_;
  HeadRow* const row_;
  Population population_;
};

}  // namespace

GroupProof::GroupProof(const LayerShape& shape, const AttendRow& row, HeadRow* head_row)
    : shape_(shape),
      row_(row),
      head_row_(head_row),
      proofs_(head_row->head_count()),
      outputs_(head_row->head_count()),
      log_kept_(head_row->head_count()) {
  const uint32_t group = shape.layout.group_size();
  for (uint32_t head = 0; head < head_row->head_count(); ++head) {
    proofs_[head].Begin(row.plan, shape.layout.head_dim, row.draw_key,
                        {.kv_head = static_cast<uint16_t>(head_row->kv_head()),
                         .query_head = static_cast<uint16_t>(head % group),
                         .query_token = head / group});
  }
  SetValueNorms();
}

void GroupProof::SetValueNorms() {
  // A sum of up to 256 squares in double.
  constexpr double kRoundoff = 0x1p-40;
  double largest = 0.0;
  std::vector<double> value(shape_.layout.head_dim);
  for (uint32_t token = head_row_->begin(); token < head_row_->end(); ++token) {
    std::fill(value.begin(), value.end(), 0.0);
    head_row_->AddValue(token, 1.0, value.data());
    double squares = 0.0;
    for (const double x : value) squares += x * x;
    const double norm = std::sqrt(squares);
    if (std::isnan(norm) || norm > largest) largest = norm;
    if (std::isnan(largest)) break;
  }
  const bool finite = std::isfinite(largest);
  value_norm_lower_ = finite ? largest * (1.0 - kRoundoff) : 0.0;
  value_norm_upper_ = finite ? largest * (1.0 + kRoundoff) : kInfinity;
}

// Exact attention of one head over `kept`.
void GroupProof::Answer(uint32_t head, const std::vector<uint32_t>& kept, HeadEvidence* evidence) {
  std::vector<double> out(shape_.layout.head_dim, 0.0);
  double width = 0.0;  // of the widest logit range
  for (const uint32_t token : kept) {
    const LogitRange range = head_row_->Exact(head, token);
    width = std::max(width, range.high - range.low);
    head_row_->AddValue(token, std::exp(range.nearest - evidence->log_kept), out.data());
  }
  outputs_[head].assign(out.begin(), out.end());
  log_kept_[head] = evidence->log_kept;
  evidence->output = outputs_[head].data();
  evidence->value_norm_lower = value_norm_lower_;
  evidence->value_norm_upper = value_norm_upper_;
  // Weights off by a share rho of themselves move their mean by 2 rho / (1 - rho) norms; then the
  // sum in double, and the rounding to float.
  const double rho = std::expm1(width + (std::fabs(evidence->log_kept) + 8.0) * 0x1p-50);
  const double moved = rho < 0.5 ? 2.0 * rho / (1.0 - rho) : kInfinity;
  const double summed = (static_cast<double>(kept.size()) + 16.0) * 0x1p-52;
  evidence->arithmetic_error = value_norm_upper_ * (moved + summed + 0x1p-23) + 0x1p-119;
}

HeadEvidence GroupProof::EvidenceOf(uint32_t head, const std::vector<uint32_t>& read) {
  const Guarantee prove = row_.plan.prove;
  Logits kept;
  std::vector<uint32_t> kept_tokens;
  std::vector<uint32_t> dropped_tokens;
  bool scanned = true;
  for (uint32_t token = head_row_->begin(); token < head_row_->end(); ++token) {
    if (!head_row_->Sees(head, token)) continue;
    if (Contains(read, token)) {
      kept.Add(head_row_->Exact(head, token));
      kept_tokens.push_back(token);
    } else {
      dropped_tokens.push_back(token);
      scanned &= head_row_->WasScanned(token);
    }
  }
  HeadEvidence evidence;
  evidence.log_kept = LogSum(kept.nearest);
  evidence.kept_lower = LogSumLower(kept.low);
  evidence.kept_upper = LogSumUpper(kept.high);
  Answer(head, kept_tokens, &evidence);
  // A key that is not finite: no statement about this row means anything.
  for (size_t i = 0; i < kept.nearest.size(); ++i) {
    if (!std::isfinite(kept.low[i]) || !std::isfinite(kept.high[i])) {
      evidence.log_kept = std::numeric_limits<double>::quiet_NaN();
    }
  }
  Logits dropped;
  for (const uint32_t token : dropped_tokens) {
    if (prove == Guarantee::kExact) {
      dropped.Add(head_row_->Exact(head, token));
    } else if (Proves(prove) || scanned) {
      dropped.Add(head_row_->Estimate(head, token));
    }
  }
  if (dropped_tokens.empty() || prove == Guarantee::kExact) {
    evidence.level = Level::kExact;
  } else if (Proves(prove)) {
    evidence.level = Level::kDeterministic;
  }
  if (evidence.level != Level::kNone) {
    evidence.dropped_upper = LogSumUpper(dropped.high);
    evidence.dropped_lower = LogSumLower(dropped.low);
  }
  if (evidence.level != Level::kNone || scanned) {
    evidence.log_dropped_estimate = LogSum(dropped.nearest);
  }
  return evidence;
}

bool GroupProof::Prove(const std::vector<uint32_t>& read) {
  std::vector<uint32_t> fresh;
  if (proven_before_) {
    std::set_difference(read.begin(), read.end(), read_before_.begin(), read_before_.end(),
                        std::back_inserter(fresh));
  }
  bool met = true;
  for (uint32_t head = 0; head < proofs_.size(); ++head) {
    std::vector<double> moved;
    for (const uint32_t token : fresh) {
      if (head_row_->Sees(head, token)) moved.push_back(head_row_->Exact(head, token).low);
    }
    Dropped dropped(shape_, head, read, head_row_);
    proofs_[head].Prove(EvidenceOf(head, read), LogSumLower(moved), row_.plan.draws_max, &dropped);
    met &= proofs_[head].met();
  }
  read_before_ = read;
  proven_before_ = true;
  return met;
}

std::vector<uint32_t> GroupProof::Grow(const std::vector<uint32_t>& read) const {
  std::vector<uint32_t> grown = read;
  for (uint32_t head = 0; head < proofs_.size(); ++head) {
    const double wanted = proofs_[head].log_wanted();
    if (wanted == kInfinity) return {};
    if (wanted == kLogZero) continue;
    std::vector<std::pair<double, uint32_t>> heaviest;
    for (uint32_t token = head_row_->begin(); token < head_row_->end(); ++token) {
      if (!head_row_->Sees(head, token) || Contains(read, token)) continue;
      const double high = head_row_->Estimate(head, token).high;
      heaviest.emplace_back(std::isnan(high) ? -kInfinity : -high, token);
    }
    std::sort(heaviest.begin(), heaviest.end());
    double sum = 0.0;  // in units of e^wanted
    for (const auto& [negative_logit, token] : heaviest) {
      if (sum >= 1.0) break;
      sum += std::exp(-negative_logit - wanted);
      grown.push_back(token);
    }
  }
  std::sort(grown.begin(), grown.end());
  grown.erase(std::unique(grown.begin(), grown.end()), grown.end());
  const size_t visible =
      head_row_->TokensAt(Place::kAlways).size() + head_row_->TokensAt(Place::kMiddle).size();
  const double most = static_cast<double>(row_.plan.dense_share) * static_cast<double>(visible);
  if (grown.size() == read.size() || static_cast<double>(grown.size()) > most) return {};
  return grown;
}

}  // namespace kvservice::reference
