#include "kvservice/server/access_log.h"

#include <fcntl.h>
#include <spdlog/logger.h>
#include <spdlog/sinks/rotating_file_sink.h>
#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <nlohmann/json.hpp>

#include "kvservice/error.h"
#include "wire/file_descriptor.h"

namespace kvservice {
namespace {

constexpr uint64_t kNsPerSecond = 1'000'000'000;
// Besides the one that is written.
constexpr size_t kFilesKept = 4;
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

absl::StatusOr<AccessLog::Sink> NewAccessLogFile(const std::string& path, size_t bytes_max) {
  // The library would let everybody read a new file.
  const FileDescriptor created(
      open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (created.get() < 0 || fchmod(created.get(), 0600) != 0) {
    return absl::UnavailableError(path + " cannot be written: " + std::strerror(errno));
  }
  try {
    auto sink = std::make_shared<spdlog::sinks::rotating_file_sink_mt>(path, bytes_max, kFilesKept);
    auto logger = std::make_shared<spdlog::logger>("access", std::move(sink));
    logger->set_pattern("%v");
    logger->flush_on(spdlog::level::info);
    return [logger](const std::string& line) { logger->info(line); };
  } catch (const spdlog::spdlog_ex& error) {
    return absl::UnavailableError(path + " cannot be written: " + error.what());
  }
}

}  // namespace kvservice
