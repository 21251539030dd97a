// Depthwise convolution for AVX-512, and the 64-channel blocks that the other channel-wise kernels use too.
//
// Formula: acc[n] = comp[n] + sum over cells t of a_t[n] * w_t[n]. A dot product of four bytes adds four cells at once,
// so the bytes of four cells are interleaved first, 64 channels at a time:
//
//     x0 = a0 a1 a2 ..  (cell t)     unpack bytes, then words      block 0, lane l: channels 16l+0..3,   4 cells each
//     x1 = b0 b1 b2 ..  (cell t+1)  ------------------------>      block 1, lane l: channels 16l+4..7
//     x2, x3                                                       block 2: 16l+8..11     block 3: 16l+12..15
//
// "Block order" costs nothing at the end: packssdw and packuswb undo it. Weights are interleaved the same way, once for
// four pixels: 8 + 8/4 shuffles (port 5) and 4 dot products for 256 products.
#pragma once
#include "avx512_conv.h"

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

QD_INLINE void interleave(const __m512i (&x_u8x64)[4], __m512i (&block)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi8(x_u8x64[0], x_u8x64[1]),
                low23 = _mm512_unpacklo_epi8(x_u8x64[2], x_u8x64[3]);
  const __m512i high01 = _mm512_unpackhi_epi8(x_u8x64[0], x_u8x64[1]),
                high23 = _mm512_unpackhi_epi8(x_u8x64[2], x_u8x64[3]);
  block[0] = _mm512_unpacklo_epi16(low01, low23);
  block[1] = _mm512_unpackhi_epi16(low01, low23);
  block[2] = _mm512_unpacklo_epi16(high01, high23);
  block[3] = _mm512_unpackhi_epi16(high01, high23);
}

// What 64 channels need besides their weights, in block order.
struct DepthwiseChannels {
  __m512 comp_i32x16[4], multiplier_f32x16[4], bias_f32x16[4];
  __mmask64 mask;
};

// P neighbouring pixels of 64 channels. Dot::Weights is what Dot::weights makes of a block of codes, for Dot::dot.
template <class Dot, int P>
QD_INLINE void depthwise_pixels(const DepthwiseParams& p, const DepthwiseChannels& channels, const uint8_t* a,
                                const int8_t* w, uint8_t* c) {
  __m512i acc[P][4];
  QD_UNROLL for (int q = 0; q < P; ++q) {
    QD_UNROLL for (int j = 0; j < 4; ++j) acc[q][j] = _mm512_castps_si512(channels.comp_i32x16[j]);
  }

  for (int32_t t = 0; t < p.cells; t += 4) {
    __m512i x[4], block[4];
    ptrdiff_t offset[4];
    QD_UNROLL for (int i = 0; i < 4; ++i) {  // beyond the last cell: that cell again, with zero weights
      const int32_t cell = t + i < p.cells ? t + i : p.cells - 1;
      offset[i] = p.cell_offset[cell];
      x[i] = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(t + i < p.cells ? 0xff : 0), w + cell * p.w_stride);
    }
    interleave(x, block);
    typename Dot::Weights weights[4];
    QD_UNROLL for (int j = 0; j < 4; ++j) weights[j] = Dot::weights(block[j]);
    QD_UNROLL for (int q = 0; q < P; ++q) {
      QD_UNROLL for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(a + q * p.a_stride + offset[i]);
      interleave(x, block);
      QD_UNROLL for (int j = 0; j < 4; ++j) Dot::dot(acc[q][j], block[j], weights[j]);
    }
  }

  QD_UNROLL for (int q = 0; q < P; ++q) {
    __m512 r_f32x16[4];
    QD_UNROLL for (int j = 0; j < 4; ++j) {
      r_f32x16[j] =
          _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[q][j]), channels.multiplier_f32x16[j], channels.bias_f32x16[j]);
    }
    _mm512_mask_storeu_epi8(c + q * p.c_stride, channels.mask, quantize_u8x64(r_f32x16, p.qmin, p.qmax));
  }
}

template <class Dot>
void depthwise(const DepthwiseParams* params, size_t pixels) {
  const DepthwiseParams& p = *params;
  for (int32_t n = 0; n < p.n; n += 64) {
    DepthwiseChannels channels;
    load_block_order(p.comp + n, channels.comp_i32x16);
    load_block_order(p.multiplier + n, channels.multiplier_f32x16);
    load_block_order(p.bias + n, channels.bias_f32x16);
    channels.mask = first_lanes(static_cast<size_t>(p.n - n));
    const uint8_t* a = p.a + n;
    uint8_t* c = p.c + n;
    size_t left = pixels;
    for (; left >= 4; left -= 4, a += 4 * p.a_stride, c += 4 * p.c_stride)
      depthwise_pixels<Dot, 4>(p, channels, a, p.w + n, c);
    for (; left >= 2; left -= 2, a += 2 * p.a_stride, c += 2 * p.c_stride)
      depthwise_pixels<Dot, 2>(p, channels, a, p.w + n, c);
    if (left > 0) depthwise_pixels<Dot, 1>(p, channels, a, p.w + n, c);
  }
}

}  // namespace
}  // namespace qdeploy
