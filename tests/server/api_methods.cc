#include "tests/server/api_methods.h"

#include <google/protobuf/descriptor.pb.h>
#include <gtest/gtest.h>

#include <fstream>

namespace kvservice::testing {

std::vector<ApiMethod> AllMethods() {
  google::protobuf::FileDescriptorSet set;
  std::ifstream file(KVSERVICE_API_DESCRIPTORS, std::ios::binary);
  EXPECT_TRUE(set.ParseFromIstream(&file));
  std::vector<ApiMethod> methods;
  for (const google::protobuf::FileDescriptorProto& declared : set.file()) {
    for (const google::protobuf::ServiceDescriptorProto& service : declared.service()) {
      const std::string name = declared.package() + "." + service.name();
      for (const google::protobuf::MethodDescriptorProto& method : service.method()) {
        const std::string full_name = name + "." + method.name();
        methods.push_back({.service = service.name(),
                           .path = "/" + name + "/" + method.name(),
                           .full_name = full_name,
                           .any_of = AccessOf(full_name).any_of});
      }
    }
  }
  // As many as there were when this was written.
  EXPECT_GE(methods.size(), 28U);
  return methods;
}

}  // namespace kvservice::testing
