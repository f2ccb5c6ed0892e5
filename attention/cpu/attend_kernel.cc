#include "attention/cpu/attend_kernel.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/partial.h"

// clang-format off
#include "attention/cpu/targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention/cpu/attend_kernel.cc"
#include "hwy/foreach_target.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"
// clang-format on
#include "attention/cpu/exp-inl.h"
#include "attention/cpu/vector-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvservice {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Rows that one pass of the loops takes: as many as fit the first-level cache with their widened
// scores.
constexpr uint32_t kBatchTokens = 64;
// Tokens of a score tile: four sums fill one 128-bit block.
constexpr uint32_t kTileTokens = 4;

// Up to 64 tokens of the set, ascending. Places beyond `count` hold rows that may be read to no
// effect.
struct Batch {
  std::array<const std::byte*, kBatchTokens> rows{};
  std::array<uint32_t, kBatchTokens> positions{};
  uint32_t count = 0;
};

// Walks the set bits of a task's tokens.
class BatchReader {
 public:
  explicit BatchReader(const AttendTask& task)
      : task_(task), row_bytes_(task.shape->layout.row_bytes()) {
    if (!task_.tokens.empty()) word_ = task_.tokens[0];
  }

  // `before` is the batch read last: what a batch without tokens of its own points to.
  void Read(const Batch& before, Batch* batch) {
    uint32_t count = 0;
    while (count < kBatchTokens && block_ < task_.tokens.size()) {
      if (word_ == 0) {
        if (++block_ < task_.tokens.size()) word_ = task_.tokens[block_];
        continue;
      }
      const uint32_t position_base = (task_.block_begin + block_) * kBlockTokens;
      const std::byte* base = task_.view->slices[task_.block_begin + block_] +
                              task_.shape->layout.RowOffset(task_.kv_head, 0);
      for (; word_ != 0 && count < kBatchTokens; word_ &= word_ - 1, ++count) {
        const auto token = static_cast<uint32_t>(std::countr_zero(word_));
        batch->rows[count] = base + static_cast<size_t>(token) * row_bytes_;
        batch->positions[count] = position_base + token;
      }
    }
    batch->count = count;
    const std::byte* surplus = count > 0 ? batch->rows[count - 1] : before.rows[0];
    std::fill(batch->rows.begin() + count, batch->rows.end(), surplus);
  }

 private:
  const AttendTask& task_;
  const size_t row_bytes_;
  size_t block_ = 0;
  uint64_t word_ = 0;
};

// Memory of one task; all arrays are aligned to vectors and `heads` is a whole number of tiles.
struct Work {
  uint32_t heads = 0;
  uint32_t dim = 0;
  float* q = nullptr;        // [heads][dim], channels in the order of LoadChunk
  float* acc = nullptr;      // [heads][dim], sum of weight * V, same order
  float* scores = nullptr;   // [heads][kBatchTokens], logits, then weights
  float* rescale = nullptr;  // [heads], what `acc` is multiplied with before a batch is added
  std::array<int32_t, size_t{kQueryTokensMax} * kGroupMax> reference;
  std::array<double, size_t{kQueryTokensMax} * kGroupMax> sum;
  float key_squares_max = 0.0F;  // largest ||k||^2
  uint32_t token_count = 0;
};

// Asks for the bytes of a chunk that will be loaded a batch later. Spread over the arithmetic like
// this, memory and arithmetic overlap; in one burst, or left to the hardware, which does not see
// across slices and gathered rows, they hardly do (22 against 12 GB/s for one thread).
template <DType kType, size_t kLanes>
HWY_INLINE void PrefetchChunk(const std::byte* row, size_t channel) {
  constexpr size_t kLine = 64;
  constexpr size_t kChunkBytes = 2 * kLanes * ElementBytes(kType);
#pragma GCC unroll 2
  for (size_t at = 0; at < kChunkBytes; at += kLine) {
    hwy::Prefetch(row + channel * ElementBytes(kType) + at);
  }
}

