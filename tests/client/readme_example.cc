// The example of the README, compiled and run.

#include <gtest/gtest.h>

#include <cstdio>

#include "tests/server/served_engine.h"

// README: begin
#include "client/client.h"

using namespace kvservice::client;

int AttendOnce(const std::string& endpoint, const ModelDescription& model,
               absl::Span<const uint16_t> k, absl::Span<const uint16_t> v,  // [8][2][64] bfloat16
               absl::Span<const float> q) {                                 // [1][4][64]
  auto client = Client::Connect({.endpoint = endpoint});
  if (!client.ok() || !(*client)->RegisterModel(model).ok()) return 1;
  auto sequence = (*client)->CreateSequence({.model = model.name});
  if (!sequence.ok()) return 1;
  AppendWriter prefill = sequence->Append();  // 8 tokens of layer 0
  if (!prefill.Write(0, 0, Bfloat16View(k, 8, 2, 64), Bfloat16View(v, 8, 2, 64)).ok()) return 1;
  if (!prefill.Commit().ok()) return 1;
  AttendQuery query = {.layer = 0, .position = 7, .q = Float32View(q, 1, 4, 64)};
  query.policy = Policy{.selector = Selector::kCertified, .max_dropped_mass = 0.01F};
  auto row = sequence->Attend(query);
  if (!row.ok()) return 1;  // ReasonOf(row.status()) tells why.
  std::printf("head 0 dropped at most %g of its attention\n",
              row->certificates[0].dropped_mass_upper.value);
  return 0;
}
// README: end

namespace kvservice::testing {
namespace {

TEST(ReadmeExampleTest, Runs) {
  ServedEngine served;
  client::ModelDescription model = {.name = "readme",
                                    .layer_count = 1,
                                    .query_head_count = 4,
                                    .kv_head_count = 2,
                                    .head_dim = 64,
                                    .scale = 0.125F};
  const std::vector<uint16_t> tokens(size_t{8} * 2 * 64, 0x3f80);
  const std::vector<float> q(size_t{4} * 64, 1.0F);
  EXPECT_EQ(AttendOnce("unix:" + served.folder() + "/data", model, tokens, tokens, q), 0);
}

}  // namespace
}  // namespace kvservice::testing
