// Norm: its kernels one by one, then LayerNorm and GroupNorm whole at the bounds of their integers.
#include "check_ukernels.h"
#include "norm.h"

namespace qdeploy {
namespace {

constexpr Dtype kCodes[] = {Dtype::u8, Dtype::s16}, kOutputs[] = {Dtype::u8, Dtype::s16, Dtype::f32};

bool check_sums(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1), by_channel = random.range(0, 1);
  NormSumsParams p = {};
  p.rows = random.range(1, random.range(0, 3) ? 9 : 100);
  p.n = random.range(1, random.range(0, 3) ? 70 : 900);
  p.a_stride = static_cast<ptrdiff_t>(p.n) + random.range(0, 1) * random.range(0, 30);
  p.a_type = random.pick(kCodes);
  const Fill fill = random.pick(kFills);
  describe("%s norm sums rows=%zu n=%zu a_stride=%td s16=%d by_channel=%d fill=%s at_end=%d seed=%llu", kernels.isa,
           p.rows, p.n, p.a_stride, p.a_type == Dtype::s16, by_channel, fill_name(fill), at_end,
           static_cast<unsigned long long>(seed));
  const size_t count = (p.rows - 1) * static_cast<size_t>(p.a_stride) + p.n, size = size_of(p.a_type);
  uint8_t* a = m.a.place<uint8_t>(count * size, at_end, random, size);
  fill_codes(a, p.a_type, count, fill, random);
  p.a = a;
  const size_t results = by_channel ? p.n : p.rows;
  const Outputs squares = place_outputs(results, 8, at_end, random);
  std::vector<int32_t> sums(results, 5), expected(results, 5);
  memset(squares.c, 1, 8 * results), memset(squares.expected, 1, 8 * results);
  const auto run = [&](const Kernels& of, uint8_t* c, int32_t* to) {
    p.squares = reinterpret_cast<int64_t*>(c), p.sums = to;
    (by_channel ? of.norm_channel_sums : of.norm_row_sums)(&p);
  };
  run(kernels, squares.c, sums.data());
  run(scalar, squares.expected, expected.data());
  return sums == expected ? same_outputs("norm sums") : failed("norm sums");
}

bool check_norm(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1);
  NormParams p = {};
  p.rows = random.range(1, 9);
  p.n = random.range(1, random.range(0, 3) ? 70 : 900);
  p.a_stride = static_cast<ptrdiff_t>(p.n) + random.range(0, 1) * random.range(0, 30);
  p.c_stride = static_cast<ptrdiff_t>(p.n) + random.range(0, 1) * random.range(0, 30);
  p.a_type = random.pick(kCodes), p.c_type = random.pick(kOutputs);
  p.by_channel = random.range(0, 1);
  p.count = random.range(0, 1) ? random.range(1, 32767) : 32767;
  random_clamp(&p.qmin, &p.qmax, random);
  const Fill fill = random.pick(kFills);
  const bool in_place = random.range(0, 1) && p.a_type == p.c_type && p.a_stride == p.c_stride;
  describe(
      "%s norm rows=%zu n=%zu strides=%td,%td types=%d,%d by_channel=%d count=%d fill=%s in_place=%d at_end=%d "
      "seed=%llu",
      kernels.isa, p.rows, p.n, p.a_stride, p.c_stride, static_cast<int>(p.a_type), static_cast<int>(p.c_type),
      p.by_channel, p.count, fill_name(fill), in_place, at_end, static_cast<unsigned long long>(seed));
  const size_t a_count = (p.rows - 1) * static_cast<size_t>(p.a_stride) + p.n, size = size_of(p.a_type);
  const size_t c_count = (p.rows - 1) * static_cast<size_t>(p.c_stride) + p.n;
  uint8_t* a = m.a.place<uint8_t>(a_count * size, at_end, random, size);
  fill_codes(a, p.a_type, a_count, fill, random);
  const size_t groups = p.by_channel ? p.n : p.rows;
  const int largest = (p.a_type == Dtype::s16 ? 32767 : 255) * p.count;
  int32_t* sums = m.offsets.place<int32_t>(groups, at_end, random);
  float* scales = m.comp.place<float>(groups, at_end, random);
  for (size_t i = 0; i < groups; ++i) {
    sums[i] = p.a_type == Dtype::s16 ? fill_value(fill, -largest, largest, random) : random.range(0, largest);
    scales[i] = (random.uniform() + 0.1f) / static_cast<float>(largest);
  }
  float* multiplier = m.multiplier.place<float>(p.n, at_end, random);
  float* bias = m.bias.place<float>(p.n, at_end, random);
  for (size_t i = 0; i < p.n; ++i) {
    multiplier[i] = random_multiplier(1, random) * (p.c_type == Dtype::s16 ? 100 : 1);
    bias[i] = random_bias(random);
  }
  p.a = a, p.sums = sums, p.scales = scales, p.multiplier = multiplier, p.bias = bias;
  const Outputs outputs = place_outputs(c_count, size_of(p.c_type), at_end, random);
  if (in_place) memcpy(outputs.c, a, a_count * size), memcpy(outputs.expected, a, a_count * size);
  p.c = outputs.expected;
  scalar.norm(&p);
  if (in_place) p.a = outputs.c;
  p.c = outputs.c;
  kernels.norm(&p);
  return same_outputs("norm");
}

