// What the convolutions with 256-bit vectors share: the walk over pixels and requantization. A family `Weights` gives
//     kFormat, kS16Quads    ConvKernel::format and ::s16_quads
//     kElementBytes         of a packed weight
//     kMaxRows              pixels that share the registers
//     accumulate<R, V>(slab, pixels, acc)   adds a slab of the panel to R pixels x V vectors
//     short_sums<V>(p, batch)               all sums of a batch to Batch::acc, where it has code for sums so short; or
//                                           false
//
// Four vectors need weights at 19 bytes a cycle, which L2 does not keep up with (4 bits: 94 instead of 105). So the
// pixels of all tiles are taken in batches, and a batch finishes one L1-sized slab of the panel before the next one;
// its accumulators wait in memory. Pixels pair up across tiles and rows: no width wastes anything.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "../ukernels.h"
#include "compiler.h"
#include "residual.h"

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

constexpr int kNr = 32;
constexpr int kPanelVectors = 4;  // of 8 channels
constexpr int kVectorBytes = 32;
constexpr int kBatch = 42;         // pixels; a multiple of 2 and 3 rows, and of the 14 of a full tile
constexpr int kSlabBytes = 16384;  // of weights: half of L1

typedef int32_t __attribute__((may_alias, aligned(1))) AnyInt32;  // any four bytes
typedef int16_t __attribute__((may_alias, aligned(1))) AnyInt16;

// ---- Requantization -------------------------------------------------------------------------------------------------

QD_INLINE __m256 to_f32x8(const uint8_t* a) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a))));
}

QD_INLINE __m256 to_f32x8(const int16_t* a) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a))));
}

QD_INLINE __m256i clamp_u8x32(__m256i c_u8x32, uint8_t qmin, uint8_t qmax) {
  return _mm256_min_epu8(_mm256_max_epu8(c_u8x32, _mm256_set1_epi8(static_cast<char>(qmin))),
                         _mm256_set1_epi8(static_cast<char>(qmax)));
}

// 32 channels from four vectors of rounded s32: saturation to u8 first, which no integer clamp within 0..255 notices.
QD_INLINE __m256i pack_u8x32(const __m256i (&c_i32x8)[4], uint8_t qmin, uint8_t qmax) {
  const __m256i c01_i16x16 = _mm256_packs_epi32(c_i32x8[0], c_i32x8[1]);
  const __m256i c23_i16x16 = _mm256_packs_epi32(c_i32x8[2], c_i32x8[3]);
  const __m256i lanes_u8x32 = _mm256_packus_epi16(c01_i16x16, c23_i16x16);
  const __m256i c_u8x32 = _mm256_permutevar8x32_epi32(lanes_u8x32, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return clamp_u8x32(c_u8x32, qmin, qmax);
}

// The first n (at most 32) bytes, in the pieces of 16, 8, 4, 2, 1 that n consists of.
QD_INLINE void store_u8(__m256i c_u8x32, size_t n, uint8_t* c) {
  if (n >= 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), c_u8x32);
    return;
  }
  __m128i c_u8x16 = _mm256_castsi256_si128(c_u8x32);
  if (n & 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(c), c_u8x16);
    c_u8x16 = _mm256_extracti128_si256(c_u8x32, 1);
    c += 16;
  }
  if (n & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(c), c_u8x16);
    c_u8x16 = _mm_srli_si128(c_u8x16, 8);
    c += 8;
  }
  if (n & 4) {
    *reinterpret_cast<AnyInt32*>(c) = _mm_cvtsi128_si32(c_u8x16);
    c_u8x16 = _mm_srli_si128(c_u8x16, 4);
    c += 4;
  }
  if (n & 2) {
    *reinterpret_cast<AnyInt16*>(c) = static_cast<int16_t>(_mm_extract_epi16(c_u8x16, 0));
    c_u8x16 = _mm_srli_si128(c_u8x16, 2);
    c += 2;
  }
  if (n & 1) *c = static_cast<uint8_t>(_mm_extract_epi8(c_u8x16, 0));
}

QD_INLINE __m128i load_x16(const void* bytes) { return _mm_loadu_si128(static_cast<const __m128i*>(bytes)); }

