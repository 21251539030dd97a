// Depthwise convolution by 32 channels, for AVX2 and AVX-VNNI.
#pragma once
#include "avx2_conv.h"
#include "depthwise.h"

namespace qdeploy {
namespace {

QD_INLINE void load_block_order(const void* x, __m256 (&x_f32x8)[4]) {
  const float* from = static_cast<const float*>(x);
  QD_UNROLL for (int j = 0; j < 4; ++j) {
    x_f32x8[j] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + 4 * j)), _mm_loadu_ps(from + 16 + 4 * j), 1);
  }
}

// What 32 channels need besides their weights, in block order.
struct DepthwiseChannels {
  __m256i comp[4];
  __m256 multiplier_f32x8[4], bias_f32x8[4];
  __m256i qmin_u8x32, qmax_u8x32;
  size_t n;  // left from here on

  QD_INLINE void set(const DepthwiseParams& p, int32_t first) {
    __m256 comp_i32x8[4];
    load_block_order(p.comp + first, comp_i32x8);
    QD_UNROLL for (int j = 0; j < 4; ++j) comp[j] = _mm256_castps_si256(comp_i32x8[j]);
    load_block_order(p.multiplier + first, multiplier_f32x8);
    load_block_order(p.bias + first, bias_f32x8);
    qmin_u8x32 = _mm256_set1_epi8(static_cast<char>(p.qmin)), qmax_u8x32 = _mm256_set1_epi8(static_cast<char>(p.qmax));
    n = static_cast<size_t>(p.n - first);
  }

  template <int kPixels>
  QD_INLINE void write(const __m256i* acc, uint8_t* c, ptrdiff_t c_stride) const {
    __m256i r_i32x8[kPixels][4];
    QD_UNROLL for (int j = 0; j < 4; ++j) {
      QD_UNROLL for (int q = 0; q < kPixels; ++q) {
        const __m256 acc_f32x8 = _mm256_cvtepi32_ps(_mm256_loadu_si256(acc + 4 * q + j));
        r_i32x8[q][j] = _mm256_cvtps_epi32(_mm256_fmadd_ps(acc_f32x8, multiplier_f32x8[j], bias_f32x8[j]));
      }
    }
    QD_UNROLL for (int q = 0; q < kPixels; ++q) {
      const __m256i low_i16x16 = _mm256_packs_epi32(r_i32x8[q][0], r_i32x8[q][1]);
      const __m256i high_i16x16 = _mm256_packs_epi32(r_i32x8[q][2], r_i32x8[q][3]);
      const __m256i c_u8x32 = _mm256_max_epu8(_mm256_packus_epi16(low_i16x16, high_i16x16), qmin_u8x32);
      store_u8(_mm256_min_epu8(c_u8x32, qmax_u8x32), n, c + q * c_stride);
    }
  }
};

// Instructions on 32 channels.
struct Avx2Vectors {
  using Int = __m256i;
  using Channels = DepthwiseChannels;
  static constexpr int kChannels = 32;

  static QD_INLINE Int load(const void* from) { return _mm256_loadu_si256(static_cast<const Int*>(from)); }
  static QD_INLINE void store(Int* to, Int x) { _mm256_storeu_si256(to, x); }
  static QD_INLINE Int zero() { return _mm256_setzero_si256(); }
  static QD_INLINE Int ones_16() { return _mm256_set1_epi16(1); }
  static QD_INLINE Int unpack_low_8(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
  static QD_INLINE Int unpack_high_8(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
  static QD_INLINE Int unpack_low_16(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
  static QD_INLINE Int unpack_high_16(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }
  static QD_INLINE Int even_bytes_u16(Int a) { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
  static QD_INLINE Int odd_bytes_u16(Int a) { return _mm256_srli_epi16(a, 8); }
  static QD_INLINE Int even_bytes_s16(Int a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
  static QD_INLINE Int odd_bytes_s16(Int a) { return _mm256_srai_epi16(a, 8); }
  static QD_INLINE Int madd(Int a, Int b) { return _mm256_madd_epi16(a, b); }
  static QD_INLINE Int maddubs(Int a, Int b) { return _mm256_maddubs_epi16(a, b); }
  static QD_INLINE Int add_16(Int a, Int b) { return _mm256_add_epi16(a, b); }
  static QD_INLINE Int add_32(Int a, Int b) { return _mm256_add_epi32(a, b); }
};

}  // namespace
}  // namespace qdeploy
