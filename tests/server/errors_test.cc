// What a client that gets it wrong is told: code, reason and field, for every way of getting it
// wrong; and that nothing has changed and the server still answers.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/model.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/raw_call.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLength = 70;
constexpr char kAttend[] = "/kvservice.v1.AttentionService/Attend";
constexpr char kAppend[] = "/kvservice.v1.SequenceService/Append";

template <typename Number>
void PutNumber(v1::Tensor* tensor, size_t index, Number number) {
  std::memcpy(tensor->mutable_data()->data() + index * sizeof(number), &number, sizeof(number));
}

void SetShape(v1::Tensor* tensor, const std::vector<int64_t>& shape) {
  tensor->mutable_shape()->Clear();
  tensor->mutable_shape()->Add(shape.begin(), shape.end());
}

// bfloat16 patterns.
constexpr uint16_t kBf16NaN = 0x7fc0;
constexpr uint16_t kBf16Infinity = 0x7f80;

class ErrorsTest : public ::testing::Test {
 protected:
  ErrorsTest()
      : channel_(served_.Connect()),
        attention_(v1::AttentionService::NewStub(channel_)),
        sequences_(v1::SequenceService::NewStub(channel_)),
        models_(v1::ModelService::NewStub(channel_)) {
    v1::CreateRequest create;
    create.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_EQ(ErrorText(sequences_->Create(NewContext().get(), create, &created)), "OK");
    handle_ = created.sequence().handle();
    for (uint32_t layer = 0; layer < 2; ++layer) {
      EXPECT_EQ(ErrorText(Append({MakeAppend(layer, 0, Counting(0, kLength))})), "OK");
    }
  }

  v1::AppendRequest MakeAppend(uint32_t layer, uint32_t position, const Words& words) const {
    return testing::MakeAppend(served_.model(), handle_, layer, position, words);
  }
  v1::AttendRequest MakeAttend() const {
    return testing::MakeAttend(served_.model(), handle_, 0, kLength, {kLength});
  }

  grpc::Status Append(const std::vector<v1::AppendRequest>& messages) {
    v1::AppendResponse response;
    const std::unique_ptr<grpc::ClientContext> context = NewContext();
    const auto writer = sequences_->Append(context.get(), &response);
    for (const v1::AppendRequest& message : messages) {
      if (!writer->Write(message)) break;
    }
    writer->WritesDone();
    return writer->Finish();
  }

  // Error of the call, or of its first row.
  std::string AttendError(const v1::AttendRequest& request) {
    v1::AttendResponse response;
    const grpc::Status status = attention_->Attend(NewContext().get(), request, &response);
    if (!status.ok()) return ErrorText(status);
    EXPECT_EQ(response.results_size(), request.rows_size());
    return "row: " + RowErrorText(response.results(0));
  }

  // Everything a caller and an operator can see of the state, as text.
  std::string State() {
    v1::GetRequest get;
    *get.mutable_handle() = handle_;
    v1::GetResponse got;
    EXPECT_EQ(ErrorText(sequences_->Get(NewContext().get(), get, &got)), "OK");
    got.mutable_sequence()->clear_lease_remaining_ms();
    const EngineStats stats = served_.engine()->Stats();
    return got.ShortDebugString() + " pool " + std::to_string(stats.pool_bytes_used) + " blocks " +
           std::to_string(stats.blocks_used) + " sequences " + std::to_string(stats.sequences) +
           " models " + std::to_string(stats.models);
  }

  ServedEngine served_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::AttentionService::Stub> attention_;
  std::unique_ptr<v1::SequenceService::Stub> sequences_;
  std::unique_ptr<v1::ModelService::Stub> models_;
  v1::SequenceHandle handle_;
};

struct AttendCase {
  const char* name;
  std::function<void(v1::AttendRequest* request)> spoil;
  const char* expected;
};

