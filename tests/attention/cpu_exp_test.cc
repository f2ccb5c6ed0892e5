// The vector exponential and soft-cap against long double, on every target: the errors that bounds
// count on (attention/cpu/exp.h). The environment variable KVSERVICE_EXP_STRIDE sets how many
// floats are stepped over; 1 tries every float.

#include "attention/cpu/exp.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "absl/types/span.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/attention/cpu_exp_test.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on
#include "attention/cpu/exp-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using TestTag = hn::CappedTag<float, 16>;

// In place; the size is a multiple of 16.
void ExpArray(absl::Span<float> x, int32_t reference) {
  const TestTag d;
  const hn::RebindToSigned<TestTag> di;
  for (size_t i = 0; i < x.size(); i += hn::Lanes(d)) {
    hn::StoreU(ExpScaled(d, hn::LoadU(d, &x[i]), hn::Set(di, reference)), d, &x[i]);
  }
}

void ExponentArray(absl::Span<float> x) {
  const TestTag d;
  for (size_t i = 0; i < x.size(); i += hn::Lanes(d)) {
    const auto bits = ExpExponentBits(d, hn::LoadU(d, &x[i]));
    hn::StoreU(hn::Sub(bits, hn::Set(d, kRoundingMagic)), d, &x[i]);
  }
}

