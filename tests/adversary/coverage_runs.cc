#include "tests/adversary/coverage_runs.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/device.h"
#include "attention/float16.h"
#include "tests/adversary/attack.h"
#include "tests/adversary/device_call.h"
#include "tests/adversary/layer_case.h"

namespace kvservice::adversary {
namespace {

constexpr std::array<double, 3> kEtas = {0.05, 1e-2, 1e-3};
constexpr uint32_t kDim = 64;
constexpr uint32_t kGroup = 16;
constexpr uint32_t kLength = 2120;
constexpr uint32_t kLocal = 64;
// Width of a cell, and the nats that a whole cell in every channel is worth: a token at the far
// corner of its cells weighs e^-kCellNats of its bound, one at the near corner all of it.
constexpr float kCell = 0.125F;
constexpr float kCellNats = 4.0F;
constexpr float kCorner = 0.4999F;

// How a population is made. A token's estimate is raised by whole codes, `spread_nats` at most; a
// token is *tight* if its weight is that of its bound, else it weighs next to nothing.
struct PopulationSpec {
  std::string name;
  float tight_share = 0.0F;
  float spread_nats = 0.0F;
  // Only tokens with the lowest (-1) or highest (1) estimates are tight; 0: any.
  int tight_where = 0;
  // The estimate of one token, above all others; whether it is tight.
  float heavy_nats = 0.0F;
  bool heavy_tight = false;
  // Values of tight tokens point the other way, and are so many times as long.
  float tight_value = 1.0F;
};

std::vector<PopulationSpec> Populations() {
  return {
      {.name = "all tight", .tight_share = 1.0F},
      {.name = "none tight"},
      {.name = "half tight", .tight_share = 0.5F, .tight_value = 3.0F},
      {.name = "a fifth tight", .tight_share = 0.2F},
      {.name = "1 in 10 tight", .tight_share = 0.1F, .tight_value = 5.0F},
      {.name = "1 in 15 tight", .tight_share = 0.066F},
      {.name = "1 in 20 tight", .tight_share = 0.05F},
      {.name = "1 in 30 tight", .tight_share = 0.033F, .tight_value = 5.0F},
      {.name = "1 in 60 tight", .tight_share = 0.0167F},
      {.name = "1 in 200 tight", .tight_share = 0.005F, .tight_value = 10.0F},
      {.name = "one heavy, tight", .heavy_nats = 8.0F, .heavy_tight = true, .tight_value = 5.0F},
      {.name = "one heavy, nothing", .tight_share = 0.1F, .heavy_nats = 8.0F},
      {.name = "geometric", .tight_share = 0.5F, .spread_nats = 9.0F},
      {.name = "geometric, light tight",
       .tight_share = 0.5F,
       .spread_nats = 6.0F,
       .tight_where = -1},
      {.name = "geometric, heavy tight",
       .tight_share = 0.2F,
       .spread_nats = 6.0F,
       .tight_where = 1},
  };
}

// Keys, values and queries of one population. Queries alternate in sign, so that a constant key has
// logit zero and a residual of constant size and alternating sign is as long as its cells allow,
// with the whole of it along the query: there the bound is an equality.
class PopulationCase {
 public:
  PopulationCase(const PopulationSpec& spec, uint64_t seed) : spec_(spec), chance_(seed) {
    result_.seed = seed;
    result_.shape.layout = {
        .query_head_count = kGroup, .kv_head_count = 1, .head_dim = kDim, .dtype = DType::kFloat32};
    result_.shape.scale = 1.0F / std::sqrt(static_cast<float>(kDim));
    result_.length = kLength;
    result_.query_count = kQueryTokensMax;
    result_.tables = {IdentitySketchTable(kDim)};
    const float q = kCellNats / (kCell * static_cast<float>(kDim) * result_.shape.scale);
    result_.queries.emplace_back(size_t{result_.head_count()} * kDim);
    std::vector<float>& queries = result_.queries[0];
    for (size_t i = 0; i < queries.size(); ++i) queries[i] = q * Sign(i % kDim);
    result_.k.resize(size_t{kLength} * result_.shape.layout.vector_bytes());
    result_.v.resize(result_.k.size());
    for (uint32_t token = 0; token < kLength; ++token) MakeToken(token);
  }

  LayerCase Take() { return std::move(result_); }

 private:
  static float Sign(size_t channel) { return channel % 2 == 0 ? 1.0F : -1.0F; }

  void MakeToken(uint32_t token) {
    // One step is one code in one channel; steps go round the channels.
    constexpr float kStepNats = kCellNats / static_cast<float>(kDim);
    const bool heavy = spec_.heavy_nats > 0.0F && token == kLength / 2;
    const float place = chance_.Uniform();
    const float nats = heavy ? spec_.heavy_nats : place * spec_.spread_nats;
    const auto steps = static_cast<uint32_t>(nats / kStepNats);
    bool tight = chance_.Uniform() < spec_.tight_share;
    if (spec_.tight_where < 0) tight = place < spec_.tight_share;
    if (spec_.tight_where > 0) tight = place > 1.0F - spec_.tight_share;
    if (heavy) tight = spec_.heavy_tight;
    // Two tokens of every page pin its range, and so its cells.
    const uint32_t in_page = token % kBlockTokens;
    const bool pin = in_page == kSketchSinks || in_page == kSketchSinks + 1;
    for (uint32_t c = 0; c < kDim; ++c) {
      const auto whole_steps = (steps + kDim - 1 - c) / kDim;
      const float raised = static_cast<float>(whole_steps) * Sign(c);
      const float residual = (tight ? kCorner : -kCorner) * Sign(c);
      float key = kCell * (8.5F + raised + residual);
      if (pin) key = in_page == kSketchSinks ? 0.0F : kCell * 15.99F;
      const size_t at = result_.ElementIndex(0, token) + c;
      StoreElement(DType::kFloat32, key, result_.k.data(), at);
      const float v = tight ? -spec_.tight_value : 1.0F;
      StoreElement(DType::kFloat32, v + 0.1F * chance_.Normal(), result_.v.data(), at);
    }
  }

