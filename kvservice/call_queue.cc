#include "kvservice/call_queue.h"

#include <algorithm>
#include <utility>

#include "kvservice/engine_errors.h"

namespace kvservice {
namespace {

bool IsStep(const AttendCall& call) {
  return std::none_of(call.rows.begin(), call.rows.end(), [](const AttendCallRow& row) {
    return row.query_count > CallQueue::kStepTokensMax;
  });
}

}  // namespace

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
    (IsStep(*call) ? steps_ : chunks_).push_back(call);
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

void CallQueue::TakeAttends(std::deque<AttendCall*>* waiting,
                            std::vector<AttendCall*>* taken) const {
  const uint32_t layer = waiting->front()->layer;
  size_t row_count = 0;
  bool full = false;
  // One pass; what stays moves up.
  size_t kept = 0;
  for (AttendCall* call : *waiting) {
    const bool wanted = !full && call->layer == layer;
    if (wanted && (taken->empty() || row_count + call->rows.size() <= rows_max_)) {
      taken->push_back(call);
      row_count += call->rows.size();
      continue;
    }
    // A later call of the layer must not overtake the one that did not fit.
    full = full || wanted;
    (*waiting)[kept++] = call;
  }
  waiting->resize(kept);
}

void CallQueue::TakePrefill(Work* work) {
  chunk_was_last_ = appends_.empty() || (!chunks_.empty() && !chunk_was_last_);
  if (chunk_was_last_) {
    TakeAttends(&chunks_, &work->attends);
    return;
  }
  work->task = std::move(appends_.front());
  appends_.pop_front();
}

bool CallQueue::Take(std::chrono::milliseconds timeout, Work* work) {
  work->attends.clear();
  work->task = nullptr;
  while (timeout.count() > 0 && signal_.load(std::memory_order_acquire) == 0 && spin_.Wait()) {
  }
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, timeout, [this] { return closed_ || waiting() > 0; });
  if (waiting() > 0) spin_.Open();
  if (waiting() == 0) return !closed_;
  const bool others_wait = waiting() > steps_.size();
  if (!steps_.empty() && !(others_wait && attend_streak_ >= kAttendStreakMax)) {
    ++attend_streak_;
    TakeAttends(&steps_, &work->attends);
  } else if (attend_streak_ = 0; !controls_.empty()) {
    work->task = std::move(controls_.front());
    controls_.pop_front();
  } else {
    TakePrefill(work);
  }
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
