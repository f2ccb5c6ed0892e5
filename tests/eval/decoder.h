// A small language model on the host, for closed-loop evaluation: everything of a decoder but its
// attention, for many rows at once. Weights and shapes come from a file that
// tests/eval/export_model.py writes and describes. Matrix products are BLAS in float32, one thread
// per call.
//
// Immutable after loading; any number of threads may use one decoder at a time. The same call with
// the same rows gives the same bits; with another number of rows BLAS may add in another order, so
// that runs which are to be compared bit by bit must pass the same number of rows.

#ifndef KVSERVICE_TESTS_EVAL_DECODER_H_
#define KVSERVICE_TESTS_EVAL_DECODER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace kvservice::eval {

// Llama (SmolLM2) and Gemma 3 text models.
enum class Family : uint8_t { kLlama, kGemma3 };

struct DecoderShape {
  std::string name = {};  // that of the file, without its folder and suffix
  Family family = Family::kLlama;
  uint32_t layer_count = 0;
  uint32_t query_head_count = 0;
  uint32_t kv_head_count = 0;
  uint32_t head_dim = 0;
  uint32_t hidden = 0;
  uint32_t feed_forward = 0;
  uint32_t vocabulary = 0;
  float scale = 1.0F;  // logit = scale * q.k
  float norm_epsilon = 0.0F;
  // [layer_count]: tokens that a query sees, itself included; 0 = all.
  std::vector<uint32_t> windows = {};
  // [layer_count][head_dim / 2]: rotary angle per position in radians, multiplied in double;
  // channel c pairs with c + head_dim / 2.
  std::vector<std::vector<float>> inverse_frequencies = {};
};

struct ModelWeights;

class Decoder {
 public:
  // NOT_FOUND, or INVALID_ARGUMENT naming what cannot be.
  static absl::StatusOr<std::unique_ptr<Decoder>> Load(const std::string& path);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  const DecoderShape& shape() const;
  // A hash of shape and weights: another file has another one.
  uint64_t fingerprint() const;

  // One pass over `rows` tokens is: Embed, then per layer Project, attention by the caller,
  // Finish; then Logits. Rows are independent of each other.

  // hidden: [tokens.size()][hidden]. Requires tokens below the vocabulary's size.
  void Embed(absl::Span<const uint32_t> tokens, float* hidden) const;
  // q: [rows][query_heads][head_dim], rotated, float32; k (rotated) and v:
  // [rows][kv_heads][head_dim] in bf16 bits, rounded to nearest even: what a cache stores. rows =
  // positions.size().
  void Project(uint32_t layer, absl::Span<const uint32_t> positions, const float* hidden, float* q,
               uint16_t* k, uint16_t* v) const;
  // Adds the layer's attention and feed-forward parts to `hidden`; attention:
  // [rows][query_heads][head_dim].
  void Finish(uint32_t layer, size_t rows, const float* attention, float* hidden) const;
  // logits: [rows][vocabulary].
  void Logits(size_t rows, const float* hidden, float* logits) const;

 private:
  explicit Decoder(std::unique_ptr<const ModelWeights> weights);
  const std::unique_ptr<const ModelWeights> weights_;
};

// What dense prefill of a prompt leaves behind, per layer.
struct PromptLayer {
  // [kv_head][token][head_dim] bf16 bits, K rotated.
  std::vector<uint16_t> k, v;
  // [query_count][query_head][head_dim]: the last prompt queries, rotated, oldest first.
  std::vector<float> queries;
  // [query_head][token]: softmax attention summed over all prompt queries; those of a layer with a
  // window weigh the tokens in their window only.
  std::vector<float> attention_sum;
};
struct PromptCache {
  std::vector<uint32_t> tokens;
  uint32_t query_count = 0;
  std::vector<PromptLayer> layers;
  // [vocabulary], after the last token.
  std::vector<float> last_logits;
};

struct PrefillOptions {
  uint32_t thread_count = 1;
  uint32_t chunk_tokens = 256;
  // Queries to keep per layer (fewer if the prompt is shorter).
  uint32_t query_count = 512;
};

// Dense float32 attention over the bf16-rounded K and V, or over the window of layers that have
// one. Requires a token. The result does not depend on thread_count. Memory beside the result is
// about 3 x tokens x (query_heads x head_dim + hidden) floats and one tile of scores per thread.
PromptCache Prefill(const Decoder& decoder, absl::Span<const uint32_t> tokens,
                    const PrefillOptions& options);

// A prompt cache as a file, so that a second run skips the prefill. Read checks that it belongs to
// the same model and tokens (NOT_FOUND otherwise).
absl::Status WritePromptCache(const Decoder& decoder, const PromptCache& prompt,
                              const std::string& path);
absl::StatusOr<PromptCache> ReadPromptCache(const Decoder& decoder,
                                            absl::Span<const uint32_t> tokens,
                                            const std::string& path);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_DECODER_H_
