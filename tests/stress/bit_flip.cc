#include "tests/stress/bit_flip.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kvservice/error.h"
#include "tests/stress/stored_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kLayers = 2;
constexpr uint32_t kSequences = 5;
constexpr uint32_t kTokens = 330;
constexpr size_t kPageBytes = 512;
// A store is damaged so often; then another one is made.
constexpr uint64_t kFlipsPerStore = 200;

using Files = std::map<std::string, std::string>;

struct Stored {
  Handle handle;
  std::string tenant;
  Words words;
};

class ClosedStoreOfWords {
 public:
  ClosedStoreOfWords(uint64_t seed, CampaignResult* result)
      : random_(seed), result_(result), engine_([&] {
          StoredEngine::Options options;
          options.layer_count = kLayers;
          options.filesystem.seed = seed;
          // Some rows reach files by themselves, others when the store is closed.
          options.write_buffer_bytes = size_t{128} << 10;
          return options;
        }()) {
    is_made_ = Make();
    if (!is_made_) result_->Fail("the store could not be made");
  }

  bool is_made() const { return is_made_; }
  void FlipOnce();

 private:
  uint64_t Below(uint64_t limit) { return random_() % limit; }
  bool Make();
  bool Add(uint32_t first, uint32_t count);
  std::string& AnyFile(Files* files);
  std::string Damage(Files* files);
  void Check(const std::string& damage);
  void CheckOne(const Stored& stored, const std::string& damage);

  std::mt19937_64 random_;
  CampaignResult* const result_;
  StoredEngine engine_;
  std::vector<Stored> stored_;
  Files before_;
  Files files_;
  bool is_made_ = false;
};

bool ClosedStoreOfWords::Add(uint32_t first, uint32_t count) {
  for (uint32_t i = first; i < first + count; ++i) {
    Stored stored = {.handle = {}, .tenant = i % 2 == 0 ? "even" : "odd", .words = {}};
    stored.words = Counting(10'000 * (i + 1), kTokens + 7 * i);
    CreateOptions options;
    options.model = kModel;
    const auto made = engine_->Create(options, stored.tenant);
    if (!made.ok()) return false;
    stored.handle = {.id = made->id, .generation = made->generation};
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      if (!engine_->AppendDurably(stored.handle, layer, 0, stored.words, stored.tenant).ok()) {
        return false;
      }
    }
    if (i % 3 == 1 && !engine_->Suspend(stored.handle, stored.tenant).ok()) return false;
    stored_.push_back(std::move(stored));
  }
  return true;
}

bool ClosedStoreOfWords::Make() {
  if (!engine_.Start().ok() || !Add(0, kSequences / 2)) return false;
  engine_.Stop();
  before_ = engine_.filesystem()->Files();
  if (!engine_.Start().ok() || !Add(kSequences / 2, kSequences - kSequences / 2)) return false;
  engine_.Stop();
  files_ = engine_.filesystem()->Files();
  return true;
}

// A large one more often: every byte of the store is as likely.
std::string& ClosedStoreOfWords::AnyFile(Files* files) {
  uint64_t total = 0;
  for (const auto& [path, bytes] : *files) total += bytes.size();
  uint64_t at = Below(total);
  for (auto& [path, bytes] : *files) {
    if (at < bytes.size()) return bytes;
    at -= bytes.size();
  }
  return files->begin()->second;
}

std::string ClosedStoreOfWords::Damage(Files* files) {
  std::vector<std::string*> some;
  for (auto& [path, bytes] : *files) {
    if (!bytes.empty()) some.push_back(&bytes);
  }
  std::string& bytes = Below(2) == 0 ? AnyFile(files) : *some[Below(some.size())];
  const std::string name = std::find_if(files->begin(), files->end(), [&](auto& file) {
                             return &file.second == &bytes;
                           })->first;
  const uint64_t at = Below(bytes.size());
  const uint64_t kind = Below(20);
  if (kind < 16) {
    bytes[at] = static_cast<char>(bytes[at] ^ (1 << Below(8)));
    return absl::StrCat("bit of byte ", at, " of ", name);
  }
  if (kind == 16) {
    const size_t end = std::min(bytes.size(), at + kPageBytes);
    std::fill(bytes.begin() + static_cast<ptrdiff_t>(at),
              bytes.begin() + static_cast<ptrdiff_t>(end), '\0');
    return absl::StrCat("zeros at ", at, " of ", name);
  }
  if (kind == 17) {
    bytes.resize(at);
    return absl::StrCat(name, " ends at ", at);
  }
  const auto earlier = before_.find(name);
  if (kind == 18 && earlier != before_.end()) {
    bytes = earlier->second;
    return absl::StrCat(name, " of an earlier close");
  }
  std::string& other = *some[Below(some.size())];
  std::swap(bytes, other);
  return absl::StrCat(name, " and another have changed places");
}

