#include "kvservice/error.h"

#include <gtest/gtest.h>

namespace kvservice {
namespace {

TEST(ErrorTest, DetailsComeBackAsTheyWentIn) {
  const ErrorDetails details{
      .reason = "POSITION_GAP",
      .field = "rows[2].position",
      .metadata = {{"current_length", "17"}, {"", ""}, {"odd", "3:a:b\n\0c"}, {"odd", "twice"}},
      .retry_delay_ms = 4000000000,
  };
  const absl::Status status = MakeError(absl::StatusCode::kOutOfRange, "a gap", details);
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(status.message(), "a gap");
  const ErrorDetails back = DetailsOf(status);
  EXPECT_EQ(back.reason, details.reason);
  EXPECT_EQ(back.field, details.field);
  EXPECT_EQ(back.metadata, details.metadata);
  EXPECT_EQ(back.retry_delay_ms, details.retry_delay_ms);
}

TEST(ErrorTest, BytesOfAnyKindSurvive) {
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all.push_back(static_cast<char>(byte));
  const absl::Status status = MakeError(absl::StatusCode::kInternal, "",
                                        {.reason = all, .field = all, .metadata = {{all, all}}});
  EXPECT_EQ(DetailsOf(status).reason, all);
  EXPECT_EQ(DetailsOf(status).field, all);
  EXPECT_EQ(DetailsOf(status).metadata.at(0).second, all);
}

TEST(ErrorTest, OtherStatusesHaveNoDetails) {
  for (const absl::Status& status :
       {absl::OkStatus(), absl::InternalError("something"), absl::Status()}) {
    const ErrorDetails details = DetailsOf(status);
    EXPECT_TRUE(details.reason.empty());
    EXPECT_TRUE(details.field.empty());
    EXPECT_TRUE(details.metadata.empty());
    EXPECT_EQ(details.retry_delay_ms, 0U);
  }
}

TEST(ErrorTest, InvalidFieldIsInvalidArgument) {
  const absl::Status status = InvalidField("q", "TENSOR_SHAPE_MISMATCH", "q has the wrong shape");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(DetailsOf(status).field, "q");
  EXPECT_EQ(DetailsOf(status).reason, "TENSOR_SHAPE_MISMATCH");
}

}  // namespace
}  // namespace kvservice
