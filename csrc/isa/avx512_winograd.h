// The Winograd kernels with 512-bit vectors. A family `Dot` gives
//     dot(acc, v, u)    adds 16 sums of two products of s16
//     kRate             WinogradKernel::rate
//
// Products: 14 patches x 32 channels like the tile of avx512vnni.cc, 28 accumulators, two vectors of U and a broadcast.
// Patches of a chunk lie 64 bytes apart, so one register and displacements reach all of them.
#pragma once
#include "avx512_conv.h"
#include "winograd.h"

namespace qdeploy {
namespace {

constexpr int kPatches = 14;

typedef uint16_t U16x32 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));

template <class F>
void winograd_input(const WinogradInput* params) {
  const WinogradInput& p = *params;
  int16_t* v = p.v;
  for (int32_t c = 0; c < p.n; c += kWinogradChunk, v += p.chunk_stride) {
    const auto load = [](const uint8_t* a) __attribute__((always_inline)) {
      return reinterpret_cast<U16x32>(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))));
    };
    const auto store = [&](int position, U16x32 x) __attribute__((always_inline)) {
      _mm512_store_si512(v + position * p.position_stride, reinterpret_cast<__m512i>(x));
    };
    transform_input<F, U16x32>(p, p.a + c, load, store);
  }
}

// Channels 2*kPair.. of the chunk at v, for R patches. Volatile, or GCC 12 loads ahead and spills.
template <class Dot, int kPair, int R>
QD_INLINE void add_pair(__m512i (&acc)[R][2], const int16_t* v, const int16_t* u) {
  __m512i u0, u1, v_i16x32;
  QD_UNROLL for (int j = 0; j < 2; ++j) {
    _mm_prefetch(reinterpret_cast<const char*>(u) + kFetchAhead + 128 * kPair + 64 * j, _MM_HINT_T1);
  }
  asm volatile("vmovdqa64 %1, %0" : "=v"(u0) : "m"(*reinterpret_cast<const __m512i*>(u + 64 * kPair)));
  asm volatile("vmovdqa64 %1, %0" : "=v"(u1) : "m"(*reinterpret_cast<const __m512i*>(u + 64 * kPair + 32)));
  QD_UNROLL for (int r = 0; r < R; ++r) {
    asm volatile("vpbroadcastd %c2(%1), %0" : "=v"(v_i16x32) : "r"(v), "i"(2 * (kWinogradChunk * r + 2 * kPair)));
    Dot::dot(acc[r][0], v_i16x32, u0);
    Dot::dot(acc[r][1], v_i16x32, u1);
  }
}

// R patches at one position.
template <class Dot, int R>
__attribute__((noinline)) void winograd_patches(const WinogradProducts& p, const int16_t* v, const int16_t* u,
                                                int32_t* m) {
  __m512i acc[R][2];
  QD_UNROLL for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
  for (int32_t k = p.k; k > 0; k -= kWinogradChunk, v += p.v_chunk_stride) {
    const int16_t* pairs = v;
    for (int32_t left = k < kWinogradChunk ? k : kWinogradChunk; left > 0; left -= 8, pairs += 8, u += 8 * kNr) {
      add_pair<Dot, 0>(acc, pairs, u);
      add_pair<Dot, 1>(acc, pairs, u);
      add_pair<Dot, 2>(acc, pairs, u);
      add_pair<Dot, 3>(acc, pairs, u);
    }
  }
  QD_UNROLL for (int r = 0; r < R; ++r) {
    QD_UNROLL for (int j = 0; j < 2; ++j) _mm512_store_si512(m + r * kNr + 16 * j, acc[r][j]);
  }
}

template <class Dot>
void winograd_products(const WinogradProducts* params) {
  using Run = void (*)(const WinogradProducts&, const int16_t*, const int16_t*, int32_t*);
  static constexpr Run kRuns[kPatches] = {
      winograd_patches<Dot, 1>,  winograd_patches<Dot, 2>,  winograd_patches<Dot, 3>,  winograd_patches<Dot, 4>,
      winograd_patches<Dot, 5>,  winograd_patches<Dot, 6>,  winograd_patches<Dot, 7>,  winograd_patches<Dot, 8>,
      winograd_patches<Dot, 9>,  winograd_patches<Dot, 10>, winograd_patches<Dot, 11>, winograd_patches<Dot, 12>,
      winograd_patches<Dot, 13>, winograd_patches<Dot, 14>};
  run_positions(*params, kNr, kRuns);
}

