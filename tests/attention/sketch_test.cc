// Sketches and the scan formula: every stored inequality and every logit bound, without tolerance,
// on ordinary and on hostile keys.

#include "attention/sketch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "attention/float16.h"
#include "attention/scan_terms.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

constexpr uint64_t kAllTokens = ~uint64_t{0};

// 64-byte aligned, filled with bytes that are not zero: encoding must not depend on them.
struct Page {
  explicit Page(const SketchLayout& layout) : bytes(layout.page_bytes + 64, std::byte{0xa5}) {
    data = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
  std::vector<std::byte> bytes;
  std::byte* data;
};

TEST(SketchLayout, FieldsFollowEachOther) {
  for (const uint32_t d : {64U, 80U, 96U, 128U, 256U}) {
    const SketchLayout at(d);
    EXPECT_EQ(at.direction_count, d / 64);
    EXPECT_EQ(at.lo, 32U * d);
    EXPECT_EQ(at.page_bytes % 64, 0U);
    EXPECT_EQ(at.exact % 8, 0U);
    EXPECT_EQ(at.ps % 4, 0U);
    EXPECT_LE(at.version + 4, at.page_bytes);
    // About 15 % of bf16 keys and values.
    EXPECT_LT(static_cast<double>(at.page_bytes), 0.18 * 64 * 4 * d);
  }
}

TEST(RadiusScale, FollowsTheFormulaRoundedUp) {
  for (int code = 0; code < 256; ++code) {
    const long double exact = std::pow(1.02L, -code) * (1.0L + 1e-6L);
    EXPECT_GE(kRadiusScale[code], exact);
    EXPECT_LE(kRadiusScale[code], exact * (1.0L + 0x1p-22L));
    if (code > 0) {
      EXPECT_LT(kRadiusScale[code], kRadiusScale[code - 1]);
    }
  }
}

// lo + (code + .5) step of one channel of one token.
long double CentreOfCell(const SketchPage& page, uint32_t head_dim, uint32_t token, uint32_t c) {
  const uint8_t pair = page.codes[CodeOffset(token, c % (head_dim / 2))];
  const int code = c < head_dim / 2 ? pair & 15 : pair >> 4;
  const long double step = FloatFromFloat16(page.step[c]);
  return static_cast<long double>(page.lo[c]) + (code + 0.5L) * step;
}

// The inequalities of sketch.h in long double, with nothing of the encoder's own.
class Inequalities {
 public:
  Inequalities(const KvLayout& layout, const std::byte* rows, const SketchTable& table,
               const std::byte* bytes)
      : layout_(layout), rows_(rows), table_(table), page_(SketchLayout(layout.head_dim), bytes) {}

  void Expect() const {
    if (page_.exact == kAllTokens) return;
    for (uint32_t c = 0; c < layout_.head_dim; ++c) ExpectChannel(c);
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      if (!IsExact(token)) ExpectToken(token);
    }
  }

 private:
  bool IsExact(uint32_t token) const { return ((page_.exact >> token) & 1) != 0; }
  // Of the token's key, and behind it of its value.
  long double Number(uint32_t token, uint32_t index) const {
    return LoadElement(layout_.dtype, rows_ + token * layout_.row_bytes(), index);
  }

