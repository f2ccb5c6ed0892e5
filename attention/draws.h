// Random numbers of the sampled certificate: keyed, addressed by counter, replayable, unbiased.
//
// A sampled bound holds with probability 1 - eta over these numbers alone, so nobody who shapes the
// population (keys, values, queries) may be able to predict them or to learn them from replies. The
// generator is therefore the ChaCha20 block function (RFC 8439 section 2.3) under a 256-bit key
// that the caller derives for one row of one call: HMAC-SHA-256 of a server secret over a call
// number that is never used twice, sequence, layer and attempt. Counter generators made for
// simulation (Philox, Threefry) claim statistical quality, not that outputs hide the key; under
// them "probability" would be a hope. With ChaCha20, whoever makes a bound fail more often than
// eta + 2^-100 can tell ChaCha20 (or HMAC-SHA-256) from random. It costs 1 us per 128 draws.
//
// Address of one 64-bit number, all of it in the 128-bit counter and nonce of the block function:
//
//   state word 12   draw / 8                     draw: 32 bits; its number is the little-endian
//                                                64-bit word draw % 8 of the block
//   state word 13   kv_head | query_head << 16   16 bits each
//   state word 14   query_token                  32 bits
//   state word 15   round | purpose << 8 | retry << 16     8 bits each; the top byte is zero
//
// Every draw has its own address, rejected tries included, so draws can be made in any order and by
// many threads, and any one can be replayed from key and address. Blocks are made four at a time.
//
// Draws of tokens: x uniform in [0, sum of weights), the page by binary search in the running sums
// of the pages, the token by the running sum within its page. Integers throughout: the probability
// of a token is its weight over the sum, exactly. KeyedBits and WeightedDraws: one thread each.

#ifndef KVSERVICE_ATTENTION_DRAWS_H_
#define KVSERVICE_ATTENTION_DRAWS_H_

#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "absl/types/span.h"

namespace kvservice {

__extension__ using Uint128 = unsigned __int128;

inline constexpr size_t kDrawKeyBytes = 32;
inline constexpr uint32_t kDrawBatch = 32;  // Numbers made at once: four blocks of eight.

// What the numbers are used for. Streams of different purposes share nothing.
enum class DrawPurpose : uint8_t { kMass = 0, kOutput = 1 };

struct DrawStream {
  uint16_t kv_head = 0;
  uint16_t query_head = 0;
  uint32_t query_token = 0;
  uint8_t round = 0;
  DrawPurpose purpose = DrawPurpose::kMass;
};

// Four consecutive ChaCha20 blocks, counter .. counter + 3 (modulo 2^32), as 64-bit little-endian
// words. key and nonce are little-endian 32-bit words.
void ChaCha20Blocks(const std::array<uint32_t, 8>& key, uint32_t counter,
                    const std::array<uint32_t, 3>& nonce, std::array<uint64_t, kDrawBatch>* out);

// The 64-bit numbers of one stream under one key.
class KeyedBits {
 public:
  KeyedBits(std::span<const std::byte, kDrawKeyBytes> key, const DrawStream& stream);

  // The number of `draw` after `retry` rejections. Ascending draws are cheapest.
  uint64_t Bits(uint32_t draw, uint8_t retry = 0) {
    if (retry != 0) return RetryBits(draw, retry);
    if (draw / kDrawBatch != batch_index_) FillBatch(draw / kDrawBatch);
    return batch_[draw % kDrawBatch];
  }

 private:
  void FillBatch(uint32_t batch_index);
  uint64_t RetryBits(uint32_t draw, uint8_t retry) const;

  std::array<uint32_t, 8> key_;
  std::array<uint32_t, 3> nonce_;
  uint32_t batch_index_ = std::numeric_limits<uint32_t>::max();  // No draw has this one.
  std::array<uint64_t, kDrawBatch> batch_;
};

// Uniform integers in [0, n), 1 <= n <= 2^64 - 1, without bias (Lemire 2019, "Fast Random Integer
// Generation in an Interval"). Of the 2^64 values of x, the products x * n whose low half is below
// 2^64 mod n are rejected; then every result has exactly floor(2^64 / n) of the remaining values.
class UniformBelow {
 public:
  explicit UniformBelow(uint64_t n) : n_(n), rejected_((0 - n) % n) { assert(n > 0); }

  // bits(retry) gives the raw 64 bits of the draw after `retry` rejections. Whatever n, 2^64 mod n
  // is below 2^63, so a try is rejected with probability below 1/2 (and n / 2^64); the last of 256
  // is needed with probability below 2^-255, and is taken as it is.
  template <typename Bits>
  uint64_t operator()(const Bits& bits) const {
    constexpr uint8_t kRetryLast = std::numeric_limits<uint8_t>::max();
    Uint128 product = 0;
    for (uint8_t retry = 0;; ++retry) {
      product = static_cast<Uint128>(bits(retry)) * n_;
      if (static_cast<uint64_t>(product) >= rejected_ || retry == kRetryLast) break;
    }
    return static_cast<uint64_t>(product >> 64);
  }

