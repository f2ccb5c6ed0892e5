#include "kvservice/error.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace kvservice {
namespace {

// The payload is a list of netstrings ("3:abc"): reason, field, retry delay, then keys and values.
constexpr char kPayloadUrl[] = "kvservice/error";

void AddPart(std::string_view part, std::string* text) {
  absl::StrAppend(text, part.size(), ":", absl::string_view(part.data(), part.size()));
}

std::vector<std::string> SplitParts(std::string_view text) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    size_t bytes = 0;
    size_t digit_count = 0;
    while (digit_count < text.size() && text[digit_count] != ':') {
      bytes = 10 * bytes + static_cast<size_t>(text[digit_count++] - '0');
    }
    text.remove_prefix(digit_count + 1);
    parts.emplace_back(text.substr(0, bytes));
    text.remove_prefix(bytes);
  }
  return parts;
}

}  // namespace

absl::Status MakeError(absl::StatusCode code, std::string_view message,
                       const ErrorDetails& details) {
  std::string text;
  AddPart(details.reason, &text);
  AddPart(details.field, &text);
  AddPart(std::to_string(details.retry_delay_ms), &text);
  for (const auto& [key, value] : details.metadata) {
    AddPart(key, &text);
    AddPart(value, &text);
  }
  absl::Status status(code, absl::string_view(message.data(), message.size()));
  status.SetPayload(kPayloadUrl, absl::Cord(std::move(text)));
  return status;
}

absl::Status InvalidField(std::string_view field, std::string_view reason,
                          std::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, message,
                   {.reason = std::string(reason), .field = std::string(field), .metadata = {}});
}

ErrorDetails DetailsOf(const absl::Status& status) {
  ErrorDetails details;
  const absl::optional<absl::Cord> payload = status.GetPayload(kPayloadUrl);
  if (!payload.has_value()) return details;
  const std::string text(*payload);
  std::vector<std::string> parts = SplitParts(text);
  details.reason = std::move(parts[0]);
  details.field = std::move(parts[1]);
  details.retry_delay_ms = static_cast<uint32_t>(std::stoul(parts[2]));
  for (size_t i = 3; i + 1 < parts.size(); i += 2) {
    details.metadata.emplace_back(std::move(parts[i]), std::move(parts[i + 1]));
  }
  return details;
}

}  // namespace kvservice
