// Long random histories, compared step by step with the simplest possible model: a map from handles
// to one list of words per layer.
//
// A failure prints its seed; the seed alone replays the history.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kvservice/cache/sequence.h"
#include "kvservice/error.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLayers = 2;
constexpr uint32_t kOperations = 2500;
constexpr uint64_t kLeaseMs = 1000;

struct ModelSequence {
  std::string tenant;
  uint64_t generation = 1;
  uint64_t lease_end_ms = 0;
  std::vector<Words> layers{kLayers};

  uint32_t length_min() const {
    return static_cast<uint32_t>(std::min(layers[0].size(), layers[1].size()));
  }
  uint32_t length_max() const {
    return static_cast<uint32_t>(std::max(layers[0].size(), layers[1].size()));
  }
};

struct BySequenceId {
  bool operator()(const SequenceId& a, const SequenceId& b) const { return a.bytes < b.bytes; }
};

// Of one history.
struct HistoryOptions {
  uint64_t seed = 0;
  // Blocks whose rows have to be on the host.
  uint32_t host_blocks = 0;
  uint32_t length_max = 260;
  // Where it is computed; and how far outputs may be off, normalised.
  std::string device = "reference";
  double out_error_max = 1e-12;
};

EngineOptions OptionsOf(const HistoryOptions& history) {
  EngineOptions options = TestEngine::SmallOptions();
  const ModelSpec model = SmallModel(kLayers);
  const CacheShape shape(model.layout, model.layer_count, {});
  options.host_pool_bytes = history.host_blocks * shape.block().rows;
  options.pool_bytes = 40 * BlockBytes(model) - options.host_pool_bytes;
  options.lease_default_ms = kLeaseMs;
  options.sequences_max = 24;
  options.sequence_tokens_max = history.length_max;
  // Lists are dropped now and then.
  options.list_bytes_per_sequence_max = 40000;
  return options;
}

class History {
 public:
  explicit History(const HistoryOptions& options) : options_(options), random_(options.seed) {}
  EngineStats Stats() { return engine_.get()->Stats(); }

  void Run() {
    for (uint32_t i = 0; i < kOperations && !::testing::Test::HasFatalFailure(); ++i) {
      SCOPED_TRACE("operation " + std::to_string(i));
      Step();
    }
    EXPECT_GT(attended_, kOperations / 10) << "the history is not dull";
    EXPECT_GT(attended_tokens_ / attended_, kBlockTokens) << "most calls see sealed blocks";
    EXPECT_GT(pool_full_, 0U) << "the pool was full now and then";
    EXPECT_GT(expired_, 0U) << "some leases ended";
  }

  // Every sequence that is left holds what the model says; dropping them frees every block.
  void Finish() {
    ExpireModel();
    for (const auto& [id, sequence] : model_) {
      for (uint32_t layer = 0; layer < kLayers; ++layer) Read(id, sequence, layer);
    }
    EXPECT_EQ(engine_.List("").size(), model_.size());
    for (const auto& [id, sequence] : model_) {
      EXPECT_TRUE(engine_.Drop({.id = id}, sequence.tenant).ok());
    }
    engine_.clock.AdvanceMs(kLeaseMs);
    for (int i = 0; i < 4; ++i) engine_.List("");
    EXPECT_EQ(engine_.get()->Stats().sequences, 0U);
    EXPECT_EQ(engine_.get()->Stats().blocks_used, 0U);
    EXPECT_EQ(engine_.get()->Stats().pool_bytes_used, 0U);
  }

