// Checks every kernel of every instruction set of this CPU against the scalar table, bit for bit; `--bench` times them.
//
// Inputs lie against an inaccessible page with exactly the slack the contract grants (kOverread), alternately at their
// end and at their start, so a read beyond it crashes; the slack holds random bytes, so using them shows. Outputs are
// compared with all that surrounds them. The first case that differs is printed with all its parameters; exit status 1.
//
// Built by `cmake --build <folder> --target check_ukernels`, or by hand,
// F="-std=c++17 -O3 -ffp-contract=off -Icsrc":
//   g++ $F -c csrc/isa/scalar.cc
//   g++ $F -mavx2 -mfma -c csrc/isa/avx2.cc csrc/isa/avxvnni.cc
//   g++ $F -mavx2 -mfma -DQDEPLOY_AVXVNNI_AS_EVEX -c csrc/isa/avxvnni.cc -o avxvnni_as_evex.o
//   g++ $F -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -c csrc/isa/avx512.cc
//   g++ $F -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -c csrc/isa/avx512vnni.cc
//   g++ $F tests/cpp/check_ukernels.cc csrc/cpu.cc *.o -o check_ukernels
// On aarch64, instead of the avx files: csrc/isa/neon.cc, and csrc/isa/neondot.cc with -march=armv8.2-a+dotprod.
#include "cpu.h"
#include "ukernels.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace qdeploy {
void init_avxvnni_as_evex(Kernels* kernels);  // what init_avxvnni gives, in the encoding of AVX-512
}

using namespace qdeploy;

namespace {

// ---- Random values and guarded memory ------------------------------------------------------------------------------

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
  Guarded a{4 << 20}, b{1 << 20}, w{1 << 20}, comp{1 << 13}, scale{1 << 13}, bias{1 << 13}, offsets{1 << 13},
      residual{1 << 20};
  Guarded c{1 << 20}, c_expected{1 << 20};
};
Memory& memory() {
  static Memory memory;
  return memory;
}

// What is being checked, for the report of a difference or a crash.
char current_case[1024];

[[gnu::format(printf, 1, 2)]] void describe(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(current_case, sizeof current_case, format, args);
  va_end(args);
}
bool failed(const char* kernel) {
  printf("FAILED %s\n  %s\n", kernel, current_case);
  return false;
}
void report_crash(int signal) {  // not async-signal-safe, but nothing of value can be lost here
  printf("CRASHED (signal %d)\n  %s\n", signal, current_case);
  fflush(stdout);
  _exit(1);
}

