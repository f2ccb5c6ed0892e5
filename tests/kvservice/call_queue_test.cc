#include "kvservice/call_queue.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "kvservice/error.h"
#include "kvservice/spin.h"
#include "tests/kvservice/fakes.h"

namespace kvservice {
namespace {

constexpr std::chrono::milliseconds kNoWait{0};

class CallQueueTest : public ::testing::Test {
 protected:
  // A call of `row_count` rows; it lives as long as the test.
  AttendCall* Attend(uint32_t layer, size_t row_count) {
    calls_.push_back(std::make_unique<AttendCall>());
    calls_.back()->layer = layer;
    calls_.back()->rows.resize(row_count);
    return calls_.back().get();
  }
  Task Note(const std::string& name) {
    return [this, name](const absl::Status& /*admission*/) { log_ += name + " "; };
  }
  void PushControl(const std::string& name) {
    Task task = Note(name);
    ASSERT_TRUE(queue_.PushControl(&task).ok());
  }
  void PushAppend(const std::string& name) {
    Task task = Note(name);
    ASSERT_TRUE(queue_.PushAppend(&task).ok());
  }
  // Takes one piece of work and writes it down.
  void Take() {
    Work work;
    ASSERT_TRUE(queue_.Take(kNoWait, &work));
    if (work.task != nullptr) work.task(absl::OkStatus());
    if (!work.attends.empty()) log_ += "attend";
    for (const AttendCall* call : work.attends) {
      for (size_t i = 0; i < calls_.size(); ++i) {
        if (calls_[i].get() == call) log_ += ":" + std::to_string(i);
      }
    }
    if (!work.attends.empty()) log_ += ' ';
  }

  CallQueue queue_{6, 8};
  std::vector<std::unique_ptr<AttendCall>> calls_;
  std::string log_;
};

TEST_F(CallQueueTest, AttendBeforeControlBeforeAppend) {
  PushAppend("append1");
  PushControl("control1");
  PushAppend("append2");
  ASSERT_TRUE(queue_.PushAttend(Attend(0, 1)).ok());
  PushControl("control2");
  for (int i = 0; i < 5; ++i) Take();
  EXPECT_EQ(log_, "attend:0 control1 control2 append1 append2 ");
}

TEST_F(CallQueueTest, CallsOfOneLayerLeaveTogether) {
  for (const uint32_t layer : {3U, 4U, 3U, 3U, 4U}) {
    ASSERT_TRUE(queue_.PushAttend(Attend(layer, 2)).ok());
  }
  Take();
  Take();
  EXPECT_EQ(log_, "attend:0:2:3 attend:1:4 ");
}

TEST_F(CallQueueTest, ABatchHasAtMostRowsMaxAndNobodyOvertakesInALayer) {
  for (const size_t rows : {3U, 4U, 2U, 1U}) {
    ASSERT_TRUE(queue_.PushAttend(Attend(0, rows)).ok());
  }
  ASSERT_TRUE(queue_.PushAttend(Attend(0, 300)).ok());
  for (int i = 0; i < 3; ++i) Take();
  EXPECT_EQ(log_, "attend:0:1 attend:2:3 attend:4 ");
}

TEST_F(CallQueueTest, TheBoundIsOneForAllKinds) {
  PushAppend("append");
  PushControl("control");
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(queue_.PushAttend(Attend(0, 1)).ok());
  Task task = Note("late");
  for (const absl::Status& status :
       {queue_.PushAttend(Attend(0, 1)), queue_.PushControl(&task), queue_.PushAppend(&task)}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(DetailsOf(status).reason, "OVERLOADED");
    EXPECT_GT(DetailsOf(status).retry_delay_ms, 0U);
  }
  EXPECT_EQ(queue_.counts().waiting, 6U);
  EXPECT_EQ(queue_.counts().total, 9U);
  EXPECT_EQ(queue_.counts().shed_total, 3U);
  Take();
  EXPECT_EQ(queue_.counts().waiting, 2U);
  ASSERT_TRUE(queue_.PushControl(&task).ok()) << "the task was left with its owner";
  Take();
  Take();
  EXPECT_EQ(log_, "attend:0:1:2:3 control late ");
}

TEST_F(CallQueueTest, AttendCallsDoNotStarveTheOthers) {
  PushControl("control");
  for (uint32_t i = 0; i < CallQueue::kAttendStreakMax; ++i) {
    ASSERT_TRUE(queue_.PushAttend(Attend(0, 1)).ok());
    Take();
  }
  EXPECT_EQ(log_.find("control"), std::string::npos);
  ASSERT_TRUE(queue_.PushAttend(Attend(0, 1)).ok());
  Take();
  EXPECT_NE(log_.find("control"), std::string::npos);
}

TEST_F(CallQueueTest, CloseRefusesTheNewAndHandsOutTheOld) {
  PushAppend("append");
  queue_.Close();
  Task task = Note("late");
  EXPECT_EQ(DetailsOf(queue_.PushControl(&task)).reason, "DRAINING");
  EXPECT_EQ(queue_.PushAttend(Attend(0, 1)).code(), absl::StatusCode::kUnavailable);
  Take();
  EXPECT_EQ(log_, "append ");
  Work work;
  EXPECT_FALSE(queue_.Take(kNoWait, &work));
}

// ---- Tenants ----

class SharedCallQueueTest : public CallQueueTest {
 protected:
  absl::Status Push(const char* tenant, uint32_t layer = 0) {
    AttendCall* const call = Attend(layer, 1);
    call->tenant = tenant;
    return shared_.PushAttend(call);
  }
  // Tenants of the next batch, and the time that it takes.
  std::string Batch(uint64_t ms) {
    Work work;
    EXPECT_TRUE(shared_.Take(kNoWait, &work));
    clock_.AdvanceMs(ms);
    std::string tenants;
    for (const AttendCall* call : work.attends) tenants += call->tenant;
    return tenants;
  }

