// Replies of Attend taken apart where they lie: to make protobuf's messages of one costs more than
// all that is done with its numbers. Made for what servers write; what has another form, which a
// message may have, is protobuf's to parse. Inside the library only. Pure functions; any thread.

#ifndef KVSERVICE_CLIENT_REPLY_PARTS_H_
#define KVSERVICE_CLIENT_REPLY_PARTS_H_

#include <google/protobuf/arena.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "kvservice/v1/attention.pb.h"

namespace kvservice::client {

// One row's result.
struct RowParts {
  uint32_t attended_tokens = 0;
  int selector = 0;  // v1::Selector
  uint64_t generation = 0;
  // Serialized messages, empty if absent.
  std::string_view groups;        // GroupReports
  std::string_view certificates;  // Certificates
  // Whatever else it says; most rows nothing. Has fields of the above as well, or not.
  const v1::AttendRowResult* rest = nullptr;

  bool has_failed() const { return rest != nullptr && rest->code() != 0; }
};

struct TensorParts {
  int dtype = 0;  // v1::DataType
  absl::InlinedVector<int64_t, 3> shape;
  std::string_view data;
  // Instead of `data`.
  bool has_region = false;
  uint64_t offset_bytes = 0;
  uint64_t length_bytes = 0;
};

// A response; borrows.
struct ReplyParts {
  uint64_t step_id = 0;
  uint64_t call_number = 0;
  uint64_t queue_ns = 0;
  uint64_t service_ns = 0;
  std::string_view epoch;
  uint64_t draw_secret_id = 0;
  TensorParts lse;
  TensorParts out;
  std::vector<RowParts> rows;
};

// `parts` borrow from the message, and from the arena, where the rows' rests are. False if it has
// another form, or does not parse.
bool SplitReply(std::string_view message, google::protobuf::Arena* arena, ReplyParts* parts);

// Repeated numbers, packed, as they lie in a message.
class Column {
 public:
  Column() = default;
  explicit Column(std::string_view bytes) : bytes_(bytes) {}

  bool empty() const { return bytes_.empty(); }
  // So many numbers of fixed width. Enumerators and truth values too, which have one byte unless
  // they are unknown.
  template <typename T>
  bool Has(size_t count) const {
    return bytes_.size() / sizeof(T) == count && bytes_.size() % sizeof(T) == 0;
  }
  // One of those.
  template <typename T>
  T At(size_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  std::string_view bytes() const { return bytes_; }

 private:
  std::string_view bytes_;
};

// Takes numbers of a column that have as many bytes as they need, one after the other.
class VarintReader {
 public:
  explicit VarintReader(const Column& column)
      : at_(column.bytes().data()), end_(at_ + column.bytes().size()) {}

  // 0 where there is none.
  uint64_t Next64() {
    uint64_t value = 0;
    is_sound_ = Read(kVarintBytesMax, &value) && is_sound_;
    return value;
  }
  uint32_t Next() { return static_cast<uint32_t>(Next64()); }
  bool has_more() const { return at_ != end_; }
  // All have been taken, and there was one each time.
  bool is_done() const { return is_sound_ && at_ == end_; }

 private:
  friend class FieldReader;
  static constexpr unsigned kVarintBytesMax = 10;

  // False where there is none of at most so many bytes.
  bool Read(unsigned bytes_max, uint64_t* value) {
    uint64_t result = 0;
    for (unsigned i = 0; i < bytes_max && at_ != end_; ++i) {
      const auto byte = static_cast<uint8_t>(*at_++);
      result |= uint64_t{byte & 0x7FU} << (7 * i);
      if (byte >= 0x80) continue;
      *value = result;
      return true;
    }
    return false;
  }

  const char* at_;
  const char* end_;
  bool is_sound_ = true;
};

// The columns of a message of Certificates or GroupReports, by field number. What is unknown is
// left out.
class Columns {
 public:
  // False if it has another form, or does not parse.
  bool Read(std::string_view message);

  // Empty if it is absent.
  Column operator[](uint32_t number) const {
    return (present_ >> number & 1U) != 0 ? columns_[number] : Column();
  }

 private:
  static constexpr uint32_t kEnd = 17;
  static_assert(v1::Certificates::kRowsSampledFieldNumber < kEnd &&
                v1::GroupReports::kQueryDistanceFieldNumber < kEnd);

  // Bit n stands for columns_[n], the others of which are not set: there are many rows.
  uint32_t present_ = 0;
  std::array<Column, kEnd> columns_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_REPLY_PARTS_H_
