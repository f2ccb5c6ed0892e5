// Durable appends, suspend and resume through the client library and kvctl, against a server
// program with a data directory that ends and starts again.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "tests/kvservice/words.h"
#include "tests/server/program.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

using client::Client;
using client::Durability;
using client::ReasonOf;
using ::testing::HasSubstr;

constexpr char kName[] = "stored";
constexpr uint32_t kLayers = 2;
constexpr KvLayout kLayout = {
    .query_head_count = 4, .kv_head_count = 2, .head_dim = 64, .dtype = DType::kBfloat16};

class DiskTest : public ::testing::Test {
 protected:
  std::string Endpoint() const { return "unix:" + folder_.path() + "/socket"; }

  void Start(bool has_directory = true) {
    std::vector<std::string> arguments = {
        "--listen",     Endpoint(), "--admin-listen", Endpoint() + ".admin",
        "--pool-bytes", "16MiB",    "--threads",      "1"};
    if (has_directory) {
      arguments.insert(arguments.end(), {"--data-dir", folder_.path() + "/store"});
    }
    server_ = std::make_unique<Program>("kvservice", arguments);
    ASSERT_TRUE(server_->WaitForLine("ready")) << server_->errors();
    client::ClientOptions options;
    options.endpoint = Endpoint();
    auto connected = Client::Connect(options);
    ASSERT_TRUE(connected.ok()) << connected.status();
    client_ = *std::move(connected);
    client::ModelDescription model;
    model.name = kName;
    model.layer_count = kLayers;
    model.query_head_count = kLayout.query_head_count;
    model.kv_head_count = kLayout.kv_head_count;
    model.head_dim = kLayout.head_dim;
    model.scale = 0.125F;
    ASSERT_TRUE(client_->RegisterModel(model).ok());
  }

  void End(int signal) {
    client_.reset();
    server_->Signal(signal);
    EXPECT_EQ(server_->Wait(), signal == SIGTERM ? 0 : 128 + signal) << server_->errors();
  }

  client::Sequence Create() const {
    client::SequenceOptions options;
    options.model = kName;
    auto made = client_->CreateSequence(options);
    EXPECT_TRUE(made.ok()) << made.status();
    return *std::move(made);
  }

  static absl::StatusOr<client::Receipt> Append(const client::Sequence& sequence, uint32_t position,
                                                const Words& words, Durability durability) {
    client::AppendWriter writer = sequence.Append(durability);
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      const auto k = PartBytes(kLayout, kLayout.dtype, Part::kKey, layer, words);
      const auto v = PartBytes(kLayout, kLayout.dtype, Part::kValue, layer, words);
      client::TensorView view = {.dtype = client::DType::kBfloat16,
                                 .token_count = static_cast<uint32_t>(words.size()),
                                 .head_count = kLayout.kv_head_count,
                                 .head_dim = kLayout.head_dim,
                                 .bytes = k};
      const client::TensorView keys = view;
      view.bytes = v;
      const absl::Status written = writer.Write(layer, position, keys, view);
      if (!written.ok()) return written;
    }
    return writer.Commit();
  }

  static void ExpectWords(const client::Sequence& sequence, const Words& words) {
    const auto again = Append(sequence, 0, words, Durability::kMemory);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(again->duplicate_count, again->message_count);
    EXPECT_EQ(again->length_max_tokens, words.size());
  }

  // What kvctl prints, and its exit status.
  std::string Kvctl(const std::string& arguments, int exit = 0) const {
    const std::string line =
        absl::StrCat("'", std::getenv("KVSERVICE_BIN_DIR"), "/kvctl' --endpoint '", Endpoint(),
                     "' ", arguments, " </dev/null 2>&1");
    FILE* const pipe = popen(line.c_str(), "r");
    std::string out;
    char buffer[4096];
    for (size_t count = 0; (count = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) {
      out.append(buffer, count);
    }
    const int status = pclose(pipe);
    EXPECT_EQ(WEXITSTATUS(status), exit) << out;
    return out;
  }

  TemporaryFolder folder_;
  std::unique_ptr<Program> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(DiskTest, ADrainKeepsEverythingAndHandlesStayGood) {
  Start();
  client::Sequence sequence = Create();
  const auto stored = Append(sequence, 0, Counting(0, 150), Durability::kMemory);
  ASSERT_TRUE(stored.ok()) << stored.status();
  EXPECT_EQ(stored->durable_tokens, 0);
  const uint64_t generation = sequence.generation();
  const std::string id = sequence.Detach();
  End(SIGTERM);
  Start();
  client::Sequence adopted = client_->Adopt(id, generation);
  const auto info = adopted.Describe();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_TRUE(info->is_on_disk);
  EXPECT_EQ(info->durable_tokens, 150);
  ExpectWords(adopted, Counting(0, 150));
  EXPECT_TRUE(adopted.Close().ok());
  End(SIGTERM);
}

TEST_F(DiskTest, WhatWasDurableSurvivesAKill) {
  Start();
  client::Sequence sequence = Create();
  const auto stored = Append(sequence, 0, Counting(0, 150), Durability::kDurable);
  ASSERT_TRUE(stored.ok()) << stored.status();
  EXPECT_EQ(stored->durable_tokens, 150);
  ASSERT_TRUE(Append(sequence, 150, Counting(150, 20), Durability::kMemory).ok());
  const uint64_t generation = sequence.generation();
  const std::string id = sequence.Detach();
  End(SIGKILL);
  Start();
  client::Sequence adopted = client_->Adopt(id, generation);
  EXPECT_EQ(ReasonOf(Append(adopted, 170, {1}, Durability::kMemory).status()),
            "GENERATION_MISMATCH");
  const auto info = adopted.Refresh();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->length_max_tokens, 150);
  EXPECT_NE(adopted.generation(), generation);
  ExpectWords(adopted, Counting(0, 150));
  ASSERT_TRUE(Append(adopted, 150, Counting(9000, 20), Durability::kDurable).ok());
  adopted.Detach();
  End(SIGTERM);
}

