#include "tests/eval/model_file.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "attention/float16.h"
#include "tests/eval/fingerprint.h"

namespace kvservice::eval {
namespace {

constexpr std::array<char, 8> kMagic = {'K', 'V', 'M', 'O', 'D', 'E', 'L', '1'};
// More than any small model has: what a damaged header may make the reader allocate.
constexpr uint32_t kCountMax = uint32_t{1} << 20;
constexpr uint32_t kLayersMax = 1024;

struct Fixed {
  std::array<char, 8> magic;
  uint32_t family, layers, query_heads, kv_heads, head_dim, hidden, feed_forward, vocabulary;
  float scale, norm_epsilon;
};
static_assert(sizeof(Fixed) == 48);

absl::Status CheckFixed(const Fixed& fixed) {
  if (fixed.magic != kMagic) return absl::InvalidArgumentError("magic is not that of a model");
  if (fixed.family > static_cast<uint32_t>(Family::kGemma3)) {
    return absl::InvalidArgumentError(
        absl::StrCat("family is ", fixed.family, ", expected 0 or 1"));
  }
  if (fixed.layers == 0 || fixed.layers > kLayersMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("layers is ", fixed.layers, ", expected 1 to ", kLayersMax));
  }
  for (const uint32_t count : {fixed.query_heads, fixed.kv_heads, fixed.head_dim, fixed.hidden,
                               fixed.feed_forward, fixed.vocabulary}) {
    if (count == 0 || count > kCountMax) {
      return absl::InvalidArgumentError(absl::StrCat("a count is ", count, ", expected 1 to 2^20"));
    }
  }
  if (fixed.query_heads % fixed.kv_heads != 0 || fixed.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(fixed.query_heads, " query heads over ",
                                                   fixed.kv_heads, " KV heads of ", fixed.head_dim,
                                                   " channels"));
  }
  if (!(fixed.scale > 0.0F) || !std::isfinite(fixed.scale) || !(fixed.norm_epsilon >= 0.0F) ||
      !std::isfinite(fixed.norm_epsilon)) {
    return absl::InvalidArgumentError("scale or norm_epsilon is not a positive number");
  }
  return absl::OkStatus();
}

// Reads one part after the other; the first that fails makes all later ones fail.
class Reader {
 public:
  explicit Reader(const std::string& path) : file_(path, std::ios::binary) {}

  bool ok() const { return ok_; }
  bool is_open() const { return file_.is_open(); }
  uint64_t fingerprint() const { return fingerprint_; }

  template <typename Number>
  void Raw(Number* out, size_t count) {
    file_.read(reinterpret_cast<char*>(out), static_cast<std::streamsize>(count * sizeof(Number)));
    ok_ = ok_ && static_cast<bool>(file_);
    if (ok_) fingerprint_ = Fingerprint(fingerprint_, out, count * sizeof(Number));
  }

  void Floats(std::vector<float>* out, size_t count) {
    out->resize(count);
    Raw(out->data(), count);
    for (const float value : *out) ok_ = ok_ && std::isfinite(value);
  }

  // f16 in the file.
  void Matrix(std::vector<float>* out, size_t rows, size_t columns) {
    out->resize(rows * columns);
    std::vector<uint16_t> bits(columns);
    constexpr uint16_t kExponent = 0x7c00;
    for (size_t row = 0; row < rows && ok_; ++row) {
      Raw(bits.data(), columns);
      bool finite = true;
      for (size_t i = 0; i < columns; ++i) {
        finite &= (bits[i] & kExponent) != kExponent;
        (*out)[row * columns + i] = FloatFromFloat16(bits[i]);
      }
      ok_ = ok_ && finite;
    }
  }

 private:
  std::ifstream file_;
  uint64_t fingerprint_ = kFingerprintStart;
  bool ok_ = true;
};

