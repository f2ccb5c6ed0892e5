// Calls through shared memory: right answers, and what a client that breaks the rules is told. It
// harms nobody, and nothing of it is left behind.

#include <fcntl.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/raw_lane.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLength = 70;

// What lanes hold in this process, of both sides.
struct Holdings {
  size_t descriptors = 0;
  size_t mappings = 0;
  friend bool operator==(const Holdings&, const Holdings&) = default;
};
Holdings Count() {
  Holdings count;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count.descriptors;
  }
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("memfd:") != std::string::npos) ++count.mappings;
  }
  return count;
}

class LaneTest : public ::testing::Test {
 protected:
  LaneTest()
      : served_(Options()),
        channel_(served_.Connect()),
        attention_(v1::AttentionService::NewStub(channel_)),
        handle_(NewSequence()),
        idle_(Count()) {}
  // A server with a braked device, and few lanes of little memory.
  ServedEngineOptions Options() {
    ServedEngineOptions options;
    options.device = brake_.On(*NewDevice("reference", {}));
    options.server.lanes_max = 4;
    options.server.lane_bytes_max = size_t{1} << 20;
    return options;
  }

  v1::SequenceHandle NewSequence() {
    const auto sequences = v1::SequenceService::NewStub(channel_);
    v1::CreateRequest request;
    request.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_EQ(ErrorText(sequences->Create(NewContext().get(), request, &created)), "OK");
    v1::AppendResponse response;
    const auto context = NewContext();
    const auto writer = sequences->Append(context.get(), &response);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      EXPECT_TRUE(writer->Write(MakeAppend(served_.model(), created.sequence().handle(), layer, 0,
                                           Counting(0, kLength))));
    }
    writer->WritesDone();
    EXPECT_EQ(ErrorText(writer->Finish()), "OK");
    return created.sequence().handle();
  }

  const Endpoint& endpoint() const { return served_.server()->endpoints()[0]; }
  v1::AttendRequest Request(uint32_t position = kLength) const {
    return MakeAttend(served_.model(), handle_, 0, position, {position});
  }
  void ExpectNothingIsLeft() const {
    EXPECT_TRUE(Eventually([this] { return Count() == idle_; }))
        << Count().descriptors << " descriptors and " << Count().mappings << " mappings, before "
        << idle_.descriptors << " and " << idle_.mappings;
  }

  Brake brake_;
  ServedEngine served_;
  // The only one, so that descriptors can be counted.
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::AttentionService::Stub> attention_;
  v1::SequenceHandle handle_;
  Holdings idle_;
};

TEST_F(LaneTest, AnswersAreThoseOfUnaryCalls) {
  const RawLane lane(endpoint());
  for (const v1::DataType dtype :
       {v1::DATA_TYPE_FLOAT32, v1::DATA_TYPE_FLOAT16, v1::DATA_TYPE_BFLOAT16}) {
    for (uint32_t slot = 0; slot < 2; ++slot) {
      v1::AttendRequest request = Request();
      request.set_output_dtype(dtype);
      request.set_step_id(7 + slot);
      v1::AttendResponse unary;
      ASSERT_EQ(ErrorText(attention_->Attend(NewContext().get(), request, &unary)), "OK");
      ASSERT_EQ(lane.Call(slot, lane.Place(slot, request)), "OK");
      v1::AttendResponse response = lane.Response(slot);
      EXPECT_EQ(response.call_number(), unary.call_number() + 1);
      for (v1::AttendResponse* reply : {&unary, &response}) {
        reply->clear_call_number();
        reply->clear_queue_ns();
        reply->clear_service_ns();
      }
      EXPECT_EQ(response.SerializeAsString(), unary.SerializeAsString());
    }
  }
}

