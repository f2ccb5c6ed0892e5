// What plans mean over several calls, rows and query tokens, for every device.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "attention/float16.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/oracle.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

class DevicePlan : public ::testing::TestWithParam<std::string> {
 protected:
  std::unique_ptr<KvCase> NewCase(CaseOptions options) {
    return std::make_unique<KvCase>(device_.get(), options);
  }
  // A call of one query token at an earlier length, judged.
  std::unique_ptr<Call> At(const KvCase& kv, uint32_t length, const std::vector<float>& queries,
                           const Plan& plan) {
    auto call = std::make_unique<Call>(kv, length, 1, queries, plan);
    const Oracle oracle(kv, call->row);
    RunAndCheck(kv, oracle, call.get());
    return call;
  }

  const std::unique_ptr<Device> device_ = NewDeviceOrDie(GetParam());
};

std::vector<float> OtherQueries(const std::vector<float>& queries) {
  std::vector<float> other = queries;
  std::rotate(other.begin(), other.begin() + 7, other.end());
  return other;
}

TEST_P(DevicePlan, QueryTokensAreCausalAmongThemselves) {
  for (const uint32_t window : {0U, 100U, 5U}) {
    for (uint32_t query_count = 1; query_count <= kQueryTokensMax; ++query_count) {
      CaseOptions options;
      options.length = 323;
      options.query_count = query_count;
      options.seed = query_count;
      const auto kv = NewCase(options);
      kv->mutable_shape()->sliding_window = window;
      RunPlan(*kv, BasePlan(Source::kAll, 323));
      Plan plan = BasePlan(Source::kScan, 323, 70);
      plan.keep.top_k = 30;
      plan.prove = Guarantee::kDeterministic;
      RunPlan(*kv, plan);
      plan.prove = Guarantee::kExact;
      RunPlan(*kv, plan);
      plan.prove = Guarantee::kNone;
      RunPlan(*kv, plan);
    }
  }
}

// Even where all slices are sealed and the plan forgets a local window.
TEST_P(DevicePlan, QueryTokensAlwaysReadThemselves) {
  CaseOptions options;
  options.length = 320;
  options.query_count = 8;
  const auto kv = NewCase(options);
  Plan plan = BasePlan(Source::kScan, 320, 0);
  plan.prove = Guarantee::kDeterministic;
  EXPECT_EQ(RunPlan(*kv, plan)->groups[0].tokens_read, 8U + 8U);
}

// A window's edge may fall anywhere in a slice, and below it even sinks are outside the reference.
TEST_P(DevicePlan, SlidingWindowsMoveTheReference) {
  CaseOptions options;
  options.length = 450;
  options.query_count = 3;
  const auto kv = NewCase(options);
  for (const uint32_t window : {1U, 63U, 64U, 65U, 200U, 383U, 384U, 447U, 448U, 450U, 1000U}) {
    SCOPED_TRACE(window);
    kv->mutable_shape()->sliding_window = window;
    RunPlan(*kv, BasePlan(Source::kAll, 450));
    Plan plan = BasePlan(Source::kScan, 450, 60);
    plan.keep.top_k = 20;
    plan.visible_begin = 120;
    plan.prove = Guarantee::kDeterministic;
    RunPlan(*kv, plan);
    plan.source = Source::kGiven;
    plan.dense_share = 1.0F;
    const std::vector<uint32_t> given = {0, 100, 200, 300, 0, 1, 250, 449};
    const std::vector<uint32_t> offsets = {0, 4, 8};
    plan.given = given;
    plan.given_offsets = offsets;
    RunPlan(*kv, plan);
  }
}

TEST_P(DevicePlan, SoftcapBendsBothEnds) {
  for (const Keys keys : {Keys::kNormal, Keys::kWideLogits, Keys::kOpposing}) {
    CaseOptions options;
    options.length = 400;
    options.keys = keys;
    const auto kv = NewCase(options);
    for (const float cap : {50.0F, 3.0F}) {
      kv->mutable_shape()->logit_softcap = cap;
      RunPlan(*kv, BasePlan(Source::kAll, 400));
      Plan plan = BasePlan(Source::kScan, 400);
      plan.keep.top_k = 50;
      for (const Guarantee prove :
           {Guarantee::kNone, Guarantee::kDeterministic, Guarantee::kExact}) {
        plan.prove = prove;
        RunPlan(*kv, plan);
      }
    }
  }
}

