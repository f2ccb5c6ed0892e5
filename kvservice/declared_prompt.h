// What a Create says about its prompt, and what a new sequence gets of that from one that has it
// already.

#ifndef KVSERVICE_KVSERVICE_DECLARED_PROMPT_H_
#define KVSERVICE_KVSERVICE_DECLARED_PROMPT_H_

#include <cstddef>
#include <string_view>
#include <vector>

#include "kvservice/cache/checksum.h"
#include "kvservice/cache/prefix_index.h"
#include "kvservice/engine.h"
#include "kvservice/model_registry.h"
#include "kvservice/prefix_chain.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

// Everything that takes hashing, so that the executor has none to do.
struct DeclaredPrompt {
  size_t token_count = 0;
  // Of the token ids: tells a repeat from another question.
  Checksum checksum{};
  // The model's latest version when the call came, which the chain is for; nullptr = no chain.
  const TableVersion* tables = nullptr;
  std::vector<PrefixDigest> chain;
};

// `model` may be nullptr. More tokens than a sequence may have are counted and not hashed. Any
// thread; the time depends on the number of tokens alone.
DeclaredPrompt DeclarePrompt(const EngineOptions& options, const PrefixChains& chains,
                             std::string_view tenant, const Model* model,
                             const CreateOptions& asked);

// Gives `record`, whose cache is empty, the blocks that were matched, if any were. Executor thread.
void BeginWith(const PrefixIndex::Match& match, SequenceRecord* record);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_DECLARED_PROMPT_H_
