// AVX-512 with VNNI: Cascade Lake, Ice Lake, Zen 4 and later.
//
// Convolution: acc[p][n] = comp[n] + sum a[p][i] * w[i][n]. One vpdpbusd adds 16 channels x 4 bytes of k, exactly.
//
// Packed panel, s8x4:  w[taps][k/4][32 channels][4 bytes of k]
//     one k-step of 4:  | n=0: i i+1 i+2 i+3 | n=1: i i+1 i+2 i+3 | .. n=15 |   first vector
//                       | n=16 ..                                  .. n=31 |   second vector
//
//     instruction              ports (Cascade Lake)   in one k-step of a 14 x 32 tile
//     vpdpbusd zmm             0, 5 (latency 5)       28 in 14 cycles: the limit
//     vpbroadcastd zmm, m32    2, 3                   14
//     vmovdqa64 zmm, m512      2, 3                    2: with the broadcasts 8 cycles
//     all, 4 a cycle                                  44 in 11 cycles
//
// So a tile of 14 pixels x 32 channels: 28 accumulators hide the latency (10 would do) and need only 16 loads, which
// leaves the load ports room for prefetches and L2; with two weights and one or two broadcasts it fills the 32
// registers. Measured in one process against a peak of 306 GMAC/s for the bare instruction, epilogue included (GCC 12):
// 290 at K = 1024, 294 for 3x3 x 256, 267 at K = 256, 208 at K = 64. 14 separate row pointers instead of two groups at
// a constant stride are 7 % slower, 16 channels a panel 14 to 23 %. The epilogue costs some 110 cycles a tile, 63 of
// them because 126 conversions, fma, packs and clamps share ports 0 and 5; each tap some 12 cycles.
//
// Preconditions: those of ConvParams; k may be any multiple of 4, steps of 16 are the fast ones. Reads of activations
// and weights are exact here; only the residual of the last channels is over-read, by less than 32 bytes.
#include "avx512_depthwise.h"

namespace qdeploy {
namespace {

// GCC 12 spills the accumulators of _mm512_dpbusd_epi32; an asm operand that is read and written stays in its register.
QDEPLOY_INLINE void dot(__m512i& acc_i32x16, __m512i a_u8x64, __m512i w_i8x64) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc_i32x16) : "v"(a_u8x64), "v"(w_i8x64));
}

QDEPLOY_INLINE __m512i broadcast(const uint8_t* a) {
  int32_t a_u8x4;
  __builtin_memcpy(&a_u8x4, a, 4);
  return _mm512_set1_epi32(a_u8x4);
}

struct Vnni {
  static constexpr WeightFormat kFormat = WeightFormat::s8x4;
  static constexpr int kStep = 16;
  static constexpr int kMr = 7;
  static constexpr int kS16Steps = 0;

  static constexpr int sets(int pixels) { return pixels <= 2 ? 4 : pixels <= 4 ? 2 : 1; }

  template <int R, int G, int kSets>
  static QDEPLOY_INLINE void step(__m512i (&acc)[kSets][G * R][2], const Pixels (&a)[G], const char* w, int i) {
    const __m512i w0_i8x64 = _mm512_load_si512(w + 128 * i), w1_i8x64 = _mm512_load_si512(w + 128 * i + 64);
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 7
      for (int p = 0; p < R; ++p) {
        const __m512i a_u8x64 = broadcast(a[g][p] + 4 * i);
        dot(acc[i % kSets][g * R + p][0], a_u8x64, w0_i8x64);
        dot(acc[i % kSets][g * R + p][1], a_u8x64, w1_i8x64);
      }
  }

  template <int R, int G, int kSets>
  static QDEPLOY_INLINE const char* tap(__m512i (&acc)[kSets][G * R][2], Pixels (&a)[G], const char* w, int32_t k,
                                        Prefetch& prefetch) {
    for (; k >= 16; k -= 16) {
      prefetch.step();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) step<R, G>(acc, a, w, i);
      w += 4 * 128;
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) a[g].p += 16;
    }
    for (; k > 0; k -= 4) {
      step<R, G>(acc, a, w, 0);
      w += 128;
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) a[g].p += 4;
    }
    return w;
  }
};

struct DepthwiseVnni {
  using Weights = __m512i;
  static QDEPLOY_INLINE Weights weights(__m512i w_i8x64) { return w_i8x64; }
  static QDEPLOY_INLINE void dot(__m512i& acc_i32x16, __m512i a_u8x64, Weights w_i8x64) {
    qdeploy::dot(acc_i32x16, a_u8x64, w_i8x64);
  }
};

}  // namespace

void init_avx512vnni(Kernels* kernels) {
  kernels->isa = "avx512vnni";
  for (int bits = 2; bits <= 8; ++bits) kernels->conv[bits] = conv_kernel<Vnni>("qu8_qc8w_conv_14x32c4__avx512vnni");
  kernels->depthwise = depthwise<DepthwiseVnni>;
}

}  // namespace qdeploy
