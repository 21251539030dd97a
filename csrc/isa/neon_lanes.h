// 16 neighbouring elements in four vectors of 128 bits, for rows.h, norm.h and attention.h.
#pragma once
#include "neon_conv.h"

namespace qdeploy {
namespace {

struct NeonLanes {
  using F32 = F32x16;
  struct I32 {
    int32x4_t v[4];
  };

  // The same of each vector.
  template <class To, class Of>
  static QD_INLINE To each(const Of& of) {
    return {{of(0), of(1), of(2), of(3)}};
  }

  // ---- Loads --------------------------------------------------------------------------------------------------------

  static QD_INLINE I32 widen(int16x8_t low, int16x8_t high) {
    return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
  }
  static QD_INLINE I32 load(const uint8_t* a) {
    const uint8x16_t a_u8x16 = vld1q_u8(a);
    return widen(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(a_u8x16))), vreinterpretq_s16_u16(vmovl_high_u8(a_u8x16)));
  }
  static QD_INLINE I32 load(const int8_t* a) {
    const int8x16_t a_i8x16 = vld1q_s8(a);
    return widen(vmovl_s8(vget_low_s8(a_i8x16)), vmovl_high_s8(a_i8x16));
  }
  static QD_INLINE I32 load(const int16_t* a) { return widen(vld1q_s16(a), vld1q_s16(a + 8)); }
  static QD_INLINE I32 load(const int32_t* a) {
    return each<I32>([=](int i) { return vld1q_s32(a + 4 * i); });
  }
  static QD_INLINE F32 load(const float* a) { return load_f32x16(a); }
  static QD_INLINE F32 splat(float x) { return splat_f32x16(x); }
  static QD_INLINE I32 splat(int32_t x) {
    return each<I32>([=](int) { return vdupq_n_s32(x); });
  }

  // ---- Arithmetic ---------------------------------------------------------------------------------------------------

