#include "tests/bench/scan_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>

#include "absl/types/span.h"
#include "attention/cpu/head_queries.h"
#include "attention/cpu/scan_kernel.h"
#include "attention/cpu/thread_pool.h"
#include "attention/cpu/token_mask.h"
#include "attention/sketch.h"
#include "tests/bench/sum_words.h"

namespace kvservice::bench {
namespace {

// What the threads take at once.
constexpr uint32_t kTaskBlocks = 64;

// One KV head, ready to be scanned.
struct HeadScan {
  HeadScan(const LayerData& layer, uint32_t index, bool bounded) : kv_head(index) {
    const LayerShape& shape = layer.shape();
    const uint32_t head_dim = shape.layout.head_dim;
    const uint32_t group = shape.layout.group_size();
    queries.head_count = group;
    std::vector<const float*> q;
    for (uint32_t head = 0; head < group; ++head) {
      q.push_back(&layer.queries()[size_t{kv_head * group + head} * head_dim]);
      for (uint32_t c = 0; c < head_dim; ++c) queries.qs.push_back(shape.scale * q.back()[c]);
      queries.visible_begin.push_back(0);
      queries.visible_end.push_back(layer.view().length);
    }
    PrepareScan(shape, q, layer.tables()[kv_head], bounded, &scan_queries);
    weights.Resize(group, 0, layer.view().length / kBlockTokens, bounded);
  }

  const uint32_t kv_head;
  HeadQueries queries;
  ScanQueries scan_queries;
  ScanWeights weights;
};

class ScanBench {
 public:
  ScanBench(const LayerData& layer, uint32_t threads)
      : layer_(layer),
        view_(layer.view()),
        pool_(threads),
        tokens_(view_.length / kBlockTokens, ~uint64_t{0}) {}

  size_t sketch_bytes() const {
    const KvLayout& layout = layer_.shape().layout;
    return tokens_.size() * SketchLayout(layout.head_dim).slice_bytes(layout.kv_head_count);
  }

  double ReadAll() {
    const DeviceMemory& memory = layer_.slice_memory();
    return Read(memory.data(), memory.bytes());
  }
  double ReadSketches() { return Read(view_.sketches[0], sketch_bytes()); }

  double Scan(std::vector<HeadScan>* heads) {
    const auto blocks = static_cast<uint32_t>(tokens_.size());
    const uint32_t parts = (blocks + kTaskBlocks - 1) / kTaskBlocks;
    return Seconds([&] {
      pool_.ParallelFor(parts * static_cast<uint32_t>(heads->size()),
                        [&](uint32_t index, uint32_t) {
                          HeadScan& head = (*heads)[index / parts];
                          const uint32_t begin = index % parts * kTaskBlocks;
                          ScanTask task;
                          task.shape = &layer_.shape();
                          task.view = &view_;
                          task.kv_head = head.kv_head;
                          task.queries = &head.queries;
                          task.scan_queries = &head.scan_queries;
                          task.table = &layer_.tables()[head.kv_head];
                          task.tokens = absl::MakeConstSpan(tokens_).subspan(begin, kTaskBlocks);
                          task.block_begin = begin;
                          ScanPages(task, &head.weights);
                        });
    });
  }

 private:
  double Read(const std::byte* data, size_t bytes) {
    constexpr uint32_t kParts = 64;
    const size_t words = bytes / sizeof(uint64_t);
    return Seconds([&] {
      pool_.ParallelFor(kParts, [&](uint32_t part, uint32_t) {
        const size_t begin = words * part / kParts;
        sink_ += SumWords(reinterpret_cast<const uint64_t*>(data) + begin,
                          words * (part + 1) / kParts - begin);
      });
    });
  }

  const LayerData& layer_;
  const KvView view_;
  ThreadPool pool_;
  const TokenMask tokens_;
  std::atomic<uint64_t> sink_{0};
};

}  // namespace

std::vector<Row> MeasureScan(const LayerData& layer, uint32_t repetitions, uint32_t threads) {
  ScanBench bench(layer, threads);
  std::vector<double> read;
  std::vector<Row> rows;
  std::vector<std::pair<std::string, std::vector<HeadScan>>> cases;
  for (const bool bounded : {false, true}) {
    cases.emplace_back(bounded ? "sketch_scan_bounds" : "sketch_scan", std::vector<HeadScan>());
    for (uint32_t head = 0; head < layer.shape().layout.kv_head_count; ++head) {
      cases.back().second.emplace_back(layer, head, bounded);
    }
  }
  std::vector<std::vector<double>> seconds(cases.size());
  for (uint32_t i = 0; i < repetitions; ++i) {
    bench.ReadAll();
    read.push_back(bench.ReadSketches());
    for (size_t scan = 0; scan < cases.size(); ++scan) {
      bench.ReadAll();
      seconds[scan].push_back(bench.Scan(&cases[scan].second));
    }
  }
  const double read_seconds = Median(&read);
  for (size_t scan = 0; scan < cases.size(); ++scan) {
    const double taken = Median(&seconds[scan]);
    rows.push_back({.workload = "attend_cpu",
                    .case_name = cases[scan].first,
                    .value = static_cast<double>(bench.sketch_bytes()) / taken / 1e9,
                    .unit = "GB/s",
                    .baseline = "read_bandwidth",
                    .ratio = read_seconds / taken});
  }
  return rows;
}

}  // namespace kvservice::bench
