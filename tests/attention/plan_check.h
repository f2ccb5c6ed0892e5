// Runs plans on devices and judges what was read: which tokens a plan must read, may read and must
// not read, from the contract of attention/plan.h alone.

#ifndef KVSERVICE_TESTS_ATTENTION_PLAN_CHECK_H_
#define KVSERVICE_TESTS_ATTENTION_PLAN_CHECK_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/attention/kv_case.h"
#include "tests/attention/oracle.h"

namespace kvservice::testing {

// The devices that conformance tests run, "cuda" where there is a GPU. One more device is one more
// name here.
std::vector<std::string> DeviceNames();
std::unique_ptr<Device> NewDeviceOrDie(const std::string& name);
// Outputs of the reference are double arithmetic rounded to float; those of other devices fp32
// arithmetic over up to a thousand tokens: logits are sums of up to 256 products, off by about
// 1e-5 at magnitudes of 100, and so are weights and outputs, hence 1e-10 for the square. The cache
// type does not matter: widening it is exact.
Tolerance ToleranceOf(const Device& device);

// Tokens of one KV head by what the plan says about them, each ascending.
struct Places {
  std::vector<uint32_t> always, hidden, middle;
};
Places PlacesOf(const KvCase& kv, const Call& call, uint32_t kv_head);
std::vector<uint32_t> Intersect(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b);
std::vector<uint32_t> Unite(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b);
// What a call chose of the middle.
std::vector<uint32_t> ChosenOf(const KvCase& kv, const Call& call, uint32_t kv_head);

// A plan of the usual shape: 8 sinks, a local window of the last `local` tokens.
Plan BasePlan(Source source, uint32_t length, uint32_t local = 93);

// Judges by the plan what an executed call says it has read.
void CheckReading(const KvCase& kv, const Call& call);
// Runs the call and judges everything: numbers by the oracle, the tokens read by the plan.
void RunAndCheck(const KvCase& kv, const Oracle& oracle, Call* call, Slack* slack = nullptr);
// The same for one call with its own oracle, at the case's full length with its own queries.
std::unique_ptr<Call> RunPlan(const KvCase& kv, const Plan& plan, Slack* slack = nullptr);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_ATTENTION_PLAN_CHECK_H_
