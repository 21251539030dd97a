// A loaded model and its runs. Immutable after loading but for a cache of plans and a stock of arenas, so that any
// number of threads may run it at once, each in an arena of its own.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "chunk.h"
#include "plan.h"
#include "program.h"

namespace qdeploy {

struct Images {
  const void* data;  // dense: f32 [N, C, H, W] or [N, F]; u8 [N, H, W, C]
  bool is_u8;
  int64_t count;
};

// Where to copy an activation: [N, C, H, W] or [N, F], in its own type.
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
  // Threads that run `batch` images: as many as the session has, but at most one for every macs_per_thread.
  int threads_for(int64_t batch) const;

  // How many of a batch run in one chunk; keep_all as of a plan. Throws InputError where taps do not fit the memory.
  int64_t images_per_chunk(int64_t images, bool keep_all);
  std::shared_ptr<const Plan> plan(int64_t batch, bool keep_all);

 private:
  AlignedBuffer take_arena(size_t bytes);
  void give_arena(AlignedBuffer arena);
  void run_chunk(const Images& images, int64_t first, const Results& results);
  void write_results(const Chunk& chunk, const Results& results) const;

  const Kernels& kernels_;
  const int threads_;
  const int64_t macs_per_thread_;
  const uint64_t memory_;  // memory_limit, when this was loaded
  const Program program_;
  int64_t images_per_chunk_[2] = {0, 0};  // by keep_all; 0: not known yet
  double macs_per_image_ = 0;
  std::map<std::pair<int64_t, bool>, std::shared_ptr<const Plan>> plans_;
  std::vector<AlignedBuffer> arenas_;
};

}  // namespace qdeploy
