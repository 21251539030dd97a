// Convolutions: every tile shape of every kernel, with random layers, strides, residuals and outputs.
//
// A grouped kernel is compared with its dense twin: the scalar kernel over all bytes of the window, with codes that are
// zero outside of each channel's group.
#include "check_ukernels.h"

#include <limits>

namespace qdeploy {
namespace {

struct ConvCase {
  int bits, r, strips, cells, k, n;
  int outputs = 0;  // of each group of k channels; 0: a dense kernel
  int a_stride, c_stride;
  bool wide_codes;  // of 8 bits, as far as ConvKernel::s16_quads allows
  Dtype out, residual_type;
  bool residual, in_place, at_end, inner;
  Fill a_fill, w_fill;
  uint8_t qmin, qmax;
  uint64_t seed;

  int window() const { return outputs ? kGroupedWindow : k; }  // bytes of a cell that the scalar kernel reads
};

void describe_case(const char* kernel, const ConvCase& x) {
  describe(
      "%s bits=%d r=%d strips=%d cells=%d k=%d n=%d outputs=%d a_stride=%d c_stride=%d wide_codes=%d residual=%d "
      "inner=%d in_place=%d out=%d residual_type=%d at_end=%d a=%s w=%s qmin=%d qmax=%d seed=%llu",
      kernel, x.bits, x.r, x.strips, x.cells, x.k, x.n, x.outputs, x.a_stride, x.c_stride, x.wide_codes, x.residual,
      x.inner, x.in_place, static_cast<int>(x.out), static_cast<int>(x.residual_type), x.at_end, fill_name(x.a_fill),
      fill_name(x.w_fill), x.qmin, x.qmax, static_cast<unsigned long long>(x.seed));
}

ConvCase random_case(const ConvKernel& kernel, int bits, int r, int strips, Random& random) {
  static const int kDepths[] = {4, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 60, 64, 96, 100, 124, 200};
  ConvCase x;
  x.bits = bits, x.r = r, x.strips = strips;
  x.cells = random.range(1, 9);
  x.k = random.pick(kDepths);
  if (x.k > kernel.k_multiple / 4) x.k = (x.k + kernel.k_multiple - 1) / kernel.k_multiple * kernel.k_multiple;
  x.n = random.range(0, 1) ? kernel.nr : random.range(1, kernel.nr);
  const int strides[] = {x.k, x.k + 1, 3, 6, 2 * x.k + 5, 0, -x.k};
  x.a_stride = random.pick(strides);
  x.c_stride = x.n + (random.range(0, 1) ? 0 : random.range(1, 70));
  x.wide_codes = kernel.s16_quads > 0 && random.range(0, 1);
  x.residual = random.range(0, 1);
  static const Dtype kOut[] = {Dtype::u8, Dtype::u8, Dtype::s16, Dtype::f32};
  x.out = random.pick(kOut);
  x.residual_type = random.range(0, 2) ? Dtype::u8 : Dtype::s16;
  x.in_place = x.residual && x.out == x.residual_type && random.range(0, 1);
  x.inner = x.residual && random.range(0, 1);
  x.at_end = random.range(0, 1);
  x.a_fill = random.pick(kFills), x.w_fill = random.pick(kFills);
  random_clamp(&x.qmin, &x.qmax, random);
  x.seed = (uint64_t{random.next()} << 32) | random.next();
  return x;
}

// A grouped convolution with the output channels of a group as wide as the group or wider.
ConvCase random_grouped_case(const ConvKernel& kernel, int r, int strips, Random& random) {
  static const int kShapes[][2] = {{4, 4}, {4, 8}, {4, 32}, {8, 8}, {8, 16}, {12, 16}, {12, 32}, {16, 16}, {16, 32}};
  ConvCase x = random_case(kernel, 8, r, strips, random);
  const int* shape = kShapes[random.next() % 9];
  x.k = shape[0], x.outputs = shape[1];
  x.out = x.residual_type = Dtype::u8;
  x.in_place = x.residual && x.in_place;
  x.inner = false;
  return x;
}

ConvFn conv_of(const ConvKernel& kernel, Dtype out) {
  return out == Dtype::f32 ? kernel.f32 : out == Dtype::s16 ? kernel.s16 : kernel.qu8;
}

// ---- Operands -------------------------------------------------------------------------------------------------------

struct Tiles {
  std::vector<ConvTile> list;
  int slots = 0;  // pixels of the output, with the gaps between them
};

// Up to three tiles of the asked shape, then a few of any: kernels may treat runs of equal tiles alike.
Tiles random_tiles(const ConvKernel& kernel, const ConvCase& x, Random& random) {
  Tiles tiles;
  const int n_tiles = random.range(1, 5);
  const int strip_span = 3 * x.k + 40;  // bytes between the first pixels of two strips; they may overlap
  const int first = x.a_stride < 0 ? -x.a_stride * (kernel.mr - 1) : 0;
  for (int i = 0; i < n_tiles; ++i) {
    ConvTile tile{};
    tile.r = static_cast<uint8_t>(i < 3 ? x.r : random.range(1, kernel.mr));
    tile.strips = static_cast<uint8_t>(i < 3 ? x.strips : random.range(1, kernel.strips));
    for (int s = 0; s < tile.strips; ++s) {
      tile.a[s] = static_cast<uint32_t>((2 * i + s) * strip_span + first);
      tile.c[s] = tile.residual[s] = static_cast<uint32_t>(tiles.slots * x.c_stride);
      tiles.slots += tile.r + random.range(0, 1);
    }
    tiles.list.push_back(tile);
  }
  return tiles;
}

// The offsets of the cells, and as many activations as the tiles reach through them.
void place_input(const ConvCase& x, const std::vector<ConvTile>& tiles, Random& random, ConvParams* p) {
  int32_t* cell_offset = memory().offsets.place<int32_t>(x.cells, x.at_end, random);
  for (int t = 0; t < x.cells; ++t) cell_offset[t] = random.range(-100, 300);
  int64_t lowest = std::numeric_limits<int64_t>::max(), highest = std::numeric_limits<int64_t>::min();
  for (const ConvTile& tile : tiles)
    for (int s = 0; s < tile.strips; ++s)
      for (int pixel : {0, tile.r - 1})
        for (int t = 0; t < x.cells; ++t) {
          const int64_t at = int64_t{tile.a[s]} + pixel * x.a_stride + cell_offset[t];
          lowest = std::min(lowest, at), highest = std::max(highest, at + x.window());
        }
  uint8_t* a = memory().a.place<uint8_t>(highest - lowest, x.at_end, random);
  fill_u8(a, highest - lowest, x.a_fill, random);
  p->cell_offset = cell_offset;
  p->a = a - lowest;
  p->a_stride = x.a_stride;
}

// Any codes that sum up to at most 128 on either side of zero wherever the kernel adds their products in 16 bits: the
// first ones that are too large take all that is left, so that most sums are exactly 128.
void limit_sums(int8_t* codes, int k, int s16_quads) {
  for (int begin = 0; begin < k; begin += 4 * s16_quads) {
    int left[2][2] = {{128, 128}, {128, 128}};  // [half of a quad][positive or negative]
    for (int i = begin; i < std::min(k, begin + 4 * s16_quads); ++i) {
      int& limit = left[i / 2 % 2][codes[i] < 0];
      const int magnitude = std::min(std::abs(codes[i]), limit);
      limit -= magnitude;
      codes[i] = static_cast<int8_t>(codes[i] < 0 ? -magnitude : magnitude);
    }
  }
}

// [n][cells*window]
std::vector<int8_t> random_codes(const ConvKernel& kernel, const ConvCase& x, Random& random) {
  std::vector<int8_t> codes(static_cast<size_t>(x.n) * x.cells * x.window());
  const int largest = 1 << ((x.wide_codes ? 8 : x.bits) - 1);
  for (int8_t& code : codes) code = static_cast<int8_t>(fill_value(x.w_fill, -largest, largest - 1, random));
  for (int t = 0; t < x.n * x.cells && x.wide_codes; ++t) limit_sums(&codes[t * x.k], x.k, kernel.s16_quads);
  return codes;
}

std::vector<int32_t> lanes_of(const ConvCase& x, int nr) {
  std::vector<int32_t> lanes;
  for (int s = 0; s < x.k / 4 && x.outputs; ++s)
    for (int n = 0; n < nr; ++n) lanes.push_back(n / x.outputs * (x.k / 4) + s);
  return lanes;
}

// Clears all dense codes that lie outside their channel's group and returns those inside, [n][cells*k].
std::vector<int8_t> grouped_codes(const ConvCase& x, std::vector<int8_t>* dense) {
  std::vector<int8_t> codes;
  for (int n = 0; n < x.n; ++n)
    for (int t = 0; t < x.cells; ++t)
      for (int i = 0; i < kGroupedWindow; ++i) {
        int8_t& code = (*dense)[(n * x.cells + t) * kGroupedWindow + i];
        if (i / x.k == n / x.outputs)
          codes.push_back(code);
        else
          code = 0;
      }
  return codes;
}

// Codes are [n][cells*k]; channels beyond n are zero.
template <class T>
void pack(const int8_t* codes, int cells, int k, int n, int nr, int kr, T* w) {
  for (int t = 0; t < cells; ++t)
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < nr; ++j)
        w[((t * (k / kr) + i / kr) * nr + j) * kr + i % kr] = j < n ? codes[(j * cells + t) * k + i] : 0;
}
void pack(const ConvKernel& kernel, const int8_t* codes, int cells, int k, int n, void* w) {
  if (kernel.format == WeightFormat::s8x4)
    pack(codes, cells, k, n, kernel.nr, 4, static_cast<int8_t*>(w));
  else
    pack(codes, cells, k, n, kernel.nr, 2, static_cast<int16_t*>(w));
}
size_t panel_bytes(const ConvKernel& kernel, int cells, int k) {
  return static_cast<size_t>(cells) * k * kernel.nr * (kernel.format == WeightFormat::s8x4 ? 1 : 2);
}

void place_weights(const ConvKernel& kernel, const ConvCase& x, std::vector<int8_t>* codes, Random& random,
                   ConvParams* p) {
  uint8_t* w = memory().w.place<uint8_t>(panel_bytes(kernel, x.cells, x.k), x.at_end, random, 64);
  pack(kernel, x.outputs ? grouped_codes(x, codes).data() : codes->data(), x.cells, x.k, x.n, w);
  p->w = w;
}

// comp, multiplier and bias. Returns comp for the scalar kernel, whose a_offset is 0.
std::vector<int32_t> place_channels(const ConvKernel& kernel, const ConvCase& x, const std::vector<int8_t>& codes,
                                    int zero_point, Random& random, ConvParams* p) {
  int32_t* comp = memory().comp.place<int32_t>(kernel.nr, x.at_end, random);
  float* multiplier = memory().multiplier.place<float>(kernel.nr, x.at_end, random);
  float* bias = memory().bias.place<float>(kernel.nr, x.at_end, random);
  const int depth = x.cells * x.window();
  const double largest_sum =
      depth * 255.0 * (1 << (x.bits - 1)) / (x.w_fill == Fill::small || x.a_fill == Fill::small ? 50 : 1);
  std::vector<int32_t> comp_expected(kernel.nr);
  for (int n = 0; n < kernel.nr; ++n) {
    int sum = 0;
    for (int i = 0; i < depth && n < x.n; ++i) sum += codes[n * depth + i];
    comp[n] = (kernel.a_offset - zero_point) * sum;
    comp_expected[n] = -zero_point * sum;
    multiplier[n] = n < x.n ? random_multiplier(largest_sum, random) * (x.out == Dtype::s16 ? 256 : 1) : 0;
    bias[n] = n < x.n ? random_bias(random) : 0;
  }
  p->comp = comp, p->multiplier = multiplier, p->bias = bias;
  return comp_expected;
}

// Output, residual and inner codes. Returns the output of the scalar kernel.
uint8_t* place_output(const ConvCase& x, int slots, Random& random, InnerCodes* inner, ConvParams* p) {
  const size_t count = static_cast<size_t>(slots - 1) * x.c_stride + x.n;
  const Outputs outputs = place_outputs(count, size_of(x.out), x.at_end, random);
  p->c = outputs.c, p->c_stride = x.c_stride;
  p->qmin = x.qmin, p->qmax = x.qmax;
  if (x.residual) {
    const size_t size = size_of(x.residual_type);
    p->residual_type = x.residual_type;
    p->residual = x.in_place ? outputs.c : memory().residual.place<uint8_t>(count * size, x.at_end, random, size);
    p->residual_stride = x.c_stride;
    p->residual_multiplier = random.uniform() * 4 - 2;
  }
  if (x.inner) {
    *inner = random_inner_codes(random);
    p->inner = inner;
  }
  return outputs.expected;
}

// ---- Check ----------------------------------------------------------------------------------------------------------

// Every pixel of the tiles as a tile of its own.
std::vector<ConvTile> pixels_of(const std::vector<ConvTile>& tiles, const ConvParams& p) {
  std::vector<ConvTile> pixels;
  for (const ConvTile& tile : tiles)
    for (int q = 0; q < tile.r * tile.strips; ++q) {
      const int s = q / tile.r, i = q % tile.r;
      pixels.push_back({{static_cast<uint32_t>(tile.a[s] + i * p.a_stride)},
                        {static_cast<uint32_t>(tile.c[s] + i * p.c_stride)},
                        {static_cast<uint32_t>(tile.residual[s] + i * p.residual_stride)},
                        1,
                        1});
    }
  return pixels;
}

// The scalar kernel, one pixel and one of its own panels at a time; p holds the arrays of all n channels.
void conv_expected(const ConvKernel& scalar, ConvParams p, const std::vector<ConvTile>& tiles, const int8_t* codes,
                   Dtype out) {
  const int n = p.n, depth = p.cells * p.k;
  const std::vector<ConvTile> pixels = pixels_of(tiles, p);
  std::vector<uint8_t> w(panel_bytes(scalar, p.cells, p.k) + 64);
  p.w = w.data() + (64 - reinterpret_cast<uintptr_t>(w.data()) % 64);
  const ConvParams all = p;
  for (int first = 0; first < n; first += scalar.nr) {
    p.n = std::min(scalar.nr, n - first);
    pack(scalar, codes + first * depth, p.cells, p.k, p.n, const_cast<void*>(p.w));
    std::vector<int32_t> comp(scalar.nr);
    std::vector<float> multiplier(scalar.nr), bias(scalar.nr);
    std::copy_n(all.comp + first, p.n, comp.begin());
    std::copy_n(all.multiplier + first, p.n, multiplier.begin());
    std::copy_n(all.bias + first, p.n, bias.begin());
    p.comp = comp.data(), p.multiplier = multiplier.data(), p.bias = bias.data();
    p.c = static_cast<uint8_t*>(all.c) + first * size_of(out);
    if (all.residual) p.residual = static_cast<const uint8_t*>(all.residual) + first * size_of(all.residual_type);
    conv_of(scalar, out)(&p, pixels.data(), pixels.size());
  }
}

bool check_case(const ConvKernel& scalar, const ConvKernel& kernel, const ConvCase& x) {
  describe_case(kernel.name, x);
  Random random(x.seed);
  ConvParams p{};
  p.cells = x.cells, p.k = x.k, p.n = x.n;
  const Tiles tiles = random_tiles(kernel, x, random);
  place_input(x, tiles.list, random, &p);
  const int zero_point = random.range(0, 255);
  std::vector<int8_t> codes = random_codes(kernel, x, random);
  place_weights(kernel, x, &codes, random, &p);
  const std::vector<int32_t> lanes = lanes_of(x, kernel.nr);
  p.lanes = lanes.data();
  const std::vector<int32_t> comp_expected = place_channels(kernel, x, codes, zero_point, random, &p);
  InnerCodes inner;
  uint8_t* c_expected = place_output(x, tiles.slots, random, &inner, &p);
  p.prefetch = random.range(0, 1) ? p.w : nullptr;  // any address is allowed
  p.prefetch_bytes = random.range(0, 1) ? panel_bytes(kernel, x.cells, x.k) : 0;

  conv_of(kernel, x.out)(&p, tiles.list.data(), tiles.list.size());
  p.c = c_expected, p.comp = comp_expected.data(), p.k = x.window();
  if (x.in_place) p.residual = c_expected;
  conv_expected(scalar, p, tiles.list, codes.data(), x.out);
  return same_outputs(kernel.name);
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  Random random(1);
  for (int bits = 2; bits <= 8; ++bits) {
    const ConvKernel& kernel = kernels.conv[bits];
    for (int r = 1; r <= kernel.mr; ++r)
      for (int strips = 1; strips <= kernel.strips; ++strips)
        for (int i = 0; i < 40; ++i)
          if (!check_case(scalar.conv[bits], kernel, random_case(kernel, bits, r, strips, random))) return false;
  }
  const ConvKernel& grouped = kernels.grouped;
  for (int r = 1; grouped.qu8 && r <= grouped.mr; ++r)
    for (int i = 0; i < 200; ++i)
      if (!check_case(scalar.conv[8], grouped, random_grouped_case(grouped, r, random.range(1, 2), random)))
        return false;
  return true;
}

// ---- Benchmark ------------------------------------------------------------------------------------------------------

// GMAC/s of `tiles` tiles of r x strips neighbouring pixels: a 1x1 convolution of `channels` outputs by panels.
double bench_case(const ConvKernel& kernel, int k, int r, int strips, int tiles, int channels, bool residual) {
  const int pixels = tiles * strips * r, n_panels = channels / kernel.nr;
  const size_t panel = panel_bytes(kernel, 1, k);
  Aligned<uint8_t> a(static_cast<size_t>(pixels) * k, 3), w(panel * n_panels, 1),
      c(static_cast<size_t>(pixels) * channels);
  Aligned<int32_t> comp(kernel.nr);
  Aligned<float> multiplier(kernel.nr, 0.01f), bias(kernel.nr, 1.f);
  std::vector<ConvTile> list(tiles);
  for (int i = 0; i < tiles; ++i)
    for (int s = 0; s < strips; ++s) {
      const uint32_t pixel = static_cast<uint32_t>((i * strips + s) * r);
      list[i].a[s] = pixel * k, list[i].c[s] = list[i].residual[s] = pixel * channels;
      list[i].r = static_cast<uint8_t>(r), list[i].strips = static_cast<uint8_t>(strips);
    }
  const int32_t offset = 0;
  ConvParams p{};
  p.cells = 1, p.k = k, p.n = kernel.nr;
  p.a = a.data(), p.a_stride = k, p.cell_offset = &offset;
  p.comp = comp.data(), p.multiplier = multiplier.data(), p.bias = bias.data();
  p.c_stride = p.residual_stride = channels, p.residual_multiplier = 0.5f;
  p.qmax = 255, p.prefetch_bytes = panel;
  return rate(1.0 * pixels * k * kernel.nr * n_panels, [&] {
    for (int i = 0; i < n_panels; ++i) {
      p.w = w.data() + i * panel;
      p.c = c.data() + i * kernel.nr;
      p.residual = residual ? c.data() + i * kernel.nr : nullptr;
      p.prefetch = w.data() + (i + 1) % n_panels * panel;
      kernel.qu8(&p, list.data(), list.size());
    }
  });
}

void bench(const Kernels& kernels) {
  const char* previous = "";
  for (int bits = 8; bits >= 2; --bits) {
    const ConvKernel& kernel = kernels.conv[bits];
    if (strcmp(kernel.name, previous) == 0) continue;
    previous = kernel.name;
    printf("%-46s GMAC/s at K =", kernel.name);
    for (int k : {64, 128, 256, 512, 1024, 2048, 4608})
      printf(" %d: %.0f", k, bench_case(kernel, k, kernel.mr, kernel.strips, 8, 4 * kernel.nr, false));
    printf(" | 256 with residual: %.0f | K=256, pixels",
           bench_case(kernel, 256, kernel.mr, kernel.strips, 8, 4 * kernel.nr, true));
    for (int r : {1, 2, 4, kernel.mr})
      if (r <= kernel.mr) printf(" %d: %.0f", r, bench_case(kernel, 256, r, 1, 8, 4 * kernel.nr, false));
    const double gmacs = bench_case(kernel, 2048, 1, 1, 1, 8192, false);
    printf(" | linear 2048x8192: %.1f GB/s\n", gmacs * (kernel.format == WeightFormat::s8x4 ? 1 : 2));
  }
}

}  // namespace

const Family kConvFamily = {check, bench};

}  // namespace qdeploy
