#include "kvservice/server/quantity.h"

#include <array>
#include <charconv>

namespace kvservice {
namespace {

struct Unit {
  std::string_view name;
  uint64_t factor;
};

constexpr std::array<Unit, 9> kByteUnits = {{{"TiB", uint64_t{1} << 40},
                                             {"GiB", uint64_t{1} << 30},
                                             {"MiB", uint64_t{1} << 20},
                                             {"KiB", uint64_t{1} << 10},
                                             {"TB", 1'000'000'000'000},
                                             {"GB", 1'000'000'000},
                                             {"MB", 1'000'000},
                                             {"kB", 1'000},
                                             {"", 1}}};

constexpr std::array<Unit, 4> kTimeUnits = {
    {{"h", 3'600'000}, {"m", 60'000}, {"s", 1'000}, {"ms", 1}}};

template <size_t kCount>
std::optional<uint64_t> Parse(std::string_view text, const std::array<Unit, kCount>& units) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc()) return std::nullopt;
  const std::string_view suffix = text.substr(static_cast<size_t>(end - text.data()));
  for (const Unit& unit : units) {
    uint64_t product = 0;
    if (suffix != unit.name) continue;
    if (__builtin_mul_overflow(number, unit.factor, &product)) return std::nullopt;
    return product;
  }
  return std::nullopt;
}

template <size_t kCount>
std::string Text(uint64_t value, const std::array<Unit, kCount>& units) {
  for (const Unit& unit : units) {
    const bool whole = value % unit.factor == 0 && (value > 0 || unit.factor == 1);
    if (whole) return std::to_string(value / unit.factor) + std::string(unit.name);
  }
  return std::to_string(value);
}

}  // namespace

std::optional<uint64_t> ParseBytes(std::string_view text) { return Parse(text, kByteUnits); }

std::optional<uint64_t> ParseMilliseconds(std::string_view text) { return Parse(text, kTimeUnits); }

std::string BytesText(uint64_t bytes) { return Text(bytes, kByteUnits); }

std::string MillisecondsText(uint64_t milliseconds) { return Text(milliseconds, kTimeUnits); }

}  // namespace kvservice
