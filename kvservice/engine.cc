#include "kvservice/engine.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/cache/rocksdb_tier.h"
#include "kvservice/call_queue.h"
#include "kvservice/engine_errors.h"
#include "kvservice/executor.h"
#include "kvservice/model_registry.h"
#include "kvservice/tenants.h"

namespace kvservice {
namespace {

// How often an idle executor looks for expired leases.
constexpr std::chrono::milliseconds kIdleSweep{1000};
// While there is background work the executor does not wait for calls.
constexpr std::chrono::milliseconds kNoWait{0};
// A server that is never idle does a piece of background work after so many others.
constexpr uint32_t kBackgroundEvery = 64;
// Batches of Attend calls that run in a row before anything else does, beside each other.
constexpr uint32_t kBesideMax = 16;
// How often an Attend waits for sequences beyond twice for each of its rows (until it has left, and
// until it is back): those that do not fit into memory beside each other push each other out.
constexpr size_t kWaitsBesideMax = 8;

absl::StatusOr<EngineSecrets> MakeSecrets(const EngineOptions& options, Random* random) {
  EngineSecrets secrets;
  std::array<std::byte, sizeof(secrets.audit_seed)> seed;
  bool works =
      random->Fill(absl::MakeSpan(secrets.epoch)).ok() && random->Fill(absl::MakeSpan(seed)).ok();
  if (options.draw_secret.has_value()) {
    secrets.draw_secret = *options.draw_secret;
  } else {
    works = works && random->Fill(absl::MakeSpan(secrets.draw_secret)).ok();
  }
  works = works && random->Fill(absl::MakeSpan(secrets.prefix_secret)).ok();
  if (!works) return RandomUnavailable();
  secrets.audit_seed = std::bit_cast<uint64_t>(seed);
  return secrets;
}

class ThreadedEngine : public Engine {
 public:
  ThreadedEngine(const EngineOptions& options, const EngineSecrets& secrets,
                 std::unique_ptr<Device> device, std::unique_ptr<BlockPool> pool, Clock* clock,
                 Random* random, std::unique_ptr<DiskTier> tier)
      : device_name_(device->name()),
        registry_(options.models_max, pool->bytes()),
        queue_(options.queue_calls_max, options.rows_max, clock, options.spin_us),
        executor_(options, secrets, std::move(device), std::move(pool), clock, random, &registry_,
                  std::move(tier),
                  [this](DiskWorker::Answer answer) { queue_.PushAnswer(std::move(answer)); }) {}
  ~ThreadedEngine() override { Stop(); }
  ThreadedEngine(const ThreadedEngine&) = delete;
  ThreadedEngine& operator=(const ThreadedEngine&) = delete;

