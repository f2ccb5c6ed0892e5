#include "kvservice/transfer.h"

#include <utility>

#include "absl/types/span.h"
#include "kvservice/cache/byte_codec.h"
#include "kvservice/stored_policy.h"

namespace kvservice {
namespace {

constexpr uint32_t kMagic = 0x4854564b;  // "KVTH"
constexpr uint32_t kVersion = 1;

}  // namespace

std::string WriteTransferHead(const TransferHead& head) {
  ByteWriter writer;
  writer.Number(kMagic);
  writer.Number(kVersion);
  writer.Raw(head.id.data(), head.id.size());
  writer.Number(head.generation);
  writer.Text(head.model);
  writer.Number(head.model_fingerprint);
  writer.Raw(head.table_digest.data(), head.table_digest.size());
  writer.Number(static_cast<uint32_t>(head.lengths.size()));
  for (const uint32_t length : head.lengths) writer.Number(length);
  WritePolicy(head.policy, &writer);
  std::string bytes = writer.Take();
  Seal(&bytes);
  return bytes;
}

std::optional<TransferHead> ReadTransferHead(std::string_view bytes) {
  ByteReader reader(Unseal(bytes));
  if (reader.Number<uint32_t>() != kMagic) reader.Fail();
  if (reader.Number<uint32_t>() != kVersion) reader.Fail();
  TransferHead head;
  reader.Raw(head.id.data(), head.id.size());
  head.generation = reader.Number<uint64_t>();
  head.model = reader.Text();
  head.model_fingerprint = reader.Number<uint64_t>();
  reader.Raw(head.table_digest.data(), head.table_digest.size());
  head.lengths.resize(reader.Count(sizeof(uint32_t)));
  for (uint32_t& length : head.lengths) length = reader.Number<uint32_t>();
  head.policy = ReadPolicy(&reader);
  return reader.Finished() ? std::optional(std::move(head)) : std::nullopt;
}

Sha256::Digest TransferName(std::string_view head) {
  Sha256 hash;
  hash.Update(absl::MakeConstSpan(reinterpret_cast<const std::byte*>(head.data()), head.size()));
  return hash.Finish();
}

Checksum ChecksumOfSeeds(const TransferSeeds& seeds) {
  ByteWriter writer;
  writer.Number(seeds.layer);
  writer.Number(static_cast<uint32_t>(seeds.positions.size()));
  writer.Raw(seeds.positions.data(), seeds.positions.size() * sizeof(uint32_t));
  writer.Raw(seeds.queries.data(), seeds.queries.size());
  return ChecksumOf(writer.bytes());
}

}  // namespace kvservice
