#include "attention/sketch.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/float16.h"
#include "attention/log_mass.h"

namespace kvservice {
namespace {

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

constexpr std::array<float, 256> MakeRadiusScale() {
  std::array<float, 256> scale{};
  // 1.02^-code by repeated division: the same bits wherever IEEE arithmetic is.
  double power = 1.0;
  for (float& entry : scale) {
    entry =
        std::bit_cast<float>(std::bit_cast<uint32_t>(static_cast<float>(power * (1.0 + 1e-6))) + 1);
    power /= 1.02;
  }
  return scale;
}

// Keys of one page as numbers, and what encoding and verifying both need to know about its
// channels.
struct PageNumbers {
  std::array<float, size_t{kBlockTokens} * kHeadDimMax> k;  // [64][d]
  std::array<double, kBlockTokens> v_norm;                  // rounded up
  std::array<double, kHeadDimMax> lo;
  std::array<double, kHeadDimMax> step;
  std::array<double, 4> projection_scale;  // sum_c |W_jc| h_c
};

// What the code of one token missed.
struct Residual {
  double norm = 0.0;  // ||M e||, rounded up
  std::array<double, 4> projection{};
  bool within_cells = true;
};

bool IsExact(uint64_t exact, uint32_t token) { return ((exact >> token) & 1) != 0; }

// Reads keys and value norms; false if a number is not finite.
bool LoadRows(const KvLayout& layout, const std::byte* rows, PageNumbers* numbers) {
  bool finite = true;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    const std::byte* row = rows + static_cast<size_t>(token) * layout.row_bytes();
    float* k = &numbers->k[static_cast<size_t>(token) * layout.head_dim];
    double v_squares = 0.0;
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      k[c] = LoadElement(layout.dtype, row, c);
      const double v = LoadElement(layout.dtype, row, layout.head_dim + c);
      v_squares += v * v;
      finite &= std::isfinite(k[c]);
    }
    numbers->v_norm[token] = std::sqrt(v_squares) * kNormMargin;
    finite &= std::isfinite(v_squares);
  }
  return finite;
}

// Smallest binary16 number >= x, as bits; infinity when there is none.
uint16_t Float16RoundUp(double x) {
  uint16_t bits = Float16FromFloat(static_cast<float>(x));
  if (static_cast<double>(FloatFromFloat16(bits)) < x) ++bits;  // x is positive.
  return bits;
}

// Fills lo and step from the tokens not in `exact`; false if a step overflows.
bool ChooseCells(const KvLayout& layout, uint64_t exact, const PageNumbers& numbers, float* lo,
                 uint16_t* step) {
  std::array<float, kHeadDimMax> low;
  std::array<float, kHeadDimMax> high;
  low.fill(std::numeric_limits<float>::infinity());
  high.fill(-std::numeric_limits<float>::infinity());
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (IsExact(exact, token)) continue;
    const float* k = &numbers.k[static_cast<size_t>(token) * layout.head_dim];
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      low[c] = std::min(low[c], k[c]);
      high[c] = std::max(high[c], k[c]);
    }
  }
  for (uint32_t c = 0; c < layout.head_dim; ++c) {
    const double range = static_cast<double>(high[c]) - static_cast<double>(low[c]);
    lo[c] = low[c];
    step[c] = Float16RoundUp(std::max(range / 16.0 * (1.0 + 0x1p-11), kStepMin));
    if (!std::isfinite(FloatFromFloat16(step[c]))) return false;
  }
  return true;
}

// Takes lo and step from the page's bytes, so that all that follows is about what is stored.
void ReadCells(uint32_t head_dim, const SketchPage& page, const SketchTable& table,
               PageNumbers* numbers) {
  numbers->projection_scale.fill(0.0);
  for (uint32_t c = 0; c < head_dim; ++c) {
    numbers->lo[c] = page.lo[c];
    numbers->step[c] = FloatFromFloat16(page.step[c]);
  }
  for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
    for (uint32_t c = 0; c < head_dim; ++c) {
      const double weight = std::fabs(static_cast<double>(table.weights[j * head_dim + c]));
      numbers->projection_scale[j] += weight * numbers->step[c] / 2.0 * kCellMargin;
    }
  }
}

void WriteCodes(uint32_t head_dim, const PageNumbers& numbers, uint32_t token, uint8_t* codes) {
  const float* k = &numbers.k[static_cast<size_t>(token) * head_dim];
  std::array<uint8_t, kHeadDimMax> code;
  for (uint32_t c = 0; c < head_dim; ++c) {
    // Not negative, so truncation is floor.
    const double cell = (static_cast<double>(k[c]) - numbers.lo[c]) / numbers.step[c];
    code[c] = static_cast<uint8_t>(std::min(cell, 15.0));
  }
  for (uint32_t c = 0; c < head_dim / 2; ++c) {
    codes[CodeOffset(token, c)] = static_cast<uint8_t>(code[c] | code[c + head_dim / 2] << 4);
  }
}

