#include "tests/bench/cuda_direct.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention/cpu/thread_pool.h"
#include "attention/cuda/device.h"
#include "attention/cuda/tables.h"
#include "attention/cuda/wave.h"
#include "attention/float16.h"
#include "attention/sketch.h"

namespace kvservice::bench {
namespace {

using cuda::Check;

constexpr int kReplays = 20;
// This share of the keys stands out by so many nats, with this spread: an oracle needs about 2 % of
// the tokens for 95 % of the mass.
constexpr double kPlantedShare = 0.033;
constexpr double kPlantedNats = 9.0;
constexpr double kPlantedSpread = 0.7;
constexpr float kLimit = 0.05F;

struct Case {
  uint32_t rows;
  uint32_t length;
  uint32_t sequences;  // batches of rows that replays go through
};

const KvLayout kLayout{
    .query_head_count = 32, .kv_head_count = 8, .head_dim = 128, .dtype = DType::kBfloat16};

// Numbers that are normally distributed, cheap: stretches of one long table.
class Normals {
 public:
  Normals() : table_(1 << 20) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (float& x : table_) x = normal(random);
  }
  const float* Stretch(uint64_t bits) const { return &table_[bits % (table_.size() - 256)]; }

 private:
  std::vector<float> table_;
};

// One sequence in host memory, and its queries.
struct Sequence {
  std::vector<std::byte> slices;  // [blocks][slice_bytes]
  std::vector<float> q;           // [query_head_count][head_dim]
};

Sequence MakeSequence(uint32_t length) {
  const Normals normals;
  const uint32_t dim = kLayout.head_dim;
  const uint32_t blocks = length / kBlockTokens;
  Sequence sequence;
  sequence.slices.resize(size_t{blocks} * kLayout.slice_bytes());
  sequence.q.resize(size_t{kLayout.query_head_count} * dim);
  std::mt19937_64 random(9);
  std::normal_distribution<double> normal;
  // Queries are 0.8 along a direction of the KV head and 0.6 along one of their own, times what
  // makes scaled logits of other keys spread by one nat.
  std::vector<std::vector<float>> directions;
  const auto unit = [&] {
    std::vector<float> v(dim);
    double squares = 0.0;
    for (float& x : v) squares += std::pow(x = static_cast<float>(normal(random)), 2.0);
    for (float& x : v) x /= static_cast<float>(std::sqrt(squares));
    return v;
  };
  for (uint32_t head = 0; head < kLayout.query_head_count; ++head) {
    if (head % kLayout.group_size() == 0) directions.push_back(unit());
    const std::vector<float> own = unit();
    for (uint32_t c = 0; c < dim; ++c) {
      sequence.q[size_t{head} * dim + c] =
          std::sqrt(static_cast<float>(dim)) * (0.8F * directions.back()[c] + 0.6F * own[c]);
    }
  }
  const uint32_t threads = std::max(1U, std::min(16U, std::thread::hardware_concurrency()));
  std::vector<std::thread> pool;
  for (uint32_t thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      std::mt19937_64 own(100 + thread);
      std::normal_distribution<double> own_normal;
      std::uniform_real_distribution<double> chance;
      std::vector<float> k(dim);
      for (uint32_t block = thread; block < blocks; block += threads) {
        std::byte* slice = &sequence.slices[size_t{block} * kLayout.slice_bytes()];
        for (uint32_t kv_head = 0; kv_head < kLayout.kv_head_count; ++kv_head) {
          for (uint32_t token = 0; token < kBlockTokens; ++token) {
            std::byte* row = slice + kLayout.RowOffset(kv_head, token);
            const float* noise = normals.Stretch(own());
            const float* v = normals.Stretch(own());
            double boost = 0.0;
            if (chance(own) < kPlantedShare) {
              boost = (kPlantedNats + kPlantedSpread * own_normal(own)) / 0.8;
            }
            for (uint32_t c = 0; c < dim; ++c) {
              const float key = noise[c] + static_cast<float>(boost) * directions[kv_head][c];
              StoreElement(kLayout.dtype, key, row, c);
              StoreElement(kLayout.dtype, v[c], row, dim + c);
            }
          }
        }
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  return sequence;
}

// Everything that one batch of rows points to.
struct Batch {
  std::vector<std::vector<const std::byte*>> slices, sketches;  // [rows][blocks]
  std::vector<AttendRow> rows;
  std::vector<float> out, lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
};

class DirectBench {
 public:
  explicit DirectBench(const Case& shape);
  ~DirectBench();

  void Run();

 private:
  uint32_t blocks() const { return case_.length / kBlockTokens; }
  void MakeCaches();
  void MakeBatch(uint32_t index, Batch* batch);
  double TimeGraph(const std::function<void()>& launch) const;
  double TimeCalls();
  void Print(const char* name, double us) const;
  void PrintWave();
  void PrintTruth();
  Plan MakePlan() const;

  const Case case_;
  LayerShape layer_;
  Sequence sequence_;
  std::vector<SketchTable> tables_;
  std::unique_ptr<Device> device_;
  ThreadPool pool_;
  cuda::ScoreMemory score_memory_;
  cuda::Context context_;
  std::vector<DeviceMemory> memory_;  // slices, then sketches, of every row of every batch
  std::vector<Batch> batches_;
};

DirectBench::DirectBench(const Case& shape)
    : case_(shape), sequence_(MakeSequence(shape.length)), pool_(8) {
  layer_.layout = kLayout;
  layer_.scale = 1.0F / std::sqrt(static_cast<float>(kLayout.head_dim));
  tables_.assign(kLayout.kv_head_count, IdentitySketchTable(kLayout.head_dim));
  device_ = *NewCudaDevice({.thread_count = 8});
  int multiprocessors = 0;
  Check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "device");
  Check(cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), "stream");
  context_.multiprocessors = static_cast<uint32_t>(multiprocessors);
  context_.score_memory = &score_memory_;
  memory_.push_back(*device_->Allocate(kRadiusScale.size() * sizeof(float)));
  const MemoryCopy copy{.from = reinterpret_cast<const std::byte*>(kRadiusScale.data()),
                        .to = memory_[0].data(),
                        .bytes = kRadiusScale.size() * sizeof(float)};
  device_->Copy({&copy, 1});
  context_.radius_scale = reinterpret_cast<const float*>(memory_[0].data());
  MakeCaches();
}

DirectBench::~DirectBench() { cudaStreamDestroy(context_.stream); }

// Rows are copies of one sequence in memory of their own.
void DirectBench::MakeCaches() {
  const size_t slice_bytes = kLayout.slice_bytes();
  const SketchLayout sketch(kLayout.head_dim);
  const size_t sketch_bytes = sketch.slice_bytes(kLayout.kv_head_count);
  const uint32_t rows = case_.rows * case_.sequences;
  const size_t first = memory_.size();
  for (uint32_t row = 0; row < rows; ++row) {
    memory_.push_back(*device_->Allocate(blocks() * slice_bytes));
    memory_.push_back(*device_->Allocate(blocks() * sketch_bytes));
  }
  const MemoryCopy upload{.from = sequence_.slices.data(),
                          .to = memory_[first].data(),
                          .bytes = sequence_.slices.size()};
  device_->Copy({&upload, 1});
  std::vector<SealSlice> seals;
  for (uint32_t block = 0; block < blocks(); ++block) {
    seals.push_back({.slice = memory_[first].data() + block * slice_bytes,
                     .sketch = memory_[first + 1].data() + block * sketch_bytes,
                     .block_index = block,
                     .tables = tables_});
  }
  device_->Seal(kLayout, seals);
  for (uint32_t row = 1; row < rows; ++row) {
    const MemoryCopy copies[2] = {
        {memory_[first].data(), memory_[first + 2 * row].data(), blocks() * slice_bytes},
        {memory_[first + 1].data(), memory_[first + 2 * row + 1].data(), blocks() * sketch_bytes}};
    device_->Copy(copies);
  }
  batches_.resize(case_.sequences);
  for (uint32_t i = 0; i < case_.sequences; ++i) MakeBatch(i, &batches_[i]);
}

Plan DirectBench::MakePlan() const {
  Plan plan;
  plan.source = Source::kScan;
  plan.local_begin = case_.length - 64;
  plan.keep.mass_limit = kLimit;
  plan.max_dropped_mass = kLimit;
  plan.prove = Guarantee::kDeterministic;
  plan.on_violation = OnViolation::kDense;
  return plan;
}

void DirectBench::MakeBatch(uint32_t index, Batch* batch) {
  const uint32_t heads = kLayout.query_head_count;
  batch->slices.resize(case_.rows);
  batch->sketches.resize(case_.rows);
  batch->out.resize(size_t{case_.rows} * heads * kLayout.head_dim);
  batch->lse.resize(size_t{case_.rows} * heads);
  batch->certificates.resize(size_t{case_.rows} * heads);
  batch->groups.resize(size_t{case_.rows} * kLayout.kv_head_count);
  const SketchLayout sketch(kLayout.head_dim);
  for (uint32_t row = 0; row < case_.rows; ++row) {
    const size_t memory = 1 + 2 * (size_t{index} * case_.rows + row);
    for (uint32_t block = 0; block < blocks(); ++block) {
      batch->slices[row].push_back(memory_[memory].data() + block * kLayout.slice_bytes());
      batch->sketches[row].push_back(memory_[memory + 1].data() +
                                     block * sketch.slice_bytes(kLayout.kv_head_count));
    }
    AttendRow attend;
    attend.view = {
        .slices = batch->slices[row], .sketches = batch->sketches[row], .length = case_.length};
    attend.position = case_.length - 1;
    attend.q = sequence_.q.data();
    attend.plan = MakePlan();
    attend.tables = tables_;
    attend.out = &batch->out[size_t{row} * heads * kLayout.head_dim];
    attend.lse = &batch->lse[size_t{row} * heads];
    attend.certificates = &batch->certificates[size_t{row} * heads];
    attend.groups = &batch->groups[size_t{row} * kLayout.kv_head_count];
    batch->rows.push_back(attend);
  }
}

void DirectBench::Print(const char* name, double us) const {
  std::printf("%-36s B%-3u L%-6u 32q/8kv d128 %9.2f us", name, case_.rows, case_.length, us);
}

// Microseconds of one batch, the median over replays.
double DirectBench::TimeGraph(const std::function<void()>& launch) const {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  Check(cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeGlobal), "capture");
  launch();
  Check(cudaStreamEndCapture(context_.stream, &graph), "capture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int replay = 0; replay < kReplays + 3; ++replay) {
    Check(cudaEventRecord(begin, context_.stream), "event");
    Check(cudaGraphLaunch(executable, context_.stream), "replay");
    Check(cudaEventRecord(end, context_.stream), "event");
    Check(cudaStreamSynchronize(context_.stream), "replay");
    float ms = 0.0F;
    Check(cudaEventElapsedTime(&ms, begin, end), "event");
    if (replay >= 3) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  std::sort(times.begin(), times.end());
  return static_cast<double>(times[times.size() / 2]) * 1e3 / case_.sequences;
}

void DirectBench::PrintWave() {
  cuda::TableCache cache(context_.stream);
  cuda::Arena staging(cuda::Arena::Sides::kBoth);
  std::vector<std::unique_ptr<cuda::Wave>> waves;
  for (Batch& batch : batches_) {
    std::vector<cuda::WaveGroup> groups;
    for (AttendRow& row : batch.rows) {
      const cuda::RowTables tables = cache.Get(row.view, &staging);
      for (uint32_t kv_head = 0; kv_head < kLayout.kv_head_count; ++kv_head) {
        cuda::WaveGroup group;
        group.row = &row;
        group.tables = tables;
        group.kv_head = kv_head;
        groups.push_back(group);
      }
    }
    waves.push_back(std::make_unique<cuda::Wave>(context_));
    waves.back()->Build(layer_, std::move(groups), &pool_);
    waves.back()->Upload(context_.stream);
    waves.back()->Launch(waves.back()->stream());
    waves.back()->Wait();
  }
  const auto time = [&](cuda::Wave::Stage last) {
    return TimeGraph([&] {
      for (const auto& wave : waves) wave->Launch(context_.stream, last);
    });
  };
  using Stage = cuda::Wave::Stage;
  Print("  mark", time(Stage::kMark));
  std::printf("\n");
  Print("  mark, scan, attend always", time(Stage::kScan));
  std::printf("\n");
  Print("  and find thresholds", time(Stage::kThresholds));
  std::printf("\n");
  Print("  and choose", time(Stage::kChoose));
  std::printf("\n");
  Print("certified mass .05, deterministic", time(Stage::kAll));
  std::printf(", %u launches\n", waves[0]->launch_count());
  std::fflush(stdout);
}

double DirectBench::TimeCalls() {
  std::vector<double> times;
  for (int call = 0; call < 2 * kReplays; ++call) {
    Batch& batch = batches_[static_cast<size_t>(call) % batches_.size()];
    const auto begin = std::chrono::steady_clock::now();
    device_->Attend(layer_, absl::MakeSpan(batch.rows));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    if (call >= kReplays) times.push_back(seconds.count() * 1e6);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Some heads of the last call against exact attention.
void DirectBench::PrintTruth() {
  constexpr uint32_t kKvHeads = 2;
  Batch& batch = batches_[0];
  std::vector<std::vector<uint32_t>> selected(kLayout.kv_head_count);
  AttendRow row = batch.rows[0];
  row.selected = selected.data();
  device_->Attend(layer_, {&row, 1});
  const uint32_t dim = kLayout.head_dim;
  for (uint32_t head = 0; head < kKvHeads * kLayout.group_size(); ++head) {
    const uint32_t kv_head = head / kLayout.group_size();
    std::vector<double> logits(case_.length);
    double top = -1e300;
    for (uint32_t token = 0; token < case_.length; ++token) {
      const std::byte* k = &sequence_.slices[size_t{token / kBlockTokens} * kLayout.slice_bytes() +
                                             kLayout.RowOffset(kv_head, token % kBlockTokens)];
      double dot = 0.0;
      for (uint32_t c = 0; c < dim; ++c) {
        dot += static_cast<double>(LoadElement(kLayout.dtype, k, c)) *
               static_cast<double>(sequence_.q[size_t{head} * dim + c]);
      }
      logits[token] = dot * static_cast<double>(layer_.scale);
      top = std::max(top, logits[token]);
    }
    double all = 0.0;
    for (double& logit : logits) all += logit = std::exp(logit - top);
    double kept = 0.0;
    for (const uint32_t token : selected[kv_head]) kept += logits[token];
    std::sort(logits.rbegin(), logits.rend());
    double best = 0.0;
    size_t oracle = 0;
    while (best < (1.0 - static_cast<double>(kLimit)) * all) best += logits[oracle++];
    const double dropped = 1.0 - kept / all;
    const double bound = row.certificates[head].dropped_mass_upper.value;
    std::printf("    head %u: dropped %.5f, certified %.5f%s; read %.2f %%, oracle %.2f %%\n", head,
                dropped, bound, dropped <= bound ? "" : " VIOLATION",
                100.0 * static_cast<double>(selected[kv_head].size()) / case_.length,
                100.0 * static_cast<double>(oracle) / case_.length);
  }
}

void DirectBench::Run() {
  PrintWave();
  const uint64_t before = GroupsAnsweredDirectly(*device_);
  Print("whole calls, host included", TimeCalls());
  const uint64_t answered = GroupsAnsweredDirectly(*device_) - before;
  std::vector<double> bounds;
  double read = 0.0;
  for (const HeadCertificate& c : batches_[0].certificates) {
    bounds.push_back(c.dropped_mass_upper.value);
  }
  for (const GroupReport& group : batches_[0].groups) read += group.tokens_read;
  std::sort(bounds.begin(), bounds.end());
  std::printf(
      ", %.2f %% of tokens read, bounds: median %.4f, max %.4f, answered directly %.1f %%\n",
      100.0 * read /
          (static_cast<double>(case_.length) * static_cast<double>(batches_[0].groups.size())),
      bounds[bounds.size() / 2], bounds.back(),
      100.0 * static_cast<double>(answered) /
          (2.0 * kReplays * static_cast<double>(batches_[0].groups.size())));
  // Dilation by nothing to speak of is decided by the host.
  for (Batch& batch : batches_) {
    for (AttendRow& row : batch.rows) {
      row.plan.keep.dilate_strongest = row.plan.keep.dilate_radius = 1;
    }
  }
  Print("the same, decided by the host", TimeCalls());
  std::printf("\n");
  for (Batch& batch : batches_) {
    for (AttendRow& row : batch.rows) row.plan.keep = MakePlan().keep;
  }
  PrintTruth();
  std::fflush(stdout);
}

}  // namespace

void MeasureDirect(int only) {
  const Case cases[] = {
      {1, 8192, 32}, {1, 32768, 16}, {1, 131072, 6}, {8, 32768, 3}, {8, 131072, 2}};
  for (int i = 0; i < static_cast<int>(std::size(cases)); ++i) {
    if (only < 0 || only == i) DirectBench(cases[i]).Run();
  }
}

}  // namespace kvservice::bench
