#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <tuple>

#include "codes.h"
#include "cpu.h"
#include "errors.h"
#include "ops/conv.h"
#include "thread_pool.h"
#include "winograd.h"

namespace qdeploy {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Sums {
  int32_t codes, magnitudes;  // below 2^31 / 255: the reader checked it
};

// What conv2d or linear nodes have in common on the way to their PackedConv.
struct Layer {
  const Node& node;  // the first of them
  const ConvData& data;
  const Activation &in, &out;
  const Activation* residual;  // null: none
  std::string where;
  std::shared_ptr<PackedConv> conv = std::make_shared<PackedConv>();
  size_t weights = 0;           // the first layer that packs the same codes alike: it has the panels, and
  std::vector<Sums> sums = {};  // of the codes of each channel

  int64_t channels() const { return data.channels(); }
  int64_t depth() const { return in.c / data.groups; }  // input channels of a group
  int64_t codes_per_channel() const { return depth() * data.window.kernel[0] * data.window.kernel[1]; }
};

// ---- Lowering: how a layer is taken apart into cells and panels, for the kernel of its number of bits --------------

// Neighbouring pixels are neighbouring bytes where the stride is 1: a few of them at once may fill the vectors better,
// or keep vectors of a cache line within one. But then their windows share fewer columns. Weights and constants follow
// each other as many times.
int64_t depthwise_repeat(const ConvData& data, int64_t channels_at_once) {
  constexpr int64_t kSums = 29, kColumn = 8, kCrossing = 16;  // instructions, or what they take
  if (data.window.stride[1] != 1) return 1;
  const auto cost = [&](int64_t repeat) {  // of 8 pixels
    const int64_t channels = data.channels() * repeat;
    const bool crosses = channels_at_once == 64 && channels % 64 != 0;
    const int64_t vectors = (channels + channels_at_once - 1) / channels_at_once;
    const int64_t columns = std::min(repeat, data.window.kernel[1]);
    return 8 / repeat * vectors * (kSums + kColumn * columns + (crosses ? kCrossing : 0));
  };
  int64_t best = 1;
  for (int64_t repeat = 2; repeat <= 8; repeat *= 2) {
    if (cost(repeat) < cost(best)) best = repeat;
  }
  return best;
}

bool is_s16(const Activation* activation) { return activation && activation->type == Dtype::s16; }

// A grouped kernel takes whole groups a panel, whose inputs lie in one window.
bool fits_grouped(const Layer& layer, const ConvKernel& kernel) {
  const int64_t depth = layer.depth(), outputs = layer.channels() / layer.data.groups;
  return kernel.qu8 && layer.data.groups > 1 && depth % 4 == 0 && depth <= 16 && kernel.nr % outputs == 0 &&
         kernel.nr / outputs * depth <= kGroupedWindow && layer.out.type == Dtype::u8 && !is_s16(layer.residual) &&
         !layer.data.inner;
}

std::vector<int32_t> grouped_lanes(const Layer& layer, int64_t nr) {
  const int64_t depth = layer.depth(), outputs = layer.channels() / layer.data.groups;
  std::vector<int32_t> lanes;
  for (int64_t quad = 0; quad < depth / 4; ++quad) {
    for (int64_t n = 0; n < nr; ++n) lanes.push_back(static_cast<int32_t>(n / outputs * (depth / 4) + quad));
  }
  return lanes;
}

// A row of cells is one run of kw*C bytes: fewer zero weights than rounding C up to 4 at each cell, and longer inner
// loops.
bool merges_rows(const Layer& layer) { return layer.data.groups == 1 && layer.data.window.dilation[1] == 1; }

void set_cells(const Layer& layer) {
  const Window& window = layer.data.window;
  const int64_t row = window.dilation[0] * layer.in.row_pitch, column = window.dilation[1] * layer.in.c;
  const int64_t columns = merges_rows(layer) ? 1 : window.kernel[1];
  for (int64_t ky = 0; ky < window.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < columns; ++kx) {
      layer.conv->cell_offset.push_back(static_cast<int32_t>(ky * row + kx * column));
    }
  }
}

