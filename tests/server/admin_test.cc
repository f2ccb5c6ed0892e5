// The admin side: what it tells, what it does to sequences of any tenant.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "kvservice/v1/admin.grpc.pb.h"
#include "kvservice/v1/model.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

class AdminTest : public ::testing::Test {
 protected:
  AdminTest()
      : admin_(v1::AdminService::NewStub(served_.ConnectAdmin())),
        ours_(v1::SequenceService::NewStub(served_.Connect())),
        theirs_(v1::SequenceService::NewStub(served_.ConnectAsOther())) {}

  static v1::SequenceHandle NewSequence(v1::SequenceService::Stub* sequences) {
    v1::CreateRequest request;
    request.set_model(kModel);
    v1::CreateResponse response;
    EXPECT_EQ(ErrorText(sequences->Create(NewContext().get(), request, &response)), "OK");
    return response.sequence().handle();
  }

  v1::ListSequencesResponse List(int32_t page_size, const std::string& token,
                                 const std::string& tenant = "") {
    v1::ListSequencesRequest request;
    request.set_page_size(page_size);
    request.set_page_token(token);
    request.set_tenant(tenant);
    v1::ListSequencesResponse response;
    EXPECT_EQ(ErrorText(admin_->ListSequences(NewContext().get(), request, &response)), "OK");
    return response;
  }

  ServedEngine served_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
  std::unique_ptr<v1::SequenceService::Stub> ours_;
  std::unique_ptr<v1::SequenceService::Stub> theirs_;
};

TEST_F(AdminTest, TellsWhatItIs) {
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(admin_->GetServerInfo(NewContext().get(), {}, &info).ok());
  EXPECT_FALSE(info.version().empty());
  EXPECT_FALSE(info.build().empty());
  EXPECT_EQ(info.device(), served_.engine()->device_name());
  EXPECT_FALSE(info.instruction_set().empty());
  EXPECT_EQ(info.libraries().at("grpc").substr(0, 2), "1.");
  EXPECT_NE(info.epoch(), 0U);
  EXPECT_EQ(info.limits().at("pool_bytes"), TestEngine::SmallOptions().pool_bytes);
  EXPECT_FALSE(info.draining());
  served_.clock()->AdvanceMs(1234);
  const uint64_t before_ms = info.uptime_ms();
  ASSERT_TRUE(admin_->GetServerInfo(NewContext().get(), {}, &info).ok());
  EXPECT_EQ(info.uptime_ms(), before_ms + 1234);
}

TEST_F(AdminTest, CountsWhatIsThere) {
  const v1::SequenceHandle handle = NewSequence(ours_.get());
  v1::AppendResponse appended;
  const auto context = NewContext();
  const auto writer = ours_->Append(context.get(), &appended);
  writer->Write(MakeAppend(served_.model(), handle, 0, 0, Counting(0, 65)));
  writer->WritesDone();
  ASSERT_TRUE(writer->Finish().ok());
  v1::GetStatsResponse stats;
  ASSERT_TRUE(admin_->GetStats(NewContext().get(), {}, &stats).ok());
  EXPECT_EQ(stats.sequence_count(), 1U);
  EXPECT_EQ(stats.model_count(), 1U);
  EXPECT_EQ(stats.block_count(), 2U);
  EXPECT_EQ(stats.pool_used_bytes(), 2 * BlockBytes(served_.model()));
  EXPECT_GE(stats.calls_total(), 3U);
}

TEST_F(AdminTest, ListsSequencesPageByPage) {
  std::set<std::string> expected;
  for (int i = 0; i < 3; ++i) expected.insert(NewSequence(ours_.get()).id());
  for (int i = 0; i < 2; ++i) expected.insert(NewSequence(theirs_.get()).id());
  std::vector<std::string> listed;
  std::string token;
  do {
    const v1::ListSequencesResponse page = List(2, token);
    EXPECT_LE(page.sequences_size(), 2);
    for (const v1::Sequence& sequence : page.sequences()) listed.push_back(sequence.handle().id());
    token = page.next_page_token();
  } while (!token.empty());
  EXPECT_EQ(listed, std::vector<std::string>(expected.begin(), expected.end()));
  EXPECT_EQ(List(0, "").sequences_size(), 5);

  const v1::ListSequencesResponse of_other = List(0, "", kOtherTenant);
  EXPECT_EQ(of_other.sequences_size(), 2);
  for (const v1::Sequence& sequence : of_other.sequences()) {
    EXPECT_EQ(sequence.tenant(), kOtherTenant);
  }
  EXPECT_EQ(List(0, "", "nobody").sequences_size(), 0);

  v1::ListSequencesRequest request;
  v1::ListSequencesResponse response;
  request.set_page_size(-1);
  EXPECT_EQ(ErrorText(admin_->ListSequences(NewContext().get(), request, &response)),
            "INVALID_ARGUMENT PAGE_SIZE_NEGATIVE page_size");
  request.set_page_size(1);
  request.set_page_token("zz");
  EXPECT_EQ(ErrorText(admin_->ListSequences(NewContext().get(), request, &response)),
            "INVALID_ARGUMENT PAGE_TOKEN_INVALID page_token");
}

