#include "selector/baselines/components.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>

namespace kvservice::baselines {
namespace {

// Two rows count as orthogonal below this cosine; sweeps converge quadratically, 10 are many.
constexpr double kCosineMax = 1e-12;
constexpr uint32_t kSweepsMax = 60;

// [channels][channels], without the factor 1 / n.
std::vector<double> Covariance(absl::Span<const float> rows, uint32_t channels) {
  const size_t count = rows.size() / channels;
  std::vector<double> mean(channels, 0.0);
  for (size_t i = 0; i < rows.size(); ++i) mean[i % channels] += rows[i];
  for (double& value : mean) value /= static_cast<double>(count);
  std::vector<double> covariance(size_t{channels} * channels, 0.0);
  std::vector<double> centred(channels);
  for (size_t row = 0; row < count; ++row) {
    for (uint32_t c = 0; c < channels; ++c) centred[c] = rows[row * channels + c] - mean[c];
    for (uint32_t a = 0; a < channels; ++a) {
      double* const out = covariance.data() + size_t{a} * channels;
      for (uint32_t b = 0; b < channels; ++b) out[b] += centred[a] * centred[b];
    }
  }
  return covariance;
}

double Dot(const double* a, const double* b, uint32_t channels) {
  return std::inner_product(a, a + channels, b, 0.0);
}

// Rotates two rows so that they become orthogonal. False if they are already.
bool Orthogonalize(double* a, double* b, uint32_t channels) {
  const double aa = Dot(a, a, channels);
  const double bb = Dot(b, b, channels);
  const double ab = Dot(a, b, channels);
  if (std::abs(ab) <= kCosineMax * std::sqrt(aa * bb)) return false;
  const double zeta = (bb - aa) / (2.0 * ab);
  const double tangent = std::copysign(1.0, zeta) / (std::abs(zeta) + std::hypot(1.0, zeta));
  const double cosine = 1.0 / std::hypot(1.0, tangent);
  const double sine = cosine * tangent;
  for (uint32_t c = 0; c < channels; ++c) {
    const double old = a[c];
    a[c] = cosine * old - sine * b[c];
    b[c] = sine * old + cosine * b[c];
  }
  return true;
}

}  // namespace

// One-sided Jacobi (Hestenes 1958): rotations from the left make the rows of the covariance
// orthogonal. The covariance is symmetric and positive semidefinite, so each row has then become an
// eigenvalue times its eigenvector.
std::vector<float> PrincipalComponents(absl::Span<const float> rows, uint32_t channels,
                                       uint32_t count) {
  std::vector<double> turned = Covariance(rows, channels);
  const auto row = [&](uint32_t i) { return turned.data() + size_t{i} * channels; };
  bool changed = true;
  for (uint32_t sweep = 0; changed && sweep < kSweepsMax; ++sweep) {
    changed = false;
    for (uint32_t a = 0; a + 1 < channels; ++a) {
      for (uint32_t b = a + 1; b < channels; ++b) {
        changed = Orthogonalize(row(a), row(b), channels) || changed;
      }
    }
  }
  std::vector<double> values(channels);
  for (uint32_t i = 0; i < channels; ++i) values[i] = std::sqrt(Dot(row(i), row(i), channels));
  std::vector<uint32_t> order(channels);
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return values[a] > values[b]; });
  std::vector<float> components(size_t{count} * channels, 0.0F);
  for (uint32_t i = 0; i < count; ++i) {
    const double value = values[order[i]];
    if (value == 0.0) break;
    for (uint32_t c = 0; c < channels; ++c) {
      components[size_t{i} * channels + c] = static_cast<float>(row(order[i])[c] / value);
    }
  }
  return components;
}

}  // namespace kvservice::baselines
