#include "tests/stress/sigkill.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "tests/kvservice/words.h"
#include "tests/server/program.h"
#include "tests/server/served_engine.h"
#include "tests/stress/ledger.h"

namespace kvservice::testing {
namespace {

constexpr char kName[] = "killed";
constexpr KvLayout kLayout = {
    .query_head_count = 4, .kv_head_count = 2, .head_dim = 64, .dtype = DType::kBfloat16};
constexpr uint32_t kClients = 3;
constexpr uint32_t kSequencesPerClient = 3;
constexpr uint32_t kTokensMax = 400;
constexpr uint32_t kAppendTokensMax = 100;
// A client stops by itself after so many operations, should nobody be killed.
constexpr uint32_t kOperationsMax = 2000;
// Operations of all clients before the kill.
constexpr uint64_t kKillWithin = 60;
// A few blocks fewer than the sequences want.
constexpr uint64_t kPoolBytes = 1'500'000;

struct Owned {
  std::string id;
  uint64_t generation = 0;
  LedgerEntry entry{1};
};

client::TensorView View(const std::vector<std::byte>& bytes, size_t token_count) {
  return {.dtype = client::DType::kBfloat16,
          .token_count = static_cast<uint32_t>(token_count),
          .head_count = kLayout.kv_head_count,
          .head_dim = kLayout.head_dim,
          .bytes = bytes};
}

// One client of the server and its sequences, from kill to kill.
class KilledClient {
 public:
  KilledClient(uint64_t seed, std::string endpoint)
      : random_(seed), next_word_(static_cast<uint32_t>(seed)), endpoint_(std::move(endpoint)) {}

  // Compares what the server has, as its first act after a restart.
  void CheckAll(CampaignResult* result);
  // Works until the server is gone; counts operations.
  void Work(std::atomic<uint64_t>* operations, CampaignResult* result);

 private:
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  std::unique_ptr<client::Client> Connect();
  static bool IsGone(const absl::Status& status) {
    return status.code() == absl::StatusCode::kUnavailable ||
           status.code() == absl::StatusCode::kDeadlineExceeded ||
           status.code() == absl::StatusCode::kCancelled;
  }
  static bool IsRefusal(const absl::Status& status) {
    return status.code() == absl::StatusCode::kResourceExhausted;
  }
  // What an operation said; false if the server is gone.
  bool Said(const char* what, const absl::Status& status, CampaignResult* result);

  bool Create(client::Client* client, CampaignResult* result);
  bool Append(Owned* owned, client::Sequence* sequence, bool durable, CampaignResult* result);
  bool Truncate(Owned* owned, client::Sequence* sequence, CampaignResult* result);
  bool Suspend(Owned* owned, client::Sequence* sequence, CampaignResult* result);
  bool Resume(Owned* owned, client::Sequence* sequence, CampaignResult* result);
  bool Drop(size_t index, client::Sequence* sequence, CampaignResult* result);
  bool ActOn(size_t index, client::Client* client, CampaignResult* result);
  bool CheckOne(client::Client* client, Owned* owned, CampaignResult* result);
  static absl::Status Write(const client::Sequence& sequence, uint32_t position, const Words& words,
                            client::Durability durability, client::Receipt* receipt);