void ClosedStoreOfWords::FlipOnce() {
  Files files = files_;
  const std::string damage = Damage(&files);
  ++result_->count;
  if (files == files_) ++result_->checked["nothing_changed"];
  engine_.filesystem()->ReplaceAll(files);
  const absl::Status started = engine_.Start();
  if (!started.ok()) {
    ++result_->checked["refused_stores"];
    if (DetailsOf(started).reason.empty()) {
      result_->Fail(absl::StrCat(damage, ": refused without a reason: ", started.ToString()));
    }
  } else {
    Check(damage);
  }
  engine_.Crash();
}

void ClosedStoreOfWords::Check(const std::string& damage) {
  for (const Stored& stored : stored_) CheckOne(stored, damage);
  for (const SequenceInfo& info : engine_->List("")) {
    const bool is_known = std::any_of(stored_.begin(), stored_.end(), [&](const Stored& stored) {
      return stored.handle.id == info.id;
    });
    if (!is_known) result_->Fail(absl::StrCat(damage, ": there is a sequence of nobody"));
  }
}

void ClosedStoreOfWords::CheckOne(const Stored& stored, const std::string& damage) {
  const auto tell = [&](const std::string& problem) {
    result_->Fail(absl::StrCat(damage, ": ", problem));
  };
  const auto lost = [&](const absl::Status& status) {
    if (status.code() == absl::StatusCode::kDataLoss) {
      ++result_->checked["sequences_lost_aloud"];
      const std::string stranger = stored.tenant == "even" ? "odd" : "even";
      if (engine_->Get(stored.handle, stranger).status().code() != absl::StatusCode::kNotFound) {
        tell("another tenant hears of the loss");
      }
      return true;
    }
    if (DetailsOf(status).reason == "DISK_FAILED") {
      ++result_->checked["sequences_unavailable"];
      return true;
    }
    return false;
  };
  auto info = engine_->Get(stored.handle, stored.tenant);
  if (!info.ok()) {
    if (!lost(info.status())) tell(info.status().ToString());
    return;
  }
  if (info->is_suspended) {
    const auto resumed =
        engine_->Resume({.id = stored.handle.id, .generation = info->generation}, stored.tenant);
    if (!resumed.ok()) {
      if (!lost(resumed.status())) tell(resumed.status().ToString());
      return;
    }
    info = resumed;
  }
  const auto count = static_cast<uint32_t>(stored.words.size());
  if (info->length != count || info->length_max != count) {
    return tell(absl::StrCat("a sequence has ", info->length, " of ", count, " tokens"));
  }
  const Handle handle = {.id = info->id, .generation = info->generation};
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const auto again = engine_->Append(handle, layer, 0, stored.words, stored.tenant);
    if (!again.ok() && lost(again.status())) return;
    if (!again.ok()) return tell(again.status().ToString());
    if (!again->duplicate) return tell("a layer is shorter than its sequence");
  }
  ++result_->checked["sequences_whole"];
}

}  // namespace

CampaignResult RunBitFlips(const BitFlipOptions& options) {
  CampaignResult result;
  for (uint64_t number = 0; result.count < options.flips; ++number) {
    ClosedStoreOfWords store(options.seed + 1'000'003 * number, &result);
    if (!store.is_made()) return result;
    const uint64_t end = std::min(options.flips, result.count + kFlipsPerStore);
    while (result.count < end) store.FlipOnce();
  }
  return result;
}

}  // namespace kvservice::testing
