// The definition of every kernel, in portable C++. The other instruction sets must equal these functions bit for bit.
//
//     conv, depthwise   acc = comp + sum a*w
//     average pool      acc = sum a - zero_point*count
//     mul               acc = (a - zero_point_a) * (b - zero_point_b)
//     of any of these   r = fma(float(acc), multiplier, bias)
//     with a residual   r = fma(float(residual), residual_multiplier, r); of inner codes see ukernels.h
//     add               r = fma(float(a), multiplier_a, fma(float(b), multiplier_b, bias))
//     u8 output         c = clamp(rint(r), qmin, qmax)
//     s16 output        c = clamp(rint(r), -32767, 32767)
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

#include "scalar_rows.h"
#include "ukernels.h"

namespace qdeploy {
namespace {

constexpr int kMr = 7;
constexpr int kStrips = 2;
constexpr int kNr = 16;

void store(float r, uint8_t qmin, uint8_t qmax, uint8_t* c) { *c = quantize_u8(r, qmin, qmax); }
void store(float r, uint8_t, uint8_t, int16_t* c) { store(r, Dtype::s16, 0, 0, c, 0); }
void store(float r, uint8_t, uint8_t, float* c) { *c = r; }

float add_residual(float r, int32_t residual, float multiplier, const InnerCodes* inner) {
  if (!inner) return fmaf(static_cast<float>(residual), multiplier, r);
  const float t = fminf(fmaxf(r + kRound, inner->low), inner->high) - kRound;
  return fmaf(t, inner->multiplier, fmaf(static_cast<float>(residual), multiplier, inner->bias));
}

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
            const ptrdiff_t at = static_cast<ptrdiff_t>(tile->residual[s]) + pixel * p.residual_stride + n;
            r = add_residual(r, code(p.residual, p.residual_type, at), p.residual_multiplier, p.inner);
          }
          store(r, p.qmin, p.qmax, c + n);
        }
      }
    }
  }
}

void depthwise(const DepthwiseParams* params, size_t rows, size_t pixels) {
  const DepthwiseParams& p = *params;
  for (size_t i = 0; i < rows * pixels; ++i) {
    const ptrdiff_t row = static_cast<ptrdiff_t>(i / pixels), pixel = static_cast<ptrdiff_t>(i % pixels);
    const uint8_t* a = p.a + row * p.a_row_stride + pixel * p.a_stride;
    uint8_t* c = p.c + row * p.c_row_stride + pixel * p.c_stride;
    for (int32_t n = 0; n < p.n; ++n) {
      int32_t acc = p.comp[n];
      for (int32_t t = 0; t < p.cells; ++t) acc += a[p.cell_offset[t] + n] * p.w[t * p.w_stride + n];
      c[n] = quantize_u8(fmaf(static_cast<float>(acc), p.multiplier[n], p.bias[n]), p.qmin, p.qmax);
    }
  }
}

// ---- Winograd -------------------------------------------------------------------------------------------------------

// The matrices of ukernels.h. Sums are of unsigned integers, which wrap.
template <int kSize>
struct Form {
  static constexpr int kOut = kSize, kIn = kSize + 2;
  int32_t input[kIn][kIn], output[kOut][kIn];
  uint32_t inverse;
};
constexpr Form<4> kForm4 = {{{2, 3, -4, -3, 2, 0},
                             {0, 2, 5, 1, -2, 0},
                             {0, 2, 1, -5, 2, 0},
                             {0, -1, -2, 1, 2, 0},
                             {0, 2, -1, -2, 1, 0},
                             {0, 2, 3, -4, -3, 2}},
                            {{1, 1, 1, 1, -8, 0}, {0, 1, -1, 2, 4, 0}, {0, 1, 1, 4, -2, 0}, {0, 1, -1, 8, 1, 1}},
                            2271560481};
constexpr Form<2> kForm2 = {
    {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}}, {{1, 1, 1, 0}, {0, 1, -1, 1}}, 1};

template <class F, const F& kForm>
void winograd_input(const WinogradInput* params) {
  const WinogradInput& p = *params;
  for (int32_t c = 0; c < p.n; ++c) {
    int16_t* v = p.v + c / kWinogradChunk * p.chunk_stride + c % kWinogradChunk;
    for (int i = 0; i < F::kIn; ++i) {
      for (int j = 0; j < F::kIn; ++j) {
        int32_t sum = 0;
        for (int y = 0; y < F::kIn; ++y) {
          for (int x = 0; x < F::kIn; ++x) {
            sum += kForm.input[i][y] * kForm.input[j][x] * (p.a[y * p.row_stride + x * p.a_stride + c] - p.zero_point);
          }
        }
        v[(i * F::kIn + j) * p.position_stride] = static_cast<int16_t>(sum);
      }
    }
  }
}

void winograd_products(const WinogradProducts* params) {
  const WinogradProducts& p = *params;
  const int16_t* u = p.u;
  for (int32_t position = 0; position < p.positions; ++position) {
    int32_t* m = p.m + position * p.m_position_stride;
    for (int32_t i = 0; i < p.patches * kNr; ++i) m[i] = 0;
    for (int32_t c = 0; c < p.k; ++c, u += kNr) {
      const int16_t* v = p.v + position * p.v_position_stride + c / kWinogradChunk * p.v_chunk_stride;
      for (int32_t patch = 0; patch < p.patches; ++patch) {
        const int32_t a = v[patch * kWinogradChunk + c % kWinogradChunk];
        for (int n = 0; n < kNr; ++n) {
          uint32_t* sum = reinterpret_cast<uint32_t*>(m + patch * kNr + n);
          *sum += static_cast<uint32_t>(a * u[n]);
        }
      }
    }
  }
}

