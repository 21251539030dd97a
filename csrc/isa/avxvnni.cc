// AVX-VNNI: vpdpbusd in its VEX form, 256 bits. Alder Lake and later client CPUs, Sierra Forest, Zen 5.
//
// Convolution: one vpdpbusd adds 8 channels x 4 bytes of k, exactly for any code of 8 bits. The panel is that of
// avx2.cc, s8x4 with NR = 32: a vpbroadcastd of a[i..i+3] meets four vectors of 8 channels.
//
//     instruction               for one quad of 3 pixels x 4 vectors
//     vpdpbusd ymm              12 in 6 cycles (two a cycle on Golden Cove and Zen 5; latency 5 and 4)
//     vpbroadcastd ymm, m32      3
//     vmovdqa ymm, m256          4: with the broadcasts 3.5 cycles at two loads a cycle
//
// 12 accumulators hide the latency of 10 in flight; with three broadcasts and one vector of weights they fill the 16
// registers.
#include "avx2_conv.h"
#include "avx2_winograd.h"

// A CPU with AVX512_VNNI and AVX512VL but without AVX-VNNI can test the same sequence in its EVEX form: check_ukernels.
#if defined(QDEPLOY_AVXVNNI_AS_EVEX)
#define QD_ENCODING "%{evex%} "
#define init_avxvnni init_avxvnni_as_evex
#else
#define QD_ENCODING "%{vex%} "
#endif

namespace qdeploy {
namespace {

QD_INLINE void dot(__m256i& acc_i32x8, const __m256i& a_u8x32, const __m256i& w_i8x32) {
  asm volatile(QD_ENCODING "vpdpbusd %2, %1, %0" : "+x"(acc_i32x8) : "x"(a_u8x32), "x"(w_i8x32));
}

QD_INLINE void load(__m256i& w_i8x32, const int8_t* w) {  // volatile: two at a time would spill an accumulator
  asm volatile("vmovdqa %1, %0" : "=x"(w_i8x32) : "m"(*reinterpret_cast<const __m256i*>(w)));
}

struct DotWeights {
  static constexpr WeightFormat kFormat = WeightFormat::s8x4;
  static constexpr int kMaxRows = 3;
  static constexpr int kElementBytes = 1;
  static constexpr int kS16Quads = 0;

  template <int kBytes, int kRows, int kVectors>
  static QD_INLINE void multiply(const uint8_t* (&a)[kRows], const int8_t*& w,
                                 Accumulators<kRows, kVectors>& acc_i32x8) {
    QD_UNROLL for (int i = 0; i < kBytes; i += 4) {
      __m256i a_u8x32[kRows];
      QD_UNROLL for (int r = 0; r < kRows; ++r) broadcast(a_u8x32[r], a[r] + i);
      QD_UNROLL for (int v = 0; v < kVectors; ++v) {
        const __m256i w_i8x32 =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(w + (i / 4 * kPanelVectors + v) * kVectorBytes));
        QD_UNROLL for (int r = 0; r < kRows; ++r) dot(acc_i32x8[r][v], a_u8x32[r], w_i8x32);
      }
    }
    QD_UNROLL for (int r = 0; r < kRows; ++r) a[r] += kBytes;
    w += kBytes / 4 * kPanelVectors * kVectorBytes;
  }

  template <int kRows, int kVectors>
  static QD_INLINE void accumulate(const Slab& slab, const uint8_t* const* pixels,
                                   Accumulators<kRows, kVectors>& acc_i32x8) {
    const int8_t* w = slab.w;
    for (int32_t t = 0; t < slab.cells; ++t) {
      const uint8_t* a[kRows];
      QD_UNROLL for (int r = 0; r < kRows; ++r) a[r] = pixels[r] + slab.cell_offset[t] + slab.begin;
      int32_t k = slab.k;
      for (; k >= 16; k -= 16) multiply<16>(a, w, acc_i32x8);
      if (k & 8) multiply<8>(a, w, acc_i32x8);
      if (k & 4) multiply<4>(a, w, acc_i32x8);
    }
  }
};

struct WinogradVnni {
  static constexpr int kRate = 29;

