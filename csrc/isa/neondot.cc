// Advanced SIMD with dot products (FEAT_DotProd): Cortex-A55, A75, A76, Neoverse N1, Apple M1 and later.
//
// Convolution: acc[p][n] = comp[n] + sum (a[p][i] - 128) * w[i][n]. One SDOT adds 4 channels x 4 bytes of k, exactly. A
// register holds 16 bytes of a pixel, of which SDOT picks four: no broadcasts.
//
// Packed panel, s8x4:  w[cells][k/4][16 channels][4 bytes of k]; four vectors a quad:
//     | n=0 i..i+3 | n=1 i..i+3 | n=2 i..i+3 | n=3 i..i+3 |   n=4..7   |   n=8..11   |   n=12..15
//
//     instruction          Cortex-A720 (Neoverse V2), a cycle      in 16 bytes of k of 5 x 16 (1280 products)
//     sdot by element      2 (4); latency 3, 1 into the sum        80
//     eor                  2 (4)                                    5: with the dot products 42.5 (21.3) cycles
//     ldr q                3                                       21 (16 weights, 5 activations)
//     loop, prefetch                                                8
//
// So 30.1 (60.2) products a cycle of the 32 (64) that SDOT alone could do. Tile of 5 x 16: 20 accumulators, 5
// activations, 4 weights and the sign: 30 of 32 registers; 6 x 16 would need 35. 3 x 32 halves the EORs (31 products a
// cycle), but reads twice the weights and fills 32 channels where layers have 16 or 48. 1 to 3 pixels take 4 or 2 sets
// of accumulators, for CPUs that wait for the whole latency of SDOT. The figures are those of Arm's optimization guides
// and of the disassembly (GCC 12.2); none is measured, for want of such a CPU.
//
// Preconditions: those of ConvParams. Weights are read to 64 bytes beyond the panel: each is loaded one quad before
// its use, which in-order CPUs need. Activations are read up to 12 bytes too far.
#include "neon_conv.h"

namespace qdeploy {
namespace {

QD_INLINE int8x16_t load_centred(const uint8_t* a) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(a), vdupq_n_u8(0x80)));
}

// As volatile asm, here and below: given intrinsics GCC 12 moves the loads of many quads to the front and spills.
QD_INLINE void dot(int32x4_t& acc_i32x4, int8x16_t a_i8x16, int8x16_t w_i8x16) {
  asm volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc_i32x4) : "w"(a_i8x16), "w"(w_i8x16));
}

struct Sdot {
  static constexpr int kMr = 5, kStrips = 1;

  template <int P>
  struct Sums {
    static constexpr int kSets = P == 1 ? 4 : P <= 3 ? 2 : 1;
    int32x4_t acc_i32x4[kSets][P][4];
    int8x16_t w_i8x16[4];  // the weights of the next four bytes of k

    QD_INLINE Sums(const int32_t* comp, const int8_t* w) {
      QD_UNROLL for (int j = 0; j < 4; ++j) {
        w_i8x16[j] = load_in_order(w + 16 * j);
        QD_UNROLL for (int q = 0; q < P; ++q) {
          acc_i32x4[0][q][j] = vld1q_s32(comp + 4 * j);
          QD_UNROLL for (int set = 1; set < kSets; ++set) acc_i32x4[set][q][j] = vdupq_n_s32(0);
        }
      }
    }

    // Bytes 4*kLane .. 4*kLane+3 of each a.
    template <int kLane>
    QD_INLINE void add_quad(const int8x16_t (&a_i8x16)[P], const int8_t* w) {
      QD_UNROLL for (int j = 0; j < 4; ++j) {
        QD_UNROLL for (int q = 0; q < P; ++q) {
          asm volatile("sdot %0.4s, %1.16b, %2.4b[%c3]"
                       : "+w"(acc_i32x4[kLane % kSets][q][j])
                       : "w"(w_i8x16[j]), "w"(a_i8x16[q]), "i"(kLane));
        }
        w_i8x16[j] = load_in_order(w + 64 * (kLane + 1) + 16 * j);
      }
    }

    QD_INLINE const int8_t* add_cell(const uint8_t* (&a)[P], const int8_t* w, int32_t k, Prefetch& prefetch) {
      int8x16_t a_i8x16[P];
      for (; k >= 16; k -= 16) {
        prefetch.fetch();
        QD_UNROLL for (int q = 0; q < P; ++q) {
          a_i8x16[q] = load_centred(a[q]);
          a[q] += 16;
        }
        add_quad<0>(a_i8x16, w);
        add_quad<1>(a_i8x16, w);
        add_quad<2>(a_i8x16, w);
        add_quad<3>(a_i8x16, w);
        w += 256;
      }
#pragma GCC unroll 1  // not at all: three rounds at most, and rare
      for (; k > 0; k -= 4) {
        QD_UNROLL for (int q = 0; q < P; ++q) {
          a_i8x16[q] = load_centred(a[q]);
          a[q] += 4;
        }
        add_quad<0>(a_i8x16, w);
        w += 64;
      }
      return w;
    }

    QD_INLINE int32x4_t total(int q, int j) const {
      int32x4_t sum = acc_i32x4[0][q][j];
      QD_UNROLL for (int set = 1; set < kSets; ++set) sum = vaddq_s32(sum, acc_i32x4[set][q][j]);
      return sum;
    }
  };
};

