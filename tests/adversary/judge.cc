#include "tests/adversary/judge.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "attention/growing.h"

namespace kvservice::adversary {
namespace {

// A useful bound tells a dropped share below 1/10 from one.
constexpr double kTameSlackOfOne = 2.302585093;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Collects what is wrong with one head.
class HeadJudge {
 public:
  HeadJudge(const HeadCertificate& certificate, const Plan& plan, HeadVerdict* verdict)
      : c_(certificate), plan_(plan), verdict_(*verdict) {}

  void SaysNothing() {
    Demand(c_.level == Level::kNone, "level is stronger than NONE where there is no truth");
    Demand(c_.dropped_mass_upper.value == 1.0, "the bound is not 1 where there is no truth");
    Demand(c_.dropped_mass_lower.value == 0.0, "the lower bound is not 0 where there is no truth");
  }

  void Masses(const MassTruth& truth) {
    // What was attended is never sampled.
    NotAbove("log_kept_lower", c_.log_kept_lower.value, truth.log_kept.high, nullptr);
    NotBelow("log_kept_upper", c_.log_kept_upper.value, truth.log_kept.low, nullptr);
    bool* missed = c_.level == Level::kConfidence ? &verdict_.mass_missed : nullptr;
    verdict_.mass_sampled = missed != nullptr;
    NotBelow("log_dropped_upper", c_.log_dropped_upper.value, truth.log_dropped.low, missed);
    NotAbove("log_dropped_lower", c_.log_dropped_lower.value, truth.log_dropped.high, missed);
    NotBelow("dropped_mass_upper", c_.dropped_mass_upper.value, truth.share.low, missed);
    NotAbove("dropped_mass_lower", c_.dropped_mass_lower.value, truth.share.high, missed);
    const double upper = c_.dropped_mass_upper.value;
    const double lower = c_.dropped_mass_lower.value;
    Demand(upper <= 1.0 && lower >= 0.0, "a share is outside [0, 1]");
    const auto share = static_cast<double>(truth.share.low);
    if (truth.dropped_any && share > std::numeric_limits<double>::min()) {
      verdict_.slack = std::log(upper / share);
      verdict_.slack_of_one = -std::log(share);
    }
    if (truth.dropped_any && std::isfinite(truth.log_dropped.low)) {
      // Also where the share itself is next to 1 or 0.
      verdict_.odds_slack = static_cast<double>(
          (static_cast<long double>(c_.log_dropped_upper.value) - truth.log_dropped.low) +
          (truth.log_kept.high - static_cast<long double>(c_.log_kept_lower.value)));
    }
  }

  void LevelFits(const MassTruth& truth) {
    if (!truth.dropped_any) {
      // Logits beyond the device's arithmetic: it has no output to speak of and says so.
      const bool silent = c_.level == Level::kNone && c_.dropped_mass_upper.value == 1.0;
      if (silent && !std::isfinite(c_.log_kept)) return;
      Demand(c_.level == Level::kExact, "everything was attended, but the level is not EXACT");
      Demand(c_.dropped_mass_upper.value == 0.0, "everything was attended, but the bound is not 0");
      return;
    }
    State(c_.level != Level::kExact || plan_.prove == Guarantee::kExact,
          "EXACT, but tokens were dropped and their mass was not asked to be computed");
    State(c_.dropped_mass_upper.value > 0.0, "tokens were dropped, but the bound is 0");
    if (c_.level == Level::kNone) {
      Demand(c_.dropped_mass_upper.value == 1.0, "level NONE, but the bound is not 1");
    }
    Demand(c_.level != Level::kConfidence || plan_.prove == Guarantee::kConfidence,
           "CONFIDENCE was not asked for");
    Demand(c_.level <= Level::kConfidence || plan_.prove != Guarantee::kNone,
           "proven, but no proof was asked for");
  }

