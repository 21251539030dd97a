// AVX-512 with VNNI: Cascade Lake, Ice Lake, Zen 4 and later.
//
// Convolution: acc[p][n] = comp[n] + sum a[p][i] * w[i][n]. One vpdpbusd adds 16 channels x 4 bytes of k, exactly.
//
// Packed panel, s8x4:  w[cells][k/4][32 channels][4 bytes of k]
//     one quad of k:    | n=0: i i+1 i+2 i+3 | n=1: i i+1 i+2 i+3 | .. n=15 |   first vector
//                       | n=16 ..                                  .. n=31 |   second vector
//
//     instruction              ports (Cascade Lake)   for one quad of a 14 x 32 tile
//     vpdpbusd zmm             0, 5 (latency 5)       28 in 14 cycles: the limit
//     vpbroadcastd zmm, m32    2, 3                   14
//     vmovdqa64 zmm, m512      2, 3                    2: with the broadcasts 8 cycles
//     all, 4 a cycle                                  44 in 11 cycles
//
// So a tile of 14 pixels x 32 channels: 28 accumulators hide the latency (10 would do) and need only 16 loads, which
// leaves the load ports room for prefetches and L2; with two weights and one or two broadcasts it fills the 32
// registers. Measured with GCC 12 in one process, requantization included, against a peak of 306 GMAC/s for the bare
// instruction: 290 at K = 1024, 294 for 3x3 x 256, 267 at K = 256, 208 at K = 64. 14 separate row pointers instead of
// two strips at a constant stride are 7 % slower, 16 channels a panel 14 to 23 %. Requantization costs some 110 cycles
// a tile, 63 of them because 126 conversions, fma, packs and clamps share ports 0 and 5; each cell some 12 cycles.
//
// Preconditions: those of ConvParams; k may be any multiple of 4, those of 16 are the fast ones. Reads of activations
// and weights are exact here; only the residual of the last channels is over-read, by less than 32 bytes.
#include "avx512_depthwise.h"
#include "avx512_winograd.h"

namespace qdeploy {
namespace {

// GCC 12 spills the accumulators of _mm512_dpbusd_epi32; an asm operand that is read and written stays in its register.
QD_INLINE void dot(__m512i& acc_i32x16, __m512i a_u8x64, __m512i w_i8x64) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc_i32x16) : "v"(a_u8x64), "v"(w_i8x64));
}

// Four bytes of pixel kPixel of a strip. As asm, or GCC makes a pointer of each of the seven addresses and spills them.
template <int kPixel, int kOffset>
QD_INLINE __m512i broadcast(const Pixels& a) {
  __m512i a_u8x64;
  if constexpr (kPixel == 0) asm("vpbroadcastd %c2(%1), %0" : "=v"(a_u8x64) : "r"(a.p), "i"(kOffset));
  if constexpr (kPixel == 1) asm("vpbroadcastd %c3(%1,%2), %0" : "=v"(a_u8x64) : "r"(a.p), "r"(a.s), "i"(kOffset));
  if constexpr (kPixel == 2) asm("vpbroadcastd %c3(%1,%2,2), %0" : "=v"(a_u8x64) : "r"(a.p), "r"(a.s), "i"(kOffset));
  if constexpr (kPixel == 3) asm("vpbroadcastd %c3(%1,%2), %0" : "=v"(a_u8x64) : "r"(a.p), "r"(a.s3), "i"(kOffset));
  if constexpr (kPixel == 4) asm("vpbroadcastd %c3(%1,%2,4), %0" : "=v"(a_u8x64) : "r"(a.p), "r"(a.s), "i"(kOffset));
  if constexpr (kPixel == 5) asm("vpbroadcastd %c3(%1,%2), %0" : "=v"(a_u8x64) : "r"(a.p), "r"(a.s5), "i"(kOffset));
  if constexpr (kPixel == 6) asm("vpbroadcastd %c3(%1,%2,2), %0" : "=v"(a_u8x64) : "r"(a.p), "r"(a.s3), "i"(kOffset));
  return a_u8x64;
}

struct Vnni {
  static constexpr WeightFormat kFormat = WeightFormat::s8x4;
  static constexpr int kFetchBytes = 16;
  static constexpr int kMr = 7;
  static constexpr int kS16Quads = 0;

  static constexpr int sets(int pixels) { return pixels <= 2 ? 4 : pixels <= 4 ? 2 : 1; }

