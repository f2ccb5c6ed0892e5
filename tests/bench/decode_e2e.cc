// Decode steps through the service: a server in a process of its own, a client that sends q, k and
// v of one new token per sequence and layer and gets outputs and certificates back. The baseline is
// what the service has to beat: dense attention over the same keys in the caller's own process, on
// the same kind of device, with nothing sent anywhere. Calls go by the ways that --transport names;
// their tensors are in StepBuffers, which the ways other than shared memory copy. Making queries,
// keys and values and putting them there is not timed, on either side: a caller whose tensors are
// elsewhere pays one more copy of q, k and v.
//
// Times are those of one call (one layer of one step) as the caller sees it, of "_halves" those of
// two calls for half of the batch each, both under way at the same time: the median over steps of
// the mean over layers. Cases and the baseline come in another order every step. On a GPU that is
// not quite fair to the baseline: two processes take turns there, and it pays for the change every
// time (100 us); tests/bench/torch_sdpa.py alone on the same GPU is the one to compare with. Sizes
// are such that keys and values do not stay in the CPU's caches from one call to the next (134 MB
// and more), but for the smallest, whose calls show what the way there and back costs.
//
// Checks before measuring, at the prompt's last token: dense outputs against the local ones (the
// row's error is the normalised squared error), and for every certificate that the mass which local
// dense attention says was dropped lies under the bound (the error is the largest excess, as far as
// float32 log-sum-exps can tell; proofs are tested elsewhere).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/sketch.h"
#include "client/client.h"
#include "tests/bench/decode_data.h"
#include "tests/bench/server_process.h"
#include "tests/bench/workloads.h"
#include "wire/default_spin.h"

namespace kvservice::bench {
namespace {

constexpr char kWorkload[] = "decode_e2e";
constexpr double kOutputErrorMax = 1e-9;
// Of a difference of two float32 logarithms of sums.
constexpr double kMassErrorMax = 1e-5;
constexpr float kMassLimit = 0.05F;
constexpr double kFailureProbability = 1e-6;
constexpr uint32_t kAppendTokens = 1024;

// Dense attention over the prompts in this process.
class LocalDense {
 public:
  static absl::StatusOr<LocalDense> Make(DecodeData* data, Device* device) {
    LocalDense local(data, device);
    const KvLayout& layout = data->layout();
    const uint32_t blocks = BlockCount(data->prompt_tokens());
    std::vector<std::byte> k(kBlockTokens * data->token_bytes());
    std::vector<std::byte> v(k.size());
    for (uint32_t i = 0; i < data->layer_count() * data->batch(); ++i) {
      auto memory = device->Allocate(blocks * layout.slice_bytes());
      if (!memory.ok()) return memory.status();
      local.slices_.emplace_back();
      for (uint32_t block = 0; block < blocks; ++block) {
        const uint32_t first = block * kBlockTokens;
        const uint32_t count = std::min(kBlockTokens, data->prompt_tokens() - first);
        data->Tokens(i / data->batch(), i % data->batch(), first, count, k.data(), v.data());
        std::byte* slice = memory->data() + block * layout.slice_bytes();
        const AppendSlice append{
            .slice = slice, .token_count = count, .k = k.data(), .v = v.data()};
        device->Append(layout, {&append, 1});
        local.slices_.back().push_back(slice);
      }
      local.memory_.push_back(std::move(*memory));
    }
    return local;
  }

  // q: [batch][query_head_count][head_dim], of the prompts' last token.
  absl::Status Run(uint32_t layer, const std::vector<float>& q) {
    const KvLayout& layout = shape_.layout;
    const size_t floats = size_t{layout.query_head_count} * layout.head_dim;
    std::vector<AttendRow> rows(data_->batch());
    for (size_t b = 0; b < rows.size(); ++b) {
      AttendRow& row = rows[b];
      row.view = {.slices = slices_[layer * rows.size() + b],
                  .sketches = sketches_,
                  .length = data_->prompt_tokens()};
      row.position = row.view.length - 1;
      row.q = &q[b * floats];
      row.tables = tables_;
      row.out = &out[b * floats];
      row.lse = &lse[b * layout.query_head_count];
      row.certificates = &certificates_[b * layout.query_head_count];
      row.groups = &groups_[b * layout.kv_head_count];
    }
    device_->Attend(shape_, absl::MakeSpan(rows));
    for (const AttendRow& row : rows) {
      if (!row.status.ok()) return row.status;
    }
    return absl::OkStatus();
  }

