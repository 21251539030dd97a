// AVX2 + FMA. The convolution multiplies u8 activations by s8 weights with vpmaddubsw, which adds two products in 16
// bits and would saturate; here it never does, because narrow codes leave room:
//
//     bits   |a*w| <=     products that fit s16      kernel
//     2..4   255*8         16  (32640)               8 vpmaddubsw summed by vpaddw, then one vpmaddwd by ones, vpaddd
//     5      255*16         8  (32640)               4
//     6      255*32         4  (32640)               2
//     7      255*64         2  (32640)               1
//     8      255*128        none: vpmaddubsw is wrong. Weights are stored as s16, activations widened, vpmaddwd exact
//
// Panel, NR = 32: four vectors v of 8 channels; a vpbroadcastd of a[i..i+3] meets each.
//     s8x4    w[t][k/4][32][4]:  | v0: n=0 i..i+3 | n=1 i..i+3 | ... n=7 | v1: n=8 ... | v2 | v3 |   next i += 4
//     s16x2   w[t][k/2][32][2]:  | v0: n=0 i,i+1  | n=1 i,i+1  | ... n=7 | v1: n=8 ... | v2 | v3 |   next i += 2
//
// Instructions of Skylake (latency; ports): vpmaddubsw, vpmaddwd 5; 0,1   vpaddw, vpaddd 1; 0,1,5   vpbroadcastd from
// memory: load ports only. The chain through an accumulator is one vpaddd, so two pixels already hide every latency and
// the tile is chosen for the 4-wide front end and the two loads a cycle: one broadcast serves four vectors, weights are
// memory operands (fused). 2 pixels x 4 vectors = 8 accumulators + 4 sums + broadcast, product, ones = 15 of 16
// registers; three pixels x 4 vectors spill. Inner loop at 2.7 GHz (Cascade Lake), weights in L1, GMAC/s: 7 bits 77 (6
// pixels x 2 vectors: 72), 6: 86 (5x2: 81), 5: 96 (90), 4: 105 (92), 8: 56. Whole kernel, K = 512..4608: 73, 82, 91,
// 98, 51; K = 64: 53, 58, 62, 63, 40, where requantization and the start of a pixel pair cost 35 cycles a pixel. Zen 5
// at 4.28 GHz, K = 1024, and its limit of two multiplications a cycle: 135 (137), 175 (183), 198 (219), 209 (243), and
// 8 bits 110 (137), where a weight vector serves both pixels from a register (as memory operand: 99). At 4 to 6 bits
// that, with 3 pixels x 2 vectors, gains nothing: the bare instructions of 4 bits reach 214 (peak_loops.cc).
//
// The multiply-add operations are asm volatile: with intrinsics GCC 12 hoists all vpmaddubsw of a block and spills.
#include "avx2_attention.h"
#include "avx2_conv.h"
#include "avx2_depthwise.h"
#include "avx2_lanes.h"
#include "avx2_winograd.h"
#include "lanes.h"

namespace qdeploy {
namespace {

// ---- Convolution ----------------------------------------------------------------------------------------------------

QD_INLINE void multiply_u8s8(__m256i& product, const __m256i& b, const int8_t* w) {
  asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(b), "m"(*reinterpret_cast<const __m256i*>(w)));
}
QD_INLINE void load(__m256i& vector, const int8_t* w) {
  asm volatile("vmovdqa %1, %0" : "=x"(vector) : "m"(*reinterpret_cast<const __m256i*>(w)));
}
QD_INLINE void multiply_s16(__m256i& product, const __m256i& a, const __m256i& w) {
  asm volatile("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(a), "x"(w));
}
QD_INLINE void widen(__m256i& sum, const __m256i& ones) { asm volatile("vpmaddwd %1, %0, %0" : "+x"(sum) : "x"(ones)); }
QD_INLINE void add_i16(__m256i& sum, const __m256i& b) { asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(b)); }

// Codes of which kSums vpmaddubsw results fit s16: all codes of few bits, and what ConvKernel::s16_quads tells.
template <int kSums>
struct NarrowWeights {
  static constexpr WeightFormat kFormat = WeightFormat::s8x4;
  static constexpr int kMaxRows = 2;
  static constexpr int kElementBytes = 1;
  static constexpr int kS16Quads = kSums;
  static constexpr int kBlock = kSums == 8 ? 32 : 16;

