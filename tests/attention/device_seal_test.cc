// Sketches of every device are the same to the byte: they are shared, stored and compared.

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attention/sketch.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kPages = 3;

class DeviceSeal : public ::testing::TestWithParam<std::string> {
 protected:
  const std::unique_ptr<Device> device_ = NewDeviceOrDie(GetParam());
};

void CompareWithPlainCode(Device* device, const CaseOptions& options) {
  const KvLayout& layout = options.layout;
  const KvCase kv(device, options);
  const SketchLayout sketch(layout.head_dim);
  const KvView view = kv.View(options.length);
  std::vector<std::byte> sealed(sketch.page_bytes);
  alignas(64) std::array<std::byte, SketchLayout(kHeadDimMax).page_bytes> plain;
  for (uint32_t block = 0; block < kPages; ++block) {
    for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
      const MemoryCopy read{view.sketches[block] + kv_head * sketch.page_bytes, sealed.data(),
                            sealed.size()};
      device->Copy({&read, 1});
      plain.fill(std::byte{0x5a});
      EncodeSketchPage(layout, kv.Row(kv_head, block * kBlockTokens), block, kv.tables()[kv_head],
                       plain.data());
      EXPECT_EQ(std::memcmp(plain.data(), sealed.data(), sealed.size()), 0)
          << Name(options.keys) << " d=" << layout.head_dim << " " << Name(layout.dtype)
          << " block " << block << " KV head " << kv_head;
    }
  }
}

TEST_P(DeviceSeal, TheBytesAreThoseOfThePlainCode) {
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    for (const DType dtype : {DType::kBfloat16, DType::kFloat16, DType::kFloat32}) {
      for (const Keys keys : kAllKeys) {
        for (const Tables tables : {Tables::kIdentity, Tables::kLearnt, Tables::kExtreme}) {
          CaseOptions options;
          options.layout = {
              .query_head_count = 2, .kv_head_count = 2, .head_dim = head_dim, .dtype = dtype};
          options.length = kPages * kBlockTokens;
          options.keys = keys;
          options.tables = tables;
          options.seed = head_dim;
          CompareWithPlainCode(device_.get(), options);
        }
      }
    }
  }
}

// Copies see what appends wrote, in either direction and within the device.
TEST_P(DeviceSeal, CopiesMoveRows) {
  CaseOptions options;
  options.length = kBlockTokens;
  const KvCase kv(device_.get(), options);
  const size_t bytes = options.layout.slice_bytes();
  absl::StatusOr<DeviceMemory> other = device_->Allocate(bytes);
  ASSERT_TRUE(other.ok());
  std::vector<std::byte> zero(bytes, std::byte{1});
  std::vector<std::byte> copied(bytes);
  const std::array<MemoryCopy, 3> copies = {
      {{other->data(), zero.data(), bytes},
       {kv.View(kBlockTokens).slices[0], other->data(), bytes},
       {other->data(), copied.data(), bytes}}};
  device_->Copy(copies);
  EXPECT_EQ(zero, std::vector<std::byte>(bytes)) << "memory of a device starts as zeros";
  EXPECT_EQ(std::memcmp(copied.data(), kv.Row(0, 0), bytes), 0);
}

INSTANTIATE_TEST_SUITE_P(All, DeviceSeal, ::testing::ValuesIn(DeviceNames()),
                         [](const auto& parameter) { return parameter.param; });

}  // namespace
}  // namespace kvservice::testing
