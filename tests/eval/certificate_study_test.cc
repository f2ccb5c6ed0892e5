// The study end to end on a trace made here: files are read back or refused by field, tables come
// from the other text, every certificate is judged, and a wrong statement is counted.

#include "tests/eval/certificate_study.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "attention/float16.h"
#include "tests/eval/report.h"
#include "tests/eval/trace.h"
#include "tests/eval/truth.h"

namespace kvservice::eval {
namespace {

constexpr uint32_t kLayers = 2;
constexpr uint32_t kQueryHeads = 4;
constexpr uint32_t kKvHeads = 2;
constexpr uint32_t kHeadDim = 64;
constexpr uint32_t kTokens = 2 * kBlockTokens * 8 + 17;
constexpr uint32_t kJudged = 3;
constexpr uint32_t kSampled = 40;
// Offsets within the file.
constexpr size_t kTokensOffset = 24;
constexpr size_t kScaleOffset = 36;
constexpr size_t kJudgedOffset = 40 + sizeof(uint32_t) * kLayers;

template <typename Number>
void Write(std::ofstream* file, const Number* numbers, size_t count) {
  file->write(reinterpret_cast<const char*>(numbers),
              static_cast<std::streamsize>(count * sizeof(Number)));
}

class TraceFiles : public ::testing::Test {
 protected:
  TraceFiles() : folder_(std::filesystem::path(::testing::TempDir()) / "kveval") {
    std::filesystem::create_directories(folder_);
  }
  ~TraceFiles() override { std::filesystem::remove_all(folder_); }

  std::string Path(const std::string& name) const { return folder_ / (name + ".kvtrace"); }

  // Keys with uneven channels; queries that share a direction.
  std::string WriteTrace(const std::string& name, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    std::ofstream file(Path(name), std::ios::binary);
    const std::array<uint32_t, 7> counts = {kLayers, kQueryHeads, kKvHeads, kHeadDim,
                                            kTokens, kJudged,     kSampled};
    const float scale = 0.125F;
    std::vector<uint32_t> positions = {0, 1};
    for (uint32_t i = 0; i < kJudged; ++i) positions.push_back(kTokens - kJudged + i);
    for (uint32_t i = 0; i < kSampled; ++i) positions.push_back(i * 5);
    Write(&file, "KVTRACE1", 8);
    Write(&file, counts.data(), counts.size());
    Write(&file, &scale, 1);
    Write(&file, positions.data(), positions.size());
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      std::vector<uint16_t> rows(size_t{2} * kTokens * kKvHeads * kHeadDim);
      for (size_t i = 0; i < rows.size(); ++i) {
        rows[i] = Bfloat16FromFloat(normal(random) * (1.0F + static_cast<float>(i % 7)));
      }
      std::vector<float> queries(size_t{kJudged + kSampled} * kQueryHeads * kHeadDim);
      for (size_t i = 0; i < queries.size(); ++i) {
        queries[i] = 0.3F * normal(random) + (i % kHeadDim == 5 ? 1.5F : 0.0F);
      }
      Write(&file, rows.data(), rows.size());
      Write(&file, queries.data(), queries.size());
    }
    file.close();
    return Path(name);
  }

