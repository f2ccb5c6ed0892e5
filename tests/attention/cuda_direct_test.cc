// The CUDA device's direct path (attention/cuda/direct.h): that it is taken where it should be, and
// that what it answers is right. The tests of all devices run through it too; here it is counted.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "attention/cuda/device.h"
#include "attention/float16.h"
#include "attention/host_lists.h"
#include "attention/sharing.h"
#include "attention/sketch.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/oracle.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

using ::testing::FloatNear;
using ::testing::Pointwise;

class CudaDirect : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Device>> device = NewCudaDevice({.thread_count = 2});
    if (!device.ok()) GTEST_SKIP() << device.status();
    device_ = std::move(device).value();
  }

  // KV heads that were answered directly by what `run` does.
  template <typename Run>
  uint64_t Count(Run run) {
    const uint64_t before = GroupsAnsweredDirectly(*device_);
    run();
    return GroupsAnsweredDirectly(*device_) - before;
  }

  std::unique_ptr<Device> device_;
};

// The same was read, and said about it.
void ExpectSameReading(const Call& call, const Call& other) {
  EXPECT_EQ(call.selected, other.selected);
  for (uint32_t head = 0; head < 2; ++head) {
    EXPECT_EQ(call.groups[head].action, other.groups[head].action);
    EXPECT_EQ(call.groups[head].scanned, other.groups[head].scanned);
    EXPECT_EQ(call.groups[head].tokens_read, other.groups[head].tokens_read);
    EXPECT_EQ(call.groups[head].tokens_scanned, other.groups[head].tokens_scanned);
    const float norm = other.groups[head].key_norm_max;
    EXPECT_NEAR(call.groups[head].key_norm_max, norm, 1e-5F * std::abs(norm));
  }
  for (size_t i = 0; i < call.certificates.size(); ++i) {
    EXPECT_EQ(call.certificates[i].level, other.certificates[i].level);
  }
}

TEST_F(CudaDirect, SimplePlansTakeIt) {
  for (const Keys keys : {Keys::kNormal, Keys::kWideLogits, Keys::kIdentical, Keys::kNotFinite}) {
    CaseOptions options;
    options.length = 700;
    options.keys = keys;
    const KvCase kv(device_.get(), options);
    for (const Guarantee prove : {Guarantee::kNone, Guarantee::kDeterministic}) {
      for (const uint32_t hidden : {0U, 200U}) {
        Plan plan = BasePlan(Source::kAll, options.length);
        plan.prove = prove;
        plan.visible_begin = hidden;
        EXPECT_EQ(Count([&] { RunPlan(kv, plan); }), 2U);
        plan.source = Source::kScan;
        plan.dense_share = 1.0F;
        plan.keep.top_k = 40;
        const uint64_t ranked = Count([&] {
          const auto call = RunPlan(kv, plan);
          for (uint32_t head = 0; head < 2; ++head) {
            EXPECT_EQ(ChosenOf(kv, *call, head).size(), 40U);
          }
        });
        EXPECT_EQ(ranked, 2U);
        plan.keep.top_k = 0;
        plan.keep.mass_limit = 0.1F;
        plan.max_dropped_mass = 0.1F;
        // With everything read and something hidden the host adds up what is hidden.
        const uint64_t by_mass = Count([&] { RunPlan(kv, plan); });
        EXPECT_TRUE(hidden > 0 || by_mass == 2U) << by_mass;
      }
    }
  }
}

// So much is planned that everything visible is read, and something is hidden: what hides it has
// its bound from the same sums, or asks for none.
TEST_F(CudaDirect, EverythingBesideWhatIsHiddenTakesIt) {
  auto cpu = NewDevice("cpu", {});
  ASSERT_TRUE(cpu.ok());
  CaseOptions options;
  options.length = 3000;
  const KvCase kv(device_.get(), options);
  const KvCase same(cpu->get(), options);
  Plan plan = BasePlan(Source::kScan, options.length, 64);
  plan.visible_begin = 400;
  for (const auto& [prove, top_k] : {std::pair(Guarantee::kNone, 2400U),
                                     {Guarantee::kNone, 3000U},
                                     {Guarantee::kDeterministic, 3000U}}) {
    SCOPED_TRACE(top_k);
    plan.prove = prove;
    plan.keep.top_k = top_k;
    std::unique_ptr<Call> call;
    EXPECT_EQ(Count([&] { call = RunPlan(kv, plan); }), 2U);
    ExpectSameReading(*call, *RunPlan(same, plan));
  }
}

