// Chooses tokens and the number of samples together (certificate specification section 3, step 2):
// the more keys every head samples, the less of the gap between estimates and upper ends counts,
// and the fewer tokens have to be read. Only costs depend on this, never a bound. Pure; any thread.

#ifndef KVSERVICE_ATTENTION_CPU_PLAN_SAMPLES_H_
#define KVSERVICE_ATTENTION_CPU_PLAN_SAMPLES_H_

#include <cstdint>

#include "attention/cpu/choose.h"
#include "attention/cpu/token_mask.h"
#include "attention/sample_plan.h"

namespace kvservice {

// A head that alone makes its group read more than this share of the candidates is diffuse.
inline constexpr double kDiffuseShare = 0.35;

struct SampleTask {
  // What is chosen from, with which limit and share of it, and which heads are excused: those
  // sample nothing. Needs `proving`; sample_factor is not read.
  ChooseTask choose;
  // Of a head's sample; 0 plans without samples.
  double failure_probability = 0.0;
  // Keys that a head may sample.
  uint32_t draws_max = 0;
  SampleCosts costs = {};
};

struct SamplePlan {
  TokenMask chosen;
  uint32_t count = 0;  // tokens chosen
  uint32_t draws = 0;  // keys that every head which is not excused samples, one of kDrawOptions
  double vectors = 0;  // what both take, see PlannedVectors
  // A head whose limit the choice meets with least to spare; the first one if none counts.
  uint32_t binding_head = 0;
  // The task's, and a diffuse one.
  HeadSet excused;
};

// The number of draws, among kDrawOptions up to draws_max, that takes the fewest vectors. Without a
// limit on masses, what Choose gives.
SamplePlan PlanSamples(const SampleTask& task, ChooseScratch* scratch);

// The same, but a head that alone makes the others read more than kDiffuseShare of the candidates
// is excused: without it they would read less than that. It is the binding one, if there is such a
// head at all, because another one's absence leaves the binding head's demand as it is.
SamplePlan PlanSamplesExcusing(const SampleTask& task, ChooseScratch* scratch);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_PLAN_SAMPLES_H_