  static QD_INLINE F32 to_f32(const I32& x) { return convert_i32x16(x.v); }
  static QD_INLINE I32 rint_i32(const F32& x) {
    return each<I32>([&](int i) { return vcvtnq_s32_f32(x.v[i]); });
  }
  static QD_INLINE F32 add(const F32& x, const F32& y) {
    return each<F32>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
  }
  static QD_INLINE F32 sub(const F32& x, const F32& y) {
    return each<F32>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
  }
  static QD_INLINE F32 mul(const F32& x, const F32& y) {
    return each<F32>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
  }
  static QD_INLINE F32 max(const F32& x, const F32& y) {
    return each<F32>([&](int i) { return vmaxq_f32(x.v[i], y.v[i]); });
  }
  static QD_INLINE F32 fma(const F32& x, const F32& y, const F32& z) { return fma_f32x16(x, y, z); }
  static QD_INLINE I32 add(const I32& x, const I32& y) {
    return each<I32>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); });
  }
  static QD_INLINE I32 sub(const I32& x, const I32& y) {
    return each<I32>([&](int i) { return vsubq_s32(x.v[i], y.v[i]); });
  }
  static QD_INLINE I32 mul(const I32& x, const I32& y) {
    return each<I32>([&](int i) { return vmulq_s32(x.v[i], y.v[i]); });
  }
  static QD_INLINE I32 mul_s16(const I32& x, const I32& y) { return mul(x, y); }

  // x * 2^n, n being the low bits of `shifted`; neither x nor the result is subnormal.
  static QD_INLINE F32 add_exponent(const F32& x, const F32& shifted) {
    return each<F32>([&](int i) {
      const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v[i]), 23);
      return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x.v[i]), n));
    });
  }

  // The first n lanes of x, then those of y.
  static QD_INLINE F32 first(const F32& x, int n, const F32& y) {
    const int32_t numbers[4] = {0, 1, 2, 3};
    return each<F32>([&](int i) {
      const int32x4_t lanes = vaddq_s32(vld1q_s32(numbers), vdupq_n_s32(4 * i));
      return vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(n)), x.v[i], y.v[i]);
    });
  }
  // x where a equals b, else y.
  static QD_INLINE F32 where_equal(const I32& a, const I32& b, const F32& x, const F32& y) {
    return each<F32>([&](int i) { return vbslq_f32(vceqq_s32(a.v[i], b.v[i]), x.v[i], y.v[i]); });
  }
  static QD_INLINE float largest(const F32& x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
  }
  static QD_INLINE int32_t total(const I32& x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
  }

  // ---- Stores: the first n lanes ------------------------------------------------------------------------------------

  static QD_INLINE int16x8_t pack_i16(const I32& x, int i) { return vqmovn_high_s32(vqmovn_s32(x.v[i]), x.v[i + 1]); }

  static QD_INLINE void store(const F32& r, uint8_t qmin, uint8_t qmax, size_t n, uint8_t* c) {
    qdeploy::store(r, qmin, qmax, n, c);
  }
  static QD_INLINE void store(const F32& r, uint8_t qmin, uint8_t qmax, size_t n, int16_t* c) {
    qdeploy::store(r, qmin, qmax, n, c);
  }
  static QD_INLINE void store(const F32& r, uint8_t qmin, uint8_t qmax, size_t n, float* c) {
    qdeploy::store(r, qmin, qmax, n, c);
  }
  static QD_INLINE void store(const F32& x, float* c) {
    QD_UNROLL for (int i = 0; i < 4; ++i) vst1q_f32(c + 4 * i, x.v[i]);
  }
  static QD_INLINE void store(const I32& x, int32_t* c) {
    QD_UNROLL for (int i = 0; i < 4; ++i) vst1q_s32(c + 4 * i, x.v[i]);
  }
  static QD_INLINE void store_i16(const I32& x, int16_t* c) {
    vst1q_s16(c, pack_i16(x, 0));
    vst1q_s16(c + 8, pack_i16(x, 2));
  }

  // ---- Sums of codes and their squares ------------------------------------------------------------------------------

  // Of all codes: SADALP adds pairs to the wider type.
  class Sums {
   public:
    template <class T>
    QD_INLINE void add(const T* a, size_t n) {
      int16x8_t low, high;
      load_i16(a, low, high);
      add(n < 16 ? masked(low, n, 0) : low);
      add(n < 16 ? masked(high, n, 8) : high);
    }
    QD_INLINE int32_t sum() const { return vaddvq_s32(sum_i32x4_); }
    QD_INLINE int64_t squares() const { return vaddvq_s64(squares_i64x2_); }

   private:
    static QD_INLINE void load_i16(const int16_t* a, int16x8_t& low, int16x8_t& high) {
      low = vld1q_s16(a), high = vld1q_s16(a + 8);
    }
    static QD_INLINE void load_i16(const uint8_t* a, int16x8_t& low, int16x8_t& high) {
      const uint8x16_t a_u8x16 = vld1q_u8(a);
      low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(a_u8x16)));
      high = vreinterpretq_s16_u16(vmovl_high_u8(a_u8x16));
    }
    static QD_INLINE int16x8_t masked(int16x8_t a_i16x8, size_t n, int16_t begin) {
      const int16_t numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
      const int16x8_t lanes = vaddq_s16(vld1q_s16(numbers), vdupq_n_s16(begin));
      return vandq_s16(a_i16x8, vreinterpretq_s16_u16(vcltq_s16(lanes, vdupq_n_s16(static_cast<int16_t>(n)))));
    }
    QD_INLINE void add(int16x8_t a_i16x8) {
      sum_i32x4_ = vpadalq_s16(sum_i32x4_, a_i16x8);
      const int16x4_t low = vget_low_s16(a_i16x8);
      squares_i64x2_ = vpadalq_s32(squares_i64x2_, vmull_s16(low, low));
      squares_i64x2_ = vpadalq_s32(squares_i64x2_, vmull_high_s16(a_i16x8, a_i16x8));
    }

    int32x4_t sum_i32x4_ = vdupq_n_s32(0);
    int64x2_t squares_i64x2_ = vdupq_n_s64(0);
  };

  // Of 16 channels, each for itself.
  class ChannelSums {
   public:
    QD_INLINE void add(const I32& a) {
      sum_ = NeonLanes::add(sum_, a);
      QD_UNROLL for (int i = 0; i < 4; ++i) {
        const int32x2_t low = vget_low_s32(a.v[i]);
        squares_i64x2_[2 * i] = vmlal_s32(squares_i64x2_[2 * i], low, low);
        squares_i64x2_[2 * i + 1] = vmlal_high_s32(squares_i64x2_[2 * i + 1], a.v[i], a.v[i]);
      }
    }
    QD_INLINE I32 sums() const { return sum_; }
    QD_INLINE void squares(int64_t (&to)[16]) const {
      QD_UNROLL for (int i = 0; i < 8; ++i) vst1q_s64(to + 2 * i, squares_i64x2_[i]);
    }

   private:
    I32 sum_ = splat(0);
    int64x2_t squares_i64x2_[8] = {};
  };
};

}  // namespace
}  // namespace qdeploy
