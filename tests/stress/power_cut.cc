#include "tests/stress/power_cut.h"

#include <algorithm>
#include <array>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kvservice/error.h"
#include "kvservice/stored_rows.h"
#include "tests/stress/ledger.h"
#include "tests/stress/stored_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLayers = 2;
// Fewer than the sequences want, so that they have to take turns in memory.
constexpr uint32_t kPoolBlocks = 14;
constexpr uint32_t kSequencesMax = 6;
constexpr uint32_t kTokensMax = 300;
constexpr uint32_t kAppendTokensMax = 80;
// A store lives through so many cuts; then a new one is begun.
constexpr uint64_t kCutsPerStore = 25;
constexpr uint64_t kOperationsPerLife = 60;
constexpr uint64_t kCutWithin = 90;

struct Client {
  Handle handle;
  LedgerEntry entry{kLayers};
};

EngineOptions SmallEngine() {
  EngineOptions options = TestEngine::SmallOptions();
  options.pool_bytes = kPoolBlocks * BlockBytes(SmallModel(kLayers));
  options.audit_rate = 0.0;
  return options;
}

// Errors that a working server may answer with: come back later.
bool IsRefusal(const absl::Status& status) {
  return status.code() == absl::StatusCode::kResourceExhausted;
}

class Store {
 public:
  Store(const PowerCutOptions& options, uint64_t seed, CampaignResult* result)
      : random_(seed), result_(result), engine_([&] {
          StoredEngine::Options stored;
          stored.engine = SmallEngine();
          stored.layer_count = kLayers;
          stored.filesystem = {.seed = seed, .ignore_log_syncs = options.ignore_log_syncs};
          stored.write_buffer_bytes = size_t{64} << 10;
          return stored;
        }()) {}

  // One life of the server, a cut, and what came back. False if it cannot go on.
  bool LiveOnce();

 private:
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  bool IsOff() const { return engine_.filesystem()->is_off(); }
  // An answer without the power says nothing.
  bool IsLost(const absl::Status& status) const { return !status.ok() && IsOff(); }
  void Fail(const std::string& problem) {
    result_->Fail(absl::StrCat("cut ", result_->count, ": ", problem));
  }

  bool Open();
  void Work();
  void Act();
  Client* Any() {
    if (clients_.empty()) return nullptr;
    auto client = clients_.begin();
    std::advance(client, static_cast<ptrdiff_t>(Below(clients_.size())));
    return &client->second;
  }
  void Create();
  void Append(Client* client, bool is_durable);
  void AppendTogether();
  void Truncate(Client* client);
  void Suspend(Client* client);
  void Resume(Client* client);
  void Drop(Client* client);

  Words NextWords(Client* client, uint32_t layer);
  void Sent(Client* client, uint32_t layer, size_t count) {
    client->entry.sent[layer] += static_cast<uint32_t>(count);
  }
  void Answered(Client* client, uint32_t layer, bool is_durable, uint32_t end,
                const absl::Status& status);

  void Check();
  bool CheckOne(Client* client);
  std::optional<std::vector<uint32_t>> Lengths(const Handle& handle);

  std::mt19937_64 random_;
  CampaignResult* const result_;
  StoredEngine engine_;
  std::map<SequenceId, Client, ById> clients_;
  std::vector<Handle> dropped_;
  uint32_t next_word_ = 1;
};

bool Store::LiveOnce() {
  // A cut may also come while the store is opened, and while it is closed.
  const uint64_t when = Below(8);
  if (when == 0) engine_.filesystem()->CutAfter(1 + Below(40));
  if (!Open()) return false;
  if (when != 0) {
    Check();
    engine_.filesystem()->CutAfter(1 + Below(kCutWithin));
    Work();
    if (when == 1) engine_.Stop();
  }
  engine_.Crash();
  ++result_->count;
  return true;
}

bool Store::Open() {
  absl::Status status = engine_.Start();
  if (IsLost(status)) {
    engine_.filesystem()->Reboot();
    status = engine_.Start();
  }
  if (!status.ok()) Fail(absl::StrCat("the store does not open: ", status.ToString()));
  ++result_->checked["opens"];
  return status.ok();
}

void Store::Work() {
  for (uint64_t i = 0; i < kOperationsPerLife && !IsOff(); ++i) {
    engine_->clock.AdvanceMs(10);
    Act();
  }
}

void Store::Act() {
  const uint64_t what = Below(100);
  if (clients_.size() < 2 || (what < 8 && clients_.size() < kSequencesMax)) return Create();
  if (what < 45) return Append(Any(), true);
  if (what < 55) return AppendTogether();
  if (what < 75) return Append(Any(), false);
  if (what < 83) return Truncate(Any());
  if (what < 90) return Suspend(Any());
  if (what < 96) return Resume(Any());
  Drop(Any());
}

