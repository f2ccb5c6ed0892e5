// What the engine does when it is used as it should be. Errors are in engine_errors_test.cc, long
// random histories in engine_model_test.cc.

#include "kvservice/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <latch>
#include <limits>
#include <set>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "selector/assumed.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

Policy Scanning(SelectorKind selector) {
  Policy policy = DefaultPolicy(selector);
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  policy.budget = {.sink = 4, .local = 16, .top_k = 24};
  return policy;
}

// A device whose batches wait at a gate, so that calls pile up behind the first.
class Gate {
 public:
  explicit Gate(WatchedDevice* device) {
    device->set_before([this](const LayerShape&, absl::Span<AttendRow> rows) {
      batches_.push_back(rows.size());
      if (batches_.size() > 1) return;
      entered_.count_down();
      open_.wait();
    });
  }
  void AwaitFirst() { entered_.wait(); }
  void Open() { open_.count_down(); }
  // Rows of every batch so far; after the engine has answered.
  const std::vector<size_t>& batches() const { return batches_; }

 private:
  std::latch entered_{1};
  std::latch open_{1};
  std::vector<size_t> batches_;
};

std::unique_ptr<WatchedDevice> Watched() {
  return std::make_unique<WatchedDevice>(*NewDevice("reference", {}));
}

TEST(EngineTest, DecodingEqualsDenseAttention) {
  TestEngine engine;
  const Handle handle = engine.NewSequence();
  const Words words = Counting(0, 140);
  engine.Fill(handle, 0, Words(words.begin(), words.begin() + 120));
  for (uint32_t position = 120; position < 140; ++position) {
    for (uint32_t layer = 0; layer < 2; ++layer) {
      AttendStep step(engine.model(), layer);
      step.Add(handle, position, {words[position]});
      ASSERT_TRUE(step.Run(engine.get()).ok());
      ExpectOk(step);
      EXPECT_EQ(step.result(0).attended_length, position + 1);
      EXPECT_EQ(step.result(0).selector, SelectorKind::kDense);
      ExpectDense(step, 0, engine.model(), words, position);
      for (const HeadCertificate& certificate : step.result(0).certificates) {
        EXPECT_EQ(certificate.level, Level::kExact);
        EXPECT_EQ(certificate.dropped_mass_upper.value, 0.0);
      }
    }
  }
  const auto info = engine.Get(handle);
  EXPECT_EQ(info->length, 140U);
  EXPECT_EQ(info->block_count, 3U);
  EXPECT_EQ(info->stats.attend_rows, 40U);
  EXPECT_EQ(info->stats.groups_dense, 80U);
  EXPECT_EQ(info->stats.tokens_read, info->stats.tokens_visible);
}

// Tensors in memory that somebody writes to while the device works on the call.
TEST(EngineTest, SharedTensorsAreReadOnce) {
  AttendStep* step_of_device = nullptr;
  auto device = Watched();
  device->set_before([&](const LayerShape&, absl::Span<AttendRow>) {
    for (std::vector<std::byte>* tensor :
         {&step_of_device->q, &step_of_device->k, &step_of_device->v}) {
      std::fill(tensor->begin(), tensor->end(), std::byte{0xFF});
    }
  });
  TestEngine engine(TestEngine::SmallOptions(), 2, std::move(device));
  const std::array<Handle, 3> handles = {engine.NewSequence(), engine.NewSequence(),
                                         engine.NewSequence()};
  const Words words = Counting(5, 73);
  for (const Handle& handle : handles) {
    engine.Fill(handle, 0, Words(words.begin(), words.begin() + 70));
  }
  for (uint32_t position = 70; position < 73; ++position) {
    AttendStep step(engine.model(), 0);
    step_of_device = &step;
    for (const Handle& handle : handles) step.Add(handle, position, {words[position]});
    AttendCall* const call = step.Build();
    call->q.is_shared = call->k->is_shared = call->v->is_shared = true;
    ASSERT_TRUE(step.Run(engine.get()).ok());
    ExpectOk(step);
    for (uint32_t token = 0; token < 3; ++token) {
      ExpectDense(step, token, engine.model(), words, position);
    }
  }
  // What is not finite is found in the copy, in the row that has it.
  AttendStep step(engine.model(), 1);
  step_of_device = &step;
  for (const Handle& handle : handles) step.Add(handle, 70, {words[70]});
  AttendCall* const call = step.Build();
  call->q.is_shared = call->k->is_shared = true;
  const size_t row_floats = step.q.size() / sizeof(float) / 3;
  const float infinity = std::numeric_limits<float>::infinity();
  std::memcpy(step.q.data() + (row_floats + 2) * sizeof(float), &infinity, sizeof(infinity));
  ASSERT_TRUE(step.Run(engine.get()).ok());
  EXPECT_TRUE(step.result(0).status.ok());
  EXPECT_EQ(step.result(1).status.message(),
            absl::StrCat("q is not finite at element ", row_floats + 2));
  EXPECT_TRUE(step.result(2).status.ok());
}

