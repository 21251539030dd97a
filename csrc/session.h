// A loaded model and its runs. Immutable after loading but for a cache of plans and a stock of arenas, so that any
// number of threads may run it at once, each in an arena of its own.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "chunk.h"
#include "plan.h"
#include "program.h"

namespace qdeploy {

struct Images {
  const void* data;  // dense: f32 [N, C, H, W], [N, T, D] or [N, F]; u8 [N, H, W, C]; token ids, i32 [N, width]
  bool is_u8;
  int64_t count;
  int64_t width = 0;                 // of token ids; a text is an image
  const int64_t* lengths = nullptr;  // [N], of each text at most `width`; null: all have Program::longest tokens
};

// Where to copy an activation: [N, C, H, W], [N, T, D] or [N, F], in its own type. Of texts T is that of one with
// Images::width tokens, and rows that a text does not have stay as they were.
struct Tap {
  int activation;
  void* data;
};

struct Results {
  void* output = nullptr;      // the member's output, or [N, K] f32 probabilities of an ensemble
  int64_t* classes = nullptr;  // [N], or null
  std::vector<Tap> taps;
  double* step_seconds = nullptr;  // [steps] added to, or null
};

// A second thread saves at most half of a call and costs its wake-up and a meeting after every layer: calls below twice
// this run alone. 4 million MACs are 15 us with AVX512-VNNI and 55 with AVX2.
constexpr int64_t kMacsPerThread = 4'000'000;

// Those images of a call that run together.
struct Batch {
  const Images& images;
  int64_t first, count;  // images first.. of the call, or, with `order`, those
  const int64_t* order;  // numbers of texts
  int64_t length;        // of all of these texts
};

class Session {
 public:
  // threads 0: default_threads(). isa empty: QDEPLOY_ISA or the best. Throws ModelError, InputError.
  // Tests lower macs_per_thread to run small networks on many threads, and name the form of convolutions.
  Session(const ModelFile& file, int threads, const std::string& isa, int64_t macs_per_thread = kMacsPerThread,
          const std::string& conv_form = "");

  // Throws InputError for NaN or infinite inputs.
  void run(const Images& images, const Results& results);

  const Program& program() const { return program_; }
  int threads() const { return threads_; }
  uint64_t memory() const { return memory_; }  // that this process may use, in bytes
  // Threads that run `batch` images: as many as the session has, but at most one for every macs_per_thread.
  int threads_for(double images) const;

  // How many of a batch run in one chunk; keep_all as of a plan. Throws InputError where taps do not fit the memory.
  int64_t images_per_chunk(int64_t images, bool keep_all);
  std::shared_ptr<const Plan> plan(int64_t batch, int64_t length, bool keep_all);

 private:
  AlignedBuffer take_arena(size_t bytes);
  void give_arena(AlignedBuffer arena);
  void run_images(const Images& images, const Results& results);
  void run_texts(const Images& images, const Results& results);
  int64_t image_elements(int activation, const Images& images) const;
  void run_chunk(const Batch& batch, const Results& results);
  void write_results(const Chunk& chunk, const Batch& batch, const Results& results) const;

  const Kernels& kernels_;
  const int threads_;
  const int64_t macs_per_thread_;
  const uint64_t memory_;  // memory_limit, when this was loaded
  const Program program_;
  int64_t images_per_chunk_[2] = {0, 0};  // by keep_all; 0: not known yet
  double macs_per_image_ = 0;
  std::map<std::tuple<int64_t, int64_t, bool>, std::shared_ptr<const Plan>> plans_;
  std::vector<AlignedBuffer> arenas_;
};

}  // namespace qdeploy
