// AVX-512 F, BW, DQ and VL, without VNNI: Skylake-X.
//
// Convolution: acc = comp + sum a*w, a u8 broadcast four bytes at a time, w the packed panel. vpmaddubsw multiplies u8
// by s8 and adds neighbours in s16, where 2*255*2^(b-1) has to fit: 2*255*64 = 32640 <= 32767 holds to 7 bits. Each bit
// less doubles the number of such results that can be added in s16 before vpmaddwd widens them to int32:
//
//     bits   sums in s16   instructions for 64 products: multiplications / all              GMAC/s, K = 1024 (limit)
//      7         1         vpmaddubsw, vpmaddwd by ones, vpaddd               2    / 3       270 (274)
//      6         2         2 vpmaddubsw, vpaddw, vpmaddwd, vpaddd for 128     1.5  / 2.5     346 (365)
//      5         4         4 + 3 + 1 + 1 for 256                              1.25 / 2.25    397 (438)
//     <= 4       8         8 + 7 + 1 + 1 for 512                              1.13 / 2.13    426 (487)
//      8         -         s16 weights: 2 vpmaddwd, 2 vpaddd                  2    / 4       226 (274)  (VNNI: 1 / 1)
//
// The rates are of one core of Zen 5 at 4.28 GHz, the limits two multiplications a cycle there; the additions take some
// of their slots: the bare instructions of eight sums reach 433 (peak_loops.cc). Intel has two ports for all of them (0
// and 5), so "all" counts. A layer goes to the kernel of the fewest bits that its codes allow, not those of its file:
// ConvKernel::s16_quads.
//
// Packed panel, s8x4:  w[cells][k/4][32 channels][4 bytes of k]: one vector is 16 channels x 4.
//               s16x2: w[cells][k/2][32][2].
// Weights stay in registers for several pixels: as memory operands, the two loads a cycle would be the limit (Zen 5:
// 205 instead of 270 at 7 bits, 172 instead of 226 at 8, 291 instead of 426 at 4). With one sum that is for all 14
// pixels of the tile of avx512vnni.cc: 28 accumulators, two vectors of weights, a broadcast and a product are the 32
// registers. Two or four sums are made for two pixels at a time: 4 sums, two weights, a broadcast and a product leave
// 24 accumulators, 12 pixels. Eight sums are made for four pixels at a time, 8 pixels a tile: 12 pixels by twos give
// 383 instead of 426 (two loads a cycle again), and with two or four sums 8 pixels are no faster. Every instruction is
// volatile asm: given intrinsics GCC 12 issues all the products first and spills them.
#include "avx512_depthwise.h"
#include "avx512_lanes.h"
#include "avx512_winograd.h"
#include "lanes.h"

