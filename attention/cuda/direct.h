// Decides what the device can decide alone: groups whose plans need no round trip between scan,
// choice, attention and certificate. Each is answered in one wave (wave.h); the certificate follows
// from the few sums that come back, by the same functions as elsewhere (attention/head_proof.h).
// What is not proven that way although its plan says to go on (sample, grow, read everything, fail)
// is left to the host's decisions, from the start.
//
// One thread; a pool helps where groups are independent.

#ifndef KVSERVICE_ATTENTION_CUDA_DIRECT_H_
#define KVSERVICE_ATTENTION_CUDA_DIRECT_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "attention/cpu/thread_pool.h"
#include "attention/cuda/readings.h"
#include "attention/cuda/wave.h"
#include "attention/device.h"
#include "attention/host_lists.h"

namespace kvservice::cuda {

// One KV head of one row of a call.
struct GroupName {
  uint32_t row = 0;
  uint32_t kv_head = 0;
};

// Memory of a thread that answers groups.
struct AnswerScratch {
  Partial kept, part;
  std::vector<HeadCertificate> certificates;
};

class Direct {
 public:
  Direct(const Context& context, ThreadPool* pool)
      : stream_(context.stream), pool_(pool), flights_{Flight(context), Flight(context)} {}

  // True if groups of the row may be answered here.
  static bool Takes(const LayerShape& shape, const AttendRow& row);

  // Sends all groups of the rows that are taken on their way. tables: [rows.size()]; unrotated:
  // likewise, the newest query token's queries before rotation, of rows that reuse lists. All is
  // borrowed until Finish. Adds to `left` the groups that are not answered. `append`: see
  // Wave::Fly.
  void Begin(const LayerShape& shape, absl::Span<AttendRow> rows,
             absl::Span<const RowTables> tables,
             absl::Span<const absl::Span<const float>> unrotated, absl::FunctionRef<bool()> append,
             std::vector<GroupName>* left);
  // True when Finish would not wait for what Begin has sent.
  bool IsDone() const;
  // Answers them. Adds to `left` as Begin does.
  void Finish(std::vector<GroupName>* left);

  // Groups that were answered here so far, for tests: a path that is never taken tests nothing.
  uint64_t answered() const { return answered_; }

 private:
  // What may go through the device together: groups that are settled, groups that choose, groups
  // that choose and prove.
  enum class Kind : uint8_t { kLeft, kSettled, kChoosing, kProving };
  struct Asked {
    GroupName name;
    Kind kind = Kind::kLeft;
    WaveGroup group;
    ReusableAnchor anchor;
  };
  void Ask(const LayerShape& shape, absl::Span<AttendRow> rows, absl::Span<const RowTables> tables,
           absl::Span<const absl::Span<const float>> unrotated, Asked* asked) const;
  // A wave on its way and what it was made of.
  struct Flight {
    explicit Flight(const Context& context) : wave(std::make_unique<Wave>(context)) {}
    std::unique_ptr<Wave> wave;
    std::vector<Asked*> asked;
  };
  void CutWaves(Kind kind, std::vector<std::vector<Asked*>>* waves);
  void Send(std::vector<Asked*> asked, absl::FunctionRef<bool()> append, Flight* flight);
  void Answer(Flight* flight, std::vector<GroupName>* left);
  bool MayTryAgain(const Flight& flight, size_t index) const;
  void SendAll(absl::FunctionRef<bool()> append, std::vector<GroupName>* left);
  void AnswerAll(std::vector<GroupName>* left);

  const cudaStream_t stream_;
  ThreadPool* const pool_;
  // Of the call.
  const LayerShape* shape_ = nullptr;
  absl::Span<AttendRow> rows_;
  std::vector<uint32_t> covered_ends_;  // [row], of rows that reuse lists
  std::vector<uint32_t> taken_;         // rows
  std::vector<Asked> all_;
  std::vector<Asked> again_;
  // Of several, one works on the device while the host builds or answers the other.
  std::array<Flight, 2> flights_;
  size_t next_flight_ = 0;
  std::vector<AnswerScratch> scratch_;  // [thread of the pool]
  uint64_t answered_ = 0;
};

}  // namespace kvservice::cuda

#endif  // KVSERVICE_ATTENTION_CUDA_DIRECT_H_
