// Exact attention over sets of tokens, split over CTAs. What a CTA does:
//
//   - It takes one job, a range of words of one set, and one tile of kHeads heads. Set bits become
//     a list in shared memory; its warps take turns at groups of kWarpTokens tokens.
//   - A row of K (or V) is read by kRowLanes lanes, eight channels each, through asynchronous
//     copies into shared memory that a lane reads back itself: a queue per lane, which needs no
//     barrier and keeps kStages groups per warp in flight.
//   - Dot products of eight channels per lane meet in a reduction that leaves one logit per lane;
//     the lane exponentiates it, in units of a power of two per head, as the host does.
//   - Warps, then jobs, are added up; the job that comes last does it for all, in the order of
//     jobs, so the result does not depend on who that is.
//
// fp32 throughout (queries are not rounded to the cache's type), masses in double. Caches of 32-bit
// elements are read like this, and rows of 256 channels whose masses are bounded; the others as in
// attend_mma-inl.h.

#ifndef KVSERVICE_ATTENTION_CUDA_ATTEND_INL_H_
#define KVSERVICE_ATTENTION_CUDA_ATTEND_INL_H_

#include <cuda_pipeline_primitives.h>

#include "attention/cuda/attend_merge-inl.h"

namespace kvservice::cuda {

// Tokens, and words, that are listed at a time.
inline constexpr uint32_t kListedTokens = 2048;
inline constexpr uint32_t kListedWords = kAttendThreads;
inline constexpr uint32_t kLaneChannels = 8;

// Sizes of a kernel for rows of up to kRowLanes * 8 channels.
template <int kType, int kRowLanes, int kHeads>
struct AttendSizes {
  static constexpr int kSlots = kWarp / kRowLanes;  // rows that a warp reads at once
  static constexpr int kRounds = kRowLanes / kHeads < 4 ? kRowLanes / kHeads : 4;
  static constexpr int kWarpTokens = kSlots * kRounds;
  static constexpr int kValues = kHeads * kRounds;
  // Lanes of a row that end up with the same logit.
  static constexpr int kCopies = kRowLanes / kValues;
  static constexpr int kChunkBytes = kType == kFloat32 ? 32 : 16;
  static constexpr int kStages = kType == kFloat32 ? 2 : 3;
  static constexpr int kRoundBytes = kWarp * kChunkBytes;
  static constexpr int kStageBytes = 2 * kRounds * kRoundBytes;  // K, then V
  static constexpr int kQueueBytes = kAttendWarps * kStages * kStageBytes;
  static constexpr int kMergeBytes =
      kAttendWarps * kSlots * kHeads * kRowLanes * int{kLaneChannels} * int{sizeof(float)};
  static constexpr int kSharedBytes = kQueueBytes > kMergeBytes ? kQueueBytes : kMergeBytes;
};

// Tokens of a stretch of words: positions relative to the set's first word, and their rows. The
// last row is there a few times more, for the places of a group that have no token.
inline constexpr uint32_t kSpareRows = kWarp;
struct TokenList {
  const std::byte* rows[kListedTokens + kSpareRows];
  uint32_t positions[kListedTokens];
  uint32_t token_count;
  uint32_t warp_counts[kAttendWarps];
};

// What a listing came to.
struct Listed {
  uint32_t tokens;
  uint32_t words;
};

// Lists the tokens of words from `first` on, as many words as fit; a thread lists a word. All
// threads of the CTA call it.
__device__ inline Listed ListTokens(const AttendSet& set, const CacheShape& shape, uint32_t first,
                                    uint32_t word_count, TokenList* list) {
  const uint32_t word = threadIdx.x;
  const uint32_t lane = word % kWarp;
  __syncthreads();  // Nobody reads the list before this one any more.
  uint64_t bits = 0;
  const std::byte* slice = nullptr;
  if (word < word_count) {
    bits = set.tokens[first + word];
    slice = set.slices[first + word] + size_t{set.kv_head} * kTokens * shape.row_bytes;
  }
  const auto count = static_cast<uint32_t>(__popcll(bits));
  uint32_t end = count;
#pragma unroll
  for (uint32_t offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, end, offset);
    if (lane >= offset) end += other;
  }
  if (lane == kWarp - 1) list->warp_counts[word / kWarp] = end;
  __syncthreads();
  for (uint32_t warp = 0; warp < word / kWarp; ++warp) end += list->warp_counts[warp];
  const bool fits = word < word_count && end <= kListedTokens;
  if (fits) {
    uint32_t at = end - count;
    const uint32_t base = (first + word) * kTokens;
    for (; bits != 0; bits &= bits - 1, ++at) {
      const auto token = static_cast<uint32_t>(__ffsll(static_cast<long long>(bits))) - 1;
      list->positions[at] = base + token;
      list->rows[at] = slice + token * shape.row_bytes;
    }
  }
  const auto words = static_cast<uint32_t>(__syncthreads_count(fits));
  if (word + 1 == words) list->token_count = end;
  __syncthreads();
  const uint32_t tokens = list->token_count;
  if (word < kSpareRows && tokens > 0) list->rows[tokens + word] = list->rows[tokens - 1];
  __syncthreads();
  return {.tokens = tokens, .words = words};
}

