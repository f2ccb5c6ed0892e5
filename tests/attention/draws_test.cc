#include "attention/draws.h"

#include <algorithm>
#include <limits>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/attention/coverage.h"

namespace kvservice {
namespace {

using ::testing::ElementsAre;
using testing::MissesAllowed;
using testing::Population;
using testing::TestKey;

constexpr uint64_t kMax64 = std::numeric_limits<uint64_t>::max();

// ---- The block function -------------------------------------------------------------------------

// RFC 8439 section 2.3.2: key 00 01 .. 1f, nonce 00 00 00 09 00 00 00 4a 00 00 00 00, counter 1.
TEST(ChaCha20Test, KnownAnswerOfTheRfc) {
  std::array<uint32_t, 8> key;
  for (uint32_t i = 0; i < 8; ++i) key[i] = 0x03020100 + 0x04040404 * i;
  std::array<uint64_t, kDrawBatch> out;
  ChaCha20Blocks(key, 1, {0x09000000, 0x4a000000, 0}, &out);
  // The RFC's words e4e7f110 15593bd1 .., two to a number.
  const std::vector<uint64_t> expected{0x15593bd1e4e7f110, 0xc47120a31fdd0f50, 0x0368c033c7f4d1c7,
                                       0x4e6cd4c39aaa2204, 0x09aa9f07466482d2, 0xa2028bd905d7c214,
                                       0xb94e16ded19c12b5, 0x4e3c50a2e883d0cb};
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), out.begin()));
}

// RFC 8439 appendix A.1, vectors 1 and 2: key and nonce zero, counters 0 and 1.
TEST(ChaCha20Test, ConsecutiveBlocksOfTheRfc) {
  std::array<uint64_t, kDrawBatch> out;
  ChaCha20Blocks({}, 0, {}, &out);
  EXPECT_EQ(out[0], 0x903df1a0ade0b876u);
  EXPECT_EQ(out[7], 0x8665eeb269b687c3u);
  EXPECT_EQ(out[8], 0x7a385155bee7079fu);
  EXPECT_EQ(out[15], 0x6f4d794b1f0ae1acu);
}

TEST(ChaCha20Test, BlocksMadeTogetherAreThoseMadeAlone) {
  const std::array<uint32_t, 8> key{1, 2, 3, 4, 5, 6, 7, 8};
  std::array<uint64_t, kDrawBatch> together;
  std::array<uint64_t, kDrawBatch> alone;
  const uint32_t counter = 0xFFFFFFFE;  // The counter wraps within the four.
  ChaCha20Blocks(key, counter, {9, 10, 11}, &together);
  for (uint32_t block = 0; block < 4; ++block) {
    ChaCha20Blocks(key, counter + block, {9, 10, 11}, &alone);
    EXPECT_TRUE(std::equal(alone.begin(), alone.begin() + 8, together.begin() + 8 * block));
  }
}

// ---- Addresses ----------------------------------------------------------------------------------

TEST(KeyedBitsTest, NumbersLieWhereTheHeaderSaysTheyDo) {
  const auto key = TestKey(1);
  std::array<uint32_t, 8> words;
  for (uint32_t i = 0; i < 8; ++i) {
    words[i] = 0;
    for (int byte = 3; byte >= 0; --byte) {
      words[i] = words[i] << 8 | std::to_integer<uint32_t>(key[4 * i + byte]);
    }
  }
  const DrawStream stream{0x1234, 0xABCD, 0x89ABCDEF, 0x56, DrawPurpose::kOutput};
  KeyedBits bits(key, stream);
  std::array<uint64_t, kDrawBatch> block;
  for (const uint32_t draw : {0u, 7u, 8u, 31u, 32u, 1000u, 0xFFFFFFFFu}) {
    ChaCha20Blocks(words, draw / 8, {0xABCD1234, 0x89ABCDEF, 0x00000156}, &block);
    EXPECT_EQ(bits.Bits(draw), block[draw % 8]) << draw;
    ChaCha20Blocks(words, draw / 8, {0xABCD1234, 0x89ABCDEF, 0x00FF0156}, &block);
    EXPECT_EQ(bits.Bits(draw, 255), block[draw % 8]) << draw;
  }
}

