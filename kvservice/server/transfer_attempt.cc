#include "kvservice/server/transfer_attempt.h"

#include <grpcpp/client_context.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

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
    // Of the source's own, and final: the target need not wait for more.
    const bool gives_up = !status.ok() && !is_broken_ && DetailsOf(status).retry_delay_ms == 0;
    // An answer that nobody reads would keep the stream from its end.
    if (gives_up && WritePart(TransferEnd{.gives_up = true}).ok()) stream_->Read(&answer_);
    if (!is_broken_) {
      stream_->WritesDone();
      stream_->Finish();
    }
    if (!status.ok()) return status;
    return std::move(sent_);
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

  // Every layer's slices, then its seeds. The next part is read while the last is on its way.
  absl::Status SendLayers() {
    absl::StatusOr<ReceiveReply> reply = ReplyFromProto(answer_);
    const std::optional<TransferHead> head = ReadTransferHead(sent_.head);
    if (!reply.ok() || reply->layers.size() != head->lengths.size()) {
      return MalformedAnswer("with other layers");
    }
    lengths_ = head->lengths;
    received_ = std::move(reply->layers);
    std::future<absl::StatusOr<TransferPart>> next = AskNext();
    while (next.valid()) {
      absl::StatusOr<TransferPart> part = next.get();
      if (!part.ok()) return part.status();
      const bool has_content = StepOver(*part);
      next = AskNext();
      const absl::Status status = has_content ? WritePart(*std::move(part)) : absl::OkStatus();
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  // Nothing when all of it was asked for.
  std::future<absl::StatusOr<TransferPart>> AskNext() {
    if (layer_ == lengths_.size()) return {};
    const LayerReceived& received = received_[layer_];
    const uint32_t end = BlockCount(lengths_[layer_]);
    if (received.block_count >= end) return Ask({.part = Part::kSeeds, .layer = layer_});
    return Ask({.part = Part::kSlices,
                .layer = layer_,
                .first_block = received.block_count,
                .block_count = std::min(blocks_per_part_, end - received.block_count),
                .length = lengths_[layer_],
                .previous = received.last});
  }

  // Whether there is anything in it.
  bool StepOver(const TransferPart& part) {
    if (const auto* seeds = std::get_if<TransferSeeds>(&part)) {
      ++layer_;
      return !seeds->positions.empty();
    }
    const auto& slices = std::get<TransferSlices>(part);
    received_[layer_].block_count += static_cast<uint32_t>(slices.checksums.size());
    received_[layer_].last = slices.checksums.back();
    const size_t slice_bytes = std::max<size_t>(1, slices.rows.size() / slices.checksums.size());
    blocks_per_part_ =
        static_cast<uint32_t>(std::clamp<size_t>(kRowsBytesAim / slice_bytes, 1, kBlocksMax));
    return true;
  }

  absl::Status WritePart(TransferPart part) {
    const auto* const slices = std::get_if<TransferSlices>(&part);
    const size_t bytes = slices == nullptr ? 0 : slices->rows.size();
    if (!stream_->Write(PartToProto(std::move(part)))) return Broken();
    *sent_bytes_ += bytes;
    return absl::OkStatus();
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
  // [layer_count]: how long they are, and what was read of them so far. How many blocks make a
  // message is known once one was read.
  std::vector<uint32_t> lengths_;
  std::vector<LayerReceived> received_;
  uint32_t layer_ = 0;
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
