// Sequences that go from one engine to another: what arrives, what is refused, and what is left of
// transfers that never end.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/error.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLength = 400;
// Four blocks are sent at a time.
constexpr uint32_t kBlocksPerPart = 4;

// Changes parts on their way; true = the sender dies here.
using Tamper = std::function<bool(TransferPart* part)>;
bool Nothing(TransferPart* /*part*/) { return false; }

template <typename T>
absl::StatusOr<T> Await(const std::function<void(Done<T>)>& call) {
  std::promise<absl::StatusOr<T>> promise;
  call([&](absl::StatusOr<T> result) { promise.set_value(std::move(result)); });
  return promise.get_future().get();
}

// One attempt of a sender.
class Attempt {
 public:
  Attempt(TestEngine* source, TestEngine* target, const Handle& handle, Tamper tamper = Nothing)
      : source_(source), target_(target), handle_(handle), tamper_(std::move(tamper)) {}

  // The sequence on the target.
  absl::StatusOr<SequenceInfo> Run() {
    absl::StatusOr<ReceiveReply> reply = Begin();
    if (!reply.ok()) return reply.status();
    if (reply->sequence.has_value()) return *reply->sequence;
    if (reply->wants_tables) reply = Pass({.part = SendAsk::Part::kTables});
    if (!reply.ok()) return reply.status();
    const std::vector<LayerReceived> layers = reply->layers;
    for (uint32_t layer = 0; layer < layers.size(); ++layer) {
      absl::Status status = PassLayer(layer, layers[layer]);
      if (!status.ok()) return status;
    }
    reply = Give(TransferEnd());
    if (!reply.ok()) return reply.status();
    return *reply->sequence;
  }

  absl::StatusOr<TransferPart> Send(const SendAsk& ask) {
    return Await<TransferPart>([&](Done<TransferPart> done) {
      source_->get()->Send(kTenant, handle_.id, handle_.generation, ask, std::move(done));
    });
  }
  absl::StatusOr<ReceiveReply> Begin() {
    auto part = Send({.part = SendAsk::Part::kBegin});
    if (!part.ok()) return part.status();
    head_ = *ReadTransferHead(std::get<TransferBegin>(*part).head);
    auto reply = Give(*std::move(part));
    if (reply.ok()) attempt_ = reply->attempt;
    return reply;
  }
  absl::StatusOr<ReceiveReply> Give(TransferPart part) {
    if (tamper_(&part)) return absl::CancelledError("the sender is dead");
    ++given;
    return Await<ReceiveReply>([&](Done<ReceiveReply> done) {
      target_->get()->Receive(kTenant, attempt_, std::move(part), std::move(done));
    });
  }
  absl::StatusOr<ReceiveReply> Pass(const SendAsk& ask) {
    auto part = Send(ask);
    if (!part.ok()) return part.status();
    return Give(*std::move(part));
  }
  absl::Status PassLayer(uint32_t layer, const LayerReceived& received) {
    const uint32_t length = head_.lengths[layer];
    Checksum previous = received.last;
    for (uint32_t block = received.block_count; block < BlockCount(length);) {
      const uint32_t count = std::min(kBlocksPerPart, BlockCount(length) - block);
      auto part = Send({.part = SendAsk::Part::kSlices,
                        .layer = layer,
                        .first_block = block,
                        .block_count = count,
                        .length = length,
                        .previous = previous});
      if (!part.ok()) return part.status();
      previous = std::get<TransferSlices>(*part).checksums.back();
      const auto reply = Give(*std::move(part));
      if (!reply.ok()) return reply.status();
      block += count;
    }
    auto seeds = Send({.part = SendAsk::Part::kSeeds, .layer = layer});
    if (!seeds.ok()) return seeds.status();
    if (std::get<TransferSeeds>(*seeds).positions.empty()) return absl::OkStatus();
    return Give(*std::move(seeds)).status();
  }

  // Parts that the target was given.
  int given = 0;

 private:
  TestEngine* const source_;
  TestEngine* const target_;
  const Handle handle_;
  const Tamper tamper_;
  TransferHead head_;
  TransferAttempt attempt_;
};

// The sender dies before it gives part number `count`.
Tamper DiesAfter(int count) {
  return [count](TransferPart* /*part*/) mutable { return count-- == 0; };
}

