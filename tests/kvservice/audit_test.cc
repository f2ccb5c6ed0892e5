// Audits and replays of an engine: that they find what is wrong, and nothing else; and the random
// numbers that certificates are sampled with.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "kvservice/audit_check.h"
#include "kvservice/error.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Policy Scanning(SelectorKind selector, Guarantee guarantee = Guarantee::kDeterministic) {
  Policy policy = DefaultPolicy(selector);
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  policy.budget = {.sink = 4, .local = 16, .top_k = 24};
  policy.guarantee = guarantee;
  return policy;
}

EngineOptions Audited(double rate) {
  EngineOptions options = TestEngine::SmallOptions();
  options.audit_rate = rate;
  return options;
}

// The audit's own rows are the only ones that ask for exact masses in these tests.
bool IsAudit(const AttendRow& row) { return row.plan.prove == Guarantee::kExact; }

// What an engine's audits have found when none is left to do.
AuditStats AwaitAudits(TestEngine* engine, uint64_t row_count) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (;;) {
    const AuditStats stats = engine->get()->Stats().audit;
    if (stats.rows_audited + stats.rows_cancelled + stats.rows_skipped >= row_count) return stats;
    if (std::chrono::steady_clock::now() > end) {
      ADD_FAILURE() << "audits do not come to an end";
      return stats;
    }
    std::this_thread::yield();
  }
}

class AuditTest : public ::testing::Test {
 protected:
  // A sequence of `length` words in both layers.
  void Start(const EngineOptions& options, uint32_t length = 250, std::string_view name = "cpu") {
    auto device = std::make_unique<WatchedDevice>(*NewDevice(name, {.thread_count = 1}));
    device_ = device.get();
    engine_ = std::make_unique<TestEngine>(options, 2, std::move(device));
    handle_ = engine_->NewSequence();
    engine_->Fill(handle_, 0, Counting(0, length));
    next_ = length;
  }

  // The next word attends; returns the call's number.
  uint64_t Attend(const Policy& policy, uint32_t layer = 0, AttendRowResult* result = nullptr) {
    AttendStep step(engine_->model(), layer);
    step.Add(handle_, next_, {next_});
    step.call.policy = &policy;
    EXPECT_TRUE(step.Run(engine_->get()).ok());
    EXPECT_TRUE(step.result(0).status.ok()) << step.result(0).status;
    if (layer + 1 == engine_->model().layer_count) ++next_;
    epoch_ = step.call.epoch;
    draw_secret_id_ = step.call.draw_secret_id;
    if (result != nullptr) *result = step.result(0);
    return step.call.call_number;
  }

  AuditAsk ReplayOf(uint64_t call_number, uint32_t row = 0) const {
    return {.replay = ReplayAsk{.call_number = call_number,
                                .epoch = epoch_,
                                .draw_secret_id = draw_secret_id_,
                                .row = row}};
  }

  WatchedDevice* device_ = nullptr;
  std::unique_ptr<TestEngine> engine_;
  Handle handle_;
  uint32_t next_ = 0;
  Epoch epoch_{};
  uint64_t draw_secret_id_ = 0;
};

TEST_F(AuditTest, EveryKindOfRowIsRight) {
  for (const SelectorKind kind :
       {SelectorKind::kDense, SelectorKind::kCis, SelectorKind::kCpe, SelectorKind::kCertified}) {
    for (const Mode mode : {Mode::kEnforce, Mode::kShadow}) {
      for (const Guarantee guarantee : {Guarantee::kConfidence, Guarantee::kDeterministic}) {
        Start(Audited(1.0));
        Policy policy = Scanning(kind, guarantee);
        policy.psaw.phi = 0.7F;
        policy.mode = mode;
        policy.max_dropped_mass = 0.05F;
        policy.on_violation = OnViolation::kReport;
        for (int i = 0; i < 8; ++i) {
          for (const uint32_t layer : {0U, 1U}) Attend(policy, layer);
        }
        const AuditStats stats = AwaitAudits(engine_.get(), 16);
        EXPECT_EQ(stats.rows_audited, 16U);
        EXPECT_EQ(stats.certificates, 64U);
        // A plan that asks for no proof says nothing about its output.
        const bool has_outputs = mode == Mode::kEnforce && kind != SelectorKind::kDense;
        EXPECT_EQ(stats.outputs, has_outputs ? 64U : 0U);
        EXPECT_EQ(stats.violations, 0U) << static_cast<int>(kind);
        EXPECT_EQ(stats.misses, 0U);
        EXPECT_GE(stats.slack_median_nats, 0.0);
        EXPECT_LE(stats.slack_median_nats, stats.slack_p95_nats);
        EXPECT_LE(stats.slack_p95_nats, stats.slack_max_nats);
        if (kind == SelectorKind::kCertified) {
          EXPECT_GT(stats.slack_count, 0U);
        }
      }
    }
  }
}