TEST(EngineTest, QueriesOfAnyTypeAndSeveralTokens) {
  TestEngine engine;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    const Handle handle = engine.NewSequence();
    const Words words = Counting(77, 70);
    engine.Fill(handle, 0, Words(words.begin(), words.begin() + 62));
    AttendStep step(engine.model(), 1);
    step.Add(handle, 62, Words(words.begin() + 62, words.end())).QueryType(dtype);
    ASSERT_TRUE(step.Run(engine.get()).ok());
    ExpectOk(step);
    if (dtype != DType::kFloat32) continue;  // The oracle's queries are float32.
    for (uint32_t token = 0; token < 8; ++token) {
      ExpectDense(step, token, engine.model(), words, 62 + token);
    }
  }
}

TEST(EngineTest, RowsOfManySequencesInOneCall) {
  TestEngine engine;
  std::vector<Handle> handles;
  std::vector<Words> words;
  AttendStep step(engine.model(), 0);
  for (uint32_t i = 0; i < 5; ++i) {
    handles.push_back(engine.NewSequence());
    words.push_back(Counting(1000 * i, 30 + 17 * i));
    engine.Fill(handles[i], 0, Words(words[i].begin(), words[i].end() - 2));
    step.Add(handles[i], static_cast<uint32_t>(words[i].size()) - 2,
             Words(words[i].end() - 2, words[i].end()));
  }
  ASSERT_TRUE(step.Run(engine.get()).ok());
  ExpectOk(step);
  for (uint32_t i = 0; i < 5; ++i) {
    const auto length = static_cast<uint32_t>(words[i].size());
    ExpectDense(step, 2 * i, engine.model(), words[i], length - 2);
    ExpectDense(step, 2 * i + 1, engine.model(), words[i], length - 1);
  }
  EXPECT_EQ(engine.get()->Stats().attend.attend_rows, 5U);
}

TEST(EngineTest, ARowAttendsItsOwnPastEvenIfMoreIsStored) {
  TestEngine engine;
  const Handle handle = engine.NewSequence();
  const Words words = Counting(0, 200);
  engine.Fill(handle, 0, words);
  for (const uint32_t position : {0U, 1U, 63U, 64U, 100U, 127U, 199U}) {
    AttendStep step(engine.model(), 0);
    step.Add(handle, position, {words[position]}).OnlyRead();
    ASSERT_TRUE(step.Run(engine.get()).ok());
    ExpectOk(step);
    EXPECT_EQ(step.result(0).attended_length, position + 1);
    ExpectDense(step, 0, engine.model(), words, position);
  }
}

TEST(EngineTest, RepeatingAStepStoresNothingTwice) {
  TestEngine engine;
  const Handle handle = engine.NewSequence();
  const Words words = Counting(0, 65);
  engine.Fill(handle, 0, Words(words.begin(), words.end() - 1));
  for (int i = 0; i < 3; ++i) {
    AttendStep step(engine.model(), 0);
    step.Add(handle, 64, {words[64]});
    ASSERT_TRUE(step.Run(engine.get()).ok());
    ExpectOk(step);
    ExpectDense(step, 0, engine.model(), words, 64);
  }
  EXPECT_EQ(engine.Get(handle)->length_max, 65U);
  const auto again = engine.Append(handle, 0, 0, words);
  ASSERT_TRUE(again.ok());
  EXPECT_TRUE(again->duplicate);
  EXPECT_EQ(again->layer_length, 65U);
}

TEST(EngineTest, WaitingCallsOfOneLayerBecomeOneBatch) {
  auto device = Watched();
  Gate gate(device.get());
  TestEngine engine(TestEngine::SmallOptions(), 2, std::move(device));
  std::vector<Handle> handles;
  for (int i = 0; i < 6; ++i) {
    handles.push_back(engine.NewSequence());
    engine.Fill(handles.back(), 0, Counting(0, 10));
  }
  std::vector<std::unique_ptr<AttendStep>> steps;
  const auto start = [&](uint32_t layer, const Handle& handle, uint32_t position) {
    steps.push_back(std::make_unique<AttendStep>(engine.model(), layer));
    steps.back()->Add(handle, position, {position});
    steps.back()->Start(engine.get());
  };
  start(0, handles[0], 10);
  gate.AwaitFirst();
  for (int i = 1; i < 6; ++i) start(0, handles[i], 10);  // one batch of 5
  start(1, handles[0], 10);                              // another layer: another batch
  start(0, handles[1], 11);  // the same sequence again: after the batch of 5
  gate.Open();
  for (const auto& step : steps) {
    ASSERT_TRUE(step->Wait().ok());
    ExpectOk(*step);
    ExpectDense(*step, 0, engine.model(), Counting(0, 20), step->call.rows[0].position);
  }
  EXPECT_EQ(gate.batches(), (std::vector<size_t>{1, 5, 1, 1}));
  std::set<uint64_t> numbers;
  for (const auto& step : steps) numbers.insert(step->call.call_number);
  EXPECT_EQ(numbers.size(), steps.size()) << "call numbers are never used twice";
}