namespace qdeploy {
namespace {

alignas(64) constexpr int16_t kOnes[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                           1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

QD_INLINE __m512i broadcast(const void* a) {
  __m512i a_u8x64;
  asm volatile("vpbroadcastd %1, %0" : "=v"(a_u8x64) : "m"(*static_cast<const uint8_t (*)[4]>(a)));
  return a_u8x64;
}
QD_INLINE __m512i load(const char* w) {
  __m512i w_i8x64;
  asm volatile("vmovdqa64 %1, %0" : "=v"(w_i8x64) : "m"(*reinterpret_cast<const __m512i*>(w)));
  return w_i8x64;
}
QD_INLINE __m512i maddubs(__m512i a_u8x64, __m512i w_i8x64) {
  __m512i sum_i16x32;
  asm volatile("vpmaddubsw %2, %1, %0" : "=v"(sum_i16x32) : "v"(a_u8x64), "v"(w_i8x64));
  return sum_i16x32;
}
QD_INLINE __m512i madd(__m512i a_u16x32, __m512i w_i16x32) {
  __m512i sum_i32x16;
  asm volatile("vpmaddwd %2, %1, %0" : "=v"(sum_i32x16) : "v"(a_u16x32), "v"(w_i16x32));
  return sum_i32x16;
}
// Pairs added to int32; the ones come from memory, because the accumulators leave no register.
QD_INLINE __m512i widen(__m512i x_i16x32) {
  __m512i sum_i32x16;
  asm volatile("vpmaddwd %2, %1, %0" : "=v"(sum_i32x16) : "v"(x_i16x32), "m"(kOnes));
  return sum_i32x16;
}
QD_INLINE void add_i16(__m512i& sum, __m512i x) { asm volatile("vpaddw %1, %0, %0" : "+v"(sum) : "v"(x)); }
QD_INLINE void add_i32(__m512i& sum, __m512i x) { asm volatile("vpaddd %1, %0, %0" : "+v"(sum) : "v"(x)); }

// Codes of at most 7, 6, 5 or 4 bits for kSums = 1, 2, 4 or 8, and what ConvKernel::s16_quads tells.
template <int kSums>
struct Maddubs {
  static constexpr WeightFormat kFormat = WeightFormat::s8x4;
  static constexpr int kFetchBytes = 16;
  static constexpr int kBlock = kSums == 8 ? 32 : 16;  // bytes of k in a round of the inner loop
  static constexpr int kMr = kSums == 1 ? 7 : kSums == 8 ? 4 : 6;
  static constexpr int kTogether = kSums == 8 ? 4 : 2;  // pixels
  static constexpr int kS16Quads = kSums;
  static constexpr int sets(int) { return 1; }  // the chain through an accumulator is one vpaddd

  // The quad of k at byte i.
  template <int R, int S>
  static QD_INLINE void add_quad(__m512i (&acc)[1][S * R][2], const Pixels (&a)[S], const char* w, int i) {
    const __m512i w0_i8x64 = load(w), w1_i8x64 = load(w + 64);
    QD_UNROLL for (int q = 0; q < R * S; ++q) {
      const __m512i a_u8x64 = broadcast(a[q / R][q % R] + i);
      add_i32(acc[0][q][0], widen(maddubs(a_u8x64, w0_i8x64)));
      add_i32(acc[0][q][1], widen(maddubs(a_u8x64, w1_i8x64)));
    }
  }

  // kQuads quads of k from byte i on, summed in s16.
  template <int kQuads, int R, int S>
  static QD_INLINE void add_quads(__m512i (&acc)[1][S * R][2], const Pixels (&a)[S], const char* w, int i) {
    if (kQuads == 1) return add_quad<R, S>(acc, a, w, i);
    QD_UNROLL for (int first = 0; first < R * S; first += kTogether) {
      const int pixels = R * S - first < kTogether ? R * S - first : kTogether;
      __m512i sum_i16x32[kTogether][2];
      QD_UNROLL for (int quad = 0; quad < kQuads; ++quad) {
        const __m512i w0_i8x64 = load(w + 128 * quad), w1_i8x64 = load(w + 128 * quad + 64);
        QD_UNROLL for (int p = 0; p < pixels; ++p) {
          const int q = first + p;
          const __m512i a_u8x64 = broadcast(a[q / R][q % R] + i + 4 * quad);
          const __m512i product0_i16x32 = maddubs(a_u8x64, w0_i8x64);
          if (quad == 0) {
            sum_i16x32[p][0] = product0_i16x32;
            sum_i16x32[p][1] = maddubs(a_u8x64, w1_i8x64);
          } else {
            add_i16(sum_i16x32[p][0], product0_i16x32);
            add_i16(sum_i16x32[p][1], maddubs(a_u8x64, w1_i8x64));
          }
        }
      }
      QD_UNROLL for (int p = 0; p < pixels; ++p) {
        add_i32(acc[0][first + p][0], widen(sum_i16x32[p][0]));
        add_i32(acc[0][first + p][1], widen(sum_i16x32[p][1]));
      }
    }
  }

  // kBytes of k, as many at a time as fit s16.
  template <int kBytes, int R, int S>
  static QD_INLINE void multiply(__m512i (&acc)[1][S * R][2], Pixels (&a)[S], const char*& w) {
    constexpr int kQuads = kBytes / 4 < kSums ? kBytes / 4 : kSums;
    QD_UNROLL for (int i = 0; i < kBytes; i += 4 * kQuads) add_quads<kQuads, R, S>(acc, a, w + 32 * i, i);
    w += 32 * kBytes;
    QD_UNROLL for (int s = 0; s < S; ++s) a[s].p += kBytes;
  }

  template <int R, int S>
  static QD_INLINE const char* cell(__m512i (&acc)[1][S * R][2], Pixels (&a)[S], const char* w, int32_t k,
                                    Prefetch& prefetch) {
    for (; k >= kBlock; k -= kBlock) {
      for (int i = 0; i < kBlock; i += kFetchBytes) prefetch.fetch();
      multiply<kBlock, R, S>(acc, a, w);
    }
    for (; kBlock > 16 && k >= 16; k -= 16) {
      prefetch.fetch();
      multiply<16, R, S>(acc, a, w);
    }
    for (; k >= 8; k -= 8) multiply<8, R, S>(acc, a, w);
    for (; k > 0; k -= 4) multiply<4, R, S>(acc, a, w);
    return w;
  }
};

// Any code of 8 bits, exactly: s16 weights. The activations of a tile are widened to u16 once per 64 channels; a
// shuffle per broadcast instead would cost 5 instructions for 64 products.
struct Madd {
  static constexpr WeightFormat kFormat = WeightFormat::s16x2;
  static constexpr int kFetchBytes = 4;
  static constexpr int kBlock = 64;
  static constexpr int kMr = 7;
  static constexpr int kS16Quads = 0;
  static constexpr int sets(int) { return 1; }

  template <int R, int S>
  static QD_INLINE const char* cell(__m512i (&acc)[1][S * R][2], Pixels (&a)[S], const char* w, int32_t k,
                                    Prefetch& prefetch) {
    alignas(64) uint16_t a_u16[S * R][kBlock];
    for (; k > 0; k -= kBlock) {
      const int32_t width = k < kBlock ? k : kBlock;
      QD_UNROLL for (int s = 0; s < S; ++s) {
        for (int32_t i = 0; i < width; i += 32) {
          QD_UNROLL for (int p = 0; p < R; ++p) {
            _mm512_store_si512(&a_u16[s * R + p][i],
                               _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a[s][p] + i))));
          }
        }
        a[s].p += kBlock;
      }
      for (int32_t i = 0; i < width; i += kFetchBytes) {
        prefetch.fetch();
        QD_UNROLL for (int pair = 0; pair < 2; ++pair) {
          const __m512i w0_i16x32 = load(w + 128 * pair), w1_i16x32 = load(w + 128 * pair + 64);
          QD_UNROLL for (int q = 0; q < S * R; ++q) {
            const __m512i a_u16x32 = broadcast(&a_u16[q][i + 2 * pair]);
            add_i32(acc[0][q][0], madd(a_u16x32, w0_i16x32));
            add_i32(acc[0][q][1], madd(a_u16x32, w1_i16x32));
          }
        }
        w += 256;
      }
    }
    return w;
  }
};

