// What the AVX-512 convolutions share: the walk over tiles, the address of a pixel, the next-panel prefetch and the
// requantization. Why a tile is 14 x 32 is told in avx512vnni.cc. A family `Dot` gives
//     kFormat               the packing of its weights
//     kFetchBytes           bytes of k between two calls of Prefetch::fetch
//     kS16Quads             ConvKernel::s16_quads
//     kMr                   most pixels in a strip, at most 7
//     sets(pixels)          how many sets of accumulators hide the latency of its sums
//     cell<R, S>(acc, a, w, k, prefetch)   adds one cell to acc, advances a, returns w advanced
#pragma once
#if !defined(__clang__)
// GCC 12 otherwise moves or even spills accumulators around the loops: 1 to 4 % at k <= 256.
#pragma GCC optimize("ira-region=one")
#endif
#pragma GCC diagnostic push
#if !defined(__clang__)  // GCC 12 sees its own _mm512_undefined_ps as an error of ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "../ukernels.h"
#include "compiler.h"
#include "residual.h"

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

constexpr int kMr = 7, kStrips = 2, kNr = 32;

// The pixels of one strip: p, p+s .. p+6s from one base register and three stride registers.
struct Pixels {
  const uint8_t* p;
  ptrdiff_t s, s3, s5;

  QD_INLINE const uint8_t* operator[](int i) const {
    switch (i) {
      case 0:
        return p;
      case 1:
        return p + s;
      case 2:
        return p + 2 * s;
      case 3:
        return p + s3;
      case 4:
        return p + 4 * s;
      case 5:
        return p + s5;
      default:
        return p + 2 * s3;
    }
  }
};

// Weights come from DRAM at every inference: the panel needed next is fetched into L2, a line every kFetchBytes of k,
// while this one is in use. The cursor runs across the tiles of a call and rests at the end of the panel. Free of
// branches: a loop over a number of lines known at run time cost a quarter of the speed. Where fetches are too few for
// all lines, a fetch takes two: to rely on the hardware for every other one works on Cascade Lake and costs Zen 5 a
// third of the speed of 7x7 maps. More lines a fetch gain 4 % for one tile of one pixel, where DRAM is the limit
// anyway, and cost 20 % for several tiles.
struct Prefetch {
  uintptr_t at, end;
  size_t stride, second;  // the second line of a fetch: 0 bytes behind the first, or 64

  Prefetch(const ConvParams& params, size_t fetches) {
    at = reinterpret_cast<uintptr_t>(params.prefetch);
    end = at + params.prefetch_bytes;
    stride = fetches * 64 >= params.prefetch_bytes ? 64 : 128;
    second = stride - 64;
  }
  QD_INLINE void fetch() {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(at + second), _MM_HINT_T1);
    at = at + stride < end ? at + stride : end;
  }
};

// ---- Requantization -------------------------------------------------------------------------------------------------

QD_INLINE __m512 residual_f32x16(const uint8_t* residual) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(residual))));
}
QD_INLINE __m512 residual_f32x16(const int16_t* residual) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(residual))));
}

template <class Residual>
QD_INLINE __m512 add_residual(const ConvParams& params, __m512 r_f32x16, __m512 residual_f32x16) {
  if constexpr (kHasInner<Residual>) {
    return add_to_inner_codes(r_f32x16, residual_f32x16, params.residual_multiplier, *params.inner);
  } else {
    return _mm512_fmadd_ps(residual_f32x16, _mm512_set1_ps(params.residual_multiplier), r_f32x16);
  }
}

QD_INLINE ptrdiff_t residual_offset(const ConvParams& params, const ConvTile& tile, int strip, int pixel) {
  return tile.residual[strip] + pixel * params.residual_stride;
}

// 32 channels of -32767..32767 from what packs of two vectors leaves.
QD_INLINE __m512i order_s16(__m512i lanes_i16x32) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return _mm512_permutexvar_epi64(order, _mm512_max_epi16(lanes_i16x32, _mm512_set1_epi16(-32767)));
}

// One tile: where each of its pixels goes, and what every pixel needs.
template <int R, int S>
struct Output {
  const ConvParams& params;
  const ConvTile& tile;
  __m512 multiplier_f32x16[2], bias_f32x16[2];

  QD_INLINE Output(const ConvParams& params, const ConvTile& tile) : params(params), tile(tile) {
    for (int j = 0; j < 2; ++j) {
      multiplier_f32x16[j] = _mm512_loadu_ps(params.multiplier + 16 * j);
      bias_f32x16[j] = _mm512_loadu_ps(params.bias + 16 * j);
    }
  }
  QD_INLINE size_t offset(int q) const { return tile.c[q / R] + q % R * params.c_stride; }