// Clients read them there before they have looked at the answer.
TEST_F(LaneTest, OutputsLieWhereTheLayoutSays) {
  const RawLane lane(endpoint());
  constexpr uint64_t kLseBytes = uint64_t{4} * sizeof(float);
  for (const auto& [dtype, out_bytes] :
       {std::pair(v1::DATA_TYPE_FLOAT32, 1024), std::pair(v1::DATA_TYPE_BFLOAT16, 512)}) {
    v1::AttendRequest request = Request();
    request.set_output_dtype(dtype);
    ASSERT_EQ(lane.Call(1, lane.Place(1, request)), "OK");
    const wire::SlotHead& head = *lane.head(1);
    const auto message = lane.memory().Range(head.reply_offset, head.reply_bytes);
    v1::AttendResponse response;
    ASSERT_TRUE(response.ParseFromArray(message.data(), static_cast<int>(message.size())));
    const uint64_t begin = lane.memory().ReplyOffset(1);
    EXPECT_EQ(response.lse().region().offset_bytes(), begin);
    EXPECT_EQ(response.lse().region().length_bytes(), kLseBytes);
    EXPECT_EQ(response.out().region().offset_bytes(), begin + 64);
    EXPECT_EQ(response.out().region().length_bytes(), out_bytes);
    EXPECT_EQ(head.reply_offset, begin + 64 + out_bytes);
    const wire::ReplyPlaces places =
        wire::PlaceReply(begin, kLseBytes, static_cast<uint64_t>(out_bytes));
    EXPECT_EQ(places.lse, response.lse().region().offset_bytes());
    EXPECT_EQ(places.out, response.out().region().offset_bytes());
    EXPECT_EQ(places.message, head.reply_offset);
  }
}

// Memory of a slot is used by call after call.
TEST_F(LaneTest, AnswersHaveNothingOfTheOnesBefore) {
  const RawLane lane(endpoint());
  const v1::AttendRequest good = Request(kLength - 1);
  v1::AttendRequest failing = good;
  failing.mutable_rows(0)->mutable_handle()->set_generation(handle_.generation() + 1);
  for (int round = 0; round < 2; ++round) {
    ASSERT_EQ(lane.Call(0, lane.Place(0, good)), "OK");
    const std::string zeros(lane.Response(0).out().data().size(), '\0');
    EXPECT_NE(lane.Response(0).out().data(), zeros);
    ASSERT_EQ(lane.Call(0, lane.Place(0, failing)), "OK");
    EXPECT_EQ(RowErrorText(lane.Response(0).results(0)),
              "FAILED_PRECONDITION GENERATION_MISMATCH rows[0].handle.generation");
    EXPECT_EQ(lane.Response(0).out().data(), zeros);
    EXPECT_EQ(lane.Response(0).lse().data(),
              std::string(lane.Response(0).lse().data().size(), '\0'));
  }
}

// Outputs are written where the client reads them, but what is kept of a call for audits is never
// read from there.
TEST_F(LaneTest, AuditsLookAtNothingThatTheClientCanChange) {
  const RawLane lane(endpoint());
  constexpr uint32_t kCalls = 50;
  v1::AuditRequest audit;
  *audit.mutable_handle() = handle_;
  audit.set_keep_next(kCalls);
  v1::AuditResponse found;
  ASSERT_EQ(ErrorText(attention_->Audit(NewContext().get(), audit, &found)), "OK");
  v1::AttendRequest request = Request(kLength - 1);
  v1::Policy* const policy = request.mutable_policy();
  policy->set_selector(v1::SELECTOR_CERTIFIED);
  policy->set_guarantee(v1::GUARANTEE_DETERMINISTIC);
  policy->set_max_output_error(0.5F);
  policy->set_dense_below_tokens(0);
  policy->mutable_layers();
  const absl::Span<std::byte> reply =
      lane.memory().Range(lane.memory().ReplyOffset(0), lane.memory().shape().reply_bytes);
  std::atomic<bool> over{false};
  std::thread hostile([&] {
    while (!over) std::memset(reply.data(), 0x4b, 4096);
  });
  for (uint32_t i = 0; i < kCalls; ++i) {
    const v1::AttendRequest placed = lane.Place(0, request);
    lane.PutMessage(0, placed.SerializeAsString());
    lane.Submit(0);
    EXPECT_TRUE(lane.Wait(0));
  }
  over = true;
  hostile.join();
  audit.clear_keep_next();
  audit.set_call_count(kCalls);
  ASSERT_EQ(ErrorText(attention_->Audit(NewContext().get(), audit, &found)), "OK");
  EXPECT_EQ(found.totals().rows_audited(), kCalls);
  EXPECT_GT(found.totals().outputs_audited(), 0U);
  EXPECT_EQ(found.totals().violations(), 0U);
}

