#include "tests/bench/decode_data.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/bench/layer_data.h"
#include "tests/eval/trace.h"

namespace kvservice::bench {
namespace {

// One token in so many is hot; together they carry .97 of the mass.
constexpr uint32_t kHotEvery = 50;
constexpr float kHotNats = 8.0F;
// Tokens that are made; longer sequences repeat them, each from a place of its own.
constexpr uint32_t kMadeTokensMax = 16384;
constexpr uint32_t kShiftTokens = 1111;

LayerOptions PlantedOptions(uint32_t tokens) {
  return {.layout = {.query_head_count = 32, .kv_head_count = 8, .head_dim = 128},
          .length = tokens,
          .hot_tokens = tokens / kHotEvery,
          .hot_nats = kHotNats};
}

class PlantedData : public DecodeData {
 public:
  PlantedData(uint32_t batch, uint32_t prompt_tokens, uint32_t step_count, uint32_t list_tokens)
      : made_(std::min(prompt_tokens, kMadeTokensMax)), source_(PlantedOptions(made_), Scale(128)) {
    layout_ = PlantedOptions(made_).layout;
    batch_ = batch;
    prompt_tokens_ = prompt_tokens;
    step_count_ = step_count;
    list_tokens_ = list_tokens;
    name_ = absl::StrCat("B", batch, "_L", prompt_tokens);
    model_ = {.name = "planted",
              .layer_count = 1,
              .query_head_count = layout_.query_head_count,
              .kv_head_count = layout_.kv_head_count,
              .head_dim = layout_.head_dim,
              .scale = Scale(layout_.head_dim)};
    k_.resize(made_ * token_bytes());
    v_.resize(k_.size());
    for (uint32_t t = 0; t < made_; ++t) {
      source_.Token(t, &k_[t * token_bytes()], &v_[t * token_bytes()]);
    }
  }

  // Token t of sequence b is made token t + b * kShiftTokens, modulo their number.
  void Tokens(uint32_t /*layer*/, uint32_t sequence, uint32_t first, uint32_t count, std::byte* k,
              std::byte* v) override {
    const size_t bytes = token_bytes();
    for (uint32_t i = 0; i < count; ++i) {
      const size_t at = (first + i + uint64_t{sequence} * kShiftTokens) % made_ * bytes;
      std::memcpy(k + i * bytes, &k_[at], bytes);
      std::memcpy(v + i * bytes, &v_[at], bytes);
    }
  }

  std::vector<float> Queries(uint32_t /*layer*/, uint32_t /*position*/) override {
    std::vector<float> all;
    for (uint32_t b = 0; b < batch_; ++b) {
      const std::vector<float> queries = source_.Queries();
      all.insert(all.end(), queries.begin(), queries.end());
    }
    return all;
  }

 private:
  static float Scale(uint32_t head_dim) { return 1.0F / std::sqrt(static_cast<float>(head_dim)); }

  const uint32_t made_;
  LayerSource source_;
  std::vector<std::byte> k_, v_;
};

// Rotation of the models that traces come from; a trace does not say it.
void SetRotation(const std::string& model, client::ModelDescription* description) {
  if (model != "smollm2") return;
  constexpr double kBase = 100000.0;
  const uint32_t dim = description->head_dim;
  description->rotary_style = client::RotaryStyle::kHalf;
  for (uint32_t c = 0; c < dim / 2; ++c) {
    description->inverse_frequencies.push_back(
        static_cast<float>(std::pow(kBase, -2.0 * c / static_cast<double>(dim))));
  }
}

class TraceData : public DecodeData {
 public:
  static absl::StatusOr<std::unique_ptr<DecodeData>> Make(const std::string& path, uint32_t batch,
                                                          uint32_t step_count) {
    auto data = std::make_unique<TraceData>();
    auto header = eval::ReadTraceHeader(path);
    if (!header.ok()) return header.status();
    data->first_judged_ = header->judged.front();
    data->layout_ = header->layout;
    data->begins_at_first_layer_ = header->layers.front() == 0;
    data->batch_ = batch;
    data->prompt_tokens_ = data->first_judged_ + 1;
    data->step_count_ = std::min(step_count, static_cast<uint32_t>(header->judged.size()) - 1);
    data->list_tokens_ = 512;
    data->name_ = absl::StrCat(header->name, "_B", batch);
    data->model_ = {.name = header->name,
                    .layer_count = static_cast<uint32_t>(header->layers.size()),
                    .query_head_count = header->layout.query_head_count,
                    .kv_head_count = header->layout.kv_head_count,
                    .head_dim = header->layout.head_dim,
                    .scale = header->scale};
    SetRotation(header->model, &data->model_);
    for (size_t index = 0; index < header->layers.size(); ++index) {
      auto layer = eval::ReadTraceLayer(*header, index);
      if (!layer.ok()) return layer.status();
      for (const SketchTable& table : eval::LearnTables(*header, *layer)) {
        auto& model = data->model_;
        model.sketch_metric.insert(model.sketch_metric.end(), table.metric.begin(),
                                   table.metric.end());
        model.sketch_directions.insert(model.sketch_directions.end(), table.directions.begin(),
                                       table.directions.end());
      }
      layer->sampled.clear();
      data->layers_.push_back(std::move(*layer));
    }
    return data;
  }

  void Tokens(uint32_t layer, uint32_t /*sequence*/, uint32_t first, uint32_t count, std::byte* k,
              std::byte* v) override {
    const size_t bytes = token_bytes();
    std::memcpy(k, &layers_[layer].k[first * bytes], count * bytes);
    std::memcpy(v, &layers_[layer].v[first * bytes], count * bytes);
  }

  std::vector<float> Queries(uint32_t layer, uint32_t position) override {
    const size_t floats = size_t{layout_.query_head_count} * layout_.head_dim;
    const float* from = &layers_[layer].judged[(position - first_judged_) * floats];
    std::vector<float> all;
    for (uint32_t b = 0; b < batch_; ++b) all.insert(all.end(), from, from + floats);
    return all;
  }

 private:
  uint32_t first_judged_ = 0;
  std::vector<eval::TraceLayer> layers_;
};

}  // namespace

std::unique_ptr<DecodeData> MakePlantedData(uint32_t batch, uint32_t prompt_tokens,
                                            uint32_t step_count, uint32_t list_tokens) {
  return std::make_unique<PlantedData>(batch, prompt_tokens, step_count, list_tokens);
}

absl::StatusOr<std::unique_ptr<DecodeData>> MakeTraceData(const std::string& path, uint32_t batch,
                                                          uint32_t step_count) {
  return TraceData::Make(path, batch, step_count);
}

}  // namespace kvservice::bench
