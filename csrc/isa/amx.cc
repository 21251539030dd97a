// AMX with AMX-INT8: Xeons since Sapphire Rapids.
//
// Convolution: acc[p][n] = comp[n] + sum a[p][i] * w[i][n]. One tdpbusd adds 16 pixels x 16 channels x 64 bytes of k,
// exactly, on three tile registers of 16 rows of 64 bytes:
//
//     a       row p: 64 bytes of k of pixel p, straight from NHWC: the stride of a strip is that of tileloadd
//     w       row q: a quad of k of 16 channels, the vectors of the panel of avx512vnni.cc: s8x4, NR = 32
//     sums    row p: 16 channels
//
//     instruction               cycles                     for 64 bytes of k of 32 pixels x 32 channels
//     tdpbusd                   16                         4 in 64 cycles: the limit
//     tileloadd                 8, from L1                 4 in 32
//
// 4 sums, 2 tiles of a and 2 of w are all 8 tile registers. The 64 cycles stay 64 with loads from L1; with all of them
// from L2 they are 85 to 100.
//
// The tile configuration takes 156 cycles to load, so there is one: every register has all its rows. A strip of fewer
// than 16 pixels is loaded with neighbours, which lie between other pixels of the call.
//
// Preconditions: those of ConvParams. Reads of activations and weights are exact, but for those neighbours.
#include "avx512_conv.h"
#include "tiles.h"

namespace qdeploy {
namespace {

constexpr int kRows = 16, kDepth = 64;  // of a tile register: rows, and bytes of a row
constexpr int kPanelStride = 4 * kNr;   // from one quad of a panel to the next
constexpr int kMostPieces = 3;          // of 7 pixels at most, in a strip

// ---- Few pixels or short cells --------------------------------------------------------------------------------------

ConvKernel vnni;  // the kernel below, for the same panels

// Cuts the strips of tiles into those of the kernel below, strips of one length in a row.
size_t cut(const ConvParams& params, const ConvTile* tiles, size_t n_tiles, ConvTile* pieces) {
  size_t n_pieces = 0;
  for (int i = 0; i < kMostPieces; ++i) {
    for (const ConvTile* tile = tiles; tile < tiles + n_tiles; ++tile) {
      const int count = (tile->r + vnni.mr - 1) / vnni.mr;
      if (i >= count) continue;
      const int begin = tile->r * i / count, end = tile->r * (i + 1) / count;
      ConvTile& piece = pieces[n_pieces++] = *tile;
      piece.r = static_cast<uint8_t>(end - begin);
      for (int s = 0; s < tile->strips; ++s) {
        piece.a[s] += static_cast<uint32_t>(begin * params.a_stride);
        piece.c[s] += static_cast<uint32_t>(begin * params.c_stride);
        piece.residual[s] += static_cast<uint32_t>(begin * params.residual_stride);
      }
    }
  }
  return n_pieces;
}

template <Dtype kOut>
void conv_by_vnni(ConvParams params, const ConvTile* tiles, size_t n_tiles) {
  constexpr size_t kTiles = 16;
  const ConvFn conv = kOut == Dtype::f32 ? vnni.f32 : kOut == Dtype::s16 ? vnni.s16 : vnni.qu8;
  for (size_t done = 0; done < n_tiles; done += kTiles) {
    ConvTile pieces[kTiles * kMostPieces];
    const size_t count = n_tiles - done < kTiles ? n_tiles - done : kTiles;
    conv(&params, pieces, cut(params, tiles + done, count, pieces));
    params.prefetch_bytes = 0;
  }
}

// ---- Blocks: which pixels a tile register holds ---------------------------------------------------------------------

// 16 pixels at the stride of the strips, with one or two strips of a tile among them.
struct Block {
  ptrdiff_t a;
  const ConvTile* tile;
  int strip, strips;  // the first of them, and how many
  int row[2];         // where each begins
};

// Cuts tiles into blocks. Two rows of a 7x7 map with its border are one block: 7 pixels, 2 of the border, 7 pixels.
class Blocks {
 public:
  Blocks(const ConvParams& params, const ConvTile* tiles, size_t n_tiles)
      : stride_(params.a_stride), tile_(tiles), end_(tiles + n_tiles) {
    lowest_ = highest_ = tiles->a[0];
    for (const ConvTile* tile = tiles; tile < end_; ++tile) {
      for (int s = 0; s < tile->strips; ++s) {
        const ptrdiff_t first = tile->a[s], last = first + (tile->r - 1) * stride_;
        if (first < lowest_) lowest_ = first;
        if (last > highest_) highest_ = last;
      }
    }
  }

