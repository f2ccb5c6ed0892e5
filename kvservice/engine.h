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
// Disk. With a disk tier, sequences that were suspended, evicted or appended to durably have rows
// there. A call that names one that is on disk, and not suspended, brings it back and waits for it,
// while others go on; when the pool is full the least recently used ones make room. What was
// acknowledged as durable, a truncate, a suspend and a drop of what is on disk included, survives a
// crash. A drain stores everything that there is room for. A sequence that the disk lost or damaged
// answers DATA_LOSS / SEQUENCE_LOST to its owner until it is dropped.
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
#include <functional>
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
#include "kvservice/attend_stats.h"
#include "kvservice/audit_report.h"
#include "kvservice/block_report.h"
#include "kvservice/cache/disk_tier.h"
#include "kvservice/clock.h"
#include "kvservice/deferred_report.h"
#include "kvservice/draw_keys.h"
#include "kvservice/explain_report.h"
#include "kvservice/mass_histograms.h"
#include "kvservice/model.h"
#include "kvservice/quota.h"
#include "kvservice/random.h"
#include "kvservice/sha256.h"
#include "kvservice/store_report.h"
#include "kvservice/transfer.h"
#include "selector/policy.h"

namespace kvservice {

struct SequenceId {
  std::array<std::byte, 16> bytes{};
  friend bool operator==(const SequenceId&, const SequenceId&) = default;
};

// A tensor as it arrived: row-major, contiguous, little endian, its shape not yet checked. `field`
// is how errors name it ("q").
struct TensorView {
  DType dtype = DType::kFloat32;
  absl::Span<const int64_t> shape;
  absl::Span<const std::byte> bytes;
  std::string_view field;
  // Whoever made it knows already that every element is finite.
  bool is_finite = false;
  // In memory that others may change at any time: nothing is decided by what is read there but by
  // a copy of it.
  bool is_shared = false;
};

struct EngineOptions {
  // Memory of the device for slices and sketches, reserved at start.
  size_t pool_bytes = size_t{4} << 30;
  // Memory of the host for slices that the device has no room for and reads in place, reserved
  // (pinned) at start. Sketches stay on the device.
  size_t host_pool_bytes = 0;
  size_t memory_bytes() const { return pool_bytes + host_pool_bytes; }
  uint32_t sequences_max = 4096;
  uint32_t sequences_per_tenant_max = 4096;
  // Of tenants by name, and of all others, which reserves nothing. What all reserve together fits
  // the pool.
  TenantQuotas tenant_quotas;
  TenantQuota quota_default;
  uint32_t models_max = 64;
  // Tokens of one sequence; more is RESOURCE_EXHAUSTED / SEQUENCE_TOO_LONG.
  uint32_t sequence_tokens_max = 1U << 20;
  // Tokens of prompts that a tenant's sequences may declare, in whole blocks; what is declared
  // beyond that is not matched. A block takes some 100 bytes. 0 = no prefix is matched.
  uint32_t prefix_tokens_per_tenant_max = 1U << 24;
  // Waiting calls of all kinds; more is RESOURCE_EXHAUSTED / OVERLOADED with a retry delay.
  uint32_t queue_calls_max = 1024;
  // Rows of one Attend call, and rows of one device batch.
  uint32_t rows_max = 256;
  // Time for which the executor looks for calls after each one before it sleeps; costs a CPU while
  // calls come.
  uint32_t spin_us = 0;
  uint32_t lease_default_ms = 10 * 60 * 1000;
  uint32_t lease_max_ms = 24 * 60 * 60 * 1000;
  // Most bytes that all lists and anchors of one sequence may use; beyond it its lists are dropped
  // (they are a cache).
  size_t list_bytes_per_sequence_max = size_t{64} << 20;
  // Most bytes of prompt queries that wait to become anchors in one sequence: what is beyond its
  // layers' equal shares, the oldest, is forgotten. 0 = none are kept.
  size_t seed_bytes_per_sequence_max = size_t{64} << 20;
  // Where the keys of sampled certificates come from; absent = a fresh secret from the random
  // source at start.
  std::optional<DrawSecret> draw_secret;
  // Share of calls, chosen at random, whose rows are audited: in [0, 1].
  double audit_rate = 0.001;
  // Rows kept for audits, and their memory.
  uint32_t audit_rows_max = 256;
  size_t audit_bytes_max = size_t{64} << 20;
  // Memory for the latest query of each layer of one sequence, which Explain takes when it is given
  // none; 0 = none is kept.
  size_t query_bytes_per_sequence_max = size_t{1} << 20;
  // Where the disk tier is, a directory for this engine alone; empty = there is none.
  std::string data_directory;
  // Rows of sequences on disk.
  uint64_t disk_bytes_max = uint64_t{64} << 30;
  // Rows that wait in memory to be written to files together; the log has them on disk already.
  // Twice as much while that happens.
  size_t disk_buffer_bytes = size_t{32} << 20;
  // Bytes that are read of it per second to find damage before somebody needs what is damaged; at
  // most one look through all of it begins per hour. 0 = none.
  uint64_t scrub_bytes_per_s = 0;
  // Sequences that may be on their way here from other engines at a time, 0 = none are taken, and
  // the time after which one that nothing comes for any more is forgotten.
  uint32_t receives_max = 8;
  uint32_t receive_idle_ms = 30'000;
  // Told of every violation that an audit finds, in one line, on the executor thread.
  std::function<void(const std::string& violation)> on_audit_violation;
};

enum class SequenceTier : uint8_t { kMemory, kDisk };

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
  SequenceTier tier = SequenceTier::kMemory;
  bool is_suspended = false;
  // Tokens that every layer has on disk.
  uint32_t stored_length = 0;
  // Tokens that it had from its creation, as those of another sequence's prompt; and those of its
  // own that new sequences may begin with now.
  uint32_t matched_tokens = 0;
  uint32_t matchable_tokens = 0;
  // Names the sketch tables that the sequence keeps for its whole life.
  Sha256::Digest sketch_table_digest{};
  AttendStats stats;
};

