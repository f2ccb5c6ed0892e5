// The queries of one KV head of one row, ready for all kernels that read its keys or sketches.
// Plain data; any thread.
//
// A *head* in this folder is one query token and one query head of the group: head = query token *
// group_size + index in group.

#ifndef KVSERVICE_ATTENTION_CPU_HEAD_QUERIES_H_
#define KVSERVICE_ATTENTION_CPU_HEAD_QUERIES_H_

#include <cstdint>
#include <vector>

namespace kvservice {

struct HeadQueries {
  uint32_t head_count = 0;
  std::vector<float> qs;     // [head_count][head_dim], scale * q rounded to nearest
  std::vector<double> norm;  // [head_count], at least ||scale * q|| and ||qs||
  // [head_count], a head sees tokens [visible_begin, visible_end).
  std::vector<uint32_t> visible_begin;
  std::vector<uint32_t> visible_end;
};

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_CPU_HEAD_QUERIES_H_
