#include "client/kvctl/show_block.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "client/kvctl/text.h"

namespace kvservice::client {
namespace {

using Json = nlohmann::ordered_json;

// Tokens of a block (attention/kv_layout.h of the server).
constexpr uint32_t kBlockTokens = 64;

std::string Digits(double value, const char* format) {
  char text[32];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

std::string NormText(double norm) { return Digits(norm, "%.3g"); }

std::string TiersText(const v1::DescribeBlockResponse& block) {
  std::string text;
  for (const std::string& tier : block.tiers()) text += (text.empty() ? "" : "+") + tier;
  return text;
}

// The largest and the mean share over the query heads; "-" if they are not known.
std::string AttentionText(const v1::DescribedSlice& slice) {
  if (slice.attention_mass().empty()) return "-";
  double sum = 0.0;
  for (const float mass : slice.attention_mass()) sum += static_cast<double>(mass);
  const double largest = static_cast<double>(
      *std::max_element(slice.attention_mass().begin(), slice.attention_mass().end()));
  return Digits(100.0 * largest, "%.2f%%") + ", mean " +
         Digits(100.0 * sum / slice.attention_mass_size(), "%.2f%%");
}

}  // namespace

Json ToJson(const v1::DescribeBlockResponse& block) {
  Json slices = Json::array();
  for (const v1::DescribedSlice& slice : block.slices()) {
    slices.push_back({{"layer", slice.layer()},
                      {"token_count", slice.token_count()},
                      {"on_disk", slice.on_disk()},
                      {"checksum", HexOfId(slice.checksum())},
                      {"key_norm_max", slice.key_norm_max()},
                      {"key_norm_mean", slice.key_norm_mean()},
                      {"value_norm_max", slice.value_norm_max()},
                      {"value_norm_mean", slice.value_norm_mean()},
                      {"attention_mass", std::vector<float>(slice.attention_mass().begin(),
                                                            slice.attention_mass().end())}});
  }
  return {{"block_index", block.first_token() / kBlockTokens},
          {"first_token", block.first_token()},
          {"tiers", std::vector<std::string>(block.tiers().begin(), block.tiers().end())},
          {"sealed", block.sealed()},
          {"shared", block.shared()},
          {"bytes", block.bytes()},
          {"slices", std::move(slices)}};
}

std::string ToTable(const v1::DescribeBlockResponse& block) {
  std::vector<Row> rows = {
      {"LAYER", "TOKENS", "DISK", "CHECKSUM", "KEY NORM", "VALUE NORM", "ATTENTION"}};
  for (const v1::DescribedSlice& slice : block.slices()) {
    rows.push_back(
        {std::to_string(slice.layer()), std::to_string(slice.token_count()),
         slice.on_disk() ? "yes" : "no", HexOfId(slice.checksum()),
         NormText(slice.key_norm_max()) + ", mean " + NormText(slice.key_norm_mean()),
         NormText(slice.value_norm_max()) + ", mean " + NormText(slice.value_norm_mean()),
         AttentionText(slice)});
  }
  return Table({{"first token", std::to_string(block.first_token())},
                {"tiers", TiersText(block)},
                {"sealed", block.sealed() ? "yes" : "no"},
                {"shared with a fork", block.shared() ? "yes" : "no"},
                {"memory", BytesText(block.bytes())}}) +
         "\n" + Table(rows);
}

std::string ToTable(const std::vector<v1::DescribeBlockResponse>& blocks, bool with_attention) {
  std::vector<Row> rows = {
      {"BLOCK", "TOKENS", "TIERS", "SEALED", "SHARED", "KEY NORM", "VALUE NORM"}};
  if (with_attention) rows[0].emplace_back("ATTENTION");
  for (const v1::DescribeBlockResponse& block : blocks) {
    uint32_t tokens = 0;
    double key_norm = 0.0;
    double value_norm = 0.0;
    for (const v1::DescribedSlice& slice : block.slices()) {
      tokens = std::max(tokens, slice.token_count());
      key_norm = std::max(key_norm, slice.key_norm_max());
      value_norm = std::max(value_norm, slice.value_norm_max());
    }
    rows.push_back({std::to_string(block.first_token() / kBlockTokens), std::to_string(tokens),
                    TiersText(block), block.sealed() ? "yes" : "no", block.shared() ? "yes" : "no",
                    NormText(key_norm), NormText(value_norm)});
    if (with_attention && !block.slices().empty()) {
      rows.back().push_back(AttentionText(block.slices(0)));
    }
  }
  return Table(rows);
}

}  // namespace kvservice::client