TEST(EngineTest, RowsOfDifferentModelsNeverShareABatch) {
  auto device = Watched();
  Gate gate(device.get());
  TestEngine engine(TestEngine::SmallOptions(), 2, std::move(device));
  ModelSpec other = engine.model();
  other.name = "other";
  other.scale = 0.25F;
  ASSERT_TRUE(engine.get()->RegisterModel(other).ok());
  CreateOptions options;
  options.model = "other";
  const auto created = engine.Create(options);
  const Handle theirs{.id = created->id, .generation = created->generation};
  const Handle ours = engine.NewSequence();
  AttendStep first(engine.model(), 0);
  first.Add(ours, 0, {1}).Start(engine.get());
  gate.AwaitFirst();
  AttendStep second(engine.model(), 0);
  second.Add(ours, 1, {2}).Start(engine.get());
  AttendStep third(other, 0);
  third.Add(theirs, 0, {1}).Start(engine.get());
  gate.Open();
  for (AttendStep* step : {&first, &second, &third}) {
    ASSERT_TRUE(step->Wait().ok());
    ExpectOk(*step);
  }
  EXPECT_EQ(gate.batches(), (std::vector<size_t>{1, 1, 1}));
  ExpectDense(second, 0, engine.model(), {1, 2}, 1);
  ExpectDense(third, 0, other, {1}, 0);
}

TEST(EngineTest, TheQueueIsBounded) {
  auto device = Watched();
  Gate gate(device.get());
  EngineOptions options = TestEngine::SmallOptions();
  options.queue_calls_max = 3;
  TestEngine engine(options, 2, std::move(device));
  const Handle handle = engine.NewSequence();
  std::vector<std::unique_ptr<AttendStep>> steps;
  for (uint32_t i = 0; i < 6; ++i) {
    steps.push_back(std::make_unique<AttendStep>(engine.model(), 0));
    steps.back()->Add(handle, i, {i}).Start(engine.get());
    if (i == 0) gate.AwaitFirst();
  }
  EXPECT_EQ(engine.get()->Stats().queue_calls, 3U);
  // The first runs, three wait, two were refused at once; so is any other call.
  for (const size_t i : {4, 5}) {
    EXPECT_EQ(ErrorLine(steps[i]->Wait()), "RESOURCE_EXHAUSTED OVERLOADED");
  }
  EXPECT_EQ(ErrorLine(engine.Get(handle).status()), "RESOURCE_EXHAUSTED OVERLOADED");
  EXPECT_EQ(ErrorLine(engine.Append(handle, 1, 0, {1}).status()), "RESOURCE_EXHAUSTED OVERLOADED");
  gate.Open();
  for (const size_t i : {0, 1, 2, 3}) {
    EXPECT_TRUE(steps[i]->Wait().ok());
    ExpectOk(*steps[i]);
  }
  EXPECT_EQ(engine.get()->Stats().calls_shed_total, 4U);
  EXPECT_EQ(engine.Get(handle)->length_max, 4U) << "refused calls changed nothing";
}

TEST(EngineTest, DrainFinishesWhatWaitsAndRefusesTheRest) {
  auto device = Watched();
  Gate gate(device.get());
  TestEngine engine(TestEngine::SmallOptions(), 2, std::move(device));
  const Handle handle = engine.NewSequence();
  AttendStep first(engine.model(), 0);
  first.Add(handle, 0, {0}).Start(engine.get());
  gate.AwaitFirst();
  AttendStep second(engine.model(), 0);
  second.Add(handle, 1, {1}).Start(engine.get());
  std::thread drain([&] { engine.get()->Drain(); });
  // Drain closes the queue before it waits: from then on calls are refused at once.
  while (engine.get()->RegisterModel(engine.model()).ok()) std::this_thread::yield();
  EXPECT_EQ(ErrorLine(engine.Get(handle).status()), "UNAVAILABLE DRAINING");
  AttendStep late(engine.model(), 0);
  late.Add(handle, 2, {2});
  EXPECT_EQ(ErrorLine(late.Run(engine.get())), "UNAVAILABLE DRAINING");
  EXPECT_EQ(ErrorLine(engine.Append(handle, 0, 0, {0}).status()), "UNAVAILABLE DRAINING");
  gate.Open();
  drain.join();
  EXPECT_TRUE(first.Wait().ok());
  EXPECT_TRUE(second.Wait().ok());
  ExpectDense(second, 0, engine.model(), {0, 1}, 1);
  engine.get()->Drain();
}

