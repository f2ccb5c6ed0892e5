// Every call of the engine from several threads of two tenants at the same time, with a disk tier,
// little memory and a device that two calls are on, as on a GPU. Token p of every sequence is word
// p, so that answers can be checked whatever others did. Made for the thread sanitizer, which sees
// more than the checks do.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/error.h"
#include "selector/policy.h"
#include "tests/kvservice/fakes.h"
#include "tests/stress/stored_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kThreads = 4;
constexpr uint32_t kCallsPerThread = 300;
constexpr uint32_t kTokensMax = 200;
constexpr uint32_t kSequencesMax = 10;
constexpr uint32_t kTightBlocks = 14;
constexpr uint32_t kRoomyBlocks = 400;
constexpr std::array<const char*, 2> kTenants = {kTenant, "other"};

// Each begun call runs on a thread of its own until it is finished, and so does each second task.
class BesideDevice : public DeviceWrapper {
 public:
  BesideDevice(std::unique_ptr<Device> inner, std::atomic<int>* beside)
      : DeviceWrapper(std::move(inner)), beside_(beside) {}
  uint32_t calls_max() const override { return 2; }
  void Begin(const LayerShape& shape, absl::Span<AttendRow> rows) override {
    if (!begun_.empty()) ++*beside_;
    begun_.push_back(std::async(std::launch::async,
                                [this, &shape, rows] { DeviceWrapper::Attend(shape, rows); }));
  }
  void Finish() override {
    begun_.front().get();
    begun_.pop_front();
  }
  // Takes its time, so that others come meanwhile.
  bool IsDone() override {
    if (++looks_ < kLooks) return false;
    looks_ = 0;
    return begun_.front().wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }
  void ParallelFor(uint32_t count, absl::FunctionRef<void(uint32_t)> task) override {
    std::vector<std::future<void>> others;
    for (uint32_t i = 1; i < count; i += 2) {
      others.push_back(std::async(std::launch::async, [task, i] { task(i); }));
    }
    for (uint32_t i = 0; i < count; i += 2) task(i);
    for (std::future<void>& other : others) other.get();
  }

 private:
  static constexpr uint32_t kLooks = 200;

  // How often a call began while another one was on its way.
  std::atomic<int>* const beside_;
  std::deque<std::future<void>> begun_;
  uint32_t looks_ = 0;
};

struct Known {
  std::string tenant;
  Handle handle;
  uint32_t length = 0;
};

// What all callers share.
struct Ring {
  Ring(TestEngine* the_engine, uint32_t blocks) : engine(the_engine), pool_blocks(blocks) {}
  // Nothing leaves memory. Calls are on the device beside each other only while that is so.
  bool is_roomy() const { return pool_blocks == kRoomyBlocks; }
  TestEngine* const engine;
  const uint32_t pool_blocks;
  std::mutex mutex;
  // Guarded by mutex.
  std::vector<Known> sequences;
  std::map<std::string, int> succeeded;
};

template <typename T>
absl::StatusOr<T> Await(const std::function<void(Done<T>)>& call) {
  std::promise<absl::StatusOr<T>> promise;
  call([&](absl::StatusOr<T> result) { promise.set_value(std::move(result)); });
  return promise.get_future().get();
}

class Caller {
 public:
  Caller(Ring* ring, uint64_t seed) : ring_(ring), engine_(ring->engine), random_(seed) {}
  void Run();

 private:
  uint32_t Below(uint32_t limit) { return static_cast<uint32_t>(random_() % limit); }
  // One of the sequences, as somebody saw it last; none exist: nothing.
  std::optional<Known> Choose();
  void Learn(const Known& known, const absl::StatusOr<SequenceInfo>& info);
  // Refusals have a reason, and nothing was lost: the disk is a good one.
  bool Takes(const char* name, const absl::Status& status);
  bool Takes(const char* name, const Known& known, const absl::StatusOr<SequenceInfo>& info);

  void Create();
  void Append(const Known& known);
  void Attend();
  void Change(const Known& known, uint32_t what);
  void Inspect(const Known& known, uint32_t what);
  void Transfer(const Known& known);
  void Administer(uint32_t what);
  void Look();

