// A server in this process whose engine can be held, and clients of it.

#ifndef KVSERVICE_TESTS_CLIENT_LANE_CASE_H_
#define KVSERVICE_TESTS_CLIENT_LANE_CASE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "client/client.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {

class LaneCase : public ::testing::Test {
 protected:
  LaneCase() { Serve(); }

  // The server anew, with room for so many lanes.
  void Serve(uint32_t lanes_max = 2) {
    served_.reset();
    ServedEngineOptions options;
    options.device = brake_.On(*NewDevice("reference", {}));
    options.server.lanes_max = lanes_max;
    served_ = std::make_unique<ServedEngine>(std::move(options));
  }

  client::ClientOptions Options() const {
    client::ClientOptions options;
    options.endpoint = "unix:" + served_->folder() + "/data";
    options.deadlines.data = std::chrono::seconds(30);
    return options;
  }
  static std::unique_ptr<client::Client> Connect(const client::ClientOptions& options) {
    absl::StatusOr<std::unique_ptr<client::Client>> connected = client::Client::Connect(options);
    EXPECT_TRUE(connected.ok()) << connected.status();
    return *std::move(connected);
  }

  // A sequence of the words 0, 1, ... in layer 0.
  client::Sequence Create(client::Client* from, uint32_t count) const {
    absl::StatusOr<client::Sequence> sequence = from->CreateSequence({.model = kModel});
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    const Words words = Counting(0, count);
    const std::vector<std::byte> k = PartBytes(layout(), layout().dtype, Part::kKey, 0, words);
    const std::vector<std::byte> v = PartBytes(layout(), layout().dtype, Part::kValue, 0, words);
    client::AppendWriter writer = sequence->Append();
    EXPECT_TRUE(writer.Write(0, 0, View(k, count), View(v, count)).ok());
    EXPECT_TRUE(writer.Commit().ok());
    return *std::move(sequence);
  }

  const KvLayout& layout() const { return served_->model().layout; }
  client::TensorView View(const std::vector<std::byte>& bytes, uint32_t count) const {
    return {.dtype = client::DType::kBfloat16,
            .token_count = count,
            .head_count = layout().kv_head_count,
            .head_dim = layout().head_dim,
            .bytes = bytes};
  }

  client::StepShape Shape(uint32_t token_count = 1) const {
    return {.token_count = token_count,
            .query_head_count = layout().query_head_count,
            .kv_head_count = layout().kv_head_count,
            .head_dim = layout().head_dim};
  }
  // The tensors of layer 0's words from `first` on, as many as the buffers have room for.
  void Fill(uint32_t first, client::StepBuffers* buffers) const {
    const Words words = Counting(first, buffers->shape().token_count);
    const auto put = [&](Part part, DType dtype, absl::Span<std::byte> to) {
      const std::vector<std::byte> bytes = PartBytes(layout(), dtype, part, 0, words);
      ASSERT_EQ(bytes.size(), to.size());
      std::copy(bytes.begin(), bytes.end(), to.begin());
    };
    put(Part::kQuery, DType::kFloat32, buffers->q());
    put(Part::kKey, layout().dtype, buffers->k());
    put(Part::kValue, layout().dtype, buffers->v());
  }
  // What comes of the word at `position` in a sequence of Create.
  DenseAnswer Dense(uint32_t position) const {
    return AttendDensely(
        {.layout = layout(), .scale = served_->model().scale, .inverse_frequencies = {}}, 0,
        Counting(0, position + 1), position);
  }

  Brake brake_;
  std::unique_ptr<ServedEngine> served_;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_CLIENT_LANE_CASE_H_