  absl::Status Start() {
    const absl::Status status = executor_.Recover();
    if (!status.ok()) return status;
    executor_.FillStats(&stats_);
    thread_ = std::thread([this] { RunExecutor(); });
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> RegisterModel(ModelSpec spec) override {
    if (queue_.closed()) return Draining();
    return registry_.Register(std::move(spec));
  }
  absl::StatusOr<ModelSpec> GetModel(std::string_view name) const override {
    const Model* model = registry_.Find(name);
    if (model == nullptr) return ModelNotFound(name);
    return model->spec;
  }
  std::vector<ModelSpec> ListModels() const override { return registry_.List(); }

  void Create(std::string_view tenant, CreateOptions options, Done<SequenceInfo> done) override {
    DeclaredPrompt prompt = executor_.Declare(tenant, options);
    options.token_ids = {};
    Control<SequenceInfo>(
        std::move(done),
        [this, owner = std::string(tenant), asked = std::move(options),
         prompt = std::move(prompt)] { return executor_.Create(owner, asked, prompt); });
  }
  void Fork(std::string_view tenant, SequenceId id, uint64_t generation, uint32_t length,
            uint32_t lease_ms, Done<SequenceInfo> done) override {
    Executor::ForkAsk ask;
    ask.tenant = std::string(tenant);
    ask.id = id;
    ask.generation = generation;
    ask.length = length;
    ask.lease_ms = lease_ms;
    ControlThere<SequenceInfo>(Need::kInMemory, tenant, id, std::move(done),
                               [this, ask](const std::string&, Done<SequenceInfo> answer) {
                                 executor_.Fork(ask, std::move(answer));
                               });
  }
  void Truncate(std::string_view tenant, SequenceId id, uint64_t generation, uint32_t length,
                Done<SequenceInfo> done) override {
    ControlThere<SequenceInfo>(
        Need::kInMemory, tenant, id, std::move(done),
        [this, id, generation, length](const std::string& owner, Done<SequenceInfo> answer) {
          executor_.Truncate(owner, id, generation, length, std::move(answer));
        });
  }
  void Suspend(std::string_view tenant, SequenceId id, uint64_t generation,
               Done<SequenceInfo> done) override {
    ControlThere<SequenceInfo>(
        Need::kSettled, tenant, id, std::move(done),
        [this, id, generation](const std::string& owner, Done<SequenceInfo> answer) {
          executor_.Suspend(owner, id, generation, std::move(answer));
        });
  }
  void Resume(std::string_view tenant, SequenceId id, uint64_t generation,
              Done<SequenceInfo> done) override {
    ControlThere<SequenceInfo>(
        Need::kSettled, tenant, id, std::move(done),
        [this, id, generation](const std::string& owner, Done<SequenceInfo> answer) {
          executor_.Resume(owner, id, generation, std::move(answer));
        });
  }
  void Get(std::string_view tenant, SequenceId id, Done<SequenceInfo> done) override {
    Control<SequenceInfo>(std::move(done), [this, owner = std::string(tenant), id] {
      return executor_.Get(owner, id);
    });
  }
  void Drop(std::string_view tenant, SequenceId id, Done<SequenceInfo> done) override {
    ControlThere<SequenceInfo>(Need::kSettled, tenant, id, std::move(done),
                               [this, id](const std::string& owner, Done<SequenceInfo> answer) {
                                 executor_.Drop(owner, id, std::move(answer));
                               });
  }
  void RenewLease(std::string_view tenant, SequenceId id, uint64_t generation, uint32_t lease_ms,
                  Done<SequenceInfo> done) override {
    Control<SequenceInfo>(std::move(done),
                          [this, owner = std::string(tenant), id, generation, lease_ms] {
                            return executor_.RenewLease(owner, id, generation, lease_ms);
                          });
  }
  void List(std::string_view tenant, SequenceId after, uint32_t limit,
            Done<std::vector<SequenceInfo>> done) override {
    Control<std::vector<SequenceInfo>>(std::move(done),
                                       [this, owner = std::string(tenant), after,
                                        limit]() -> absl::StatusOr<std::vector<SequenceInfo>> {
                                         return executor_.List(owner, after, limit);
                                       });
  }

  void SetQuota(std::string_view tenant, std::optional<TenantQuota> quota,
                Done<TenantUsage> done) override {
    Control<TenantUsage>(std::move(done), [this, owner = std::string(tenant), quota] {
      return executor_.SetQuota(owner, quota);
    });
  }
  void ListTenants(std::string_view only, std::string_view after, uint32_t limit,
                   Done<std::vector<TenantUsage>> done) override {
    Control<std::vector<TenantUsage>>(std::move(done),
                                      [this, one = std::string(only), last = std::string(after),
                                       limit]() -> absl::StatusOr<std::vector<TenantUsage>> {
                                        return executor_.ListTenants(one, last, limit);
                                      });
  }

  void Append(AppendCall call, Done<AppendResult> done) override {
    const std::string tenant = call.tenant;
    const SequenceId id = call.id;
    Task task = MakeTaskThere<AppendResult>(
        Need::kInMemory, tenant, id, std::move(done),
        [this, asked = std::move(call)](const std::string&, Done<AppendResult> answer) mutable {
          executor_.Append(std::move(asked), std::move(answer));
        });
    const absl::Status status = queue_.PushAppend(&task);
    if (!status.ok()) task(status);
  }
  void Attend(AttendCall* call) override {
    const absl::Status status = queue_.PushAttend(call);
    if (!status.ok()) FinishAttend(call, status);
  }

  // A piece of background work answers, unless it can be answered at once.
  void Audit(std::string_view tenant, SequenceId id, AuditAsk ask,
             Done<AuditReport> done) override {
    ControlThere<AuditReport>(Need::kInMemory, tenant, id, std::move(done),
                              [this, id, ask](const std::string& owner, Done<AuditReport> answer) {
                                executor_.Audit(owner, id, ask, std::move(answer));
                              });
  }

  void Explain(std::string_view tenant, SequenceId id, ExplainAsk ask,
               Done<ExplainReport> done) override {
    ControlThere<ExplainReport>(
        Need::kInMemory, tenant, id, std::move(done),
        [this, id, asked = std::move(ask)](const std::string& owner, Done<ExplainReport> answer) {
          answer(executor_.Explain(owner, id, asked));
        });
  }

  // Like prefill, transfers wait for everybody else.
  void Send(std::string_view tenant, SequenceId id, uint64_t generation, SendAsk ask,
            Done<TransferPart> done) override {
    Task task = MakeTaskThere<TransferPart>(
        Need::kInMemory, tenant, id, std::move(done),
        [this, id, generation, ask](const std::string& owner, Done<TransferPart> answer) {
          answer(executor_.Send(owner, id, generation, ask));
        });
    const absl::Status status = queue_.PushAppend(&task);
    if (!status.ok()) task(status);
  }
  void Receive(std::string_view tenant, TransferAttempt attempt, TransferPart part,
               Done<ReceiveReply> done) override {
    Task task = MakeTask<ReceiveReply>(
        std::move(done), [this, owner = std::string(tenant), attempt, received = std::move(part)] {
          return executor_.Receive(owner, attempt, received);
        });
    const absl::Status status = queue_.PushAppend(&task);
    if (!status.ok()) task(status);
  }

  void DropSent(std::string_view tenant, SequenceId id, std::string head,
                Done<SequenceInfo> done) override {
    ControlThere<SequenceInfo>(
        Need::kInMemory, tenant, id, std::move(done),
        [this, id, sent = std::move(head)](const std::string& owner, Done<SequenceInfo> answer) {
          const absl::Status status = executor_.CheckAsSent(owner, id, sent);
          if (!status.ok()) return answer(status);
          executor_.Drop(owner, id, std::move(answer));
        });
  }

  void DescribeBlock(std::string_view tenant, SequenceId id, BlockAsk ask,
                     Done<BlockReport> done) override {
    ControlThere<BlockReport>(Need::kInMemory, tenant, id, std::move(done),
                              [this, id, ask](const std::string& owner, Done<BlockReport> answer) {
                                answer(executor_.DescribeBlock(owner, id, ask));
                              });
  }

  void VerifyStore(Done<StoreReport> done) override {
    Task task = [this, done = std::move(done)](const absl::Status& admission) mutable {
      if (!admission.ok()) return done(admission);
      executor_.VerifyStore([this, done = std::move(done)](absl::StatusOr<StoreReport> r) mutable {
        PublishStats();
        done(std::move(r));
      });
    };
    const absl::Status status = queue_.PushControl(&task);
    if (!status.ok()) task(status);
  }

  EngineStats Stats() const override {
    EngineStats stats;
    {
      const std::lock_guard<std::mutex> lock(stats_mutex_);
      stats = stats_;
    }
    const CallQueue::Counts counts = queue_.counts();
    stats.model_shapes = registry_.Shapes();
    stats.models = static_cast<uint32_t>(stats.model_shapes.size());
    stats.queue_calls = counts.waiting;
    stats.calls_total = counts.total;
    stats.calls_shed_total = counts.shed_total;
    return stats;
  }
  const MassHistograms& masses() const override { return executor_.masses(); }
  std::string_view device_name() const override { return device_name_; }
  void Drain() override { Stop(); }

 private:
  using Need = SequenceStore::Need;

  // A task that runs `work` and publishes the numbers before anybody hears of the result.
  template <typename T, typename Function>
  Task MakeTask(Done<T> done, Function work) {
    return [this, done = std::move(done), work = std::move(work)](absl::Status admission) mutable {
      if (!admission.ok()) {
        done(std::move(admission));
        return;
      }
      absl::StatusOr<T> result = work();
      PublishStats();
      done(std::move(result));
    };
  }

  template <typename T, typename Function>
  void Control(Done<T> done, Function work) {
    Task task = MakeTask<T>(std::move(done), std::move(work));
    const absl::Status status = queue_.PushControl(&task);
    if (!status.ok()) task(status);
  }

  // A task that runs `work` once the sequence is where it is needed. `work` is given the tenant and
  // how to answer, then or later.
  template <typename T, typename Function>
  Task MakeTaskThere(Need need, std::string_view tenant, SequenceId id, Done<T> done,
                     Function work) {
    return [this, need, owner = std::string(tenant), id, done = std::move(done),
            work = std::move(work)](const absl::Status& admission) mutable {
      if (!admission.ok()) return done(admission);
      Task run = [this, owner, done = std::move(done),
                  work = std::move(work)](const absl::Status& arrived) mutable {
        if (!arrived.ok()) return done(arrived);
        work(owner, [this, done = std::move(done)](absl::StatusOr<T> result) mutable {
          PublishStats();
          done(std::move(result));
        });
      };
      executor_.WhenThere(need, owner, id, std::move(run));
    };
  }

  template <typename T, typename Function>
  void ControlThere(Need need, std::string_view tenant, SequenceId id, Done<T> done,
                    Function work) {
    Task task = MakeTaskThere<T>(need, tenant, id, std::move(done), std::move(work));
    const absl::Status status = queue_.PushControl(&task);
    if (!status.ok()) task(status);
  }

  // The call may be gone once `done` runs, so `done` leaves it first.
  static void FinishAttend(AttendCall* call, absl::Status status) {
    auto done = std::move(call->done);
    done(std::move(status));
  }

  void PublishStats() {
    const std::lock_guard<std::mutex> lock(stats_mutex_);
    executor_.FillStats(&stats_);
  }

  void RunExecutor() {
    Work work;
    uint32_t since_background = 0;
    while (queue_.Take(executor_.HasBackground() ? kNoWait : kIdleSweep, &work)) {
      executor_.Sweep();
      const bool is_idle = work.task == nullptr && work.attends.empty();
      if (is_idle || ++since_background >= kBackgroundEvery) {
        since_background = 0;
        RunBackground();
      }
      if (work.task != nullptr) {
        work.task(absl::OkStatus());
        work.task = nullptr;
      } else {
        since_background += RunAttends(&work) - 1;
      }
    }
    // It would read on until it has all.
    executor_.StopScrub(Draining());
    FinishAnswers(&work);
    // Calls that waited for a sequence may have asked for more of it.
    executor_.StopBackground(Draining());
    executor_.BeginDrain();
    FinishAnswers(&work);
    // Whoever opens the store next sees how it was left.
    executor_.CloseStore().IgnoreError();
  }

  void FinishAnswers(Work* work) {
    while (executor_.HasOutstanding()) {
      queue_.TakeAnswer(work);
      work->task(absl::OkStatus());
      work->task = nullptr;
    }
  }

  // A call that names a sequence on disk waits for it, and the others go on. After too many waits
  // rows are answered as they are.
  void ParkAttend(AttendCall* call, const SequenceId& id, size_t waits) {
    executor_.Park(id, [this, call, waits](absl::Status admission) {
      if (!admission.ok()) return FinishAttend(call, std::move(admission));
      std::optional<SequenceId> next;
      if (waits < 2 * call->rows.size() + kWaitsBesideMax) next = executor_.MustWait(*call, true);
      if (next.has_value()) return ParkAttend(call, *next, waits + 1);
      executor_.BeginAttend({&call, 1});
      FinishAttends();
    });
  }

  // True if there were such calls; they are not in `calls` any more.
  bool ParkThoseThatWait(std::vector<AttendCall*>* calls, bool is_again) {
    const auto parks = [this, is_again](AttendCall* call) {
      const std::optional<SequenceId> id = executor_.MustWait(*call, is_again);
      if (id.has_value()) ParkAttend(call, *id, 1);
      return id.has_value();
    };
    const auto left = std::remove_if(calls->begin(), calls->end(), parks);
    const bool has_parked = left != calls->end();
    calls->erase(left, calls->end());
    return has_parked;
  }

  // Calls that come while others are on the device begin beside them. Whatever else there is to do
  // waits until none is, as it may move what they read; so only some begin like that in a row.
  // Returns how many batches ran, at least one.
  uint32_t RunAttends(Work* work) {
    BeginAttends(&work->attends);
    // What a sweep did.
    if (!executor_.has_begun_attend()) PublishStats();
    uint32_t begun = 1;
    while (executor_.has_begun_attend()) {
      if (begun < kBesideMax && TakeBeside(&work->attends)) {
        ++begun;
        BeginAttends(&work->attends);
      } else {
        FinishFirstAttends();
      }
    }
    return begun;
  }

  // Waits for calls until the device has finished with those that began first. False then, or if
  // there is no room for any.
  bool TakeBeside(std::vector<AttendCall*>* calls) {
    if (!executor_.MayBeginAttend({})) return false;
    while (!queue_.TakeAttends(calls)) {
      if (executor_.IsAttendDone()) return false;
      std::this_thread::yield();
    }
    return true;
  }

  void BeginAttends(std::vector<AttendCall*>* calls) {
    if (!executor_.MayBeginAttend(*calls)) FinishAttends();
    // What comes back for one call may push out what a call before it needs.
    bool is_again = false;
    while (ParkThoseThatWait(calls, is_again)) is_again = true;
    if (!calls->empty()) executor_.BeginAttend(*calls);
  }

  void FinishAttends() {
    while (executor_.has_begun_attend()) FinishFirstAttends();
  }

  void FinishFirstAttends() {
    executor_.FinishAttend(&answered_);
    PublishStats();
    for (size_t i = 0; i < answered_.calls.size(); ++i) {
      FinishAttend(answered_.calls[i], std::move(answered_.statuses[i]));
    }
  }

  void RunBackground() {
    if (!executor_.HasBackground()) return;
    auto tell = executor_.RunBackground();
    PublishStats();
    if (tell != nullptr) tell();
  }

  void Stop() {
    queue_.Close();
    const std::lock_guard<std::mutex> lock(stop_mutex_);
    if (thread_.joinable()) thread_.join();
  }

  const std::string device_name_;

  ModelRegistry registry_;
  CallQueue queue_;

  // The executor thread alone, after construction.
  Executor executor_;
  AttendBatch::Answered answered_;

  mutable std::mutex stats_mutex_;
  // Guarded by stats_mutex_.
  EngineStats stats_;

  std::mutex stop_mutex_;
  // Guarded by stop_mutex_, after construction.
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> NewEngine(const EngineOptions& options,
                                                  std::unique_ptr<Device> device, Clock* clock,
                                                  Random* random, std::unique_ptr<DiskTier> tier) {
  if (tier == nullptr && !options.data_directory.empty()) {
    RocksdbTierOptions where;
    where.directory = options.data_directory;
    where.write_buffer_bytes = options.disk_buffer_bytes;
    auto opened = OpenRocksdbTier(where);
    if (!opened.ok()) return opened.status();
    tier = *std::move(opened);
  }
  const absl::Status quotas = CheckQuotas(options);
  if (!quotas.ok()) return quotas;
  auto pool = BlockPool::New(device.get(), options.pool_bytes, options.host_pool_bytes);
  if (!pool.ok()) return pool.status();
  const absl::StatusOr<EngineSecrets> secrets = MakeSecrets(options, random);
  if (!secrets.ok()) return secrets.status();
  auto engine = std::make_unique<ThreadedEngine>(options, *secrets, std::move(device),
                                                 *std::move(pool), clock, random, std::move(tier));
  const absl::Status started = engine->Start();
  if (!started.ok()) return started;
  return engine;
}

}  // namespace kvservice