  void ExpectChannel(uint32_t c) const {
    long double low = std::numeric_limits<long double>::infinity();
    long double high = -low;
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      if (IsExact(token)) continue;
      low = std::min(low, Number(token, c));
      high = std::max(high, Number(token, c));
    }
    const long double step = FloatFromFloat16(page_.step[c]);
    EXPECT_EQ(static_cast<long double>(page_.lo[c]), low) << "channel " << c;
    EXPECT_GE(16.0L * step, high - low) << "channel " << c;
    EXPECT_GE(step, 0x1p-14L) << "channel " << c;
  }

  void ExpectToken(uint32_t token) const {
    const uint32_t d = layout_.head_dim;
    long double squares = 0.0L;
    long double v_squares = 0.0L;
    std::array<long double, 4> along{};
    for (uint32_t c = 0; c < d; ++c) {
      const long double e = Number(token, c) - CentreOfCell(page_, d, token, c);
      const long double step = FloatFromFloat16(page_.step[c]);
      EXPECT_LE(std::fabs(e), step / 2.0L * (1.0L + 0x1p-12L)) << token << " channel " << c;
      const long double scaled = static_cast<long double>(table_.metric[c]) * e;
      squares += scaled * scaled;
      v_squares += Number(token, d + c) * Number(token, d + c);
      for (uint32_t j = 0; j < SketchDirections(d); ++j) {
        along[j] += static_cast<long double>(table_.weights[j * d + c]) * e;
      }
    }
    ExpectNorm(std::sqrt(squares), page_.rmax, page_.r[token], token);
    ExpectNorm(std::sqrt(v_squares), page_.vmax, page_.vn[token], token);
    for (uint32_t j = 0; j < SketchDirections(d); ++j) {
      const long double step = page_.ps[j];
      const long double miss = std::fabs(along[j] - step * page_.pj[j * kBlockTokens + token]);
      EXPECT_LE(miss, step / 2.0L * (1.0L + 0x1p-13L)) << token << " direction " << j;
    }
  }

  static void ExpectNorm(long double norm, float largest, uint8_t code, uint32_t token) {
    EXPECT_GE(static_cast<long double>(largest), norm) << token;
    EXPECT_GE(static_cast<long double>(largest) * static_cast<long double>(kRadiusScale[code]),
              norm)
        << token;
  }

  const KvLayout& layout_;
  const std::byte* const rows_;
  const SketchTable& table_;
  const SketchPage page_;
};

using Parameters = std::tuple<DType, uint32_t, Keys>;

class SketchOfKeys : public ::testing::TestWithParam<Parameters> {
 protected:
  void Make(Tables tables) {
    const auto& [dtype, head_dim, keys] = GetParam();
    CaseOptions options;
    options.layout = {
        .query_head_count = 2, .kv_head_count = 1, .head_dim = head_dim, .dtype = dtype};
    options.length = 4 * kBlockTokens;
    options.keys = keys;
    options.tables = tables;
    options.seed = head_dim;
    kv_ = std::make_unique<KvCase>(device_.get(), options);
  }
  const KvLayout& layout() const { return kv_->options().layout; }
  const SketchTable& table() const { return kv_->tables()[0]; }
  const std::byte* Rows(uint32_t block) const { return kv_->Row(0, block * kBlockTokens); }

  const std::unique_ptr<Device> device_ = NewDeviceOrDie("reference");
  std::unique_ptr<KvCase> kv_;
};

TEST_P(SketchOfKeys, EveryStoredInequalityHolds) {
  for (const Tables tables : {Tables::kIdentity, Tables::kLearnt, Tables::kExtreme}) {
    Make(tables);
    const SketchLayout at(layout().head_dim);
    for (uint32_t block = 0; block < 4; ++block) {
      Page page(at);
      EncodeSketchPage(layout(), Rows(block), block, table(), page.data);
      EXPECT_TRUE(VerifySketchPage(layout(), Rows(block), table(), page.data));
      Inequalities(layout(), Rows(block), table(), page.data).Expect();
      const SketchPage decoded(at, page.data);
      EXPECT_EQ(decoded.exact & 0xff, block == 0 ? 0xffU : decoded.exact & 0xff);
      const Keys keys = std::get<2>(GetParam());
      // Only a page with a number that is not finite loses its image (float16 cannot even hold 6e4
      // more than 5504 below its end).
      if (keys != Keys::kNotFinite) {
        EXPECT_EQ(decoded.exact, block == 0 ? 0xffU : 0U);
      } else if (block == 1 || block == 2) {
        EXPECT_EQ(decoded.exact, kAllTokens);
      }
      Page again(at);
      std::fill(again.bytes.begin(), again.bytes.end(), std::byte{0x3c});
      EncodeSketchPage(layout(), Rows(block), block, table(), again.data);
      EXPECT_EQ(std::memcmp(page.data, again.data, at.page_bytes), 0) << "deterministic bytes";
    }
  }
}

