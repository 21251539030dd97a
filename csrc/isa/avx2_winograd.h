// The Winograd kernels with 256-bit vectors. A family `Dot` gives
//     dot(acc, v, u)    adds 8 sums of two products of s16
//     kRate             WinogradKernel::rate
//
// Products: 6 patches x 16 channels are 12 accumulators; with two vectors of U, a broadcast and a product they fill the
// 16 registers.
#pragma once
#include "avx2_conv.h"
#include "winograd.h"

namespace qdeploy {
namespace {

constexpr int kPatches = 6;
constexpr int kWinogradNr = 16;

typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef uint32_t U32x8 __attribute__((vector_size(32)));

template <class F>
void winograd_input(const WinogradInput* params) {
  const WinogradInput& p = *params;
  int16_t* v = p.v;
  for (int32_t c = 0; c < p.n; c += kWinogradChunk, v += p.chunk_stride) {
    for (int half = 0; half < kWinogradChunk && c + half < p.n; half += 16) {
      const auto load = [](const uint8_t* a) __attribute__((always_inline)) {
        return reinterpret_cast<U16x16>(_mm256_cvtepu8_epi16(load_x16(a)));
      };
      const auto store = [&](int position, U16x16 x) __attribute__((always_inline)) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(v + half + position * p.position_stride),
                           reinterpret_cast<__m256i>(x));
      };
      transform_input<F, U16x16>(p, p.a + c + half, load, store);
    }
  }
}

// Channels 2*kPair.. of the chunk at v, for R patches. Volatile, or GCC 12 loads ahead and spills.
template <class Dot, int kPair, int R>
QD_INLINE void add_pair(__m256i (&acc)[R][2], const int16_t* v, const int16_t* u) {
  __m256i u0, u1;
  _mm_prefetch(reinterpret_cast<const char*>(u) + kFetchAhead + 64 * kPair, _MM_HINT_T1);
  asm volatile("vmovdqa %1, %0" : "=x"(u0) : "m"(*reinterpret_cast<const __m256i*>(u + 32 * kPair)));
  asm volatile("vmovdqa %1, %0" : "=x"(u1) : "m"(*reinterpret_cast<const __m256i*>(u + 32 * kPair + 16)));
  QD_UNROLL for (int r = 0; r < R; ++r) {
    __m256i v_i16x16;
    broadcast(v_i16x16, v + kWinogradChunk * r + 2 * kPair);
    Dot::dot(acc[r][0], v_i16x16, u0);
    Dot::dot(acc[r][1], v_i16x16, u1);
  }
}

// R patches at one position.
template <class Dot, int R>
__attribute__((noinline)) void winograd_patches(const WinogradProducts& p, const int16_t* v, const int16_t* u,
                                                int32_t* m) {
  __m256i acc[R][2];
  QD_UNROLL for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (int32_t k = p.k; k > 0; k -= kWinogradChunk, v += p.v_chunk_stride) {
    const int16_t* pairs = v;
    for (int32_t left = k < kWinogradChunk ? k : kWinogradChunk; left > 0; left -= 8) {
      add_pair<Dot, 0>(acc, pairs, u);
      add_pair<Dot, 1>(acc, pairs, u);
      add_pair<Dot, 2>(acc, pairs, u);
      add_pair<Dot, 3>(acc, pairs, u);
      pairs += 8;
      u += 8 * kWinogradNr;
    }
  }
  QD_UNROLL for (int r = 0; r < R; ++r) {
    QD_UNROLL for (int j = 0; j < 2; ++j) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(m + r * kWinogradNr + 8 * j), acc[r][j]);
    }
  }
}

template <class Dot>
void winograd_products(const WinogradProducts* params) {
  using Run = void (*)(const WinogradProducts&, const int16_t*, const int16_t*, int32_t*);
  static constexpr Run kRuns[kPatches] = {winograd_patches<Dot, 1>, winograd_patches<Dot, 2>, winograd_patches<Dot, 3>,
                                          winograd_patches<Dot, 4>, winograd_patches<Dot, 5>, winograd_patches<Dot, 6>};
  run_positions(*params, kWinogradNr, kRuns);
}

