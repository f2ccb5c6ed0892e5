// The schedule that PSAW and ETF share: a prefix of the past that grows with depth; and a prefix by
// a share that was found for a layer. Pure; any thread.

#ifndef KVSERVICE_SELECTOR_DEPTH_SCHEDULE_H_
#define KVSERVICE_SELECTOR_DEPTH_SCHEDULE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace kvservice {

// floor((1 - share^(exponent (layer - first) / (layer_count - first))) length), 0 below `first`.
//   share     in (0, 1]: what is left of the past at the top
//   exponent  >= 0
//   first     a layer; layer_count or more = no layer has a prefix
inline uint32_t DepthPrefix(double share, double exponent, uint32_t layer, uint32_t first,
                            uint32_t layer_count, uint32_t length) {
  if (layer < first || first >= layer_count) return 0;
  const double depth =
      static_cast<double>(layer - first) / static_cast<double>(layer_count - first);
  const double left_out = 1.0 - std::pow(share, exponent * depth);
  const double count = std::floor(left_out * static_cast<double>(length));
  return static_cast<uint32_t>(std::clamp(count, 0.0, static_cast<double>(length)));
}

// floor(share length), share in [0, 1).
inline uint32_t SharePrefix(float share, uint32_t length) {
  // The product is exact in double.
  return static_cast<uint32_t>(static_cast<double>(share) * static_cast<double>(length));
}

}  // namespace kvservice

#endif  // KVSERVICE_SELECTOR_DEPTH_SCHEDULE_H_