TEST_P(DevicePlan, EveryLengthWorks) {
  CaseOptions options;
  options.length = 270;
  options.layout.head_dim = 80;
  const auto kv = NewCase(options);
  for (const uint32_t length : {1U,  2U,   7U,   8U,   9U,   63U,  64U,  65U,  71U,  72U,
                                73U, 127U, 128U, 129U, 191U, 192U, 255U, 256U, 257U, 270U}) {
    SCOPED_TRACE(length);
    for (const uint32_t local : {1U, 16U, 64U}) {
      Plan plan = BasePlan(Source::kAll, length, std::min(local, length));
      At(*kv, length, kv->queries(), plan);
      plan.source = Source::kScan;
      plan.keep.top_k = 20;
      plan.prove = Guarantee::kDeterministic;
      At(*kv, length, kv->queries(), plan);
      plan.sink_end = 0;
      plan.keep.top_k = 0;
      At(*kv, length, kv->queries(), plan);
      plan.sink_end = 100;
      plan.visible_begin = 150;
      At(*kv, length, kv->queries(), plan);
    }
  }
}

// One token dropped, none dropped, all of the middle dropped.
TEST_P(DevicePlan, TailsOfOneTokenAndNone) {
  CaseOptions options;
  options.length = 320;
  const auto kv = NewCase(options);
  Plan plan = BasePlan(Source::kGiven, 320, 64);
  plan.dense_share = 1.0F;
  plan.prove = Guarantee::kDeterministic;
  for (const uint32_t missing : {8U, 63U, 64U, 200U, 255U, 1000U}) {
    std::vector<uint32_t> given;
    for (int kv_head = 0; kv_head < 2; ++kv_head) {
      for (uint32_t token = 8; token < 256; ++token) {
        if (token != missing) given.push_back(token);
      }
    }
    const auto half = static_cast<uint32_t>(given.size() / 2);
    const std::vector<uint32_t> offsets = {0, half, 2 * half};
    plan.given = given;
    plan.given_offsets = offsets;
    const auto call = RunPlan(*kv, plan);
    EXPECT_EQ(call->groups[0].tokens_read, missing == 1000 ? 320U : 319U);
    EXPECT_EQ(call->certificates[0].level, missing == 1000 ? Level::kExact : Level::kDeterministic);
  }
  const std::vector<uint32_t> none = {0, 0, 0};
  plan.given = {};
  plan.given_offsets = none;
  EXPECT_EQ(RunPlan(*kv, plan)->groups[1].tokens_read, 72U);
}

TEST_P(DevicePlan, RowsOfABatchAreIndependent) {
  CaseOptions options;
  options.length = 500;
  options.query_count = 2;
  const auto kv = NewCase(options);
  const auto lists = device_->NewTokenLists(options.layout, 4);
  std::vector<std::unique_ptr<Call>> calls;
  std::vector<AttendRow> rows;
  for (const uint32_t length : {500U, 100U, 333U, 448U, 2U, 64U, 490U}) {
    Plan plan =
        BasePlan(length % 2 == 0 ? Source::kScan : Source::kAll, length, std::min(length, 80U));
    plan.keep.top_k = 25;
    plan.prove = length == 448 ? Guarantee::kNone : Guarantee::kDeterministic;
    if (length == 490) {
      plan.source = Source::kReuse;
      plan.lists = lists.get();
    }
    if (length == 333) {
      plan.source = Source::kScan;
      plan.max_dropped_mass = 1e-9F;
      plan.on_violation = OnViolation::kFail;
    }
    calls.push_back(std::make_unique<Call>(*kv, length, 2, kv->queries(), plan));
    rows.push_back(calls.back()->row);
  }
  device_->Attend(kv->shape(), absl::MakeSpan(rows));
  const Tolerance tolerance = ToleranceOf(*device_);
  for (size_t i = 0; i < calls.size(); ++i) {
    calls[i]->row.status = rows[i].status;
    if (calls[i]->row.view.length == 333) {
      EXPECT_EQ(rows[i].status.code(), absl::StatusCode::kFailedPrecondition);
      EXPECT_NE(rows[i].status.message().find("BOUND_NOT_MET"), absl::string_view::npos);
      continue;
    }
    const Oracle oracle(*kv, calls[i]->row);
    CheckCall(*kv, oracle, *calls[i], &tolerance, nullptr);
  }
}