// Codes of the largest magnitude in groups of the most elements, all codes alike, and ordinary ones.
bool check_whole(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  static const int kMost[] = {32767, 16384, 300, 1};
  Random random(seed);
  const bool at_end = random.range(0, 1), by_group = random.range(0, 1);
  const int most = random.pick(kMost);
  Norm norm = {};
  norm.in = random.pick(kCodes), norm.out = random.pick(kOutputs);
  norm.groups = by_group ? random.range(1, 6) : 0;
  const int width = by_group ? random.range(1, std::min(most, 40)) : most;
  norm.channels = by_group ? norm.groups * width : width;
  const int rows = random.range(1, 3), pixels = by_group ? std::min(most / width, 999) : most > 1000 ? 2 : 40;
  const int columns = by_group ? std::max(1, pixels / rows) : random.range(1, pixels);
  const int pad = random.range(0, 1) * random.range(0, 40);
  norm.epsilon = std::ldexp(random.uniform() + 1, random.range(-60, 40));
  random_clamp(&norm.qmin, &norm.qmax, random);
  const Fill fill = random.pick(kFills);
  const bool alike = random.range(0, 3) == 0;
  describe(
      "%s norm whole channels=%d groups=%d rows=%d columns=%d pad=%d types=%d,%d epsilon=%a fill=%s alike=%d at_end=%d "
      "seed=%llu",
      kernels.isa, static_cast<int>(norm.channels), static_cast<int>(norm.groups), rows, columns, pad,
      static_cast<int>(norm.in), static_cast<int>(norm.out), norm.epsilon, fill_name(fill), alike, at_end,
      static_cast<unsigned long long>(seed));
  const int64_t pitch = columns * norm.channels + pad;
  const size_t count = static_cast<size_t>((rows - 1) * pitch + columns * norm.channels), size = size_of(norm.in);
  uint8_t* a = memory().a.place<uint8_t>(count * size, at_end, random, size);
  fill_codes(a, norm.in, count, fill, random);
  for (size_t i = size; i < count * size && alike; ++i) a[i] = a[i - size];
  const Outputs outputs = place_outputs(count, size_of(norm.out), at_end, random);
  Aligned<float> multiplier(norm.channels), bias(norm.channels);
  for (int i = 0; i < norm.channels; ++i) {
    multiplier.data()[i] = random_multiplier(1, random), bias.data()[i] = random_bias(random);
  }
  norm.multiplier = multiplier.data(), norm.bias = bias.data();
  Aligned<uint8_t> scratch(group_norm_scratch(norm));
  const auto run = [&](const Kernels& of, uint8_t* c) {
    const NormPixels image = {rows, columns, a, pitch, c, pitch};
    if (!by_group) return layer_norm(of, norm, image);
    for (int64_t first = 0, end; first < norm.groups; first = end) {  // in two shares
      end = first == 0 ? (norm.groups + 1) / 2 : norm.groups;
      group_norm(of, norm, image, {first, end}, scratch.data());
    }
  };
  run(kernels, outputs.c);
  run(scalar, outputs.expected);
  return same_outputs("norm");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  for (uint64_t seed = 1; seed <= 300; ++seed)
    if (!check_whole(scalar, kernels, seed)) return false;
  return check_seeds(
      [&](uint64_t seed) { return check_sums(scalar, kernels, seed) && check_norm(scalar, kernels, seed); });
}

void bench(const Kernels& kernels) {
  constexpr int kRows = 197, kChannels = 384;
  constexpr size_t kCount = size_t{kRows} * kChannels;
  Aligned<int16_t> a(kCount);
  Aligned<uint8_t> c(kCount), scratch(1 << 16);
  Random random(1);
  for (size_t i = 0; i < kCount; ++i) a.data()[i] = static_cast<int16_t>(random.range(-9999, 9999));
  Aligned<float> multiplier(kChannels, 40), bias(kChannels, 128);
  Norm norm = {kChannels, 0, Dtype::s16, Dtype::u8, multiplier.data(), bias.data(), 1, 0, 255};
  const NormPixels image = {1, kRows, a.data(), 0, c.data(), 0};
  const double layer = quickest([&] { layer_norm(kernels, norm, image); });
  norm.groups = 32;
  const double group = quickest([&] { group_norm(kernels, norm, image, {0, 32}, scratch.data()); });
  printf("%-46s norm of 197x384, s16 to u8: by row %.3f, by 32 groups %.3f ns/element\n", kernels.isa,
         1e9 * layer / kCount, 1e9 * group / kCount);
}

}  // namespace

const Family kNormFamily = {check, bench};

}  // namespace qdeploy