// A later query token's window has left what is hidden behind: nothing of its own is dropped.
TEST_F(CudaDirect, WindowsThatLeaveBehindWhatIsHidden) {
  auto cpu = NewDevice("cpu", {});
  ASSERT_TRUE(cpu.ok());
  CaseOptions options;
  options.length = 700;
  options.query_count = 4;
  const KvCase kv(device_.get(), options);
  const KvCase same(cpu->get(), options);
  LayerShape shape = kv.shape();
  shape.sliding_window = 400;
  for (const Source source : {Source::kAll, Source::kScan}) {
    for (const uint32_t top_k : {150U, 300U, 380U}) {
      SCOPED_TRACE(top_k);
      Plan plan = BasePlan(source, options.length, 64);
      plan.keep.top_k = top_k;
      plan.visible_begin = 299;
      plan.sink_end = 0;
      Call call(kv, options.length, 4, kv.queries(), plan);
      call.Run(device_.get(), shape);
      Call other(same, options.length, 4, same.queries(), plan);
      other.Run(cpu->get(), shape);
      for (size_t i = 0; i < call.certificates.size(); ++i) {
        EXPECT_EQ(call.certificates[i].level, other.certificates[i].level) << i;
      }
    }
  }
}

TEST_F(CudaDirect, LimitsThatDoNotHoldAreTheHosts) {
  CaseOptions options;
  options.length = 700;
  const KvCase kv(device_.get(), options);
  Plan plan = BasePlan(Source::kScan, options.length);
  plan.keep.top_k = 4;
  plan.max_dropped_mass = 1e-6F;
  plan.prove = Guarantee::kDeterministic;
  EXPECT_EQ(Count([&] { RunPlan(kv, plan); }), 2U) << "only reported";
  plan.on_violation = OnViolation::kDense;
  EXPECT_EQ(Count([&] { RunPlan(kv, plan); }), 0U);
  plan.on_violation = OnViolation::kGrow;
  EXPECT_EQ(Count([&] { RunPlan(kv, plan); }), 0U);
  plan.prove = Guarantee::kConfidence;
  EXPECT_EQ(Count([&] { RunPlan(kv, plan); }), 0U);
  // Without samples where the bound that always holds is enough.
  plan.max_dropped_mass = 0.3F;
  plan.keep.mass_limit = 0.3F;
  const uint64_t enough = Count([&] {
    const auto call = RunPlan(kv, plan);
    for (const HeadCertificate& c : call->certificates) EXPECT_TRUE(c.met);
  });
  EXPECT_EQ(enough, 2U);
}

// A choice that aimed too low is made once more before the host is asked.
TEST_F(CudaDirect, ChoicesAreMadeTwice) {
  CaseOptions options;
  options.length = 3000;
  const KvCase kv(device_.get(), options);
  for (const OnViolation on_violation : {OnViolation::kGrow, OnViolation::kFail}) {
    Plan plan = BasePlan(Source::kScan, options.length);
    plan.dense_share = 1.0F;
    plan.keep.mass_limit = 0.4F;
    plan.prove = Guarantee::kDeterministic;
    plan.on_violation = on_violation;
    std::unique_ptr<Call> once;
    plan.max_dropped_mass = 0.4F;
    EXPECT_EQ(Count([&] { once = RunPlan(kv, plan); }), 2U);
    plan.max_dropped_mass = 0.1F;
    std::unique_ptr<Call> twice;
    EXPECT_EQ(Count([&] { twice = RunPlan(kv, plan); }), 2U);
    for (const HeadCertificate& c : twice->certificates) {
      EXPECT_TRUE(c.met);
      EXPECT_LE(c.dropped_mass_upper.value, 0.1);
    }
    for (uint32_t head = 0; head < 2; ++head) {
      EXPECT_GT(twice->groups[head].tokens_read, once->groups[head].tokens_read);
      EXPECT_EQ(twice->groups[head].tokens_scanned, 2 * once->groups[head].tokens_scanned);
    }
    // The second one reads everything, if it takes that.
    plan.max_dropped_mass = 1e-9F;
    EXPECT_EQ(Count([&] { twice = RunPlan(kv, plan); }), 2U);
    for (const HeadCertificate& c : twice->certificates) EXPECT_TRUE(c.met);
  }
}

