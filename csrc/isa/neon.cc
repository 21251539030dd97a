// Advanced SIMD without dot products, every ARMv8-A: Cortex-A53, A57, A72, A73, Graviton 1, ThunderX2.
//
// Convolution: acc[p][n] = comp[n] + sum (a[p][i] - 128) * w[i][n]. SMULL and SMLAL multiply s8 by s8 and add in s16,
// where |(a - 128) * w| <= 128 * 2^(b-1) leaves room for kSums products before SADALP adds pairs of them to int32:
//
//     bits   |product| <=   products that fit s16     instructions for 8*kSums products: SMULL/SMLAL, SADALP
//     8      16384           1 (two: 32768)           1, 1
//     7       8192           2 (3; four: 32768)       2, 1
//     6       4096           4 (7)                    4, 1
//     5       2048           8 (15)                   8, 1
//     2..4    1024          16 (31)                   16, 1
//
// Packed panel, s8x4:  w[cells][k/4][16 channels][4 bytes of k]; a vector is four channels:
//     w:    | n=0 i..i+3 | n=1 i..i+3 | n=2 i..i+3 | n=3 i..i+3 |      next vector: n=4..7
//     a:    |   a[i..i+3]     the same     the same     the same |     one DUP for four vectors
//     acc:  SMULL, the low half:  | n=0 i,i+1 | n=0 i+2,i+3 | n=1 i,i+1 | n=1 i+2,i+3 |    SMULL2: n=2, n=3
// The two sums of a channel meet in ADDP when the tile is done. 4-wide SMLAL of s16 by one lane needs no SADALP, and
// twice the multiplications.
//
//     instruction         Cortex-A57: latency, pipes      N1, A720            4 bytes of k of 2 x 16 (128 products)
//     smull, smlal        5 (1 into the sum), F0          4 (1), V0           16 in 16 cycles: the limit
//     sadalp              4 (1 into the sum), F1          4 (1), V1           16/kSums
//     dup from register   8, load pipe and F0 or F1       3, integer pipe     2
//     ldr q               5, load pipe                    5, 2 a cycle        8 (weights)
//     ldr w, eor w                                                            2, 2 (activations)
//     all                 3 a cycle                       4 a cycle           46 (8 bits), 38, 34, 32, 31
//
// So the one multiplier of these CPUs limits them to 8 products a cycle, with any bits. The A57 reaches 7.5 at 8 bits,
// where F0 and F1 have 34 instructions for 17 cycles. CPUs with equal pipes gain with every bit less: 34, 26, 22, 20,
// 19 vector instructions for 128 products. The signs of activations are flipped in an integer register, four at a time:
// an EOR of vectors would take F0 or F1, and its constant the last register.
//
// Tile of 2 pixels x 16 channels: 16 accumulators, 8 sums in s16, 4 weights, one DUP: 29 of 32 registers. Each pixel
// reads the weights anew (L1: one load every other cycle); sums of two pixels at once would need 8 registers more.
// Pixels of a tile may lie anywhere (mr 1, strips 2), so no width leaves a pixel alone. The figures are those of Arm's
// optimization guides and of the disassembly (GCC 12.2); none is measured, for want of such a CPU.
//
// Preconditions: those of ConvParams. Weights are read to 64 bytes beyond the panel: each is loaded one quad before
// its use, which in-order CPUs need. The s16 sums are volatile asm: given intrinsics GCC 12 spills them.
#include "lanes.h"
#include "neon_conv.h"
#include "neon_lanes.h"
#include "neon_winograd.h"