  template <int kQuad, int kPixel, int R, int S, int kSets>
  static QD_INLINE void pixels(__m512i (&acc)[kSets][S * R][2], const Pixels (&a)[S], __m512i w0_i8x64,
                               __m512i w1_i8x64) {
    if constexpr (kPixel < S * R) {
      const __m512i a_u8x64 = broadcast<kPixel % R, 4 * kQuad>(a[kPixel / R]);
      dot(acc[kQuad % kSets][kPixel][0], a_u8x64, w0_i8x64);
      dot(acc[kQuad % kSets][kPixel][1], a_u8x64, w1_i8x64);
      pixels<kQuad, kPixel + 1, R, S>(acc, a, w0_i8x64, w1_i8x64);
    }
  }

  // Bytes 4*kQuad .. 4*kQuad+3 of k for all pixels.
  template <int kQuad, int R, int S, int kSets>
  static QD_INLINE void add_quad(__m512i (&acc)[kSets][S * R][2], const Pixels (&a)[S], const char* w) {
    pixels<kQuad, 0, R, S>(acc, a, _mm512_load_si512(w + 128 * kQuad), _mm512_load_si512(w + 128 * kQuad + 64));
  }

  template <int R, int S, int kSets>
  static QD_INLINE const char* cell(__m512i (&acc)[kSets][S * R][2], Pixels (&a)[S], const char* w, int32_t k,
                                    Prefetch& prefetch) {
    for (; k >= 16; k -= 16) {
      prefetch.fetch();
      add_quad<0, R, S>(acc, a, w);
      add_quad<1, R, S>(acc, a, w);
      add_quad<2, R, S>(acc, a, w);
      add_quad<3, R, S>(acc, a, w);
      w += 4 * 128;
      QD_UNROLL for (int s = 0; s < S; ++s) a[s].p += 16;
    }
    for (; k > 0; k -= 4) {
      add_quad<0, R, S>(acc, a, w);
      w += 128;
      QD_UNROLL for (int s = 0; s < S; ++s) a[s].p += 4;
    }
    return w;
  }
};

// ---- Requantization under the next strip ----------------------------------------------------------------------------
//
// Requantization of a tile takes some 300 instructions that are not dot products. Behind the dot products they leave
// ports 0 and 1 idle for 45 to 75 cycles a tile on Zen 5, because they fill the schedulers before the next tile gets
// in. So a strip of 7 x 32 runs its first quads while the strip before it is written, one pixel a quad:
//
//     quad 0 of this strip   | pixel 0 of the previous one
//     quad 1                 | pixel 1                       14 accumulators each, and one pair less after each pixel
//     ..                     | ..
//     the rest of k, then this strip is the previous one
//
// Measured on Zen 5 (peak 541 GMAC/s), before and after: K = 64 450 and 500, with residual 398 and 455; K = 128 486 and
// 510, 459 and 490; K = 256 510 and 525; K = 512 526 and 537.

// Of the residual of a strip.
template <class Residual>
struct Copies {
  alignas(64) typename CodeOf<Residual>::type of[kMr][kNr];
};
template <>
struct Copies<None> {};

template <class Residual, typename T>
struct Destination {
  using Code = typename CodeOf<Residual>::type;
  T* c = nullptr;  // the next pixel to write; null: none
  const Code* residual = nullptr;
  ptrdiff_t residual_stride;
  __mmask32 mask;

  explicit Destination(const ConvParams& params)
      : residual_stride(params.residual_stride), mask(static_cast<__mmask32>((uint64_t{1} << params.n) - 1)) {}

  // Residuals are often in L2 or beyond.
  void set(const ConvParams& params, const ConvTile& tile, int strip, int pixels, Copies<Residual>& copies) {
    c = static_cast<T*>(params.c) + tile.c[strip];
    if constexpr (!kIsNone<Residual>) {
      residual = static_cast<const Code*>(params.residual) + tile.residual[strip];
      residual_stride = params.residual_stride;
      QD_UNROLL for (int p = 0; p < pixels; ++p) {
        _mm_prefetch(reinterpret_cast<const char*>(residual + p * params.residual_stride), _MM_HINT_T0);
      }
      if (params.n < kNr) copy_residual(params, pixels, copies);
    }
  }

