// What is added to a residual, with vectors of x86: r itself, or its inner codes.
#pragma once
#include <immintrin.h>

#include "../ukernels.h"
#include "compiler.h"

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

// Of -0 and 0 both instructions return the second operand.
QD_INLINE __m256 inner_codes(__m256 r_f32x8, const InnerCodes& inner) {
  const __m256 rounded_f32x8 = _mm256_round_ps(r_f32x8, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_min_ps(_mm256_max_ps(rounded_f32x8, _mm256_set1_ps(inner.qmin)), _mm256_set1_ps(inner.qmax));
}

QD_INLINE __m256 add_residual(__m256 r_f32x8, __m256 residual_f32x8, float multiplier, const InnerCodes* inner) {
  const __m256 multiplier_f32x8 = _mm256_set1_ps(multiplier);
  if (!inner) return _mm256_fmadd_ps(residual_f32x8, multiplier_f32x8, r_f32x8);
  return _mm256_fmadd_ps(inner_codes(r_f32x8, *inner), _mm256_set1_ps(inner->multiplier),
                         _mm256_fmadd_ps(residual_f32x8, multiplier_f32x8, _mm256_set1_ps(inner->bias)));
}

#if defined(__AVX512F__)
QD_INLINE __m512 inner_codes(__m512 r_f32x16, const InnerCodes& inner) {
  const __m512 rounded_f32x16 = _mm512_roundscale_ps(r_f32x16, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_min_ps(_mm512_max_ps(rounded_f32x16, _mm512_set1_ps(inner.qmin)), _mm512_set1_ps(inner.qmax));
}

QD_INLINE __m512 add_residual(__m512 r_f32x16, __m512 residual_f32x16, float multiplier, const InnerCodes* inner) {
  const __m512 multiplier_f32x16 = _mm512_set1_ps(multiplier);
  if (!inner) return _mm512_fmadd_ps(residual_f32x16, multiplier_f32x16, r_f32x16);
  return _mm512_fmadd_ps(inner_codes(r_f32x16, *inner), _mm512_set1_ps(inner->multiplier),
                         _mm512_fmadd_ps(residual_f32x16, multiplier_f32x16, _mm512_set1_ps(inner->bias)));
}
#endif

}  // namespace
}  // namespace qdeploy
