// Kernels that read or write single rows: appends, exact logits, outputs of two attentions, and
// what plans and proofs read of sketches and values.

#include "attention/cuda/elements-inl.h"

namespace kvservice::cuda {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWarps = kThreads / kWarp;

__device__ __forceinline__ size_t RowOffset(const CacheShape& shape, uint32_t kv_head,
                                            uint32_t token) {
  return (size_t{kv_head} * kTokens + token) * shape.row_bytes;
}

// Copies in units of 16 bytes, of which vectors are whole numbers.
__global__ void AppendKernel(const CacheShape shape, const AppendItem* items) {
  const AppendItem item = items[blockIdx.x];
  const uint32_t units = shape.vector_bytes / 16;
  const uint32_t rows = item.token_count * shape.kv_head_count;
  for (uint32_t i = blockIdx.y * kThreads + threadIdx.x; i < rows * units;
       i += gridDim.y * kThreads) {
    const uint32_t row = i / units;
    const uint32_t unit = i % units;
    std::byte* to = item.slice + RowOffset(shape, row % shape.kv_head_count,
                                           item.first + row / shape.kv_head_count);
    const size_t from = size_t{row} * units + unit;
    reinterpret_cast<uint4*>(to)[unit] = reinterpret_cast<const uint4*>(item.k)[from];
    reinterpret_cast<uint4*>(to)[units + unit] = reinterpret_cast<const uint4*>(item.v)[from];
  }
}

// Squared norm of a vector, in all lanes of the warp.
template <int kType>
__device__ __forceinline__ float SquaresOf(const std::byte* vector, uint32_t head_dim) {
  float squares = 0.0F;
  for (uint32_t c = threadIdx.x % kWarp; c < head_dim; c += kWarp) {
    const float x = LoadElement<kType>(vector, c);
    squares = fmaf(x, x, squares);
  }
  return SumOverLanes(squares);
}

// The bits of tokens [begin, end) of a block.
__device__ __forceinline__ uint64_t RangeWord(uint32_t block, uint32_t begin, uint32_t end) {
  const uint32_t first = block * kTokens;
  const uint32_t low = max(begin, first);
  const uint32_t high = min(end, first + kTokens);
  if (low >= high) return 0;
  return (~uint64_t{0} >> (kTokens - (high - first))) & (~uint64_t{0} << (low - first));
}

template <int kType>
__global__ void PageHeadKernel(const CacheShape shape, const PageHeadTask* tasks) {
  const PageHeadTask task = tasks[blockIdx.y];
  const uint32_t block = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (block >= task.block_count) return;
  const uint64_t seen = RangeWord(block, task.begin, task.end);
  PageHead head;
  uint64_t open = seen;
  if (const std::byte* sketch = task.sketches[block]; sketch != nullptr) {
    const std::byte* page = sketch + size_t{task.kv_head} * shape.page_bytes;
    head.exact = *reinterpret_cast<const uint64_t*>(page + shape.exact);
    head.value_norm_max = *reinterpret_cast<const float*>(page + shape.norms + 8);
    open &= head.exact;
    if (task.value_codes != nullptr) {
      const auto* codes = reinterpret_cast<const uint16_t*>(page + shape.vn);
      auto* to = reinterpret_cast<uint16_t*>(task.value_codes + size_t{block} * kTokens);
      to[threadIdx.x % kWarp] = codes[threadIdx.x % kWarp];
    }
  }
  if (task.bounds_values) {
    const std::byte* rows = task.slices[block] + RowOffset(shape, task.kv_head, 0);
    for (; open != 0; open &= open - 1) {
      const auto token = static_cast<uint32_t>(__ffsll(static_cast<long long>(open))) - 1;
      const float squares = SquaresOf<kType>(
          rows + size_t{token} * shape.row_bytes + shape.vector_bytes, shape.head_dim);
      head.value_squares = squares <= 0x1.fffffep+127F ? fmaxf(head.value_squares, squares)
                                                       : __int_as_float(0x7f800000);
      if (!(squares <= 0x1.fffffep+127F)) break;
    }
  }
  if (threadIdx.x % kWarp == 0) task.heads[block] = head;
}

template <int kType>
__global__ void ScoreKernel(const ScoreCall call) {
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (index >= call.token_count) return;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t position = call.positions[index];
  const uint32_t dim = call.shape.head_dim;
  const std::byte* row =
      call.slices[position / kTokens] + RowOffset(call.shape, call.kv_head, position % kTokens);
  float logit = 0.0F;
  float squares = 0.0F;
  for (uint32_t c = lane; c < dim; c += kWarp) {
    const float k = LoadElement<kType>(row, c);
    logit = fmaf(k, call.qs[c], logit);
    squares = fmaf(k, k, squares);
    if (call.values != nullptr) {
      call.values[size_t{index} * dim + c] = LoadElement<kType>(row, dim + c);
    }
  }
  logit = SumOverLanes(logit);
  squares = SumOverLanes(squares);
  if (lane == 0) call.scores[index] = {.logit = logit, .key_squares = squares};
}

// A CTA per head and set, and behind them those that copy. Doubles throughout, but for the output:
// what the merge adds to an output's error is far below the margin that MergePartials counts for
// it.
__global__ void MergeKernel(const MergeCall call) {
  if (blockIdx.x >= call.set_count) {
    const uint32_t cta = (blockIdx.x - call.set_count) * gridDim.y + blockIdx.y;
    const uint32_t ctas = (gridDim.x - call.set_count) * gridDim.y;
    return CopyStretch(call.results, cta * kThreads + threadIdx.x, ctas * kThreads);
  }
  const MergeSet set = call.sets[blockIdx.x];
  const uint32_t head = blockIdx.y;
  if (head >= set.head_count) return;
  HeadSums first = set.first_sums[head];
  HeadSums chosen;  // empty
  if (set.chosen_sums != nullptr) chosen = set.chosen_sums[head];
  // An empty set's output counts for nothing, whatever it is.
  if (first.sum == 0.0) first.reference = chosen.reference;
  if (chosen.sum == 0.0) chosen.reference = first.reference;
  const int32_t top = max(first.reference, chosen.reference);
  const double first_weight = scalbn(first.sum, first.reference - top);
  const double chosen_weight = scalbn(chosen.sum, chosen.reference - top);
  const double total = first_weight + chosen_weight;
  const size_t begin = size_t{head} * call.head_dim;
  for (uint32_t c = threadIdx.x; c < call.head_dim; c += kThreads) {
    double out = 0.0;
    if (chosen.sum == 0.0) {
      out = set.first_out[begin + c];
    } else if (first.sum == 0.0) {
      out = set.chosen_out[begin + c];
    } else {
      out = first_weight * set.first_out[begin + c] + chosen_weight * set.chosen_out[begin + c];
      out /= total;
    }
    set.out[begin + c] = static_cast<float>(out);
  }
}

// Norms are not negative, so they are ordered as integers are.
template <int kType>
__global__ void LargestKeyKernel(const KeyNormCall call) {
  float largest = 0.0F;
  for (uint32_t position = call.begin + blockIdx.x * kWarps + threadIdx.x / kWarp;
       position < call.end; position += gridDim.x * kWarps) {
    const std::byte* row =
        call.slices[position / kTokens] + RowOffset(call.shape, call.kv_head, position % kTokens);
    const float squares = SquaresOf<kType>(row, call.shape.head_dim);
    largest = squares <= 0x1.fffffep+127F ? fmaxf(largest, squares) : __int_as_float(0x7f800000);
    if (!(squares <= 0x1.fffffep+127F)) break;
  }
  if (threadIdx.x % kWarp == 0) {
    atomicMax(reinterpret_cast<int32_t*>(call.squares_max), __float_as_int(largest));
  }
}

}  // namespace

