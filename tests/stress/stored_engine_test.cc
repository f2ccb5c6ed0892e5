// What the disk tier does for sequences when nothing goes wrong but a restart.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention/sketch_table.h"
#include "kvservice/error.h"
#include "kvservice/sha256.h"
#include "kvservice/stored_progress.h"
#include "kvservice/stored_rows.h"
#include "kvservice/transfer.h"
#include "tests/stress/stored_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLayers = 2;

class StoredEngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const absl::Status started = engine_.Start();
    ASSERT_TRUE(started.ok()) << started;
  }

  // Appended to all layers, acknowledged as durable.
  void FillDurably(const Handle& handle, uint32_t position, const Words& words) {
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const auto stored = engine_->AppendDurably(handle, layer, position, words);
      ASSERT_TRUE(stored.ok()) << stored.status();
    }
  }
  void Restart() {
    engine_.Stop();
    const absl::Status started = engine_.Start();
    ASSERT_TRUE(started.ok()) << started;
  }
  void Crash() {
    engine_.Crash();
    const absl::Status started = engine_.Start();
    ASSERT_TRUE(started.ok()) << started;
  }
  // The sequence as it is now, and that it has exactly these words.
  Handle ExpectWords(const Handle& handle, const Words& words) {
    const auto info = engine_->Get(handle);
    EXPECT_TRUE(info.ok()) << info.status();
    if (!info.ok()) return handle;
    EXPECT_EQ(info->length, words.size());
    EXPECT_EQ(info->length_max, words.size());
    EXPECT_EQ(CompareStored(engine_.operator->(), *info, {info->length, info->length}, words), "");
    return {.id = handle.id, .generation = info->generation};
  }

  // Created with its token ids, and with what was not matched appended.
  Handle CreateWith(const Words& ids, uint32_t expected_match) {
    CreateOptions options;
    options.model = kModel;
    options.token_ids = ids;
    const auto info = engine_->Create(std::move(options));
    EXPECT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(info->matched_tokens, expected_match);
    const Handle handle = {.id = info->id, .generation = info->generation};
    const Words rest(ids.begin() + info->matched_tokens, ids.end());
    if (!rest.empty()) engine_->Fill(handle, info->matched_tokens, rest);
    return handle;
  }

  // Rows of the closed store; and other ones in their place.
  std::map<std::string, std::string> Rows(const std::vector<std::string>& keys) {
    std::map<std::string, std::string> rows;
    const auto tier = *engine_.OpenTier();
    for (const std::string& key : keys) rows[key] = *tier->Read(key);
    EXPECT_TRUE(tier->Close(tier->closed().inventory).ok());
    return rows;
  }
  void PutRows(const std::map<std::string, std::string>& rows) {
    const auto tier = *engine_.OpenTier();
    TierBatch batch;
    batch.puts.assign(rows.begin(), rows.end());
    EXPECT_TRUE(tier->Commit({&batch, 1}, true).ok());
    EXPECT_TRUE(tier->Close(tier->closed().inventory).ok());
  }

  StoredEngine engine_{StoredEngine::Options{}};
};

