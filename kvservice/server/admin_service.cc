#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/engine_errors.h"
#include "kvservice/error.h"
#include "kvservice/server/build_info.h"
#include "kvservice/server/convert.h"
#include "kvservice/server/endpoint.h"
#include "kvservice/server/paging.h"
#include "kvservice/server/service.h"
#include "kvservice/v1/admin.grpc.pb.h"

namespace kvservice {
namespace {

using Declared = v1::AdminService;
using NotServed = Declared::WithGenericMethod_WatchEvents<Declared::Service>;
using Rpc = Declared::WithRawMethod_GetServerInfo<Declared::WithRawMethod_GetStats<
    Declared::WithRawMethod_ListSequences<Declared::WithRawMethod_DescribeSequence<
        Declared::WithRawMethod_DescribeBlock<Declared::WithRawMethod_Explain<
            Declared::WithRawMethod_Evict<Declared::WithRawMethod_SetQuota<
                Declared::WithRawMethod_ListTenants<Declared::WithRawMethod_VerifyStore<
                    Declared::WithRawMethod_Drain<NotServed>>>>>>>>>>>;

using GetServerInfoCall = UnaryCall<v1::GetServerInfoRequest, v1::GetServerInfoResponse>;
using GetStatsCall = UnaryCall<v1::GetStatsRequest, v1::GetStatsResponse>;
using ListSequencesCall = UnaryCall<v1::ListSequencesRequest, v1::ListSequencesResponse>;
using DescribeSequenceCall = UnaryCall<v1::DescribeSequenceRequest, v1::DescribeSequenceResponse>;
using DescribeBlockCall = UnaryCall<v1::DescribeBlockRequest, v1::DescribeBlockResponse>;
using ExplainCall = UnaryCall<v1::ExplainRequest, v1::ExplainResponse>;
using EvictCall = UnaryCall<v1::EvictRequest, v1::EvictResponse>;
using SetQuotaCall = UnaryCall<v1::SetQuotaRequest, v1::SetQuotaResponse>;
using ListTenantsCall = UnaryCall<v1::ListTenantsRequest, v1::ListTenantsResponse>;
using VerifyStoreCall = UnaryCall<v1::VerifyStoreRequest, v1::VerifyStoreResponse>;
using DrainCall = UnaryCall<v1::DrainRequest, v1::DrainResponse>;

// Every tenant's sequences.
constexpr std::string_view kAllTenants;

constexpr char kHexDigits[] = "0123456789abcdef";

std::string HexOfId(const SequenceId& id) {
  std::string hex;
  for (const std::byte byte : id.bytes) {
    const auto value = std::to_integer<unsigned>(byte);
    hex += kHexDigits[value >> 4];
    hex += kHexDigits[value & 15U];
  }
  return hex;
}

// For the access log: what is no id is nothing to write down.
std::string HexOf(const std::string& id_bytes) {
  const absl::StatusOr<SequenceId> id = IdFromProto(id_bytes, "id");
  return id.ok() ? HexOfId(*id) : "";
}

std::optional<SequenceId> IdOfHex(std::string_view hex) {
  SequenceId id;
  if (hex.size() != 2 * id.bytes.size()) return std::nullopt;
  for (size_t i = 0; i < hex.size(); ++i) {
    const size_t digit = std::string_view(kHexDigits).find(hex[i]);
    if (digit == std::string_view::npos) return std::nullopt;
    id.bytes[i / 2] = id.bytes[i / 2] << 4 | static_cast<std::byte>(digit);
  }
  return id;
}

// The greatest id that is less (as bytes compare); nothing before the first.
std::optional<SequenceId> Predecessor(SequenceId id) {
  for (size_t i = id.bytes.size(); i-- > 0;) {
    const bool borrow = id.bytes[i] == std::byte{0};
    id.bytes[i] = static_cast<std::byte>(std::to_integer<unsigned>(id.bytes[i]) - 1U);
    if (!borrow) return id;
  }
  return std::nullopt;
}

void OwnedSequenceToProto(const SequenceInfo& info, v1::Sequence* sequence) {
  SequenceToProto(info, sequence);
  sequence->set_tenant(info.tenant);
}

void CheckToProto(const StoreReport& from, v1::StoreCheck* to) {
  to->set_sequences_checked(from.sequences_checked);
  to->set_sequences_skipped(from.sequences_skipped);
  to->set_sequences_lost(from.sequences_lost);
  to->set_slices_checked(from.slices_checked);
  to->set_rows_damaged(from.rows_damaged);
  to->set_rows_mended(from.rows_mended);
  to->set_bytes_read(from.bytes_read);
}

void BlockToProto(const BlockReport& report, v1::DescribeBlockResponse* response) {
  bool sealed = true;
  bool on_disk = true;
  for (const BlockSlice& from : report.slices) {
    v1::DescribedSlice* const to = response->add_slices();
    to->set_layer(from.layer);
    to->set_token_count(from.token_count);
    to->set_on_disk(from.is_on_disk);
    to->set_checksum(from.checksum.data(), from.checksum.size());
    to->set_key_norm_max(from.key.max);
    to->set_key_norm_mean(from.key.mean);
    to->set_value_norm_max(from.value.max);
    to->set_value_norm_mean(from.value.mean);
    for (const double mass : from.attention_mass) {
      to->add_attention_mass(static_cast<float>(mass));
    }
    sealed = sealed && from.token_count == kBlockTokens;
    on_disk = on_disk && from.is_on_disk;
  }
  response->add_tiers(report.is_on_host ? "host" : "memory");
  if (on_disk) response->add_tiers("disk");
  response->set_sealed(sealed);
  response->set_first_token(report.first_token);
  response->set_shared(report.is_shared);
  response->set_bytes(report.bytes);
}

TenantQuota QuotaFromProto(const v1::TenantQuota& from) {
  TenantQuota quota{.pool_bytes_reserved = from.pool_bytes_reserved()};
  if (from.has_pool_bytes_max()) quota.pool_bytes_max = from.pool_bytes_max();
  if (from.has_disk_bytes_max()) quota.disk_bytes_max = from.disk_bytes_max();
  return quota;
}

void UsageToProto(const TenantUsage& from, v1::TenantUsage* to) {
  to->set_tenant(from.tenant);
  to->set_sequence_count(from.sequence_count);
  to->set_pool_used_bytes(from.pool_bytes_used);
  to->set_block_count(from.block_count);
  to->set_disk_used_bytes(from.disk_bytes_used);
  v1::TenantQuota* const quota = to->mutable_quota();
  quota->set_pool_bytes_reserved(from.quota.pool_bytes_reserved);
  if (from.quota.pool_bytes_max) quota->set_pool_bytes_max(*from.quota.pool_bytes_max);
  if (from.quota.disk_bytes_max) quota->set_disk_bytes_max(*from.quota.disk_bytes_max);
  to->set_temporary(from.is_temporary);
}

absl::Status CheckTenant(const std::string& tenant) {
  if (IsTenantName(tenant)) return absl::OkStatus();
  return InvalidField("tenant", "TENANT_INVALID",
                      "tenant must be 1 to 64 characters of [A-Za-z0-9_.-]");
}

class AdminService final : public RpcService {
 public:
  AdminService(const ServiceHost& host, AdminFacts facts)
      : host_(host),
        facts_(std::move(facts)),
        get_server_info_(
            Bind("GetServerInfo", &Rpc::RequestGetServerInfo, &AdminService::GetServerInfo)),
        get_stats_(Bind("GetStats", &Rpc::RequestGetStats, &AdminService::GetStats)),
        list_sequences_(
            Bind("ListSequences", &Rpc::RequestListSequences, &AdminService::ListSequences)),
        describe_sequence_(Bind("DescribeSequence", &Rpc::RequestDescribeSequence,
                                &AdminService::DescribeSequence)),
        describe_block_(
            Bind("DescribeBlock", &Rpc::RequestDescribeBlock, &AdminService::DescribeBlock)),
        explain_(Bind("Explain", &Rpc::RequestExplain, &AdminService::Explain)),
        evict_(Bind("Evict", &Rpc::RequestEvict, &AdminService::Evict)),
        set_quota_(Bind("SetQuota", &Rpc::RequestSetQuota, &AdminService::SetQuota)),
        list_tenants_(Bind("ListTenants", &Rpc::RequestListTenants, &AdminService::ListTenants)),
        verify_store_(Bind("VerifyStore", &Rpc::RequestVerifyStore, &AdminService::VerifyStore)),
        drain_(Bind("Drain", &Rpc::RequestDrain, &AdminService::Drain)) {}

