#include "kvservice/stored_rows.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kvservice/cache/byte_codec.h"
#include "kvservice/stored_policy.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

Policy FullPolicy() {
  Policy policy = DefaultPolicy(SelectorKind::kCpe);
  policy.budget = {.sink = 1, .local = 2, .top_k = 3, .mass = 0.25F};
  policy.cis.seed = false;
  policy.psaw.phi = 0.5F;
  policy.etf.gamma = 2.0F;
  policy.layers = {{.layer_begin = 0, .layer_end = 1},
                   {.layer_begin = 1,
                    .layer_end = 2,
                    .selector = SelectorKind::kScan,
                    .budget = Budget{.sink = 5},
                    .min_cosine = 0.75F,
                    .kv_head_min_cosines = {0.5F, 0.25F},
                    .hidden_share = 0.125F,
                    .frozen_share = 0.5F,
                    .psaw_decay_scale = 1.0F,
                    .psaw_decay_rate = 2.0F,
                    .etf_logit_drift = 3.0F}};
  policy.guarantee = Guarantee::kExact;
  policy.on_violation = OnViolation::kFail;
  policy.mode = Mode::kShadow;
  policy.deferred_exact_steps = 9;
  return policy;
}

SequenceId SomeId() {
  SequenceId id;
  id.bytes.fill(std::byte{5});
  return id;
}

StoredState SomeState() {
  StoredState state;
  state.id = SomeId();
  state.tenant = "acme";
  state.identity.fill(std::byte{3});
  state.generation = 77;
  state.crash_count = 2;
  state.lease_ns = 12345;
  state.is_suspended = true;
  state.layers = {{.length = 64, .last = state.identity}, {.length = 3, .last = {}}};
  return state;
}

StoredIdentity SomeIdentity() {
  StoredIdentity identity;
  identity.id = SomeId();
  identity.tenant = "acme";
  identity.request_id = "once";
  identity.model_fingerprint = 42;
  identity.table_digest.fill(std::byte{9});
  identity.policy = FullPolicy();
  return identity;
}

TEST(StoredRowsTest, APolicyComesBack) {
  ByteWriter writer;
  WritePolicy(FullPolicy(), &writer);
  ByteReader reader(writer.bytes());
  EXPECT_EQ(ReadPolicy(&reader), FullPolicy());
  EXPECT_TRUE(reader.Finished());
}

TEST(StoredRowsTest, RowsComeBack) {
  const auto state = ReadState(WriteState(SomeState()));
  ASSERT_TRUE(state.has_value());
  EXPECT_EQ(state->id, SomeId());
  EXPECT_EQ(state->tenant, "acme");
  EXPECT_EQ(state->identity, SomeState().identity);
  EXPECT_EQ(state->generation, 77);
  EXPECT_EQ(state->crash_count, 2);
  EXPECT_EQ(state->lease_ns, 12345);
  EXPECT_TRUE(state->is_suspended);
  EXPECT_EQ(state->layers, SomeState().layers);

  const auto identity = ReadIdentity(WriteIdentity(SomeIdentity()));
  ASSERT_TRUE(identity.has_value());
  EXPECT_EQ(identity->tenant, "acme");
  EXPECT_EQ(identity->request_id, "once");
  EXPECT_EQ(identity->model_fingerprint, 42);
  EXPECT_EQ(identity->table_digest, SomeIdentity().table_digest);
  EXPECT_EQ(identity->policy, FullPolicy());

  ModelSpec spec = SmallModel(3);
  spec.sliding_windows = {0, 64, 0};
  spec.default_policy = FullPolicy();
  const auto model = ReadModel(WriteModel({.spec = spec, .table_digest = {}}));
  ASSERT_TRUE(model.has_value());
  EXPECT_EQ(ModelFingerprint(model->spec), ModelFingerprint(spec));
  EXPECT_EQ(model->spec.default_policy, FullPolicy());

  EXPECT_EQ(ReadLost(SomeId(), WriteLost(SomeId(), "acme")), "acme");
  EXPECT_EQ(ReadLost(SequenceId(), WriteLost(SomeId(), "acme")), std::nullopt);

  Inventory inventory;
  inventory[SomeId()] = {.tenant = "acme", .is_lost = false, .state = SomeState().identity};
  inventory[SequenceId()] = {.tenant = "", .is_lost = true, .state = {}};
  const auto read = ReadInventory(WriteInventory(inventory));
  ASSERT_TRUE(read.has_value());
  ASSERT_EQ(read->size(), 2);
  EXPECT_EQ(read->at(SomeId()).state, SomeState().identity);
  EXPECT_TRUE(read->at(SequenceId()).is_lost);
}

