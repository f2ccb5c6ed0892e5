// One growing KV history on the server, owned by this object.

#ifndef KVSERVICE_CLIENT_SEQUENCE_H_
#define KVSERVICE_CLIENT_SEQUENCE_H_

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/append_writer.h"
#include "client/attend.h"

namespace kvservice::client {

// Inside the library only.
struct Core;

struct SequenceInfo {
  std::string model = {};
  // Tokens that every layer has, and tokens of the longest layer.
  uint32_t length_tokens = 0;
  uint32_t length_max_tokens = 0;
  uint32_t block_count = 0;
  uint64_t bytes = 0;
  // Its keys and values are on disk and not in memory; and stay there until Resume.
  bool is_on_disk = false;
  bool is_suspended = false;
  // Tokens that every layer has on disk.
  uint32_t durable_tokens = 0;
  // Tokens that it was created with, and tokens of its own that new sequences may be created with.
  uint32_t matched_tokens = 0;
  uint32_t matchable_tokens = 0;
  std::chrono::milliseconds lease_remaining{0};
  // Certificates so far, those with a deterministic or exact statement, and their largest bound.
  uint64_t certificates = 0;
  uint64_t certificates_proven = 0;
  // Scans of KV heads that made anchors of prompt queries (QuerySample::positions).
  uint64_t anchor_seed_scans = 0;
  double dropped_mass_upper_max = 0.0;
};

// A sequence that is on another server now: Client::Adopt of a client of that server takes it over.
struct Transferred {
  std::string id = {};
  uint64_t generation = 0;
  // Keys and values that were sent: less than all after a broken transfer, 0 if it was there.
  uint64_t sent_bytes = 0;
};

// Move-only. The destructor asks the client to drop the sequence in the background: it neither
// blocks nor fails, and a sequence that cannot be dropped expires with its lease. One thread at a
// time, as the tokens of a sequence have an order; different sequences are independent. The client
// outlives its sequences.
//
// Errors of all calls: NOT_FOUND / SEQUENCE_NOT_FOUND when the server has forgotten it (expired,
// dropped, restarted), FAILED_PRECONDITION / GENERATION_MISMATCH when its contents changed behind
// this object, INVALID_ARGUMENT / REQUEST_INVALID after Close or Detach.
class Sequence {
 public:
  // Client::CreateSequence and Client::Adopt make sequences.
  Sequence(Core* core, std::string id, uint64_t generation, uint32_t matched_tokens = 0);
  ~Sequence();
  Sequence(Sequence&& other) noexcept;
  Sequence& operator=(Sequence&& other) noexcept;

  // 16 bytes; empty after Close, Detach and being moved from.
  const std::string& id() const { return id_; }
  // Version of the contents; Truncate raises it.
  uint64_t generation() const { return generation_; }
  // Tokens that the server had already when the sequence was created with token ids: append from
  // here.
  uint32_t matched_tokens() const { return matched_tokens_; }

  // With kDurable, what Commit has acknowledged is on disk.
  AppendWriter Append(Durability durability = Durability::kMemory) const;

  // Appends k and v, if given, and attends. Safe to repeat. The row's error is the call's.
  absl::StatusOr<AttendRowResult> Attend(const AttendQuery& query) const;

  // A copy-on-write child with the first tokens, by default all that every layer has.
  absl::StatusOr<Sequence> Fork(std::optional<uint32_t> length_tokens = std::nullopt) const;

  // Forgets the newest tokens. This object moves on to the new generation.
  absl::Status Truncate(uint32_t length_tokens);

  // Out of the server's memory, onto its disk; then it can only be described, resumed and closed.
  // FAILED_PRECONDITION / NO_DISK_TIER if it has none.
  absl::Status Suspend() const;
  // Back into memory. This object moves on to the new generation.
  absl::Status Resume();

  // A server that was restarted may have fewer tokens than this object knew, at another generation:
  // moves on to that, and tells what there is. Append goes on from there.
  absl::StatusOr<SequenceInfo> Refresh();

  // To another server, from this sequence's server to that, with all tokens that it has now. What
  // the other then has answers as this does, to the bit. Safe to repeat. PERMISSION_DENIED /
  // TRANSFER_TARGET_NOT_ALLOWED for an endpoint that the server was not started with; the
  // errors of SequenceService.Transfer.
  absl::StatusOr<Transferred> Transfer(const std::string& target_endpoint) const;
  // The same, and this server drops it once the other has it: this object owns nothing then. After
  // an error it does as before.
  absl::StatusOr<Transferred> MoveTo(const std::string& target_endpoint);

  absl::StatusOr<SequenceInfo> Describe() const;

  // Drops it now, and tells whether that worked. Whatever happened, this object owns nothing
  // afterwards.
  absl::Status Close();

  // Gives up ownership: the sequence lives until its lease ends. Returns its id.
  std::string Detach();

 private:
  friend class Client;

  absl::StatusOr<Transferred> Send(const std::string& target_endpoint, bool moves) const;

  Core* core_;
  std::string id_;
  uint64_t generation_;
  uint32_t matched_tokens_;
};

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_SEQUENCE_H_