// Sum of products in four independent lanes, which hides the latency of additions; head_dim is a
// multiple of four.
template <typename Number>
double Dot(uint32_t count, const Number* a, const double* b) {
  std::array<double, 4> lanes{};
  for (uint32_t i = 0; i < count; i += 4) {
    for (uint32_t lane = 0; lane < 4; ++lane) {
      lanes[lane] += static_cast<double>(a[i + lane]) * b[i + lane];
    }
  }
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

Residual MeasureResidual(uint32_t head_dim, const PageNumbers& numbers, const SketchTable& table,
                         uint32_t token, const uint8_t* codes) {
  const float* k = &numbers.k[static_cast<size_t>(token) * head_dim];
  const uint32_t half = head_dim / 2;
  std::array<double, kHeadDimMax> e;
  for (uint32_t c = 0; c < half; ++c) {
    const uint8_t pair = codes[CodeOffset(token, c)];
    e[c] = (pair & 15) + 0.5;
    e[c + half] = (pair >> 4) + 0.5;
  }
  std::array<double, kHeadDimMax> scaled;  // M e, each term rounded up
  Residual residual;
  bool outside = false;
  for (uint32_t c = 0; c < head_dim; ++c) {
    const double step = numbers.step[c];
    e[c] = (static_cast<double>(k[c]) - numbers.lo[c]) - e[c] * step;
    const double size = std::fabs(e[c]) + kResidualError * step;
    // Written so that NaN counts as outside.
    outside |= !(size <= step / 2.0 * kCellMargin);
    scaled[c] = size * static_cast<double>(table.metric[c]);
  }
  residual.within_cells = !outside;
  residual.norm = std::sqrt(Dot(head_dim, scaled.data(), scaled.data())) * kNormMargin;
  for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
    if (numbers.projection_scale[j] == 0.0) continue;  // No direction: every projection is zero.
    residual.projection[j] = Dot(head_dim, &table.weights[j * head_dim], e.data());
  }
  return residual;
}

bool RadiusHolds(float largest, uint8_t code, double norm) {
  // The product of two floats is exact in double.
  return static_cast<double>(largest) * static_cast<double>(kRadiusScale[code]) >= norm;
}

// The largest code (smallest radius) that still covers `norm`, which is at most `largest`.
uint8_t RadiusCode(float largest, double norm) {
  if (norm == 0.0) return largest == 0.0F ? 0 : 255;
  const double steps = std::log(static_cast<double>(largest) / norm) / std::log(1.02);
  auto code = static_cast<uint8_t>(std::clamp(steps, 0.0, 255.0));
  while (code > 0 && !RadiusHolds(largest, code, norm)) --code;
  return code;
}

bool ProjectionHolds(float step, int8_t code, double projection, double projection_scale) {
  const double miss = std::fabs(projection - static_cast<double>(step) * code);
  return miss + kProjectionError * projection_scale <=
         static_cast<double>(step) / 2.0 * kProjectionMargin;
}

void WriteAllExact(const SketchLayout& at, std::byte* page) {
  std::memset(page, 0, at.page_bytes);
  std::memcpy(page + at.exact, &kAllTokens, sizeof(kAllTokens));
  std::memcpy(page + at.version, &kSketchVersion, sizeof(kSketchVersion));
}

// Projection steps, the largest norms and every token's r, vn and pj. False if one of them cannot
// be represented or does not hold.
bool WriteRadii(const SketchLayout& at, uint64_t exact, const PageNumbers& numbers,
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

  auto* r = reinterpret_cast<uint8_t*>(page + at.r);
  auto* vn = reinterpret_cast<uint8_t*>(page + at.vn);
  auto* pj = reinterpret_cast<int8_t*>(page + at.pj);
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (IsExact(exact, token)) continue;
    r[token] = RadiusCode(norms[0], residuals[token].norm);
    vn[token] = RadiusCode(norms[1], numbers.v_norm[token]);
    if (!RadiusHolds(norms[0], r[token], residuals[token].norm)) return false;
    if (!RadiusHolds(norms[1], vn[token], numbers.v_norm[token])) return false;
    for (uint32_t j = 0; j < at.direction_count; ++j) {
      const double projection = residuals[token].projection[j];
      const double code = ps[j] > 0.0F ? std::rint(projection / static_cast<double>(ps[j])) : 0.0;
      int8_t& stored = pj[j * kBlockTokens + token];
      stored = static_cast<int8_t>(std::clamp(code, -127.0, 127.0));
      if (!ProjectionHolds(ps[j], stored, projection, numbers.projection_scale[j])) return false;
    }
  }
  return true;
}

float HalfCellNorm(uint32_t head_dim, const PageNumbers& numbers, const SketchTable& table) {
  double squares = 0.0;
  for (uint32_t c = 0; c < head_dim; ++c) {
    const double half = static_cast<double>(table.metric[c]) * numbers.step[c] / 2.0;
    squares += half * half;
  }
  return static_cast<float>(std::sqrt(squares));
}

}  // namespace

