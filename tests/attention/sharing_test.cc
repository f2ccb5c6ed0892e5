#include "attention/sharing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "attention/float16.h"
#include "attention/host_lists.h"
#include "attention/log_mass.h"
#include "attention/sketch.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

constexpr KvLayout kLayout{.query_head_count = 4, .kv_head_count = 2, .head_dim = 64};

std::vector<float> Waves(size_t count, float phase) {
  std::vector<float> x(count);
  for (size_t i = 0; i < count; ++i) x[i] = std::sin(phase + 1.7F * static_cast<float>(i));
  return x;
}

// Terms of two heads, with numbers of every sign.
SharingTerms SomeTerms() {
  SharingTerms terms;
  terms.queries = Waves(128, 0.3F);
  terms.log_odds = {-3.0F, -2.0F};
  terms.shift = Waves(128, 0.9F);
  terms.variance = Waves(64, 2.0F);
  for (float& v : terms.variance) v = 0.01F * v * v;
  return terms;
}

LayerShape Rotating(RotaryStyle style, const std::vector<float>& frequencies) {
  LayerShape shape;
  shape.layout = kLayout;
  shape.scale = 0.25F;
  shape.rotary_style = style;
  if (style != RotaryStyle::kNone) shape.inverse_frequencies = frequencies;
  return shape;
}

// The formula of the header in long double.
double Expected(const LayerShape& shape, uint32_t position, const std::vector<float>& queries,
                const SharingTerms& terms) {
  long double largest = 0.0L;
  const size_t pairs = shape.inverse_frequencies.size();
  for (size_t head = 0; head < 2; ++head) {
    std::vector<long double> dq(64);
    for (size_t c = 0; c < 64; ++c) {
      dq[c] = static_cast<long double>(shape.scale) * queries[head * 64 + c] -
              terms.queries[head * 64 + c];
    }
    for (size_t pair = 0; pair < pairs; ++pair) {
      const bool half = shape.rotary_style == RotaryStyle::kHalf;
      const size_t a = half ? pair : 2 * pair;
      const size_t b = half ? pair + pairs : 2 * pair + 1;
      const long double angle =
          static_cast<long double>(position) * shape.inverse_frequencies[pair];
      const long double x = dq[a];
      const long double y = dq[b];
      dq[a] = x * std::cos(angle) - y * std::sin(angle);
      dq[b] = y * std::cos(angle) + x * std::sin(angle);
    }
    long double mean = 0.0L;
    long double squares = 0.0L;
    for (size_t c = 0; c < 64; ++c) {
      mean += dq[c] * terms.shift[head * 64 + c];
      squares += dq[c] * dq[c] * terms.variance[c];
    }
    const long double log_odds = terms.log_odds[head] + mean + 2.0L * std::sqrt(squares);
    largest = std::max(largest, 1.0L / (1.0L + std::exp(-log_odds)));
  }
  return static_cast<double>(largest);
}

TEST(SharingQueryTest, FollowsTheFormula) {
  std::vector<float> frequencies(32);
  for (size_t i = 0; i < 32; ++i) {
    frequencies[i] = std::pow(1000.0F, -static_cast<float>(i) / 32.0F);
  }
  const SharingTerms terms = SomeTerms();
  for (const RotaryStyle style :
       {RotaryStyle::kNone, RotaryStyle::kHalf, RotaryStyle::kInterleaved}) {
    for (const size_t pairs : {32U, 20U}) {
      const std::vector<float> some(frequencies.begin(), frequencies.begin() + pairs);
      const LayerShape shape = Rotating(style, some);
      for (const uint32_t position : {0U, 1U, 4095U}) {
        for (const float phase : {0.3F, 0.5F, 1.9F, 4.0F}) {
          std::vector<float> queries = Waves(128, phase);
          for (float& q : queries) q *= 4.0F;  // The anchor's times scale are Waves(0.3).
          EXPECT_NEAR(SharingQuery(shape, position, queries).EstimateDroppedMass(terms),
                      Expected(shape, position, queries, terms), 1e-4);
        }
      }
    }
  }
}

TEST(SharingQueryTest, TheAnchorsOwnQueryDropsWhatWasLeft) {
  const LayerShape shape = Rotating(RotaryStyle::kNone, {});
  std::vector<float> queries = SomeTerms().queries;
  for (float& q : queries) q *= 4.0F;
  EXPECT_NEAR(SharingQuery(shape, 7, queries).EstimateDroppedMass(SomeTerms()),
              1.0 / (1.0 + std::exp(2.0)), 1e-6);
}

