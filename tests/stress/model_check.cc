#include "tests/stress/model_check.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kvservice/cache/sequence.h"
#include "kvservice/error.h"
#include "selector/policy.h"
#include "tests/stress/sequence_model.h"
#include "tests/stress/stored_engine.h"

namespace kvservice::testing {
namespace {

constexpr uint32_t kSlots = 6;
constexpr uint32_t kProgramCommands = 250;
constexpr uint32_t kShorterRunsMax = 400;
constexpr uint32_t kAppendTokensMax = 90;
constexpr uint32_t kModelsMax = 3;
constexpr uint32_t kPromptTokensMax = 200;
// Words of prompts are above all others.
constexpr uint32_t kPromptWords = 1U << 30;
constexpr double kOutTolerance = 1e-11;
constexpr double kLseTolerance = 1e-4;
constexpr char kTenants[2][8] = {"odd", "even"};

enum class Verb : uint8_t {
  kCreate,
  kAppend,
  kAppendDurably,
  kAttend,
  kAttendGiven,
  kFork,
  kTruncate,
  kGet,
  kList,
  kSuspend,
  kResume,
  kDrop,
  kRegister,
  kReopen,
};
constexpr const char* kVerbs[] = {
    "create", "append", "append durably", "attend", "attend given", "fork",     "truncate",
    "get",    "list",   "suspend",        "resume", "drop",         "register", "reopen"};
// In percent, by verb; what is left creates.
constexpr uint32_t kShares[] = {8, 26, 12, 7, 5, 7, 8, 5, 2, 5, 6, 6, 2, 1};

// Numbers that mean something in any state, so that a program from which commands are left out is
// one too.
struct Command {
  Verb verb = Verb::kCreate;
  uint32_t slot = 0;
  uint32_t a = 0;
  uint32_t b = 0;
  uint32_t c = 0;
};
using Program = std::vector<Command>;

Command AnyCommand(std::mt19937_64* random) {
  Command command;
  uint32_t what = (*random)() % 100;
  for (uint32_t verb = 0; verb < std::size(kShares); ++verb) {
    if (what < kShares[verb]) {
      command.verb = static_cast<Verb>(verb);
      break;
    }
    what -= kShares[verb];
  }
  command.slot = (*random)() % kSlots;
  command.a = static_cast<uint32_t>((*random)());
  command.b = static_cast<uint32_t>((*random)());
  command.c = static_cast<uint32_t>((*random)());
  return command;
}

using Checked = std::map<std::string, uint64_t>;

// An engine and the model beside it.
class Machine {
 public:
  Machine(const ModelCheckOptions& options, uint64_t seed, Checked* checked);

  // What is wrong with the answer; empty if nothing is.
  std::string Do(const Command& command);

 private:
  std::string Create(const Command& command);
  std::string CheckMatch(const ModelSequence& created, const Words& prompt, uint32_t matched) const;
  std::string FillPrompt(const Words& prompt, ModelSequence* slot);
  std::string Append(const Command& command, bool is_durable);
  std::string Attend(const Command& command, bool is_given);
  std::string CheckAttended(const AttendStep& step, const Words& words, uint32_t layer,
                            uint32_t position, const std::vector<uint32_t>& given) const;
  std::string Fork(const Command& command);
  std::string Truncate(const Command& command);
  std::string Get(const Command& command);
  std::string List(const Command& command);
  std::string Suspend(const Command& command);
  std::string Resume(const Command& command);
  std::string Drop(const Command& command);
  std::string Register(const Command& command);
  std::string Reopen();