  std::vector<float> out;  // [batch][query_head_count][head_dim]
  std::vector<float> lse;  // [batch][query_head_count]

 private:
  LocalDense(DecodeData* data, Device* device) : data_(data), device_(device) {
    shape_.layout = data->layout();
    shape_.scale = data->model().scale;
    const KvLayout& layout = shape_.layout;
    sketches_.assign(BlockCount(data->prompt_tokens()), nullptr);
    tables_.assign(layout.kv_head_count, IdentitySketchTable(layout.head_dim));
    lse.resize(size_t{data->batch()} * layout.query_head_count);
    out.resize(lse.size() * layout.head_dim);
    certificates_.resize(lse.size());
    groups_.resize(size_t{data->batch()} * layout.kv_head_count);
  }

  DecodeData* data_;
  Device* device_;
  LayerShape shape_;
  std::vector<DeviceMemory> memory_;
  std::vector<std::vector<const std::byte*>> slices_;  // [layer][sequence]
  std::vector<const std::byte*> sketches_;             // none: dense attention reads none
  std::vector<SketchTable> tables_;
  std::vector<HeadCertificate> certificates_;
  std::vector<GroupReport> groups_;
};

// The client's side.
class RemoteDecode {
 public:
  RemoteDecode(DecodeData* data, client::Client* client) : data_(data), client_(client) {}

  absl::Status Prefill() {
    const auto registered = client_->RegisterModel(data_->model());
    if (!registered.ok()) return registered.status();
    k_.resize(kAppendTokens * data_->token_bytes());
    v_.resize(k_.size());
    for (uint32_t b = 0; b < data_->batch(); ++b) {
      auto sequence = client_->CreateSequence({.model = data_->model().name});
      if (!sequence.ok()) return sequence.status();
      client::AppendWriter writer = sequence->Append();
      for (uint32_t first = 0; first < data_->prompt_tokens(); first += kAppendTokens) {
        const uint32_t count = std::min(kAppendTokens, data_->prompt_tokens() - first);
        for (uint32_t layer = 0; layer < data_->layer_count(); ++layer) {
          data_->Tokens(layer, b, first, count, k_.data(), v_.data());
          const absl::Status status = writer.Write(layer, first, View(k_, count), View(v_, count));
          if (!status.ok()) return status;
        }
      }
      const auto receipt = writer.Commit();
      if (!receipt.ok()) return receipt.status();
      prompts_.push_back(std::move(*sequence));
    }
    return absl::OkStatus();
  }

  // Forks the prompts for one more case, so that each appends tokens of its own. Returns its index.
  // `client` is borrowed and makes the case's calls: of `part_count` equal parts of the batch, at
  // the same time.
  absl::StatusOr<size_t> AddCase(client::Client* client, uint32_t part_count) {
    CaseCalls& made = cases_.emplace_back();
    made.client = client;
    made.buffers = BuffersOf(client, part_count);
    for (const client::Sequence& prompt : prompts_) {
      auto fork = prompt.Fork();
      if (!fork.ok()) return fork.status();
      const uint64_t generation = fork->generation();
      made.sequences.push_back(client->Adopt(fork->Detach(), generation));
    }
    return cases_.size() - 1;
  }

