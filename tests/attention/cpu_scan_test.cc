// The scan kernel on every target: its intervals against logits in long double, without tolerance,
// and its estimates against the formula's home, attention/scan_terms.h.

#include "attention/cpu/scan_kernel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "attention/cpu/radius.h"
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
  // Borrows everything. queries: [query_head_count][head_dim].
  Scan(const LayerShape& shape, const KvView& view, absl::Span<const SketchTable> tables,
       uint32_t kv_head, const std::vector<float>& queries, bool bounded)
      : shape_(shape), view_(view), table_(tables[kv_head]), kv_head_(kv_head) {
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
    PrepareScan(shape, q_, table_, bounded, &queries_);
    block_count_ = view_.length / kBlockTokens;
    weights_.Resize(group, 0, block_count_, bounded);
  }
  Scan(const KvCase& kv, uint32_t kv_head, const std::vector<float>& queries, bool bounded)
      : Scan(kv.shape(), kv.View(kv.options().length), kv.tables(), kv_head, queries, bounded) {}

  HeadQueries* heads() { return &heads_; }
  const ScanWeights& weights() const { return weights_; }

  void Run() {
    const std::vector<uint64_t> tokens(block_count_, ~uint64_t{0});
    ScanTask task;
    task.shape = &shape_;
    task.view = &view_;
    task.kv_head = kv_head_;
    task.queries = &heads_;
    task.scan_queries = &queries_;
    task.table = &table_;
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

  // ln of what an upper end becomes with one of its page's shares.
  long double LogShare(const std::vector<float>& shares, uint32_t head, uint32_t token) const {
    const float share = shares[weights_.PageIndex(head, token / kBlockTokens)];
    if (share == 0.0F) return -std::numeric_limits<long double>::infinity();
    return Log(weights_.upper, head, token) + std::log(static_cast<long double>(share));
  }
  // The ends of a token's interval.
  long double Upper(uint32_t head, uint32_t token) const {
    return Log(weights_.upper, head, token);
  }
  long double Lower(uint32_t head, uint32_t token) const {
    const long double lower = LogShare(weights_.lower_share, head, token);
    // A weight that stands for an underflow is no lower end.
    const uint32_t block = token / kBlockTokens;
    const bool least =
        weights_.Page(weights_.upper, head, block)[token % kBlockTokens] == 0x1p-126F;
    return least ? -std::numeric_limits<long double>::infinity() : lower;
  }
  long double Estimate(uint32_t head, uint32_t token) const {
    return weights_.bounded ? LogShare(weights_.estimate_share, head, token)
                            : Log(weights_.estimate, head, token);
  }

  long double Logit(uint32_t head, uint32_t token) const {
    const std::byte* k = view_.Row(shape_.layout, kv_head_, token);
    long double sum = 0.0L;
    for (uint32_t c = 0; c < shape_.layout.head_dim; ++c) {
      sum += static_cast<long double>(q_[head][c]) *
             static_cast<long double>(LoadElement(shape_.layout.dtype, k, c));
    }
    sum *= static_cast<long double>(shape_.scale);
    const auto cap = static_cast<long double>(shape_.logit_softcap);
    return cap > 0.0L ? cap * std::tanh(sum / cap) : sum;
  }

  // Calls check(head, token, page, terms) for every sketched token, with the exact formula's terms.
  template <typename Check>
  void ForEachToken(const Check& check) const {
    const SketchLayout layout(shape_.layout.head_dim);
    for (uint32_t head = 0; head < heads_.head_count; ++head) {
      const auto query = MakeQueryTerms<double>(layout.dim, shape_.scale, q_[head], table_);
      for (uint32_t block = 0; block < block_count_; ++block) {
        const SketchPage page(layout, view_.sketches[block] + kv_head_ * layout.page_bytes);
        const auto terms = MakePageTerms(layout, page, table_, query);
        for (uint32_t t = 0; t < kBlockTokens; ++t) {
          if (((page.exact >> t) & 1) == 0) check(head, block * kBlockTokens + t, page, terms);
        }
      }
    }
  }

 private:
  const LayerShape& shape_;
  const KvView view_;
  const SketchTable& table_;
  const uint32_t kv_head_;
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

// Returns how many upper ends say something.
int CheckIntervals(const Scan& scan) {
  int known = 0;
  int wrong = 0;
  scan.ForEachToken([&](uint32_t head, uint32_t token, const SketchPage&, const auto&) {
    const long double logit = scan.Logit(head, token);
    const long double upper = scan.Upper(head, token);
    const long double lower = scan.Lower(head, token);
    // Written so that NaN in place of an upper end counts as "nothing is known".
    if (upper < logit || lower > logit || std::isnan(lower)) ++wrong;
    if (std::isfinite(upper)) ++known;
  });
  EXPECT_EQ(wrong, 0);
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
            SCOPED_TRACE(::testing::Message() << Name(keys) << " d=" << head_dim << " "
                                              << Name(dtype) << " soft-cap " << softcap);
            Scan scan(kv, 1, queries, /*bounded=*/true);
            OnEveryTarget([&] {
              scan.Run();
              const int known = CheckIntervals(scan);
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

using Bytes = std::unique_ptr<std::byte[], decltype(&std::free)>;

Bytes NewAligned(size_t bytes) {
  auto* data = static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  std::fill_n(data, bytes, std::byte{0});
  return {data, &std::free};
}

// Offset in cells at which the rounding of a logit is some hundredths of its interval.
constexpr uint32_t kFarAway = 60'000;

// Which part of the bound a hostile slice attains.
enum class Attains : uint8_t {
  kBall,        // All channels on corners, the query in proportion to the cells: B ||M e||.
  kCells,       // One channel on its corner, the query along it: A.
  kProjection,  // The query along the sketch's direction: what rounding the projection missed.
  kFactors,     // As kCells, and what rounding small factors of the other channels missed.
};

// One slice of one KV head with fp32 keys placed within their cells at will.
class HostileSlice {
 public:
  // `cells_away` steps of offset make the logit's own rounding as large as it gets next to the
  // steps.
  HostileSlice(uint32_t head_dim, Attains attains, uint32_t cells_away, uint64_t seed)
      : random_(seed), sketch_layout_(head_dim) {
    shape_.layout = {
        .query_head_count = 5, .kv_head_count = 1, .head_dim = head_dim, .dtype = DType::kFloat32};
    shape_.scale = 0.125F;
    tables_ = {IdentitySketchTable(head_dim)};
    if (attains == Attains::kProjection) {
      tables_[0].directions[3] = 1.0F;
      EXPECT_TRUE(NormalizeSketchTable(head_dim, &tables_[0]).ok());
    }
    for (uint32_t c = 0; c < head_dim; ++c) {
      // An fp16 number of few bits, so that sums of its multiples are exact.
      step_.push_back(std::ldexp(1.5F, static_cast<int>(random_() % 4) - 6));
    }
    MakeQueries(attains);
    for (uint32_t c = 0; c < head_dim; ++c) {
      // Along the first query, so that its logit's sum grows and grows.
      const auto away = static_cast<float>(cells_away + random_() % 16);
      lo_.push_back(std::copysign(away, queries_[c]) * step_[c]);
    }
    slice_ = NewAligned(shape_.layout.slice_bytes());
    sketch_ = NewAligned(sketch_layout_.slice_bytes(1));
    for (uint32_t token = 0; token < kBlockTokens; ++token) PlaceKey(attains, token);
    EncodeSketchPage(shape_.layout, slice_.get(), 1, tables_[0], sketch_.get());
    slices_ = {slice_.get()};
    sketches_ = {sketch_.get()};
  }

  const LayerShape& shape() const { return shape_; }
  const std::vector<SketchTable>& tables() const { return tables_; }
  const std::vector<float>& queries() const { return queries_; }
  KvView View() const { return {.slices = slices_, .sketches = sketches_, .length = kBlockTokens}; }

 private:
  void MakeQueries(Attains attains) {
    const uint32_t head_dim = shape_.layout.head_dim;
    for (size_t i = 0; i < size_t{5} * head_dim; ++i) {
      const uint32_t c = i % head_dim;
      // All bits of a float, so that products and sums round.
      const float size = 20.0F + 0.01F * static_cast<float>(random_() % 65536) / 65536.0F;
      const float sign = random_() % 2 == 0 ? size : -size;
      const bool used = attains == Attains::kBall || c == 3;
      queries_.push_back(used ? sign * step_[c] : 0.0F);
    }
    if (attains != Attains::kFactors) return;
    // Channel 3 has the largest factor, which stands for the largest integer; the others' lie just
    // below the middle between two integers.
    const float limit = random_() % 2 == 0 ? 32639.0F : 32767.0F;
    for (size_t first = 0; first < queries_.size(); first += head_dim) {
      const float unit = std::fabs(queries_[first + 3]) * step_[3] / limit;
      for (uint32_t c = 0; c < head_dim; ++c) {
        if (c == 3) continue;
        const float factor = (static_cast<float>(random_() % 20) + 0.49F) * unit;
        queries_[first + c] = (random_() % 2 == 0 ? factor : -factor) / step_[c];
      }
    }
  }

  void PlaceKey(Attains attains, uint32_t token) {
    const float* q = &queries_[size_t{token % 5} * shape_.layout.head_dim];
    for (uint32_t c = 0; c < shape_.layout.head_dim; ++c) {
      const bool up = (q[c] > 0.0F) == (token % 2 == 0);
      auto cell = static_cast<float>(1 + random_() % 13);
      if (attains == Attains::kFactors) cell = up ? 14.0F : 1.0F;
      float within = up ? 1.0F : 0.0F;
      const bool centred = attains == Attains::kCells || attains == Attains::kFactors;
      if (centred && c != 3) within = 0.5F;
      if (attains == Attains::kProjection) within = static_cast<float>(random_() % 4096) / 4096.0F;
      float key = lo_[c] + (cell + within) * step_[c];
      // A number on a boundary belongs to the cell above.
      if (within == 1.0F) key = std::nextafter(key, -std::numeric_limits<float>::infinity());
      // Two tokens span the cells: sixteen steps, less what rounding up adds.
      if (token == 8) key = lo_[c];
      if (token == 9) key = lo_[c] + 16.0F * step_[c] * (1.0F - 0x1p-10F);
      StoreElement(DType::kFloat32, key, slice_.get() + shape_.layout.RowOffset(0, token), c);
    }
  }

  std::mt19937_64 random_;
  const SketchLayout sketch_layout_;
  LayerShape shape_;
  std::vector<SketchTable> tables_;
  std::vector<float> step_, lo_, queries_;
  Bytes slice_{nullptr, &std::free};
  Bytes sketch_{nullptr, &std::free};
  std::vector<const std::byte*> slices_, sketches_;
};

TEST(CpuScan, IntervalsHoldWhereTheyAreAttained) {
  for (const Attains attains :
       {Attains::kBall, Attains::kCells, Attains::kProjection, Attains::kFactors}) {
    double closest = 1.0;
    for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
      for (const uint32_t cells_away : {0U, 4000U, kFarAway}) {
        for (uint64_t seed = 0; seed < 6; ++seed) {
          const HostileSlice slice(head_dim, attains, cells_away, seed);
          Scan scan(slice.shape(), slice.View(), slice.tables(), 0, slice.queries(),
                    /*bounded=*/true);
          OnEveryTarget([&] {
            scan.Run();
            EXPECT_GT(CheckIntervals(scan), 0);
          });
          scan.ForEachToken([&](uint32_t head, uint32_t token, const SketchPage&, const auto&) {
            const long double upper = scan.Upper(head, token);
            const long double lower = scan.Lower(head, token);
            const long double logit = scan.Logit(head, token);
            const long double miss = std::min(upper - logit, logit - lower);
            closest = std::min(closest, static_cast<double>(miss / (upper - lower)));
          });
        }
      }
    }
    // What is left: the margins 1 + 2^-12; the steps of radii; the allowance for rounding, which is
    // large next to a projection's step.
    double left = attains == Attains::kBall ? 5e-4 : attains == Attains::kCells ? 5e-3 : 0.1;
    if (attains == Attains::kFactors) left = 2e-2;
    EXPECT_LT(closest, left) << "these keys are no longer hostile: " << static_cast<int>(attains);
  }
}

// A slice whose logits are all `logit` but for little, and whose rounding goes one way. In sixteen
// channels, which begin the sums of every target's lanes, cells lie 2^16 steps from zero and keys
// where upper ends are attained. The products of the other 240 are each just below half of what a
// sum of the first is rounded to: one after the other is lost, and the sum comes out too small.
class OneWaySlice {
 public:
  explicit OneWaySlice(float logit) : sketch_layout_(kDim) {
    shape_.layout = {
        .query_head_count = 1, .kv_head_count = 1, .head_dim = kDim, .dtype = DType::kFloat32};
    shape_.scale = 1.0F;
    const float product = logit / kFarChannels;
    // Centres of cells of the other channels: keys of 1, steps of 2^-14.
    constexpr float kNear = 1.0F + 0x1p-11F;
    const float lost = 0.49F * (std::nextafter(product, INFINITY) - product);
    slice_ = NewAligned(shape_.layout.slice_bytes());
    sketch_ = NewAligned(sketch_layout_.slice_bytes(1));
    for (uint32_t c = 0; c < kDim; ++c) {
      queries_.push_back(c < kFarChannels ? -product / kFar : lost / kNear);
      for (uint32_t token = 0; token < kBlockTokens; ++token) {
        // One key at the other end gives the cells their length of 1.
        const float far = token == 9 ? 16.0F - 0x1p-7F : 0.0F;
        StoreElement(DType::kFloat32, c < kFarChannels ? far - kFar - 8.0F : 1.0F,
                     slice_.get() + shape_.layout.RowOffset(0, token), c);
      }
    }
    EncodeSketchPage(shape_.layout, slice_.get(), 1, tables_[0], sketch_.get());
    EXPECT_EQ(SketchPage(sketch_layout_, sketch_.get()).step[0], Float16FromFloat(1.0F));
    slices_ = {slice_.get()};
    sketches_ = {sketch_.get()};
  }

  // On every target the upper ends hold, and say something.
  void Check() const {
    const KvView view{.slices = slices_, .sketches = sketches_, .length = kBlockTokens};
    Scan scan(shape_, view, tables_, 0, queries_, /*bounded=*/true);
    OnEveryTarget([&] {
      scan.Run();
      EXPECT_EQ(CheckIntervals(scan), kBlockTokens);
    });
  }

 private:
  static constexpr uint32_t kDim = 256;
  static constexpr uint32_t kFarChannels = 16;
  static constexpr float kFar = 0x1p16F;

  const SketchLayout sketch_layout_;
  LayerShape shape_;
  const std::vector<SketchTable> tables_ = {IdentitySketchTable(kDim)};
  std::vector<float> queries_;
  Bytes slice_{nullptr, &std::free};
  Bytes sketch_{nullptr, &std::free};
  std::vector<const std::byte*> slices_, sketches_;
};

TEST(CpuScan, IntervalsHoldWhereEveryRoundingGoesOneWay) { OneWaySlice(0x1p18F).Check(); }

// Beside 1 an exponential that is within half a unit in the last place says nothing of a logit of
// 2^-24: its own error is all that the bound has to cover.
TEST(CpuScan, IntervalsHoldWhereTheExponentialRounds) { OneWaySlice(0.9F * 0x1p-24F).Check(); }

// The kernel adds little to the formula's own width: the rounding of factors to 16 bits above, and
// below, that all tokens of a page take the widest interval of the page.
TEST(CpuScan, IntervalsAreAsTightAsTheFormula) {
  const auto device = NewDeviceOrDie("reference");
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    const KvCase kv(device.get(),
                    OptionsOf(head_dim, DType::kBfloat16, Keys::kNormal, Tables::kLearnt));
    Scan scan(kv, 0, kv.queries(), /*bounded=*/true);
    OnEveryTarget([&] {
      scan.Run();
      double above = 0.0;
      double below = 0.0;
      scan.ForEachToken([&](uint32_t head, uint32_t token, const SketchPage& page,
                            const PageTerms<double>& terms) {
        const SketchLayout layout(head_dim);
        const double estimate = EstimateLogit(layout, page, token % kBlockTokens, terms);
        const double eps = LogitError(page, token % kBlockTokens, terms);
        const double eps_max = terms.eps_base + terms.eps_radius;
        const auto upper = static_cast<double>(scan.Upper(head, token));
        const auto lower = static_cast<double>(scan.Lower(head, token));
        above = std::max(above, upper - (estimate + eps));
        below = std::max(below, (estimate + eps - 2 * eps_max) - lower);
      });
      EXPECT_LE(above, 1e-2);
      EXPECT_LE(below, 1e-2);
      std::cout << "d=" << head_dim << " above " << above << " below " << below << "\n";
    });
  }
}

// Radii are decoded upwards, and hardly.
TEST(CpuScan, RadiiAreDecodedUpwards) {
  for (size_t code = 0; code < kRadiusScale.size(); ++code) {
    const float product = kRadiusOf.high[code / kRadiusParts] * kRadiusOf.low[code % kRadiusParts];
    EXPECT_GE(product, kRadiusScale[code]);
    EXPECT_LE(product, kRadiusScale[code] * (1.0F + 0x1p-19F));
  }
}

double MeanError(const SketchPage& page, const PageTerms<double>& terms) {
  double sum = 0.0;
  for (uint32_t t = 0; t < kBlockTokens; ++t) sum += LogitError(page, t, terms);
  return sum / kBlockTokens;
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
          double exact = EstimateLogit(SketchLayout(head_dim), page, token % kBlockTokens, terms);
          // With bounds an estimate lies below the upper end by the page's mean error.
          if (bounded)
            exact += LogitError(page, token % kBlockTokens, terms) - MeanError(page, terms);
          const long double ours = scan.Estimate(head, token);
          furthest = std::max(furthest, std::fabs(static_cast<double>(ours) - exact));
        });
        EXPECT_LE(furthest, bounded ? 1e-2 : 0.25) << "d=" << head_dim;
      });
    }
  }
}

// Choosing and bounds take the sums of whole pages from the scan.
void CheckPageSums(const Scan& scan) {
  const ScanWeights& weights = scan.weights();
  for (uint32_t head = 0; head < weights.head_count; ++head) {
    for (uint32_t block = 0; block < weights.block_count; ++block) {
      const float* page = weights.Page(weights.numbers(), head, block);
      double sum = 0.0;
      for (uint32_t t = 0; t < kBlockTokens; ++t) sum += static_cast<double>(page[t]);
      EXPECT_NEAR(static_cast<double>(weights.page_sum[weights.PageIndex(head, block)]), sum,
                  18 * 0x1p-24 * sum);
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
    CheckPageSums(scan);
    for (uint32_t token = 0; token < 3 * kBlockTokens; ++token) {
      const bool seen = token >= 70 && token < 150;
      const uint32_t block = token / kBlockTokens;
      const float weight =
          scan.weights().Page(scan.weights().upper, 1, block)[token % kBlockTokens];
      EXPECT_EQ(weight > 0.0F, seen) << token;
    }
  });
}

}  // namespace
}  // namespace kvservice::testing
