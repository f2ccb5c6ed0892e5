// The closed loop on a tiny model: the dense contender is the model itself, what is counted is what
// formulas say, and the methods order as they must.

#include "tests/eval/closed_loop.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "attention/sketch.h"
#include "selector/baselines/baselines.h"
#include "tests/eval/quality_study.h"
#include "tests/eval/tiny_study.h"

namespace kvservice::eval {
namespace {

constexpr uint32_t kSteps = 20;
constexpr uint32_t kTopK = 40;
constexpr uint32_t kHeadSteps = kSteps * kTinySparseLayers * kTinyQueryHeads;
constexpr uint32_t kHeads = kTinySparseLayers * kTinyKvHeads;
constexpr uint32_t kGroups = kSteps * kHeads;
constexpr uint32_t kGroup = kTinyQueryHeads / kTinyKvHeads;
// Of a row of K and V, two bytes a channel; and of a key's sketch.
constexpr double kRowBytes = 4.0 * kTinyHeadDim;
constexpr double kRowFlops = 4.0 * kTinyHeadDim * kGroup;
constexpr double kSketchFlops = 2.0 * kTinyHeadDim * kGroup;
// Float32 in another order; now and then a key is rounded to bf16 the other way.
constexpr double kTolerance = 1e-3;

Policy StudyPolicy(SelectorKind selector, uint32_t top_k) {
  Policy policy = DefaultPolicy(selector);
  policy.budget = {.sink = kStudySinks, .local = kStudyLocal, .top_k = top_k};
  policy.dense_below_tokens = 0;
  return policy;
}

Contender Product(SelectorKind selector, uint32_t top_k = kTopK) {
  return {.method = "product", .policy = StudyPolicy(selector, top_k)};
}

Contender Published(std::string_view name) {
  return {.method = std::string(name),
          .policy = StudyPolicy(SelectorKind::kGiven, 1),
          .baseline = std::string(name),
          .token_budget = {.sink = kStudySinks, .local = kStudyLocal, .top_k = kTopK},
          .reads_logits = true};
}

Contender Proving(SelectorKind selector, Guarantee guarantee, float limit) {
  Contender contender = Product(selector);
  contender.policy.guarantee = guarantee;
  contender.policy.max_dropped_mass = limit;
  contender.policy.on_violation = limit < 1.0F ? OnViolation::kGrow : OnViolation::kReport;
  return contender;
}

double Mean(const std::vector<float>& numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), 0.0) / static_cast<double>(numbers.size());
}

class ClosedLoopTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { study = new TinyStudy(::testing::TempDir()); }
  static void TearDownTestSuite() { delete std::exchange(study, nullptr); }

  // The dense one is added.
  static std::vector<LoopResult> Run(const StudyText& text, std::vector<Contender> contenders,
                                     const QualityOptions& options = {}) {
    contenders.insert(contenders.begin(), Product(SelectorKind::kDense));
    auto results = RunBatches(options, study->SetUp(text), contenders);
    EXPECT_TRUE(results.ok()) << results.status();
    if (!results.ok()) return std::vector<LoopResult>(contenders.size());
    return std::move(*results);
  }
  static StudyText Forced() { return study->Text(RandomTokens(kSteps, 3), 0); }
  // Over all groups: tokens that are attended, and those that are read whatever was chosen (sinks,
  // the local window, and a block that is not full yet).
  static double VisibleTokens() {
    double tokens = 0.0;
    for (uint32_t step = 0; step < kSteps; ++step) tokens += kTinyPromptTokens + step + 1;
    return tokens * kHeads;
  }
  static double AlwaysReadTokens() {
    double tokens = 0.0;
    for (uint32_t step = 0; step < kSteps; ++step) {
      const uint32_t filling = (kTinyPromptTokens + step + 1) % kBlockTokens;
      tokens += kStudySinks + std::max(kStudyLocal, filling);
    }
    return tokens * kHeads;
  }
  static double ReadTokens(uint32_t top_k) {
    return AlwaysReadTokens() + static_cast<double>(top_k) * kGroups;
  }
  // Over all groups: tokens that have become choosable since the first step, which lists of that
  // step are read with (fewer than kFreshTokensMax at a time).
  static double FreshTokens() {
    const auto choosable = [](uint32_t step) {
      const uint32_t length = kTinyPromptTokens + step + 1;
      return length - std::max(kStudyLocal, length % kBlockTokens);
    };
    double tokens = 0.0;
    for (uint32_t step = 0; step < kSteps; ++step) tokens += choosable(step) - choosable(0);
    return tokens * kHeads;
  }
  static double SketchBytes() {
    return static_cast<double>(SketchLayout(kTinyHeadDim).slice_bytes(1)) / kBlockTokens;
  }
  // How many anchors were compared with, from bytes and operations: both are sums over rows that
  // are read, which are known, sketches that are scanned, and anchors.
  static double ComparedAnchors(const LoopResult& result) {
    const double others = (result.flops - result.tokens_read * kRowFlops) / kSketchFlops;
    const double bytes = result.bytes - result.tokens_read * kRowBytes;
    return (bytes - others * SketchBytes()) / (4.0 * kTinyHeadDim * kGroup - SketchBytes());
  }

  static TinyStudy* study;
};
TinyStudy* ClosedLoopTest::study = nullptr;

