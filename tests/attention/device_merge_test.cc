// Shards of one sequence, answered apart and merged: outputs by lse, certificates by Merge, output
// errors by MergedOutputError. Whatever the split, the merged statements must hold for the whole
// sequence, judged in long double.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/output_error.h"
#include "attention/partial.h"
#include "tests/attention/kv_case.h"
#include "tests/attention/oracle.h"
#include "tests/attention/plan_check.h"

namespace kvservice::testing {
namespace {

// One head's answers, merged.
struct Merged {
  std::vector<double> out;
  double lse = kLogZero;
  HeadCertificate certificate;
  double output_error = 0.0;
};

class DeviceMerge : public ::testing::TestWithParam<std::string> {
 protected:
  DeviceMerge() : device_(NewDeviceOrDie(GetParam())) {}

  // A call on blocks [first, last) of the case, as if they were a sequence of their own. Positions
  // that it selects count from the first block.
  std::unique_ptr<Call> AnswerShard(const KvCase& kv, uint32_t first, uint32_t last,
                                    const Plan& plan, std::mt19937_64* random) {
    const uint32_t end = std::min(last * kBlockTokens, kv.options().length);
    auto call = std::make_unique<Call>(kv, end, 1, kv.queries(), plan);
    call->row.view.slices.remove_prefix(first);
    call->row.view.sketches.remove_prefix(first);
    call->row.view.length = end - first * kBlockTokens;
    call->row.position = call->row.view.length - 1;
    call->row.plan.local_begin = call->row.position - std::min(call->row.position, 20U);
    for (std::byte& byte : call->row.draw_key) byte = static_cast<std::byte>((*random)());
    call->Run(device_.get(), kv.shape());
    EXPECT_TRUE(call->row.status.ok()) << call->row.status;
    return call;
  }

  static Merged Merge(const std::vector<std::unique_ptr<Call>>& shards, size_t head,
                      uint32_t head_dim) {
    Merged merged;
    merged.out.assign(head_dim, 0.0);
    for (size_t i = 0; i < shards.size(); ++i) {
      const HeadCertificate& of_shard = shards[i]->certificates[head];
      merged.certificate = i == 0 ? of_shard : kvservice::Merge(merged.certificate, of_shard);
      const std::vector<double> out(&shards[i]->out[head * head_dim],
                                    &shards[i]->out[head * head_dim] + head_dim);
      MergePartial(merged.out.data(), &merged.lse, out.data(),
                   static_cast<double>(shards[i]->lse[head]), head_dim);
    }
    std::vector<OutputPart> parts;
    for (const auto& shard : shards) {
      double squares = 0.0;
      for (uint32_t c = 0; c < head_dim; ++c) {
        const double miss = static_cast<double>(shard->out[head * head_dim + c]) - merged.out[c];
        squares += miss * miss;
      }
      const double distance = std::sqrt(squares) * (1.0 + 0x1p-40) + 0x1p-40;
      parts.push_back(
          OutputPartOf(shard->certificates[head], static_cast<double>(shard->lse[head]), distance));
    }
    merged.output_error = MergedOutputError(parts);
    return merged;
  }

  // What the shards selected, as positions of the whole.
  static std::vector<uint32_t> SelectedOf(const std::vector<std::unique_ptr<Call>>& shards,
                                          const std::vector<uint32_t>& begins, uint32_t kv_head) {
    std::vector<uint32_t> selected;
    for (size_t i = 0; i < shards.size(); ++i) {
      for (const uint32_t token : shards[i]->selected[kv_head]) {
        selected.push_back(begins[i] * kBlockTokens + token);
      }
    }
    return selected;
  }

  // The merge itself is in double, of outputs that came as floats.
  static constexpr double kMergeRoundoff = 0x1p-40;

