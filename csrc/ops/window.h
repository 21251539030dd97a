// The window that a convolution or pool moves over its padded input.
#pragma once
#include "op.h"

namespace qdeploy {

constexpr int64_t kMaxSize = 65535;  // of a kernel, stride, dilation, padding or number of groups

// [0] is vertical, [1] horizontal; padding is top, left, bottom, right.
struct Window {
  int64_t kernel[2] = {1, 1};
  int64_t stride[2] = {1, 1};
  int64_t dilation[2] = {1, 1};
  int64_t padding[4] = {0, 0, 0, 0};
};

// Those of kernel, stride, dilation and padding that are keys of the op.
Window read_window(const NodeSource& node);

// The output's shape must be `channels` x OH x OW; f32 scores [C, 1, 1] may be declared [C].
void require_spatial_output(const NodeSource& node, const Window& window, int64_t channels);

}  // namespace qdeploy