enum class Fill { uniform, extremes, low, high, small };
constexpr Fill kFills[] = {Fill::uniform, Fill::uniform, Fill::extremes, Fill::low, Fill::high, Fill::small};
const char* fill_name(Fill fill) {
  const char* names[] = {"uniform", "extremes", "low", "high", "small"};
  return names[static_cast<int>(fill)];
}
int fill_value(Fill fill, int lo, int hi, Random& random) {
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
void fill_u8(uint8_t* a, size_t n, Fill fill, Random& random) {
  for (size_t i = 0; i < n; ++i) a[i] = static_cast<uint8_t>(fill_value(fill, 0, 255, random));
}

// Multipliers of either sign that spread sums of this size over the codes; every third one makes exact ties of rint.
float random_scale(double largest_sum, Random& random) {
  const float scale =
      static_cast<float>(random.uniform() * 600 / std::max(largest_sum, 1.0)) * (random.range(0, 1) ? 1.f : -1.f);
  return random.range(0, 2) ? scale : std::ldexp(std::copysign(1.f, scale), std::min(-1, std::ilogb(scale)));
}
float random_bias(Random& random) {
  const float bias = random.uniform() * 400 - 100;
  return random.range(0, 2) ? bias : std::floor(bias) + 0.5f;
}

template <class T>
T* fill_random(Guarded& memory, size_t n, bool at_end, Random& random, T (*value)(Random&)) {
  T* p = memory.place<T>(n, at_end, random);
  for (size_t i = 0; i < n; ++i) p[i] = value(random);
  return p;
}

void random_clamp(uint8_t* qmin, uint8_t* qmax, Random& random) {
  *qmin = 0, *qmax = 255;
  if (random.range(0, 1)) {
    *qmin = static_cast<uint8_t>(random.range(0, 255));
    *qmax = static_cast<uint8_t>(random.range(*qmin, 255));
  }
}

// ---- Convolution ---------------------------------------------------------------------------------------------------

struct ConvCase {
  int bits, r, groups, taps, k, n;
  int outputs = 0;  // of each group of k channels; 0: a dense kernel
  int a_stride, c_stride;
  bool wide_codes;  // of 8 bits, as far as ConvKernel::s16_steps allows
  bool residual, in_place, f32, at_end;
  Fill a_fill, w_fill;
  uint8_t qmin, qmax;
  uint64_t seed;
};

void describe(const char* kernel, const ConvCase& x) {
  describe(
      "%s bits=%d r=%d groups=%d taps=%d k=%d n=%d outputs=%d a_stride=%d c_stride=%d wide_codes=%d residual=%d "
      "in_place=%d f32=%d "
      "at_end=%d "
      "a=%s w=%s "
      "qmin=%d qmax=%d seed=%llu",
      kernel, x.bits, x.r, x.groups, x.taps, x.k, x.n, x.outputs, x.a_stride, x.c_stride, x.wide_codes, x.residual,
      x.in_place, x.f32, x.at_end, fill_name(x.a_fill), fill_name(x.w_fill), x.qmin, x.qmax,
      static_cast<unsigned long long>(x.seed));
}

ConvCase random_conv_case(const ConvKernel& kernel, int bits, int r, int groups, Random& random) {
  static const int kDepths[] = {4, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 60, 64, 96, 100, 124, 200};
  ConvCase x;
  x.bits = bits, x.r = r, x.groups = groups;
  x.taps = random.range(1, 9);
  x.k = random.pick(kDepths);
  x.n = random.range(0, 1) ? kernel.nr : random.range(1, kernel.nr);
  const int strides[] = {x.k, x.k + 1, 3, 6, 2 * x.k + 5, 0, -x.k};
  x.a_stride = random.pick(strides);
  x.c_stride = x.n + (random.range(0, 1) ? 0 : random.range(1, 70));
  x.wide_codes = kernel.s16_steps > 0 && random.range(0, 1);
  x.residual = random.range(0, 1);
  x.f32 = random.range(0, 2) == 0;
  x.in_place = x.residual && !x.f32 && random.range(0, 1);
  x.at_end = random.range(0, 1);
  x.a_fill = random.pick(kFills), x.w_fill = random.pick(kFills);
  random_clamp(&x.qmin, &x.qmax, random);
  x.seed = (uint64_t{random.next()} << 32) | random.next();
  return x;
}

// Any codes that sum up to at most 128 on either side of zero wherever the kernel adds their products in 16 bits: the
// first ones that are too large take all that is left, so that most sums are exactly 128.
void limit_sums(int8_t* codes, int k, int s16_steps) {
  for (int begin = 0; begin < k; begin += 4 * s16_steps) {
    int left[2][2] = {{128, 128}, {128, 128}};  // [half of a step][positive or negative]
    for (int i = begin; i < std::min(k, begin + 4 * s16_steps); ++i) {
      int& limit = left[i / 2 % 2][codes[i] < 0];
      const int magnitude = std::min(std::abs(codes[i]), limit);
      limit -= magnitude;
      codes[i] = static_cast<int8_t>(codes[i] < 0 ? -magnitude : magnitude);
    }
  }
}

// A grouped convolution with the output channels of a group as wide as the group or wider.
ConvCase random_grouped_case(const ConvKernel& kernel, int r, int groups, Random& random) {
  static const int kShapes[][2] = {{4, 4}, {4, 8}, {4, 32}, {8, 8}, {8, 16}, {12, 16}, {12, 32}, {16, 16}, {16, 32}};
  ConvCase x = random_conv_case(kernel, 8, r, groups, random);
  const int* shape = kShapes[random.next() % 9];
  x.k = shape[0], x.outputs = shape[1];
  x.f32 = false;
  return x;
}

// Codes are [n][taps*k]; channels beyond n are zero.
template <class T>
void pack(const int8_t* codes, int taps, int k, int n, int nr, int kr, T* w) {
  for (int t = 0; t < taps; ++t)
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < nr; ++j)
        w[((t * (k / kr) + i / kr) * nr + j) * kr + i % kr] = j < n ? codes[(j * taps + t) * k + i] : 0;
}
void pack(const ConvKernel& kernel, const int8_t* codes, int taps, int k, int n, void* w) {
  if (kernel.format == WeightFormat::s8x4)
    pack(codes, taps, k, n, kernel.nr, 4, static_cast<int8_t*>(w));
  else
    pack(codes, taps, k, n, kernel.nr, 2, static_cast<int16_t*>(w));
}
size_t panel_bytes(const ConvKernel& kernel, int taps, int k) {
  return static_cast<size_t>(taps) * k * kernel.nr * (kernel.format == WeightFormat::s8x4 ? 1 : 2);
}