struct CreateOptions {
  std::string model;
  uint32_t lease_ms = 0;         // 0 = default
  std::optional<Policy> policy;  // replaces the model's default policy
  // Created once per (tenant, request_id) for as long as the sequence lives; a repeat returns the
  // same sequence. Empty = no such check.
  std::string request_id;
  // Ids of the tokens that will be appended, from the first one on; at most sequence_tokens_max,
  // borrowed until Create returns. The sequence begins with the longest prefix of them, in whole
  // blocks, that another sequence of the tenant, model and sketch tables declared and has in
  // memory. Its own blocks may be matched as they become whole in every layer, until they are
  // truncated, leave memory or are dropped. That the keys and values are those of the ids is the
  // caller's word.
  absl::Span<const uint32_t> token_ids = {};
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
  // Answered only when the layer's tokens up to here are on disk, synced. If that fails they are
  // in memory all the same, and the call may be repeated.
  bool is_durable = false;
  // Prompt queries, [n][query_head_count][head_dim] float32, finite, n at most
  // kQuerySampleTokensMax: to learn sketch tables from while the model learns, and with positions
  // to make anchors of (kvservice/seed_queries.h).
  std::optional<TensorView> query_sample = {};
  // [n], ascending, in [position, position + count); empty = the sample only serves tables.
  absl::Span<const uint32_t> query_sample_positions = {};
};

inline constexpr uint32_t kQuerySampleTokensMax = 256;

struct AppendResult {
  uint32_t layer_length = 0;
  // Every token of the call was already stored, with equal bytes.
  bool duplicate = false;
};

// What an engine says to a part of a transfer (kvservice/transfer.h).
struct ReceiveReply {
  // For the parts that follow.
  TransferAttempt attempt;
  bool wants_tables = false;
  // [layer_count]: send what is behind these.
  std::vector<LayerReceived> layers;
  // The sequence here, once it is whole: after the end, or at once if it came earlier.
  std::optional<SequenceInfo> sequence;
};

struct ExplainAsk {
  uint32_t layer = 0;
  // Limits on dropped mass to try, each in (0, 1), at most kExplainLimitsMax; empty = 0.2, 0.1,
  // 0.05, 0.02, 0.01.
  std::vector<float> limits;
  // [1 to 8][query_head_count][head_dim], any dtype, of the layer's last tokens; absent = the
  // latest query that was kept. Borrowed until the answer.
  std::optional<TensorView> q;
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

// What theory assumes about one KV head (selector/assumed.h): no bound of anything. Negative = no
// statement.
struct AssumedMasses {
  float cis_excess = -1.0F;
  float psaw_dropped = -1.0F;
  float etf_excess = -1.0F;
};

struct AttendRowResult {
  absl::Status status;
  uint32_t attended_length = 0;
  SelectorKind selector = SelectorKind::kDense;
  std::vector<GroupReport> groups;              // [kv_head_count]
  std::vector<AssumedMasses> assumed;           // [kv_head_count]
  std::vector<HeadCertificate> certificates;    // [query_count][query_head_count]
  std::vector<std::vector<uint32_t>> selected;  // [kv_head_count] if asked for
  // Exact masses of earlier rows of the sequence and layer, oldest first, this one last; empty but
  // for the call with which deferred_exact_steps query tokens have come together.
  std::vector<DeferredMasses> deferred;
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
  // status says why. Call number, epoch and the secret's id name the random numbers of the call.
  uint64_t call_number = 0;
  Epoch epoch{};
  uint64_t draw_secret_id = 0;
  // Steady time at which the executor took the call; 0 = it never did.
  uint64_t started_ns = 0;
  std::vector<float> out;  // [T][query_head_count][head_dim]
  std::vector<float> lse;  // [T][query_head_count]
  // If it has room for just that, outputs go here instead of to `out`: memory that others may
  // change, so nothing is read back. The engine empties it otherwise.
  absl::Span<float> out_place;
  std::vector<AttendRowResult> results;

