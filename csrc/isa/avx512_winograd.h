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
QD_INLINE void winograd_store(const __m256 (&r_f32x8)[4], const WinogradOutput& p, uint32_t mask, uint8_t* c) {
  __m256i c_i32x8[4];
  QD_UNROLL for (int v = 0; v < 4; ++v) c_i32x8[v] = _mm256_cvtps_epi32(r_f32x8[v]);
  const __m256i lanes_u8x32 =
      _mm256_packus_epi16(_mm256_packs_epi32(c_i32x8[0], c_i32x8[1]), _mm256_packs_epi32(c_i32x8[2], c_i32x8[3]));
  const __m256i c_u8x32 = _mm256_permutevar8x32_epi32(lanes_u8x32, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i low_u8x32 = _mm256_max_epu8(c_u8x32, _mm256_set1_epi8(static_cast<char>(p.qmin)));
  _mm256_mask_storeu_epi8(c, mask, _mm256_min_epu8(low_u8x32, _mm256_set1_epi8(static_cast<char>(p.qmax))));
}
QD_INLINE void winograd_store(const __m256 (&r_f32x8)[4], const WinogradOutput&, uint32_t mask, float* c) {
  QD_UNROLL for (int v = 0; v < 4; ++v) {
    _mm256_mask_storeu_ps(c + 8 * v, static_cast<__mmask8>(mask >> (8 * v)), r_f32x8[v]);
  }
}

// In vectors of 256 bits: so many multiplications of 512 as these, of floats, slow the core down for milliseconds. After
// 2 ms of such output transforms the direct kernel ran at 348 GMAC/s instead of 373, for 6 ms (Emerald Rapids).
template <class F, class Residual, class Out>
QD_INLINE void winograd_pixels(const WinogradOutput& p, const int32_t (&y_i32)[F::kOut * F::kOut][kNr]) {
  const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << p.n) - 1);
  for (int32_t y = 0; y < p.rows; ++y) {
    for (int32_t x = 0; x < p.columns; ++x) {
      __m256 r_f32x8[4];
      QD_UNROLL for (int v = 0; v < 4; ++v) {
        __m256i acc_i32x8 = _mm256_load_si256(reinterpret_cast<const __m256i*>(y_i32[y * F::kOut + x] + 8 * v));
        if (F::kInverse != 1) {
          acc_i32x8 = _mm256_mullo_epi32(acc_i32x8, _mm256_set1_epi32(static_cast<int>(F::kInverse)));
        }
        acc_i32x8 = _mm256_srai_epi32(acc_i32x8, kWinogradShift);
        r_f32x8[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc_i32x8), _mm256_loadu_ps(p.multiplier + 8 * v),
                                     _mm256_loadu_ps(p.bias + 8 * v));
        if constexpr (!kIsNone<Residual>) {
          const uint8_t* residual = p.residual + y * p.residual_row_stride + x * p.residual_stride + 8 * v;
          const __m256i residual_i32x8 =
              _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(residual)));
          const __m256 residual_f32x8 = _mm256_cvtepi32_ps(residual_i32x8);
          if constexpr (kHasInner<Residual>) {
            r_f32x8[v] = add_to_inner_codes(r_f32x8[v], residual_f32x8, p.residual_multiplier, *p.inner);
          } else {
            r_f32x8[v] = _mm256_fmadd_ps(residual_f32x8, _mm256_set1_ps(p.residual_multiplier), r_f32x8[v]);
          }
        }
      }
      winograd_store(r_f32x8, p, mask, static_cast<Out*>(p.c) + y * p.c_row_stride + x * p.c_stride);
    }
  }
}

// Y of a patch first, to L1: a pixel is requantized by 32 channels, and registers do not hold all pixels of so many.
template <class F, class Out>
void winograd_output(const WinogradOutput* params) {
  const WinogradOutput& p = *params;
  alignas(64) int32_t y_i32[F::kOut * F::kOut][kNr];
  for (int j = 0; j < 2; ++j) {
    const auto load = [&](int position) __attribute__((always_inline)) {
      return reinterpret_cast<U32x16>(_mm512_load_si512(p.m + position * p.position_stride + 16 * j));
    };
    const auto store = [&](int pixel, U32x16 y) __attribute__((always_inline)) {
      _mm512_store_si512(y_i32[pixel] + 16 * j, reinterpret_cast<__m512i>(y));
    };
    transform_output<F, U32x16>(load, store);
  }
  if (!p.residual) return winograd_pixels<F, None, Out>(p, y_i32);
  p.inner ? winograd_pixels<F, WithInner<uint8_t>, Out>(p, y_i32) : winograd_pixels<F, uint8_t, Out>(p, y_i32);
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
