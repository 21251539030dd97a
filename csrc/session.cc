#include "session.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <numeric>

#include "cpu.h"
#include "ensemble.h"
#include "errors.h"
#include "os.h"
#include "thread_pool.h"
#include "winograd.h"

namespace qdeploy {
namespace {

// Guards the plans and arenas of all sessions. Held across fork, so that a child never inherits it locked.
std::mutex& registry() {
  static std::mutex* mutex = [] {
    auto* created = new std::mutex;
    os::at_fork([] { registry().lock(); }, [] { registry().unlock(); }, [] { registry().unlock(); });
    return created;
  }();
  return *mutex;
}

int checked_threads(int threads) {
  if (threads == 0) return default_threads();
  if (threads < 1 || threads > kMaxThreads) {
    throw InputError("expected 1 to " + std::to_string(kMaxThreads) + " threads, got " + std::to_string(threads) +
                     " - at num_threads");
  }
  return threads;
}

// Images that run together: 8 MB of activations more than one image needs stay in the last-level cache. With taps as
// many, or as many as fit `memory`. Throws InputError where not even one does.
int64_t chunk_for(const Program& program, bool keep_all, uint64_t memory) {
  constexpr int64_t kMost = 64;
  int64_t largest = 1;
  for (const Activation& a : program.activations) largest = std::max(largest, a.image_pitch);
  const uint64_t most = plan_bytes(program, 1, false).arena + (uint64_t{8} << 20);
  int64_t chunk = std::min(kMost, (int64_t{1} << 31) / largest);  // ConvTile holds 32-bit offsets
  while (chunk > 1 && plan_bytes(program, chunk, false).arena > most) chunk /= 2;
  for (chunk = std::max<int64_t>(1, chunk);; chunk /= 2) {
    const PlanBytes bytes = plan_bytes(program, chunk, keep_all);
    if (bytes.all() <= memory) return chunk;
    if (chunk > 1) continue;
    throw InputError("expected activations and tiles that fit the " + std::to_string(memory) +
                     " bytes of memory, got " + std::to_string(bytes.all()) + " bytes of one image - at taps");
  }
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Session::Session(const ModelFile& file, int threads, const std::string& isa, int64_t macs_per_thread,
                 const std::string& conv_form)
    : kernels_(kernels_for(isa)),
      threads_(checked_threads(threads)),
      macs_per_thread_(std::max<int64_t>(1, macs_per_thread)),
      memory_(memory_limit("")),
      program_(load_program(file, kernels_, threads_, qdeploy::conv_form(conv_form))) {
  registry();
  const PlanBytes image = plan_bytes(program_, 1, false);
  require(image.all() <= memory_, "activations and tiles that fit the " + std::to_string(memory_) + " bytes of memory",
          std::to_string(image.all()) + " bytes an image", "the graph in " + file.path());
  for (const Step& step : program_.steps) macs_per_image_ += static_cast<double>(step.macs);
}

int Session::threads_for(double images) const {
  const double useful = images * macs_per_image_ / static_cast<double>(macs_per_thread_);
  return static_cast<int>(std::clamp<double>(useful, 1, threads_));
}

int64_t Session::images_per_chunk(int64_t images, bool keep_all) {
  if (images <= 1 && !keep_all) return 1;
  const std::lock_guard<std::mutex> lock(registry());
  int64_t& known = images_per_chunk_[keep_all];
  if (known == 0) known = chunk_for(program_, keep_all, memory_);
  return std::min(images, known);
}

std::shared_ptr<const Plan> Session::plan(int64_t batch, int64_t length, bool keep_all) {
  constexpr size_t kMostPlans = 1024;  // texts have many lengths
  const std::tuple<int64_t, int64_t, bool> key = {batch, length, keep_all};
  {
    const std::lock_guard<std::mutex> lock(registry());
    const auto it = plans_.find(key);
    if (it != plans_.end()) return it->second;
  }
  auto plan = std::make_shared<const Plan>(make_plan(program_, batch, length, keep_all));
  const std::lock_guard<std::mutex> lock(registry());
  if (plans_.size() >= kMostPlans) plans_.clear();
  return plans_.emplace(key, plan).first->second;
}

AlignedBuffer Session::take_arena(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(registry());
    for (AlignedBuffer& arena : arenas_) {
      if (arena.bytes() < bytes) continue;
      AlignedBuffer taken = std::move(arena);
      arena = std::move(arenas_.back());
      arenas_.pop_back();
      return taken;
    }
    if (!arenas_.empty()) arenas_.pop_back();  // too small: the new one takes its place
  }
  return AlignedBuffer(bytes);
}

void Session::give_arena(AlignedBuffer arena) {
  const std::lock_guard<std::mutex> lock(registry());
  arenas_.push_back(std::move(arena));
}

void Session::run(const Images& images, const Results& results) {
  if (images.lengths) {
    run_texts(images, results);
  } else {
    run_images(images, results);
  }
}

void Session::run_images(const Images& images, const Results& results) {
  const int64_t most = images_per_chunk(images.count, !results.taps.empty());
  const int64_t chunks = (images.count + most - 1) / most;
  for (int64_t i = 0, first = 0, end; i < chunks; ++i, first = end) {
    end = first + images.count / chunks + (i < images.count % chunks);
    run_chunk({images, first, end - first, nullptr, program_.longest}, results);
  }
}

// Texts of one length run together: no row is computed that does not exist.
void Session::run_texts(const Images& images, const Results& results) {
  const int64_t most = images_per_chunk(images.count, !results.taps.empty());
  std::vector<int64_t> order(static_cast<size_t>(images.count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return images.lengths[a] < images.lengths[b]; });
  for (int64_t begin = 0, end; begin < images.count; begin = end) {
    const int64_t length = images.lengths[order[begin]];
    for (end = begin; end < images.count && end - begin < most && images.lengths[order[end]] == length;) ++end;
    run_chunk({images, begin, end - begin, order.data() + begin, length}, results);
  }
}

// Of one image of an activation in an array of the caller.
int64_t Session::image_elements(int activation, const Images& images) const {
  const Activation& a = program_.activations[activation];
  return a.elements() - (a.varies ? (program_.longest - images.width) * a.c : 0);
}

void Session::run_chunk(const Batch& batch, const Results& results) {
  const Images& images = batch.images;
  const std::shared_ptr<const Plan> plan = this->plan(batch.count, batch.length, !results.taps.empty());
  AlignedBuffer arena = take_arena(plan->arena_bytes);
  const Chunk chunk = {program_, *plan, arena.data(), 0, batch.count};
  std::atomic<bool> finite{true};
  const int64_t input_elements = image_elements(program_.member_input[0], images);
  const size_t input_bytes = images.is_u8 ? 1 : 4;
  const uint8_t* data = static_cast<const uint8_t*>(images.data);
  if (!batch.order) data += static_cast<size_t>(batch.first * input_elements) * input_bytes;
  const Caller input = {const_cast<uint8_t*>(data), batch.order, input_elements};

  // Each thread walks through all steps and meets the others after each.
  Barrier barrier;
  const auto body = [&](int thread, int threads) {
    const Share share = {thread, threads};
    const auto meet = [&] {
      if (threads > 1) barrier.wait(threads);
    };
    for (size_t m = 0; m < program_.member_input.size(); ++m) {
      const auto begin = program_.member_input.begin();
      if (std::find(begin, begin + m, program_.member_input[m]) != begin + m)
        continue;  // shared with an earlier member
      const SharedBytes& table = program_.graph.members[m].preprocess_table;
      if (!run_input(chunk, program_.member_input[m], table ? table->data() : nullptr, input, images.is_u8, share))
        finite = false;
    }
    meet();
    if (!finite) return;
    double last = results.step_seconds && thread == 0 ? seconds_now() : 0;
    const auto run_steps = [&](const Pass& pass, const Chunk& part) {
      for (size_t s = pass.begin; s < pass.end; ++s) {
        run_step(part, s, share);
        meet();
        if (results.step_seconds && thread == 0) {
          const double now = seconds_now();
          results.step_seconds[s] += now - last;
          last = now;
        }
      }
    };
    for (const Pass& pass : plan->passes) {
      const int64_t step = pass.together ? batch.count : 1;
      for (int64_t i = 0; i < batch.count; i += step) run_steps(pass, {program_, *plan, arena.data(), i, step});
    }
  };
  const double part = program_.longest ? static_cast<double>(batch.length) / program_.longest : 1;  // of an image
  ThreadPool::shared().run(threads_for(part * batch.count), body);
  if (!finite) {
    give_arena(std::move(arena));
    throw InputError("expected finite numbers, got NaN or infinity - at the input, images " +
                     std::to_string(batch.first) + " to " + std::to_string(batch.first + batch.count - 1));
  }
  write_results(chunk, batch, results);
  give_arena(std::move(arena));
}

void Session::write_results(const Chunk& chunk, const Batch& batch, const Results& results) const {
  const auto caller = [&](int activation, void* data) -> Caller {
    const int64_t elements = image_elements(activation, batch.images);
    const int64_t skipped = batch.order ? 0 : batch.first * elements * program_.activations[activation].bytes();
    return {static_cast<uint8_t*>(data) + skipped, batch.order, elements};
  };
  for (const Tap& tap : results.taps) copy_out(chunk, tap.activation, caller(tap.activation, tap.data));
  const std::vector<int>& outputs = program_.outputs;
  const Activation& out = chunk.plan.activations[outputs[0]];
  const Caller output = caller(outputs[0], results.outputs[0]);
  const auto classify = [&](int64_t i, int64_t best) {
    if (results.classes) results.classes[batch.order ? batch.order[i] : batch.first + i] = best;
  };
  if (program_.graph.combine == Combine::none) {
    for (size_t o = 0; o < outputs.size(); ++o) copy_out(chunk, outputs[o], caller(outputs[o], results.outputs[o]));
    for (int64_t i = 0; results.classes && i < batch.count; ++i) {
      const int64_t at = output.image(i);
      classify(i, out.is_f32()             ? first_largest(static_cast<const float*>(output.data) + at, out.c)
                  : out.type == Dtype::s16 ? first_largest(static_cast<const int16_t*>(output.data) + at, out.c)
                                           : first_largest(static_cast<const uint8_t*>(output.data) + at, out.c));
    }
    return;
  }
  std::vector<const float*> logits(outputs.size());
  for (int64_t i = 0; i < batch.count; ++i) {
    for (size_t m = 0; m < logits.size(); ++m) {
      logits[m] = reinterpret_cast<const float*>(chunk.at(outputs[m])) + i * out.image_pitch;
    }
    float* probabilities = static_cast<float*>(output.data) + output.image(i);
    classify(i, combine_members(program_.graph.combine, logits, out.c, probabilities));
  }
}

}  // namespace qdeploy