  Ring* const ring_;
  TestEngine* const engine_;
  std::mt19937_64 random_;
};

std::optional<Known> Caller::Choose() {
  const std::lock_guard<std::mutex> lock(ring_->mutex);
  if (ring_->sequences.empty()) return std::nullopt;
  return ring_->sequences[random_() % ring_->sequences.size()];
}

void Caller::Learn(const Known& known, const absl::StatusOr<SequenceInfo>& info) {
  const std::lock_guard<std::mutex> lock(ring_->mutex);
  for (Known& one : ring_->sequences) {
    if (!(one.handle.id == known.handle.id)) continue;
    one.length = info->length;
    one.handle.generation = std::max(one.handle.generation, info->generation);
  }
}

bool Caller::Takes(const char* name, const absl::Status& status) {
  if (!status.ok()) {
    const std::string reason = DetailsOf(status).reason;
    EXPECT_NE(reason, "") << name << ": " << status;
    EXPECT_NE(reason, "SEQUENCE_LOST") << name << ": " << status;
    return false;
  }
  const std::lock_guard<std::mutex> lock(ring_->mutex);
  ++ring_->succeeded[name];
  return true;
}

bool Caller::Takes(const char* name, const Known& known, const absl::StatusOr<SequenceInfo>& info) {
  if (!Takes(name, info.status())) return false;
  Learn(known, info);
  return true;
}

void Caller::Create() {
  const std::string tenant = kTenants[Below(2)];
  const Words prompt = Counting(0, 64 + Below(120));
  CreateOptions options;
  options.model = kModel;
  if (Below(3) > 0) options.token_ids = prompt;
  if (Below(3) == 0) options.request_id = std::to_string(Below(4));
  const auto info = engine_->Create(options, tenant);
  if (!Takes("create", info.status())) return;
  const Known made = {.tenant = tenant,
                      .handle = {.id = info->id, .generation = info->generation},
                      .length = info->length};
  {
    const std::lock_guard<std::mutex> lock(ring_->mutex);
    const auto is_it = [&](const Known& one) { return one.handle.id == info->id; };
    if (std::none_of(ring_->sequences.begin(), ring_->sequences.end(), is_it)) {
      ring_->sequences.push_back(made);
    }
  }
  // So that others find something to begin with.
  if (!options.token_ids.empty()) Append(made);
}

void Caller::Append(const Known& known) {
  const Words words = Counting(known.length, 1 + Below(80));
  const bool is_durable = Below(4) == 0;
  for (uint32_t layer = 0; layer < engine_->model().layer_count; ++layer) {
    const auto stored =
        is_durable ? engine_->AppendDurably(known.handle, layer, known.length, words, known.tenant)
                   : engine_->Append(known.handle, layer, known.length, words, known.tenant);
    Takes("append", stored.status());
  }
  Takes("get", known, engine_->Get(known.handle, known.tenant));
}

// Several on their way at a time, so that some are on the device beside each other.
void Caller::Attend() {
  constexpr std::array kSelectors = {SelectorKind::kDense, SelectorKind::kCertified,
                                     SelectorKind::kCis, SelectorKind::kAuto};
  constexpr uint32_t kOnTheirWay = 4;
  Policy policy = DefaultPolicy(kSelectors[Below(kSelectors.size())]);
  policy.dense_below_tokens = Below(2) == 0 ? 0 : policy.dense_below_tokens;
  std::vector<std::pair<uint32_t, std::unique_ptr<AttendStep>>> steps;
  for (uint32_t i = 0; i < kOnTheirWay; ++i) {
    const std::optional<Known> known = Choose();
    if (!known.has_value()) return;
    auto step = std::make_unique<AttendStep>(engine_->model(), i % engine_->model().layer_count,
                                             known->tenant);
    step->Add(known->handle, known->length, Counting(known->length, 1));
    step->call.policy = &policy;
    steps.emplace_back(known->length, std::move(step));
  }
  for (auto& [position, step] : steps) step->Start(engine_->get());
  for (auto& [position, step] : steps) {
    absl::Status status = step->Wait();
    if (status.ok()) status = step->result(0).status;
    if (!Takes("attend", status) || policy.selector != SelectorKind::kDense) continue;
    ExpectDense(*step, 0, engine_->model(), Counting(0, position + 1), position);
  }
}

