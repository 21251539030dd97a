// LayerNorm, GroupNorm and InstanceNorm of codes: statistics in exact integers, then four f32 operations for all
// elements that share them and two for each element.
//
//     S = sum q,  V = N * sum q^2 - S^2,  scale = 1 / sqrt(float(V) + epsilon)
//     r = fma(float(N*q - S) * scale, multiplier[channel], bias[channel])
//
// A zero point cancels. What must hold: N * 65534 < 2^31 for s16, N * 255 < 2^31 and N^2 * 255^2 < 2^63 for u8;
// epsilon >= 2^-60, so that V = 0 is no special case; |r| < 2^30 for codes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "share.h"
#include "ukernels.h"

namespace qdeploy {

struct Norm {
  int64_t channels;
  int64_t groups;  // of channels that share statistics with all pixels of an image; 0: each pixel has its own
  Dtype in, out;
  const float* multiplier;
  const float* bias;
  float epsilon;
  uint8_t qmin, qmax;
};

// Pixels, each of Norm::channels neighbouring elements: `rows` of `columns`. A token is a pixel.
struct NormPixels {
  int64_t rows, columns;
  const void* a;
  int64_t a_pitch;  // of a row, in elements
  void* c;
  int64_t c_pitch;
};

// Norm::groups == 0: all of these pixels.
void layer_norm(const Kernels& kernels, const Norm& norm, const NormPixels& pixels);

// One image, the groups in `range`. `scratch` is 8-byte aligned.
void group_norm(const Kernels& kernels, const Norm& norm, const NormPixels& image, Range range, uint8_t* scratch);
size_t group_norm_scratch(const Norm& norm);

}  // namespace qdeploy
