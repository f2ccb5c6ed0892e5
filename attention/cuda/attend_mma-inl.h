// Attention over 16-bit caches on tensor cores. The plan is that of attend-inl.h; each warp takes
// groups of 16 tokens from a queue of its own (attend_rows-inl.h).
//
// Keys are the rows of a product (16 tokens), queries its columns: columns 2 h and 2 h + 1 belong
// to head h of four, and thread 4 r + q ends up with the logits of tokens r and r + 8 for head q of
// a tile, and later with sums of values for the same head. Weights and masses are those of
// attend-inl.h. What the products are is the choice of a class:
//
//   - ProvenProducts, attend_proven-inl.h: double, whose roundings are specified.
//   - QuickProducts, attend_quick-inl.h: the cache's type, of whose sums nothing is proven.

#ifndef KVSERVICE_ATTENTION_CUDA_ATTEND_MMA_INL_H_
#define KVSERVICE_ATTENTION_CUDA_ATTEND_MMA_INL_H_

#include "attention/cuda/attend_rows-inl.h"

namespace kvservice::cuda {

inline constexpr uint32_t kMmaHeads = 4;  // of a tile

// What a CTA keeps in shared memory, beside the queues.
template <class Products>
struct MmaShared {
  WordTable table;
  RowNotes<Products::kSteps> notes[kAttendWarps];
  CtaSums<Products::kHeads> sums;
  int32_t shifts[Products::kHeads];
  AttendSet set;  // for the end: registers are short in between
};

// Products: kSteps, kTiles, kHeads, kValueScale, and
//   Products(set, head of column 0)       starts loading queries
//   Prepare(scratch, shifts)              finishes that; shared memory of the CTA, [kHeads] shifts
//   Multiply(rows, logits)                [kTiles][2], of this lane's heads and tokens
//   AddValues(rows, weights)              [kTiles][2]
//   Rescale(tile, exponent)               multiplies sums of values with a power of two
//   Leave(tile, factor, to)               writes them, to[kDim], of the lane's own head
//   key_squares_max()
template <class Products>
class MmaWarp {
 public:
  static constexpr int kTiles = Products::kTiles;
  static constexpr int kSteps = Products::kSteps;
  using Sizes = RowSizes<kSteps>;

