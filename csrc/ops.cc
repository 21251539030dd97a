#include "ops.h"

#include <algorithm>
#include <cstring>

#include "pack.h"

namespace qdeploy {
namespace {

struct Range {
  int64_t begin, end;
};

Range slice(int64_t n, Share share) {
  return {n * share.thread / share.threads, n * (share.thread + 1) / share.threads};
}

// The first of the chunk's images.
uint8_t* u8_at(const Chunk& chunk, int activation) {
  const Activation& a = chunk.program.activations[activation];
  const int64_t skipped = chunk.plan.for_all[activation] ? chunk.first * a.image_pitch * (a.is_f32 ? 4 : 1) : 0;
  return chunk.arena + chunk.plan.offset[activation] + skipped;
}
float* f32_at(const Chunk& chunk, int activation) { return reinterpret_cast<float*>(u8_at(chunk, activation)); }

// One row of one image: rows of a chunk are numbered through all its images.
int64_t row_offset(const Activation& a, int64_t row) {
  return row / a.h * a.image_pitch + a.origin + row % a.h * a.row_pitch;
}

// Writes the zero point around this thread's rows of `activation`; the corners and full rows go with the first and last
// row.
void fill_border(const Chunk& chunk, int activation, Share share) {
  const Activation& a = chunk.program.activations[activation];
  if (a.border[0] + a.border[1] + a.border[2] + a.border[3] == 0) return;
  uint8_t* base = u8_at(chunk, activation);
  const Range rows = slice(chunk.images * a.h, share);
  const int64_t left = a.border[1] * a.c, right = a.border[3] * a.c, width = a.w * a.c;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* pixels = base + row_offset(a, row);
    memset(pixels - left, a.zero_point, left);
    memset(pixels + width, a.zero_point, right);
    uint8_t* row_start = pixels - left;
    if (row % a.h == 0) memset(row_start - a.border[0] * a.row_pitch, a.zero_point, a.border[0] * a.row_pitch);
    if (row % a.h == a.h - 1) memset(row_start + a.row_pitch, a.zero_point, a.border[2] * a.row_pitch);
  }
}

// ---- Convolution --------------------------------------------------------------------------------------------------

// Pixels are shared out where that leaves every thread several tiles: then each keeps its rows in its own L2. Small
// maps share channels: on 7x7 a split of 4 tiles would read all weights twice (ResNet-50: 0.4 ms of 8.4 on two
// threads).
bool splits_channels(size_t tiles, int64_t panels, int threads) {
  if (threads == 1) return false;
  const auto worst = [&](int64_t n) { return (n + threads - 1) / threads; };
  const int64_t by_tile = worst(static_cast<int64_t>(tiles)) * panels;
  const int64_t by_panel = static_cast<int64_t>(tiles) * worst(panels);
  return by_panel < by_tile || (by_panel == by_tile && static_cast<int64_t>(tiles) < 4 * threads);
}

void run_conv(const Chunk& chunk, size_t index, Share share) {
  const Step& step = chunk.program.steps[index];
  const PackedConv& conv = step.conv;
  const Activation& in = chunk.program.activations[step.inputs[0]];
  const Activation& out = chunk.program.activations[step.output];
  const std::vector<ConvTile>& tiles = chunk.plan.tiles[index];
  const int64_t nr = conv.kernel->nr;
  Range tile_range = {0, static_cast<int64_t>(tiles.size())}, panel_range = {0, conv.panels};
  if (splits_channels(tiles.size(), conv.panels, share.threads)) {
    panel_range = slice(conv.panels, share);
  } else {
    tile_range = slice(tile_range.end, share);
  }
  const uint8_t* a = u8_at(chunk, step.inputs[0]);
  const uint8_t* weights = chunk.program.weights.data() + conv.weight_offset;

  ConvParams params = {};
  params.taps = static_cast<int32_t>(conv.tap_offset.size());
  params.k = conv.k;
  params.a_stride = step.node->window.stride[1] * in.c;
  params.tap_offset = conv.tap_offset.data();
  params.c_stride = out.c;
  params.qmin = step.node->qmin;
  params.qmax = step.node->qmax;
  params.lanes = conv.lanes.data();
  const uint8_t* residual = nullptr;
  if (step.node->has_residual) {
    residual = u8_at(chunk, step.inputs[1]);
    params.residual_stride = chunk.program.activations[step.inputs[1]].c;
    params.residual_scale = step.node->residual_multiplier;
  }
  const ConvFn kernel = out.is_f32 ? conv.kernel->f32 : conv.kernel->qu8;
  const int64_t block = conv.tiles_per_block ? static_cast<int64_t>(conv.tiles_per_block) : tile_range.end;
  for (int64_t tile = tile_range.begin; tile < tile_range.end; tile += block) {
    const int64_t tile_end = std::min(tile + block, tile_range.end);
    for (int64_t panel = panel_range.begin; panel < panel_range.end; ++panel) {
      params.n = static_cast<int32_t>(std::min<int64_t>(nr, out.c - panel * nr));
      params.a = a + conv.panel_channel[panel];
      params.w = weights + panel * conv.panel_bytes;
      params.comp = reinterpret_cast<const int32_t*>(conv.comp.data()) + panel * nr;
      params.scale = reinterpret_cast<const float*>(conv.scale.data()) + panel * nr;
      params.bias = reinterpret_cast<const float*>(conv.bias.data()) + panel * nr;
      params.c = out.is_f32 ? static_cast<void*>(f32_at(chunk, step.output) + panel * nr)
                            : u8_at(chunk, step.output) + panel * nr;
      params.residual = residual ? residual + panel * nr : nullptr;
      // Weights come from DRAM in every run: fetch the next panel under this one, once.
      params.prefetch = weights + (panel + 1) * conv.panel_bytes;
      params.prefetch_bytes = tile == tile_range.begin ? conv.panel_bytes : 0;
      kernel(&params, tiles.data() + tile, static_cast<size_t>(tile_end - tile));
    }
  }
}

void run_depthwise(const Chunk& chunk, const Step& step, Share share) {
  const PackedConv& conv = step.conv;
  const Activation& in = chunk.program.activations[step.inputs[0]];
  const Activation& out = chunk.program.activations[step.output];
  const Window& window = step.node->window;
  DepthwiseParams params = {};
  params.taps = static_cast<int32_t>(conv.tap_offset.size());
  params.tap_offset = conv.tap_offset.data();
  params.w = reinterpret_cast<const int8_t*>(chunk.program.weights.data() + conv.weight_offset);
  params.w_stride = depthwise_stride(*step.node, conv);
  params.comp = reinterpret_cast<const int32_t*>(conv.comp.data());
  params.scale = reinterpret_cast<const float*>(conv.scale.data());
  params.bias = reinterpret_cast<const float*>(conv.bias.data());
  params.qmin = step.node->qmin;
  params.qmax = step.node->qmax;
  const Range rows = slice(chunk.images * out.h, share);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t y = row % out.h * window.stride[0] - window.padding[0];
    params.a = u8_at(chunk, step.inputs[0]) + row / out.h * in.image_pitch + in.origin + y * in.row_pitch -
               window.padding[1] * in.c;
    params.c = u8_at(chunk, step.output) + row_offset(out, row);
    const auto run = [&](int64_t repeat, int64_t pixels) {  // `repeat` neighbours count as one pixel
      params.n = static_cast<int32_t>(out.c * repeat);
      params.a_stride = window.stride[1] * in.c * repeat;
      params.c_stride = out.c * repeat;
      chunk.program.kernels->depthwise(&params, static_cast<size_t>(pixels));
      params.a += pixels * params.a_stride;
      params.c += pixels * params.c_stride;
    };
    run(conv.repeat, out.w / conv.repeat);
    run(1, out.w % conv.repeat);
  }
}

