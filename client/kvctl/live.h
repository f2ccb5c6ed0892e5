// Commands that go on until they are told to stop: by a count, or by SIGINT, which ends them with
// kExitInterrupted between two samples. One thread.

#ifndef KVSERVICE_CLIENT_KVCTL_LIVE_H_
#define KVSERVICE_CLIENT_KVCTL_LIVE_H_

#include <chrono>
#include <cstdint>
#include <functional>

#include "client/kvctl/commands.h"

namespace kvservice::client {

// Runs `sample` every options.watch until it returns something else than kExitOk, which is the
// result, or options.watch_count samples were taken (0 = no limit).
int Repeat(const GlobalOptions& options, const std::function<int()>& sample);

// Server and busiest sequences, with rates between two samples; the first sample counts from the
// server's start. A terminal is cleared before each.
int ShowTop(const GlobalOptions& options, uint32_t sequence_count);

// One line for each sequence that came, went, or changed its place or generation between two looks;
// those that are there at the start come first. What comes and goes between two looks is not seen.
int WatchSequences(const GlobalOptions& options);

}  // namespace kvservice::client

#endif  // KVSERVICE_CLIENT_KVCTL_LIVE_H_
