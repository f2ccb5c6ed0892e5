#include "client/kvctl/show.h"

#include <array>
#include <cinttypes>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "client/kvctl/text.h"

namespace kvservice::client {
namespace {

using Json = nlohmann::ordered_json;

// "DATA_TYPE_BFLOAT16" without its prefix and in lower case.
std::string EnumText(const std::string& name, size_t prefix_bytes) {
  if (name.size() <= prefix_bytes) return "unknown";
  std::string text = name.substr(prefix_bytes);
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
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

Json TotalsToJson(const v1::AttendTotals& totals) {
  return {{"rows", totals.rows()},
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
          {"assumed_mutual_information_loss_nats", totals.assumed_mutual_information_loss_nats()}};
}

std::string LargestBound(const v1::AttendTotals& totals) {
  return totals.certificates_proven() == 0 ? "-" : UpperText(totals.dropped_mass_upper_max());
}

void AddTotals(const v1::AttendTotals& totals, std::vector<Row>* rows) {
  const double mean =
      totals.certificates_proven() == 0
          ? 0.0
          : totals.dropped_mass_upper_sum() / static_cast<double>(totals.certificates_proven());
  rows->insert(
      rows->end(),
      {{"rows attended", std::to_string(totals.rows())},
       {"tokens read", ShareText(totals.tokens_read(), totals.tokens_visible()) + " of visible"},
       {"KV heads that scanned", ShareText(totals.groups_scanned(), totals.groups())},
       {"KV heads answered densely", ShareText(totals.groups_dense(), totals.groups())},
       {"certificates proven", ShareText(totals.certificates_proven(), totals.certificates())},
       {"dropped mass, mean bound", totals.certificates_proven() == 0 ? "-" : UpperText(mean)},
       {"dropped mass, largest bound", LargestBound(totals)},
       {"failure probability, sum", UpperText(totals.failure_probability_sum())}});
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

}  // namespace

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
          {"block_count", stats.block_count()},
          {"sequence_count", stats.sequence_count()},
          {"model_count", stats.model_count()},
          {"queued_call_count", stats.queued_call_count()},
          {"calls_total", stats.calls_total()},
          {"calls_shed_total", stats.calls_shed_total()},
          {"leases_expired_total", stats.leases_expired_total()},
          {"totals", TotalsToJson(stats.totals())}};
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
      {"blocks", std::to_string(stats.block_count())},
      {"sequences", std::to_string(stats.sequence_count())},
      {"models", std::to_string(stats.model_count())},
      {"calls waiting", std::to_string(stats.queued_call_count())},
      {"calls", std::to_string(stats.calls_total())},
      {"calls refused", std::to_string(stats.calls_shed_total())},
      {"leases expired", std::to_string(stats.leases_expired_total())}};
  AddTotals(stats.totals(), &rows);
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
      {"lease left", DurationText(sequence.lease_remaining_ms())}};
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
      {"ID", "TENANT", "MODEL", "TOKENS", "MEMORY", "LEASE", "READ", "DROPPED MAX"}};
  for (const v1::Sequence& sequence : sequences) {
    const v1::AttendTotals& totals = sequence.totals();
    rows.push_back({HexOfId(sequence.handle().id()), sequence.tenant(), sequence.model(),
                    std::to_string(sequence.length_tokens()), BytesText(sequence.bytes()),
                    DurationText(sequence.lease_remaining_ms()),
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