std::vector<AttendCase> TensorCases() {
  using Request = v1::AttendRequest;
  return {
      {"unknown dtype",
       [](Request* r) { r->mutable_q()->set_dtype(static_cast<v1::DataType>(99)); },
       "INVALID_ARGUMENT TENSOR_DTYPE_UNKNOWN q.dtype"},
      {"no dtype", [](Request* r) { r->mutable_v()->set_dtype(v1::DATA_TYPE_UNSPECIFIED); },
       "INVALID_ARGUMENT TENSOR_DTYPE_UNKNOWN v.dtype"},
      {"no tensor", [](Request* r) { r->clear_q(); },
       "INVALID_ARGUMENT TENSOR_DTYPE_UNKNOWN q.dtype"},
      {"wrong dtype of the same size",
       [](Request* r) { r->mutable_k()->set_dtype(v1::DATA_TYPE_FLOAT16); },
       "INVALID_ARGUMENT TENSOR_DTYPE_MISMATCH k"},
      {"no shape", [](Request* r) { r->mutable_q()->clear_shape(); },
       "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q.shape"},
      {"extent 0", [](Request* r) { r->mutable_k()->set_shape(0, 0); },
       "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH k.shape"},
      {"extent -1", [](Request* r) { r->mutable_k()->set_shape(1, -1); },
       "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH k.shape"},
      {"smallest extent",
       [](Request* r) { r->mutable_k()->set_shape(2, std::numeric_limits<int64_t>::min()); },
       "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH k.shape"},
      {"nine extents",
       [](Request* r) {
         SetShape(r->mutable_q(), {1, 1, 1, 1, 1, 1, 1, 4, 64});
       },
       "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q.shape"},
      {"two extents, right size",
       [](Request* r) {
         SetShape(r->mutable_q(), {4, 64});
       },
       "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q"},
      {"other extents, right size",
       [](Request* r) {
         SetShape(r->mutable_q(), {1, 2, 128});
       },
       "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH q"},
  };
}