  // kBytes of k, a multiple of 4, as many at a time as fit s16.
  template <int kBytes, int kRows, int kVectors>
  static QD_INLINE void multiply(const uint8_t* (&a)[kRows], const int8_t*& w, const __m256i& ones,
                                 Accumulators<kRows, kVectors>& acc_i32x8) {
    constexpr int kQuads = kBytes / 4 < kSums ? kBytes / 4 : kSums;  // summed in s16
    QD_UNROLL for (int i = 0; i < kBytes; i += 4 * kQuads) {
      QD_UNROLL for (int r = 0; r < kRows; ++r) {
        __m256i sum_i16x16[kVectors];
        QD_UNROLL for (int q = 0; q < kQuads; ++q) {
          if (i + 4 * q >= kBytes) continue;
          __m256i a_u8x32;
          broadcast(a_u8x32, a[r] + i + 4 * q);
          QD_UNROLL for (int v = 0; v < kVectors; ++v) {
            __m256i product_i16x16;
            multiply_u8s8(product_i16x16, a_u8x32, w + ((i / 4 + q) * kPanelVectors + v) * kVectorBytes);
            if (q == 0) {
              sum_i16x16[v] = product_i16x16;
            } else {
              add_i16(sum_i16x16[v], product_i16x16);
            }
          }
        }
        QD_UNROLL for (int v = 0; v < kVectors; ++v) widen(sum_i16x16[v], ones);
        QD_UNROLL for (int v = 0; v < kVectors; ++v) add_i32(acc_i32x8[r][v], sum_i16x16[v]);
      }
    }
    QD_UNROLL for (int r = 0; r < kRows; ++r) a[r] += kBytes;
    w += kBytes / 4 * kPanelVectors * kVectorBytes;
  }

  template <int kRows, int kVectors>
  static QD_INLINE void accumulate(const Slab& slab, const uint8_t* const* pixels,
                                   Accumulators<kRows, kVectors>& acc_i32x8) {
    const int8_t* w = slab.w;
    const __m256i ones = _mm256_set1_epi16(1);
    const uint32_t k = static_cast<uint32_t>(slab.k);
    for (int32_t t = 0; t < slab.cells; ++t) {
      const uint8_t* a[kRows];
      QD_UNROLL for (int r = 0; r < kRows; ++r) a[r] = pixels[r] + slab.cell_offset[t] + slab.begin;
      for (uint32_t i = k / kBlock; i > 0; --i) {
        asm("" : "+r"(i));  // a plain counter: GCC would compute the end of w instead, for every cell anew
        multiply<kBlock>(a, w, ones, acc_i32x8);
      }
      if (kBlock > 24 && k % kBlock == 24) {  // the rows of a 7x7 window over three channels
        multiply<24>(a, w, ones, acc_i32x8);
        continue;
      }
      if (k % kBlock & 16) multiply<16>(a, w, ones, acc_i32x8);
      if (k & 8) multiply<8>(a, w, ones, acc_i32x8);
      if (k & 4) multiply<4>(a, w, ones, acc_i32x8);
    }
  }

  // A pixel at a time and without a branch: four loads and stores instead of what it takes to walk through a slab.
  template <int kBytes, int kVectors>
  static __attribute__((noinline)) void sum_pixels(const ConvParams& p, Batch* batch) {
    const ptrdiff_t offset = p.cell_offset[0];
    const auto* const w = static_cast<const int8_t*>(p.w);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < batch->pixels; ++i) {
      const uint8_t* a[1] = {batch->a[i] + offset};
      const int8_t* from = w;
      Accumulators<1, kVectors> acc_i32x8;
      QD_UNROLL for (int v = 0; v < kVectors; ++v) {
        acc_i32x8[0][v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.comp + 8 * v));
      }
      multiply<kBytes>(a, from, ones, acc_i32x8);
      QD_UNROLL for (int v = 0; v < kVectors; ++v) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(batch->acc[i] + 8 * v), acc_i32x8[0][v]);
      }
    }
  }

  template <int kVectors>
  static bool short_sums(const ConvParams& p, Batch* batch) {
    switch (p.k) {
      case 8:
        return sum_pixels<8, kVectors>(p, batch), true;
      case 16:
        return sum_pixels<16, kVectors>(p, batch), true;
      case 24:
        return sum_pixels<24, kVectors>(p, batch), true;
      case 32:
        return sum_pixels<32, kVectors>(p, batch), true;
    }
    return false;
  }
};