TEST_F(StoredEngineTest, ADurableAppendSurvivesACrashAndAnotherDoesNot) {
  const Handle durable = engine_->NewSequence();
  const Handle volatile_one = engine_->NewSequence();
  FillDurably(durable, 0, Counting(0, 100));
  engine_->Fill(volatile_one, 0, Counting(0, 100));
  Crash();
  EXPECT_EQ(ErrorLine(engine_->Get(volatile_one).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
  // What was only in memory may be gone, so the handle of before does not fit any more.
  EXPECT_EQ(ErrorLine(engine_->Append(durable, 0, 100, Counting(100, 1)).status()),
            "FAILED_PRECONDITION GENERATION_MISMATCH handle.generation");
  const Handle now = ExpectWords(durable, Counting(0, 100));
  engine_->Fill(now, 100, Counting(100, 100));
  ExpectWords(now, Counting(0, 200));
}

TEST_F(StoredEngineTest, ADurableAppendTakesWhatIsBelowItAlong) {
  const Handle handle = engine_->NewSequence();
  engine_->Fill(handle, 0, Counting(0, 130));
  ASSERT_TRUE(engine_->AppendDurably(handle, 0, 130, Counting(130, 5)).ok());
  engine_->Fill(handle, 0, Counting(0, 135));
  Crash();
  const auto info = engine_->Get(handle);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->length, 0);
  EXPECT_EQ(info->length_max, 135);
  EXPECT_EQ(CompareStored(engine_.operator->(), *info, {135, 0}, Counting(0, 135)), "");
}

TEST_F(StoredEngineTest, ADurableRepeatOfWhatIsInMemoryMakesItDurable) {
  const Handle handle = engine_->NewSequence();
  engine_->Fill(handle, 0, Counting(0, 70));
  FillDurably(handle, 0, Counting(0, 70));
  Crash();
  ExpectWords(handle, Counting(0, 70));
}

TEST_F(StoredEngineTest, AStopStoresEverythingAndHandlesStayGood) {
  const Handle handle = engine_->NewSequence();
  engine_->Fill(handle, 0, Counting(0, 150));
  Restart();
  const Handle now = ExpectWords(handle, Counting(0, 150));
  EXPECT_EQ(now.generation, handle.generation);
}

TEST_F(StoredEngineTest, OptionsOfASequenceAndItsModelComeBack) {
  CreateOptions options;
  options.model = kModel;
  options.request_id = "once";
  Policy policy = DefaultPolicy(SelectorKind::kCpe);
  policy.layers = {{.layer_begin = 0,
                    .layer_end = 1,
                    .selector = SelectorKind::kDense,
                    .budget = Budget{.sink = 1, .local = 2, .top_k = 3},
                    .kv_head_min_cosines = {0.25F, 0.5F},
                    .hidden_share = 0.125F}};
  options.policy = policy;
  const auto made = engine_->Create(options);
  ASSERT_TRUE(made.ok()) << made.status();
  FillDurably({.id = made->id, .generation = made->generation}, 0, Counting(0, 3));
  Crash();
  // A repeat finds it only if model, policy and request id are the same.
  const auto again = engine_->Create(options);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->id, made->id);
  EXPECT_EQ(again->sketch_table_digest, made->sketch_table_digest);
}

TEST_F(StoredEngineTest, AnAttendBringsASequenceBack) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 200));
  AttendStep before(engine_->model(), 1);
  before.Add(handle, 199, Counting(199, 1)).OnlyRead();
  ASSERT_TRUE(before.Run(engine_->get()).ok());
  Restart();
  EXPECT_EQ(engine_->Get(handle)->tier, SequenceTier::kDisk);
  AttendStep after(engine_->model(), 1);
  after.Add(handle, 199, Counting(199, 1)).OnlyRead();
  ASSERT_TRUE(after.Run(engine_->get()).ok());
  ASSERT_TRUE(after.result(0).status.ok()) << after.result(0).status;
  EXPECT_EQ(after.call.out, before.call.out);
  EXPECT_EQ(after.call.lse, before.call.lse);
  EXPECT_EQ(engine_->Get(handle)->tier, SequenceTier::kMemory);
}

TEST_F(StoredEngineTest, SketchesComeBackWithTheirBits) {
  Policy policy = DefaultPolicy(SelectorKind::kCertified);
  policy.guarantee = Guarantee::kDeterministic;
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 500));
  const auto certify = [&] {
    AttendStep step(engine_->model(), 0);
    step.Add(handle, 499, Counting(499, 1)).OnlyRead();
    step.call.policy = &policy;
    EXPECT_TRUE(step.Run(engine_->get()).ok());
    EXPECT_TRUE(step.result(0).status.ok()) << step.result(0).status;
    std::vector<double> bounds;
    for (const HeadCertificate& certificate : step.result(0).certificates) {
      bounds.push_back(certificate.dropped_mass_upper.value);
    }
    return bounds;
  };
  const std::vector<double> before = certify();
  Restart();
  EXPECT_EQ(certify(), before);
}

TEST_F(StoredEngineTest, APrefixIsMatchedWhileItIsInMemory) {
  const Words ids = Counting(0, 3 * 64);
  Handle source = CreateWith(ids, 0);
  ASSERT_TRUE(engine_->Suspend(source).ok());
  EXPECT_EQ(engine_->Get(source)->matchable_tokens, 0);
  const Handle other = CreateWith(Words(ids.begin(), ids.begin() + 64), 0);
  ASSERT_TRUE(engine_->Drop(other).ok());
  const auto resumed = engine_->Resume(source);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  source.generation = resumed->generation;
  EXPECT_EQ(resumed->matchable_tokens, ids.size());
  Words longer = ids;
  longer.resize(300, 9);
  Handle child = CreateWith(longer, ids.size());
  // Each goes to the disk and comes back on its own, with the other or without.
  ASSERT_TRUE(engine_->Suspend(child).ok());
  ASSERT_TRUE(engine_->Drop(source).ok());
  child.generation = engine_->Resume(child)->generation;
  ExpectWords(child, longer);
  const Handle grandchild = CreateWith(ids, ids.size());
  EXPECT_EQ(engine_->get()->Stats().blocks_used, 5) << "it shares what came back";
  // Nobody says after a restart which tokens there were; everything else is there.
  Restart();
  child = ExpectWords(child, longer);
  ExpectWords(grandchild, ids);
  CreateWith(ids, 0);
}

