// Planning samples against trying every number of draws by sorting, in double.

#include "attention/cpu/plan_samples.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention/sample_plan.h"
#include "tests/attention/cpu_targets.h"
#include "tests/attention/scan_weights_case.h"

namespace kvservice::testing {
namespace {

// What the tokens of one head count as, over its normaliser.
class Shares {
 public:
  Shares(const Weights& from, uint32_t head, double factor)
      : from_(from), head_(head), factor_(factor), normalizer_(from.Normalizer(head)) {}
  double Of(uint32_t token) const {
    const double estimate = from_.Estimate(head_, token);
    return (estimate + factor_ * (from_.Weight(head_, token) - estimate)) / normalizer_;
  }
  double Sum(const std::vector<uint32_t>& tokens) const {
    double sum = 0.0;
    for (const uint32_t token : tokens) sum += Of(token);
    return sum;
  }

 private:
  const Weights& from_;
  const uint32_t head_;
  const double factor_;
  const double normalizer_;
};

struct BruteForce {
  uint32_t draws = 0;
  size_t count = 0;
  double vectors = std::numeric_limits<double>::infinity();
};

// The fewest tokens, by falling score, that leave no counted head more than the limit.
size_t CountBySorting(const Weights& from, const ChooseTask& task, double factor) {
  const std::vector<uint32_t> tokens = PositionsOf(task.candidates, kFirstBlock);
  std::vector<std::vector<double>> shares;
  std::vector<double> scores(tokens.size(), 0.0);
  std::vector<double> rests;
  for (uint32_t head = 0; head < from.weights.head_count; ++head) {
    if (task.excused[head]) continue;
    shares.emplace_back();
    const Shares of(from, head, factor);
    rests.push_back(of.Sum(PositionsOf(task.unread, kFirstBlock)));
    for (size_t i = 0; i < tokens.size(); ++i) {
      shares.back().push_back(of.Of(tokens[i]));
      scores[i] = std::max(scores[i], shares.back()[i]);
    }
  }
  std::vector<size_t> order(tokens.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] < scores[b]; });
  const double limit = task.planned_share * static_cast<double>(task.mass_limit);
  for (size_t dropped = 0; dropped < order.size(); ++dropped) {
    for (size_t head = 0; head < rests.size(); ++head) {
      rests[head] += shares[head][order[dropped]];
      if (rests[head] > limit) return order.size() - dropped;
    }
  }
  return 0;
}

BruteForce TryAll(const Weights& from, const SampleTask& task) {
  BruteForce best;
  const size_t sampling = from.weights.head_count - task.choose.excused.count();
  for (const uint32_t draws : kDrawOptions) {
    if (draws > task.draws_max) break;
    const size_t count =
        CountBySorting(from, task.choose, SampleFactor(task.failure_probability, draws));
    const double vectors = PlannedVectors(task.costs, static_cast<uint32_t>(count),
                                          static_cast<uint32_t>(sampling), draws);
    if (vectors < best.vectors) best = {draws, count, vectors};
  }
  return best;
}

SampleTask TaskOf(const Weights& from, float limit, double eta) {
  SampleTask task;
  task.choose = from.Task();
  task.choose.proving = true;
  task.choose.mass_limit = limit;
  task.failure_probability = eta;
  task.draws_max = 1024;
  return task;
}

