#include "tests/stress/io_fault.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kvservice/error.h"
#include "tests/stress/fault_filesystem.h"
#include "tests/stress/ledger.h"
#include "tests/stress/stored_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLayers = 2;
// Fewer than the sequences want: some have to leave for others.
constexpr uint32_t kPoolBlocks = 9;
constexpr uint32_t kBeyond = 4096;
// Background threads may leave out an operation now and then: what counts is what each of some runs
// without a fault does.
constexpr int kCountingRuns = 8;
constexpr int kAttemptsMax = 24;
// Of all experiments: those whose operation none of so many runs came to, so that it is none that
// each run does.
constexpr double kSeldomMax = 0.01;

struct Point {
  std::string operation;
  uint64_t nth = 0;
  Fault fault = Fault::kErrorOnce;
};

struct Owned {
  Handle handle;
  LedgerEntry entry{kLayers};
  // [layer]: tokens that the engine said it has.
  std::vector<uint32_t> taken = std::vector<uint32_t>(kLayers, 0);
  // An answer that failed leaves open what the engine has, until the next look.
  bool is_known = false;
  bool is_there = false;
};

// One store, one fault.
class Experiment {
 public:
  Experiment(const IoFaultOptions& options, std::string name, CampaignResult* result);

  void Arm(const Point& point);
  // All of the workload, and the looks after it.
  void Live();
  bool fired() const { return filesystem_->fired(); }
  std::map<std::string, uint64_t> counts() const { return counts_; }

 private:
  enum Name : uint8_t { kA, kB, kC, kD, kE, kNames };

  void FirstLife();
  void SecondLife();
  void ThirdLife();

  bool Open();
  void End(bool crashes);
  void EndFault(bool cuts);
  void Fail(const std::string& problem) { result_->Fail(absl::StrCat(name_, ": ", problem)); }
  // Whether the error may be: otherwise it has been counted as a failure.
  bool Explains(const char* what, const absl::Status& status);

  void Create(Name name);
  void Append(Name name, bool is_durable, uint32_t count);
  void Fork(Name name, Name child);
  void Truncate(Name name, uint32_t length);
  void Suspend(Name name);
  void Resume(Name name);
  void Drop(Name name);

  void Look();
  void LookAt(Owned* owned);
  std::optional<std::vector<uint32_t>> Lengths(Owned* owned);
  // After an error during a look.
  void Unseen(const char* what, Owned* owned, const absl::Status& status);

  const std::string name_;
  CampaignResult* const result_;
  std::shared_ptr<FaultFilesystem> filesystem_;
  StoredEngine engine_;
  Fault fault_ = Fault::kErrorOnce;
  // The fault has been, and nothing goes wrong any more.
  bool is_over_ = false;
  // Operations of the lives in which a fault may come.
  std::map<std::string, uint64_t> counts_;
  std::array<Owned, kNames> owned_;
  std::vector<Handle> dropped_;
  uint32_t next_word_ = 1;
};

Experiment::Experiment(const IoFaultOptions& options, std::string name, CampaignResult* result)
    : name_(std::move(name)), result_(result), engine_([&] {
        StoredEngine::Options stored;
        stored.engine = TestEngine::SmallOptions();
        stored.engine.pool_bytes = kPoolBlocks * BlockBytes(SmallModel(kLayers));
        stored.engine.audit_rate = 0.0;
        stored.layer_count = kLayers;
        stored.filesystem.seed = options.seed;
        stored.write_buffer_bytes = size_t{64} << 10;
        stored.wrap = [&](std::shared_ptr<PowerCutFilesystem> disk) {
          filesystem_ = std::make_shared<FaultFilesystem>(std::move(disk), options.hides);
          return filesystem_;
        };
        return stored;
      }()) {}

void Experiment::Arm(const Point& point) {
  fault_ = point.fault;
  filesystem_->Arm(point.operation, point.nth, point.fault);
}

void Experiment::Live() {
  if (!Open()) return;
  FirstLife();
  End(true);
  if (!Open()) return;
  Look();
  SecondLife();
  End(false);
  if (!Open()) return;
  Look();
  ThirdLife();
  End(false);
  counts_ = filesystem_->counts();
  EndFault(false);
  if (!Open()) return;
  Look();
  engine_.Stop();
}

