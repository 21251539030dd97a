#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "errors.h"

namespace qdeploy {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t codes_per_channel(const Node& node, const Activation& in) {
  return in.c / node.groups * node.window.kernel[0] * node.window.kernel[1];
}

int64_t output_channels(const Node& node) { return static_cast<int64_t>(node.bias.size()); }

struct Sums {
  int32_t codes, magnitudes;  // below 2^31 / 255: the reader checked it
};

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

// The sum of one channel's codes; checks that no result can leave the range that the kernels convert exactly.
int32_t check_channel(const Node& node, int64_t channel, const int8_t* codes, int64_t count, bool f32_output,
                      const std::string& where) {
  const Sums sums = sums_of(codes, count);
  const double largest = 255.0 * sums.magnitudes * std::fabs(node.multiplier[channel]) + std::fabs(node.bias[channel]) +
                         255.0 * std::fabs(node.residual_multiplier);
  const double limit = f32_output ? 1.2676506002282294e30 : 1073741824.0;  // 2^100, 2^30
  if (!(largest < limit)) {
    throw ModelError("expected results below " + std::to_string(limit) + ", got up to " + std::to_string(largest) +
                     " in channel " + std::to_string(channel) + " - at " + where);
  }
  return sums.codes;
}

void set_channel(const Node& node, const Activation& in, int64_t channel, int32_t sum, PackedConv* conv) {
  const int32_t a_offset = conv->kernel ? conv->kernel->a_offset : 0;
  for (int64_t i = 0; i < conv->repeat; ++i) {
    const int64_t at = i * output_channels(node) + channel;
    reinterpret_cast<int32_t*>(conv->comp.data())[at] = (a_offset - in.zero_point) * sum;
    reinterpret_cast<float*>(conv->scale.data())[at] = node.multiplier[channel];
    reinterpret_cast<float*>(conv->bias.data())[at] = node.bias[channel];
  }
}

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
  const auto pixel = [&](int64_t i) {  // where the channels of pixel i of the kernel lie
    return ordered + (merged ? i / kw * conv.k + i % kw * in.c : i * conv.k) + first_byte;
  };
  const int64_t pixels = kh * kw;
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
#pragma GCC unroll 8
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

// Two words of 8 codes each, and the same as bytes: in vector registers of any instruction set.
typedef uint64_t Words __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(16)));
constexpr int64_t kCodesPerStep = 16;

// `count` codes that begin at bit `first_bit` of `packed`. Works in steps of kCodesPerStep codes: may read 8 bytes
// behind the last step and writes all of it.
void unpack_codes(const uint8_t* packed, int bits, int64_t first_bit, int64_t count, int8_t* codes) {
  packed += first_bit / 8;
  if (bits == 8) {
    memcpy(codes, packed, count);
    return;
  }
  const int8_t sign = static_cast<int8_t>(1 << (bits - 1));
  const uint64_t half = (uint64_t{1} << 4 * bits) - 1;                             // 4 codes of 8
  const uint64_t quarters = ((uint64_t{1} << 2 * bits) - 1) * 0x0000000100000001;  // 2 codes of 4, twice
  const uint64_t eighths = ((uint64_t{1} << bits) - 1) * 0x0001000100010001;       // 1 code of 2, four times
  const int shift = static_cast<int>(first_bit % 8), gap = 8 - bits;
  for (int64_t i = 0; i < count; i += kCodesPerStep, packed += 2 * bits) {
    uint64_t word[2];  // 8 codes and the bits before them fit a word: 8 * 7 + 7 < 64
    memcpy(&word[0], packed, 8);
    memcpy(&word[1], packed + bits, 8);
    Words x = {word[0], word[1]};
    x >>= shift;
    x = (x & half) | (x >> 4 * bits & half) << 32;
    x = (x & quarters) | (x & quarters << 2 * bits) << 2 * gap;
    x = (x & eighths) | (x & eighths << bits) << gap;
    const Bytes extended = (reinterpret_cast<Bytes>(x) ^ sign) - sign;
    memcpy(codes + i, &extended, sizeof extended);
  }
}