// The scalar kernel, one pixel and one of its own panels at a time; p holds the arrays of all n channels.
void conv_expected(const ConvKernel& scalar, ConvParams p, const std::vector<ConvTile>& tiles, const int8_t* codes,
                   bool f32) {
  const int n = p.n, depth = p.taps * p.k;
  std::vector<ConvTile> pixels;
  for (const ConvTile& tile : tiles)
    for (int q = 0; q < tile.r * tile.groups; ++q) {
      const int g = q / tile.r, i = q % tile.r;
      pixels.push_back({{static_cast<uint32_t>(tile.a[g] + i * p.a_stride)},
                        {static_cast<uint32_t>(tile.c[g] + i * p.c_stride)},
                        {static_cast<uint32_t>(tile.residual[g] + i * p.residual_stride)},
                        1,
                        1});
    }
  std::vector<uint8_t> w(panel_bytes(scalar, p.taps, p.k) + 64);
  p.w = w.data() + (64 - reinterpret_cast<uintptr_t>(w.data()) % 64);
  const ConvParams all = p;
  for (int first = 0; first < n; first += scalar.nr) {
    p.n = std::min(scalar.nr, n - first);
    pack(scalar, codes + first * depth, p.taps, p.k, p.n, const_cast<void*>(p.w));
    std::vector<int32_t> comp(scalar.nr);
    std::vector<float> scale(scalar.nr), bias(scalar.nr);
    std::copy_n(all.comp + first, p.n, comp.begin());
    std::copy_n(all.scale + first, p.n, scale.begin());
    std::copy_n(all.bias + first, p.n, bias.begin());
    p.comp = comp.data(), p.scale = scale.data(), p.bias = bias.data();
    p.c = static_cast<uint8_t*>(all.c) + first * (f32 ? 4 : 1);
    if (all.residual) p.residual = all.residual + first;
    (f32 ? scalar.f32 : scalar.qu8)(&p, pixels.data(), pixels.size());
  }
}

std::vector<int32_t> lanes_of(const ConvCase& x, int nr) {
  std::vector<int32_t> lanes;
  for (int s = 0; s < x.k / 4; ++s)
    for (int n = 0; n < nr; ++n) lanes.push_back(n / x.outputs * (x.k / 4) + s);
  return lanes;
}

// Clears all dense codes that lie outside their channel's group and returns those inside, [n][taps*k].
std::vector<int8_t> grouped_codes(const ConvCase& x, std::vector<int8_t>* dense) {
  std::vector<int8_t> codes;
  for (int n = 0; n < x.n; ++n)
    for (int t = 0; t < x.taps; ++t)
      for (int i = 0; i < kGroupedWindow; ++i) {
        int8_t& code = (*dense)[(n * x.taps + t) * kGroupedWindow + i];
        if (i / x.k == n / x.outputs)
          codes.push_back(code);
        else
          code = 0;
      }
  return codes;
}