// Numbers behind the attended length must not be touched: the tail of the open slice is NaN.
TEST_P(DevicePlan, NothingBehindTheLengthIsRead) {
  CaseOptions options;
  options.length = 300;
  const auto kv = NewCase(options);
  for (uint32_t token = 270; token < 300; ++token) {
    for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
      kv->SetKey(kv_head, token, std::vector<float>(2 * 64, std::nanf("")));  // K and V.
    }
  }
  for (const Source source : {Source::kAll, Source::kScan}) {
    Plan plan = BasePlan(source, 270);
    plan.keep.top_k = 20;
    plan.prove = Guarantee::kDeterministic;
    const auto call = At(*kv, 270, kv->queries(), plan);
    for (const float x : call->out) EXPECT_TRUE(std::isfinite(x));
  }
}

TEST_P(DevicePlan, DissimilarQueriesScan) {
  CaseOptions options;
  options.length = 420;
  const auto kv = NewCase(options);
  const auto lists = device_->NewTokenLists(options.layout, 4);
  Plan plan = BasePlan(Source::kReuse, 420);
  plan.keep.top_k = 40;
  plan.lists = lists.get();
  const auto first = RunPlan(*kv, plan);
  EXPECT_EQ(first->groups[0].similarity, -2.0F);
  EXPECT_TRUE(first->groups[0].scanned);
  const auto other = At(*kv, 420, OtherQueries(kv->queries()), plan);
  EXPECT_TRUE(other->groups[0].scanned);
  EXPECT_LT(other->groups[0].similarity, 0.8F);
  EXPECT_GT(other->groups[0].similarity, -1.001F);
  // Now both are anchors, and each finds its own.
  EXPECT_EQ(RunPlan(*kv, plan)->selected, first->selected);
  EXPECT_EQ(At(*kv, 420, OtherQueries(kv->queries()), plan)->selected, other->selected);
}

// Each KV head has its own cosine: one reuses where the other scans, by the same query.
TEST_P(DevicePlan, EveryKvHeadHasItsOwnCosine) {
  CaseOptions options;
  options.length = 420;
  const auto kv = NewCase(options);
  const std::vector<float> never_first = {1.5F, -1.0F};
  const std::vector<float> never_second = {-1.0F, 1.5F};
  for (const std::vector<float>* cosines : {&never_first, &never_second}) {
    const auto lists = device_->NewTokenLists(options.layout, 4);
    Plan plan = BasePlan(Source::kReuse, 420);
    plan.keep.top_k = 40;
    plan.lists = lists.get();
    RunPlan(*kv, plan);
    plan.min_cosines = *cosines;
    const auto call = At(*kv, 420, OtherQueries(kv->queries()), plan);
    for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
      EXPECT_EQ(call->groups[kv_head].scanned, (*cosines)[kv_head] > 1.0F);
    }
  }
}

// What theory needs: a bound of the key norms, which follows the tokens, and how far the query is
// from the one whose list it takes.
TEST_P(DevicePlan, ReusesReportNormsAndDistances) {
  CaseOptions options;
  options.length = 420;
  const auto kv = NewCase(options);
  const auto lists = device_->NewTokenLists(options.layout, 4);
  const KvLayout& layout = options.layout;
  const auto largest_norm = [&](const Call& call, uint32_t kv_head) {
    double largest = 0.0;
    for (uint32_t token = 0; token < call.row.view.length; ++token) {
      const std::byte* key = kv->Row(kv_head, token);
      double squares = 0.0;
      for (uint32_t c = 0; c < layout.head_dim; ++c) {
        const double x = LoadElement(layout.dtype, key, c);
        squares += x * x;
      }
      largest = std::max(largest, std::sqrt(squares));
    }
    return largest;
  };
  Plan plan = BasePlan(Source::kReuse, 400);
  plan.keep.top_k = 40;
  plan.lists = lists.get();
  const auto anchor = At(*kv, 400, kv->queries(), plan);
  std::vector<float> near = kv->queries();
  for (size_t head = 0; head < near.size(); head += 64) near[head] += 0.125F;
  const auto reused = At(*kv, 420, near, plan);
  for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
    const auto before = static_cast<double>(anchor->groups[kv_head].key_norm_max);
    const auto after = static_cast<double>(reused->groups[kv_head].key_norm_max);
    EXPECT_GE(before, largest_norm(*anchor, kv_head));
    EXPECT_NEAR(before, largest_norm(*anchor, kv_head), 1e-5 * before);
    EXPECT_GE(after, largest_norm(*reused, kv_head));
    EXPECT_NEAR(after, largest_norm(*reused, kv_head), 1e-5 * after);
    EXPECT_LT(anchor->groups[kv_head].query_distance, 0.0F) << "no list was taken";
    EXPECT_EQ(reused->groups[kv_head].action, Action::kReused);
    EXPECT_NEAR(reused->groups[kv_head].query_distance, 0.125F, 1e-4F);
  }
  // Other sources know nothing.
  plan.source = Source::kScan;
  const auto scanned = At(*kv, 420, near, plan);
  EXPECT_LT(scanned->groups[0].key_norm_max, 0.0F);
  EXPECT_LT(scanned->groups[0].query_distance, 0.0F);
}