// The panels, and what each reads: all channels of the groups that it touches.
void set_panels(const Layer& layer) {
  PackedConv* conv = layer.conv.get();
  const int64_t nr = conv->kernel->nr, out = layer.channels(), depth = layer.depth(), in = layer.in.c;
  const int64_t per_group = out / layer.data.groups;
  const bool merged = merges_rows(layer), grouped = !conv->lanes.empty();
  conv->panels = (out + nr - 1) / nr;
  int64_t widest = merged ? layer.data.window.kernel[1] * in : depth;
  for (int64_t panel = 0; panel < conv->panels; ++panel) {
    const int64_t first = panel * nr / per_group * depth;
    const int64_t last = ((std::min(out, (panel + 1) * nr) - 1) / per_group + 1) * depth;
    conv->panel_channel.push_back(static_cast<int32_t>(first));
    if (!merged && !grouped) widest = std::max(widest, last - first);
  }
  const int64_t multiple = conv->kernel->k_multiple;
  conv->k = static_cast<int32_t>(round_up(widest, widest > multiple / 4 ? multiple : 4));
  for (int32_t& first : conv->panel_channel) {  // stay inside the pixel: over-reads must not exceed kOverread
    first = static_cast<int32_t>(std::max<int64_t>(0, std::min<int64_t>(first, in - conv->k)));
  }
}

void lower(const Layer& layer, const Kernels& kernels, ConvForm form) {
  PackedConv* conv = layer.conv.get();
  const bool one_each = layer.data.groups > 1 && layer.depth() == 1 && layer.channels() == layer.in.c;
  conv->is_depthwise = one_each;
  conv->through_f32 = one_each && (layer.node.has_residual || layer.out.type != Dtype::u8);
  set_cells(layer);
  if (conv->is_depthwise) {
    conv->repeat = depthwise_repeat(layer.data, kernels.depthwise_channels);
    conv->depthwise_stride = round_up(layer.channels() * conv->repeat, kMaxNr);
    return;
  }
  const bool grouped = fits_grouped(layer, kernels.grouped);
  conv->kernel = grouped ? &kernels.grouped : &kernels.conv[layer.data.used_bits];
  if (grouped) conv->lanes = grouped_lanes(layer, conv->kernel->nr);
  set_panels(layer);
  if (is_s16(&layer.out) || is_s16(layer.residual)) {
    const bool has_form = winograd_for(layer.data, layer.in, layer.out, *conv->kernel, kernels, form) != nullptr;
    conv->why_direct = layer.data.groups > 1 ? "no grouped kernel for s16" : has_form ? "no Winograd for s16" : "";
    return;
  }
  conv->winograd = winograd_for(layer.data, layer.in, layer.out, *conv->kernel, kernels, form);
}

// From the direct form, in which layers are lowered, to that of its Winograd kernel.
void become_winograd(const Layer& layer) {
  PackedConv* conv = layer.conv.get();
  conv->kernel = nullptr;
  conv->lanes.clear(), conv->cell_offset.clear(), conv->panel_channel.clear();
  conv->k = winograd_depth(layer.depth());
  conv->panels = (layer.channels() + conv->winograd->nr - 1) / conv->winograd->nr;
}

// Bytes of packed weights, a multiple of 64, and of each of the three constants. The kernel is chosen.
struct Sizes {
  size_t weights, constant;
};