struct WinogradMadd {
  static constexpr int kRate = 29;

  static QD_INLINE void dot(__m512i& acc_i32x16, __m512i v_i16x32, __m512i u_i16x32) {
    add_i32(acc_i32x16, madd(v_i16x32, u_i16x32));
  }
};

// ---- Depthwise ------------------------------------------------------------------------------------------------------

void depthwise(const DepthwiseParams* params, size_t rows, size_t pixels) {
  const auto run =
      params->fits_s16 ? depthwise_by<Avx512Vectors, MaddubsProducts> : depthwise_by<Avx512Vectors, MaddProducts>;
  run(*params, rows, pixels);
}

// ---- Pools: 64 channels at a time -----------------------------------------------------------------------------------

void max_pool(const PoolParams* params, uint8_t* c) {
  const PoolParams& p = *params;
  const uint8_t* window = p.a;
  for (size_t i = 0; i < p.pixels; ++i, window += p.a_stride, c += p.c_stride) {
    for (size_t n = 0; n < p.n; n += 64) {
      __m512i largest_u8x64 = _mm512_setzero_si512();
      const uint8_t* row = window + n;
      for (size_t y = 0; y < p.rows; ++y, row += p.row_stride) {
        const uint8_t* a = row;
        for (size_t x = 0; x < p.cols; ++x, a += p.col_stride)
          largest_u8x64 = _mm512_max_epu8(largest_u8x64, _mm512_loadu_si512(a));
      }
      _mm512_mask_storeu_epi8(c + n, first_lanes(p.n - n), largest_u8x64);
    }
  }
}

