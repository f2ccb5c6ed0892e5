// Times of the CUDA kernels alone, by events around replays of a graph. Every replay holds several
// launches on different tokens, together far more bytes than the caches hold, so nothing is found
// there. Keys and values are one random slice many times over: speeds do not depend on what is
// read.
//
// Prints one line per case: what was read, how long it took, and the rate.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda/arena.h"
#include "attention/cuda/kernels.h"
#include "attention/cuda/readings.h"
#include "attention/float16.h"
#include "attention/kv_layout.h"
#include "attention/sketch.h"
#include "tests/bench/cuda_direct.h"

namespace kvservice::bench {
namespace {

using cuda::Arena;
using cuda::Check;
using cuda::Slot;

constexpr int kReplays = 20;

struct Case {
  uint32_t rows = 1;
  uint32_t length = 0;
  KvLayout layout;
};

// Memory of a case: slices and sketches of all rows, and what kernels are called with.
class Bench {
 public:
  explicit Bench(const Case& shape);
  ~Bench() {
    cudaFree(slices_);
    cudaFree(sketches_);
    cudaStreamDestroy(stream_);
  }

  void MeasureSeal();
  void MeasureAttend(const std::string& name, uint32_t tokens, bool bounded, uint32_t launches);
  void MeasureScan(bool bounded, uint32_t launches);

 private:
  uint32_t blocks() const { return case_.length / kBlockTokens; }
  uint32_t set_count() const { return case_.rows * case_.layout.kv_head_count; }
  std::vector<uint64_t> RandomTokens(uint32_t count);
  // Microseconds per launch, median over replays.
  double Time(uint32_t launches, const std::function<void(uint32_t)>& launch);
  void Report(const std::string& name, double us, double bytes) const;