// The query of a step is compared before rotation, so moving on by some positions does not make it
// dissimilar.
TEST_P(DevicePlan, SimilarityIsTakenBeforeRotation) {
  CaseOptions options;
  options.length = 420;
  const auto kv = NewCase(options);
  std::vector<float> frequencies(32);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = std::pow(10000.0F, -static_cast<float>(i) / 32.0F);
  }
  for (const RotaryStyle style : {RotaryStyle::kHalf, RotaryStyle::kInterleaved}) {
    LayerShape* shape = kv->mutable_shape();
    shape->inverse_frequencies = frequencies;
    shape->rotary_style = style;
    const auto rotated = [&](uint32_t position) {
      std::vector<float> q = kv->queries();
      for (size_t i = 0; i < q.size(); i += 64) {
        for (size_t pair = 0; pair < 32; ++pair) {
          const size_t a = i + (style == RotaryStyle::kHalf ? pair : 2 * pair);
          const size_t b = i + (style == RotaryStyle::kHalf ? pair + 32 : 2 * pair + 1);
          const double angle = static_cast<double>(position) * frequencies[pair];
          const double x = q[a];
          const double y = q[b];
          q[a] = static_cast<float>(x * std::cos(angle) - y * std::sin(angle));
          q[b] = static_cast<float>(y * std::cos(angle) + x * std::sin(angle));
        }
      }
      return q;
    };
    const auto lists = device_->NewTokenLists(options.layout, 4);
    Plan plan = BasePlan(Source::kReuse, 400);
    plan.keep.top_k = 40;
    plan.lists = lists.get();
    At(*kv, 400, rotated(399), plan);
    const auto second = At(*kv, 415, rotated(414), plan);
    EXPECT_NEAR(second->groups[0].similarity, 1.0F, 1e-4F);
    EXPECT_EQ(second->groups[0].action, Action::kReused);
    const auto unmoved = At(*kv, 415, rotated(399), plan);
    EXPECT_LT(unmoved->groups[0].similarity, 0.99F);
  }
}

// Keys in the last 56 channels, but for one token, which is seen by a query that looks along
// channel
// 5. A query that looks along channel 6 sees nothing new. Both are as similar to the anchor.
class SharingCase {
 public:
  static constexpr uint32_t kLength = 448;
  static constexpr uint32_t kJump = 200;

  explicit SharingCase(Device* device) : kv(device, {.length = kLength}), queries(kv.queries()) {
    for (size_t i = 0; i < queries.size(); ++i) {
      if (i % 64 < 8) queries[i] = 0.0F;
    }
    for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
      for (uint32_t token = 0; token < kLength; ++token) {
        std::vector<float> key(64, 0.0F);
        for (uint32_t c = 8; c < 64; ++c) {
          key[c] = 0.5F * std::sin(static_cast<float>(token * 64 + c) * 1.7F);
          const float* both = &queries[kv_head * 2 * 64 + c];
          if (token % 50 == 30) key[c] += 0.6F * (both[0] + both[64]);
        }
        if (token == kJump) {
          std::fill(key.begin(), key.end(), 0.0F);
          key[5] = 60.0F;
        }
        kv.SetKey(kv_head, token, key);
      }
    }
    kv.Seal();
  }

  // Half as much along one channel as along all others together: cosine .89.
  std::vector<float> LookingAlong(uint32_t channel) const {
    std::vector<float> moved = queries;
    for (size_t head = 0; head < moved.size(); head += 64) {
      float squares = 0.0F;
      for (uint32_t c = 0; c < 64; ++c) squares += moved[head + c] * moved[head + c];
      moved[head + channel] = 0.5F * std::sqrt(squares);
    }
    return moved;
  }

  KvCase kv;
  std::vector<float> queries;
};

