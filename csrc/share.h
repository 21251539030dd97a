// One thread's part in a run.
#pragma once
#include <cstdint>

namespace qdeploy {

struct Share {
  int thread, threads;
};

struct Range {
  int64_t begin, end;
};

// The share of n things, which differ by one at most.
inline Range slice(int64_t n, Share share) {
  return {n * share.thread / share.threads, n * (share.thread + 1) / share.threads};
}

}  // namespace qdeploy
