#include "selector/baselines/sharing_map.h"

#include <algorithm>
#include <numeric>

namespace kvservice::baselines {

std::vector<uint32_t> ShareGreedily(const std::vector<std::vector<double>>& overlap,
                                    uint32_t share_count) {
  const auto count = static_cast<uint32_t>(overlap.size());
  std::vector<uint32_t> source(count);
  std::iota(source.begin(), source.end(), 0U);
  for (uint32_t shared = 0; shared < share_count; ++shared) {
    uint32_t best_i = count;
    uint32_t best_j = count;
    for (uint32_t i = 0; i < count; ++i) {
      for (uint32_t j = 0; j < i; ++j) {
        if (source[i] != i || source[j] != j) continue;
        if (best_i == count || overlap[i][j] > overlap[best_i][best_j]) {
          best_i = i;
          best_j = j;
        }
      }
    }
    if (best_i == count) break;  // One is left.
    std::replace(source.begin(), source.end(), best_i, best_j);
  }
  return source;
}

}  // namespace kvservice::baselines