// 8 bits: s16 times s16 in vpmaddwd. The slab's activations are widened once into a buffer, so that the inner loop has
// no shuffle: 56 GMAC/s, against 49 with a broadcast and two vpshufb for every four bytes.
struct WideWeights {
  static constexpr WeightFormat kFormat = WeightFormat::s16x2;
  static constexpr int kMaxRows = 2;
  static constexpr int kElementBytes = 2;
  static constexpr int kS16Quads = 0;
  static constexpr int kBufferElements = kSlabBytes / (kNr * kElementBytes) + 32;  // rounding of k, of the last store

  static QD_INLINE void widen_pixel(const Slab& slab, const uint8_t* pixel, uint16_t* a_u16) {
    for (int32_t t = 0; t < slab.cells; ++t, a_u16 += slab.k) {
      const uint8_t* a = pixel + slab.cell_offset[t] + slab.begin;
      for (int32_t i = 0; i < slab.k; i += 16) {
        const __m256i a_u16x16 = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(a_u16 + i), a_u16x16);
      }
    }
  }

  template <int kBytes, int kRows, int kVectors>
  static QD_INLINE void multiply(const uint16_t* (&a)[kRows], const int8_t*& w,
                                 Accumulators<kRows, kVectors>& acc_i32x8) {
    QD_UNROLL for (int i = 0; i < kBytes; i += 2) {
      __m256i a_u16x16[kRows];
      QD_UNROLL for (int r = 0; r < kRows; ++r) broadcast(a_u16x16[r], a[r] + i);
      QD_UNROLL for (int v = 0; v < kVectors; ++v) {
        __m256i w_i16x16;
        load(w_i16x16, w + (i / 2 * kPanelVectors + v) * kVectorBytes);
        QD_UNROLL for (int r = 0; r < kRows; ++r) {
          __m256i product_i32x8;
          multiply_s16(product_i32x8, a_u16x16[r], w_i16x16);
          add_i32(acc_i32x8[r][v], product_i32x8);
        }
      }
    }
    QD_UNROLL for (int r = 0; r < kRows; ++r) a[r] += kBytes;
    w += kBytes / 2 * kPanelVectors * kVectorBytes;
  }

  template <int kRows, int kVectors>
  static QD_INLINE void accumulate(const Slab& slab, const uint8_t* const* pixels,
                                   Accumulators<kRows, kVectors>& acc_i32x8) {
    alignas(32) uint16_t a_u16[kRows][kBufferElements];
    const uint16_t* a[kRows];
    QD_UNROLL for (int r = 0; r < kRows; ++r) {
      widen_pixel(slab, pixels[r], a_u16[r]);
      a[r] = a_u16[r];
    }
    const int8_t* w = slab.w;
    const uint32_t k = static_cast<uint32_t>(slab.cells * slab.k);
    for (uint32_t i = k / 8; i > 0; --i) multiply<8>(a, w, acc_i32x8);
    if (k & 4) multiply<4>(a, w, acc_i32x8);
  }

  template <int kVectors>
  static bool short_sums(const ConvParams&, Batch*) {
    return false;
  }
};

struct WinogradMadd {
  static constexpr int kRate = 21;

  static QD_INLINE void dot(__m256i& acc_i32x8, const __m256i& v_i16x16, const __m256i& u_i16x16) {
    __m256i product_i32x8;
    multiply_s16(product_i32x8, v_i16x16, u_i16x16);
    add_i32(acc_i32x8, product_i32x8);
  }
};

// ---- Depthwise convolution ------------------------------------------------------------------------------------------

void depthwise(const DepthwiseParams* params, size_t rows, size_t pixels) {
  const auto run =
      params->fits_s16 ? depthwise_by<Avx2Vectors, MaddubsProducts> : depthwise_by<Avx2Vectors, MaddProducts>;
  run(*params, rows, pixels);
}

// ---- Pools ----------------------------------------------------------------------------------------------------------

