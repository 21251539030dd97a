// Calls include/qdeploy.h as tests/test_cpp.py asks, which compares what comes out with Python:
// call_model open FILE... , call_model bytes FILE... : of each, from its path or from its content, the error or "ok"
// call_model plan FILE BATCH THREADS : the plan
// call_model run FILE f32|u8|ids N THREADS [WIDTH LENGTH...] < input > output : results of N images or texts, f32,
// and then, where there are scores, their classes, i64; many threads call one model at once and have to agree
// call_model misuse FILE : what a call says that does not fit
#include <qdeploy.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

namespace {

using Bytes = std::vector<uint8_t>;

constexpr int kCallers = 3, kCalls = 2;

Bytes read_all(std::istream& from) { return Bytes{std::istreambuf_iterator<char>(from), {}}; }

// What `work` throws, or "ok".
template <class Work>
void say(const Work& work) {
  try {
    work();
    printf("ok\n");
  } catch (const qdeploy::Error& error) {
    printf("%s\n", error.what());
  }
}

void open_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const Bytes content = read_all(file);
  say([&] { qdeploy::Model model(content.data(), content.size(), 1, "scalar"); });
}

struct Call {
  std::string kind;
  Bytes input;
  int64_t n, width;
  std::vector<int64_t> lengths;  // empty: none are given

  const int64_t* ids() const { return reinterpret_cast<const int64_t*>(input.data()); }
  const int64_t* some_lengths() const { return lengths.empty() ? nullptr : lengths.data(); }

  void run(const qdeploy::Model& model, float* output) const {
    if (kind == "u8") return model.run(input.data(), n, output);
    if (kind == "f32") return model.run(reinterpret_cast<const float*>(input.data()), n, output);
    model.run(ids(), n, width, some_lengths(), output);
  }

  std::vector<int64_t> predict(const qdeploy::Model& model) const {
    if (kind == "u8") return model.predict(input.data(), n);
    if (kind == "f32") return model.predict(reinterpret_cast<const float*>(input.data()), n);
    return model.predict(ids(), n, width, some_lengths());
  }
};

size_t results_of(const qdeploy::Model& model, const Call& call) {
  size_t elements = static_cast<size_t>(call.n);
  for (const int64_t size : model.output_shape(call.width)) elements *= static_cast<size_t>(size);
  return elements;
}

int run(const qdeploy::Model& model, const Call& call) {
  std::vector<std::vector<float>> outputs(kCallers, std::vector<float>(results_of(model, call), -1.0f));
  std::vector<std::thread> callers;
  for (std::vector<float>& output : outputs) {
    callers.emplace_back([&model, &call, &output] {
      for (int i = 0; i < kCalls; ++i) call.run(model, output.data());
    });
  }
  for (std::thread& caller : callers) caller.join();
  const size_t bytes = outputs[0].size() * sizeof(float);
  for (const std::vector<float>& output : outputs) {
    if (memcmp(output.data(), outputs[0].data(), bytes) != 0) return 1;
  }
  fwrite(outputs[0].data(), 1, bytes, stdout);
  if (model.output_shape().size() == 1) {
    const std::vector<int64_t> classes = call.predict(model);
    fwrite(classes.data(), sizeof(int64_t), classes.size(), stdout);
  }
  return 0;
}

void misuse(const std::string& path) {
  const qdeploy::Model model(path);
  const qdeploy::Model copy = model;
  const std::vector<float> numbers(4096);
  const std::vector<int64_t> ids(4096, model.vocabulary());
  const std::vector<int64_t> lengths(1, model.input_shape()[0] + 1);
  std::vector<float> output(4096);
  const int64_t longest = model.input_shape()[0];
  say([&] { copy.run(numbers.data(), 0, nullptr); });
  say([&] { copy.run(numbers.data(), -1, output.data()); });
  say([&] { copy.run(numbers.data(), INT64_MAX, output.data()); });
  say([&] { copy.run(numbers.data(), 1, nullptr); });
  say([&] { copy.run(static_cast<const float*>(nullptr), 1, output.data()); });
  say([&] { copy.run(reinterpret_cast<const uint8_t*>(numbers.data()), 1, output.data()); });
  say([&] { copy.run(std::vector<float>(4096, NAN).data(), 1, output.data()); });
  say([&] { copy.run(ids.data(), 1, longest, nullptr, output.data()); });
  say([&] { copy.run(ids.data(), 1, longest + 1, nullptr, output.data()); });
  say([&] { copy.run(ids.data(), 1, longest, lengths.data(), output.data()); });
  say([&] { copy.output_shape(longest + 1); });
  say([&] { copy.plan(0); });
  say([&] { copy.plan(INT64_MAX); });
  say([&] { copy.predict(numbers.data(), 1); });
  say([&] { qdeploy::Model(path, 257); });
  say([&] { qdeploy::Model(path, 1, "abacus"); });
  say([&] { qdeploy::Model(""); });
  say([&] { qdeploy::Model(path + std::string(1, '\0')); });
  say([&] { qdeploy::Model(static_cast<const uint8_t*>(nullptr), 8); });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argv[1];
  try {
    if (what == "open") {
      for (int i = 2; i < argc; ++i) say([&] { qdeploy::Model model(argv[i], 1, "scalar"); });
    } else if (what == "bytes") {
      for (int i = 2; i < argc; ++i) open_bytes(argv[i]);
    } else if (what == "plan") {
      printf("%s", qdeploy::Model(argv[2], atoi(argv[4])).plan(atoll(argv[3])).c_str());
    } else if (what == "misuse") {
      misuse(argv[2]);
    } else {
      Call call = {argv[3], read_all(std::cin), atoll(argv[4]), argc > 6 ? atoll(argv[6]) : 0, {}};
      for (int i = 7; i < argc; ++i) call.lengths.push_back(atoll(argv[i]));
      return run(qdeploy::Model(argv[2], atoi(argv[5])), call);
    }
  } catch (const qdeploy::Error& error) {
    printf("%s\n", error.what());
    return 2;
  }
  return 0;
}
