#include "tests/stress/ledger.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace kvservice::testing {

bool LedgerEntry::HasDurable() const {
  return std::any_of(durable.begin(), durable.end(), [](uint32_t length) { return length > 0; });
}

void LedgerEntry::MayCut(uint32_t length) {
  for (uint32_t& layer : durable) layer = std::min(layer, length);
}

void LedgerEntry::Cut(uint32_t length) {
  MayCut(length);
  for (uint32_t& layer : sent) layer = std::min(layer, length);
  words.resize(std::min<size_t>(words.size(), length));
}

void LedgerEntry::Settle(const std::vector<uint32_t>& found, bool found_suspended) {
  durable = sent = found;
  words.resize(*std::max_element(found.begin(), found.end()));
  is_suspended = found_suspended;
  maybe_dropped = maybe_suspended = maybe_resumed = false;
}

std::string LedgerEntry::CheckLengths(const std::vector<uint32_t>& found) const {
  for (size_t layer = 0; layer < found.size(); ++layer) {
    if (found[layer] < durable[layer]) {
      return absl::StrCat("layer ", layer, " has ", found[layer], " tokens, ", durable[layer],
                          " were acknowledged as durable");
    }
    if (found[layer] > sent[layer]) {
      return absl::StrCat("layer ", layer, " has ", found[layer], " tokens, ", sent[layer],
                          " were sent");
    }
  }
  return "";
}

std::string LedgerEntry::CheckAbsent() const {
  const bool must_be_there = (HasDurable() || is_suspended) && !maybe_dropped;
  return must_be_there ? "a sequence with durable tokens is gone" : "";
}

std::string LedgerEntry::CheckSuspended(bool found_suspended) const {
  if (found_suspended == is_suspended) return "";
  if (found_suspended && maybe_suspended) return "";
  if (!found_suspended && maybe_resumed) return "";
  return found_suspended ? "a sequence is suspended that was not" : "a suspended sequence is not";
}

}  // namespace kvservice::testing
