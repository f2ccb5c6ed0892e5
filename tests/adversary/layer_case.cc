#include "tests/adversary/layer_case.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "attention/float16.h"
#include "attention/lanes.h"

namespace kvservice::adversary {
namespace {

// Tokens 8 and 9 of a page pin the cells of kCellCorner; the sinks of the first page are not in it.
constexpr uint32_t kPinLow = kSketchSinks;
constexpr uint32_t kPinHigh = kSketchSinks + 1;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

float LeastNormal(DType dtype) { return dtype == DType::kFloat16 ? 0x1p-14F : 0x1p-126F; }
float Largest(DType dtype) { return dtype == DType::kFloat16 ? 65504.0F : 0x1p120F; }

// Fills a case whose layout, length and query_count are set.
class Generator {
 public:
  Generator(LayerCase* to, Chance* chance)
      : case_(*to), layout_(to->shape.layout), dim_(to->shape.layout.head_dim), chance_(*chance) {}

  void Run() {
    case_.queries.clear();
    case_.queries.push_back(MakeQueries(case_.traits.queries));
    const uint32_t more = chance_.Below(3);
    if (more > 0) case_.queries.push_back(MoveQueries(case_.queries[0]));
    if (more > 1) case_.queries.push_back(MakeQueries(case_.traits.queries));
    MakeTables();
    keys_ = MakeVectors();
    for (uint32_t kv_head = 0; kv_head < layout_.kv_head_count; ++kv_head) {
      for (uint32_t token = 0; token < case_.length; ++token) ShapeKey(kv_head, token);
    }
    values_ = MakeVectors();
    ShapeValues();
    Spoil();
    case_.k = Stored(keys_);
    case_.v = Stored(values_);
  }

 private:
  float* Key(uint32_t kv_head, uint32_t token) {
    return &keys_[case_.ElementIndex(kv_head, token)];
  }
  // The query that a KV head is attacked with: the first of the last query token.
  const float* Query(uint32_t kv_head) const {
    const size_t token = size_t{case_.query_count - 1} * layout_.query_head_count;
    return &case_.queries[0][(token + size_t{kv_head} * layout_.group_size()) * dim_];
  }

  std::vector<float> MakeQueries(QueryKind kind) {
    std::vector<float> queries(size_t{case_.head_count()} * dim_);
    const float scale = kind == QueryKind::kHuge   ? std::exp(chance_.Uniform() * 70.0F)
                        : kind == QueryKind::kTiny ? std::exp(-chance_.Uniform() * 80.0F)
                                                   : 1.5F;
    const uint32_t one = chance_.Below(dim_);
    for (size_t i = 0; i < queries.size(); ++i) {
      const auto c = static_cast<uint32_t>(i % dim_);
      float& q = queries[i];
      q = scale * chance_.Normal();
      if (kind == QueryKind::kZero || (kind == QueryKind::kOneChannel && c != one)) q = 0.0F;
      if (kind == QueryKind::kAlternating) q = c % 2 == 0 ? scale : -scale;
      // Keys of kEqualLogits differ in the first half of the channels only.
      if (case_.traits.keys == KeyKind::kEqualLogits && c < dim_ / 2) q = 0.0F;
    }
    return queries;
  }

  // Similar enough that a list is reused, or not.
  std::vector<float> MoveQueries(const std::vector<float>& queries) {
    const float by = chance_.OneIn(2) ? 0.1F : 2.0F;
    std::vector<float> moved(queries);
    for (float& q : moved) q += by * std::fabs(q) * chance_.Normal();
    return moved;
  }

  void MakeTables() {
    case_.tables.clear();
    for (uint32_t kv_head = 0; kv_head < layout_.kv_head_count; ++kv_head) {
      case_.tables.push_back(MakeTable(kv_head));
    }
  }

