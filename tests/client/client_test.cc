// The client against a real server, whose answers are compared with attention computed here.

#include "client/client.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

using client::Client;
using client::FieldOf;
using client::MetadataOf;
using client::ReasonOf;
using std::chrono::milliseconds;

// Normalised squared error of float32 outputs, and difference of logarithms.
constexpr double kOutTolerance = 1e-10;
constexpr double kLseTolerance = 1e-4;
constexpr uint32_t kLayers = 2;

std::string Line(const absl::Status& status) {
  std::string line = absl::StatusCodeToString(status.code());
  if (!ReasonOf(status).empty()) line += " " + ReasonOf(status);
  if (!FieldOf(status).empty()) line += " " + FieldOf(status);
  return line;
}

// Owns what a view borrows.
struct Numbers {
  std::vector<std::byte> bytes;
  client::TensorView view;
};

// Every case runs with calls of every kind.
class ClientTest : public ::testing::TestWithParam<client::Transport> {
 protected:
  ClientTest() : client_(Connect()) {}

  std::unique_ptr<Client> Connect() const {
    client::ClientOptions options;
    options.endpoint = "unix:" + served_.folder() + "/data";
    // Hangs become failures, and a loaded machine does not.
    options.deadlines.data = std::chrono::minutes(1);
    options.deadlines.admin = std::chrono::minutes(1);
    options.transport = GetParam();
    absl::StatusOr<std::unique_ptr<Client>> connected = Client::Connect(options);
    EXPECT_TRUE(connected.ok()) << connected.status();
    return *std::move(connected);
  }

  const KvLayout& layout() const { return served_.model().layout; }
  LayerShape Shape() const {
    return {.layout = layout(), .scale = served_.model().scale, .inverse_frequencies = {}};
  }

  Numbers Make(Part part, uint32_t layer, const Words& words) const {
    const bool query = part == Part::kQuery;
    Numbers numbers;
    numbers.bytes =
        PartBytes(layout(), query ? DType::kFloat32 : layout().dtype, part, layer, words);
    numbers.view = {.dtype = query ? client::DType::kFloat32 : client::DType::kBfloat16,
                    .token_count = static_cast<uint32_t>(words.size()),
                    .head_count = query ? layout().query_head_count : layout().kv_head_count,
                    .head_dim = layout().head_dim,
                    .bytes = numbers.bytes};
    return numbers;
  }

  client::Sequence Create() {
    absl::StatusOr<client::Sequence> sequence = client_->CreateSequence({.model = kModel});
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    return *std::move(sequence);
  }

  absl::Status Write(client::AppendWriter* writer, uint32_t layer, uint32_t position,
                     const Words& words) const {
    const Numbers k = Make(Part::kKey, layer, words);
    const Numbers v = Make(Part::kValue, layer, words);
    return writer->Write(layer, position, k.view, v.view);
  }

  // The words 0, 1, ... in all layers.
  void Fill(const client::Sequence& sequence, uint32_t count) const {
    client::AppendWriter writer = sequence.Append();
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      EXPECT_TRUE(Write(&writer, layer, 0, Counting(0, count)).ok());
    }
    const absl::StatusOr<client::Receipt> receipt = writer.Commit();
    ASSERT_TRUE(receipt.ok()) << receipt.status();
    EXPECT_EQ(receipt->length_tokens, count);
  }

  // The query of the word at `position`, which must be stored already.
  absl::StatusOr<client::AttendRowResult> Read(const client::Sequence& sequence, uint32_t layer,
                                               uint32_t position,
                                               std::optional<client::Policy> policy = std::nullopt,
                                               client::GivenPositions given = {}) const {
    const Numbers q = Make(Part::kQuery, layer, {position});
    client::AttendQuery query;
    query.layer = layer;
    query.position = position;
    query.q = q.view;
    query.policy = std::move(policy);
    query.given = given;
    query.return_selected = true;
    return sequence.Attend(query);
  }

  // Share of the head's attention outside its selected positions.
  static double DroppedMass(const DenseAnswer& dense, const client::AttendRowResult& row,
                            size_t head) {
    const size_t group_size = dense.lse.size() / row.selected.size();
    std::vector<double> logits = dense.logits[head];
    for (const uint32_t position : row.selected[head / group_size]) logits[position] = -INFINITY;
    double mass = 0.0;
    for (const double logit : logits) mass += std::exp(logit - dense.lse[head]);
    return mass;
  }

  ServedEngine served_;
  std::unique_ptr<Client> client_;
};

