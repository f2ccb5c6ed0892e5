#include "tests/stress/load.h"

#include <grpcpp/grpcpp.h>
#include <poll.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <mutex>
#include <random>
#include <utility>

#include "client/client.h"
#include "tests/kvservice/words.h"

namespace kvservice::testing {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kLoadModel[] = "loaded";
constexpr uint32_t kAppendTokens = 1024;
constexpr KvLayout kLayout = {
    .query_head_count = 4, .kv_head_count = 2, .head_dim = 64, .dtype = DType::kBfloat16};
constexpr std::chrono::seconds kDeadline{60};

absl::Status Register(const std::string& endpoint) {
  client::ClientOptions options;
  options.endpoint = endpoint;
  const auto client = client::Client::Connect(options);
  if (!client.ok()) return client.status();
  client::ModelDescription model;
  model.name = kLoadModel;
  model.layer_count = 1;
  model.query_head_count = kLayout.query_head_count;
  model.kv_head_count = kLayout.kv_head_count;
  model.head_dim = kLayout.head_dim;
  model.scale = 0.125F;
  return (*client)->RegisterModel(model).status();
}

client::TensorView View(const std::vector<std::byte>& bytes, uint32_t token_count) {
  return {.dtype = client::DType::kBfloat16,
          .token_count = token_count,
          .head_count = kLayout.kv_head_count,
          .head_dim = kLayout.head_dim,
          .bytes = bytes};
}

// The same rows over and over: what they are is of no interest.
absl::Status Fill(const client::Sequence& sequence, uint32_t token_count) {
  const Words words = Counting(1, kAppendTokens);
  const std::vector<std::byte> k = PartBytes(kLayout, kLayout.dtype, Part::kKey, 0, words);
  const std::vector<std::byte> v = PartBytes(kLayout, kLayout.dtype, Part::kValue, 0, words);
  client::AppendWriter writer = sequence.Append(client::Durability::kMemory);
  for (uint32_t position = 0; position < token_count; position += kAppendTokens) {
    const absl::Status status =
        writer.Write(0, position, View(k, kAppendTokens), View(v, kAppendTokens));
    if (!status.ok()) return status;
  }
  return writer.Commit().status();
}

}  // namespace

void Idle(double seconds) {
  timespec time{};
  time.tv_sec = static_cast<time_t>(seconds);
  time.tv_nsec = static_cast<int64_t>((seconds - std::floor(seconds)) * 1e9);
  ppoll(nullptr, 0, &time, nullptr);
}

double LoadResult::percentile(double share) const {
  if (latencies_ms.empty()) return 0.0;
  const auto at = static_cast<size_t>(share * static_cast<double>(latencies_ms.size()));
  return latencies_ms[std::min(at, latencies_ms.size() - 1)];
}

// ---- Calls ----

struct Tenant::Flight {
  grpc::ClientContext context;
  v1::AttendResponse response;
  Clock::time_point due;
};

// Calls under way and what became of them. Thread-safe.
class Tenant::Flights {
 public:
  explicit Flights(Tenant* tenant) : tenant_(tenant) {}

  void Send(Clock::time_point due) {
    auto flight = std::make_shared<Flight>();
    flight->due = due;
    flight->context.set_deadline(std::chrono::system_clock::now() + kDeadline);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++result_.offered;
      ++outstanding_;
    }
    tenant_->stub_->async()->Attend(
        &flight->context, &tenant_->request_, &flight->response,
        [this, flight](const grpc::Status& status) { Take(*flight, status); });
  }
  // Until there are at most so many.
  void WaitFor(uint32_t outstanding) {
    std::unique_lock<std::mutex> lock(mutex_);
    landed_.wait(lock, [&] { return outstanding_ <= outstanding; });
  }
  LoadResult Finish(double seconds) {
    WaitFor(0);
    const std::lock_guard<std::mutex> lock(mutex_);
    result_.seconds = seconds;
    std::sort(result_.latencies_ms.begin(), result_.latencies_ms.end());
    return std::move(result_);
  }

 private:
  void Take(const Flight& flight, const grpc::Status& status) {
    const std::chrono::duration<double, std::milli> took = Clock::now() - flight.due;
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool is_good = status.ok() && flight.response.results_size() == 1 &&
                         flight.response.results(0).code() == 0;
    if (is_good) {
      ++result_.good;
      result_.latencies_ms.push_back(took.count());
    } else if (ErrorOf(status).reason == "OVERLOADED") {
      ++result_.shed;
    } else if (++result_.failed == 1) {
      result_.first_failure =
          status.ok() ? RowErrorText(flight.response.results(0)) : ErrorText(status);
    }
    --outstanding_;
    landed_.notify_all();
  }

  Tenant* const tenant_;
  std::mutex mutex_;
  std::condition_variable landed_;
  // Guarded by mutex_.
  LoadResult result_;
  uint32_t outstanding_ = 0;
};

