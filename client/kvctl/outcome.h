// How every command ends: what it prints, and the exit status. One thread.

#ifndef KVSERVICE_CLIENT_KVCTL_OUTCOME_H_
#define KVSERVICE_CLIENT_KVCTL_OUTCOME_H_

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/kvctl/commands.h"
#include "client/kvctl/server_calls.h"
#include "client/kvctl/show.h"
#include "client/kvctl/show_block.h"

namespace kvservice::client {

// Of every JSON document, as its first member. It goes up when a member is renamed, removed or
// means something else; new members leave it alone.
inline constexpr int kSchemaVersion = 1;

int ExitOf(absl::StatusCode code);
// Tells what failed on stderr, and returns its exit status.
int Fail(const GlobalOptions& options, const absl::Status& status);
// The same for what the caller has asked in a wrong way.
int Usage(const GlobalOptions& options, const std::string& problem);
int MalformedId(const GlobalOptions& options, const std::string& hex_id);

// Nothing when a dangerous command may go on, else its exit status. `word` is what a person must
// type at the terminal.
std::optional<int> Refused(const GlobalOptions& options, bool yes, const std::string& consequence,
                           const std::string& word);

// One JSON document, or the table. With options.watch documents are one line each.
void Print(const GlobalOptions& options, const nlohmann::ordered_json& json,
           const std::string& table);

std::unique_ptr<ServerCalls> Connect(const GlobalOptions& options);

template <typename Reply>
int Show(const GlobalOptions& options, const absl::StatusOr<Reply>& reply) {
  if (!reply.ok()) return Fail(options, reply.status());
  Print(options, ToJson(*reply), ToTable(*reply));
  return kExitOk;
}

template <typename Item>
nlohmann::ordered_json ArrayOf(const char* name, const std::vector<Item>& items) {
  nlohmann::ordered_json array = nlohmann::ordered_json::array();
  for (const Item& item : items) array.push_back(ToJson(item));
  return {{name, std::move(array)}};
}

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_OUTCOME_H_