TEST_F(AuditTest, ABoundThatLiesIsAViolationAndIsTold) {
  EngineOptions options = Audited(1.0);
  std::vector<std::string> lines;
  options.on_audit_violation = [&](const std::string& line) { lines.push_back(line); };
  Start(options);
  device_->set_after([](const LayerShape&, absl::Span<AttendRow> rows) {
    // One head's bound loses a thousandth of what it is: nothing that anybody would see.
    if (IsAudit(rows[0])) return;
    HeadCertificate* liar = &rows[0].certificates[2];
    liar->dropped_mass_upper.value = liar->dropped_mass_lower.value * 0.999;
  });
  const Policy policy = Scanning(SelectorKind::kCertified);
  const uint64_t call_number = Attend(policy);
  const AuditStats stats = AwaitAudits(engine_.get(), 1);
  EXPECT_EQ(stats.violations, 1U);
  EXPECT_EQ(stats.misses, 0U);
  ASSERT_EQ(lines.size(), 1U);
  EXPECT_THAT(lines[0], HasSubstr("call " + std::to_string(call_number) + " row 0 layer 0"));
  EXPECT_THAT(lines[0], HasSubstr("query head 2: dropped mass is at least"));

  const auto report = engine_->Audit(handle_, {.row_count = 1});
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->stats.violations, 1U);
  EXPECT_THAT(report->violations, ElementsAre(lines[0]));
  EXPECT_EQ(engine_->get()->Stats().audit.rows_audited, 1U) << "looking again counts once";
}

TEST_F(AuditTest, AnOutputBeyondItsBoundIsAViolation) {
  Start(Audited(1.0));
  device_->set_after([](const LayerShape&, absl::Span<AttendRow> rows) {
    if (IsAudit(rows[0])) return;
    // The second head's output moves by a little more than its bound allows at most.
    rows[0].out[64] += static_cast<float>(2.5 * rows[0].certificates[1].output_error_upper);
  });
  Attend(Scanning(SelectorKind::kCertified));
  const AuditStats stats = AwaitAudits(engine_.get(), 1);
  EXPECT_EQ(stats.outputs, 4U);
  EXPECT_EQ(stats.violations, 1U);
}

TEST_F(AuditTest, AStatementThatMayFailIsAMiss) {
  Start(Audited(1.0));
  device_->set_after([](const LayerShape&, absl::Span<AttendRow> rows) {
    if (IsAudit(rows[0])) return;
    for (uint32_t head = 0; head < 4; ++head) {
      HeadCertificate* certificate = &rows[0].certificates[head];
      certificate->level = Level::kConfidence;
      certificate->failure_probability = 0.25;
      if (head == 1) certificate->dropped_mass_upper.value = 0.0;
    }
  });
  Attend(Scanning(SelectorKind::kCertified));
  const AuditStats stats = AwaitAudits(engine_.get(), 1);
  EXPECT_EQ(stats.violations, 0U);
  EXPECT_EQ(stats.misses, 1U);
  EXPECT_EQ(stats.expected_misses, 1.0);
}

// The watcher holds the audits back until the sequence has changed.
TEST_F(AuditTest, AChangedSequenceCancelsItsRows) {
  Start(Audited(0.0));
  Policy policy = Scanning(SelectorKind::kCertified);
  ASSERT_TRUE(engine_->Audit(handle_, {.keep_next = 2}).ok());
  Attend(policy);
  AwaitAudits(engine_.get(), 1);
  const auto before = engine_->Audit(handle_, {});
  ASSERT_TRUE(before.ok());
  EXPECT_EQ(before->kept_rows, 1U);
  EXPECT_EQ(before->keep_next_left, 1U);
  ASSERT_TRUE(engine_->Truncate(handle_, 200).ok());
  const Handle changed{.id = handle_.id, .generation = handle_.generation + 1};
  const auto after = engine_->Audit(changed, {.row_count = 1});
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(after->kept_rows, 0U);
  EXPECT_THAT(after->call_numbers, ElementsAre());
}

