#include "kvservice/cache/checksum.h"

#include <xxhash.h>

#include <cstring>
#include <memory>

namespace kvservice {

namespace {

Checksum FromHash(XXH128_hash_t hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  Checksum checksum;
  static_assert(sizeof(canonical) == sizeof(checksum));
  std::memcpy(checksum.data(), &canonical, sizeof(checksum));
  return checksum;
}

}  // namespace

Checksum ChecksumOf(std::string_view bytes) {
  return FromHash(XXH3_128bits(bytes.data(), bytes.size()));
}

Checksum ChecksumOf(std::initializer_list<std::string_view> parts) {
  using State = std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)>;
  const State state(XXH3_createState(), &XXH3_freeState);
  XXH3_128bits_reset(state.get());
  for (const std::string_view part : parts) {
    XXH3_128bits_update(state.get(), part.data(), part.size());
  }
  return FromHash(XXH3_128bits_digest(state.get()));
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