  static void Judge(const Oracle& oracle, uint32_t head, const std::vector<uint32_t>& selected,
                    const std::vector<uint32_t>& everything, const Merged& merged) {
    const Truth truth = oracle.Judge(head, selected);
    const HeadCertificate& c = merged.certificate;
    EXPECT_GE(c.dropped_mass_upper.value, truth.share);
    EXPECT_LE(c.dropped_mass_lower.value, truth.share);
    EXPECT_GE(c.log_dropped_upper.value, truth.log_dropped);
    EXPECT_GE(c.log_kept_upper.value, truth.log_kept);
    EXPECT_LE(c.log_kept_lower.value, truth.log_kept);
    const std::vector<long double> dense = oracle.Output(head, oracle.Judge(head, everything));
    long double squares = 0.0L;
    long double norm = 0.0L;
    for (size_t i = 0; i < dense.size(); ++i) {
      const long double miss = dense[i] - static_cast<long double>(merged.out[i]);
      squares += miss * miss;
      norm += dense[i] * dense[i];
    }
    EXPECT_GE(merged.output_error + kMergeRoundoff * static_cast<double>(std::sqrt(norm)),
              std::sqrt(squares));
  }

  std::unique_ptr<Device> device_;
};

TEST_P(DeviceMerge, AnySplitIsValid) {
  std::mt19937_64 random(11);
  constexpr int kSplits = 60;
  uint32_t finite_errors = 0;
  uint32_t statements = 0;
  for (int split = 0; split < kSplits; ++split) {
    CaseOptions options;
    options.layout = {
        .query_head_count = 4, .kv_head_count = 2, .head_dim = 64, .dtype = DType::kBfloat16};
    options.length = 300 + static_cast<uint32_t>(random() % 400);
    options.tables = split % 2 == 0 ? Tables::kLearnt : Tables::kIdentity;
    options.seed = random();
    const KvCase kv(device_.get(), options);
    std::vector<uint32_t> begins = {0};
    const uint32_t blocks = BlockCount(options.length);
    while (begins.back() < blocks) {
      begins.push_back(begins.back() + 1 + static_cast<uint32_t>(random() % blocks));
    }
    begins.back() = blocks;
    std::vector<std::unique_ptr<Call>> shards;
    for (size_t i = 0; i + 1 < begins.size(); ++i) {
      Plan plan = BasePlan(Source::kScan, options.length, 20);
      plan.keep.top_k = 20 + static_cast<uint32_t>(random() % 100);
      plan.prove = random() % 2 == 0 ? Guarantee::kConfidence : Guarantee::kDeterministic;
      if (random() % 2 == 0) plan.max_output_error = 0.2F;
      if (random() % 4 == 0) plan.source = Source::kAll;
      shards.push_back(AnswerShard(kv, begins[i], begins[i + 1], plan, &random));
    }
    std::vector<uint32_t> everything(options.length);
    for (uint32_t token = 0; token < options.length; ++token) everything[token] = token;
    const Call whole(kv, options.length, 1, kv.queries(), Plan());
    const Oracle oracle(kv, whole.row);
    for (uint32_t head = 0; head < oracle.head_count(); ++head) {
      SCOPED_TRACE(::testing::Message() << "split " << split << " head " << head);
      const Merged merged = Merge(shards, head, options.layout.head_dim);
      Judge(oracle, head, SelectedOf(shards, begins, oracle.KvHead(head)), everything, merged);
      finite_errors += std::isfinite(merged.output_error) ? 1 : 0;
      ++statements;
      double failure = 0.0;
      for (const auto& shard : shards) failure += shard->certificates[head].failure_probability;
      EXPECT_GE(merged.certificate.failure_probability, failure * (1.0 - 0x1p-50));
      EXPECT_LE(merged.certificate.failure_probability, failure * (1.0 + 0x1p-48));
    }
  }
  EXPECT_EQ(finite_errors, statements) << "bounds that say nothing hold always";
}

INSTANTIATE_TEST_SUITE_P(All, DeviceMerge, ::testing::ValuesIn(DeviceNames()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace kvservice::testing