TEST(EngineTest, ForksAreIndependentCopies) {
  TestEngine engine;
  const Handle parent = engine.NewSequence();
  engine.Fill(parent, 0, Counting(0, 100));
  const auto fork = engine.Fork(parent, 80);
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_EQ(fork->length, 80U);
  EXPECT_NE(fork->id, parent.id);
  const Handle child{.id = fork->id, .generation = fork->generation};
  engine.Fill(child, 80, Counting(5000, 10));
  ASSERT_TRUE(engine.Drop(parent).ok());
  AttendStep step(engine.model(), 1);
  step.Add(child, 90, {6000});
  ASSERT_TRUE(step.Run(engine.get()).ok());
  ExpectOk(step);
  Words words = Counting(0, 80);
  for (const uint32_t word : Counting(5000, 10)) words.push_back(word);
  words.push_back(6000);
  ExpectDense(step, 0, engine.model(), words, 90);
}

TEST(EngineTest, TruncateRaisesTheGeneration) {
  TestEngine engine;
  Handle handle = engine.NewSequence();
  engine.Fill(handle, 0, Counting(0, 100));
  const auto cut = engine.Truncate(handle, 70);
  ASSERT_TRUE(cut.ok());
  EXPECT_EQ(cut->generation, 2U);
  EXPECT_EQ(cut->length, 70U);
  EXPECT_EQ(ErrorLine(engine.Append(handle, 0, 70, {1}).status()),
            "FAILED_PRECONDITION GENERATION_MISMATCH handle.generation");
  handle.generation = 2;
  engine.Fill(handle, 70, Counting(900, 5));
  AttendStep step(engine.model(), 0);
  step.Add(handle, 74, {904}).OnlyRead();
  ASSERT_TRUE(step.Run(engine.get()).ok());
  Words words = Counting(0, 70);
  for (const uint32_t word : Counting(900, 5)) words.push_back(word);
  ExpectDense(step, 0, engine.model(), words, 74);
}

TEST(EngineTest, ARequestIdMakesCreateRepeatable) {
  TestEngine engine;
  CreateOptions options;
  options.model = kModel;
  options.request_id = "job-17";
  const auto first = engine.Create(options);
  const auto again = engine.Create(options);
  ASSERT_TRUE(first.ok() && again.ok());
  EXPECT_EQ(first->id, again->id);
  EXPECT_NE(engine.Create(options, "other")->id, first->id) << "request ids belong to a tenant";
  options.policy = DefaultPolicy(SelectorKind::kCpe);
  EXPECT_EQ(ErrorLine(engine.Create(options).status()),
            "INVALID_ARGUMENT REQUEST_ID_REUSED request_id");
  options.policy.reset();
  ASSERT_TRUE(engine.Drop({.id = first->id}).ok());
  EXPECT_NE(engine.Create(options)->id, first->id) << "the name is free again";
}

