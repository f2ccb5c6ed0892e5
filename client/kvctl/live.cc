#include "client/kvctl/live.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "client/kvctl/outcome.h"
#include "client/kvctl/text.h"

namespace kvservice::client {
namespace {

using Json = nlohmann::ordered_json;
using SequencesById = std::map<std::string, v1::Sequence>;

// More would not fit any terminal, nor a look every second.
constexpr size_t kWatchedSequencesMax = 10'000;
constexpr char kClearTerminal[] = "\x1b[H\x1b[J";

// Waits; true if SIGINT came, then or before.
bool InterruptedWithin(std::chrono::milliseconds time) {
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  const timespec wait{.tv_sec = static_cast<time_t>(time.count() / 1000),
                      .tv_nsec = static_cast<long>(time.count() % 1000) * 1'000'000};
  return sigtimedwait(&interrupt, nullptr, &wait) == SIGINT;
}

double PerSecond(uint64_t before, uint64_t now, double seconds) {
  return seconds > 0.0 && now >= before ? static_cast<double>(now - before) / seconds : 0.0;
}

std::string RateText(double rate) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f", rate);
  return text;
}

absl::StatusOr<SequencesById> TakeSequences(ServerCalls* calls) {
  bool more = false;
  auto listed = calls->ListSequences("", kWatchedSequencesMax, &more);
  if (!listed.ok()) return listed.status();
  SequencesById sequences;
  for (v1::Sequence& sequence : *listed) {
    const std::string id = sequence.handle().id();
    sequences.emplace(id, std::move(sequence));
  }
  return sequences;
}

// One look at everything.
struct Sample {
  v1::GetServerInfoResponse info;
  v1::GetStatsResponse stats;
  SequencesById sequences;
};

absl::StatusOr<Sample> TakeSample(const GlobalOptions& options) {
  const std::unique_ptr<ServerCalls> calls = Connect(options);
  Sample sample;
  auto info = calls->GetServerInfo();
  if (!info.ok()) return info.status();
  auto stats = calls->GetStats();
  if (!stats.ok()) return stats.status();
  auto sequences = TakeSequences(calls.get());
  if (!sequences.ok()) return sequences.status();
  sample.info = *std::move(info);
  sample.stats = *std::move(stats);
  sample.sequences = *std::move(sequences);
  return sample;
}

struct Busy {
  const v1::Sequence* sequence = nullptr;
  double rows_per_second = 0.0;
};

// What happened between two samples; the time from the server's start before the first.
class Rates {
 public:
  Rates(const Sample* before, const Sample& now) : now_(now) {
    // After a restart the numbers began anew.
    if (before != nullptr && before->info.epoch() == now.info.epoch()) before_ = before;
    const uint64_t from_ms = before_ == nullptr ? 0 : before_->info.uptime_ms();
    seconds_ = static_cast<double>(now.info.uptime_ms() - from_ms) / 1000.0;
  }

  double seconds() const { return seconds_; }
  template <typename Number>
  double Of(Number number) const {
    return PerSecond(before_ == nullptr ? 0 : number(before_->stats), number(now_.stats), seconds_);
  }
  template <typename Number>
  uint64_t Change(Number number) const {
    const uint64_t from = before_ == nullptr ? 0 : number(before_->stats);
    return number(now_.stats) - std::min<uint64_t>(from, number(now_.stats));
  }

  // The busiest first, at most `count`.
  std::vector<Busy> Busiest(uint32_t count) const {
    std::vector<Busy> busiest;
    for (const auto& [id, sequence] : now_.sequences) {
      uint64_t rows_before = 0;
      if (before_ != nullptr) {
        const auto found = before_->sequences.find(id);
        if (found != before_->sequences.end()) rows_before = found->second.totals().rows();
      }
      busiest.push_back({&sequence, PerSecond(rows_before, sequence.totals().rows(), seconds_)});
    }
    std::stable_sort(busiest.begin(), busiest.end(), [](const Busy& a, const Busy& b) {
      return a.rows_per_second > b.rows_per_second;
    });
    if (busiest.size() > count) busiest.resize(count);
    return busiest;
  }

