#include "tests/adversary/attack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/float16.h"
#include "tests/adversary/judge.h"

namespace kvservice::adversary {
namespace {

constexpr uint32_t kCallsMin = 4;
constexpr uint32_t kCallsMore = 5;
// One case in so many is climbed.
constexpr uint32_t kClimbEvery = 16;

std::string Reproduce(const std::string& device, const LayerCase& layer_case, uint32_t call) {
  const KvLayout& layout = layer_case.shape.layout;
  return absl::StrCat("kvadversary --device=", device, " --case-seed=", layer_case.seed, " [",
                      Name(layer_case.traits), ", ", Name(layout.dtype), ", ", layout.head_dim,
                      "d ", layout.query_head_count, "q/", layout.kv_head_count, "kv, ",
                      layer_case.length, " tokens, call ", call, "]");
}

std::vector<WidenedHead> WidenAll(const StoredCase& stored) {
  std::vector<WidenedHead> widened;
  widened.reserve(stored.layer_case().shape.layout.kv_head_count);
  for (uint32_t h = 0; h < stored.layer_case().shape.layout.kv_head_count; ++h) {
    widened.push_back(stored.Widened(h));
  }
  return widened;
}

// What was appended, byte by byte.
bool HoldsWhatWasAppended(const StoredCase& stored) {
  const LayerCase& from = stored.layer_case();
  const KvLayout& layout = from.shape.layout;
  const size_t bytes = layout.vector_bytes();
  for (uint32_t token = 0; token < from.length; ++token) {
    for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
      const std::byte* row = stored.Row(kv_head, token);
      const size_t at = (size_t{token} * layout.kv_head_count + kv_head) * bytes;
      if (std::memcmp(row, &from.k[at], bytes) != 0) return false;
      if (std::memcmp(row + bytes, &from.v[at], bytes) != 0) return false;
    }
  }
  return true;
}

// The neighbour of a stored number; finite ones stay finite.
void Nudge(DType dtype, bool up, std::byte* data, size_t index) {
  const auto nudge = [&](auto bits, auto exponent_mask) {
    std::memcpy(&bits, data + index * sizeof(bits), sizeof(bits));
    const auto moved = static_cast<decltype(bits)>(up ? bits + 1 : bits - 1);
    if ((moved & exponent_mask) == exponent_mask) return;
    std::memcpy(data + index * sizeof(bits), &moved, sizeof(moved));
  };
  if (dtype == DType::kFloat32) return nudge(uint32_t{0}, uint32_t{0x7f800000});
  if (dtype == DType::kFloat16) return nudge(uint16_t{0}, uint16_t{0x7c00});
  nudge(uint16_t{0}, uint16_t{0x7f80});
}

// One case that is being changed.
class Mutation {
 public:
  Mutation(Chance* chance, LayerCase* to)
      : chance_(*chance), case_(*to), layout_(to->shape.layout), dim_(layout_.head_dim) {}

  void Apply() {
    switch (chance_.Below(10)) {
      case 0:
        return ScaleChannel();
      case 1:
        return SwapTokens();
      case 2:
        return ChangeQuery();
      case 3:
        return FlipChannelOfPage();
      case 4:
        return MakeNeedle();
      case 5:
        return CopyToPage();
      case 6:
        return ScaleValue();
      case 7:
        return ScaleQueries();
      default:
        return NudgeSome();
    }
  }

 private:
  uint32_t Token() { return chance_.Below(case_.length); }
  uint32_t KvHead() { return chance_.Below(layout_.kv_head_count); }
  float Factor() { return std::exp2(static_cast<float>(chance_.Below(9)) - 4.0F); }
  float Load(const std::vector<std::byte>& from, size_t index) const {
    return LoadElement(layout_.dtype, from.data(), index);
  }
  // Numbers that the cache's type cannot hold are left as they were.
  void Store(float x, size_t index, std::vector<std::byte>* to) const {
    const float before = LoadElement(layout_.dtype, to->data(), index);
    StoreElement(layout_.dtype, x, to->data(), index);
    if (std::isfinite(LoadElement(layout_.dtype, to->data(), index))) return;
    StoreElement(layout_.dtype, before, to->data(), index);
  }

  void ScaleChannel() {
    const uint32_t c = chance_.Below(dim_);
    const uint32_t kv_head = KvHead();
    const float factor = Factor();
    for (uint32_t token = 0; token < case_.length; ++token) {
      const size_t at = case_.ElementIndex(kv_head, token) + c;
      Store(factor * Load(case_.k, at), at, &case_.k);
    }
  }