  std::mt19937_64 random_;
  uint32_t next_word_;
  const std::string endpoint_;
  std::vector<Owned> owned_;
};

std::unique_ptr<client::Client> KilledClient::Connect() {
  client::ClientOptions options;
  options.endpoint = endpoint_;
  options.retry.attempts_max = 1;
  auto client = client::Client::Connect(options);
  return client.ok() ? *std::move(client) : nullptr;
}

absl::Status KilledClient::Write(const client::Sequence& sequence, uint32_t position,
                                 const Words& words, client::Durability durability,
                                 client::Receipt* receipt) {
  const std::vector<std::byte> k = PartBytes(kLayout, kLayout.dtype, Part::kKey, 0, words);
  const std::vector<std::byte> v = PartBytes(kLayout, kLayout.dtype, Part::kValue, 0, words);
  client::AppendWriter writer = sequence.Append(durability);
  const absl::Status written =
      writer.Write(0, position, View(k, words.size()), View(v, words.size()));
  if (!written.ok()) return written;
  const absl::StatusOr<client::Receipt> committed = writer.Commit();
  if (committed.ok()) *receipt = *committed;
  return committed.status();
}

bool KilledClient::Said(const char* what, const absl::Status& status, CampaignResult* result) {
  if (status.ok() || IsRefusal(status)) return true;
  if (IsGone(status)) return false;
  result->Fail(absl::StrCat(what, ": ", status.ToString()));
  return true;
}

bool KilledClient::Create(client::Client* client, CampaignResult* result) {
  client::SequenceOptions options;
  options.model = kName;
  absl::StatusOr<client::Sequence> made = client->CreateSequence(options);
  if (!made.ok()) return Said("create", made.status(), result);
  Owned owned;
  owned.generation = made->generation();
  owned.id = made->Detach();
  owned_.push_back(std::move(owned));
  return true;
}

bool KilledClient::Append(Owned* owned, client::Sequence* sequence, bool durable,
                          CampaignResult* result) {
  LedgerEntry& entry = owned->entry;
  const uint32_t position = entry.sent[0];
  if (position >= kTokensMax) return Truncate(owned, sequence, result);
  const auto count =
      static_cast<uint32_t>(std::min<uint64_t>(1 + Below(kAppendTokensMax), kTokensMax - position));
  const Words words = Counting(next_word_, count);
  next_word_ += count;
  client::Receipt receipt;
  const absl::Status status =
      Write(*sequence, position, words,
            durable ? client::Durability::kDurable : client::Durability::kMemory, &receipt);
  if (!status.ok() && !IsGone(status)) return Said("append", status, result);
  entry.words.insert(entry.words.end(), words.begin(), words.end());
  entry.sent[0] += count;
  if (status.ok() && durable) entry.AllDurable();
  return status.ok();
}

bool KilledClient::Truncate(Owned* owned, client::Sequence* sequence, CampaignResult* result) {
  const auto length = static_cast<uint32_t>(Below(owned->entry.sent[0] + 1));
  const absl::Status status = sequence->Truncate(length);
  if (IsGone(status)) owned->entry.MayCut(length);
  if (status.ok()) owned->entry.Cut(length);
  return Said("truncate", status, result);
}

bool KilledClient::Suspend(Owned* owned, client::Sequence* sequence, CampaignResult* result) {
  const absl::Status status = sequence->Suspend();
  if (IsGone(status)) owned->entry.maybe_suspended = true;
  if (status.ok()) {
    owned->entry.AllDurable();
    owned->entry.is_suspended = true;
  }
  return Said("suspend", status, result);
}

bool KilledClient::Resume(Owned* owned, client::Sequence* sequence, CampaignResult* result) {
  const absl::Status status = sequence->Resume();
  if (IsGone(status)) owned->entry.maybe_resumed = true;
  if (status.ok()) owned->entry.is_suspended = false;
  return Said("resume", status, result);
}

bool KilledClient::Drop(size_t index, client::Sequence* sequence, CampaignResult* result) {
  const absl::Status status = sequence->Close();
  if (IsGone(status)) owned_[index].entry.maybe_dropped = true;
  if (status.ok()) owned_.erase(owned_.begin() + static_cast<ptrdiff_t>(index));
  return Said("drop", status, result);
}

bool KilledClient::ActOn(size_t index, client::Client* client, CampaignResult* result) {
  Owned* const owned = &owned_[index];
  client::Sequence sequence = client->Adopt(owned->id, owned->generation);
  const uint64_t what = Below(100);
  bool lives = true;
  if (owned->entry.is_suspended) {
    lives = Resume(owned, &sequence, result);
  } else if (what < 65) {
    lives = Append(owned, &sequence, what < 45, result);
  } else if (what < 78) {
    lives = Truncate(owned, &sequence, result);
  } else if (what < 92) {
    lives = Suspend(owned, &sequence, result);
  } else {
    return Drop(index, &sequence, result);
  }
  owned->generation = sequence.generation();
  sequence.Detach();
  return lives;
}

void KilledClient::Work(std::atomic<uint64_t>* operations, CampaignResult* result) {
  const std::unique_ptr<client::Client> client = Connect();
  bool lives = client != nullptr;
  for (uint32_t i = 0; i < kOperationsMax && lives; ++i) {
    const bool creates = owned_.size() < kSequencesPerClient;
    lives =
        creates ? Create(client.get(), result) : ActOn(Below(owned_.size()), client.get(), result);
    operations->fetch_add(1);
    operations->notify_one();
  }
  // Whoever counts on this client does so no longer.
  operations->fetch_add(kKillWithin);
  operations->notify_one();
}

void KilledClient::CheckAll(CampaignResult* result) {
  const std::unique_ptr<client::Client> client = Connect();
  if (client == nullptr) return result->Fail("nobody can connect after the restart");
  std::vector<Owned> found;
  for (Owned& owned : owned_) {
    if (CheckOne(client.get(), &owned, result)) found.push_back(std::move(owned));
  }
  owned_ = std::move(found);
}

// False if the sequence is gone, or as good as.
bool KilledClient::CheckOne(client::Client* client, Owned* owned, CampaignResult* result) {
  LedgerEntry& entry = owned->entry;
  ++result->checked["sequences"];
  client::Sequence sequence = client->Adopt(owned->id, owned->generation);
  const absl::StatusOr<client::SequenceInfo> info = sequence.Refresh();
  std::string problem;
  if (info.ok()) {
    problem = entry.CheckSuspended(info->is_suspended);
    if (problem.empty()) problem = entry.CheckLengths({info->length_max_tokens});
    if (problem.empty() && sequence.generation() == owned->generation) {
      problem = "a handle of before the kill is still good";
    }
    if (problem.empty() && info->is_suspended) {
      const absl::Status resumed = sequence.Resume();
      if (!resumed.ok()) problem = resumed.ToString();
    }
  } else if (info.status().code() == absl::StatusCode::kNotFound) {
    problem = entry.CheckAbsent();
  } else {
    problem = info.status().ToString();
  }
  const uint32_t length = info.ok() ? info->length_max_tokens : 0;
  if (problem.empty() && length > 0) {
    const Words words(entry.words.begin(), entry.words.begin() + length);
    client::Receipt receipt;
    const absl::Status again = Write(sequence, 0, words, client::Durability::kMemory, &receipt);
    if (!again.ok()) problem = again.ToString();
    if (again.ok() && receipt.duplicate_count != receipt.message_count) {
      problem = "a sequence is shorter than it says";
    }
    result->checked["durable_tokens"] += entry.durable[0];
    result->checked["compared_tokens"] += length;
  }
  owned->generation = sequence.generation();
  sequence.Detach();
  if (!problem.empty()) result->Fail(problem);
  if (!problem.empty() || !info.ok()) return false;
  entry.Settle({length}, false);
  return true;
}

bool RegisterModel(const std::string& endpoint) {
  client::ClientOptions options;
  options.endpoint = endpoint;
  const auto client = client::Client::Connect(options);
  if (!client.ok()) return false;
  client::ModelDescription model;
  model.name = kName;
  model.layer_count = 1;
  model.query_head_count = kLayout.query_head_count;
  model.kv_head_count = kLayout.kv_head_count;
  model.head_dim = kLayout.head_dim;
  model.scale = 0.125F;
  return (*client)->RegisterModel(model).ok();
}

// For as many threads as clients; their results are added up afterwards.
void Add(const CampaignResult& part, CampaignResult* sum) {
  for (const std::string& failure : part.first_failures) sum->Fail(failure);
  sum->failures += part.failures - part.first_failures.size();
  for (const auto& [name, count] : part.checked) sum->checked[name] += count;
}

}  // namespace

CampaignResult RunSigkills(const SigkillOptions& options) {
  CampaignResult result;
  const TemporaryFolder folder;
  const std::string endpoint = "unix:" + folder.path() + "/socket";
  std::mt19937_64 random(options.seed);
  std::vector<std::unique_ptr<KilledClient>> clients;
  for (uint32_t i = 0; i < kClients; ++i) {
    clients.push_back(std::make_unique<KilledClient>(options.seed * kClients + i, endpoint));
  }
  while (result.count < options.kills) {
    Program server("kvservice", {"--listen", endpoint, "--admin-listen", "none", "--data-dir",
                                 folder.path() + "/store", "--pool-bytes",
                                 std::to_string(kPoolBytes), "--device", "cpu", "--threads", "1",
                                 "--lanes-max", "0", "--log-level", "error"});
    if (!server.WaitForLine("ready")) {
      server.Wait();
      result.Fail("the server does not start: " + server.errors());
      return result;
    }
    if (!RegisterModel(endpoint)) result.Fail("the model cannot be registered");
    for (const auto& client : clients) client->CheckAll(&result);
    std::atomic<uint64_t> operations{0};
    std::vector<CampaignResult> parts(kClients);
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < kClients; ++i) {
      threads.emplace_back([&, i] { clients[i]->Work(&operations, &parts[i]); });
    }
    const uint64_t kill_at = 1 + random() % kKillWithin;
    for (uint64_t done = 0; done < kill_at; done = operations) operations.wait(done);
    server.Signal(SIGKILL);
    for (std::thread& thread : threads) thread.join();
    server.Wait();
    for (const CampaignResult& part : parts) Add(part, &result);
    ++result.count;
  }
  return result;
}

}  // namespace kvservice::testing
