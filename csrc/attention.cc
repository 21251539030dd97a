#include "attention.h"

#include <algorithm>

namespace qdeploy {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

const WinogradKernel& products_of(const Kernels& kernels) { return kernels.winograd[0]; }

constexpr int64_t kMostRows = 56;  // of a block; no fewer than those of a tile

// Logits and weights of a block of rows stay in L1 beside the panel in use: 24 of 32 KB, with AVX-512 36 of 48. Whole
// tiles of rows. Twice as much changes no speed beyond the noise of 8 %; 56 rows hold a window of 7x7.
int64_t rows_per_block(const WinogradKernel& kernel, int64_t rows, int64_t keys) {
  const int64_t bytes = (kernel.nr > 16 ? 36 : 24) << 10;
  const int64_t fitting = std::min(kMostRows, bytes / (6 * keys)) / kernel.mr * kernel.mr;
  return std::min(rows, std::max<int64_t>(kernel.mr, fitting));
}

// One thread's walk: keys and values of a head are packed where its first block of rows is this thread's.
class Walk {
 public:
  Walk(const Kernels& kernels, const Attention& attention, const AttentionOperands& operands, uint8_t* memory)
      : kernels_(kernels),
        products_(products_of(kernels)),
        of_(attention),
        io_(operands),
        scratch_(attention_scratch(kernels, attention)),
        memory_(memory),
        rows_(attention.block ? attention.block : operands.rows),
        keys_(attention.block ? attention.block : operands.keys),
        depth_(attention.channels / attention.heads),
        width_(attention.outputs / attention.heads) {}

  void run(Share share) {
    const int64_t blocks = ceil_div(rows_, scratch_.rows);
    const Range range = slice(io_.rows / rows_ * of_.heads * blocks, share);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t segment = i / blocks / of_.heads, head = i / blocks % of_.heads;
      if (i == range.begin || i % blocks == 0) pack_keys_and_values(segment * keys_, head);
      const int64_t row = i % blocks * scratch_.rows;
      run_rows(segment, head, row, std::min(scratch_.rows, rows_ - row));
    }
  }

 private:
  template <class T>
  T* part(size_t begin) const {
    return reinterpret_cast<T*>(memory_ + begin);
  }

  AttentionPack pack_of(const uint8_t* a, ptrdiff_t stride, uint8_t zero_point, int64_t first, int64_t rows,
                        int64_t head, int64_t n) const {
    AttentionPack pack = {};
    pack.rows = static_cast<int32_t>(rows);
    pack.n = static_cast<int32_t>(n);
    pack.a = a + first * stride + head * n;
    pack.a_stride = stride;
    pack.zero_point = zero_point;
    pack.nr = products_.nr;
    pack.pair = products_.pair;
    pack.chunk_stride = scratch_.q_chunk_stride;
    return pack;
  }

  void pack_keys_and_values(int64_t first, int64_t head) const {
    AttentionPack keys = pack_of(io_.k, io_.k_stride, of_.k_zero, first, keys_, head, depth_);
    keys.c = part<int16_t>(scratch_.keys);
    kernels_.attention_keys(&keys);
    AttentionPack values = pack_of(io_.v, io_.v_stride, of_.v_zero, first, keys_, head, width_);
    values.c = part<int16_t>(scratch_.values);
    kernels_.attention_values(&values);
  }

  // All panels of keys or values under `rows` rows of s16.
  void multiply(const int16_t* rows_of, int64_t rows, int64_t depth, size_t panels_at, int64_t columns) const {
    WinogradProducts params = {};
    params.positions = static_cast<int32_t>(ceil_div(columns, products_.nr));
    params.patches = static_cast<int32_t>(rows);
    params.k = static_cast<int32_t>(round_up(depth, 8));
    params.v = rows_of;
    params.v_chunk_stride = scratch_.q_chunk_stride;
    params.u = part<int16_t>(panels_at);
    params.m = part<int32_t>(scratch_.logits);
    params.m_position_stride = scratch_.panel_stride;
    products_.products(&params);
  }

