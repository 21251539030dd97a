// The definition of every kernel, in portable C++. The other instruction sets must equal these functions bit for bit.
//
//     conv, depthwise   acc = comp + sum a*w
//     average pool      acc = sum a - zero_point*count
//     mul               acc = (a - zero_point_a) * (b - zero_point_b)
//     of any of these   r = fma(float(acc), multiplier, bias)
//     with a residual   r = fma(float(residual), residual_multiplier, r)
//     add               r = fma(float(a), multiplier_a, fma(float(b), multiplier_b, bias))
//     u8 output         c = clamp(rint(r), qmin, qmax)
//     f32 output        c = r
//     input             c = clamp(rint(fma(a, inv_scale, zero_point)), 0, 255)
//     maximum pool      c = max a
//     table             c = table[a]
//
// fmaf rounds once with or without FMA hardware; that is what makes the results independent of the machine. No sum can
// overflow int32: the loader bounds 255 * sum |w| of a channel, and comp only replaces a by a - zero_point.
//
// Packed panel (s8x4, NR = 16): the four bytes that meet a[i..i+3] of channel n are neighbours,
//     w[t][k/4][n][4]:  | n=0: i i+1 i+2 i+3 | n=1: i i+1 i+2 i+3 | ... | n=15 |  next i += 4 ...
// No kernel here reads or writes beyond the elements that it is asked for.
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "ukernels.h"

