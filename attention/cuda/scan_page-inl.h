// One page of a scan, for one warp: the formula of attention/scan_terms.h on integer tensor cores,
// whose sums are exact, with the bounds of attention/cpu/scan_kernel.cc for the roundings of this
// kernel. Device code only.
//
// A tile is a page and four heads. The page's 64 tokens are the rows of four 16-row products, the
// columns are four heads twice: factors of 16 bits are split into a signed upper and a signed lower
// byte, so that the sum is 256 upper + lower. Four bytes of codes of a token (CodeOffset) are four
// channels in their low nibbles and four in their high ones: after one AND, such a word is a
// register of the product's first operand, in units of 1 or of 16.
//
// Lane 4 r + q has three parts to play:
//   - of column r (head r / 2 of the tile) it makes factors: of channels 4 (4 s + q) .. + 3 in step
//     s, in the lower half of the channels if r is even and in the upper half if it is odd. The two
//     lanes of a head exchange bytes, since each needs one byte of all channels;
//   - it holds the codes of tokens 4 r .. 4 r + 3 and 32 + 4 r .. 32 + 4 r + 3;
//   - it ends up with the sums of these eight tokens for head q, its *own* head.
//
// All logits are in units of ln 2: queries are scaled by log2 e once, and powers of two are what
// the hardware knows.

#ifndef KVSERVICE_ATTENTION_CUDA_SCAN_PAGE_INL_H_
#define KVSERVICE_ATTENTION_CUDA_SCAN_PAGE_INL_H_

#include "attention/cuda/elements-inl.h"
#include "attention/cuda/exp2.h"

namespace kvservice::cuda {

inline constexpr uint32_t kTileHeads = 4;
// Heads that one CTA takes; more are other CTAs.
inline constexpr uint32_t kCtaHeads = 8;
inline constexpr uint32_t kDirectionsMax = 4;
// As in attention/scan_terms.h, which device code cannot include.
inline constexpr double kScanMargin = 1.0 + 0x1p-12;
// Factors are q_c step_c = scale n_c up to kFactorMiss scales, |n_c| <= 32639 = 127 * 256 + 127.
// Scales have eight bits, so that their products with numbers of sixteen are exact: they are at
// most 1 + 2^-7 times larger than they must be. The inverse, within 2^-22, adds less than 0.01.
inline constexpr float kFactorLeast = 0x1p-100F;
inline constexpr double kFactorMiss = 0.51;

// A page as attention/sketch.h lays it out, in shared memory, with offsets that are known when
// addresses are compiled. Scan compares it with the call's shape.
template <uint32_t kDim>
struct alignas(64) SketchBytes {
  static constexpr uint32_t kDirections = kDim < 128 ? 1 : kDim / 64;

