#include "kvservice/server/transfers.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <deque>
#include <future>
#include <list>
#include <mutex>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>

#include "kvservice/engine_errors.h"
#include "kvservice/error.h"
#include "kvservice/server/transfer_attempt.h"

namespace kvservice {
namespace {

using std::chrono::milliseconds;
using std::chrono::system_clock;

// Connections of one call; what comes after that is the caller's to repeat.
constexpr int kAttemptsMax = 3;
constexpr milliseconds kPause{200};
constexpr uint32_t kBusyRetryMs = 1000;
// Of a caller that waits for ever.
constexpr std::chrono::minutes kTimeMax{15};
// Moves that are remembered, so that a repeat of a call whose answer was lost finds its sequence.
constexpr size_t kMovedMax = 1024;

absl::Status TargetNotAllowed(const std::string& target) {
  return MakeError(absl::StatusCode::kPermissionDenied,
                   "this server sends no sequences of this tenant to '" + target + "'",
                   {.reason = "TRANSFER_TARGET_NOT_ALLOWED",
                    .field = "target_endpoint",
                    .metadata = {{"target_endpoint", target}}});
}

absl::Status Busy(uint32_t transfers_max) {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   "all " + std::to_string(transfers_max) + " transfers that may run are running",
                   {.reason = "TRANSFERS_BUSY",
                    .field = "",
                    .metadata = {{"transfers_max", std::to_string(transfers_max)}},
                    .retry_delay_ms = kBusyRetryMs});
}

// A connection of its own: bulk data does not stand in the way of anything else, and nobody else's
// pauses between attempts stand in its own.
std::shared_ptr<grpc::Channel> Connect(const std::string& endpoint) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetMaxSendMessageSize(-1);
  return grpc::CreateCustomChannel(endpoint, grpc::InsecureChannelCredentials(), arguments);
}

class ThreadedTransfers final : public Transfers {
 public:
  ThreadedTransfers(const TransferOptions& options, Engine* engine)
      : options_(options), engine_(engine) {}
  ~ThreadedTransfers() override { Stop(milliseconds(0)); }
  ThreadedTransfers(const ThreadedTransfers&) = delete;
  ThreadedTransfers& operator=(const ThreadedTransfers&) = delete;

  void Start(TransferAsk ask, Done<TransferOutcome> done) override {
    absl::Status status = AllowTarget(&ask);
    if (status.ok()) status = Launch(&ask, &done);
    if (!status.ok()) done(status);
  }