  // Whether 16 pixels lie around each strip. It takes 17, unless there is but one strip.
  bool fit() const {
    const bool one_strip = tile_ + 1 == end_ && tile_->strips == 1;
    return stride_ > 0 && highest_ - lowest_ >= (one_strip ? kRows - 1 : kRows) * stride_;
  }

  size_t count() const {
    size_t blocks = 0;
    for (const ConvTile* tile = tile_; tile < end_; ++tile) blocks += apart(*tile) > 0 ? 1 : tile->strips;
    return blocks;
  }

  bool left() const { return tile_ < end_; }

  Block next() {
    Block block = {tile_->a[strip_], tile_, strip_, 1, {0, 0}};
    if (strip_ == 0 && apart(*tile_) > 0) block.strips = 2, block.row[1] = apart(*tile_);
    const ptrdiff_t beyond = block.a + (kRows - 1) * stride_ - highest_;
    if (beyond > 0) {
      const ptrdiff_t before = (beyond + stride_ - 1) / stride_;
      block.a -= before * stride_;
      for (int& row : block.row) row += static_cast<int>(before);
    }
    strip_ += block.strips;
    if (strip_ == tile_->strips) ++tile_, strip_ = 0;
    return block;
  }

 private:
  // How many pixels the second strip lies behind the first one; 0 where no block holds both.
  int apart(const ConvTile& tile) const {
    if (tile.strips == 1 || tile.a[1] <= tile.a[0]) return 0;
    const ptrdiff_t distance = ptrdiff_t{tile.a[1]} - tile.a[0], pixels = distance / stride_;
    return pixels * stride_ == distance && pixels + tile.r <= kRows ? static_cast<int>(pixels) : 0;
  }

  const ptrdiff_t stride_;
  const ConvTile* tile_;
  const ConvTile* const end_;
  int strip_ = 0;
  ptrdiff_t lowest_, highest_;  // of the first bytes of all pixels
};

// ---- Results: what waits for requantization -------------------------------------------------------------------------

// Sums of neighbouring pixels, and where they go.
struct Strip {
  const int32_t (*sums)[kNr];
  int pixels;
  ConvTile at;
};

// The sums of the last blocks.
struct Results {
  alignas(64) int32_t sums[2][kRows][kNr];
  Strip strips[5] = {};         // up to four, and one that is none
  int n_strips = 0, pairs = 0;  // of pixels

  void set(const Block* blocks, int n_blocks) {
    n_strips = pairs = 0;
    for (int i = 0; i < n_blocks; ++i) {
      const Block& block = blocks[i];
      for (int s = 0; s < block.strips; ++s) {
        const int strip = block.strip + s;
        strips[n_strips++] = {
            sums[i] + block.row[s], block.tile->r, {{}, {block.tile->c[strip]}, {block.tile->residual[strip]}, 0, 0}};
        pairs += (block.tile->r + 1) / 2;
      }
    }
  }
};

// Writes results, two pixels at a time.
template <class Residual, Dtype kOut>
class Writer {
 public:
  QD_INLINE Writer(const ConvParams& params, const Results& results)
      : params_(params), strip_(results.strips[0]), next_(results.strips) {}

  QD_INLINE void write_pair() {
    strip_.pixels > 1 ? write<2>() : write<1>();
    if (strip_.pixels == 0) strip_ = *++next_;
  }

 private:
  template <int R>
  QD_INLINE void write() {
    __m512i acc[R][2];
    QD_UNROLL for (int p = 0; p < R; ++p) {
      QD_UNROLL for (int j = 0; j < 2; ++j) acc[p][j] = _mm512_load_si512(strip_.sums[p] + 16 * j);
    }
    const Output<R, 1> output(params_, strip_.at);
    if constexpr (kOut == Dtype::f32) output.template store_f32<Residual>(acc);
    if constexpr (kOut == Dtype::s16) output.template store_s16<Residual>(acc);
    if constexpr (kOut == Dtype::u8) output.template store_u8<Residual>(acc);
    strip_.sums += R;
    strip_.pixels -= R;
    strip_.at.c[0] += static_cast<uint32_t>(R * params_.c_stride);
    strip_.at.residual[0] += static_cast<uint32_t>(R * params_.residual_stride);
  }

