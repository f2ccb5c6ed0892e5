// Scans sketches: a warp takes one page after the other, with the next one on its way to shared
// memory; scan_page-inl.h has what it does with them.

#include "attention/cuda/scan_page-inl.h"

#include <cuda_pipeline_primitives.h>

namespace kvservice::cuda {
namespace {

constexpr uint32_t kScanWarps = 4;
constexpr uint32_t kScanThreads = kScanWarps * kWarp;
// Pages of a warp in shared memory: one that it works on and one on its way.
constexpr uint32_t kStages = 2;

// CTAs on one multiprocessor, as shared memory allows.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr uint32_t kScanCtas = 3;
#else
constexpr uint32_t kScanCtas = 4;
#endif

template <uint32_t kDim>
struct ScanMemory {
  struct OfWarp {
    SketchBytes<kDim> pages[kStages];
    ScanScratch scratch;
  };
  OfWarp warps[kScanWarps];
  ScanTables<kDim> tables;
};

// What the logits of one head may be off by, in factors: see ScanPage::TermsOf. `norms`: as
// ScanSet. `roundings`: of a sum over channels.
__device__ inline void MeasureHead(const double* norms, double roundings, double directions,
                                   HeadNumbers* numbers) {
  constexpr double kUp = 1.0 + 0x1p-20;
  constexpr double kUnit = 0x1p-24;
  constexpr double kLog2EUp = 1.0 / kLn2 * kUp;
  constexpr double kRootOf17 = 4.1232;
  const double norm = norms[0] * kLog2EUp;
  const double weight = norms[1] * kLog2EUp;
  const double of_mid = norm * (roundings + 12);
  const double of_step = norm * 170 + weight * 6;
  const double of_both = sqrt(of_mid * of_mid + of_step * of_step * (1.0 / 16));
  numbers->rounding = __double2float_ru(of_both * (kUnit * kUp));
  // At least 16 ||qs|| ||step|| + ||qs|| ||mid||.
  numbers->reach = __double2float_ru(norm * kRootOf17 * kUp);
  const double missed = 7.5 * norms[2] + 127.0 / 16 * directions;
  numbers->miss = __double2float_ru(kFactorMiss * missed + 12.0);
  numbers->x_norm = static_cast<float>(norms[3] * kLog2EUp);
}

// Tables of the CTA's heads, zeros beyond them. `first`: of the set's heads.
template <uint32_t kDim, bool kBounded>
__device__ inline void FillTables(const ScanCall& call, const ScanSet& set, uint32_t first,
                                  ScanTables<kDim>* tables) {
  // At least log2 e.
  constexpr float kLog2EUp = 0x1.715478p+0F;
  const uint32_t there = min(kCtaHeads, set.head_count - first);
  const uint32_t rows = (there + kTileHeads - 1) / kTileHeads * kTileHeads;
  const float4* qs = reinterpret_cast<const float4*>(set.qs) + size_t{first} * (kDim / 4);
  const float4* x = reinterpret_cast<const float4*>(set.x) + size_t{first} * (kDim / 4);
  for (uint32_t i = threadIdx.x; i < rows * (kDim / 4); i += kScanThreads) {
    float4 q = make_float4(0, 0, 0, 0);
    float4 slope = q;
    if (i < there * (kDim / 4)) {
      q = qs[i];
      if constexpr (kBounded) slope = x[i];
    }
    q = make_float4(q.x * kLog2E, q.y * kLog2E, q.z * kLog2E, q.w * kLog2E);
    reinterpret_cast<float4*>(tables->qs)[i] = q;
    if constexpr (!kBounded) continue;
    slope = make_float4(__fmul_ru(slope.x, kLog2EUp), __fmul_ru(slope.y, kLog2EUp),
                        __fmul_ru(slope.z, kLog2EUp), __fmul_ru(slope.w, kLog2EUp));
    reinterpret_cast<float4*>(tables->x)[i] = slope;
  }
  for (uint32_t row = threadIdx.x; row < rows; row += kScanThreads) {
    const uint32_t head = first + row;
    HeadNumbers numbers{};
    numbers.end = ~0U;
    if (row < there) {
      for (uint32_t j = 0; j < SketchBytes<kDim>::kDirections; ++j) {
        numbers.qw[j] = set.qw[size_t{j} * set.head_count + head] * kLog2E;
      }
      numbers.begin = set.visible[2 * head];
      numbers.end = set.visible[2 * head + 1];
      if constexpr (kBounded) {
        MeasureHead(set.norm + size_t{4} * head, ScanPage<kDim, true>::kRoundings,
                    SketchBytes<kDim>::kDirections, &numbers);
      }
    }
    tables->numbers[row] = numbers;
  }
  if (threadIdx.x == 0) {
    tables->output = {.weights = set.weights,
                      .numbers = {set.reference, set.page_sum, set.lower_share, set.estimate_share},
                      .tokens = set.tokens,
                      .head_count = set.head_count,
                      .block_count = set.block_count};
  }
  if constexpr (!kBounded) return;
  constexpr auto kHalfMargin = static_cast<float>(0.5 * kScanMargin);
  for (uint32_t c = threadIdx.x; c < kDim; c += kScanThreads) {
    tables->cell[c] = set.metric[c] * kHalfMargin;
  }
  for (uint32_t i = threadIdx.x; i < 256; i += kScanThreads) {
    tables->radius_scale[i] = call.radius_scale[i];
  }
}

// The pages that one warp has to scan of the CTA's job: every kScanWarps-th block with a token set.
class PageWalk {
 public:
  __device__ __forceinline__ PageWalk(const ScanCall& call, uint32_t page_bytes)
      : call_(call), page_bytes_(page_bytes), next_(threadIdx.x / kWarp) {}