// Neighbouring pixels are neighbouring bytes where the stride is 1: a few of them at once fill the vectors of kMaxNr
// lanes, of which 32 channels alone would use half. Weights and constants then follow each other that many times.
int64_t depthwise_repeat(const Node& node) {
  const int64_t out = output_channels(node);
  for (int64_t repeat = 1; repeat <= 8 && node.window.stride[1] == 1; repeat *= 2) {
    if (out * repeat % kMaxNr == 0) return repeat;
  }
  return 1;
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

int64_t depthwise_stride(const Node& node, const PackedConv& conv) {
  return round_up(output_channels(node) * conv.repeat, kMaxNr);
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
  if (conv->is_depthwise) {
    conv->repeat = depthwise_repeat(node);
  } else {
    const bool grouped = fits_grouped(node, depth, out / node.groups, kernels.grouped) && !f32_output;
    conv->kernel = grouped ? &kernels.grouped : &kernels.conv[node.used_bits];
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
  }
}

void size_conv(const Node& node, const Activation& in, PackedConv* conv) {
  const int64_t out = output_channels(node), taps = static_cast<int64_t>(conv->tap_offset.size());
  size_t channels = static_cast<size_t>(depthwise_stride(node, *conv));
  if (!conv->is_depthwise) {
    const ConvKernel& kernel = *conv->kernel;
    const int64_t element = kernel.format == WeightFormat::s8x4 ? 1 : 2;
    conv->panel_bytes = static_cast<size_t>(round_up(taps * conv->k * kernel.nr * element, 64));
    channels = static_cast<size_t>(conv->panels * kernel.nr);
    // Panels outermost when the input stays in L2, else 56 pixels under all panels: 16.2 ms instead of 16.65 and 18.3
    // with one rule for all layers of ResNet-50, in the prototype of this engine.
    const bool pointwise = node.window.kernel[0] * node.window.kernel[1] == 1;
    const bool many_outputs = pointwise && out > in.c, large_input = pointwise && in.c * in.h * in.w > 256 * 1024;
    const int64_t tile = kernel.mr * kernel.groups;
    conv->tiles_per_block = many_outputs || large_input ? static_cast<size_t>((56 + tile - 1) / tile) : 0;
  }
  conv->comp = AlignedBuffer(channels * 4);
  conv->scale = AlignedBuffer(channels * 4);
  conv->bias = AlignedBuffer(channels * 4);
}

size_t packed_bytes(const PackedConv& conv, const Node& node) {
  const size_t stride = static_cast<size_t>(depthwise_stride(node, conv));
  const size_t bytes = conv.is_depthwise ? conv.tap_offset.size() * stride : conv.panels * conv.panel_bytes;
  return (bytes + 63) / 64 * 64;
}

// The bytes of the file that hold these bits, with 8 more to read behind them.
const uint8_t* Packer::read_bits(uint64_t offset, int64_t first_bit, int64_t bits) {
  const int64_t begin = first_bit / 8, end = (first_bit + bits + 7) / 8;
  const size_t slack = kCodesPerStep + 8;  // what unpack_codes reads behind the last code
  if (packed_.size() < end - begin + slack) packed_.resize(end - begin + slack);
  file_.read(offset + begin, static_cast<size_t>(end - begin), packed_.data());
  return packed_.data();
}

void Packer::choose_kernel(const Node& node, const Activation& in, const Kernels& kernels, PackedConv* conv) {
  if (conv->is_depthwise || !conv->lanes.empty()) return;
  const ConvKernel *kernel = &kernels.conv[2], *widest = conv->kernel;
  while (kernel < widest && kernel->s16_steps == 0) ++kernel;
  const int64_t out = output_channels(node), count = codes_per_channel(node, in);
  codes_.resize(round_up(count, kCodesPerStep));
  rows_.resize(conv->tap_offset.size() * conv->k);
  for (int64_t channel = 0; channel < out && kernel < widest; ++channel) {
    const int64_t bit = channel * count * node.bits;
    unpack_codes(read_bits(node.codes, bit, count * node.bits), node.bits, bit % 8, count, codes_.data());
    order_channel(node, in, codes_.data(), channel, *conv, rows_.data());
    while (kernel < widest && !fits_s16(rows_.data(), *conv, *kernel)) ++kernel;
  }
  conv->kernel = kernel;
}

void Packer::pack_panel(const Node& node, const Activation& in, bool f32_output, int64_t panel,
                        const std::string& where, PackedConv* conv) {
  const int64_t out = output_channels(node), count = codes_per_channel(node, in);
  const int64_t nr = conv->is_depthwise ? out : conv->kernel->nr;
  const int64_t first = panel * nr, lanes = std::min(nr, out - first);
  const int64_t row = static_cast<int64_t>(conv->tap_offset.size()) * conv->k;
  const int64_t row_stride = round_up(row, 128) + 64;  // an odd number of cache lines: rows do not share a cache set
  codes_.resize(round_up(count, kCodesPerStep));
  rows_.resize(lanes * row_stride);
  const uint8_t* packed = read_bits(node.codes, first * count * node.bits, lanes * count * node.bits);
  uint8_t* to = weights_ + conv->weight_offset + panel * conv->panel_bytes;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t channel = first + lane;
    unpack_codes(packed, node.bits, first * count * node.bits % 8 + lane * count * node.bits, count, codes_.data());
    set_channel(node, in, channel, check_channel(node, channel, codes_.data(), count, f32_output, where), conv);
    if (conv->is_depthwise) {
      for (int64_t i = 0; i < count * conv->repeat; ++i)
        to[i / conv->repeat * depthwise_stride(node, *conv) + i % conv->repeat * out + channel] =
            codes_[i / conv->repeat];
      continue;
    }
    order_channel(node, in, codes_.data(), channel, *conv, rows_.data() + lane * row_stride);
  }
  if (!conv->is_depthwise) interleave_rows(rows_.data(), row_stride, lanes, row, *conv->kernel, to);
}

}  // namespace qdeploy
