// The arithmetic of choosing on a GPU (attention/cuda/choice-inl.h), on the host.

#include "attention/cuda/choice-inl.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "attention/cpu/token_mask.h"

namespace kvservice::cuda {
namespace {

uint32_t UnitsIn(float share, uint32_t bin) {
  return UnitsOf(share, kShareUnits / BinEdge(bin + 1));
}

TEST(CudaChoice, WordsAreThoseOfTheRanges) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    const uint32_t end = 1 + random() % 400;
    const ChoiceRanges ranges{.begin = static_cast<uint32_t>(random() % end),
                              .end = end,
                              .sink_end = static_cast<uint32_t>(random() % 100),
                              .visible_begin = static_cast<uint32_t>(random() % 300),
                              .local_begin = static_cast<uint32_t>(random() % 400)};
    for (uint32_t word = 0; word < 7; ++word) {
      const uint64_t exact = random() % 3 == 0 ? uint64_t{random()} << (random() % 32) : 0;
      const ChoiceWords words = WordsOf(ranges, word, exact);
      EXPECT_EQ(words.all, RangeWord(word, ranges.begin, ranges.end));
      for (uint32_t t = 0; t < kWordTokens; ++t) {
        const uint32_t token = word * kWordTokens + t;
        const bool seen = token >= ranges.begin && token < ranges.end;
        const bool always = seen && (token < ranges.sink_end || token >= ranges.local_begin ||
                                     (exact >> t & 1) != 0);
        EXPECT_EQ((words.always >> t & 1) != 0, always);
        EXPECT_EQ((words.middle >> t & 1) != 0, seen && !always && token >= ranges.visible_begin);
      }
    }
  }
}

TEST(CudaChoice, StepsRiseWithScores) {
  uint32_t last = 0;
  for (float score = 0x1p-126F; score < 1e30F; score *= 1.003F) {
    const uint32_t step = StepOf(score);
    EXPECT_GE(step, last);
    EXPECT_LT(step, kBins * kStepsOfBin);
    last = step;
    const uint32_t bin = BinOf(score);
    EXPECT_TRUE(bin == 0 || score >= BinEdge(bin)) << score;
    EXPECT_TRUE(bin + 1 == kBins || score < BinEdge(bin + 1)) << score;
  }
  EXPECT_EQ(StepOf(0.0F), 0U);
  EXPECT_EQ(BinOf(std::numeric_limits<float>::infinity()), kBins - 1);
  EXPECT_EQ(BinEdge(kBins), 8.0F);
  // As fine as the host's choice: 128 steps per octave.
  EXPECT_EQ(StepOf(1.0F) + 1, StepOf(1.0F + 0x1p-7F));
}

TEST(CudaChoice, UnitsAreShares) {
  EXPECT_EQ(UnitsIn(std::numeric_limits<float>::infinity(), kBins - 1), 2048U);
  for (float share = 0x1p-70F; share < 4.0F; share *= 1.7F) {
    const uint32_t bin = BinOf(share);
    EXPECT_NEAR(ShareOfUnits(UnitsIn(share, bin), bin) / static_cast<double>(share), 1.0, 0x1p-10);
    EXPECT_LE(UnitsIn(share, bin), 2048U);
  }
}

float ThresholdOf(const std::vector<uint32_t>& sums, const std::vector<uint32_t>& counts,
                  double limit) {
  double below = 0.0;
  for (uint32_t bin = 0; bin < kBins; ++bin) {
    const double mass = ShareOfUnits(sums[bin], bin);
    if (!(below + mass <= limit)) return ThresholdWithin(bin, mass, counts[bin], below, limit);
    below += mass;
  }
  return BinEdge(kBins);
}

