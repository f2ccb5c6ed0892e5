// What two workers get done together, against one: each has a client, sequences and a thread of its
// own, and calls as fast as answers come. Ratios are times what one worker does by the same way.
//
// "64KiB": calls with 64 KiB there and back and next to no work (rpc_caller.h), by every way.
// "4x32768": decode steps of one layer of four sequences of 32k planted tokens (decode_data.h), by
// the fastest way, dense and certified; one worker's sequences are its own. "_at_work" is the share
// of one worker's time in which the server computes for it: a second worker can fill what is left,
// and no more unless a call leaves CPUs idle.

#include <poll.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/bench/decode_data.h"
#include "tests/bench/rpc_caller.h"
#include "tests/bench/server_process.h"
#include "tests/bench/workloads.h"

namespace kvservice::bench {
namespace {

constexpr char kWorkload[] = "rpc_throughput";
constexpr size_t kWorkersMax = 2;
constexpr size_t kPayloadBytes = 64 << 10;
constexpr uint32_t kAppendTokens = 1024;

// One call of one worker.
using WorkerCall = std::function<absl::Status(size_t worker)>;

// Calls per second of workers that call for so long.
absl::StatusOr<double> Rate(size_t worker_count, std::chrono::milliseconds time,
                            const WorkerCall& call) {
  std::atomic<uint64_t> count{0};
  std::vector<absl::Status> statuses(worker_count);
  std::barrier start(static_cast<std::ptrdiff_t>(worker_count) + 1);
  std::vector<std::thread> threads;
  std::atomic<bool> stop{false};
  threads.reserve(worker_count);
  for (size_t worker = 0; worker < worker_count; ++worker) {
    threads.emplace_back([&, worker] {
      start.arrive_and_wait();
      while (!stop && statuses[worker].ok()) {
        statuses[worker] = call(worker);
        ++count;
      }
    });
  }
  start.arrive_and_wait();
  const auto begin = std::chrono::steady_clock::now();
  poll(nullptr, 0, static_cast<int>(time.count()));
  stop = true;
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return static_cast<double>(count) / taken.count();
}

absl::Status Measure(const std::string& name, const BenchOptions& options, const WorkerCall& call,
                     std::vector<Row>* rows) {
  const std::chrono::milliseconds time(options.quick ? 20 : 700);
  const int round_count = options.quick ? 1 : 7;
  std::array<std::vector<double>, kWorkersMax> rates;
  for (int round = 0; round < round_count; ++round) {
    for (size_t count = 1; count <= kWorkersMax; ++count) {
      const auto rate = Rate(count, time, call);
      if (!rate.ok()) return rate.status();
      rates[count - 1].push_back(*rate);
    }
  }
  const double one = Median(rates.data());
  for (size_t count = 1; count <= kWorkersMax; ++count) {
    const double rate = Median(&rates[count - 1]);
    rows->push_back(
        {.workload = kWorkload,
         .case_name = absl::StrCat(name, "_", count, count > 1 ? "_workers" : "_worker"),
         .value = rate,
         .unit = "1/s",
         .baseline = "one_worker",
         .ratio = rate / one});
  }
  return absl::OkStatus();
}

absl::Status RunSmall(const BenchOptions& options, std::vector<Row>* rows) {
  auto server = ServerProcess::Start({"--device=cpu", "--threads=1", "--pool-bytes=64MiB"});
  if (!server.ok()) return server.status();
  for (const auto& [name, transport] : {std::pair("unary", client::Transport::kUnary),
                                        std::pair("stream", client::Transport::kStream),
                                        std::pair("lane", client::Transport::kLane)}) {
    client::ClientOptions client_options;
    client_options.endpoint = (*server)->endpoint();
    client_options.transport = transport;
    client_options.deadlines.data = std::chrono::seconds(60);
    std::vector<std::unique_ptr<RpcCaller>> callers;
    for (size_t i = 0; i < kWorkersMax; ++i) {
      auto caller = RpcCaller::Make(client_options, kPayloadBytes, false);
      if (!caller.ok()) return caller.status();
      callers.push_back(*std::move(caller));
    }
    const absl::Status status = Measure(
        absl::StrCat("64KiB_", name), options,
        [&](size_t worker) { return callers[worker]->Call(); }, rows);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

// A worker with sequences of its own.
class Decoder {
 public:
  static absl::StatusOr<std::unique_ptr<Decoder>> Make(const std::string& endpoint, uint32_t batch,
                                                       uint32_t prompt_tokens) {
    client::ClientOptions options;
    options.endpoint = endpoint;
    options.deadlines.data = std::chrono::seconds(60);
    options.deadlines.admin = std::chrono::seconds(600);
    auto client = client::Client::Connect(options);
    if (!client.ok()) return client.status();
    std::unique_ptr<Decoder> decoder(
        new Decoder(*std::move(client), MakePlantedData(batch, prompt_tokens, 0)));
    const absl::Status prepared = decoder->Prepare();
    if (!prepared.ok()) return prepared;
    return decoder;
  }

  // Of all calls so far.
  uint64_t service_ns() const { return service_ns_; }

  // The prompts' last tokens again, so that nothing grows while others are measured.
  absl::Status Call(const client::Policy& policy) {
    client::AttendStep step{.layer = 0, .rows = rows_, .policy = policy};
    const KvLayout& layout = data_->layout();
    step.q = client::Float32View(q_, data_->batch(), layout.query_head_count, layout.head_dim);
    const auto result = client_->Attend(step);
    if (!result.ok()) return result.status();
    service_ns_ += result->service_ns;
    for (const client::AttendRowResult& row : result->rows) {
      if (!row.status.ok()) return row.status;
    }
    return absl::OkStatus();
  }

 private:
  Decoder(std::unique_ptr<client::Client> client, std::unique_ptr<DecodeData> data)
      : client_(std::move(client)), data_(std::move(data)) {}

  absl::Status Prepare() {
    const auto registered = client_->RegisterModel(data_->model());
    if (!registered.ok()) return registered.status();
    std::vector<std::byte> k(kAppendTokens * data_->token_bytes());
    std::vector<std::byte> v(k.size());
    for (uint32_t b = 0; b < data_->batch(); ++b) {
      auto sequence = client_->CreateSequence({.model = data_->model().name});
      if (!sequence.ok()) return sequence.status();
      client::AppendWriter writer = sequence->Append();
      for (uint32_t first = 0; first < data_->prompt_tokens(); first += kAppendTokens) {
        const uint32_t count = std::min(kAppendTokens, data_->prompt_tokens() - first);
        data_->Tokens(0, b, first, count, k.data(), v.data());
        const absl::Status status = writer.Write(0, first, View(k, count), View(v, count));
        if (!status.ok()) return status;
      }
      const auto receipt = writer.Commit();
      if (!receipt.ok()) return receipt.status();
      sequences_.push_back(*std::move(sequence));
    }
    const uint32_t position = data_->prompt_tokens() - 1;
    for (const client::Sequence& sequence : sequences_) {
      rows_.push_back({.sequence = &sequence, .position = position});
    }
    q_ = data_->Queries(0, position);
    return absl::OkStatus();
  }

  client::TensorView View(const std::vector<std::byte>& bytes, uint32_t tokens) const {
    return {.dtype = client::DType::kBfloat16,
            .token_count = tokens,
            .head_count = data_->layout().kv_head_count,
            .head_dim = data_->layout().head_dim,
            .bytes = absl::MakeConstSpan(bytes).first(tokens * data_->token_bytes())};
  }

  const std::unique_ptr<client::Client> client_;
  const std::unique_ptr<DecodeData> data_;
  std::vector<client::Sequence> sequences_;
  std::vector<client::AttendRow> rows_;
  std::vector<float> q_;
  uint64_t service_ns_ = 0;
};

absl::Status MeasureWork(const std::string& name, const BenchOptions& options,
                         const client::Policy& policy, Decoder* decoder, std::vector<Row>* rows) {
  const int call_count = options.quick ? 2 : 25;
  const uint64_t before_ns = decoder->service_ns();
  absl::Status status;
  const double seconds = Seconds([&] {
    for (int i = 0; i < call_count && status.ok(); ++i) status = decoder->Call(policy);
  });
  if (!status.ok()) return status;
  const double share = static_cast<double>(decoder->service_ns() - before_ns) * 1e-9 / seconds;
  rows->push_back({.workload = kWorkload,
                   .case_name = name + "_at_work",
                   .value = 100.0 * share,
                   .unit = "%",
                   .baseline = "one_worker",
                   .ratio = share});
  return absl::OkStatus();
}

absl::Status RunDecode(const BenchOptions& options, std::vector<Row>* rows) {
  const uint32_t batch = options.quick ? 2 : 4;
  const uint32_t tokens = options.quick ? 500 : 32768;
  auto server = ServerProcess::Start(
      {"--device=" + options.device, absl::StrCat("--threads=", options.thread_count),
       options.quick ? "--pool-bytes=64MiB" : "--pool-bytes=1400MiB"});
  if (!server.ok()) return server.status();
  std::vector<std::unique_ptr<Decoder>> decoders;
  for (size_t i = 0; i < kWorkersMax; ++i) {
    auto decoder = Decoder::Make((*server)->endpoint(), batch, tokens);
    if (!decoder.ok()) return decoder.status();
    decoders.push_back(*std::move(decoder));
  }
  for (const auto& [name, selector] : {std::pair("dense", client::Selector::kDense),
                                       std::pair("certified", client::Selector::kCertified)}) {
    client::Policy policy;
    policy.selector = selector;
    policy.layers = std::vector<client::LayerOverride>();
    if (selector == client::Selector::kCertified) {
      policy.max_dropped_mass = 0.05F;
      policy.guarantee = client::Guarantee::kDeterministic;
    }
    const std::string case_name = absl::StrCat(batch, "x", tokens, "_", name);
    absl::Status status = Measure(
        case_name, options, [&](size_t worker) { return decoders[worker]->Call(policy); }, rows);
    if (status.ok()) status = MeasureWork(case_name, options, policy, decoders[0].get(), rows);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RunRpcThroughput(const BenchOptions& options, std::vector<Row>* rows) {
  const absl::Status status = RunSmall(options, rows);
  return status.ok() ? RunDecode(options, rows) : status;
}

}  // namespace kvservice::bench
