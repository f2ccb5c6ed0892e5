// What a client knows about its sequences: what it sent, what was acknowledged as durable, and what
// was under way when the server went. After a restart it compares.
//
// The words of a sequence are the same in all layers, which hold different numbers of them.

#ifndef KVSERVICE_TESTS_STRESS_LEDGER_H_
#define KVSERVICE_TESTS_STRESS_LEDGER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "tests/kvservice/words.h"

namespace kvservice::testing {

// One sequence.
struct LedgerEntry {
  // Sent, in order; a truncate takes back.
  Words words;
  // Per layer: tokens that must be there after a crash, and tokens that may be.
  std::vector<uint32_t> durable;
  std::vector<uint32_t> sent;
  bool is_suspended = false;
  // Not answered: the server may have done it or not.
  bool maybe_dropped = false;
  bool maybe_suspended = false;
  bool maybe_resumed = false;

  explicit LedgerEntry(uint32_t layer_count) : durable(layer_count, 0), sent(layer_count, 0) {}

  bool HasDurable() const;
  // All that was sent is on disk.
  void AllDurable() { durable = sent; }
  // A truncate that was sent, and one that was acknowledged.
  void MayCut(uint32_t length);
  void Cut(uint32_t length);
  // `found` is what the server had after a restart: from then on that is so.
  void Settle(const std::vector<uint32_t>& found, bool found_suspended);

  // What is wrong with the lengths that were found; empty if nothing is.
  std::string CheckLengths(const std::vector<uint32_t>& found) const;
  // What is wrong with a sequence that was not found.
  std::string CheckAbsent() const;
  std::string CheckSuspended(bool found_suspended) const;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_STRESS_LEDGER_H_
