#include "tests/adversary/tally.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"

namespace kvservice::adversary {

void SlackCounts::Add(double nats) {
  const double bin = std::clamp(std::ceil(nats / kWidth), 0.0, static_cast<double>(kBins - 1));
  ++bins_[static_cast<size_t>(bin)];
  ++count_;
  smallest_ = std::min(smallest_, nats);
  largest_ = std::max(largest_, nats);
}

void SlackCounts::Add(const SlackCounts& other) {
  for (size_t i = 0; i < kBins; ++i) bins_[i] += other.bins_[i];
  count_ += other.count_;
  smallest_ = std::min(smallest_, other.smallest_);
  largest_ = std::max(largest_, other.largest_);
}

double SlackCounts::At(double share) const {
  if (count_ == 0) return 0.0;
  const double wanted = share * static_cast<double>(count_);
  uint64_t running = 0;
  for (size_t i = 0; i < kBins; ++i) {
    running += bins_[i];
    if (running > 0 && static_cast<double>(running) >= wanted) {
      return std::min(static_cast<double>(i) * kWidth, largest_);
    }
  }
  return largest_;
}

double MissProbability(uint64_t trials, uint64_t misses, double p) {
  if (misses == 0) return 1.0;
  const auto n = static_cast<long double>(trials);
  const auto rate = static_cast<long double>(p);
  long double sum = 0.0L;
  for (uint64_t k = misses; k <= trials; ++k) {
    const auto x = static_cast<long double>(k);
    const long double log_term = std::lgamma(n + 1.0L) - std::lgamma(x + 1.0L) -
                                 std::lgamma(n - x + 1.0L) + x * std::log(rate) +
                                 (n - x) * std::log1p(-rate);
    const long double term = std::exp(log_term);
    sum += term;
    // Beyond the mean terms fall faster and faster.
    if (x > n * rate && term < sum * 1e-12L) break;
  }
  return static_cast<double>(std::min(sum, 1.0L));
}

void Tally::Add(const Tally& other) {
  caches += other.caches;
  calls += other.calls;
  rows += other.rows;
  certificates += other.certificates;
  violations += other.violations;
  contradictions += other.contradictions;
  rows_refused += other.rows_refused;
  meaningless += other.meaningless;
  unresolved += other.unresolved;
  output_bounds += other.output_bounds;
  for (size_t i = 0; i < kLevels; ++i) levels[i] += other.levels[i];
  for (size_t i = 0; i < kActions; ++i) actions[i] += other.actions[i];
  for (const auto& [eta, counts] : other.sampled) sampled[eta].Add(counts);
  for (const auto& [key, counts] : other.by_population) by_population[key].Add(counts);
  slack.Add(other.slack);
  slack_tame.Add(other.slack_tame);
  slack_tame_of_one.Add(other.slack_tame_of_one);
  output_slack.Add(other.output_slack);
  climb_least = std::min(climb_least, other.climb_least);
  climbs += other.climbs;
  shares.Add(other.shares);
  for (const std::string& text : other.failures) AddFailure(text);
}

void Tally::AddFailure(const std::string& text) {
  if (failures.size() < kFailuresMax) failures.push_back(text);
}

uint64_t Tally::misses() const {
  uint64_t sum = 0;
  for (const auto& [eta, counts] : sampled) sum += counts.mass_misses + counts.output_misses;
  return sum;
}

double Tally::expected_misses() const {
  double sum = 0.0;
  for (const auto& [eta, counts] : sampled) {
    sum += eta * static_cast<double>(counts.mass_count + counts.output_count);
  }
  return sum;
}

double Tally::least_miss_probability() const {
  double least = 1.0;
  const auto judge = [&](double eta, const SampledCounts& counts) {
    least = std::min(least, MissProbability(counts.mass_count, counts.mass_misses, eta));
    least = std::min(least, MissProbability(counts.output_count, counts.output_misses, eta));
  };
  for (const auto& [eta, counts] : sampled) judge(eta, counts);
  for (const auto& [key, counts] : by_population) judge(key.second, counts);
  return least;
}

std::string Summary(const Tally& tally) {
  std::string text = absl::StrFormat(
      "%d head-certificates of %d rows in %d calls on %d caches: %d violations, "
      "%d contradictions\n"
      "  levels: none %d, confidence %d, deterministic %d, exact %d\n"
      "  actions: selected %d, reused %d, grown %d, dense %d, compensated %d\n"
      "  output error bounded %d times; refused rows %d, meaningless heads %d, beyond the judge "
      "%d\n",
      tally.certificates, tally.rows, tally.calls, tally.caches, tally.violations,
      tally.contradictions, tally.levels[0], tally.levels[1], tally.levels[2], tally.levels[3],
      tally.actions[0], tally.actions[1], tally.actions[2], tally.actions[3], tally.actions[4],
      tally.output_bounds, tally.rows_refused, tally.meaningless, tally.unresolved);
  for (const auto& [key, counts] : tally.by_population) {
    absl::StrAppendFormat(&text,
                          "  %-22s eta %-5g mass %6d of %8d missed, output %6d of %8d; %d keys "
                          "and %d rows each\n",
                          key.first, key.second, counts.mass_misses, counts.mass_count,
                          counts.output_misses, counts.output_count,
                          counts.keys / std::max<uint64_t>(1, counts.mass_count),
                          counts.rows / std::max<uint64_t>(1, counts.output_count));
  }
  for (const auto& [key, counts] : tally.sampled) {
    const double eta = key;  // Bindings cannot be captured.
    const auto line = [&](const char* what, uint64_t count, uint64_t misses) {
      if (count == 0) return;
      absl::StrAppendFormat(
          &text, "  eta %g, %s: %d misses of %d, at most %.1f expected, p = %.3g\n", eta, what,
          misses, count, eta * static_cast<double>(count), MissProbability(count, misses, eta));
    };
    line("mass", counts.mass_count, counts.mass_misses);
    line("output", counts.output_count, counts.output_misses);
  }
  const auto line = [&](const char* what, const SlackCounts& slack) {
    if (slack.count() == 0) return;
    absl::StrAppendFormat(&text,
                          "  ln(bound / truth), %s, %d: least %.3g, median %.3f, p95 %.3f, "
                          "max %.3f nats\n",
                          what, slack.count(), slack.smallest(), slack.At(0.5), slack.At(0.95),
                          slack.largest());
  };
  line("mass, all", tally.slack);
  line("mass, tame", tally.slack_tame);
  line("tame, were it 1", tally.slack_tame_of_one);
  line("output error", tally.output_slack);
  if (tally.climbs > 0) {
    absl::StrAppendFormat(&text, "  %d climbs, least slack reached %.3g nats\n", tally.climbs,
                          tally.climb_least);
  }
  for (const std::string& failure : tally.failures) text += "FAILED " + failure + "\n";
  return text;
}

}  // namespace kvservice::adversary