QD_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// r holds up to 32 channels, the first n of which are written.
QD_INLINE void store(const __m256 (&r_f32x8)[4], uint8_t qmin, uint8_t qmax, size_t n, uint8_t* c) {
  __m256i c_i32x8[4];
  QD_UNROLL for (int v = 0; v < 4; ++v) c_i32x8[v] = _mm256_cvtps_epi32(r_f32x8[v]);
  store_u8(pack_u8x32(c_i32x8, qmin, qmax), n, c);
}

QD_INLINE void store(const __m256 (&r_f32x8)[4], uint8_t, uint8_t, size_t n, int16_t* c) {
  QD_UNROLL for (int half = 0; half < 2; ++half) {
    const __m256i lanes_i16x16 =
        _mm256_packs_epi32(_mm256_cvtps_epi32(r_f32x8[2 * half]), _mm256_cvtps_epi32(r_f32x8[2 * half + 1]));
    const __m256i low_i16x16 = _mm256_max_epi16(lanes_i16x16, _mm256_set1_epi16(-32767));
    const size_t from = 16 * static_cast<size_t>(half);
    if (n <= from) return;
    store_u8(_mm256_permute4x64_epi64(low_i16x16, 0xd8), 2 * (n - from), reinterpret_cast<uint8_t*>(c + from));
  }
}

QD_INLINE void store(const __m256 (&r_f32x8)[4], uint8_t, uint8_t, size_t n, float* c) {
  if (n >= 32) {
    QD_UNROLL for (int v = 0; v < 4; ++v) _mm256_storeu_ps(c + 8 * v, r_f32x8[v]);
  } else {
    QD_UNROLL for (int v = 0; v < 4; ++v) {
      _mm256_maskstore_ps(c + 8 * v, first_lanes(static_cast<int>(n) - 8 * v), r_f32x8[v]);
    }
  }
}

// ---- Convolution ----------------------------------------------------------------------------------------------------

QD_INLINE void broadcast(__m256i& b, const void* a) {
  asm volatile("vpbroadcastd %1, %0" : "=x"(b) : "m"(*static_cast<const AnyInt32*>(a)));
}
QD_INLINE void add_i32(__m256i& sum, const __m256i& b) { asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(b)); }

// A slab of the panel: some whole cells, or k bytes of one cell from byte `begin` on.
struct Slab {
  const int32_t* cell_offset;
  int32_t cells;
  int32_t begin;
  int32_t k;
  const int8_t* w;
  bool first, last;
};

// Pixels that go through the panel together.
struct Batch {
  int pixels;
  Dtype out;
  const uint8_t* a[kBatch];
  ptrdiff_t c[kBatch];
  ptrdiff_t residual[kBatch];
  alignas(32) int32_t acc[kBatch][kNr];  // between two slabs, or short sums and requantization
  const char* prefetch;                  // what is left to fetch of the next panel
  size_t prefetch_lines;
};

// A panel with n <= 16 computes only two of its four vectors: kVectors = 2.
template <int kRows, int kVectors>
using Accumulators = __m256i[kRows][kVectors];

// Requantizes and writes kRows pixels of the batch from `pixel` on.
template <int kRows, int kVectors, bool kInner>
QD_INLINE void write_pixels(const ConvParams& p, const Accumulators<kRows, kVectors>& acc_i32x8, const Batch& batch,
                            int pixel) {
  __m256 r_f32x8[kRows][4] = {};
  QD_UNROLL for (int v = 0; v < kVectors; ++v) {
    const __m256 multiplier_f32x8 = _mm256_loadu_ps(p.multiplier + 8 * v), bias_f32x8 = _mm256_loadu_ps(p.bias + 8 * v);
    QD_UNROLL for (int r = 0; r < kRows; ++r) {
      r_f32x8[r][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc_i32x8[r][v]), multiplier_f32x8, bias_f32x8);
    }
  }
  if (p.residual) {
    QD_UNROLL for (int r = 0; r < kRows; ++r) {
      const ptrdiff_t at = batch.residual[pixel + r];
      QD_UNROLL for (int v = 0; v < kVectors; ++v) {
        const __m256 residual_f32x8 = p.residual_type == Dtype::s16
                                          ? to_f32x8(static_cast<const int16_t*>(p.residual) + at + 8 * v)
                                          : to_f32x8(static_cast<const uint8_t*>(p.residual) + at + 8 * v);
        if constexpr (kInner) {
          r_f32x8[r][v] = add_to_inner_codes(r_f32x8[r][v], residual_f32x8, p.residual_multiplier, *p.inner);
        } else {
          r_f32x8[r][v] = _mm256_fmadd_ps(residual_f32x8, _mm256_set1_ps(p.residual_multiplier), r_f32x8[r][v]);
        }
      }
    }
  }
  const size_t n = static_cast<size_t>(p.n);
  const uint8_t qmin = p.qmin, qmax = p.qmax;  // copies, which no store can change
  QD_UNROLL for (int r = 0; r < kRows; ++r) {
    if (batch.out == Dtype::s16) {
      store(r_f32x8[r], qmin, qmax, n, static_cast<int16_t*>(p.c) + batch.c[pixel + r]);
    } else if (batch.out == Dtype::f32) {
      store(r_f32x8[r], qmin, qmax, n, static_cast<float*>(p.c) + batch.c[pixel + r]);
    } else {
      store(r_f32x8[r], qmin, qmax, n, static_cast<uint8_t*>(p.c) + batch.c[pixel + r]);
    }
  }
}

