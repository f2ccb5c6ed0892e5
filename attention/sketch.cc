#include "attention/sketch.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/float16.h"

#define KVSERVICE_SKETCH_NAMESPACE plain
#include "attention/sketch_encode-inl.h"

namespace kvservice {
namespace {

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

}  // namespace

constinit const std::array<float, 256> kRadiusScale = MakeRadiusScale();

void EncodeSketchPage(const KvLayout& layout, const std::byte* rows, uint32_t block_index,
                      const SketchTable& table, std::byte* page) {
  plain::encoding::EncodePage(layout, rows, block_index, table, page);
}

namespace {

using namespace plain::encoding;  // NOLINT(google-build-using-namespace)

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
    const Residual residual = MeasureResidual(at.dim, numbers, token, decoded.codes);
    if (!TokenHolds(at, decoded, numbers, residual, token)) return false;
  }
  return true;
}

}  // namespace kvservice
