// The weights and the output of attention, by the lanes of rows.h. A logit costs a conversion and an fma for t, and
// about 13 more instructions of 16 lanes for its weight; both passes run in L1.
#pragma once
#include <string.h>

#include "rows.h"

namespace qdeploy {
namespace {

// peak * 2^d, -32 <= d <= 0, rounded to an integer.
template <class L>
class Weights {
 public:
  explicit QD_INLINE Weights(float peak) : peak_(L::splat(peak)) {
    float c[4];
    memcpy(c, kWeightBits, sizeof c);
    for (int i = 0; i < 4; ++i) c_[i] = L::splat(c[i]);
  }
  // A number beyond 2^23 has no fraction: what d loses there is its rounding, and the low bits are the integer.
  QD_INLINE typename L::I32 operator()(typename L::F32 d) const {
    const typename L::F32 large = L::splat(0x1.8p23f), shifted = L::add(d, large);
    const typename L::F32 f = L::sub(d, L::sub(shifted, large));
    typename L::F32 y = L::fma(c_[3], f, c_[2]);
    y = L::fma(y, f, c_[1]);
    y = L::fma(y, f, c_[0]);
    y = L::fma(y, f, L::splat(1.0f));
    return L::rint_i32(L::add_exponent(L::mul(y, peak_), shifted));
  }

 private:
  typename L::F32 c_[4], peak_;
};

// Some rows of a block. All of them take 16 keys before the next 16, so that no row waits for its own largest, and what
// belongs to the keys is loaded once.
template <class L>
struct WeightRows {
  using F32 = typename L::F32;
  using I32 = typename L::I32;
  static constexpr int32_t kRows = 16;

  const AttentionWeights& p;
  const int32_t first, rows;
  F32 largest[kRows];
  I32 sums[kRows];

  // run(logits, key) for all blocks of keys, the logits those of the first of the rows.
  template <class Run>
  QD_INLINE void for_each_block(const Run& run) const {
    int32_t* panel = p.logits + first * p.nr;
    for (int32_t key = 0; key < p.keys; panel += p.panel_stride) {
      const int32_t end = p.keys - key < p.nr ? p.keys : key + p.nr;
      for (int32_t* logits = panel; key < end; key += 16, logits += 16) run(logits, key);
    }
  }

  // t in place of the logits.
  template <bool kBias, bool kRegions>
  QD_INLINE void shift() {
    const F32 multiplier = L::splat(p.logit_multiplier), left_out = L::splat(-__builtin_inff());
    for (int32_t row = 0; row < rows; ++row) largest[row] = left_out;
    for_each_block([&](int32_t* logits, int32_t key) __attribute__((always_inline)) {
      const float* bias = kBias ? p.bias + first * p.bias_stride + key : nullptr;
      const bool last = p.keys - key < 16;
      for (int32_t row = 0; row < rows; ++row, logits += p.nr) {
        F32 t = L::fma(L::to_f32(L::load(logits)), multiplier, kBias ? L::load(bias) : L::splat(0.0f));
        if (kBias) bias += p.bias_stride;
        if (kRegions) {
          t = L::where_equal(L::load(p.key_regions + key), L::splat(p.row_regions[first + row]), t, left_out);
        }
        if (last) t = L::first(t, p.keys - key, left_out);
        largest[row] = L::max(largest[row], t);
        L::store(t, reinterpret_cast<float*>(logits));
      }
    });
  }

  QD_INLINE void weigh(const Weights<L>& weights) {
    const F32 least = L::splat(-32.0f);
    for (int32_t row = 0; row < rows; ++row) {
      largest[row] = L::splat(L::largest(largest[row]));
      sums[row] = L::splat(0);
    }
    for_each_block([&](const int32_t* logits, int32_t key) __attribute__((always_inline)) {
      int16_t* c = p.p + key / kWinogradChunk * p.chunk_stride + first * kWinogradChunk + key % kWinogradChunk;
      for (int32_t row = 0; row < rows; ++row, logits += p.nr, c += kWinogradChunk) {
        const F32 t = L::load(reinterpret_cast<const float*>(logits));
        const I32 codes = weights(L::max(L::sub(t, largest[row]), least));
        sums[row] = L::add(sums[row], codes);
        L::store_i16(codes, c);
      }
    });
    for (int32_t row = 0; row < rows; ++row) p.sums[first + row] = L::total(sums[row]);
  }
};

template <class L, bool kBias, bool kRegions>
__attribute__((noinline)) void weigh_rows(const AttentionWeights& p) {
  const Weights<L> weights(p.peak);
  const int32_t groups = (p.rows + WeightRows<L>::kRows - 1) / WeightRows<L>::kRows;
  const int32_t at_once = (p.rows + groups - 1) / groups;  // nearly equal: a row alone waits for itself
  for (int32_t row = 0; row < p.rows; row += at_once) {
    WeightRows<L> some = {p, row, p.rows - row < at_once ? p.rows - row : at_once, {}, {}};
    some.template shift<kBias, kRegions>();
    some.weigh(weights);
  }
}

template <class L>
void attention_weights(const AttentionWeights* params) {
  const AttentionWeights& p = *params;
  if (p.row_regions) return p.bias ? weigh_rows<L, true, true>(p) : weigh_rows<L, false, true>(p);
  p.bias ? weigh_rows<L, true, false>(p) : weigh_rows<L, false, false>(p);
}

template <class L>
void attention_output(const AttentionOutput* params) {
  const AttentionOutput& p = *params;
  const typename L::F32 bias = L::splat(p.bias);
  const int32_t* panel = p.acc;
  for (int32_t first = 0; first < p.n; first += p.nr, panel += p.panel_stride) {
    const size_t n = static_cast<size_t>(p.n - first < p.nr ? p.n - first : p.nr);
    for (int32_t row = 0; row < p.rows; ++row) {
      const typename L::F32 scale = L::splat(p.scales[row]);
      const int32_t* acc = panel + row * p.nr;
      uint8_t* c = p.c + row * p.c_stride + first;
      for_each_block(n, [&](size_t i, size_t lanes) __attribute__((always_inline)) {
        L::store(L::fma(L::to_f32(L::load(acc + i)), scale, bias), p.qmin, p.qmax, lanes, c + i);
      });
    }
  }
}

}  // namespace
}  // namespace qdeploy
