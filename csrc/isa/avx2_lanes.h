// 16 neighbouring elements in two vectors of 256 bits, for rows.h, norm.h and attention.h.
#pragma once
#include "avx2_conv.h"

namespace qdeploy {
namespace {

struct Avx2Lanes {
  struct F32 {
    __m256 low, high;
  };
  struct I32 {
    __m256i low, high;
  };

  // ---- Loads --------------------------------------------------------------------------------------------------------

  static QD_INLINE I32 load(const uint8_t* a) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a + 8)))};
  }
  static QD_INLINE I32 load(const int8_t* a) {
    const __m128i a_i8x16 = load_x16(a);
    return {_mm256_cvtepi8_epi32(a_i8x16), _mm256_cvtepi8_epi32(_mm_srli_si128(a_i8x16, 8))};
  }
  static QD_INLINE I32 load(const int16_t* a) {
    return {_mm256_cvtepi16_epi32(load_x16(a)), _mm256_cvtepi16_epi32(load_x16(a + 8))};
  }
  static QD_INLINE I32 load(const int32_t* a) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + 8))};
  }
  static QD_INLINE F32 load(const float* a) { return {_mm256_loadu_ps(a), _mm256_loadu_ps(a + 8)}; }
  static QD_INLINE F32 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static QD_INLINE I32 splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

  // ---- Arithmetic ---------------------------------------------------------------------------------------------------

  static QD_INLINE F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
  static QD_INLINE I32 rint_i32(F32 x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
  static QD_INLINE F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }
  static QD_INLINE F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)}; }
  static QD_INLINE F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }
  static QD_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)}; }
  static QD_INLINE F32 fma(F32 x, F32 y, F32 z) {
    return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
  }
  static QD_INLINE I32 add(I32 x, I32 y) { return {_mm256_add_epi32(x.low, y.low), _mm256_add_epi32(x.high, y.high)}; }
  static QD_INLINE I32 sub(I32 x, I32 y) { return {_mm256_sub_epi32(x.low, y.low), _mm256_sub_epi32(x.high, y.high)}; }
  static QD_INLINE I32 mul(I32 x, I32 y) {
    return {_mm256_mullo_epi32(x.low, y.low), _mm256_mullo_epi32(x.high, y.high)};
  }
  // Where x is in [0, 2^15) and y in [-2^15, 2^15): the upper halves are 0 times the sign. Half of mullo's instructions.
  static QD_INLINE I32 mul_s16(I32 x, I32 y) {
    return {_mm256_madd_epi16(x.low, y.low), _mm256_madd_epi16(x.high, y.high)};
  }

  // x * 2^n, n being the low bits of `shifted`; neither x nor the result is subnormal.
  static QD_INLINE __m256 add_exponent(__m256 x, __m256 shifted) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n));
  }
  static QD_INLINE F32 add_exponent(F32 x, F32 shifted) {
    return {add_exponent(x.low, shifted.low), add_exponent(x.high, shifted.high)};
  }

  // The first n lanes of x, then those of y.
  static QD_INLINE F32 first(F32 x, int n, F32 y) {
    return {_mm256_blendv_ps(y.low, x.low, _mm256_castsi256_ps(first_lanes(n))),
            _mm256_blendv_ps(y.high, x.high, _mm256_castsi256_ps(first_lanes(n - 8)))};
  }
  // x where a equals b, else y.
  static QD_INLINE F32 where_equal(I32 a, I32 b, F32 x, F32 y) {
    return {_mm256_blendv_ps(y.low, x.low, _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.low, b.low))),
            _mm256_blendv_ps(y.high, x.high, _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.high, b.high)))};
  }

  static QD_INLINE float largest(F32 x) {
    const __m256 x8 = _mm256_max_ps(x.low, x.high);
    const __m128 x4 = _mm_max_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_max_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_max_ss(x2, _mm_movehdup_ps(x2)));
  }
  static QD_INLINE int32_t total(__m256i x_i32x8) {
    const __m128i x4 = _mm_add_epi32(_mm256_castsi256_si128(x_i32x8), _mm256_extracti128_si256(x_i32x8, 1));
    const __m128i x2 = _mm_add_epi32(x4, _mm_unpackhi_epi64(x4, x4));
    return _mm_cvtsi128_si32(_mm_add_epi32(x2, _mm_srli_epi64(x2, 32)));
  }
  static QD_INLINE int32_t total(I32 x) { return total(_mm256_add_epi32(x.low, x.high)); }

  // ---- Stores: the first n lanes ------------------------------------------------------------------------------------

  static QD_INLINE __m256i pack_i16(I32 x) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8); }

  static QD_INLINE void store(F32 r, uint8_t qmin, uint8_t qmax, size_t n, uint8_t* c) {
    const I32 c_i32x16 = rint_i32(r);
    const __m256i lanes_i16x16 = _mm256_packs_epi32(c_i32x16.low, c_i32x16.high);
    const __m256i lanes_u8x32 = _mm256_packus_epi16(lanes_i16x16, lanes_i16x16);
    const __m128i c_u8x16 =
        _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(lanes_u8x32, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5)));
    const __m128i low_u8x16 = _mm_max_epu8(c_u8x16, _mm_set1_epi8(static_cast<char>(qmin)));
    const __m128i clamped_u8x16 = _mm_min_epu8(low_u8x16, _mm_set1_epi8(static_cast<char>(qmax)));
    if (n >= 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(c), clamped_u8x16);
    } else {
      store_u8(_mm256_castsi128_si256(clamped_u8x16), n, c);
    }
  }
  static QD_INLINE void store(F32 r, uint8_t, uint8_t, size_t n, int16_t* c) {
    const __m256i c_i16x16 = _mm256_max_epi16(pack_i16(rint_i32(r)), _mm256_set1_epi16(-32767));
    store_u8(c_i16x16, n >= 16 ? 32 : 2 * n, reinterpret_cast<uint8_t*>(c));
  }
  static QD_INLINE void store(F32 r, uint8_t, uint8_t, size_t n, float* c) {
    if (n >= 16) return store(r, c);
    _mm256_maskstore_ps(c, first_lanes(static_cast<int>(n)), r.low);
    _mm256_maskstore_ps(c + 8, first_lanes(static_cast<int>(n) - 8), r.high);
  }
  static QD_INLINE void store(F32 x, float* c) {
    _mm256_storeu_ps(c, x.low);
    _mm256_storeu_ps(c + 8, x.high);
  }
  static QD_INLINE void store(I32 x, int32_t* c) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), x.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + 8), x.high);
  }
  static QD_INLINE void store_i16(I32 x, int16_t* c) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), pack_i16(x));
  }

  // ---- Sums of codes and their squares ------------------------------------------------------------------------------

  // Of all codes: vpmaddwd adds two squares, at most 2 * 32767^2 < 2^31.
  class Sums {
   public:
    template <class T>
    QD_INLINE void add(const T* a, size_t n) {
      __m256i a_i16x16 = load_i16(a);
      if (n < 16) {
        const __m256i lanes_i16x16 = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        a_i16x16 =
            _mm256_and_si256(a_i16x16, _mm256_cmpgt_epi16(_mm256_set1_epi16(static_cast<int16_t>(n)), lanes_i16x16));
      }
      sum_i32x8_ = _mm256_add_epi32(sum_i32x8_, _mm256_madd_epi16(a_i16x16, _mm256_set1_epi16(1)));
      const __m256i squares_u32x8 = _mm256_madd_epi16(a_i16x16, a_i16x16);
      even_i64x4_ = _mm256_add_epi64(even_i64x4_, _mm256_and_si256(squares_u32x8, _mm256_set1_epi64x(0xffffffff)));
      odd_i64x4_ = _mm256_add_epi64(odd_i64x4_, _mm256_srli_epi64(squares_u32x8, 32));
    }
    QD_INLINE int32_t sum() const { return total(sum_i32x8_); }
    QD_INLINE int64_t squares() const {
      const __m256i all_i64x4 = _mm256_add_epi64(even_i64x4_, odd_i64x4_);
      const __m128i two_i64x2 =
          _mm_add_epi64(_mm256_castsi256_si128(all_i64x4), _mm256_extracti128_si256(all_i64x4, 1));
      return _mm_cvtsi128_si64(two_i64x2) + _mm_extract_epi64(two_i64x2, 1);
    }

   private:
    static QD_INLINE __m256i load_i16(const int16_t* a) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    }
    static QD_INLINE __m256i load_i16(const uint8_t* a) { return _mm256_cvtepu8_epi16(load_x16(a)); }

    __m256i sum_i32x8_ = _mm256_setzero_si256();
    __m256i even_i64x4_ = _mm256_setzero_si256(), odd_i64x4_ = _mm256_setzero_si256();
  };

  // Of 16 channels, each for itself.
  class ChannelSums {
   public:
    QD_INLINE void add(I32 a) {
      sum_.low = _mm256_add_epi32(sum_.low, a.low);
      sum_.high = _mm256_add_epi32(sum_.high, a.high);
      add_squares(a.low, even_i64x4_[0], odd_i64x4_[0]);
      add_squares(a.high, even_i64x4_[1], odd_i64x4_[1]);
    }
    QD_INLINE I32 sums() const { return sum_; }
    QD_INLINE void squares(int64_t (&to)[16]) const {
      QD_UNROLL for (int half = 0; half < 2; ++half) {
        const __m256i low = _mm256_unpacklo_epi64(even_i64x4_[half], odd_i64x4_[half]);   // 0 1 4 5
        const __m256i high = _mm256_unpackhi_epi64(even_i64x4_[half], odd_i64x4_[half]);  // 2 3 6 7
        __m256i* c = reinterpret_cast<__m256i*>(to + 8 * half);
        _mm256_storeu_si256(c, _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256(c + 1, _mm256_permute2x128_si256(low, high, 0x31));
      }
    }

   private:
    static QD_INLINE void add_squares(__m256i a_i32x8, __m256i& even_i64x4, __m256i& odd_i64x4) {
      const __m256i odd_i32 = _mm256_srli_epi64(a_i32x8, 32);
      even_i64x4 = _mm256_add_epi64(even_i64x4, _mm256_mul_epi32(a_i32x8, a_i32x8));
      odd_i64x4 = _mm256_add_epi64(odd_i64x4, _mm256_mul_epi32(odd_i32, odd_i32));
    }

    I32 sum_ = splat(0);
    __m256i even_i64x4_[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    __m256i odd_i64x4_[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  };
};

}  // namespace
}  // namespace qdeploy
