// What the NEON convolutions share: the walk over tiles, the next-panel prefetch, narrow stores and requantization.
// A family `Dot` gives
//     kMr, kStrips       the shape of its tiles
//     Sums<P>            the accumulators of P pixels x 16 channels:
//         Sums(comp, w)                   starts them
//         add_cell(a, w, k, prefetch)      adds k bytes of one cell at a[0..P-1], returns w advanced
//         total(q, j)                     pixel q, channels 4j..4j+3
//
// Neither NEON nor its dot products multiply u8 by s8; only FEAT_I8MM's USDOT does. So activations are made signed,
// a ^ 0x80 = a - 128: ConvKernel::a_offset = 128, and comp holds what that takes away, 128 * sum(w), in exact int32.
// The other way, unsigned weights w + 128, would have to subtract 128 * sum(a) of every pixel, known only at run time.
#pragma once
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "../ukernels.h"
#include "compiler.h"

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

constexpr int kNr = 16;
constexpr int kMostPixels = 5;  // of a tile

// A load that stays where it is written, and is not shared with an equal one.
QD_INLINE int8x16_t load_in_order(const int8_t* w) {
  int8x16_t w_i8x16;
  asm volatile("ldr %q0, %1" : "=w"(w_i8x16) : "m"(*reinterpret_cast<const int8x16_t*>(w)));
  return w_i8x16;
}

// Weights come from DRAM at every inference: the panel needed next is fetched into L2, a line every 16 bytes of k,
// while this one is in use. The cursor runs across the tiles of a call and rests at the end of the panel.
struct Prefetch {
  uintptr_t at, end;

  explicit Prefetch(const ConvParams& params)
      : at(reinterpret_cast<uintptr_t>(params.prefetch)), end(at + params.prefetch_bytes) {}
  QD_INLINE void fetch() {
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    at = at + 64 < end ? at + 64 : end;
  }
};

// ---- Requantization -------------------------------------------------------------------------------------------------

// 16 neighbouring channels.
struct F32x16 {
  float32x4_t v[4];
};

QD_INLINE F32x16 splat_f32x16(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}}; }

QD_INLINE F32x16 load_f32x16(const float* x) {
  return {{vld1q_f32(x), vld1q_f32(x + 4), vld1q_f32(x + 8), vld1q_f32(x + 12)}};
}

QD_INLINE F32x16 convert_i32x16(const int32x4_t (&x)[4]) {
  return {{vcvtq_f32_s32(x[0]), vcvtq_f32_s32(x[1]), vcvtq_f32_s32(x[2]), vcvtq_f32_s32(x[3])}};
}

QD_INLINE F32x16 load_u8x16(const uint8_t* x) {
  const uint8x16_t x_u8x16 = vld1q_u8(x);
  const uint16x8_t low_u16x8 = vmovl_u8(vget_low_u8(x_u8x16)), high_u16x8 = vmovl_high_u8(x_u8x16);
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low_u16x8))), vcvtq_f32_u32(vmovl_high_u16(low_u16x8)),
           vcvtq_f32_u32(vmovl_u16(vget_low_u16(high_u16x8))), vcvtq_f32_u32(vmovl_high_u16(high_u16x8))}};
}

QD_INLINE F32x16 load_s16x16(const int16_t* x) {
  const int16x8_t low_s16x8 = vld1q_s16(x), high_s16x8 = vld1q_s16(x + 8);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low_s16x8))), vcvtq_f32_s32(vmovl_high_s16(low_s16x8)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high_s16x8))), vcvtq_f32_s32(vmovl_high_s16(high_s16x8))}};
}

QD_INLINE F32x16 fma_f32x16(const F32x16& x, const F32x16& y, const F32x16& z) {
  return {{vfmaq_f32(z.v[0], x.v[0], y.v[0]), vfmaq_f32(z.v[1], x.v[1], y.v[1]), vfmaq_f32(z.v[2], x.v[2], y.v[2]),
           vfmaq_f32(z.v[3], x.v[3], y.v[3])}};
}

QD_INLINE F32x16 add_to_inner_codes(const F32x16& r, const F32x16& residual, float multiplier,
                                    const InnerCodes& inner) {
  const float32x4_t round = vdupq_n_f32(kRound), low = vdupq_n_f32(inner.low), high = vdupq_n_f32(inner.high);
  F32x16 codes;
  for (int i = 0; i < 4; ++i) {
    codes.v[i] = vsubq_f32(vminq_f32(vmaxq_f32(vaddq_f32(r.v[i], round), low), high), round);
  }
  return fma_f32x16(codes, splat_f32x16(inner.multiplier),
                    fma_f32x16(residual, splat_f32x16(multiplier), splat_f32x16(inner.bias)));
}

