#include "tests/stress/history.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/kvservice/engine_client.h"
#include "tests/stress/sequence_model.h"

namespace kvservice::testing {
namespace {

constexpr double kLseTolerance = 1e-3;

struct State {
  uint64_t generation = 0;
  bool is_suspended = false;
  Words words;
  friend bool operator<(const State& a, const State& b) {
    return std::tie(a.generation, a.is_suspended, a.words) <
           std::tie(b.generation, b.is_suspended, b.words);
  }
};

double LseOf(const Words& words) {
  // The same words come again in each order that is tried.
  static thread_local std::map<Words, double> known;
  constexpr size_t kKnownMax = 20'000;
  const auto found = known.find(words);
  if (found != known.end()) return found->second;
  if (known.size() >= kKnownMax) known.clear();
  const ModelSpec model = SmallModel(1);
  LayerShape shape;
  shape.layout = model.layout;
  shape.scale = model.scale;
  const double lse = AttendDensely(shape, 0, words, static_cast<uint32_t>(words.size() - 1)).lse[0];
  known.emplace(words, lse);
  return lse;
}

// What a call does to a sequence that is here; nothing if the answer is not what it would be.
class Step {
 public:
  explicit Step(const Operation& operation) : operation_(operation) {}

  std::optional<State> From(const State& state) const {
    // Errors that any call may meet, and that change nothing.
    static const std::set<std::string> kAnytime = {"POOL_FULL", "OVERLOADED", "DISK_BUSY"};
    if (kAnytime.contains(operation_.reason)) return state;
    if (operation_.kind == Operation::Kind::kGet) return Same(state);
    const bool names_memory =
        operation_.kind != Operation::Kind::kSuspend && operation_.kind != Operation::Kind::kResume;
    if (names_memory && state.is_suspended) return Refused(state, "SEQUENCE_SUSPENDED");
    if (operation_.generation != state.generation) {
      const bool is_told = operation_.generation_after == state.generation;
      return is_told ? Refused(state, "GENERATION_MISMATCH") : std::nullopt;
    }
    switch (operation_.kind) {
      case Operation::Kind::kAppend:
      case Operation::Kind::kAttend:
        return Append(state);
      case Operation::Kind::kTruncate:
        return Truncate(state);
      case Operation::Kind::kResume:
        if (!state.is_suspended) return Refused(state, "SEQUENCE_NOT_SUSPENDED");
        return Suspended(state, false, state.generation + 1);
      default:
        return Suspended(state, true, state.generation);
    }
  }

 private:
  std::optional<State> Refused(const State& state, const char* reason) const {
    return operation_.reason == reason ? std::optional(state) : std::nullopt;
  }
  // As SequenceInfo describes it.
  std::optional<State> Same(const State& after) const {
    const bool is_so = operation_.reason.empty() && operation_.length_after == after.words.size() &&
                       operation_.generation_after == after.generation &&
                       operation_.is_suspended == after.is_suspended;
    return is_so ? std::optional(after) : std::nullopt;
  }
  std::optional<State> RefusedAtLength(const State& state, const char* reason) const {
    return operation_.length_after == state.words.size() ? Refused(state, reason) : std::nullopt;
  }

  std::optional<State> Append(const State& state) const {
    const Words& words = operation_.words;
    const uint32_t position = operation_.position;
    if (position > state.words.size()) return RefusedAtLength(state, "POSITION_GAP");
    const size_t known = std::min(words.size(), state.words.size() - position);
    if (!std::equal(words.begin(), words.begin() + static_cast<ptrdiff_t>(known),
                    state.words.begin() + position)) {
      return RefusedAtLength(state, "APPEND_CONFLICT");
    }
    State after = state;
    Store(position, words, &after.words);
    if (!operation_.reason.empty()) return std::nullopt;
    if (operation_.kind == Operation::Kind::kAttend) {
      const Words read(after.words.begin(), after.words.begin() + position + 1);
      return std::abs(LseOf(read) - operation_.lse) < kLseTolerance ? std::optional(after)
                                                                    : std::nullopt;
    }
    const bool is_so = operation_.length_after == after.words.size() &&
                       operation_.is_duplicate == (known == words.size());
    return is_so ? std::optional(after) : std::nullopt;
  }

  std::optional<State> Truncate(const State& state) const {
    if (operation_.position > state.words.size()) {
      return RefusedAtLength(state, "LENGTH_OUT_OF_RANGE");
    }
    State after = state;
    ++after.generation;
    after.words.resize(operation_.position);
    return Same(after);
  }

  std::optional<State> Suspended(const State& state, bool is_suspended, uint64_t generation) const {
    State after = state;
    after.is_suspended = is_suspended;
    after.generation = generation;
    return Same(after);
  }

  const Operation& operation_;
};

class Search {
 public:
  explicit Search(const std::vector<Operation>& history) : history_(history) {}

  // Whether the operations that are not `done` can follow on the state.
  // NOLINTNEXTLINE(misc-no-recursion): as deep as the history is long.
  bool CanFinish(uint64_t done, const State& state) {
    uint64_t first_return = UINT64_MAX;
    for (size_t i = 0; i < history_.size(); ++i) {
      if ((done >> i & 1) == 0) first_return = std::min(first_return, history_[i].returned);
    }
    if (first_return == UINT64_MAX) return true;
    if (!tried_.emplace(done, state).second) return false;
    for (size_t i = 0; i < history_.size(); ++i) {
      if ((done >> i & 1) != 0 || history_[i].called > first_return) continue;
      const std::optional<State> after = Step(history_[i]).From(state);
      if (after.has_value() && CanFinish(done | uint64_t{1} << i, *after)) return true;
    }
    return false;
  }

 private:
  const std::vector<Operation>& history_;
  // From here it could not.
  std::set<std::pair<uint64_t, State>> tried_;
};

}  // namespace

bool IsLinearizable(const std::vector<Operation>& history, uint64_t first_generation) {
  if (history.size() > kHistoryOperationsMax) return false;
  return Search(history).CanFinish(0, {.generation = first_generation, .words = {}});
}

std::string Tell(const Operation& operation) {
  constexpr const char* kKinds[] = {"append", "attend", "truncate", "get", "suspend", "resume"};
  return absl::StrCat("[", operation.called, ",", operation.returned, "] ",
                      kKinds[static_cast<size_t>(operation.kind)], " g", operation.generation, " ",
                      operation.position, " {", absl::StrJoin(operation.words, " "), "} -> ",
                      operation.reason.empty() ? "OK" : operation.reason, " g",
                      operation.generation_after, " ", operation.length_after,
                      operation.is_duplicate ? " duplicate" : "");
}

}  // namespace kvservice::testing
