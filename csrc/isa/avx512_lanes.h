// 16 neighbouring elements in a vector of 512 bits, for rows.h, norm.h and attention.h.
#pragma once
#include "avx512_conv.h"

namespace qdeploy {
namespace {

struct Avx512Lanes {
  using F32 = __m512;
  using I32 = __m512i;

  static QD_INLINE __m128i load_x16(const void* a) { return _mm_loadu_si128(static_cast<const __m128i*>(a)); }
  static QD_INLINE __mmask16 mask(size_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

  // ---- Loads --------------------------------------------------------------------------------------------------------

  static QD_INLINE I32 load(const uint8_t* a) { return _mm512_cvtepu8_epi32(load_x16(a)); }
  static QD_INLINE I32 load(const int8_t* a) { return _mm512_cvtepi8_epi32(load_x16(a)); }
  static QD_INLINE I32 load(const int16_t* a) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  }
  static QD_INLINE I32 load(const int32_t* a) { return _mm512_loadu_si512(a); }
  static QD_INLINE F32 load(const float* a) { return _mm512_loadu_ps(a); }
  static QD_INLINE F32 splat(float x) { return _mm512_set1_ps(x); }
  static QD_INLINE I32 splat(int32_t x) { return _mm512_set1_epi32(x); }

  // ---- Arithmetic ---------------------------------------------------------------------------------------------------

  static QD_INLINE F32 to_f32(I32 x) { return _mm512_cvtepi32_ps(x); }
  static QD_INLINE I32 rint_i32(F32 x) { return _mm512_cvtps_epi32(x); }
  static QD_INLINE F32 add(F32 x, F32 y) { return _mm512_add_ps(x, y); }
  static QD_INLINE F32 sub(F32 x, F32 y) { return _mm512_sub_ps(x, y); }
  static QD_INLINE F32 mul(F32 x, F32 y) { return _mm512_mul_ps(x, y); }
  static QD_INLINE F32 max(F32 x, F32 y) { return _mm512_max_ps(x, y); }
  static QD_INLINE F32 fma(F32 x, F32 y, F32 z) { return _mm512_fmadd_ps(x, y, z); }
  static QD_INLINE I32 add(I32 x, I32 y) { return _mm512_add_epi32(x, y); }
  static QD_INLINE I32 sub(I32 x, I32 y) { return _mm512_sub_epi32(x, y); }
  static QD_INLINE I32 mul(I32 x, I32 y) { return _mm512_mullo_epi32(x, y); }
  static QD_INLINE I32 mul_s16(I32 x, I32 y) { return _mm512_madd_epi16(x, y); }  // as in avx2_lanes.h

  // x * 2^n, n being the low bits of `shifted`; neither x nor the result is subnormal.
  static QD_INLINE F32 add_exponent(F32 x, F32 shifted) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), n));
  }

  // The first n lanes of x, then those of y.
  static QD_INLINE F32 first(F32 x, int n, F32 y) { return _mm512_mask_blend_ps(mask(static_cast<size_t>(n)), y, x); }
  // x where a equals b, else y.
  static QD_INLINE F32 where_equal(I32 a, I32 b, F32 x, F32 y) {
    return _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(a, b), y, x);
  }
  static QD_INLINE float largest(F32 x) { return _mm512_reduce_max_ps(x); }
  static QD_INLINE int32_t total(I32 x) { return _mm512_reduce_add_epi32(x); }

  // ---- Stores: the first n lanes ------------------------------------------------------------------------------------

  static QD_INLINE void store(F32 r, uint8_t qmin, uint8_t qmax, size_t n, uint8_t* c) {
    const __m512i low_i32x16 = _mm512_max_epi32(rint_i32(r), splat(int32_t{qmin}));
    _mm_mask_storeu_epi8(c, mask(n), _mm512_cvtepi32_epi8(_mm512_min_epi32(low_i32x16, splat(int32_t{qmax}))));
  }
  static QD_INLINE void store(F32 r, uint8_t, uint8_t, size_t n, int16_t* c) {
    const __m512i low_i32x16 = _mm512_max_epi32(rint_i32(r), splat(-32767));
    _mm256_mask_storeu_epi16(c, mask(n), _mm512_cvtsepi32_epi16(low_i32x16));
  }
  static QD_INLINE void store(F32 r, uint8_t, uint8_t, size_t n, float* c) { _mm512_mask_storeu_ps(c, mask(n), r); }
  static QD_INLINE void store(F32 x, float* c) { _mm512_storeu_ps(c, x); }
  static QD_INLINE void store(I32 x, int32_t* c) { _mm512_storeu_si512(c, x); }
  static QD_INLINE void store_i16(I32 x, int16_t* c) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), _mm512_cvtepi32_epi16(x));
  }
};

}  // namespace
}  // namespace qdeploy