// Rows that wait while their sequence goes or loses tokens: the audit of another row is held until
// it has.
TEST_F(AuditTest, WaitingRowsOfAChangedSequenceAreCounted) {
  for (const bool drops : {true, false}) {
    Start(Audited(1.0));
    std::promise<void> entered;
    std::promise<void> changed;
    bool first = true;
    device_->set_before([&](const LayerShape&, absl::Span<AttendRow> rows) {
      if (!IsAudit(rows[0]) || !first) return;
      first = false;
      entered.set_value();
      changed.get_future().wait();
    });
    const Policy policy = Scanning(SelectorKind::kCertified);
    AttendStep steps[] = {{engine_->model(), 0}, {engine_->model(), 0}, {engine_->model(), 0}};
    for (uint32_t i = 0; i < 3; ++i) {
      steps[i].Add(handle_, next_ + i, {next_ + i});
      steps[i].call.policy = &policy;
      steps[i].Start(engine_->get());
      if (i == 0) {
        EXPECT_TRUE(steps[0].Wait().ok());
        entered.get_future().wait();
      }
    }
    std::promise<void> done;
    const auto tell = [&](const absl::StatusOr<SequenceInfo>& info) {
      EXPECT_TRUE(info.ok()) << info.status();
      done.set_value();
    };
    if (drops) {
      engine_->get()->Drop(kTenant, handle_.id, tell);
    } else {
      engine_->get()->Truncate(kTenant, handle_.id, handle_.generation, 200, tell);
    }
    changed.set_value();
    EXPECT_TRUE(steps[1].Wait().ok());
    EXPECT_TRUE(steps[2].Wait().ok());
    done.get_future().wait();
    const AuditStats stats = AwaitAudits(engine_.get(), 3);
    EXPECT_EQ(stats.rows_audited, 1U);
    EXPECT_EQ(stats.rows_cancelled, 2U);
  }
}

TEST_F(AuditTest, WhatIsKeptIsBounded) {
  EngineOptions options = Audited(1.0);
  options.audit_rows_max = 2;
  Start(options);
  const Policy policy = Scanning(SelectorKind::kCertified);
  std::vector<uint64_t> calls;
  for (uint64_t i = 0; i < 5; ++i) {
    calls.push_back(Attend(policy, static_cast<uint32_t>(i % 2)));
    AwaitAudits(engine_.get(), i + 1);
  }
  const auto report = engine_->Audit(handle_, {.row_count = kAuditRowsMax});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->kept_rows, 2U);
  EXPECT_THAT(report->call_numbers, ElementsAre(calls[4], calls[3])) << "the most recent first";
  EXPECT_EQ(report->stats.rows_audited, 2U);
  EXPECT_EQ(report->stats.certificates, 8U);

  options.audit_bytes_max = 100;
  Start(options);
  Attend(policy);
  const AuditStats stats = AwaitAudits(engine_.get(), 1);
  EXPECT_EQ(stats.rows_skipped, 1U);
  EXPECT_EQ(stats.rows_audited, 0U);
}

TEST_F(AuditTest, TheShareOfCallsIsWhatWasAskedFor) {
  constexpr int kCalls = 400;
  EngineOptions options = Audited(0.25);
  Start(options, 20);
  const Policy policy = DefaultPolicy(SelectorKind::kDense);
  const uint32_t position = next_ - 1;
  for (int i = 0; i < kCalls; ++i) {
    AttendStep step(engine_->model(), 0);
    step.Add(handle_, position, {position});
    step.call.policy = &policy;
    ASSERT_TRUE(step.Run(engine_->get()).ok());
  }
  const AuditStats stats = engine_->get()->Stats().audit;
  const uint64_t chosen = stats.rows_audited + stats.rows_skipped + stats.rows_waiting;
  // Six standard deviations of 400 tosses at 1/4.
  EXPECT_GT(chosen, 100U - 52U);
  EXPECT_LT(chosen, 100U + 52U);
}