absl::StatusOr<std::unique_ptr<Tenant>> Tenant::Make(const std::string& endpoint,
                                                     uint32_t token_count) {
  client::ClientOptions options;
  options.endpoint = endpoint;
  const auto client = client::Client::Connect(options);
  if (!client.ok()) return client.status();
  client::SequenceOptions asked;
  asked.model = kLoadModel;
  auto sequence = (*client)->CreateSequence(asked);
  if (!sequence.ok()) return sequence.status();
  const absl::Status filled = Fill(*sequence, token_count);
  if (!filled.ok()) return filled;

  auto tenant = std::make_unique<Tenant>();
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const std::shared_ptr<grpc::Channel> channel =
      grpc::CreateCustomChannel(endpoint, grpc::InsecureChannelCredentials(), arguments);
  // Until the process ends: with the last channel that calls back, gRPC (1.51) ends the threads for
  // that, and now and then two of them free their queue.
  [[maybe_unused]] static const auto* const kFirst = new std::shared_ptr<grpc::Channel>(channel);
  tenant->stub_ = v1::AttentionService::NewStub(channel);
  ModelSpec model = SmallModel(1);
  model.layout = kLayout;
  v1::SequenceHandle handle;
  handle.set_generation(sequence->generation());
  handle.set_id(sequence->Detach());
  tenant->request_ = MakeAttend(model, handle, 0, token_count - 1, {kAppendTokens});
  // Only reads.
  tenant->request_.clear_k();
  tenant->request_.clear_v();
  return tenant;
}

LoadResult Tenant::RunOpen(double calls_per_second, double seconds, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::exponential_distribution<double> gap(calls_per_second);
  Flights flights(this);
  const Clock::time_point begin = Clock::now();
  for (double at = gap(random); at < seconds; at += gap(random)) {
    const auto due =
        begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(at));
    const std::chrono::duration<double> wait = due - Clock::now();
    if (wait.count() > 0) Idle(wait.count());
    flights.Send(due);
  }
  return flights.Finish(seconds);
}

LoadResult Tenant::RunClosed(uint32_t callers, double seconds) {
  Flights flights(this);
  const Clock::time_point begin = Clock::now();
  std::chrono::duration<double> passed{};
  do {
    flights.Send(Clock::now());
    flights.WaitFor(callers - 1);
    passed = Clock::now() - begin;
  } while (passed.count() < seconds);
  flights.WaitFor(0);
  passed = Clock::now() - begin;
  return flights.Finish(passed.count());
}

// ---- The server ----

absl::StatusOr<std::unique_ptr<LoadedServer>> LoadedServer::Start(
    const std::vector<std::string>& tenants, const std::vector<std::string>& arguments) {
  std::unique_ptr<LoadedServer> server(new LoadedServer());
  std::vector<std::string> all = {"--device",    "cpu", "--threads",   "1",
                                  "--lanes-max", "0",   "--log-level", "error"};
  for (const std::string& tenant : tenants) {
    all.insert(all.end(), {"--listen", "tenant=" + tenant + "," + server->endpoint(tenant)});
  }
  all.insert(all.end(), arguments.begin(), arguments.end());
  server->program_ = std::make_unique<Program>("kvservice", all);
  if (!server->program_->WaitForLine("ready")) {
    server->program_->Wait();
    return absl::UnavailableError("the server does not start: " + server->program_->errors());
  }
  const absl::Status registered = Register(server->endpoint(tenants[0]));
  if (!registered.ok()) return registered;
  return server;
}

absl::StatusOr<Endpoint> LoadedServer::metrics_endpoint() const {
  constexpr char kBefore[] = "\nmetrics on ";
  const std::string& said = program_->output();
  const size_t found = said.find(kBefore);
  if (found == std::string::npos) return absl::NotFoundError("the server tells no metrics");
  const size_t begin = found + std::strlen(kBefore);
  return ParseEndpoint(said.substr(begin, said.find('\n', begin) - begin));
}

int LoadedServer::Stop() {
  program_->Signal(SIGTERM);
  return program_->Wait();
}

}  // namespace kvservice::testing
