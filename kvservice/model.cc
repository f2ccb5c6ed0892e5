#include "kvservice/model.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "attention/sketch.h"
#include "kvservice/error.h"
#include "kvservice/sha256.h"

namespace kvservice {
namespace {

constexpr char kReason[] = "MODEL_INVALID";

template <typename... Parts>
absl::Status Invalid(std::string_view field, const Parts&... parts) {
  return InvalidField(
      absl::StrCat("model.", absl::string_view(field.data(), field.size())), kReason,
      absl::StrCat("model.", absl::string_view(field.data(), field.size()), " ", parts...));
}

// Errors of lower layers begin with the name of the field; `prefix` is where that field is here.
absl::Status Nested(std::string_view prefix, const absl::Status& status) {
  if (status.ok()) return status;
  const std::string message =
      absl::StrCat(absl::string_view(prefix.data(), prefix.size()), status.message());
  return InvalidField(message.substr(0, message.find(' ')), kReason, message);
}

absl::Status CheckCounts(const ModelSpec& spec) {
  if (spec.name.empty() || spec.name.size() > kModelNameBytesMax) {
    return Invalid("name", "has ", spec.name.size(), " bytes, expected 1 to ", kModelNameBytesMax);
  }
  if (spec.layer_count == 0 || spec.layer_count > kLayersMax) {
    return Invalid("layer_count", "is ", spec.layer_count, ", expected 1 to ", kLayersMax);
  }
  if (spec.layout.kv_head_count > kKvHeadsMax) {
    return Invalid("kv_head_count", "is ", spec.layout.kv_head_count, ", expected 1 to ",
                   kKvHeadsMax);
  }
  const absl::Status layout = ValidateLayout(spec.layout);
  // The API calls the layout's dtype cache_dtype.
  const bool of_dtype = !layout.ok() && layout.message().substr(0, 6) == "dtype ";
  return Nested(of_dtype ? "model.cache_" : "model.", layout);
}

absl::Status CheckAttention(const ModelSpec& spec) {
  if (!(std::isfinite(spec.scale) && spec.scale > 0.0F)) {
    return Invalid("scale", "is ", spec.scale, ", expected a positive number");
  }
  if (!(std::isfinite(spec.logit_softcap) && spec.logit_softcap >= 0.0F)) {
    return Invalid("logit_softcap", "is ", spec.logit_softcap, ", expected 0 or a positive number");
  }
  if (!spec.sliding_windows.empty() && spec.sliding_windows.size() != spec.layer_count) {
    return Invalid("sliding_window_tokens", "has ", spec.sliding_windows.size(),
                   " entries, expected none or ", spec.layer_count);
  }
  return absl::OkStatus();
}

absl::Status CheckRotary(const ModelSpec& spec) {
  const size_t count = spec.inverse_frequencies.size();
  if (spec.rotary_style > RotaryStyle::kInterleaved) {
    return Invalid("rotary_style", "is ", static_cast<int>(spec.rotary_style),
                   ", expected a known value");
  }
  if (spec.rotary_style == RotaryStyle::kNone && count != 0) {
    return Invalid("inverse_frequencies", "has ", count,
                   " entries, expected none without rotation");
  }
  if (spec.rotary_style != RotaryStyle::kNone && (count == 0 || count > spec.layout.head_dim / 2)) {
    return Invalid("inverse_frequencies", "has ", count, " entries, expected 1 to ",
                   spec.layout.head_dim / 2);
  }
  for (size_t i = 0; i < count; ++i) {
    const float frequency = spec.inverse_frequencies[i];
    if (!(std::isfinite(frequency) && frequency >= 0.0F)) {
      return Invalid("inverse_frequencies", "has ", frequency, " at ", i,
                     ", expected 0 or a positive number");
    }
  }
  return absl::OkStatus();
}

absl::Status PrepareTables(ModelSpec* spec) {
  const size_t count = static_cast<size_t>(spec->layer_count) * spec->layout.kv_head_count;
  if (spec->sketch_tables.empty()) {
    spec->sketch_tables.assign(count, IdentitySketchTable(spec->layout.head_dim));
    return absl::OkStatus();
  }
  if (spec->sketch_tables.size() != count) {
    return Invalid("sketch_tables", "has ", spec->sketch_tables.size(), " tables, expected ",
                   count);
  }
  for (size_t i = 0; i < count; ++i) {
    const absl::Status status =
        NormalizeSketchTable(spec->layout.head_dim, &spec->sketch_tables[i]);
    if (!status.ok()) return Nested(absl::StrCat("model.sketch_tables[", i, "]."), status);
  }
  return absl::OkStatus();
}

// Feeds numbers to the digest in one byte order.
class FingerprintWriter {
 public:
  void Number(uint64_t value) {
    std::array<std::byte, 8> bytes;
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(value >> (8 * i));
    digest_.Update(bytes);
  }
  void Float(float value) { Number(std::bit_cast<uint32_t>(value)); }
  void Floats(const std::vector<float>& values) {
    Number(values.size());
    for (const float value : values) Float(value);
  }
  void Text(const std::string& text) {
    Number(text.size());
    digest_.Update({reinterpret_cast<const std::byte*>(text.data()), text.size()});
  }
  uint64_t Finish() {
    const Sha256::Digest digest = digest_.Finish();
    uint64_t first = 0;
    for (size_t i = 0; i < 8; ++i) first = first << 8 | std::to_integer<uint64_t>(digest[i]);
    return first;
  }

 private:
  Sha256 digest_;
};

}  // namespace

absl::Status ValidateModel(ModelSpec* spec) {
  absl::Status status = CheckCounts(*spec);
  if (status.ok()) status = CheckAttention(*spec);
  if (status.ok()) status = CheckRotary(*spec);
  if (status.ok()) status = PrepareTables(spec);
  if (status.ok()) {
    status = Nested("model.default_", ValidatePolicy(spec->default_policy, spec->layer_count,
                                                     spec->layout.kv_head_count));
  }
  return status;
}

uint64_t ModelFingerprint(const ModelSpec& spec) {
  FingerprintWriter writer;
  writer.Number(kSketchVersion);
  writer.Text(spec.name);
  writer.Number(spec.layer_count);
  writer.Number(spec.layout.query_head_count);
  writer.Number(spec.layout.kv_head_count);
  writer.Number(spec.layout.head_dim);
  writer.Number(static_cast<uint64_t>(spec.layout.dtype));
  writer.Float(spec.scale);
  writer.Float(spec.logit_softcap);
  for (uint32_t layer = 0; layer < spec.layer_count; ++layer) {
    writer.Number(spec.sliding_windows.empty() ? 0 : spec.sliding_windows[layer]);
  }
  writer.Floats(spec.inverse_frequencies);
  writer.Number(static_cast<uint64_t>(spec.rotary_style));
  for (const SketchTable& table : spec.sketch_tables) {
    writer.Floats(table.metric);
    writer.Floats(table.directions);
  }
  return writer.Finish();
}

}  // namespace kvservice
