#include "tests/eval/matrix.h"

#include <cblas.h>

namespace kvservice::eval {
namespace {

blasint Int(size_t value) { return static_cast<blasint>(value); }

}  // namespace

void UseOneThread() { openblas_set_num_threads(1); }

void MultiplyRows(size_t rows, size_t from, size_t to, const float* x, const float* matrix,
                  float* out) {
  // A product of one row would pack the whole matrix to read it once.
  if (rows == 1) {
    cblas_sgemv(CblasRowMajor, CblasNoTrans, Int(to), Int(from), 1.0F, matrix, Int(from), x, 1,
                0.0F, out, 1);
    return;
  }
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(rows), Int(to), Int(from), 1.0F, x,
              Int(from), matrix, Int(from), 0.0F, out, Int(to));
}

void ScoreKeys(size_t rows, size_t keys, size_t width, float scale, const float* q, size_t q_stride,
               const float* k, float* scores) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Int(rows), Int(keys), Int(width), scale, q,
              Int(q_stride), k, Int(width), 0.0F, scores, Int(keys));
}

void MixValues(size_t rows, size_t keys, size_t width, const float* weights, const float* v,
               float* out, size_t out_stride) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Int(rows), Int(width), Int(keys), 1.0F,
              weights, Int(keys), v, Int(width), 0.0F, out, Int(out_stride));
}

}  // namespace kvservice::eval