 private:
  uint64_t n_;
  uint64_t rejected_;  // 2^64 mod n
};

// Running sums of the pages' weights: which page holds the x-th unit of weight.
class PageSums {
 public:
  // sums: [page_count], the sum of the weights of each page's tokens; together below 2^64.
  void Assign(absl::Span<const uint64_t> sums);

  uint64_t total() const { return running_.empty() ? 0 : running_.back(); }

  struct Place {
    uint32_t page;
    uint64_t offset;  // Units of weight of that page that come before x.
  };
  // x < total().
  Place Find(uint64_t x) const;

 private:
  std::vector<uint64_t> running_;  // [page_count], inclusive.
};

// The token within its page: the first whose running sum exceeds `offset`. weights: integers of at
// most 64 bits; offset is below their sum. Without branches that depend on the weights: each would
// be predicted wrongly every other time.
template <typename Weight>
uint32_t FindToken(absl::Span<const Weight> weights, uint64_t offset) {
  constexpr uint32_t kChunk = 8;
  const auto count = static_cast<uint32_t>(weights.size());
  const Weight* const weight = weights.data();
  uint32_t token = 0;
  uint64_t before = 0;  // Sum of the weights before `token`.
  uint64_t running = 0;
  for (uint32_t begin = 0; begin + kChunk <= count; begin += kChunk) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < kChunk; ++i) sum += weight[begin + i];
    running += sum;
    const uint64_t passed = running <= offset ? ~uint64_t{0} : 0;
    token += kChunk & static_cast<uint32_t>(passed);
    before += (running - before) & passed;
  }
  const uint32_t end = token + kChunk < count ? token + kChunk : count;
  for (uint32_t i = token; i + 1 < end; ++i) {
    before += weight[i];
    token += before <= offset ? 1 : 0;
  }
  assert(token < count);
  return token;
}

// Draws tokens with probability proportional to integer weights. Weights may not change between
// Begin and the last draw.
class WeightedDraws {
 public:
  // Tries per wanted token: a heavy token that was drawn keeps being drawn again.
  static constexpr uint32_t kTriesPerDraw = 4;

  struct Token {
    uint32_t page;
    uint32_t token;  // Within its page.
    uint64_t weight;
  };

  // Starts a sample of up to draws_max tokens. `pages` is borrowed and must have a total above 0.
  void Begin(const PageSums& pages, const KeyedBits& bits, uint32_t draws_max);

  // The next token that was not drawn before; weights_of(page) gives the weights of its tokens as a
  // span that holds until the next call. Given that it is not a repetition, a draw is proportional
  // to weight among the tokens that remain, which is all that sampling without replacement asks.
  // False when everything was drawn, draws_max tokens were, or kTriesPerDraw * draws_max tries.
  // Stopping for the last reason is a function of past draws, so bounds that hold at any stopping
  // time hold there too.
  template <typename WeightsOf>
  bool NextDistinct(const WeightsOf& weights_of, Token* token) {
    while (drawn_ < draws_max_ && tries_ < kTriesPerDraw * draws_max_ && remaining_ > 0) {
      *token = Draw(weights_of);
      if (!Insert(token->page, token->token)) continue;
      remaining_ -= token->weight;
      ++drawn_;
      return true;
    }
    return false;
  }

  // The next token of a sample with replacement. A sample is of one kind or the other.
  template <typename WeightsOf>
  Token Next(const WeightsOf& weights_of) {
    ++drawn_;
    return Draw(weights_of);
  }

  uint32_t drawn() const { return drawn_; }
  uint32_t tries() const { return tries_; }
  // Sum of the weights of the tokens that NextDistinct has not given yet.
  uint64_t remaining() const { return remaining_; }

 private:
  template <typename WeightsOf>
  Token Draw(const WeightsOf& weights_of) {
    const uint32_t draw = tries_++;
    const uint64_t x = uniform_([&](uint8_t retry) { return bits_.Bits(draw, retry); });
    const PageSums::Place place = pages_->Find(x);
    const auto weights = weights_of(place.page);
    const uint32_t token = FindToken(weights, place.offset);
    return {place.page, token, weights[token]};
  }
  // False if the token was inserted before.
  bool Insert(uint32_t page, uint32_t token);

  const PageSums* pages_ = nullptr;
  KeyedBits bits_{std::array<std::byte, kDrawKeyBytes>{}, DrawStream{}};
  UniformBelow uniform_{1};
  uint32_t draws_max_ = 0;
  uint32_t drawn_ = 0;
  uint32_t tries_ = 0;
  uint64_t remaining_ = 0;
  std::vector<uint64_t> seen_;  // Open addressing; 0 is an empty place.
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_DRAWS_H_
