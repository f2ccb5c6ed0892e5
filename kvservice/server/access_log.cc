#include "kvservice/server/access_log.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <nlohmann/json.hpp>

#include "kvservice/error.h"

namespace kvservice {
namespace {

constexpr uint64_t kNsPerSecond = 1'000'000'000;
constexpr char kAdminSide[] = "admin";

// "2026-03-01T12:00:00.123Z".
std::string TimeText(uint64_t wall_ns) {
  const auto seconds = static_cast<std::time_t>(wall_ns / kNsPerSecond);
  std::tm parts = {};
  gmtime_r(&seconds, &parts);
  std::array<char, 32> day;
  const size_t bytes = std::strftime(day.data(), day.size(), "%Y-%m-%dT%H:%M:%S", &parts);
  std::array<char, 8> rest;
  std::snprintf(rest.data(), rest.size(), ".%03uZ",
                static_cast<unsigned>(wall_ns % kNsPerSecond / 1'000'000));
  return std::string(day.data(), bytes) + rest.data();
}

}  // namespace

void AccessLog::Ended(const char* side, const CallRecord& record) {
  const bool is_refusal = IsDenial(record.status);
  if (!is_refusal && std::strcmp(side, kAdminSide) != 0) return;
  nlohmann::ordered_json line = {
      {"time", TimeText(clock_->WallNowNs())},
      {"side", side},
      {"method", record.method.name},
      {"identity", record.caller.identity},
      {"tenant", record.caller.tenant},
      {"peer", record.caller.peer},
      {"subject", record.subject},
      {"code", absl::StatusCodeToString(record.status.code())},
      {"reason", DetailsOf(record.status).reason},
      {"duration_us", record.duration_ns / 1000},
  };
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_refusal && !MayWriteRefusal()) return;
  if (suppressed_ > 0) line["suppressed"] = std::exchange(suppressed_, 0);
  // What strangers put into a certificate or a method's name need not be UTF-8.
  sink_(line.dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace));
}

bool AccessLog::MayWriteRefusal() {
  const uint64_t second = clock_->SteadyNowNs() / kNsPerSecond;
  if (second != second_) {
    second_ = second;
    refusals_in_second_ = 0;
  }
  if (refusals_in_second_ >= kRefusalsPerSecondMax) {
    ++suppressed_;
    return false;
  }
  ++refusals_in_second_;
  return true;
}

}  // namespace kvservice
