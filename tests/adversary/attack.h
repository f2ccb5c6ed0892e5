// Attacks on devices of this process: random calls on random cases, and climbs that change a case
// step by step so that its bounds come closer to the truth. One thread per attacker.

#ifndef KVSERVICE_TESTS_ADVERSARY_ATTACK_H_
#define KVSERVICE_TESTS_ADVERSARY_ATTACK_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attention/device.h"
#include "tests/adversary/device_call.h"
#include "tests/adversary/layer_case.h"
#include "tests/adversary/tally.h"

namespace kvservice::adversary {

struct AttackOptions {
  // Names of the devices: each executes every call.
  std::vector<std::string> devices = {"cpu"};
  CaseLimits limits;
  // Steps of a climb.
  uint32_t climb_steps = 40;
};

class Attacker {
 public:
  // The error of NewDevice.
  static absl::StatusOr<std::unique_ptr<Attacker>> New(const AttackOptions& options);

  // Everything about a case follows from its seed.
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
  // The score of a case under a plan: least slack of its bounds.
  double Score(const Target& target, const LayerCase& layer_case, const Plan& plan, Chance* chance,
               Tally* tally);

  AttackOptions options_;
  std::vector<Target> targets_;
};

// Judges an executed call on a stored case; population: see JudgedCall.
double JudgeDeviceCall(const DeviceCall& call, const std::vector<HeadTruth>& truths,
                       const std::vector<WidenedHead>& widened, const std::string& reproduce,
                       Tally* tally, const std::string& population = {});

// Changes one thing about a case: a channel's scale, the place of a token, a sign, a query, the
// last bits of some numbers. Numbers stay finite.
void Mutate(Chance* chance, LayerCase* layer_case);

// Runs `work(index, thread, tally)` for index 0, 1, ... on threads, in rounds of `round` indices,
// until `certificates` were judged: what is run does not depend on the number of threads.
inline constexpr uint64_t kRoundCases = 256;
void RunUntil(uint64_t certificates, uint32_t thread_count, uint64_t round,
              const std::function<void(uint64_t index, uint32_t thread, Tally* tally)>& work,
              Tally* tally);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_ATTACK_H_
