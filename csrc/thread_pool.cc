#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu.h"
#include "errors.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace qdeploy {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  asm volatile("yield");
#endif
}

// About 50 us: longer than the gap between two layers or two calls in a loop, too short to be seen as load when idle.
constexpr int kSpins = 1000;

// Counts a caller of run while it lives.
class Caller {
 public:
  explicit Caller(std::atomic<int>* callers) : callers_(callers), others_(callers->fetch_add(1)) {}
  ~Caller() { callers_->fetch_sub(1); }
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;
  int others() const { return others_; }

 private:
  std::atomic<int>* const callers_;
  const int others_;
};

}  // namespace

void Barrier::wait() {
  const unsigned generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      sched_yield();  // more threads than cores, or a neighbour took one
    }
  }
}

struct ThreadPool::State {
  std::atomic<int> callers{0};
  std::mutex in_use;  // held by the caller that has the workers

  std::mutex mutex;  // guards what follows
  std::condition_variable wake;
  std::atomic<unsigned> job{0};  // bumped for every run
  const std::function<void(int, int)>* body = nullptr;
  int threads = 1;  // of the current run
  int workers = 0;  // started
  std::atomic<int> running{0};
};

ThreadPool::ThreadPool() : cores_(default_threads()), state_(new State) {
  // A forked child has none of the threads, and locks may be held by threads that are gone: it starts afresh.
  pthread_atfork(nullptr, nullptr, [] { shared().state_ = new State; });
}

ThreadPool& ThreadPool::shared() {
  static ThreadPool* pool = new ThreadPool;
  return *pool;
}

void ThreadPool::worker(int index, unsigned seen) {
  State& state = *state_;
  for (;;) {
    for (int spins = 0; spins < kSpins && state.job.load(std::memory_order_acquire) == seen; ++spins) pause();
    const std::function<void(int, int)>* body = nullptr;
    int threads = 1;
    {
      std::unique_lock<std::mutex> lock(state.mutex);
      state.wake.wait(lock, [&] { return state.job.load(std::memory_order_relaxed) != seen; });
      seen = state.job.load(std::memory_order_relaxed);
      body = state.body;
      threads = state.threads;
    }
    if (index >= threads) continue;
    (*body)(index, threads);
    state.running.fetch_sub(1, std::memory_order_acq_rel);
  }
}

void ThreadPool::grow(int workers) {
  State& state = *state_;
  for (; state.workers < workers; ++state.workers) {
    const int index = state.workers + 1;
    const unsigned seen = state.job.load();
    try {
      std::thread([this, index, seen] { worker(index, seen); }).detach();
    } catch (const std::system_error& error) {
      throw InputError("expected to start " + std::to_string(workers) + " threads, got \"" + error.what() +
                       "\" at number " + std::to_string(index) + " - at num_threads");
    }
  }
}

void ThreadPool::run(int threads, const std::function<void(int, int)>& body) {
  State& state = *state_;
  const Caller caller(&state.callers);
  if (threads <= 1 || caller.others() + threads > std::max(threads, cores_)) return body(0, 1);
  const std::unique_lock<std::mutex> in_use(state.in_use, std::try_to_lock);
  if (!in_use.owns_lock()) return body(0, 1);
  grow(threads - 1);
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    state.body = &body;
    state.threads = threads;
    state.running.store(threads - 1, std::memory_order_relaxed);
    state.job.fetch_add(1, std::memory_order_release);
  }
  state.wake.notify_all();
  body(0, threads);
  for (int spins = 0; state.running.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace qdeploy