Sizes sizes_of(const Layer& layer) {
  PackedConv* conv = layer.conv.get();
  const int64_t cells = static_cast<int64_t>(conv->cell_offset.size());
  int64_t channels = conv->depthwise_stride, bytes = cells * conv->depthwise_stride;
  if (!conv->kernel && conv->winograd) {
    conv->panel_bytes = winograd_panel_bytes(*conv->winograd, layer.depth());
    channels = conv->panels * conv->winograd->nr;
    bytes = conv->panels * static_cast<int64_t>(conv->panel_bytes);
  } else if (!conv->is_depthwise) {
    const ConvKernel& kernel = *conv->kernel;
    const int64_t element = kernel.format == WeightFormat::s8x4 ? 1 : 2;
    conv->panel_bytes = static_cast<size_t>(round_up(cells * conv->k * kernel.nr * element, 64));
    channels = conv->panels * kernel.nr;
    bytes = conv->panels * static_cast<int64_t>(conv->panel_bytes);
  }
  return {static_cast<size_t>(round_up(bytes, 64)), static_cast<size_t>(channels) * 4};
}

// ---- One channel: its codes, its bound, its constants -------------------------------------------------------------

// By pieces whose sums fit 16 bits, of which a vector holds twice as many as of 32 bits.
Sums sums_of(const int8_t* codes, int64_t count) {
  constexpr int64_t kPiece = 32767 / 128;
  Sums sums = {0, 0};
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    int16_t sum = 0, magnitude = 0;
    for (int64_t i = begin; i < std::min(begin + kPiece, count); ++i) {
      sum = static_cast<int16_t>(sum + codes[i]);
      magnitude = static_cast<int16_t>(magnitude + std::abs(codes[i]));
    }
    sums.codes += sum;
    sums.magnitudes += magnitude;
  }
  return sums;
}

// Checks that no result can leave the range that the kernels convert exactly.
void require_bounded_channel(const Layer& layer, int64_t channel, const Sums& sums) {
  const ConvData& data = layer.data;
  const double largest =
      255.0 * sums.magnitudes * std::fabs(data.multiplier->values[channel]) + std::fabs(data.bias->values[channel]);
  if (data.inner) return require_bounded(largest, false, layer.where, channel);
  const double residual = (is_s16(layer.residual) ? 32767.0 : 255.0) * std::fabs(data.residual_multiplier);
  require_bounded(largest + residual, layer.out.is_f32(), layer.where, channel);
}

// Where the sums of its codes allow that, the constants of every channel.
void set_constants(const Layer& layer, const std::vector<Sums>& sums) {
  const PackedConv& conv = *layer.conv;
  const int32_t a_offset = conv.kernel ? conv.kernel->a_offset : 0;
  auto* const comp = reinterpret_cast<int32_t*>(conv.comp.data());
  auto* const multiplier = reinterpret_cast<float*>(conv.multiplier.data());
  auto* const bias = reinterpret_cast<float*>(conv.bias.data());
  for (int64_t channel = 0; channel < layer.channels(); ++channel) {
    require_bounded_channel(layer, channel, sums[channel]);
    for (int64_t i = 0; i < conv.repeat; ++i) {
      const int64_t at = i * layer.channels() + channel;
      comp[at] = (a_offset - layer.in.zero_point) * sums[channel].codes;
      multiplier[at] = layer.data.multiplier->values[channel];
      bias[at] = layer.data.bias->values[channel];
    }
  }
}

// ---- The order of a panel -----------------------------------------------------------------------------------------

// 8 rows of 8 bytes, `from_stride` apart, become 8 rows `to[0]`, `to[1]`... of what were columns: blocks of 4 x 4 bytes
// change places, then blocks of 2 x 2, then bytes.
void transpose_8x8(const int8_t* from, int64_t from_stride, int8_t* const* to) {
  uint64_t rows[8];
  for (int i = 0; i < 8; ++i) memcpy(&rows[i], from + i * from_stride, 8);
  const auto exchange = [&](int distance, uint64_t low) {
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      const uint64_t other = (rows[i] >> distance * 8 ^ rows[i + distance]) & low;
      rows[i + distance] ^= other;
      rows[i] ^= other << distance * 8;
    }
  };
  exchange(4, 0x00000000ffffffff);
  exchange(2, 0x0000ffff0000ffff);
  exchange(1, 0x00ff00ff00ff00ff);
  for (int i = 0; i < 8; ++i) memcpy(to[i], &rows[i], 8);
}