  // Moves on to the next page; false if there is none.
  __device__ __forceinline__ bool Next() {
    while (pending_ == 0 && !at_end_) LookAhead();
    if (pending_ == 0) return false;
    const int lane = __ffs(static_cast<int>(pending_)) - 1;
    pending_ &= pending_ - 1;
    whole_ = (of_lanes_ >> lane & 1) != 0;
    block_ = first_ + kScanWarps * static_cast<uint32_t>(lane);
    page_ = reinterpret_cast<const std::byte*>(
        __shfl_sync(kAllLanes, reinterpret_cast<uintptr_t>(of_lane_), lane));
    return true;
  }
  __device__ __forceinline__ uint32_t block() const { return block_; }
  __device__ __forceinline__ const std::byte* page() const { return page_; }
  // All tokens of the page are asked for.
  __device__ __forceinline__ bool whole() const { return whole_; }

 private:
  // Lanes look at a block each.
  __device__ __forceinline__ void LookAhead() {
    const ScanJob& job = call_.jobs[blockIdx.x];
    const ScanSet& set = call_.sets[job.set];
    const uint32_t i = next_ + kScanWarps * (threadIdx.x % kWarp);
    uint64_t tokens = 0;
    if (i < job.block_count) {
      tokens = set.tokens[job.first_block + i];
      of_lane_ = set.sketches[job.first_block + i] + size_t{set.kv_head} * page_bytes_;
    }
    pending_ = __ballot_sync(kAllLanes, tokens != 0);
    of_lanes_ = __ballot_sync(kAllLanes, tokens == ~uint64_t{0});
    first_ = job.first_block + next_;
    next_ += kScanWarps * kWarp;
    at_end_ = next_ >= job.block_count;
  }

