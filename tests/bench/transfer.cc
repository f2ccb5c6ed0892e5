// A sequence from one server process to another (Sequence::Transfer), as bytes of keys and values
// per second, against what one CPU copies in memory and what a raw Unix socket carries between two
// threads in the same run (the ratio is the share of the copies). They take turns.
//
// "open" has 63 tokens in each of many layers, so that no slice is full and nothing is sealed:
// what reading, sending, checking and storing costs. "sealed" has a long prompt, of which the
// target makes all sketches itself. Making the sequence and forgetting it at the target is not
// timed.
//
// Checks: the number of bytes sent, and after the last round that both servers answer a dense step
// alike, to the bit.

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "tests/bench/server_process.h"
#include "tests/bench/workloads.h"

namespace kvservice::bench {
namespace {

constexpr char kWorkload[] = "transfer";
constexpr uint32_t kKvHeads = 8;
constexpr uint32_t kQueryHeads = 32;
constexpr uint32_t kHeadDim = 128;
constexpr size_t kTokenBytes = size_t{2} * kKvHeads * kHeadDim * sizeof(uint16_t);
// What the server writes at a time.
constexpr size_t kWriteBytes = size_t{1} << 20;
// A server's pool is touched for the first time in these.
constexpr int kWarmUpRounds = 2;

struct Case {
  const char* name;
  uint32_t layer_count;
  uint32_t token_count;
  size_t bytes() const { return layer_count * token_count * kTokenBytes; }
};

absl::StatusOr<std::unique_ptr<client::Client>> Connect(const std::string& endpoint,
                                                        const Case& bench_case) {
  client::ClientOptions options;
  options.endpoint = endpoint;
  options.deadlines.data = std::chrono::seconds(60);
  options.deadlines.admin = std::chrono::seconds(60);
  auto client = client::Client::Connect(options);
  if (!client.ok()) return client.status();
  client::ModelDescription model;
  model.name = bench_case.name;
  model.layer_count = bench_case.layer_count;
  model.query_head_count = kQueryHeads;
  model.kv_head_count = kKvHeads;
  model.head_dim = kHeadDim;
  model.scale = 0.1F;
  const auto registered = (*client)->RegisterModel(model);
  if (!registered.ok()) return registered.status();
  return *std::move(client);
}

absl::Status Fill(const Case& bench_case, const client::Sequence& sequence) {
  client::AppendWriter writer = sequence.Append();
  const uint32_t count = bench_case.token_count;
  std::vector<uint16_t> k(count * kTokenBytes / 4), v(k.size());
  for (uint32_t layer = 0; layer < bench_case.layer_count; ++layer) {
    // Finite bfloat16 around 1.
    for (size_t i = 0; i < k.size(); ++i) {
      k[i] = static_cast<uint16_t>(0x3f00 + (i * 7 + layer) % 251);
      v[i] = static_cast<uint16_t>(0x3f00 + (i * 11 + layer) % 241);
    }
    const absl::Status written =
        writer.Write(layer, 0, client::Bfloat16View(k, count, kKvHeads, kHeadDim),
                     client::Bfloat16View(v, count, kKvHeads, kHeadDim));
    if (!written.ok()) return written;
  }
  return writer.Commit().status();
}

absl::StatusOr<std::vector<float>> Answer(const Case& bench_case,
                                          const client::Sequence& sequence) {
  std::vector<float> q(size_t{kQueryHeads} * kHeadDim);
  for (size_t i = 0; i < q.size(); ++i) q[i] = 0.01F * static_cast<float>(i % 17);
  client::AttendQuery query;
  query.layer = bench_case.layer_count - 1;
  query.position = bench_case.token_count - 1;
  query.q = client::Float32View(q, 1, kQueryHeads, kHeadDim);
  query.policy.emplace();
  query.policy->selector = client::Selector::kDense;
  auto row = sequence.Attend(query);
  if (!row.ok()) return row.status();
  return row->out;
}

// From one thread to another, both with memory as large as the case.
double SocketSeconds(const std::vector<std::byte>& from, std::vector<std::byte>* to) {
  std::array<int, 2> ends = {-1, -1};
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) return 0.0;
  const double seconds = Seconds([&] {
    std::thread reader([&] {
      for (size_t got = 0; got < to->size();) {
        const ssize_t count = read(ends[1], to->data() + got, to->size() - got);
        if (count <= 0) return;
        got += static_cast<size_t>(count);
      }
    });
    for (size_t sent = 0; sent < from.size();) {
      const ssize_t count =
          write(ends[0], from.data() + sent, std::min(kWriteBytes, from.size() - sent));
      if (count <= 0) break;
      sent += static_cast<size_t>(count);
    }
    reader.join();
  });
  close(ends[0]);
  close(ends[1]);
  return seconds;
}

absl::Status RunCase(const BenchOptions& options, const Case& bench_case, std::vector<Row>* rows) {
  const std::vector<std::string> flags = {"--device=cpu", "--threads=1", "--pool-bytes=512MiB"};
  auto target = ServerProcess::Start(flags);
  if (!target.ok()) return target.status();
  std::vector<std::string> source_flags = flags;
  source_flags.push_back("--transfer-targets=" + (*target)->endpoint());
  auto source = ServerProcess::Start(source_flags);
  if (!source.ok()) return source.status();
  const auto here = Connect((*source)->endpoint(), bench_case);
  const auto there = Connect((*target)->endpoint(), bench_case);
  if (!here.ok()) return here.status();
  if (!there.ok()) return there.status();
  const auto sequence = (*here)->CreateSequence({.model = bench_case.name});
  if (!sequence.ok()) return sequence.status();
  absl::Status status = Fill(bench_case, *sequence);
  if (!status.ok()) return status;

  std::vector<std::byte> from(bench_case.bytes(), std::byte{1});
  std::vector<std::byte> to(bench_case.bytes(), std::byte{2});
  std::vector<double> copies, sockets, transfers;
  const int round_count = options.quick ? 1 : 9;
  for (int round = -kWarmUpRounds; round < round_count; ++round) {
    copies.push_back(Seconds([&] { std::memcpy(to.data(), from.data(), from.size()); }));
    sockets.push_back(SocketSeconds(from, &to));
    absl::StatusOr<client::Transferred> sent;
    transfers.push_back(Seconds([&] { sent = sequence->Transfer((*target)->endpoint()); }));
    if (!sent.ok()) return sent.status();
    if (sent->sent_bytes != bench_case.bytes()) return absl::InternalError("bytes are missing");
    client::Sequence arrived = (*there)->Adopt(sent->id, sent->generation);
    if (round == round_count - 1) {
      const auto a = Answer(bench_case, *sequence);
      const auto b = Answer(bench_case, arrived);
      if (!a.ok()) return a.status();
      if (!b.ok()) return b.status();
      if (*a != *b) return absl::InternalError("the servers answer differently");
    }
    status = arrived.Close();
    if (!status.ok()) return status;
    if (round >= 0) continue;
    for (std::vector<double>* times : {&copies, &sockets, &transfers}) times->clear();
  }
  const double copy_seconds = Median(&copies);
  for (const auto& [name, times] : {std::pair("memcpy", &copies), std::pair("socket", &sockets),
                                    std::pair("transfer", &transfers)}) {
    const double seconds = Median(times);
    rows->push_back({.workload = kWorkload,
                     .case_name = absl::StrCat(bench_case.name, "_", name),
                     .value = static_cast<double>(bench_case.bytes()) / seconds * 1e-6,
                     .unit = "MB/s",
                     .baseline = "copy_bandwidth",
                     .ratio = copy_seconds / seconds});
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RunTransfer(const BenchOptions& options, std::vector<Row>* rows) {
  const Case open = {.name = "open", .layer_count = 128, .token_count = options.quick ? 5U : 63U};
  const Case sealed = {
      .name = "sealed", .layer_count = 8, .token_count = options.quick ? 130U : 4096U};
  const absl::Status status = RunCase(options, open, rows);
  return status.ok() ? RunCase(options, sealed, rows) : status;
}

}  // namespace kvservice::bench
