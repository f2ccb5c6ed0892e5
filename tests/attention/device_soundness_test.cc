// No bound may ever lie on the wrong side of the truth: hostile keys one by one, then thousands of
// random calls. A failure prints the seed of its case, and the environment variable
// KVSERVICE_SOUNDNESS_SEED runs that case alone; KVSERVICE_SOUNDNESS_CASES sets how many are tried.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "tests/attention/kv_case.h"
#include "tests/attention/oracle.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

void PrintSlack(const std::string& name, Slack slack) {
  if (slack.nats.empty()) return;
  std::sort(slack.nats.begin(), slack.nats.end());
  const auto at = [&](double share) {
    return slack.nats[static_cast<size_t>(share * static_cast<double>(slack.nats.size() - 1))];
  };
  std::cout << name << ": ln(bound / truth) in nats over " << slack.nats.size() << " heads: median "
            << at(0.5) << ", p95 " << at(0.95) << ", max " << at(1.0) << "\n";
}

using Parameters = std::tuple<std::string, Keys, DType>;

class DeviceAdversary : public ::testing::TestWithParam<Parameters> {
 protected:
  // Dense, hidden, chosen by number and by mass, unproven, proven and computed.
  static void CheckKeys(const KvCase& kv, Slack* slack) {
    const CaseOptions& options = kv.options();
    Plan plan = BasePlan(Source::kAll, options.length, 40);
    const Call sample(kv, options.length, options.query_count, kv.queries(), plan);
    const Oracle oracle(kv, sample.row);
    const auto run = [&](Slack* into) {
      Call call(kv, options.length, options.query_count, kv.queries(), plan);
      RunAndCheck(kv, oracle, &call, into);
    };
    plan.visible_begin = 70;
    for (const Source source : {Source::kAll, Source::kScan}) {
      plan.source = source;
      for (const uint32_t top_k : {0U, 1U, 60U}) {
        plan.keep.top_k = top_k;
        for (const Guarantee prove :
             {Guarantee::kNone, Guarantee::kDeterministic, Guarantee::kExact}) {
          plan.prove = prove;
          run(prove == Guarantee::kDeterministic ? slack : nullptr);
        }
      }
    }
    plan = BasePlan(Source::kScan, options.length, 40);
    plan.keep.mass_limit = 0.05F;
    plan.max_dropped_mass = 0.05F;
    plan.prove = Guarantee::kDeterministic;
    plan.on_violation = OnViolation::kDense;
    run(nullptr);
    plan.prove = Guarantee::kConfidence;
    plan.on_violation = OnViolation::kGrow;
    run(nullptr);
    plan.max_output_error = 0.02F;
    run(nullptr);
    plan.max_dropped_mass = 1.0F;
    plan.keep.mass_limit = 0.0F;
    run(nullptr);
  }
};

TEST_P(DeviceAdversary, BoundsHold) {
  const auto& [name, keys, dtype] = GetParam();
  const auto device = NewDeviceOrDie(name);
  Slack slack;
  for (const Tables tables : {Tables::kIdentity, Tables::kLearnt, Tables::kExtreme}) {
    for (const bool zero_queries : {false, true}) {
      CaseOptions options;
      options.layout = {.query_head_count = 6, .kv_head_count = 2, .head_dim = 96, .dtype = dtype};
      options.length = 350;
      options.query_count = 2;
      options.keys = keys;
      options.tables = tables;
      options.zero_queries = zero_queries;
      CheckKeys(KvCase(device.get(), options), &slack);
    }
  }
  PrintSlack(name + " " + Name(keys) + " " + Name(dtype), slack);
}

std::string ParametersName(const ::testing::TestParamInfo<Parameters>& info) {
  const auto& [device, keys, dtype] = info.param;
  return device + "_" + Name(keys) + "_" + Name(dtype);
}

INSTANTIATE_TEST_SUITE_P(
    All, DeviceAdversary,
    ::testing::Combine(::testing::ValuesIn(DeviceNames()), ::testing::ValuesIn(kAllKeys),
                       ::testing::Values(DType::kBfloat16, DType::kFloat16, DType::kFloat32)),
    ParametersName);

// One random case: everything about it follows from the seed.
class RandomCase {
 public:
  RandomCase(Device* device, uint64_t seed) : device_(device), random_(seed) {
    const uint32_t head_dims[] = {64, 80, 96, 128, 256};
    const uint32_t groups[] = {1, 2, 3, 4, 7, 8, 16};
    const uint32_t kv_heads = 1 + Below(2);
    options_.layout = {.query_head_count = kv_heads * groups[Below(7)],
                       .kv_head_count = kv_heads,
                       .head_dim = head_dims[Below(5)],
                       .dtype = static_cast<DType>(Below(3))};
    options_.length = 1 + Below(Below(4) == 0 ? 64 : 420);
    // At most 64 heads, so that no case takes long.
    const uint32_t query_count_max =
        std::min(kQueryTokensMax, std::max(1U, 64 / options_.layout.query_head_count));
    options_.query_count =
        std::min(options_.length, Below(2) == 0 ? 1 : 1 + Below(query_count_max));
    options_.keys = kAllKeys[Below(2) == 0 ? 0 : Below(std::size(kAllKeys))];
    options_.tables = static_cast<Tables>(Below(4));
    options_.zero_queries = Below(30) == 0;
    options_.seed = seed;
  }