namespace qdeploy {
namespace {

// Four activations minus 128, in all four words.
QD_INLINE int8x16_t broadcast_centred(const uint8_t* a) {
  uint32_t a_u8x4;
  __builtin_memcpy(&a_u8x4, a, 4);
  return vreinterpretq_s8_u32(vdupq_n_u32(a_u8x4 ^ 0x80808080));
}

// The '&' keeps the sums out of the registers of a and w, from which GCC 12 would have to move them away.
QD_INLINE void multiply(int16x8_t& low, int16x8_t& high, int8x16_t a, int8x16_t w) {
  asm volatile("smull %0.8h, %1.8b, %2.8b" : "=&w"(low) : "w"(a), "w"(w));
  asm volatile("smull2 %0.8h, %1.16b, %2.16b" : "=&w"(high) : "w"(a), "w"(w));
}
QD_INLINE void multiply_add(int16x8_t& low, int16x8_t& high, int8x16_t a, int8x16_t w) {
  asm volatile("smlal %0.8h, %1.8b, %2.8b" : "+w"(low) : "w"(a), "w"(w));
  asm volatile("smlal2 %0.8h, %1.16b, %2.16b" : "+w"(high) : "w"(a), "w"(w));
}
QD_INLINE void add_pairs(int32x4_t& acc, int16x8_t sum) { asm volatile("sadalp %0.4s, %1.8h" : "+w"(acc) : "w"(sum)); }

// kSums products fit s16.
template <int kSums>
struct Smlal {
  static constexpr int kMr = 1, kStrips = 2;
  static constexpr int kBlock = kSums < 4 ? 16 : 4 * kSums;  // bytes of k

  template <int P>
  struct Sums {
    int32x4_t acc_i32x4[P][8];
    int8x16_t w_i8x16[4];  // the weights of the next four bytes of k

    QD_INLINE Sums(const int32_t* comp, const int8_t* w) {
      const int32x4_t zero = vdupq_n_s32(0);
      QD_UNROLL for (int j = 0; j < 4; ++j) {
        w_i8x16[j] = load_in_order(w + 16 * j);
        const int32x4_t comp_i32x4 = vld1q_s32(comp + 4 * j);
        QD_UNROLL for (int q = 0; q < P; ++q) {
          acc_i32x4[q][2 * j] = vzip1q_s32(comp_i32x4, zero);
          acc_i32x4[q][2 * j + 1] = vzip2q_s32(comp_i32x4, zero);
        }
      }
    }

    // Quad kQuad of kQuads and those after it: pixel q of the block that begins at a and w.
    template <int kQuad, int kQuads>
    QD_INLINE void add_quads(int q, const uint8_t* a, int16x8_t (&sum_i16x8)[8], const int8_t* w, Prefetch& prefetch) {
      if constexpr (kQuad < kQuads) {
        if (q == 0 && kQuad % 4 == 0) prefetch.fetch();
        const int8x16_t a_i8x4 = broadcast_centred(a + 4 * kQuad);
        const int8_t* next = kQuad + 1 < kQuads || q + 1 == P ? w + 64 * (kQuad + 1) : w;
        QD_UNROLL for (int j = 0; j < 4; ++j) {
          if (kQuad % kSums == 0) {
            multiply(sum_i16x8[2 * j], sum_i16x8[2 * j + 1], a_i8x4, w_i8x16[j]);
          } else {
            multiply_add(sum_i16x8[2 * j], sum_i16x8[2 * j + 1], a_i8x4, w_i8x16[j]);
          }
          w_i8x16[j] = load_in_order(next + 16 * j);
        }
        if ((kQuad + 1) % kSums == 0 || kQuad + 1 == kQuads) {
          QD_UNROLL for (int h = 0; h < 8; ++h) add_pairs(acc_i32x4[q][h], sum_i16x8[h]);
        }
        add_quads<kQuad + 1, kQuads>(q, a, sum_i16x8, w, prefetch);
      }
    }

    template <int kQuads>
    QD_INLINE const int8_t* block(const uint8_t* (&a)[P], const int8_t* w, Prefetch& prefetch) {
      QD_UNROLL for (int q = 0; q < P; ++q) {
        int16x8_t sum_i16x8[8];
        add_quads<0, kQuads>(q, a[q], sum_i16x8, w, prefetch);
        a[q] += 4 * kQuads;
      }
      return w + 64 * kQuads;
    }