 private:
  using Entry = std::map<SequenceId, ModelSequence, BySequenceId>::value_type;

  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(random_() % end); }
  bool Chance(uint32_t percent) { return Below(100) < percent; }
  // Few different words, so that conflicts and agreements both happen.
  Words RandomWords(uint32_t count) {
    Words words(count);
    for (uint32_t& word : words) word = Below(50);
    return words;
  }

  void Step() {
    // Where rows are is looked at every now and then.
    if (options_.host_blocks > 0) AdvanceClock(5);
    const uint32_t choice = Below(100);
    if (model_.empty() || choice < 4) return Create();
    Entry& entry = *std::next(model_.begin(), Below(static_cast<uint32_t>(model_.size())));
    if (choice < 40) return Append(&entry);
    if (choice < 78) return Attend(&entry);
    if (choice < 85) return Fork(&entry);
    if (choice < 92) return Truncate(&entry);
    if (choice < 95) return Drop(entry.first);
    if (choice < 97) return UseStale(entry);
    AdvanceClock(Below(400));
  }

  void Use(ModelSequence* sequence) { sequence->lease_end_ms = now_ms_ + kLeaseMs; }
  Handle HandleOf(const Entry& entry) const {
    return {.id = entry.first, .generation = entry.second.generation};
  }
  // The full pool or table is always a possible answer; nothing changes then.
  bool IsFull(const absl::Status& status) {
    const std::string reason = DetailsOf(status).reason;
    if (reason != "POOL_FULL" && reason != "SEQUENCES_FULL") return false;
    if (reason == "POOL_FULL") ++pool_full_;
    return true;
  }
  void ExpectInfo(const SequenceInfo& info, const ModelSequence& sequence) {
    EXPECT_EQ(info.generation, sequence.generation);
    EXPECT_EQ(info.length, sequence.length_min());
    EXPECT_EQ(info.length_max, sequence.length_max());
    EXPECT_EQ(info.block_count, BlockCount(sequence.length_max()));
    EXPECT_EQ(info.lease_remaining_ms, kLeaseMs);
  }

  void Create() {
    CreateOptions options;
    options.model = kModel;
    ModelSequence sequence;
    sequence.tenant = Chance(50) ? "a" : "b";
    const auto info = engine_.Create(options, sequence.tenant);
    if (!info.ok()) {
      EXPECT_TRUE(IsFull(info.status())) << info.status();
      return;
    }
    Use(&sequence);
    ExpectInfo(*info, sequence);
    EXPECT_TRUE(model_.emplace(info->id, sequence).second);
  }

  void Append(Entry* entry) {
    const uint32_t layer = Below(kLayers);
    Words* stored = &entry->second.layers[layer];
    const auto length = static_cast<uint32_t>(stored->size());
    const uint32_t position = Chance(70) ? length : Below(length + 3);
    Words words = RandomWords(1 + Below(Chance(40) ? 20 : 150));
    // Repeat what is stored, mostly.
    if (Chance(80)) {
      for (uint32_t i = 0; i < words.size() && position + i < length; ++i) {
        words[i] = (*stored)[position + i];
      }
    }
    const auto result =
        engine_.Append(HandleOf(*entry), layer, position, words, entry->second.tenant);
    Use(&entry->second);
    const std::string expected = Judge(*stored, position, words);
    if (!result.ok() && expected == "OK" && IsFull(result.status())) return;
    ASSERT_EQ(result.ok() ? "OK" : DetailsOf(result.status()).reason, expected);
    if (!result.ok()) return;
    const size_t end = position + words.size();
    EXPECT_EQ(result->duplicate, end <= length);
    if (end > length)
      stored->insert(stored->end(), words.begin() + (length - position), words.end());
    EXPECT_EQ(result->layer_length, stored->size());
  }

  // What storing `words` at `position` must lead to.
  std::string Judge(const Words& stored, uint32_t position, const Words& words) const {
    if (position > stored.size()) return "POSITION_GAP";
    if (position + words.size() > options_.length_max) return "SEQUENCE_TOO_LONG";
    for (size_t i = 0; i < words.size() && position + i < stored.size(); ++i) {
      if (stored[position + i] != words[i]) return "APPEND_CONFLICT";
    }
    return "OK";
  }

  Policy RandomPolicy() {
    constexpr SelectorKind kKinds[] = {SelectorKind::kDense,     SelectorKind::kCis,
                                       SelectorKind::kEtf,       SelectorKind::kCpe,
                                       SelectorKind::kCertified, SelectorKind::kScan};
    Policy policy = DefaultPolicy(kKinds[Below(std::size(kKinds))]);
    policy.dense_below_tokens = 0;
    policy.layers.clear();
    policy.budget = {.sink = 4, .local = 8, .top_k = 16};
    policy.cis.min_cosine = Chance(50) ? -1.0F : 0.8F;
    policy.cis.anchors_max = 4;
    if (Chance(30)) policy.cis.max_dropped_mass_estimate = 0.5F;
    policy.psaw.phi = 0.8F;
    policy.etf = {.first_layer = 0, .psi = 0.7F};
    if (Chance(30)) policy.budget.mass = 0.1F;
    if (Chance(30)) {
      policy.layers = {{.layer_begin = Below(kLayers),
                        .layer_end = kLayers,
                        .kv_head_min_cosines = {-1.0F, 0.9F},
                        .hidden_share = 0.3F,
                        .frozen_share = 0.4F}};
    }
    policy.mode = Chance(40) ? Mode::kShadow : Mode::kEnforce;
    return policy;
  }

  void Attend(Entry* entry) {
    const uint32_t layer = Below(kLayers);
    Words* stored = &entry->second.layers[layer];
    const auto length = static_cast<uint32_t>(stored->size());
    const bool stores = Chance(70);
    const uint32_t position =
        Chance(80) && length > 0 ? length - (stores ? 0 : 1) : Below(length + 2);
    Words words = RandomWords(Chance(80) ? 1 : 1 + Below(8));
    for (uint32_t i = 0; i < words.size() && position + i < length; ++i) {
      if (!stores || Chance(95)) words[i] = (*stored)[position + i];
    }
    const Policy policy = RandomPolicy();
    AttendStep step(engine_.model(), layer, entry->second.tenant);
    step.Add(HandleOf(*entry), position, words);
    if (!stores) step.OnlyRead();
    step.call.policy = &policy;
    step.call.want_selected = true;
    ASSERT_TRUE(step.Run(engine_.get()).ok());
    Use(&entry->second);

    const absl::Status& status = step.result(0).status;
    const size_t end = position + words.size();
    std::string expected = stores ? Judge(*stored, position, words) : "OK";
    if (!stores && end > length) expected = "POSITION_GAP";
    if (!status.ok() && expected == "OK" && IsFull(status)) return;
    ASSERT_EQ(status.ok() ? "OK" : DetailsOf(status).reason, expected);
    if (!status.ok()) return;
    ++attended_;
    attended_tokens_ += end;
    if (end > length)
      stored->insert(stored->end(), words.begin() + (length - position), words.end());
    ExpectAnswer(step, policy, *stored, position);
  }

  void ExpectAnswer(const AttendStep& step, const Policy& policy, const Words& stored,
                    uint32_t position) {
    const AttendRowResult& result = step.result(0);
    const uint32_t count = step.call.rows[0].query_count;
    EXPECT_EQ(result.attended_length, position + count);
    LayerShape shape;
    shape.layout = engine_.model().layout;
    shape.scale = engine_.model().scale;
    const bool dense = policy.mode == Mode::kShadow || result.selector == SelectorKind::kDense;
    for (uint32_t token = 0; token < count; ++token) {
      const DenseAnswer answer = AttendDensely(shape, step.call.layer, stored, position + token);
      if (dense) {
        EXPECT_LT(NormalizedSquaredError(step.Out(token), answer.out), options_.out_error_max);
      }
      for (uint32_t head = 0; head < 4; ++head) {
        const double truth = DroppedMass(answer.logits[head], result.selected[head / 2]);
        EXPECT_GE(result.certificates[token * 4 + head].dropped_mass_upper.value,
                  truth * (1 - 1e-12) - 1e-15);
      }
    }
  }

  static double DroppedMass(const std::vector<double>& logits,
                            const std::vector<uint32_t>& selected) {
    const double top = *std::max_element(logits.begin(), logits.end());
    double all = 0.0;
    double kept = 0.0;
    for (const double logit : logits) all += std::exp(logit - top);
    for (const uint32_t token : selected) {
      if (token < logits.size()) kept += std::exp(logits[token] - top);
    }
    return (all - kept) / all;
  }

  // Attends over a whole layer, whatever its length.
  void Read(const SequenceId& id, const ModelSequence& sequence, uint32_t layer) {
    const Words& stored = sequence.layers[layer];
    if (stored.empty()) return;
    const auto last = static_cast<uint32_t>(stored.size()) - 1;
    const Policy policy = DefaultPolicy(SelectorKind::kDense);
    AttendStep step(engine_.model(), layer, sequence.tenant);
    step.Add({.id = id, .generation = sequence.generation}, last, {stored[last]}).OnlyRead();
    step.call.policy = &policy;
    step.call.want_selected = true;
    ASSERT_TRUE(step.Run(engine_.get()).ok());
    ASSERT_TRUE(step.result(0).status.ok()) << step.result(0).status;
    ExpectAnswer(step, policy, stored, last);
  }

  void Fork(Entry* entry) {
    const uint32_t longest = entry->second.length_min();
    const uint32_t length = Chance(40) ? longest : Below(longest + 2);
    const auto info = engine_.Fork(HandleOf(*entry), length, entry->second.tenant);
    Use(&entry->second);
    if (length > longest) {
      EXPECT_EQ(DetailsOf(info.status()).reason, "LENGTH_OUT_OF_RANGE");
      return;
    }
    if (!info.ok()) {
      EXPECT_TRUE(IsFull(info.status())) << info.status();
      return;
    }
    ModelSequence child;
    child.tenant = entry->second.tenant;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const Words& parent = entry->second.layers[layer];
      child.layers[layer].assign(parent.begin(), parent.begin() + length);
    }
    Use(&child);
    ExpectInfo(*info, child);
    EXPECT_TRUE(model_.emplace(info->id, child).second);
  }

  void Truncate(Entry* entry) {
    const uint32_t longest = entry->second.length_max();
    const uint32_t length = Chance(80) ? longest - std::min(longest, Below(6)) : Below(longest + 2);
    const auto info = engine_.Truncate(HandleOf(*entry), length, entry->second.tenant);
    Use(&entry->second);
    if (length > longest) {
      EXPECT_EQ(DetailsOf(info.status()).reason, "LENGTH_OUT_OF_RANGE");
      return;
    }
    if (!info.ok()) {
      EXPECT_TRUE(IsFull(info.status())) << info.status();
      return;
    }
    ++entry->second.generation;
    for (Words& words : entry->second.layers) {
      if (words.size() > length) words.resize(length);
    }
    ExpectInfo(*info, entry->second);
  }

  void Drop(const SequenceId id) {
    const std::string tenant = model_.at(id).tenant;
    EXPECT_TRUE(engine_.Drop({.id = id}, tenant).ok());
    EXPECT_EQ(DetailsOf(engine_.Get({.id = id}, tenant).status()).reason, "SEQUENCE_NOT_FOUND");
    model_.erase(id);
  }

  void UseStale(const Entry& entry) {
    Handle handle = HandleOf(entry);
    const std::string other = entry.second.tenant == "a" ? "b" : "a";
    EXPECT_EQ(DetailsOf(engine_.Append(handle, 0, 0, {1}, other).status()).reason,
              "SEQUENCE_NOT_FOUND");
    ++handle.generation;
    const auto stale = engine_.Append(handle, 0, 0, {1}, entry.second.tenant);
    EXPECT_EQ(DetailsOf(stale.status()).reason, "GENERATION_MISMATCH");
    Use(&model_.at(entry.first));
  }

  void AdvanceClock(uint32_t ms) {
    engine_.clock.AdvanceMs(ms);
    now_ms_ += ms;
    ExpireModel();
  }

  void ExpireModel() {
    expired_ += std::erase_if(
        model_, [this](const Entry& entry) { return entry.second.lease_end_ms <= now_ms_; });
  }

  const HistoryOptions options_;
  TestEngine engine_{OptionsOf(options_), kLayers, *NewDevice(options_.device, {})};
  std::mt19937_64 random_;
  std::map<SequenceId, ModelSequence, BySequenceId> model_;
  uint64_t now_ms_ = 0;
  uint32_t attended_ = 0;
  uint64_t attended_tokens_ = 0;
  size_t pool_full_ = 0;
  size_t expired_ = 0;
};

