#include "kvservice/server/convert_transfer.h"

#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "kvservice/error.h"

namespace kvservice {
namespace {

absl::Status Invalid(const char* field, const std::string& problem) {
  return InvalidField(field, "TRANSFER_INVALID", field + (" " + problem));
}

std::optional<Checksum> ChecksumFromBytes(std::string_view bytes) {
  Checksum checksum;
  if (bytes.size() != checksum.size()) return std::nullopt;
  std::memcpy(checksum.data(), bytes.data(), checksum.size());
  return checksum;
}

std::string_view BytesOf(const Checksum& checksum) {
  return {reinterpret_cast<const char*>(checksum.data()), checksum.size()};
}

absl::StatusOr<TransferPart> SlicesFromProto(v1::TransferSlices* from) {
  const std::string& bytes = from->checksums();
  if (bytes.size() % sizeof(Checksum) != 0) {
    return Invalid("slices.checksums",
                   "has " + std::to_string(bytes.size()) + " bytes, expected 16 per slice");
  }
  TransferSlices slices;
  slices.layer = from->layer();
  slices.first_block = from->first_block();
  slices.checksums.resize(bytes.size() / sizeof(Checksum));
  if (!bytes.empty()) std::memcpy(slices.checksums.data(), bytes.data(), bytes.size());
  slices.rows = std::move(*from->mutable_rows());
  return slices;
}

absl::StatusOr<TransferPart> SeedsFromProto(v1::TransferSeeds* from) {
  const std::optional<Checksum> checksum = ChecksumFromBytes(from->checksum());
  if (!checksum.has_value()) return Invalid("seeds.checksum", "does not have 16 bytes");
  TransferSeeds seeds;
  seeds.layer = from->layer();
  seeds.positions.assign(from->positions().begin(), from->positions().end());
  seeds.queries = std::move(*from->mutable_queries());
  seeds.checksum = *checksum;
  return seeds;
}

void PutPart(TransferBegin part, v1::ReceiveRequest* request) {
  request->mutable_begin()->set_head(std::move(part.head));
  request->mutable_begin()->set_lease_ms(part.lease_ms);
}
void PutPart(TransferTables part, v1::ReceiveRequest* request) {
  request->mutable_tables()->set_encoded(std::move(part.encoded));
}
void PutPart(TransferSlices part, v1::ReceiveRequest* request) {
  v1::TransferSlices* const slices = request->mutable_slices();
  slices->set_layer(part.layer);
  slices->set_first_block(part.first_block);
  for (const Checksum& checksum : part.checksums) {
    slices->mutable_checksums()->append(BytesOf(checksum));
  }
  slices->set_rows(std::move(part.rows));
}
void PutPart(TransferSeeds part, v1::ReceiveRequest* request) {
  v1::TransferSeeds* const seeds = request->mutable_seeds();
  seeds->set_layer(part.layer);
  seeds->mutable_positions()->Add(part.positions.begin(), part.positions.end());
  seeds->set_checksum(std::string(BytesOf(part.checksum)));
  seeds->set_queries(std::move(part.queries));
}
void PutPart(TransferEnd part, v1::ReceiveRequest* request) {
  request->mutable_end()->set_gives_up(part.gives_up);
}

}  // namespace

absl::StatusOr<TransferPart> PartFromProto(v1::ReceiveRequest* request) {
  switch (request->part_case()) {
    case v1::ReceiveRequest::kBegin:
      return TransferBegin{.head = std::move(*request->mutable_begin()->mutable_head()),
                           .lease_ms = request->begin().lease_ms()};
    case v1::ReceiveRequest::kTables:
      return TransferTables{.encoded = std::move(*request->mutable_tables()->mutable_encoded())};
    case v1::ReceiveRequest::kSlices:
      return SlicesFromProto(request->mutable_slices());
    case v1::ReceiveRequest::kSeeds:
      return SeedsFromProto(request->mutable_seeds());
    case v1::ReceiveRequest::kEnd:
      return TransferEnd{.gives_up = request->end().gives_up()};
    case v1::ReceiveRequest::PART_NOT_SET:
      break;
  }
  return Invalid("part", "is none that this version knows");
}

v1::ReceiveRequest PartToProto(TransferPart part) {
  v1::ReceiveRequest request;
  std::visit([&](auto& kind) { PutPart(std::move(kind), &request); }, part);
  return request;
}

void ReplyToProto(const ReceiveReply& reply, v1::ReceiveResponse* response) {
  response->set_wants_tables(reply.wants_tables);
  for (const LayerReceived& received : reply.layers) {
    v1::LayerReceived* const layer = response->add_layers();
    layer->set_block_count(received.block_count);
    layer->set_last_checksum(std::string(BytesOf(received.last)));
  }
  if (!reply.sequence.has_value()) return;
  const SequenceId& id = reply.sequence->id;
  response->mutable_handle()->set_id(id.bytes.data(), id.bytes.size());
  response->mutable_handle()->set_generation(reply.sequence->generation);
}

absl::StatusOr<ReceiveReply> ReplyFromProto(const v1::ReceiveResponse& response) {
  ReceiveReply reply;
  reply.wants_tables = response.wants_tables();
  for (const v1::LayerReceived& received : response.layers()) {
    const std::optional<Checksum> last = ChecksumFromBytes(received.last_checksum());
    if (!last.has_value()) return Invalid("layers.last_checksum", "does not have 16 bytes");
    reply.layers.push_back({.block_count = received.block_count(), .last = *last});
  }
  return reply;
}

}  // namespace kvservice
