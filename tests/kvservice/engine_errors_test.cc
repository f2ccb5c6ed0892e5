// Everything a caller can get wrong: which error it is, which field is to blame, and that nothing
// changed.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kvservice/error.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kStored = 70;

// What may not change when a call fails.
struct State {
  std::vector<std::vector<uint64_t>> sequences;
  size_t pool_bytes_used = 0;
  uint64_t blocks_used = 0;
  uint64_t attend_rows = 0;
  friend bool operator==(const State&, const State&) = default;
};

State StateOf(TestEngine* engine) {
  State state;
  for (const SequenceInfo& info : engine->List("")) {
    state.sequences.push_back({info.generation, info.length, info.length_max, info.block_count,
                               info.bytes, info.stats.attend_rows});
  }
  const EngineStats stats = engine->get()->Stats();
  state.pool_bytes_used = stats.pool_bytes_used;
  state.blocks_used = stats.blocks_used;
  state.attend_rows = stats.attend.attend_rows;
  return state;
}

class EngineErrorsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    handle_ = engine_.NewSequence();
    engine_.Fill(handle_, 0, Counting(0, kStored));
    ModelSpec other = engine_.model();
    other.name = "other";
    ASSERT_TRUE(engine_.get()->RegisterModel(other).ok());
    CreateOptions options;
    options.model = "other";
    other_model_ = {.id = engine_.Create(options)->id};
    options.model = kModel;
    foreign_ = {.id = engine_.Create(options, "someone else")->id};
  }

  TestEngine engine_;
  Handle handle_;
  Handle foreign_;
  Handle other_model_;
};

struct BadStep {
  std::string error;
  std::function<void(AttendStep*)> spoil;
};

std::string Field(const std::string& error) { return error.substr(error.rfind(' ') + 1); }

template <typename Element>
void Store(std::vector<std::byte>* bytes, size_t index, Element element) {
  std::memcpy(bytes->data() + index * sizeof(Element), &element, sizeof(Element));
}

