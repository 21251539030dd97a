// conv2d and linear: a linear is a convolution of one pixel.
#include "conv.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "../errors.h"
#include "../winograd.h"
#include "winograd.h"

namespace qdeploy {
namespace {

// ---- Reading ------------------------------------------------------------------------------------------------------

// The key `weight`. Returns its shape.
std::vector<int64_t> read_codes(const NodeSource& node, ConvData* conv) {
  const Weight weight = read_weight(node);
  conv->bits = weight.bits;
  conv->codes = weight.codes.offset;
  conv->used_bits = weight.bits < 8 ? weight.bits : node.constants.used_bits(weight.codes);
  return weight.shape;
}

// The shape that the operands ask for, and accumulators that cannot overflow.
void require_weight_shape(const NodeSource& node, const std::vector<int64_t>& shape,
                          const std::vector<int64_t>& expected, int bits) {
  require(shape == expected, "a weight of shape " + shape_text(expected), shape_text(shape),
          key_of("weight", node.where));
  int64_t depth = 1;  // the number of codes of one channel, below 2^48
  for (size_t i = 1; i < shape.size(); ++i) depth *= shape[i];
  node.require(depth < (1 << 24) && depth * 255 << (bits - 1) < int64_t{1} << 31, "accumulators below 2^31",
               "weight " + shape_text(shape) + " of " + std::to_string(bits) + " bits");
}

InnerCodes read_inner_codes(const NodeSource& node, float residual_multiplier) {
  const std::array<uint8_t, 2> clamp = clamp_member(node.json, "inner_clamp", node.where);
  const float multiplier = number_member(node.json, "inner_multiplier", node.where);
  const float bias = number_member(node.json, "inner_bias", node.where);
  const double residual = (node.input(1).type == Dtype::s16 ? 32767.0 : 255.0) * std::fabs(residual_multiplier);
  require_bounded(255.0 * std::fabs(multiplier) + std::fabs(bias) + residual, node.output.is_f32(), node.where);
  return {kRound + clamp[0], kRound + clamp[1], multiplier, bias};
}

void read_constants(const NodeSource& node, ConvData* conv) {
  conv->multiplier = node.floats("multiplier", {node.output.c});
  conv->bias = node.floats("bias", {node.output.c});
  if (!node.has_residual) return;
  const std::vector<int64_t>& residual = node.input(1).shape;
  node.require(residual == node.output.shape, "a residual of shape " + shape_text(node.output.shape),
               shape_text(residual));
  conv->residual_multiplier = number_member(node.json, "residual_multiplier", node.where);
  if (node.json.contains("inner_clamp")) conv->inner = read_inner_codes(node, conv->residual_multiplier);
}

int version_of_conv(const Node& node, const std::vector<const Tensor*>&) {
  return conv_of(node)->inner ? kInnerCodes : 1;
}

std::unique_ptr<const OpData> read_conv2d(const NodeSource& node) {
  auto conv = std::make_unique<ConvData>();
  const std::vector<int64_t> shape = read_codes(node, conv.get());
  require(shape.size() == 4, "a weight of shape [O, C/groups, KH, KW]", shape_text(shape),
          key_of("weight", node.where));
  conv->window = read_window(node);
  conv->window.kernel[0] = shape[2];
  conv->window.kernel[1] = shape[3];
  const int64_t in = node.input().c, out = node.output.shape[0];  // of tokens, which it cannot be, no c
  require_spatial_output(node, conv->window, out);
  conv->groups = int_member(node.json, "groups", 1, kMaxSize, node.where);
  node.require(in % conv->groups == 0 && out % conv->groups == 0, "groups that divide the channels",
               std::to_string(conv->groups));
  require_weight_shape(node, shape, {out, in / conv->groups, shape[2], shape[3]}, conv->bits);
  read_constants(node, conv.get());
  return conv;
}

std::unique_ptr<const OpData> read_linear(const NodeSource& node) {
  auto conv = std::make_unique<ConvData>();
  const std::vector<int64_t> shape = read_codes(node, conv.get());
  require(shape.size() == 2, "a weight of shape [O, F]", shape_text(shape), key_of("weight", node.where));
  const Tensor &in = node.input(), &out = node.output;
  const std::string layout = node.file.version() < 3 ? "[F]" : "[F] or [T, F]";
  node.require(in.shape.size() < 3, "an input of shape " + layout, shape_text(in.shape));
  node.require(out.shape.size() < 3, "an output of shape " + layout, shape_text(out.shape));
  std::vector<int64_t> expected = in.shape;
  expected.back() = out.shape.back();
  node.require_output(expected);
  require_weight_shape(node, shape, {out.c, in.c}, conv->bits);
  read_constants(node, conv.get());
  return conv;
}

// ---- Running ------------------------------------------------------------------------------------------------------

// What all panels share.
ConvParams params_of(const StepRun& run) {
  const ConvData& data = run.data<ConvData>();
  const PackedConv& conv = *run.step.conv;
  ConvParams params = {};
  params.cells = static_cast<int32_t>(conv.cell_offset.size());
  params.k = conv.k;
  params.a_stride = data.window.stride[1] * run.in().c;
  params.cell_offset = conv.cell_offset.data();
  params.c_stride = run.out().c;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  params.lanes = conv.lanes.data();
  if (run.node().has_residual) {
    params.residual_type = run.in(1).type;
    params.residual_stride = run.in(1).c;
    params.residual_multiplier = data.residual_multiplier;
    params.inner = data.inner ? &*data.inner : nullptr;
  }
  return params;
}

// The part of ConvParams that goes with a panel, but for where the results go.
void set_panel(const StepRun& run, int64_t panel, ConvParams* params) {
  const PackedConv& conv = *run.step.conv;
  const int64_t nr = conv.kernel->nr;
  params->n = static_cast<int32_t>(std::min<int64_t>(nr, run.out().c - panel * nr));
  params->a = run.from() + conv.panel_channel[panel];
  params->w = run.chunk.program.weights.data() + conv.weight_offset + panel * conv.panel_bytes;
  params->comp = reinterpret_cast<const int32_t*>(conv.comp.data()) + panel * nr;
  params->multiplier = reinterpret_cast<const float*>(conv.multiplier.data()) + panel * nr;
  params->bias = reinterpret_cast<const float*>(conv.bias.data()) + panel * nr;
}

// The tiles in `range` under a panel, by the kernel for the type of the output.
void run_tiles(const StepRun& run, int64_t panel, Range range, ConvParams params) {
  const ConvKernel& kernel = *run.step.conv->kernel;
  const int64_t first = panel * kernel.nr;
  const Dtype type = run.out().type;
  params.c = run.to() + first * run.out().bytes();
  params.residual = run.node().has_residual ? run.from(1) + first * run.in(1).bytes() : nullptr;
  const ConvFn conv = type == Dtype::f32 ? kernel.f32 : type == Dtype::s16 ? kernel.s16 : kernel.qu8;
  conv(&params, run.tiling.tiles.data() + range.begin, static_cast<size_t>(range.end - range.begin));
}

// What makes rows of numbers, with the residual, the output; of inner codes these and the residual change places.
ScaleAddParams scale_add_of(const StepRun& run) {
  const ConvData& data = run.data<ConvData>();
  ScaleAddParams add = {};
  add.b_type = Dtype::f32;
  add.c_type = run.out().type;
  add.qmin = run.node().qmin;
  add.qmax = run.node().qmax;
  if (data.inner) {
    add.b_type = run.in(1).type;
    add.multiplier_a = data.inner->multiplier;
    add.multiplier_b = data.residual_multiplier;
    add.bias = data.inner->bias;
  } else if (run.node().has_residual) {
    add.a_type = run.in(1).type;
    add.multiplier_a = data.residual_multiplier;
  }  // else r = fma(0, 0, r), of whatever u8
  return add;
}

// The inner codes of n numbers.
void round_to_inner_codes(const StepRun& run, size_t n, const float* numbers, uint8_t* codes) {
  const InnerCodes& inner = *run.data<ConvData>().inner;
  ScaleAddParams round = {};  // r = fma(0, 0, r), of whatever u8
  round.n = n;
  round.a = round.b = numbers;
  round.c = codes;
  round.b_type = Dtype::f32;
  round.qmin = static_cast<uint8_t>(inner.low - kRound);
  round.qmax = static_cast<uint8_t>(inner.high - kRound);
  run.kernels().scale_add(&round);
}

void run_panels(const StepRun& run) {
  const PackedConv& conv = *run.step.conv;
  const ConvPart part = part_of(run.step, run.tiling, run.share);
  const uint8_t* weights = run.chunk.program.weights.data() + conv.weight_offset;
  ConvParams params = params_of(run);
  const int64_t block = run.tiling.tiles_per_block ? run.tiling.tiles_per_block : part.tiles.end;
  for (int64_t tile = part.tiles.begin; tile < part.tiles.end; tile += block) {
    const Range tiles = {tile, std::min(tile + block, part.tiles.end)};
    for (int64_t panel = part.panels.begin; panel < part.panels.end; ++panel) {
      set_panel(run, panel, &params);
      // Weights come from DRAM in every run: fetch the next panel under this one, once.
      params.prefetch = weights + (panel + 1) * conv.panel_bytes;
      params.prefetch_bytes = tile == part.tiles.begin ? conv.panel_bytes : 0;
      run_tiles(run, panel, tiles, params);
    }
  }
}

// So many output pixels a call that weights and constants, which each call brings in order, weigh little.
constexpr int64_t kDepthwisePixels = 112;

DepthwiseParams depthwise_params(const StepRun& run) {
  const PackedConv& conv = *run.step.conv;
  const Activation &in = run.in(), &out = run.out();
  const Window& window = run.data<ConvData>().window;
  DepthwiseParams params = {};
  params.cells = static_cast<int32_t>(conv.cell_offset.size());
  params.columns = static_cast<int32_t>(window.kernel[1]);
  params.a_row_stride = window.stride[0] * in.row_pitch;
  params.cell_offset = conv.cell_offset.data();
  params.column_stride = window.dilation[1] * in.c;
  params.w = reinterpret_cast<const int8_t*>(run.chunk.program.weights.data() + conv.weight_offset);
  params.w_stride = conv.depthwise_stride;
  params.fits_s16 = conv.fits_s16;
  params.comp = reinterpret_cast<const int32_t*>(conv.comp.data());
  params.multiplier = reinterpret_cast<const float*>(conv.multiplier.data());
  params.bias = reinterpret_cast<const float*>(conv.bias.data());
  params.c_row_stride = out.row_pitch;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  return params;
}

// `repeat` neighbours count as one pixel.
void repeat_pixels(const StepRun& run, int64_t repeat, DepthwiseParams* params) {
  params->n = static_cast<int32_t>(run.out().c * repeat);
  params->a_stride = run.data<ConvData>().window.stride[1] * run.in().c * repeat;
  params->c_stride = run.out().c * repeat;
}

void run_depthwise(const StepRun& run) {
  const PackedConv& conv = *run.step.conv;
  const Activation &in = run.in(), &out = run.out();
  const Window& window = run.data<ConvData>().window;
  DepthwiseParams params = depthwise_params(run);
  const Range rows = run.rows();
  const int64_t most = std::max<int64_t>(1, kDepthwisePixels / out.w);
  for (int64_t row = rows.begin, count; row < rows.end; row += count) {
    count = std::min({most, rows.end - row, out.h - row % out.h});  // of one image
    const int64_t y = row % out.h * window.stride[0] - window.padding[0];
    params.a = run.from() + row / out.h * in.image_pitch + in.origin + y * in.row_pitch - window.padding[1] * in.c;
    params.c = run.to() + out.row_offset(row);
    const auto run_pixels = [&](int64_t repeat, int64_t pixels) {
      repeat_pixels(run, repeat, &params);
      run.kernels().depthwise(&params, static_cast<size_t>(count), static_cast<size_t>(pixels));
      params.a += pixels * params.a_stride;
      params.c += pixels * params.c_stride;
    };
    run_pixels(conv.repeat, out.w / conv.repeat);
    if (out.w % conv.repeat) run_pixels(1, out.w % conv.repeat);
  }
}

// Of a depthwise convolution: so many numbers are made before scale_add takes them from L1, whole pixels, at least one
// with its repetitions.
int64_t pixels_through_f32(const PackedConv& conv, int64_t channels) {
  constexpr int64_t kNumbers = 4096;
  return std::max<int64_t>(1, kNumbers / channels / conv.repeat) * conv.repeat;
}

// What run_depthwise does, where there is a residual, or the output is not u8.
void run_depthwise_through_f32(const StepRun& run) {
  const PackedConv& conv = *run.step.conv;
  const Activation &in = run.in(), &out = run.out();
  const ConvData& data = run.data<ConvData>();
  const Window& window = data.window;
  const bool has_residual = run.node().has_residual, straight = out.is_f32() && !has_residual;
  DepthwiseParams params = depthwise_params(run);
  ScaleAddParams add = scale_add_of(run);
  const Range rows = run.rows();
  const int64_t most = pixels_through_f32(conv, out.c);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t y = row % out.h * window.stride[0] - window.padding[0];
    params.a = run.from() + row / out.h * in.image_pitch + in.origin + y * in.row_pitch - window.padding[1] * in.c;
    for (int64_t x = 0, pixels; x < out.w; x += pixels) {
      pixels = std::min(most, out.w - x);
      uint8_t* to = run.row_to(row) + x * out.c * out.bytes();
      float* const numbers = reinterpret_cast<float*>(straight ? to : run.scratch());
      float* c = numbers;
      const auto run_pixels = [&](int64_t repeat, int64_t count) {
        repeat_pixels(run, repeat, &params);
        run.kernels().depthwise_f32(&params, static_cast<size_t>(count), c);
        params.a += count * params.a_stride;
        c += count * params.c_stride;
      };
      run_pixels(conv.repeat, pixels / conv.repeat);
      run_pixels(1, pixels % conv.repeat);
      if (straight) continue;
      add.n = static_cast<size_t>(pixels * out.c);
      add.a = has_residual ? run.row_from(row, 1) + x * out.c * run.in(1).bytes() : static_cast<const void*>(numbers);
      add.b = numbers;
      if (data.inner) {
        uint8_t* const codes = reinterpret_cast<uint8_t*>(numbers + most * out.c);
        round_to_inner_codes(run, add.n, numbers, codes);
        add.b = std::exchange(add.a, codes);
      }
      add.c = to;
      run.kernels().scale_add(&add);
    }
  }
}

int64_t conv_macs(const Member& member, const Node& node) {
  const ConvData& conv = *conv_of(node);
  const Tensor &in = member.tensors[node.inputs[0]], &out = member.tensors[node.output];
  return out.c * out.h * out.w * (in.c / conv.groups) * conv.window.kernel[0] * conv.window.kernel[1];
}

size_t conv_scratch(const Program&, const Step& step, const Activations& activations, int64_t images) {
  const int64_t channels = activations[step.output].c;
  if (step.conv->is_depthwise) {
    const int64_t pixels = step.conv->through_f32 ? pixels_through_f32(*step.conv, channels) : 0;
    const size_t bytes = sizeof(float) + (conv_of(*step.node)->inner ? 1 : 0);  // of a number and of its inner code
    return static_cast<size_t>(pixels * channels) * bytes + kOverread;
  }
  if (!step.conv->winograd) return 0;
  const int64_t block = make_tiling(activations, step, images).tiles_per_block;
  return winograd_scratch(*step.conv->winograd, activations[step.inputs[0]].c, block).bytes;
}

void run_conv(const StepRun& run) {
  if (run.step.conv->is_depthwise && run.step.conv->through_f32) return run_depthwise_through_f32(run);
  if (run.step.conv->is_depthwise) return run_depthwise(run);
  if (run.step.conv->winograd) return run_winograd(run);
  run_panels(run);
}

}  // namespace

