// Attention through the network: the numbers, the certificates, and the bytes they travel in.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention/float16.h"
#include "kvservice/server/attend_reply.h"
#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/raw_call.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

// Squared error over squared norm: float32 arithmetic, and one rounding to 16 bits.
constexpr double kToleranceFloat32 = 1e-10;
constexpr double kToleranceFloat16 = 1e-6;
constexpr double kToleranceBfloat16 = 2e-5;
constexpr double kToleranceLse = 1e-4;

std::vector<float> NumbersOf(const v1::Tensor& tensor, DType dtype) {
  const auto* const data = reinterpret_cast<const std::byte*>(tensor.data().data());
  std::vector<float> numbers(tensor.data().size() / ElementBytes(dtype));
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = LoadElement(dtype, data, i);
  return numbers;
}

// A server with a policy of its own under a name.
ServedEngineOptions WithPolicy() {
  Policy policy = DefaultPolicy(SelectorKind::kScan);
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  ServedEngineOptions options;
  EXPECT_TRUE(options.server.policies.Add("mine", policy).ok());
  return options;
}

class AttendTest : public ::testing::Test {
 protected:
  AttendTest()
      : attention_(v1::AttentionService::NewStub(served_.Connect())),
        sequences_(v1::SequenceService::NewStub(served_.Connect())) {}

  v1::SequenceHandle NewSequence(const Words& words) {
    v1::CreateRequest request;
    request.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_EQ(ErrorText(sequences_->Create(NewContext().get(), request, &created)), "OK");
    const v1::SequenceHandle handle = created.sequence().handle();
    v1::AppendResponse response;
    const auto context = NewContext();
    const auto writer = sequences_->Append(context.get(), &response);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      EXPECT_TRUE(writer->Write(MakeAppend(served_.model(), handle, layer, 0, words)));
    }
    writer->WritesDone();
    EXPECT_EQ(ErrorText(writer->Finish()), "OK");
    return handle;
  }

  v1::AttendResponse Attend(const v1::AttendRequest& request) {
    v1::AttendResponse response;
    EXPECT_EQ(ErrorText(attention_->Attend(NewContext().get(), request, &response)), "OK");
    return response;
  }

  LayerShape Shape() const {
    return {.layout = served_.model().layout,
            .scale = served_.model().scale,
            .inverse_frequencies = {}};
  }

  ServedEngine served_{WithPolicy()};
  std::unique_ptr<v1::AttentionService::Stub> attention_;
  std::unique_ptr<v1::SequenceService::Stub> sequences_;
};

TEST_F(AttendTest, DenseAttentionIsRight) {
  const Words words = Counting(0, 101);
  const v1::SequenceHandle handle = NewSequence(Counting(0, 100));
  for (uint32_t layer = 0; layer < 2; ++layer) {
    v1::AttendRequest request = MakeAttend(served_.model(), handle, layer, 100, {100});
    request.set_step_id(40 + layer);
    const v1::AttendResponse response = Attend(request);
    const DenseAnswer expected = AttendDensely(Shape(), layer, words, 100);
    EXPECT_EQ(response.step_id(), 40 + layer);
    EXPECT_EQ(response.call_number(), layer + 1);
    EXPECT_EQ(response.out().ShortDebugString().substr(0, 50),
              "dtype: DATA_TYPE_FLOAT32 shape: 1 shape: 4 shape: ");
    EXPECT_LE(NormalizedSquaredError(NumbersOf(response.out(), DType::kFloat32), expected.out),
              kToleranceFloat32);
    const std::vector<float> lse = NumbersOf(response.lse(), DType::kFloat32);
    ASSERT_EQ(lse.size(), expected.lse.size());
    for (size_t head = 0; head < lse.size(); ++head) {
      EXPECT_NEAR(lse[head], expected.lse[head], kToleranceLse);
    }
    const v1::AttendRowResult& row = response.results(0);
    EXPECT_EQ(row.attended_tokens(), 101U);
    EXPECT_EQ(row.selector(), v1::SELECTOR_DENSE);
    EXPECT_EQ(row.generation(), handle.generation());
    EXPECT_EQ(row.groups().tokens_read_size(), 2);
    ASSERT_EQ(row.certificates().level_size(), 4);
    for (int head = 0; head < 4; ++head) {
      EXPECT_EQ(row.certificates().level(head), v1::LEVEL_EXACT);
      EXPECT_EQ(row.certificates().action(head), v1::ACTION_DENSE);
      EXPECT_TRUE(row.certificates().met(head));
      EXPECT_EQ(row.certificates().dropped_mass_upper(head), 0.0F);
      EXPECT_LE(row.certificates().log_kept_lower(head), expected.lse[static_cast<size_t>(head)]);
      EXPECT_GE(row.certificates().log_kept_upper(head), expected.lse[static_cast<size_t>(head)]);
    }
  }
}