  void ProbabilityFits() {
    const double eta = c_.failure_probability;
    Demand(c_.level != Level::kConfidence || eta > 0.0, "CONFIDENCE without a probability");
    Demand(eta == 0.0 || plan_.prove == Guarantee::kConfidence,
           "a failure probability that was not asked for");
    // The statements about mass and output each may spend it once.
    Demand(eta <= 2.0 * plan_.failure_probability * (1.0 + 0x1p-40), "more eta than asked for");
    const uint64_t draws_max = uint64_t{FailureBudget::kRoundsMax} * plan_.draws_max;
    if (c_.keys_sampled > draws_max) {
      Demand(false, absl::StrCat("sampled ", c_.keys_sampled, " keys"));
    }
    const uint32_t sampled = c_.keys_sampled + c_.rows_sampled;
    Demand(eta == 0.0 || sampled > 0, "a failure probability without samples");
  }

  void MetFits(bool served) {
    const bool mass = plan_.max_dropped_mass >= 1.0F ||
                      c_.dropped_mass_upper.value <= static_cast<double>(plan_.max_dropped_mass);
    const bool output = std::isinf(plan_.max_output_error) ||
                        RelativeOutputError(c_) <= static_cast<double>(plan_.max_output_error);
    // Rounded apart, error and norm may reach the limit that they keep together.
    const bool as_stated = c_.met && mass && served && c_.output_error_upper >= 0.0;
    if (c_.met != (mass && output) && !as_stated) {
      Demand(false, absl::StrCat("met is ", c_.met, ", but the limits say ", mass && output));
    }
  }

  void Output(const HeadTruth& truth, absl::Span<const uint32_t> attended, const float* out,
              long double value_norm_max) {
    const double bound = c_.output_error_upper;
    Demand(bound >= 0.0, "output_error_upper is negative or NaN");
    if (std::isfinite(value_norm_max)) {
      NotAbove("value_norm_lower", c_.value_norm_lower, value_norm_max, nullptr);
    }
    if (!(bound < std::numeric_limits<double>::infinity())) return;
    verdict_.output_bounded = true;
    if (truth.has_no_output()) {
      return State(false, "output_error_upper is finite, but there is no output to be near to");
    }
    // In shadow mode the answer is dense, but the statement is about what was selected. What a
    // compensated answer would have been nobody knows.
    const bool shadow = plan_.mode == Mode::kShadow;
    if (shadow && c_.rows_sampled > 0) return;
    const Interval error = shadow ? truth.SelectionError(attended) : truth.OutputError(out);
    bool* missed = c_.failure_probability > 0.0 ? &verdict_.output_missed : nullptr;
    verdict_.output_sampled = missed != nullptr;
    NotBelow("output_error_upper", bound, error.low, missed);
    if (error.low > 0.0L) {
      verdict_.output_slack = std::log(bound / static_cast<double>(error.low));
    }
  }

 private:
  // Texts are made when something is wrong.
  void State(bool holds, std::string_view what) {
    if (!holds) verdict_.findings.push_back({std::string(what), true});
  }
  void Demand(bool holds, std::string_view what) {
    if (!holds) verdict_.findings.push_back({std::string(what), false});
  }
  // Written so that NaN fails.
  void NotBelow(const char* name, double upper, long double truth, bool* missed) {
    Hold(static_cast<long double>(upper) >= truth, name, upper, truth, missed);
  }
  void NotAbove(const char* name, double lower, long double truth, bool* missed) {
    Hold(static_cast<long double>(lower) <= truth, name, lower, truth, missed);
  }
  void Hold(bool holds, const char* name, double said, long double truth, bool* missed) {
    if (holds) return;
    if (missed != nullptr) {
      *missed = true;
      return;
    }
    State(false, absl::StrFormat("%s is %.17g, the truth %.19g (level %d, action %d)", name, said,
                                 truth, static_cast<int>(c_.level), static_cast<int>(c_.action)));
  }

