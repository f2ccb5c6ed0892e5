// Prompt queries of one sequence that wait to become anchors.
//
// CIS reuses the choice made for a similar earlier query, and at the first step of a decode there
// is none. Prefill has computed such queries: a client may send some of them with the keys
// (AppendCall::query_sample with positions), and the first steps of a layer that would reuse run
// them first, as if each came now. What they choose stays behind as anchors. On our traces the last
// 512 queries of a prompt nearly halve the scans of the 512 steps that follow.
//
// Positions of a layer ascend: only samples of tokens that were not stored before are taken.
// Belongs to the executor thread.

#ifndef KVSERVICE_KVSERVICE_SEED_QUERIES_H_
#define KVSERVICE_KVSERVICE_SEED_QUERIES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "attention/device.h"
#include "attention/kv_layout.h"

namespace kvservice {

// Query tokens that are kept per layer at most.
inline constexpr uint32_t kSeedTokensMax = 512;
// Query tokens that one Attend runs at most before its own: a scan each, for all who wait. A prompt
// with more of them seeds its first few steps.
inline constexpr uint32_t kSeedTokensPerStep = 64;

// Copies share what they keep until one of them adds to it.
class SeedQueries {
 public:
  // Keeps nothing.
  SeedQueries() = default;
  // bytes_max: for all layers together; each has an equal share, which may be less than
  // kSeedTokensMax tokens.
  SeedQueries(const KvLayout& layout, uint32_t layer_count, size_t bytes_max);

  // Keeps the latest tokens that there is room for. positions: ascending, after those kept before;
  // queries: [positions][query_head_count][head_dim], rotated, finite. Kept as bfloat16: they are
  // only compared, and choose.
  void Add(uint32_t layer, absl::Span<const uint32_t> positions, absl::Span<const float> queries);
  // Tokens kept.
  uint32_t count(uint32_t layer) const;
  // Takes the oldest token out: its position, and its queries in `queries`,
  // [query_head_count][head_dim]. count(layer) > 0.
  uint32_t TakeOldest(uint32_t layer, absl::Span<float> queries);
  // What is kept of a layer, oldest first, as it is kept: queries are bfloat16.
  void CopyTo(uint32_t layer, std::vector<uint32_t>* positions, std::string* queries) const;
  // Forgets tokens at and above `length`.
  void Truncate(uint32_t length);
  // What is kept, shared parts counted in full.
  size_t bytes() const;

 private:
  struct Kept {
    std::vector<uint32_t> positions;
    std::vector<std::byte> queries;  // bfloat16
  };
  // [begin, end) of what is kept; shared with copies, and changed only while it is not.
  struct Layer {
    std::shared_ptr<Kept> kept;
    uint32_t begin = 0;
    uint32_t end = 0;
  };

  size_t token_floats_ = 0;
  uint32_t tokens_max_ = 0;
  std::vector<Layer> layers_;
};

// Memory of SeedAnchors, reused from call to call.
struct SeedScratch {
  std::vector<float> q;
  std::vector<float> out;
  std::vector<float> lse;
  std::vector<HeadCertificate> certificates;
  std::vector<GroupReport> groups;
};

// Runs up to kSeedTokensPerStep kept queries of a layer before `planned`, oldest first, each moved
// to the position of its last query token and under its plan without the proof. Changes the plan's
// lists and nothing else. Returns how many KV heads scanned for it. The plan is one that reuses.
uint32_t SeedAnchors(const LayerShape& shape, uint32_t layer, const AttendRow& planned,
                     SeedQueries* seeds, Device* device, SeedScratch* scratch);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SEED_QUERIES_H_