void max_pool(const PoolParams* params, uint8_t* c) {
  const PoolParams& p = *params;
  const uint8_t* window = p.a;
  for (size_t i = 0; i < p.pixels; ++i, window += p.a_stride, c += p.c_stride) {
    for (size_t n = 0; n < p.n; n += 32) {
      __m256i c_u8x32 = _mm256_setzero_si256();
      const uint8_t* row = window + n;
      for (size_t y = 0; y < p.rows; ++y, row += p.row_stride) {
        const uint8_t* a = row;
        for (size_t x = 0; x < p.cols; ++x, a += p.col_stride) {
          c_u8x32 = _mm256_max_epu8(c_u8x32, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
        }
      }
      store_u8(c_u8x32, p.n - n, c + n);
    }
  }
}

template <typename Out>
void avg_pool(const AvgPoolParams* params, Out* c) {
  const PoolParams& p = params->window;
  const __m256 multiplier_f32x8 = _mm256_set1_ps(params->multiplier), bias_f32x8 = _mm256_set1_ps(params->bias);
  const __m256i comp_i32x8 = _mm256_set1_epi32(-params->zero_point * static_cast<int32_t>(p.rows * p.cols));
  const uint8_t* window = p.a;
  for (size_t i = 0; i < p.pixels; ++i, window += p.a_stride, c += p.c_stride) {
    for (size_t n = 0; n < p.n; n += 32) {
      __m256i acc_i32x8[4] = {comp_i32x8, comp_i32x8, comp_i32x8, comp_i32x8};
      const uint8_t* row = window + n;
      for (size_t y = 0; y < p.rows; ++y, row += p.row_stride) {
        const uint8_t* a = row;
        for (size_t x = 0; x < p.cols; ++x, a += p.col_stride) {
          QD_UNROLL for (int v = 0; v < 4; ++v) {
            const __m128i a_u8x8 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a + 8 * v));
            acc_i32x8[v] = _mm256_add_epi32(acc_i32x8[v], _mm256_cvtepu8_epi32(a_u8x8));
          }
        }
      }
      __m256 r_f32x8[4];
      QD_UNROLL for (int v = 0; v < 4; ++v) {
        r_f32x8[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc_i32x8[v]), multiplier_f32x8, bias_f32x8);
      }
      store(r_f32x8, params->qmin, params->qmax, p.n - n, c + n);
    }
  }
}

// ---- Elementwise ----------------------------------------------------------------------------------------------------

template <typename Out>
void add(const AddParams* params, size_t n, const uint8_t* a, const uint8_t* b, Out* c) {
  const __m256 multiplier_a_f32x8 = _mm256_set1_ps(params->multiplier_a),
               multiplier_b_f32x8 = _mm256_set1_ps(params->multiplier_b);
  const __m256 bias_f32x8 = _mm256_set1_ps(params->bias);
  for (size_t i = 0; i < n; i += 32) {
    __m256 r_f32x8[4];
    QD_UNROLL for (int v = 0; v < 4; ++v) {
      const __m256 r_b_f32x8 = _mm256_fmadd_ps(to_f32x8(b + i + 8 * v), multiplier_b_f32x8, bias_f32x8);
      r_f32x8[v] = _mm256_fmadd_ps(to_f32x8(a + i + 8 * v), multiplier_a_f32x8, r_b_f32x8);
    }
    store(r_f32x8, params->qmin, params->qmax, n - i, c + i);
  }
}

// The factors are exact in f32 and so is their product, below 2^16. It is an fma with 0 because a product alone would
// be -0 where the integer is 0.
template <typename Out>
void mul(const MulParams* params, const uint8_t* a, const uint8_t* b, Out* c) {
  const MulParams& p = *params;
  const __m256 zero_a_f32x8 = _mm256_set1_ps(static_cast<float>(p.zero_point_a));
  const __m256 zero_b_f32x8 = _mm256_set1_ps(static_cast<float>(p.zero_point_b));
  const __m256 multiplier_f32x8 = _mm256_set1_ps(p.multiplier), bias_f32x8 = _mm256_set1_ps(p.bias);
  for (size_t pixel = 0; pixel < p.pixels; ++pixel, a += p.n, b += p.b_stride, c += p.n) {
    for (size_t i = 0; i < p.n; i += 32) {
      __m256 r_f32x8[4];
      QD_UNROLL for (int v = 0; v < 4; ++v) {
        const __m256 a_f32x8 = _mm256_sub_ps(to_f32x8(a + i + 8 * v), zero_a_f32x8);
        const __m256 b_f32x8 = _mm256_sub_ps(to_f32x8(b + i + 8 * v), zero_b_f32x8);
        const __m256 acc_f32x8 = _mm256_fmadd_ps(a_f32x8, b_f32x8, _mm256_setzero_ps());
        r_f32x8[v] = _mm256_fmadd_ps(acc_f32x8, multiplier_f32x8, bias_f32x8);
      }
      store(r_f32x8, p.qmin, p.qmax, p.n - i, c + i);
    }
  }
}