  // One call in sixteen is another tenant's or has another generation.
  static Caller CallerOf(const Command& command) {
    const uint32_t what = command.c % 32;
    return {.is_foreign = what == 0, .generation_offset = what == 1 ? 1 : what == 2 ? -1 : 0};
  }
  static const char* TenantOf(const ModelSequence& sequence, const Caller& caller) {
    const bool is_first = (sequence.tenant == kTenants[0]) != caller.is_foreign;
    return kTenants[is_first ? 0 : 1];
  }
  static Handle HandleOf(const ModelSequence& sequence, const Caller& caller) {
    Handle handle = sequence.handle;
    handle.generation += static_cast<uint64_t>(static_cast<int64_t>(caller.generation_offset));
    return handle;
  }
  // More is wanted than the pool has: others must leave first, and may not be able to.
  bool IsTight() const {
    uint32_t blocks = 0;
    for (const ModelSequence& sequence : slots_) blocks += sequence.block_count() + 2;
    return blocks > limits_.pool_blocks;
  }
  // Nothing ever has to leave the pool.
  bool IsRoomy() const { return limits_.pool_blocks > limits_.sequences_max * 5; }
  // What a caller who keeps its word appends at a position where nothing is yet.
  uint32_t NewWord(const ModelSequence& sequence, uint32_t position) {
    return position < sequence.declared.size() ? sequence.declared[position] : next_word_++;
  }
  // A reason to refuse a new sequence.
  void ExpectRoom(const std::string& tenant, Expectation* expectation) const;
  std::string CheckInfo(const ModelSequence& sequence, const SequenceInfo& info) const;
  std::string Judge(const Expectation& expectation, const absl::Status& status) {
    ++(*checked_)[status.ok() ? "succeeded" : "refused"];
    if (DetailsOf(status).reason == "POOL_FULL") ++(*checked_)["pool_full"];
    return expectation.Judge(status);
  }