// Lists are read as they are; what the CPU device reads is what has to be read.
TEST_F(CudaDirect, ListsTakeIt) {
  auto cpu = NewDevice("cpu", {});
  ASSERT_TRUE(cpu.ok());
  CaseOptions options;
  options.length = 3000;
  const KvCase kv(device_.get(), options);
  const KvCase same(cpu->get(), options);
  const std::vector<uint32_t> given = {3, 70, 71, 500, 1999, 2500, 10, 2990};
  const std::vector<uint32_t> offsets = {0, 6, 8};
  Plan plan = BasePlan(Source::kGiven, options.length, 64);
  plan.given = given;
  plan.given_offsets = offsets;
  for (const uint32_t hidden : {0U, 400U}) {
    plan.visible_begin = hidden;
    std::unique_ptr<Call> call;
    EXPECT_EQ(Count([&] { call = RunPlan(kv, plan); }), 2U);
    ExpectSameReading(*call, *RunPlan(same, plan));
  }
}

// Of a list that is most of what is visible everything is read, with and without something hidden.
TEST_F(CudaDirect, LargeListsTakeIt) {
  auto cpu = NewDevice("cpu", {});
  ASSERT_TRUE(cpu.ok());
  CaseOptions options;
  options.length = 3000;
  const KvCase kv(device_.get(), options);
  const KvCase same(cpu->get(), options);
  for (const uint32_t top_k : {1000U, 1700U, 2100U, 2280U, 2300U, 2320U, 2400U, 2800U}) {
    for (const uint32_t hidden : {0U, 400U}) {
      SCOPED_TRACE(::testing::Message() << top_k << " of 3000 tokens, hidden up to " << hidden);
      const auto others = (*cpu)->NewTokenLists(options.layout, 4);
      Plan other_plan = BasePlan(Source::kReuse, options.length, 64);
      other_plan.keep.top_k = top_k;
      other_plan.min_cosine = -1.0F;
      other_plan.lists = others.get();
      other_plan.dense_share = 1.0F;
      RunPlan(same, other_plan);
      // The same list, whose making may round otherwise on a GPU.
      const auto lists = others->Copy();
      other_plan.dense_share = 0.8F;
      other_plan.visible_begin = hidden;
      Plan plan = other_plan;
      plan.lists = lists.get();
      std::unique_ptr<Call> call;
      const uint64_t direct = Count([&] { call = RunPlan(kv, plan); });
      ExpectSameReading(*call, *RunPlan(same, other_plan));
      // What sketches mark may tip the scales; not far from them.
      if (top_k < 2000 || top_k > 2380) {
        EXPECT_EQ(direct, 2U);
      }
    }
  }
}