// What the cells of one token miss.
std::vector<double> ResidualOf(const KvCase& kv, const SketchPage& page, uint32_t block,
                               uint32_t token) {
  const uint32_t d = kv.options().layout.head_dim;
  std::vector<double> e(d);
  for (uint32_t c = 0; c < d; ++c) {
    const double k =
        LoadElement(kv.options().layout.dtype, kv.Row(0, block * kBlockTokens + token), c);
    e[c] = static_cast<double>(k - CentreOfCell(page, d, token, c));
  }
  return e;
}

// s = scale * q.k in long double against the interval of the scan, in one arithmetic. Returns how
// many intervals said something.
template <typename Real>
int CheckIntervals(const KvCase& kv, const std::vector<float>& q, uint32_t block,
                   double* closest = nullptr) {
  const KvLayout& layout = kv.options().layout;
  const SketchLayout at(layout.head_dim);
  Page bytes(at);
  EncodeSketchPage(layout, kv.Row(0, block * kBlockTokens), block, kv.tables()[0], bytes.data);
  const SketchPage page(at, bytes.data);
  const float scale = kv.shape().scale;
  const auto query = MakeQueryTerms<Real>(layout.head_dim, scale, q.data(), kv.tables()[0]);
  const auto terms = MakePageTerms<Real>(at, page, kv.tables()[0], query);
  int informative = 0;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    if (((page.exact >> token) & 1) != 0) continue;
    const std::byte* k = kv.Row(0, block * kBlockTokens + token);
    long double exact = 0.0L;
    for (uint32_t c = 0; c < layout.head_dim; ++c) {
      exact += static_cast<long double>(q[c]) *
               static_cast<long double>(LoadElement(layout.dtype, k, c));
    }
    exact *= static_cast<long double>(scale);
    const Real estimate = EstimateLogit(at, page, token, terms);
    const Real error = LogitError(page, token, terms);
    // Not finite: the scan says nothing, which is no violation.
    if (!std::isfinite(estimate) || !std::isfinite(error)) continue;
    ++informative;
    if (closest != nullptr) {
      const long double miss = std::fabs(exact - static_cast<long double>(estimate));
      *closest = std::max(*closest, static_cast<double>(miss / static_cast<long double>(error)));
    }
    EXPECT_LE(std::fabs(exact - static_cast<long double>(estimate)), error)
        << "block " << block << " token " << token;
    EXPECT_LE(exact, static_cast<Real>(estimate + error));
    EXPECT_GE(exact, static_cast<Real>(estimate - error));
  }
  return informative;
}

// Queries that are ordinary, along a token's residual (where Cauchy-Schwarz is an equality), along
// its signs (where every cell counts in full), zero, huge and tiny.
std::vector<std::vector<float>> HostileQueries(const KvCase& kv, uint32_t block) {
  const KvLayout& layout = kv.options().layout;
  const uint32_t d = layout.head_dim;
  const SketchLayout at(d);
  Page bytes(at);
  EncodeSketchPage(layout, kv.Row(0, block * kBlockTokens), block, kv.tables()[0], bytes.data);
  const SketchPage page(at, bytes.data);
  std::vector<std::vector<float>> queries;
  queries.emplace_back(kv.queries().begin(), kv.queries().begin() + d);
  queries.emplace_back(d, 0.0F);
  for (const float size : {1e30F, 1e-30F, 1e-42F}) {
    queries.push_back(queries[0]);
    for (float& x : queries.back()) x *= size;
  }
  for (const uint32_t token : {11U, 40U}) {
    std::vector<float> along(d);
    std::vector<float> signs(d);
    std::vector<float> metric_along(d);
    const std::vector<double> e = ResidualOf(kv, page, block, token);
    for (uint32_t c = 0; c < d; ++c) {
      along[c] = static_cast<float>(10.0 * e[c]);
      signs[c] = e[c] > 0.0 ? 2.0F : -2.0F;
      const double m = kv.tables()[0].metric[c];
      metric_along[c] = static_cast<float>(e[c] * m * m);
    }
    queries.push_back(along);
    queries.push_back(signs);
    queries.push_back(metric_along);
  }
  return queries;
}

