#include "client/kvctl/text.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace kvservice::client {
namespace {

constexpr std::string_view kHexDigits = "0123456789abcdef";
constexpr size_t kIdBytes = 16;
constexpr int kUpperDigits = 4;

template <typename... Arguments>
std::string Format(const char* format, Arguments... arguments) {
  std::array<char, 64> text;
  std::snprintf(text.data(), text.size(), format, arguments...);
  return text.data();
}

// What one unit of this name is; 0 for other names.
uint64_t UnitMilliseconds(std::string_view unit) {
  if (unit == "ms") return 1;
  if (unit.empty() || unit == "s") return 1'000;
  if (unit == "m") return 60'000;
  return 0;
}

}  // namespace

std::string HexOfId(std::string_view id) {
  std::string hex;
  for (const char c : id) {
    const auto byte = static_cast<unsigned char>(c);
    hex += kHexDigits[byte >> 4];
    hex += kHexDigits[byte & 15U];
  }
  return hex;
}

std::optional<std::string> IdOfHex(std::string_view hex) {
  if (hex.size() != 2 * kIdBytes) return std::nullopt;
  std::string id;
  for (size_t i = 0; i < hex.size(); i += 2) {
    const size_t high = kHexDigits.find(hex[i]);
    const size_t low = kHexDigits.find(hex[i + 1]);
    if (high == std::string_view::npos || low == std::string_view::npos) return std::nullopt;
    id += static_cast<char>(high << 4 | low);
  }
  return id;
}

std::optional<std::chrono::milliseconds> ParseDuration(std::string_view text) {
  constexpr uint64_t kDayMs = 86'400'000;
  uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc()) return std::nullopt;
  const uint64_t unit = UnitMilliseconds({rest, static_cast<size_t>(end - rest)});
  if (unit == 0 || number == 0 || number > kDayMs / unit) return std::nullopt;
  return std::chrono::milliseconds(number * unit);
}

std::optional<uint64_t> ParseNumber(std::string_view text, int base) {
  uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number, base);
  if (error != std::errc() || rest != end) return std::nullopt;
  return number;
}

std::optional<uint64_t> ParseBytes(std::string_view text) {
  constexpr std::array<std::string_view, 5> kUnits = {"", "KiB", "MiB", "GiB", "TiB"};
  const size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
  const std::optional<uint64_t> number = ParseNumber(text.substr(0, digits), 10);
  const auto unit = std::find(kUnits.begin(), kUnits.end(), text.substr(digits));
  if (!number.has_value() || unit == kUnits.end()) return std::nullopt;
  const auto shift = static_cast<uint32_t>(10 * (unit - kUnits.begin()));
  if (*number > UINT64_MAX >> shift) return std::nullopt;
  return *number << shift;
}

std::string BytesText(uint64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  if (bytes < 1024) return std::to_string(bytes) + " B";
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  return Format("%.1f %s", value, kUnits[unit]);
}

std::string DurationText(uint64_t milliseconds) {
  const auto seconds = static_cast<unsigned long long>(milliseconds / 1000);
  if (seconds >= 3600) return Format("%lluh%02llum", seconds / 3600, seconds / 60 % 60);
  if (seconds >= 60) return Format("%llum%02llus", seconds / 60, seconds % 60);
  if (seconds == 0) return std::to_string(milliseconds) + "ms";
  return Format("%llu.%llus", seconds, static_cast<unsigned long long>(milliseconds / 100 % 10));
}

std::string ShareText(uint64_t part, uint64_t whole) {
  if (whole == 0) return "-";
  return Format("%.1f%%", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

std::string ShortText(float number) {
  std::array<char, 64> text;
  const auto [end, error] = std::to_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() ? std::string(text.data(), end) : std::string("?");
}

std::string UpperText(double bound) {
  if (!(bound > 0.0) || !std::isfinite(bound)) return bound == 0.0 ? "0" : Format("%g", bound);
  const std::string nearest = Format("%.*e", kUpperDigits - 1, bound);
  const double shown = std::strtod(nearest.c_str(), nullptr);
  if (shown >= bound) return Format("%.*g", kUpperDigits, shown);
  // One more in the last digit that is shown.
  const size_t exponent_at = nearest.find('e') + 1;
  const auto exponent = std::strtol(nearest.c_str() + exponent_at, nullptr, 10);
  const auto digit = static_cast<double>(exponent - (kUpperDigits - 1));
  return Format("%.*g", kUpperDigits, shown + std::pow(10.0, digit));
}

std::string Table(const std::vector<Row>& rows) {
  std::vector<size_t> widths;
  for (const Row& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const Row& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += row[i];
      line.append(widths[i] + 2 - row[i].size(), ' ');
    }
    while (!line.empty() && line.back() == ' ') line.pop_back();
    text += line + "\n";
  }
  return text;
}

}  // namespace kvservice::client
