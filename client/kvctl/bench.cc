#include "client/kvctl/bench.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "client/kvctl/outcome.h"
#include "client/kvctl/text.h"

namespace kvservice::client {
namespace {

using Json = nlohmann::ordered_json;
using SteadyClock = std::chrono::steady_clock;

constexpr uint32_t kSeed = 20240229;
// Tokens of one Write.
constexpr uint32_t kChunkTokens = 512;

constexpr std::array<std::pair<const char*, Selector>, 5> kSelectors = {
    std::pair{"dense", Selector::kDense}, std::pair{"certified", Selector::kCertified},
    std::pair{"cis", Selector::kCis}, std::pair{"cpe", Selector::kCpe},
    std::pair{"scan", Selector::kScan}};

double Microseconds(SteadyClock::duration time) {
  return std::chrono::duration<double, std::micro>(time).count();
}

// Times in microseconds, of which one is asked for by its share.
class Times {
 public:
  void Add(double us) { us_.push_back(us); }
  // The smallest time that so many are not above; 0 without any.
  double Quantile(double share) {
    if (us_.empty()) return 0.0;
    std::sort(us_.begin(), us_.end());
    const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(us_.size())));
    return us_[std::clamp<size_t>(rank, 1, us_.size()) - 1];
  }

 private:
  std::vector<double> us_;
};

constexpr std::array<std::pair<const char*, double>, 4> kQuantiles = {
    std::pair{"p50", 0.5}, std::pair{"p90", 0.9}, std::pair{"p99", 0.99}, std::pair{"max", 1.0}};

Json ToJson(Times* times) {
  Json json = Json::object();
  for (const auto& [name, share] : kQuantiles) json[name] = times->Quantile(share);
  return json;
}

std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f", value);
  return text;
}

Row RowOf(const std::string& name, Times* times) {
  Row row = {name};
  for (const auto& [quantile, share] : kQuantiles) row.push_back(Number(times->Quantile(share)));
  return row;
}

// Normal numbers as bfloat16.
std::vector<uint16_t> RandomHalves(size_t count, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> halves(count);
  for (uint16_t& half : halves) {
    half = static_cast<uint16_t>(std::bit_cast<uint32_t>(normal(*random)) >> 16);
  }
  return halves;
}

struct Measured {
  Transport transport = Transport::kUnary;
  uint64_t fill_bytes = 0;
  double fill_seconds = 0.0;
  double attend_seconds = 0.0;
  uint32_t calls = 0;
  uint64_t tokens_read = 0;
  uint64_t tokens_visible = 0;
  Times call, queue, service;
};

ModelDescription ModelFor(const BenchOptions& bench) {
  ModelDescription model;
  model.name = absl::StrCat("kvctl-bench-", bench.layers, "-", bench.query_heads, "-",
                            bench.kv_heads, "-", bench.head_dim);
  model.layer_count = bench.layers;
  model.query_head_count = bench.query_heads;
  model.kv_head_count = bench.kv_heads;
  model.head_dim = bench.head_dim;
  model.scale = 1.0F / std::sqrt(static_cast<float>(bench.head_dim));
  return model;
}

absl::Status Fill(const BenchOptions& bench, const Sequence& sequence, std::mt19937* random,
                  Measured* measured) {
  const size_t row = size_t{bench.kv_heads} * bench.head_dim;
  const std::vector<uint16_t> halves = RandomHalves(kChunkTokens * row, random);
  AppendWriter writer = sequence.Append();
  const auto began = SteadyClock::now();
  for (uint32_t layer = 0; layer < bench.layers; ++layer) {
    for (uint32_t at = 0; at < bench.tokens; at += kChunkTokens) {
      const uint32_t count = std::min(kChunkTokens, bench.tokens - at);
      const TensorView view =
          Bfloat16View({halves.data(), count * row}, count, bench.kv_heads, bench.head_dim);
      if (absl::Status status = writer.Write(layer, at, view, view); !status.ok()) return status;
      measured->fill_bytes += 2 * view.bytes.size();
    }
  }
  const auto receipt = writer.Commit();
  measured->fill_seconds = Microseconds(SteadyClock::now() - began) / 1e6;
  return receipt.status();
}

