#include "kvservice/server/lane_server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "kvservice/error.h"
#include "kvservice/server/accept_loop.h"
#include "kvservice/server/lane.h"
#include "kvservice/server/status.h"
#include "kvservice/spin.h"
#include "kvservice/v1/lane.pb.h"
#include "wire/lane_socket.h"

namespace kvservice {
namespace {

// A connection must have opened its lane by then.
constexpr uint64_t kOpenNsMax = 5'000'000'000;
constexpr int kOpenCheckMs = 1'000;
// While requests keep coming the sockets are looked at once in so many rounds.
constexpr uint32_t kRoundsPerPoll = 256;

absl::Status PeerNotAllowed() {
  return MakeError(absl::StatusCode::kPermissionDenied,
                   "lanes are for processes of the server's user and of root",
                   {.reason = "PEER_NOT_ALLOWED", .field = {}, .metadata = {}});
}

absl::Status LanesExhausted(uint32_t lanes_max) {
  return MakeError(absl::StatusCode::kResourceExhausted,
                   "all " + std::to_string(lanes_max) + " lanes are open",
                   {.reason = "LANES_EXHAUSTED",
                    .field = {},
                    .metadata = {{"lanes_max", std::to_string(lanes_max)}}});
}

absl::Status CheckPeer(int socket) {
  ucred peer{};
  socklen_t bytes = sizeof(peer);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) return PeerNotAllowed();
  return peer.uid == geteuid() || peer.uid == 0 ? absl::OkStatus() : PeerNotAllowed();
}

absl::StatusOr<wire::LaneShape> CheckShape(const v1::OpenLaneRequest& request, size_t bytes_max) {
  if (request.version() < wire::kLaneVersionMin || request.version() > wire::kLaneVersion) {
    return MakeError(absl::StatusCode::kFailedPrecondition,
                     "version is " + std::to_string(request.version()) + ", expected " +
                         std::to_string(wire::kLaneVersionMin) + " to " +
                         std::to_string(wire::kLaneVersion),
                     {.reason = "LANE_VERSION_UNSUPPORTED",
                      .field = "version",
                      .metadata = {{"version", std::to_string(wire::kLaneVersion)}}});
  }
  const wire::LaneShape shape = {.slot_count = request.slot_count(),
                                 .request_bytes = request.request_bytes(),
                                 .reply_bytes = request.reply_bytes()};
  const std::optional<uint64_t> bytes = wire::LaneBytes(shape);
  if (!bytes.has_value()) {
    const bool count_is_wrong = shape.slot_count == 0 || shape.slot_count > wire::kLaneSlotsMax;
    const bool request_is_wrong =
        shape.request_bytes == 0 || shape.request_bytes % wire::kLanePageBytes != 0;
    const std::string field =
        count_is_wrong ? "slot_count" : (request_is_wrong ? "request_bytes" : "reply_bytes");
    return InvalidField(field, "LANE_SHAPE_INVALID",
                        field + " is not possible: 1 to " + std::to_string(wire::kLaneSlotsMax) +
                            " slots whose areas are whole pages of " +
                            std::to_string(wire::kLanePageBytes) + " bytes");
  }
  if (*bytes > bytes_max) {
    return MakeError(
        absl::StatusCode::kResourceExhausted,
        "a lane of " + std::to_string(*bytes) + " bytes, the limit is " + std::to_string(bytes_max),
        {.reason = "LANE_TOO_LARGE",
         .field = "request_bytes",
         .metadata = {{"bytes", std::to_string(*bytes)},
                      {"bytes_max", std::to_string(bytes_max)}}});
  }
  return shape;
}

absl::StatusOr<wire::SharedMemory> MapRegion(int fd, size_t bytes) {
  constexpr char kField[] = "region";
  if (fd < 0) {
    return InvalidField(kField, "REGION_MISSING",
                        "region is missing: one descriptor must come with the message");
  }
  if (!wire::IsSealedMemory(fd)) {
    return InvalidField(kField, "REGION_NOT_SEALED",
                        "region is not memory that can neither shrink nor grow");
  }
  struct stat state {};
  // After the seals were seen the size is what it will always be.
  if (fstat(fd, &state) != 0 || static_cast<uint64_t>(state.st_size) != bytes) {
    return InvalidField(kField, "REGION_SIZE_MISMATCH",
                        "region has " + std::to_string(state.st_size) + " bytes, the shape needs " +
                            std::to_string(bytes));
  }
  wire::SharedMemory memory = wire::SharedMemory::Map(fd, bytes);
  if (memory.bytes().empty()) {
    return InvalidField(kField, "REGION_NOT_MAPPABLE",
                        "region cannot be mapped for reading and writing");
  }
  return memory;
}

class OneThreadLaneServer final : public LaneServer {
 public:
  OneThreadLaneServer(const LaneServerOptions& options, const ServiceHost& host)
      : options_(options),
        host_{.service = host, .wake = [this] { Wake(); }},
        wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~OneThreadLaneServer() override;