Policy Choosing(SelectorKind selector) {
  Policy policy = DefaultPolicy(selector);
  policy.guarantee = Guarantee::kDeterministic;
  policy.max_dropped_mass = 0.05F;
  policy.on_violation = OnViolation::kReport;
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  policy.budget = {.sink = 4, .local = 16, .top_k = 64};
  return policy;
}

class TransferTest : public ::testing::Test {
 protected:
  explicit TransferTest(const EngineOptions& target = Options())
      : source_(std::make_unique<TestEngine>(Options())),
        target_(std::make_unique<TestEngine>(target, 2, nullptr, nullptr, 4711)) {}

  static EngineOptions Options() {
    EngineOptions options = TestEngine::SmallOptions();
    options.audit_rate = 0.0;
    return options;
  }

  // Both layers hold kLength words, the first one more, as inside a step.
  Handle NewSequence() {
    const Handle handle = source_->NewSequence();
    source_->Fill(handle, 0, Counting(0, kLength));
    EXPECT_TRUE(source_->Append(handle, 0, kLength, {kLength}).ok());
    return handle;
  }
  absl::StatusOr<SequenceInfo> Transfer(const Handle& handle, Tamper tamper = Nothing) {
    return Attempt(source_.get(), target_.get(), handle, std::move(tamper)).Run();
  }
  static Handle HandleOf(const SequenceInfo& info) {
    return {.id = info.id, .generation = info.generation};
  }

  // Both answer a step alike, to the last bit.
  void ExpectEqualAnswers(const Handle& here, const Handle& there, const Policy& policy,
                          uint32_t layer, uint32_t position, uint32_t word) {
    std::vector<std::unique_ptr<AttendStep>> steps;
    for (const auto& [engine, handle] :
         {std::pair(source_.get(), here), std::pair(target_.get(), there)}) {
      steps.push_back(std::make_unique<AttendStep>(engine->model(), layer));
      steps.back()->Add(handle, position, {word}).OnlyRead();
      steps.back()->call.policy = &policy;
      steps.back()->call.want_selected = true;
      ASSERT_TRUE(steps.back()->Run(engine->get()).ok());
      ASSERT_TRUE(steps.back()->result(0).status.ok()) << steps.back()->result(0).status;
    }
    EXPECT_EQ(steps[0]->call.out, steps[1]->call.out);
    EXPECT_EQ(steps[0]->call.lse, steps[1]->call.lse);
    const AttendRowResult& a = steps[0]->result(0);
    const AttendRowResult& b = steps[1]->result(0);
    EXPECT_EQ(a.attended_length, b.attended_length);
    EXPECT_EQ(a.selected, b.selected);
    ASSERT_EQ(a.certificates.size(), b.certificates.size());
    for (size_t head = 0; head < a.certificates.size(); ++head) {
      ExpectEqual(a.certificates[head], b.certificates[head]);
    }
    for (size_t group = 0; group < a.groups.size(); ++group) {
      EXPECT_EQ(a.groups[group].action, b.groups[group].action);
      EXPECT_EQ(a.groups[group].similarity, b.groups[group].similarity);
    }
  }
  static void ExpectEqual(const HeadCertificate& a, const HeadCertificate& b) {
    EXPECT_EQ(a.level, b.level);
    EXPECT_EQ(a.action, b.action);
    EXPECT_EQ(a.met, b.met);
    const auto bits = [](double x) { return std::bit_cast<uint64_t>(x); };
    EXPECT_EQ(bits(a.log_kept), bits(b.log_kept));
    EXPECT_EQ(bits(a.log_dropped_upper.value), bits(b.log_dropped_upper.value));
    EXPECT_EQ(bits(a.log_dropped_lower.value), bits(b.log_dropped_lower.value));
    EXPECT_EQ(a.dropped_mass_upper.value, b.dropped_mass_upper.value);
    EXPECT_EQ(a.dropped_mass_lower.value, b.dropped_mass_lower.value);
    EXPECT_EQ(bits(a.output_error_upper), bits(b.output_error_upper));
  }

  std::unique_ptr<TestEngine> source_;
  std::unique_ptr<TestEngine> target_;
};

