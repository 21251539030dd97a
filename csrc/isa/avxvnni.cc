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
#include "avx2_depthwise.h"
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

  template <int kVectors>
  static bool short_sums(const ConvParams&, Batch*) {
    return false;
  }
};

struct WinogradVnni {
  static constexpr int kRate = 29;

  static QD_INLINE void dot(__m256i& acc_i32x8, const __m256i& v_i16x16, const __m256i& u_i16x16) {
    asm volatile(QD_ENCODING "vpdpwssd %2, %1, %0" : "+x"(acc_i32x8) : "x"(v_i16x16), "x"(u_i16x16));
  }
};

// ---- Depthwise convolution ------------------------------------------------------------------------------------------

struct AvxVnniVectors : Avx2Vectors {
  static QD_INLINE void dot(__m256i& acc_i32x8, const __m256i& a_u8x32, const __m256i& w_i8x32) {
    qdeploy::dot(acc_i32x8, a_u8x32, w_i8x32);
  }
};

void depthwise(const DepthwiseParams* params, size_t rows, size_t pixels) {
  depthwise_by<AvxVnniVectors, DotProducts>(*params, rows, pixels);
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
