// The sketch slice: 4-bit image of a sealed slice's keys plus bounds of what the image missed. This
// header is the one place that fixes its bytes; CPU, CUDA and disk share it. Source: certificate
// specification section 1.
//
// A slice's sketch is kv_head_count *pages* (one per KV head, 64 tokens), each page_bytes() long
// and 64-byte aligned:
//
//   field   type              bytes        meaning
//   codes   u4 pairs          64 * d/2     [d/8][64][4]: byte j of a token = code[j] |
//                                          code[j + d/2] << 4, four bytes of every token side by
//                                          side (CodeOffset), so that a scan holds one token per
//                                          lane and adds nothing across lanes
//   lo      f32[d]            4 d          exact per-channel minimum of the sketched tokens (cache
//                                          dtype widened: no rounding exists)
//   step    f16[d]            2 d          (max - lo) / 16 rounded up, at least 2^-14
//   pj      i8[nd][64]        64 nd        projections of the residual, rint(W_j.e / ps_j)
//   r       u8[64]            64           ||M e_i||  <= rmax * RadiusScale(r)
//   vn      u8[64]            64           ||v_i||    <= vmax * RadiusScale(vn)
//   ps      f32[4]            16           projection steps (nd used)
//   exact   u64               8            tokens that are always read exactly; they have
//                                          code = r = pj = 0
//   rmax, hn, vmax            3 x f32      upward rounded norms: max ||M e||, ||M step/2|| (any
//                                          rounding), max ||v||
//   version u32               4            kSketchVersion
//
// Everything is inline arithmetic on plain bytes; any thread.

#ifndef KVSERVICE_ATTENTION_SKETCH_H_
#define KVSERVICE_ATTENTION_SKETCH_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention/kv_layout.h"
#include "attention/sketch_table.h"

namespace kvservice {

inline constexpr uint32_t kSketchVersion = 1;

// Byte offsets within a page, for one head_dim.
struct SketchLayout {
  explicit constexpr SketchLayout(uint32_t head_dim)
      : dim(head_dim),
        direction_count(SketchDirections(head_dim)),
        lo(static_cast<size_t>(kBlockTokens) * head_dim / 2),
        step(lo + 4 * static_cast<size_t>(head_dim)),
        pj(step + 2 * static_cast<size_t>(head_dim)),
        r(pj + static_cast<size_t>(kBlockTokens) * direction_count),
        vn(r + kBlockTokens),
        ps(vn + kBlockTokens),
        exact(ps + 16),
        norms(exact + 8),
        version(norms + 12),
        page_bytes((version + 4 + 63) / 64 * 64) {}

  uint32_t dim;
  uint32_t direction_count;
  size_t lo, step, pj, r, vn, ps, exact, norms, version;
  size_t page_bytes;

  constexpr size_t slice_bytes(uint32_t kv_head_count) const { return page_bytes * kv_head_count; }
};

// Offset within the codes of byte j (below head_dim / 2) of one token.
constexpr size_t CodeOffset(uint32_t token, uint32_t j) {
  return (static_cast<size_t>(j / 4) * kBlockTokens + token) * 4 + j % 4;
}

// One page, decoded as pointers into its bytes.
struct SketchPage {
  SketchPage(const SketchLayout& layout, const std::byte* page)
      : codes(reinterpret_cast<const uint8_t*>(page)),
        lo(reinterpret_cast<const float*>(page + layout.lo)),
        step(reinterpret_cast<const uint16_t*>(page + layout.step)),
        pj(reinterpret_cast<const int8_t*>(page + layout.pj)),
        r(reinterpret_cast<const uint8_t*>(page + layout.r)),
        vn(reinterpret_cast<const uint8_t*>(page + layout.vn)),
        ps(reinterpret_cast<const float*>(page + layout.ps)) {
    std::memcpy(&exact, page + layout.exact, sizeof(exact));
    std::array<float, 3> norms;
    std::memcpy(norms.data(), page + layout.norms, sizeof(norms));
    rmax = norms[0];
    hn = norms[1];
    vmax = norms[2];
  }

  const uint8_t* codes;  // [d/8][64][4], see CodeOffset
  const float* lo;       // [d]
  const uint16_t* step;  // [d] fp16 bits
  const int8_t* pj;      // [nd][64]
  const uint8_t* r;      // [64]
  const uint8_t* vn;     // [64]
  const float* ps;       // [nd]
  uint64_t exact;
  float rmax, hn, vmax;
};

// DEC of the specification: a geometric scale from 1 down, rounded up: nextup(fl(1.02^-code * (1 +
// 1e-6))).
extern const std::array<float, 256> kRadiusScale;

// Encodes one page (one KV head of one full slice) in double precision and verifies every stored
// inequality; what cannot be verified goes into `exact`, so the result is valid for any input, inf
// and NaN included.
//   rows        [64] rows of K and V of this KV head: slice + layout.RowOffset(kv_head, 0),
//               layout.row_bytes() apart
//   block_index index of the slice in its sequence: the first kSketchSinks positions of slice 0 are
//               `exact`
//   page        SketchLayout(layout.head_dim).page_bytes bytes, overwritten
void EncodeSketchPage(const KvLayout& layout, const std::byte* rows, uint32_t block_index,
                      const SketchTable& table, std::byte* page);

// True if every stored inequality of section 1 holds for the page against the rows it was made from
// (double precision, no tolerance). Used by tests and by the store scrub.
bool VerifySketchPage(const KvLayout& layout, const std::byte* rows, const SketchTable& table,
                      const std::byte* page);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_SKETCH_H_
