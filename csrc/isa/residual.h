// A residual that is added to inner codes, with vectors of x86.
#pragma once
#include <immintrin.h>

#include "../ukernels.h"
#include "compiler.h"

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

// The bounds of a clamp come second: of -0 and 0 both instructions return the second operand.
QD_INLINE __m256 add_to_inner_codes(__m256 r_f32x8, __m256 residual_f32x8, float multiplier, const InnerCodes& inner) {
  const __m256 rounded_f32x8 = _mm256_round_ps(r_f32x8, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 low_f32x8 = _mm256_max_ps(rounded_f32x8, _mm256_set1_ps(inner.qmin));
  return _mm256_fmadd_ps(_mm256_min_ps(low_f32x8, _mm256_set1_ps(inner.qmax)), _mm256_set1_ps(inner.multiplier),
                         _mm256_fmadd_ps(residual_f32x8, _mm256_set1_ps(multiplier), _mm256_set1_ps(inner.bias)));
}

#if defined(__AVX512F__)
QD_INLINE __m512 add_to_inner_codes(__m512 r_f32x16, __m512 residual_f32x16, float multiplier,
                                    const InnerCodes& inner) {
  const __m512 rounded_f32x16 = _mm512_roundscale_ps(r_f32x16, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 low_f32x16 = _mm512_max_ps(rounded_f32x16, _mm512_set1_ps(inner.qmin));
  return _mm512_fmadd_ps(_mm512_min_ps(low_f32x16, _mm512_set1_ps(inner.qmax)), _mm512_set1_ps(inner.multiplier),
                         _mm512_fmadd_ps(residual_f32x16, _mm512_set1_ps(multiplier), _mm512_set1_ps(inner.bias)));
}
#endif

}  // namespace
}  // namespace qdeploy