TEST_F(ClosedLoopTest, DenseIsTheModelItself) {
  const StudyText text = Forced();
  const LoopResult dense = Run(text, {Product(SelectorKind::kScan)})[0];
  ASSERT_EQ(dense.nll.size(), kSteps - 1);
  for (uint32_t step = 0; step + 1 < kSteps; ++step) {
    const auto fed = absl::MakeConstSpan(text.forced).first(step + 1);
    const std::vector<float> logits = study->LogitsAfter(fed);
    double total = 0.0;
    for (const float logit : logits) total += std::exp(double{logit});
    EXPECT_NEAR(dense.nll[step], std::log(total) - logits[text.forced[step + 1]], kTolerance);
  }
  EXPECT_EQ(dense.kl, std::vector<float>(kSteps, 0.0F));
  EXPECT_EQ(dense.top1_equal, kSteps);
}

TEST_F(ClosedLoopTest, WhoReadsAllIsTheDenseOne) {
  const auto results = Run(Forced(), {Product(SelectorKind::kScan, 4096)});
  const LoopResult& all = results[1];
  ASSERT_EQ(all.kl.size(), kSteps);
  EXPECT_LT(*std::max_element(all.kl.begin(), all.kl.end()), 1e-5);
  for (uint32_t i = 0; i + 1 < kSteps; ++i) EXPECT_NEAR(all.nll[i], results[0].nll[i], kTolerance);
  EXPECT_EQ(all.dropped, std::vector<float>(kHeadSteps, 0.0F));
  EXPECT_EQ(all.tokens_read, all.tokens_visible);
  ASSERT_EQ(all.output_errors.size(), kGroups);
  EXPECT_LT(*std::max_element(all.output_errors.begin(), all.output_errors.end()), 1e-5);
}

// Also: every method runs where the layers that choose are neither the first nor neighbours.
TEST_F(ClosedLoopTest, TheOracleDropsLeastAndRecencyMore) {
  std::vector<Contender> contenders;
  for (const std::string_view name : baselines::BaselineNames()) {
    contenders.push_back(Published(name));
  }
  contenders.push_back(Product(SelectorKind::kScan));
  const auto results = Run(Forced(), contenders);
  std::map<std::string, double> dropped;
  for (size_t i = 0; i < contenders.size(); ++i) {
    const LoopResult& result = results[i + 1];
    ASSERT_EQ(result.dropped.size(), kHeadSteps) << contenders[i].label();
    dropped[contenders[i].method] = Mean(result.dropped);
    EXPECT_LE(result.tokens_read, ReadTokens(kTopK)) << contenders[i].label();
    EXPECT_EQ(result.groups_dense, 0U) << contenders[i].label();
    EXPECT_GT(Mean(result.kl), 0.0) << contenders[i].label();
  }
  const double least = dropped.at("oracle");
  for (const auto& [name, mean] : dropped) EXPECT_GE(mean, least) << name;
  EXPECT_GT(least, 0.01);
  EXPECT_GT(dropped.at("streaming_llm"), 1.5 * least);
  EXPECT_LT(dropped.at("product"), dropped.at("streaming_llm"));
}

