// Executes attacks on a device in this process: a case in the device's memory, random plans, and
// calls with room for the answers. One thread per object; the device must outlive it.

#ifndef KVSERVICE_TESTS_ADVERSARY_DEVICE_CALL_H_
#define KVSERVICE_TESTS_ADVERSARY_DEVICE_CALL_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention/device.h"
#include "attention/plan.h"
#include "tests/adversary/layer_case.h"
#include "tests/adversary/truth.h"

namespace kvservice::adversary {

// Memory of a device that is used again for the next case, old contents and all: what lies beyond a
// sequence's length is whatever was there before.
class Arena {
 public:
  explicit Arena(Device* device) : device_(device) {}
  Device* device() const { return device_; }
  // 64-byte aligned and valid until the next call of Reset, `bytes` in all per Reset.
  void Reset(size_t bytes);
  std::byte* Take(size_t bytes);

 private:
  Device* device_;
  DeviceMemory memory_;
  size_t used_ = 0;
};

// A case stored and sealed. Uses the arena until the next one is made in it.
class StoredCase {
 public:
  StoredCase(Arena* arena, const LayerCase& layer_case);

  const LayerCase& layer_case() const { return case_; }
  Device* device() const { return arena_.device(); }
  const KvView& view() const { return view_; }
  // The token must be read exactly: it has no sketch, or the sketch says so.
  bool IsExact(uint32_t kv_head, uint32_t token) const;
  // K of a token, V behind it, as stored by the device: a copy.
  const std::byte* Row(uint32_t kv_head, uint32_t token) const {
    return CopyOf(view_.Row(case_.shape.layout, kv_head, token));
  }
  // As stored by the device.
  WidenedHead Widened(uint32_t kv_head) const;
  // Stores and seals again, after the case's bytes changed.
  void Store();

 private:
  // Where the host has a copy of what the device stores.
  const std::byte* CopyOf(const std::byte* stored) const;

  const LayerCase& case_;
  Arena& arena_;
  std::vector<std::byte> copy_;
  std::vector<std::byte*> slices_, sketches_;
  std::vector<const std::byte*> view_slices_, view_sketches_;
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
  // The next of a row of calls; lists live from one to the next.
  Plan Next(Chance* chance);
  // The same plan for the same case on another device: with that device's lists.
  static Plan WithListsOf(const Plan& plan, const PlanMaker& from, const PlanMaker& to);

 private:
  static void SetLimits(Chance* chance, Plan* plan);

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