TEST_F(EngineErrorsTest, CallsThatCannotRunAtAll) {
  static const std::vector<std::byte> kMemory(1 << 16);
  Policy bad_policy;
  bad_policy.cis.min_cosine = 3.0F;
  const std::vector<BadStep> table = {
      {"INVALID_ARGUMENT ROW_COUNT_OUT_OF_RANGE rows", [](auto* s) { s->call.rows.clear(); }},
      {"INVALID_ARGUMENT ROW_COUNT_OUT_OF_RANGE rows", [](auto* s) { s->call.rows.resize(9); }},
      {"INVALID_ARGUMENT LAYER_OUT_OF_RANGE layer", [](auto* s) { s->call.layer = 2; }},
      {"INVALID_ARGUMENT LAYER_OUT_OF_RANGE layer", [](auto* s) { s->call.layer = UINT32_MAX; }},
      {"INVALID_ARGUMENT TENSOR_DTYPE_MISMATCH q",
       [](auto* s) { s->call.q.dtype = static_cast<DType>(3); }},
      {"INVALID_ARGUMENT TENSOR_DTYPE_MISMATCH k",
       [](auto* s) { s->call.k->dtype = DType::kFloat16; }},
      {"INVALID_ARGUMENT TENSOR_DTYPE_MISMATCH v",
       [](auto* s) { s->call.v->dtype = DType::kFloat32; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q", [](auto* s) { s->q_shape[0] = 2; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q", [](auto* s) { s->q_shape[0] = -1; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q", [](auto* s) { s->q_shape[1] = 2; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q", [](auto* s) { s->q_shape[2] = 1L << 32; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q",
       [](auto* s) { s->call.q.shape = s->call.q.shape.first(2); }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH k", [](auto* s) { s->k_shape[1] = 4; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH v", [](auto* s) { s->v_shape[0] = 0; }},
      {"INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q",
       [](auto* s) { s->call.q.bytes.remove_suffix(1); }},
      {"INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q", [](auto* s) { s->call.q.bytes = kMemory; }},
      {"INVALID_ARGUMENT TENSOR_SIZE_MISMATCH k", [](auto* s) { s->call.k->bytes = {}; }},
      {"INVALID_ARGUMENT TENSOR_SIZE_MISMATCH v", [](auto* s) { s->call.v->bytes = kMemory; }},
      {"INVALID_ARGUMENT TENSOR_MISSING v", [](auto* s) { s->call.v.reset(); }},
      {"INVALID_ARGUMENT TENSOR_MISSING k", [](auto* s) { s->call.k.reset(); }},
      {"INVALID_ARGUMENT POLICY_INVALID policy.cis.min_cosine",
       [&](auto* s) { s->call.policy = &bad_policy; }},
  };
  for (const BadStep& bad : table) {
    const State before = StateOf(&engine_);
    AttendStep step(engine_.model(), 0);
    step.Add(handle_, kStored, {kStored}).Build();
    bad.spoil(&step);
    const absl::Status status = step.Run(engine_.get());
    EXPECT_EQ(ErrorLine(status), bad.error) << status;
    EXPECT_EQ(DetailsOf(status).field, Field(bad.error));
    EXPECT_EQ(StateOf(&engine_), before) << bad.error;
  }
}

// The second row of the call is always good and must run.
TEST_F(EngineErrorsTest, RowsFailAlone) {
  const Handle good = engine_.NewSequence();
  engine_.Fill(good, 0, Counting(0, 20));
  Policy bad_policy;
  bad_policy.psaw.phi = 0.0F;
  Policy given = DefaultPolicy(SelectorKind::kGiven);
  given.layers.clear();
  const std::vector<uint32_t> none;
  const std::vector<uint32_t> positions = {1, 5, 5, kStored + 1};
  const std::vector<uint32_t> two = {0, 4};
  const std::vector<uint32_t> short_offsets = {0, 1, 2};
  const std::vector<uint32_t> falling = {0, 9, 4};
  const std::vector<uint32_t> repeated = {0, 3, 4};
  const std::vector<uint32_t> late = {0, 2, 4};
  const auto give = [&](AttendStep* s, const std::vector<uint32_t>& offsets) {
    s->call.rows[0].policy = &given;
    s->call.rows[0].given = positions;
    s->call.rows[0].given_offsets = offsets;
  };
  const std::vector<BadStep> table = {
      {"NOT_FOUND SEQUENCE_NOT_FOUND", [](auto* s) { s->call.rows[0].id = {}; }},
      {"NOT_FOUND SEQUENCE_NOT_FOUND", [&](auto* s) { s->call.rows[0].id = foreign_.id; }},
      {"FAILED_PRECONDITION GENERATION_MISMATCH rows[0].handle.generation",
       [](auto* s) { s->call.rows[0].generation = 0; }},
      {"FAILED_PRECONDITION GENERATION_MISMATCH rows[0].handle.generation",
       [](auto* s) { s->call.rows[0].generation = 2; }},
      {"OUT_OF_RANGE POSITION_GAP rows[0].position",
       [](auto* s) { s->call.rows[0].position = kStored + 1; }},
      {"OUT_OF_RANGE POSITION_GAP rows[0].position",
       [](auto* s) { s->call.rows[0].position = UINT32_MAX; }},
      {"FAILED_PRECONDITION APPEND_CONFLICT rows[0].position",
       [](auto* s) { s->call.rows[0].position = kStored - 1; }},
      {"FAILED_PRECONDITION APPEND_CONFLICT rows[0].position",
       [](auto* s) { s->call.rows[0].position = 0; }},
      {"INVALID_ARGUMENT TENSOR_NOT_FINITE q",
       [](auto* s) { Store<float>(&s->q, 255, std::nanf("")); }},
      {"INVALID_ARGUMENT TENSOR_NOT_FINITE k",
       [](auto* s) { Store<uint16_t>(&s->k, 127, 0x7f80); }},
      {"INVALID_ARGUMENT TENSOR_NOT_FINITE v", [](auto* s) { Store<uint16_t>(&s->v, 0, 0xffff); }},
      {"INVALID_ARGUMENT POLICY_INVALID rows[0].policy.psaw.phi",
       [&](auto* s) { s->call.rows[0].policy = &bad_policy; }},
      {"INVALID_ARGUMENT GIVEN_INVALID rows[0].given_offsets", [&](auto* s) { give(s, none); }},
      {"INVALID_ARGUMENT GIVEN_INVALID rows[0].given_offsets", [&](auto* s) { give(s, two); }},
      {"INVALID_ARGUMENT GIVEN_INVALID rows[0].given_offsets",
       [&](auto* s) { give(s, short_offsets); }},
      {"INVALID_ARGUMENT GIVEN_INVALID rows[0].given_offsets", [&](auto* s) { give(s, falling); }},
      {"INVALID_ARGUMENT GIVEN_INVALID rows[0].given_positions",
       [&](auto* s) { give(s, repeated); }},
      {"INVALID_ARGUMENT GIVEN_INVALID rows[0].given_positions", [&](auto* s) { give(s, late); }},
  };
  uint32_t position = 20;
  for (const BadStep& bad : table) {
    const SequenceInfo before = *engine_.Get(handle_);
    AttendStep step(engine_.model(), 0);
    step.Add(handle_, kStored, {kStored}).Add(good, position, {position}).Build();
    bad.spoil(&step);
    ASSERT_TRUE(step.Run(engine_.get()).ok()) << bad.error;
    EXPECT_EQ(ErrorLine(step.result(0).status), bad.error) << step.result(0).status;
    for (const float x : step.Out(0)) EXPECT_EQ(x, 0.0F);
    EXPECT_TRUE(step.result(1).status.ok()) << step.result(1).status;
    EXPECT_EQ(step.result(1).attended_length, ++position);
    const SequenceInfo after = *engine_.Get(handle_);
    EXPECT_EQ(after.length_max, before.length_max) << bad.error;
    EXPECT_EQ(after.block_count, before.block_count);
    EXPECT_EQ(after.stats.attend_rows, before.stats.attend_rows);
  }
}

TEST_F(EngineErrorsTest, NumbersInErrorsAreTheCallersNextStep) {
  AttendStep gap(engine_.model(), 0);
  gap.Add(handle_, kStored + 5, {1});
  ASSERT_TRUE(gap.Run(engine_.get()).ok());
  using Metadata = std::vector<std::pair<std::string, std::string>>;
  EXPECT_EQ(DetailsOf(gap.result(0).status).metadata,
            (Metadata{{"position", "75"}, {"current_length", "70"}}));
  Handle stale = handle_;
  stale.generation = 9;
  EXPECT_EQ(DetailsOf(engine_.Fork(stale).status()).metadata,
            (Metadata{{"generation", "9"}, {"current_generation", "1"}}));
  AttendStep not_finite(engine_.model(), 0);
  not_finite.Add(handle_, kStored, {1}).Build();
  Store<float>(&not_finite.q, 77, INFINITY);
  ASSERT_TRUE(not_finite.Run(engine_.get()).ok());
  EXPECT_EQ(DetailsOf(not_finite.result(0).status).metadata, (Metadata{{"index", "77"}}));
}

TEST_F(EngineErrorsTest, QueryCounts) {
  for (const uint32_t count : {0U, 9U, 100U}) {
    AttendStep step(engine_.model(), 0);
    step.Add(handle_, kStored, Counting(0, count));
    if (count == 0) step.Add(handle_, kStored, {kStored});
    ASSERT_TRUE(step.Run(engine_.get()).ok());
    EXPECT_EQ(ErrorLine(step.result(0).status),
              "INVALID_ARGUMENT QUERY_COUNT_OUT_OF_RANGE rows[0].query_count");
  }
}

TEST_F(EngineErrorsTest, ReadingMoreThanIsStored) {
  for (const uint32_t position : {kStored, kStored + 1, UINT32_MAX - 1, UINT32_MAX}) {
    AttendStep step(engine_.model(), 0);
    step.Add(handle_, position, {1, 2}).OnlyRead();
    ASSERT_TRUE(step.Run(engine_.get()).ok());
    EXPECT_EQ(ErrorLine(step.result(0).status), "OUT_OF_RANGE POSITION_GAP rows[0].position");
  }
  AttendStep last(engine_.model(), 0);
  last.Add(handle_, kStored - 2, {kStored - 2, kStored - 1}).OnlyRead();
  ASSERT_TRUE(last.Run(engine_.get()).ok());
  EXPECT_TRUE(last.result(0).status.ok());
}

TEST_F(EngineErrorsTest, OneSequenceTwiceMayNotOverlap) {
  AttendStep overlap(engine_.model(), 0);
  overlap.Add(handle_, kStored, {70, 71}).Add(handle_, kStored + 1, {71});
  ASSERT_TRUE(overlap.Run(engine_.get()).ok());
  EXPECT_TRUE(overlap.result(0).status.ok());
  EXPECT_EQ(ErrorLine(overlap.result(1).status), "INVALID_ARGUMENT ROWS_OVERLAP rows[1].position");

  AttendStep side_by_side(engine_.model(), 0);
  side_by_side.Add(handle_, kStored + 2, {72}).Add(handle_, kStored + 3, {73});
  ASSERT_TRUE(side_by_side.Run(engine_.get()).ok());
  EXPECT_TRUE(side_by_side.result(0).status.ok());
  EXPECT_TRUE(side_by_side.result(1).status.ok());
  EXPECT_EQ(side_by_side.result(1).attended_length, kStored + 4);
}

TEST_F(EngineErrorsTest, ACallOfUnknownSequencesStillHasAnAnswerForEachRow) {
  AttendStep step(engine_.model(), 0);
  step.Add(foreign_, 0, {1}).Add({.id = {}}, 0, {1, 2});
  ASSERT_TRUE(step.Run(engine_.get()).ok());
  EXPECT_EQ(step.result(0).status, step.result(1).status) << "foreign and unknown look alike";
  EXPECT_EQ(step.call.out.size(), 3U * 4U * 64U);
  EXPECT_EQ(step.call.lse.size(), 3U * 4U);

  AttendStep shapeless(engine_.model(), 0);
  shapeless.Add(foreign_, 0, {1}).Build();
  shapeless.q_shape[1] = int64_t{1} << 62;
  EXPECT_EQ(ErrorLine(shapeless.Run(engine_.get())), "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q");
}

TEST_F(EngineErrorsTest, RowsOfTwoModels) {
  AttendStep step(engine_.model(), 0);
  step.Add(handle_, kStored, {kStored}).Add(other_model_, 0, {0});
  ASSERT_TRUE(step.Run(engine_.get()).ok());
  EXPECT_TRUE(step.result(0).status.ok());
  EXPECT_EQ(ErrorLine(step.result(1).status), "INVALID_ARGUMENT MODEL_MISMATCH rows[1].handle");
}

struct BadAppend {
  std::string error;
  std::function<void(AppendStep*)> spoil;
};

TEST_F(EngineErrorsTest, Appends) {
  const std::vector<BadAppend> table = {
      {"NOT_FOUND SEQUENCE_NOT_FOUND", [](auto* s) { s->call.id = {}; }},
      {"NOT_FOUND SEQUENCE_NOT_FOUND", [](auto* s) { s->call.tenant = "someone else"; }},
      {"FAILED_PRECONDITION GENERATION_MISMATCH handle.generation",
       [](auto* s) { s->call.generation = 7; }},
      {"INVALID_ARGUMENT LAYER_OUT_OF_RANGE layer", [](auto* s) { s->call.layer = 2; }},
      {"INVALID_ARGUMENT TENSOR_DTYPE_MISMATCH k",
       [](auto* s) { s->call.k.dtype = DType::kFloat16; }},
      {"INVALID_ARGUMENT TENSOR_DTYPE_MISMATCH v",
       [](auto* s) { s->call.v.dtype = DType::kFloat32; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH k", [](auto* s) { s->k_shape[0] = 0; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH k", [](auto* s) { s->k_shape[2] = 32; }},
      {"INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH v", [](auto* s) { s->v_shape[0] = 6; }},
      {"INVALID_ARGUMENT TENSOR_SIZE_MISMATCH k", [](auto* s) { s->k_shape[0] = 6; }},
      {"INVALID_ARGUMENT TENSOR_SIZE_MISMATCH k",
       [](auto* s) { s->k_shape[0] = (int64_t{1} << 56) + 5; }},  // Wraps to five tokens.
      {"INVALID_ARGUMENT TENSOR_SIZE_MISMATCH v",
       [](auto* s) { s->call.v.bytes.remove_prefix(2); }},
      {"INVALID_ARGUMENT TENSOR_NOT_FINITE k",
       [](auto* s) { Store<uint16_t>(&s->k, 5 * 128 - 1, 0xff80); }},
      {"INVALID_ARGUMENT TENSOR_NOT_FINITE v", [](auto* s) { Store<uint16_t>(&s->v, 3, 0x7fc0); }},
      {"OUT_OF_RANGE POSITION_GAP position", [](auto* s) { s->call.position = kStored + 1; }},
      {"OUT_OF_RANGE POSITION_GAP position", [](auto* s) { s->call.position = UINT32_MAX; }},
      {"FAILED_PRECONDITION APPEND_CONFLICT position",
       [](auto* s) { s->call.position = kStored - 2; }},
  };
  for (const BadAppend& bad : table) {
    const State before = StateOf(&engine_);
    AppendStep step(engine_.model(), handle_, 1, kStored, Counting(kStored, 5));
    bad.spoil(&step);
    const absl::Status status = step.Run(engine_.get()).status();
    EXPECT_EQ(ErrorLine(status), bad.error) << status;
    EXPECT_EQ(StateOf(&engine_), before) << bad.error;
  }
  EXPECT_TRUE(engine_.Append(handle_, 1, kStored, Counting(kStored, 5)).ok());
}

TEST_F(EngineErrorsTest, ControlCalls) {
  const State before = StateOf(&engine_);
  CreateOptions options;
  options.model = "nothing";
  EXPECT_EQ(ErrorLine(engine_.Create(options).status()), "NOT_FOUND MODEL_NOT_FOUND model");
  EXPECT_EQ(ErrorLine(engine_.get()->GetModel("nothing").status()),
            "NOT_FOUND MODEL_NOT_FOUND model");
  options.model = kModel;
  options.request_id.assign(65, 'x');
  EXPECT_EQ(ErrorLine(engine_.Create(options).status()),
            "INVALID_ARGUMENT REQUEST_ID_TOO_LONG request_id");
  options.request_id.clear();
  options.policy = Policy();
  options.policy->max_dropped_mass = 0.0F;
  EXPECT_EQ(ErrorLine(engine_.Create(options).status()),
            "INVALID_ARGUMENT POLICY_INVALID policy.max_dropped_mass");
  EXPECT_EQ(ErrorLine(engine_.Fork(handle_, kStored + 1).status()),
            "OUT_OF_RANGE LENGTH_OUT_OF_RANGE length_tokens");
  EXPECT_EQ(ErrorLine(engine_.Truncate(handle_, kStored + 1).status()),
            "OUT_OF_RANGE LENGTH_OUT_OF_RANGE length_tokens");
  Handle stale = handle_;
  stale.generation = 2;
  for (const absl::Status& status :
       {engine_.Fork(stale).status(), engine_.Truncate(stale, 1).status(),
        engine_.RenewLease(stale, 1).status()}) {
    EXPECT_EQ(ErrorLine(status), "FAILED_PRECONDITION GENERATION_MISMATCH handle.generation");
  }
  EXPECT_EQ(StateOf(&engine_), before);
}

TEST_F(EngineErrorsTest, ForeignUnknownAndExpiredHandlesLookAlike) {
  Handle expired = engine_.NewSequence();
  ASSERT_TRUE(engine_.RenewLease(expired, 5).ok());
  engine_.clock.AdvanceMs(5);
  Handle unknown;
  unknown.id.bytes[3] = std::byte{9};
  const auto ask = [&](const Handle& handle) {
    AttendStep step(engine_.model(), 0);
    step.Add(handle, 0, {0});
    EXPECT_TRUE(step.Run(engine_.get()).ok());
    return std::vector<absl::Status>{engine_.Get(handle).status(),
                                     engine_.Fork(handle).status(),
                                     engine_.Truncate(handle, 0).status(),
                                     engine_.RenewLease(handle, 0).status(),
                                     engine_.Drop(handle).status(),
                                     engine_.Append(handle, 0, 0, {0}).status(),
                                     step.result(0).status};
  };
  const std::vector<absl::Status> of_unknown = ask(unknown);
  EXPECT_EQ(ask(expired), of_unknown);
  EXPECT_EQ(ask(foreign_), of_unknown);
  for (const absl::Status& status : of_unknown) {
    EXPECT_EQ(ErrorLine(status), "NOT_FOUND SEQUENCE_NOT_FOUND");
  }
  EXPECT_TRUE(engine_.Get(foreign_, "someone else").ok()) << "its owner still has it";
}

TEST(EngineLimitsTest, SequencesAndTenants) {
  EngineOptions options = TestEngine::SmallOptions();
  options.sequences_max = 3;
  options.sequences_per_tenant_max = 2;
  TestEngine engine(options);
  const Handle first = engine.NewSequence();
  engine.NewSequence();
  CreateOptions create;
  create.model = kModel;
  EXPECT_EQ(ErrorLine(engine.Create(create).status()), "RESOURCE_EXHAUSTED TENANT_QUOTA");
  EXPECT_EQ(ErrorLine(engine.Fork(first).status()), "RESOURCE_EXHAUSTED TENANT_QUOTA");
  EXPECT_TRUE(engine.Create(create, "second").ok());
  EXPECT_EQ(ErrorLine(engine.Create(create, "third").status()),
            "RESOURCE_EXHAUSTED SEQUENCES_FULL");
  EXPECT_TRUE(engine.Drop(first).ok());
  EXPECT_TRUE(engine.Create(create, "third").ok());
  EXPECT_EQ(engine.get()->Stats().sequences, 3U);
}

TEST(EngineLimitsTest, LengthOfASequence) {
  EngineOptions options = TestEngine::SmallOptions();
  options.sequence_tokens_max = 100;
  TestEngine engine(options);
  const Handle handle = engine.NewSequence();
  EXPECT_EQ(ErrorLine(engine.Append(handle, 0, 0, Counting(0, 101)).status()),
            "RESOURCE_EXHAUSTED SEQUENCE_TOO_LONG position");
  engine.Fill(handle, 0, Counting(0, 100));
  AttendStep step(engine.model(), 0);
  step.Add(handle, 100, {100});
  ASSERT_TRUE(step.Run(engine.get()).ok());
  EXPECT_EQ(ErrorLine(step.result(0).status),
            "RESOURCE_EXHAUSTED SEQUENCE_TOO_LONG rows[0].position");
  EXPECT_EQ(DetailsOf(step.result(0).status).retry_delay_ms, 0U) << "waiting does not help";
  EXPECT_EQ(engine.Get(handle)->length_max, 100U);
}

TEST(EngineLimitsTest, ABrokenRandomSourceMakesNoSequence) {
  TestEngine engine;
  CreateOptions create;
  create.model = kModel;
  engine.random.set_fails(true);
  EXPECT_EQ(ErrorLine(engine.Create(create).status()), "UNAVAILABLE RANDOM_UNAVAILABLE");
  engine.random.set_fails(false);
  engine.random.set_constant(true);
  const auto only = engine.Create(create);
  ASSERT_TRUE(only.ok());
  EXPECT_EQ(ErrorLine(engine.Create(create).status()), "UNAVAILABLE RANDOM_UNAVAILABLE");
  EXPECT_EQ(ErrorLine(engine.Fork({.id = only->id}).status()), "UNAVAILABLE RANDOM_UNAVAILABLE");
  EXPECT_EQ(engine.get()->Stats().sequences, 1U);
}

TEST(EngineLimitsTest, APoolThatCannotBeReserved) {
  class FullDevice : public DeviceWrapper {
   public:
    using DeviceWrapper::DeviceWrapper;
    absl::StatusOr<DeviceMemory> Allocate(size_t /*bytes*/) override {
      return absl::ResourceExhaustedError("no memory");
    }
  };
  FakeClock clock;
  SeededRandom random(1);
  const auto engine = NewEngine(
      EngineOptions(), std::make_unique<FullDevice>(*NewDevice("reference", {})), &clock, &random);
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kResourceExhausted);
}

// A history that needs more and more blocks, run in pools of every size: whichever step finds the
// pool full, it says so, changes nothing, and works when it is repeated with more room.
TEST(EngineLimitsTest, PoolFullAtEveryPoint) {
  for (size_t blocks = 1; blocks <= 9; ++blocks) {
    SCOPED_TRACE(blocks);
    EngineOptions options = TestEngine::SmallOptions();
    options.pool_bytes = blocks * BlockBytes(SmallModel(2));
    TestEngine engine(options);
    Handle first = engine.NewSequence();
    const Handle second = engine.NewSequence();
    size_t full_count = 0;
    const auto attempt = [&](const std::function<absl::Status()>& step) {
      const State before = StateOf(&engine);
      const absl::Status status = step();
      if (status.ok()) return;
      ++full_count;
      EXPECT_EQ(ErrorLine(status), "RESOURCE_EXHAUSTED POOL_FULL") << status;
      EXPECT_GT(DetailsOf(status).retry_delay_ms, 0U);
      EXPECT_EQ(StateOf(&engine), before);
    };
    const auto append = [&](const Handle& handle, uint32_t layer, uint32_t count) {
      attempt([&] { return engine.Append(handle, layer, 0, Counting(0, count)).status(); });
    };
    append(first, 0, 64);
    append(first, 1, 128);
    append(first, 0, 128);
    append(second, 0, 300);
    attempt([&] { return engine.Fork(first, UINT32_MAX).status(); });
    attempt([&] {
      const uint32_t length = engine.Get(first)->length;
      return length < 10 ? absl::OkStatus() : engine.Fork(first, length - 5).status();
    });
    attempt([&] {
      const auto cut = engine.Truncate(first, engine.Get(first)->length_max / 3);
      if (cut.ok()) first.generation = cut->generation;
      return cut.status();
    });
    attempt([&] {
      const uint32_t length = engine.Get(second)->length_max;
      AttendStep step(engine.model(), 0);
      step.Add(second, length, {length});
      const absl::Status status = step.Run(engine.get());
      return status.ok() ? step.result(0).status : status;
    });
    EXPECT_EQ(full_count == 0, blocks == 9) << full_count;
    for (const SequenceInfo& info : engine.List("")) {
      EXPECT_TRUE(engine.Drop({.id = info.id}).ok());
    }
    EXPECT_EQ(engine.get()->Stats().blocks_used, 0U);
    EXPECT_EQ(engine.get()->Stats().pool_bytes_used, 0U);
  }
}

}  // namespace
}  // namespace kvservice::testing