Weight read_weight(const NodeSource& node) {
  const std::string where = key_of("weight", node.where), place = key_of("codes", where);
  const Json& weight = member(node.json, "weight", node.where);
  require_keys(weight, {"codes", "shape", "bits"}, where);
  const std::vector<int64_t> shape = int_array(weight, "shape", 1, 4, 1, kMaxElements, where);
  const int bits = static_cast<int>(int_member(weight, "bits", 2, 8, where));
  int64_t count = 1;
  for (const int64_t d : shape) {  // each is at most 2^28: below 2^48 the next product is no overflow
    require(!__builtin_mul_overflow(count, d, &count) && count < int64_t{1} << 48, "a weight that fits a file",
            "shape " + shape_text(shape), where);
  }
  const int64_t stream = count * bits, bytes = (stream + 7) / 8;
  const FileTensor& codes = node.file.tensor(string_member(weight, "codes", where), DType::u8, {bytes}, place);
  uint8_t last;
  node.file.read(codes.offset + codes.bytes - 1, 1, &last);
  require(stream % 8 == 0 || last >> (stream % 8) == 0, "zeros after the last code", "others", place);
  return {shape, count, bits, codes};
}

const ConvData* conv_of(const Node& node) { return dynamic_cast<const ConvData*>(node.data.get()); }

std::vector<OpInfo> conv_ops() {
  const std::set<std::string> keys = {"weight", "multiplier", "bias", "stride", "padding", "dilation", "groups"};
  return {
      // name, version, inputs, output, in place, reads, writes, rows, keys, read, run, scratch, macs
      {"conv2d",
       1,
       {1, 2},
       Output::requantized,
       InPlace::residual,
       kU8,
       kCodesOrF32,
       fixed_rows,
       keys,
       read_conv2d,
       run_conv,
       conv_scratch,
       conv_macs,
       {},
       version_of_conv},
      {"linear",
       1,
       {1, 2},
       Output::requantized,
       InPlace::residual,
       kU8,
       kCodesOrF32,
       same_rows,
       {"weight", "multiplier", "bias"},
       read_linear,
       run_conv,
       conv_scratch,
       conv_macs,
       {},
       version_of_conv},
  };
}

}  // namespace qdeploy