  const ModelCheckOptions options_;
  Checked* const checked_;
  const ModelLimits limits_;
  StoredEngine engine_;
  std::string start_problem_;
  ModelSequence slots_[kSlots];
  std::map<std::string, uint32_t> models_;
  uint32_t next_word_ = 1;
};

StoredEngine::Options EngineOf(const ModelLimits& limits, uint64_t seed) {
  StoredEngine::Options stored;
  const ModelSpec model = SmallModel(kModelLayers);
  stored.engine.pool_bytes = limits.pool_blocks * BlockBytes(model);
  // One engine in three has most rows on the host; a device that is in pieces may need one more.
  if (seed % 3 == 0) {
    const CacheShape shape(model.layout, model.layer_count, {});
    stored.engine.host_pool_bytes = (limits.pool_blocks - 3) * shape.block().rows;
    stored.engine.pool_bytes -= (limits.pool_blocks - 4) * shape.block().rows;
  }
  stored.engine.sequences_max = limits.sequences_max;
  stored.engine.sequences_per_tenant_max = limits.sequences_per_tenant_max;
  stored.engine.sequence_tokens_max = limits.sequence_tokens_max;
  stored.engine.models_max = kModelsMax;
  stored.engine.audit_rate = 0.0;
  stored.layer_count = kModelLayers;
  stored.filesystem.seed = seed;
  return stored;
}

Machine::Machine(const ModelCheckOptions& options, uint64_t seed, Checked* checked)
    : options_(options),
      checked_(checked),
      limits_({.pool_blocks = seed % 2 == 0 ? 8U : 30U}),
      engine_(EngineOf(limits_, seed)) {
  const absl::Status started = engine_.Start();
  if (!started.ok()) start_problem_ = started.ToString();
  models_[kModel] = kModelLayers;
}

std::string Machine::Do(const Command& command) {
  if (!start_problem_.empty()) return start_problem_;
  // Few calls are for sequences that are not there.
  if (!slots_[command.slot].is_there && command.b % 8 != 0) return Create(command);
  switch (command.verb) {
    case Verb::kCreate:
      return Create(command);
    case Verb::kAppend:
      return Append(command, false);
    case Verb::kAppendDurably:
      return Append(command, true);
    case Verb::kAttend:
      return Attend(command, false);
    case Verb::kAttendGiven:
      return Attend(command, true);
    case Verb::kFork:
      return Fork(command);
    case Verb::kTruncate:
      return Truncate(command);
    case Verb::kGet:
      return Get(command);
    case Verb::kList:
      return List(command);
    case Verb::kSuspend:
      return Suspend(command);
    case Verb::kResume:
      return Resume(command);
    case Verb::kDrop:
      return Drop(command);
    case Verb::kRegister:
      return Register(command);
    case Verb::kReopen:
      return Reopen();
  }
  return "";
}

// ---- Sequences ----

void Machine::ExpectRoom(const std::string& tenant, Expectation* expectation) const {
  uint32_t all = 0;
  uint32_t own = 0;
  for (const ModelSequence& sequence : slots_) {
    all += sequence.is_there ? 1 : 0;
    own += sequence.is_there && sequence.tenant == tenant ? 1 : 0;
  }
  expectation->Must(all >= limits_.sequences_max, "SEQUENCES_FULL");
  expectation->Must(own >= limits_.sequences_per_tenant_max, "TENANT_QUOTA");
}

// One of three, of which two have their first block in common.
Words PromptOf(uint32_t choice, uint32_t count) {
  Words words;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t block = i / kBlockTokens;
    words.push_back(kPromptWords + (choice >> block & 1) * 1000 + i);
  }
  return words;
}

std::string Machine::CheckMatch(const ModelSequence& created, const Words& prompt,
                                uint32_t matched) const {
  uint32_t longest = 0;
  uint32_t in_memory = 0;
  for (const ModelSequence& slot : slots_) {
    if (!slot.is_there || slot.tenant != created.tenant) continue;
    longest = std::max(longest, slot.MatchOf(prompt));
    if (!slot.is_suspended) in_memory = std::max(in_memory, slot.MatchOf(prompt));
  }
  if (matched > longest) return absl::StrCat("matched ", matched, " tokens of ", longest);
  if (IsRoomy() && matched != in_memory) {
    return absl::StrCat("matched ", matched, " tokens instead of ", in_memory);
  }
  return "";
}

std::string Machine::Create(const Command& command) {
  ModelSequence& slot = slots_[command.slot];
  if (slot.is_there) return "";
  const std::string tenant = kTenants[command.a % 2];
  CreateOptions options;
  options.model = command.b % 16 == 0 ? "another" : kModel;
  // A prompt that is too long now and then.
  const uint32_t prompt_length = command.b / 16 % 4 == 0 ? 0 : command.c % (kPromptTokensMax + 4);
  const Words prompt = PromptOf(command.a / 2 % 3, prompt_length);
  options.token_ids = prompt;
  Expectation expectation;
  expectation.Must(command.b % 16 == 0, "MODEL_NOT_FOUND");
  expectation.Must(prompt_length > limits_.sequence_tokens_max, "SEQUENCE_TOO_LONG");
  ExpectRoom(tenant, &expectation);
  const auto made = engine_->Create(options, tenant);
  std::string problem = Judge(expectation, made.status());
  if (!problem.empty() || !made.ok()) return problem;
  ModelSequence created = {
      .tenant = tenant, .handle = {made->id, made->generation}, .layers = {}, .declared = prompt};
  created.is_there = true;
  problem = CheckMatch(created, prompt, made->matched_tokens);
  if (!problem.empty()) return problem;
  for (Words& layer : created.layers) {
    layer.assign(prompt.begin(), prompt.begin() + made->matched_tokens);
  }
  created.CutDeclared(prompt_length);
  if (made->matched_tokens > 0) ++(*checked_)["matched"];
  slot = std::move(created);
  problem = CheckInfo(slot, *made);
  // Most prompts are there before anything else happens.
  const bool fills = problem.empty() && command.b / 64 % 4 != 0;
  return fills ? FillPrompt(prompt, &slot) : problem;
}

std::string Machine::FillPrompt(const Words& prompt, ModelSequence* slot) {
  const auto matched = static_cast<uint32_t>(slot->layers[0].size());
  if (matched == prompt.size()) return "";
  const Words rest(prompt.begin() + matched, prompt.end());
  for (uint32_t layer = 0; layer < kModelLayers; ++layer) {
    Expectation expectation;
    expectation.May(IsTight(), "POOL_FULL");
    const auto appended = engine_->Append(slot->handle, layer, matched, rest, slot->tenant);
    std::string problem = Judge(expectation, appended.status());
    if (!problem.empty()) return problem;
    if (appended.ok()) Store(matched, rest, &slot->layers[layer]);
  }
  return "";
}

std::string Machine::CheckInfo(const ModelSequence& sequence, const SequenceInfo& info) const {
  if (info.length != sequence.length() || info.length_max != sequence.length_max()) {
    return absl::StrCat("has lengths ", info.length, " to ", info.length_max, " instead of ",
                        sequence.length(), " to ", sequence.length_max());
  }
  if (info.generation != sequence.handle.generation) return "has another generation";
  if (info.is_suspended != sequence.is_suspended) return "is suspended, or is not";
  if (info.tenant != sequence.tenant || info.model != kModel) return "is another's";
  const bool has_blocks = info.tier == SequenceTier::kMemory;
  if (has_blocks && info.block_count != sequence.block_count()) return "has other blocks";
  return "";
}

std::string Machine::Get(const Command& command) {
  const ModelSequence& slot = slots_[command.slot];
  const Caller caller = {.is_foreign = CallerOf(command).is_foreign};
  const auto info = engine_->Get(slot.handle, TenantOf(slot, caller));
  if (info.ok() && info->tier == SequenceTier::kDisk) ++(*checked_)["seen_on_disk"];
  std::string problem = Judge(NamesSequence(slot, caller, false), info.status());
  return problem.empty() && info.ok() ? CheckInfo(slot, *info) : problem;
}

std::string Machine::List(const Command& command) {
  const std::string tenant = kTenants[command.a % 2];
  size_t expected = 0;
  for (const ModelSequence& slot : slots_) expected += slot.is_there && slot.tenant == tenant;
  const std::vector<SequenceInfo> listed = engine_->List(tenant);
  for (const SequenceInfo& info : listed) {
    const auto* const slot =
        std::find_if(std::begin(slots_), std::end(slots_), [&](const ModelSequence& candidate) {
          return candidate.is_there && candidate.handle.id == info.id && candidate.tenant == tenant;
        });
    if (slot == std::end(slots_)) return "lists a sequence that is not there";
    std::string problem = CheckInfo(*slot, info);
    if (!problem.empty()) return problem;
  }
  return listed.size() == expected ? "" : "lists fewer sequences than there are";
}

std::string Machine::Append(const Command& command, bool is_durable) {
  ModelSequence& slot = slots_[command.slot];
  const Caller caller = CallerOf(command);
  const uint32_t layer = command.b % 32 == 0 ? kModelLayers : command.b % kModelLayers;
  Words* const stored = layer < kModelLayers ? &slot.layers[layer] : nullptr;
  const auto length = static_cast<uint32_t>(stored == nullptr ? 0 : stored->size());
  // Most go behind the end, some repeat, some leave a hole.
  const uint32_t how = command.a % 16;
  uint32_t position = length;
  if (how == 0) position = length + 1 + command.a / 16 % 70;
  if (how == 1 || how == 2) position = command.a / 16 % (length + 1);
  const uint32_t count = 1 + command.b / 32 % kAppendTokensMax;
  Words words;
  for (uint32_t i = 0; i < count; ++i) {
    const bool repeats = position + i < length && !(how == 2 && i == count - 1);
    const bool is_new = position + i >= length;
    words.push_back(repeats  ? (*stored)[position + i]
                    : is_new ? NewWord(slot, position + i)
                             : next_word_++);
  }
  Expectation expectation = NamesSequence(slot, caller, true);
  if (slot.is_there) ExpectAppend(slot, limits_, layer, position, words, &expectation);
  expectation.May(IsTight(), "POOL_FULL");
  const Handle handle = HandleOf(slot, caller);
  const char* const tenant = TenantOf(slot, caller);
  const auto appended = is_durable ? engine_->AppendDurably(handle, layer, position, words, tenant)
                                   : engine_->Append(handle, layer, position, words, tenant);
  std::string problem = Judge(expectation, appended.status());
  if (!problem.empty() || !appended.ok()) return problem;
  if (appended->duplicate != IsStored(*stored, position, words)) return "is a duplicate, or is not";
  Store(position, words, stored);
  return appended->layer_length == stored->size() ? "" : "has another length";
}

std::string Machine::Fork(const Command& command) {
  ModelSequence& child = slots_[command.b % kSlots];
  const ModelSequence& slot = slots_[command.slot];
  if (child.is_there) return "";
  const Caller caller = CallerOf(command);
  const uint32_t common = slot.length();
  const uint32_t length = command.a % 3 == 0 ? UINT32_MAX : command.a / 3 % (common + 4);
  Expectation expectation = NamesSequence(slot, caller, true);
  if (slot.is_there && !caller.is_foreign) {
    expectation.Must(length != UINT32_MAX && length > common, "LENGTH_OUT_OF_RANGE");
    ExpectRoom(slot.tenant, &expectation);
  }
  expectation.May(IsTight(), "POOL_FULL");
  const auto made = engine_->Fork(HandleOf(slot, caller), length, TenantOf(slot, caller));
  std::string problem = Judge(expectation, made.status());
  if (!problem.empty() || !made.ok()) return problem;
  ModelSequence forked = slot;
  forked.handle = {made->id, made->generation};
  for (Words& layer : forked.layers) layer.resize(std::min(length, common));
  forked.CutDeclared(std::min(length, common));
  child = std::move(forked);
  return CheckInfo(child, *made);
}

std::string Machine::Truncate(const Command& command) {
  ModelSequence& slot = slots_[command.slot];
  const Caller caller = CallerOf(command);
  const uint32_t length = command.a % (slot.length_max() + 3);
  Expectation expectation = NamesSequence(slot, caller, true);
  expectation.Must(slot.is_there && !caller.is_foreign && length > slot.length_max(),
                   "LENGTH_OUT_OF_RANGE");
  expectation.May(IsTight(), "POOL_FULL");
  const auto cut = engine_->Truncate(HandleOf(slot, caller), length, TenantOf(slot, caller));
  std::string problem = Judge(expectation, cut.status());
  if (!problem.empty() || !cut.ok()) return problem;
  if (cut->generation <= slot.handle.generation) return "the generation did not go up";
  slot.handle.generation = cut->generation;
  slot.CutDeclared(length);
  const uint32_t kept = length + (options_.is_mistaken ? 1 : 0);
  for (Words& layer : slot.layers) layer.resize(std::min<size_t>(layer.size(), kept));
  return CheckInfo(slot, *cut);
}

std::string Machine::Suspend(const Command& command) {
  ModelSequence& slot = slots_[command.slot];
  const Caller caller = CallerOf(command);
  const auto done = engine_->Suspend(HandleOf(slot, caller), TenantOf(slot, caller));
  std::string problem = Judge(NamesSequence(slot, caller, false), done.status());
  if (!problem.empty() || !done.ok()) return problem;
  slot.is_suspended = true;
  return CheckInfo(slot, *done);
}

std::string Machine::Resume(const Command& command) {
  ModelSequence& slot = slots_[command.slot];
  const Caller caller = CallerOf(command);
  Expectation expectation = NamesSequence(slot, caller, false);
  expectation.Must(slot.is_there && !caller.is_foreign && !slot.is_suspended,
                   "SEQUENCE_NOT_SUSPENDED");
  expectation.May(IsTight(), "POOL_FULL");
  const auto done = engine_->Resume(HandleOf(slot, caller), TenantOf(slot, caller));
  std::string problem = Judge(expectation, done.status());
  if (!problem.empty() || !done.ok()) return problem;
  if (done->generation <= slot.handle.generation) return "the generation did not go up";
  slot.handle.generation = done->generation;
  slot.is_suspended = false;
  return CheckInfo(slot, *done);
}

std::string Machine::Drop(const Command& command) {
  ModelSequence& slot = slots_[command.slot];
  const Caller caller = {.is_foreign = CallerOf(command).is_foreign};
  const auto dropped = engine_->Drop(slot.handle, TenantOf(slot, caller));
  std::string problem = Judge(NamesSequence(slot, caller, false), dropped.status());
  if (!problem.empty() || !dropped.ok()) return problem;
  problem = CheckInfo(slot, *dropped);
  // The handle stays, for calls to come.
  slot.is_there = slot.is_suspended = false;
  slot.layers = {};
  slot.declared = {};
  return problem;
}

// ---- Attention ----

std::string Machine::Attend(const Command& command, bool is_given) {
  ModelSequence& slot = slots_[command.slot];
  const Caller caller = CallerOf(command);
  const uint32_t layer = command.b % kModelLayers;
  Words& stored = slot.layers[layer];
  const auto length = static_cast<uint32_t>(stored.size());
  const uint32_t position = length + (command.a % 16 == 0 ? 1 : 0);
  const Words query = {NewWord(slot, position)};
  std::vector<uint32_t> given;
  for (uint32_t token = command.c % 7; token < length; token += 1 + command.a % 41) {
    given.push_back(token);
  }
  // The same for both KV heads.
  std::vector<uint32_t> positions = given;
  positions.insert(positions.end(), given.begin(), given.end());
  const auto given_count = static_cast<uint32_t>(given.size());
  const std::vector<uint32_t> offsets = {0, given_count, 2 * given_count};
  Policy policy = DefaultPolicy(is_given ? SelectorKind::kGiven : SelectorKind::kDense);
  policy.layers.clear();
  policy.budget = {.sink = 0, .local = 0, .top_k = is_given ? 0U : 1U};

  AttendStep step(engine_->model(), layer, TenantOf(slot, caller));
  step.Add(HandleOf(slot, caller), position, query);
  step.call.rows[0].policy = &policy;
  if (is_given) {
    step.call.rows[0].given = positions;
    step.call.rows[0].given_offsets = offsets;
  }
  step.call.want_selected = true;
  Expectation expectation = NamesSequence(slot, caller, true);
  if (slot.is_there) ExpectAppend(slot, limits_, layer, position, query, &expectation);
  expectation.May(IsTight(), "POOL_FULL");
  absl::Status status = step.Run(engine_->get());
  if (status.ok()) status = step.result(0).status;
  std::string problem = Judge(expectation, status);
  if (!problem.empty() || !status.ok()) return problem;
  Store(position, query, &stored);
  return CheckAttended(step, stored, layer, position, given);
}

// `given` is read at least, and nothing beyond it but the first tokens and the last block: or
// everything, if the selector is dense. The output is that of dense attention over what was read.
std::string Machine::CheckAttended(const AttendStep& step, const Words& words, uint32_t layer,
                                   uint32_t position, const std::vector<uint32_t>& given) const {
  constexpr uint32_t kFirst = 8;
  const AttendRowResult& result = step.result(0);
  const ModelSpec& model = engine_->model();
  const uint32_t group = model.layout.query_head_count / model.layout.kv_head_count;
  const bool is_dense = result.selector == SelectorKind::kDense;
  LayerShape shape;
  shape.layout = model.layout;
  shape.scale = model.scale;
  if (result.attended_length != position + 1) return "attends to another length";
  for (uint32_t kv_head = 0; kv_head < model.layout.kv_head_count; ++kv_head) {
    std::vector<uint32_t> selected;
    if (is_dense) {
      for (uint32_t token = 0; token <= position; ++token) selected.push_back(token);
    } else {
      selected = result.selected[kv_head];
    }
    if (selected.empty() || selected.back() != position) return "does not read the last token";
    if (!std::includes(selected.begin(), selected.end(), given.begin(), given.end())) {
      return "does not read what was given";
    }
    Words read;
    for (const uint32_t token : selected) {
      const bool may_be = is_dense || token < kFirst || token + kBlockTokens > position ||
                          std::binary_search(given.begin(), given.end(), token);
      if (!may_be) return "reads what was not given";
      read.push_back(words[token]);
    }
    const DenseAnswer answer =
        AttendDensely(shape, layer, read, static_cast<uint32_t>(read.size() - 1));
    const uint32_t dim = model.layout.head_dim;
    for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const auto out = step.Out(0).subspan(size_t{head} * dim, dim);
      const auto expected = absl::MakeConstSpan(answer.out).subspan(size_t{head} * dim, dim);
      if (NormalizedSquaredError(out, expected) > kOutTolerance) return "has another output";
      if (std::abs(step.Lse(0)[head] - answer.lse[head]) > kLseTolerance) return "has another lse";
    }
  }
  ++(*checked_)["outputs"];
  return "";
}