  // Tensors of a case's next call, where its caller has them before it calls. `position` and
  // queries, [batch][query_head_count][head_dim], as Attend's.
  void Prepare(size_t index, uint32_t layer, uint32_t position, const std::vector<float>& q) {
    const size_t bytes = data_->token_bytes();
    uint32_t b = 0;
    for (const client::StepBuffers& buffers : *cases_[index].buffers) {
      const size_t floats = buffers.q().size() / sizeof(float);
      const uint32_t rows = buffers.shape().token_count;
      std::memcpy(buffers.q().data(), &q[b / rows * floats], buffers.q().size());
      for (uint32_t i = 0; i < rows; ++i, ++b) {
        data_->Tokens(layer, b, position, 1, &buffers.k()[i * bytes], &buffers.v()[i * bytes]);
      }
    }
  }

  // One layer of one step of a case, prepared. Positions behind the prompt append the token there.
  // Results of its parts, in order.
  absl::StatusOr<std::vector<client::AttendResult>> Attend(size_t index,
                                                           const client::Policy& policy,
                                                           uint32_t layer, uint32_t position) {
    CaseCalls& calls = cases_[index];
    std::vector<client::AttendRow> rows(data_->batch());
    for (uint32_t b = 0; b < rows.size(); ++b) {
      rows[b].sequence = &calls.sequences[b];
      rows[b].position = position;
    }
    std::vector<client::AttendStep> steps;
    for (client::StepBuffers& buffers : *calls.buffers) {
      const size_t count = buffers.shape().token_count;
      steps.push_back({.layer = layer,
                       .rows = absl::MakeConstSpan(rows).subspan(steps.size() * count, count),
                       .policy = policy});
      steps.back().SetBuffers(&buffers, /*store=*/position >= data_->prompt_tokens());
    }
    std::vector<client::AttendResult> results;
    const auto take = [&](absl::StatusOr<client::AttendResult> result) {
      if (!result.ok()) return result.status();
      for (const client::AttendRowResult& row : result->rows) {
        if (!row.status.ok()) return row.status;
      }
      results.push_back(*std::move(result));
      return absl::OkStatus();
    };
    std::vector<client::PendingAttend> others;
    for (size_t i = 0; i + 1 < steps.size(); ++i) {
      others.push_back(calls.client->AttendAsync(steps[i]));
    }
    absl::StatusOr<client::AttendResult> last = calls.client->Attend(steps.back());
    for (client::PendingAttend& other : others) {
      const absl::Status status = take(other.Wait());
      if (!status.ok()) return status;
    }
    const absl::Status status = take(std::move(last));
    if (!status.ok()) return status;
    return results;
  }

  // Of a case's last call, [batch][query_head_count][head_dim].
  std::vector<float> Out(size_t index) const {
    std::vector<float> out;
    for (const client::StepBuffers& buffers : *cases_[index].buffers) {
      out.insert(out.end(), buffers.out().begin(), buffers.out().end());
    }
    return out;
  }

 private:
  // Cases of one client take turns with its buffers.
  std::vector<client::StepBuffers>* BuffersOf(client::Client* client, uint32_t part_count) {
    std::vector<client::StepBuffers>& buffers = buffers_[{client, part_count}];
    const KvLayout& layout = data_->layout();
    const client::StepShape shape{.token_count = data_->batch() / part_count,
                                  .query_head_count = layout.query_head_count,
                                  .kv_head_count = layout.kv_head_count,
                                  .head_dim = layout.head_dim};
    while (buffers.size() < part_count) buffers.push_back(client->NewStepBuffers(shape));
    return &buffers;
  }
  client::TensorView View(const std::vector<std::byte>& bytes, uint32_t tokens) const {
    return {.dtype = client::DType::kBfloat16,
            .token_count = tokens,
            .head_count = data_->layout().kv_head_count,
            .head_dim = data_->layout().head_dim,
            .bytes = absl::MakeConstSpan(bytes).first(tokens * data_->token_bytes())};
  }

