// Versions of sketch tables: who uses which, and how a model comes to a learnt one.

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <limits>
#include <set>
#include <thread>
#include <vector>

#include "kvservice/table_learner.h"
#include "tests/kvservice/engine_client.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kTokens = 600;

EngineOptions Roomy() {
  EngineOptions options = TestEngine::SmallOptions();
  options.audit_rate = 0.0;
  return options;
}

class TableLearningTest : public ::testing::Test {
 protected:
  void SetUp() override { Start(2); }

  void Start(uint32_t layer_count) { engine_ = std::make_unique<TestEngine>(Roomy(), layer_count); }

  Sha256::Digest DigestOf(const Handle& handle) {
    const auto info = engine_->Get(handle);
    EXPECT_TRUE(info.ok()) << info.status();
    return info->sketch_table_digest;
  }

  // Stores words in one layer with a sample of `sample_count` queries.
  absl::Status Append(const Handle& handle, uint32_t layer, uint32_t position, uint32_t count,
                      uint32_t sample_count) {
    AppendStep step(engine_->model(), handle, layer, position, Counting(position, count));
    const std::vector<std::byte> q = PartBytes(engine_->model().layout, DType::kFloat32,
                                               Part::kQuery, layer, Counting(0, sample_count));
    const std::vector<int64_t> shape = {sample_count, engine_->model().layout.query_head_count,
                                        engine_->model().layout.head_dim};
    if (sample_count > 0) {
      step.call.query_sample =
          TensorView{.dtype = DType::kFloat32, .shape = shape, .bytes = q, .field = "query_sample"};
    }
    return step.Run(engine_->get()).status();
  }

  // A sequence of enough keys whose prompt brings enough queries.
  Handle Teach() {
    const Handle handle = engine_->NewSequence();
    for (uint32_t layer = 0; layer < engine_->model().layer_count; ++layer) {
      EXPECT_TRUE(Append(handle, layer, 0, kTokens, 64).ok());
    }
    return handle;
  }

  // The digest of new sequences once it is not `old` any more.
  Sha256::Digest AwaitOther(const Sha256::Digest& old) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (;;) {
      const Handle handle = engine_->NewSequence();
      const Sha256::Digest digest = DigestOf(handle);
      EXPECT_TRUE(engine_->Drop(handle).ok());
      if (digest != old) return digest;
      if (std::chrono::steady_clock::now() > end) {
        ADD_FAILURE() << "nothing is learnt";
        return digest;
      }
      std::this_thread::yield();
    }
  }

  // What a certified step of the sequence's next word says, over all heads: the largest bound of
  // what the tokens that are kept leave out.
  double BoundOf(const Handle& handle) {
    Policy policy = DefaultPolicy(SelectorKind::kCis);
    policy.guarantee = Guarantee::kDeterministic;
    policy.on_violation = OnViolation::kReport;
    policy.dense_below_tokens = 0;
    policy.layers.clear();
    policy.budget = {.sink = 4, .local = 16, .top_k = 64};
    AttendStep step(engine_->model(), 0);
    step.Add(handle, kTokens - 1, {kTokens - 1}).OnlyRead();
    step.call.policy = &policy;
    EXPECT_TRUE(step.Run(engine_->get()).ok());
    EXPECT_TRUE(step.result(0).status.ok()) << step.result(0).status;
    double sum = 0.0;
    for (const HeadCertificate& head : step.result(0).certificates) {
      sum += head.dropped_mass_upper.value;
    }
    return sum;
  }

  std::unique_ptr<TestEngine> engine_;
};