TEST_F(StoredEngineTest, APrefixThatHadToLeaveIsMatchedWhenItIsBack) {
  // 64 blocks; each sequence takes 10.
  std::vector<Handle> handles;
  for (uint32_t i = 0; i < 12; ++i) {
    engine_->clock.AdvanceMs(1000);
    handles.push_back(CreateWith(Counting(1000 * i, 640), 0));
  }
  ASSERT_EQ(engine_->Get(handles[0])->tier, SequenceTier::kDisk);
  EXPECT_EQ(engine_->Get(handles[0])->matchable_tokens, 0);
  ExpectWords(handles[0], Counting(0, 640));
  EXPECT_EQ(engine_->Get(handles[0])->matchable_tokens, 640);
  const Handle child = CreateWith(Counting(0, 640), 640);
  engine_->clock.AdvanceMs(1000);
  for (uint32_t i = 1; i < 12; ++i) ExpectWords(handles[i], Counting(1000 * i, 640));
  ExpectWords(child, Counting(0, 640));
  ExpectWords(handles[0], Counting(0, 640));
}

TEST_F(StoredEngineTest, ARequestIsRepeatedAfterACrashWhateverItsTokens) {
  CreateOptions options;
  options.model = kModel;
  options.request_id = "once";
  const Words ids = Counting(0, 64);
  options.token_ids = ids;
  const auto made = engine_->Create(options);
  ASSERT_TRUE(made.ok()) << made.status();
  FillDurably({.id = made->id, .generation = made->generation}, 0, Counting(0, 64));
  Crash();
  const auto again = engine_->Create(options);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->id, made->id);
  EXPECT_EQ(again->matched_tokens, 0);
  EXPECT_EQ(again->length, 64) << "appending from the first token on is a duplicate";
}

// Whoever sends a sequence chooses for nobody else, before and after a restart.
TEST_F(StoredEngineTest, TablesThatCameWithASequenceServeNobodyElseAfterARestart) {
  std::vector<SketchTable> tables(size_t{kLayers} * 2, IdentitySketchTable(64));
  tables[0].metric[5] = 2.0F;
  ASSERT_TRUE(NormalizeSketchTable(64, tables.data()).ok());
  const std::vector<std::byte> encoded = EncodeSketchTables(64, tables);
  Sha256 hash;
  hash.Update(encoded);
  TransferHead head;
  head.model = kModel;
  head.model_fingerprint = *engine_->get()->RegisterModel(engine_->model());
  head.table_digest = hash.Finish();
  head.lengths = {0, 0};
  head.policy = engine_->model().default_policy;
  const auto give = [&](const TransferAttempt& attempt, TransferPart part) {
    std::promise<absl::StatusOr<ReceiveReply>> promise;
    engine_->get()->Receive(
        kTenant, attempt, std::move(part),
        [&](absl::StatusOr<ReceiveReply> reply) { promise.set_value(std::move(reply)); });
    return promise.get_future().get();
  };
  const auto begun = give({}, TransferBegin{.head = WriteTransferHead(head)});
  ASSERT_TRUE(begun.ok()) << begun.status();
  const std::string text(reinterpret_cast<const char*>(encoded.data()), encoded.size());
  ASSERT_TRUE(give(begun->attempt, TransferTables{.encoded = text}).ok());
  const auto ended = give(begun->attempt, TransferEnd());
  ASSERT_TRUE(ended.ok() && ended->sequence.has_value()) << ended.status();
  const Handle came = {.id = ended->sequence->id, .generation = ended->sequence->generation};
  FillDurably(came, 0, Counting(0, 70));

  Restart();
  EXPECT_EQ(engine_->Get(ExpectWords(came, Counting(0, 70)))->sketch_table_digest,
            head.table_digest);
  EXPECT_NE(engine_->Get(engine_->NewSequence())->sketch_table_digest, head.table_digest);
}

// The disk answers later than the calls come: each tells what it did itself.
TEST_F(StoredEngineTest, TruncatesOneBehindTheOtherTellTheirOwnLengthAndGeneration) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 100));
  std::vector<std::promise<absl::StatusOr<SequenceInfo>>> promises(3);
  for (uint32_t i = 0; i < 3; ++i) {
    engine_->get()->Truncate(kTenant, handle.id, handle.generation + i, 90 - 30 * i,
                             [&promises, i](absl::StatusOr<SequenceInfo> info) {
                               promises[i].set_value(std::move(info));
                             });
  }
  for (uint32_t i = 0; i < 3; ++i) {
    const auto info = promises[i].get_future().get();
    ASSERT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(info->generation, handle.generation + i + 1);
    EXPECT_EQ(info->length, 90 - 30 * i);
    EXPECT_EQ(info->stored_length, 90 - 30 * i);
  }
}

