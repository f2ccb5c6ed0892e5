// What this program is and was built from. Any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_BUILD_INFO_H_
#define KVSERVICE_KVSERVICE_SERVER_BUILD_INFO_H_

#include <map>
#include <string>
#include <string_view>

namespace kvservice {

// Semantic version: "0.1.0".
std::string Version();
// Compiler and build type: "g++ 12.2.0, Release".
std::string BuildDescription();
// The instruction set that a device of this name computes with here: "avx512_vnni", "avx512",
// "avx2", "sse4", or "scalar" for the reference device. The CPU device makes the same choice.
std::string InstructionSet(std::string_view device_name);
// Outside libraries at run time where they tell, else at build time: name to version.
std::map<std::string, std::string> LibraryVersions();

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_BUILD_INFO_H_