TEST_F(AttendTest, OutputsComeInTheTypeAskedFor) {
  const v1::SequenceHandle handle = NewSequence(Counting(0, 20));
  const DenseAnswer expected = AttendDensely(Shape(), 0, Counting(0, 21), 20);
  const auto check = [&](DType dtype, v1::DataType wire, double tolerance) {
    v1::AttendRequest request = MakeAttend(served_.model(), handle, 0, 20, {20});
    request.set_output_dtype(wire);
    const v1::AttendResponse response = Attend(request);
    EXPECT_EQ(response.out().dtype(), wire);
    EXPECT_EQ(response.lse().dtype(), v1::DATA_TYPE_FLOAT32);
    EXPECT_LE(NormalizedSquaredError(NumbersOf(response.out(), dtype), expected.out), tolerance);
  };
  check(DType::kFloat32, v1::DATA_TYPE_FLOAT32, kToleranceFloat32);
  check(DType::kFloat16, v1::DATA_TYPE_FLOAT16, kToleranceFloat16);
  check(DType::kBfloat16, v1::DATA_TYPE_BFLOAT16, kToleranceBfloat16);
}

TEST_F(AttendTest, RepliesNameTheirRandomNumbersAndAnAuditFindsNothing) {
  const v1::SequenceHandle handle = NewSequence(Counting(0, 300));
  v1::AuditRequest audit;
  *audit.mutable_handle() = handle;
  audit.set_keep_next(2);
  v1::AuditResponse found;
  ASSERT_EQ(ErrorText(attention_->Audit(NewContext().get(), audit, &found)), "OK");
  EXPECT_EQ(found.keep_next_left(), 2U);

  v1::AttendRequest request = MakeAttend(served_.model(), handle, 1, 300, {300});
  v1::Policy* const policy = request.mutable_policy();
  policy->set_selector(v1::SELECTOR_CERTIFIED);
  policy->set_guarantee(v1::GUARANTEE_CONFIDENCE);
  policy->set_on_violation(v1::ON_VIOLATION_GROW);
  policy->set_dense_below_tokens(0);
  policy->mutable_layers();
  const v1::AttendResponse first = Attend(request);
  const v1::AttendResponse again = Attend(request);
  EXPECT_EQ(first.epoch().size(), 16U);
  EXPECT_EQ(first.epoch(), again.epoch());
  EXPECT_EQ(first.draw_secret_id(), again.draw_secret_id());
  EXPECT_NE(first.call_number(), again.call_number());

  audit.clear_keep_next();
  audit.set_call_count(8);
  ASSERT_EQ(ErrorText(attention_->Audit(NewContext().get(), audit, &found)), "OK");
  EXPECT_EQ(found.kept_rows(), 2U);
  ASSERT_EQ(found.call_numbers_size(), 2);
  EXPECT_EQ(found.call_numbers(0), again.call_number());
  EXPECT_EQ(found.totals().rows_audited(), 2U);
  EXPECT_EQ(found.totals().certificates_audited(), 8U);
  EXPECT_EQ(found.totals().violations(), 0U);

  audit.clear_call_count();
  audit.mutable_replay()->set_call_number(first.call_number());
  audit.mutable_replay()->set_epoch(first.epoch());
  audit.mutable_replay()->set_draw_secret_id(first.draw_secret_id());
  ASSERT_EQ(ErrorText(attention_->Audit(NewContext().get(), audit, &found)), "OK");
  EXPECT_TRUE(found.replay_equal());
  EXPECT_EQ(found.replayed().SerializeAsString(),
            first.results(0).certificates().SerializeAsString());
  audit.mutable_replay()->set_epoch("short");
  EXPECT_EQ(ErrorText(attention_->Audit(NewContext().get(), audit, &found)),
            "INVALID_ARGUMENT EPOCH_MALFORMED replay.epoch");
  audit.mutable_handle()->set_id("short");
  EXPECT_EQ(ErrorText(attention_->Audit(NewContext().get(), audit, &found)),
            "INVALID_ARGUMENT HANDLE_MALFORMED handle.id");
}

