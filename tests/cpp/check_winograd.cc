// The Winograd kernels: each against the scalar one, and all three in a row against the plain sums of the convolution.
#include "check_ukernels.h"

namespace qdeploy {
namespace {

// As ukernels.h writes them.
struct Matrices {
  int m;
  int bt[6][6], g[6][3];
};
constexpr Matrices kMatrices[] = {
    {4,
     {{2, 3, -4, -3, 2, 0},
      {0, 2, 5, 1, -2, 0},
      {0, 2, 1, -5, 2, 0},
      {0, -1, -2, 1, 2, 0},
      {0, 2, -1, -2, 1, 0},
      {0, 2, 3, -4, -3, 2}},
     {{15, 0, 0}, {5, 5, 5}, {5, -5, 5}, {1, 2, 4}, {4, -2, 1}, {0, 0, 15}}},
    {2, {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}}, {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 2}}}};

int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- Input transform ------------------------------------------------------------------------------------------------

// Pixels that drive V at one position to its largest or smallest value.
void fill_for_position(const Matrices& f, int position, bool largest, const WinogradInput& p, uint8_t* a) {
  const int size = f.m + 2;
  for (int y = 0; y < size; ++y)
    for (int x = 0; x < size; ++x) {
      const int coefficient = f.bt[position / size][y] * f.bt[position % size][x];
      memset(a + y * p.row_stride + x * p.a_stride, (coefficient > 0) == largest ? 255 : 0, p.n);
    }
}

int v_of(const Matrices& f, int position, const WinogradInput& p, int channel) {
  const int size = f.m + 2;
  int sum = 0;
  for (int y = 0; y < size; ++y)
    for (int x = 0; x < size; ++x)
      sum += f.bt[position / size][y] * f.bt[position % size][x] *
             (p.a[y * p.row_stride + x * p.a_stride + channel] - p.zero_point);
  return sum;
}

bool check_input(const WinogradKernel& kernel, const Matrices& f, uint64_t seed) {
  static const uint8_t kZeroPoints[] = {0, 1, 128, 255};
  Random random(seed);
  const int size = f.m + 2, positions = size * size;
  WinogradInput p{};
  p.n = random.range(0, 1) ? random.range(1, 100) : 16 * random.range(1, 6);
  p.a_stride = p.n + random.range(0, 1) * random.range(0, 40);
  p.row_stride = size * p.a_stride + random.range(0, 1) * random.range(0, 100);
  p.zero_point = random.pick(kZeroPoints);
  const bool at_end = random.range(0, 1);
  const Fill fill = random.pick(kFills);
  const int driven = random.range(0, 1) ? random.range(0, positions - 1) : -1;
  const int chunks = round_up(p.n, kWinogradChunk) / kWinogradChunk, patches = random.range(1, 3);
  p.chunk_stride = patches * kWinogradChunk;
  p.position_stride = (chunks * patches + random.range(0, 1)) * kWinogradChunk;
  describe("%s input n=%d a_stride=%td row_stride=%td zero_point=%d at_end=%d a=%s driven=%d seed=%llu", kernel.name,
           p.n, p.a_stride, p.row_stride, p.zero_point, at_end, fill_name(fill), driven,
           static_cast<unsigned long long>(seed));
  const int64_t bytes = (size - 1) * (p.row_stride + p.a_stride) + p.n;
  uint8_t* a = memory().a.place<uint8_t>(bytes, at_end, random);
  fill_u8(a, bytes, fill, random);
  if (driven >= 0) fill_for_position(f, driven, random.range(0, 1), p, a);
  p.a = a;
  const int64_t last = (positions - 1) * p.position_stride + (chunks - 1) * p.chunk_stride + kWinogradChunk;
  p.v = memory().b.place<int16_t>(last, at_end, random, 64);
  kernel.input(&p);
  for (int position = 0; position < positions; ++position)
    for (int c = 0; c < p.n; ++c) {
      const int v = p.v[position * p.position_stride + c / kWinogradChunk * p.chunk_stride + c % kWinogradChunk];
      if (v != v_of(f, position, p, c)) return failed(kernel.name);  // which would differ if it did not fit s16
    }
  return true;
}

// ---- Products -------------------------------------------------------------------------------------------------------