TEST_F(StoredEngineTest, ASequenceWithoutTokensSurvivesADrain) {
  const Handle handle = engine_->NewSequence();
  Restart();
  ExpectWords(handle, {});
}

TEST_F(StoredEngineTest, ATruncateSurvivesACrash) {
  for (const uint32_t cut : {130U, 128U, 64U, 3U, 0U}) {
    const Handle handle = engine_->NewSequence();
    FillDurably(handle, 0, Counting(0, 140));
    const auto truncated = engine_->Truncate(handle, cut);
    ASSERT_TRUE(truncated.ok()) << truncated.status();
    Crash();
    const Handle now = ExpectWords(handle, Counting(0, cut));
    EXPECT_GT(now.generation, truncated->generation);
    // Other words, at the same positions.
    FillDurably(now, cut, Counting(5000, 90));
    Crash();
    Words expected = Counting(0, cut);
    for (const uint32_t word : Counting(5000, 90)) expected.push_back(word);
    ExpectWords(now, expected);
  }
}

TEST_F(StoredEngineTest, ADropSurvivesACrash) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 140));
  ASSERT_TRUE(engine_->Drop(handle).ok());
  EXPECT_EQ(engine_->get()->Stats().disk_bytes_used, 0);
  Crash();
  EXPECT_EQ(ErrorLine(engine_->Get(handle).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
}

TEST_F(StoredEngineTest, ASuspendedSequenceIsRefusedUntilItIsResumed) {
  const Handle handle = engine_->NewSequence();
  engine_->Fill(handle, 0, Counting(0, 300));
  const auto suspended = engine_->Suspend(handle);
  ASSERT_TRUE(suspended.ok()) << suspended.status();
  EXPECT_EQ(suspended->tier, SequenceTier::kDisk);
  EXPECT_TRUE(suspended->is_suspended);
  EXPECT_EQ(suspended->length, 300);
  EXPECT_EQ(suspended->bytes, 0);
  EXPECT_EQ(engine_->get()->Stats().blocks_used, 0);
  EXPECT_TRUE(engine_->Suspend(handle).ok());
  EXPECT_EQ(ErrorLine(engine_->Append(handle, 0, 300, Counting(300, 1)).status()),
            "FAILED_PRECONDITION SEQUENCE_SUSPENDED");
  AttendStep step(engine_->model(), 0);
  step.Add(handle, 299, Counting(299, 1)).OnlyRead();
  ASSERT_TRUE(step.Run(engine_->get()).ok());
  EXPECT_EQ(ErrorLine(step.result(0).status), "FAILED_PRECONDITION SEQUENCE_SUSPENDED");
  Crash();
  const auto found = engine_->Get(handle);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_TRUE(found->is_suspended);
  const Handle stored = {.id = handle.id, .generation = found->generation};
  const auto resumed = engine_->Resume(stored);
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(resumed->generation, stored.generation + 1);
  EXPECT_EQ(resumed->tier, SequenceTier::kMemory);
  const Handle now = ExpectWords(handle, Counting(0, 300));
  EXPECT_EQ(ErrorLine(engine_->Resume(now).status()), "FAILED_PRECONDITION SEQUENCE_NOT_SUSPENDED");
  Crash();
  EXPECT_FALSE(engine_->Get(handle)->is_suspended);
}

TEST_F(StoredEngineTest, StrangersCannotTellWhatIsOnDisk) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 10));
  ASSERT_TRUE(engine_->Suspend(handle).ok());
  const std::string missing = engine_->Get({}, "stranger").status().ToString();
  EXPECT_EQ(engine_->Get(handle, "stranger").status().ToString(), missing);
  EXPECT_EQ(engine_->Resume(handle, "stranger").status().ToString(), missing);
  EXPECT_EQ(engine_->Suspend(handle, "stranger").status().ToString(), missing);
  EXPECT_EQ(engine_->Drop(handle, "stranger").status().ToString(), missing);
}

