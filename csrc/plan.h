// What depends on the number of images and the length of texts: where each activation lies in the arena, and the tiles of each convolution.
#pragma once
#include <cstdint>
#include <vector>

#include "program.h"
#include "tiling.h"

namespace qdeploy {

// Consecutive steps, done for one image after the other, or for all images at once.
struct Pass {
  size_t begin, end;
  bool together;
};

// In a batch, large activations should stay in the caches, and large weights should be read once for all images. So the
// steps up to the last convolution whose activations outweigh its weights run image by image, all in the memory of one
// image, and the rest of a member runs for all images together.
struct Plan {
  int64_t batch;
  Activations activations;  // those of the program, for texts of one length
  size_t arena_bytes;
  size_t scratch, scratch_bytes;  // in the arena: where the memory of thread 0 lies, and how much each has of its own
  std::vector<Pass> passes;
  std::vector<bool> for_all;    // of each activation: memory for every image of the batch, or for one
  std::vector<size_t> offset;   // of each activation in the arena, bytes
  std::vector<Tiling> tilings;  // of each step, for the images of its pass
};

// length: of all texts of the batch, which have no rows beyond it; Program::longest where the input is numbers.
// keep_all: every activation has memory of its own, so that each can be read after the run (taps).
Plan make_plan(const Program& program, int64_t batch, int64_t length, bool keep_all);

// The memory of make_plan(program, batch, Program::longest, keep_all), before any of it is taken.
struct PlanBytes {
  uint64_t arena;
  uint64_t others;  // tiles, and what combines the members of an ensemble

  uint64_t all() const { return arena + others; }
};
PlanBytes plan_bytes(const Program& program, int64_t batch, bool keep_all);

}  // namespace qdeploy
