// Which published methods there are, and how to make one for a prompt.
//
//   name             source                   parameters                  what is scored
//   oracle           exact scores             -                           every key
//   hshare           HShare, ICLR 2025        1/2 layers, heads, steps    4-bit labels, sometimes
//   h2o              H2O, NeurIPS 2023        half recent, half heavy     attention seen so far
//   streaming_llm    StreamingLLM, ICLR 2024  all of it recent            nothing
//   snapkv           SnapKV, NeurIPS 2024     window 32, pool 5           the prompt, once
//   quest            Quest, ICML 2024         pages of 16                 bounds of pages
//   double_sparsity  Double Sparsity, 2024    d/4 channels, 4 bits        4-bit labels
//   loki             Loki, NeurIPS 2024       d/4 components, 16 bits     turned labels
//   tidal_decode     TidalDecode, ICLR 2025   layers 2 and 13/32 N        every key, two layers
//   token_select     TokenSelect, 2024        cosine 0.9                  every key, sometimes
//   twilight         Twilight, NeurIPS 2025   p = 1 - mass_limit          every key in 4 bits
//   magicpig         MagicPIG, ICLR 2025      K = 10, L = 150             hash tables
//   vattention       vAttention, 2025         half predicted, half drawn  4-bit labels
//
// Scores are combined over the query heads that share a KV head alike for all: by the sum of their
// softmax for top_k, by every head's own dropped mass for a mass_limit (token_select takes all
// heads of the layer together, as it was published). streaming_llm and magicpig estimate no mass
// and keep top_k under a mass_limit too. A list that is taken over from another layer, head or step
// (hshare, tidal_decode, token_select) is as long as it was there.
//
// magicpig and vattention are published with weights: their samples count for the tokens that were
// not drawn. Here only the tokens that they propose are compared, which is unfavourable to both.

#ifndef KVSERVICE_SELECTOR_BASELINES_BASELINES_H_
#define KVSERVICE_SELECTOR_BASELINES_BASELINES_H_

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "selector/baselines/baseline.h"

namespace kvservice::baselines {

// What a method may learn from before the first decode step.
struct BaselineContext {
  std::shared_ptr<const Prompt> prompt = nullptr;
  // Another text of the same model, for the methods that are calibrated offline (hshare,
  // double_sparsity, loki, vattention); its attention_sum is not read.
  std::shared_ptr<const Prompt> calibration = nullptr;
  // Of the random planes of magicpig and the samples of vattention.
  uint64_t seed = 0;
  // Size of the sets whose overlap decides what hshare shares: by default HShare's configuration.
  // mass_limit is not read.
  TokenBudget overlap = {.sink = 8, .local = 32, .top_k = 88};
  // Threads that the making of an index may use, at least 1.
  uint32_t threads = 1;
};

// What a method computes from a prompt, once, for any number of sequences that continue it.
// Immutable; any thread.
class PromptIndex {
 public:
  virtual ~PromptIndex() = default;
  // The proposer of one sequence, whose first step has length prompt.length + 1. The index outlives
  // it. It holds what decoding adds, labels of at most a few hundred bytes per token and KV head.
  virtual std::unique_ptr<Baseline> NewBaseline(const TokenBudget& budget) const = 0;
};

// INVALID_ARGUMENT for a name that is not in BaselineNames, shapes that do not fit together, and
// where the method needs something that the context lacks; the message says what.
absl::StatusOr<std::unique_ptr<const PromptIndex>> NewPromptIndex(std::string_view method,
                                                                  const BaselineContext& context);

// All names, in the order of the table above.
absl::Span<const std::string_view> BaselineNames();

// The methods. `context` has what the method needs (NewPromptIndex checks it).
std::unique_ptr<const PromptIndex> NewOracle(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewHShare(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewH2o(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewStreamingLlm(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewSnapKv(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewQuest(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewDoubleSparsity(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewLoki(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewTidalDecode(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewTokenSelect(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewTwilight(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewMagicPig(const BaselineContext& context);
std::unique_ptr<const PromptIndex> NewVAttention(const BaselineContext& context);

}  // namespace kvservice::baselines

#endif  // KVSERVICE_SELECTOR_BASELINES_BASELINES_H_