TEST_F(TransferTest, EverythingIsThereToTheBit) {
  const Handle handle = NewSequence();
  const auto arrived = Transfer(handle);
  ASSERT_TRUE(arrived.ok()) << arrived.status();
  const auto here = *source_->Get(handle);
  EXPECT_NE(arrived->id, handle.id) << "who knows an id of one server knows none of another";
  EXPECT_EQ(arrived->model, here.model);
  EXPECT_EQ(arrived->tenant, here.tenant);
  EXPECT_EQ(arrived->length, kLength);
  EXPECT_EQ(arrived->length_max, kLength + 1);
  EXPECT_EQ(arrived->bytes, here.bytes);
  EXPECT_EQ(arrived->lease_remaining_ms, here.lease_remaining_ms);
  EXPECT_EQ(arrived->sketch_table_digest, here.sketch_table_digest);
  for (const SelectorKind selector :
       {SelectorKind::kDense, SelectorKind::kScan, SelectorKind::kCertified, SelectorKind::kPsaw}) {
    for (uint32_t layer = 0; layer < 2; ++layer) {
      ExpectEqualAnswers(handle, HandleOf(*arrived), Choosing(selector), layer, kLength - 1, 77);
    }
  }
  // It grows like any other, and so does the one that stayed.
  EXPECT_TRUE(target_->Append(HandleOf(*arrived), 1, kLength, {kLength}).ok());
  EXPECT_TRUE(source_->Append(handle, 1, kLength, {kLength}).ok());
  ExpectEqualAnswers(handle, HandleOf(*arrived), Choosing(SelectorKind::kCertified), 1, kLength, 3);
}

TEST_F(TransferTest, ThePolicyOfTheSequenceComesWithIt) {
  const auto created = source_->Create(
      {.model = kModel, .lease_ms = 0, .policy = Choosing(SelectorKind::kScan), .request_id = ""});
  ASSERT_TRUE(created.ok());
  source_->Fill(HandleOf(*created), 0, Counting(0, kLength));
  const auto arrived = Transfer(HandleOf(*created));
  ASSERT_TRUE(arrived.ok()) << arrived.status();
  AttendStep step(target_->model(), 1);
  step.Add(HandleOf(*arrived), kLength - 1, {5}).OnlyRead();
  ASSERT_TRUE(step.Run(target_->get()).ok());
  EXPECT_EQ(step.result(0).selector, SelectorKind::kScan);
}

// Prompt queries that wait to become anchors are part of what prefill hands over.
TEST_F(TransferTest, SeedsArriveAndSaveTheSameScans) {
  const Handle handle = source_->NewSequence();
  const Words words = Counting(0, kLength);
  const Words sampled = Counting(100, 10);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    AppendStep step(source_->model(), handle, layer, 0, words);
    const KvLayout& layout = source_->model().layout;
    const std::vector<std::byte> q =
        PartBytes(layout, DType::kFloat32, Part::kQuery, layer, sampled);
    const std::vector<int64_t> shape = {10, layout.query_head_count, layout.head_dim};
    step.call.query_sample =
        TensorView{.dtype = DType::kFloat32, .shape = shape, .bytes = q, .field = "query_sample"};
    step.call.query_sample_positions = sampled;
    ASSERT_TRUE(step.Run(source_->get()).ok());
  }
  const auto arrived = Transfer(handle);
  ASSERT_TRUE(arrived.ok()) << arrived.status();
  EXPECT_EQ(arrived->bytes, source_->Get(handle)->bytes);
  Policy policy = Choosing(SelectorKind::kCis);
  policy.guarantee = Guarantee::kNone;
  policy.max_dropped_mass = 1.0F;
  for (const uint32_t word : {105U, 300U, 106U}) {
    ExpectEqualAnswers(handle, HandleOf(*arrived), policy, 1, kLength - 1, word);
  }
  EXPECT_EQ(target_->Get(HandleOf(*arrived))->stats.anchor_seed_scans,
            source_->Get(handle)->stats.anchor_seed_scans);
  EXPECT_GT(source_->Get(handle)->stats.anchor_seed_scans, 0U);
}