// Widens u8 to int32 in block order.
QD_INLINE void widen_block(__m512i x_u8x64, __m512i (&block_i32x16)[4]) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i low_u16x32 = _mm512_unpacklo_epi8(x_u8x64, zero), high_u16x32 = _mm512_unpackhi_epi8(x_u8x64, zero);
  block_i32x16[0] = _mm512_unpacklo_epi16(low_u16x32, zero);
  block_i32x16[1] = _mm512_unpackhi_epi16(low_u16x32, zero);
  block_i32x16[2] = _mm512_unpacklo_epi16(high_u16x32, zero);
  block_i32x16[3] = _mm512_unpackhi_epi16(high_u16x32, zero);
}

// Sums of 64 channels over the window at `row`, in u16 for as long as 255 * pixels fits.
QD_INLINE void window_sums(const PoolParams& p, const uint8_t* row, __m512i (&sum_i32x16)[4]) {
  constexpr size_t kFits = 257;  // 257 * 255 = 65535
  const __m512i zero = _mm512_setzero_si512();
  __m512i low_u16x32 = zero, high_u16x32 = zero;
  for (int j = 0; j < 4; ++j) sum_i32x16[j] = zero;
  const auto flush = [&]() __attribute__((always_inline)) {
    sum_i32x16[0] = _mm512_add_epi32(sum_i32x16[0], _mm512_unpacklo_epi16(low_u16x32, zero));
    sum_i32x16[1] = _mm512_add_epi32(sum_i32x16[1], _mm512_unpackhi_epi16(low_u16x32, zero));
    sum_i32x16[2] = _mm512_add_epi32(sum_i32x16[2], _mm512_unpacklo_epi16(high_u16x32, zero));
    sum_i32x16[3] = _mm512_add_epi32(sum_i32x16[3], _mm512_unpackhi_epi16(high_u16x32, zero));
    low_u16x32 = high_u16x32 = zero;
  };
  size_t pixels = 0;
  for (size_t y = 0; y < p.rows; ++y, row += p.row_stride) {
    const uint8_t* a = row;
    for (size_t x = 0; x < p.cols; ++x, a += p.col_stride) {
      const __m512i a_u8x64 = _mm512_loadu_si512(a);
      low_u16x32 = _mm512_add_epi16(low_u16x32, _mm512_unpacklo_epi8(a_u8x64, zero));
      high_u16x32 = _mm512_add_epi16(high_u16x32, _mm512_unpackhi_epi8(a_u8x64, zero));
      if (++pixels == kFits) flush(), pixels = 0;
    }
  }
  flush();
}

QD_INLINE void store_block(const __m512 (&r_f32x16)[4], size_t left, uint8_t qmin, uint8_t qmax, uint8_t* c) {
  _mm512_mask_storeu_epi8(c, first_lanes(left), quantize_u8x64(r_f32x16, qmin, qmax));
}
QD_INLINE void store_block(__m512 (&r_f32x16)[4], size_t left, uint8_t, uint8_t, float* c) {
  transpose_lanes(r_f32x16);
  for (int j = 0; j < 4; ++j)
    _mm512_mask_storeu_ps(c + 16 * j, static_cast<__mmask16>(first_lanes(left) >> (16 * j)), r_f32x16[j]);
}

template <class Out>
void avg_pool(const AvgPoolParams* params, Out* c) {
  const PoolParams& p = params->window;
  const __m512i offset_i32x16 = _mm512_set1_epi32(-params->zero_point * static_cast<int32_t>(p.rows * p.cols));
  const uint8_t* window = p.a;
  for (size_t i = 0; i < p.pixels; ++i, window += p.a_stride, c += p.c_stride) {
    for (size_t n = 0; n < p.n; n += 64) {
      __m512i sum_i32x16[4];
      window_sums(p, window + n, sum_i32x16);
      __m512 r_f32x16[4];
      for (int j = 0; j < 4; ++j)
        r_f32x16[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum_i32x16[j], offset_i32x16)),
                                      _mm512_set1_ps(params->multiplier), _mm512_set1_ps(params->bias));
      store_block(r_f32x16, p.n - n, params->qmin, params->qmax, c + n);
    }
  }
}

// ---- Elementwise ----------------------------------------------------------------------------------------------------