TEST_P(ClientTest, DenseAttentionIsWhatTheTestComputes) {
  const client::Sequence sequence = Create();
  EXPECT_EQ(sequence.id().size(), 16U);
  Fill(sequence, 100);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    // The hundred-and-first token comes with the query.
    const Numbers q = Make(Part::kQuery, layer, {100});
    const Numbers k = Make(Part::kKey, layer, {100});
    const Numbers v = Make(Part::kValue, layer, {100});
    client::AttendQuery query = {.layer = layer, .position = 100};
    query.q = q.view;
    query.k = k.view;
    query.v = v.view;
    const absl::StatusOr<client::AttendRowResult> row = sequence.Attend(query);
    ASSERT_TRUE(row.ok()) << row.status();
    const DenseAnswer dense = AttendDensely(Shape(), layer, Counting(0, 101), 100);
    EXPECT_LT(NormalizedSquaredError(row->out, dense.out), kOutTolerance);
    EXPECT_EQ(row->attended_tokens, 101U);
    EXPECT_EQ(row->selector, client::Selector::kDense);
    ASSERT_EQ(row->certificates.size(), dense.lse.size());
    for (size_t head = 0; head < dense.lse.size(); ++head) {
      EXPECT_NEAR(row->lse[head], dense.lse[head], kLseTolerance);
      EXPECT_EQ(row->certificates[head].level, Level::kExact);
      EXPECT_EQ(row->certificates[head].dropped_mass_upper.value, 0.0);
    }
  }
  const absl::StatusOr<client::SequenceInfo> info = sequence.Describe();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->length_tokens, 101U);
  EXPECT_EQ(info->model, kModel);
  EXPECT_EQ(info->certificates_proven, 2U * layout().query_head_count);
}

TEST_P(ClientTest, GivenPositionsAreAttendedAndTheRestIsBounded) {
  const client::Sequence sequence = Create();
  Fill(sequence, 200);
  const std::vector<uint32_t> positions = {0, 50, 199, 1, 2, 3, 150, 199};
  const std::vector<uint32_t> offsets = {0, 3, 8};
  client::Policy policy;
  policy.selector = client::Selector::kGiven;
  policy.budget = client::Budget{.sink_tokens = 0, .local_tokens = 0};
  policy.guarantee = client::Guarantee::kExact;
  policy.max_dropped_mass = 1.0F;
  policy.layers.emplace();
  const absl::StatusOr<client::AttendRowResult> row =
      Read(sequence, 1, 199, policy, {.positions = positions, .offsets = offsets});
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_EQ(row->selector, client::Selector::kGiven);
  // The sketch keeps the first tokens of a sequence exact and the last block is not sealed yet:
  // both are read whatever was given.
  Words always = Counting(0, 8);
  for (const uint32_t position : Counting(3 * kBlockTokens, 8)) always.push_back(position);
  ASSERT_EQ(row->selected.size(), 2U);
  for (uint32_t head = 0; head < 2; ++head) {
    std::set<uint32_t> expected(always.begin(), always.end());
    expected.insert(positions.begin() + offsets[head], positions.begin() + offsets[head + 1]);
    EXPECT_EQ(row->selected[head], Words(expected.begin(), expected.end()));
  }
  const DenseAnswer dense = AttendDensely(Shape(), 1, Counting(0, 200), 199);
  double largest = 0.0;
  for (size_t head = 0; head < dense.lse.size(); ++head) {
    const double truth = DroppedMass(dense, *row, head);
    largest = std::max(largest, truth);
    EXPECT_GT(truth, 0.0);
    EXPECT_EQ(row->certificates[head].level, Level::kExact);
    EXPECT_EQ(row->certificates[head].action, Action::kSelected);
    EXPECT_GE(row->certificates[head].dropped_mass_upper.value, truth);
    EXPECT_LE(row->certificates[head].dropped_mass_lower.value, truth);
  }
  // Something was at stake.
  EXPECT_GT(largest, 0.1);
}

