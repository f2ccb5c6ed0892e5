#include "attention/sketch_learning.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/float16.h"

namespace kvservice {
namespace {

// Floors that keep one silent channel from taking all of the metric.
constexpr double kSquareFloor = 1e-3;  // of the queries' mean over the channels
constexpr double kRangeFloor = 1e-3;   // of the median channel
// The metric follows from what the directions leave, and they from the metric; it moves by less
// than a per cent after this many rounds.
constexpr uint32_t kMetricRounds = 2;
// Half of what a table may span, so that rounding cannot leave its limits.
constexpr double kMetricMax = 0x1p19;

// Vectors iterated beside the wanted ones: convergence depends on the eigenvalue ratio across them.
constexpr uint32_t kSpareVectors = 8;
constexpr uint32_t kIterationsMax = 300;
// ||A v - lambda v|| at which a vector is good enough, in units of the largest eigenvalue.
constexpr double kResidualMax = 1e-10;
// Eigenvalues below this part of the largest are rounding.
constexpr double kRankFloor = 1e-12;
constexpr uint32_t kJacobiSweepsMax = 60;

// Vectors are rows: [count][dim].
struct Rows {
  Rows(uint32_t row_count, uint32_t row_dim)
      : count(row_count), dim(row_dim), data(static_cast<size_t>(row_count) * row_dim) {}
  double* operator[](uint32_t i) { return &data[static_cast<size_t>(i) * dim]; }
  const double* operator[](uint32_t i) const { return &data[static_cast<size_t>(i) * dim]; }
  uint32_t count;
  uint32_t dim;
  std::vector<double> data;
};

double Dot(uint32_t dim, const double* a, const double* b) {
  double sum = 0.0;
  for (uint32_t i = 0; i < dim; ++i) sum += a[i] * b[i];
  return sum;
}

// splitmix64, as numbers in [-1, 1): a start that no structured matrix is orthogonal to.
double StartValue(uint64_t index) {
  uint64_t x = (index + 1) * 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  x ^= x >> 31;
  return static_cast<double>(static_cast<int64_t>(x)) * 0x1p-63;
}

// Gram-Schmidt, twice for each row because one pass leaves what cancellation hid. A row that
// depends on those before it becomes zero.
void Orthonormalise(Rows* rows) {
  for (uint32_t i = 0; i < rows->count; ++i) {
    double* row = (*rows)[i];
    const double before = std::sqrt(Dot(rows->dim, row, row));
    for (uint32_t pass = 0; pass < 2; ++pass) {
      for (uint32_t j = 0; j < i; ++j) {
        const double along = Dot(rows->dim, (*rows)[j], row);
        for (uint32_t c = 0; c < rows->dim; ++c) row[c] -= along * (*rows)[j][c];
      }
    }
    const double norm = std::sqrt(Dot(rows->dim, row, row));
    const double factor = norm > kRankFloor * before ? 1.0 / norm : 0.0;
    for (uint32_t c = 0; c < rows->dim; ++c) row[c] *= factor;
  }
}

// One rotation that makes a[p][q] zero; `a` is symmetric, the rows of `vectors` turn along.
// Source: Golub and Van Loan, Matrix Computations, 8.5.
void Rotate(uint32_t p, uint32_t q, Rows* a, Rows* vectors) {
  const double off = (*a)[p][q];
  if (off == 0.0) return;
  const double tau = ((*a)[q][q] - (*a)[p][p]) / (2.0 * off);
  const double t = (tau >= 0.0 ? 1.0 : -1.0) / (std::fabs(tau) + std::sqrt(1.0 + tau * tau));
  const double cosine = 1.0 / std::sqrt(1.0 + t * t);
  const double sine = t * cosine;
  for (uint32_t i = 0; i < a->dim; ++i) {
    const double ip = (*a)[i][p];
    const double iq = (*a)[i][q];
    (*a)[i][p] = cosine * ip - sine * iq;
    (*a)[i][q] = sine * ip + cosine * iq;
  }
  for (Rows* rows : {a, vectors}) {
    for (uint32_t i = 0; i < rows->dim; ++i) {
      const double pi = (*rows)[p][i];
      const double qi = (*rows)[q][i];
      (*rows)[p][i] = cosine * pi - sine * qi;
      (*rows)[q][i] = sine * pi + cosine * qi;
    }
  }
}

// Eigenvectors of a small symmetric matrix by cyclic Jacobi rotations, as rows in the order of
// falling eigenvalues; `a` is destroyed.
Rows SmallEigenvectors(Rows* a, std::vector<double>* values) {
  const uint32_t n = a->dim;
  Rows vectors(n, n);
  for (uint32_t i = 0; i < n; ++i) vectors[i][i] = 1.0;
  for (uint32_t sweep = 0; sweep < kJacobiSweepsMax; ++sweep) {
    double off = 0.0;
    double diagonal = 0.0;
    for (uint32_t i = 0; i < n; ++i) {
      diagonal += (*a)[i][i] * (*a)[i][i];
      for (uint32_t j = i + 1; j < n; ++j) off += (*a)[i][j] * (*a)[i][j];
    }
    if (!(off > std::numeric_limits<double>::epsilon() * kRankFloor * diagonal)) break;
    for (uint32_t p = 0; p < n; ++p) {
      for (uint32_t q = p + 1; q < n; ++q) Rotate(p, q, a, &vectors);
    }
  }
  std::vector<uint32_t> order(n);
  for (uint32_t i = 0; i < n; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [a](uint32_t i, uint32_t j) { return (*a)[i][i] > (*a)[j][j]; });
  Rows sorted(n, n);
  values->resize(n);
  for (uint32_t i = 0; i < n; ++i) {
    (*values)[i] = (*a)[order[i]][order[i]];
    std::copy_n(vectors[order[i]], n, sorted[i]);
  }
  return sorted;
}

// The best approximations to eigenvectors within the span of `basis` (Rayleigh-Ritz): `basis` and
// `image` = A basis are turned into them, `values` are their eigenvalues.
void TurnToEigenvectors(Rows* basis, Rows* image, std::vector<double>* values) {
  const uint32_t n = basis->count;
  Rows small(n, n);
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t j = 0; j < n; ++j) small[i][j] = Dot(basis->dim, (*basis)[i], (*image)[j]);
  }
  for (uint32_t i = 0; i < n; ++i) {
    for (uint32_t j = 0; j < i; ++j) small[i][j] = small[j][i];  // The two differ by rounding.
  }
  const Rows turn = SmallEigenvectors(&small, values);
  for (Rows* rows : {basis, image}) {
    Rows turned(n, rows->dim);
    for (uint32_t i = 0; i < n; ++i) {
      for (uint32_t j = 0; j < n; ++j) {
        for (uint32_t c = 0; c < rows->dim; ++c) turned[i][c] += turn[i][j] * (*rows)[j][c];
      }
    }
    *rows = turned;
  }
}

