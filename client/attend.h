// What goes into a call of attention and what comes out of it. Plain data; any thread.

#ifndef KVSERVICE_CLIENT_ATTEND_H_
#define KVSERVICE_CLIENT_ATTEND_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "attention/certificate.h"
#include "client/options.h"
#include "client/policy.h"
#include "client/step_buffers.h"
#include "client/tensor.h"

namespace kvservice::client {

class Sequence;

// For Selector::kGiven: positions of all KV heads, ascending and unique per head, concatenated;
// head h has positions[offsets[h] .. offsets[h + 1]), so there are kv_head_count + 1 offsets.
struct GivenPositions {
  absl::Span<const uint32_t> positions = {};
  absl::Span<const uint32_t> offsets = {};
};

// One sequence's part of a step.
struct AttendRow {
  // Borrowed; a sequence of the client that is called. Not nullptr.
  const Sequence* sequence = nullptr;
  // Index of the first query token. The row attends tokens [0, position + query_count), causally
  // among its own query tokens.
  uint32_t position = 0;
  // 1 to 8.
  uint32_t query_count = 1;
  // Default: the step's.
  std::optional<Policy> policy = {};
  GivenPositions given = {};
};

// One layer of one step of a batch. Everything is borrowed for the duration of the call.
struct AttendStep {
  uint32_t layer = 0;
  // 1 to 256, of one model. T = sum of query_count.
  absl::Span<const AttendRow> rows = {};
  // Default for the rows; absent = each sequence's own.
  std::optional<Policy> policy = {};
  // Also return the attended positions.
  bool return_selected = false;
  // [T][query_head_count][head_dim], any type, rotated.
  TensorView q = {};
  // [T][kv_head_count][head_dim], the model's cache type; both or neither. Stored at each row's
  // position before attending.
  TensorView k = {};
  TensorView v = {};
  // With it outputs are left in its memory, and AttendRowResult.out is empty. Its tensors should be
  // the step's.
  StepBuffers* buffers = nullptr;

  // Takes the tensors of `step_buffers`: q, and to be stored k and v.
  void SetBuffers(StepBuffers* step_buffers, bool store) {
    buffers = step_buffers;
    q = step_buffers->q_view();
    if (store) k = step_buffers->k_view();
    if (store) v = step_buffers->v_view();
  }
};

// One layer of one step of one sequence.
struct AttendQuery {
  uint32_t layer = 0;
  uint32_t position = 0;
  uint32_t query_count = 1;
  // [query_count][heads][head_dim], as in AttendStep.
  TensorView q = {};
  TensorView k = {};
  TensorView v = {};
  // Default: the sequence's.
  std::optional<Policy> policy = {};
  GivenPositions given = {};
  bool return_selected = false;
};

// How one KV head was answered.
struct GroupReport {
  Action action = Action::kDense;
  // A scan of the sketches was made to choose tokens.
  bool scanned = false;
  uint32_t tokens_read = 0;
  uint32_t tokens_scanned = 0;
  // Best cosine against the remembered queries; -2 = not computed.
  float similarity = -2.0F;
  // Tokens sampled for all of its query heads: keys alone, and keys with values.
  uint32_t keys_sampled = 0;
  uint32_t rows_sampled = 0;
  // Share of mass that the most similar remembered query's list was estimated to drop, used or not
  // (CisPolicy::max_dropped_mass_estimate); negative = not estimated. No bound.
  float sharing_estimate = -1.0F;
  // What theory says about the method under assumptions that nothing checks; no bound. The excess
  // over the best set of the same size of a list that was reused, the mass of hidden tokens, the
  // excess of a shallower layer's choice. Negative = no statement.
  float assumed_cis_excess_mass = -1.0F;
  float assumed_psaw_dropped_mass = -1.0F;
  float assumed_etf_excess_mass = -1.0F;
  // What the first is made of: an upper bound of the keys' norms, and how far the queries are from
  // those that the list was made for.
  float key_norm_max = -1.0F;
  float query_distance = -1.0F;
};

// What an earlier row of the sequence and layer has dropped, with every key scored since. Arrays
// are [query_count][query_head_count], rounded outward.
struct DeferredMasses {
  uint32_t position = 0;
  uint32_t query_count = 0;
  std::vector<float> dropped_mass_upper = {};
  std::vector<float> dropped_mass_lower = {};
};

struct AttendRowResult {
  // The other members are empty unless it is OK.
  absl::Status status = {};
  // The certificates speak about all tokens below it.
  uint32_t attended_tokens = 0;
  // The selector in force after kAuto, layer overrides and length rules.
  Selector selector = Selector::kDense;
  // [query_count][query_head_count][head_dim]; empty with AttendStep::buffers.
  std::vector<float> out = {};
  // [query_count][query_head_count], natural log of the attended mass.
  std::vector<float> lse = {};
  // [query_count][query_head_count].
  std::vector<HeadCertificate> certificates = {};
  // [kv_head_count].
  std::vector<GroupReport> groups = {};
  // [kv_head_count], ascending positions; empty unless asked for.
  std::vector<std::vector<uint32_t>> selected = {};
  // Oldest first, this row last; empty unless Policy::deferred_exact_steps have come together.
  std::vector<DeferredMasses> deferred = {};
};

struct AttendResult {
  // The way that the call took; never kAuto.
  Transport transport = Transport::kUnary;
  // Names this call in the server's logs and audits; with the 16 bytes of the epoch and the
  // secret's id also the random numbers of its sampled certificates.
  uint64_t call_number = 0;
  std::string epoch = {};
  uint64_t draw_secret_id = 0;
  // Time in the server: waiting, and working.
  uint64_t queue_ns = 0;
  uint64_t service_ns = 0;
  // In the order of the step's rows.
  std::vector<AttendRowResult> rows = {};
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_ATTEND_H_
