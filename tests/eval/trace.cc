#include "tests/eval/trace.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "attention/float16.h"
#include "attention/sketch.h"
#include "attention/sketch_learning.h"

namespace kvservice::eval {
namespace {

constexpr std::array<char, 8> kMagic = {'K', 'V', 'T', 'R', 'A', 'C', 'E', '1'};
// More than any trace has: what a damaged header may make the reader allocate.
constexpr uint32_t kCountMax = uint32_t{1} << 20;

struct Fixed {
  std::array<char, 8> magic;
  uint32_t layers, query_heads, kv_heads, head_dim, tokens, judged, sampled;
  float scale;
};
static_assert(sizeof(Fixed) == 40);

template <typename Number>
bool Read(std::istream& file, size_t count, std::vector<Number>* out) {
  out->resize(count);
  file.read(reinterpret_cast<char*>(out->data()),
            static_cast<std::streamsize>(count * sizeof(Number)));
  return static_cast<bool>(file);
}

absl::Status CheckPositions(const std::string& field, const std::vector<uint32_t>& positions,
                            uint32_t token_count) {
  if (positions.empty() || *std::max_element(positions.begin(), positions.end()) >= token_count ||
      !std::is_sorted(positions.begin(), positions.end())) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ": expected ascending positions below ", token_count));
  }
  return absl::OkStatus();
}

absl::Status CheckFixed(const Fixed& fixed, const TraceHeader& header) {
  if (fixed.magic != kMagic) return absl::InvalidArgumentError("magic is not that of a trace");
  for (const uint32_t count :
       {fixed.layers, fixed.tokens, fixed.judged, fixed.sampled, fixed.query_heads}) {
    if (count == 0 || count > kCountMax) {
      return absl::InvalidArgumentError(absl::StrCat("a count is ", count, ", expected 1 to 2^20"));
    }
  }
  if (!(fixed.scale > 0.0F)) return absl::InvalidArgumentError("scale is not positive");
  return ValidateLayout(header.layout);
}

bool AllFinite(const std::vector<float>& numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](float x) { return std::isfinite(x); });
}

bool AllFinite(DType dtype, const std::vector<std::byte>& bytes) {
  for (size_t i = 0; i < bytes.size() / ElementBytes(dtype); ++i) {
    if (!std::isfinite(LoadElement(dtype, bytes.data(), i))) return false;
  }
  return true;
}

}  // namespace

size_t TraceHeader::header_bytes() const {
  return sizeof(Fixed) + sizeof(uint32_t) * (layers.size() + judged.size() + sampled.size());
}

size_t TraceHeader::layer_bytes() const {
  const size_t rows = size_t{token_count} * layout.kv_head_count * layout.row_bytes();
  const size_t queries =
      (judged.size() + sampled.size()) * layout.query_head_count * layout.head_dim;
  return rows + queries * sizeof(float);
}

absl::StatusOr<TraceHeader> ReadTraceHeader(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  TraceHeader header;
  header.path = path;
  header.name = std::filesystem::path(path).stem().string();
  header.model = header.name.substr(0, header.name.find('-'));
  Fixed fixed;
  if (!file.read(reinterpret_cast<char*>(&fixed), sizeof(fixed))) {
    return absl::InvalidArgumentError("magic is missing: the file is too short");
  }
  header.layout = {.query_head_count = fixed.query_heads,
                   .kv_head_count = fixed.kv_heads,
                   .head_dim = fixed.head_dim,
                   .dtype = DType::kBfloat16};
  header.token_count = fixed.tokens;
  header.scale = fixed.scale;
  absl::Status status = CheckFixed(fixed, header);
  if (!status.ok()) return status;
  if (!Read(file, fixed.layers, &header.layers) || !Read(file, fixed.judged, &header.judged) ||
      !Read(file, fixed.sampled, &header.sampled)) {
    return absl::InvalidArgumentError("layers, judged or sampled: the file is too short");
  }
  status = CheckPositions("judged", header.judged, fixed.tokens);
  if (status.ok()) status = CheckPositions("sampled", header.sampled, fixed.tokens);
  if (!status.ok()) return status;
  const size_t expected = header.header_bytes() + header.layers.size() * header.layer_bytes();
  const size_t size = std::filesystem::file_size(path);
  if (size != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("the file has ", size, " bytes, its header says ", expected));
  }
  return header;
}

