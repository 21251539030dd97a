#include "program.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "cpu.h"
#include "errors.h"
#include "pack.h"
#include "thread_pool.h"

namespace qdeploy {
namespace {

// Limits of one image, so that offsets inside a batch chunk fit 32 bits.
constexpr int64_t kMaxImage = int64_t{1} << 29;

// Lays out all activations and lists the steps of the members one after another.
class Builder {
 public:
  Builder(const ModelFile& file, const Kernels& kernels) : file_(file) {
    program_.kernels = &kernels;
    program_.file_bytes = file.bytes();
    program_.graph = read_graph(file);
  }

  Program build(int threads) {
    for (size_t m = 0; m < program_.graph.members.size(); ++m) add_member(static_cast<int>(m));
    add_borders();
    for (size_t i = 0; i < program_.activations.size(); ++i) set_pitches(i);
    share_inputs();
    lower(threads);
    pack(threads);
    return std::move(program_);
  }

 private:
  std::string where(const Step& step) const {
    return "node " + name_text(step.node->name) + ", member " + name_text(program_.graph.members[step.member].name) +
           " of " + file_.path();
  }

  void add_member(int m) {
    const Member& member = program_.graph.members[m];
    const int first = static_cast<int>(program_.activations.size());
    for (const Tensor& tensor : member.tensors) {
      Activation activation;
      activation.c = tensor.c, activation.h = tensor.h, activation.w = tensor.w;
      activation.is_f32 = tensor.is_f32;
      activation.scale = tensor.scale;
      activation.zero_point = tensor.zero_point;
      program_.activations.push_back(activation);
      program_.activation_member.push_back(m);
    }
    for (const Node& node : member.nodes) {
      Step step;
      step.node = &node;
      step.member = m;
      for (const int input : node.inputs) step.inputs.push_back(first + input);
      step.output = first + node.output;
      program_.steps.push_back(std::move(step));
    }
    program_.member_input.push_back(first);
    program_.member_output.push_back(first + member.output());
  }

  // Every convolution finds its padding around its input, written by whoever produced it.
  void add_borders() {
    for (const Step& step : program_.steps) {
      if (step.node->op != Op::conv2d) continue;
      Activation& in = program_.activations[step.inputs[0]];
      for (int i = 0; i < 4; ++i) in.border[i] = std::max(in.border[i], step.node->window.padding[i]);
    }
  }

  void set_pitches(size_t i) {
    Activation& a = program_.activations[i];
    const int64_t rows = a.border[0] + a.h + a.border[2], columns = a.border[1] + a.w + a.border[3];
    const int64_t limit = kMaxImage / a.c;
    if (rows > limit || columns > limit || rows * columns > limit) {
      throw ModelError("expected a padded image below 2^29 elements, got " + shape_text({a.c, rows, columns}) +
                       " - at tensor " + std::to_string(i) + " of " + file_.path());
    }
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
                          members[m].preprocess_table == members[other].preprocess_table;
        if (!same) continue;
        for (Step& step : program_.steps) std::replace(step.inputs.begin(), step.inputs.end(), mine, theirs);
        program_.member_input[m] = theirs;
        break;
      }
    }
  }

  static bool has_weight(const Step& step) { return step.node->op == Op::conv2d || step.node->op == Op::linear; }

  void lower(int threads) {
    std::vector<Step*> convs;
    for (Step& step : program_.steps) {
      if (!has_weight(step)) continue;
      const Activation &in = program_.activations[step.inputs[0]], &out = program_.activations[step.output];
      lower_conv(*step.node, in, out.is_f32, *program_.kernels, &step.conv);
      const Window& window = step.node->window;
      step.macs = out.c * out.h * out.w * (in.c / step.node->groups) * window.kernel[0] * window.kernel[1];
      convs.push_back(&step);
    }
    for_each(threads, convs.size(), [&](Packer& packer, size_t i) {
      const Step& step = *convs[i];
      packer.choose_kernel(*step.node, program_.activations[step.inputs[0]], *program_.kernels, &convs[i]->conv);
    });
    size_t bytes = 0;
    for (Step* step : convs) {
      size_conv(*step->node, program_.activations[step->inputs[0]], &step->conv);
      step->conv.weight_offset = bytes;
      bytes += packed_bytes(step->conv, *step->node);
    }
    if (bytes > physical_memory()) {
      throw ModelError("expected weights that fit this machine's memory, got " + std::to_string(bytes) +
                       " bytes - at " + file_.path());
    }
    program_.weights = AlignedBuffer(bytes);
  }

  void pack(int threads) {
    std::vector<std::pair<Step*, int64_t>> panels;
    for (Step& step : program_.steps) {
      for (int64_t panel = 0; has_weight(step) && panel < step.conv.panels; ++panel) panels.emplace_back(&step, panel);
    }
    for_each(threads, panels.size(), [&](Packer& packer, size_t i) {
      Step& step = *panels[i].first;
      packer.pack_panel(*step.node, program_.activations[step.inputs[0]], program_.activations[step.output].is_f32,
                        panels[i].second, where(step), &step.conv);
    });
  }

  // Calls work(packer, i) for i below `count`, on `threads` threads with a packer each.
  template <class Work>
  void for_each(int threads, size_t count, const Work& work) {
    std::atomic<size_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;
    // Another thread pays from about a megabyte, 0.5 ms, on.
    const int useful = static_cast<int>(std::min<size_t>(threads, 1 + (program_.weights.bytes() >> 20)));
    ThreadPool::shared().run(useful, [&](int, int) {
      try {
        Packer packer(file_, program_.weights.data());
        for (size_t i = next++; i < count; i = next++) work(packer, i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        error = std::current_exception();
        next = count;
      }
    });
    if (error) std::rethrow_exception(error);
  }

  const ModelFile& file_;
  Program program_;
};

}  // namespace

bool Activation::same_layout(const Activation& other) const {
  return c == other.c && h == other.h && w == other.w && is_f32 == other.is_f32 &&
         std::equal(border, border + 4, other.border);
}

Program load_program(const ModelFile& file, const Kernels& kernels, int threads) {
  return Builder(file, kernels).build(threads);
}

}  // namespace qdeploy
