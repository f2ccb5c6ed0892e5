// The judge of the closed-loop study against plain loops in long double, and against certificates
// that are wrong or right by a hair.

#include "tests/eval/step_judge.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace kvservice::eval {
namespace {

using Real = long double;

constexpr uint32_t kGroup = 3;
constexpr uint32_t kHeadDim = 16;
constexpr uint32_t kPromptTokens = 1200;
constexpr uint32_t kTailTokens = 7;
constexpr uint32_t kLength = kPromptTokens + kTailTokens;
// Shares of float32 sums against long double.
constexpr double kTolerance = 1e-6;

// One group whose attention is known to long double. Keys and values are those of all tokens, of
// which the first kPromptTokens are the prompt's.
class GroupCase {
 public:
  // Logits have about this standard deviation.
  explicit GroupCase(double spread)
      : scale_(static_cast<float>(spread / std::sqrt(kHeadDim))),
        q_(Random(kGroup)),
        keys_(Random(kLength)),
        values_(Random(kLength)),
        out_(size_t{kGroup} * kHeadDim),
        certificates_(kGroup) {
    Score();
    for (HeadCertificate& certificate : certificates_) {
      certificate.level = Level::kDeterministic;
      certificate.action = Action::kSelected;
      certificate.dropped_mass_upper.value = 1.0;
      certificate.dropped_mass_lower.value = 0.0;
    }
  }

  // Makes the case one where head h's logit of a token is numbers[h][token] (other tokens: -50).
  void SetLogits(const std::vector<std::vector<float>>& numbers) {
    std::fill(keys_.begin(), keys_.end(), 0.0F);
    std::fill(q_.begin(), q_.end(), 0.0F);
    scale_ = 1.0F;
    for (uint32_t head = 0; head < kGroup; ++head) {
      q_[head * kHeadDim + head] = 1.0F;
      for (uint32_t token = 0; token < kLength; ++token) {
        const bool is_given = token < numbers[head].size();
        keys_[token * kHeadDim + head] = is_given ? numbers[head][token] : -50.0F;
      }
    }
    Score();
  }

  void Select(std::vector<uint32_t> selected) { selected_ = std::move(selected); }
  std::vector<HeadCertificate>& certificates() { return certificates_; }
  std::vector<float>& out() { return out_; }
  const std::vector<float>& values() const { return values_; }

  GroupStep step() const {
    return {.group = kGroup,
            .head_dim = kHeadDim,
            .length = kLength,
            .scale = scale_,
            .q = q_.data(),
            .logits = logits_.data(),
            .prompt_keys = keys_.data(),
            .prompt_values = values_.data(),
            .prompt_length = kPromptTokens,
            .tail = {.keys = &keys_[size_t{kPromptTokens} * kHeadDim],
                     .values = &values_[size_t{kPromptTokens} * kHeadDim],
                     .count = kTailTokens},
            .key_norm_max = NormMax(),
            .selected = selected_,
            .dense = false,
            .out = out_.data(),
            .certificates = certificates_.data()};
  }

  // [length], exact.
  std::vector<Real> Probabilities(uint32_t head) const {
    std::vector<Real> shares;
    for (uint32_t token = 0; token < kLength; ++token) {
      Real sum = 0;
      for (uint32_t c = 0; c < kHeadDim; ++c) {
        sum += Real{q_[head * kHeadDim + c]} * keys_[token * kHeadDim + c];
      }
      shares.push_back(Real{scale_} * sum);
    }
    const Real peak = *std::max_element(shares.begin(), shares.end());
    Real total = 0;
    for (Real& share : shares) total += share = std::exp(share - peak);
    for (Real& share : shares) share /= total;
    return shares;
  }
  Real Dropped(uint32_t head) const {
    const std::vector<Real> shares = Probabilities(head);
    Real dropped = 0;
    for (uint32_t token = 0; token < kLength; ++token) {
      const bool is_kept = std::binary_search(selected_.begin(), selected_.end(), token);
      dropped += is_kept ? 0 : shares[token];
    }
    return dropped;
  }

