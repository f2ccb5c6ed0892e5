// The queries of one KV head of one row, ready for all kernels that read its keys or sketches.
// Plain data; any thread.
//
// A *head* in this folder is one query token and one query head of the group: head = query token *
// group_size + index in group.

#ifndef KVSERVICE_ATTENTION_CPU_HEAD_QUERIES_H_
#define KVSERVICE_ATTENTION_CPU_HEAD_QUERIES_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/device.h"
#include "attention/kv_layout.h"

namespace kvservice {

struct HeadQueries {
  uint32_t head_count = 0;
  std::vector<float> qs;     // [head_count][head_dim], scale * q rounded to nearest
  std::vector<double> norm;  // [head_count], at least ||scale * q|| and ||qs||
  // [head_count], a head sees tokens [visible_begin, visible_end).
  std::vector<uint32_t> visible_begin;
  std::vector<uint32_t> visible_end;
};

// First token that a query at `position` sees; a window of 0 is none.
inline uint32_t WindowBegin(uint32_t sliding_window, uint32_t position) {
  if (sliding_window == 0 || position + 1 <= sliding_window) return 0;
  return position + 1 - sliding_window;
}

// Where a head stands among all query heads of a row, [query_count][query_head_count].
inline uint32_t OutputIndex(const KvLayout& layout, uint32_t kv_head, uint32_t head) {
  const uint32_t group = layout.group_size();
  return head / group * layout.query_head_count + kv_head * group + head % group;
}

// The queries of one KV head of a row.
void FillHeadQueries(const LayerShape& shape, const AttendRow& row, uint32_t kv_head,
                     HeadQueries* queries);

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_HEAD_QUERIES_H_
