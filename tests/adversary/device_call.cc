#include "tests/adversary/device_call.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "attention/sketch.h"

namespace kvservice::adversary {
namespace {

constexpr size_t kAlignment = 64;
// Failure probabilities that plans ask for.
constexpr std::array<double, 4> kEtas = {0.05, 1e-2, 1e-3, 1e-9};

size_t Aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void Arena::Reset(size_t bytes) {
  used_ = 0;
  if (bytes <= memory_.bytes()) return;
  memory_ = DeviceMemory();
  absl::StatusOr<DeviceMemory> memory = device_->Allocate(bytes);
  // Without memory there is nothing to test.
  if (!memory.ok()) std::abort();
  memory_ = std::move(memory).value();
}

std::byte* Arena::Take(size_t bytes) {
  std::byte* at = memory_.data() + used_;
  used_ += Aligned(bytes);
  if (used_ > memory_.bytes()) std::abort();
  return at;
}

void Arena::ReadBack() {
  copy_.resize(used_);
  const MemoryCopy read{memory_.data(), copy_.data(), copy_.size()};
  device_->Copy({&read, 1});
}

size_t StoredCase::BytesOf(const LayerCase& layer_case) {
  const KvLayout& layout = layer_case.shape.layout;
  const size_t sketch_bytes = SketchLayout(layout.head_dim).slice_bytes(layout.kv_head_count);
  return BlockCount(layer_case.length) * (Aligned(layout.slice_bytes()) + Aligned(sketch_bytes));
}

Arena* StoredCase::Emptied(Arena* arena, absl::Span<const LayerCase> cases) {
  size_t bytes = 0;
  for (const LayerCase& one : cases) bytes += BytesOf(one);
  arena->Reset(bytes);
  return arena;
}

StoredCase::StoredCase(Arena* arena, const LayerCase& layer_case, InArena /*taken*/)
    : case_(layer_case), arena_(*arena) {
  const KvLayout& layout = case_.shape.layout;
  const size_t sketch_bytes = SketchLayout(layout.head_dim).slice_bytes(layout.kv_head_count);
  for (uint32_t block = 0; block < BlockCount(case_.length); ++block) {
    slices_.push_back(arena_.Take(layout.slice_bytes()));
    sketches_.push_back(arena_.Take(sketch_bytes));
    const bool full = (block + 1) * kBlockTokens <= case_.length;
    view_slices_.push_back(slices_.back());
    view_sketches_.push_back(full ? sketches_.back() : nullptr);
  }
  view_.slices = view_slices_;
  view_.sketches = view_sketches_;
  view_.length = case_.length;
}

StoredCase::StoredCase(Arena* arena, const LayerCase& layer_case)
    : StoredCase(Emptied(arena, {&layer_case, 1}), layer_case, InArena()) {
  StoredCase* const all[] = {this};
  StoreTogether(arena, all);
}

std::vector<std::unique_ptr<StoredCase>> StoredCase::StoreAll(Arena* arena,
                                                              absl::Span<const LayerCase> cases) {
  Emptied(arena, cases);
  std::vector<std::unique_ptr<StoredCase>> stored;
  std::vector<StoredCase*> all;
  for (const LayerCase& one : cases) {
    stored.push_back(std::unique_ptr<StoredCase>(new StoredCase(arena, one, InArena())));
    all.push_back(stored.back().get());
  }
  StoreTogether(arena, all);
  return stored;
}

void StoredCase::StoreTogether(Arena* arena, absl::Span<StoredCase* const> all) {
  const KvLayout& layout = all.front()->case_.shape.layout;
  std::vector<AppendSlice> appends;
  std::vector<SealSlice> seals;
  for (const StoredCase* one : all) one->AddParts(&appends, &seals);
  arena->device()->Append(layout, appends);
  arena->device()->Seal(layout, seals);
  arena->ReadBack();
  for (StoredCase* one : all) one->ReadExact();
}

void StoredCase::AddParts(std::vector<AppendSlice>* appends, std::vector<SealSlice>* seals) const {
  const KvLayout& layout = case_.shape.layout;
  const size_t token_bytes = size_t{layout.kv_head_count} * layout.vector_bytes();
  for (uint32_t block = 0; block < slices_.size(); ++block) {
    const uint32_t begin = block * kBlockTokens;
    const uint32_t count = std::min(kBlockTokens, case_.length - begin);
    // In two parts, as appends arrive.
    const uint32_t part = count / 3;
    const size_t at = begin * token_bytes;
    const size_t rest = at + part * token_bytes;
    appends->push_back({slices_[block], 0, part, &case_.k[at], &case_.v[at]});
    appends->push_back({slices_[block], part, count - part, &case_.k[rest], &case_.v[rest]});
    if (count == kBlockTokens) {
      seals->push_back({slices_[block], sketches_[block], block, case_.tables});
    }
  }
}

void StoredCase::ReadExact() {
  const SketchLayout layout(case_.shape.layout.head_dim);
  exact_.clear();
  for (const std::byte* sketch : view_sketches_) {
    for (uint32_t kv_head = 0; kv_head < case_.shape.layout.kv_head_count; ++kv_head) {
      if (sketch == nullptr) {
        exact_.push_back(~uint64_t{0});
        continue;
      }
      const std::byte* const page = arena_.CopyOf(sketch) + kv_head * layout.page_bytes;
      exact_.push_back(SketchPage(layout, page).exact);
    }
  }
}

WidenedHead StoredCase::Widened(uint32_t kv_head) const {
  const KvLayout& layout = case_.shape.layout;
  return Widen(layout, case_.length, [&](uint32_t token) { return Row(kv_head, token); });
}

DeviceCall::DeviceCall(const StoredCase& stored_case, uint32_t set, const Plan& plan,
                       const std::array<std::byte, kDrawKeyBytes>& draw_key)
    : stored(stored_case), query_set(set) {
  const LayerCase& from = stored.layer_case();
  const KvLayout& layout = from.shape.layout;
  // What a device leaves out is seen.
  constexpr float kPoison = 12345.0F;
  out.assign(size_t{from.head_count()} * layout.head_dim, kPoison);
  lse.assign(from.head_count(), kPoison);
  certificates.resize(from.head_count());
  groups.resize(layout.kv_head_count);
  selected.resize(layout.kv_head_count);
  row.view = stored.view();
  row.position = from.position();
  row.query_count = from.query_count;
  row.q = from.queries[query_set].data();
  row.plan = plan;
  row.tables = from.tables;
  row.draw_key = draw_key;
  row.out = out.data();
  row.lse = lse.data();
  row.certificates = certificates.data();
  row.groups = groups.data();
  row.selected = selected.data();
  row.status = absl::UnknownError("not executed");
}

void DeviceCall::Run() {
  stored.device()->Attend(stored.layer_case().shape, absl::MakeSpan(&row, 1));
}

void DeviceCall::RunAll(absl::Span<const std::unique_ptr<DeviceCall>> calls) {
  const StoredCase& first = calls.front()->stored;
  std::vector<AttendRow> rows;
  rows.reserve(calls.size());
  for (const std::unique_ptr<DeviceCall>& call : calls) rows.push_back(call->row);
  first.device()->Attend(first.layer_case().shape, absl::MakeSpan(rows));
  for (size_t i = 0; i < rows.size(); ++i) calls[i]->row.status = std::move(rows[i].status);
}

PlanMaker::PlanMaker(const StoredCase& stored, Chance* chance)
    : case_(stored.layer_case()),
      lists_(stored.device()->NewTokenLists(case_.shape.layout, chance->Below(3))),
      frozen_(stored.device()->NewTokenLists(case_.shape.layout, 1)) {
  offsets_ = {0};
  for (uint32_t kv_head = 0; kv_head < case_.shape.layout.kv_head_count; ++kv_head) {
    const uint32_t keep = 1 + chance->Below(8);
    for (uint32_t token = 0; token < case_.length; ++token) {
      if (chance->OneIn(keep)) given_.push_back(token);
    }
    offsets_.push_back(static_cast<uint32_t>(given_.size()));
  }
}

Plan PlanMaker::Next(Chance* chance, double sampled) {
  const uint32_t length = case_.length;
  Plan plan;
  // Scans are what can go wrong.
  plan.source = chance->OneIn(2) ? Source::kScan : static_cast<Source>(chance->Below(4));
  plan.sink_end = chance->OneIn(3) ? chance->Below(80) : kSketchSinks;
  const uint32_t local = chance->OneIn(2) ? 1 + chance->Below(8) : 1 + chance->Below(100);
  plan.local_begin = length - std::min(length, local);
  if (chance->OneIn(4)) plan.visible_begin = chance->Below(length);
  plan.keep.top_k = chance->OneIn(2) ? 0 : chance->Below(chance->OneIn(2) ? 10 : 120);
  if (chance->OneIn(3)) {
    plan.keep.mass_limit = 0.3F / static_cast<float>(1 + chance->Below(30));
  }
  if (chance->OneIn(5)) {
    plan.keep.dilate_strongest = chance->Below(20);
    plan.keep.dilate_radius = chance->Below(4);
  }
  plan.lists = chance->OneIn(3) && plan.source != Source::kReuse ? frozen_.get() : lists_.get();
  if (plan.lists == lists_.get() && chance->OneIn(2)) plan.frozen_lists = frozen_.get();
  plan.min_cosine = chance->OneIn(4) ? 1.5F : 0.8F;
  plan.frozen_end = chance->Below(length);
  plan.given = given_;
  plan.given_offsets = offsets_;
  plan.dense_share = chance->OneIn(2) ? 0.6F : 1.0F;
  SetLimits(chance, sampled, &plan);
  if (chance->OneIn(2)) plan.reuse_mass_limit = 0.1F * static_cast<float>(1 + chance->Below(9));
  return plan;
}

void PlanMaker::SetLimits(Chance* chance, double sampled, Plan* plan) {
  constexpr std::array<float, 6> kErrors = {2.0F, 0.5F, 0.1F, 0.05F, 0.02F, 1e-3F};
  const uint32_t guarantee = chance->Below(16);
  const bool may_sample = static_cast<double>(chance->Uniform()) < sampled;
  plan->prove = guarantee == 0                 ? Guarantee::kNone
                : guarantee == 1               ? Guarantee::kExact
                : guarantee < 9 || !may_sample ? Guarantee::kDeterministic
                                               : Guarantee::kConfidence;
  const uint32_t limits = chance->Below(4);
  if (limits == 1 || limits == 3) {
    plan->max_dropped_mass = 0.5F / static_cast<float>(1 + chance->Below(100));
  }
  if (limits >= 2) plan->max_output_error = kErrors[chance->Below(kErrors.size())];
  // Rules that choose by what can be proven, and remember that it could not.
  if (chance->OneIn(4) && plan->prove != Guarantee::kNone) {
    plan->keep.output_limit = kErrors[chance->Below(kErrors.size())];
  }
  if (chance->OneIn(4)) plan->dense_positions = chance->Below(100);
  plan->failure_probability = kEtas[chance->Below(kEtas.size())];
  const uint32_t draws = chance->Below(6);
  plan->draws_max = draws == 0   ? 1 + chance->Below(40)
                    : draws == 1 ? 64
                    : draws == 2 ? 256
                    : draws == 3 ? kDrawsPerRoundMax
                                 : 1024;
  // Failing rows say nothing, and dense ones little: both are rarer than the rest.
  const uint32_t violation = chance->Below(16);
  plan->on_violation = violation == 0  ? OnViolation::kFail
                       : violation < 3 ? OnViolation::kDense
                       : violation < 8 ? OnViolation::kGrow
                                       : OnViolation::kReport;
  plan->mode = chance->OneIn(8) ? Mode::kShadow : Mode::kEnforce;
}

Plan PlanMaker::WithListsOf(const Plan& plan, const PlanMaker& from, const PlanMaker& to) {
  Plan result = plan;
  result.lists = plan.lists == from.lists_.get() ? to.lists_.get() : to.frozen_.get();
  if (plan.frozen_lists != nullptr) result.frozen_lists = to.frozen_.get();
  return result;
}

std::array<std::byte, kDrawKeyBytes> MakeDrawKey(Chance* chance) {
  std::array<std::byte, kDrawKeyBytes> key;
  for (size_t i = 0; i < key.size(); i += sizeof(uint64_t)) {
    const uint64_t bits = chance->Bits();
    for (size_t j = 0; j < sizeof(bits); ++j) key[i + j] = static_cast<std::byte>(bits >> (8 * j));
  }
  return key;
}

std::vector<HeadTruth> MakeTruths(const LayerCase& layer_case, uint32_t query_set,
                                  const std::vector<WidenedHead>& widened) {
  const LayerShape& shape = layer_case.shape;
  const uint32_t heads = shape.layout.query_head_count;
  std::vector<HeadTruth> truths;
  truths.reserve(layer_case.head_count());
  for (uint32_t head = 0; head < layer_case.head_count(); ++head) {
    const uint32_t end = layer_case.position() + head / heads + 1;
    const uint32_t window = shape.sliding_window;
    const uint32_t begin = window == 0 || end <= window ? 0 : end - window;
    const uint32_t kv_head = head % heads / shape.layout.group_size();
    truths.emplace_back(shape, widened[kv_head],
                        &layer_case.queries[query_set][size_t{head} * shape.layout.head_dim], begin,
                        end);
  }
  return truths;
}

}  // namespace kvservice::adversary
