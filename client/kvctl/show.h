// Replies as JSON for programs and as tables for people. JSON has the names of the protos, ids in
// hexadecimal and every number in full; tables round, bounds upwards. Pure functions; any thread.

#ifndef KVSERVICE_CLIENT_KVCTL_SHOW_H_
#define KVSERVICE_CLIENT_KVCTL_SHOW_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "kvservice/v1/admin.pb.h"
#include "kvservice/v1/model.pb.h"
#include "kvservice/v1/sequence.pb.h"

namespace kvservice::client {

nlohmann::ordered_json ToJson(const v1::GetServerInfoResponse& info);
nlohmann::ordered_json ToJson(const v1::GetStatsResponse& stats);
nlohmann::ordered_json ToJson(const v1::Sequence& sequence);
nlohmann::ordered_json ToJson(const v1::Model& model);

std::string ToTable(const v1::GetServerInfoResponse& info);
std::string ToTable(const v1::GetStatsResponse& stats);
std::string ToTable(const v1::Sequence& sequence);
std::string ToTable(const v1::GetModelResponse& model);
// With a line of headers, one line each.
std::string ToTable(const std::vector<v1::Sequence>& sequences);
std::string ToTable(const std::vector<v1::Model>& models);

// 16 hexadecimal digits: programs that read JSON numbers as doubles would change it.
std::string FixedText(uint64_t value);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_SHOW_H_