// vpshufb looks up 16 entries by the low 4 bits and gives 0 where bit 7 is set. Row j of the table (entries
// 16j..16j+15) is looked up with index x - 16j, in which bit 7 is set for x < 16j and for x >= 128 + 16j. So for x < 128
// the rows up to that of x count, and for x >= 128 the rows after that of x - 128. Both halves of the table are stored
// as differences of neighbouring rows, one summed (xor) from the front and one from the back, and share the indices: 16
// lookups, 15 sums and 8 indices for 32 entries, against 32 loads and 32 stores of a byte.
void table(size_t n, const uint8_t* table, const uint8_t* a, uint8_t* c) {
  __m256i low_u8x32[8], high_u8x32[8];  // of row 0..7, and of row 1..8
  for (int j = 0; j < 8; ++j) {
    __m128i low_u8x16 = load_x16(table + 16 * j), high_u8x16 = load_x16(table + 128 + 16 * j);
    if (j > 0) low_u8x16 = _mm_xor_si128(low_u8x16, load_x16(table + 16 * (j - 1)));
    if (j < 7) high_u8x16 = _mm_xor_si128(high_u8x16, load_x16(table + 128 + 16 * (j + 1)));
    low_u8x32[j] = _mm256_broadcastsi128_si256(low_u8x16);
    high_u8x32[j] = _mm256_broadcastsi128_si256(high_u8x16);
  }
  const __m256i sixteen = _mm256_set1_epi8(16);
  for (size_t i = 0; i < n; i += 32) {
    const __m256i x_u8x32 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i));
    __m256i index = x_u8x32;
    __m256i c_low = _mm256_shuffle_epi8(low_u8x32[0], index), c_high = _mm256_setzero_si256();
    QD_UNROLL for (int j = 1; j < 8; ++j) {
      index = _mm256_sub_epi8(index, sixteen);
      c_low = _mm256_xor_si256(c_low, _mm256_shuffle_epi8(low_u8x32[j], index));
      c_high = _mm256_xor_si256(c_high, _mm256_shuffle_epi8(high_u8x32[j - 1], index));
    }
    index = _mm256_sub_epi8(index, sixteen);
    c_high = _mm256_xor_si256(c_high, _mm256_shuffle_epi8(high_u8x32[7], index));
    store_u8(_mm256_blendv_epi8(c_low, c_high, x_u8x32), n - i, c + i);
  }
}

// ---- Input ----------------------------------------------------------------------------------------------------------

// The low byte of each lane is the code of one value. `not_finite` collects x - x, whose bits are 0 for finite x alone.
QD_INLINE __m256i quantize_f32x8(__m256 a_f32x8, const QuantizeParams& p, __m256& not_finite) {
  not_finite = _mm256_or_ps(not_finite, _mm256_sub_ps(a_f32x8, a_f32x8));
  const __m256 r_f32x8 = _mm256_fmadd_ps(a_f32x8, _mm256_set1_ps(p.inv_scale), _mm256_set1_ps(p.zero_point));
  const __m256 clamped_f32x8 = _mm256_min_ps(_mm256_max_ps(r_f32x8, _mm256_setzero_ps()), _mm256_set1_ps(255.0f));
  return _mm256_cvtps_epi32(clamped_f32x8);
}

// Three planes to contiguous pixels, 8 at a time; returns how many pixels are done.
QD_INLINE size_t quantize_rgb(const QuantizeParams& p, __m256& not_finite) {
  const __m256i twelve_bytes = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,  //
                                                0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  size_t i = 0;
  for (; i + 8 <= p.pixels; i += 8) {
    const float* a = p.a + i;
    const __m256i c0 = quantize_f32x8(_mm256_loadu_ps(a), p, not_finite);
    const __m256i c1 = quantize_f32x8(_mm256_loadu_ps(a + p.plane_stride), p, not_finite);
    const __m256i c2 = quantize_f32x8(_mm256_loadu_ps(a + 2 * p.plane_stride), p, not_finite);
    const __m256i pixels = _mm256_or_si256(c0, _mm256_or_si256(_mm256_slli_epi32(c1, 8), _mm256_slli_epi32(c2, 16)));
    const __m256i lanes = _mm256_shuffle_epi8(pixels, twelve_bytes);
    const __m256i c = _mm256_permutevar8x32_epi32(lanes, _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p.c + 3 * i), _mm256_castsi256_si128(c));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p.c + 3 * i + 16), _mm256_extracti128_si256(c, 1));
  }
  return i;
}

