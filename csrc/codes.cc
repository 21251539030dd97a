#include "codes.h"

#include <cstring>

namespace qdeploy {
namespace {

// Two words of 8 codes each, and the same as bytes: in vector registers of any instruction set.
typedef uint64_t Words __attribute__((vector_size(16)));
typedef int8_t Bytes __attribute__((vector_size(16)));

}  // namespace

void unpack_codes(const uint8_t* packed, int bits, int64_t first_bit, int64_t count, int8_t* codes) {
  packed += first_bit / 8;
  if (bits == 8) {
    memcpy(codes, packed, count);
    return;
  }
  const int8_t sign = static_cast<int8_t>(1 << (bits - 1));
  const uint64_t half = (uint64_t{1} << 4 * bits) - 1;                             // 4 codes of 8
  const uint64_t quarters = ((uint64_t{1} << 2 * bits) - 1) * 0x0000000100000001;  // 2 codes of 4, twice
  const uint64_t eighths = ((uint64_t{1} << bits) - 1) * 0x0001000100010001;       // 1 code of 2, four times
  const int shift = static_cast<int>(first_bit % 8), gap = 8 - bits;
  for (int64_t i = 0; i < count; i += kCodesPerBlock, packed += 2 * bits) {
    uint64_t word[2];  // 8 codes and the bits before them fit a word: 8 * 7 + 7 < 64
    memcpy(&word[0], packed, 8);
    memcpy(&word[1], packed + bits, 8);
    Words x = {word[0], word[1]};
    x >>= shift;
    x = (x & half) | (x >> 4 * bits & half) << 32;
    x = (x & quarters) | (x & quarters << 2 * bits) << 2 * gap;
    x = (x & eighths) | (x & eighths << bits) << gap;
    const Bytes extended = (reinterpret_cast<Bytes>(x) ^ sign) - sign;
    memcpy(codes + i, &extended, sizeof extended);
  }
}

}  // namespace qdeploy
