// Runs model files on every instruction set of this CPU and compares all activations and the output bit for bit:
// check_model FILE...
// The images (or texts, of several lengths where they may differ) are pseudo-random and the same on every machine: so are
// the printed checksums, or something is wrong.
// Exit status 1 where two instruction sets differ.
#include "cpu.h"
#include "session.h"

#include <cinttypes>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

using namespace qdeploy;

namespace {

constexpr int64_t kImages = 3;

class Checksum {  // FNV-1a
 public:
  void add(const std::vector<uint8_t>& bytes) {
    for (const uint8_t byte : bytes) hash_ = (hash_ ^ byte) * 0x100000001b3u;
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

int64_t elements(const Activation& a) { return kImages * a.c * a.h * a.w; }
size_t bytes(const Activation& a) { return static_cast<size_t>(elements(a)) * a.bytes(); }

// Real values that reach all codes of the input, and a little beyond.
std::vector<float> random_images(const Activation& input) {
  std::vector<float> images(elements(input));
  uint32_t state = 1;
  for (float& x : images) {
    state = state * 1664525 + 1013904223;
    const float code = static_cast<float>(state >> 8) * (288.0f / (1 << 24)) - 16.0f;
    x = (code - static_cast<float>(input.zero_point)) * input.scale;
  }
  return images;
}

// Token ids below the vocabulary; none where the input is numbers.
std::vector<int32_t> random_ids(const Program& program) {
  std::vector<int32_t> ids(static_cast<size_t>(kImages * program.longest));
  uint32_t state = 1;
  for (int32_t& id : ids) {
    state = state * 1664525 + 1013904223;
    id = static_cast<int32_t>((state >> 8) % program.graph.vocabulary);
  }
  return ids;
}

// Of all outputs of nodes, then of the outputs as users get them, where activations take over each other's memory.
uint64_t checksum(const ModelFile& file, int threads, const std::string& isa, const std::string& conv_form) {
  Session session(file, threads, isa, kMacsPerThread, conv_form);
  const Program& program = session.program();
  const std::vector<float> numbers = random_images(program.activations[program.member_input[0]]);
  const std::vector<int32_t> ids = random_ids(program);
  const std::vector<int64_t> lengths = {program.longest / 2 + 1, program.longest, 1};
  Images images = {numbers.data(), false, kImages};
  if (!ids.empty())
    images = {ids.data(), false, kImages, program.longest, program.graph.variable ? lengths.data() : nullptr};
  std::vector<std::vector<uint8_t>> nodes, outputs;
  Results with_taps, results;
  const bool is_ensemble = program.graph.combine != Combine::none;
  for (size_t o = 0; o < (is_ensemble ? 1 : program.outputs.size()); ++o) {
    outputs.emplace_back(bytes(program.activations[program.outputs[o]]));
    results.outputs.push_back(outputs.back().data());
  }
  with_taps.outputs = results.outputs;
  for (const Step& step : program.steps) {
    nodes.emplace_back(bytes(program.activations[step.output]));
    with_taps.taps.push_back({step.output, nodes.back().data()});
  }
  Checksum sum;
  session.run(images, with_taps);
  for (const std::vector<uint8_t>& node : nodes) sum.add(node);
  session.run(images, results);
  for (const std::vector<uint8_t>& output : outputs) sum.add(output);
  return sum.value();
}

// True if all instruction sets, with one thread and with two, and all forms of convolutions give the same checksum.
bool check(const ModelFile& file) {
  bool equal = true;
  const uint64_t expected = checksum(file, 1, "scalar", "direct");
  for (const std::string& isa : available_isas()) {
    for (const int threads : {1, 2}) {
      for (const char* form : {"direct", "winograd_4x4", "winograd_2x2", ""}) {
        const uint64_t sum = checksum(file, threads, isa, form);
        printf("%016" PRIx64 " %s threads=%d %s %s\n", sum, file.path().c_str(), threads, *form ? form : "by_rule",
               isa.c_str());
        equal &= sum == expected;
      }
    }
  }
  return equal;
}

}  // namespace

int main(int argc, char** argv) {
  bool equal = true;
  try {
    for (int i = 1; i < argc; ++i) equal &= check(ModelFile(argv[i]));
  } catch (const std::exception& error) {
    printf("%s\n", error.what());
    return 1;
  }
  return equal ? 0 : 1;
}
