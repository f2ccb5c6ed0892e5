#include "attention/host_lists.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace kvservice {
namespace {

constexpr KvLayout kLayout{.query_head_count = 4, .kv_head_count = 2, .head_dim = 64};
constexpr size_t kGroupFloats = 2 * 64;

using Tokens = std::vector<uint32_t>;

std::vector<float> RandomQueries(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> queries(kGroupFloats);
  for (float& x : queries) x = normal(random);
  return queries;
}

double Cosine(const float* a, const float* b) {
  double ab = 0.0;
  double aa = 0.0;
  double bb = 0.0;
  for (uint32_t c = 0; c < 64; ++c) {
    ab += static_cast<double>(a[c]) * b[c];
    aa += static_cast<double>(a[c]) * a[c];
    bb += static_cast<double>(b[c]) * b[c];
  }
  return ab / std::sqrt(aa * bb);
}

TEST(HostLists, FindsTheMostSimilarByTheSmallestCosine) {
  HostLists lists(kLayout, 16);
  EXPECT_EQ(lists.FindMostSimilar(0, RandomQueries(1)).anchor, -1);
  EXPECT_EQ(lists.FindMostSimilar(0, RandomQueries(1)).similarity, -2.0F);
  std::vector<std::vector<float>> anchors;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    anchors.push_back(RandomQueries(seed));
    lists.Insert(1, anchors.back(), {10}, 20);
  }
  EXPECT_EQ(lists.anchor_count(0), 0U);
  EXPECT_EQ(lists.anchor_count(1), 12U);
  for (uint64_t seed = 100; seed < 150; ++seed) {
    std::vector<float> queries = RandomQueries(seed);
    // Near one anchor in both heads, or in one head only.
    const std::vector<float>& target = anchors[seed % 12];
    const size_t near_floats = seed % 3 == 0 ? kGroupFloats / 2 : kGroupFloats;
    for (size_t i = 0; i < near_floats; ++i) queries[i] = 5.0F * (target[i] + 0.3F * queries[i]);
    double best = -2.0;
    int32_t best_anchor = -1;
    for (size_t i = 0; i < anchors.size(); ++i) {
      const double cosine =
          std::min(Cosine(&queries[0], &anchors[i][0]), Cosine(&queries[64], &anchors[i][64]));
      if (cosine > best) {
        best = cosine;
        best_anchor = static_cast<int32_t>(i);
      }
    }
    const HostLists::Match match = lists.FindMostSimilar(1, queries);
    EXPECT_EQ(match.anchor, best_anchor);
    EXPECT_NEAR(match.similarity, best, 1e-6);
  }
}

TEST(HostLists, ZeroQueriesAreSimilarToNothing) {
  HostLists lists(kLayout, 2);
  lists.Insert(0, std::vector<float>(kGroupFloats, 0.0F), {1}, 9);
  EXPECT_EQ(lists.FindMostSimilar(0, RandomQueries(1)).similarity, 0.0F);
  EXPECT_EQ(lists.FindMostSimilar(0, std::vector<float>(kGroupFloats, 0.0F)).similarity, 0.0F);
}

TEST(HostLists, TheLeastRecentlyUsedGoes) {
  HostLists lists(kLayout, 3);
  for (uint64_t seed = 0; seed < 3; ++seed) {
    lists.Insert(0, RandomQueries(seed), {static_cast<uint32_t>(seed)}, 50);
  }
  lists.Touch(0, 0);
  lists.Insert(0, RandomQueries(3), {3}, 50);  // Takes the place of 1.
  lists.Insert(0, RandomQueries(4), {4}, 50);  // Takes the place of 2.
  EXPECT_EQ(lists.anchor_count(0), 3U);
  for (const uint64_t seed : {0ULL, 3ULL, 4ULL}) {
    const HostLists::Match match = lists.FindMostSimilar(0, RandomQueries(seed));
    EXPECT_NEAR(match.similarity, 1.0F, 1e-5F);
    EXPECT_EQ(lists.anchor(0, static_cast<uint32_t>(match.anchor)).tokens,
              Tokens({static_cast<uint32_t>(seed)}));
  }
  EXPECT_LT(lists.FindMostSimilar(0, RandomQueries(1)).similarity, 0.9F);
  EXPECT_LT(lists.FindMostSimilar(0, RandomQueries(2)).similarity, 0.9F);
}