TEST_P(SketchOfKeys, EveryIntervalHoldsTheLogit) {
  for (const Tables tables : {Tables::kIdentity, Tables::kLearnt, Tables::kExtreme}) {
    Make(tables);
    for (uint32_t block = 0; block < 4; ++block) {
      const SketchPage page(SketchLayout(layout().head_dim),
                            kv_->View(4 * kBlockTokens).sketches[block]);
      if (page.exact == kAllTokens) continue;
      const auto queries = HostileQueries(*kv_, block);
      for (size_t i = 0; i < queries.size(); ++i) {
        SCOPED_TRACE(::testing::Message() << "query " << i);
        const int as_double = CheckIntervals<double>(*kv_, queries[i], block);
        const int as_float = CheckIntervals<float>(*kv_, queries[i], block);
        EXPECT_EQ(as_double, block == 0 ? 56 : 64) << "double never overflows";
        if (i < 2) {
          EXPECT_EQ(as_float, as_double);
        }
      }
    }
  }
}

std::string ParametersName(const ::testing::TestParamInfo<Parameters>& info) {
  const auto& [dtype, head_dim, keys] = info.param;
  return Name(dtype) + "_d" + std::to_string(head_dim) + "_" + Name(keys);
}

INSTANTIATE_TEST_SUITE_P(
    All, SketchOfKeys,
    ::testing::Combine(::testing::Values(DType::kBfloat16, DType::kFloat16, DType::kFloat32),
                       ::testing::Values(64U, 80U, 96U, 128U, 256U), ::testing::ValuesIn(kAllKeys)),
    ParametersName);

// One page of 64 rows in fp32 whose numbers a test sets.
struct Rows {
  Rows() : bytes(kBlockTokens * kLayout.row_bytes()) {
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      for (uint32_t c = 0; c < kLayout.head_dim; ++c) {
        K(token, c, std::sin(1.0F + static_cast<float>(token * 131 + c * 17)));
        V(token, c, std::cos(static_cast<float>(token * 7 + c * 3)));
      }
    }
  }
  void K(uint32_t token, uint32_t c, float x) { Set(token, c, x); }
  void V(uint32_t token, uint32_t c, float x) { Set(token, c + kLayout.head_dim, x); }
  double Key(uint32_t token, uint32_t c) const {
    return LoadElement(kLayout.dtype, bytes.data() + token * kLayout.row_bytes(), c);
  }
  void Set(uint32_t token, uint32_t index, float x) {
    StoreElement(kLayout.dtype, x, bytes.data() + token * kLayout.row_bytes(), index);
  }
  uint64_t ExactMask(uint32_t block) const {
    const SketchLayout at(kLayout.head_dim);
    Page page(at);
    const SketchTable table = IdentitySketchTable(kLayout.head_dim);
    EncodeSketchPage(kLayout, bytes.data(), block, table, page.data);
    EXPECT_TRUE(VerifySketchPage(kLayout, bytes.data(), table, page.data));
    const uint64_t exact = SketchPage(at, page.data).exact;
    if (exact == kAllTokens) {
      // Everything but the mask and the version is zero.
      const auto set_bytes = std::count_if(page.data, page.data + at.page_bytes,
                                           [](std::byte b) { return b != std::byte{0}; });
      EXPECT_EQ(set_bytes, 8 + 1);
    }
    return exact;
  }

  static constexpr KvLayout kLayout{
      .query_head_count = 1, .kv_head_count = 1, .head_dim = 64, .dtype = DType::kFloat32};
  std::vector<std::byte> bytes;
};

TEST(SketchEncode, SinksAreExactInTheFirstSliceOnly) {
  const Rows rows;
  EXPECT_EQ(rows.ExactMask(0), 0xffU);
  EXPECT_EQ(rows.ExactMask(1), 0U);
}

TEST(SketchEncode, SinksDoNotStretchTheRange) {
  Rows rows;
  rows.K(3, 5, 1e30F);
  EXPECT_EQ(rows.ExactMask(0), 0xffU);
  EXPECT_EQ(rows.ExactMask(1), kAllTokens);
}

