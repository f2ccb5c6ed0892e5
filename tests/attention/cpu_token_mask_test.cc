#include "attention/cpu/token_mask.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

namespace kvservice {
namespace {

constexpr uint32_t kFirstBlock = 3;
constexpr uint32_t kBlocks = 6;

TEST(TokenMask, RangeWordHoldsExactlyTheRange) {
  for (uint32_t begin = 60; begin < 200; ++begin) {
    for (uint32_t end = 60; end < 200; end += 7) {
      for (uint32_t block = 0; block < 4; ++block) {
        uint64_t expected = 0;
        for (uint32_t t = 0; t < kBlockTokens; ++t) {
          const uint32_t token = block * kBlockTokens + t;
          if (token >= begin && token < end) expected |= uint64_t{1} << t;
        }
        ASSERT_EQ(RangeWord(block, begin, end), expected) << block << " " << begin << " " << end;
      }
    }
  }
}

TEST(TokenMask, PositionsComeBack) {
  const std::vector<uint32_t> positions = {0, 191, 192, 200, 255, 256, 511, 575, 576, 1000};
  TokenMask mask(kBlocks, 0);
  AddPositions(positions, kFirstBlock, &mask);
  const std::vector<uint32_t> inside = {192, 200, 255, 256, 511, 575};
  EXPECT_EQ(PositionsOf(mask, kFirstBlock), inside);
  EXPECT_EQ(CountTokens(mask), inside.size());
  TokenMask less = mask;
  less[0] &= ~uint64_t{1};
  EXPECT_TRUE(IsSubset(less, mask));
  EXPECT_FALSE(IsSubset(mask, less));
}

TEST(TokenMask, DilationReachesBothWaysAcrossBlocks) {
  std::mt19937_64 random(7);
  for (const uint32_t radius : {0U, 1U, 5U, 63U, 64U, 65U, 130U}) {
    for (int round = 0; round < 20; ++round) {
      std::vector<uint32_t> positions;
      for (uint32_t token = kFirstBlock * kBlockTokens;
           token < (kFirstBlock + kBlocks) * kBlockTokens; ++token) {
        if (random() % 90 == 0) positions.push_back(token);
      }
      std::set<uint32_t> expected;
      for (const uint32_t token : positions) {
        for (uint32_t near = token - radius; near <= token + radius; ++near) {
          const uint32_t block = near / kBlockTokens;
          if (block >= kFirstBlock && block < kFirstBlock + kBlocks) expected.insert(near);
        }
      }
      TokenMask mask(kBlocks, 0);
      AddPositions(positions, kFirstBlock, &mask);
      Dilate(radius, &mask);
      ASSERT_EQ(PositionsOf(mask, kFirstBlock),
                std::vector<uint32_t>(expected.begin(), expected.end()))
          << "radius " << radius;
    }
  }
}

}  // namespace
}  // namespace kvservice
