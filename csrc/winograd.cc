#include "winograd.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "ops/conv.h"

namespace qdeploy {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int32_t positions_of(const WinogradKernel& kernel) { return (kernel.m + 2) * (kernel.m + 2); }

// ---- The choice ---------------------------------------------------------------------------------------------------

// What the kernels compute. Panels and chunks must belong to one group.
bool fits(const ConvData& data, const Activation& in, const WinogradKernel& kernel) {
  const Window& window = data.window;
  const int64_t depth = in.c / data.groups, outputs = data.channels() / data.groups;
  const bool whole = data.groups == 1 || (depth % kWinogradChunk == 0 && outputs % kernel.nr == 0);
  return window.kernel[0] == 3 && window.kernel[1] == 3 && window.stride[0] == 1 && window.stride[1] == 1 &&
         window.dilation[0] == 1 && window.dilation[1] == 1 && whole;
}

// The time of both forms, counted in products of the Winograd kernel. The constants are those of Emerald Rapids with
// weights that no cache holds, as in a network; docs/kernels.md has the times, and what the rule makes of them.

// Products of the direct kernel in the time of one: vpdpbusd against vpdpwssd, and vpmaddubsw with so many sums in 16
// bits against vpmaddwd.
double speed_of(const ConvKernel& direct) {
  if (direct.format == WeightFormat::s16x2) return 0.93;
  switch (direct.s16_quads) {
    case 1:
      return 1.3;
    case 2:
      return 1.6;
    case 4:
      return 1.75;
    case 8:
      return 1.85;
    default:
      return 1.93;
  }
}

// Cycles that the transforms of a patch take, for a panel of channels.
constexpr double kInput4 = 210, kOutput4 = 400, kInput2 = 40, kOutput2 = 90;

// Cycles until the next weight of U is there: with few patches the multipliers wait. A small U stays in L2 between two
// calls of a small network.
constexpr double kCyclesFromMemory = 1, kCyclesFromL2 = 0.12;
constexpr double kSmallWeights = 256 << 10;

// Winograd must win by so much to be worth its memory.
constexpr double kGain = 0.9;

// Of one image, whole panels.
double cost_of(const ConvKernel& direct, const ConvData& data, const Activation& in, const Activation& out) {
  const int64_t depth = in.c / data.groups, outputs = round_up(out.c, direct.nr);
  return 9.0 * static_cast<double>(out.h * out.w * depth * outputs) / speed_of(direct);
}
double cost_of(const WinogradKernel& kernel, const ConvData& data, const Activation& in, const Activation& out) {
  const int64_t depth = winograd_depth(in.c / data.groups), outputs = round_up(out.c, kernel.nr);
  const double patches = static_cast<double>(patches_of(kernel, out).count(1));
  const double weights = static_cast<double>(positions_of(kernel) * depth * outputs);
  const double c = static_cast<double>(round_up(in.c, kernel.nr)), n = static_cast<double>(outputs);
  const double wait = weights > kSmallWeights ? kCyclesFromMemory : kCyclesFromL2;
  const double transforms = kernel.m == 4 ? kInput4 * c + kOutput4 * n : kInput2 * c + kOutput2 * n;
  return weights * std::max(patches, kernel.rate * wait) + patches * transforms / kernel.nr * kernel.rate;
}

// ---- Weights ------------------------------------------------------------------------------------------------------

// 8 numbers, in vector registers of any instruction set.
typedef uint16_t Lanes __attribute__((vector_size(16)));
constexpr int64_t kLanes = 8;

// u = G x, of 3 vectors
void transform(const Lanes (&x)[3], Lanes (&u)[6]) {
  const Lanes outer = x[0] + x[2], plus = outer + x[1], minus = outer - x[1], middle = x[1] << 1;
  u[0] = (x[0] << 4) - x[0];
  u[1] = (plus << 2) + plus;
  u[2] = (minus << 2) + minus;
  u[3] = x[0] + middle + (x[2] << 2);
  u[4] = (x[0] << 2) - middle + x[2];
  u[5] = (x[2] << 4) - x[2];
}
void transform(const Lanes (&x)[3], Lanes (&u)[4]) {
  u[0] = x[0] << 1;
  u[1] = x[0] + x[1] + x[2];
  u[2] = x[0] - x[1] + x[2];
  u[3] = x[2] << 1;
}

Lanes load_codes(const int8_t* codes) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
  Bytes bytes;
  memcpy(&bytes, codes, sizeof bytes);
  return reinterpret_cast<Lanes>(__builtin_convertvector(bytes, Shorts));
}

