#include "tests/adversary/mutate.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/float16.h"

namespace kvservice::adversary {
namespace {

// The neighbour of a stored number; finite ones stay finite.
void Nudge(DType dtype, bool up, std::byte* data, size_t index) {
  const auto nudge = [&](auto bits, auto exponent_mask) {
    std::memcpy(&bits, data + index * sizeof(bits), sizeof(bits));
    const auto moved = static_cast<decltype(bits)>(up ? bits + 1 : bits - 1);
    if ((moved & exponent_mask) == exponent_mask) return;
    std::memcpy(data + index * sizeof(bits), &moved, sizeof(moved));
  };
  if (dtype == DType::kFloat32) return nudge(uint32_t{0}, uint32_t{0x7f800000});
  if (dtype == DType::kFloat16) return nudge(uint16_t{0}, uint16_t{0x7c00});
  nudge(uint16_t{0}, uint16_t{0x7f80});
}

// One case that is being changed.
class Mutation {
 public:
  Mutation(Chance* chance, LayerCase* to)
      : chance_(*chance), case_(*to), layout_(to->shape.layout), dim_(layout_.head_dim) {}

  void Apply() {
    switch (chance_.Below(10)) {
      case 0:
        return ScaleChannel();
      case 1:
        return SwapTokens();
      case 2:
        return ChangeQuery();
      case 3:
        return FlipChannelOfPage();
      case 4:
        return MakeNeedle();
      case 5:
        return CopyToPage();
      case 6:
        return ScaleValue();
      case 7:
        return ScaleQueries();
      default:
        return NudgeSome();
    }
  }

 private:
  uint32_t Token() { return chance_.Below(case_.length); }
  uint32_t KvHead() { return chance_.Below(layout_.kv_head_count); }
  float Factor() { return std::exp2(static_cast<float>(chance_.Below(9)) - 4.0F); }
  float Load(const std::vector<std::byte>& from, size_t index) const {
    return LoadElement(layout_.dtype, from.data(), index);
  }
  // Numbers that the cache's type cannot hold are left as they were.
  void Store(float x, size_t index, std::vector<std::byte>* to) const {
    const float before = LoadElement(layout_.dtype, to->data(), index);
    StoreElement(layout_.dtype, x, to->data(), index);
    if (std::isfinite(LoadElement(layout_.dtype, to->data(), index))) return;
    StoreElement(layout_.dtype, before, to->data(), index);
  }

  void ScaleChannel() {
    const uint32_t c = chance_.Below(dim_);
    const uint32_t kv_head = KvHead();
    const float factor = Factor();
    for (uint32_t token = 0; token < case_.length; ++token) {
      const size_t at = case_.ElementIndex(kv_head, token) + c;
      Store(factor * Load(case_.k, at), at, &case_.k);
    }
  }

  void SwapTokens() {
    const uint32_t kv_head = KvHead();
    const size_t a = case_.ElementIndex(kv_head, Token()) * ElementBytes(layout_.dtype);
    const size_t b = case_.ElementIndex(kv_head, Token()) * ElementBytes(layout_.dtype);
    if (a == b) return;
    std::vector<std::byte>& bytes = chance_.OneIn(3) ? case_.v : case_.k;
    std::swap_ranges(&bytes[a], &bytes[a] + layout_.vector_bytes(), &bytes[b]);
  }

  void ChangeQuery() {
    float& q = case_.queries[0][chance_.Bits() % case_.queries[0].size()];
    q *= chance_.OneIn(2) ? -1.0F : Factor();
    if (!std::isfinite(q)) q = 1.0F;
  }

  void FlipChannelOfPage() {
    const uint32_t c = chance_.Below(dim_);
    const uint32_t kv_head = KvHead();
    const uint32_t begin = Token() / kBlockTokens * kBlockTokens;
    for (uint32_t t = begin; t < std::min(case_.length, begin + kBlockTokens); ++t) {
      const size_t at = case_.ElementIndex(kv_head, t) + c;
      Store(-Load(case_.k, at), at, &case_.k);
    }
  }

  void MakeNeedle() {
    const uint32_t kv_head = KvHead();
    const size_t at = case_.ElementIndex(kv_head, Token());
    const float* q = &case_.queries[0][size_t{kv_head} * layout_.group_size() * dim_];
    const float factor = Factor();
    for (uint32_t c = 0; c < dim_; ++c) {
      Store(Load(case_.k, at + c) + factor * q[c], at + c, &case_.k);
    }
  }

  void CopyToPage() {
    const uint32_t kv_head = KvHead();
    const uint32_t from = Token();
    const uint32_t begin = from / kBlockTokens * kBlockTokens;
    const size_t element = ElementBytes(layout_.dtype);
    for (uint32_t t = begin; t < std::min(case_.length, begin + kBlockTokens); ++t) {
      if (t == from) continue;
      std::memcpy(&case_.k[case_.ElementIndex(kv_head, t) * element],
                  &case_.k[case_.ElementIndex(kv_head, from) * element], layout_.vector_bytes());
    }
  }

  void ScaleValue() {
    const size_t at = case_.ElementIndex(KvHead(), Token());
    const float factor = chance_.OneIn(2) ? -1.0F : Factor();
    for (uint32_t c = 0; c < dim_; ++c) Store(factor * Load(case_.v, at + c), at + c, &case_.v);
  }

  void ScaleQueries() {
    const float factor = chance_.OneIn(2) ? 0.5F : 2.0F;
    for (float& q : case_.queries[0]) {
      if (std::isfinite(factor * q)) q *= factor;
    }
  }

  void NudgeSome() {
    const size_t count = size_t{case_.length} * layout_.kv_head_count * dim_;
    const bool up = chance_.OneIn(2);
    for (uint32_t i = 1 + chance_.Below(32); i > 0; --i) {
      Nudge(layout_.dtype, up, case_.k.data(), chance_.Bits() % count);
    }
  }

  Chance& chance_;
  LayerCase& case_;
  const KvLayout& layout_;
  const uint32_t dim_;
};

}  // namespace

void Mutate(Chance* chance, LayerCase* layer_case) { Mutation(chance, layer_case).Apply(); }

}  // namespace kvservice::adversary
