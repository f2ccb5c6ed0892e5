#include "tests/eval/tiny_study.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <random>
#include <utility>

#include "tests/eval/tiny_model.h"

namespace kvservice::eval {
namespace {

DecoderShape Shape() {
  DecoderShape shape = {.family = Family::kLlama,
                        .layer_count = 5,
                        .query_head_count = kTinyQueryHeads,
                        .kv_head_count = kTinyKvHeads,
                        .head_dim = kTinyHeadDim,
                        .hidden = 32,
                        .feed_forward = 48,
                        .vocabulary = kTinyVocabulary,
                        // Logits of standard deviation 1.5 or so: a few tokens count most.
                        .scale = 0.05F,
                        .norm_epsilon = 1e-5F,
                        .windows = {0, 0, 0, 9, 0}};
  std::vector<float> frequencies;
  for (uint32_t pair = 0; pair < kTinyHeadDim / 2; ++pair) {
    frequencies.push_back(std::pow(10000.0F, -2.0F * static_cast<float>(pair) / kTinyHeadDim));
  }
  shape.inverse_frequencies.assign(shape.layer_count, frequencies);
  return shape;
}

// Tests cannot go on without a model.
std::unique_ptr<Decoder> LoadTiny(const std::string& folder) {
  auto decoder = Decoder::Load(TinyModel(Shape()).Write(folder, "tiny_study"));
  if (decoder.ok()) return std::move(*decoder);
  std::cerr << decoder.status() << "\n";
  std::abort();
}

}  // namespace

std::vector<uint32_t> RandomTokens(uint32_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint32_t> tokens(count);
  for (uint32_t& token : tokens) token = static_cast<uint32_t>(random() % kTinyVocabulary);
  return tokens;
}

TinyStudy::TinyStudy(const std::string& folder)
    : decoder_(LoadTiny(folder)), prompt_tokens_(RandomTokens(kTinyPromptTokens, 1)) {
  const auto prefilled = [&](absl::Span<const uint32_t> tokens) {
    return std::make_shared<const SharedPrompt>(
        decoder_->shape(), Prefill(*decoder_, tokens, {.thread_count = 1, .query_count = 128}));
  };
  prompt_ = prefilled(prompt_tokens_);
  calibration_ = prefilled(RandomTokens(300, 2));
  tables_ = LearnPromptTables(decoder_->shape(), calibration_->cache());
}

StudyText TinyStudy::Text(std::vector<uint32_t> forced, uint32_t greedy_tokens) const {
  return {.name = "tiny",
          .model = decoder_->shape().name,
          .text = "random",
          .tokens = kTinyPromptTokens + static_cast<uint32_t>(forced.size()),
          .prompt = prompt_tokens_,
          .forced = std::move(forced),
          .greedy_tokens = greedy_tokens};
}

LoopSetup TinyStudy::SetUp(const StudyText& text) const {
  return {.decoder = decoder_.get(),
          .prompt = prompt_,
          .calibration = calibration_,
          .tables = tables_,
          .text = &text,
          .judge_every = 1,
          .compare_every = 1};
}

std::vector<float> TinyStudy::LogitsAfter(absl::Span<const uint32_t> continuation) const {
  std::vector<uint32_t> tokens = prompt_tokens_;
  tokens.insert(tokens.end(), continuation.begin(), continuation.end());
  return Prefill(*decoder_, tokens, {.thread_count = 1, .query_count = 1}).last_logits;
}

uint32_t TinyStudy::Predict(absl::Span<const uint32_t> continuation) const {
  const std::vector<float> logits = LogitsAfter(continuation);
  return static_cast<uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace kvservice::eval
