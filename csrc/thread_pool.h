// One pool of threads for the whole process, shared by all models.
#pragma once
#include <atomic>
#include <functional>
#include <vector>

namespace qdeploy {

constexpr int kMaxThreads = 256;

// All threads of one run meet here between two layers: 0.13 us where nobody is descheduled. Spins, then yields.
class Barrier {
 public:
  // `threads` is the same in every call.
  void wait(int threads);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> generation_{0};
};

class ThreadPool {
 public:
  static ThreadPool& shared();

  // Calls body(t, n) for t = 0..n-1 on n threads, the caller being t = 0, and returns when all are done. n is `threads`
  // for one caller at a time. Callers side by side share the cores: each takes the workers that the others left it, and
  // none waits for another, because a thread that waits for a core makes every layer wait. `body` must not throw.
  void run(int threads, const std::function<void(int, int)>& body);

 private:
  struct Job;
  struct Worker;
  struct State;

  ThreadPool();
  std::vector<Worker*> hire(int threads);

  const int cores_;  // that this process may use, found once
  State* state_;     // never freed: threads may outlive static destruction; replaced in a forked child
};

}  // namespace qdeploy
