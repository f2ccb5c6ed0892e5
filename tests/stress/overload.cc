#include "tests/stress/overload.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/stress/load.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kTokens = 64 * 1024;
constexpr uint32_t kQueueCalls = 16;
constexpr double kOffered = 10.0;
constexpr double kPeakSeconds = 2.0;
// Of the steady tenant, and of the other one when it behaves, as shares of the peak.
constexpr double kSteadyShare = 0.1;
constexpr double kDecentShare = 0.4;

// What was measured, by name, once a round.
using Figures = std::map<std::string, std::vector<double>>;

double MedianOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0.0 : values[values.size() / 2];
}

void NoteErrors(const char* phase, const LoadResult& load, CampaignResult* result) {
  if (load.failed == 0) return;
  result->Fail(absl::StrCat(phase, ": ", load.failed, " calls failed: ", load.first_failure));
}

void Conclude(const Figures& figures, CampaignResult* result) {
  for (const auto& [name, values] : figures) {
    result->checked[name] = static_cast<uint64_t>(std::llround(MedianOf(values)));
  }
}

void ExpectAtMost(const Figures& figures, const std::string& name, double limit,
                  CampaignResult* result) {
  const double median = MedianOf(figures.at(name));
  if (median > limit) result->Fail(absl::StrCat(name, " is ", median, ", may be ", limit));
}

std::vector<std::string> ServerArguments() {
  return {"--queue-calls-max", absl::StrCat(kQueueCalls), "--admin-listen", "none", "--pool-bytes",
          "400000000"};
}

// Seconds until one call at a time is as quick as it was before, twice over.
double RecoverySeconds(Tenant* tenant, double quiet_ms) {
  constexpr double kGivenUpSeconds = 10.0;
  const auto begin = std::chrono::steady_clock::now();
  std::chrono::duration<double> passed{};
  for (int quick = 0; quick < 3 && passed.count() < kGivenUpSeconds;) {
    passed = std::chrono::steady_clock::now() - begin;
    const LoadResult one = tenant->RunClosed(1, 0.0);
    const bool is_quick = one.good == 1 && one.percentile(0.5) <= 2.0 * quiet_ms;
    quick = is_quick ? quick + 1 : 0;
  }
  return passed.count();
}

}  // namespace

CampaignResult RunOverload(const OverloadOptions& options) {
  CampaignResult result;
  auto server = LoadedServer::Start({"only"}, ServerArguments());
  auto tenant = server.ok() ? Tenant::Make((*server)->endpoint("only"), kTokens)
                            : absl::StatusOr<std::unique_ptr<Tenant>>(server.status());
  if (!tenant.ok()) {
    result.Fail(tenant.status().ToString());
    return result;
  }
  Figures figures;
  for (uint64_t round = 0; round < options.rounds; ++round) {
    const LoadResult quiet = (*tenant)->RunClosed(1, kPeakSeconds / 2);
    // As many as may wait: more would be refused.
    const LoadResult peak = (*tenant)->RunClosed(kQueueCalls, options.phase_seconds);
    const LoadResult over = (*tenant)->RunOpen(kOffered * peak.rate(), options.phase_seconds,
                                               options.seed * 1000 + round);
    const double recovery = RecoverySeconds(tenant->get(), quiet.percentile(0.9));
    NoteErrors("peak", peak, &result);
    NoteErrors("overload", over, &result);
    if (over.shed == 0) result.Fail("nothing was refused: this was no overload");
    ++result.count;
    figures["peak_calls_per_second"].push_back(peak.rate());
    figures["offered_calls_per_second"].push_back(static_cast<double>(over.offered) / over.seconds);
    figures["goodput_percent_of_peak"].push_back(100.0 * over.rate() / peak.rate());
    figures["p99_us_at_peak"].push_back(1000.0 * peak.percentile(0.99));
    figures["p99_us_overloaded"].push_back(1000.0 * over.percentile(0.99));
    figures["p99_percent_of_peak"].push_back(100.0 * over.percentile(0.99) / peak.percentile(0.99));
    figures["lost_percent_of_peak"].push_back(100.0 - 100.0 * over.rate() / peak.rate());
    figures["recovery_ms"].push_back(1000.0 * recovery);
  }
  ExpectAtMost(figures, "lost_percent_of_peak", 10.0, &result);
  ExpectAtMost(figures, "p99_percent_of_peak", 200.0, &result);
  ExpectAtMost(figures, "recovery_ms", 2000.0, &result);
  figures.erase("lost_percent_of_peak");
  Conclude(figures, &result);
  return result;
}

CampaignResult RunNoisyNeighbour(const OverloadOptions& options) {
  CampaignResult result;
  auto server = LoadedServer::Start({"noisy", "steady"}, ServerArguments());
  if (!server.ok()) {
    result.Fail(server.status().ToString());
    return result;
  }
  auto noisy = Tenant::Make((*server)->endpoint("noisy"), kTokens);
  auto steady = Tenant::Make((*server)->endpoint("steady"), kTokens);
  if (!noisy.ok() || !steady.ok()) {
    result.Fail(absl::StrCat(noisy.status().ToString(), " ", steady.status().ToString()));
    return result;
  }
  const double peak = (*noisy)->RunClosed(kQueueCalls, kPeakSeconds).rate();
  Figures figures;
  for (uint64_t round = 0; round < options.rounds; ++round) {
    std::map<std::string, LoadResult> seen;
    for (const auto& [name, share] : {std::pair("alone", 0.0), std::pair("decent", kDecentShare),
                                      std::pair("noisy", kOffered * kDecentShare)}) {
      LoadResult other;
      std::thread neighbour([&, share = share] {
        if (share == 0.0) return;
        other = (*noisy)->RunOpen(share * peak, options.phase_seconds, options.seed * 77 + round);
      });
      seen[name] =
          (*steady)->RunOpen(kSteadyShare * peak, options.phase_seconds, options.seed * 99 + round);
      neighbour.join();
      NoteErrors(name, seen[name], &result);
      NoteErrors("the other", other, &result);
      figures[absl::StrCat("steady_refused_", name)].push_back(
          static_cast<double>(seen[name].shed));
      figures[absl::StrCat("median_us_", name)].push_back(1000.0 * seen[name].percentile(0.5));
      figures[absl::StrCat("p99_us_", name)].push_back(1000.0 * seen[name].percentile(0.99));
      figures[absl::StrCat("other_good_per_second_", name)].push_back(share == 0.0 ? 0.0
                                                                                   : other.rate());
    }
    ++result.count;
    figures["median_percent"].push_back(100.0 * seen["noisy"].percentile(0.5) /
                                        seen["decent"].percentile(0.5));
    figures["p99_percent"].push_back(100.0 * seen["noisy"].percentile(0.99) /
                                     seen["decent"].percentile(0.99));
  }
  ExpectAtMost(figures, "steady_refused_noisy", 0.0, &result);
  ExpectAtMost(figures, "median_percent", 125.0, &result);
  ExpectAtMost(figures, "p99_percent", 150.0, &result);
  figures["peak_calls_per_second"].push_back(peak);
  Conclude(figures, &result);
  return result;
}

}  // namespace kvservice::testing