bool check_conv(const ConvKernel& scalar, const ConvKernel& kernel, const ConvCase& x) {
  describe(kernel.name, x);
  Memory& m = memory();
  Random random(x.seed);
  const int window = x.outputs ? kGroupedWindow : x.k;  // bytes of a tap that the dense twin of this case reads
  // Three tiles of the asked shape, then a few of any: kernels may treat runs of equal tiles alike.
  std::vector<ConvTile> tiles;
  const int n_tiles = random.range(1, 5);
  int slots = 0;
  const int group_span = 3 * x.k + 40;  // bytes between the first pixels of two groups; they may overlap
  for (int i = 0; i < n_tiles; ++i) {
    ConvTile tile{};
    tile.r = static_cast<uint8_t>(i < 3 ? x.r : random.range(1, kernel.mr));
    tile.groups = static_cast<uint8_t>(i < 3 ? x.groups : random.range(1, kernel.groups));
    for (int g = 0; g < tile.groups; ++g) {
      tile.a[g] =
          static_cast<uint32_t>((2 * i + g) * group_span + (x.a_stride < 0 ? -x.a_stride * (kernel.mr - 1) : 0));
      tile.c[g] = static_cast<uint32_t>(slots * x.c_stride);
      tile.residual[g] = tile.c[g];
      slots += tile.r + random.range(0, 1);
    }
    tiles.push_back(tile);
  }

  ConvParams p{};
  p.taps = x.taps, p.k = x.k, p.n = x.n;
  int32_t* tap_offset = m.offsets.place<int32_t>(x.taps, x.at_end, random);
  for (int t = 0; t < x.taps; ++t) tap_offset[t] = random.range(-100, 300);
  p.tap_offset = tap_offset;
  p.a_stride = x.a_stride;
  int64_t lowest = std::numeric_limits<int64_t>::max(), highest = std::numeric_limits<int64_t>::min();
  for (const ConvTile& tile : tiles)
    for (int g = 0; g < tile.groups; ++g)
      for (int pixel : {0, tile.r - 1})
        for (int t = 0; t < x.taps; ++t) {
          const int64_t at = int64_t{tile.a[g]} + pixel * x.a_stride + tap_offset[t];
          lowest = std::min(lowest, at), highest = std::max(highest, at + window);
        }
  uint8_t* a = m.a.place<uint8_t>(highest - lowest, x.at_end, random);
  fill_u8(a, highest - lowest, x.a_fill, random);
  p.a = a - lowest;

  const int depth = x.taps * window, zero_point = random.range(0, 255);
  std::vector<int8_t> codes(static_cast<size_t>(x.n) * depth);
  const int largest = 1 << ((x.wide_codes ? 8 : x.bits) - 1);
  for (int8_t& code : codes) code = static_cast<int8_t>(fill_value(x.w_fill, -largest, largest - 1, random));
  for (int t = 0; t < x.n * x.taps && x.wide_codes; ++t) limit_sums(&codes[t * x.k], x.k, kernel.s16_steps);
  const std::vector<int32_t> lanes = x.outputs ? lanes_of(x, kernel.nr) : std::vector<int32_t>();
  uint8_t* w = m.w.place<uint8_t>(panel_bytes(kernel, x.taps, x.k), x.at_end, random, 64);
  pack(kernel, x.outputs ? grouped_codes(x, &codes).data() : codes.data(), x.taps, x.k, x.n, w);
  p.w = w;
  p.lanes = lanes.data();
  int32_t* comp = m.comp.place<int32_t>(kernel.nr, x.at_end, random);
  float* scale = m.scale.place<float>(kernel.nr, x.at_end, random);
  float* bias = m.bias.place<float>(kernel.nr, x.at_end, random);
  const double largest_sum =
      depth * 255.0 * (1 << (x.bits - 1)) / (x.w_fill == Fill::small || x.a_fill == Fill::small ? 50 : 1);
  std::vector<int32_t> comp_expected(kernel.nr);  // the scalar kernel's a_offset is 0
  for (int n = 0; n < kernel.nr; ++n) {
    int sum = 0;
    for (int i = 0; i < depth && n < x.n; ++i) sum += codes[n * depth + i];
    comp[n] = (kernel.a_offset - zero_point) * sum;
    comp_expected[n] = -zero_point * sum;
    scale[n] = n < x.n ? random_scale(largest_sum, random) : 0;
    bias[n] = n < x.n ? random_bias(random) : 0;
  }
  p.comp = comp, p.scale = scale, p.bias = bias;

  const size_t c_count = static_cast<size_t>(slots - 1) * x.c_stride + x.n;
  uint8_t* c = x.f32 ? reinterpret_cast<uint8_t*>(m.c.place<float>(c_count, x.at_end, random))
                     : m.c.place<uint8_t>(c_count, x.at_end, random);
  uint8_t* c_expected = x.f32 ? reinterpret_cast<uint8_t*>(m.c_expected.place<float>(c_count, x.at_end, random))
                              : m.c_expected.place<uint8_t>(c_count, x.at_end, random);
  m.c_expected.copy_from(m.c);
  p.c = c, p.c_stride = x.c_stride;
  if (x.residual) {
    p.residual = x.in_place ? c : m.residual.place<uint8_t>(c_count, x.at_end, random);
    p.residual_stride = x.c_stride;
    p.residual_scale = random.uniform() * 4 - 2;
  }
  p.qmin = x.qmin, p.qmax = x.qmax;
  p.prefetch = random.range(0, 1) ? w : nullptr;  // any address is allowed
  p.prefetch_bytes = random.range(0, 1) ? panel_bytes(kernel, x.taps, x.k) : 0;

  (x.f32 ? kernel.f32 : kernel.qu8)(&p, tiles.data(), tiles.size());
  p.c = c_expected, p.comp = comp_expected.data();
  p.k = window;
  if (x.in_place) p.residual = c_expected;
  conv_expected(scalar, p, tiles, codes.data(), x.f32);
  return m.c.equals(m.c_expected) || failed(kernel.name);
}

bool check_conv_all(const Kernels& scalar, const Kernels& kernels) {
  Random random(1);
  for (int bits = 2; bits <= 8; ++bits) {
    const ConvKernel& kernel = kernels.conv[bits];
    for (int r = 1; r <= kernel.mr; ++r)
      for (int groups = 1; groups <= kernel.groups; ++groups)
        for (int i = 0; i < 40; ++i)
          if (!check_conv(scalar.conv[bits], kernel, random_conv_case(kernel, bits, r, groups, random))) return false;
  }
  const ConvKernel& grouped = kernels.grouped;
  for (int r = 1; grouped.qu8 && r <= grouped.mr; ++r)
    for (int i = 0; i < 200; ++i)
      if (!check_conv(scalar.conv[8], grouped, random_grouped_case(grouped, r, random.range(1, 2), random)))
        return false;
  return true;
}

// ---- Depthwise -----------------------------------------------------------------------------------------------------

