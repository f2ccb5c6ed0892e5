#include "tests/eval/served_prompt.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/sketch.h"
#include "kvservice/clock.h"
#include "tests/eval/contender.h"
#include "tests/kvservice/fakes.h"

namespace kvservice::eval {
namespace {

constexpr char kTenant[] = "study";
constexpr uint32_t kChunkTokens = kQuerySampleTokensMax;

std::string ModelName(bool unrotated) { return unrotated ? "study" : "study-as-received"; }

size_t PoolBytes(const DecoderShape& shape, uint32_t prompt_length,
                 const ServedPrompt::Options& options) {
  const KvLayout layout = LayoutOf(shape);
  const size_t block_bytes =
      shape.layer_count *
      (layout.slice_bytes() + SketchLayout(layout.head_dim).slice_bytes(layout.kv_head_count));
  // A fork copies its base's open block.
  const size_t blocks = options.base_count * (BlockCount(prompt_length) + 1) +
                        options.fork_count * (BlockCount(options.steps_max) + 2);
  return (blocks + 8) * (block_bytes + 4096);
}

// Waits for one answer of the engine.
template <typename T>
absl::StatusOr<T> Await(const std::function<void(Done<T>)>& call) {
  std::promise<absl::StatusOr<T>> promise;
  std::future<absl::StatusOr<T>> answer = promise.get_future();
  call([&promise](absl::StatusOr<T> result) { promise.set_value(std::move(result)); });
  return answer.get();
}

// [kv_head][token][head_dim] to [token][kv_head][head_dim], tokens [first, first + count).
std::vector<uint16_t> ByToken(const DecoderShape& shape, const std::vector<uint16_t>& by_head,
                              size_t length, size_t first, size_t count) {
  std::vector<uint16_t> by_token(count * shape.kv_head_count * shape.head_dim);
  uint16_t* to = by_token.data();
  for (size_t token = first; token < first + count; ++token) {
    for (uint32_t head = 0; head < shape.kv_head_count; ++head) {
      std::memcpy(to, &by_head[(head * length + token) * shape.head_dim], 2 * shape.head_dim);
      to += shape.head_dim;
    }
  }
  return by_token;
}

}  // namespace

ServedPrompt::ServedPrompt(const DecoderShape& shape, const SharedPrompt& prompt)
    : shape_(shape), prompt_(prompt) {}
ServedPrompt::~ServedPrompt() = default;

absl::StatusOr<std::unique_ptr<ServedPrompt>> ServedPrompt::Make(
    const DecoderShape& shape, const SharedPrompt& prompt, absl::Span<const SketchTable> tables,
    const Options& options) {
  auto served = std::unique_ptr<ServedPrompt>(new ServedPrompt(shape, prompt));
  served->random_ = std::make_unique<testing::SeededRandom>(options.seed);
  DeviceOptions device_options;
  device_options.thread_count = 1;
  auto device = NewDevice("cpu", device_options);
  if (!device.ok()) return device.status();
  EngineOptions engine_options;
  engine_options.pool_bytes = PoolBytes(shape, prompt.length(), options);
  engine_options.seed_bytes_per_sequence_max = size_t{1} << 30;
  engine_options.rows_max =
      std::max(engine_options.rows_max, static_cast<uint32_t>(options.fork_count));
  engine_options.audit_rate = 0.0;
  engine_options.query_bytes_per_sequence_max = 0;
  engine_options.list_bytes_per_sequence_max = size_t{1} << 30;
  auto engine = NewEngine(engine_options, std::move(*device), SystemClock(), served->random_.get());
  if (!engine.ok()) return engine.status();
  served->engine_ = std::move(*engine);
  for (const bool unrotated : {false, true}) {
    ModelSpec spec;
    spec.name = ModelName(unrotated);
    spec.layer_count = shape.layer_count;
    spec.layout = LayoutOf(shape);
    spec.scale = shape.scale;
    spec.sliding_windows = shape.windows;
    spec.sketch_tables.assign(tables.begin(), tables.end());
    if (unrotated) {
      // Windowed layers may turn at another speed; they are dense, so it does not matter.
      const auto global = std::find(shape.windows.begin(), shape.windows.end(), 0U);
      spec.inverse_frequencies =
          shape.inverse_frequencies[static_cast<size_t>(global - shape.windows.begin())];
      spec.rotary_style = RotaryStyle::kHalf;
    }
    const auto registered = served->engine_->RegisterModel(std::move(spec));
    if (!registered.ok()) return registered.status();
  }
  return served;
}

absl::Status ServedPrompt::AppendLayer(const ServedSequence& sequence, uint32_t layer,
                                       bool seeded) {
  const PromptLayer& cached = prompt_.cache().layers[layer];
  const size_t length = prompt_.length();
  const size_t sampled_begin = seeded ? length - prompt_.cache().query_count : length;
  const size_t query_floats = size_t{shape_.query_head_count} * shape_.head_dim;
  for (size_t first = 0; first < length; first += kChunkTokens) {
    const size_t count = std::min<size_t>(kChunkTokens, length - first);
    const std::vector<uint16_t> k = ByToken(shape_, cached.k, length, first, count);
    const std::vector<uint16_t> v = ByToken(shape_, cached.v, length, first, count);
    const std::vector<int64_t> extents = {static_cast<int64_t>(count), shape_.kv_head_count,
                                          shape_.head_dim};
    const auto view = [&](const std::vector<uint16_t>& bits, std::string_view field) {
      return TensorView{.dtype = DType::kBfloat16,
                        .shape = extents,
                        .bytes = {reinterpret_cast<const std::byte*>(bits.data()), 2 * bits.size()},
                        .field = field};
    };
    AppendCall call{.tenant = kTenant,
                    .id = sequence.id,
                    .generation = sequence.generation,
                    .layer = layer,
                    .position = static_cast<uint32_t>(first),
                    .k = view(k, "k"),
                    .v = view(v, "v")};
    std::vector<uint32_t> positions;
    for (size_t at = std::max(first, sampled_begin); at < first + count; ++at) {
      positions.push_back(static_cast<uint32_t>(at));
    }
    const std::vector<int64_t> sample_extents = {static_cast<int64_t>(positions.size()),
                                                 shape_.query_head_count, shape_.head_dim};
    if (!positions.empty()) {
      const float* sample = &cached.queries[(positions[0] - sampled_begin) * query_floats];
      call.query_sample = TensorView{.dtype = DType::kFloat32,
                                     .shape = sample_extents,
                                     .bytes = {reinterpret_cast<const std::byte*>(sample),
                                               positions.size() * query_floats * sizeof(float)},
                                     .field = "query_sample"};
      call.query_sample_positions = positions;
    }
    const auto appended = Await<AppendResult>(
        [&](Done<AppendResult> done) { engine_->Append(std::move(call), std::move(done)); });
    if (!appended.ok()) return appended.status();
  }
  return absl::OkStatus();
}

absl::StatusOr<ServedSequence> ServedPrompt::MakeBase(bool seeded, bool unrotated) {
  const auto created = Await<SequenceInfo>([&](Done<SequenceInfo> done) {
    CreateOptions options;
    options.model = ModelName(unrotated);
    engine_->Create(kTenant, std::move(options), std::move(done));
  });
  if (!created.ok()) return created.status();
  const ServedSequence sequence{.id = created->id, .generation = created->generation};
  for (uint32_t layer = 0; layer < shape_.layer_count; ++layer) {
    // Layers that are dense for everybody have no anchors.
    const bool has_anchors = layer >= kStudyDenseLayers && shape_.windows[layer] == 0;
    const absl::Status status = AppendLayer(sequence, layer, seeded && has_anchors);
    if (!status.ok()) return status;
  }
  return sequence;
}

absl::StatusOr<ServedSequence> ServedPrompt::Fork(bool seeded, bool unrotated) {
  Base& base = bases_[seeded ? 1 : 0][unrotated ? 1 : 0];
  if (!base.is_made) {
    auto made = MakeBase(seeded, unrotated);
    if (!made.ok()) return made.status();
    base = {.is_made = true, .sequence = *made};
  }
  const auto forked = Await<SequenceInfo>([&](Done<SequenceInfo> done) {
    engine_->Fork(kTenant, base.sequence.id, base.sequence.generation, UINT32_MAX, 0,
                  std::move(done));
  });
  if (!forked.ok()) return forked.status();
  return ServedSequence{.id = forked->id, .generation = forked->generation};
}

absl::StatusOr<uint64_t> ServedPrompt::CountSeedScans(const ServedSequence& sequence) {
  const auto info = Await<SequenceInfo>(
      [&](Done<SequenceInfo> done) { engine_->Get(kTenant, sequence.id, std::move(done)); });
  if (!info.ok()) return info.status();
  return info->stats.anchor_seed_scans;
}

absl::Status ServedPrompt::Attend(AttendCall* call) {
  call->tenant = kTenant;
  std::promise<absl::Status> promise;
  std::future<absl::Status> answer = promise.get_future();
  call->done = [&promise](absl::Status status) { promise.set_value(std::move(status)); };
  engine_->Attend(call);
  absl::Status status = answer.get();
  for (size_t row = 0; status.ok() && row < call->results.size(); ++row) {
    if (!call->results[row].status.ok()) status = call->results[row].status;
  }
  return status;
}

}  // namespace kvservice::eval
