#include "tests/stress/soak.h"

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "kvservice/v1/admin.grpc.pb.h"
#include "tests/kvservice/words.h"
#include "tests/server/web_client.h"
#include "tests/stress/load.h"
#include "tests/stress/trend.h"

namespace kvservice::testing {
namespace {

constexpr KvLayout kLayout = {
    .query_head_count = 4, .kv_head_count = 2, .head_dim = 64, .dtype = DType::kBfloat16};
constexpr uint32_t kWorkers = 3;
constexpr uint32_t kSequencesPerWorker = 4;
constexpr uint32_t kTokensMax = 1500;
constexpr uint32_t kAppendTokensMax = 200;
// Then the worker connects anew.
constexpr uint32_t kOperationsPerConnection = 400;
// Fewer blocks than the sequences want.
constexpr uint64_t kPoolBytes = 6'000'000;
// So that the rows which wait there come and go many times: memory rises until they do.
constexpr uint64_t kDiskBufferBytes = uint64_t{1} << 20;
constexpr double kGrowthAllowedBytes = 4.0 * (1 << 20);

struct Owned {
  client::Sequence sequence;
  Words words = {};
  bool is_suspended = false;
};

client::TensorView View(DType dtype, uint32_t head_count, const std::vector<std::byte>& bytes,
                        size_t token_count) {
  return {.dtype = dtype == DType::kBfloat16 ? client::DType::kBfloat16 : client::DType::kFloat32,
          .token_count = static_cast<uint32_t>(token_count),
          .head_count = head_count,
          .head_dim = kLayout.head_dim,
          .bytes = bytes};
}

// One client of the server. One thread.
class Worker {
 public:
  Worker(uint64_t seed, std::string endpoint) : random_(seed), endpoint_(std::move(endpoint)) {}

  void Run(const std::atomic<bool>& stop);
  CampaignResult result;

 private:
  uint32_t Below(uint64_t limit) { return static_cast<uint32_t>(random_() % limit); }
  void Note(const char* what, const absl::Status& status);
  void Act();
  void Append(Owned* owned);
  void Attend(Owned* owned);
  void Truncate(Owned* owned);
  void Fork(Owned* owned);
  void CloseAll();