bool check_depthwise(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  static const int kTaps[] = {1, 2, 3, 9, 9, 15, 25, 49};
  const bool at_end = random.range(0, 1);
  const Fill a_fill = random.pick(kFills), w_fill = random.pick(kFills);
  const int pixels = random.range(1, 20);
  DepthwiseParams p{};
  p.taps = random.pick(kTaps);
  p.n = random.range(0, 2) ? random.range(1, 200) : 16 * random.range(1, 12);
  p.a_stride = random.range(0, 1) ? p.n : 2 * p.n + random.range(0, 9);
  p.c_stride = p.n + random.range(0, 1) * random.range(0, 70);
  int32_t* tap_offset = m.offsets.place<int32_t>(p.taps, at_end, random);
  for (int t = 0; t < p.taps; ++t) tap_offset[t] = random.range(-2000, 5000);
  p.tap_offset = tap_offset;
  const int64_t lowest = *std::min_element(tap_offset, tap_offset + p.taps);
  const int64_t highest = *std::max_element(tap_offset, tap_offset + p.taps) + (pixels - 1) * p.a_stride + p.n;
  uint8_t* a = m.a.place<uint8_t>(highest - lowest, at_end, random);
  fill_u8(a, highest - lowest, a_fill, random);
  p.a = a - lowest;

  const int readable = (p.n + kMaxNr - 1) / kMaxNr * kMaxNr;
  p.w_stride = readable + 16 * random.range(0, 1);
  int8_t* w = m.w.place<int8_t>((p.taps - 1) * p.w_stride + readable, at_end, random);
  for (int t = 0; t < p.taps; ++t)
    for (int n = 0; n < p.n; ++n) w[t * p.w_stride + n] = static_cast<int8_t>(fill_value(w_fill, -128, 127, random));
  int32_t* comp = m.comp.place<int32_t>(readable, at_end, random);
  float* scale = m.scale.place<float>(readable, at_end, random);
  float* bias = m.bias.place<float>(readable, at_end, random);
  for (int n = 0; n < p.n; ++n) {
    comp[n] = random.range(-255, 255) * random.range(0, 127) * p.taps;
    scale[n] = random_scale(p.taps * 255.0 * 128, random);
    bias[n] = random_bias(random);
  }
  p.w = w, p.comp = comp, p.scale = scale, p.bias = bias;
  random_clamp(&p.qmin, &p.qmax, random);
  const size_t count = (pixels - 1) * p.c_stride + p.n;
  p.c = m.c.place<uint8_t>(count, at_end, random);
  DepthwiseParams expected = p;
  expected.c = m.c_expected.place<uint8_t>(count, at_end, random);
  m.c_expected.copy_from(m.c);
  describe(
      "%s depthwise taps=%d n=%d pixels=%d a_stride=%td w_stride=%td c_stride=%td at_end=%d a=%s w=%s qmin=%d qmax=%d "
      "seed=%llu",
      kernels.isa, p.taps, p.n, pixels, p.a_stride, p.w_stride, p.c_stride, at_end, fill_name(a_fill),
      fill_name(w_fill), p.qmin, p.qmax, static_cast<unsigned long long>(seed));
  kernels.depthwise(&p, pixels);
  scalar.depthwise(&expected, pixels);
  return m.c.equals(m.c_expected) || failed("depthwise");
}

// ---- Pools ---------------------------------------------------------------------------------------------------------

bool check_pools(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1);
  AvgPoolParams p{};
  PoolParams& window = p.window;
  const int largest = random.range(0, 5) ? 4 : 40;  // beyond 257 pixels, sums of u8 no longer fit in u16
  window.rows = random.range(1, largest), window.cols = random.range(1, largest);
  window.n = random.range(1, 200);
  window.col_stride = window.n * random.range(1, 2) + random.range(0, 5);
  window.row_stride = window.col_stride * window.cols + random.range(0, 50);
  window.pixels = random.range(1, 3);
  window.a_stride = random.range(0, 300);
  window.c_stride = window.n + random.range(0, 1) * random.range(0, 70);
  const size_t a_count = (window.pixels - 1) * window.a_stride + (window.rows - 1) * window.row_stride +
                         (window.cols - 1) * window.col_stride + window.n;
  const size_t c_count = (window.pixels - 1) * window.c_stride + window.n;
  uint8_t* a = m.a.place<uint8_t>(a_count, at_end, random);
  fill_u8(a, a_count, random.pick(kFills), random);
  window.a = a;
  p.zero_point = random.range(0, 255);
  p.scale = random_scale(window.rows * window.cols * 255.0, random);
  p.bias = random_bias(random);
  random_clamp(&p.qmin, &p.qmax, random);

  describe(
      "%s pool rows=%zu cols=%zu n=%zu pixels=%zu row_stride=%td col_stride=%td a_stride=%td c_stride=%td "
      "zero_point=%d scale=%a bias=%a qmin=%d qmax=%d "
      "at_end=%d seed=%llu",
      kernels.isa, window.rows, window.cols, window.n, window.pixels, window.row_stride, window.col_stride,
      window.a_stride, window.c_stride, p.zero_point, p.scale, p.bias, p.qmin, p.qmax, at_end,
      static_cast<unsigned long long>(seed));
  const auto same = [&](const char* name, size_t size, auto run) {
    uint8_t* c = m.c.place<uint8_t>(c_count * size, at_end, random, size);
    uint8_t* c_expected = m.c_expected.place<uint8_t>(c_count * size, at_end, random, size);
    m.c_expected.copy_from(m.c);
    run(kernels, c);
    run(scalar, c_expected);
    return m.c.equals(m.c_expected) || failed(name);
  };
  return same("max_pool", 1, [&](const Kernels& t, uint8_t* c) { t.max_pool(&window, c); }) &&
         same("avg_pool_qu8", 1, [&](const Kernels& t, uint8_t* c) { t.avg_pool_qu8(&p, c); }) &&
         same("avg_pool_f32", 4,
              [&](const Kernels& t, uint8_t* c) { t.avg_pool_f32(&p, reinterpret_cast<float*>(c)); });
}

