// One pool of threads for the whole process, shared by all models.
#pragma once
#include <atomic>
#include <functional>

namespace qdeploy {

constexpr int kMaxThreads = 256;

// All threads of one run meet here between two layers: 0.13 us where nobody is descheduled. Spins, then yields.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> generation_{0};
};

class ThreadPool {
 public:
  static ThreadPool& shared();

  // Calls body(t, n) for t = 0..n-1 on n threads, the caller being t = 0, and returns when all are done. n is
  // `threads`, or 1 where another caller has the workers, or where callers side by side already keep the cores busy: a
  // worker that waits for a core makes every layer wait. `body` must not throw.
  void run(int threads, const std::function<void(int, int)>& body);

 private:
  ThreadPool();
  void worker(int index, unsigned seen);
  void grow(int workers);

  const int cores_;  // that this process may use, found once

  struct State;
  State* state_;  // never freed: threads may outlive static destruction; replaced in a forked child
};

}  // namespace qdeploy
