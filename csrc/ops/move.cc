// concat, reshape, gather, tokens and image: codes move, nothing is computed.
#include <algorithm>
#include <cstring>

#include "../errors.h"
#include "../gather.h"
#include "op.h"

namespace qdeploy {
namespace {

using Shape = std::vector<int64_t>;

struct ConcatData : OpData {
  bool by_rows = false;  // of tokens; else by channels
};

struct GatherData : OpData {
  bool by_rows;
  SharedInts index;
};

// ---- concat -------------------------------------------------------------------------------------------------------

std::unique_ptr<const OpData> read_concat(const NodeSource& node) {
  auto concat = std::make_unique<ConcatData>();
  const bool has_axis = node.output.is_tokens();
  const bool by_channels = has_axis && node.choice("axis", {"rows", "channels"}) == "channels";
  concat->by_rows = has_axis && !by_channels;
  const size_t axis = by_channels ? 1 : 0;
  Shape expected = node.input().shape;
  for (size_t i = 1; i < node.inputs.size(); ++i) {
    const Shape& shape = node.input(i).shape;
    bool same = shape.size() == expected.size();
    for (size_t d = 0; same && d < shape.size(); ++d) same = d == axis || shape[d] == expected[d];
    node.require(same, "inputs that differ in dimension " + std::to_string(axis) + " only", shape_text(shape));
    if (axis < shape.size()) expected[axis] += shape[axis];  // at most 2^28 * 2^16
  }
  node.require(node.output.shape.size() == expected.size(),
               "an output of " + std::to_string(expected.size()) + " dimensions", shape_text(node.output.shape));
  node.require_output(expected);
  return concat;
}

Rows rows_of_concat(const NodeSource& node, const std::vector<Rows>& inputs) {
  const bool by_channels = node.output.is_tokens() && node.choice("axis", {"rows", "channels"}) == "channels";
  return by_channels ? same_rows(node, inputs) : fixed_rows(node, inputs);
}

// Row `row` of the output, from whichever input has it.
void copy_token(const StepRun& run, int64_t row) {
  const Activation& out = run.out();
  int64_t y = row % out.h;
  size_t i = 0;
  for (; y >= run.in(i).h; ++i) y -= run.in(i).h;
  memcpy(run.row_to(row), run.row_from(row / out.h * run.in(i).h + y, i), out.c * out.bytes());
}

void run_concat(const StepRun& run) {
  const Activation& out = run.out();
  const bool by_rows = run.data<ConcatData>().by_rows;
  const int64_t pixel = out.c * out.bytes();
  const Range rows = run.rows();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (by_rows) {
      copy_token(run, row);
      continue;
    }
    uint8_t* to = run.row_to(row);
    for (size_t i = 0; i < run.step.inputs.size(); ++i) {
      const uint8_t* from = run.row_from(row, i);
      const int64_t bytes = run.in(i).c * out.bytes();
      for (int64_t x = 0; x < out.w; ++x) memcpy(to + x * pixel, from + x * bytes, bytes);
      to += bytes;
    }
  }
}

// ---- reshape ------------------------------------------------------------------------------------------------------

std::unique_ptr<const OpData> read_reshape(const NodeSource& node) {
  const Tensor &in = node.input(), &out = node.output;
  node.require(in.c * in.h * in.w == out.c * out.h * out.w, "an output with as many elements",
               shape_text(in.shape) + " to " + shape_text(out.shape));
  return nullptr;
}

// The dimensions in whose order both sides of a reshape number their elements, and where those lie in memory: NHWC.
struct Order {
  int64_t size[3], stride[3];
};

Order order_of(const Activation& a) {
  if (a.is_tokens) return {{a.h, 1, a.c}, {a.row_pitch, 0, 1}};
  return {{a.c, a.h, a.w}, {1, a.row_pitch, a.c}};
}

void run_reshape(const StepRun& run) {
  const Activation &in = run.in(), &out = run.out();
  if (run.from() == run.to()) return;
  if (in.same_order(out)) {
    const Range elements = slice(run.chunk.images * out.elements(), run.share);
    memcpy(run.to() + elements.begin, run.from() + elements.begin, elements.end - elements.begin);
    return;
  }
  const Order of = order_of(in), order = order_of(out);
  const int64_t plane = order.size[1] * order.size[2];
  const Range outer = slice(run.chunk.images * of.size[0], run.share);
  for (int64_t i = outer.begin; i < outer.end; ++i) {
    const int64_t image = i / of.size[0], first = i % of.size[0];
    const uint8_t* from = run.from() + image * in.image_pitch + in.origin + first * of.stride[0];
    uint8_t* to = run.to() + image * out.image_pitch + out.origin;
    int64_t element = first * of.size[1] * of.size[2];
    if (plane == 1 && order.stride[0] == 1) {  // a flatten: 25088 elements of VGG-16 took 126 us below
      uint8_t* flat = to + element;
      for (int64_t y = 0; y < of.size[1]; ++y) {
        for (int64_t x = 0; x < of.size[2]; ++x) *flat++ = from[y * of.stride[1] + x * of.stride[2]];
      }
      continue;
    }
    for (int64_t y = 0; y < of.size[1]; ++y) {
      for (int64_t x = 0; x < of.size[2]; ++x, ++element) {
        const int64_t place[3] = {element / plane, element % plane / order.size[2], element % order.size[2]};
        to[place[0] * order.stride[0] + place[1] * order.stride[1] + place[2] * order.stride[2]] =
            from[y * of.stride[1] + x * of.stride[2]];
      }
    }
  }
}

// ---- gather -------------------------------------------------------------------------------------------------------

std::unique_ptr<const OpData> read_gather(const NodeSource& node) {
  auto gather = std::make_unique<GatherData>();
  const Tensor &x = node.input(), &out = node.output;
  gather->by_rows = node.choice("axis", {"rows", "channels"}) == "rows";
  gather->index = node.ints("index", {-1});
  const Ints& index = *gather->index;
  const int64_t last = (gather->by_rows ? x.h * x.w : x.c) - 1, count = static_cast<int64_t>(index.values.size());
  node.require(-1 <= index.low && index.high <= last, "indices from -1 to " + std::to_string(last),
               std::to_string(index.low) + " to " + std::to_string(index.high));
  if (!gather->by_rows) {
    Shape expected = x.shape;
    (x.is_tokens() ? expected[1] : expected[0]) = count;
    node.require_output(expected);
    return gather;
  }
  node.require(out.h * out.w == count && out.c == x.c,
               "an output of " + std::to_string(count) + " rows of " + std::to_string(x.c) + " channels",
               shape_text(out.shape));
  return gather;
}

// Of a text: rows that every text has, such as the first token's.
Rows rows_of_gather(const NodeSource& node, const std::vector<Rows>& inputs) {
  if (!inputs[0] || node.choice("axis", {"rows", "channels"}) == "channels") return inputs[0];
  const int64_t last = node.ints("index", {-1})->high;
  node.require(last <= *inputs[0], "rows that the shortest text has, 0 to " + std::to_string(*inputs[0]),
               std::to_string(last));
  return {};
}

// Rows of the input that follow each other from `first` on, where the index has them, and where they lie.
struct Taken {
  const uint8_t* from;  // null: zero points
  int64_t count;
};

Taken taken(const StepRun& run, int64_t image, const int32_t* index, int64_t most) {
  const Activation& in = run.in();
  const int64_t first = *index, bytes = in.c * in.bytes();
  if (first < 0) return {nullptr, 1};
  const int64_t y = in.has_border() ? first / in.w : 0, x = first - y * in.w;
  if (in.has_border()) most = std::min(most, in.w - x);
  int64_t count = 1;
  while (count < most && index[count] == first + count) ++count;
  return {run.row_from(image * in.h + y) + x * bytes, count};
}

// Rows are tokens or pixels here, and a line is what lies in memory without a gap.
void gather_rows(const StepRun& run, const Array<int32_t>& index) {
  const Activation &in = run.in(), &out = run.out();
  const int64_t bytes = out.c * out.bytes(), pixels = out.h * out.w, line = out.has_border() ? out.w : pixels;
  const Range rows = run.rows();
  for (int64_t pixel = rows.begin * out.w, end; pixel < rows.end * out.w; pixel = end) {
    end = std::min(rows.end * out.w, (pixel / line + 1) * line);
    const int64_t image = pixel / pixels;
    const int32_t* next = index.data() + pixel % pixels;
    uint8_t* to = run.row_to(pixel / out.w);
    for (int64_t left = end - pixel; left > 0;) {
      const auto [from, count] = taken(run, image, next, left);
      from ? memcpy(to, from, count * bytes) : memset(to, in.zero_point, bytes);  // of s16 it is 0
      left -= count, next += count, to += count * bytes;
    }
  }
}

void gather_channels(const StepRun& run, const Array<int32_t>& index) {
  const Activation &in = run.in(), &out = run.out();
  const ChannelGather gather = {
      index.data(), index.size(), static_cast<size_t>(in.c), static_cast<size_t>(out.bytes()), in.zero_point,
      in.c,         out.c};
  const bool is_dense = !in.has_border() && !out.has_border();
  const Range rows = run.rows();
  for (int64_t row = rows.begin, end; row < rows.end; row = end) {
    end = is_dense ? rows.end : row + 1;
    gather_channels(run.kernels(), gather, static_cast<size_t>((end - row) * out.w), run.row_from(row), run.row_to(row),
                    run.scratch());
  }
}

size_t scratch_of_gather(const Program&, const Step& step, const Activations& activations, int64_t) {
  const bool by_rows = static_cast<const GatherData&>(*step.node->data).by_rows;
  return by_rows ? 0 : gather_scratch(static_cast<size_t>(activations[step.output].c));
}

void run_gather(const StepRun& run) {
  const GatherData& gather = run.data<GatherData>();
  gather.by_rows ? gather_rows(run, gather.index->values) : gather_channels(run, gather.index->values);
}

// ---- tokens, image ------------------------------------------------------------------------------------------------

std::unique_ptr<const OpData> read_tokens(const NodeSource& node) {
  const Tensor& x = node.input();
  node.require(x.shape.size() == 3, "an input of shape [C, H, W]", shape_text(x.shape));
  node.require_output({x.h * x.w, x.c});
  return nullptr;
}

std::unique_ptr<const OpData> read_image(const NodeSource& node) {
  const Tensor &x = node.input(), &out = node.output;
  node.require(x.is_tokens(), "an input of shape [T, D]", shape_text(x.shape));
  node.require(out.shape.size() == 3 && out.h * out.w == x.h && out.c == x.c,
               "an output [C, H, W] of " + std::to_string(x.h) + " pixels of " + std::to_string(x.c) + " channels",
               shape_text(out.shape));
  return nullptr;
}

// The rows in their order, where they do not lie there already.
void run_rows(const StepRun& run) {
  const Activation &in = run.in(), &out = run.out();
  if (run.from() == run.to()) return;
  const int64_t bytes = out.c * out.bytes();
  const Range rows = slice(run.chunk.images * out.h * out.w, run.share);
  const auto offset = [&](const Activation& a, int64_t row) {
    return (a.row_offset(row / a.w) + row % a.w * a.c) * a.bytes();
  };
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    memcpy(run.to() + offset(out, row), run.from() + offset(in, row), bytes);
  }
}

}  // namespace

std::vector<OpInfo> move_ops() {
  return {
      // name, version, inputs, output, in place, reads, writes, rows, keys, read, run, scratch, macs, token keys
      {"concat",
       1,
       {2, kMaxNodes},
       Output::same_grid,
       InPlace::never,
       kCodes,
       kCodes,
       rows_of_concat,
       {},
       read_concat,
       run_concat,
       nullptr,
       nullptr,
       {"axis"}},
      {"reshape", 1, {1, 1}, Output::same_grid, InPlace::reshaped, kU8, kU8, fixed_rows, {}, read_reshape, run_reshape},
      {"gather",
       3,
       {1, 1},
       Output::same_grid,
       InPlace::never,
       kCodes,
       kCodes,
       rows_of_gather,
       {"axis", "index"},
       read_gather,
       run_gather,
       scratch_of_gather},
      {"tokens", 3, {1, 1}, Output::same_grid, InPlace::rows, kCodes, kCodes, fixed_rows, {}, read_tokens, run_rows},
      {"image", 3, {1, 1}, Output::same_grid, InPlace::rows, kCodes, kCodes, fixed_rows, {}, read_image, run_rows},
  };
}

}  // namespace qdeploy