 private:
  const Sample& now_;
  const Sample* before_ = nullptr;
  double seconds_ = 0.0;
};

uint64_t CallsOf(const v1::GetStatsResponse& stats) { return stats.calls_total(); }
uint64_t ShedOf(const v1::GetStatsResponse& stats) { return stats.calls_shed_total(); }
uint64_t RowsOf(const v1::GetStatsResponse& stats) { return stats.totals().rows(); }
uint64_t ReadOf(const v1::GetStatsResponse& stats) { return stats.totals().tokens_read(); }
uint64_t VisibleOf(const v1::GetStatsResponse& stats) { return stats.totals().tokens_visible(); }

Json TopToJson(const Sample& now, const Rates& rates, uint32_t count) {
  Json sequences = Json::array();
  for (const Busy& busy : rates.Busiest(count)) {
    sequences.push_back({{"id", HexOfId(busy.sequence->handle().id())},
                         {"tenant", busy.sequence->tenant()},
                         {"model", busy.sequence->model()},
                         {"length_tokens", busy.sequence->length_tokens()},
                         {"bytes", busy.sequence->bytes()},
                         {"rows_per_second", busy.rows_per_second}});
  }
  return {{"uptime_ms", now.info.uptime_ms()},
          {"epoch", FixedText(now.info.epoch())},
          {"draining", now.info.draining()},
          {"seconds", rates.seconds()},
          {"calls_per_second", rates.Of(CallsOf)},
          {"calls_shed_per_second", rates.Of(ShedOf)},
          {"rows_per_second", rates.Of(RowsOf)},
          {"tokens_read", rates.Change(ReadOf)},
          {"tokens_visible", rates.Change(VisibleOf)},
          {"pool_bytes", now.stats.pool_bytes()},
          {"pool_used_bytes", now.stats.pool_used_bytes()},
          {"queued_call_count", now.stats.queued_call_count()},
          {"sequence_count", now.stats.sequence_count()},
          {"violations", now.stats.audit().violations()},
          {"sequences", std::move(sequences)}};
}

std::string TopToTable(const Sample& now, const Rates& rates, uint32_t count) {
  const v1::GetStatsResponse& stats = now.stats;
  const std::string head = Table(
      {{"up " + DurationText(now.info.uptime_ms()) + (now.info.draining() ? ", draining" : ""),
        now.info.device(), "calls/s " + RateText(rates.Of(CallsOf)),
        "refused/s " + RateText(rates.Of(ShedOf)), "rows/s " + RateText(rates.Of(RowsOf))},
       {"pool " + ShareText(stats.pool_used_bytes(), stats.pool_bytes()) + " of " +
            BytesText(stats.pool_bytes()),
        "sequences " + std::to_string(stats.sequence_count()),
        "waiting " + std::to_string(stats.queued_call_count()),
        "read " + ShareText(rates.Change(ReadOf), rates.Change(VisibleOf)),
        "violations " + std::to_string(stats.audit().violations())}});
  std::vector<Row> rows = {{"ID", "TENANT", "MODEL", "TOKENS", "MEMORY", "ROWS/S"}};
  for (const Busy& busy : rates.Busiest(count)) {
    rows.push_back({HexOfId(busy.sequence->handle().id()), busy.sequence->tenant(),
                    busy.sequence->model(), std::to_string(busy.sequence->length_tokens()),
                    BytesText(busy.sequence->bytes()), RateText(busy.rows_per_second)});
  }
  return head + "\n" + Table(rows);
}

const char* PlaceOf(const v1::Sequence& sequence) {
  if (sequence.suspended()) return "suspended";
  return sequence.tier() == v1::TIER_DISK ? "on_disk" : "in_memory";
}

void Tell(const GlobalOptions& options, const char* event, const v1::Sequence& sequence) {
  const std::string id = HexOfId(sequence.handle().id());
  Print(options,
        {{"event", event},
         {"id", id},
         {"tenant", sequence.tenant()},
         {"model", sequence.model()},
         {"generation", sequence.handle().generation()},
         {"length_tokens", sequence.length_tokens()}},
        std::string(event) + "  " + id + "  " + sequence.tenant() + "  " + sequence.model() +
            "  generation " + std::to_string(sequence.handle().generation()) + "  " +
            std::to_string(sequence.length_tokens()) + " tokens\n");
}

void TellChanges(const GlobalOptions& options, const SequencesById& before,
                 const SequencesById& now) {
  for (const auto& [id, sequence] : now) {
    const auto found = before.find(id);
    if (found == before.end()) {
      Tell(options, "created", sequence);
      continue;
    }
    const std::string place = PlaceOf(sequence);
    if (place != PlaceOf(found->second)) Tell(options, PlaceOf(sequence), sequence);
    if (sequence.handle().generation() != found->second.handle().generation()) {
      Tell(options, "generation", sequence);
    }
  }
  for (const auto& [id, sequence] : before) {
    if (!now.contains(id)) Tell(options, "gone", sequence);
  }
}

}  // namespace

int Repeat(const GlobalOptions& options, const std::function<int()>& sample) {
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  sigprocmask(SIG_BLOCK, &interrupt, nullptr);
  for (uint32_t taken = 1;; ++taken) {
    const int exit = sample();
    if (exit != kExitOk || taken == options.watch_count) return exit;
    if (InterruptedWithin(options.watch)) return kExitInterrupted;
  }
}

int ShowTop(const GlobalOptions& options, uint32_t sequence_count) {
  std::optional<Sample> before;
  const bool clears = isatty(STDOUT_FILENO) != 0 && !options.json && !options.quiet;
  return Repeat(options, [&]() -> int {
    absl::StatusOr<Sample> now = TakeSample(options);
    if (!now.ok()) return Fail(options, now.status());
    const Rates rates(before.has_value() ? &*before : nullptr, *now);
    if (clears) std::cout << kClearTerminal;
    Print(options, TopToJson(*now, rates, sequence_count), TopToTable(*now, rates, sequence_count));
    before = *std::move(now);
    return kExitOk;
  });
}

int WatchSequences(const GlobalOptions& options) {
  SequencesById before;
  return Repeat(options, [&]() -> int {
    absl::StatusOr<SequencesById> now = TakeSequences(Connect(options).get());
    if (!now.ok()) return Fail(options, now.status());
    TellChanges(options, before, *now);
    before = *std::move(now);
    return kExitOk;
  });
}

}  // namespace kvservice::client