// q.k of kHeads heads and four tokens. K is widened once for all of them. Prefetches the same
// chunks of `next`.
template <DType kType, size_t kHeads, bool kNorms, class D>
HWY_INLINE void ScoreTile(D d, const std::byte* const* rows, const std::byte* const* next,
                          const float* HWY_RESTRICT q, size_t dim, float* HWY_RESTRICT scores,
                          float* HWY_RESTRICT squares_max) {
  using V = hn::Vec<D>;
  constexpr size_t kLanes = hn::MaxLanes(D());
  constexpr size_t kTileHeads = kLanes / kTileTokens;
  V sum[kTileHeads][kTileTokens];
  V squares[kTileTokens];
  V even[kTileTokens];
  V odd[kTileTokens];
#pragma GCC unroll 4
  for (size_t t = 0; t < kTileTokens; ++t) {
    squares[t] = hn::Zero(d);
#pragma GCC unroll 4
    for (size_t h = 0; h < kTileHeads; ++h) sum[h][t] = hn::Zero(d);
  }
  for (size_t c = 0; c < dim; c += 2 * kLanes) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTileTokens; ++t) {
      LoadChunk<kType>(d, rows[t], c, &even[t], &odd[t]);
      PrefetchChunk<kType, kLanes>(next[t], c);
      if constexpr (kNorms) {
        squares[t] = hn::MulAdd(even[t], even[t], squares[t]);
        squares[t] = hn::MulAdd(odd[t], odd[t], squares[t]);
      }
    }
#pragma GCC unroll 4
    for (size_t h = 0; h < kHeads; ++h) {
      const V q_even = hn::Load(d, q + h * dim + c);
      const V q_odd = hn::Load(d, q + h * dim + c + kLanes);
#pragma GCC unroll 4
      for (size_t t = 0; t < kTileTokens; ++t) {
        sum[h][t] = hn::MulAdd(even[t], q_even, sum[h][t]);
      }
#pragma GCC unroll 4
      for (size_t t = 0; t < kTileTokens; ++t) {
        sum[h][t] = hn::MulAdd(odd[t], q_odd, sum[h][t]);
      }
    }
  }
  StoreTileSums<kHeads>(d, sum, scores, kBatchTokens);
  if constexpr (kNorms) {
    HWY_ALIGN float lanes[hn::MaxLanes(D())];
    hn::Store(SumOfFour(d, squares[0], squares[1], squares[2], squares[3]), d, lanes);
    for (size_t t = 0; t < kTileTokens; ++t) {
      float total = lanes[t];
      for (size_t block = 4; block < kLanes; block += 4) total += lanes[block + t];
      *squares_max = HWY_MAX(*squares_max, total);
    }
  }
}

// Adds weight * V of a batch to the accumulators of kHeads heads and kChunks chunks of channels.
template <DType kType, size_t kHeads, size_t kChunks, class D>
HWY_INLINE void AddValues(D d, const Batch& batch, const Batch& next, size_t v_offset,
                          size_t channel, const float* HWY_RESTRICT weights,
                          const float* HWY_RESTRICT rescale, size_t dim, float* HWY_RESTRICT acc) {
  using V = hn::Vec<D>;
  constexpr size_t kLanes = hn::MaxLanes(D());
  V sum[kHeads][2 * kChunks];
#pragma GCC unroll 4
  for (size_t h = 0; h < kHeads; ++h) {
    const V factor = hn::Set(d, rescale[h]);
#pragma GCC unroll 4
    for (size_t i = 0; i < 2 * kChunks; ++i) {
      sum[h][i] = hn::Mul(factor, hn::Load(d, acc + h * dim + channel + i * kLanes));
    }
  }
  for (uint32_t t = 0; t < batch.count; ++t) {
    const std::byte* v = batch.rows[t] + v_offset;
    V value[2 * kChunks];
#pragma GCC unroll 2
    for (size_t i = 0; i < kChunks; ++i) {
      const size_t at = channel + 2 * i * kLanes;
      LoadChunk<kType>(d, v, at, &value[2 * i], &value[2 * i + 1]);
      PrefetchChunk<kType, kLanes>(next.rows[t] + v_offset, at);
    }
#pragma GCC unroll 4
    for (size_t h = 0; h < kHeads; ++h) {
      const V weight = hn::Set(d, weights[h * kBatchTokens + t]);
#pragma GCC unroll 4
      for (size_t i = 0; i < 2 * kChunks; ++i) sum[h][i] = hn::MulAdd(weight, value[i], sum[h][i]);
    }
  }
#pragma GCC unroll 4
  for (size_t h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (size_t i = 0; i < 2 * kChunks; ++i) {
      hn::Store(sum[h][i], d, acc + h * dim + channel + i * kLanes);
    }
  }
}

