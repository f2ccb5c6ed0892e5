// Attention on a host device, one layer of one sequence. Every repetition first streams all keys
// and values through the CPU (the read_bandwidth baseline), so no case finds its tokens or sketches
// in the caches: 32k tokens are 134 MB of KV and 21 MB of sketches.
//
// Checks while measuring, against the reference device on the positions that the measured call
// reports: outputs (the row's error is the normalised squared error) and, for certified calls, that
// the exact dropped mass lies within the bounds, with no tolerance.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "attention/device.h"
#include "tests/bench/layer_data.h"
#include "tests/bench/scan_cpu.h"
#include "tests/bench/sum_words.h"
#include "tests/bench/workloads.h"

namespace kvservice::bench {
namespace {

constexpr double kOutputErrorMax = 1e-9;
constexpr double kLseErrorMax = 1e-4;
constexpr uint32_t kSinkTokens = 8;
constexpr uint32_t kLocalTokens = 64;

uint32_t ThreadCount(const BenchOptions& options) {
  if (options.thread_count != 0) return options.thread_count;
  return std::max(1U, std::thread::hardware_concurrency());
}

// Runs work(part, parts) on every thread.
template <typename Work>
void OnThreads(uint32_t parts, const Work& work) {
  std::vector<std::thread> threads;
  for (uint32_t part = 1; part < parts; ++part) threads.emplace_back(work, part, parts);
  work(0, parts);
  for (std::thread& thread : threads) thread.join();
}

// Seconds to read `bytes` bytes at `data` once, with all threads; what is summed goes to `sink`.
double ReadSeconds(const std::byte* data, size_t bytes, uint32_t threads,
                   std::atomic<uint64_t>* sink) {
  return Seconds([&] {
    OnThreads(threads, [&](uint32_t part, uint32_t parts) {
      const size_t words = bytes / sizeof(uint64_t);
      const size_t begin = words * part / parts;
      const size_t end = words * (part + 1) / parts;
      *sink += SumWords(reinterpret_cast<const uint64_t*>(data) + begin, end - begin);
    });
  });
}

double CopySeconds(const std::byte* from, std::byte* to, size_t bytes, uint32_t threads) {
  return Seconds([&] {
    OnThreads(threads, [&](uint32_t part, uint32_t parts) {
      const size_t begin = bytes * part / parts;
      std::memcpy(to + begin, from + begin, bytes * (part + 1) / parts - begin);
    });
  });
}

// One call on a layer, with room for its answers.
struct LayerCall {
  LayerCall(const LayerData& layer, const Plan& plan)
      : shape(layer.shape()),
        out(layer.queries().size()),
        lse(shape.layout.query_head_count),
        certificates(shape.layout.query_head_count),
        groups(shape.layout.kv_head_count),
        selected(shape.layout.kv_head_count) {
    row.view = layer.view();
    row.position = row.view.length - 1;
    row.q = layer.queries().data();
    row.plan = plan;
    row.tables = layer.tables();
    row.out = out.data();
    row.lse = lse.data();
    row.certificates = certificates.data();
    row.groups = groups.data();
    // Any key will do: nobody guesses here.
    row.draw_key.fill(std::byte{0x4b});
  }

  void Run(Device* device) { device->Attend(shape, {&row, 1}); }

