#include "client/kvctl/commands.h"

#include <array>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/kvctl/outcome.h"
#include "client/kvctl/show_block.h"
#include "client/kvctl/text.h"

namespace kvservice::client {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kUnixPrefix = "unix:";
constexpr char kSocketName[] = "/kvservice.sock";
constexpr char kAdminSuffix[] = ".admin";

// EPOCH:SECRET:CALL:ROW, the first two in hexadecimal.
bool ParseReplay(const std::string& text, v1::Replay* replay) {
  std::array<std::string, 4> parts;
  size_t begin = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const size_t end = i + 1 < parts.size() ? text.find(':', begin) : text.size();
    if (end == std::string::npos) return false;
    parts[i] = text.substr(begin, end - begin);
    begin = end + 1;
  }
  const std::optional<std::string> epoch = IdOfHex(parts[0]);
  const std::optional<uint64_t> secret = ParseNumber(parts[1], 16);
  const std::optional<uint64_t> call = ParseNumber(parts[2], 10);
  const std::optional<uint64_t> row = ParseNumber(parts[3], 10);
  if (!epoch || !secret || !call || !row || *row > UINT32_MAX) return false;
  replay->set_epoch(*epoch);
  replay->set_draw_secret_id(*secret);
  replay->set_call_number(*call);
  replay->set_row(static_cast<uint32_t>(*row));
  return true;
}

}  // namespace

std::string DefaultEndpoint() {
  const char* const runtime = std::getenv("XDG_RUNTIME_DIR");
  const std::string folder = runtime != nullptr && *runtime == '/'
                                 ? std::string(runtime) + "/kvservice"
                                 : "/tmp/kvservice-" + std::to_string(getuid());
  return std::string(kUnixPrefix) + folder + kSocketName;
}

std::string DefaultAdminEndpoint(const std::string& endpoint) {
  const bool is_unix = endpoint.substr(0, kUnixPrefix.size()) == kUnixPrefix;
  return (is_unix ? endpoint : DefaultEndpoint()) + kAdminSuffix;
}

int CheckHealth(const GlobalOptions& options, const std::string& service) {
  const absl::StatusOr<Health> health = Connect(options)->CheckHealth(service);
  if (!health.ok()) return Fail(options, health.status());
  const bool serving = *health == Health::kServing;
  const std::string text = serving ? "serving" : "not_serving";
  Print(options, {{"service", service}, {"status", text}}, text + "\n");
  return serving ? kExitOk : kExitUnhealthy;
}

int ShowVersion(const GlobalOptions& options) {
  Print(options, {{"version", KVSERVICE_VERSION}, {"build_type", KVSERVICE_BUILD_TYPE}},
        "kvctl " KVSERVICE_VERSION " (" KVSERVICE_BUILD_TYPE ")\n");
  return kExitOk;
}

int ShowServerInfo(const GlobalOptions& options) {
  return Show(options, Connect(options)->GetServerInfo());
}

int ShowServerStats(const GlobalOptions& options) {
  return Show(options, Connect(options)->GetStats());
}

int VerifyStore(const GlobalOptions& options) {
  const absl::StatusOr<v1::VerifyStoreResponse> response = Connect(options)->VerifyStore();
  if (!response.ok()) return Fail(options, response.status());
  Print(options, ToJson(response->found()), ToTable(response->found()));
  return response->found().rows_damaged() == 0 ? kExitOk : kExitUnhealthy;
}

int DrainServer(const GlobalOptions& options, std::chrono::milliseconds grace, bool yes) {
  const std::optional<int> refused =
      Refused(options, yes, "this ends the server at " + options.admin_endpoint, "drain");
  if (refused.has_value()) return *refused;
  const absl::Status status = Connect(options)->Drain(static_cast<uint32_t>(grace.count()));
  if (!status.ok()) return Fail(options, status);
  Print(options, {{"draining", true}}, "draining\n");
  return kExitOk;
}

int ListSequences(const GlobalOptions& options, const SequenceListOptions& list) {
  bool more = false;
  const absl::StatusOr<std::vector<v1::Sequence>> sequences =
      Connect(options)->ListSequences(list.tenant, list.limit, &more);
  if (!sequences.ok()) return Fail(options, sequences.status());
  Json json = ArrayOf("sequences", *sequences);
  json["more"] = more;
  Print(options, json, ToTable(*sequences));
  if (more && !options.quiet) {
    std::cerr << "kvctl: there are more than " << list.limit << "; see --limit" << std::endl;
  }
  return kExitOk;
}

