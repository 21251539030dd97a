// Depthwise convolution, written once: by parts of the window of up to 4 x kPartColumns cells, Vectors::kChannels
// channels at a time.
//
//     column x of the input      r0 = a0 a1 ..     unpack bytes, then words    entry x: all four bytes of channel 0,
//     under the rows of a part   r1 = b0 b1 ..    ------------------------>    of channel 1, ..  in four vectors
//                                r2, r3
//     output pixel               sum over the columns of the part of entry * weights, which are interleaved alike
//
// Entries of a run of pixels wait in L1: neighbours share the columns of their windows, so that a 3x3 window of stride
// 1 costs one interleaving instead of three. They are in "block order", which the packs at the end undo:
//
//     block 0, lane l: channels 16l+0..3     1: 16l+4..7     2: 16l+8..11     3: 16l+12..15
//
// `Vectors` has the instructions of a width. `Products<Vectors>` gives
//     kVectors                               of an entry
//     activations(rows, entry)               an entry from a vector of each row
//     weights(rows, entry)                   likewise, of s8
//     begin(sums, acc, entry, weights)       sums of one column; acc is in block order
//     add(sums, entry, weights)              of one more
//     finish(sums, acc)                      acc plus the sums
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../ukernels.h"
#include "compiler.h"

namespace qdeploy {
namespace {  // internal linkage: each file compiles its own copy with its own -m flags

constexpr int kPartRows = 4, kPartColumns = 16;
constexpr int kEntries = 64;  // 16 KB

// ---- Products -------------------------------------------------------------------------------------------------------

template <class Vectors>
QD_INLINE void interleave(const typename Vectors::Int (&rows)[4], typename Vectors::Int (&block)[4]) {
  using V = Vectors;
  const typename V::Int low01 = V::unpack_low_8(rows[0], rows[1]), low23 = V::unpack_low_8(rows[2], rows[3]);
  const typename V::Int high01 = V::unpack_high_8(rows[0], rows[1]), high23 = V::unpack_high_8(rows[2], rows[3]);
  block[0] = V::unpack_low_16(low01, low23);
  block[1] = V::unpack_high_16(low01, low23);
  block[2] = V::unpack_low_16(high01, high23);
  block[3] = V::unpack_high_16(high01, high23);
}

// s16 products of any codes: two of the four rows in the even bytes of a block, two in the odd ones.
template <class Vectors>
struct MaddProducts {
  using V = Vectors;
  using Int = typename V::Int;
  static constexpr int kVectors = 8;

  static QD_INLINE void activations(const Int (&rows)[4], Int* entry) {
    Int block[4];
    interleave<V>(rows, block);
    QD_UNROLL for (int j = 0; j < 4; ++j) {
      V::store(entry + j, V::even_bytes_u16(block[j]));
      V::store(entry + 4 + j, V::odd_bytes_u16(block[j]));
    }
  }
  static QD_INLINE void weights(const Int (&rows)[4], Int* entry) {
    Int block[4];
    interleave<V>(rows, block);
    QD_UNROLL for (int j = 0; j < 4; ++j) {
      V::store(entry + j, V::even_bytes_s16(block[j]));
      V::store(entry + 4 + j, V::odd_bytes_s16(block[j]));
    }
  }
  static QD_INLINE void begin(Int (&sums)[4], const Int (&acc)[4], const Int* entry, const Int* weights) {
    QD_UNROLL for (int j = 0; j < 4; ++j) sums[j] = acc[j];
    add(sums, entry, weights);
  }
  static QD_INLINE void add(Int (&sums)[4], const Int* entry, const Int* weights) {
    QD_UNROLL for (int j = 0; j < 4; ++j) {
      sums[j] = V::add_32(sums[j], V::madd(V::load(entry + j), V::load(weights + j)));
      sums[j] = V::add_32(sums[j], V::madd(V::load(entry + 4 + j), V::load(weights + 4 + j)));
    }
  }
  static QD_INLINE void finish(const Int (&sums)[4], Int (&acc)[4]) {
    QD_UNROLL for (int j = 0; j < 4; ++j) acc[j] = sums[j];
  }
};

// Sums that fit 16 bits (DepthwiseParams::fits_s16): those of rows 0 and 1 and those of rows 2 and 3 apart, each in two
// vectors. They meet when they are widened.
template <class Vectors>
struct MaddubsProducts {
  using V = Vectors;
  using Int = typename V::Int;
  static constexpr int kVectors = 4;

