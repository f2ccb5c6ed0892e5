// Requests and replies between the wire and the engine. Every size that a caller sends is checked
// here, before anything is allocated by it; every error names its field. Views borrow from the
// message they were made of. Pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_SERVER_CONVERT_H_
#define KVSERVICE_KVSERVICE_SERVER_CONVERT_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kvservice/engine.h"
#include "kvservice/model.h"
#include "kvservice/server/policy_registry.h"
#include "kvservice/server/region_copy.h"
#include "kvservice/v1/admin.pb.h"
#include "kvservice/v1/attention.pb.h"
#include "kvservice/v1/model.pb.h"
#include "kvservice/v1/sequence.pb.h"
#include "kvservice/v1/types.pb.h"

namespace kvservice {

// Nothing for a type that this version does not know.
std::optional<DType> DTypeFromProto(v1::DataType dtype);
v1::DataType DTypeToProto(DType dtype);
// INVALID_ARGUMENT / TENSOR_DTYPE_UNKNOWN.
absl::Status UnknownDTypeError(const std::string& path, int value);

// A tensor of a known type whose extents are at least 1 and multiply to the payload's size.
// INVALID_ARGUMENT: TENSOR_DTYPE_UNKNOWN (field.dtype), TENSOR_SHAPE_MISMATCH (field.shape),
// TENSOR_SIZE_MISMATCH (field.data), and for a tensor that is a range of a region
// TENSOR_REGION_NOT_SERVED (field.region) where there is none (nullptr), TENSOR_PAYLOAD_AMBIGUOUS
// (field.region) with data besides, and what RegionCopy::Copy says. `field` is borrowed by the
// view.
absl::StatusOr<TensorView> TensorFromProto(const v1::Tensor& tensor, std::string_view field,
                                           RegionCopy* region = nullptr);

// INVALID_ARGUMENT / HANDLE_MALFORMED unless the id has 16 bytes.
absl::StatusOr<SequenceId> IdFromProto(std::string_view id, std::string_view field);

// Shares of `info` that every caller may see; the tenant is left out.
void SequenceToProto(const SequenceInfo& info, v1::Sequence* sequence);

// `token_count_max` bounds the tokens of any sequence in the totals.
void TotalsToProto(const AttendStats& stats, uint64_t token_count_max, v1::AttendTotals* totals);

// The engine checks the result further.
absl::StatusOr<ModelSpec> ModelFromProto(const v1::Model& model, const PolicyRegistry& registry);
// Sketch tables are costly: they are written only if asked for, and never when all are the
// identity.
void ModelToProto(const ModelSpec& spec, bool with_sketch_tables, v1::Model* model);

// Fills everything but `done`. Tensors and given positions are borrowed from `request`, or copied
// to `region` (may be nullptr) and borrowed from there; inline policies are stored in `policies`,
// which `call` borrows. INVALID_ARGUMENT also for no rows and for one of k and v without the other.
struct AttendPolicies {
  std::vector<Policy> rows;
  Policy call;
};
absl::Status AttendFromProto(const v1::AttendRequest& request, const PolicyRegistry& registry,
                             RegionCopy* region, AttendPolicies* policies, AttendCall* call);

// Tensors are borrowed from `request`, or copied to `region` (may be nullptr) and borrowed from
// there. The engine checks the result further.
absl::StatusOr<AppendCall> AppendFromProto(const v1::AppendRequest& request,
                                           const std::string& tenant, RegionCopy* region);

// What the caller asked `out` to be; FLOAT32 by default. INVALID_ARGUMENT / TENSOR_DTYPE_UNKNOWN.
absl::StatusOr<DType> OutputDTypeFromProto(const v1::AttendRequest& request);

v1::Level LevelToProto(Level level);
v1::Action ActionToProto(Action action);
void CertificatesToProto(const std::vector<HeadCertificate>& certificates, v1::Certificates* to);

// INVALID_ARGUMENT / EPOCH_MALFORMED. The engine checks the result further.
absl::StatusOr<AuditAsk> AuditFromProto(const v1::AuditRequest& request);
void AuditTotalsToProto(const AuditStats& stats, v1::AuditTotals* totals);
void AuditToProto(const AuditReport& report, v1::AuditResponse* response);

// `q` of the result borrows from `request`.
absl::StatusOr<ExplainAsk> ExplainFromProto(const v1::ExplainRequest& request);
void ExplainToProto(const ExplainReport& report, v1::ExplainResponse* response);

// Everything but the rows' results and the two tensors.
void AttendToProto(const v1::AttendRequest& request, const AttendCall& call,
                   v1::AttendResponse* response);
void RowToProto(const AttendCallRow& row, const AttendRowResult& from, v1::AttendRowResult* to);
// The same message as its bytes, several times as fast; they replace what is in `to`, whose memory
// is used again.
void EncodeRow(const AttendCallRow& row, const AttendRowResult& from, std::string* to);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_CONVERT_H_