void Caller::Change(const Known& known, uint32_t what) {
  const Handle& handle = known.handle;
  if (what == 0 || known.length > kTokensMax) {
    const uint32_t length = Below(known.length + 1);
    Takes("truncate", known, engine_->Truncate(handle, length, known.tenant));
  } else if (what == 1 && !ring_->is_roomy()) {
    Takes("suspend", known, engine_->Suspend(handle, known.tenant));
  } else if (what <= 3) {
    Takes("resume", known, engine_->Resume(handle, known.tenant));
  } else if (what == 4) {
    Takes("renew", known, engine_->RenewLease(handle, 0, known.tenant));
  } else if (what == 5) {
    const auto child = engine_->Fork(handle, UINT32_MAX, known.tenant);
    if (!Takes("fork", child.status())) return;
    const std::lock_guard<std::mutex> lock(ring_->mutex);
    ring_->sequences.push_back({.tenant = known.tenant,
                                .handle = {.id = child->id, .generation = child->generation},
                                .length = child->length});
  } else {
    {
      const std::lock_guard<std::mutex> lock(ring_->mutex);
      if (ring_->sequences.size() < kSequencesMax) return;
      std::erase_if(ring_->sequences, [&](const Known& one) { return one.handle.id == handle.id; });
    }
    EXPECT_EQ(ErrorLine(engine_->Drop(handle, known.tenant).status()), "OK");
  }
}

void Caller::Inspect(const Known& known, uint32_t what) {
  if (what == 0) {
    const AuditAsk ask = {.row_count = Below(3), .keep_next = Below(3)};
    const auto report = engine_->Audit(known.handle, ask, known.tenant);
    if (!Takes("audit", report.status())) return;
    EXPECT_EQ(report->violations.size(), 0);
  } else if (what == 1) {
    const auto report =
        engine_->Explain(known.handle, {.layer = 0, .limits = {}, .q = {}}, known.tenant);
    Takes("explain", report.status());
  } else if (what == 2) {
    const auto report = Await<BlockReport>([&](Done<BlockReport> done) {
      engine_->get()->DescribeBlock(known.tenant, known.handle.id, {.block = 0, .layer = {}},
                                    std::move(done));
    });
    Takes("describe_block", report.status());
  } else {
    Transfer(known);
  }
}

// To itself, and given up.
void Caller::Transfer(const Known& known) {
  auto head = Await<TransferPart>([&](Done<TransferPart> done) {
    engine_->get()->Send(known.tenant, known.handle.id, known.handle.generation,
                         {.part = SendAsk::Part::kBegin}, std::move(done));
  });
  if (!Takes("send", head.status())) return;
  const auto give = [&](const TransferAttempt& attempt, TransferPart part) {
    return Await<ReceiveReply>([&](Done<ReceiveReply> done) {
      engine_->get()->Receive(known.tenant, attempt, std::move(part), std::move(done));
    });
  };
  const auto begun = give({}, *std::move(head));
  if (!Takes("receive", begun.status())) return;
  Takes("give_up", give(begun->attempt, TransferEnd{.gives_up = true}).status());
}

void Caller::Administer(uint32_t what) {
  if (what == 0) {
    TenantQuota quota;
    const size_t block = BlockBytes(engine_->model());
    if (Below(2) == 0 && !ring_->is_roomy()) {
      quota.pool_bytes_max = (2 + Below(ring_->pool_blocks)) * block;
    }
    quota.pool_bytes_reserved = Below(3) * block;
    const auto set = engine_->SetQuota(
        kTenants[Below(2)], Below(2) == 0 ? std::nullopt : std::optional<TenantQuota>(quota));
    Takes("set_quota", set.status());
  } else if (what == 1) {
    EXPECT_LE(engine_->ListTenants().size(), kTenants.size());
    EXPECT_LE(engine_->List("").size(), TestEngine::SmallOptions().sequences_max);
  } else {
    const auto report = engine_->VerifyStore();
    if (!Takes("verify", report.status())) return;
    EXPECT_EQ(report->rows_damaged, 0);
    EXPECT_EQ(report->sequences_lost, 0);
  }
}

