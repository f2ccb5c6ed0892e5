#include "kvservice/server/gate.h"

#include <spdlog/spdlog.h>

#include <string>

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

}  // namespace

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
  if (options_.access_log != nullptr) options_.access_log->Ended(options_.side, record);
  const auto level =
      IsServerFault(record.status.code()) ? spdlog::level::err : spdlog::level::debug;
  if (options_.logger == nullptr || !options_.logger->should_log(level)) return;
  options_.logger->log(level, "rpc={} tenant={} code={} duration_us={} {}", record.method.name,
                       record.caller.tenant, absl::StatusCodeToString(record.status.code()),
                       record.duration_ns / 1000, std::string(record.status.message()));
}

}  // namespace kvservice