  __device__ __forceinline__ MmaWarp(const AttendCall& call, const AttendSet& set, uint32_t tile,
                                     MmaShared<Products>* shared, std::byte* memory)
      : softcap_(call.softcap),
        read_values_(set.read_values),
        lane_(threadIdx.x % kWarp),
        shifts_(shared->shifts),
        products_(set, tile * Products::kHeads),
        queue_(shared->table, set.read_values, &shared->notes[threadIdx.x / kWarp],
               memory + threadIdx.x / kWarp * Sizes::kQueueBytes) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint32_t own = tile * Products::kHeads + t * kMmaHeads + lane_ % 4;
      if (own < set.head_count) {
        visible_begin_[t] = set.visible[2 * own];
        visible_end_[t] = set.visible[2 * own + 1];
      }
      reference_[t] = kReferenceMin;
      finite_[t] = true;
    }
  }

  // The table has been filled, with `words` words from `first` on of the set: starts reading.
  __device__ __forceinline__ void Start(uint32_t first, uint32_t words, uint32_t tokens,
                                        uint32_t row_bytes) {
    queue_.Start(first, words, tokens, row_bytes);
  }

  // Once, while the first rows travel. All threads of the CTA call it; `scratch` is the CTA's.
  __device__ __forceinline__ void Prepare(std::byte* scratch) {
    products_.Prepare(scratch, shifts_);
  }

  // Attends to the tokens of the table.
  __device__ __forceinline__ void Attend() {
    constexpr uint32_t kRecent = 4;  // groups whose weights are added up in fp32
    const uint32_t tokens = queue_.tokens();
    uint32_t stage = 0;
    uint32_t ahead = Sizes::kStages - 1;
    uint32_t group = 0;
    for (uint32_t at = threadIdx.x / kWarp * kGroupTokens; at < tokens;
         at += kAttendWarps * kGroupTokens) {
      queue_.Fetch(ahead);
      queue_.Wait();
      Weigh(queue_.rows(stage), queue_.positions());
      if (read_values_) products_.AddValues(queue_.rows(stage), weights_);
      if (++group % kRecent == 0) AddRecent();
      stage = stage + 1 == Sizes::kStages ? 0 : stage + 1;
      ahead = ahead + 1 == Sizes::kStages ? 0 : ahead + 1;
      // The other lanes have read what the next group overwrites.
      __syncwarp();
    }
    AddRecent();
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }

  // This warp's sums of its heads.
  __device__ __forceinline__ void LeaveSums(CtaSums<Products::kHeads>* sums) const {
    const uint32_t warp = threadIdx.x / kWarp;
    float squares = products_.key_squares_max();
#pragma unroll
    for (int offset = 4; offset < static_cast<int>(kWarp); offset *= 2) {
      squares = fmaxf(squares, __shfl_xor_sync(kAllLanes, squares, offset));
    }
    if (lane_ == 0) sums->key_squares_max[warp] = squares;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      double sum = finite_[t] ? sum_[t] : __longlong_as_double(0x7ff8000000000000LL);
#pragma unroll
      for (int offset = 4; offset < static_cast<int>(kWarp); offset *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, offset);
      }
      if (lane_ >= kMmaHeads) continue;
      sums->sum[warp][t * kMmaHeads + lane_] = sum;
      sums->reference[warp][t * kMmaHeads + lane_] = reference_[t];
    }
  }

  // merged: [kAttendWarps][kHeads][kDim]
  __device__ __forceinline__ void LeaveValues(const CtaSums<Products::kHeads>& sums,
                                              float* merged) const {
    const uint32_t warp = threadIdx.x / kWarp;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint32_t h = t * kMmaHeads + lane_ % 4;
      const float factor = PowerOfTwo(reference_[t] - SumOfWarps(sums, h).reference);
      products_.Leave(t, factor, merged + (warp * Products::kHeads + h) * Sizes::kDim);
    }
  }

 private:
  __device__ __forceinline__ void AddRecent() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      sum_[t] += static_cast<double>(recent_[t]);
      recent_[t] = 0.0F;
    }
  }

  // Logits of a group become weights.
  __device__ __forceinline__ void Weigh(const std::byte* rows, const uint32_t* positions) {
    float logits[kTiles][2];
    products_.Multiply(rows, logits);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& logit = logits[t][i];
        const uint32_t position = positions[lane_ / 4 + 8 * i];
        const bool sees = position >= visible_begin_[t] && position < visible_end_[t];
        if (softcap_ > 0.0F) logit = SoftcapOf(logit, softcap_);
        if (sees && !(fabsf(logit) <= 0x1.fffffep+127F)) finite_[t] = false;
        if (!sees) logit = -__int_as_float(0x7f800000);
      }
      Raise(t, fmaxf(logits[t][0], logits[t][1]));
#pragma unroll
      for (int i = 0; i < 2; ++i) weights_[t][i] = ExpScaled(logits[t][i], reference_[t]);
      recent_[t] += weights_[t][0] + weights_[t][1];
    }
  }

  // Lets references follow the largest logits; rare after the first few groups.
  __device__ __forceinline__ void Raise(int t, float logit) {
    int32_t exponent = ExponentOf(logit);
    if (!__any_sync(kAllLanes, exponent > reference_[t])) return;
#pragma unroll
    for (int offset = 4; offset < static_cast<int>(kWarp); offset *= 2) {
      exponent = max(exponent, __shfl_xor_sync(kAllLanes, exponent, offset));
    }
    const int32_t raised = max(exponent, reference_[t]);
    sum_[t] = (sum_[t] + static_cast<double>(recent_[t])) * PowerOfTwo64(reference_[t] - raised);
    recent_[t] = 0.0F;
    products_.Rescale(t, reference_[t] - raised);
    reference_[t] = raised;
  }

  const float softcap_;
  const bool read_values_;
  const uint32_t lane_;
  int32_t* const shifts_;
  Products products_;
  RowQueue<kSteps> queue_;
  // Of each tile, for this lane's own head, the lane's place among four:
  uint32_t visible_begin_[kTiles] = {};
  uint32_t visible_end_[kTiles] = {};
  int32_t reference_[kTiles];
  double sum_[kTiles] = {};
  float recent_[kTiles] = {};
  float weights_[kTiles][2] = {};
  bool finite_[kTiles];
};

