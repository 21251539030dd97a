// Runs a model file of qdeploy as int8: the same bits on every CPU, with any number of threads, in any batch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace qdeploy {

class Session;  // what is behind a Model

#pragma GCC visibility push(default)

// The one exception of this library. Its text is one line: "expected X, got Y - at Z".
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A loaded network, or an ensemble of some. Any number of threads may call one Model; copies share what was loaded.
// What does not fit, a file or an argument, throws Error.
class Model {
 public:
  // path: of a file that qdeploy wrote. Nothing in it is executed or followed, and it is not needed any more later on.
  // num_threads: at most 256; 0 takes the cores that this process may use. A call takes fewer where more would not pay.
  // isa: "scalar", "avx2", ...; empty takes what the variable QDEPLOY_ISA says, or the best that this CPU has.
  explicit Model(const std::string& path, int num_threads = 0, const std::string& isa = "");
  // The same from the content of a file, which is not needed any more later on.
  Model(const uint8_t* content, size_t bytes, int num_threads = 0, const std::string& isa = "");

  // Of one image, {C, H, W}, or of one row of numbers, {T, D} or {F}; of a text {T}, the tokens of the longest.
  std::vector<int64_t> input_shape() const;
  // Of one result: {K} scores, {C, H, W}, {T, D}. width: that of the texts of a call, which T may follow; 0: the longest.
  std::vector<int64_t> output_shape(int64_t width = 0) const;
  bool takes_u8() const;                     // raw pixels as well: the file says how they become numbers
  int64_t vocabulary() const;                // the network reads token ids, all below this; 0: it reads numbers
  bool variable() const;                     // texts may be shorter than the longest
  std::vector<std::string> classes() const;  // their names, where the file has them

  // Runs n images, dense and one after the other: f32 [n, C, H, W], [n, T, D] or [n, F]. Writes as many results:
  // logits, of an ensemble probabilities. A network that ends in codes gives the numbers that these stand for.
  void run(const float* images, int64_t n, float* output) const;
  // The same for raw pixels, u8 [n, H, W, C].
  void run(const uint8_t* images, int64_t n, float* output) const;
  // The same for n texts, token ids [n, width]. lengths: how many ids of each text count, from 1 to width; null: all.
  // What stands behind them is never read, and changes no bit. Rows that a text does not have are 0 in the results.
  void run(const int64_t* ids, int64_t n, int64_t width, const int64_t* lengths, float* output) const;

  // The class of each: the first of the largest scores.
  std::vector<int64_t> predict(const float* images, int64_t n) const;
  std::vector<int64_t> predict(const uint8_t* images, int64_t n) const;
  std::vector<int64_t> predict(const int64_t* ids, int64_t n, int64_t width, const int64_t* lengths) const;

  // What `qdeploy plan` prints: the kernel, the bits and the share of the work of every layer of a call with so many.
  std::string plan(int64_t batch = 1) const;

 private:
  std::shared_ptr<Session> session_;
};

#pragma GCC visibility pop

}  // namespace qdeploy
