// Attend calls that are on the device at the same time: which may be, what waits for them, and that
// nobody's answer depends on it.

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "kvservice/cache/sequence.h"
#include "tests/kvservice/engine_client.h"
#include "tests/kvservice/fakes.h"
#include "tests/kvservice/words.h"

namespace kvservice::testing {
namespace {

class AttendBesideTest : public ::testing::Test {
 protected:
  AttendBesideTest() {
    auto device = std::make_unique<LateDevice>(*NewDevice("reference", {}));
    device_ = device.get();
    engine_ = std::make_unique<TestEngine>(Options(), 2, std::move(device));
  }
  static EngineOptions Options() {
    EngineOptions options = TestEngine::SmallOptions();
    options.queue_calls_max = 64;
    return options;
  }

  // A step of one new token in layer 0.
  std::unique_ptr<AttendStep> Start(const Handle& handle, uint32_t position) {
    auto step = std::make_unique<AttendStep>(engine_->model(), 0);
    step->Add(handle, position, {position});
    step->Start(engine_->get());
    return step;
  }
  void ExpectAnswer(AttendStep* step, uint32_t position) {
    ASSERT_TRUE(step->Wait().ok());
    ExpectOk(*step);
    ExpectDense(*step, 0, engine_->model(), Counting(0, position + 1), position);
  }
  bool HasBegun(int count) {
    return Eventually([&] { return device_->begun_count() == count; });
  }
  bool Waits(uint32_t count) {
    return Eventually([&] { return engine_->get()->Stats().queue_calls == count; });
  }