TEST_F(TableLearningTest, SequencesCreatedLaterUseWhatWasLearnt) {
  const Handle teacher = Teach();
  const Sha256::Digest identity = DigestOf(teacher);
  const Sha256::Digest learnt = AwaitOther(identity);
  EXPECT_EQ(DigestOf(teacher), identity) << "a sequence keeps its version";
  const auto fork = engine_->Fork(teacher);
  ASSERT_TRUE(fork.ok());
  EXPECT_EQ(fork->sketch_table_digest, identity) << "and so do its forks";

  // The teacher's old sketches are read with the tables that made them, the new one's with its own:
  // both bounds are right, the learnt one tighter.
  const Handle student = engine_->NewSequence();
  engine_->Fill(student, 0, Counting(0, kTokens));
  EXPECT_EQ(DigestOf(student), learnt);
  const double old_bound = BoundOf(teacher);
  const double new_bound = BoundOf(student);
  EXPECT_LT(new_bound, old_bound);
  EXPECT_GT(new_bound, 0.0);
  AuditAsk ask;
  ask.keep_next = 2;
  ASSERT_TRUE(engine_->Audit(student, ask).ok());
  ASSERT_TRUE(engine_->Audit(teacher, ask).ok());
  BoundOf(student);
  BoundOf(teacher);
  ask = AuditAsk();
  ask.row_count = 1;
  for (const Handle& handle : {student, teacher}) {
    const auto report = engine_->Audit(handle, ask);
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->stats.rows_audited, 1U);
    EXPECT_EQ(report->stats.violations, 0U);
  }
}

TEST_F(TableLearningTest, AModelLearnsOnce) {
  const Sha256::Digest learnt = AwaitOther(DigestOf(Teach()));
  const Handle second = Teach();
  EXPECT_EQ(DigestOf(second), learnt);
  // Whatever ran in the background has run after a few calls of ours.
  for (int i = 0; i < 200; ++i) DigestOf(second);
  EXPECT_EQ(DigestOf(engine_->NewSequence()), learnt);
}

TEST_F(TableLearningTest, EveryLayerNeedsQueriesAndOneSequenceKeys) {
  const Handle short_one = engine_->NewSequence();
  const Sha256::Digest identity = DigestOf(short_one);
  for (const uint32_t layer : {0U, 1U}) {
    ASSERT_TRUE(
        Append(short_one, layer, 0, TableLearner::kTokensMin - 1, layer == 0 ? 64 : 31).ok());
  }
  // One query more in layer 1, and one key less than needed.
  for (int i = 0; i < 200; ++i) DigestOf(short_one);
  EXPECT_EQ(DigestOf(engine_->NewSequence()), identity);
  ASSERT_TRUE(Append(short_one, 0, TableLearner::kTokensMin - 1, 1, 0).ok());
  ASSERT_TRUE(Append(short_one, 1, TableLearner::kTokensMin - 1, 1, 0).ok());
  for (int i = 0; i < 200; ++i) DigestOf(short_one);
  EXPECT_EQ(DigestOf(engine_->NewSequence()), identity) << "31 queries of 2 heads are not 64";
  ASSERT_TRUE(Append(short_one, 1, TableLearner::kTokensMin, 1, 1).ok());
  EXPECT_NE(AwaitOther(identity), identity);
}

// The same samples and keys give the same tables, whatever engine learns them.
TEST_F(TableLearningTest, TheDigestFollowsFromWhatWasSeen) {
  const Sha256::Digest first = AwaitOther(DigestOf(Teach()));
  Start(2);
  EXPECT_EQ(AwaitOther(DigestOf(Teach())), first);
}

// Sketches of another version cannot serve a sequence of this one.
TEST_F(TableLearningTest, AnotherVersionsPrefixIsNotMatched) {
  CreateOptions options;
  options.model = kModel;
  const Words ids = Counting(0, kTokens);
  options.token_ids = ids;
  const auto created = [&] { return *engine_->Create(options); };
  const SequenceInfo early = created();
  const Handle handle{.id = early.id, .generation = early.generation};
  for (const uint32_t layer : {0U, 1U}) ASSERT_TRUE(Append(handle, layer, 0, kTokens, 0).ok());
  const uint32_t whole = kTokens / kBlockTokens * kBlockTokens;
  EXPECT_EQ(created().matched_tokens, whole);
  Teach();
  AwaitOther(early.sketch_table_digest);
  const SequenceInfo later = created();
  EXPECT_NE(later.sketch_table_digest, early.sketch_table_digest);
  EXPECT_EQ(later.matched_tokens, 0U);
  const Handle filled{.id = later.id, .generation = later.generation};
  for (const uint32_t layer : {0U, 1U}) ASSERT_TRUE(Append(filled, layer, 0, kTokens, 0).ok());
  EXPECT_EQ(created().matched_tokens, whole);
}

