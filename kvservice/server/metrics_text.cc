#include "kvservice/server/metrics_text.h"

#include <dirent.h>
#include <malloc.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>
#include <sys/resource.h>
#include <unistd.h>

#include <array>
#include <fstream>
#include <map>
#include <sstream>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kvservice/server/build_info.h"

namespace kvservice {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

constexpr double kNsPerSecond = 1e9;
constexpr double kUsPerSecond = 1e6;

// In the order of Level (and Guarantee), Action, SelectorKind, EvictionCause and DType.
constexpr std::array<const char*, kLevelCount> kLevels = {"none", "confidence", "deterministic",
                                                          "exact"};
constexpr std::array<const char*, kActionCount> kActions = {"selected", "reused", "grown", "dense",
                                                            "compensated"};
constexpr std::array<const char*, 9> kSelectors = {"auto", "dense", "given",     "cis", "psaw",
                                                   "etf",  "cpe",   "certified", "scan"};
constexpr std::array<const char*, kEvictionCauseCount> kEvictionCauses = {"pool_full", "tenant_max",
                                                                          "idle"};
constexpr std::array<const char*, 3> kDTypes = {"float32", "float16", "bfloat16"};
constexpr std::array<const char*, 8> kModelLabels = {"layers",    "query_heads",     "kv_heads",
                                                     "head_dim",  "dtype",           "selector",
                                                     "guarantee", "max_dropped_mass"};

// Families in the making.
class Families {
 public:
  void Gauge(const char* name, const char* help, double value, Labels labels = {}) {
    ClientMetric metric;
    metric.label = std::move(labels);
    metric.gauge.value = value;
    Of(name, help, MetricType::Gauge)->metric.push_back(std::move(metric));
  }
  template <typename Number>
  void Counter(const char* name, const char* help, Number value, Labels labels = {}) {
    ClientMetric metric;
    metric.label = std::move(labels);
    metric.counter.value = static_cast<double>(value);
    Of(name, help, MetricType::Counter)->metric.push_back(std::move(metric));
  }
  void Histogram(const char* name, const char* help, ClientMetric::Histogram histogram,
                 Labels labels = {}) {
    ClientMetric metric;
    metric.label = std::move(labels);
    metric.histogram = std::move(histogram);
    Of(name, help, MetricType::Histogram)->metric.push_back(std::move(metric));
  }

  MetricFamilies Take() { return std::move(families_); }