TEST(SharingQueryTest, NothingLeftDropsNothing) {
  SharingTerms terms = SomeTerms();
  terms.log_odds.assign(2, static_cast<float>(kLogZero));
  const LayerShape shape = Rotating(RotaryStyle::kNone, {});
  EXPECT_EQ(SharingQuery(shape, 7, Waves(128, 1.0F)).EstimateDroppedMass(terms), 0.0F);
}

TEST(SharingQueryTest, NothingKnownDropsEverything) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const LayerShape shape = Rotating(RotaryStyle::kNone, {});
  const SharingQuery query(shape, 7, Waves(128, 1.0F));
  EXPECT_EQ(query.EstimateDroppedMass({}), 1.0F);
  SharingTerms terms = SomeTerms();
  terms.log_odds[1] = kNaN;
  EXPECT_EQ(query.EstimateDroppedMass(terms), 1.0F);
  terms = SomeTerms();
  terms.shift[70] = std::numeric_limits<float>::infinity();
  EXPECT_EQ(query.EstimateDroppedMass(terms), 1.0F);
  terms = SomeTerms();
  terms.variance[3] = kNaN;
  EXPECT_EQ(query.EstimateDroppedMass(terms), 1.0F);
  terms = SomeTerms();
  terms.log_odds[0] = 500.0F;
  EXPECT_EQ(query.EstimateDroppedMass(terms), 1.0F);
}

TEST(SharingTermsTest, WhatACompletionLeavesAddsUp) {
  SharingTerms terms = SomeTerms();
  terms.Leave(0, std::log(0.25));
  EXPECT_NEAR(terms.log_odds[0], std::log(std::exp(-3.0) + 0.25), 1e-6);
  EXPECT_EQ(terms.log_odds[1], -2.0F);
  terms.Leave(1, kLogZero);
  EXPECT_EQ(terms.log_odds[1], -2.0F);
  SharingTerms none;
  none.Leave(1, 0.0);
  EXPECT_TRUE(none.empty());
}

class SharingOfCase : public ::testing::Test {
 protected:
  SharingOfCase() : device_(NewDeviceOrDie("reference")), kv_(device_.get(), {}) {
    const SketchLayout layout(64);
    const KvView view = kv_.View(400);
    for (uint32_t block = 0; block < 6; ++block) {
      pages_.push_back(view.sketches[block] + layout.page_bytes);  // KV head 1
    }
  }

  double Key(uint32_t token, uint32_t c) const {
    return static_cast<double>(LoadElement(kLayout.dtype, kv_.Row(1, token), c));
  }

  const std::unique_ptr<Device> device_;
  const KvCase kv_;
  std::vector<const std::byte*> pages_;
};

// Pages of one key each are points, and their spread is that between them.
TEST(SpreadOfKeysTest, PagesApart) {
  const auto device = NewDeviceOrDie("reference");
  const KvCase kv(device.get(), {.keys = Keys::kConstantPages});
  const KvView view = kv.View(400);
  const std::vector<const std::byte*> pages(view.sketches.begin(), view.sketches.begin() + 6);
  const KeySpread spread = SpreadOfKeys(64, pages);
  for (uint32_t c = 0; c < 64; ++c) {
    double sum = 0.0;
    double squares = 0.0;
    for (uint32_t block = 0; block < 6; ++block) {
      const auto x =
          static_cast<double>(LoadElement(kLayout.dtype, kv.Row(0, block * kBlockTokens + 20), c));
      sum += x;
      squares += x * x;
    }
    // A box is at least 2^-10 wide.
    EXPECT_NEAR(spread.mean[c], sum / 6, 0x1p-10);
    EXPECT_NEAR(spread.variance[c], squares / 6 - sum * sum / 36, 0x1p-10 * (1 + squares));
  }
  const KeySpread none = SpreadOfKeys(64, {});
  EXPECT_EQ(none.mean, std::vector<double>(64, 0.0));
  EXPECT_EQ(none.variance, std::vector<double>(64, 0.0));
}

// Boxes from 0 to 15.99 in every page.
TEST(SpreadOfKeysTest, WithinAPage) {
  const auto device = NewDeviceOrDie("reference");
  const KvCase kv(device.get(), {.keys = Keys::kCellCorner});
  const KvView view = kv.View(400);
  const std::vector<const std::byte*> pages(view.sketches.begin() + 1, view.sketches.begin() + 6);
  const KeySpread spread = SpreadOfKeys(64, pages);
  for (uint32_t c = 0; c < 64; ++c) {
    EXPECT_NEAR(spread.mean[c], 8.0, 0.1);
    EXPECT_NEAR(spread.variance[c], 256.0 / 24, 0.2);
  }
}

