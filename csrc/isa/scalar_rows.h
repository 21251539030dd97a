// The definition of the kernels of rows, norm and attention, in portable C++: what scalar.cc has not.
#pragma once
#include <math.h>
#include <string.h>

#include "../ukernels.h"

namespace qdeploy {
namespace {

// The clamp comes first, in float, where it equals clamp(rint(r)) because the bounds are integers: any r, even one that
// no integer type holds, has a defined result. The form of the comparisons sends NaN to qmin, as vmaxps does.
uint8_t quantize_u8(float r, uint8_t qmin, uint8_t qmax) {
  const float low = r > static_cast<float>(qmin) ? r : static_cast<float>(qmin);
  const float high = low < static_cast<float>(qmax) ? low : static_cast<float>(qmax);
  return static_cast<uint8_t>(nearbyintf(high));
}

int32_t code(const void* a, Dtype type, size_t i) {
  if (type == Dtype::u8) return static_cast<const uint8_t*>(a)[i];
  if (type == Dtype::i32) return static_cast<const int32_t*>(a)[i];
  return type == Dtype::s16 ? static_cast<const int16_t*>(a)[i] : static_cast<const int8_t*>(a)[i];
}

const void* row_of(const void* a, Dtype type, ptrdiff_t elements) {
  return static_cast<const uint8_t*>(a) + elements * (type == Dtype::i32 ? 4 : type == Dtype::s16 ? 2 : 1);
}

void store(float r, Dtype type, uint8_t qmin, uint8_t qmax, void* c, size_t i) {
  if (type == Dtype::u8) static_cast<uint8_t*>(c)[i] = quantize_u8(r, qmin, qmax);
  if (type == Dtype::s16) static_cast<int16_t*>(c)[i] = static_cast<int16_t>(rintf(fminf(fmaxf(r, -32767), 32767)));
  if (type == Dtype::f32) static_cast<float*>(c)[i] = r;
}

void scale_add(const ScaleAddParams* params) {
  const ScaleAddParams& p = *params;
  for (size_t i = 0; i < p.n; ++i) {
    float x = p.bias;
    if (p.b && p.b_type == Dtype::f32) x = static_cast<const float*>(p.b)[i];
    if (p.b && p.b_type != Dtype::f32) x = fmaf(static_cast<float>(code(p.b, p.b_type, i)), p.multiplier_b, p.bias);
    store(fmaf(static_cast<float>(code(p.a, p.a_type, i)), p.multiplier_a, x), p.c_type, p.qmin, p.qmax, p.c, i);
  }
}

void mean(const MeanParams* params) {
  const MeanParams& p = *params;
  for (size_t i = 0; i < p.n; ++i) {
    int32_t acc = -p.offset;
    for (size_t j = 0; j < p.rows * p.columns; ++j) {
      const ptrdiff_t row = static_cast<ptrdiff_t>(j / p.columns), column = static_cast<ptrdiff_t>(j % p.columns);
      acc += code(row_of(p.a, p.a_type, row * p.row_stride + column * p.column_stride), p.a_type, i);
    }
    store(fmaf(static_cast<float>(acc), p.multiplier, p.bias), p.c_type, p.qmin, p.qmax, p.c, i);
  }
}

void weigh(const WeighParams* params) {
  const WeighParams& p = *params;
  for (size_t i = 0; i < (p.n + 15) / 16 * 16; ++i) {
    uint32_t acc = static_cast<uint32_t>(p.start);
    for (size_t k = 0; k < p.taps && i < p.n; ++k) {
      const int32_t a = code(row_of(p.a, p.a_type, static_cast<ptrdiff_t>(k) * p.a_stride), p.a_type, i);
      acc += static_cast<uint32_t>(p.weights[k]) * static_cast<uint32_t>(a);
    }
    p.c[i] = static_cast<int32_t>(acc);
  }
}

void depthwise_f32(const DepthwiseParams* params, size_t pixels, float* c) {
  const DepthwiseParams& p = *params;
  for (size_t pixel = 0; pixel < pixels; ++pixel, c += p.c_stride) {
    const uint8_t* a = p.a + static_cast<ptrdiff_t>(pixel) * p.a_stride;
    for (int32_t n = 0; n < p.n; ++n) {
      int32_t acc = p.comp[n];
      for (int32_t t = 0; t < p.cells; ++t) acc += a[p.cell_offset[t] + n] * p.w[t * p.w_stride + n];
      c[n] = fmaf(static_cast<float>(acc), p.multiplier[n], p.bias[n]);
    }
  }
}

// ---- Norm -----------------------------------------------------------------------------------------------------------

void norm_row_sums(const NormSumsParams* params) {
  const NormSumsParams& p = *params;
  for (size_t row = 0; row < p.rows; ++row) {
    const void* a = row_of(p.a, p.a_type, static_cast<ptrdiff_t>(row) * p.a_stride);
    p.sums[row] = 0, p.squares[row] = 0;
    for (size_t i = 0; i < p.n; ++i) {
      const int32_t q = code(a, p.a_type, i);
      p.sums[row] += q, p.squares[row] += q * q;
    }
  }
}

void norm_channel_sums(const NormSumsParams* params) {
  const NormSumsParams& p = *params;
  for (size_t row = 0; row < p.rows; ++row) {
    const void* a = row_of(p.a, p.a_type, static_cast<ptrdiff_t>(row) * p.a_stride);
    for (size_t i = 0; i < p.n; ++i) {
      const int32_t q = code(a, p.a_type, i);
      p.sums[i] += q, p.squares[i] += q * q;
    }
  }
}

void norm(const NormParams* params) {
  const NormParams& p = *params;
  for (size_t row = 0; row < p.rows; ++row) {
    const void* a = row_of(p.a, p.a_type, static_cast<ptrdiff_t>(row) * p.a_stride);
    const size_t c_row = row * static_cast<size_t>(p.c_stride);
    for (size_t i = 0; i < p.n; ++i) {
      const size_t of = p.by_channel ? i : row;
      const int64_t difference = int64_t{p.count} * code(a, p.a_type, i) - p.sums[of];
      const float t = static_cast<float>(difference) * p.scales[of];
      store(fmaf(t, p.multiplier[i], p.bias[i]), p.c_type, p.qmin, p.qmax, p.c, c_row + i);
    }
  }
}

// ---- Attention ------------------------------------------------------------------------------------------------------

int32_t round_up_8(int32_t n) { return (n + 7) / 8 * 8; }

// a minus the zero point; 0 for rows and channels that there are not.
int16_t centred(const AttentionPack& p, int32_t row, int32_t i) {
  return row < p.rows && i < p.n ? static_cast<int16_t>(p.a[row * p.a_stride + i] - p.zero_point) : int16_t{0};
}

void attention_q(const AttentionPack* params) {
  const AttentionPack& p = *params;
  for (int32_t i = 0; i < round_up_8(p.n); ++i) {
    int16_t* c = p.c + i / kWinogradChunk * p.chunk_stride + i % kWinogradChunk;
    for (int32_t row = 0; row < p.rows; ++row) c[row * kWinogradChunk] = centred(p, row, i);
  }
}

void attention_keys(const AttentionPack* params) {
  const AttentionPack& p = *params;
  int16_t* c = p.c;
  for (int32_t first = 0; first < p.rows; first += p.nr) {
    for (int32_t i = 0; i < round_up_8(p.n); i += p.pair) {
      for (int32_t key = 0; key < p.nr; ++key) {
        for (int32_t j = 0; j < p.pair; ++j) *c++ = centred(p, first + key, i + j);
      }
    }
  }
}

void attention_values(const AttentionPack* params) {
  const AttentionPack& p = *params;
  int16_t* c = p.c;
  for (int32_t first = 0; first < p.n; first += p.nr) {
    for (int32_t key = 0; key < round_up_8(p.rows); key += p.pair) {
      for (int32_t i = 0; i < p.nr; ++i) {
        for (int32_t j = 0; j < p.pair; ++j) *c++ = centred(p, key + j, first + i);
      }
    }
  }
}

// t of key j of a row.
float logit(const AttentionWeights& p, int32_t row, int32_t j) {
  if (p.row_regions && p.key_regions[j] != p.row_regions[row]) return -INFINITY;
  const int32_t acc = p.logits[j / p.nr * p.panel_stride + row * p.nr + j % p.nr];
  return fmaf(static_cast<float>(acc), p.logit_multiplier, p.bias ? p.bias[row * p.bias_stride + j] : 0);
}

// peak * 2^d, d <= 0.
int16_t weight(float d, float peak) {
  float c[4];
  memcpy(c, kWeightBits, sizeof c);
  const float n = rintf(d), f = d - n;
  const float y = fmaf(fmaf(fmaf(fmaf(c[3], f, c[2]), f, c[1]), f, c[0]), f, 1);
  return static_cast<int16_t>(rintf(ldexpf(y * peak, static_cast<int>(n))));
}

void attention_weights(const AttentionWeights* params) {
  const AttentionWeights& p = *params;
  for (int32_t row = 0; row < p.rows; ++row) {
    float largest = -INFINITY;
    for (int32_t j = 0; j < p.keys; ++j) largest = fmaxf(largest, logit(p, row, j));
    p.sums[row] = 0;
    for (int32_t j = 0; j < (p.keys + 15) / 16 * 16; ++j) {
      const int16_t weight_of_j = j < p.keys ? weight(fmaxf(logit(p, row, j) - largest, -32), p.peak) : int16_t{0};
      p.p[j / kWinogradChunk * p.chunk_stride + row * kWinogradChunk + j % kWinogradChunk] = weight_of_j;
      p.sums[row] += weight_of_j;
    }
  }
}

void attention_output(const AttentionOutput* params) {
  const AttentionOutput& p = *params;
  for (int32_t row = 0; row < p.rows; ++row) {
    for (int32_t i = 0; i < p.n; ++i) {
      const int32_t acc = p.acc[i / p.nr * p.panel_stride + row * p.nr + i % p.nr];
      p.c[row * p.c_stride + i] = quantize_u8(fmaf(static_cast<float>(acc), p.scales[row], p.bias), p.qmin, p.qmax);
    }
  }
}

}  // namespace
}  // namespace qdeploy
