// Encoding of one sketch page, in plain loops that every compiler vectorises. Included once per
// instruction set, with KVSERVICE_SKETCH_NAMESPACE naming the set: fixed orders of summation and no
// contraction make the bytes the same everywhere. The bounds that it checks are those of the
// specification, section 1.
//
// Included once per namespace; the guard toggles.

#if defined(KVSERVICE_ATTENTION_SKETCH_ENCODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVSERVICE_ATTENTION_SKETCH_ENCODE_INL_H_
#undef KVSERVICE_ATTENTION_SKETCH_ENCODE_INL_H_
#else
#define KVSERVICE_ATTENTION_SKETCH_ENCODE_INL_H_
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention/float16.h"
#include "attention/kv_layout.h"
#include "attention/log_mass.h"
#include "attention/sketch.h"
#include "attention/sketch_table.h"

namespace kvservice {
namespace KVSERVICE_SKETCH_NAMESPACE {
namespace encoding {

constexpr uint64_t kAllTokens = ~uint64_t{0};
constexpr double kStepMin = 0x1p-14;
// Every |e_c| is at most step / 2 times this.
constexpr double kCellMargin = 1.0 + 0x1p-12;
// A residual e = (k - lo) - (code + .5) step has one rounding of k - lo <= 16 step and one of e <=
// step; the product is exact (11 by 5 bits). So it is off by less than 17 * 2^-53 step; what is
// stored covers this much, in steps.
constexpr double kResidualError = 0x1p-48;
// Covers the rounding of a sum of up to 256 squares and its root, 256 * 2^-53, many times over.
constexpr double kNormMargin = 1.0 + 1e-9;
// A projection W_j.e is off by less than 256 roundings of its terms and the residual errors: (258 +
// 34) * 2^-53 sum |W_jc| h_c.
constexpr double kProjectionError = 0x1p-44;
// Least projection step in units of sum |W_jc| h_c, so that kProjectionError is a 2^-15 part of a
// step.
constexpr double kProjectionStepMin = 0x1p-29;
// |W_j.e - ps_j pj_j| is at most ps_j / 2 times this (half of the allowance in eps, the other half
// belongs to fp32 scans).
constexpr double kProjectionMargin = 1.0 + 0x1p-13;

// Keys of one page as numbers, and what encoding and verifying both need to know about its
// channels.
struct PageNumbers {
  alignas(64) std::array<float, size_t{kBlockTokens} * kHeadDimMax> k;  // [64][d]
  std::array<double, kBlockTokens> v_norm;                              // rounded up
  alignas(64) std::array<float, kHeadDimMax> lo;
  alignas(64) std::array<float, kHeadDimMax> step;
  // In doubles: lo, step, step / 2 * kCellMargin, kResidualError * step, metric and directions.
  alignas(64) std::array<double, kHeadDimMax> lo64;
  alignas(64) std::array<double, kHeadDimMax> step64;
  alignas(64) std::array<double, kHeadDimMax> cell;
  alignas(64) std::array<double, kHeadDimMax> slack;
  alignas(64) std::array<double, kHeadDimMax> metric;
  alignas(64) std::array<std::array<double, kHeadDimMax>, 4> weights;
  std::array<double, 4> projection_scale;  // sum_c |W_jc| h_c
};

// What the code of one token missed.
struct Residual {
  double norm = 0.0;  // ||M e||, rounded up
  std::array<double, 4> projection{};
  bool within_cells = true;
};

inline bool IsExact(uint64_t exact, uint32_t token) { return ((exact >> token) & 1) != 0; }

// Sum of products in eight independent lanes, which hides the latency of additions; count is a
// multiple of eight.
inline double Dot(uint32_t count, const double* a, const double* b) {
  std::array<double, 8> lanes{};
  for (uint32_t i = 0; i < count; i += 8) {
    for (uint32_t lane = 0; lane < 8; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

template <DType kType>
inline float LoadNumber(const std::byte* row, uint32_t index) {
  return LoadElement(kType, row, index);
}

// Reads keys and value norms; false if a number is not finite.
template <DType kType>
inline bool LoadRowsOf(const KvLayout& layout, const std::byte* rows, PageNumbers* numbers) {
  const uint32_t head_dim = layout.head_dim;
  uint32_t largest = 0;  // as the bits of a float without its sign
  bool finite = true;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    const std::byte* row = rows + static_cast<size_t>(token) * layout.row_bytes();
    float* k = &numbers->k[static_cast<size_t>(token) * head_dim];
    alignas(64) std::array<double, kHeadDimMax> v;
    for (uint32_t c = 0; c < head_dim; ++c) k[c] = LoadNumber<kType>(row, c);
    for (uint32_t c = 0; c < head_dim; ++c) {
      const uint32_t bits = std::bit_cast<uint32_t>(k[c]) & 0x7fffffffU;
      largest = bits > largest ? bits : largest;
    }
    for (uint32_t c = 0; c < head_dim; ++c) {
      v[c] = static_cast<double>(LoadNumber<kType>(row, head_dim + c));
    }
    const double v_squares = Dot(head_dim, v.data(), v.data());
    numbers->v_norm[token] = std::sqrt(v_squares) * kNormMargin;
    finite &= std::isfinite(v_squares);
  }
  constexpr uint32_t kInfinityBits = 0x7f800000U;
  return finite && largest < kInfinityBits;
}

inline bool LoadRows(const KvLayout& layout, const std::byte* rows, PageNumbers* numbers) {
  switch (layout.dtype) {
    case DType::kFloat32:
      return LoadRowsOf<DType::kFloat32>(layout, rows, numbers);
    case DType::kFloat16:
      return LoadRowsOf<DType::kFloat16>(layout, rows, numbers);
    default:
      return LoadRowsOf<DType::kBfloat16>(layout, rows, numbers);
  }
}

// Smallest binary16 number >= x, as bits; infinity when there is none.
inline uint16_t Float16RoundUp(double x) {
  uint16_t bits = Float16FromFloat(static_cast<float>(x));
  if (static_cast<double>(FloatFromFloat16(bits)) < x) ++bits;  // x is positive.
  return bits;
}

// Fills lo and step from the tokens not in `exact`. A step that overflows is an infinity:
// residuals, and with them rmax, are infinite then, and WriteRadii refuses them.
inline void ChooseCells(const KvLayout& layout, uint64_t exact, const PageNumbers& numbers,
                        float* lo, uint16_t* step) {
  const uint32_t head_dim = layout.head_dim;
  alignas(64) std::array<float, kHeadDimMax> low;
  alignas(64) std::array<float, kHeadDimMax> high;
  low.fill(std::numeric_limits<float>::infinity());
  high.fill(-std::numeric_limits<float>::infinity());
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (IsExact(exact, token)) continue;
    const float* k = &numbers.k[static_cast<size_t>(token) * head_dim];
    for (uint32_t c = 0; c < head_dim; ++c) {
      low[c] = k[c] < low[c] ? k[c] : low[c];
      high[c] = k[c] > high[c] ? k[c] : high[c];
    }
  }
  for (uint32_t c = 0; c < head_dim; ++c) {
    const double range = static_cast<double>(high[c]) - static_cast<double>(low[c]);
    lo[c] = low[c];
    step[c] = Float16RoundUp(std::max(range / 16.0 * (1.0 + 0x1p-11), kStepMin));
  }
}

// Takes lo and step from the page's bytes, so that all that follows is about what is stored.
inline void ReadCells(uint32_t head_dim, const SketchPage& page, const SketchTable& table,
                      PageNumbers* numbers) {
  numbers->projection_scale.fill(0.0);
  for (uint32_t c = 0; c < head_dim; ++c) {
    const float step = FloatFromFloat16(page.step[c]);
    numbers->lo[c] = page.lo[c];
    numbers->step[c] = step;
    numbers->lo64[c] = page.lo[c];
    numbers->step64[c] = step;
    numbers->cell[c] = static_cast<double>(step) / 2.0 * kCellMargin;
    numbers->slack[c] = kResidualError * static_cast<double>(step);
    numbers->metric[c] = table.metric[c];
  }
  for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
    for (uint32_t c = 0; c < head_dim; ++c) {
      const double weight = table.weights[j * head_dim + c];
      numbers->weights[j][c] = weight;
      numbers->projection_scale[j] += std::fabs(weight) * numbers->cell[c];
    }
  }
}

// In fp32: a number within 2^-19 of a boundary may get the cell on its other side, whose bound
// allows for 2^-13.
inline void WriteCodes(uint32_t head_dim, const PageNumbers& numbers, uint32_t token,
                       uint8_t* codes) {
  constexpr uint32_t kColumn = 4;
  const float* k = &numbers.k[static_cast<size_t>(token) * head_dim];
  const uint32_t half = head_dim / 2;
  alignas(64) std::array<int32_t, kHeadDimMax> code;
  for (uint32_t c = 0; c < head_dim; ++c) {
    // Not negative, so truncation is floor.
    const float cell = (k[c] - numbers.lo[c]) / numbers.step[c];
    code[c] = static_cast<int32_t>(cell < 15.0F ? cell : 15.0F);
  }
  alignas(64) std::array<uint8_t, kHeadDimMax / 2> pairs;
  for (uint32_t c = 0; c < half; ++c) {
    pairs[c] = static_cast<uint8_t>(code[c] | code[c + half] << 4);
  }
  for (uint32_t c = 0; c < half; c += kColumn) {
    std::memcpy(codes + CodeOffset(token, c), &pairs[c], kColumn);
  }
}

inline Residual MeasureResidual(uint32_t head_dim, const PageNumbers& numbers, uint32_t token,
                                const uint8_t* codes) {
  constexpr uint32_t kColumn = 4;
  const float* k = &numbers.k[static_cast<size_t>(token) * head_dim];
  const uint32_t half = head_dim / 2;
  alignas(64) std::array<uint8_t, kHeadDimMax / 2> pairs;
  for (uint32_t c = 0; c < half; c += kColumn) {
    std::memcpy(&pairs[c], codes + CodeOffset(token, c), kColumn);
  }
  alignas(64) std::array<int32_t, kHeadDimMax> code;
  for (uint32_t c = 0; c < half; ++c) {
    code[c] = pairs[c] & 15;
    code[c + half] = pairs[c] >> 4;
  }
  alignas(64) std::array<double, kHeadDimMax> e;
  alignas(64) std::array<double, kHeadDimMax> scaled;  // M e, each term rounded up
  alignas(64) std::array<double, kHeadDimMax> excess;
  for (uint32_t c = 0; c < head_dim; ++c) {
    const double step = numbers.step64[c];
    e[c] = (static_cast<double>(k[c]) - numbers.lo64[c]) - (code[c] + 0.5) * step;
    const double size = std::fabs(e[c]) + numbers.slack[c];
    excess[c] = size - numbers.cell[c];
    scaled[c] = size * numbers.metric[c];
  }
  Residual residual;
  // Written so that NaN counts as outside. The difference of two doubles is positive if and only if
  // the first is larger.
  uint32_t within = 0;
  for (uint32_t c = 0; c < head_dim; ++c) within += excess[c] <= 0.0 ? 1 : 0;
  residual.within_cells = within == head_dim;
  residual.norm = std::sqrt(Dot(head_dim, scaled.data(), scaled.data())) * kNormMargin;
  for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
    if (numbers.projection_scale[j] == 0.0) continue;  // No direction: every projection is zero.
    residual.projection[j] = Dot(head_dim, numbers.weights[j].data(), e.data());
  }
  return residual;
}

inline bool RadiusHolds(float largest, uint8_t code, double norm) {
  // The product of two floats is exact in double.
  return static_cast<double>(largest) * static_cast<double>(kRadiusScale[code]) >= norm;
}

// The largest code (smallest radius) that still covers `norm`, which is at most `largest`.
inline uint8_t RadiusCode(float largest, double norm) {
  if (norm == 0.0) return largest == 0.0F ? 0 : 255;
  uint8_t code = 0;
  for (uint8_t bit = 128; bit != 0; bit >>= 1) {
    const auto next = static_cast<uint8_t>(code | bit);
    if (RadiusHolds(largest, next, norm)) code = next;
  }
  return code;
}

inline bool ProjectionHolds(float step, int8_t code, double projection, double projection_scale) {
  const double miss = std::fabs(projection - static_cast<double>(step) * code);
  return miss + kProjectionError * projection_scale <=
         static_cast<double>(step) / 2.0 * kProjectionMargin;
}

// All that bounds use of one token, as the page has it: nothing else is believed of whatever made
// the page. `residual` is what the page's codes miss.
inline bool TokenHolds(const SketchLayout& at, const SketchPage& page, const PageNumbers& numbers,
                       const Residual& residual, uint32_t token) {
  if (!residual.within_cells) return false;
  if (!RadiusHolds(page.rmax, page.r[token], residual.norm)) return false;
  if (!RadiusHolds(page.vmax, page.vn[token], numbers.v_norm[token])) return false;
  for (uint32_t j = 0; j < at.direction_count; ++j) {
    if (!ProjectionHolds(page.ps[j], page.pj[j * kBlockTokens + token], residual.projection[j],
                         numbers.projection_scale[j])) {
      return false;
    }
  }
  return true;
}

inline void WriteAllExact(const SketchLayout& at, std::byte* page) {
  std::memset(page, 0, at.page_bytes);
  std::memcpy(page + at.exact, &kAllTokens, sizeof(kAllTokens));
  std::memcpy(page + at.version, &kSketchVersion, sizeof(kSketchVersion));
}

// Projection steps, the largest norms and every token's r, vn and pj. False if one of them cannot
// be represented or does not hold.
inline bool WriteRadii(const SketchLayout& at, uint64_t exact, const PageNumbers& numbers,
                       const std::array<Residual, kBlockTokens>& residuals, std::byte* page) {
  double rmax = 0.0;
  double vmax = 0.0;
  std::array<double, 4> projection_max{};
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (IsExact(exact, token)) continue;
    rmax = std::max(rmax, residuals[token].norm);
    vmax = std::max(vmax, numbers.v_norm[token]);
    for (uint32_t j = 0; j < at.direction_count; ++j) {
      projection_max[j] = std::max(projection_max[j], std::fabs(residuals[token].projection[j]));
    }
  }
  auto* ps = reinterpret_cast<float*>(page + at.ps);
  for (uint32_t j = 0; j < at.direction_count; ++j) {
    const double needed = projection_max[j] / 127.0 * (1.0 + 0x1p-40);
    ps[j] = RoundUpToFloat(std::max(needed, kProjectionStepMin * numbers.projection_scale[j]));
    if (!std::isfinite(ps[j])) return false;
  }
  const std::array<float, 2> norms = {RoundUpToFloat(rmax), RoundUpToFloat(vmax)};
  if (!std::isfinite(norms[0]) || !std::isfinite(norms[1])) return false;
  std::memcpy(page + at.norms, &norms[0], sizeof(float));
  std::memcpy(page + at.norms + 8, &norms[1], sizeof(float));

