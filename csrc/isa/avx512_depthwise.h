// Depthwise convolution by 64 channels, and the blocks of 64 channels that the other channel-wise kernels use too.
// "Block order" is that of depthwise.h.
#pragma once
#include "avx512_conv.h"
#include "depthwise.h"

namespace qdeploy {
namespace {

// 4x4 transposition of 128-bit lanes: from natural order to block order and back.
QD_INLINE void transpose_lanes(__m512 (&x_f32x16)[4]) {
  const __m512 a = _mm512_shuffle_f32x4(x_f32x16[0], x_f32x16[1], 0x88),
               b = _mm512_shuffle_f32x4(x_f32x16[2], x_f32x16[3], 0x88);
  const __m512 c = _mm512_shuffle_f32x4(x_f32x16[0], x_f32x16[1], 0xdd),
               d = _mm512_shuffle_f32x4(x_f32x16[2], x_f32x16[3], 0xdd);
  x_f32x16[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  x_f32x16[1] = _mm512_shuffle_f32x4(c, d, 0x88);
  x_f32x16[2] = _mm512_shuffle_f32x4(a, b, 0xdd);
  x_f32x16[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

QD_INLINE void load_block_order(const void* x, __m512 (&x_f32x16)[4]) {
  for (int j = 0; j < 4; ++j) x_f32x16[j] = _mm512_loadu_ps(static_cast<const float*>(x) + 16 * j);
  transpose_lanes(x_f32x16);
}

QD_INLINE __mmask64 first_lanes(size_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

// rint, clamp and narrowing of 64 values in block order.
QD_INLINE __m512i quantize_u8x64(const __m512 (&r_f32x16)[4], uint8_t qmin, uint8_t qmax) {
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(r_f32x16[0]), _mm512_cvtps_epi32(r_f32x16[1]));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(r_f32x16[2]), _mm512_cvtps_epi32(r_f32x16[3]));
  const __m512i c_u8x64 = _mm512_packus_epi16(low, high);
  return _mm512_min_epu8(_mm512_max_epu8(c_u8x64, _mm512_set1_epi8(static_cast<char>(qmin))),
                         _mm512_set1_epi8(static_cast<char>(qmax)));
}

// What 64 channels need besides their weights, in block order.
struct DepthwiseChannels {
  __m512i comp[4];
  __m512 multiplier_f32x16[4], bias_f32x16[4];
  uint8_t qmin, qmax;
  __mmask64 mask;

  QD_INLINE void set(const DepthwiseParams& p, int32_t n) {
    __m512 comp_i32x16[4];
    load_block_order(p.comp + n, comp_i32x16);
    for (int j = 0; j < 4; ++j) comp[j] = _mm512_castps_si512(comp_i32x16[j]);
    load_block_order(p.multiplier + n, multiplier_f32x16);
    load_block_order(p.bias + n, bias_f32x16);
    qmin = p.qmin, qmax = p.qmax;
    mask = first_lanes(static_cast<size_t>(p.n - n));
  }

  template <int kPixels>
  QD_INLINE void write(const __m512i* acc, uint8_t* c, ptrdiff_t c_stride) const {
    __m512 r_f32x16[kPixels][4];
    QD_UNROLL for (int j = 0; j < 4; ++j) {
      QD_UNROLL for (int q = 0; q < kPixels; ++q) {
        const __m512 acc_f32x16 = _mm512_cvtepi32_ps(_mm512_loadu_si512(acc + 4 * q + j));
        r_f32x16[q][j] = _mm512_fmadd_ps(acc_f32x16, multiplier_f32x16[j], bias_f32x16[j]);
      }
    }
    QD_UNROLL for (int q = 0; q < kPixels; ++q) {
      // by 32 bytes: where channels are no multiple of 64, fewer stores cross a cache line
      const __m512i c_u8x64 = quantize_u8x64(r_f32x16[q], qmin, qmax);
      uint8_t* to = c + q * c_stride;
      _mm256_mask_storeu_epi8(to, static_cast<__mmask32>(mask), _mm512_castsi512_si256(c_u8x64));
      _mm256_mask_storeu_epi8(to + 32, static_cast<__mmask32>(mask >> 32), _mm512_extracti64x4_epi64(c_u8x64, 1));
    }
  }
};

// Instructions on 64 channels.
struct Avx512Vectors {
  using Int = __m512i;
  using Channels = DepthwiseChannels;
  static constexpr int kChannels = 64;

  static QD_INLINE Int load(const void* from) { return _mm512_loadu_si512(from); }
  static QD_INLINE void store(Int* to, Int x) { _mm512_storeu_si512(to, x); }
  static QD_INLINE Int zero() { return _mm512_setzero_si512(); }
  static QD_INLINE Int ones_16() { return _mm512_set1_epi16(1); }
  static QD_INLINE Int unpack_low_8(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
  static QD_INLINE Int unpack_high_8(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
  static QD_INLINE Int unpack_low_16(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
  static QD_INLINE Int unpack_high_16(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }
  static QD_INLINE Int even_bytes_u16(Int a) { return _mm512_and_si512(a, _mm512_set1_epi16(255)); }
  static QD_INLINE Int odd_bytes_u16(Int a) { return _mm512_srli_epi16(a, 8); }
  static QD_INLINE Int even_bytes_s16(Int a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
  static QD_INLINE Int odd_bytes_s16(Int a) { return _mm512_srai_epi16(a, 8); }
  static QD_INLINE Int madd(Int a, Int b) { return _mm512_madd_epi16(a, b); }
  static QD_INLINE Int maddubs(Int a, Int b) { return _mm512_maddubs_epi16(a, b); }
  static QD_INLINE Int add_16(Int a, Int b) { return _mm512_add_epi16(a, b); }
  static QD_INLINE Int add_32(Int a, Int b) { return _mm512_add_epi32(a, b); }
};

}  // namespace
}  // namespace qdeploy