TEST_F(StoredEngineTest, AFullPoolMakesRoomForWhatIsUsed) {
  // 64 blocks; each sequence takes 10.
  std::vector<Handle> handles;
  for (uint32_t i = 0; i < 12; ++i) {
    handles.push_back(engine_->NewSequence());
    engine_->clock.AdvanceMs(1000);
    engine_->Fill(handles.back(), 0, Counting(1000 * i, 640));
  }
  EXPECT_GT(engine_->get()->Stats().sequences_on_disk, 0);
  for (uint32_t i = 0; i < 12; ++i) {
    engine_->clock.AdvanceMs(1000);
    ExpectWords(handles[i], Counting(1000 * i, 640));
  }
}

// A client may send the next message before the one before it is answered.
TEST_F(StoredEngineTest, AppendsThatWaitForRoomKeepTheirOrder) {
  const Handle idle = engine_->NewSequence();
  engine_->Fill(idle, 0, Counting(0, 63 * 64));
  engine_->clock.AdvanceMs(1000);
  const Handle busy = engine_->NewSequence();
  std::vector<std::unique_ptr<AppendStep>> steps;
  std::vector<std::promise<absl::Status>> answers(8);
  for (uint32_t i = 0; i < answers.size(); ++i) {
    steps.push_back(
        std::make_unique<AppendStep>(engine_->model(), busy, 0, 64 * i, Counting(64 * i, 64)));
    engine_->get()->Append(steps.back()->call,
                           [&answers, i](const absl::StatusOr<AppendResult>& appended) {
                             answers[i].set_value(appended.status());
                           });
  }
  for (auto& answer : answers) EXPECT_EQ(ErrorLine(answer.get_future().get()), "OK");
  EXPECT_EQ(engine_->Get(busy)->length_max, 8 * 64);
  EXPECT_EQ(engine_->Get(idle)->tier, SequenceTier::kDisk);
}

// The sequence itself leaves memory while the first of them waits.
TEST_F(StoredEngineTest, AppendsKeepTheirOrderWhereTheirSequenceHasToLeaveToo) {
  std::vector<Handle> handles;  // 64 blocks
  for (const uint32_t blocks : {2U, 31U, 31U}) {
    handles.push_back(engine_->NewSequence());
    engine_->clock.AdvanceMs(1000);
    engine_->Fill(handles.back(), 0, Counting(0, blocks * 64));
  }
  struct Ask {
    uint32_t sequence, position, count;
  };
  // The first evicts sequence 0, which is less than the last wants.
  const std::vector<Ask> asks = {{1, 31 * 64, 64}, {1, 32 * 64, 64}, {2, 31 * 64, 128}};
  std::vector<std::unique_ptr<AppendStep>> steps;
  std::vector<std::promise<std::string>> answers(asks.size());
  // They come together.
  std::promise<void> all_there;
  engine_->get()->Get(kTenant, handles[2].id,
                      [&](const absl::StatusOr<SequenceInfo>&) { all_there.get_future().wait(); });
  for (uint32_t i = 0; i < asks.size(); ++i) {
    const auto [sequence, position, count] = asks[i];
    steps.push_back(std::make_unique<AppendStep>(engine_->model(), handles[sequence], 0, position,
                                                 Counting(position, count)));
    engine_->get()->Append(steps.back()->call,
                           [&answers, i](const absl::StatusOr<AppendResult>& appended) {
                             answers[i].set_value(ErrorLine(appended.status()));
                           });
  }
  all_there.set_value();
  for (auto& answer : answers) EXPECT_EQ(answer.get_future().get(), "OK");
}

TEST_F(StoredEngineTest, AnAttendThatFoundThePoolFullSucceedsWhenItComesAgain) {
  const Handle idle = engine_->NewSequence();
  engine_->Fill(idle, 0, Counting(0, 63 * 64));
  engine_->clock.AdvanceMs(1000);
  const Handle busy = engine_->NewSequence();
  engine_->Fill(busy, 0, Counting(0, 64));
  const auto attend = [&] {
    AttendStep step(engine_->model(), 0);
    step.Add(busy, 64, {64});
    EXPECT_TRUE(step.Run(engine_->get()).ok());
    return ErrorLine(step.result(0).status);
  };
  EXPECT_EQ(attend(), "RESOURCE_EXHAUSTED POOL_FULL");
  EXPECT_TRUE(Eventually([&] { return attend() == "OK"; }));
  EXPECT_EQ(engine_->Get(idle)->tier, SequenceTier::kDisk);
}