  absl::Status Start(Transport* transport);

 private:
  struct Connection {
    FileDescriptor socket;
    std::string tenant;
    uint64_t accepted_ns = 0;
    // nullptr until it is open.
    std::shared_ptr<Lane> lane;
  };

  void Wake() const {
    const uint64_t one = 1;
    // An eventfd refuses a write only when its counter is full, and then it is readable anyway.
    [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
  }

  // The lane thread.
  void Run();
  bool TakeRequests() const;
  void SetAsleep(bool asleep) const;
  bool HasRequests() const;
  // Looks at the sockets; waits for them if `sleep`.
  void PollSockets(bool sleep);
  void TakeAccepted();
  // False when the connection is over.
  bool Hear(Connection* connection, short events);
  bool Open(Connection* connection);
  // Sets `version` to the lane's.
  absl::StatusOr<std::shared_ptr<Lane>> NewLane(const Connection& connection, uint32_t* version);
  void Close(size_t index);

  const LaneServerOptions options_;
  const LaneHost host_;
  // What a lane carries is asked for call by call.
  const MethodAccess open_access_ = {.name = "OpenLane", .any_of = {}, .is_for_all = true};
  // Written to by whoever wants the thread to look again.
  const FileDescriptor wake_;
  std::vector<std::string> tenants_;  // of the listeners
  std::atomic<bool> stopping_{false};

  std::mutex mutex_;
  // Guarded by mutex_: connections on their way from the accept loop to the thread.
  std::vector<Connection> accepted_;

  // The lane thread alone.
  uint32_t lane_count_ = 0;
  std::vector<Connection> connections_;
  std::vector<pollfd> waits_;

  std::thread thread_;
  std::unique_ptr<AcceptLoop> accept_loop_;
};

OneThreadLaneServer::~OneThreadLaneServer() {
  if (accept_loop_ != nullptr) accept_loop_->Stop();
  stopping_ = true;
  Wake();
  if (thread_.joinable()) thread_.join();
}

absl::Status OneThreadLaneServer::Start(Transport* transport) {
  std::vector<std::unique_ptr<Listener>> listeners;
  for (const ListenAddress& address : options_.listen) {
    if (address.endpoint.kind != Endpoint::Kind::kUnix) continue;
    const absl::StatusOr<Endpoint> endpoint =
        ParseEndpoint(address.endpoint.ToString() + wire::kLaneSuffix);
    if (!endpoint.ok()) return endpoint.status();
    absl::StatusOr<std::unique_ptr<Listener>> listener = transport->Listen(*endpoint);
    if (!listener.ok()) return listener.status();
    listeners.push_back(*std::move(listener));
    tenants_.push_back(address.tenant);
  }
  thread_ = std::thread([this] { Run(); });
  Clock* const clock = host_.service.calls.clock;
  accept_loop_ = std::make_unique<AcceptLoop>(
      std::move(listeners),
      ConnectionLimits{.total = size_t{options_.lanes_max} + kLanesOpeningMax}, clock,
      [this, clock](size_t listener, FileDescriptor socket) {
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          accepted_.push_back({.socket = std::move(socket),
                               .tenant = tenants_[listener],
                               .accepted_ns = clock->SteadyNowNs(),
                               .lane = nullptr});
        }
        Wake();
      });
  return absl::OkStatus();
}

void OneThreadLaneServer::Run() {
  SpinWindow spin(host_.service.calls.clock, options_.spin_us);
  uint32_t rounds = 0;
  while (!stopping_) {
    const bool worked = TakeRequests();
    if (worked) spin.Open();
    if (worked || spin.Wait()) {
      if (++rounds % kRoundsPerPoll == 0) PollSockets(false);
      continue;
    }
    SetAsleep(true);
    PollSockets(!HasRequests());
    SetAsleep(false);
  }
  while (!connections_.empty()) Close(connections_.size() - 1);
}

bool OneThreadLaneServer::TakeRequests() const {
  bool any = false;
  for (const Connection& connection : connections_) {
    any = (connection.lane != nullptr && connection.lane->TakeRequests()) || any;
  }
  return any;
}

void OneThreadLaneServer::SetAsleep(bool asleep) const {
  for (const Connection& connection : connections_) {
    if (connection.lane != nullptr) connection.lane->SetAsleep(asleep);
  }
}

bool OneThreadLaneServer::HasRequests() const {
  for (const Connection& connection : connections_) {
    if (connection.lane != nullptr && connection.lane->HasRequests()) return true;
  }
  return false;
}

void OneThreadLaneServer::PollSockets(bool sleep) {
  waits_.clear();
  waits_.push_back({.fd = wake_.get(), .events = POLLIN, .revents = 0});
  bool any_opening = false;
  for (const Connection& connection : connections_) {
    waits_.push_back({.fd = connection.socket.get(), .events = POLLIN, .revents = 0});
    any_opening = any_opening || connection.lane == nullptr;
  }
  const int timeout_ms = !sleep ? 0 : (any_opening ? kOpenCheckMs : -1);
  poll(waits_.data(), waits_.size(), timeout_ms);
  // From the last, so that closing one leaves the others' places alone.
  for (size_t i = connections_.size(); i-- > 0;) {
    if (!Hear(&connections_[i], waits_[i + 1].revents)) Close(i);
  }
  if (waits_[0].revents == 0) return;
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = read(wake_.get(), &count, sizeof(count));
  TakeAccepted();
}

void OneThreadLaneServer::TakeAccepted() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Connection& connection : accepted_) connections_.push_back(std::move(connection));
  accepted_.clear();
}

