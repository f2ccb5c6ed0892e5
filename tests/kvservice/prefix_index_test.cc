// Digests of token prefixes, the index of who has them, against a model that compares token ids
// over random histories, and what a match gives.

#include "kvservice/cache/prefix_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "attention/device.h"
#include "attention/kv_layout.h"
#include "attention/sketch_table.h"
#include "kvservice/declared_prompt.h"
#include "kvservice/model.h"
#include "kvservice/model_registry.h"
#include "kvservice/prefix_chain.h"
#include "kvservice/sequence_table.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();
constexpr uint64_t kModelFingerprint = 17;

PrefixSecret Secret(uint8_t first) {
  PrefixSecret secret{};
  secret[0] = std::byte{first};
  return secret;
}

std::vector<PrefixDigest> ChainOf(const Words& ids, const std::string& tenant = "tenant") {
  return PrefixChains(Secret(1)).Of(tenant, kModelFingerprint, {}, ids, kNoLimit);
}

std::string Hex(const PrefixDigest& digest) {
  std::string hex;
  for (const std::byte byte : digest) {
    constexpr char kDigits[] = "0123456789abcdef";
    hex += kDigits[std::to_integer<int>(byte >> 4)];
    hex += kDigits[std::to_integer<int>(byte & std::byte{15})];
  }
  return hex;
}

// Computed with Python's hmac and hashlib from the formula in kvservice/prefix_chain.h.
TEST(PrefixChainTest, IsTheFormula) {
  PrefixSecret secret;
  Sha256::Digest tables;
  for (size_t i = 0; i < secret.size(); ++i) {
    secret[i] = static_cast<std::byte>(i);
    tables[i] = static_cast<std::byte>(255 - i);
  }
  const auto chain = PrefixChains(secret).Of("someone", 0x0123456789abcdef, tables,
                                             Counting(1000, 2 * kBlockTokens + 3), kNoLimit);
  ASSERT_EQ(chain.size(), 2U);
  EXPECT_EQ(Hex(chain[0]), "a513d329a36e81dfb6f6e906838f8ecc418d82fb7adf35a30812169cb0cc78ff");
  EXPECT_EQ(Hex(chain[1]), "f242f305d656b86c5b253b39b8f90fc56b757dd424eebb010312211fd1f0ab98");
}

TEST(PrefixChainTest, NothingButTheSameBeginningOfTheSameTenantMakesTheSameDigest) {
  const Words ids = Counting(0, 3 * kBlockTokens);
  Words other_last = ids;
  ++other_last.back();
  Words other_first = ids;
  ++other_first.front();
  Sha256::Digest other_tables{};
  other_tables.back() = std::byte{1};
  const PrefixChains chains(Secret(1));
  const std::vector<PrefixDigest> chain = chains.Of("ab", 1, {}, ids, kNoLimit);
  const auto last = chains.Of("ab", 1, {}, other_last, kNoLimit);
  EXPECT_EQ(last[1], chain[1]);
  std::vector<std::vector<PrefixDigest>> all = {
      chain,
      chains.Of("ab", 1, {}, other_first, kNoLimit),
      chains.Of("a", 1, {}, ids, kNoLimit),
      chains.Of("", 1, {}, ids, kNoLimit),
      chains.Of(std::string("ab\0", 3), 1, {}, ids, kNoLimit),
      chains.Of("ab", 2, {}, ids, kNoLimit),
      chains.Of("ab", 1, other_tables, ids, kNoLimit),
      PrefixChains(Secret(2)).Of("ab", 1, {}, ids, kNoLimit),
      {last[2]}};
  std::set<PrefixDigest> distinct;
  size_t count = 0;
  for (const auto& one : all) {
    distinct.insert(one.begin(), one.end());
    count += one.size();
  }
  EXPECT_EQ(distinct.size(), count);
  EXPECT_EQ(chains.Of("ab", 1, {}, ids, 2), std::vector(chain.begin(), chain.begin() + 2));
  EXPECT_TRUE(chains.Of("ab", 1, {}, Counting(0, kBlockTokens - 1), kNoLimit).empty());
}