TEST_F(AdminTest, SetsWhatATenantMayUseAndShowsWhatItUses) {
  const v1::SequenceHandle handle = NewSequence(theirs_.get());
  const auto append = [&](uint32_t position, uint32_t count) {
    v1::AppendResponse appended;
    const auto context = NewContext();
    const auto writer = theirs_->Append(context.get(), &appended);
    for (uint32_t layer = 0; layer < served_.model().layer_count; ++layer) {
      writer->Write(
          MakeAppend(served_.model(), handle, layer, position, Counting(position, count)));
    }
    writer->WritesDone();
    return ErrorText(writer->Finish());
  };
  const uint64_t block_bytes = BlockBytes(served_.model());
  v1::SetQuotaRequest request;
  v1::SetQuotaResponse set;
  request.set_tenant(kOtherTenant);
  request.mutable_quota()->set_pool_bytes_max(2 * block_bytes);
  request.mutable_quota()->set_pool_bytes_reserved(block_bytes);
  request.mutable_quota()->set_disk_bytes_max(0);
  ASSERT_EQ(ErrorText(admin_->SetQuota(NewContext().get(), request, &set)), "OK");
  EXPECT_EQ(append(0, 100), "OK");
  EXPECT_EQ(append(100, 100), "RESOURCE_EXHAUSTED TENANT_QUOTA");

  v1::ListTenantsRequest ask;
  v1::ListTenantsResponse listed;
  ask.set_page_size(1);
  NewSequence(ours_.get());
  ASSERT_EQ(ErrorText(admin_->ListTenants(NewContext().get(), ask, &listed)), "OK");
  ASSERT_EQ(listed.tenants_size(), 1);
  const v1::TenantUsage usage = listed.tenants(0);
  EXPECT_EQ(usage.tenant(), kOtherTenant);
  EXPECT_EQ(usage.sequence_count(), 1U);
  EXPECT_EQ(usage.block_count(), 2U);
  EXPECT_EQ(usage.pool_used_bytes(), 2 * block_bytes);
  EXPECT_TRUE(usage.temporary());
  EXPECT_EQ(usage.quota().SerializeAsString(), request.quota().SerializeAsString());
  ask.set_page_token(listed.next_page_token());
  ASSERT_EQ(ErrorText(admin_->ListTenants(NewContext().get(), ask, &listed)), "OK");
  ASSERT_EQ(listed.tenants_size(), 1);
  EXPECT_EQ(listed.tenants(0).tenant(), ListenAddress::kDefaultTenant);
  EXPECT_FALSE(listed.tenants(0).temporary());
  EXPECT_EQ(listed.next_page_token(), "");

  request.clear_quota();
  ASSERT_EQ(ErrorText(admin_->SetQuota(NewContext().get(), request, &set)), "OK");
  EXPECT_FALSE(set.usage().temporary());
  EXPECT_FALSE(set.usage().quota().has_pool_bytes_max());
  EXPECT_EQ(append(100, 100), "OK");
  request.set_tenant("no name");
  EXPECT_EQ(ErrorText(admin_->SetQuota(NewContext().get(), request, &set)),
            "INVALID_ARGUMENT TENANT_INVALID tenant");
  request.set_tenant("a");
  request.mutable_quota()->set_pool_bytes_reserved(UINT64_MAX);
  EXPECT_EQ(ErrorText(admin_->SetQuota(NewContext().get(), request, &set)),
            "INVALID_ARGUMENT QUOTA_INVALID quota.pool_bytes_reserved");
  ask.set_page_size(-1);
  EXPECT_EQ(ErrorText(admin_->ListTenants(NewContext().get(), ask, &listed)),
            "INVALID_ARGUMENT PAGE_SIZE_NEGATIVE page_size");
}

