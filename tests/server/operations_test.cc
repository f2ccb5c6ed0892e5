// What operators see of a server besides the API: metrics and probes over HTTP, and what a reload
// changes.

#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <regex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "kvservice/server/call_metrics.h"
#include "kvservice/server/live_policies.h"
#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/served_engine.h"
#include "tests/server/web_client.h"

namespace kvservice::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

// A call is in flight until the transport is done with it, shortly after its client has the answer.
bool AreInFlight(const Endpoint& web, int count) {
  return Eventually([&] {
    return GetPage(web, "/metrics")
               .find("\nkvservice_requests_in_flight " + std::to_string(count) + "\n") !=
           std::string::npos;
  });
}

ServedEngineOptions WithMetrics() {
  ServedEngineOptions options;
  options.engine.audit_rate = 1.0;
  options.server.metrics_listen = *ParseEndpoint("127.0.0.1:0");
  // Certified in every layer and at every length.
  Policy policy = DefaultPolicy(SelectorKind::kCertified);
  policy.dense_below_tokens = 0;
  policy.layers.clear();
  EXPECT_TRUE(options.server.policies.Add("everywhere", policy).ok());
  return options;
}

class OperationsTest : public ::testing::Test {
 protected:
  Endpoint Web() const { return *served_.server()->metrics_endpoint(); }

  // A sequence whose layer 1 holds 300 tokens, the last of them attended with the policy.
  grpc::Status AttendWith(const v1::Policy& policy) {
    const auto sequences = v1::SequenceService::NewStub(served_.Connect());
    v1::CreateRequest create;
    create.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_TRUE(sequences->Create(NewContext().get(), create, &created).ok());
    const v1::SequenceHandle handle = created.sequence().handle();
    v1::AppendResponse appended;
    const auto context = NewContext();
    const auto writer = sequences->Append(context.get(), &appended);
    writer->Write(MakeAppend(served_.model(), handle, 1, 0, Counting(0, 299)));
    writer->WritesDone();
    EXPECT_TRUE(writer->Finish().ok());
    v1::AttendRequest request = MakeAttend(served_.model(), handle, 1, 299, {299});
    *request.mutable_policy() = policy;
    v1::AttendResponse response;
    const auto attention = v1::AttentionService::NewStub(served_.Connect());
    const grpc::Status status = attention->Attend(NewContext().get(), request, &response);
    EXPECT_TRUE(AreInFlight(Web(), 0));
    return status;
  }

  ServedEngine served_{WithMetrics()};
};

TEST_F(OperationsTest, MetricsCountWhatHappened) {
  v1::Policy policy;
  policy.set_name("everywhere");
  ASSERT_TRUE(AttendWith(policy).ok());
  // The audit follows when nothing else is to be done.
  ASSERT_TRUE(Eventually([&] { return served_.engine()->Stats().audit.rows_audited == 1; }));
  const std::string page = GetPage(Web(), "/metrics");
  EXPECT_THAT(page, StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(page, HasSubstr("\r\nContent-Type: text/plain; version=0.0.4"));
  constexpr const char* kShapes =
      "\nkvservice_model_shapes{layers=\"2\",query_heads=\"4\",kv_heads=\"2\","
      "head_dim=\"64\",dtype=\"bfloat16\",selector=\"dense\",guarantee=\"none\","
      "max_dropped_mass=\"1\"} 1\n";
  for (const char* const line : {
           "\nkvservice_rpc_calls_total{side=\"data\",method=\"Attend\",code=\"OK\"} 1\n",
           "\nkvservice_rpc_duration_seconds_count{side=\"data\",method=\"Attend\"} 1\n",
           "\nkvservice_attend_service_seconds_count 1\n",
           "\nkvservice_attend_queue_seconds_count 1\n",
           "\nkvservice_attend_rows_total 1\n",
           "\nkvservice_attend_groups_total 2\n",
           "\nkvservice_attend_groups_scanned_total 2\n",
           "\nkvservice_attend_tokens_visible_total 600\n",
           // Four query heads: every certificate is in exactly one class.
           "\nkvservice_dropped_mass_certified_count{selector=\"certified\",layer=\"1\"} 4\n",
           "_dropped_mass_certified_bucket{selector=\"certified\",layer=\"1\",le=\"1\"} 4\n",
           "\nkvservice_dropped_mass_audited_count{selector=\"certified\",layer=\"1\"} 4\n",
           "\nkvservice_audit_rows_total{outcome=\"audited\"} 1\n",
           "\nkvservice_audit_violations_total 0\n",
           "\nkvservice_sequences 1\n",
           kShapes,
           "\nkvservice_draining 0\n",
           "\nkvservice_disk_max_bytes 0\n",
           "\nkvservice_heap_bytes ",
           "\nprocess_open_fds ",
       }) {
    EXPECT_NE(page.find(line), std::string::npos) << line;
  }
  const std::string body = page.substr(page.find("\r\n\r\n"));
  EXPECT_EQ(body.find("default"), std::string::npos) << "tenants are not named";
  EXPECT_EQ(body.find(kModel), std::string::npos) << "models are not named";
}

// Adds up the lines of a scrape that a "sum(name{labels})" selects.
double SumInScrape(const std::string& scrape, const std::string& expression) {
  const std::string selected = expression.substr(4, expression.size() - 5);
  const std::string name = selected.substr(0, selected.find('{'));
  std::vector<std::string> labels;
  if (name != selected) {
    labels =
        absl::StrSplit(selected.substr(name.size() + 1, selected.size() - name.size() - 2), ',');
  }
  double sum = 0.0;
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(scrape, '\n'))) {
    const bool is_named = line.starts_with(name + "{") || line.starts_with(name + " ");
    const bool matches = std::all_of(labels.begin(), labels.end(), [&](const std::string& label) {
      return line.find(label) != std::string::npos;
    });
    if (is_named && matches) sum += std::stod(line.substr(line.rfind(' ') + 1));
  }
  return sum;
}

