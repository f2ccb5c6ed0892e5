// Memory that another core or a device has written last takes 100 ns a line to read, and more where
// it is read in no order that a processor foresees.

#ifndef KVSERVICE_ATTENTION_PREFETCH_H_
#define KVSERVICE_ATTENTION_PREFETCH_H_

#include <cstddef>

namespace kvservice {

// Begins to fetch what will be read soon: a few kilobytes, more than that fetches in vain. Any
// address will do.
inline void Prefetch(const void* data, size_t bytes) {
  constexpr size_t kLineBytes = 64;
  const auto* const lines = static_cast<const char*>(data);
  for (size_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(lines + at);
}

}  // namespace kvservice

#endif  // KVSERVICE_ATTENTION_PREFETCH_H_