bool check_products(const WinogradKernel& kernel, uint64_t seed) {
  Random random(seed);
  WinogradProducts p{};
  p.positions = random.range(0, 1) ? 16 : 36;
  p.patches = random.range(1, 2 * kernel.mr + 3);
  p.k = 8 * random.range(1, 12);
  const int chunks = round_up(p.k, kWinogradChunk) / kWinogradChunk;
  p.v_chunk_stride = p.patches * kWinogradChunk;
  p.v_position_stride = (chunks * p.patches + random.range(0, 1)) * kWinogradChunk;
  p.m_position_stride = p.patches * kernel.nr + 16 * random.range(0, 1);
  const bool at_end = random.range(0, 1);
  const Fill v_fill = random.pick(kFills), u_fill = random.pick(kFills);
  describe("%s products positions=%d patches=%d k=%d at_end=%d v=%s u=%s seed=%llu", kernel.name, p.positions,
           p.patches, p.k, at_end, fill_name(v_fill), fill_name(u_fill), static_cast<unsigned long long>(seed));
  const int64_t v_count = (p.positions - 1) * p.v_position_stride + chunks * p.v_chunk_stride;
  int16_t* v = memory().a.place<int16_t>(v_count, at_end, random, 64);
  for (int64_t i = 0; i < v_count; ++i) v[i] = static_cast<int16_t>(fill_value(v_fill, -32768, 32767, random));
  const int64_t u_count = int64_t{p.positions} * p.k * kernel.nr;
  int16_t* u = memory().w.place<int16_t>(u_count, at_end, random, 64);
  for (int64_t i = 0; i < u_count; ++i) u[i] = static_cast<int16_t>(fill_value(u_fill, -28800, 28800, random));
  p.v = v, p.u = u;
  const int64_t m_count = (p.positions - 1) * p.m_position_stride + p.patches * kernel.nr;
  p.m = memory().b.place<int32_t>(m_count, at_end, random, 64);
  kernel.products(&p);
  for (int position = 0; position < p.positions; ++position)
    for (int patch = 0; patch < p.patches; ++patch)
      for (int n = 0; n < kernel.nr; ++n) {
        uint32_t sum = 0;
        for (int c = 0; c < p.k; ++c) {
          const int at = c / kernel.pair * kernel.pair * kernel.nr + n * kernel.pair + c % kernel.pair;
          sum += static_cast<uint32_t>(v[position * p.v_position_stride + c / kWinogradChunk * p.v_chunk_stride +
                                         patch * kWinogradChunk + c % kWinogradChunk] *
                                       u[int64_t{position} * p.k * kernel.nr + at]);
        }
        if (static_cast<uint32_t>(p.m[position * p.m_position_stride + patch * kernel.nr + n]) != sum)
          return failed(kernel.name);
      }
  return true;
}

// ---- Output transform -----------------------------------------------------------------------------------------------