TEST_F(AuditTest, KeepsTheNextRowsThatSomebodyAsksFor) {
  Start(Audited(0.0));
  const Policy policy = Scanning(SelectorKind::kCertified);
  Attend(policy);
  const auto asked = engine_->Audit(handle_, {.keep_next = 2});
  ASSERT_TRUE(asked.ok());
  EXPECT_EQ(asked->keep_next_left, 2U);
  EXPECT_EQ(asked->kept_rows, 0U);
  const uint64_t first = Attend(policy, 1);
  const uint64_t second = Attend(policy, 0);
  Attend(policy, 1);
  const auto report = engine_->Audit(handle_, {.row_count = 10});
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->keep_next_left, 0U);
  EXPECT_THAT(report->call_numbers, ElementsAre(second, first));
  EXPECT_EQ(report->stats.violations, 0U);
  EXPECT_EQ(AwaitAudits(engine_.get(), 2).rows_audited, 2U);
}

TEST_F(AuditTest, AReplayGivesTheSameBits) {
  for (const Guarantee guarantee : {Guarantee::kDeterministic, Guarantee::kConfidence}) {
    Start(Audited(1.0), 700);
    // Too few tokens are kept for the limit, so that samples must bound the rest.
    Policy policy = Scanning(SelectorKind::kPsaw, guarantee);
    policy.psaw.phi = 1.0F;
    policy.max_dropped_mass = 0.01F;
    policy.on_violation = OnViolation::kReport;
    AttendRowResult first;
    const uint64_t call_number = Attend(policy, 0, &first);
    uint32_t sampled = 0;
    for (const HeadCertificate& head : first.certificates) sampled += head.keys_sampled;
    EXPECT_EQ(sampled > 0, guarantee == Guarantee::kConfidence);
    // The sequence grows, so that a slice of it is sealed; what the row saw stays.
    for (int i = 0; i < 80; ++i) Attend(policy, 1);
    const auto report = engine_->Audit(handle_, ReplayOf(call_number));
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_TRUE(report->replay_equal);
    EXPECT_TRUE(SameCertificates(report->replayed, first.certificates));
    EXPECT_THAT(report->call_numbers, ElementsAre(call_number));
    // The same question again draws other numbers.
    AttendStep step(engine_->model(), 0);
    step.Add(handle_, 700, {700}).OnlyRead();
    step.call.policy = &policy;
    ASSERT_TRUE(step.Run(engine_->get()).ok());
    EXPECT_EQ(SameCertificates(step.result(0).certificates, first.certificates), sampled == 0);
  }
}

TEST_F(AuditTest, ReplaysOfNothingAreTyped) {
  Start(Audited(1.0));
  const uint64_t call_number = Attend(Scanning(SelectorKind::kCertified));
  const uint64_t with_lists = Attend(Scanning(SelectorKind::kCis), 1);
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, ReplayOf(call_number + 100)).status()),
            "NOT_FOUND CALL_NOT_KEPT replay");
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, ReplayOf(call_number, 1)).status()),
            "NOT_FOUND CALL_NOT_KEPT replay");
  AuditAsk ask = ReplayOf(call_number);
  ask.replay->epoch[0] ^= std::byte{1};
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, ask).status()), "NOT_FOUND CALL_NOT_KEPT replay");
  ask = ReplayOf(call_number);
  ++ask.replay->draw_secret_id;
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, ask).status()), "NOT_FOUND CALL_NOT_KEPT replay");
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, ReplayOf(with_lists)).status()),
            "FAILED_PRECONDITION CALL_NOT_REPLAYABLE replay");
  ask = ReplayOf(call_number);
  ask.row_count = 1;
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, ask).status()),
            "INVALID_ARGUMENT AUDIT_AMBIGUOUS call_count");
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, {.row_count = kAuditRowsMax + 1}).status()),
            "INVALID_ARGUMENT AUDIT_TOO_LARGE call_count");
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, {.keep_next = kAuditRowsMax + 1}).status()),
            "INVALID_ARGUMENT AUDIT_TOO_LARGE keep_next");
  EXPECT_EQ(ErrorLine(engine_->Audit(handle_, {}, "someone else").status()),
            "NOT_FOUND SEQUENCE_NOT_FOUND");
}