template <DType kType, size_t kHeads, class D>
HWY_INLINE void AddValuesOfTile(D d, const Batch& batch, const Batch& next, size_t v_offset,
                                size_t head, Work* work) {
  constexpr size_t kChunk = 2 * hn::MaxLanes(D());
  const float* weights = work->scores + head * kBatchTokens;
  const float* rescale = work->rescale + head;
  float* acc = work->acc + head * work->dim;
  size_t channel = 0;
  for (; channel + 2 * kChunk <= work->dim; channel += 2 * kChunk) {
    AddValues<kType, kHeads, 2>(d, batch, next, v_offset, channel, weights, rescale, work->dim,
                                acc);
  }
  if (channel < work->dim) {
    AddValues<kType, kHeads, 1>(d, batch, next, v_offset, channel, weights, rescale, work->dim,
                                acc);
  }
}

// Logits beyond the batch and those that the head does not see become -infinity. Returns false if
// one that it sees is not finite: attention over it means nothing.
template <class D>
HWY_INLINE bool MaskScores(D d, const Batch& batch, uint32_t visible_begin, uint32_t visible_end,
                           float* HWY_RESTRICT scores) {
  constexpr float kAbsent = -std::numeric_limits<float>::infinity();
  const auto largest = hn::Set(d, std::numeric_limits<float>::max());
  const bool sees_all =
      batch.positions[0] >= visible_begin && batch.positions[batch.count - 1] < visible_end;
  if (batch.count == kBatchTokens && sees_all) {
    auto finite = hn::FirstN(d, hn::MaxLanes(d));
    for (size_t t = 0; t < kBatchTokens; t += hn::MaxLanes(d)) {
      finite = hn::And(finite, hn::Le(hn::Abs(hn::Load(d, scores + t)), largest));
    }
    return hn::AllTrue(d, finite);
  }
  bool finite = true;
  for (uint32_t t = 0; t < batch.count; ++t) {
    const uint32_t position = batch.positions[t];
    if (position >= visible_begin && position < visible_end) {
      finite &= std::isfinite(scores[t]);
    } else {
      scores[t] = kAbsent;
    }
  }
  std::fill(scores + batch.count, scores + kBatchTokens, kAbsent);
  return finite;
}

// Applies the soft-cap to a head's logits of a batch.
template <class D>
HWY_INLINE void CapScores(D d, float softcap, float* HWY_RESTRICT scores) {
  const auto cap = hn::Set(d, softcap);
  for (size_t t = 0; t < kBatchTokens; t += hn::MaxLanes(d)) {
    hn::Store(SoftcapVector(d, hn::Load(d, scores + t), cap), d, scores + t);
  }
}