  SketchTable MakeTable(uint32_t kv_head) {
    SketchTable table = IdentitySketchTable(dim_);
    const TableKind kind = case_.traits.tables;
    if (kind == TableKind::kIdentity) return table;
    const float range = kind == TableKind::kLearnt ? 0.3F : kind == TableKind::kExtreme ? 8.0F : 0;
    for (float& m : table.metric) m = std::exp(range * chance_.Normal());
    const float* q = Query(kv_head);
    float q_norm = 0.0F;
    for (uint32_t c = 0; c < dim_; ++c) q_norm = std::max(q_norm, std::fabs(q[c]));
    const bool along = kind != TableKind::kAcross && q_norm > 0.0F;
    for (uint32_t j = 0; j < SketchDirections(dim_); ++j) {
      float* u = &table.directions[size_t{j} * dim_];
      float squares = 0.0F;
      for (uint32_t c = 0; c < dim_; ++c) {
        u[c] = (j == 0 && along ? q[c] / q_norm / table.metric[c] : 0.0F) + 0.2F * chance_.Normal();
        squares += u[c] * u[c];
      }
      for (uint32_t c = 0; c < dim_; ++c) u[c] *= 0.999F / std::sqrt(squares);
    }
    const absl::Status status = NormalizeSketchTable(dim_, &table);
    assert(status.ok());
    return status.ok() ? table : IdentitySketchTable(dim_);
  }

  std::vector<float> MakeVectors() {
    std::vector<float> offset(dim_);
    std::vector<float> scale(dim_);
    for (float& x : offset) x = chance_.Normal();
    for (float& x : scale) x = std::exp(0.7F * chance_.Normal() - 0.4F);
    std::vector<float> vectors(size_t{case_.length} * layout_.kv_head_count * dim_);
    for (size_t first = 0; first < vectors.size(); first += dim_) {
      for (uint32_t c = 0; c < dim_; ++c) {
        vectors[first + c] = offset[c] + scale[c] * chance_.Normal();
      }
    }
    return vectors;
  }

  // Copies the key of another token, channels [begin, dim).
  void CopyKey(uint32_t kv_head, uint32_t from, uint32_t to, uint32_t begin = 0) {
    std::copy_n(Key(kv_head, from) + begin, dim_ - begin, Key(kv_head, to) + begin);
  }

  void ShapeKey(uint32_t kv_head, uint32_t token) {
    float* key = Key(kv_head, token);
    const float* q = Query(kv_head);
    switch (case_.traits.keys) {
      case KeyKind::kNormal:
        if (token % 17 == 3) AddAlong(q, 0.25F, key);
        break;
      case KeyKind::kIdentical:
        return CopyKey(kv_head, 0, token);
      case KeyKind::kConstantPages:
        return CopyKey(kv_head, token / kBlockTokens * kBlockTokens, token);
      case KeyKind::kEqualLogits:
        return CopyKey(kv_head, 0, token, dim_ / 2);
      case KeyKind::kDuplicates:
        return CopyKey(kv_head, token < 3 ? token : chance_.Below(3), token);
      case KeyKind::kOneChannel:
        for (uint32_t c = 1; c < dim_; ++c) key[c] = 0.5F;
        return;
      case KeyKind::kZero:
        std::fill_n(key, dim_, 0.0F);
        return;
      case KeyKind::kWideLogits:
        return AddAlong(q, static_cast<float>(token % 61) * 0.5F, key);
      case KeyKind::kNeedle:
        if (token == needle_) AddAlong(q, 4.0F, key);
        break;
      case KeyKind::kNotFinite:
        break;
      default:
        ShapeChannels(token, q, key);
    }
  }

  // Adds a multiple of the query, scaled to entries of about 1: huge queries must not make keys
  // overflow.
  void AddAlong(const float* q, float factor, float* key) const {
    float largest = 0.0F;
    for (uint32_t c = 0; c < dim_; ++c) largest = std::max(largest, std::fabs(q[c]));
    if (largest == 0.0F) return;
    for (uint32_t c = 0; c < dim_; ++c) key[c] += factor * (q[c] / largest) * 3.0F;
  }

