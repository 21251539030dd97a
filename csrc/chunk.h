// Some images of a batch on their way through a program: each function does the share of one thread.
#pragma once
#include <cstdint>
#include <vector>

#include "plan.h"
#include "program.h"
#include "share.h"

namespace qdeploy {

// Where `images` images from `first` on lie.
struct Chunk {
  const Program& program;
  const Plan& plan;
  uint8_t* arena;
  int64_t first, images;

  // An activation of the first of these images.
  uint8_t* u8_at(int activation) const {
    const Activation& a = program.activations[activation];
    const int64_t skipped = plan.for_all[activation] ? first * a.image_pitch * (a.is_f32 ? 4 : 1) : 0;
    return arena + plan.offset[activation] + skipped;
  }
  // What this thread alone writes and reads.
  uint8_t* scratch(int thread) const { return arena + plan.scratch + thread * plan.scratch_bytes; }
  float* f32_at(int activation) const { return reinterpret_cast<float*>(u8_at(activation)); }
};

// Quantizes `images` (f32 NCHW or u8 NHWC, already at this chunk's first image) into an input activation. Returns false
// if this share holds NaN or infinity.
bool run_input(const Chunk& chunk, int activation, const uint8_t* preprocess_table, const void* images, bool is_u8,
               Share share);

void run_step(const Chunk& chunk, size_t step, Share share);

// Copies an activation to a dense array, channels first.
void copy_out(const Chunk& chunk, int activation, void* to);

}  // namespace qdeploy
