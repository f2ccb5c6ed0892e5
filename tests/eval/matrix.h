// Matrix products of the decoder, in float32. Matrices are row-major. Any thread may call at any
// time; a call works on the thread that makes it.

#ifndef KVSERVICE_TESTS_EVAL_MATRIX_H_
#define KVSERVICE_TESTS_EVAL_MATRIX_H_

#include <cstddef>

#include "absl/types/span.h"

namespace kvservice::eval {

// Tells the BLAS library to start no threads of its own. Before the first product.
void UseOneThread();

// out[rows][to] = x[rows][from] times the transpose of matrix[to][from].
void MultiplyRows(size_t rows, size_t from, size_t to, const float* x, const float* matrix,
                  float* out);

// The same for rows that lie anywhere: out[r][to] = x[r][from] times the transpose of
// matrix[to][from]. Each number is added up in the same order whatever other rows there are. For
// many rows together, and for few: the matrix is read once.
void MultiplyEach(absl::Span<const float* const> x, size_t from, size_t to, const float* matrix,
                  absl::Span<float* const> out);

// out[r][width] += weights[r][count] times v[count][width]. Reads v once for every four rows.
void AddMixes(absl::Span<const float* const> weights, size_t count, size_t width, const float* v,
              absl::Span<float* const> out);

// scores[rows][keys] = scale * q[rows][width] times the transpose of k[keys][width]; rows of q lie
// q_stride floats apart.
void ScoreKeys(size_t rows, size_t keys, size_t width, float scale, const float* q, size_t q_stride,
               const float* k, float* scores);

// out[rows][width] = weights[rows][keys] times v[keys][width]; rows of out lie out_stride floats
// apart.
void MixValues(size_t rows, size_t keys, size_t width, const float* weights, const float* v,
               float* out, size_t out_stride);

}  // namespace kvservice::eval

#endif  // KVSERVICE_TESTS_EVAL_MATRIX_H_