  void ShapeChannels(uint32_t token, const float* q, float* key) {
    const KeyKind kind = case_.traits.keys;
    const float parity = token % 2 == 0 ? 1.0F : -1.0F;
    const float side = kind == KeyKind::kCellCornerSigned && chance_.OneIn(2) ? -1.0F : 1.0F;
    float largest = 1e-30F;
    for (uint32_t c = 0; c < dim_; ++c) largest = std::max(largest, std::fabs(q[c]));
    for (uint32_t c = 0; c < dim_; ++c) {
      if (kind == KeyKind::kOpposing) {
        key[c] = (c % 2 == 0 ? 6e4F : -6e4F) * parity * (1.0F - 0.01F * chance_.Uniform());
      } else if (kind == KeyKind::kSubnormal) {
        key[c] = LeastNormal(layout_.dtype) * (chance_.Uniform() - 0.5F);
      } else if (token % kBlockTokens == kPinLow || token % kBlockTokens == kPinHigh) {
        key[c] = token % kBlockTokens == kPinLow ? 0.0F : cell_ * 15.99F;
      } else if (kind == KeyKind::kAlongQuery) {
        key[c] = cell_ * (static_cast<float>(code_[c]) + 0.5F + 0.49F * q[c] / largest);
      } else {  // kCellCorner, kCellCornerSigned
        const auto code = static_cast<float>(4 + chance_.Below(8));
        key[c] = cell_ * (code + (q[c] * side > 0.0F ? 0.99F : 0.01F));
      }
    }
  }

  void ShapeValues() {
    const ValueKind kind = case_.traits.values;
    const float huge = layout_.dtype == DType::kFloat16 ? 3e4F : 1e6F;
    for (uint32_t kv_head = 0; kv_head < layout_.kv_head_count; ++kv_head) {
      const uint32_t heavy = HeaviestToken(kv_head);
      const uint32_t one = chance_.Below(case_.length);
      for (uint32_t token = 0; token < case_.length; ++token) {
        float* v = &values_[case_.ElementIndex(kv_head, token)];
        for (uint32_t c = 0; c < dim_; ++c) {
          if (kind == ValueKind::kEqual) v[c] = values_[case_.ElementIndex(kv_head, 0) + c];
          if (kind == ValueKind::kOneHuge && token == one) v[c] *= huge;
          if (kind == ValueKind::kTinyWhereHeavy && token == heavy) v[c] *= 1e-6F;
          if (kind == ValueKind::kHugeWhereLight && token != heavy) v[c] *= huge / 100.0F;
          if (kind == ValueKind::kOppositeSigns) v[c] = token % 2 == 0 ? 10.0F : -10.0F;
          if (kind == ValueKind::kZero) v[c] = 0.0F;
          if (kind == ValueKind::kSubnormal) v[c] *= LeastNormal(layout_.dtype) * 0.1F;
        }
      }
    }
  }

  uint32_t HeaviestToken(uint32_t kv_head) {
    uint32_t heaviest = 0;
    float most = -kInfinity;
    for (uint32_t token = 0; token < case_.length; ++token) {
      const float sum = Dot(Query(kv_head), Key(kv_head, token), dim_);
      if (sum > most) {
        most = sum;
        heaviest = token;
      }
    }
    return heaviest;
  }

  // One to three numbers that are none, anywhere.
  void Spoil() {
    std::vector<float>* spoilt = case_.traits.keys == KeyKind::kNotFinite       ? &keys_
                                 : case_.traits.values == ValueKind::kNotFinite ? &values_
                                                                                : nullptr;
    if (spoilt == nullptr) return;
    for (uint32_t count = 1 + chance_.Below(3); count > 0; --count) {
      const std::array<float, 3> bad = {kInfinity, -kInfinity,
                                        std::numeric_limits<float>::quiet_NaN()};
      (*spoilt)[chance_.Bits() % spoilt->size()] = bad[chance_.Below(3)];
    }
  }

  // A function for each type, not a branch for each number.
  template <DType kDType>
  static void Store(const std::vector<float>& numbers, std::byte* to) {
    const float largest = Largest(kDType);
    for (size_t i = 0; i < numbers.size(); ++i) {
      const float x = numbers[i];
      StoreElement(kDType, std::isfinite(x) ? std::clamp(x, -largest, largest) : x, to, i);
    }
  }

