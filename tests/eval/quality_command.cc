// kveval quality and kveval calibrate: closed-loop decoding of texts that tests/eval/tasks.py made
// with models that tests/eval/export_model.py made.

#include <algorithm>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/server/policy_file.h"
#include "kvservice/server/policy_registry.h"
#include "nlohmann/json.hpp"
#include "tests/eval/calibrate.h"
#include "tests/eval/commands.h"
#include "tests/eval/quality_study.h"

namespace kvservice::eval {
namespace {

struct Arguments {
  std::string model_path;
  std::vector<std::string> text_paths;
  std::string calibration_path;
  std::string policy_path;
  std::string name = "calibrated";
  std::vector<std::string> sets = {"rivals", "ours"};
  // Of the sets, those whose label has one of these in it; empty = all.
  std::vector<std::string> only;
  std::string json_path;
  std::string command;
  QualityOptions options;
  CalibrationOptions calibration;
};

int Fail(const std::string& what, const absl::Status& status) {
  std::cerr << what << ": " << status.message() << "\n";
  return kExitCannot;
}

// A model with what it learns beforehand, and the texts to decode.
struct Study {
  std::unique_ptr<Decoder> decoder;
  std::shared_ptr<const SharedPrompt> calibration;
  std::vector<SketchTable> tables;
  std::vector<StudyText> texts;
};

void ShortenTexts(uint32_t steps_max, std::vector<StudyText>* texts) {
  if (steps_max == 0) return;
  for (StudyText& text : *texts) {
    text.forced.resize(std::min<size_t>(text.forced.size(), steps_max));
    std::erase_if(text.answers, [&](const Answer& answer) { return answer.end > steps_max; });
  }
}

absl::StatusOr<Study> Load(const Arguments& arguments) {
  Study study;
  auto decoder = Decoder::Load(arguments.model_path);
  if (!decoder.ok()) return decoder.status();
  study.decoder = std::move(*decoder);
  auto other = ReadTexts(arguments.calibration_path);
  if (!other.ok()) return other.status();
  const PromptStore store(study.decoder.get(), arguments.options);
  auto calibration = store.Get(other->front());
  if (!calibration.ok()) return calibration.status();
  study.calibration = *calibration;
  study.tables = LearnPromptTables(study.decoder->shape(), study.calibration->cache());
  for (const std::string& path : arguments.text_paths) {
    auto texts = ReadTexts(path);
    if (!texts.ok()) return texts.status();
    study.texts.insert(study.texts.end(), texts->begin(), texts->end());
  }
  ShortenTexts(arguments.options.steps_max, &study.texts);
  return study;
}

absl::StatusOr<LoopSetup> SetUp(const Study& study, const QualityOptions& options,
                                const StudyText& text) {
  auto prompt = PromptStore(study.decoder.get(), options).Get(text);
  if (!prompt.ok()) return prompt.status();
  return LoopSetup{.decoder = study.decoder.get(),
                   .prompt = *prompt,
                   .calibration = study.calibration,
                   .tables = study.tables,
                   .text = &text};
}

// One row a line, so that a change of one result is a change of one line.
std::string RowsText(const std::string& command, const std::vector<nlohmann::ordered_json>& rows) {
  std::string text = "{\"command\": " + nlohmann::json(command).dump() + ",\n\"rows\": [\n";
  for (size_t i = 0; i < rows.size(); ++i) {
    text += rows[i].dump() + (i + 1 < rows.size() ? ",\n" : "\n");
  }
  return text + "]}\n";
}

absl::StatusOr<std::optional<Policy>> ReadPolicy(const std::string& path) {
  if (path.empty()) return std::optional<Policy>();
  PolicyRegistry registry;
  const absl::Status status = AddPolicyFile(path, &registry);
  if (!status.ok()) return status;
  std::ifstream file(path);
  const auto json = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("is a list, expected one policy");
  // It has a name, which the registry knows now.
  return std::optional<Policy>(*registry.Find(json.at("name").get<std::string>()));
}

// The two halves of the table are one set of results.
std::string ResultSet(const std::string& set) {
  return set == "rivals" || set == "ours" ? "table" : set;
}

// The first contender is the dense one, which the others are compared with.
void KeepOnly(const std::vector<std::string>& only, std::vector<Contender>* contenders) {
  if (only.empty()) return;
  const auto is_other = [&](const Contender& contender) {
    return std::none_of(only.begin(), only.end(), [&](const std::string& part) {
      return contender.label().find(part) != std::string::npos;
    });
  };
  contenders->erase(std::remove_if(contenders->begin() + 1, contenders->end(), is_other),
                    contenders->end());
}

int RunQuality(const Arguments& arguments) {
  const auto calibrated = ReadPolicy(arguments.policy_path);
  if (!calibrated.ok()) return Fail(arguments.policy_path, calibrated.status());
  auto study = Load(arguments);
  if (!study.ok()) return Fail("kveval quality", study.status());
  std::vector<nlohmann::ordered_json> rows;
  bool is_wrong = false;
  for (const std::string& set : arguments.sets) {
    std::vector<Contender> contenders =
        MakeContenders(set, calibrated->has_value() ? &**calibrated : nullptr);
    KeepOnly(arguments.only, &contenders);
    for (const StudyText& text : study->texts) {
      const auto setup = SetUp(*study, arguments.options, text);
      if (!setup.ok()) return Fail(text.name, setup.status());
      const auto results = RunBatches(arguments.options, *setup, contenders);
      if (!results.ok()) return Fail(text.name, results.status());
      for (nlohmann::ordered_json& row : MakeRows(*setup, contenders, *results)) {
        row["set"] = ResultSet(set);
        is_wrong = is_wrong || row.value("bound_violations", 0) > 0;
        rows.push_back(std::move(row));
      }
      std::cerr << text.model << " " << text.name << ", " << set << ": " << contenders.size()
                << " contenders\n";
      if (!arguments.json_path.empty() &&
          !WriteFile(arguments.json_path, RowsText(arguments.command, rows))) {
        std::cerr << "--json: cannot write\n";
        return kExitCannot;
      }
    }
  }
  return is_wrong ? kExitWrong : 0;
}

int RunCalibrate(const Arguments& arguments) {
  auto study = Load(arguments);
  if (!study.ok()) return Fail("kveval calibrate", study.status());
  std::vector<LoopSetup> setups;
  for (const StudyText& text : study->texts) {
    auto setup = SetUp(*study, arguments.options, text);
    if (!setup.ok()) return Fail(text.name, setup.status());
    setups.push_back(std::move(*setup));
  }
  const auto policy = Calibrate(arguments.calibration, arguments.options, setups);
  if (!policy.ok()) return Fail("kveval calibrate", policy.status());
  if (!WriteFile(arguments.policy_path, PolicyFileText(arguments.name, *policy))) {
    std::cerr << "--policy-file: cannot write\n";
    return kExitCannot;
  }
  return 0;
}

void AddCommon(CLI::App* app, const std::string& command, Arguments* arguments) {
  arguments->command = command;
  app->add_option("--model-file", arguments->model_path, "Model (tests/eval/export_model.py)")
      ->required();
  app->add_option("--texts", arguments->text_paths, "Texts to decode (tests/eval/tasks.py)")
      ->required()
      ->delimiter(',');
  app->add_option("--calibration-text", arguments->calibration_path,
                  "Another text, for what methods learn beforehand")
      ->required();
  app->add_option("--prompts", arguments->options.prompt_folder, "Folder for prefilled prompts");
  app->add_option("--threads", arguments->options.thread_count, "Default: 1")
      ->check(CLI::Range(1, 256));
  app->add_option("--batch", arguments->options.batch, "Contenders in lockstep (default: 128)")
      ->check(CLI::Range(1, 256));
  app->add_option("--steps", arguments->options.steps_max, "Only the first steps (0 = all)");
  app->add_option("--seed", arguments->options.seed, "Of random numbers (default: 1)");
}

}  // namespace

std::function<int()> AddQuality(CLI::App* app, const std::string& command) {
  const auto arguments = std::make_shared<Arguments>();
  app->description("Selectors and published methods in a closed loop, against dense attention");
  AddCommon(app, command, arguments.get());
  app->add_option("--policy-file", arguments->policy_path, "Calibrated policy of the model");
  app->add_option("--sets", arguments->sets, "rivals, ours, sharing, axes, proof, tasks, quick")
      ->delimiter(',')
      ->check(CLI::IsMember({"rivals", "ours", "sharing", "axes", "proof", "tasks", "quick"}));
  app->add_option("--only", arguments->only, "Contenders whose label has one of these in it")
      ->delimiter(',');
  app->add_option("--json", arguments->json_path, "Write the results here");
  return [arguments] { return RunQuality(*arguments); };
}

std::function<int()> AddCalibrate(CLI::App* app, const std::string& command) {
  const auto arguments = std::make_shared<Arguments>();
  app->description("Profiles texts and writes a policy file: which edit is safe where");
  AddCommon(app, command, arguments.get());
  app->add_option("--policy-file", arguments->policy_path, "Write the policy here")->required();
  app->add_option("--name", arguments->name, "Name of the policy (default: calibrated)");
  app->add_option("--budget", arguments->calibration.budget_tokens, "Tokens (default: 512)");
  app->add_option("--scans", arguments->calibration.scans_max,
                  "Share of steps and KV heads that may scan (default: 0.1)")
      ->check(CLI::Range(0.0, 1.0));
  app->add_option("--edit-damage", arguments->calibration.edit_damage,
                  "Part of the budget's own squared error that hiding or freezing may add in a "
                  "layer (default: 0.05)");
  return [arguments] { return RunCalibrate(*arguments); };
}

}  // namespace kvservice::eval