// ---- Pools --------------------------------------------------------------------------------------------------------

// The part of a window that lies inside the image, along one dimension.
struct Span {
  int64_t first, count;
};

Span clip(int64_t out, const Window& window, int d, int64_t size) {
  const int64_t start = out * window.stride[d] - window.padding[d], step = window.dilation[d];
  const int64_t skipped = start < 0 ? (-start + step - 1) / step : 0;
  const int64_t first = start + skipped * step;
  const int64_t left = first < size ? (size - 1 - first) / step + 1 : 0;
  return {first, std::min(window.kernel[d] - skipped, left)};
}

// Output pixels from x on, at most `most`, whose windows clip alike: the whole ones in the middle of a row, else one.
int64_t alike(int64_t x, int64_t most, const Window& window, int64_t size) {
  const int64_t reach = (window.kernel[1] - 1) * window.dilation[1];
  const auto whole = [&](int64_t i) {
    const int64_t start = i * window.stride[1] - window.padding[1];
    return start >= 0 && start + reach < size;
  };
  int64_t count = 1;
  while (count < most && whole(x) && whole(x + count)) ++count;
  return count;
}

void run_pool(const Chunk& chunk, const Step& step, Share share) {
  const Node& node = *step.node;
  const Kernels& kernels = *chunk.program.kernels;
  const Activation& in = chunk.program.activations[step.inputs[0]];
  const Activation& out = chunk.program.activations[step.output];
  AvgPoolParams params = {};
  params.window.row_stride = node.window.dilation[0] * in.row_pitch;
  params.window.col_stride = node.window.dilation[1] * in.c;
  params.window.n = static_cast<size_t>(in.c);
  params.window.a_stride = node.window.stride[1] * in.c;
  params.window.c_stride = out.c;
  params.zero_point = in.zero_point;
  params.bias = node.bias.empty() ? 0.0f : node.bias[0];
  params.qmin = node.qmin;
  params.qmax = node.qmax;
  const Range pixels = slice(chunk.images * out.h * out.w, share);
  for (int64_t pixel = pixels.begin, count = 0; pixel < pixels.end; pixel += count) {
    const int64_t row = pixel / out.w, x = pixel % out.w;
    count = alike(x, std::min(out.w - x, pixels.end - pixel), node.window, in.w);
    const Span rows = clip(row % out.h, node.window, 0, in.h), columns = clip(x, node.window, 1, in.w);
    params.window.a = u8_at(chunk, step.inputs[0]) + row / out.h * in.image_pitch + in.origin +
                      rows.first * in.row_pitch + columns.first * in.c;
    params.window.rows = static_cast<size_t>(rows.count);
    params.window.cols = static_cast<size_t>(columns.count);
    params.window.pixels = static_cast<size_t>(count);
    const int64_t to = row_offset(out, row) + x * out.c;
    if (node.op == Op::max_pool2d) {
      kernels.max_pool(&params.window, u8_at(chunk, step.output) + to);
      continue;
    }
    params.scale = node.multiplier[node.multiplier.size() == 1 ? 0 : rows.count * columns.count - 1];
    if (out.is_f32) {
      kernels.avg_pool_f32(&params, f32_at(chunk, step.output) + to);
    } else {
      kernels.avg_pool_qu8(&params, u8_at(chunk, step.output) + to);
    }
  }
}

