#include "kvservice/server/transfer_attempt.h"

#include <grpcpp/client_context.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <utility>
#include <variant>

#include "kvservice/error.h"
#include "kvservice/server/convert_transfer.h"
#include "kvservice/server/status.h"

namespace kvservice {
namespace {

// Rows of one message: the size at which streams are fastest.
constexpr size_t kRowsBytesAim = size_t{1} << 20;
constexpr uint32_t kReconnectMs = 200;
constexpr char kTargetField[] = "target_endpoint";

// What the target answered, as an error of the call that asked for the transfer. One without a
// reason comes from the connection.
absl::Status FromTarget(const grpc::Status& answer) {
  const absl::Status status = FromGrpcStatus(answer);
  ErrorDetails details = DetailsOf(status);
  if (!details.reason.empty()) {
    if (!details.field.empty()) details.metadata.emplace_back("target_field", details.field);
    details.field = kTargetField;
    return MakeError(status.code(), "the target: " + std::string(status.message()), details);
  }
  const bool is_final = status.code() == absl::StatusCode::kDeadlineExceeded ||
                        status.code() == absl::StatusCode::kCancelled ||
                        status.code() == absl::StatusCode::kUnimplemented ||
                        status.code() == absl::StatusCode::kResourceExhausted;
  if (is_final) {
    return MakeError(status.code(), "the target: " + std::string(status.message()),
                     {.reason = "TRANSFER_BROKEN_OFF", .field = kTargetField, .metadata = {}});
  }
  return MakeError(absl::StatusCode::kUnavailable,
                   "the connection to the target: " + std::string(status.message()),
                   {.reason = "TRANSFER_TARGET_UNREACHABLE",
                    .field = kTargetField,
                    .metadata = {},
                    .retry_delay_ms = kReconnectMs});
}

absl::Status MalformedAnswer(const char* problem) {
  return MakeError(absl::StatusCode::kInternal, std::string("the target answered ") + problem,
                   {.reason = "TRANSFER_ANSWER_MALFORMED", .field = kTargetField, .metadata = {}});
}

class TransferRun {
 public:
  TransferRun(const TransferAsk& ask, Engine* engine, v1::SequenceService::StubInterface* target,
              grpc::ClientContext* context, uint64_t* sent_bytes)
      : ask_(ask), engine_(engine), sent_bytes_(sent_bytes), stream_(target->Receive(context)) {}

  absl::StatusOr<TransferSent> Run() {
    absl::Status status = RunParts();
    if (status.ok()) {
      stream_->WritesDone();
      stream_->Finish();
      return std::move(sent_);
    }
    // Of the source's own: the target need not wait for more.
    if (!is_broken_ && WritePart(TransferEnd{.gives_up = true}).ok()) {
      stream_->WritesDone();
      stream_->Finish();
    }
    return status;
  }

 private:
  using Part = SendAsk::Part;

  absl::Status RunParts() {
    absl::StatusOr<TransferPart> begin = Ask({.part = Part::kBegin}).get();
    if (!begin.ok()) return begin.status();
    sent_.head = std::get<TransferBegin>(*begin).head;
    absl::Status status = Exchange(*std::move(begin));
    if (!status.ok() || answer_.has_handle()) return status;
    if (answer_.wants_tables()) {
      absl::StatusOr<TransferPart> tables = Ask({.part = Part::kTables}).get();
      if (!tables.ok()) return tables.status();
      status = Exchange(*std::move(tables));
      if (!status.ok()) return status;
    }
    status = SendLayers();
    if (status.ok()) status = Exchange(TransferEnd());
    if (status.ok() && !answer_.has_handle()) return MalformedAnswer("without a handle");
    return status;
  }

  std::future<absl::StatusOr<TransferPart>> Ask(const SendAsk& ask) {
    // The engine answers every call, also at its end.
    auto promise = std::make_shared<std::promise<absl::StatusOr<TransferPart>>>();
    engine_->Send(
        ask_.tenant, ask_.id, ask_.generation, ask,
        [promise](absl::StatusOr<TransferPart> part) { promise->set_value(std::move(part)); });
    return promise->get_future();
  }

