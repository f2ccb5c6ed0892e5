// Numbers with units as people write them on a command line. Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_QUANTITY_H_
#define KVSERVICE_KVSERVICE_SERVER_QUANTITY_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kvservice {

// "4GiB", "512MiB", "100MB", "65536": bytes. KiB, MiB, GiB, TiB are powers of 1024; kB, MB, GB, TB
// of 1000. Nothing for any other text and for numbers beyond 64 bits.
std::optional<uint64_t> ParseBytes(std::string_view text);

// "250ms", "10s", "5m", "24h": milliseconds.
std::optional<uint64_t> ParseMilliseconds(std::string_view text);

// The shortest text that parses to the same number.
std::string BytesText(uint64_t bytes);
std::string MillisecondsText(uint64_t milliseconds);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_QUANTITY_H_