// The cosine alone lets a jump of attention pass.
TEST_P(DevicePlan, VerifiedSharingScansWhereAttentionJumps) {
  const SharingCase sharing(device_.get());
  const uint32_t length = SharingCase::kLength;
  for (const float limit : {0.0F, 0.5F}) {
    const auto lists = device_->NewTokenLists(sharing.kv.options().layout, 4);
    Plan plan = BasePlan(Source::kReuse, length);
    plan.keep.top_k = 40;
    plan.lists = lists.get();
    plan.reuse_mass_limit = limit;
    plan.prove = Guarantee::kExact;
    const auto anchor = At(sharing.kv, length, sharing.queries, plan);
    const auto still = At(sharing.kv, length, sharing.LookingAlong(6), plan);
    const auto jump = At(sharing.kv, length, sharing.LookingAlong(5), plan);
    for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
      EXPECT_LT(anchor->groups[kv_head].sharing_estimate, 0.0F);
      EXPECT_EQ(still->groups[kv_head].action, Action::kReused);
      EXPECT_GT(still->groups[kv_head].similarity, 0.85F);
      EXPECT_GT(jump->groups[kv_head].similarity, 0.85F);
      const std::vector<uint32_t>& read = jump->selected[kv_head];
      const bool found = std::binary_search(read.begin(), read.end(), SharingCase::kJump);
      if (limit == 0.0F) {
        EXPECT_FALSE(jump->groups[kv_head].scanned);
        EXPECT_FALSE(found);
        EXPECT_GT(jump->certificates[2 * kv_head].dropped_mass_estimate, 0.9F);
        continue;
      }
      EXPECT_GE(still->groups[kv_head].sharing_estimate, 0.0F);
      EXPECT_LT(still->groups[kv_head].sharing_estimate, 0.5F);
      EXPECT_EQ(still->groups[kv_head].tokens_scanned, 0U);
      EXPECT_GT(jump->groups[kv_head].sharing_estimate, 0.5F);
      EXPECT_TRUE(jump->groups[kv_head].scanned);
      EXPECT_TRUE(found);
      EXPECT_LT(jump->certificates[2 * kv_head].dropped_mass_estimate, 0.1F);
    }
  }
}

// Both conditions count, and an anchor that was made without a limit cannot be estimated.
TEST_P(DevicePlan, VerifiedSharingNeedsACosineAndTerms) {
  const SharingCase sharing(device_.get());
  const uint32_t length = SharingCase::kLength;
  const auto lists = device_->NewTokenLists(sharing.kv.options().layout, 4);
  Plan plan = BasePlan(Source::kReuse, length);
  plan.keep.top_k = 40;
  plan.lists = lists.get();
  At(sharing.kv, length, sharing.queries, plan);
  plan.reuse_mass_limit = 0.5F;
  const auto passed_over = At(sharing.kv, length, sharing.queries, plan);
  EXPECT_TRUE(passed_over->groups[0].scanned);
  EXPECT_EQ(passed_over->groups[0].similarity, -2.0F);
  EXPECT_LT(passed_over->groups[0].sharing_estimate, 0.0F);
  EXPECT_FALSE(At(sharing.kv, length, sharing.queries, plan)->groups[0].scanned);
  plan.min_cosine = 0.95F;
  const auto dissimilar = At(sharing.kv, length, sharing.LookingAlong(6), plan);
  EXPECT_TRUE(dissimilar->groups[0].scanned);
  EXPECT_LT(dissimilar->groups[0].sharing_estimate, 0.0F) << "not asked for";
}

