#include "tests/stress/concurrent_history.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kvservice/error.h"
#include "tests/stress/history.h"
#include "tests/stress/stored_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kThreads = 4;
constexpr uint32_t kSequences = 4;
constexpr uint32_t kOperationsPerThread = 44;
constexpr uint32_t kTokensMax = 190;
constexpr uint32_t kPoolBlocks = 9;
// A new store now and then.
constexpr uint64_t kRoundsPerStore = 40;

uint64_t NumberOf(const ErrorDetails& details, std::string_view key) {
  for (const auto& [name, value] : details.metadata) {
    uint64_t number = 0;
    if (name == key && absl::SimpleAtoi(value, &number)) return number;
  }
  return 0;
}

// A sequence that all threads use, and what they saw of it.
struct Shared {
  Handle first;
  // What somebody saw last: guesses for the next call.
  std::atomic<uint64_t> generation{0};
  std::atomic<uint32_t> length{0};
  // Room in the history.
  std::atomic<uint32_t> taken{0};

  std::mutex mutex;
  // Guarded by mutex.
  std::vector<Operation> history;
  Operation last_get;
};

// The last calls of the shortest beginning that no order explains.
std::string TellShortest(const std::vector<Operation>& history, uint64_t first_generation) {
  constexpr size_t kTold = 8;
  std::vector<Operation> beginning;
  for (const Operation& operation : history) {
    beginning.push_back(operation);
    if (!IsLinearizable(beginning, first_generation)) break;
  }
  std::string told = "no order explains, at the end of";
  for (size_t i = beginning.size() - std::min(kTold, beginning.size()); i < beginning.size(); ++i) {
    absl::StrAppend(&told, "\n  ", Tell(beginning[i]));
  }
  return told;
}

class Round {
 public:
  Round(const ConcurrentHistoryOptions& options, uint64_t seed, TestEngine* engine,
        CampaignResult* result)
      : options_(options), seed_(seed), engine_(engine), result_(result) {}
  void Run();

 private:
  void Work(uint32_t thread);
  void Ask(Shared* shared, Operation* operation, std::mt19937_64* random);
  void Answer(Shared* shared, Operation* operation);
  void AnswerAppend(Operation* operation, const Handle& handle);
  void AnswerAttend(Operation* operation, const Handle& handle);
  static void Take(const absl::Status& status, Operation* operation);
  static void Take(const absl::StatusOr<SequenceInfo>& info, Operation* operation);

  const ConcurrentHistoryOptions& options_;
  const uint64_t seed_;
  TestEngine* const engine_;
  CampaignResult* const result_;
  std::atomic<uint64_t> now_{1};
  std::array<Shared, kSequences> sequences_;
};

void Round::Take(const absl::Status& status, Operation* operation) {
  const ErrorDetails details = DetailsOf(status);
  operation->reason = details.reason.empty() && !status.ok() ? status.ToString() : details.reason;
  operation->generation_after = NumberOf(details, "current_generation");
  operation->length_after = static_cast<uint32_t>(NumberOf(details, "current_length"));
}

void Round::Take(const absl::StatusOr<SequenceInfo>& info, Operation* operation) {
  if (!info.ok()) return Take(info.status(), operation);
  operation->generation_after = info->generation;
  operation->length_after = info->length;
  operation->is_suspended = info->is_suspended;
}

void Round::Ask(Shared* shared, Operation* operation, std::mt19937_64* random) {
  const auto below = [random](uint64_t limit) {
    return static_cast<uint32_t>((*random)() % limit);
  };
  operation->generation = shared->generation;
  const uint32_t length = shared->length;
  const uint32_t what = below(100);
  if (what < 45 || (what < 60 && length == 0)) {
    operation->kind = Operation::Kind::kAppend;
    operation->position = below(4) == 0 ? below(length + 3) : length;
    // Few different words: calls of others are repeated by chance.
    const uint32_t count = 1 + below(below(3) == 0 ? 60 : 2);
    while (operation->words.size() < count) operation->words.push_back(below(3));
  } else if (what < 60) {
    operation->kind = Operation::Kind::kAttend;
    operation->position = length;
    operation->words = {below(3)};
  } else if (what < 70 || length > kTokensMax - 60) {
    operation->kind = Operation::Kind::kTruncate;
    operation->position = below(length + 2);
  } else if (what < 84) {
    operation->kind = Operation::Kind::kGet;
  } else {
    operation->kind = what < 88 ? Operation::Kind::kSuspend : Operation::Kind::kResume;
  }
}

void Round::AnswerAppend(Operation* operation, const Handle& handle) {
  const bool is_durable = operation->words.size() % 2 == 0;
  const auto appended =
      is_durable ? engine_->AppendDurably(handle, 0, operation->position, operation->words)
                 : engine_->Append(handle, 0, operation->position, operation->words);
  if (!appended.ok()) return Take(appended.status(), operation);
  operation->length_after = appended->layer_length;
  operation->is_duplicate = appended->duplicate;
  operation->generation_after = operation->generation;
}

