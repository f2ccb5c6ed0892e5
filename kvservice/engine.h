// The engine: sequences, their caches, and one executor thread that runs them on a device.
//
// Threads. Every call below may come from any thread. Calls that touch sequences are queued to the
// executor, which alone reads and changes sequences, so operations on one sequence are linearizable
// and need no locks. Results come back through `done`, invoked exactly once, on the executor thread
// (or on the caller's thread when the queue is full or the engine is stopping): `done` must be
// quick and must not call back into the engine synchronously waiting for a result. Spans and output
// memory in a call are borrowed until `done` runs.
//
// Order. Attend calls go before control calls, control calls before Append chunks; after a bounded
// number of Attend batches one waiting call of the other kinds runs, so that none starves. Waiting
// Attend calls of one model and layer are run as one device batch. Order among calls that one
// caller sends without waiting for answers is kept per kind, for Attend per layer, not across kinds
// or layers.
//
// Leases. Every call that names a sequence (List does not) starts its lease anew.
//
// Errors are absl::Status made by kvservice/error.h: reason and field are part of the contract.
// Anything about a handle that is unknown, expired or owned by another tenant is NOT_FOUND /
// SEQUENCE_NOT_FOUND with the same text. A failed call changes nothing.

#ifndef KVSERVICE_KVSERVICE_ENGINE_H_
#define KVSERVICE_KVSERVICE_ENGINE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "attention/certificate.h"
#include "attention/device.h"
#include "kvservice/clock.h"
#include "kvservice/model.h"
#include "kvservice/random.h"
#include "selector/policy.h"

namespace kvservice {

struct SequenceId {
  std::array<std::byte, 16> bytes{};
  friend bool operator==(const SequenceId&, const SequenceId&) = default;
};

// A tensor as it arrived: row-major, contiguous, little endian, not yet checked. `field` is how
// errors name it ("q").
struct TensorView {
  DType dtype = DType::kFloat32;
  absl::Span<const int64_t> shape;
  absl::Span<const std::byte> bytes;
  std::string_view field;
};

struct EngineOptions {
  // Host memory for slices and sketches, reserved at start.
  size_t pool_bytes = size_t{4} << 30;
  uint32_t sequences_max = 4096;
  uint32_t sequences_per_tenant_max = 4096;
  uint32_t models_max = 64;
  // Tokens of one sequence; more is RESOURCE_EXHAUSTED / SEQUENCE_TOO_LONG.
  uint32_t sequence_tokens_max = 1U << 20;
  // Waiting calls of all kinds; more is RESOURCE_EXHAUSTED / OVERLOADED with a retry delay.
  uint32_t queue_calls_max = 1024;
  // Rows of one Attend call, and rows of one device batch.
  uint32_t rows_max = 256;
  uint32_t lease_default_ms = 10 * 60 * 1000;
  uint32_t lease_max_ms = 24 * 60 * 60 * 1000;
  // Most bytes that all lists and anchors of one sequence may use; beyond it its lists are dropped
  // (they are a cache).
  size_t list_bytes_per_sequence_max = size_t{64} << 20;
};

// Running totals of one sequence or of the whole engine. Ratios carry both of their parts.
struct AttendStats {
  uint64_t attend_rows = 0;
  // Per (row, KV head): how many there were, how many scanned to choose, how many were answered
  // densely.
  uint64_t groups = 0;
  uint64_t groups_scanned = 0;
  uint64_t groups_dense = 0;
  uint64_t tokens_read = 0;
  uint64_t tokens_visible = 0;
  // Per (query token, query head): certificates at level deterministic or exact, their sum and
  // largest upper bound.
  uint64_t certificates = 0;
  uint64_t certificates_proven = 0;
  double dropped_mass_upper_sum = 0.0;
  double dropped_mass_upper_max = 0.0;
  // Sum over certificates of their failure probabilities (union bound).
  double failure_probability_sum = 0.0;
};

struct SequenceInfo {
  SequenceId id;
  uint64_t generation = 0;
  std::string model;
  std::string tenant;
  // Tokens that every layer has; and the longest layer's.
  uint32_t length = 0;
  uint32_t length_max = 0;
  uint32_t block_count = 0;
  size_t bytes = 0;
  uint64_t lease_remaining_ms = 0;
  AttendStats stats;
};

struct CreateOptions {
  std::string model;
  uint32_t lease_ms = 0;         // 0 = default
  std::optional<Policy> policy;  // replaces the model's default policy
  // Created once per (tenant, request_id) for as long as the sequence lives; a repeat returns the
  // same sequence. Empty = no such check.
  std::string request_id;
};

// One layer's rows of one sequence, to be stored at [position, position + count). Idempotent: what
// is already stored must be equal.
struct AppendCall {
  std::string tenant;
  SequenceId id;
  uint64_t generation = 0;
  uint32_t layer = 0;
  uint32_t position = 0;
  TensorView k, v;  // [count][kv_head_count][head_dim], the model's cache dtype, finite
};

struct AppendResult {
  uint32_t layer_length = 0;
  // Every token of the call was already stored, with equal bytes.
  bool duplicate = false;
};

struct AttendCallRow {
  SequenceId id;
  uint64_t generation = 0;
  uint32_t position = 0;
  uint32_t query_count = 1;
  const Policy* policy = nullptr;  // nullptr = the call's
  // For selector `given`: [kv_head_count + 1] offsets into positions.
  absl::Span<const uint32_t> given;
  absl::Span<const uint32_t> given_offsets;
};

struct AttendRowResult {
  absl::Status status;
  uint32_t attended_length = 0;
  SelectorKind selector = SelectorKind::kDense;
  std::vector<GroupReport> groups;              // [kv_head_count]
  std::vector<HeadCertificate> certificates;    // [query_count][query_head_count]
  std::vector<std::vector<uint32_t>> selected;  // [kv_head_count] if asked for
};

// One layer, many rows; k and v, when given, are appended first. T = sum of query_count.
struct AttendCall {
  std::string tenant;
  uint32_t layer = 0;
  std::vector<AttendCallRow> rows;
  TensorView q;                 // [T][query_head_count][head_dim], any dtype, finite
  std::optional<TensorView> k;  // [T][kv_head_count][head_dim], the model's cache dtype
  std::optional<TensorView> v;
  const Policy* policy = nullptr;  // nullptr = the sequence's
  bool want_selected = false;

