#include "kvservice/declared_prompt.h"

#include <cassert>

namespace kvservice {

DeclaredPrompt DeclarePrompt(const EngineOptions& options, const PrefixChains& chains,
                             std::string_view tenant, const Model* model,
                             const CreateOptions& asked) {
  DeclaredPrompt prompt;
  prompt.token_count = asked.token_ids.size();
  if (prompt.token_count > options.sequence_tokens_max) return prompt;
  const auto* const bytes = reinterpret_cast<const char*>(asked.token_ids.data());
  prompt.checksum = ChecksumOf(std::string_view(bytes, prompt.token_count * sizeof(uint32_t)));
  if (model == nullptr) return prompt;
  prompt.tables = model->tables->latest();
  prompt.chain = chains.Of(tenant, model->fingerprint, prompt.tables->digest, asked.token_ids,
                           options.prefix_tokens_per_tenant_max / kBlockTokens);
  return prompt;
}

void BeginWith(const PrefixIndex::Match& match, SequenceRecord* record) {
  const SequenceRecord* const source = match.source;
  const uint32_t length = match.block_count * kBlockTokens;
  // The digest says all that already. What it stands for is compared nevertheless: one mistake
  // shall not be enough to show a tenant another's.
  const bool fits = source != nullptr && source->tenant == record->tenant &&
                    source->model == record->model && source->tables == record->tables &&
                    source->cache->length_min() >= length;
  if (!fits) return;
  record->cache = source->cache->Fork(length);
  assert(record->cache != nullptr);  // Whole blocks are shared, which takes no memory.
  // Answers are to be those of a sequence that was appended in full: what the source's calls chose
  // stays behind, and prompt queries that wait to become anchors come along.
  record->cache->DropLists();
  record->seeds = source->seeds;
  record->seeds.Truncate(length);
  record->matched_tokens = length;
}

}  // namespace kvservice