  // A store of fewer channels ends, but for its mask, within the next pixel, whose residual could not be read until it
  // has reached L1: 24 channels took twice as long.
  QD_INLINE void copy_residual(const ConvParams& params, int pixels, Copies<Residual>& copies) {
    QD_UNROLL for (int p = 0; p < pixels; ++p) {
      for (size_t at = 0; at < sizeof copies.of[p]; at += 32) {
        const auto* from = reinterpret_cast<const uint8_t*>(residual + p * params.residual_stride) + at;
        auto* to = reinterpret_cast<__m256i*>(reinterpret_cast<uint8_t*>(copies.of[p]) + at);
        _mm256_store_si256(to, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      }
    }
    residual = copies.of[0];
    residual_stride = kNr;
  }

  QD_INLINE void write(const ConvParams& params, const __m512i (&acc_i32x16)[2]) {
    __m512 x_f32x16[2];
    QD_UNROLL for (int j = 0; j < 2; ++j) {
      x_f32x16[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc_i32x16[j]), _mm512_loadu_ps(params.multiplier + 16 * j),
                                    _mm512_loadu_ps(params.bias + 16 * j));
      if constexpr (!kIsNone<Residual>) {
        x_f32x16[j] = add_residual<Residual>(params, x_f32x16[j], residual_f32x16(residual + 16 * j));
      }
    }
    store(params, _mm512_packs_epi32(_mm512_cvtps_epi32(x_f32x16[0]), _mm512_cvtps_epi32(x_f32x16[1])), c);
    c += params.c_stride;
    if constexpr (!kIsNone<Residual>) residual += residual_stride;
  }

 private:
  QD_INLINE void store(const ConvParams& params, __m512i lanes_i16x32, uint8_t* to) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i c_u8x64 = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(lanes_i16x32, lanes_i16x32));
    const __m256i c_u8x32 = _mm256_min_epu8(
        _mm256_max_epu8(_mm512_castsi512_si256(c_u8x64), _mm256_set1_epi8(static_cast<char>(params.qmin))),
        _mm256_set1_epi8(static_cast<char>(params.qmax)));
    _mm256_mask_storeu_epi8(to, mask, c_u8x32);
  }
  QD_INLINE void store(const ConvParams&, __m512i lanes_i16x32, int16_t* to) const {
    _mm512_mask_storeu_epi16(to, mask, order_s16(lanes_i16x32));
  }
};

// Quads kQuad .. kQuads-1 of a strip, each with a pixel of the previous one; the last quad takes all that are left. The
// barriers keep that order: GCC would load constants for all pixels in advance and spill accumulators for them.
template <int kQuad, int kQuads, int R, class To, class Start>
QD_INLINE void quads_and_pixels(const ConvParams& params, const __m512i (&previous)[R][2], To& to,
                                __m512i (&acc)[1][R][2], const Pixels (&a)[1], const char* w, const Start& start) {
  if constexpr (kQuad < kQuads) {
    QD_UNROLL for (int pixel = kQuad; pixel < (kQuad == kQuads - 1 ? R : kQuad + 1) && pixel < R; ++pixel) {
      to.write(params, previous[pixel]);
      asm volatile("" ::: "memory");
    }
    if (kQuad == 0) start();
    Vnni::add_quad<kQuad, R, 1>(acc, a, w);
    asm volatile("" ::: "memory");
    quads_and_pixels<kQuad + 1, kQuads, R>(params, previous, to, acc, a, w, start);
  }
}

// Computes tiles from the front of the list while they have R pixels a strip; returns how many. kQuads: at most k/4.
template <int kQuads, int R, class Residual, typename T>
__attribute__((noinline)) size_t run_overlapped(const ConvParams& params, const ConvTile* tiles, size_t n_tiles,
                                                Prefetch& prefetch) {
  Prefetch ahead = prefetch;  // a copy that can live in registers
  const ptrdiff_t stride = params.a_stride;
  ptrdiff_t stride3 = 3 * stride, stride5 = 5 * stride;
  asm("" : "+r"(stride3), "+r"(stride5));
  __m512i acc[1][R][2], previous[R][2];
  Destination<Residual, T> to(params);
  Copies<Residual> copies;
  size_t done = 0;
  do {
    const ConvTile& tile = tiles[done];
    for (int s = 0; s < tile.strips; ++s) {
      const auto start = [&]() __attribute__((always_inline)) {
        QD_UNROLL for (int p = 0; p < R; ++p) {
          QD_UNROLL for (int j = 0; j < 2; ++j) acc[0][p][j] = _mm512_loadu_si512(params.comp + 16 * j);
        }
      };
      Pixels a[1] = {{params.a + tile.a[s] + params.cell_offset[0], stride, stride3, stride5}};
      const char* w = static_cast<const char*>(params.w);
      int32_t k = params.k;
      if (to.c) {
        for (int line = 0; line < kQuads / 4; ++line) ahead.fetch();
        quads_and_pixels<0, kQuads, R>(params, previous, to, acc, a, w, start);
        a[0].p += 4 * kQuads;
        w += 128 * kQuads;
        k -= 4 * kQuads;
      } else {
        start();
      }
      to.set(params, tile, s, R, copies);
      w = Vnni::cell<R, 1>(acc, a, w, k, ahead);
      for (int32_t t = 1; t < params.cells; ++t) {
        a[0].p = params.a + tile.a[s] + params.cell_offset[t];
        w = Vnni::cell<R, 1>(acc, a, w, params.k, ahead);
      }
      QD_UNROLL for (int p = 0; p < R; ++p) previous[p][0] = acc[0][p][0], previous[p][1] = acc[0][p][1];
    }
  } while (++done < n_tiles && tiles[done].r == R);
  QD_UNROLL for (int p = 0; p < R; ++p) to.write(params, previous[p]);
  prefetch = ahead;
  return done;
}