TEST_F(TableLearningTest, TablesThatCameWithTheModelStay) {
  ModelSpec spec = engine_->model();
  spec.name = "with tables";
  spec.sketch_tables.assign(size_t{2} * spec.layout.kv_head_count,
                            IdentitySketchTable(spec.layout.head_dim));
  spec.sketch_tables[1].metric[3] = 2.0F;
  ASSERT_TRUE(engine_->get()->RegisterModel(spec).ok());
  CreateOptions options;
  options.model = spec.name;
  const auto created = engine_->Create(options);
  ASSERT_TRUE(created.ok());
  const Handle handle{.id = created->id, .generation = created->generation};
  EXPECT_NE(created->sketch_table_digest, DigestOf(engine_->NewSequence()));
  for (const uint32_t layer : {0U, 1U}) ASSERT_TRUE(Append(handle, layer, 0, kTokens, 64).ok());
  for (int i = 0; i < 200; ++i) DigestOf(handle);
  EXPECT_EQ(engine_->Create(options)->sketch_table_digest, created->sketch_table_digest);
}

TEST_F(TableLearningTest, BadSamplesAreTypedAndStoreNothing) {
  const Handle handle = engine_->NewSequence();
  const KvLayout& layout = engine_->model().layout;
  AppendStep step(engine_->model(), handle, 0, 0, Counting(0, 2));
  std::vector<std::byte> bytes(size_t{257} * layout.query_head_count * layout.head_dim *
                               sizeof(float));
  std::vector<int64_t> shape = {257, layout.query_head_count, layout.head_dim};
  const auto error_of = [&](DType dtype, size_t byte_count) {
    step.call.query_sample = TensorView{.dtype = dtype,
                                        .shape = shape,
                                        .bytes = {bytes.data(), byte_count},
                                        .field = "query_sample"};
    const std::string error = ErrorLine(step.Run(engine_->get()).status());
    EXPECT_EQ(engine_->Get(handle)->length_max, 0U);
    return error;
  };
  EXPECT_EQ(error_of(DType::kFloat32, bytes.size()),
            "INVALID_ARGUMENT QUERY_SAMPLE_TOO_LARGE query_sample");
  EXPECT_EQ(error_of(DType::kFloat16, bytes.size() / 2),
            "INVALID_ARGUMENT TENSOR_DTYPE_MISMATCH query_sample");
  shape[0] = 1;
  EXPECT_EQ(error_of(DType::kFloat32, bytes.size()),
            "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH query_sample");
  const size_t one = bytes.size() / 257;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(bytes.data() + 8, &nan, sizeof(nan));
  EXPECT_EQ(error_of(DType::kFloat32, one), "INVALID_ARGUMENT TENSOR_NOT_FINITE query_sample");
  shape[1] = 3;
  EXPECT_EQ(error_of(DType::kFloat32, one), "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH query_sample");
}

TEST_F(TableLearningTest, ASequenceThatGoesTakesItsKeysAlong) {
  const Handle teacher = Teach();
  const Sha256::Digest identity = DigestOf(teacher);
  // Whether the learning was done in time or not, what follows must come about.
  ASSERT_TRUE(engine_->Drop(teacher).ok());
  const Handle second = engine_->NewSequence();
  if (DigestOf(second) == identity) {
    for (const uint32_t layer : {0U, 1U}) ASSERT_TRUE(Append(second, layer, 0, kTokens, 0).ok());
  }
  EXPECT_NE(AwaitOther(identity), identity);
}

}  // namespace
}  // namespace kvservice::testing
