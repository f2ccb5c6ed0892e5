#include "tests/adversary/endpoint_attack.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "tests/adversary/attack.h"
#include "tests/adversary/device_call.h"
#include "tests/adversary/judge.h"
#include "tests/adversary/layer_case.h"
#include "tests/adversary/truth.h"

namespace kvservice::adversary {
namespace {

// Models that cases are spread over: every head_dim and cache type twice, every group size.
constexpr std::array<uint32_t, 5> kDims = {64, 80, 96, 128, 256};
constexpr uint32_t kModels = 30;
// Layers differ in sketch tables and windows.
constexpr uint32_t kLayers = 2 * kTableKinds;
constexpr uint32_t kTokensPerMessage = 256;
constexpr uint32_t kCallsPerCase = 6;
constexpr uint64_t kProductsMax = 2 << 20;

struct ServedModel {
  client::ModelDescription description;
  // [kLayers]: the shape of each layer.
  std::vector<LayerShape> shapes;
};

client::DType DTypeOf(DType dtype) {
  return dtype == DType::kFloat32   ? client::DType::kFloat32
         : dtype == DType::kFloat16 ? client::DType::kFloat16
                                    : client::DType::kBfloat16;
}

client::TensorView ViewOf(const KvLayout& layout, absl::Span<const std::byte> bytes,
                          uint32_t token_count) {
  return {.dtype = DTypeOf(layout.dtype),
          .token_count = token_count,
          .head_count = layout.kv_head_count,
          .head_dim = layout.head_dim,
          .bytes = bytes};
}

// The same for every run: a server that has the model already has an equal one.
ServedModel MakeModel(uint32_t index) {
  Chance chance(SeedOf(77, index));
  const uint32_t kv_heads = 1 + index % 2;
  ServedModel model;
  LayerCase frame;
  frame.shape.layout = {.query_head_count = kv_heads * (1 + index % kGroupMax),
                        .kv_head_count = kv_heads,
                        .head_dim = kDims[index % kDims.size()],
                        .dtype = static_cast<DType>(index / kDims.size() % 3)};
  const KvLayout& layout = frame.shape.layout;
  frame.shape.scale = 1.0F / std::sqrt(static_cast<float>(layout.head_dim));
  if (index % 4 == 3) frame.shape.logit_softcap = index % 8 == 3 ? 30.0F : 5.0F;
  frame.length = 1;
  model.description = {.name = absl::StrCat("adversary-", index),
                       .layer_count = kLayers,
                       .query_head_count = layout.query_head_count,
                       .kv_head_count = kv_heads,
                       .head_dim = layout.head_dim,
                       .cache_dtype = DTypeOf(layout.dtype),
                       .scale = frame.shape.scale,
                       .logit_softcap = frame.shape.logit_softcap};
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const CaseTraits traits = {.tables = static_cast<TableKind>(layer % kTableKinds)};
    const LayerCase tables = GenerateCase(chance.Bits(), traits, frame);
    for (const SketchTable& table : tables.tables) {
      auto& metric = model.description.sketch_metric;
      auto& directions = model.description.sketch_directions;
      metric.insert(metric.end(), table.metric.begin(), table.metric.end());
      directions.insert(directions.end(), table.directions.begin(), table.directions.end());
    }
    model.shapes.push_back(frame.shape);
    model.shapes.back().sliding_window = layer < kTableKinds ? 0 : 50 + chance.Below(300);
    model.description.sliding_window_tokens.push_back(model.shapes.back().sliding_window);
  }
  return model;
}

// A field that some versions of the client library do not have yet.
template <typename ClientPolicy>
bool SetOutputLimit(float limit, ClientPolicy* policy) {
  if constexpr (requires { policy->max_output_error = limit; }) {
    policy->max_output_error = limit;
    return true;
  }
  return false;
}
template <typename ClientPolicy>
void SetDraws(uint32_t draws_max, ClientPolicy* policy) {
  if constexpr (requires { policy->draws_max = draws_max; }) policy->draws_max = draws_max;
}

// A policy, and the part of its plan that replies are judged by.
struct Asked {
  client::Policy policy;
  Plan plan;
};

Asked MakePolicy(Chance* chance) {
  constexpr std::array<double, 4> kEtas = {0.05, 1e-2, 1e-3, 1e-9};
  constexpr std::array<float, 5> kErrors = {0.5F, 0.1F, 0.05F, 0.02F, 1e-3F};
  constexpr std::array<client::Selector, 11> kSelectors = {
      client::Selector::kGiven, client::Selector::kGiven,     client::Selector::kGiven,
      client::Selector::kGiven, client::Selector::kCertified, client::Selector::kCertified,
      client::Selector::kAuto,  client::Selector::kCis,       client::Selector::kPsaw,
      client::Selector::kCpe,   client::Selector::kDense};
  Asked asked;
  client::Policy& policy = asked.policy;
  Plan& plan = asked.plan;
  policy.selector = kSelectors[chance->Below(kSelectors.size())];
  policy.budget = client::Budget{.sink_tokens = chance->OneIn(2) ? 8 : chance->Below(40),
                                 .local_tokens = 1 + chance->Below(80),
                                 .top_k_tokens = 1 + chance->Below(100)};
  policy.layers = std::vector<client::LayerOverride>();
  policy.dense_below_tokens = 1;
  const uint32_t prove = chance->Below(8);
  plan.prove = prove == 0   ? Guarantee::kNone
               : prove == 1 ? Guarantee::kExact
               : prove < 5  ? Guarantee::kDeterministic
                            : Guarantee::kConfidence;
  policy.guarantee = static_cast<client::Guarantee>(plan.prove);
  if (chance->OneIn(2)) plan.max_dropped_mass = 0.5F / static_cast<float>(1 + chance->Below(100));
  policy.max_dropped_mass = plan.max_dropped_mass;
  const float error = kErrors[chance->Below(kErrors.size())];
  if (chance->OneIn(2) && SetOutputLimit(error, &policy)) plan.max_output_error = error;
  plan.failure_probability = kEtas[chance->Below(kEtas.size())];
  policy.failure_probability = plan.failure_probability;
  plan.draws_max = chance->OneIn(2) ? 1024 : 1 + chance->Below(100);
  SetDraws(plan.draws_max, &policy);
  const uint32_t violation = chance->Below(12);
  plan.on_violation = violation == 0  ? OnViolation::kFail
                      : violation < 3 ? OnViolation::kDense
                      : violation < 6 ? OnViolation::kGrow
                                      : OnViolation::kReport;
  policy.on_violation = static_cast<client::OnViolation>(plan.on_violation);
  plan.mode = chance->OneIn(10) ? Mode::kShadow : Mode::kEnforce;
  policy.mode = static_cast<client::Mode>(plan.mode);
  return asked;
}

// Positions that a caller names: few, many, none.
struct Given {
  Given(const LayerCase& layer_case, Chance* chance) {
    for (uint32_t kv_head = 0; kv_head < layer_case.shape.layout.kv_head_count; ++kv_head) {
      const uint32_t keep = 1 + chance->Below(chance->OneIn(2) ? 4 : 200);
      for (uint32_t token = 0; token < layer_case.length; ++token) {
        if (chance->OneIn(keep)) positions.push_back(token);
      }
      offsets.push_back(static_cast<uint32_t>(positions.size()));
    }
  }
  std::vector<uint32_t> positions;
  std::vector<uint32_t> offsets = {0};
};

LayerCase MakeCase(uint64_t seed, const LayerShape& shape) {
  // Sizes and kinds of the attacks on devices; what a server refuses to store is left out.
  const uint64_t products = uint64_t{shape.layout.query_head_count} * shape.layout.head_dim;
  LayerCase like = GenerateCase(seed, {.products_max = 1 << 16, .length_max = 4200});
  if (like.traits.keys == KeyKind::kNotFinite) like.traits.keys = KeyKind::kNormal;
  if (like.traits.values == ValueKind::kNotFinite) like.traits.values = ValueKind::kOneHuge;
  const auto length_max = static_cast<uint32_t>(std::max<uint64_t>(80, kProductsMax / products));
  LayerCase frame;
  frame.shape = shape;
  // Short sequences are mostly read in full, whatever the policy.
  constexpr uint32_t kLonger = 600;
  if (seed % 3 != 0) like.length += kLonger;
  frame.length = std::min(like.length, length_max);
  frame.query_count = std::min(like.query_count, frame.length);
  return GenerateCase(seed, like.traits, frame);
}

// One thread's connection.
class ServedAttacker {
 public:
  static absl::StatusOr<std::unique_ptr<ServedAttacker>> New(const EndpointOptions& options,
                                                             const std::vector<ServedModel>& all) {
    auto client = client::Client::Connect(
        {.endpoint = options.endpoint,
         .deadlines = {.data = std::chrono::seconds(30), .admin = std::chrono::seconds(60)}});
    if (!client.ok()) return client.status();
    return std::unique_ptr<ServedAttacker>(new ServedAttacker(*std::move(client), all));
  }