TEST(EngineTest, LeasesEndOnTheSteadyClock) {
  EngineOptions options = TestEngine::SmallOptions();
  options.lease_default_ms = 1000;
  options.lease_max_ms = 5000;
  TestEngine engine(options);
  const Handle used = engine.NewSequence();
  const Handle idle = engine.NewSequence();
  engine.Fill(used, 0, Counting(0, 10));
  engine.Fill(idle, 0, Counting(0, 10));
  EXPECT_EQ(engine.Get(used)->lease_remaining_ms, 1000U);
  engine.clock.AdvanceMs(999);
  EXPECT_EQ(engine.List("").size(), 2U) << "looking at all sequences renews none";
  AttendStep step(engine.model(), 0);
  step.Add(used, 10, {10});
  ASSERT_TRUE(step.Run(engine.get()).ok());
  engine.clock.AdvanceMs(1);
  EXPECT_EQ(ErrorLine(engine.Get(idle).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
  EXPECT_EQ(engine.Get(used)->lease_remaining_ms, 1000U) << "any call renews";
  EXPECT_EQ(engine.get()->Stats().sequences, 1U);
  EXPECT_EQ(engine.get()->Stats().blocks_used, 1U);
  EXPECT_EQ(engine.get()->Stats().leases_expired_total, 1U);

  EXPECT_EQ(engine.RenewLease(used, 60000)->lease_remaining_ms, 5000U) << "capped";
  engine.clock.AdvanceMs(4999);
  EXPECT_EQ(engine.RenewLease(used, 10)->lease_remaining_ms, 10U);
  engine.clock.AdvanceMs(10);
  EXPECT_EQ(ErrorLine(engine.RenewLease(used, 10).status()), "NOT_FOUND SEQUENCE_NOT_FOUND");
  EXPECT_EQ(engine.List("").size(), 0U);
  EXPECT_EQ(engine.get()->Stats().blocks_used, 0U);
}

TEST(EngineTest, ManyLeasesAreSweptInBoundedSteps) {
  EngineOptions options = TestEngine::SmallOptions();
  options.lease_default_ms = 1000;
  options.sequences_per_tenant_max = 64;
  TestEngine engine(options);
  for (int i = 0; i < 64; ++i) engine.Fill(engine.NewSequence(), 0, {1});
  EXPECT_EQ(engine.get()->Stats().blocks_used, 64U);
  engine.clock.AdvanceMs(1000);
  int calls = 0;
  while (engine.get()->Stats().sequences > 0) {
    EXPECT_EQ(engine.List("").size(), 0U);
    ASSERT_LT(++calls, 10);
  }
  EXPECT_GT(calls, 1);
  EXPECT_EQ(engine.get()->Stats().blocks_used, 0U);
  EXPECT_EQ(engine.get()->Stats().leases_expired_total, 64U);
}

TEST(EngineTest, ListIsOrderedPagedAndPerTenant) {
  TestEngine engine;
  for (int i = 0; i < 7; ++i) {
    CreateOptions options;
    options.model = kModel;
    ASSERT_TRUE(engine.Create(options, i % 2 == 0 ? "even" : "odd").ok());
  }
  EXPECT_EQ(engine.List("even").size(), 4U);
  EXPECT_EQ(engine.List("odd").size(), 3U);
  EXPECT_EQ(engine.List("nobody").size(), 0U);
  std::vector<SequenceId> ids;
  SequenceId after;
  while (true) {
    const auto page = engine.List("", after, 2);
    if (page.empty()) break;
    EXPECT_LE(page.size(), 2U);
    for (const SequenceInfo& info : page) ids.push_back(info.id);
    after = ids.back();
  }
  EXPECT_EQ(ids.size(), 7U);
  EXPECT_TRUE(std::is_sorted(ids.begin(), ids.end(),
                             [](const auto& a, const auto& b) { return a.bytes < b.bytes; }));
}

// Exact share of the softmax mass that `selected` leaves out.
double TrueDroppedMass(const std::vector<double>& logits, const std::vector<uint32_t>& selected) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double all = 0.0;
  for (const double logit : logits) all += std::exp(logit - top);
  double kept = 0.0;
  for (const uint32_t token : selected) kept += std::exp(logits[token] - top);
  return std::max(0.0, (all - kept) / all);
}

// Runs a few steps on all layers under a policy, and checks every bound against the truth.
void DecodeUnder(TestEngine* engine, const Handle& handle, const Policy& policy, uint32_t begin,
                 uint32_t end, std::vector<AttendRowResult>* results) {
  const Words words = Counting(0, end);
  for (uint32_t position = begin; position < end; ++position) {
    for (uint32_t layer = 0; layer < engine->model().layer_count; ++layer) {
      AttendStep step(engine->model(), layer);
      step.Add(handle, position, {words[position]});
      step.call.policy = &policy;
      step.call.want_selected = true;
      ASSERT_TRUE(step.Run(engine->get()).ok());
      ExpectOk(step);
      const AttendRowResult& result = step.result(0);
      const DenseAnswer dense = AttendDensely(ShapeOf(engine->model()), layer, words, position);
      for (uint32_t head = 0; head < 4; ++head) {
        const double truth = TrueDroppedMass(dense.logits[head], result.selected[head / 2]);
        // The truth itself is only good to the rounding of its own double arithmetic.
        EXPECT_GE(result.certificates[head].dropped_mass_upper.value, truth * (1 - 1e-12) - 1e-15);
      }
      if (results != nullptr) results->push_back(result);
    }
  }
}

TEST(EngineSelectorTest, EverySelectorAnswersAndItsBoundsHold) {
  for (const SelectorKind kind :
       {SelectorKind::kAuto, SelectorKind::kDense, SelectorKind::kCis, SelectorKind::kPsaw,
        SelectorKind::kEtf, SelectorKind::kCpe, SelectorKind::kCertified, SelectorKind::kScan}) {
    for (const Mode mode : {Mode::kEnforce, Mode::kShadow}) {
      TestEngine engine(TestEngine::SmallOptions(), 4);
      const Handle handle = engine.NewSequence();
      engine.Fill(handle, 0, Counting(0, 250));
      Policy policy = Scanning(kind);
      policy.psaw.phi = 0.7F;
      policy.etf.psi = 0.7F;
      policy.mode = mode;
      std::vector<AttendRowResult> results;
      DecodeUnder(&engine, handle, policy, 250, 260, &results);
      for (const AttendRowResult& result : results) {
        EXPECT_EQ(result.selector, kind == SelectorKind::kAuto ? SelectorKind::kCertified : kind);
      }
      const AttendStats stats = engine.get()->Stats().attend;
      EXPECT_EQ(stats.attend_rows, 40U);
      EXPECT_EQ(stats.groups, 80U);
      EXPECT_EQ(stats.certificates, 160U);
      const bool reads_all = kind == SelectorKind::kDense || mode == Mode::kShadow;
      EXPECT_EQ(stats.tokens_read == stats.tokens_visible, reads_all) << static_cast<int>(kind);
    }
  }
}

// Without a proof the limit is on what the scan estimates. The certificate's estimate knows the
// kept keys and lies around it.
TEST(EngineSelectorTest, ScanKeepsTheSmallestSetForAnEstimatedMass) {
  uint64_t read_before = 0;
  for (const float mass : {0.2F, 0.05F, 0.01F}) {
    TestEngine engine(TestEngine::SmallOptions(), 1);
    const Handle handle = engine.NewSequence();
    engine.Fill(handle, 0, Counting(0, 500));
    Policy policy = Scanning(SelectorKind::kScan);
    policy.budget = {.sink = 4, .local = 16, .top_k = 0, .mass = mass};
    std::vector<AttendRowResult> results;
    DecodeUnder(&engine, handle, policy, 500, 510, &results);
    uint64_t read = 0;
    double sum = 0.0;
    float largest = 0.0F;
    for (const AttendRowResult& result : results) {
      for (const HeadCertificate& head : result.certificates) {
        EXPECT_EQ(head.level, Level::kNone);
        sum += head.dropped_mass_estimate;
        largest = std::max(largest, head.dropped_mass_estimate);
      }
      for (const GroupReport& group : result.groups) {
        EXPECT_TRUE(group.scanned);
        read += group.tokens_read;
      }
    }
    EXPECT_LE(sum / 40, mass) << "of 10 steps and 4 heads";
    EXPECT_GT(largest, mass / 2) << "more was kept than the limit needs";
    EXPECT_LT(largest, 2 * mass);
    EXPECT_GT(read, read_before) << "a lower limit needs more tokens";
    read_before = read;
  }
}

// Statements of theory stand beside the certificates, with the numbers they are made of, and only
// where something of the kind was done.
TEST(EngineSelectorTest, AssumedStatementsStandBesideCertificates) {
  TestEngine engine(TestEngine::SmallOptions(), 2);
  const Handle handle = engine.NewSequence();
  engine.Fill(handle, 0, Counting(0, 500));
  Policy policy = Scanning(SelectorKind::kCpe);
  policy.cis.min_cosine = -1.0F;
  policy.cis.max_dropped_mass_estimate = 0.0F;
  policy.layers = {{.layer_begin = 1,
                    .layer_end = 2,
                    .hidden_share = 0.25F,
                    .frozen_share = 0.5F,
                    .psaw_decay_scale = 1.0F,
                    .psaw_decay_rate = 0.01F,
                    .etf_logit_drift = 0.1F}};
  std::vector<AttendRowResult> results;
  DecodeUnder(&engine, handle, policy, 500, 502, &results);
  ASSERT_EQ(results.size(), 4U);
  for (size_t i = 0; i < results.size(); ++i) {
    const bool calibrated = i % 2 == 1;
    const size_t step = i / 2;
    const double length = 501.0 + static_cast<double>(step);
    ASSERT_EQ(results[i].assumed.size(), 2U);
    for (size_t head = 0; head < 2; ++head) {
      const AssumedMasses& assumed = results[i].assumed[head];
      const GroupReport& group = results[i].groups[head];
      if (i < 2) {
        EXPECT_LT(assumed.cis_excess, 0.0F) << "the first steps scan";
      } else {
        ASSERT_EQ(group.action, Action::kReused);
        EXPECT_GT(group.query_distance, 0.0F);
        EXPECT_EQ(assumed.cis_excess,
                  static_cast<float>(AssumedSharingExcess(group.key_norm_max, group.query_distance,
                                                          engine.model().scale)));
      }
      const double visible = length - std::floor(length / 4);
      EXPECT_NEAR(assumed.psaw_dropped, calibrated ? std::exp(-0.01 * visible) : -1.0, 1e-6);
      EXPECT_NEAR(assumed.etf_excess, calibrated ? 2 * std::tanh(0.05) : -1.0, 1e-6);
    }
  }
  // Answered densely nothing is dropped; in shadow mode the selection is what is spoken of.
  policy.guarantee = Guarantee::kDeterministic;
  policy.max_dropped_mass = 1e-9F;
  for (const Mode mode : {Mode::kEnforce, Mode::kShadow}) {
    policy.mode = mode;
    results.clear();
    DecodeUnder(&engine, handle, policy, mode == Mode::kEnforce ? 502 : 503,
                mode == Mode::kEnforce ? 503 : 504, &results);
    EXPECT_EQ(results[1].groups[0].action, Action::kDense);
    EXPECT_EQ(results[1].assumed[0].psaw_dropped < 0.0F, mode == Mode::kEnforce);
  }
}

TEST(EngineSelectorTest, CertifiedMeetsItsLimitOnEveryHead) {
  TestEngine engine(TestEngine::SmallOptions(), 2);
  const Handle handle = engine.NewSequence();
  engine.Fill(handle, 0, Counting(0, 300));
  Policy policy = Scanning(SelectorKind::kCertified);
  std::vector<AttendRowResult> results;
  DecodeUnder(&engine, handle, policy, 300, 310, &results);
  for (const AttendRowResult& result : results) {
    for (const HeadCertificate& certificate : result.certificates) {
      EXPECT_TRUE(certificate.met);
      EXPECT_LE(certificate.dropped_mass_upper.value, 0.05);
      EXPECT_GE(certificate.level, Level::kConfidence);
    }
  }
  const auto info = engine.Get(handle);
  EXPECT_EQ(info->stats.certificates_proven, info->stats.certificates);
  EXPECT_LE(info->stats.dropped_mass_upper_max, 0.05);
}

TEST(EngineSelectorTest, AViolationMayFailTheRowAndWhatWasStoredStays) {
  TestEngine engine;
  const Handle handle = engine.NewSequence();
  engine.Fill(handle, 0, Counting(0, 300));
  Policy policy = Scanning(SelectorKind::kCis);
  policy.budget.top_k = 1;
  policy.guarantee = Guarantee::kDeterministic;
  policy.max_dropped_mass = 1e-6F;
  policy.on_violation = OnViolation::kFail;
  for (int i = 0; i < 2; ++i) {
    AttendStep step(engine.model(), 0);
    step.Add(handle, 300, {300});
    step.call.policy = &policy;
    ASSERT_TRUE(step.Run(engine.get()).ok()) << "the call itself ran";
    EXPECT_EQ(ErrorLine(step.result(0).status), "FAILED_PRECONDITION BOUND_NOT_MET rows[0]");
    EXPECT_EQ(step.result(0).certificates.size(), 0U);
    for (const float x : step.call.out) EXPECT_EQ(x, 0.0F);
    for (const float x : step.call.lse) EXPECT_EQ(x, 0.0F);
    EXPECT_EQ(engine.Get(handle)->length_max, 301U);
  }
  EXPECT_EQ(engine.get()->Stats().attend.attend_rows, 0U);
}

TEST(EngineSelectorTest, GivenPositionsAreAttendedPerKvHead) {
  TestEngine engine;
  const Handle handle = engine.NewSequence();
  const Words words = Counting(0, 201);
  engine.Fill(handle, 0, Words(words.begin(), words.begin() + 200));
  const std::vector<uint32_t> positions = {20, 30, 40, 33};
  const std::vector<uint32_t> offsets = {0, 3, 4};
  Policy policy = Scanning(SelectorKind::kGiven);
  policy.budget = {.sink = 0, .local = 0, .top_k = 0};
  AttendStep step(engine.model(), 0);
  step.Add(handle, 200, {words[200]});
  step.call.rows[0].given = positions;
  step.call.rows[0].given_offsets = offsets;
  step.call.rows[0].policy = &policy;
  step.call.want_selected = true;
  ASSERT_TRUE(step.Run(engine.get()).ok());
  ExpectOk(step);
  EXPECT_EQ(step.result(0).selector, SelectorKind::kGiven);
  // The open block (192 to 200) and the sinks of the sketch are always read.
  for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
    std::set<uint32_t> expected = {0, 1, 2, 3, 4, 5, 6, 7};
    for (uint32_t token = 192; token <= 200; ++token) expected.insert(token);
    expected.insert(positions.begin() + offsets[kv_head], positions.begin() + offsets[kv_head + 1]);
    EXPECT_EQ(step.result(0).selected[kv_head],
              std::vector<uint32_t>(expected.begin(), expected.end()));
  }
}