// Two of three sequences fit; the one that comes back pushes out the one that was used least
// recently, and that is another one of the batch.
TEST_F(StoredEngineTest, AnAttendWaitsThoughItsSequenceHadToLeaveForAnotherOfItsBatch) {
  std::vector<Handle> handles;
  const std::vector<uint32_t> lengths = {30 * 64, 33 * 64, 20 * 64};  // 64 blocks
  for (const uint32_t length : lengths) {
    handles.push_back(engine_->NewSequence());
    engine_->clock.AdvanceMs(1000);
    engine_->Fill(handles.back(), 0, Counting(0, length));
  }
  // They come together.
  std::promise<void> is_held;
  std::promise<void> all_there;
  engine_->get()->Get(kTenant, handles[2].id, [&](const absl::StatusOr<SequenceInfo>&) {
    is_held.set_value();
    all_there.get_future().wait();
  });
  is_held.get_future().wait();
  const EngineStats before = engine_->get()->Stats();
  EXPECT_EQ(before.sequences_on_disk, 1);
  std::vector<std::unique_ptr<AttendStep>> steps;
  for (const uint32_t i : {1U, 0U}) {
    steps.push_back(std::make_unique<AttendStep>(engine_->model(), 0));
    steps.back()->Add(handles[i], lengths[i] - 1, {lengths[i] - 1}).OnlyRead();
    steps.back()->Start(engine_->get());
  }
  all_there.set_value();
  for (const auto& step : steps) {
    EXPECT_EQ(ErrorLine(step->Wait()), "OK");
    EXPECT_EQ(ErrorLine(step->result(0).status), "OK");
  }
}

// They push each other out, but not for ever.
TEST_F(StoredEngineTest, ACallOfMoreSequencesThanThePoolHoldsIsAnswered) {
  constexpr uint32_t kTokens = 40 * 64;
  AttendStep step(engine_->model(), 0);
  for (uint32_t i = 0; i < 2; ++i) {
    const Handle handle = engine_->NewSequence();
    engine_->clock.AdvanceMs(1000);
    engine_->Fill(handle, 0, Counting(0, kTokens));
    step.Add(handle, kTokens - 1, {kTokens - 1});
  }
  EXPECT_EQ(ErrorLine(step.OnlyRead().Run(engine_->get())), "OK");
  std::vector<std::string> rows = {ErrorLine(step.result(0).status),
                                   ErrorLine(step.result(1).status)};
  std::sort(rows.begin(), rows.end());
  EXPECT_EQ(rows, (std::vector<std::string>{"OK", "UNAVAILABLE SEQUENCE_ON_DISK"}));
}

TEST_F(StoredEngineTest, WithoutRoomOnDiskAFullPoolIsAnErrorAndChangesNothing) {
  StoredEngine::Options options;
  options.engine.disk_bytes_max = 100'000;
  StoredEngine small(options);
  ASSERT_TRUE(small.Start().ok());
  const Handle first = small->NewSequence();
  small->Fill(first, 0, Counting(0, 63 * 64));
  const Handle second = small->NewSequence();
  const auto full = small->Append(second, 0, 0, Counting(0, 65));
  EXPECT_EQ(ErrorLine(full.status()), "RESOURCE_EXHAUSTED POOL_FULL");
  EXPECT_GT(DetailsOf(full.status()).retry_delay_ms, 0);
  EXPECT_EQ(small->Get(second)->length_max, 0);
  EXPECT_EQ(small->Get(first)->length, 63 * 64);
  const auto durable = small->AppendDurably(first, 0, 63 * 64, Counting(0, 1));
  EXPECT_EQ(ErrorLine(durable.status()), "RESOURCE_EXHAUSTED DISK_FULL");
  EXPECT_EQ(small->Get(first)->length_max, 63 * 64);
  EXPECT_EQ(ErrorLine(small->Suspend(first).status()), "RESOURCE_EXHAUSTED DISK_FULL");
}

// Sequences that are written in several pieces.
constexpr uint32_t kLongTokens = 256 * kBlockTokens;
StoredEngine::Options LongSequences() {
  StoredEngine::Options options;
  options.engine.sequence_tokens_max = kLongTokens;
  options.engine.pool_bytes = 2 * 256 * BlockBytes(SmallModel(kLayers));
  return options;
}
uint64_t LongLayerBytes() {
  return StoredLayerBytes(CacheShape(SmallModel(kLayers).layout, kLayers, {}), kLongTokens);
}

