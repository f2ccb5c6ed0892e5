// Samples what one head dropped: the sampled bound of its mass, and the compensation of its output.
// The one home of the order of things (draws, looks, stopping), so that every host device spends
// its failure probability alike. The mathematics is in attention/sampled_bound.h and
// attention/output_error.h, the random numbers in attention/draws.h.
//
// Everything about a population (query, tokens, weights, most draws, limits) is fixed before its
// first draw and may not depend on the random numbers it is sampled with.
//
// Objects: one thread each. Keys and values are read by the device, through functions.

#ifndef KVSERVICE_ATTENTION_SAMPLE_HEAD_H_
#define KVSERVICE_ATTENTION_SAMPLE_HEAD_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "attention/draws.h"
#include "attention/kv_layout.h"
#include "attention/log_mass.h"
#include "attention/output_error.h"
#include "attention/sampled_bound.h"

namespace kvservice {

// Tokens with integer weights of type Weight; those with weight 0 are not in it.
template <typename Weight>
struct WeightedPages {
  // Starts over with all weights zero.
  void Begin(uint32_t first_block, uint32_t page_count) {
    block_begin = first_block;
    weights.assign(size_t{page_count} * kBlockTokens, 0);
  }
  // Adds up the weights once all are set; draws need it. Together they are below 2^64.
  void SumPages();

  uint64_t total() const { return sums.total(); }
  uint32_t page_count() const { return static_cast<uint32_t>(weights.size() / kBlockTokens); }
  uint32_t PositionOf(const WeightedDraws::Token& drawn) const {
    return (block_begin + drawn.page) * kBlockTokens + drawn.token;
  }
  absl::Span<const Weight> Page(uint32_t page) const {
    return absl::MakeConstSpan(&weights[size_t{page} * kBlockTokens], kBlockTokens);
  }

  uint32_t block_begin = 0;
  std::vector<Weight> weights;  // [page_count][64]
  PageSums sums;
};

// What a head dropped. W_i >= e^s_i in units of 2^-30 e^ref, at least 1 for every dropped token.
struct Population : WeightedPages<uint32_t> {
  double ref = 0.0;  // finite
};

// e^s in units of 2^-30 e^ref for a logit in [low, high], rounded outward. NaN gives an infinite
// upper end.
DrawnWeight WeightOfLogit(double low, double nearest, double high, double ref);

// ---- Mass ---------------------------------------------------------------------------------------

struct MassSampling {
  uint32_t draws_max = 0;
  double eta = 0.0;  // in (0, 1)
  // Sampling ends once Z_D <= enough is proven, in units of the weights.
  double enough = 0.0;
};

struct MassSample {
  // Z_D with failure probability eta; never above what holds always.
  WeightUpper upper;
  uint32_t draws = 0;
  // sum of e over sum of W of the drawn tokens: how loose the weights are, an estimate.
  double ratio = 1.0;
};

// Exact weights of the tokens at `positions`.
using WeighTokens =
    absl::FunctionRef<void(absl::Span<const uint32_t> positions, absl::Span<DrawnWeight> weights)>;

// Draws tokens without replacement, kDrawsPerLook at a time. The population is not empty.
MassSample SampleMass(const Population& population, const KeyedBits& bits,
                      const MassSampling& sampling, WeighTokens weigh);

// ---- Output -------------------------------------------------------------------------------------

// Tokens of a population with their proposals T_i (output_error.h).
struct OutputPopulation : WeightedPages<uint64_t> {
  // value_bounds: [page_count][64] b_i, rounded up; read where weights are not zero. False if there
  // is nothing to compensate (all b_i are zero) or nothing is known (one is not finite).
  bool Propose(const Population& population, absl::Span<const float> value_bounds);

  double ref = 0.0;
  Proposals proposals;
};

struct OutputSampling {
  uint32_t head_dim = 0;
  uint32_t draws_max = 0;
  double eta = 0.0;  // in (0, 1)
  // Sampling ends once the error is proven to be at most this.
  double enough = 0.0;
  CompensatedMasses masses;
  const float* center = nullptr;  // o_S, [head_dim]
};

struct OutputSample {
  CompensationResult result;
  uint32_t draws = 0;
  std::vector<double> correction;  // [head_dim], to be added to o_S
};

// Exact weights and values, [positions][head_dim], of the tokens at `positions`.
using ReadTokens = absl::FunctionRef<void(absl::Span<const uint32_t> positions,
                                          absl::Span<DrawnWeight> weights, float* values)>;

// Draws tokens with replacement and looks after 32, 64, 96, 128, 192 ... of them.
OutputSample SampleOutput(const OutputPopulation& population, const KeyedBits& bits,
                          const OutputSampling& sampling, ReadTokens read);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SAMPLE_HEAD_H_
