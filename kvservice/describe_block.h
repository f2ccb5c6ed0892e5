// What an operator may know about one block: where it is, what its bytes' checksums are, how large
// its keys and values are, and how much attention it gets; never the bytes.
//
// Reads every slice that is described once; with a layer, attends that layer's latest query densely
// once. Nothing of the sequence changes. Belongs to the executor thread.

#ifndef KVSERVICE_KVSERVICE_DESCRIBE_BLOCK_H_
#define KVSERVICE_KVSERVICE_DESCRIBE_BLOCK_H_

#include "absl/status/status.h"
#include "attention/device.h"
#include "kvservice/block_report.h"
#include "kvservice/sequence_table.h"

namespace kvservice {

// OUT_OF_RANGE / BLOCK_OUT_OF_RANGE with block_count, INVALID_ARGUMENT / LAYER_OUT_OF_RANGE.
absl::Status CheckBlock(const SequenceRecord& record, const BlockAsk& ask);

// `ask` was checked.
BlockReport DescribeBlock(const SequenceRecord& record, const BlockAsk& ask, Device* device);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_DESCRIBE_BLOCK_H_
