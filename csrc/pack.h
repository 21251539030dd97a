// From the packed codes of the file to the panels that the kernels read (layouts: ukernels.h).
#pragma once
#include <string>
#include <vector>

#include "program.h"

namespace qdeploy {

// How a conv2d or linear step is taken apart into taps and panels, for the kernel of its number of bits.
void lower_conv(const Node& node, const Activation& in, bool f32_output, const Kernels& kernels, PackedConv* conv);

// What depends on the kernel that was chosen after that.
void size_conv(const Node& node, const Activation& in, PackedConv* conv);

// Bytes from one tap of a depthwise convolution to the next.
int64_t depthwise_stride(const Node& node, const PackedConv& conv);

// Bytes of packed weights, a multiple of 64.
size_t packed_bytes(const PackedConv& conv, const Node& node);

// Reads the codes of one layer after another; each thread has one.
class Packer {
 public:
  // `weights` is all zeros where nothing was packed yet.
  Packer(const ModelFile& file, uint8_t* weights) : file_(file), weights_(weights) {}

  // Kernels of fewer bits are faster, and most of the codes that training gives are far smaller than the largest one:
  // where the sums of every channel fit (ConvKernel::s16_steps), a layer gets the kernel of fewer bits, just as exact.
  void choose_kernel(const Node& node, const Activation& in, const Kernels& kernels, PackedConv* conv);

  // Reads, unpacks, checks the bound on the results and packs panel `panel` (depthwise: everything) to weights +
  // conv->weight_offset. Throws ModelError with `where`.
  void pack_panel(const Node& node, const Activation& in, bool f32_output, int64_t panel, const std::string& where,
                  PackedConv* conv);

 private:
  const uint8_t* read_bits(uint64_t offset, int64_t first_bit, int64_t bits);

  const ModelFile& file_;
  uint8_t* const weights_;
  std::vector<uint8_t> packed_;  // codes of one panel as in the file
  std::vector<int8_t> codes_;    // of one channel
  std::vector<int8_t> rows_;     // of one panel, a row for each channel
};

}  // namespace qdeploy
