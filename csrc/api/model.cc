// include/qdeploy.h on top of a Session: checks what a caller gives, as qdeploy/model.py does.
#include <qdeploy.h>

#include <algorithm>
#include <cstring>

#include "../errors.h"
#include "../session.h"
#include "../within_memory.h"
#include "plan_text.h"

namespace qdeploy {
namespace {

// work(), whose errors leave as the one type of the header.
template <class Work>
auto guarded(const std::string& where, const Work& work) {
  try {
    return within_memory<ModelError>(where, work);
  } catch (const std::runtime_error& error) {
    throw Error(error.what());
  }
}

const Tensor& input_of(const Session& session) { return session.program().graph.members[0].tensors[0]; }

const Tensor& output_of(const Session& session) {
  const Member& member = session.program().graph.members[0];
  return member.tensors[member.output()];
}

// Of one result, of a text with `width` tokens.
std::vector<int64_t> shape_of_output(const Session& session, int64_t width) {
  const Tensor& out = output_of(session);
  std::vector<int64_t> shape = out.shape;
  if (out.varies) shape[0] -= session.program().longest - width;
  return shape;
}

size_t elements_of(const std::vector<int64_t>& shape, int64_t n) {
  for (const int64_t size : shape) n *= size;
  return static_cast<size_t>(n);
}

// "3, 224, 224]": the end of the shape of a batch.
std::string sizes_text(const std::vector<int64_t>& shape) { return shape_text(shape).substr(1); }

std::string accepted_text(const Session& session) {
  const Tensor& in = input_of(session);
  const Graph& graph = session.program().graph;
  const std::string longest = std::to_string(session.program().longest);
  if (graph.variable) return "int64 [N, T] with T from 1 to " + longest;
  if (graph.vocabulary > 0) return "int64 [N, " + longest + "]";
  const std::string f32 = "float32 [N, " + sizes_text(in.shape);
  return graph.preprocess ? f32 + " or uint8 [N, " + sizes_text({in.h, in.w, in.c}) : f32;
}

// That n images and their results fit the memory, so that no size of them overflows.
void check_count(const Session& session, int64_t n) {
  if (n < 0) fail("at least 0", std::to_string(n), "n");
  const uint64_t bytes = elements_of(input_of(session).shape, 1) + elements_of(output_of(session).shape, sizeof(float));
  if (static_cast<uint64_t>(n) <= session.memory() / bytes) return;
  fail("a batch that fits the " + std::to_string(session.memory()) + " bytes of memory",
       std::to_string(n) + " images, which need " + std::to_string(bytes) + " bytes each", "the input");
}

void check_pointer(const void* pointer, int64_t n, const char* what, const char* where) {
  if (!pointer && n > 0) fail(what, "a null pointer", where);
}

Images checked_images(const Session& session, const void* data, bool is_u8, int64_t n) {
  const Graph& graph = session.program().graph;
  const bool fits = graph.vocabulary == 0 && (!is_u8 || graph.preprocess);
  if (!fits) fail(accepted_text(session), is_u8 ? "uint8" : "float32", "the input");
  check_count(session, n);
  check_pointer(data, n, "images", "the input");
  return {data, is_u8, n};
}

// Texts as the engine takes them.
class Texts {
 public:
  Texts(const Session& session, const int64_t* ids, int64_t n, int64_t width, const int64_t* lengths) : width_(width) {
    const Graph& graph = session.program().graph;
    const int64_t longest = session.program().longest;
    const bool fits = graph.vocabulary > 0 && width <= longest && width >= (graph.variable ? 1 : longest);
    if (!fits) fail(accepted_text(session), "int64 " + shape_text({n, width}), "the input");
    if (lengths && !graph.variable) fail("no lengths for texts of one length", "some", "the lengths");
    check_count(session, n);
    check_pointer(ids, n, "token ids", "the input");
    ids_.resize(elements_of({width}, n));
    for (int64_t i = 0; i < n; ++i) copy(ids + i * width, lengths ? lengths[i] : width, i, graph.vocabulary);
    if (!graph.variable) lengths_.clear();
  }

  Images images() const {
    const int64_t n = static_cast<int64_t>(ids_.size()) / width_;
    return {ids_.data(), false, n, width_, lengths_.empty() ? nullptr : lengths_.data()};
  }

 private:
  void copy(const int64_t* ids, int64_t length, int64_t text, int64_t vocabulary) {
    if (length < 1 || length > width_) {
      fail("1 to " + std::to_string(width_) + " tokens", std::to_string(length),
           "text " + std::to_string(text) + " of the lengths");
    }
    lengths_.push_back(length);
    for (int64_t t = 0; t < length; ++t) {
      if (ids[t] < 0 || ids[t] >= vocabulary) {
        fail("token ids from 0 to " + std::to_string(vocabulary - 1), std::to_string(ids[t]), "the input");
      }
      ids_[static_cast<size_t>(text * width_ + t)] = static_cast<int32_t>(ids[t]);
    }
  }

