#include "tests/attention/plan_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>

namespace kvservice::testing {
namespace {

// The first token that any query token sees.
uint32_t ReferenceBegin(const KvCase& kv, const Call& call) {
  const uint32_t window = kv.shape().sliding_window;
  const uint32_t end = call.row.position + 1;
  return window == 0 || end <= window ? 0 : end - window;
}

void CheckTokensRead(const KvCase& kv, const Call& call, uint32_t kv_head) {
  const std::vector<uint32_t>& selected = call.selected[kv_head];
  EXPECT_TRUE(std::is_sorted(selected.begin(), selected.end(), std::less_equal<>()))
      << "ascending and unique";
  const Places places = PlacesOf(kv, call, kv_head);
  EXPECT_EQ(Intersect(selected, places.always), places.always);
  const std::vector<uint32_t> visible = Unite(places.always, places.middle);
  const std::vector<uint32_t> all = Unite(visible, places.hidden);
  EXPECT_EQ(Intersect(selected, all), selected) << "nothing beyond the reference";

  const GroupReport& report = call.groups[kv_head];
  const bool shadow = call.row.plan.mode == Mode::kShadow;
  EXPECT_EQ(report.tokens_read, shadow ? all.size() : selected.size());
  if (shadow) {
    EXPECT_EQ(report.action, Action::kDense);
  } else if (report.action == Action::kDense) {
    EXPECT_EQ(selected, all);
  }
  // Growing reads what proves the limit, wherever it is.
  const bool grown = std::any_of(call.certificates.begin(), call.certificates.end(),
                                 [](const auto& c) { return c.action == Action::kGrown; }) ||
                     call.row.plan.on_violation == OnViolation::kGrow;
  if (shadow || (report.action != Action::kDense && !grown)) {
    EXPECT_TRUE(Intersect(selected, places.hidden).empty()) << "hidden tokens were read";
  }
  if (call.row.plan.source == Source::kAll) {
    EXPECT_EQ(Intersect(selected, visible), visible);
  }
}

}  // namespace

std::vector<std::string> DeviceNames() {
  std::vector<std::string> names = {"reference", "cpu"};
  if (NewDevice("cuda", {.thread_count = 1}).ok()) names.emplace_back("cuda");
  return names;
}

std::unique_ptr<Device> NewDeviceOrDie(const std::string& name) {
  absl::StatusOr<std::unique_ptr<Device>> device = NewDevice(name, {.thread_count = 2});
  EXPECT_TRUE(device.ok()) << device.status();
  return std::move(device).value();
}

Tolerance ToleranceOf(const Device& device) {
  if (device.name() == "reference") return {.normalized_squared_error = 1e-14, .lse = 1e-6};
  return {.normalized_squared_error = 1e-10, .lse = 1e-4};
}

Places PlacesOf(const KvCase& kv, const Call& call, uint32_t kv_head) {
  const Plan& plan = call.row.plan;
  Places places;
  for (uint32_t token = ReferenceBegin(kv, call); token < call.row.view.length; ++token) {
    if (token < plan.sink_end || token >= plan.local_begin || token >= call.row.position ||
        kv.IsExact(kv_head, token, call.row.view.length)) {
      places.always.push_back(token);
    } else if (token < plan.visible_begin) {
      places.hidden.push_back(token);
    } else {
      places.middle.push_back(token);
    }
  }
  return places;
}

std::vector<uint32_t> Intersect(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  std::vector<uint32_t> tokens;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(tokens));
  return tokens;
}

std::vector<uint32_t> Unite(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
  std::vector<uint32_t> tokens;
  std::set_union(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(tokens));
  return tokens;
}

std::vector<uint32_t> ChosenOf(const KvCase& kv, const Call& call, uint32_t kv_head) {
  return Intersect(call.selected[kv_head], PlacesOf(kv, call, kv_head).middle);
}

Plan BasePlan(Source source, uint32_t length, uint32_t local) {
  Plan plan;
  plan.source = source;
  plan.local_begin = length - local;
  return plan;
}

void CheckReading(const KvCase& kv, const Call& call) {
  for (uint32_t kv_head = 0; kv_head < kv.options().layout.kv_head_count; ++kv_head) {
    SCOPED_TRACE(::testing::Message() << "KV head " << kv_head);
    CheckTokensRead(kv, call, kv_head);
  }
}

void RunAndCheck(const KvCase& kv, const Oracle& oracle, Call* call, Slack* slack) {
  call->Run(kv.device(), kv.shape());
  const Tolerance tolerance = ToleranceOf(*kv.device());
  // At logits of hundreds fp32 arithmetic resolves outputs no better than 1e-4, at millions double
  // does not either. Bounds say so and are judged all the same.
  const bool reference = kv.device()->name() == "reference";
  const Keys keys = kv.options().keys;
  const bool judge_outputs = keys != Keys::kOpposing && (reference || keys != Keys::kWideLogits);
  CheckCall(kv, oracle, *call, judge_outputs ? &tolerance : nullptr, slack);
  CheckReading(kv, *call);
}

std::unique_ptr<Call> RunPlan(const KvCase& kv, const Plan& plan, Slack* slack) {
  const CaseOptions& options = kv.options();
  auto call = std::make_unique<Call>(kv, options.length, options.query_count, kv.queries(), plan);
  const Oracle oracle(kv, call->row);
  RunAndCheck(kv, oracle, call.get(), slack);
  return call;
}

}  // namespace kvservice::testing
