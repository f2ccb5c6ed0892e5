#include "kvservice/call_queue.h"

#include <algorithm>
#include <set>
#include <string_view>
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
    See(call->tenant);
    absl::Status status = Admit();
    if (!status.ok()) return status;
    if (is_shared_ && WaitingOf(call->tenant) >= calls_max_ - waiting()) {
      ++shed_total_;
      return Overloaded(calls_max_);
    }
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

// ---- Tenants ----

void CallQueue::See(const std::string& tenant) {
  if (tenant == last_tenant_) return;
  const bool is_first = last_tenant_.empty();
  last_tenant_ = tenant;
  if (is_first) return;
  is_shared_ = true;
  tenant_changed_ns_ = clock_ == nullptr ? 0 : clock_->SteadyNowNs();
}

void CallQueue::LookAtTime() {
  if (!is_shared_ || clock_ == nullptr) return;
  const uint64_t now_ns = clock_->SteadyNowNs();
  if (batch_rows_ > 0) {
    const uint64_t latest_ns = (now_ns - batch_began_ns_) / batch_rows_;
    row_ns_ = row_ns_ == 0 ? latest_ns : (3 * row_ns_ + latest_ns) / 4;
    batch_rows_ = 0;
  }
  if (now_ns - tenant_changed_ns_ < kSharedForNs) return;
  is_shared_ = false;
  served_.clear();
}

size_t CallQueue::WaitingOf(const std::string& tenant) const {
  return static_cast<size_t>(
      std::count_if(attends_.begin(), attends_.end(),
                    [&](const AttendCall* call) { return call->tenant == tenant; }));
}

void CallQueue::TakeInTurn(std::vector<AttendCall*>* taken) {
  struct Turn {
    uint64_t served = 0;
    std::deque<AttendCall*> calls;
  };
  // Tenants in the order of their first waiting call, then of their turns.
  std::vector<Turn> turns;
  std::map<std::string_view, size_t> places;
  for (AttendCall* call : attends_) {
    const auto [place, is_new] = places.emplace(call->tenant, turns.size());
    if (is_new) {
      const auto served = served_.find(call->tenant);
      turns.push_back({.served = served == served_.end() ? 0 : served->second, .calls = {}});
    }
    turns[place->second].calls.push_back(call);
  }
  std::stable_sort(turns.begin(), turns.end(),
                   [](const Turn& a, const Turn& b) { return a.served < b.served; });
  const uint32_t layer = turns.front().calls.front()->layer;
  for (Turn& turn : turns) {
    std::erase_if(turn.calls, [layer](const AttendCall* call) { return call->layer != layer; });
  }
  const uint64_t rows_max =
      row_ns_ == 0 ? rows_max_ : std::clamp<uint64_t>(kSharedBatchNs / row_ns_, 1, rows_max_);
  ++batches_;
  size_t row_count = 0;
  for (bool is_full = false, is_empty = false; !is_full && !is_empty;) {
    is_empty = true;
    for (Turn& turn : turns) {
      if (turn.calls.empty() || is_full) continue;
      AttendCall* const call = turn.calls.front();
      is_full = !taken->empty() && row_count + call->rows.size() > rows_max;
      if (is_full) continue;
      is_empty = false;
      taken->push_back(call);
      row_count += call->rows.size();
      served_[call->tenant] = batches_;
      turn.calls.pop_front();
    }
  }
  const std::set<const AttendCall*> gone(taken->begin(), taken->end());
  std::erase_if(attends_, [&](const AttendCall* call) { return gone.contains(call); });
  batch_rows_ = row_count;
  batch_began_ns_ = clock_ == nullptr ? 0 : clock_->SteadyNowNs();
}

// ---- Attend calls ----

bool CallQueue::AttendsAreNext() const {
  const bool others_wait = !controls_.empty() || !appends_.empty();
  return answers_.empty() && !attends_.empty() &&
         !(others_wait && attend_streak_ >= kAttendStreakMax);
}

void CallQueue::TakeFirstAttends(std::vector<AttendCall*>* taken) {
  ++attend_streak_;
  if (is_shared_) {
    TakeInTurn(taken);
  } else {
    TakeInOrder(taken);
  }
  Signal();
}

void CallQueue::TakeInOrder(std::vector<AttendCall*>* taken) {
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
}

bool CallQueue::TakeAttends(std::vector<AttendCall*>* attends) {
  attends->clear();
  if (signal_.load(std::memory_order_acquire) == 0) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!AttendsAreNext()) return false;
  LookAtTime();
  TakeFirstAttends(attends);
  return true;
}

bool CallQueue::Take(std::chrono::milliseconds timeout, Work* work) {
  work->attends.clear();
  work->task = nullptr;
  while (timeout.count() > 0 && signal_.load(std::memory_order_acquire) == 0 && spin_.Wait()) {
  }
  std::unique_lock<std::mutex> lock(mutex_);
  LookAtTime();
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
