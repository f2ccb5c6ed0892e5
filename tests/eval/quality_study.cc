#include "tests/eval/quality_study.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvservice::eval {
namespace {

using Json = nlohmann::ordered_json;

double Mean(const std::vector<float>& numbers) {
  if (numbers.empty()) return 0.0;
  return std::accumulate(numbers.begin(), numbers.end(), 0.0) / static_cast<double>(numbers.size());
}

// The number below which `share` of all lie.
double Percentile(std::vector<float> numbers, double share) {
  if (numbers.empty()) return 0.0;
  const auto index = static_cast<size_t>(share * static_cast<double>(numbers.size() - 1));
  const auto at = numbers.begin() + static_cast<std::ptrdiff_t>(index);
  std::nth_element(numbers.begin(), at, numbers.end());
  return *at;
}

double Largest(const std::vector<float>& numbers) {
  return numbers.empty() ? 0.0 : *std::max_element(numbers.begin(), numbers.end());
}

// Four digits say all there is to say.
double Short(double number) {
  if (number == 0.0 || !std::isfinite(number)) return number;
  const double scale = std::pow(10.0, 3 - std::floor(std::log10(std::abs(number))));
  return std::round(number * scale) / scale;
}

double Ratio(double part, double whole) { return whole == 0.0 ? 0.0 : Short(part / whole); }

void AddCosts(const LoopResult& result, Json* row) {
  const auto groups = static_cast<double>(result.groups);
  (*row)["tokens_read"] = Ratio(result.tokens_read, groups);
  (*row)["tokens_visible"] = Ratio(result.tokens_visible, groups);
  (*row)["scans"] = Ratio(static_cast<double>(result.scans), groups);
  (*row)["scans_second_half"] = Ratio(static_cast<double>(result.scans_second_half),
                                      static_cast<double>(result.groups_second_half));
  // Scans per (layer, KV head) that anchors out of prompt queries cost, once, before the first
  // step.
  (*row)["seed_scans"] = Ratio(static_cast<double>(result.seed_scans) * result.steps, groups);
  (*row)["dense_groups"] = Ratio(static_cast<double>(result.groups_dense), groups);
  (*row)["bytes"] = Ratio(result.bytes, result.bytes_dense);
  (*row)["flops"] = Ratio(result.flops, result.flops_dense);
}

void AddAttention(const LoopResult& result, Json* row) {
  (*row)["dropped_mean"] = Short(Mean(result.dropped));
  (*row)["dropped_p95"] = Short(Percentile(result.dropped, 0.95));
  (*row)["dropped_p99"] = Short(Percentile(result.dropped, 0.99));
  (*row)["dropped_max"] = Short(Largest(result.dropped));
  const auto compared = static_cast<double>(result.output_errors.size());
  (*row)["excess_mean"] = Short(Mean(result.excess));
  (*row)["oracle_overlap"] = Ratio(result.overlap_sum, compared);
  (*row)["output_error_mean"] = Short(Mean(result.output_errors));
  (*row)["output_error_p95"] = Short(Percentile(result.output_errors, 0.95));
  (*row)["output_error_max"] = Short(Largest(result.output_errors));
}

// Means of what the theory assumes, where it says something.
void AddAssumed(const LoopResult& result, Json* row) {
  const char* const names[] = {"assumed_cis_excess", "assumed_psaw_dropped", "assumed_etf_excess"};
  for (size_t i = 0; i < result.assumed_count.size(); ++i) {
    if (result.assumed_count[i] == 0) continue;
    (*row)[names[i]] = Ratio(result.assumed_sum[i], static_cast<double>(result.assumed_count[i]));
  }
}

void AddModel(const LoopResult& result, const LoopResult& dense, Json* row) {
  if (result.kl.empty()) return;
  (*row)["kl_mean"] = Short(Mean(result.kl));
  (*row)["kl_p95"] = Short(Percentile(result.kl, 0.95));
  (*row)["kl_p99"] = Short(Percentile(result.kl, 0.99));
  (*row)["kl_max"] = Short(Largest(result.kl));
  (*row)["top1"] =
      Ratio(static_cast<double>(result.top1_equal), static_cast<double>(result.kl.size()));
  (*row)["nll"] = Short(Mean(result.nll));
  (*row)["nll_change"] = Ratio(Mean(result.nll) - Mean(dense.nll), Mean(dense.nll));
}

void AddTasks(const StudyText& text, const LoopResult& result, const LoopResult& dense, Json* row) {
  if (!text.answers.empty()) {
    (*row)["digits"] = result.digits;
    (*row)["digits_right"] = result.digits_right;
    (*row)["needles"] = result.answers;
    (*row)["needles_right"] = result.answers_right;
    (*row)["needles_right_dense"] = dense.answers_right;
  }
  if (text.greedy_tokens > 0) {
    (*row)["tasks"] = 1;
    (*row)["tasks_as_dense"] = result.greedy == dense.greedy ? 1 : 0;
  }
}

void AddProof(const LoopResult& result, Json* row) {
  (*row)["bound_violations"] = result.violations;
  if (result.certificates + result.sampled_certificates == 0) return;
  (*row)["certificates"] = result.certificates;
  (*row)["sampled_certificates"] = result.sampled_certificates;
  (*row)["sampled_misses"] = result.sampled_misses;
  (*row)["expected_misses"] = Short(result.expected_misses);
  (*row)["bound_median"] = Short(Percentile(result.bounds, 0.5));
  (*row)["bound_p95"] = Short(Percentile(result.bounds, 0.95));
  (*row)["bound_max"] = Short(Largest(result.bounds));
  Json samples = Json::array();
  for (const auto& [truth, bound] : result.bound_samples) {
    samples.push_back({Short(truth), Short(bound)});
  }
  (*row)["truth_and_bound"] = samples;
}

// Means per [sparse layer][query head], for a picture.
Json DroppedByHead(const LoopResult& result, uint32_t layers, uint32_t heads) {
  std::vector<double> sums(size_t{layers} * heads);
  for (size_t i = 0; i < result.dropped.size(); ++i) sums[i % sums.size()] += result.dropped[i];
  Json by_layer = Json::array();
  const double steps =
      static_cast<double>(result.dropped.size()) / static_cast<double>(sums.size());
  for (uint32_t layer = 0; layer < layers; ++layer) {
    Json by_head = Json::array();
    for (uint32_t head = 0; head < heads; ++head) {
      by_head.push_back(Short(sums[size_t{layer} * heads + head] / std::max(steps, 1.0)));
    }
    by_layer.push_back(by_head);
  }
  return by_layer;
}

Json MakeRow(const StudyText& text, const Contender& contender, const LoopResult& result,
             const LoopResult& dense) {
  Json row = {{"model", text.model},        {"text", text.text},
              {"tokens", text.tokens},      {"name", text.name},
              {"method", contender.method}, {"variant", contender.variant},
              {"budget", contender.budget}, {"steps", result.steps}};
  AddCosts(result, &row);
  AddAttention(result, &row);
  AddAssumed(result, &row);
  AddModel(result, dense, &row);
  AddTasks(text, result, dense, &row);
  AddProof(result, &row);
  return row;
}

}  // namespace

