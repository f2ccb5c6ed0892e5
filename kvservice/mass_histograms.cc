#include "kvservice/mass_histograms.h"

#include <algorithm>

#include "attention/rounding.h"

namespace kvservice {
namespace {

constexpr size_t kSelectorCount = static_cast<size_t>(SelectorKind::kScan) + 1;

uint64_t Total(const MassCounts& counts) {
  uint64_t total = 0;
  for (const uint64_t count : counts.counts) total += count;
  return total;
}

}  // namespace

MassHistograms::MassHistograms()
    : pairs_(std::make_unique<Pair[]>(kSelectorCount * size_t{kLayersMax})) {}

MassHistograms::Pair& MassHistograms::At(SelectorKind selector, uint32_t layer) const {
  return pairs_[static_cast<size_t>(selector) * kLayersMax + std::min(layer, kLayersMax - 1)];
}

void MassHistograms::AddCertified(SelectorKind selector, uint32_t layer,
                                  const AttendStats& of_row) {
  Cell& cell = At(selector, layer).certified;
  for (size_t i = 0; i < of_row.dropped_mass_counts.size(); ++i) {
    if (of_row.dropped_mass_counts[i] > 0) cell.Add(i, of_row.dropped_mass_counts[i]);
  }
  const auto unproven = static_cast<double>(of_row.certificates - of_row.certificates_proven);
  cell.AddSum(AddUp(of_row.dropped_mass_upper_sum, unproven));
}

void MassHistograms::AddAudited(SelectorKind selector, uint32_t layer, double dropped_mass) {
  Cell& cell = At(selector, layer).audited;
  cell.Add(DroppedMassClass(dropped_mass), 1);
  cell.AddSum(dropped_mass);
}

// One thread writes: no read-modify-write has to be one operation.
void MassHistograms::Cell::Add(size_t index, uint64_t count) {
  const uint64_t before = counts[index].load(std::memory_order_relaxed);
  counts[index].store(before + count, std::memory_order_relaxed);
}

void MassHistograms::Cell::AddSum(double dropped_mass) {
  sum.store(AddUp(sum.load(std::memory_order_relaxed), dropped_mass), std::memory_order_relaxed);
}

MassCounts MassHistograms::Cell::Read() const {
  MassCounts read;
  for (size_t i = 0; i < counts.size(); ++i) {
    read.counts[i] = counts[i].load(std::memory_order_relaxed);
  }
  read.sum = sum.load(std::memory_order_relaxed);
  return read;
}

std::vector<LayerMasses> MassHistograms::Read() const {
  std::vector<LayerMasses> masses;
  for (size_t i = 0; i < kSelectorCount * kLayersMax; ++i) {
    LayerMasses one{.selector = static_cast<SelectorKind>(i / kLayersMax),
                    .layer = static_cast<uint32_t>(i % kLayersMax),
                    .certified = pairs_[i].certified.Read(),
                    .audited = pairs_[i].audited.Read()};
    if (Total(one.certified) + Total(one.audited) > 0) masses.push_back(one);
  }
  return masses;
}

}  // namespace kvservice