 private:
  std::vector<float> Random(size_t rows) {
    std::vector<float> numbers(rows * kHeadDim);
    for (float& number : numbers) number = normal_(random_);
    return numbers;
  }
  void Score() {
    logits_.clear();
    for (uint32_t head = 0; head < kGroup; ++head) {
      for (uint32_t token = 0; token < kLength; ++token) {
        float sum = 0.0F;
        for (uint32_t c = 0; c < kHeadDim; ++c) {
          sum += scale_ * q_[head * kHeadDim + c] * keys_[token * kHeadDim + c];
        }
        logits_.push_back(sum);
      }
    }
  }
  float NormMax() const {
    double largest = 0.0;
    for (uint32_t token = 0; token < kLength; ++token) {
      double squares = 0.0;
      for (uint32_t c = 0; c < kHeadDim; ++c) {
        squares += std::pow(double{keys_[token * kHeadDim + c]}, 2);
      }
      largest = std::max(largest, squares);
    }
    return static_cast<float>(std::sqrt(largest) * 1.001);
  }

  std::mt19937 random_{3};
  std::normal_distribution<float> normal_;
  float scale_;
  std::vector<float> q_, keys_, values_, logits_, out_;
  std::vector<uint32_t> selected_;
  std::vector<HeadCertificate> certificates_;
};

std::vector<uint32_t> EveryNth(uint32_t n) {
  std::vector<uint32_t> positions;
  for (uint32_t token = 0; token < kLength; token += n) positions.push_back(token);
  return positions;
}

std::vector<HeadVerdict> Judged(const GroupStep& step) {
  StepJudge judge;
  std::vector<HeadVerdict> verdicts(kGroup);
  judge.Judge(step, verdicts.data());
  return verdicts;
}

bool IsWrong(const GroupStep& step) { return Judged(step)[0].is_wrong; }

TEST(StepJudgeTest, DroppedMassIsThatOfPlainLoops) {
  for (const double spread : {0.1, 1.0, 4.0, 30.0}) {
    GroupCase data(spread);
    for (const uint32_t n : {1, 2, 7, 400}) {
      data.Select(EveryNth(n));
      const std::vector<HeadVerdict> verdicts = Judged(data.step());
      for (uint32_t head = 0; head < kGroup; ++head) {
        const auto dropped = static_cast<double>(data.Dropped(head));
        // Logits of spread 30 differ by as much from float32 to long double as they are larger.
        EXPECT_NEAR(verdicts[head].dropped, dropped, dropped * kTolerance * (1.0 + 10.0 * spread));
        EXPECT_FALSE(verdicts[head].is_wrong);
      }
    }
  }
}

// Digits of a small mass must not be lost against 1.
TEST(StepJudgeTest, ASmallMassHasItsDigits) {
  GroupCase data(1.0);
  data.SetLogits({{20.0F, 0.0F, 5.0F}, {0.0F}, {0.0F}});
  data.Select({0});
  const double expected = (1.0 + std::exp(5.0) + (kLength - 3) * std::exp(-50.0)) /
                          (std::exp(20.0) + std::exp(5.0) + 1.0);
  EXPECT_NEAR(Judged(data.step())[0].dropped, expected, expected * kTolerance);
  EXPECT_LT(expected, 1e-6);
}

TEST(StepJudgeTest, DenseDropsNothing) {
  GroupCase data(1.0);
  GroupStep step = data.step();
  step.dense = true;
  for (HeadCertificate& certificate : data.certificates()) {
    certificate.level = Level::kExact;
    certificate.dropped_mass_upper.value = 0.0;
  }
  StepJudge judge;
  std::vector<HeadVerdict> verdicts(kGroup);
  judge.Judge(step, verdicts.data());
  EXPECT_EQ(verdicts[0].dropped, 0.0);
  EXPECT_FALSE(verdicts[0].is_wrong);
  const GroupVerdict compared = judge.Compare(step, verdicts.data());
  EXPECT_EQ(compared.excess, 0.0);
  EXPECT_EQ(compared.overlap, 1.0);
  EXPECT_EQ(compared.output_error, 0.0);
}

TEST(StepJudgeTest, AHairBelowTheTruthIsFoundAndAHairAboveIsNot) {
  for (const double spread : {0.5, 3.0, 12.0}) {
    GroupCase data(spread);
    for (const uint32_t n : {2, 50}) {
      data.Select(EveryNth(n));
      const auto truth = static_cast<double>(data.Dropped(0));
      for (const Level level : {Level::kConfidence, Level::kDeterministic, Level::kExact}) {
        HeadCertificate& certificate = data.certificates()[0];
        certificate.level = level;
        certificate.dropped_mass_lower.value = 0.0;
        certificate.dropped_mass_upper.value = truth * (1.0 - 1e-9);
        EXPECT_TRUE(IsWrong(data.step())) << spread << " " << n;
        certificate.dropped_mass_upper.value = truth * (1.0 + 1e-9);
        EXPECT_FALSE(IsWrong(data.step())) << spread << " " << n;
        certificate.dropped_mass_lower.value = truth * (1.0 - 1e-9);
        EXPECT_FALSE(IsWrong(data.step())) << spread << " " << n;
        certificate.dropped_mass_upper.value = 1.0;
        certificate.dropped_mass_lower.value = truth * (1.0 + 1e-9);
        EXPECT_TRUE(IsWrong(data.step())) << spread << " " << n;
      }
    }
  }
}

// Each head has a certificate of its own.
TEST(StepJudgeTest, OnlyTheHeadThatIsWrongIsCalledSo) {
  GroupCase data(2.0);
  data.Select(EveryNth(3));
  data.certificates()[1].dropped_mass_upper.value =
      static_cast<double>(data.Dropped(1)) * (1.0 - 1e-9);
  const std::vector<HeadVerdict> verdicts = Judged(data.step());
  EXPECT_FALSE(verdicts[0].is_wrong);
  EXPECT_TRUE(verdicts[1].is_wrong);
  EXPECT_FALSE(verdicts[2].is_wrong);
}

// Below what float32 can hold: e^-95 of the mass, and e^-120.
TEST(StepJudgeTest, MassesBeyondFloat32AreJudgedAllTheSame) {
  GroupCase data(1.0);
  for (const float peak : {45.0F, 70.0F}) {
    data.SetLogits({{peak}, {0.0F}, {0.0F}});
    data.Select({0});
    const auto truth = static_cast<double>(data.Dropped(0));
    ASSERT_LT(truth, 1e-37);
    HeadCertificate& certificate = data.certificates()[0];
    certificate.dropped_mass_lower.value = 0.0;
    certificate.dropped_mass_upper.value = truth * (1.0 - 1e-9);
    EXPECT_TRUE(IsWrong(data.step())) << peak;
    certificate.dropped_mass_upper.value = truth * (1.0 + 1e-9);
    EXPECT_FALSE(IsWrong(data.step())) << peak;
    certificate.dropped_mass_lower.value = truth * (1.0 + 1e-9);
    EXPECT_TRUE(IsWrong(data.step())) << peak;
  }
}

TEST(StepJudgeTest, WhatSaysNothingMustSayOne) {
  GroupCase data(1.0);
  data.Select(EveryNth(2));
  HeadCertificate& certificate = data.certificates()[0];
  certificate.level = Level::kNone;
  EXPECT_FALSE(IsWrong(data.step()));
  // True, but not stated with any level.
  certificate.dropped_mass_upper.value = 0.999;
  EXPECT_TRUE(IsWrong(data.step()));
  for (const Level level : {Level::kNone, Level::kDeterministic}) {
    certificate.level = level;
    certificate.dropped_mass_upper.value = std::nan("");
    EXPECT_TRUE(IsWrong(data.step()));
  }
}

// Two tokens are kept. By the sum over the heads tokens 1 and 2 are best.
TEST(StepJudgeTest, ExcessAndOverlapAreAgainstTheBestSetOfTheGroup) {
  const float big = std::log(4.0F), small = std::log(2.0F);
  GroupCase data(1.0);
  data.SetLogits({{small, big, 0.0F, 0.0F}, {0.0F, big, big, 0.0F}, {0.0F, 0.0F, big, 0.0F}});
  data.Select({0, 1});
  StepJudge judge;
  std::vector<HeadVerdict> verdicts(kGroup);
  judge.Judge(data.step(), verdicts.data());
  EXPECT_NEAR(verdicts[0].dropped, 2.0 / 8, kTolerance);
  EXPECT_NEAR(verdicts[1].dropped, 5.0 / 10, kTolerance);
  EXPECT_NEAR(verdicts[2].dropped, 5.0 / 7, kTolerance);
  const GroupVerdict compared = judge.Compare(data.step(), verdicts.data());
  const double best = (3.0 / 8 + 2.0 / 10 + 2.0 / 7) / 3;
  EXPECT_NEAR(compared.excess, (2.0 / 8 + 5.0 / 10 + 5.0 / 7) / 3 - best, kTolerance);
  EXPECT_EQ(compared.overlap, 0.5);
  // The best set has no excess over itself.
  data.Select({1, 2});
  judge.Judge(data.step(), verdicts.data());
  const GroupVerdict of_best = judge.Compare(data.step(), verdicts.data());
  EXPECT_NEAR(of_best.excess, 0.0, kTolerance);
  EXPECT_EQ(of_best.overlap, 1.0);
}

// Random groups: the best set by sorting, the dense output by plain loops over prompt and tail.
TEST(StepJudgeTest, ComparisonIsThatOfPlainLoops) {
  for (const double spread : {0.3, 3.0}) {
    GroupCase data(spread);
    data.Select(EveryNth(9));
    std::vector<Real> sums(kLength);
    Real dropped = 0, expected_error = 0;
    for (uint32_t head = 0; head < kGroup; ++head) {
      const std::vector<Real> shares = data.Probabilities(head);
      dropped += data.Dropped(head);
      Real error = 0, norm = 0;
      for (uint32_t c = 0; c < kHeadDim; ++c) {
        Real dense = 0;
        for (uint32_t token = 0; token < kLength; ++token) {
          dense += shares[token] * data.values()[token * kHeadDim + c];
        }
        float& out = data.out()[head * kHeadDim + c];
        out = static_cast<float>(dense) * 0.9F + 0.01F;
        error += (dense - out) * (dense - out);
        norm += dense * dense;
      }
      expected_error += std::sqrt(error / norm) / kGroup;
      for (uint32_t token = 0; token < kLength; ++token) sums[token] += shares[token];
    }
    std::vector<uint32_t> order(kLength);
    std::iota(order.begin(), order.end(), 0U);
    std::sort(order.begin(), order.end(), [&](auto a, auto b) { return sums[a] > sums[b]; });
    const std::vector<uint32_t> selected = EveryNth(9);
    Real best_dropped = kGroup;
    double common = 0;
    for (size_t i = 0; i < selected.size(); ++i) {
      best_dropped -= sums[order[i]];
      common += order[i] % 9 == 0 ? 1 : 0;
    }
    StepJudge judge;
    std::vector<HeadVerdict> verdicts(kGroup);
    judge.Judge(data.step(), verdicts.data());
    const GroupVerdict compared = judge.Compare(data.step(), verdicts.data());
    const auto excess = static_cast<double>((dropped - best_dropped) / kGroup);
    EXPECT_GT(excess, 0.03);
    EXPECT_NEAR(compared.excess, excess, 1e-5);
    EXPECT_DOUBLE_EQ(compared.overlap, common / static_cast<double>(selected.size()));
    const auto error = static_cast<double>(expected_error);
    EXPECT_NEAR(compared.output_error, error, 1e-4 * error);
  }
}

}  // namespace
}  // namespace kvservice::eval