namespace qdeploy {
namespace {

constexpr int kMr = 7;
constexpr int kStrips = 2;
constexpr int kNr = 16;

// The clamp comes first, in float, where it equals clamp(rint(r)) because the bounds are integers: any r, even one that
// no integer type holds, has a defined result. The form of the comparisons sends NaN to qmin, as vmaxps does.
uint8_t quantize_u8(float r, uint8_t qmin, uint8_t qmax) {
  const float low = r > static_cast<float>(qmin) ? r : static_cast<float>(qmin);
  const float high = low < static_cast<float>(qmax) ? low : static_cast<float>(qmax);
  return static_cast<uint8_t>(nearbyintf(high));
}

void store(float r, uint8_t qmin, uint8_t qmax, uint8_t* c) { *c = quantize_u8(r, qmin, qmax); }
void store(float r, uint8_t, uint8_t, float* c) { *c = r; }

// ---- Convolution ----------------------------------------------------------------------------------------------------

void accumulate_pixel(const ConvParams& p, const uint8_t* a, int32_t* acc) {
  const int8_t* w = static_cast<const int8_t*>(p.w);
  for (int n = 0; n < kNr; ++n) acc[n] = p.comp[n];
  for (int32_t t = 0; t < p.cells; ++t) {
    const uint8_t* a_cell = a + p.cell_offset[t];
    for (int32_t i = 0; i < p.k; i += 4, w += kNr * 4) {
      const int32_t a0 = a_cell[i], a1 = a_cell[i + 1], a2 = a_cell[i + 2], a3 = a_cell[i + 3];
      for (int n = 0; n < kNr; ++n) {
        acc[n] += a0 * w[n * 4] + a1 * w[n * 4 + 1] + a2 * w[n * 4 + 2] + a3 * w[n * 4 + 3];
      }
    }
  }
}

template <typename Out>
void conv(const ConvParams* params, const ConvTile* tiles, size_t n_tiles) {
  const ConvParams& p = *params;
  for (const ConvTile* tile = tiles; tile != tiles + n_tiles; ++tile) {
    for (int s = 0; s < tile->strips; ++s) {
      for (int pixel = 0; pixel < tile->r; ++pixel) {
        int32_t acc[kNr];
        accumulate_pixel(p, p.a + tile->a[s] + pixel * p.a_stride, acc);
        Out* c = static_cast<Out*>(p.c) + tile->c[s] + pixel * p.c_stride;
        for (int32_t n = 0; n < p.n; ++n) {
          float r = fmaf(static_cast<float>(acc[n]), p.multiplier[n], p.bias[n]);
          if (p.residual) {
            const uint8_t q = p.residual[tile->residual[s] + pixel * p.residual_stride + n];
            r = fmaf(static_cast<float>(q), p.residual_multiplier, r);
          }
          store(r, p.qmin, p.qmax, c + n);
        }
      }
    }
  }
}

void depthwise(const DepthwiseParams* params, size_t pixels) {
  const DepthwiseParams& p = *params;
  for (size_t pixel = 0; pixel < pixels; ++pixel) {
    const uint8_t* a = p.a + static_cast<ptrdiff_t>(pixel) * p.a_stride;
    uint8_t* c = p.c + static_cast<ptrdiff_t>(pixel) * p.c_stride;
    for (int32_t n = 0; n < p.n; ++n) {
      int32_t acc = p.comp[n];
      for (int32_t t = 0; t < p.cells; ++t) acc += a[p.cell_offset[t] + n] * p.w[t * p.w_stride + n];
      c[n] = quantize_u8(fmaf(static_cast<float>(acc), p.multiplier[n], p.bias[n]), p.qmin, p.qmax);
    }
  }
}

// ---- Pools ----------------------------------------------------------------------------------------------------------

void max_pool(const PoolParams* params, uint8_t* c) {
  const PoolParams& p = *params;
  const uint8_t* a = p.a;
  for (size_t i = 0; i < p.pixels; ++i, a += p.a_stride, c += p.c_stride) {
    for (size_t n = 0; n < p.n; ++n) {
      uint8_t largest = 0;
      for (size_t y = 0; y < p.rows; ++y) {
        for (size_t x = 0; x < p.cols; ++x) {
          const uint8_t q = a[static_cast<ptrdiff_t>(y) * p.row_stride + static_cast<ptrdiff_t>(x) * p.col_stride + n];
          if (q > largest) largest = q;
        }
      }
      c[n] = largest;
    }
  }
}

template <typename Out>
void avg_pool(const AvgPoolParams* params, Out* c) {
  const PoolParams& p = params->window;
  const uint8_t* a = p.a;
  for (size_t i = 0; i < p.pixels; ++i, a += p.a_stride, c += p.c_stride) {
    for (size_t n = 0; n < p.n; ++n) {
      int32_t acc = -params->zero_point * static_cast<int32_t>(p.rows * p.cols);
      for (size_t y = 0; y < p.rows; ++y) {
        for (size_t x = 0; x < p.cols; ++x)
          acc += a[static_cast<ptrdiff_t>(y) * p.row_stride + static_cast<ptrdiff_t>(x) * p.col_stride + n];
      }
      store(fmaf(static_cast<float>(acc), params->multiplier, params->bias), params->qmin, params->qmax, c + n);
    }
  }
}

// ---- Elementwise ----------------------------------------------------------------------------------------------------

template <typename Out>
void add(const AddParams* params, size_t n, const uint8_t* a, const uint8_t* b, Out* c) {
  const AddParams& p = *params;
  for (size_t i = 0; i < n; ++i) {
    const float r_b = fmaf(static_cast<float>(b[i]), p.multiplier_b, p.bias);
    store(fmaf(static_cast<float>(a[i]), p.multiplier_a, r_b), p.qmin, p.qmax, c + i);
  }
}

template <typename Out>
void mul(const MulParams* params, const uint8_t* a, const uint8_t* b, Out* c) {
  const MulParams& p = *params;
  for (size_t pixel = 0; pixel < p.pixels; ++pixel, a += p.n, b += p.b_stride, c += p.n) {
    for (size_t i = 0; i < p.n; ++i) {
      const int32_t acc = (a[i] - p.zero_point_a) * (b[i] - p.zero_point_b);
      store(fmaf(static_cast<float>(acc), p.multiplier, p.bias), p.qmin, p.qmax, c + i);
    }
  }
}

void table(size_t n, const uint8_t* table, const uint8_t* a, uint8_t* c) {
  for (size_t i = 0; i < n; ++i) c[i] = table[a[i]];
}

bool quantize(const QuantizeParams* params) {
  const QuantizeParams& p = *params;
  bool finite = true;
  for (size_t ch = 0; ch < p.channels; ++ch) {
    const float* plane = p.a + static_cast<ptrdiff_t>(ch) * p.plane_stride;
    for (size_t pixel = 0; pixel < p.pixels; ++pixel) {
      const float x = plane[pixel];
      finite &= x - x == 0.0f;  // NaN for NaN and for both infinities
      p.c[static_cast<ptrdiff_t>(pixel) * p.c_stride + static_cast<ptrdiff_t>(ch)] =
          quantize_u8(fmaf(x, p.inv_scale, p.zero_point), 0, 255);
    }
  }
  return finite;
}

}  // namespace

void init_scalar(Kernels* kernels) {
  kernels->isa = "scalar";
  const ConvKernel kernel = {
      "qu8_qc8w_conv_14x16c4__scalar", conv<uint8_t>, conv<float>, kMr, kStrips, kNr, WeightFormat::s8x4};
  for (int bits = 2; bits <= 8; ++bits) kernels->conv[bits] = kernel;
  kernels->grouped = {};
  kernels->depthwise = depthwise;
  kernels->max_pool = max_pool;
  kernels->avg_pool_qu8 = avg_pool<uint8_t>;
  kernels->avg_pool_f32 = avg_pool<float>;
  kernels->add_qu8 = add<uint8_t>;
  kernels->add_f32 = add<float>;
  kernels->mul_qu8 = mul<uint8_t>;
  kernels->mul_f32 = mul<float>;
  kernels->table = table;
  kernels->quantize = quantize;
}

}  // namespace qdeploy