TEST_P(ClientTest, CertifiedAttentionKeepsItsLimit) {
  const client::Sequence sequence = Create();
  Fill(sequence, 1000);
  client::Policy policy;
  policy.selector = client::Selector::kCertified;
  policy.budget = client::Budget{.sink_tokens = 4, .local_tokens = 16};
  policy.layers.emplace();
  policy.max_dropped_mass = 0.1F;
  policy.dense_below_tokens = 0;
  const absl::StatusOr<client::AttendRowResult> row = Read(sequence, 0, 999, policy);
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_EQ(row->selector, client::Selector::kCertified);
  const DenseAnswer dense = AttendDensely(Shape(), 0, Counting(0, 1000), 999);
  for (size_t head = 0; head < dense.lse.size(); ++head) {
    const client::GroupReport& group = row->groups[head / layout().group_size()];
    EXPECT_TRUE(group.scanned);
    EXPECT_LT(group.tokens_read, 1000U);
    const HeadCertificate& certificate = row->certificates[head];
    EXPECT_TRUE(certificate.met);
    EXPECT_GE(certificate.level, Level::kConfidence);
    EXPECT_LE(certificate.dropped_mass_upper.value, static_cast<double>(0.1F));
    EXPECT_GE(certificate.dropped_mass_upper.value, DroppedMass(dense, *row, head));
  }
}

// The limit arrives, and what was estimated comes back once there is something to reuse.
TEST_P(ClientTest, VerifiedSharingTellsItsEstimate) {
  const client::Sequence sequence = Create();
  Fill(sequence, 1000);
  client::Policy policy;
  policy.selector = client::Selector::kCis;
  policy.budget = client::Budget{.sink_tokens = 4, .local_tokens = 16, .top_k_tokens = 200};
  policy.cis = client::CisPolicy{.min_cosine = -1.0F, .max_dropped_mass_estimate = 0.99F};
  policy.dense_below_tokens = 0;
  policy.layers.emplace();
  const absl::StatusOr<client::AttendRowResult> first = Read(sequence, 0, 999, policy);
  ASSERT_TRUE(first.ok()) << first.status();
  const absl::StatusOr<client::AttendRowResult> second = Read(sequence, 0, 999, policy);
  ASSERT_TRUE(second.ok()) << second.status();
  for (size_t i = 0; i < second->groups.size(); ++i) {
    EXPECT_TRUE(first->groups[i].scanned);
    EXPECT_EQ(first->groups[i].sharing_estimate, -1.0F);
    EXPECT_EQ(second->groups[i].action, Action::kReused);
    EXPECT_GE(second->groups[i].sharing_estimate, 0.0F);
    EXPECT_LE(second->groups[i].sharing_estimate, 0.99F);
  }
  policy.cis->max_dropped_mass_estimate = 1.0F;
  EXPECT_EQ(Line(Read(sequence, 0, 999, policy).status()),
            "INVALID_ARGUMENT POLICY_INVALID rows[0].policy.cis.max_dropped_mass_estimate");
}

// Numbers of single layers and KV heads arrive: layer 1 hides half of its past, layer 0 does not.
TEST_P(ClientTest, LayersAndHeadsHaveNumbersOfTheirOwn) {
  const client::Sequence sequence = Create();
  Fill(sequence, 1000);
  client::Policy policy;
  policy.selector = client::Selector::kScan;
  policy.budget = client::Budget{
      .sink_tokens = 4, .local_tokens = 16, .top_k_tokens = 0, .max_dropped_mass_estimate = 0.1F};
  policy.dense_below_tokens = 0;
  policy.layers = {{.layer_begin = 1,
                    .layer_end = 2,
                    .selector = client::Selector::kPsaw,
                    .budget = client::Budget{.top_k_tokens = 900},
                    .hidden_share = 0.5F}};
  absl::StatusOr<client::AttendRowResult> row = Read(sequence, 0, 999, policy);
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_EQ(row->selector, client::Selector::kScan);
  for (const client::GroupReport& group : row->groups) {
    EXPECT_TRUE(group.scanned);
    EXPECT_GT(group.tokens_read, 8U + 40U) << "the sketch's sinks, the open block, and a choice";
  }
  row = Read(sequence, 1, 999, policy);
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_EQ(row->selector, client::Selector::kPsaw);
  for (const client::GroupReport& group : row->groups) {
    EXPECT_LE(group.tokens_read, 508U);  // 8 sinks and what is not below floor(0.5 * 1000)
  }
  EXPECT_LT(row->groups[0].assumed_psaw_dropped_mass, 0.0F);
  policy.layers->front().psaw_decay_scale = 1.0F;
  policy.layers->front().psaw_decay_rate = 0.01F;
  row = Read(sequence, 1, 999, policy);
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_NEAR(row->groups[1].assumed_psaw_dropped_mass, std::exp(-5.0), 1e-6);
  EXPECT_LT(row->groups[1].assumed_cis_excess_mass, 0.0F);
  EXPECT_LT(row->groups[1].assumed_etf_excess_mass, 0.0F);
  policy.layers->front().kv_head_min_cosines = {0.5F, 0.5F, 0.5F};
  row = Read(sequence, 0, 999, policy);
  EXPECT_EQ(Line(row.status()),
            "INVALID_ARGUMENT POLICY_INVALID rows[0].policy.layers[0].kv_head_min_cosines");
}

