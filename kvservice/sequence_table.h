// The sequences of an engine: who owns them, how long they live, and where their cache is.
//
// A lease ends when the steady clock reaches it; from then on the sequence is not found, and a
// sweep returns its blocks. Every call that names a sequence renews its lease.
//
// Belongs to the executor thread.

#ifndef KVSERVICE_KVSERVICE_SEQUENCE_TABLE_H_
#define KVSERVICE_KVSERVICE_SEQUENCE_TABLE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kvservice/cache/checksum.h"
#include "kvservice/cache/prefix_index.h"
#include "kvservice/cache/sequence.h"
#include "kvservice/engine.h"
#include "kvservice/model_registry.h"
#include "kvservice/seed_queries.h"
#include "kvservice/stored_progress.h"
#include "kvservice/table_versions.h"
#include "selector/policy.h"

namespace kvservice {

// The query tokens of an Attend that came last in a layer.
struct LastQuery {
  uint32_t position = 0;
  uint32_t query_count = 0;
  std::vector<float> q;  // [query_count][query_head_count][head_dim]; empty = none is kept
};

// A row of an earlier call whose exact masses are still to come.
struct DeferredStep {
  uint32_t position = 0;
  uint32_t query_count = 0;
  std::vector<float> q;                       // [query_count][query_head_count][head_dim]
  std::vector<HeadCertificate> certificates;  // [query_count][query_head_count]
  // What was attended, per KV head, if the call did not bound the mass of it; nothing for KV heads
  // that were answered densely. Empty offsets: the certificates have bounds.
  std::vector<uint32_t> given = {};
  std::vector<uint32_t> given_offsets = {};
};

// Where a sequence is. What is in memory alone may be used; a call that comes while a sequence is
// on its way waits until it has arrived.
enum class Residence : uint8_t {
  kMemory,
  kSaving,  // In memory still, and on its way to the disk.
  kDisk,
  kLoading,  // On its way back.
};

struct SequenceRecord {
  SequenceId id;
  std::string tenant;
  std::string request_id;
  const Model* model = nullptr;
  // The version of the model's sketch tables that the sequence was created with.
  const TableVersion* tables = nullptr;
  Policy policy;
  uint64_t generation = 1;
  uint64_t lease_ns = 0;
  uint64_t lease_end_ns = 0;
  AttendStats stats;
  // Of the token ids that it was created with; absent if nobody knows them any more.
  std::optional<Checksum> prompt;
  // What was there of them.
  uint32_t matched_tokens = 0;
  // What it declared of them; nullptr = nothing.
  std::unique_ptr<PrefixClaim> prefix;
  // Empty unless the sequence is in memory.
  std::unique_ptr<Sequence> cache;

  // Owned by the table.
  Residence residence = Residence::kMemory;
  // Of kDisk: nothing but Resume brings it back.
  bool is_suspended = false;
  // What the disk tier has of it; nullptr if it has no rows.
  std::unique_ptr<StoredProgress> stored;
  // Calls that found the pool full and wait for room; those behind them wait too.
  uint32_t room_waits = 0;
  // Why it did not come back when somebody waited for it.
  absl::Status load_status;

  // When the sweep looks next; at or before lease_end_ns, so that a renewal is one store. Owned by
  // the table.
  uint64_t sweep_ns = 0;
  // Number of the Attend call and of the device batch that used the sequence last, to see one that
  // comes twice.
  uint64_t last_call = 0;
  uint64_t last_batch = 0;
  // Rows of Attend calls that have begun and not ended.
  uint32_t rows_begun = 0;
  // Rows that somebody asked to be kept for audits.
  uint32_t audits_asked = 0;
  // [layer_count] or empty, and the bytes that their queries take.
  std::vector<LastQuery> last_queries;
  size_t last_query_bytes = 0;
  // Prompt queries that wait to become anchors.
  SeedQueries seeds;
  // [layer_count] or empty: at most kDeferredStepsMax query tokens wait in a layer.
  std::vector<std::vector<DeferredStep>> deferred;

  // After tokens were stored: what is whole now may be matched.
  void OfferPrefix() {
    if (prefix == nullptr || prefix->offers_all()) return;
    prefix->Offer(cache->length_min() / kBlockTokens);
  }
};

// Every use starts the lease anew.
inline uint64_t LastUsedNs(const SequenceRecord& record) {
  return record.lease_end_ns - record.lease_ns;
}

class SequenceTable {
 public:
  SequenceTable(uint32_t sequences_max, uint32_t sequences_per_tenant_max)
      : sequences_max_(sequences_max), per_tenant_max_(sequences_per_tenant_max) {}