template <class Out>
void add(const AddParams* params, size_t n, const uint8_t* a, const uint8_t* b, Out* c) {
  const __m512 multiplier_a_f32x16 = _mm512_set1_ps(params->multiplier_a),
               multiplier_b_f32x16 = _mm512_set1_ps(params->multiplier_b);
  const __m512 bias_f32x16 = _mm512_set1_ps(params->bias);
  for (size_t i = 0; i < n; i += 64) {
    __m512i a_i32x16[4], b_i32x16[4];
    widen_block(_mm512_loadu_si512(a + i), a_i32x16);
    widen_block(_mm512_loadu_si512(b + i), b_i32x16);
    __m512 r_f32x16[4];
    for (int j = 0; j < 4; ++j)
      r_f32x16[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a_i32x16[j]), multiplier_a_f32x16,
                                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(b_i32x16[j]), multiplier_b_f32x16, bias_f32x16));
    store_block(r_f32x16, n - i, params->qmin, params->qmax, c + i);
  }
}

// The factors are exact in f32 and so is their product; an fma with 0 gives no -0 where the integer is 0.
template <class Out>
void mul(const MulParams* params, const uint8_t* a, const uint8_t* b, Out* c) {
  const MulParams& p = *params;
  const __m512 zero_a_f32x16 = _mm512_set1_ps(static_cast<float>(p.zero_point_a));
  const __m512 zero_b_f32x16 = _mm512_set1_ps(static_cast<float>(p.zero_point_b));
  const __m512 multiplier_f32x16 = _mm512_set1_ps(p.multiplier), bias_f32x16 = _mm512_set1_ps(p.bias);
  for (size_t pixel = 0; pixel < p.pixels; ++pixel, a += p.n, b += p.b_stride, c += p.n) {
    for (size_t i = 0; i < p.n; i += 64) {
      __m512i a_i32x16[4], b_i32x16[4];
      widen_block(_mm512_loadu_si512(a + i), a_i32x16);
      widen_block(_mm512_loadu_si512(b + i), b_i32x16);
      __m512 r_f32x16[4];
      for (int j = 0; j < 4; ++j) {
        const __m512 a_f32x16 = _mm512_sub_ps(_mm512_cvtepi32_ps(a_i32x16[j]), zero_a_f32x16);
        const __m512 b_f32x16 = _mm512_sub_ps(_mm512_cvtepi32_ps(b_i32x16[j]), zero_b_f32x16);
        const __m512 acc_f32x16 = _mm512_fmadd_ps(a_f32x16, b_f32x16, _mm512_setzero_ps());
        r_f32x16[j] = _mm512_fmadd_ps(acc_f32x16, multiplier_f32x16, bias_f32x16);
      }
      store_block(r_f32x16, p.n - i, p.qmin, p.qmax, c + i);
    }
  }
}

// Entries are fetched as words: code >> 1 picks one of 128 words in four registers, code & 1 its byte.
void table(size_t n, const uint8_t* table, const uint8_t* a, uint8_t* c) {
  __m512i words[4];
  for (int i = 0; i < 4; ++i) words[i] = _mm512_loadu_si512(table + 64 * i);
  for (size_t i = 0; i < n; i += 32) {
    const __m512i code_u16x32 = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)));
    const __m512i word = _mm512_srli_epi16(code_u16x32, 1);  // the permutations ignore bit 6
    const __m512i low = _mm512_permutex2var_epi16(words[0], word, words[1]);
    const __m512i high = _mm512_permutex2var_epi16(words[2], word, words[3]);
    const __m512i both =
        _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code_u16x32, _mm512_set1_epi16(128)), low, high);
    const __m512i shift = _mm512_slli_epi16(_mm512_and_si512(code_u16x32, _mm512_set1_epi16(1)), 3);
    _mm256_mask_storeu_epi8(c + i, static_cast<__mmask32>(first_lanes(n - i)),
                            _mm512_cvtepi16_epi8(_mm512_srlv_epi16(both, shift)));
  }
}

// ---- Input ----------------------------------------------------------------------------------------------------------

// The clamp is in float: inputs are arbitrary and the conversion of a float beyond int32 would give INT_MIN.
struct Quantizer {
  __m512 inv_scale_f32x16, zero_point_f32x16;
  __mmask16 not_finite = 0;

  explicit Quantizer(const QuantizeParams& p)
      : inv_scale_f32x16(_mm512_set1_ps(p.inv_scale)), zero_point_f32x16(_mm512_set1_ps(p.zero_point)) {}

