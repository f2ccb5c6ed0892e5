// What fuzz targets share. A target is one function, for libFuzzer or for tests/fuzz/replay.cc: it
// aborts when something is wrong.

#ifndef KVSERVICE_TESTS_FUZZ_FUZZ_TARGET_H_
#define KVSERVICE_TESTS_FUZZ_FUZZ_TARGET_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace kvservice::testing {

// Takes an input apart from the front; what is not there any more is zeros.
class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <typename Number>
  Number Take() {
    Number number = 0;
    const size_t bytes = std::min(sizeof(number), size_);
    if (bytes > 0) std::memcpy(&number, data_, bytes);
    data_ += bytes;
    size_ -= bytes;
    return number;
  }
  std::string TakeBytes(size_t count) {
    const size_t bytes = std::min(count, size_);
    std::string taken(reinterpret_cast<const char*>(data_), bytes);
    data_ += bytes;
    size_ -= bytes;
    return taken;
  }
  bool empty() const { return size_ == 0; }
  std::string Rest() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_FUZZ_FUZZ_TARGET_H_
