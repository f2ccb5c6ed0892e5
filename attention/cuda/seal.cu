// Encodes sketch pages with the arithmetic of attention/sketch_encode-inl.h, operation by
// operation: a CTA per page, a thread per token. What the host adds up in eight lanes is added up
// in eight lanes here, so the bytes are the same (tests compare them).

#include "attention/cuda/elements-inl.h"

namespace kvservice::cuda {
namespace {

// As in sketch_encode-inl.h, which says why.
constexpr double kStepMin = 0x1p-14;
constexpr double kCellMargin = 1.0 + 0x1p-12;
constexpr double kResidualError = 0x1p-48;
constexpr double kNormMargin = 1.0 + 1e-9;
constexpr double kProjectionError = 0x1p-44;
constexpr double kProjectionStepMin = 0x1p-29;
constexpr double kProjectionMargin = 1.0 + 0x1p-13;
constexpr uint32_t kSinks = 8;
constexpr uint32_t kVersion = 1;
constexpr uint32_t kDimMax = 256;
constexpr uint32_t kDirectionsMax = 4;

// What the threads of a page share.
struct PageState {
  float lo[kDimMax];
  float step[kDimMax];
  float metric[kDimMax];
  float weights[kDirectionsMax][kDimMax];
  float radius_scale[256];
  double projection_scale[kDirectionsMax];
  double warp_max[2][2 + kDirectionsMax];
  float ps[kDirectionsMax];
  float rmax, vmax;
};

struct TokenResidual {
  double norm = 0.0;
  double projection[kDirectionsMax] = {};
  bool within_cells = true;
};

__device__ __forceinline__ double Tree(const double (&lanes)[8]) {
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
         ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

template <int kType>
__device__ __forceinline__ double ValueNorm(const std::byte* v, uint32_t dim, bool* finite) {
  double lanes[8] = {};
  constexpr uint32_t kBytes = kType == kFloat32 ? 4 : 2;
  for (uint32_t c = 0; c < dim; c += 8) {
    float x[8];
    LoadEight<kType>(v + c * kBytes, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) lanes[i] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  const double squares = Tree(lanes);
  *finite = isfinite(squares);
  return sqrt(squares) * kNormMargin;
}

// Smallest binary16 number >= x, as bits; x is positive.
__device__ __forceinline__ uint16_t Float16RoundUp(double x) {
  uint16_t bits = __half_as_ushort(__float2half_rn(static_cast<float>(x)));
  if (static_cast<double>(__half2float(__ushort_as_half(bits))) < x) ++bits;
  return bits;
}

// lo and step of this thread's channels; false if a step overflows.
__device__ __forceinline__ bool ChooseCells(const CacheShape& shape, const SealItem& item,
                                            const float* keys, uint32_t stride, PageState* state) {
  const uint32_t first = item.block_index == 0 ? kSinks : 0;
  bool valid = true;
  for (uint32_t c = threadIdx.x; c < shape.head_dim; c += kTokens) {
    float low = __int_as_float(0x7f800000);
    float high = -low;
    for (uint32_t token = first; token < kTokens; ++token) {
      const float k = keys[token * stride + c];
      low = k < low ? k : low;
      high = k > high ? k : high;
    }
    const double range = static_cast<double>(high) - static_cast<double>(low);
    const double needed = range / 16.0 * (1.0 + 0x1p-11);
    const uint16_t bits = Float16RoundUp(needed < kStepMin ? kStepMin : needed);
    const float step = __half2float(__ushort_as_half(bits));
    state->lo[c] = low;
    state->step[c] = step;
    reinterpret_cast<float*>(item.page + shape.lo)[c] = low;
    reinterpret_cast<uint16_t*>(item.page + shape.step)[c] = bits;
    valid = valid && isfinite(step);
  }
  return valid;
}

__device__ __forceinline__ double CellOf(float step) {
  return static_cast<double>(step) / 2.0 * kCellMargin;
}

// Sums over channels that one thread makes in the host's order: thread j those of direction j, the
// first of the second warp the norm of half a cell.
__device__ __forceinline__ void SumChannels(const CacheShape& shape, const SealItem& item,
                                            PageState* state) {
  if (threadIdx.x < shape.directions) {
    double scale = 0.0;
    for (uint32_t c = 0; c < shape.head_dim; ++c) {
      scale += fabs(static_cast<double>(state->weights[threadIdx.x][c])) * CellOf(state->step[c]);
    }
    state->projection_scale[threadIdx.x] = scale;
  }
  if (threadIdx.x == kWarp) {
    double squares = 0.0;
    for (uint32_t c = 0; c < shape.head_dim; ++c) {
      const double half = static_cast<double>(state->metric[c]) * state->step[c] / 2.0;
      squares += half * half;
    }
    *reinterpret_cast<float*>(item.page + shape.norms + 4) = static_cast<float>(sqrt(squares));
  }
}

__device__ __forceinline__ uint32_t CodeOf(float k, float lo, float step) {
  const float cell = __fdiv_rn(k - lo, step);
  return static_cast<uint32_t>(static_cast<int32_t>(cell < 15.0F ? cell : 15.0F));
}

__device__ __forceinline__ void WriteCodes(const CacheShape& shape, const PageState& state,
                                           const float* key, std::byte* page) {
  const uint32_t half = shape.head_dim / 2;
  for (uint32_t c = 0; c < half; c += 4) {
    uint32_t word = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t low = CodeOf(key[c + i], state.lo[c + i], state.step[c + i]);
      const uint32_t high =
          CodeOf(key[half + c + i], state.lo[half + c + i], state.step[half + c + i]);
      word |= (low | high << 4) << (8 * i);
    }
    reinterpret_cast<uint32_t*>(page)[c / 4 * kTokens + threadIdx.x] = word;
  }
}

__device__ __forceinline__ TokenResidual MeasureResidual(const CacheShape& shape,
                                                         const PageState& state, const float* key) {
  TokenResidual residual;
  double squares[8] = {};
  double along[kDirectionsMax][8] = {};
  for (uint32_t c = 0; c < shape.head_dim; c += 8) {
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      const float k = key[c + i];
      const double step = state.step[c + i];
      const auto code =
          static_cast<double>(static_cast<int32_t>(CodeOf(k, state.lo[c + i], state.step[c + i])));
      const double e =
          (static_cast<double>(k) - static_cast<double>(state.lo[c + i])) - (code + 0.5) * step;
      const double size = fabs(e) + kResidualError * step;
      residual.within_cells &= size - CellOf(state.step[c + i]) <= 0.0;
      const double scaled = size * static_cast<double>(state.metric[c + i]);
      squares[i] += scaled * scaled;
#pragma unroll
      for (uint32_t j = 0; j < kDirectionsMax; ++j) {
        if (j < shape.directions) {
          along[j][i] += static_cast<double>(state.weights[j][c + i]) * e;
        }
      }
    }
  }
  residual.norm = sqrt(Tree(squares)) * kNormMargin;
#pragma unroll
  for (uint32_t j = 0; j < kDirectionsMax; ++j) {
    if (j < shape.directions && state.projection_scale[j] != 0.0) {
      residual.projection[j] = Tree(along[j]);
    }
  }
  return residual;
}

// The larger, NaN left out.
__device__ __forceinline__ double Larger(double a, double b) { return a < b ? b : a; }

__device__ __forceinline__ double LargestOfPage(double x, uint32_t place, PageState* state) {
  x = Larger(0.0, x);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = Larger(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  if (threadIdx.x % kWarp == 0) state->warp_max[threadIdx.x / kWarp][place] = x;
  __syncthreads();
  return Larger(state->warp_max[0][place], state->warp_max[1][place]);
}

// RoundUpToFloat (attention/log_mass.h) of a number that is not negative.
__device__ __forceinline__ float RoundUp(double x) {
  return x <= 0x1.fffffep+127 ? __double2float_ru(x) : __int_as_float(0x7f800000);
}

__device__ __forceinline__ bool RadiusHolds(const PageState& state, float largest, uint32_t code,
                                            double norm) {
  return static_cast<double>(largest) * static_cast<double>(state.radius_scale[code]) >= norm;
}

__device__ __forceinline__ uint32_t RadiusCode(const PageState& state, float largest, double norm) {
  if (norm == 0.0) return largest == 0.0F ? 0 : 255;
  uint32_t code = 0;
  for (uint32_t bit = 128; bit != 0; bit >>= 1) {
    if (RadiusHolds(state, largest, code | bit, norm)) code |= bit;
  }
  return code;
}

// This token's r, vn and pj, and the page's norms and steps. False if one of them cannot be
// represented or does not hold.
__device__ __forceinline__ bool WriteRadii(const CacheShape& shape, const SealItem& item,
                                           bool sketched, const TokenResidual& residual,
                                           double v_norm, PageState* state) {
  const float rmax = RoundUp(LargestOfPage(sketched ? residual.norm : 0.0, 0, state));
  const float vmax = RoundUp(LargestOfPage(sketched ? v_norm : 0.0, 1, state));
  bool valid = isfinite(rmax) && isfinite(vmax);
  auto* norms = reinterpret_cast<float*>(item.page + shape.norms);
  if (threadIdx.x == 0) {
    norms[0] = rmax;
    norms[2] = vmax;
  }
  float ps[kDirectionsMax];
#pragma unroll
  for (uint32_t j = 0; j < kDirectionsMax; ++j) {
    if (j >= shape.directions) break;
    const double largest =
        LargestOfPage(sketched ? fabs(residual.projection[j]) : 0.0, 2 + j, state);
    const double needed = largest / 127.0 * (1.0 + 0x1p-40);
    ps[j] = RoundUp(Larger(needed, kProjectionStepMin * state->projection_scale[j]));
    valid = valid && isfinite(ps[j]);
    if (threadIdx.x == 0) reinterpret_cast<float*>(item.page + shape.ps)[j] = ps[j];
  }
  if (!sketched || !valid) return valid;
  const uint32_t r = RadiusCode(*state, rmax, residual.norm);
  const uint32_t vn = RadiusCode(*state, vmax, v_norm);
  valid = RadiusHolds(*state, rmax, r, residual.norm) && RadiusHolds(*state, vmax, vn, v_norm);
  reinterpret_cast<uint8_t*>(item.page + shape.r)[threadIdx.x] = static_cast<uint8_t>(r);
  reinterpret_cast<uint8_t*>(item.page + shape.vn)[threadIdx.x] = static_cast<uint8_t>(vn);
#pragma unroll
  for (uint32_t j = 0; j < kDirectionsMax; ++j) {
    if (j >= shape.directions) break;
    const auto step = static_cast<double>(ps[j]);
    const double code = ps[j] > 0.0F ? rint(residual.projection[j] / step) : 0.0;
    const double stored = fmin(fmax(code, -127.0), 127.0);
    reinterpret_cast<int8_t*>(item.page + shape.pj)[j * kTokens + threadIdx.x] =
        static_cast<int8_t>(stored);
    const double miss = fabs(residual.projection[j] - step * stored);
    valid = valid &&
            miss + kProjectionError * state->projection_scale[j] <= step / 2.0 * kProjectionMargin;
  }
  return valid;
}

__device__ __forceinline__ void ZeroPage(const CacheShape& shape, std::byte* page) {
  for (uint32_t i = threadIdx.x; i < shape.page_bytes / 16; i += kTokens) {
    reinterpret_cast<uint4*>(page)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
}

__device__ __forceinline__ void WriteMarks(const CacheShape& shape, std::byte* page,
                                           uint64_t exact) {
  if (threadIdx.x != 0) return;
  *reinterpret_cast<uint64_t*>(page + shape.exact) = exact;
  *reinterpret_cast<uint32_t*>(page + shape.version) = kVersion;
}

template <int kType>
__global__ void __launch_bounds__(kTokens)
    SealKernel(const CacheShape shape, const SealItem* items) {
  extern __shared__ float keys[];  // [64][head_dim + 1]
  __shared__ PageState state;
  const SealItem item = items[blockIdx.x];
  const uint32_t dim = shape.head_dim;
  const uint32_t stride = dim + 1;
  const uint32_t token = threadIdx.x;
  ZeroPage(shape, item.page);
  bool finite = true;
  for (uint32_t i = token; i < kTokens * dim; i += kTokens) {
    const float k = LoadElement<kType>(item.rows + i / dim * shape.row_bytes, i % dim);
    finite = finite && isfinite(k);
    keys[i / dim * stride + i % dim] = k;
  }
  for (uint32_t c = token; c < dim; c += kTokens) {
    state.metric[c] = item.metric[c];
    for (uint32_t j = 0; j < shape.directions; ++j) state.weights[j][c] = item.weights[j * dim + c];
  }
  for (uint32_t i = token; i < 256; i += kTokens) state.radius_scale[i] = item.radius_scale[i];
  bool v_finite = true;
  const double v_norm = ValueNorm<kType>(
      item.rows + size_t{token} * shape.row_bytes + shape.vector_bytes, dim, &v_finite);
  bool valid = __syncthreads_and(finite && v_finite) != 0;
  if (valid) valid = __syncthreads_and(ChooseCells(shape, item, keys, stride, &state)) != 0;
  if (valid) {
    SumChannels(shape, item, &state);
    __syncthreads();
    const bool sketched = item.block_index != 0 || token >= kSinks;
    TokenResidual residual;
    if (sketched) {
      WriteCodes(shape, state, &keys[token * stride], item.page);
      residual = MeasureResidual(shape, state, &keys[token * stride]);
    }
    valid = WriteRadii(shape, item, sketched, residual, v_norm, &state);
    valid = __syncthreads_and(valid && residual.within_cells) != 0;
  }
  if (valid) {
    const uint64_t exact = item.block_index == 0 ? (uint64_t{1} << kSinks) - 1 : 0;
    return WriteMarks(shape, item.page, exact);
  }
  ZeroPage(shape, item.page);
  WriteMarks(shape, item.page, ~uint64_t{0});
}

template <int kType>
cudaError_t LaunchSeal(const CacheShape& shape, const SealItem* items, uint32_t item_count,
                       cudaStream_t stream) {
  const size_t shared_bytes = size_t{kTokens} * (shape.head_dim + 1) * sizeof(float);
  const cudaError_t code = ReserveShared(SealKernel<kType>, shared_bytes);
  if (code != cudaSuccess) return code;
  SealKernel<kType><<<item_count, kTokens, shared_bytes, stream>>>(shape, items);
  return cudaGetLastError();
}

}  // namespace

cudaError_t Seal(const CacheShape& shape, const SealItem* items, uint32_t item_count,
                 cudaStream_t stream) {
  if (item_count == 0) return cudaSuccess;
  switch (shape.dtype) {
    case kFloat32:
      return LaunchSeal<kFloat32>(shape, items, item_count, stream);
    case kFloat16:
      return LaunchSeal<kFloat16>(shape, items, item_count, stream);
    default:
      return LaunchSeal<kBfloat16>(shape, items, item_count, stream);
  }
}

}  // namespace kvservice::cuda