absl::Status Attend(const BenchOptions& bench, const Policy& policy, Client* client,
                    const Sequence& sequence, std::mt19937* random, SteadyClock::time_point end,
                    Measured* measured) {
  const size_t row = size_t{bench.query_heads} * bench.head_dim;
  const std::vector<uint16_t> q = RandomHalves(row, random);
  AttendRow of_sequence;
  of_sequence.sequence = &sequence;
  of_sequence.position = bench.tokens - 1;
  AttendStep step;
  step.rows = {&of_sequence, 1};
  step.policy = policy;
  step.q = Bfloat16View({q.data(), q.size()}, 1, bench.query_heads, bench.head_dim);
  const auto began = SteadyClock::now();
  for (; measured->calls < bench.count; ++measured->calls) {
    const auto called = SteadyClock::now();
    if (called >= end) break;
    step.layer = measured->calls % bench.layers;
    const absl::StatusOr<AttendResult> result = client->Attend(step);
    if (!result.ok()) return result.status();
    if (!result->rows[0].status.ok()) return result->rows[0].status;
    measured->call.Add(Microseconds(SteadyClock::now() - called));
    measured->queue.Add(static_cast<double>(result->queue_ns) / 1000.0);
    measured->service.Add(static_cast<double>(result->service_ns) / 1000.0);
    measured->transport = result->transport;
    for (const GroupReport& group : result->rows[0].groups) {
      measured->tokens_read += group.tokens_read;
      measured->tokens_visible += bench.tokens;
    }
  }
  measured->attend_seconds = Microseconds(SteadyClock::now() - began) / 1e6;
  return absl::OkStatus();
}

absl::StatusOr<Measured> Measure(const GlobalOptions& options, const BenchOptions& bench) {
  const auto end = SteadyClock::now() + options.timeout;
  ClientOptions connect;
  connect.endpoint = options.endpoint;
  // A Unix socket has none.
  if (options.endpoint.rfind("unix:", 0) != 0) connect.tls = options.tls;
  connect.deadlines.connect = std::min(connect.deadlines.connect, options.timeout);
  auto client = Client::Connect(connect);
  if (!client.ok()) return client.status();
  const ModelDescription model = ModelFor(bench);
  if (auto known = (*client)->RegisterModel(model); !known.ok()) return known.status();
  auto sequence = (*client)->CreateSequence({.model = model.name});
  if (!sequence.ok()) return sequence.status();
  std::mt19937 random(kSeed);
  Measured measured;
  if (absl::Status status = Fill(bench, *sequence, &random, &measured); !status.ok()) return status;
  Policy policy;
  for (const auto& [name, selector] : kSelectors) {
    if (bench.policy == name) policy.selector = selector;
  }
  absl::Status status = Attend(bench, policy, client->get(), *sequence, &random, end, &measured);
  if (!status.ok()) return status;
  status = sequence->Close();
  if (!status.ok()) return status;
  return measured;
}

const char* NameOf(Transport transport) {
  switch (transport) {
    case Transport::kLane:
      return "lane";
    case Transport::kStream:
      return "stream";
    default:
      return "unary";
  }
}

}  // namespace

int RunBench(const GlobalOptions& options, const BenchOptions& bench) {
  absl::StatusOr<Measured> measured = Measure(options, bench);
  if (!measured.ok()) return Fail(options, measured.status());
  const double bytes_per_second =
      static_cast<double>(measured->fill_bytes) / std::max(measured->fill_seconds, 1e-9);
  const double calls_per_second = measured->calls / std::max(measured->attend_seconds, 1e-9);
  const Json json = {
      {"policy", bench.policy},
      {"transport", NameOf(measured->transport)},
      {"tokens", bench.tokens},
      {"fill", {{"bytes", measured->fill_bytes}, {"bytes_per_second", bytes_per_second}}},
      {"calls", measured->calls},
      {"calls_per_second", calls_per_second},
      {"tokens_read", measured->tokens_read},
      {"tokens_visible", measured->tokens_visible},
      {"call_us", ToJson(&measured->call)},
      {"queue_us", ToJson(&measured->queue)},
      {"service_us", ToJson(&measured->service)}};
  const std::string table =
      Table({{"filled", BytesText(measured->fill_bytes) + " at " +
                            BytesText(static_cast<uint64_t>(bytes_per_second)) + "/s"},
             {"attends", std::to_string(measured->calls) + " (" + bench.policy + ", " +
                             NameOf(measured->transport) + "), " + Number(calls_per_second) + "/s"},
             {"tokens read", ShareText(measured->tokens_read, measured->tokens_visible)}}) +
      "\n" +
      Table({{"MICROSECONDS", "P50", "P90", "P99", "MAX"},
             RowOf("call", &measured->call),
             RowOf("waiting in the server", &measured->queue),
             RowOf("working in the server", &measured->service)});
  Print(options, json, table);
  return measured->calls == bench.count ? kExitOk : kExitDeadline;
}

int Ping(const GlobalOptions& options, uint32_t count) {
  const std::unique_ptr<ServerCalls> calls = Connect(options);
  Times times;
  for (uint32_t i = 0; i < count; ++i) {
    const auto began = SteadyClock::now();
    const absl::StatusOr<Health> health = calls->CheckHealth("");
    if (!health.ok()) return Fail(options, health.status());
    // The first one also connects.
    if (i > 0 || count == 1) times.Add(Microseconds(SteadyClock::now() - began));
  }
  Print(options, {{"calls", count}, {"call_us", ToJson(&times)}},
        Table({{"MICROSECONDS", "P50", "P90", "P99", "MAX"}, RowOf("call", &times)}));
  return kExitOk;
}

}  // namespace kvservice::client
