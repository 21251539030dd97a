// All that the engine asks of the operating system. os_posix.cc answers for Linux and macOS, os_windows.cc for Windows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace qdeploy {
namespace os {

// ---- Memory ---------------------------------------------------------------------------------------------------------

constexpr size_t kHugePage = size_t{2} << 20;

// Zeroed pages of this process alone, huge ones if the system has them; nullptr where memory is short.
void* map_pages(size_t bytes);
void unmap_pages(void* pages, size_t bytes);

// Bytes of the machine, or fewer by the limit of this process's address space.
uint64_t memory_limit();

// ---- Processors -----------------------------------------------------------------------------------------------------

// Numbers of those that this process may run on; none where the system does not tell.
std::vector<int> usable_cpus();

#if defined(__x86_64__)
// Asks for the tile registers of AMX, for all threads of this process from here on; false where that is refused.
bool grants_tiles();
#elif defined(__aarch64__)
// Advanced SIMD and its dot products. Only the system may ask the CPU for them.
bool has_asimd();
bool has_asimddp();
#endif

// ---- Processes ------------------------------------------------------------------------------------------------------

// Called around every fork from here on; each may be nullptr.
void at_fork(void (*before)(), void (*in_parent)(), void (*in_child)());

// ---- Files ----------------------------------------------------------------------------------------------------------

// Open for reading; any number of threads may read at once.
class File {
 public:
  explicit File(const std::string& path);  // throws std::system_error
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool is_regular() const { return is_regular_; }
  uint64_t bytes() const { return bytes_; }  // of a regular one, when it was opened

  // Reads up to `bytes` and returns how many; 0 is the end of the file. Throws std::system_error.
  size_t read(uint64_t offset, size_t bytes, void* to) const;

 private:
  intptr_t handle_;
  bool is_regular_ = false;
  uint64_t bytes_ = 0;
};

}  // namespace os
}  // namespace qdeploy