  void run_rows(int64_t segment, int64_t head, int64_t row, int64_t rows) const {
    const int64_t first = segment * rows_ + row;
    AttentionPack q = pack_of(io_.q, io_.q_stride, of_.q_zero, first, rows, head, depth_);
    q.c = part<int16_t>(scratch_.q);
    kernels_.attention_q(&q);
    multiply(q.c, rows, depth_, scratch_.keys, keys_);
    int32_t sums[kMostRows];
    weigh(segment, head, row, rows, sums);
    multiply(part<int16_t>(scratch_.weights), rows, keys_, scratch_.values, width_);
    write(first, head, rows, sums);
  }

  void weigh(int64_t segment, int64_t head, int64_t row, int64_t rows, int32_t* sums) const {
    AttentionWeights params = {};
    params.rows = static_cast<int32_t>(rows);
    params.keys = static_cast<int32_t>(keys_);
    params.logits = part<int32_t>(scratch_.logits);
    params.panel_stride = scratch_.panel_stride;
    params.nr = products_.nr;
    params.logit_multiplier = of_.logit_multiplier;
    if (of_.logit_bias) {
      params.bias = of_.logit_bias + (head * of_.bias_rows + row) * of_.bias_keys;
      params.bias_stride = of_.bias_keys;
    }
    if (of_.regions) {
      params.key_regions = of_.regions + segment * keys_;
      params.row_regions = params.key_regions + row;
    }
    params.peak = static_cast<float>(of_.peak);
    params.p = part<int16_t>(scratch_.weights);
    params.chunk_stride = scratch_.q_chunk_stride;
    params.sums = sums;
    kernels_.attention_weights(&params);
  }

  void write(int64_t first, int64_t head, int64_t rows, const int32_t* sums) const {
    float scales[kMostRows];
    for (int64_t i = 0; i < rows; ++i) scales[i] = of_.multiplier / static_cast<float>(sums[i]);
    AttentionOutput params = {};
    params.rows = static_cast<int32_t>(rows);
    params.n = static_cast<int32_t>(width_);
    params.acc = part<int32_t>(scratch_.logits);
    params.panel_stride = scratch_.panel_stride;
    params.nr = products_.nr;
    params.scales = scales;
    params.bias = of_.bias;
    params.qmin = of_.qmin;
    params.qmax = of_.qmax;
    params.c = io_.c + first * io_.c_stride + head * width_;
    params.c_stride = io_.c_stride;
    kernels_.attention_output(&params);
  }

  const Kernels& kernels_;
  const WinogradKernel& products_;
  const Attention& of_;
  const AttentionOperands& io_;
  const AttentionScratch scratch_;
  uint8_t* const memory_;
  const int64_t rows_, keys_;    // of a segment
  const int64_t depth_, width_;  // channels of a head
};

}  // namespace

AttentionScratch attention_scratch(const Kernels& kernels, const Attention& attention) {
  const WinogradKernel& kernel = products_of(kernels);
  const int64_t rows = attention.block ? attention.block : attention.rows;
  const int64_t keys = attention.block ? attention.block : attention.keys;
  const int64_t depth = attention.channels / attention.heads, width = attention.outputs / attention.heads;
  AttentionScratch scratch;
  scratch.rows = rows_per_block(kernel, rows, keys);
  scratch.q_chunk_stride = scratch.rows * kWinogradChunk;
  scratch.panel_stride = scratch.rows * kernel.nr;
  size_t bytes = 0;
  const auto place = [&](int64_t size) {
    const size_t begin = bytes;
    bytes += static_cast<size_t>(round_up(size, 64)) + kOverread;
    return begin;
  };
  scratch.keys = place(2 * round_up(keys, kernel.nr) * round_up(depth, 8));
  scratch.values = place(2 * round_up(keys, 8) * round_up(width, kernel.nr));
  scratch.q = place(2 * scratch.rows * round_up(depth, kWinogradChunk));
  scratch.logits = place(4 * scratch.rows * round_up(std::max(keys, width), kernel.nr));
  scratch.weights = place(2 * scratch.rows * round_up(keys, kWinogradChunk));
  scratch.bytes = bytes;
  return scratch;
}

void run_attention(const Kernels& kernels, const Attention& attention, const AttentionOperands& operands,
                   uint8_t* memory, Share share) {
  Walk(kernels, attention, operands, memory).run(share);
}

}  // namespace qdeploy