template <class Products>
__global__ void __launch_bounds__(kAttendThreads, RowSizes<Products::kSteps>::kCtas)
    AttendMmaKernel(const __grid_constant__ AttendCall call) {
  using Sizes = RowSizes<Products::kSteps>;
  constexpr int kHeads = Products::kHeads;
  // Copies to places that are not aligned like what they read are slow.
  extern __shared__ __align__(128) std::byte queue[];
  __shared__ MmaShared<Products> shared;
  const AttendJob job = call.jobs[blockIdx.x];
  const uint32_t tile = blockIdx.y;
  auto* merged = reinterpret_cast<float*>(queue);
  {
    const AttendSet set = call.sets[job.set];
    if (tile * kHeads >= set.head_count) return;
    if (threadIdx.x == 0) shared.set = set;
    MmaWarp<Products> warp(call, set, tile, &shared, queue);
    uint32_t first = job.first_word;
    const uint32_t end = first + job.word_count;
    uint32_t words = min(kTableWords, end - first);
    uint32_t tokens = FillTable(set, call.shape, first, words, &shared.table);
    warp.Start(first, words, tokens, call.shape.row_bytes);
    warp.Prepare(queue + (Sizes::kStages - 1) * Sizes::kStageBytes);
    for (;;) {
      warp.Attend();
      first += words;
      if (first == end) break;
      words = min(kTableWords, end - first);
      tokens = FillTable(shared.set, call.shape, first, words, &shared.table);
      warp.Start(first, words, tokens, call.shape.row_bytes);
    }
    warp.LeaveSums(&shared.sums);
    __syncthreads();
    if (set.read_values) warp.LeaveValues(shared.sums, merged);
  }
  const AttendSet& set = shared.set;
  LeaveResult<kHeads>(set, Sizes::kDim, job.index, tile, shared.sums, merged, kAttendWarps,
                      Sizes::kDim, 1.0F / Products::kValueScale);
  MergeIfLast<kHeads, 9>(set, Sizes::kDim, tile, &shared.sums, merged);
}

template <class Products>
cudaError_t LaunchMma(const AttendCall& call, cudaStream_t stream) {
  constexpr int kSharedBytes =
      static_cast<int>(kAttendWarps) * RowSizes<Products::kSteps>::kQueueBytes;
  constexpr uint32_t kHeads = Products::kHeads;
  static_assert(sizeof(float) * kAttendWarps * kHeads * 16 * Products::kSteps <= kSharedBytes);
  const cudaError_t code = ReserveShared(AttendMmaKernel<Products>, kSharedBytes);
  if (code != cudaSuccess) return code;
  const dim3 grid(call.job_count, (call.head_count_max + kHeads - 1) / kHeads);
  AttendMmaKernel<Products><<<grid, kAttendThreads, kSharedBytes, stream>>>(call);
  return cudaGetLastError();
}

// For rows of up to 128 channels; Products<element type, kSteps, kTiles>.
template <template <int, int, int> class Products, int kType, int kTiles>
cudaError_t LaunchMmaRows(const AttendCall& call, cudaStream_t stream) {
  switch (call.shape.head_dim) {
    case 64:
      return LaunchMma<Products<kType, 4, kTiles>>(call, stream);
    case 80:
      return LaunchMma<Products<kType, 5, kTiles>>(call, stream);
    case 96:
      return LaunchMma<Products<kType, 6, kTiles>>(call, stream);
    default:
      return LaunchMma<Products<kType, 8, kTiles>>(call, stream);
  }
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ATTEND_MMA_INL_H_