TEST(KeyedBitsTest, EveryFieldOfTheAddressAndEveryKeyByteMatters) {
  const DrawStream base{3, 5, 7, 2, DrawPurpose::kMass};
  std::vector<DrawStream> streams(7, base);
  streams[1].kv_head = 5;
  streams[2].query_head = 3;
  streams[3].query_token = 7 + (1u << 31);
  streams[4].round = 3;
  streams[5].purpose = DrawPurpose::kOutput;
  // Neighbouring fields do not run into each other.
  streams[6].kv_head = 5;
  streams[6].query_head = 3;
  std::set<uint64_t> numbers;
  for (const DrawStream& stream : streams) {
    for (uint8_t retry = 0; retry < 3; ++retry) {
      for (uint32_t draw = 0; draw < 100; ++draw) {
        numbers.insert(KeyedBits(TestKey(1), stream).Bits(draw, retry));
      }
    }
  }
  EXPECT_EQ(numbers.size(), 7u * 3 * 100);
  for (size_t byte = 0; byte < kDrawKeyBytes; ++byte) {
    auto key = TestKey(1);
    key[byte] ^= std::byte{0x80};
    EXPECT_TRUE(numbers.insert(KeyedBits(key, base).Bits(0)).second) << byte;
  }
}

TEST(KeyedBitsTest, ReplayInAnyOrder) {
  const DrawStream stream{1, 2, 3, 1, DrawPurpose::kMass};
  KeyedBits forward(TestKey(2), stream);
  std::vector<uint64_t> numbers;
  for (uint32_t draw = 0; draw < 200; ++draw) numbers.push_back(forward.Bits(draw));
  KeyedBits backward(TestKey(2), stream);
  for (uint32_t draw = 200; draw-- > 0;) EXPECT_EQ(backward.Bits(draw), numbers[draw]);
}

// ---- Uniform integers ---------------------------------------------------------------------------

uint64_t Result(uint64_t x, uint64_t n) {
  return static_cast<uint64_t>((static_cast<Uint128>(x) * n) >> 64);
}

// True if the sampler takes x at once.
bool Accepts(uint64_t n, uint64_t x) {
  bool retried = false;
  const uint64_t result = UniformBelow(n)([&](uint8_t retry) {
    if (retry > 0) retried = true;
    return retry == 0 ? x : kMax64;
  });
  if (!retried) {
    EXPECT_EQ(result, Result(x, n));
  }
  return !retried;
}

// The values of x that lead to a result r are consecutive, and the low half of x * n grows by n
// from one to the next: only the first can be rejected. So accepted values are counted exactly.
TEST(UniformBelowTest, EveryResultHasTheSameNumberOfAcceptedValues) {
  std::mt19937_64 random(1);
  std::vector<uint64_t> sizes{1, 2, 3, 5, 7, 1u << 20, kMax64, kMax64 - 1, kMax64 / 3};
  for (const int shift : {33, 50, 62, 63}) {
    for (const uint64_t offset : {kMax64, uint64_t{0}, uint64_t{1}}) {
      sizes.push_back((uint64_t{1} << shift) + offset);
    }
  }
  for (int i = 0; i < 200; ++i) sizes.push_back(std::max<uint64_t>(1, random() >> random() % 64));
  for (const uint64_t n : sizes) {
    const auto all = static_cast<Uint128>(1) << 64;
    const auto per_result = static_cast<uint64_t>(all / n);  // 0 stands for 2^64 (n = 1).
    std::vector<uint64_t> results{0, n - 1, n / 2};
    for (int i = 0; i < 20; ++i) results.push_back(random() % n);
    for (const uint64_t r : results) {
      const Uint128 first = (all * r + n - 1) / n;
      const Uint128 end = r + 1 == n ? all : (all * (r + 1) + n - 1) / n;
      ASSERT_EQ(Result(static_cast<uint64_t>(first), n), r);
      const bool first_rejected = !Accepts(n, static_cast<uint64_t>(first));
      ASSERT_TRUE(end - first < 2 || Accepts(n, static_cast<uint64_t>(first + 1)));
      ASSERT_TRUE(end - first < 2 || Accepts(n, static_cast<uint64_t>(end - 1)));
      EXPECT_EQ(static_cast<uint64_t>(end - first) - (first_rejected ? 1 : 0), per_result)
          << n << " " << r;
    }
  }
}