  std::mt19937_64 random_;
  const std::string endpoint_;
  std::unique_ptr<client::Client> client_;
  std::vector<Owned> owned_;
};

void Worker::Note(const char* what, const absl::Status& status) {
  if (status.ok()) ++result.checked[what];
  if (status.code() == absl::StatusCode::kResourceExhausted) ++result.checked["refused"];
  if (status.ok() || status.code() == absl::StatusCode::kResourceExhausted) return;
  result.Fail(absl::StrCat(what, ": ", status.ToString()));
}

void Worker::Append(Owned* owned) {
  if (owned->words.size() >= kTokensMax) return Truncate(owned);
  const Words words = Counting(Below(1000), 1 + Below(kAppendTokensMax));
  const std::vector<std::byte> k = PartBytes(kLayout, kLayout.dtype, Part::kKey, 0, words);
  const std::vector<std::byte> v = PartBytes(kLayout, kLayout.dtype, Part::kValue, 0, words);
  client::AppendWriter writer = owned->sequence.Append(Below(3) == 0 ? client::Durability::kDurable
                                                                     : client::Durability::kMemory);
  const auto position = static_cast<uint32_t>(owned->words.size());
  absl::Status status =
      writer.Write(0, position, View(kLayout.dtype, kLayout.kv_head_count, k, words.size()),
                   View(kLayout.dtype, kLayout.kv_head_count, v, words.size()));
  if (status.ok()) status = writer.Commit().status();
  Note("appended", status);
  if (status.ok()) owned->words.insert(owned->words.end(), words.begin(), words.end());
}

void Worker::Attend(Owned* owned) {
  if (owned->words.empty()) return Append(owned);
  const Words query = {owned->words.back()};
  const std::vector<std::byte> q = PartBytes(kLayout, DType::kFloat32, Part::kQuery, 0, query);
  const auto position = static_cast<uint32_t>(owned->words.size() - 1);
  const auto attended = owned->sequence.Attend(
      {.layer = 0,
       .position = position,
       .q = View(DType::kFloat32, kLayout.query_head_count, q, query.size())});
  Note("attended", attended.status());
}

void Worker::Truncate(Owned* owned) {
  const uint32_t length = Below(owned->words.size() + 1);
  const absl::Status status = owned->sequence.Truncate(length);
  Note("truncated", status);
  if (status.ok()) owned->words.resize(length);
}

void Worker::Fork(Owned* owned) {
  auto child = owned->sequence.Fork();
  Note("forked", child.status());
  if (!child.ok()) return;
  Owned forked = {.sequence = *std::move(child), .words = owned->words};
  Attend(&forked);
  Note("closed", forked.sequence.Close());
}

void Worker::Act() {
  if (owned_.size() < kSequencesPerWorker) {
    client::SequenceOptions options;
    options.model = "loaded";
    auto made = client_->CreateSequence(options);
    Note("created", made.status());
    if (made.ok()) owned_.push_back({.sequence = *std::move(made)});
    return;
  }
  const size_t index = Below(owned_.size());
  Owned* const owned = &owned_[index];
  const uint32_t what = Below(100);
  if (owned->is_suspended && what < 96) {
    const absl::Status status = owned->sequence.Resume();
    Note("resumed", status);
    owned->is_suspended = !status.ok();
  } else if (what < 40) {
    Append(owned);
  } else if (what < 75) {
    Attend(owned);
  } else if (what < 82) {
    Truncate(owned);
  } else if (what < 88) {
    Fork(owned);
  } else if (what < 96) {
    const absl::Status status = owned->sequence.Suspend();
    Note("suspended", status);
    owned->is_suspended = status.ok();
  } else {
    Note("closed", owned->sequence.Close());
    owned_.erase(owned_.begin() + static_cast<ptrdiff_t>(index));
  }
}

void Worker::CloseAll() {
  for (Owned& owned : owned_) Note("closed", owned.sequence.Close());
  owned_.clear();
  client_.reset();
}

void Worker::Run(const std::atomic<bool>& stop) {
  while (!stop) {
    client::ClientOptions options;
    options.endpoint = endpoint_;
    auto client = client::Client::Connect(options);
    if (!client.ok()) return result.Fail(client.status().ToString());
    client_ = *std::move(client);
    for (uint32_t i = 0; i < kOperationsPerConnection && !stop; ++i) Act();
    CloseAll();
    ++result.checked["connections"];
  }
}

// ---- What the server holds ----

double ResidentBytes(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/statm"));
  uint64_t size = 0;
  uint64_t resident = 0;
  file >> size >> resident;
  return static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE));
}

// Sockets and the like: of files the store keeps some open, up to a bound of its own.
uint64_t Descriptors(pid_t pid) {
  std::error_code error;
  uint64_t count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(absl::StrCat("/proc/", pid, "/fd"), error)) {
    const std::string target = std::filesystem::read_symlink(entry.path(), error).string();
    count += target.empty() || target.front() == '/' ? 0 : 1;
  }
  return count;
}

// What was seen of the server's memory, each second. Bytes.
struct MemorySeen {
  std::vector<double> resident;
  // Allocated and not freed.
  std::vector<double> heap;
};

bool Look(pid_t pid, const Endpoint& metrics, MemorySeen* seen) {
  const std::optional<double> heap = MetricOf(GetPage(metrics, "/metrics"), "kvservice_heap_bytes");
  seen->resident.push_back(ResidentBytes(pid));
  seen->heap.push_back(heap.value_or(0.0));
  return heap.has_value();
}

std::vector<double> SecondHalf(const std::vector<double>& samples) {
  return {samples.begin() + static_cast<ptrdiff_t>(samples.size() / 2), samples.end()};
}

uint64_t Kib(double bytes) { return static_cast<uint64_t>(std::max(0.0, bytes / 1024.0)); }