// Tensors may also be in the message, and anywhere in the memory.
TEST_F(LaneTest, PayloadsMayLieAnywhere) {
  const RawLane lane(endpoint());
  EXPECT_EQ(lane.Call(0, Request()), "OK");
  const std::string expected = lane.Response(0).out().data();
  EXPECT_EQ(lane.Call(0, lane.Place(1, Request())), "OK");
  EXPECT_EQ(lane.Response(0).out().data(), expected);
}

TEST_F(LaneTest, SlotsRunSideBySideAndAnswerInAnyOrder) {
  const RawLane lane(endpoint());
  brake_.Set(true);
  lane.PutMessage(0, lane.Place(0, Request()).SerializeAsString());
  lane.Submit(0);
  ASSERT_TRUE(Eventually([this] { return brake_.call_count() == 1; }));
  // A request that is refused at once does not wait for the engine.
  lane.PutMessage(1, "\xff");
  lane.Submit(1);
  ASSERT_TRUE(lane.Wait(1));
  EXPECT_EQ(lane.Answer(1), "INVALID_ARGUMENT MESSAGE_MALFORMED");
  EXPECT_NE(wire::Load(lane.head(0)->reply_number), wire::Load(lane.head(0)->request_number));
  brake_.Set(false);
  ASSERT_TRUE(lane.Wait(0));
  EXPECT_EQ(lane.Answer(0), "OK");
}

TEST_F(LaneTest, TheTenantIsTheListeners) {
  const RawLane lane(served_.server()->endpoints()[1]);
  ASSERT_EQ(lane.Call(0, lane.Place(0, Request())), "OK");
  const v1::AttendResponse response = lane.Response(0);
  EXPECT_EQ(RowErrorText(response.results(0)), "NOT_FOUND SEQUENCE_NOT_FOUND");
}

// ---- Opening
// -------------------------------------------------------------------------------------

struct OpenCase {
  std::string name;
  std::function<void(v1::OpenLaneRequest*)> spoil;
  std::string expected;
};