// One channel of OIHW codes in the order in which a kernel walks through its activations: cells * k bytes, zeros where
// no channel of this group is read. A cell is a whole row of the kernel (byte = kx*C + c) or a single pixel (byte = c).
void order_channel(const Layer& layer, const int8_t* codes, int64_t channel, int8_t* ordered) {
  const PackedConv& conv = *layer.conv;
  const int64_t kw = layer.data.window.kernel[1], pixels = layer.data.window.kernel[0] * kw, depth = layer.depth();
  const int64_t in = layer.in.c, k = conv.k;
  const int64_t group = channel / (layer.channels() / layer.data.groups);
  const bool whole_groups = !conv.lanes.empty(), merged = merges_rows(layer);
  const int64_t first_byte = whole_groups ? 0 : group * depth - conv.panel_channel[channel / conv.kernel->nr];
  memset(ordered, 0, conv.cell_offset.size() * conv.k);
  const auto pixel = [&](int64_t i) {  // where the channels of pixel i of the kernel lie
    return ordered + (merged ? i / kw * k + i % kw * in : i * k) + first_byte;
  };
  if (pixels == 1) {
    memcpy(pixel(0), codes, depth);
    return;
  }
  int64_t i = 0;
  for (; i + 8 <= pixels; i += 8) {  // 3x3: 8 pixels and one
    int8_t* to[8];
    for (int j = 0; j < 8; ++j) to[j] = pixel(i + j);
    int64_t c = 0;
    for (; c + 8 <= depth; c += 8) {
      transpose_8x8(codes + c * pixels + i, pixels, to);
      for (int8_t*& channels : to) channels += 8;
    }
    for (; c < depth; ++c) {
      for (int j = 0; j < 8; ++j) *to[j]++ = codes[c * pixels + i + j];
    }
  }
  for (; i < pixels; ++i) {
    int8_t* to = pixel(i);
    for (int64_t c = 0; c < depth; ++c) to[c] = codes[c * pixels + i];
  }
}

// Rows of one channel each to a panel, 4 bytes of every row at a time.
void interleave_rows(const int8_t* rows, int64_t row_stride, int64_t lanes, int64_t count, const ConvKernel& kernel,
                     uint8_t* panel) {
  if (kernel.format == WeightFormat::s8x4) {
    for (int64_t i = 0; i < count; i += 4, panel += kernel.nr * 4) {
#pragma GCC unroll 8  // rounds at a time: their number is not known here
      for (int64_t lane = 0; lane < lanes; ++lane) memcpy(panel + lane * 4, rows + lane * row_stride + i, 4);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += 2, panel += kernel.nr * 4) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int8_t* from = rows + lane * row_stride + i;
      const int16_t pair[2] = {from[0], from[1]};
      memcpy(panel + lane * 4, pair, 4);
    }
  }
}

// Of every two neighbouring codes.
struct Pairs {
  std::vector<int16_t> sum, magnitude;
};

// Once for all kernels that are tried on a channel, and in vectors.
void pair_up(const int8_t* codes, size_t count, Pairs* pairs) {
  pairs->sum.resize(count / 2), pairs->magnitude.resize(count / 2);
  int16_t *sum = pairs->sum.data(), *magnitude = pairs->magnitude.data();
  for (size_t i = 0; i < count / 2; ++i) {
    const int16_t first = codes[2 * i], second = codes[2 * i + 1];
    sum[i] = static_cast<int16_t>(first + second);
    magnitude[i] = static_cast<int16_t>(std::abs(first) + std::abs(second));
  }
}