  const ScanCall& call_;
  const uint32_t page_bytes_;
  uint32_t next_;
  bool at_end_ = false;
  uint32_t first_ = 0;
  uint32_t pending_ = 0;
  uint32_t of_lanes_ = 0;  // lanes whose pages are whole
  const std::byte* of_lane_ = nullptr;
  uint32_t block_ = 0;
  bool whole_ = false;
  const std::byte* page_ = nullptr;
};

// What the CTA's heads come to, for the choice: warps in order.
template <uint32_t kDim>
__device__ inline void WriteTotals(const ScanSet& set, uint32_t index, uint32_t first,
                                   const ScanMemory<kDim>& memory) {
  __syncthreads();
  const uint32_t head = first + threadIdx.x;
  if (threadIdx.x >= kCtaHeads || head >= set.head_count) return;
  ScanTotal total = memory.warps[0].scratch.totals[threadIdx.x];
  for (uint32_t warp = 1; warp < kScanWarps; ++warp) {
    total = JoinTotals(total, memory.warps[warp].scratch.totals[threadIdx.x]);
  }
  set.totals[size_t{index} * set.head_count + head] = total;
}

template <uint32_t kDim, bool kBounded>
__global__ void __launch_bounds__(kScanThreads, kDim > 128 ? 2 : kScanCtas)
    ScanKernel(const __grid_constant__ ScanCall call) {
  extern __shared__ float4 shared[];
  const ScanJob& job = call.jobs[blockIdx.x];
  const ScanSet& set = call.sets[job.set];
  const uint32_t first = blockIdx.y * kCtaHeads;
  const uint32_t head_count = set.head_count;
  if (first >= head_count) return;
  auto& memory = *reinterpret_cast<ScanMemory<kDim>*>(shared);
  auto& own = memory.warps[threadIdx.x / kWarp];
  PageWalk walk(call, sizeof(SketchBytes<kDim>));
  bool more = walk.Next();
  if (more) FetchPage(walk.page(), &own.pages[0]);
  __pipeline_commit();
  FillTables<kDim, kBounded>(call, set, first, &memory.tables);
  if (threadIdx.x % kWarp < kCtaHeads) {
    own.scratch.totals[threadIdx.x % kWarp] = {.sum = 0.0F, .reference = kReferenceMin};
  }
  __syncthreads();
  const uint32_t heads = min(kCtaHeads, head_count - first);
  for (uint32_t stage = 0; more; stage ^= 1) {
    const uint32_t block = walk.block();
    const bool whole = walk.whole();
    more = walk.Next();
    if (more) FetchPage(walk.page(), &own.pages[stage ^ 1]);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncwarp();
    ScanPage<kDim, kBounded> scan(call.softcap, memory.tables, own.pages[stage], &own.scratch,
                                  block, whole);
    for (uint32_t row = 0; row < heads; row += kTileHeads) scan.ScanTile(first + row, row);
    // The other lanes have read what the next page overwrites.
    __syncwarp();
  }
  if (set.totals != nullptr) WriteTotals<kDim>(set, job.index, first, memory);
}

template <uint32_t kDim>
bool IsLaidOutAs(const CacheShape& shape) {
  using Page = SketchBytes<kDim>;
  return shape.directions == Page::kDirections && shape.page_bytes == sizeof(Page) &&
         shape.lo == offsetof(Page, lo) && shape.step == offsetof(Page, step) &&
         shape.pj == offsetof(Page, pj) && shape.r == offsetof(Page, r) &&
         shape.ps == offsetof(Page, ps) && shape.norms == offsetof(Page, rmax);
}

template <uint32_t kDim, bool kBounded>
cudaError_t LaunchScan(const ScanCall& call, cudaStream_t stream) {
  if (!IsLaidOutAs<kDim>(call.shape)) return cudaErrorInvalidValue;
  constexpr size_t kBytes = sizeof(ScanMemory<kDim>);
  const cudaError_t code = ReserveShared(ScanKernel<kDim, kBounded>, kBytes);
  if (code != cudaSuccess) return code;
  const dim3 grid(call.job_count, (call.head_count_max + kCtaHeads - 1) / kCtaHeads);
  ScanKernel<kDim, kBounded><<<grid, kScanThreads, kBytes, stream>>>(call);
  return cudaGetLastError();
}

template <bool kBounded>
cudaError_t ScanColumns(const ScanCall& call, cudaStream_t stream) {
  switch (call.shape.head_dim) {
    case 64:
      return LaunchScan<64, kBounded>(call, stream);
    case 80:
      return LaunchScan<80, kBounded>(call, stream);
    case 96:
      return LaunchScan<96, kBounded>(call, stream);
    case 128:
      return LaunchScan<128, kBounded>(call, stream);
    default:
      return LaunchScan<256, kBounded>(call, stream);
  }
}

}  // namespace

cudaError_t Scan(const ScanCall& call, cudaStream_t stream) {
  if (call.job_count == 0) return cudaSuccess;
  return call.bounded ? ScanColumns<true>(call, stream) : ScanColumns<false>(call, stream);
}

}  // namespace kvservice::cuda