TEST(SketchEncode, WhatCannotBeSketchedIsExact) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {inf, -inf, std::numeric_limits<float>::quiet_NaN()}) {
    Rows rows;
    rows.K(20, 63, bad);
    EXPECT_EQ(rows.ExactMask(1), kAllTokens);
    Rows value_rows;
    value_rows.V(20, 63, bad);
    EXPECT_EQ(value_rows.ExactMask(1), kAllTokens);
  }
  Rows overflow;
  overflow.K(20, 1, 65504.0F * 16.0F);
  EXPECT_EQ(overflow.ExactMask(1), kAllTokens) << "a step beyond binary16";
  Rows wide;
  wide.K(20, 1, 65504.0F * 15.9F);
  EXPECT_EQ(wide.ExactMask(1), 0U) << "the largest step";
  Rows values;
  for (uint32_t c = 0; c < 64; ++c) values.V(20, c, 3e38F);
  EXPECT_EQ(values.ExactMask(1), kAllTokens) << "a value norm beyond binary32";
  Rows level;
  for (uint32_t token = 0; token < kBlockTokens; ++token) level.K(token, 7, 3e38F);
  EXPECT_EQ(level.ExactMask(1), 0U) << "large but constant";
  // A page with a number that is not finite has no image, be the number a sink's.
  for (const float bad : {inf, std::numeric_limits<float>::quiet_NaN()}) {
    Rows sink;
    sink.K(3, 5, bad);
    EXPECT_EQ(sink.ExactMask(0), kAllTokens);
    Rows sink_value;
    sink_value.V(3, 5, bad);
    EXPECT_EQ(sink_value.ExactMask(0), kAllTokens);
  }
}

// Encodes rows as no first slice and looks at what is stored; returns the page's bytes.
Page EncodeAndLook(const Rows& rows, const SketchTable& table) {
  Page page(SketchLayout(64));
  EncodeSketchPage(Rows::kLayout, rows.bytes.data(), 1, table, page.data);
  EXPECT_EQ(SketchPage(SketchLayout(64), page.data).exact, 0U);
  Inequalities(Rows::kLayout, rows.bytes.data(), table, page.data).Expect();
  return page;
}

// The range of a channel, with the margin that steps have, lies so little above the middle between
// two steps that as a float it lies on it, and rounds to even: down.
TEST(SketchEncode, StepsReachTheLargestKey) {
  Rows rows;
  for (uint32_t token = 0; token < kBlockTokens; ++token) rows.K(token, 7, 1.0F);
  rows.K(20, 7, 16.0F);
  rows.K(21, 7, -0x1p-22F);
  EncodeAndLook(rows, IdentitySketchTable(64));
}

// A residual so little longer than a radius that only a margin tells: its radius is the next one.
TEST(SketchEncode, RadiiCoverWhatIsBarelyLonger) {
  // Two channels matter: in 5 cells have a length of about one, in 6 of 2^-14, the least.
  Rows rows;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    for (uint32_t c = 0; c < 64; ++c) rows.K(token, c, 0.0F);
  }
  rows.K(21, 5, 15.9F);
  const SketchTable table = IdentitySketchTable(64);
  const Page first = EncodeAndLook(rows, table);
  const SketchPage cells(SketchLayout(64), first.data);
  const long double radius = static_cast<long double>(cells.rmax) * kRadiusScale[1];
  const long double norm = radius * (1.0L + 0.5e-9L);
  const long double half = FloatFromFloat16(cells.step[5]) / 2.0L;
  // The other channels' residuals are -2^-15 each.
  const auto coarse = static_cast<float>(half - std::sqrt(norm * norm - 63.0L * 0x1p-30L));
  const float k = std::nextafter(coarse, 0.0F);
  const long double rest = (half - k) * (half - k) + 62.0L * 0x1p-30L;
  const auto fine = static_cast<float>(0x1p-15L - std::sqrt(norm * norm - rest));
  rows.K(20, 5, k);
  rows.K(20, 6, fine);
  const long double e = 0x1p-15L - static_cast<long double>(fine);
  const long double reached = std::sqrt(rest + e * e);
  ASSERT_GT(reached, radius);
  ASSERT_LT(reached, radius * (1.0L + 1e-9L)) << "no longer hostile";
  const Page page = EncodeAndLook(rows, table);
  EXPECT_EQ(SketchPage(SketchLayout(64), page.data).rmax, cells.rmax);
}

