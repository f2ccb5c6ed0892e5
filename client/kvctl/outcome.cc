#include "client/kvctl/outcome.h"

#include <unistd.h>

#include <iostream>

#include "client/status.h"

namespace kvservice::client {

using Json = nlohmann::ordered_json;

int ExitOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kNotFound:
      return kExitNotFound;
    case absl::StatusCode::kUnavailable:
      return kExitUnavailable;
    case absl::StatusCode::kDeadlineExceeded:
      return kExitDeadline;
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return kExitAuth;
    default:
      return kExitFailed;
  }
}

int Fail(const GlobalOptions& options, const absl::Status& status) {
  if (!options.quiet) {
    const std::string reason = ReasonOf(status);
    std::cerr << "kvctl: " << status.message();
    if (!reason.empty()) std::cerr << " (" << reason << ")";
    std::cerr << std::endl;
  }
  return ExitOf(status.code());
}

int Usage(const GlobalOptions& options, const std::string& problem) {
  if (!options.quiet) std::cerr << "kvctl: " << problem << std::endl;
  return kExitUsage;
}

int MalformedId(const GlobalOptions& options, const std::string& hex_id) {
  return Usage(options, "'" + hex_id + "' is not an id: expected 32 digits of 0-9 and a-f");
}

std::optional<int> Refused(const GlobalOptions& options, bool yes, const std::string& consequence,
                           const std::string& word) {
  if (yes) return std::nullopt;
  if (isatty(STDIN_FILENO) == 0) return Usage(options, consequence + "; confirm with --yes");
  std::cerr << "kvctl: " << consequence << ". Type " << word << " to go on: ";
  std::string answer;
  if (std::getline(std::cin, answer) && answer == word) return std::nullopt;
  return Usage(options, "not confirmed, nothing was done");
}

void Print(const GlobalOptions& options, const Json& json, const std::string& table) {
  if (options.quiet) return;
  if (options.json) {
    Json document = {{"schema_version", kSchemaVersion}};
    document.update(json);
    const int indent = options.watch.count() > 0 ? -1 : 2;
    // Names are bytes of other people: whatever is not UTF-8 is replaced.
    std::cout << document.dump(indent, ' ', false, Json::error_handler_t::replace) << std::endl;
  } else {
    std::cout << table << std::flush;
  }
}

std::unique_ptr<ServerCalls> Connect(const GlobalOptions& options) {
  return NewServerCalls(options.endpoint, options.admin_endpoint, options.tls, options.timeout);
}

}  // namespace kvservice::client