// ---- The server ----

std::string Machine::Register(const Command& command) {
  ModelSpec spec = SmallModel(command.a % 4 == 0 ? kModelLayers + 1 : kModelLayers);
  spec.name = command.b % 5 == 0 ? kModel : absl::StrCat("model", command.b % 5);
  const auto known = models_.find(spec.name);
  Expectation expectation;
  if (known != models_.end()) {
    expectation.Must(known->second != spec.layer_count, "MODEL_EXISTS");
  } else {
    expectation.Must(models_.size() >= kModelsMax, "MODELS_FULL");
  }
  const auto done = engine_->get()->RegisterModel(spec);
  std::string problem = Judge(expectation, done.status());
  if (done.ok()) models_[spec.name] = spec.layer_count;
  return problem;
}

// Whatever there was comes back, under the same handles.
std::string Machine::Reopen() {
  engine_.Stop();
  const absl::Status started = engine_.Start();
  if (!started.ok()) {
    start_problem_ = started.ToString();
    return start_problem_;
  }
  ++(*checked_)["reopens"];
  // Models without sequences are gone.
  models_.clear();
  models_[kModel] = kModelLayers;
  for (ModelSequence& slot : slots_) {
    if (!slot.is_there) continue;
    // Nobody remembers what it was created with.
    slot.declared = {};
    const auto info = engine_->Get(slot.handle, slot.tenant);
    if (!info.ok()) return info.status().ToString();
    std::string problem = CheckInfo(slot, *info);
    if (!problem.empty()) return absl::StrCat("after reopening: ", problem);
  }
  return "";
}