// 16 channels of one pixel.
QD_INLINE void winograd_store(const __m256 (&r_f32x8)[2], const WinogradOutput& p, uint8_t* c) {
  const __m256i lanes_i16x16 = _mm256_packs_epi32(_mm256_cvtps_epi32(r_f32x8[0]), _mm256_cvtps_epi32(r_f32x8[1]));
  const __m256i c_i16x16 = _mm256_permute4x64_epi64(lanes_i16x16, 0xd8);
  const __m128i c_u8x16 = _mm_packus_epi16(_mm256_castsi256_si128(c_i16x16), _mm256_extracti128_si256(c_i16x16, 1));
  const size_t n = p.n < kWinogradNr ? static_cast<size_t>(p.n) : 16;
  store_u8(clamp_u8x32(_mm256_castsi128_si256(c_u8x16), p.qmin, p.qmax), n, c);
}
QD_INLINE void winograd_store(const __m256 (&r_f32x8)[2], const WinogradOutput& p, float* c) {
  _mm256_maskstore_ps(c, first_lanes(p.n), r_f32x8[0]);
  _mm256_maskstore_ps(c + 8, first_lanes(p.n - 8), r_f32x8[1]);
}

template <class F, class Residual, class Out>
QD_INLINE void winograd_pixels(const WinogradOutput& p, const int32_t (&acc_i32)[F::kOut * F::kOut][kWinogradNr]) {
  __m256 multiplier_f32x8[2], bias_f32x8[2];
  QD_UNROLL for (int j = 0; j < 2; ++j) {
    multiplier_f32x8[j] = _mm256_loadu_ps(p.multiplier + 8 * j);
    bias_f32x8[j] = _mm256_loadu_ps(p.bias + 8 * j);
  }
  for (int32_t y = 0; y < p.rows; ++y) {
    for (int32_t x = 0; x < p.columns; ++x) {
      __m256 r_f32x8[2];
      QD_UNROLL for (int j = 0; j < 2; ++j) {
        const __m256i acc_i32x8 = _mm256_load_si256(reinterpret_cast<const __m256i*>(acc_i32[y * F::kOut + x] + 8 * j));
        r_f32x8[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc_i32x8), multiplier_f32x8[j], bias_f32x8[j]);
        if constexpr (!kIsNone<Residual>) {
          const uint8_t* residual = p.residual + y * p.residual_row_stride + x * p.residual_stride;
          const __m256 residual_f32x8 = to_f32x8(residual + 8 * j);
          if constexpr (kHasInner<Residual>) {
            r_f32x8[j] = add_to_inner_codes(r_f32x8[j], residual_f32x8, p.residual_multiplier, *p.inner);
          } else {
            r_f32x8[j] = _mm256_fmadd_ps(residual_f32x8, _mm256_set1_ps(p.residual_multiplier), r_f32x8[j]);
          }
        }
      }
      winograd_store(r_f32x8, p, static_cast<Out*>(p.c) + y * p.c_row_stride + x * p.c_stride);
    }
  }
}

// The accumulators of a patch first, to L1: a pixel is requantized by 16 channels, and registers do not hold all pixels
// of so many.
template <class F, class Out>
void winograd_output(const WinogradOutput* params) {
  const WinogradOutput& p = *params;
  alignas(32) int32_t acc_i32[F::kOut * F::kOut][kWinogradNr];
  for (int j = 0; j < 2; ++j) {
    const auto load = [&](int position) __attribute__((always_inline)) {
      return reinterpret_cast<U32x8>(
          _mm256_load_si256(reinterpret_cast<const __m256i*>(p.m + position * p.position_stride + 8 * j)));
    };
    const auto store = [&](int pixel, U32x8 y) __attribute__((always_inline)) {
      const __m256i scaled = reinterpret_cast<__m256i>(F::kInverse == 1 ? y : y * F::kInverse);
      _mm256_store_si256(reinterpret_cast<__m256i*>(acc_i32[pixel] + 8 * j), _mm256_srai_epi32(scaled, kWinogradShift));
    };
    transform_output<F, U32x8>(load, store);
  }
  if (!p.residual) return winograd_pixels<F, None, Out>(p, acc_i32);
  p.inner ? winograd_pixels<F, WithInner<uint8_t>, Out>(p, acc_i32) : winograd_pixels<F, uint8_t, Out>(p, acc_i32);
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
          kWinogradNr,
          2,
          Dot::kRate};
}

}  // namespace
}  // namespace qdeploy