  grpc::Service* grpc_service() override { return &rpc_; }
  void Listen(grpc::ServerCompletionQueue* queue) override {
    get_server_info_.Listen(&get_server_info_, queue);
    get_stats_.Listen(&get_stats_, queue);
    list_sequences_.Listen(&list_sequences_, queue);
    describe_sequence_.Listen(&describe_sequence_, queue);
    describe_block_.Listen(&describe_block_, queue);
    explain_.Listen(&explain_, queue);
    evict_.Listen(&evict_, queue);
    set_quota_.Listen(&set_quota_, queue);
    list_tenants_.Listen(&list_tenants_, queue);
    verify_store_.Listen(&verify_store_, queue);
    drain_.Listen(&drain_, queue);
  }

 private:
  template <typename Request, typename Response, typename Base>
  UnaryMethod<Request, Response> Bind(
      const char* name,
      void (Base::*request)(grpc::ServerContext*, grpc::ByteBuffer*,
                            grpc::ServerAsyncResponseWriter<grpc::ByteBuffer>*,
                            grpc::CompletionQueue*, grpc::ServerCompletionQueue*, void*),
      void (AdminService::*handle)(std::unique_ptr<UnaryCall<Request, Response>>)) {
    return BindMethod(std::string("kvservice.v1.AdminService.") + name, &host_.calls, &rpc_,
                      request, this, handle);
  }