// Adds up kCount values of each lane over the kRowLanes lanes of its row. Lane l of a row ends with
// the sum of value l / (kRowLanes / kCount).
template <int kCount, int kRowLanes>
__device__ __forceinline__ float SumOverRow(float (&values)[kCount], uint32_t lane) {
  int count = kCount;
#pragma unroll
  for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = (lane & offset) != 0;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= count) break;
        const float sent = upper ? values[i] : values[i + count];
        const float kept = upper ? values[i + count] : values[i];
        values[i] = kept + __shfl_xor_sync(kAllLanes, sent, offset);
      }
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
    }
  }
  return values[0];
}

// What a warp knows of its tile.
template <int kHeads>
struct WarpState {
  float acc[kHeads][kLaneChannels];   // of this lane's slot and channels
  double sum = 0.0;                   // of this lane's own weights, but for the latest few
  float recent = 0.0F;                // those
  int32_t reference = kReferenceMin;  // of this lane's own head
  float key_squares_max = 0.0F;
  bool finite = true;
};

template <int kType, int kRowLanes, int kHeads>
class AttendWarp {
 public:
  using Sizes = AttendSizes<kType, kRowLanes, kHeads>;

  __device__ __forceinline__ AttendWarp(const AttendCall& call, const AttendSet& set, uint32_t tile,
                                        const TokenList& list, std::byte* queue)
      : call_(call), set_(set), list_(list), queue_(queue), lane_(threadIdx.x % kWarp) {
    const uint32_t dim = call.shape.head_dim;
    channel_ = lane_ % kRowLanes * kLaneChannels;
    reads_ = channel_ < dim;
    own_ = lane_ % kRowLanes / Sizes::kCopies;
    counts_ = lane_ % kRowLanes % Sizes::kCopies == 0;
    const uint32_t own_head = tile * kHeads + own_ / Sizes::kRounds;
    if (own_head < set.head_count) {
      visible_begin_ = set.visible[2 * own_head];
      visible_end_ = set.visible[2 * own_head + 1];
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const uint32_t head = tile * kHeads + h;
      float4 low = make_float4(0, 0, 0, 0);
      float4 high = low;
      if (reads_ && head < set.head_count) {
        const auto* qs = reinterpret_cast<const float4*>(set.qs + size_t{head} * dim + channel_);
        low = qs[0];
        high = qs[1];
      }
      q_[h][0] = low.x, q_[h][1] = low.y, q_[h][2] = low.z, q_[h][3] = low.w;
      q_[h][4] = high.x, q_[h][5] = high.y, q_[h][6] = high.z, q_[h][7] = high.w;
#pragma unroll
      for (uint32_t c = 0; c < kLaneChannels; ++c) state.acc[h][c] = 0.0F;
    }
    if (!reads_) ZeroQueue();
  }