// 2^exponent as a float, 0 below the normal range; exponent <= 0.
HWY_INLINE float PowerOfTwo(int32_t exponent) {
  if (exponent < -126) return 0.0F;
  return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

// One head's logits of a batch become weights e^logit 2^-reference; the sum and the reference
// advance. Returns what the head's accumulators must be multiplied with.
template <class D>
HWY_INLINE float Weigh(D d, float* HWY_RESTRICT scores, int32_t* reference, double* sum) {
  using V = hn::Vec<D>;
  constexpr size_t kLanes = hn::MaxLanes(D());
  const hn::RebindToSigned<D> di;
  V top = hn::Set(d, kLogitMin);
  for (size_t t = 0; t < kBatchTokens; t += kLanes) top = hn::Max(top, hn::Load(d, scores + t));
  top = hn::Min(hn::MaxOfLanes(d, top), hn::Set(d, -kLogitMin));
  const int32_t exponent =
      hn::GetLane(hn::BitCast(di, ExpExponentBits(d, top))) - kRoundingMagicBits;
  float rescale = 1.0F;
  if (exponent > *reference) {
    const int32_t change = *reference - exponent;
    rescale = PowerOfTwo(change);
    *sum = std::ldexp(*sum, change);
    *reference = exponent;
  }
  const auto reference_lanes = hn::Set(di, *reference);
  V total = hn::Zero(d);
  for (size_t t = 0; t < kBatchTokens; t += kLanes) {
    const V weight = ExpScaled(d, hn::Load(d, scores + t), reference_lanes);
    hn::Store(weight, d, scores + t);
    total = hn::Add(total, weight);
  }
  *sum += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, total)));
  return rescale;
}

template <DType kType, size_t kHeads, class D>
HWY_INLINE void ScoreBatch(D d, const AttendTask& task, const Batch& batch, const Batch& next,
                           size_t head, Work* work) {
  const float* q = work->q + head * work->dim;
  float* scores = work->scores + head * kBatchTokens;
  if (task.bound_masses && head == 0) {
    for (uint32_t t = 0; t < batch.count; t += kTileTokens) {
      ScoreTile<kType, kHeads, true>(d, &batch.rows[t], &next.rows[t], q, work->dim, scores + t,
                                     &work->key_squares_max);
    }
  } else {
    for (uint32_t t = 0; t < batch.count; t += kTileTokens) {
      ScoreTile<kType, kHeads, false>(d, &batch.rows[t], &next.rows[t], q, work->dim, scores + t,
                                      nullptr);
    }
  }
}

template <DType kType, size_t kHeads, class D>
HWY_INLINE void AttendTile(D d, const AttendTask& task, const Batch& batch, const Batch& next,
                           size_t head, Work* work) {
  const HeadQueries& queries = *task.queries;
  ScoreBatch<kType, kHeads>(d, task, batch, next, head, work);
  for (size_t h = head; h < head + kHeads; ++h) {
    float* scores = work->scores + h * kBatchTokens;
    if (task.shape->logit_softcap > 0.0F) CapScores(d, task.shape->logit_softcap, scores);
    const bool finite =
        MaskScores(d, batch, queries.visible_begin[h], queries.visible_end[h], scores);
    work->rescale[h] = Weigh(d, scores, &work->reference[h], &work->sum[h]);
    if (!finite) work->sum[h] = std::numeric_limits<double>::quiet_NaN();
  }
  if (task.read_values) {
    AddValuesOfTile<kType, kHeads>(d, batch, next, task.shape->layout.vector_bytes(), head, work);
  }
}

// The first tile of heads brings in the next batch; for the others it is there.
template <DType kType, class D>
HWY_INLINE void AttendBatch(D d, const AttendTask& task, const Batch& batch, const Batch& next,
                            Work* work) {
  constexpr size_t kTileHeads = hn::MaxLanes(D()) / kTileTokens;
  const size_t heads = task.queries->head_count;
  size_t head = 0;
  const Batch* ahead = &next;
  for (; head + kTileHeads <= heads; head += kTileHeads) {
    AttendTile<kType, kTileHeads>(d, task, batch, *ahead, head, work);
    ahead = &batch;
  }
  const size_t rest = heads - head;
  if constexpr (kTileHeads > 2) {
    if (rest == 3) AttendTile<kType, 3>(d, task, batch, *ahead, head, work);
    if (rest == 2) AttendTile<kType, 2>(d, task, batch, *ahead, head, work);
  }
  if (rest == 1) AttendTile<kType, 1>(d, task, batch, *ahead, head, work);
}