TEST(EngineSelectorTest, EtfTakesTheNearestShallowerListOfTheSameStep) {
  std::vector<std::pair<const TokenLists*, const TokenLists*>> seen;
  auto device = Watched();
  device->set_before([&](const LayerShape&, absl::Span<AttendRow> rows) {
    seen.emplace_back(rows[0].plan.lists, rows[0].plan.frozen_lists);
  });
  TestEngine engine(TestEngine::SmallOptions(), 4, std::move(device));
  const Handle handle = engine.NewSequence();
  engine.Fill(handle, 0, Counting(0, 250));
  Policy policy = Scanning(SelectorKind::kCpe);
  policy.etf = {.first_layer = 0, .psi = 0.5F};
  policy.layers = {{.layer_begin = 2, .layer_end = 3, .selector = SelectorKind::kDense}};
  DecodeUnder(&engine, handle, policy, 250, 252, nullptr);
  ASSERT_EQ(seen.size(), 8U);
  for (const size_t step : {0, 4}) {
    EXPECT_EQ(seen[step].second, nullptr) << "there is nothing above layer 0";
    EXPECT_EQ(seen[step + 1].second, seen[step].first);
    EXPECT_EQ(seen[step + 2].first, nullptr) << "dense layers remember nothing";
    EXPECT_EQ(seen[step + 3].second, seen[step + 1].first) << "the dense layer is passed over";
  }
  EXPECT_EQ(seen[0].first, seen[4].first) << "lists live on from step to step";

  // Layer 3 alone, one token on: no other layer has chosen for this length yet.
  AttendStep step(engine.model(), 3);
  step.Add(handle, 252, {252});
  step.call.policy = &policy;
  ASSERT_TRUE(step.Run(engine.get()).ok());
  EXPECT_EQ(seen.back().second, nullptr);
}

