// What the families of check_ukernels share: random values, memory between guard pages, reports, and a stopwatch.
#pragma once
#include "ukernels.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace qdeploy {

// ---- Families -------------------------------------------------------------------------------------------------------

// Kernels that are checked in one file, check_<family>.cc, which defines its row. A new kernel of a family needs no
// edit elsewhere; a new family is declared here and has its place in the driver's list.
struct Family {
  bool (*check)(const Kernels& scalar, const Kernels& kernels);  // false after the report of the first difference
  void (*bench)(const Kernels& kernels);                         // prints one line or more
};
extern const Family kConvFamily, kWinogradFamily, kDepthwiseFamily, kPoolFamily, kElementwiseFamily, kInputFamily,
    kLsqFamily, kRowsFamily, kNormFamily, kAttentionFamily;

// Cases of the seeds 1..2000, until one differs.
template <class Check>
bool check_seeds(Check check) {
  for (uint64_t seed = 1; seed <= 2000; ++seed)
    if (!check(seed)) return false;
  return true;
}

// ---- Random values --------------------------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
  }
  int range(int lo, int hi) { return lo + static_cast<int>(next() % static_cast<uint32_t>(hi - lo + 1)); }
  float uniform() { return static_cast<float>(next() >> 8) * 0x1p-24f; }
  template <class T, size_t N>
  T pick(const T (&values)[N]) {
    return values[next() % N];
  }

 private:
  uint64_t state_;
};

enum class Fill { uniform, extremes, low, high, small };
constexpr Fill kFills[] = {Fill::uniform, Fill::uniform, Fill::extremes, Fill::low, Fill::high, Fill::small};

inline const char* fill_name(Fill fill) {
  const char* names[] = {"uniform", "extremes", "low", "high", "small"};
  return names[static_cast<int>(fill)];
}

inline int fill_value(Fill fill, int lo, int hi, Random& random) {
  switch (fill) {
    case Fill::uniform:
      return random.range(lo, hi);
    case Fill::extremes:
      return random.range(0, 1) ? hi : lo;
    case Fill::low:
      return lo;
    case Fill::high:
      return hi;
    default:
      return random.range(std::max(lo, -2), std::min(hi, 2));
  }
}

inline void fill_u8(uint8_t* a, size_t n, Fill fill, Random& random) {
  for (size_t i = 0; i < n; ++i) a[i] = static_cast<uint8_t>(fill_value(fill, 0, 255, random));
}

inline size_t size_of(Dtype type) { return type == Dtype::f32 || type == Dtype::i32 ? 4 : type == Dtype::s16 ? 2 : 1; }

// n codes of any type.
inline void fill_codes(void* a, Dtype type, size_t n, Fill fill, Random& random) {
  for (size_t i = 0; i < n; ++i) {
    if (type == Dtype::u8) static_cast<uint8_t*>(a)[i] = static_cast<uint8_t>(fill_value(fill, 0, 255, random));
    if (type == Dtype::s8) static_cast<int8_t*>(a)[i] = static_cast<int8_t>(fill_value(fill, -128, 127, random));
    if (type == Dtype::s16) static_cast<int16_t*>(a)[i] = static_cast<int16_t>(fill_value(fill, -32767, 32767, random));
    if (type == Dtype::i32) static_cast<int32_t*>(a)[i] = fill_value(fill, -(1 << 30), (1 << 30) - 1, random);
  }
}

// Multipliers of either sign that spread sums of this size over the codes; every third one makes exact ties of rint.
inline float random_multiplier(double largest_sum, Random& random) {
  const float multiplier =
      static_cast<float>(random.uniform() * 600 / std::max(largest_sum, 1.0)) * (random.range(0, 1) ? 1.f : -1.f);
  return random.range(0, 2) ? multiplier
                            : std::ldexp(std::copysign(1.f, multiplier), std::min(-1, std::ilogb(multiplier)));
}

inline float random_bias(Random& random) {
  const float bias = random.uniform() * 400 - 100;
  return random.range(0, 2) ? bias : std::floor(bias) + 0.5f;
}

inline void random_clamp(uint8_t* qmin, uint8_t* qmax, Random& random) {
  *qmin = 0, *qmax = 255;
  if (random.range(0, 1)) {
    *qmin = static_cast<uint8_t>(random.range(0, 255));
    *qmax = static_cast<uint8_t>(random.range(*qmin, 255));
  }
}

