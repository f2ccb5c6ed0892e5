// Sealing on every target gives the bytes of the plain code, for ordinary and for hostile keys.

#include "attention/cpu/seal_kernel.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention/sketch.h"
#include "tests/attention/cpu_targets.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kPages = 3;

TEST(CpuSeal, TheBytesAreThoseOfThePlainCode) {
  const auto device = NewDeviceOrDie("reference");
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    for (const DType dtype : {DType::kBfloat16, DType::kFloat16, DType::kFloat32}) {
      for (const Keys keys : kAllKeys) {
        for (const Tables tables : {Tables::kIdentity, Tables::kLearnt, Tables::kExtreme}) {
          CaseOptions options;
          options.layout = {
              .query_head_count = 2, .kv_head_count = 1, .head_dim = head_dim, .dtype = dtype};
          options.length = kPages * kBlockTokens;
          options.keys = keys;
          options.tables = tables;
          options.seed = head_dim;
          const KvCase kv(device.get(), options);
          const size_t bytes = SketchLayout(head_dim).page_bytes;
          alignas(64) std::array<std::byte, SketchLayout(kHeadDimMax).page_bytes> plain;
          alignas(64) std::array<std::byte, SketchLayout(kHeadDimMax).page_bytes> sealed;
          for (uint32_t block = 0; block < kPages; ++block) {
            const std::byte* rows = kv.Row(0, block * kBlockTokens);
            plain.fill(std::byte{0x5a});
            EncodeSketchPage(options.layout, rows, block, kv.tables()[0], plain.data());
            OnEveryTarget([&] {
              sealed.fill(std::byte{0xa5});
              SealPage(options.layout, rows, block, kv.tables()[0], sealed.data());
              EXPECT_EQ(std::memcmp(plain.data(), sealed.data(), bytes), 0)
                  << Name(keys) << " d=" << head_dim << " " << Name(dtype) << " block " << block;
            });
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvservice::testing