// Of two entries of one sequence nobody could say which is right.
TEST(StoredRowsTest, AnInventoryNamesEachSequenceOnce) {
  Inventory one;
  one[SomeId()] = {.tenant = "acme", .is_lost = false, .state = {}};
  const std::string bytes = WriteInventory(one);
  std::string twice = bytes + bytes.substr(sizeof(uint32_t));
  twice[0] = 2;
  EXPECT_TRUE(ReadInventory(bytes).has_value());
  EXPECT_FALSE(ReadInventory(twice).has_value());
}

// A row is not taken for another kind of row.
TEST(StoredRowsTest, KindsAreKeptApart) {
  EXPECT_FALSE(ReadState(WriteIdentity(SomeIdentity())).has_value());
  EXPECT_FALSE(ReadIdentity(WriteState(SomeState())).has_value());
  EXPECT_FALSE(ReadModel(WriteTables({})).has_value());
}

TEST(StoredRowsTest, TablesTellWhoBroughtThem) {
  for (const char* importer : {"", "tenant"}) {
    const auto read = ReadTables(WriteTables(
        {.model_fingerprint = 1, .version = 2, .encoded = "tables", .importer = importer}));
    ASSERT_TRUE(read.has_value());
    EXPECT_EQ(read->encoded, "tables");
    EXPECT_EQ(read->importer, importer);
  }
}

// Parsers believe nothing, not even under a seal that is right: they may find other values or none,
// and read nothing that is not theirs (the sanitizers look).
TEST(StoredRowsTest, SealedNonsenseIsParsedInPeace) {
  const std::vector<std::string> rows = {
      WriteState(SomeState()), WriteIdentity(SomeIdentity()),
      WriteModel({.spec = SmallModel(2), .table_digest = {}}),
      WriteTables({.model_fingerprint = 1, .version = 0, .encoded = "tables"})};
  std::mt19937_64 random(1);
  uint64_t parsed = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string row = rows[random() % rows.size()];
    row.resize(row.size() - sizeof(Checksum));
    for (uint64_t change = random() % 4; change < 4; ++change) {
      row[random() % row.size()] = static_cast<char>(random());
    }
    if (random() % 4 == 0) row.resize(1 + random() % row.size());
    Seal(&row);
    parsed += ReadState(row).has_value() ? 1 : 0;
    parsed += ReadIdentity(row).has_value() ? 1 : 0;
    parsed += ReadModel(row).has_value() ? 1 : 0;
    parsed += ReadTables(row).has_value() ? 1 : 0;
    ReadInventory(row.substr(5));
  }
  EXPECT_GT(parsed, 1000);
}

TEST(StoredRowsTest, SlicesOfALayerAreARange) {
  const SequenceId id = SomeId();
  const std::string begin = SliceKey(id, 2, 0);
  for (const uint32_t block : {0U, 1U, 255U, 256U, 70'000U}) {
    const std::string key = SliceKey(id, 2, block);
    EXPECT_LE(begin, key);
    EXPECT_LT(key, SliceKeyEnd(id, 2));
    EXPECT_LT(key, SliceKeyEnd(id));
    EXPECT_GE(SliceKey(id, 3, block), SliceKeyEnd(id, 2));
  }
}

}  // namespace
}  // namespace kvservice::testing
