#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <thread>

#include "os.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <sched.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#endif

namespace qdeploy {
namespace os {
namespace {

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

int descriptor(intptr_t handle) { return static_cast<int>(handle); }

[[noreturn]] void throw_errno() { throw std::system_error(errno, std::generic_category()); }

}  // namespace

void* map_pages(size_t bytes) {
  const size_t whole = bytes + kHugePage;  // holds an aligned part
  if (whole < bytes) return nullptr;
  void* mapping = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  uint8_t* const start = static_cast<uint8_t*>(mapping);
  const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (head > 0) munmap(start, head);
  const size_t kept = head + (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
  munmap(start + kept, whole - kept);
#if defined(MADV_HUGEPAGE)
  madvise(start + head, bytes, MADV_HUGEPAGE);
#endif
  return start + head;
}

void unmap_pages(void* pages, size_t bytes) { munmap(pages, bytes); }

uint64_t memory_limit() {
  const uint64_t machine = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * page_bytes();
  rlimit address_space;
  if (getrlimit(RLIMIT_AS, &address_space) != 0) return machine;
  return std::min<uint64_t>(machine, address_space.rlim_cur);
}

#if defined(__APPLE__)
std::vector<int> usable_cpus() {
  std::vector<int> cpus(std::thread::hardware_concurrency());  // there is no affinity
  for (size_t i = 0; i < cpus.size(); ++i) cpus[i] = static_cast<int>(i);
  return cpus;
}
#else
std::vector<int> usable_cpus() {
  std::vector<int> cpus;
  cpu_set_t affinity;
  if (sched_getaffinity(0, sizeof affinity, &affinity) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &affinity)) cpus.push_back(cpu);
  }
  return cpus;
}
#endif

#if defined(__x86_64__) && defined(__APPLE__)
bool grants_tiles() { return false; }
#elif defined(__x86_64__)
bool grants_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, which older headers lack; a bit of XCR0
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_asimd() { return true; }
bool has_asimddp() {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
}
#elif defined(__aarch64__)
bool has_asimd() { return (getauxval(AT_HWCAP) & HWCAP_ASIMD) != 0; }
bool has_asimddp() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

void at_fork(void (*before)(), void (*in_parent)(), void (*in_child)()) { pthread_atfork(before, in_parent, in_child); }

// Not blocking: a pipe without a writer would never open.
File::File(const std::string& path) : handle_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (handle_ < 0) throw_errno();
  struct stat info;
  is_regular_ = fstat(descriptor(handle_), &info) == 0 && S_ISREG(info.st_mode);
  if (is_regular_) bytes_ = static_cast<uint64_t>(info.st_size);
}

File::~File() { close(descriptor(handle_)); }

size_t File::read(uint64_t offset, size_t bytes, void* to) const {
  for (;;) {
    const ssize_t got = pread(descriptor(handle_), to, bytes, static_cast<off_t>(offset));
    if (got >= 0) return static_cast<size_t>(got);
    if (errno != EINTR) throw_errno();
  }
}

}  // namespace os
}  // namespace qdeploy
