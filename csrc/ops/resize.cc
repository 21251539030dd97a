// resize: each axis of an image by a banded matrix of integers, rows first.
#include <algorithm>
#include <cmath>

#include "../errors.h"
#include "op.h"

namespace qdeploy {
namespace {

constexpr int32_t kMaxWeight = 32767;

struct Axis {
  SharedInts start;   // [outputs]
  SharedInts weight;  // [outputs, taps]

  int64_t outputs() const { return static_cast<int64_t>(start->values.size()); }
  int64_t taps() const { return static_cast<int64_t>(weight->values.size()) / outputs(); }
};

struct ResizeData : OpData {
  Axis rows, columns;
  float multiplier, bias;
};

std::string decimal_text(unsigned __int128 number) {
  std::string text;
  for (; number > 9; number /= 10) text.insert(text.begin(), static_cast<char>('0' + number % 10));
  return text.insert(text.begin(), static_cast<char>('0' + number)), text;
}

Axis read_axis(const NodeSource& node, const std::string& name, int64_t size) {
  const std::string start_key = name + "_start", weight_key = name + "_weight";
  Axis axis;
  axis.start = node.ints(start_key.c_str(), {-1});
  axis.weight = node.ints(weight_key.c_str(), {axis.outputs(), -1});
  const Ints &start = *axis.start, &weight = *axis.weight;
  const auto range = [](const Ints& ints) { return std::to_string(ints.low) + " to " + std::to_string(ints.high); };
  const int64_t last = size - axis.taps();
  require(start.low >= 0 && start.high <= last, name + "s from 0 to " + std::to_string(last), range(start),
          key_of(start_key, node.where));
  require(weight.low >= -kMaxWeight && weight.high <= kMaxWeight, "weights in [-32767, 32767]", range(weight),
          key_of(weight_key, node.where));
  return axis;
}

std::unique_ptr<const OpData> read_resize(const NodeSource& node) {
  auto resize = std::make_unique<ResizeData>();
  const Tensor& x = node.input();
  node.require(x.shape.size() == 3, "an input of shape [C, H, W]", shape_text(x.shape));
  resize->rows = read_axis(node, "row", x.h);
  resize->columns = read_axis(node, "column", x.w);
  node.require_output({x.c, resize->rows.outputs(), resize->columns.outputs()});
  // a factor of rows or columns is below 2^28 * 2^15
  const unsigned __int128 sums = static_cast<unsigned __int128>(255) *
                                 static_cast<uint64_t>(resize->rows.weight->largest_sum) *
                                 static_cast<uint64_t>(resize->columns.weight->largest_sum);
  node.require(sums < uint64_t{1} << 31, "sums below 2^31", "up to " + decimal_text(sums));
  resize->multiplier = number_member(node.json, "multiplier", node.where);
  resize->bias = number_member(node.json, "bias", node.where);
  require_bounded(static_cast<double>(sums) * std::fabs(resize->multiplier) + std::fabs(resize->bias),
                  node.output.is_f32(), node.where);
  return resize;
}

size_t resize_scratch(const Program&, const Step& step, const Activations& activations, int64_t) {
  const Activation& in = activations[step.inputs[0]];
  return static_cast<size_t>(in.w * in.c + 2 * in.c) * sizeof(int32_t) + kOverread;
}

uint32_t weight_of(const Axis& axis, int64_t i) {
  return static_cast<uint32_t>(axis.weight->values[static_cast<size_t>(i)]);
}

// A sum of rows of the input, by their weights, and then of its columns. Modulo 2^32: the first may be larger.
void run_resize(const StepRun& run) {
  const Activation &in = run.in(), &out = run.out();
  const ResizeData& resize = run.data<ResizeData>();
  const int64_t width = in.w * in.c, row_taps = resize.rows.taps(), column_taps = resize.columns.taps();
  uint32_t* sums = reinterpret_cast<uint32_t*>(run.scratch());
  uint32_t* acc = sums + width;
  float* numbers = reinterpret_cast<float*>(acc + in.c);
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t image = row / out.h, y = row % out.h;
    std::fill_n(sums, width, 0);
    for (int64_t k = 0; k < row_taps; ++k) {
      const uint8_t* from = run.row_from(image * in.h + resize.rows.start->values[static_cast<size_t>(y)] + k);
      const uint32_t weight = weight_of(resize.rows, y * row_taps + k);
      for (int64_t i = 0; i < width; ++i) sums[i] += weight * static_cast<uint32_t>(from[i] - in.zero_point);
    }
    uint8_t* to = run.row_to(row);
    for (int64_t x = 0; x < out.w; ++x, to += out.c * out.bytes()) {
      std::fill_n(acc, in.c, 0);
      for (int64_t k = 0; k < column_taps; ++k) {
        const uint32_t* from = sums + (resize.columns.start->values[static_cast<size_t>(x)] + k) * in.c;
        const uint32_t weight = weight_of(resize.columns, x * column_taps + k);
        for (int64_t i = 0; i < in.c; ++i) acc[i] += weight * from[i];
      }
      write_sums(run, static_cast<size_t>(in.c), reinterpret_cast<int32_t*>(acc), resize.multiplier, resize.bias,
                 numbers, to);
    }
  }
}

}  // namespace

std::vector<OpInfo> resize_ops() {
  return {
      // name, version, inputs, output, in place, reads, writes, rows, keys, read, run, scratch
      {"resize",
       3,
       {1, 1},
       Output::requantized,
       InPlace::never,
       kU8,
       kU8OrF32,
       fixed_rows,
       {"row_start", "row_weight", "column_start", "column_weight", "multiplier", "bias"},
       read_resize,
       run_resize,
       resize_scratch},
  };
}

}  // namespace qdeploy
