// One sequence on its way from one engine to another: the parts it travels in. Engine::Send gives
// them one by one, Engine::Receive of the other engine takes them in the same order:
//
//     begin    what it is; answered with how far an earlier attempt came
//     tables   only if the receiver asks for them
//     slices   rows of consecutive blocks of one layer, again and again, block by block
//     seeds    prompt queries of one layer that still wait (kvservice/seed_queries.h)
//     end      the receiver's sequence exists from here on
//
// What proves that the receiver has the same bytes is the chain of slice records
// (kvservice/cache/slice_record.h): each slice comes with the checksum that its record would have,
// over rows, sketch, place and the record before it; the first stands on the checksum of `head`.
// Sketches do not travel. The receiver makes them of the rows, as it makes those of any append, and
// compares the record of what it then has: a bound never rests on bytes that somebody sent.
//
// Head, little endian: magic u32, version u32, source id [16], generation u64, model name, model
// fingerprint u64, table digest [32], length u32 per layer, policy (kvservice/stored_policy.h),
// checksum [16]. Its SHA-256 names the transfer: equal heads are attempts at the same one.
//
// Plain data and pure functions; any thread.

#ifndef KVSERVICE_KVSERVICE_TRANSFER_H_
#define KVSERVICE_KVSERVICE_TRANSFER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "kvservice/cache/checksum.h"
#include "kvservice/cache/slice_record.h"
#include "kvservice/sha256.h"
#include "selector/policy.h"

namespace kvservice {

struct TransferHead {
  // On the source.
  StoredId id{};
  uint64_t generation = 0;
  std::string model;
  uint64_t model_fingerprint = 0;
  // SHA-256 of the sketch tables that the sequence keeps for its whole life.
  Sha256::Digest table_digest{};
  // [layer_count] tokens.
  std::vector<uint32_t> lengths;
  Policy policy;
};
std::string WriteTransferHead(const TransferHead& head);
// Nothing unless the bytes are whole and a head.
std::optional<TransferHead> ReadTransferHead(std::string_view bytes);
Sha256::Digest TransferName(std::string_view head);

struct TransferBegin {
  std::string head;
  uint32_t lease_ms = 0;
};
// The stored form of the sketch tables (attention/sketch_table.h).
struct TransferTables {
  std::string encoded;
};
struct TransferSlices {
  uint32_t layer = 0;
  uint32_t first_block = 0;
  // One per slice.
  std::vector<Checksum> checksums;
  // Their rows in the stored form, [kv_head][token][K | V][head_dim] each.
  std::string rows;
};
struct TransferSeeds {
  uint32_t layer = 0;
  std::vector<uint32_t> positions;
  // [positions][query_head_count][head_dim], bfloat16.
  std::string queries;
  Checksum checksum{};
};
Checksum ChecksumOfSeeds(const TransferSeeds& seeds);
struct TransferEnd {
  // Nothing more comes, nor ever will: what was received is forgotten.
  bool gives_up = false;
};
using TransferPart =
    std::variant<TransferBegin, TransferTables, TransferSlices, TransferSeeds, TransferEnd>;

// What Engine::Send is asked for. Slices that were asked for once are the same when asked for
// again, whatever was appended since.
struct SendAsk {
  enum class Part : uint8_t { kBegin, kTables, kSlices, kSeeds };
  Part part = Part::kBegin;
  uint32_t layer = 0;
  // Of kSlices: blocks [first_block, first_block + block_count) of the layer's first `length`
  // tokens, and the checksum of the record before them.
  uint32_t first_block = 0;
  uint32_t block_count = 0;
  uint32_t length = 0;
  Checksum previous{};
};

// How far an attempt at a transfer has come. Only the latest attempt may send.
struct TransferAttempt {
  Sha256::Digest name{};
  uint64_t number = 0;
};
struct LayerReceived {
  uint32_t block_count = 0;
  // Of the last record; the seed if there is none.
  Checksum last{};
};

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_TRANSFER_H_