  // Attends to the list's tokens that are this warp's.
  __device__ __forceinline__ void Attend(uint32_t token_count) {
    constexpr uint32_t kStep = kAttendWarps * Sizes::kWarpTokens;
    // Weights that are added up in fp32 before they join the sum.
    constexpr uint32_t kRecent = 8;
    const uint32_t first = threadIdx.x / kWarp * Sizes::kWarpTokens;
#pragma unroll
    for (int stage = 0; stage < Sizes::kStages - 1; ++stage) {
      Fetch(first + stage * kStep, token_count, stage);
    }
    int stage = 0;
    int ahead = Sizes::kStages - 1;
    uint32_t group = 0;
    for (uint32_t at = first; at < token_count; at += kStep) {
      Fetch(at + (Sizes::kStages - 1) * kStep, token_count, ahead);
      __pipeline_wait_prior(Sizes::kStages - 1);
      Add(at, token_count, stage);
      if (++group % kRecent == 0) AddRecent();
      stage = stage + 1 == Sizes::kStages ? 0 : stage + 1;
      ahead = ahead + 1 == Sizes::kStages ? 0 : ahead + 1;
    }
    AddRecent();
    __pipeline_wait_prior(0);
  }

  WarpState<kHeads> state;

 private:
  __device__ __forceinline__ std::byte* Place(int stage, int round, bool value) const {
    return queue_ + stage * Sizes::kStageBytes +
           (value ? Sizes::kRounds + round : round) * Sizes::kRoundBytes;
  }

  // The chunks of lanes beyond the row are never fetched; they meet queries of zero.
  __device__ __forceinline__ void ZeroQueue() {
    for (int stage = 0; stage < Sizes::kStages; ++stage) {
      for (int round = 0; round < 2 * Sizes::kRounds; ++round) {
        auto* to =
            reinterpret_cast<uint4*>(Place(stage, round, false) + lane_ * Sizes::kChunkBytes);
        for (int i = 0; i < Sizes::kChunkBytes / 16; ++i) to[i] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Starts reading the tokens from `at` on, if there are any.
  __device__ __forceinline__ void Fetch(uint32_t at, uint32_t token_count, int stage) {
    if (at < token_count && reads_) {
#pragma unroll
      for (int round = 0; round < Sizes::kRounds; ++round) {
        const std::byte* row = list_.rows[at + round * Sizes::kSlots + lane_ / kRowLanes] +
                               channel_ * (Sizes::kChunkBytes / kLaneChannels);
#pragma unroll
        for (int i = 0; i < Sizes::kChunkBytes / 16; ++i) {
          const uint32_t offset = lane_ * Sizes::kChunkBytes + 16 * i;
          __pipeline_memcpy_async(Place(stage, round, false) + offset, row + 16 * i, 16);
          if (!set_.read_values) continue;
          __pipeline_memcpy_async(Place(stage, round, true) + offset,
                                  row + call_.shape.vector_bytes + 16 * i, 16);
        }
      }
    }
    __pipeline_commit();
  }

  __device__ __forceinline__ void AddRecent() {
    state.sum += static_cast<double>(state.recent);
    state.recent = 0.0F;
  }

  // The logit of this lane's own head and token.
  __device__ __forceinline__ float Logit(int stage) {
    float values[Sizes::kValues];
    float squares[Sizes::kRounds];
#pragma unroll
    for (int round = 0; round < Sizes::kRounds; ++round) {
      float k[kLaneChannels];
      LoadEight<kType>(Place(stage, round, false) + lane_ * Sizes::kChunkBytes, k);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = q_[h][0] * k[0];
#pragma unroll
        for (uint32_t c = 1; c < kLaneChannels; ++c) dot = fmaf(q_[h][c], k[c], dot);
        values[h * Sizes::kRounds + round] = dot;
      }
      if (!call_.bound_masses) continue;
      squares[round] = k[0] * k[0];
#pragma unroll
      for (uint32_t c = 1; c < kLaneChannels; ++c) {
        squares[round] = fmaf(k[c], k[c], squares[round]);
      }
    }
    if (call_.bound_masses) {
      const float norm = SumOverRow<Sizes::kRounds, kRowLanes>(squares, lane_);
      // A norm that is not a number is not small.
      state.key_squares_max =
          norm == norm ? fmaxf(state.key_squares_max, norm) : __int_as_float(0x7f800000);
    }
    return SumOverRow<Sizes::kValues, kRowLanes>(values, lane_);
  }

  // Lets references follow the largest logits; rare after the first few groups.
  __device__ __forceinline__ void Raise(float logit) {
    int32_t exponent = ExponentOf(logit);
    if (!__any_sync(kAllLanes, exponent > state.reference)) return;
      // Lanes of the same head keep the same reference.
#pragma unroll
    for (int offset = kRowLanes; offset < static_cast<int>(kWarp); offset *= 2) {
      exponent = max(exponent, __shfl_xor_sync(kAllLanes, exponent, offset));
    }
#pragma unroll
    for (int offset = Sizes::kCopies; offset < kRowLanes / kHeads; offset *= 2) {
      exponent = max(exponent, __shfl_xor_sync(kAllLanes, exponent, offset));
    }
    AddRecent();
    const int32_t raised = max(exponent, state.reference);
    const float factor = PowerOfTwo(state.reference - raised);
    state.sum *= PowerOfTwo64(state.reference - raised);
    state.reference = raised;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float of_head = __shfl_sync(kAllLanes, factor, OwnerOf(h, 0));
#pragma unroll
      for (uint32_t c = 0; c < kLaneChannels; ++c) state.acc[h][c] *= of_head;
    }
  }

  __device__ __forceinline__ uint32_t OwnerOf(int h, int round) const {
    return lane_ / kRowLanes * kRowLanes + (h * Sizes::kRounds + round) * Sizes::kCopies;
  }

  __device__ __forceinline__ void Add(uint32_t at, uint32_t token_count, int stage) {
    float logit = Logit(stage);
    const uint32_t index = at + own_ % Sizes::kRounds * Sizes::kSlots + lane_ / kRowLanes;
    const uint32_t position = index < token_count ? list_.positions[index] : 0;
    const bool sees = index < token_count && position >= visible_begin_ && position < visible_end_;
    if (call_.softcap > 0.0F) logit = SoftcapOf(logit, call_.softcap);
    if (sees && !(fabsf(logit) <= 0x1.fffffep+127F)) state.finite = false;
    if (!sees) logit = -__int_as_float(0x7f800000);
    Raise(logit);
    const float weight = ExpScaled(logit, state.reference);
    if (counts_) state.recent += weight;
    if (!set_.read_values) return;
#pragma unroll
    for (int round = 0; round < Sizes::kRounds; ++round) {
      float v[kLaneChannels];
      LoadEight<kType>(Place(stage, round, true) + lane_ * Sizes::kChunkBytes, v);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float of_token = __shfl_sync(kAllLanes, weight, OwnerOf(h, round));
#pragma unroll
        for (uint32_t c = 0; c < kLaneChannels; ++c) {
          state.acc[h][c] = fmaf(of_token, v[c], state.acc[h][c]);
        }
      }
    }
  }