  DecodeData* const data_;
  client::Client* const client_;
  std::vector<client::Sequence> prompts_;
  struct CaseCalls {
    client::Client* client = nullptr;
    std::vector<client::StepBuffers>* buffers = nullptr;  // [parts]
    std::vector<client::Sequence> sequences;              // [batch]
  };
  std::map<std::pair<client::Client*, uint32_t>, std::vector<client::StepBuffers>> buffers_;
  std::vector<CaseCalls> cases_;
  std::vector<std::byte> k_, v_;
};

struct Case {
  Case(std::string case_name, client::Selector selector, const DecodeData& data)
      : name(std::move(case_name)) {
    policy.selector = selector;
    if (!data.begins_at_first_layer()) policy.layers = std::vector<client::LayerOverride>();
  }

  std::string name;
  client::Client* client = nullptr;
  size_t sequences = 0;  // of RemoteDecode
  uint32_t part_count = 1;
  client::Policy policy;
  bool certifies = false;
  double error = 0.0;
  std::vector<double> step_seconds, call_seconds, queue_seconds, service_seconds;
  double tokens_read = 0.0;  // over all calls, sequences and KV heads
  double scans = 0.0;
  double groups = 0.0;
};

// True if the case is one of those that were asked for: "scan" is scan_512 and scan_512_halves.
bool IsAsked(const Case& made, const std::vector<std::string>& asked) {
  const auto is_named = [&made](const std::string& name) {
    absl::string_view rest = made.name;
    if (!absl::ConsumePrefix(&rest, name)) return false;
    absl::ConsumeSuffix(&rest, "_halves");
    return rest.empty() || (rest.size() > 1 && rest[0] == '_' && absl::ascii_isdigit(rest[1]));
  };
  return asked.empty() || std::any_of(asked.begin(), asked.end(), is_named);
}

std::vector<Case> MakeCases(const DecodeData& data, const std::vector<std::string>& asked) {
  std::vector<Case> cases;
  cases.emplace_back("dense", client::Selector::kDense, data);
  for (const bool samples : {true, false}) {
    Case& made = cases.emplace_back(samples ? "certified" : "certified_deterministic",
                                    client::Selector::kCertified, data);
    made.certifies = true;
    made.policy.max_dropped_mass = kMassLimit;
    made.policy.failure_probability = kFailureProbability;
    made.policy.guarantee =
        samples ? client::Guarantee::kConfidence : client::Guarantee::kDeterministic;
  }
  for (const auto& [name, selector] :
       {std::pair("scan_", client::Selector::kScan), std::pair("cpe_", client::Selector::kCpe)}) {
    Case& made = cases.emplace_back(absl::StrCat(name, data.list_tokens()), selector, data);
    made.policy.budget = client::Budget{.top_k_tokens = data.list_tokens()};
  }
  // Calls for half of the batch each, at the same time.
  const size_t whole_count = data.batch() % 2 == 0 ? cases.size() : 0;
  for (size_t i = 1; i < whole_count; ++i) {
    Case made = cases[i];
    made.name += "_halves";
    made.part_count = 2;
    cases.push_back(std::move(made));
  }
  std::erase_if(cases, [&asked](const Case& made) { return !IsAsked(made, asked); });
  return cases;
}

// Compares a case with local dense attention at the prompt's last token.
absl::Status Check(DecodeData* data, RemoteDecode* remote, LocalDense* local, uint32_t layer,
                   Case* measured) {
  const uint32_t position = data->prompt_tokens() - 1;
  const std::vector<float> q = data->Queries(layer, position);
  const absl::Status status = local->Run(layer, q);
  if (!status.ok()) return status;
  remote->Prepare(measured->sequences, layer, position, q);
  const auto result = remote->Attend(measured->sequences, measured->policy, layer, position);
  if (!result.ok()) return result.status();
  double difference = 0.0;
  double size = 0.0;
  const std::vector<float> out = remote->Out(measured->sequences);
  if (out.size() != local->out.size()) return absl::InternalError("outputs are missing");
  for (size_t i = 0; i < out.size(); ++i) {
    const double truth = local->out[i];
    difference += (static_cast<double>(out[i]) - truth) * (static_cast<double>(out[i]) - truth);
    size += truth * truth;
  }
  size_t head = 0;
  for (const client::AttendResult& part : *result) {
    for (const client::AttendRowResult& row : part.rows) {
      for (size_t h = 0; h < row.lse.size() && measured->certifies; ++h) {
        const double kept =
            static_cast<double>(row.lse[h]) - static_cast<double>(local->lse[head++]);
        const double bound = row.certificates[h].dropped_mass_upper.value;
        measured->error = std::max(measured->error, -std::expm1(kept) - bound);
        if (bound > kMassLimit) return absl::InternalError("the limit does not hold");
      }
    }
  }
  if (measured->error > kMassErrorMax) return absl::InternalError("a bound is violated");
  if (measured->policy.selector != client::Selector::kDense) return absl::OkStatus();
  measured->error = std::max(measured->error, difference / size);
  if (measured->error <= kOutputErrorMax) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("normalised squared error ", measured->error));
}

double Percentile(std::vector<double> samples, double share) {
  std::sort(samples.begin(), samples.end());
  return samples[static_cast<size_t>(share * static_cast<double>(samples.size() - 1))];
}

// Steps of all cases and of the baseline, in turns.
class Loop {
 public:
  Loop(DecodeData* data, RemoteDecode* remote, LocalDense* local)
      : data_(data), remote_(remote), local_(local) {}