 private:
  // Metrics of one family come one after the other.
  MetricFamily* Of(const char* name, const char* help, MetricType type) {
    if (families_.empty() || families_.back().name != name) {
      families_.push_back({.name = name, .help = help, .type = type, .metric = {}});
    }
    return &families_.back();
  }
  MetricFamilies families_;
};

ClientMetric::Histogram TimesOf(const TimeHistogram::Counts& counts) {
  ClientMetric::Histogram histogram;
  for (size_t i = 0; i < TimeHistogram::kBoundsNs.size(); ++i) {
    histogram.sample_count += counts.counts[i];
    histogram.bucket.push_back(
        {.cumulative_count = histogram.sample_count,
         .upper_bound = static_cast<double>(TimeHistogram::kBoundsNs[i]) / kNsPerSecond});
  }
  histogram.sample_count += counts.counts.back();
  histogram.sample_sum = static_cast<double>(counts.sum_ns) / kNsPerSecond;
  return histogram;
}

ClientMetric::Histogram MassesOf(const MassCounts& counts) {
  ClientMetric::Histogram histogram;
  for (size_t i = 0; i < kDroppedMassBounds.size(); ++i) {
    histogram.sample_count += counts.counts[i];
    histogram.bucket.push_back(
        {.cumulative_count = histogram.sample_count, .upper_bound = kDroppedMassBounds[i]});
  }
  histogram.sample_sum = counts.sum;
  return histogram;
}

void AddServer(const MetricsSource& source, Families* families) {
  const std::string device(source.engine->device_name());
  families->Gauge("kvservice_build_info", "1; the labels tell what runs.", 1.0,
                  {{"version", Version()},
                   {"build", BuildDescription()},
                   {"device", device},
                   {"instruction_set", InstructionSet(device)}});
  families->Gauge("kvservice_uptime_seconds", "Time since the server started.",
                  static_cast<double>(source.uptime_ns) / kNsPerSecond);
  families->Gauge("kvservice_draining", "1 once a drain has begun.", source.draining ? 1.0 : 0.0);
  const InFlight::Load load = source.data_in_flight->load();
  families->Gauge("kvservice_requests_in_flight", "Calls of the data side that are being served.",
                  static_cast<double>(load.calls));
  families->Gauge("kvservice_request_bytes_in_flight", "Bytes of their requests.",
                  static_cast<double>(load.bytes));
  families->Gauge("kvservice_request_bytes_max", "Where further requests are refused.",
                  static_cast<double>(load.bytes_max));
}

void AddCalls(const MetricsSource& source, Families* families) {
  const std::array<std::pair<const char*, const CallMetrics*>, 2> sides = {
      std::pair{"data", source.data_calls}, std::pair{"admin", source.admin_calls}};
  for (const auto& [side, calls] : sides) {
    for (const CallMetrics::Method& method : calls->Methods()) {
      for (size_t code = 0; code < method.by_code.size(); ++code) {
        if (method.by_code[code] == 0) continue;
        families->Counter(
            "kvservice_rpc_calls_total", "Calls that have ended, by their status.",
            method.by_code[code],
            {{"side", side},
             {"method", std::string(method.name)},
             {"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))}});
      }
    }
  }
  for (const auto& [side, calls] : sides) {
    for (const CallMetrics::Method& method : calls->Methods()) {
      families->Histogram("kvservice_rpc_duration_seconds", "From arrival to answer.",
                          TimesOf(method.time),
                          {{"side", side}, {"method", std::string(method.name)}});
    }
  }
  families->Histogram("kvservice_attend_queue_seconds",
                      "What an answered Attend waited for the engine.",
                      TimesOf(source.data_calls->queue_time()));
  families->Histogram("kvservice_attend_service_seconds",
                      "From the engine's start on an Attend to its answer.",
                      TimesOf(source.data_calls->service_time()));
}

void AddScrub(const ScrubStats& scrub, Families* families) {
  families->Counter("kvservice_scrub_passes_total", "Looks through the disk tier for damage.",
                    scrub.passes);
  families->Counter("kvservice_scrub_bytes_total", "Bytes that they have read.",
                    scrub.report.bytes_read);
  families->Counter("kvservice_scrub_slices_total", "Stored slices that they have checked.",
                    scrub.report.slices_checked);
  families->Counter("kvservice_scrub_rows_damaged_total", "Rows that were damaged or gone.",
                    scrub.report.rows_damaged);
  families->Counter("kvservice_scrub_rows_mended_total",
                    "How many of them were written again from memory.", scrub.report.rows_mended);
}

void AddEngine(const MetricsSource& source, const EngineStats& stats, Families* families) {
  const auto gauge = [families](const char* name, const char* help, auto value) {
    families->Gauge(name, help, static_cast<double>(value));
  };
  gauge("kvservice_pool_bytes", "Memory for keys, values and sketches, the host's included.",
        stats.pool_bytes);
  gauge("kvservice_pool_used_bytes", "What of it blocks occupy.", stats.pool_bytes_used);
  gauge("kvservice_host_pool_bytes", "The host's part, for keys and values.",
        stats.host_pool_bytes);
  gauge("kvservice_host_pool_used_bytes", "What of the host's part blocks occupy.",
        stats.host_pool_bytes_used);
  constexpr char kMovedHelp[] = "Blocks whose keys and values were moved to the host or back.";
  families->Counter("kvservice_blocks_moved_total", kMovedHelp, stats.blocks_to_host_total,
                    {{"to", "host"}});
  families->Counter("kvservice_blocks_moved_total", kMovedHelp, stats.blocks_to_device_total,
                    {{"to", "device"}});
  gauge("kvservice_pool_reserved_bytes", "What of it tenants have reserved.",
        stats.pool_bytes_reserved);
  gauge("kvservice_pool_held_bytes", "What is free and kept for them.", stats.pool_bytes_held);
  for (size_t i = 0; i < kEvictionCauses.size(); ++i) {
    families->Counter(
        "kvservice_evictions_total",
        "Sequences moved to disk: because the pool was full, because their tenant was "
        "at its maximum, because nobody used them and the pool was nearly full.",
        stats.evictions[i], {{"cause", kEvictionCauses[i]}});
  }
  gauge("kvservice_blocks_used", "Blocks in the pool.", stats.blocks_used);
  gauge("kvservice_sequences", "Sequences, wherever they are.", stats.sequences);
  gauge("kvservice_sequences_max", "Where further ones are refused.", source.sequences_max);
  gauge("kvservice_tenants", "Tenants that have sequences.", stats.tenants);
  gauge("kvservice_models", "Registered models.", stats.models);
  gauge("kvservice_queue_calls", "Calls that wait for the engine.", stats.queue_calls);
  gauge("kvservice_queue_calls_max", "Where further ones are shed.", source.queue_calls_max);
  families->Counter("kvservice_engine_calls_total", "Calls that came to the engine.",
                    stats.calls_total);
  families->Counter("kvservice_engine_calls_shed_total",
                    "Calls that were refused because its queue was full.", stats.calls_shed_total);
  families->Counter("kvservice_leases_expired_total", "Sequences that nobody used for their lease.",
                    stats.leases_expired_total);
  families->Counter("kvservice_prefix_requested_tokens_total",
                    "Token ids that sequences were created with.",
                    stats.prefix_requested_tokens_total);
  families->Counter("kvservice_prefix_matched_tokens_total",
                    "What of them was there already, of the same tenant.",
                    stats.prefix_matched_tokens_total);
  gauge("kvservice_prefix_declared_tokens",
        "Tokens of prompts that may be matched, or will be when they are there.",
        stats.prefix_declared_tokens);
  gauge("kvservice_disk_used_bytes", "Rows of sequences on disk.", stats.disk_bytes_used);
  gauge("kvservice_disk_max_bytes", "What they may take; 0 without a disk tier.",
        stats.disk_bytes_max);
  gauge("kvservice_disk_file_bytes", "Files of the disk tier, dead rows included.",
        stats.disk_file_bytes);
  gauge("kvservice_disk_sequences", "Sequences on disk and not in memory.",
        stats.sequences_on_disk);
  gauge("kvservice_disk_lost_sequences", "Sequences that the disk lost or damaged.",
        stats.sequences_lost);
  gauge("kvservice_disk_failed", "1 once a write has failed: nothing is written any more.",
        stats.disk_is_healthy ? 0 : 1);
  AddScrub(stats.scrub, families);
}

// Models of one shape are one series.
void AddModels(const std::vector<ModelShape>& shapes, Families* families) {
  std::map<std::vector<std::string>, uint32_t> counts;
  for (const ModelShape& shape : shapes) {
    ++counts[{std::to_string(shape.layer_count), std::to_string(shape.layout.query_head_count),
              std::to_string(shape.layout.kv_head_count), std::to_string(shape.layout.head_dim),
              kDTypes[static_cast<size_t>(shape.layout.dtype)],
              kSelectors[static_cast<size_t>(shape.selector)],
              kLevels[static_cast<size_t>(shape.guarantee)], absl::StrCat(shape.max_dropped_mass)}];
  }
  for (const auto& [values, count] : counts) {
    Labels labels;
    for (size_t i = 0; i < kModelLabels.size(); ++i) labels.push_back({kModelLabels[i], values[i]});
    families->Gauge("kvservice_model_shapes",
                    "Registered models, by their shape and the policy they stand for.", count,
                    std::move(labels));
  }
}

void AddAttention(const AttendStats& stats, Families* families) {
  const auto counter = [families](const char* name, const char* help, auto value) {
    families->Counter(name, help, value);
  };
  counter("kvservice_attend_rows_total", "Rows (a sequence and layer of a call) attended.",
          stats.attend_rows);
  counter("kvservice_attend_groups_total", "KV heads of those rows.", stats.groups);
  counter("kvservice_attend_groups_scanned_total", "KV heads that scanned sketches to choose.",
          stats.groups_scanned);
  counter("kvservice_attend_groups_dense_total", "KV heads that read every token.",
          stats.groups_dense);
  counter("kvservice_attend_tokens_read_total", "Tokens read, per KV head.", stats.tokens_read);
  counter("kvservice_attend_tokens_visible_total", "What dense attention would have read.",
          stats.tokens_visible);
  counter("kvservice_attend_keys_sampled_total", "Tokens whose keys were sampled.",
          stats.keys_sampled);
  counter("kvservice_attend_rows_sampled_total", "Tokens whose keys and values were sampled.",
          stats.rows_sampled);
  counter("kvservice_anchor_seed_scans_total", "Scans that made anchors of prompt queries.",
          stats.anchor_seed_scans);
  for (size_t i = 0; i < kLevels.size(); ++i) {
    families->Counter("kvservice_certificates_total",
                      "Certificates (query token and head), by level.", stats.by_level[i],
                      {{"level", kLevels[i]}});
  }
  for (size_t i = 0; i < kActions.size(); ++i) {
    families->Counter("kvservice_certificates_by_action_total",
                      "Certificates, by how their KV head was answered.", stats.by_action[i],
                      {{"action", kActions[i]}});
  }
  counter("kvservice_certificates_failure_probability_total",
          "Sum of failure probabilities: at most so many certificates are expected to be wrong.",
          stats.failure_probability_sum);
}

void AddMasses(const std::vector<LayerMasses>& masses, Families* families) {
  const auto add = [&](const char* name, const char* help, const MassCounts LayerMasses::*which) {
    for (const LayerMasses& one : masses) {
      ClientMetric::Histogram histogram = MassesOf(one.*which);
      if (histogram.sample_count == 0) continue;
      families->Histogram(name, help, std::move(histogram),
                          {{"selector", kSelectors[static_cast<size_t>(one.selector)]},
                           {"layer", std::to_string(one.layer)}});
    }
  };
  add("kvservice_dropped_mass_certified",
      "Upper bounds of the share of attention that was not attended; 1 says nothing.",
      &LayerMasses::certified);
  add("kvservice_dropped_mass_audited", "The same shares in truth, of audited rows.",
      &LayerMasses::audited);
}

void AddAudits(const AuditStats& stats, Families* families) {
  const auto rows = [families](const char* outcome, uint64_t count) {
    families->Counter("kvservice_audit_rows_total",
                      "Rows chosen for an audit: computed again, given up because their sequence "
                      "changed, not kept for want of room.",
                      count, {{"outcome", outcome}});
  };
  rows("audited", stats.rows_audited);
  rows("cancelled", stats.rows_cancelled);
  rows("skipped", stats.rows_skipped);
  families->Gauge("kvservice_audit_rows_waiting", "Rows kept and not audited yet.",
                  static_cast<double>(stats.rows_waiting));
  families->Counter("kvservice_audit_certificates_total", "Certificates compared with the truth.",
                    stats.certificates);
  families->Counter("kvservice_audit_violations_total",
                    "Certificates without failure probability that were wrong. Anything but 0 is "
                    "a defect of the service.",
                    stats.violations);
  families->Counter("kvservice_audit_misses_total",
                    "Certificates with a failure probability that were wrong.", stats.misses);
  families->Counter("kvservice_audit_expected_misses_total",
                    "How many of them may be expected: the sum of the failure probabilities.",
                    stats.expected_misses);
  families->Counter("kvservice_audit_slack_count_total", "Bounds of something that was dropped.",
                    stats.slack_count);
  const std::array<std::pair<const char*, double>, 3> slack = {
      std::pair{"0.5", stats.slack_median_nats}, std::pair{"0.95", stats.slack_p95_nats},
      std::pair{"1", stats.slack_max_nats}};
  for (const auto& [share, nats] : slack) {
    families->Gauge("kvservice_audit_slack_nats",
                    "So many bounds are at most this: ln(bound / truth) of the dropped mass.", nats,
                    {{"share", share}});
  }
}

size_t OpenDescriptors() {
  DIR* const folder = opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  size_t count = 0;
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  // "." and ".." and the one that was opened to look.
  return count < 3 ? 0 : count - 3;
}

// Pools are mapped by the devices, not allocated; only the reference device allocates its own.
void AddHeap(Families* families) {
  const struct mallinfo2 heap = mallinfo2();
  families->Gauge("kvservice_heap_bytes",
                  "Memory that the process has allocated and not freed, pools not counted.",
                  static_cast<double>(heap.uordblks + heap.hblkhd));
}

// Under the names that all Prometheus clients use.
void AddProcess(Families* families) {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    const auto seconds = [](const timeval& time) {
      return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / kUsPerSecond;
    };
    families->Counter("process_cpu_seconds_total", "CPU time of the process.",
                      seconds(usage.ru_utime) + seconds(usage.ru_stime));
  }
  uint64_t pages_virtual = 0;
  uint64_t pages_resident = 0;
  std::ifstream("/proc/self/statm") >> pages_virtual >> pages_resident;
  const auto page_bytes = static_cast<double>(sysconf(_SC_PAGESIZE));
  families->Gauge("process_resident_memory_bytes", "Memory that the process occupies.",
                  static_cast<double>(pages_resident) * page_bytes);
  families->Gauge("process_open_fds", "Open descriptors.", static_cast<double>(OpenDescriptors()));
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    families->Gauge("process_max_fds", "How many there may be.",
                    static_cast<double>(limit.rlim_cur));
  }
}

}  // namespace

MetricFamilies MetricsOf(const MetricsSource& source) {
  const EngineStats stats = source.engine->Stats();
  Families families;
  AddServer(source, &families);
  AddCalls(source, &families);
  AddEngine(source, stats, &families);
  AddModels(stats.model_shapes, &families);
  AddAttention(stats.attend, &families);
  AddMasses(source.engine->masses().Read(), &families);
  AddAudits(stats.audit, &families);
  AddHeap(&families);
  AddProcess(&families);
  return families.Take();
}

std::string MetricsText(const MetricFamilies& families) {
  std::ostringstream text;
  prometheus::TextSerializer().Serialize(text, families);
  return text.str();
}

}  // namespace kvservice
