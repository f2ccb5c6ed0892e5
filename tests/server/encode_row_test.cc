// Rows of a reply, which are written in two ways.

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "kvservice/error.h"
#include "kvservice/server/convert.h"

namespace kvservice {
namespace {

std::string Expected(const AttendCallRow& row, const AttendRowResult& result) {
  v1::AttendRowResult message;
  RowToProto(row, result, &message);
  return message.SerializeAsString();
}

// Rows of all sizes, each with some of what most rows do without.
class Rows {
 public:
  explicit Rows(uint32_t seed) : random_(seed) {}

  AttendCallRow Row() {
    AttendCallRow row;
    row.generation = Coin() ? Number() : uint64_t{Number()} << 30;
    return row;
  }
  AttendRowResult Result() {
    AttendRowResult result;
    result.attended_length = Number();
    result.selector = Coin() ? SelectorKind::kAuto : SelectorKind::kScan;
    const size_t kv_heads = Coin() ? 8 : random_() % 3;
    has_errors_ = Coin(), has_samples_ = Coin(), has_failures_ = Coin();
    for (size_t i = random_() % 7 * kv_heads; i > 0; --i) result.certificates.push_back(Head());
    const bool shares = Coin(), norms = Coin(), distances = Coin();
    const bool cis = Coin(), psaw = Coin(), etf = Coin();
    for (size_t i = 0; i < kv_heads; ++i) {
      result.groups.push_back({.action = ActionOf(random_()),
                               .scanned = Coin(),
                               .tokens_read = Number(),
                               .tokens_scanned = Number(),
                               .keys_sampled = Number(),
                               .rows_sampled = Number(),
                               .similarity = Stated(Coin()),
                               .sharing_estimate = Stated(shares),
                               .key_norm_max = Stated(norms),
                               .query_distance = Stated(distances)});
      result.assumed.push_back(
          {.cis_excess = Stated(cis), .psaw_dropped = Stated(psaw), .etf_excess = Stated(etf)});
    }
    for (size_t i = Coin() ? kv_heads : 0; i > 0; --i) {
      result.selected.emplace_back(random_() % 3 * 700, Number());
    }
    for (size_t i = Coin() ? random_() % 3 : 0; i > 0; --i) {
      result.deferred.push_back({.position = Number(), .query_count = Number(), .heads = {}});
      for (size_t n = random_() % 40; n > 0; --n) {
        result.deferred.back().heads.push_back({.upper = {Share()}, .lower = {Share()}});
      }
    }
    return result;
  }

 private:
  static Action ActionOf(size_t number) { return static_cast<Action>(number % 5); }
  bool Coin() { return random_() % 2 == 0; }
  // Of any number of bytes, 0 as well.
  uint32_t Number() { return static_cast<uint32_t>(uint64_t{random_()} >> random_() % 33); }
  double Share() { return static_cast<double>(random_()) / 0x1p32; }
  // Some say nothing.
  float Stated(bool any) { return any && Coin() ? static_cast<float>(Share()) : -1.0F; }

  HeadCertificate Head() {
    HeadCertificate head;
    head.level = static_cast<Level>(random_() % 4);
    head.action = ActionOf(random_());
    head.met = Coin();
    head.log_kept_lower.value = -Share();
    head.log_kept_upper.value = Share();
    head.log_dropped_lower.value = Coin() ? kLogZero : -Share();
    head.log_dropped_upper.value = Share();
    head.dropped_mass_lower.value = Share() / 2;
    head.dropped_mass_upper.value = Share();
    head.dropped_mass_estimate = Stated(true);
    if (has_errors_ && Coin()) head.output_error_upper = Coin() ? Share() : 0.0;
    if (has_errors_) head.value_norm_lower = Coin() ? Share() : 0.0;
    if (has_samples_ && Coin()) head.keys_sampled = Number();
    if (has_samples_ && Coin()) head.rows_sampled = Number();
    if (has_failures_ && Coin()) head.failure_probability = Share();
    return head;
  }

  std::mt19937 random_;
  bool has_errors_ = false, has_samples_ = false, has_failures_ = false;
};

TEST(EncodeRowTest, TheBytesAreProtobufs) {
  // Used again: what was there is gone.
  std::string bytes;
  for (uint32_t seed = 0; seed < 3'000; ++seed) {
    Rows rows(seed);
    const AttendCallRow row = rows.Row();
    const AttendRowResult result = rows.Result();
    EncodeRow(row, result, &bytes);
    ASSERT_EQ(bytes, Expected(row, result)) << seed;
    std::string fresh;
    EncodeRow(row, result, &fresh);
    ASSERT_EQ(bytes, fresh) << seed;
  }
}

TEST(EncodeRowTest, ARowMayBeLarge) {
  AttendRowResult result;
  result.certificates.resize(size_t{8} * 128);
  result.selected.emplace_back(1'000'000, 300'000);
  std::string bytes;
  EncodeRow({}, result, &bytes);
  EXPECT_EQ(bytes, Expected({}, result));
}

TEST(EncodeRowTest, ARowMayHaveFailed) {
  AttendRowResult result;
  result.status = MakeError(absl::StatusCode::kNotFound, "gone",
                            {.reason = "GONE", .field = "rows[0]", .metadata = {{"id", "ab"}}});
  std::string bytes = "something";
  EncodeRow({}, result, &bytes);
  EXPECT_EQ(bytes, Expected({}, result));
}

}  // namespace
}  // namespace kvservice