void ReadLayer(const DecoderShape& shape, Reader* reader, LayerWeights* layer) {
  const bool is_gemma = shape.family == Family::kGemma3;
  const size_t head_rows = size_t{shape.query_head_count + 2 * shape.kv_head_count};
  reader->Floats(&layer->attention_norm, shape.hidden);
  reader->Matrix(&layer->qkv, head_rows * shape.head_dim, shape.hidden);
  if (is_gemma) reader->Floats(&layer->q_norm, shape.head_dim);
  if (is_gemma) reader->Floats(&layer->k_norm, shape.head_dim);
  reader->Matrix(&layer->output, shape.hidden, size_t{shape.query_head_count} * shape.head_dim);
  if (is_gemma) reader->Floats(&layer->post_attention, shape.hidden);
  reader->Floats(&layer->feed_forward_norm, shape.hidden);
  reader->Matrix(&layer->gate_up, size_t{2} * shape.feed_forward, shape.hidden);
  reader->Matrix(&layer->down, shape.hidden, shape.feed_forward);
  if (is_gemma) reader->Floats(&layer->post_feed_forward, shape.hidden);
}

// Bytes of a file with this header.
uint64_t ExpectedBytes(const Fixed& fixed) {
  const bool is_gemma = fixed.family == static_cast<uint32_t>(Family::kGemma3);
  const uint64_t hidden = fixed.hidden;
  const uint64_t query_channels = uint64_t{fixed.query_heads} * fixed.head_dim;
  const uint64_t kv_channels = uint64_t{fixed.kv_heads} * fixed.head_dim;
  const uint64_t f16 =
      2 * hidden * (2 * query_channels + 2 * kv_channels + uint64_t{3} * fixed.feed_forward);
  const uint64_t f32 =
      4 * (2 * hidden + (is_gemma ? 2 * hidden + uint64_t{2} * fixed.head_dim : 0));
  const uint64_t header = 4 + uint64_t{2} * fixed.head_dim;
  return sizeof(Fixed) + 2 * hidden * fixed.vocabulary + 4 * hidden +
         fixed.layers * (header + f16 + f32);
}

DecoderShape MakeShape(const Fixed& fixed, const std::string& path) {
  DecoderShape shape;
  shape.name = std::filesystem::path(path).stem().string();
  shape.family = static_cast<Family>(fixed.family);
  shape.layer_count = fixed.layers;
  shape.query_head_count = fixed.query_heads;
  shape.kv_head_count = fixed.kv_heads;
  shape.head_dim = fixed.head_dim;
  shape.hidden = fixed.hidden;
  shape.feed_forward = fixed.feed_forward;
  shape.vocabulary = fixed.vocabulary;
  shape.scale = fixed.scale;
  shape.norm_epsilon = fixed.norm_epsilon;
  return shape;
}

}  // namespace

absl::StatusOr<std::unique_ptr<const ModelWeights>> ReadModelFile(const std::string& path) {
  Reader reader(path);
  if (!reader.is_open()) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  Fixed fixed;
  reader.Raw(&fixed, 1);
  if (!reader.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": magic is missing: too short"));
  }
  const absl::Status status = CheckFixed(fixed);
  if (!status.ok()) return absl::InvalidArgumentError(absl::StrCat(path, ": ", status.message()));
  const uint64_t size = std::filesystem::file_size(path);
  if (size != ExpectedBytes(fixed)) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": the file has ", size, " bytes, its header says ", ExpectedBytes(fixed)));
  }
  auto weights = std::make_unique<ModelWeights>();
  weights->shape = MakeShape(fixed, path);
  DecoderShape& shape = weights->shape;
  shape.windows.resize(shape.layer_count);
  reader.Raw(shape.windows.data(), shape.layer_count);
  shape.inverse_frequencies.resize(shape.layer_count);
  for (std::vector<float>& row : shape.inverse_frequencies) reader.Floats(&row, shape.head_dim / 2);
  reader.Matrix(&weights->embedding, shape.vocabulary, shape.hidden);
  reader.Floats(&weights->output_norm, shape.hidden);
  weights->layers.resize(shape.layer_count);
  for (LayerWeights& layer : weights->layers) ReadLayer(shape, &reader, &layer);
  if (!reader.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": a weight is not a finite number"));
  }
  weights->fingerprint = reader.fingerprint();
  return weights;
}

}  // namespace kvservice::eval
