// Depthwise convolutions.
#include "check_ukernels.h"

namespace qdeploy {
namespace {

// The offsets of the cells, and as many activations as `pixels` outputs reach through them.
void place_input(int pixels, Fill fill, bool at_end, Random& random, DepthwiseParams* p) {
  int32_t* cell_offset = memory().offsets.place<int32_t>(p->cells, at_end, random);
  for (int t = 0; t < p->cells; ++t) cell_offset[t] = random.range(-2000, 5000);
  const int64_t lowest = *std::min_element(cell_offset, cell_offset + p->cells);
  const int64_t highest = *std::max_element(cell_offset, cell_offset + p->cells) + (pixels - 1) * p->a_stride + p->n;
  uint8_t* a = memory().a.place<uint8_t>(highest - lowest, at_end, random);
  fill_u8(a, highest - lowest, fill, random);
  p->cell_offset = cell_offset;
  p->a = a - lowest;
}

// Weights, comp, multiplier and bias, readable up to a multiple of kMaxNr.
void place_channels(Fill fill, bool at_end, Random& random, DepthwiseParams* p) {
  Memory& m = memory();
  const int readable = (p->n + kMaxNr - 1) / kMaxNr * kMaxNr;
  p->w_stride = readable + 16 * random.range(0, 1);
  int8_t* w = m.w.place<int8_t>((p->cells - 1) * p->w_stride + readable, at_end, random);
  for (int t = 0; t < p->cells; ++t)
    for (int n = 0; n < p->n; ++n) w[t * p->w_stride + n] = static_cast<int8_t>(fill_value(fill, -128, 127, random));
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
  static const int kCells[] = {1, 2, 3, 9, 9, 15, 25, 49};
  const bool at_end = random.range(0, 1);
  const Fill a_fill = random.pick(kFills), w_fill = random.pick(kFills);
  const int pixels = random.range(1, 20);
  DepthwiseParams p{};
  p.cells = random.pick(kCells);
  p.n = random.range(0, 2) ? random.range(1, 200) : 16 * random.range(1, 12);
  p.a_stride = random.range(0, 1) ? p.n : 2 * p.n + random.range(0, 9);
  p.c_stride = p.n + random.range(0, 1) * random.range(0, 70);
  place_input(pixels, a_fill, at_end, random, &p);
  place_channels(w_fill, at_end, random, &p);
  random_clamp(&p.qmin, &p.qmax, random);
  const Outputs outputs = place_outputs((pixels - 1) * p.c_stride + p.n, 1, at_end, random);
  describe(
      "%s depthwise cells=%d n=%d pixels=%d a_stride=%td w_stride=%td c_stride=%td at_end=%d a=%s w=%s qmin=%d qmax=%d "
      "seed=%llu",
      kernels.isa, p.cells, p.n, pixels, p.a_stride, p.w_stride, p.c_stride, at_end, fill_name(a_fill),
      fill_name(w_fill), p.qmin, p.qmax, static_cast<unsigned long long>(seed));
  p.c = outputs.c;
  kernels.depthwise(&p, pixels);
  p.c = outputs.expected;
  scalar.depthwise(&p, pixels);
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
  constexpr int kN = 128, kPixels = 28;
  Aligned<uint8_t> a(1 << 20, 7), c(1 << 20);
  Aligned<int8_t> w(9 * kN, 1);
  Aligned<int32_t> comp(kN);
  Aligned<float> multiplier(kN, 0.01f), bias(kN, 1.f);
  int32_t offsets[9];
  for (int t = 0; t < 9; ++t) offsets[t] = (t / 3 * 30 + t % 3) * kN;
  const DepthwiseParams p = {9,           kN,       a.data(), kN, offsets, w.data(), kN, comp.data(), multiplier.data(),
                             bias.data(), c.data(), kN,       0,  255};
  printf("%-46s depthwise 3x3 n=128: %.1f GMAC/s\n", kernels.isa, rate(9.0 * kN * kPixels * 20, [&] {
           for (int i = 0; i < 20; ++i) kernels.depthwise(&p, kPixels);
         }));
  bench_f32(kernels);
}

}  // namespace

const Family kDepthwiseFamily = {check, bench};

}  // namespace qdeploy