absl::StatusOr<std::vector<StudyText>> ReadTexts(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  const Json all = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!all.is_array() || all.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a list of texts"));
  }
  std::vector<StudyText> texts;
  for (const Json& entry : all) {
    for (const char* field : {"name", "model", "text", "tokens", "prompt", "forced"}) {
      if (!entry.contains(field)) {
        return absl::InvalidArgumentError(absl::StrCat(path, ": a text has no ", field));
      }
    }
    StudyText text{.name = entry["name"],
                   .model = entry["model"],
                   .text = entry["text"],
                   .tokens = entry["tokens"],
                   .prompt = entry["prompt"].get<std::vector<uint32_t>>(),
                   .forced = entry["forced"].get<std::vector<uint32_t>>(),
                   .greedy_tokens = entry.value("greedy_tokens", 0U)};
    for (const Json& answer : entry.value("answers", Json::array())) {
      text.answers.push_back(
          {.begin = answer["begin"], .end = answer["end"], .name = answer["name"]});
    }
    texts.push_back(std::move(text));
  }
  return texts;
}

absl::StatusOr<std::shared_ptr<const SharedPrompt>> PromptStore::Get(const StudyText& text) const {
  const std::string path = absl::StrCat(options_.prompt_folder, "/", text.model, "-", text.name,
                                        "-", text.prompt.size(), ".prompt");
  if (!options_.prompt_folder.empty()) {
    auto cached = ReadPromptCache(*decoder_, text.prompt, path);
    if (cached.ok()) {
      return std::make_shared<const SharedPrompt>(decoder_->shape(), std::move(*cached));
    }
  }
  PromptCache made = Prefill(*decoder_, text.prompt, {.thread_count = options_.thread_count});
  if (!options_.prompt_folder.empty()) {
    const absl::Status status = WritePromptCache(*decoder_, made, path);
    if (!status.ok()) return status;
  }
  return std::make_shared<const SharedPrompt>(decoder_->shape(), std::move(made));
}