  testing::FakeClock clock_;
  CallQueue shared_{16, 8, &clock_};
};

TEST_F(SharedCallQueueTest, TenantsTakeTurns) {
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(Push("a").ok());
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(Push("b").ok());
  ASSERT_TRUE(Push("c", 1).ok());
  EXPECT_EQ(Batch(1), "ababaaaa") << "nobody knows yet what a row takes";
  EXPECT_EQ(Batch(1), "c");
}

TEST_F(SharedCallQueueTest, WhoCallsBesideOthersWaitsForAShortBatchOnly) {
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(Push("a").ok());
  ASSERT_TRUE(Push("b").ok());
  EXPECT_EQ(Batch(7), "abaaaaa") << "a millisecond each";
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(Push("a").ok());
  EXPECT_EQ(Batch(2), "aa");
  ASSERT_TRUE(Push("b").ok());
  EXPECT_EQ(Batch(2), "ba");
  EXPECT_EQ(Batch(20), "aa");
  EXPECT_EQ(Batch(0), "a") << "rows have become slower, and one runs always";
}

TEST_F(SharedCallQueueTest, NobodyTakesTheLastPlacesFromOthers) {
  ASSERT_TRUE(Push("b").ok());
  uint32_t taken = 0;
  while (Push("a").ok()) ++taken;
  EXPECT_EQ(taken, 8U) << "as many as are left";
  EXPECT_EQ(DetailsOf(Push("a")).reason, "OVERLOADED");
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(Push("b").ok());
  EXPECT_TRUE(Push("c").ok());
  EXPECT_EQ(shared_.counts().shed_total, 2U);
}

TEST_F(SharedCallQueueTest, ATenantThatIsAloneAgainHasAllOfIt) {
  ASSERT_TRUE(Push("b").ok());
  ASSERT_TRUE(Push("a").ok());
  EXPECT_EQ(Batch(40), "ba");
  clock_.AdvanceMs(CallQueue::kSharedForNs / 1'000'000);
  EXPECT_EQ(Batch(0), "") << "nothing waits";
  for (int i = 0; i < 16; ++i) ASSERT_TRUE(Push("a").ok());
  EXPECT_EQ(Batch(0), "aaaaaaaa");
}

// Stands still, and does something the third time that it is looked at.
class BusyClock : public Clock {
 public:
  uint64_t SteadyNowNs() const override {
    if (++looks_ == 3) act();
    return 1'000'000'000;
  }
  uint64_t WallNowNs() const override { return 0; }

  std::function<void()> act;

 private:
  mutable int looks_ = 0;
};

// The second call comes while its only thread looks at the clock, which it does when it looks for
// work: had it gone to sleep, nobody would have called.
TEST_F(CallQueueTest, ATakerThatHasWorkedLooksForMore) {
  constexpr uint32_t kSpinUs = 5'000;
  constexpr std::chrono::milliseconds kWait{1};
  BusyClock clock;
  CallQueue queue(6, 8, &clock, kSpinUs);
  clock.act = [&] { ASSERT_TRUE(queue.PushAttend(Attend(1, 1)).ok()); };
  ASSERT_TRUE(queue.PushAttend(Attend(0, 1)).ok());
  Work work;
  ASSERT_TRUE(queue.Take(kWait, &work));
  ASSERT_EQ(work.attends.size(), 1U);
  EXPECT_EQ(work.attends[0]->layer, 0U);
  ASSERT_TRUE(queue.Take(kWait, &work));
  ASSERT_EQ(work.attends.size(), 1U);
  EXPECT_EQ(work.attends[0]->layer, 1U);
}

TEST(SpinWindow, OpensWithWorkAndClosesWithTime) {
  testing::FakeClock clock;
  SpinWindow window(&clock, 2'000);
  EXPECT_FALSE(window.Wait());
  window.Open();
  EXPECT_TRUE(window.Wait());
  clock.AdvanceMs(1);
  EXPECT_TRUE(window.Wait());
  clock.AdvanceMs(1);
  EXPECT_FALSE(window.Wait());
  EXPECT_FALSE(window.Wait());
  SpinWindow never(nullptr, 0);
  never.Open();
  EXPECT_FALSE(never.Wait());
}

TEST_F(CallQueueTest, ATimeoutIsNoWork) {
  Work work;
  EXPECT_TRUE(queue_.Take(kNoWait, &work));
  EXPECT_TRUE(work.attends.empty());
  EXPECT_TRUE(work.task == nullptr);
}

}  // namespace
}  // namespace kvservice
