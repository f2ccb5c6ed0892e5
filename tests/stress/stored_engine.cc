#include "tests/stress/stored_engine.h"

#include <rocksdb/system_clock.h>

#include <algorithm>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvservice/cache/rocksdb_tier.h"

namespace kvservice::testing {
namespace {

constexpr char kDirectory[] = "/store";

// RocksDB waits a second after an error in the background, in case the disk recovers. Ours does
// not.
class ImpatientClock : public rocksdb::SystemClockWrapper {
 public:
  ImpatientClock() : rocksdb::SystemClockWrapper(rocksdb::SystemClock::Default()) {}
  const char* Name() const override { return "ImpatientClock"; }
  void SleepForMicroseconds(int) override { std::this_thread::yield(); }
};

class ImpatientEnv : public rocksdb::EnvWrapper {
 public:
  explicit ImpatientEnv(std::shared_ptr<rocksdb::FileSystem> filesystem)
      : rocksdb::EnvWrapper(rocksdb::NewCompositeEnv(filesystem)) {
    file_system_ = std::move(filesystem);
    system_clock_ = std::make_shared<ImpatientClock>();
  }
};

}  // namespace

StoredEngine::StoredEngine(const Options& options)
    : options_(options),
      filesystem_(std::make_shared<PowerCutFilesystem>(options.filesystem)),
      env_(std::make_unique<ImpatientEnv>(options.wrap ? options.wrap(filesystem_) : filesystem_)) {
}

absl::StatusOr<std::unique_ptr<DiskTier>> StoredEngine::OpenTier() const {
  return OpenRocksdbTier({.directory = kDirectory,
                          .write_buffer_bytes = options_.write_buffer_bytes,
                          .env = env_.get()});
}

absl::Status StoredEngine::Start() {
  auto tier = OpenTier();
  if (!tier.ok()) return tier.status();
  auto engine = std::make_unique<TestEngine>(
      options_.engine, options_.layer_count, options_.new_device ? options_.new_device() : nullptr,
      *std::move(tier), options_.filesystem.seed * 1000 + ++starts_);
  const absl::Status started = engine->start_status();
  if (started.ok()) engine_ = std::move(engine);
  return started;
}

void StoredEngine::Stop() { engine_.reset(); }

void StoredEngine::Crash() {
  filesystem_->CutAfter(0);
  engine_.reset();
  filesystem_->Reboot();
}

std::string CompareStored(TestEngine* engine, const SequenceInfo& info,
                          const std::vector<uint32_t>& lengths, const Words& words) {
  const Handle handle = {.id = info.id, .generation = info.generation};
  for (uint32_t layer = 0; layer < lengths.size(); ++layer) {
    const auto count = std::min<size_t>(lengths[layer], words.size());
    if (count == 0) continue;
    const Words stored(words.begin(), words.begin() + static_cast<ptrdiff_t>(count));
    const auto again = engine->Append(handle, layer, 0, stored, info.tenant);
    if (!again.ok()) return absl::StrCat("layer ", layer, ": ", again.status().ToString());
    if (!again->duplicate) return absl::StrCat("layer ", layer, " has fewer than ", count);
  }
  return "";
}

}  // namespace kvservice::testing