  const LayerShape shape;
  std::vector<float> out, lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
  std::vector<std::vector<uint32_t>> selected;
  AttendRow row;
};

// Runs the call once more with its positions reported and compares it with the reference on them.
absl::Status Check(const LayerData& layer, Device* device, LayerCall* call, double* error) {
  call->row.selected = call->selected.data();
  call->Run(device);
  call->row.selected = nullptr;
  if (!call->row.status.ok()) return call->row.status;

  std::vector<uint32_t> given;
  std::vector<uint32_t> offsets = {0};
  for (const std::vector<uint32_t>& tokens : call->selected) {
    given.insert(given.end(), tokens.begin(), tokens.end());
    offsets.push_back(static_cast<uint32_t>(given.size()));
  }
  Plan plan;
  plan.source = Source::kGiven;
  plan.sink_end = call->row.plan.sink_end;
  plan.local_begin = call->row.plan.local_begin;
  plan.given = given;
  plan.given_offsets = offsets;
  plan.dense_share = 2.0F;  // Read what was read, however much it is.
  plan.prove = Guarantee::kExact;
  LayerCall truth(layer, plan);
  auto reference = NewDevice("reference", {});
  if (!reference.ok()) return reference.status();
  truth.Run(reference->get());

  double difference = 0.0;
  double size = 0.0;
  for (size_t i = 0; i < truth.out.size(); ++i) {
    const double delta = static_cast<double>(call->out[i]) - static_cast<double>(truth.out[i]);
    difference += delta * delta;
    size += static_cast<double>(truth.out[i]) * static_cast<double>(truth.out[i]);
  }
  *error = difference / size;
  if (!(*error <= kOutputErrorMax)) {
    return absl::InternalError(absl::StrCat("normalised squared error ", *error));
  }
  for (size_t head = 0; head < truth.lse.size(); ++head) {
    if (!(std::fabs(call->lse[head] - truth.lse[head]) <= kLseErrorMax)) {
      return absl::InternalError(absl::StrCat("lse of head ", head, " is wrong"));
    }
    const HeadCertificate& bound = call->certificates[head];
    const HeadCertificate& exact = truth.certificates[head];
    if (exact.dropped_mass_lower.value > bound.dropped_mass_upper.value ||
        exact.dropped_mass_upper.value < bound.dropped_mass_lower.value) {
      return absl::InternalError(absl::StrCat("the bound of head ", head, " is violated"));
    }
  }
  return absl::OkStatus();
}

// A case and the seconds it took, each repetition.
struct Case {
  std::string name;
  LayerCall call;
  std::vector<double> seconds;
  double error = 0.0;
};

Plan BasePlan(const LayerData& layer) {
  Plan plan;
  plan.sink_end = kSinkTokens;
  plan.local_begin = layer.view().length - kLocalTokens;
  return plan;
}

Plan ScanPlan(const LayerData& layer, uint32_t top_k) {
  Plan plan = BasePlan(layer);
  plan.source = Source::kScan;
  plan.keep.top_k = top_k;
  return plan;
}

Plan ListPlan(const LayerData& layer, uint32_t top_k, TokenLists* lists) {
  Plan plan = ScanPlan(layer, top_k);
  plan.source = Source::kReuse;
  plan.lists = lists;
  return plan;
}

constexpr double kFailureProbability = 1e-9;

Plan CertifiedPlan(const LayerData& layer, Guarantee prove) {
  Plan plan = BasePlan(layer);
  plan.source = Source::kScan;
  plan.keep.mass_limit = 0.05F;
  plan.max_dropped_mass = 0.05F;
  plan.prove = prove;
  plan.failure_probability = kFailureProbability;
  plan.on_violation = OnViolation::kDense;
  return plan;
}

std::vector<Row> MakeRows(std::vector<Case>* cases, double read_seconds) {
  std::vector<Row> rows;
  double dense_seconds = 0.0;
  for (Case& measured : *cases) {
    const double seconds = Median(&measured.seconds);
    const bool dense = measured.name == "dense";
    if (dense) dense_seconds = seconds;
    uint64_t tokens_read = 0;
    for (const GroupReport& group : measured.call.groups) tokens_read += group.tokens_read;
    rows.push_back({.workload = "attend_cpu",
                    .case_name = measured.name,
                    .value = seconds * 1e6,
                    .unit = "us",
                    .baseline = dense ? "read_bandwidth" : "dense",
                    .ratio = (dense ? read_seconds : dense_seconds) / seconds,
                    .error = measured.error});
    rows.push_back({.workload = "attend_cpu",
                    .case_name = measured.name + "_tokens_read",
                    .value = static_cast<double>(tokens_read) / measured.call.groups.size(),
                    .unit = "tokens",
                    .baseline = "length",
                    .ratio = static_cast<double>(tokens_read) / measured.call.groups.size() /
                             measured.call.row.view.length});
  }
  return rows;
}

// Sealing everything, against copying the same keys and values.
Row MeasureSeal(const LayerData& layer, Device* device, uint32_t repetitions, uint32_t threads) {
  const DeviceMemory& memory = layer.slice_memory();
  std::vector<std::byte> copy(memory.bytes());
  std::vector<double> seal, plain;
  for (uint32_t i = 0; i < repetitions; ++i) {
    plain.push_back(CopySeconds(memory.data(), copy.data(), copy.size(), threads));
    seal.push_back(Seconds([&] { device->Seal(layer.shape().layout, layer.seal_calls()); }));
  }
  const double seconds = Median(&seal);
  return {.workload = "attend_cpu",
          .case_name = "seal",
          .value = seconds * 1e9 / layer.view().length,
          .unit = "ns/tok",
          .baseline = "copy_bandwidth",
          .ratio = Median(&plain) / seconds};
}

}  // namespace

absl::Status RunAttendCpu(const BenchOptions& options, std::vector<Row>* rows) {
  auto device = NewDevice(options.device, {.thread_count = options.thread_count});
  if (!device.ok()) return device.status();
  LayerOptions layer_options;
  layer_options.layout = {.query_head_count = 32, .kv_head_count = 8, .head_dim = 128};
  layer_options.length = options.quick ? 2048 : 32768;
  if (options.quick) layer_options.hot_tokens = 16;
  LayerData layer;
  absl::Status status = LayerData::Make(layer_options, device->get(), &layer);
  if (!status.ok()) return status;

  const uint32_t kept = layer_options.length / 100;
  const uint32_t top_k = kept > kSinkTokens + kLocalTokens ? kept - kSinkTokens - kLocalTokens : 8;
  const auto lists = (*device)->NewTokenLists(layer_options.layout, 1);
  std::vector<Case> cases;
  cases.push_back({"dense", LayerCall(layer, BasePlan(layer)), {}});
  cases.push_back({"list_1pct", LayerCall(layer, ListPlan(layer, top_k, lists.get())), {}});
  cases.push_back({"scan_1pct", LayerCall(layer, ScanPlan(layer, top_k)), {}});
  cases.push_back(
      {"certified_0.05", LayerCall(layer, CertifiedPlan(layer, Guarantee::kDeterministic)), {}});
  cases.push_back(
      {"confident_0.05", LayerCall(layer, CertifiedPlan(layer, Guarantee::kConfidence)), {}});
  // The first call of list_1pct scans and makes the list; from here on it is reused.
  for (Case& measured : cases) measured.call.Run(device->get());
  for (Case& measured : cases) {
    status = Check(layer, device->get(), &measured.call, &measured.error);
    if (!status.ok()) {
      return absl::InternalError(absl::StrCat(measured.name, ": ", status.message()));
    }
  }

  const uint32_t threads = ThreadCount(options);
  const uint32_t repetitions = options.quick ? 3 : 21;
  std::vector<double> read;
  std::atomic<uint64_t> sink{0};
  for (uint32_t i = 0; i < repetitions; ++i) {
    for (Case& measured : cases) {
      const DeviceMemory& memory = layer.slice_memory();
      read.push_back(ReadSeconds(memory.data(), memory.bytes(), threads, &sink));
      measured.seconds.push_back(Seconds([&] { measured.call.Run(device->get()); }));
    }
  }
  const double read_seconds = Median(&read);
  rows->push_back({.workload = "attend_cpu",
                   .case_name = "read_bandwidth",
                   .value = static_cast<double>(layer.slice_memory().bytes()) / read_seconds / 1e9,
                   .unit = "GB/s",
                   .baseline = "read_bandwidth",
                   .ratio = 1.0});
  for (Row& row : MakeRows(&cases, read_seconds)) rows->push_back(std::move(row));
  if (options.device == "cpu") {
    for (Row& row : MeasureScan(layer, repetitions, threads)) rows->push_back(std::move(row));
  }
  rows->push_back(MeasureSeal(layer, device->get(), options.quick ? 1 : 5, threads));
  return absl::OkStatus();
}

}  // namespace kvservice::bench