TEST_F(TransferTest, TablesThatTheTargetLacksComeAlongAndServeNobodyElse) {
  std::vector<SketchTable> tables(4, IdentitySketchTable(64));
  for (SketchTable& table : tables) {
    for (size_t channel = 0; channel < 64; ++channel) {
      table.metric[channel] = channel % 2 == 0 ? 2.0F : 0.5F;
    }
    ASSERT_TRUE(NormalizeSketchTable(64, &table).ok());
  }
  ModelSpec with_tables = source_->model();
  with_tables.name = "tables";
  with_tables.sketch_tables = tables;
  ModelSpec other = with_tables;
  ASSERT_TRUE(source_->get()->RegisterModel(with_tables).ok());
  const auto created =
      source_->Create({.model = "tables", .lease_ms = 0, .policy = std::nullopt, .request_id = ""});
  ASSERT_TRUE(created.ok());
  source_->Fill(HandleOf(*created), 0, Counting(0, kLength));
  // Tables are part of what a model is: another model of that name is no match.
  other.sketch_tables.clear();
  ASSERT_TRUE(target_->get()->RegisterModel(other).ok());
  EXPECT_EQ(ErrorLine(Transfer(HandleOf(*created)).status()),
            "FAILED_PRECONDITION MODEL_MISMATCH begin.head");

  // A model that learns has new ones under the same name.
  const Handle teacher = source_->NewSequence();
  for (uint32_t layer = 0; layer < 2; ++layer) {
    AppendStep step(source_->model(), teacher, layer, 0, Counting(0, 600));
    const KvLayout& layout = source_->model().layout;
    const std::vector<std::byte> q =
        PartBytes(layout, DType::kFloat32, Part::kQuery, layer, Counting(0, 64));
    const std::vector<int64_t> shape = {64, layout.query_head_count, layout.head_dim};
    step.call.query_sample =
        TensorView{.dtype = DType::kFloat32, .shape = shape, .bytes = q, .field = "query_sample"};
    ASSERT_TRUE(step.Run(source_->get()).ok());
  }
  const Sha256::Digest old = source_->Get(teacher)->sketch_table_digest;
  Handle learnt = source_->NewSequence();
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (source_->Get(learnt)->sketch_table_digest == old) {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up) << "nothing is learnt";
    ASSERT_TRUE(source_->Drop(learnt).ok());
    learnt = source_->NewSequence();
  }
  source_->Fill(learnt, 0, Counting(0, kLength));
  const auto arrived = Transfer(learnt);
  ASSERT_TRUE(arrived.ok()) << arrived.status();
  EXPECT_EQ(arrived->sketch_table_digest, source_->Get(learnt)->sketch_table_digest);
  EXPECT_EQ(target_->Get(target_->NewSequence())->sketch_table_digest, old);
  ExpectEqualAnswers(learnt, HandleOf(*arrived), Choosing(SelectorKind::kCertified), 1, kLength - 1,
                     9);
}

TEST_F(TransferTest, OneTenantCannotUseUpTheRoomForTables) {
  const Handle handle = NewSequence();
  auto begin = Attempt(source_.get(), target_.get(), handle).Send({.part = SendAsk::Part::kBegin});
  ASSERT_TRUE(begin.ok());
  TransferHead head = *ReadTransferHead(std::get<TransferBegin>(*begin).head);
  const auto give = [&](const char* tenant, const TransferAttempt& attempt, TransferPart part) {
    return Await<ReceiveReply>([&](Done<ReceiveReply> done) {
      target_->get()->Receive(tenant, attempt, std::move(part), std::move(done));
    });
  };
  const auto bring = [&](const char* tenant, size_t number) -> std::string {
    std::vector<SketchTable> tables(4, IdentitySketchTable(64));
    tables[0].metric[number] = 2.0F;
    EXPECT_TRUE(NormalizeSketchTable(64, tables.data()).ok());
    const std::vector<std::byte> encoded = EncodeSketchTables(64, tables);
    Sha256 hash;
    hash.Update(encoded);
    head.table_digest = hash.Finish();
    const auto begun = give(tenant, {}, TransferBegin{.head = WriteTransferHead(head)});
    if (!begun.ok()) return ErrorLine(begun.status());
    const std::string text(reinterpret_cast<const char*>(encoded.data()), encoded.size());
    const std::string line =
        begun->wants_tables
            ? ErrorLine(give(tenant, begun->attempt, TransferTables{.encoded = text}).status())
            : "known";
    give(tenant, begun->attempt, TransferEnd{.gives_up = true}).IgnoreError();
    return line;
  };
  EXPECT_EQ(bring("a", 0), "OK");
  EXPECT_EQ(bring("a", 1), "OK");
  EXPECT_EQ(bring("a", 2), "RESOURCE_EXHAUSTED TENANT_QUOTA tables.encoded");
  EXPECT_EQ(bring("a", 1), "known");
  EXPECT_EQ(bring("b", 0), "known");
  EXPECT_EQ(bring("b", 3), "OK");
  EXPECT_EQ(bring("b", 4), "OK");
  EXPECT_EQ(bring("c", 5), "OK");
  EXPECT_EQ(bring("c", 6), "OK");
  // There is room left for what the model itself learns.
  EXPECT_EQ(bring("d", 7), "RESOURCE_EXHAUSTED TABLES_FULL tables.encoded");
  EXPECT_EQ(target_->get()->Stats().pool_bytes_used, 0U);
}