TEST_F(StoredEngineTest, SequencesOnTheirWayTogetherKeepToTheDisksLimit) {
  StoredEngine::Options options = LongSequences();
  options.engine.disk_bytes_max = 2 * kLayers * LongLayerBytes() - 1;
  StoredEngine stored(options);
  ASSERT_TRUE(stored.Start().ok());
  std::vector<std::promise<absl::Status>> answers(2);
  std::vector<Handle> handles;
  for (uint32_t i = 0; i < answers.size(); ++i) {
    handles.push_back(stored->NewSequence());
    stored->Fill(handles.back(), 0, Counting(0, kLongTokens));
  }
  for (uint32_t i = 0; i < answers.size(); ++i) {
    stored->get()->Suspend(kTenant, handles[i].id, handles[i].generation,
                           [&answers, i](const absl::StatusOr<SequenceInfo>& suspended) {
                             answers[i].set_value(suspended.status());
                           });
  }
  EXPECT_EQ(ErrorLine(answers[0].get_future().get()), "OK");
  EXPECT_EQ(ErrorLine(answers[1].get_future().get()), "RESOURCE_EXHAUSTED DISK_FULL");
  EXPECT_EQ(stored->get()->Stats().disk_bytes_used, kLayers * LongLayerBytes());
}

TEST_F(StoredEngineTest, ADurableAppendNeedsRoomForItsLayerAlone) {
  StoredEngine::Options options = LongSequences();
  options.engine.disk_bytes_max = LongLayerBytes() * 3 / 2;
  StoredEngine stored(options);
  ASSERT_TRUE(stored.Start().ok());
  const Handle handle = stored->NewSequence();
  stored->Fill(handle, 0, Counting(0, kLongTokens - 1));
  const auto last = Counting(kLongTokens - 1, 1);
  EXPECT_EQ(ErrorLine(stored->AppendDurably(handle, 0, kLongTokens - 1, last).status()), "OK");
  EXPECT_EQ(stored->get()->Stats().disk_bytes_used, LongLayerBytes());
  EXPECT_EQ(ErrorLine(stored->AppendDurably(handle, 1, kLongTokens - 1, last).status()),
            "RESOURCE_EXHAUSTED DISK_FULL");
  EXPECT_EQ(stored->Get(handle)->length, kLongTokens - 1);
}

TEST_F(StoredEngineTest, WithoutADataDirectoryDurabilityIsRefused) {
  TestEngine plain;
  const Handle handle = plain.NewSequence();
  EXPECT_EQ(ErrorLine(plain.AppendDurably(handle, 0, 0, Counting(0, 1)).status()),
            "FAILED_PRECONDITION NO_DISK_TIER durability");
  EXPECT_EQ(plain.Get(handle)->length_max, 0);
  EXPECT_EQ(ErrorLine(plain.Suspend(handle).status()), "FAILED_PRECONDITION NO_DISK_TIER");
  EXPECT_EQ(ErrorLine(plain.Resume(handle).status()), "FAILED_PRECONDITION NO_DISK_TIER");
}

// The audit asks for background work when its sequence has arrived: by then there is none any more.
TEST_F(StoredEngineTest, AnAuditThatWaitsForItsSequenceIsAnsweredAtTheEnd) {
  StoredEngine::Options options;
  options.engine.audit_rate = 1.0;
  StoredEngine stored(options);
  ASSERT_TRUE(stored.Start().ok());
  const Handle audited = stored->NewSequence();
  stored->Fill(audited, 0, Counting(0, 40 * 64));
  AttendStep step(stored->model(), 0);
  step.Add(audited, 40 * 64 - 1, Counting(40 * 64 - 1, 1)).OnlyRead();
  ASSERT_TRUE(step.Run(stored->get()).ok());
  ASSERT_TRUE(Eventually([&] { return stored->get()->Stats().audit.rows_audited == 1; }));
  stored->clock.AdvanceMs(1000);
  stored->Fill(stored->NewSequence(), 0, Counting(0, 40 * 64));
  ASSERT_EQ(stored->Get(audited)->tier, SequenceTier::kDisk);
  std::promise<std::string> answer;
  stored->get()->Audit(kTenant, audited.id, {.row_count = 1},
                       [&answer](const absl::StatusOr<AuditReport>& report) {
                         answer.set_value(ErrorLine(report.status()));
                       });
  stored->get()->Drain();
  std::future<std::string> answered = answer.get_future();
  ASSERT_EQ(answered.wait_for(std::chrono::seconds(0)), std::future_status::ready);
  // OK where it was faster than the drain.
  const std::string told = answered.get();
  EXPECT_TRUE(told == "UNAVAILABLE DRAINING" || told == "OK") << told;
}

