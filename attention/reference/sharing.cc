#include "attention/reference/sharing.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "attention/log_mass.h"
#include "attention/reference/log_sum.h"

namespace kvservice::reference {

SharingTerms TermsOfAnchor(absl::Span<const float> queries, const std::vector<uint32_t>& open,
                           const std::vector<uint32_t>& read, HeadRow* row) {
  std::vector<uint32_t> left;
  std::set_difference(open.begin(), open.end(), read.begin(), read.end(), std::back_inserter(left));
  std::vector<const std::byte*> pages;
  uint32_t next_block = 0;
  for (const uint32_t token : open) {
    const uint32_t block = token / kBlockTokens;
    if (block < next_block) continue;
    pages.push_back(row->SketchBytes(block));
    next_block = block + 1;
  }
  const KeySpread spread = SpreadOfKeys(row->shape().layout.head_dim, pages);
  std::vector<double> read_logits;
  std::vector<double> log_read;
  std::vector<double> log_left;
  for (uint32_t head = row->newest_head(); head < row->head_count(); ++head) {
    for (const uint32_t token : read) {
      read_logits.push_back(row->Sees(head, token) ? row->Exact(head, token).nearest : kLogZero);
    }
    log_read.push_back(LogSum(absl::MakeConstSpan(read_logits).last(read.size())));
    std::vector<double> logits;
    for (const uint32_t token : left) {
      if (row->Sees(head, token)) logits.push_back(row->Estimate(head, token).nearest);
    }
    log_left.push_back(LogSum(logits));
  }
  SharingTask task;
  task.shape = &row->shape();
  task.queries = queries;
  task.read = read;
  task.read_logits = read_logits;
  task.log_read = log_read;
  task.log_left = log_left;
  task.spread = &spread;
  return MakeSharingTerms(task, [row](absl::Span<const uint32_t> positions) {
    std::vector<const std::byte*> keys;
    for (const uint32_t position : positions) {
      keys.push_back(row->view().Row(row->shape().layout, row->kv_head(), position));
    }
    return keys;
  });
}

}  // namespace kvservice::reference