  // If set, called once for every row of a call that runs, when its result is complete and before
  // `done`: on any of the device's threads, for several rows at a time.
  absl::AnyInvocable<void(uint32_t row) const> row_done;
  // OK if any row ran or could have run; an error only when nothing ran (bad shapes, unknown layer,
  // overload).
  absl::AnyInvocable<void(absl::Status)> done;
};

// Why sequences were moved from memory to disk.
enum class EvictionCause : uint8_t {
  kPoolFull,   // Others, or the tenant itself, needed room.
  kTenantMax,  // The tenant had, or would have had, more than it may.
  kIdle,       // Nobody used it and the pool was nearly full.
};
inline constexpr size_t kEvictionCauseCount = 3;
using EvictionTotals = std::array<uint64_t, kEvictionCauseCount>;  // By cause.

struct EngineStats {
  // Of the device's memory and the host's together, then of the host's.
  size_t pool_bytes = 0;
  size_t pool_bytes_used = 0;
  size_t host_pool_bytes = 0;
  size_t host_pool_bytes_used = 0;
  // Times that the rows of a block went to the host, and came back.
  uint64_t blocks_to_host_total = 0;
  uint64_t blocks_to_device_total = 0;
  uint64_t blocks_used = 0;
  uint32_t sequences = 0;
  uint32_t models = 0;
  std::vector<ModelShape> model_shapes;  // [models]
  uint32_t queue_calls = 0;
  // Calls that came, and how many of them were refused because the queue was full.
  uint64_t calls_total = 0;
  uint64_t calls_shed_total = 0;
  uint64_t leases_expired_total = 0;
  // Tenants that have sequences, what they have reserved of the pool, and what of that is free.
  uint32_t tenants = 0;
  size_t pool_bytes_reserved = 0;
  size_t pool_bytes_held = 0;
  EvictionTotals evictions{};
  // Tokens that sequences were created with, and those of them that were there already; and tokens
  // that may be matched once they are there, or are.
  uint64_t prefix_requested_tokens_total = 0;
  uint64_t prefix_matched_tokens_total = 0;
  uint64_t prefix_declared_tokens = 0;
  // Of the disk tier: sequences that are there and not in memory, that were lost, rows' bytes with
  // their limit (0 = there is no disk tier), and bytes of files.
  uint32_t sequences_on_disk = 0;
  uint32_t sequences_lost = 0;
  uint64_t disk_bytes_used = 0;
  uint64_t disk_bytes_max = 0;
  uint64_t disk_file_bytes = 0;
  // No write has failed; and at start nothing was missing for want of a drain.
  bool disk_is_healthy = true;
  bool disk_was_closed = true;
  // Looks for damage on disk.
  ScrubStats scrub;
  AttendStats attend;
  AuditStats audit;
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