template <int kRows, int kVectors, bool kInner>
QD_INLINE void load_and_write(const ConvParams& p, const Batch& batch, int pixel) {
  Accumulators<kRows, kVectors> acc_i32x8;
  QD_UNROLL for (int r = 0; r < kRows; ++r) {
    QD_UNROLL for (int v = 0; v < kVectors; ++v) {
      acc_i32x8[r][v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(batch.acc[pixel + r] + 8 * v));
    }
  }
  write_pixels<kRows, kVectors, kInner>(p, acc_i32x8, batch, pixel);
}

// After short sums: right behind each pair of them, the latencies of requantization would fill the schedulers.
// And with inner codes: behind the sums of AVX-VNNI, GCC would spill in their loop.
template <int kVectors, bool kInner>
__attribute__((noinline)) void write_batch(const ConvParams& p, const Batch& batch) {
  int pixel = 0;
  for (; pixel + 2 <= batch.pixels; pixel += 2) load_and_write<2, kVectors, kInner>(p, batch, pixel);
  if (pixel < batch.pixels) load_and_write<1, kVectors, kInner>(p, batch, pixel);
}

// The next panel comes from DRAM: every few pixels fetch a piece of it, so that it is in L2 when it is due.
QD_INLINE void prefetch_share(Batch* batch) {
  constexpr size_t kLines = kSlabBytes / 64 / (kBatch / 3) + 1;
  const size_t lines = batch->prefetch_lines < kLines ? batch->prefetch_lines : kLines;
  for (size_t i = 0; i < lines; ++i) _mm_prefetch(batch->prefetch + 64 * i, _MM_HINT_T1);
  batch->prefetch += 64 * lines;
  batch->prefetch_lines -= lines;
}

// Adds one slab to the pixels begin.. of the batch, kRows at a time as long as so many are left, and writes them after
// the last slab. Returns the first pixel that is not done.
template <typename Weights, int kRows, int kVectors>
__attribute__((noinline)) int run_slab(const ConvParams& p, const Slab& slab, Batch* batch, int begin) {
  int pixel = begin;
  for (; pixel + kRows <= batch->pixels; pixel += kRows) {
    Accumulators<kRows, kVectors> acc_i32x8;
    QD_UNROLL for (int r = 0; r < kRows; ++r) {
      const int32_t* acc = slab.first ? p.comp : batch->acc[pixel + r];
      QD_UNROLL for (int v = 0; v < kVectors; ++v) {
        acc_i32x8[r][v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + 8 * v));
      }
    }
    if (batch->prefetch_lines > 0) prefetch_share(batch);
    Weights::accumulate(slab, batch->a + pixel, acc_i32x8);
    if (slab.last) {
      write_pixels<kRows, kVectors, false>(p, acc_i32x8, *batch, pixel);
    } else {
      QD_UNROLL for (int r = 0; r < kRows; ++r) {
        QD_UNROLL for (int v = 0; v < kVectors; ++v) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(batch->acc[pixel + r] + 8 * v), acc_i32x8[r][v]);
        }
      }
    }
  }
  return pixel;
}