  const SketchPage stored(at, page);
  auto* r = reinterpret_cast<uint8_t*>(page + at.r);
  auto* vn = reinterpret_cast<uint8_t*>(page + at.vn);
  auto* pj = reinterpret_cast<int8_t*>(page + at.pj);
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (IsExact(exact, token)) continue;
    r[token] = RadiusCode(norms[0], residuals[token].norm);
    vn[token] = RadiusCode(norms[1], numbers.v_norm[token]);
    for (uint32_t j = 0; j < at.direction_count; ++j) {
      const double projection = residuals[token].projection[j];
      const double code = ps[j] > 0.0F ? std::rint(projection / static_cast<double>(ps[j])) : 0.0;
      pj[j * kBlockTokens + token] = static_cast<int8_t>(std::clamp(code, -127.0, 127.0));
    }
    if (!TokenHolds(at, stored, numbers, residuals[token], token)) return false;
  }
  return true;
}

inline float HalfCellNorm(uint32_t head_dim, const PageNumbers& numbers, const SketchTable& table) {
  double squares = 0.0;
  for (uint32_t c = 0; c < head_dim; ++c) {
    const double half = static_cast<double>(table.metric[c]) * numbers.step[c] / 2.0;
    squares += half * half;
  }
  return static_cast<float>(std::sqrt(squares));
}