int ShowSequence(const GlobalOptions& options, const std::string& hex_id) {
  const std::optional<std::string> id = IdOfHex(hex_id);
  if (!id.has_value()) return MalformedId(options, hex_id);
  return Show(options, Connect(options)->DescribeSequence(*id));
}

int DropSequence(const GlobalOptions& options, const SequenceDropOptions& drop) {
  const std::optional<std::string> id = IdOfHex(drop.hex_id);
  if (!id.has_value()) return MalformedId(options, drop.hex_id);
  const std::optional<int> refused =
      Refused(options, drop.yes, "this drops the sequence " + drop.hex_id, drop.hex_id);
  if (refused.has_value()) return *refused;
  v1::EvictRequest request;
  request.set_id(*id);
  if (drop.expected_generation) request.set_expected_generation(*drop.expected_generation);
  const absl::StatusOr<v1::EvictResponse> response = Connect(options)->Evict(request);
  if (!response.ok()) return Fail(options, response.status());
  const uint64_t freed = response->freed_bytes();
  Print(options, {{"id", drop.hex_id}, {"freed_bytes", freed}},
        "dropped " + drop.hex_id + ", " + BytesText(freed) + " freed\n");
  return kExitOk;
}

int ForkSequence(const GlobalOptions& options, const SequenceForkOptions& fork) {
  const std::optional<std::string> id = IdOfHex(fork.hex_id);
  if (!id.has_value()) return MalformedId(options, fork.hex_id);
  v1::ForkRequest request;
  if (fork.length_tokens.has_value()) request.set_length_tokens(*fork.length_tokens);
  request.set_lease_ms(static_cast<uint32_t>(fork.lease.count()));
  return Show(options, Connect(options)->Fork(*id, request));
}

int ListBlocks(const GlobalOptions& options, const BlockOptions& block) {
  const std::optional<std::string> id = IdOfHex(block.hex_id);
  if (!id.has_value()) return MalformedId(options, block.hex_id);
  const std::unique_ptr<ServerCalls> calls = Connect(options);
  const absl::StatusOr<v1::Sequence> sequence = calls->DescribeSequence(*id);
  if (!sequence.ok()) return Fail(options, sequence.status());
  std::vector<v1::DescribeBlockResponse> blocks;
  bool more = false;
  v1::DescribeBlockRequest request;
  request.set_sequence_id(*id);
  if (block.layer.has_value()) request.set_layer(*block.layer);
  for (uint32_t index = block.index; index < sequence->block_count() && !more; ++index) {
    more = blocks.size() == block.limit;
    if (more) break;
    request.set_block_index(index);
    absl::StatusOr<v1::DescribeBlockResponse> described = calls->DescribeBlock(request);
    // The sequence may have been cut, and a layer may be shorter than others.
    if (described.status().code() == absl::StatusCode::kOutOfRange) break;
    if (!described.ok()) return Fail(options, described.status());
    blocks.push_back(*std::move(described));
  }
  Json json = ArrayOf("blocks", blocks);
  json["more"] = more;
  Print(options, json, ToTable(blocks, block.layer.has_value()));
  if (more && !options.quiet) {
    std::cerr << "kvctl: there are more than " << block.limit << "; see --limit and --first"
              << std::endl;
  }
  return kExitOk;
}

int ShowBlock(const GlobalOptions& options, const BlockOptions& block) {
  const std::optional<std::string> id = IdOfHex(block.hex_id);
  if (!id.has_value()) return MalformedId(options, block.hex_id);
  v1::DescribeBlockRequest request;
  request.set_sequence_id(*id);
  request.set_block_index(block.index);
  if (block.layer.has_value()) request.set_layer(*block.layer);
  return Show(options, Connect(options)->DescribeBlock(request));
}

int SuspendSequence(const GlobalOptions& options, const std::string& hex_id) {
  const std::optional<std::string> id = IdOfHex(hex_id);
  if (!id.has_value()) return MalformedId(options, hex_id);
  return Show(options, Connect(options)->Suspend(*id));
}