    QD_INLINE const int8_t* add_cell(const uint8_t* (&a)[P], const int8_t* w, int32_t k, Prefetch& prefetch) {
      for (; k >= kBlock; k -= kBlock) w = block<kBlock / 4>(a, w, prefetch);
      if (kBlock > 32 && k & 32) w = block<8>(a, w, prefetch);
      if (kBlock > 16 && k & 16) w = block<4>(a, w, prefetch);
      if (k & 8) w = block<2>(a, w, prefetch);
      if (k & 4) w = block<1>(a, w, prefetch);
      return w;
    }

    QD_INLINE int32x4_t total(int q, int j) const { return vpaddq_s32(acc_i32x4[q][2 * j], acc_i32x4[q][2 * j + 1]); }
  };
};

// ---- Depthwise convolution ------------------------------------------------------------------------------------------

// kPixels neighbouring pixels of 16 channels. Activations and weights are widened to 16 bits: 2 UXTL and 4 SMLAL for 16
// products, and 2 SXTL for the weights of all pixels.
template <int kPixels>
QD_INLINE void depthwise_pixels(const DepthwiseParams& p, int32_t n, const uint8_t* a, uint8_t* c) {
  int32x4_t acc_i32x4[kPixels][4];
  QD_UNROLL for (int q = 0; q < kPixels; ++q) {
    QD_UNROLL for (int j = 0; j < 4; ++j) acc_i32x4[q][j] = vld1q_s32(p.comp + n + 4 * j);
  }

  const int8_t* w = p.w + n;
  for (int32_t t = 0; t < p.cells; ++t, w += p.w_stride) {
    const int8x16_t w_i8x16 = vld1q_s8(w);
    const int16x8_t w_low_i16x8 = vmovl_s8(vget_low_s8(w_i8x16)), w_high_i16x8 = vmovl_high_s8(w_i8x16);
    const uint8_t* a_cell = a + p.cell_offset[t];
    QD_UNROLL for (int q = 0; q < kPixels; ++q) {
      const uint8x16_t a_u8x16 = vld1q_u8(a_cell + q * p.a_stride);
      const int16x8_t a_low_i16x8 = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(a_u8x16)));
      const int16x8_t a_high_i16x8 = vreinterpretq_s16_u16(vmovl_high_u8(a_u8x16));
      int32x4_t(&acc)[4] = acc_i32x4[q];
      acc[0] = vmlal_s16(acc[0], vget_low_s16(a_low_i16x8), vget_low_s16(w_low_i16x8));
      acc[1] = vmlal_high_s16(acc[1], a_low_i16x8, w_low_i16x8);
      acc[2] = vmlal_s16(acc[2], vget_low_s16(a_high_i16x8), vget_low_s16(w_high_i16x8));
      acc[3] = vmlal_high_s16(acc[3], a_high_i16x8, w_high_i16x8);
    }
  }
  QD_UNROLL for (int q = 0; q < kPixels; ++q) write_depthwise(p, n, acc_i32x4[q], c + q * p.c_stride);
}

void depthwise(const DepthwiseParams* params, size_t rows, size_t pixels) {
  const DepthwiseParams& p = *params;
  for (size_t row = 0; row < rows; ++row) {
    for (int32_t n = 0; n < p.n; n += 16) {
      const uint8_t* a = p.a + static_cast<ptrdiff_t>(row) * p.a_row_stride + n;
      uint8_t* c = p.c + static_cast<ptrdiff_t>(row) * p.c_row_stride + n;
      size_t left = pixels;
      for (; left >= 4; left -= 4, a += 4 * p.a_stride, c += 4 * p.c_stride) depthwise_pixels<4>(p, n, a, c);
      for (; left > 0; --left, a += p.a_stride, c += p.c_stride) depthwise_pixels<1>(p, n, a, c);
    }
  }
}

// ---- Pools: 16 channels at a time -----------------------------------------------------------------------------------

