#include "window.h"

#include "../errors.h"

namespace qdeploy {

Window read_window(const NodeSource& node) {
  Window window;
  const auto numbers = [&](const char* key, size_t count, int64_t min, int64_t* to) {
    if (!node.op.keys.count(key)) return;
    for (const int64_t value : int_array(node.json, key, count, count, min, kMaxSize, node.where)) *to++ = value;
  };
  numbers("kernel", 2, 1, window.kernel);
  numbers("dilation", 2, 1, window.dilation);
  numbers("stride", 2, 1, window.stride);
  numbers("padding", 4, 0, window.padding);
  return window;
}

void require_spatial_output(const NodeSource& node, const Window& window, int64_t channels) {
  const Tensor &in = node.input(), &out = node.output;
  node.require(in.shape.size() == 3, "an input of shape [C, H, W]", shape_text(in.shape));
  std::vector<int64_t> expected = {channels};
  for (int d = 0; d < 2; ++d) {
    const int64_t size = d == 0 ? in.h : in.w;
    const int64_t extent = window.dilation[d] * (window.kernel[d] - 1) + 1;  // < 2^57
    const int64_t padded = size + window.padding[d] + window.padding[d + 2];
    node.require(extent <= padded, "a window that fits the padded input",
                 std::to_string(extent) + " over " + std::to_string(padded));
    expected.push_back((padded - extent) / window.stride[d] + 1);
  }
  if (out.is_f32() && expected[1] == 1 && expected[2] == 1 && out.shape.size() == 1) expected.resize(1);
  node.require(out.shape == expected, "an output of shape " + shape_text(expected), shape_text(out.shape));
}

}  // namespace qdeploy
