// From the packed codes of the file to the panels that the kernels read (layouts: ukernels.h).
#pragma once
#include <string>

#include "program.h"

namespace qdeploy {

// Codes [begin, begin + count) of a stream of b-bit codes (docs/format.md section 2) that is `total` codes long.
void unpack_codes(const uint8_t* packed, int bits, int64_t total, int64_t begin, int64_t count, int8_t* codes);

// Chooses the kernel and sizes of a conv2d or linear step; no memory is touched yet.
void lower_conv(const Node& node, const Activation& in, bool f32_output, const Kernels& kernels, PackedConv* conv);

// Bytes of packed weights, a multiple of 64.
size_t packed_bytes(const PackedConv& conv, const Node& node);

// Unpacks, checks the bound on the results and packs panel `panel` (depthwise: everything) to weights +
// conv->weight_offset. Throws ModelError with `where`.
void pack_panel(const Node& node, const Activation& in, bool f32_output, int64_t panel, const std::string& where,
                uint8_t* weights, PackedConv* conv);

}  // namespace qdeploy
