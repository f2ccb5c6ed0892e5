// Learnt tables: eigenvectors against known cases, the formula of the metric, and a valid table
// whatever the sample holds.

#include "attention/sketch_learning.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/device.h"
#include "attention/float16.h"
#include "attention/sketch.h"

namespace kvservice::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kFloatMax = std::numeric_limits<float>::max();
constexpr float kSubnormal = std::numeric_limits<float>::denorm_min();

// V diag(values) V^T with orthonormal V (columns of a product of reflections), row i of the
// result's `vectors` belonging to values[i].
struct KnownMatrix {
  explicit KnownMatrix(const std::vector<double>& values)
      : dim(static_cast<uint32_t>(values.size())), vectors(dim * dim), matrix(dim * dim) {
    for (uint32_t i = 0; i < dim; ++i) vectors[i * dim + i] = 1.0;
    for (uint32_t reflection = 1; reflection <= 3; ++reflection) Reflect(reflection);
    for (uint32_t i = 0; i < dim; ++i) {
      for (uint32_t r = 0; r < dim; ++r) {
        for (uint32_t c = 0; c < dim; ++c) {
          matrix[r * dim + c] += values[i] * vectors[i * dim + r] * vectors[i * dim + c];
        }
      }
    }
  }
  void Reflect(uint32_t seed) {
    std::vector<double> normal(dim);
    double squares = 0.0;
    for (uint32_t c = 0; c < dim; ++c) {
      normal[c] = std::sin(1.0 + c * seed);
      squares += normal[c] * normal[c];
    }
    for (uint32_t i = 0; i < dim; ++i) {
      double along = 0.0;
      for (uint32_t c = 0; c < dim; ++c) along += normal[c] * vectors[i * dim + c];
      for (uint32_t c = 0; c < dim; ++c) {
        vectors[i * dim + c] -= 2.0 * along / squares * normal[c];
      }
    }
  }
  uint32_t dim;
  std::vector<double> vectors;
  std::vector<double> matrix;
};

double Dot(uint32_t dim, const double* a, const double* b) {
  double sum = 0.0;
  for (uint32_t c = 0; c < dim; ++c) sum += a[c] * b[c];
  return sum;
}

TEST(TopEigenvectors, OfKnownMatrices) {
  for (const uint32_t dim : {2U, 12U, 64U, 256U}) {
    for (const double fall : {0.3, 0.9, 0.99}) {
      std::vector<double> values(dim);
      for (uint32_t i = 0; i < dim; ++i) values[i] = 1e3 * std::pow(fall, i);
      const KnownMatrix known(values);
      const uint32_t count = std::min(dim, 4U);
      const std::vector<double> top = TopEigenvectors(dim, known.matrix, count);
      for (uint32_t i = 0; i < count; ++i) {
        const double* vector = &top[i * dim];
        EXPECT_NEAR(std::fabs(Dot(dim, vector, &known.vectors[i * dim])), 1.0, 1e-9)
            << dim << " " << fall << " " << i;
        for (uint32_t j = 0; j < count; ++j) {
          EXPECT_NEAR(Dot(dim, vector, &top[j * dim]), i == j ? 1.0 : 0.0, 1e-12);
        }
        const double largest = *std::max_element(vector, vector + dim);
        EXPECT_GE(largest, -*std::min_element(vector, vector + dim));
      }
    }
  }
}

TEST(TopEigenvectors, EqualEigenvaluesGiveOrthonormalRows) {
  const KnownMatrix known(std::vector<double>(64, 2.0));
  const std::vector<double> top = TopEigenvectors(64, known.matrix, 3);
  for (uint32_t i = 0; i < 3; ++i) {
    for (uint32_t j = 0; j < 3; ++j) {
      EXPECT_NEAR(Dot(64, &top[i * 64], &top[j * 64]), i == j ? 1.0 : 0.0, 1e-12);
    }
  }
}

TEST(TopEigenvectors, RowsBeyondTheRankAreZero) {
  std::vector<double> values(64, 0.0);
  values[0] = 5.0;
  const KnownMatrix known(values);
  const std::vector<double> top = TopEigenvectors(64, known.matrix, 3);
  EXPECT_NEAR(std::fabs(Dot(64, top.data(), known.vectors.data())), 1.0, 1e-9);
  for (uint32_t i = 64; i < 3 * 64; ++i) EXPECT_EQ(top[i], 0.0);
  const std::vector<double> none = TopEigenvectors(64, std::vector<double>(64 * 64), 2);
  EXPECT_EQ(none, std::vector<double>(2 * 64));
}