bool OneThreadLaneServer::Hear(Connection* connection, short events) {
  if (connection->lane == nullptr) {
    const uint64_t now_ns = host_.service.calls.clock->SteadyNowNs();
    if (events == 0) return now_ns - connection->accepted_ns < kOpenNsMax;
    return Open(connection);
  }
  if (events == 0) return true;
  // What the bytes are does not matter; descriptors that come with them are closed by the system.
  std::array<char, 256> bytes;
  const ssize_t got = recv(connection->socket.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
  return got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
}

bool OneThreadLaneServer::Open(Connection* connection) {
  const uint64_t started_ns = host_.service.calls.clock->SteadyNowNs();
  uint32_t version = wire::kLaneVersion;
  absl::StatusOr<std::shared_ptr<Lane>> lane = NewLane(*connection, &version);
  // The end of the connection, before anything came.
  if (!lane.ok() && absl::IsCancelled(lane.status())) return false;
  v1::OpenLaneResponse response;
  response.set_version(version);
  if (!lane.ok()) *response.mutable_error() = StatusToProto(lane.status());
  const bool sent = wire::SendMessage(connection->socket.get(), response.SerializeAsString(), -1);
  host_.service.calls.gate->Ended(
      {.method = open_access_,
       .caller = LocalCaller(connection->tenant),
       .status = lane.status(),
       .duration_ns = host_.service.calls.clock->SteadyNowNs() - started_ns});
  if (!lane.ok() || !sent) return false;
  connection->lane = *std::move(lane);
  ++lane_count_;
  return true;
}

absl::StatusOr<std::shared_ptr<Lane>> OneThreadLaneServer::NewLane(const Connection& connection,
                                                                   uint32_t* version) {
  const wire::Received received = wire::ReceiveMessage(connection.socket.get());
  if (received.count <= 0) return absl::CancelledError();
  absl::Status admitted =
      host_.service.calls.gate->Admit(open_access_, LocalCaller(connection.tenant));
  if (!admitted.ok()) return admitted;
  if (absl::Status peer = CheckPeer(connection.socket.get()); !peer.ok()) return peer;
  if (lane_count_ >= options_.lanes_max) return LanesExhausted(options_.lanes_max);
  v1::OpenLaneRequest request;
  if (!request.ParseFromString(received.bytes)) return MessageMalformed(request);
  const absl::StatusOr<wire::LaneShape> shape = CheckShape(request, options_.lane_bytes_max);
  if (!shape.ok()) return shape.status();
  absl::StatusOr<wire::SharedMemory> memory =
      MapRegion(received.fd.get(), wire::LaneBytes(*shape).value_or(0));
  if (!memory.ok()) return memory.status();
  *version = request.version();
  return std::make_shared<Lane>(&host_, connection.tenant, *std::move(memory), *shape);
}

void OneThreadLaneServer::Close(size_t index) {
  if (connections_[index].lane != nullptr) --lane_count_;
  connections_.erase(connections_.begin() + static_cast<std::ptrdiff_t>(index));
}

}  // namespace

absl::StatusOr<std::unique_ptr<LaneServer>> StartLaneServer(const LaneServerOptions& options,
                                                            const ServiceHost& host,
                                                            Transport* transport) {
  auto server = std::make_unique<OneThreadLaneServer>(options, host);
  const absl::Status started = server->Start(transport);
  if (!started.ok()) return started;
  return server;
}

}  // namespace kvservice
