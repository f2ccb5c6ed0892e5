#include "kvservice/deferred_exact.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace kvservice {
namespace {

// Waiting steps [begin, end) whose query tokens follow each other and fit one row of a device.
struct Pass {
  size_t begin = 0;
  size_t end = 0;
  uint32_t token_count = 0;
  // The memory behind the row.
  ViewArrays view;
  std::vector<float> q;
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
};

std::vector<Pass> PassesOf(absl::Span<const DeferredStep> steps) {
  std::vector<Pass> passes;
  for (size_t i = 0; i < steps.size(); ++i) {
    const bool follows = !passes.empty() && steps[i].given_offsets.empty() &&
                         steps[i - 1].given_offsets.empty() &&
                         steps[i - 1].position + steps[i - 1].query_count == steps[i].position &&
                         passes.back().token_count + steps[i].query_count <= kQueryTokensMax;
    if (!follows) {
      passes.emplace_back();
      passes.back().begin = i;
    }
    Pass& pass = passes.back();
    pass.end = i + 1;
    pass.token_count += steps[i].query_count;
    pass.q.insert(pass.q.end(), steps[i].q.begin(), steps[i].q.end());
  }
  return passes;
}

// Nothing is chosen, or what the step attended, and everything else is scored.
AttendRow RowOf(const SequenceRecord& record, uint32_t layer, const DeferredStep& first,
                absl::Span<const uint32_t> no_offsets, Pass* pass) {
  const uint32_t position = first.position;
  const KvLayout& layout = record.model->spec.layout;
  pass->out.resize(pass->q.size());
  pass->lse.resize(size_t{pass->token_count} * layout.query_head_count);
  pass->certificates.resize(pass->lse.size());
  pass->groups.resize(layout.kv_head_count);
  AttendRow row;
  row.view = record.cache->View(layer, position + pass->token_count, &pass->view);
  row.position = position;
  row.query_count = pass->token_count;
  row.q = pass->q.data();
  row.plan.source = Source::kGiven;
  row.plan.sink_end = 0;
  row.plan.local_begin = position;
  row.plan.given = first.given;
  row.plan.given_offsets = first.given_offsets.empty() ? no_offsets : first.given_offsets;
  row.plan.dense_share = 1.0F;
  row.plan.prove = Guarantee::kExact;
  row.tables = record.tables->shape.TablesOf(layer);
  row.out = pass->out.data();
  row.lse = pass->lse.data();
  row.certificates = pass->certificates.data();
  row.groups = pass->groups.data();
  return row;
}

// 1 - kept / total, rounded outward; what held before still does where it held always.
DeferredMass DroppedOf(const HeadCertificate& told, const HeadCertificate& exact) {
  const LogMassUpper total_upper = Add(exact.log_kept_upper, exact.log_dropped_upper);
  const LogMassLower total_lower = Add(exact.log_kept_lower, exact.log_dropped_lower);
  const double upper = WidenUp(-std::expm1(told.log_kept_lower.value - total_upper.value));
  const double lower = WidenDown(-std::expm1(told.log_kept_upper.value - total_lower.value));
  DeferredMass mass;
  // NaN becomes what says nothing.
  mass.upper.value = upper <= 1.0 ? std::max(upper, 0.0) : 1.0;
  mass.lower.value = lower >= 0.0 ? lower : 0.0;
  if (told.level >= Level::kDeterministic) {
    mass.upper.value = std::min(mass.upper.value, told.dropped_mass_upper.value);
  }
  mass.lower.value = std::max(mass.lower.value, told.dropped_mass_lower.value);
  return mass;
}

std::vector<DeferredMasses> Score(const SequenceRecord& record, uint32_t layer,
                                  absl::Span<const DeferredStep> steps, Device* device) {
  const std::vector<uint32_t> no_offsets(record.model->spec.layout.kv_head_count + size_t{1}, 0);
  std::vector<Pass> passes = PassesOf(steps);
  std::vector<AttendRow> rows;
  rows.reserve(passes.size());
  for (Pass& pass : passes) {
    rows.push_back(RowOf(record, layer, steps[pass.begin], no_offsets, &pass));
  }
  device->Attend(record.model->layers[layer], absl::MakeSpan(rows));
  std::vector<DeferredMasses> masses;
  for (const Pass& pass : passes) {
    const HeadCertificate* exact = pass.certificates.data();
    for (size_t i = pass.begin; i < pass.end; ++i) {
      DeferredMasses of_step{
          .position = steps[i].position, .query_count = steps[i].query_count, .heads = {}};
      for (const HeadCertificate& told : steps[i].certificates) {
        const bool is_exact = told.level == Level::kNone && !steps[i].given_offsets.empty();
        of_step.heads.push_back(
            is_exact ? DeferredMass{exact->dropped_mass_upper, exact->dropped_mass_lower}
                     : DroppedOf(told, *exact));
        ++exact;
      }
      masses.push_back(std::move(of_step));
    }
  }
  return masses;
}

void TakeSelection(const AttendRow& row, const KvLayout& layout, DeferredStep* step) {
  step->given_offsets.assign(1, 0);
  for (uint32_t head = 0; head < layout.kv_head_count; ++head) {
    const std::vector<uint32_t>& list = row.selected[head];
    if (row.groups[head].action != Action::kDense) {
      step->given.insert(step->given.end(), list.begin(), list.end());
    }
    step->given_offsets.push_back(static_cast<uint32_t>(step->given.size()));
  }
}

}  // namespace

std::vector<DeferredMasses> DeferExact(const AttendRow& row, uint32_t layer, uint32_t step_tokens,
                                       SequenceRecord* record, Device* device) {
  const KvLayout& layout = record->model->spec.layout;
  if (record->deferred.empty()) record->deferred.resize(record->model->spec.layer_count);
  std::vector<DeferredStep>& steps = record->deferred[layer];
  const size_t head_count = size_t{row.query_count} * layout.query_head_count;
  steps.push_back({.position = row.position,
                   .query_count = row.query_count,
                   .q = {row.q, row.q + head_count * layout.head_dim},
                   .certificates = {row.certificates, row.certificates + head_count}});
  if (NeedsSelection(row.plan)) TakeSelection(row, layout, &steps.back());
  uint32_t token_count = 0;
  for (const DeferredStep& step : steps) token_count += step.query_count;
  if (token_count < step_tokens) return {};
  std::vector<DeferredMasses> masses = Score(*record, layer, steps, device);
  steps.clear();
  return masses;
}

}  // namespace kvservice
