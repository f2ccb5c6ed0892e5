// Who copies whose choice: HShare's greedy pairing. Pure; any thread.

#ifndef KVSERVICE_SELECTOR_BASELINES_SHARING_MAP_H_
#define KVSERVICE_SELECTOR_BASELINES_SHARING_MAP_H_

#include <cstdint>
#include <vector>

namespace kvservice::baselines {

// overlap: [n][n], of which row i is read up to i: how much the choices of i and an earlier j have
// in common. `share_count` times the pair of the largest overlap is taken (among equals the first
// in row order): i copies j from then on, is no pair's part any more, and those that copied i copy
// j. Returns each one's source, itself where it copies nobody.
std::vector<uint32_t> ShareGreedily(const std::vector<std::vector<double>>& overlap,
                                    uint32_t share_count);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_SHARING_MAP_H_