// More queries than one message may carry: the writer cuts where it must, and nothing is lost.
TEST_P(ClientTest, SampledQueriesOfAPromptBecomeAnchors) {
  const client::Sequence sequence = Create();
  const Words words = Counting(0, 600);
  const Words sampled = Counting(100, 400);
  const Numbers k = Make(Part::kKey, 0, words);
  const Numbers v = Make(Part::kValue, 0, words);
  const Numbers q = Make(Part::kQuery, 0, sampled);
  client::AppendWriter writer = sequence.Append();
  const auto problem = [&](const Words& positions, const client::TensorView& queries) {
    return Line(writer.Write(0, 0, k.view, v.view, {.q = queries, .positions = positions}));
  };
  const std::string invalid = "INVALID_ARGUMENT REQUEST_INVALID query_sample_positions";
  EXPECT_EQ(problem(sampled, {}), invalid);
  EXPECT_EQ(problem({1, 2}, q.view), invalid);
  EXPECT_EQ(problem(Counting(201, 400), q.view), invalid);
  Words twice = sampled;
  twice[1] = twice[0];
  EXPECT_EQ(problem(twice, q.view), invalid);
  ASSERT_TRUE(writer.Write(0, 0, k.view, v.view, {.q = q.view, .positions = sampled}).ok());
  const absl::StatusOr<client::Receipt> receipt = writer.Commit();
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->length_max_tokens, 600U);
  EXPECT_EQ(receipt->message_count, 2U);

  client::Policy policy;
  policy.selector = client::Selector::kCis;
  policy.layers.emplace();
  policy.dense_below_tokens = 0;
  policy.budget = client::Budget{.top_k_tokens = 24};
  policy.cis = client::CisPolicy{
      .min_cosine = 0.99F, .anchors_max = 500, .seed = false, .max_dropped_mass_estimate = 0.0F};
  absl::StatusOr<client::AttendRowResult> row = Read(sequence, 0, 599, policy);
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_TRUE(row->groups[0].scanned);
  EXPECT_EQ(sequence.Describe()->anchor_seed_scans, 0U);
  policy.cis->seed = true;
  // Every step seeds some of them; then the query of any sampled word finds its own.
  for (int step = 0; step < 7; ++step) EXPECT_TRUE(Read(sequence, 0, 599, policy).ok());
  EXPECT_EQ(sequence.Describe()->anchor_seed_scans, 2U * 400U);
  for (const uint32_t word : {100U, 355U, 356U, 499U}) {
    row = Read(sequence, 0, word, policy);
    ASSERT_TRUE(row.ok()) << row.status();
    EXPECT_EQ(row->groups[0].action, Action::kReused) << word;
    EXPECT_GT(row->groups[0].key_norm_max, 1.0F);
    EXPECT_GE(row->groups[0].query_distance, 0.0F);
    EXPECT_GE(row->groups[0].assumed_cis_excess_mass, 0.0F);
  }
}