absl::StatusOr<TraceLayer> ReadTraceLayer(const TraceHeader& header, size_t index) {
  std::ifstream file(header.path, std::ios::binary);
  file.seekg(static_cast<std::streamoff>(header.header_bytes() + index * header.layer_bytes()));
  const KvLayout& layout = header.layout;
  const size_t vectors = size_t{header.token_count} * layout.kv_head_count;
  const size_t query_floats = size_t{layout.query_head_count} * layout.head_dim;
  TraceLayer layer;
  if (!Read(file, vectors * layout.vector_bytes(), &layer.k) ||
      !Read(file, vectors * layout.vector_bytes(), &layer.v) ||
      !Read(file, header.judged.size() * query_floats, &layer.judged) ||
      !Read(file, header.sampled.size() * query_floats, &layer.sampled)) {
    return absl::InvalidArgumentError(absl::StrCat(header.path, ": layer ", index, " is cut off"));
  }
  if (!AllFinite(layer.judged) || !AllFinite(layer.sampled) || !AllFinite(layout.dtype, layer.k) ||
      !AllFinite(layout.dtype, layer.v)) {
    return absl::InvalidArgumentError(
        absl::StrCat(header.path, ": layer ", index, " holds a number that is not finite"));
  }
  return layer;
}

std::vector<SketchTable> LearnTables(const TraceHeader& header, const TraceLayer& layer) {
  const KvLayout& layout = header.layout;
  std::vector<SketchTable> tables;
  for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
    SketchStatistics statistics(layout.head_dim);
    for (size_t i = 0; i < header.sampled.size(); ++i) {
      for (uint32_t g = 0; g < layout.group_size(); ++g) {
        const size_t head = size_t{kv_head} * layout.group_size() + g;
        // Finite since it was read.
        (void)statistics.AddQuery(
            &layer.sampled[(i * layout.query_head_count + head) * layout.head_dim]);
      }
    }
    std::vector<std::byte> rows(size_t{kBlockTokens} * layout.row_bytes());
    for (uint32_t block = 0; block < header.token_count / kBlockTokens; ++block) {
      for (uint32_t token = 0; token < kBlockTokens; ++token) {
        const size_t vector =
            (size_t{block} * kBlockTokens + token) * layout.kv_head_count + kv_head;
        std::memcpy(&rows[token * layout.row_bytes()], &layer.k[vector * layout.vector_bytes()],
                    layout.vector_bytes());
      }
      statistics.AddPage(layout, rows.data(), block == 0 ? (uint64_t{1} << kSketchSinks) - 1 : 0);
    }
    tables.push_back(LearnSketchTable(statistics));
  }
  return tables;
}

absl::StatusOr<CachedLayer> CachedLayer::Make(Device* device, const TraceHeader& header,
                                              const TraceLayer& layer,
                                              std::vector<SketchTable> tables) {
  const KvLayout& layout = header.layout;
  const SketchLayout sketch(layout.head_dim);
  CachedLayer cached(device, layout, header.token_count);
  const uint32_t block_count = BlockCount(header.token_count);
  auto slice_memory = device->Allocate(block_count * layout.slice_bytes());
  if (!slice_memory.ok()) return slice_memory.status();
  auto sketch_memory = device->Allocate(block_count * sketch.slice_bytes(layout.kv_head_count));
  if (!sketch_memory.ok()) return sketch_memory.status();
  cached.slice_memory_ = std::move(*slice_memory);
  cached.sketch_memory_ = std::move(*sketch_memory);
  const size_t token_bytes = size_t{layout.kv_head_count} * layout.vector_bytes();
  std::vector<AppendSlice> appends;
  for (uint32_t block = 0; block < block_count; ++block) {
    const uint32_t first = block * kBlockTokens;
    std::byte* slice = cached.slice_memory_.data() + block * layout.slice_bytes();
    appends.push_back({.slice = slice,
                       .token_count = std::min(kBlockTokens, header.token_count - first),
                       .k = &layer.k[first * token_bytes],
                       .v = &layer.v[first * token_bytes]});
    cached.slices_.push_back(slice);
    cached.sketches_.push_back(cached.sketch_memory_.data() +
                               block * sketch.slice_bytes(layout.kv_head_count));
  }
  device->Append(layout, appends);
  cached.Reseal(std::move(tables));
  return cached;
}

void CachedLayer::Reseal(std::vector<SketchTable> tables) {
  tables_ = std::move(tables);
  std::vector<SealSlice> seals;
  for (uint32_t block = 0; block < token_count_ / kBlockTokens; ++block) {
    seals.push_back({.slice = slices_[block],
                     .sketch = const_cast<std::byte*>(sketches_[block]),
                     .block_index = block,
                     .tables = tables_});
  }
  device_->Seal(layout_, seals);
}

KvView CachedLayer::View(uint32_t length) {
  const uint32_t block_count = BlockCount(length);
  view_sketches_.assign(block_count, nullptr);
  std::copy_n(sketches_.begin(), length / kBlockTokens, view_sketches_.begin());
  return {.slices = absl::MakeConstSpan(slices_).first(block_count),
          .sketches = view_sketches_,
          .length = length};
}

const std::byte* CachedLayer::Row(uint32_t kv_head, uint32_t token) const {
  return slices_[token / kBlockTokens] + layout_.RowOffset(kv_head, token % kBlockTokens);
}

}  // namespace kvservice::eval