// A list that is missing is made by a scan, and then reused as it is.
TEST_F(CudaDirect, AnchorsTakeIt) {
  auto cpu = NewDevice("cpu", {});
  ASSERT_TRUE(cpu.ok());
  CaseOptions options;
  options.length = 3000;
  const KvCase kv(device_.get(), options);
  const KvCase same(cpu->get(), options);
  Plan plan = BasePlan(Source::kReuse, 2000, 64);
  plan.keep.top_k = 50;
  const auto lists = device_->NewTokenLists(options.layout, 4);
  plan.lists = lists.get();
  const auto at = [&](uint32_t length) {
    auto call = std::make_unique<Call>(kv, length, 1, kv.queries(), plan);
    call->Run(device_.get(), kv.shape());
    return call;
  };
  std::unique_ptr<Call> first;
  EXPECT_EQ(Count([&] { first = at(2000); }), 2U) << "the first call scans and makes the list";
  Plan on_cpu = plan;
  const auto cpu_lists = (*cpu)->NewTokenLists(options.layout, 4);
  on_cpu.lists = cpu_lists.get();
  Call cpu_first(same, 2000, 1, same.queries(), on_cpu);
  cpu_first.Run(cpu->get(), same.shape());
  for (uint32_t head = 0; head < 2; ++head) {
    const GroupReport& group = first->groups[head];
    const GroupReport& other = cpu_first.groups[head];
    EXPECT_TRUE(group.scanned);
    EXPECT_EQ(group.tokens_read, other.tokens_read);
    EXPECT_EQ(group.tokens_scanned, other.tokens_scanned);
    EXPECT_NEAR(group.key_norm_max, other.key_norm_max, 1e-5F * other.key_norm_max);
    // Scans round differently, so that of two tokens that weigh the same either may be chosen.
    std::vector<uint32_t> both;
    std::set_intersection(first->selected[head].begin(), first->selected[head].end(),
                          cpu_first.selected[head].begin(), cpu_first.selected[head].end(),
                          std::back_inserter(both));
    EXPECT_GE(both.size() + 3, first->selected[head].size());
  }
  for (const uint32_t length : {2000U, 2030U, 2064U}) {
    plan.local_begin = length - 64;
    std::unique_ptr<Call> call;
    EXPECT_EQ(Count([&] { call = at(length); }), 2U) << length;
    for (uint32_t head = 0; head < 2; ++head) {
      std::vector<uint32_t> expected = ChosenOf(kv, *first, head);
      for (uint32_t token = 2000 - 64; token < plan.local_begin; ++token) expected.push_back(token);
      EXPECT_EQ(ChosenOf(kv, *call, head), expected) << length;
      EXPECT_EQ(call->groups[head].action, Action::kReused);
      EXPECT_EQ(call->groups[head].tokens_scanned, 0U);
    }
  }
}

// A step of sharing on this device and on the CPU device, each with lists of its own.
struct SharingStep {
  std::unique_ptr<Call> cuda;
  std::unique_ptr<Call> cpu;
};

void ExpectSameStep(const SharingStep& step, bool same_choice) {
  for (uint32_t head = 0; head < 2; ++head) {
    const GroupReport& group = step.cuda->groups[head];
    const GroupReport& other = step.cpu->groups[head];
    EXPECT_EQ(group.action, other.action);
    EXPECT_EQ(group.scanned, other.scanned);
    EXPECT_EQ(group.tokens_read, other.tokens_read);
    EXPECT_EQ(group.tokens_scanned, other.tokens_scanned);
    EXPECT_EQ(group.similarity, other.similarity);
    if (!same_choice) continue;
    // Scans round differently, so that of two tokens that weigh the same either may be chosen.
    std::vector<uint32_t> both;
    std::set_intersection(step.cuda->selected[head].begin(), step.cuda->selected[head].end(),
                          step.cpu->selected[head].begin(), step.cpu->selected[head].end(),
                          std::back_inserter(both));
    EXPECT_GE(both.size() + 5, step.cuda->selected[head].size());
  }
}

// What one query head of a call without hidden tokens comes to, by exact logits in double
// precision. `kv` is in memory that can be read here.
struct HeadTruth {
  std::vector<double> shares;  // [length], of what was read
  std::vector<bool> read;
  double log_odds = 0.0;
};
HeadTruth TruthOf(const KvCase& kv, const Call& call, uint32_t kv_head, uint32_t query_head) {
  const KvLayout& layout = kv.options().layout;
  const uint32_t length = call.row.view.length;
  const float* q = &kv.queries()[size_t{query_head} * layout.head_dim];
  HeadTruth truth;
  truth.read.resize(length);
  for (const uint32_t token : call.selected[kv_head]) truth.read[token] = true;
  double of_read = 0.0;
  double of_all = 0.0;
  for (uint32_t token = 0; token < length; ++token) {
    double logit = 0.0;
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      const double k = LoadElement(layout.dtype, kv.Row(kv_head, token), c);
      logit += static_cast<double>(kv.shape().scale) * k * static_cast<double>(q[c]);
    }
    truth.shares.push_back(std::exp(logit));
    of_all += truth.shares.back();
    of_read += truth.read[token] ? truth.shares.back() : 0.0;
  }
  for (double& share : truth.shares) share /= of_read;
  truth.log_odds = std::log((of_all - of_read) / of_read);
  return truth;
}