void max_pool(const PoolParams* params, uint8_t* c) {
  const PoolParams& p = *params;
  const uint8_t* window = p.a;
  for (size_t i = 0; i < p.pixels; ++i, window += p.a_stride, c += p.c_stride) {
    for (size_t n = 0; n < p.n; n += 16) {
      uint8x16_t largest_u8x16 = vdupq_n_u8(0);
      const uint8_t* row = window + n;
      for (size_t y = 0; y < p.rows; ++y, row += p.row_stride) {
        const uint8_t* a = row;
        for (size_t x = 0; x < p.cols; ++x, a += p.col_stride) largest_u8x16 = vmaxq_u8(largest_u8x16, vld1q_u8(a));
      }
      store_u8(largest_u8x16, p.n - n, c + n);
    }
  }
}

QD_INLINE void add_u16x8(int32x4_t& low_i32x4, int32x4_t& high_i32x4, uint16x8_t x_u16x8) {
  low_i32x4 = vaddq_s32(low_i32x4, vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(x_u16x8))));
  high_i32x4 = vaddq_s32(high_i32x4, vreinterpretq_s32_u32(vmovl_high_u16(x_u16x8)));
}

// Adds 16 channels over the window at `row` to `sum`, in u16 for as long as 255 * pixels fits.
QD_INLINE void add_window(const PoolParams& p, const uint8_t* row, int32x4_t (&sum_i32x4)[4]) {
  constexpr size_t kFits = 257;  // 257 * 255 = 65535
  uint16x8_t low_u16x8 = vdupq_n_u16(0), high_u16x8 = vdupq_n_u16(0);
  size_t pixels = 0;
  for (size_t y = 0; y < p.rows; ++y, row += p.row_stride) {
    const uint8_t* a = row;
    for (size_t x = 0; x < p.cols; ++x, a += p.col_stride) {
      const uint8x16_t a_u8x16 = vld1q_u8(a);
      low_u16x8 = vaddw_u8(low_u16x8, vget_low_u8(a_u8x16));
      high_u16x8 = vaddw_high_u8(high_u16x8, a_u8x16);
      if (++pixels == kFits) {
        add_u16x8(sum_i32x4[0], sum_i32x4[1], low_u16x8);
        add_u16x8(sum_i32x4[2], sum_i32x4[3], high_u16x8);
        low_u16x8 = high_u16x8 = vdupq_n_u16(0);
        pixels = 0;
      }
    }
  }
  add_u16x8(sum_i32x4[0], sum_i32x4[1], low_u16x8);
  add_u16x8(sum_i32x4[2], sum_i32x4[3], high_u16x8);
}

template <typename Out>
void avg_pool(const AvgPoolParams* params, Out* c) {
  const PoolParams& p = params->window;
  const int32x4_t comp_i32x4 = vdupq_n_s32(-params->zero_point * static_cast<int32_t>(p.rows * p.cols));
  const F32x16 multiplier = splat_f32x16(params->multiplier), bias = splat_f32x16(params->bias);
  const uint8_t* window = p.a;
  for (size_t i = 0; i < p.pixels; ++i, window += p.a_stride, c += p.c_stride) {
    for (size_t n = 0; n < p.n; n += 16) {
      int32x4_t acc_i32x4[4] = {comp_i32x4, comp_i32x4, comp_i32x4, comp_i32x4};
      add_window(p, window + n, acc_i32x4);
      store(fma_f32x16(convert_i32x16(acc_i32x4), multiplier, bias), params->qmin, params->qmax, p.n - n, c + n);
    }
  }
}

// ---- Elementwise ----------------------------------------------------------------------------------------------------

template <typename Out>
void add(const AddParams* params, size_t n, const uint8_t* a, const uint8_t* b, Out* c) {
  const AddParams& p = *params;
  const F32x16 multiplier_a = splat_f32x16(p.multiplier_a), multiplier_b = splat_f32x16(p.multiplier_b),
               bias = splat_f32x16(p.bias);
  for (size_t i = 0; i < n; i += 16) {
    const F32x16 r_b = fma_f32x16(load_u8x16(b + i), multiplier_b, bias);
    store(fma_f32x16(load_u8x16(a + i), multiplier_a, r_b), p.qmin, p.qmax, n - i, c + i);
  }
}

