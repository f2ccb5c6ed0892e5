// Scans sketches: the formula of attention/scan_terms.h as attention/cpu/scan_kernel.cc evaluates
// it, on integer tensor cores, whose sums are exact.
//
// A warp takes a page. Its 64 tokens are the rows of four 16-row products, the columns are four
// heads twice: factors of 16 bits are split into a signed upper and a signed lower byte, so that
// the sum is 256 upper + lower. Four bytes of codes of a token (CodeOffset) are four channels in
// their low nibbles and four in their high ones: with the channels in that order, a word is a
// register of the product's first operand after one AND, or a shift and an AND. Thread 4 r + q
// holds the codes of tokens 4 r .. 4 r + 3 and 32 + 4 r .. 32 + 4 r + 3, and ends up with the sums
// of these eight tokens for head q of the tile.

#include <cuda_pipeline_primitives.h>

#include "attention/cuda/elements-inl.h"

namespace kvservice::cuda {
namespace {

constexpr uint32_t kTileHeads = 4;
constexpr uint32_t kScanWarps = 4;
// Pages of a warp in shared memory: one that it works on and one on its way.
constexpr uint32_t kStages = 2;
constexpr uint32_t kScanThreads = kScanWarps * kWarp;
// Heads that one CTA takes; more are other CTAs.
constexpr uint32_t kCtaHeads = 8;
constexpr uint32_t kDirectionsMax = 4;
constexpr float kInfinity = __builtin_huge_valf();
// As in attention/scan_terms.h, which this file cannot include.
constexpr double kScanMargin = 1.0 + 0x1p-12;

// As in attention/cpu/code_dot-inl.h: factors are integers of at most 127 * 256 + 127, with
// |q_c step_c - scale n_c| at most kFactorMiss scale.
constexpr float kFactorLimit = 32639.0F;
constexpr double kFactorMiss = 0.52;
constexpr float kFactorLeast = 1e-30F;

// What all pages of a CTA need. Rows of queries are padded so that the lanes of a quarter of a warp
// meet different banks.
struct QueryRows {
  float* qs;            // [kCtaHeads][stride]
  float* x;             // [kCtaHeads][stride], of bounded scans
  float* metric;        // [head_dim]
  float* radius_scale;  // [256]
  uint32_t stride;
};

__device__ __forceinline__ void Multiply(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         int32_t (&sum)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Sums over the lanes of a head's two columns: 4 lanes each, neighbours.
template <typename T>
__device__ __forceinline__ T SumOverColumns(T x) {
#pragma unroll
  for (int offset = 1; offset < 8; offset *= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
__device__ __forceinline__ float MaxOverColumns(float x) {
#pragma unroll
  for (int offset = 1; offset < 8; offset *= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
// Over the lanes that hold other tokens of the same head.
template <typename T>
__device__ __forceinline__ T SumOverTokens(T x) {
#pragma unroll
  for (int offset = 4; offset < static_cast<int>(kWarp); offset *= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}
__device__ __forceinline__ float MaxOverTokens(float x) {
#pragma unroll
  for (int offset = 4; offset < static_cast<int>(kWarp); offset *= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

// Root of a sum of squares that was added up in fp32, rounded up.
__device__ __forceinline__ double NormUp(float squares) {
  return sqrt(static_cast<double>(squares) * (1.0 + 0x1p-14) + 0x1p-120);
}

// Codes in shared memory: chunks of 16 bytes, four tokens of a group of channels, are turned within
// their group, so that the lanes of a quarter of a warp meet different banks.
constexpr uint32_t kChunksOfGroup = kTokens / 4;
__device__ __forceinline__ uint32_t PlaceOf(uint32_t group, uint32_t chunk) {
  return (chunk + 2 * group) % kChunksOfGroup;
}

// Starts copying a page to shared memory. One warp.
__device__ __forceinline__ void FetchPage(const CacheShape& shape, const std::byte* page,
                                          std::byte* to) {
  const uint32_t code_chunks = shape.head_dim / 8 * kChunksOfGroup;
  for (uint32_t i = threadIdx.x % kWarp; i < shape.page_bytes / 16; i += kWarp) {
    const uint32_t group = i / kChunksOfGroup;
    const uint32_t place =
        i < code_chunks ? group * kChunksOfGroup + PlaceOf(group, i % kChunksOfGroup) : i;
    __pipeline_memcpy_async(to + size_t{16} * place, page + size_t{16} * i, 16);
  }
}

__device__ __forceinline__ void Put(const uint4& four, uint32_t (&to)[4]) {
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// What a page adds up to over channels, for one head.
struct ChannelSums {
  float mid = 0.0F;           // sum qs_c mid_c
  float most = 0.0F;          // largest |qs_c step_c|
  float outside_ball = 0.0F;  // A
  float ball_squares = 0.0F;  // B^2
  float mid_squares = 0.0F;
  float step_squares = 0.0F;
};

// What turns integer sums of one head and page into weights; see BatchTerms in
// attention/cpu/scan_kernel.cc.
struct PageTerms {
  float scale = 0.0F;
  float base = 0.0F;
  float along[kDirectionsMax] = {};
  float eps_radius = 0.0F;
  float margin = 0.0F;
  float lower_share = 0.0F;
  float estimate_share = 0.0F;
  bool known = true;
};

// One page of one set, for a warp. kColumns = head_dim / 8 groups of four bytes per token.
template <int kColumns, bool kBounded>
class PageScan {
 public:
  static constexpr int kSteps = (kColumns + 3) / 4;
  static constexpr uint32_t kHalf = kColumns * 4;

  // page: in shared memory, as FetchPage puts it there.
  __device__ __forceinline__ PageScan(const ScanCall& call, const ScanSet& set,
                                      const QueryRows& rows, uint32_t block, const std::byte* page)
      : call_(call),
        set_(set),
        rows_(rows),
        block_(block),
        page_(page),
        quarter_(threadIdx.x % 4),
        column_(threadIdx.x % kWarp / 4) {
    radii_[0] = reinterpret_cast<const uint32_t*>(page_ + call.shape.r)[column_];
    radii_[1] = reinterpret_cast<const uint32_t*>(page_ + call.shape.r)[8 + column_];
  }

  // Heads [first, first + 4) of the set; `row` is that of the first among `rows`.
  __device__ __forceinline__ void ScanTile(uint32_t first, uint32_t row) {
    const ChannelSums sums = AddChannels(row);
    const bool usable = sums.most > kFactorLeast;
    const float scale = usable ? __fdiv_rn(sums.most, kFactorLimit) : 0.0F;
    const float inverse = usable ? __fdiv_rn(kFactorLimit, sums.most) : 0.0F;
    uint32_t factors[kSteps][2];
    const int32_t factor_sum = Quantize(row, inverse, factors);
    int32_t dots[4][4] = {};
    MultiplyAll(factors, dots);
    // From the lanes that hold a head's channels to those that hold its tokens.
    const auto of_own = [&](auto x) { return __shfl_sync(kAllLanes, x, quarter_ * 8); };
    ChannelSums own;
    own.mid = of_own(sums.mid);
    own.outside_ball = of_own(sums.outside_ball);
    own.ball_squares = of_own(sums.ball_squares);
    own.mid_squares = sums.mid_squares;
    own.step_squares = sums.step_squares;
    const float own_scale = of_own(scale);
    const float centre = own_scale * 7.5F * static_cast<float>(of_own(factor_sum));
    const uint32_t head = first + quarter_;
    const bool there = head < set_.head_count;
    PageTerms terms = TermsOf(own, own_scale, own.mid - centre, there ? head : first);
    float weights[8];
    Weigh(dots, terms, weights);
    Store(terms, weights, head, there);
  }

 private:
  // RadiusScale of this lane's token i.
  __device__ __forceinline__ float RadiusOf(int i) const {
    return rows_.radius_scale[(radii_[i / 4] >> (8 * (i % 4))) & 255];
  }

  // First channel of this lane's four, in the lower or the upper half.
  __device__ __forceinline__ uint32_t Channel(int step, bool upper) const {
    return (upper ? kHalf : 0) + 4 * (4 * step + quarter_);
  }
  __device__ __forceinline__ bool HasChannel(int step) const {
    return kColumns % 4 == 0 || 4 * step + static_cast<int>(quarter_) < kColumns;
  }
  __device__ __forceinline__ float4 StepsOf(uint32_t channel) const {
    const auto* from = reinterpret_cast<const __half2*>(page_ + call_.shape.step) + channel / 2;
    const float2 low = __half22float2(from[0]);
    const float2 high = __half22float2(from[1]);
    return make_float4(low.x, low.y, high.x, high.y);
  }

  __device__ __forceinline__ void AddChannel(float q, float lo, float step, float metric, float x,
                                             float mu, ChannelSums* sums) const {
    const float mid = fmaf(step, 8.0F, lo);
    sums->mid = fmaf(q, mid, sums->mid);
    sums->most = fmaxf(sums->most, fabsf(q * step));
    if constexpr (kBounded) {
      const float cell = step * static_cast<float>(0.5 * kScanMargin) * metric;
      const float b = fminf(x, mu * cell);
      sums->outside_ball = fmaf(cell, x - b, sums->outside_ball);
      sums->ball_squares = fmaf(b, b, sums->ball_squares);
      sums->mid_squares = fmaf(mid, mid, sums->mid_squares);
      sums->step_squares = fmaf(step, step, sums->step_squares);
    }
  }

  // Of head column_ / 2 of the tile: each of its two columns adds up one half of the channels.
  __device__ __forceinline__ ChannelSums AddChannels(uint32_t row) const {
    const uint32_t own_row = row + column_ / 2;
    const float* qs = rows_.qs + own_row * rows_.stride;
    const float* x = rows_.x + own_row * rows_.stride;
    const bool upper = column_ % 2 != 0;
    ChannelSums sums;
    float mu = 0.0F;
    if constexpr (kBounded) {
      const float hn = *reinterpret_cast<const float*>(page_ + call_.shape.norms + 4);
      mu = __fdiv_rn(rows_.x[own_row * rows_.stride + 2 * kHalf], fmaxf(hn, 1e-30F));
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (!HasChannel(step)) continue;
      const uint32_t c = Channel(step, upper);
      const float4 q = *reinterpret_cast<const float4*>(qs + c);
      const float4 lo = *reinterpret_cast<const float4*>(page_ + call_.shape.lo + 4 * c);
      const float4 steps = StepsOf(c);
      float4 metric = make_float4(0, 0, 0, 0);
      float4 slope = metric;
      if constexpr (kBounded) {
        metric = *reinterpret_cast<const float4*>(rows_.metric + c);
        slope = *reinterpret_cast<const float4*>(x + c);
      }
      AddChannel(q.x, lo.x, steps.x, metric.x, slope.x, mu, &sums);
      AddChannel(q.y, lo.y, steps.y, metric.y, slope.y, mu, &sums);
      AddChannel(q.z, lo.z, steps.z, metric.z, slope.z, mu, &sums);
      AddChannel(q.w, lo.w, steps.w, metric.w, slope.w, mu, &sums);
    }
    sums.mid = SumOverColumns(sums.mid);
    sums.most = MaxOverColumns(sums.most);
    if constexpr (kBounded) {
      sums.outside_ball = SumOverColumns(sums.outside_ball);
      sums.ball_squares = SumOverColumns(sums.ball_squares);
      sums.mid_squares = SumOverColumns(sums.mid_squares);
      sums.step_squares = SumOverColumns(sums.step_squares);
    }
    return sums;
  }

  // A factor's byte of this column; the factor itself is added to `sum`. n + 128 is left in the low
  // bits of the sum with kRoundingMagic: its low byte, less 128, is signed, and the rest the upper.
  __device__ __forceinline__ uint32_t FactorByte(float product, float inverse, int32_t* sum) const {
    const int32_t bits = __float_as_int(fmaf(product, inverse, kRoundingMagic + 128.0F));
    const int32_t shifted = bits - kRoundingMagicBits;
    *sum += shifted - 128;
    const uint32_t lower = static_cast<uint32_t>(shifted & 255) ^ 0x80U;
    const uint32_t upper = static_cast<uint32_t>(shifted >> 8) & 255U;
    return column_ % 2 == 0 ? upper : lower;
  }

  // Bytes of this lane's column; returns the sum of the head's factors.
  __device__ __forceinline__ int32_t Quantize(uint32_t row, float inverse,
                                              uint32_t (&factors)[kSteps][2]) const {
    const float* qs = rows_.qs + (row + column_ / 2) * rows_.stride;
    int32_t sum = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factors[step][half] = 0;
        if (!HasChannel(step)) continue;
        const uint32_t c = Channel(step, half != 0);
        const float4 q = *reinterpret_cast<const float4*>(qs + c);
        const float4 steps = StepsOf(c);
        factors[step][half] = FactorByte(q.x * steps.x, inverse, &sum) |
                              FactorByte(q.y * steps.y, inverse, &sum) << 8 |
                              FactorByte(q.z * steps.z, inverse, &sum) << 16 |
                              FactorByte(q.w * steps.w, inverse, &sum) << 24;
      }
    }
    // Both columns of a head added up the same factors.
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    return sum;
  }

  __device__ __forceinline__ void MultiplyAll(const uint32_t (&factors)[kSteps][2],
                                              int32_t (&dots)[4][4]) const {
    constexpr uint32_t kLow = 0x0f0f0f0fU;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t lower[4] = {};
      uint32_t upper[4] = {};
      if (HasChannel(step)) {
        const uint32_t group = 4 * step + quarter_;
        const auto* from = reinterpret_cast<const uint4*>(page_) + group * kChunksOfGroup;
        Put(from[PlaceOf(group, column_)], lower);
        Put(from[PlaceOf(group, column_ + kChunksOfGroup / 2)], upper);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t a[4] = {lower[i] & kLow, upper[i] & kLow, (lower[i] >> 4) & kLow,
                               (upper[i] >> 4) & kLow};
        Multiply(a, factors[step], dots[i]);
      }
    }
  }

  // The bounds of scan_kernel.cc (BatchBounds), with the roundings of this kernel: a chain of
  // head_dim / 8 per lane, its products, and three levels of lanes.
  __device__ __forceinline__ PageTerms TermsOf(const ChannelSums& sums, float scale, float base,
                                               uint32_t head) const {
    constexpr double kUnit = 0x1p-24;
    constexpr double kTiny = 0x1p-88;
    constexpr double kUp = 1.0 + 0x1p-20;
    PageTerms terms;
    terms.scale = scale;
    terms.base = base;
    double half_steps = 0.0;  // P
#pragma unroll
    for (uint32_t j = 0; j < kDirectionsMax; ++j) {
      if (j >= call_.shape.directions) break;
      const float ps = reinterpret_cast<const float*>(page_ + call_.shape.ps)[j];
      terms.along[j] = set_.qw[size_t{j} * set_.head_count + head] * ps;
      half_steps += fabs(static_cast<double>(terms.along[j])) * 0.5;
    }
    if constexpr (!kBounded) return terms;
    const double* norms = set_.norm + size_t{4} * head;
    const double q_norm = norms[0];
    const double weight = norms[1];
    const double miss = kFactorMiss * 7.5 * norms[2];
    const double m = kColumns + 8;
    const double mid_norm = NormUp(sums.mid_squares);
    const double step_norm = NormUp(sums.step_squares);
    const double of_norm = mid_norm * (kUnit * (m + 12)) + step_norm * (kUnit * 140);
    double rounding = q_norm * of_norm + kTiny;
    rounding += weight * step_norm * (kUnit * 4);
    rounding += half_steps * (kUnit * 16 * 127);
    const double missed = static_cast<double>(scale) * miss + half_steps;
    const double outside = static_cast<double>(sums.outside_ball) + missed;
    const double eps_base = (outside * kScanMargin + rounding) * kUp;
    const double ball = sqrt(static_cast<double>(sums.ball_squares) + 0x1p-120);
    const float rmax = *reinterpret_cast<const float*>(page_ + call_.shape.norms);
    const double eps_radius = (ball * (static_cast<double>(rmax) * kScanMargin) + kTiny) * kUp;
    const double reach = q_norm * (step_norm * 16 + mid_norm);
    const double largest = half_steps * (2 * 127) + reach + (eps_base + eps_radius);
    const double softcap_error = static_cast<double>(call_.softcap) * kTanhError;
    const double margin =
        largest * (2 * kExpArgumentError * kUp) + (2 * kExpError * kUp + softcap_error);
    terms.eps_radius = static_cast<float>(eps_radius);
    terms.margin = static_cast<float>(margin);
    const double raised = static_cast<double>(base) + eps_base;
    terms.base = static_cast<float>(call_.softcap > 0.0F ? raised : raised + margin);
    terms.known = largest <= kLogitMax;
    const double whole = eps_radius * (1.0 + 0x1p-16) + eps_base;
    const double lower = margin * 5.0 + (whole + whole);
    float mean = 0.0F;
#pragma unroll
    for (int i = 0; i < 8; ++i) mean += RadiusOf(i);
    mean = SumOverTokens(mean) * (1.0F / kTokens);
    const double middle = eps_radius * static_cast<double>(mean) + eps_base;
    terms.lower_share = terms.known ? ExpScaled(static_cast<float>(-lower), 0) : 0.0F;
    terms.estimate_share =
        terms.known ? ExpScaled(static_cast<float>(-(middle + margin)), 0) : 0.0F;
    return terms;
  }

  // Logits of this lane's head and tokens: upper ends, or estimates without bounds.
  __device__ __forceinline__ void Weigh(const int32_t (&dots)[4][4], const PageTerms& terms,
                                        float (&logits)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logits[i] = fmaf(static_cast<float>(256 * dots[i][0] + dots[i][1]), terms.scale, terms.base);
      logits[4 + i] =
          fmaf(static_cast<float>(256 * dots[i][2] + dots[i][3]), terms.scale, terms.base);
    }
#pragma unroll
    for (uint32_t j = 0; j < kDirectionsMax; ++j) {
      if (j >= call_.shape.directions) break;
      const auto* pj = reinterpret_cast<const char4*>(page_ + call_.shape.pj + j * kTokens);
      const char4 low = pj[column_];
      const char4 high = pj[8 + column_];
      const float of[8] = {static_cast<float>(low.x),  static_cast<float>(low.y),
                           static_cast<float>(low.z),  static_cast<float>(low.w),
                           static_cast<float>(high.x), static_cast<float>(high.y),
                           static_cast<float>(high.z), static_cast<float>(high.w)};
#pragma unroll
      for (int i = 0; i < 8; ++i) logits[i] = fmaf(of[i], terms.along[j], logits[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kBounded) logits[i] = fmaf(RadiusOf(i), terms.eps_radius, logits[i]);
      if (call_.softcap > 0.0F) {
        logits[i] = SoftcapOf(logits[i], call_.softcap);
        if constexpr (kBounded) logits[i] += terms.margin;
      }
    }
  }

  // Position of this lane's token i, from the set's first block on.
  __device__ __forceinline__ uint32_t PositionOf(int i) const {
    return block_ * kTokens + 4 * column_ + static_cast<uint32_t>(i < 4 ? i : 28 + i);
  }

  // Exponentiates and writes. Lanes of heads that are not there take part without writing.
  __device__ __forceinline__ void Store(const PageTerms& terms, float (&weights)[8], uint32_t head,
                                        bool there) const {
    float top = weights[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) top = fmaxf(top, weights[i]);
    int32_t reference = max(ExponentOf(MaxOverTokens(top)), kReferenceMin);
    const uint32_t begin = there ? set_.visible[2 * head] : 0;
    const uint32_t end = there ? set_.visible[2 * head + 1] : 0;
    const bool known = !kBounded || terms.known;
    if (!known) reference = kReferenceMin;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool number = weights[i] == weights[i];
      float weight = ExpScaled(weights[i], reference);
      if constexpr (kBounded) weight = fmaxf(weight, 0x1p-126F);
      if (!known || !number) weight = kInfinity;
      const uint32_t position = PositionOf(i);
      weights[i] = position >= begin && position < end ? weight : 0.0F;
    }
    const float sum = SumOverTokens(((weights[0] + weights[1]) + (weights[2] + weights[3])) +
                                    ((weights[4] + weights[5]) + (weights[6] + weights[7])));
    if (!there) return;
    const size_t page = size_t{head} * set_.block_count + block_;
    auto* to = reinterpret_cast<float4*>(set_.weights + page * kTokens) + column_;
    to[0] = make_float4(weights[0], weights[1], weights[2], weights[3]);
    to[8] = make_float4(weights[4], weights[5], weights[6], weights[7]);
    if (column_ != 0) return;
    set_.reference[page] = reference;
    set_.page_sum[page] = sum;
    if constexpr (kBounded) {
      set_.lower_share[page] = terms.lower_share;
      set_.estimate_share[page] = terms.estimate_share;
    }
  }

  const ScanCall& call_;
  const ScanSet& set_;
  const QueryRows& rows_;
  const uint32_t block_;
  const std::byte* const page_;
  const uint32_t quarter_;
  const uint32_t column_;
  uint32_t radii_[2];  // four codes of r each
};

// Queries of the CTA's heads, zeros beyond them. ||x|| follows each row of x.
template <bool kBounded>
__device__ inline void LoadQueries(const ScanCall& call, const ScanSet& set, uint32_t first,
                                   const QueryRows& rows) {
  const uint32_t dim = call.shape.head_dim;
  const uint32_t there = min(kCtaHeads, set.head_count - first);
  const uint32_t padded = (there + kTileHeads - 1) / kTileHeads * kTileHeads;
  for (uint32_t i = threadIdx.x; i < padded * dim; i += kScanThreads) {
    const uint32_t head = first + i / dim;
    const uint32_t at = i / dim * rows.stride + i % dim;
    const size_t from = size_t{head} * dim + i % dim;
    rows.qs[at] = head < set.head_count ? set.qs[from] : 0.0F;
    if constexpr (kBounded) rows.x[at] = head < set.head_count ? set.x[from] : 0.0F;
  }
  if constexpr (kBounded) {
    for (uint32_t c = threadIdx.x; c < dim; c += kScanThreads) rows.metric[c] = set.metric[c];
    for (uint32_t h = threadIdx.x; h < padded; h += kScanThreads) {
      const uint32_t head = first + h;
      rows.x[h * rows.stride + dim] =
          head < set.head_count ? static_cast<float>(set.norm[size_t{4} * head + 3]) : 0.0F;
    }
  }
  for (uint32_t i = threadIdx.x; i < 256; i += kScanThreads) {
    rows.radius_scale[i] = call.radius_scale[i];
  }
}

// Floats of shared memory: two tables of queries, the metric, the radius scale.
__host__ __device__ constexpr uint32_t StrideOf(uint32_t head_dim) {
  return (head_dim + 31) / 32 * 32 + 16;
}
__host__ __device__ constexpr uint32_t SharedFloats(uint32_t head_dim) {
  return 2 * kCtaHeads * StrideOf(head_dim) + head_dim + 256;
}

template <int kColumns, bool kBounded>
__global__ void __launch_bounds__(kScanThreads, kColumns > 16 ? 2 : 3)
    ScanKernel(const __grid_constant__ ScanCall call) {
  extern __shared__ float4 shared[];
  const ScanJob job = call.jobs[blockIdx.x];
  const ScanSet set = call.sets[job.set];
  const uint32_t first = blockIdx.y * kCtaHeads;
  if (first >= set.head_count) return;
  QueryRows rows;
  rows.stride = StrideOf(call.shape.head_dim);
  rows.qs = reinterpret_cast<float*>(shared);
  rows.x = rows.qs + kCtaHeads * rows.stride;
  rows.metric = rows.x + kCtaHeads * rows.stride;
  rows.radius_scale = rows.metric + call.shape.head_dim;
  LoadQueries<kBounded>(call, set, first, rows);
  __syncthreads();
  const uint32_t heads = min(kCtaHeads, set.head_count - first);
  std::byte* pages = reinterpret_cast<std::byte*>(rows.radius_scale + 256) +
                     size_t{threadIdx.x / kWarp} * kStages * call.shape.page_bytes;
  // This warp's next page from `i` on, the end of the job if there is none.
  const auto next_page = [&](uint32_t i) {
    while (i < job.block_count && set.tokens[job.first_block + i] == 0) i += kScanWarps;
    return min(i, job.block_count);
  };
  const auto fetch = [&](uint32_t i, uint32_t stage) {
    if (i < job.block_count) {
      FetchPage(call.shape,
                set.sketches[job.first_block + i] + size_t{set.kv_head} * call.shape.page_bytes,
                pages + size_t{stage} * call.shape.page_bytes);
    }
    __pipeline_commit();
  };
  uint32_t i = next_page(threadIdx.x / kWarp);
  fetch(i, 0);
  for (uint32_t stage = 0; i < job.block_count; stage ^= 1) {
    const uint32_t next = next_page(i + kScanWarps);
    fetch(next, stage ^ 1);
    __pipeline_wait_prior(1);
    __syncwarp();
    PageScan<kColumns, kBounded> scan(call, set, rows, job.first_block + i,
                                      pages + size_t{stage} * call.shape.page_bytes);
    for (uint32_t h = 0; h < heads; h += kTileHeads) scan.ScanTile(first + h, h);
    // The other lanes have read what the next page overwrites.
    __syncwarp();
    i = next;
  }
}

template <int kColumns, bool kBounded>
cudaError_t LaunchScan(const ScanCall& call, cudaStream_t stream) {
  const auto shared_bytes =
      static_cast<uint32_t>(SharedFloats(call.shape.head_dim) * sizeof(float)) +
      kScanWarps * kStages * call.shape.page_bytes;
  const cudaError_t code = ReserveShared(ScanKernel<kColumns, kBounded>, shared_bytes);
  if (code != cudaSuccess) return code;
  const dim3 grid(call.job_count, (call.head_count_max + kCtaHeads - 1) / kCtaHeads);
  ScanKernel<kColumns, kBounded><<<grid, kScanThreads, shared_bytes, stream>>>(call);
  return cudaGetLastError();
}

template <bool kBounded>
cudaError_t ScanColumns(const ScanCall& call, cudaStream_t stream) {
  switch (call.shape.head_dim) {
    case 64:
      return LaunchScan<8, kBounded>(call, stream);
    case 80:
      return LaunchScan<10, kBounded>(call, stream);
    case 96:
      return LaunchScan<12, kBounded>(call, stream);
    case 128:
      return LaunchScan<16, kBounded>(call, stream);
    default:
      return LaunchScan<32, kBounded>(call, stream);
  }
}

}  // namespace

cudaError_t Scan(const ScanCall& call, cudaStream_t stream) {
  if (call.job_count == 0) return cudaSuccess;
  return call.bounded ? ScanColumns<true>(call, stream) : ScanColumns<false>(call, stream);
}

}  // namespace kvservice::cuda