// U of 8 filters, whose tap t lies at codes[t * tap_stride]: that of position p to u + p * stride.
template <int kIn>
void transform_filters(const int8_t (*codes)[kLanes], int64_t tap_stride, int16_t* u, int64_t stride) {
  Lanes half[kIn][3];
  for (int x = 0; x < 3; ++x) {
    const Lanes column[3] = {load_codes(codes[x * tap_stride]), load_codes(codes[(3 + x) * tap_stride]),
                             load_codes(codes[(6 + x) * tap_stride])};
    Lanes sums[kIn];
    transform(column, sums);
    for (int i = 0; i < kIn; ++i) half[i][x] = sums[i];
  }
  for (int i = 0; i < kIn; ++i) {
    Lanes sums[kIn];
    transform(half[i], sums);
    for (int j = 0; j < kIn; ++j) memcpy(u + (i * kIn + j) * stride, &sums[j], sizeof sums[j]);
  }
}

// 8 input channels at a time of 8 output channels: their codes in the order of U, the transform, and from a buffer to
// the panel, whose positions lie far apart.
template <int kIn, int kPair>
void transform_panel(const int8_t* rows, int64_t row_stride, int64_t lanes, int64_t depth, int64_t nr, int16_t* u) {
  constexpr int64_t kVectors = kLanes;  // of the 8 x 8 filters, 8 each
  constexpr int64_t kPositions = kIn * kIn;
  const int64_t k = winograd_depth(depth);
  for (int64_t c = 0; c < depth; c += kLanes) {
    const int64_t channels = std::min(kLanes, depth - c);
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      int8_t codes[9][kVectors][kLanes] = {};
      for (int64_t i = 0; i < std::min(kLanes, lanes - lane); ++i) {
        const int8_t* from = rows + (lane + i) * row_stride + c * 9;
        for (int64_t j = 0; j < channels; ++j, from += 9) {
          int8_t* to = codes[0][0] + (j / kPair * kLanes + i) * kPair + j % kPair;
          for (int tap = 0; tap < 9; ++tap) to[tap * kVectors * kLanes] = from[tap];
        }
      }
      int16_t block[kPositions][kVectors * kLanes];
      for (int64_t v = 0; v < kVectors; ++v) {
        transform_filters<kIn>(codes[0] + v, kVectors, block[0] + v * kLanes, kVectors * kLanes);
      }
      for (int64_t p = 0; p < kPositions; ++p) {
        for (int64_t j = 0; j < kLanes; j += kPair) {
          memcpy(u + (p * k + c + j) * nr + lane * kPair, block[p] + j * kLanes, 2 * kLanes * kPair);
        }
      }
    }
  }
}

}  // namespace

ConvForm conv_form(const std::string& name) {
  if (name.empty()) return ConvForm::by_rule;
  if (name == "direct") return ConvForm::direct;
  if (name == "winograd_4x4") return ConvForm::winograd4;
  if (name == "winograd_2x2") return ConvForm::winograd2;
  throw InputError("expected direct, winograd_4x4 or winograd_2x2, got \"" + name.substr(0, 60) + "\" - at conv_form");
}

const WinogradKernel* winograd_for(const ConvData& data, const Activation& in, const Activation& out,
                                   const ConvKernel& direct, const Kernels& kernels, ConvForm form) {
  if (form == ConvForm::direct) return nullptr;
  if (form != ConvForm::by_rule) {
    const WinogradKernel& kernel = kernels.winograd[form == ConvForm::winograd2];
    return fits(data, in, kernel) ? &kernel : nullptr;
  }
  const WinogradKernel* best = nullptr;
  double least = kGain * cost_of(direct, data, in, out);
  for (const WinogradKernel& kernel : kernels.winograd) {
    if (kernel.rate == 0 || !fits(data, in, kernel) || cost_of(kernel, data, in, out) >= least) continue;
    best = &kernel;
    least = cost_of(kernel, data, in, out);
  }
  return best;
}

