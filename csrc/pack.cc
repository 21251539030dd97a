#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "errors.h"

namespace qdeploy {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t codes_per_channel(const Node& node, const Activation& in) {
  return in.c / node.groups * node.window.kernel[0] * node.window.kernel[1];
}

int64_t output_channels(const Node& node) { return static_cast<int64_t>(node.bias.size()); }

// The width that all codes of a node fit in; an 8-bit layer that uses 7 bits runs with the faster kernel.
int used_bits(const Node& node, int64_t total) {
  if (node.bits < 8) return node.bits;
  const int8_t* codes = reinterpret_cast<const int8_t*>(node.codes);
  const auto [low, high] = std::minmax_element(codes, codes + total);
  int bits = 2;
  while (*low < -(1 << (bits - 1)) || *high > (1 << (bits - 1)) - 1) ++bits;
  return bits;
}

// Sums of one channel's codes; checks that no result can leave the range that the kernels convert exactly.
int32_t check_channel(const Node& node, int64_t channel, const int8_t* codes, int64_t count, bool f32_output,
                      const std::string& where) {
  int32_t sum = 0, magnitude = 0;  // below 2^31 / 255: the reader checked it
  for (int64_t i = 0; i < count; ++i) {
    sum += codes[i];
    magnitude += codes[i] < 0 ? -codes[i] : codes[i];
  }
  const double largest = 255.0 * magnitude * std::fabs(node.multiplier[channel]) + std::fabs(node.bias[channel]) +
                         255.0 * std::fabs(node.residual_multiplier);
  const double limit = f32_output ? 1.2676506002282294e30 : 1073741824.0;  // 2^100, 2^30
  if (!(largest < limit)) {
    throw ModelError("expected results below " + std::to_string(limit) + ", got up to " + std::to_string(largest) +
                     " in channel " + std::to_string(channel) + " - at " + where);
  }
  return sum;
}

void set_channel(const Node& node, const Activation& in, int64_t channel, int32_t sum, PackedConv* conv) {
  const int32_t a_offset = conv->kernel ? conv->kernel->a_offset : 0;
  reinterpret_cast<int32_t*>(conv->comp.data())[channel] = (a_offset - in.zero_point) * sum;
  reinterpret_cast<float*>(conv->scale.data())[channel] = node.multiplier[channel];
  reinterpret_cast<float*>(conv->bias.data())[channel] = node.bias[channel];
}

// One channel of OIHW codes in the order in which a kernel walks through its activations: taps * k bytes, zeros where
// no channel of this group is read. A tap is a whole row of the kernel (byte = kx*C + c) or a single pixel (byte = c).
void order_channel(const Node& node, const Activation& in, const int8_t* codes, int64_t channel, const PackedConv& conv,
                   int8_t* ordered) {
  const int64_t kh = node.window.kernel[0], kw = node.window.kernel[1], depth = in.c / node.groups;
  const int64_t group = channel / (output_channels(node) / node.groups);
  const bool whole_groups = !conv.lanes.empty();
  const int64_t first_byte = whole_groups ? 0 : group * depth - conv.panel_channel[channel / conv.kernel->nr];
  const bool merged = static_cast<int64_t>(conv.tap_offset.size()) == kh;
  memset(ordered, 0, conv.tap_offset.size() * conv.k);
  for (int64_t ky = 0; ky < kh; ++ky) {
    for (int64_t kx = 0; kx < kw; ++kx) {
      int8_t* to = ordered + (merged ? ky * conv.k + kx * in.c : (ky * kw + kx) * conv.k) + first_byte;
      const int8_t* from = codes + ky * kw + kx;
      for (int64_t c = 0; c < depth; ++c) to[c] = from[c * kh * kw];
    }
  }
}

// Whether a kernel is exact for these codes of one channel, by ConvKernel::s16_steps.
bool fits_s16(const int8_t* ordered, const PackedConv& conv, const ConvKernel& kernel) {
  if (kernel.s16_steps == 0 || kernel.nr != conv.kernel->nr) return false;
  for (size_t tap = 0; tap < conv.tap_offset.size(); ++tap, ordered += conv.k) {
    for (int32_t begin = 0; begin < conv.k; begin += 4 * kernel.s16_steps) {
      const int32_t end = std::min(conv.k, begin + 4 * kernel.s16_steps);
      for (int32_t half = begin; half < begin + 4; half += 2) {
        int sum = 0, positive = 0;
        for (int32_t i = half; i < end; i += 4) {
          sum += ordered[i] + ordered[i + 1];
          positive += std::max<int>(ordered[i], 0) + std::max<int>(ordered[i + 1], 0);
        }
        if (std::max(positive, positive - sum) > 128) return false;
      }
    }
  }
  return true;
}

// The kernels of fewer bits are faster, and most of the codes that training gives are far smaller than the largest one:
// where the sums of every channel fit, a layer runs with a kernel of fewer bits than it has, just as exactly.
const ConvKernel* quickest_kernel(const Node& node, const Activation& in, const Kernels& kernels,
                                  const PackedConv& conv) {
  const int64_t out = output_channels(node), count = codes_per_channel(node, in);
  const ConvKernel* kernel = &kernels.conv[2];
  std::vector<int8_t> codes(count), ordered(conv.tap_offset.size() * conv.k);
  for (int64_t channel = 0; channel < out && kernel < conv.kernel; ++channel) {
    unpack_codes(node.codes, node.bits, out * count, channel * count, count, codes.data());
    order_channel(node, in, codes.data(), channel, conv, ordered.data());
    while (kernel < conv.kernel && !fits_s16(ordered.data(), conv, *kernel)) ++kernel;
  }
  return kernel;
}

// Spreads a channel over its lane of the panel.
void scatter_channel(const int8_t* ordered, int64_t count, int64_t lane, const ConvKernel& kernel, uint8_t* panel) {
  if (kernel.format == WeightFormat::s8x4) {
    for (int64_t i = 0; i < count; i += 4) memcpy(panel + i * kernel.nr + lane * 4, ordered + i, 4);
    return;
  }
  for (int64_t i = 0; i < count; i += 2) {
    const int16_t pair[2] = {ordered[i], ordered[i + 1]};
    memcpy(panel + (i * kernel.nr + lane * 2) * 2, pair, 4);
  }
}

// A grouped kernel takes whole groups a panel, whose inputs lie in one window.
bool fits_grouped(const Node& node, int64_t depth, int64_t outputs, const ConvKernel& kernel) {
  return kernel.qu8 && node.groups > 1 && depth % 4 == 0 && depth <= 16 && kernel.nr % outputs == 0 &&
         kernel.nr / outputs * depth <= kGroupedWindow;
}

std::vector<int32_t> grouped_lanes(int64_t depth, int64_t outputs, int64_t nr) {
  std::vector<int32_t> lanes;
  for (int64_t step = 0; step < depth / 4; ++step) {
    for (int64_t n = 0; n < nr; ++n) lanes.push_back(static_cast<int32_t>(n / outputs * (depth / 4) + step));
  }
  return lanes;
}

}  // namespace

