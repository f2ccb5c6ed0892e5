#include "kvservice/stored_rows.h"

#include <cstring>
#include <utility>

#include "kvservice/cache/byte_codec.h"
#include "kvservice/stored_policy.h"

namespace kvservice {
namespace {

constexpr uint32_t kRowVersion = 1;
constexpr size_t kIdBytes = sizeof(SequenceId::bytes);
// An id, an empty name and a flag.
constexpr size_t kInventoryEntryBytesMin = kIdBytes + sizeof(uint32_t) + 1;

template <typename Bytes>
std::string Key(const char* rows, const Bytes& bytes) {
  std::string key(rows);
  key.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  return key;
}

void AppendBigEndian(uint32_t number, std::string* key) {
  for (int shift = 24; shift >= 0; shift -= 8) key->push_back(static_cast<char>(number >> shift));
}

std::string SlicePrefix(const SequenceId& id) { return Key("B", id.bytes); }

template <typename T, typename Allocator>
void WriteAll(const std::vector<T, Allocator>& values, ByteWriter* writer) {
  writer->Number(static_cast<uint32_t>(values.size()));
  writer->Raw(values.data(), values.size() * sizeof(T));
}

template <typename T>
void ReadAll(ByteReader* reader, std::vector<T>* values) {
  values->resize(reader->Count(sizeof(T)));
  reader->Raw(values->data(), values->size() * sizeof(T));
}

template <size_t kCount>
void WriteBytes(const std::array<std::byte, kCount>& bytes, ByteWriter* writer) {
  writer->Raw(bytes.data(), kCount);
}

template <size_t kCount>
void ReadBytes(ByteReader* reader, std::array<std::byte, kCount>* bytes) {
  reader->Raw(bytes->data(), kCount);
}

bool ReadFlag(ByteReader* reader) {
  const auto byte = reader->Number<uint8_t>();
  if (byte > 1) reader->Fail();
  return byte == 1;
}

// Every row begins with its kind and version, so that none is taken for another.
ByteWriter BeginRow(const char* rows) {
  ByteWriter writer;
  writer.Raw(rows, 1);
  writer.Number(kRowVersion);
  return writer;
}

std::string EndRow(ByteWriter writer) {
  std::string row = writer.Take();
  Seal(&row);
  return row;
}

ByteReader OpenRow(const char* rows, std::string_view row) {
  ByteReader reader(Unseal(row));
  const auto kind = reader.Number<char>();
  const auto version = reader.Number<uint32_t>();
  if (kind != rows[0] || version != kRowVersion) reader.Fail();
  return reader;
}

}  // namespace

std::string ModelKey(uint64_t fingerprint) {
  std::array<std::byte, sizeof(fingerprint)> bytes;
  std::memcpy(bytes.data(), &fingerprint, sizeof(fingerprint));
  return Key(kModelRows, bytes);
}

std::string TableKey(uint64_t model_fingerprint, const Sha256::Digest& digest) {
  std::string key = kTableRows + ModelKey(model_fingerprint).substr(1);
  key.append(reinterpret_cast<const char*>(digest.data()), digest.size());
  return key;
}
std::string IdentityKey(const SequenceId& id) { return Key(kIdentityRows, id.bytes); }
std::string StateKey(const SequenceId& id) { return Key(kStateRows, id.bytes); }
std::string LostKey(const SequenceId& id) { return Key(kLostRows, id.bytes); }

std::string SliceKey(const SequenceId& id, uint32_t layer, uint32_t block) {
  std::string key = SlicePrefix(id);
  AppendBigEndian(layer, &key);
  AppendBigEndian(block, &key);
  return key;
}

std::string SliceKeyEnd(const SequenceId& id, uint32_t layer) { return SliceKey(id, layer + 1, 0); }

std::string SliceKeyEnd(const SequenceId& id) { return SliceKey(id, UINT32_MAX, UINT32_MAX); }

std::optional<SequenceId> IdOfKey(std::string_view key) {
  SequenceId id;
  if (key.size() != 1 + kIdBytes) return std::nullopt;
  std::memcpy(id.bytes.data(), key.data() + 1, kIdBytes);
  return id;
}

std::string WriteModel(const StoredModel& model) {
  const ModelSpec& spec = model.spec;
  ByteWriter writer = BeginRow(kModelRows);
  WriteBytes(model.table_digest, &writer);
  writer.Text(spec.name);
  writer.Number(spec.layer_count);
  writer.Number(spec.layout.query_head_count);
  writer.Number(spec.layout.kv_head_count);
  writer.Number(spec.layout.head_dim);
  writer.Number(spec.layout.dtype);
  writer.Number(spec.scale);
  writer.Number(spec.logit_softcap);
  WriteAll(spec.sliding_windows, &writer);
  WriteAll(spec.inverse_frequencies, &writer);
  writer.Number(spec.rotary_style);
  WritePolicy(spec.default_policy, &writer);
  return EndRow(std::move(writer));
}

std::optional<StoredModel> ReadModel(std::string_view row) {
  ByteReader reader = OpenRow(kModelRows, row);
  StoredModel model;
  ModelSpec& spec = model.spec;
  ReadBytes(&reader, &model.table_digest);
  spec.name = reader.Text();
  spec.layer_count = reader.Number<uint32_t>();
  spec.layout.query_head_count = reader.Number<uint32_t>();
  spec.layout.kv_head_count = reader.Number<uint32_t>();
  spec.layout.head_dim = reader.Number<uint32_t>();
  const auto dtype = reader.Number<uint8_t>();
  spec.scale = reader.Number<float>();
  spec.logit_softcap = reader.Number<float>();
  ReadAll(&reader, &spec.sliding_windows);
  ReadAll(&reader, &spec.inverse_frequencies);
  const auto rotary_style = reader.Number<uint8_t>();
  spec.default_policy = ReadPolicy(&reader);
  if (dtype > static_cast<uint8_t>(DType::kBfloat16)) reader.Fail();
  if (rotary_style > static_cast<uint8_t>(RotaryStyle::kInterleaved)) reader.Fail();
  if (!reader.Finished()) return std::nullopt;
  spec.layout.dtype = static_cast<DType>(dtype);
  spec.rotary_style = static_cast<RotaryStyle>(rotary_style);
  return model;
}

std::string WriteTables(const StoredTables& tables) {
  ByteWriter writer = BeginRow(kTableRows);
  writer.Number(tables.model_fingerprint);
  writer.Number(tables.version);
  writer.Text(tables.encoded);
  if (!tables.importer.empty()) writer.Text(tables.importer);
  return EndRow(std::move(writer));
}

std::optional<StoredTables> ReadTables(std::string_view row) {
  ByteReader reader = OpenRow(kTableRows, row);
  StoredTables tables;
  tables.model_fingerprint = reader.Number<uint64_t>();
  tables.version = reader.Number<uint32_t>();
  tables.encoded = reader.Text();
  if (reader.Finished()) return tables;
  tables.importer = reader.Text();
  const bool is_whole = reader.Finished() && !tables.importer.empty();
  return is_whole ? std::optional(std::move(tables)) : std::nullopt;
}

std::string WriteIdentity(const StoredIdentity& identity) {
  ByteWriter writer = BeginRow(kIdentityRows);
  WriteBytes(identity.id.bytes, &writer);
  writer.Text(identity.tenant);
  writer.Text(identity.request_id);
  writer.Number(identity.model_fingerprint);
  WriteBytes(identity.table_digest, &writer);
  WritePolicy(identity.policy, &writer);
  return EndRow(std::move(writer));
}

std::optional<StoredIdentity> ReadIdentity(std::string_view row) {
  ByteReader reader = OpenRow(kIdentityRows, row);
  StoredIdentity identity;
  ReadBytes(&reader, &identity.id.bytes);
  identity.tenant = reader.Text();
  identity.request_id = reader.Text();
  identity.model_fingerprint = reader.Number<uint64_t>();
  ReadBytes(&reader, &identity.table_digest);
  identity.policy = ReadPolicy(&reader);
  return reader.Finished() ? std::optional(std::move(identity)) : std::nullopt;
}

std::string WriteState(const StoredState& state) {
  ByteWriter writer = BeginRow(kStateRows);
  WriteBytes(state.id.bytes, &writer);
  writer.Text(state.tenant);
  WriteBytes(state.identity, &writer);
  writer.Number(state.generation);
  writer.Number(state.crash_count);
  writer.Number(state.lease_ns);
  writer.Number(static_cast<uint8_t>(state.is_suspended));
  writer.Number(static_cast<uint32_t>(state.layers.size()));
  for (const StoredLayer& layer : state.layers) {
    writer.Number(layer.length);
    WriteBytes(layer.last, &writer);
  }
  return EndRow(std::move(writer));
}

std::optional<StoredState> ReadState(std::string_view row) {
  ByteReader reader = OpenRow(kStateRows, row);
  StoredState state;
  ReadBytes(&reader, &state.id.bytes);
  state.tenant = reader.Text();
  ReadBytes(&reader, &state.identity);
  state.generation = reader.Number<uint64_t>();
  state.crash_count = reader.Number<uint64_t>();
  state.lease_ns = reader.Number<uint64_t>();
  state.is_suspended = ReadFlag(&reader);
  state.layers.resize(reader.Count(sizeof(uint32_t) + sizeof(Checksum)));
  for (StoredLayer& layer : state.layers) {
    layer.length = reader.Number<uint32_t>();
    ReadBytes(&reader, &layer.last);
  }
  return reader.Finished() ? std::optional(std::move(state)) : std::nullopt;
}

std::string WriteLost(const SequenceId& id, const std::string& tenant) {
  ByteWriter writer = BeginRow(kLostRows);
  WriteBytes(id.bytes, &writer);
  writer.Text(tenant);
  return EndRow(std::move(writer));
}

std::optional<std::string> ReadLost(const SequenceId& id, std::string_view row) {
  ByteReader reader = OpenRow(kLostRows, row);
  SequenceId found;
  ReadBytes(&reader, &found.bytes);
  std::string tenant = reader.Text();
  if (!reader.Finished() || !(found == id)) return std::nullopt;
  return tenant;
}

Checksum ChecksumOfRow(std::string_view row) {
  Checksum checksum{};
  if (row.size() < checksum.size()) return checksum;
  std::memcpy(checksum.data(), row.data() + row.size() - checksum.size(), checksum.size());
  return checksum;
}

std::string WriteInventory(const Inventory& inventory) {
  ByteWriter writer;
  writer.Number(static_cast<uint32_t>(inventory.size()));
  for (const auto& [id, entry] : inventory) {
    WriteBytes(id.bytes, &writer);
    writer.Text(entry.tenant);
    writer.Number(static_cast<uint8_t>(entry.is_lost));
    WriteBytes(entry.state, &writer);
  }
  return writer.Take();
}

std::optional<Inventory> ReadInventory(std::string_view bytes) {
  ByteReader reader(bytes);
  Inventory inventory;
  const uint32_t count = reader.Count(kInventoryEntryBytesMin);
  for (uint32_t i = 0; i < count && !reader.failed(); ++i) {
    SequenceId id;
    ReadBytes(&reader, &id.bytes);
    InventoryEntry entry;
    entry.tenant = reader.Text();
    entry.is_lost = ReadFlag(&reader);
    ReadBytes(&reader, &entry.state);
    // Each once, in the order in which they are written.
    if (!inventory.empty() && !ById()(inventory.rbegin()->first, id)) reader.Fail();
    inventory.emplace_hint(inventory.end(), id, std::move(entry));
  }
  return reader.Finished() ? std::optional(std::move(inventory)) : std::nullopt;
}

}  // namespace kvservice