HWY_INLINE void PrefetchRows(const Batch& batch, size_t row_bytes) {
  for (uint32_t t = 0; t < batch.count; ++t) {
    for (size_t at = 0; at < row_bytes; at += 64) {
      hwy::Prefetch(batch.rows[t] + at);
    }
  }
}

template <class D>
void PrepareWork(D /*d*/, const AttendTask& task, AttendScratch* scratch, Work* work) {
  const HeadQueries& queries = *task.queries;
  work->heads = queries.head_count;
  work->dim = task.shape->layout.head_dim;
  const size_t floats = size_t{work->heads} * work->dim;
  const size_t scores = size_t{work->heads} * kBatchTokens;
  work->q = scratch->Reserve(2 * floats + scores + work->heads);
  work->acc = work->q + floats;
  work->scores = work->acc + floats;
  work->rescale = work->scores + scores;
  std::array<uint16_t, kHeadDimMax> order;
  FillChannelOrder<hn::MaxLanes(D())>(task.shape->layout, order.data());
  for (size_t row = 0; row < floats; row += work->dim) {
    for (size_t i = 0; i < work->dim; ++i) work->q[row + i] = queries.qs[row + order[i]];
  }
  std::fill_n(work->acc, floats, 0.0F);
  std::fill_n(work->reference.begin(), work->heads, kReferenceMin);
  std::fill_n(work->sum.begin(), work->heads, 0.0);
}

// Bounds of a mass whose nearest log is `lse`. A logit is off by at most `roundings` 2^-24 ||qs||
// ||k|| (scaling q, one chain of products per lane, adding the lanes), which also holds for the
// exponential's argument; the soft-cap flattens that and adds its own error.
template <size_t kLanes>
void BoundMass(const AttendTask& task, const Work& work, uint32_t head, Partial* result) {
  // Chain, product, lanes (at most 4 levels), scaled q, and one to spare for products of these.
  constexpr double kFixedRoundings = 1 + 4 + 1 + 1;
  const double norm = task.queries->norm[head];
  const double key_norm =
      std::sqrt(static_cast<double>(work.key_squares_max) * (1.0 + 0x1p-14) + 0x1p-120);
  const double size = norm * key_norm;
  if (!task.bound_masses || !(size <= kLogitMax)) {
    result->upper[head] = {std::numeric_limits<double>::infinity()};
    result->lower[head] = {kLogZero};
    result->arithmetic[head] = std::numeric_limits<double>::infinity();
    return;
  }
  const double cap = task.shape->logit_softcap;
  const double roundings = static_cast<double>(work.dim) / kLanes + kFixedRoundings;
  const double error = size * (roundings * 0x1p-24 + kExpArgumentError) + cap * kTanhError;
  // Weights off by a share rho of themselves move their mean of values by at most
  // rho / (1 - rho) max ||v - o||; a value passes through one addition per token after it.
  const double rho = std::expm1(error + kMassError);
  const double moved =
      rho < 0.5 ? 2.0 * rho / (1.0 - rho) : std::numeric_limits<double>::infinity();
  result->arithmetic[head] = moved + (work.token_count + 16.0) * 0x1p-24 + kMassError;
  const double lse = result->lse[head];
  result->upper[head] = {lse == kLogZero ? lse : WidenUp(lse + error + kMassError)};
  result->lower[head] = {lse == kLogZero ? lse : WidenDown(lse - error - kMassError)};
}

template <class D>
void Finish(D /*d*/, const AttendTask& task, const Work& work, Partial* result) {
  constexpr size_t kLanes = hn::MaxLanes(D());
  std::array<uint16_t, kHeadDimMax> order;
  FillChannelOrder<kLanes>(task.shape->layout, order.data());
  for (uint32_t head = 0; head < work.heads; ++head) {
    const double sum = work.sum[head];
    result->lse[head] = sum == 0.0 ? kLogZero : work.reference[head] * kLn2 + std::log(sum);
    const double scale = sum == 0.0 ? 0.0 : 1.0 / sum;
    if (task.read_values) {
      double* out = &result->out[size_t{head} * work.dim];
      const float* acc = &work.acc[size_t{head} * work.dim];
      for (size_t i = 0; i < work.dim; ++i) out[order[i]] = scale * static_cast<double>(acc[i]);
    }
    BoundMass<kLanes>(task, work, head, result);
  }
}

