// Maximum and average pools.
#include "check_ukernels.h"

namespace qdeploy {
namespace {

PoolParams random_window(Random& random) {
  PoolParams window{};
  const int largest = random.range(0, 5) ? 4 : 40;  // beyond 257 pixels, sums of u8 no longer fit in u16
  window.rows = random.range(1, largest), window.cols = random.range(1, largest);
  window.n = random.range(1, 200);
  window.col_stride = window.n * random.range(1, 2) + random.range(0, 5);
  window.row_stride = window.col_stride * window.cols + random.range(0, 50);
  window.pixels = random.range(1, 3);
  window.a_stride = random.range(0, 300);
  window.c_stride = window.n + random.range(0, 1) * random.range(0, 70);
  return window;
}

void describe_case(const char* isa, const AvgPoolParams& p, bool at_end, uint64_t seed) {
  const PoolParams& x = p.window;
  describe(
      "%s pool rows=%zu cols=%zu n=%zu pixels=%zu row_stride=%td col_stride=%td a_stride=%td c_stride=%td "
      "zero_point=%d multiplier=%a bias=%a qmin=%d qmax=%d at_end=%d seed=%llu",
      isa, x.rows, x.cols, x.n, x.pixels, x.row_stride, x.col_stride, x.a_stride, x.c_stride, p.zero_point,
      p.multiplier, p.bias, p.qmin, p.qmax, at_end, static_cast<unsigned long long>(seed));
}

bool check_case(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  const bool at_end = random.range(0, 1);
  AvgPoolParams p{};
  PoolParams& window = p.window;
  window = random_window(random);
  const size_t a_count = (window.pixels - 1) * window.a_stride + (window.rows - 1) * window.row_stride +
                         (window.cols - 1) * window.col_stride + window.n;
  const size_t c_count = (window.pixels - 1) * window.c_stride + window.n;
  uint8_t* a = memory().a.place<uint8_t>(a_count, at_end, random);
  fill_u8(a, a_count, random.pick(kFills), random);
  window.a = a;
  p.zero_point = random.range(0, 255);
  p.multiplier = random_multiplier(window.rows * window.cols * 255.0, random);
  p.bias = random_bias(random);
  random_clamp(&p.qmin, &p.qmax, random);

  describe_case(kernels.isa, p, at_end, seed);
  const auto same = [&](const char* name, size_t size, auto run) {
    const Outputs outputs = place_outputs(c_count, size, at_end, random);
    run(kernels, outputs.c);
    run(scalar, outputs.expected);
    return same_outputs(name);
  };
  return same("max_pool", 1, [&](const Kernels& t, uint8_t* c) { t.max_pool(&window, c); }) &&
         same("avg_pool_qu8", 1, [&](const Kernels& t, uint8_t* c) { t.avg_pool_qu8(&p, c); }) &&
         same("avg_pool_f32", 4,
              [&](const Kernels& t, uint8_t* c) { t.avg_pool_f32(&p, reinterpret_cast<float*>(c)); });
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  return check_seeds([&](uint64_t seed) { return check_case(scalar, kernels, seed); });
}

void bench(const Kernels& kernels) {
  constexpr int kN = 128, kPixels = 28;
  Aligned<uint8_t> a(1 << 20, 7), c(1 << 20);
  const PoolParams window = {a.data(), 3, 3, 30 * kN, kN, kN, kPixels, kN, kN};
  const AvgPoolParams average = {{a.data(), 7, 7, 7 * 2048, 2048, 2048, 1, 0, 0}, 0, 0.02f, 0, 0, 255};
  const double max_pool = rate(9.0 * kN * kPixels * 20, [&] {
    for (int i = 0; i < 20; ++i) kernels.max_pool(&window, c.data());
  });
  const double avg_pool = rate(49.0 * 2048 * 5, [&] {
    for (int i = 0; i < 5; ++i) kernels.avg_pool_qu8(&average, c.data());
  });
  printf("%-46s max_pool 3x3: %.1f GB/s | avg_pool 7x7: %.1f GB/s\n", kernels.isa, max_pool, avg_pool);
}

}  // namespace

const Family kPoolFamily = {check, bench};

}  // namespace qdeploy