  // Outputs. `out` and `lse` are sized by the engine; a failed row's numbers are zero and its
  // status says why.
  uint64_t call_number = 0;
  // Steady time at which the executor took the call; 0 = it never did.
  uint64_t started_ns = 0;
  std::vector<float> out;  // [T][query_head_count][head_dim]
  std::vector<float> lse;  // [T][query_head_count]
  std::vector<AttendRowResult> results;

  // OK if any row ran or could have run; an error only when nothing ran (bad shapes, unknown layer,
  // overload).
  absl::AnyInvocable<void(absl::Status)> done;
};

struct EngineStats {
  size_t pool_bytes = 0;
  size_t pool_bytes_used = 0;
  uint64_t blocks_used = 0;
  uint32_t sequences = 0;
  uint32_t models = 0;
  uint32_t queue_calls = 0;
  // Calls that came, and how many of them were refused because the queue was full.
  uint64_t calls_total = 0;
  uint64_t calls_shed_total = 0;
  uint64_t leases_expired_total = 0;
  AttendStats attend;
};

template <typename T>
using Done = absl::AnyInvocable<void(absl::StatusOr<T>)>;

class Engine {
 public:
  virtual ~Engine() = default;

  // ALREADY_EXISTS / MODEL_EXISTS if the name is taken by a different spec; the same spec again is
  // OK. Synchronous and quick.
  virtual absl::StatusOr<uint64_t> RegisterModel(ModelSpec spec) = 0;
  virtual absl::StatusOr<ModelSpec> GetModel(std::string_view name) const = 0;
  virtual std::vector<ModelSpec> ListModels() const = 0;

  virtual void Create(std::string_view tenant, CreateOptions options, Done<SequenceInfo> done) = 0;
  // A copy-on-write child holding the first `length` tokens of every layer (UINT32_MAX = all that
  // every layer has).
  virtual void Fork(std::string_view tenant, SequenceId id, uint64_t generation, uint32_t length,
                    uint32_t lease_ms, Done<SequenceInfo> done) = 0;
  // Forgets tokens at and above `length`; the generation goes up.
  virtual void Truncate(std::string_view tenant, SequenceId id, uint64_t generation,
                        uint32_t length, Done<SequenceInfo> done) = 0;
  virtual void Get(std::string_view tenant, SequenceId id, Done<SequenceInfo> done) = 0;
  virtual void Drop(std::string_view tenant, SequenceId id, Done<SequenceInfo> done) = 0;
  virtual void RenewLease(std::string_view tenant, SequenceId id, uint64_t generation,
                          uint32_t lease_ms, Done<SequenceInfo> done) = 0;
  // All sequences of a tenant ("" = of all tenants; for the admin listener only), ordered by id, at
  // most `limit` after `after`.
  virtual void List(std::string_view tenant, SequenceId after, uint32_t limit,
                    Done<std::vector<SequenceInfo>> done) = 0;
  virtual void Append(AppendCall call, Done<AppendResult> done) = 0;
  // The caller keeps `call` alive until its `done` has run.
  virtual void Attend(AttendCall* call) = 0;

  virtual EngineStats Stats() const = 0;
  virtual std::string_view device_name() const = 0;
  // Refuses new calls (UNAVAILABLE / DRAINING), runs what is queued, stops the executor.
  // Idempotent; the destructor calls it.
  virtual void Drain() = 0;
};

// The seams are borrowed and outlive the engine. RESOURCE_EXHAUSTED if the pool cannot be reserved.
absl::StatusOr<std::unique_ptr<Engine>> NewEngine(const EngineOptions& options,
                                                  std::unique_ptr<Device> device, Clock* clock,
                                                  Random* random);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ENGINE_H_
