// Attention of u8 codes in one piece: logits in int32, weights that are integers relative to the largest of their row,
// and their sum over the values divided by the sum of the weights. csrc/ukernels.h has the arithmetic.
//
// What must hold, with K the most keys of a segment and n the channels of a head: peak * 255 * K < 2^31,
// n * 255^2 < 2^31, |logit_multiplier| * n * 255^2 + max |logit_bias| < 2^100 and
// 255 * |multiplier| * 1.001 + |bias| < 2^30. A row with a region sees a key: its own.
#pragma once
#include <cstddef>
#include <cstdint>

#include "share.h"
#include "ukernels.h"

namespace qdeploy {

struct Attention {
  int32_t heads;
  int64_t rows, keys;         // at most
  int64_t channels, outputs;  // of q and k, of v and the result: all heads
  uint8_t q_zero, k_zero, v_zero;
  float logit_multiplier, multiplier, bias;
  uint8_t qmin, qmax;
  int32_t peak;
  int64_t block;            // rows of a segment, which sees its own keys alone; 0: one segment of all rows
  const float* logit_bias;  // [heads][bias_rows][bias_keys], read from its beginning; null: none
  int64_t bias_rows, bias_keys;
  const int32_t* regions;  // of each row and the key of its number, which see equal ones alone; null: none
};

// Strides in bytes from a row to the next.
struct AttentionOperands {
  int64_t rows, keys;  // of this text; with segments and regions those of Attention
  const uint8_t* q;
  const uint8_t* k;
  const uint8_t* v;
  uint8_t* c;
  ptrdiff_t q_stride, k_stride, v_stride, c_stride;
};

// The memory of one thread: where each part begins, in bytes, and strides in elements.
struct AttentionScratch {
  int64_t rows;  // that go through all kernels together
  ptrdiff_t q_chunk_stride, panel_stride;
  size_t keys, values, q, logits, weights, bytes;
};
AttentionScratch attention_scratch(const Kernels& kernels, const Attention& attention);

// One thread's share of segments, heads and blocks of rows. `memory` is 64-byte aligned.
void run_attention(const Kernels& kernels, const Attention& attention, const AttentionOperands& operands,
                   uint8_t* memory, Share share);

}  // namespace qdeploy