// rint (half to even) and saturation to 0..255 for any r: FCVTNU gives 0 for negative r and NaN, UQXTN the rest.
QD_INLINE uint8x16_t round_u8x16(const F32x16& r) {
  const uint16x8_t low_u16x8 = vqmovn_high_u32(vqmovn_u32(vcvtnq_u32_f32(r.v[0])), vcvtnq_u32_f32(r.v[1]));
  const uint16x8_t high_u16x8 = vqmovn_high_u32(vqmovn_u32(vcvtnq_u32_f32(r.v[2])), vcvtnq_u32_f32(r.v[3]));
  return vqmovn_high_u16(vqmovn_u16(low_u16x8), high_u16x8);
}

// The first n (at most 16) channels, in the pieces of 8, 4, 2, 1 that n consists of.
QD_INLINE void store_u8(uint8x16_t c_u8x16, size_t n, uint8_t* c) {
  if (n >= 16) {
    vst1q_u8(c, c_u8x16);
    return;
  }
  uint8x8_t c_u8x8 = vget_low_u8(c_u8x16);
  if (n & 8) {
    vst1_u8(c, c_u8x8);
    c_u8x8 = vget_high_u8(c_u8x16);
    c += 8;
  }
  if (n & 4) {
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(c_u8x8), 0);
    __builtin_memcpy(c, &four, 4);
    c_u8x8 = vext_u8(c_u8x8, c_u8x8, 4);
    c += 4;
  }
  if (n & 2) {
    vst1_lane_u8(c, c_u8x8, 0);
    vst1_lane_u8(c + 1, c_u8x8, 1);
    c_u8x8 = vext_u8(c_u8x8, c_u8x8, 2);
    c += 2;
  }
  if (n & 1) vst1_lane_u8(c, c_u8x8, 0);
}

QD_INLINE void store(const F32x16& r, uint8_t qmin, uint8_t qmax, size_t n, uint8_t* c) {
  store_u8(vminq_u8(vmaxq_u8(round_u8x16(r), vdupq_n_u8(qmin)), vdupq_n_u8(qmax)), n, c);
}

QD_INLINE void store(const F32x16& r, uint8_t, uint8_t, size_t n, int16_t* c) {
  QD_UNROLL for (int half = 0; half < 2; ++half) {
    const int32x4_t low_s32x4 = vcvtnq_s32_f32(r.v[2 * half]), high_s32x4 = vcvtnq_s32_f32(r.v[2 * half + 1]);
    const int16x8_t c_s16x8 = vmaxq_s16(vqmovn_high_s32(vqmovn_s32(low_s32x4), high_s32x4), vdupq_n_s16(-32767));
    const size_t from = 8 * static_cast<size_t>(half);
    if (n <= from) return;
    store_u8(vreinterpretq_u8_s16(c_s16x8), 2 * (n - from), reinterpret_cast<uint8_t*>(c + from));
  }
}

QD_INLINE void store(F32x16 r, uint8_t, uint8_t, size_t n, float* c) {
  if (n >= 16) {
    for (int j = 0; j < 4; ++j) vst1q_f32(c + 4 * j, r.v[j]);
    return;
  }
  if (n & 8) {
    vst1q_f32(c, r.v[0]);
    vst1q_f32(c + 4, r.v[1]);
    r.v[0] = r.v[2], r.v[1] = r.v[3];
    c += 8;
  }
  if (n & 4) {
    vst1q_f32(c, r.v[0]);
    r.v[0] = r.v[1];
    c += 4;
  }
  float32x2_t r_f32x2 = vget_low_f32(r.v[0]);
  if (n & 2) {
    vst1_f32(c, r_f32x2);
    r_f32x2 = vget_high_f32(r.v[0]);
    c += 2;
  }
  if (n & 1) vst1_lane_f32(c, r_f32x2, 0);
}

QD_INLINE void write_depthwise(const DepthwiseParams& p, int32_t n, const int32x4_t (&acc_i32x4)[4], uint8_t* c) {
  const F32x16 r = fma_f32x16(convert_i32x16(acc_i32x4), load_f32x16(p.multiplier + n), load_f32x16(p.bias + n));
  store(r, p.qmin, p.qmax, static_cast<size_t>(p.n - n), c);
}

// ---- The walk over tiles --------------------------------------------------------------------------------------------

// Where a pixel of a tile begins: its input, and its elements of output and residual.
struct Pixel {
  const uint8_t* a;
  ptrdiff_t c, residual;

  QD_INLINE Pixel(const ConvParams& params, const ConvTile& tile, int strip, int i) {
    a = params.a + tile.a[strip] + i * params.a_stride;
    c = tile.c[strip] + i * params.c_stride;
    residual = tile.residual[strip] + i * params.residual_stride;
  }
};

