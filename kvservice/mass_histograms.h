// How dropped masses are distributed, by the selector that was in force and by layer: what
// certificates said, and what audits found to be true. For metrics.
//
// One thread (the executor) counts; any may read, at any time: a reader sees every number as it was
// at some moment, not all of one moment.

#ifndef KVSERVICE_KVSERVICE_MASS_HISTOGRAMS_H_
#define KVSERVICE_KVSERVICE_MASS_HISTOGRAMS_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvservice/attend_stats.h"
#include "selector/policy.h"

namespace kvservice {

// One distribution, in the classes of kDroppedMassBounds.
struct MassCounts {
  std::array<uint64_t, kDroppedMassBounds.size()> counts{};
  // Of the masses, rounded up.
  double sum = 0.0;
};

// Of one selector in one layer.
struct LayerMasses {
  SelectorKind selector = SelectorKind::kDense;
  uint32_t layer = 0;
  // Upper bounds of certificates, and upper ends of what was dropped in truth.
  MassCounts certified;
  MassCounts audited;
};

class MassHistograms {
 public:
  // Deeper layers count with the last.
  static constexpr uint32_t kLayersMax = 256;

  MassHistograms();

  // All certificates of one row. Those that prove nothing say at most all, 1.
  void AddCertified(SelectorKind selector, uint32_t layer, const AttendStats& of_row);
  void AddAudited(SelectorKind selector, uint32_t layer, double dropped_mass);

  // Those that have counted anything, by selector, then layer.
  std::vector<LayerMasses> Read() const;

 private:
  struct Cell {
    std::array<std::atomic<uint64_t>, kDroppedMassBounds.size()> counts{};
    std::atomic<double> sum{0.0};
    void Add(size_t index, uint64_t count);
    void AddSum(double dropped_mass);
    MassCounts Read() const;
  };
  struct Pair {
    Cell certified;
    Cell audited;
  };
  Pair& At(SelectorKind selector, uint32_t layer) const;

  // [selector][layer].
  const std::unique_ptr<Pair[]> pairs_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_MASS_HISTOGRAMS_H_
