#include "attention/cpu/plan_samples.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "attention/sample_plan.h"

namespace kvservice {
namespace {

// Keeps the cheapest plan that it has seen.
class Search {
 public:
  Search(const SampleTask& task, ChooseScratch* scratch)
      : task_(task), chooser_(task.choose, scratch) {
    const uint32_t heads = task.choose.weights->head_count;
    sampling_ = heads - static_cast<uint32_t>(task.choose.excused.count());
    best_.vectors = std::numeric_limits<double>::infinity();
  }

  // Plans with so many draws; returns the tokens that this takes.
  uint32_t Try(uint32_t draws) {
    SamplePlan plan;
    plan.chosen = chooser_.Choose(SampleFactor(task_.failure_probability, draws));
    plan.count = CountTokens(plan.chosen);
    plan.draws = draws;
    plan.vectors = Vectors(plan.count, draws);
    plan.binding_head = chooser_.binding_head();
    plan.excused = task_.choose.excused;
    const uint32_t count = plan.count;
    if (plan.vectors < best_.vectors) best_ = std::move(plan);
    return count;
  }

  // True if so many draws may pay, given a number of tokens that they cannot do without.
  bool MayPay(uint32_t count, uint32_t draws) const {
    return Vectors(count, draws) < best_.vectors;
  }

  SamplePlan TakeBest() { return std::move(best_); }

 private:
  double Vectors(uint32_t count, uint32_t draws) const {
    return PlannedVectors(task_.costs, count, sampling_, draws);
  }

  const SampleTask& task_;
  Chooser chooser_;
  uint32_t sampling_ = 0;
  SamplePlan best_;
};

}  // namespace

SamplePlan PlanSamples(const SampleTask& task, ChooseScratch* scratch) {
  Search search(task, scratch);
  search.Try(0);
  if (!(task.failure_probability > 0.0) || !(task.choose.mass_limit > 0.0F)) {
    return search.TakeBest();
  }
  // From the most draws downwards: what more draws read is the least that fewer can read, so most
  // options are passed over.
  uint32_t least = 0;
  for (auto draws = kDrawOptions.rbegin(); draws != kDrawOptions.rend(); ++draws) {
    if (*draws == 0 || *draws > task.draws_max || !search.MayPay(least, *draws)) continue;
    least = std::max(least, search.Try(*draws));
  }
  return search.TakeBest();
}

SamplePlan PlanSamplesExcusing(const SampleTask& task, ChooseScratch* scratch) {
  SamplePlan plan = PlanSamples(task, scratch);
  const double most = kDiffuseShare * CountTokens(task.choose.candidates);
  const uint32_t heads = task.choose.weights->head_count;
  if (plan.count <= most || plan.excused.count() + 1 >= heads) return plan;
  SampleTask without = task;
  without.choose.excused.set(plan.binding_head);
  SamplePlan rest = PlanSamples(without, scratch);
  return rest.count <= most ? rest : plan;
}

}  // namespace kvservice
