#include "client/requests.h"

#include "client/error.h"
#include "client/sequence.h"

namespace kvservice::client {
namespace {

v1::Selector SelectorToProto(Selector selector) {
  switch (selector) {
    case Selector::kAuto:
      return v1::SELECTOR_AUTO;
    case Selector::kDense:
      return v1::SELECTOR_DENSE;
    case Selector::kGiven:
      return v1::SELECTOR_GIVEN;
    case Selector::kCis:
      return v1::SELECTOR_CIS;
    case Selector::kPsaw:
      return v1::SELECTOR_PSAW;
    case Selector::kEtf:
      return v1::SELECTOR_ETF;
    case Selector::kCpe:
      return v1::SELECTOR_CPE;
    case Selector::kCertified:
      return v1::SELECTOR_CERTIFIED;
    case Selector::kScan:
      return v1::SELECTOR_SCAN;
  }
  return v1::SELECTOR_UNSPECIFIED;
}

v1::Guarantee GuaranteeToProto(Guarantee guarantee) {
  switch (guarantee) {
    case Guarantee::kNone:
      return v1::GUARANTEE_NONE;
    case Guarantee::kConfidence:
      return v1::GUARANTEE_CONFIDENCE;
    case Guarantee::kDeterministic:
      return v1::GUARANTEE_DETERMINISTIC;
    case Guarantee::kExact:
      return v1::GUARANTEE_EXACT;
  }
  return v1::GUARANTEE_UNSPECIFIED;
}

v1::OnViolation OnViolationToProto(OnViolation on_violation) {
  switch (on_violation) {
    case OnViolation::kReport:
      return v1::ON_VIOLATION_REPORT;
    case OnViolation::kGrow:
      return v1::ON_VIOLATION_GROW;
    case OnViolation::kDense:
      return v1::ON_VIOLATION_DENSE;
    case OnViolation::kFail:
      return v1::ON_VIOLATION_FAIL;
  }
  return v1::ON_VIOLATION_UNSPECIFIED;
}

v1::DataType DTypeToProto(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return v1::DATA_TYPE_FLOAT32;
    case DType::kFloat16:
      return v1::DATA_TYPE_FLOAT16;
    case DType::kBfloat16:
      return v1::DATA_TYPE_BFLOAT16;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

v1::RotaryStyle RotaryStyleToProto(RotaryStyle style) {
  switch (style) {
    case RotaryStyle::kNone:
      return v1::ROTARY_STYLE_NONE;
    case RotaryStyle::kHalf:
      return v1::ROTARY_STYLE_HALF;
    case RotaryStyle::kInterleaved:
      return v1::ROTARY_STYLE_INTERLEAVED;
  }
  return v1::ROTARY_STYLE_UNSPECIFIED;
}

void BudgetToProto(const Budget& from, v1::Budget* to) {
  if (from.sink_tokens) to->set_sink_tokens(*from.sink_tokens);
  if (from.local_tokens) to->set_local_tokens(*from.local_tokens);
  if (from.top_k_tokens) to->set_top_k_tokens(*from.top_k_tokens);
  if (from.max_dropped_mass_estimate) {
    to->set_max_dropped_mass_estimate(*from.max_dropped_mass_estimate);
  }
}

void CisToProto(const CisPolicy& from, v1::CisPolicy* to) {
  if (from.min_cosine) to->set_min_cosine(*from.min_cosine);
  if (from.anchors_max) to->set_anchors_max(*from.anchors_max);
  if (from.block_steps) to->set_block_steps(*from.block_steps);
  if (from.dilate_strongest_tokens) {
    to->set_dilate_strongest_tokens(*from.dilate_strongest_tokens);
  }
  if (from.dilate_radius_tokens) to->set_dilate_radius_tokens(*from.dilate_radius_tokens);
  if (from.seed) to->set_seed(*from.seed);
  if (from.max_dropped_mass_estimate) {
    to->set_max_dropped_mass_estimate(*from.max_dropped_mass_estimate);
  }
}

void PsawToProto(const PsawPolicy& from, v1::PsawPolicy* to) {
  if (from.first_layer) to->set_first_layer(*from.first_layer);
  if (from.phi) to->set_phi(*from.phi);
  if (from.alpha) to->set_alpha(*from.alpha);
}

void EtfToProto(const EtfPolicy& from, v1::EtfPolicy* to) {
  if (from.first_layer) to->set_first_layer(*from.first_layer);
  if (from.psi) to->set_psi(*from.psi);
  if (from.gamma) to->set_gamma(*from.gamma);
}

void LayersToProto(const std::vector<LayerOverride>& from, v1::LayerOverrides* to) {
  for (const LayerOverride& layers : from) {
    v1::LayerOverride* const entry = to->add_overrides();
    entry->set_layer_begin(layers.layer_begin);
    entry->set_layer_end(layers.layer_end);
    if (layers.selector) entry->set_selector(SelectorToProto(*layers.selector));
    if (layers.budget) BudgetToProto(*layers.budget, entry->mutable_budget());
    if (layers.min_cosine) entry->set_min_cosine(*layers.min_cosine);
    entry->mutable_kv_head_min_cosines()->Add(layers.kv_head_min_cosines.begin(),
                                              layers.kv_head_min_cosines.end());
    if (layers.hidden_share) entry->set_hidden_share(*layers.hidden_share);
    if (layers.frozen_share) entry->set_frozen_share(*layers.frozen_share);
    if (layers.psaw_decay_scale) entry->set_psaw_decay_scale(*layers.psaw_decay_scale);
    if (layers.psaw_decay_rate) entry->set_psaw_decay_rate(*layers.psaw_decay_rate);
    if (layers.etf_logit_drift) entry->set_etf_logit_drift(*layers.etf_logit_drift);
  }
}

std::string RowField(size_t row, const char* member) {
  return "rows[" + std::to_string(row) + "]." + member;
}

absl::Status RowToProto(const AttendRow& from, size_t index, v1::AttendRow* to) {
  if (from.sequence == nullptr || from.sequence->id().empty()) {
    return InvalidRequest(RowField(index, "sequence"), "is missing, closed or detached");
  }
  if (from.query_count == 0) return InvalidRequest(RowField(index, "query_count"), "is 0");
  v1::SequenceHandle* const handle = to->mutable_handle();
  handle->set_id(from.sequence->id());
  handle->set_generation(from.sequence->generation());
  to->set_position(from.position);
  to->set_query_count(from.query_count);
  if (from.policy) *to->mutable_policy() = PolicyToProto(*from.policy);
  const GivenPositions& given = from.given;
  to->mutable_given_positions()->Add(given.positions.begin(), given.positions.end());
  to->mutable_given_offsets()->Add(given.offsets.begin(), given.offsets.end());
  return absl::OkStatus();
}

absl::Status CheckStepTensor(const TensorView& tensor, const std::string& field,
                             uint64_t token_count) {
  const absl::Status status = CheckTensor(tensor, field);
  if (!status.ok() || tensor.token_count == token_count) return status;
  return InvalidRequest(field, "has " + std::to_string(tensor.token_count) + " tokens, the rows " +
                                   std::to_string(token_count));
}

}  // namespace

v1::SequenceHandle MakeHandle(const std::string& id, uint64_t generation) {
  v1::SequenceHandle handle;
  handle.set_id(id);
  handle.set_generation(generation);
  return handle;
}

v1::Policy PolicyToProto(const Policy& policy) {
  v1::Policy to;
  if (policy.selector) to.set_selector(SelectorToProto(*policy.selector));
  if (policy.budget) BudgetToProto(*policy.budget, to.mutable_budget());
  if (policy.cis) CisToProto(*policy.cis, to.mutable_cis());
  if (policy.psaw) PsawToProto(*policy.psaw, to.mutable_psaw());
  if (policy.etf) EtfToProto(*policy.etf, to.mutable_etf());
  if (policy.layers) LayersToProto(*policy.layers, to.mutable_layers());
  if (policy.max_dropped_mass) to.set_max_dropped_mass(*policy.max_dropped_mass);
  if (policy.max_output_error) to.set_max_output_error(*policy.max_output_error);
  if (policy.guarantee) to.set_guarantee(GuaranteeToProto(*policy.guarantee));
  if (policy.failure_probability) to.set_failure_probability(*policy.failure_probability);
  if (policy.draws_max) to.set_draws_max(*policy.draws_max);
  if (policy.on_violation) to.set_on_violation(OnViolationToProto(*policy.on_violation));
  if (policy.mode) {
    to.set_mode(*policy.mode == Mode::kShadow ? v1::MODE_SHADOW : v1::MODE_ENFORCE);
  }
  if (policy.deferred_exact_steps) to.set_deferred_exact_steps(*policy.deferred_exact_steps);
  if (policy.dense_below_tokens) to.set_dense_below_tokens(*policy.dense_below_tokens);
  to.set_name(policy.name);
  return to;
}

v1::Model ModelToProto(const ModelDescription& model) {
  v1::Model to;
  to.set_name(model.name);
  to.set_layer_count(model.layer_count);
  to.set_query_head_count(model.query_head_count);
  to.set_kv_head_count(model.kv_head_count);
  to.set_head_dim(model.head_dim);
  to.set_cache_dtype(DTypeToProto(model.cache_dtype));
  to.set_scale(model.scale);
  to.set_logit_softcap(model.logit_softcap);
  to.mutable_sliding_window_tokens()->Add(model.sliding_window_tokens.begin(),
                                          model.sliding_window_tokens.end());
  to.set_rotary_style(RotaryStyleToProto(model.rotary_style));
  to.mutable_inverse_frequencies()->Add(model.inverse_frequencies.begin(),
                                        model.inverse_frequencies.end());
  if (!model.sketch_metric.empty() || !model.sketch_directions.empty()) {
    v1::SketchTables* const tables = to.mutable_sketch_tables();
    tables->mutable_metric()->Add(model.sketch_metric.begin(), model.sketch_metric.end());
    tables->mutable_directions()->Add(model.sketch_directions.begin(),
                                      model.sketch_directions.end());
  }
  if (model.default_policy) *to.mutable_default_policy() = PolicyToProto(*model.default_policy);
  return to;
}

size_t ElementBytes(DType dtype) {
  return dtype == DType::kFloat32 ? sizeof(float) : sizeof(uint16_t);
}

absl::Status CheckTensor(const TensorView& tensor, const std::string& field) {
  if (tensor.token_count == 0 || tensor.head_count == 0 || tensor.head_dim == 0) {
    return InvalidRequest(field, "has an extent of 0");
  }
  // Division instead of a product: three extents can exceed 64 bits.
  const uint64_t head_bytes = uint64_t{tensor.head_dim} * ElementBytes(tensor.dtype);
  const uint64_t heads = tensor.bytes.size() / head_bytes;
  if (tensor.bytes.size() % head_bytes == 0 &&
      heads == uint64_t{tensor.token_count} * tensor.head_count) {
    return absl::OkStatus();
  }
  return InvalidRequest(field, "has " + std::to_string(tensor.bytes.size()) +
                                   " bytes, which is not what its extents need");
}

void DescribeTensor(const TensorView& tensor, uint32_t count, v1::Tensor* to) {
  to->set_dtype(DTypeToProto(tensor.dtype));
  to->clear_shape();
  to->add_shape(count);
  to->add_shape(tensor.head_count);
  to->add_shape(tensor.head_dim);
}

absl::Status StepToProto(const AttendStep& step, v1::AttendRequest* request) {
  if (step.rows.empty()) return InvalidRequest("rows", "is empty");
  request->set_layer(step.layer);
  uint64_t token_count = 0;
  for (size_t i = 0; i < step.rows.size(); ++i) {
    const absl::Status status = RowToProto(step.rows[i], i, request->add_rows());
    if (!status.ok()) return status;
    token_count += step.rows[i].query_count;
  }
  absl::Status status = CheckStepTensor(step.q, "q", token_count);
  if (status.ok() && step.k.empty() != step.v.empty()) {
    status = InvalidRequest(step.k.empty() ? "k" : "v", "is missing: both k and v or neither");
  }
  if (status.ok() && !step.k.empty()) status = CheckStepTensor(step.k, "k", token_count);
  if (status.ok() && !step.v.empty()) status = CheckStepTensor(step.v, "v", token_count);
  if (!status.ok()) return status;

  if (step.policy) *request->mutable_policy() = PolicyToProto(*step.policy);
  request->set_return_selected(step.return_selected);
  request->set_output_dtype(v1::DATA_TYPE_FLOAT32);
  DescribeTensor(step.q, step.q.token_count, request->mutable_q());
  if (step.k.empty()) return absl::OkStatus();
  DescribeTensor(step.k, step.k.token_count, request->mutable_k());
  DescribeTensor(step.v, step.v.token_count, request->mutable_v());
  return absl::OkStatus();
}

}  // namespace kvservice::client
