// concat and reshape: codes move, nothing is computed.
#include <cstring>

#include "../errors.h"
#include "op.h"

namespace qdeploy {
namespace {

std::unique_ptr<const OpData> read_concat(const NodeSource& node) {
  std::vector<int64_t> expected = node.input().shape;
  for (size_t i = 1; i < node.inputs.size(); ++i) {
    const std::vector<int64_t>& shape = node.input(i).shape;
    bool same = shape.size() == expected.size();
    for (size_t d = 1; same && d < shape.size(); ++d) same = shape[d] == expected[d];
    node.require(same, "inputs that differ in dimension 0 only", shape_text(shape));
    expected[0] += shape[0];  // at most 2^28 * 2^16
  }
  node.require(node.output.shape == expected, "an output of shape " + shape_text(expected),
               shape_text(node.output.shape));
  return nullptr;
}

void run_concat(const StepRun& run) {
  const Activation& out = run.out();
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* to = run.to() + out.row_offset(row);
    for (size_t i = 0; i < run.step.inputs.size(); ++i) {
      const Activation& in = run.in(i);
      const uint8_t* from = run.from(i) + in.row_offset(row);
      for (int64_t x = 0; x < out.w; ++x) memcpy(to + x * out.c, from + x * in.c, in.c);
      to += in.c;
    }
  }
}

std::unique_ptr<const OpData> read_reshape(const NodeSource& node) {
  const Tensor &in = node.input(), &out = node.output;
  node.require(in.c * in.h * in.w == out.c * out.h * out.w, "an output with as many elements",
               shape_text(in.shape) + " to " + shape_text(out.shape));
  return nullptr;
}

// Both sides number their elements row-major in [C, H, W]; memory is NHWC.
void run_reshape(const StepRun& run) {
  const Activation &in = run.in(), &out = run.out();
  const int64_t plane = out.h * out.w;
  const Range channels = slice(run.chunk.images * in.c, run.share);
  for (int64_t i = channels.begin; i < channels.end; ++i) {
    const int64_t image = i / in.c, c = i % in.c;
    const uint8_t* from = run.from() + image * in.image_pitch + in.origin + c;
    uint8_t* to = run.to() + image * out.image_pitch + out.origin;
    if (plane == 1) {  // a flatten: 25088 elements of VGG-16 took 126 us below
      uint8_t* flat = to + c * in.h * in.w;
      for (int64_t y = 0; y < in.h; ++y) {
        for (int64_t x = 0; x < in.w; ++x) *flat++ = from[y * in.row_pitch + x * in.c];
      }
      continue;
    }
    int64_t element = c * in.h * in.w;
    for (int64_t y = 0; y < in.h; ++y) {
      for (int64_t x = 0; x < in.w; ++x, ++element) {
        const int64_t out_c = element / plane, out_y = element % plane / out.w, out_x = element % out.w;
        to[out_y * out.row_pitch + out_x * out.c + out_c] = from[y * in.row_pitch + x * in.c];
      }
    }
  }
}

}  // namespace

std::vector<OpInfo> move_ops() {
  return {
      // name, version, inputs, output, residual, in place, keys, read, run
      {"concat", 1, {2, kMaxNodes}, Output::same_grid, false, -1, {}, read_concat, run_concat},
      {"reshape", 1, {1, 1}, Output::same_grid, false, -1, {}, read_reshape, run_reshape},
  };
}

}  // namespace qdeploy