  void GetServerInfo(std::unique_ptr<GetServerInfoCall> call) {
    v1::GetServerInfoResponse* const response = call->response();
    response->set_version(Version());
    response->set_build(BuildDescription());
    response->set_device(std::string(host_.engine->device_name()));
    response->set_instruction_set(InstructionSet(response->device()));
    for (const auto& [name, version] : LibraryVersions()) {
      (*response->mutable_libraries())[name] = version;
    }
    response->set_uptime_ms((host_.calls.clock->SteadyNowNs() - facts_.started_ns) / 1'000'000);
    response->set_epoch(facts_.epoch);
    for (const auto& [name, value] : facts_.limits) (*response->mutable_limits())[name] = value;
    response->set_draining(facts_.draining());
    GetServerInfoCall::Reply(std::move(call), absl::OkStatus());
  }

  void GetStats(std::unique_ptr<GetStatsCall> call) {
    const EngineStats stats = host_.engine->Stats();
    v1::GetStatsResponse* const response = call->response();
    response->set_pool_bytes(stats.pool_bytes);
    response->set_pool_used_bytes(stats.pool_bytes_used);
    response->set_host_pool_bytes(stats.host_pool_bytes);
    response->set_host_pool_used_bytes(stats.host_pool_bytes_used);
    response->set_block_count(stats.blocks_used);
    response->set_sequence_count(stats.sequences);
    response->set_model_count(stats.models);
    response->set_queued_call_count(stats.queue_calls);
    response->set_calls_total(stats.calls_total);
    response->set_calls_shed_total(stats.calls_shed_total);
    response->set_leases_expired_total(stats.leases_expired_total);
    TotalsToProto(stats.attend, facts_.sequence_tokens_max, response->mutable_totals());
    AuditTotalsToProto(stats.audit, response->mutable_audit());
    v1::DiskStats* const disk = response->mutable_disk();
    disk->set_used_bytes(stats.disk_bytes_used);
    disk->set_max_bytes(stats.disk_bytes_max);
    disk->set_file_bytes(stats.disk_file_bytes);
    disk->set_sequence_count(stats.sequences_on_disk);
    disk->set_lost_sequence_count(stats.sequences_lost);
    disk->set_failed(!stats.disk_is_healthy);
    CheckToProto(stats.scrub.report, disk->mutable_checked());
    disk->set_check_count(stats.scrub.passes);
    GetStatsCall::Reply(std::move(call), absl::OkStatus());
  }

  // Pages are ordered by id; the token is the last id of the page before, in hexadecimal.
  void ListSequences(std::unique_ptr<ListSequencesCall> call) {
    const absl::StatusOr<uint32_t> limit = PageSize(call->request().page_size());
    if (!limit.ok()) return ListSequencesCall::Reply(std::move(call), limit.status());
    SequenceId after;
    if (!call->request().page_token().empty()) {
      const std::optional<SequenceId> last = IdOfHex(call->request().page_token());
      if (!last.has_value()) {
        return ListSequencesCall::Reply(
            std::move(call), InvalidField("page_token", "PAGE_TOKEN_INVALID",
                                          "page_token was not returned by an earlier page"));
      }
      after = *last;
    }
    const std::string tenant = call->request().tenant();
    // One more than the page holds tells whether another page follows.
    host_.engine->List(tenant, after, *limit + 1,
                       [call = std::move(call), limit = *limit](
                           const absl::StatusOr<std::vector<SequenceInfo>>& infos) mutable {
                         if (infos.ok()) FillPage(*infos, limit, call->response());
                         ListSequencesCall::Reply(std::move(call), infos.status());
                       });
  }

