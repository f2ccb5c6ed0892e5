// A store whose rows may be anything, opened by an engine: it starts and knows sequences that their
// owners can name, or it does not start and says why. Whatever is named is there, lost aloud, or
// refused with a reason.
//
// Input: whether the store was closed, then changes of the rows of a good store: which row, then
// what happens to it.

#include <cstdlib>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention/device.h"
#include "kvservice/cache/checksum.h"
#include "kvservice/stored_rows.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/kvservice/engine_client.h"
#include "tests/kvservice/memory_tier.h"
#include "tests/kvservice/words.h"

namespace kvservice::testing {
namespace {

constexpr int kChangesMax = 8;

void Expect(bool condition) {
  if (!condition) std::abort();
}

EngineOptions Options() {
  EngineOptions options = TestEngine::SmallOptions();
  options.pool_bytes = 8 * BlockBytes(SmallModel(2));
  options.audit_rate = 0.0;
  return options;
}

// Three sequences, one of them suspended.
TierRows GoodStore() {
  TierRows rows;
  TestEngine engine(Options(), 2, nullptr, std::make_unique<MemoryTier>(&rows));
  for (const uint32_t length : {3U, 64U, 100U}) {
    const Handle handle = engine.NewSequence();
    engine.Fill(handle, 0, Counting(0, length));
    if (length == 64) Expect(engine.Suspend(handle).ok());
  }
  engine.get()->Drain();
  return rows;
}

// A row that is whole again: what its checksum does not find is for the parsers to find.
void Change(FuzzInput* input, std::string* row) {
  const auto how = input->Take<uint8_t>();
  const auto at = input->Take<uint16_t>();
  if (row->size() > sizeof(Checksum) && how % 4 != 3) row->resize(row->size() - sizeof(Checksum));
  if (row->empty()) return;
  const size_t place = at % row->size();
  if (how % 4 == 0) (*row)[place] = static_cast<char>(input->Take<uint8_t>());
  if (how % 4 == 1) row->resize(place);
  if (how % 4 == 2) row->insert(place, input->TakeBytes(input->Take<uint8_t>()));
  if (how % 4 == 3) (*row)[place] ^= static_cast<char>(input->Take<uint8_t>());
  if (how % 4 != 3) Seal(row);
}

void Run(FuzzInput input) {
  static const auto* const kGood = new TierRows(GoodStore());
  TierRows rows = *kGood;
  const auto closing = input.Take<uint8_t>();
  if (closing % 2 == 1) rows.closed = {.is_clean = false, .inventory = "", .crash_count = 1};
  for (int i = 0; i < kChangesMax && !input.empty(); ++i) {
    const auto which = input.Take<uint8_t>();
    if (which == 0xff) {
      Change(&input, &rows.closed.inventory);
      continue;
    }
    const auto row =
        std::next(rows.by_key.begin(), static_cast<ptrdiff_t>(which % rows.by_key.size()));
    Change(&input, &row->second);
  }
  FakeClock clock;
  SeededRandom random(1);
  auto device = NewDevice("cpu", {.thread_count = 1});
  Expect(device.ok());
  const auto engine = NewEngine(Options(), *std::move(device), &clock, &random,
                                std::make_unique<MemoryTier>(&rows));
  if (!engine.ok()) {
    Expect(!engine.status().message().empty());
    return;
  }
  std::promise<std::vector<SequenceInfo>> listed;
  (*engine)->List("", {}, UINT32_MAX, [&](absl::StatusOr<std::vector<SequenceInfo>> list) {
    listed.set_value(*std::move(list));
  });
  for (const SequenceInfo& info : listed.get_future().get()) {
    AttendStep step(SmallModel(2), 1, info.tenant);
    step.Add({info.id, info.generation}, 0, {0}).OnlyRead();
    const absl::Status status = step.Run(engine->get());
    Expect(status.ok() || !status.message().empty());
    if (!status.ok()) continue;
    Expect(step.result(0).status.ok() || !step.result(0).status.message().empty());
  }
}

}  // namespace
}  // namespace kvservice::testing

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvservice::testing::Run(kvservice::testing::FuzzInput(data, size));
  return 0;
}
