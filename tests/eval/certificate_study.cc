#include "tests/eval/certificate_study.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/sketch.h"
#include "tests/eval/truth.h"

namespace kvservice::eval {
namespace {

constexpr uint32_t kLocalWindow = 64;
// Failure probability of a statement where costs are measured: the service's default.
constexpr double kCostEta = 1e-9;
// A limit that no bound meets: sampling goes on to the last draw.
constexpr float kNoBoundMeets = 1e-30F;

// Which query heads share a call: all heads of each KV head, or one head of each.
struct Heads {
  KvLayout layout;
  uint32_t first = 0;  // Of the query heads of each KV head.

  uint32_t group_size() const { return layout.group_size(); }
};

// One call with room for its answers.
struct Call {
  AttendRow row;
  std::vector<float> q, out, lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
  std::vector<std::vector<uint32_t>> selected;
};

std::string LimitName(const char* kind, double value) {
  return absl::StrFormat("%s %g", kind, value);
}

class LayerStudy {
 public:
  LayerStudy(const StudyOptions& options, const TraceHeader& header, size_t layer_index,
             Device* device)
      : options_(options), header_(header), layer_index_(layer_index), device_(device) {}

  absl::Status Run(const TraceHeader& other, const std::vector<uint32_t>& queries,
                   TraceResult* result) {
    auto layer = ReadTraceLayer(header_, layer_index_);
    if (!layer.ok()) return layer.status();
    auto other_layer = ReadTraceLayer(other, layer_index_);
    if (!other_layer.ok()) return other_layer.status();
    const std::vector<SketchTable> learnt = LearnTables(other, *other_layer);
    const std::vector<SketchTable> identity(header_.layout.kv_head_count,
                                            IdentitySketchTable(header_.layout.head_dim));
    auto cached = CachedLayer::Make(device_, header_, *layer, identity);
    if (!cached.ok()) return cached.status();
    cached_ = &*cached;
    layer_ = &*layer;
    result_ = result;
    absl::Status status;
    if (options_.tightness) status = ForQueries(queries, [&] { return Tightness("identity"); });
    if (!status.ok()) return status;
    cached_->Reseal(learnt);
    return ForQueries(queries, [&] {
      absl::Status at_query;
      if (options_.tightness) at_query = Tightness("learnt");
      if (at_query.ok() && options_.costs) at_query = Costs();
      return at_query;
    });
  }

