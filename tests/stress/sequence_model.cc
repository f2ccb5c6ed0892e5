#include "tests/stress/sequence_model.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "attention/kv_layout.h"
#include "kvservice/error.h"

namespace kvservice::testing {

uint32_t ModelSequence::length() const {
  uint32_t shortest = UINT32_MAX;
  for (const Words& layer : layers) {
    shortest = std::min(shortest, static_cast<uint32_t>(layer.size()));
  }
  return shortest;
}

uint32_t ModelSequence::length_max() const {
  uint32_t longest = 0;
  for (const Words& layer : layers) longest = std::max<uint32_t>(longest, layer.size());
  return longest;
}

uint32_t ModelSequence::block_count() const {
  return (length_max() + kBlockTokens - 1) / kBlockTokens;
}

uint32_t ModelSequence::MatchOf(const Words& words) const {
  const size_t longest = std::min({words.size(), declared.size(), size_t{length()}});
  const auto differ = std::mismatch(words.begin(), words.begin() + static_cast<ptrdiff_t>(longest),
                                    declared.begin());
  return static_cast<uint32_t>(differ.first - words.begin()) / kBlockTokens * kBlockTokens;
}

void ModelSequence::CutDeclared(uint32_t length) {
  const uint32_t whole = length / kBlockTokens * kBlockTokens;
  declared.resize(std::min<size_t>(declared.size(), whole));
}

std::string Expectation::Judge(const absl::Status& status) const {
  const std::string reason = status.ok() ? "" : DetailsOf(status).reason;
  const std::string wanted = absl::StrJoin(must_, " or ");
  if (status.ok()) return must_.empty() ? "" : absl::StrCat("succeeded instead of ", wanted);
  if (must_.contains(reason) || may_.contains(reason)) return "";
  return absl::StrCat("failed instead of ", must_.empty() ? "succeeding" : wanted, ": ",
                      status.ToString());
}

Expectation NamesSequence(const ModelSequence& sequence, const Caller& caller, bool in_memory) {
  Expectation expectation;
  const bool is_unknown = !sequence.is_there || caller.is_foreign;
  expectation.Must(is_unknown, "SEQUENCE_NOT_FOUND");
  if (is_unknown) return expectation;
  expectation.Must(caller.generation_offset != 0, "GENERATION_MISMATCH");
  expectation.Must(in_memory && sequence.is_suspended, "SEQUENCE_SUSPENDED");
  return expectation;
}

void ExpectAppend(const ModelSequence& sequence, const ModelLimits& limits, uint32_t layer,
                  uint32_t position, const Words& words, Expectation* expectation) {
  if (layer >= kModelLayers) {
    expectation->Must(true, "LAYER_OUT_OF_RANGE");
    return;
  }
  const Words& stored = sequence.layers[layer];
  expectation->Must(position > stored.size(), "POSITION_GAP");
  expectation->Must(position + words.size() > limits.sequence_tokens_max, "SEQUENCE_TOO_LONG");
  for (size_t i = 0; i < words.size() && position + i < stored.size(); ++i) {
    if (stored[position + i] != words[i]) expectation->Must(true, "APPEND_CONFLICT");
  }
}

bool IsStored(const Words& stored, uint32_t position, const Words& words) {
  return position + words.size() <= stored.size() &&
         std::equal(words.begin(), words.end(), stored.begin() + position);
}

void Store(uint32_t position, const Words& words, Words* stored) {
  const size_t known = std::min(words.size(), stored->size() - position);
  stored->insert(stored->end(), words.begin() + static_cast<ptrdiff_t>(known), words.end());
}

}  // namespace kvservice::testing