Rows Multiply(const std::vector<double>& matrix, const Rows& vectors) {
  Rows image(vectors.count, vectors.dim);
  for (uint32_t i = 0; i < vectors.count; ++i) {
    for (uint32_t c = 0; c < vectors.dim; ++c) {
      image[i][c] = Dot(vectors.dim, &matrix[static_cast<size_t>(c) * vectors.dim], vectors[i]);
    }
  }
  return image;
}

bool Converged(uint32_t count, const Rows& basis, const Rows& image,
               const std::vector<double>& values) {
  for (uint32_t i = 0; i < count; ++i) {
    double squares = 0.0;
    for (uint32_t c = 0; c < basis.dim; ++c) {
      const double residual = image[i][c] - values[i] * basis[i][c];
      squares += residual * residual;
    }
    if (!(std::sqrt(squares) <= kResidualMax * values[0])) return false;
  }
  return true;
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// The numbers, none below `floor`; all one if that leaves a zero.
void ApplyFloor(double floor, std::vector<double>* values) {
  for (double& value : *values) value = floor > 0.0 ? std::max(value, floor) : 1.0;
}

// Second moments of the queries with trace 1, so that nothing can overflow; empty without queries.
std::vector<double> UnitMoments(const SketchStatistics& statistics) {
  const uint32_t dim = statistics.head_dim();
  std::vector<double> moments(statistics.query_moments().begin(), statistics.query_moments().end());
  double trace = 0.0;
  for (uint32_t c = 0; c < dim; ++c) trace += moments[static_cast<size_t>(c) * dim + c];
  if (!(trace > 0.0)) return {};
  for (double& moment : moments) moment /= trace;
  return moments;
}

// Mean range of the pages in any unit, none of them too small.
std::vector<double> FlooredRanges(const SketchStatistics& statistics) {
  std::vector<double> ranges(statistics.range_sums().begin(), statistics.range_sums().end());
  // Where more than half of the channels are constant, the mean stands in for the median.
  double typical = Median(ranges);
  if (!(typical > 0.0)) {
    for (const double range : ranges) typical += range / static_cast<double>(ranges.size());
  }
  ApplyFloor(kRangeFloor * typical, &ranges);
  return ranges;
}

// M_c = sqrt(sqrt(squares_c) / ranges_c), all above 0, at geometric mean 1.
std::vector<double> MetricOf(const std::vector<double>& squares,
                             const std::vector<double>& ranges) {
  std::vector<double> metric(squares.size());
  double log_mean = 0.0;
  for (size_t c = 0; c < metric.size(); ++c) {
    metric[c] = 0.25 * std::log(squares[c]) - 0.5 * std::log(ranges[c]);
    log_mean += metric[c] / static_cast<double>(metric.size());
  }
  for (double& m : metric) m = std::clamp(std::exp(m - log_mean), 1.0 / kMetricMax, kMetricMax);
  return metric;
}

// What a table covers of the queries, in exact terms of their second moments.
class Covering {
 public:
  explicit Covering(std::vector<double> moments, uint32_t dim)
      : dim_(dim), moments_(std::move(moments)) {}

  // U for a metric: the top eigenvectors of sum q'q'^T.
  std::vector<double> Directions(const std::vector<double>& metric) const {
    return TopEigenvectors(dim_, Scaled(metric), SketchDirections(dim_));
  }

  // Mean square per channel of p = q - M U U^T (q / M), what the directions leave of a query, and
  // at least kSquareFloor / dim. With U made of eigenvectors of sum q'q'^T of eigenvalues l_j, that
  // is E q_c^2 - M_c^2 sum_j l_j U_jc^2. Pass no directions for the queries themselves.
  std::vector<double> UncoveredSquares(const std::vector<double>& metric,
                                       const std::vector<double>& directions) const {
    std::vector<double> squares(dim_);
    for (uint32_t c = 0; c < dim_; ++c) squares[c] = moments_[static_cast<size_t>(c) * dim_ + c];
    const std::vector<double> scaled = Scaled(metric);
    for (size_t begin = 0; begin < directions.size(); begin += dim_) {
      const double* u = &directions[begin];
      double eigenvalue = 0.0;
      for (uint32_t c = 0; c < dim_; ++c) {
        eigenvalue += u[c] * Dot(dim_, &scaled[static_cast<size_t>(c) * dim_], u);
      }
      for (uint32_t c = 0; c < dim_; ++c) {
        squares[c] -= metric[c] * metric[c] * eigenvalue * u[c] * u[c];
      }
    }
    for (double& square : squares) square = std::max(square, kSquareFloor / dim_);
    return squares;
  }

 private:
  std::vector<double> Scaled(const std::vector<double>& metric) const {
    std::vector<double> scaled = moments_;
    for (uint32_t i = 0; i < dim_; ++i) {
      for (uint32_t j = 0; j < dim_; ++j) {
        scaled[static_cast<size_t>(i) * dim_ + j] /= metric[i] * metric[j];
      }
    }
    return scaled;
  }

  uint32_t dim_;
  std::vector<double> moments_;  // [dim][dim], trace 1
};

}  // namespace