TEST(EngineSelectorTest, CisReusesAcrossStepsAndInBlocksForgets) {
  for (const uint32_t block_steps : {0U, 4U}) {
    TestEngine engine;
    const Handle handle = engine.NewSequence();
    engine.Fill(handle, 0, Counting(0, 256));
    Policy policy = Scanning(SelectorKind::kCis);
    policy.cis.min_cosine = -1.0F;  // Any anchor will do.
    policy.cis.max_dropped_mass_estimate = 0.0F;
    policy.cis.block_steps = block_steps;
    std::vector<AttendRowResult> results;
    DecodeUnder(&engine, handle, policy, 256, 264, &results);
    for (size_t i = 0; i < results.size(); ++i) {
      const size_t step = i / 2;
      const bool scans = block_steps == 0 ? step == 0 : step % 4 == 0;
      EXPECT_EQ(results[i].groups[0].scanned, scans) << step;
      EXPECT_EQ(results[i].groups[0].action, scans ? Action::kSelected : Action::kReused);
    }
  }
}

TEST(EngineSelectorTest, ListsAreBounded) {
  EngineOptions options = TestEngine::SmallOptions();
  options.list_bytes_per_sequence_max = 8192;
  TestEngine engine(options);
  const Handle handle = engine.NewSequence();
  engine.Fill(handle, 0, Counting(0, 256));
  const size_t blocks_bytes = 5 * BlockBytes(engine.model());
  Policy policy = Scanning(SelectorKind::kCis);
  policy.cis.min_cosine = 1.0F;  // Every step becomes an anchor, of a list alone.
  policy.cis.max_dropped_mass_estimate = 0.0F;
  size_t most = 0;
  bool dropped = false;
  for (uint32_t position = 256; position < 280; ++position) {
    DecodeUnder(&engine, handle, policy, position, position + 1, nullptr);
    const size_t list_bytes = engine.Get(handle)->bytes - blocks_bytes;
    EXPECT_LE(list_bytes, options.list_bytes_per_sequence_max);
    dropped = dropped || list_bytes < most;
    most = std::max(most, list_bytes);
  }
  EXPECT_GT(most, 0U);
  EXPECT_TRUE(dropped) << "the bound was reached";
}