// M is anything at all: sums wrap.
bool check_output(const WinogradKernel& scalar, const WinogradKernel& kernel, uint64_t seed) {
  Random random(seed);
  WinogradOutput p{};
  p.rows = random.range(1, kernel.m), p.columns = random.range(1, kernel.m);
  p.n = random.range(0, 1) ? kernel.nr : random.range(1, kernel.nr);
  p.c_stride = p.n + random.range(0, 1) * random.range(0, 70);
  p.c_row_stride = kernel.m * p.c_stride + random.range(0, 50);
  p.position_stride = 16 * random.range(4, 8);
  const bool at_end = random.range(0, 1), f32 = random.range(0, 2) == 0, residual = random.range(0, 1);
  const bool in_place = residual && !f32 && random.range(0, 1), small = random.range(0, 1);
  random_clamp(&p.qmin, &p.qmax, random);
  const InnerCodes inner = random_inner_codes(random);
  if (residual && random.range(0, 1)) p.inner = &inner;
  describe(
      "%s output rows=%d columns=%d n=%d c_stride=%td f32=%d residual=%d inner=%d in_place=%d at_end=%d small=%d "
      "seed=%llu",
      kernel.name, p.rows, p.columns, p.n, p.c_stride, f32, residual, p.inner != nullptr, in_place, at_end, small,
      static_cast<unsigned long long>(seed));
  const int positions = (kernel.m + 2) * (kernel.m + 2);
  int32_t* m = memory().a.place<int32_t>((positions - 1) * p.position_stride + kernel.nr, at_end, random, 64);
  for (int i = 0; i < positions * kernel.nr && small; ++i)
    m[i / kernel.nr * p.position_stride + i % kernel.nr] = random.range(-(1 << 22), 1 << 22);
  float* multiplier = memory().multiplier.place<float>(kernel.nr, at_end, random);
  float* bias = memory().bias.place<float>(kernel.nr, at_end, random);
  for (int n = 0; n < kernel.nr; ++n) {
    multiplier[n] = n < p.n ? random_multiplier(small ? 1e8 : 5e8, random) : 0;
    bias[n] = n < p.n ? random_bias(random) : 0;
  }
  p.m = m, p.multiplier = multiplier, p.bias = bias;
  const size_t count = static_cast<size_t>((p.rows - 1) * p.c_row_stride + (p.columns - 1) * p.c_stride) + p.n;
  const Outputs outputs = place_outputs(count, f32 ? 4 : 1, at_end, random);
  p.residual_stride = p.c_stride, p.residual_row_stride = p.c_row_stride;
  p.residual_multiplier = random.uniform() * 4 - 2;
  p.c = outputs.c;
  if (residual) p.residual = in_place ? outputs.c : memory().residual.place<uint8_t>(count, at_end, random);
  (f32 ? kernel.f32 : kernel.qu8)(&p);
  p.c = outputs.expected;
  if (in_place) p.residual = outputs.expected;
  // The scalar kernel takes 16 channels at a time.
  const WinogradOutput all = p;
  for (int first = 0; first < all.n; first += scalar.nr) {
    p.n = std::min(scalar.nr, all.n - first);
    p.m = all.m + first, p.multiplier = all.multiplier + first, p.bias = all.bias + first;
    p.c = outputs.expected + first * (f32 ? 4 : 1);
    if (residual) p.residual = all.residual + first;
    (f32 ? scalar.f32 : scalar.qu8)(&p);
  }
  return same_outputs(kernel.name);
}

// ---- All three, against the plain sums ------------------------------------------------------------------------------

// The U of one output channel and one input channel, of 9 codes.
int u_of(const Matrices& f, int position, const int8_t* codes) {
  const int size = f.m + 2;
  int sum = 0;
  for (int y = 0; y < 3; ++y)
    for (int x = 0; x < 3; ++x) sum += f.g[position / size][y] * f.g[position % size][x] * codes[3 * y + x];
  return sum;
}

