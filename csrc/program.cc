#include "program.h"

#include <algorithm>

#include "errors.h"
#include "ops/conv.h"
#include "pack.h"

namespace qdeploy {
namespace {

// Limits of one image, so that offsets inside a batch chunk fit 32 bits.
constexpr int64_t kMaxImage = int64_t{1} << 29;

bool same_table(const SharedBytes& a, const SharedBytes& b) { return a == b || (a && b && *a == *b); }

// Lays out all activations and lists the steps of the members one after another.
class Builder {
 public:
  Builder(const ModelFile& file, const Kernels& kernels, int threads, ConvForm form) : file_(file), footprint_(file) {
    program_.kernels = &kernels;
    program_.threads = threads;
    program_.form = form;
    program_.file_bytes = file.bytes();
    program_.graph = read_graph(file, &footprint_);
  }

  Program build() {
    for (size_t m = 0; m < program_.graph.members.size(); ++m) add_member(static_cast<int>(m));
    add_borders();
    set_pitches();
    share_inputs();
    if (program_.graph.vocabulary > 0) program_.longest = program_.activations[program_.member_input[0]].h;
    pack_weights(file_, &footprint_, &program_);
    program_.footprint = footprint_.bytes();
    return std::move(program_);
  }

 private:
  void add_member(int m) {
    const Member& member = program_.graph.members[m];
    const int first = static_cast<int>(program_.activations.size());
    for (const Tensor& tensor : member.tensors) {
      Activation activation;
      activation.c = tensor.c, activation.h = tensor.h, activation.w = tensor.w;
      activation.type = tensor.type;
      activation.is_tokens = tensor.is_tokens();
      activation.varies = tensor.varies;
      activation.scale = tensor.scale;
      activation.zero_point = tensor.zero_point;
      program_.activations.push_back(activation);
    }
    for (const Node& node : member.nodes) {
      Step step;
      step.node = &node;
      step.member = m;
      for (const int input : node.inputs) step.inputs.push_back(first + input);
      step.output = first + node.output;
      if (node.op->macs) step.macs = node.op->macs(member, node);
      program_.steps.push_back(std::move(step));
    }
    program_.member_input.push_back(first);
    for (const int output : member.outputs) program_.outputs.push_back(first + output);
  }

  // Every convolution finds its padding around its input, written by whoever produced it.
  void add_borders() {
    for (const Step& step : program_.steps) {
      const ConvData* conv = conv_of(*step.node);
      if (!conv) continue;
      Activation& in = program_.activations[step.inputs[0]];
      for (int i = 0; i < 4; ++i) in.border[i] = std::max(in.border[i], conv->window.padding[i]);
    }
  }

  void set_pitches() {
    auto activation = program_.activations.begin();
    for (const Member& member : program_.graph.members) {
      for (const Tensor& tensor : member.tensors) set_pitches(*activation++, tensor, member);
    }
  }

  void set_pitches(Activation& a, const Tensor& tensor, const Member& member) {
    const int64_t rows = a.border[0] + a.h + a.border[2], columns = a.border[1] + a.w + a.border[3];
    const int64_t limit = kMaxImage / a.c;
    require(rows <= limit && columns <= limit && rows * columns <= limit, "a padded image below 2^29 elements",
            shape_text({a.c, rows, columns}), place_of(tensor, member, file_));
    a.row_pitch = columns * a.c;
    a.image_pitch = rows * a.row_pitch;
    a.origin = a.border[0] * a.row_pitch + a.border[1] * a.c;
  }

  // Members that quantize the images alike read one quantized input.
  void share_inputs() {
    const std::vector<Member>& members = program_.graph.members;
    for (size_t m = 1; m < members.size(); ++m) {
      for (size_t other = 0; other < m; ++other) {
        const int mine = program_.member_input[m], theirs = program_.member_input[other];
        const Activation &a = program_.activations[mine], &b = program_.activations[theirs];
        const bool same = a.same_layout(b) && a.scale == b.scale && a.zero_point == b.zero_point &&
                          same_table(members[m].preprocess_table, members[other].preprocess_table);
        if (!same) continue;
        for (Step& step : program_.steps) {
          if (step.member == static_cast<int>(m)) std::replace(step.inputs.begin(), step.inputs.end(), mine, theirs);
        }
        program_.member_input[m] = theirs;
        break;
      }
    }
  }

  const ModelFile& file_;
  Footprint footprint_;
  Program program_;
};

}  // namespace

bool Activation::same_layout(const Activation& other) const {
  return c == other.c && h == other.h && w == other.w && type == other.type &&
         std::equal(border, border + 4, other.border);
}

bool Activation::same_rows(const Activation& other) const {
  return !has_border() && !other.has_border() && type == other.type && c == other.c && h * w == other.h * other.w;
}

bool Activation::same_order(const Activation& other) const {
  const auto is_array = [](const Activation& a) { return a.is_tokens || a.c == 1 || a.h * a.w == 1; };
  const bool same_planes = !is_tokens && !other.is_tokens && c == other.c;
  return !has_border() && !other.has_border() && type == other.type && elements() == other.elements() &&
         (same_planes || (is_array(*this) && is_array(other)));
}

Program load_program(const ModelFile& file, const Kernels& kernels, int threads, ConvForm form) {
  return Builder(file, kernels, threads, form).build();
}

}  // namespace qdeploy
