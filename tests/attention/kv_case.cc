#include "tests/attention/kv_case.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention/float16.h"
#include "attention/sketch.h"

namespace kvservice::testing {
namespace {

// Largest and least normal magnitudes that tests use of a cache type.
float LeastNormal(DType dtype) { return dtype == DType::kFloat16 ? 0x1p-14F : 0x1p-126F; }

DeviceMemory AllocateOrDie(Device* device, size_t bytes) {
  absl::StatusOr<DeviceMemory> memory = device->Allocate(bytes);
  assert(memory.ok());
  return std::move(memory).value();
}

}  // namespace

std::string Name(Keys keys) {
  switch (keys) {
    case Keys::kNormal:
      return "Normal";
    case Keys::kIdentical:
      return "Identical";
    case Keys::kConstantPages:
      return "ConstantPages";
    case Keys::kOpposing:
      return "Opposing";
    case Keys::kCellCorner:
      return "CellCorner";
    case Keys::kEqualLogits:
      return "EqualLogits";
    case Keys::kSubnormal:
      return "Subnormal";
    case Keys::kWideLogits:
      return "WideLogits";
    case Keys::kNotFinite:
      return "NotFinite";
  }
  return "?";
}

std::string Name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBfloat16:
      return "bfloat16";
  }
  return "?";
}

KvCase::KvCase(Device* device, const CaseOptions& options)
    : options_(options), device_(device), random_(options.seed) {
  shape_.layout = options.layout;
  shape_.scale = 1.0F / std::sqrt(static_cast<float>(options.layout.head_dim));
  MakeQueries();
  MakeTables();
  std::vector<float> keys = MakeVectors();
  std::vector<float> values = MakeVectors();
  ShapeKeys(&keys);
  if (options.keys == Keys::kNotFinite) SpoilValues(&keys, &values);
  Store(keys, values);
  Seal();
}

void KvCase::MakeQueries() {
  const KvLayout& layout = options_.layout;
  std::normal_distribution<float> normal;
  queries_.resize(size_t{options_.query_count} * layout.query_head_count * layout.head_dim);
  for (size_t i = 0; i < queries_.size(); ++i) {
    queries_[i] = options_.zero_queries ? 0.0F : 1.5F * normal(random_);
    // Keys of kEqualLogits differ in the first half of the channels only.
    const bool first_half = i % layout.head_dim < layout.head_dim / 2;
    if (options_.keys == Keys::kEqualLogits && first_half) queries_[i] = 0.0F;
  }
}

void KvCase::MakeTables() {
  const KvLayout& layout = options_.layout;
  const uint32_t head_dim = layout.head_dim;
  std::normal_distribution<float> normal;
  for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
    SketchTable table = IdentitySketchTable(head_dim);
    tables_.push_back(table);
    if (options_.tables == Tables::kIdentity) continue;
    const float range = options_.tables == Tables::kDirections ? 0.0F
                        : options_.tables == Tables::kLearnt   ? 0.3F
                                                               : 8.0F;
    for (float& m : table.metric) m = std::exp(range * normal(random_));
    // Nearly orthogonal directions: the first query over the metric, then noise.
    const float* q = &queries_[size_t{kv_head} * layout.group_size() * head_dim];
    for (uint32_t j = 0; j < SketchDirections(head_dim); ++j) {
      float* u = &table.directions[size_t{j} * head_dim];
      float squares = 0.0F;
      for (uint32_t c = 0; c < head_dim; ++c) {
        u[c] = (j == 0 ? q[c] / table.metric[c] : 0.0F) + 0.2F * normal(random_);
        squares += u[c] * u[c];
      }
      for (uint32_t c = 0; c < head_dim; ++c) u[c] /= std::sqrt(squares);
    }
    const absl::Status status = NormalizeSketchTable(head_dim, &table);
    assert(status.ok());
    static_cast<void>(status);
    tables_.back() = std::move(table);
  }
}

std::vector<float> KvCase::MakeVectors() {
  const KvLayout& layout = options_.layout;
  std::normal_distribution<float> normal;
  std::vector<float> offset(layout.head_dim);
  std::vector<float> scale(layout.head_dim);
  for (float& x : offset) x = normal(random_);
  for (float& x : scale) x = std::exp(0.7F * normal(random_) - 0.4F);
  std::vector<float> vectors(size_t{options_.length} * layout.kv_head_count * layout.head_dim);
  for (size_t i = 0; i < vectors.size(); ++i) {
    const size_t c = i % layout.head_dim;
    vectors[i] = offset[c] + scale[c] * normal(random_);
  }
  return vectors;
}