  const HeadCertificate& c_;
  const Plan& plan_;
  HeadVerdict& verdict_;
};

// Tokens of one KV head that some query token of the row sees, [begin, length).
uint32_t ReferenceBegin(const JudgedCall& call) {
  const uint32_t window = call.layer_case->shape.sliding_window;
  const uint32_t end = call.layer_case->position() + 1;
  return window == 0 || end <= window ? 0 : end - window;
}

// What is wrong with the tokens that a KV head says it attended; empty if nothing.
std::string JudgeAttended(const JudgedCall& call, uint32_t kv_head) {
  const std::vector<uint32_t>& attended = call.selected[kv_head];
  const GroupReport& report = call.groups[kv_head];
  const Plan& plan = call.plan;
  const uint32_t length = call.layer_case->length;
  const uint32_t begin = ReferenceBegin(call);
  const bool shadow = plan.mode == Mode::kShadow;
  const uint32_t all = length - begin;
  if (!std::is_sorted(attended.begin(), attended.end(), std::less_equal<>())) {
    return "attended positions are not ascending and unique";
  }
  if (!attended.empty() && (attended.front() < begin || attended.back() >= length)) {
    return "attended positions outside of what the queries see";
  }
  if (report.tokens_read != (shadow ? all : attended.size())) {
    return absl::StrCat("tokens_read is ", report.tokens_read, ", attended ", attended.size());
  }
  if (shadow && report.action != Action::kDense) return "shadow mode, but the answer is not dense";
  const bool dense = !shadow && report.action == Action::kDense;
  if (dense && attended.size() != all) return "the answer is dense, but tokens were left out";
  if (!call.is_exact) return "";
  auto next = attended.begin();
  for (uint32_t token = begin; token < length; ++token) {
    const bool read = next != attended.end() && *next == token;
    if (read) ++next;
    const bool always = token < plan.sink_end || token >= plan.local_begin ||
                        token >= call.layer_case->position() || call.is_exact(kv_head, token);
    if (always && !read) return absl::StrCat("token ", token, " is always attended, but was not");
    const bool hidden = !always && token < plan.visible_begin;
    // Growing reads what proves the limit, wherever it is.
    const bool may_grow = !shadow && plan.on_violation == OnViolation::kGrow;
    if (hidden && read && !dense && !may_grow)
      return absl::StrCat("hidden token ", token, " was attended");
    if (plan.source == Source::kAll && !hidden && !read) {
      return absl::StrCat("token ", token, " was left out of a dense plan");
    }
  }
  return "";
}

// Returns what is wrong, of all that is.
std::string Count(const JudgedCall& call, uint32_t head, const HeadVerdict& verdict, Tally* tally) {
  const HeadCertificate& c = call.certificates[head];
  ++tally->certificates;
  ++tally->levels[static_cast<size_t>(c.level)];
  ++tally->actions[static_cast<size_t>(c.action)];
  tally->meaningless += verdict.meaningless ? 1 : 0;
  tally->unresolved += verdict.unresolved ? 1 : 0;
  tally->output_bounds += verdict.output_bounded ? 1 : 0;
  if (verdict.mass_sampled || verdict.output_sampled) {
    SampledCounts counts;
    counts.mass_count = verdict.mass_sampled ? 1 : 0;
    counts.mass_misses = verdict.mass_missed ? 1 : 0;
    counts.output_count = verdict.output_sampled ? 1 : 0;
    counts.output_misses = verdict.output_missed ? 1 : 0;
    counts.keys = c.keys_sampled;
    counts.rows = c.rows_sampled;
    const double eta = call.plan.failure_probability;
    tally->sampled[eta].Add(counts);
    if (!call.population.empty()) tally->by_population[{call.population, eta}].Add(counts);
  }
  const Guarantee prove = call.plan.prove;
  if (prove == Guarantee::kDeterministic || prove == Guarantee::kConfidence) {
    if (!std::isnan(verdict.slack)) tally->slack.Add(verdict.slack);
    if (verdict.slack_of_one > kTameSlackOfOne && call.layer_case->is_tame()) {
      tally->slack_tame.Add(verdict.slack);
      tally->slack_tame_of_one.Add(verdict.slack_of_one);
    }
  }
  if (!std::isnan(verdict.output_slack)) tally->output_slack.Add(verdict.output_slack);
  for (const Finding& finding : verdict.findings) {
    ++(finding.false_statement ? tally->violations : tally->contradictions);
  }
  if (verdict.findings.empty()) return "";
  return absl::StrCat(call.reproduce, " head ", head, ": ", verdict.findings[0].what);
}

// A failed row speaks of nothing: its numbers are zero.
void JudgeRefusal(const JudgedCall& call, Tally* tally) {
  const LayerCase& from = *call.layer_case;
  const size_t floats = size_t{from.head_count()} * from.shape.layout.head_dim;
  const bool zero = call.out == nullptr ||
                    std::all_of(call.out, call.out + floats, [](float x) { return x == 0; });
  ++tally->rows_refused;
  if (call.status.code() == absl::StatusCode::kFailedPrecondition && zero &&
      call.plan.on_violation == OnViolation::kFail && call.plan.mode == Mode::kEnforce) {
    return;
  }
  ++tally->contradictions;
  tally->AddFailure(absl::StrCat(call.reproduce, ": ", call.status.ToString(),
                                 zero ? "" : ", and its output is not zero"));
}

}  // namespace

HeadVerdict JudgeHead(const HeadTruth& truth, const HeadCertificate& certificate,
                      absl::Span<const uint32_t> attended, const float* out,
                      long double value_norm_max, const Plan& plan, bool served) {
  HeadVerdict verdict;
  verdict.slack = verdict.odds_slack = verdict.output_slack = verdict.slack_of_one = kNan;
  HeadJudge judge(certificate, plan, &verdict);
  judge.MetFits(served);
  judge.ProbabilityFits();
  const bool silent = truth.may_be_silent() && certificate.level == Level::kNone;
  if (silent || truth.is_meaningless()) {
    verdict.meaningless = true;
    judge.SaysNothing();
    judge.Output(truth, attended, out, value_norm_max);
    return verdict;
  }
  const MassTruth masses = truth.Masses(attended);
  verdict.unresolved = masses.unresolved;
  judge.LevelFits(masses);
  if (masses.unresolved) return verdict;
  judge.Masses(masses);
  judge.Output(truth, attended, out, value_norm_max);
  return verdict;
}

double JudgeCall(const JudgedCall& call, Tally* tally) {
  ++tally->rows;
  if (!call.status.ok()) {
    JudgeRefusal(call, tally);
    return kNan;
  }
  const KvLayout& layout = call.layer_case->shape.layout;
  tally->shares.Count(*call.layer_case, call.plan, call.layer_case->head_count());
  const uint32_t begin = ReferenceBegin(call);
  std::vector<long double> norms(layout.kv_head_count, 0.0L);
  for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
    const std::vector<long double>& all = call.widened[kv_head].v_norm;
    for (size_t token = begin; token < all.size(); ++token) {
      // Written so that NaN stays: then nothing is judged.
      if (!(all[token] <= norms[kv_head])) norms[kv_head] = all[token];
      if (std::isnan(norms[kv_head])) break;
    }
    norms[kv_head] *= 1.0L + 0x1p-50L;
    const std::string wrong = JudgeAttended(call, kv_head);
    if (wrong.empty()) continue;
    ++tally->contradictions;
    tally->AddFailure(absl::StrCat(call.reproduce, " KV head ", kv_head, ": ", wrong));
  }
  double least = kNan;
  std::string first_wrong;
  for (uint32_t head = 0; head < call.layer_case->head_count(); ++head) {
    const uint32_t kv_head = head % layout.query_head_count / layout.group_size();
    const HeadVerdict verdict = JudgeHead(
        call.truths[head], call.certificates[head], call.selected[kv_head],
        call.out + size_t{head} * layout.head_dim, norms[kv_head], call.plan, call.served);
    const std::string wrong = Count(call, head, verdict, tally);
    // One per call, or a broken device would fill the screen with a single defect.
    if (!wrong.empty() && first_wrong.empty()) first_wrong = wrong;
    if (!verdict.mass_sampled) least = std::fmin(least, verdict.odds_slack);
    if (!verdict.output_sampled) least = std::fmin(least, verdict.output_slack);
  }
  if (!first_wrong.empty()) tally->AddFailure(first_wrong);
  return least;
}

}  // namespace kvservice::adversary