void SoftcapArray(absl::Span<float> x, float cap) {
  const TestTag d;
  for (size_t i = 0; i < x.size(); i += hn::Lanes(d)) {
    hn::StoreU(SoftcapVector(d, hn::LoadU(d, &x[i]), hn::Set(d, cap)), d, &x[i]);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "tests/attention/cpu_targets.h"

namespace kvservice {
namespace {

HWY_EXPORT(ExpArray);
HWY_EXPORT(ExponentArray);
HWY_EXPORT(SoftcapArray);

constexpr size_t kChunk = 4096;

uint32_t Stride() {
  const char* text = std::getenv("KVSERVICE_EXP_STRIDE");
  return text == nullptr ? 9973
                         : static_cast<uint32_t>(std::max(1UL, std::strtoul(text, nullptr, 10)));
}

// Calls check(numbers) with every stride-th float of both signs up to `largest`, by chunks.
template <typename Check>
void SweepFloats(float largest, const Check& check) {
  const uint32_t stride = Stride();
  const uint64_t end = uint64_t{std::bit_cast<uint32_t>(largest)} + 1;
  std::vector<float> numbers;
  const auto flush = [&] {
    if (numbers.empty()) return;
    numbers.resize((numbers.size() + 15) / 16 * 16, numbers.back());
    check(numbers);
    numbers.clear();
  };
  for (uint64_t bits = 0; bits < end; bits += stride) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(bits));
    numbers.push_back(x);
    numbers.push_back(-x);
    if (numbers.size() >= kChunk) flush();
  }
  flush();
}

// Relative error of e^x at the reference next to it, where the result is near 1.
double WorstError(float largest) {
  double worst = 0.0;
  SweepFloats(largest, [&](const std::vector<float>& numbers) {
    std::vector<float> exponents = numbers;
    HWY_DYNAMIC_DISPATCH(ExponentArray)(absl::MakeSpan(exponents));
    for (size_t i = 0; i < numbers.size(); i += 16) {
      // One reference per call: that of the group's first number, which scales all exactly.
      const auto reference = static_cast<int32_t>(exponents[i]);
      std::vector<float> result(numbers.begin() + static_cast<ptrdiff_t>(i),
                                numbers.begin() + static_cast<ptrdiff_t>(i) + 16);
      HWY_DYNAMIC_DISPATCH(ExpArray)(absl::MakeSpan(result), reference);
      for (size_t j = 0; j < 16; ++j) {
        const int32_t difference = static_cast<int32_t>(exponents[i + j]) - reference;
        if (difference < -100 || difference > 100) continue;
        const long double exact =
            std::exp2(static_cast<long double>(numbers[i + j]) * 1.44269504088896340735992468L -
                      static_cast<long double>(reference));
        const auto error =
            static_cast<double>(std::fabs(static_cast<long double>(result[j]) / exact - 1.0L));
        worst = std::max(worst, error);
      }
    }
  });
  return worst;
}

TEST(CpuExp, ErrorIsWithinWhatBoundsCountOn) {
  testing::OnEveryTarget([] {
    const double small = WorstError(1024.0F);
    EXPECT_LE(small, kExpError);
    EXPECT_GT(small, 1e-9) << "nothing was compared";
    // Exact products of the first two parts of ln 2 end here; so does the error of the reduction.
    EXPECT_LE(WorstError(16384.0F), kExpError + kExpArgumentError * 16384.0);
    EXPECT_LE(WorstError(static_cast<float>(kLogitMax)), kExpError + kExpArgumentError * kLogitMax);
  });
}

TEST(CpuExp, ExponentsRiseWithTheirNumbers) {
  testing::OnEveryTarget([] {
    std::vector<float> exponents;
    for (int i = -64 * 1024; i < 64 * 1024; ++i) exponents.push_back(static_cast<float>(i) / 64.0F);
    HWY_DYNAMIC_DISPATCH(ExponentArray)(absl::MakeSpan(exponents));
    EXPECT_TRUE(std::is_sorted(exponents.begin(), exponents.end()));
  });
}

TEST(CpuExp, EndsOfTheRange) {
  testing::OnEveryTarget([] {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    std::vector<float> x = {-kInfinity, kLogitMin, -3e38F, -88.0F, -87.0F, 0.0F, 88.0F, 1e-45F};
    x.resize(16, std::numeric_limits<float>::quiet_NaN());
    std::vector<float> y = x;
    HWY_DYNAMIC_DISPATCH(ExpArray)(absl::MakeSpan(y), 0);
    EXPECT_EQ(y[0], 0.0F);
    EXPECT_EQ(y[1], 0.0F);
    EXPECT_EQ(y[2], 0.0F);
    EXPECT_EQ(y[3], 0.0F) << "below 2^-126 is nothing";
    EXPECT_GT(y[4], 0.0F);
    EXPECT_EQ(y[5], 1.0F);
    EXPECT_LT(y[6], kInfinity);
    EXPECT_EQ(y[7], 1.0F);
    EXPECT_TRUE(std::isnan(y[8]));
    // With the lowest reference there is, an absent logit still weighs nothing.
    y = x;
    HWY_DYNAMIC_DISPATCH(ExpArray)(absl::MakeSpan(y), kReferenceMin);
    EXPECT_EQ(y[0], 0.0F);
    EXPECT_EQ(y[1], 0.0F);
  });
}

TEST(CpuExp, SoftcapErrorIsWithinWhatBoundsCountOn) {
  testing::OnEveryTarget([] {
    for (const float cap : {5.0F, 30.0F, 50.0F}) {
      double worst = 0.0;
      SweepFloats(1e6F, [&](const std::vector<float>& numbers) {
        std::vector<float> capped = numbers;
        HWY_DYNAMIC_DISPATCH(SoftcapArray)(absl::MakeSpan(capped), cap);
        for (size_t i = 0; i < numbers.size(); ++i) {
          const long double exact =
              cap * std::tanh(static_cast<long double>(numbers[i]) / static_cast<long double>(cap));
          worst = std::max(worst, static_cast<double>(std::fabs(capped[i] - exact)));
        }
      });
      EXPECT_LE(worst, kTanhError * static_cast<double>(cap));
    }
    std::vector<float> ends(16, std::numeric_limits<float>::infinity());
    ends[1] = -ends[0];
    ends[2] = std::numeric_limits<float>::quiet_NaN();
    HWY_DYNAMIC_DISPATCH(SoftcapArray)(absl::MakeSpan(ends), 50.0F);
    EXPECT_EQ(ends[0], 50.0F);
    EXPECT_EQ(ends[1], -50.0F);
    EXPECT_TRUE(std::isnan(ends[2]));
  });
}

}  // namespace
}  // namespace kvservice
#endif  // HWY_ONCE
