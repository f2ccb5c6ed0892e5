// The scan kernel on every target: its intervals against logits in long double, without tolerance,
// and its estimates against the formula's home, attention/scan_terms.h.

#include "attention/cpu/scan_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "attention/float16.h"
#include "attention/scan_terms.h"
#include "tests/attention/cpu_targets.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

// One KV head of a case, scanned.
class Scan {
 public:
  Scan(const KvCase& kv, uint32_t kv_head, const std::vector<float>& queries, bool bounded)
      : kv_(kv), kv_head_(kv_head), view_(kv.View(kv.options().length)) {
    const LayerShape& shape = kv.shape();
    const uint32_t head_dim = shape.layout.head_dim;
    const uint32_t group = shape.layout.group_size();
    heads_.head_count = group;
    for (uint32_t head = 0; head < group; ++head) {
      q_.push_back(&queries[size_t{kv_head * group + head} * head_dim]);
      double squares = 0.0;
      for (uint32_t c = 0; c < head_dim; ++c) {
        heads_.qs.push_back(shape.scale * q_.back()[c]);
        const double exact = static_cast<double>(shape.scale) * static_cast<double>(q_.back()[c]);
        squares += exact * exact;
      }
      heads_.norm.push_back(std::sqrt(squares) * (1.0 + 1e-6) + 1e-30);
      heads_.visible_begin.push_back(0);
      heads_.visible_end.push_back(view_.length);
    }
    PrepareScan(shape, q_, kv.tables()[kv_head], bounded, &queries_);
    block_count_ = kv.options().length / kBlockTokens;
    weights_.Resize(group, 0, block_count_, bounded);
  }

  HeadQueries* heads() { return &heads_; }
  const ScanWeights& weights() const { return weights_; }

  void Run() {
    const std::vector<uint64_t> tokens(block_count_, ~uint64_t{0});
    ScanTask task;
    task.shape = &kv_.shape();
    task.view = &view_;
    task.kv_head = kv_head_;
    task.queries = &heads_;
    task.scan_queries = &queries_;
    task.table = &kv_.tables()[kv_head_];
    task.tokens = tokens;
    ScanPages(task, &weights_);
  }

  // ln of a weight, in long double.
  long double Log(const std::vector<float>& numbers, uint32_t head, uint32_t token) const {
    const uint32_t block = token / kBlockTokens;
    const float weight = weights_.Page(numbers, head, block)[token % kBlockTokens];
    return std::log(static_cast<long double>(weight)) +
           weights_.reference[weights_.PageIndex(head, block)] * std::log(2.0L);
  }

  long double Logit(uint32_t head, uint32_t token) const {
    const LayerShape& shape = kv_.shape();
    const std::byte* k = kv_.Row(kv_head_, token);
    long double sum = 0.0L;
    for (uint32_t c = 0; c < shape.layout.head_dim; ++c) {
      sum += static_cast<long double>(q_[head][c]) *
             static_cast<long double>(LoadElement(shape.layout.dtype, k, c));
    }
    sum *= static_cast<long double>(shape.scale);
    const auto cap = static_cast<long double>(shape.logit_softcap);
    return cap > 0.0L ? cap * std::tanh(sum / cap) : sum;
  }

  // Calls check(head, token, page, terms) for every sketched token, with the exact formula's terms.
  template <typename Check>
  void ForEachToken(const Check& check) const {
    const SketchLayout layout(kv_.shape().layout.head_dim);
    const SketchTable& table = kv_.tables()[kv_head_];
    for (uint32_t head = 0; head < heads_.head_count; ++head) {
      const auto query = MakeQueryTerms<double>(layout.dim, kv_.shape().scale, q_[head], table);
      for (uint32_t block = 0; block < block_count_; ++block) {
        const SketchPage page(layout, view_.sketches[block] + kv_head_ * layout.page_bytes);
        const auto terms = MakePageTerms(layout, page, table, query);
        for (uint32_t t = 0; t < kBlockTokens; ++t) {
          if (((page.exact >> t) & 1) == 0) check(head, block * kBlockTokens + t, page, terms);
        }
      }
    }
  }

 private:
  const KvCase& kv_;
  const uint32_t kv_head_;
  const KvView view_;
  std::vector<const float*> q_;
  HeadQueries heads_;
  ScanQueries queries_;
  uint32_t block_count_ = 0;
  ScanWeights weights_;
};