  // Hashes the token ids on the caller's thread.
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
  // Out of memory, once everything is on disk and synced; harmless if it is there already.
  virtual void Suspend(std::string_view tenant, SequenceId id, uint64_t generation,
                       Done<SequenceInfo> done) = 0;
  // Back into memory; the generation goes up.
  virtual void Resume(std::string_view tenant, SequenceId id, uint64_t generation,
                      Done<SequenceInfo> done) = 0;
  // All sequences of a tenant ("" = of all tenants; for the admin listener only), ordered by id, at
  // most `limit` after `after`.
  virtual void List(std::string_view tenant, SequenceId after, uint32_t limit,
                    Done<std::vector<SequenceInfo>> done) = 0;
  // What a tenant may use from now on; nothing = what the options say. For the admin listener only.
  // A tenant that has more than it may gets no more, and with a disk tier its least recently used
  // sequences leave memory. INVALID_ARGUMENT / QUOTA_INVALID, RESOURCE_EXHAUSTED / QUOTAS_FULL.
  virtual void SetQuota(std::string_view tenant, std::optional<TenantQuota> quota,
                        Done<TenantUsage> done) = 0;
  // Tenants that use something or have a quota of their own, by name, at most `limit` after
  // `after`; the one that is named alone, whatever it uses, unless `only` is empty.
  virtual void ListTenants(std::string_view only, std::string_view after, uint32_t limit,
                           Done<std::vector<TenantUsage>> done) = 0;
  virtual void Append(AppendCall call, Done<AppendResult> done) = 0;
  // The caller keeps `call` alive until its `done` has run.
  virtual void Attend(AttendCall* call) = 0;
  // Computes kept rows of a sequence again and compares (kvservice/auditor.h tells the errors), one
  // by one when nothing else waits, replays one, or keeps the next ones.
  virtual void Audit(std::string_view tenant, SequenceId id, AuditAsk ask,
                     Done<AuditReport> done) = 0;
  // What the certified selector would cost under a ladder of limits (kvservice/explain.h tells the
  // errors).
  virtual void Explain(std::string_view tenant, SequenceId id, ExplainAsk ask,
                       Done<ExplainReport> done) = 0;
  // Checksums, norms and attention of one block (kvservice/describe_block.h tells the errors).
  virtual void DescribeBlock(std::string_view tenant, SequenceId id, BlockAsk ask,
                             Done<BlockReport> done) = 0;

  // A part of a sequence for another engine; the sequence stays as it is. FAILED_PRECONDITION /
  // GENERATION_MISMATCH once it was truncated.
  virtual void Send(std::string_view tenant, SequenceId id, uint64_t generation, SendAsk ask,
                    Done<TransferPart> done) = 0;
  // A part of a sequence of another engine, in the order of kvservice/transfer.h; `attempt` is what
  // the answer to the first said. The sequence is there, with an id of its own, when the last was
  // answered, and not before. Beginning again goes on where the attempt before stopped, or tells
  // the sequence that came of it while that lives; it ends the attempt before, of which parts are
  // ABORTED / TRANSFER_SUPERSEDED from then on. FAILED_PRECONDITION / TRANSFERS_NOT_TAKEN or
  // MODEL_MISMATCH, NOT_FOUND / MODEL_NOT_FOUND, RESOURCE_EXHAUSTED / POOL_FULL or TRANSFERS_BUSY
  // with a retry delay, SEQUENCES_FULL, TENANT_QUOTA, SEQUENCE_TOO_LONG or TABLES_FULL, DATA_LOSS /
  // TRANSFER_DAMAGED (what had come is then forgotten), INVALID_ARGUMENT / POLICY_INVALID,
  // TRANSFER_INVALID, TRANSFER_OUT_OF_ORDER or TENSOR_NOT_FINITE.
  virtual void Receive(std::string_view tenant, TransferAttempt attempt, TransferPart part,
                       Done<ReceiveReply> done) = 0;

  // Drops a sequence that is still as its head (the first part of Send) says: else
  // FAILED_PRECONDITION / SEQUENCE_GREW.
  virtual void DropSent(std::string_view tenant, SequenceId id, std::string head,
                        Done<SequenceInfo> done) = 0;

  // Reads everything on disk now and says what was found; what is damaged and in memory too is
  // written again, what is on disk alone is lost (DATA_LOSS / SEQUENCE_LOST from then on). Others
  // go on meanwhile. FAILED_PRECONDITION / NO_DISK_TIER, RESOURCE_EXHAUSTED / VERIFY_RUNNING with a
  // retry delay, UNAVAILABLE / DISK_FAILED if rows cannot be read now.
  virtual void VerifyStore(Done<StoreReport> done) = 0;

  virtual EngineStats Stats() const = 0;
  // Distributions by selector and layer; lives as long as the engine.
  virtual const MassHistograms& masses() const = 0;
  virtual std::string_view device_name() const = 0;
  // Refuses new calls (UNAVAILABLE / DRAINING), runs what is queued, stops the executor.
  // Idempotent; the destructor calls it.
  virtual void Drain() = 0;
};

// The seams are borrowed and outlive the engine. RESOURCE_EXHAUSTED if the pool cannot be reserved,
// UNAVAILABLE / RANDOM_UNAVAILABLE without random numbers. `tier`, or one that is opened at
// options.data_directory, has its sequences there from the start, with new leases; DATA_LOSS /
// STORE_DAMAGED if nobody can say which those are, else what opening it said
// (kvservice/cache/rocksdb_tier.h).
absl::StatusOr<std::unique_ptr<Engine>> NewEngine(const EngineOptions& options,
                                                  std::unique_ptr<Device> device, Clock* clock,
                                                  Random* random,
                                                  std::unique_ptr<DiskTier> tier = nullptr);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_ENGINE_H_
