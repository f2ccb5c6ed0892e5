// Bulk prefill: keys and values of many tokens from a client to a server process, by the lane and
// by a gRPC stream, as bytes of keys and values per second, against what one CPU copies in memory
// in the same run (the ratio is the share of that). Ways take turns.
//
// "open" appends 63 tokens of every layer to each of many sequences, so that no slice becomes full
// and nothing is sealed: what moving and storing costs. "sealed" appends a long prompt to one
// sequence, with the sketches that sealing makes. "engine" has the same calls made to an engine in
// the caller's own process: what is left of the time when nothing is sent anywhere. Every sequence
// and layer has keys and values of its own, as a case is larger than a cache and so is what memcpy
// copies. Making sequences and forgetting them is not timed.
//
// Checks: the server's count of tokens after every round.

#include <cstring>
#include <future>
#include <memory>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "kvservice/clock.h"
#include "kvservice/engine.h"
#include "kvservice/random.h"
#include "tests/bench/server_process.h"
#include "tests/bench/workloads.h"

namespace kvservice::bench {
namespace {

constexpr char kWorkload[] = "append";
constexpr uint32_t kKvHeads = 8;
constexpr uint32_t kQueryHeads = 32;
constexpr uint32_t kHeadDim = 128;
constexpr size_t kTokenBytes = size_t{2} * kKvHeads * kHeadDim * sizeof(uint16_t);

// Enough to touch all of a pool's pages: those of a server that has run for a while are there.
constexpr int kWarmUpRounds = 2;

struct Case {
  const char* name;
  uint32_t sequence_count;
  uint32_t layer_count;
  uint32_t token_count;
  size_t bytes() const { return sequence_count * layer_count * token_count * kTokenBytes; }
  std::string model() const { return absl::StrCat(name, "_", layer_count, "_layers"); }
};

// Keys and values of a case, of every sequence and layer its own: a prefill's are not in a cache.
class Tokens {
 public:
  explicit Tokens(const Case& bench_case)
      : layer_count_(bench_case.layer_count),
        layer_elements_(bench_case.token_count * kTokenBytes / 4),
        k_(bench_case.bytes() / 4),
        v_(k_.size()) {
    // Finite bfloat16 around 1.
    for (size_t i = 0; i < k_.size(); ++i) {
      k_[i] = static_cast<uint16_t>(0x3f00 + i * 7 % 251);
      v_[i] = static_cast<uint16_t>(0x3f00 + i * 11 % 241);
    }
  }
  absl::Span<const uint16_t> k(size_t sequence, uint32_t layer) const {
    return Of(k_, sequence, layer);
  }
  absl::Span<const uint16_t> v(size_t sequence, uint32_t layer) const {
    return Of(v_, sequence, layer);
  }

 private:
  absl::Span<const uint16_t> Of(const std::vector<uint16_t>& of_all, size_t sequence,
                                uint32_t layer) const {
    return absl::MakeConstSpan(of_all).subspan((sequence * layer_count_ + layer) * layer_elements_,
                                               layer_elements_);
  }

  const uint32_t layer_count_;
  const size_t layer_elements_;
  std::vector<uint16_t> k_, v_;
};

// What appends a case's tokens once, to new sequences.
class Appender {
 public:
  virtual ~Appender() = default;
  // Makes the sequences.
  virtual absl::Status Begin(const Case& bench_case) = 0;
  virtual absl::Status Append(const Case& bench_case, const Tokens& tokens) = 0;
  // Forgets them.
  virtual absl::Status End(const Case& bench_case) = 0;
};

class ClientAppender final : public Appender {
 public:
  static absl::StatusOr<std::unique_ptr<Appender>> Make(const std::string& endpoint,
                                                        client::Transport transport,
                                                        absl::Span<const Case> cases) {
    client::ClientOptions options;
    options.endpoint = endpoint;
    options.transport = transport;
    options.deadlines.data = std::chrono::seconds(60);
    auto client = client::Client::Connect(options);
    if (!client.ok()) return client.status();
    for (const Case& bench_case : cases) {
      client::ModelDescription model;
      model.name = bench_case.model();
      model.layer_count = bench_case.layer_count;
      model.query_head_count = kQueryHeads;
      model.kv_head_count = kKvHeads;
      model.head_dim = kHeadDim;
      model.scale = 0.1F;
      const auto registered = (*client)->RegisterModel(model);
      if (!registered.ok()) return registered.status();
    }
    return std::unique_ptr<Appender>(new ClientAppender(*std::move(client), transport));
  }