TEST_F(AuditTest, ADrainAnswersThoseWhoWait) {
  Start(Audited(1.0));
  const Policy policy = Scanning(SelectorKind::kCertified);
  for (int i = 0; i < 4; ++i) Attend(policy, static_cast<uint32_t>(i % 2));
  AwaitAudits(engine_.get(), 4);
  std::promise<absl::Status> answer;
  engine_->get()->Audit(
      kTenant, handle_.id, {.row_count = 4},
      [&](const absl::StatusOr<AuditReport>& report) { answer.set_value(report.status()); });
  engine_->get()->Drain();
  const absl::Status status = answer.get_future().get();
  EXPECT_TRUE(status.ok() || ErrorLine(status) == "UNAVAILABLE DRAINING") << status;
}

// ---- Keys
// ----------------------------------------------------------------------------------------

TEST_F(AuditTest, NoTwoRowsShareAKeyNotEvenOfARepeatedCall) {
  Start(Audited(0.0));
  std::vector<std::array<std::byte, kDrawKeyBytes>> keys;
  device_->set_before([&](const LayerShape&, absl::Span<AttendRow> rows) {
    for (const AttendRow& row : rows) keys.push_back(row.draw_key);
  });
  const Policy policy = Scanning(SelectorKind::kCertified, Guarantee::kConfidence);
  const Handle other = engine_->NewSequence();
  engine_->Fill(other, 0, Counting(0, next_));
  std::set<uint64_t> numbers;
  for (int repeat = 0; repeat < 3; ++repeat) {
    for (const uint32_t layer : {0U, 1U}) {
      AttendStep step(engine_->model(), layer);
      step.Add(handle_, next_, {next_}).Add(other, next_, {next_});
      step.call.policy = &policy;
      ASSERT_TRUE(step.Run(engine_->get()).ok());
      EXPECT_TRUE(numbers.insert(step.call.call_number).second);
      EXPECT_GT(step.call.call_number, 0U);
    }
  }
  EXPECT_EQ(keys.size(), 12U);
  EXPECT_EQ(std::set(keys.begin(), keys.end()).size(), keys.size());
}

TEST_F(AuditTest, ASecretOfTheOperatorKeepsItsIdAndTheEpochKeepsKeysApart) {
  EngineOptions options = Audited(0.0);
  options.draw_secret = DrawSecret{std::byte{1}};
  const Policy policy = DefaultPolicy(SelectorKind::kDense);
  Start(options);
  engine_->random.set_constant(false);
  Attend(policy);
  const uint64_t id = draw_secret_id_;
  EXPECT_EQ(id, DrawKeys(*options.draw_secret, {}).secret_id());
  EXPECT_NE(epoch_, Epoch{});
  options.draw_secret.reset();
  Start(options);
  Attend(policy);
  EXPECT_NE(draw_secret_id_, id);
}

TEST(EngineSecretsTest, WithoutRandomNumbersThereIsNoEngine) {
  FakeClock clock;
  SeededRandom random(1);
  random.set_fails(true);
  const auto engine =
      NewEngine(TestEngine::SmallOptions(), *NewDevice("reference", {}), &clock, &random);
  EXPECT_EQ(ErrorLine(engine.status()), "UNAVAILABLE RANDOM_UNAVAILABLE");
}

// ---- Comparing
// -----------------------------------------------------------------------------------

struct Comparison {
  KeptRow row;
  RowTruth truth;
};

// One head that kept three quarters, with bounds that touch the truth.
Comparison Touching() {
  Comparison made;
  HeadCertificate told;
  told.level = Level::kDeterministic;
  told.log_dropped_upper = {1.0};
  told.log_dropped_lower = {1.0};
  told.log_kept_lower = {2.0};
  told.log_kept_upper = {2.0};
  told.dropped_mass_upper = {0.25};
  told.dropped_mass_lower = {0.25};
  told.output_error_upper = 0.625;
  made.row.certificates = {told};
  made.row.out = {0.0F, 0.0F};
  made.truth.exact = {told};
  made.truth.dense.resize(1);
  made.truth.dense[0].output_error_upper = 0.0;
  made.truth.dense_out = {0.375F, 0.5F};
  return made;
}

AuditStats Compare(const Comparison& comparison) {
  AuditFindings findings;
  CompareRow(comparison.row, comparison.truth, &findings);
  EXPECT_EQ(findings.lines.size(), findings.stats.violations);
  return findings.stats;
}