TEST_F(StoredEngineTest, AnExpiredSequenceLeavesTheDiskToo) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 100));
  EXPECT_GT(engine_->get()->Stats().disk_bytes_used, 0);
  engine_->clock.AdvanceMs(24 * 60 * 60 * 1000);
  EXPECT_EQ(ErrorLine(engine_->Get(handle).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
  EXPECT_EQ(engine_->get()->Stats().disk_bytes_used, 0);
  Restart();
  EXPECT_EQ(ErrorLine(engine_->Get(handle).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
}

// A whole record of the right place that follows the right one, of an earlier time.
TEST_F(StoredEngineTest, ASliceOfAnotherTimeIsALoss) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 70));
  engine_.Stop();
  const auto earlier = Rows({SliceKey(handle.id, 0, 1)});
  ASSERT_TRUE(engine_.Start().ok());
  const auto cut = engine_->Truncate(handle, 64);
  ASSERT_TRUE(cut.ok()) << cut.status();
  const Handle now = {.id = handle.id, .generation = cut->generation};
  FillDurably(now, 64, Counting(5000, 6));
  engine_.Stop();
  PutRows(earlier);
  ASSERT_TRUE(engine_.Start().ok());
  EXPECT_EQ(ErrorLine(engine_->Append(now, 0, 0, Counting(0, 64)).status()),
            "DATA_LOSS SEQUENCE_LOST");
  EXPECT_EQ(ErrorLine(engine_->Get(now).status()), "DATA_LOSS SEQUENCE_LOST");
  EXPECT_EQ(ErrorLine(engine_->Get(now, "stranger").status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
  // A stop keeps it in mind, until it is dropped.
  Restart();
  EXPECT_EQ(ErrorLine(engine_->Get(now).status()), "DATA_LOSS SEQUENCE_LOST");
  EXPECT_TRUE(engine_->Drop(now).ok());
  EXPECT_EQ(ErrorLine(engine_->Get(now).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
  Crash();
  EXPECT_EQ(ErrorLine(engine_->Get(now).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
}

// Everything of a sequence fits, and is of an earlier time.
TEST_F(StoredEngineTest, ASequenceOfAnotherTimeIsALoss) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 10));
  engine_.Stop();
  const auto earlier =
      Rows({StateKey(handle.id), SliceKey(handle.id, 0, 0), SliceKey(handle.id, 1, 0)});
  ASSERT_TRUE(engine_.Start().ok());
  FillDurably(handle, 10, Counting(10, 10));
  engine_.Stop();
  PutRows(earlier);
  ASSERT_TRUE(engine_.Start().ok());
  EXPECT_EQ(ErrorLine(engine_->Get(handle).status()), "DATA_LOSS SEQUENCE_LOST");
  EXPECT_EQ(engine_->get()->Stats().sequences_lost, 1);
}

// Its generation would go down, to where it had been with other contents.
TEST_F(StoredEngineTest, ASequenceOfAfterTheLastCrashIsALoss) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 10));
  engine_.Crash();
  {
    const auto tier = *engine_.OpenTier();
    auto state = ReadState(*tier->Read(StateKey(handle.id)));
    ASSERT_TRUE(state.has_value());
    state->crash_count = 7;
    TierBatch batch;
    batch.puts.emplace_back(StateKey(handle.id), WriteState(*state));
    ASSERT_TRUE(tier->Commit({&batch, 1}, true).ok());
  }
  ASSERT_TRUE(engine_.Start().ok());
  EXPECT_EQ(ErrorLine(engine_->Get(handle).status()), "DATA_LOSS SEQUENCE_LOST");
}

TEST_F(StoredEngineTest, AFailedDiskStopsWritingAndNothingElse) {
  const Handle handle = engine_->NewSequence();
  FillDurably(handle, 0, Counting(0, 100));
  engine_.filesystem()->CutAfter(0);
  EXPECT_EQ(ErrorLine(engine_->AppendDurably(handle, 0, 100, Counting(100, 1)).status()),
            "UNAVAILABLE DISK_FAILED");
  EXPECT_FALSE(engine_->get()->Stats().disk_is_healthy);
  // From now on it is known before anything changes.
  const uint32_t length = engine_->Get(handle)->length_max;
  EXPECT_EQ(ErrorLine(engine_->AppendDurably(handle, 1, 100, Counting(100, 1)).status()),
            "UNAVAILABLE DISK_FAILED");
  EXPECT_EQ(ErrorLine(engine_->Truncate(handle, 50).status()), "UNAVAILABLE DISK_FAILED");
  EXPECT_EQ(ErrorLine(engine_->Drop(handle).status()), "UNAVAILABLE DISK_FAILED");
  EXPECT_EQ(engine_->Get(handle)->length_max, length);
  EXPECT_TRUE(engine_->Append(handle, 1, 100, Counting(100, 1)).ok());
  engine_.Crash();
  ASSERT_TRUE(engine_.Start().ok());
  ExpectWords(handle, Counting(0, 100));
}

}  // namespace
}  // namespace kvservice::testing
