#include "attention/reference/device.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "attention/float16.h"
#include "attention/host_lists.h"
#include "attention/reference/choose.h"
#include "attention/reference/head_row.h"
#include "attention/reference/log_sum.h"
#include "attention/reference/prove.h"
#include "attention/sketch.h"

namespace kvservice {
namespace {

using reference::Choice;
using reference::GroupProof;
using reference::HeadRow;
using reference::Place;
using reference::RememberDense;

constexpr size_t kPageBytes = 4096;

void ReleaseMemory(std::byte* data, size_t /*bytes*/) { std::free(data); }

// Everything that some query token of the row sees.
std::vector<uint32_t> AllTokens(const HeadRow& row) {
  std::vector<uint32_t> tokens(row.end() - row.begin());
  std::iota(tokens.begin(), tokens.end(), row.begin());
  return tokens;
}

std::vector<uint32_t> TokensToRead(const Choice& choice, const HeadRow& row) {
  const std::vector<uint32_t> always = row.TokensAt(Place::kAlways);
  std::vector<uint32_t> tokens;
  std::set_union(always.begin(), always.end(), choice.middle.begin(), choice.middle.end(),
                 std::back_inserter(tokens));
  return tokens;
}

Action ActionOf(const Choice& choice, const Plan& plan, bool reads_all) {
  if (plan.mode == Mode::kShadow) return Action::kDense;
  if (choice.everything && reads_all) return Action::kDense;
  return choice.reused ? Action::kReused : Action::kSelected;
}

// Certificates of all heads.
void WriteCertificates(const GroupProof& proof, Action action, const HeadRow& head_row,
                       const AttendRow& row) {
  for (uint32_t head = 0; head < head_row.head_count(); ++head) {
    HeadCertificate& certificate = row.certificates[head_row.OutputIndex(head)];
    certificate = proof.head(head).certificate();
    if (certificate.action != Action::kCompensated) certificate.action = action;
  }
}

// Outputs over what was last proven, compensated where that was done and is wanted.
void WriteOutputs(const GroupProof& proof, bool compensate, const LayerShape& shape,
                  const HeadRow& head_row, const AttendRow& row) {
  for (uint32_t head = 0; head < head_row.head_count(); ++head) {
    const size_t index = head_row.OutputIndex(head);
    float* out = row.out + index * shape.layout.head_dim;
    const std::vector<float>& output = proof.output(head);
    double lse = proof.log_kept(head);
    const absl::Span<const double> correction = proof.head(head).correction();
    const bool compensates = compensate && !correction.empty();
    if (compensates) {
      row.groups[head_row.kv_head()].action = Action::kCompensated;
      lse = reference::LogSum({lse, proof.head(head).log_compensated()});
    }
    // Outputs may lie where others write too: nothing is read back.
    for (size_t c = 0; c < output.size(); ++c) {
      out[c] = compensates ? static_cast<float>(static_cast<double>(output[c]) + correction[c])
                           : output[c];
    }
    row.lse[index] = static_cast<float>(lse);
  }
}

// Reads more, round by round, until the limits hold or reading everything is the better answer.
bool GrowUntilMet(GroupProof* proof, std::vector<uint32_t>* read) {
  for (uint32_t round = 0; round < FailureBudget::kRoundsMax; ++round) {
    std::vector<uint32_t> grown = proof->Grow(*read);
    if (grown.empty()) return false;
    *read = std::move(grown);
    if (proof->Prove(*read)) return true;
  }
  return false;
}

// Executes the plan for one KV head: choose, prove, act on a violation, answer. False if the row
// fails.
bool AttendHead(const LayerShape& shape, uint32_t kv_head, absl::Span<const float> queries,
                AttendRow* row) {
  const Plan& plan = row->plan;
  HeadRow head_row(shape, *row, kv_head);
  const std::vector<uint32_t> all = AllTokens(head_row);
  const Choice choice = reference::Choose(plan, queries, &head_row);
  std::vector<uint32_t> read = TokensToRead(choice, head_row);
  GroupReport& report = row->groups[kv_head];
  report.action = ActionOf(choice, plan, read.size() == all.size());
  GroupProof proof(shape, *row, &head_row);
  bool met = proof.Prove(read);

  const bool proves =
      plan.prove == Guarantee::kConfidence || plan.prove == Guarantee::kDeterministic;
  if (!met && plan.mode == Mode::kEnforce && plan.on_violation != OnViolation::kReport) {
    if (plan.on_violation == OnViolation::kGrow && proves) {
      met = GrowUntilMet(&proof, &read);
      if (met) report.action = Action::kGrown;
    }
    WriteCertificates(proof, report.action, head_row, *row);
    if (plan.on_violation == OnViolation::kFail) return false;
    if (!met) {
      RememberDense(plan, head_row);
      read = all;
      report.action = Action::kDense;
      proof.Prove(read);
    }
  }
  WriteCertificates(proof, report.action, head_row, *row);
  report.keys_sampled = report.rows_sampled = 0;
  for (uint32_t head = 0; head < head_row.head_count(); ++head) {
    report.keys_sampled += proof.head(head).certificate().keys_sampled;
    report.rows_sampled += proof.head(head).certificate().rows_sampled;
  }
  if (row->selected != nullptr) row->selected[kv_head] = read;
  const bool shadow = plan.mode == Mode::kShadow;
  if (shadow) {
    read = all;
    proof.Prove(read);
  }
  WriteOutputs(proof, !shadow, shape, head_row, *row);
  report.scanned = choice.scanned;
  report.tokens_read = static_cast<uint32_t>(read.size());
  report.tokens_scanned = head_row.scanned_count();
  report.similarity = choice.similarity;
  report.sharing_estimate = choice.sharing_estimate;
  report.key_norm_max = choice.key_norm_max;
  report.query_distance = choice.query_distance;
  return true;
}

void AttendOne(const LayerShape& shape, AttendRow* row) {
  const KvLayout& layout = shape.layout;
  assert(row->query_count >= 1 && row->query_count <= kQueryTokensMax);
  row->status = absl::OkStatus();
  const size_t token_floats = static_cast<size_t>(layout.query_head_count) * layout.head_dim;
  // An anchor is found by, and made for, the newest query.
  std::vector<float> queries(token_floats);
  UnrotateQueries(shape, row->view.length - 1, row->q + (row->query_count - 1) * token_floats,
                  queries.data());
  const size_t head_floats = static_cast<size_t>(layout.group_size()) * layout.head_dim;
  for (uint32_t kv_head = 0; kv_head < layout.kv_head_count; ++kv_head) {
    const absl::Span<const float> head_queries(&queries[kv_head * head_floats], head_floats);
    if (AttendHead(shape, kv_head, head_queries, row)) continue;
    row->status = absl::FailedPreconditionError(
        absl::StrCat("BOUND_NOT_MET: KV head ", kv_head, " cannot prove its limits"));
  }
  if (row->status.ok()) return;
  std::fill_n(row->out, row->query_count * token_floats, 0.0F);
  std::fill_n(row->lse, size_t{row->query_count} * layout.query_head_count, 0.0F);
}

class ReferenceDevice : public Device {
 public:
  std::string_view name() const override { return "reference"; }