// Rows fail on their own, keep their places, and a failed row's numbers are zero.
TEST_F(AttendTest, RowsSucceedAndFailOnTheirOwn) {
  const v1::SequenceHandle good = NewSequence(Counting(0, 10));
  v1::SequenceHandle gone = good;
  gone.mutable_id()->back() ^= 1;
  const v1::AttendRequest one = MakeAttend(served_.model(), good, 0, 10, {10});
  v1::AttendRequest request = MakeAttend(served_.model(), gone, 0, 10, {10});
  *request.add_rows() = one.rows(0);
  for (auto [tensor, part] :
       {std::pair(request.mutable_q(), &one.q()), std::pair(request.mutable_k(), &one.k()),
        std::pair(request.mutable_v(), &one.v())}) {
    tensor->set_shape(0, 2);
    tensor->mutable_data()->append(part->data());
  }
  const v1::AttendResponse response = Attend(request);
  ASSERT_EQ(response.results_size(), 2);
  EXPECT_EQ(RowErrorText(response.results(0)), "NOT_FOUND SEQUENCE_NOT_FOUND");
  EXPECT_EQ(RowErrorText(response.results(1)), "OK");
  const std::vector<float> out = NumbersOf(response.out(), DType::kFloat32);
  const size_t half = out.size() / 2;
  for (size_t i = 0; i < half; ++i) EXPECT_EQ(out[i], 0.0F);
  const DenseAnswer expected = AttendDensely(Shape(), 0, Counting(0, 11), 10);
  EXPECT_LE(NormalizedSquaredError(absl::MakeConstSpan(out).subspan(half), expected.out),
            kToleranceFloat32);
}

// Policies by row, by call, and by sequence: the nearest one holds.
TEST_F(AttendTest, TheNearestPolicyHolds) {
  const v1::SequenceHandle handle = NewSequence(Counting(0, 300));
  v1::AttendRequest request = MakeAttend(served_.model(), handle, 1, 300, {300});
  EXPECT_EQ(Attend(request).results(0).selector(), v1::SELECTOR_DENSE);
  v1::Policy certified;
  certified.set_selector(v1::SELECTOR_CERTIFIED);
  certified.mutable_layers();
  certified.set_dense_below_tokens(0);
  *request.mutable_policy() = certified;
  request.set_return_selected(true);
  const v1::AttendResponse response = Attend(request);
  const v1::AttendRowResult& row = response.results(0);
  EXPECT_EQ(row.selector(), v1::SELECTOR_CERTIFIED);
  EXPECT_EQ(row.selected_size(), 2);
  for (const float bound : row.certificates().dropped_mass_upper()) EXPECT_LE(bound, 0.05F);
  request.mutable_rows(0)->mutable_policy()->set_name("dense");
  EXPECT_EQ(Attend(request).results(0).selector(), v1::SELECTOR_DENSE);
  request.mutable_rows(0)->mutable_policy()->set_name("mine");
  EXPECT_EQ(Attend(request).results(0).selector(), v1::SELECTOR_SCAN);
}

// The reply is built by hand around the output's memory and of rows that are bytes already: field
// for field what protobuf would write.
TEST(AttendReplyTest, BytesAreProtobufs) {
  const std::vector<int64_t> shape = {2, 3, 64};
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
    AttendRun run;
    run.output_dtype = dtype;
    AttendCall& call = run.call;
    call.q.shape = shape;
    for (int i = 0; i < 2 * 3 * 64; ++i) call.out.push_back(std::sin(static_cast<float>(i)));
    call.lse = {1, 2, 3, 4, 5, 6};
    v1::AttendResponse expected;
    expected.set_step_id(77);
    v1::AttendResponse head = expected;
    for (const uint32_t tokens : {9U, 300U}) {
      expected.add_results()->set_attended_tokens(tokens);
      run.row_bytes.push_back(expected.results().rbegin()->SerializeAsString());
    }
    std::vector<std::byte> out(call.out.size() * ElementBytes(dtype));
    for (size_t i = 0; i < call.out.size(); ++i) StoreElement(dtype, call.out[i], out.data(), i);
    *expected.mutable_out() = MakeTensor(dtype, shape, out);
    std::vector<std::byte> lse(call.lse.size() * sizeof(float));
    std::memcpy(lse.data(), call.lse.data(), lse.size());
    *expected.mutable_lse() = MakeTensor(DType::kFloat32, {2, 3}, lse);
    const size_t rows_bytes = RowFieldsBytes(run);
    const std::string bytes = TextOf(SerializeAttendReply(&head, &run));
    v1::AttendResponse rows;
    ASSERT_TRUE(rows.ParseFromString(bytes.substr(0, rows_bytes)));
    EXPECT_EQ(rows.SerializeAsString(), bytes.substr(0, rows_bytes));
    // Rows come first.
    v1::AttendResponse rest = expected;
    rest.clear_results();
    EXPECT_EQ(bytes.substr(rows_bytes), rest.SerializeAsString());
    ASSERT_TRUE(rows.ParseFromString(bytes));
    EXPECT_EQ(rows.SerializeAsString(), expected.SerializeAsString());
  }
}

}  // namespace
}  // namespace kvservice::testing
