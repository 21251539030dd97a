// What a conv2d or linear node keeps. Besides its own family, packing, tiling and planning read it.
#pragma once
#include <optional>

#include "window.h"

namespace qdeploy {

constexpr int kInnerCodes = 4;  // the first format version that has them

// The key `weight` of a node: integer codes.
struct Weight {
  std::vector<int64_t> shape;  // of any rank
  int64_t count;               // of codes
  int bits;                    // width of the codes in the file
  const FileTensor& codes;     // which they fit
};
Weight read_weight(const NodeSource& node);

struct ConvData : OpData {
  Window window;  // linear is a 1x1 window
  int64_t groups = 1;
  int used_bits = 0;                // the width that all codes fit: below OpData::bits in some layers of 8 bits
  uint64_t codes = 0;               // where the packed codes begin in the file
  SharedFloats multiplier, bias;    // per output channel
  float residual_multiplier = 0;    // 0 without a residual
  std::optional<InnerCodes> inner;  // only with a residual

  int64_t channels() const { return static_cast<int64_t>(bias->values.size()); }
};

// Null for a node without weights.
const ConvData* conv_of(const Node& node);

}  // namespace qdeploy