  void Stop(milliseconds grace) override {
    std::list<Running> ended;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      is_closed_ = true;
      changed_.wait_for(lock, grace, [this] { return running_count_ == 0; });
      is_stopping_ = true;
      for (Running& running : running_) {
        if (running.context != nullptr) running.context->TryCancel();
      }
      changed_.notify_all();
      ended.swap(running_);
    }
    for (Running& running : ended) running.thread.join();
  }

 private:
  struct Running {
    std::thread thread;
    // Guarded by mutex_. nullptr between attempts.
    grpc::ClientContext* context = nullptr;
    bool has_ended = false;
  };
  using MoveKey = std::tuple<std::string, std::array<std::byte, 16>, uint64_t, std::string>;

  static MoveKey KeyOf(const TransferAsk& ask) {
    return {ask.tenant, ask.id.bytes, ask.generation, ask.target_endpoint};
  }

  // Spells the target as it is configured.
  absl::Status AllowTarget(TransferAsk* ask) const {
    const absl::StatusOr<Endpoint> wanted = ParseEndpoint(ask->target_endpoint);
    const std::string text = wanted.ok() ? wanted->ToString() : ask->target_endpoint;
    const bool is_allowed =
        wanted.ok() && std::any_of(options_.targets.begin(), options_.targets.end(),
                                   [&](const ListenAddress& target) {
                                     return target.tenant == ask->tenant &&
                                            target.endpoint.ToString() == text;
                                   });
    ask->target_endpoint = text;
    return is_allowed ? absl::OkStatus() : TargetNotAllowed(text);
  }

  // Takes both if it succeeds.
  absl::Status Launch(TransferAsk* ask, Done<TransferOutcome>* done) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_closed_) return Draining();
    Reap();
    if (running_count_ >= options_.transfers_max) return Busy(options_.transfers_max);
    ++running_count_;
    running_.emplace_back();
    Running* const running = &running_.back();
    running->thread =
        std::thread([this, running, ask = std::move(*ask), done = std::move(*done)]() mutable {
          absl::StatusOr<TransferOutcome> outcome = Run(running, ask);
          {
            // Whoever hears of the end may begin the next.
            const std::lock_guard<std::mutex> locked(mutex_);
            --running_count_;
            changed_.notify_all();
          }
          done(std::move(outcome));
          const std::lock_guard<std::mutex> locked(mutex_);
          running->has_ended = true;
        });
    return absl::OkStatus();
  }

  // Needs mutex_, which those threads have let go of for good.
  void Reap() {
    for (auto next = running_.begin(); next != running_.end();) {
      if (!next->has_ended) {
        ++next;
        continue;
      }
      next->thread.join();
      next = running_.erase(next);
    }
  }

  absl::StatusOr<TransferOutcome> Run(Running* running, const TransferAsk& ask) {
    if (const std::optional<TransferOutcome> moved = FindMoved(ask)) return *moved;
    const system_clock::time_point deadline =
        std::min(ask.deadline, system_clock::now() + kTimeMax);
    TransferOutcome outcome;
    absl::StatusOr<TransferSent> sent = absl::UnavailableError("");
    for (int attempt = 0; attempt < kAttemptsMax; ++attempt) {
      if (attempt > 0 && !Pause(deadline)) break;
      sent = RunOnce(running, ask, deadline, &outcome.sent_bytes);
      if (sent.ok() || DetailsOf(sent.status()).reason != "TRANSFER_TARGET_UNREACHABLE") break;
    }
    if (!sent.ok()) return sent.status();
    outcome.id = sent->id;
    outcome.generation = sent->generation;
    if (!ask.move) return outcome;
    const absl::Status dropped = Drop(ask, std::move(sent->head));
    if (!dropped.ok()) return dropped;
    outcome.moved = true;
    RememberMoved(ask, outcome);
    return outcome;
  }

  absl::StatusOr<TransferSent> RunOnce(Running* running, const TransferAsk& ask,
                                       system_clock::time_point deadline, uint64_t* sent_bytes) {
    grpc::ClientContext context;
    context.set_deadline(deadline);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (is_stopping_) return Draining();
      running->context = &context;
    }
    const auto target = v1::SequenceService::NewStub(Connect(ask.target_endpoint));
    absl::StatusOr<TransferSent> sent =
        RunTransferAttempt(ask, engine_, target.get(), &context, sent_bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    running->context = nullptr;
    if (!sent.ok() && is_stopping_) return Draining();
    return sent;
  }

  // False when there is no time left.
  bool Pause(system_clock::time_point deadline) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto end = system_clock::now() + kPause;
    return end < deadline && !changed_.wait_until(lock, end, [this] { return is_stopping_; });
  }

  absl::Status Drop(const TransferAsk& ask, std::string head) {
    std::promise<absl::Status> promise;
    engine_->DropSent(
        ask.tenant, ask.id, std::move(head),
        [&](const absl::StatusOr<SequenceInfo>& dropped) { promise.set_value(dropped.status()); });
    return promise.get_future().get();
  }

  std::optional<TransferOutcome> FindMoved(const TransferAsk& ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const MoveKey key = KeyOf(ask);
    for (const auto& [moved_key, outcome] : moved_) {
      if (ask.move && moved_key == key) return outcome;
    }
    return std::nullopt;
  }
  void RememberMoved(const TransferAsk& ask, TransferOutcome outcome) {
    outcome.sent_bytes = 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    moved_.emplace_back(KeyOf(ask), outcome);
    if (moved_.size() > kMovedMax) moved_.pop_front();
  }

  const TransferOptions options_;
  Engine* const engine_;

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::list<Running> running_;
  uint32_t running_count_ = 0;
  bool is_closed_ = false;
  bool is_stopping_ = false;
  std::deque<std::pair<MoveKey, TransferOutcome>> moved_;
};

}  // namespace

std::unique_ptr<Transfers> NewTransfers(const TransferOptions& options, Engine* engine) {
  return std::make_unique<ThreadedTransfers>(options, engine);
}

}  // namespace kvservice
