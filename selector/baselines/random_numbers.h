// Random numbers of measurements: seeded, the same on every machine, not secret. Pure; any thread.

#ifndef KVSERVICE_SELECTOR_BASELINES_RANDOM_NUMBERS_H_
#define KVSERVICE_SELECTOR_BASELINES_RANDOM_NUMBERS_H_

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numbers>

namespace kvservice::baselines {

// SplitMix64 (Steele, Lea and Flood 2014): a counter and a mixing function.
class RandomNumbers {
 public:
  explicit RandomNumbers(uint64_t seed) : state_(seed) {}
  // A stream of its own for every list of numbers.
  RandomNumbers(std::initializer_list<uint64_t> address) : state_(0) {
    for (const uint64_t part : address) state_ = Mix(state_ ^ Mix(part + kStep));
  }

  uint64_t Bits() { return Mix(state_ += kStep); }

  // Uniform in [0, n), n > 0; off by at most n / 2^64.
  uint32_t Below(uint32_t n) { return static_cast<uint32_t>(((Bits() >> 32) * uint64_t{n}) >> 32); }

  // Uniform in [0, 1).
  double Uniform() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }

  // Standard normal (Box and Muller 1958).
  double Normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - Uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * Uniform());
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15ULL;
  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
  }

  uint64_t state_;
};

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_RANDOM_NUMBERS_H_