// One patch of any pixels: 9 * 1824 codes of -128 are the most that stay below 2^29.
bool check_sums(const WinogradKernel& kernel, const Matrices& f, uint64_t seed) {
  static const int kDepths[] = {1, 3, 8, 31, 32, 33, 64, 100, 256};
  Random random(seed);
  const bool deepest = seed % 40 == 0;
  const int depth = deepest ? 1824 : random.pick(kDepths), size = f.m + 2, positions = size * size;
  const int k = round_up(depth, 8), chunks = round_up(depth, kWinogradChunk) / kWinogradChunk;
  const uint8_t zero_point = random.range(0, 1) ? 0 : 255;
  const Fill a_fill = deepest ? (zero_point ? Fill::low : Fill::high) : random.pick(kFills);
  const Fill w_fill = deepest ? Fill::low : random.pick(kFills);
  const int outputs = random.range(1, std::min(4, kernel.nr));
  WinogradInput in{};
  in.n = depth, in.a_stride = depth, in.row_stride = size * depth, in.zero_point = zero_point;
  in.chunk_stride = kWinogradChunk, in.position_stride = chunks * kWinogradChunk;
  describe("%s depth=%d outputs=%d zero_point=%d a=%s w=%s seed=%llu", kernel.name, depth, outputs, in.zero_point,
           fill_name(a_fill), fill_name(w_fill), static_cast<unsigned long long>(seed));
  Aligned<uint8_t> a(positions * depth);
  fill_u8(a.data(), positions * depth, a_fill, random);
  std::vector<int8_t> codes(outputs * depth * 9);
  for (int8_t& code : codes) code = static_cast<int8_t>(fill_value(w_fill, -128, 127, random));
  Aligned<int16_t> v(positions * chunks * kWinogradChunk), u(positions * k * kernel.nr);
  for (int i = 0; i < positions * depth * outputs; ++i) {
    const int position = i / outputs / depth, c = i / outputs % depth, n = i % outputs;
    const int sum = u_of(f, position, &codes[(n * depth + c) * 9]);
    const int at = (position * k + c / kernel.pair * kernel.pair) * kernel.nr + n * kernel.pair + c % kernel.pair;
    u.data()[at] = static_cast<int16_t>(sum);
    if (u.data()[at] != sum) return failed("U beyond s16");
  }
  in.a = a.data(), in.v = v.data();
  kernel.input(&in);
  Aligned<int32_t> m(positions * kernel.nr);
  const WinogradProducts products = {positions,       1,        k,        v.data(), in.position_stride,
                                     in.chunk_stride, u.data(), m.data(), kernel.nr};
  kernel.products(&products);
  Aligned<float> multiplier(kernel.nr, 1.f), bias(kernel.nr, 0.f);
  std::vector<float> c(f.m * f.m * outputs);
  WinogradOutput out{};
  out.m = m.data(), out.position_stride = kernel.nr, out.rows = out.columns = f.m, out.n = outputs;
  out.multiplier = multiplier.data(), out.bias = bias.data();
  out.c = c.data(), out.c_row_stride = f.m * outputs, out.c_stride = outputs;
  kernel.f32(&out);
  for (int i = 0; i < f.m * f.m * outputs; ++i) {
    const int y = i / outputs / f.m, x = i / outputs % f.m, n = i % outputs;
    int32_t acc = 0;
    for (int t = 0; t < 9 * depth; ++t) {
      const int pixel = (y + t / 3 % 3) * size + x + t % 3;
      acc += (a.data()[pixel * depth + t / 9] - in.zero_point) * codes[n * depth * 9 + t];
    }
    if (c[i] != static_cast<float>(acc)) return failed(kernel.name);
  }
  return true;
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  for (int form = 0; form < 2; ++form) {
    const WinogradKernel& kernel = kernels.winograd[form];
    const Matrices& f = kMatrices[form];
    for (uint64_t seed = 1; seed <= 400; ++seed)
      if (!check_input(kernel, f, seed) || !check_products(kernel, seed) ||
          !check_output(scalar.winograd[form], kernel, seed) || !check_sums(kernel, f, seed))
        return false;
  }
  return true;
}

// ---- Benchmark ------------------------------------------------------------------------------------------------------

void bench(const Kernels& kernels) {
  constexpr int kDepth = 128, kPositions = 36, kChunks = kDepth / kWinogradChunk;
  const WinogradKernel& kernel = kernels.winograd[0];
  const int patches = 2 * kernel.mr, stride = (kChunks * patches | 1) * kWinogradChunk;
  Aligned<uint8_t> a(6 * 60 * kDepth, 7), c(4 * 60 * kDepth);
  Aligned<int16_t> v(kPositions * stride, 3), u(kPositions * kDepth * kernel.nr, 5);
  Aligned<int32_t> m(kPositions * (patches * kernel.nr + 16));
  Aligned<float> multiplier(kernel.nr, 0.01f), bias(kernel.nr, 1.f);
  const WinogradInput in = {a.data(), 60 * kDepth, kDepth, kDepth, 3, v.data(), stride, patches * kWinogradChunk};
  const WinogradProducts products = {kPositions, patches,  kDepth,
                                     v.data(),   stride,   patches * kWinogradChunk,
                                     u.data(),   m.data(), patches * kernel.nr + 16};
  WinogradOutput out = {};
  out.m = m.data(), out.position_stride = patches * kernel.nr + 16, out.rows = out.columns = 4, out.n = kernel.nr;
  out.multiplier = multiplier.data(), out.bias = bias.data(), out.qmax = 255;
  out.c = c.data(), out.c_row_stride = 60 * kDepth, out.c_stride = kDepth;
  printf("%-46s K=128: products %.0f GMAC/s | ns a channel of a patch: input %.2f, output %.2f\n", kernel.name,
         rate(1.0 * kPositions * patches * kDepth * kernel.nr, [&] { kernel.products(&products); }),
         1e9 * quickest([&] {
           for (int i = 0; i < 20; ++i) kernel.input(&in);
         }) / 20 /
             kDepth,
         1e9 * quickest([&] {
           for (int i = 0; i < 20; ++i) kernel.qu8(&out);
         }) / 20 /
             kernel.nr);
}

}  // namespace

const Family kWinogradFamily = {check, bench};

}  // namespace qdeploy