CaseOptions OptionsOf(uint32_t head_dim, DType dtype, Keys keys, Tables tables) {
  CaseOptions options;
  // Five heads: a full tile and a rest.
  options.layout = {
      .query_head_count = 10, .kv_head_count = 2, .head_dim = head_dim, .dtype = dtype};
  options.length = 3 * kBlockTokens;
  options.keys = keys;
  options.tables = tables;
  options.seed = head_dim + static_cast<uint64_t>(tables);
  return options;
}

// As received, scaled up until logits reach hundreds, and one channel alone.
std::vector<std::vector<float>> QueriesFor(const KvCase& kv) {
  std::vector<float> large = kv.queries();
  for (float& x : large) x *= 37.0F;
  std::vector<float> single(large.size(), 0.0F);
  for (size_t i = 5; i < single.size(); i += kv.options().layout.head_dim) single[i] = -3.25F;
  return {kv.queries(), large, single};
}

int CheckIntervals(const KvCase& kv, const Scan& scan) {
  int known = 0;
  int wrong = 0;
  scan.ForEachToken([&](uint32_t head, uint32_t token, const SketchPage&, const auto&) {
    const long double logit = scan.Logit(head, token);
    const long double upper = scan.Log(scan.weights().upper, head, token);
    const long double lower = scan.Log(scan.weights().lower, head, token);
    // Written so that NaN in place of an upper end counts as "nothing is known".
    if (upper < logit || lower > logit || std::isnan(lower)) ++wrong;
    if (std::isfinite(upper)) ++known;
  });
  EXPECT_EQ(wrong, 0) << Name(kv.options().keys) << " d=" << kv.options().layout.head_dim << " "
                      << Name(kv.options().layout.dtype) << " softcap " << kv.shape().logit_softcap;
  return known;
}

TEST(CpuScan, IntervalsHoldTheLogitsOfHostilePages) {
  const auto device = NewDeviceOrDie("reference");
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    for (const Keys keys : kAllKeys) {
      for (const Tables tables : {Tables::kIdentity, Tables::kLearnt, Tables::kExtreme}) {
        const DType dtype = static_cast<DType>((head_dim / 16 + static_cast<uint32_t>(keys)) % 3);
        KvCase kv(device.get(), OptionsOf(head_dim, dtype, keys, tables));
        for (const float softcap : {0.0F, 30.0F}) {
          kv.mutable_shape()->logit_softcap = softcap;
          for (const std::vector<float>& queries : QueriesFor(kv)) {
            Scan scan(kv, 1, queries, /*bounded=*/true);
            OnEveryTarget([&] {
              scan.Run();
              const int known = CheckIntervals(kv, scan);
              // An extreme metric may leave nothing but "unknown", and that is an answer.
              if (keys == Keys::kNormal && tables != Tables::kExtreme) {
                EXPECT_GT(known, 0);
              }
            });
          }
        }
      }
    }
  }
}

// Keys on the corners of their cells, where the bound is attained: every channel of a token misses
// its code by half a step in the direction of one query, or against it. `cells_away` steps of
// offset make the logit's own rounding as large as it gets next to the steps.
void PlaceOnCorners(uint32_t cells_away, uint64_t seed, KvCase* kv) {
  const KvLayout& layout = kv->options().layout;
  std::mt19937_64 random(seed);
  for (uint32_t block = 0; block < 3; ++block) {
    std::vector<float> step(layout.head_dim);
    std::vector<float> lo(layout.head_dim);
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      // An fp16 number, and a multiple of it that leaves sums with the codes exact.
      const float mantissa = 1.0F + static_cast<float>(random() % 1024) / 1024.0F;
      step[c] = std::ldexp(mantissa, static_cast<int>(random() % 4) - 6);
      const float away =
          static_cast<float>(random() % (2 * cells_away + 1)) - static_cast<float>(cells_away);
      lo[c] = away * step[c];
    }
    for (uint32_t t = 0; t < kBlockTokens; ++t) {
      const float* q = &kv->queries()[size_t{t % 5} * layout.head_dim];
      std::vector<float> key(layout.head_dim);
      for (uint32_t c = 0; c < layout.head_dim; ++c) {
        const bool up = (q[c] > 0.0F) == (t % 2 == 0);
        const auto cell = static_cast<float>(1 + random() % 13);
        key[c] = lo[c] + (up ? cell + 1.0F : cell) * step[c];
        // A number on a boundary belongs to the cell above.
        if (up) key[c] = std::nextafter(key[c], -std::numeric_limits<float>::infinity());
        // Two tokens, of which no sink, span the cells: sixteen steps, less what rounding up adds.
        if (t == 8) key[c] = lo[c];
        if (t == 9) key[c] = lo[c] + 16.0F * step[c] * (1.0F - 0x1p-11F);
      }
      kv->SetKey(0, block * kBlockTokens + t, key);
    }
  }
  kv->Seal();
}

