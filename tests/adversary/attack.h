// Attacks on devices of this process: random calls on random cases, and climbs that change a case
// step by step so that its bounds come closer to the truth. One thread per attacker.
//
// A call has many rows: several caches of one shape and of different lengths, each attacked by
// several callers with lists and plans of their own. So a call's fixed costs are shared by hundreds
// of certificates, a cache's truth by all that its callers ask, and devices are attacked as they
// are used: with ragged batches.

#ifndef KVSERVICE_TESTS_ADVERSARY_ATTACK_H_
#define KVSERVICE_TESTS_ADVERSARY_ATTACK_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "tests/adversary/device_call.h"
#include "tests/adversary/layer_case.h"
#include "tests/adversary/tally.h"

namespace kvservice::adversary {

struct AttackOptions {
  // Names of the devices: each executes every call.
  std::vector<std::string> devices = {"cpu"};
  CaseLimits limits;
  // Of plans that would ask for CONFIDENCE: the others ask for DETERMINISTIC. Every sample costs a
  // GPU a round trip.
  double sampled = 1.0;
  // Of a call: as many as a server may batch.
  uint32_t rows_max = 256;
  // Steps of a climb, and cases that are tried in each.
  uint32_t climb_steps = 40;
  uint32_t climb_width = 8;
};

class Attacker {
 public:
  // The error of NewDevice.
  static absl::StatusOr<std::unique_ptr<Attacker>> New(const AttackOptions& options);

  // Everything about a case, a batch of caches or a climb, follows from its seed.
  void RunCase(uint64_t seed, Tally* tally);

 private:
  struct Target {
    std::string name;
    std::unique_ptr<Device> device;
    std::unique_ptr<Arena> arena;
  };

  explicit Attacker(const AttackOptions& options) : options_(options) {}
  void RandomCalls(uint64_t seed, Chance* chance, Tally* tally);
  void Climb(uint64_t seed, Chance* chance, Tally* tally);
  // The scores of cases under some plans: least slack of their bounds.
  static std::vector<double> Scores(const Target& target, uint64_t seed,
                                    absl::Span<const LayerCase> cases, absl::Span<const Plan> plans,
                                    Chance* chance, Tally* tally);

  AttackOptions options_;
  std::vector<Target> targets_;
};

// Judges an executed call on a stored case; population: see JudgedCall.
double JudgeDeviceCall(const DeviceCall& call, const std::vector<HeadTruth>& truths,
                       const std::vector<WidenedHead>& widened, const std::string& reproduce,
                       Tally* tally, const std::string& population = {});

// Until when to go on: whatever comes first.
struct RunLimits {
  uint64_t certificates = 0;
  double seconds = std::numeric_limits<double>::infinity();
  uint32_t thread_count = 1;
  // What is run is a multiple of it, and without a limit of time follows from the rest alone.
  uint64_t round = 64;
};
// Runs `work(index, thread, tally)` for index 0, 1, ... on threads, round after round, until
// certificates enough were judged. What is run does not depend on the number of threads.
void RunUntil(const RunLimits& limits,
              const std::function<void(uint64_t index, uint32_t thread, Tally* tally)>& work,
              Tally* tally);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_ATTACK_H_