TEST_F(OperationsTest, TheStatusPageSaysWhatTheMetricsSay) {
  v1::Policy policy;
  policy.set_name("everywhere");
  ASSERT_TRUE(AttendWith(policy).ok());
  policy.set_name("nobody knows");
  ASSERT_FALSE(AttendWith(policy).ok());
  ASSERT_TRUE(Eventually([&] { return served_.engine()->Stats().audit.rows_audited == 1; }));
  const std::string page = GetPage(Web(), "/status");
  const std::string scrape = GetPage(Web(), "/metrics");
  const std::regex number("<data value=\"([^\"]*)\" title=\"(sum\\(kvservice_[^()]*\\))\">");
  size_t compared = 0;
  for (std::sregex_iterator at(page.begin(), page.end(), number), end; at != end; ++at) {
    const std::string expression = absl::StrReplaceAll((*at)[2].str(), {{"&quot;", "\""}});
    if (expression == "sum(kvservice_uptime_seconds)") continue;
    // Scrapes have 16 digits.
    EXPECT_DOUBLE_EQ(std::stod((*at)[1]), SumInScrape(scrape, expression)) << expression;
    ++compared;
  }
  EXPECT_GT(compared, 50U);
  EXPECT_THAT(page, AllOf(HasSubstr(">NOT_FOUND<"), HasSubstr(">data Attend<"),
                          HasSubstr(">serving<"), HasSubstr("max_dropped_mass=&quot;1&quot;")));
  EXPECT_EQ(page.find(kModel), std::string::npos) << "models are not named";
  EXPECT_EQ(page.find("nobody knows"), std::string::npos);
}

TEST_F(OperationsTest, PagesAreClosedToEverythingElse) {
  for (const auto& [path, type] :
       {std::pair{"/", "text/html"}, std::pair{"/status", "text/html"},
        std::pair{"/status.css", "text/css"}, std::pair{"/metrics", "text/plain"}}) {
    EXPECT_THAT(
        GetPage(Web(), path),
        AllOf(StartsWith("HTTP/1.1 200 "), HasSubstr("\r\nContent-Type: " + std::string(type)),
              HasSubstr("\r\nContent-Security-Policy: default-src 'none'; "),
              HasSubstr("frame-ancestors 'none'"), Not(HasSubstr("unsafe")),
              HasSubstr("\r\nX-Content-Type-Options: nosniff\r\n"),
              HasSubstr("\r\nCache-Control: no-store\r\n")))
        << path;
  }
}

