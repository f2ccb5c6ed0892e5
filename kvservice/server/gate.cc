#include "kvservice/server/gate.h"

#include <spdlog/spdlog.h>

#include <string>
#include <string_view>

#include "kvservice/engine_errors.h"
#include "kvservice/server/access_log.h"
#include "kvservice/server/tenancy.h"

namespace kvservice {
namespace {

// Codes that say something is wrong with the server rather than with the call.
bool IsServerFault(absl::StatusCode code) {
  return code == absl::StatusCode::kInternal || code == absl::StatusCode::kUnknown ||
         code == absl::StatusCode::kDataLoss;
}

// Metrics know methods without their service.
std::string_view ShortName(std::string_view name) {
  const size_t dot = name.rfind('.');
  return dot == std::string_view::npos ? name : name.substr(dot + 1);
}

}  // namespace

bool RateLimit::Admit(uint64_t now_ns) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (now_ns - second_began_ns_ >= 1'000'000'000) {
    second_began_ns_ = now_ns;
    count_ = 0;
  }
  return ++count_ <= per_second_;
}

Caller Gate::Identify(const grpc::ServerContext& context) {
  return CallerOf(context, *options_.identities->Get(), options_.clock->WallNowNs());
}

absl::Status Gate::Allow(const MethodAccess& method, const Caller& caller) {
  absl::Status access = CheckAccess(method, caller);
  if (!access.ok() || options_.needed.empty()) return access;
  return CheckAccess({.name = method.name, .any_of = options_.needed}, caller);
}

absl::Status Gate::Admit(const MethodAccess& method, const Caller& caller) {
  if (absl::Status access = Allow(method, caller); !access.ok()) return access;
  return closed_ ? Draining() : absl::OkStatus();
}

void Gate::Ended(const CallRecord& record) {
  metrics_.Ended(ShortName(record.method.name), record.status.code(), record.duration_ns);
  if (options_.access_log != nullptr) options_.access_log->Ended(options_.side, record);
  const auto level =
      IsServerFault(record.status.code()) ? spdlog::level::err : spdlog::level::debug;
  if (options_.logger == nullptr || !options_.logger->should_log(level)) return;
  options_.logger->log(level, "rpc={} tenant={} code={} duration_us={} {}", record.method.name,
                       record.caller.tenant, absl::StatusCodeToString(record.status.code()),
                       record.duration_ns / 1000, std::string(record.status.message()));
}

void Gate::Attended(const AttendTimes& times) {
  metrics_.Attended(times.queue_ns, times.service_ns);
  const uint64_t slow_ns = uint64_t{slow_call_ms_} * 1'000'000;
  if (slow_ns == 0 || times.queue_ns + times.service_ns < slow_ns) return;
  if (options_.logger == nullptr || !slow_calls_.Admit(options_.clock->SteadyNowNs())) return;
  options_.logger->warn("slow call={} layer={} rows={} queue_us={} service_us={}",
                        times.call_number, times.layer, times.row_count, times.queue_ns / 1000,
                        times.service_ns / 1000);
}

}  // namespace kvservice
