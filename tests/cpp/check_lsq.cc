// LSQ forward and backward: numbers near ties and bounds, NaN and infinities, every length of a tail.
#include "check_ukernels.h"

#include <limits>

namespace qdeploy {
namespace {

float random_value(float step, const LsqParams& p, Random& random) {
  using Float = std::numeric_limits<float>;
  static const float kOdd[] = {
      0.f, -0.f, Float::infinity(), -Float::infinity(), Float::quiet_NaN(), Float::denorm_min()};
  switch (random.range(0, 9)) {
    case 0:
      return (random.range(-300, 300) + 0.5f) * step;  // near a tie
    case 1:
      return random.pick(kOdd);
    case 2:
      return (random.range(0, 1) ? p.qmin : p.qmax) * step;
    default:
      return (random.uniform() * 2.4f - 1.2f) * p.qmax * step;
  }
}

bool check_case(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  const bool at_end = random.range(0, 1), in_place = random.range(0, 1);
  const int kernel = random.range(0, 2);  // forward, backward, error
  const int bits = random.range(2, 8), is_signed = random.range(0, 1);
  LsqParams p{};
  p.n = random.range(0, random.range(0, 3) ? 40 : 3000);
  p.step = std::ldexp(random.uniform() + 0.5f, random.range(-20, 4));
  p.qmin = is_signed ? -std::ldexp(1.f, bits - 1) : 0;
  p.qmax = p.qmin + std::ldexp(1.f, bits) - 1;
  describe("%s lsq n=%zu step=%a qmin=%g qmax=%g kernel=%d in_place=%d at_end=%d seed=%llu", kernels.isa, p.n, p.step,
           p.qmin, p.qmax, kernel, in_place, at_end, static_cast<unsigned long long>(seed));
  float* value = memory().a.place<float>(p.n, at_end, random);
  float* grad = memory().b.place<float>(p.n, at_end, random);
  const Outputs outputs = place_outputs(p.n, 4, at_end, random);
  for (size_t i = 0; i < p.n; ++i) {
    value[i] = random_value(p.step, p, random), grad[i] = random.uniform() - 0.5f;
    if (!in_place) continue;
    reinterpret_cast<float*>(outputs.c)[i] = reinterpret_cast<float*>(outputs.expected)[i] = grad[i];
  }
  const auto run = [&](const Kernels& of, uint8_t* c) {
    p.value = value, p.c = reinterpret_cast<float*>(c), p.grad = in_place ? p.c : grad;
    if (kernel == 0) of.lsq_forward(&p);
    return kernel == 0 ? 0.0 : kernel == 1 ? of.lsq_backward(&p) : of.lsq_error(&p);
  };
  const double sum = run(kernels, outputs.c), expected = run(scalar, outputs.expected);
  if (!(sum == expected || (sum != sum && expected != expected))) return failed("lsq, the sum of its terms");
  return same_outputs("lsq");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  return check_seeds([&](uint64_t seed) { return check_case(scalar, kernels, seed); });
}

void bench(const Kernels& kernels) {
  constexpr size_t kN = 4096;
  Aligned<float> value(kN, 0.5f), grad(kN, 0.1f), c(kN);
  const LsqParams p = {value.data(), grad.data(), kN, 0.01f, -64, 63, c.data()};
  printf("%-46s lsq: forward %.2f, backward %.2f Gfloat/s\n", kernels.isa, rate(kN, [&] { kernels.lsq_forward(&p); }),
         rate(kN, [&] { kernels.lsq_backward(&p); }));
}

}  // namespace

const Family kLsqFamily = {check, bench};

}  // namespace qdeploy