// The rounding of a projection is bounded in steps, so a page whose residuals have nothing along
// the direction needs a step all the same.
TEST(SketchEncode, WhatHasNothingAlongADirectionHasAnImage) {
  Rows rows;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    for (uint32_t c = 0; c < 64; ++c) rows.K(token, c, 1.0F);
  }
  SketchTable table = IdentitySketchTable(64);
  for (uint32_t c = 0; c < 64; ++c) table.directions[c] = c % 2 == 0 ? 0.125F : -0.125F;
  ASSERT_TRUE(NormalizeSketchTable(64, &table).ok());
  EncodeAndLook(rows, table);
}

// Bytes that break an inequality are noticed: the scrub relies on it.
TEST(SketchVerify, NoticesBrokenInequalities) {
  const Rows rows;
  const SketchLayout at(64);
  SketchTable table = IdentitySketchTable(64);
  for (float& u : table.directions) u = 0.1F;
  ASSERT_TRUE(NormalizeSketchTable(64, &table).ok());
  Page good(at);
  EncodeSketchPage(Rows::kLayout, rows.bytes.data(), 1, table, good.data);
  ASSERT_TRUE(VerifySketchPage(Rows::kLayout, rows.bytes.data(), table, good.data));
  const auto expect_noticed = [&](const char* what, auto break_it) {
    Page page(at);
    std::memcpy(page.data, good.data, at.page_bytes);
    break_it(page.data);
    EXPECT_FALSE(VerifySketchPage(Rows::kLayout, rows.bytes.data(), table, page.data)) << what;
  };
  const auto set_float = [](std::byte* to, float x) { std::memcpy(to, &x, sizeof(x)); };
  const auto get_float = [](const std::byte* from) {
    float x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  };
  const SketchPage decoded(at, good.data);
  for (uint32_t token = 0; token < kBlockTokens; token += 9) {
    expect_noticed("r", [&](std::byte* p) { p[at.r + token] = std::byte(decoded.r[token] + 1); });
    expect_noticed("vn",
                   [&](std::byte* p) { p[at.vn + token] = std::byte(decoded.vn[token] + 1); });
    expect_noticed("pj", [&](std::byte* p) {
      p[at.pj + token] = std::byte(decoded.pj[token] + (decoded.pj[token] > 0 ? -2 : 2));
    });
    expect_noticed("code", [&](std::byte* p) { p[CodeOffset(token, 3)] ^= std::byte{0x01}; });
    expect_noticed("high code", [&](std::byte* p) { p[CodeOffset(token, 3)] ^= std::byte{0x10}; });
  }
  expect_noticed("lo",
                 [&](std::byte* p) { set_float(p + at.lo, std::nextafter(decoded.lo[0], 1e9F)); });
  expect_noticed("step", [&](std::byte* p) { p[at.step + 1] ^= std::byte{0x04}; });
  expect_noticed("rmax", [&](std::byte* p) { set_float(p + at.norms, decoded.rmax * 0.99F); });
  expect_noticed("rmax inf", [&](std::byte* p) { set_float(p + at.norms, INFINITY); });
  expect_noticed("hn NaN", [&](std::byte* p) { set_float(p + at.norms + 4, NAN); });
  expect_noticed("vmax", [&](std::byte* p) { set_float(p + at.norms + 8, decoded.vmax * 0.99F); });
  expect_noticed("ps", [&](std::byte* p) { set_float(p + at.ps, get_float(p + at.ps) * 0.98F); });
  expect_noticed("version", [&](std::byte* p) { p[at.version] = std::byte{2}; });
}