SketchStatistics::SketchStatistics(uint32_t head_dim)
    : head_dim_(head_dim),
      query_moments_(static_cast<size_t>(head_dim) * head_dim),
      range_sums_(head_dim) {}

absl::Status SketchStatistics::AddQuery(const float* query) {
  bool is_zero = true;
  for (uint32_t c = 0; c < head_dim_; ++c) {
    if (!std::isfinite(query[c])) {
      return absl::InvalidArgumentError(
          absl::StrCat("query[", c, "] is ", query[c], ", expected a finite number"));
    }
    is_zero &= query[c] == 0.0F;
  }
  if (is_zero) return absl::OkStatus();
  for (uint32_t i = 0; i < head_dim_; ++i) {
    double* row = &query_moments_[static_cast<size_t>(i) * head_dim_];
    const double factor = query[i];
    for (uint32_t j = 0; j < head_dim_; ++j) row[j] += factor * static_cast<double>(query[j]);
  }
  ++query_count_;
  return absl::OkStatus();
}

void SketchStatistics::AddPage(const KvLayout& layout, const std::byte* rows, uint64_t exact) {
  assert(layout.head_dim == head_dim_);
  std::array<float, kHeadDimMax> low;
  std::array<float, kHeadDimMax> high;
  low.fill(std::numeric_limits<float>::infinity());
  high.fill(-std::numeric_limits<float>::infinity());
  uint32_t token_count = 0;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (((exact >> token) & 1) != 0) continue;
    ++token_count;
    const std::byte* row = rows + static_cast<size_t>(token) * layout.row_bytes();
    for (uint32_t c = 0; c < head_dim_; ++c) {
      const float k = LoadElement(layout.dtype, row, c);
      if (!std::isfinite(k)) return;
      low[c] = std::min(low[c], k);
      high[c] = std::max(high[c], k);
    }
  }
  if (token_count < 2) return;
  for (uint32_t c = 0; c < head_dim_; ++c) {
    range_sums_[c] += static_cast<double>(high[c]) - static_cast<double>(low[c]);
  }
  ++page_count_;
}

