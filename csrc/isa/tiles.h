// The one configuration of AMX's tile registers: 16 rows of 64 bytes in each of the 8. Intel's manual, volume 1, 18.2.
#pragma once
#include <stdint.h>

namespace qdeploy {

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfiguration kTileConfiguration;

}  // namespace qdeploy
