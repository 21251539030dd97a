// What is fixed when a model is loaded, for any batch: how each activation lies in memory, which kernel runs each node,
// and the weights packed for that kernel. One arena holds all packed weights in execution order, so that "the next
// panel" is also the first panel of the next layer.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "aligned.h"
#include "graph.h"
#include "ukernels.h"

namespace qdeploy {

// One image of an activation: dense NHWC inside a border that holds the zero point, written for convolutions with
// padding. Pitches and the origin (pixel (0, 0)) are in elements.
struct Activation {
  int64_t c, h, w;
  Dtype type;
  bool is_tokens;  // [T, D]: an array outside has channels last, as the memory here
  bool varies;     // h is that of the longest text, or, in a plan, of a text's length
  float scale;
  uint8_t zero_point;
  int64_t border[4] = {0, 0, 0, 0};  // top, left, bottom, right
  int64_t row_pitch, image_pitch, origin;

  bool is_f32() const { return type == Dtype::f32; }
  int64_t bytes() const { return bytes_of(type); }  // of an element
  int64_t elements() const { return c * h * w; }
  bool has_border() const { return border[0] + border[1] + border[2] + border[3] > 0; }
  bool same_layout(const Activation& other) const;
  // Whether the rows of both, pixels or tokens, follow each other without a gap and are of one kind and number.
  bool same_rows(const Activation& other) const;
  // Whether a reshape of one to the other leaves every element where it lies.
  bool same_order(const Activation& other) const;
  // Where a row begins: the rows of several images are numbered through.
  int64_t row_offset(int64_t row) const { return row / h * image_pitch + origin + row % h * row_pitch; }
};

// How convolutions run: as a rule says, or all that can in one form, which changes no bit.
enum class ConvForm { by_rule, direct, winograd4, winograd2 };

// The weights of a conv2d or linear as its kernel reads them.
struct PackedConv {
  bool is_depthwise = false;
  bool through_f32 = false;            // depthwise, but not from u8 to u8 alone: Kernels::depthwise_f32, then scale_add
  int64_t repeat = 1;                  // depthwise: neighbouring pixels that one row of weights covers
  bool fits_s16 = false;               // depthwise: DepthwiseParams::fits_s16
  int64_t depthwise_stride = 0;        // bytes from one cell of a depthwise convolution to the next
  const ConvKernel* kernel = nullptr;  // null for depthwise and Winograd
  const WinogradKernel* winograd = nullptr;
  const char* why_direct = "";       // what kept a layer from its Winograd form or grouped kernel
  std::vector<int32_t> cell_offset;  // from the first cell; relative to the window's top left pixel
  int32_t k = 0;                     // bytes per cell; of Winograd: channels
  int64_t panels = 1;
  size_t panel_bytes = 0;
  size_t weight_offset = 0;              // in Program::weights; layers that pack the same codes alike share it
  std::vector<int32_t> panel_channel;    // first input channel that a panel reads
  std::vector<int32_t> lanes;            // ConvParams::lanes of a grouped kernel; empty: dense panels
  AlignedBuffer comp, multiplier, bias;  // int32, float, float; one entry per channel, panels * nr of them
};

struct Step {
  const Node* node;
  int member;
  std::vector<int> inputs;  // global activation ids
  int output;
  int64_t macs = 0;
  std::shared_ptr<const PackedConv> conv;  // null for a node without weights; nodes that agree in all of it share one
};

using Activations = std::vector<Activation>;

struct Program {
  Graph graph;
  const Kernels* kernels;
  int threads;  // of a run, at most
  ConvForm form;
  Activations activations;        // of all members
  std::vector<int> member_input;  // activation of each member's input; equal inputs are one activation
  std::vector<int> outputs;       // of a network, or one of each member of an ensemble
  int64_t longest = 0;            // of texts, in tokens; 0: the input is numbers
  std::vector<Step> steps;        // of all members, in order
  AlignedBuffer weights;
  size_t file_bytes = 0;
  uint64_t footprint = 0;  // bytes of the weights and of all other constants
};

// Reads, checks and packs a model with up to `threads` threads, which run it later. Throws ModelError. The file is not
// needed afterwards.
Program load_program(const ModelFile& file, const Kernels& kernels, int threads, ConvForm form);

}  // namespace qdeploy
