// The combiner of certificates, given numbers that may be anything: what comes out never says more
// than what went in allows.
//
// Input: two certificates' numbers.

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "attention/certificate.h"
#include "tests/fuzz/fuzz_target.h"

namespace kvservice::testing {
namespace {

void Expect(bool condition) {
  if (!condition) std::abort();
}

HeadCertificate TakeCertificate(FuzzInput* input) {
  HeadCertificate certificate;
  certificate.level = static_cast<Level>(input->Take<uint8_t>() % 4);
  certificate.action = static_cast<Action>(input->Take<uint8_t>() % 5);
  certificate.met = input->Take<uint8_t>() % 2 == 0;
  certificate.log_kept = input->Take<double>();
  certificate.log_kept_lower.value = input->Take<double>();
  certificate.log_kept_upper.value = input->Take<double>();
  certificate.log_dropped_upper.value = input->Take<double>();
  certificate.log_dropped_lower.value = input->Take<double>();
  certificate.dropped_mass_estimate = input->Take<float>();
  certificate.value_norm_lower = input->Take<double>();
  certificate.failure_probability = std::abs(input->Take<double>());
  return certificate;
}

bool IsShare(double x) { return x >= 0.0 && x <= 1.0; }

// e^x in long double; nothing is smaller than it may be where x is -inf.
long double Mass(double log_mass) { return std::exp(static_cast<long double>(log_mass)); }

void Run(FuzzInput input) {
  const HeadCertificate a = TakeCertificate(&input);
  const HeadCertificate b = TakeCertificate(&input);
  HeadCertificate merged = Merge(a, b);
  Expect(merged.level <= std::min(a.level, b.level));
  Expect(!merged.met || (a.met && b.met));
  Expect(IsShare(merged.dropped_mass_upper.value) && IsShare(merged.dropped_mass_lower.value));
  const bool has_nan =
      std::isnan(a.log_kept) || std::isnan(b.log_kept) || std::isnan(a.log_kept_lower.value) ||
      std::isnan(b.log_kept_lower.value) || std::isnan(a.log_kept_upper.value) ||
      std::isnan(b.log_kept_upper.value) || std::isnan(a.log_dropped_upper.value) ||
      std::isnan(b.log_dropped_upper.value) || std::isnan(a.log_dropped_lower.value) ||
      std::isnan(b.log_dropped_lower.value);
  if (has_nan) {
    // Whatever the parts said, nothing is known.
    Expect(merged.level == Level::kNone && merged.dropped_mass_upper.value == 1.0 &&
           merged.dropped_mass_lower.value == 0.0);
    return;
  }
  // Sums of masses on the side that they say.
  const auto at_least = [](double sum, double x, double y) {
    Expect(sum >= std::max(x, y));
    const long double exact = Mass(x) + Mass(y);
    if (std::isfinite(exact) && exact > 0.0L && std::isfinite(sum)) {
      Expect(static_cast<long double>(sum) >= std::log(exact) - 1e-18L);
    }
  };
  at_least(merged.log_dropped_upper.value, a.log_dropped_upper.value, b.log_dropped_upper.value);
  at_least(merged.log_kept_upper.value, a.log_kept_upper.value, b.log_kept_upper.value);
  const auto at_most = [](double sum, double x, double y) {
    const long double exact = Mass(x) + Mass(y);
    if (std::isfinite(exact) && std::isfinite(sum) && exact > 0.0L) {
      Expect(static_cast<long double>(sum) <= std::log(exact) + 1e-18L);
    }
  };
  at_most(merged.log_dropped_lower.value, a.log_dropped_lower.value, b.log_dropped_lower.value);
  at_most(merged.log_kept_lower.value, a.log_kept_lower.value, b.log_kept_lower.value);
  if (std::isfinite(a.failure_probability + b.failure_probability)) {
    Expect(merged.failure_probability >=
           std::min(1.0, a.failure_probability + b.failure_probability));
  }
}

}  // namespace
}  // namespace kvservice::testing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvservice::testing::Run(kvservice::testing::FuzzInput(data, size));
  return 0;
}