// ---- Elementwise and input -----------------------------------------------------------------------------------------

bool check_elementwise(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1);
  const size_t n = random.range(1, random.range(0, 3) ? 200 : 5000);
  uint8_t* a = m.a.place<uint8_t>(n, at_end, random);
  uint8_t* b = m.b.place<uint8_t>(n, at_end, random);
  uint8_t* table = m.w.place<uint8_t>(256, at_end, random);
  AddParams p{random.uniform() * 4 - 2, random.uniform() * 4 - 2, random_bias(random), 0, 0};
  random_clamp(&p.qmin, &p.qmax, random);
  const int in_place = random.range(0, 2);  // 0: no, 1: c is a, 2: c is b

  describe("%s elementwise n=%zu scale_a=%a scale_b=%a bias=%a qmin=%d qmax=%d in_place=%d at_end=%d seed=%llu",
           kernels.isa, n, p.scale_a, p.scale_b, p.bias, p.qmin, p.qmax, in_place, at_end,
           static_cast<unsigned long long>(seed));
  const auto same = [&](const char* name, size_t size, auto run) {
    uint8_t* c = m.c.place<uint8_t>(n * size, at_end, random, size);
    uint8_t* c_expected = m.c_expected.place<uint8_t>(n * size, at_end, random, size);
    const bool c_is_a = in_place == 1 && size == 1, c_is_b = in_place == 2 && size == 1;
    if (c_is_a || c_is_b) memcpy(c, c_is_a ? a : b, n);
    m.c_expected.copy_from(m.c);
    run(kernels, c_is_a ? c : a, c_is_b ? c : b, c);
    run(scalar, a, b, c_expected);
    return m.c.equals(m.c_expected) || failed(name);
  };
  using Bytes = const uint8_t*;
  return same("add_qu8", 1, [&](const Kernels& t, Bytes x, Bytes y, uint8_t* c) { t.add_qu8(&p, n, x, y, c); }) &&
         same("add_f32", 4,
              [&](const Kernels& t, Bytes x, Bytes y, uint8_t* c) {
                t.add_f32(&p, n, x, y, reinterpret_cast<float*>(c));
              }) &&
         same("table", 1, [&](const Kernels& t, Bytes x, Bytes, uint8_t* c) { t.table(n, table, x, c); });
}

float random_input(float inv_scale, Random& random) {
  switch (random.range(0, 9)) {
    case 0:
      return (random.range(-300, 300) + 0.5f) / inv_scale;  // near a tie
    case 1:
      return std::ldexp(random.uniform() - 0.5f, random.range(-140, 127));
    case 2:
      return random.range(0, 1) ? std::numeric_limits<float>::max() : std::numeric_limits<float>::lowest();
    default:
      return (random.uniform() * 400 - 200) / inv_scale;
  }
}

