#include "chunk.h"

#include <cstring>

#include "ops/op.h"

namespace qdeploy {
namespace {

// Writes the zero point around this thread's rows of `activation`; the corners and full rows go with the first and last
// row.
void fill_border(const Chunk& chunk, int activation, Share share) {
  const Activation& a = chunk.program.activations[activation];
  if (a.border[0] + a.border[1] + a.border[2] + a.border[3] == 0) return;
  uint8_t* base = chunk.u8_at(activation);
  const Range rows = slice(chunk.images * a.h, share);
  const int64_t left = a.border[1] * a.c, right = a.border[3] * a.c, width = a.w * a.c;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* pixels = base + a.row_offset(row);
    memset(pixels - left, a.zero_point, left);
    memset(pixels + width, a.zero_point, right);
    uint8_t* row_start = pixels - left;
    if (row % a.h == 0) memset(row_start - a.border[0] * a.row_pitch, a.zero_point, a.border[0] * a.row_pitch);
    if (row % a.h == a.h - 1) memset(row_start + a.row_pitch, a.zero_point, a.border[2] * a.row_pitch);
  }
}

// One table of 256 codes per channel. By value: a stored byte might change anything that is referred to.
void quantize_raw(const uint8_t* from, int64_t pixels, int64_t channels, const uint8_t* tables, uint8_t* to) {
  for (int64_t x = 0; x < pixels; ++x) {
    for (int64_t c = 0; c < channels; ++c) *to++ = tables[c * 256 + *from++];
  }
}

template <typename T>
void copy_out_as(const Activation& a, int64_t images, const T* from, T* to) {
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t c = 0; c < a.c; ++c) {
      for (int64_t y = 0; y < a.h; ++y) {
        const T* row = from + image * a.image_pitch + a.origin + y * a.row_pitch + c;
        for (int64_t x = 0; x < a.w; ++x) *to++ = row[x * a.c];
      }
    }
  }
}

}  // namespace

bool run_input(const Chunk& chunk, int activation, const uint8_t* preprocess_table, const void* images, bool is_u8,
               Share share) {
  const Activation& a = chunk.program.activations[activation];
  fill_border(chunk, activation, share);
  const Range rows = slice(chunk.images * a.h, share);
  bool finite = true;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* to = chunk.u8_at(activation) + a.row_offset(row);
    if (is_u8) {
      quantize_raw(static_cast<const uint8_t*>(images) + row * a.w * a.c, a.w, a.c, preprocess_table, to);
      continue;
    }
    const int64_t plane = a.h * a.w;
    QuantizeParams params = {};
    params.a = static_cast<const float*>(images) + row / a.h * a.c * plane + row % a.h * a.w;
    params.plane_stride = plane;
    params.pixels = static_cast<size_t>(a.w);
    params.channels = static_cast<size_t>(a.c);
    params.inv_scale = 1.0f / a.scale;
    params.zero_point = a.zero_point;
    params.c = to;
    params.c_stride = a.c;
    finite &= chunk.program.kernels->quantize(&params);
  }
  return finite;
}

void run_step(const Chunk& chunk, size_t index, Share share) {
  const Step& step = chunk.program.steps[index];
  fill_border(chunk, step.output, share);
  step.node->op->run({chunk, step, chunk.plan.tilings[index], share});
}

void copy_out(const Chunk& chunk, int activation, void* to) {
  const Activation& a = chunk.program.activations[activation];
  if (a.is_f32) {
    copy_out_as(a, chunk.images, chunk.f32_at(activation), static_cast<float*>(to));
  } else {
    copy_out_as(a, chunk.images, chunk.u8_at(activation), static_cast<uint8_t*>(to));
  }
}

}  // namespace qdeploy