  client::Client* client() const { return client_.get(); }

  void RunCase(uint64_t seed, Tally* tally) {
    Chance chance(~seed);
    ++tally->caches;
    const ServedModel& model = models_[chance.Below(static_cast<uint32_t>(models_.size()))];
    const uint32_t layer = chance.Below(kLayers);
    const LayerCase layer_case = MakeCase(seed, model.shapes[layer]);
    reproduce_ = absl::StrCat("kvadversary --endpoint=... --case-seed=", seed, " [",
                              model.description.name, " layer ", layer, ", ",
                              Name(layer_case.traits), ", ", layer_case.length, " tokens]");
    auto sequence = client_->CreateSequence({.model = model.description.name});
    absl::Status status = sequence.status();
    if (status.ok()) status = Append(layer, layer_case, &*sequence);
    if (!status.ok()) return Fail(status, tally);
    Attack(layer, layer_case, *sequence, &chance, tally);
    status = sequence->Close();
    if (!status.ok()) Fail(status, tally);
  }

 private:
  ServedAttacker(std::unique_ptr<client::Client> client, const std::vector<ServedModel>& models)
      : client_(std::move(client)), models_(models) {}

  void Fail(const absl::Status& status, Tally* tally) const {
    ++tally->contradictions;
    tally->AddFailure(absl::StrCat(reproduce_, ": ", status.ToString()));
  }