  const Case case_;
  const cuda::CacheShape shape_;
  std::mt19937_64 random_{1};
  cudaStream_t stream_ = nullptr;
  std::byte* slices_ = nullptr;
  std::byte* sketches_ = nullptr;
  Arena memory_{Arena::Sides::kBoth};
  const float* radius_scale_ = nullptr;
  std::vector<const std::byte*const*> slice_tables_, sketch_tables_;  // [rows]
  const float* qs_ = nullptr;
  const uint32_t* visible_ = nullptr;
  const float* ones_ = nullptr;
  const double* norms_ = nullptr;
};

Bench::Bench(const Case& shape) : case_(shape), shape_(cuda::ShapeOf(shape.layout)) {
  const KvLayout& layout = case_.layout;
  const SketchLayout sketch(layout.head_dim);
  const size_t slice_bytes = layout.slice_bytes();
  const size_t sketch_bytes = sketch.slice_bytes(layout.kv_head_count);
  const size_t block_count = size_t{case_.rows} * blocks();
  Check(cudaStreamCreate(&stream_), "stream");
  Check(cudaMalloc(reinterpret_cast<void**>(&slices_), block_count * slice_bytes), "slices");
  Check(cudaMalloc(reinterpret_cast<void**>(&sketches_), block_count * sketch_bytes), "sketches");
  std::normal_distribution<float> normal;
  std::vector<std::byte> slice(slice_bytes);
  for (size_t i = 0; i < slice_bytes / ElementBytes(layout.dtype); ++i) {
    StoreElement(layout.dtype, normal(random_), slice.data(), i);
  }
  Check(cudaMemcpy(slices_, slice.data(), slice_bytes, cudaMemcpyHostToDevice), "fill");
  // Doubling what is filled.
  for (size_t filled = 1; filled < block_count;) {
    const size_t more = std::min(filled, block_count - filled);
    Check(cudaMemcpy(slices_ + filled * slice_bytes, slices_, more * slice_bytes,
                     cudaMemcpyDeviceToDevice),
          "fill");
    filled += more;
  }
  for (uint32_t row = 0; row < case_.rows; ++row) {
    const Slot<const std::byte*> slice_table = memory_.Take<const std::byte*>(blocks());
    const Slot<const std::byte*> sketch_table = memory_.Take<const std::byte*>(blocks());
    for (uint32_t block = 0; block < blocks(); ++block) {
      const size_t index = size_t{row} * blocks() + block;
      slice_table.host[block] = slices_ + index * slice_bytes;
      sketch_table.host[block] = sketches_ + index * sketch_bytes;
    }
    slice_tables_.push_back(slice_table.device);
    sketch_tables_.push_back(sketch_table.device);
  }
  const uint32_t heads = layout.group_size();
  const Slot<float> qs = memory_.Take<float>(size_t{heads} * layout.head_dim);
  for (size_t i = 0; i < size_t{heads} * layout.head_dim; ++i) qs.host[i] = 0.1F * normal(random_);
  const Slot<uint32_t> visible = memory_.Take<uint32_t>(size_t{2} * heads);
  const Slot<double> norms = memory_.Take<double>(size_t{4} * heads);
  for (uint32_t head = 0; head < heads; ++head) {
    visible.host[2 * head] = 0;
    visible.host[2 * head + 1] = case_.length;
    norms.host[4 * head] = norms.host[4 * head + 1] = norms.host[4 * head + 3] = 2.0;
    norms.host[4 * head + 2] = layout.head_dim;
  }
  const Slot<float> ones = memory_.Take<float>(size_t{kGroupMax} * kHeadDimMax);
  std::fill_n(ones.host, size_t{kGroupMax} * kHeadDimMax, 0.1F);
  const Slot<float> scale = memory_.Take<float>(kRadiusScale.size());
  std::copy(kRadiusScale.begin(), kRadiusScale.end(), scale.host);
  qs_ = qs.device;
  visible_ = visible.device;
  norms_ = norms.device;
  ones_ = ones.device;
  radius_scale_ = scale.device;
  memory_.Upload(stream_);
  Check(cudaStreamSynchronize(stream_), "upload");
}

std::vector<uint64_t> Bench::RandomTokens(uint32_t count) {
  std::vector<uint64_t> words(blocks(), count >= case_.length ? ~uint64_t{0} : 0);
  for (uint32_t i = 0; i < count && count < case_.length;) {
    const auto token = static_cast<uint32_t>(random_() % case_.length);
    uint64_t& word = words[token / kBlockTokens];
    const uint64_t bit = uint64_t{1} << (token % kBlockTokens);
    i += (word & bit) == 0 ? 1 : 0;
    word |= bit;
  }
  return words;
}

double Bench::Time(uint32_t launches, const std::function<void(uint32_t)>& launch) {
  launch(0);
  Check(cudaStreamSynchronize(stream_), "first launch");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), "capture");
  for (uint32_t i = 0; i < launches; ++i) launch(i);
  Check(cudaStreamEndCapture(stream_, &graph), "capture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int replay = 0; replay < kReplays + 3; ++replay) {
    Check(cudaEventRecord(begin, stream_), "event");
    Check(cudaGraphLaunch(executable, stream_), "replay");
    Check(cudaEventRecord(end, stream_), "event");
    Check(cudaStreamSynchronize(stream_), "replay");
    float ms = 0.0F;
    Check(cudaEventElapsedTime(&ms, begin, end), "event");
    if (replay >= 3) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  std::sort(times.begin(), times.end());
  return static_cast<double>(times[times.size() / 2]) * 1e3 / launches;
}

void Bench::Report(const std::string& name, double us, double bytes) const {
  std::printf("%-24s B%-3u L%-6u %2uq/%ukv d%-3u %9.2f MB %9.2f us %7.0f GB/s\n", name.c_str(),
              case_.rows, case_.length, case_.layout.query_head_count, case_.layout.kv_head_count,
              case_.layout.head_dim, bytes / 1e6, us, bytes / us / 1e3);
  std::fflush(stdout);
}

void Bench::MeasureSeal() {
  const KvLayout& layout = case_.layout;
  const SketchLayout sketch(layout.head_dim);
  const size_t pages = size_t{set_count()} * blocks();
  Arena arena(Arena::Sides::kBoth);
  const Slot<cuda::SealItem> items = arena.Take<cuda::SealItem>(pages);
  for (size_t i = 0; i < pages; ++i) {
    const size_t block = i / layout.kv_head_count;
    const auto kv_head = static_cast<uint32_t>(i % layout.kv_head_count);
    items.host[i] = {.rows = slices_ + block * layout.slice_bytes() + layout.RowOffset(kv_head, 0),
                     .page = sketches_ + block * sketch.slice_bytes(layout.kv_head_count) +
                             kv_head * sketch.page_bytes,
                     .metric = ones_,
                     .weights = ones_,
                     .radius_scale = radius_scale_,
                     .block_index = 1};
  }
  arena.Upload(stream_);
  const double us = Time(1, [&](uint32_t) {
    Check(cuda::Seal(shape_, items.device, static_cast<uint32_t>(pages), stream_), "seal");
  });
  Report(
      "seal", us,
      static_cast<double>(pages) * (size_t{kBlockTokens} * layout.row_bytes() + sketch.page_bytes));
}

void Bench::MeasureAttend(const std::string& name, uint32_t tokens, bool bounded,
                          uint32_t launches) {
  const uint32_t heads = case_.layout.group_size();
  const uint32_t dim = case_.layout.head_dim;
  int multiprocessors = 0;
  Check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "device");
  cuda::AttendCall call;
  call.shape = shape_;
  call.bound_masses = bounded;
  call.head_count_max = heads;
  const cuda::AttendTiling tiling = cuda::AttendTilingOf(call);
  const uint32_t tiles = (heads + tiling.heads - 1) / tiling.heads;
  const uint32_t places = tiling.ctas * static_cast<uint32_t>(multiprocessors) / tiles;
  const uint32_t most = std::max<uint32_t>(1, std::min(tokens, case_.length) / 128);
  const uint32_t jobs_of_set = std::min({std::max(1U, places / set_count()), blocks(), most});
  Arena arena(Arena::Sides::kBoth);
  std::vector<cuda::AttendCall> calls;
  for (uint32_t launch = 0; launch < launches; ++launch) {
    const Slot<cuda::AttendSet> sets = arena.Take<cuda::AttendSet>(set_count());
    const Slot<cuda::AttendJob> jobs = arena.Take<cuda::AttendJob>(set_count() * jobs_of_set);
    for (uint32_t i = 0; i < set_count(); ++i) {
      const std::vector<uint64_t> words = RandomTokens(tokens);
      const Slot<uint64_t> mask = arena.Take<uint64_t>(words.size());
      std::copy(words.begin(), words.end(), mask.host);
      const Slot<uint32_t> tickets = arena.Take<uint32_t>(16);
      std::fill_n(tickets.host, 16, 0);
      cuda::AttendSet set;
      set.slices = slice_tables_[i / case_.layout.kv_head_count];
      set.tokens = mask.device;
      set.qs = qs_;
      set.visible = visible_;
      set.out = arena.Take<double>(size_t{heads} * dim).device;
      set.sums = arena.Take<cuda::HeadSums>(heads).device;
      set.parts = arena.Take<float>(size_t{jobs_of_set} * heads * dim).device;
      set.part_sums = arena.Take<cuda::HeadSums>(size_t{jobs_of_set} * heads).device;
      set.tickets = tickets.device;
      set.head_count = heads;
      set.kv_head = i % case_.layout.kv_head_count;
      set.job_count = jobs_of_set;
      sets.host[i] = set;
      for (uint32_t job = 0; job < jobs_of_set; ++job) {
        const uint32_t begin = blocks() * job / jobs_of_set;
        const uint32_t end = blocks() * (job + 1) / jobs_of_set;
        jobs.host[i * jobs_of_set + job] = {
            .set = i, .index = job, .first_word = begin, .word_count = end - begin};
      }
    }
    call.sets = sets.device;
    call.jobs = jobs.device;
    call.job_count = set_count() * jobs_of_set;
    calls.push_back(call);
  }
  arena.Upload(stream_);
  const double us =
      Time(launches, [&](uint32_t i) { Check(cuda::Attend(calls[i], stream_), "attend"); });
  Report(
      name, us,
      static_cast<double>(set_count()) * std::min(tokens, case_.length) * case_.layout.row_bytes());
}

