#include "cpu_features.h"

#include "os.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qdeploy {

#if defined(__x86_64__)
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros where the CPU has no such leaf.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers found;
  __get_cpuid_count(leaf, subleaf, &found.eax, &found.ebx, &found.ecx, &found.edx);
  return found;
}

constexpr bool has_bit(unsigned word, int bit) { return (word >> bit & 1) != 0; }

// The state components that the operating system saves: XCR0. Only where cpuid says that the CPU has xgetbv and that
// the system switched it on (OSXSAVE).
unsigned saved_states(bool has_osxsave) {
  if (!has_osxsave) return 0;
  unsigned eax, edx;
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

}  // namespace

// Bits and leaves: Intel's manual, volume 2, CPUID; volume 1, 13.3 (XCR0).
CpuFeatures cpu_features() {
  constexpr unsigned kYmm = 0x06, kZmm = 0xe6;  // SSE and AVX; these, opmasks and both parts of the zmm registers
  constexpr unsigned kTiles = 0x60000;          // tile configuration and tile registers
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0);
  const Registers more = extended.eax >= 1 ? cpuid(7, 1) : Registers();
  const unsigned saved = saved_states(has_bit(basic.ecx, 27));
  const bool ymm = (saved & kYmm) == kYmm && has_bit(basic.ecx, 28), zmm = ymm && (saved & kZmm) == kZmm;
  CpuFeatures features = {};
  features.fma = ymm && has_bit(basic.ecx, 12);
  features.avx2 = ymm && has_bit(extended.ebx, 5);
  features.avx_vnni = ymm && has_bit(more.eax, 4);
  features.avx512f = zmm && has_bit(extended.ebx, 16);
  features.avx512dq = zmm && has_bit(extended.ebx, 17);
  features.avx512bw = zmm && has_bit(extended.ebx, 30);
  features.avx512vl = zmm && has_bit(extended.ebx, 31);
  features.avx512_vnni = zmm && has_bit(extended.ecx, 11);
  const bool tiles = (saved & kTiles) == kTiles && has_bit(extended.edx, 24) && os::grants_tiles();
  features.amx_tile = tiles;
  features.amx_int8 = tiles && has_bit(extended.edx, 25);
  return features;
}
#elif defined(__aarch64__)
CpuFeatures cpu_features() {
  CpuFeatures features = {};
  features.asimd = os::has_asimd();
  features.asimddp = os::has_asimddp();
  return features;
}
#else
CpuFeatures cpu_features() { return {}; }
#endif

}  // namespace qdeploy
