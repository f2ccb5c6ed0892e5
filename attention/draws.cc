#include "attention/draws.h"

#include <algorithm>
#include <bit>
#include <iterator>

namespace kvservice {
namespace {

constexpr uint32_t kBlocks = 4;
constexpr uint32_t kRounds = 20;
// "expand 32-byte k" as little-endian words.
constexpr std::array<uint32_t, 4> kConstants{0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};

// The same state word of the four blocks. GCC and clang know it as one vector register (or emulate
// it); lanes are read and written as elements of an array.
using Lanes = uint32_t __attribute__((vector_size(4 * kBlocks)));

template <int kBits>
inline Lanes RotateLeft(Lanes x) {
  return x << kBits | x >> (32 - kBits);
}

// RFC 8439 section 2.1.
inline void QuarterRound(Lanes& a, Lanes& b, Lanes& c, Lanes& d) {
  a += b;
  d = RotateLeft<16>(d ^ a);
  c += d;
  b = RotateLeft<12>(b ^ c);
  a += b;
  d = RotateLeft<8>(d ^ a);
  c += d;
  b = RotateLeft<7>(b ^ c);
}

uint32_t LittleEndianWord(const std::byte* bytes) {
  uint32_t word = 0;
  for (int i = 3; i >= 0; --i) word = word << 8 | std::to_integer<uint32_t>(bytes[i]);
  return word;
}

}  // namespace

void ChaCha20Blocks(const std::array<uint32_t, 8>& key, uint32_t counter,
                    const std::array<uint32_t, 3>& nonce, std::array<uint64_t, kDrawBatch>* out) {
  Lanes start[16];
  for (uint32_t i = 0; i < kBlocks; ++i) {
    for (uint32_t word = 0; word < 4; ++word) start[word][i] = kConstants[word];
    for (uint32_t word = 0; word < 8; ++word) start[4 + word][i] = key[word];
    start[12][i] = counter + i;
    for (uint32_t word = 0; word < 3; ++word) start[13 + word][i] = nonce[word];
  }
  Lanes x[16];
  std::copy(std::begin(start), std::end(start), std::begin(x));
  for (uint32_t round = 0; round < kRounds; round += 2) {
    QuarterRound(x[0], x[4], x[8], x[12]);
    QuarterRound(x[1], x[5], x[9], x[13]);
    QuarterRound(x[2], x[6], x[10], x[14]);
    QuarterRound(x[3], x[7], x[11], x[15]);
    QuarterRound(x[0], x[5], x[10], x[15]);
    QuarterRound(x[1], x[6], x[11], x[12]);
    QuarterRound(x[2], x[7], x[8], x[13]);
    QuarterRound(x[3], x[4], x[9], x[14]);
  }
  for (uint32_t word = 0; word < 16; ++word) x[word] += start[word];
  for (uint32_t i = 0; i < kBlocks; ++i) {
    for (uint32_t pair = 0; pair < 8; ++pair) {
      (*out)[8 * i + pair] = x[2 * pair][i] | static_cast<uint64_t>(x[2 * pair + 1][i]) << 32;
    }
  }
}

KeyedBits::KeyedBits(std::span<const std::byte, kDrawKeyBytes> key, const DrawStream& stream)
    : nonce_{stream.kv_head | static_cast<uint32_t>(stream.query_head) << 16, stream.query_token,
             stream.round | static_cast<uint32_t>(stream.purpose) << 8} {
  for (size_t word = 0; word < key_.size(); ++word) {
    key_[word] = LittleEndianWord(key.data() + 4 * word);
  }
}

void KeyedBits::FillBatch(uint32_t batch_index) {
  ChaCha20Blocks(key_, batch_index * kBlocks, nonce_, &batch_);
  batch_index_ = batch_index;
}

uint64_t KeyedBits::RetryBits(uint32_t draw, uint8_t retry) const {
  std::array<uint32_t, 3> nonce = nonce_;
  nonce[2] |= static_cast<uint32_t>(retry) << 16;
  std::array<uint64_t, kDrawBatch> blocks;
  ChaCha20Blocks(key_, draw / 8, nonce, &blocks);
  return blocks[draw % 8];
}

void PageSums::Assign(absl::Span<const uint64_t> sums) {
  running_.resize(sums.size());
  uint64_t running = 0;
  for (size_t page = 0; page < sums.size(); ++page) {
    assert(sums[page] <= std::numeric_limits<uint64_t>::max() - running);
    running += sums[page];
    running_[page] = running;
  }
}

PageSums::Place PageSums::Find(uint64_t x) const {
  assert(x < total());
  // The first page whose running sum exceeds x, by halving. The step is masked, not branched upon:
  // each comparison has a random outcome.
  const uint64_t* const sums = running_.data();
  size_t page = 0;
  for (size_t count = running_.size(); count > 1;) {
    const size_t half = count / 2;
    page += half & (0 - static_cast<size_t>(sums[page + half - 1] <= x));
    count -= half;
  }
  return {static_cast<uint32_t>(page), page == 0 ? x : x - sums[page - 1]};
}

void WeightedDraws::Begin(const PageSums& pages, const KeyedBits& bits, uint32_t draws_max) {
  assert(pages.total() > 0);
  pages_ = &pages;
  bits_ = bits;
  uniform_ = UniformBelow(pages.total());
  draws_max_ = draws_max;
  drawn_ = 0;
  tries_ = 0;
  remaining_ = pages.total();
  // At most half full, so that a search ends soon.
  seen_.assign(std::bit_ceil(std::max<size_t>(2, 2 * static_cast<size_t>(draws_max))), 0);
}

bool WeightedDraws::Insert(uint32_t page, uint32_t token) {
  const uint64_t id = (static_cast<uint64_t>(page) << 32 | token) + 1;
  // Multiplicative hashing: the top bits of the product depend on all bits of the id.
  size_t place = (id * 0x9E3779B97F4A7C15) >> 32 & (seen_.size() - 1);
  for (; seen_[place] != 0; place = (place + 1) & (seen_.size() - 1)) {
    if (seen_[place] == id) return false;
  }
  seen_[place] = id;
  return true;
}

}  // namespace kvservice
