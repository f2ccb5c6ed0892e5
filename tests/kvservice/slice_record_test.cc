#include "kvservice/cache/slice_record.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "kvservice/error.h"

namespace kvservice {
namespace {

SliceIdentity SomeIdentity() {
  SliceIdentity identity;
  identity.id.fill(std::byte{7});
  identity.layer = 3;
  identity.block = 9;
  identity.token_count = 64;
  identity.kv_bytes = 100;
  identity.sketch_bytes = 30;
  identity.previous.fill(std::byte{1});
  return identity;
}

std::string MakeRecord(const SliceIdentity& identity) {
  std::string record = BeginSliceRecord(identity);
  std::byte* const payload = SliceRecordPayload(&record);
  for (size_t i = 0; i < identity.kv_bytes + identity.sketch_bytes; ++i) {
    payload[i] = static_cast<std::byte>(i);
  }
  FinishSliceRecord(&record);
  return record;
}

std::string ReasonOf(const std::string& record, const SliceIdentity& expected) {
  const absl::StatusOr<SlicePayload> parsed = ParseSliceRecord(record, expected);
  if (parsed.ok()) return "OK";
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kDataLoss);
  return DetailsOf(parsed.status()).reason;
}

TEST(SliceRecordTest, WhatWasWrittenIsRead) {
  const SliceIdentity identity = SomeIdentity();
  const std::string record = MakeRecord(identity);
  EXPECT_EQ(record.size(), SliceRecordOverheadBytes() + 130);
  const absl::StatusOr<SlicePayload> parsed = ParseSliceRecord(record, identity);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->kv.size(), 100);
  EXPECT_EQ(parsed->sketch.size(), 30);
  EXPECT_EQ(parsed->kv[99], 99);
  EXPECT_EQ(parsed->sketch[0], 100);
}

TEST(SliceRecordTest, TheChecksumIsKnownWithoutTheRecord) {
  const SliceIdentity identity = SomeIdentity();
  const std::string record = MakeRecord(identity);
  const absl::StatusOr<SlicePayload> parsed = ParseSliceRecord(record, identity);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(ChecksumOfSlice(identity, parsed->kv, parsed->sketch), parsed->checksum);
  SliceIdentity other = identity;
  other.block += 1;
  EXPECT_NE(ChecksumOfSlice(other, parsed->kv, parsed->sketch), parsed->checksum);
}

TEST(SliceRecordTest, EveryFlippedBitIsSeen) {
  const SliceIdentity identity = SomeIdentity();
  const std::string record = MakeRecord(identity);
  for (size_t bit = 0; bit < 8 * record.size(); ++bit) {
    std::string damaged = record;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    ASSERT_EQ(ReasonOf(damaged, identity), "RECORD_DAMAGED") << bit;
  }
}

TEST(SliceRecordTest, EveryOtherLengthIsSeen) {
  const SliceIdentity identity = SomeIdentity();
  const std::string record = MakeRecord(identity);
  for (size_t length = 0; length < record.size(); ++length) {
    ASSERT_EQ(ReasonOf(record.substr(0, length), identity), "RECORD_DAMAGED") << length;
  }
  EXPECT_EQ(ReasonOf(record + '\0', identity), "RECORD_DAMAGED");
}

// Whole records, in the wrong place.
TEST(SliceRecordTest, ARecordOfAnotherPlaceOrTimeIsSeen) {
  const SliceIdentity identity = SomeIdentity();
  const auto reason_if = [&](auto change) {
    SliceIdentity other = identity;
    change(&other);
    return ReasonOf(MakeRecord(other), identity);
  };
  EXPECT_EQ(reason_if([](SliceIdentity*) {}), "OK");
  EXPECT_EQ(reason_if([](SliceIdentity* other) { other->id[0] = std::byte{8}; }), "RECORD_DAMAGED");
  EXPECT_EQ(reason_if([](SliceIdentity* other) { other->layer = 4; }), "RECORD_DAMAGED");
  EXPECT_EQ(reason_if([](SliceIdentity* other) { other->block = 8; }), "RECORD_DAMAGED");
  EXPECT_EQ(reason_if([](SliceIdentity* other) { other->token_count = 63; }), "RECORD_DAMAGED");
  EXPECT_EQ(reason_if([](SliceIdentity* other) { other->kv_bytes = 101; }), "RECORD_DAMAGED");
  EXPECT_EQ(reason_if([](SliceIdentity* other) { other->sketch_bytes = 0; }), "RECORD_DAMAGED");
  EXPECT_EQ(reason_if([](SliceIdentity* other) { other->previous[15] = std::byte{2}; }),
            "RECORD_DAMAGED");
}

// The seal is right, and what it seals is not.
TEST(SliceRecordTest, ASealDoesNotMakeARecord) {
  const SliceIdentity identity = SomeIdentity();
  const std::string record = MakeRecord(identity);
  const std::string bytes = record.substr(0, record.size() - sizeof(Checksum));
  for (const size_t at : {size_t{0}, size_t{4}, size_t{36}}) {  // magic, version, reserved
    std::string other = bytes;
    other[at] = static_cast<char>(other[at] + 1);
    Seal(&other);
    EXPECT_EQ(ReasonOf(other, identity), "RECORD_DAMAGED") << at;
  }
  std::string longer = bytes + "x";
  Seal(&longer);
  EXPECT_EQ(ReasonOf(longer, identity), "RECORD_DAMAGED");
}

}  // namespace
}  // namespace kvservice
