// How a convolution is cut: its output pixels into the tiles of its kernel, tiles and panels into the parts of threads.
#pragma once
#include <vector>

#include "program.h"
#include "share.h"

namespace qdeploy {

// All panels run for one block of tiles, then all of them for the next.
struct Tiling {
  std::vector<ConvTile> tiles;  // empty: the step has no convolution kernel
  int64_t tiles_per_block = 0;  // 0: all of them
  int64_t patches = 0;          // of the Winograd form, instead of tiles; there are blocks of patches then
};
// `activations` are the program's, or a plan's.
Tiling make_tiling(const Activations& activations, const Step& step, int64_t images);

// The memory of that, at most.
uint64_t tiling_bytes(const Activations& activations, const Step& step, int64_t images);

// What one thread computes of a step: some of its tiles under all panels, or all tiles under some of the panels.
struct ConvPart {
  Range tiles, panels;
};
ConvPart part_of(const Step& step, const Tiling& tiling, Share share);

// What the threads share out: "tiles", "patches" or "channels" of convolutions, "rows" of the rest.
const char* split_of(const Step& step, const Tiling& tiling, int threads);

}  // namespace qdeploy
