// How many multiply-accumulates a core can do at best: loops of nothing but the instructions that a kernel is made of,
// on registers, with 12 independent accumulators to hide their latency. Compiled and called by peak.py.
#include <chrono>

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kAccumulators = 12;
constexpr long kSteps = 2000;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Runs `loop` for about `seconds` and returns 1e9 multiply-accumulates a second of its fastest slice: one in which the
// machine was disturbed does not count.
double best_gmacs(double seconds, int macs_per_step, void (*loop)(long)) {
  double best = 0;
  for (const auto begin = Clock::now(); seconds_since(begin) < seconds;) {
    const auto slice = Clock::now();
    loop(kSteps);
    const double gmacs = 1e-9 * kSteps * kAccumulators * macs_per_step / seconds_since(slice);
    if (gmacs > best) best = gmacs;
  }
  return best;
}

}  // namespace

// STEP(acc) is one step on the accumulator of that number; register 15 is zero, 14 is free.
#define REPEAT(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#define ZERO(n) "vpxor %%xmm" #n ", %%xmm" #n ", %%xmm" #n "\n\t"
#define PEAK(name, macs, STEP)                                                                                  \
  static void name##_loop(long steps) {                                                                         \
    asm volatile(REPEAT(ZERO) ZERO(14) ZERO(15) "1:\n\t" REPEAT(STEP) "dec %0\n\tjnz 1b\n\tvzeroupper"          \
                 : "+r"(steps)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                   "xmm10", "xmm11", "xmm14", "xmm15", "cc");                                                   \
  }                                                                                                             \
  extern "C" double name(double seconds) { return best_gmacs(seconds, macs, name##_loop); }

#define FMA(v, n) "vfmadd231ps %%" v "15, %%" v "15, %%" v #n "\n\t"
#define DOT_YMM(n) "%{vex%} vpdpbusd %%ymm15, %%ymm15, %%ymm" #n "\n\t"
#define DOT_ZMM(n) "vpdpbusd %%zmm15, %%zmm15, %%zmm" #n "\n\t"
// Weights of 7 bits without VNNI: u8 * s8 pairs to s16, pairs of those to s32, and the sum.
#define MADD(v, n)                        \
  "vpmaddubsw %%" v "15, %%" v "15, %%" v \
  "14\n\t"                                \
  "vpmaddwd %%" v "15, %%" v "14, %%" v   \
  "14\n\t"                                \
  "vpaddd %%" v "14, %%" v #n ", %%" v #n "\n\t"
#define FMA_YMM(n) FMA("ymm", n)
#define FMA_ZMM(n) FMA("zmm", n)
#define MADD_YMM(n) MADD("ymm", n)
#define MADD_ZMM(n) MADD("zmm", n)

PEAK(float32_avx2, 8, FMA_YMM)
PEAK(float32_avx512, 16, FMA_ZMM)
PEAK(int8_avx2, 32, MADD_YMM)
PEAK(int8_avxvnni, 32, DOT_YMM)
PEAK(int8_avx512, 64, MADD_ZMM)
PEAK(int8_avx512vnni, 64, DOT_ZMM)