  static QD_INLINE void dot(__m256i& acc_i32x8, const __m256i& v_i16x16, const __m256i& u_i16x16) {
    asm volatile(QD_ENCODING "vpdpwssd %2, %1, %0" : "+x"(acc_i32x8) : "x"(v_i16x16), "x"(u_i16x16));
  }
};

// ---- Depthwise convolution ------------------------------------------------------------------------------------------
//
// A dot of four bytes adds four cells at once, so the bytes of four cells are interleaved first, 32 channels at a time:
//
//     x0 = a0 a1 a2 ..  (cell t)     unpack bytes, then words      block 0, lane l: channels 16l+0..3,   4 cells each
//     x1 = b0 b1 b2 ..  (cell t+1)  ------------------------>      block 1, lane l: channels 16l+4..7
//     x2, x3                                                       block 2: 16l+8..11     block 3: 16l+12..15
//
// The saturating packs at the end put the channels back in order. 8 shuffles and 4 dots for 128 products, and 8
// shuffles of weights for every two pixels.

QD_INLINE void interleave(const __m256i (&x_u8x32)[4], __m256i (&block)[4]) {
  const __m256i low01 = _mm256_unpacklo_epi8(x_u8x32[0], x_u8x32[1]),
                low23 = _mm256_unpacklo_epi8(x_u8x32[2], x_u8x32[3]);
  const __m256i high01 = _mm256_unpackhi_epi8(x_u8x32[0], x_u8x32[1]),
                high23 = _mm256_unpackhi_epi8(x_u8x32[2], x_u8x32[3]);
  block[0] = _mm256_unpacklo_epi16(low01, low23);
  block[1] = _mm256_unpackhi_epi16(low01, low23);
  block[2] = _mm256_unpacklo_epi16(high01, high23);
  block[3] = _mm256_unpackhi_epi16(high01, high23);
}

QD_INLINE void load_block_order(const void* x, __m256 (&x_f32x8)[4]) {
  const float* from = static_cast<const float*>(x);
  QD_UNROLL for (int j = 0; j < 4; ++j) {
    x_f32x8[j] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + 4 * j)), _mm_loadu_ps(from + 16 + 4 * j), 1);
  }
}

// What 32 channels need besides their weights, in block order.
struct DepthwiseChannels {
  __m256 comp_i32x8[4], multiplier_f32x8[4], bias_f32x8[4];
  size_t n;  // left from here on
};

template <int kPixels>
QD_INLINE void depthwise_pixels(const DepthwiseParams& p, const DepthwiseChannels& channels, const uint8_t* a,
                                const int8_t* w, uint8_t* c) {
  __m256i acc_i32x8[kPixels][4];
  QD_UNROLL for (int i = 0; i < kPixels; ++i) {
    QD_UNROLL for (int j = 0; j < 4; ++j) acc_i32x8[i][j] = _mm256_castps_si256(channels.comp_i32x8[j]);
  }
  for (int32_t t = 0; t < p.cells; t += 4) {
    __m256i x[4], w_i8x32[4], block_u8x32[4];
    ptrdiff_t offset[4];
    QD_UNROLL for (int j = 0; j < 4; ++j) {  // beyond the last cell: that cell again, with zero weights
      const int32_t cell = t + j < p.cells ? t + j : p.cells - 1;
      offset[j] = p.cell_offset[cell];
      x[j] = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + cell * p.w_stride)),
                              _mm256_set1_epi32(t + j < p.cells ? -1 : 0));
    }
    interleave(x, w_i8x32);
    QD_UNROLL for (int i = 0; i < kPixels; ++i) {
      QD_UNROLL for (int j = 0; j < 4; ++j) {
        x[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i * p.a_stride + offset[j]));
      }
      interleave(x, block_u8x32);
      QD_UNROLL for (int j = 0; j < 4; ++j) dot(acc_i32x8[i][j], block_u8x32[j], w_i8x32[j]);
    }
  }
  QD_UNROLL for (int i = 0; i < kPixels; ++i) {
    __m256i r_i32x8[4];
    QD_UNROLL for (int j = 0; j < 4; ++j) {
      r_i32x8[j] = _mm256_cvtps_epi32(
          _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc_i32x8[i][j]), channels.multiplier_f32x8[j], channels.bias_f32x8[j]));
    }
    const __m256i c_u8x32 =
        _mm256_packus_epi16(_mm256_packs_epi32(r_i32x8[0], r_i32x8[1]), _mm256_packs_epi32(r_i32x8[2], r_i32x8[3]));
    store_u8(clamp_u8x32(c_u8x32, p.qmin, p.qmax), channels.n, c + i * p.c_stride);
  }
}

void depthwise(const DepthwiseParams* params, size_t pixels) {
  const DepthwiseParams& p = *params;
  for (int32_t n = 0; n < p.n; n += 32) {
    DepthwiseChannels channels;
    load_block_order(p.comp + n, channels.comp_i32x8);
    load_block_order(p.multiplier + n, channels.multiplier_f32x8);
    load_block_order(p.bias + n, channels.bias_f32x8);
    channels.n = static_cast<size_t>(p.n - n);
    const uint8_t* a = p.a + n;
    uint8_t* c = p.c + n;
    size_t left = pixels;
    for (; left >= 2; left -= 2, a += 2 * p.a_stride, c += 2 * p.c_stride) {
      depthwise_pixels<2>(p, channels, a, p.w + n, c);
    }
    if (left > 0) depthwise_pixels<1>(p, channels, a, p.w + n, c);
  }
}

}  // namespace

void init_avxvnni(Kernels* kernels) {
  kernels->isa = "avxvnni";
  for (int bits = 2; bits <= 8; ++bits) kernels->conv[bits] = conv_kernel<DotWeights>("qu8_qc8w_conv_3x32c4__avxvnni");
  kernels->winograd[0] = winograd_kernel<Winograd4, WinogradVnni>("qu8_qc8w_winograd_4x4_6x16__avxvnni");
  kernels->winograd[1] = winograd_kernel<Winograd2, WinogradVnni>("qu8_qc8w_winograd_2x2_6x16__avxvnni");
  kernels->depthwise = depthwise;
}

}  // namespace qdeploy
