#include "client/stream_path.h"

#include <utility>

namespace kvservice::client {

std::optional<absl::Status> StreamPath::Attend(const PayloadMessage& request,
                                               std::chrono::steady_clock::time_point deadline,
                                               v1::AttendResponse* response) {
  std::unique_ptr<AttendStream> stream = Take();
  if (stream == nullptr) return std::nullopt;
  absl::Status status = stream->Attend(request, deadline, response);
  // However a stream ends, repeating its call by another one is safe; only time does not come back.
  const bool has_ended = !stream->is_open() && !absl::IsDeadlineExceeded(status);
  if (has_ended && absl::IsUnimplemented(status)) {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_served_ = false;
  }
  Return(std::move(stream));
  if (has_ended || absl::IsUnavailable(status)) return std::nullopt;
  return status;
}

bool StreamPath::is_served() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return is_served_;
}

std::unique_ptr<AttendStream> StreamPath::Take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!is_served_ || taken_count_ == kStreamsMax) return nullptr;
  ++taken_count_;
  if (idle_.empty()) return rpc_->OpenAttend();
  std::unique_ptr<AttendStream> stream = std::move(idle_.back());
  idle_.pop_back();
  return stream;
}

void StreamPath::Return(std::unique_ptr<AttendStream> stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  --taken_count_;
  if (stream->is_open()) idle_.push_back(std::move(stream));
}

}  // namespace kvservice::client
