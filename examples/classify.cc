// The classes of one image: classify MODEL IMAGE [THREADS]
// IMAGE holds raw pixels in rows, such as RGB RGB ..., of the size that the model takes. ImageMagick makes one by
//   convert photo.jpg -resize 224x224! -depth 8 photo.rgb
// Build it with the CMakeLists.txt beside it, once qdeploy is installed (docs/cpp.md).
#include <qdeploy.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr size_t kShown = 5;

std::vector<uint8_t> read_image(const char* path, const qdeploy::Model& model) {
  const std::vector<int64_t> shape = model.input_shape();  // channels, height, width
  if (!model.takes_u8()) throw std::runtime_error("expected a model of raw pixels, got one of numbers");
  const size_t expected = static_cast<size_t>(shape[0] * shape[1] * shape[2]);
  std::ifstream file(path, std::ios::binary);
  const std::vector<uint8_t> pixels{std::istreambuf_iterator<char>(file), {}};
  if (pixels.size() == expected) return pixels;
  throw std::runtime_error("expected " + std::to_string(expected) + " bytes of pixels, got " +
                           std::to_string(pixels.size()) + " - at " + path);
}

void show_best(const std::vector<float>& scores, const std::vector<std::string>& classes) {
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  order.resize(std::min(order.size(), kShown));
  for (const size_t i : order) {
    const std::string name = classes.empty() ? "class " + std::to_string(i) : classes[i];
    std::printf("%9.4f  %s\n", static_cast<double>(scores[i]), name.c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "classify MODEL IMAGE [THREADS]\n");
    return 2;
  }
  try {
    const qdeploy::Model model(argv[1], argc == 4 ? std::atoi(argv[3]) : 0);
    const std::vector<uint8_t> image = read_image(argv[2], model);
    std::vector<float> scores(static_cast<size_t>(model.output_shape()[0]));
    model.run(image.data(), 1, scores.data());
    show_best(scores, model.classes());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return 0;
}