TEST(UniformBelowTest, RejectedNumbersAreDrawnAgain) {
  // 2^64 mod n = 2^62: products with a low half below it are rejected, x = 0 among them.
  const uint64_t n = uint64_t{3} << 62;
  std::vector<uint8_t> retries;
  const uint64_t result = UniformBelow(n)([&](uint8_t retry) {
    retries.push_back(retry);
    return retry < 3 ? uint64_t{0} : kMax64;
  });
  EXPECT_THAT(retries, ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(result, n - 1);
}

TEST(UniformBelowTest, EndsAfter256Tries) {
  int tries = 0;
  const uint64_t result = UniformBelow(3)([&](uint8_t) {
    ++tries;
    return uint64_t{0};
  });
  EXPECT_EQ(tries, 256);
  EXPECT_EQ(result, 0u);
}

// Counts results divisible by 3 among `trials`; `sample` maps a draw to a result.
template <typename Sample>
uint32_t Multiples(uint32_t trials, const Sample& sample) {
  uint32_t count = 0;
  for (uint32_t draw = 0; draw < trials; ++draw) count += sample(draw) % 3 == 0 ? 1 : 0;
  return count;
}

// Without rejection every third result of n = 3/4 2^64 has two values of x and the others one:
// half of the draws are multiples of three. The same test that passes the sampler finds that out.
TEST(UniformBelowTest, BiasWithoutRejectionIsDetected) {
  constexpr uint32_t kTrials = 20000;
  const uint64_t n = uint64_t{3} << 62;
  KeyedBits bits(TestKey(3), DrawStream{});
  const UniformBelow uniform(n);
  const uint32_t fair = Multiples(kTrials, [&](uint32_t draw) {
    return uniform([&](uint8_t retry) { return bits.Bits(draw, retry); });
  });
  const uint32_t biased =
      Multiples(kTrials, [&](uint32_t draw) { return Result(bits.Bits(draw), n); });
  EXPECT_LE(fair, MissesAllowed(kTrials, 1.0 / 3));
  EXPECT_LE(kTrials - fair, MissesAllowed(kTrials, 2.0 / 3));
  EXPECT_GT(biased, MissesAllowed(kTrials, 1.0 / 3));
}

// ---- Finding a token ----------------------------------------------------------------------------

TEST(PageSumsTest, FindsThePageOfEveryUnit) {
  std::mt19937_64 random(4);
  for (uint32_t pages = 1; pages < 40; ++pages) {
    std::vector<uint64_t> sums(pages);
    for (uint64_t& sum : sums) sum = random() % 3 == 0 ? 0 : random() % 7;
    sums[random() % pages] += 1;
    PageSums found;
    found.Assign(sums);
    uint64_t x = 0;
    for (uint32_t page = 0; page < pages; ++page) {
      for (uint64_t offset = 0; offset < sums[page]; ++offset, ++x) {
        const PageSums::Place place = found.Find(x);
        ASSERT_EQ(place.page, page);
        ASSERT_EQ(place.offset, offset);
      }
    }
    EXPECT_EQ(found.total(), x);
  }
}

TEST(PageSumsTest, TotalMayBeTheLargestInteger) {
  PageSums sums;
  sums.Assign({kMax64 - 5, 0, 5});
  EXPECT_EQ(sums.total(), kMax64);
  EXPECT_EQ(sums.Find(kMax64 - 6).page, 0u);
  EXPECT_EQ(sums.Find(kMax64 - 5).page, 2u);
  EXPECT_EQ(sums.Find(kMax64 - 1).offset, 4u);
}

// Every unit of weight leads to its token: probabilities are exactly weight / sum.
TEST(FindTokenTest, EveryUnitLeadsToItsToken) {
  std::mt19937_64 random(5);
  for (uint32_t count = 1; count <= 70; ++count) {
    std::vector<uint32_t> weights(count);
    for (uint32_t& weight : weights) weight = random() % 2 == 0 ? 0 : random() % 9;
    weights[random() % count] += 1;
    uint64_t offset = 0;
    for (uint32_t token = 0; token < count; ++token) {
      for (uint32_t unit = 0; unit < weights[token]; ++unit) {
        ASSERT_EQ(FindToken(absl::MakeConstSpan(weights), offset++), token) << count;
      }
    }
  }
}

TEST(FindTokenTest, WeightsOf64Bits) {
  const std::vector<uint64_t> weights{uint64_t{1} << 62, 0, uint64_t{1} << 63, 1};
  EXPECT_EQ(FindToken(absl::MakeConstSpan(weights), (uint64_t{1} << 62) - 1), 0u);
  EXPECT_EQ(FindToken(absl::MakeConstSpan(weights), uint64_t{1} << 62), 2u);
  EXPECT_EQ(FindToken(absl::MakeConstSpan(weights), uint64_t{3} << 62), 3u);
}

// ---- Samples ------------------------------------------------------------------------------------

std::vector<std::pair<uint32_t, uint32_t>> Sample(const Population& population, uint32_t trial,
                                                  uint32_t draws_max, WeightedDraws* draws) {
  draws->Begin(population.sums, KeyedBits(TestKey(6), DrawStream{0, 0, trial}), draws_max);
  std::vector<std::pair<uint32_t, uint32_t>> tokens;
  WeightedDraws::Token token;
  while (draws->NextDistinct([&](uint32_t page) { return population.Page(page); }, &token)) {
    EXPECT_GT(token.weight, 0u);
    EXPECT_EQ(token.weight, population.Page(token.page)[token.token]);
    tokens.emplace_back(token.page, token.token);
  }
  return tokens;
}

TEST(WeightedDrawsTest, NothingIsDrawnTwice) {
  WeightedDraws draws;
  for (const Population& population : testing::HostilePopulations(128)) {
    for (uint32_t trial = 0; trial < 20; ++trial) {
      const auto tokens = Sample(population, trial, 128, &draws);
      const std::set<std::pair<uint32_t, uint32_t>> distinct(tokens.begin(), tokens.end());
      ASSERT_EQ(distinct.size(), tokens.size()) << population.name;
      uint64_t drawn = 0;
      for (const auto& [page, token] : tokens) drawn += population.Page(page)[token];
      EXPECT_EQ(draws.remaining(), population.weight_sum() - drawn);
      EXPECT_EQ(draws.drawn(), tokens.size());
    }
  }
}

TEST(WeightedDrawsTest, SmallPopulationsAreExhausted) {
  const Population population("seven tokens", {5, 0, 1, 3, 3, 0, 2, 9, 4},
                              std::vector<double>(9, 1.0));
  WeightedDraws draws;
  const auto tokens = Sample(population, 0, 64, &draws);
  EXPECT_EQ(tokens.size(), 7u);
  EXPECT_EQ(draws.remaining(), 0u);
}

TEST(WeightedDrawsTest, GivesUpOnAHeavyToken) {
  std::vector<uint32_t> weights(1000, 1);
  weights[500] = uint32_t{1} << 31;
  const Population population("heavy", weights, std::vector<double>(1000, 1.0));
  WeightedDraws draws;
  const auto tokens = Sample(population, 0, 128, &draws);
  EXPECT_THAT(tokens, ElementsAre(std::make_pair(500u / 64, 500u % 64)));
  EXPECT_EQ(draws.tries(), 4u * 128);
}

TEST(WeightedDrawsTest, ReplayGivesTheSameTokens) {
  const std::vector<Population> populations = testing::HostilePopulations(128);
  WeightedDraws draws;
  for (const Population& population : populations) {
    const auto first = Sample(population, 7, 128, &draws);
    EXPECT_EQ(Sample(population, 7, 128, &draws), first) << population.name;
  }
}

// The second of two draws without replacement: weights 5, 3, 2 in different pages.
TEST(WeightedDrawsTest, LaterDrawsAreProportionalToWhatRemains) {
  constexpr uint32_t kTrials = 20000;
  std::vector<uint32_t> weights(192, 0);
  weights[10] = 5;
  weights[70] = 3;
  weights[191] = 2;
  const Population population("three", weights, std::vector<double>(192, 0.0));
  WeightedDraws draws;
  std::array<uint32_t, 3> second{};
  for (uint32_t trial = 0; trial < kTrials; ++trial) {
    // Sixty-four tries: a second token is missing with probability 2^-63 at most.
    ++second[Sample(population, trial, 16, &draws)[1].first];
  }
  // P(second is i) = sum over first j of w_j / 10 * w_i / (10 - w_j).
  const std::array<double, 3> expected{3.0 / 10 * 5 / 7 + 2.0 / 10 * 5 / 8,
                                       5.0 / 10 * 3 / 5 + 2.0 / 10 * 3 / 8,
                                       5.0 / 10 * 2 / 5 + 3.0 / 10 * 2 / 7};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_LE(second[i], MissesAllowed(kTrials, expected[i])) << i;
    EXPECT_LE(kTrials - second[i], MissesAllowed(kTrials, 1.0 - expected[i])) << i;
  }
}

TEST(WeightedDrawsTest, WithReplacementEveryDrawIsProportionalToWeight) {
  constexpr uint32_t kTrials = 20000;
  const Population population("two", {7, 0, 1}, {0.0, 0.0, 0.0});
  WeightedDraws draws;
  draws.Begin(population.sums, KeyedBits(TestKey(8), DrawStream{}), kTrials);
  uint32_t light = 0;
  for (uint32_t i = 0; i < kTrials; ++i) {
    const auto token = draws.Next([&](uint32_t page) { return population.Page(page); });
    ASSERT_NE(token.token, 1u);
    light += token.token == 2 ? 1 : 0;
  }
  EXPECT_LE(light, MissesAllowed(kTrials, 0.125));
  EXPECT_LE(kTrials - light, MissesAllowed(kTrials, 0.875));
}

}  // namespace
}  // namespace kvservice
