#include "client/kvctl/show.h"

#include <array>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/types/span.h"
#include "client/kvctl/text.h"

namespace kvservice::client {
namespace {

using Json = nlohmann::ordered_json;

// As many digits of a digest as tell two apart.
constexpr size_t kDigestDigits = 16;

// "DATA_TYPE_BFLOAT16" without its prefix and in lower case.
std::string EnumText(const std::string& name, size_t prefix_bytes) {
  if (name.size() <= prefix_bytes) return "unknown";
  std::string text = name.substr(prefix_bytes);
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

std::string ActionText(const v1::ExplainGroup& group) {
  return EnumText(v1::Action_Name(group.action()), sizeof("ACTION_") - 1);
}

std::string LevelText(const v1::ExplainGroup& group) {
  return EnumText(v1::Level_Name(group.level()), sizeof("LEVEL_") - 1);
}

std::string TypeText(const v1::Model& model) {
  return EnumText(v1::DataType_Name(model.cache_dtype()), sizeof("DATA_TYPE_") - 1);
}

std::string RotaryText(const v1::Model& model) {
  return EnumText(v1::RotaryStyle_Name(model.rotary_style()), sizeof("ROTARY_STYLE_") - 1);
}

// Proto maps have no order; output has.
template <typename Value, typename ProtoMap>
std::map<std::string, Value> Ordered(const ProtoMap& from) {
  return {from.begin(), from.end()};
}

constexpr std::array<const char*, 4> kLevelNames = {"none", "confidence", "deterministic", "exact"};
constexpr std::array<const char*, 5> kActionNames = {"selected", "reused", "grown", "dense",
                                                     "compensated"};

Json CountsToJson(absl::Span<const char* const> names,
                  const google::protobuf::RepeatedField<uint64_t>& counts) {
  Json json = Json::object();
  for (size_t i = 0; i < names.size(); ++i) {
    const auto index = static_cast<int>(i);
    json[names[i]] = index < counts.size() ? counts.Get(index) : 0;
  }
  return json;
}

Json TotalsToJson(const v1::AttendTotals& totals) {
  return {
      {"rows", totals.rows()},
      {"groups", totals.groups()},
      {"groups_scanned", totals.groups_scanned()},
      {"groups_dense", totals.groups_dense()},
      {"tokens_read", totals.tokens_read()},
      {"tokens_visible", totals.tokens_visible()},
      {"certificates", totals.certificates()},
      {"certificates_proven", totals.certificates_proven()},
      {"dropped_mass_upper_sum", totals.dropped_mass_upper_sum()},
      {"dropped_mass_upper_max", totals.dropped_mass_upper_max()},
      {"failure_probability_sum", totals.failure_probability_sum()},
      {"assumed_mutual_information_loss_nats", totals.assumed_mutual_information_loss_nats()},
      {"certificates_by_level", CountsToJson(kLevelNames, totals.certificates_by_level())},
      {"certificates_by_action", CountsToJson(kActionNames, totals.certificates_by_action())},
      {"dropped_mass_upper_bounds", std::vector<double>(totals.dropped_mass_upper_bounds().begin(),
                                                        totals.dropped_mass_upper_bounds().end())},
      {"dropped_mass_upper_counts",
       std::vector<uint64_t>(totals.dropped_mass_upper_counts().begin(),
                             totals.dropped_mass_upper_counts().end())},
      {"keys_sampled", totals.keys_sampled()},
      {"rows_sampled", totals.rows_sampled()},
      {"anchor_seed_scans", totals.anchor_seed_scans()}};
}

std::string CountsText(absl::Span<const char* const> names,
                       const google::protobuf::RepeatedField<uint64_t>& counts) {
  std::string text;
  for (size_t i = 0; i < names.size() && i < static_cast<size_t>(counts.size()); ++i) {
    const uint64_t count = counts.Get(static_cast<int>(i));
    if (count > 0) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + names[i];
  }
  return text.empty() ? "-" : text;
}

// The smallest of the classes' bounds under which the share of certificates lies.
std::string QuantileText(const v1::AttendTotals& totals, double share) {
  const auto& counts = totals.dropped_mass_upper_counts();
  const auto& bounds = totals.dropped_mass_upper_bounds();
  uint64_t all = 0;
  for (const uint64_t count : counts) all += count;
  if (all == 0 || counts.size() != bounds.size()) return "-";
  uint64_t below = 0;
  for (int i = 0; i < counts.size(); ++i) {
    below += counts.Get(i);
    if (static_cast<double>(below) >= share * static_cast<double>(all)) {
      return "at most " + UpperText(bounds.Get(i));
    }
  }
  return "-";
}

std::string LargestBound(const v1::AttendTotals& totals) {
  return totals.certificates_proven() == 0 ? "-" : UpperText(totals.dropped_mass_upper_max());
}

void AddTotals(const v1::AttendTotals& totals, std::vector<Row>* rows) {
  constexpr double kMedian = 0.5;
  constexpr double kHigh = 0.95;
  // A sum of zeros is exact; other means are rounded up.
  const double mean = totals.dropped_mass_upper_sum() <= 0.0
                          ? 0.0
                          : std::nextafter(totals.dropped_mass_upper_sum() /
                                               static_cast<double>(totals.certificates_proven()),
                                           2.0);
  rows->insert(
      rows->end(),
      {{"rows attended", std::to_string(totals.rows())},
       {"tokens read", ShareText(totals.tokens_read(), totals.tokens_visible()) + " of visible"},
       {"KV heads that scanned", ShareText(totals.groups_scanned(), totals.groups())},
       {"scans that seeded anchors", std::to_string(totals.anchor_seed_scans())},
       {"KV heads answered densely", ShareText(totals.groups_dense(), totals.groups())},
       {"certificates proven", ShareText(totals.certificates_proven(), totals.certificates())},
       {"certificates by level", CountsText(kLevelNames, totals.certificates_by_level())},
       {"certificates by action", CountsText(kActionNames, totals.certificates_by_action())},
       {"dropped mass, 50% of bounds", QuantileText(totals, kMedian)},
       {"dropped mass, 95% of bounds", QuantileText(totals, kHigh)},
       {"dropped mass, mean bound", totals.certificates_proven() == 0 ? "-" : UpperText(mean)},
       {"dropped mass, largest bound", LargestBound(totals)},
       {"failure probability, sum", UpperText(totals.failure_probability_sum())},
       {"tokens sampled", std::to_string(totals.keys_sampled()) + " keys, " +
                              std::to_string(totals.rows_sampled()) + " with values"}});
}

void AddAudit(const v1::AuditTotals& totals, std::vector<Row>* rows) {
  const bool any = totals.slack_count() > 0;
  rows->insert(rows->end(),
               {{"rows audited", std::to_string(totals.rows_audited())},
                {"rows waiting", std::to_string(totals.rows_waiting())},
                {"rows given up", std::to_string(totals.rows_cancelled()) + " changed, " +
                                      std::to_string(totals.rows_skipped()) + " without room"},
                {"certificates audited", std::to_string(totals.certificates_audited())},
                {"outputs audited", std::to_string(totals.outputs_audited())},
                {"violations", std::to_string(totals.violations())},
                {"misses", std::to_string(totals.misses()) + " of at most " +
                               UpperText(totals.expected_misses()) + " expected"},
                {"bound / truth, median", any ? "e^" + UpperText(totals.slack_median_nats()) : "-"},
                {"bound / truth, 95%", any ? "e^" + UpperText(totals.slack_p95_nats()) : "-"},
                {"bound / truth, largest", any ? "e^" + UpperText(totals.slack_max_nats()) : "-"}});
}

std::vector<Row> ModelRows(const v1::Model& model) {
  return {{"name", model.name()},
          {"layers", std::to_string(model.layer_count())},
          {"query heads", std::to_string(model.query_head_count())},
          {"KV heads", std::to_string(model.kv_head_count())},
          {"head dim", std::to_string(model.head_dim())},
          {"cache dtype", TypeText(model)},
          {"rotary style", RotaryText(model)}};
}

// "memory", "disk", or "suspended" for what stays on disk.
std::string TierText(const v1::Sequence& sequence) {
  if (sequence.suspended()) return "suspended";
  return sequence.tier() == v1::TIER_DISK ? "disk" : "memory";
}

std::string DamageText(const v1::StoreCheck& check) {
  return std::to_string(check.rows_damaged()) + " rows damaged, " +
         std::to_string(check.rows_mended()) + " mended";
}

void AddDisk(const v1::DiskStats& disk, std::vector<Row>* rows) {
  rows->push_back({"disk used", BytesText(disk.used_bytes()) + " of " +
                                    BytesText(disk.max_bytes()) + ", files " +
                                    BytesText(disk.file_bytes())});
  rows->push_back({"sequences on disk", std::to_string(disk.sequence_count())});
  rows->push_back({"sequences lost", std::to_string(disk.lost_sequence_count())});
  rows->push_back({"looks for damage", std::to_string(disk.check_count()) + ", " +
                                           BytesText(disk.checked().bytes_read()) + " read, " +
                                           DamageText(disk.checked())});
  if (disk.failed()) rows->push_back({"disk", "failed: nothing is written until a restart"});
}

}  // namespace

bool IsSound(const v1::AuditTotals& totals) {
  constexpr double kPlausible = 1e-3;
  if (totals.violations() > 0) return false;
  const auto misses = static_cast<double>(totals.misses());
  const double expected = totals.expected_misses();
  if (misses <= expected) return true;
  // P(X >= m) <= e^-l (e l / m)^m for a sum of independent events of mean l < m.
  if (expected <= 0.0) return false;
  return misses - expected + misses * std::log(expected / misses) >= std::log(kPlausible);
}

std::string FixedText(uint64_t value) {
  std::array<char, 17> text;
  std::snprintf(text.data(), text.size(), "%016" PRIx64, value);
  return text.data();
}

Json ToJson(const v1::GetServerInfoResponse& info) {
  return {{"version", info.version()},
          {"build", info.build()},
          {"device", info.device()},
          {"instruction_set", info.instruction_set()},
          {"libraries", Ordered<std::string>(info.libraries())},
          {"uptime_ms", info.uptime_ms()},
          {"epoch", FixedText(info.epoch())},
          {"limits", Ordered<uint64_t>(info.limits())},
          {"draining", info.draining()}};
}

Json ToJson(const v1::GetStatsResponse& stats) {
  return {{"pool_bytes", stats.pool_bytes()},
          {"pool_used_bytes", stats.pool_used_bytes()},
          {"host_pool_bytes", stats.host_pool_bytes()},
          {"host_pool_used_bytes", stats.host_pool_used_bytes()},
          {"block_count", stats.block_count()},
          {"sequence_count", stats.sequence_count()},
          {"model_count", stats.model_count()},
          {"queued_call_count", stats.queued_call_count()},
          {"calls_total", stats.calls_total()},
          {"calls_shed_total", stats.calls_shed_total()},
          {"leases_expired_total", stats.leases_expired_total()},
          {"totals", TotalsToJson(stats.totals())},
          {"audit", ToJson(stats.audit())},
          {"disk",
           {{"used_bytes", stats.disk().used_bytes()},
            {"max_bytes", stats.disk().max_bytes()},
            {"file_bytes", stats.disk().file_bytes()},
            {"sequence_count", stats.disk().sequence_count()},
            {"lost_sequence_count", stats.disk().lost_sequence_count()},
            {"failed", stats.disk().failed()},
            {"checked", ToJson(stats.disk().checked())},
            {"check_count", stats.disk().check_count()}}}};
}

Json ToJson(const v1::StoreCheck& check) {
  return {{"sequences_checked", check.sequences_checked()},
          {"sequences_skipped", check.sequences_skipped()},
          {"sequences_lost", check.sequences_lost()},
          {"slices_checked", check.slices_checked()},
          {"rows_damaged", check.rows_damaged()},
          {"rows_mended", check.rows_mended()},
          {"bytes_read", check.bytes_read()}};
}

Json ToJson(const v1::AuditTotals& totals) {
  return {{"rows_audited", totals.rows_audited()},
          {"rows_waiting", totals.rows_waiting()},
          {"rows_cancelled", totals.rows_cancelled()},
          {"rows_skipped", totals.rows_skipped()},
          {"certificates_audited", totals.certificates_audited()},
          {"outputs_audited", totals.outputs_audited()},
          {"violations", totals.violations()},
          {"misses", totals.misses()},
          {"expected_misses", totals.expected_misses()},
          {"slack_count", totals.slack_count()},
          {"slack_median_nats", totals.slack_median_nats()},
          {"slack_p95_nats", totals.slack_p95_nats()},
          {"slack_max_nats", totals.slack_max_nats()}};
}

Json ToJson(const v1::AuditResponse& audit) {
  Json json = {{"totals", ToJson(audit.totals())},
               {"kept_rows", audit.kept_rows()},
               {"keep_next_left", audit.keep_next_left()},
               {"call_numbers",
                std::vector<uint64_t>(audit.call_numbers().begin(), audit.call_numbers().end())},
               {"violations",
                std::vector<std::string>(audit.violations().begin(), audit.violations().end())}};
  if (audit.has_replayed()) {
    const auto& upper = audit.replayed().dropped_mass_upper();
    json["replay_equal"] = audit.replay_equal();
    json["replayed_dropped_mass_upper"] = std::vector<float>(upper.begin(), upper.end());
  }
  return json;
}

Json ToJson(const v1::ExplainResponse& explain) {
  Json steps = Json::array();
  for (const v1::ExplainStep& step : explain.steps()) {
    Json groups = Json::array();
    for (const v1::ExplainGroup& group : step.groups()) {
      groups.push_back({{"action", ActionText(group)},
                        {"tokens_read", group.tokens_read()},
                        {"tokens_scanned", group.tokens_scanned()},
                        {"keys_sampled", group.keys_sampled()},
                        {"rows_sampled", group.rows_sampled()},
                        {"bytes", group.bytes()},
                        {"dense_bytes", group.dense_bytes()},
                        {"level", LevelText(group)},
                        {"met", group.met()},
                        {"dropped_mass_upper", group.dropped_mass_upper()},
                        {"output_error_relative_upper", group.output_error_relative_upper()},
                        {"failure_probability", group.failure_probability()}});
    }
    steps.push_back({{"max_dropped_mass", step.max_dropped_mass()},
                     {"bytes", step.bytes()},
                     {"dense_bytes", step.dense_bytes()},
                     {"groups", std::move(groups)}});
  }
  return {{"position", explain.position()},
          {"query_count", explain.query_count()},
          {"steps", std::move(steps)}};
}

Json ToJson(const v1::Sequence& sequence) {
  return {{"id", HexOfId(sequence.handle().id())},
          {"generation", sequence.handle().generation()},
          {"tenant", sequence.tenant()},
          {"model", sequence.model()},
          {"length_tokens", sequence.length_tokens()},
          {"length_max_tokens", sequence.length_max_tokens()},
          {"block_count", sequence.block_count()},
          {"bytes", sequence.bytes()},
          {"lease_remaining_ms", sequence.lease_remaining_ms()},
          {"sketch_table_digest", HexOfId(sequence.sketch_table_digest())},
          {"tier", TierText(sequence)},
          {"durable_tokens", sequence.durable_tokens()},
          {"matched_tokens", sequence.matched_tokens()},
          {"matchable_tokens", sequence.matchable_tokens()},
          {"totals", TotalsToJson(sequence.totals())}};
}

Json ToJson(const v1::Model& model) {
  return {{"name", model.name()},
          {"layer_count", model.layer_count()},
          {"query_head_count", model.query_head_count()},
          {"kv_head_count", model.kv_head_count()},
          {"head_dim", model.head_dim()},
          {"cache_dtype", TypeText(model)},
          {"scale", model.scale()},
          {"logit_softcap", model.logit_softcap()},
          {"sliding_window_tokens", std::vector<uint32_t>(model.sliding_window_tokens().begin(),
                                                          model.sliding_window_tokens().end())},
          {"rotary_style", RotaryText(model)}};
}

std::string ToTable(const v1::GetServerInfoResponse& info) {
  const std::string& set = info.instruction_set();
  std::vector<Row> rows = {{"version", info.version()},
                           {"build", info.build()},
                           {"device", info.device() + (set.empty() ? "" : " (" + set + ")")},
                           {"uptime", DurationText(info.uptime_ms())},
                           {"epoch", FixedText(info.epoch())},
                           {"draining", info.draining() ? "yes" : "no"}};
  for (const auto& [name, version] : Ordered<std::string>(info.libraries())) {
    rows.push_back({name, version});
  }
  for (const auto& [name, value] : Ordered<uint64_t>(info.limits())) {
    rows.push_back({name, std::to_string(value)});
  }
  return Table(rows);
}

std::string ToTable(const v1::GetStatsResponse& stats) {
  std::vector<Row> rows = {
      {"pool used", BytesText(stats.pool_used_bytes()) + " of " + BytesText(stats.pool_bytes()) +
                        " (" + ShareText(stats.pool_used_bytes(), stats.pool_bytes()) + ")"},
      {"of the host's memory",
       BytesText(stats.host_pool_used_bytes()) + " of " + BytesText(stats.host_pool_bytes())},
      {"blocks", std::to_string(stats.block_count())},
      {"sequences", std::to_string(stats.sequence_count())},
      {"models", std::to_string(stats.model_count())},
      {"calls waiting", std::to_string(stats.queued_call_count())},
      {"calls", std::to_string(stats.calls_total())},
      {"calls refused", std::to_string(stats.calls_shed_total())},
      {"leases expired", std::to_string(stats.leases_expired_total())}};
  if (stats.disk().max_bytes() > 0) AddDisk(stats.disk(), &rows);
  AddTotals(stats.totals(), &rows);
  AddAudit(stats.audit(), &rows);
  return Table(rows);
}

std::string ToTable(const v1::StoreCheck& check) {
  return Table({{"sequences", std::to_string(check.sequences_checked())},
                {"passed by on their way", std::to_string(check.sequences_skipped())},
                {"lost", std::to_string(check.sequences_lost())},
                {"slices", std::to_string(check.slices_checked())},
                {"damage", DamageText(check)},
                {"read", BytesText(check.bytes_read())}});
}

std::string ToTable(const v1::AuditTotals& totals) {
  std::vector<Row> rows;
  AddAudit(totals, &rows);
  return Table(rows);
}

std::string ToTable(const v1::AuditResponse& audit) {
  std::vector<Row> rows = {{"rows kept", std::to_string(audit.kept_rows())},
                           {"rows to be kept", std::to_string(audit.keep_next_left())}};
  if (audit.has_replayed()) {
    rows.push_back({"replay", audit.replay_equal() ? "equal in every bit" : "DIFFERENT"});
  } else {
    AddAudit(audit.totals(), &rows);
  }
  std::string text = Table(rows);
  for (const std::string& line : audit.violations()) text += "VIOLATION " + line + "\n";
  return text;
}

std::string ToTable(const v1::ExplainResponse& explain) {
  std::vector<Row> rows = {
      {"LIMIT", "KV HEAD", "BYTES", "TOKENS", "SAMPLED", "DROPPED", "LEVEL", "ACTION"}};
  for (const v1::ExplainStep& step : explain.steps()) {
    rows.push_back(
        {ShortText(step.max_dropped_mass()), "all", ShareText(step.bytes(), step.dense_bytes())});
    for (int i = 0; i < step.groups_size(); ++i) {
      const v1::ExplainGroup& group = step.groups(i);
      rows.push_back({"", std::to_string(i), ShareText(group.bytes(), group.dense_bytes()),
                      std::to_string(group.tokens_read()),
                      std::to_string(group.keys_sampled() + group.rows_sampled()),
                      UpperText(static_cast<double>(group.dropped_mass_upper())), LevelText(group),
                      ActionText(group)});
    }
  }
  return Table(rows);
}

std::string ToTable(const v1::Sequence& sequence) {
  std::vector<Row> rows = {
      {"id", HexOfId(sequence.handle().id())},
      {"generation", std::to_string(sequence.handle().generation())},
      {"tenant", sequence.tenant()},
      {"model", sequence.model()},
      {"tokens", std::to_string(sequence.length_tokens())},
      {"tokens of the longest layer", std::to_string(sequence.length_max_tokens())},
      {"blocks", std::to_string(sequence.block_count())},
      {"memory", BytesText(sequence.bytes())},
      {"tier", TierText(sequence)},
      {"tokens on disk", std::to_string(sequence.durable_tokens())},
      {"tokens matched at creation", std::to_string(sequence.matched_tokens())},
      {"tokens to match", std::to_string(sequence.matchable_tokens())},
      {"lease left", DurationText(sequence.lease_remaining_ms())},
      {"sketch tables", HexOfId(sequence.sketch_table_digest()).substr(0, kDigestDigits)}};
  AddTotals(sequence.totals(), &rows);
  return Table(rows);
}

std::string ToTable(const v1::GetModelResponse& model) {
  std::vector<Row> rows = ModelRows(model.model());
  rows.push_back({"fingerprint", FixedText(model.fingerprint())});
  return Table(rows);
}

std::string ToTable(const std::vector<v1::Sequence>& sequences) {
  std::vector<Row> rows = {
      {"ID", "TENANT", "MODEL", "TOKENS", "TIER", "MEMORY", "LEASE", "READ", "DROPPED MAX"}};
  for (const v1::Sequence& sequence : sequences) {
    const v1::AttendTotals& totals = sequence.totals();
    rows.push_back({HexOfId(sequence.handle().id()), sequence.tenant(), sequence.model(),
                    std::to_string(sequence.length_tokens()), TierText(sequence),
                    BytesText(sequence.bytes()), DurationText(sequence.lease_remaining_ms()),
                    ShareText(totals.tokens_read(), totals.tokens_visible()),
                    LargestBound(totals)});
  }
  return Table(rows);
}

std::string ToTable(const std::vector<v1::Model>& models) {
  std::vector<Row> rows = {{"NAME", "LAYERS", "QUERY HEADS", "KV HEADS", "HEAD DIM", "CACHE"}};
  for (const v1::Model& model : models) {
    rows.push_back({model.name(), std::to_string(model.layer_count()),
                    std::to_string(model.query_head_count()), std::to_string(model.kv_head_count()),
                    std::to_string(model.head_dim()), TypeText(model)});
  }
  return Table(rows);
}

}  // namespace kvservice::client