TEST(PrefixIndexTest, WhatATenantDeclaresBeyondItsRoomIsLeftOut) {
  PrefixIndex index(3);
  SequenceRecord a;
  SequenceRecord b;
  const auto chain = ChainOf(Counting(0, 2 * kBlockTokens));
  const auto others = ChainOf(Counting(7, 2 * kBlockTokens));
  auto first = index.Declare("tenant", &a, chain);
  const auto second = index.Declare("tenant", &b, others);
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(second->chain().size(), 1U);
  EXPECT_EQ(index.Declare("tenant", &b, others), nullptr);
  EXPECT_EQ(
      index.Declare("other", &b, ChainOf(Counting(0, 3 * kBlockTokens), "other"))->chain().size(),
      3U)
      << "the room of one tenant is not another's";
  EXPECT_EQ(index.declared_blocks(), 3U);
  first->Cut(1);
  EXPECT_EQ(index.declared_blocks(), 2U);
  EXPECT_EQ(index.Declare("tenant", &b, others)->chain().size(), 1U);
  first.reset();
  EXPECT_EQ(index.Declare("tenant", &b, others)->chain().size(), 2U);
}

// Many claims that share blocks, so that they stand behind each other in the index in any order.
class History {
 public:
  explicit History(uint64_t seed) : random_(seed) {}

  void Step() {
    const uint64_t kind = random_() % 10;
    if (claims_.size() < 3 || (kind < 2 && claims_.size() < 40)) return Declare();
    const size_t at = random_() % claims_.size();
    Claimed& one = *claims_[at];
    const auto blocks = static_cast<uint32_t>(random_() % 7);
    if (kind < 6) {
      one.offered = std::min<size_t>(blocks, one.ids.size() / kBlockTokens);
      if (one.claim != nullptr) one.claim->Offer(blocks);
    } else if (kind < 7) {
      if (blocks < one.ids.size() / kBlockTokens) one.ids.resize(blocks * kBlockTokens);
      one.offered = std::min<size_t>(one.offered, blocks);
      if (one.claim != nullptr) one.claim->Cut(blocks);
    } else if (kind < 8) {
      claims_.erase(claims_.begin() + static_cast<ptrdiff_t>(at));
    } else {
      Find();
    }
  }
  // Whatever was found, so that a history that finds nothing is seen.
  uint64_t matched_blocks() const { return matched_blocks_; }

  void ExpectCounts() const {
    uint64_t declared = 0;
    for (const auto& one : claims_) {
      declared += one->ids.size() / kBlockTokens;
      if (one->claim == nullptr) continue;
      EXPECT_EQ(one->claim->offered_count(), one->offered);
    }
    EXPECT_EQ(index_.declared_blocks(), declared);
  }

 private:
  struct Claimed {
    std::string tenant;
    Words ids;
    size_t offered = 0;
    SequenceRecord record;
    std::unique_ptr<PrefixClaim> claim;
  };

  // Each block is one of two, so prefixes meet all the time.
  Words SomeIds() {
    Words ids;
    for (uint64_t block = random_() % 6; block > 0; --block) {
      ids.resize(ids.size() + kBlockTokens, static_cast<uint32_t>(random_() % 2));
    }
    ids.resize(ids.size() + random_() % kBlockTokens, 5);
    return ids;
  }
  std::string SomeTenant() { return random_() % 2 == 0 ? "a" : "b"; }

  void Declare() {
    auto one = std::make_unique<Claimed>();
    one->tenant = SomeTenant();
    one->ids = SomeIds();
    one->claim = index_.Declare(one->tenant, &one->record, ChainOf(one->ids, one->tenant));
    EXPECT_EQ(one->claim == nullptr, one->ids.size() < kBlockTokens);
    claims_.push_back(std::move(one));
  }