TEST(CpuPlanSamples, FindsWhatTryingAllOptionsFinds) {
  ChooseScratch scratch;
  uint32_t without_samples = 0;
  uint32_t with_samples = 0;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const auto heads = static_cast<uint32_t>(1 + seed % 4);
    for (const double spread : {0.4, 1.5, 3.0}) {
      const Weights from(heads, seed, spread, /*bounded=*/true, /*blocks=*/seed < 4 ? 150 : 20);
      for (const float limit : {0.3F, 0.02F}) {
        SampleTask task = TaskOf(from, limit, seed % 2 == 0 ? 1e-9 : 1e-3);
        if (seed % 2 == 0) task.costs = SampleCostsOf(CountTokens(from.candidates), 512);
        task.choose.planned_share = seed % 3 == 0 ? 0.5 : kPlannedShare;
        if (heads > 1 && seed % 5 == 0) task.choose.excused.set(1);
        const BruteForce best = TryAll(from, task);
        const SamplePlan plan = PlanSamples(task, &scratch);
        SCOPED_TRACE(::testing::Message() << "seed " << seed << " spread " << spread << " limit "
                                          << limit << " best draws " << best.draws);
        // Among tokens within a step of the scores any may be taken.
        EXPECT_LE(plan.vectors, best.vectors * 1.02 + 4.0);
        EXPECT_EQ(plan.count, CountTokens(plan.chosen));
        EXPECT_EQ(plan.vectors,
                  PlannedVectors(task.costs, plan.count,
                                 heads - static_cast<uint32_t>(plan.excused.count()), plan.draws));
        EXPECT_TRUE(IsSubset(plan.chosen, from.candidates));
        EXPECT_EQ(plan.excused, task.choose.excused);
        ++(plan.draws == 0 ? without_samples : with_samples);
        // And what it chose keeps the limit with its own number of draws.
        const double factor = SampleFactor(task.failure_probability, plan.draws);
        for (uint32_t head = 0; head < heads; ++head) {
          if (plan.excused[head]) continue;
          const Shares of(from, head, factor);
          const double planned = task.choose.planned_share * static_cast<double>(limit);
          const double unread = of.Sum(PositionsOf(from.unread, kFirstBlock));
          if (unread > planned) continue;
          TokenMask dropped = from.candidates;
          for (size_t i = 0; i < dropped.size(); ++i) dropped[i] &= ~plan.chosen[i];
          EXPECT_LE(unread + of.Sum(PositionsOf(dropped, kFirstBlock)), planned * 1.0001);
        }
      }
    }
  }
  // Both happen, or the test shows nothing.
  EXPECT_GT(without_samples, 5U);
  EXPECT_GT(with_samples, 5U);
}

TEST(CpuPlanSamples, NoFailureProbabilityNoSamples) {
  ChooseScratch scratch;
  const Weights from(1, 1, 0.5, /*bounded=*/true, 60);
  EXPECT_EQ(PlanSamples(TaskOf(from, 0.3F, 0.0), &scratch).draws, 0U);
  SampleTask task = TaskOf(from, 0.3F, 1e-3);
  EXPECT_GT(PlanSamples(task, &scratch).draws, 0U);
  task.draws_max = 100;
  EXPECT_LE(PlanSamples(task, &scratch).draws, 64U);
}

// Makes the weights of one head equal.
void Flatten(uint32_t head, Weights* from) {
  for (uint32_t block = kFirstBlock; block < kFirstBlock + from->weights.block_count; ++block) {
    std::fill_n(from->weights.Page(from->weights.upper, head, block), kBlockTokens, 1.0F);
    from->weights.reference[from->weights.PageIndex(head, block)] = 0;
  }
  from->SumPages();
}

TEST(CpuPlanSamples, OneDiffuseHeadIsExcused) {
  ChooseScratch scratch;
  Weights from(3, 4, 3.5, /*bounded=*/true, 60);
  from.unread.assign(from.unread.size(), 0);
  const SampleTask task = TaskOf(from, 0.1F, 0.0);
  EXPECT_TRUE(PlanSamplesExcusing(task, &scratch).excused.none());
  Flatten(1, &from);
  const SamplePlan all = PlanSamples(task, &scratch);
  EXPECT_EQ(all.binding_head, 1U);
  EXPECT_GT(all.count, kDiffuseShare * CountTokens(from.candidates));
  const SamplePlan plan = PlanSamplesExcusing(task, &scratch);
  EXPECT_EQ(plan.excused, HeadSet().set(1));
  EXPECT_LT(plan.count, kDiffuseShare * CountTokens(from.candidates));
  // Two diffuse heads are no exception any more.
  Flatten(2, &from);
  EXPECT_TRUE(PlanSamplesExcusing(task, &scratch).excused.none());
}

}  // namespace
}  // namespace kvservice::testing
