#include "selector/baselines/baselines.h"

#include <algorithm>
#include <array>
#include <functional>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "selector/baselines/choose.h"

namespace kvservice::baselines {
namespace {

struct Method {
  std::string_view name;
  std::unique_ptr<const PromptIndex> (*make)(const BaselineContext& context);
  // What it reads besides the prompt's keys.
  bool needs_queries = false;
  bool needs_attention_sum = false;
  bool needs_calibration = false;
  uint32_t prompt_tokens_max = std::numeric_limits<uint32_t>::max();
};

constexpr std::array<Method, 13> kMethods = {{
    {.name = "oracle", .make = NewOracle},
    {.name = "hshare", .make = NewHShare, .needs_queries = true, .needs_calibration = true},
    {.name = "h2o", .make = NewH2o, .needs_attention_sum = true},
    {.name = "streaming_llm", .make = NewStreamingLlm},
    {.name = "snapkv", .make = NewSnapKv, .needs_queries = true},
    {.name = "quest", .make = NewQuest},
    {.name = "double_sparsity", .make = NewDoubleSparsity, .needs_calibration = true},
    {.name = "loki", .make = NewLoki, .needs_calibration = true},
    {.name = "tidal_decode", .make = NewTidalDecode},
    {.name = "token_select", .make = NewTokenSelect},
    {.name = "twilight", .make = NewTwilight},
    // Its tables hold positions of 16 bits.
    {.name = "magicpig", .make = NewMagicPig, .prompt_tokens_max = 1U << 16},
    {.name = "vattention", .make = NewVAttention, .needs_calibration = true},
}};

constexpr std::array<std::string_view, kMethods.size()> kNames = [] {
  std::array<std::string_view, kMethods.size()> names;
  std::transform(kMethods.begin(), kMethods.end(), names.begin(),
                 [](const Method& method) { return method.name; });
  return names;
}();

absl::Status Invalid(absl::string_view what, uint64_t expected, uint64_t got) {
  return absl::InvalidArgumentError(absl::StrCat(what, ": expected ", expected, ", got ", got));
}

absl::Status CheckShape(const ModelShape& shape) {
  if (shape.layer_count == 0 || shape.kv_head_count == 0 || shape.head_dim == 0) {
    return absl::InvalidArgumentError("a model without layers, KV heads or channels");
  }
  if (shape.query_head_count == 0 || shape.query_head_count % shape.kv_head_count != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(shape.query_head_count, " query heads on ", shape.kv_head_count, " KV heads"));
  }
  return absl::OkStatus();
}

// `heads`: those that will be looked at.
absl::Status CheckPrompt(const Prompt& prompt, const std::vector<uint32_t>& heads,
                         bool needs_queries, bool needs_attention_sum) {
  const ModelShape& shape = prompt.shape;
  if (absl::Status status = CheckShape(shape); !status.ok()) return status;
  const size_t head_count = size_t{shape.layer_count} * shape.kv_head_count;
  if (prompt.heads.size() != head_count) {
    return Invalid("heads of the prompt", head_count, prompt.heads.size());
  }
  if (needs_queries && prompt.query_count == 0) {
    return absl::InvalidArgumentError("the prompt has no queries");
  }
  if (prompt.query_count > prompt.length) {
    return absl::InvalidArgumentError("more queries than tokens in the prompt");
  }
  if (std::adjacent_find(prompt.layers.begin(), prompt.layers.end(), std::greater_equal<>()) !=
      prompt.layers.end()) {
    return absl::InvalidArgumentError("the prompt's layers are not ascending");
  }
  if (!prompt.layers.empty() && prompt.layers.back() >= shape.layer_count) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", prompt.layers.back(), " of ", shape.layer_count));
  }
  for (const uint32_t index : heads) {
    const PromptHead& head = prompt.heads[index];
    const size_t keys = size_t{prompt.length} * shape.head_dim;
    if (head.keys.size() != keys) return Invalid("numbers of keys", keys, head.keys.size());
    const size_t queries = size_t{prompt.query_count} * shape.group() * shape.head_dim;
    if (needs_queries && head.queries.size() != queries) {
      return Invalid("numbers of queries", queries, head.queries.size());
    }
    const size_t sums = size_t{prompt.length} * shape.group();
    if (needs_attention_sum && head.attention_sum.size() != sums) {
      return Invalid("attention sums", sums, head.attention_sum.size());
    }
  }
  return absl::OkStatus();
}

absl::Status CheckCalibration(const Prompt& prompt, const Prompt& calibration) {
  const ModelShape& shape = prompt.shape;
  if (calibration.length == 0) return absl::InvalidArgumentError("the calibration is empty");
  if (calibration.shape.layer_count != shape.layer_count ||
      calibration.shape.query_head_count != shape.query_head_count ||
      calibration.shape.kv_head_count != shape.kv_head_count ||
      calibration.shape.head_dim != shape.head_dim) {
    return absl::InvalidArgumentError("the calibration is of another model than the prompt");
  }
  return CheckPrompt(calibration, ChoosingHeads(prompt), /*needs_queries=*/true,
                     /*needs_attention_sum=*/false);
}

absl::Status CheckContext(const Method& method, const BaselineContext& context) {
  if (context.prompt == nullptr) return absl::InvalidArgumentError("no prompt");
  if (context.threads == 0) return absl::InvalidArgumentError("threads is 0, expected 1 or more");
  if (absl::Status status = CheckPrompt(*context.prompt, ChoosingHeads(*context.prompt),
                                        method.needs_queries, method.needs_attention_sum);
      !status.ok()) {
    return status;
  }
  if (context.prompt->length > method.prompt_tokens_max) {
    return absl::InvalidArgumentError(absl::StrCat("a prompt of ", context.prompt->length,
                                                   " tokens, expected at most ",
                                                   method.prompt_tokens_max));
  }
  if (!method.needs_calibration) return absl::OkStatus();
  if (context.calibration == nullptr) return absl::InvalidArgumentError("no calibration");
  return CheckCalibration(*context.prompt, *context.calibration);
}

}  // namespace

absl::StatusOr<std::unique_ptr<const PromptIndex>> NewPromptIndex(std::string_view method,
                                                                  const BaselineContext& context) {
  const absl::string_view name(method.data(), method.size());
  const auto* const found = std::find_if(kMethods.begin(), kMethods.end(),
                                         [&](const Method& m) { return m.name == method; });
  if (found == kMethods.end()) {
    return absl::InvalidArgumentError(absl::StrCat("no baseline is called ", name));
  }
  if (absl::Status status = CheckContext(*found, context); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", status.message()));
  }
  return found->make(context);
}

absl::Span<const std::string_view> BaselineNames() { return kNames; }

}  // namespace kvservice::baselines