template <class F, const F& kForm, class Out>
void winograd_output(const WinogradOutput* params) {
  const WinogradOutput& p = *params;
  for (int32_t y = 0; y < p.rows; ++y) {
    for (int32_t x = 0; x < p.columns; ++x) {
      Out* c = static_cast<Out*>(p.c) + y * p.c_row_stride + x * p.c_stride;
      for (int32_t n = 0; n < p.n; ++n) {
        uint32_t sum = 0;
        for (int i = 0; i < F::kIn; ++i) {
          for (int j = 0; j < F::kIn; ++j) {
            sum += static_cast<uint32_t>(kForm.output[y][i] * kForm.output[x][j]) *
                   static_cast<uint32_t>(p.m[(i * F::kIn + j) * p.position_stride + n]);
          }
        }
        const int32_t acc = static_cast<int32_t>(sum * kForm.inverse) >> 2;
        float r = fmaf(static_cast<float>(acc), p.multiplier[n], p.bias[n]);
        if (p.residual) {
          const uint8_t q = p.residual[y * p.residual_row_stride + x * p.residual_stride + n];
          r = add_residual(r, q, p.residual_multiplier, p.inner);
        }
        store(r, p.qmin, p.qmax, c + n);
      }
    }
  }
}

template <class F, const F& kForm>
WinogradKernel winograd_kernel(const char* name) {
  return {name,
          winograd_input<F, kForm>,
          winograd_products,
          winograd_output<F, kForm, uint8_t>,
          winograd_output<F, kForm, float>,
          F::kOut,
          1,
          kNr,
          1,
          0};
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

// ---- LSQ ------------------------------------------------------------------------------------------------------------

// NaN fails both comparisons and stays.
float lsq_code(float x, const LsqParams& p) {
  const float low = p.qmin > x ? p.qmin : x;
  return rintf(p.qmax < low ? p.qmax : low);
}

void lsq_forward(const LsqParams* params) {
  const LsqParams& p = *params;
  for (size_t i = 0; i < p.n; ++i) p.c[i] = lsq_code(p.value[i] / p.step, p) * p.step;
}

double add_up(const double (&sums)[8]) {
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

double lsq_error(const LsqParams* params) {
  const LsqParams& p = *params;
  double sums[8] = {};
  for (size_t i = 0; i < p.n; ++i) {
    const float error = lsq_code(p.value[i] / p.step, p) * p.step - p.value[i];
    sums[i % 8] += static_cast<double>(error * error);
  }
  return add_up(sums);
}

double lsq_backward(const LsqParams* params) {
  const LsqParams& p = *params;
  double sums[8] = {};
  for (size_t i = 0; i < p.n; ++i) {
    const float x = p.value[i] / p.step, code = lsq_code(x, p), grad = p.grad[i];
    const bool inside = x >= p.qmin && x <= p.qmax;
    p.c[i] = inside ? grad : 0;
    sums[i % 8] += static_cast<double>(grad * (inside ? code - x : code));
  }
  return add_up(sums);
}

}  // namespace

void init_scalar(Kernels* kernels) {
  kernels->isa = "scalar";
  const ConvKernel kernel = {"qu8_qc8w_conv_14x16c4__scalar",
                             conv<uint8_t>,
                             conv<int16_t>,
                             conv<float>,
                             kMr,
                             kStrips,
                             kNr,
                             WeightFormat::s8x4};
  for (int bits = 2; bits <= 8; ++bits) kernels->conv[bits] = kernel;
  kernels->grouped = {};
  kernels->winograd[0] = winograd_kernel<Form<4>, kForm4>("qu8_qc8w_winograd_4x4_1x16__scalar");
  kernels->winograd[1] = winograd_kernel<Form<2>, kForm2>("qu8_qc8w_winograd_2x2_1x16__scalar");
  kernels->depthwise = depthwise;
  kernels->depthwise_channels = 1;
  kernels->max_pool = max_pool;
  kernels->avg_pool_qu8 = avg_pool<uint8_t>;
  kernels->avg_pool_f32 = avg_pool<float>;
  kernels->add_qu8 = add<uint8_t>;
  kernels->add_f32 = add<float>;
  kernels->mul_qu8 = mul<uint8_t>;
  kernels->mul_f32 = mul<float>;
  kernels->table = table;
  kernels->quantize = quantize;
  kernels->scale_add = scale_add;
  kernels->mean = mean;
  kernels->weigh = weigh;
  kernels->depthwise_f32 = depthwise_f32;
  kernels->norm_row_sums = norm_row_sums;
  kernels->norm_channel_sums = norm_channel_sums;
  kernels->norm = norm;
  kernels->attention_q = attention_q;
  kernels->attention_keys = attention_keys;
  kernels->attention_values = attention_values;
  kernels->attention_weights = attention_weights;
  kernels->attention_output = attention_output;
  kernels->lsq_forward = lsq_forward;
  kernels->lsq_backward = lsq_backward;
  kernels->lsq_error = lsq_error;
}

}  // namespace qdeploy
