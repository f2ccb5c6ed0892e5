#include "attention/cpu/head_queries.h"

#include <cmath>

#include "attention/lanes.h"

namespace kvservice {

void FillHeadQueries(const LayerShape& shape, const AttendRow& row, uint32_t kv_head,
                     HeadQueries* queries) {
  const uint32_t head_dim = shape.layout.head_dim;
  const uint32_t group = shape.layout.group_size();
  queries->head_count = row.query_count * group;
  queries->qs.resize(size_t{queries->head_count} * head_dim);
  queries->norm.resize(queries->head_count);
  queries->visible_begin.resize(queries->head_count);
  queries->visible_end.resize(queries->head_count);
  for (uint32_t head = 0; head < queries->head_count; ++head) {
    const float* q = row.q + size_t{OutputIndex(shape.layout, kv_head, head)} * head_dim;
    float* const qs = &queries->qs[size_t{head} * head_dim];
    for (uint32_t c = 0; c < head_dim; ++c) qs[c] = shape.scale * q[c];
    // Covers the rounding of scale * q to fp32 (2^-24, or 2^-150 below the normal range) and of
    // this sum.
    queries->norm[head] = std::sqrt(SumOfSquares(qs, head_dim)) * (1.0 + 0x1p-23) + 0x1p-120;
    const uint32_t position = row.position + head / group;
    queries->visible_begin[head] = WindowBegin(shape.sliding_window, position);
    queries->visible_end[head] = position + 1;
  }
}

}  // namespace kvservice