TEST(HostLists, NoAnchorsStillHaveASelection) {
  HostLists lists(kLayout, 0);
  lists.Insert(0, RandomQueries(1), {1}, 2);
  EXPECT_EQ(lists.anchor_count(0), 0U);
  EXPECT_FALSE(lists.has_selection(0));
  lists.SetSelection(0, Tokens({3, 5}));
  EXPECT_TRUE(lists.has_selection(0));
  EXPECT_FALSE(lists.has_selection(1));
  EXPECT_EQ(lists.selection(0), Tokens({3, 5}));
  lists.SetSelection(0, {});
  EXPECT_TRUE(lists.has_selection(0));
  EXPECT_TRUE(lists.selection(0).empty());
  lists.ClearSelection(0);
  EXPECT_FALSE(lists.has_selection(0));
}

TEST(HostLists, TruncateForgets) {
  HostLists lists(kLayout, 2);
  lists.Insert(0, RandomQueries(1), {8, 99, 100, 101}, 120);
  lists.Insert(0, RandomQueries(2), {8, 9}, 40);
  lists.SetSelection(1, Tokens({99, 100, 300}));
  lists.Truncate(100);
  EXPECT_EQ(lists.anchor(0, 0).tokens, Tokens({8, 99}));
  EXPECT_EQ(lists.anchor(0, 0).covered_end, 100U);
  EXPECT_EQ(lists.anchor(0, 1).tokens, Tokens({8, 9}));
  EXPECT_EQ(lists.anchor(0, 1).covered_end, 40U);
  EXPECT_EQ(lists.selection(1), Tokens({99}));
  EXPECT_TRUE(lists.has_selection(1));
}

TEST(HostLists, CopiesAreIndependent) {
  HostLists lists(kLayout, 2);
  lists.Insert(0, RandomQueries(1), {8}, 40);
  lists.SetSelection(0, Tokens({8}));
  const std::unique_ptr<TokenLists> copy = lists.Copy();
  const auto* forked = static_cast<const HostLists*>(copy.get());
  lists.Complete(0, 0, {8, 9}, 50);
  lists.ClearSelection(0);
  EXPECT_EQ(forked->anchor(0, 0).tokens, Tokens({8}));
  EXPECT_EQ(forked->anchor(0, 0).covered_end, 40U);
  EXPECT_TRUE(forked->has_selection(0));
  EXPECT_EQ(lists.anchor(0, 0).tokens, Tokens({8, 9}));
  EXPECT_EQ(lists.anchor(0, 0).covered_end, 50U);
}

TEST(HostLists, BytesGrowWithWhatIsHeld) {
  HostLists lists(kLayout, 8);
  const size_t empty = lists.bytes();
  lists.Insert(0, RandomQueries(1), Tokens(1000, 7), 40);
  EXPECT_GE(lists.bytes(), empty + 1000 * sizeof(uint32_t) + kGroupFloats * sizeof(float));
}

SharingTerms SomeSharing() {
  return {.queries = std::vector<float>(kGroupFloats, 1.0F),
          .log_odds = {-1.0F, -2.0F},
          .shift = std::vector<float>(kGroupFloats, 0.5F),
          .variance = std::vector<float>(64, 0.25F)};
}

