// kvlogits: next-token logits of a decoder with dense attention, to be compared with another
// implementation of the same model.
//
//     kvlogits --model=FILE --tokens=FILE --prefill=N --out=FILE
//
// --tokens is a JSON list. The first N tokens are prefilled, each later one is a decode step; the
// output is float32 [tokens - N + 1][vocabulary]: the logits after token N - 1 and each later one.
// Exit status 2: something could not be read or written.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "attention/float16.h"
#include "nlohmann/json.hpp"
#include "tests/eval/decoder.h"

namespace kvservice::eval {
namespace {

constexpr int kCannot = 2;

struct Arguments {
  std::string model, tokens, out;
  uint32_t prefill = 1;
  PrefillOptions options;
};

// K and V of a layer, [token][kv_head][head_dim], widened.
struct Rows {
  std::vector<float> k, v;
};

void AppendRow(const uint16_t* k, const uint16_t* v, size_t count, Rows* rows) {
  for (size_t i = 0; i < count; ++i) {
    rows->k.push_back(FloatFromBfloat16(k[i]));
    rows->v.push_back(FloatFromBfloat16(v[i]));
  }
}

std::vector<Rows> FromPrompt(const DecoderShape& shape, const PromptCache& prompt) {
  const size_t count = prompt.tokens.size(), dim = shape.head_dim;
  std::vector<Rows> layers(shape.layer_count);
  for (uint32_t layer = 0; layer < shape.layer_count; ++layer) {
    for (size_t token = 0; token < count; ++token) {
      for (size_t head = 0; head < shape.kv_head_count; ++head) {
        const size_t offset = (head * count + token) * dim;
        AppendRow(&prompt.layers[layer].k[offset], &prompt.layers[layer].v[offset], dim,
                  &layers[layer]);
      }
    }
  }
  return layers;
}

// Dense attention of one query head, in double; k and v: [tokens] rows, `stride` floats apart.
void AttendHead(const DecoderShape& shape, const float* q, const float* k, const float* v,
                size_t stride, size_t token_count, float* out) {
  std::vector<double> weights(token_count);
  for (size_t token = 0; token < token_count; ++token) {
    double score = 0;
    for (uint32_t i = 0; i < shape.head_dim; ++i) score += double{q[i]} * k[token * stride + i];
    weights[token] = shape.scale * score;
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  double total = 0;
  for (double& weight : weights) total += weight = std::exp(weight - largest);
  for (uint32_t i = 0; i < shape.head_dim; ++i) {
    double sum = 0;
    for (size_t token = 0; token < token_count; ++token) {
      sum += weights[token] * v[token * stride + i];
    }
    out[i] = static_cast<float>(sum / total);
  }
}

std::vector<float> Step(const Decoder& decoder, uint32_t token, uint32_t position,
                        std::vector<Rows>* layers) {
  const DecoderShape& shape = decoder.shape();
  const size_t dim = shape.head_dim, kv_width = shape.kv_head_count * dim;
  const uint32_t group = shape.query_head_count / shape.kv_head_count;
  std::vector<float> hidden(shape.hidden), q(shape.query_head_count * dim), attention(q.size());
  std::vector<uint16_t> k(kv_width), v(kv_width);
  decoder.Embed({token}, hidden.data());
  for (uint32_t layer = 0; layer < shape.layer_count; ++layer) {
    decoder.Project(layer, {position}, hidden.data(), q.data(), k.data(), v.data());
    Rows& rows = (*layers)[layer];
    AppendRow(k.data(), v.data(), kv_width, &rows);
    const size_t length = position + 1;
    const size_t seen =
        shape.windows[layer] == 0 ? length : std::min<size_t>(length, shape.windows[layer]);
    for (uint32_t head = 0; head < shape.query_head_count; ++head) {
      const size_t offset = (length - seen) * kv_width + head / group * dim;
      AttendHead(shape, &q[head * dim], &rows.k[offset], &rows.v[offset], kv_width, seen,
                 &attention[head * dim]);
    }
    decoder.Finish(layer, 1, attention.data(), hidden.data());
  }
  std::vector<float> logits(shape.vocabulary);
  decoder.Logits(1, hidden.data(), logits.data());
  return logits;
}

bool Write(const std::vector<float>& logits, std::ostream& file) {
  file.write(reinterpret_cast<const char*>(logits.data()),
             static_cast<std::streamsize>(logits.size() * sizeof(float)));
  return static_cast<bool>(file);
}

bool ReadTokens(const std::string& path, uint32_t vocabulary, std::vector<uint32_t>* tokens) {
  std::ifstream file(path);
  const nlohmann::json list = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!list.is_array() || list.empty()) return false;
  for (const nlohmann::json& token : list) {
    if (!token.is_number_unsigned() || token.get<uint64_t>() >= vocabulary) return false;
    tokens->push_back(token.get<uint32_t>());
  }
  return true;
}

int Run(const Arguments& arguments) {
  auto decoder = Decoder::Load(arguments.model);
  if (!decoder.ok()) {
    std::cerr << "--model: " << decoder.status().message() << "\n";
    return kCannot;
  }
  std::vector<uint32_t> tokens;
  if (!ReadTokens(arguments.tokens, (*decoder)->shape().vocabulary, &tokens) ||
      arguments.prefill == 0 || arguments.prefill > tokens.size()) {
    std::cerr << "--tokens: expected a JSON list of at least --prefill tokens of the model\n";
    return kCannot;
  }
  const auto started = std::chrono::steady_clock::now();
  const PromptCache prompt =
      Prefill(**decoder, absl::MakeConstSpan(tokens).first(arguments.prefill), arguments.options);
  const std::chrono::duration<double> prefill_s = std::chrono::steady_clock::now() - started;
  std::cerr << "prefill of " << arguments.prefill << " tokens: " << prefill_s.count() << " s\n";
  std::ofstream file(arguments.out, std::ios::binary);
  bool ok = Write(prompt.last_logits, file);
  std::vector<Rows> layers = FromPrompt((*decoder)->shape(), prompt);
  for (uint32_t i = arguments.prefill; i < tokens.size() && ok; ++i) {
    ok = Write(Step(**decoder, tokens[i], i, &layers), file);
  }
  if (!ok || !file.flush()) {
    std::cerr << "--out: cannot write " << arguments.out << "\n";
    return kCannot;
  }
  return 0;
}

}  // namespace
}  // namespace kvservice::eval

int main(int argc, char** argv) {
  kvservice::eval::Arguments arguments;
  CLI::App app("Next-token logits with dense attention");
  app.add_option("--model", arguments.model, "A .kvmodel file")->required();
  app.add_option("--tokens", arguments.tokens, "A JSON list of token ids")->required();
  app.add_option("--out", arguments.out, "Write float32 logits here")->required();
  app.add_option("--prefill", arguments.prefill, "Tokens of the prompt (default: 1)");
  app.add_option("--threads", arguments.options.thread_count, "Threads of the prefill (default: 1)")
      ->check(CLI::Range(1, 256));
  CLI11_PARSE(app, argc, argv);
  return kvservice::eval::Run(arguments);
}
