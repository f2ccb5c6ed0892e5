// Replies as JSON for programs and as tables for people. JSON has the names of the protos, ids in
// hexadecimal and every number in full; tables round, bounds upwards. Pure functions; any thread.

#ifndef KVSERVICE_CLIENT_KVCTL_SHOW_H_
#define KVSERVICE_CLIENT_KVCTL_SHOW_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "kvservice/v1/admin.pb.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/model.pb.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice::client {

nlohmann::ordered_json ToJson(const v1::GetServerInfoResponse& info);
nlohmann::ordered_json ToJson(const v1::GetStatsResponse& stats);
nlohmann::ordered_json ToJson(const v1::Sequence& sequence);
nlohmann::ordered_json ToJson(const v1::AuditTotals& totals);
nlohmann::ordered_json ToJson(const v1::StoreCheck& check);
nlohmann::ordered_json ToJson(const v1::AuditResponse& audit);
nlohmann::ordered_json ToJson(const v1::ExplainResponse& explain);
nlohmann::ordered_json ToJson(const v1::Model& model);

std::string ToTable(const v1::GetServerInfoResponse& info);
std::string ToTable(const v1::GetStatsResponse& stats);
std::string ToTable(const v1::Sequence& sequence);
std::string ToTable(const v1::AuditTotals& totals);
std::string ToTable(const v1::StoreCheck& check);
std::string ToTable(const v1::AuditResponse& audit);
// One line for each limit, then one for each of its KV heads.
std::string ToTable(const v1::ExplainResponse& explain);
std::string ToTable(const v1::GetModelResponse& model);
// With a line of headers, one line each.
std::string ToTable(const std::vector<v1::Sequence>& sequences);
std::string ToTable(const std::vector<v1::Model>& models);

// Nothing wrong was found, and no more misses than chance explains: by the Chernoff bound so many
// misses would come about less often than once in a thousand audits.
bool IsSound(const v1::AuditTotals& totals);

// 16 hexadecimal digits: programs that read JSON numbers as doubles would change it.
std::string FixedText(uint64_t value);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_SHOW_H_