  static void FillPage(const std::vector<SequenceInfo>& infos, size_t limit,
                       v1::ListSequencesResponse* response) {
    const size_t count = std::min(infos.size(), limit);
    for (size_t i = 0; i < count; ++i) OwnedSequenceToProto(infos[i], response->add_sequences());
    if (count < infos.size()) response->set_next_page_token(HexOfId(infos[count - 1].id));
  }

  // Finds a sequence of any tenant: it is the first one after its predecessor. Errors name `field`.
  void Find(const std::string& id_bytes, const char* field, Done<SequenceInfo> done) {
    const absl::StatusOr<SequenceId> id = IdFromProto(id_bytes, field);
    if (!id.ok()) return done(id.status());
    const std::optional<SequenceId> before = Predecessor(*id);
    if (!before.has_value()) return done(SequenceNotFound());
    host_.engine->List(kAllTenants, *before, 1,
                       [id = *id, done = std::move(done)](
                           const absl::StatusOr<std::vector<SequenceInfo>>& infos) mutable {
                         if (!infos.ok()) return done(infos.status());
                         const bool found = !infos->empty() && infos->front().id == id;
                         if (!found) return done(SequenceNotFound());
                         done(infos->front());
                       });
  }

  void DescribeSequence(std::unique_ptr<DescribeSequenceCall> call) {
    const std::string id = call->request().id();
    call->set_subject(HexOf(id));
    Find(id, "id", [call = std::move(call)](const absl::StatusOr<SequenceInfo>& info) mutable {
      if (info.ok()) OwnedSequenceToProto(*info, call->response()->mutable_sequence());
      DescribeSequenceCall::Reply(std::move(call), info.status());
    });
  }

  void DescribeBlock(std::unique_ptr<DescribeBlockCall> call) {
    const std::string id = call->request().sequence_id();
    auto found = [this, call = std::move(call)](const absl::StatusOr<SequenceInfo>& info) mutable {
      if (!info.ok()) return DescribeBlockCall::Reply(std::move(call), info.status());
      const v1::DescribeBlockRequest& request = call->request();
      BlockAsk ask{.block = request.block_index()};
      if (request.has_layer()) ask.layer = request.layer();
      host_.engine->DescribeBlock(
          info->tenant, info->id, ask,
          [call = std::move(call)](const absl::StatusOr<BlockReport>& report) mutable {
            if (report.ok()) BlockToProto(*report, call->response());
            DescribeBlockCall::Reply(std::move(call), report.status());
          });
    };
    Find(id, "sequence_id", std::move(found));
  }

  void Explain(std::unique_ptr<ExplainCall> call) {
    const std::string id = call->request().id();
    call->set_subject(HexOf(id));
    Find(id, "id",
         [this, call = std::move(call)](const absl::StatusOr<SequenceInfo>& info) mutable {
           if (!info.ok()) return ExplainCall::Reply(std::move(call), info.status());
           absl::StatusOr<ExplainAsk> ask = ExplainFromProto(call->request());
           if (!ask.ok()) return ExplainCall::Reply(std::move(call), ask.status());
           host_.engine->Explain(
               info->tenant, info->id, *std::move(ask),
               [call = std::move(call)](const absl::StatusOr<ExplainReport>& report) mutable {
                 if (report.ok()) ExplainToProto(*report, call->response());
                 ExplainCall::Reply(std::move(call), report.status());
               });
         });
  }

  // Two engine calls: the first finds the owner. In between the generation may change; what is
  // dropped then is still the sequence of that id.
  void Evict(std::unique_ptr<EvictCall> call) {
    const std::string id = call->request().id();
    call->set_subject(HexOf(id));
    Find(id, "id",
         [this, call = std::move(call)](const absl::StatusOr<SequenceInfo>& info) mutable {
           if (!info.ok()) return EvictCall::Reply(std::move(call), info.status());
           const v1::EvictRequest& request = call->request();
           if (request.has_expected_generation() &&
               request.expected_generation() != info->generation) {
             const absl::Status mismatch = GenerationMismatch(
                 "expected_generation", request.expected_generation(), info->generation);
             return EvictCall::Reply(std::move(call), mismatch);
           }
           host_.engine->Drop(
               info->tenant, info->id,
               [call = std::move(call)](const absl::StatusOr<SequenceInfo>& dropped) mutable {
                 if (dropped.ok()) call->response()->set_freed_bytes(dropped->bytes);
                 EvictCall::Reply(std::move(call), dropped.status());
               });
         });
  }