void Experiment::FirstLife() {
  Create(kA);
  Create(kB);
  Create(kC);
  Append(kA, true, 70);
  Append(kB, false, 100);
  Append(kA, false, 30);
  Append(kC, true, 130);
  Suspend(kB);
  Fork(kA, kD);
  Append(kD, true, 20);
  Truncate(kA, 50);
  Resume(kB);
  Append(kB, true, 10);
  Drop(kC);
  Append(kA, true, 60);
  Suspend(kD);
}

void Experiment::SecondLife() {
  Append(kA, true, 40);
  Append(kB, false, 64);
  Create(kE);
  Append(kE, true, 200);
  Truncate(kB, 30);
  Append(kD, false, 70);
  Suspend(kA);
  Drop(kD);
}

void Experiment::ThirdLife() {
  Append(kA, true, 10);
  Append(kE, false, 64);
  Suspend(kE);
  Resume(kE);
}

// ---- The server ----

bool Experiment::Open() {
  absl::Status status = engine_.Start();
  if (!status.ok()) {
    Explains("start", status);
    EndFault(fault_ == Fault::kErrorThenCut);
    status = engine_.Start();
  }
  if (!status.ok()) Fail(absl::StrCat("the store does not open: ", status.ToString()));
  ++result_->checked["opens"];
  return status.ok();
}

void Experiment::End(bool crashes) {
  const bool cuts = fired() && fault_ == Fault::kErrorThenCut && !is_over_;
  if (crashes || cuts) {
    engine_.Crash();
  } else {
    engine_.Stop();
  }
  // Also a closing that goes wrong is the fault.
  if (fired()) EndFault(cuts);
}

void Experiment::EndFault(bool cuts) {
  filesystem_->Clear();
  is_over_ = true;
  if (cuts) engine_.filesystem()->CutAfter(0);
  if (engine_.filesystem()->is_off()) engine_.filesystem()->Reboot();
}

bool Experiment::Explains(const char* what, const absl::Status& status) {
  static const std::set<std::string> kReasons = {"DISK_FAILED",   "DISK_FULL",    "DISK_BUSY",
                                                 "POOL_FULL",     "STORE_LOCKED", "ROW_LOST",
                                                 "STORE_DAMAGED", "SEQUENCE_LOST"};
  const std::string reason = DetailsOf(status).reason;
  const bool is_damage = status.code() == absl::StatusCode::kDataLoss;
  bool may_be = fired() && kReasons.contains(reason) && (!is_over_ || reason == "SEQUENCE_LOST");
  if (is_damage && !IsWrongRead(fault_)) may_be = false;
  ++result_->checked[is_damage ? "said_to_be_damaged" : "errors"];
  if (!may_be) Fail(absl::StrCat(what, ": ", status.ToString(), " [", reason, "]"));
  return may_be;
}

// ---- The workload ----

void Experiment::Create(Name name) {
  CreateOptions options;
  options.model = kModel;
  const auto made = engine_->Create(options);
  if (!made.ok()) {
    Explains("create", made.status());
    return;
  }
  Owned& owned = owned_[name];
  owned.handle = {.id = made->id, .generation = made->generation};
  owned.is_there = owned.is_known = true;
}

void Experiment::Append(Name name, bool is_durable, uint32_t count) {
  Owned& owned = owned_[name];
  LedgerEntry& entry = owned.entry;
  for (uint32_t layer = 0; layer < kLayers && owned.is_known; ++layer) {
    const uint32_t begin = owned.taken[layer];
    const uint32_t end = begin + count;
    while (entry.words.size() < end) entry.words.push_back(next_word_++);
    const Words words(entry.words.begin() + begin, entry.words.begin() + end);
    const auto appended = is_durable ? engine_->AppendDurably(owned.handle, layer, begin, words)
                                     : engine_->Append(owned.handle, layer, begin, words);
    entry.sent[layer] = std::max(entry.sent[layer], end);
    if (appended.ok()) {
      owned.taken[layer] = appended->layer_length;
      if (is_durable) entry.durable[layer] = std::max(entry.durable[layer], end);
      continue;
    }
    if (entry.is_suspended && DetailsOf(appended.status()).reason == "SEQUENCE_SUSPENDED") return;
    Explains("append", appended.status());
  }
}