// Sum of share * (mean - key) over the tokens that are read and whose share times `factor` is
// heavy.
std::vector<double> ShiftOf(const KvCase& kv, uint32_t kv_head, const HeadTruth& truth,
                            const KeySpread& spread, double factor) {
  const KvLayout& layout = kv.options().layout;
  std::vector<double> shift(layout.head_dim, 0.0);
  for (uint32_t token = 0; token < truth.shares.size(); ++token) {
    if (!truth.read[token] || truth.shares[token] * factor < kHeavyShare) continue;
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      const double k = LoadElement(layout.dtype, kv.Row(kv_head, token), c);
      shift[c] += truth.shares[token] * (spread.mean[c] - k);
    }
  }
  return shift;
}

double Product(absl::Span<const double> a, absl::Span<const double> b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// The anchor's mass of what was read is an estimate where tokens were chosen, `factor` times
// too small: it is found from the shift, and then everything has to fit.
void ExpectHead(const KvCase& kv, const Call& call, const SharingTerms& terms, uint32_t kv_head,
                uint32_t g, const KeySpread& spread) {
  const KvLayout& layout = kv.options().layout;
  const HeadTruth truth = TruthOf(kv, call, kv_head, kv_head * layout.group_size() + g);
  const auto of_head = absl::MakeConstSpan(terms.shift).subspan(g * layout.head_dim);
  const std::vector<double> shift(of_head.begin(), of_head.begin() + layout.head_dim);
  double factor = 1.0;
  std::vector<double> expected;
  for (int i = 0; i < 10; ++i) {
    expected = ShiftOf(kv, kv_head, truth, spread, factor);
    if (Product(expected, expected) > 0.0) {
      factor = Product(shift, expected) / Product(expected, expected);
    }
  }
  // Sketches of normal keys are off by about half a nat in a token that is alone.
  EXPECT_NEAR(std::log(factor), 0.0, 0.7);
  for (uint32_t c = 0; c < layout.head_dim; ++c) expected[c] = factor * expected[c] - shift[c];
  // One token may be about heavy.
  const double token = 1.2 * kHeavyShare * std::sqrt(layout.head_dim);
  EXPECT_LE(std::sqrt(Product(expected, expected)),
            2e-3 * std::sqrt(Product(shift, shift)) + token);
  // Many tokens were left, so what their sum is off by is what sketches are off by on average.
  EXPECT_NEAR(static_cast<double>(terms.log_odds[g]) - std::log(factor), truth.log_odds, 0.3);
}

// The anchor that the latest call has made.
void ExpectTerms(const KvCase& kv, const Call& call, const TokenLists& of_device) {
  const auto& lists = static_cast<const HostLists&>(of_device);
  const uint32_t dim = kv.options().layout.head_dim;
  for (uint32_t head = 0; head < 2; ++head) {
    ASSERT_GT(lists.anchor_count(head), 0U);
    const SharingTerms& terms = lists.anchor(head, lists.anchor_count(head) - 1).sharing;
    ASSERT_FALSE(terms.empty());
    const KvView view = kv.View(call.row.view.length);
    std::vector<const std::byte*> pages;
    for (uint32_t block = 0; block * kBlockTokens < call.row.plan.local_begin; ++block) {
      if (view.sketches[block] == nullptr) continue;
      pages.push_back(view.sketches[block] + head * SketchLayout(dim).page_bytes);
    }
    const KeySpread spread = SpreadOfKeys(dim, pages);
    const std::vector<float> variance(spread.variance.begin(), spread.variance.end());
    EXPECT_THAT(terms.variance, Pointwise(FloatNear(1e-5F), variance));
    for (uint32_t g = 0; g < terms.log_odds.size(); ++g) {
      SCOPED_TRACE(::testing::Message() << "KV head " << head << ", head " << g);
      ExpectHead(kv, call, terms, head, g, spread);
    }
  }
}

// What verified sharing remembers of a scan is made on the device, and what has come since a
// list was made competes for its places there.
TEST_F(CudaDirect, VerifiedSharingTakesIt) {
  auto cpu = NewDevice("cpu", {});
  ASSERT_TRUE(cpu.ok());
  for (const KvLayout& layout :
       {KvLayout{.query_head_count = 4, .kv_head_count = 2, .head_dim = 64},
        KvLayout{.query_head_count = 10, .kv_head_count = 2, .head_dim = 128},
        KvLayout{
            .query_head_count = 2, .kv_head_count = 2, .head_dim = 256, .dtype = DType::kFloat16},
        KvLayout{.query_head_count = 32,
        .kv_head_count = 2,
        .head_dim = 80,
        .dtype = DType::kFloat32}}) {
    for (const Keys keys : {Keys::kNormal, Keys::kWideLogits}) {
      SCOPED_TRACE(::testing::Message()
                   << layout.query_head_count << " heads, keys " << static_cast<int>(keys));
      CaseOptions options;
      options.layout = layout;
      options.length = 5000;
      options.keys = keys;
      KvCase kv(device_.get(), options);
      KvCase same(cpu->get(), options);
      kv.mutable_shape()->logit_softcap = same.mutable_shape()->logit_softcap =
          keys == Keys::kNormal ? 0.0F : 50.0F;
      Plan plan = BasePlan(Source::kReuse, 3000, 64);
      plan.keep.top_k = 50;
      // Whatever is estimated is small enough.
      plan.reuse_mass_limit = 1.0F;
      const auto lists = device_->NewTokenLists(layout, 4);
      const auto cpu_lists = (*cpu)->NewTokenLists(layout, 4);
      const auto at = [&](uint32_t length) {
        SharingStep step;
        plan.local_begin = length - 64;
        plan.lists = lists.get();
        step.cuda = std::make_unique<Call>(kv, length, 1, kv.queries(), plan);
        EXPECT_EQ(Count([&] { step.cuda->Run(device_.get(), kv.shape()); }), 2U) << length;
        plan.lists = cpu_lists.get();
        step.cpu = std::make_unique<Call>(same, length, 1, same.queries(), plan);
        step.cpu->Run(cpu->get(), same.shape());
        // Of very large logits estimates are far off, each device's its own way.
        const bool estimates = keys == Keys::kNormal;
        ExpectSameStep(step, estimates);
        if (step.cuda->groups[0].scanned && estimates) {
          ExpectTerms(same, *step.cuda, *lists);
          ExpectTerms(same, *step.cpu, *cpu_lists);
        }
        return step;
      };
      EXPECT_TRUE(at(3000).cuda->groups[0].scanned);
      for (const uint32_t length : {3001U, 3064U}) {
        const SharingStep step = at(length);
        EXPECT_EQ(step.cuda->groups[0].action, Action::kReused);
        EXPECT_EQ(step.cuda->groups[0].tokens_scanned, 0U);
      }
      for (const uint32_t length : {3200U, 5000U}) {
        // What a scan would keep by mass does not matter to those that compete.
        plan.keep.mass_limit = length == 5000 ? 0.2F : 0.0F;
        const SharingStep step = at(length);
        EXPECT_EQ(step.cuda->groups[0].action, Action::kReused);
        EXPECT_FALSE(step.cuda->groups[0].scanned);
        EXPECT_GT(step.cuda->groups[0].tokens_scanned, 64U);
        // As many as before.
        EXPECT_EQ(ChosenOf(kv, *step.cuda, 0).size(), 50U);
      }
      // What is not similar enough makes another anchor.
      plan.keep.mass_limit = 0.0F;
      plan.min_cosine = 1.1F;
      EXPECT_TRUE(at(5000).cuda->groups[0].scanned);
    }
  }
}

// Rows of more than 32k tokens are counted by a sample.
TEST_F(CudaDirect, LongRowsMeetTheirLimits) {
  CaseOptions options;
  options.length = 70'000;
  const KvCase kv(device_.get(), options);
  Plan plan = BasePlan(Source::kScan, options.length);
  plan.keep.mass_limit = 0.1F;
  plan.max_dropped_mass = 0.1F;
  plan.prove = Guarantee::kDeterministic;
  plan.on_violation = OnViolation::kDense;
  std::unique_ptr<Call> call;
  EXPECT_EQ(Count([&] { call = RunPlan(kv, plan); }), 2U);
  for (const HeadCertificate& c : call->certificates) EXPECT_TRUE(c.met);
  EXPECT_LT(call->groups[0].tokens_read, options.length);
}

// Tables on the device follow views that say what has stayed the same.
TEST_F(CudaDirect, TablesFollowRevisions) {
  CaseOptions options;
  options.length = 1000;
  const KvCase kv(device_.get(), options);
  options.seed += 1;
  const KvCase other(device_.get(), options);
  std::vector<const std::byte*> slices;
  std::vector<const std::byte*> sketches;
  const auto show = [&](const KvCase& from, uint32_t length) {
    const KvView view = from.View(length);
    slices.assign(view.slices.begin(), view.slices.end());
    sketches.assign(view.sketches.begin(), view.sketches.end());
    slices.reserve(64);
    sketches.reserve(64);
  };
  slices.reserve(64);
  sketches.reserve(64);
  const auto run = [&](const KvCase& from, uint32_t length, uint64_t revision) {
    show(from, length);
    Call call(from, length, 1, from.queries(), BasePlan(Source::kAll, length));
    call.row.view = {
        .slices = slices, .sketches = sketches, .length = length, .revision = revision};
    call.Run(device_.get(), from.shape());
    Call truth(from, length, 1, from.queries(), BasePlan(Source::kAll, length));
    truth.Run(device_.get(), from.shape());
    EXPECT_EQ(call.out, truth.out) << length << ", revision " << revision;
  };
  for (const uint32_t length : {100U, 101U, 128U, 129U, 1000U, 70U, 300U}) run(kv, length, 1);
  // Other blocks at the same addresses of the host.
  run(other, 300, 2);
  run(other, 1000, 2);
  run(kv, 640, 3);
  run(kv, 1000, 3);
}

TEST_F(CudaDirect, TheSameBytesEveryTime) {
  CaseOptions options;
  options.length = 5000;
  const KvCase kv(device_.get(), options);
  for (const uint32_t top_k : {0U, 100U}) {
    Plan plan = BasePlan(Source::kScan, options.length);
    plan.keep.top_k = top_k;
    plan.keep.mass_limit = top_k == 0 ? 0.2F : 0.0F;
    plan.prove = Guarantee::kDeterministic;
    const auto once = [&] {
      auto call = std::make_unique<Call>(kv, options.length, 1, kv.queries(), plan);
      call->Run(device_.get(), kv.shape());
      return call;
    };
    const auto first = once();
    for (int i = 0; i < 50; ++i) {
      const auto next = once();
      EXPECT_EQ(next->out, first->out);
      EXPECT_EQ(next->selected, first->selected);
      for (size_t head = 0; head < first->certificates.size(); ++head) {
        EXPECT_EQ(next->certificates[head].log_dropped_upper.value,
                  first->certificates[head].log_dropped_upper.value);
        EXPECT_EQ(next->certificates[head].log_kept_lower.value,
                  first->certificates[head].log_kept_lower.value);
      }
    }
  }
}

void ExpectSameAnswer(const Call& got, const Call& expected) {
  EXPECT_EQ(got.row.status, expected.row.status);
  EXPECT_EQ(got.out, expected.out);
  EXPECT_EQ(got.lse, expected.lse);
  EXPECT_EQ(got.selected, expected.selected);
  for (size_t head = 0; head < expected.certificates.size(); ++head) {
    EXPECT_EQ(got.certificates[head].level, expected.certificates[head].level);
    EXPECT_EQ(got.certificates[head].log_dropped_upper.value,
              expected.certificates[head].log_dropped_upper.value);
    EXPECT_EQ(got.certificates[head].log_kept_lower.value,
              expected.certificates[head].log_kept_lower.value);
  }
}

// Plans that are answered on the device at once, in two goes, and by the host.
std::vector<Plan> PlansOfAllWays(uint32_t length) {
  std::vector<Plan> plans(1, BasePlan(Source::kAll, length));
  Plan plan = BasePlan(Source::kScan, length);
  plan.dense_share = 1.0F;
  plan.keep.top_k = 40;
  plans.push_back(plan);
  plan.keep.top_k = 0;
  plan.keep.mass_limit = 0.4F;
  plan.max_dropped_mass = 0.4F;
  plan.prove = Guarantee::kDeterministic;
  plan.on_violation = OnViolation::kGrow;
  plans.push_back(plan);
  plan.max_dropped_mass = 0.1F;
  plans.push_back(plan);
  plan.keep.mass_limit = 0.0F;
  plan.keep.top_k = 4;
  plan.prove = Guarantee::kConfidence;
  plans.push_back(plan);
  plan.max_dropped_mass = 1e-6F;
  plan.on_violation = OnViolation::kFail;
  plans.push_back(plan);
  return plans;
}

// Every pair of ways, in rows of changing lengths, so that tables outgrow their places; a call that
// is answered at once and tokens that are stored come in between.
TEST_F(CudaDirect, TwoCallsAtATimeAnswerAsOneDoes) {
  ASSERT_EQ(device_->calls_max(), 2U);
  std::vector<std::unique_ptr<KvCase>> cases;
  for (const uint32_t length : {5000U, 300U, 9000U}) {
    CaseOptions options;
    options.length = length;
    options.seed = length;
    cases.push_back(std::make_unique<KvCase>(device_.get(), options));
  }
  const auto make = [](const KvCase& kv, size_t way) {
    const uint32_t length = kv.options().length;
    return std::make_unique<Call>(kv, length, 1, kv.queries(), PlansOfAllWays(length)[way]);
  };
  const size_t way_count = PlansOfAllWays(300).size();
  std::vector<std::vector<std::unique_ptr<Call>>> alone(cases.size());
  for (size_t i = 0; i < cases.size(); ++i) {
    for (size_t way = 0; way < way_count; ++way) {
      alone[i].push_back(make(*cases[i], way));
      alone[i].back()->Run(device_.get(), cases[i]->shape());
    }
  }
  struct Begun {
    size_t which;
    size_t way;
    std::unique_ptr<Call> call;
  };
  std::vector<Begun> begun;
  const auto finish = [&] {
    device_->Finish();
    ExpectSameAnswer(*begun[0].call, *alone[begun[0].which][begun[0].way]);
    begun.erase(begun.begin());
  };
  const KvLayout layout = cases[0]->options().layout;
  const size_t token_bytes = size_t{layout.kv_head_count} * layout.vector_bytes();
  const std::vector<std::byte> tokens(64 * token_bytes, std::byte{7});
  const DeviceMemory slice = device_->Allocate(layout.slice_bytes()).value();
  size_t count = 0;
  for (size_t first = 0; first < way_count; ++first) {
    for (size_t second = 0; second < way_count; ++second) {
      for (const size_t way : {first, second}) {
        const size_t which = count++ % cases.size();
        if (begun.size() == 2) finish();
        begun.push_back({which, way, make(*cases[which], way)});
        device_->Begin(cases[which]->shape(), {&begun.back().call->row, 1});
        const AppendSlice append{.slice = slice.data(),
                                 .token_count = way == 0 ? 64U : 1U,
                                 .k = tokens.data(),
                                 .v = tokens.data()};
        device_->Append(layout, {&append, 1});
        if (count % 5 != 0) continue;
        const auto between = make(*cases[1], second);
        between->Run(device_.get(), cases[1]->shape());
        ExpectSameAnswer(*between, *alone[1][second]);
      }
    }
  }
  while (!begun.empty()) finish();
}

}  // namespace
}  // namespace kvservice::testing