  void SwapTokens() {
    const uint32_t kv_head = KvHead();
    const size_t a = case_.ElementIndex(kv_head, Token()) * ElementBytes(layout_.dtype);
    const size_t b = case_.ElementIndex(kv_head, Token()) * ElementBytes(layout_.dtype);
    if (a == b) return;
    std::vector<std::byte>& bytes = chance_.OneIn(3) ? case_.v : case_.k;
    std::swap_ranges(&bytes[a], &bytes[a] + layout_.vector_bytes(), &bytes[b]);
  }

  void ChangeQuery() {
    float& q = case_.queries[0][chance_.Bits() % case_.queries[0].size()];
    q *= chance_.OneIn(2) ? -1.0F : Factor();
    if (!std::isfinite(q)) q = 1.0F;
  }

  void FlipChannelOfPage() {
    const uint32_t c = chance_.Below(dim_);
    const uint32_t kv_head = KvHead();
    const uint32_t begin = Token() / kBlockTokens * kBlockTokens;
    for (uint32_t t = begin; t < std::min(case_.length, begin + kBlockTokens); ++t) {
      const size_t at = case_.ElementIndex(kv_head, t) + c;
      Store(-Load(case_.k, at), at, &case_.k);
    }
  }

  void MakeNeedle() {
    const uint32_t kv_head = KvHead();
    const size_t at = case_.ElementIndex(kv_head, Token());
    const float* q = &case_.queries[0][size_t{kv_head} * layout_.group_size() * dim_];
    const float factor = Factor();
    for (uint32_t c = 0; c < dim_; ++c) {
      Store(Load(case_.k, at + c) + factor * q[c], at + c, &case_.k);
    }
  }

  void CopyToPage() {
    const uint32_t kv_head = KvHead();
    const uint32_t from = Token();
    const uint32_t begin = from / kBlockTokens * kBlockTokens;
    const size_t element = ElementBytes(layout_.dtype);
    for (uint32_t t = begin; t < std::min(case_.length, begin + kBlockTokens); ++t) {
      if (t == from) continue;
      std::memcpy(&case_.k[case_.ElementIndex(kv_head, t) * element],
                  &case_.k[case_.ElementIndex(kv_head, from) * element], layout_.vector_bytes());
    }
  }

  void ScaleValue() {
    const size_t at = case_.ElementIndex(KvHead(), Token());
    const float factor = chance_.OneIn(2) ? -1.0F : Factor();
    for (uint32_t c = 0; c < dim_; ++c) Store(factor * Load(case_.v, at + c), at + c, &case_.v);
  }

  void ScaleQueries() {
    const float factor = chance_.OneIn(2) ? 0.5F : 2.0F;
    for (float& q : case_.queries[0]) {
      if (std::isfinite(factor * q)) q *= factor;
    }
  }

  void NudgeSome() {
    const size_t count = size_t{case_.length} * layout_.kv_head_count * dim_;
    const bool up = chance_.OneIn(2);
    for (uint32_t i = 1 + chance_.Below(32); i > 0; --i) {
      Nudge(layout_.dtype, up, case_.k.data(), chance_.Bits() % count);
    }
  }

  Chance& chance_;
  LayerCase& case_;
  const KvLayout& layout_;
  const uint32_t dim_;
};

}  // namespace

void Mutate(Chance* chance, LayerCase* layer_case) { Mutation(chance, layer_case).Apply(); }

double JudgeDeviceCall(const DeviceCall& call, const std::vector<HeadTruth>& truths,
                       const std::vector<WidenedHead>& widened, const std::string& reproduce,
                       Tally* tally, const std::string& population) {
  JudgedCall judged;
  judged.layer_case = &call.stored.layer_case();
  judged.truths = truths;
  judged.widened = widened;
  judged.plan = call.row.plan;
  judged.status = call.row.status;
  judged.out = call.out.data();
  judged.certificates = call.certificates;
  judged.groups = call.groups;
  judged.selected = call.selected;
  judged.is_exact = [&](uint32_t kv_head, uint32_t token) {
    return call.stored.IsExact(kv_head, token);
  };
  judged.reproduce = reproduce;
  judged.population = population;
  return JudgeCall(judged, tally);
}

absl::StatusOr<std::unique_ptr<Attacker>> Attacker::New(const AttackOptions& options) {
  std::unique_ptr<Attacker> attacker(new Attacker(options));
  for (const std::string& name : options.devices) {
    absl::StatusOr<std::unique_ptr<Device>> device = NewDevice(name, {.thread_count = 1});
    if (!device.ok()) return device.status();
    Target target;
    target.name = name;
    target.device = std::move(device).value();
    target.arena = std::make_unique<Arena>(target.device.get());
    attacker->targets_.push_back(std::move(target));
  }
  return attacker;
}