TEST_F(SharingOfCase, ManyPagesAreRepresentedByAFew) {
  std::vector<const std::byte*> many;
  for (size_t i = 0; i < 6 * 64; ++i) many.push_back(pages_[i / 64]);
  const KeySpread few = SpreadOfKeys(64, pages_);
  const KeySpread all = SpreadOfKeys(64, many);
  for (uint32_t c = 0; c < 64; ++c) {
    EXPECT_NEAR(all.mean[c], few.mean[c], 0.2 * std::sqrt(few.variance[c]));
    EXPECT_NEAR(all.variance[c], few.variance[c], 0.2 * few.variance[c]);
  }
}

TEST_F(SharingOfCase, TermsAreMeansUnderTheWeightsOfWhatWasRead) {
  const KeySpread spread = SpreadOfKeys(64, pages_);
  const std::vector<uint32_t> read = {0, 5, 77, 200, 399};
  // The second head does not see token 0, and hardly token 5.
  const std::vector<double> logits = {1.0,      2.0,   3.0,   2.5,   0.0,
                                      kLogZero, -30.0, 700.0, 701.0, 699.0};
  const std::vector<double> log_left = {0.5, kLogZero};
  std::vector<double> log_read(2);
  for (size_t i = 0; i < 10; ++i) log_read[i / 5] += std::exp(logits[i] - (i < 5 ? 0.0 : 700.0));
  log_read = {std::log(log_read[0]), std::log(log_read[1]) + 700.0};
  const std::vector<float> queries = Waves(128, 0.1F);
  SharingTask task;
  LayerShape shape = kv_.shape();
  shape.scale = 0.5F;
  task.shape = &shape;
  task.queries = queries;
  task.read = read;
  task.read_logits = logits;
  task.log_read = log_read;
  task.log_left = log_left;
  task.spread = &spread;
  const SharingTerms terms = MakeSharingTerms(task, [this](absl::Span<const uint32_t> positions) {
    std::vector<const std::byte*> keys;
    for (const uint32_t position : positions) keys.push_back(kv_.Row(1, position));
    return keys;
  });
  for (size_t i = 0; i < 128; ++i) EXPECT_EQ(terms.queries[i], 0.5F * queries[i]);
  EXPECT_EQ(terms.log_odds[1], static_cast<float>(kLogZero));
  EXPECT_NEAR(terms.log_odds[0],
              0.5 - std::log(std::exp(1.0) + std::exp(2.0) + std::exp(3.0) + std::exp(2.5) + 1.0),
              1e-6);
  for (size_t head = 0; head < 2; ++head) {
    double mass = 0.0;
    for (size_t i = 0; i < 5; ++i) mass += std::exp(logits[head * 5 + i] - 600.0 * head);
    for (uint32_t c = 0; c < 64; ++c) {
      double mean = 0.0;
      for (size_t i = 0; i < 5; ++i) {
        mean += std::exp(logits[head * 5 + i] - 600.0 * head) / mass * Key(read[i], c);
      }
      EXPECT_NEAR(terms.shift[head * 64 + c], spread.mean[c] - mean, 1e-4);
      EXPECT_EQ(terms.variance[c], static_cast<float>(spread.variance[c]));
    }
  }
}

// Exact masses say how much a step drops; the estimate for the anchor's own query agrees up to what
// a sketch misses, on every device.
TEST(SharingOnDevices, EstimatesOfTheSameQueryAreNearTheTruth) {
  for (const std::string& name : DeviceNames()) {
    SCOPED_TRACE(name);
    const auto device = NewDeviceOrDie(name);
    CaseOptions options;
    options.length = 448;
    const KvCase kv(device.get(), options);
    const auto lists = device->NewTokenLists(options.layout, 4);
    Plan plan = BasePlan(Source::kReuse, 448);
    plan.keep.top_k = 30;
    plan.lists = lists.get();
    plan.prove = Guarantee::kExact;
    plan.reuse_mass_limit = 0.9F;
    RunPlan(kv, plan);
    const auto again = RunPlan(kv, plan);
    for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
      float dropped = 0.0F;
      for (uint32_t head = 2 * kv_head; head < 2 * kv_head + 2; ++head) {
        dropped = std::max(dropped, again->certificates[head].dropped_mass_estimate);
      }
      EXPECT_EQ(again->groups[kv_head].action, Action::kReused);
      EXPECT_GT(dropped, 0.05F) << "else the case tells nothing";
      EXPECT_NEAR(again->groups[kv_head].sharing_estimate, dropped, 0.03F);
    }
  }
}

}  // namespace
}  // namespace kvservice::testing
