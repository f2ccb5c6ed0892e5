#include "kvservice/server/convert.h"

#include <cstring>
#include <optional>

#include "attention/rounding.h"
#include "kvservice/error.h"
#include "kvservice/tensor_check.h"
#include "selector/assumed.h"

namespace kvservice {
namespace {

// Ranks beyond this are refused before their extents are looked at.
constexpr int kRankMax = 8;

std::string Path(std::string_view field, std::string_view member) {
  return std::string(field) + "." + std::string(member);
}

absl::Status CheckShape(const v1::Tensor& tensor, std::string_view field) {
  const std::string path = Path(field, "shape");
  if (tensor.shape_size() == 0 || tensor.shape_size() > kRankMax) {
    return MakeError(absl::StatusCode::kInvalidArgument,
                     path + " has " + std::to_string(tensor.shape_size()) + " extents",
                     {.reason = "TENSOR_SHAPE_MISMATCH", .field = path, .metadata = {}});
  }
  for (const int64_t extent : tensor.shape()) {
    if (extent >= 1) continue;
    return MakeError(absl::StatusCode::kInvalidArgument,
                     path + " has the extent " + std::to_string(extent) + ", expected at least 1",
                     {.reason = "TENSOR_SHAPE_MISMATCH",
                      .field = path,
                      .metadata = {{"extent", std::to_string(extent)}}});
  }
  return absl::OkStatus();
}

absl::Status CheckSize(const v1::Tensor& tensor, DType dtype, std::string_view field) {
  const std::optional<size_t> bytes = TensorBytes(dtype, tensor.shape());
  if (bytes == tensor.data().size()) return absl::OkStatus();
  const std::string expected =
      bytes.has_value() ? std::to_string(*bytes) : "a number that does not fit 64 bits";
  const std::string got = std::to_string(tensor.data().size());
  const std::string path = Path(field, "data");
  return MakeError(absl::StatusCode::kInvalidArgument,
                   path + " has " + got + " bytes, its shape needs " + expected,
                   {.reason = "TENSOR_SIZE_MISMATCH",
                    .field = path,
                    .metadata = {{"got", got}, {"expected", expected}}});
}

}  // namespace

std::optional<DType> DTypeFromProto(v1::DataType dtype) {
  switch (dtype) {
    case v1::DATA_TYPE_FLOAT32:
      return DType::kFloat32;
    case v1::DATA_TYPE_FLOAT16:
      return DType::kFloat16;
    case v1::DATA_TYPE_BFLOAT16:
      return DType::kBfloat16;
    default:
      return std::nullopt;
  }
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

absl::Status UnknownDTypeError(const std::string& path, int value) {
  return MakeError(absl::StatusCode::kInvalidArgument,
                   path + " has the unknown type " + std::to_string(value),
                   {.reason = "TENSOR_DTYPE_UNKNOWN",
                    .field = path,
                    .metadata = {{"dtype", std::to_string(value)}}});
}

namespace {

// The payload that is a range of a region. The shape has been checked.
absl::StatusOr<RegionCopy::Payload> RegionPayload(const v1::Tensor& tensor, DType dtype,
                                                  std::string_view field, RegionCopy* region) {
  const std::string path = Path(field, "region");
  if (region == nullptr) {
    return InvalidField(path, "TENSOR_REGION_NOT_SERVED",
                        path + " is for calls that come through a lane");
  }
  if (!tensor.data().empty()) {
    return InvalidField(path, "TENSOR_PAYLOAD_AMBIGUOUS", path + " comes with data: one of both");
  }
  const std::optional<size_t> bytes = TensorBytes(dtype, tensor.shape());
  if (!bytes.has_value()) return CheckSize(tensor, dtype, field);
  return region->Take(tensor.region(), dtype, *bytes, field);
}

}  // namespace

absl::StatusOr<TensorView> TensorFromProto(const v1::Tensor& tensor, std::string_view field,
                                           RegionCopy* region) {
  const std::optional<DType> dtype = DTypeFromProto(tensor.dtype());
  if (!dtype.has_value()) return UnknownDTypeError(Path(field, "dtype"), tensor.dtype());
  absl::Status status = CheckShape(tensor, field);
  if (status.ok() && tensor.has_region()) {
    const absl::StatusOr<RegionCopy::Payload> payload =
        RegionPayload(tensor, *dtype, field, region);
    if (!payload.ok()) return payload.status();
    return TensorView{.dtype = *dtype,
                      .shape = tensor.shape(),
                      .bytes = payload->bytes,
                      .field = field,
                      .is_finite = payload->is_finite,
                      .is_shared = payload->is_shared};
  }
  if (status.ok()) status = CheckSize(tensor, *dtype, field);
  if (!status.ok()) return status;
  const std::string& data = tensor.data();
  return TensorView{.dtype = *dtype,
                    .shape = tensor.shape(),
                    .bytes = {reinterpret_cast<const std::byte*>(data.data()), data.size()},
                    .field = field};
}

absl::StatusOr<AppendCall> AppendFromProto(const v1::AppendRequest& request,
                                           const std::string& tenant, RegionCopy* region) {
  absl::StatusOr<SequenceId> id = IdFromProto(request.handle().id(), "handle.id");
  if (!id.ok()) return id.status();
  absl::StatusOr<TensorView> k = TensorFromProto(request.k(), "k", region);
  if (!k.ok()) return k.status();
  absl::StatusOr<TensorView> v = TensorFromProto(request.v(), "v", region);
  if (!v.ok()) return v.status();
  if (!v1::Durability_IsValid(request.durability())) {
    return InvalidField("durability", "ENUM_UNKNOWN", "durability is not a known value");
  }
  std::optional<TensorView> query_sample;
  if (request.has_query_sample()) {
    absl::StatusOr<TensorView> sample =
        TensorFromProto(request.query_sample(), "query_sample", region);
    if (!sample.ok()) return sample.status();
    query_sample = *sample;
  }
  return AppendCall{.tenant = tenant,
                    .id = *id,
                    .generation = request.handle().generation(),
                    .layer = request.layer(),
                    .position = request.position(),
                    .k = *k,
                    .v = *v,
                    .is_durable = request.durability() == v1::DURABILITY_DURABLE,
                    .query_sample = query_sample,
                    .query_sample_positions = request.query_sample_positions()};
}

absl::StatusOr<SequenceId> IdFromProto(std::string_view id, std::string_view field) {
  SequenceId result;
  if (id.size() != result.bytes.size()) {
    return MakeError(absl::StatusCode::kInvalidArgument,
                     std::string(field) + " has " + std::to_string(id.size()) +
                         " bytes, expected " + std::to_string(result.bytes.size()),
                     {.reason = "HANDLE_MALFORMED",
                      .field = std::string(field),
                      .metadata = {{"got", std::to_string(id.size())}}});
  }
  std::memcpy(result.bytes.data(), id.data(), id.size());
  return result;
}

void SequenceToProto(const SequenceInfo& info, v1::Sequence* sequence) {
  v1::SequenceHandle* handle = sequence->mutable_handle();
  handle->set_id(info.id.bytes.data(), info.id.bytes.size());
  handle->set_generation(info.generation);
  sequence->set_model(info.model);
  sequence->set_length_tokens(info.length);
  sequence->set_length_max_tokens(info.length_max);
  sequence->set_block_count(info.block_count);
  sequence->set_bytes(info.bytes);
  sequence->set_lease_remaining_ms(info.lease_remaining_ms);
  sequence->set_sketch_table_digest(info.sketch_table_digest.data(),
                                    info.sketch_table_digest.size());
  sequence->set_tier(info.tier == SequenceTier::kDisk ? v1::TIER_DISK : v1::TIER_MEMORY);
  sequence->set_suspended(info.is_suspended);
  sequence->set_durable_tokens(info.stored_length);
  sequence->set_matched_tokens(info.matched_tokens);
  sequence->set_matchable_tokens(info.matchable_tokens);
  TotalsToProto(info.stats, info.length_max, sequence->mutable_totals());
}

void TotalsToProto(const AttendStats& stats, uint64_t token_count_max, v1::AttendTotals* totals) {
  totals->set_rows(stats.attend_rows);
  totals->set_groups(stats.groups);
  totals->set_groups_scanned(stats.groups_scanned);
  totals->set_groups_dense(stats.groups_dense);
  totals->set_tokens_read(stats.tokens_read);
  totals->set_tokens_visible(stats.tokens_visible);
  totals->set_certificates(stats.certificates);
  totals->set_certificates_proven(stats.certificates_proven);
  totals->set_dropped_mass_upper_sum(stats.dropped_mass_upper_sum);
  totals->set_dropped_mass_upper_max(stats.dropped_mass_upper_max);
  totals->set_failure_probability_sum(stats.failure_probability_sum);
  totals->mutable_certificates_by_level()->Add(stats.by_level.begin(), stats.by_level.end());
  totals->mutable_certificates_by_action()->Add(stats.by_action.begin(), stats.by_action.end());
  totals->mutable_dropped_mass_upper_bounds()->Add(kDroppedMassBounds.begin(),
                                                   kDroppedMassBounds.end());
  totals->mutable_dropped_mass_upper_counts()->Add(stats.dropped_mass_counts.begin(),
                                                   stats.dropped_mass_counts.end());
  totals->set_keys_sampled(stats.keys_sampled);
  totals->set_rows_sampled(stats.rows_sampled);
  totals->set_anchor_seed_scans(stats.anchor_seed_scans);
  if (stats.certificates_proven > 0 && token_count_max > 0) {
    // The bound is concave in the mass, so at the mean it covers the mean over calls.
    const double mean =
        DivideUp(stats.dropped_mass_upper_sum, static_cast<double>(stats.certificates_proven));
    totals->set_assumed_mutual_information_loss_nats(
        MutualInformationBoundNats(MassUpper{mean}, token_count_max));
  }
}

}  // namespace kvservice
