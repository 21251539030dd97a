#include "lsq.h"

#include <algorithm>
#include <vector>

#include "share.h"
#include "thread_pool.h"

namespace qdeploy {
namespace {

// What one call of a kernel gets of a row, so that a single row keeps all threads busy. The sum of a row adds up those
// of its pieces, in order.
constexpr int64_t kPiece = 16384;

// Another thread pays from about 30 us on.
constexpr int64_t kNumbersPerThread = 65536;

int64_t pieces_of(const LsqTensor& tensor) { return std::max<int64_t>(1, (tensor.columns + kPiece - 1) / kPiece); }

// Calls work(piece, row, first, params) for all pieces of all rows, numbered through; `first` is the piece's first element.
template <class Work>
void for_each_piece(const LsqTensor& tensor, int threads, const Work& work) {
  const int64_t pieces = pieces_of(tensor), numbers = tensor.rows * tensor.columns;
  const int useful = static_cast<int>(std::min<int64_t>(threads, 1 + numbers / kNumbersPerThread));
  const auto body = [&](int thread, int all) {
    const Range range = slice(tensor.rows * pieces, {thread, all});
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t row = i / pieces, begin = i % pieces * kPiece, first = row * tensor.columns + begin;
      LsqParams params = {};
      params.value = tensor.value + first;
      params.n = static_cast<size_t>(std::min(kPiece, tensor.columns - begin));
      params.step = tensor.step[row];
      params.qmin = static_cast<float>(tensor.qmin);
      params.qmax = static_cast<float>(tensor.qmax);
      work(i, first, params);
    }
  };
  useful == 1 ? body(0, 1) : ThreadPool::shared().run(useful, body);
}

// The sums that work(first, params) returns of the pieces, by row.
template <class Work>
void sum_rows(const LsqTensor& tensor, int threads, double* sums, const Work& work) {
  const int64_t pieces = pieces_of(tensor);
  std::vector<double> of_pieces(static_cast<size_t>(tensor.rows * pieces));
  for_each_piece(tensor, threads,
                 [&](int64_t piece, int64_t first, LsqParams& params) { of_pieces[piece] = work(first, params); });
  for (int64_t row = 0; row < tensor.rows; ++row) {
    sums[row] = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sums[row] += of_pieces[row * pieces + piece];
  }
}

}  // namespace

void lsq_forward(const Kernels& kernels, const LsqTensor& tensor, float* c, int threads) {
  for_each_piece(tensor, threads, [&](int64_t, int64_t first, LsqParams& params) {
    params.c = c + first;
    kernels.lsq_forward(&params);
  });
}

void lsq_backward(const Kernels& kernels, const LsqTensor& tensor, const float* grad, double grad_scale,
                  float* grad_value, float* grad_step, int threads) {
  std::vector<double> sums(static_cast<size_t>(tensor.rows));
  sum_rows(tensor, threads, sums.data(), [&](int64_t first, LsqParams& params) {
    params.grad = grad + first;
    params.c = grad_value + first;
    return kernels.lsq_backward(&params);
  });
  for (int64_t row = 0; row < tensor.rows; ++row) grad_step[row] = static_cast<float>(sums[row] * grad_scale);
}

void lsq_errors(const Kernels& kernels, const LsqTensor& tensor, double* errors, int threads) {
  sum_rows(tensor, threads, errors, [&](int64_t, LsqParams& params) { return kernels.lsq_error(&params); });
}

}  // namespace qdeploy