int ResumeSequence(const GlobalOptions& options, const std::string& hex_id) {
  const std::optional<std::string> id = IdOfHex(hex_id);
  if (!id.has_value()) return MalformedId(options, hex_id);
  return Show(options, Connect(options)->Resume(*id));
}

int TransferSequence(const GlobalOptions& options, const TransferOptions& transfer) {
  const std::optional<std::string> id = IdOfHex(transfer.hex_id);
  if (!id.has_value()) return MalformedId(options, transfer.hex_id);
  v1::TransferRequest request;
  request.mutable_handle()->set_id(*id);
  request.set_target_endpoint(transfer.target_endpoint);
  request.set_move(transfer.move);
  const absl::StatusOr<v1::TransferResponse> response = Connect(options)->Transfer(request);
  if (!response.ok()) return Fail(options, response.status());
  const std::string there = HexOfId(response->handle().id());
  Print(options,
        {{"id", there},
         {"generation", response->handle().generation()},
         {"sent_bytes", response->sent_bytes()},
         {"moved", response->moved()}},
        "there it is " + there + " at generation " +
            std::to_string(response->handle().generation()) + ", " +
            BytesText(response->sent_bytes()) + " sent" +
            (response->moved() ? ", dropped here\n" : "\n"));
  return kExitOk;
}

namespace {

int ShowAuditTotals(const GlobalOptions& options) {
  const absl::StatusOr<v1::GetStatsResponse> stats = Connect(options)->GetStats();
  if (!stats.ok()) return Fail(options, stats.status());
  Print(options, ToJson(stats->audit()), ToTable(stats->audit()));
  return IsSound(stats->audit()) ? kExitOk : kExitViolation;
}

}  // namespace

int AuditCalls(const GlobalOptions& options, const AuditOptions& audit) {
  if (audit.hex_id.empty()) {
    if (audit.replay.empty() && audit.keep_next == 0) return ShowAuditTotals(options);
    return Usage(options, "--replay and --keep-next need the id of a sequence");
  }
  const std::optional<std::string> id = IdOfHex(audit.hex_id);
  if (!id.has_value()) return MalformedId(options, audit.hex_id);
  v1::AuditRequest request;
  request.mutable_handle()->set_id(*id);
  request.set_keep_next(audit.keep_next);
  if (audit.replay.empty()) {
    request.set_call_count(audit.call_count);
  } else if (!ParseReplay(audit.replay, request.mutable_replay())) {
    return Usage(options, "'" + audit.replay + "' is not like EPOCH:SECRET:CALL:ROW");
  }
  const absl::StatusOr<v1::AuditResponse> response = Connect(options)->Audit(request);
  if (!response.ok()) return Fail(options, response.status());
  Print(options, ToJson(*response), ToTable(*response));
  const bool differs = response->has_replayed() && !response->replay_equal();
  return IsSound(response->totals()) && !differs ? kExitOk : kExitViolation;
}

int ExplainSequence(const GlobalOptions& options, const ExplainOptions& explain) {
  const std::optional<std::string> id = IdOfHex(explain.hex_id);
  if (!id.has_value()) return MalformedId(options, explain.hex_id);
  v1::ExplainRequest request;
  request.set_id(*id);
  request.set_layer(explain.layer);
  request.mutable_max_dropped_mass()->Add(explain.limits.begin(), explain.limits.end());
  return Show(options, Connect(options)->Explain(request));
}

int ListModels(const GlobalOptions& options) {
  const absl::StatusOr<std::vector<v1::Model>> models = Connect(options)->ListModels();
  if (!models.ok()) return Fail(options, models.status());
  Print(options, ArrayOf("models", *models), ToTable(*models));
  return kExitOk;
}

int ShowModel(const GlobalOptions& options, const std::string& name) {
  const absl::StatusOr<v1::GetModelResponse> model = Connect(options)->GetModel(name);
  if (!model.ok()) return Fail(options, model.status());
  Json json = ToJson(model->model());
  json["fingerprint"] = FixedText(model->fingerprint());
  Print(options, json, ToTable(*model));
  return kExitOk;
}

}  // namespace kvservice::client