  const AttendCall& call_;
  const AttendSet& set_;
  const TokenList& list_;
  std::byte* const queue_;
  const uint32_t lane_;
  uint32_t channel_ = 0;
  uint32_t own_ = 0;  // index of this lane's logit: head of the tile * kRounds + round
  uint32_t visible_begin_ = 0;
  uint32_t visible_end_ = 0;
  bool reads_ = false;   // has channels of the row
  bool counts_ = false;  // of the lanes with the same logit, the one that adds it up
  float q_[kHeads][kLaneChannels];
};

// Every warp's sums of its heads, and the largest norm that it met.
template <class Sizes, int kRowLanes, int kHeads>
__device__ inline void LeaveSums(const WarpState<kHeads>& state, CtaSums<kHeads>* sums) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
  double sum = state.finite ? state.sum : __longlong_as_double(0x7ff8000000000000LL);
#pragma unroll
  for (int offset = kRowLanes; offset < static_cast<int>(kWarp); offset *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
#pragma unroll
  for (int offset = 1; offset < kRowLanes / kHeads; offset *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  float squares = state.key_squares_max;
#pragma unroll
  for (int offset = 1; offset < static_cast<int>(kWarp); offset *= 2) {
    squares = fmaxf(squares, __shfl_xor_sync(kAllLanes, squares, offset));
  }
  if (lane == 0) sums->key_squares_max[warp] = squares;
  constexpr uint32_t kLanesOfHead = kRowLanes / kHeads;
  if (lane < kRowLanes && lane % kLanesOfHead == 0) {
    sums->sum[warp][lane / kLanesOfHead] = sum;
    sums->reference[warp][lane / kLanesOfHead] = state.reference;
  }
}

// Every warp's sums of values, in the unit that SumOfWarps counts in.
template <class Sizes, int kRowLanes, int kHeads>
__device__ inline void LeaveValues(const WarpState<kHeads>& state, const CtaSums<kHeads>& sums,
                                   float* merged) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float factor = PowerOfTwo(sums.reference[warp][h] - SumOfWarps(sums, h).reference);
    float* row = merged + (((warp * Sizes::kSlots + lane / kRowLanes) * kHeads + h) * kRowLanes +
                           lane % kRowLanes) *
                              kLaneChannels;
#pragma unroll
    for (uint32_t c = 0; c < kLaneChannels; ++c) row[c] = state.acc[h][c] * factor;
  }
}

