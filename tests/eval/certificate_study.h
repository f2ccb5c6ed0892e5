// How tight certificates are on traces of real attention, and what they cost: every judged query of
// a trace is answered by a device under several plans, every certificate is compared with long
// double truth.

#ifndef KVSERVICE_TESTS_EVAL_CERTIFICATE_STUDY_H_
#define KVSERVICE_TESTS_EVAL_CERTIFICATE_STUDY_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/eval/trace.h"

namespace kvservice::eval {

// Share of the tokens that is kept while tightness is measured.
inline constexpr double kTightnessShare = 0.05;
inline constexpr uint32_t kTightnessDraws = 128;
inline constexpr double kTightnessEta = 1e-6;
// Heads that drop less than this share are left out: any bound of it serves.
inline constexpr double kTightnessLeastShare = 1e-6;
// Limits whose cost is measured.
inline constexpr double kMassLimits[] = {0.1, 0.05, 0.02, 0.01};
inline constexpr double kOutputLimits[] = {0.05, 0.02};
// Groups that cost at most this share of their dense bytes are counted.
inline constexpr double kCheapShare = 0.25;

struct StudyOptions {
  std::string device = "cpu";
  // Layers that are worked on at the same time.
  uint32_t thread_count = 1;
  // Judged queries per trace, spread evenly over those it has; 0 = all.
  uint32_t query_count = 0;
  bool tightness = true;
  bool costs = true;
};

// What one trace gave. Keys of `series`, each with one number per KV head or query head, query and
// layer:
//   slack|TABLES|PROOF|HEADS|WHAT
//                               nats by which the bound exceeds the truth; TABLES identity, learnt;
//                               PROOF deterministic, sampled; HEADS as below; WHAT mass (Z_D),
//                               share (of all)
//   bytes|LIMIT|HEADS           fraction of the dense bytes; LIMIT mass 0.05, output 0.02, ...;
//                               HEADS group (one selection for all query heads of a KV head) or
//                               alone (one for each)
//   read|LIMIT|HEADS            the part of it that is rows read for the output
//   samples|LIMIT|HEADS         the part of it that is sampled keys and rows
//   oracle|LIMIT|HEADS          the same for the smallest set that meets a limit on mass, known for
//                               free
//   met|LIMIT|HEADS, dense|LIMIT|HEADS, sampled|LIMIT|HEADS      1 or 0 per query head or KV head
struct TraceResult {
  TraceHeader header;
  std::string tables_from;
  uint32_t query_count = 0;
  uint64_t certificates = 0;
  uint64_t sampled_certificates = 0;
  uint64_t wrong = 0;          // statements that are not true, of certificates that hold always
  uint64_t wrong_sampled = 0;  // of certificates that hold with a stated probability
  std::map<std::string, std::vector<double>> series;
};

// Tables come from the sampled queries of `other`, a trace of the same model and shape.
absl::StatusOr<TraceResult> StudyTrace(const StudyOptions& options, const TraceHeader& trace,
                                       const TraceHeader& other);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_CERTIFICATE_STUDY_H_
