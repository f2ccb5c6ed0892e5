// The radius scale of sketches as a product of two entries of sixteen, which fit into a vector
// register each: a scan looks up a vector of radii without touching memory.

#ifndef KVSERVICE_ATTENTION_CPU_RADIUS_H_
#define KVSERVICE_ATTENTION_CPU_RADIUS_H_

#include <array>
#include <cstddef>

namespace kvservice {

inline constexpr size_t kRadiusParts = 16;

struct RadiusParts {
  constexpr RadiusParts() {
    // Covers the rounding of kRadiusScale, of both entries and of their product.
    constexpr double kUp = 1.0 + 0x1p-21;
    double power = 1.0;
    for (size_t code = 0; code < kRadiusParts * kRadiusParts; ++code) {
      if (code < kRadiusParts) low[code] = static_cast<float>(power * kUp);
      if (code % kRadiusParts == 0) {
        high[code / kRadiusParts] = static_cast<float>(power * (1.0 + 1e-6) * kUp);
      }
      power /= 1.02;
    }
  }

  alignas(64) std::array<float, kRadiusParts> high{};  // of the upper four bits of a code
  alignas(64) std::array<float, kRadiusParts> low{};   // of the lower four bits
};

// high[code / 16] * low[code % 16] in fp32 is at least kRadiusScale[code], and above it by less
// than one part in 2^19.
inline constexpr RadiusParts kRadiusOf;

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_RADIUS_H_