std::vector<AttendCase> SizeCases() {
  using Request = v1::AttendRequest;
  return {
      {"product wraps to 0",
       [](Request* r) {
         SetShape(r->mutable_q(), {int64_t{1} << 32, int64_t{1} << 32, 1});
       },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q.data"},
      {"product wraps to the right size",
       [](Request* r) {
         SetShape(r->mutable_q(), {(int64_t{1} << 62) + 1, 4, 64});
       },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q.data"},
      {"largest extent",
       [](Request* r) { r->mutable_v()->set_shape(0, std::numeric_limits<int64_t>::max()); },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH v.data"},
      {"extent 2^31", [](Request* r) { r->mutable_v()->set_shape(0, int64_t{1} << 31); },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH v.data"},
      {"a byte short", [](Request* r) { r->mutable_q()->mutable_data()->pop_back(); },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q.data"},
      {"a byte more", [](Request* r) { r->mutable_k()->mutable_data()->push_back('x'); },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH k.data"},
      {"region", [](Request* r) { r->mutable_q()->mutable_region()->set_length_bytes(1024); },
       "INVALID_ARGUMENT TENSOR_REGION_NOT_SERVED q.region"},
      {"k without v", [](Request* r) { r->clear_v(); }, "INVALID_ARGUMENT TENSOR_MISSING v"},
      {"v without k", [](Request* r) { r->clear_k(); }, "INVALID_ARGUMENT TENSOR_MISSING k"},
      {"NaN in q",
       [](Request* r) { PutNumber(r->mutable_q(), 7, std::numeric_limits<float>::quiet_NaN()); },
       "row: INVALID_ARGUMENT TENSOR_NOT_FINITE q"},
      {"infinity in k", [](Request* r) { PutNumber(r->mutable_k(), 127, kBf16Infinity); },
       "row: INVALID_ARGUMENT TENSOR_NOT_FINITE k"},
      {"NaN in v", [](Request* r) { PutNumber(r->mutable_v(), 0, kBf16NaN); },
       "row: INVALID_ARGUMENT TENSOR_NOT_FINITE v"},
      {"unknown output type",
       [](Request* r) { r->set_output_dtype(static_cast<v1::DataType>(-1)); },
       "INVALID_ARGUMENT TENSOR_DTYPE_UNKNOWN output_dtype"},
  };
}

std::vector<AttendCase> RowCases() {
  using Request = v1::AttendRequest;
  return {
      {"no rows", [](Request* r) { r->clear_rows(); }, "INVALID_ARGUMENT ROWS_MISSING rows"},
      {"short id", [](Request* r) { r->mutable_rows(0)->mutable_handle()->set_id("short"); },
       "INVALID_ARGUMENT HANDLE_MALFORMED rows[0].handle.id"},
      {"no handle", [](Request* r) { r->mutable_rows(0)->clear_handle(); },
       "INVALID_ARGUMENT HANDLE_MALFORMED rows[0].handle.id"},
      {"unknown id",
       [](Request* r) { r->mutable_rows(0)->mutable_handle()->mutable_id()->front() ^= 1; },
       "row: NOT_FOUND SEQUENCE_NOT_FOUND"},
      {"stale generation",
       [](Request* r) { r->mutable_rows(0)->mutable_handle()->set_generation(0); },
       "row: FAILED_PRECONDITION GENERATION_MISMATCH rows[0].handle.generation"},
      {"gap", [](Request* r) { r->mutable_rows(0)->set_position(kLength + 1); },
       "row: OUT_OF_RANGE POSITION_GAP rows[0].position"},
      {"last position", [](Request* r) { r->mutable_rows(0)->set_position(UINT32_MAX); },
       "row: OUT_OF_RANGE POSITION_GAP rows[0].position"},
      {"other bytes than stored", [](Request* r) { r->mutable_rows(0)->set_position(3); },
       "row: FAILED_PRECONDITION APPEND_CONFLICT rows[0].position"},
      {"layer", [](Request* r) { r->set_layer(2); }, "INVALID_ARGUMENT LAYER_OUT_OF_RANGE layer"},
      {"given offsets",
       [](Request* r) {
         r->mutable_policy()->set_selector(v1::SELECTOR_GIVEN);
         r->mutable_policy()->mutable_layers();
         r->mutable_policy()->set_dense_below_tokens(0);
         r->mutable_rows(0)->add_given_offsets(9);
       },
       "row: INVALID_ARGUMENT GIVEN_INVALID rows[0].given_offsets"},
  };
}

std::vector<AttendCase> PolicyCases() {
  using Request = v1::AttendRequest;
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  return {
      {"unknown policy", [](Request* r) { r->mutable_policy()->set_name("fastest"); },
       "NOT_FOUND POLICY_NOT_FOUND policy.name"},
      {"name and more",
       [](Request* r) {
         r->mutable_policy()->set_name("dense");
         r->mutable_policy()->set_mode(v1::MODE_SHADOW);
       },
       "INVALID_ARGUMENT POLICY_INVALID policy.name"},
      {"unknown selector",
       [](Request* r) {
         r->mutable_rows(0)->mutable_policy()->set_selector(static_cast<v1::Selector>(77));
       },
       "INVALID_ARGUMENT POLICY_INVALID rows[0].policy.selector"},
      {"unknown selector of a layer",
       [](Request* r) {
         r->mutable_policy()->mutable_layers()->add_overrides()->set_selector(
             static_cast<v1::Selector>(-3));
       },
       "INVALID_ARGUMENT POLICY_INVALID policy.layers.overrides[0].selector"},
      {"unknown guarantee",
       [](Request* r) { r->mutable_policy()->set_guarantee(static_cast<v1::Guarantee>(9)); },
       "INVALID_ARGUMENT POLICY_INVALID policy.guarantee"},
      {"limit NaN", [nan](Request* r) { r->mutable_policy()->set_max_dropped_mass(nan); },
       "INVALID_ARGUMENT POLICY_INVALID policy.max_dropped_mass"},
      {"limit 0", [](Request* r) { r->mutable_policy()->set_max_dropped_mass(0); },
       "INVALID_ARGUMENT POLICY_INVALID policy.max_dropped_mass"},
      {"output error NaN", [nan](Request* r) { r->mutable_policy()->set_max_output_error(nan); },
       "INVALID_ARGUMENT POLICY_INVALID policy.max_output_error"},
      {"output error without end",
       [](Request* r) {
         r->mutable_policy()->set_max_output_error(std::numeric_limits<float>::infinity());
       },
       "INVALID_ARGUMENT POLICY_INVALID policy.max_output_error"},
      {"output error below 0", [](Request* r) { r->mutable_policy()->set_max_output_error(-0.1F); },
       "INVALID_ARGUMENT POLICY_INVALID policy.max_output_error"},
      {"too many draws", [](Request* r) { r->mutable_policy()->set_draws_max(4097); },
       "INVALID_ARGUMENT POLICY_INVALID policy.draws_max"},
      {"tokens read", [](Request* r) { r->mutable_policy()->set_max_tokens_read(100); },
       "INVALID_ARGUMENT NOT_SERVED policy.max_tokens_read"},
      {"certain failure", [](Request* r) { r->mutable_policy()->set_failure_probability(1.0); },
       "INVALID_ARGUMENT POLICY_INVALID policy.failure_probability"},
  };
}

std::vector<AttendCase> BudgetAndLayerCases() {
  using Request = v1::AttendRequest;
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  return {
      {"cosines of other heads",
       [](Request* r) {
         v1::Policy* policy = r->mutable_policy();
         policy->set_selector(v1::SELECTOR_CIS);
         v1::LayerOverride* layers = policy->mutable_layers()->add_overrides();
         layers->set_layer_end(1);
         for (int i = 0; i < 3; ++i) layers->add_kv_head_min_cosines(0.5F);
       },
       "INVALID_ARGUMENT POLICY_INVALID policy.layers[0].kv_head_min_cosines"},
      {"nothing is kept",
       [](Request* r) {
         r->mutable_policy()->set_selector(v1::SELECTOR_SCAN);
         r->mutable_policy()->mutable_budget()->set_top_k_tokens(0);
       },
       "INVALID_ARGUMENT POLICY_INVALID policy.budget.top_k"},
      {"estimate of all",
       [](Request* r) { r->mutable_policy()->mutable_budget()->set_max_dropped_mass_estimate(1); },
       "INVALID_ARGUMENT POLICY_INVALID policy.budget.max_dropped_mass_estimate"},
      {"share NaN",
       [nan](Request* r) {
         v1::LayerOverride* layers = r->mutable_policy()->mutable_layers()->add_overrides();
         layers->set_layer_end(1);
         layers->set_hidden_share(nan);
       },
       "INVALID_ARGUMENT POLICY_INVALID policy.layers[0].hidden_share"},
  };
}

TEST_F(ErrorsTest, AttendSaysWhatIsWrongAndChangesNothing) {
  const std::string before = State();
  for (const auto& cases :
       {TensorCases(), SizeCases(), RowCases(), PolicyCases(), BudgetAndLayerCases()}) {
    for (const AttendCase& one : cases) {
      SCOPED_TRACE(one.name);
      v1::AttendRequest request = MakeAttend();
      one.spoil(&request);
      EXPECT_EQ(AttendError(request), one.expected);
      EXPECT_EQ(State(), before);
    }
  }
  EXPECT_EQ(AttendError(MakeAttend()), "row: OK");
}

TEST_F(ErrorsTest, NineQueryTokensAreTooMany) {
  const std::string before = State();
  EXPECT_EQ(AttendError(testing::MakeAttend(served_.model(), handle_, 0, kLength,
                                            Counting(kLength, kQueryTokensMax + 1))),
            "row: INVALID_ARGUMENT QUERY_COUNT_OUT_OF_RANGE rows[0].query_count");
  EXPECT_EQ(State(), before);
}

TEST_F(ErrorsTest, TooManyRowsAreRefusedAsAWhole) {
  const std::string before = State();
  v1::AttendRequest request = MakeAttend();
  for (int i = 0; i < 300; ++i) *request.add_rows() = request.rows(0);
  EXPECT_EQ(AttendError(request).substr(0, 16), "INVALID_ARGUMENT");
  EXPECT_EQ(State(), before);
}

TEST_F(ErrorsTest, AppendSaysWhatIsWrongAndChangesNothing) {
  struct Case {
    const char* name;
    std::function<void(v1::AppendRequest*)> spoil;
    const char* expected;
  };
  using Request = v1::AppendRequest;
  const std::vector<Case> cases = {
      {"gap", [](Request* r) { r->set_position(kLength + 5); },
       "OUT_OF_RANGE POSITION_GAP position"},
      {"other bytes than stored", [](Request* r) { r->set_position(0); },
       "FAILED_PRECONDITION APPEND_CONFLICT position"},
      {"stale generation", [](Request* r) { r->mutable_handle()->set_generation(99); },
       "FAILED_PRECONDITION GENERATION_MISMATCH handle.generation"},
      {"unknown id", [](Request* r) { r->mutable_handle()->mutable_id()->front() ^= 1; },
       "NOT_FOUND SEQUENCE_NOT_FOUND"},
      {"long id", [](Request* r) { r->mutable_handle()->mutable_id()->push_back('x'); },
       "INVALID_ARGUMENT HANDLE_MALFORMED handle.id"},
      {"layer", [](Request* r) { r->set_layer(7); }, "INVALID_ARGUMENT LAYER_OUT_OF_RANGE layer"},
      {"no v", [](Request* r) { r->clear_v(); }, "INVALID_ARGUMENT TENSOR_DTYPE_UNKNOWN v.dtype"},
      {"k and v of different lengths",
       [](Request* r) {
         r->mutable_v()->set_shape(0, 1);
         r->mutable_v()->mutable_data()->resize(r->v().data().size() / 3);
       },
       "INVALID_ARGUMENT TENSOR_SHAPE_MISMATCH v"},
      {"wrapped size", [](Request* r) { r->mutable_k()->set_shape(0, 3 + (int64_t{1} << 56)); },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH k.data"},
      {"infinity", [](Request* r) { PutNumber(r->mutable_k(), 200, kBf16Infinity); },
       "INVALID_ARGUMENT TENSOR_NOT_FINITE k"},
      {"positions of no sample", [](Request* r) { r->add_query_sample_positions(kLength); },
       "INVALID_ARGUMENT QUERY_SAMPLE_POSITIONS_INVALID query_sample_positions"},
  };
  const std::string before = State();
  for (const Case& one : cases) {
    SCOPED_TRACE(one.name);
    v1::AppendRequest message = MakeAppend(0, kLength, Counting(kLength, 3));
    one.spoil(&message);
    EXPECT_EQ(ErrorText(Append({message})), one.expected);
    EXPECT_EQ(State(), before);
  }
  EXPECT_EQ(ErrorText(Append({})), "INVALID_ARGUMENT APPEND_EMPTY handle");
  EXPECT_EQ(ErrorText(Append({MakeAppend(0, kLength, {kLength})})), "OK");
}

TEST_F(ErrorsTest, SequenceCallsSayWhatIsWrong) {
  const auto foreign = v1::SequenceService::NewStub(served_.ConnectAsOther());
  v1::SequenceHandle unknown = handle_;
  unknown.mutable_id()->front() ^= 1;
  const std::string before = State();

  v1::CreateRequest create;
  v1::CreateResponse created;
  create.set_model("no such model");
  EXPECT_EQ(ErrorText(sequences_->Create(NewContext().get(), create, &created)),
            "NOT_FOUND MODEL_NOT_FOUND model");
  create.set_model(kModel);
  create.set_request_id(std::string(65, 'r'));
  EXPECT_EQ(ErrorText(sequences_->Create(NewContext().get(), create, &created)),
            "INVALID_ARGUMENT REQUEST_ID_TOO_LONG request_id");
  create.clear_request_id();
  create.mutable_policy()->mutable_cis()->set_min_cosine(2);
  EXPECT_EQ(ErrorText(sequences_->Create(NewContext().get(), create, &created)),
            "INVALID_ARGUMENT POLICY_INVALID policy.cis.min_cosine");

  v1::ForkRequest fork;
  v1::ForkResponse forked;
  *fork.mutable_handle() = handle_;
  fork.set_length_tokens(kLength + 1);
  EXPECT_EQ(ErrorText(sequences_->Fork(NewContext().get(), fork, &forked)),
            "OUT_OF_RANGE LENGTH_OUT_OF_RANGE length_tokens");

  v1::TruncateRequest truncate;
  v1::TruncateResponse truncated;
  *truncate.mutable_handle() = handle_;
  truncate.mutable_handle()->set_generation(77);
  const RpcError stale = ErrorOf(sequences_->Truncate(NewContext().get(), truncate, &truncated));
  EXPECT_EQ(stale.reason, "GENERATION_MISMATCH");
  EXPECT_EQ(stale.metadata.at("current_generation"), std::to_string(handle_.generation()));
  EXPECT_EQ(State(), before);
}

// Whatever another tenant tries with a handle, it learns nothing, not even that the sequence
// exists.
TEST_F(ErrorsTest, ForeignHandlesLookLikeUnknownOnes) {
  const auto other_channel = served_.ConnectAsOther();
  const std::string before = State();
  v1::SequenceHandle unknown = handle_;
  unknown.mutable_id()->front() ^= 1;
  // As the other tenant: the handle of somebody else's sequence, and one that nobody has.
  const auto both = [&](const std::string& method, const auto& make) {
    SCOPED_TRACE(method);
    const grpc::Status foreign = CallRaw(other_channel, method, BytesOf(make(handle_)));
    const grpc::Status missing = CallRaw(other_channel, method, BytesOf(make(unknown)));
    EXPECT_EQ(ErrorText(foreign), "NOT_FOUND SEQUENCE_NOT_FOUND");
    EXPECT_EQ(foreign.error_message(), missing.error_message());
    EXPECT_EQ(foreign.error_details(), missing.error_details());
  };
  const auto with_handle = [](const auto& request) {
    return [request](const v1::SequenceHandle& handle) {
      auto copy = request;
      *copy.mutable_handle() = handle;
      return copy;
    };
  };
  const std::string service = "/kvservice.v1.SequenceService/";
  both(service + "Get", with_handle(v1::GetRequest()));
  both(service + "Fork", with_handle(v1::ForkRequest()));
  both(service + "Truncate", with_handle(v1::TruncateRequest()));
  both(service + "RenewLease", with_handle(v1::RenewLeaseRequest()));
  both(service + "Drop", with_handle(v1::DropRequest()));
  both(service + "Append", with_handle(MakeAppend(0, kLength, {kLength})));

  const auto other = v1::AttentionService::NewStub(other_channel);
  v1::AttendResponse response;
  ASSERT_TRUE(other->Attend(NewContext().get(), MakeAttend(), &response).ok());
  EXPECT_EQ(RowErrorText(response.results(0)), "NOT_FOUND SEQUENCE_NOT_FOUND");
  EXPECT_EQ(State(), before);
}

TEST_F(ErrorsTest, MalformedMessagesGetATypedError) {
  const std::string before = State();
  for (const char* method : {kAttend, kAppend, "/kvservice.v1.SequenceService/Get",
                             "/kvservice.v1.ModelService/Register"}) {
    EXPECT_EQ(ErrorText(CallRaw(channel_, method, BytesOf(std::string("\xff\xff\xff nonsense")))),
              "INVALID_ARGUMENT MESSAGE_MALFORMED")
        << method;
  }
  EXPECT_EQ(State(), before);
}

// 2 GiB of anything: gRPC refuses it after the length, long before it is received.
TEST_F(ErrorsTest, OversizedMessagesAreRefused) {
  const std::string before = State();
  for (const size_t mebibytes : {size_t{65}, size_t{2048}}) {
    for (const char* method : {kAttend, kAppend, "/kvservice.v1.SequenceService/Create",
                               "/kvservice.v1.ModelService/Register"}) {
      const grpc::Status status = CallRaw(channel_, method, ManyMebibytes(mebibytes));
      EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
          << method << " " << mebibytes << ": " << status.error_message();
      EXPECT_EQ(State(), before);
    }
  }
}

TEST_F(ErrorsTest, ModelsAreCheckedFieldByField) {
  struct Case {
    std::function<void(v1::Model*)> spoil;
    const char* expected;
  };
  const std::vector<Case> cases = {
      {[](v1::Model* m) { m->clear_name(); }, "INVALID_ARGUMENT MODEL_INVALID model.name"},
      {[](v1::Model* m) { m->set_layer_count(0); },
       "INVALID_ARGUMENT MODEL_INVALID model.layer_count"},
      {[](v1::Model* m) { m->set_layer_count(UINT32_MAX); },
       "INVALID_ARGUMENT MODEL_INVALID model.layer_count"},
      {[](v1::Model* m) { m->set_kv_head_count(UINT32_MAX); },
       "INVALID_ARGUMENT MODEL_INVALID model.kv_head_count"},
      {[](v1::Model* m) { m->set_head_dim(65); }, "INVALID_ARGUMENT MODEL_INVALID model.head_dim"},
      {[](v1::Model* m) { m->set_cache_dtype(v1::DATA_TYPE_UNSPECIFIED); },
       "INVALID_ARGUMENT TENSOR_DTYPE_UNKNOWN model.cache_dtype"},
      {[](v1::Model* m) { m->set_scale(std::numeric_limits<float>::infinity()); },
       "INVALID_ARGUMENT MODEL_INVALID model.scale"},
      {[](v1::Model* m) { m->set_rotary_style(static_cast<v1::RotaryStyle>(12)); },
       "INVALID_ARGUMENT MODEL_INVALID model.rotary_style"},
      {[](v1::Model* m) {
         m->add_sliding_window_tokens(3);
         m->add_sliding_window_tokens(3);
       },
       "INVALID_ARGUMENT MODEL_INVALID model.sliding_window_tokens"},
      {[](v1::Model* m) { m->mutable_sketch_tables()->add_metric(1); },
       "INVALID_ARGUMENT MODEL_INVALID model.sketch_tables.metric"},
      {[](v1::Model* m) { m->mutable_default_policy()->set_name("?"); },
       "NOT_FOUND POLICY_NOT_FOUND model.default_policy.name"},
      {[](v1::Model* m) { m->mutable_default_policy()->mutable_psaw()->set_phi(-1); },
       "INVALID_ARGUMENT MODEL_INVALID model.default_policy.psaw.phi"},
  };
  const std::string before = State();
  for (const Case& one : cases) {
    v1::RegisterRequest request;
    v1::Model* const model = request.mutable_model();
    model->set_name("another");
    model->set_layer_count(1);
    model->set_query_head_count(2);
    model->set_kv_head_count(1);
    model->set_head_dim(64);
    model->set_cache_dtype(v1::DATA_TYPE_FLOAT16);
    model->set_scale(0.125F);
    one.spoil(model);
    v1::RegisterResponse response;
    EXPECT_EQ(ErrorText(models_->Register(NewContext().get(), request, &response)), one.expected);
    EXPECT_EQ(State(), before);
  }
}

// Requests above the limit for all of them together are turned away with a hint when to come back,
// and nothing sticks.
TEST(OverloadTest, RequestBytesAreBounded) {
  ServedEngineOptions options;
  options.server.requests_bytes_max = 4096;
  ServedEngine served(std::move(options));
  const auto channel = served.Connect();
  const auto sequences = v1::SequenceService::NewStub(channel);
  v1::CreateRequest create;
  create.set_model(kModel);
  v1::CreateResponse created;
  for (int round = 0; round < 3; ++round) {
    const RpcError error = ErrorOf(CallRaw(channel, kAttend, ManyMebibytes(1)));
    EXPECT_EQ(error.code, grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_EQ(error.reason, "OVERLOADED");
    EXPECT_GT(error.retry_delay_ms, 0U);
    EXPECT_EQ(ErrorOf(CallRaw(channel, kAppend, ManyMebibytes(1))).reason, "OVERLOADED");
    EXPECT_EQ(ErrorText(sequences->Create(NewContext().get(), create, &created)), "OK");
  }
}

}  // namespace
}  // namespace kvservice::testing