void unpack_codes(const uint8_t* packed, int bits, int64_t total, int64_t begin, int64_t count, int8_t* codes) {
  if (bits == 8) {
    memcpy(codes, packed + begin, count);
    return;
  }
  const int64_t bytes = (total * bits + 7) / 8;
  const uint64_t ones = 0x0101010101010101, sign = ones << (bits - 1), code = (uint64_t{1} << bits) - 1;
  for (int64_t i = 0; i < count; i += 8) {  // 8 codes and the bits before them fit a word: 8 * 7 + 7 < 64
    const int64_t bit = (begin + i) * bits;
    uint64_t word = 0;
    memcpy(&word, packed + bit / 8, static_cast<size_t>(std::min<int64_t>(8, bytes - bit / 8)));
    word >>= bit % 8;
    uint64_t spread = 0;  // one code a byte
    for (int j = 0; j < 8; ++j) spread |= (word >> (j * bits) & code) << (j * 8);
    spread = (((spread ^ sign) | ones << 7) - sign) ^ ones << 7;  // extends the signs; the 128s stop the borrows
    memcpy(codes + i, &spread, static_cast<size_t>(std::min<int64_t>(8, count - i)));
  }
}

void lower_conv(const Node& node, const Activation& in, bool f32_output, const Kernels& kernels, PackedConv* conv) {
  const int64_t kh = node.window.kernel[0], kw = node.window.kernel[1];
  const int64_t out = output_channels(node), depth = in.c / node.groups;
  const int64_t row = node.window.dilation[0] * in.row_pitch;
  const int64_t column = node.window.dilation[1] * in.c;
  conv->is_depthwise = node.groups > 1 && depth == 1 && out == in.c && !node.has_residual && !f32_output;
  // A row of taps is one run of kw*C bytes: fewer zero weights than rounding C up to 4 at each tap, and longer inner
  // loops.
  const bool merged = !conv->is_depthwise && node.groups == 1 && column == in.c;
  for (int64_t ky = 0; ky < kh; ++ky) {
    for (int64_t kx = 0; kx < (merged ? 1 : kw); ++kx) {
      conv->tap_offset.push_back(static_cast<int32_t>(ky * row + kx * column));
    }
  }
  size_t channels = static_cast<size_t>(round_up(out, kMaxNr));
  if (!conv->is_depthwise) {
    const bool grouped = fits_grouped(node, depth, out / node.groups, kernels.grouped) && !f32_output;
    conv->kernel = grouped ? &kernels.grouped : &kernels.conv[used_bits(node, out * codes_per_channel(node, in))];
    const int64_t nr = conv->kernel->nr;
    if (grouped) conv->lanes = grouped_lanes(depth, out / node.groups, nr);
    conv->panels = (out + nr - 1) / nr;
    int64_t widest = merged ? kw * in.c : depth;
    for (int64_t panel = 0; panel < conv->panels; ++panel) {  // a panel reads all channels of the groups it touches
      const int64_t per_group = out / node.groups;
      const int64_t first = panel * nr / per_group * depth;
      const int64_t last = ((std::min(out, (panel + 1) * nr) - 1) / per_group + 1) * depth;
      conv->panel_channel.push_back(static_cast<int32_t>(first));
      if (!merged && !grouped) widest = std::max(widest, last - first);
    }
    conv->k = static_cast<int32_t>(round_up(widest, 4));
    for (int32_t& first : conv->panel_channel) {  // stay inside the pixel: over-reads must not exceed kOverread
      first = static_cast<int32_t>(std::max<int64_t>(0, std::min<int64_t>(first, in.c - conv->k)));
    }
    if (!grouped) conv->kernel = quickest_kernel(node, in, kernels, *conv);
    const int64_t element = conv->kernel->format == WeightFormat::s8x4 ? 1 : 2;
    conv->panel_bytes = static_cast<size_t>(round_up(conv->tap_offset.size() * conv->k * nr * element, 64));
    channels = static_cast<size_t>(conv->panels * nr);
    // Panels outermost when the input stays in L2, else 56 pixels under all panels: 16.2 ms instead of 16.65 and 18.3
    // with one rule for all layers of ResNet-50, in the prototype of this engine.
    const bool many_outputs = kh * kw == 1 && out > in.c;
    const bool large_input = kh * kw == 1 && in.c * in.h * in.w > 256 * 1024;
    const int64_t tile = conv->kernel->mr * conv->kernel->groups;
    conv->tiles_per_block = many_outputs || large_input ? static_cast<size_t>((56 + tile - 1) / tile) : 0;
  }
  conv->comp = AlignedBuffer(channels * 4);
  conv->scale = AlignedBuffer(channels * 4);
  conv->bias = AlignedBuffer(channels * 4);
}

