#include "kvservice/server/policy_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/util/json_util.h"
#include "kvservice/server/convert_policy.h"
#include "kvservice/v1/types.pb.h"

namespace kvservice {
namespace {

constexpr size_t kNameBytesMax = 64;

absl::Status Invalid(const std::string& problem) { return absl::InvalidArgumentError(problem); }

std::string OneLine(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

bool IsNameCharacter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
         c == '_' || c == '.';
}

absl::Status CheckName(const std::string& name) {
  if (!name.empty() && name.size() <= kNameBytesMax &&
      std::all_of(name.begin(), name.end(), IsNameCharacter)) {
    return absl::OkStatus();
  }
  return Invalid(absl::StrCat("name is not 1 to ", kNameBytesMax,
                              " letters, digits, dots, dashes or underscores"));
}

absl::Status AddOne(const v1::NamedPolicy& entry, PolicyRegistry* registry) {
  absl::Status status = CheckName(entry.name());
  if (!status.ok()) return status;
  if (!entry.has_policy()) return Invalid("policy is missing");
  absl::StatusOr<Policy> policy = PolicyFromProto(entry.policy(), "policy", *registry);
  if (!policy.ok()) return policy.status();
  status = ValidatePolicy(*policy, kAnyLayerCount, kAnyKvHeadCount);
  return status.ok() ? registry->Add(entry.name(), *policy) : status;
}

}  // namespace

absl::Status AddPolicies(std::string_view text, PolicyRegistry* registry) {
  // One object is read as a list of one.
  const size_t first = text.find_first_not_of(" \t\r\n");
  const bool is_list = first != std::string_view::npos && text[first] == '[';
  std::string wrapped = "{\"policies\": ";
  wrapped.append(is_list ? "" : "[").append(text).append(is_list ? "}" : "]}");
  v1::NamedPolicies entries;
  const auto parsed = google::protobuf::util::JsonStringToMessage(wrapped, &entries);
  if (!parsed.ok()) return Invalid(OneLine(parsed.message().ToString()));
  if (entries.policies_size() == 0) return Invalid("there is no policy in it");
  for (int i = 0; i < entries.policies_size(); ++i) {
    const absl::Status status = AddOne(entries.policies(i), registry);
    if (status.ok()) continue;
    // The name is whatever the file has there.
    return Invalid(
        OneLine(absl::StrCat("[", i, "] (", entries.policies(i).name(), "): ", status.message())));
  }
  return absl::OkStatus();
}

absl::Status AddPolicyFile(const std::string& path, PolicyRegistry* registry) {
  std::ifstream file(path, std::ios::binary);
  // One byte more than there may be tells a longer file.
  std::string text(kPolicyFileBytesMax + 1, '\0');
  if (file) file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.is_open() || file.bad()) {
    return absl::NotFoundError(absl::StrCat(path, ": cannot be read: ", std::strerror(errno)));
  }
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kPolicyFileBytesMax) {
    return Invalid(absl::StrCat(path, ": has more than ", kPolicyFileBytesMax, " bytes"));
  }
  const absl::Status status = AddPolicies(text, registry);
  return status.ok() ? status : Invalid(absl::StrCat(path, ": ", status.message()));
}

std::string PolicyFileText(std::string_view name, const Policy& policy) {
  v1::NamedPolicy entry;
  entry.set_name(std::string(name));
  *entry.mutable_policy() = PolicyToProto(policy);
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.preserve_proto_field_names = true;
  std::string text;
  // A message of ours always has a JSON image.
  if (!google::protobuf::util::MessageToJsonString(entry, &text, options).ok()) return "";
  return text;
}

}  // namespace kvservice