  static QD_INLINE void activations(const Int (&rows)[4], Int* entry) {
    QD_UNROLL for (int pair = 0; pair < 4; pair += 2) {
      V::store(entry + pair, V::unpack_low_8(rows[pair], rows[pair + 1]));
      V::store(entry + pair + 1, V::unpack_high_8(rows[pair], rows[pair + 1]));
    }
  }
  static QD_INLINE void weights(const Int (&rows)[4], Int* entry) { activations(rows, entry); }
  static QD_INLINE void begin(Int (&sums)[4], const Int (&)[4], const Int* entry, const Int* weights) {
    QD_UNROLL for (int j = 0; j < 4; ++j) sums[j] = V::maddubs(V::load(entry + j), V::load(weights + j));
  }
  static QD_INLINE void add(Int (&sums)[4], const Int* entry, const Int* weights) {
    QD_UNROLL for (int j = 0; j < 4; ++j) {
      sums[j] = V::add_16(sums[j], V::maddubs(V::load(entry + j), V::load(weights + j)));
    }
  }
  static QD_INLINE void finish(const Int (&sums)[4], Int (&acc)[4]) {
    const Int ones = V::ones_16();
    QD_UNROLL for (int j = 0; j < 2; ++j) {
      acc[2 * j] = V::add_32(acc[2 * j], V::madd(V::unpack_low_16(sums[j], sums[2 + j]), ones));
      acc[2 * j + 1] = V::add_32(acc[2 * j + 1], V::madd(V::unpack_high_16(sums[j], sums[2 + j]), ones));
    }
  }
};

// Vectors::dot adds the products of four bytes each.
template <class Vectors>
struct DotProducts {
  using V = Vectors;
  using Int = typename V::Int;
  static constexpr int kVectors = 4;

  static QD_INLINE void activations(const Int (&rows)[4], Int* entry) {
    Int block[4];
    interleave<V>(rows, block);
    QD_UNROLL for (int j = 0; j < 4; ++j) V::store(entry + j, block[j]);
  }
  static QD_INLINE void weights(const Int (&rows)[4], Int* entry) { activations(rows, entry); }
  static QD_INLINE void begin(Int (&sums)[4], const Int (&acc)[4], const Int* entry, const Int* weights) {
    QD_UNROLL for (int j = 0; j < 4; ++j) sums[j] = acc[j];
    add(sums, entry, weights);
  }
  static QD_INLINE void add(Int (&sums)[4], const Int* entry, const Int* weights) {
    QD_UNROLL for (int j = 0; j < 4; ++j) V::dot(sums[j], V::load(entry + j), V::load(weights + j));
  }
  static QD_INLINE void finish(const Int (&sums)[4], Int (&acc)[4]) {
    QD_UNROLL for (int j = 0; j < 4; ++j) acc[j] = sums[j];
  }
};

// ---- The walk over the output ---------------------------------------------------------------------------------------

int at_most(int a, int b) { return a < b ? a : b; }

template <class Vectors, template <class> class Products>
class Depthwise {
 public:
  explicit Depthwise(const DepthwiseParams& params)
      : p_(params), window_rows_(params.cells / params.columns), many_parts_(false) {
    many_parts_ = window_rows_ > kPartRows || p_.columns > kPartColumns;
    const bool shares = p_.a_stride % p_.column_stride == 0 && p_.a_stride / p_.column_stride < widest();
    step_ = shares ? static_cast<int>(p_.a_stride / p_.column_stride) : widest();
  }

  // Channels n.. of all pixels.
  void run(int32_t n, size_t rows, size_t pixels) {
    channels_.set(p_, n);
    if (!many_parts_) set_part(n, 0, 0);
    const size_t most = static_cast<size_t>((kEntries - widest()) / step_ + 1);
    for (size_t row = 0; row < rows; ++row) {
      const uint8_t* a = p_.a + static_cast<ptrdiff_t>(row) * p_.a_row_stride + n;
      uint8_t* c = p_.c + static_cast<ptrdiff_t>(row) * p_.c_row_stride + n;
      for (size_t left = pixels; left > 0;) {
        const int count = static_cast<int>(left < most ? left : most);
        many_parts_ ? add_parts(n, a, count) : add_part(a, count);
        write_all(count, c);
        a += count * p_.a_stride, c += count * p_.c_stride;
        left -= static_cast<size_t>(count);
      }
    }
  }

 private:
  using V = Vectors;
  using Int = typename V::Int;
  using P = Products<V>;
  using Channels = typename V::Channels;

  int widest() const { return at_most(p_.columns, kPartColumns); }

  void add_part(const uint8_t* a, int count) {
    set_entries(a, count);
    add_all<true>(count);
  }

  void add_parts(int32_t n, const uint8_t* a, int count) {
    for (int row = 0; row < window_rows_; row += kPartRows) {
      for (int column = 0; column < p_.columns; column += kPartColumns) {
        set_part(n, row, column);
        set_entries(a, count);
        row + column == 0 ? add_all<true>(count) : add_all<false>(count);
      }
    }
  }