constinit const std::array<float, 256> kRadiusScale = MakeRadiusScale();

SketchPage::SketchPage(const SketchLayout& layout, const std::byte* page)
    : codes(reinterpret_cast<const uint8_t*>(page)),
      lo(reinterpret_cast<const float*>(page + layout.lo)),
      step(reinterpret_cast<const uint16_t*>(page + layout.step)),
      pj(reinterpret_cast<const int8_t*>(page + layout.pj)),
      r(reinterpret_cast<const uint8_t*>(page + layout.r)),
      vn(reinterpret_cast<const uint8_t*>(page + layout.vn)),
      ps(reinterpret_cast<const float*>(page + layout.ps)) {
  std::memcpy(&exact, page + layout.exact, sizeof(exact));
  std::array<float, 3> norms;
  std::memcpy(norms.data(), page + layout.norms, sizeof(norms));
  rmax = norms[0];
  hn = norms[1];
  vmax = norms[2];
}

void EncodeSketchPage(const KvLayout& layout, const std::byte* rows, uint32_t block_index,
                      const SketchTable& table, std::byte* page) {
  const SketchLayout at(layout.head_dim);
  const uint32_t head_dim = layout.head_dim;
  assert(table.metric.size() == head_dim);
  const uint64_t exact = block_index == 0 ? (uint64_t{1} << kSketchSinks) - 1 : 0;
  PageNumbers numbers;
  std::memset(page, 0, at.page_bytes);
  if (!LoadRows(layout, rows, &numbers) ||
      !ChooseCells(layout, exact, numbers, reinterpret_cast<float*>(page + at.lo),
                   reinterpret_cast<uint16_t*>(page + at.step))) {
    WriteAllExact(at, page);
    return;
  }
  std::memcpy(page + at.exact, &exact, sizeof(exact));
  std::memcpy(page + at.version, &kSketchVersion, sizeof(kSketchVersion));
  ReadCells(head_dim, SketchPage(at, page), table, &numbers);

  std::array<Residual, kBlockTokens> residuals;
  bool valid = true;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (IsExact(exact, token)) continue;
    auto* codes = reinterpret_cast<uint8_t*>(page);
    WriteCodes(head_dim, numbers, token, codes);
    residuals[token] = MeasureResidual(head_dim, numbers, table, token, codes);
    valid &= residuals[token].within_cells;
  }
  const float hn = HalfCellNorm(head_dim, numbers, table);
  std::memcpy(page + at.norms + 4, &hn, sizeof(hn));
  if (!valid || !WriteRadii(at, exact, numbers, residuals, page)) WriteAllExact(at, page);
}

namespace {

// lo is the exact minimum of the sketched tokens and every step is a number that a scan may use.
bool CellsHold(const KvLayout& layout, uint64_t exact, const SketchPage& page,
               const PageNumbers& numbers) {
  for (uint32_t c = 0; c < layout.head_dim; ++c) {
    float low = std::numeric_limits<float>::infinity();
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      if (IsExact(exact, token)) continue;
      low = std::min(low, numbers.k[static_cast<size_t>(token) * layout.head_dim + c]);
    }
    const float step = FloatFromFloat16(page.step[c]);
    if (page.lo[c] != low || !std::isfinite(step) || !(static_cast<double>(step) >= kStepMin)) {
      return false;
    }
  }
  return true;
}

bool TokenHolds(const SketchLayout& at, const SketchPage& page, const PageNumbers& numbers,
                const SketchTable& table, uint32_t token) {
  const Residual residual = MeasureResidual(at.dim, numbers, table, token, page.codes);
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

bool NormsAreNumbers(const SketchLayout& at, const SketchPage& page) {
  bool valid = std::isfinite(page.rmax) && std::isfinite(page.vmax) && page.hn >= 0.0F;
  for (uint32_t j = 0; j < at.direction_count; ++j) {
    valid &= std::isfinite(page.ps[j]) && page.ps[j] >= 0.0F;
  }
  return valid;
}

}  // namespace

bool VerifySketchPage(const KvLayout& layout, const std::byte* rows, const SketchTable& table,
                      const std::byte* page) {
  const SketchLayout at(layout.head_dim);
  uint32_t version;
  std::memcpy(&version, page + at.version, sizeof(version));
  if (version != kSketchVersion) return false;
  const SketchPage decoded(at, page);
  if (decoded.exact == kAllTokens) return true;

  PageNumbers numbers;
  if (!LoadRows(layout, rows, &numbers) || !NormsAreNumbers(at, decoded) ||
      !CellsHold(layout, decoded.exact, decoded, numbers)) {
    return false;
  }
  ReadCells(layout.head_dim, decoded, table, &numbers);
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (IsExact(decoded.exact, token)) continue;
    if (!TokenHolds(at, decoded, numbers, table, token)) return false;
  }
  return true;
}

}  // namespace kvservice