  // Finite numbers stay finite in the cache's type.
  std::vector<std::byte> Stored(const std::vector<float>& numbers) const {
    std::vector<std::byte> bytes(numbers.size() * ElementBytes(layout_.dtype));
    if (layout_.dtype == DType::kFloat32) {
      Store<DType::kFloat32>(numbers, bytes.data());
    } else if (layout_.dtype == DType::kFloat16) {
      Store<DType::kFloat16>(numbers, bytes.data());
    } else {
      Store<DType::kBfloat16>(numbers, bytes.data());
    }
    return bytes;
  }

  LayerCase& case_;
  const KvLayout& layout_;
  const uint32_t dim_;
  Chance& chance_;
  const uint32_t needle_ = chance_.Below(case_.length);
  const float cell_ = std::exp2(static_cast<float>(chance_.Below(9)) - 6.0F);
  const std::array<uint8_t, kHeadDimMax> code_ = MakeCode();
  std::vector<float> keys_, values_;

  std::array<uint8_t, kHeadDimMax> MakeCode() {
    std::array<uint8_t, kHeadDimMax> code;
    for (uint8_t& x : code) x = static_cast<uint8_t>(chance_.Below(16));
    return code;
  }
};

// Full pages, a page and one token, one token short of a page, a few tokens, anything.
uint32_t ChooseLength(const CaseLimits& limits, Chance* chance) {
  const uint32_t pages = 1 + chance->Below(5);
  switch (chance->Below(24)) {
    case 0:
    case 1:
      return pages * kBlockTokens;
    case 2:
    case 3:
      return pages * kBlockTokens + 1;
    case 4:
      return pages * kBlockTokens - 1;
    case 5:
      return 1 + chance->Below(16);
    case 6:
      return std::min(limits.length_max, 600 + chance->Below(limits.length_max));
    default:
      return 65 + chance->Below(400);
  }
}

// Heads of all query tokens that a case of its length may have.
uint32_t HeadsMax(const CaseLimits& limits, uint32_t length, uint32_t head_dim) {
  const uint64_t products = uint64_t{length} * head_dim;
  return static_cast<uint32_t>(
      std::clamp<uint64_t>(limits.products_max / products, 1, 3 * kGroupMax));
}

uint32_t ChooseQueryCount(const CaseLimits& limits, const LayerCase& of, Chance* chance) {
  const KvLayout& layout = of.shape.layout;
  const uint32_t affordable =
      HeadsMax(limits, of.length, layout.head_dim) / layout.query_head_count;
  const uint32_t most = std::clamp(affordable, 1U, std::min(kQueryTokensMax, of.length));
  return chance->OneIn(3) ? 1 + chance->Below(most) : 1;
}

void ChooseFrame(const CaseLimits& limits, Chance* chance, LayerCase* to) {
  constexpr uint32_t kDims[] = {64, 80, 96, 128, 256};
  const uint32_t dim = kDims[chance->Below(std::size(kDims))];
  to->length = ChooseLength(limits, chance);
  const uint32_t heads_max = HeadsMax(limits, to->length, dim);
  const uint32_t kv_heads = 1 + (heads_max > 1 ? chance->Below(2) : 0);
  const uint32_t group = 1 + chance->Below(std::clamp(heads_max / kv_heads, 1U, kGroupMax));
  to->shape.layout = {.query_head_count = kv_heads * group,
                      .kv_head_count = kv_heads,
                      .head_dim = dim,
                      .dtype = static_cast<DType>(chance->Below(3))};
  to->query_count = ChooseQueryCount(limits, *to, chance);
  to->shape.scale = 1.0F / std::sqrt(static_cast<float>(dim));
  if (chance->OneIn(5)) to->shape.scale *= std::exp(chance->Normal());
  if (chance->OneIn(4)) to->shape.sliding_window = 1 + chance->Below(to->length + 50);
  if (chance->OneIn(4)) to->shape.logit_softcap = chance->OneIn(2) ? 50.0F : 5.0F;
}

CaseTraits ChooseTraits(Chance* chance) {
  CaseTraits traits;
  // Half of the keys are plain, most values and queries are: attacks one at a time find more.
  if (!chance->OneIn(3)) traits.keys = static_cast<KeyKind>(chance->Below(kKeyKinds));
  if (chance->OneIn(2)) traits.values = static_cast<ValueKind>(chance->Below(kValueKinds));
  if (chance->OneIn(6)) traits.queries = static_cast<QueryKind>(chance->Below(kQueryKinds));
  traits.tables = static_cast<TableKind>(chance->Below(kTableKinds));
  return traits;
}

}  // namespace

const char* Name(KeyKind kind) {
  constexpr std::array<const char*, kKeyKinds> kNames = {
      "normal",        "identical",   "constant-pages", "opposing",  "corner",
      "corner-signed", "along-query", "equal",          "subnormal", "wide",
      "needle",        "duplicates",  "one-channel",    "zero",      "not-finite"};
  return kNames[static_cast<size_t>(kind)];
}

const char* Name(ValueKind kind) {
  constexpr std::array<const char*, kValueKinds> kNames = {
      "normal",         "equal", "one-huge",  "tiny-where-heavy", "huge-where-light",
      "opposite-signs", "zero",  "subnormal", "not-finite"};
  return kNames[static_cast<size_t>(kind)];
}

const char* Name(QueryKind kind) {
  constexpr std::array<const char*, kQueryKinds> kNames = {"normal", "zero",        "huge",
                                                           "tiny",   "one-channel", "alternating"};
  return kNames[static_cast<size_t>(kind)];
}

const char* Name(TableKind kind) {
  constexpr std::array<const char*, kTableKinds> kNames = {"identity", "directions", "learnt",
                                                           "across", "extreme"};
  return kNames[static_cast<size_t>(kind)];
}

std::string Name(const CaseTraits& traits) {
  return absl::StrCat("keys ", Name(traits.keys), ", values ", Name(traits.values), ", queries ",
                      Name(traits.queries), ", table ", Name(traits.tables));
}

const char* Name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}