TEST_F(ClosedLoopTest, ProofsAreCountedAndHold) {
  const auto results = Run(
      Forced(), {Proving(SelectorKind::kCertified, Guarantee::kDeterministic, 0.05F),
                 Proving(SelectorKind::kCertified, Guarantee::kConfidence, 0.3F),
                 Proving(SelectorKind::kScan, Guarantee::kDeterministic, 1.0F),
                 Proving(SelectorKind::kCpe, Guarantee::kConfidence, 1.0F), Published("quest")});
  for (size_t i = 1; i < 5; ++i) {
    EXPECT_EQ(results[i].violations, 0U) << i;
    EXPECT_EQ(results[i].sampled_misses, 0U) << i;
    EXPECT_EQ(results[i].certificates + results[i].sampled_certificates, kHeadSteps) << i;
    ASSERT_EQ(results[i].dropped.size(), kHeadSteps) << i;
  }
  const auto largest = [](const std::vector<float>& numbers) {
    return numbers.empty() ? 0.0F : *std::max_element(numbers.begin(), numbers.end());
  };
  EXPECT_LE(largest(results[1].dropped), 0.05F);
  EXPECT_LE(largest(results[2].dropped), 0.3F);
  EXPECT_EQ(results[1].sampled_certificates, 0U);
  EXPECT_EQ(results[3].sampled_certificates, 0U);
  EXPECT_GT(results[4].sampled_certificates, 0U);
  EXPECT_GT(results[4].expected_misses, 0.0);
  EXPECT_EQ(results[3].expected_misses, 0.0);
  // Each dropped something, and said how much at most.
  EXPECT_EQ(results[3].bounds.size(), kHeadSteps);
  for (size_t i = 0; i < results[3].bounds.size(); ++i) {
    EXPECT_GE(results[3].bounds[i], results[3].dropped[i]);
  }
  // Who says nothing has no certificates.
  EXPECT_EQ(results[5].certificates + results[5].sampled_certificates, 0U);
  EXPECT_EQ(results[5].violations, 0U);
}

TEST_F(ClosedLoopTest, GreedyDecodingIsThatOfRepeatedPrefill) {
  for (const std::vector<uint32_t>& forced :
       {std::vector<uint32_t>(), std::vector<uint32_t>{7, 31, 2}}) {
    for (const uint32_t count : {1U, 6U}) {
      std::vector<uint32_t> continuation = forced;
      for (uint32_t i = 0; i < count; ++i) continuation.push_back(study->Predict(continuation));
      continuation.erase(continuation.begin(),
                         continuation.begin() + static_cast<std::ptrdiff_t>(forced.size()));
      const auto results = Run(study->Text(forced, count), {Product(SelectorKind::kScan, 4096)});
      EXPECT_EQ(results[0].greedy, continuation);
      EXPECT_EQ(results[1].greedy, continuation);
      EXPECT_EQ(results[0].steps, forced.size() + count - 1);
      EXPECT_EQ(results[0].kl.size(), forced.size());
    }
  }
}

// Forced tokens are those that the model would say, but for the fifth and the eighth.
TEST_F(ClosedLoopTest, AnswersAreRightIfAllOfTheirTokensAre) {
  std::vector<uint32_t> forced = {5};
  while (forced.size() < 12) {
    const uint32_t predicted = study->Predict(forced);
    const bool is_wrong = forced.size() == 5 || forced.size() == 8;
    forced.push_back(is_wrong ? (predicted + 1) % kTinyVocabulary : predicted);
  }
  StudyText text = study->Text(forced, 0);
  text.answers = {{.begin = 1, .end = 3, .name = "right"},
                  {.begin = 4, .end = 7, .name = "wrong in the middle"},
                  {.begin = 8, .end = 9, .name = "wrong"},
                  {.begin = 10, .end = 12, .name = "right to the end"}};
  const auto results = Run(text, {Product(SelectorKind::kScan, 4096)});
  for (const LoopResult& result : results) {
    EXPECT_EQ(result.digits, 8U);
    EXPECT_EQ(result.digits_right, 6U);
    EXPECT_EQ(result.answers, 4U);
    EXPECT_EQ(result.answers_right, 2U);
  }
}

TEST_F(ClosedLoopTest, CostsOfDenseAndScanAreThoseOfFormulas) {
  const auto results = Run(Forced(), {Product(SelectorKind::kScan)});
  const double visible = VisibleTokens();
  for (const LoopResult& result : results) {
    EXPECT_EQ(result.steps, kSteps);
    EXPECT_EQ(result.groups, kGroups);
    EXPECT_EQ(result.groups_second_half, kGroups / 2);
    EXPECT_EQ(result.tokens_visible, visible);
    EXPECT_EQ(result.bytes_dense, visible * kRowBytes);
    EXPECT_EQ(result.flops_dense, visible * kRowFlops);
  }
  const LoopResult& dense = results[0];
  EXPECT_EQ(dense.groups_dense, kGroups);
  EXPECT_EQ(dense.scans, 0U);
  EXPECT_EQ(dense.tokens_read, visible);
  EXPECT_EQ(dense.bytes, dense.bytes_dense);
  EXPECT_EQ(dense.flops, dense.flops_dense);

  const LoopResult& scan = results[1];
  EXPECT_EQ(scan.groups_dense, 0U);
  EXPECT_EQ(scan.scans, kGroups);
  EXPECT_EQ(scan.scans_second_half, kGroups / 2);
  EXPECT_EQ(scan.scans_by_head, std::vector<uint32_t>(kHeads, kSteps));
  EXPECT_EQ(scan.tokens_read, ReadTokens(kTopK));
  const double scanned = visible - AlwaysReadTokens();
  EXPECT_DOUBLE_EQ(scan.bytes, scan.tokens_read * kRowBytes + scanned * SketchBytes());
  EXPECT_DOUBLE_EQ(scan.flops, scan.tokens_read * kRowFlops + scanned * kSketchFlops);
}

