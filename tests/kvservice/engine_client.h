// An engine with fakes around it, and calls that wait for their answers. Tokens are words
// (tests/kvservice/words.h).

#ifndef KVSERVICE_TESTS_KVSERVICE_ENGINE_CLIENT_H_
#define KVSERVICE_TESTS_KVSERVICE_ENGINE_CLIENT_H_

#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvservice/engine.h"
#include "tests/kvservice/fakes.h"
#include "tests/kvservice/words.h"

namespace kvservice::testing {

inline constexpr char kTenant[] = "tenant";
inline constexpr char kModel[] = "small";

// `layer_count` layers of 4 query heads on 2 KV heads of 64 channels, bfloat16; its default policy
// is dense.
ModelSpec SmallModel(uint32_t layer_count);
// Bytes of one block of a model.
size_t BlockBytes(const ModelSpec& model);

// What identifies a sequence in a call.
struct Handle {
  SequenceId id;
  uint64_t generation = 1;
};

// One Attend call and the memory behind it. Build rows, then run it once.
class AttendStep {
 public:
  AttendStep(const ModelSpec& model, uint32_t layer, std::string tenant = kTenant);
  AttendStep(const AttendStep&) = delete;
  AttendStep& operator=(const AttendStep&) = delete;

  // Query tokens `words` at `position`; their keys and values are stored too unless the step only
  // reads.
  AttendStep& Add(const Handle& handle, uint32_t position, const Words& words);
  AttendStep& OnlyRead();
  AttendStep& QueryType(DType dtype);

  // Makes the tensors; afterwards `call` may be changed at will.
  AttendCall* Build();
  // Builds if that was not done, runs and waits.
  absl::Status Run(Engine* engine);
  // Runs without waiting; Wait() is the answer.
  void Start(Engine* engine);
  absl::Status Wait() { return answer_.get(); }

  // Outputs of a query token, counted over all rows.
  absl::Span<const float> Out(size_t token) const;
  absl::Span<const float> Lse(size_t token) const;
  const AttendRowResult& result(size_t row) const { return call.results[row]; }

  AttendCall call;
  std::vector<std::byte> q, k, v;
  std::vector<int64_t> q_shape, k_shape, v_shape;

 private:
  const ModelSpec model_;
  Words words_;
  bool stores_ = true;
  bool built_ = false;
  DType query_type_ = DType::kFloat32;
  std::promise<absl::Status> promise_;
  std::future<absl::Status> answer_;
};

LayerShape ShapeOf(const ModelSpec& model);
// The outputs of query token `token` of a step are dense attention over words [0, position]. Of the
// reference, whose arithmetic is double, what is left is the rounding of outputs to float.
void ExpectDense(const AttendStep& step, size_t token, const ModelSpec& model, const Words& words,
                 uint32_t position, double out_tolerance = 1e-12);
// All rows were answered.
void ExpectOk(const AttendStep& step);

struct AppendStep {
  AppendStep(const ModelSpec& model, const Handle& handle, uint32_t layer, uint32_t position,
             const Words& words, std::string tenant = kTenant);
  AppendStep(const AppendStep&) = delete;
  AppendStep& operator=(const AppendStep&) = delete;
  absl::StatusOr<AppendResult> Run(Engine* engine) const;

  std::vector<std::byte> k, v;
  std::vector<int64_t> k_shape, v_shape;
  AppendCall call;
};

// The engine with its seams. The small model is registered.
class TestEngine {
 public:
  // 64 blocks of a two-layer model, a few of everything else.
  static EngineOptions SmallOptions();

  // Without a tier the engine must start; with one start_status() says how that went, and there is
  // no engine if it did not.
  explicit TestEngine(const EngineOptions& options = SmallOptions(), uint32_t layer_count = 2,
                      std::unique_ptr<Device> device = nullptr,
                      std::unique_ptr<DiskTier> tier = nullptr, uint64_t seed = 42);
  const absl::Status& start_status() const { return start_status_; }

  absl::StatusOr<SequenceInfo> Create(CreateOptions options, std::string_view tenant = kTenant);
  // A sequence of the small model that must come about.
  Handle NewSequence();
  absl::StatusOr<SequenceInfo> Fork(const Handle& handle, uint32_t length = UINT32_MAX,
                                    std::string_view tenant = kTenant);
  absl::StatusOr<SequenceInfo> Truncate(const Handle& handle, uint32_t length,
                                        std::string_view tenant = kTenant);
  absl::StatusOr<SequenceInfo> Get(const Handle& handle, std::string_view tenant = kTenant);
  absl::StatusOr<SequenceInfo> Drop(const Handle& handle, std::string_view tenant = kTenant);
  absl::StatusOr<SequenceInfo> RenewLease(const Handle& handle, uint32_t lease_ms,
                                          std::string_view tenant = kTenant);
  std::vector<SequenceInfo> List(std::string_view tenant, SequenceId after = {},
                                 uint32_t limit = 1000);
  absl::StatusOr<AppendResult> Append(const Handle& handle, uint32_t layer, uint32_t position,
                                      const Words& words, std::string tenant = kTenant);
  absl::StatusOr<AppendResult> AppendDurably(const Handle& handle, uint32_t layer,
                                             uint32_t position, const Words& words,
                                             std::string tenant = kTenant);
  absl::StatusOr<SequenceInfo> Suspend(const Handle& handle, std::string_view tenant = kTenant);
  absl::StatusOr<SequenceInfo> Resume(const Handle& handle, std::string_view tenant = kTenant);
  absl::StatusOr<TenantUsage> SetQuota(std::string_view tenant,
                                       const std::optional<TenantQuota>& quota);
  std::vector<TenantUsage> ListTenants(std::string_view only = "", std::string_view after = "",
                                       uint32_t limit = 1000);
  absl::StatusOr<AuditReport> Audit(const Handle& handle, const AuditAsk& ask,
                                    std::string_view tenant = kTenant);
  absl::StatusOr<ExplainReport> Explain(const Handle& handle, const ExplainAsk& ask,
                                        std::string_view tenant = kTenant);
  absl::StatusOr<StoreReport> VerifyStore();
  // Stores words in all layers; they must be taken.
  void Fill(const Handle& handle, uint32_t position, const Words& words);

  Engine* get() const { return engine_.get(); }
  const ModelSpec& model() const { return model_; }

  FakeClock clock;
  SeededRandom random;

 private:
  ModelSpec model_;
  absl::Status start_status_;
  std::unique_ptr<Engine> engine_;
};

// "CODE REASON field" of a status, "OK" if it is: errors in one readable line.
std::string ErrorLine(const absl::Status& status);

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_KVSERVICE_ENGINE_CLIENT_H_
