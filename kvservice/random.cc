#include "kvservice/random.h"

#include <sys/random.h>

#include <cerrno>

namespace kvservice {
namespace {

class KernelRandom : public Random {
 public:
  absl::Status Fill(absl::Span<std::byte> bytes) override {
    while (!bytes.empty()) {
      const ssize_t count = getrandom(bytes.data(), bytes.size(), 0);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return absl::UnavailableError("the system's random generator failed");
      bytes.remove_prefix(static_cast<size_t>(count));
    }
    return absl::OkStatus();
  }
};

}  // namespace

// Stateless, so one object serves everybody.
Random* SystemRandom() {
  static KernelRandom random;
  return &random;
}

}  // namespace kvservice
