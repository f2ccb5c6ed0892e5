// Executes attacks on a device in this process: cases in the device's memory, random plans, and
// calls with room for the answers. One thread per object; the device must outlive it.

#ifndef KVSERVICE_TESTS_ADVERSARY_DEVICE_CALL_H_
#define KVSERVICE_TESTS_ADVERSARY_DEVICE_CALL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/plan.h"
#include "tests/adversary/layer_case.h"
#include "tests/adversary/truth.h"

namespace kvservice::adversary {

// Memory of a device that is used again for the next cases, old contents and all: what lies beyond
// a sequence's length is whatever was there before.
class Arena {
 public:
  explicit Arena(Device* device) : device_(device) {}
  Device* device() const { return device_; }
  // 64-byte aligned and valid until the next call of Reset, `bytes` in all per Reset.
  void Reset(size_t bytes);
  std::byte* Take(size_t bytes);
  // Copies all that was taken to the host, where CopyOf finds it until the next call.
  void ReadBack();
  const std::byte* CopyOf(const std::byte* taken) const {
    return copy_.data() + (taken - memory_.data());
  }

 private:
  Device* device_;
  DeviceMemory memory_;
  size_t used_ = 0;
  std::vector<std::byte> copy_;
};

// A case stored and sealed. Uses the arena until the next ones are made in it.
class StoredCase {
 public:
  StoredCase(Arena* arena, const LayerCase& layer_case);
  // Of one layout, so that they may be rows of one call; stored and sealed together.
  static std::vector<std::unique_ptr<StoredCase>> StoreAll(Arena* arena,
                                                           absl::Span<const LayerCase> cases);

  const LayerCase& layer_case() const { return case_; }
  Device* device() const { return arena_.device(); }
  const KvView& view() const { return view_; }
  // The token must be read exactly: it has no sketch, or the sketch says so.
  bool IsExact(uint32_t kv_head, uint32_t token) const {
    const size_t page = size_t{token / kBlockTokens} * case_.shape.layout.kv_head_count + kv_head;
    return ((exact_[page] >> (token % kBlockTokens)) & 1) != 0;
  }
  // K of a token, V behind it, as stored by the device: a copy.
  const std::byte* Row(uint32_t kv_head, uint32_t token) const {
    return arena_.CopyOf(view_.Row(case_.shape.layout, kv_head, token));
  }
  // As stored by the device.
  WidenedHead Widened(uint32_t kv_head) const;

 private:
  struct InArena {};
  StoredCase(Arena* arena, const LayerCase& layer_case, InArena);
  static size_t BytesOf(const LayerCase& layer_case);
  static Arena* Emptied(Arena* arena, absl::Span<const LayerCase> cases);
  static void StoreTogether(Arena* arena, absl::Span<StoredCase* const> all);
  void AddParts(std::vector<AppendSlice>* appends, std::vector<SealSlice>* seals) const;
  void ReadExact();

  const LayerCase& case_;
  Arena& arena_;
  std::vector<std::byte*> slices_, sketches_;
  std::vector<const std::byte*> view_slices_, view_sketches_;
  std::vector<uint64_t> exact_;  // [block][kv_head]
  KvView view_;
};

// One call; `plan` and what it borrows must outlive it.
struct DeviceCall {
  DeviceCall(const StoredCase& stored, uint32_t query_set, const Plan& plan,
             const std::array<std::byte, kDrawKeyBytes>& draw_key);
  DeviceCall(const DeviceCall&) = delete;
  DeviceCall& operator=(const DeviceCall&) = delete;
  // Executes it on the device of the stored case.
  void Run();
  // Executes all as rows of one call: cases of one shape on one device, no two with the same lists.
  static void RunAll(absl::Span<const std::unique_ptr<DeviceCall>> calls);

  const StoredCase& stored;
  uint32_t query_set;
  std::vector<float> out, lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
  std::vector<std::vector<uint32_t>> selected;
  AttendRow row;
};

// Makes plans for one case: every source, rule, limit and guarantee. Owns what plans borrow.
class PlanMaker {
 public:
  PlanMaker(const StoredCase& stored, Chance* chance);
  // The next of a row of calls; lists live from one to the next. Of plans that would ask for
  // CONFIDENCE, all but about a `sampled` share ask for DETERMINISTIC.
  Plan Next(Chance* chance, double sampled = 1.0);
  // The same plan for the same case on another device: with that device's lists.
  static Plan WithListsOf(const Plan& plan, const PlanMaker& from, const PlanMaker& to);

 private:
  static void SetLimits(Chance* chance, double sampled, Plan* plan);

  const LayerCase& case_;
  std::unique_ptr<TokenLists> lists_, frozen_;
  std::vector<uint32_t> given_, offsets_;
};

std::array<std::byte, kDrawKeyBytes> MakeDrawKey(Chance* chance);

// Truths of all heads for one set of queries: [query_count][query_head_count].
std::vector<HeadTruth> MakeTruths(const LayerCase& layer_case, uint32_t query_set,
                                  const std::vector<WidenedHead>& widened);

}  // namespace kvservice::adversary

#endif  // KVSERVICE_TESTS_ADVERSARY_DEVICE_CALL_H_
