// What a tenant learns about another's sequences: nothing. For every method that names a sequence,
// the answer about one that is another's is to the byte the answer about one that does not exist.

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/api_methods.h"
#include "tests/server/raw_call.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

constexpr uint32_t kLength = 70;
// Where nobody listens.
constexpr char kTarget[] = "unix:/nowhere";
constexpr char kNoDisk[] = "NO_DISK_TIER";
constexpr char kNotFound[] = "SEQUENCE_NOT_FOUND";

// Puts the handle wherever the message has one; false if it has none.
bool Name(const v1::SequenceHandle& handle, Message* message) {
  bool any = false;
  const google::protobuf::Reflection* const reflection = message->GetReflection();
  for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* const field = message->GetDescriptor()->field(i);
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) continue;
    if (field->is_repeated()) {
      for (int row = 0; row < reflection->FieldSize(*message, field); ++row) {
        any = Name(handle, reflection->MutableRepeatedMessage(message, field, row)) || any;
      }
    } else if (field->message_type() == v1::SequenceHandle::descriptor()) {
      reflection->MutableMessage(message, field)->CopyFrom(handle);
      any = true;
    }
  }
  return any;
}

struct Answer {
  grpc::Status status;
  std::string reply;
  // Everything that came back.
  std::string All() const {
    return std::to_string(status.error_code()) + "|" + status.error_message() + "|" +
           status.error_details() + "|" + reply;
  }
  bool SaysNotFound() const { return All().find(kNotFound) != std::string::npos; }
};

// Parameter: the victim's sequence is on disk.
class TenantTest : public ::testing::TestWithParam<bool> {
 protected:
  TenantTest() {
    ServedEngineOptions options;
    if (GetParam()) options.engine.data_directory = folder_.path();
    // Else a transfer would end before anybody looks for the sequence. The owner has no target.
    options.server.transfers.targets = {
        {.tenant = kOtherTenant, .endpoint = *ParseEndpoint(kTarget)}};
    served_ = std::make_unique<ServedEngine>(std::move(options));
    victim_ = served_->Connect();
    stranger_ = served_->ConnectAsOther();
  }

  v1::SequenceHandle NewSequence() {
    const auto sequences = v1::SequenceService::NewStub(victim_);
    v1::CreateRequest create;
    create.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_EQ(ErrorText(sequences->Create(NewContext().get(), create, &created)), "OK");
    const v1::SequenceHandle handle = created.sequence().handle();
    v1::AppendResponse appended;
    const auto context = NewContext();
    const auto writer = sequences->Append(context.get(), &appended);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      writer->Write(MakeAppend(served_->model(), handle, layer, 0, Counting(0, kLength)));
    }
    writer->WritesDone();
    EXPECT_EQ(ErrorText(writer->Finish()), "OK");
    if (GetParam()) {
      v1::SuspendRequest suspend;
      *suspend.mutable_handle() = handle;
      v1::SuspendResponse suspended;
      EXPECT_EQ(ErrorText(sequences->Suspend(NewContext().get(), suspend, &suspended)), "OK");
      EXPECT_EQ(suspended.sequence().tier(), v1::TIER_DISK);
    }
    return handle;
  }

  std::string Describe(const v1::SequenceHandle& handle) {
    v1::GetRequest request;
    *request.mutable_handle() = handle;
    v1::GetResponse response;
    EXPECT_EQ(ErrorText(v1::SequenceService::NewStub(victim_)->Get(NewContext().get(), request,
                                                                   &response)),
              "OK");
    return response.SerializeAsString();
  }

  // A request that would do something; nullptr if the method names no sequence.
  std::unique_ptr<Message> RequestOf(const ApiMethod& method, const v1::SequenceHandle& handle) {
    const google::protobuf::Descriptor* const type =
        google::protobuf::DescriptorPool::generated_pool()
            ->FindMethodByName(method.full_name)
            ->input_type();
    std::unique_ptr<Message> request(
        google::protobuf::MessageFactory::generated_factory()->GetPrototype(type)->New());
    if (type == v1::AppendRequest::descriptor()) {
      request->CopyFrom(MakeAppend(served_->model(), handle, 0, kLength, {kLength}));
    } else if (type == v1::AttendRequest::descriptor()) {
      request->CopyFrom(MakeAttend(served_->model(), handle, 0, kLength, {kLength}));
    } else if (!Name(handle, request.get())) {
      return nullptr;
    }
    EXPECT_TRUE(Name(handle, request.get()));
    if (const FieldDescriptor* const target = type->FindFieldByName("target_endpoint")) {
      request->GetReflection()->SetString(request.get(), target, kTarget);
    }
    return request;
  }

  Answer Ask(const std::shared_ptr<grpc::Channel>& channel, const ApiMethod& method,
             const v1::SequenceHandle& handle) {
    Answer answer;
    answer.status =
        CallRaw(channel, method.path, BytesOf(*RequestOf(method, handle)), &answer.reply);
    v1::AttendResponse attended;
    if (method.service == "AttentionService" && attended.ParseFromString(answer.reply)) {
      // Every call has another number.
      attended.clear_call_number();
      answer.reply = attended.SerializeAsString();
    }
    return answer;
  }

  TemporaryFolder folder_;
  std::unique_ptr<ServedEngine> served_;
  std::shared_ptr<grpc::Channel> victim_;
  std::shared_ptr<grpc::Channel> stranger_;
};