absl::Status SketchStatistics::AddRange(absl::Span<const float> range) {
  assert(range.size() == head_dim_);
  for (uint32_t c = 0; c < head_dim_; ++c) {
    if (!std::isfinite(range[c]) || range[c] < 0.0F) {
      return absl::InvalidArgumentError(
          absl::StrCat("range[", c, "] is ", range[c], ", expected a finite number, 0 or more"));
    }
  }
  for (uint32_t c = 0; c < head_dim_; ++c) range_sums_[c] += static_cast<double>(range[c]);
  ++page_count_;
  return absl::OkStatus();
}

SketchTable LearnSketchTable(const SketchStatistics& statistics) {
  const uint32_t dim = statistics.head_dim();
  const std::vector<double> ranges = FlooredRanges(statistics);
  std::vector<double> moments = UnitMoments(statistics);
  SketchTable table = IdentitySketchTable(dim);
  if (moments.empty()) {
    const std::vector<double> metric = MetricOf(std::vector<double>(dim, 1.0), ranges);
    std::copy(metric.begin(), metric.end(), table.metric.begin());
  } else {
    const Covering covering(std::move(moments), dim);
    const std::vector<double> identity(dim, 1.0);
    std::vector<double> metric = MetricOf(covering.UncoveredSquares(identity, {}), ranges);
    std::vector<double> directions = covering.Directions(metric);
    for (uint32_t round = 0; round < kMetricRounds; ++round) {
      metric = MetricOf(covering.UncoveredSquares(metric, directions), ranges);
      directions = covering.Directions(metric);
    }
    std::copy(metric.begin(), metric.end(), table.metric.begin());
    std::copy(directions.begin(), directions.end(), table.directions.begin());
  }
  if (!NormalizeSketchTable(dim, &table).ok()) return IdentitySketchTable(dim);
  return table;
}

std::vector<double> TopEigenvectors(uint32_t dim, absl::Span<const double> matrix, uint32_t count) {
  assert(matrix.size() == static_cast<size_t>(dim) * dim && count <= dim);
  const std::vector<double> a(matrix.begin(), matrix.end());
  Rows basis(std::min(count + kSpareVectors, dim), dim);
  for (size_t i = 0; i < basis.data.size(); ++i) basis.data[i] = StartValue(i);
  std::vector<double> values;
  Orthonormalise(&basis);
  for (uint32_t iteration = 0; iteration < kIterationsMax; ++iteration) {
    Rows image = Multiply(a, basis);
    TurnToEigenvectors(&basis, &image, &values);
    if (Converged(count, basis, image, values)) break;
    basis = image;
    Orthonormalise(&basis);
  }
  std::vector<double> top(static_cast<size_t>(count) * dim);
  for (uint32_t i = 0; i < count; ++i) {
    if (!(values[i] > kRankFloor * values[0])) break;
    const double* vector = basis[i];
    const double* largest = std::max_element(
        vector, vector + dim, [](double x, double y) { return std::fabs(x) < std::fabs(y); });
    const double sign = *largest < 0.0 ? -1.0 : 1.0;
    for (uint32_t c = 0; c < dim; ++c) top[static_cast<size_t>(i) * dim + c] = sign * vector[c];
  }
  return top;
}

}  // namespace kvservice
