// conv2d and linear: a linear is a convolution of one pixel.
#include "conv.h"

#include <algorithm>

#include "../errors.h"
#include "../tiling.h"

namespace qdeploy {
namespace {

// ---- Reading ------------------------------------------------------------------------------------------------------

// The width that all codes of a layer of 8 bits fit; one that uses 7 bits runs with the faster kernel.
int used_bits(const ModelFile& file, const FileTensor& codes) {
  uint8_t used = 0;  // bits that differ from the sign
  std::vector<int8_t> piece(std::min(codes.bytes, size_t{64} << 10));
  for (size_t begin = 0; begin < codes.bytes; begin += piece.size()) {
    const size_t size = std::min(piece.size(), codes.bytes - begin);
    file.read(codes.offset + begin, size, piece.data());
    for (size_t i = 0; i < size; ++i) used |= static_cast<uint8_t>(piece[i] < 0 ? ~piece[i] : piece[i]);
  }
  int bits = 2;
  while (used >> (bits - 1) != 0) ++bits;
  return bits;
}

// The number of codes of one channel.
int64_t checked_depth(const NodeSource& node, const std::vector<int64_t>& shape, int bits) {
  uint64_t depth = 1;
  for (size_t i = 1; i < shape.size(); ++i) {
    const bool overflow = __builtin_mul_overflow(depth, static_cast<uint64_t>(shape[i]), &depth);
    node.require(!overflow && depth < (1u << 24) && depth * 255 << (bits - 1) < uint64_t{1} << 31,
                 "accumulators below 2^31", "weight " + shape_text(shape) + " of " + std::to_string(bits) + " bits");
  }
  return static_cast<int64_t>(depth);
}

// The key `weight`, whose shape must be `expected`.
void read_codes(const NodeSource& node, const std::vector<int64_t>& expected, ConvData* conv) {
  const Json& weight = member(node.json, "weight", node.where);
  const std::vector<int64_t> shape =
      int_array(weight, "shape", expected.size(), expected.size(), 1, kMaxElements, node.where);
  node.require(shape == expected, "a weight of shape " + shape_text(expected), shape_text(shape));
  conv->bits = static_cast<int>(int_member(weight, "bits", 2, 8, node.where));
  const int64_t depth = checked_depth(node, shape, conv->bits);
  only_keys(weight, {"codes", "shape", "bits"}, node.where);
  const int64_t stream = depth * shape[0] * conv->bits, bytes = (stream + 7) / 8;
  const FileTensor& codes =
      node.file.tensor(string_member(weight, "codes", node.where), DType::u8, {bytes}, node.where);
  conv->codes = codes.offset;
  conv->used_bits = conv->bits < 8 ? conv->bits : used_bits(node.file, codes);
  uint8_t last;
  node.file.read(codes.offset + codes.bytes - 1, 1, &last);
  node.require(stream % 8 == 0 || last >> (stream % 8) == 0, "zeros after the last code", "others");
}

void read_weight(const NodeSource& node, const std::vector<int64_t>& shape, ConvData* conv) {
  read_codes(node, shape, conv);
  conv->multiplier = node.floats("multiplier", {shape[0]});
  conv->bias = node.floats("bias", {shape[0]});
  if (!node.has_residual) return;
  const std::vector<int64_t>& residual = node.input(1).shape;
  node.require(residual == node.output.shape, "a residual of shape " + shape_text(node.output.shape),
               shape_text(residual));
  conv->residual_multiplier = number_member(node.json, "residual_multiplier", node.where);
}

std::unique_ptr<const OpData> read_conv2d(const NodeSource& node) {
  auto conv = std::make_unique<ConvData>();
  conv->window = read_window(node);
  const Json& weight = member(node.json, "weight", node.where);
  const std::vector<int64_t> shape = int_array(weight, "shape", 4, 4, 1, kMaxElements, node.where);
  conv->window.kernel[0] = shape[2];
  conv->window.kernel[1] = shape[3];
  const int64_t in = node.input().c, out = node.output.c;
  require_spatial_output(node, conv->window, out);
  conv->groups = int_member(node.json, "groups", 1, kMaxSize, node.where);
  node.require(in % conv->groups == 0 && out % conv->groups == 0, "groups that divide the channels",
               std::to_string(conv->groups));
  read_weight(node, {out, in / conv->groups, shape[2], shape[3]}, conv.get());
  return conv;
}

std::unique_ptr<const OpData> read_linear(const NodeSource& node) {
  auto conv = std::make_unique<ConvData>();
  const Tensor &in = node.input(), &out = node.output;
  node.require(in.shape.size() == 1, "an input of shape [F]", shape_text(in.shape));
  node.require(out.shape.size() == 1, "an output of shape [F]", shape_text(out.shape));
  read_weight(node, {out.c, in.c}, conv.get());
  return conv;
}

// ---- Running ------------------------------------------------------------------------------------------------------

// What all panels share.
ConvParams params_of(const StepRun& run) {
  const ConvData& data = run.data<ConvData>();
  const PackedConv& conv = *run.step.conv;
  ConvParams params = {};
  params.taps = static_cast<int32_t>(conv.tap_offset.size());
  params.k = conv.k;
  params.a_stride = data.window.stride[1] * run.in().c;
  params.tap_offset = conv.tap_offset.data();
  params.c_stride = run.out().c;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  params.lanes = conv.lanes.data();
  if (run.node().has_residual()) {
    params.residual_stride = run.in(1).c;
    params.residual_scale = data.residual_multiplier;
  }
  return params;
}

void run_panels(const StepRun& run) {
  const PackedConv& conv = *run.step.conv;
  const Activation& out = run.out();
  const int64_t nr = conv.kernel->nr;
  const ConvPart part = part_of(run.chunk.program, run.step, run.tiles.size(), run.share);
  const uint8_t* a = run.from();
  const uint8_t* residual = run.node().has_residual() ? run.from(1) : nullptr;
  const uint8_t* weights = run.chunk.program.weights.data() + conv.weight_offset;
  const ConvFn kernel = out.is_f32 ? conv.kernel->f32 : conv.kernel->qu8;
  ConvParams params = params_of(run);
  for (int64_t tile = part.tiles.begin; tile < part.tiles.end; tile += part.tiles_per_block) {
    const int64_t tile_end = std::min(tile + part.tiles_per_block, part.tiles.end);
    for (int64_t panel = part.panels.begin; panel < part.panels.end; ++panel) {
      params.n = static_cast<int32_t>(std::min<int64_t>(nr, out.c - panel * nr));
      params.a = a + conv.panel_channel[panel];
      params.w = weights + panel * conv.panel_bytes;
      params.comp = reinterpret_cast<const int32_t*>(conv.comp.data()) + panel * nr;
      params.scale = reinterpret_cast<const float*>(conv.scale.data()) + panel * nr;
      params.bias = reinterpret_cast<const float*>(conv.bias.data()) + panel * nr;
      params.c = out.is_f32 ? static_cast<void*>(run.to_f32() + panel * nr) : run.to() + panel * nr;
      params.residual = residual ? residual + panel * nr : nullptr;
      // Weights come from DRAM in every run: fetch the next panel under this one, once.
      params.prefetch = weights + (panel + 1) * conv.panel_bytes;
      params.prefetch_bytes = tile == part.tiles.begin ? conv.panel_bytes : 0;
      kernel(&params, run.tiles.data() + tile, static_cast<size_t>(tile_end - tile));
    }
  }
}

void run_depthwise(const StepRun& run) {
  const PackedConv& conv = *run.step.conv;
  const Activation &in = run.in(), &out = run.out();
  const Window& window = run.data<ConvData>().window;
  DepthwiseParams params = {};
  params.taps = static_cast<int32_t>(conv.tap_offset.size());
  params.tap_offset = conv.tap_offset.data();
  params.w = reinterpret_cast<const int8_t*>(run.chunk.program.weights.data() + conv.weight_offset);
  params.w_stride = conv.depthwise_stride;
  params.comp = reinterpret_cast<const int32_t*>(conv.comp.data());
  params.scale = reinterpret_cast<const float*>(conv.scale.data());
  params.bias = reinterpret_cast<const float*>(conv.bias.data());
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t y = row % out.h * window.stride[0] - window.padding[0];
    params.a = run.from() + row / out.h * in.image_pitch + in.origin + y * in.row_pitch - window.padding[1] * in.c;
    params.c = run.to() + out.row_offset(row);
    const auto run_pixels = [&](int64_t repeat, int64_t pixels) {  // `repeat` neighbours count as one pixel
      params.n = static_cast<int32_t>(out.c * repeat);
      params.a_stride = window.stride[1] * in.c * repeat;
      params.c_stride = out.c * repeat;
      run.kernels().depthwise(&params, static_cast<size_t>(pixels));
      params.a += pixels * params.a_stride;
      params.c += pixels * params.c_stride;
    };
    run_pixels(conv.repeat, out.w / conv.repeat);
    run_pixels(1, out.w % conv.repeat);
  }
}

void run_conv(const StepRun& run) {
  if (run.step.conv->is_depthwise) return run_depthwise(run);
  run_panels(run);
}

}  // namespace

const ConvData* conv_of(const Node& node) { return dynamic_cast<const ConvData*>(node.data.get()); }

std::vector<OpInfo> conv_ops() {
  const std::set<std::string> keys = {"weight", "multiplier", "bias", "stride", "padding", "dilation", "groups"};
  return {
      // name, version, inputs, output, residual, in place, keys, read, run
      {"conv2d", 1, {1, 2}, Output::requantized, true, 1, keys, read_conv2d, run_conv},
      {"linear", 1, {1, 2}, Output::requantized, true, 1, {"weight", "multiplier", "bias"}, read_linear, run_conv},
  };
}

}  // namespace qdeploy