TEST_P(TenantTest, AnothersSequenceIsNoSequence) {
  int asked = 0;
  for (const ApiMethod& method : AllMethods()) {
    // Operators see all tenants' sequences.
    if (method.service == "AdminService") continue;
    const v1::SequenceHandle foreign = NewSequence();
    if (RequestOf(method, foreign) == nullptr) continue;
    v1::SequenceHandle missing = foreign;
    missing.mutable_id()->front() ^= 1;
    const std::string before = Describe(foreign);

    const Answer about_foreign = Ask(stranger_, method, foreign);
    const Answer about_missing = Ask(stranger_, method, missing);
    EXPECT_EQ(about_foreign.All(), about_missing.All()) << method.full_name;
    EXPECT_EQ(Describe(foreign), before) << method.full_name;
    if (about_missing.status.error_code() == grpc::StatusCode::UNIMPLEMENTED) continue;
    if (!GetParam() && ErrorOf(about_missing.status).reason == kNoDisk) continue;
    ++asked;
    EXPECT_TRUE(about_missing.SaysNotFound()) << method.full_name << about_missing.All();
    // The request is one that means something to the owner.
    EXPECT_FALSE(Ask(victim_, method, foreign).SaysNotFound()) << method.full_name;
  }
  EXPECT_GE(asked, GetParam() ? 12 : 10);
}

// A request id is another's too.
TEST_P(TenantTest, RequestIdsAreTheTenantsOwn) {
  v1::CreateRequest create;
  create.set_model(kModel);
  create.set_request_id("the same");
  v1::CreateResponse ours;
  v1::CreateResponse again;
  v1::CreateResponse theirs;
  const auto call = [&](const std::shared_ptr<grpc::Channel>& channel, v1::CreateResponse* made) {
    return ErrorText(
        v1::SequenceService::NewStub(channel)->Create(NewContext().get(), create, made));
  };
  EXPECT_EQ(call(victim_, &ours), "OK");
  EXPECT_EQ(call(victim_, &again), "OK");
  EXPECT_EQ(call(stranger_, &theirs), "OK");
  EXPECT_EQ(ours.sequence().handle().id(), again.sequence().handle().id());
  EXPECT_NE(ours.sequence().handle().id(), theirs.sequence().handle().id());
}

INSTANTIATE_TEST_SUITE_P(Where, TenantTest, ::testing::Bool(),
                         [](const ::testing::TestParamInfo<bool>& where) {
                           return where.param ? "OnDisk" : "InMemory";
                         });

}  // namespace
}  // namespace kvservice::testing