  absl::Status Begin(const Case& bench_case) override {
    for (uint32_t s = 0; s < bench_case.sequence_count; ++s) {
      auto sequence = client_->CreateSequence({.model = bench_case.model()});
      if (!sequence.ok()) return sequence.status();
      sequences_.push_back(*std::move(sequence));
    }
    return absl::OkStatus();
  }

  absl::Status Append(const Case& bench_case, const Tokens& tokens) override {
    const uint32_t count = bench_case.token_count;
    for (size_t s = 0; s < sequences_.size(); ++s) {
      client::AppendWriter writer = sequences_[s].Append();
      for (uint32_t layer = 0; layer < bench_case.layer_count; ++layer) {
        const auto k = client::Bfloat16View(tokens.k(s, layer), count, kKvHeads, kHeadDim);
        const auto v = client::Bfloat16View(tokens.v(s, layer), count, kKvHeads, kHeadDim);
        const absl::Status written = writer.Write(layer, 0, k, v);
        if (!written.ok()) return written;
      }
      const auto receipt = writer.Commit();
      if (!receipt.ok()) return receipt.status();
      if (receipt->length_tokens != count) return absl::InternalError("tokens are missing");
      if (receipt->transport != transport_) return absl::InternalError("it went another way");
    }
    return absl::OkStatus();
  }

  absl::Status End(const Case& /*bench_case*/) override {
    for (client::Sequence& sequence : sequences_) {
      const absl::Status closed = sequence.Close();
      if (!closed.ok()) return closed;
    }
    sequences_.clear();
    return absl::OkStatus();
  }

 private:
  ClientAppender(std::unique_ptr<client::Client> client, client::Transport transport)
      : client_(std::move(client)), transport_(transport) {}

  const std::unique_ptr<client::Client> client_;
  const client::Transport transport_;
  std::vector<client::Sequence> sequences_;
};

class EngineAppender final : public Appender {
 public:
  static absl::StatusOr<std::unique_ptr<Appender>> Make(const BenchOptions& options,
                                                        absl::Span<const Case> cases) {
    auto device = NewDevice(options.device, {.thread_count = 1});
    if (!device.ok()) return device.status();
    EngineOptions engine_options;
    engine_options.pool_bytes = size_t{512} << 20;
    auto engine = NewEngine(engine_options, *std::move(device), SystemClock(), SystemRandom());
    if (!engine.ok()) return engine.status();
    for (const Case& bench_case : cases) {
      ModelSpec model;
      model.name = bench_case.model();
      model.layer_count = bench_case.layer_count;
      model.layout = {.query_head_count = kQueryHeads,
                      .kv_head_count = kKvHeads,
                      .head_dim = kHeadDim,
                      .dtype = DType::kBfloat16};
      model.scale = 0.1F;
      const auto registered = (*engine)->RegisterModel(model);
      if (!registered.ok()) return registered.status();
    }
    return std::unique_ptr<Appender>(new EngineAppender(*std::move(engine)));
  }

  absl::Status Begin(const Case& bench_case) override {
    for (uint32_t s = 0; s < bench_case.sequence_count; ++s) {
      const auto created = Await<SequenceInfo>([&](auto done) {
        CreateOptions asked;
        asked.model = bench_case.model();
        engine_->Create("", std::move(asked), std::move(done));
      });
      if (!created.ok()) return created.status();
      sequences_.push_back(created->id);
    }
    return absl::OkStatus();
  }

  absl::Status Append(const Case& bench_case, const Tokens& tokens) override {
    for (size_t s = 0; s < sequences_.size(); ++s) {
      for (uint32_t layer = 0; layer < bench_case.layer_count; ++layer) {
        const absl::Status appended = AppendLayer(s, layer, bench_case, tokens);
        if (!appended.ok()) return appended;
      }
    }
    return absl::OkStatus();
  }

  absl::Status End(const Case& bench_case) override {
    for (const SequenceId& id : sequences_) {
      const auto dropped =
          Await<SequenceInfo>([&](auto done) { engine_->Drop("", id, std::move(done)); });
      if (!dropped.ok()) return dropped.status();
      if (dropped->length != bench_case.token_count) {
        return absl::InternalError("tokens are missing");
      }
    }
    sequences_.clear();
    return absl::OkStatus();
  }

 private:
  // Of the lane's messages.
  static constexpr uint32_t kChunkTokens = 64;

  explicit EngineAppender(std::unique_ptr<Engine> engine) : engine_(std::move(engine)) {}