  int64_t width_;
  std::vector<int32_t> ids_;      // 0 where nothing is read
  std::vector<int64_t> lengths_;  // empty where all have the longest
};

template <typename Code>
void write_reals(const Tensor& tensor, const std::vector<uint8_t>& codes, float* output) {
  for (size_t i = 0; i * sizeof(Code) < codes.size(); ++i) {
    Code code;
    memcpy(&code, codes.data() + i * sizeof code, sizeof code);
    output[i] = tensor.scale * static_cast<float>(code - tensor.zero_point);
  }
}

void run_checked(Session& session, const Images& images, float* output) {
  check_pointer(output, images.count, "room for the results", "the output");
  if (images.count == 0) return;
  const Tensor& out = output_of(session);
  const size_t elements = elements_of(shape_of_output(session, images.width), images.count);
  Results results;
  if (out.is_f32()) {
    if (out.varies) std::fill(output, output + elements, 0.0f);
    results.output = output;
    return session.run(images, results);
  }
  std::vector<uint8_t> codes(elements * static_cast<size_t>(bytes_of(out.type)), out.zero_point);  // s16: 0
  results.output = codes.data();
  session.run(images, results);
  if (out.type == Dtype::s16) return write_reals<int16_t>(out, codes, output);
  write_reals<uint8_t>(out, codes, output);
}

std::vector<int64_t> predict_checked(Session& session, const Images& images) {
  const std::vector<int64_t>& shape = output_of(session).shape;
  if (shape.size() != 1) fail("a model with one score per class", "output " + shape_text(shape), "predict");
  if (shape[0] < 2) fail("a model with two or more scores", "one (its sign says the class)", "predict");
  std::vector<int64_t> classes(static_cast<size_t>(images.count));
  if (classes.empty()) return classes;
  std::vector<float> scores(elements_of(shape, images.count));  // or codes, which are no larger
  Results results;
  results.output = scores.data();
  results.classes = classes.data();
  session.run(images, results);
  return classes;
}

}  // namespace

Model::Model(const std::string& path, int num_threads, const std::string& isa)
    : session_(guarded(path, [&] { return std::make_shared<Session>(ModelFile(path), num_threads, isa); })) {}

Model::Model(const uint8_t* content, size_t bytes, int num_threads, const std::string& isa)
    : session_(guarded("<bytes>", [&] {
        check_pointer(content, bytes > 0, "the content of a file", "<bytes>");
        return std::make_shared<Session>(ModelFile("<bytes>", content, bytes), num_threads, isa);
      })) {}

std::vector<int64_t> Model::input_shape() const { return input_of(*session_).shape; }

std::vector<int64_t> Model::output_shape(int64_t width) const {
  return guarded("width", [&] {
    const int64_t longest = session_->program().longest, shortest = variable() ? 1 : longest;
    if (width == 0) return shape_of_output(*session_, longest);
    if (width >= shortest && width <= longest) return shape_of_output(*session_, width);
    fail((variable() ? "1 to " : "") + std::to_string(longest) + " tokens", std::to_string(width), "width");
  });
}

bool Model::takes_u8() const { return session_->program().graph.preprocess; }

int64_t Model::vocabulary() const { return session_->program().graph.vocabulary; }

bool Model::variable() const { return session_->program().graph.variable; }

std::vector<std::string> Model::classes() const { return session_->program().graph.classes; }

void Model::run(const float* images, int64_t n, float* output) const {
  guarded("the input", [&] { run_checked(*session_, checked_images(*session_, images, false, n), output); });
}

void Model::run(const uint8_t* images, int64_t n, float* output) const {
  guarded("the input", [&] { run_checked(*session_, checked_images(*session_, images, true, n), output); });
}

void Model::run(const int64_t* ids, int64_t n, int64_t width, const int64_t* lengths, float* output) const {
  guarded("the input", [&] { run_checked(*session_, Texts(*session_, ids, n, width, lengths).images(), output); });
}

std::vector<int64_t> Model::predict(const float* images, int64_t n) const {
  return guarded("the input", [&] { return predict_checked(*session_, checked_images(*session_, images, false, n)); });
}

std::vector<int64_t> Model::predict(const uint8_t* images, int64_t n) const {
  return guarded("the input", [&] { return predict_checked(*session_, checked_images(*session_, images, true, n)); });
}

std::vector<int64_t> Model::predict(const int64_t* ids, int64_t n, int64_t width, const int64_t* lengths) const {
  return guarded("the input",
                 [&] { return predict_checked(*session_, Texts(*session_, ids, n, width, lengths).images()); });
}

std::string Model::plan(int64_t batch) const {
  return guarded("batch", [&] { return plan_text(*session_, batch); });
}

}  // namespace qdeploy
