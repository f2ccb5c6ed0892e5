// Rows of a cache of 16-bit elements on their way to a warp: which token comes next, and a queue of
// rows in shared memory.
//
// Words of a job are put in a table that the whole CTA shares; after that warps work on their own.
// A lane finds the token of any index by bisection, so nothing grows with the number of tokens, and
// no warp waits for another while it reads.

#ifndef KVSERVICE_ATTENTION_CUDA_ATTEND_ROWS_INL_H_
#define KVSERVICE_ATTENTION_CUDA_ATTEND_ROWS_INL_H_

#include <bit>

#include "attention/cuda/attend_merge-inl.h"

namespace kvservice::cuda {

// Words that are in the table at a time, four per thread.
inline constexpr uint32_t kThreadWords = 4;
inline constexpr uint32_t kTableWords = kThreadWords * kAttendThreads;

struct WordTable {
  uint64_t tokens[kTableWords];
  const std::byte* rows[kTableWords];  // of token 0 of the word
  uint32_t ends[kTableWords];          // tokens of all words up to and with this one
  uint32_t warp_counts[kAttendWarps];
};

// Puts `word_count` words from `first` on in the table and returns how many tokens they hold. All
// threads of the CTA call it.
__device__ inline uint32_t FillTable(const AttendSet& set, const CacheShape& shape, uint32_t first,
                                     uint32_t word_count, WordTable* table) {
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
  const uint32_t begin = kThreadWords * threadIdx.x;
  uint64_t tokens[kThreadWords];
  const std::byte* rows[kThreadWords];
#pragma unroll
  for (uint32_t i = 0; i < kThreadWords; ++i) {
    const bool there = begin + i < word_count;
    tokens[i] = there ? set.tokens[first + begin + i] : 0;
    rows[i] = there ? set.slices[first + begin + i] : nullptr;
  }
  __syncthreads();  // Nobody reads the table before this one any more.
  uint32_t ends[kThreadWords];
  uint32_t count = 0;
#pragma unroll
  for (uint32_t i = 0; i < kThreadWords; ++i) {
    count += static_cast<uint32_t>(__popcll(tokens[i]));
    ends[i] = count;
    table->tokens[begin + i] = tokens[i];
    table->rows[begin + i] = rows[i] + size_t{set.kv_head} * kTokens * shape.row_bytes;
  }
  uint32_t before = count;
#pragma unroll
  for (uint32_t offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == kWarp - 1) table->warp_counts[warp] = before;
  before -= count;
  __syncthreads();
  uint32_t total = 0;
#pragma unroll
  for (uint32_t other = 0; other < kAttendWarps; ++other) {
    if (other == warp) before += total;
    total += table->warp_counts[other];
  }
#pragma unroll
  for (uint32_t i = 0; i < kThreadWords; ++i) table->ends[begin + i] = before + ends[i];
  __syncthreads();
  return total;
}

// Place of the set bit that has `rank` set bits below it.
__device__ __forceinline__ uint32_t BitOfRank(uint64_t bits, uint32_t rank) {
  auto part = static_cast<uint32_t>(bits);
  uint32_t at = 0;
  const auto low = static_cast<uint32_t>(__popc(part));
  if (rank >= low) {
    rank -= low;
    part = static_cast<uint32_t>(bits >> 32);
    at = 32;
  }
#pragma unroll
  for (uint32_t width = 16; width > 0; width /= 2) {
    const auto count = static_cast<uint32_t>(__popc(part & ((1U << width) - 1)));
    if (rank >= count) {
      rank -= count;
      part >>= width;
      at += width;
    }
  }
  return at;
}

// A token's word in the table, and its place there.
struct TablePlace {
  uint32_t word;
  uint32_t token;
};
// `words`: those of the table that are in use. `full`: all of their tokens are there.
__device__ __forceinline__ TablePlace PlaceOf(const WordTable& table, uint32_t words, bool full,
                                              uint32_t index) {
  if (full) return {.word = index / kTokens, .token = index % kTokens};
  uint32_t word = 0;
  for (uint32_t step = 1U << (31 - __clz(static_cast<int>(words))); step > 0; step /= 2) {
    const uint32_t next = word + step;
    if (next < words && table.ends[next - 1] <= index) word = next;
  }
  const uint64_t tokens = table.tokens[word];
  const uint32_t before = table.ends[word] - static_cast<uint32_t>(__popcll(tokens));
  return {.word = word, .token = BitOfRank(tokens, index - before)};
}

inline constexpr uint32_t kGroupTokens = 16;
// Stands for the position of a token that is not there: no head sees it.
inline constexpr uint32_t kNoPosition = ~0U;

// Sizes of a warp's queue of groups of tokens, for rows of 16 kSteps channels.
template <int kSteps>
struct RowSizes {
  static constexpr int kDim = 16 * kSteps;
  static constexpr int kChunks = 4 * kSteps;  // of 16 bytes, K and then V
  static constexpr int kRowBytes = (kChunks + 7) / 8 * 128;
  static constexpr int kStageBytes = static_cast<int>(kGroupTokens) * kRowBytes;
  static constexpr int kCtas = kSteps > 8 ? 1 : 2;  // that fit a multiprocessor
  static constexpr int kStages = kSteps > 8 ? 2
                                            : 98304 / static_cast<int>(kAttendWarps) / kStageBytes;
  static constexpr int kQueueBytes = kStages * kStageBytes;
};

// Chunks change places within 128 bytes, by the row: eight rows' chunks of one column lie in
// different banks (ldmatrix), and so do four chunks of two neighbours, or two of four.
__device__ __forceinline__ uint32_t SwizzleOf(uint32_t row) {
  return (row & 1) << 2 | (row & 2) | (row & 4) >> 2;
}

// Where a lane finds 16 bytes of its row in a group: it begins with chunk `own` of 0 to 7 of row
// `row`, and PlaceOfChunk goes on from there to chunk `own + more` (no carries: own & more == 0).
template <int kSteps>
__device__ __forceinline__ uint32_t PlaceOfLane(uint32_t row, uint32_t own) {
  return row * RowSizes<kSteps>::kRowBytes + 16 * (own ^ SwizzleOf(row));
}
__device__ __forceinline__ uint32_t PlaceOfChunk(uint32_t of_lane, uint32_t more) {
  return (of_lane ^ 16 * (more % 8)) + 16 * (more - more % 8);
}

// Where the rows of a warp's groups are. A group has a note from before its rows are asked for
// until they are used, and notes are taken for two groups at a time.
template <int kSteps>
struct RowNotes {
  static constexpr uint32_t kGroups = std::bit_ceil(RowSizes<kSteps>::kStages + 1U);
  const std::byte* rows[kGroups][kGroupTokens];
  uint32_t positions[kGroups][kGroupTokens];
};

// A warp's queue: it takes every kAttendWarps-th group of 16 tokens of the table.
template <int kSteps>
class RowQueue {
 public:
  using Sizes = RowSizes<kSteps>;
  using Notes = RowNotes<kSteps>;

