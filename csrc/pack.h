// From the packed codes of the file to the panels that the kernels read (layouts: ukernels.h).
#pragma once
#include <string>
#include <vector>

#include "program.h"

namespace qdeploy {

// Chooses the kernel and sizes of a conv2d or linear step; no memory is touched yet.
void lower_conv(const Node& node, const Activation& in, bool f32_output, const Kernels& kernels, PackedConv* conv);

// Bytes of packed weights, a multiple of 64.
size_t packed_bytes(const PackedConv& conv, const Node& node);

// Packs panels one after another; each thread has one.
class Packer {
 public:
  // `weights` is all zeros where nothing was packed yet.
  Packer(const ModelFile& file, uint8_t* weights) : file_(file), weights_(weights) {}

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
