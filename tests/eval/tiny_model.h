// Random models small enough for plain loops, as files that Decoder::Load reads.

#ifndef KVSERVICE_TESTS_EVAL_TINY_MODEL_H_
#define KVSERVICE_TESTS_EVAL_TINY_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tests/eval/decoder.h"

namespace kvservice::eval {

// The same shape gives the same model. One thread.
class TinyModel {
 public:
  // All of the shape but its name is used.
  explicit TinyModel(const DecoderShape& shape);

  Family family() const { return shape_.family; }
  // A tensor by its name in model_file.h, those of a layer with its number ("qkv0"): [out][in].
  const std::vector<double>& operator[](const std::string& name) const { return tensors_.at(name); }
  // The file's, for tests that damage it.
  std::string& bytes() { return bytes_; }

  // Writes <folder><name>.kvmodel; returns its path.
  std::string Write(const std::string& folder, const std::string& name) const;

 private:
  void AddLayer(const std::string& layer);
  template <typename Number>
  void Put(Number number) {
    bytes_.append(reinterpret_cast<const char*>(&number), sizeof(number));
  }
  void Norm(const std::string& name, size_t count);
  void Matrix(const std::string& name, size_t rows, size_t columns, double size);

  const DecoderShape shape_;
  std::string bytes_;
  std::map<std::string, std::vector<double>> tensors_;
  std::mt19937 random_{7};
  std::normal_distribution<double> normal_;
};

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_TINY_MODEL_H_