void Store::Create() {
  CreateOptions options;
  options.model = kModel;
  const auto made = engine_->Create(options);
  if (IsLost(made.status())) return;
  if (!made.ok()) return Fail(absl::StrCat("create: ", made.status().ToString()));
  clients_[made->id].handle = {.id = made->id, .generation = made->generation};
}

// What the layer gets next: words that other layers have already, or new ones.
Words Store::NextWords(Client* client, uint32_t layer) {
  LedgerEntry& entry = client->entry;
  const uint32_t begin = entry.sent[layer];
  const auto count = static_cast<uint32_t>(
      std::min<uint64_t>(1 + Below(kAppendTokensMax), kTokensMax - std::min(begin, kTokensMax)));
  while (entry.words.size() < begin + count) entry.words.push_back(next_word_++);
  return {entry.words.begin() + begin, entry.words.begin() + begin + count};
}

void Store::Answered(Client* client, uint32_t layer, bool is_durable, uint32_t end,
                     const absl::Status& status) {
  LedgerEntry& entry = client->entry;
  if (status.ok()) {
    if (is_durable) entry.durable[layer] = std::max(entry.durable[layer], end);
    return;
  }
  if (IsOff()) return;
  const bool is_suspended = DetailsOf(status).reason == "SEQUENCE_SUSPENDED";
  if (IsRefusal(status) || (is_suspended && entry.is_suspended)) return;
  Fail(absl::StrCat("append: ", status.ToString()));
}

void Store::Append(Client* client, bool is_durable) {
  const auto layer = static_cast<uint32_t>(Below(kLayers));
  const uint32_t position = client->entry.sent[layer];
  const Words words = NextWords(client, layer);
  if (words.empty()) return Truncate(client);
  const auto appended = is_durable ? engine_->AppendDurably(client->handle, layer, position, words)
                                   : engine_->Append(client->handle, layer, position, words);
  if (appended.ok() || IsOff()) Sent(client, layer, words.size());
  Answered(client, layer, is_durable, position + static_cast<uint32_t>(words.size()),
           appended.status());
}

// Durable appends to several sequences that are under way together share syncs.
void Store::AppendTogether() {
  struct Flight {
    Client* client;
    uint32_t layer, position;
    std::unique_ptr<AppendStep> step;
    std::promise<absl::Status> promise;
    Words words;
  };
  std::vector<std::unique_ptr<Flight>> flights;
  for (auto& [id, client] : clients_) {
    auto flight = std::make_unique<Flight>();
    flight->client = &client;
    flight->layer = static_cast<uint32_t>(Below(kLayers));
    flight->position = client.entry.sent[flight->layer];
    flight->words = NextWords(&client, flight->layer);
    if (flight->words.empty()) continue;
    flight->step = std::make_unique<AppendStep>(engine_->model(), client.handle, flight->layer,
                                                flight->position, flight->words);
    flight->step->call.is_durable = true;
    flights.push_back(std::move(flight));
  }
  for (const auto& flight : flights) {
    engine_->get()->Append(flight->step->call,
                           [to = flight.get()](const absl::StatusOr<AppendResult>& appended) {
                             to->promise.set_value(appended.status());
                           });
  }
  for (const auto& flight : flights) {
    const absl::Status status = flight->promise.get_future().get();
    if (status.ok() || IsOff()) Sent(flight->client, flight->layer, flight->words.size());
    Answered(flight->client, flight->layer, true,
             flight->position + static_cast<uint32_t>(flight->words.size()), status);
  }
}

void Store::Truncate(Client* client) {
  LedgerEntry& entry = client->entry;
  const uint32_t longest = *std::max_element(entry.sent.begin(), entry.sent.end());
  const auto length = static_cast<uint32_t>(Below(longest + 1));
  const auto cut = engine_->Truncate(client->handle, length);
  if (IsLost(cut.status())) return entry.MayCut(length);
  if (!cut.ok()) {
    const bool is_suspended = DetailsOf(cut.status()).reason == "SEQUENCE_SUSPENDED";
    if (IsRefusal(cut.status()) || (is_suspended && entry.is_suspended)) return;
    return Fail(absl::StrCat("truncate: ", cut.status().ToString()));
  }
  client->handle.generation = cut->generation;
  entry.Cut(length);
}

void Store::Suspend(Client* client) {
  LedgerEntry& entry = client->entry;
  const auto suspended = engine_->Suspend(client->handle);
  if (IsLost(suspended.status())) {
    entry.maybe_suspended = true;
    return;
  }
  if (!suspended.ok()) {
    if (IsRefusal(suspended.status())) return;
    return Fail(absl::StrCat("suspend: ", suspended.status().ToString()));
  }
  entry.AllDurable();
  entry.is_suspended = true;
}