// ---- Programs ----

struct Outcome {
  size_t commands_run = 0;
  std::string problem;
};

Outcome RunProgram(const ModelCheckOptions& options, uint64_t seed, const Program& program,
                   Checked* checked) {
  Machine machine(options, seed, checked);
  Outcome outcome;
  for (const Command& command : program) {
    outcome.problem = machine.Do(command);
    ++outcome.commands_run;
    if (!outcome.problem.empty()) {
      const auto verb = static_cast<size_t>(command.verb);
      outcome.problem = absl::StrCat(kVerbs[verb], " ", outcome.problem);
      break;
    }
  }
  return outcome;
}

// Leaves out commands, in ever smaller pieces, as long as something still goes wrong.
Program Shorten(const ModelCheckOptions& options, uint64_t seed, Program program,
                std::string* problem) {
  Checked unused;
  uint32_t runs = 0;
  size_t piece = program.size() / 2;
  while (piece > 0 && runs < kShorterRunsMax) {
    bool is_shorter = false;
    for (size_t begin = 0; begin < program.size() && runs < kShorterRunsMax;) {
      Program shorter(program.begin(), program.begin() + static_cast<ptrdiff_t>(begin));
      const size_t end = std::min(program.size(), begin + piece);
      shorter.insert(shorter.end(), program.begin() + static_cast<ptrdiff_t>(end), program.end());
      ++runs;
      const Outcome outcome = RunProgram(options, seed, shorter, &unused);
      if (outcome.problem.empty()) {
        begin = end;
        continue;
      }
      *problem = outcome.problem;
      shorter.resize(outcome.commands_run);
      program = std::move(shorter);
      is_shorter = true;
    }
    if (!is_shorter || piece > program.size()) piece /= 2;
  }
  return program;
}

