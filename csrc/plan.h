// What depends on the number of images: where each activation lies in the arena, and the tiles of each convolution.
#pragma once
#include <cstdint>
#include <vector>

#include "program.h"

namespace qdeploy {

struct Plan {
  int64_t batch;
  size_t arena_bytes;
  std::vector<size_t> offset;                // of each activation in the arena, bytes
  std::vector<std::vector<ConvTile>> tiles;  // of each step; empty where no conv kernel runs
};

// keep_all: every activation has memory of its own, so that each can be read after the run (taps).
Plan make_plan(const Program& program, int64_t batch, bool keep_all);

// Bytes of arena that one image takes.
size_t arena_bytes_per_image(const Program& program);

}  // namespace qdeploy