class LearnedTable : public ::testing::TestWithParam<uint32_t> {
 protected:
  uint32_t head_dim() const { return GetParam(); }

  std::vector<float> Draw(float scale) {
    std::vector<float> numbers(head_dim());
    for (float& number : numbers) number = scale * normal_(random_);
    return numbers;
  }
  std::vector<float> Filled(float value) const { return std::vector<float>(head_dim(), value); }

  // Normalised, finite, and unchanged by what every registration does.
  void ExpectValid(const SketchTable& table) const {
    SketchTable again = table;
    ASSERT_TRUE(NormalizeSketchTable(head_dim(), &again).ok());
    EXPECT_EQ(table.weights.size(), table.directions.size());
    for (uint32_t c = 0; c < head_dim(); ++c) {
      EXPECT_GE(table.metric[c], 0x1p-20F);
      EXPECT_LE(table.metric[c], 0x1p20F);
      EXPECT_NEAR(again.metric[c] / table.metric[c], 1.0, 1e-3);
    }
    const std::vector<std::byte> stored = EncodeSketchTables(head_dim(), {&table, 1});
    const auto decoded = DecodeSketchTables(head_dim(), stored);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ((*decoded)[0], table);
  }

  std::vector<double> MetricOf(const std::vector<std::vector<float>>& queries,
                               const std::vector<double>& metric,
                               const std::vector<double>& directions,
                               const std::vector<double>& ranges) const {
    std::vector<double> squares(head_dim());
    for (const std::vector<float>& query : queries) {
      std::vector<double> left(query.begin(), query.end());
      for (size_t begin = 0; begin < directions.size(); begin += head_dim()) {
        double along = 0.0;
        for (uint32_t c = 0; c < head_dim(); ++c) {
          along += directions[begin + c] * static_cast<double>(query[c]) / metric[c];
        }
        for (uint32_t c = 0; c < head_dim(); ++c) {
          left[c] -= along * directions[begin + c] * metric[c];
        }
      }
      for (uint32_t c = 0; c < head_dim(); ++c) {
        squares[c] += left[c] * left[c] / static_cast<double>(queries.size());
      }
    }
    std::vector<double> next(head_dim());
    for (uint32_t c = 0; c < head_dim(); ++c)
      next[c] = std::sqrt(std::sqrt(squares[c]) / ranges[c]);
    return next;
  }
  std::vector<double> DirectionsOf(const std::vector<std::vector<float>>& queries,
                                   const std::vector<double>& metric) const {
    std::vector<double> moments(size_t{head_dim()} * head_dim());
    for (const std::vector<float>& query : queries) {
      for (uint32_t i = 0; i < head_dim(); ++i) {
        for (uint32_t j = 0; j < head_dim(); ++j) {
          moments[size_t{i} * head_dim() + j] +=
              static_cast<double>(query[i]) * query[j] / (metric[i] * metric[j]);
        }
      }
    }
    return TopEigenvectors(head_dim(), moments, SketchDirections(head_dim()));
  }

  std::mt19937_64 random_{7};
  std::normal_distribution<float> normal_;
};

INSTANTIATE_TEST_SUITE_P(HeadDims, LearnedTable, ::testing::Values(64U, 80U, 128U, 256U));

TEST_P(LearnedTable, FollowsTheFormula) {
  constexpr uint32_t kCount = 40;
  SketchStatistics statistics(head_dim());
  std::vector<std::vector<float>> queries;
  std::vector<double> ranges(head_dim());
  for (uint32_t i = 0; i < kCount; ++i) {
    std::vector<float> query = Draw(1.0F);
    std::vector<float> range = Draw(1.0F);
    for (uint32_t c = 0; c < head_dim(); ++c) {
      query[c] = 3.0F * std::cos(static_cast<float>(c)) + query[c] * static_cast<float>(1 + c % 5);
      range[c] = std::fabs(range[c]) * (1.0F + static_cast<float>(c % 3));
      ranges[c] += static_cast<double>(range[c]) / kCount;
    }
    ASSERT_TRUE(statistics.AddQuery(query.data()).ok());
    ASSERT_TRUE(statistics.AddRange(range).ok());
    queries.push_back(std::move(query));
  }
  EXPECT_EQ(statistics.query_count(), kCount);
  EXPECT_EQ(statistics.page_count(), kCount);
  const SketchTable table = LearnSketchTable(statistics);
  ExpectValid(table);

  // The same in plain steps: three metrics, each from what the directions of the one before leave
  // of every query.
  std::vector<double> metric(head_dim(), 1.0);
  std::vector<double> directions(table.directions.size());
  for (uint32_t round = 0; round < 3; ++round) {
    metric = MetricOf(queries, metric, directions, ranges);
    directions = DirectionsOf(queries, metric);
  }
  for (uint32_t c = 0; c < head_dim(); ++c) {
    EXPECT_NEAR(table.metric[c] / table.metric[0] / (metric[c] / metric[0]), 1.0, 1e-5);
  }
  for (size_t i = 0; i < directions.size(); ++i) {
    EXPECT_NEAR(table.directions[i], directions[i], 1e-5);
  }
}