  static absl::Status Append(uint32_t layer, const LayerCase& layer_case,
                             client::Sequence* sequence) {
    const KvLayout& layout = layer_case.shape.layout;
    const size_t token_bytes = size_t{layout.kv_head_count} * layout.vector_bytes();
    client::AppendWriter writer = sequence->Append();
    for (uint32_t begin = 0; begin < layer_case.length; begin += kTokensPerMessage) {
      const uint32_t count = std::min(kTokensPerMessage, layer_case.length - begin);
      const auto part = [&](const std::vector<std::byte>& all) {
        return ViewOf(layout,
                      absl::MakeConstSpan(all).subspan(begin * token_bytes, count * token_bytes),
                      count);
      };
      absl::Status status = writer.Write(layer, begin, part(layer_case.k), part(layer_case.v));
      if (!status.ok()) return status;
    }
    return writer.Commit().status();
  }

  static std::vector<WidenedHead> WidenSent(const LayerCase& layer_case) {
    const KvLayout& layout = layer_case.shape.layout;
    const size_t bytes = layout.vector_bytes();
    std::vector<WidenedHead> widened;
    std::vector<std::byte> row(layout.row_bytes());
    for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
      widened.push_back(Widen(layout, layer_case.length, [&](uint32_t token) {
        const size_t at = layer_case.ElementIndex(kv_head, token) * ElementBytes(layout.dtype);
        std::copy_n(&layer_case.k[at], bytes, row.data());
        std::copy_n(&layer_case.v[at], bytes, row.data() + bytes);
        return row.data();
      }));
    }
    return widened;
  }

