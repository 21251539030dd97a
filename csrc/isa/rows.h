// The kernels of rows, 16 elements at a time. `Lanes` is what an instruction set gives, as in avx2_lanes.h: its vectors
// F32 and I32 of 16 elements, their arithmetic, sums, and loads and stores of every type. A last, shorter block is
// computed whole and written in part.
#pragma once
#include "../ukernels.h"
#include "compiler.h"

namespace qdeploy {
namespace {

constexpr size_t kLanes = 16;

// run(i, n) for the blocks of a row: n elements from element i on.
template <class Run>
QD_INLINE void for_each_block(size_t n, const Run& run) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) run(i, kLanes);
  if (i < n) run(i, n - i);
}

template <class T>
struct Tag {
  using type = T;
};

// run(Tag<T>) with the C++ type of codes, and of outputs.
template <class Run>
QD_INLINE void with_codes(Dtype type, const Run& run) {
  type == Dtype::u8 ? run(Tag<uint8_t>()) : run(Tag<int16_t>());
}
template <class Run>
QD_INLINE void with_output(Dtype type, const Run& run) {
  type == Dtype::f32 ? run(Tag<float>()) : with_codes(type, run);
}

// ---- Scale and add --------------------------------------------------------------------------------------------------

// addend(i) is what is added to the elements i.. of a.
template <class L, class A, class C, class Addend>
__attribute__((noinline)) void scale_add_row(const ScaleAddParams& p, const Addend& addend) {
  const typename L::F32 multiplier = L::splat(p.multiplier_a);
  const A* a = static_cast<const A*>(p.a);
  C* c = static_cast<C*>(p.c);
  for_each_block(p.n, [&](size_t i, size_t n) __attribute__((always_inline)) {
    L::store(L::fma(L::to_f32(L::load(a + i)), multiplier, addend(i)), p.qmin, p.qmax, n, c + i);
  });
}

template <class L, class A, class Addend>
QD_INLINE void scale_add_to_output(const ScaleAddParams& p, const Addend& addend) {
  with_output(p.c_type, [&](auto c) { scale_add_row<L, A, typename decltype(c)::type>(p, addend); });
}

template <class L>
void scale_add(const ScaleAddParams* params) {
  const ScaleAddParams& p = *params;
  const typename L::F32 multiplier_b = L::splat(p.multiplier_b), bias = L::splat(p.bias);
  const float* floats = static_cast<const float*>(p.b);
  const auto add_floats = [=](size_t i) __attribute__((always_inline)) { return L::load(floats + i); };
  const auto add_bias = [=](size_t) __attribute__((always_inline)) { return bias; };
  if (p.a_type == Dtype::s8) return scale_add_to_output<L, int8_t>(p, add_floats);
  if (p.a_type == Dtype::i32) return scale_add_to_output<L, int32_t>(p, add_bias);
  with_codes(p.a_type, [&](auto a) {
    using A = typename decltype(a)::type;
    if (!p.b) return scale_add_to_output<L, A>(p, add_bias);
    if (p.b_type == Dtype::f32) return scale_add_to_output<L, A>(p, add_floats);
    with_codes(p.b_type, [&](auto b) {
      const auto* codes = static_cast<const typename decltype(b)::type*>(p.b);
      scale_add_to_output<L, A>(p, [=](size_t i) __attribute__((always_inline)) {
        return L::fma(L::to_f32(L::load(codes + i)), multiplier_b, bias);
      });
    });
  });
}

// ---- Sums: mean, and by weights -----------------------------------------------------------------------------------------------------------

template <class L, class A, class C>
__attribute__((noinline)) void mean_of(const MeanParams& p) {
  const typename L::F32 multiplier = L::splat(p.multiplier), bias = L::splat(p.bias);
  for_each_block(p.n, [&](size_t i, size_t n) __attribute__((always_inline)) {
    typename L::I32 acc = L::splat(-p.offset);
    const A* row = static_cast<const A*>(p.a) + i;
    for (size_t y = 0; y < p.rows; ++y, row += p.row_stride) {
      const A* a = row;
      for (size_t x = 0; x < p.columns; ++x, a += p.column_stride) acc = L::add(acc, L::load(a));
    }
    L::store(L::fma(L::to_f32(acc), multiplier, bias), p.qmin, p.qmax, n, static_cast<C*>(p.c) + i);
  });
}

template <class L>
void mean(const MeanParams* params) {
  with_codes(params->a_type, [&](auto a) {
    with_output(params->c_type,
                [&](auto c) { mean_of<L, typename decltype(a)::type, typename decltype(c)::type>(*params); });
  });
}

template <class L, class A>
__attribute__((noinline)) void weigh_rows(const WeighParams& p) {
  for (size_t i = 0; i < p.n; i += kLanes) {
    typename L::I32 acc = L::splat(p.start);
    const A* a = static_cast<const A*>(p.a) + i;
    for (size_t k = 0; k < p.taps; ++k, a += p.a_stride) acc = L::add(acc, L::mul(L::load(a), L::splat(p.weights[k])));
    L::store(acc, p.c + i);
  }
}

template <class L>
void weigh(const WeighParams* params) {
  params->a_type == Dtype::u8 ? weigh_rows<L, uint8_t>(*params) : weigh_rows<L, int32_t>(*params);
}

// ---- Depthwise convolution ------------------------------------------------------------------------------------------

template <class L, int kPixels>
QD_INLINE void depthwise_pixels_f32(const DepthwiseParams& p, const uint8_t* a, float* c) {
  for_each_block(static_cast<size_t>(p.n), [&](size_t i, size_t n) __attribute__((always_inline)) {
    typename L::I32 acc[kPixels];
    QD_UNROLL for (int q = 0; q < kPixels; ++q) acc[q] = L::load(p.comp + i);
    const int8_t* w = p.w + i;
    for (int32_t t = 0; t < p.cells; ++t, w += p.w_stride) {
      const typename L::I32 codes = L::load(w);
      const uint8_t* cell = a + p.cell_offset[t] + i;
      QD_UNROLL for (int q = 0; q < kPixels; ++q) {
        acc[q] = L::add(acc[q], L::mul_s16(L::load(cell + q * p.a_stride), codes));
      }
    }
    const typename L::F32 multiplier = L::load(p.multiplier + i), bias = L::load(p.bias + i);
    QD_UNROLL for (int q = 0; q < kPixels; ++q) {
      L::store(L::fma(L::to_f32(acc[q]), multiplier, bias), 0, 0, n, c + q * p.c_stride + i);
    }
  });
}

template <class L>
void depthwise_f32(const DepthwiseParams* params, size_t pixels, float* c) {
  const DepthwiseParams& p = *params;
  const uint8_t* a = p.a;
  for (; pixels >= 4; pixels -= 4, a += 4 * p.a_stride, c += 4 * p.c_stride) depthwise_pixels_f32<L, 4>(p, a, c);
  for (; pixels > 0; --pixels, a += p.a_stride, c += p.c_stride) depthwise_pixels_f32<L, 1>(p, a, c);
}

}  // namespace
}  // namespace qdeploy
