// The checksum of everything stored: XXH3 with 128 bits, of libxxhash. It reads about as fast as
// memory does, where our SHA-256 makes a fraction of a GB/s, and misses a random damage once in
// 2^128. It is no defence against somebody who can write to the directory: that is the directory's
// mode. Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_CACHE_CHECKSUM_H_
#define KVSERVICE_KVSERVICE_CACHE_CHECKSUM_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace kvservice {

using Checksum = std::array<std::byte, 16>;

Checksum ChecksumOf(std::string_view bytes);
// Of parts one after another, as if they were one.
Checksum ChecksumOf(std::initializer_list<std::string_view> parts);

// Appends the checksum of all bytes before it.
void Seal(std::string* bytes);
// What was sealed, without its checksum; empty if that is wrong (nothing empty is ever sealed).
std::string_view Unseal(std::string_view sealed);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_CHECKSUM_H_