// Half a tile reads weights twice as often: that pays where they stay in L1, under short sums or under many tiles (a
// 7x7 map would lose 4 %). Strips of fewer than 5 pixels would wait for the latency of the dot product.
template <class Residual, typename T>
void conv_overlapped(const ConvParams* params, const ConvTile* tiles, size_t n_tiles) {
  const int depth = params->cells * params->k;
  const bool in_l1 = depth <= 384 || (depth <= 1152 && n_tiles >= 16);
  constexpr Dtype kOut = sizeof(T) == 1 ? Dtype::u8 : Dtype::s16;
  constexpr bool is_common = kOut == Dtype::u8 && sizeof(Residual) == 1 && !kHasInner<Residual>;
  constexpr int kShort = is_common ? 6 : 8;  // quads under the shortest sums: code for k of 24 and 28
  if (params->k < 4 * kShort || !in_l1) return conv<Vnni, kOut>(params, tiles, n_tiles);

  constexpr int kLeast = 5;
  using Run = size_t (*)(const ConvParams&, const ConvTile*, size_t, Prefetch&);
  static constexpr Run kRuns[2][kMr - kLeast + 1] = {
      {run_overlapped<kShort, 5, Residual, T>, run_overlapped<kShort, 6, Residual, T>,
       run_overlapped<kShort, 7, Residual, T>},
      {run_overlapped<8, 5, Residual, T>, run_overlapped<8, 6, Residual, T>, run_overlapped<8, 7, Residual, T>}};
  Prefetch prefetch(*params, 2 * n_tiles * params->cells * (params->k / Vnni::kFetchBytes));
  for (size_t done = 0; done < n_tiles;) {
    const int r = tiles[done].r;
    if (r < kLeast) {
      done += run_next<Vnni>(*params, kOut, tiles + done, n_tiles - done, prefetch);
    } else {
      done += kRuns[params->k >= 32][r - kLeast](*params, tiles + done, n_tiles - done, prefetch);
    }
  }
}

template <typename T>
void conv_overlapped(const ConvParams* params, const ConvTile* tiles, size_t n_tiles) {
  with_residual(*params, [=](auto residual) {
    using Residual = decltype(residual);
    constexpr bool rare = kHasInner<Residual> && sizeof(T) + sizeof(typename CodeOf<Residual>::type) > 2;
    if constexpr (rare) {
      conv<Vnni, sizeof(T) == 1 ? Dtype::u8 : Dtype::s16>(params, tiles, n_tiles);
    } else {
      conv_overlapped<Residual, T>(params, tiles, n_tiles);
    }
  });
}

// ---- Groups of few channels -----------------------------------------------------------------------------------------
//
// Lane n of a vector needs the four bytes of its own group: the window of 32 bytes, permuted by dwords, replaces the
// broadcast. Two permutations (ports 1 and 2 on Zen 5, 5 on Cascade Lake) for two dot products; with 4 channels a group
// all 64 products of each count, where a dense panel of 32 would use 8.