  absl::StatusOr<DeviceMemory> Allocate(size_t bytes) override {
    const size_t rounded = std::max<size_t>(1, (bytes + kPageBytes - 1) / kPageBytes) * kPageBytes;
    auto* data = rounded < bytes ? nullptr
                                 : static_cast<std::byte*>(std::aligned_alloc(kPageBytes, rounded));
    if (data == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("cannot allocate ", bytes, " bytes"));
    }
    std::memset(data, 0, rounded);
    return DeviceMemory(data, bytes, ReleaseMemory);
  }

  std::unique_ptr<TokenLists> NewTokenLists(const KvLayout& layout, uint32_t anchors_max) override {
    return std::make_unique<HostLists>(layout, anchors_max);
  }

  void Copy(absl::Span<const MemoryCopy> copies) override {
    for (const MemoryCopy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  void Append(const KvLayout& layout, absl::Span<const AppendSlice> slices) override {
    const size_t vector_bytes = layout.vector_bytes();
    for (const AppendSlice& append : slices) {
      assert(append.first + append.token_count <= kBlockTokens);
      for (uint32_t token = 0; token < append.token_count; ++token) {
        for (uint32_t head = 0; head < layout.kv_head_count; ++head) {
          const size_t from = (size_t{token} * layout.kv_head_count + head) * vector_bytes;
          std::byte* row = append.slice + layout.RowOffset(head, append.first + token);
          std::memcpy(row, append.k + from, vector_bytes);
          std::memcpy(row + vector_bytes, append.v + from, vector_bytes);
        }
      }
    }
  }

  void Seal(const KvLayout& layout, absl::Span<const SealSlice> slices) override {
    const SketchLayout sketch(layout.head_dim);
    for (const SealSlice& seal : slices) {
      for (uint32_t head = 0; head < layout.kv_head_count; ++head) {
        EncodeSketchPage(layout, seal.slice + layout.RowOffset(head, 0), seal.block_index,
                         seal.tables[head], seal.sketch + head * sketch.page_bytes);
      }
    }
  }

  void Attend(const LayerShape& shape, absl::Span<AttendRow> rows) override {
    for (AttendRow& row : rows) AttendOne(shape, &row);
  }
};

}  // namespace

std::unique_ptr<Device> NewReferenceDevice(const DeviceOptions& /*options*/) {
  return std::make_unique<ReferenceDevice>();
}

}  // namespace kvservice