// Whether a kernel is exact for these codes of one channel, by ConvKernel::s16_quads.
bool fits_s16(const Pairs& pairs, const PackedConv& conv, const ConvKernel& kernel) {
  if (kernel.s16_quads == 0 || kernel.nr != conv.kernel->nr) return false;
  const int16_t *sums = pairs.sum.data(), *magnitudes = pairs.magnitude.data();
  const int32_t k = conv.k / 2, span = 2 * kernel.s16_quads;  // in pairs, two of which are a quad
  for (size_t cell = 0; cell < conv.cell_offset.size(); ++cell, sums += k, magnitudes += k) {
    for (int32_t begin = 0; begin < k; begin += span) {
      const int32_t end = std::min(k, begin + span);
      for (int32_t half = begin; half < begin + 2; ++half) {
        int sum = 0, magnitude = 0;
        for (int32_t i = half; i < end; i += 2) sum += sums[i], magnitude += magnitudes[i];
        // the positive codes add up to half of magnitude + sum, the negative ones to half of magnitude - sum
        if (magnitude + std::abs(sum) > 2 * 128) return false;
      }
    }
  }
  return true;
}

// Of one channel of a depthwise convolution: DepthwiseParams::fits_s16.
bool rows_fit_s16(const int8_t* codes, const Window& window) {
  const int64_t count = window.kernel[0] * window.kernel[1], two_rows = 2 * window.kernel[1];
  for (int64_t begin = 0; begin < count; begin += two_rows) {
    const Sums sums = sums_of(codes + begin, std::min(two_rows, count - begin));
    if (sums.magnitudes + std::abs(sums.codes) > 2 * 128) return false;  // as in fits_s16
  }
  return true;
}

// ---- Packing ------------------------------------------------------------------------------------------------------

// Reads the codes of one layer after another; each thread has one.
class Packer {
 public:
  // `weights` is all zeros where nothing was packed yet.
  Packer(const ModelFile& file, uint8_t* weights) : file_(file), weights_(weights) {}

  // Kernels of fewer bits are faster, and most of the codes that training gives are far smaller than the largest one:
  // where the sums of every channel fit (ConvKernel::s16_quads), a layer gets the kernel of fewer bits, just as exact.
  // A layer whose codes are too large for its Winograd kernel becomes direct.
  void choose_kernel(const Kernels& kernels, ConvForm form, const Layer& layer);

  // Reads and unpacks panel `panel` (depthwise: everything), and packs it to weights + weight_offset; fills sums.
  void pack_panel(int64_t panel, Layer* layer);

 private:
  void choose_narrow(const Kernels& kernels, const Layer& layer);
  void check_winograd(const Layer& layer);
  // All codes of a channel, to codes_.
  void read_channel(const Layer& layer, int64_t channel);
  const uint8_t* read_bits(uint64_t offset, int64_t first_bit, int64_t bits);

  const ModelFile& file_;
  uint8_t* const weights_;
  std::vector<uint8_t> packed_;  // codes of one panel as in the file
  std::vector<int8_t> codes_;    // of one channel
  std::vector<int8_t> rows_;     // of one panel, a row for each channel
  Pairs pairs_;                  // of one row
};

// The bytes of the file that hold these bits, with 8 more to read behind them.
const uint8_t* Packer::read_bits(uint64_t offset, int64_t first_bit, int64_t bits) {
  const int64_t begin = first_bit / 8, end = (first_bit + bits + 7) / 8;
  const size_t slack = kCodesPerBlock + 8;  // what unpack_codes reads behind the last code
  if (packed_.size() < end - begin + slack) packed_.resize(end - begin + slack);
  file_.read(offset + begin, static_cast<size_t>(end - begin), packed_.data());
  return packed_.data();
}

void Packer::read_channel(const Layer& layer, int64_t channel) {
  const int64_t count = layer.codes_per_channel(), bits = layer.data.bits, bit = channel * count * bits;
  codes_.resize(round_up(count, kCodesPerBlock));
  const uint8_t* packed = read_bits(layer.data.codes, bit, count * bits);
  unpack_codes(packed, layer.data.bits, bit % 8, count, codes_.data());
}