  absl::Status Step(uint32_t position, std::vector<Case>* cases) {
    // Made beforehand: between two calls a model computes for less time than this takes.
    queries_.clear();
    for (size_t i = 0; i < (cases->size() + 1) * data_->layer_count(); ++i) {
      const auto layer = static_cast<uint32_t>(i % data_->layer_count());
      queries_.push_back(data_->Queries(layer, position));
    }
    // Whoever comes first after local attention finds the server's threads asleep and, on a GPU,
    // pays for its change of processes: another one every step.
    order_.resize(cases->size() + 1);
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::shuffle(order_.begin(), order_.end(), random_);
    for (const size_t which : order_) {
      const auto queries =
          absl::MakeConstSpan(queries_).subspan(which * data_->layer_count(), data_->layer_count());
      if (which == 0) {
        const absl::Status status = TakeLocal(queries);
        if (!status.ok()) return status;
        continue;
      }
      Case* const measured = &(*cases)[which - 1];
      const absl::Status status = Take(position, queries, measured);
      if (!status.ok()) {
        return absl::Status(status.code(), absl::StrCat(measured->name, ": ", status.message()));
      }
    }
    return absl::OkStatus();
  }

  std::vector<double> local_seconds;

 private:
  // queries: [layer_count][batch][query_head_count][head_dim]
  absl::Status TakeLocal(absl::Span<const std::vector<float>> queries) {
    double seconds = 0.0;
    for (uint32_t layer = 0; layer < data_->layer_count(); ++layer) {
      absl::Status status;
      seconds += Seconds([&] { status = local_->Run(layer, queries[layer]); });
      if (!status.ok()) return status;
    }
    local_seconds.push_back(seconds / data_->layer_count());
    return absl::OkStatus();
  }
  absl::Status Take(uint32_t position, absl::Span<const std::vector<float>> queries,
                    Case* measured) {
    double step_seconds = 0.0;
    for (uint32_t layer = 0; layer < data_->layer_count(); ++layer) {
      remote_->Prepare(measured->sequences, layer, position, queries[layer]);
      absl::StatusOr<std::vector<client::AttendResult>> results;
      const double seconds = Seconds([&] {
        results = remote_->Attend(measured->sequences, measured->policy, layer, position);
      });
      if (!results.ok()) return results.status();
      step_seconds += seconds;
      measured->call_seconds.push_back(seconds);
      for (const client::AttendResult& result : *results) Count(result, measured);
    }
    measured->step_seconds.push_back(step_seconds / data_->layer_count());
    return absl::OkStatus();
  }