template <int kType, int kRowLanes, int kHeads>
__global__ void __launch_bounds__(kAttendThreads, kHeads == 8 ? 2 : 3)
    AttendKernel(const __grid_constant__ AttendCall call) {
  using Sizes = AttendSizes<kType, kRowLanes, kHeads>;
  extern __shared__ uint4 queue[];
  __shared__ TokenList list;
  __shared__ CtaSums<kHeads> sums;
  const AttendJob job = call.jobs[blockIdx.x];
  const AttendSet set = call.sets[job.set];
  const uint32_t tile = blockIdx.y;
  if (tile * kHeads >= set.head_count) return;
  const uint32_t head_dim = call.shape.head_dim;
  AttendWarp<kType, kRowLanes, kHeads> warp(
      call, set, tile, list,
      reinterpret_cast<std::byte*>(queue) +
          threadIdx.x / kWarp * (Sizes::kStages * Sizes::kStageBytes));
  for (uint32_t word = 0; word < job.word_count;) {
    const Listed listed = ListTokens(set, call.shape, job.first_word + word,
                                     min(kListedWords, job.word_count - word), &list);
    warp.Attend(listed.tokens);
    word += listed.words;
  }
  LeaveSums<Sizes, kRowLanes>(warp.state, &sums);
  __syncthreads();
  auto* merged = reinterpret_cast<float*>(queue);
  if (set.read_values) LeaveValues<Sizes, kRowLanes>(warp.state, sums, merged);
  LeaveResult<kHeads>(set, head_dim, job.index, tile, sums, merged, kAttendWarps * Sizes::kSlots,
                      kRowLanes * kLaneChannels, 1.0F);
  MergeIfLast<kHeads, 4>(set, head_dim, tile, &sums, merged);
}

template <int kType, int kRowLanes, int kHeads>
cudaError_t LaunchAttend(const AttendCall& call, cudaStream_t stream) {
  using Sizes = AttendSizes<kType, kRowLanes, kHeads>;
  const cudaError_t code =
      ReserveShared(AttendKernel<kType, kRowLanes, kHeads>, Sizes::kSharedBytes);
  if (code != cudaSuccess) return code;
  const dim3 grid(call.job_count, (call.head_count_max + kHeads - 1) / kHeads);
  AttendKernel<kType, kRowLanes, kHeads>
      <<<grid, kAttendThreads, Sizes::kSharedBytes, stream>>>(call);
  return cudaGetLastError();
}

template <int kType, int kHeads>
cudaError_t LaunchAttendRows(const AttendCall& call, cudaStream_t stream) {
  // Shorter rows of 16-bit caches are read by tensor cores.
  if constexpr (kType == kFloat32) {
    if (call.shape.head_dim <= 8 * kLaneChannels) {
      return LaunchAttend<kType, 8, kHeads>(call, stream);
    }
    if (call.shape.head_dim <= 16 * kLaneChannels) {
      return LaunchAttend<kType, 16, kHeads>(call, stream);
    }
  }
  return LaunchAttend<kType, 32, kHeads>(call, stream);
}

// Attention over caches of one element type; each is compiled in a file of its own.
template <int kType>
cudaError_t AttendTyped(const AttendCall& call, cudaStream_t stream) {
  switch (AttendTilingOf(call).heads) {
    case 1:
      return LaunchAttendRows<kType, 1>(call, stream);
    case 4:
      return LaunchAttendRows<kType, 4>(call, stream);
    default:
      return LaunchAttendRows<kType, 8>(call, stream);
  }
}

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ATTEND_INL_H_
