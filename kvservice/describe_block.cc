#include "kvservice/describe_block.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "attention/float16.h"
#include "kvservice/engine_errors.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

// The rows of one slice, [kv_head][token_count][K | V][head_dim], on the host.
struct SliceRows {
  const KvLayout& layout;
  uint32_t token_count = 0;
  std::string bytes;

  // Channel 0 of a token's key; its value follows head_dim channels later.
  size_t KeyAt(uint32_t kv_head, uint32_t token) const {
    return (size_t{kv_head} * token_count + token) * 2 * layout.head_dim;
  }
  double Element(size_t index) const {
    return LoadElement(layout.dtype, reinterpret_cast<const std::byte*>(bytes.data()), index);
  }
};

// Of the vectors at KeyAt() + offset.
NormSummary NormsOf(const SliceRows& rows, size_t offset) {
  NormSummary summary;
  for (uint32_t head = 0; head < rows.layout.kv_head_count; ++head) {
    for (uint32_t token = 0; token < rows.token_count; ++token) {
      const size_t at = rows.KeyAt(head, token) + offset;
      double squares = 0.0;
      for (size_t i = 0; i < rows.layout.head_dim; ++i) {
        squares += rows.Element(at + i) * rows.Element(at + i);
      }
      const double norm = std::sqrt(squares);
      summary.max = std::max(summary.max, norm);
      summary.mean += norm;
    }
  }
  summary.mean /= static_cast<double>(rows.layout.kv_head_count) * rows.token_count;
  return summary;
}

// ln of the summed exponentials of all visible logits of a query, [query_count][query_head_count].
std::vector<float> DenseLse(const SequenceRecord& record, uint32_t layer, const LastQuery& query,
                            Device* device) {
  const KvLayout& layout = record.model->spec.layout;
  ViewArrays view;
  std::vector<float> out(query.q.size());
  std::vector<float> lse(size_t{query.query_count} * layout.query_head_count);
  std::vector<HeadCertificate> certificates(lse.size());
  std::vector<GroupReport> groups(layout.kv_head_count);
  AttendRow row;
  row.view = record.cache->View(layer, query.position + query.query_count, &view);
  row.position = query.position;
  row.query_count = query.query_count;
  row.q = query.q.data();
  row.tables = record.tables->shape.TablesOf(layer);
  row.out = out.data();
  row.lse = lse.data();
  row.certificates = certificates.data();
  row.groups = groups.data();
  device->Attend(record.model->layers[layer], absl::MakeSpan(&row, 1));
  return lse;
}

double LogitOf(const LayerShape& shape, const float* q, const SliceRows& rows, size_t key_at) {
  double dot = 0.0;
  for (uint32_t i = 0; i < shape.layout.head_dim; ++i) {
    dot += static_cast<double>(q[i]) * rows.Element(key_at + i);
  }
  const double logit = dot * static_cast<double>(shape.scale);
  const auto softcap = static_cast<double>(shape.logit_softcap);
  return softcap > 0.0 ? softcap * std::tanh(logit / softcap) : logit;
}

// Shares of the query's newest token.
std::vector<double> AttentionMass(const LayerShape& shape, const LastQuery& query,
                                  const std::vector<float>& lse, uint32_t first_token,
                                  const SliceRows& rows) {
  const uint32_t heads = shape.layout.query_head_count;
  const uint32_t newest = query.query_count - 1;
  const uint32_t position = query.position + newest;
  std::vector<double> mass(heads);
  for (uint32_t head = 0; head < heads; ++head) {
    const size_t at = size_t{newest} * heads + head;
    const float* const q = query.q.data() + at * shape.layout.head_dim;
    for (uint32_t token = 0; token < rows.token_count; ++token) {
      const uint32_t where = first_token + token;
      const bool in_window = shape.sliding_window == 0 || position - where < shape.sliding_window;
      if (where > position || !in_window) continue;
      const size_t key_at = rows.KeyAt(head / shape.layout.group_size(), token);
      mass[head] += std::exp(LogitOf(shape, q, rows, key_at) - static_cast<double>(lse[at]));
    }
    mass[head] = std::min(mass[head], 1.0);
  }
  return mass;
}

BlockSlice DescribeSlice(const SequenceRecord& record, uint32_t layer, uint32_t block,
                         bool with_attention, Device* device) {
  const CacheShape& shape = record.tables->shape;
  const uint32_t first_token = block * kBlockTokens;
  BlockSlice slice;
  slice.layer = layer;
  slice.token_count = std::min(record.cache->length(layer) - first_token, kBlockTokens);
  const bool full = slice.token_count == kBlockTokens;
  const size_t row_bytes =
      size_t{slice.token_count} * shape.layout.kv_head_count * shape.layout.row_bytes();
  SliceRows rows{.layout = shape.layout, .token_count = slice.token_count, .bytes = {}};
  rows.bytes.resize(row_bytes + (full ? shape.sketch_bytes : 0));
  auto* const data = reinterpret_cast<std::byte*>(rows.bytes.data());
  record.cache->CopySlice(layer, block, slice.token_count, data, data + row_bytes);
  slice.checksum = ChecksumOf(rows.bytes);
  slice.key = NormsOf(rows, 0);
  slice.value = NormsOf(rows, shape.layout.head_dim);
  slice.is_on_disk = record.stored != nullptr &&
                     record.stored->layers[layer].length >= first_token + slice.token_count;
  const bool kept = layer < record.last_queries.size() && !record.last_queries[layer].q.empty();
  if (with_attention && kept) {
    const LastQuery& query = record.last_queries[layer];
    slice.attention_mass = AttentionMass(record.model->layers[layer], query,
                                         DenseLse(record, layer, query, device), first_token, rows);
  }
  return slice;
}

}  // namespace

absl::Status CheckBlock(const SequenceRecord& record, const BlockAsk& ask) {
  const uint32_t layer_count = record.model->spec.layer_count;
  if (ask.layer.has_value() && *ask.layer >= layer_count) {
    return LayerOutOfRange(*ask.layer, layer_count);
  }
  const uint32_t tokens =
      ask.layer.has_value() ? record.cache->length(*ask.layer) : record.cache->length_max();
  const uint32_t block_count = BlockCount(tokens);
  if (ask.block < block_count) return absl::OkStatus();
  return MakeError(absl::StatusCode::kOutOfRange,
                   absl::StrCat("block_index is ", ask.block, ", there are ", block_count),
                   {.reason = "BLOCK_OUT_OF_RANGE",
                    .field = "block_index",
                    .metadata = {{"block_count", absl::StrCat(block_count)}}});
}

BlockReport DescribeBlock(const SequenceRecord& record, const BlockAsk& ask, Device* device) {
  BlockReport report{.first_token = ask.block * kBlockTokens,
                     .is_shared = record.cache->is_shared(ask.block),
                     .is_on_host = record.cache->is_on_host(ask.block),
                     .bytes = record.tables->shape.block_bytes(),
                     .slices = {}};
  const uint32_t begin = ask.layer.value_or(0);
  const uint32_t end = ask.layer.has_value() ? begin + 1 : record.model->spec.layer_count;
  for (uint32_t layer = begin; layer < end; ++layer) {
    if (record.cache->length(layer) <= report.first_token) continue;
    report.slices.push_back(DescribeSlice(record, layer, ask.block, ask.layer.has_value(), device));
  }
  return report;
}

}  // namespace kvservice