// A radius may be wider than it has to be, and A counts on every channel's own cell: the code of
// the next cell is noticed where nothing else is wrong, and it had better be.
TEST(SketchVerify, NoticesTheCodeOfAnotherCell) {
  const Rows rows;
  const SketchLayout at(64);
  const SketchTable table = IdentitySketchTable(64);
  Page page = EncodeAndLook(rows, table);
  const float wide = 1.25F * SketchPage(at, page.data).rmax;
  std::memcpy(page.data + at.norms, &wide, sizeof(wide));
  ASSERT_TRUE(VerifySketchPage(Rows::kLayout, rows.bytes.data(), table, page.data));
  // All of the query in the channel of the code: most of its interval is A.
  std::vector<float> q(64, 0.0F);
  q[3] = 1.0F;
  const auto query = MakeQueryTerms<double>(64, 1.0F, q.data(), table);
  int covered = 0;
  double furthest = 0.0;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    page.data[CodeOffset(token, 3)] ^= std::byte{0x01};
    EXPECT_FALSE(VerifySketchPage(Rows::kLayout, rows.bytes.data(), table, page.data)) << token;
    const SketchPage decoded(at, page.data);
    long double squares = 0.0L;
    for (uint32_t c = 0; c < 64; ++c) {
      const long double e = rows.Key(token, c) - CentreOfCell(decoded, 64, token, c);
      squares += e * e;
    }
    if (std::sqrt(squares) < static_cast<long double>(wide * kRadiusScale[decoded.r[token]])) {
      ++covered;
      const auto terms = MakePageTerms(at, decoded, table, query);
      const double miss = std::fabs(rows.Key(token, 3) - EstimateLogit(at, decoded, token, terms));
      furthest = std::max(furthest, miss / LogitError(decoded, token, terms));
    }
    page.data[CodeOffset(token, 3)] ^= std::byte{0x01};
  }
  EXPECT_GT(covered, 0) << "no longer hostile";
  EXPECT_GT(furthest, 1.0) << "intervals would hold all the same";
}

// The rounding of a projection counts in full: queries that meet a token's residual along p and its
// rounding along the direction, both with the sign that hurts. Some of them must come close to the
// bound.
TEST(SketchScan, ProjectionRoundingCounts) {
  const auto device = NewDeviceOrDie("reference");
  CaseOptions options;
  options.layout = {
      .query_head_count = 1, .kv_head_count = 1, .head_dim = 64, .dtype = DType::kFloat32};
  options.length = 2 * kBlockTokens;
  options.tables = Tables::kDirections;
  const KvCase kv(device.get(), options);
  const SketchTable& table = kv.tables()[0];
  const SketchLayout at(64);
  const SketchPage page(at, kv.View(options.length).sketches[1]);
  double closest = 0.0;
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    const std::vector<double> e = ResidualOf(kv, page, 1, token);
    double along = 0.0;
    double norm = 0.0;
    for (uint32_t c = 0; c < 64; ++c) {
      along += e[c] * static_cast<double>(table.weights[c]);
      norm += e[c] * e[c];
    }
    const double missed = along - static_cast<double>(page.ps[0]) * page.pj[token];
    const double size = std::copysign(1000.0 * std::sqrt(norm), missed);
    std::vector<float> q(64);
    for (uint32_t c = 0; c < 64; ++c) {
      const double u = table.directions[c];
      q[c] = static_cast<float>(e[c] - along * u + size * u);
    }
    EXPECT_EQ(CheckIntervals<double>(kv, q, 1, &closest), 64);
    EXPECT_EQ(CheckIntervals<float>(kv, q, 1), 64);
  }
  EXPECT_GT(closest, 0.95) << "largest error over its bound";
  EXPECT_LT(closest, 1.0);
}

