// The attention kernel on every target against long double: outputs within a tolerance, masses
// within their bounds without one. The device's conformance suite runs the best target only.

#include "attention/cpu/attend_kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "attention/cpu/token_mask.h"
#include "attention/float16.h"
#include "tests/attention/cpu_targets.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

struct Truth {
  long double lse = -std::numeric_limits<long double>::infinity();
  std::vector<long double> out;
};

// One KV head of a case and a random set of its tokens.
class Subset {
 public:
  Subset(const KvCase& kv, uint32_t keep_one_in, uint64_t seed)
      : kv_(kv), view_(kv.View(kv.options().length)) {
    const LayerShape& shape = kv.shape();
    const uint32_t head_dim = shape.layout.head_dim;
    heads_.head_count = shape.layout.group_size();
    std::mt19937_64 random(seed);
    for (uint32_t head = 0; head < heads_.head_count; ++head) {
      double squares = 0.0;
      for (uint32_t c = 0; c < head_dim; ++c) {
        const float q = kv.queries()[size_t{head} * head_dim + c];
        heads_.qs.push_back(shape.scale * q);
        const double exact = static_cast<double>(shape.scale) * static_cast<double>(q);
        squares += exact * exact;
      }
      heads_.norm.push_back(std::sqrt(squares) * (1.0 + 1e-6) + 1e-30);
      heads_.visible_begin.push_back(head % 3 == 2 ? 40 : 0);
      heads_.visible_end.push_back(view_.length - head % 5);
    }
    tokens_.assign(BlockCount(view_.length), 0);
    for (uint32_t token = 0; token < view_.length; ++token) {
      if (random() % keep_one_in != 0) continue;
      tokens_[token / kBlockTokens] |= uint64_t{1} << (token % kBlockTokens);
    }
  }

  AttendTask Task(bool bound_masses) const {
    AttendTask task;
    task.shape = &kv_.shape();
    task.view = &view_;
    task.queries = &heads_;
    task.tokens = tokens_;
    task.bound_masses = bound_masses;
    return task;
  }

  Truth Judge(uint32_t head) const {
    const LayerShape& shape = kv_.shape();
    const uint32_t head_dim = shape.layout.head_dim;
    std::vector<long double> logits;
    std::vector<uint32_t> seen;
    Truth truth;
    truth.out.assign(head_dim, 0.0L);
    long double top = -std::numeric_limits<long double>::infinity();
    for (const uint32_t token : PositionsOf(tokens_, 0)) {
      if (token < heads_.visible_begin[head] || token >= heads_.visible_end[head]) continue;
      long double sum = 0.0L;
      for (uint32_t c = 0; c < head_dim; ++c) {
        sum += static_cast<long double>(kv_.queries()[size_t{head} * head_dim + c]) *
               static_cast<long double>(LoadElement(shape.layout.dtype, kv_.Row(0, token), c));
      }
      sum *= static_cast<long double>(shape.scale);
      const auto cap = static_cast<long double>(shape.logit_softcap);
      if (cap > 0.0L) sum = cap * std::tanh(sum / cap);
      logits.push_back(sum);
      seen.push_back(token);
      top = std::max(top, sum);
    }
    if (seen.empty()) return truth;
    long double total = 0.0L;
    for (size_t i = 0; i < seen.size(); ++i) {
      const long double weight = std::exp(logits[i] - top);
      total += weight;
      const std::byte* v = kv_.Row(0, seen[i]) + shape.layout.vector_bytes();
      for (uint32_t c = 0; c < head_dim; ++c) {
        truth.out[c] += weight * static_cast<long double>(LoadElement(shape.layout.dtype, v, c));
      }
    }
    for (long double& x : truth.out) x /= total;
    truth.lse = top + std::log(total);
    return truth;
  }

  const HeadQueries& heads() const { return heads_; }

 private:
  const KvCase& kv_;
  const KvView view_;
  HeadQueries heads_;
  TokenMask tokens_;
};