void Bench::MeasureScan(bool bounded, uint32_t launches) {
  const uint32_t heads = case_.layout.group_size();
  Arena arena(Arena::Sides::kBoth);
  Arena results(Arena::Sides::kDevice);
  const size_t pages = size_t{heads} * blocks();
  const Slot<cuda::ScanSet> sets = arena.Take<cuda::ScanSet>(set_count());
  std::vector<cuda::ScanJob> jobs;
  const std::vector<uint64_t> words(blocks(), ~uint64_t{0});
  const Slot<uint64_t> mask = arena.Take<uint64_t>(words.size());
  std::copy(words.begin(), words.end(), mask.host);
  const size_t total = size_t{set_count()} * blocks();
  const auto target = static_cast<uint32_t>(std::max<size_t>(16, total / (12 * 132)));
  for (uint32_t i = 0; i < set_count(); ++i) {
    cuda::ScanSet set;
    set.sketches = sketch_tables_[i / case_.layout.kv_head_count];
    set.tokens = mask.device;
    set.metric = set.x = set.qw = ones_;
    set.qs = qs_;
    set.norm = norms_;
    set.visible = visible_;
    set.weights = results.Take<float>(pages * kBlockTokens).device;
    set.reference = results.Take<int32_t>(pages).device;
    set.page_sum = results.Take<float>(pages).device;
    set.lower_share = results.Take<float>(pages).device;
    set.estimate_share = results.Take<float>(pages).device;
    set.head_count = heads;
    set.kv_head = i % case_.layout.kv_head_count;
    set.block_count = blocks();
    sets.host[i] = set;
    for (uint32_t block = 0; block < blocks(); block += target) {
      jobs.push_back(
          {.set = i, .first_block = block, .block_count = std::min(target, blocks() - block)});
    }
  }
  const Slot<cuda::ScanJob> job_slot = arena.Take<cuda::ScanJob>(jobs.size());
  std::copy(jobs.begin(), jobs.end(), job_slot.host);
  arena.Upload(stream_);
  cuda::ScanCall call;
  call.shape = shape_;
  call.bounded = bounded;
  call.radius_scale = radius_scale_;
  call.sets = sets.device;
  call.jobs = job_slot.device;
  call.job_count = static_cast<uint32_t>(jobs.size());
  call.head_count_max = heads;
  const double us = Time(launches, [&](uint32_t) { Check(cuda::Scan(call, stream_), "scan"); });
  Report(bounded ? "scan with bounds" : "scan", us,
         static_cast<double>(total) * static_cast<double>(shape_.page_bytes));
}

