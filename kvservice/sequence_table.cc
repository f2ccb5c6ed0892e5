#include "kvservice/sequence_table.h"

#include <algorithm>
#include <cassert>

#include "absl/strings/str_cat.h"
#include "kvservice/engine_errors.h"
#include "kvservice/error.h"

namespace kvservice {
namespace {

constexpr uint64_t kLookAgainNs = 1'000'000'000;

absl::Status Full(const char* reason, const char* whose, uint32_t sequences_max) {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   absl::StrCat(whose, " has ", sequences_max, " sequences, the most it may have"),
                   {.reason = reason,
                    .field = "",
                    .metadata = {{"sequences_max", absl::StrCat(sequences_max)}}});
}

}  // namespace

SequenceRecord* SequenceTable::FindAnywhere(std::string_view tenant, const SequenceId& id,
                                            uint64_t now_ns) {
  const auto found = records_.find(id);
  if (found == records_.end()) return nullptr;
  SequenceRecord* record = found->second.get();
  if (record->tenant != tenant || record->lease_end_ns <= now_ns) return nullptr;
  return record;
}

SequenceRecord* SequenceTable::Find(std::string_view tenant, const SequenceId& id,
                                    uint64_t now_ns) {
  SequenceRecord* record = FindAnywhere(tenant, id, now_ns);
  return record == nullptr || record->residence != Residence::kMemory ? nullptr : record;
}

absl::Status SequenceTable::WhyAbsent(std::string_view tenant, const SequenceId& id,
                                      uint64_t now_ns) {
  const SequenceRecord* record = FindAnywhere(tenant, id, now_ns);
  if (record == nullptr) return IsLost(tenant, id) ? SequenceLost() : SequenceNotFound();
  if (record->is_suspended) return SequenceSuspended();
  return record->load_status.ok() ? SequenceOnDisk() : record->load_status;
}

bool SequenceTable::IsLost(std::string_view tenant, const SequenceId& id) const {
  const auto found = lost_.find(id);
  return found != lost_.end() && found->second == tenant;
}

void SequenceTable::SetResidence(SequenceRecord* record, Residence residence) {
  absent_count_ -= record->residence == Residence::kMemory ? 0 : 1;
  record->residence = residence;
  absent_count_ += record->residence == Residence::kMemory ? 0 : 1;
}

SequenceRecord* SequenceTable::FindRequest(std::string_view tenant, std::string_view request_id,
                                           uint64_t now_ns) {
  const auto owner = tenants_.find(tenant);
  if (request_id.empty() || owner == tenants_.end()) return nullptr;
  const auto found = owner->second.by_request.find(request_id);
  if (found == owner->second.by_request.end()) return nullptr;
  return found->second->lease_end_ns <= now_ns ? nullptr : found->second;
}

absl::Status SequenceTable::CheckRoom(std::string_view tenant) const {
  if (records_.size() >= sequences_max_)
    return Full("SEQUENCES_FULL", "the server", sequences_max_);
  const auto owner = tenants_.find(tenant);
  if (owner != tenants_.end() && owner->second.sequence_count >= per_tenant_max_) {
    return Full("TENANT_QUOTA", "the tenant", per_tenant_max_);
  }
  return absl::OkStatus();
}

uint32_t SequenceTable::CountOf(std::string_view tenant) const {
  const auto owner = tenants_.find(tenant);
  return owner == tenants_.end() ? 0 : owner->second.sequence_count;
}

SequenceRecord* SequenceTable::Insert(std::unique_ptr<SequenceRecord> record, uint64_t now_ns) {
  SequenceRecord* inserted = record.get();
  assert(!Contains(inserted->id));
  Tenant& owner = tenants_[inserted->tenant];
  ++owner.sequence_count;
  // Takes the request id over from an expired sequence that waits for its sweep.
  if (!inserted->request_id.empty()) owner.by_request[inserted->request_id] = inserted;
  Renew(inserted, now_ns);
  inserted->sweep_ns = inserted->lease_end_ns;
  by_sweep_.emplace(inserted->sweep_ns, inserted);
  records_.emplace(inserted->id, std::move(record));
  absent_count_ += inserted->residence == Residence::kMemory ? 0 : 1;
  return inserted;
}

void SequenceTable::Erase(SequenceRecord* record) {
  by_sweep_.erase({record->sweep_ns, record});
  const auto owner = tenants_.find(record->tenant);
  const auto request = owner->second.by_request.find(record->request_id);
  if (request != owner->second.by_request.end() && request->second == record) {
    owner->second.by_request.erase(request);
  }
  if (--owner->second.sequence_count == 0) tenants_.erase(owner);
  SetResidence(record, Residence::kMemory);
  const SequenceId id = record->id;
  records_.erase(id);
}

void SequenceTable::SetLease(SequenceRecord* record, uint64_t lease_ns, uint64_t now_ns) {
  record->lease_ns = lease_ns;
  Renew(record, now_ns);
  if (record->lease_end_ns >= record->sweep_ns) return;
  by_sweep_.erase({record->sweep_ns, record});
  record->sweep_ns = record->lease_end_ns;
  by_sweep_.emplace(record->sweep_ns, record);
}

SequenceRecord* SequenceTable::FindById(const SequenceId& id) const {
  const auto found = records_.find(id);
  return found == records_.end() ? nullptr : found->second.get();
}

SequenceRecord* SequenceTable::After(const std::optional<SequenceId>& id) const {
  const auto next = id.has_value() ? records_.upper_bound(*id) : records_.begin();
  return next == records_.end() ? nullptr : next->second.get();
}

uint32_t SequenceTable::Sweep(uint64_t now_ns, uint32_t limit,
                              const std::function<bool(SequenceRecord* record)>& may_go) {
  uint32_t erased = 0;
  while (limit-- > 0 && !by_sweep_.empty() && by_sweep_.begin()->first <= now_ns) {
    SequenceRecord* record = by_sweep_.begin()->second;
    const bool is_expired = record->lease_end_ns <= now_ns;
    if (is_expired && may_go(record)) {
      Erase(record);
      ++erased;
      continue;
    }
    by_sweep_.erase(by_sweep_.begin());
    record->sweep_ns = is_expired ? now_ns + kLookAgainNs : record->lease_end_ns;
    by_sweep_.emplace(record->sweep_ns, record);
  }
  return erased;
}

std::vector<const SequenceRecord*> SequenceTable::List(std::string_view tenant,
                                                       const SequenceId& after, uint32_t limit,
                                                       uint64_t now_ns) const {
  std::vector<const SequenceRecord*> listed;
  for (auto next = records_.upper_bound(after); next != records_.end(); ++next) {
    if (listed.size() >= limit) break;
    const SequenceRecord& record = *next->second;
    if (record.lease_end_ns <= now_ns) continue;
    if (!tenant.empty() && record.tenant != tenant) continue;
    listed.push_back(&record);
  }
  return listed;
}

}  // namespace kvservice