class EngineModelTest : public ::testing::TestWithParam<uint64_t> {};

TEST_P(EngineModelTest, HoldsWhatTheModelHolds) {
  SCOPED_TRACE("seed " + std::to_string(GetParam()));
  History history({.seed = GetParam()});
  history.Run();
  history.Finish();
}

// The same with most rows on the host, at times: nobody can tell.
TEST_P(EngineModelTest, HoldsItWhereverItIs) {
  SCOPED_TRACE("seed " + std::to_string(GetParam()));
  History history({.seed = GetParam(), .host_blocks = 38, .length_max = 640});
  history.Run();
  const EngineStats stats = history.Stats();
  EXPECT_GT(stats.blocks_to_host_total, 20U);
  EXPECT_GT(stats.blocks_to_device_total, 5U);
  history.Finish();
}

TEST_P(EngineModelTest, NorOnAGpu) {
  const auto device = NewDevice("cuda", {});
  if (!device.ok()) GTEST_SKIP() << device.status();
  SCOPED_TRACE("seed " + std::to_string(GetParam()));
  History history({.seed = GetParam(),
                   .host_blocks = 38,
                   .length_max = 640,
                   .device = "cuda",
                   .out_error_max = 1e-9});
  history.Run();
  EXPECT_GT(history.Stats().blocks_to_host_total, 20U);
  history.Finish();
}

INSTANTIATE_TEST_SUITE_P(Seeds, EngineModelTest, ::testing::Values(1, 2, 3));

}  // namespace
}  // namespace kvservice::testing