TEST(HostLists, SharingTermsLiveAndDieWithTheirAnchor) {
  HostLists lists(kLayout, 2);
  lists.Insert(0, RandomQueries(1), {8, 9}, 120);
  const size_t bytes = lists.bytes();
  lists.Insert(0, RandomQueries(2), {8, 9}, 120, SomeSharing());
  EXPECT_GE(lists.bytes(), bytes + (2 * kGroupFloats + 2 + 64) * sizeof(float));
  EXPECT_TRUE(lists.anchor(0, 0).sharing.empty());
  const std::unique_ptr<TokenLists> copy = lists.Copy();
  lists.Leave(0, 1, 0, -1.0);
  EXPECT_NEAR(lists.anchor(0, 1).sharing.log_odds[0], -1.0 + std::log(2.0), 1e-6);
  EXPECT_EQ(static_cast<const HostLists*>(copy.get())->anchor(0, 1).sharing.log_odds[0], -1.0F);
  // What the list has considered is still there.
  lists.Truncate(120);
  EXPECT_FALSE(lists.anchor(0, 1).sharing.empty());
  lists.Truncate(119);
  EXPECT_TRUE(lists.anchor(0, 1).sharing.empty());
  // An anchor's place does not pass its terms on.
  lists.Insert(0, RandomQueries(3), {8}, 100, SomeSharing());
  lists.Insert(0, RandomQueries(4), {8}, 100);
  lists.Insert(0, RandomQueries(5), {8}, 100);
  EXPECT_TRUE(lists.anchor(0, 0).sharing.empty());
  EXPECT_TRUE(lists.anchor(0, 1).sharing.empty());
}

TEST(HostLists, AnchorsWithoutSharingTermsCanBePassedOver) {
  HostLists lists(kLayout, 3);
  lists.Insert(0, RandomQueries(1), {8}, 100);
  EXPECT_EQ(lists.FindMostSimilar(0, RandomQueries(1), /*estimable=*/true).anchor, -1);
  lists.Insert(0, RandomQueries(2), {8}, 100, SomeSharing());
  EXPECT_EQ(lists.FindMostSimilar(0, RandomQueries(1)).anchor, 0);
  EXPECT_EQ(lists.FindMostSimilar(0, RandomQueries(1), /*estimable=*/true).anchor, 1);
}

// Else a list that was found wanting would hide the one that was made in its place.
TEST(HostLists, AmongEqualsTheLastUsedIsFound) {
  HostLists lists(kLayout, 3);
  lists.Insert(0, RandomQueries(1), {8}, 100);
  lists.Insert(0, RandomQueries(1), {9}, 100);
  EXPECT_EQ(lists.FindMostSimilar(0, RandomQueries(1)).anchor, 1);
  lists.Touch(0, 0);
  EXPECT_EQ(lists.FindMostSimilar(0, RandomQueries(1)).anchor, 0);
}

// Rotates with long double; undoing it must give back what went in.
void ExpectUnrotated(RotaryStyle style, uint32_t rotary_dim, uint32_t position) {
  LayerShape shape;
  shape.layout = kLayout;
  shape.rotary_style = style;
  std::vector<float> frequencies(rotary_dim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] =
        std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(rotary_dim));
  }
  shape.inverse_frequencies = frequencies;
  std::vector<float> plain(4 * 64);
  for (size_t i = 0; i < plain.size(); ++i) plain[i] = std::sin(1.0F + static_cast<float>(i));
  std::vector<float> rotated = plain;
  for (uint32_t head = 0; head < 4 && style != RotaryStyle::kNone; ++head) {
    for (uint32_t pair = 0; pair < rotary_dim / 2; ++pair) {
      const bool half = style == RotaryStyle::kHalf;
      const uint32_t a = head * 64 + (half ? pair : 2 * pair);
      const uint32_t b = head * 64 + (half ? pair + rotary_dim / 2 : 2 * pair + 1);
      const long double angle = static_cast<long double>(position) * frequencies[pair];
      rotated[a] = static_cast<float>(plain[a] * std::cos(angle) - plain[b] * std::sin(angle));
      rotated[b] = static_cast<float>(plain[b] * std::cos(angle) + plain[a] * std::sin(angle));
    }
  }
  std::vector<float> out(plain.size());
  UnrotateQueries(shape, position, rotated.data(), out.data());
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_NEAR(out[i], plain[i], 1e-6F);
  UnrotateQueries(shape, position, rotated.data(), rotated.data());
  EXPECT_EQ(out, rotated);
}

