// The Winograd kernels with NEON: 4 patches x 16 channels, 16 accumulators, two vectors of U and one of each patch.
// SMLAL by a lane needs no broadcast and no pairs, so U has one channel after the other. It multiplies 4 by 4, half of
// what SMULL of bytes does, and a patch of 4x4 outputs needs a quarter of the products: by counting, half the time of
// the direct kernels without dot products, and less with the transforms. None of it is measured, for want of such a
// CPU, so that the rule never takes it.
#pragma once
#include "neon_conv.h"
#include "winograd.h"

namespace qdeploy {
namespace {

constexpr int kPatches = 4;

template <class F>
void winograd_input(const WinogradInput* params) {
  const WinogradInput& p = *params;
  for (int32_t c = 0; c < p.n; c += 8) {
    int16_t* v = p.v + c / kWinogradChunk * p.chunk_stride + c % kWinogradChunk;
    const auto load = [](const uint8_t* a) __attribute__((always_inline)) { return vmovl_u8(vld1_u8(a)); };
    const auto store = [&](int position, uint16x8_t x) __attribute__((always_inline)) {
      vst1q_s16(v + position * p.position_stride, vreinterpretq_s16_u16(x));
    };
    transform_input<F, uint16x8_t>(p, p.a + c, load, store);
  }
}

// Channel kLane of each v, in the lower 16 registers, as the instruction wants it.
template <int kLane, int R>
QD_INLINE void add_channel(int32x4_t (&acc)[R][4], const int16x8_t (&v)[R], const int16_t* u) {
  int16x8_t u0, u1;
  asm volatile("ldr %q0, %1" : "=w"(u0) : "m"(*reinterpret_cast<const int16x8_t*>(u + kNr * kLane)));
  asm volatile("ldr %q0, %1" : "=w"(u1) : "m"(*reinterpret_cast<const int16x8_t*>(u + kNr * kLane + 8)));
  QD_UNROLL for (int r = 0; r < R; ++r) {
    asm volatile("smlal %0.4s, %1.4h, %2.h[%c3]" : "+w"(acc[r][0]) : "w"(u0), "x"(v[r]), "i"(kLane));
    asm volatile("smlal2 %0.4s, %1.8h, %2.h[%c3]" : "+w"(acc[r][1]) : "w"(u0), "x"(v[r]), "i"(kLane));
    asm volatile("smlal %0.4s, %1.4h, %2.h[%c3]" : "+w"(acc[r][2]) : "w"(u1), "x"(v[r]), "i"(kLane));
    asm volatile("smlal2 %0.4s, %1.8h, %2.h[%c3]" : "+w"(acc[r][3]) : "w"(u1), "x"(v[r]), "i"(kLane));
  }
}

// R patches at one position.
template <int R>
__attribute__((noinline)) void run_patches(const WinogradProducts& p, const int16_t* v, const int16_t* u, int32_t* m) {
  int32x4_t acc[R][4];
  QD_UNROLL for (int r = 0; r < R; ++r) QD_UNROLL for (int j = 0; j < 4; ++j) acc[r][j] = vdupq_n_s32(0);
  for (int32_t k = p.k; k > 0; k -= kWinogradChunk, v += p.v_chunk_stride) {
    const int16_t* channels = v;
    for (int32_t left = k < kWinogradChunk ? k : kWinogradChunk; left > 0; left -= 8, channels += 8, u += 8 * kNr) {
      __builtin_prefetch(reinterpret_cast<const char*>(u) + kFetchAhead, 0, 2);
      int16x8_t v_i16x8[R];
      QD_UNROLL for (int r = 0; r < R; ++r) v_i16x8[r] = vld1q_s16(channels + kWinogradChunk * r);
      add_channel<0>(acc, v_i16x8, u);
      add_channel<1>(acc, v_i16x8, u);
      add_channel<2>(acc, v_i16x8, u);
      add_channel<3>(acc, v_i16x8, u);
      add_channel<4>(acc, v_i16x8, u);
      add_channel<5>(acc, v_i16x8, u);
      add_channel<6>(acc, v_i16x8, u);
      add_channel<7>(acc, v_i16x8, u);
    }
  }
  QD_UNROLL for (int r = 0; r < R; ++r) {
    QD_UNROLL for (int j = 0; j < 4; ++j) vst1q_s32(m + r * kNr + 4 * j, acc[r][j]);
  }
}

void winograd_products(const WinogradProducts* params) {
  using Run = void (*)(const WinogradProducts&, const int16_t*, const int16_t*, int32_t*);
  static constexpr Run kRuns[kPatches] = {run_patches<1>, run_patches<2>, run_patches<3>, run_patches<4>};
  run_positions(*params, kNr, kRuns);
}

template <class F, class Out>
void winograd_output(const WinogradOutput* params) {
  const WinogradOutput& p = *params;
  int32_t acc_i32[F::kOut * F::kOut][kNr];
  for (int j = 0; j < kNr; j += 4) {
    const auto load = [&](int position) __attribute__((always_inline)) {
      return vreinterpretq_u32_s32(vld1q_s32(p.m + position * p.position_stride + j));
    };
    const auto store = [&](int pixel, uint32x4_t y) __attribute__((always_inline)) {
      vst1q_s32(acc_i32[pixel] + j, vshrq_n_s32(vreinterpretq_s32_u32(y * F::kInverse), kWinogradShift));
    };
    transform_output<F, uint32x4_t>(load, store);
  }
  const F32x16 multiplier = load_f32x16(p.multiplier), bias = load_f32x16(p.bias);
  for (int32_t y = 0; y < p.rows; ++y) {
    for (int32_t x = 0; x < p.columns; ++x) {
      const int32_t* acc = acc_i32[y * F::kOut + x];
      const int32x4_t acc_i32x4[4] = {vld1q_s32(acc), vld1q_s32(acc + 4), vld1q_s32(acc + 8), vld1q_s32(acc + 12)};
      F32x16 r = fma_f32x16(convert_i32x16(acc_i32x4), multiplier, bias);
      if (p.residual) {
        const uint8_t* residual = p.residual + y * p.residual_row_stride + x * p.residual_stride;
        r = p.inner ? add_to_inner_codes(r, load_u8x16(residual), p.residual_multiplier, *p.inner)
                    : fma_f32x16(load_u8x16(residual), splat_f32x16(p.residual_multiplier), r);
      }
      Out* c = static_cast<Out*>(p.c) + y * p.c_row_stride + x * p.c_stride;
      store(r, p.qmin, p.qmax, static_cast<size_t>(p.n), c);
    }
  }
}

template <class F>
constexpr WinogradKernel winograd_kernel(const char* name) {
  return {name,
          winograd_input<F>,
          winograd_products,
          winograd_output<F, uint8_t>,
          winograd_output<F, float>,
          F::kOut,
          kPatches,
          kNr,
          1,
          0};
}

}  // namespace
}  // namespace qdeploy