  void SetQuota(std::unique_ptr<SetQuotaCall> call) {
    const v1::SetQuotaRequest& request = call->request();
    const absl::Status named = CheckTenant(request.tenant());
    if (!named.ok()) return SetQuotaCall::Reply(std::move(call), named);
    call->set_subject(request.tenant());
    std::optional<TenantQuota> quota;
    if (request.has_quota()) quota = QuotaFromProto(request.quota());
    const std::string tenant = request.tenant();
    host_.engine->SetQuota(
        tenant, quota, [call = std::move(call)](const absl::StatusOr<TenantUsage>& usage) mutable {
          if (usage.ok()) UsageToProto(*usage, call->response()->mutable_usage());
          SetQuotaCall::Reply(std::move(call), usage.status());
        });
  }

  // Pages are ordered by name; the token is the last name of the page before.
  void ListTenants(std::unique_ptr<ListTenantsCall> call) {
    const v1::ListTenantsRequest& request = call->request();
    const absl::StatusOr<uint32_t> limit = PageSize(request.page_size());
    if (!limit.ok()) return ListTenantsCall::Reply(std::move(call), limit.status());
    const std::string only = request.tenant();
    const absl::Status named = only.empty() ? absl::OkStatus() : CheckTenant(only);
    if (!named.ok()) return ListTenantsCall::Reply(std::move(call), named);
    const std::string after = request.page_token();
    // One more than the page holds tells whether another page follows.
    host_.engine->ListTenants(
        only, after, *limit + 1,
        [call = std::move(call),
         limit = *limit](const absl::StatusOr<std::vector<TenantUsage>>& usages) mutable {
          if (!usages.ok()) return ListTenantsCall::Reply(std::move(call), usages.status());
          const size_t count = std::min<size_t>(usages->size(), limit);
          for (size_t i = 0; i < count; ++i) {
            UsageToProto((*usages)[i], call->response()->add_tenants());
          }
          if (count < usages->size()) {
            call->response()->set_next_page_token((*usages)[count - 1].tenant);
          }
          ListTenantsCall::Reply(std::move(call), absl::OkStatus());
        });
  }

  void VerifyStore(std::unique_ptr<VerifyStoreCall> call) {
    host_.engine->VerifyStore(
        [call = std::move(call)](const absl::StatusOr<StoreReport>& report) mutable {
          if (report.ok()) CheckToProto(*report, call->response()->mutable_found());
          VerifyStoreCall::Reply(std::move(call), report.status());
        });
  }

  void Drain(std::unique_ptr<DrainCall> call) {
    facts_.request_drain(call->request().grace_ms());
    DrainCall::Reply(std::move(call), absl::OkStatus());
  }

  const ServiceHost host_;
  const AdminFacts facts_;
  Rpc rpc_;
  const UnaryMethod<v1::GetServerInfoRequest, v1::GetServerInfoResponse> get_server_info_;
  const UnaryMethod<v1::GetStatsRequest, v1::GetStatsResponse> get_stats_;
  const UnaryMethod<v1::ListSequencesRequest, v1::ListSequencesResponse> list_sequences_;
  const UnaryMethod<v1::DescribeSequenceRequest, v1::DescribeSequenceResponse> describe_sequence_;
  const UnaryMethod<v1::DescribeBlockRequest, v1::DescribeBlockResponse> describe_block_;
  const UnaryMethod<v1::ExplainRequest, v1::ExplainResponse> explain_;
  const UnaryMethod<v1::EvictRequest, v1::EvictResponse> evict_;
  const UnaryMethod<v1::SetQuotaRequest, v1::SetQuotaResponse> set_quota_;
  const UnaryMethod<v1::ListTenantsRequest, v1::ListTenantsResponse> list_tenants_;
  const UnaryMethod<v1::VerifyStoreRequest, v1::VerifyStoreResponse> verify_store_;
  const UnaryMethod<v1::DrainRequest, v1::DrainResponse> drain_;
};

}  // namespace

std::unique_ptr<RpcService> NewAdminService(const ServiceHost& host, AdminFacts facts) {
  return std::make_unique<AdminService>(host, std::move(facts));
}

}  // namespace kvservice