void CheckPartial(const Truth& truth, const Partial& partial, uint32_t head, bool judge_output) {
  SCOPED_TRACE(::testing::Message() << "head " << head);
  EXPECT_LE(partial.lower[head].value, truth.lse);
  EXPECT_GE(partial.upper[head].value, truth.lse);
  if (!judge_output) return;
  if (std::isinf(truth.lse)) {
    EXPECT_EQ(partial.lse[head], kLogZero);
    return;
  }
  EXPECT_NEAR(partial.lse[head], static_cast<double>(truth.lse), 1e-5);
  double error = 0.0;
  double norm = 0.0;
  for (size_t c = 0; c < truth.out.size(); ++c) {
    const auto expected = static_cast<double>(truth.out[c]);
    const double miss = partial.out[head * truth.out.size() + c] - expected;
    error += miss * miss;
    norm += expected * expected;
  }
  EXPECT_LE(error, 1e-10 * norm);
}

CaseOptions OptionsOf(uint32_t head_dim, DType dtype, uint32_t group, Keys keys) {
  CaseOptions options;
  options.layout = {
      .query_head_count = group, .kv_head_count = 1, .head_dim = head_dim, .dtype = dtype};
  options.length = 270;
  options.keys = keys;
  options.seed = head_dim + group;
  return options;
}

TEST(CpuAttend, EveryShapeMatchesLongDouble) {
  const auto device = NewDeviceOrDie("reference");
  AttendScratch scratch;
  Partial partial;
  for (const uint32_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBfloat16}) {
      for (const uint32_t group : {1U, 2U, 3U, 4U, 5U, 8U, 16U}) {
        const KvCase kv(device.get(), OptionsOf(head_dim, dtype, group, Keys::kNormal));
        const Subset subset(kv, 1 + group % 3, group);
        std::vector<Truth> truths;
        for (uint32_t head = 0; head < group; ++head) truths.push_back(subset.Judge(head));
        OnEveryTarget([&] {
          for (const bool bound_masses : {false, true}) {
            AttendTokens(subset.Task(bound_masses), &scratch, &partial);
            for (uint32_t head = 0; head < group; ++head) {
              CheckPartial(truths[head], partial, head, /*judge_output=*/true);
              if (!bound_masses) continue;
              EXPECT_LT(partial.upper[head].value - partial.lower[head].value, 2e-3)
                  << "bounds say something";
            }
          }
        });
      }
    }
  }
}

TEST(CpuAttend, BoundsHoldForHostileKeys) {
  const auto device = NewDeviceOrDie("reference");
  AttendScratch scratch;
  Partial partial;
  for (const Keys keys : kAllKeys) {
    if (keys == Keys::kNotFinite) continue;
    for (const uint32_t head_dim : {64U, 80U, 256U}) {
      for (const float softcap : {0.0F, 30.0F}) {
        KvCase kv(device.get(), OptionsOf(head_dim, DType::kFloat32, 5, keys));
        kv.mutable_shape()->logit_softcap = softcap;
        const Subset subset(kv, 2, head_dim);
        std::vector<Truth> truths;
        for (uint32_t head = 0; head < 5; ++head) truths.push_back(subset.Judge(head));
        OnEveryTarget([&] {
          AttendTokens(subset.Task(/*bound_masses=*/true), &scratch, &partial);
          for (uint32_t head = 0; head < 5; ++head) {
            SCOPED_TRACE(Name(keys));
            CheckPartial(truths[head], partial, head, /*judge_output=*/false);
          }
        });
      }
    }
  }
}

