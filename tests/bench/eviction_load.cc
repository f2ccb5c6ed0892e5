#include "tests/bench/eviction_load.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <unordered_map>

#include "absl/strings/str_format.h"

namespace kvservice::bench {
namespace {

constexpr double kMsPerMinute = 60'000.0;
// What the last ids of a prompt may differ in: the open prefix, and the one that the answer ended.
constexpr size_t kOpenIds = 2;
// Shorter prompts share no more than what everybody's begin with.
constexpr size_t kIdsMin = 2;

class Mix {
 public:
  Mix(const MixOptions& options, uint64_t seed) : options_(options), random_(seed) {}

  std::vector<Turn> Make() {
    Arrivals(options_.chats_per_minute, [this](uint64_t time_ms) { Chat(time_ms); });
    Arrivals(options_.bursts_per_minute, [this](uint64_t time_ms) { Burst(time_ms); });
    Arrivals(options_.agents_per_minute, [this](uint64_t time_ms) { Agent(time_ms); });
    std::stable_sort(turns_.begin(), turns_.end(),
                     [](const Turn& a, const Turn& b) { return a.time_ms < b.time_ms; });
    return std::move(turns_);
  }

 private:
  uint64_t Between(uint64_t low, uint64_t high) {
    return std::uniform_int_distribution<uint64_t>(low, high)(random_);
  }
  bool Chance(double share) { return std::bernoulli_distribution(share)(random_); }
  uint64_t LogNormalMs(double median_s, double sigma) {
    const double seconds = std::lognormal_distribution<double>(std::log(median_s), sigma)(random_);
    return static_cast<uint64_t>(1000.0 * seconds) + 1;
  }
  uint64_t CountAbout(double mean) {
    return 1 + std::geometric_distribution<uint64_t>(1.0 / mean)(random_);
  }

  template <typename Begin>
  void Arrivals(double per_minute, Begin begin) {
    std::exponential_distribution<double> gap(per_minute / kMsPerMinute);
    const auto end = static_cast<double>(options_.duration_ms);
    for (double time_ms = gap(random_); time_ms < end; time_ms += gap(random_)) {
      begin(static_cast<uint64_t>(time_ms));
    }
  }
  // Turns beyond the end did not happen.
  void Add(const Turn& turn) {
    if (turn.time_ms < options_.duration_ms) turns_.push_back(turn);
  }