// ---- Elementwise and data movement --------------------------------------------------------------------------------

void run_add(const Chunk& chunk, const Step& step, Share share) {
  const Activation& a = chunk.program.activations[step.inputs[0]];
  const Activation& b = chunk.program.activations[step.inputs[1]];
  const Activation& out = chunk.program.activations[step.output];
  const Node& node = *step.node;
  const AddParams params = {node.multiplier[0], node.multiplier[1], node.bias[0], node.qmin, node.qmax};
  const Range rows = slice(chunk.images * out.h, share);
  const size_t n = static_cast<size_t>(out.w * out.c);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint8_t* from_a = u8_at(chunk, step.inputs[0]) + row_offset(a, row);
    const uint8_t* from_b = u8_at(chunk, step.inputs[1]) + row_offset(b, row);
    if (out.is_f32) {
      chunk.program.kernels->add_f32(&params, n, from_a, from_b, f32_at(chunk, step.output) + row_offset(out, row));
    } else {
      chunk.program.kernels->add_qu8(&params, n, from_a, from_b, u8_at(chunk, step.output) + row_offset(out, row));
    }
  }
}

void run_table(const Chunk& chunk, const Step& step, Share share) {
  const Activation& in = chunk.program.activations[step.inputs[0]];
  const Activation& out = chunk.program.activations[step.output];
  const Range rows = slice(chunk.images * out.h, share);
  const size_t n = static_cast<size_t>(out.w * out.c);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint8_t* from = u8_at(chunk, step.inputs[0]) + row_offset(in, row);
    if (out.is_f32) {
      float* to = f32_at(chunk, step.output) + row_offset(out, row);
      for (size_t i = 0; i < n; ++i) to[i] = step.node->table_f32[from[i]];
    } else {
      chunk.program.kernels->table(n, step.node->table.data(), from, u8_at(chunk, step.output) + row_offset(out, row));
    }
  }
}

void run_concat(const Chunk& chunk, const Step& step, Share share) {
  const Activation& out = chunk.program.activations[step.output];
  const Range rows = slice(chunk.images * out.h, share);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* to = u8_at(chunk, step.output) + row_offset(out, row);
    for (const int input : step.inputs) {
      const Activation& in = chunk.program.activations[input];
      const uint8_t* from = u8_at(chunk, input) + row_offset(in, row);
      for (int64_t x = 0; x < out.w; ++x) memcpy(to + x * out.c, from + x * in.c, in.c);
      to += in.c;
    }
  }
}

