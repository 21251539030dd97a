#include "thread_pool.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu.h"
#include "errors.h"
#include "os.h"

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

// Counts a thread as busy while it lives.
class Busy {
 public:
  explicit Busy(std::atomic<int>* count) : count_(count) { count_->fetch_add(1); }
  ~Busy() { count_->fetch_sub(1); }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  std::atomic<int>* const count_;
};

}  // namespace

void Barrier::wait(int threads) {
  const unsigned generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      std::this_thread::yield();  // more threads than cores, or a neighbour took one
    }
  }
}

struct ThreadPool::Job {
  const std::function<void(int, int)>* body;
  int threads;
  std::atomic<int> running;  // workers that have not finished
};

struct ThreadPool::Worker {
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<Job*> job{nullptr};
  int thread = 0;  // its number in the job

  void start(Job* next, int number) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      thread = number;
      job.store(next, std::memory_order_release);
    }
    wake.notify_one();
  }

  void work() {
    for (;;) {
      for (int spins = 0; spins < kSpins && !job.load(std::memory_order_acquire); ++spins) pause();
      if (!job.load(std::memory_order_acquire)) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return job.load(std::memory_order_relaxed) != nullptr; });
      }
      Job* mine = job.exchange(nullptr, std::memory_order_acq_rel);
      (*mine->body)(thread, mine->threads);
      mine->running.fetch_sub(1, std::memory_order_acq_rel);  // from here on both may be gone on to other jobs
    }
  }
};

struct ThreadPool::State {
  std::atomic<int> busy{0};  // threads at work: callers and workers
  std::mutex mutex;          // guards what follows
  std::vector<Worker*> idle;
};

ThreadPool::ThreadPool() : cores_(default_threads()), state_(new State) {
  // A forked child has none of the threads, and locks may be held by threads that are gone: it starts afresh.
  os::at_fork(nullptr, nullptr, [] { shared().state_ = new State; });
}

ThreadPool& ThreadPool::shared() {
  static ThreadPool* pool = new ThreadPool;
  return *pool;
}

// Workers for a caller that may use `threads` threads, itself one of them and already counted as busy.
std::vector<ThreadPool::Worker*> ThreadPool::hire(int threads) {
  State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  const int count = std::clamp(std::max(threads, cores_) - state.busy, 0, threads - 1);
  while (static_cast<int>(state.idle.size()) < count) {
    auto* worker = new Worker;
    try {
      std::thread([worker] { worker->work(); }).detach();
    } catch (const std::system_error& error) {
      delete worker;
      throw InputError("expected to start " + std::to_string(count) + " threads, got \"" + error.what() +
                       "\" at number " + std::to_string(state.idle.size() + 1) + " - at num_threads");
    }
    state.idle.push_back(worker);
  }
  state.busy += count;
  const auto first = state.idle.end() - count;  // those that ran last: they may still be awake
  std::vector<Worker*> hired(first, state.idle.end());
  state.idle.erase(first, state.idle.end());
  return hired;
}

void ThreadPool::run(int threads, const std::function<void(int, int)>& body) {
  State& state = *state_;
  const Busy caller(&state.busy);
  if (threads <= 1) return body(0, 1);
  const std::vector<Worker*> workers = hire(threads);
  const int count = static_cast<int>(workers.size());
  Job job = {&body, count + 1, {count}};
  for (int i = 0; i < count; ++i) workers[i]->start(&job, i + 1);
  body(0, count + 1);
  for (int spins = 0; job.running.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.idle.insert(state.idle.end(), workers.begin(), workers.end());
  state.busy -= count;
}

}  // namespace qdeploy