  // nullptr for a sequence that is unknown, expired or another tenant's: a caller cannot tell
  // which.
  SequenceRecord* FindAnywhere(std::string_view tenant, const SequenceId& id, uint64_t now_ns);
  // The same for sequences in memory: nullptr for others too.
  SequenceRecord* Find(std::string_view tenant, const SequenceId& id, uint64_t now_ns);
  // Why Find gives nothing: NOT_FOUND / SEQUENCE_NOT_FOUND, DATA_LOSS / SEQUENCE_LOST,
  // FAILED_PRECONDITION / SEQUENCE_SUSPENDED, or why it could not be loaded.
  absl::Status WhyAbsent(std::string_view tenant, const SequenceId& id, uint64_t now_ns);
  // The living sequence that the tenant created with this request id; nullptr if there is none or
  // the request id is empty.
  SequenceRecord* FindRequest(std::string_view tenant, std::string_view request_id,
                              uint64_t now_ns);
  // RESOURCE_EXHAUSTED / SEQUENCES_FULL or TENANT_QUOTA unless there is room for one more.
  absl::Status CheckRoom(std::string_view tenant) const;
  bool Contains(const SequenceId& id) const { return records_.contains(id); }
  // Of any tenant, expired ones that wait for their sweep too; nullptr if there is none.
  SequenceRecord* FindById(const SequenceId& id) const;
  // The next in the order of ids; the first without one.
  SequenceRecord* After(const std::optional<SequenceId>& id) const;
  // The id is not contained. The lease starts now.
  SequenceRecord* Insert(std::unique_ptr<SequenceRecord> record, uint64_t now_ns);
  void Erase(SequenceRecord* record);
  void SetResidence(SequenceRecord* record, Residence residence);
  // Sequences that are not in memory, or on their way.
  uint32_t absent_count() const { return absent_count_; }

  // Sequences of which the disk tier lost something, and whose they were. They stay until they are
  // dropped.
  using Lost = std::map<SequenceId, std::string, ById>;
  void AddLost(const SequenceId& id, std::string tenant) { lost_[id] = std::move(tenant); }
  bool IsLost(std::string_view tenant, const SequenceId& id) const;
  void ForgetLost(const SequenceId& id) { lost_.erase(id); }
  const Lost& lost() const { return lost_; }
  // Starts a new lease of `lease_ns`, which may end before the old one would have.
  void SetLease(SequenceRecord* record, uint64_t lease_ns, uint64_t now_ns);
  static void Renew(SequenceRecord* record, uint64_t now_ns) {
    record->lease_end_ns = now_ns + record->lease_ns;
  }
  // Erases expired sequences that `may_go`, looking at no more than `limit`. Returns how many it
  // erased; others are looked at again a second later.
  uint32_t Sweep(uint64_t now_ns, uint32_t limit,
                 const std::function<bool(SequenceRecord* record)>& may_go);
  // Living sequences of a tenant ("" = of all), ordered by id, at most `limit` after `after`.
  std::vector<const SequenceRecord*> List(std::string_view tenant, const SequenceId& after,
                                          uint32_t limit, uint64_t now_ns) const;
  // All, expired ones that wait for their sweep too.
  template <typename Visit>
  void ForEach(Visit visit) const {
    for (const auto& [id, record] : records_) visit(record.get());
  }
  uint32_t count() const { return static_cast<uint32_t>(records_.size()); }
  // Sequences of a tenant, and tenants that have any.
  uint32_t CountOf(std::string_view tenant) const;
  uint32_t tenant_count() const { return static_cast<uint32_t>(tenants_.size()); }

 private:
  struct Tenant {
    uint32_t sequence_count = 0;
    std::map<std::string, SequenceRecord*, std::less<>> by_request;
  };

  const uint32_t sequences_max_;
  const uint32_t per_tenant_max_;

  std::map<SequenceId, std::unique_ptr<SequenceRecord>, ById> records_;
  std::map<std::string, Tenant, std::less<>> tenants_;
  std::set<std::pair<uint64_t, SequenceRecord*>> by_sweep_;
  uint32_t absent_count_ = 0;
  Lost lost_;
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SEQUENCE_TABLE_H_