void Experiment::Fork(Name name, Name child) {
  Owned& parent = owned_[name];
  if (!parent.is_known) return;
  const auto made = engine_->Fork(parent.handle);
  if (!made.ok()) {
    Explains("fork", made.status());
    return;
  }
  Owned& owned = owned_[child];
  owned.handle = {.id = made->id, .generation = made->generation};
  owned.is_there = owned.is_known = true;
  owned.entry.words = parent.entry.words;
  owned.taken = owned.entry.sent = std::vector<uint32_t>(kLayers, made->length);
}

void Experiment::Truncate(Name name, uint32_t length) {
  Owned& owned = owned_[name];
  if (!owned.is_known) return;
  const uint32_t longest = *std::max_element(owned.taken.begin(), owned.taken.end());
  if (length > longest) return;
  const auto cut = engine_->Truncate(owned.handle, length);
  if (!cut.ok()) {
    Explains("truncate", cut.status());
    owned.entry.MayCut(length);
    owned.is_known = false;
    return;
  }
  owned.handle.generation = cut->generation;
  owned.entry.Cut(length);
  for (uint32_t& layer : owned.taken) layer = std::min(layer, length);
}

void Experiment::Suspend(Name name) {
  Owned& owned = owned_[name];
  if (!owned.is_known) return;
  const auto suspended = engine_->Suspend(owned.handle);
  if (!suspended.ok()) {
    Explains("suspend", suspended.status());
    owned.entry.maybe_suspended = true;
    owned.is_known = false;
    return;
  }
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    owned.entry.durable[layer] = std::max(owned.entry.durable[layer], owned.taken[layer]);
  }
  owned.entry.is_suspended = true;
}

void Experiment::Resume(Name name) {
  Owned& owned = owned_[name];
  if (!owned.is_known || !owned.entry.is_suspended) return;
  const auto resumed = engine_->Resume(owned.handle);
  if (!resumed.ok()) {
    Explains("resume", resumed.status());
    owned.entry.maybe_resumed = true;
    owned.is_known = false;
    return;
  }
  owned.handle.generation = resumed->generation;
  owned.entry.is_suspended = false;
}

void Experiment::Drop(Name name) {
  Owned& owned = owned_[name];
  if (!owned.is_known) return;
  const auto dropped = engine_->Drop(owned.handle);
  owned.is_known = false;
  if (!dropped.ok()) {
    Explains("drop", dropped.status());
    owned.entry.maybe_dropped = true;
    return;
  }
  owned.is_there = false;
  dropped_.push_back(owned.handle);
}

// ---- What came back ----

void Experiment::Look() {
  for (Owned& owned : owned_) {
    if (owned.is_there) LookAt(&owned);
  }
  for (const Handle& handle : dropped_) {
    ++result_->checked["dropped_sequences"];
    if (engine_->Get(handle).status().code() != absl::StatusCode::kNotFound) {
      Fail("a dropped sequence is back");
    }
  }
}

void Experiment::Unseen(const char* what, Owned* owned, const absl::Status& status) {
  owned->is_known = false;
  Explains(what, status);
  if (status.code() == absl::StatusCode::kDataLoss) owned->is_there = false;
}

// Where the next token of each layer would go: what lies beyond it is refused with the length.
std::optional<std::vector<uint32_t>> Experiment::Lengths(Owned* owned) {
  std::vector<uint32_t> lengths(kLayers, 0);
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const absl::Status refused = engine_->Append(owned->handle, layer, kBeyond, {1}).status();
    const ErrorDetails details = DetailsOf(refused);
    const auto found =
        std::find_if(details.metadata.begin(), details.metadata.end(),
                     [](const auto& pair) { return pair.first == "current_length"; });
    if (details.reason != "POSITION_GAP" || found == details.metadata.end() ||
        !absl::SimpleAtoi(found->second, &lengths[layer])) {
      Unseen("length", owned, refused);
      return std::nullopt;
    }
  }
  return lengths;
}