inline void EncodePage(const KvLayout& layout, const std::byte* rows, uint32_t block_index,
                       const SketchTable& table, std::byte* page) {
  const SketchLayout at(layout.head_dim);
  const uint32_t head_dim = layout.head_dim;
  assert(table.metric.size() == head_dim);
  const uint64_t exact = block_index == 0 ? (uint64_t{1} << kSketchSinks) - 1 : 0;
  PageNumbers numbers;
  std::memset(page, 0, at.page_bytes);
  if (!LoadRows(layout, rows, &numbers)) return WriteAllExact(at, page);
  ChooseCells(layout, exact, numbers, reinterpret_cast<float*>(page + at.lo),
              reinterpret_cast<uint16_t*>(page + at.step));
  std::memcpy(page + at.exact, &exact, sizeof(exact));
  std::memcpy(page + at.version, &kSketchVersion, sizeof(kSketchVersion));
  ReadCells(head_dim, SketchPage(at, page), table, &numbers);

  std::array<Residual, kBlockTokens> residuals;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (IsExact(exact, token)) continue;
    auto* codes = reinterpret_cast<uint8_t*>(page);
    WriteCodes(head_dim, numbers, token, codes);
    residuals[token] = MeasureResidual(head_dim, numbers, token, codes);
  }
  const float hn = HalfCellNorm(head_dim, numbers, table);
  std::memcpy(page + at.norms + 4, &hn, sizeof(hn));
  if (!WriteRadii(at, exact, numbers, residuals, page)) WriteAllExact(at, page);
}

}  // namespace encoding
}  // namespace KVSERVICE_SKETCH_NAMESPACE
}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SKETCH_ENCODE_INL_H_
