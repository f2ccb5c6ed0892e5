// The source's end of transfers between servers. Each runs on a thread of its own, which asks the
// engine for a part, hands it to the connection, and has the next one ready meanwhile: at most two
// parts are in memory, and HTTP/2 flow control holds the thread back to the pace of the target. A
// connection that breaks is opened again a few times, and the target says how far it had come.
//
// Only endpoints that the server was started with are ever connected to: a caller chooses among
// them and can make the server reach nothing else.

#ifndef KVSERVICE_KVSERVICE_SERVER_TRANSFERS_H_
#define KVSERVICE_KVSERVICE_SERVER_TRANSFERS_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvservice/engine.h"
#include "kvservice/server/endpoint.h"

namespace kvservice {

struct TransferOptions {
  // Where sequences may go, each target for the sequences of one tenant.
  std::vector<ListenAddress> targets;
  // At a time.
  uint32_t transfers_max = 4;
};

struct TransferAsk {
  std::string tenant;
  SequenceId id;
  uint64_t generation = 0;
  std::string target_endpoint;
  bool move = false;
  // The caller's.
  std::chrono::system_clock::time_point deadline;
};

struct TransferOutcome {
  // On the target.
  SequenceId id;
  uint64_t generation = 0;
  uint64_t sent_bytes = 0;
  bool moved = false;
};

// Any thread.
class Transfers {
 public:
  virtual ~Transfers() = default;
  // Answers on the caller's thread when nothing is begun, else on the transfer's. Errors: the
  // comment of SequenceService.Transfer.
  virtual void Start(TransferAsk ask, Done<TransferOutcome> done) = 0;
  // Begins no more, gives those that run the grace, then breaks them off. Nothing runs afterwards.
  // Idempotent; the destructor calls it without grace.
  virtual void Stop(std::chrono::milliseconds grace) = 0;
};

// The engine is borrowed and outlives it.
std::unique_ptr<Transfers> NewTransfers(const TransferOptions& options, Engine* engine);

}  // namespace kvservice

#endif  // KVSERVICE_KVSERVICE_SERVER_TRANSFERS_H_