TEST_P(LearnedTable, DirectionsCoverTheCommonPartOfQueries) {
  SketchStatistics statistics(head_dim());
  const std::vector<float> common = Draw(4.0F);
  for (uint32_t i = 0; i < 64; ++i) {
    std::vector<float> query = Draw(0.5F);
    for (uint32_t c = 0; c < head_dim(); ++c) query[c] += common[c];
    ASSERT_TRUE(statistics.AddQuery(query.data()).ok());
  }
  const SketchTable table = LearnSketchTable(statistics);
  ExpectValid(table);
  double along = 0.0;
  double squares = 0.0;
  for (uint32_t c = 0; c < head_dim(); ++c) {
    const double x = static_cast<double>(common[c]) / table.metric[c];
    along += x * table.directions[c];
    squares += x * x;
  }
  EXPECT_GT(along * along, 0.95 * squares);
}

TEST_P(LearnedTable, UnitsDoNotMatter) {
  std::vector<SketchTable> tables;
  for (const float unit : {1.0F, 0x1p-60F, 0x1p60F}) {
    random_.seed(3);
    normal_.reset();
    SketchStatistics statistics(head_dim());
    for (uint32_t i = 0; i < 20; ++i) {
      ASSERT_TRUE(statistics.AddQuery(Draw(unit).data()).ok());
      std::vector<float> range = Draw(unit);
      for (float& r : range) r = std::fabs(r);
      ASSERT_TRUE(statistics.AddRange(range).ok());
    }
    tables.push_back(LearnSketchTable(statistics));
  }
  for (const SketchTable& table : tables) {
    for (uint32_t c = 0; c < head_dim(); ++c) {
      EXPECT_NEAR(table.metric[c], tables[0].metric[c], 1e-5);
    }
    for (size_t i = 0; i < table.directions.size(); ++i) {
      EXPECT_NEAR(table.directions[i], tables[0].directions[i], 1e-5);
    }
  }
}

TEST_P(LearnedTable, ValidForAnySample) {
  const std::vector<float> sizes = {0.0F, 1.0F, kSubnormal, 1e-30F, 1e30F, kFloatMax};
  for (const uint32_t query_count : {0U, 1U, 3U}) {
    for (const float query_size : sizes) {
      for (const float range_size : sizes) {
        SketchStatistics statistics(head_dim());
        for (uint32_t i = 0; i < query_count; ++i) {
          std::vector<float> query = Filled(query_size);
          // One channel of another kind, so that the floors and the clamp are in play.
          query[i] = i == 0 ? kFloatMax : 0.0F;
          if (query_size == 0.0F) query[i] = 0.0F;
          ASSERT_TRUE(statistics.AddQuery(query.data()).ok());
        }
        std::vector<float> range = Filled(range_size);
        range[1] = kSubnormal;
        ASSERT_TRUE(statistics.AddRange(range).ok());
        ExpectValid(LearnSketchTable(statistics));
      }
    }
  }
}

TEST_P(LearnedTable, NothingSeenGivesTheIdentity) {
  SketchStatistics statistics(head_dim());
  EXPECT_EQ(LearnSketchTable(statistics), IdentitySketchTable(head_dim()));
  ASSERT_TRUE(statistics.AddQuery(Filled(0.0F).data()).ok());
  ASSERT_TRUE(statistics.AddRange(Filled(0.0F)).ok());
  EXPECT_EQ(statistics.query_count(), 0U);
  EXPECT_EQ(LearnSketchTable(statistics), IdentitySketchTable(head_dim()));
}