  const ConvParams params_;  // a copy that no store of bytes can change: its constants stay in registers
  Strip strip_;
  const Strip* next_;
};

// ---- Products -------------------------------------------------------------------------------------------------------

// Those of one or two blocks. The results before them are written evenly among them: a 3x3 layer of 14x14x256 comes to
// 57 % of the peak, to 46 with the results among its first products. Tile registers: 0 to 3 sums, 4 and 5 pixels, 6 and
// 7 weights.
template <class Residual, Dtype kOut>
void multiply(const ConvParams& params, const Block* blocks, int n_blocks, int fetches, Prefetch* prefetch,
              Results* results) {
  Prefetch ahead = *prefetch;  // a copy that can live in registers
  Writer<Residual, kOut> writer(params, *results);
  const int steps = params.cells * (params.k / kDepth) * n_blocks;
  int due = 0;  // of pairs, in parts of `steps`
  _tile_loadd(0, params.comp, 0);
  _tile_loadd(1, params.comp + 16, 0);
  _tile_loadd(2, params.comp, 0);
  _tile_loadd(3, params.comp + 16, 0);
  const uint8_t* w = static_cast<const uint8_t*>(params.w);
  for (int32_t t = 0; t < params.cells; ++t) {
    const uint8_t* const a = params.a + params.cell_offset[t];
    for (int32_t i = 0; i < params.k; i += kDepth, w += kRows * kPanelStride) {
      for (int block = 0; block < n_blocks; ++block) {
        if (block == 0) {
          _tile_loadd(6, w, kPanelStride);
          _tile_loadd(4, a + blocks[0].a + i, params.a_stride);
          _tile_dpbusd(0, 4, 6);
          _tile_loadd(7, w + 64, kPanelStride);
          _tile_dpbusd(1, 4, 7);
        } else {
          _tile_loadd(5, a + blocks[1].a + i, params.a_stride);
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        }
        for (int line = 0; line < fetches; ++line) ahead.fetch();
        for (due += results->pairs; due >= steps; due -= steps) writer.write_pair();
      }
    }
  }
  _tile_stored(0, results->sums[0], kPanelStride);
  _tile_stored(1, results->sums[0][0] + 16, kPanelStride);
  if (n_blocks == 2) {
    _tile_stored(2, results->sums[1], kPanelStride);
    _tile_stored(3, results->sums[1][0] + 16, kPanelStride);
  }
  results->set(blocks, n_blocks);
  *prefetch = ahead;
}

template <class Residual, Dtype kOut>
void conv_by_blocks(const ConvParams& params, Blocks blocks) {
  const size_t steps = static_cast<size_t>(params.cells) * (params.k / kDepth) * blocks.count();
  const size_t fetches = (params.prefetch_bytes / 128 + steps - 1) / steps;  // of two lines
  Prefetch prefetch(params, steps * fetches);
  Results results;
  _tile_loadconfig(&kTileConfiguration);
  while (blocks.left()) {
    Block pair[2] = {blocks.next()};
    const int n_blocks = blocks.left() ? 2 : 1;
    if (n_blocks == 2) pair[1] = blocks.next();
    multiply<Residual, kOut>(params, pair, n_blocks, static_cast<int>(fetches), &prefetch, &results);
  }
  _tile_release();
  Writer<Residual, kOut> writer(params, results);
  for (int i = 0; i < results.pairs; ++i) writer.write_pair();
}

template <Dtype kOut>
void conv_by_blocks(const ConvParams* params, const ConvTile* tiles, size_t n_tiles) {
  const Blocks blocks(*params, tiles, n_tiles);
  if (params->k % kDepth || !blocks.fit()) return conv_by_vnni<kOut>(*params, tiles, n_tiles);
  with_residual(*params, [&](auto residual) {
    using Residual = decltype(residual);
    constexpr int bytes = kIsNone<Residual> ? 0 : sizeof(typename CodeOf<Residual>::type);
    if constexpr (kHasInner<Residual> ? kOut == Dtype::u8 && bytes == 1 : kOut != Dtype::f32 || bytes == 0) {
      conv_by_blocks<Residual, kOut>(*params, blocks);
    } else {
      conv_by_vnni<kOut>(*params, tiles, n_tiles);  // too rare for code of its own
    }
  });
}

}  // namespace

void init_amx(Kernels* kernels) {
  kernels->isa = "amx";
  vnni = kernels->conv[8];
  for (int bits = 2; bits <= 8; ++bits) {
    kernels->conv[bits] = {"qu8_qc8w_conv_32x32c4__amx",
                           conv_by_blocks<Dtype::u8>,
                           conv_by_blocks<Dtype::s16>,
                           conv_by_blocks<Dtype::f32>,
                           kRows,
                           2,
                           kNr,
                           WeightFormat::s8x4,
                           0,
                           0,
                           kDepth};
  }
  // A quarter of the products, but of vpdpwssd at a sixteenth of the rate.
  for (WinogradKernel& winograd : kernels->winograd) winograd.rate = 0;
}

}  // namespace qdeploy