  static void Count(const client::AttendResult& result, Case* measured) {
    measured->queue_seconds.push_back(static_cast<double>(result.queue_ns) * 1e-9);
    measured->service_seconds.push_back(static_cast<double>(result.service_ns) * 1e-9);
    for (const client::AttendRowResult& row : result.rows) {
      for (const client::GroupReport& group : row.groups) {
        measured->tokens_read += group.tokens_read;
        measured->scans += group.scanned ? 1.0 : 0.0;
        measured->groups += 1.0;
      }
    }
  }

  DecodeData* const data_;
  RemoteDecode* const remote_;
  LocalDense* const local_;
  std::mt19937_64 random_{1};
  std::vector<size_t> order_;                // 0 = local attention, then the cases
  std::vector<std::vector<float>> queries_;  // of a step: [1 + cases][layer_count], local first
};

void AddRows(const DecodeData& data, const std::vector<double>& local_seconds,
             const std::vector<Case>& cases, std::vector<Row>* rows) {
  const double local = Percentile(local_seconds, 0.5);
  const auto add = [&](const std::string& name, double value, const char* unit,
                       const char* baseline, double ratio, double error) {
    rows->push_back({.workload = kWorkload,
                     .case_name = absl::StrCat(data.name(), "_", name),
                     .value = value,
                     .unit = unit,
                     .baseline = baseline,
                     .ratio = ratio,
                     .error = error});
  };
  const auto add_time = [&](const std::string& name, double seconds, double error) {
    add(name, seconds * 1e6, "us", "local_dense", local / seconds, error);
  };
  add_time("local_dense", local, 0.0);
  for (const Case& measured : cases) {
    add_time(measured.name, Percentile(measured.step_seconds, 0.5), measured.error);
    add_time(measured.name + "_p99", Percentile(measured.call_seconds, 0.99), 0.0);
    // From when the message was seen to when the engine took the call, and from there to the
    // answer.
    add_time(measured.name + "_queued", Percentile(measured.queue_seconds, 0.5), 0.0);
    add_time(measured.name + "_in_server", Percentile(measured.service_seconds, 0.5), 0.0);
    const double tokens = measured.tokens_read / measured.groups;
    add(measured.name + "_tokens", tokens, "tokens", "length", tokens / data.prompt_tokens(), 0.0);
    const double scans = measured.scans / measured.groups;
    add(measured.name + "_scans", 100.0 * scans, "%", "every_call", scans, 0.0);
  }
}

client::Transport TransportNamed(const std::string& name) {
  if (name == "unary") return client::Transport::kUnary;
  if (name == "stream") return client::Transport::kStream;
  return name == "lane" ? client::Transport::kLane : client::Transport::kAuto;
}

absl::Status RunData(const BenchOptions& options, Device* device, DecodeData* data,
                     std::vector<Row>* rows) {
  auto local = LocalDense::Make(data, device);
  if (!local.ok()) return local.status();
  // Keys, values and sketches, and room for the tokens of the steps.
  const size_t case_count = MakeCases(*data, options.cases).size();
  if (case_count == 0) return absl::InvalidArgumentError("--cases names no case");
  // Of the first transport, of the second ...
  std::vector<Case> cases;
  for (size_t i = 0; i < options.transports.size(); ++i) {
    for (Case& made : MakeCases(*data, options.cases)) cases.push_back(std::move(made));
  }
  const uint64_t own_blocks = BlockCount(data->step_count() + 2 * kBlockTokens);
  const uint64_t slices = uint64_t{data->batch()} * data->layer_count() *
                          (BlockCount(data->prompt_tokens()) + cases.size() * own_blocks);
  std::vector<std::string> flags = {"--device=" + options.device,
                                    absl::StrCat("--threads=", options.thread_count)};
  const uint64_t row_bytes = slices * data->layout().slice_bytes();
  if (options.host_rows) {
    // What every step reads has room on the device too, and some is kept free there.
    const uint64_t sketch_bytes =
        slices * SketchLayout(data->layout().head_dim).slice_bytes(data->layout().kv_head_count);
    const uint64_t recent_bytes = uint64_t{data->batch()} * (cases.size() + 1) * 6 *
                                  data->layer_count() * data->layout().slice_bytes();
    flags.push_back(absl::StrCat("--pool-bytes=", sketch_bytes * 21 / 20 + recent_bytes));
    flags.push_back(absl::StrCat("--host-pool-bytes=", row_bytes));
  } else {
    flags.push_back(absl::StrCat("--pool-bytes=", row_bytes * 5 / 4));
  }
  const auto server = ServerProcess::Start(flags);
  if (!server.ok()) return server.status();
  client::ClientOptions client_options{.endpoint = (*server)->endpoint()};
  client_options.deadlines = {.connect = std::chrono::seconds(10),
                              .data = std::chrono::seconds(60),
                              .admin = std::chrono::seconds(600)};
  std::vector<std::unique_ptr<client::Client>> clients;
  for (size_t i = 0; i < options.transports.size(); ++i) {
    client_options.transport = TransportNamed(options.transports[i]);
    auto client = client::Client::Connect(client_options);
    if (!client.ok()) return client.status();
    clients.push_back(*std::move(client));
    for (size_t c = 0; c < case_count; ++c) {
      cases[i * case_count + c].client = clients.back().get();
      if (clients.size() > 1) cases[i * case_count + c].name += "_" + options.transports[i];
    }
  }
  RemoteDecode remote(data, clients.front().get());
  absl::Status status = remote.Prefill();
  if (!status.ok()) return status;

  for (Case& measured : cases) {
    const auto sequences = remote.AddCase(measured.client, measured.part_count);
    if (!sequences.ok()) return sequences.status();
    measured.sequences = *sequences;
    for (uint32_t layer = 0; layer < data->layer_count(); ++layer) {
      status = Check(data, &remote, &*local, layer, &measured);
      if (!status.ok()) {
        return absl::Status(status.code(),
                            absl::StrCat(measured.name, ", layer ", layer, ": ", status.message()));
      }
    }
  }
  Loop loop(data, &remote, &*local);
  for (uint32_t i = 0; i < data->step_count(); ++i) {
    status = loop.Step(data->prompt_tokens() + i, &cases);
    if (!status.ok()) return status;
  }
  AddRows(*data, loop.local_seconds, cases, rows);
  return absl::OkStatus();
}

}  // namespace