// A list has as many places as before, so what is appended and finds none adds to what is left.
TEST_P(DevicePlan, CompletionRaisesTheEstimate) {
  CaseOptions options;
  options.length = 512;
  const auto kv = NewCase(options);
  const auto lists = device_->NewTokenLists(options.layout, 4);
  Plan plan = BasePlan(Source::kReuse, 384, 64);
  plan.keep.top_k = 20;
  plan.lists = lists.get();
  plan.reuse_mass_limit = 0.95F;
  At(*kv, 384, kv->queries(), plan);
  const float before = At(*kv, 384, kv->queries(), plan)->groups[0].sharing_estimate;
  plan.local_begin = 448;
  const auto completing = At(*kv, 512, kv->queries(), plan);
  EXPECT_EQ(completing->groups[0].sharing_estimate, before) << "asked before it is completed";
  EXPECT_GE(completing->groups[0].tokens_scanned, 100U);
  const auto after = At(*kv, 512, kv->queries(), plan);
  EXPECT_EQ(after->groups[0].tokens_scanned, 0U);
  EXPECT_GT(after->groups[0].sharing_estimate, before + 0.01F);
}

// Tokens appended since the list was made are looked at when they leave the window; a heavy one
// takes the place of a light one.
TEST_P(DevicePlan, ReusedListsAreCompleted) {
  CaseOptions options;
  options.length = 512;
  const auto kv = NewCase(options);
  for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
    std::vector<float> key(64);
    for (uint32_t c = 0; c < 64; ++c) key[c] = 2.0F * kv->queries()[kv_head * 2 * 64 + c];
    kv->SetKey(kv_head, 400, key);
  }
  kv->Seal();
  const auto lists = device_->NewTokenLists(options.layout, 4);
  Plan plan = BasePlan(Source::kReuse, 384, 64);
  plan.keep.top_k = 40;
  plan.lists = lists.get();
  const auto first = At(*kv, 384, kv->queries(), plan);
  const std::vector<uint32_t> before = ChosenOf(*kv, *first, 0);
  plan.local_begin = 448;
  const auto second = At(*kv, 512, kv->queries(), plan);
  const std::vector<uint32_t> after = ChosenOf(*kv, *second, 0);
  EXPECT_EQ(second->groups[0].action, Action::kReused);
  EXPECT_FALSE(second->groups[0].scanned);
  EXPECT_GE(second->groups[0].tokens_scanned, 128U);
  EXPECT_LE(second->groups[0].tokens_scanned, 128U + before.size());
  EXPECT_TRUE(std::binary_search(after.begin(), after.end(), 400U));
  EXPECT_EQ(after.size(), before.size());
  // Once is enough.
  const auto third = At(*kv, 512, kv->queries(), plan);
  EXPECT_EQ(third->groups[0].tokens_scanned, 0U);
  EXPECT_EQ(third->selected, second->selected);
}

// A few of them are read as they are: to let them compete would take a scan of every page that has
// a token of the list.
TEST_P(DevicePlan, ReusedListsTakeAFewTokensAsTheyAre) {
  CaseOptions options;
  options.length = 512;
  const auto kv = NewCase(options);
  const auto lists = device_->NewTokenLists(options.layout, 4);
  Plan plan = BasePlan(Source::kReuse, 384, 64);
  plan.keep.top_k = 40;
  plan.lists = lists.get();
  const auto first = At(*kv, 384, kv->queries(), plan);
  std::vector<uint32_t> expected = ChosenOf(*kv, *first, 0);
  plan.local_begin = 320 + kFreshTokensMax;
  const auto few = At(*kv, 512, kv->queries(), plan);
  EXPECT_EQ(few->groups[0].action, Action::kReused);
  EXPECT_EQ(few->groups[0].tokens_scanned, 0U);
  for (uint32_t token = 320; token < plan.local_begin; ++token) expected.push_back(token);
  EXPECT_EQ(ChosenOf(*kv, *few, 0), expected);
  plan.local_begin += 1;
  const auto many = At(*kv, 512, kv->queries(), plan);
  EXPECT_EQ(many->groups[0].action, Action::kReused);
  EXPECT_GT(many->groups[0].tokens_scanned, 0U);
  EXPECT_EQ(ChosenOf(*kv, *many, 0).size(), 40U);
}