// A stored projection may miss a little more than half a step (kProjectionMargin): only where its
// code is at the end of its range. Such a page is right, and its intervals hold because of
// kScanMargin.
TEST(SketchScan, MarginsCoverWhatAProjectionMayMiss) {
  const Rows rows;
  const SketchLayout at(64);
  SketchTable table = IdentitySketchTable(64);
  for (float& u : table.directions) u = 0.125F;
  ASSERT_TRUE(NormalizeSketchTable(64, &table).ok());
  Page bytes(at);
  EncodeSketchPage(Rows::kLayout, rows.bytes.data(), 1, table, bytes.data);
  const SketchPage page(at, bytes.data);
  std::vector<double> projections(kBlockTokens);
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    for (uint32_t c = 0; c < 64; ++c) {
      projections[token] +=
          static_cast<double>(rows.Key(token, c) - CentreOfCell(page, 64, token, c)) * 0.125;
    }
  }
  const auto widest =
      std::max_element(projections.begin(), projections.end(),
                       [](double a, double b) { return std::fabs(a) < std::fabs(b); });
  const auto step = static_cast<float>(std::fabs(*widest) / (127.5 + 0.45 * 0x1p-13));
  std::memcpy(bytes.data + at.ps, &step, sizeof(step));
  for (uint32_t token = 0; token < kBlockTokens; ++token) {
    const double code = std::rint(projections[token] / static_cast<double>(step));
    bytes.data[at.pj + token] =
        static_cast<std::byte>(static_cast<int8_t>(std::clamp(code, -127.0, 127.0)));
  }
  ASSERT_TRUE(VerifySketchPage(Rows::kLayout, rows.bytes.data(), table, bytes.data));

  const std::vector<float> q(64, 125.0F);
  const auto query = MakeQueryTerms<double>(64, 1.0F, q.data(), table);
  const auto terms = MakePageTerms(at, page, table, query);
  const auto token = static_cast<uint32_t>(widest - projections.begin());
  double logit = 0.0;
  for (uint32_t c = 0; c < 64; ++c) logit += 125.0 * rows.Key(token, c);
  const double miss = std::fabs(logit - EstimateLogit(at, page, token, terms));
  EXPECT_LE(miss, LogitError(page, token, terms));
  EXPECT_GT(miss, LogitError(page, token, terms) / (1.0 + 0x1p-12)) << "no longer hostile";
}

// Bounds that always said "anything" would pass every other test.
TEST(SketchScan, IntervalsAreTight) {
  const auto device = NewDeviceOrDie("reference");
  CaseOptions options;
  options.layout.head_dim = 128;
  options.length = 32 * kBlockTokens;
  options.tables = Tables::kLearnt;
  const KvCase kv(device.get(), options);
  const SketchLayout at(128);
  const auto query =
      MakeQueryTerms<double>(128, kv.shape().scale, kv.queries().data(), kv.tables()[0]);
  std::vector<double> errors;
  for (const std::byte* sketch : kv.View(options.length).sketches) {
    const SketchPage page(at, sketch);
    const auto terms = MakePageTerms(at, page, kv.tables()[0], query);
    for (uint32_t token = 0; token < kBlockTokens; ++token) {
      errors.push_back(LogitError(page, token, terms));
    }
  }
  std::sort(errors.begin(), errors.end());
  RecordProperty("eps_median_nats", std::to_string(errors[errors.size() / 2]));
  EXPECT_LT(errors[errors.size() / 2], 0.8);
  EXPECT_LT(errors[errors.size() * 99 / 100], 1.2);
}

TEST(Softcap, RoundsOutward) {
  for (const float cap : {30.0F, 50.0F, 1.0F}) {
    for (double s = -400.0; s < 400.0; s += 0.37) {
      const long double exact =
          static_cast<long double>(cap) *
          std::tanh(static_cast<long double>(s) / static_cast<long double>(cap));
      EXPECT_GT(SoftcapUp(cap, s), exact);
      EXPECT_LT(SoftcapDown(cap, s), exact);
      EXPECT_NEAR(Softcap(cap, s), static_cast<double>(exact), 1e-13);
    }
    const double inf = std::numeric_limits<double>::infinity();
    EXPECT_GE(SoftcapUp(cap, inf), static_cast<double>(cap));
    EXPECT_LE(SoftcapDown(cap, -inf), -static_cast<double>(cap));
  }
  EXPECT_EQ(SoftcapUp(0.0F, 3.5), 3.5);
  EXPECT_EQ(SoftcapDown(0.0F, 3.5), 3.5);
}

}  // namespace
}  // namespace kvservice::testing