int32_t winograd_depth(int64_t depth) { return static_cast<int32_t>(round_up(depth, 8)); }

size_t winograd_panel_bytes(const WinogradKernel& kernel, int64_t depth) {
  return static_cast<size_t>(round_up(2 * positions_of(kernel) * winograd_depth(depth) * kernel.nr, 64));
}

void transform_weights(const int8_t* rows, int64_t row_stride, int64_t lanes, int64_t depth,
                       const WinogradKernel& kernel, int16_t* u) {
  const auto transform = kernel.m == 4 ? (kernel.pair == 2 ? transform_panel<6, 2> : transform_panel<6, 1>)
                                       : (kernel.pair == 2 ? transform_panel<4, 2> : transform_panel<4, 1>);
  transform(rows, row_stride, lanes, depth, kernel.nr, u);
}

// ---- Pieces -------------------------------------------------------------------------------------------------------

Patches patches_of(const WinogradKernel& kernel, const Activation& out) {
  return {(out.h + kernel.m - 1) / kernel.m, (out.w + kernel.m - 1) / kernel.m};
}

// V and M of a run stay in L2 beside the U that passes through: 512 KB, with AVX-512 1 MB or more. Whole groups of
// patches, and not too many: AVX512-VNNI takes 3.45 ms for 56x56x256 in VGG-16 with runs of 28, 3.6 with 14, and 3.2
// against 2.7 ms in a loop with 16; AVX2 takes 9.9 ms for 224x224x64 with 36, 9.6 with 12 or 24. Up to 16 patches are one
// run: U passes once.
int64_t patches_per_run(const WinogradKernel& kernel, int64_t channels, int64_t patches) {
  constexpr int64_t kOneRun = 16, kLeast = 12, kMost = 28;
  if (patches <= kOneRun) return patches;
  const int64_t run_bytes = (kernel.nr > 16 ? 640 : 256) << 10;
  const int64_t bytes = positions_of(kernel) * (2 * round_up(channels, kWinogradChunk) + 4 * kernel.nr);
  const int64_t fitting = std::min(kMost, run_bytes / bytes) / kernel.mr * kernel.mr;
  const int64_t most = std::max(round_up(kLeast, kernel.mr), fitting);
  const int64_t runs = (patches + most - 1) / most;
  return (patches + runs - 1) / runs;
}

// A large U passes once for all patches where their V is not much more than an L2: 28x28x512 in VGG-16 (AVX512-VNNI)
// takes 4.5 ms, 5.5 with one pass a run. 224x224x64, whose V is larger and U small, would take twice its time.
int64_t patches_per_block(const WinogradKernel& kernel, int64_t channels, size_t u_bytes, int64_t patches) {
  constexpr int64_t kMostV = 2 << 20, kLargeU = 6 << 20;
  const int64_t v_bytes = 2 * positions_of(kernel) * round_up(channels, kWinogradChunk) * patches;
  if (static_cast<int64_t>(u_bytes) >= kLargeU && v_bytes <= kMostV) return patches;
  return patches_per_run(kernel, channels, patches);
}

// The strides are odd numbers of cache lines: at a power of two, positions would share the sets of L1.
WinogradScratch winograd_scratch(const WinogradKernel& kernel, int64_t channels, int64_t patches) {
  const int64_t positions = positions_of(kernel);
  WinogradScratch scratch;
  scratch.patches_per_run = patches_per_run(kernel, channels, patches);
  const int64_t runs = (patches + scratch.patches_per_run - 1) / scratch.patches_per_run;
  const int64_t chunks = (channels + kWinogradChunk - 1) / kWinogradChunk;
  scratch.v_chunk_stride = scratch.patches_per_run * kWinogradChunk;
  scratch.v_position_stride = (chunks * scratch.patches_per_run | 1) * kWinogradChunk;
  scratch.v_run_stride = positions * scratch.v_position_stride;
  scratch.m_position_stride = (scratch.patches_per_run * kernel.nr / 16 | 1) * 16;
  scratch.m = static_cast<size_t>(2 * runs * scratch.v_run_stride);
  scratch.edge = scratch.m + static_cast<size_t>(4 * positions * scratch.m_position_stride);
  scratch.bytes = scratch.edge + static_cast<size_t>(round_up(positions * channels + kOverread, 64));
  return scratch;
}

}  // namespace qdeploy