void KvCase::ShapeKeys(std::vector<float>* keys) {
  const KvLayout& layout = options_.layout;
  for (uint32_t token = 0; token < options_.length; ++token) {
    for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
      float* key = &(*keys)[(size_t{token} * layout.kv_head_count + kv_head) * layout.head_dim];
      const float* first = &(*keys)[size_t{kv_head} * layout.head_dim];
      const float* page_first =
          &(*keys)[(size_t{token / kBlockTokens * kBlockTokens} * layout.kv_head_count + kv_head) *
                   layout.head_dim];
      if (options_.keys == Keys::kIdentical) std::copy_n(first, layout.head_dim, key);
      if (options_.keys == Keys::kConstantPages) std::copy_n(page_first, layout.head_dim, key);
      if (options_.keys == Keys::kEqualLogits) {
        std::copy_n(first + layout.head_dim / 2, layout.head_dim / 2, key + layout.head_dim / 2);
      }
      ShapeKey(token, kv_head, key);
    }
  }
}

void KvCase::ShapeKey(uint32_t token, uint32_t kv_head, float* key) {
  const KvLayout& layout = options_.layout;
  const float* q = &queries_[size_t{kv_head} * layout.group_size() * layout.head_dim];
  std::uniform_real_distribution<float> uniform(0.0F, 1.0F);
  const float along = options_.keys == Keys::kNormal && token % 17 == 3 ? 0.25F : 0.0F;
  for (uint32_t c = 0; c < layout.head_dim; ++c) {
    switch (options_.keys) {
      case Keys::kOpposing:
        key[c] = (c % 2 == 0 ? 6e4F : -6e4F) * (token % 2 == 0 ? 1.0F : -1.0F) *
                 (1.0F - 0.01F * uniform(random_));
        break;
      case Keys::kCellCorner: {
        // Cells of one unit; tokens 8 and 9 of every page pin the range to sixteen of them.
        const bool low = token % kBlockTokens == 8;
        const bool high = token % kBlockTokens == 9;
        const auto cell = static_cast<float>(random_() % 8 + 4);
        key[c] = low ? 0.0F : high ? 15.99F : cell + (q[c] > 0.0F ? 0.99F : 0.01F);
        break;
      }
      case Keys::kSubnormal:
        key[c] = LeastNormal(layout.dtype) * (uniform(random_) - 0.5F);
        break;
      case Keys::kWideLogits:
        key[c] = key[c] * 4.0F + q[c] * static_cast<float>(token % 61) * 0.5F;
        break;
      default:
        key[c] += along * q[c];
    }
  }
}

void KvCase::SpoilValues(std::vector<float>* keys, std::vector<float>* values) const {
  const size_t token_floats = size_t{options_.layout.kv_head_count} * options_.layout.head_dim;
  const uint32_t spoilt_key = kBlockTokens + 5;
  const uint32_t spoilt_value = 2 * kBlockTokens + 7;
  if (spoilt_key < options_.length) {
    (*keys)[spoilt_key * token_floats + 3] = std::numeric_limits<float>::infinity();
  }
  if (spoilt_value < options_.length) {
    (*values)[spoilt_value * token_floats] = std::numeric_limits<float>::quiet_NaN();
  }
}

void KvCase::Store(const std::vector<float>& keys, const std::vector<float>& values) {
  const KvLayout& layout = options_.layout;
  std::vector<std::byte> k(keys.size() * ElementBytes(layout.dtype));
  std::vector<std::byte> v(k.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    StoreElement(layout.dtype, keys[i], k.data(), i);
    StoreElement(layout.dtype, values[i], v.data(), i);
  }
  const size_t token_bytes = size_t{layout.kv_head_count} * layout.vector_bytes();
  const SketchLayout sketch(layout.head_dim);
  for (uint32_t begin = 0; begin < options_.length; begin += kBlockTokens) {
    slice_memory_.push_back(AllocateOrDie(device_, layout.slice_bytes()));
    sketch_memory_.push_back(AllocateOrDie(device_, sketch.slice_bytes(layout.kv_head_count)));
    const uint32_t count = std::min(kBlockTokens, options_.length - begin);
    // In two parts, as appends arrive.
    const uint32_t part = count / 3;
    std::byte* slice = slice_memory_.back().data();
    const size_t at = begin * token_bytes;
    const AppendSlice appends[] = {
        {slice, 0, part, &k[at], &v[at]},
        {slice, part, count - part, &k[at] + part * token_bytes, &v[at] + part * token_bytes}};
    device_->Append(layout, appends);
    slices_.push_back(slice);
  }
  ReadBack(slice_memory_, layout.slice_bytes(), &host_slices_);
}