TEST(CpuScan, IntervalsHoldWhereTheyAreAttained) {
  const auto device = NewDeviceOrDie("reference");
  double closest = 1.0;
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    for (const uint32_t cells_away : {0U, 100U, 4000U}) {
      for (uint64_t seed = 0; seed < 4; ++seed) {
        const Tables tables = seed % 2 == 0 ? Tables::kIdentity : Tables::kLearnt;
        KvCase kv(device.get(), OptionsOf(head_dim, DType::kFloat32, Keys::kNormal, tables));
        PlaceOnCorners(cells_away, seed, &kv);
        Scan scan(kv, 0, kv.queries(), /*bounded=*/true);
        OnEveryTarget([&] {
          scan.Run();
          EXPECT_GT(CheckIntervals(kv, scan), 0);
        });
        scan.ForEachToken([&](uint32_t head, uint32_t token, const SketchPage&, const auto&) {
          if (token % kBlockTokens < 10) return;
          const long double upper = scan.Log(scan.weights().upper, head, token);
          const long double lower = scan.Log(scan.weights().lower, head, token);
          const long double logit = scan.Logit(head, token);
          closest = std::min(closest, static_cast<double>(std::min(upper - logit, logit - lower) /
                                                          (upper - lower)));
        });
      }
    }
  }
  EXPECT_LT(closest, 1e-3) << "these keys are no longer hostile";
}

// The kernel adds little to the formula's own width.
TEST(CpuScan, IntervalsAreAsTightAsTheFormula) {
  const auto device = NewDeviceOrDie("reference");
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    const KvCase kv(device.get(),
                    OptionsOf(head_dim, DType::kBfloat16, Keys::kNormal, Tables::kLearnt));
    Scan scan(kv, 0, kv.queries(), /*bounded=*/true);
    OnEveryTarget([&] {
      scan.Run();
      double widest = 0.0;
      scan.ForEachToken([&](uint32_t head, uint32_t token, const SketchPage& page,
                            const PageTerms<double>& terms) {
        const long double upper = scan.Log(scan.weights().upper, head, token);
        const long double lower = scan.Log(scan.weights().lower, head, token);
        const double eps = LogitError(page, token % kBlockTokens, terms);
        widest = std::max(widest, static_cast<double>(upper - lower) / 2.0 - eps);
      });
      EXPECT_LE(widest, 2e-3);
    });
  }
}

// Coarse factors change an estimate by far less than it may be off anyway.
TEST(CpuScan, EstimatesFollowTheFormula) {
  const auto device = NewDeviceOrDie("reference");
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    const KvCase kv(device.get(),
                    OptionsOf(head_dim, DType::kFloat16, Keys::kNormal, Tables::kLearnt));
    for (const bool bounded : {false, true}) {
      Scan scan(kv, 1, kv.queries(), bounded);
      OnEveryTarget([&] {
        scan.Run();
        double furthest = 0.0;
        scan.ForEachToken([&](uint32_t head, uint32_t token, const SketchPage& page,
                              const PageTerms<double>& terms) {
          const double exact =
              EstimateLogit(SketchLayout(head_dim), page, token % kBlockTokens, terms);
          const long double ours = scan.Log(scan.weights().estimate, head, token);
          furthest = std::max(furthest, std::fabs(static_cast<double>(ours) - exact));
        });
        EXPECT_LE(furthest, bounded ? 1e-3 : 0.25) << "d=" << head_dim;
      });
    }
  }
}

TEST(CpuScan, UnseenTokensWeighNothing) {
  const auto device = NewDeviceOrDie("reference");
  const KvCase kv(device.get(), OptionsOf(64, DType::kFloat32, Keys::kNormal, Tables::kIdentity));
  Scan scan(kv, 0, kv.queries(), /*bounded=*/true);
  scan.heads()->visible_begin[1] = 70;
  scan.heads()->visible_end[1] = 150;
  OnEveryTarget([&] {
    scan.Run();
    for (uint32_t token = 0; token < 3 * kBlockTokens; ++token) {
      const bool seen = token >= 70 && token < 150;
      const uint32_t block = token / kBlockTokens;
      for (const auto* numbers :
           {&scan.weights().estimate, &scan.weights().upper, &scan.weights().lower}) {
        const float weight = scan.weights().Page(*numbers, 1, block)[token % kBlockTokens];
        EXPECT_EQ(weight > 0.0F, seen) << token;
      }
    }
  });
}

}  // namespace
}  // namespace kvservice::testing
