#include "tests/stress/restart.h"

#include <chrono>
#include <future>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kvservice/engine.h"
#include "kvservice/random.h"
#include "tests/kvservice/engine_client.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

using Milliseconds = std::chrono::duration<double, std::milli>;

constexpr uint64_t kMib = uint64_t{1} << 20;
constexpr uint64_t kSequenceMib = 64;
constexpr uint32_t kTokensAtOnce = 512;
constexpr double kMillisecondsMax = 5000;

// Eight layers of 8 KV heads of 128 channels: 32 KiB a token.
ModelSpec LargeModel() {
  ModelSpec model;
  model.name = "large";
  model.layer_count = 8;
  model.layout = {
      .query_head_count = 32, .kv_head_count = 8, .head_dim = 128, .dtype = DType::kBfloat16};
  model.scale = 0.0883883F;
  model.default_policy = DefaultPolicy(SelectorKind::kDense);
  return model;
}

template <typename T, typename Call>
absl::StatusOr<T> Await(Call call) {
  std::promise<absl::StatusOr<T>> promise;
  call([&](absl::StatusOr<T> result) { promise.set_value(std::move(result)); });
  return promise.get_future().get();
}

std::vector<std::byte> Noise(const KvLayout& layout, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(size_t{kTokensAtOnce} * layout.kv_head_count *
                               layout.vector_bytes());
  // Finite bfloat16 below 2 in size.
  for (size_t i = 0; i < bytes.size(); i += 2) {
    const uint64_t bits = random();
    bytes[i] = static_cast<std::byte>(bits);
    bytes[i + 1] = static_cast<std::byte>(((bits >> 8) & 0x80) | 0x3f);
  }
  return bytes;
}

class Store {
 public:
  Store(const RestartOptions& options, std::string folder)
      : options_(options), folder_(std::move(folder)) {}

  absl::Status Open() {
    EngineOptions engine;
    engine.pool_bytes = 256 * kMib;
    engine.data_directory = folder_;
    engine.disk_bytes_max = 2 * options_.gib * 1024 * kMib;
    engine.audit_rate = 0.0;
    auto made = NewEngine(engine, *NewDevice("cpu", {}), SystemClock(), SystemRandom());
    if (!made.ok()) return made.status();
    engine_ = *std::move(made);
    return engine_->RegisterModel(model_).status();
  }
  void Close() { engine_.reset(); }

  absl::Status Add(uint64_t seed);
  // The outputs of one query over all tokens of the first sequence.
  absl::StatusOr<std::vector<float>> AttendFirst();

 private:
  const RestartOptions options_;
  const std::string folder_;
  const ModelSpec model_ = LargeModel();
  std::unique_ptr<Engine> engine_;
  std::vector<Handle> handles_;
  uint32_t token_count_ = 0;
};

absl::Status Store::Add(uint64_t seed) {
  CreateOptions create;
  create.model = model_.name;
  const auto made =
      Await<SequenceInfo>([&](auto done) { engine_->Create(kTenant, create, std::move(done)); });
  if (!made.ok()) return made.status();
  handles_.push_back({.id = made->id, .generation = made->generation});
  const KvLayout& layout = model_.layout;
  const std::vector<std::byte> noise = Noise(layout, seed);
  const std::vector<int64_t> shape = {kTokensAtOnce, layout.kv_head_count, layout.head_dim};
  const uint64_t token_bytes =
      uint64_t{model_.layer_count} * layout.kv_head_count * layout.row_bytes();
  token_count_ = static_cast<uint32_t>(kSequenceMib * kMib / token_bytes);
  for (uint32_t position = 0; position < token_count_; position += kTokensAtOnce) {
    for (uint32_t layer = 0; layer < model_.layer_count; ++layer) {
      AppendCall call;
      call.tenant = kTenant;
      call.id = made->id;
      call.generation = made->generation;
      call.layer = layer;
      call.position = position;
      call.k = {.dtype = layout.dtype, .shape = shape, .bytes = noise, .field = "k"};
      call.v = call.k;
      call.is_durable = layer + 1 == model_.layer_count;
      const auto stored =
          Await<AppendResult>([&](auto done) { engine_->Append(call, std::move(done)); });
      if (!stored.ok()) return stored.status();
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Store::AttendFirst() {
  AttendStep step(model_, 0);
  step.Add(handles_.front(), token_count_ - 1, {1}).OnlyRead();
  const absl::Status status = step.Run(engine_.get());
  if (!status.ok()) return status;
  if (!step.result(0).status.ok()) return step.result(0).status;
  return step.call.out;
}

absl::Status Measure(const RestartOptions& options, CampaignResult* result) {
  const TemporaryFolder folder;
  Store store(options, folder.path() + "/store");
  absl::Status status = store.Open();
  for (uint64_t i = 0; i < options.gib * 1024 / kSequenceMib && status.ok(); ++i) {
    status = store.Add(options.seed + i);
  }
  if (!status.ok()) return status;
  const auto before = store.AttendFirst();
  if (!before.ok()) return before.status();
  store.Close();

  const auto begin = std::chrono::steady_clock::now();
  status = store.Open();
  if (!status.ok()) return status;
  const Milliseconds opened = std::chrono::steady_clock::now() - begin;
  const auto after = store.AttendFirst();
  const Milliseconds answered = std::chrono::steady_clock::now() - begin;
  if (!after.ok()) return after.status();
  if (*after != *before) result->Fail("the first answer is not that of before");
  if (answered.count() >= kMillisecondsMax) {
    result->Fail(absl::StrCat("the first answer took ", answered.count(), " ms"));
  }
  result->checked["open_ms"] = static_cast<uint64_t>(opened.count());
  result->checked["first_attend_ms"] = static_cast<uint64_t>(answered.count());
  result->count = options.gib;
  return absl::OkStatus();
}

}  // namespace

CampaignResult RunRestart(const RestartOptions& options) {
  CampaignResult result;
  const absl::Status status = Measure(options, &result);
  if (!status.ok()) result.Fail(status.ToString());
  return result;
}

}  // namespace kvservice::testing
