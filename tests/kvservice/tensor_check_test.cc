#include "kvservice/tensor_check.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "attention/float16.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

constexpr int64_t kHuge = int64_t{1} << 62;

TEST(TensorBytesTest, MultipliesOrRefuses) {
  EXPECT_EQ(TensorBytes(DType::kFloat32, {}), 4U);
  EXPECT_EQ(TensorBytes(DType::kBfloat16, {3, 5}), 30U);
  EXPECT_EQ(TensorBytes(DType::kFloat16, {0, kHuge}), 0U);
  EXPECT_EQ(TensorBytes(DType::kFloat32, {-1}), std::nullopt);
  // Products that wrap around to a small number, or to exactly the right one.
  EXPECT_EQ(TensorBytes(DType::kFloat32, {int64_t{1} << 32, int64_t{1} << 32}), std::nullopt);
  EXPECT_EQ(TensorBytes(DType::kBfloat16, {kHuge, 2, 2}), std::nullopt);
  EXPECT_EQ(TensorBytes(DType::kBfloat16, {kHuge + 1, 4, 1}), std::nullopt);
  EXPECT_EQ(TensorBytes(DType::kFloat32, {INT64_MAX, INT64_MAX, INT64_MAX}), std::nullopt);
}

struct BadTensor {
  std::string reason;
  DType dtype;
  std::vector<int64_t> shape;
  size_t bytes;
};

TEST(CheckTensorTest, NamesWhatIsWrong) {
  const TensorExpectation expected{.shape = {kAnyExtent, 2, 8}, .dtype = DType::kBfloat16};
  const std::vector<BadTensor> table = {
      {"TENSOR_DTYPE_MISMATCH", DType::kFloat16, {1, 2, 8}, 32},
      {"TENSOR_DTYPE_MISMATCH", static_cast<DType>(77), {1, 2, 8}, 32},
      {"TENSOR_SHAPE_MISMATCH", DType::kBfloat16, {}, 0},
      {"TENSOR_SHAPE_MISMATCH", DType::kBfloat16, {2, 8}, 32},
      {"TENSOR_SHAPE_MISMATCH", DType::kBfloat16, {1, 1, 2, 8}, 32},
      {"TENSOR_SHAPE_MISMATCH", DType::kBfloat16, {0, 2, 8}, 0},
      {"TENSOR_SHAPE_MISMATCH", DType::kBfloat16, {-1, 2, 8}, 32},
      {"TENSOR_SHAPE_MISMATCH", DType::kBfloat16, {1, 8, 2}, 32},
      {"TENSOR_SHAPE_MISMATCH", DType::kBfloat16, {1, 2, int64_t{1} << 32}, 32},
      {"TENSOR_SIZE_MISMATCH", DType::kBfloat16, {1, 2, 8}, 31},
      {"TENSOR_SIZE_MISMATCH", DType::kBfloat16, {1, 2, 8}, 64},
      {"TENSOR_SIZE_MISMATCH", DType::kBfloat16, {2, 2, 8}, 32},
      // kHuge * 2 * 8 * 2 = 2^67, which is 0 modulo 2^64.
      {"TENSOR_SIZE_MISMATCH", DType::kBfloat16, {kHuge, 2, 8}, 0},
      // 2^59 + 1 tokens wrap to 32 bytes, the size of one.
      {"TENSOR_SIZE_MISMATCH", DType::kBfloat16, {(int64_t{1} << 59) + 1, 2, 8}, 32},
      {"TENSOR_SIZE_MISMATCH", DType::kBfloat16, {INT64_MAX, 2, 8}, 32},
  };
  const std::vector<std::byte> memory(64);
  for (const BadTensor& bad : table) {
    const TensorView tensor{.dtype = bad.dtype,
                            .shape = bad.shape,
                            .bytes = absl::MakeConstSpan(memory).first(bad.bytes),
                            .field = "k"};
    const absl::Status status = CheckTensor(tensor, expected);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_EQ(DetailsOf(status).reason, bad.reason) << status;
    EXPECT_EQ(DetailsOf(status).field, "k");
  }
  const std::vector<int64_t> good = {2, 2, 8};
  const TensorView tensor{.dtype = DType::kBfloat16, .shape = good, .bytes = memory, .field = "k"};
  EXPECT_TRUE(CheckTensor(tensor, expected).ok());
}

TEST(CheckFiniteTest, EveryPatternOfSixteenBits) {
  for (const DType dtype : {DType::kFloat16, DType::kBfloat16}) {
    for (uint32_t pattern = 0; pattern <= 0xffff; ++pattern) {
      const auto bits = static_cast<uint16_t>(pattern);
      const float value =
          dtype == DType::kFloat16 ? FloatFromFloat16(bits) : FloatFromBfloat16(bits);
      std::byte bytes[2];
      std::memcpy(bytes, &bits, 2);
      const TensorView tensor{.dtype = dtype, .shape = {}, .bytes = bytes, .field = "v"};
      ASSERT_EQ(CheckFinite(tensor, 0, 1).ok(), std::isfinite(value)) << pattern;
    }
  }
}

TEST(CheckFiniteTest, EveryExponentOfThirtyTwoBits) {
  for (uint32_t pattern = 0; pattern < (1U << 16); ++pattern) {
    for (const uint32_t low : {0U, 1U, 0xffffU}) {
      const uint32_t bits = pattern << 16 | low;
      std::byte bytes[4];
      std::memcpy(bytes, &bits, 4);
      const TensorView tensor{.dtype = DType::kFloat32, .shape = {}, .bytes = bytes, .field = "q"};
      ASSERT_EQ(CheckFinite(tensor, 0, 1).ok(), std::isfinite(std::bit_cast<float>(bits)));
    }
  }
}

TEST(CheckFiniteTest, TellsTheFirstBadIndexWherever) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    for (const size_t count : {1U, 2U, 255U, 256U, 257U, 600U, 1024U}) {
      for (size_t bad = 0; bad < count; bad += count < 300 ? 1 : 37) {
        // One odd byte in front: payloads on the wire are not aligned.
        std::vector<std::byte> memory(1 + count * ElementBytes(dtype));
        std::byte* const data = memory.data() + 1;
        for (size_t i = 0; i < count; ++i) StoreElement(dtype, -1.5F, data, i);
        StoreElement(dtype, INFINITY, data, bad);
        StoreElement(dtype, NAN, data, count - 1);
        const TensorView tensor{.dtype = dtype,
                                .shape = {},
                                .bytes = absl::MakeConstSpan(memory).subspan(1),
                                .field = "q"};
        const absl::Status status = CheckFinite(tensor, 0, count);
        const ErrorDetails details = DetailsOf(status);
        ASSERT_EQ(details.reason, "TENSOR_NOT_FINITE");
        ASSERT_EQ(details.field, "q");
        ASSERT_EQ(details.metadata.at(0).second, std::to_string(bad));
        ASSERT_TRUE(CheckFinite(tensor, 0, bad).ok()) << "what is before it is fine";
        ASSERT_FALSE(CheckFinite(tensor, bad, 1).ok());
      }
    }
  }
}

}  // namespace
}  // namespace kvservice
