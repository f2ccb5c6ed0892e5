// What somebody who looks at a server's metrics listener sees.

#ifndef KVSERVICE_TESTS_SERVER_WEB_CLIENT_H_
#define KVSERVICE_TESTS_SERVER_WEB_CLIENT_H_

#include <optional>
#include <string>

#include "kvservice/server/endpoint.h"

namespace kvservice::testing {

// Everything that it answers to these bytes, on a connection of their own.
std::string AnswerTo(const Endpoint& endpoint, const std::string& request);
// The answer to a GET, head included.
std::string GetPage(const Endpoint& endpoint, const std::string& path);
// Of a metric without labels on a page of metrics; nothing if it is not there.
std::optional<double> MetricOf(const std::string& page, const std::string& name);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_WEB_CLIENT_H_
