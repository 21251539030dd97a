// The kernels of norm, by the lanes of rows.h. Beyond the loads, an element costs an integer multiplication, one of
// floats and an fma; the sums of a row two vpmaddwd for 16 elements.
#pragma once
#include "rows.h"

namespace qdeploy {
namespace {

template <class L>
void norm_row_sums(const NormSumsParams* params) {
  const NormSumsParams& p = *params;
  with_codes(p.a_type, [&](auto type) {
    const auto* a = static_cast<const typename decltype(type)::type*>(p.a);
    for (size_t row = 0; row < p.rows; ++row, a += p.a_stride) {
      typename L::Sums sums;
      for_each_block(p.n, [&](size_t i, size_t n) __attribute__((always_inline)) { sums.add(a + i, n); });
      p.sums[row] = sums.sum();
      p.squares[row] = sums.squares();
    }
  });
}

template <class L>
void norm_channel_sums(const NormSumsParams* params) {
  const NormSumsParams& p = *params;
  with_codes(p.a_type, [&](auto type) {
    for_each_block(p.n, [&](size_t i, size_t n) {
      typename L::ChannelSums of;
      const auto* a = static_cast<const typename decltype(type)::type*>(p.a) + i;
      for (size_t row = 0; row < p.rows; ++row, a += p.a_stride) of.add(L::load(a));
      int32_t sums[kLanes];
      int64_t squares[kLanes];
      L::store(of.sums(), sums);
      of.squares(squares);
      for (size_t j = 0; j < n; ++j) p.sums[i + j] += sums[j], p.squares[i + j] += squares[j];
    });
  });
}

template <class L, class A, class C, bool kByChannel>
__attribute__((noinline)) void norm_rows(const NormParams& p) {
  const typename L::I32 count = L::splat(p.count);
  const A* a = static_cast<const A*>(p.a);
  C* c = static_cast<C*>(p.c);
  for (size_t row = 0; row < p.rows; ++row, a += p.a_stride, c += p.c_stride) {
    typename L::I32 sum = L::splat(p.sums[kByChannel ? 0 : row]);
    typename L::F32 scale = L::splat(p.scales[kByChannel ? 0 : row]);
    for_each_block(p.n, [&](size_t i, size_t n) __attribute__((always_inline)) {
      if (kByChannel) sum = L::load(p.sums + i), scale = L::load(p.scales + i);
      const typename L::F32 t = L::mul(L::to_f32(L::sub(L::mul(L::load(a + i), count), sum)), scale);
      L::store(L::fma(t, L::load(p.multiplier + i), L::load(p.bias + i)), p.qmin, p.qmax, n, c + i);
    });
  }
}

template <class L>
void norm(const NormParams* params) {
  with_codes(params->a_type, [&](auto a) {
    with_output(params->c_type, [&](auto c) {
      using A = typename decltype(a)::type;
      using C = typename decltype(c)::type;
      params->by_channel ? norm_rows<L, A, C, true>(*params) : norm_rows<L, A, C, false>(*params);
    });
  });
}

}  // namespace
}  // namespace qdeploy
