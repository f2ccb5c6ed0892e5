// What a run has judged so far, and what that means. Tallies of threads are added up. Plain data;
// one thread at a time.

#ifndef KVSERVICE_TESTS_ADVERSARY_TALLY_H_
#define KVSERVICE_TESTS_ADVERSARY_TALLY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/adversary/shares.h"

namespace kvservice::adversary {

// How far bounds lie above the truth, ln(bound / truth) in nats. Fixed memory, resolution 0.002.
class SlackCounts {
 public:
  void Add(double nats);
  void Add(const SlackCounts& other);
  uint64_t count() const { return count_; }
  // The least number that `share` of all do not exceed, to the resolution; 0 when there are none.
  double At(double share) const;
  double smallest() const { return smallest_; }
  double largest() const { return largest_; }

 private:
  static constexpr double kWidth = 0.002;
  static constexpr size_t kBins = 1 << 14;
  std::vector<uint64_t> bins_ = std::vector<uint64_t>(kBins);
  uint64_t count_ = 0;
  double smallest_ = 1e300;
  double largest_ = -1e300;
};

// Statements of one failure probability.
struct SampledCounts {
  uint64_t mass_count = 0;
  uint64_t mass_misses = 0;
  uint64_t output_count = 0;
  uint64_t output_misses = 0;
  // Sampled over all: keys to bound the mass, rows to compensate.
  uint64_t keys = 0;
  uint64_t rows = 0;

  void Add(const SampledCounts& other) {
    mass_count += other.mass_count;
    mass_misses += other.mass_misses;
    output_count += other.output_count;
    output_misses += other.output_misses;
    keys += other.keys;
    rows += other.rows;
  }
};

// P(Binomial(trials, p) >= misses), summed exactly: how likely so many misses are if every
// statement keeps its promise. 1 without misses.
double MissProbability(uint64_t trials, uint64_t misses, double p);
// A promise counts as broken below it.
inline constexpr double kSignificance = 1e-6;

struct Tally {
  static constexpr size_t kFailuresMax = 20;
  static constexpr size_t kLevels = 4;
  static constexpr size_t kActions = 5;

  // Caches that were attacked, calls of devices or servers, and the rows of these.
  uint64_t caches = 0;
  uint64_t calls = 0;
  uint64_t rows = 0;
  // Head-certificates judged.
  uint64_t certificates = 0;
  // Statements that always hold and did not.
  uint64_t violations = 0;
  // Replies that break their contract without a false bound: fields that contradict each other.
  uint64_t contradictions = 0;
  // Rows that failed as their plan asked for (their certificates are not judged).
  uint64_t rows_refused = 0;
  // Certificates about which there is no truth, or none within the judge's own error.
  uint64_t meaningless = 0;
  uint64_t unresolved = 0;
  // Finite bounds of the output error that were judged.
  uint64_t output_bounds = 0;
  std::array<uint64_t, kLevels> levels{};
  std::array<uint64_t, kActions> actions{};
  std::map<double, SampledCounts> sampled;  // By failure probability.
  // The same, by named population; empty where populations are random.
  std::map<std::pair<std::string, double>, SampledCounts> by_population;
  SlackCounts slack;              // Of all that asked for a proof and dropped something.
  SlackCounts slack_tame;         // Of those a useful bound exists for.
  SlackCounts slack_tame_of_one;  // Theirs if the bound were always 1.
  SlackCounts output_slack;
  // Least slack that a climb has reached, and how many there were.
  double climb_least = 1e300;
  uint64_t climbs = 0;
  // What was attacked, and how.
  Shares shares;
  // The first few failures, with what reproduces them.
  std::vector<std::string> failures;

  void Add(const Tally& other);
  void AddFailure(const std::string& text);

  uint64_t misses() const;
  // At most so many misses are expected: failure probabilities added up.
  double expected_misses() const;
  // The least MissProbability of all failure probabilities and populations, masses and outputs
  // apart.
  double least_miss_probability() const;
  bool sound() const {
    return violations == 0 && contradictions == 0 && least_miss_probability() >= kSignificance;
  }
};

// For people.
std::string Summary(const Tally& tally);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_TALLY_H_