  LateDevice* device_ = nullptr;
  std::unique_ptr<TestEngine> engine_;
};

TEST_F(AttendBesideTest, CallsOfOtherSequencesBeginWhileOneIsOnTheDevice) {
  const Handle a = engine_->NewSequence();
  const Handle b = engine_->NewSequence();
  device_->set_works(true);
  const auto first = Start(a, 0);
  ASSERT_TRUE(HasBegun(1));
  const auto second = Start(b, 0);
  ASSERT_TRUE(HasBegun(2));
  // There is no room for a third, so the first is waited for.
  ExpectAnswer(first.get(), 0);
  const auto third = Start(a, 1);
  ExpectAnswer(second.get(), 0);
  device_->set_works(false);
  ExpectAnswer(third.get(), 1);
  EXPECT_EQ(device_->most_beside(), 2U);
}

TEST_F(AttendBesideTest, ASequenceIsNeverInTwoCalls) {
  const Handle a = engine_->NewSequence();
  const Handle b = engine_->NewSequence();
  device_->set_works(true);
  const auto first = Start(a, 0);
  ASSERT_TRUE(HasBegun(1));
  // Of two sequences, one of which is on the device.
  AttendStep both(engine_->model(), 0);
  both.Add(b, 0, {0}).Add(a, 1, {1});
  both.Start(engine_->get());
  ExpectAnswer(first.get(), 0);
  device_->set_works(false);
  ASSERT_TRUE(both.Wait().ok());
  ExpectOk(both);
  ExpectDense(both, 1, engine_->model(), Counting(0, 2), 1);
  EXPECT_EQ(device_->most_beside(), 1U);
}

TEST_F(AttendBesideTest, EverythingElseWaitsUntilTheDeviceIsFree) {
  const Handle a = engine_->NewSequence();
  const Handle b = engine_->NewSequence();
  device_->set_works(true);
  const auto first = Start(a, 0);
  ASSERT_TRUE(HasBegun(1));
  std::thread dropper([&] { EXPECT_TRUE(engine_->Drop(a).ok()); });
  ASSERT_TRUE(Waits(1));
  const auto second = Start(b, 0);
  ASSERT_TRUE(HasBegun(2));
  ExpectAnswer(first.get(), 0);
  // The second is on the device still.
  EXPECT_EQ(engine_->get()->Stats().queue_calls, 1U);
  device_->set_works(false);
  ExpectAnswer(second.get(), 0);
  dropper.join();
}

// Leases end although one call or another is always on the device.
TEST_F(AttendBesideTest, AStreamOfCallsStarvesNothing) {
  const Handle a = engine_->NewSequence();
  const Handle b = engine_->NewSequence();
  CreateOptions options;
  options.model = kModel;
  options.lease_ms = 1'000;
  ASSERT_TRUE(engine_->Create(options).ok());
  device_->set_works(true);
  auto on_device = Start(a, 0);
  ASSERT_TRUE(HasBegun(1));
  engine_->clock.AdvanceMs(1'001);
  uint32_t steps = 1;
  while (engine_->get()->Stats().sequences > 2 && steps < 200) {
    auto next = Start(steps % 2 == 0 ? a : b, steps / 2);
    ++steps;
    ASSERT_TRUE(HasBegun(static_cast<int>(steps)));
    ExpectAnswer(on_device.get(), (steps - 2) / 2);
    on_device = std::move(next);
  }
  EXPECT_LT(steps, 40U);
  EXPECT_GT(steps, 2U);
  EXPECT_EQ(device_->most_beside(), 2U);
  device_->set_works(false);
  ExpectAnswer(on_device.get(), (steps - 1) / 2);
}

// A call that cannot be answered takes no place on the device.
TEST_F(AttendBesideTest, RefusedCallsKeepTheirOrder) {
  const Handle a = engine_->NewSequence();
  const Handle b = engine_->NewSequence();
  device_->set_works(true);
  const auto first = Start(a, 0);
  ASSERT_TRUE(HasBegun(1));
  const auto gap = Start(b, 7);
  ASSERT_TRUE(first->Wait().ok());
  ASSERT_TRUE(gap->Wait().ok());
  EXPECT_FALSE(gap->result(0).status.ok());
  device_->set_works(false);
  ExpectAnswer(Start(b, 0).get(), 0);
}

// A call that finds the device's memory full while another reads it has its rows on the host: what
// is read stays where it is.
TEST_F(AttendBesideTest, RowsStayWhereTheyAreWhileACallReadsThem) {
  constexpr uint32_t kBlocks = 6;
  const ModelSpec model = SmallModel(2);
  const CacheShape shape(model.layout, model.layer_count, {});
  EngineOptions options = Options();
  options.pool_bytes = (kBlocks + 1) * shape.block().rows + (kBlocks + 3) * shape.block().sketches;
  options.host_pool_bytes = 8 * shape.block().rows;
  auto device = std::make_unique<LateDevice>(*NewDevice("reference", {}));
  device_ = device.get();
  engine_ = std::make_unique<TestEngine>(options, 2, std::move(device));
  const Handle a = engine_->NewSequence();
  const Handle b = engine_->NewSequence();
  engine_->Fill(a, 0, Counting(0, kBlocks * kBlockTokens - 1));
  engine_->Fill(b, 0, Counting(0, kBlockTokens));
  device_->set_works(true);
  const auto first = Start(a, kBlocks * kBlockTokens - 1);
  ASSERT_TRUE(HasBegun(1));
  const auto second = Start(b, kBlockTokens);
  ASSERT_TRUE(HasBegun(2));
  device_->set_works(false);
  ExpectAnswer(first.get(), kBlocks * kBlockTokens - 1);
  ExpectAnswer(second.get(), kBlockTokens);
  EXPECT_EQ(engine_->get()->Stats().host_pool_bytes_used, shape.block().rows);
  EXPECT_EQ(engine_->get()->Stats().blocks_to_host_total, 0U);
}

// Threads that decode, fork and drop.
void Storm(TestEngine* engine, double out_tolerance) {
  const auto decode = [&](uint32_t seed) {
    std::mt19937 random(seed);
    Handle handle = engine->NewSequence();
    Words words;
    for (int i = 0; i < 150; ++i) {
      words.push_back(random() % 1000);
      const auto position = static_cast<uint32_t>(words.size() - 1);
      for (uint32_t layer = 0; layer < 2; ++layer) {
        AttendStep step(engine->model(), layer);
        step.Add(handle, position, {words.back()});
        ASSERT_TRUE(step.Run(engine->get()).ok());
        ExpectOk(step);
        ExpectDense(step, 0, engine->model(), words, position, out_tolerance);
      }
      if (random() % 8 != 0) continue;
      // Goes on with a copy, whose last block is shared until it is written.
      const auto length = 1 + static_cast<uint32_t>(random() % words.size());
      const auto fork = engine->Fork(handle, length);
      ASSERT_TRUE(fork.ok()) << fork.status();
      ASSERT_TRUE(engine->Drop(handle).ok());
      handle = {.id = fork->id, .generation = fork->generation};
      words.resize(length);
    }
    EXPECT_TRUE(engine->Drop(handle).ok());
  };
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 4; ++t) threads.emplace_back(decode, t);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(engine->get()->Stats().blocks_used, 0U);
}

// While calls are on the device for random times.
TEST_F(AttendBesideTest, NobodysAnswerDependsOnOthers) {
  std::atomic<bool> ends = false;
  std::thread flicker([&] {
    std::mt19937 random(3);
    while (!ends) {
      device_->set_works(random() % 2 == 0);
      std::this_thread::yield();
    }
    device_->set_works(false);
  });
  Storm(engine_.get(), 1e-12);
  ends = true;
  flicker.join();
  EXPECT_EQ(device_->most_beside(), 2U);
}

TEST_F(AttendBesideTest, NorOnAGpu) {
  auto device = NewDevice("cuda", {});
  if (!device.ok()) GTEST_SKIP() << device.status();
  TestEngine engine(Options(), 2, *std::move(device));
  Storm(&engine, 1e-10);
}

}  // namespace
}  // namespace kvservice::testing