void MeasureCase(const Case& shape) {
  Bench bench(shape);
  bench.MeasureSeal();
  bench.MeasureAttend("dense", shape.length, false, 2);
  bench.MeasureAttend("dense with bounds", shape.length, true, 2);
  bench.MeasureAttend("list of 2048", 2048, false, 16);
  bench.MeasureAttend("list of 2048 with bounds", 2048, true, 16);
  if (shape.layout.group_size() == 1) bench.MeasureAttend("list of 256", 256, false, 32);
  bench.MeasureScan(false, 4);
  bench.MeasureScan(true, 4);
}

std::vector<Case> Cases() {
  const KvLayout grouped{
      .query_head_count = 32, .kv_head_count = 8, .head_dim = 128, .dtype = DType::kBfloat16};
  KvLayout single = grouped;
  single.kv_head_count = 32;
  KvLayout wide = grouped;
  wide.kv_head_count = 4;
  KvLayout small = grouped;
  small.head_dim = 64;
  return {{.rows = 1, .length = 8192, .layout = grouped},
          {.rows = 1, .length = 32768, .layout = grouped},
          {.rows = 1, .length = 131072, .layout = grouped},
          {.rows = 8, .length = 32768, .layout = grouped},
          {.rows = 8, .length = 131072, .layout = grouped},
          {.rows = 16, .length = 4096, .layout = single},
          {.rows = 8, .length = 32768, .layout = wide},
          {.rows = 32, .length = 8192, .layout = small}};
}

}  // namespace
}  // namespace kvservice::bench

// With an argument: only the case of that number; "direct" (and a number) for whole answers.
int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "direct") {
    kvservice::bench::MeasureDirect(argc > 2 ? std::stoi(argv[2]) : -1);
    return 0;
  }
  const std::vector<kvservice::bench::Case> cases = kvservice::bench::Cases();
  for (size_t i = 0; i < cases.size(); ++i) {
    if (argc > 1 && std::to_string(i) != argv[1]) continue;
    kvservice::bench::MeasureCase(cases[i]);
  }
  return 0;
}