TEST_F(LaneTest, ShapesThatCannotBeAreRefused) {
  using Open = v1::OpenLaneRequest;
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max() - 4095;
  const std::vector<OpenCase> cases = {
      {"later version", [](Open* o) { o->set_version(wire::kLaneVersion + 1); },
       "FAILED_PRECONDITION LANE_VERSION_UNSUPPORTED version"},
      {"no version", [](Open* o) { o->set_version(0); },
       "FAILED_PRECONDITION LANE_VERSION_UNSUPPORTED version"},
      {"no slot", [](Open* o) { o->set_slot_count(0); },
       "INVALID_ARGUMENT LANE_SHAPE_INVALID slot_count"},
      {"17 slots", [](Open* o) { o->set_slot_count(17); },
       "INVALID_ARGUMENT LANE_SHAPE_INVALID slot_count"},
      {"2^32 - 1 slots", [](Open* o) { o->set_slot_count(UINT32_MAX); },
       "INVALID_ARGUMENT LANE_SHAPE_INVALID slot_count"},
      {"no request area", [](Open* o) { o->set_request_bytes(0); },
       "INVALID_ARGUMENT LANE_SHAPE_INVALID request_bytes"},
      {"no whole pages", [](Open* o) { o->set_request_bytes(4097); },
       "INVALID_ARGUMENT LANE_SHAPE_INVALID request_bytes"},
      {"no reply area", [](Open* o) { o->set_reply_bytes(0); },
       "INVALID_ARGUMENT LANE_SHAPE_INVALID reply_bytes"},
      {"2^64 bytes", [](Open* o) { o->set_request_bytes(kHuge); },
       "INVALID_ARGUMENT LANE_SHAPE_INVALID reply_bytes"},
      {"2^63 bytes twice",
       [](Open* o) {
         o->set_request_bytes(uint64_t{1} << 63);
         o->set_reply_bytes(uint64_t{1} << 63);
       },
       "INVALID_ARGUMENT LANE_SHAPE_INVALID reply_bytes"},
      {"more than allowed", [](Open* o) { o->set_request_bytes(size_t{1} << 20); },
       "RESOURCE_EXHAUSTED LANE_TOO_LARGE request_bytes"},
      {"another size than the memory's", [](Open* o) { o->set_reply_bytes(4096); },
       "INVALID_ARGUMENT REGION_SIZE_MISMATCH region"},
  };
  const uint64_t bytes = wire::LaneBytes(RawLane::kShape).value();
  for (const OpenCase& one : cases) {
    SCOPED_TRACE(one.name);
    v1::OpenLaneRequest request = MakeOpen(RawLane::kShape);
    one.spoil(&request);
    const FileDescriptor memory = wire::NewSealedMemory(bytes);
    const FileDescriptor socket = ConnectLane(endpoint());
    EXPECT_EQ(OpenAnswer(socket.get(), request.SerializeAsString(), {memory.get()}), one.expected);
    char byte = 0;
    EXPECT_EQ(recv(socket.get(), &byte, 1, 0), 0) << "the server hangs up";
  }
  ExpectNothingIsLeft();
  const RawLane lane(endpoint());
  EXPECT_EQ(lane.Call(0, Request()), "OK");
}