inline InnerCodes random_inner_codes(Random& random) {
  uint8_t qmin, qmax;
  random_clamp(&qmin, &qmax, random);
  const float multiplier = random.uniform() * 4 - 2;
  return {kRound + qmin, kRound + qmax, multiplier, random_bias(random)};
}

// ---- Guarded memory -------------------------------------------------------------------------------------------------

// Pages between two inaccessible ones. place() gives `size` bytes with the granted slack ending at one of them.
class Guarded {
 public:
  explicit Guarded(size_t capacity) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    capacity_ = (capacity + 2 * kOverread + page_ - 1) / page_ * page_;
    void* map = mmap(nullptr, capacity_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) abort();
    begin_ = static_cast<uint8_t*>(map) + page_;
    if (mprotect(begin_, capacity_, PROT_READ | PROT_WRITE) != 0) abort();
  }
  ~Guarded() { munmap(begin_ - page_, capacity_ + 2 * page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T>
  T* place(size_t count, bool at_end, Random& random, size_t align = alignof(T)) {
    const size_t size = count * sizeof(T);
    if (size + 2 * kOverread > capacity_) abort();
    uint8_t* p = begin_ + (at_end ? (capacity_ - kOverread - size) / align * align : kOverread);
    extent_ = {p - kOverread, std::min(p + size + 2 * kOverread, begin_ + capacity_)};
    for (uint8_t* q = extent_.begin; q < extent_.end; ++q) *q = static_cast<uint8_t>(random.next());
    return reinterpret_cast<T*>(p);
  }

  // Copies the other's bytes, slack included; both must have been placed alike.
  void copy_from(const Guarded& other) { memcpy(extent_.begin, other.extent_.begin, other.size()); }
  bool equals(const Guarded& other) const { return memcmp(extent_.begin, other.extent_.begin, size()) == 0; }

 private:
  struct Extent {
    uint8_t *begin, *end;
  };
  size_t size() const { return static_cast<size_t>(extent_.end - extent_.begin); }

  size_t page_, capacity_;
  uint8_t* begin_;
  Extent extent_{};
};

// One buffer per operand, mapped once.
struct Memory {
  Guarded a{4 << 20}, b{1 << 20}, w{1 << 20}, comp{1 << 13}, multiplier{1 << 13}, bias{1 << 13}, offsets{1 << 13},
      residual{1 << 20};
  Guarded c{1 << 20}, c_expected{1 << 20};
};

inline Memory& memory() {
  static Memory memory;
  return memory;
}

// The outputs of the kernel and of the scalar one, `count` elements of `size` bytes, alike with all that is around them.
struct Outputs {
  uint8_t *c, *expected;
};

inline Outputs place_outputs(size_t count, size_t size, bool at_end, Random& random) {
  Memory& m = memory();
  const Outputs outputs = {m.c.place<uint8_t>(count * size, at_end, random, size),
                           m.c_expected.place<uint8_t>(count * size, at_end, random, size)};
  m.c_expected.copy_from(m.c);
  return outputs;
}

// ---- Reports --------------------------------------------------------------------------------------------------------

inline char current_case[1024];  // what is being checked, for the report of a difference or a crash

[[gnu::format(printf, 1, 2)]] inline void describe(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(current_case, sizeof current_case, format, args);
  va_end(args);
}

inline bool failed(const char* kernel) {
  printf("FAILED %s\n  %s\n", kernel, current_case);
  return false;
}

// Whether the two outputs, and all that is around them, are still alike.
inline bool same_outputs(const char* kernel) { return memory().c.equals(memory().c_expected) || failed(kernel); }

// ---- Benchmark ------------------------------------------------------------------------------------------------------

// Seconds of the quickest of many short rounds: neighbours on this core only ever add time.
template <class Run>
double quickest(Run run) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  const Clock::time_point stop = Clock::now() + std::chrono::milliseconds(60);
  for (int round = 0; round < 5 || Clock::now() < stop; ++round) {
    const Clock::time_point begin = Clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

// 1e9 of what `run` does `count` of, a second.
template <class Run>
double rate(double count, Run run) {
  return 1e-9 * count / quickest(run);
}

// Bytes aligned as the engine aligns its buffers, with the slack around them.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t count, T value = 0) : values_(count + 4 * kOverread, value) {}
  T* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(values_.data()) + 2 * kOverread;
    return reinterpret_cast<T*>(at - at % kOverread);
  }

 private:
  std::vector<T> values_;
};

}  // namespace qdeploy
