#include "kvservice/model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "kvservice/error.h"
#include "kvservice/model_registry.h"
#include "kvservice/sha256.h"

namespace kvservice {
namespace {

constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();

ModelSpec Good() {
  ModelSpec spec;
  spec.name = "llama";
  spec.layer_count = 4;
  spec.layout = {.query_head_count = 8, .kv_head_count = 2, .head_dim = 64};
  spec.scale = 0.125F;
  spec.sliding_windows = {0, 128, 0, 128};
  spec.inverse_frequencies.assign(32, 0.5F);
  spec.rotary_style = RotaryStyle::kHalf;
  return spec;
}

struct Change {
  std::string field;
  std::function<void(ModelSpec*)> make;
};

TEST(ValidateModelTest, NamesTheFieldAsTheProtoSpellsIt) {
  const std::vector<Change> table = {
      {"model.name", [](ModelSpec* m) { m->name.clear(); }},
      {"model.name", [](ModelSpec* m) { m->name.assign(kModelNameBytesMax + 1, 'x'); }},
      {"model.layer_count", [](ModelSpec* m) { m->layer_count = 0; }},
      {"model.layer_count", [](ModelSpec* m) { m->layer_count = kLayersMax + 1; }},
      {"model.kv_head_count", [](ModelSpec* m) { m->layout.kv_head_count = 0; }},
      {"model.kv_head_count", [](ModelSpec* m) { m->layout.kv_head_count = kKvHeadsMax + 1; }},
      {"model.query_head_count", [](ModelSpec* m) { m->layout.query_head_count = 0; }},
      {"model.query_head_count", [](ModelSpec* m) { m->layout.query_head_count = 7; }},
      {"model.query_head_count", [](ModelSpec* m) { m->layout.query_head_count = 34; }},
      {"model.head_dim", [](ModelSpec* m) { m->layout.head_dim = 65; }},
      {"model.cache_dtype", [](ModelSpec* m) { m->layout.dtype = static_cast<DType>(9); }},
      {"model.scale", [](ModelSpec* m) { m->scale = 0.0F; }},
      {"model.scale", [](ModelSpec* m) { m->scale = NAN; }},
      {"model.scale", [](ModelSpec* m) { m->scale = INFINITY; }},
      {"model.logit_softcap", [](ModelSpec* m) { m->logit_softcap = -1.0F; }},
      {"model.logit_softcap", [](ModelSpec* m) { m->logit_softcap = INFINITY; }},
      {"model.sliding_window_tokens", [](ModelSpec* m) { m->sliding_windows.pop_back(); }},
      {"model.rotary_style", [](ModelSpec* m) { m->rotary_style = static_cast<RotaryStyle>(5); }},
      {"model.inverse_frequencies", [](ModelSpec* m) { m->rotary_style = RotaryStyle::kNone; }},
      {"model.inverse_frequencies", [](ModelSpec* m) { m->inverse_frequencies.clear(); }},
      {"model.inverse_frequencies", [](ModelSpec* m) { m->inverse_frequencies.resize(33); }},
      {"model.inverse_frequencies", [](ModelSpec* m) { m->inverse_frequencies[3] = NAN; }},
      {"model.sketch_tables", [](ModelSpec* m) { m->sketch_tables.resize(7); }},
      {"model.sketch_tables[0].metric", [](ModelSpec* m) { m->sketch_tables.resize(8); }},
      {"model.sketch_tables[5].directions[0]",
       [](ModelSpec* m) {
         m->sketch_tables.assign(8, IdentitySketchTable(64));
         m->sketch_tables[5].directions.assign(64, 1.0F);
       }},
      {"model.default_policy.cis.min_cosine",
       [](ModelSpec* m) { m->default_policy.cis.min_cosine = 2.0F; }},
  };
  for (const Change& change : table) {
    ModelSpec spec = Good();
    change.make(&spec);
    const absl::Status status = ValidateModel(&spec);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << change.field;
    EXPECT_EQ(DetailsOf(status).field, change.field) << status;
    EXPECT_EQ(DetailsOf(status).reason, "MODEL_INVALID");
  }
}

TEST(ValidateModelTest, FillsIdentityTables) {
  ModelSpec spec = Good();
  ASSERT_TRUE(ValidateModel(&spec).ok()) << ValidateModel(&spec);
  ASSERT_EQ(spec.sketch_tables.size(), 8U);
  EXPECT_EQ(spec.sketch_tables[7].metric, std::vector<float>(64, 1.0F));
}

TEST(FingerprintTest, ChangesWithEverythingThatChangesBytesOrMeaning) {
  const std::vector<Change> table = {
      {"name", [](ModelSpec* m) { m->name = "other"; }},
      {"layers",
       [](ModelSpec* m) {
         m->layer_count = 8;
         m->sliding_windows.clear();
       }},
      {"query heads", [](ModelSpec* m) { m->layout.query_head_count = 16; }},
      {"kv heads", [](ModelSpec* m) { m->layout.kv_head_count = 4; }},
      {"dim", [](ModelSpec* m) { m->layout.head_dim = 128; }},
      {"dtype", [](ModelSpec* m) { m->layout.dtype = DType::kFloat16; }},
      {"scale", [](ModelSpec* m) { m->scale = 0.1F; }},
      {"cap", [](ModelSpec* m) { m->logit_softcap = 50.0F; }},
      {"window", [](ModelSpec* m) { m->sliding_windows[0] = 128; }},
      {"frequency", [](ModelSpec* m) { m->inverse_frequencies[31] = 0.25F; }},
      {"rotary", [](ModelSpec* m) { m->rotary_style = RotaryStyle::kInterleaved; }},
      {"table",
       [](ModelSpec* m) {
         m->sketch_tables.assign(8, IdentitySketchTable(64));
         m->sketch_tables[3].metric[0] = 2.0F;
         m->sketch_tables[3].metric[1] = 0.5F;
       }},
  };
  std::set<uint64_t> seen;
  ModelSpec good = Good();
  ASSERT_TRUE(ValidateModel(&good).ok());
  seen.insert(ModelFingerprint(good));
  for (const Change& change : table) {
    ModelSpec spec = Good();
    change.make(&spec);
    ASSERT_TRUE(ValidateModel(&spec).ok()) << change.field << ValidateModel(&spec);
    EXPECT_TRUE(seen.insert(ModelFingerprint(spec)).second) << change.field;
  }
  ModelSpec same = Good();
  same.default_policy = DefaultPolicy(SelectorKind::kCpe);
  ASSERT_TRUE(ValidateModel(&same).ok());
  EXPECT_EQ(ModelFingerprint(same), ModelFingerprint(good)) << "a policy is no property of bytes";
}

TEST(ModelRegistryTest, TheSameAgainIsFineAnotherIsNot) {
  ModelRegistry registry(2, kNoLimit);
  const auto first = registry.Register(Good());
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(*registry.Register(Good()), *first);
  ModelSpec windows_spelled_out = Good();
  windows_spelled_out.name = "full";
  windows_spelled_out.sliding_windows.clear();
  ASSERT_TRUE(registry.Register(windows_spelled_out).ok());
  windows_spelled_out.sliding_windows = {0, 0, 0, 0};
  EXPECT_TRUE(registry.Register(windows_spelled_out).ok());

  ModelSpec other = Good();
  other.scale = 1.0F;
  EXPECT_EQ(DetailsOf(registry.Register(other).status()).reason, "MODEL_EXISTS");
  EXPECT_EQ(registry.Register(other).status().code(), absl::StatusCode::kAlreadyExists);
  other = Good();
  other.default_policy = DefaultPolicy(SelectorKind::kCpe);
  EXPECT_EQ(DetailsOf(registry.Register(other).status()).reason, "MODEL_EXISTS");
  other.name = "third";
  EXPECT_EQ(DetailsOf(registry.Register(other).status()).reason, "MODELS_FULL");
  EXPECT_EQ(registry.count(), 2U);
  EXPECT_EQ(registry.List().at(0).name, "full");
  EXPECT_EQ(registry.Find("third"), nullptr);
}

TEST(ModelRegistryTest, AModelMustFitThePool) {
  ModelRegistry registry(2, 1000);
  const absl::Status status = registry.Register(Good()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(DetailsOf(status).reason, "MODEL_TOO_LARGE");
}

std::string HexDigest(const std::string& text, size_t step) {
  Sha256 digest;
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  for (size_t at = 0; at < text.size(); at += step) {
    digest.Update({bytes + at, std::min(step, text.size() - at)});
  }
  std::string hex;
  for (const std::byte byte : digest.Finish()) {
    constexpr char kDigits[] = "0123456789abcdef";
    hex.push_back(kDigits[std::to_integer<int>(byte) >> 4]);
    hex.push_back(kDigits[std::to_integer<int>(byte) & 15]);
  }
  return hex;
}

// Vectors of FIPS 180-4.
TEST(Sha256Test, KnownAnswers) {
  EXPECT_EQ(HexDigest("", 1), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(HexDigest("abc", 3),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const std::string two_chunks = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
  for (const size_t step : {1, 7, 55, 56}) {
    EXPECT_EQ(HexDigest(two_chunks, step),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  }
  EXPECT_EQ(HexDigest(std::string(1000000, 'a'), 4096),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

}  // namespace
}  // namespace kvservice