TEST_F(DiskTest, SuspendAndResume) {
  Start();
  client::Sequence sequence = Create();
  ASSERT_TRUE(Append(sequence, 0, Counting(0, 150), Durability::kMemory).ok());
  ASSERT_TRUE(sequence.Suspend().ok());
  ASSERT_TRUE(sequence.Suspend().ok());
  EXPECT_EQ(ReasonOf(Append(sequence, 150, {1}, Durability::kMemory).status()),
            "SEQUENCE_SUSPENDED");
  EXPECT_TRUE(sequence.Describe()->is_suspended);
  const std::string id = absl::BytesToHexString(sequence.id());
  EXPECT_THAT(Kvctl("sequence list"), HasSubstr("suspended"));
  EXPECT_THAT(Kvctl("server stats"), HasSubstr("\nsequences on disk            1\n"));
  const uint64_t generation = sequence.generation();
  ASSERT_TRUE(sequence.Resume().ok());
  EXPECT_EQ(sequence.generation(), generation + 1);
  ExpectWords(sequence, Counting(0, 150));
  EXPECT_EQ(ReasonOf(sequence.Resume()), "SEQUENCE_NOT_SUSPENDED");
  EXPECT_THAT(Kvctl("sequence suspend " + id), HasSubstr("suspended"));
  EXPECT_THAT(Kvctl("sequence resume " + id), HasSubstr("memory"));
  EXPECT_THAT(Kvctl("sequence resume " + id, 1), HasSubstr("SEQUENCE_NOT_SUSPENDED"));
  ASSERT_TRUE(sequence.Refresh().ok());
  ExpectWords(sequence, Counting(0, 150));
  EXPECT_TRUE(sequence.Close().ok());
  End(SIGTERM);
}

TEST_F(DiskTest, WithoutADirectoryThereIsNoDisk) {
  Start(false);
  client::Sequence sequence = Create();
  const absl::Status refused = Append(sequence, 0, Counting(0, 1), Durability::kDurable).status();
  EXPECT_EQ(ReasonOf(refused), "NO_DISK_TIER");
  EXPECT_EQ(client::FieldOf(refused), "durability");
  EXPECT_EQ(ReasonOf(sequence.Suspend()), "NO_DISK_TIER");
  EXPECT_EQ(ReasonOf(sequence.Resume()), "NO_DISK_TIER");
  EXPECT_TRUE(sequence.Close().ok());
  End(SIGTERM);
}

TEST_F(DiskTest, OneServerPerDirectory) {
  Start();
  Program second("kvservice", {"--listen", Endpoint() + "2", "--admin-listen", "none",
                               "--pool-bytes", "16MiB", "--data-dir", folder_.path() + "/store"});
  EXPECT_EQ(second.Wait(), 1);
  EXPECT_THAT(second.errors(), HasSubstr("the data directory is in use"));
  End(SIGTERM);
}

}  // namespace
}  // namespace kvservice::testing
