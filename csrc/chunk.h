// Some images of a batch on their way through a program: each function does the share of one thread.
#pragma once
#include <cstdint>
#include <vector>

#include "plan.h"
#include "program.h"
#include "share.h"

namespace qdeploy {

// Where `images` images from `first` on lie. A text is an image, too.
struct Chunk {
  const Program& program;
  const Plan& plan;
  uint8_t* arena;
  int64_t first, images;

  // An activation of the first of these images.
  uint8_t* at(int activation) const {
    const Activation& a = plan.activations[activation];
    const int64_t skipped = plan.for_all[activation] ? first * a.image_pitch * a.bytes() : 0;
    return arena + plan.offset[activation] + skipped;
  }
  // What this thread alone writes and reads.
  uint8_t* scratch(int thread) const { return arena + plan.scratch + thread * plan.scratch_bytes; }
};

// An array of the caller, of which the chunk has some images.
struct Caller {
  void* data;            // of the first image of the chunk, or, with `order`, of image 0
  const int64_t* order;  // the numbers of the chunk's images in the array; null: they follow each other
  int64_t pitch;         // from one to the next, in elements
  int64_t image(int64_t i) const { return (order ? order[i] : i) * pitch; }
};

// Quantizes images (f32 NCHW or u8 NHWC) into an input activation, or copies token ids. Returns false if this share
// holds NaN or infinity.
bool run_input(const Chunk& chunk, int activation, const uint8_t* preprocess_table, const Caller& images, bool is_u8,
               Share share);

void run_step(const Chunk& chunk, size_t step, Share share);

// Copies an activation to an array: images channels first, tokens as they are. Rows that a text does not have stay as
// they were.
void copy_out(const Chunk& chunk, int activation, const Caller& to);

}  // namespace qdeploy
