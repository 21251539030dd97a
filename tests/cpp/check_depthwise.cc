// Depthwise convolutions.
#include "check_ukernels.h"

namespace qdeploy {
namespace {

// The offsets of the cells, and as many activations as the outputs reach through them.
void place_input(int rows, int pixels, Fill fill, bool at_end, Random& random, DepthwiseParams* p) {
  int32_t* cell_offset = memory().offsets.place<int32_t>(p->cells, at_end, random);
  for (int t = 0; t < p->cells; ++t) {
    const bool first = t % p->columns == 0;
    cell_offset[t] = first ? random.range(-2000, 5000) : cell_offset[t - 1] + static_cast<int32_t>(p->column_stride);
  }
  const int64_t lowest = *std::min_element(cell_offset, cell_offset + p->cells);
  const int64_t highest = *std::max_element(cell_offset, cell_offset + p->cells) + (rows - 1) * p->a_row_stride +
                          (pixels - 1) * p->a_stride + p->n;
  uint8_t* a = memory().a.place<uint8_t>(highest - lowest, at_end, random);
  fill_u8(a, highest - lowest, fill, random);
  p->cell_offset = cell_offset;
  p->a = a - lowest;
}

// One channel as DepthwiseParams::fits_s16 asks: the first codes that are too large take all that is left.
void limit_sums(int8_t* w, DepthwiseParams* p) {
  for (int begin = 0; begin < p->cells; begin += 2 * p->columns) {
    int left[2] = {128, 128};  // positive or negative
    for (int t = begin; t < std::min(p->cells, begin + 2 * p->columns); ++t) {
      int8_t& code = w[t * p->w_stride];
      int& limit = left[code < 0];
      const int magnitude = std::min(std::abs(code), limit);
      limit -= magnitude;
      code = static_cast<int8_t>(code < 0 ? -magnitude : magnitude);
    }
  }
}

// Weights, comp, multiplier and bias, readable up to a multiple of kMaxNr.
void place_channels(Fill fill, bool at_end, Random& random, DepthwiseParams* p) {
  Memory& m = memory();
  const int readable = (p->n + kMaxNr - 1) / kMaxNr * kMaxNr;
  p->w_stride = readable + 16 * random.range(0, 1);
  int8_t* w = m.w.place<int8_t>((p->cells - 1) * p->w_stride + readable, at_end, random);
  for (int t = 0; t < p->cells; ++t)
    for (int n = 0; n < p->n; ++n) w[t * p->w_stride + n] = static_cast<int8_t>(fill_value(fill, -128, 127, random));
  for (int n = 0; n < p->n && p->fits_s16; ++n) limit_sums(w + n, p);
  int32_t* comp = m.comp.place<int32_t>(readable, at_end, random);
  float* multiplier = m.multiplier.place<float>(readable, at_end, random);
  float* bias = m.bias.place<float>(readable, at_end, random);
  for (int n = 0; n < p->n; ++n) {
    comp[n] = random.range(-255, 255) * random.range(0, 127) * p->cells;
    multiplier[n] = random_multiplier(p->cells * 255.0 * 128, random);
    bias[n] = random_bias(random);
  }
  p->w = w, p->comp = comp, p->multiplier = multiplier, p->bias = bias;
}

bool check_case(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  static const int kWindows[][2] = {{1, 1}, {1, 2}, {3, 1}, {3, 3}, {3, 3}, {3, 3}, {3, 5}, {5, 5}, {7, 7}, {2, 37}};
  const bool at_end = random.range(0, 1);
  const Fill a_fill = random.pick(kFills), w_fill = random.pick(kFills);
  const int pixels = random.range(1, random.range(0, 3) ? 20 : 70), rows = random.range(1, 3);
  const int* window = kWindows[random.next() % 10];
  DepthwiseParams p{};
  p.cells = window[0] * window[1];
  p.columns = window[1];
  p.n = random.range(0, 2) ? random.range(1, 200) : 16 * random.range(1, 12);
  const int strides[] = {p.n, p.n, 2 * p.n, 2 * p.n + random.range(0, 9)};
  p.a_stride = random.pick(strides);
  const int column_strides[] = {p.n, p.n, (p.n + 1) / 2, 3 * p.n};
  p.column_stride = random.pick(column_strides);
  p.a_row_stride = random.range(0, 3000);
  p.c_stride = p.n + random.range(0, 1) * random.range(0, 70);
  p.c_row_stride = pixels * p.c_stride + random.range(0, 100);
  p.fits_s16 = random.range(0, 1);
  place_input(rows, pixels, a_fill, at_end, random, &p);
  place_channels(w_fill, at_end, random, &p);
  random_clamp(&p.qmin, &p.qmax, random);
  const Outputs outputs =
      place_outputs((rows - 1) * p.c_row_stride + (pixels - 1) * p.c_stride + p.n, 1, at_end, random);
  describe(
      "%s depthwise cells=%d columns=%d n=%d rows=%d pixels=%d a_stride=%td column_stride=%td w_stride=%td "
      "c_stride=%td "
      "fits_s16=%d at_end=%d a=%s w=%s qmin=%d qmax=%d seed=%llu",
      kernels.isa, p.cells, p.columns, p.n, rows, pixels, p.a_stride, p.column_stride, p.w_stride, p.c_stride,
      p.fits_s16, at_end, fill_name(a_fill), fill_name(w_fill), p.qmin, p.qmax, static_cast<unsigned long long>(seed));
  p.c = outputs.c;
  kernels.depthwise(&p, rows, pixels);
  p.c = outputs.expected;
  scalar.depthwise(&p, rows, pixels);
  if (!same_outputs("depthwise")) return false;
  const Outputs numbers = place_outputs((pixels - 1) * p.c_stride + p.n, sizeof(float), at_end, random);
  kernels.depthwise_f32(&p, pixels, reinterpret_cast<float*>(numbers.c));
  scalar.depthwise_f32(&p, pixels, reinterpret_cast<float*>(numbers.expected));
  return same_outputs("depthwise_f32");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  return check_seeds([&](uint64_t seed) { return check_case(scalar, kernels, seed); });
}

// The first layers of ConvNeXt: 7x7, and 96 channels.
void bench_f32(const Kernels& kernels) {
  constexpr int kN = 96, kPixels = 42, kCells = 49;
  Aligned<uint8_t> a(1 << 20, 7);
  Aligned<int8_t> w(kCells * 128, 1);
  Aligned<int32_t> comp(128);
  Aligned<float> multiplier(128, 0.01f), bias(128, 1.f), c(kN * kPixels);
  int32_t offsets[kCells];
  for (int t = 0; t < kCells; ++t) offsets[t] = (t / 7 * 62 + t % 7) * kN;
  DepthwiseParams p{};
  p.cells = kCells, p.n = kN, p.a = a.data(), p.a_stride = kN, p.cell_offset = offsets, p.w = w.data(),
  p.w_stride = 128;
  p.comp = comp.data(), p.multiplier = multiplier.data(), p.bias = bias.data(), p.c_stride = kN;
  printf("%-46s depthwise 7x7 n=96 to f32: %.1f GMAC/s\n", kernels.isa,
         rate(double{kCells} * kN * kPixels, [&] { kernels.depthwise_f32(&p, kPixels, c.data()); }));
}

void bench(const Kernels& kernels) {
  constexpr int kN = 128, kPixels = 28, kRows = 20;
  Aligned<uint8_t> a(1 << 20, 7), c(1 << 20);
  Aligned<int8_t> w(9 * kN, 1);
  Aligned<int32_t> comp(kN);
  Aligned<float> multiplier(kN, 0.01f), bias(kN, 1.f);
  int32_t offsets[9];
  for (int t = 0; t < 9; ++t) offsets[t] = (t / 3 * 30 + t % 3) * kN;
  DepthwiseParams p = {};
  p.cells = 9, p.columns = 3, p.n = kN;
  p.a = a.data(), p.a_row_stride = 30 * kN, p.a_stride = kN;
  p.cell_offset = offsets, p.column_stride = kN;
  p.w = w.data(), p.w_stride = kN;
  p.comp = comp.data(), p.multiplier = multiplier.data(), p.bias = bias.data();
  p.c = c.data(), p.c_row_stride = kPixels * kN, p.c_stride = kN;
  p.qmax = 255;
  for (const bool fits_s16 : {false, true}) {
    p.fits_s16 = fits_s16;
    printf("%-46s depthwise 3x3 n=128 fits_s16=%d: %.1f GMAC/s\n", kernels.isa, fits_s16,
           rate(9.0 * kN * kPixels * kRows, [&] { kernels.depthwise(&p, kRows, kPixels); }));
  }
  bench_f32(kernels);
}

}  // namespace

const Family kDepthwiseFamily = {check, bench};

}  // namespace qdeploy