bool LayerCase::is_tame() const {
  return traits.keys == KeyKind::kNormal && traits.queries == QueryKind::kNormal &&
         traits.tables != TableKind::kExtreme;
}

uint64_t Chance::Bits() {
  // SplitMix64 (Steele, Lea, Flood 2014).
  uint64_t z = state_ += 0x9e3779b97f4a7c15U;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31);
}

float Chance::Normal() {
  // Twelve 10-bit numbers from two draws, three and three added up side by side.
  constexpr uint64_t kEverySecond = 0x3ff003ff003ffU;
  const uint64_t a = Bits();
  const uint64_t b = Bits();
  const uint64_t sums = (a & kEverySecond) + ((a >> 10) & kEverySecond) + (b & kEverySecond) +
                        ((b >> 10) & kEverySecond);
  const uint64_t sum = (sums & 0xfffff) + ((sums >> 20) & 0xfffff) + (sums >> 40);
  return (static_cast<float>(sum) + 6.0F) / 1024.0F - 6.0F;
}

uint64_t SeedOf(uint64_t base, uint64_t index) {
  return Chance(base).Bits() ^ Chance(~index).Bits();
}

LayerCase GenerateCase(uint64_t seed, const CaseLimits& limits) {
  Chance chance(seed);
  LayerCase result;
  result.seed = seed;
  ChooseFrame(limits, &chance, &result);
  result.traits = ChooseTraits(&chance);
  Generator(&result, &chance).Run();
  return result;
}

LayerCase GenerateLike(uint64_t seed, const CaseLimits& limits, const LayerShape& shape) {
  Chance chance(seed);
  LayerCase result;
  result.seed = seed;
  result.shape = shape;
  const uint64_t products = uint64_t{shape.layout.query_head_count} * shape.layout.head_dim;
  const auto length_max =
      static_cast<uint32_t>(std::max<uint64_t>(1, limits.products_max / products));
  result.length = std::min(ChooseLength(limits, &chance), length_max);
  result.query_count = ChooseQueryCount(limits, result, &chance);
  result.traits = ChooseTraits(&chance);
  Generator(&result, &chance).Run();
  return result;
}

LayerCase GenerateCase(uint64_t seed, const CaseTraits& traits, const LayerCase& frame) {
  Chance chance(seed);
  LayerCase result;
  result.seed = seed;
  result.traits = traits;
  result.shape = frame.shape;
  result.length = frame.length;
  result.query_count = frame.query_count;
  Generator(&result, &chance).Run();
  return result;
}

}  // namespace kvservice::adversary