TEST_P(DevicePlan, TruncatedListsForget) {
  CaseOptions options;
  options.length = 512;
  const auto kv = NewCase(options);
  const auto lists = device_->NewTokenLists(options.layout, 4);
  Plan plan = BasePlan(Source::kReuse, 512, 64);
  plan.keep.top_k = 40;
  plan.lists = lists.get();
  RunPlan(*kv, plan);
  const auto fork = lists->Copy();
  lists->Truncate(320);
  plan.local_begin = 310;
  const auto call = At(*kv, 320, kv->queries(), plan);
  EXPECT_EQ(call->groups[0].action, Action::kReused);
  plan.lists = fork.get();
  plan.local_begin = 448;
  EXPECT_EQ(RunPlan(*kv, plan)->groups[0].tokens_scanned, 0U) << "the fork remembers";
}

TEST_P(DevicePlan, FrozenWithoutASelectionScansAll) {
  CaseOptions options;
  options.length = 420;
  const auto kv = NewCase(options);
  const auto shallow = device_->NewTokenLists(options.layout, 0);
  Plan plan = BasePlan(Source::kScan, 420);
  plan.keep.top_k = 40;
  const auto plain = RunPlan(*kv, plan);
  plan.frozen_lists = shallow.get();
  plan.frozen_end = 300;
  EXPECT_EQ(RunPlan(*kv, plan)->selected, plain->selected);
  // A dense call of the shallower layer leaves no selection either.
  Plan dense = BasePlan(Source::kAll, 420);
  dense.lists = shallow.get();
  RunPlan(*kv, dense);
  EXPECT_EQ(RunPlan(*kv, plan)->selected, plain->selected);
}

// Nor does one that was told to keep none, whatever its lists had before, be it that it chooses or
// takes a remembered list.
TEST_P(DevicePlan, SelectionsAreKeptWhereTheyAreWanted) {
  CaseOptions options;
  options.length = 420;
  const auto kv = NewCase(options);
  for (const Source source : {Source::kScan, Source::kReuse}) {
    const auto shallow = device_->NewTokenLists(options.layout, 2);
    Plan plan = BasePlan(source, 420);
    plan.keep.top_k = 7;
    plan.lists = shallow.get();
    Plan deep = BasePlan(Source::kScan, 420);
    deep.keep.top_k = 40;
    const auto plain = RunPlan(*kv, deep);
    deep.frozen_lists = shallow.get();
    deep.frozen_end = 300;
    const auto shallow_call = RunPlan(*kv, plan);
    const auto frozen = RunPlan(*kv, deep);
    EXPECT_NE(frozen->selected, plain->selected);
    plan.keeps_selection = false;
    EXPECT_EQ(RunPlan(*kv, plan)->selected, shallow_call->selected);
    EXPECT_EQ(RunPlan(*kv, deep)->selected, plain->selected);
    plan.keeps_selection = true;
    RunPlan(*kv, plan);
    EXPECT_EQ(RunPlan(*kv, deep)->selected, frozen->selected);
  }
}

// Frozen tokens are not scanned for choosing; hidden ones win over frozen ones.
TEST_P(DevicePlan, FrozenAndHiddenTogether) {
  CaseOptions options;
  options.length = 420;
  const auto kv = NewCase(options);
  const auto shallow = device_->NewTokenLists(options.layout, 4);
  Plan plan = BasePlan(Source::kReuse, 420);
  plan.keep.top_k = 60;
  plan.lists = shallow.get();
  const auto first = RunPlan(*kv, plan);
  const auto deep = device_->NewTokenLists(options.layout, 4);
  plan.lists = deep.get();
  plan.frozen_lists = shallow.get();
  plan.frozen_end = 200;
  plan.visible_begin = 100;
  const auto second = RunPlan(*kv, plan);
  EXPECT_LE(second->groups[0].tokens_scanned, 327U - 200);
  for (uint32_t kv_head = 0; kv_head < 2; ++kv_head) {
    std::vector<uint32_t> expected = ChosenOf(*kv, *first, kv_head);
    std::erase_if(expected, [](uint32_t token) { return token < 100 || token >= 200; });
    std::vector<uint32_t> chosen = ChosenOf(*kv, *second, kv_head);
    EXPECT_GE(chosen.size(), 60U);
    std::erase_if(chosen, [](uint32_t token) { return token >= 200; });
    EXPECT_EQ(chosen, expected);
  }
  plan.prove = Guarantee::kDeterministic;
  const auto proven = RunPlan(*kv, plan);
  EXPECT_EQ(proven->selected, second->selected);
  EXPECT_EQ(proven->groups[0].action, Action::kReused);
}