// A memory file of the right size with these seals.
FileDescriptor Memory(int seals) {
  FileDescriptor file(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  const auto bytes = static_cast<off_t>(wire::LaneBytes(RawLane::kShape).value());
  EXPECT_EQ(ftruncate(file.get(), bytes), 0);
  EXPECT_EQ(fcntl(file.get(), F_ADD_SEALS, seals), 0);
  return file;
}

TEST_F(LaneTest, OnlySealedMemoryIsMapped) {
  constexpr int kAll = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  const std::string open = MakeOpen(RawLane::kShape).SerializeAsString();
  const auto answer = [&](const std::vector<int>& fds) {
    const FileDescriptor socket = ConnectLane(endpoint());
    return OpenAnswer(socket.get(), open, fds);
  };
  const std::string not_sealed = "INVALID_ARGUMENT REGION_NOT_SEALED region";
  {
    EXPECT_EQ(answer({}), "INVALID_ARGUMENT REGION_MISSING region");
    const FileDescriptor good = Memory(kAll);
    EXPECT_EQ(answer({good.get(), good.get()}), "INVALID_ARGUMENT REGION_MISSING region");
    const std::vector<int> many(8, good.get());
    EXPECT_EQ(answer(many), "INVALID_ARGUMENT REGION_MISSING region");
    for (const int seals :
         {0, F_SEAL_GROW | F_SEAL_SEAL, F_SEAL_SHRINK | F_SEAL_SEAL, F_SEAL_SHRINK | F_SEAL_GROW}) {
      const FileDescriptor memory = Memory(seals);
      EXPECT_EQ(answer({memory.get()}), not_sealed) << seals;
    }
    const FileDescriptor for_reading = Memory(kAll | F_SEAL_FUTURE_WRITE);
    EXPECT_EQ(answer({for_reading.get()}), "INVALID_ARGUMENT REGION_NOT_MAPPABLE region");
    const std::string path = "/proc/self/fd/" + std::to_string(good.get());
    const FileDescriptor reading(open64(path.c_str(), O_RDONLY | O_CLOEXEC));
    EXPECT_EQ(answer({reading.get()}), "INVALID_ARGUMENT REGION_NOT_MAPPABLE region");
    const FileDescriptor small = wire::NewSealedMemory(4096);
    EXPECT_EQ(answer({small.get()}), "INVALID_ARGUMENT REGION_SIZE_MISMATCH region");
    EXPECT_EQ(answer({good.get()}), "OK");
  }
  ExpectNothingIsLeft();
}

TEST_F(LaneTest, OtherKindsOfDescriptorsAreRefused) {
  const std::string open = MakeOpen(RawLane::kShape).SerializeAsString();
  {
    std::array<int, 2> ends = {-1, -1};
    ASSERT_EQ(pipe2(ends.data(), O_CLOEXEC), 0);
    const FileDescriptor reading(ends[0]);
    const FileDescriptor writing(ends[1]);
    const std::string path = served_.folder() + "/file";
    const FileDescriptor file(open64(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    ASSERT_EQ(ftruncate(file.get(), static_cast<off_t>(wire::LaneBytes(RawLane::kShape).value())),
              0);
    const FileDescriptor event(eventfd(0, EFD_CLOEXEC));
    const FileDescriptor peer = ConnectLane(endpoint());
    const FileDescriptor folder(open64("/proc/self", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    const FileDescriptor zero(open64("/dev/zero", O_RDWR | O_CLOEXEC));
    for (const FileDescriptor* fd : {&reading, &writing, &file, &event, &peer, &folder, &zero}) {
      ASSERT_GE(fd->get(), 0);
      const FileDescriptor socket = ConnectLane(endpoint());
      EXPECT_EQ(OpenAnswer(socket.get(), open, {fd->get()}),
                "INVALID_ARGUMENT REGION_NOT_SEALED region");
    }
  }
  ExpectNothingIsLeft();
}

TEST_F(LaneTest, WhoeverSaysNothingOrNonsenseIsHungUpOn) {
  {
    const FileDescriptor nonsense = ConnectLane(endpoint());
    EXPECT_EQ(OpenAnswer(nonsense.get(), std::string(4096, '\xff'), {}),
              "INVALID_ARGUMENT MESSAGE_MALFORMED");
    const FileDescriptor silent = ConnectLane(endpoint());
    const RawLane lane(endpoint());
    served_.clock()->AdvanceMs(6'000);
    char byte = 0;
    EXPECT_EQ(recv(silent.get(), &byte, 1, 0), 0);
    // An open lane may be silent for as long as it likes.
    EXPECT_EQ(lane.Call(0, Request()), "OK");
  }
  ExpectNothingIsLeft();
}

TEST_F(LaneTest, LanesAreCounted) {
  std::vector<std::unique_ptr<RawLane>> lanes;
  lanes.reserve(4);
  for (int i = 0; i < 4; ++i) lanes.push_back(std::make_unique<RawLane>(endpoint()));
  const FileDescriptor memory = Memory(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  const auto one_more = [&] {
    const FileDescriptor socket = ConnectLane(endpoint());
    return OpenAnswer(socket.get(), MakeOpen(RawLane::kShape).SerializeAsString(), {memory.get()});
  };
  EXPECT_EQ(one_more(), "RESOURCE_EXHAUSTED LANES_EXHAUSTED");
  for (const auto& lane : lanes) EXPECT_EQ(lane->Call(1, Request()), "OK");
  lanes.pop_back();
  EXPECT_TRUE(Eventually([&] { return one_more() == "OK"; }));
}

// ---- Requests
// ------------------------------------------------------------------------------------

struct RegionCase {
  std::string name;
  std::function<void(v1::AttendRequest*)> spoil;
  std::string expected;
};

std::vector<RegionCase> RegionCases() {
  using Request = v1::AttendRequest;
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  const uint64_t bytes = wire::LaneBytes(RawLane::kShape).value();
  return {
      {"beyond the memory",
       [=](Request* r) { r->mutable_q()->mutable_region()->set_offset_bytes(bytes); },
       "INVALID_ARGUMENT TENSOR_REGION_OUT_OF_RANGE q.region.offset_bytes"},
      {"one step beyond the memory",
       [=](Request* r) { r->mutable_q()->mutable_region()->set_offset_bytes(bytes - 1024 + 64); },
       "INVALID_ARGUMENT TENSOR_REGION_OUT_OF_RANGE q.region.offset_bytes"},
      {"around the end of 64 bits",
       [=](Request* r) { r->mutable_k()->mutable_region()->set_offset_bytes(kMax - 63); },
       "INVALID_ARGUMENT TENSOR_REGION_OUT_OF_RANGE k.region.offset_bytes"},
      {"not aligned",
       [](Request* r) {
         v1::TensorRegion* region = r->mutable_v()->mutable_region();
         region->set_offset_bytes(region->offset_bytes() + 4);
       },
       "INVALID_ARGUMENT TENSOR_REGION_MISALIGNED v.region.offset_bytes"},
      {"shorter than its shape",
       [](Request* r) { r->mutable_q()->mutable_region()->set_length_bytes(1020); },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q.region.length_bytes"},
      {"longest length",
       [=](Request* r) { r->mutable_q()->mutable_region()->set_length_bytes(kMax); },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q.region.length_bytes"},
      {"extents that overflow",
       [](Request* r) {
         r->mutable_q()->set_shape(0, std::numeric_limits<int64_t>::max());
         r->mutable_q()->mutable_region()->set_length_bytes(0);
       },
       "INVALID_ARGUMENT TENSOR_SIZE_MISMATCH q.data"},
      {"another memory", [](Request* r) { r->mutable_k()->mutable_region()->set_region("r"); },
       "INVALID_ARGUMENT TENSOR_REGION_UNKNOWN k.region.region"},
      {"data too", [](Request* r) { r->mutable_k()->set_data("x"); },
       "INVALID_ARGUMENT TENSOR_PAYLOAD_AMBIGUOUS k.region"},
      {"more than a slot's memory",
       [](Request* r) {
         v1::Tensor* q = r->mutable_q();
         q->set_shape(0, 65);
         q->mutable_region()->set_offset_bytes(0);
         q->mutable_region()->set_length_bytes(65 * 1024);
       },
       "INVALID_ARGUMENT TENSOR_REGION_TOO_LARGE q.region.length_bytes"},
      {"unknown type", [](Request* r) { r->mutable_q()->set_dtype(v1::DATA_TYPE_UNSPECIFIED); },
       "INVALID_ARGUMENT TENSOR_DTYPE_UNKNOWN q.dtype"},
      {"no rows", [](Request* r) { r->clear_rows(); }, "INVALID_ARGUMENT ROWS_MISSING rows"},
  };
}

TEST_F(LaneTest, RangesThatCannotBeAreRefused) {
  const RawLane lane(endpoint());
  for (const RegionCase& one : RegionCases()) {
    SCOPED_TRACE(one.name);
    v1::AttendRequest request = lane.Place(0, Request());
    one.spoil(&request);
    EXPECT_EQ(lane.Call(0, request), one.expected);
    EXPECT_EQ(lane.Call(0, lane.Place(0, Request())), "OK");
  }
}

TEST_F(LaneTest, MessagesMustLieInTheMemory) {
  const RawLane lane(endpoint());
  const uint64_t size = lane.memory().all().size();
  const std::vector<std::pair<uint64_t, uint32_t>> ranges = {{size, 1},       {size - 10, 11},
                                                             {UINT64_MAX, 1}, {UINT64_MAX - 5, 100},
                                                             {0, 65537},      {0, UINT32_MAX}};
  for (const auto& [offset, bytes] : ranges) {
    SCOPED_TRACE(offset);
    lane.PutMessage(0, lane.Place(0, Request()).SerializeAsString());
    wire::Store(&lane.head(0)->request_offset, offset);
    wire::Store(&lane.head(0)->request_bytes, bytes);
    lane.Submit(0);
    ASSERT_TRUE(lane.Wait(0));
    EXPECT_EQ(lane.Answer(0), "INVALID_ARGUMENT LANE_RANGE_INVALID request_offset");
  }
  EXPECT_EQ(lane.Call(0, Request()), "OK");
}

TEST_F(LaneTest, RepliesThatDoNotFitAreTyped) {
  const RawLane lane(endpoint(), {.slot_count = 1, .request_bytes = 65536, .reply_bytes = 4096});
  v1::AttendRequest request = lane.Place(0, Request());
  EXPECT_EQ(lane.Call(0, request), "OK");
  for (uint32_t i = 1; i < 8; ++i) {
    *request.add_rows() = request.rows(0);
    request.mutable_rows(static_cast<int>(i))->set_position(kLength - i);
  }
  request = MakeAttend(served_.model(), handle_, 0, kLength - 4, Counting(kLength - 4, 4));
  EXPECT_EQ(lane.Call(0, lane.Place(0, request)), "RESOURCE_EXHAUSTED REPLY_TOO_LARGE");
}

// While the slot is the server's its client changes everything in it, all the time.
TEST_F(LaneTest, ContentsThatChangeWhileTheyAreReadHarmNobody) {
  const RawLane lane(endpoint());
  const v1::AttendRequest request = lane.Place(0, Request());
  const std::string message = request.SerializeAsString();
  std::atomic<bool> stop{false};
  std::thread vandal([&] {
    std::mt19937 random(11);
    while (!stop) {
      const uint64_t area = lane.memory().RequestOffset(0);
      const uint64_t at = area + random() % RawLane::kShape.request_bytes;
      *lane.memory().Range(at, 1).data() = static_cast<std::byte>(random());
      wire::Store(&lane.head(0)->request_bytes, static_cast<uint32_t>(random() % 70'000));
      if (random() % 4 == 0) lane.PutMessage(0, message);
    }
  });
  int answered = 0;
  for (int i = 0; i < 2'000; ++i) {
    lane.Place(0, Request());
    lane.PutMessage(0, message);
    lane.Submit(0);
    if (!lane.Wait(0)) break;
    ++answered;
  }
  stop = true;
  vandal.join();
  EXPECT_EQ(answered, 2'000);
  // What was stored is what somebody has checked: finite, or nothing.
  const RawLane other(endpoint());
  ASSERT_EQ(other.Call(0, other.Place(0, Request(kLength - 1))), "OK");
  const v1::AttendResponse response = other.Response(0);
  EXPECT_EQ(RowErrorText(response.results(0)), "OK");
  const auto* const out = reinterpret_cast<const float*>(response.out().data().data());
  for (size_t i = 0; i < response.out().data().size() / sizeof(float); ++i) {
    EXPECT_TRUE(std::isfinite(out[i]));
  }
}

TEST_F(LaneTest, RequestsBeforeTheAnswerAreOneRequest) {
  const RawLane lane(endpoint());
  brake_.Set(true);
  lane.PutMessage(0, lane.Place(0, Request()).SerializeAsString());
  lane.Submit(0);
  ASSERT_TRUE(Eventually([this] { return brake_.call_count() == 1; }));
  for (int i = 0; i < 1'000; ++i) lane.Submit(0);
  brake_.Set(false);
  ASSERT_TRUE(lane.Wait(0)) << "the last one is taken when the slot is free again";
  EXPECT_LE(brake_.call_count(), 3);
}

// ---- Ends
// ----------------------------------------------------------------------------------------

TEST_F(LaneTest, ClientsThatVanishInMidCallLeaveNothing) {
  brake_.Set(true);
  {
    RawLane lane(endpoint());
    for (const uint32_t slot : {0U, 1U}) {
      lane.PutMessage(slot, lane.Place(slot, Request()).SerializeAsString());
      lane.Submit(slot);
    }
    ASSERT_TRUE(Eventually([this] { return brake_.call_count() == 1; }));
    lane.Hang();
  }
  // The server's mapping outlives the client: the engine still writes there.
  EXPECT_EQ(Count().mappings, 1U);
  brake_.Set(false);
  ExpectNothingIsLeft();
  v1::AttendResponse response;
  EXPECT_EQ(ErrorText(attention_->Attend(NewContext().get(), Request(), &response)), "OK");
}

TEST_F(LaneTest, CancelStormsLeaveNothing) {
  std::mt19937 random(5);
  for (int i = 0; i < 1'000; ++i) {
    RawLane lane(endpoint());
    const uint32_t count = random() % 3;
    for (uint32_t slot = 0; slot < count; ++slot) {
      lane.PutMessage(slot, lane.Place(slot, Request()).SerializeAsString());
      lane.Submit(slot);
    }
    if (random() % 2 == 0) lane.Hang();
    // Connections that are gone are noticed at a pace of the clock.
    served_.clock()->AdvanceMs(100);
  }
  ExpectNothingIsLeft();
  const RawLane lane(endpoint());
  EXPECT_EQ(lane.Call(0, lane.Place(0, Request())), "OK");
}

TEST_F(LaneTest, DrainRefusesCallsAndEndsLanes) {
  auto lane = std::make_unique<RawLane>(endpoint());
  brake_.Set(true);
  lane->PutMessage(0, lane->Place(0, Request()).SerializeAsString());
  lane->Submit(0);
  ASSERT_TRUE(Eventually([this] { return brake_.call_count() == 1; }));
  std::thread drain([this] { served_.server()->Drain(60'000); });
  // It refuses from some moment on, and the call in flight is still answered.
  EXPECT_TRUE(Eventually([&] {
    lane->PutMessage(1, "\xff");
    lane->Submit(1);
    return lane->Wait(1) && lane->Answer(1) == "UNAVAILABLE DRAINING";
  }));
  brake_.Set(false);
  EXPECT_TRUE(lane->Wait(0));
  EXPECT_EQ(lane->Answer(0), "OK");
  drain.join();
  char byte = 0;
  EXPECT_EQ(recv(lane->socket(), &byte, 1, 0), 0);
}

TEST(LaneServerTest, NoneMeansNoSocket) {
  ServedEngineOptions options;
  options.server.lanes_max = 0;
  const ServedEngine served(std::move(options));
  EXPECT_FALSE(std::filesystem::exists(served.folder() + "/data.lane"));
  EXPECT_TRUE(std::filesystem::exists(served.folder() + "/data"));
}

// ---- At random
// -----------------------------------------------------------------------------------

// Heads and messages that are more or less what they should be. Every request is answered, and the
// server serves on.
TEST_F(LaneTest, RandomRequestsAreAnswered) {
  for (const uint32_t seed : {1U, 2U, 3U, 4U}) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const RawLane lane(endpoint());
    for (int i = 0; i < 1'000; ++i) {
      const uint32_t slot = random() % 2;
      std::string message = lane.Place(slot, Request()).SerializeAsString();
      for (uint32_t changes = random() % 4; changes > 0; --changes) {
        const size_t at = random() % message.size();
        switch (random() % 3) {
          case 0:
            message[at] = static_cast<char>(random());
            break;
          case 1:
            message.resize(at + 1);
            break;
          default:
            message.insert(at, 1 + random() % 8, static_cast<char>(random()));
        }
      }
      lane.PutMessage(slot, message);
      if (random() % 8 == 0) wire::Store(&lane.head(slot)->request_bytes, uint32_t(random()));
      if (random() % 8 == 0) wire::Store(&lane.head(slot)->request_offset, uint64_t{random()} << 8);
      if (random() % 8 == 0) wire::Store(&lane.head(slot)->reply_bytes, uint32_t(random()));
      if (random() % 8 == 0) wire::Store(&lane.head(slot)->client_asleep, uint32_t(random()));
      if (random() % 8 == 0) wire::Store(&lane.memory().head()->server_asleep, uint32_t(random()));
      lane.Submit(slot);
      ASSERT_TRUE(lane.Wait(slot)) << i;
      ASSERT_FALSE(lane.Answer(slot).empty());
    }
    EXPECT_EQ(lane.Call(0, lane.Place(0, Request(kLength - 1))), "OK");
    EXPECT_EQ(RowErrorText(lane.Response(0).results(0)), "OK");
  }
}

}  // namespace
}  // namespace kvservice::testing