void KvCase::ReadBack(const std::vector<DeviceMemory>& memory, size_t bytes,
                      std::vector<std::vector<std::byte>>* copies) const {
  copies->resize(memory.size());
  std::vector<MemoryCopy> reads;
  for (size_t i = 0; i < memory.size(); ++i) {
    (*copies)[i].resize(bytes);
    reads.push_back({memory[i].data(), (*copies)[i].data(), bytes});
  }
  device_->Copy(reads);
}

const std::byte* KvCase::Row(uint32_t kv_head, uint32_t token) const {
  return host_slices_[token / kBlockTokens].data() +
         options_.layout.RowOffset(kv_head, token % kBlockTokens);
}

void KvCase::SetKey(uint32_t kv_head, uint32_t token, const std::vector<float>& key) {
  const size_t offset = options_.layout.RowOffset(kv_head, token % kBlockTokens);
  std::byte* row = host_slices_[token / kBlockTokens].data() + offset;
  for (size_t c = 0; c < key.size(); ++c) StoreElement(options_.layout.dtype, key[c], row, c);
  const MemoryCopy write{row, slice_memory_[token / kBlockTokens].data() + offset,
                         options_.layout.vector_bytes()};
  device_->Copy({&write, 1});
}

void KvCase::Seal() {
  sketches_.assign(slices_.size(), nullptr);
  std::vector<SealSlice> seals;
  for (uint32_t block = 0; (block + 1) * kBlockTokens <= options_.length; ++block) {
    seals.push_back({slices_[block], sketch_memory_[block].data(), block, tables_});
    sketches_[block] = sketch_memory_[block].data();
  }
  device_->Seal(options_.layout, seals);
  const SketchLayout sketch(options_.layout.head_dim);
  ReadBack(sketch_memory_, sketch.slice_bytes(options_.layout.kv_head_count), &host_sketches_);
}

bool KvCase::IsExact(uint32_t kv_head, uint32_t token, uint32_t length) const {
  const uint32_t block = token / kBlockTokens;
  if ((block + 1) * kBlockTokens > length) return true;
  const SketchLayout layout(options_.layout.head_dim);
  const SketchPage page(layout, host_sketches_[block].data() + kv_head * layout.page_bytes);
  return ((page.exact >> (token % kBlockTokens)) & 1) != 0;
}

KvView KvCase::View(uint32_t length) const {
  auto sketches = std::make_unique<std::vector<const std::byte*>>(
      sketches_.begin(), sketches_.begin() + BlockCount(length));
  if (length % kBlockTokens != 0) sketches->back() = nullptr;
  KvView view;
  view.slices = absl::MakeConstSpan(slices_.data(), BlockCount(length));
  view.sketches = *sketches;
  view.length = length;
  views_.push_back(std::move(sketches));
  return view;
}

Call::Call(const KvCase& kv, uint32_t length, uint32_t query_count,
           const std::vector<float>& queries, const Plan& plan)
    : q(queries) {
  const KvLayout& layout = kv.options().layout;
  const size_t head_count = size_t{query_count} * layout.query_head_count;
  assert(q.size() == head_count * layout.head_dim);
  // What a device forgets to write is found.
  const float poison = std::numeric_limits<float>::quiet_NaN();
  out.assign(q.size(), poison);
  lse.assign(head_count, poison);
  certificates.resize(head_count);
  groups.resize(layout.kv_head_count);
  selected.assign(layout.kv_head_count, {});
  row.view = kv.View(length);
  row.position = length - query_count;
  row.query_count = query_count;
  row.q = q.data();
  row.plan = plan;
  row.tables = kv.tables();
  row.out = out.data();
  row.lse = lse.data();
  row.certificates = certificates.data();
  row.groups = groups.data();
  row.selected = selected.data();
  row.status = absl::UnknownError("not executed");
}

void Call::Run(Device* device, const LayerShape& shape) {
  device->Attend(shape, absl::MakeSpan(&row, 1));
}

}  // namespace kvservice::testing