  void Chat(uint64_t time_ms) {
    const SequenceNumber sequence = next_++;
    const uint64_t turns = CountAbout(options_.chat_turns_mean);
    const bool is_dropped = Chance(options_.dropped_share);
    uint64_t tokens = Between(500, 4'000);
    for (uint64_t i = 0; i < turns; ++i) {
      Add({.time_ms = time_ms,
           .sequence = sequence,
           .tokens = tokens,
           .is_last = is_dropped && i + 1 == turns});
      tokens += Between(100, 1'500);
      time_ms += LogNormalMs(options_.think_median_s, options_.think_sigma);
    }
  }
  void Burst(uint64_t time_ms) {
    const uint64_t count = Between(10, options_.burst_requests_max);
    for (uint64_t i = 0; i < count; ++i) {
      Add({.time_ms = time_ms + Between(0, 5'000),
           .sequence = next_++,
           .tokens = Between(500, 8'000),
           .is_last = Chance(options_.dropped_share)});
    }
  }
  void Agent(uint64_t time_ms) {
    const SequenceNumber sequence = next_++;
    const uint64_t steps = CountAbout(options_.agent_steps_mean);
    const bool is_dropped = Chance(options_.dropped_share);
    uint64_t tokens = Between(8'000, 40'000);
    for (uint64_t i = 0; i < steps; ++i) {
      Add({.time_ms = time_ms,
           .sequence = sequence,
           .tokens = tokens,
           .is_last = is_dropped && i + 1 == steps});
      if (Chance(options_.fork_share)) Branch(sequence, time_ms, tokens);
      tokens += Between(200, 3'000);
      time_ms += LogNormalMs(options_.tool_median_s, options_.tool_sigma);
    }
  }
  void Branch(SequenceNumber parent, uint64_t time_ms, uint64_t tokens) {
    const SequenceNumber sequence = next_++;
    const uint64_t steps = CountAbout(3.0);
    for (uint64_t i = 0; i < steps; ++i) {
      time_ms += LogNormalMs(options_.tool_median_s, options_.tool_sigma);
      tokens += Between(200, 3'000);
      Add({.time_ms = time_ms,
           .sequence = sequence,
           .tokens = tokens,
           .parent = i == 0 ? std::optional<SequenceNumber>(parent) : std::nullopt,
           .is_last = i + 1 == steps});
    }
  }

  const MixOptions options_;
  std::mt19937_64 random_;
  SequenceNumber next_ = 0;
  std::vector<Turn> turns_;
};

struct Request {
  uint64_t time_ms = 0;
  uint64_t tokens = 0;
  std::vector<uint64_t> ids;
};

std::optional<Request> ReadRequest(const std::string& line) {
  const auto json = nlohmann::json::parse(line, nullptr, false);
  if (!json.is_object()) return std::nullopt;
  const auto number = [&](const char* name) -> uint64_t {
    const auto found = json.find(name);
    return found != json.end() && found->is_number_unsigned() ? found->get<uint64_t>() : 0;
  };
  Request request = {.time_ms = number("timestamp"),
                     .tokens = number("input_length") + number("output_length"),
                     .ids = {}};
  const auto ids = json.find("hash_ids");
  if (ids == json.end() || !ids->is_array() || request.tokens == 0) return std::nullopt;
  for (const auto& id : *ids) {
    if (!id.is_number_unsigned()) return std::nullopt;
    request.ids.push_back(id.get<uint64_t>());
  }
  return request;
}

}  // namespace

std::vector<Turn> MakeMix(const MixOptions& options, uint64_t seed) {
  return Mix(options, seed).Make();
}

std::string TextOf(const MixOptions& options) {
  return absl::StrFormat(
      "%.0f min; chats %.1f/min of %.0f turns, think median %.0f s sigma %.1f; bursts %.1f/min of "
      "10 "
      "to %d one-shots; agents %.1f/min of %.0f steps, tools median %.0f s sigma %.1f, forks %.0f "
      "%%; "
      "%.0f %% dropped at the end",
      static_cast<double>(options.duration_ms) / kMsPerMinute, options.chats_per_minute,
      options.chat_turns_mean, options.think_median_s, options.think_sigma,
      options.bursts_per_minute, options.burst_requests_max, options.agents_per_minute,
      options.agent_steps_mean, options.tool_median_s, options.tool_sigma,
      100.0 * options.fork_share, 100.0 * options.dropped_share);
}

absl::StatusOr<std::vector<Turn>> ReadRequestTrace(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError("--request-trace: cannot read " + path);
  struct Known {
    size_t id_count = 0;
    uint64_t tokens = 0;
  };
  std::vector<Known> known;
  // Which sequence had the prefix last.
  std::unordered_map<uint64_t, SequenceNumber> last_of;
  std::vector<Turn> turns;
  for (std::string line; std::getline(file, line);) {
    const std::optional<Request> request = ReadRequest(line);
    if (!request.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("--request-trace: %s has no request in line %d", path, turns.size() + 1));
    }
    size_t shared = request->ids.size();
    while (shared > 0 && !last_of.contains(request->ids[shared - 1])) --shared;
    auto sequence = static_cast<SequenceNumber>(known.size());
    if (shared >= kIdsMin) {
      const SequenceNumber before = last_of[request->ids[shared - 1]];
      if (shared + kOpenIds >= known[before].id_count) sequence = before;
    }
    if (sequence == known.size()) known.emplace_back();
    // A shorter prompt goes on with what is there.
    known[sequence] = {.id_count = request->ids.size(),
                       .tokens = std::max(known[sequence].tokens, request->tokens)};
    for (const uint64_t id : request->ids) last_of[id] = sequence;
    turns.push_back(
        {.time_ms = request->time_ms, .sequence = sequence, .tokens = known[sequence].tokens});
  }
  return turns;
}

}  // namespace kvservice::bench