  void Run(Slack* slack) {
    KvCase kv(device_, options_);
    LayerShape* shape = kv.mutable_shape();
    if (Below(4) == 0) shape->sliding_window = 1 + Below(options_.length + 50);
    if (Below(4) == 0) shape->logit_softcap = Below(2) == 0 ? 50.0F : 5.0F;
    if (Below(4) == 0) shape->scale *= std::exp(static_cast<float>(Below(9)) - 4.0F);
    const auto lists = device_->NewTokenLists(options_.layout, Below(3));
    const auto frozen = device_->NewTokenLists(options_.layout, 1);
    MakeGiven();
    // Two or three calls, so that lists are reused and completed.
    for (uint32_t call = 2 + Below(2); call > 0; --call) {
      Plan plan = RandomPlan();
      plan.lists = Below(3) == 0 && plan.source != Source::kReuse ? frozen.get() : lists.get();
      if (plan.lists == lists.get() && Below(2) == 0) plan.frozen_lists = frozen.get();
      Call run(kv, options_.length, options_.query_count, kv.queries(), plan);
      const Oracle oracle(kv, run.row);
      for (std::byte& byte : run.row.draw_key) byte = static_cast<std::byte>(random_());
      // Softened or sharpened logits may exceed what fp32 outputs resolve; bounds may not.
      run.Run(device_, *shape);
      CheckCall(kv, oracle, run, nullptr, slack);
      CheckReading(kv, run);
    }
  }

 private:
  uint32_t Below(uint32_t end) { return static_cast<uint32_t>(random_() % end); }

  void MakeGiven() {
    offsets_ = {0};
    for (uint32_t kv_head = 0; kv_head < options_.layout.kv_head_count; ++kv_head) {
      const uint32_t keep = 1 + Below(6);
      for (uint32_t token = 0; token < options_.length; ++token) {
        if (Below(keep) == 0) given_.push_back(token);
      }
      offsets_.push_back(static_cast<uint32_t>(given_.size()));
    }
  }

  Plan RandomPlan() {
    Plan plan;
    plan.source = static_cast<Source>(Below(4));
    plan.sink_end = Below(3) == 0 ? Below(80) : 8;
    plan.local_begin = options_.length - std::min(options_.length, 1 + Below(100));
    if (Below(3) == 0) plan.visible_begin = Below(options_.length);
    plan.keep.top_k = Below(3) == 0 ? 0 : Below(120);
    if (Below(3) == 0) plan.keep.mass_limit = 0.3F / static_cast<float>(1 + Below(30));
    if (Below(4) == 0) {
      plan.keep.dilate_strongest = Below(20);
      plan.keep.dilate_radius = Below(4);
    }
    plan.min_cosine = Below(4) == 0 ? 1.5F : 0.8F;
    plan.frozen_end = Below(options_.length);
    plan.given = given_;
    plan.given_offsets = offsets_;
    plan.dense_share = Below(2) == 0 ? 0.6F : 1.0F;
    const Guarantee usual = Below(2) == 0 ? Guarantee::kConfidence : Guarantee::kDeterministic;
    plan.prove = Below(4) == 0 ? static_cast<Guarantee>(Below(4)) : usual;
    if (Below(2) == 0) plan.max_dropped_mass = 0.5F / static_cast<float>(1 + Below(100));
    if (Below(3) == 0) plan.max_output_error = 0.5F / static_cast<float>(1 + Below(100));
    plan.draws_max = 1 + Below(300);
    plan.on_violation = static_cast<OnViolation>(Below(3));
    plan.mode = Below(5) == 0 ? Mode::kShadow : Mode::kEnforce;
    if (Below(2) == 0) plan.reuse_mass_limit = 0.1F * static_cast<float>(1 + Below(9));
    return plan;
  }

  Device* device_;
  std::mt19937_64 random_;
  CaseOptions options_;
  std::vector<uint32_t> given_, offsets_;
};

class DeviceSoundness : public ::testing::TestWithParam<std::string> {};

TEST_P(DeviceSoundness, RandomCalls) {
  const auto device = NewDeviceOrDie(GetParam());
  const char* only = std::getenv("KVSERVICE_SOUNDNESS_SEED");
  const char* cases = std::getenv("KVSERVICE_SOUNDNESS_CASES");
  const uint64_t first = only != nullptr ? std::strtoull(only, nullptr, 10) : 20240601;
  const uint64_t count = only != nullptr    ? 1
                         : cases != nullptr ? std::strtoull(cases, nullptr, 10)
                                            : 1000;
  Slack slack;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    SCOPED_TRACE(::testing::Message() << "KVSERVICE_SOUNDNESS_SEED=" << seed);
    RandomCase(device.get(), seed).Run(&slack);
    if (HasFailure()) break;
  }
  std::cout << GetParam() << ": " << count << " cases from seed " << first << "\n";
  PrintSlack(GetParam(), slack);
}

INSTANTIATE_TEST_SUITE_P(All, DeviceSoundness, ::testing::ValuesIn(DeviceNames()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace kvservice::testing
