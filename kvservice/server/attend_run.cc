#include "kvservice/server/attend_run.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

#include "attention/float16.h"

namespace kvservice {

absl::Status PrepareAttend(const v1::AttendRequest& request, const PolicyRegistry& registry,
                           const std::string& tenant, RegionCopy* region, AttendRun* run) {
  const absl::StatusOr<DType> output_dtype = OutputDTypeFromProto(request);
  if (!output_dtype.ok()) return output_dtype.status();
  run->output_dtype = *output_dtype;
  run->call.tenant = tenant;
  absl::Status status = AttendFromProto(request, registry, region, &run->policies, &run->call);
  run->row_bytes.resize(run->call.rows.size());
  // Those of an earlier call must not pass for this one's.
  for (std::string& row : run->row_bytes) row.clear();
  run->call.row_done = [run](uint32_t row) {
    EncodeRow(run->call.rows[row], run->call.results[row], &run->row_bytes[row]);
  };
  return status;
}

void DescribeAttend(const v1::AttendRequest& request, const AttendRun& run, const CallHost& host,
                    v1::AttendResponse* response) {
  AttendToProto(request, run.call, response);
  const uint64_t started_ns = std::max(run.call.started_ns, run.arrived_ns);
  response->set_queue_ns(started_ns - run.arrived_ns);
  response->set_service_ns(host.clock->SteadyNowNs() - started_ns);
  host.gate->Attended({.call_number = run.call.call_number,
                       .layer = run.call.layer,
                       .row_count = run.call.rows.size(),
                       .queue_ns = response->queue_ns(),
                       .service_ns = response->service_ns()});
}

void DescribeOutputs(const AttendRun& run, v1::Tensor* lse, v1::Tensor* out) {
  const absl::Span<const int64_t> shape = run.call.q.shape;
  assert(shape.size() == 3);
  lse->set_dtype(DTypeToProto(DType::kFloat32));
  lse->mutable_shape()->Add(shape.begin(), shape.begin() + 2);
  out->set_dtype(DTypeToProto(run.output_dtype));
  out->mutable_shape()->Add(shape.begin(), shape.end());
}

void StoreOutput(DType dtype, absl::Span<const float> out, std::byte* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, out.data(), out.size() * sizeof(float));
    return;
  }
  for (size_t i = 0; i < out.size(); ++i) StoreElement(dtype, out[i], to, i);
}

}  // namespace kvservice
