// Rows of codes of every type: scale_add with each kind of addend, sums of rows, and gather.
#include "check_ukernels.h"
#include "gather.h"

namespace qdeploy {
namespace {

constexpr Dtype kCodes[] = {Dtype::u8, Dtype::s16}, kOutputs[] = {Dtype::u8, Dtype::s16, Dtype::f32};

float largest_code(Dtype type) {
  if (type == Dtype::i32) return 1 << 30;
  return type == Dtype::u8 ? 255 : type == Dtype::s16 ? 32767 : 128;
}

// A multiplier by which codes fill the range of an output about twice, or make ties.
float random_scale(Dtype from, Dtype to, Random& random) {
  return random_multiplier(largest_code(from), random) * (to == Dtype::s16 ? 256 : 1);
}

bool check_scale_add(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1);
  const int addend = random.range(0, 4);  // none, codes, floats, floats for weights, none for sums
  ScaleAddParams p = {};
  p.n = random.range(1, random.range(0, 3) ? 100 : 3000);
  p.a_type = addend == 3 ? Dtype::s8 : addend == 4 ? Dtype::i32 : random.pick(kCodes);
  p.b_type = addend == 1 ? random.pick(kCodes) : Dtype::f32;
  p.c_type = random.pick(kOutputs);
  p.multiplier_a = random_scale(p.a_type, p.c_type, random);
  p.multiplier_b = random_scale(addend == 1 ? p.b_type : Dtype::u8, p.c_type, random);
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
  } else if (addend == 2 || addend == 3) {
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
  p.rows = random.range(1, random.range(0, 7) ? 12 : 200);
  p.columns = random.range(0, 1) ? 1 : random.range(1, 5);
  p.n = random.range(1, random.range(0, 3) ? 50 : 400);
  p.column_stride = static_cast<ptrdiff_t>(p.n) + random.range(0, 1) * random.range(0, 30);
  p.row_stride = p.column_stride * static_cast<ptrdiff_t>(p.columns) + random.range(0, 1) * random.range(0, 30);
  p.a_type = random.pick(kCodes), p.c_type = random.pick(kOutputs);
  const auto elements = static_cast<int32_t>(p.rows * p.columns);
  p.offset = p.a_type == Dtype::u8 ? random.range(0, 255) * elements : 0;
  p.multiplier = random_scale(p.a_type, p.c_type, random) / static_cast<float>(elements);
  p.bias = random_bias(random);
  random_clamp(&p.qmin, &p.qmax, random);
  const Fill fill = random.pick(kFills);
  describe(
      "%s mean rows=%zu columns=%zu n=%zu strides=%td,%td types=%d,%d offset=%d multiplier=%a bias=%a fill=%s "
      "at_end=%d "
      "seed=%llu",
      kernels.isa, p.rows, p.columns, p.n, p.row_stride, p.column_stride, static_cast<int>(p.a_type),
      static_cast<int>(p.c_type), p.offset, p.multiplier, p.bias, fill_name(fill), at_end,
      static_cast<unsigned long long>(seed));
  const ptrdiff_t last =
      static_cast<ptrdiff_t>(p.rows - 1) * p.row_stride + static_cast<ptrdiff_t>(p.columns - 1) * p.column_stride;
  const size_t count = static_cast<size_t>(last) + p.n, size = size_of(p.a_type);
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

bool check_weigh(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1);
  WeighParams p = {};
  p.taps = random.range(1, 9);
  p.n = random.range(1, 300);
  p.a_type = random.range(0, 1) ? Dtype::u8 : Dtype::i32;
  p.a_stride = static_cast<ptrdiff_t>(p.n) + random.range(0, 1) * random.range(0, 30);
  p.start = random.range(-(1 << 30), (1 << 30) - 1);
  const Fill fill = random.pick(kFills);
  describe("%s weigh taps=%zu n=%zu a_stride=%td type=%d start=%d fill=%s at_end=%d seed=%llu", kernels.isa, p.taps,
           p.n, p.a_stride, static_cast<int>(p.a_type), p.start, fill_name(fill), at_end,
           static_cast<unsigned long long>(seed));
  const size_t count = (p.taps - 1) * static_cast<size_t>(p.a_stride) + p.n, size = size_of(p.a_type);
  uint8_t* a = m.a.place<uint8_t>(count * size, at_end, random, size);
  int32_t* weights = m.b.place<int32_t>(p.taps, at_end, random);
  fill_codes(a, p.a_type, count, fill, random);
  for (size_t k = 0; k < p.taps; ++k) weights[k] = random.range(-32767, 32767);
  p.a = a, p.weights = weights;
  const size_t written = (p.n + 15) / 16 * 16;
  const Outputs outputs = place_outputs(written, sizeof(int32_t), at_end, random);
  p.c = reinterpret_cast<int32_t*>(outputs.expected);
  scalar.weigh(&p);
  p.c = reinterpret_cast<int32_t*>(outputs.c);
  kernels.weigh(&p);
  for (uint8_t* c : {outputs.c, outputs.expected})
    memset(c + p.n * sizeof(int32_t), 0, (written - p.n) * sizeof(int32_t));
  return same_outputs("weigh");
}

// Slices, shuffles and zero points.
bool check_gather(const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  const bool at_end = random.range(0, 1);
  const int pixels = random.range(1, 40), channels = random.range(1, random.range(0, 1) ? 255 : 400);
  const int bytes = random.range(1, 2), kind = random.range(0, 2);
  const int n = kind == 1 ? channels : random.range(1, channels);
  std::vector<int32_t> index(n);
  for (int i = 0; i < n; ++i) {
    index[i] = kind == 0 ? channels - n + i : kind == 1 ? i * 7 % channels : random.range(-1, channels - 1);
  }
  const int a_stride = channels + random.range(0, 1) * 5, c_stride = n + random.range(0, 1) * 3;
  const auto zero_point = static_cast<int16_t>(bytes == 1 ? random.range(0, 255) : 0);
  describe("%s gather pixels=%d channels=%d bytes=%d kind=%d n=%d strides=%d,%d at_end=%d seed=%llu", kernels.isa,
           pixels, channels, bytes, kind, n, a_stride, c_stride, at_end, static_cast<unsigned long long>(seed));
  const uint8_t* a = memory().a.place<uint8_t>(((pixels - 1) * a_stride + channels) * bytes, at_end, random, bytes);
  uint8_t* scratch = memory().b.place<uint8_t>(gather_scratch(n), at_end, random, 64);
  const Outputs outputs = place_outputs(((pixels - 1) * c_stride + n) * bytes, 1, at_end, random);
  for (int pixel = 0; pixel < pixels; ++pixel) {
    for (int i = 0; i < n; ++i) {
      const void* element =
          index[i] < 0 ? static_cast<const void*>(&zero_point) : a + (pixel * a_stride + index[i]) * bytes;
      memcpy(outputs.expected + (pixel * c_stride + i) * bytes, element, bytes);
    }
  }
  const ChannelGather gather = {index.data(),
                                static_cast<size_t>(n),
                                static_cast<size_t>(channels),
                                static_cast<size_t>(bytes),
                                zero_point,
                                a_stride,
                                c_stride};
  gather_channels(kernels, gather, pixels, a, outputs.c, scratch);
  return same_outputs("gather");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  return check_seeds([&](uint64_t seed) {
    return check_scale_add(scalar, kernels, seed) && check_mean(scalar, kernels, seed) &&
           check_weigh(scalar, kernels, seed) && check_gather(kernels, seed);
  });
}

void bench(const Kernels& kernels) {
  constexpr size_t kN = 1 << 14;
  Aligned<int16_t> a(kN, 7), b(kN, 3), c(kN);
  Aligned<float> floats(kN, 1);
  ScaleAddParams p = {kN, a.data(), nullptr, Dtype::s16, Dtype::s16, Dtype::s16, 0.5f, 0.5f, 0, 0, 255, c.data()};
  const double rescale = rate(kN, [&] { kernels.scale_add(&p); });
  p.b = b.data();
  const double add = rate(kN, [&] { kernels.scale_add(&p); });
  p.b = floats.data(), p.b_type = Dtype::f32, p.a_type = Dtype::u8;
  const double position = rate(kN, [&] { kernels.scale_add(&p); });
  const MeanParams mean = {32, 1, kN / 32, a.data(), kN / 32, 0, Dtype::s16, Dtype::u8, 0, 0.01f, 0, 0, 255, c.data()};
  std::vector<int32_t> index(116);
  for (int i = 0; i < 116; ++i) index[i] = i % 2 * 58 + i / 2;
  const ChannelGather shuffle = {index.data(), 116, 116, 1, 0, 116, 116};
  Aligned<uint8_t> scratch(gather_scratch(116));
  const double shuffled =
      rate(116.0 * 256, [&] { gather_channels(kernels, shuffle, 256, a.data(), c.data(), scratch.data()); });
  printf("%-46s s16 rescale: %.2f, add: %.2f, u8 position: %.2f, mean: %.2f, shuffle: %.2f Gelement/s\n", kernels.isa,
         rescale, add, position, rate(kN, [&] { kernels.mean(&mean); }), shuffled);
}

}  // namespace

const Family kRowsFamily = {check, bench};

}  // namespace qdeploy