// All pixels from `begin` on: kRows at a time, then what is left.
template <typename Weights, int kRows, int kVectors>
void run_pixels(const ConvParams& p, const Slab& slab, Batch* batch, int begin) {
  const int done = run_slab<Weights, kRows, kVectors>(p, slab, batch, begin);
  if constexpr (kRows > 1) run_pixels<Weights, kRows - 1, kVectors>(p, slab, batch, done);
}

template <typename Weights, int kVectors>
void run_batch(const ConvParams& p, int32_t slab_cells, int32_t slab_k, Batch* batch) {
  const auto write = p.inner ? write_batch<kVectors, true> : write_batch<kVectors, false>;
  if (p.cells == 1 && Weights::template short_sums<kVectors>(p, batch)) {
    write(p, *batch);
    batch->pixels = 0;
    return;
  }
  for (int32_t t = 0; t < p.cells; t += slab_cells) {
    for (int32_t i = 0; i < p.k; i += slab_k) {
      Slab slab;
      slab.cell_offset = p.cell_offset + t;
      slab.cells = p.cells - t < slab_cells ? p.cells - t : slab_cells;
      slab.begin = i;
      slab.k = p.k - i < slab_k ? p.k - i : slab_k;
      slab.w = static_cast<const int8_t*>(p.w) + (static_cast<size_t>(t) * p.k + i) * (kNr * Weights::kElementBytes);
      slab.first = t == 0 && i == 0;
      slab.last = !p.inner && t + slab_cells >= p.cells && i + slab_k >= p.k;
      run_pixels<Weights, Weights::kMaxRows, kVectors>(p, slab, batch, 0);
    }
  }
  if (p.inner) write(p, *batch);
  batch->pixels = 0;
}

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// Adds the pixels of a strip from `first` on, as many as there is room for; returns how many. Where sums are short this
// is a quarter of the time: in local variables, that no store might change.
QD_INLINE int add_strip(const ConvParams& p, const ConvTile& tile, int strip, int first, Batch* batch) {
  const int left = tile.r - first, room = kBatch - batch->pixels, count = left < room ? left : room;
  const ptrdiff_t a_stride = p.a_stride, c_stride = p.c_stride, residual_stride = p.residual_stride;
  const uint8_t* a = p.a + tile.a[strip] + first * a_stride;
  ptrdiff_t c = tile.c[strip] + first * c_stride, residual = tile.residual[strip] + first * residual_stride;
  const uint8_t** to = batch->a + batch->pixels;
  ptrdiff_t *to_c = batch->c + batch->pixels, *to_residual = batch->residual + batch->pixels;
  for (int i = 0; i < count; ++i, a += a_stride, c += c_stride, residual += residual_stride) {
    to[i] = a, to_c[i] = c, to_residual[i] = residual;
  }
  batch->pixels += count;
  return count;
}

template <typename Weights, Dtype kOut>
void conv(const ConvParams* params, const ConvTile* tiles, size_t n_tiles) {
  const ConvParams& p = *params;
  constexpr int32_t kMaxK = kSlabBytes / (kNr * Weights::kElementBytes);
  const int32_t max_cells = p.k < kMaxK ? kMaxK / p.k : 1;
  const int32_t slab_cells = ceil_div(p.cells, ceil_div(p.cells, max_cells));
  const int32_t slab_k = (ceil_div(p.k, ceil_div(p.k, kMaxK)) + 31) & ~31;
  const auto run = p.n > 16 ? run_batch<Weights, 4> : run_batch<Weights, 2>;
  Batch batch;
  batch.pixels = 0;
  batch.out = kOut;
  batch.prefetch = static_cast<const char*>(p.prefetch);
  batch.prefetch_lines = p.prefetch_bytes / 64;
  for (const ConvTile* tile = tiles; tile != tiles + n_tiles; ++tile) {
    for (int s = 0; s < tile->strips; ++s) {
      for (int done = 0; done < tile->r;) {
        done += add_strip(p, *tile, s, done, &batch);
        if (batch.pixels == kBatch) run(p, slab_cells, slab_k, &batch);
      }
    }
  }
  run(p, slab_cells, slab_k, &batch);
}

template <typename Weights>
ConvKernel conv_kernel(const char* name) {
  return {name, conv<Weights, Dtype::u8>, conv<Weights, Dtype::s16>, conv<Weights, Dtype::f32>, 7, 2,
          kNr,  Weights::kFormat,         Weights::kS16Quads};
}

}  // namespace
}  // namespace qdeploy