TEST(CompareRowTest, TouchingHolds) {
  const AuditStats stats = Compare(Touching());
  EXPECT_EQ(stats.certificates, 1U);
  EXPECT_EQ(stats.outputs, 1U);
  EXPECT_EQ(stats.violations + stats.misses, 0U);
}

TEST(CompareRowTest, OneStepBeyondIsWrong) {
  const std::vector<std::function<void(Comparison*)>> spoils = {
      [](Comparison* c) {
        double* upper = &c->row.certificates[0].dropped_mass_upper.value;
        *upper = std::nextafter(*upper, 0.0);
      },
      [](Comparison* c) {
        double* upper = &c->row.certificates[0].log_dropped_upper.value;
        *upper = std::nextafter(*upper, 0.0);
      },
      // The distance is known to a few parts in 10^13.
      [](Comparison* c) { c->row.certificates[0].output_error_upper = 0.625 * (1.0 - 1e-7); },
      [](Comparison* c) { c->truth.dense_out[1] = 0.5001F; }};
  for (size_t i = 0; i < spoils.size(); ++i) {
    Comparison comparison = Touching();
    spoils[i](&comparison);
    EXPECT_EQ(Compare(comparison).violations, 1U) << i;
    comparison.row.certificates[0].failure_probability = 1e-9;
    EXPECT_EQ(Compare(comparison).violations, 0U) << i;
    EXPECT_EQ(Compare(comparison).misses, 1U) << i;
    comparison.row.certificates[0].level = Level::kNone;
    EXPECT_EQ(Compare(comparison).certificates, 0U) << "nothing was said";
  }
}

// Nothing random is in these, so a failure probability is no excuse.
TEST(CompareRowTest, LowerBoundsAndKeptMassesHoldAlways) {
  const std::vector<std::function<void(HeadCertificate*)>> spoils = {
      [](HeadCertificate* told) { told->dropped_mass_lower.value = std::nextafter(0.25, 1.0); },
      [](HeadCertificate* told) { told->log_dropped_lower.value = std::nextafter(1.0, 2.0); },
      [](HeadCertificate* told) { told->log_kept_lower.value = std::nextafter(2.0, 3.0); },
      [](HeadCertificate* told) { told->log_kept_upper.value = std::nextafter(2.0, 1.0); }};
  for (size_t i = 0; i < spoils.size(); ++i) {
    Comparison comparison = Touching();
    comparison.row.certificates[0].failure_probability = 1e-9;
    EXPECT_EQ(Compare(comparison).violations, 0U);
    spoils[i](&comparison.row.certificates[0]);
    EXPECT_EQ(Compare(comparison).violations, 1U) << i;
  }
}

TEST(CompareRowTest, TheTruthsOwnErrorIsNotHeldAgainstTheCertificate) {
  Comparison comparison = Touching();
  comparison.truth.dense_out[1] = 0.51F;
  comparison.truth.dense[0].output_error_upper = 0.02;
  EXPECT_EQ(Compare(comparison).violations, 0U);
  comparison.truth.dense[0].output_error_upper = std::numeric_limits<double>::infinity();
  EXPECT_EQ(Compare(comparison).outputs, 0U);
  comparison = Touching();
  comparison.row.plan.mode = Mode::kShadow;
  EXPECT_EQ(Compare(comparison).outputs, 0U);
}

TEST(SlackHistogramTest, QuantilesAreUpperEnds) {
  SlackHistogram slack;
  for (int i = 1; i <= 100; ++i) slack.Add(0.02 * i - 0.005);
  EXPECT_EQ(slack.count(), 100U);
  EXPECT_GE(slack.Quantile(0.5), 0.995);
  EXPECT_LE(slack.Quantile(0.5), 1.005 + 1e-9);
  EXPECT_GE(slack.Quantile(0.95), 1.895);
  EXPECT_LE(slack.Quantile(0.95), 1.905 + 1e-9);
  EXPECT_EQ(slack.Quantile(1.0), slack.max());
  slack.Add(1000.0);
  EXPECT_EQ(slack.max(), 1000.0);
  EXPECT_EQ(slack.Quantile(1.0), 1000.0);
}

}  // namespace
}  // namespace kvservice::testing
