#include "kvservice/call_queue.h"

#include <utility>

#include "kvservice/engine_errors.h"

namespace kvservice {

absl::Status CallQueue::Admit() {
  ++total_;
  if (closed_) return Draining();
  if (waiting() >= calls_max_) {
    ++shed_total_;
    return Overloaded(calls_max_);
  }
  return absl::OkStatus();
}

absl::Status CallQueue::PushAttend(AttendCall* call) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const absl::Status status = Admit();
    if (!status.ok()) return status;
    attends_.push_back(call);
    Signal();
  }
  changed_.notify_one();
  return absl::OkStatus();
}

absl::Status CallQueue::Push(std::deque<Task>* queue, Task* task) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const absl::Status status = Admit();
    if (!status.ok()) return status;
    queue->push_back(std::move(*task));
    Signal();
  }
  changed_.notify_one();
  return absl::OkStatus();
}

absl::Status CallQueue::PushControl(Task* task) { return Push(&controls_, task); }

absl::Status CallQueue::PushAppend(Task* task) { return Push(&appends_, task); }

void CallQueue::PushAnswer(absl::AnyInvocable<void()> answer) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    answers_.push_back(std::move(answer));
    Signal();
  }
  changed_.notify_one();
}

void CallQueue::TakeFirstAnswer(Work* work) {
  work->task = [answer = std::move(answers_.front())](const absl::Status&) mutable { answer(); };
  answers_.pop_front();
  Signal();
}

void CallQueue::TakeAnswer(Work* work) {
  work->attends.clear();
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return !answers_.empty(); });
  TakeFirstAnswer(work);
}

bool CallQueue::AttendsAreNext() const {
  const bool others_wait = !controls_.empty() || !appends_.empty();
  return answers_.empty() && !attends_.empty() &&
         !(others_wait && attend_streak_ >= kAttendStreakMax);
}

void CallQueue::TakeFirstAttends(std::vector<AttendCall*>* taken) {
  ++attend_streak_;
  const uint32_t layer = attends_.front()->layer;
  size_t row_count = 0;
  bool full = false;
  // One pass; what stays moves up.
  size_t kept = 0;
  for (AttendCall* call : attends_) {
    const bool wanted = !full && call->layer == layer;
    if (wanted && (taken->empty() || row_count + call->rows.size() <= rows_max_)) {
      taken->push_back(call);
      row_count += call->rows.size();
      continue;
    }
    // A later call of the layer must not overtake the one that did not fit.
    full = full || wanted;
    attends_[kept++] = call;
  }
  attends_.resize(kept);
  Signal();
}

bool CallQueue::TakeAttends(std::vector<AttendCall*>* attends) {
  attends->clear();
  if (signal_.load(std::memory_order_acquire) == 0) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!AttendsAreNext()) return false;
  TakeFirstAttends(attends);
  return true;
}

bool CallQueue::Take(std::chrono::milliseconds timeout, Work* work) {
  work->attends.clear();
  work->task = nullptr;
  while (timeout.count() > 0 && signal_.load(std::memory_order_acquire) == 0 && spin_.Wait()) {
  }
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, timeout,
                    [this] { return closed_ || waiting() > 0 || !answers_.empty(); });
  if (waiting() > 0) spin_.Open();
  if (!answers_.empty()) {
    TakeFirstAnswer(work);
    return true;
  }
  if (AttendsAreNext()) {
    TakeFirstAttends(&work->attends);
    return true;
  }
  attend_streak_ = 0;
  std::deque<Task>& next = controls_.empty() ? appends_ : controls_;
  if (next.empty()) return !closed_;
  work->task = std::move(next.front());
  next.pop_front();
  Signal();
  return true;
}

void CallQueue::Close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    Signal();
  }
  changed_.notify_all();
}

bool CallQueue::closed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

CallQueue::Counts CallQueue::counts() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {.waiting = static_cast<uint32_t>(waiting()), .total = total_, .shed_total = shed_total_};
}

}  // namespace kvservice