TEST_F(AdminTest, DescribesAndEvictsSequencesOfAnyTenant) {
  const v1::SequenceHandle handle = NewSequence(theirs_.get());
  NewSequence(ours_.get());
  v1::DescribeSequenceRequest describe;
  describe.set_id(handle.id());
  v1::DescribeSequenceResponse described;
  ASSERT_EQ(ErrorText(admin_->DescribeSequence(NewContext().get(), describe, &described)), "OK");
  EXPECT_EQ(described.sequence().tenant(), kOtherTenant);
  EXPECT_EQ(described.sequence().handle().id(), handle.id());

  v1::EvictRequest evict;
  evict.set_id(handle.id());
  evict.set_expected_generation(handle.generation() + 1);
  v1::EvictResponse evicted;
  EXPECT_EQ(ErrorText(admin_->Evict(NewContext().get(), evict, &evicted)),
            "FAILED_PRECONDITION GENERATION_MISMATCH expected_generation");
  evict.set_expected_generation(handle.generation());
  EXPECT_EQ(ErrorText(admin_->Evict(NewContext().get(), evict, &evicted)), "OK");
  EXPECT_EQ(ErrorText(admin_->Evict(NewContext().get(), evict, &evicted)),
            "NOT_FOUND SEQUENCE_NOT_FOUND");
  EXPECT_EQ(ErrorText(admin_->DescribeSequence(NewContext().get(), describe, &described)),
            "NOT_FOUND SEQUENCE_NOT_FOUND");
  EXPECT_EQ(List(0, "").sequences_size(), 1);

  for (const std::string& id : {std::string("short"), std::string()}) {
    describe.set_id(id);
    EXPECT_EQ(ErrorText(admin_->DescribeSequence(NewContext().get(), describe, &described)),
              "INVALID_ARGUMENT HANDLE_MALFORMED id");
  }
  describe.set_id(std::string(16, '\0'));
  EXPECT_EQ(ErrorText(admin_->DescribeSequence(NewContext().get(), describe, &described)),
            "NOT_FOUND SEQUENCE_NOT_FOUND");
}

TEST_F(AdminTest, ExplainsASequenceOfAnyTenant) {
  const v1::SequenceHandle handle = NewSequence(theirs_.get());
  v1::AppendResponse appended;
  const auto context = NewContext();
  const auto writer = theirs_->Append(context.get(), &appended);
  writer->Write(MakeAppend(served_.model(), handle, 0, 0, Counting(0, 300)));
  writer->WritesDone();
  ASSERT_TRUE(writer->Finish().ok());
  v1::ExplainRequest request;
  request.set_id(handle.id());
  v1::ExplainResponse response;
  EXPECT_EQ(ErrorText(admin_->Explain(NewContext().get(), request, &response)),
            "FAILED_PRECONDITION QUERY_NOT_KEPT q");
  *request.mutable_q() = MakeAttend(served_.model(), handle, 0, 299, {299}).q();
  ASSERT_EQ(ErrorText(admin_->Explain(NewContext().get(), request, &response)), "OK");
  EXPECT_EQ(response.position(), 299U);
  ASSERT_EQ(response.steps_size(), 5);
  EXPECT_EQ(response.steps(0).max_dropped_mass(), 0.2F);
  EXPECT_LE(response.steps(0).bytes(), response.steps(4).bytes());
  for (const v1::ExplainStep& step : response.steps()) {
    ASSERT_EQ(step.groups_size(), 2);
    for (const v1::ExplainGroup& group : step.groups()) {
      EXPECT_TRUE(group.met());
      EXPECT_LE(group.dropped_mass_upper(), step.max_dropped_mass());
      EXPECT_GE(group.level(), v1::LEVEL_CONFIDENCE);
    }
  }
  request.add_max_dropped_mass(1.0F);
  EXPECT_EQ(ErrorText(admin_->Explain(NewContext().get(), request, &response)),
            "INVALID_ARGUMENT EXPLAIN_INVALID max_dropped_mass");
  request.set_id("short");
  EXPECT_EQ(ErrorText(admin_->Explain(NewContext().get(), request, &response)),
            "INVALID_ARGUMENT HANDLE_MALFORMED id");
}

TEST_F(AdminTest, DescribesABlockOfAnyTenant) {
  const v1::SequenceHandle handle = NewSequence(theirs_.get());
  v1::AppendResponse appended;
  const auto context = NewContext();
  const auto writer = theirs_->Append(context.get(), &appended);
  writer->Write(MakeAppend(served_.model(), handle, 1, 0, Counting(0, 70)));
  writer->WritesDone();
  ASSERT_TRUE(writer->Finish().ok());
  v1::DescribeBlockRequest request;
  request.set_sequence_id(handle.id());
  v1::DescribeBlockResponse response;
  ASSERT_EQ(ErrorText(admin_->DescribeBlock(NewContext().get(), request, &response)), "OK");
  EXPECT_EQ(response.tiers_size(), 1);
  EXPECT_EQ(response.tiers(0), "memory");
  EXPECT_TRUE(response.sealed());
  ASSERT_EQ(response.slices_size(), 1) << "layer 0 has no tokens";
  EXPECT_EQ(response.slices(0).layer(), 1U);
  EXPECT_EQ(response.slices(0).token_count(), 64U);
  EXPECT_EQ(response.slices(0).checksum().size(), 16U);
  EXPECT_GT(response.slices(0).key_norm_mean(), 0.0);
  EXPECT_GE(response.slices(0).key_norm_max(), response.slices(0).key_norm_mean());
  request.set_layer(1);
  request.set_block_index(1);
  response.Clear();
  ASSERT_EQ(ErrorText(admin_->DescribeBlock(NewContext().get(), request, &response)), "OK");
  EXPECT_FALSE(response.sealed());
  EXPECT_EQ(response.first_token(), 64U);
  request.set_block_index(2);
  EXPECT_EQ(ErrorText(admin_->DescribeBlock(NewContext().get(), request, &response)),
            "OUT_OF_RANGE BLOCK_OUT_OF_RANGE block_index");
  request.set_sequence_id("short");
  EXPECT_EQ(ErrorText(admin_->DescribeBlock(NewContext().get(), request, &response)),
            "INVALID_ARGUMENT HANDLE_MALFORMED sequence_id");
}