  template <class Residual>
  QD_INLINE __m512 real(__m512i acc_i32x16, int q, int j) const {
    const __m512 r_f32x16 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc_i32x16), multiplier_f32x16[j], bias_f32x16[j]);
    if constexpr (kIsNone<Residual>) {
      return r_f32x16;
    } else {
      const auto* residual = static_cast<const typename CodeOf<Residual>::type*>(params.residual) +
                             residual_offset(params, tile, q / R, q % R);
      return add_residual<Residual>(params, r_f32x16, residual_f32x16(residual + 16 * j));
    }
  }

  // Saturating packs clamp to 0..255; two pixels leave one vector in channel order after one permutation of dwords.
  template <class Residual>
  QD_INLINE void store_u8(const __m512i (&acc)[S * R][2]) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i qmin_u8x64 = _mm512_set1_epi8(static_cast<char>(params.qmin));
    const __m512i qmax_u8x64 = _mm512_set1_epi8(static_cast<char>(params.qmax));
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << params.n) - 1);
    uint8_t* c = static_cast<uint8_t*>(params.c);
    QD_UNROLL for (int q = 0; q < S * R; q += 2) {
      const int next = q + 1 < S * R ? q + 1 : q;
      __m512i packed_i16x32[2];
      QD_UNROLL for (int i = 0; i < 2; ++i) {
        const int pixel = i == 0 ? q : next;
        packed_i16x32[i] = _mm512_packs_epi32(_mm512_cvtps_epi32(real<Residual>(acc[pixel][0], pixel, 0)),
                                              _mm512_cvtps_epi32(real<Residual>(acc[pixel][1], pixel, 1)));
      }
      __m512i c_u8x64 = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(packed_i16x32[0], packed_i16x32[1]));
      c_u8x64 = _mm512_min_epu8(_mm512_max_epu8(c_u8x64, qmin_u8x64), qmax_u8x64);
      _mm256_mask_storeu_epi8(c + offset(q), mask, _mm512_castsi512_si256(c_u8x64));
      if (next != q) _mm256_mask_storeu_epi8(c + offset(next), mask, _mm512_extracti64x4_epi64(c_u8x64, 1));
    }
  }

  template <class Residual>
  QD_INLINE void store_s16(const __m512i (&acc)[S * R][2]) const {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << params.n) - 1);
    int16_t* c = static_cast<int16_t*>(params.c);
    QD_UNROLL for (int q = 0; q < S * R; ++q) {
      const __m512i c_i16x32 = _mm512_packs_epi32(_mm512_cvtps_epi32(real<Residual>(acc[q][0], q, 0)),
                                                  _mm512_cvtps_epi32(real<Residual>(acc[q][1], q, 1)));
      _mm512_mask_storeu_epi16(c + offset(q), mask, order_s16(c_i16x32));
    }
  }

  template <class Residual>
  QD_INLINE void store_f32(const __m512i (&acc)[S * R][2]) const {
    float* c = static_cast<float*>(params.c);
    const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << params.n) - 1);
    QD_UNROLL for (int q = 0; q < S * R; ++q) {
      _mm512_mask_storeu_ps(c + offset(q), static_cast<__mmask16>(mask), real<Residual>(acc[q][0], q, 0));
      _mm512_mask_storeu_ps(c + offset(q) + 16, static_cast<__mmask16>(mask >> 16), real<Residual>(acc[q][1], q, 1));
    }
  }
};

// The type of the residual of these params, as the argument of `call`.
template <class Call>
QD_INLINE void with_residual(const ConvParams& params, const Call& call) {
  if (!params.residual) return call(None());
  if (params.residual_type == Dtype::s16) return params.inner ? call(WithInner<int16_t>()) : call(int16_t());
  params.inner ? call(WithInner<uint8_t>()) : call(uint8_t());
}

using Sums = __m512i[kStrips * kMr][2];

// Codes u8 with a residual of u8 or none are written from registers. All the rest, pixel by pixel from memory, would be
// two thirds of the code.
QD_INLINE bool writes_from_memory(const ConvParams& params, Dtype out) {
  return out != Dtype::u8 || (params.residual && (params.residual_type != Dtype::u8 || params.inner));
}

[[maybe_unused]] __attribute__((noinline)) void store_sums(const ConvParams& params, Dtype out, const ConvTile& tile,
                                                           const Sums& sums) {
  with_residual(params, [&](auto residual) {
    for (int q = 0; q < tile.strips * tile.r; ++q) {
      const int s = q / tile.r, i = q % tile.r;
      const ConvTile pixel = {{},
                              {tile.c[s] + static_cast<uint32_t>(i * params.c_stride)},
                              {tile.residual[s] + static_cast<uint32_t>(i * params.residual_stride)},
                              1,
                              1};
      const __m512i acc[1][2] = {{sums[q][0], sums[q][1]}};
      const Output<1, 1> output(params, pixel);
      using Residual = decltype(residual);
      if (out == Dtype::f32) output.template store_f32<Residual>(acc);
      if (out == Dtype::s16) output.template store_s16<Residual>(acc);
      if (out == Dtype::u8) output.template store_u8<Residual>(acc);
    }
  });
}

// ---- The walk over tiles --------------------------------------------------------------------------------------------