  absl::Status SendLayers() {
    const std::optional<TransferHead> head = ReadTransferHead(sent_.head);
    const absl::StatusOr<ReceiveReply> reply = ReplyFromProto(answer_);
    if (!reply.ok() || reply->layers.size() != head->lengths.size()) {
      return MalformedAnswer("with other layers");
    }
    for (uint32_t layer = 0; layer < head->lengths.size(); ++layer) {
      absl::Status status = SendSlices(layer, head->lengths[layer], reply->layers[layer]);
      if (status.ok()) status = SendSeeds(layer);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // The next slices are read while the last are on their way.
  absl::Status SendSlices(uint32_t layer, uint32_t length, const LayerReceived& received) {
    SendAsk ask = {.part = Part::kSlices,
                   .layer = layer,
                   .first_block = received.block_count,
                   .block_count = blocks_per_part_,
                   .length = length,
                   .previous = received.last};
    const uint32_t end = BlockCount(length);
    if (ask.first_block > end) return MalformedAnswer("with more blocks than there are");
    const auto ask_next = [&] {
      ask.block_count = std::min(blocks_per_part_, end - ask.first_block);
      return Ask(ask);
    };
    std::future<absl::StatusOr<TransferPart>> next;
    if (ask.first_block < end) next = ask_next();
    while (next.valid()) {
      absl::StatusOr<TransferPart> part = next.get();
      if (!part.ok()) return part.status();
      const auto& slices = std::get<TransferSlices>(*part);
      const size_t bytes = slices.rows.size();
      ask.first_block += ask.block_count;
      ask.previous = slices.checksums.back();
      blocks_per_part_ = static_cast<uint32_t>(std::clamp<size_t>(
          kRowsBytesAim / std::max<size_t>(1, bytes / slices.checksums.size()), 1, kBlocksMax));
      if (ask.first_block < end) next = ask_next();
      const absl::Status status = WritePart(*std::move(part));
      if (!status.ok()) {
        if (next.valid()) next.wait();
        return status;
      }
      *sent_bytes_ += bytes;
    }
    return absl::OkStatus();
  }

  absl::Status SendSeeds(uint32_t layer) {
    absl::StatusOr<TransferPart> seeds = Ask({.part = Part::kSeeds, .layer = layer}).get();
    if (!seeds.ok()) return seeds.status();
    if (std::get<TransferSeeds>(*seeds).positions.empty()) return absl::OkStatus();
    return WritePart(*std::move(seeds));
  }

  absl::Status WritePart(TransferPart part) {
    if (stream_->Write(PartToProto(std::move(part)))) return absl::OkStatus();
    return Broken();
  }

  // A part that is answered.
  absl::Status Exchange(TransferPart part) {
    const absl::Status status = WritePart(std::move(part));
    if (!status.ok()) return status;
    if (!stream_->Read(&answer_)) return Broken();
    if (!answer_.has_handle()) return absl::OkStatus();
    if (answer_.handle().id().size() != sent_.id.bytes.size()) {
      return MalformedAnswer("with an id that is none");
    }
    std::memcpy(sent_.id.bytes.data(), answer_.handle().id().data(), sent_.id.bytes.size());
    sent_.generation = answer_.handle().generation();
    return absl::OkStatus();
  }

  absl::Status Broken() {
    is_broken_ = true;
    const grpc::Status status = stream_->Finish();
    return status.ok() ? FromTarget(grpc::Status(grpc::StatusCode::UNAVAILABLE, "it has ended"))
                       : FromTarget(status);
  }

  static constexpr uint32_t kBlocksMax = 64;

  const TransferAsk& ask_;
  Engine* const engine_;
  uint64_t* const sent_bytes_;
  const std::unique_ptr<grpc::ClientReaderWriterInterface<v1::ReceiveRequest, v1::ReceiveResponse>>
      stream_;
  v1::ReceiveResponse answer_;
  TransferSent sent_;
  // How many make a message is known once one was read.
  uint32_t blocks_per_part_ = 1;
  bool is_broken_ = false;
};

}  // namespace

absl::StatusOr<TransferSent> RunTransferAttempt(const TransferAsk& ask, Engine* engine,
                                                v1::SequenceService::StubInterface* target,
                                                grpc::ClientContext* context,
                                                uint64_t* sent_bytes) {
  return TransferRun(ask, engine, target, context, sent_bytes).Run();
}

}  // namespace kvservice
