// Numbers of verified sharing (attention/sharing.h) that all devices estimate with. Standard
// library alone, so that device code may use them.

#ifndef KVSERVICE_ATTENTION_SHARING_NUMBERS_H_
#define KVSERVICE_ATTENTION_SHARING_NUMBERS_H_

#include <cstdint>

namespace kvservice {

// Share of what is read above which a token is heavy; smaller ones tell no more.
inline constexpr double kHeavyShare = 0x1p-6;
// Share by the estimates of a scan above which a token may be heavy: half, since they are
// estimates.
inline constexpr double kMaybeHeavyShare = kHeavyShare / 2;
// Reading the boxes of more pages than this adds time but no knowledge.
inline constexpr uint32_t kSpreadPagesMax = 32;
// Variance of a channel within a page, over the square of its box's width.
inline constexpr double kVarianceOfWidth = 1.0 / 24.0;
// A box is this many steps wide.
inline constexpr double kBoxSteps = 16.0;

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SHARING_NUMBERS_H_
