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
  if (p.a_type == Dtype::s8) return scale_add_to_output<L, int8_t>(p, add_floats);
  with_codes(p.a_type, [&](auto a) {
    using A = typename decltype(a)::type;
    if (!p.b) {
      return scale_add_to_output<L, A>(p, [=](size_t) __attribute__((always_inline)) { return bias; });
    }
    if (p.b_type == Dtype::f32) return scale_add_to_output<L, A>(p, add_floats);
    with_codes(p.b_type, [&](auto b) {
      const auto* codes = static_cast<const typename decltype(b)::type*>(p.b);
      scale_add_to_output<L, A>(p, [=](size_t i) __attribute__((always_inline)) {
        return L::fma(L::to_f32(L::load(codes + i)), multiplier_b, bias);
      });
    });
  });
}

// ---- Mean -----------------------------------------------------------------------------------------------------------

template <class L, class A, class C>
__attribute__((noinline)) void mean_of(const MeanParams& p) {
  const typename L::F32 multiplier = L::splat(p.multiplier), bias = L::splat(p.bias);
  for_each_block(p.n, [&](size_t i, size_t n) __attribute__((always_inline)) {
    typename L::I32 acc = L::splat(-p.offset);
    const A* a = static_cast<const A*>(p.a) + i;
    for (size_t row = 0; row < p.rows; ++row, a += p.a_stride) acc = L::add(acc, L::load(a));
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

}  // namespace
}  // namespace qdeploy
