// Attention: what it packs, its weights and its output one by one, then whole.
#include "attention.h"
#include "check_ukernels.h"

namespace qdeploy {
namespace {

int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

int most_peak(int keys) { return static_cast<int>(std::min<int64_t>(32767, 2147483647 / (int64_t{255} * keys))); }

bool check_pack(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  static const uint8_t kZeroPoints[] = {0, 1, 128, 255};
  Random random(seed);
  const bool at_end = random.range(0, 1);
  const int kernel = random.range(0, 2);  // q, keys, values
  AttentionPack p = {};
  p.rows = random.range(1, 70), p.n = random.range(1, random.range(0, 1) ? 64 : 200);
  p.a_stride = p.n + random.range(0, 1) * random.range(0, 100);
  p.zero_point = random.pick(kZeroPoints);
  p.nr = kernels.winograd[0].nr, p.pair = kernels.winograd[0].pair;
  p.chunk_stride = p.rows * kWinogradChunk;
  describe("%s attention pack kernel=%d rows=%d n=%d a_stride=%td zero_point=%d at_end=%d seed=%llu", kernels.isa,
           kernel, p.rows, p.n, p.a_stride, p.zero_point, at_end, static_cast<unsigned long long>(seed));
  p.a = memory().a.place<uint8_t>((p.rows - 1) * p.a_stride + p.n, at_end, random);
  const int depth = round_up(p.n, 8);
  const size_t count = kernel == 0   ? round_up(p.n, kWinogradChunk) * p.rows
                       : kernel == 1 ? round_up(p.rows, p.nr) * depth
                                     : round_up(p.rows, 8) * round_up(p.n, p.nr);
  const Outputs outputs = place_outputs(count, 2, false, random);
  const auto run = [&](const Kernels& of, uint8_t* c) {
    p.c = reinterpret_cast<int16_t*>(c);
    (kernel == 0 ? of.attention_q : kernel == 1 ? of.attention_keys : of.attention_values)(&p);
  };
  run(kernels, outputs.c);
  run(scalar, outputs.expected);
  if (kernel > 0) return same_outputs("attention pack");
  for (int i = 0; i < depth * p.rows; ++i) {  // beyond the channels that products read, q is anything
    const int channel = i % depth, at = (channel / 32 * p.rows + i / depth) * 32 + channel % 32;
    if (memcmp(outputs.c + 2 * at, outputs.expected + 2 * at, 2) != 0) return failed("attention pack");
  }
  return true;
}

bool check_weights(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1), bias = random.range(0, 1), regions = random.range(0, 1);
  AttentionWeights p = {};
  p.rows = random.range(1, 9), p.keys = random.range(1, random.range(0, 3) ? 80 : 700);
  p.nr = kernels.winograd[0].nr;
  p.panel_stride = p.rows * p.nr;
  p.chunk_stride = p.rows * kWinogradChunk;
  p.peak = static_cast<float>(random.range(0, 3) ? most_peak(p.keys) : random.range(1, 100));
  const int largest = random.pick({1, 1000, 1 << 20, 1 << 30});
  p.logit_multiplier = (random.uniform() * 80 - 40) / static_cast<float>(largest);
  const Fill fill = random.pick(kFills);
  describe(
      "%s attention weights rows=%d keys=%d peak=%g multiplier=%a largest=%d bias=%d regions=%d fill=%s at_end=%d "
      "seed=%llu",
      kernels.isa, p.rows, p.keys, p.peak, p.logit_multiplier, largest, bias, regions, fill_name(fill), at_end,
      static_cast<unsigned long long>(seed));
  const int panels = (p.keys + p.nr - 1) / p.nr, logits = panels * p.rows * p.nr;
  int32_t* first = m.a.place<int32_t>(logits, at_end, random, 64);
  for (int i = 0; i < logits; ++i) first[i] = fill_value(fill, -largest, largest, random);
  int32_t* second = m.residual.place<int32_t>(logits, at_end, random, 64);
  memcpy(second, first, sizeof(int32_t) * logits);
  if (bias) {
    p.bias_stride = p.keys;
    float* values = m.b.place<float>(p.rows * p.keys, at_end, random);
    for (int i = 0; i < p.rows * p.keys; ++i) values[i] = random.uniform() * 60 - 30;
    p.bias = values;
  }
  std::vector<int32_t> row_regions(p.rows), sums(p.rows), expected(p.rows);
  if (regions) {
    int32_t* of_keys = m.w.place<int32_t>(p.keys, at_end, random);
    for (int i = 0; i < p.keys; ++i) of_keys[i] = random.range(0, 3);
    for (int32_t& region : row_regions) region = of_keys[random.range(0, p.keys - 1)];
    p.key_regions = of_keys, p.row_regions = row_regions.data();
  }
  const Outputs outputs = place_outputs(round_up(p.keys, kWinogradChunk) * p.rows, 2, false, random);
  p.logits = first, p.p = reinterpret_cast<int16_t*>(outputs.c), p.sums = sums.data();
  kernels.attention_weights(&p);
  p.logits = second, p.p = reinterpret_cast<int16_t*>(outputs.expected), p.sums = expected.data();
  scalar.attention_weights(&p);
  return sums == expected ? same_outputs("attention weights") : failed("attention weights, their sum");
}

bool check_output(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  const bool at_end = random.range(0, 1);
  AttentionOutput p = {};
  p.rows = random.range(1, 9), p.n = random.range(1, 100);
  p.nr = kernels.winograd[0].nr;
  p.panel_stride = p.rows * p.nr;
  p.c_stride = p.n + random.range(0, 1) * random.range(0, 50);
  p.bias = random_bias(random);
  random_clamp(&p.qmin, &p.qmax, random);
  describe("%s attention output rows=%d n=%d c_stride=%td bias=%a at_end=%d seed=%llu", kernels.isa, p.rows, p.n,
           p.c_stride, p.bias, at_end, static_cast<unsigned long long>(seed));
  const int count = round_up(p.n, p.nr) * p.rows;
  int32_t* acc = memory().a.place<int32_t>(count, at_end, random, 64);
  for (int i = 0; i < count; ++i) acc[i] = random.range(-(1 << 28), 1 << 28);
  std::vector<float> scales(p.rows);
  for (float& scale : scales) scale = random_multiplier(1 << 28, random);
  p.acc = acc, p.scales = scales.data();
  const Outputs outputs = place_outputs((p.rows - 1) * p.c_stride + p.n, 1, at_end, random);
  p.c = outputs.c;
  kernels.attention_output(&p);
  p.c = outputs.expected;
  scalar.attention_output(&p);
  return same_outputs("attention output");
}

struct Whole {
  Attention of;
  AttentionOperands io;
};

// In `threads` shares, one after the other.
void run(const Kernels& kernels, const Whole& whole, int threads, bool at_end, Random& random) {
  const size_t bytes = attention_scratch(kernels, whole.of).bytes;
  uint8_t* scratch = memory().residual.place<uint8_t>(bytes, at_end, random, 64);
  for (int thread = 0; thread < threads; ++thread) {
    run_attention(kernels, whole.of, whole.io, scratch, {thread, threads});
  }
}

bool check_whole(const Kernels& scalar, const Kernels& kernels, uint64_t seed) {
  static const uint8_t kZeroPoints[] = {0, 3, 128, 255};
  Memory& m = memory();
  Random random(seed);
  const bool at_end = random.range(0, 1), segments = random.range(0, 2) == 0, variable = random.range(0, 2) == 0;
  const int heads = random.range(1, 4), depth = random.range(1, 3) * (random.range(0, 1) ? 16 : random.range(1, 30));
  const int width = random.range(0, 1) ? depth : random.range(1, 70), threads = random.range(1, 5);
  const Fill fill = random.pick(kFills);
  Whole w = {};
  Attention& of = w.of;
  AttentionOperands& io = w.io;
  of.heads = heads, of.channels = heads * depth, of.outputs = heads * width;
  of.block = segments ? random.range(1, 60) : 0;
  of.rows = segments ? of.block * random.range(1, 4) : random.range(1, 120);
  of.keys = segments || random.range(0, 1) ? of.rows : random.range(1, random.range(0, 4) ? 90 : 700);
  io.rows = variable && !segments ? random.range(1, static_cast<int>(of.rows)) : of.rows;
  io.keys = variable && !segments ? random.range(1, static_cast<int>(of.keys)) : of.keys;
  const int most_keys = static_cast<int>(segments ? of.block : of.keys);
  of.peak = most_peak(most_keys);
  of.q_zero = random.pick(kZeroPoints), of.k_zero = random.pick(kZeroPoints), of.v_zero = random.pick(kZeroPoints);
  of.logit_multiplier = (random.uniform() - 0.3f) * 40 / static_cast<float>(depth * 65025);
  of.multiplier = random.uniform() * 3 - 1, of.bias = static_cast<float>(random.range(0, 255));
  random_clamp(&of.qmin, &of.qmax, random);
  const bool bias = random.range(0, 1), regions = segments && random.range(0, 1);
  describe(
      "%s attention whole heads=%d depth=%d width=%d rows=%d,%d keys=%d,%d block=%d bias=%d regions=%d "
      "multipliers=%a,%a threads=%d fill=%s at_end=%d seed=%llu",
      kernels.isa, heads, depth, width, static_cast<int>(of.rows), static_cast<int>(io.rows), static_cast<int>(of.keys),
      static_cast<int>(io.keys), static_cast<int>(of.block), bias, regions, of.logit_multiplier, of.multiplier, threads,
      fill_name(fill), at_end, static_cast<unsigned long long>(seed));
  io.q_stride = io.k_stride = of.channels + random.range(0, 1) * random.range(0, 40);
  io.v_stride = of.outputs + random.range(0, 1) * random.range(0, 40);
  io.c_stride = of.outputs + random.range(0, 1) * random.range(0, 40);
  const auto operand = [&](Guarded& at, int64_t rows, int64_t stride, int64_t n) {
    const size_t count = static_cast<size_t>((rows - 1) * stride + n);
    uint8_t* a = at.place<uint8_t>(count, at_end, random);
    fill_u8(a, count, fill, random);
    return a;
  };
  io.q = operand(m.a, io.rows, io.q_stride, of.channels);
  io.k = operand(m.b, io.keys, io.k_stride, of.channels);
  io.v = operand(m.w, io.keys, io.v_stride, of.outputs);
  const int64_t biases = heads * (segments ? of.block * of.block : of.rows * of.keys);
  Aligned<float> logit_bias(biases);
  for (int64_t i = 0; i < biases; ++i) logit_bias.data()[i] = random.uniform() * 20 - 10;
  if (bias) of.logit_bias = logit_bias.data();
  Aligned<int32_t> region(of.rows);
  for (int64_t i = 0; i < of.rows; ++i) region.data()[i] = random.range(-1, 2);
  if (regions) of.regions = region.data();
  const Outputs outputs = place_outputs((io.rows - 1) * io.c_stride + of.outputs, 1, at_end, random);
  io.c = outputs.c;
  run(kernels, w, threads, at_end, random);
  io.c = outputs.expected;
  run(scalar, w, 1, at_end, random);
  return same_outputs("attention");
}

bool check(const Kernels& scalar, const Kernels& kernels) {
  for (uint64_t seed = 1; seed <= 400; ++seed)
    if (!check_whole(scalar, kernels, seed)) return false;
  return check_seeds([&](uint64_t seed) {
    return check_pack(scalar, kernels, seed) && check_weights(scalar, kernels, seed) &&
           check_output(scalar, kernels, seed);
  });
}

// Of DeiT-S, ViT-B/16, DistilBERT with 128 and 512 tokens, and windows of Swin-T's first stage.
struct Case {
  int64_t rows, heads, head_size, block;
};
constexpr Case kCases[] = {{197, 6, 64, 0}, {197, 12, 64, 0}, {128, 12, 64, 0}, {512, 12, 64, 0}, {3136, 3, 32, 49}};

void bench(const Kernels& kernels) {
  printf("%-46s attention, rows x heads, GMAC/s:", kernels.isa);
  for (const Case& of : kCases) {
    const int64_t channels = of.heads * of.head_size, keys = of.block ? of.block : of.rows;
    const size_t count = static_cast<size_t>(of.rows * channels);
    Aligned<uint8_t> q(count), k(count), v(count), c(count);
    Random random(1);
    for (uint8_t* a : {q.data(), k.data(), v.data()}) fill_u8(a, count, Fill::uniform, random);
    Whole w = {};
    w.of.heads = static_cast<int32_t>(of.heads), w.of.rows = w.of.keys = of.rows,
    w.of.channels = w.of.outputs = channels;
    w.of.q_zero = w.of.k_zero = w.of.v_zero = 128, w.of.qmax = 255, w.of.peak = most_peak(static_cast<int>(keys)),
    w.of.block = of.block;
    w.of.logit_multiplier = 1e-5f, w.of.multiplier = 1, w.of.bias = 128;
    w.io = {of.rows, of.rows, q.data(), k.data(), v.data(), c.data(), channels, channels, channels, channels};
    Aligned<uint8_t> scratch(attention_scratch(kernels, w.of).bytes);
    printf(" %dx%d %.1f", static_cast<int>(of.rows), static_cast<int>(of.heads),
           rate(2.0 * static_cast<double>(of.rows * keys * channels),
                [&] { run_attention(kernels, w.of, w.io, scratch.data(), {0, 1}); }));
  }
  printf("\n");
}

}  // namespace

const Family kAttentionFamily = {check, bench};

}  // namespace qdeploy
