// Channels by an index: slices, shuffles. -1 gives zero points.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ukernels.h"

namespace qdeploy {

// The channels index[0..n) of pixels; elements of one or two bytes, which strides count, from a pixel to the next.
struct ChannelGather {
  const int32_t* index;
  size_t n, channels;  // of the output and of the input
  size_t element_bytes;
  int16_t zero_point;
  ptrdiff_t a_stride, c_stride;
};

// The memory of a call of gather_channels.
size_t gather_scratch(size_t n);

void gather_channels(const Kernels& kernels, const ChannelGather& gather, size_t pixels, const void* a, void* c,
                     uint8_t* scratch);

}  // namespace qdeploy
