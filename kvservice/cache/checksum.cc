#include "kvservice/cache/checksum.h"

#include <xxhash.h>

#include <cstring>

namespace kvservice {

Checksum ChecksumOf(std::string_view bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data(), bytes.size()));
  Checksum checksum;
  static_assert(sizeof(canonical) == sizeof(checksum));
  std::memcpy(checksum.data(), &canonical, sizeof(checksum));
  return checksum;
}

void Seal(std::string* bytes) {
  const Checksum checksum = ChecksumOf(*bytes);
  bytes->append(reinterpret_cast<const char*>(checksum.data()), checksum.size());
}

std::string_view Unseal(std::string_view sealed) {
  constexpr size_t kBytes = sizeof(Checksum);
  if (sealed.size() <= kBytes) return {};
  const std::string_view bytes = sealed.substr(0, sealed.size() - kBytes);
  const Checksum checksum = ChecksumOf(bytes);
  const bool equal = std::memcmp(checksum.data(), sealed.data() + bytes.size(), kBytes) == 0;
  return equal ? bytes : std::string_view();
}

}  // namespace kvservice