 private:
  template <typename Function>
  absl::Status ForQueries(const std::vector<uint32_t>& queries, Function function) {
    for (const uint32_t query : queries) {
      query_ = query;
      length_ = header_.judged[query] + 1;
      truths_.clear();
      for (uint32_t head = 0; head < header_.layout.query_head_count; ++head) {
        truths_.emplace_back(header_, *cached_, head / header_.layout.group_size(), Query(head),
                             length_);
      }
      if (const absl::Status status = function(); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

  const float* Query(uint32_t head) const {
    return &layer_->judged[(size_t{query_} * header_.layout.query_head_count + head) *
                           header_.layout.head_dim];
  }

  // The model's query head that is `head` of a call.
  uint32_t ModelHead(const Heads& heads, uint32_t head) const {
    return head / heads.group_size() * header_.layout.group_size() + heads.first +
           head % heads.group_size();
  }

  Plan BasePlan() const {
    Plan plan;
    plan.source = Source::kScan;
    plan.local_begin = length_ > kLocalWindow ? length_ - kLocalWindow : 0;
    return plan;
  }

  absl::StatusOr<Call> Attend(const Heads& heads, const Plan& plan) {
    const KvLayout& layout = heads.layout;
    Call call;
    call.out.resize(size_t{layout.query_head_count} * layout.head_dim);
    call.lse.resize(layout.query_head_count);
    call.certificates.resize(layout.query_head_count);
    call.groups.resize(layout.kv_head_count);
    call.selected.resize(layout.kv_head_count);
    for (uint32_t head = 0; head < layout.query_head_count; ++head) {
      const float* query = Query(ModelHead(heads, head));
      call.q.insert(call.q.end(), query, query + layout.head_dim);
    }
    AttendRow& row = call.row;
    row.view = cached_->View(length_);
    row.position = length_ - 1;
    row.q = call.q.data();
    row.plan = plan;
    row.tables = cached_->tables();
    // Never the same for two calls of a study, and the same in every study.
    const std::array<uint64_t, 3> number = {header_.layers[layer_index_], query_, ++call_number_};
    static_assert(sizeof(number) <= kDrawKeyBytes);
    std::memcpy(row.draw_key.data(), number.data(), sizeof(number));
    row.out = call.out.data();
    row.lse = call.lse.data();
    row.certificates = call.certificates.data();
    row.groups = call.groups.data();
    row.selected = call.selected.data();
    LayerShape shape;
    shape.layout = layout;
    shape.scale = header_.scale;
    device_->Attend(shape, {&row, 1});
    if (!row.status.ok()) return row.status;
    Judge(heads, call);
    return call;
  }

  void Judge(const Heads& heads, const Call& call) {
    for (uint32_t head = 0; head < heads.layout.query_head_count; ++head) {
      const HeadCertificate& certificate = call.certificates[head];
      const uint32_t wrong = truths_[ModelHead(heads, head)].CountWrong(
          certificate, call.selected[head / heads.group_size()],
          &call.out[size_t{head} * heads.layout.head_dim]);
      ++result_->certificates;
      const bool sampled = certificate.failure_probability > 0.0;
      result_->sampled_certificates += sampled ? 1 : 0;
      (sampled ? result_->wrong_sampled : result_->wrong) += wrong;
    }
  }

  absl::Status Tightness(const std::string& tables) {
    for (const bool sampled : {false, true}) {
      Plan plan = BasePlan();
      plan.keep.top_k = static_cast<uint32_t>(std::ceil(kTightnessShare * length_));
      plan.prove = sampled ? Guarantee::kConfidence : Guarantee::kDeterministic;
      plan.max_dropped_mass = kNoBoundMeets;
      plan.failure_probability = kTightnessEta;
      plan.draws_max = kTightnessDraws;
      const std::string name =
          absl::StrCat("slack|", tables, sampled ? "|sampled|" : "|deterministic|");
      const absl::Status status = ForHeads([&](const Heads& heads, const std::string& heads_name) {
        return TightnessOf(name + heads_name, heads, plan);
      });
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status TightnessOf(const std::string& name, const Heads& heads, const Plan& plan) {
    const auto call = Attend(heads, plan);
    if (!call.ok()) return call.status();
    for (uint32_t head = 0; head < heads.layout.query_head_count; ++head) {
      const HeadCertificate& certificate = call->certificates[head];
      const HeadTruth& truth = truths_[ModelHead(heads, head)];
      const long double log_dropped = truth.LogDropped(call->selected[head / heads.group_size()]);
      const long double log_share = log_dropped - truth.log_total();
      if (!(std::exp(log_share) >= kTightnessLeastShare)) continue;
      const long double bound = certificate.dropped_mass_upper.value;
      result_->series[name + "|mass"].push_back(
          static_cast<double>(certificate.log_dropped_upper.value - log_dropped));
      result_->series[name + "|share"].push_back(static_cast<double>(std::log(bound) - log_share));
    }
    return absl::OkStatus();
  }

  // All query heads of each KV head together, then one of each at a time.
  template <typename Function>
  absl::Status ForHeads(Function function) {
    absl::Status status = function(Heads{.layout = header_.layout}, "group");
    Heads alone{.layout = header_.layout};
    alone.layout.query_head_count = alone.layout.kv_head_count;
    for (; status.ok() && alone.first < header_.layout.group_size(); ++alone.first) {
      status = function(alone, "alone");
    }
    return status;
  }

  absl::Status Costs() {
    for (const double limit : kMassLimits) {
      Plan plan = BasePlan();
      plan.max_dropped_mass = static_cast<float>(limit);
      if (const absl::Status status = Cost(LimitName("mass", limit), plan); !status.ok()) {
        return status;
      }
      Oracle(limit);
    }
    for (const double limit : kOutputLimits) {
      Plan plan = BasePlan();
      plan.max_output_error = static_cast<float>(limit);
      if (const absl::Status status = Cost(LimitName("output", limit), plan); !status.ok()) {
        return status;
      }
    }
    return absl::OkStatus();
  }

  absl::Status Cost(const std::string& limit, Plan plan) {
    plan.prove = Guarantee::kConfidence;
    plan.failure_probability = kCostEta;
    plan.on_violation = OnViolation::kGrow;
    if (plan.max_dropped_mass < 1.0F) plan.keep.mass_limit = plan.max_dropped_mass;
    if (std::isfinite(plan.max_output_error)) plan.keep.output_limit = plan.max_output_error;
    return ForHeads([&](const Heads& heads, const std::string& heads_name) {
      return CostOf(absl::StrCat(limit, "|", heads_name), heads, plan);
    });
  }

  absl::Status CostOf(const std::string& name, const Heads& heads, const Plan& plan) {
    const auto call = Attend(heads, plan);
    if (!call.ok()) return call.status();
    const KvLayout& layout = heads.layout;
    const double row_bytes = layout.row_bytes();
    const double sketch_bytes =
        static_cast<double>(SketchLayout(layout.head_dim).page_bytes) / kBlockTokens;
    for (const GroupReport& group : call->groups) {
      const double bytes = group.tokens_scanned * sketch_bytes +
                           (group.tokens_read + group.rows_sampled) * row_bytes +
                           group.keys_sampled * row_bytes / 2;
      result_->series["bytes|" + name].push_back(bytes / (length_ * row_bytes));
      result_->series["read|" + name].push_back(static_cast<double>(group.tokens_read) / length_);
      result_->series["samples|" + name].push_back((group.rows_sampled + group.keys_sampled / 2.0) /
                                                   length_);
      result_->series["dense|" + name].push_back(group.action == Action::kDense ? 1.0 : 0.0);
      result_->series["sampled|" + name].push_back(
          group.keys_sampled + group.rows_sampled > 0 ? 1.0 : 0.0);
    }
    for (const HeadCertificate& certificate : call->certificates) {
      result_->series["met|" + name].push_back(certificate.met ? 1.0 : 0.0);
    }
    return absl::OkStatus();
  }

  // The smallest prefix, in the order of the largest share that a head of the group gives a token,
  // for which no head's dropped share exceeds the limit.
  void Oracle(double limit) {
    const KvLayout& layout = header_.layout;
    for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
      const HeadTruth* first = &truths_[size_t{kv_head} * layout.group_size()];
      OracleOf({first, layout.group_size()}, limit, "group");
      for (uint32_t g = 0; g < layout.group_size(); ++g) OracleOf({first + g, 1}, limit, "alone");
    }
  }

  void OracleOf(absl::Span<const HeadTruth> group, double limit, const char* heads) {
    std::vector<double> largest(length_);
    for (const HeadTruth& truth : group) {
      for (uint32_t token = 0; token < length_; ++token) {
        largest[token] =
            std::max(largest[token], static_cast<double>(truth.weights()[token] / truth.total()));
      }
    }
    std::vector<uint32_t> order(length_);
    std::iota(order.begin(), order.end(), 0U);
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return largest[a] < largest[b]; });
    uint32_t kept = 0;
    for (const HeadTruth& truth : group) {
      double dropped = 0.0;
      uint32_t count = 0;
      for (; count < length_; ++count) {
        dropped += static_cast<double>(truth.weights()[order[count]] / truth.total());
        if (dropped > limit) break;
      }
      kept = std::max(kept, length_ - count);
    }
    result_->series[absl::StrCat("oracle|", LimitName("mass", limit), "|", heads)].push_back(
        static_cast<double>(kept) / length_);
  }

  const StudyOptions& options_;
  const TraceHeader& header_;
  const size_t layer_index_;
  Device* device_;
  const TraceLayer* layer_ = nullptr;
  CachedLayer* cached_ = nullptr;
  TraceResult* result_ = nullptr;
  uint32_t query_ = 0;
  uint32_t length_ = 0;
  uint64_t call_number_ = 0;
  std::vector<HeadTruth> truths_;  // [query_head_count] of the current query
};

std::vector<uint32_t> ChooseQueries(const StudyOptions& options, const TraceHeader& trace) {
  const auto available = static_cast<uint32_t>(trace.judged.size());
  const uint32_t count =
      options.query_count == 0 ? available : std::min(options.query_count, available);
  std::vector<uint32_t> queries;
  for (uint32_t i = 0; i < count; ++i) {
    queries.push_back(static_cast<uint32_t>(uint64_t{i} * available / count));
  }
  return queries;
}

void AppendResult(const TraceResult& from, TraceResult* to) {
  to->certificates += from.certificates;
  to->sampled_certificates += from.sampled_certificates;
  to->wrong += from.wrong;
  to->wrong_sampled += from.wrong_sampled;
  for (const auto& [name, numbers] : from.series) {
    std::vector<double>& all = to->series[name];
    all.insert(all.end(), numbers.begin(), numbers.end());
  }
}

}  // namespace

absl::StatusOr<TraceResult> StudyTrace(const StudyOptions& options, const TraceHeader& trace,
                                       const TraceHeader& other) {
  if (!(trace.layout == other.layout) || trace.layers != other.layers) {
    return absl::InvalidArgumentError(
        absl::StrCat(other.name, " is not a trace of the model of ", trace.name));
  }
  const std::vector<uint32_t> queries = ChooseQueries(options, trace);
  std::vector<TraceResult> results(trace.layers.size());
  std::vector<absl::Status> statuses(trace.layers.size());
  std::atomic<size_t> next{0};
  const auto work = [&] {
    auto device = NewDevice(options.device, {.thread_count = 1});
    for (size_t i = next++; i < trace.layers.size(); i = next++) {
      statuses[i] =
          device.ok()
              ? LayerStudy(options, trace, i, device->get()).Run(other, queries, &results[i])
              : device.status();
    }
  };
  std::vector<std::thread> threads;
  for (uint32_t i = 1; i < options.thread_count; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  TraceResult result;
  result.header = trace;
  result.tables_from = other.name;
  result.query_count = static_cast<uint32_t>(queries.size());
  for (size_t i = 0; i < results.size(); ++i) {
    if (!statuses[i].ok()) return statuses[i];
    AppendResult(results[i], &result);
  }
  return result;
}

}  // namespace kvservice::eval
