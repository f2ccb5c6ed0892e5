// Principal components of vectors. Pure; any thread.

#ifndef KVSERVICE_SELECTOR_BASELINES_COMPONENTS_H_
#define KVSERVICE_SELECTOR_BASELINES_COMPONENTS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace kvservice::baselines {

// rows: [n][channels]. The unit eigenvectors of their covariance with the `count` largest
// eigenvalues, largest first, [count][channels]; those of eigenvalues that are 0 are 0 themselves.
std::vector<float> PrincipalComponents(absl::Span<const float> rows, uint32_t channels,
                                       uint32_t count);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_COMPONENTS_H_