TEST_P(ClientTest, RowsOfABatchFailOnTheirOwn) {
  std::vector<client::Sequence> sequences;
  std::vector<client::AttendRow> rows(3);
  for (uint32_t i = 0; i < 3; ++i) {
    sequences.push_back(Create());
    Fill(sequences.back(), 10 + i);
  }
  for (uint32_t i = 0; i < 3; ++i) rows[i] = {.sequence = &sequences[i], .position = 10 + i};
  rows[1].position = 90;
  const Words words = {10, 90, 12};
  const Numbers q = Make(Part::kQuery, 0, words);
  const Numbers k = Make(Part::kKey, 0, words);
  const Numbers v = Make(Part::kValue, 0, words);
  client::AttendStep step;
  step.rows = rows;
  step.q = q.view;
  step.k = k.view;
  step.v = v.view;
  const absl::StatusOr<client::AttendResult> result = client_->Attend(step);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->rows.size(), 3U);
  EXPECT_EQ(Line(result->rows[1].status), "OUT_OF_RANGE POSITION_GAP rows[1].position");
  EXPECT_EQ(MetadataOf(result->rows[1].status).at("current_length"), "11");
  EXPECT_TRUE(result->rows[1].out.empty());
  for (const uint32_t i : {0U, 2U}) {
    EXPECT_TRUE(result->rows[i].status.ok()) << result->rows[i].status;
    const DenseAnswer dense = AttendDensely(Shape(), 0, Counting(0, 11 + i), 10 + i);
    EXPECT_LT(NormalizedSquaredError(result->rows[i].out, dense.out), kOutTolerance);
  }
}

TEST_P(ClientTest, ForkKeepsItsTokensWhateverTheParentDoes) {
  client::Sequence parent = Create();
  Fill(parent, 100);
  absl::StatusOr<client::Sequence> child = parent.Fork(70);
  ASSERT_TRUE(child.ok()) << child.status();
  EXPECT_NE(child->id(), parent.id());
  EXPECT_TRUE(parent.Close().ok());
  const absl::StatusOr<client::AttendRowResult> row = Read(*child, 0, 69);
  ASSERT_TRUE(row.ok()) << row.status();
  const DenseAnswer dense = AttendDensely(Shape(), 0, Counting(0, 70), 69);
  EXPECT_LT(NormalizedSquaredError(row->out, dense.out), kOutTolerance);
  EXPECT_EQ(child->Fork(71).status().code(), absl::StatusCode::kOutOfRange);
}

TEST_P(ClientTest, TokenIdsBringWhatIsThereAlready) {
  const Words ids = Counting(0, 200);
  const auto create = [&](client::Client* client, const Words& prompt) {
    absl::StatusOr<client::Sequence> sequence =
        client->CreateSequence({.model = kModel, .token_ids = prompt});
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    return *std::move(sequence);
  };
  const client::Sequence first = create(client_.get(), ids);
  EXPECT_EQ(first.matched_tokens(), 0U);
  Fill(first, 200);
  EXPECT_EQ(first.Describe()->matchable_tokens, 192U);
  // Another connection of the same tenant.
  const std::unique_ptr<Client> elsewhere = Connect();
  client::Sequence second = create(elsewhere.get(), ids);
  ASSERT_EQ(second.matched_tokens(), 192U);
  EXPECT_EQ(second.Describe()->matched_tokens, 192U);
  client::AppendWriter writer = second.Append();
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    EXPECT_TRUE(Write(&writer, layer, 192, Counting(192, 8)).ok());
  }
  EXPECT_EQ(writer.Commit()->length_tokens, 200U);
  const absl::StatusOr<client::AttendRowResult> row = Read(second, 1, 199);
  ASSERT_TRUE(row.ok()) << row.status();
  const absl::StatusOr<client::AttendRowResult> same = Read(first, 1, 199);
  EXPECT_EQ(row->out, same->out);
  EXPECT_EQ(row->lse, same->lse);
  client::Sequence moved = std::move(second);
  EXPECT_EQ(moved.matched_tokens(), 192U);
  const uint32_t tokens_max = TestEngine::SmallOptions().sequence_tokens_max;
  EXPECT_EQ(
      Line(client_->CreateSequence({.model = kModel, .token_ids = Counting(0, tokens_max + 1)})
               .status()),
      "RESOURCE_EXHAUSTED SEQUENCE_TOO_LONG token_ids");
}

