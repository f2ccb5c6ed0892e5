#include "kvservice/seed_queries.h"

#include <algorithm>
#include <cassert>
#include <limits>

#include "attention/float16.h"
#include "attention/host_lists.h"

namespace kvservice {
namespace {

constexpr DType kKeptType = DType::kBfloat16;

}  // namespace

SeedQueries::SeedQueries(const KvLayout& layout, uint32_t layer_count, size_t bytes_max)
    : token_floats_(size_t{layout.query_head_count} * layout.head_dim), layers_(layer_count) {
  const size_t token_bytes = token_floats_ * ElementBytes(kKeptType) + sizeof(uint32_t);
  tokens_max_ = static_cast<uint32_t>(
      std::min<size_t>(kSeedTokensMax, bytes_max / layer_count / token_bytes));
}

void SeedQueries::Add(uint32_t layer, absl::Span<const uint32_t> positions,
                      absl::Span<const float> queries) {
  assert(queries.size() == positions.size() * token_floats_);
  const size_t added = std::min<size_t>(positions.size(), tokens_max_);
  if (added == 0) return;
  Layer& state = layers_[layer];
  // Of the tokens kept so far, those for which there is still room.
  const uint32_t left = std::min<uint32_t>(count(layer), tokens_max_ - added);
  const uint32_t first = state.end - left;
  const size_t token_bytes = token_floats_ * ElementBytes(kKeptType);
  auto kept = std::make_shared<Kept>();
  kept->positions.reserve(left + added);
  kept->queries.resize((left + added) * token_bytes);
  if (left > 0) {
    assert(state.kept->positions[state.end - 1] < positions.front());
    const Kept& old = *state.kept;
    kept->positions.assign(old.positions.begin() + first, old.positions.begin() + state.end);
    std::copy_n(old.queries.begin() + static_cast<ptrdiff_t>(first * token_bytes),
                left * token_bytes, kept->queries.begin());
  }
  const size_t skipped = positions.size() - added;
  kept->positions.insert(kept->positions.end(), positions.begin() + static_cast<ptrdiff_t>(skipped),
                         positions.end());
  for (size_t i = 0; i < added * token_floats_; ++i) {
    StoreElement(kKeptType, queries[skipped * token_floats_ + i], kept->queries.data(),
                 left * token_floats_ + i);
  }
  state = {.kept = std::move(kept), .begin = 0, .end = static_cast<uint32_t>(left + added)};
}

uint32_t SeedQueries::count(uint32_t layer) const {
  return layer < layers_.size() ? layers_[layer].end - layers_[layer].begin : 0;
}

uint32_t SeedQueries::TakeOldest(uint32_t layer, absl::Span<float> queries) {
  assert(count(layer) > 0 && queries.size() == token_floats_);
  Layer& state = layers_[layer];
  for (size_t i = 0; i < token_floats_; ++i) {
    queries[i] =
        LoadElement(kKeptType, state.kept->queries.data(), state.begin * token_floats_ + i);
  }
  const uint32_t position = state.kept->positions[state.begin];
  if (++state.begin == state.end) state = {};
  return position;
}

void SeedQueries::CopyTo(uint32_t layer, std::vector<uint32_t>* positions,
                         std::string* queries) const {
  positions->clear();
  queries->clear();
  if (count(layer) == 0) return;
  const Layer& state = layers_[layer];
  const size_t token_bytes = token_floats_ * ElementBytes(kKeptType);
  positions->assign(state.kept->positions.begin() + state.begin,
                    state.kept->positions.begin() + state.end);
  queries->assign(
      reinterpret_cast<const char*>(state.kept->queries.data()) + state.begin * token_bytes,
      positions->size() * token_bytes);
}

void SeedQueries::Truncate(uint32_t length) {
  for (Layer& state : layers_) {
    while (state.end > state.begin && state.kept->positions[state.end - 1] >= length) --state.end;
    if (state.end == state.begin) state = {};
  }
}

size_t SeedQueries::bytes() const {
  size_t bytes = 0;
  for (const Layer& state : layers_) {
    if (state.kept == nullptr) continue;
    bytes += state.kept->queries.size() + state.kept->positions.size() * sizeof(uint32_t);
  }
  return bytes;
}

uint32_t SeedAnchors(const LayerShape& shape, uint32_t layer, const AttendRow& planned,
                     SeedQueries* seeds, Device* device, SeedScratch* scratch) {
  assert(planned.plan.source == Source::kReuse);
  const uint32_t row_count = std::min(seeds->count(layer), kSeedTokensPerStep);
  if (row_count == 0) return 0;
  const KvLayout& layout = shape.layout;
  scratch->q.resize(size_t{layout.query_head_count} * layout.head_dim);
  scratch->out.resize(scratch->q.size());
  scratch->lse.resize(layout.query_head_count);
  scratch->certificates.resize(layout.query_head_count);
  scratch->groups.resize(layout.kv_head_count);

  AttendRow seed = planned;
  seed.position = planned.view.length - 1;
  seed.query_count = 1;
  seed.q = scratch->q.data();
  seed.out = scratch->out.data();
  seed.lse = scratch->lse.data();
  seed.certificates = scratch->certificates.data();
  seed.groups = scratch->groups.data();
  seed.selected = nullptr;
  // Nobody sees the output, so nothing is proven about it.
  seed.plan.prove = Guarantee::kNone;
  seed.plan.max_dropped_mass = 1.0F;
  seed.plan.max_output_error = std::numeric_limits<float>::infinity();
  seed.plan.on_violation = OnViolation::kReport;
  seed.plan.mode = Mode::kEnforce;

  uint32_t scan_count = 0;
  for (uint32_t i = 0; i < row_count; ++i) {
    const uint32_t position = seeds->TakeOldest(layer, absl::MakeSpan(scratch->q));
    UnrotateQueries(shape, position, scratch->q.data(), scratch->q.data());
    RotateQueries(shape, seed.position, scratch->q.data(), scratch->q.data());
    // One by one: a query may reuse what the one before it chose.
    device->Attend(shape, absl::MakeSpan(&seed, 1));
    for (const GroupReport& group : scratch->groups) scan_count += group.scanned ? 1 : 0;
  }
  return scan_count;
}

}  // namespace kvservice