// The heap must not grow. What is resident is more: pages that were used once stay with the process
// (KeepFreedMemory), so it rises to its highest water ever more slowly, whatever is freed.
void CheckMemory(const MemorySeen& seen, CampaignResult* result) {
  const Trend resident = TrendOf(SecondHalf(seen.resident));
  result->checked["resident_kib"] = Kib(seen.resident.back());
  result->checked["growth_kib"] = Kib(resident.growth);
  result->checked["growth_noise_kib"] = Kib(resident.noise);
  if (resident.growth > kGrowthAllowedBytes && resident.growth > resident.noise) {
    result->Fail(absl::StrCat("memory grew by ", resident.growth, " bytes over the second half"));
  }
  const Trend heap = BatchTrendOf(SecondHalf(seen.heap));
  result->checked["heap_kib"] = Kib(seen.heap.back());
  result->checked["heap_growth_kib"] = Kib(heap.growth);
  result->checked["heap_growth_noise_kib"] = Kib(heap.noise);
  if (heap.growth > heap.noise) {
    result->Fail(absl::StrCat("the heap grew by ", heap.growth,
                              " bytes over the second half, its noise is ", heap.noise));
  }
}

// Connections are closed a little after clients have gone.
void CheckLeft(const LoadedServer& server, v1::AdminService::Stub* admin, uint64_t descriptors,
               CampaignResult* result) {
  constexpr int kAttempts = 50;
  v1::GetStatsResponse stats;
  uint64_t left = 0;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const auto context = NewContext();
    const grpc::Status status = admin->GetStats(context.get(), {}, &stats);
    if (!status.ok()) return result->Fail(ErrorText(status));
    left = Descriptors(server.pid());
    if (stats.block_count() == 0 && stats.sequence_count() == 0 && left <= descriptors) break;
    Idle(0.2);
  }
  result->checked["blocks_left"] = stats.block_count();
  result->checked["sequences_left"] = stats.sequence_count();
  result->checked["descriptors_left"] = left > descriptors ? left - descriptors : 0;
  if (stats.block_count() > 0) result->Fail("blocks are left");
  if (stats.sequence_count() > 0) result->Fail("sequences are left");
  if (left > descriptors) result->Fail(absl::StrCat(left - descriptors, " descriptors are left"));
}

}  // namespace

CampaignResult RunSoak(const SoakOptions& options) {
  CampaignResult result;
  const TemporaryFolder folder;
  const std::string admin_endpoint = "unix:" + folder.path() + "/admin";
  auto server = LoadedServer::Start(
      {"only"}, {"--admin-listen", admin_endpoint, "--data-dir", folder.path() + "/store",
                 "--pool-bytes", absl::StrCat(kPoolBytes), "--disk-buffer-bytes",
                 absl::StrCat(kDiskBufferBytes), "--metrics-listen", "127.0.0.1:0"});
  const auto metrics = server.ok() ? (*server)->metrics_endpoint() : server.status();
  if (!metrics.ok()) {
    result.Fail(metrics.status().ToString());
    return result;
  }
  const auto admin = v1::AdminService::NewStub(
      grpc::CreateChannel(admin_endpoint, grpc::InsecureChannelCredentials()));
  // The connection of the one who looks is there before and after.
  CampaignResult before;
  CheckLeft(**server, admin.get(), UINT64_MAX, &before);
  const uint64_t descriptors = Descriptors((*server)->pid());

  std::atomic<bool> stop{false};
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < kWorkers; ++i) {
    workers.push_back(
        std::make_unique<Worker>(options.seed * kWorkers + i, (*server)->endpoint("only")));
    threads.emplace_back([&stop, worker = workers.back().get()] { worker->Run(stop); });
  }
  MemorySeen seen;
  for (; result.count < options.seconds; ++result.count) {
    Idle(1.0);
    if (!Look((*server)->pid(), *metrics, &seen)) result.Fail("the server tells no heap");
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  for (const auto& worker : workers) {
    for (const std::string& failure : worker->result.first_failures) result.Fail(failure);
    result.failures += worker->result.failures - worker->result.first_failures.size();
    for (const auto& [name, count] : worker->result.checked) result.checked[name] += count;
  }
  CheckMemory(seen, &result);
  CheckLeft(**server, admin.get(), descriptors, &result);
  const int status = (*server)->Stop();
  if (status != 0) result.Fail(absl::StrCat("the server ended with ", status));
  return result;
}

}  // namespace kvservice::testing
