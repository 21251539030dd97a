// Rows of codes of every type: scale_add with each kind of addend, and the mean of rows.
#include "check_ukernels.h"

namespace qdeploy {
namespace {

constexpr Type kCodes[] = {Type::u8, Type::s16}, kOutputs[] = {Type::u8, Type::s16, Type::f32};

float largest_code(Type type) { return type == Type::u8 ? 255 : type == Type::s16 ? 32767 : 128; }

// A multiplier by which codes fill the range of an output about twice, or make ties.
float random_scale(Type from, Type to, Random& random) {
  return random_multiplier(largest_code(from), random) * (to == Type::s16 ? 256 : 1);
}

bool check_scale_add(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1);
  const int addend = random.range(0, 3);  // none, codes, floats, floats for weights
  ScaleAddParams p = {};
  p.n = random.range(1, random.range(0, 3) ? 100 : 3000);
  p.a_type = addend == 3 ? Type::s8 : random.pick(kCodes);
  p.b_type = addend == 1 ? random.pick(kCodes) : Type::f32;
  p.c_type = random.pick(kOutputs);
  p.multiplier_a = random_scale(p.a_type, p.c_type, random);
  p.multiplier_b = random_scale(addend == 1 ? p.b_type : Type::u8, p.c_type, random);
  p.bias = random_bias(random);
  random_clamp(&p.qmin, &p.qmax, random);
  const Fill fill = random.pick(kFills);
  const bool in_place = random.range(0, 1) && p.a_type == p.c_type;
  describe(
      "%s scale_add n=%zu types=%d,%d,%d addend=%d multipliers=%a,%a bias=%a fill=%s in_place=%d at_end=%d seed=%llu",
      kernels.isa, p.n, static_cast<int>(p.a_type), static_cast<int>(p.b_type), static_cast<int>(p.c_type), addend,
      p.multiplier_a, p.multiplier_b, p.bias, fill_name(fill), in_place, at_end, static_cast<unsigned long long>(seed));
  const size_t size = size_of(p.a_type);
  uint8_t* a = m.a.place<uint8_t>(p.n * size, at_end, random, size);
  fill_codes(a, p.a_type, p.n, fill, random);
  if (addend == 1) {
    uint8_t* b = m.b.place<uint8_t>(p.n * size_of(p.b_type), at_end, random, size_of(p.b_type));
    fill_codes(b, p.b_type, p.n, random.pick(kFills), random);
    p.b = b;
  } else if (addend > 1) {
    float* b = m.b.place<float>(p.n, at_end, random);
    for (size_t i = 0; i < p.n; ++i) b[i] = random_bias(random);
    p.b = b;
  }
  const Outputs outputs = place_outputs(p.n, size_of(p.c_type), at_end, random);
  p.a = a, p.c = outputs.expected;
  scalar.scale_add(&p);
  if (in_place) memcpy(outputs.c, a, p.n * size), p.a = outputs.c;
  p.c = outputs.c;
  kernels.scale_add(&p);
  return same_outputs("scale_add");
}

bool check_mean(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  const bool at_end = random.range(0, 1);
  MeanParams p = {};
  p.rows = random.range(1, random.range(0, 7) ? 12 : 600);
  p.n = random.range(1, random.range(0, 3) ? 50 : 400);
  p.a_stride = static_cast<ptrdiff_t>(p.n) + random.range(0, 1) * random.range(0, 30);
  p.a_type = random.pick(kCodes), p.c_type = random.pick(kOutputs);
  p.offset = p.a_type == Type::u8 ? random.range(0, 255) * static_cast<int32_t>(p.rows) : 0;
  p.multiplier = random_scale(p.a_type, p.c_type, random) / static_cast<float>(p.rows);
  p.bias = random_bias(random);
  random_clamp(&p.qmin, &p.qmax, random);
  const Fill fill = random.pick(kFills);
  describe(
      "%s mean rows=%zu n=%zu a_stride=%td types=%d,%d offset=%d multiplier=%a bias=%a fill=%s at_end=%d seed=%llu",
      kernels.isa, p.rows, p.n, p.a_stride, static_cast<int>(p.a_type), static_cast<int>(p.c_type), p.offset,
      p.multiplier, p.bias, fill_name(fill), at_end, static_cast<unsigned long long>(seed));
  const size_t count = (p.rows - 1) * static_cast<size_t>(p.a_stride) + p.n, size = size_of(p.a_type);
  uint8_t* a = memory().a.place<uint8_t>(count * size, at_end, random, size);
  fill_codes(a, p.a_type, count, fill, random);
  p.a = a;
  const Outputs outputs = place_outputs(p.n, size_of(p.c_type), at_end, random);
  p.c = outputs.expected;
  scalar.mean(&p);
  p.c = outputs.c;
  kernels.mean(&p);
  return same_outputs("mean");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  return check_seeds(
      [&](uint64_t seed) { return check_scale_add(scalar, kernels, seed) && check_mean(scalar, kernels, seed); });
}

void bench(const Kernels& kernels) {
  constexpr size_t kN = 1 << 14;
  Aligned<int16_t> a(kN, 7), b(kN, 3), c(kN);
  Aligned<float> floats(kN, 1);
  ScaleAddParams p = {kN, a.data(), nullptr, Type::s16, Type::s16, Type::s16, 0.5f, 0.5f, 0, 0, 255, c.data()};
  const double rescale = rate(kN, [&] { kernels.scale_add(&p); });
  p.b = b.data();
  const double add = rate(kN, [&] { kernels.scale_add(&p); });
  p.b = floats.data(), p.b_type = Type::f32, p.a_type = Type::u8;
  const double position = rate(kN, [&] { kernels.scale_add(&p); });
  const MeanParams mean = {32, kN / 32, a.data(), kN / 32, Type::s16, Type::u8, 0, 0.01f, 0, 0, 255, c.data()};
  printf("%-46s s16 rescale: %.2f, add: %.2f, u8 position: %.2f, mean: %.2f Gelement/s\n", kernels.isa, rescale, add,
         position, rate(kN, [&] { kernels.mean(&mean); }));
}

}  // namespace

const Family kRowsFamily = {check, bench};

}  // namespace qdeploy