TEST(CudaChoice, ThresholdsLeaveNoMoreThanTheLimit) {
  std::mt19937 random(7);
  for (int i = 0; i < 200; ++i) {
    std::lognormal_distribution<double> weights(0.0, 0.5 + i % 7);
    std::vector<double> shares(2000);
    double total = 0.0;
    for (double& share : shares) total += share = weights(random);
    std::vector<uint32_t> sums(kBins);
    std::vector<uint32_t> counts(kBins);
    for (double& share : shares) {
      share /= total;
      const auto score = static_cast<float>(share);
      sums[BinOf(score)] += UnitsIn(score, BinOf(score));
      ++counts[BinOf(score)];
    }
    for (const double limit : {1e-4, 0.01, 0.05, 0.3}) {
      const auto threshold = static_cast<double>(ThresholdOf(sums, counts, limit));
      double left = 0.0;
      const double edge = static_cast<double>(BinEdge(BinOf(static_cast<float>(threshold)) + 1));
      double bin = 0.0;
      for (const double share : shares) {
        if (share < threshold) left += share;
        if (share >= threshold && share < edge) bin += share;
      }
      // Shares are rounded, and within a bin of many tokens they lie about evenly.
      EXPECT_LE(left, 1.02 * limit) << i;
      EXPECT_GE(left + bin, 0.98 * limit) << "another bin had room";
    }
  }
}

TEST(CudaChoice, WhatIsInfiniteIsKept) {
  std::vector<uint32_t> sums(kBins);
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<uint32_t> none(kBins);
  sums[BinOf(infinity)] += UnitsIn(infinity, BinOf(infinity));
  EXPECT_LE(ThresholdOf(sums, sums, 0.9), BinEdge(kBins - 1));
  EXPECT_EQ(ThresholdOf(none, none, 0.0), BinEdge(kBins)) << "nothing is there";
}

TEST(CudaChoice, SamplesTakeOneRunOfEverySoMany) {
  for (const uint32_t heads : {4U, 16U}) {
    for (const uint32_t blocks : {1U, 100U, 512U, 2048U, 2049U, 16384U}) {
      const uint32_t stride = SampleStride(blocks, heads);
      const uint32_t runs = SampledRuns(heads);
      EXPECT_GE(runs * stride, blocks * kRunsOfBlock) << "all of them are stood for";
      std::vector<uint32_t> of_block(kRunsOfBlock);
      for (uint32_t i = 0; i < runs; ++i) {
        const uint32_t run = SampledRun(i, stride);
        EXPECT_EQ(run / stride, i);
        ++of_block[run % kRunsOfBlock];
      }
      const double even = runs / static_cast<double>(kRunsOfBlock);
      for (const uint32_t count : of_block) EXPECT_NEAR(count, even, even / 2);
    }
  }
}

TEST(CudaChoice, SearchStepsAreOneAfterTheOther) {
  for (uint32_t step = 0; step < kSearchSteps; ++step) {
    EXPECT_EQ(SearchStepOf(SearchEdge(step)), step);
    EXPECT_LT(SearchEdge(step), SearchEdge(step + 1));
  }
  EXPECT_EQ(SearchEdge(kSearchSteps), BinEdge(kBins));
  EXPECT_EQ(SearchStepOf(0.0F), 0U);
  EXPECT_EQ(SearchStepOf(std::numeric_limits<float>::infinity()), kSearchSteps - 1);
}

TEST(CudaChoice, SpansAreFew) {
  for (uint32_t blocks = 1; blocks <= 16384; ++blocks) {
    const uint32_t span = SpanBlocksOf(blocks);
    EXPECT_TRUE(std::has_single_bit(span) && span <= 8);
    EXPECT_LE((blocks + span - 1) / span, blocks <= 2048 ? 256U : 2048U);
  }
}

TEST(CudaChoice, JobsShareTokensEvenly) {
  std::mt19937 random(3);
  for (int i = 0; i < 300; ++i) {
    std::vector<uint32_t> counts(1 + random() % 300);
    uint32_t tokens = 0;
    for (uint32_t& count : counts) tokens += count = random() % 3 == 0 ? random() % 65 : 0;
    const uint32_t target = 1 + random() % 300;
    const uint32_t jobs = JobsOf(tokens, target);
    EXPECT_GE(jobs, 1U);
    EXPECT_LE(jobs, tokens / target + 1);
    std::vector<uint32_t> held(jobs);
    uint32_t before = 0;
    uint32_t last = 0;
    for (const uint32_t count : counts) {
      const uint32_t job = JobOfWord(before, tokens, jobs);
      EXPECT_GE(job, last) << "words of a job are neighbours";
      EXPECT_LT(job, jobs);
      held[job] += count;
      before += count;
      last = job;
    }
    for (const uint32_t size : held) EXPECT_LE(size, tokens / jobs + 1 + kWordTokens);
  }
}

}  // namespace
}  // namespace kvservice::cuda