bool check_quantize(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  static const float kNotFinite[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                                     std::numeric_limits<float>::quiet_NaN(),
                                     std::numeric_limits<float>::signaling_NaN()};
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1);
  static const size_t kChannels[] = {1, 1, 2, 3, 3, 3, 4, 5, 7, 16, 33};
  QuantizeParams p{};
  p.channels = random.pick(kChannels);
  p.pixels = random.range(1, random.range(0, 3) ? 70 : 600);
  p.plane_stride = p.pixels + random.range(0, 1) * random.range(0, 20);
  p.c_stride = p.channels + random.range(0, 1) * random.range(0, 5);
  p.inv_scale = random.range(0, 2) ? random.uniform() * 100 + 0.1f : std::ldexp(1.f, random.range(-3, 6));
  p.zero_point = static_cast<float>(random.range(0, 255));
  const size_t a_count = (p.channels - 1) * p.plane_stride + p.pixels;
  float* a = m.a.place<float>(a_count, at_end, random);
  const float outside =
      random.range(0, 1) ? kNotFinite[0] : kNotFinite[2];  // what lies between and around the planes is not input
  for (size_t i = 0; i < a_count; ++i) a[i] = outside;
  for (int i = 1; i <= 16; ++i) a[-i] = outside;
  for (size_t ch = 0; ch < p.channels; ++ch)
    for (size_t i = 0; i < p.pixels; ++i) a[ch * p.plane_stride + i] = random_input(p.inv_scale, random);
  const bool finite = random.range(0, 3) != 0;
  if (!finite) a[random.next() % p.channels * p.plane_stride + random.next() % p.pixels] = random.pick(kNotFinite);
  p.a = a;
  const size_t count = (p.pixels - 1) * p.c_stride + p.channels;
  p.c = m.c.place<uint8_t>(count, at_end, random);
  QuantizeParams expected = p;
  expected.c = m.c_expected.place<uint8_t>(count, at_end, random);
  m.c_expected.copy_from(m.c);
  describe(
      "%s quantize pixels=%zu channels=%zu plane_stride=%td c_stride=%td inv_scale=%a zero_point=%g finite=%d "
      "at_end=%d seed=%llu",
      kernels.isa, p.pixels, p.channels, p.plane_stride, p.c_stride, p.inv_scale, p.zero_point, finite, at_end,
      static_cast<unsigned long long>(seed));
  if (kernels.quantize(&p) != finite) return failed("quantize, what it returned");
  scalar.quantize(&expected);
  return !finite || m.c.equals(m.c_expected) || failed("quantize");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  if (!check_conv_all(scalar, kernels)) return false;
  for (uint64_t seed = 1; seed <= 2000; ++seed)
    if (!check_depthwise(scalar, kernels, seed) || !check_pools(scalar, kernels, seed) ||
        !check_elementwise(scalar, kernels, seed) || !check_quantize(scalar, kernels, seed))
      return false;
  return true;
}

// ---- Benchmark -----------------------------------------------------------------------------------------------------

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

// Bytes aligned as the engine aligns its buffers, with the slack around them.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t count, T value = 0) : bytes_(count * sizeof(T) + 4 * kOverread) {
    std::fill_n(data(), count, value);
  }
  T* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes_.data()) + 2 * kOverread;
    return reinterpret_cast<T*>(at - at % kOverread);
  }

 private:
  std::vector<uint8_t> bytes_;
};

// GMAC/s of `tiles` tiles of r x groups neighbouring pixels, a 1x1 convolution of `channels` outputs, panel after
// panel.
double bench_conv(const ConvKernel& kernel, int k, int r, int groups, int tiles, int channels, bool residual) {
  const int pixels = tiles * groups * r, n_panels = channels / kernel.nr;
  const size_t panel = panel_bytes(kernel, 1, k);
  Aligned<uint8_t> a(static_cast<size_t>(pixels) * k, 3), w(panel * n_panels, 1),
      c(static_cast<size_t>(pixels) * channels);
  Aligned<int32_t> comp(kernel.nr);
  Aligned<float> scale(kernel.nr, 0.01f), bias(kernel.nr, 1.f);
  std::vector<ConvTile> list(tiles);
  for (int i = 0; i < tiles; ++i)
    for (int g = 0; g < groups; ++g) {
      const uint32_t pixel = static_cast<uint32_t>((i * groups + g) * r);
      list[i].a[g] = pixel * k, list[i].c[g] = list[i].residual[g] = pixel * channels;
      list[i].r = static_cast<uint8_t>(r), list[i].groups = static_cast<uint8_t>(groups);
    }
  const int32_t offset = 0;
  ConvParams p{};
  p.taps = 1, p.k = k, p.n = kernel.nr;
  p.a = a.data(), p.a_stride = k, p.tap_offset = &offset;
  p.comp = comp.data(), p.scale = scale.data(), p.bias = bias.data();
  p.c_stride = p.residual_stride = channels, p.residual_scale = 0.5f;
  p.qmax = 255, p.prefetch_bytes = panel;
  const double seconds = quickest([&] {
    for (int i = 0; i < n_panels; ++i) {
      p.w = w.data() + i * panel;
      p.c = c.data() + i * kernel.nr;
      p.residual = residual ? c.data() + i * kernel.nr : nullptr;
      p.prefetch = w.data() + (i + 1) % n_panels * panel;
      kernel.qu8(&p, list.data(), list.size());
    }
  });
  return 1e-9 * pixels * k * kernel.nr * n_panels / seconds;
}