TEST_P(ClientTest, TruncateMovesToANewGeneration) {
  client::Sequence sequence = Create();
  Fill(sequence, 80);
  client::Sequence stale = client_->Adopt(sequence.id(), sequence.generation());
  ASSERT_TRUE(sequence.Truncate(40).ok());
  EXPECT_GT(sequence.generation(), stale.generation());
  EXPECT_TRUE(Read(sequence, 0, 39).ok());

  const absl::Status refused = Read(stale, 0, 39).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReasonOf(refused), "GENERATION_MISMATCH");
  client::AppendWriter writer = stale.Append();
  // The stream may break at the first write or at its end, as the server is quick or slow.
  Write(&writer, 0, 40, {40}).IgnoreError();
  EXPECT_EQ(ReasonOf(writer.Commit().status()), "GENERATION_MISMATCH");
  stale.Detach();
}

TEST_P(ClientTest, ReceiptsCountMessagesAndRepeats) {
  const client::Sequence sequence = Create();
  client::AppendWriter writer = sequence.Append();
  EXPECT_TRUE(Write(&writer, 0, 0, Counting(0, 20)).ok());
  EXPECT_TRUE(Write(&writer, 0, 0, Counting(0, 20)).ok());
  absl::StatusOr<client::Receipt> receipt = writer.Commit();
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  EXPECT_EQ(receipt->length_tokens, 0U);
  EXPECT_EQ(receipt->length_max_tokens, 20U);
  EXPECT_EQ(receipt->message_count, 2U);
  EXPECT_EQ(receipt->duplicate_count, 1U);

  // A writer goes on after Commit; an error stays.
  EXPECT_TRUE(Write(&writer, 1, 0, Counting(0, 20)).ok());
  EXPECT_EQ(writer.Commit()->length_tokens, 20U);
  Write(&writer, 0, 30, {30}).IgnoreError();
  EXPECT_EQ(Line(writer.Commit().status()), "OUT_OF_RANGE POSITION_GAP position");
  EXPECT_EQ(ReasonOf(Write(&writer, 0, 20, {20})), "POSITION_GAP");
  EXPECT_EQ(sequence.Describe()->length_tokens, 20U);
}

TEST_P(ClientTest, LongWritesAreCutIntoMessages) {
  const client::Sequence sequence = Create();
  client::AppendWriter writer = sequence.Append();
  // A token of a layer has 512 bytes of keys and values.
  constexpr uint32_t kTokens = 2500;
  EXPECT_TRUE(Write(&writer, 0, 0, Counting(0, kTokens)).ok());
  const absl::StatusOr<client::Receipt> receipt = writer.Commit();
  ASSERT_TRUE(receipt.ok()) << receipt.status();
  const bool by_lane = receipt->transport == client::Transport::kLane;
  EXPECT_EQ(by_lane, GetParam() == client::Transport::kLane);
  // At 512 KiB and at 1 MiB.
  EXPECT_EQ(receipt->message_count, by_lane ? 3U : 2U);
  EXPECT_EQ(receipt->length_max_tokens, kTokens);
}

