// Blocks as JSON and as tables, as client/kvctl/show.h does everything else. Pure functions; any
// thread.

#ifndef KVSERVICE_CLIENT_KVCTL_SHOW_BLOCK_H_
#define KVSERVICE_CLIENT_KVCTL_SHOW_BLOCK_H_

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "kvservice/v1/admin.pb.h"

namespace kvservice::client {

nlohmann::ordered_json ToJson(const v1::DescribeBlockResponse& block);
// One line for each layer.
std::string ToTable(const v1::DescribeBlockResponse& block);
// With a line of headers, one line each; attention only if a layer was named.
std::string ToTable(const std::vector<v1::DescribeBlockResponse>& blocks, bool with_attention);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_SHOW_BLOCK_H_
