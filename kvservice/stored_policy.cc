#include "kvservice/stored_policy.h"

#include <optional>
#include <type_traits>
#include <vector>

namespace kvservice {
namespace {

// Both directions walk the same fields in the same order.
class Out {
 public:
  explicit Out(ByteWriter* writer) : writer_(writer) {}
  template <typename T>
  void operator()(const T& value) {
    writer_->Number(value);
  }
  template <typename T>
  void Enum(const T& value, T) {
    writer_->Number(value);
  }
  template <typename T, typename Each>
  void Optional(const std::optional<T>& value, Each each) {
    writer_->Number(static_cast<uint8_t>(value.has_value()));
    if (value.has_value()) each(*value);
  }
  template <typename T, typename Each>
  void All(const std::vector<T>& values, size_t, Each each) {
    writer_->Number(static_cast<uint32_t>(values.size()));
    for (const T& value : values) each(value);
  }

 private:
  ByteWriter* const writer_;
};

class In {
 public:
  explicit In(ByteReader* reader) : reader_(reader) {}
  template <typename T>
  void operator()(T& value) {
    if constexpr (std::is_same_v<T, bool>) {
      const auto byte = reader_->Number<uint8_t>();
      if (byte > 1) reader_->Fail();
      value = byte == 1;
    } else {
      value = reader_->Number<T>();
    }
  }
  template <typename T>
  void Enum(T& value, T last) {
    const auto number = reader_->Number<std::underlying_type_t<T>>();
    if (number > static_cast<std::underlying_type_t<T>>(last)) return reader_->Fail();
    value = static_cast<T>(number);
  }
  template <typename T, typename Each>
  void Optional(std::optional<T>& value, Each each) {
    bool has_value = false;
    (*this)(has_value);
    value.reset();
    if (has_value) each(value.emplace());
  }
  template <typename T, typename Each>
  void All(std::vector<T>& values, size_t bytes_each, Each each) {
    values.resize(reader_->Count(bytes_each));
    for (T& value : values) each(value);
  }

 private:
  ByteReader* const reader_;
};

template <typename Walk, typename B>
void WalkBudget(Walk& walk, B& budget) {
  walk(budget.sink);
  walk(budget.local);
  walk(budget.top_k);
  walk(budget.mass);
}

template <typename Walk, typename L>
void WalkLayers(Walk& walk, L& layers) {
  const auto number = [&](auto& value) { walk(value); };
  walk(layers.layer_begin);
  walk(layers.layer_end);
  walk.Optional(layers.selector, [&](auto& kind) { walk.Enum(kind, SelectorKind::kScan); });
  walk.Optional(layers.budget, [&](auto& budget) { WalkBudget(walk, budget); });
  walk.Optional(layers.min_cosine, number);
  walk.All(layers.kv_head_min_cosines, sizeof(float), number);
  walk.Optional(layers.hidden_share, number);
  walk.Optional(layers.frozen_share, number);
  walk.Optional(layers.psaw_decay_scale, number);
  walk.Optional(layers.psaw_decay_rate, number);
  walk.Optional(layers.etf_logit_drift, number);
}

template <typename Walk, typename P>
void WalkPolicy(Walk& walk, P& policy) {
  walk.Enum(policy.selector, SelectorKind::kScan);
  WalkBudget(walk, policy.budget);
  walk(policy.cis.min_cosine);
  walk(policy.cis.anchors_max);
  walk(policy.cis.block_steps);
  walk(policy.cis.dilate_strongest);
  walk(policy.cis.dilate_radius);
  walk(policy.cis.seed);
  walk(policy.cis.max_dropped_mass_estimate);
  walk(policy.psaw.first_layer);
  walk(policy.psaw.phi);
  walk(policy.psaw.alpha);
  walk(policy.etf.first_layer);
  walk(policy.etf.psi);
  walk(policy.etf.gamma);
  // Two numbers, and a byte for each of the rest, at least.
  walk.All(policy.layers, 2 * sizeof(uint32_t), [&](auto& layers) { WalkLayers(walk, layers); });
  walk(policy.dense_below_tokens);
  walk(policy.max_dropped_mass);
  walk(policy.max_output_error);
  walk.Enum(policy.guarantee, Guarantee::kExact);
  walk(policy.failure_probability);
  walk(policy.draws_max);
  walk.Enum(policy.on_violation, OnViolation::kFail);
  walk.Enum(policy.mode, Mode::kShadow);
  walk(policy.deferred_exact_steps);
}

}  // namespace

void WritePolicy(const Policy& policy, ByteWriter* writer) {
  Out out(writer);
  WalkPolicy(out, policy);
}

Policy ReadPolicy(ByteReader* reader) {
  Policy policy;
  In in(reader);
  WalkPolicy(in, policy);
  return policy;
}

}  // namespace kvservice