void Packer::check_winograd(const Layer& layer) {
  PackedConv* conv = layer.conv.get();
  const int64_t count = layer.codes_per_channel();
  if (count << (layer.data.used_bits - 1) <= kWinogradMagnitudes) return;
  for (int64_t channel = 0; channel < layer.channels(); ++channel) {
    read_channel(layer, channel);
    if (sums_of(codes_.data(), count).magnitudes <= kWinogradMagnitudes) continue;
    conv->winograd = nullptr;
    conv->why_direct = "codes too large for Winograd";
    return;
  }
}

void Packer::choose_kernel(const Kernels& kernels, ConvForm form, const Layer& layer) {
  PackedConv* conv = layer.conv.get();
  if (conv->is_depthwise || !conv->lanes.empty()) return;
  choose_narrow(kernels, layer);
  if (!conv->winograd) return;
  conv->winograd = winograd_for(layer.data, layer.in, layer.out, *conv->kernel, kernels, form);
  if (conv->winograd) check_winograd(layer);
}

void Packer::choose_narrow(const Kernels& kernels, const Layer& layer) {
  PackedConv* conv = layer.conv.get();
  const ConvKernel *kernel = &kernels.conv[2], *widest = conv->kernel;
  while (kernel < widest && kernel->s16_quads == 0) ++kernel;
  rows_.resize(conv->cell_offset.size() * conv->k);
  for (int64_t channel = 0; channel < layer.channels() && kernel < widest; ++channel) {
    read_channel(layer, channel);
    order_channel(layer, codes_.data(), channel, rows_.data());
    pair_up(rows_.data(), rows_.size(), &pairs_);
    while (kernel < widest && !fits_s16(pairs_, *conv, *kernel)) ++kernel;
  }
  conv->kernel = kernel;
}

void Packer::pack_panel(int64_t panel, Layer* of) {
  const Layer& layer = *of;
  const PackedConv& conv = *layer.conv;
  const int64_t out = layer.channels(), count = layer.codes_per_channel(), bits = layer.data.bits;
  const int64_t nr = conv.is_depthwise ? out : conv.winograd ? conv.winograd->nr : conv.kernel->nr;
  const int64_t first = panel * nr, lanes = std::min(nr, out - first);
  const int64_t row = conv.winograd ? count : static_cast<int64_t>(conv.cell_offset.size()) * conv.k;
  const int64_t row_stride = round_up(row, 128) + 64;  // an odd number of cache lines: rows do not share a cache set
  codes_.resize(round_up(count, kCodesPerBlock));
  rows_.resize(lanes * row_stride);
  const uint8_t* packed = read_bits(layer.data.codes, first * count * bits, lanes * count * bits);
  uint8_t* to = weights_ + conv.weight_offset + panel * conv.panel_bytes;
  if (conv.is_depthwise) of->conv->fits_s16 = true;  // until a channel does not
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t channel = first + lane, bit = first * count * bits % 8 + lane * count * bits;
    unpack_codes(packed, layer.data.bits, bit, count, codes_.data());
    of->sums[channel] = sums_of(codes_.data(), count);
    if (conv.winograd) {
      memcpy(rows_.data() + lane * row_stride, codes_.data(), count);
      continue;
    }
    if (!conv.is_depthwise) {
      order_channel(layer, codes_.data(), channel, rows_.data() + lane * row_stride);
      continue;
    }
    if (!rows_fit_s16(codes_.data(), layer.data.window)) of->conv->fits_s16 = false;
    for (int64_t i = 0; i < count * conv.repeat; ++i) {
      to[i / conv.repeat * conv.depthwise_stride + i % conv.repeat * out + channel] = codes_[i / conv.repeat];
    }
  }
  if (conv.winograd) {
    transform_weights(rows_.data(), row_stride, lanes, layer.depth(), *conv.winograd, reinterpret_cast<int16_t*>(to));
  } else if (!conv.is_depthwise) {
    interleave_rows(rows_.data(), row_stride, lanes, row, *conv.kernel, to);
  }
}

// ---- All layers ---------------------------------------------------------------------------------------------------