// One that shares whatever the cosine scans once, and compares with that one anchor ever after.
TEST_F(ClosedLoopTest, CostsOfSharingHaveTheAnchors) {
  Contender sharing = Product(SelectorKind::kCis);
  sharing.policy.cis.min_cosine = -1.0F;
  sharing.policy.cis.max_dropped_mass_estimate = 0.0F;
  const LoopResult result = Run(Forced(), {sharing})[1];
  EXPECT_EQ(result.scans, kHeads);
  EXPECT_EQ(result.scans_second_half, 0U);
  EXPECT_EQ(result.scans_by_head, std::vector<uint32_t>(kHeads, 1));
  EXPECT_EQ(result.tokens_read, ReadTokens(kTopK) + FreshTokens());
  EXPECT_NEAR(ComparedAnchors(result), kHeads * (kSteps - 1), 1e-6);
}

// An anchor per block of steps: those of blocks that are over cost nothing.
TEST_F(ClosedLoopTest, ForgottenAnchorsCostNothing) {
  Contender sharing = Product(SelectorKind::kCis);
  sharing.policy.cis.min_cosine = -1.0F;
  sharing.policy.cis.max_dropped_mass_estimate = 0.0F;
  sharing.policy.cis.block_steps = 5;
  const LoopResult result = Run(Forced(), {sharing})[1];
  EXPECT_EQ(result.scans, kHeads * (kSteps / 5));
  EXPECT_EQ(result.scans_second_half, kHeads * (kSteps / 5) / 2);
  constexpr uint32_t kBlocksOfSteps = kSteps / 5;
  EXPECT_NEAR(ComparedAnchors(result), kHeads * (kSteps - kBlocksOfSteps), 1e-6);
}

// One that estimates, and shares whatever comes out, pays for the estimates.
TEST_F(ClosedLoopTest, EstimatesOfSharingCost) {
  Contender blind = Product(SelectorKind::kCis);
  blind.policy.cis.min_cosine = -1.0F;
  blind.policy.cis.max_dropped_mass_estimate = 0.0F;
  Contender verified = blind;
  verified.policy.cis.max_dropped_mass_estimate = 0.99999F;
  const auto results = Run(Forced(), {blind, verified});
  EXPECT_EQ(results[2].scans, results[1].scans);
  EXPECT_EQ(results[2].tokens_read, results[1].tokens_read);
  constexpr double kEstimates = kHeads * (kSteps - 1);
  EXPECT_NEAR(results[2].bytes - results[1].bytes,
              kEstimates * (2 * kGroup + 1) * kTinyHeadDim * 4.0, 1e-6);
  EXPECT_NEAR(results[2].flops - results[1].flops, kEstimates * 9.0 * kGroup * kTinyHeadDim, 1e-6);
}

TEST_F(ClosedLoopTest, TheDenseOneCanRunAlone) {
  const auto results = Run(Forced(), {});
  ASSERT_EQ(results.size(), 1U);
  EXPECT_EQ(results[0].steps, kSteps);
  EXPECT_EQ(results[0].tokens_read, VisibleTokens());
}

TEST_F(ClosedLoopTest, BatchesKeepTheOrderAndThreadsChangeNothing) {
  std::vector<Contender> contenders;
  for (uint32_t i = 0; i < 7; ++i) {
    contenders.push_back(Product(i % 2 == 0 ? SelectorKind::kScan : SelectorKind::kCis, 20 + i));
    contenders.back().unrotated = i % 3 != 0;
  }
  const auto one = Run(Forced(), contenders, {.thread_count = 1, .batch = 2});
  const auto two = Run(Forced(), contenders, {.thread_count = 2, .batch = 2});
  EXPECT_EQ(one[0].nll, two[0].nll);
  for (uint32_t i = 0; i < 7; ++i) {
    EXPECT_GE(one[i + 1].tokens_read, ReadTokens(20 + i)) << i;
    EXPECT_LE(one[i + 1].tokens_read, ReadTokens(20 + i) + (i % 2 == 0 ? 0.0 : FreshTokens())) << i;
    EXPECT_EQ(one[i + 1].kl, two[i + 1].kl) << i;
    EXPECT_EQ(one[i + 1].dropped, two[i + 1].dropped) << i;
  }
}

}  // namespace
}  // namespace kvservice::eval