void Experiment::LookAt(Owned* owned) {
  LedgerEntry& entry = owned->entry;
  owned->is_known = false;
  ++result_->checked["sequences"];
  auto info = engine_->Get(owned->handle);
  if (info.status().code() == absl::StatusCode::kNotFound) {
    owned->is_there = false;
    const std::string problem = entry.CheckAbsent();
    if (!problem.empty()) Fail(problem);
    return;
  }
  if (!info.ok()) return Unseen("get", owned, info.status());
  const std::string suspended = entry.CheckSuspended(info->is_suspended);
  if (!suspended.empty()) return Fail(suspended);
  owned->handle.generation = info->generation;
  if (info->is_suspended) {
    // From now on it may be either.
    entry.maybe_suspended = entry.maybe_resumed = true;
    const auto resumed = engine_->Resume(owned->handle);
    if (!resumed.ok()) return Unseen("resume", owned, resumed.status());
    owned->handle.generation = info->generation = resumed->generation;
  }
  const auto lengths = Lengths(owned);
  if (!lengths.has_value()) return;
  std::string problem = entry.CheckLengths(*lengths);
  if (problem.empty()) {
    problem = CompareStored(engine_.operator->(), *info, *lengths, entry.words);
  }
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    result_->checked["durable_tokens"] += entry.durable[layer];
    result_->checked["compared_tokens"] += (*lengths)[layer];
  }
  if (!problem.empty()) return Fail(problem);
  owned->taken = *lengths;
  entry.sent = *lengths;
  entry.words.resize(*std::max_element(lengths->begin(), lengths->end()));
  entry.is_suspended = entry.maybe_suspended = entry.maybe_resumed = entry.maybe_dropped = false;
  owned->is_known = true;
}

// ---- All of them ----

std::vector<Point> AllPoints(const IoFaultOptions& options, CampaignResult* result) {
  std::map<std::string, uint64_t> counts;
  for (int run = 0; run < kCountingRuns; ++run) {
    Experiment whole(options, "no fault", result);
    whole.Live();
    const std::map<std::string, uint64_t> seen = whole.counts();
    if (run == 0) counts = seen;
    for (auto& [operation, count] : counts) {
      const auto now = seen.find(operation);
      count = std::min(count, now == seen.end() ? 0 : now->second);
    }
  }
  std::vector<Point> points;
  uint64_t operations = 0;
  for (const auto& [operation, count] : counts) {
    if (!options.only.empty() && operation != options.only) continue;
    operations += count;
    for (uint64_t nth = 1; nth <= count; ++nth) {
      for (const Fault fault : kFaults) {
        if (Applies(fault, operation)) points.push_back({operation, nth, fault});
      }
    }
  }
  result->checked["operations"] = operations;
  result->checked["points"] = points.size();
  return points;
}

}  // namespace

CampaignResult RunIoFaults(const IoFaultOptions& options) {
  CampaignResult result;
  std::vector<Point> points = AllPoints(options, &result);
  std::mt19937_64 random(options.seed);
  if (options.faults > 0 && options.faults < points.size()) {
    std::shuffle(points.begin(), points.end(), random);
    points.resize(options.faults);
  }
  std::string seldom;
  for (const Point& point : points) {
    bool fired = false;
    for (int attempt = 0; attempt < kAttemptsMax && !fired; ++attempt) {
      Experiment experiment(
          options, absl::StrCat(FaultName(point.fault), " at ", point.operation, " ", point.nth),
          &result);
      experiment.Arm(point);
      experiment.Live();
      fired = experiment.fired();
    }
    ++result.checked[fired ? "brought_about" : "seldom"];
    if (!fired) seldom += absl::StrCat(" ", point.operation, " ", point.nth, ";");
    ++result.count;
  }
  const auto seldom_max = static_cast<uint64_t>(kSeldomMax * static_cast<double>(points.size()));
  if (result.checked["seldom"] > seldom_max) {
    result.Fail(absl::StrCat("no run came to", seldom));
  }
  return result;
}

}  // namespace kvservice::testing