void Store::Resume(Client* client) {
  LedgerEntry& entry = client->entry;
  if (!entry.is_suspended) return;
  const auto resumed = engine_->Resume(client->handle);
  if (IsLost(resumed.status())) {
    entry.maybe_resumed = true;
    return;
  }
  if (!resumed.ok()) {
    if (IsRefusal(resumed.status())) return;
    return Fail(absl::StrCat("resume: ", resumed.status().ToString()));
  }
  client->handle.generation = resumed->generation;
  entry.is_suspended = false;
}

void Store::Drop(Client* client) {
  const auto dropped = engine_->Drop(client->handle);
  if (IsLost(dropped.status())) {
    client->entry.maybe_dropped = true;
    return;
  }
  if (!dropped.ok()) return Fail(absl::StrCat("drop: ", dropped.status().ToString()));
  dropped_.push_back(client->handle);
  clients_.erase(client->handle.id);
}

// ---- After the restart ----

void Store::Check() {
  for (auto client = clients_.begin(); client != clients_.end();) {
    client = CheckOne(&client->second) ? std::next(client) : clients_.erase(client);
  }
  for (const Handle& handle : dropped_) {
    ++result_->checked["dropped_sequences"];
    if (engine_->Get(handle).status().code() != absl::StatusCode::kNotFound) {
      Fail("a dropped sequence is back");
    }
  }
  dropped_.clear();
}

// Where the next token of each layer would go: what lies beyond it is refused with the length.
std::optional<std::vector<uint32_t>> Store::Lengths(const Handle& handle) {
  std::vector<uint32_t> lengths(kLayers, 0);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const auto refused = engine_->Append(handle, layer, 4 * kTokensMax, {1});
    const ErrorDetails details = DetailsOf(refused.status());
    const auto found =
        std::find_if(details.metadata.begin(), details.metadata.end(),
                     [](const auto& pair) { return pair.first == "current_length"; });
    if (details.reason != "POSITION_GAP" || found == details.metadata.end() ||
        !absl::SimpleAtoi(found->second, &lengths[layer])) {
      Fail(absl::StrCat("no length of a layer: ", refused.status().ToString()));
      return std::nullopt;
    }
  }
  return lengths;
}

// False if the sequence is gone, or as good as.
bool Store::CheckOne(Client* client) {
  LedgerEntry& entry = client->entry;
  const auto info = engine_->Get(client->handle);
  ++result_->checked["sequences"];
  if (info.status().code() == absl::StatusCode::kNotFound) {
    const std::string problem = entry.CheckAbsent();
    if (!problem.empty()) Fail(problem);
    return false;
  }
  if (!info.ok()) {
    Fail(absl::StrCat("get: ", info.status().ToString()));
    return false;
  }
  std::string problem = entry.CheckSuspended(info->is_suspended);
  if (problem.empty() && info->generation == client->handle.generation) {
    problem = "a handle of before the crash is still good";
  }
  client->handle.generation = info->generation;
  if (problem.empty() && info->is_suspended) {
    const auto resumed = engine_->Resume(client->handle);
    if (!resumed.ok()) problem = absl::StrCat("resume: ", resumed.status().ToString());
    if (resumed.ok()) client->handle.generation = resumed->generation;
  }
  const auto lengths = problem.empty() ? Lengths(client->handle) : std::nullopt;
  if (lengths.has_value()) problem = entry.CheckLengths(*lengths);
  if (lengths.has_value() && problem.empty()) {
    SequenceInfo now = *info;
    now.generation = client->handle.generation;
    problem = CompareStored(engine_.operator->(), now, *lengths, entry.words);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      result_->checked["durable_tokens"] += entry.durable[layer];
      result_->checked["compared_tokens"] += (*lengths)[layer];
    }
  }
  if (!problem.empty()) Fail(problem);
  if (!lengths.has_value() || !problem.empty()) return false;
  entry.Settle(*lengths, false);
  return true;
}

}  // namespace

CampaignResult RunPowerCuts(const PowerCutOptions& options) {
  CampaignResult result;
  for (uint64_t number = 0; result.count < options.cuts; ++number) {
    Store store(options, options.seed + 1'000'003 * number, &result);
    const uint64_t end = std::min(options.cuts, result.count + kCutsPerStore);
    while (result.count < end && store.LiveOnce()) {
    }
    // A store that does not open was counted as a failure, and as a cut that it did not survive.
    result.count = end;
  }
  return result;
}

}  // namespace kvservice::testing