// 32 channels of one pixel.
QD_INLINE void winograd_store(const __m512 (&r_f32x16)[2], const WinogradOutput& p, uint32_t mask, uint8_t* c) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i c_i16x32 = _mm512_packs_epi32(_mm512_cvtps_epi32(r_f32x16[0]), _mm512_cvtps_epi32(r_f32x16[1]));
  const __m512i c_u8x64 = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(c_i16x32, c_i16x32));
  const __m256i c_u8x32 =
      _mm256_min_epu8(_mm256_max_epu8(_mm512_castsi512_si256(c_u8x64), _mm256_set1_epi8(static_cast<char>(p.qmin))),
                      _mm256_set1_epi8(static_cast<char>(p.qmax)));
  _mm256_mask_storeu_epi8(c, mask, c_u8x32);
}
QD_INLINE void winograd_store(const __m512 (&r_f32x16)[2], const WinogradOutput&, uint32_t mask, float* c) {
  _mm512_mask_storeu_ps(c, static_cast<__mmask16>(mask), r_f32x16[0]);
  _mm512_mask_storeu_ps(c + 16, static_cast<__mmask16>(mask >> 16), r_f32x16[1]);
}

template <class F, bool kResidual, class Out>
QD_INLINE void winograd_pixels(const WinogradOutput& p, const int32_t (&acc_i32)[F::kOut * F::kOut][kNr]) {
  const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << p.n) - 1);
  __m512 multiplier_f32x16[2], bias_f32x16[2];
  QD_UNROLL for (int j = 0; j < 2; ++j) {
    multiplier_f32x16[j] = _mm512_loadu_ps(p.multiplier + 16 * j);
    bias_f32x16[j] = _mm512_loadu_ps(p.bias + 16 * j);
  }
  for (int32_t y = 0; y < p.rows; ++y) {
    for (int32_t x = 0; x < p.columns; ++x) {
      __m512 r_f32x16[2];
      QD_UNROLL for (int j = 0; j < 2; ++j) {
        const __m512i acc_i32x16 = _mm512_load_si512(acc_i32[y * F::kOut + x] + 16 * j);
        r_f32x16[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc_i32x16), multiplier_f32x16[j], bias_f32x16[j]);
        if (kResidual) {
          const uint8_t* residual = p.residual + y * p.residual_row_stride + x * p.residual_stride;
          r_f32x16[j] =
              _mm512_fmadd_ps(residual_f32x16(residual + 16 * j), _mm512_set1_ps(p.residual_multiplier), r_f32x16[j]);
        }
      }
      winograd_store(r_f32x16, p, mask, static_cast<Out*>(p.c) + y * p.c_row_stride + x * p.c_stride);
    }
  }
}

// The accumulators of a patch first, to L1: a pixel is requantized by 32 channels, and registers do not hold all pixels
// of so many.
template <class F, class Out>
void winograd_output(const WinogradOutput* params) {
  const WinogradOutput& p = *params;
  alignas(64) int32_t acc_i32[F::kOut * F::kOut][kNr];
  for (int j = 0; j < 2; ++j) {
    const auto load = [&](int position) __attribute__((always_inline)) {
      return reinterpret_cast<U32x16>(_mm512_load_si512(p.m + position * p.position_stride + 16 * j));
    };
    const auto store = [&](int pixel, U32x16 y) __attribute__((always_inline)) {
      const __m512i scaled = reinterpret_cast<__m512i>(F::kInverse == 1 ? y : y * F::kInverse);
      _mm512_store_si512(acc_i32[pixel] + 16 * j, _mm512_srai_epi32(scaled, kWinogradShift));
    };
    transform_output<F, U32x16>(load, store);
  }
  p.residual ? winograd_pixels<F, true, Out>(p, acc_i32) : winograd_pixels<F, false, Out>(p, acc_i32);
}

template <class F, class Dot>
constexpr WinogradKernel winograd_kernel(const char* name) {
  return {name,
          winograd_input<F>,
          winograd_products<Dot>,
          winograd_output<F, uint8_t>,
          winograd_output<F, float>,
          F::kOut,
          kPatches,
          kNr,
          2,
          Dot::kRate};
}

}  // namespace
}  // namespace qdeploy
