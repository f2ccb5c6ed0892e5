// The methods that proto/ declares, all of them, whoever serves them.

#ifndef KVSERVICE_TESTS_SERVER_API_METHODS_H_
#define KVSERVICE_TESTS_SERVER_API_METHODS_H_

#include <string>
#include <vector>

#include "kvservice/server/access.h"

namespace kvservice::testing {

struct ApiMethod {
  std::string service;    // "SequenceService"
  std::string path;       // "/kvservice.v1.SequenceService/Get"
  std::string full_name;  // "kvservice.v1.SequenceService.Get"
  RoleSet any_of;
};

std::vector<ApiMethod> AllMethods();

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_API_METHODS_H_
