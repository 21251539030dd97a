// The integer codes of a weight as the file packs them (docs/format.md section 2).
#pragma once
#include <cstdint>

namespace qdeploy {

constexpr int64_t kCodesPerBlock = 16;

// `count` codes that begin at bit `first_bit` of `packed`. Works by blocks of kCodesPerBlock codes: may read
// 8 bytes behind the last block and writes all of it.
void unpack_codes(const uint8_t* packed, int bits, int64_t first_bit, int64_t count, int8_t* codes);

}  // namespace qdeploy
