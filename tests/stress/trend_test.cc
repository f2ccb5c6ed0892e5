#include "tests/stress/trend.h"

#include <gtest/gtest.h>

#include <random>

namespace kvservice::testing {
namespace {

constexpr int kSamples = 1800;
constexpr int kSeries = 400;

// Samples about a line from 0 to `growth`, each of which keeps the share `memory` of how far the
// one before it was away.
std::vector<double> Breathing(double memory, double growth, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> samples;
  double away = 0.0;
  for (int i = 0; i < kSamples; ++i) {
    away = memory * away + normal(random);
    samples.push_back(away + growth * i / kSamples);
  }
  return samples;
}

// In how many series growth is above its noise.
template <typename Function>
int Alarms(double memory, double growth, Function trend_of) {
  int alarms = 0;
  for (int seed = 0; seed < kSeries; ++seed) {
    const Trend trend = trend_of(Breathing(memory, growth, seed));
    alarms += trend.growth > trend.noise ? 1 : 0;
  }
  return alarms;
}

TEST(TrendTest, ALineIsItsGrowth) {
  const std::vector<double> samples = Breathing(0.0, 1000.0, 1);
  for (const Trend& trend : {TrendOf(samples), BatchTrendOf(samples)}) {
    EXPECT_NEAR(trend.growth, 1000.0, 1.0);
    EXPECT_GT(trend.noise, 0.1);
    EXPECT_LT(trend.noise, 1.0);
  }
}

TEST(TrendTest, TooLittleSaysNothing) {
  EXPECT_EQ(TrendOf({1.0, 2.0}).growth, 0.0);
  EXPECT_EQ(BatchTrendOf(std::vector<double>(kBatchCount - 1, 1.0)).growth, 0.0);
}

// One side of three standard errors: .1 % of normal ones, .4 % with 18 degrees of freedom.
TEST(TrendTest, WhatBreathesDoesNotGrow) {
  EXPECT_LE(Alarms(0.0, 0.0, TrendOf), kSeries / 50);
  EXPECT_LE(Alarms(0.0, 0.0, BatchTrendOf), kSeries / 50);
  EXPECT_LE(Alarms(0.9, 0.0, BatchTrendOf), kSeries / 50);
  // What batches are for.
  EXPECT_GE(Alarms(0.9, 0.0, TrendOf), kSeries / 10);
}

TEST(TrendTest, WhatGrowsBeyondItsNoiseIsSeen) {
  const double noise = BatchTrendOf(Breathing(0.9, 0.0, 1)).noise;
  EXPECT_EQ(Alarms(0.9, 4.0 * noise, BatchTrendOf), kSeries);
}

}  // namespace
}  // namespace kvservice::testing
