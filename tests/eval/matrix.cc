#include "tests/eval/matrix.h"

#include <cblas.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/eval/matrix.cc"
#include "hwy/foreach_target.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"
// clang-format on
#include "attention/cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// A tile of the result: so many rows of x times four of the matrix, each a vector of sums.
constexpr size_t kTileColumns = 4;
constexpr size_t kTileRows = hn::MaxLanes(hn::ScalableTag<float>()) / kTileColumns;

using TileRows = std::array<const float*, kTileRows>;
using TileColumns = std::array<const float*, kTileColumns>;

// sums[r][c] = x[r] . matrix[c] over `from` numbers. kFetchesNext: also asks for the rows of the
// matrix that follow these four, so that they come from memory while these are worked on. (Beyond
// the matrix a prefetch does nothing.)
template <bool kFetchesNext>
HWY_INLINE void MultiplyTile(size_t from, const TileRows& x, const TileColumns& matrix,
                             float (*sums)[kTileColumns]) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  constexpr size_t kLanes = hn::MaxLanes(hn::ScalableTag<float>());
  V tile[kTileRows][kTileColumns];
#pragma GCC unroll 4
  for (size_t r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (size_t c = 0; c < kTileColumns; ++c) tile[r][c] = hn::Zero(d);
  }
  size_t i = 0;
  for (; i + kLanes <= from; i += kLanes) {
    V columns[kTileColumns];
#pragma GCC unroll 4
    for (size_t c = 0; c < kTileColumns; ++c) {
      columns[c] = hn::LoadU(d, matrix[c] + i);
      if (kFetchesNext) hwy::Prefetch(matrix[c] + kTileColumns * from + i);
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < kTileRows; ++r) {
      const V row = hn::LoadU(d, x[r] + i);
#pragma GCC unroll 4
      for (size_t c = 0; c < kTileColumns; ++c)
        tile[r][c] = hn::MulAdd(row, columns[c], tile[r][c]);
    }
  }
  StoreTileSums<kTileRows>(d, tile, sums[0], kTileColumns);
  for (; i < from; ++i) {
    for (size_t r = 0; r < kTileRows; ++r) {
      for (size_t c = 0; c < kTileColumns; ++c) sums[r][c] += x[r][i] * matrix[c][i];
    }
  }
}

// Four rows of the matrix stay in the first-level cache while all rows of x pass: the matrix is
// read once and copied nowhere. Rows that a last tile lacks are others once more.
void MultiplyEachTarget(absl::Span<const float* const> x, size_t from, size_t to,
                        const float* matrix, absl::Span<float* const> out) {
  for (size_t column = 0; column < to; column += kTileColumns) {
    const size_t columns = std::min(kTileColumns, to - column);
    TileColumns of_matrix;
    for (size_t c = 0; c < kTileColumns; ++c) {
      of_matrix[c] = matrix + (column + std::min(c, columns - 1)) * from;
    }
    for (size_t row = 0; row < x.size(); row += kTileRows) {
      const size_t count = std::min(kTileRows, x.size() - row);
      TileRows of_x;
      for (size_t r = 0; r < kTileRows; ++r) of_x[r] = x[row + std::min(r, count - 1)];
      float sums[kTileRows][kTileColumns];
      row == 0 ? MultiplyTile<true>(from, of_x, of_matrix, sums)
               : MultiplyTile<false>(from, of_x, of_matrix, sums);
      for (size_t r = 0; r < count; ++r) {
        std::memcpy(out[row + r] + column, sums[r], columns * sizeof(float));
      }
    }
  }
}

// out[r][c] += sum over i of weights[r][i] v[i][c], for kMixRows rows and kMixVectors vectors of
// channels.
constexpr size_t kMixRows = 4;
constexpr size_t kMixVectors = hn::MaxLanes(hn::ScalableTag<float>()) == 16 ? 4 : 2;

HWY_INLINE void MixTile(const std::array<const float*, kMixRows>& weights, size_t count,
                        size_t width, const float* v, const std::array<float*, kMixRows>& out) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  constexpr size_t kLanes = hn::MaxLanes(hn::ScalableTag<float>());
  V sums[kMixRows][kMixVectors];
#pragma GCC unroll 4
  for (size_t r = 0; r < kMixRows; ++r) {
#pragma GCC unroll 4
    for (size_t c = 0; c < kMixVectors; ++c) sums[r][c] = hn::Zero(d);
  }
  for (size_t i = 0; i < count; ++i) {
    V values[kMixVectors];
#pragma GCC unroll 4
    for (size_t c = 0; c < kMixVectors; ++c) values[c] = hn::LoadU(d, v + i * width + c * kLanes);
#pragma GCC unroll 4
    for (size_t r = 0; r < kMixRows; ++r) {
      const V weight = hn::Set(d, weights[r][i]);
#pragma GCC unroll 4
      for (size_t c = 0; c < kMixVectors; ++c)
        sums[r][c] = hn::MulAdd(weight, values[c], sums[r][c]);
    }
  }