// What the whole PackedConv follows from, and the bound on its results.
auto key_of(const ConvData& data, const Activation& in, const Activation& out, const Activation* residual) {
  const Window& window = data.window;
  return std::make_tuple(data.codes, data.bits, data.channels(), data.groups, window.kernel[0], window.kernel[1],
                         window.stride[0], window.stride[1], window.dilation[0], window.dilation[1], in.c, in.row_pitch,
                         in.zero_point, out.type, residual ? residual->type : Dtype::i32, data.multiplier, data.bias,
                         data.residual_multiplier, data.inner.has_value());
}

// What the panels follow from: all but the strides of the image and the constants. The kernel follows from the codes.
auto key_of_weights(const Layer& layer) {
  const ConvData& data = layer.data;
  return std::make_tuple(data.codes, data.bits, data.channels(), data.groups, layer.depth(), data.window.kernel[0],
                         data.window.kernel[1], merges_rows(layer), layer.conv->is_depthwise, layer.conv->repeat,
                         layer.conv->lanes.empty(), layer.conv->winograd);
}

// The layers of a program, lowered, in the order of their first nodes, and which of them each step has.
struct Layers {
  std::vector<Layer> all;
  std::vector<size_t> of_step;

  bool has_panels(size_t i) const { return all[i].weights == i; }
};

Layers layers_of(const ModelFile& file, Footprint* footprint, const Program& program) {
  Layers layers;
  std::map<decltype(key_of(std::declval<ConvData>(), std::declval<Activation>(), std::declval<Activation>(), nullptr)),
           size_t>
      known;
  std::map<decltype(key_of_weights(std::declval<Layer>())), size_t> known_weights;
  for (const Step& step : program.steps) {
    const ConvData* data = conv_of(*step.node);
    layers.of_step.push_back(layers.all.size());
    if (!data) continue;
    const Activation& in = program.activations[step.inputs[0]];
    const Activation& out = program.activations[step.output];
    const Activation* residual = step.node->has_residual ? &program.activations[step.inputs[1]] : nullptr;
    const auto found = known.emplace(key_of(*data, in, out, residual), layers.all.size());
    layers.of_step.back() = found.first->second;
    if (!found.second) continue;
    // cell_offset, panel_channel, sums
    footprint->add(4 * static_cast<uint64_t>(data->window.kernel[0] * data->window.kernel[1] + 3 * data->channels()));
    const std::string where = place_of(*step.node, program.graph.members[step.member], file);
    layers.all.push_back({*step.node, *data, in, out, residual, where});
    Layer& layer = layers.all.back();
    lower(layer, *program.kernels, program.form);
    layer.weights = known_weights.emplace(key_of_weights(layer), layers.all.size() - 1).first->second;
  }
  return layers;
}

// What a layer takes beyond its direct form: U, 8 times the bytes of codes of 8 bits, and what each thread needs for a
// block of patches.
uint64_t winograd_bytes(const Layer& layer, int threads) {
  constexpr int64_t kImages = 64;  // of a chunk, at most
  const WinogradKernel& kernel = *layer.conv->winograd;
  const int64_t panels = (layer.channels() + kernel.nr - 1) / kernel.nr;
  const size_t u_bytes = panels * winograd_panel_bytes(kernel, layer.depth());
  const int64_t patches = patches_of(kernel, layer.out).count(kImages);
  const int64_t block = patches_per_block(kernel, layer.in.c, u_bytes, patches);
  return u_bytes + static_cast<uint64_t>(threads) * winograd_scratch(kernel, layer.in.c, block).bytes;
}