bool quantize(const QuantizeParams* params) {
  const QuantizeParams& p = *params;
  __m256 not_finite = _mm256_setzero_ps();
  const size_t done = p.channels == 3 && p.c_stride == 3 ? quantize_rgb(p, not_finite) : 0;
  for (size_t ch = 0; ch < p.channels; ++ch) {
    const float* plane = p.a + static_cast<ptrdiff_t>(ch) * p.plane_stride;
    for (size_t i = done; i < p.pixels; i += 8) {
      const size_t n = p.pixels - i < 8 ? p.pixels - i : 8;
      alignas(32) int32_t codes[8];
      _mm256_store_si256(
          reinterpret_cast<__m256i*>(codes),
          quantize_f32x8(_mm256_maskload_ps(plane + i, first_lanes(static_cast<int>(n))), p, not_finite));
      uint8_t* c = p.c + static_cast<ptrdiff_t>(i) * p.c_stride + ch;
      for (size_t j = 0; j < n; ++j, c += p.c_stride) *c = static_cast<uint8_t>(codes[j]);
    }
  }
  const __m256i bits = _mm256_castps_si256(not_finite);
  return _mm256_testz_si256(bits, bits);
}

// ---- LSQ ------------------------------------------------------------------------------------------------------------
//
// Division is the limit beyond memory: 8 numbers in 5 cycles, and in vectors of 512 bits 16 in 10.

struct LsqVectors {
  explicit LsqVectors(const LsqParams& p)
      : step(_mm256_set1_ps(p.step)), qmin(_mm256_set1_ps(p.qmin)), qmax(_mm256_set1_ps(p.qmax)) {}

