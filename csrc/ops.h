// Runs one step of a program on one chunk of images: each function does the share of thread t of n.
#pragma once
#include <cstdint>

#include "plan.h"
#include "program.h"

namespace qdeploy {

// One thread's part in a run.
struct Share {
  int thread, threads;
};

// Some images of a batch: where `images` of them from `first` on lie.
struct Chunk {
  const Program& program;
  const Plan& plan;
  uint8_t* arena;
  int64_t first, images;
};

// Quantizes `images` (f32 NCHW or u8 NHWC, already at this chunk's first image) into an input activation. Returns false
// if this share holds NaN or infinity.
bool run_input(const Chunk& chunk, int activation, const std::vector<uint8_t>& preprocess_table, const void* images,
               bool is_u8, Share share);

void run_step(const Chunk& chunk, size_t step, Share share);

// Copies an activation to a dense array, channels first.
void copy_out(const Chunk& chunk, int activation, void* to);

// How thread shares are cut: "tiles" or "channels" for convolutions, "rows" for the rest.
const char* split_of(const Chunk& chunk, size_t step, int threads);

}  // namespace qdeploy