TEST(HostLists, KnowsDistancesToAnchors) {
  HostLists lists(kLayout, 4);
  std::vector<float> queries = RandomQueries(1);
  lists.Insert(1, RandomQueries(9), {1}, 2);
  lists.Insert(1, queries, {1}, 2);
  EXPECT_NEAR(lists.QueryDistance(1, 1, queries), 0.0F, 1e-5F);
  // The largest over the group's two heads counts, and lengths do.
  for (size_t c = 0; c < 64; ++c) queries[c] *= 3.0F;
  queries[64] += 0.5F;
  double first = 0.0;
  for (size_t c = 0; c < 64; ++c) first += static_cast<double>(queries[c]) * queries[c] / 9.0;
  EXPECT_NEAR(lists.QueryDistance(1, 1, queries), 2.0 * std::sqrt(first), 1e-4);
  for (size_t c = 0; c < 64; ++c) queries[c] /= 3.0F;
  EXPECT_NEAR(lists.QueryDistance(1, 1, queries), 0.5F, 1e-4F);
  // Norms move with their anchor when it is replaced, and with a copy.
  const std::vector<float> zero(kGroupFloats, 0.0F);
  HostLists one(kLayout, 1);
  one.Insert(0, RandomQueries(2), {1}, 2);
  one.Insert(0, RandomQueries(3), {1}, 2);
  const auto copy = one.Copy();
  const auto* copied = static_cast<const HostLists*>(copy.get());
  EXPECT_NEAR(copied->QueryDistance(0, 0, RandomQueries(3)), 0.0F, 1e-5F);
  EXPECT_GT(copied->QueryDistance(0, 0, zero), 5.0F);
  EXPECT_EQ(copied->QueryDistance(0, 0, zero), one.QueryDistance(0, 0, zero));
}

// There and back, and back and there: each undoes the other to a few roundings of a float.
TEST(RotateQueries, IsTheInverse) {
  std::vector<float> frequencies(24);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = std::pow(10000.0F, -static_cast<float>(i) / 24.0F);
  }
  std::vector<float> q = RandomQueries(5);
  const std::vector<float> more = RandomQueries(6);
  q.insert(q.end(), more.begin(), more.end());
  for (const RotaryStyle style :
       {RotaryStyle::kNone, RotaryStyle::kHalf, RotaryStyle::kInterleaved}) {
    LayerShape shape{.layout = kLayout, .inverse_frequencies = {}, .rotary_style = style};
    if (style != RotaryStyle::kNone) shape.inverse_frequencies = frequencies;
    for (const uint32_t position : {0U, 1U, 517U, 1000000U}) {
      std::vector<float> there(q.size());
      std::vector<float> back(q.size());
      RotateQueries(shape, position, q.data(), there.data());
      if (style != RotaryStyle::kNone && position > 0) {
        EXPECT_NE(there, q);
      }
      UnrotateQueries(shape, position, there.data(), back.data());
      for (size_t i = 0; i < q.size(); ++i) EXPECT_NEAR(back[i], q[i], 4e-6F);
      UnrotateQueries(shape, position, q.data(), there.data());
      RotateQueries(shape, position, there.data(), there.data());
      for (size_t i = 0; i < q.size(); ++i) EXPECT_NEAR(there[i], q[i], 4e-6F);
    }
  }
}

TEST(UnrotateQueries, UndoesEveryStyle) {
  for (const uint32_t position : {0U, 1U, 4095U, 1000003U}) {
    ExpectUnrotated(RotaryStyle::kNone, 64, position);
    ExpectUnrotated(RotaryStyle::kHalf, 64, position);
    ExpectUnrotated(RotaryStyle::kHalf, 32, position);
    ExpectUnrotated(RotaryStyle::kInterleaved, 64, position);
    ExpectUnrotated(RotaryStyle::kInterleaved, 48, position);
  }
}

}  // namespace
}  // namespace kvservice