// The factors are exact in f32 and so is their product; an fma with 0 gives no -0 where the integer is 0.
template <typename Out>
void mul(const MulParams* params, const uint8_t* a, const uint8_t* b, Out* c) {
  const MulParams& p = *params;
  const F32x16 one = splat_f32x16(1.0f), zero = splat_f32x16(0.0f);
  const F32x16 minus_a = splat_f32x16(-static_cast<float>(p.zero_point_a));
  const F32x16 minus_b = splat_f32x16(-static_cast<float>(p.zero_point_b));
  const F32x16 multiplier = splat_f32x16(p.multiplier), bias = splat_f32x16(p.bias);
  for (size_t pixel = 0; pixel < p.pixels; ++pixel, a += p.n, b += p.b_stride, c += p.n) {
    for (size_t i = 0; i < p.n; i += 16) {
      const F32x16 x = fma_f32x16(load_u8x16(a + i), one, minus_a), y = fma_f32x16(load_u8x16(b + i), one, minus_b);
      store(fma_f32x16(fma_f32x16(x, y, zero), multiplier, bias), p.qmin, p.qmax, p.n - i, c + i);
    }
  }
}

// The table fills 16 registers. TBL looks up 64 entries and gives 0 for larger indices, TBX leaves what was there.
void table(size_t n, const uint8_t* table, const uint8_t* a, uint8_t* c) {
  const uint8x16x4_t from_0 = vld1q_u8_x4(table), from_64 = vld1q_u8_x4(table + 64),
                     from_128 = vld1q_u8_x4(table + 128), from_192 = vld1q_u8_x4(table + 192);
  for (size_t i = 0; i < n; i += 16) {
    const uint8x16_t a_u8x16 = vld1q_u8(a + i);
    uint8x16_t c_u8x16 = vqtbl4q_u8(from_0, a_u8x16);
    c_u8x16 = vqtbx4q_u8(c_u8x16, from_64, vsubq_u8(a_u8x16, vdupq_n_u8(64)));
    c_u8x16 = vqtbx4q_u8(c_u8x16, from_128, vsubq_u8(a_u8x16, vdupq_n_u8(128)));
    c_u8x16 = vqtbx4q_u8(c_u8x16, from_192, vsubq_u8(a_u8x16, vdupq_n_u8(192)));
    store_u8(c_u8x16, n - i, c + i);
  }
}

// ---- Input ----------------------------------------------------------------------------------------------------------

// x, the lanes begin .. begin + 3 of a longer vector, with 0 in lanes n and above.
QD_INLINE float32x4_t first_lanes(float32x4_t x_f32x4, size_t n, uint32_t begin) {
  const uint32_t lanes[4] = {0, 1, 2, 3};
  const uint32x4_t lane_u32x4 = vaddq_u32(vld1q_u32(lanes), vdupq_n_u32(begin));
  const uint32x4_t mask_u32x4 = vcltq_u32(lane_u32x4, vdupq_n_u32(static_cast<uint32_t>(n)));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x_f32x4), mask_u32x4));
}

struct Quantizer {
  F32x16 inv_scale, zero_point;
  uint32x4_t not_finite_u32x4;  // collects x - x, whose bits are 0 unless x is NaN or infinite

  explicit Quantizer(const QuantizeParams& p)
      : inv_scale(splat_f32x16(p.inv_scale)),
        zero_point(splat_f32x16(p.zero_point)),
        not_finite_u32x4(vdupq_n_u32(0)) {}

  // Codes of the first n of 16 neighbouring floats. Those beyond may be NaN: they count as 0.
  QD_INLINE uint8x16_t operator()(const float* a, size_t n) {
    F32x16 x = load_f32x16(a);
    for (int j = 0; j < 4; ++j) {
      if (n < 16) x.v[j] = first_lanes(x.v[j], n, 4 * j);
      not_finite_u32x4 = vorrq_u32(not_finite_u32x4, vreinterpretq_u32_f32(vsubq_f32(x.v[j], x.v[j])));
    }
    return round_u8x16(fma_f32x16(x, inv_scale, zero_point));
  }
};