  template <typename T, typename Start>
  static absl::StatusOr<T> Await(Start start) {
    std::promise<absl::StatusOr<T>> promise;
    start(Done<T>([&](absl::StatusOr<T> result) { promise.set_value(std::move(result)); }));
    return promise.get_future().get();
  }

  absl::Status AppendLayer(size_t sequence, uint32_t layer, const Case& bench_case,
                           const Tokens& tokens) {
    for (uint32_t begin = 0; begin < bench_case.token_count; begin += kChunkTokens) {
      const uint32_t count = std::min(kChunkTokens, bench_case.token_count - begin);
      const std::vector<int64_t> shape = {count, kKvHeads, kHeadDim};
      const auto view = [&](absl::Span<const uint16_t> bits, const char* field) {
        const auto* const data = reinterpret_cast<const std::byte*>(bits.data());
        return TensorView{.dtype = DType::kBfloat16,
                          .shape = shape,
                          .bytes = {data + begin * kTokenBytes / 2, count * kTokenBytes / 2},
                          .field = field};
      };
      const auto appended = Await<AppendResult>([&](auto done) {
        engine_->Append({.tenant = {},
                         .id = sequences_[sequence],
                         .generation = 1,
                         .layer = layer,
                         .position = begin,
                         .k = view(tokens.k(sequence, layer), "k"),
                         .v = view(tokens.v(sequence, layer), "v")},
                        std::move(done));
      });
      if (!appended.ok()) return appended.status();
    }
    return absl::OkStatus();
  }

  const std::unique_ptr<Engine> engine_;
  std::vector<SequenceId> sequences_;
};

// As large as a case, so that it does not stay in a cache either.
double CopySeconds(size_t bytes, std::vector<std::byte>* from, std::vector<std::byte>* to) {
  from->resize(bytes, std::byte{1});
  to->resize(bytes, std::byte{2});
  return Seconds([&] { std::memcpy(to->data(), from->data(), bytes); });
}

}  // namespace

absl::Status RunAppend(const BenchOptions& options, std::vector<Row>* rows) {
  const std::vector<Case> cases = {{.name = "open",
                                    .sequence_count = options.quick ? 1U : 4U,
                                    .layer_count = 128,
                                    .token_count = 63},
                                   {.name = "sealed",
                                    .sequence_count = 1,
                                    .layer_count = 8,
                                    .token_count = options.quick ? 130U : 4096U}};
  const int round_count = options.quick ? 1 : 9;
  auto server = ServerProcess::Start({"--device=cpu", "--threads=1", "--pool-bytes=512MiB"});
  if (!server.ok()) return server.status();
  using Make = std::pair<const char*, absl::StatusOr<std::unique_ptr<Appender>>>;
  std::array<Make, 3> ways = {
      Make{"lane", ClientAppender::Make((*server)->endpoint(), client::Transport::kLane, cases)},
      Make{"stream",
           ClientAppender::Make((*server)->endpoint(), client::Transport::kStream, cases)},
      Make{"engine", EngineAppender::Make(options, cases)}};
  for (const Make& way : ways) {
    if (!way.second.ok()) return way.second.status();
  }
  std::vector<std::byte> from, to;
  for (const Case& bench_case : cases) {
    const Tokens tokens(bench_case);
    std::vector<double> copies;
    std::array<std::vector<double>, ways.size()> times;
    for (int round = -kWarmUpRounds; round < round_count; ++round) {
      if (round == 0) {
        copies.clear();
        for (std::vector<double>& of_way : times) of_way.clear();
      }
      copies.push_back(CopySeconds(bench_case.bytes(), &from, &to));
      for (size_t i = 0; i < ways.size(); ++i) {
        Appender& way = **ways[i].second;
        absl::Status status = way.Begin(bench_case);
        if (!status.ok()) return status;
        times[i].push_back(Seconds([&] { status = way.Append(bench_case, tokens); }));
        if (status.ok()) status = way.End(bench_case);
        if (!status.ok()) return status;
      }
    }
    const double copy_seconds = Median(&copies);
    const auto report = [&](const char* name, double seconds) {
      rows->push_back({.workload = kWorkload,
                       .case_name = absl::StrCat(bench_case.name, "_", name),
                       .value = static_cast<double>(bench_case.bytes()) / seconds * 1e-6,
                       .unit = "MB/s",
                       .baseline = "copy_bandwidth",
                       .ratio = copy_seconds / seconds});
    };
    report("memcpy", copy_seconds);
    for (size_t i = 0; i < ways.size(); ++i) report(ways[i].first, Median(&times[i]));
  }
  return absl::OkStatus();
}

}  // namespace kvservice::bench