// Keeps the Winograd form of as many layers as fit the memory, in their order.
void limit_winograd(const Footprint& footprint, int threads, Layers* layers) {
  uint64_t all = 0;
  for (size_t i = 0; i < layers->all.size(); ++i) {
    const Sizes sizes = sizes_of(layers->all[i]);
    all += 3 * sizes.constant + (layers->has_panels(i) ? sizes.weights : 0);
  }
  for (size_t i = 0; i < layers->all.size(); ++i) {
    const Layer& layer = layers->all[i];
    if (!layer.conv->winograd || !layers->has_panels(i)) continue;
    const uint64_t more = winograd_bytes(layer, threads);
    if (footprint.is_small(all + more)) {
      all += more;
    } else {
      layer.conv->winograd = nullptr;
      layer.conv->why_direct = "no memory for Winograd";
    }
  }
}

// Gives every layer its constants and its place in one buffer, which it returns. The kernels are chosen.
AlignedBuffer allocate(Footprint* footprint, Layers* layers) {
  size_t bytes = 0;
  std::vector<Sizes> sizes;
  for (size_t i = 0; i < layers->all.size(); ++i) {
    Layer& layer = layers->all[i];
    const Layer& first = layers->all[layer.weights];
    layer.conv->kernel = first.conv->kernel;
    layer.conv->winograd = first.conv->winograd;
    layer.conv->why_direct = first.conv->why_direct;
    if (layer.conv->winograd) become_winograd(layer);
    layer.conv->weight_offset = layers->has_panels(i) ? bytes : first.conv->weight_offset;
    sizes.push_back(sizes_of(layer));
    const size_t weights = layers->has_panels(i) ? sizes.back().weights : 0;
    footprint->add(weights + 3 * sizes.back().constant);
    bytes += weights;
  }
  for (size_t i = 0; i < layers->all.size(); ++i) {
    Layer& layer = layers->all[i];
    for (AlignedBuffer* constant : {&layer.conv->comp, &layer.conv->multiplier, &layer.conv->bias}) {
      *constant = AlignedBuffer(sizes[i].constant);
    }
    if (layers->has_panels(i)) layer.sums.resize(layer.channels());
  }
  return AlignedBuffer(bytes);
}

// Calls work(packer, i) for i below `count`, on up to `threads` threads with a packer each.
template <class Work>
void for_each(const ModelFile& file, const AlignedBuffer& weights, int threads, size_t count, const Work& work) {
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  // Another thread pays from about a megabyte, 0.5 ms, on.
  const int useful = static_cast<int>(std::min<size_t>(threads, 1 + (file.bytes() >> 20)));
  ThreadPool::shared().run(useful, [&](int, int) {
    try {
      Packer packer(file, weights.data());
      for (size_t i = next++; i < count; i = next++) work(packer, i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      error = std::current_exception();
      next = count;
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace

void pack_weights(const ModelFile& file, Footprint* footprint, Program* program) {
  Layers layers = layers_of(file, footprint, *program);
  std::vector<Layer*> with_panels;
  for (size_t i = 0; i < layers.all.size(); ++i) {
    if (layers.has_panels(i)) with_panels.push_back(&layers.all[i]);
  }
  for_each(file, program->weights, program->threads, with_panels.size(),
           [&](Packer& packer, size_t i) { packer.choose_kernel(*program->kernels, program->form, *with_panels[i]); });
  limit_winograd(*footprint, program->threads, &layers);
  program->weights = allocate(footprint, &layers);
  std::vector<std::pair<Layer*, int64_t>> panels;
  for (Layer* layer : with_panels) {
    for (int64_t panel = 0; panel < layer->conv->panels; ++panel) panels.emplace_back(layer, panel);
  }
  for_each(file, program->weights, program->threads, panels.size(),
           [&](Packer& packer, size_t i) { packer.pack_panel(panels[i].second, panels[i].first); });
  for (const Layer& layer : layers.all) {
    set_constants(layer, layers.all[layer.weights].sums);
    layer.conv->fits_s16 = layers.all[layer.weights].conv->fits_s16;
  }
  for (size_t i = 0; i < program->steps.size(); ++i) {
    if (conv_of(*program->steps[i].node)) program->steps[i].conv = layers.all[layers.of_step[i]].conv;
  }
}

}  // namespace qdeploy