  // Codes of up to 16 neighbouring floats, in int32.
  QD_INLINE __m512i operator()(const float* a, __mmask16 mask) {
    constexpr int kNanOrInfinity = 0x01 | 0x08 | 0x10 | 0x80;
    const __m512 x_f32x16 = _mm512_maskz_loadu_ps(mask, a);
    not_finite = static_cast<__mmask16>(not_finite | _mm512_fpclass_ps_mask(x_f32x16, kNanOrInfinity));
    const __m512 r_f32x16 = _mm512_fmadd_ps(x_f32x16, inv_scale_f32x16, zero_point_f32x16);
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(r_f32x16, _mm512_setzero_ps()), _mm512_set1_ps(255)));
  }
};

// Three planes to pixels of three bytes: dwords of r, g, b, 0, squeezed to 12 bytes per lane, then lanes to 48 bytes.
void quantize_rgb(const QuantizeParams& p, Quantizer& quantizer) {
  const __m512i squeeze = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 3, 3, 3);
  for (size_t i = 0; i < p.pixels; i += 16) {
    const size_t left = p.pixels - i < 16 ? p.pixels - i : 16;
    const __mmask16 mask = static_cast<__mmask16>(first_lanes(left));
    const float* a = p.a + i;
    const __m512i red = quantizer(a, mask), green = quantizer(a + p.plane_stride, mask),
                  blue = quantizer(a + 2 * p.plane_stride, mask);
    const __m512i pixels =
        _mm512_or_si512(red, _mm512_or_si512(_mm512_slli_epi32(green, 8), _mm512_slli_epi32(blue, 16)));
    _mm512_mask_storeu_epi8(p.c + 3 * i, first_lanes(3 * left),
                            _mm512_permutexvar_epi32(lanes, _mm512_shuffle_epi8(pixels, squeeze)));
  }
}

void quantize_plane(const QuantizeParams& p, size_t channel, Quantizer& quantizer) {
  const float* a = p.a + static_cast<ptrdiff_t>(channel) * p.plane_stride;
  uint8_t* c = p.c + channel;
  for (size_t i = 0; i < p.pixels; i += 16) {
    const size_t left = p.pixels - i < 16 ? p.pixels - i : 16;
    const __mmask16 mask = static_cast<__mmask16>(first_lanes(left));
    const __m512i code_i32x16 = quantizer(a + i, mask);
    if (p.c_stride == 1) {
      _mm512_mask_cvtepi32_storeu_epi8(c + i, mask, code_i32x16);
    } else {
      alignas(16) uint8_t codes[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code_i32x16));
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
  return quantizer.not_finite == 0;
}

}  // namespace

void init_avx512(Kernels* kernels) {
  kernels->isa = "avx512";
  for (int bits = 2; bits <= 4; ++bits)
    kernels->conv[bits] = conv_kernel<Maddubs<8>>("qu8_qc8w_conv_8x32c4_w4__avx512");
  kernels->conv[5] = conv_kernel<Maddubs<4>>("qu8_qc8w_conv_12x32c4_w5__avx512");
  kernels->conv[6] = conv_kernel<Maddubs<2>>("qu8_qc8w_conv_12x32c4_w6__avx512");
  kernels->conv[7] = conv_kernel<Maddubs<1>>("qu8_qc8w_conv_14x32c4_w7__avx512");
  kernels->conv[8] = conv_kernel<Madd>("qu8_qc8w_conv_14x32c2__avx512");
  kernels->winograd[0] = winograd_kernel<Winograd4, WinogradMadd>("qu8_qc8w_winograd_4x4_14x32__avx512");
  kernels->winograd[1] = winograd_kernel<Winograd2, WinogradMadd>("qu8_qc8w_winograd_2x2_14x32__avx512");
  kernels->depthwise = depthwise;
  kernels->depthwise_channels = Avx512Vectors::kChannels;
  kernels->max_pool = max_pool;
  kernels->avg_pool_qu8 = avg_pool<uint8_t>;
  kernels->avg_pool_f32 = avg_pool<float>;
  kernels->add_qu8 = add<uint8_t>;
  kernels->add_f32 = add<float>;
  kernels->mul_qu8 = mul<uint8_t>;
  kernels->mul_f32 = mul<float>;
  kernels->table = table;
  kernels->quantize = quantize;
  set_lane_kernels<Avx512Lanes>(kernels);
}

}  // namespace qdeploy