  // The part of the window that begins there. Rows beyond the window: the last one again, with zero weights.
  void set_part(int32_t n, int row, int column) {
    rows_ = at_most(window_rows_ - row, kPartRows);
    columns_ = at_most(p_.columns - column, kPartColumns);
    for (int i = 0; i < kPartRows; ++i) {
      offset_[i] = p_.cell_offset[at_most(row + i, window_rows_ - 1) * p_.columns] + column * p_.column_stride;
    }
    for (int x = 0; x < columns_; ++x) {
      Int rows[4];
      QD_UNROLL for (int i = 0; i < 4; ++i) {
        const int32_t cell = (row + i) * p_.columns + column + x;
        rows[i] = row + i < window_rows_ ? V::load(p_.w + cell * p_.w_stride + n) : V::zero();
      }
      P::weights(rows, weights_ + x * P::kVectors);
    }
  }

  void set_entries(const uint8_t* a, int count) {
    rows_ == 3 ? set_entries_of<3>(a, count) : set_entries_of<kPartRows>(a, count);
  }

  // Of `count` pixels. Those that share columns follow each other like one pixel of many columns.
  template <int kRows>
  void set_entries_of(const uint8_t* a, int count) {
    const bool shared = step_ < columns_;
    const int groups = shared ? 1 : count, columns = shared ? (count - 1) * step_ + columns_ : columns_;
    const ptrdiff_t column_stride = p_.column_stride, a_stride = p_.a_stride;
    const ptrdiff_t next = static_cast<ptrdiff_t>(step_) * P::kVectors;
    const ptrdiff_t offset[kPartRows] = {offset_[0], offset_[1], offset_[2], offset_[3]};
    Int* first = entries_;
    for (int group = 0; group < groups; ++group, first += next, a += a_stride) {
      const uint8_t* column = a;
      Int* entry = first;
      for (int i = 0; i < columns; ++i, entry += P::kVectors, column += column_stride) {
        Int rows[4];
        QD_UNROLL for (int row = 0; row < 4; ++row) {
          rows[row] = row < kRows ? V::load(column + offset[row]) : rows[kRows - 1];
        }
        P::activations(rows, entry);
      }
    }
  }

  template <bool kFirst>
  void add_all(int count) {
    columns_ == 3 ? add_columns<3, kFirst>(count) : add_columns<0, kFirst>(count);
  }

  // The part's share of `count` pixels. kColumns: how many columns the part has, 0 for any number.
  template <int kColumns, bool kFirst>
  void add_columns(int count) {
    const int columns = kColumns ? kColumns : columns_;
    const ptrdiff_t next = static_cast<ptrdiff_t>(step_) * P::kVectors;
    constexpr int kLocal = kColumns * P::kVectors <= 16 ? kColumns * P::kVectors : 0;
    Int local[kLocal + 1];  // which no store changes: they stay in registers, as far as there are some
    QD_UNROLL for (int i = 0; i < kLocal; ++i) local[i] = V::load(weights_ + i);
    const Int* const w = kLocal ? local : weights_;
    const Int* entry = entries_;
    Int* to = acc_;
    for (int x = 0; x < count; ++x, entry += next, to += 4) {
      Int acc[4], sums[4];
      QD_UNROLL for (int j = 0; j < 4; ++j) acc[j] = V::load(kFirst ? channels_.comp + j : to + j);
      P::begin(sums, acc, entry, w);
      QD_UNROLL for (int i = 1; i < columns; ++i) P::add(sums, entry + i * P::kVectors, w + i * P::kVectors);
      P::finish(sums, acc);
      QD_UNROLL for (int j = 0; j < 4; ++j) V::store(to + j, acc[j]);
    }
  }

  // Requantization is a walk of its own, two pixels at a time: right behind the sums, its latencies would fill the
  // schedulers.
  void write_all(int count, uint8_t* c) const {
    const Channels channels = channels_;
    const ptrdiff_t stride = p_.c_stride;
    int x = 0;
    for (; x + 2 <= count; x += 2, c += 2 * stride) channels.template write<2>(acc_ + 4 * x, c, stride);
    if (x < count) channels.template write<1>(acc_ + 4 * x, c, stride);
  }

  const DepthwiseParams& p_;
  const int window_rows_;
  bool many_parts_;
  int step_;                     // entries from one pixel to the next
  int rows_, columns_;           // of the part, and
  ptrdiff_t offset_[kPartRows];  // where its rows begin
  Channels channels_;
  Int weights_[kPartColumns * P::kVectors];
  Int entries_[kEntries * P::kVectors];
  Int acc_[kEntries * 4];
};

template <class Vectors, template <class> class Products>
void depthwise_by(const DepthwiseParams& params, size_t rows, size_t pixels) {
  Depthwise<Vectors, Products> kernel(params);
  for (int32_t n = 0; n < params.n; n += Vectors::kChannels) kernel.run(n, rows, pixels);
}

}  // namespace
}  // namespace qdeploy
