// Loops of nothing but the instructions that a kernel is made of, on registers, with kPeakAccumulators independent
// accumulators to hide their latency. In assembly, so that this file needs no -m flags.
#include "peak_loops.h"

#include "tiles.h"

namespace qdeploy {
namespace {

#if defined(__x86_64__)

// ROUND(acc) is one round on the accumulator of that number; register 15 is zero, 14 is free.
#define REPEAT(ROUND) \
  ROUND(0) ROUND(1) ROUND(2) ROUND(3) ROUND(4) ROUND(5) ROUND(6) ROUND(7) ROUND(8) ROUND(9) ROUND(10) ROUND(11)
#define ZERO(n) "vpxor %%xmm" #n ", %%xmm" #n ", %%xmm" #n "\n\t"
#define LOOP(name, ROUND)                                                                                        \
  void name(long rounds) {                                                                                       \
    asm volatile(REPEAT(ZERO) ZERO(14) ZERO(15) "1:\n\t" REPEAT(ROUND) "dec %0\n\tjnz 1b\n\tvzeroupper"          \
                 : "+r"(rounds)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                   "xmm10", "xmm11", "xmm14", "xmm15", "cc");                                                    \
  }

#define FMA(v, n) "vfmadd231ps %%" v "15, %%" v "15, %%" v #n "\n\t"
#define DOT_YMM(n) "%{vex%} vpdpbusd %%ymm15, %%ymm15, %%ymm" #n "\n\t"
#define DOT_ZMM(n) "vpdpbusd %%zmm15, %%zmm15, %%zmm" #n "\n\t"
// Without VNNI the kernel for codes of which eight sums fit s16 is the fastest one: 8 vpmaddubsw, 7 vpaddw, vpmaddwd
// and vpaddd, here with sums in seven registers, so that none waits for another.
#define PRODUCT(v) "vpmaddubsw %%" v "15, %%" v "15, %%" v "14\n\t"
#define PRODUCT_SUM(v, n) PRODUCT(v) "vpaddw %%" v "14, %%" v #n ", %%" v #n "\n\t"
#define SEVEN(v, SUM) SUM(v, 0) SUM(v, 1) SUM(v, 2) SUM(v, 3) SUM(v, 4) SUM(v, 5) SUM(v, 6)
#define WIDEN(v) "vpmaddwd %%" v "15, %%" v "14, %%" v "14\n\t"
#define MADD(v, n) SEVEN(v, PRODUCT_SUM) PRODUCT(v) WIDEN(v) "vpaddd %%" v "14, %%" v #n ", %%" v #n "\n\t"
#define FMA_YMM(n) FMA("ymm", n)
#define FMA_ZMM(n) FMA("zmm", n)
#define MADD_YMM(n) MADD("ymm", n)
#define MADD_ZMM(n) MADD("zmm", n)

LOOP(fma_ymm, FMA_YMM)
LOOP(fma_zmm, FMA_ZMM)
LOOP(madd_ymm, MADD_YMM)
LOOP(madd_zmm, MADD_ZMM)
LOOP(dot_ymm, DOT_YMM)
LOOP(dot_zmm, DOT_ZMM)

// Six registers of sums, which take turns twice; 6 and 7 are zero.
#define TILES(n) "tdpbusd %%tmm7, %%tmm6, %%tmm" #n "\n\t"
#define SIX(ROUND) ROUND(0) ROUND(1) ROUND(2) ROUND(3) ROUND(4) ROUND(5)
void dot_tiles(long rounds) {
  asm volatile("ldtilecfg %1\n\t1:\n\t" SIX(TILES) SIX(TILES) "dec %0\n\tjnz 1b\n\ttilerelease"
               : "+r"(rounds)
               : "m"(kTileConfiguration)
               : "cc");
}

#endif

}  // namespace

const PeakLoop kPeakLoops[] = {
#if defined(__x86_64__)
    {"avx2", "float32", 8, fma_ymm},        {"avx2", "int8", 256, madd_ymm},     {"avxvnni", "float32", 8, fma_ymm},
    {"avxvnni", "int8", 32, dot_ymm},       {"avx512", "float32", 16, fma_zmm},  {"avx512", "int8", 512, madd_zmm},
    {"avx512vnni", "float32", 16, fma_zmm}, {"avx512vnni", "int8", 64, dot_zmm}, {"amx", "float32", 16, fma_zmm},
    {"amx", "int8", 16384, dot_tiles},
#endif
    {nullptr, nullptr, 0, nullptr}};

}  // namespace qdeploy
