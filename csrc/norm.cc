#include "norm.h"

#include <algorithm>
#include <cmath>

namespace qdeploy {
namespace {

const void* at(const void* a, Dtype type, int64_t element) {
  return static_cast<const uint8_t*>(a) + element * (type == Dtype::s16 ? 2 : 1);
}

void* at(void* c, Dtype type, int64_t element) {
  return static_cast<uint8_t*>(c) + element * (type == Dtype::f32 ? 4 : type == Dtype::s16 ? 2 : 1);
}

float scale_of(int64_t count, int64_t sum, int64_t squares, float epsilon) {
  const int64_t variance = count * squares - sum * sum;
  return 1.0f / std::sqrt(static_cast<float>(variance) + epsilon);
}

NormParams params_of(const Norm& norm, int64_t count) {
  NormParams params = {};
  params.a_type = norm.in;
  params.c_type = norm.out;
  params.count = static_cast<int32_t>(count);
  params.qmin = norm.qmin;
  params.qmax = norm.qmax;
  params.a_stride = params.c_stride = norm.channels;
  return params;
}

}  // namespace

// Some pixels at a time: the roots and divisions of one do not wait for those of another, and the codes are in L1 when
// they are read again.
void layer_norm(const Kernels& kernels, const Norm& norm, const NormPixels& pixels) {
  constexpr int64_t kBlock = 16;
  int32_t sums[kBlock];
  int64_t squares[kBlock];
  float scales[kBlock];
  NormParams params = params_of(norm, norm.channels);
  params.n = static_cast<size_t>(norm.channels);
  params.sums = sums;
  params.scales = scales;
  params.multiplier = norm.multiplier;
  params.bias = norm.bias;
  for (int64_t row = 0; row < pixels.rows; ++row) {
    for (int64_t first = 0; first < pixels.columns; first += kBlock) {
      params.rows = static_cast<size_t>(std::min(kBlock, pixels.columns - first));
      params.a = at(pixels.a, norm.in, row * pixels.a_pitch + first * norm.channels);
      params.c = at(pixels.c, norm.out, row * pixels.c_pitch + first * norm.channels);
      const NormSumsParams of = {params.rows, params.n, params.a, params.a_stride, norm.in, sums, squares};
      kernels.norm_row_sums(&of);
      for (size_t i = 0; i < params.rows; ++i) {
        scales[i] = scale_of(norm.channels, sums[i], squares[i], norm.epsilon);
      }
      kernels.norm(&params);
    }
  }
}

// Sums, squares and scales of each channel, and what the last block of a kernel reads beyond.
size_t group_norm_scratch(const Norm& norm) { return static_cast<size_t>(norm.channels) * 16 + kOverread; }

void group_norm(const Kernels& kernels, const Norm& norm, const NormPixels& image, Range range, uint8_t* scratch) {
  const int64_t width = norm.channels / norm.groups, first = range.begin * width;
  const int64_t n = range.end * width - first, count = width * image.rows * image.columns;
  int64_t* squares = reinterpret_cast<int64_t*>(scratch);
  int32_t* sums = reinterpret_cast<int32_t*>(squares + n);
  float* scales = reinterpret_cast<float*>(sums + n);
  std::fill_n(squares, n, 0);
  std::fill_n(sums, n, 0);
  NormParams params = params_of(norm, count);
  params.rows = static_cast<size_t>(image.columns);
  params.n = static_cast<size_t>(n);
  for (int64_t row = 0; row < image.rows; ++row) {
    const void* a = at(image.a, norm.in, row * image.a_pitch + first);
    const NormSumsParams of = {params.rows, params.n, a, params.a_stride, norm.in, sums, squares};
    kernels.norm_channel_sums(&of);
  }
  for (int64_t group = 0; group < n; group += width) {
    int64_t sum = 0, square = 0;
    for (int64_t i = group; i < group + width; ++i) sum += sums[i], square += squares[i];
    std::fill_n(sums + group, width, static_cast<int32_t>(sum));
    std::fill_n(scales + group, width, scale_of(count, sum, square, norm.epsilon));
  }
  params.by_channel = true;
  params.sums = sums;
  params.scales = scales;
  params.multiplier = norm.multiplier + first;
  params.bias = norm.bias + first;
  for (int64_t row = 0; row < image.rows; ++row) {
    params.a = at(image.a, norm.in, row * image.a_pitch + first);
    params.c = at(image.c, norm.out, row * image.c_pitch + first);
    kernels.norm(&params);
  }
}

}  // namespace qdeploy