#pragma GCC unroll 4
  for (size_t r = 0; r < kMixRows; ++r) {
#pragma GCC unroll 4
    for (size_t c = 0; c < kMixVectors; ++c) {
      float* const to = out[r] + c * kLanes;
      hn::StoreU(hn::Add(hn::LoadU(d, to), sums[r][c]), d, to);
    }
  }
}

// Tokens that are added up before they go to the sum of all: fewer roundings, and their values stay
// in the second-level cache.
constexpr size_t kMixStretch = 512;

// Rows that the last tile lacks are mixed into a place that nobody reads.
HWY_INLINE void MixStretch(const float* const* weights, size_t rows, size_t count, size_t width,
                           const float* v, float* const* out) {
  constexpr size_t kChannels = kMixVectors * hn::MaxLanes(hn::ScalableTag<float>());
  float unread[kChannels] = {};
  size_t channel = 0;
  for (; channel + kChannels <= width; channel += kChannels) {
    std::array<const float*, kMixRows> of_weights;
    std::array<float*, kMixRows> of_out;
    for (size_t r = 0; r < kMixRows; ++r) {
      of_weights[r] = weights[std::min(r, rows - 1)];
      of_out[r] = r < rows ? out[r] + channel : unread;
    }
    MixTile(of_weights, count, width, v + channel, of_out);
  }
  for (; channel < width; ++channel) {
    for (size_t r = 0; r < rows; ++r) {
      float sum = 0.0F;
      for (size_t i = 0; i < count; ++i) sum += weights[r][i] * v[i * width + channel];
      out[r][channel] += sum;
    }
  }
}

void AddMixesTarget(absl::Span<const float* const> weights, size_t count, size_t width,
                    const float* v, absl::Span<float* const> out) {
  for (size_t begin = 0; begin < count; begin += kMixStretch) {
    const size_t stretch = std::min(kMixStretch, count - begin);
    for (size_t row = 0; row < weights.size(); row += kMixRows) {
      const size_t rows = std::min(kMixRows, weights.size() - row);
      std::array<const float*, kMixRows> of_weights;
      for (size_t r = 0; r < rows; ++r) of_weights[r] = weights[row + r] + begin;
      MixStretch(of_weights.data(), rows, stretch, width, v + begin * width, &out[row]);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(MultiplyEachTarget);
HWY_EXPORT(AddMixesTarget);

namespace eval {
namespace {

// Up to here BLAS, which copies the matrix into an order of its own first, is slower.
constexpr size_t kFewRows = 128;

blasint Int(size_t value) { return static_cast<blasint>(value); }

}  // namespace

void UseOneThread() { openblas_set_num_threads(1); }

void MultiplyRows(size_t rows, size_t from, size_t to, const float* x, const float* matrix,
                  float* out) {
  if (rows <= kFewRows) {
    std::array<const float*, kFewRows> x_rows;
    std::array<float*, kFewRows> out_rows;
    for (size_t row = 0; row < rows; ++row) {
      x_rows[row] = x + row * from;
      out_rows[row] = out + row * to;
    }
    MultiplyEach({x_rows.data(), rows}, from, to, matrix, {out_rows.data(), rows});
    return;
  }
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(rows), Int(to), Int(from), 1.0F, x,
              Int(from), matrix, Int(from), 0.0F, out, Int(to));
}

void MultiplyEach(absl::Span<const float* const> x, size_t from, size_t to, const float* matrix,
                  absl::Span<float* const> out) {
  assert(x.size() == out.size());
  HWY_DYNAMIC_DISPATCH(MultiplyEachTarget)(x, from, to, matrix, out);
}

void AddMixes(absl::Span<const float* const> weights, size_t count, size_t width, const float* v,
              absl::Span<float* const> out) {
  assert(weights.size() == out.size());
  HWY_DYNAMIC_DISPATCH(AddMixesTarget)(weights, count, width, v, out);
}

void ScoreKeys(size_t rows, size_t keys, size_t width, float scale, const float* q, size_t q_stride,
               const float* k, float* scores) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(rows), Int(keys), Int(width), scale, q,
              Int(q_stride), k, Int(width), 0.0F, scores, Int(keys));
}

void MixValues(size_t rows, size_t keys, size_t width, const float* weights, const float* v,
               float* out, size_t out_stride) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Int(rows), Int(width), Int(keys), 1.0F,
              weights, Int(keys), v, Int(width), 0.0F, out, Int(out_stride));
}

}  // namespace eval
}  // namespace kvservice
#endif  // HWY_ONCE
