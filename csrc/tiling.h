// How a convolution is cut: its output pixels into the tiles of its kernel, tiles and panels into the parts of threads.
#pragma once
#include <vector>

#include "program.h"
#include "share.h"

namespace qdeploy {

// The tiles of a step that has a convolution kernel, for so many images.
std::vector<ConvTile> make_tiles(const Program& program, const Step& step, int64_t images);

// One thread's panels and tiles: all its panels for tiles_per_block tiles, then all of them for the next.
struct ConvPart {
  Range tiles, panels;
  int64_t tiles_per_block;
};
ConvPart part_of(const Program& program, const Step& step, size_t tiles, Share share);

// What the threads share out: "tiles" or "channels" of convolutions, "rows" of the rest.
const char* split_of(const Step& step, size_t tiles, int threads);

}  // namespace qdeploy
