#include "tests/eval/closed_loop.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/sketch.h"
#include "tests/eval/distribution.h"
#include "tests/eval/exact_attention.h"
#include "tests/eval/served_prompt.h"
#include "tests/eval/step_judge.h"

namespace kvservice::eval {
namespace {

// (truth, bound) pairs that are kept per contender.
constexpr size_t kBoundSamplesMax = 400;
constexpr uint64_t kBoundSampleStride = 997;
// Operations per channel and query head to estimate what an anchor's list drops (attention/
// sharing.h): a difference, its rotation, and its products with a mean and, twice, a variance. Two
// numbers per channel and query head are read for it, and the variances.
constexpr double kEstimateFlops = 9.0;
// What a group reports that compared its query with none.
constexpr float kNoSimilarity = GroupReport().similarity;

struct Runner {
  Contender contender = {};
  ServedSequence sequence = {};
  std::unique_ptr<baselines::Baseline> baseline = {};
  std::vector<std::vector<uint32_t>> proposed = {};
  std::vector<uint32_t> given = {};
  std::vector<uint32_t> given_offsets = {};
  baselines::Cost cost = {};
  // Anchors made so far, [layer][kv_head]: what finding the most similar one costs.
  std::vector<uint32_t> anchors = {};
  uint32_t next_token = 0;
  bool answer_is_right = false;
  LoopResult result = {};
};

class Loop {
 public:
  Loop(const LoopSetup& setup, absl::Span<const Contender> contenders);
  absl::Status Prepare(absl::Span<const Contender> contenders);
  absl::StatusOr<std::vector<LoopResult>> Run();

 private:
  absl::Status Step(uint32_t step);
  absl::Status Layer(uint32_t step, uint32_t layer);
  bool IsJudged(uint32_t step, const Runner& runner) const {
    return runner.contender.policy.guarantee != Guarantee::kNone || step % setup_.judge_every == 0;
  }
  std::vector<uint32_t> WhoIsScored(uint32_t step) const;
  void Propose(uint32_t layer);
  AttendCall MakeCall(uint32_t layer);
  void JudgeRow(uint32_t step, uint32_t layer, size_t index, const AttendCall& call);
  void CountGroup(uint32_t step, uint32_t layer, uint32_t head, const GroupReport& report,
                  Runner* runner) const;
  static void CountAssumed(const AssumedMasses& assumed, LoopResult* result);
  void CountCertificate(const HeadCertificate& certificate, const HeadVerdict& verdict,
                        LoopResult* result) const;
  void JudgeLogits(uint32_t step);
  bool is_sparse(uint32_t layer) const { return IsSparse(shape_, layer); }