  void Attack(uint32_t layer, const LayerCase& layer_case, const client::Sequence& sequence,
              Chance* chance, Tally* tally) const {
    const KvLayout& layout = layer_case.shape.layout;
    const std::vector<WidenedHead> widened = WidenSent(layer_case);
    std::vector<std::vector<HeadTruth>> truths(layer_case.queries.size());
    for (uint32_t i = 0; i < kCallsPerCase; ++i) {
      const uint32_t set = chance->Below(static_cast<uint32_t>(layer_case.queries.size()));
      if (truths[set].empty()) truths[set] = MakeTruths(layer_case, set, widened);
      const Asked asked = MakePolicy(chance);
      client::AttendQuery query = {
          .layer = layer, .position = layer_case.position(), .query_count = layer_case.query_count};
      query.q = client::Float32View(layer_case.queries[set], layer_case.query_count,
                                    layout.query_head_count, layout.head_dim);
      query.policy = asked.policy;
      query.return_selected = true;
      const Given given(layer_case, chance);
      if (asked.policy.selector == client::Selector::kGiven) {
        query.given = {.positions = given.positions, .offsets = given.offsets};
      }
      const auto reply = sequence.Attend(query);
      ++tally->calls;
      Judge(layer_case, asked.plan, truths[set], widened, reply, tally);
    }
  }

  void Judge(const LayerCase& layer_case, const Plan& plan, const std::vector<HeadTruth>& truths,
             const std::vector<WidenedHead>& widened,
             const absl::StatusOr<client::AttendRowResult>& reply, Tally* tally) const {
    JudgedCall judged;
    judged.layer_case = &layer_case;
    judged.truths = truths;
    judged.widened = widened;
    judged.plan = plan;
    judged.served = true;
    judged.status = reply.status();
    judged.reproduce = reproduce_;
    std::vector<GroupReport> groups;
    if (reply.ok()) {
      if (reply->attended_tokens != layer_case.length) {
        return Fail(absl::InternalError("attended_tokens is not what was appended"), tally);
      }
      judged.out = reply->out.data();
      judged.certificates = reply->certificates;
      judged.selected = reply->selected;
      for (const client::GroupReport& from : reply->groups) {
        GroupReport& group = groups.emplace_back();
        group.action = from.action;
        group.tokens_read = from.tokens_read;
      }
      judged.groups = groups;
    }
    JudgeCall(judged, tally);
  }

  std::unique_ptr<client::Client> client_;
  const std::vector<ServedModel>& models_;
  std::string reproduce_;
};

}  // namespace

absl::Status AttackEndpoint(const EndpointOptions& options, Tally* tally) {
  std::vector<ServedModel> models;
  models.reserve(kModels);
  for (uint32_t index = 0; index < kModels; ++index) models.push_back(MakeModel(index));
  const bool one = options.case_seed != 0;
  std::vector<std::unique_ptr<ServedAttacker>> attackers;
  for (uint32_t i = 0; i < (one ? 1 : options.thread_count); ++i) {
    auto attacker = ServedAttacker::New(options, models);
    if (!attacker.ok()) return attacker.status();
    attackers.push_back(*std::move(attacker));
  }
  for (const ServedModel& model : models) {
    const auto registered = attackers[0]->client()->RegisterModel(model.description);
    if (!registered.ok()) return registered.status();
  }
  if (one) {
    attackers[0]->RunCase(options.case_seed, tally);
    return absl::OkStatus();
  }
  RunUntil(
      {.certificates = options.certificates,
       .seconds = options.seconds,
       .thread_count = options.thread_count},
      [&](uint64_t index, uint32_t thread, Tally* counts) {
        attackers[thread]->RunCase(SeedOf(options.seed, index), counts);
      },
      tally);
  return absl::OkStatus();
}

}  // namespace kvservice::adversary
