// Results of a certificate study as JSON and as a page of Markdown.

#ifndef KVSERVICE_TESTS_EVAL_REPORT_H_
#define KVSERVICE_TESTS_EVAL_REPORT_H_

#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "tests/eval/certificate_study.h"

namespace kvservice::eval {

// One entry per trace, and one per model and length over all its texts.
nlohmann::ordered_json MakeReport(const std::vector<TraceResult>& results,
                                  const std::string& device);

// The report as JSON text that a person can read: what lies four levels deep is on one line.
std::string MakeJsonText(const nlohmann::ordered_json& report);

// `command` is how to make the page again.
std::string MakePage(const nlohmann::ordered_json& report, const std::string& command);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_REPORT_H_