TEST_F(OperationsTest, ErrorsAreCountedByTheirCode) {
  v1::Policy policy;
  policy.set_name("nobody knows");
  EXPECT_EQ(AttendWith(policy).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(
      GetPage(Web(), "/metrics"),
      HasSubstr(
          "\nkvservice_rpc_calls_total{side=\"data\",method=\"Attend\",code=\"NOT_FOUND\"} 1"));
}

TEST_F(OperationsTest, ProbesAndNothingElse) {
  EXPECT_THAT(GetPage(Web(), "/livez"),
              AllOf(StartsWith("HTTP/1.1 200 "), HasSubstr("\r\n\r\nalive\n")));
  EXPECT_THAT(GetPage(Web(), "/readyz"), StartsWith("HTTP/1.1 200 "));
  EXPECT_THAT(GetPage(Web(), "/readyz?verbose"), StartsWith("HTTP/1.1 200 "));
  for (const char* const path : {"/status/", "/metrics/", "/../etc/passwd", "/livez/x"}) {
    EXPECT_THAT(GetPage(Web(), path), StartsWith("HTTP/1.1 404 ")) << path;
  }
  EXPECT_THAT(AnswerTo(Web(), "POST /metrics HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"),
              StartsWith("HTTP/1.1 405 "));
  const std::string head = AnswerTo(Web(), "HEAD /livez HTTP/1.1\r\nHost: test\r\n\r\n");
  EXPECT_THAT(head, AllOf(HasSubstr("Content-Length: 6"), Not(HasSubstr("alive"))));
  const std::string long_line(100'000, 'x');
  EXPECT_THAT(GetPage(Web(), "/" + long_line), StartsWith("HTTP/1.0 400 "));
}

// Metrics are there until the last call has ended.
TEST(OperationsDrainTest, DrainingIsNotReady) {
  Brake brake;
  ServedEngineOptions options = WithMetrics();
  options.device = brake.On(*NewDevice("reference", {}));
  ServedEngine served(std::move(options));
  const Endpoint web = *served.server()->metrics_endpoint();
  const auto sequences = v1::SequenceService::NewStub(served.Connect());
  v1::CreateRequest create;
  create.set_model(kModel);
  v1::CreateResponse created;
  ASSERT_TRUE(sequences->Create(NewContext().get(), create, &created).ok());
  brake.Set(true);
  std::thread caller([&] {
    v1::AttendResponse response;
    const auto request = MakeAttend(served.model(), created.sequence().handle(), 0, 0, {1});
    const auto attention = v1::AttentionService::NewStub(served.Connect());
    EXPECT_TRUE(attention->Attend(NewContext().get(), request, &response).ok());
  });
  EXPECT_TRUE(Eventually([&] { return brake.call_count() > 0; }));
  std::thread drain([&] { served.server()->Drain(60'000); });
  EXPECT_TRUE(Eventually([&] { return GetPage(web, "/readyz").starts_with("HTTP/1.1 503 "); }));
  EXPECT_THAT(GetPage(web, "/livez"), StartsWith("HTTP/1.1 200 "));
  EXPECT_THAT(GetPage(web, "/metrics"), HasSubstr("\nkvservice_draining 1\n"));
  EXPECT_TRUE(AreInFlight(web, 1));
  EXPECT_THAT(GetPage(web, "/"), AllOf(StartsWith("HTTP/1.1 200 "), HasSubstr(">not serving<")));
  brake.Set(false);
  caller.join();
  drain.join();
}

TEST_F(OperationsTest, AReloadReplacesThePolicies) {
  v1::Policy named;
  named.set_name("mine");
  EXPECT_EQ(AttendWith(named).error_code(), grpc::StatusCode::NOT_FOUND);
  ServerOptions reloaded;
  ASSERT_TRUE(reloaded.policies.Add("mine", DefaultPolicy(SelectorKind::kDense)).ok());
  ASSERT_TRUE(served_.server()->Reload(reloaded).ok());
  EXPECT_TRUE(AttendWith(named).ok());
  ASSERT_TRUE(served_.server()->Reload(ServerOptions()).ok());
  EXPECT_EQ(AttendWith(named).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST(LivePoliciesTest, HaveAnEndAndChangeNothingThen) {
  LivePolicies policies{PolicyRegistry()};
  const PolicyRegistry* const first = &policies.now();
  for (size_t i = 0; i < LivePolicies::kReplacementsMax; ++i) {
    ASSERT_TRUE(policies.Replace(PolicyRegistry()).ok());
  }
  const PolicyRegistry* const last = &policies.now();
  EXPECT_EQ(policies.Replace(PolicyRegistry()).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(&policies.now(), last);
  EXPECT_NE(first->Find("dense"), nullptr) << "calls may still point to it";
}

TEST(TimeHistogramTest, ClassesHoldTheirUpperEnds) {
  for (size_t i = 0; i < TimeHistogram::kBoundsNs.size(); ++i) {
    TimeHistogram times;
    times.Add(TimeHistogram::kBoundsNs[i]);
    times.Add(TimeHistogram::kBoundsNs[i] + 1);
    const TimeHistogram::Counts counts = times.Read();
    EXPECT_EQ(counts.counts[i], 1U);
    EXPECT_EQ(counts.counts[i + 1], 1U);
    EXPECT_EQ(counts.total(), 2U);
    EXPECT_EQ(counts.sum_ns, 2 * TimeHistogram::kBoundsNs[i] + 1);
  }
}

}  // namespace
}  // namespace kvservice::testing