  // The second operand is what max and min give where one is NaN.
  __m256 code(__m256 x_f32x8) const {
    const __m256 clamped_f32x8 = _mm256_min_ps(qmax, _mm256_max_ps(qmin, x_f32x8));
    return _mm256_round_ps(clamped_f32x8, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  __m256 step, qmin, qmax;
};

void lsq_forward(const LsqParams* params) {
  const LsqParams& p = *params;
  const LsqVectors vectors(p);
  const auto result = [&](__m256 value_f32x8) {
    return _mm256_mul_ps(vectors.code(_mm256_div_ps(value_f32x8, vectors.step)), vectors.step);
  };
  size_t i = 0;
  for (; i + 8 <= p.n; i += 8) _mm256_storeu_ps(p.c + i, result(_mm256_loadu_ps(p.value + i)));
  const __m256i tail = first_lanes(static_cast<int>(p.n - i));
  _mm256_maskstore_ps(p.c + i, tail, result(_mm256_maskload_ps(p.value + i, tail)));
}

// Sums of the numbers i, i + 8, ...
struct LsqSums {
  void add(__m256 terms_f32x8) {
    sums_f64x4[0] = _mm256_add_pd(sums_f64x4[0], _mm256_cvtps_pd(_mm256_castps256_ps128(terms_f32x8)));
    sums_f64x4[1] = _mm256_add_pd(sums_f64x4[1], _mm256_cvtps_pd(_mm256_extractf128_ps(terms_f32x8, 1)));
  }
  double all() const {
    const __m256d four_f64x4 = _mm256_add_pd(sums_f64x4[0], sums_f64x4[1]);
    const __m128d two_f64x2 = _mm_add_pd(_mm256_castpd256_pd128(four_f64x4), _mm256_extractf128_pd(four_f64x4, 1));
    return _mm_cvtsd_f64(two_f64x2) + _mm_cvtsd_f64(_mm_unpackhi_pd(two_f64x2, two_f64x2));
  }

  __m256d sums_f64x4[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
};

double lsq_error(const LsqParams* params) {
  const LsqParams& p = *params;
  const LsqVectors vectors(p);
  LsqSums sums;
  const auto add = [&](__m256 value_f32x8) {
    const __m256 code_f32x8 = vectors.code(_mm256_div_ps(value_f32x8, vectors.step));
    const __m256 error_f32x8 = _mm256_sub_ps(_mm256_mul_ps(code_f32x8, vectors.step), value_f32x8);
    sums.add(_mm256_mul_ps(error_f32x8, error_f32x8));
  };
  size_t i = 0;
  for (; i + 8 <= p.n; i += 8) add(_mm256_loadu_ps(p.value + i));
  add(_mm256_maskload_ps(p.value + i, first_lanes(static_cast<int>(p.n - i))));  // beyond them 0 without an error
  return sums.all();
}

double lsq_backward(const LsqParams* params) {
  const LsqParams& p = *params;
  const LsqVectors vectors(p);
  LsqSums sums;
  const auto gradient = [&](__m256 value_f32x8, __m256 grad_f32x8) {  // adds up the terms
    const __m256 x_f32x8 = _mm256_div_ps(value_f32x8, vectors.step), code_f32x8 = vectors.code(x_f32x8);
    const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(x_f32x8, vectors.qmin, _CMP_GE_OQ),
                                        _mm256_cmp_ps(x_f32x8, vectors.qmax, _CMP_LE_OQ));
    const __m256 slope_f32x8 = _mm256_blendv_ps(code_f32x8, _mm256_sub_ps(code_f32x8, x_f32x8), inside);
    const __m256 terms_f32x8 = _mm256_mul_ps(grad_f32x8, slope_f32x8);
    sums.add(terms_f32x8);
    return _mm256_and_ps(grad_f32x8, inside);
  };
  size_t i = 0;
  for (; i + 8 <= p.n; i += 8) {
    _mm256_storeu_ps(p.c + i, gradient(_mm256_loadu_ps(p.value + i), _mm256_loadu_ps(p.grad + i)));
  }
  const __m256i tail = first_lanes(static_cast<int>(p.n - i));  // beyond it 0 / step, and gradients of 0
  _mm256_maskstore_ps(p.c + i, tail,
                      gradient(_mm256_maskload_ps(p.value + i, tail), _mm256_maskload_ps(p.grad + i, tail)));
  return sums.all();
}

}  // namespace

void init_avx2(Kernels* kernels) {
  kernels->isa = "avx2";
  const ConvKernel w4 = conv_kernel<NarrowWeights<8>>("qu8_qc8w_conv_2x32c4_w4__avx2");
  kernels->conv[2] = kernels->conv[3] = kernels->conv[4] = w4;
  kernels->conv[5] = conv_kernel<NarrowWeights<4>>("qu8_qc8w_conv_2x32c4_w5__avx2");
  kernels->conv[6] = conv_kernel<NarrowWeights<2>>("qu8_qc8w_conv_2x32c4_w6__avx2");
  kernels->conv[7] = conv_kernel<NarrowWeights<1>>("qu8_qc8w_conv_2x32c4_w7__avx2");
  kernels->conv[8] = conv_kernel<WideWeights>("qu8_qc8w_conv_2x32c2__avx2");
  kernels->winograd[0] = winograd_kernel<Winograd4, WinogradMadd>("qu8_qc8w_winograd_4x4_6x16__avx2");
  kernels->winograd[1] = winograd_kernel<Winograd2, WinogradMadd>("qu8_qc8w_winograd_2x2_6x16__avx2");
  kernels->depthwise = depthwise;
  kernels->depthwise_channels = Avx2Vectors::kChannels;
  kernels->max_pool = max_pool;
  kernels->avg_pool_qu8 = avg_pool<uint8_t>;
  kernels->avg_pool_f32 = avg_pool<float>;
  kernels->add_qu8 = add<uint8_t>;
  kernels->add_f32 = add<float>;
  kernels->mul_qu8 = mul<uint8_t>;
  kernels->mul_f32 = mul<float>;
  kernels->table = table;
  kernels->quantize = quantize;
  set_lane_kernels<Avx2Lanes>(kernels);
  kernels->norm_row_sums = norm_row_sums<Avx2Lanes>;
  kernels->norm_channel_sums = norm_channel_sums<Avx2Lanes>;
  kernels->attention_q = attention_q;
  kernels->attention_keys = attention_keys;
  kernels->attention_values = attention_values;
  kernels->lsq_forward = lsq_forward;
  kernels->lsq_backward = lsq_backward;
  kernels->lsq_error = lsq_error;
}

}  // namespace qdeploy