absl::Status RunDecodeE2e(const BenchOptions& options, std::vector<Row>* rows) {
  auto device = NewDevice(options.device,
                          {.thread_count = options.thread_count, .spin_us = wire::DefaultSpinUs()});
  if (!device.ok()) return device.status();
  const auto run = [&](DecodeData* data) {
    const absl::Status status = RunData(options, device->get(), data, rows);
    return absl::Status(status.code(), absl::StrCat(data->name(), ": ", status.message()));
  };
  std::vector<uint32_t> batches = options.trace_batches;
  if (batches.empty()) batches = {1, 8};
  if (options.trace_batches.empty() && options.device == "cuda") batches.push_back(32);
  for (const std::string& path : options.traces) {
    for (const uint32_t batch : batches) {
      auto data = MakeTraceData(path, batch, options.quick ? 1 : 63);
      if (!data.ok()) return data.status();
      const absl::Status status = run(data->get());
      if (!status.ok()) return status;
    }
  }
  std::vector<std::pair<uint32_t, uint32_t>> sizes = {{1, 64}, {1, 32768}, {2, 32768}};
  if (options.device == "cuda") sizes = {{1, 64}, {1, 32768}, {1, 131072}, {8, 32768}, {8, 131072}};
  if (options.quick) sizes = {{1, 64}, {2, 3000}};
  if (!options.sizes.empty()) {
    sizes.clear();
    for (const std::string& text : options.sizes) sizes.push_back(*ParseSize(text));
  }
  for (const auto& [batch, prompt_tokens] : sizes) {
    const auto data = MakePlantedData(batch, prompt_tokens, options.quick ? 2 : options.step_count,
                                      options.list_tokens);
    const absl::Status status = run(data.get());
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace kvservice::bench