void Round::AnswerAttend(Operation* operation, const Handle& handle) {
  AttendStep step(engine_->model(), 0);
  step.Add(handle, operation->position, operation->words);
  absl::Status status = step.Run(engine_->get());
  if (status.ok()) status = step.result(0).status;
  if (!status.ok()) return Take(status, operation);
  operation->length_after = step.result(0).attended_length;
  operation->generation_after = operation->generation;
  operation->lse = static_cast<double>(step.Lse(0)[0]);
}

void Round::Answer(Shared* shared, Operation* operation) {
  const Handle handle = {.id = shared->first.id, .generation = operation->generation};
  switch (operation->kind) {
    case Operation::Kind::kAppend:
      return AnswerAppend(operation, handle);
    case Operation::Kind::kAttend:
      return AnswerAttend(operation, handle);
    case Operation::Kind::kTruncate:
      return Take(engine_->Truncate(handle, operation->position), operation);
    case Operation::Kind::kGet:
      return Take(engine_->Get(handle), operation);
    case Operation::Kind::kSuspend:
      return Take(engine_->Suspend(handle), operation);
    case Operation::Kind::kResume:
      return Take(engine_->Resume(handle), operation);
  }
}

void Round::Work(uint32_t thread) {
  std::mt19937_64 random(seed_ * kThreads + thread);
  for (uint32_t i = 0; i < kOperationsPerThread; ++i) {
    Shared& shared = sequences_[random() % kSequences];
    if (shared.taken.fetch_add(1) >= kHistoryOperationsMax) continue;
    Operation operation;
    Ask(&shared, &operation, &random);
    const bool is_stale = options_.is_stale && random() % 4 == 0;
    operation.called = now_.fetch_add(1);
    Answer(&shared, &operation);
    operation.returned = now_.fetch_add(1);
    if (operation.generation_after > 0) shared.generation = operation.generation_after;
    const bool tells_length =
        operation.kind != Operation::Kind::kAttend || operation.reason.empty();
    if (tells_length && operation.reason != "GENERATION_MISMATCH") {
      shared.length = operation.length_after;
    }
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (operation.kind == Operation::Kind::kGet) {
      if (is_stale && shared.last_get.returned > 0) {
        operation.generation_after = shared.last_get.generation_after;
        operation.length_after = shared.last_get.length_after;
        operation.is_suspended = shared.last_get.is_suspended;
      } else {
        shared.last_get = operation;
      }
    }
    shared.history.push_back(operation);
  }
}

void Round::Run() {
  for (Shared& shared : sequences_) {
    shared.first = engine_->NewSequence();
    shared.generation = shared.first.generation;
  }
  std::vector<std::thread> threads;
  for (uint32_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([this, thread] { Work(thread); });
  }
  for (std::thread& thread : threads) thread.join();
  for (Shared& shared : sequences_) {
    std::sort(shared.history.begin(), shared.history.end(),
              [](const Operation& a, const Operation& b) { return a.called < b.called; });
    uint64_t last_return = 0;
    for (const Operation& operation : shared.history) {
      ++result_->count;
      ++result_->checked[operation.reason.empty() ? "succeeded" : "refused"];
      if (operation.reason == "POOL_FULL") ++result_->checked["pool_full"];
      if (operation.called < last_return) ++result_->checked["at_the_same_time"];
      last_return = std::max(last_return, operation.returned);
    }
    ++result_->checked["histories"];
    if (!IsLinearizable(shared.history, shared.first.generation)) {
      result_->Fail(TellShortest(shared.history, shared.first.generation));
    }
    const auto dropped = engine_->Drop(shared.first);
    if (!dropped.ok()) result_->Fail(dropped.status().ToString());
  }
}

}  // namespace

CampaignResult RunConcurrentHistories(const ConcurrentHistoryOptions& options) {
  CampaignResult result;
  for (uint64_t round = 0; result.count < options.operations;) {
    StoredEngine::Options stored;
    stored.engine.pool_bytes = kPoolBlocks * BlockBytes(SmallModel(1));
    stored.engine.audit_rate = 0.0;
    stored.layer_count = 1;
    stored.filesystem.seed = options.seed + round;
    StoredEngine engine(stored);
    const absl::Status started = engine.Start();
    if (!started.ok()) {
      result.Fail(started.ToString());
      return result;
    }
    for (uint64_t i = 0; i < kRoundsPerStore && result.count < options.operations; ++i, ++round) {
      Round(options, options.seed + 7919 * round, engine.operator->(), &result).Run();
    }
  }
  return result;
}

}  // namespace kvservice::testing