template <int kQuads, int R, class Residual>
__attribute__((noinline)) size_t run_grouped(const ConvParams& params, const ConvTile* tiles, size_t n_tiles) {
  __m512i lanes[kQuads][2];
  QD_UNROLL for (int q = 0; q < kQuads; ++q) {
    QD_UNROLL for (int j = 0; j < 2; ++j) lanes[q][j] = _mm512_loadu_si512(params.lanes + 32 * q + 16 * j);
  }
  size_t done = 0;
  do {
    const ConvTile& tile = tiles[done];
    for (int s = 0; s < tile.strips; ++s) {
      __m512i acc[R][2];
      QD_UNROLL for (int p = 0; p < R; ++p) {
        QD_UNROLL for (int j = 0; j < 2; ++j) acc[p][j] = _mm512_loadu_si512(params.comp + 16 * j);
      }
      const char* w = static_cast<const char*>(params.w);
      for (int32_t t = 0; t < params.cells; ++t) {
        const uint8_t* a = params.a + tile.a[s] + params.cell_offset[t];
        QD_UNROLL for (int q = 0; q < kQuads; ++q) {
          const __m512i w0_i8x64 = _mm512_load_si512(w), w1_i8x64 = _mm512_load_si512(w + 64);
          QD_UNROLL for (int p = 0; p < R; ++p) {
            const __m512i a_u8x32 =
                _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + p * params.a_stride)));
            dot(acc[p][0], _mm512_permutexvar_epi32(lanes[q][0], a_u8x32), w0_i8x64);
            dot(acc[p][1], _mm512_permutexvar_epi32(lanes[q][1], a_u8x32), w1_i8x64);
          }
          w += 128;
        }
      }
      Destination<Residual, uint8_t> to(params);
      Copies<Residual> copies;
      to.set(params, tile, s, R, copies);
      QD_UNROLL for (int p = 0; p < R; ++p) to.write(params, acc[p]);
    }
  } while (++done < n_tiles && tiles[done].r == R);
  return done;
}

template <int kQuads, class Residual>
void conv_grouped(const ConvParams& params, const ConvTile* tiles, size_t n_tiles) {
  using Run = size_t (*)(const ConvParams&, const ConvTile*, size_t);
  static constexpr Run kRuns[kMr] = {run_grouped<kQuads, 1, Residual>, run_grouped<kQuads, 2, Residual>,
                                     run_grouped<kQuads, 3, Residual>, run_grouped<kQuads, 4, Residual>,
                                     run_grouped<kQuads, 5, Residual>, run_grouped<kQuads, 6, Residual>,
                                     run_grouped<kQuads, 7, Residual>};
  for (size_t done = 0; done < n_tiles;) done += kRuns[tiles[done].r - 1](params, tiles + done, n_tiles - done);
}

template <class Residual>
void conv_grouped(const ConvParams& params, const ConvTile* tiles, size_t n_tiles) {
  switch (params.k) {
    case 4:
      return conv_grouped<1, Residual>(params, tiles, n_tiles);
    case 8:
      return conv_grouped<2, Residual>(params, tiles, n_tiles);
    case 12:
      return conv_grouped<3, Residual>(params, tiles, n_tiles);
    default:
      return conv_grouped<4, Residual>(params, tiles, n_tiles);
  }
}

void conv_grouped(const ConvParams* params, const ConvTile* tiles, size_t n_tiles) {
  params->residual ? conv_grouped<uint8_t>(*params, tiles, n_tiles) : conv_grouped<None>(*params, tiles, n_tiles);
}

// ---- Depthwise ------------------------------------------------------------------------------------------------------

struct Avx512VnniVectors : Avx512Vectors {
  static QD_INLINE void dot(__m512i& acc_i32x16, __m512i a_u8x64, __m512i w_i8x64) {
    qdeploy::dot(acc_i32x16, a_u8x64, w_i8x64);
  }
};

void depthwise(const DepthwiseParams* params, size_t rows, size_t pixels) {
  depthwise_by<Avx512VnniVectors, DotProducts>(*params, rows, pixels);
}

// ---- Winograd -------------------------------------------------------------------------------------------------------

struct WinogradVnni {
  static constexpr int kRate = 57;

  static QD_INLINE void dot(__m512i& acc_i32x16, __m512i v_i16x32, __m512i u_i16x32) {
    asm volatile("vpdpwssd %2, %1, %0" : "+v"(acc_i32x16) : "v"(v_i16x32), "v"(u_i16x32));
  }
};

}  // namespace

void init_avx512vnni(Kernels* kernels) {
  kernels->isa = "avx512vnni";
  for (int bits = 2; bits <= 8; ++bits) {
    kernels->conv[bits] = conv_kernel<Vnni>("qu8_qc8w_conv_14x32c4__avx512vnni");
    kernels->conv[bits].qu8 = conv_overlapped<uint8_t>;
    kernels->conv[bits].s16 = conv_overlapped<int16_t>;
  }
  kernels->grouped = {
      "qu8_qc8w_grouped_14x32c4__avx512vnni", conv_grouped, nullptr, nullptr, kMr, kStrips, kNr, Vnni::kFormat};
  kernels->winograd[0] = winograd_kernel<Winograd4, WinogradVnni>("qu8_qc8w_winograd_4x4_14x32__avx512vnni");
  kernels->winograd[1] = winograd_kernel<Winograd2, WinogradVnni>("qu8_qc8w_winograd_2x2_14x32__avx512vnni");
  kernels->depthwise = depthwise;
}

}  // namespace qdeploy
