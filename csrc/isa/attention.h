// The weights and the output of attention, by the lanes of rows.h. A logit costs a conversion and an fma for t, and
// about 14 more instructions of 16 lanes for its weight; both passes run in L1.
#pragma once
#include <string.h>

#include "rows.h"

namespace qdeploy {
namespace {

// peak * 2^d, d <= 0, rounded to an integer.
template <class L>
class Weights {
 public:
  explicit QD_INLINE Weights(float peak) : peak_(L::splat(peak)) {
    float c[4];
    memcpy(c, kWeightBits, sizeof c);
    for (int i = 0; i < 4; ++i) c_[i] = L::splat(c[i]);
  }
  QD_INLINE typename L::I32 operator()(typename L::F32 d) const {
    const typename L::F32 n = L::rint(d), f = L::sub(d, n);
    typename L::F32 y = L::fma(c_[3], f, c_[2]);
    y = L::fma(y, f, c_[1]);
    y = L::fma(y, f, c_[0]);
    y = L::fma(y, f, L::splat(1.0f));
    return L::rint_i32(L::times_power(L::mul(y, peak_), n));
  }

 private:
  typename L::F32 c_[4], peak_;
};

// t of a row, in place of its logits; returns the largest.
template <class L, bool kBias, bool kRegions>
QD_INLINE float shift_row(const AttentionWeights& p, int32_t row) {
  const typename L::F32 multiplier = L::splat(p.logit_multiplier), left_out = L::splat(-__builtin_inff());
  const float* bias = p.bias + row * p.bias_stride;
  typename L::F32 largest = left_out;
  for (int32_t first = 0; first < p.keys; first += p.nr) {
    int32_t* logits = p.logits + first / p.nr * p.panel_stride + row * p.nr;
    for (int32_t j = 0; j < p.nr && first + j < p.keys; j += 16) {
      const int32_t key = first + j;
      typename L::F32 t =
          L::fma(L::to_f32(L::load(logits + j)), multiplier, kBias ? L::load(bias + key) : L::splat(0.0f));
      if (kRegions) t = L::where_equal(L::load(p.key_regions + key), L::splat(p.row_regions[row]), t, left_out);
      if (p.keys - key < 16) t = L::first(t, p.keys - key, left_out);
      largest = L::max(largest, t);
      L::store(t, reinterpret_cast<float*>(logits + j));
    }
  }
  return L::largest(largest);
}

// The weights of a row from its t; returns their sum.
template <class L>
QD_INLINE int32_t weigh_row(const AttentionWeights& p, const Weights<L>& weights, int32_t row, float largest) {
  const typename L::F32 largest_f32 = L::splat(largest), least = L::splat(-32.0f);
  typename L::I32 sum = L::splat(0);
  for (int32_t first = 0; first < p.keys; first += p.nr) {
    const int32_t* logits = p.logits + first / p.nr * p.panel_stride + row * p.nr;
    for (int32_t j = 0; j < p.nr && first + j < p.keys; j += 16) {
      const int32_t key = first + j;
      const typename L::F32 t = L::load(reinterpret_cast<const float*>(logits + j));
      const typename L::I32 codes = weights(L::max(L::sub(t, largest_f32), least));
      sum = L::add(sum, codes);
      L::store_i16(codes, p.p + key / kWinogradChunk * p.chunk_stride + row * kWinogradChunk + key % kWinogradChunk);
    }
  }
  return L::total(sum);
}

template <class L>
void attention_weights(const AttentionWeights* params) {
  const AttentionWeights& p = *params;
  const Weights<L> weights(p.peak);
  for (int32_t row = 0; row < p.rows; ++row) {
    const float largest = p.row_regions
                              ? (p.bias ? shift_row<L, true, true>(p, row) : shift_row<L, false, true>(p, row))
                          : p.bias ? shift_row<L, true, false>(p, row)
                                   : shift_row<L, false, false>(p, row);
    p.sums[row] = weigh_row<L>(p, weights, row, largest);
  }
}

template <class L>
void attention_output(const AttentionOutput* params) {
  const AttentionOutput& p = *params;
  const typename L::F32 bias = L::splat(p.bias);
  for (int32_t row = 0; row < p.rows; ++row) {
    const typename L::F32 scale = L::splat(p.scales[row]);
    for_each_block(static_cast<size_t>(p.n), [&](size_t i, size_t n) __attribute__((always_inline)) {
      const int32_t channel = static_cast<int32_t>(i);
      const int32_t* acc = p.acc + channel / p.nr * p.panel_stride + row * p.nr + channel % p.nr;
      L::store(L::fma(L::to_f32(L::load(acc)), scale, bias), p.qmin, p.qmax, n, p.c + row * p.c_stride + i);
    });
  }
}

}  // namespace
}  // namespace qdeploy
