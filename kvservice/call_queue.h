// Waiting calls: three queues under one bound, and the order in which the executor takes them.
//
// Attend goes before control, control before Append; each is first in, first out. Waiting Attend
// calls of one layer leave together, as long as their rows fit one device batch (calls of one layer
// keep their order among themselves). So that a steady stream of Attend calls cannot starve the
// others, one waiting call of the other kinds runs after every kAttendStreakMax batches.
//
// Tenants. While more than one has been seen attending within ten seconds, the least recently
// served goes first, a batch takes their calls in turn and no more of them than about
// kSharedBatchNs of work, by what rows took lately: a call that arrives finds the device busy for
// about so long, whatever waits. And a tenant may have no more calls waiting than there are places
// left, so that there is always one for others. A tenant that is alone has all of the queue and of
// the batches.
//
// Answers of the engine's own threads go before all of these and are not counted: there are never
// more of them than were asked for.
//
// Thread-safe: any thread pushes, one thread takes.

#ifndef KVSERVICE_KVSERVICE_CALL_QUEUE_H_
#define KVSERVICE_KVSERVICE_CALL_QUEUE_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "kvservice/clock.h"
#include "kvservice/engine.h"
#include "kvservice/spin.h"

namespace kvservice {

// Runs once: with OK on the executor thread, or with the reason why it never will.
using Task = absl::AnyInvocable<void(absl::Status admission)>;

// What the executor does next: some Attend calls, or one task, or nothing (the wait was over).
struct Work {
  std::vector<AttendCall*> attends;
  Task task;
};

class CallQueue {
 public:
  static constexpr uint32_t kAttendStreakMax = 32;
  static constexpr uint64_t kSharedBatchNs = 2'000'000;
  static constexpr uint64_t kSharedForNs = 10'000'000'000;

  // The taking thread looks for calls for spin_us after each one before it sleeps. clock may be
  // null with 0: then batches of several tenants are not measured.
  CallQueue(uint32_t calls_max, uint32_t rows_max, Clock* clock = nullptr, uint32_t spin_us = 0)
      : calls_max_(calls_max), rows_max_(rows_max), clock_(clock), spin_(clock, spin_us) {}

  // OVERLOADED or DRAINING: the call was not taken.
  absl::Status PushAttend(AttendCall* call);
  // Takes the task over only if OK is returned.
  absl::Status PushControl(Task* task);
  absl::Status PushAppend(Task* task);
  // Always taken, closed or not.
  void PushAnswer(absl::AnyInvocable<void()> answer);

  // Waits for work, at most until the timeout. False when the queue is closed and empty.
  bool Take(std::chrono::milliseconds timeout, Work* work);
  // Takes Attend calls if they are next; does not wait.
  bool TakeAttends(std::vector<AttendCall*>* attends);
  // Waits for the next answer, whatever else waits.
  void TakeAnswer(Work* work);
  // Refuses new calls; what waits is still taken.
  void Close();
  bool closed() const;

  struct Counts {
    uint32_t waiting = 0;
    // Calls that came, refused ones included, and how many were refused because the queue was full.
    uint64_t total = 0;
    uint64_t shed_total = 0;
  };
  Counts counts() const;

 private:
  absl::Status Push(std::deque<Task>* queue, Task* task);
  // These need mutex_ held.
  absl::Status Admit();
  size_t waiting() const { return attends_.size() + controls_.size() + appends_.size(); }
  void Signal() {
    signal_.store(waiting() + answers_.size() + (closed_ ? 1 : 0), std::memory_order_release);
  }
  void TakeFirstAnswer(Work* work);
  bool AttendsAreNext() const;
  void TakeFirstAttends(std::vector<AttendCall*>* taken);
  void TakeInOrder(std::vector<AttendCall*>* taken);
  // The tenants' turns: how calls are taken while there are several.
  void TakeInTurn(std::vector<AttendCall*>* taken);
  // A tenant calls.
  void See(const std::string& tenant);
  // Looks whether it still is, and at how long the batch before took.
  void LookAtTime();
  size_t WaitingOf(const std::string& tenant) const;

  const uint32_t calls_max_;
  const uint32_t rows_max_;
  Clock* const clock_;
  // Of the taking thread.
  SpinWindow spin_;
  // Not zero when there is something to take or to know, readable without the lock.
  std::atomic<size_t> signal_{0};

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::deque<AttendCall*> attends_;
  std::deque<Task> controls_;
  std::deque<Task> appends_;
  std::deque<absl::AnyInvocable<void()>> answers_;
  uint32_t attend_streak_ = 0;
  bool closed_ = false;
  uint64_t total_ = 0;
  uint64_t shed_total_ = 0;
  // Several tenants: who called last, and when that was another one than before.
  bool is_shared_ = false;
  std::string last_tenant_;
  uint64_t tenant_changed_ns_ = 0;
  // When each was served last, counted in batches; forgotten when there is one tenant again.
  std::map<std::string, uint64_t, std::less<>> served_;
  uint64_t batches_ = 0;
  // The batch that was taken last, and what a row takes.
  uint64_t batch_began_ns_ = 0;
  uint64_t batch_rows_ = 0;
  uint64_t row_ns_ = 0;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_CALL_QUEUE_H_
