// Runs a fuzz target without libFuzzer: every input of a corpus, and inputs that are random changes
// of those, from a seed. The short form of tests/fuzz/run_fuzz.py, for every compiler.
//
//     lane_fuzz CORPUS.txt
//
// A corpus has one input a line, in hexadecimal. KVSERVICE_FUZZ_RUNS says how many changed inputs
// there are, KVSERVICE_FUZZ_SEED where they begin; an input that fails is printed before the
// process dies of it.

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz_target.h"

namespace kvservice::testing {
namespace {

using Input = std::vector<uint8_t>;

constexpr uint32_t kRunsDefault = 3'000;
constexpr size_t kBytesMax = 16384;

// What is running; for the handler.
const Input* current = nullptr;

extern "C" void PrintCurrent(int signal) {
  constexpr char kDigits[] = "0123456789abcdef";
  [[maybe_unused]] ssize_t written = write(STDERR_FILENO, "failed: ", 8);
  for (const uint8_t byte : *current) {
    const char digits[] = {kDigits[byte >> 4], kDigits[byte & 15U]};
    written = write(STDERR_FILENO, digits, sizeof(digits));
  }
  written = write(STDERR_FILENO, "\n", 1);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void Run(const Input& input) {
  current = &input;
  LLVMFuzzerTestOneInput(input.data(), input.size());
}

uint32_t Setting(const char* name, uint32_t value) {
  const char* const text = std::getenv(name);
  return text == nullptr ? value : static_cast<uint32_t>(std::strtoul(text, nullptr, 10));
}

std::vector<Input> ReadCorpus(const char* path) {
  std::vector<Input> corpus;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    Input& input = corpus.emplace_back();
    for (size_t i = 0; i + 1 < line.size(); i += 2) {
      input.push_back(static_cast<uint8_t>(std::stoul(line.substr(i, 2), nullptr, 16)));
    }
  }
  return corpus;
}

void Change(const std::vector<Input>& corpus, std::mt19937* random, Input* input) {
  const size_t size = input->size();
  const size_t at = size == 0 ? 0 : (*random)() % size;
  const auto place = input->begin() + static_cast<std::ptrdiff_t>(at);
  switch ((*random)() % 6) {
    case 0:
      if (size > 0) *place ^= static_cast<uint8_t>(1U << ((*random)() % 8));
      return;
    case 1:
      if (size > 0) *place = static_cast<uint8_t>((*random)());
      return;
    case 2:
      input->insert(place, 1 + (*random)() % 8, static_cast<uint8_t>((*random)()));
      return;
    case 3:
      if (size > 0)
        input->erase(place, place + static_cast<std::ptrdiff_t>(1 + (*random)() % (size - at)));
      return;
    case 4:  // a number that is about to overflow
      for (size_t i = at; i < std::min(size, at + 9); ++i) (*input)[i] = 0xff;
      return;
    default: {
      const Input& other = corpus[(*random)() % corpus.size()];
      const size_t from = other.empty() ? 0 : (*random)() % other.size();
      input->resize(at);
      input->insert(input->end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
      if (input->size() > kBytesMax) input->resize(kBytesMax);
    }
  }
}

int Replay(const char* path) {
  const std::vector<Input> corpus = ReadCorpus(path);
  if (corpus.empty()) {
    std::fprintf(stderr, "%s: no inputs\n", path);
    return 2;
  }
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
    std::signal(signal, PrintCurrent);
  }
  for (const Input& input : corpus) Run(input);
  const uint32_t run_count = Setting("KVSERVICE_FUZZ_RUNS", kRunsDefault);
  const uint32_t seed = Setting("KVSERVICE_FUZZ_SEED", 1);
  std::mt19937 random(seed);
  for (uint32_t i = 0; i < run_count; ++i) {
    Input input = corpus[random() % corpus.size()];
    for (uint32_t changes = 1 + random() % 4; changes > 0; --changes) {
      Change(corpus, &random, &input);
    }
    Run(input);
  }
  std::printf("%zu inputs and %u changes of them, seed %u: nothing failed\n", corpus.size(),
              run_count, seed);
  return 0;
}

}  // namespace
}  // namespace kvservice::testing

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s CORPUS.txt\n", argv[0]);
    return 2;
  }
  return kvservice::testing::Replay(argv[1]);
}