void bench_conv_all(const Kernels& kernels) {
  const char* previous = "";
  for (int bits = 8; bits >= 2; --bits) {
    const ConvKernel& kernel = kernels.conv[bits];
    if (strcmp(kernel.name, previous) == 0) continue;
    previous = kernel.name;
    printf("%-46s GMAC/s at K =", kernel.name);
    for (int k : {64, 128, 256, 512, 1024, 2048, 4608})
      printf(" %d: %.0f", k, bench_conv(kernel, k, kernel.mr, kernel.groups, 8, 4 * kernel.nr, false));
    printf(" | 256 with residual: %.0f | K=256, pixels",
           bench_conv(kernel, 256, kernel.mr, kernel.groups, 8, 4 * kernel.nr, true));
    for (int r : {1, 2, 4, kernel.mr})
      if (r <= kernel.mr) printf(" %d: %.0f", r, bench_conv(kernel, 256, r, 1, 8, 4 * kernel.nr, false));
    const double gmacs = bench_conv(kernel, 2048, 1, 1, 1, 8192, false);
    printf(" | linear 2048x8192: %.1f GB/s\n", gmacs * (kernel.format == WeightFormat::s8x4 ? 1 : 2));
  }
}

void bench_others(const Kernels& kernels) {
  constexpr int kN = 128, kPixels = 28;
  Aligned<uint8_t> a(1 << 20, 7), c(1 << 20), table(256, 1);
  Aligned<int8_t> w(9 * kN, 1);
  Aligned<int32_t> comp(kN);
  Aligned<float> scale(kN, 0.01f), bias(kN, 1.f), image(3 * 224 * 224, 0.5f);
  int32_t offsets[9];
  for (int t = 0; t < 9; ++t) offsets[t] = (t / 3 * 30 + t % 3) * kN;
  const uint8_t* in = a.data();
  uint8_t* out = c.data();
  const DepthwiseParams depthwise = {9,           kN,           in,          kN,  offsets, w.data(), kN,
                                     comp.data(), scale.data(), bias.data(), out, kN,      0,        255};
  const PoolParams window = {in, 3, 3, 30 * kN, kN, kN, kPixels, kN, kN};
  const AvgPoolParams average = {{in, 7, 7, 7 * 2048, 2048, 2048, 1, 0, 0}, 0, 0.02f, 0, 0, 255};
  const AddParams add = {0.5f, 0.5f, 0, 0, 255};
  const QuantizeParams quantize = {image.data(), 224 * 224, 224 * 224, 3, 50, 128, out, 3};
  constexpr size_t kBytes = 1 << 16;
  const auto rate = [](double count, double seconds) { return 1e-9 * count / seconds; };
  printf(
      "%-46s depthwise 3x3 n=128: %.1f GMAC/s | max_pool 3x3: %.1f GB/s | avg_pool 7x7: %.1f GB/s | add: %.2f | table: "
      "%.2f Gelement/s"
      " | quantize 3 planes: %.2f Gfloat/s\n",
      kernels.isa, rate(9.0 * kN * kPixels * 20, quickest([&] {
                          for (int i = 0; i < 20; ++i) kernels.depthwise(&depthwise, kPixels);
                        })),
      rate(9.0 * kN * kPixels * 20, quickest([&] {
             for (int i = 0; i < 20; ++i) kernels.max_pool(&window, out);
           })),
      rate(49.0 * 2048 * 5, quickest([&] {
             for (int i = 0; i < 5; ++i) kernels.avg_pool_qu8(&average, out);
           })),
      rate(kBytes, quickest([&] { kernels.add_qu8(&add, kBytes, in, in + kBytes, out); })),
      rate(kBytes, quickest([&] { kernels.table(kBytes, table.data(), in, out); })),
      rate(3.0 * 224 * 224, quickest([&] { kernels.quantize(&quantize); })));
}

// The tables of this CPU from scalar upwards, and AVX-VNNI in its EVEX form where the CPU has that.
std::vector<Kernels> tables() {
  std::vector<Kernels> all;
  for (const std::string& isa : available_isas()) all.push_back(kernels_for(isa));
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    all.push_back(kernels_for("avx2"));
    init_avxvnni_as_evex(&all.back());
    all.back().isa = "avxvnni in EVEX form";
  }
#endif
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  signal(SIGSEGV, report_crash);
  signal(SIGILL, report_crash);
  const bool bench = argc > 1 && strcmp(argv[1], "--bench") == 0;
  for (const Kernels& kernels : tables()) {
    if (bench) {
      bench_conv_all(kernels);
      bench_others(kernels);
    } else if (!check(kernels_for("scalar"), kernels)) {
      return 1;
    } else {
      printf("%s: all kernels equal scalar\n", kernels.isa);
    }
  }
  return 0;
}