TEST_F(TransferTest, NobodySeesItBeforeItIsWhole) {
  const Handle handle = NewSequence();
  const EngineStats before = target_->get()->Stats();
  Attempt attempt(source_.get(), target_.get(), handle);
  ASSERT_TRUE(attempt.Begin().ok());
  EXPECT_TRUE(target_->List("").empty());
  EXPECT_GT(target_->get()->Stats().pool_bytes_used, before.pool_bytes_used);
  EXPECT_EQ(ErrorLine(attempt.Give(TransferEnd()).status()),
            "INVALID_ARGUMENT TRANSFER_OUT_OF_ORDER end");
  EXPECT_TRUE(target_->List("").empty());
  // A sender that knows that it will never go on says so.
  EXPECT_TRUE(attempt.Give(TransferEnd{.gives_up = true}).ok());
  EXPECT_EQ(target_->get()->Stats().pool_bytes_used, before.pool_bytes_used);
  EXPECT_EQ(ErrorLine(attempt.Pass({.part = SendAsk::Part::kSeeds}).status()),
            "ABORTED TRANSFER_SUPERSEDED");
}

TEST_F(TransferTest, ADeadSendersBytesAreFoundByTheNextAttempt) {
  const Handle handle = NewSequence();
  // A begin and two parts of layer 0, which has seven blocks.
  EXPECT_FALSE(Transfer(handle, DiesAfter(3)).ok());
  EXPECT_TRUE(target_->List("").empty());
  // What is appended meanwhile does not belong to it, but makes it another transfer.
  Attempt again(source_.get(), target_.get(), handle);
  const auto reply = again.Begin();
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->layers[0].block_count, 7U);
  EXPECT_EQ(reply->layers[1].block_count, 0U);
  const auto arrived = Transfer(handle);
  ASSERT_TRUE(arrived.ok()) << arrived.status();
  ExpectEqualAnswers(handle, HandleOf(*arrived), Choosing(SelectorKind::kCertified), 0, kLength, 7);
  // The attempt before ended with the one that came after it.
  EXPECT_EQ(ErrorLine(again.Give(TransferEnd()).status()), "ABORTED TRANSFER_SUPERSEDED");
}

TEST_F(TransferTest, ADeadSenderLeavesNothing) {
  const EngineStats before = target_->get()->Stats();
  EXPECT_FALSE(Transfer(NewSequence(), DiesAfter(3)).ok());
  EXPECT_GT(target_->get()->Stats().pool_bytes_used, before.pool_bytes_used);
  target_->clock.AdvanceMs(Options().receive_idle_ms - 1);
  EXPECT_TRUE(target_->List("").empty());
  EXPECT_GT(target_->get()->Stats().pool_bytes_used, before.pool_bytes_used);
  target_->clock.AdvanceMs(1);
  EXPECT_TRUE(target_->List("").empty());
  EXPECT_EQ(target_->get()->Stats().pool_bytes_used, before.pool_bytes_used);
  EXPECT_EQ(target_->get()->Stats().sequences, 0U);
}

TEST_F(TransferTest, ARepeatTellsTheSequenceThatCameOfIt) {
  const Handle handle = NewSequence();
  const auto first = Transfer(handle);
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(target_->Append(HandleOf(*first), 1, kLength, {kLength}).ok());
  Attempt repeat(source_.get(), target_.get(), handle);
  const auto second = repeat.Run();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->id, first->id);
  EXPECT_EQ(repeat.given, 1) << "no slice is sent again";
  EXPECT_EQ(target_->List("").size(), 1U);
  // Of other tokens comes another one, and of a dropped one it comes anew.
  ASSERT_TRUE(source_->Append(handle, 1, kLength, {kLength}).ok());
  const auto longer = Transfer(handle);
  ASSERT_TRUE(longer.ok()) << longer.status();
  EXPECT_NE(longer->id, first->id);
  ASSERT_TRUE(target_->Drop(HandleOf(*longer)).ok());
  const auto anew = Transfer(handle);
  ASSERT_TRUE(anew.ok()) << anew.status();
  EXPECT_NE(anew->id, longer->id);
  EXPECT_EQ(target_->List("").size(), 2U);
}

