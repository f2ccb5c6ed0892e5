#include "kvservice/server/build_info.h"

#include <google/protobuf/stubs/common.h>
#include <grpcpp/version_info.h>
#include <spdlog/version.h>

namespace kvservice {

std::string Version() { return KVSERVICE_VERSION; }

std::string BuildDescription() {
#ifdef __clang__
  const std::string compiler = "clang++ " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  return compiler + ", " KVSERVICE_BUILD_TYPE;
}

std::string InstructionSet(std::string_view device_name) {
  if (device_name == "cuda") return "sm_80";  // the least that its kernels run on
  if (device_name != "cpu") return "scalar";
#ifdef __x86_64__
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool avx512_vnni =
      avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg") &&
      __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("vpclmulqdq");
  if (avx512_vnni) return "avx512_vnni";
  if (avx512) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
  return "sse4";
#else
  return "baseline";
#endif
}

std::map<std::string, std::string> LibraryVersions() {
  return {
      {"grpc", GRPC_CPP_VERSION_STRING},
      {"protobuf", google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION)},
      {"spdlog", std::to_string(SPDLOG_VER_MAJOR) + "." + std::to_string(SPDLOG_VER_MINOR) + "." +
                     std::to_string(SPDLOG_VER_PATCH)},
  };
}

}  // namespace kvservice
