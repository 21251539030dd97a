// The input: f32 planes to u8 pixels, and whether all of them are finite.
#include "check_ukernels.h"

#include <limits>

namespace qdeploy {
namespace {

using Float = std::numeric_limits<float>;
constexpr float kNotFinite[] = {Float::infinity(), -Float::infinity(), Float::quiet_NaN(), Float::signaling_NaN()};

float random_input(float inv_scale, Random& random) {
  switch (random.range(0, 9)) {
    case 0:
      return (random.range(-300, 300) + 0.5f) / inv_scale;  // near a tie
    case 1:
      return std::ldexp(random.uniform() - 0.5f, random.range(-140, 127));
    case 2:
      return random.range(0, 1) ? Float::max() : Float::lowest();
    default:
      return (random.uniform() * 400 - 200) / inv_scale;
  }
}

// Planes of random numbers; what lies between and around them is not input, and not finite. Returns whether they are.
bool place_planes(bool at_end, Random& random, QuantizeParams* p) {
  const size_t count = (p->channels - 1) * p->plane_stride + p->pixels;
  float* a = memory().a.place<float>(count, at_end, random);
  const float outside = random.range(0, 1) ? kNotFinite[0] : kNotFinite[2];
  for (size_t i = 0; i < count; ++i) a[i] = outside;
  for (int i = 1; i <= 16; ++i) a[-i] = outside;
  for (size_t ch = 0; ch < p->channels; ++ch)
    for (size_t i = 0; i < p->pixels; ++i) a[ch * p->plane_stride + i] = random_input(p->inv_scale, random);
  const bool finite = random.range(0, 3) != 0;
  if (!finite) a[random.next() % p->channels * p->plane_stride + random.next() % p->pixels] = random.pick(kNotFinite);
  p->a = a;
  return finite;
}

bool check_case(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
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
  const bool finite = place_planes(at_end, random, &p);
  const Outputs outputs = place_outputs((p.pixels - 1) * p.c_stride + p.channels, 1, at_end, random);
  describe(
      "%s quantize pixels=%zu channels=%zu plane_stride=%td c_stride=%td inv_scale=%a zero_point=%g finite=%d "
      "at_end=%d seed=%llu",
      kernels.isa, p.pixels, p.channels, p.plane_stride, p.c_stride, p.inv_scale, p.zero_point, finite, at_end,
      static_cast<unsigned long long>(seed));
  p.c = outputs.c;
  if (kernels.quantize(&p) != finite) return failed("quantize, what it returned");
  p.c = outputs.expected;
  scalar.quantize(&p);
  return !finite || same_outputs("quantize");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  return check_seeds([&](uint64_t seed) { return check_case(scalar, kernels, seed); });
}

void bench(const Kernels& kernels) {
  constexpr size_t kPixels = 224 * 224;
  Aligned<float> image(3 * kPixels, 0.5f);
  Aligned<uint8_t> c(3 * kPixels);
  const QuantizeParams p = {image.data(), kPixels, kPixels, 3, 50, 128, c.data(), 3};
  printf("%-46s quantize 3 planes: %.2f Gfloat/s\n", kernels.isa, rate(3.0 * kPixels, [&] { kernels.quantize(&p); }));
}

}  // namespace

const Family kInputFamily = {check, bench};

}  // namespace qdeploy