// ---- Depthwise convolution ------------------------------------------------------------------------------------------
//
// SDOT adds four cells at once, so the bytes of four cells are interleaved first, 16 channels at a time:
//
//     x0 = a0 a1 a2 ..  (cell t)    ZIP of bytes, then words     block 0: channels 0..3, 4 cells each
//     x1 = b0 b1 b2 ..  (cell t+1)  ------------------------>    block 1: channels 4..7
//     x2, x3                                                     block 2: 8..11     block 3: 12..15

QD_INLINE void interleave(const int8x16_t (&x)[4], int8x16_t (&block)[4]) {
  const int16x8_t low01 = vreinterpretq_s16_s8(vzip1q_s8(x[0], x[1])),
                  low23 = vreinterpretq_s16_s8(vzip1q_s8(x[2], x[3]));
  const int16x8_t high01 = vreinterpretq_s16_s8(vzip2q_s8(x[0], x[1])),
                  high23 = vreinterpretq_s16_s8(vzip2q_s8(x[2], x[3]));
  block[0] = vreinterpretq_s8_s16(vzip1q_s16(low01, low23));
  block[1] = vreinterpretq_s8_s16(vzip2q_s16(low01, low23));
  block[2] = vreinterpretq_s8_s16(vzip1q_s16(high01, high23));
  block[3] = vreinterpretq_s8_s16(vzip2q_s16(high01, high23));
}

// The weights of cells t..t+3; beyond the last cell: zeros.
QD_INLINE void load_weights(const DepthwiseParams& p, int32_t n, int32_t t, int8x16_t (&block)[4]) {
  int8x16_t w_i8x16[4];
  QD_UNROLL for (int i = 0; i < 4; ++i) {
    w_i8x16[i] = t + i < p.cells ? vld1q_s8(p.w + (t + i) * p.w_stride + n) : vdupq_n_s8(0);
  }
  interleave(w_i8x16, block);
}

// kPixels neighbouring pixels of 16 channels: 4 EOR, 8 ZIP, 4 SDOT for 64 products, and 8 ZIP for the weights of all.
template <int kPixels>
QD_INLINE void depthwise_pixels(const DepthwiseParams& p, int32_t n, const int32x4_t (&comp_i32x4)[4], const uint8_t* a,
                                uint8_t* c) {
  int32x4_t acc_i32x4[kPixels][4];
  QD_UNROLL for (int q = 0; q < kPixels; ++q) QD_UNROLL for (int j = 0; j < 4; ++j) acc_i32x4[q][j] = comp_i32x4[j];

  for (int32_t t = 0; t < p.cells; t += 4) {
    int8x16_t w_i8x16[4], a_i8x16[4], block_i8x16[4];
    load_weights(p, n, t, w_i8x16);
    ptrdiff_t offset[4];
    QD_UNROLL for (int i = 0; i < 4; ++i) offset[i] = p.cell_offset[t + i < p.cells ? t + i : t];
    QD_UNROLL for (int q = 0; q < kPixels; ++q) {
      QD_UNROLL for (int i = 0; i < 4; ++i) a_i8x16[i] = load_centred(a + q * p.a_stride + offset[i]);
      interleave(a_i8x16, block_i8x16);
      QD_UNROLL for (int j = 0; j < 4; ++j) dot(acc_i32x4[q][j], block_i8x16[j], w_i8x16[j]);
    }
  }
  QD_UNROLL for (int q = 0; q < kPixels; ++q) write_depthwise(p, n, acc_i32x4[q], c + q * p.c_stride);
}

void depthwise(const DepthwiseParams* params, size_t rows, size_t pixels) {
  const DepthwiseParams& p = *params;
  for (int32_t n = 0; n < p.n; n += 16) {
    int32x4_t comp_i32x4[4];  // plus 128 * sum(w), because activations are a - 128
    for (int j = 0; j < 4; ++j) comp_i32x4[j] = vld1q_s32(p.comp + n + 4 * j);
    for (int32_t t = 0; t < p.cells; t += 4) {
      int8x16_t w_i8x16[4];
      load_weights(p, n, t, w_i8x16);
      for (int j = 0; j < 4; ++j) {
        const int32x4_t sum_i32x4 = vdotq_s32(vdupq_n_s32(0), w_i8x16[j], vdupq_n_s8(-128));
        comp_i32x4[j] = vsubq_s32(comp_i32x4[j], sum_i32x4);
      }
    }
    for (size_t row = 0; row < rows; ++row) {
      const uint8_t* a = p.a + static_cast<ptrdiff_t>(row) * p.a_row_stride + n;
      uint8_t* c = p.c + static_cast<ptrdiff_t>(row) * p.c_row_stride + n;
      size_t left = pixels;
      for (; left >= 4; left -= 4, a += 4 * p.a_stride, c += 4 * p.c_stride) {
        depthwise_pixels<4>(p, n, comp_i32x4, a, c);
      }
      for (; left > 0; --left, a += p.a_stride, c += p.c_stride) depthwise_pixels<1>(p, n, comp_i32x4, a, c);
    }
  }
}

}  // namespace

void init_neondot(Kernels* kernels) {
  kernels->isa = "neondot";
  for (int bits = 2; bits <= 8; ++bits) kernels->conv[bits] = conv_kernel<Sdot>("qu8_qc8w_conv_5x16c4__neondot");
  kernels->depthwise = depthwise;
}

}  // namespace qdeploy
