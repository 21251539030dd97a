#include "chunk.h"

#include <cstring>

#include "lookup.h"
#include "ops/op.h"

namespace qdeploy {
namespace {

// Writes the zero point around this thread's rows of `activation`; the corners and full rows go with the first and last
// row.
void fill_border(const Chunk& chunk, int activation, Share share) {
  const Activation& a = chunk.plan.activations[activation];
  if (!a.has_border()) return;  // only what a convolution reads has one: u8
  uint8_t* base = chunk.at(activation);
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

template <typename T>
void copy_out_as(const Chunk& chunk, int activation, const Caller& to) {
  const Activation& a = chunk.plan.activations[activation];
  const T* from = reinterpret_cast<const T*>(chunk.at(activation)) + a.origin;
  for (int64_t image = 0; image < chunk.images; ++image, from += a.image_pitch) {
    T* out = static_cast<T*>(to.data) + to.image(image);
    if (a.is_tokens) {
      memcpy(out, from, a.elements() * sizeof(T));
      continue;
    }
    for (int64_t c = 0; c < a.c; ++c) {
      for (int64_t y = 0; y < a.h; ++y) {
        const T* row = from + y * a.row_pitch + c;
        for (int64_t x = 0; x < a.w; ++x) *out++ = row[x * a.c];
      }
    }
  }
}

// Numbers of one row of the input.
bool quantize_row(const Chunk& chunk, const Activation& a, const float* image, int64_t row, uint8_t* to) {
  QuantizeParams params = {};
  params.inv_scale = 1.0f / a.scale;
  params.zero_point = a.zero_point;
  params.c = to;
  if (a.is_tokens) {  // D numbers in a row, as those of a channel of an image
    params.a = image + row * a.c;
    params.plane_stride = params.c_stride = 1;
    params.pixels = static_cast<size_t>(a.c);
    params.channels = 1;
  } else {
    params.a = image + row * a.w;
    params.plane_stride = a.h * a.w;
    params.pixels = static_cast<size_t>(a.w);
    params.channels = static_cast<size_t>(a.c);
    params.c_stride = a.c;
  }
  return chunk.program.kernels->quantize(&params);
}

}  // namespace

bool run_input(const Chunk& chunk, int activation, const uint8_t* preprocess_table, const Caller& images, bool is_u8,
               Share share) {
  const Activation& a = chunk.plan.activations[activation];
  fill_border(chunk, activation, share);
  const Range rows = slice(chunk.images * a.h, share);
  bool finite = true;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* to = chunk.at(activation) + a.row_offset(row) * a.bytes();
    const int64_t image = images.image(row / a.h), y = row % a.h;
    if (a.type == Dtype::i32) {
      memcpy(to, static_cast<const int32_t*>(images.data) + image + y, sizeof(int32_t));
    } else if (is_u8) {
      const uint8_t* pixels = static_cast<const uint8_t*>(images.data) + image + y * a.w * a.c;
      look_up_channels(a.w, a.c, preprocess_table, pixels, to);
    } else {
      finite &= quantize_row(chunk, a, static_cast<const float*>(images.data) + image, y, to);
    }
  }
  return finite;
}

void run_step(const Chunk& chunk, size_t index, Share share) {
  const Step& step = chunk.program.steps[index];
  fill_border(chunk, step.output, share);
  step.node->op->run({chunk, step, chunk.plan.tilings[index], share});
}

void copy_out(const Chunk& chunk, int activation, const Caller& to) {
  switch (chunk.plan.activations[activation].bytes()) {
    case 1:
      return copy_out_as<uint8_t>(chunk, activation, to);
    case 2:
      return copy_out_as<int16_t>(chunk, activation, to);
    default:
      return copy_out_as<float>(chunk, activation, to);
  }
}

}  // namespace qdeploy
