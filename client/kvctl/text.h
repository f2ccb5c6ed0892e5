// Values as people and programs read them. Pure functions; any thread.

#ifndef KVSERVICE_CLIENT_KVCTL_TEXT_H_
#define KVSERVICE_CLIENT_KVCTL_TEXT_H_

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kvservice::client {

// Two hexadecimal digits for each byte of an id or digest, and back for the 16 bytes of an id;
// nothing for any other text.
std::string HexOfId(std::string_view id);
std::optional<std::string> IdOfHex(std::string_view hex);

// "250ms", "5s", "2m"; a bare number is seconds. Nothing for other texts and for 0, at most a day.
std::optional<std::chrono::milliseconds> ParseDuration(std::string_view text);

// "4GiB", "512MiB", "65536": bytes, in powers of 1024. Nothing for other texts.
std::optional<uint64_t> ParseBytes(std::string_view text);

// A number in the base without sign or prefix; nothing for other texts.
std::optional<uint64_t> ParseNumber(std::string_view text, int base);

// "1.5 GiB", to the nearest tenth.
std::string BytesText(uint64_t bytes);
// "1h02m", "3m07s", "12.3s", "250ms"; rounded down.
std::string DurationText(uint64_t milliseconds);
// "12.3%"; "-" of nothing.
std::string ShareText(uint64_t part, uint64_t whole);
// A number that a person chose, as short as reads back the same float.
std::string ShortText(float number);
// Four significant digits, rounded up: what is shown is still a bound.
std::string UpperText(double bound);

// Columns as wide as their widest cell, two spaces apart, without trailing blanks.
using Row = std::vector<std::string>;
std::string Table(const std::vector<Row>& rows);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_TEXT_H_