cudaError_t Append(const CacheShape& shape, const AppendItem* items, uint32_t item_count,
                   cudaStream_t stream) {
  if (item_count == 0) return cudaSuccess;
  constexpr uint32_t kPartsOfItem = 8;
  AppendKernel<<<dim3(item_count, kPartsOfItem), kThreads, 0, stream>>>(shape, items);
  return cudaGetLastError();
}

cudaError_t ReadPageHeads(const CacheShape& shape, const PageHeadTask* tasks, uint32_t task_count,
                          uint32_t block_count_max, cudaStream_t stream) {
  if (task_count == 0 || block_count_max == 0) return cudaSuccess;
  const dim3 grid((block_count_max + kWarps - 1) / kWarps, task_count);
  if (shape.dtype == kFloat32) {
    PageHeadKernel<kFloat32><<<grid, kThreads, 0, stream>>>(shape, tasks);
  } else if (shape.dtype == kFloat16) {
    PageHeadKernel<kFloat16><<<grid, kThreads, 0, stream>>>(shape, tasks);
  } else {
    PageHeadKernel<kBfloat16><<<grid, kThreads, 0, stream>>>(shape, tasks);
  }
  return cudaGetLastError();
}

cudaError_t Score(const ScoreCall& call, cudaStream_t stream) {
  if (call.token_count == 0) return cudaSuccess;
  const uint32_t grid = (call.token_count + kWarps - 1) / kWarps;
  if (call.shape.dtype == kFloat32) {
    ScoreKernel<kFloat32><<<grid, kThreads, 0, stream>>>(call);
  } else if (call.shape.dtype == kFloat16) {
    ScoreKernel<kFloat16><<<grid, kThreads, 0, stream>>>(call);
  } else {
    ScoreKernel<kBfloat16><<<grid, kThreads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

cudaError_t MergeOutputs(const MergeCall& call, cudaStream_t stream) {
  if (call.set_count == 0) return cudaSuccess;
  constexpr uint32_t kCopyColumnsMax = 16;
  const uint32_t column = call.head_count_max * kThreads;
  const uint32_t wanted = (call.results.count + column - 1) / column;
  const uint32_t columns = call.set_count + (wanted < kCopyColumnsMax ? wanted : kCopyColumnsMax);
  MergeKernel<<<dim3(columns, call.head_count_max), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

cudaError_t LargestKey(const KeyNormCall& call, cudaStream_t stream) {
  const cudaError_t code = cudaMemsetAsync(call.squares_max, 0, sizeof(float), stream);
  if (code != cudaSuccess || call.begin >= call.end) return code;
  constexpr uint32_t kGridMax = 1024;
  const uint32_t needed = (call.end - call.begin + kWarps - 1) / kWarps;
  const uint32_t grid = needed < kGridMax ? needed : kGridMax;
  if (call.shape.dtype == kFloat32) {
    LargestKeyKernel<kFloat32><<<grid, kThreads, 0, stream>>>(call);
  } else if (call.shape.dtype == kFloat16) {
    LargestKeyKernel<kFloat16><<<grid, kThreads, 0, stream>>>(call);
  } else {
    LargestKeyKernel<kBfloat16><<<grid, kThreads, 0, stream>>>(call);
  }
  return cudaGetLastError();
}

}  // namespace kvservice::cuda
