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
  ~TableCache() { Clear(); }
  TableCache(const TableCache&) = delete;
  TableCache& operator=(const TableCache&) = delete;

  // Starts a call: tables of earlier calls may go. The device must have finished with them.
  void Begin();
  // The tables of a view, good until the next Begin. Copies are enqueued on the stream.
  RowTables Get(const KvView& view);

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
  // Copies what is new from entry `first` on.
  void Copy(absl::Span<const std::byte* const> from, size_t first,
            std::vector<const std::byte*>* known, const std::byte** to);
  void Clear();
  void FreeOutgrown();

  const cudaStream_t stream_;
  Arena staging_{Arena::Sides::kBoth};
  // By the addresses of the view's arrays: names, not promises, since contents are compared, but
  // for those that the view's revision vouches for. Two rows of a call with the same names agree in
  // what both have.
  std::map<std::pair<const void*, const void*>, Table> tables_;
  std::vector<const std::byte**> outgrown_;  // that rows of this call may still use
  size_t bytes_ = 0;
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_TABLES_H_