// One key whose logit is rounded the same way at every addition: after the products of the channels
// that begin the lanes' sums, each of the others is just below half of what a sum is rounded to, so
// that one after the other is lost.
void CheckKeyThatLosesProducts(float sign) {
  constexpr uint32_t kDim = 256;
  constexpr uint32_t kFirst = 32;  // two per lane, where there are most
  LayerShape shape;
  shape.layout = {
      .query_head_count = 1, .kv_head_count = 1, .head_dim = kDim, .dtype = DType::kFloat32};
  shape.scale = 1.0F;
  std::vector<std::byte> memory(shape.layout.slice_bytes() + 64);
  std::byte* slice = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  HeadQueries heads;
  heads.head_count = 1;
  long double logit = 0.0L;
  double squares = 0.0;
  for (uint32_t c = 0; c < kDim; ++c) {
    const float k = c < kFirst ? 8.0F : 0x1p-9F;
    // 80 twice is 160, beside which 2^-17 is half of the last place.
    const float q = c < kFirst ? 10.0F : sign * 0.98F * 0x1p-8F;
    StoreElement(DType::kFloat32, k, slice + shape.layout.RowOffset(0, 0), c);
    heads.qs.push_back(q);
    logit += static_cast<long double>(q) * static_cast<long double>(k);
    squares += static_cast<double>(q) * static_cast<double>(q);
  }
  heads.norm.push_back(std::sqrt(squares) * (1.0 + 1e-6));
  heads.visible_begin.push_back(0);
  heads.visible_end.push_back(1);
  const std::vector<const std::byte*> slices = {slice};
  const std::vector<const std::byte*> sketches = {nullptr};
  const KvView view{.slices = slices, .sketches = sketches, .length = 1};
  const TokenMask tokens = {1};
  AttendTask task;
  task.shape = &shape;
  task.view = &view;
  task.queries = &heads;
  task.tokens = tokens;
  task.bound_masses = true;
  AttendScratch scratch;
  Partial partial;
  OnEveryTarget([&] {
    AttendTokens(task, &scratch, &partial);
    EXPECT_LE(partial.lower[0].value, logit);
    EXPECT_GE(partial.upper[0].value, logit);
    EXPECT_LT(partial.upper[0].value - partial.lower[0].value, 0.05) << "bounds say something";
  });
}

TEST(CpuAttend, BoundsHoldWhereEveryRoundingGoesOneWay) {
  CheckKeyThatLosesProducts(1.0F);
  CheckKeyThatLosesProducts(-1.0F);
}

// The parts of a set merge into the whole, in output and bounds.
TEST(CpuAttend, PartsMerge) {
  const auto device = NewDeviceOrDie("reference");
  const KvCase kv(device.get(), OptionsOf(128, DType::kBfloat16, 4, Keys::kNormal));
  const Subset subset(kv, 1, 1);
  AttendScratch scratch;
  Partial total;
  total.Resize(4, 128);
  Partial part;
  const AttendTask whole = subset.Task(/*bound_masses=*/true);
  for (uint32_t block = 0; block < whole.tokens.size(); ++block) {
    AttendTask task = whole;
    task.tokens = whole.tokens.subspan(block, 1);
    task.block_begin = block;
    AttendTokens(task, &scratch, &part);
    MergePartials(128, part, &total);
  }
  for (uint32_t head = 0; head < 4; ++head) {
    CheckPartial(subset.Judge(head), total, head, /*judge_output=*/true);
  }
}

TEST(CpuAttend, NothingToReadIsAnEmptyPartial) {
  const auto device = NewDeviceOrDie("reference");
  const KvCase kv(device.get(), OptionsOf(64, DType::kBfloat16, 3, Keys::kNormal));
  AttendScratch scratch;
  Partial partial;
  const Subset subset(kv, 1, 1);
  AttendTask task = subset.Task(/*bound_masses=*/true);
  task.tokens = {};
  AttendTokens(task, &scratch, &partial);
  for (uint32_t head = 0; head < 3; ++head) {
    EXPECT_EQ(partial.lse[head], kLogZero);
    EXPECT_EQ(partial.lower[head].value, kLogZero);
    EXPECT_EQ(partial.upper[head].value, kLogZero);
    EXPECT_EQ(partial.out[size_t{head} * 64], 0.0);
  }
}

}  // namespace
}  // namespace kvservice::testing