// Slices that were never sealed are read whatever the plan hides.
TEST_P(DevicePlan, UnsealedSlicesAreAlwaysRead) {
  CaseOptions options;
  options.length = 400;
  const auto kv = NewCase(options);
  Plan plan = BasePlan(Source::kScan, 400, 64);
  plan.keep.top_k = 10;
  plan.visible_begin = 250;
  plan.prove = Guarantee::kDeterministic;
  Call call(*kv, 400, 1, kv->queries(), plan);
  std::vector<const std::byte*> sketches(call.row.view.sketches.begin(),
                                         call.row.view.sketches.end());
  sketches[2] = nullptr;
  call.row.view.sketches = sketches;
  const Oracle oracle(*kv, call.row);
  call.Run(device_.get(), kv->shape());
  const Tolerance tolerance = ToleranceOf(*device_);
  CheckCall(*kv, oracle, call, &tolerance, nullptr);
  for (uint32_t token = 128; token < 192; ++token) {
    EXPECT_TRUE(std::binary_search(call.selected[0].begin(), call.selected[0].end(), token));
  }
  EXPECT_FALSE(std::binary_search(call.selected[0].begin(), call.selected[0].end(), 127U));
}

// A reuse may come when the middle has shrunk: a window that grew, tokens that became hidden.
TEST_P(DevicePlan, ListsSurviveAShrunkMiddle) {
  CaseOptions options;
  options.length = 512;
  const auto kv = NewCase(options);
  const auto lists = device_->NewTokenLists(options.layout, 4);
  Plan plan = BasePlan(Source::kReuse, 512, 64);
  plan.keep.top_k = 40;
  plan.lists = lists.get();
  RunPlan(*kv, plan);
  plan.local_begin = 300;
  plan.visible_begin = 100;
  const auto call = RunPlan(*kv, plan);
  EXPECT_EQ(call->groups[0].action, Action::kReused);
  EXPECT_EQ(call->groups[0].tokens_scanned, 0U);
}

TEST_P(DevicePlan, ShadowOfEverySource) {
  CaseOptions options;
  options.length = 420;
  const auto kv = NewCase(options);
  const auto lists = device_->NewTokenLists(options.layout, 4);
  for (const Source source : {Source::kAll, Source::kScan, Source::kReuse, Source::kGiven}) {
    for (const Guarantee prove :
         {Guarantee::kNone, Guarantee::kConfidence, Guarantee::kDeterministic, Guarantee::kExact}) {
      Plan plan = BasePlan(source, 420);
      plan.mode = Mode::kShadow;
      plan.keep.top_k = 30;
      plan.visible_begin = 60;
      plan.lists = lists.get();
      const std::vector<uint32_t> offsets = {0, 0, 0};
      plan.given_offsets = offsets;
      plan.prove = prove;
      RunPlan(*kv, plan);
    }
  }
}

TEST_P(DevicePlan, AllocationIsZeroAndAligned) {
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{1} << 20}) {
    absl::StatusOr<DeviceMemory> memory = device_->Allocate(bytes);
    ASSERT_TRUE(memory.ok());
    EXPECT_EQ(memory->bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory->data()) % 256, 0U);
    std::vector<std::byte> contents(bytes, std::byte{1});
    const MemoryCopy read{memory->data(), contents.data(), bytes};
    device_->Copy({&read, 1});
    EXPECT_EQ(std::count(contents.begin(), contents.end(), std::byte{0}),
              static_cast<ptrdiff_t>(bytes));
  }
  EXPECT_EQ(device_->Allocate(~size_t{0}).status().code(), absl::StatusCode::kResourceExhausted);
}

INSTANTIATE_TEST_SUITE_P(All, DevicePlan, ::testing::ValuesIn(DeviceNames()),
                         [](const auto& test) { return test.param; });

TEST(NewDevice, KnowsItsNames) {
  for (const std::string& name : DeviceNames()) {
    EXPECT_EQ(NewDeviceOrDie(name)->name(), name);
  }
  EXPECT_EQ(NewDevice("quantum", {}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(NewDevice("", {}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvservice::testing