namespace {

absl::StatusOr<std::map<std::string, std::unique_ptr<const baselines::PromptIndex>>> MakeIndexes(
    const QualityOptions& options, const LoopSetup& setup, absl::Span<const Contender> contenders) {
  const baselines::BaselineContext context = {
      .prompt = SharedPrompt::BaselinePrompt(setup.prompt),
      .calibration = SharedPrompt::BaselinePrompt(setup.calibration),
      .seed = options.seed,
      .threads = options.thread_count};
  std::map<std::string, std::unique_ptr<const baselines::PromptIndex>> indexes;
  for (const Contender& contender : contenders) {
    if (contender.baseline.empty() || indexes.contains(contender.baseline)) continue;
    auto index = baselines::NewPromptIndex(contender.baseline, context);
    if (!index.ok()) return index.status();
    indexes[contender.baseline] = std::move(*index);
  }
  return indexes;
}

}  // namespace

namespace {

// Indices of contenders that run in lockstep. All of a batch are served by one model.
std::vector<std::vector<size_t>> MakeBatches(const QualityOptions& options,
                                             absl::Span<const Contender> contenders) {
  const size_t threads = std::max<size_t>(1, options.thread_count);
  const size_t share = (contenders.size() - 1 + threads - 1) / threads;
  const size_t per_batch = std::max<size_t>(1, std::min<size_t>(options.batch, share));
  std::vector<std::vector<size_t>> batches;
  for (const bool unrotated : {true, false}) {
    bool starts = true;
    for (size_t i = 1; i < contenders.size(); ++i) {
      if (contenders[i].unrotated != unrotated) continue;
      if (starts || batches.back().size() == per_batch) batches.emplace_back();
      batches.back().push_back(i);
      starts = false;
    }
  }
  return batches;
}

}  // namespace

absl::StatusOr<std::vector<LoopResult>> RunBatches(const QualityOptions& options,
                                                   const LoopSetup& setup,
                                                   absl::Span<const Contender> contenders) {
  const auto indexes = MakeIndexes(options, setup, contenders);
  if (!indexes.ok()) return indexes.status();
  const std::vector<std::vector<size_t>> batches = MakeBatches(options, contenders);
  std::vector<LoopResult> results(contenders.size());
  std::atomic<size_t> next{0};
  std::mutex mutex;
  absl::Status failed;
  const auto work = [&] {
    for (size_t batch = next++; batch < batches.size(); batch = next++) {
      // Each batch has a dense contender of its own to compare with.
      std::vector<Contender> members = {contenders[0]};
      members[0].unrotated = contenders[batches[batch][0]].unrotated;
      for (const size_t index : batches[batch]) members.push_back(contenders[index]);
      LoopSetup of_batch = setup;
      of_batch.seed = options.seed + batch;
      of_batch.indexes = &*indexes;
      auto ran = RunClosedLoop(of_batch, members);
      const std::lock_guard<std::mutex> lock(mutex);
      if (!ran.ok()) {
        failed = ran.status();
        return;
      }
      if (batch == 0) results[0] = std::move((*ran)[0]);
      for (size_t i = 0; i < batches[batch].size(); ++i) {
        results[batches[batch][i]] = std::move((*ran)[1 + i]);
      }
    }
  };
  std::vector<std::thread> workers;
  for (size_t i = 1; i < std::min<size_t>(options.thread_count, batches.size()); ++i) {
    workers.emplace_back(work);
  }
  work();
  for (std::thread& worker : workers) worker.join();
  if (!failed.ok()) return failed;
  return results;
}

std::vector<Json> MakeRows(const LoopSetup& setup, absl::Span<const Contender> contenders,
                           absl::Span<const LoopResult> results) {
  const DecoderShape& shape = setup.decoder->shape();
  std::vector<Json> rows;
  for (size_t i = 0; i < contenders.size(); ++i) {
    rows.push_back(MakeRow(*setup.text, contenders[i], results[i], results[0]));
    if (contenders[i].has_picture) {
      const auto layers =
          static_cast<uint32_t>(results[i].scans_by_head.size() / shape.kv_head_count);
      rows.back()["dropped_by_head"] = DroppedByHead(results[i], layers, shape.query_head_count);
    }
  }
  return rows;
}

}  // namespace kvservice::eval
