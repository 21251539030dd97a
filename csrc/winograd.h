// The Winograd form of a convolution (docs/kernels.md): which layers take it, its weights, and its pieces. The kernels
// are in ukernels.h, how a step runs them in ops/winograd.cc.
#pragma once
#include <cstdint>
#include <string>

#include "program.h"

namespace qdeploy {

struct ConvData;

// The form by that name: "", "direct", "winograd_4x4" or "winograd_2x2". Throws InputError for others.
ConvForm conv_form(const std::string& name);

// The kernel that a layer of this shape takes where its codes allow that; null: direct. `direct` is the kernel that it
// would take otherwise.
const WinogradKernel* winograd_for(const ConvData& data, const Activation& in, const Activation& out,
                                   const ConvKernel& direct, const Kernels& kernels, ConvForm form);

// While the magnitudes of a channel's codes add up to no more, its accumulators stay below 2^29.
constexpr int32_t kWinogradMagnitudes = (1 << 29) / 255;

// Channels of a group as the products count them, and the bytes of one panel.
int32_t winograd_depth(int64_t depth);
size_t winograd_panel_bytes(const WinogradKernel& kernel, int64_t depth);

// One panel: `lanes` output channels, each a row of 9 * depth codes. What has no code is zero.
void transform_weights(const int8_t* rows, int64_t row_stride, int64_t lanes, int64_t depth,
                       const WinogradKernel& kernel, int16_t* u);

// The patches of a convolution, numbered through all images.
struct Patches {
  int64_t down, across;  // of an image
  int64_t count(int64_t images) const { return images * down * across; }
};
Patches patches_of(const WinogradKernel& kernel, const Activation& out);

// Patches whose V lies there at once: all panels for one block, then for the next.
int64_t patches_per_block(const WinogradKernel& kernel, int64_t channels, size_t u_bytes, int64_t patches);

// What one thread needs for a block: where V, M and a patch at the edge lie, in bytes, and how V and M are laid out.
struct WinogradScratch {
  int64_t patches_per_run;  // whose M lies there at once: under a panel, one run of the block after the other
  ptrdiff_t v_chunk_stride, v_position_stride, v_run_stride, m_position_stride;  // elements
  size_t m, edge, bytes;                                                         // V is at 0
};
WinogradScratch winograd_scratch(const WinogradKernel& kernel, int64_t channels, int64_t patches);

}  // namespace qdeploy
