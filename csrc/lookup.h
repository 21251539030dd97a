// Tables of 256 entries, one for each channel.
#pragma once
#include <cstdint>

namespace qdeploy {

// The channels of a pixel follow each other. By value: a stored byte might change anything that is referred to. `to` may
// be `from`. One load an entry is all that any instruction set does here: a table does not stay in registers.
template <class Entry>
void look_up_channels(int64_t pixels, int64_t channels, const Entry* tables, const uint8_t* from, Entry* to) {
  for (int64_t x = 0; x < pixels; ++x) {
    for (int64_t c = 0; c < channels; ++c) *to++ = tables[c * 256 + *from++];
  }
}

}  // namespace qdeploy