TEST(EngineSelectorTest, WindowedLayersAreDenseOverTheirWindow) {
  TestEngine engine;
  ModelSpec windowed = engine.model();
  windowed.name = "windowed";
  windowed.sliding_windows = {32, 0};
  windowed.default_policy = Scanning(SelectorKind::kCertified);
  ASSERT_TRUE(engine.get()->RegisterModel(windowed).ok());
  CreateOptions options;
  options.model = "windowed";
  const auto info = engine.Create(options);
  const Handle handle{.id = info->id, .generation = info->generation};
  const Words words = Counting(0, 200);
  engine.Fill(handle, 0, words);
  AttendStep step(windowed, 0);
  step.Add(handle, 199, {199});
  ASSERT_TRUE(step.Run(engine.get()).ok());
  ExpectOk(step);
  EXPECT_EQ(step.result(0).selector, SelectorKind::kDense);
  LayerShape shape = ShapeOf(windowed);
  shape.sliding_window = 32;
  EXPECT_LT(NormalizedSquaredError(step.Out(0), AttendDensely(shape, 0, words, 199).out), 1e-12);
  EXPECT_EQ(engine.get()->Stats().attend.tokens_visible, 2U * 32U);
}

TEST(EngineTest, CallersOnManyThreadsGetTheirOwnAnswers) {
  TestEngine engine;
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&engine, t] {
      const Handle handle = engine.NewSequence();
      const Words words = Counting(10000 * t, 40);
      for (uint32_t position = 0; position < words.size(); ++position) {
        for (uint32_t layer = 0; layer < 2; ++layer) {
          AttendStep step(engine.model(), layer);
          step.Add(handle, position, {words[position]});
          ASSERT_TRUE(step.Run(engine.get()).ok());
          ExpectOk(step);
          ExpectDense(step, 0, engine.model(), words, position);
        }
      }
      EXPECT_EQ(engine.Get(handle)->length, 40U);
      EXPECT_TRUE(engine.Drop(handle).ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(engine.get()->Stats().blocks_used, 0U);
  EXPECT_EQ(engine.get()->Stats().attend.attend_rows, 320U);
}

}  // namespace
}  // namespace kvservice::testing
