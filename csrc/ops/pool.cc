// max_pool2d and avg_pool2d: padding does not count.
#include <algorithm>
#include <cmath>

#include "window.h"

namespace qdeploy {
namespace {

struct MaxPoolData : OpData {
  Window window;
};

struct AvgPoolData : OpData {
  Window window;
  SharedFloats multiplier;  // by the number of real elements, or one for all windows
  float bias;
};

// ---- Reading ------------------------------------------------------------------------------------------------------

// The sum of floor((a + i*step) / m) over i < n, all of them natural numbers: points below a line, row by row, then
// column by column.
int64_t sum_of_floors(int64_t n, int64_t a, int64_t step, int64_t m) {
  const int64_t whole = n * (a / m) + n * (n - 1) / 2 * (step / m);
  const int64_t end = a % m + step % m * n;
  return end < m ? whole : whole + sum_of_floors(end / m, end % m, m, step % m);
}

// Every window of a pool must hold a real element of the image along dimension d. Only those that start in the padding
// can miss: with a first element at 0 or later that is `size` or more. A residue r of the dilation is that where
// floor((r + dilation - size) / dilation) is 1: counted together, as a file may have 65,536 pools of 65,535 windows.
void require_real_elements(const NodeSource& node, const Window& window, int d) {
  const int64_t size = d == 0 ? node.input().h : node.input().w, windows = d == 0 ? node.output.h : node.output.w;
  const int64_t dilation = window.dilation[d], extent = dilation * (window.kernel[d] - 1) + 1;
  const int64_t before = window.padding[d], after = window.padding[d + 2];
  const int64_t stride = window.stride[d], in_padding = std::min(windows, (before + stride - 1) / stride);
  const int64_t first = (dilation - before % dilation) % dilation;
  const bool reaches = before < extent && after < extent &&
                       (dilation <= size || sum_of_floors(in_padding, first + dilation - size, stride, dilation) ==
                                                sum_of_floors(in_padding, first, stride, dilation));
  node.require(reaches, "a real element in every window of the pool",
               "padding " + std::to_string(before) + " and " + std::to_string(after) + " on " + std::to_string(size));
}

Window read_pool_window(const NodeSource& node) {
  const Window window = read_window(node);
  require_spatial_output(node, window, node.input().c);
  for (int d = 0; d < 2; ++d) require_real_elements(node, window, d);
  return window;
}

std::unique_ptr<const OpData> read_max_pool2d(const NodeSource& node) {
  auto pool = std::make_unique<MaxPoolData>();
  pool->window = read_pool_window(node);
  return pool;
}

std::unique_ptr<const OpData> read_avg_pool2d(const NodeSource& node) {
  auto pool = std::make_unique<AvgPoolData>();
  pool->window = read_pool_window(node);
  const int64_t elements = pool->window.kernel[0] * pool->window.kernel[1];  // < 2^32
  node.require(static_cast<double>(elements) * node.input().most() < 0x1p31, "a window with sums below 2^31",
               std::to_string(elements) + " elements");
  pool->multiplier = node.floats("multiplier", {-1});
  const int64_t count = static_cast<int64_t>(pool->multiplier->values.size());
  node.require(count == 1 || count == elements, "1 or " + std::to_string(elements) + " multipliers",
               std::to_string(count));
  pool->bias = number_member(node.json, "bias", node.where);
  const double most = (count == 1 ? static_cast<double>(elements) : 1.0) * pool->multiplier->largest_by_count;
  require_bounded(node.input().most() * most + std::fabs(pool->bias), node.output.is_f32(), node.where);
  return pool;
}

// ---- Running ------------------------------------------------------------------------------------------------------

// The part of a window that lies inside the image, along one dimension.
struct Span {
  int64_t first, count;
};

Span clip(int64_t out, const Window& window, int d, int64_t size) {
  const int64_t start = out * window.stride[d] - window.padding[d], dilation = window.dilation[d];
  const int64_t skipped = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const int64_t first = start + skipped * dilation;
  const int64_t left = first < size ? (size - 1 - first) / dilation + 1 : 0;
  return {first, std::min(window.kernel[d] - skipped, left)};
}

// Output pixels from x on, at most `most`, whose windows clip alike: the whole ones in the middle of a row, else one.
int64_t alike(int64_t x, int64_t most, const Window& window, int64_t size) {
  const int64_t reach = (window.kernel[1] - 1) * window.dilation[1];
  const auto whole = [&](int64_t i) {
    const int64_t start = i * window.stride[1] - window.padding[1];
    return start >= 0 && start + reach < size;
  };
  int64_t count = 1;
  while (count < most && whole(x) && whole(x + count)) ++count;
  return count;
}

// Calls pool(params, where the output begins) for output pixels whose windows clip alike.
template <class Pool>
void for_each_window(const StepRun& run, const Window& window, const Pool& pool) {
  const Activation &in = run.in(), &out = run.out();
  PoolParams params = {};
  params.row_stride = window.dilation[0] * in.row_pitch;
  params.col_stride = window.dilation[1] * in.c;
  params.n = static_cast<size_t>(in.c);
  params.a_stride = window.stride[1] * in.c;
  params.c_stride = out.c;
  const Range pixels = slice(run.chunk.images * out.h * out.w, run.share);
  for (int64_t pixel = pixels.begin, count = 0; pixel < pixels.end; pixel += count) {
    const int64_t row = pixel / out.w, x = pixel % out.w;
    count = alike(x, std::min(out.w - x, pixels.end - pixel), window, in.w);
    const Span rows = clip(row % out.h, window, 0, in.h), columns = clip(x, window, 1, in.w);
    const int64_t first = row / out.h * in.image_pitch + in.origin + rows.first * in.row_pitch + columns.first * in.c;
    params.a = run.from() + first * in.bytes();
    params.rows = static_cast<size_t>(rows.count);
    params.cols = static_cast<size_t>(columns.count);
    params.pixels = static_cast<size_t>(count);
    pool(params, out.row_offset(row) + x * out.c);
  }
}

void run_max_pool2d(const StepRun& run) {
  for_each_window(run, run.data<MaxPoolData>().window, [&](const PoolParams& params, int64_t offset) {
    run.kernels().max_pool(&params, run.to() + offset);
  });
}

// Windows of or to s16: each is a mean of rows.
void avg_pool_s16(const StepRun& run, const AvgPoolParams& params, int64_t offset) {
  const PoolParams& window = params.window;
  MeanParams mean = {};
  mean.rows = window.rows, mean.columns = window.cols, mean.n = window.n;
  mean.row_stride = window.row_stride, mean.column_stride = window.col_stride;
  mean.a_type = run.in().type, mean.c_type = run.out().type;
  mean.offset = params.zero_point * static_cast<int32_t>(window.rows * window.cols);
  mean.multiplier = params.multiplier, mean.bias = params.bias;
  mean.qmin = params.qmin, mean.qmax = params.qmax;
  for (size_t pixel = 0; pixel < window.pixels; ++pixel, offset += window.c_stride) {
    mean.a = window.a + static_cast<int64_t>(pixel) * window.a_stride * run.in().bytes();
    mean.c = run.to() + offset * run.out().bytes();
    run.kernels().mean(&mean);
  }
}

bool has_s16(const Activation& in, const Activation& out) { return in.type == Dtype::s16 || out.type == Dtype::s16; }

void run_avg_pool2d(const StepRun& run) {
  const AvgPoolData& pool = run.data<AvgPoolData>();
  const Array<float>& multiplier = pool.multiplier->values;
  AvgPoolParams params = {};
  params.zero_point = run.in().zero_point;
  params.bias = pool.bias;
  params.qmin = run.node().qmin;
  params.qmax = run.node().qmax;
  for_each_window(run, pool.window, [&](const PoolParams& window, int64_t offset) {
    params.window = window;
    params.multiplier = multiplier[multiplier.size() == 1 ? 0 : window.rows * window.cols - 1];
    if (has_s16(run.in(), run.out())) {
      avg_pool_s16(run, params, offset);
    } else if (run.out().is_f32()) {
      run.kernels().avg_pool_f32(&params, run.to_f32() + offset);
    } else {
      run.kernels().avg_pool_qu8(&params, run.to() + offset);
    }
  });
}

}  // namespace

std::vector<OpInfo> pool_ops() {
  const std::set<std::string> window = {"kernel", "stride", "padding"};
  std::set<std::string> max = window, avg = window;
  max.insert("dilation");
  avg.insert({"multiplier", "bias"});
  return {
      // name, version, inputs, output, in place, reads, writes, rows, keys, read, run, scratch
      {"max_pool2d",
       1,
       {1, 1},
       Output::same_grid,
       InPlace::never,
       kU8,
       kU8,
       fixed_rows,
       max,
       read_max_pool2d,
       run_max_pool2d},
      {"avg_pool2d",
       1,
       {1, 1},
       Output::requantized,
       InPlace::never,
       kCodes,
       kCodesOrF32,
       fixed_rows,
       avg,
       read_avg_pool2d,
       run_avg_pool2d},
  };
}

}  // namespace qdeploy