TEST_F(AdminTest, HasTheStoreLookedThrough) {
  v1::VerifyStoreResponse response;
  EXPECT_EQ(ErrorText(admin_->VerifyStore(NewContext().get(), {}, &response)),
            "FAILED_PRECONDITION NO_DISK_TIER");

  const TemporaryFolder folder;
  ServedEngineOptions options;
  options.engine.data_directory = folder.path();
  ServedEngine served(std::move(options));
  const auto sequences = v1::SequenceService::NewStub(served.Connect());
  const auto admin = v1::AdminService::NewStub(served.ConnectAdmin());
  const v1::SequenceHandle handle = NewSequence(sequences.get());
  v1::AppendResponse appended;
  const auto context = NewContext();
  const auto writer = sequences->Append(context.get(), &appended);
  v1::AppendRequest durable = MakeAppend(served.model(), handle, 0, 0, Counting(0, 65));
  durable.set_durability(v1::DURABILITY_DURABLE);
  writer->Write(durable);
  writer->WritesDone();
  ASSERT_EQ(ErrorText(writer->Finish()), "OK");
  ASSERT_EQ(ErrorText(admin->VerifyStore(NewContext().get(), {}, &response)), "OK");
  EXPECT_EQ(response.found().sequences_checked(), 1U);
  EXPECT_EQ(response.found().slices_checked(), 2U);
  EXPECT_EQ(response.found().rows_damaged(), 0U);
  EXPECT_GT(response.found().bytes_read(), 64U);
  v1::GetStatsResponse stats;
  ASSERT_EQ(ErrorText(admin->GetStats(NewContext().get(), {}, &stats)), "OK");
  EXPECT_EQ(stats.disk().check_count(), 1U);
  EXPECT_EQ(stats.disk().checked().SerializeAsString(), response.found().SerializeAsString());
}

TEST_F(AdminTest, ModelsAreListedByNameOnBothSides) {
  for (const auto& channel : {served_.Connect(), served_.ConnectAdmin()}) {
    const auto models = v1::ModelService::NewStub(channel);
    v1::RegisterRequest request;
    v1::Model* const model = request.mutable_model();
    model->set_name("a model");
    model->set_layer_count(1);
    model->set_query_head_count(2);
    model->set_kv_head_count(1);
    model->set_head_dim(64);
    model->set_cache_dtype(v1::DATA_TYPE_FLOAT16);
    model->set_scale(0.125F);
    v1::RegisterResponse registered;
    ASSERT_EQ(ErrorText(models->Register(NewContext().get(), request, &registered)), "OK");
    v1::GetModelRequest get;
    get.set_name("a model");
    v1::GetModelResponse got;
    ASSERT_EQ(ErrorText(models->Get(NewContext().get(), get, &got)), "OK");
    EXPECT_EQ(got.fingerprint(), registered.fingerprint());
    EXPECT_EQ(got.model().head_dim(), 64U);
    EXPECT_EQ(got.model().default_policy().selector(), v1::SELECTOR_AUTO);

    v1::ListModelsRequest list;
    list.set_page_size(1);
    v1::ListModelsResponse page;
    ASSERT_EQ(ErrorText(models->List(NewContext().get(), list, &page)), "OK");
    ASSERT_EQ(page.models_size(), 1);
    EXPECT_EQ(page.models(0).name(), "a model");
    list.set_page_token(page.next_page_token());
    ASSERT_EQ(ErrorText(models->List(NewContext().get(), list, &page)), "OK");
    ASSERT_EQ(page.models_size(), 1);
    EXPECT_EQ(page.models(0).name(), kModel);
    EXPECT_TRUE(page.next_page_token().empty());

    model->set_scale(0.25F);
    EXPECT_EQ(ErrorOf(models->Register(NewContext().get(), request, &registered)).reason,
              "MODEL_EXISTS");
    get.set_name("no model");
    EXPECT_EQ(ErrorOf(models->Get(NewContext().get(), get, &got)).reason, "MODEL_NOT_FOUND");
  }
}

}  // namespace
}  // namespace kvservice::testing