  void Find() {
    const std::string tenant = SomeTenant();
    const Words ids = SomeIds();
    const PrefixIndex::Match match = index_.Find(tenant, ChainOf(ids, tenant));
    size_t longest = 0;
    size_t of_source = 0;
    for (const auto& one : claims_) {
      if (one->tenant != tenant) continue;
      const size_t whole = std::min(one->offered, ids.size() / kBlockTokens) * kBlockTokens;
      const auto differ =
          std::mismatch(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(whole), one->ids.begin());
      const size_t same = static_cast<size_t>(differ.first - ids.begin()) / kBlockTokens;
      longest = std::max(longest, same);
      if (&one->record == match.source) of_source = same;
    }
    EXPECT_EQ(match.block_count, longest);
    EXPECT_EQ(of_source, longest);
    EXPECT_EQ(match.source == nullptr, longest == 0);
    matched_blocks_ += longest;
  }

  std::mt19937_64 random_;
  PrefixIndex index_{kNoLimit};
  std::vector<std::unique_ptr<Claimed>> claims_;
  uint64_t matched_blocks_ = 0;
};

TEST(PrefixIndexTest, FindsWhatAModelFindsInRandomHistories) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(seed);
    History history(seed);
    for (int step = 0; step < 1500 && !::testing::Test::HasFailure(); ++step) history.Step();
    history.ExpectCounts();
    EXPECT_GT(history.matched_blocks(), 100U);
  }
}

// ---- What a match gives ----

class BeginWithTest : public ::testing::Test {
 protected:
  BeginWithTest() : pool_(*BlockPool::New(device_.get(), size_t{1} << 20)) {
    source_ = New("tenant", &model_, model_.tables->latest());
    const KvLayout& layout = model_.spec.layout;
    const Words words = Counting(0, kBlockTokens);
    const auto k = PartBytes(layout, layout.dtype, Part::kKey, 0, words);
    const auto v = PartBytes(layout, layout.dtype, Part::kValue, 0, words);
    EXPECT_EQ(source_->cache->Append(0, 0, kBlockTokens, k.data(), v.data()),
              AppendOutcome::kStored);
  }

  std::unique_ptr<SequenceRecord> New(const std::string& tenant, const Model* model,
                                      const TableVersion* tables) {
    auto record = std::make_unique<SequenceRecord>();
    record->tenant = tenant;
    record->model = model;
    record->tables = tables;
    record->cache = std::make_unique<Sequence>(&tables->shape, pool_.get(), device_.get(),
                                               pool_->OwnerOf(tenant));
    return record;
  }
  // What it has afterwards.
  uint32_t Begin(std::unique_ptr<SequenceRecord> record, uint32_t block_count = 1) const {
    BeginWith({.source = source_.get(), .block_count = block_count}, record.get());
    EXPECT_EQ(record->matched_tokens, record->cache->length_min());
    return record->matched_tokens;
  }

  const std::unique_ptr<Device> device_ = *NewDevice("reference", {});
  const std::unique_ptr<BlockPool> pool_;
  const Model model_{Valid(SmallModel(1))};
  std::unique_ptr<SequenceRecord> source_;

 private:
  static ModelSpec Valid(ModelSpec spec) {
    EXPECT_TRUE(ValidateModel(&spec).ok());
    return spec;
  }
};

// Digests keep all of these apart already; should one ever not, this does.
TEST_F(BeginWithTest, WhatWasMatchedByMistakeIsNotTaken) {
  const TableVersion* const tables = model_.tables->latest();
  EXPECT_EQ(Begin(New("tenant", &model_, tables)), kBlockTokens);
  EXPECT_EQ(Begin(New("other", &model_, tables)), 0U);
  EXPECT_EQ(Begin(New("tenant", nullptr, tables)), 0U);
  std::vector<SketchTable> others = tables->tables;
  others[0].metric[0] *= 2.0F;
  ASSERT_TRUE(NormalizeSketchTable(model_.spec.layout.head_dim, others.data()).ok());
  const TableVersion version(model_.spec.layout, 1, others);
  EXPECT_EQ(Begin(New("tenant", &model_, &version)), 0U);
  EXPECT_EQ(Begin(New("tenant", &model_, tables), 2), 0U) << "the source has one block";
}

}  // namespace
}  // namespace kvservice::testing
