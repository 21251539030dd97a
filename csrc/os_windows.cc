// Compiled by CI, run by nobody yet.
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "os.h"

namespace qdeploy {
namespace os {
namespace {

HANDLE as_handle(intptr_t handle) { return reinterpret_cast<HANDLE>(handle); }

[[noreturn]] void throw_last_error() {
  throw std::system_error(static_cast<int>(GetLastError()), std::system_category());
}

}  // namespace

// Not huge: those need a privilege here.
void* map_pages(size_t bytes) { return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE); }

void unmap_pages(void* pages, size_t) { VirtualFree(pages, 0, MEM_RELEASE); }

uint64_t memory_limit() {
  MEMORYSTATUSEX status = {};
  status.dwLength = sizeof status;
  return GlobalMemoryStatusEx(&status) ? std::min(status.ullTotalPhys, status.ullTotalVirtual) : UINT64_MAX;
}

std::vector<int> usable_cpus() {
  std::vector<int> cpus;
  DWORD_PTR ours, all;
  if (!GetProcessAffinityMask(GetCurrentProcess(), &ours, &all)) return cpus;
  for (int cpu = 0; cpu < 64; ++cpu) {
    if (ours >> cpu & 1) cpus.push_back(cpu);
  }
  return cpus;
}

#if defined(__x86_64__)
bool grants_tiles() { return false; }  // nobody has tried
#endif

void at_fork(void (*)(), void (*)(), void (*)()) {}  // there is no fork

File::File(const std::string& path)
    : handle_(reinterpret_cast<intptr_t>(CreateFileW(std::filesystem::u8path(path).c_str(), GENERIC_READ,
                                                     FILE_SHARE_READ, nullptr, OPEN_EXISTING, 0, nullptr))) {
  if (as_handle(handle_) == INVALID_HANDLE_VALUE) throw_last_error();
  LARGE_INTEGER size;
  is_regular_ = GetFileType(as_handle(handle_)) == FILE_TYPE_DISK && GetFileSizeEx(as_handle(handle_), &size);
  if (is_regular_) bytes_ = static_cast<uint64_t>(size.QuadPart);
}

File::~File() { CloseHandle(as_handle(handle_)); }

size_t File::read(uint64_t offset, size_t bytes, void* to) const {
  OVERLAPPED at = {};
  at.Offset = static_cast<DWORD>(offset);
  at.OffsetHigh = static_cast<DWORD>(offset >> 32);
  const DWORD most = static_cast<DWORD>(std::min<size_t>(bytes, 1 << 30));  // a longer count does not fit a DWORD
  DWORD got = 0;
  if (!ReadFile(as_handle(handle_), to, most, &got, &at) && GetLastError() != ERROR_HANDLE_EOF) throw_last_error();
  return got;
}

}  // namespace os
}  // namespace qdeploy