// Three planes to pixels of three bytes.
void quantize_rgb(const QuantizeParams& p, Quantizer& quantizer) {
  for (size_t i = 0; i < p.pixels; i += 16) {
    const size_t left = p.pixels - i;
    const float* a = p.a + i;
    const uint8x16x3_t c = {
        {quantizer(a, left), quantizer(a + p.plane_stride, left), quantizer(a + 2 * p.plane_stride, left)}};
    if (left >= 16) {
      vst3q_u8(p.c + 3 * i, c);
    } else {
      uint8_t pixels[48];
      vst3q_u8(pixels, c);
      for (size_t j = 0; j < 3 * left; ++j) p.c[3 * i + j] = pixels[j];
    }
  }
}

void quantize_plane(const QuantizeParams& p, size_t channel, Quantizer& quantizer) {
  const float* a = p.a + static_cast<ptrdiff_t>(channel) * p.plane_stride;
  uint8_t* c = p.c + channel;
  for (size_t i = 0; i < p.pixels; i += 16) {
    const size_t left = p.pixels - i < 16 ? p.pixels - i : 16;
    const uint8x16_t c_u8x16 = quantizer(a + i, left);
    if (p.c_stride == 1) {
      store_u8(c_u8x16, left, c + i);
    } else {
      uint8_t codes[16];
      vst1q_u8(codes, c_u8x16);
      for (size_t j = 0; j < left; ++j) c[static_cast<ptrdiff_t>(i + j) * p.c_stride] = codes[j];
    }
  }
}

bool quantize(const QuantizeParams* params) {
  Quantizer quantizer(*params);
  if (params->channels == 3 && params->c_stride == 3) {
    quantize_rgb(*params, quantizer);
  } else {
    for (size_t channel = 0; channel < params->channels; ++channel) quantize_plane(*params, channel, quantizer);
  }
  return vmaxvq_u32(quantizer.not_finite_u32x4) == 0;
}

}  // namespace

void init_neon(Kernels* kernels) {
  kernels->isa = "neon";
  const ConvKernel w4 = conv_kernel<Smlal<16>>("qu8_qc8w_conv_2x16c4_w4__neon");
  kernels->conv[2] = kernels->conv[3] = kernels->conv[4] = w4;
  kernels->conv[5] = conv_kernel<Smlal<8>>("qu8_qc8w_conv_2x16c4_w5__neon");
  kernels->conv[6] = conv_kernel<Smlal<4>>("qu8_qc8w_conv_2x16c4_w6__neon");
  kernels->conv[7] = conv_kernel<Smlal<2>>("qu8_qc8w_conv_2x16c4_w7__neon");
  kernels->conv[8] = conv_kernel<Smlal<1>>("qu8_qc8w_conv_2x16c4__neon");
  kernels->winograd[0] = winograd_kernel<Winograd4>("qu8_qc8w_winograd_4x4_4x16__neon");
  kernels->winograd[1] = winograd_kernel<Winograd2>("qu8_qc8w_winograd_2x2_4x16__neon");
  kernels->depthwise = depthwise;
  kernels->depthwise_channels = 16;
  kernels->max_pool = max_pool;
  kernels->avg_pool_qu8 = avg_pool<uint8_t>;
  kernels->avg_pool_f32 = avg_pool<float>;
  kernels->add_qu8 = add<uint8_t>;
  kernels->add_f32 = add<float>;
  kernels->mul_qu8 = mul<uint8_t>;
  kernels->mul_f32 = mul<float>;
  kernels->table = table;
  kernels->quantize = quantize;
  set_lane_kernels<NeonLanes>(kernels);
  kernels->norm_row_sums = norm_row_sums<NeonLanes>;
  kernels->norm_channel_sums = norm_channel_sums<NeonLanes>;
}

}  // namespace qdeploy
