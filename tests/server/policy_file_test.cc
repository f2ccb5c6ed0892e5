// Named policies in files.

#include "kvservice/server/policy_file.h"

#include <gtest/gtest.h>

#include <string>

namespace kvservice {
namespace {

std::string Problem(const std::string& text) {
  PolicyRegistry registry;
  const absl::Status status = AddPolicies(text, &registry);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
  return std::string(status.message());
}

std::string Named(const std::string& name, const std::string& policy) {
  return R"({"name": ")" + name + R"(", "policy": {)" + policy + "}}";
}

TEST(PolicyFileTest, EveryFieldSurvives) {
  Policy policy = DefaultPolicy(SelectorKind::kCpe);
  policy.budget = {.sink = 1, .local = 2, .top_k = 0, .mass = 0.05F};
  policy.cis.min_cosine = 0.83F;
  policy.psaw = {.first_layer = 3, .phi = 0.7F, .alpha = 2};
  policy.layers = {{.layer_begin = 0, .layer_end = 2, .selector = SelectorKind::kDense},
                   {.layer_begin = 2,
                    .layer_end = 3,
                    .budget = Budget{.top_k = 700},
                    .min_cosine = 0.9F,
                    .kv_head_min_cosines = {0.71F, 1.0F, -1.0F},
                    .hidden_share = 0.1F,
                    .frozen_share = 0.0F,
                    .psaw_decay_scale = 0.3F,
                    .psaw_decay_rate = 1e-4F,
                    .etf_logit_drift = 0.7F}};
  policy.failure_probability = 1e-7;
  policy.mode = Mode::kShadow;
  PolicyRegistry registry;
  const std::string text = PolicyFileText("calibrated", policy);
  ASSERT_TRUE(AddPolicies(text, &registry).ok()) << AddPolicies(text, &registry);
  ASSERT_NE(registry.Find("calibrated"), nullptr);
  EXPECT_EQ(*registry.Find("calibrated"), policy);
}

TEST(PolicyFileTest, ListsAndReferencesWork) {
  PolicyRegistry registry;
  const std::string text = " [" + Named("a", R"("selector": "SELECTOR_SCAN")") + ",\n" +
                           Named("b.2_x-", R"("name": "a")") + "]\n";
  ASSERT_TRUE(AddPolicies(text, &registry).ok()) << AddPolicies(text, &registry);
  EXPECT_EQ(*registry.Find("a"), DefaultPolicy(SelectorKind::kScan));
  EXPECT_EQ(*registry.Find("b.2_x-"), DefaultPolicy(SelectorKind::kScan));
  EXPECT_EQ(*registry.Find("cis"), DefaultPolicy(SelectorKind::kCis)) << "built-in ones stay";
}

TEST(PolicyFileTest, SaysWhereAndWhatIsWrong) {
  const std::string good = Named("good", "");
  EXPECT_EQ(Problem("[" + good + "," + Named("fast", R"("cis": {"min_cosine": 2})") + "]"),
            "[1] (fast): policy.cis.min_cosine is 2, expected -1 to 1");
  EXPECT_EQ(Problem(Named("cpe", "")), "[0] (cpe): name cpe is taken");
  EXPECT_EQ(Problem("[" + good + "," + good + "]"), "[1] (good): name good is taken");
  EXPECT_EQ(Problem(R"({"name": "x"})"), "[0] (x): policy is missing");
  EXPECT_EQ(Problem(Named("two\\nlines", "")).find('\n'), std::string::npos);
  EXPECT_EQ(Problem(Named("x", R"("name": "y")")), "[0] (x): there is no policy named y");
  EXPECT_EQ(Problem("[]"), "there is no policy in it");
  for (const std::string& name : {std::string(), std::string("a b"), std::string(65, 'a')}) {
    EXPECT_NE(Problem(Named(name, "")).find("name is not 1 to 64 letters"), std::string::npos);
  }
  EXPECT_EQ(Problem(Named("x", R"("layers": {"overrides": [{"layerEnd": 1, "hiddenShare": 1}]})")),
            "[0] (x): policy.layers[0].hidden_share is 1, expected at least 0, less than 1");
}

// What the parser finds is told with the path of the field, in one line.
TEST(PolicyFileTest, RefusesWhatIsNoSuchJson) {
  EXPECT_NE(Problem(Named("x", R"("selectr": 4)")).find("selectr"), std::string::npos);
  EXPECT_NE(Problem(Named("x", R"("selector": "SELECTOR_BEST")")).find("selector"),
            std::string::npos);
  EXPECT_NE(Problem(Named("x", R"("cis": {"min_cosine": "much"})")).find("min_cosine"),
            std::string::npos);
  for (const char* text : {"", " \n", "{", "[{]", "42", "null", "\"cpe\"", "{}}", "[] []"}) {
    EXPECT_EQ(Problem(text).find('\n'), std::string::npos) << text;
  }
}

TEST(PolicyFileTest, TheNumberOfPoliciesIsBounded) {
  PolicyRegistry registry;
  absl::Status status;
  size_t added = 0;
  while (status.ok() && added < 2 * kNamedPoliciesMax) {
    status = AddPolicies(Named("p" + std::to_string(added), ""), &registry);
    if (status.ok()) ++added;
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("the most there may be"), absl::string_view::npos);
  EXPECT_LT(added, kNamedPoliciesMax);
}

}  // namespace
}  // namespace kvservice
