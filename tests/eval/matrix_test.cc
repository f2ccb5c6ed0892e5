// Matrix products of the decoder and the judge against plain loops in double.

#include "tests/eval/matrix.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include "tests/attention/cpu_targets.h"

namespace kvservice::eval {
namespace {

using testing::OnEveryTarget;

std::vector<float> Numbers(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& number : numbers) number = normal(random);
  return numbers;
}

struct Shape {
  size_t rows, from, to;
};

// Whole tiles and vectors of every target, and what is left of them; beyond what is multiplied row
// by row.
constexpr Shape kShapes[] = {{1, 16, 4},    {1, 7, 1},   {2, 64, 5},   {3, 33, 9},   {5, 640, 13},
                             {21, 100, 30}, {4, 20, 64}, {6, 70, 150}, {128, 48, 6}, {129, 48, 6}};

// Float32 sums of `count` products of standard size.
double Tolerance(size_t count) { return 1e-6 * (1.0 + static_cast<double>(count)); }

TEST(MultiplyRowsTest, IsThatOfPlainLoops) {
  OnEveryTarget([] {
    for (const auto& [rows, from, to] : kShapes) {
      const std::vector<float> x = Numbers(rows * from, 1), matrix = Numbers(to * from, 2);
      std::vector<float> out(rows * to + 1, 9.0F);
      MultiplyRows(rows, from, to, x.data(), matrix.data(), out.data());
      EXPECT_EQ(out.back(), 9.0F);
      for (size_t row = 0; row < rows; ++row) {
        for (size_t column = 0; column < to; ++column) {
          double sum = 0.0;
          for (size_t i = 0; i < from; ++i)
            sum += double{x[row * from + i]} * matrix[column * from + i];
          ASSERT_NEAR(out[row * to + column], sum, Tolerance(from))
              << rows << " " << from << " " << to << ": " << row << " " << column;
        }
      }
    }
  });
}

// A contender's numbers do not depend on who runs beside it.
TEST(MultiplyRowsTest, ARowDoesNotDependOnTheOthers) {
  OnEveryTarget([] {
    constexpr size_t kRows = 7, kFrom = 70, kTo = 10;
    const std::vector<float> x = Numbers(kRows * kFrom, 1), matrix = Numbers(kTo * kFrom, 2);
    std::vector<float> together(kRows * kTo), alone(kTo);
    MultiplyRows(kRows, kFrom, kTo, x.data(), matrix.data(), together.data());
    for (size_t row = 0; row < kRows; ++row) {
      MultiplyRows(1, kFrom, kTo, &x[row * kFrom], matrix.data(), alone.data());
      for (size_t i = 0; i < kTo; ++i) EXPECT_EQ(alone[i], together[row * kTo + i]);
    }
  });
}

TEST(MultiplyEachTest, RowsLieAnywhere) {
  constexpr size_t kFrom = 32, kTo = 6;
  const std::vector<float> x = Numbers(4 * kFrom, 1), matrix = Numbers(kTo * kFrom, 2);
  std::vector<float> in_order(4 * kTo), out(5 * kTo, 9.0F);
  MultiplyRows(4, kFrom, kTo, x.data(), matrix.data(), in_order.data());
  const float* const rows[] = {&x[3 * kFrom], x.data()};
  float* const outs[] = {out.data(), &out[3 * kTo]};
  MultiplyEach(rows, kFrom, kTo, matrix.data(), outs);
  for (size_t i = 0; i < kTo; ++i) {
    EXPECT_EQ(out[i], in_order[3 * kTo + i]);
    EXPECT_EQ(out[3 * kTo + i], in_order[i]);
    EXPECT_EQ(out[kTo + i], 9.0F);
    EXPECT_EQ(out[4 * kTo + i], 9.0F);
  }
}

TEST(AddMixesTest, IsThatOfPlainLoops) {
  OnEveryTarget([] {
    for (const auto& [rows, count, width] : kShapes) {
      for (const size_t tokens : {count, size_t{513} + count}) {
        const std::vector<float> weights = Numbers(rows * tokens, 1);
        const std::vector<float> v = Numbers(tokens * width, 2);
        // There is something already.
        std::vector<float> out = Numbers(rows * width, 3);
        const std::vector<float> before = out;
        std::vector<const float*> of_weights;
        std::vector<float*> of_out;
        for (size_t row = 0; row < rows; ++row) {
          of_weights.push_back(&weights[row * tokens]);
          of_out.push_back(&out[row * width]);
        }
        AddMixes(of_weights, tokens, width, v.data(), of_out);
        for (size_t row = 0; row < rows; ++row) {
          for (size_t c = 0; c < width; ++c) {
            double sum = before[row * width + c];
            for (size_t i = 0; i < tokens; ++i)
              sum += double{weights[row * tokens + i]} * v[i * width + c];
            ASSERT_NEAR(out[row * width + c], sum, Tolerance(tokens))
                << rows << " " << tokens << " " << width << ": " << row << " " << c;
          }
        }
      }
    }
  });
}

TEST(AddMixesTest, OfNothingNothingComes) {
  float out = 2.0F;
  const float* const weights[] = {nullptr};
  float* const outs[] = {&out};
  AddMixes(weights, 0, 1, nullptr, outs);
  EXPECT_EQ(out, 2.0F);
}

}  // namespace
}  // namespace kvservice::eval