TEST_P(ClientTest, SequencesLeftBehindAreDropped) {
  const auto sequences = [this] { return served_.engine()->Stats().sequences; };
  {
    client::Sequence first = Create();
    Fill(first, 10);
    client::Sequence second = Create();
    EXPECT_EQ(sequences(), 2U);
    // What was here leaves; moving drops nothing.
    second = std::move(first);
    EXPECT_TRUE(first.id().empty());  // NOLINT(bugprone-use-after-move): the contract.
    EXPECT_TRUE(second.Describe().ok());
  }
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (sequences() != 0 && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
  EXPECT_EQ(sequences(), 0U);
  EXPECT_EQ(served_.engine()->Stats().pool_bytes_used, 0U);
}

TEST_P(ClientTest, TheClientsEndWaitsForItsDrops) {
  {
    std::vector<client::Sequence> many;
    many.reserve(20);
    for (int i = 0; i < 20; ++i) many.push_back(Create());
    EXPECT_EQ(served_.engine()->Stats().sequences, 20U);
  }
  client_.reset();
  EXPECT_EQ(served_.engine()->Stats().sequences, 0U);
}

TEST_P(ClientTest, DetachedSequencesStay) {
  client::Sequence sequence = Create();
  Fill(sequence, 10);
  const uint64_t generation = sequence.generation();
  const std::string id = sequence.Detach();
  EXPECT_EQ(Line(sequence.Describe().status()), "INVALID_ARGUMENT REQUEST_INVALID sequence");
  client_.reset();
  client_ = Connect();
  client::Sequence again = client_->Adopt(id, generation);
  EXPECT_EQ(again.Describe()->length_tokens, 10U);
  EXPECT_TRUE(again.Close().ok());
  EXPECT_EQ(Line(again.Close()), "INVALID_ARGUMENT REQUEST_INVALID sequence");
  client::Sequence gone = client_->Adopt(id, generation);
  EXPECT_EQ(Line(gone.Close()), "NOT_FOUND SEQUENCE_NOT_FOUND");
}

TEST_P(ClientTest, ModelsAreRegisteredOnce) {
  client::ModelDescription model;
  model.name = "other";
  model.layer_count = 3;
  model.query_head_count = 8;
  model.kv_head_count = 2;
  model.head_dim = 64;
  model.scale = 0.125F;
  model.sliding_window_tokens = {0, 128, 0};
  model.rotary_style = client::RotaryStyle::kHalf;
  model.inverse_frequencies.assign(32, 0.5F);
  model.default_policy = client::Policy{.selector = client::Selector::kCpe};
  const absl::StatusOr<uint64_t> first = client_->RegisterModel(model);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(client_->RegisterModel(model), first);
  model.scale = 0.5F;
  EXPECT_EQ(client_->RegisterModel(model).status().code(), absl::StatusCode::kAlreadyExists);
  model.name = "bad";
  model.head_dim = 63;
  const absl::Status refused = client_->RegisterModel(model).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(FieldOf(refused), "");
}

TEST_P(ClientTest, RequestsThatContradictThemselvesAreNotSent) {
  const client::Sequence sequence = Create();
  const uint64_t calls = served_.engine()->Stats().calls_total;
  const Numbers q = Make(Part::kQuery, 0, {0});
  const Numbers k = Make(Part::kKey, 0, {0});
  client::AttendQuery query;
  query.q = q.view;
  query.k = k.view;
  EXPECT_EQ(Line(sequence.Attend(query).status()), "INVALID_ARGUMENT REQUEST_INVALID v");
  query.k = {};
  query.query_count = 2;
  EXPECT_EQ(Line(sequence.Attend(query).status()), "INVALID_ARGUMENT REQUEST_INVALID q");
  query.query_count = 1;
  query.q.head_dim = 32;
  EXPECT_EQ(Line(sequence.Attend(query).status()), "INVALID_ARGUMENT REQUEST_INVALID q");
  EXPECT_EQ(Line(client_->Attend({}).status()), "INVALID_ARGUMENT REQUEST_INVALID rows");
  const std::unique_ptr<Client> stranger = Connect();
  const client::AttendRow row = {.sequence = &sequence};
  client::AttendStep step;
  step.rows = {&row, 1};
  step.q = q.view;
  EXPECT_EQ(Line(stranger->Attend(step).status()),
            "INVALID_ARGUMENT REQUEST_INVALID rows[0].sequence");
  EXPECT_EQ(served_.engine()->Stats().calls_total, calls);
}

TEST(ClientConnectTest, SaysWhenNobodyAnswers) {
  TemporaryFolder folder;
  client::ClientOptions options;
  options.endpoint = "unix:" + folder.path() + "/nobody";
  options.deadlines.connect = milliseconds(50);
  const absl::Status status = Client::Connect(options).status();
  EXPECT_EQ(Line(status), "UNAVAILABLE SERVER_UNREACHABLE");
  EXPECT_EQ(MetadataOf(status).at("endpoint"), options.endpoint);
  options.endpoint = "nonsense";
  EXPECT_EQ(Line(Client::Connect(options).status()), "INVALID_ARGUMENT REQUEST_INVALID endpoint");
}

std::string TransportName(const ::testing::TestParamInfo<client::Transport>& parameter) {
  constexpr std::array kNames = {"Auto", "Unary", "Stream", "Lane"};
  return kNames[static_cast<size_t>(parameter.param)];
}

INSTANTIATE_TEST_SUITE_P(Transports, ClientTest,
                         ::testing::Values(client::Transport::kUnary, client::Transport::kStream,
                                           client::Transport::kLane),
                         TransportName);

}  // namespace
}  // namespace kvservice::testing