template <DType kType, class D>
void AttendTyped(D d, const AttendTask& task, AttendScratch* scratch, Partial* result) {
  Work work;
  PrepareWork(d, task, scratch, &work);
  BatchReader reader(task);
  std::array<Batch, 2> batches;
  Batch* batch = &batches[0];
  Batch* next = &batches[1];
  reader.Read(*next, batch);
  PrefetchRows(*batch, task.shape->layout.row_bytes());
  while (batch->count > 0) {
    work.token_count += batch->count;
    reader.Read(*batch, next);
    AttendBatch<kType>(d, task, *batch, *next, &work);
    std::swap(batch, next);
  }
  Finish(d, task, work, result);
}

template <class D>
void AttendWithLanes(D d, const AttendTask& task, AttendScratch* scratch, Partial* result) {
  switch (task.shape->layout.dtype) {
    case DType::kFloat32:
      return AttendTyped<DType::kFloat32>(d, task, scratch, result);
    case DType::kFloat16:
      return AttendTyped<DType::kFloat16>(d, task, scratch, result);
    case DType::kBfloat16:
      return AttendTyped<DType::kBfloat16>(d, task, scratch, result);
  }
}

void AttendTokensTarget(const AttendTask& task, AttendScratch* scratch, Partial* result) {
  // A chunk of two vectors must divide head_dim: 80 leaves 16 lanes at the door.
  constexpr size_t kWide = 16;
  constexpr size_t kNarrow = 8;
  if (task.shape->layout.head_dim % (2 * kWide) == 0) {
    AttendWithLanes(hn::CappedTag<float, kWide>(), task, scratch, result);
  } else {
    AttendWithLanes(hn::CappedTag<float, kNarrow>(), task, scratch, result);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace kvservice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvservice {

HWY_EXPORT(AttendTokensTarget);

void Partial::Resize(uint32_t head_count, uint32_t head_dim) {
  out.assign(size_t{head_count} * head_dim, 0.0);
  lse.assign(head_count, kLogZero);
  lower.assign(head_count, LogMassLower{});
  upper.assign(head_count, LogMassUpper{});
  arithmetic.assign(head_count, 0.0);
}

void MergePartials(uint32_t head_dim, const Partial& part, Partial* total) {
  for (uint32_t head = 0; head < total->lse.size(); ++head) {
    MergePartial(total->out.data() + size_t{head} * head_dim, &total->lse[head],
                 part.out.data() + size_t{head} * head_dim, part.lse[head], head_dim);
    total->lower[head] = Add(total->lower[head], part.lower[head]);
    total->upper[head] = Add(total->upper[head], part.upper[head]);
    // Every weight keeps its own error; the merge adds that of two lse, of at most 2^20, as
    // doubles.
    constexpr double kMergeRoundoff = 0x1p-30;
    total->arithmetic[head] =
        std::max(total->arithmetic[head], part.arithmetic[head]) + kMergeRoundoff;
  }
}

float* AttendScratch::Reserve(size_t floats) {
  constexpr size_t kAlignmentFloats = 16;
  if (memory_.size() < floats + kAlignmentFloats) memory_.resize(floats + kAlignmentFloats);
  const size_t bytes_off = reinterpret_cast<uintptr_t>(memory_.data()) % 64;
  const size_t floats_skipped = (64 - bytes_off) % 64 / sizeof(float);
  return memory_.data() + floats_skipped;
}

void AttendTokens(const AttendTask& task, AttendScratch* scratch, Partial* result) {
  result->Resize(task.queries->head_count, task.shape->layout.head_dim);
  HWY_DYNAMIC_DISPATCH(AttendTokensTarget)(task, scratch, result);
}

}  // namespace kvservice
#endif  // HWY_ONCE