  __device__ __forceinline__ RowQueue(const WordTable& table, bool read_values, Notes* notes,
                                      std::byte* memory)
      : table_(table), notes_(*notes), memory_(memory), read_values_(read_values) {}

  // The table has been filled: with `words` words from `first` on of the set, `tokens` tokens.
  // Starts reading the first kStages - 1 groups.
  __device__ __forceinline__ void Start(uint32_t first, uint32_t words, uint32_t tokens,
                                        uint32_t row_bytes) {
    first_position_ = first * kTokens;
    words_ = words;
    tokens_ = tokens;
    full_ = tokens == words * kTokens;
    row_bytes_ = row_bytes;
    next_ = threadIdx.x / kWarp * kGroupTokens;
    asked_ = 0;
#pragma unroll 1
    for (uint32_t stage = 0; stage < Sizes::kStages - 1; ++stage) Fetch(stage);
  }

  // Starts reading one group more, into `stage`, if there is one.
  __device__ __forceinline__ void Fetch(uint32_t stage) {
    if (next_ < tokens_) {
      if (asked_ % 2 == 0) TakeNotes();
      __syncwarp();
      Copy(memory_ + stage * Sizes::kStageBytes, notes_.rows[asked_ % Notes::kGroups]);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    next_ += kAttendWarps * kGroupTokens;
    ++asked_;
  }

  // Waits for the group that was asked for kStages - 1 groups before the latest.
  __device__ __forceinline__ void Wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Sizes::kStages - 1) : "memory");
    __syncwarp();
  }

  __device__ __forceinline__ uint32_t tokens() const { return tokens_; }
  // Of the group that Wait waited for, which is in `stage`.
  __device__ __forceinline__ const std::byte* rows(uint32_t stage) const {
    return memory_ + stage * Sizes::kStageBytes;
  }
  __device__ __forceinline__ const uint32_t* positions() const {
    return notes_.positions[(asked_ - Sizes::kStages) % Notes::kGroups];
  }

 private:
  // Where tokens of the next group are, and of the one after it, half a warp each. The last token
  // stands in for those that are not there.
  __device__ __forceinline__ void TakeNotes() {
    const uint32_t lane = threadIdx.x % kWarp;
    const uint32_t ahead = lane / kGroupTokens;
    const uint32_t index = next_ + ahead * kAttendWarps * kGroupTokens + lane % kGroupTokens;
    const TablePlace place = PlaceOf(table_, words_, full_, min(index, tokens_ - 1));
    const uint32_t group = (asked_ + ahead) % Notes::kGroups;
    notes_.rows[group][lane % kGroupTokens] = table_.rows[place.word] + place.token * row_bytes_;
    notes_.positions[group][lane % kGroupTokens] =
        index < tokens_ ? first_position_ + place.word * kTokens + place.token : kNoPosition;
  }

  // Memory is read best in pieces of 256 bytes.
  __device__ __forceinline__ void Copy(std::byte* to, const std::byte* const* rows) const {
    const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(to));
#pragma unroll
    for (uint32_t i = 0; i < Sizes::kChunks * kGroupTokens / kWarp; ++i) {
      const uint32_t index = i * kWarp + threadIdx.x % kWarp;
      const uint32_t row = index / Sizes::kChunks;
      const uint32_t chunk = index % Sizes::kChunks;
      if (chunk >= Sizes::kChunks / 2 && !read_values_) continue;
      const uint32_t place = row * Sizes::kRowBytes + 16 * (chunk ^ SwizzleOf(row));
      asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(base + place),
                   "l"(__cvta_generic_to_global(rows[row] + 16 * chunk))
                   : "memory");
    }
  }

  const WordTable& table_;
  Notes& notes_;
  std::byte* const memory_;
  const bool read_values_;
  bool full_ = false;  // all tokens of all words of the table are there
  uint32_t first_position_ = 0;
  uint32_t words_ = 0;
  uint32_t tokens_ = 0;
  uint32_t row_bytes_ = 0;
  uint32_t next_ = 0;   // index of the next group's first token
  uint32_t asked_ = 0;  // groups, with those that were not there
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_ATTEND_ROWS_INL_H_
