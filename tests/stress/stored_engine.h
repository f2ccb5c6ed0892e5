// An engine whose disk is a PowerCutFilesystem, started and stopped as often as a test likes.

#ifndef KVSERVICE_TESTS_STRESS_STORED_ENGINE_H_
#define KVSERVICE_TESTS_STRESS_STORED_ENGINE_H_

#include <rocksdb/env.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "attention/device.h"
#include "tests/kvservice/engine_client.h"
#include "tests/stress/power_cut_filesystem.h"

namespace kvservice::testing {

class StoredEngine {
 public:
  struct Options {
    EngineOptions engine = TestEngine::SmallOptions();
    uint32_t layer_count = 2;
    PowerCutFilesystem::Options filesystem;
    // Small, so that rows reach files too.
    size_t write_buffer_bytes = size_t{256} << 10;
    // What stands in front of the disk; unset = nothing.
    std::function<std::shared_ptr<rocksdb::FileSystem>(std::shared_ptr<PowerCutFilesystem> disk)>
        wrap;
    // What it works on; unset = the reference.
    std::function<std::unique_ptr<Device>()> new_device;
  };
  explicit StoredEngine(const Options& options);

  // Opens the store and starts an engine on it; the small model is registered.
  absl::Status Start();
  // The store alone, while no engine runs, for tests that change rows.
  absl::StatusOr<std::unique_ptr<DiskTier>> OpenTier() const;
  // As a server that is told to end does.
  void Stop();
  // The power goes now, and comes back.
  void Crash();

  TestEngine* operator->() const { return engine_.get(); }
  bool runs() const { return engine_ != nullptr; }
  PowerCutFilesystem* filesystem() const { return filesystem_.get(); }

 private:
  const Options options_;
  const std::shared_ptr<PowerCutFilesystem> filesystem_;
  const std::unique_ptr<rocksdb::Env> env_;
  uint64_t starts_ = 0;
  std::unique_ptr<TestEngine> engine_;
};

// The first min(words, length) words of every layer, up to what `info` says that there is, are
// stored with exactly these bytes: storing them again is a duplicate. A line about the first that
// is not; empty if all are.
std::string CompareStored(TestEngine* engine, const SequenceInfo& info,
                          const std::vector<uint32_t>& lengths, const Words& words);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_STORED_ENGINE_H_