  void Overwrite(const std::string& path, size_t offset, uint32_t value) {
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(offset));
    file.write(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  TraceHeader Header(const std::string& path) {
    auto header = ReadTraceHeader(path);
    EXPECT_TRUE(header.ok()) << header.status();
    return *header;
  }

  std::filesystem::path folder_;
};

TEST_F(TraceFiles, ComeBack) {
  const TraceHeader header = Header(WriteTrace("model-long-text", 1));
  EXPECT_EQ(header.model, "model");
  EXPECT_EQ(header.name, "model-long-text");
  EXPECT_EQ(header.token_count, kTokens);
  EXPECT_EQ(header.layout.group_size(), 2U);
  EXPECT_EQ(header.judged.back(), kTokens - 1);
  const auto layer = ReadTraceLayer(header, 1);
  ASSERT_TRUE(layer.ok()) << layer.status();
  EXPECT_EQ(layer->k.size(), size_t{kTokens} * kKvHeads * kHeadDim * 2);
  EXPECT_EQ(layer->sampled.size(), size_t{kSampled} * kQueryHeads * kHeadDim);
  EXPECT_FALSE(ReadTraceLayer(header, 2).ok());
}

TEST_F(TraceFiles, DamageIsNamed) {
  const auto message = [&](size_t offset, uint32_t value) {
    const std::string path = WriteTrace("model-damaged", 1);
    Overwrite(path, offset, value);
    const auto header = ReadTraceHeader(path);
    EXPECT_EQ(header.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(header.status().message());
  };
  EXPECT_EQ(message(0, 0).find("magic"), 0U);
  EXPECT_NE(message(kTokensOffset, 0).find("count"), std::string::npos);
  EXPECT_NE(message(kTokensOffset, kTokens + 1).find("bytes"), std::string::npos);
  EXPECT_EQ(message(kScaleOffset, 0).find("scale"), 0U);
  EXPECT_EQ(message(kJudgedOffset, kTokens).find("judged"), 0U);
  EXPECT_EQ(ReadTraceHeader(Path("none")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(TraceFiles, NumbersThatAreNotFiniteAreRefused) {
  const std::string path = WriteTrace("model-nan", 1);
  const TraceHeader header = Header(path);
  Overwrite(path, header.header_bytes() + header.layer_bytes() - sizeof(float), 0x7fc00000);
  EXPECT_FALSE(ReadTraceLayer(header, 0).ok());
  EXPECT_TRUE(ReadTraceLayer(header, 1).ok());
}

TEST_F(TraceFiles, StudyJudgesEveryCertificate) {
  const TraceHeader trace = Header(WriteTrace("model-one", 1));
  const TraceHeader other = Header(WriteTrace("model-two", 2));
  StudyOptions options;
  const auto result = StudyTrace(options, trace, other);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->wrong, 0U);
  EXPECT_EQ(result->wrong_sampled, 0U);
  EXPECT_EQ(result->tables_from, "model-two");
  // Per query: tightness with two tables and two proofs; every limit for groups and for single
  // heads.
  const size_t heads = size_t{kLayers} * kJudged * kQueryHeads;
  EXPECT_EQ(result->certificates,
            2 * heads * (4 + std::size(kMassLimits) + std::size(kOutputLimits)));
  EXPECT_GT(result->sampled_certificates, 0U);
  const auto& series = result->series;
  ASSERT_EQ(series.at("slack|learnt|deterministic|group|mass").size(), heads);
  for (const auto& [name, numbers] : series) {
    for (const double number : numbers) {
      EXPECT_TRUE(std::isfinite(number) && number >= 0.0) << name << " " << number;
    }
  }
  EXPECT_EQ(series.at("bytes|mass 0.05|group").size(), heads / 2);
  EXPECT_EQ(series.at("bytes|mass 0.05|alone").size(), heads);

  // Sampling can only help, and several threads change nothing.
  const auto total = [&](const std::string& name) {
    double sum = 0.0;
    for (const double number : series.at(name)) sum += number;
    return sum;
  };
  EXPECT_LT(total("slack|learnt|sampled|group|mass"),
            total("slack|learnt|deterministic|group|mass"));
  EXPECT_LE(total("oracle|mass 0.1|group"), total("oracle|mass 0.01|group"));
  options.thread_count = 3;
  const auto again = StudyTrace(options, trace, other);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->series, series);

  const nlohmann::ordered_json report = MakeReport({*result}, options.device);
  EXPECT_EQ(report["all_texts"].size(), 1U);
  EXPECT_EQ(report["wrong_statements"], 0);
  const std::string text = MakeJsonText(report);
  EXPECT_EQ(nlohmann::ordered_json::parse(text), report);
  EXPECT_LT(std::count(text.begin(), text.end(), '\n'), 120);
  const std::string page = MakePage(report, "command");
  EXPECT_NE(page.find("| model-one |"), std::string::npos);
  EXPECT_NE(page.find("wrong statements: 0"), std::string::npos);
}

TEST_F(TraceFiles, TablesOfAnotherModelAreRefused) {
  const TraceHeader trace = Header(WriteTrace("model-one", 1));
  TraceHeader other = trace;
  other.layers.pop_back();
  EXPECT_EQ(StudyTrace({}, trace, other).status().code(), absl::StatusCode::kInvalidArgument);
}

// A judge that never finds anything wrong would make the study worthless.
TEST_F(TraceFiles, WrongStatementsAreCounted) {
  const TraceHeader header = Header(WriteTrace("model-one", 1));
  const auto layer = ReadTraceLayer(header, 0);
  ASSERT_TRUE(layer.ok());
  auto device = NewDevice("reference", {});
  ASSERT_TRUE(device.ok());
  auto cached = CachedLayer::Make(device->get(), header, *layer, LearnTables(header, *layer));
  ASSERT_TRUE(cached.ok());
  const HeadTruth truth(header, *cached, 0, layer->judged.data(), kTokens);
  std::vector<uint32_t> selected;
  for (uint32_t token = 0; token < kTokens; token += 2) selected.push_back(token);
  const std::vector<float> out(kHeadDim);

  const auto log_kept = static_cast<double>(truth.LogKept(selected));
  const auto log_dropped = static_cast<double>(truth.LogDropped(selected));
  const auto error = static_cast<double>(truth.OutputError(out.data()));
  HeadCertificate right;
  right.level = Level::kDeterministic;
  right.log_kept_lower = {log_kept - 1e-12};
  right.log_kept_upper = {log_kept + 1e-12};
  right.log_dropped_lower = {log_dropped - 1e-12};
  right.log_dropped_upper = {log_dropped + 1e-12};
  right.output_error_upper = error + 1e-12;
  right.value_norm_lower = static_cast<double>(truth.value_norm()) - 1e-12;
  FinishCertificate(&right);
  EXPECT_EQ(truth.CountWrong(right, selected, out.data()), 0U);

  HeadCertificate wrong = right;
  wrong.log_dropped_upper.value = log_dropped - 1e-12;
  EXPECT_EQ(truth.CountWrong(wrong, selected, out.data()), 1U);
  wrong = right;
  wrong.log_kept_lower.value = log_kept + 1e-12;
  wrong.output_error_upper = error - 1e-12;
  EXPECT_EQ(truth.CountWrong(wrong, selected, out.data()), 2U);
  wrong = right;
  wrong.dropped_mass_upper.value = right.dropped_mass_lower.value * 0.999;
  wrong.value_norm_lower = static_cast<double>(truth.value_norm()) + 1e-12;
  EXPECT_EQ(truth.CountWrong(wrong, selected, out.data()), 2U);
  wrong = right;
  wrong.log_dropped_upper.value = std::nan("");
  EXPECT_EQ(truth.CountWrong(wrong, selected, out.data()), 1U);
}

}  // namespace
}  // namespace kvservice::eval
