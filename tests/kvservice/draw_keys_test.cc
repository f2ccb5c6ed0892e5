#include "kvservice/draw_keys.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "kvservice/sha256.h"

namespace kvservice {
namespace {

std::string Hex(absl::Span<const std::byte> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const std::byte byte : bytes) {
    hex.push_back(kDigits[std::to_integer<int>(byte) >> 4]);
    hex.push_back(kDigits[std::to_integer<int>(byte) & 15]);
  }
  return hex;
}

absl::Span<const std::byte> BytesOf(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// first, first + 1, ...
template <size_t kCount>
std::array<std::byte, kCount> Rising(unsigned first) {
  std::array<std::byte, kCount> bytes;
  for (size_t i = 0; i < kCount; ++i) bytes[i] = static_cast<std::byte>(first + i);
  return bytes;
}

std::string HmacHex(const std::string& key, const std::string& message, size_t step) {
  HmacSha256 hmac(BytesOf(key));
  for (size_t at = 0; at < message.size(); at += step) {
    hmac.Update(BytesOf(message.substr(at, step)));
  }
  return Hex(hmac.Finish());
}

// RFC 4231, test cases 1 to 4, 6 and 7.
TEST(HmacSha256Test, KnownAnswers) {
  const std::string long_key(131, '\xaa');
  std::string counting;
  for (char c = 1; c <= 25; ++c) counting += c;
  const std::tuple<std::string, std::string, std::string> cases[] = {
      {std::string(20, '\x0b'), "Hi There",
       "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
      {"Jefe", "what do ya want for nothing?",
       "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
      {std::string(20, '\xaa'), std::string(50, '\xdd'),
       "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"},
      {counting, std::string(50, '\xcd'),
       "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"},
      {long_key, "Test Using Larger Than Block-Size Key - Hash Key First",
       "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
      {long_key,
       "This is a test using a larger than block-size key and a larger than block-size data. The "
       "key needs to be hashed before being used by the HMAC algorithm.",
       "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"}};
  for (const auto& [key, message, expected] : cases) {
    for (const size_t step : {1, 7, 64, 1000}) EXPECT_EQ(HmacHex(key, message, step), expected);
  }
}

TEST(HmacSha256Test, ACopyStartsWhereTheOriginalStands) {
  HmacSha256 hmac(BytesOf("Jefe"));
  hmac.Update(BytesOf("what do ya "));
  HmacSha256 copy = hmac;
  copy.Update(BytesOf("something else"));
  hmac.Update(BytesOf("want for nothing?"));
  EXPECT_EQ(Hex(hmac.Finish()), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

// Computed apart from this program, by the encoding that the header gives.
TEST(DrawKeysTest, FixedVector) {
  const DrawKeys keys(Rising<32>(0), Rising<16>(100));
  EXPECT_EQ(Hex(keys.KeyOf(0x0102030405060708, 9, Rising<16>(200), 31)),
            "2936704bf34f4ea6b515e2f6f9a6171684092479efbc2dc9d58dd482ecf2bcb4");
  EXPECT_EQ(keys.secret_id(), 0xce1a00714d05a309U);
  EXPECT_EQ(keys.epoch(), Rising<16>(100));
}

// Whatever differs in the input, even by moving a byte from one field to the next, differs in the
// key.
TEST(DrawKeysTest, EveryInputMatters) {
  std::set<std::string> seen;
  size_t count = 0;
  for (const unsigned secret : {0U, 1U}) {
    for (const unsigned epoch : {0U, 1U}) {
      const DrawKeys keys(Rising<32>(secret), Rising<16>(epoch));
      for (const uint64_t call : {uint64_t{1}, uint64_t{2}, uint64_t{256}, uint64_t{1} << 32}) {
        for (const uint32_t row : {0U, 1U, 256U}) {
          for (const uint32_t layer : {0U, 1U, 256U}) {
            for (const unsigned id : {0U, 1U}) {
              seen.insert(Hex(keys.KeyOf(call, row, Rising<16>(id), layer)));
              ++count;
            }
          }
        }
      }
    }
  }
  EXPECT_EQ(seen.size(), count);
}

TEST(DrawKeysTest, TheSecretsIdIsOfTheSecretAlone) {
  const DrawKeys a(Rising<32>(0), Rising<16>(0));
  const DrawKeys b(Rising<32>(0), Rising<16>(1));
  const DrawKeys c(Rising<32>(1), Rising<16>(0));
  EXPECT_EQ(a.secret_id(), b.secret_id());
  EXPECT_NE(a.secret_id(), c.secret_id());
}

}  // namespace
}  // namespace kvservice