  uint4 codes[kDim / 8][kTokens / 4];  // chunks change places, see PlaceOf
  float lo[kDim];
  uint16_t step[kDim];
  uint32_t pj[kDirections][kTokens / 4];
  uint8_t r[kTokens];
  uint8_t vn[kTokens];
  float ps[kDirectionsMax];
  uint64_t exact;
  float rmax, hn, vmax;
  uint32_t version;
};

// What all pages need of one head.
struct alignas(16) HeadNumbers {
  float qw[kDirectionsMax];  // zero beyond the sketch's directions
  float x_norm;              // ||x||
  // Factors of what a logit may be off by, see ScanPage::TermsOf.
  float rounding;
  float reach;
  float miss;
  // Tokens that the head sees, counted from block 0 of the set.
  uint32_t begin;
  uint32_t end;
};

// Where what pages and heads come to is written, as in ScanSet.
struct ScanOutput {
  float* weights;
  void* numbers[4];  // reference, page_sum, lower_share, estimate_share
  const uint64_t* tokens;
  uint32_t head_count;
  uint32_t block_count;
};

// What all pages of a CTA need, in shared memory. Queries are times log2 e.
template <uint32_t kDim>
struct ScanTables {
  float qs[kCtaHeads][kDim];
  float x[kCtaHeads][kDim];  // rounded up; of bounded scans
  float cell[kDim];          // the metric times half a margin: cells are steps times this
  float radius_scale[256];
  HeadNumbers numbers[kCtaHeads];
  ScanOutput output;
};

// What one warp needs, in shared memory.
struct ScanScratch {
  float radii[kTokens];
  ScanTotal totals[kCtaHeads];
};

// The sum of two totals. What is 2^-126 of the rest and less is left out.
__device__ __forceinline__ ScanTotal JoinTotals(const ScanTotal& a, const ScanTotal& b) {
  const int32_t reference = max(a.reference, b.reference);
  return {a.sum * PowerOfTwo(a.reference - reference) + b.sum * PowerOfTwo(b.reference - reference),
          reference};
}

// ---- Warps --------------------------------------------------------------------------------------

// sum += a * b: codes of 16 tokens and 32 channels, factors of these channels and eight columns.
__device__ __forceinline__ void MultiplyCodes(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                              int32_t (&sum)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void MultiplySigned(uint32_t a0, uint32_t a1, uint32_t b,
                                               int32_t (&sum)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Over the lanes of a head's two columns: eight neighbours.
__device__ __forceinline__ float SumOverColumns(float x) {
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
__device__ __forceinline__ float SumOverTokens(float x) {
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

// At least the root of a sum of squares that was added up in fp32: the hardware's root is within
// 2^-22, and sums are within 2^-18.
__device__ __forceinline__ float RootUp(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x + 0x1p-120F));
  return root * (1.0F + 0x1p-18F);
}

// About 1 / x, for x in the normal range.
__device__ __forceinline__ float AboutInverse(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// ---- Pages in shared memory ---------------------------------------------------------------------

// Chunks of 16 bytes of codes, four tokens of a group of channels, change places within their
// group, so that the lanes of a quarter of a warp meet different banks.
inline constexpr uint32_t kChunksOfGroup = kTokens / 4;
__device__ __forceinline__ uint32_t PlaceOf(uint32_t group, uint32_t chunk) {
  return chunk ^ (2 * (group % 4));
}

// Starts copying 16 bytes to shared memory; the rest of their line is on its way too.
__device__ __forceinline__ void CopyChunk(uint4* to, const uint4* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from)
               : "memory");
}

// Starts copying a page to shared memory. One warp.
template <uint32_t kDim>
__device__ __forceinline__ void FetchPage(const std::byte* from, SketchBytes<kDim>* page) {
  constexpr uint32_t kCodeChunks = kDim / 8 * kChunksOfGroup;
  constexpr uint32_t kChunks = sizeof(SketchBytes<kDim>) / 16;
  static_assert(kCodeChunks % kWarp == 0);
  const uint32_t lane = threadIdx.x % kWarp;
  auto* to = reinterpret_cast<uint4*>(page);
  const auto* source = reinterpret_cast<const uint4*>(from) + lane;
  // The group of a lane's chunk i is i / 16 + lane / 16, where PlaceOf keeps lane / 16.
#pragma unroll
  for (uint32_t i = 0; i < kCodeChunks; i += kWarp) {
    const uint32_t place = PlaceOf(i / kChunksOfGroup + lane / kChunksOfGroup, lane);
    CopyChunk(to + i + place, source + i);
  }
#pragma unroll
  for (uint32_t i = kCodeChunks; i < kChunks; i += kWarp) {
    if (i + lane < kChunks) CopyChunk(to + i + lane, source + i);
  }
}

__device__ __forceinline__ void Put(const uint4& four, uint32_t (&to)[4]) {
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
__device__ __forceinline__ void Put(const float4& four, float (&to)[4]) {
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
__device__ __forceinline__ void LoadSteps(const uint16_t* from, float (&to)[4]) {
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
  to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

// ---- Terms --------------------------------------------------------------------------------------

// What one head's channels add up to.
struct ChannelSums {
  float mid = 0.0F;           // sum qs_c mid_c
  float most = kFactorLeast;  // largest |qs_c step_c| and 16 |qw_j ps_j|
  float outside = 0.0F;       // A + P
  float ball_squares = 0.0F;  // B^2
  float norm_squares = 0.0F;  // z^2, of all heads alike
};

// What turns integer sums of one head and page into weights.
struct PageTerms {
  float scale = 0.0F;
  float base = 0.0F;
  float eps_radius = 0.0F;
  float margin = 0.0F;
  float lower_share = 0.0F;
  float estimate_share = 0.0F;
  bool known = true;
};

// One page of one set, for a warp.
template <uint32_t kDim, bool kBounded>
class ScanPage {
 public:
  // Groups of four bytes per token, and how often four lanes take one each.
  static constexpr uint32_t kGroups = kDim / 8;
  static constexpr int kSteps = (kGroups + 3) / 4;
  // Of a sum over channels: a lane's, and three levels of lanes.
  static constexpr int kRoundings = 4 * kSteps + 3;
  using Page = SketchBytes<kDim>;
  using Tables = ScanTables<kDim>;

  // scratch: of this warp. whole: all of the page's tokens are asked for.
  __device__ __forceinline__ ScanPage(float softcap, const Tables& tables, const Page& page,
                                      ScanScratch* scratch, uint32_t block, bool whole)
      : softcap_(softcap),
        tables_(tables),
        page_(page),
        scratch_(scratch),
        block_(block),
        whole_(whole),
        quarter_(threadIdx.x % 4),
        column_(threadIdx.x % kWarp / 4),
        odd_(column_ % 2) {
    if constexpr (kBounded) ReadRadii();
  }

  // Heads [first, first + 4) of the set; `row` is that of the first among the tables.
  __device__ __forceinline__ void ScanTile(uint32_t first, uint32_t row) {
    float products[kSteps][4];
    float along;
    ChannelSums sums = AddChannels(row, products, &along);
    // Of the column's head. 2^-20 are room for roundings, and the sum rounds up to eight bits.
    const float least = MaxOverColumns(sums.most) * ((1.0F + 0x1p-20F) / 32639.0F);
    const float scale = __uint_as_float((__float_as_uint(least) + 0xffffU) & 0xffff0000U);
    const float inverse = AboutInverse(scale);
    Factors factors;
    Quantize(products, inverse, &factors);
    Dots dots;
    MultiplyAll(factors, &dots);
    MultiplyProjections(along, inverse, &dots);
    ShareSums(&sums);
    const float own_scale = OfOwn(scale);
    // The sum of factors is below 2^24 and the factor of it exact: codes count from 7.5.
    const auto factor_sum = static_cast<float>(256 * dots.factors[0] + dots.factors[1]);
    const float base = fmaf(-7.5F * own_scale, factor_sum, sums.mid);
    const PageTerms terms = TermsOf(sums, own_scale, base, row + quarter_);
    float logits[8];
    MakeLogits(dots, terms, logits);
    Weigh(terms, logits, first + quarter_, row + quarter_);
  }

 private:
  // Bytes of the column's factors, of the lower and the upper half of the channels. A product takes
  // those of two steps; a last one without a partner is multiplied with zeros.
  static constexpr int kPairs = (kSteps + 1) / 2;
  struct Factors {
    uint32_t lower[kPairs][2] = {};
    uint32_t upper[kPairs][2] = {};
  };

  // Sums of tokens 4 r + i in [i][0] and [i][1], of 32 + 4 r + i in the others: of upper bytes,
  // then of lower ones. All start from kRoundingMagicBits and stay within 2^22 of it: codes of the
  // upper half count 16 times, and 240 * 127 * 128 + 127 * 128 * 4 is less.
  struct Dots {
    int32_t lower[4][4];
    int32_t upper[4][4];
    int32_t factors[4] = {};  // what the factors themselves add up to, from zero
  };

  // From the lanes that make a head's factors to those that hold its tokens.
  __device__ __forceinline__ float OfOwn(float x) const {
    return __shfl_sync(kAllLanes, x, 8 * quarter_);
  }

  // Radii of the tokens, which all heads share.
  __device__ __forceinline__ void ReadRadii() {
    const uint32_t lane = threadIdx.x % kWarp;
    const uint32_t pair = reinterpret_cast<const uint16_t*>(page_.r)[lane];
    const float first = tables_.radius_scale[pair & 255];
    const float second = tables_.radius_scale[pair >> 8];
    reinterpret_cast<float2*>(scratch_->radii)[lane] = make_float2(first, second);
    // Sums of integers are one instruction: radii in units of 2^-16, which 192 leaves.
    constexpr float kMagic = 192.0F;
    const int32_t units =
        __reduce_add_sync(kAllLanes, __float_as_int(first + second + kMagic) - 0x43400000);
    mean_radius_ = static_cast<float>(units) * 0x1p-22F;
    __syncwarp();
  }

  // The step whose channels this lane works on at turn `i`. Lanes of odd columns take the steps in
  // pairs the other way round: halves of rows lie a multiple of all banks apart.
  static constexpr int kTurn = kSteps % 2 == 0 ? 1 : 0;
  __device__ __forceinline__ uint32_t StepOf(int i) const {
    const uint32_t turned = odd_ * kTurn;
    return i % 2 == 0 ? i + turned : i - turned;
  }
  __device__ __forceinline__ bool HasChannels(uint32_t step) const {
    return kGroups % 4 == 0 || 4 * step + quarter_ < kGroups;
  }

  // This lane's part of z^2 = ||mid||^2 + 16 ||step||^2.
  __device__ __forceinline__ float NormSquares() const {
    const uint32_t lane = threadIdx.x % kWarp;
    float mid_squares = 0.0F;
    float step_squares = 0.0F;
#pragma unroll
    for (uint32_t i = 0; i < kDim; i += 4 * kWarp) {
      const uint32_t c = i + 4 * lane;
      if (kDim % (4 * kWarp) != 0 && c >= kDim) continue;
      float lo[4];
      float step[4];
      Put(*reinterpret_cast<const float4*>(page_.lo + c), lo);
      LoadSteps(page_.step + c, step);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float mid = fmaf(step[k], 8.0F, lo[k]);
        mid_squares = fmaf(mid, mid, mid_squares);
        step_squares = fmaf(step[k], step[k], step_squares);
      }
    }
    return fmaf(16.0F, step_squares, mid_squares);
  }

  // `products`: of this lane's channels, by turns. `along`: qw_j ps_j of the column's head and
  // direction q.
  __device__ __forceinline__ ChannelSums AddChannels(uint32_t row, float (&products)[kSteps][4],
                                                     float* along) const {
    const uint32_t own_row = row + column_ / 2;
    const HeadNumbers& numbers = tables_.numbers[own_row];
    ChannelSums sums;
    *along = 0.0F;
    if (quarter_ < Page::kDirections) *along = numbers.qw[quarter_] * page_.ps[quarter_];
    sums.most = fmaxf(sums.most, 16.0F * fabsf(*along));
    float mu = 0.0F;
    if constexpr (kBounded) {
      sums.norm_squares = NormSquares();
      // Both columns of the head come past here.
      sums.outside = odd_ != 0 ? 0.0F : 0.5F * fabsf(*along);
      // Any mu that is not negative will do.
      mu = numbers.x_norm * AboutInverse(fmaxf(page_.hn, 1e-30F));
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) products[i][k] = 0.0F;
      if (!HasChannels(StepOf(i))) continue;
      AddFour(own_row, odd_ * (kDim / 2) + 4 * (4 * StepOf(i) + quarter_), mu, products[i], &sums);
    }
    return sums;
  }

  __device__ __forceinline__ void AddFour(uint32_t row, uint32_t channel, float mu,
                                          float (&products)[4], ChannelSums* sums) const {
    float q[4];
    float lo[4];
    float step[4];
    Put(*reinterpret_cast<const float4*>(tables_.qs[row] + channel), q);
    Put(*reinterpret_cast<const float4*>(page_.lo + channel), lo);
    LoadSteps(page_.step + channel, step);
    float factor[4];
    float slope[4];
    if constexpr (kBounded) {
      Put(*reinterpret_cast<const float4*>(tables_.cell + channel), factor);
      Put(*reinterpret_cast<const float4*>(tables_.x[row] + channel), slope);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      products[k] = q[k] * step[k];
      sums->mid = fmaf(q[k], fmaf(step[k], 8.0F, lo[k]), sums->mid);
      if constexpr (kBounded) {
        const float cell = step[k] * factor[k];
        const float b = fminf(slope[k], mu * cell);
        sums->outside = fmaf(cell, slope[k] - b, sums->outside);
        sums->ball_squares = fmaf(b, b, sums->ball_squares);
      }
    }
    const float most = fmaxf(fmaxf(fabsf(products[0]), fabsf(products[1])),
                             fmaxf(fabsf(products[2]), fabsf(products[3])));
    sums->most = fmaxf(sums->most, most);
  }

  // What lanes have added up, for each lane of its own head. With bounds there are four sums to
  // move: while lanes q of a column add up, lane q is left with the q-th of them.
  __device__ __forceinline__ void ShareSums(ChannelSums* sums) const {
    if constexpr (!kBounded) {
      sums->mid = OfOwn(SumOverColumns(sums->mid));
      return;
    }
    const auto exchange = [&](uint32_t bit, float first, float second) {
      const bool takes_second = (quarter_ & bit) != 0;
      const float got = __shfl_xor_sync(kAllLanes, takes_second ? first : second, bit);
      return (takes_second ? second : first) + got;
    };
    float sum = exchange(2, exchange(1, sums->mid, sums->outside),
                         exchange(1, sums->ball_squares, sums->norm_squares));
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
    float norm_squares = sum + __shfl_xor_sync(kAllLanes, sum, 8);
    norm_squares += __shfl_xor_sync(kAllLanes, norm_squares, 16);
    sums->mid = __shfl_sync(kAllLanes, sum, 8 * quarter_);
    sums->outside = __shfl_sync(kAllLanes, sum, 8 * quarter_ + 1);
    sums->ball_squares = __shfl_sync(kAllLanes, sum, 8 * quarter_ + 2);
    sums->norm_squares = __shfl_sync(kAllLanes, norm_squares, 3);
  }

  // n + 128 is left in the low bits of the sum with kRoundingMagic: its low byte, less 128, is the
  // signed lower one and the next the upper.
  __device__ __forceinline__ void Quantize(const float (&products)[kSteps][4], float inverse,
                                           Factors* factors) const {
    const uint32_t is_odd = 0U - odd_;
    // As bytes, not by an AND with `is_odd`: xors of three are one instruction, of four are not.
    const uint32_t flip = __byte_perm(odd_ << 7, 0, 0);
    const uint32_t kept_bytes = odd_ != 0 ? 0x5410 : 0x7632;
    const uint32_t sent_bytes = kept_bytes ^ 0x2222;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t bits[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        bits[k] = __float_as_uint(fmaf(products[i][k], inverse, kRoundingMagic + 128.0F));
      }
      // Lower bytes of two channels, then their upper ones.
      const uint32_t low = __byte_perm(bits[0], bits[1], 0x5140);
      const uint32_t high = __byte_perm(bits[2], bits[3], 0x5140);
      const uint32_t kept = __byte_perm(low, high, kept_bytes);
      const uint32_t sent = __byte_perm(low, high, sent_bytes);
      const uint32_t got = __shfl_xor_sync(kAllLanes, sent, 4);
      const uint32_t swap = (kept ^ got) & is_odd;
      const int other = i ^ kTurn;
      factors->lower[i / 2][i % 2] = kept ^ swap ^ flip;
      factors->upper[other / 2][other % 2] = got ^ swap ^ flip;
    }
  }

  __device__ __forceinline__ void MultiplyAll(const Factors& factors, Dots* dots) const {
    constexpr uint32_t kOne = 0x01010101U;
    const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) dots->lower[i][k] = dots->upper[i][k] = kRoundingMagicBits;
    }
    // PlaceOf is the same for all steps.
    const uint32_t place = PlaceOf(quarter_, column_);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      uint32_t words[4][4] = {};  // of four tokens each: two of one step, two of the next
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int step = 2 * pair + k;
        if (step >= kSteps || !HasChannels(step)) continue;
        const uint4* from = page_.codes[4 * step + quarter_];
        Put(from[place], words[2 * k]);
        Put(from[place ^ (kChunksOfGroup / 2)], words[2 * k + 1]);
      }
      MultiplyCodes(ones, factors.lower[pair], dots->factors);
      MultiplyCodes(ones, factors.upper[pair], dots->factors);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t low[4];
        uint32_t high[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          low[k] = words[k][i] & 0x0f0f0f0fU;
          high[k] = words[k][i] & 0xf0f0f0f0U;
        }
        MultiplyCodes(low, factors.lower[pair], dots->lower[i]);
        MultiplyCodes(high, factors.upper[pair], dots->upper[i]);
      }
    }
  }

  // Projections are four tokens of one direction to a word: of these, the factor's place in its own
  // word picks one. Lane 4 r + q holds direction q; factors beyond the last one are zero. Here they
  // are in units of scale / 16, as projections are that much larger than codes.
  __device__ __forceinline__ void MultiplyProjections(float along, float inverse,
                                                      Dots* dots) const {
    const uint32_t* pj = page_.pj[0] + quarter_ * (kTokens / 4) + column_;
    const uint32_t first = pj[0];
    const uint32_t second = pj[kTokens / 8];
    const uint32_t bits = __float_as_uint(fmaf(along, 16.0F * inverse, kRoundingMagic + 128.0F));
    const uint32_t byte = odd_ != 0 ? (bits & 255) ^ 128 : bits >> 8 & 255;
#pragma unroll
    for (int i = 0; i < 4; ++i) MultiplySigned(first, second, byte << (8 * i), dots->upper[i]);
  }

  // The bounds of scan_kernel.cc (BatchBounds) for the roundings of this kernel; everything here is
  // a sum of products of numbers that are not negative, so that its own roundings are relative.
  //
  // In units of u = 2^-24: with m roundings in a sum over channels, and queries within 3 u of what
  // they stand for, s^ collects at most m + 9 times ||qs|| ||mid|| (mid, qs, the sum, base, the
  // addition of eps and margin to it, the sum of base and dot, the radius), 158 times ||qs||
  // ||step|| (a_c 30, base and its parts 22.5, four roundings of a dot of codes up to 15, and 45
  // for what follows), and each projection 7 times its size, 254 P together. Rounding factors
  // misses kFactorMiss scales for codes up to 7.5 from their centre, a sixteenth of that for
  // projections up to 127, and the magic numbers in the dots, of which 16 are rounded first, less
  // than 12 scales. MeasureHead makes one number of the first two: by Cauchy-Schwarz,
  // a ||mid|| + b ||step|| is at most sqrt(a^2 + b^2 / 16) z. A and P are added up together, which
  // counts A where P would do.
  __device__ __forceinline__ PageTerms TermsOf(const ChannelSums& sums, float scale, float base,
                                               uint32_t row) const {
    PageTerms terms;
    terms.scale = scale;
    terms.base = base;
    if constexpr (!kBounded) return terms;
    constexpr float kTiny = 0x1p-88F;  // above underflow
    // 64 u: the roundings below, and those of eps on its way to a logit.
    constexpr float kUp = 1.0F + 0x1p-18F;
    constexpr auto kMargin = static_cast<float>(kScanMargin);
    const HeadNumbers& numbers = tables_.numbers[row];
    const float norm = RootUp(sums.norm_squares);
    const float rounding =
        fmaf(numbers.rounding, norm, fmaf(sums.outside, 16 * 127 * 0x1p-24F, kTiny));
    const float outside = fmaf(scale, numbers.miss, sums.outside);
    const float eps_base = fmaf(outside, kMargin, rounding) * kUp;
    const float eps_radius = fmaf(RootUp(sums.ball_squares), page_.rmax * kMargin, kTiny) * kUp;
    const float largest =
        fmaf(sums.outside, 254.0F, fmaf(numbers.reach, norm, eps_base + eps_radius));
    // Twice what the exponential may be off by, its argument included; the other half is room for
    // the roundings of this.
    const float fixed = 2 * kExp2Error + softcap_ * static_cast<float>(1.5 * kLog2E * kTanhError);
    const float margin = fmaf(largest, 0x1p-22F, fixed);
    terms.eps_radius = eps_radius;
    terms.margin = margin;
    terms.base = base + (softcap_ > 0.0F ? eps_base : eps_base + margin);
    // NaN is not known.
    terms.known = largest <= static_cast<float>(kLogitMax);
    // An upper end lies at most 2 eps + 3 margin above the logit; see scan_kernel.cc.
    const float whole = fmaf(eps_radius, 1.0F + 0x1p-16F, eps_base);
    const float lower = fmaf(margin, 5.0F, whole + whole);
    const float middle = fmaf(eps_radius, mean_radius_, eps_base) + margin;
    terms.lower_share = terms.known ? Exp2(-lower) : 0.0F;
    terms.estimate_share = terms.known ? Exp2(-middle) : 0.0F;
    return terms;
  }

  // Logits of this lane's own head and tokens: upper ends, or estimates without bounds.
  __device__ __forceinline__ void MakeLogits(const Dots& dots, const PageTerms& terms,
                                             float (&logits)[8]) const {
    // Dots count from kRoundingMagicBits: as floats they are their value and kRoundingMagic. What
    // that adds, 256 + 16 + 1 + 1 / 16 of it, is taken off with the first product. That is exact,
    // as scales have eight bits.
    const float scale = terms.scale;
    const float offset = -273.0625F * kRoundingMagic * scale;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto of = [&](const int32_t(&sums)[4][4], int byte) {
        return __int_as_float(sums[i % 4][i / 4 * 2 + byte]);
      };
      float sum = fmaf(of(dots.lower, 0), 256.0F * scale, offset);
      sum = fmaf(of(dots.upper, 0), 16.0F * scale, sum);
      sum = fmaf(of(dots.lower, 1), scale, sum);
      logits[i] = fmaf(of(dots.upper, 1), 0.0625F * scale, sum) + terms.base;
    }
    if constexpr (kBounded) {
      float radii[8];
      const float4* from = reinterpret_cast<const float4*>(scratch_->radii) + column_;
      Put(from[0], *reinterpret_cast<float(*)[4]>(radii));
      Put(from[8], *reinterpret_cast<float(*)[4]>(radii + 4));
#pragma unroll
      for (int i = 0; i < 8; ++i) logits[i] = fmaf(radii[i], terms.eps_radius, logits[i]);
    }
    if (softcap_ > 0.0F) {
      const float cap = softcap_ * kLog2E;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        logits[i] = SoftcapOf(logits[i], cap);
        if constexpr (kBounded) logits[i] += terms.margin;
      }
    }
  }

  // Exponentiates and writes.
  __device__ __forceinline__ void Weigh(const PageTerms& terms, const float (&logits)[8],
                                        uint32_t head, uint32_t row) const {
    float top = logits[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) top = fmaxf(top, logits[i]);
    top = MaxOverTokens(top);
    const float bits = top + kRoundingMagic;
    int32_t reference = __float_as_int(bits) - kRoundingMagicBits;
    float weights[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      weights[i] = Exp2(logits[i] - (bits - kRoundingMagic));
      // The least weight that an exponential which underflowed may stand for.
      if constexpr (kBounded) weights[i] += 0x1p-126F;
    }
    float sum = SumOverTokens(((weights[0] + weights[1]) + (weights[2] + weights[3])) +
                              ((weights[4] + weights[5]) + (weights[6] + weights[7])));
    const uint32_t begin = tables_.numbers[row].begin;
    const uint32_t end = tables_.numbers[row].end;
    const uint32_t at = block_ * kTokens;
    const bool all_seen = begin <= at && at + kTokens <= end;
    // Logits that are no numbers show in the sum; known ones are numbers.
    const bool plain = kBounded ? terms.known : fabsf(top) <= -kLogitMin && sum == sum;
    if (!__all_sync(kAllLanes, all_seen && plain)) {
      WeighAgain(terms, logits, begin, end, weights, &reference, &sum);
    }
    if (head < tables_.output.head_count) Store(terms, weights, reference, sum, head);
    AddToTotal(terms, weights, reference, sum, row);
  }

  // What is not known counts for nothing: totals are estimates.
  __device__ __forceinline__ void AddToTotal(const PageTerms& terms, const float (&weights)[8],
                                             int32_t reference, float sum, uint32_t row) const {
    if (!whole_) {
      const uint64_t word = tables_.output.tokens[block_];
      sum = 0.0F;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t token = 4 * column_ + static_cast<uint32_t>(i < 4 ? i : 28 + i);
        sum += (word >> token & 1) != 0 ? weights[i] : 0.0F;
      }
      sum = SumOverTokens(sum);
    }
    if constexpr (kBounded) sum *= terms.estimate_share;
    if (column_ != 0 || !(sum > 0.0F && sum < __int_as_float(0x7f800000))) return;
    ScanTotal& total = scratch_->totals[row];
    total = JoinTotals(total, {sum, reference});
  }

  // Where not every token is seen or not every logit is a number within bounds.
  __device__ __forceinline__ void WeighAgain(const PageTerms& terms, const float (&logits)[8],
                                             uint32_t begin, uint32_t end, float (&weights)[8],
                                             int32_t* reference, float* sum) const {
    float top = kLogitMin;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = fmaxf(top, ClampLogit(logits[i]));
    const float bits = MaxOverTokens(top) + kRoundingMagic;
    *reference = terms.known ? __float_as_int(bits) - kRoundingMagicBits : kReferenceMin;
    float total = 0.0F;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float logit = ClampLogit(logits[i]);
      float weight = Exp2(logit - (bits - kRoundingMagic));
      if constexpr (kBounded) weight += 0x1p-126F;
      if (!terms.known || logits[i] != logits[i]) weight = __int_as_float(0x7f800000);
      const uint32_t position =
          block_ * kTokens + 4 * column_ + static_cast<uint32_t>(i < 4 ? i : 28 + i);
      weights[i] = position >= begin && position < end ? weight : 0.0F;
      total += weights[i];
    }
    *sum = SumOverTokens(total);
  }

  __device__ __forceinline__ void Store(const PageTerms& terms, const float (&weights)[8],
                                        int32_t reference, float sum, uint32_t head) const {
    const ScanOutput& output = tables_.output;
    const size_t page = size_t{head} * output.block_count + block_;
    float4* to = reinterpret_cast<float4*>(output.weights + page * kTokens) + column_;
    to[0] = make_float4(weights[0], weights[1], weights[2], weights[3]);
    to[8] = make_float4(weights[4], weights[5], weights[6], weights[7]);
    // Lanes of the first columns write a number each.
    if (column_ >= (kBounded ? 4 : 2)) return;
    uint32_t number = __float_as_uint(column_ == 1   ? sum
                                      : column_ == 2 ? terms.lower_share
                                                     : terms.estimate_share);
    if (column_ == 0) number = static_cast<uint32_t>(reference);
    static_cast<uint32_t*>(output.numbers[column_])[page] = number;
  }

  const float softcap_;
  const Tables& tables_;
  const Page& page_;
  ScanScratch* const scratch_;
  const uint32_t block_;
  const bool whole_;
  const uint32_t quarter_;
  const uint32_t column_;
  const uint32_t odd_;
  float mean_radius_ = 0.0F;
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_SCAN_PAGE_INL_H_
