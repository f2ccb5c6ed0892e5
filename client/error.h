// Makes the statuses that client/status.h takes apart. Inside the library only. Pure functions; any
// thread.

#ifndef KVSERVICE_CLIENT_ERROR_H_
#define KVSERVICE_CLIENT_ERROR_H_

#include <map>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace kvservice::client {

// `code` must not be OK; a code that gRPC does not define becomes UNKNOWN. `field` may be empty.
absl::Status MakeError(int code, std::string_view message, const std::string& reason,
                       const std::string& field = {},
                       const std::map<std::string, std::string>& metadata = {});

// INVALID_ARGUMENT / REQUEST_INVALID: "`field` `problem`".
absl::Status InvalidRequest(const std::string& field, std::string_view problem);

// INTERNAL / REPLY_MALFORMED: "the reply's `field` `problem`".
absl::Status MalformedReply(const std::string& field, std::string_view problem);

// A status as gRPC delivers it; `details` is the trailer grpc-status-details-bin and may be
// anything, it is the server's.
absl::Status StatusFromWire(int code, std::string_view message, const std::string& details);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_ERROR_H_