template <bool kInner>
QD_INLINE void write_pixel(const ConvParams& params, const int32x4_t (&acc_i32x4)[4], const Pixel& pixel, Dtype out) {
  F32x16 r = fma_f32x16(convert_i32x16(acc_i32x4), load_f32x16(params.multiplier), load_f32x16(params.bias));
  if (params.residual) {
    const F32x16 residual = params.residual_type == Dtype::s16
                                ? load_s16x16(static_cast<const int16_t*>(params.residual) + pixel.residual)
                                : load_u8x16(static_cast<const uint8_t*>(params.residual) + pixel.residual);
    r = kInner ? add_to_inner_codes(r, residual, params.residual_multiplier, *params.inner)
               : fma_f32x16(residual, splat_f32x16(params.residual_multiplier), r);
  }
  const size_t n = static_cast<size_t>(params.n);
  if (out == Dtype::s16) {
    store(r, params.qmin, params.qmax, n, static_cast<int16_t*>(params.c) + pixel.c);
  } else if (out == Dtype::f32) {
    store(r, params.qmin, params.qmax, n, static_cast<float*>(params.c) + pixel.c);
  } else {
    store(r, params.qmin, params.qmax, n, static_cast<uint8_t*>(params.c) + pixel.c);
  }
}

using Sums = int32_t[kMostPixels][kNr];

// Of a tile whose pixels have inner codes.
template <class Dot>
__attribute__((noinline)) void write_sums(const ConvParams& params, Dtype out, const ConvTile& tile, const Sums& sums) {
  for (int q = 0; q < tile.r * tile.strips; ++q) {
    const int32x4_t acc_i32x4[4] = {vld1q_s32(sums[q]), vld1q_s32(sums[q] + 4), vld1q_s32(sums[q] + 8),
                                    vld1q_s32(sums[q] + 12)};
    write_pixel<true>(params, acc_i32x4, Pixel(params, tile, q / Dot::kMr, q % Dot::kMr), out);
  }
}

// Computes tiles from the front of the list while they have P pixels; returns how many. Into `memory`, where there is
// some, go the sums of one tile: with inner codes behind them GCC spills.
template <class Dot, int P>
__attribute__((noinline)) size_t run(const ConvParams& params, Dtype out, Sums* memory, const ConvTile* tiles,
                                     size_t n_tiles, Prefetch& prefetch) {
  static_assert(Dot::kMr == 1 || Dot::kStrips == 1, "pixel q of a tile: strip q / kMr");
  Prefetch ahead = prefetch;  // a copy that can live in registers
  size_t done = 0;
  do {
    const int8_t* w = static_cast<const int8_t*>(params.w);
    typename Dot::template Sums<P> sums(params.comp, w);
    for (int32_t t = 0; t < params.cells; ++t) {
      const uint8_t* a[P];
      QD_UNROLL for (int q = 0; q < P; ++q) {
        a[q] = Pixel(params, tiles[done], q / Dot::kMr, q % Dot::kMr).a + params.cell_offset[t];
      }
      w = sums.add_cell(a, w, params.k, ahead);
    }
    QD_UNROLL for (int q = 0; q < P; ++q) {
      const int32x4_t acc_i32x4[4] = {sums.total(q, 0), sums.total(q, 1), sums.total(q, 2), sums.total(q, 3)};
      if (memory) {
        QD_UNROLL for (int v = 0; v < 4; ++v) vst1q_s32((*memory)[q] + 4 * v, acc_i32x4[v]);
        n_tiles = 1;
      } else {
        write_pixel<false>(params, acc_i32x4, Pixel(params, tiles[done], q / Dot::kMr, q % Dot::kMr), out);
      }
    }
  } while (++done < n_tiles && tiles[done].r * tiles[done].strips == P);
  prefetch = ahead;
  return done;
}

using Run = size_t (*)(const ConvParams&, Dtype, Sums*, const ConvTile*, size_t, Prefetch&);

template <class Dot, int P>
constexpr Run run_of() {
  if constexpr (P <= Dot::kMr * Dot::kStrips) return run<Dot, P>;
  return nullptr;
}

template <class Dot, Dtype kOut>
void conv(const ConvParams* params, const ConvTile* tiles, size_t n_tiles) {
  static constexpr Run kRuns[] = {run_of<Dot, 1>(), run_of<Dot, 2>(), run_of<Dot, 3>(), run_of<Dot, 4>(),
                                  run_of<Dot, 5>()};
  Prefetch prefetch(*params);
  for (size_t done = 0; done < n_tiles;) {
    const ConvTile* const first = tiles + done;
    Sums sums;
    Sums* const memory = params->inner ? &sums : nullptr;
    done += kRuns[first->r * first->strips - 1](*params, kOut, memory, first, n_tiles - done, prefetch);
    if (memory) write_sums<Dot>(*params, kOut, *first, sums);
  }
}

template <class Dot>
constexpr ConvKernel conv_kernel(const char* name) {
  return {name,
          conv<Dot, Dtype::u8>,
          conv<Dot, Dtype::s16>,
          conv<Dot, Dtype::f32>,
          Dot::kMr,
          Dot::kStrips,
          kNr,
          WeightFormat::s8x4,
          0,
          128};
}

}  // namespace
}  // namespace qdeploy