TEST_P(LearnedTable, RefusesWhatIsNotANumber) {
  SketchStatistics statistics(head_dim());
  ASSERT_TRUE(statistics.AddQuery(Draw(1.0F).data()).ok());
  ASSERT_TRUE(statistics.AddRange(Filled(1.0F)).ok());
  const SketchTable before = LearnSketchTable(statistics);
  for (const float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> numbers = Filled(1.0F);
    numbers.back() = bad;
    const std::string channel = "[" + std::to_string(head_dim() - 1) + "]";
    absl::Status status = statistics.AddQuery(numbers.data());
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message().find("query" + channel), 0U) << status;
    status = statistics.AddRange(numbers);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message().find("range" + channel), 0U) << status;
  }
  EXPECT_FALSE(statistics.AddRange(Filled(-1.0F)).ok());
  EXPECT_EQ(statistics.query_count(), 1U);
  EXPECT_EQ(statistics.page_count(), 1U);
  EXPECT_EQ(LearnSketchTable(statistics), before);
}

TEST_P(LearnedTable, SameSampleSameBits) {
  SketchStatistics a(head_dim());
  SketchStatistics b(head_dim());
  for (uint32_t i = 0; i < 20; ++i) {
    const std::vector<float> query = Draw(1.0F);
    ASSERT_TRUE(a.AddQuery(query.data()).ok());
    ASSERT_TRUE(b.AddQuery(query.data()).ok());
  }
  EXPECT_EQ(LearnSketchTable(a), LearnSketchTable(b));
}

// One page of keys whose channel c spans c + 1, and tokens that must not count.
class PageRanges : public LearnedTable {
 protected:
  PageRanges()
      : layout_{.query_head_count = 1, .kv_head_count = 1, .head_dim = head_dim()},
        rows_(layout_.slice_bytes()) {
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      for (uint32_t c = 0; c < head_dim(); ++c) {
        Set(token, c, token % 2 == 0 ? 0.0F : static_cast<float>(c % 64 + 1));
      }
    }
  }
  void Set(uint32_t token, uint32_t c, float value) {
    StoreElement(layout_.dtype, value, rows_.data() + layout_.RowOffset(0, token), c);
  }
  KvLayout layout_;
  std::vector<std::byte> rows_;
};

INSTANTIATE_TEST_SUITE_P(HeadDims, PageRanges, ::testing::Values(64U, 256U));

TEST_P(PageRanges, LeaveOutExactTokens) {
  Set(3, 0, 1000.0F);
  Set(60, 1, kInfinity);
  SketchStatistics statistics(head_dim());
  statistics.AddPage(layout_, rows_.data(), uint64_t{1} << 3 | uint64_t{1} << 60);
  EXPECT_EQ(statistics.page_count(), 1U);
  for (uint32_t c = 0; c < head_dim(); ++c) {
    EXPECT_EQ(statistics.range_sums()[c], c % 64 + 1.0);
  }
}

TEST_P(PageRanges, PagesThatSayNothing) {
  SketchStatistics statistics(head_dim());
  statistics.AddPage(layout_, rows_.data(), ~uint64_t{0});
  statistics.AddPage(layout_, rows_.data(), ~uint64_t{1});
  Set(9, 2, std::numeric_limits<float>::quiet_NaN());
  statistics.AddPage(layout_, rows_.data(), 0);
  EXPECT_EQ(statistics.page_count(), 0U);
  for (uint32_t c = 0; c < head_dim(); ++c) EXPECT_EQ(statistics.range_sums()[c], 0.0);
}

// What tables are for: on keys and queries with uneven channels and a common direction, sketches
// made with a learnt table have smaller residuals along the queries than those of the identity.
TEST_P(PageRanges, SketchesWithLearntTablesHold) {
  const SketchLayout at(head_dim());
  for (const float query_size : {1e-20F, 1.0F, 1e20F}) {
    SketchStatistics statistics(head_dim());
    statistics.AddPage(layout_, rows_.data(), 0);
    for (uint32_t i = 0; i < 5; ++i) {
      ASSERT_TRUE(statistics.AddQuery(Draw(query_size).data()).ok());
    }
    const SketchTable table = LearnSketchTable(statistics);
    ExpectValid(table);
    std::vector<std::byte> page(at.page_bytes + 64);
    std::byte* aligned = page.data() + (64 - reinterpret_cast<uintptr_t>(page.data()) % 64) % 64;
    EncodeSketchPage(layout_, rows_.data(), 1, table, aligned);
    EXPECT_TRUE(VerifySketchPage(layout_, rows_.data(), table, aligned));
    EXPECT_EQ(SketchPage(at, aligned).exact, 0U);
  }
}

}  // namespace
}  // namespace kvservice::testing
