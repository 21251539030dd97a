// A residual that is added to inner codes, with vectors of x86.
#pragma once
#include <immintrin.h>

#include "../ukernels.h"
#include "compiler.h"

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

// Additions and integers, which AMX does not slow down as it does conversions.
QD_INLINE __m256 add_to_inner_codes(__m256 r_f32x8, __m256 residual_f32x8, float multiplier, const InnerCodes& inner) {
  const __m256 round_f32x8 = _mm256_set1_ps(kRound);
  __m256i t_i32x8 = _mm256_castps_si256(_mm256_add_ps(r_f32x8, round_f32x8));
  t_i32x8 = _mm256_max_epi32(t_i32x8, _mm256_castps_si256(_mm256_set1_ps(inner.low)));
  t_i32x8 = _mm256_min_epi32(t_i32x8, _mm256_castps_si256(_mm256_set1_ps(inner.high)));
  return _mm256_fmadd_ps(_mm256_sub_ps(_mm256_castsi256_ps(t_i32x8), round_f32x8), _mm256_set1_ps(inner.multiplier),
                         _mm256_fmadd_ps(residual_f32x8, _mm256_set1_ps(multiplier), _mm256_set1_ps(inner.bias)));
}

#if defined(__AVX512F__)
QD_INLINE __m512 add_to_inner_codes(__m512 r_f32x16, __m512 residual_f32x16, float multiplier,
                                    const InnerCodes& inner) {
  const __m512 round_f32x16 = _mm512_set1_ps(kRound);
  __m512i t_i32x16 = _mm512_castps_si512(_mm512_add_ps(r_f32x16, round_f32x16));
  t_i32x16 = _mm512_max_epi32(t_i32x16, _mm512_castps_si512(_mm512_set1_ps(inner.low)));
  t_i32x16 = _mm512_min_epi32(t_i32x16, _mm512_castps_si512(_mm512_set1_ps(inner.high)));
  return _mm512_fmadd_ps(_mm512_sub_ps(_mm512_castsi512_ps(t_i32x16), round_f32x16), _mm512_set1_ps(inner.multiplier),
                         _mm512_fmadd_ps(residual_f32x16, _mm512_set1_ps(multiplier), _mm512_set1_ps(inner.bias)));
}
#endif

}  // namespace
}  // namespace qdeploy