void Attacker::RunCase(uint64_t seed, Tally* tally) {
  Chance chance(~seed);
  ++tally->cases;
  if (chance.OneIn(kClimbEvery)) return Climb(seed, &chance, tally);
  RandomCalls(seed, &chance, tally);
}

void Attacker::RandomCalls(uint64_t seed, Chance* chance, Tally* tally) {
  const LayerCase layer_case = GenerateCase(seed, options_.limits);
  std::vector<std::unique_ptr<StoredCase>> stored;
  std::vector<std::unique_ptr<PlanMaker>> makers;
  const uint64_t maker_seed = chance->Bits();
  for (const Target& target : targets_) {
    stored.push_back(std::make_unique<StoredCase>(target.arena.get(), layer_case));
    Chance maker_chance(maker_seed);
    makers.push_back(std::make_unique<PlanMaker>(*stored.back(), &maker_chance));
    if (HoldsWhatWasAppended(*stored.back())) continue;
    ++tally->violations;
    tally->AddFailure(Reproduce(target.name, layer_case, 0) + ": stores other bytes");
  }
  const std::vector<WidenedHead> widened = WidenAll(*stored[0]);
  std::vector<std::vector<HeadTruth>> truths(layer_case.queries.size());
  const uint32_t calls = kCallsMin + chance->Below(kCallsMore);
  for (uint32_t i = 0; i < calls; ++i) {
    const uint32_t set = chance->Below(static_cast<uint32_t>(layer_case.queries.size()));
    if (truths[set].empty()) truths[set] = MakeTruths(layer_case, set, widened);
    const Plan plan = makers[0]->Next(chance);
    const auto key = MakeDrawKey(chance);
    for (size_t t = 0; t < targets_.size(); ++t) {
      DeviceCall call(*stored[t], set, PlanMaker::WithListsOf(plan, *makers[0], *makers[t]), key);
      call.Run();
      JudgeDeviceCall(call, truths[set], widened, Reproduce(targets_[t].name, layer_case, i),
                      tally);
    }
  }
}

double Attacker::Score(const Target& target, const LayerCase& layer_case, const Plan& plan,
                       Chance* chance, Tally* tally) {
  const StoredCase stored(target.arena.get(), layer_case);
  const std::vector<WidenedHead> widened = WidenAll(stored);
  DeviceCall call(stored, 0, plan, MakeDrawKey(chance));
  call.Run();
  return JudgeDeviceCall(call, MakeTruths(layer_case, 0, widened), widened,
                         Reproduce(target.name, layer_case, 0) + " climb", tally);
}

void Attacker::Climb(uint64_t seed, Chance* chance, Tally* tally) {
  constexpr uint64_t kClimbProducts = 64 << 10;
  const Target& target = targets_[chance->Below(static_cast<uint32_t>(targets_.size()))];
  LayerCase best = GenerateCase(seed, {.products_max = kClimbProducts, .length_max = 300});
  best.queries.resize(1);
  Plan plan;
  plan.source = Source::kScan;
  plan.local_begin = best.length - 1;
  plan.keep.top_k = chance->Below(8);
  plan.prove = Guarantee::kDeterministic;
  plan.max_output_error = 0.1F;
  double least = Score(target, best, plan, chance, tally);
  for (uint32_t step = 0; step < options_.climb_steps; ++step) {
    LayerCase next = best;
    Mutate(chance, &next);
    const double score = Score(target, next, plan, chance, tally);
    // Also when there was nothing to compare before.
    if (!(score < least) && !(std::isnan(least) && !std::isnan(score))) continue;
    least = score;
    best = std::move(next);
  }
  ++tally->climbs;
  if (!std::isnan(least)) tally->climb_least = std::min(tally->climb_least, least);
}

void RunUntil(uint64_t certificates, uint32_t thread_count, uint64_t round,
              const std::function<void(uint64_t index, uint32_t thread, Tally* tally)>& work,
              Tally* tally) {
  std::vector<Tally> tallies(thread_count);
  uint64_t done = 0;
  for (uint64_t first = 0; done < certificates; first += round) {
    std::atomic<uint64_t> next = first;
    const auto run = [&](uint32_t thread) {
      for (;;) {
        const uint64_t index = next.fetch_add(1);
        if (index >= first + round) return;
        work(index, thread, &tallies[thread]);
      }
    };
    std::vector<std::thread> threads;
    threads.reserve(thread_count);
    for (uint32_t thread = 1; thread < thread_count; ++thread) threads.emplace_back(run, thread);
    run(0);
    for (std::thread& thread : threads) thread.join();
    const uint64_t before = done;
    done = 0;
    for (const Tally& one : tallies) done += one.certificates;
    // Nothing answers: there is nothing to wait for.
    if (done == before) break;
  }
  for (const Tally& one : tallies) tally->Add(one);
}

}  // namespace kvservice::adversary
