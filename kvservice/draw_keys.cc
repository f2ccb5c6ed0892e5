#include "kvservice/draw_keys.h"

#include <cassert>
#include <string_view>

namespace kvservice {
namespace {

constexpr std::string_view kTag = "kvservice.draw.1";
constexpr std::string_view kSecretIdTag = "kvservice.draw.secret.id";
constexpr size_t kSequenceIdBytes = 16;
static_assert(kTag.size() == 16);

absl::Span<const std::byte> BytesOf(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

template <size_t kCount>
std::array<std::byte, kCount> BigEndian(uint64_t value) {
  std::array<std::byte, kCount> bytes;
  for (size_t i = 0; i < kCount; ++i) {
    bytes[i] = static_cast<std::byte>(value >> (8 * (kCount - 1 - i)));
  }
  return bytes;
}

uint64_t SecretId(const DrawSecret& secret) {
  Sha256 hash;
  hash.Update(BytesOf(kSecretIdTag));
  hash.Update(secret);
  const Sha256::Digest digest = hash.Finish();
  uint64_t id = 0;
  for (size_t i = 0; i < sizeof(id); ++i) id = id << 8 | std::to_integer<uint64_t>(digest[i]);
  return id;
}

}  // namespace

DrawKeys::DrawKeys(const DrawSecret& secret, const Epoch& epoch)
    : epoch_(epoch), secret_id_(SecretId(secret)), keyed_(secret) {}

std::array<std::byte, kDrawKeyBytes> DrawKeys::KeyOf(uint64_t call_number, uint32_t row,
                                                     absl::Span<const std::byte> sequence_id,
                                                     uint32_t layer) const {
  assert(call_number > 0 && sequence_id.size() == kSequenceIdBytes);
  HmacSha256 message = keyed_;
  message.Update(BytesOf(kTag));
  message.Update(epoch_);
  message.Update(BigEndian<sizeof(uint64_t)>(call_number));
  message.Update(BigEndian<sizeof(uint32_t)>(row));
  message.Update(sequence_id.subspan(0, kSequenceIdBytes));
  message.Update(BigEndian<sizeof(uint32_t)>(layer));
  return message.Finish();
}

}  // namespace kvservice
