#include "attention/sample_head.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "attention/rounding.h"

namespace kvservice {

template <typename Weight>
void WeightedPages<Weight>::SumPages() {
  std::vector<uint64_t> page_sums(page_count());
  for (uint32_t page = 0; page < page_count(); ++page) {
    const absl::Span<const Weight> of_page = Page(page);
    page_sums[page] = std::accumulate(of_page.begin(), of_page.end(), uint64_t{0});
  }
  sums.Assign(page_sums);
}

template struct WeightedPages<uint32_t>;
template struct WeightedPages<uint64_t>;

DrawnWeight WeightOfLogit(double low, double nearest, double high, double ref) {
  DrawnWeight weight;
  weight.lower = WeightOf(LogMassLower{low}, ref).value;
  weight.upper = WeightOf(LogMassUpper{high}, ref).value;
  weight.nearest = std::clamp(std::exp(nearest - ref + kLnWeightsPerUnit), weight.lower,
                              std::max(weight.lower, weight.upper));
  return weight;
}

// ---- Mass ---------------------------------------------------------------------------------------

MassSample SampleMass(const Population& population, const KeyedBits& bits,
                      const MassSampling& sampling, WeighTokens weigh) {
  WeightedDraws draws;
  draws.Begin(population.sums, bits, sampling.draws_max);
  SampledBound bound;
  bound.Begin(population.total(), sampling.draws_max);
  const auto weights_of = [&population](uint32_t page) { return population.Page(page); };
  std::array<uint32_t, kDrawsPerLook> positions;
  std::array<uint64_t, kDrawsPerLook> drawn_weights;
  std::array<DrawnWeight, kDrawsPerLook> exact;
  double exact_sum = 0.0;
  double weight_sum = 0.0;
  for (;;) {
    uint32_t count = 0;
    WeightedDraws::Token drawn;
    while (count < kDrawsPerLook && draws.NextDistinct(weights_of, &drawn)) {
      positions[count] = population.PositionOf(drawn);
      drawn_weights[count] = drawn.weight;
      ++count;
    }
    if (count == 0) break;
    weigh(absl::MakeConstSpan(positions.data(), count), absl::MakeSpan(exact.data(), count));
    for (uint32_t i = 0; i < count; ++i) {
      bound.Add(drawn_weights[i], exact[i].upper);
      exact_sum += exact[i].nearest;
      weight_sum += static_cast<double>(drawn_weights[i]);
    }
    if (count < kDrawsPerLook || bound.Certifies(sampling.enough, sampling.eta)) break;
  }
  MassSample sample;
  sample.upper = bound.UpperBound(sampling.eta);
  sample.draws = bound.count();
  if (weight_sum > 0.0) sample.ratio = exact_sum / weight_sum;
  return sample;
}

// ---- Output -------------------------------------------------------------------------------------

bool OutputPopulation::Propose(const Population& population, absl::Span<const float> value_bounds) {
  ref = population.ref;
  Begin(population.block_begin, population.page_count());
  proposals = Proposals();
  float largest = 0.0F;
  float smallest = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < weights.size(); ++i) {
    if (population.weights[i] == 0) continue;
    // Written so that NaN is found.
    if (!(value_bounds[i] <= std::numeric_limits<float>::max())) return false;
    largest = std::max(largest, value_bounds[i]);
    smallest = std::min(smallest, value_bounds[i]);
  }
  if (largest == 0.0F) return false;
  proposals.value_bound = static_cast<double>(largest);
  proposals.scale_min = ProposalScale(static_cast<double>(smallest), proposals.value_bound);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (population.weights[i] == 0) continue;
    weights[i] = uint64_t{population.weights[i]} *
                 ProposalScale(static_cast<double>(value_bounds[i]), proposals.value_bound);
  }
  SumPages();
  proposals.sum = total();
  return true;
}

OutputSample SampleOutput(const OutputPopulation& population, const KeyedBits& bits,
                          const OutputSampling& sampling, ReadTokens read) {
  WeightedDraws draws;
  draws.Begin(population.sums, bits, sampling.draws_max);
  Compensation compensation;
  compensation.Begin(sampling.head_dim, population.proposals, sampling.draws_max);
  const auto weights_of = [&population](uint32_t page) { return population.Page(page); };
  std::array<uint32_t, kDrawsPerLook> positions;
  std::array<uint64_t, kDrawsPerLook> drawn_weights;
  std::array<DrawnWeight, kDrawsPerLook> exact;
  std::vector<float> values(size_t{kDrawsPerLook} * sampling.head_dim);
  OutputSample sample;
  sample.correction.resize(sampling.head_dim);
  for (uint32_t look = kDrawsPerLook; compensation.count() < sampling.draws_max;) {
    const uint32_t count = std::min(kDrawsPerLook, sampling.draws_max - compensation.count());
    for (uint32_t i = 0; i < count; ++i) {
      const WeightedDraws::Token drawn = draws.Next(weights_of);
      positions[i] = population.PositionOf(drawn);
      drawn_weights[i] = drawn.weight;
    }
    read(absl::MakeConstSpan(positions.data(), count), absl::MakeSpan(exact.data(), count),
         values.data());
    for (uint32_t i = 0; i < count; ++i) {
      compensation.Add(drawn_weights[i], exact[i], &values[size_t{i} * sampling.head_dim],
                       sampling.center);
    }
    if (compensation.count() < look && compensation.count() < sampling.draws_max) continue;
    // 32, 64, 96, 128, 192, 288 ...: a look costs as much as some draws.
    look += std::max(kDrawsPerLook, look / 2 / kDrawsPerLook * kDrawsPerLook);
    sample.result = compensation.Finish(sampling.masses, sampling.eta, sample.correction.data());
    if (sample.result.error_upper <= sampling.enough) break;
  }
  sample.draws = compensation.count();
  return sample;
}

}  // namespace kvservice
