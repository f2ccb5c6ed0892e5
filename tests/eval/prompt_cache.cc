#include <array>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tests/eval/decoder.h"

namespace kvservice::eval {
namespace {

constexpr std::array<char, 8> kMagic = {'K', 'V', 'P', 'R', 'M', 'P', 'T', '1'};

// The file: this, u32 tokens, f32 last_logits, then the layers with their members in order.
struct Fixed {
  std::array<char, 8> magic;
  uint64_t fingerprint;  // of the model
  uint32_t token_count, query_count;
};
static_assert(sizeof(Fixed) == 24);

template <typename Number>
void Put(std::ostream& file, const std::vector<Number>& numbers) {
  file.write(reinterpret_cast<const char*>(numbers.data()),
             static_cast<std::streamsize>(numbers.size() * sizeof(Number)));
}

template <typename Number>
bool Get(std::istream& file, size_t count, std::vector<Number>* numbers) {
  numbers->resize(count);
  file.read(reinterpret_cast<char*>(numbers->data()),
            static_cast<std::streamsize>(count * sizeof(Number)));
  return static_cast<bool>(file);
}

// Numbers of one layer.
struct Counts {
  size_t rows, queries, sums;
  Counts(const DecoderShape& shape, size_t token_count, size_t query_count)
      : rows(shape.kv_head_count * token_count * shape.head_dim),
        queries(query_count * shape.query_head_count * shape.head_dim),
        sums(shape.query_head_count * token_count) {}
};

}  // namespace

absl::Status WritePromptCache(const Decoder& decoder, const PromptCache& prompt,
                              const std::string& path) {
  const Fixed fixed = {.magic = kMagic,
                       .fingerprint = decoder.fingerprint(),
                       .token_count = static_cast<uint32_t>(prompt.tokens.size()),
                       .query_count = prompt.query_count};
  // A reader never sees half of a file.
  const std::string unfinished = path + ".unfinished";
  std::error_code error;
  {
    std::ofstream file(unfinished, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&fixed), sizeof(fixed));
    Put(file, prompt.tokens);
    Put(file, prompt.last_logits);
    for (const PromptLayer& layer : prompt.layers) {
      Put(file, layer.k);
      Put(file, layer.v);
      Put(file, layer.queries);
      Put(file, layer.attention_sum);
    }
    if (!file.flush()) return absl::UnavailableError(absl::StrCat("cannot write ", unfinished));
  }
  std::filesystem::rename(unfinished, path, error);
  if (error) return absl::UnavailableError(absl::StrCat(path, ": ", error.message()));
  return absl::OkStatus();
}

absl::StatusOr<PromptCache> ReadPromptCache(const Decoder& decoder,
                                            absl::Span<const uint32_t> tokens,
                                            const std::string& path) {
  const DecoderShape& shape = decoder.shape();
  std::ifstream file(path, std::ios::binary);
  Fixed fixed;
  if (!file.read(reinterpret_cast<char*>(&fixed), sizeof(fixed))) {
    return absl::NotFoundError(absl::StrCat("cannot read ", path));
  }
  if (fixed.magic != kMagic || fixed.fingerprint != decoder.fingerprint() ||
      fixed.token_count != tokens.size() || fixed.query_count > fixed.token_count) {
    return absl::NotFoundError(absl::StrCat(path, " is of another model or prompt"));
  }
  PromptCache prompt;
  if (!Get(file, fixed.token_count, &prompt.tokens) || prompt.tokens != tokens) {
    return absl::NotFoundError(absl::StrCat(path, " is of another prompt"));
  }
  prompt.query_count = fixed.query_count;
  prompt.layers.resize(shape.layer_count);
  bool ok = Get(file, shape.vocabulary, &prompt.last_logits);
  const Counts counts(shape, fixed.token_count, fixed.query_count);
  for (PromptLayer& layer : prompt.layers) {
    ok = ok && Get(file, counts.rows, &layer.k) && Get(file, counts.rows, &layer.v) &&
         Get(file, counts.queries, &layer.queries) && Get(file, counts.sums, &layer.attention_sum);
  }
  if (!ok || file.peek() != std::ifstream::traits_type::eof()) {
    return absl::NotFoundError(absl::StrCat(path, " is cut off or too long"));
  }
  return prompt;
}

}  // namespace kvservice::eval
