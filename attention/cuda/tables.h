// Where the slices and sketches of rows are, as tables in device memory that outlive calls: from
// one step to the next a row's tables grow by an entry now and then, so only what changed is
// copied.
//
// One thread.

#ifndef KVSERVICE_ATTENTION_CUDA_TABLES_H_
#define KVSERVICE_ATTENTION_CUDA_TABLES_H_

#include <cstddef>
#include <map>
#include <utility>
#include <vector>

#include "attention/cuda/arena.h"
#include "attention/cuda/readings.h"
#include "attention/kv_view.h"

namespace kvservice::cuda {

class TableCache {
 public:
  explicit TableCache(cudaStream_t stream) : stream_(stream) {}
  ~TableCache();
  TableCache(const TableCache&) = delete;
  TableCache& operator=(const TableCache&) = delete;

  // Starts a call, whose number is larger than those before it. The device has finished with those
  // before number `oldest`: what they alone may use goes.
  void Begin(uint64_t number, uint64_t oldest);
  // The tables of a view, good until the device has finished with the call. Copies are enqueued on
  // the stream, from `staging`, which is the call's.
  RowTables Get(const KvView& view, Arena* staging);

 private:
  // The host knows what the device has: [count] slices, then from `capacity` on [count] sketches.
  struct Table {
    std::vector<const std::byte*> slices;
    std::vector<const std::byte*> sketches;
    const std::byte** device = nullptr;
    size_t capacity = 0;
    // Of the latest view.
    uint64_t revision = 0;
    uint32_t length = 0;
  };
  // One that nobody will be given any more, and the latest call that may use it.
  struct Retired {
    uint64_t number = 0;
    const std::byte** device = nullptr;
  };
  // Copies what is new from entry `first` on.
  void Copy(absl::Span<const std::byte* const> from, size_t first, Arena* staging,
            std::vector<const std::byte*>* known, const std::byte** to) const;
  void Retire(const std::byte** device) { retired_.push_back({number_, device}); }
  void RetireAll();

  const cudaStream_t stream_;
  uint64_t number_ = 0;  // of the latest call
  // By the addresses of the view's arrays: names, not promises, since contents are compared, but
  // for those that the view's revision vouches for. Two rows of a call with the same names agree in
  // what both have.
  std::map<std::pair<const void*, const void*>, Table> tables_;
  std::vector<Retired> retired_;  // ascending
  size_t bytes_ = 0;              // of tables_
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_TABLES_H_