  const PopulationSpec& spec_;
  Chance chance_;
  LayerCase result_;
};

// The ways to ask for a sampled proof: limits of either currency, growing, few and many draws. A
// limit just below the truth is what early stopping can get wrong: whoever proves it has missed.
enum class Limits : uint8_t { kMassJustWrong, kMassHalf, kOutput, kBoth };
struct Asking {
  Plan plan;
  Limits limits;
};

// Few tokens are kept, whatever the limit: the rest is proven by sampling, or grows.
Plan BasePlan() {
  constexpr uint32_t kTopK = 16;
  Plan plan;
  plan.source = Source::kScan;
  plan.local_begin = kLength - kLocal;
  plan.dense_share = 1.0F;
  plan.keep.top_k = kTopK;
  plan.prove = Guarantee::kDeterministic;
  return plan;
}

std::vector<Asking> Askings() {
  std::vector<Asking> all;
  for (const double eta : kEtas) {
    for (const uint32_t draws_max : {64U, 256U, 1024U}) {
      for (const OnViolation on_violation : {OnViolation::kReport, OnViolation::kGrow}) {
        for (const Limits limits :
             {Limits::kMassJustWrong, Limits::kMassHalf, Limits::kOutput, Limits::kBoth}) {
          Asking one = {BasePlan(), limits};
          one.plan.prove = Guarantee::kConfidence;
          one.plan.failure_probability = eta;
          one.plan.draws_max = draws_max;
          one.plan.on_violation = on_violation;
          all.push_back(one);
        }
      }
    }
  }
  return all;
}

// A population in the memory of one device, with its truth.
struct Stored {
  Stored(Device* device, const PopulationSpec& spec, uint64_t seed)
      : name(spec.name),
        layer_case(PopulationCase(spec, seed).Take()),
        arena(device),
        stored(&arena, layer_case) {
    widened.push_back(stored.Widened(0));
    truths = MakeTruths(layer_case, 0, widened);
    // What is true of the selection that every plan here starts from.
    DeviceCall call(stored, 0, BasePlan(), {});
    call.Run();
    share = truths[0].Masses(call.selected[0]).share.low;
    const Interval error = truths[0].SelectionError(call.selected[0]);
    relative_error =
        error.low / *std::max_element(widened[0].v_norm.begin(), widened[0].v_norm.end());
  }

  Plan PlanOf(const Asking& asking) const {
    constexpr long double kJustBelow = 0.98L;
    Plan plan = asking.plan;
    const long double factor = asking.limits == Limits::kMassJustWrong ? kJustBelow : 0.5L;
    if (asking.limits != Limits::kOutput) {
      plan.max_dropped_mass = static_cast<float>(factor * share);
    }
    if (asking.limits == Limits::kOutput || asking.limits == Limits::kBoth) {
      plan.max_output_error = static_cast<float>(factor * relative_error);
    }
    return plan;
  }

  std::string name;
  LayerCase layer_case;
  Arena arena;
  StoredCase stored;
  std::vector<WidenedHead> widened;
  std::vector<HeadTruth> truths;
  long double share = 0.0L;
  long double relative_error = 0.0L;
};

// What one thread works with.
struct Worker {
  std::vector<std::unique_ptr<Device>> devices;
  // [device][population]
  std::vector<std::vector<std::unique_ptr<Stored>>> stored;
};

absl::Status MakeWorker(const CoverageOptions& options,
                        const std::vector<PopulationSpec>& populations, Worker* worker) {
  for (const std::string& name : options.devices) {
    absl::StatusOr<std::unique_ptr<Device>> device = NewDevice(name, {.thread_count = 1});
    if (!device.ok()) return device.status();
    worker->devices.push_back(std::move(device).value());
    std::vector<std::unique_ptr<Stored>>& stored = worker->stored.emplace_back();
    for (size_t i = 0; i < populations.size(); ++i) {
      stored.push_back(std::make_unique<Stored>(worker->devices.back().get(), populations[i],
                                                SeedOf(options.seed, i)));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status MeasureCoverage(const CoverageOptions& options, Tally* tally) {
  const std::vector<PopulationSpec> populations = Populations();
  const std::vector<Asking> askings = Askings();
  std::vector<Worker> workers(options.thread_count);
  for (Worker& worker : workers) {
    const absl::Status status = MakeWorker(options, populations, &worker);
    if (!status.ok()) return status;
  }
  tally->caches += populations.size();
  RunUntil(
      {.certificates = options.certificates,
       .seconds = options.seconds,
       .thread_count = options.thread_count,
       .round = options.round_calls},
      [&](uint64_t index, uint32_t thread, Tally* counts) {
        const size_t device = index % options.devices.size();
        const uint64_t rest = index / options.devices.size();
        const Stored& one = *workers[thread].stored[device][rest % populations.size()];
        const Plan plan = one.PlanOf(askings[rest / populations.size() % askings.size()]);
        Chance chance(SeedOf(~options.seed, index));
        DeviceCall call(one.stored, 0, plan, MakeDrawKey(&chance));
        call.Run();
        ++counts->calls;
        JudgeDeviceCall(
            call, one.truths, one.widened,
            absl::StrCat("kvadversary --coverage --seed=", options.seed, " [",
                         options.devices[device], ", ", one.name, ", repetition ", index, "]"),
            counts, one.name);
      },
      tally);
  return absl::OkStatus();
}

}  // namespace kvservice::adversary