// Computes tiles from the front of the list while they have this shape; returns how many. Cells outside, channels
// inside, one set of accumulators for the whole of K; few pixels get kSets of them, or the latency of the dot product
// would show. Into `sums`, where there are any, goes one tile instead of codes; to write them from here would be a call,
// at which GCC spills.
template <class Dot, int R, int S>
__attribute__((noinline)) size_t run(const ConvParams& params, Sums* sums, const ConvTile* tiles, size_t n_tiles,
                                     Prefetch& prefetch) {
  constexpr int kSets = Dot::sets(R * S);
  Prefetch ahead = prefetch;  // a copy that can live in registers
  size_t done = 0;
  do {
    const ConvTile& tile = tiles[done];
    __m512i acc[kSets][S * R][2];
    QD_UNROLL for (int q = 0; q < S * R; ++q) {
      QD_UNROLL for (int j = 0; j < 2; ++j) {
        acc[0][q][j] = _mm512_loadu_si512(params.comp + 16 * j);
        QD_UNROLL for (int set = 1; set < kSets; ++set) acc[set][q][j] = _mm512_setzero_si512();
      }
    }

    if (params.residual) {  // needed at the end of the tile, often in L2 or beyond: 2 % at k = 64 and 128
      QD_UNROLL for (int q = 0; q < S * R; ++q) {
        const ptrdiff_t at = residual_offset(params, tile, q / R, q % R) << (params.residual_type == Dtype::s16);
        _mm_prefetch(static_cast<const char*>(params.residual) + at, _MM_HINT_T0);
      }
    }

    const ptrdiff_t stride = params.a_stride;
    ptrdiff_t stride3 = 3 * stride, stride5 = 5 * stride;
    asm("" : "+r"(stride3), "+r"(stride5));  // or GCC recomputes them, or makes a pointer per pixel
    const char* w = static_cast<const char*>(params.w);
    for (int32_t t = 0; t < params.cells; ++t) {
      Pixels a[S];
      QD_UNROLL for (int s = 0; s < S; ++s) {
        a[s] = {params.a + tile.a[s] + params.cell_offset[t], stride, stride3, stride5};
      }
      w = Dot::template cell<R, S>(acc, a, w, params.k, ahead);
    }

    QD_UNROLL for (int set = 1; set < kSets; ++set) {
      QD_UNROLL for (int q = 0; q < S * R; ++q) {
        QD_UNROLL for (int j = 0; j < 2; ++j) acc[0][q][j] = _mm512_add_epi32(acc[0][q][j], acc[set][q][j]);
      }
    }

    if (sums) {
      QD_UNROLL for (int q = 0; q < S * R; ++q)(*sums)[q][0] = acc[0][q][0], (*sums)[q][1] = acc[0][q][1];
      n_tiles = 1;
    } else {
      const Output<R, S> output(params, tile);
      params.residual ? output.template store_u8<uint8_t>(acc[0]) : output.template store_u8<None>(acc[0]);
    }
  } while (++done < n_tiles && tiles[done].r == R && tiles[done].strips == S);
  prefetch = ahead;
  return done;
}

// The run that starts at the first tile; returns how many tiles it did.
template <class Dot>
size_t run_next(const ConvParams& params, Dtype out, const ConvTile* tiles, size_t n_tiles, Prefetch& prefetch) {
  using Run = size_t (*)(const ConvParams&, Sums*, const ConvTile*, size_t, Prefetch&);
  constexpr auto r = [](int pixels) { return pixels < Dot::kMr ? pixels : Dot::kMr; };  // no code for longer strips
  static constexpr Run kRuns[kStrips][kMr] = {{run<Dot, 1, 1>, run<Dot, 2, 1>, run<Dot, 3, 1>, run<Dot, r(4), 1>,
                                               run<Dot, r(5), 1>, run<Dot, r(6), 1>, run<Dot, r(7), 1>},
                                              {run<Dot, 1, 2>, run<Dot, 2, 2>, run<Dot, 3, 2>, run<Dot, r(4), 2>,
                                               run<Dot, r(5), 2>, run<Dot, r(6), 2>, run<Dot, r(7), 2>}};
  const Run run = kRuns[tiles->strips - 1][tiles->r - 1];
  if (!writes_from_memory(params, out)) return run(params, nullptr, tiles, n_tiles, prefetch);
  Sums sums;
  const size_t done = run(params, &sums, tiles, n_tiles, prefetch);
  store_sums(params, out, *tiles, sums);
  return done;
}

template <class Dot, Dtype kOut>
void conv(const ConvParams* params, const ConvTile* tiles, size_t n_tiles) {
  Prefetch prefetch(*params, n_tiles * params->cells * (params->k / Dot::kFetchBytes));
  for (size_t done = 0; done < n_tiles;) done += run_next<Dot>(*params, kOut, tiles + done, n_tiles - done, prefetch);
}

template <class Dot>
constexpr ConvKernel conv_kernel(const char* name) {
  return {name, conv<Dot, Dtype::u8>, conv<Dot, Dtype::s16>, conv<Dot, Dtype::f32>, Dot::kMr, kStrips,
          kNr,  Dot::kFormat,         Dot::kS16Quads};
}

}  // namespace
}  // namespace qdeploy
