// AVX512_VNNI.
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
      prefetch.step<Prefetch::lines(R * G)>();
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
