// Element by element: add, mul and table. An output may lie where an input does.
#include "check_ukernels.h"

namespace qdeploy {
namespace {

using Bytes = const uint8_t*;

bool check_case(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
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

  describe(
      "%s elementwise n=%zu multiplier_a=%a multiplier_b=%a bias=%a qmin=%d qmax=%d in_place=%d at_end=%d seed=%llu",
      kernels.isa, n, p.multiplier_a, p.multiplier_b, p.bias, p.qmin, p.qmax, in_place, at_end,
      static_cast<unsigned long long>(seed));
  const auto same = [&](const char* name, size_t size, auto run) {
    const auto [c, expected] = place_outputs(n, size, at_end, random);
    const bool c_is_a = in_place == 1 && size == 1, c_is_b = in_place == 2 && size == 1;
    if (c_is_a || c_is_b) memcpy(c, c_is_a ? a : b, n);
    run(kernels, c_is_a ? c : a, c_is_b ? c : b, c);
    run(scalar, a, b, expected);
    return same_outputs(name);
  };
  return same("add_qu8", 1, [&](const Kernels& t, Bytes x, Bytes y, uint8_t* c) { t.add_qu8(&p, n, x, y, c); }) &&
         same("add_f32", 4,
              [&](const Kernels& t, Bytes x, Bytes y, uint8_t* c) {
                t.add_f32(&p, n, x, y, reinterpret_cast<float*>(c));
              }) &&
         same("table", 1, [&](const Kernels& t, Bytes x, Bytes, uint8_t* c) { t.table(n, table, x, c); });
}

bool check_mul(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1), is_gate = random.range(0, 1), in_place = random.range(0, 1);
  MulParams p = {};
  p.pixels = random.range(1, random.range(0, 3) ? 5 : 50);
  p.n = random.range(1, random.range(0, 3) ? 100 : 1000);
  p.b_stride = is_gate ? 0 : static_cast<ptrdiff_t>(p.n);
  p.zero_point_a = random.range(0, 255);
  p.zero_point_b = random.range(0, 255);
  p.multiplier = random_multiplier(255.0 * 255.0, random);
  p.bias = random.range(0, 3) ? random_bias(random) : -0.0f;  // with which a product of -0 would show
  random_clamp(&p.qmin, &p.qmax, random);
  const size_t n = p.pixels * p.n;
  uint8_t* a = m.a.place<uint8_t>(n, at_end, random);
  uint8_t* b = m.b.place<uint8_t>(is_gate ? p.n : n, at_end, random);
  for (size_t i = 0; i < n; i += 7) a[i] = static_cast<uint8_t>(p.zero_point_a);

  describe("%s mul pixels=%zu n=%zu gate=%d zero_points=%d,%d multiplier=%a bias=%a in_place=%d at_end=%d seed=%llu",
           kernels.isa, p.pixels, p.n, is_gate, p.zero_point_a, p.zero_point_b, p.multiplier, p.bias, in_place, at_end,
           static_cast<unsigned long long>(seed));
  const Outputs u8 = place_outputs(n, 1, at_end, random);
  if (in_place) memcpy(u8.c, a, n);
  kernels.mul_qu8(&p, in_place ? u8.c : a, b, u8.c);
  scalar.mul_qu8(&p, a, b, u8.expected);
  if (!same_outputs("mul_qu8")) return false;
  const Outputs f32 = place_outputs(n, 4, at_end, random);
  kernels.mul_f32(&p, a, b, reinterpret_cast<float*>(f32.c));
  scalar.mul_f32(&p, a, b, reinterpret_cast<float*>(f32.expected));
  return same_outputs("mul_f32");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  return check_seeds(
      [&](uint64_t seed) { return check_case(scalar, kernels, seed) && check_mul(scalar, kernels, seed); });
}

void bench(const Kernels& kernels) {
  constexpr size_t kN = 1 << 16;
  Aligned<uint8_t> inputs(1 << 20, 7), c(1 << 20), table(256, 1);
  const uint8_t *a = inputs.data(), *b = a + kN;
  const AddParams p = {0.5f, 0.5f, 0, 0, 255};
  const double add = rate(kN, [&] { kernels.add_qu8(&p, kN, a, b, c.data()); });
  const double lookup = rate(kN, [&] { kernels.table(kN, table.data(), a, c.data()); });
  MulParams mul = {1, kN, static_cast<ptrdiff_t>(kN), 3, 3, 0.01f, 0, 0, 255};
  const double same = rate(kN, [&] { kernels.mul_qu8(&mul, a, b, c.data()); });
  mul = {kN / 256, 256, 0, 3, 3, 0.01f, 0, 0, 255};
  const double gate = rate(kN, [&] { kernels.mul_qu8(&mul, a, b, c.data()); });
  printf("%-46s add: %.2f | mul: %.2f, by a gate of 256: %.2f | table: %.2f Gelement/s\n", kernels.isa, add, same, gate,
         lookup);
}

}  // namespace

const Family kElementwiseFamily = {check, bench};

}  // namespace qdeploy
