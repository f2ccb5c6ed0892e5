// Part of the build: reads the descriptors of proto/ and fails unless every method of every service
// says who may call it. Exit status 1, and a line per method that does not.

#include <google/protobuf/descriptor.pb.h>

#include <algorithm>
#include <cstdio>
#include <fstream>

#include "kvservice/v1/access.pb.h"

namespace kvservice {
namespace {

bool SaysWho(const google::protobuf::MethodDescriptorProto& method) {
  const v1::Access& access = method.options().GetExtension(v1::access);
  return access.any_of_size() > 0 &&
         std::all_of(access.any_of().begin(), access.any_of().end(),
                     [](int role) { return role != v1::ROLE_UNSPECIFIED; });
}

int Main(int argc, const char* const* argv) {
  google::protobuf::FileDescriptorSet set;
  std::ifstream file(argc == 2 ? argv[1] : "", std::ios::binary);
  if (!set.ParseFromIstream(&file)) {
    std::fprintf(stderr, "usage: access_declared DESCRIPTORS\n");
    return 2;
  }
  int method_count = 0;
  int wrong_count = 0;
  for (const google::protobuf::FileDescriptorProto& declared : set.file()) {
    for (const google::protobuf::ServiceDescriptorProto& service : declared.service()) {
      for (const google::protobuf::MethodDescriptorProto& method : service.method()) {
        ++method_count;
        if (SaysWho(method)) continue;
        ++wrong_count;
        std::fprintf(stderr, "%s: %s.%s has no option (kvservice.v1.access)\n",
                     declared.name().c_str(), service.name().c_str(), method.name().c_str());
      }
    }
  }
  if (method_count == 0) std::fprintf(stderr, "there is no method in %s\n", argv[1]);
  return method_count == 0 || wrong_count > 0 ? 1 : 0;
}

}  // namespace
}  // namespace kvservice

int main(int argc, char** argv) { return kvservice::Main(argc, argv); }