// What does not wait for the executor.
void Caller::Look() {
  const EngineStats stats = engine_->get()->Stats();
  EXPECT_LE(stats.blocks_used, ring_->pool_blocks);
  EXPECT_TRUE(stats.disk_is_healthy);
  engine_->get()->masses().Read();
  ModelSpec other = SmallModel(1 + Below(2));
  other.name = Below(2) == 0 ? "one" : "two";
  Takes("register", engine_->get()->RegisterModel(other).status());
  EXPECT_GE(engine_->get()->ListModels().size(), 1);
  Takes("model", engine_->get()->GetModel(kModel).status());
}

void Caller::Run() {
  for (uint32_t i = 0; i < kCallsPerThread; ++i) {
    const std::optional<Known> known = Choose();
    const uint32_t what = Below(100);
    if (!known.has_value() || what < 6) {
      Create();
    } else if (what < 26) {
      Append(*known);
    } else if (what < 50) {
      Attend();
    } else if (what < 84) {
      Change(*known, Below(8));
    } else if (what < 92) {
      Inspect(*known, Below(4));
    } else if (what < 96) {
      Administer(Below(3));
    } else {
      Look();
    }
  }
}

class EveryCallTest : public ::testing::TestWithParam<uint32_t> {};

TEST_P(EveryCallTest, ThreadsOfTwoTenantsDoNotDisturbEachOther) {
  StoredEngine::Options options;
  options.engine.pool_bytes = GetParam() * BlockBytes(SmallModel(2));
  options.engine.audit_rate = 0.2;
  options.engine.scrub_bytes_per_s = 1U << 20;
  std::atomic<int> beside = 0;
  options.new_device = [&beside] {
    return std::make_unique<BesideDevice>(*NewDevice("reference", {}), &beside);
  };
  StoredEngine engine(options);
  ASSERT_TRUE(engine.Start().ok());
  Ring ring(engine.operator->(), GetParam());
  std::vector<std::thread> threads;
  for (uint32_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&ring, thread] { Caller(&ring, 2026 + thread).Run(); });
  }
  for (std::thread& thread : threads) thread.join();

  std::vector<const char*> names = {"append",   "attend",   "audit", "create",  "describe_block",
                                    "explain",  "fork",     "get",   "give_up", "model",
                                    "receive",  "register", "renew", "send",    "set_quota",
                                    "truncate", "verify"};
  if (!ring.is_roomy()) names.insert(names.end(), {"suspend", "resume"});
  for (const char* name : names) EXPECT_GT(ring.succeeded[name], 0) << name;
  if (ring.is_roomy()) {
    EXPECT_GT(beside, 50);
  }
  const EngineStats before = engine->get()->Stats();
  EXPECT_GT(before.prefix_matched_tokens_total, 0);
  EXPECT_EQ(before.evictions[0] > 0, !ring.is_roomy());
  for (const SequenceInfo& info : engine->List("")) {
    EXPECT_EQ(ErrorLine(engine->Drop({.id = info.id}, info.tenant).status()), "OK");
  }
  const EngineStats stats = engine->get()->Stats();
  EXPECT_EQ(stats.sequences, 0);
  EXPECT_EQ(stats.blocks_used, 0);
  EXPECT_EQ(stats.sequences_on_disk, 0);
  EXPECT_EQ(stats.sequences_lost, 0);
  EXPECT_EQ(stats.audit.violations, 0);
  engine.Stop();
}

INSTANTIATE_TEST_SUITE_P(Pools, EveryCallTest, ::testing::Values(kTightBlocks, kRoomyBlocks));

}  // namespace
}  // namespace kvservice::testing