  const LoopSetup& setup_;
  const DecoderShape& shape_;
  const StudyText& text_;
  const uint32_t prompt_length_;
  const uint32_t step_count_;
  std::vector<Runner> runners_;
  std::unique_ptr<ServedPrompt> served_;
  ExactAttention exact_;
  StepJudge judge_;
  uint32_t position_ = 0;
  std::vector<uint32_t> tokens_, positions_;
  std::vector<float> hidden_, q_, logits_;
  std::vector<float> dense_shares_;  // [vocabulary]
  std::vector<uint16_t> k_, v_;
  std::vector<int64_t> q_extents_, kv_extents_;
  std::vector<HeadVerdict> verdicts_;
  // [layer_count]: which of the sparse layers it is.
  std::vector<uint32_t> sparse_index_;
  uint32_t sparse_count_ = 0;
};

Loop::Loop(const LoopSetup& setup, absl::Span<const Contender> contenders)
    : setup_(setup),
      shape_(setup.decoder->shape()),
      text_(*setup.text),
      prompt_length_(setup.prompt->length()),
      step_count_(static_cast<uint32_t>(text_.forced.size()) +
                  (text_.greedy_tokens > 0 ? text_.greedy_tokens - 1 : 0)),
      exact_(shape_, setup.prompt.get(), contenders.size(), step_count_) {
  const auto rows = static_cast<int64_t>(contenders.size());
  q_extents_ = {rows, shape_.query_head_count, shape_.head_dim};
  kv_extents_ = {rows, shape_.kv_head_count, shape_.head_dim};
  hidden_.resize(contenders.size() * shape_.hidden);
  q_.resize(contenders.size() * shape_.query_head_count * shape_.head_dim);
  k_.resize(contenders.size() * shape_.kv_head_count * shape_.head_dim);
  v_.resize(k_.size());
  logits_.resize(contenders.size() * shape_.vocabulary);
  verdicts_.resize(shape_.query_head_count);
  for (uint32_t layer = 0; layer < shape_.layer_count; ++layer) {
    sparse_index_.push_back(sparse_count_);
    sparse_count_ += is_sparse(layer) ? 1 : 0;
  }
}

absl::Status Loop::Prepare(absl::Span<const Contender> contenders) {
  std::set<std::pair<bool, bool>> bases;
  for (const Contender& contender : contenders) {
    bases.emplace(contender.seeded, contender.unrotated);
  }
  auto served = ServedPrompt::Make(shape_, *setup_.prompt, setup_.tables,
                                   {.fork_count = contenders.size(),
                                    .base_count = bases.size(),
                                    .steps_max = step_count_,
                                    .seed = setup_.seed});
  if (!served.ok()) return served.status();
  served_ = std::move(*served);
  const auto& last_logits = setup_.prompt->cache().last_logits;
  const auto best = std::max_element(last_logits.begin(), last_logits.end());
  for (const Contender& contender : contenders) {
    Runner runner{.contender = contender};
    auto forked = served_->Fork(contender.seeded, contender.unrotated);
    if (!forked.ok()) return forked.status();
    runner.sequence = *forked;
    runner.next_token = static_cast<uint32_t>(best - last_logits.begin());
    if (!contender.baseline.empty()) {
      runner.baseline = setup_.indexes->at(contender.baseline)->NewBaseline(contender.token_budget);
    }
    runner.anchors.resize(shape_.layer_count * shape_.kv_head_count);
    runner.result.scans_by_head.resize(sparse_count_ * shape_.kv_head_count);
    runners_.push_back(std::move(runner));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<LoopResult>> Loop::Run() {
  for (uint32_t step = 0; step < step_count_; ++step) {
    const absl::Status status = Step(step);
    if (!status.ok()) return status;
  }
  std::vector<LoopResult> results;
  for (Runner& runner : runners_) {
    runner.result.steps = step_count_;
    const auto seed_scans = served_->CountSeedScans(runner.sequence);
    if (!seed_scans.ok()) return seed_scans.status();
    runner.result.seed_scans = *seed_scans;
    if (text_.greedy_tokens > 0) runner.result.greedy.push_back(runner.next_token);
    results.push_back(std::move(runner.result));
  }
  return results;
}

absl::Status Loop::Step(uint32_t step) {
  position_ = prompt_length_ + step;
  positions_.assign(runners_.size(), position_);
  tokens_.clear();
  for (Runner& runner : runners_) {
    const bool is_forced = step < text_.forced.size();
    if (!is_forced) runner.result.greedy.push_back(runner.next_token);
    tokens_.push_back(is_forced ? text_.forced[step] : runner.next_token);
  }
  setup_.decoder->Embed(tokens_, hidden_.data());
  for (uint32_t layer = 0; layer < shape_.layer_count; ++layer) {
    const absl::Status status = Layer(step, layer);
    if (!status.ok()) return status;
  }
  setup_.decoder->Logits(runners_.size(), hidden_.data(), logits_.data());
  JudgeLogits(step);
  return absl::OkStatus();
}

absl::Status Loop::Layer(uint32_t step, uint32_t layer) {
  setup_.decoder->Project(layer, positions_, hidden_.data(), q_.data(), k_.data(), v_.data());
  if (is_sparse(layer)) {
    exact_.Append(layer, k_.data(), v_.data());
    exact_.Score(layer, q_.data(), WhoIsScored(step));
    Propose(layer);
  }
  AttendCall call = MakeCall(layer);
  const absl::Status status = served_->Attend(&call);
  if (!status.ok()) return status;
  if (is_sparse(layer)) {
    for (size_t i = 0; i < runners_.size(); ++i) JudgeRow(step, layer, i, call);
  }
  setup_.decoder->Finish(layer, runners_.size(), call.out.data(), hidden_.data());
  return absl::OkStatus();
}

// The first one is dense, which needs no judge.
std::vector<uint32_t> Loop::WhoIsScored(uint32_t step) const {
  std::vector<uint32_t> scored;
  for (uint32_t i = 1; i < runners_.size(); ++i) {
    if (runners_[i].contender.reads_logits || IsJudged(step, runners_[i])) scored.push_back(i);
  }
  return scored;
}

void Loop::Propose(uint32_t layer) {
  const size_t q_floats = size_t{shape_.query_head_count} * shape_.head_dim;
  const size_t kv_floats = size_t{shape_.kv_head_count} * shape_.head_dim;
  std::vector<float> new_keys(kv_floats);
  for (size_t i = 0; i < runners_.size(); ++i) {
    Runner& runner = runners_[i];
    if (runner.baseline == nullptr) continue;
    for (uint32_t head = 0; head < shape_.kv_head_count; ++head) {
      const Tail tail = exact_.tail(layer, i, head);
      std::copy_n(tail.keys + size_t{tail.count - 1} * shape_.head_dim, shape_.head_dim,
                  &new_keys[head * shape_.head_dim]);
    }
    runner.cost =
        runner.baseline->Propose({.layer = layer,
                                  .length = exact_.length(),
                                  .q = absl::MakeConstSpan(q_).subspan(i * q_floats, q_floats),
                                  .new_keys = new_keys,
                                  .logits = exact_.logits(i)},
                                 &runner.proposed);
    runner.given.clear();
    runner.given_offsets = {0};
    for (const std::vector<uint32_t>& positions : runner.proposed) {
      runner.given.insert(runner.given.end(), positions.begin(), positions.end());
      runner.given_offsets.push_back(static_cast<uint32_t>(runner.given.size()));
    }
  }
}

AttendCall Loop::MakeCall(uint32_t layer) {
  AttendCall call;
  call.layer = layer;
  call.want_selected = is_sparse(layer);
  for (const Runner& runner : runners_) {
    AttendCallRow row{.id = runner.sequence.id,
                      .generation = runner.sequence.generation,
                      .position = position_,
                      .policy = &runner.contender.policy,
                      .given = {},
                      .given_offsets = {}};
    if (runner.baseline != nullptr && is_sparse(layer)) {
      row.given = runner.given;
      row.given_offsets = runner.given_offsets;
    }
    call.rows.push_back(row);
  }
  const auto bytes = [](const auto& numbers) {
    return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(numbers.data()),
                               numbers.size() * sizeof(numbers[0]));
  };
  call.q = {.dtype = DType::kFloat32, .shape = q_extents_, .bytes = bytes(q_), .field = "q"};
  call.k = {.dtype = DType::kBfloat16, .shape = kv_extents_, .bytes = bytes(k_), .field = "k"};
  call.v = {.dtype = DType::kBfloat16, .shape = kv_extents_, .bytes = bytes(v_), .field = "v"};
  return call;
}

void Loop::JudgeRow(uint32_t step, uint32_t layer, size_t index, const AttendCall& call) {
  Runner& runner = runners_[index];
  LoopResult& result = runner.result;
  const AttendRowResult& answered = call.results[index];
  const uint32_t group = shape_.query_head_count / shape_.kv_head_count;
  const size_t row = index * shape_.query_head_count * shape_.head_dim;
  const absl::Span<const float> scores = exact_.logits(index);
  const bool is_judged = index > 0 && IsJudged(step, runner);
  for (uint32_t head = 0; head < shape_.kv_head_count; ++head) {
    CountGroup(step, layer, head, answered.groups[head], &runner);
    CountAssumed(answered.assumed[head], &result);
    if (!is_judged) continue;
    const size_t first = row + size_t{head} * group * shape_.head_dim;
    const GroupStep judged{.group = group,
                           .head_dim = shape_.head_dim,
                           .length = exact_.length(),
                           .scale = shape_.scale,
                           .q = &q_[first],
                           .logits = scores.data() + size_t{head} * group * exact_.length(),
                           .prompt_keys = setup_.prompt->keys(layer, head),
                           .prompt_values = setup_.prompt->values(layer, head),
                           .prompt_length = prompt_length_,
                           .tail = exact_.tail(layer, index, head),
                           .key_norm_max = exact_.key_norm_max(layer, head),
                           .selected = answered.selected[head],
                           .dense = answered.groups[head].action == Action::kDense,
                           .out = &call.out[first],
                           .certificates = &answered.certificates[size_t{head} * group]};
    judge_.Judge(judged, verdicts_.data());
    for (uint32_t g = 0; g < group; ++g) {
      result.dropped.push_back(static_cast<float>(verdicts_[g].dropped));
      CountCertificate(judged.certificates[g], verdicts_[g], &result);
    }
    if (step % (setup_.judge_every * setup_.compare_every) == 0) {
      const GroupVerdict compared = judge_.Compare(judged, verdicts_.data());
      result.excess.push_back(static_cast<float>(compared.excess));
      result.overlap_sum += compared.overlap;
      result.output_errors.push_back(static_cast<float>(compared.output_error));
    }
  }
}

// Bytes: keys and values have two bytes per channel. Operations: two per channel and query head of
// a dot product.
void Loop::CountGroup(uint32_t step, uint32_t layer, uint32_t head, const GroupReport& report,
                      Runner* runner) const {
  LoopResult& result = runner->result;
  const double dim = shape_.head_dim;
  const uint32_t group_size = shape_.query_head_count / shape_.kv_head_count;
  const double group = group_size;
  const bool is_late = 2 * step >= step_count_;
  const bool is_baseline = runner->baseline != nullptr;
  const bool scanned = is_baseline ? head < runner->cost.heads_scanned : report.scanned;
  const double sketch_bytes =
      static_cast<double>(SketchLayout(shape_.head_dim).slice_bytes(1)) / kBlockTokens;
  uint32_t* anchors = &runner->anchors[layer * shape_.kv_head_count + head];
  ++result.groups;
  result.groups_second_half += is_late ? 1 : 0;
  result.scans += scanned ? 1 : 0;
  result.scans_by_head[sparse_index_[layer] * shape_.kv_head_count + head] += scanned ? 1 : 0;
  result.scans_second_half += scanned && is_late ? 1 : 0;
  result.groups_dense += report.action == Action::kDense ? 1 : 0;
  result.tokens_read += report.tokens_read;
  result.tokens_visible += exact_.length();
  result.bytes += report.tokens_read * 4.0 * dim + report.keys_sampled * 2.0 * dim +
                  report.rows_sampled * 4.0 * dim + report.tokens_scanned * sketch_bytes;
  result.flops += group * dim * 4.0 * report.tokens_read + 2.0 * dim * report.keys_sampled +
                  4.0 * dim * report.rows_sampled + group * 2.0 * dim * report.tokens_scanned;
  result.bytes_dense += exact_.length() * 4.0 * dim;
  result.flops_dense += group * dim * 4.0 * exact_.length();
  if (is_baseline && head == 0) {
    result.bytes += runner->cost.bytes;
    result.flops += runner->cost.flops;
  }
  if (is_baseline) return;
  // Without a similarity there was no anchor, or none any more.
  if (report.similarity == kNoSimilarity) *anchors = 0;
  result.bytes += *anchors * group * dim * 4.0;
  result.flops += *anchors * group * dim * 2.0;
  if (report.sharing_estimate >= 0.0F) {
    result.bytes += (2.0 * group + 1.0) * dim * 4.0;
    result.flops += kEstimateFlops * group * dim;
  }
  const uint32_t anchors_max = runner->contender.policy.cis.anchors_max;
  *anchors = std::min(anchors_max, *anchors + (scanned ? 1 : 0));
}

void Loop::CountAssumed(const AssumedMasses& assumed, LoopResult* result) {
  const std::array<float, 3> masses = {assumed.cis_excess, assumed.psaw_dropped,
                                       assumed.etf_excess};
  for (size_t i = 0; i < masses.size(); ++i) {
    if (masses[i] < 0.0F) continue;
    result->assumed_sum[i] += masses[i];
    ++result->assumed_count[i];
  }
}

void Loop::CountCertificate(const HeadCertificate& certificate, const HeadVerdict& verdict,
                            LoopResult* result) const {
  if (certificate.level == Level::kNone) {
    result->violations += verdict.is_wrong ? 1 : 0;
    return;
  }
  const bool is_sampled = certificate.level == Level::kConfidence;
  (is_sampled ? result->sampled_certificates : result->certificates) += 1;
  (is_sampled ? result->sampled_misses : result->violations) += verdict.is_wrong ? 1 : 0;
  result->expected_misses += certificate.failure_probability;
  if (verdict.dropped <= 0.0) return;
  const auto bound = static_cast<float>(certificate.dropped_mass_upper.value);
  result->bounds.push_back(bound);
  if (result->bounds.size() % kBoundSampleStride == 0 &&
      result->bound_samples.size() < kBoundSamplesMax) {
    result->bound_samples.emplace_back(static_cast<float>(verdict.dropped), bound);
  }
}

void Loop::JudgeLogits(uint32_t step) {
  const size_t vocabulary = shape_.vocabulary;
  const auto all = absl::MakeConstSpan(logits_);
  const absl::Span<const float> dense = all.first(vocabulary);
  const auto [dense_log_sum, dense_best] = LogSumOf(dense);
  const bool has_target = step + 1 < text_.forced.size();
  dense_shares_.resize(vocabulary);
  Normalise(dense, dense_log_sum, dense_shares_.data());
  for (size_t i = 0; i < runners_.size(); ++i) {
    LoopResult& result = runners_[i].result;
    const absl::Span<const float> logits = all.subspan(i * vocabulary, vocabulary);
    const auto [log_sum, best] = LogSumOf(logits);
    runners_[i].next_token = best;
    if (step >= text_.forced.size()) continue;
    const double kl =
        i == 0 ? 0.0 : Divergence(dense_shares_, dense, dense_log_sum, logits, log_sum);
    result.kl.push_back(static_cast<float>(std::max(0.0, kl)));
    result.top1_equal += best == dense_best ? 1 : 0;
    if (!has_target) continue;
    const uint32_t target = text_.forced[step + 1];
    result.nll.push_back(static_cast<float>(log_sum - logits[target]));
    for (const Answer& answer : text_.answers) {
      if (step + 1 < answer.begin || step + 1 >= answer.end) continue;
      result.digits += 1;
      result.digits_right += best == target ? 1 : 0;
      // An answer is right until one of its tokens is not.
      if (step + 1 == answer.begin) {
        result.answers += 1;
        result.answers_right += 1;
        runners_[i].answer_is_right = true;
      }
      if (best != target && std::exchange(runners_[i].answer_is_right, false)) {
        result.answers_right -= 1;
      }
    }
  }
}

}  // namespace

absl::StatusOr<std::vector<LoopResult>> RunClosedLoop(const LoopSetup& setup,
                                                      absl::Span<const Contender> contenders) {
  Loop loop(setup, contenders);
  const absl::Status status = loop.Prepare(contenders);
  if (!status.ok()) return status;
  return loop.Run();
}

}  // namespace kvservice::eval
