// Numbers and strings as bytes, and back: little endian, lengths before contents. The writer only
// grows; the reader never believes a length and, once it has met something that cannot be, gives
// zeros and says so at the end. Value types; not thread-safe.

#ifndef KVSERVICE_KVSERVICE_CACHE_BYTE_CODEC_H_
#define KVSERVICE_KVSERVICE_CACHE_BYTE_CODEC_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

namespace kvservice {

static_assert(std::endian::native == std::endian::little, "stored numbers are copied as they are");

class ByteWriter {
 public:
  template <typename T>
  void Number(T value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    Raw(&value, sizeof(value));
  }
  void Raw(const void* bytes, size_t count) {
    bytes_.append(static_cast<const char*>(bytes), count);
  }
  void Text(std::string_view text) {
    Number(static_cast<uint32_t>(text.size()));
    Raw(text.data(), text.size());
  }
  const std::string& bytes() const { return bytes_; }
  std::string Take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class ByteReader {
 public:
  explicit ByteReader(std::string_view bytes) : bytes_(bytes) {}

  template <typename T>
  T Number() {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    T value{};
    Raw(&value, sizeof(value));
    return value;
  }
  void Raw(void* to, size_t count) {
    const std::string_view from = Bytes(count);
    // Of nothing there may be no address.
    if (count > 0 && from.size() == count) std::memcpy(to, from.data(), count);
  }
  // Borrows from what is read; empty if there are not so many bytes.
  std::string_view Bytes(size_t count) {
    if (count > bytes_.size()) {
      failed_ = true;
      bytes_ = {};
      return {};
    }
    const std::string_view taken = bytes_.substr(0, count);
    bytes_.remove_prefix(count);
    return taken;
  }
  std::string Text() { return std::string(Bytes(Number<uint32_t>())); }
  // A count of things that take at least `bytes_each`: 0 and failed where they cannot be there.
  uint32_t Count(size_t bytes_each) {
    const auto count = Number<uint32_t>();
    if (count <= bytes_.size() / bytes_each) return count;
    failed_ = true;
    bytes_ = {};
    return 0;
  }
  void Fail() { failed_ = true; }
  bool failed() const { return failed_; }
  // Everything was there, and nothing is left.
  bool Finished() const { return !failed_ && bytes_.empty(); }
  size_t left() const { return bytes_.size(); }

 private:
  std::string_view bytes_;
  bool failed_ = false;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CACHE_BYTE_CODEC_H_
