// resize: each axis of an image by a banded matrix of integers, rows first.
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

// Sums that kernels write up to a multiple of 16.
int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

size_t resize_scratch(const Program&, const Step& step, const Activations& activations, int64_t) {
  const Activation& in = activations[step.inputs[0]];
  return static_cast<size_t>(padded(in.w * in.c) + padded(in.c)) * sizeof(int32_t) + 2 * kOverread;
}

// Where the weights of output i begin.
const int32_t* weights_of(const Axis& axis, int64_t i) { return axis.weight->values.data() + i * axis.taps(); }

// A sum of rows of the input, by their weights, and then of its columns. Modulo 2^32: the first may be larger.
void run_resize(const StepRun& run) {
  const Activation &in = run.in(), &out = run.out();
  const ResizeData& resize = run.data<ResizeData>();
  int32_t* const sums = reinterpret_cast<int32_t*>(run.scratch() + kOverread);
  int32_t* const acc = sums + padded(in.w * in.c);
  WeighParams by_rows = {}, by_columns = {};
  by_rows.taps = static_cast<size_t>(resize.rows.taps()), by_columns.taps = static_cast<size_t>(resize.columns.taps());
  by_rows.n = static_cast<size_t>(in.w * in.c), by_columns.n = static_cast<size_t>(in.c);
  by_rows.a_stride = in.row_pitch, by_columns.a_stride = in.c;
  by_rows.a_type = Dtype::u8, by_columns.a_type = Dtype::i32;
  by_rows.c = sums, by_columns.c = acc;
  ScaleAddParams write = {};
  write.n = static_cast<size_t>(in.c);
  write.a = acc, write.a_type = Dtype::i32;
  write.c_type = out.type;
  write.multiplier_a = resize.multiplier, write.bias = resize.bias;
  write.qmin = run.node().qmin, write.qmax = run.node().qmax;
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t image = row / out.h, y = row % out.h;
    by_rows.a = run.row_from(image * in.h + resize.rows.start->values[static_cast<size_t>(y)]);
    by_rows.weights = weights_of(resize.rows, y);
    uint32_t of_weights = 0;
    for (size_t k = 0; k < by_rows.taps; ++k) of_weights += static_cast<uint32_t>(by_rows.weights[k]);
    by_rows.start = static_cast<int32_t>(0 - of_weights * in.zero_point);
    run.kernels().weigh(&by_rows);
    uint8_t* to = run.row_to(row);
    for (int64_t x = 0; x < out.w; ++x, to += out.c * out.bytes()) {
      by_columns.a = sums + resize.columns.start->values[static_cast<size_t>(x)] * in.c;
      by_columns.weights = weights_of(resize.columns, x);
      run.kernels().weigh(&by_columns);
      write.c = to;
      run.kernels().scale_add(&write);
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