size_t packed_bytes(const PackedConv& conv, const Node& node) {
  const size_t stride = static_cast<size_t>(round_up(output_channels(node), kMaxNr));
  const size_t bytes = conv.is_depthwise ? conv.tap_offset.size() * stride : conv.panels * conv.panel_bytes;
  return (bytes + 63) / 64 * 64;
}

void pack_panel(const Node& node, const Activation& in, bool f32_output, int64_t panel, const std::string& where,
                uint8_t* weights, PackedConv* conv) {
  const int64_t out = output_channels(node), count = codes_per_channel(node, in);
  const int64_t nr = conv->is_depthwise ? out : conv->kernel->nr;
  uint8_t* to = weights + conv->weight_offset + panel * conv->panel_bytes;
  std::vector<int8_t> codes(count), ordered(conv->tap_offset.size() * conv->k);
  for (int64_t channel = panel * nr; channel < std::min(out, (panel + 1) * nr); ++channel) {
    unpack_codes(node.codes, node.bits, out * count, channel * count, count, codes.data());
    set_channel(node, in, channel, check_channel(node, channel, codes.data(), count, f32_output, where), conv);
    if (conv->is_depthwise) {
      for (int64_t tap = 0; tap < count; ++tap) {
        to[tap * round_up(out, kMaxNr) + channel] = static_cast<uint8_t>(codes[tap]);
      }
      continue;
    }
    order_channel(node, in, codes.data(), channel, *conv, ordered.data());
    scatter_channel(ordered.data(), static_cast<int64_t>(ordered.size()), channel - panel * nr, *conv->kernel, to);
  }
}

}  // namespace qdeploy
