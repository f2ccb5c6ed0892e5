#include "tests/adversary/attack.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/adversary/judge.h"
#include "tests/adversary/mutate.h"

namespace kvservice::adversary {
namespace {

constexpr uint32_t kCallsMin = 4;
constexpr uint32_t kCallsMore = 5;
// One case in so many is climbed.
constexpr uint32_t kClimbEvery = 16;
// Plans that every case of a climb is judged by.
constexpr uint32_t kClimbPlans = 4;
// Caches of one call, and callers of one cache; more callers only where there are more rows.
constexpr uint32_t kCachesMax = 16;
constexpr uint32_t kCallersMax = 8;

std::string Reproduce(const std::string& device, uint64_t seed, double sampled,
                      const LayerCase& layer_case) {
  const KvLayout& layout = layer_case.shape.layout;
  return absl::StrCat("kvadversary --device=", device, " --case-seed=", seed,
                      sampled < 1.0 ? absl::StrCat(" --sampled=", sampled) : "", " [",
                      Name(layer_case.traits), ", ", Name(layout.dtype), ", ", layout.head_dim,
                      "d ", layout.query_head_count, "q/", layout.kv_head_count, "kv, ",
                      layer_case.length, " tokens, ");
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

struct BatchSize {
  uint32_t cache_count = 1;
  uint32_t callers_per_cache = 1;
};

// One batch in eight is small, and a few are as large as they may be.
BatchSize ChooseSize(uint32_t rows_max, Chance* chance) {
  const uint32_t kind = chance->Below(32);
  const uint32_t wanted = kind < 4    ? 1 + chance->Below(8)
                          : kind == 4 ? 129 + chance->Below(128)
                                      : 16 + chance->Below(33);
  const uint32_t rows = std::min(rows_max, wanted);
  const uint32_t callers = std::min(rows, 1 + chance->Below(kCallersMax));
  const uint32_t caches = std::min(kCachesMax, rows / callers);
  return {.cache_count = caches, .callers_per_cache = rows / caches};
}

std::vector<LayerCase> GenerateBatch(uint64_t seed, const CaseLimits& limits, uint32_t count) {
  std::vector<LayerCase> cases;
  cases.reserve(count);
  cases.push_back(GenerateCase(seed, limits));
  while (cases.size() < count) {
    cases.push_back(GenerateLike(SeedOf(seed, cases.size()), limits, cases[0].shape));
  }
  return cases;
}

// A cache as a device has stored it, and what is true about it; truths are made when first needed.
struct KnownCache {
  explicit KnownCache(const StoredCase& stored)
      : layer_case(&stored.layer_case()),
        widened(WidenAll(stored)),
        truths(stored.layer_case().queries.size()) {}

  const std::vector<HeadTruth>& Truths(uint32_t query_set) {
    if (truths[query_set].empty()) truths[query_set] = MakeTruths(*layer_case, query_set, widened);
    return truths[query_set];
  }

  const LayerCase* layer_case;
  std::vector<WidenedHead> widened;
  // [query set][head]
  std::vector<std::vector<HeadTruth>> truths;
};

// One row of every call.
struct Caller {
  uint32_t cache = 0;
  // [target]: with lists in its memory.
  std::vector<std::unique_ptr<PlanMaker>> makers;
};

// What a caller asks in one call.
struct Question {
  uint32_t query_set = 0;
  Plan plan;
  std::array<std::byte, kDrawKeyBytes> key;
};

using StoredCases = std::vector<std::unique_ptr<StoredCase>>;

// stored: [target][cache]
std::vector<Caller> MakeCallers(const std::vector<StoredCases>& stored, uint32_t per_cache,
                                Chance* chance) {
  std::vector<Caller> callers;
  for (uint32_t i = 0; i < per_cache; ++i) {
    for (uint32_t cache = 0; cache < stored[0].size(); ++cache) {
      Caller& caller = callers.emplace_back();
      caller.cache = cache;
      const uint64_t seed = chance->Bits();
      for (const StoredCases& of_target : stored) {
        Chance maker_chance(seed);
        caller.makers.push_back(std::make_unique<PlanMaker>(*of_target[cache], &maker_chance));
      }
    }
  }
  return callers;
}

std::vector<Question> Ask(const std::vector<Caller>& callers, const std::vector<LayerCase>& cases,
                          double sampled, Chance* chance) {
  std::vector<Question> questions;
  questions.reserve(callers.size());
  for (const Caller& caller : callers) {
    const size_t sets = cases[caller.cache].queries.size();
    Question& question = questions.emplace_back();
    question.query_set = chance->Below(static_cast<uint32_t>(sets));
    question.plan = caller.makers[0]->Next(chance, sampled);
    question.key = MakeDrawKey(chance);
  }
  return questions;
}

}  // namespace

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
  if (chance.OneIn(kClimbEvery)) return Climb(seed, &chance, tally);
  RandomCalls(seed, &chance, tally);
}

void Attacker::RandomCalls(uint64_t seed, Chance* chance, Tally* tally) {
  const BatchSize size = ChooseSize(options_.rows_max, chance);
  const std::vector<LayerCase> cases = GenerateBatch(seed, options_.limits, size.cache_count);
  tally->caches += cases.size();
  std::vector<StoredCases> stored;
  for (const Target& target : targets_) {
    stored.push_back(StoredCase::StoreAll(target.arena.get(), cases));
    for (const std::unique_ptr<StoredCase>& one : stored.back()) {
      if (HoldsWhatWasAppended(*one)) continue;
      ++tally->violations;
      tally->AddFailure(Reproduce(target.name, seed, options_.sampled, one->layer_case()) +
                        "stores other bytes]");
    }
  }
  std::vector<KnownCache> known;
  known.reserve(cases.size());
  for (const std::unique_ptr<StoredCase>& one : stored[0]) known.emplace_back(*one);
  const std::vector<Caller> callers = MakeCallers(stored, size.callers_per_cache, chance);
  const uint32_t calls = kCallsMin + chance->Below(kCallsMore);
  for (uint32_t i = 0; i < calls; ++i) {
    const std::vector<Question> questions = Ask(callers, cases, options_.sampled, chance);
    for (size_t t = 0; t < targets_.size(); ++t) {
      std::vector<std::unique_ptr<DeviceCall>> rows;
      for (size_t r = 0; r < callers.size(); ++r) {
        const Caller& caller = callers[r];
        const Plan plan =
            PlanMaker::WithListsOf(questions[r].plan, *caller.makers[0], *caller.makers[t]);
        rows.push_back(std::make_unique<DeviceCall>(
            *stored[t][caller.cache], questions[r].query_set, plan, questions[r].key));
      }
      DeviceCall::RunAll(rows);
      ++tally->calls;
      for (size_t r = 0; r < callers.size(); ++r) {
        KnownCache& cache = known[callers[r].cache];
        const std::string reproduce =
            absl::StrCat(Reproduce(targets_[t].name, seed, options_.sampled, *cache.layer_case),
                         "call ", i, " row ", r, "]");
        JudgeDeviceCall(*rows[r], cache.Truths(questions[r].query_set), cache.widened, reproduce,
                        tally);
      }
    }
  }
}

std::vector<double> Attacker::Scores(const Target& target, uint64_t seed,
                                     absl::Span<const LayerCase> cases,
                                     absl::Span<const Plan> plans, Chance* chance, Tally* tally) {
  const StoredCases stored = StoredCase::StoreAll(target.arena.get(), cases);
  std::vector<std::unique_ptr<DeviceCall>> rows;
  for (const std::unique_ptr<StoredCase>& one : stored) {
    for (const Plan& plan : plans) {
      rows.push_back(std::make_unique<DeviceCall>(*one, 0, plan, MakeDrawKey(chance)));
    }
  }
  DeviceCall::RunAll(rows);
  ++tally->calls;
  tally->caches += cases.size();
  std::vector<double> scores;
  for (size_t i = 0; i < cases.size(); ++i) {
    KnownCache known(*stored[i]);
    const std::string reproduce = Reproduce(target.name, seed, 1.0, cases[i]) + "climb]";
    double& least = scores.emplace_back(std::numeric_limits<double>::quiet_NaN());
    for (size_t j = 0; j < plans.size(); ++j) {
      const DeviceCall& row = *rows[i * plans.size() + j];
      least =
          std::fmin(least, JudgeDeviceCall(row, known.Truths(0), known.widened, reproduce, tally));
    }
  }
  return scores;
}

void Attacker::Climb(uint64_t seed, Chance* chance, Tally* tally) {
  constexpr uint64_t kClimbProducts = 64 << 10;
  const Target& target = targets_[chance->Below(static_cast<uint32_t>(targets_.size()))];
  LayerCase best = GenerateCase(seed, {.products_max = kClimbProducts, .length_max = 300});
  best.queries.resize(1);
  std::vector<Plan> plans(kClimbPlans);
  for (Plan& plan : plans) {
    plan.source = Source::kScan;
    plan.local_begin = best.length - 1;
    plan.keep.top_k = chance->Below(8);
    plan.prove = Guarantee::kDeterministic;
    plan.max_output_error = 0.1F;
  }
  double least = Scores(target, seed, {&best, 1}, plans, chance, tally)[0];
  for (uint32_t step = 0; step < options_.climb_steps; ++step) {
    std::vector<LayerCase> next(options_.climb_width, best);
    for (LayerCase& one : next) Mutate(chance, &one);
    const std::vector<double> scores = Scores(target, seed, next, plans, chance, tally);
    for (size_t i = 0; i < next.size(); ++i) {
      // Also when there was nothing to compare before.
      if (!(scores[i] < least) && !(std::isnan(least) && !std::isnan(scores[i]))) continue;
      least = scores[i];
      best = std::move(next[i]);
    }
  }
  ++tally->climbs;
  if (!std::isnan(least)) tally->climb_least = std::min(tally->climb_least, least);
}

void RunUntil(const RunLimits& limits,
              const std::function<void(uint64_t index, uint32_t thread, Tally* tally)>& work,
              Tally* tally) {
  const auto began = std::chrono::steady_clock::now();
  const auto time_is_up = [&] {
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - began;
    return passed.count() >= limits.seconds;
  };
  std::vector<Tally> tallies(limits.thread_count);
  uint64_t done = 0;
  uint64_t count = limits.round;
  for (uint64_t first = 0; done < limits.certificates && !time_is_up();) {
    std::atomic<uint64_t> next = first;
    const auto run = [&](uint32_t thread) {
      while (!time_is_up()) {
        const uint64_t index = next.fetch_add(1);
        if (index >= first + count) return;
        work(index, thread, &tallies[thread]);
      }
    };
    std::vector<std::thread> threads;
    threads.reserve(limits.thread_count);
    for (uint32_t thread = 1; thread < limits.thread_count; ++thread) {
      threads.emplace_back(run, thread);
    }
    run(0);
    for (std::thread& thread : threads) thread.join();
    const uint64_t before = done;
    done = 0;
    for (const Tally& one : tallies) done += one.certificates;
    // Nothing answers: there is nothing to wait for.
    if (done == before) break;
    first += count;
    // What is likely to be missing, less a little: threads wait for each other after every round.
    const double missing = static_cast<double>(limits.certificates) - static_cast<double>(done);
    const double rounds = 0.95 * missing / static_cast<double>(done) * static_cast<double>(first) /
                          static_cast<double>(limits.round);
    count = limits.round * static_cast<uint64_t>(std::max(1.0, rounds));
  }
  for (const Tally& one : tallies) tally->Add(one);
}

}  // namespace kvservice::adversary