TEST_F(TransferTest, ATruncateAtTheSourceEndsIt) {
  const Handle handle = NewSequence();
  Attempt attempt(source_.get(), target_.get(), handle);
  ASSERT_TRUE(attempt.Begin().ok());
  ASSERT_TRUE(source_->Truncate(handle, 100).ok());
  EXPECT_EQ(ErrorLine(attempt.Pass({.part = SendAsk::Part::kSeeds}).status()),
            "FAILED_PRECONDITION GENERATION_MISMATCH handle.generation");
}

// Every byte of every part is looked at: whichever bit flips on the way, nothing comes of it and
// nothing is left.
TEST_F(TransferTest, DamageIsFound) {
  const Handle handle = NewSequence();
  const size_t empty_bytes = target_->get()->Stats().pool_bytes_used;
  const auto flip = [](int part_number, const std::function<void(TransferPart*)>& damage) {
    return [part_number, damage](TransferPart* part) mutable {
      if (part_number-- == 0) damage(part);
      return false;
    };
  };
  struct Case {
    int part_number;
    std::function<void(TransferPart*)> damage;
    const char* expected;
  };
  const auto rows = [](size_t at, char bit) {
    return [at, bit](TransferPart* part) { std::get<TransferSlices>(*part).rows[at] ^= bit; };
  };
  const auto checksum = [](size_t slice) {
    return [slice](TransferPart* part) {
      std::get<TransferSlices>(*part).checksums[slice][3] ^= std::byte{1};
    };
  };
  const Case cases[] = {
      {0, [](TransferPart* part) { std::get<TransferBegin>(*part).head[9] ^= 4; },
       "DATA_LOSS TRANSFER_DAMAGED begin.head"},
      {1, rows(0, 1), "DATA_LOSS TRANSFER_DAMAGED slices.rows"},
      {2, rows(20'001, 2), "DATA_LOSS TRANSFER_DAMAGED slices.rows"},
      {3, rows(128, 64), "DATA_LOSS TRANSFER_DAMAGED slices.rows"},
      {1, checksum(0), "DATA_LOSS TRANSFER_DAMAGED slices.rows"},
      {3, checksum(2), "DATA_LOSS TRANSFER_DAMAGED slices.rows"},
      {2, [](TransferPart* part) { std::get<TransferSlices>(*part).first_block = 1; },
       "INVALID_ARGUMENT TRANSFER_OUT_OF_ORDER slices.first_block"},
      {1, [](TransferPart* part) { std::get<TransferSlices>(*part).layer = 2; },
       "INVALID_ARGUMENT LAYER_OUT_OF_RANGE slices.layer"},
      {1, [](TransferPart* part) { std::get<TransferSlices>(*part).rows.pop_back(); },
       "INVALID_ARGUMENT TRANSFER_INVALID slices.rows"},
      {1, [](TransferPart* part) { std::get<TransferSlices>(*part).checksums.clear(); },
       "INVALID_ARGUMENT TRANSFER_INVALID slices.checksums"},
      {1, [](TransferPart* part) { std::get<TransferSlices>(*part).checksums.resize(8); },
       "INVALID_ARGUMENT TRANSFER_INVALID slices.checksums"},
      // bfloat16 infinity.
      {1,
       [](TransferPart* part) {
         std::get<TransferSlices>(*part).rows.replace(0, 2, std::string("\x80\x7f", 2));
       },
       "INVALID_ARGUMENT TENSOR_NOT_FINITE slices.rows"},
  };
  for (const Case& damaged : cases) {
    SCOPED_TRACE(damaged.expected);
    EXPECT_EQ(ErrorLine(Transfer(handle, flip(damaged.part_number, damaged.damage)).status()),
              damaged.expected);
    EXPECT_TRUE(target_->List("").empty());
    target_->clock.AdvanceMs(Options().receive_idle_ms);
    EXPECT_TRUE(target_->List("").empty());
    EXPECT_EQ(target_->get()->Stats().pool_bytes_used, empty_bytes);
  }
  EXPECT_TRUE(Transfer(handle).ok());
}

class SmallTargetTest : public TransferTest {
 protected:
  SmallTargetTest() : TransferTest(Small()) {}
  static EngineOptions Small() {
    EngineOptions options = Options();
    options.pool_bytes = 8 * BlockBytes(SmallModel(2));
    options.receives_max = 1;
    options.sequences_max = 2;
    return options;
  }
};

TEST_F(SmallTargetTest, AFullTargetRefusesBeforeItTakesAnything) {
  const Handle handle = NewSequence();
  const Handle occupant = target_->NewSequence();
  target_->Fill(occupant, 0, Counting(0, 128));
  const size_t used_bytes = target_->get()->Stats().pool_bytes_used;
  const absl::Status full = Transfer(handle).status();
  EXPECT_EQ(ErrorLine(full), "RESOURCE_EXHAUSTED POOL_FULL");
  EXPECT_GT(DetailsOf(full).retry_delay_ms, 0U);
  EXPECT_EQ(target_->get()->Stats().pool_bytes_used, used_bytes);
  EXPECT_EQ(target_->List("").size(), 1U);
  // The places of arriving sequences are bounded too, and the refused one holds none.
  ASSERT_TRUE(target_->Truncate(occupant, 64).ok());
  EXPECT_FALSE(Transfer(handle, DiesAfter(2)).ok());
  const Handle second = source_->NewSequence();
  source_->Fill(second, 0, {1, 2, 3});
  const absl::Status busy = Transfer(second).status();
  EXPECT_EQ(ErrorLine(busy), "RESOURCE_EXHAUSTED TRANSFERS_BUSY");
  EXPECT_GT(DetailsOf(busy).retry_delay_ms, 0U);
  EXPECT_TRUE(Transfer(handle).ok());
  EXPECT_EQ(ErrorLine(Transfer(second).status()), "RESOURCE_EXHAUSTED SEQUENCES_FULL");
}

class ClosedTargetTest : public TransferTest {
 protected:
  ClosedTargetTest() : TransferTest(Closed()) {}
  static EngineOptions Closed() {
    EngineOptions options = Options();
    options.receives_max = 0;
    return options;
  }
};

TEST_F(ClosedTargetTest, ATargetThatTakesNoneSaysSo) {
  EXPECT_EQ(ErrorLine(Transfer(NewSequence()).status()), "FAILED_PRECONDITION TRANSFERS_NOT_TAKEN");
}

TEST_F(TransferTest, AHeadThatDoesNotFitTheTargetIsRefused) {
  const auto refusal = [&](const std::function<void(TransferHead*)>& change) {
    const Handle handle = source_->NewSequence();
    const Tamper rewrite = [&](TransferPart* part) {
      auto* const begin = std::get_if<TransferBegin>(part);
      if (begin == nullptr) return true;
      TransferHead head = *ReadTransferHead(begin->head);
      change(&head);
      begin->head = WriteTransferHead(head);
      return false;
    };
    return ErrorLine(Transfer(handle, rewrite).status());
  };
  EXPECT_EQ(refusal([](TransferHead* head) { head->model = "other"; }),
            "NOT_FOUND MODEL_NOT_FOUND model");
  EXPECT_EQ(refusal([](TransferHead* head) { ++head->model_fingerprint; }),
            "FAILED_PRECONDITION MODEL_MISMATCH begin.head");
  EXPECT_EQ(refusal([](TransferHead* head) { head->lengths.push_back(1); }),
            "FAILED_PRECONDITION MODEL_MISMATCH begin.head");
  EXPECT_EQ(refusal([](TransferHead* head) { head->lengths[1] = 4097; }),
            "RESOURCE_EXHAUSTED SEQUENCE_TOO_LONG begin.head");
  EXPECT_EQ(refusal([](TransferHead* head) { head->policy.max_dropped_mass = 2.0F; }),
            "INVALID_ARGUMENT POLICY_INVALID begin.policy.max_dropped_mass");
  EXPECT_TRUE(target_->List("").empty());
}

}  // namespace
}  // namespace kvservice::testing
