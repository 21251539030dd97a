// What attention multiplies, packed with 256-bit vectors, for panels of any multiple of 8 with pairs: AVX2 and all
// above. An element of keys costs 1.5 shuffles for 8 of them, one of values half a shuffle.
#pragma once
#include "avx2_conv.h"

namespace qdeploy {
namespace {

// 16 channels of a row from channel i on, minus the zero point; 0 beyond channel n.
QD_INLINE __m256i centred(const AttentionPack& p, int32_t row, int32_t i) {
  const __m256i a_u16x16 = _mm256_cvtepu8_epi16(load_x16(p.a + row * p.a_stride + i));
  const __m256i a_i16x16 = _mm256_sub_epi16(a_u16x16, _mm256_set1_epi16(p.zero_point));
  if (p.n - i >= 16) return a_i16x16;
  const __m256i lanes_i16x16 = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm256_and_si256(a_i16x16, _mm256_cmpgt_epi16(_mm256_set1_epi16(static_cast<int16_t>(p.n - i)), lanes_i16x16));
}

QD_INLINE void store_i16(__m256i x, int16_t* c) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), x); }

void attention_q(const AttentionPack* params) {
  const AttentionPack& p = *params;
  for (int32_t i = 0; i < p.n; i += 16) {
    int16_t* c = p.c + i / kWinogradChunk * p.chunk_stride + i % kWinogradChunk;
    for (int32_t row = 0; row < p.rows; ++row) store_i16(centred(p, row, i), c + row * kWinogradChunk);
  }
}

// Rows and columns of 8x8 dwords change places.
QD_INLINE void transpose(__m256i (&x)[8]) {
  __m256i y[8];
  QD_UNROLL for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  QD_UNROLL for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm256_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm256_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm256_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  QD_UNROLL for (int i = 0; i < 4; ++i) {
    y[i] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x31);
  }
  QD_UNROLL for (int i = 0; i < 8; ++i) x[i] = y[i];
}

// A dword is a pair of channels of one key.
void attention_keys(const AttentionPack* params) {
  const AttentionPack& p = *params;
  const int32_t pairs = (p.n + 7) / 8 * 4;
  int16_t* panel = p.c;
  for (int32_t first = 0; first < p.rows; first += p.nr, panel += 2 * pairs * p.nr) {
    for (int32_t i = 0; i < p.nr; i += 8) {
      for (int32_t pair = 0; pair < pairs; pair += 8) {
        __m256i x[8];
        QD_UNROLL for (int j = 0; j < 8; ++j) {
          const int32_t key = first + i + j;
          x[j] = key < p.rows ? centred(p, key, 2 * pair) : _mm256_setzero_si256();
        }
        transpose(x);
        const int32_t left = pairs - pair;
        QD_UNROLL for (int j = 0; j < 8; ++j) {
          if (j < left) store_i16(x[j], panel + 2 * ((pair + j) * p.nr + i));
        }
      }
    }
  }
}

void attention_values(const AttentionPack* params) {
  const AttentionPack& p = *params;
  const int32_t keys = (p.rows + 7) / 8 * 8;
  int16_t* panel = p.c;
  for (int32_t first = 0; first < p.n; first += p.nr, panel += keys * p.nr) {
    for (int32_t key = 0; key < keys; key += 2) {
      for (int32_t i = 0; i < p.nr; i += 16) {
        const int32_t channel = first + i;
        const __m256i zero = _mm256_setzero_si256();
        const __m256i a = channel < p.n && key < p.rows ? centred(p, key, channel) : zero;
        const __m256i b = channel < p.n && key + 1 < p.rows ? centred(p, key + 1, channel) : zero;
        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        int16_t* c = panel + key * p.nr + 2 * i;
        store_i16(_mm256_permute2x128_si256(low, high, 0x20), c);
        store_i16(_mm256_permute2x128_si256(low, high, 0x31), c + 16);
      }
    }
  }
}

}  // namespace
}  // namespace qdeploy