std::string Tell(const Program& program) {
  std::string text;
  for (const Command& command : program) {
    absl::StrAppend(&text, text.empty() ? "" : "; ", kVerbs[static_cast<size_t>(command.verb)], " ",
                    command.slot, " (", command.a, " ", command.b, " ", command.c, ")");
  }
  return text;
}

// A device in pieces, none of which the next block's sketches fitted: a call was refused with
// POOL_FULL though most of the memory was free, and rows could have gone to the host.
const Program kInPieces = {
    {Verb::kAttendGiven, 4, 2946905039, 2081798266, 3255102617},
    {Verb::kResume, 1, 1674221152, 3968289940, 4166902946},
    {Verb::kAppendDurably, 0, 3196698161, 3130228490, 47285254},
    {Verb::kSuspend, 1, 3752474643, 1417095308, 3429407818},
    {Verb::kAppendDurably, 0, 3510680572, 906110870, 765053555},
    {Verb::kAppend, 4, 3025420861, 310748109, 567059098},
    {Verb::kAppendDurably, 2, 1301337858, 1577890642, 324467467},
    {Verb::kResume, 1, 3134800606, 256098991, 1357989851},
    {Verb::kAppend, 3, 2930073723, 2371817451, 3288739329},
    {Verb::kDrop, 3, 1038358539, 2107404290, 3357791792},
    {Verb::kDrop, 2, 537176798, 528115276, 2511090841},
    {Verb::kTruncate, 4, 131140984, 1082064498, 2025233982},
    {Verb::kCreate, 5, 571518930, 2920556680, 2858851466},
    {Verb::kDrop, 0, 2753926180, 1949492742, 2139021369},
    {Verb::kTruncate, 2, 2270879501, 259554073, 51222102},
    {Verb::kDrop, 4, 1530131542, 3267673925, 3100847294},
    {Verb::kAttendGiven, 3, 267259942, 979005853, 2191275578},
    {Verb::kGet, 0, 2456990827, 2295312500, 188713387},
    {Verb::kAppend, 0, 3867771491, 3067761911, 59128428},
    {Verb::kAppendDurably, 2, 747308984, 2101204280, 2458470285},
    {Verb::kAttend, 5, 3871205356, 3065705143, 2989939523},
};
// Many rows are on the host, and nothing need ever leave.
constexpr uint64_t kInPiecesSeed = 3;

}  // namespace

CampaignResult RunKnownPrograms() {
  CampaignResult result;
  const Outcome outcome = RunProgram({}, kInPiecesSeed, kInPieces, &result.checked);
  result.count += outcome.commands_run;
  if (!outcome.problem.empty()) result.Fail(outcome.problem);
  return result;
}

CampaignResult RunModelCheck(const ModelCheckOptions& options) {
  constexpr uint64_t kFailuresMax = 4;
  CampaignResult result;
  std::mt19937_64 random(options.seed);
  for (uint64_t number = 0; result.count < options.commands && result.failures < kFailuresMax;
       ++number) {
    Program program;
    while (program.size() < kProgramCommands) program.push_back(AnyCommand(&random));
    const uint64_t seed = options.seed + number;
    Outcome outcome = RunProgram(options, seed, program, &result.checked);
    result.count += outcome.commands_run;
    ++result.checked["programs"];
    if (outcome.problem.empty()) continue;
    program.resize(outcome.commands_run);
    const Program shorter = Shorten(options, seed, program, &outcome.problem);
    result.checked["shortest"] = shorter.size();
    result.Fail(absl::StrCat(outcome.problem, ", after: ", Tell(shorter)));
  }
  return result;
}

}  // namespace kvservice::testing
