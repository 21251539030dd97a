// The transforms of the Winograd kernels (ukernels.h), for vectors of any width: V is a GCC vector of unsigned integers,
// whose arithmetic wraps. An instruction set adds how it loads, multiplies and requantizes.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../ukernels.h"
#include "compiler.h"

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

constexpr int kWinogradShift = 2;

// U comes from memory, one line after the other: how far ahead it is fetched, in bytes. In ResNet-18 (AVX512-VNNI, 28x28
// of 128 channels): 195 us, 207 with half of it, 227 with a quarter.
constexpr int kFetchAhead = 16384;

struct Winograd4 {
  static constexpr int kOut = 4, kIn = 6;
  // The rows of BT add up to 0 but for row 1, so that only position (1, 1) sees the zero point.
  static constexpr int kZeroPoint = 36;
  static constexpr uint32_t kInverse = 2271560481;

  // x = BT x
  template <class V>
  static QD_INLINE void input(V (&x)[kIn]) {
    const V p = x[3] - x[1], q = x[4] - x[2], pp = p + p, qq = q + q, r = qq - pp;
    const V sum = x[1] + x[2], difference = x[2] - x[3];
    const V first = x[0] - x[2], last = x[5] - x[3];
    x[0] = (first + first) + (r - p);
    x[1] = (sum + sum) + (sum + (p - qq));
    x[2] = (difference + difference) + (difference + r);
    x[3] = p + qq;
    x[4] = q - pp;
    x[5] = (last + last) - (pp + (qq + q));
  }

  // y = AT x
  template <class V>
  static QD_INLINE void output(const V (&x)[kIn], V (&y)[kOut]) {
    const V p = x[1] + x[2], q = x[1] - x[2], twice = x[4] << 1;
    y[0] = (x[0] + p) + (x[3] - (x[4] << 3));
    y[1] = q + ((x[3] + twice) << 1);
    y[2] = p + (((x[3] << 1) - x[4]) << 1);
    y[3] = (q + (x[3] << 3)) + (x[4] + x[5]);
  }
};

struct Winograd2 {
  static constexpr int kOut = 2, kIn = 4;
  static constexpr int kZeroPoint = 4;
  static constexpr uint32_t kInverse = 1;

  template <class V>
  static QD_INLINE void input(V (&x)[kIn]) {
    const V p = x[1] + x[2], q = x[2] - x[1];
    x[0] = x[0] - x[2];
    x[3] = x[3] - x[1];
    x[1] = p;
    x[2] = q;
  }

  template <class V>
  static QD_INLINE void output(const V (&x)[kIn], V (&y)[kOut]) {
    y[0] = x[0] + x[1] + x[2];
    y[1] = x[1] - x[2] + x[3];
  }
};

// The input transform of one vector of channels: load(pixel), store(position, vector).
template <class F, class V, class Load, class Store>
QD_INLINE void transform_input(const WinogradInput& p, const uint8_t* a, const Load& load, const Store& store) {
  V x[F::kIn][F::kIn];
  QD_UNROLL for (int j = 0; j < F::kIn; ++j) {
    V column[F::kIn];
    QD_UNROLL for (int i = 0; i < F::kIn; ++i) column[i] = load(a + i * p.row_stride + j * p.a_stride);
    F::input(column);
    QD_UNROLL for (int i = 0; i < F::kIn; ++i) x[i][j] = column[i];
  }
  QD_UNROLL for (int i = 0; i < F::kIn; ++i) {
    F::input(x[i]);
    if (i == 1) x[1][1] -= static_cast<uint16_t>(F::kZeroPoint * p.zero_point);
    QD_UNROLL for (int j = 0; j < F::kIn; ++j) store(i * F::kIn + j, x[i][j]);
  }
}

// The output transform of one vector of channels: load(position), store(pixel, Y), where Y is a multiple of acc.
template <class F, class V, class Load, class Store>
QD_INLINE void transform_output(const Load& load, const Store& store) {
  V y[F::kOut][F::kIn];
  QD_UNROLL for (int j = 0; j < F::kIn; ++j) {
    V column[F::kIn], sums[F::kOut];
    QD_UNROLL for (int i = 0; i < F::kIn; ++i) column[i] = load(i * F::kIn + j);
    F::output(column, sums);
    QD_UNROLL for (int i = 0; i < F::kOut; ++i) y[i][j] = sums[i];
  }
  QD_UNROLL for (int i = 0; i < F::kOut; ++i) {
    V sums[F::kOut];
    F::output(y[i], sums);
    QD_UNROLL for (int j = 0; j < F::kOut; ++j) store(i * F::kOut + j, sums[j]);
  }
}

// All positions, by groups of patches of nearly equal size: runs[r - 1] multiplies r of them at one position.
template <int kMost, class Run>
QD_INLINE void run_positions(const WinogradProducts& p, int nr, const Run (&runs)[kMost]) {
  const int32_t groups = (p.patches + kMost - 1) / kMost, at_once = (p.patches + groups - 1) / groups;
  for (int32_t position = 0; position < p.positions; ++position) {
    const int16_t* v = p.v + position * p.v_position_stride;
    const int16_t* u = p.u + position * static_cast<ptrdiff_t>(p.k) * nr;
    int32_t* m = p.m + position * p.m_position_stride;
    for (int32_t patch = 0; patch < p.patches; patch += at_once) {
      const int32_t r = p.patches - patch < at_once ? p.patches - patch : at_once;
      runs[r - 1](p, v + patch * kWinogradChunk, u, m + patch * nr);
    }
  }
}

}  // namespace
}  // namespace qdeploy