// Both sides number their elements row-major in [C, H, W]; memory is NHWC.
void run_reshape(const Chunk& chunk, const Step& step, Share share) {
  const Activation& in = chunk.program.activations[step.inputs[0]];
  const Activation& out = chunk.program.activations[step.output];
  const int64_t plane = out.h * out.w;
  const Range channels = slice(chunk.images * in.c, share);
  for (int64_t i = channels.begin; i < channels.end; ++i) {
    const int64_t image = i / in.c, c = i % in.c;
    const uint8_t* from = u8_at(chunk, step.inputs[0]) + image * in.image_pitch + in.origin + c;
    uint8_t* to = u8_at(chunk, step.output) + image * out.image_pitch + out.origin;
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

// One table of 256 codes per channel. By value: a stored byte might change anything that is referred to.
void quantize_raw(const uint8_t* from, int64_t pixels, int64_t channels, const uint8_t* tables, uint8_t* to) {
  for (int64_t x = 0; x < pixels; ++x) {
    for (int64_t c = 0; c < channels; ++c) *to++ = tables[c * 256 + *from++];
  }
}

}  // namespace

bool run_input(const Chunk& chunk, int activation, const std::vector<uint8_t>& preprocess_table, const void* images,
               bool is_u8, Share share) {
  const Activation& a = chunk.program.activations[activation];
  fill_border(chunk, activation, share);
  const Range rows = slice(chunk.images * a.h, share);
  bool finite = true;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* to = u8_at(chunk, activation) + row_offset(a, row);
    if (is_u8) {
      quantize_raw(static_cast<const uint8_t*>(images) + row * a.w * a.c, a.w, a.c, preprocess_table.data(), to);
      continue;
    }
    const int64_t plane = a.h * a.w;
    QuantizeParams params = {};
    params.a = static_cast<const float*>(images) + row / a.h * a.c * plane + row % a.h * a.w;
    params.plane_stride = plane;
    params.pixels = static_cast<size_t>(a.w);
    params.channels = static_cast<size_t>(a.c);
    params.inv_scale = 1.0f / a.scale;
    params.zero_point = a.zero_point;
    params.c = to;
    params.c_stride = a.c;
    finite &= chunk.program.kernels->quantize(&params);
  }
  return finite;
}

void run_step(const Chunk& chunk, size_t index, Share share) {
  const Step& step = chunk.program.steps[index];
  fill_border(chunk, step.output, share);
  switch (step.node->op) {
    case Op::conv2d:
    case Op::linear:
      if (step.conv.is_depthwise) return run_depthwise(chunk, step, share);
      return run_conv(chunk, index, share);
    case Op::max_pool2d:
    case Op::avg_pool2d:
      return run_pool(chunk, step, share);
    case Op::add:
      return run_add(chunk, step, share);
    case Op::table:
      return run_table(chunk, step, share);
    case Op::concat:
      return run_concat(chunk, step, share);
    case Op::reshape:
      return run_reshape(chunk, step, share);
  }
}

template <typename T>
static void copy_out_as(const Activation& a, int64_t batch, const T* from, T* to) {
  for (int64_t image = 0; image < batch; ++image) {
    for (int64_t c = 0; c < a.c; ++c) {
      for (int64_t y = 0; y < a.h; ++y) {
        const T* row = from + image * a.image_pitch + a.origin + y * a.row_pitch + c;
        for (int64_t x = 0; x < a.w; ++x) *to++ = row[x * a.c];
      }
    }
  }
}

void copy_out(const Chunk& chunk, int activation, void* to) {
  const Activation& a = chunk.program.activations[activation];
  if (a.is_f32) {
    copy_out_as(a, chunk.images, f32_at(chunk, activation), static_cast<float*>(to));
  } else {
    copy_out_as(a, chunk.images, u8_at(chunk, activation), static_cast<uint8_t*>(to));
  }
}

const char* split_of(const Chunk& chunk, size_t index, int threads) {
  const Step& step = chunk.program.steps[index];
  if (!step.conv.kernel) return "rows";
  return splits_channels(chunk.plan.tiles[index].size(), step.conv.panels, threads) ? "channels" : "tiles";
}

}  // namespace qdeploy
